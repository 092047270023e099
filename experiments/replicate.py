"""The paper's table on a rented GPU: what it needs and how long it takes, then sweep.py.

    python -m experiments.replicate                          # what `make replicate` runs
    python -m experiments.replicate --quick                  # rehearse it, on any machine
    python -m experiments.replicate configs/sweep_gpt2.toml --source my_book.txt --out runs/mine

It takes what sweep.py takes; the config is configs/sweep_gpt2.toml unless another one is given. It
prints a line for each thing that the runs need, and refuses to start if one is missing. Then it
times a few steps, and says how long all runs will take. --quick runs two steps of small batches
with two seeds: all that can go wrong later is tried, and the numbers mean nothing. After any stop,
the same command continues.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import contextlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import sweep
from prepare_data import get_encoding
from support.console import duration
from support.files import InputError, alone, remove_stale, run_script
from support.jobs import run_jobs
from support.machine import compiles, describe_device, pick_device
from support.settings import read_flags
from train import Config

CONFIG = "configs/sweep_gpt2.toml"
QUICK = {"seed": "1,2", "max_steps": 2, "warmup_steps": 1, "eval_interval": 2, "eval_contexts": 1}
QUICK |= {"batch_size": 1, "block_size": 64, "val": 0.02, "test": 0.02}
QUICK |= {"device": "auto", "dtype": "auto"}
STEPS, LOOK = 6, 3  # of a trial: steps, and after how many the validation split is evaluated

# --------------------------------------------------------------------------------------------------
# what the cells need


@contextlib.contextmanager
def need(name, failed):
    """Yield a function that prints a line about this need. If it is not met (InputError inside),
    the reason goes into `failed`, {reason: name}."""
    try:
        yield lambda line: print(f"{name:<11}{line}", flush=True)
    except InputError as e:
        failed.setdefault(str(e), name)
        print(f"{name:<11}NOT OK, see below", flush=True)


def check_needs(cells, jobs):
    """Print a line for everything that these cells need, a list of Configs, `jobs` at a time.
    Returns the bytes of one model's weights. Raises InputError, which names all that is missing."""
    failed, devices, n_parameters = {}, [], 0
    with need("device", failed) as show:
        for name, dtype in sorted({(cell.device, cell.dtype) for cell in cells}):
            show(describe_device(pick_device(name), dtype))
        devices = [pick_device(cell.device) for cell in cells]
    with need("compiler", failed) as show:
        used = {compiles(device, cell.compile) for device, cell in zip(devices, cells)}
        show("used" if True in used else "not used")
    with need("tokenizer", failed) as show:
        for name in sorted({cell.tokenizer for cell in cells}):
            show(f"{name}, {get_encoding(name).n_vocab:,} tokens")
    with need("text", failed) as show:
        for data in {str(data.folder): data for data in map(sweep.prepare_cell, cells)}.values():
            sizes = [f"{stats['tokens']:,} ({s})" for s, stats in data.meta["splits"].items()]
            show(f"{data.meta['source']}, {data.meta['partition']}; tokens: {', '.join(sizes)}")
    with need("weights", failed) as show:
        n_parameters = sweep.check_models(cells)
        show(f"{', '.join(sorted({c.init_from for c in cells}))}, {n_parameters:,} parameters")
    with need("disk", failed) as show:
        line = check_disk(cells, jobs, 4 * n_parameters)
        show(line if n_parameters else "not checked, because the size of the model is not known")
    if failed:
        hint = "" if devices else "; to rehearse on another device, add --quick"
        raise InputError("; ".join(f"{name}: {why}" for why, name in failed.items()) + hint)
    return 4 * n_parameters


def check_disk(cells, jobs, n_bytes):
    """A line about the disk. n_bytes: of the weights of one model. Raises InputError if the disk is
    too small for the runs."""
    needed = disk_use(cells, n_bytes) + jobs * 6 * n_bytes  # last.pt, 3 times best.pt, and the next
    out = Path(cells[0].out).parent
    folder = next(path for path in Path(cells[0].out).absolute().parents if path.is_dir())
    ours = [path for cell in cells for path in Path(cell.out).glob("*.pt")]
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in ours)
    if free < needed:
        raise InputError(
            f"the disk of {out} has {free / 1e9:.1f} GB free, but {len(cells)} runs need "
            f"{needed / 1e9:.1f} GB; free some, or give an --out on another disk"
        )
    return f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed while the runs train"


