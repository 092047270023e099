"""Scripts in processes that start at once and can be killed.

To import torch, with the parts that an optimizer and a figure need, takes longer than most tests.
So one process only imports them, and a copy of it becomes the script. (A copy of the process that
runs the tests would not do, because torch has threads there.)
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot"])


@contextlib.contextmanager
def started(script, *args, cwd, output="output.txt", n_threads=1, environment=None):
    """Yield a multiprocessing.Process that runs the script; it is killed at the end.

    output: the file in the folder `cwd` that receives stdout and stderr.
    """
    words = [str(script), *map(str, args)]
    arguments = words, str(cwd), output, n_threads, environment or {}
    process = FORKS.Process(target=become, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def become(words, cwd, output, n_threads, environment):
    import torch

    os.chdir(cwd)
    output = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= environment
    multiprocessing.set_start_method(None, force=True)  # as in a process that a user starts
    torch.set_num_threads(n_threads)
    sys.path.insert(0, os.path.dirname(words[0]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def children(pid):
    """The child processes of process `pid`, from Linux's /proc."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        pids += [int(path.parent.name)] * (parent == pid)
    return pids
