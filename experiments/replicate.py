"""The paper's table on a rented GPU: what it needs and how long it takes, then sweep.py.

    python -m experiments.replicate                          # what `make replicate` runs
    python -m experiments.replicate --quick                  # rehearse it, on any machine
    python -m experiments.replicate configs/sweep_gpt2.toml --source my_book.txt --out runs/mine

It takes what sweep.py takes; the config is configs/sweep_gpt2.toml unless another one is given. It
prints a line for each thing that the runs need, and refuses to start if one is missing. Then it
times a few steps, and says how long all runs will take. After any stop, the same command continues.

--quick makes two steps of small batches with two seeds. Its numbers mean nothing; it tries the
whole path to the table, but not the memory, the precision and the speed of a GPU.
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
from locality import schedule
from support.console import duration
from support.files import InputError, remove_stale, run_script
from support.jobs import at_a_time, run_jobs, take_jobs
from support.machine import compiles, describe_device, pick_device
from support.settings import read_flags
from support.tokenizers import get_encoding
from train import Config

CONFIG = "configs/sweep_gpt2.toml"
QUICK = {"max_steps": 2, "warmup_steps": 1, "eval_interval": 2, "eval_contexts": 1}
QUICK |= {"log_interval": 1, "batch_size": 1, "block_size": 64, "val": 0.02, "test": 0.02}
QUICK |= {"device": "auto", "dtype": "auto", "compile": "false"}
UNKNOWN = "not checked"  # how the reason begins if a check depends on one that failed
STEPS, LOOK = 6, 3  # of a trial: steps, and after how many the validation split is evaluated

# --------------------------------------------------------------------------------------------------
# what the cells need


@contextlib.contextmanager
def need(name, failed):
    """Yield a function that prints a line about this need. If it is not met (InputError inside),
    the reason is printed, and goes into `failed`, {name: reason}."""
    try:
        yield lambda line: print(f"{name:<11}{line}", flush=True)
    except (InputError, OSError) as e:
        failed[name] = str(e)
        mark = "" if str(e).startswith(UNKNOWN) else "NOT OK: "
        print(f"{name:<11}{mark}{e}", flush=True)


def check_needs(cells, jobs):
    """Print a line for everything that these cells need, a list of Configs, `jobs` at a time.
    Returns the bytes of one model's weights. Raises InputError, which names all that is missing."""
    failed, devices, n_parameters = {}, [], 0
    with need("device", failed) as show:
        devices = check_devices(cells, show)
    with need("compiler", failed) as show:
        used = {compiles(device, cell.compile) for device, cell in zip(devices, cells)}
        show("used" if True in used else "not used")
    with need("tokenizer", failed) as show:
        for name in sorted({cell.tokenizer for cell in cells}):
            show(f"{name}, {get_encoding(name).n_vocab:,} tokens")
    with need("text", failed) as show:
        if "tokenizer" in failed:
            raise InputError(f"{UNKNOWN}, because the tokenizer is missing")
        for data in {str(data.folder): data for data in map(sweep.prepare_cell, cells)}.values():
            sizes = [f"{stats['tokens']:,} ({s})" for s, stats in data.meta["splits"].items()]
            show(f"{data.meta['source']}, {data.meta['partition']}; tokens: {', '.join(sizes)}")
    with need("weights", failed) as show:
        n_parameters = sweep.check_models(cells, texts="text" not in failed)
        show(f"{', '.join(sorted({c.init_from for c in cells}))}, {n_parameters:,} parameters")
    with need("disk", failed) as show:
        if not n_parameters:
            raise InputError(f"{UNKNOWN}, because the size of the model is not known")
        show(check_disk(cells, jobs, 4 * n_parameters))
    missing = {name: why for name, why in failed.items() if not why.startswith(UNKNOWN)}
    if len(missing) > 1:
        raise InputError(f"{', '.join(missing)}: not OK, for the reasons above; no run was started")
    for name, why in missing.items():
        raise InputError(f"{name}: {why}; no run was started")
    return 4 * n_parameters