def disk_use(cells, n_bytes):
    """The bytes that the cells keep: best.pt, with weights of n_bytes, a page, figures, metrics."""
    return len(cells) * (n_bytes + 10_000_000)


# --------------------------------------------------------------------------------------------------
# how long they will take


def time_trial(cell, jobs, threads, held=None):
    """About how many seconds a run of this cell takes if `jobs` of them run at a time, with so many
    threads each: measured by as many short runs. held: see run_jobs. Raises InputError if a run
    fails."""
    print(f"timing {STEPS} steps of {Path(cell.out).name}", flush=True)
    folder = Path(f"{Path(cell.out).parent}-trial-{os.getpid()}")
    remove_stale(folder.parent, folder.name.replace(str(os.getpid()), "{}"))
    short = replace(cell, max_steps=STEPS, eval_interval=LOOK, log_interval=1, patience=0)
    trials = [replace(short, out=str(folder / str(n))) for n in range(jobs)]
    commands, began = {trial.out: sweep.command_of(trial) for trial in trials}, time.perf_counter()
    try:
        for why in [why for _, why in run_jobs(commands, jobs, held, threads) if why]:
            raise InputError(f"a trial of {STEPS} steps failed, so no run was started: {why}")
        total = time.perf_counter() - began
        rows = [json.loads(line) for line in open(folder / "0" / "metrics.jsonl")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    at = {row["step"]: row["seconds"] for row in rows if "loss" in row}
    step = (at[STEPS] - at[LOOK + 1]) / (STEPS - LOOK - 1)
    look = max(0, at[LOOK + 1] - at[LOOK] - step)  # an evaluation and two checkpoints
    more = math.ceil(cell.max_steps / cell.eval_interval) - STEPS // LOOK
    return total + (cell.max_steps - STEPS) * step + more * look


def prepare(cells, jobs, held):
    """Check what these cells need, {name: Config}, and say what they take. Raises InputError."""
    first = next(iter(cells.values()))
    try:
        jobs, threads = sweep.at_a_time(first, jobs)
    except InputError:  # a check below gives the reason
        jobs, threads = jobs or 1, None
    jobs = min(jobs, len(cells))
    n_bytes = check_needs(list(cells.values()), jobs)
    line = f"{len(cells)} runs, {disk_use(cells, n_bytes) / 1e9:.1f} GB on disk"
    if first.max_steps > 2 * STEPS:
        local = [cell for cell in cells.values() if cell.schedule != "distributed"]
        seconds = time_trial((local or [first])[0], jobs, threads, held)
        line += f", about {duration(math.ceil(len(cells) / jobs) * seconds)}"
    print(f"{line}, {jobs} at a time", flush=True)


def main():
    argv = [word for word in sys.argv[1:] if word != "--quick"]
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    if not argv or argv[0].startswith("-"):
        argv = [CONFIG, *argv]
    words = [word for word in argv if word != "--report"]
    jobs = sweep.take_jobs(words)
    if "--quick" in sys.argv:
        out = f"runs/{Path(argv[0]).stem}_quick"
        given = read_flags(Config, words[1:])
        flags = [
            f"--{key}={value}" for key, value in {**QUICK, "out": out}.items() if key not in given
        ]
        argv, words = [*argv, *flags], [*words, *flags]
    if "--report" not in argv:
        values = sweep.read_sweep(words)
        sweep.check_folder(Path(values["out"]))
        left, _ = sweep.unfinished(sweep.read_cells(values))
        if left:
            with alone(Path(values["out"])) as held:
                prepare(left, jobs, held)
    sys.argv[1:] = argv
    sweep.main()


if __name__ == "__main__":
    run_script(main)
