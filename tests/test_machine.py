"""What is asked of the machine: memory that stays, and the fast arithmetic where there is one."""

import platform
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
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
