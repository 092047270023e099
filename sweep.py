"""The paper's experiment: schedules x partitions x seeds, a run of train.py each; then a report.

    python sweep.py configs/sweep_smoke.toml
    python sweep.py configs/sweep_gpt2.toml --source my_book.txt --out runs/my_sweep
    python sweep.py configs/sweep_gpt2.toml --seed 1,2 --schedule distributed,quintic
    python sweep.py configs/sweep_gpt2.toml --jobs 2        # two runs at a time
    python sweep.py configs/sweep_gpt2.toml --report        # the report again, from what is on disk

A sweep is a config of train.py with one or more tables [[sweep]] of lists: each table stands for
all combinations of its lists, and each combination is a cell. On the command line, values between
commas replace a list. Finished cells are not run again, interrupted ones are resumed, and broken
ones are reported at the end. window:matched, block:matched and aligned:matched become the N that
reaches back as far on average, in the same text, as the semantic or semantic:closed blocks of the
same table (of the config, if the table has neither). The report consists of table.md, table.json
and four figures. A finished cell keeps what the report and view.py need, but not last.pt.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import bisect
import hashlib
import itertools
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from locality import partition_text
from prepare_data import TextConfig, get_encoding, prepare, token_bytes, vocabulary_size
from report.sweep import canonical, read_results, read_runs, write_report
from support.console import duration, warn_once
from support.files import InputError, alone, run_script, write_text, writing
from support.jobs import run_jobs
from support.machine import code_version, compiles, n_cores, pick_device, precision
from support.run import is_ours
from support.settings import parse, read_flags, to_toml, usage
from train import Config, build_model, check_splits, read_config, read_values

ROOT = Path(__file__).resolve().parent
MAX_NAME = 200  # bytes; a disk allows 255 including the suffixes of files and temporary files

# --------------------------------------------------------------------------------------------------
# the cells


def read_sweep(argv):
    """The keys of a sweep from a command line, `CONFIG.toml [--key value ...]`: a dict. Raises
    InputError."""
    values, types = read_values(argv, more=("sweep",)), Config.__annotations__
    tables = values.get("sweep")
    for key, value in read_flags(Config, argv[1:]).items():
        words = value.split(",") if isinstance(value, str) else []
        for table in tables if isinstance(tables, list) else []:
            if isinstance(table, dict) and key in table:
                table[key] = [parse(word, types[key]) for word in words] or [value]
    return values


def read_cells(values):
    """The cells of a sweep, {name: Config}, from the keys of its TOML file. Raises InputError."""
    tables = values.pop("sweep", None)
    tables = tables if isinstance(tables, list) else []
    if not tables or not all(isinstance(table, dict) and table for table in tables):
        raise InputError(
            "a sweep needs a table [[sweep]] of lists, for example "
            'schedule = ["distributed", "quintic"]'
        )
    known = Config.__dataclass_fields__.keys() - {"out"}
    for table in tables:
        for key, choices in table.items():
            if key not in known:
                raise InputError(f"[[sweep]]: {key} is not a key in which cells can differ")
            if not isinstance(choices, list) or not choices:
                raise InputError(f"[[sweep]]: {key} must be a list of one or more values")
    cells = {}
    if sum(math.prod(map(len, table.values())) for table in tables) > 10_000:
        raise InputError("[[sweep]]: these lists have more than 10,000 combinations")
    for table in tables:
        reference = matching_reference(table.get("partition", ()), values.get("partition"))
        for choice in itertools.product(*table.values()):
            cell = resolve({**values, **dict(zip(table, choice))}, reference)
            others = (asdict(other) for other in cells.values())
            if any(asdict(cell) == {**other, "out": cell.out} for other in others):
                continue  # another table contains it, too
            name = name_of(cell, table)
            cell.out = str(Path(values["out"]) / name)
            if name in cells:
                raise InputError(
                    f"[[sweep]]: two cells would share the folder {cell.out}; put them in two files"
                )
            cells[name] = cell
    return cells


def matching_reference(partitions, default):
    """The blocks to which the `:matched` partitions of a table are matched: its own semantic or
    semantic:closed ones, else those of the config (`default`), else semantic. Raises InputError if
    the table has both."""
    candidates = [name for name in ("semantic", "semantic:closed") if name in partitions]
    if len(candidates) == 2 and any(str(name).endswith(":matched") for name in partitions):
        raise InputError(
            "[[sweep]]: semantic and semantic:closed reach back differently; give each a table of "
            "its own, with the rivals that are matched to it"
        )
    if candidates:
        return candidates[0]
    return "semantic:closed" if default == "semantic:closed" else "semantic"


def name_of(cell, keys):
    """The name of a cell, from the keys in which cells differ: schedule and blocks first."""
    order = {"schedule": 0, "partition": 1, "seed": 3}
    words = []
    for key in sorted(keys, key=lambda key: order.get(key, 2)):
        words.append(f"{'' if order.get(key, 2) < 2 else key}{getattr(cell, key)}")
    name = "".join(c for c in ".".join(words) if c.isalnum() or c in "_.+-")
    if len(name.encode()) <= MAX_NAME:
        return name
    digits = hashlib.sha256(".".join(words).encode()).hexdigest()[:6]
    return f"{name.encode()[:MAX_NAME].decode(errors='ignore')}-{digits}"


def resolve(values, reference):
    """The Config of one cell, with the N of `:matched` computed: see `matched`.

    reference: semantic or semantic:closed, which it is matched to. Raises InputError.
    """
    kind, _, n = str(values.get("partition", "")).partition(":")
    if n == "matched" and kind in ("window", "block", "aligned"):
        config = Config(**{**values, "partition": reference})
        n, cap = matched(kind, prepare_cell(config))
        values |= {"partition": f"{kind}:{n}", "max_lookback": max(config.max_lookback, cap)}
    return Config(**values)


def prepare_cell(cell, **changes):
    """The Prepared folder of a Config with some keys changed. Raises InputError."""
    return prepare(TextConfig.of(asdict(cell), **changes))


def matched(kind, data):
    """The N with which kind:N reaches back as far, on average, as the blocks of a Prepared folder;
    and a max_lookback that does not cut it, in tokens.

    A window of N tokens reaches back N - 1, a block of N tokens (N - 1) / 2. An aligned block is
    longer than N by part of a sentence, so its N is searched, in the first million tokens.
    Raises InputError if no N comes close.
    """
    tokens, lookback = data.split("train")
    mean = float(lookback.mean(dtype=float))
    if kind != "aligned":
        n = round(mean) + 1 if kind == "window" else 2 * round(mean) + 1
        return n, n - 1
    vocabulary, tokens = token_bytes(get_encoding(data.meta["tokenizer"])), tokens[: 1 << 20]

    def aligned(n):
        return partition_text(tokens, vocabulary, f"aligned:{n}", 65535)

    def gap(n):
        return aligned(n).mean(dtype=float) - mean

    sizes = range(1, 2 * math.ceil(mean) + 2)
    n = sizes[bisect.bisect_left(sizes[:-1], 0, key=gap)]
    n = min(n, max(n - 1, 1), key=lambda n: abs(gap(n)))
    blocks = aligned(n)
    if abs(gap(n)) > max(0.05 * mean, 1):
        raise InputError(
            f"semantic blocks reach back {mean:.0f} tokens on average, but aligned:{n} reaches "
            f"back {blocks.mean(dtype=float):.0f}: the sentences of this text are too long for "
            "aligned:matched; leave it out"
        )
    return n, int(blocks.max()) + 1  # so that max_lookback hardly ever cuts


# --------------------------------------------------------------------------------------------------
# running them

MADE = "# made by sweep.py: one cell of a sweep\n"


def check_folder(out):
    """Raises InputError for a folder that contains something other than a sweep."""
    try:
        configs = [path for path in out.glob("*.toml") if path.is_file()]
        made = any(path.read_text(errors="replace").startswith(MADE) for path in configs)
        made = made or any(map(is_ours, out.glob("*/config.toml")))
        if out.exists() and any(out.iterdir()) and not made:
            raise InputError(f"{out} is not empty and contains no sweep; give another --out")
    except OSError as e:
        raise InputError(f"{out}: cannot be read ({e.strerror})") from None


def check_models(cells):
    """Check the text and the weights of every cell, a list of Configs, once if they share them.
    Returns the number of parameters of the largest model. Raises InputError."""
    keys = "init_from", "block_size", "n_layer", "n_head", "n_embd"
    different = {str([prepare_cell(c).folder, *(getattr(c, k) for k in keys)]): c for c in cells}
    largest = 0
    for cell in different.values():
        model = build_model(cell, vocabulary_size(cell.tokenizer))
        check_splits(cell, model, prepare_cell(cell))
        largest = max(largest, sum(p.numel() for p in model.parameters()))
    return largest


def results_of(cell):
    """What results.json of a cell says, a dict; None if the cell is not finished. Raises InputError
    if what ran in its folder is not this cell."""
    out, results = Path(cell.out), None
    if (out / "results.json").is_file():
        results = read_results(out / "results.json", Config)
        before = results["config"]
        if results["source_sha256"] != prepare_cell(cell).meta["source_sha256"]:
            raise InputError(f"{out} was run on another text; delete it, or give another --out")
    elif (out / "last.pt").is_file():
        before = canonical(asdict(read_config([str(out / "config.toml")])))
    else:
        return None
    now = {**canonical(asdict(cell)), "out": before["out"]}  # the sweep may have been moved
    changed = [key for key in now if before[key] != now[key]]
    if changed:
        raise InputError(
            f"{out} was run with another {', '.join(changed)}; delete it, or give another --out"
        )
    return results


def command_of(cell):
    """The command that completes a cell, a list of words, and the path of its log. It writes the
    cell's config. Raises InputError if a file of that name is not ours."""
    out = Path(cell.out)
    config, log = (out.with_name(out.name + end) for end in (".toml", ".log"))
    if (out / "last.pt").is_file():
        return [sys.executable, ROOT / "train.py", out, "--resume"], log
    with writing(config):
        if config.exists() and not config.read_text(errors="replace").startswith(MADE):
            raise InputError(f"{config} was not made by sweep.py; move it, or give another --out")
        config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, MADE + to_toml(cell))
    return [sys.executable, ROOT / "train.py", config], log


