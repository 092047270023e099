"""What a run asks of the machine: large pages, and the fast arithmetic if there is one."""

import contextlib
import datetime
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY, flags
from forks import children, started
from support import ddp
from support.files import InputError, out_of_memory
from support.machine import (
    compiles,
    fast_bfloat16,
    in_parallel,
    missing_compiler,
    peak_flops,
    precision,
)

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


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_card_is_not_taken_for_another_one(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)


def test_what_torch_says_when_memory_is_short():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert out_of_memory(raised.value) and out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("a shape is wrong"))
    assert out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))


@pytest.mark.parametrize("compiler", ['g++ "x', "'", "''", " "])
def test_a_compiler_whose_name_makes_no_sense_is_not_found(compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    missing = missing_compiler(torch.device("cpu"))
    assert missing.startswith("a compiler (") and compiler in missing


def test_a_process_that_is_killed_while_it_shares_work_ends_the_others_in_one_line(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))

    def killed(n):
        yield n
        if n:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)

    with pytest.raises(InputError, match="part of the work was killed, .*; end other processes"):
        list(in_parallel(killed, [(0,), (1,)]))


def test_a_backend_of_a_notebook_does_not_end_a_run(tmp_path):
    """matplotlib reads MPLBACKEND when it is first imported, so this needs a new process."""
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    few = {"max_steps": 1, "eval_contexts": 1, "out": "run", "source": ROOT / "data" / "sample.txt"}
    command = [sys.executable, ROOT / "train.py", TINY, *flags(**few)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "attention.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------
# several processes

IMPOSSIBLE = ["RANK=abc WORLD_SIZE=2", "RANK=5 WORLD_SIZE=1", "RANK=0", "RANK= WORLD_SIZE=2"]
IMPOSSIBLE += ["RANK=-1 WORLD_SIZE=2", "RANK=0 WORLD_SIZE=0", "RANK=0 WORLD_SIZE=1.5"]
IMPOSSIBLE += [
    "RANK=0 WORLD_SIZE=1 LOCAL_RANK=x",
    "RANK=0 WORLD_SIZE=99999999999",
    "RANK=0 WORLD_SIZE=²",
]


def set_ranks(monkeypatch, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        monkeypatch.setenv(*word.split("="))


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_ranks_that_make_no_sense_are_refused(monkeypatch, words):
    set_ranks(monkeypatch, words)
    with pytest.raises(InputError, match="process numbers .* invalid .*; start .* torchrun"):
        ddp.init("cpu", 4)


@pytest.mark.parametrize("words", ["WORLD_SIZE=2", "WORLD_SIZE=", "WORLD_SIZE=0 LOCAL_RANK=x"])
def test_without_a_rank_there_is_one_process(monkeypatch, words):
    set_ranks(monkeypatch, words)
    assert ddp.init("cpu", 4) == (torch.device("cpu"), 0, 1)


NOBODY = ["", "MASTER_ADDR=127.0.0.1", "MASTER_ADDR=127.0.0.1 MASTER_PORT=x"]
NOBODY += [f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" for port in (99999, "FREE")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("words", NOBODY)
def test_a_process_that_meets_nobody_says_where_it_waited(monkeypatch, capfd, words, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words = words.replace("FREE", str(free.getsockname()[1]))
    set_ranks(monkeypatch, f"RANK={rank} WORLD_SIZE=2 {words}")
    monkeypatch.setattr(ddp, "MEETING", datetime.timedelta(seconds=1))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(InputError, match=f"process {rank} of 2 could not meet the others at ") as e:
        ddp.init("cpu", 4)
    assert "\n" not in str(e.value) and "start all of them with torchrun" in str(e.value)
    address = ":".join(word.partition("=")[2] for word in words.split())
    assert f"process {rank} of 2 waits for the others at {address}" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_ends_a_process_that_waits_for_the_others(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    words = ROOT / "train.py", TINY
    with started(*words, cwd=tmp_path, environment=environment) as process:
        output = tmp_path / "output.txt"
        while not output.exists() or "waits for the others" not in output.read_text():
            time.sleep(0.01)
        process.terminate()
        process.join(30)
        assert process.exitcode == -signal.SIGTERM


SHARES = """if True:
    import os, time
    from support.machine import in_parallel
    os.sched_getaffinity = lambda _: range(3)
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