def check_devices(cells, show):
    """Show a line for each device and precision. Returns the device of each cell. Raises
    InputError."""
    try:
        devices = [pick_device(cell.device) for cell in cells]
    except InputError as e:
        reason = str(e).partition(";")[0]
        raise InputError(f"{reason}; to rehearse on what is here, add --quick") from None
    for device, dtype in {(str(d), c.dtype): (d, c.dtype) for d, c in zip(devices, cells)}.values():
        show(describe_device(device, dtype))
    return devices


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
    out = Path(cell.out).parent
    folder = out / f".trial-{os.getpid()}"
    remove_stale(out, ".trial-{}")
    shutil.rmtree(folder, ignore_errors=True)  # in a container, a killed one may have this number
    short = replace(cell, max_steps=STEPS, eval_interval=LOOK, log_interval=1, patience=0)
    trials = [replace(short, out=str(folder / str(n))) for n in range(jobs)]
    commands, began = {trial.out: sweep.command_of(trial) for trial in trials}, time.perf_counter()
    try:
        ended = run_jobs(commands, jobs, held, threads, kill=True)
        reasons = [why for _, why in ended if why]
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if reasons:  # the folder stays until the next start, because a message may name a file in it
        why = reasons[0].replace(" --overwrite", "")  # a key of train.py only
        raise InputError(f"a trial of {STEPS} steps failed, so no run was started: {why}")
    total = time.perf_counter() - began
    rows = map(json.loads, (folder / "0" / "metrics.jsonl").read_text().splitlines())
    at = {row["step"]: row["seconds"] for row in rows if "loss" in row}
    shutil.rmtree(folder, ignore_errors=True)
    step = (at[STEPS] - at[LOOK + 1]) / (STEPS - LOOK - 1)
    look = max(0, at[LOOK + 1] - at[LOOK] - step)  # an evaluation and two checkpoints
    more = math.ceil(cell.max_steps / cell.eval_interval) - STEPS // LOOK
    return total + (cell.max_steps - STEPS) * step + more * look


def cost(cell):
    """A key that sorts cells by how long they train: a layer attends twice if its locality is
    neither 0 nor 1."""
    return cell.max_steps, sum(0 < x < 1 for x in schedule(cell.schedule, 12, cell.floor))


def prepare(left, finished, jobs, held):
    """Check what the cells that are left need, {name: Config}, and say what they take. finished:
    the results of the others. Raises InputError."""
    cells = list(left.values())
    try:
        jobs, threads = at_a_time(cells[0].device, len(cells), jobs)
    except InputError:  # a check below gives the reason
        jobs, threads = min(jobs or 1, len(cells)), None
    n_bytes = check_needs(cells, jobs)
    line = f"runs: {len(cells)}, {jobs} at a time, {disk_use(cells, n_bytes) / 1e9:.1f} GB on disk"
    slowest = max(cells, key=cost)
    seconds = max((results["seconds"] for results in finished.values()), default=0)
    if not finished and slowest.max_steps > 2 * STEPS:
        seconds = time_trial(slowest, jobs, threads, held)
    if seconds:
        line += f", about {duration(math.ceil(len(cells) / jobs) * seconds)}"
    print(line, flush=True)


def main():
    quick, argv = "--quick" in sys.argv, [word for word in sys.argv[1:] if word != "--quick"]
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    if not argv or argv[0].startswith("-"):
        argv = [CONFIG, *argv]
    if quick:
        words = [word for word in argv if word != "--report"]
        take_jobs(words)
        tables, given = sweep.tables_of(sweep.read_sweep(words)), read_flags(Config, words[1:])
        flags = {**QUICK, "out": f"runs/{Path(argv[0]).stem}_quick"}
        lists = {key: {str(t[key]) for t in tables if key in t} for key in flags}
        flags = {key: value for key, value in flags.items() if len(lists[key]) < 2}
        seeds = [seed for t in tables if isinstance(t.get("seed"), list) for seed in t["seed"][:2]]
        if seeds:
            flags["seed"] = ",".join(dict.fromkeys(map(str, seeds)))
        argv += [f"--{key}={value}" for key, value in flags.items() if key not in given]
    sys.argv[1:] = argv
    try:
        sweep.main(prepare)
    except SystemExit:
        if quick:
            print("\nThis was a rehearsal: a few steps of small batches. Its numbers mean nothing.")
        raise


if __name__ == "__main__":
    run_script(main)