def at_a_time(cell, jobs):
    """How many cells like this one run at a time, unless `jobs` is a number; and how many threads
    each of them gets, or None. Raises InputError if the device or the compiler is missing."""
    device = pick_device(cell.device)
    precision(device, cell.dtype)
    compiles(device, cell.compile)
    cuda = device.type == "cuda"
    if jobs is None:  # a small model leaves a large GPU idle
        memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
        jobs = max(1, memory // 2**35)
    return jobs, max(1, n_cores() // jobs) if jobs > 1 and not cuda else None


def unfinished(cells):
    """Which of the cells, {name: Config}, are left to do, and which are broken, {name: why},
    because their folder holds something else."""
    left, broken, other_code = {}, {}, []
    for name, cell in cells.items():
        try:
            results = results_of(cell)
        except (InputError, OSError) as e:
            broken[name] = f"error: {e}"
            continue
        if not results:
            left[name] = cell
        elif results["code"] != code_version():
            other_code.append(name)
    if other_code:
        warn_once(
            f"finished with another version of the code: {', '.join(other_code)} (delete a folder "
            "to run its cell again)"
        )
    return left, broken


def run(cells, jobs, held):
    """Complete all cells, {name: Config}, `jobs` at a time. Returns {name: why} of those that
    broke.

    held: see run_jobs. Raises InputError if a text or weights are missing, before the first cell
    starts; KeyboardInterrupt(n) after signal n, once all runs have stopped.
    """
    left, broken = unfinished(cells)
    jobs, threads = at_a_time(next(iter(cells.values())), jobs)
    check_models(list(left.values()))
    for name in cells.keys() - left.keys() - broken.keys():  # a killed sweep may have left some
        Path(cells[name].out, "last.pt").unlink(missing_ok=True)
    commands = {name: command_of(cell) for name, cell in left.items()}
    n_left, began = len(left), time.perf_counter()
    bar = tqdm(total=len(cells), initial=len(cells) - n_left, unit="run", smoothing=0, disable=None)
    with bar:
        for name, why in run_jobs(commands, jobs, held, threads):
            line = "broken"
            if why:
                words = [str(word) for word in commands[name][0][2:]]
                command = shlex.join(["python", "train.py", *words])
                broken[name] = f"{why}; to run only this cell: {command}"
            else:
                line = f"perplexity {results_of(cells[name])['perplexity']:.3f}"
                Path(cells[name].out, "last.pt").unlink(missing_ok=True)
            n_left -= 1
            pace = (time.perf_counter() - began) / (len(commands) - n_left)  # seconds per cell
            if bar.disable and n_left:  # on a terminal, the bar shows it
                line += f", about {duration(pace * n_left)} left"
            bar.update()
            bar.write(f"{len(cells) - n_left}/{len(cells)} {name}: {line}")
            sys.stdout.flush()
    return broken


def report(out, broken, cells):
    """Report on all finished cells in a folder, except for those in `broken`, {name: why}, to which
    it adds those whose files are damaged. Raises InputError if there is none."""
    runs, damaged = read_runs(out, Config, without=broken)
    broken |= damaged
    if runs:
        write_report(out, runs)
    elif not broken:
        raise InputError(f"{out} holds no finished cell; run the sweep first")
    others = {run["folder"].name for run in runs} - cells.keys()
    if others and cells:
        print(f"the table includes {len(others)} cells that this config does not name")


def take_jobs(argv):
    """Take --jobs N out of a command line, a list. Returns N, or None. Raises InputError."""
    if "--jobs" not in argv:
        return None
    at = argv.index("--jobs")
    jobs = "".join(argv[at + 1 : at + 2])
    if not (jobs.isascii() and jobs.isdigit() and len(jobs) < 5 and int(jobs) > 0):
        raise InputError("--jobs takes the number of runs at a time")
    del argv[at : at + 2]
    return int(jobs)


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    only_report = "--report" in sys.argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys, in the file or as --key value:\n{usage(Config)}")
        return
    jobs = take_jobs(argv)
    values = read_sweep(argv)
    out, broken, cells = Path(values["out"]), {}, {}
    check_folder(out)
    if not only_report:
        try:
            cells = read_cells(values)
            # runs that outlived a killed sweep hold the lock, too: wait for them
            with alone(out) as held:
                broken = run(cells, jobs, held)
        except KeyboardInterrupt:
            print("stopped; run the same command to continue", file=sys.stderr)
            raise
    try:
        if only_report or len(broken) < len(cells):
            report(out, broken, cells)
    finally:
        for name, why in broken.items():
            print(f"broken: {name}: {why}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    run_script(main)
