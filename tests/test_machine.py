"""What a run asks of the machine: large pages, and the fast arithmetic if there is one."""

import contextlib
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from forks import children, started
from support.files import InputError, out_of_memory
from support.machine import compiles, fast_bfloat16, precision

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGES = """if True:
    import resource, sys
    if sys.argv[1:]:
        import support
    import torch
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    before = resident()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.empty(100 * 2**20, dtype=torch.uint8).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    del x
    print(resident() - before)"""


@pytest.mark.skipif(not HUGE.exists() or "[never]" in HUGE.read_text(), reason="has no large pages")
def test_large_tensors_use_large_pages_and_are_given_back():
    faults = []
    for more in ([], ["with support"]):
        command = [sys.executable, "-c", PAGES, *more]
        env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
        n, left = map(int, done.stdout.split())
        assert left < 20 * 2**20, done.stderr
        faults.append(n)
    assert faults[1] < faults[0] / 2  # of 25,600 pages of 4 KiB, or 50 of 2 MiB


@pytest.mark.parametrize("compiler", ["c++", None])
@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_is_chosen_if_the_machine_is_fast_in_it(amx, compiler, monkeypatch):
    capabilities = {"avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities.copy, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with precision(cpu, "auto"):
        assert torch.is_autocast_enabled("cpu") == amx
    with precision(cpu, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    assert compiles(cpu, "auto") == (amx and compiler is not None) and not compiles(cpu, False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="compile is true, and the package triton was not found"):
        compiles(cuda, True)
    refused = pytest.raises(InputError, match="compile is true, and a compiler .* not found")
    with contextlib.nullcontext() if compiler else refused:
        assert compiles(cpu, True)


def test_a_card_without_bfloat16_computes_in_float32(monkeypatch):
    device, answers = torch.device("cuda"), [True]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: answers[-1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card 7")
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert fast_bfloat16(device) and compiles(device, "auto")
    answers.append(False)
    assert not fast_bfloat16(device) and not compiles(device, "auto") and compiles(device, True)
    assert isinstance(precision(device, "auto"), contextlib.nullcontext)
    with pytest.raises(InputError, match="Old Card 7 has no bfloat16; set dtype to auto"):
        precision(device, "bfloat16")


def test_what_torch_says_when_memory_is_short():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert out_of_memory(raised.value) and out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("a shape is wrong"))
    assert out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))


SHARES = """if True:
    import os, time
    from support.machine import in_parallel
    os.cpu_count = lambda: 3
    def never_ends(n):
        yield n
        time.sleep(100)
    for n in in_parallel(never_ends, [(1,), (2,), (3,)]):
        print(n, flush=True)"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_the_processes_that_share_work_end_with_their_parent(tmp_path):
    (tmp_path / "shares.py").write_text(SHARES)
    with started(tmp_path / "shares.py", cwd=tmp_path) as process:
        output = tmp_path / "output.txt"
        while not output.exists() or output.read_text().count("\n") < 3 and process.is_alive():
            time.sleep(0.01)
        sharing = children(process.pid)
        process.kill()
        process.join(60)
    assert len(sharing) == 3
    deadline = time.monotonic() + 10
    while running := [pid for pid in sharing if state_of(pid) not in ("gone", "Z")]:
        assert time.monotonic() < deadline, running
        time.sleep(0.01)


def state_of(pid):
    """The state of a process: R, S … or Z, if it has ended; "gone" after that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
