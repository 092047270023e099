"""The paper's experiment: schedules x partitions x seeds, a run of train.py each; then a report.

    python sweep.py configs/sweep_smoke.toml
    python sweep.py configs/sweep_mind.toml --source my_book.txt --out runs/my_sweep
    python sweep.py configs/sweep_mind.toml --report        # the report again, from what is on disk
    python sweep.py configs/sweep_mind.toml --jobs 2        # two runs at a time

A sweep is a config of train.py with one or more tables [[sweep]] of lists: each stands for all
combinations of its lists. Finished cells are not run again, half-run ones go on where they stopped,
broken ones are reported at the end. window:matched, block:matched and aligned:matched become the N
that reaches back as far on average, in the same text, as the semantic or semantic:closed blocks of
the same table (of the config, where the table has neither). The report is table.md, table.json and
four figures.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import bisect
import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from locality import partition
from prepare_data import get_encoding, prepared, read_meta, read_split, token_bytes
from support.files import InputError, alone, run_script, write_text
from support.machine import pick_device, stop_signals
from support.report import read_results, report
from support.settings import lost, to_toml, usage
from support.weights import PRETRAINED
from train import Config, read_config, read_values

ROOT = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# the cells


def read_cells(values):
    """The cells of a sweep, {name: Config}, from the keys of its TOML file. Raises InputError."""
    tables = values.pop("sweep", None)
    tables = tables if isinstance(tables, list) else []
    if not tables or not all(isinstance(table, dict) and table for table in tables):
        example = 'schedule = ["distributed", "quintic"]'
        raise InputError(f"a sweep needs a table [[sweep]] of lists, for example {example}")
    known = Config.__dataclass_fields__.keys() - {"out"}
    for table in tables:
        for key, choices in table.items():
            if key not in known:
                raise InputError(f"[[sweep]]: {key} is not a key that cells can differ in")
            if not isinstance(choices, list) or not choices:
                raise InputError(f"[[sweep]]: {key} must be a list of one or more values")
    cells = {}
    for table in tables:
        like = what_to_match(table.get("partition", ()), values.get("partition"))
        for choice in itertools.product(*table.values()):
            cell = resolve({**values, **dict(zip(table, choice))}, like)
            others = (asdict(other) for other in cells.values())
            if any(asdict(cell) == {**other, "out": cell.out} for other in others):
                continue  # another table has it too
            name = name_of(cell, table)
            cell.out = str(Path(values["out"]) / name)
            if name in cells:
                twice = f"two cells would share the folder {cell.out}; put them in two files"
                raise InputError(f"[[sweep]]: {twice}")
            cells[name] = cell
    return cells


def what_to_match(partitions, otherwise):
    """Which blocks the `:matched` of a table are matched to: its own semantic or semantic:closed
    ones, else those of the config (`otherwise`), else semantic. Raises InputError for both."""
    found = [name for name in ("semantic", "semantic:closed") if name in partitions]
    if len(found) == 2 and any(str(name).endswith(":matched") for name in partitions):
        two = "semantic and semantic:closed reach back differently"
        raise InputError(f"[[sweep]]: {two}; give each a table, with rivals matched to it")
    return (
        found[0] if found else "semantic:closed" if otherwise == "semantic:closed" else "semantic"
    )


def name_of(cell, keys):
    """The name of a cell, from the keys in which cells differ: schedule and blocks first."""
    order = {"schedule": 0, "partition": 1, "seed": 3}
    words = []
    for key in sorted(keys, key=lambda key: order.get(key, 2)):
        words.append(f"{'' if order.get(key, 2) < 2 else key}{getattr(cell, key)}")
    return "".join(c for c in ".".join(words) if c.isalnum() or c in "_.+-")


def resolve(values, like):
    """The Config of one cell, with the N of `:matched` worked out: see `matched`.

    like: semantic or semantic:closed, what it is matched to. Prepares the cell's data, so that
    cells which run side by side find it. Raises InputError.
    """
    base = values.get("init_from", Config.init_from)
    if base not in ("scratch", *PRETRAINED) and not Path(str(base)).exists():
        raise InputError(f"init_from: {base} is not there; make it first, as the config says")
    kind, _, n = str(values.get("partition", "")).partition(":")
    if n == "matched" and kind in ("window", "block", "aligned"):
        config = Config(**{**values, "partition": like})
        n, cap = matched(kind, prepared(asdict(config)))
        values |= {"partition": f"{kind}:{n}", "max_lookback": max(config.max_lookback, cap)}
    config = Config(**values)
    prepared(asdict(config))
    return config


def matched(kind, folder):
    """The N with which kind:N reaches back as far, on average, as the blocks of a prepared folder;
    and a cap that does not cut it, in tokens.

    A window of N tokens reaches back N - 1, a block of N tokens (N - 1) / 2. An aligned block is
    longer than N by part of a sentence: there the N is searched, in the first million tokens.
    Raises InputError where no N comes near.
    """
    meta = read_meta(folder)
    tokens, lookback = read_split(folder, "train", meta)
    mean = float(lookback.mean(dtype=float))
    if kind != "aligned":
        n = round(mean) + 1 if kind == "window" else 2 * round(mean) + 1
        return n, n - 1
    vocabulary, some = token_bytes(get_encoding(meta["tokenizer"])), tokens[: 1 << 20]

    def aligned(n):
        return partition(some, vocabulary, f"aligned:{n}", 65535)

    def gap(n):
        return aligned(n).mean(dtype=float) - mean

    sizes = range(1, 2 * math.ceil(mean) + 2)
    n = sizes[bisect.bisect_left(sizes[:-1], 0, key=gap)]
    n = min(n, max(n - 1, 1), key=lambda n: abs(gap(n)))
    blocks = aligned(n)
    if abs(gap(n)) > max(0.05 * mean, 1):
        near = f"aligned:{n} reaches back {blocks.mean(dtype=float):.0f}"
        far = "the sentences of this text are too long for aligned:matched; leave it out"
        raise InputError(f"semantic blocks reach back {mean:.0f} tokens on average, {near}: {far}")
    return n, int(blocks.max()) + 1  # so that the cap hardly ever cuts


# --------------------------------------------------------------------------------------------------
# running them


MADE = "# made by sweep.py: one cell of a sweep\n"


def check_folder(out):
    """Raises InputError for a folder that holds something else than a sweep."""
    try:
        made = any(path.read_text(errors="replace").startswith(MADE) for path in out.glob("*.toml"))
        if out.exists() and any(out.iterdir()) and not made and not any(out.glob("*/config.toml")):
            raise InputError(f"{out} is not empty and holds no sweep; give another --out")
    except OSError as e:
        raise InputError(f"{out}: cannot be read ({e.strerror})") from None


def run_cell(cell, threads, held, children, asked):
    """Bring one cell to its end in a process of its own. Returns None, or why it broke, a line.

    held: an open folder, whose lock the process holds as well. children: a set that has the process
    while it runs. asked: a list, not empty if the sweep has to stop.
    """
    out = Path(cell.out)
    finished, begun = (out / "results.json").is_file(), (out / "last.pt").is_file()
    if finished or begun:
        try:
            if finished:
                results = read_results(out / "results.json")
                before, text = results["config"], read_meta(prepared(asdict(cell)))["source_sha256"]
                if results.get("source_sha256", text) != text:
                    return f"{out} was run on another text; delete it, or give another --out"
            else:
                before = asdict(read_config([str(out / "config.toml")]))
        except InputError as e:
            return str(e)
        changed = [key for key, value in asdict(cell).items() if before.get(key) != value]
        changed += lost(before)
        if changed:
            other = f"was run with another {', '.join(changed)}"
            return f"{out} {other}; delete it, or give another --out"
    if finished:
        return None
    config, log = (out.with_name(out.name + end) for end in (".toml", ".log"))
    command = [sys.executable, ROOT / "train.py", *([out, "--resume"] if begun else [config])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    keep = () if held is None else (held,)
    try:
        if not begun:
            if config.exists() and not config.read_text(errors="replace").startswith(MADE):
                return f"error: {config} was not made by sweep.py; move it, or give another --out"
            write_text(config, MADE + to_toml(cell))
        with open(log, "w") as f:
            how = {"stdout": f, "stderr": f, "env": environment, "pass_fds": keep}
            with subprocess.Popen(command, **how) as child:
                children.add(child)
                if asked:
                    child.terminate()
                status = child.wait()
    except (InputError, OSError) as e:  # the disk is full, say
        return f"error: {e}"
    children.discard(child)
    if status == 0:
        return None
    lines = log.read_text(errors="replace").replace("\r", "\n").strip().split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"error: exit status {status}: {lines[-1]}"


def run(cells, jobs, held):
    """Run all cells, `jobs` at a time. Returns {name: why} of those that broke.

    held: as in run_cell. Raises KeyboardInterrupt(n) after signal n, when all runs have stopped.
    """
    device = pick_device(next(iter(cells.values())).device)
    cuda = device.type == "cuda"
    if jobs is None:  # a small model leaves a large card idle
        memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
        jobs = max(1, memory // 2**35)
    threads = max(1, os.cpu_count() // jobs) if jobs > 1 and not cuda else None
    broken, children = {}, set()
    bar = tqdm(total=len(cells), unit="run", disable=None)
    with stop_signals() as asked, ThreadPoolExecutor(jobs) as pool, bar:
        running = {
            pool.submit(run_cell, cell, threads, held, children, asked): name
            for name, cell in cells.items()
        }
        left = set(running)
        try:
            while left:
                done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                if asked:
                    raise KeyboardInterrupt(asked[0])
                for future in done:
                    name, why = running[future], future.result()
                    if why:
                        broken[name] = why
                    bar.set_description(f"last: {name}" + f", {len(broken)} broken" * bool(broken))
                    bar.update()
                    if bar.disable:
                        number = len(cells) - len(left)
                        print(f"{number}/{len(cells)}: {name}{', broken' * bool(why)}", flush=True)
        except BaseException:  # the runs save, and stop
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise
    return broken


def take_jobs(argv):
    """Take --jobs N out of a command line, a list. Returns N, or None. Raises InputError."""
    if "--jobs" not in argv:
        return None
    at = argv.index("--jobs")
    jobs = "".join(argv[at + 1 : at + 2])
    if not (jobs.isascii() and jobs.isdigit() and len(jobs) < 5 and int(jobs) > 0):
        raise InputError("--jobs takes a number of runs to go at a time")
    del argv[at : at + 2]
    return int(jobs)


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys, in the file or as --key value:\n{usage(Config)}")
        return
    jobs = take_jobs(argv)
    values = read_values(argv, more=("sweep",))
    out, broken, cells = Path(values["out"]), {}, {}
    if "--report" not in sys.argv:
        check_folder(out)
        try:
            cells = read_cells(values)
            # runs that a sweep left when it was killed hold the lock too: they are waited for
            with alone(out) as held:
                broken = run(cells, jobs, held)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            raise
    if "--report" in sys.argv or len(broken) < len(cells):
        report(out)
        others = {path.parent.name for path in out.glob("*/results.json")} - cells.keys()
        if others and "--report" not in sys.argv:
            print(f"{len(others)} cells that this config does not name are in the table too")
    for name, why in broken.items():
        print(f"broken: {name}: {why}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    run_script(main)
