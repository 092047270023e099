"""The machine: device, precision, compiler, parallel work, signals, provenance."""

import contextlib
import datetime
import importlib.util
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty

import torch

from support.files import InputError, digest

# peak Tflop/s in dense bfloat16 (no sparsity), from NVIDIA's data sheets, by the name of the card
PEAK = {"H100 PCIe": 756, "H100": 989, "G?H200": 989, "A100": 312, "L40S": 362, "4090": 165}


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps ... -> torch.device. Raises InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # the default of every call that names no device
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise InputError(
            f"device {name} is not available here, with torch {torch.__version__}; use auto or cpu"
        ) from None


def fast_bfloat16(device):
    """Whether bfloat16 is faster than float32: on CUDA cards that have it, and on CPUs with AMX.
    (On CPUs with only AVX-512, it was slower in our tests: docs/LOG.md.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()  # what matrix products may use
    allowed = "AMX" in limit or limit in ("ALL", "DEFAULT")
    return device.type == "cpu" and allowed and bool(capabilities.get("amx_bf16"))


def precision(device, dtype):
    """The context manager of a forward pass: float32, bfloat16 (autocast), or auto, the faster one.
    Raises InputError if the card has no bfloat16."""
    fast = dtype != "float32" and fast_bfloat16(device)
    if dtype == "bfloat16" and device.type == "cuda" and not fast:
        card = torch.cuda.get_device_name(device)
        raise InputError(f"{card} has no bfloat16; set dtype to auto, or to float32")
    if dtype == "bfloat16" or fast:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def describe_device(device, dtype):
    """The device, its memory and its precision in words. Raises InputError like `precision`."""
    numbers = "bfloat16" if isinstance(precision(device, dtype), torch.autocast) else "float32"
    if device.type != "cuda":
        return f"{device.type}, {n_cores()} cores, {numbers}"
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
    name = torch.cuda.get_device_name(device)
    return f"{name}, {free:.0f} of {total:.0f} GiB free, {numbers}"


def compiles(device, choice):
    """Whether to use torch.compile: true, false, or auto (if bfloat16 is fast: on other CPUs,
    compiling gains next to nothing). Raises InputError for true without a compiler."""
    if choice == "auto":
        return fast_bfloat16(device) and not missing_compiler(device)
    if choice and (missing := missing_compiler(device)):
        raise InputError(
            f"compile is true, and {missing} was not found; install it, or set compile to auto"
        )
    return choice


def missing_compiler(device):
    """What torch.compile needs and does not find, in words; empty if nothing is missing."""
    names = [os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))]
    if device.type == "cuda":
        if not importlib.util.find_spec("triton"):
            return "the package triton"
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    with contextlib.suppress(ValueError):  # a quotation mark without its partner
        if any(shutil.which(shlex.split(name)[0]) for name in names if name.strip()):
            return ""
    return f"a compiler ({' or '.join(names)})"


def n_cores():
    """The number of processors that this process may use."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(allowed(0))


def compiler_failed(error):
    """Whether an exception comes from torch.compile."""
    return any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__)


def peak_flops(device):
    """The peak flop/s of this device, or None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = (n for card, n in PEAK.items() if re.search(rf"\b{card}\b(?! Laptop)", name))
    return next((n * 1e12 for n in known), None)


def in_parallel(function, arguments):
    """Yield everything that function(*a) yields for each a in arguments, a list, in any order. If
    the system can fork, as many processes as there are processors share the work."""
    n = min(len(arguments), n_cores())
    if n < 2 or "fork" not in multiprocessing.get_all_start_methods():
        for a in arguments:
            yield from function(*a)
        return
    fork = multiprocessing.get_context("fork")  # children share the memory of the arguments
    queue = fork.Queue(4 * n)

    def work(share):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end = lambda: (multiprocessing.parent_process().join(), os._exit(1))  # with the parent
        threading.Thread(target=end, daemon=True).start()
        try:
            for a in share:
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
                    raise InputError(
                        "a process that did part of the work was killed, perhaps because memory "
                        "was short; end other processes, and start the command again"
                    ) from None
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


@contextlib.contextmanager
def stop_signals():
    """Yield a list that collects SIGINT, SIGTERM and SIGHUP (the terminal is gone), so that the
    caller can finish its step. At the end, the first of them raises KeyboardInterrupt(number).
    Ctrl-C also reaches a compiler that is running; the error that torch makes of it becomes
    KeyboardInterrupt(number), too."""
    received, numbers = [], {signal.SIGINT, signal.SIGTERM}
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    if signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
        numbers.add(hangup)
    handlers = {n: signal.signal(n, lambda number, frame: received.append(number)) for n in numbers}
    try:
        yield received
        if received:
            raise KeyboardInterrupt(received[0])
    except RuntimeError:
        if not received:
            raise
        raise KeyboardInterrupt(received[0]) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def code_version():
    """Twelve hex digits that identify the code that trains and measures: of the lesson, what
    train.py needs, and all of fast/ and support/."""
    root = Path(__file__).parent.parent
    paths = [root / f"{name}.py" for name in "locality model prepare_data eval train".split()]
    for folder in ("fast", "support"):
        paths += sorted(path for path in (root / folder).glob("*.py") if path.is_file())
    return digest(paths)[:12]


def provenance(device, seed):
    """Where a number comes from: command, commit, device, date, seed and torch version, a dict."""
    command, folder = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        commit = subprocess.check_output(command, cwd=folder, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    module = getattr(sys.modules["__main__"], "__spec__", None)  # python -m
    script = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    cuda, name = device.type == "cuda", f"{device.type}, {n_cores()} cores"
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": commit.strip(),
        "device": torch.cuda.get_device_name(device) if cuda else name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "torch": torch.__version__,
    }
