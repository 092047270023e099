"""Several processes that train one model together (torchrun), or one process on its own."""

import contextlib
import datetime
import os
import time
from typing import NamedTuple

import torch
from torch import distributed

from support.files import InputError
from support.machine import pick_device


class Process(NamedTuple):
    """This process: its device, and its number, of those that torchrun started (or 0 of 1)."""

    device: torch.device
    rank: int
    world_size: int


def init(device_name, batch_size):
    """This Process, after it has met the others, if there are any, by NCCL (GPUs) or Gloo (CPUs).
    Raises InputError if they cannot share batch_size contexts, or the device is not available."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world_size:
        raise InputError(f"batch_size ({batch_size}) must be divisible by {world_size} processes")
    if world_size > 1 and device_name in ("auto", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(device_name)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return Process(device, rank, world_size)


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
