"""Commands in processes of their own, several at a time; they stop when this process does."""

import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import torch

from support.files import InputError, open_own
from support.machine import n_cores, pick_device, stop_signals


def take_jobs(argv):
    """Take --jobs N out of a command line, a list. Returns N, or None. Raises InputError."""
    if "--jobs" not in argv:
        return None
    at = argv.index("--jobs")
    jobs = "".join(argv[at + 1 : at + 2])
    if not (jobs.isascii() and jobs.isdigit() and len(jobs) < 5 and int(jobs) > 0):
        raise InputError("--jobs takes a number of parallel runs")
    del argv[at : at + 2]
    return int(jobs)


def at_a_time(name, n, jobs):
    """How many of n jobs run at a time on a device, given its name: `jobs`, or (if None) what its
    memory allows; and how many threads each of them gets, or None. Raises InputError."""
    device = pick_device(name)
    cuda = device.type == "cuda"
    if jobs is None:  # a small model leaves a large GPU idle
        jobs = torch.cuda.mem_get_info(device)[0] // 2**35 if cuda else 1
    jobs = max(1, min(jobs, n))
    return jobs, max(1, n_cores() // jobs) if jobs > 1 and not cuda else None


def run_jobs(commands, n, held=None, threads=None, meanwhile=lambda: None, kill=False):
    """Run commands in processes of their own, n at a time. Yields (name, why) as each one ends; why
    is None, or in one line why it failed.

    commands: {name: (a list of words, the path of the log)}. held: an open folder, whose lock the
    processes hold as well. threads: how many each process may use. meanwhile: called twice a second
    or more often. kill: end them at once after a signal, instead of letting them save.
    Raises KeyboardInterrupt(number) after a signal, once all processes have been told to stop.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    options = {"env": environment, "pass_fds": () if held is None else (held,)}
    children = set()
    with stop_signals() as received, ThreadPoolExecutor(n) as pool:
        running = {
            pool.submit(run_job, *job, options, children, received): name
            for name, job in commands.items()
        }
        left = set(running)
        try:
            while left:
                done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                if received:
                    raise KeyboardInterrupt(received[0])
                for future in done:
                    yield running[future], future.result()
                meanwhile()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.kill() if kill else child.terminate()
            if children and not kill:
                print("stopping: the runs finish their step and save", file=sys.stderr)
            raise


def run_job(command, log, options, children, received):
    """Run one command. Returns None, or why it failed: one line.

    children: a set that contains the process while it runs. received: a list of signals; if it is
    not empty, the process has to stop.
    """
    try:
        with open_own(log, "wb") as f:
            with subprocess.Popen(command, stdout=f, stderr=f, **options) as child:
                children.add(child)
                if received:
                    child.terminate()
                status = child.wait()
                children.discard(child)
        if status == 0:
            return None
        text = log.read_text(errors="replace")
    except (InputError, OSError) as e:  # the disk is full, or another file has the name of the log
        return f"error: {e}"
    lines = text.replace("\r", "\n").strip().split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"error: exit status {status}: {lines[-1]}"
