"""Several processes that train one model together (torchrun), or one process on its own."""

import contextlib
import datetime
import os
import signal
import sys
import time
from typing import NamedTuple

import torch
from torch import distributed

from support.files import InputError
from support.machine import pick_device


# how long processes wait for each other: to meet, and while the first one prepares the text
MEETING, PREPARATION = datetime.timedelta(minutes=10), datetime.timedelta(hours=2)


class Process(NamedTuple):
    """This process: its device, and its number, of those that torchrun started (or 0 of 1)."""

    device: torch.device
    rank: int
    world_size: int


def init(device_name, batch_size):
    """This Process, after it has met the others, if there are any, by NCCL (GPUs) or Gloo (CPUs).
    Raises InputError if they cannot meet, if they cannot share batch_size contexts, or if the
    device is not available."""
    rank, world_size, local_rank = read_ranks()
    if batch_size % world_size:
        raise InputError(f"batch_size ({batch_size}) must be divisible by {world_size} processes")
    if world_size > 1 and device_name in ("auto", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{local_rank}"
    device = pick_device(device_name)
    if world_size > 1:
        meet("nccl" if device.type == "cuda" else "gloo", rank, world_size)
    return Process(device, rank, world_size)


def read_ranks():
    """(RANK, WORLD_SIZE, LOCAL_RANK), which torchrun sets; (0, 1, 0) without RANK, because job
    systems set the other two for purposes of their own. Raises InputError."""
    if "RANK" not in os.environ:
        return 0, 1, 0
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    words = [os.environ.get(name, "0") for name in names]
    if all(word.isascii() and word.isdigit() and len(word) < 7 for word in words):
        rank, world_size, local_rank = map(int, words)
        if rank < world_size:
            return rank, world_size, local_rank
    given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    raise InputError(
        f"the process numbers in the environment are invalid ({given}); start several processes "
        "with torchrun; for a single one, unset RANK"
    )


def meet(backend, rank, world_size):
    """Wait for the other processes and connect to them. Raises InputError."""
    address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    print(f"process {rank} of {world_size} waits for the others at {address}", file=sys.stderr)
    # Python's handlers do not run while torch waits: let a signal end the process at once
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        if callable(handlers[number]):
            signal.signal(number, signal.SIG_DFL)
    try:
        store, *_ = next(distributed.rendezvous("env://", rank, world_size, timeout=MEETING))
        store.set_timeout(MEETING)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=PREPARATION
        )
    except (RuntimeError, ValueError) as e:  # errors of the network are RuntimeErrors
        reason = str(e).partition("\n")[0]
        raise InputError(
            f"process {rank} of {world_size} could not meet the others at {address} ({reason}); "
            "start all of them with torchrun; for a single one, unset RANK"
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shut_down():
    """Leave the other processes, if there are any."""
    if distributed.is_initialized():
        # Gloo's threads need Python's lock to release their last tensors; torch sometimes waits
        # for them while it holds that lock, and never ends (docs/LOG.md).
        time.sleep(0.1)
        distributed.destroy_process_group()


@contextlib.contextmanager
def in_turn(process):
    """Run this block first in rank 0, which downloads or writes what the others reuse; then in the
    first process of every other machine, which may have its own disk; then in all others."""
    turn = 0 if process.rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    before, after = (turn, 2 - turn) if process.world_size > 1 else (0, 0)
    for _ in range(before):
        distributed.barrier()
    yield
    for _ in range(after):
        distributed.barrier()


def mean(values, process):
    """The mean over all processes of each of a list of numbers: a list of floats."""
    values = torch.tensor([float(value) for value in values], device=process.device)
    if process.world_size > 1:
        distributed.all_reduce(values)
    return (values / process.world_size).tolist()


def broadcast(values, process):
    """The values of rank 0, a list of numbers, in every process: a list of the same length."""
    if process.world_size == 1:
        return values
    values = torch.tensor(values, dtype=torch.double, device=process.device)
    distributed.broadcast(values, 0)
    return values.tolist()
