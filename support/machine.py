"""The machine: device, precision, compiler, processes, signals, provenance."""

import contextlib
import datetime
import importlib.util
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty
from typing import NamedTuple

import torch
from torch import distributed

from support.files import InputError

# --------------------------------------------------------------------------------------------------
# device, precision, compiler


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps ... -> torch.device. Raises InputError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # so that what asks for no device means this one
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise InputError(f"device {name} is not available here; use auto or cpu") from None


def fast_bfloat16(device):
    """Whether bfloat16 is faster than float32: on CUDA cards that have it, and on CPUs with AMX.

    AVX-512 alone has the instructions too, but was slower with them where we tried (docs/LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()  # what the products may use
    allowed = "AMX" in limit or limit in ("ALL", "DEFAULT")
    return device.type == "cpu" and allowed and bool(capabilities.get("amx_bf16"))


def precision(device, dtype):
    """The context of a forward pass: bfloat16 arithmetic, or float32. auto: whatever is faster.

    Raises InputError where a card has no bfloat16.
    """
    if dtype == "bfloat16" and device.type == "cuda" and not fast_bfloat16(device):
        card = torch.cuda.get_device_name(device)
        raise InputError(f"{card} has no bfloat16; set dtype to auto, or to float32")
    if dtype == "bfloat16" or dtype == "auto" and fast_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def compiles(device, choice):
    """Whether to use torch.compile: true, false, or auto.

    auto: where bfloat16 is fast, if there is a compiler. On other CPUs nearly all the time goes
    into matrix products, and compiling won next to nothing. Raises InputError for true without one.
    """
    if choice is True and (missing := missing_compiler(device)):
        how = "install it, or set compile to auto or false"
        raise InputError(f"compile is true, and {missing} was not found here; {how}")
    if choice == "auto":
        return fast_bfloat16(device) and not missing_compiler(device)
    return choice


def missing_compiler(device):
    """What torch.compile would need and does not find, in words; empty if all is there."""
    if device.type == "cuda":
        if not importlib.util.find_spec("triton"):
            return "the package triton"
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        names = [os.environ.get("CXX", usual)]
    found = any(shutil.which(shlex.split(name)[0]) for name in names if name.strip())
    return "" if found else f"a compiler ({' or '.join(names)})"


# dense bfloat16 peak of a card in flop/s, without sparsity, from NVIDIA's data sheets
PEAK = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak_flops(device):
    """The most flop/s that this device can do, or None where we do not know."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAK.items() if card in name), None)


# --------------------------------------------------------------------------------------------------
# several processes


class Here(NamedTuple):
    """Where this process runs: number `rank` of the `world` that torchrun started, or 0 of 1."""

    device: torch.device
    rank: int
    world: int


def join(device, batch_size):
    """Here, after the other processes, if there are any, have been met.

    Processes talk by NCCL, each on a GPU of its own, or by Gloo where the device is the CPU.
    Raises InputError if they cannot share a batch of `batch_size`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world:
        share = f"must be divisible by the {world} processes that share it"
        raise InputError(f"batch_size ({batch_size}) {share}")
    own_gpu = world > 1 and device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if own_gpu else device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return Here(device, rank, world)


def part():
    """Leave the other processes, if there are any.

    Gloo's threads get a moment to let go of their last tensors, for which they need Python's lock.
    Without it torch sometimes waits for them, holds that lock, and never ends (docs/LOG.md).
    """
    if distributed.is_initialized():
        time.sleep(0.1)
        distributed.destroy_process_group()


@contextlib.contextmanager
def in_turn(rank, world):
    """Let processes do this one after another: rank 0 downloads or writes, the others find it.

    The first process of each other machine, which may have a disk of its own, comes second; then
    all others.
    """
    turn = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn if world > 1 else 0):
        distributed.barrier()
    yield
    for _ in range(2 - turn if world > 1 else 0):
        distributed.barrier()


def shared_mean(values, world, device):
    """The mean over all processes of each of some numbers: a list of floats."""
    values = torch.tensor([float(value) for value in values], device=device)
    if world > 1:
        distributed.all_reduce(values)
    return (values / world).tolist()


def from_first(values, world, device):
    """What rank 0 gives as `values`, a list of as many numbers for everyone."""
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.double, device=device)
    distributed.broadcast(values, 0)
    return values.tolist()


def in_parallel(function, arguments):
    """Everything that function(*a) yields for each of the arguments, in any order.

    The work is shared by as many processes as there are processors, where the system can fork.
    """
    n = min(len(arguments), os.cpu_count() or 1)
    if n < 2 or "fork" not in multiprocessing.get_all_start_methods():
        for a in arguments:
            yield from function(*a)
        return
    fork = multiprocessing.get_context("fork")  # children read the arguments where they are
    queue = fork.Queue(4 * n)

    def work(mine):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        threading.Thread(target=end_with_parent, daemon=True).start()
        try:
            for a in mine:
                for result in function(*a):
                    queue.put(result)
            queue.put(None)
        except Exception as e:
            queue.put(e)

    children = [fork.Process(target=work, args=(arguments[i::n],), daemon=True) for i in range(n)]
    try:
        for child in children:
            child.start()
        while n:
            try:
                result = queue.get(timeout=1)
            except Empty:
                if any(child.exitcode for child in children):
                    raise RuntimeError("a process that did part of the work was killed") from None
                continue
            if isinstance(result, Exception):
                raise result
            if result is None:  # a child is done
                n -= 1
            else:
                yield result
    finally:
        for child in children:
            child.terminate()


def end_with_parent():
    """Wait until the process that made this one has ended, however it did, and end as well."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def stop_signals():
    """Collect SIGINT, SIGTERM and SIGHUP (the terminal is gone) in a list, in place of dying.

    So the step in hand is finished and saved first. Ctrl-C reaches the compiler too, if it is just
    running: what torch makes of that ends as KeyboardInterrupt(number), as in files.run_script.
    """
    asked, numbers = [], {signal.SIGINT, signal.SIGTERM}
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    if signal.getsignal(hangup) is not signal.SIG_IGN:  # as after nohup
        numbers.add(hangup)
    before = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in numbers}
    try:
        yield asked
    except RuntimeError:
        if not asked:
            raise
        raise KeyboardInterrupt(asked[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# where a number comes from


def provenance(device, seed):
    """Command, commit, device, date, seed, and torch's version: a dict."""
    root = Path(__file__).parent.parent
    try:
        git = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(git, cwd=root, text=True, capture_output=True, check=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = f"{device.type}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    script = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": commit,
        "device": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "torch": torch.__version__,
    }
