"""What is asked of the machine: memory that stays, and the fast arithmetic where there is one."""

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from forks import children, started
from support.machine import compiles, precision


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like"
)
def test_freed_memory_is_kept_and_comes_back_without_page_faults_unless_it_is_scarce():
    code = """if True:
        import resource, torch
        from support.machine import keep_memory
        for largest, rounds in ((10**15, 10), (0, 40)):
            keep_memory(largest)
            for _ in range(rounds):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                # 25,600 pages of 4 KiB, or 50 of 2 MiB
                torch.empty(100 * 2 ** 20, dtype=torch.uint8).fill_(1)
                print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    new = [int(faults) >= 10 for faults in done.stdout.split()]  # was the memory new?
    assert len(new) == 50, done.stderr
    assert all(new[:10])  # scarce: left alone
    assert sum(new[10:]) <= 20  # it takes a few rounds until the free places fit


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
            assert not torch.is_autocast_enabled("cpu")
            assert compiles(device, True) and not compiles(device, False)


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
