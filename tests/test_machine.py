"""What is asked of the machine: large pages, and the fast arithmetic where there is one."""

import contextlib
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


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="no large pages here",
)
def test_large_tensors_lie_in_large_pages_and_are_given_back():
    code = """if True:
        import resource, sys
        if sys.argv[1:]:
            import support
        import torch
        def held():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        before = held()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        x = torch.empty(100 * 2**20, dtype=torch.uint8).fill_(1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        del x
        print(held() - before)"""
    faults = []
    for more in ([], ["ours"]):
        command = [sys.executable, "-c", code, *more]
        env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
        new, left = map(int, done.stdout.split())
        assert left < 20 * 2**20, done.stderr
        faults.append(new)
    assert faults[1] < faults[0] / 2  # of 25,600 pages of 4 KiB, or 50 of 2 MiB


def test_bfloat16_is_chosen_where_the_machine_has_fast_matrix_products_in_it(monkeypatch):
    cases = (
        (True, "c++", (True, True)),
        (True, None, (True, False)),
        (False, "c++", (False, False)),
    )
    for amx, compiler, expected in cases:
        has = {"avx512_bf16": True, "amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", has.copy, raising=False)
        monkeypatch.setattr("shutil.which", lambda name, found=compiler: found)
        device = torch.device("cpu")
        with precision(device, "auto"):
            assert (torch.is_autocast_enabled("cpu"), compiles(device, "auto")) == expected
        with precision(device, "float32"):
            assert not torch.is_autocast_enabled("cpu") and not compiles(device, False)
        if compiler:
            assert compiles(device, True)
        else:
            with pytest.raises(InputError, match="compile is true, and a compiler .* not found"):
                compiles(device, True)


def test_a_card_without_bfloat16_computes_in_float32(monkeypatch):
    device, has = torch.device("cuda"), {"answer": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: has["answer"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card 7")
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert fast_bfloat16(device) and compiles(device, "auto")
    has["answer"] = False
    assert not fast_bfloat16(device) and not compiles(device, "auto") and compiles(device, True)
    assert isinstance(precision(device, "auto"), contextlib.nullcontext)
    with pytest.raises(InputError, match="Old Card 7 has no bfloat16; set dtype to auto"):
        precision(device, "bfloat16")


def test_triton_is_missed_where_a_gpu_would_need_it(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="compile is true, and the package triton was not found"):
        compiles(torch.device("cuda"), True)
    assert compiles(torch.device("cpu"), True)


def test_what_torch_says_when_memory_is_short():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert out_of_memory(found.value) and out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("a shape is wrong"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_the_processes_that_share_work_end_with_the_one_that_shares_it(tmp_path):
    (tmp_path / "shares.py").write_text("""if True:
        import os, time
        from support.machine import in_parallel
        os.cpu_count = lambda: 3
        def never_ends(n):
            yield n
            time.sleep(100)
        for n in in_parallel(never_ends, [(1,), (2,), (3,)]):
            print(n, flush=True)""")
    with started(tmp_path / "shares.py", cwd=tmp_path) as process:
        told = tmp_path / "output.txt"
        while not told.exists() or told.read_text().count("\n") < 3 and process.is_alive():
            time.sleep(0.01)
        shared = children(process.pid)
        process.kill()
        process.join(60)
    assert len(shared) == 3
    for _ in range(1000):
        states = [state_of(pid) for pid in shared]
        if set(states) <= {None, "Z"}:
            return
        time.sleep(0.01)
    raise AssertionError(states)


def state_of(pid):
    """What a process does: R, S … or Z, if it has ended; None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
