"""The paper's experiment: schedules x partitions x seeds, a run of train.py each; then a report.

    python sweep.py configs/sweep_smoke.toml
    python sweep.py configs/sweep_gpt2.toml --source my_book.txt --out runs/my_sweep
    python sweep.py configs/sweep_gpt2.toml --seed 1,2 --schedule distributed,quintic
    python sweep.py configs/sweep_gpt2.toml --jobs 2        # two runs at a time
    python sweep.py configs/sweep_gpt2.toml --report        # the report again, from what is on disk

A sweep is a config of train.py with one or more tables [[sweep]] of lists: each table stands for
all combinations of its lists, and each combination is a cell. On the command line, values between
commas choose cells; new values replace a list. Finished cells are not run again, interrupted ones
are resumed, and broken ones are reported at the end. window:matched, block:matched and
aligned:matched become the N that reaches back as far on average, in the same text, as the semantic
or semantic:closed blocks of the same table (of the config, if the table has neither). The report
consists of table.md, table.json and four figures. A finished cell keeps what the report and view.py
need, but not last.pt.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import bisect
import hashlib
import itertools
import math
import shlex
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from locality import partition_text
from prepare_data import TextConfig, prepare
from report.sweep import canonical, read_results, read_runs, write_report
from support.console import duration
from support.files import InputError, alone, run_script, write_text, writing
from support.jobs import at_a_time, run_jobs, take_jobs
from support.machine import code_version, compiles, pick_device, precision
from support.run import is_ours
from support.settings import parse, read_flags, to_toml, usage
from support.tokenizers import get_encoding, token_bytes, vocabulary_size
from train import Config, build_model, check_splits, read_config, read_values

ROOT = Path(__file__).resolve().parent
MAX_NAME = 200  # bytes; a disk allows 255 including the suffixes of files and temporary files

# --------------------------------------------------------------------------------------------------
# the cells


def tables_of(values):
    """The tables [[sweep]] among the keys of a file, as far as they are tables: a list of dicts."""
    tables = values.get("sweep")
    return [t for t in tables if isinstance(t, dict)] if isinstance(tables, list) else []


def read_sweep(argv, more=("sweep",)):
    """The keys of a sweep from a command line, `CONFIG.toml [--key value ...]`: a dict. `chosen`
    among them, {key: values}, limits the cells. more: the names of tables.

    Values of a key that tables list choose cells. Other values replace the lists if all tables that
    have the key list the same. Raises InputError if they do not.
    """
    values, of_file = read_values(argv, more), read_values(argv[:1], more)
    types, chosen = {f.name: f.type for f in fields(Config)}, {}
    for key, value in read_flags(Config, argv[1:]).items():
        words = value.split(",") if isinstance(value, str) else []
        given = [parse(word, types[key]) for word in words] or [value]
        tables = [table for table in tables_of(values) if key in table]
        lists = [table[key] for table in tables if isinstance(table[key], list)]
        new = [x for x in given if not any(x in choices for choices in lists)]
        if not new:
            chosen[key] = given
        elif any(choices != lists[0] for choices in lists):
            raise InputError(
                f"--{key}: no [[sweep]] table lists {new[0]!r}; add it to the table it belongs to"
            )
        else:
            for table in tables:
                table[key] = given
        if tables:  # the other tables keep the value of the file
            del values[key]
            values |= {key: of_file[key]} if key in of_file else {}
    return {**values, "chosen": chosen}


def read_cells(values):
    """The cells of a sweep, {name: Config}, from what `read_sweep` returned. Raises InputError."""
    tables, chosen = values.pop("sweep", None), values.pop("chosen", {})
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
            choice = dict(zip(table, choice))
            if any(x not in chosen.get(key, [x]) for key, x in choice.items()):
                continue
            cell = resolve({**values, **choice}, reference)
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
    if not cells:
        given = "; ".join(f"{key} {', '.join(map(str, x))}" for key, x in chosen.items())
        raise InputError(f"no cell of this sweep has all of these values: {given}")
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
        names = {path.name for path in out.glob("*")} - {path.name for path in out.glob(".trial-*")}
        if names and not made:
            raise InputError(f"{out} is not empty and contains no sweep; give another --out")
    except OSError as e:
        raise InputError(f"{out}: cannot be read ({e.strerror})") from None


def read_cell(cell):
    """What results.json of a cell says, a dict, or None if it is not finished; and the config with
    which it was run, or None if it was not. Raises InputError or OSError if a file is damaged."""
    out = Path(cell.out)
    if (out / "results.json").is_file():
        results = read_results(out / "results.json", Config)
        return results, results["config"]
    if (out / "last.pt").is_file():
        return None, canonical(asdict(read_config([str(out / "config.toml")])))
    return None, None


def check_same(cell, results, before):
    """Raises InputError if what was run in the folder of a cell was something else.

    results, before: what `read_cell` returned.
    """
    now = {**canonical(asdict(cell)), "out": before["out"]}  # the sweep may have been moved
    changed = [key for key in now if before[key] != now[key]]
    if results and results["source_sha256"] != prepare_cell(cell).meta["source_sha256"]:
        changed.append("text")
    if changed:
        raise InputError(
            f"{cell.out} was run with another {', '.join(changed)}; delete it, or give another "
            "--out"
        )


def few(names):
    """Names for a message: all of them, or the first three and how many more there are."""
    return ", ".join(names if len(names) < 6 else [*names[:3], f"and {len(names) - 3} more"])


def sort_cells(cells):
    """(left, finished, broken): the cells, {name: Config}, that are not finished; the results of
    those that are, {name: dict}; and {name: why} of those whose files are damaged. Raises
    InputError if something else was run in the folder of a cell."""
    left, finished, broken = {}, {}, {}
    for name, cell in cells.items():
        try:
            results, before = read_cell(cell)
        except (InputError, OSError) as e:
            broken[name] = f"error: {e}"
            continue
        if before:
            check_same(cell, results, before)
        if results:
            finished[name] = results
        else:
            left[name] = cell
    return left, finished, broken


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


def check_models(cells, texts=True):
    """Check the initial weights of cells, a list of Configs, and (with `texts`) that each text is
    long enough. Returns the number of parameters of the largest model. Raises InputError."""
    keys = "init_from", "block_size", "n_layer", "n_head", "n_embd", "tokenizer"
    sizes, checked = {}, set()  # (parameters, tokens per context) by keys; prepared folders
    for cell in cells:
        shape = tuple(getattr(cell, key) for key in keys)
        if shape not in sizes:
            model = build_model(cell, vocabulary_size(cell.tokenizer))
            sizes[shape] = sum(p.numel() for p in model.parameters()), model.config.block_size
        if texts and (data := prepare_cell(cell)).folder not in checked:
            checked.add(data.folder)
            check_splits(cell, sizes[shape][1], data)
    return max(sizes.values())[0]


def check_cells(left, finished, jobs, held):
    """Check that the cells that are left, {name: Config}, can start. Raises InputError."""
    for cell in left.values():
        device = pick_device(cell.device)
        precision(device, cell.dtype)
        compiles(device, cell.compile)
    check_models(list(left.values()))


def run(cells, jobs, held, check=check_cells):
    """Complete all cells, {name: Config}, `jobs` at a time. Returns {name: why} of those that
    broke.

    held: see run_jobs. check: called before the first cell starts; see `check_cells`. Raises
    InputError, and KeyboardInterrupt(n) after signal n, once all runs have stopped.
    """
    left, finished, broken = sort_cells(cells)
    if others := [name for name in finished if finished[name]["code"] != code_version()]:
        print(
            f"finished with another version of the code: {few(others)} (delete a folder to run its "
            "cell again)",
            file=sys.stderr,
        )
    for name in finished:  # a sweep that was killed may have left some
        Path(cells[name].out, "last.pt").unlink(missing_ok=True)
    if left:
        check(left, finished, jobs, held)
        broken |= run_cells(left, jobs, held, n_before=len(cells) - len(left))
    return broken


def run_cells(cells, jobs, held, n_before):
    """Run cells that are not finished, {name: Config}, with a bar or lines that count from n_before
    on. Returns {name: why} of those that broke."""
    jobs, threads = at_a_time(next(iter(cells.values())).device, len(cells), jobs)
    commands = {name: command_of(cell) for name, cell in cells.items()}
    began, n_ended, broken = time.perf_counter(), 0, {}
    total = n_before + len(cells)
    bar = tqdm(total=total, initial=n_before, unit="run", smoothing=0, disable=None)
    with bar:
        for name, why in run_jobs(commands, jobs, held, threads, bar.refresh):
            out, n_ended = Path(cells[name].out), n_ended + 1
            if why:
                command, _ = command_of(cells[name])  # from its last checkpoint, if there is one
                words = shlex.join(["python", "train.py", *map(str, command[2:])])
                broken[name], line = f"{why}; to run only this cell: {words}", "broken"
            else:
                line = f"perplexity {read_results(out / 'results.json', Config)['perplexity']:.3f}"
                (out / "last.pt").unlink(missing_ok=True)
            n_left = len(cells) - n_ended
            if bar.disable and n_left:  # on a terminal, the bar shows it
                pace = (time.perf_counter() - began) / n_ended  # seconds per cell
                line += f", about {duration(pace * n_left)} left"
            bar.update()
            bar.write(f"{total - n_left}/{total} {name}: {line}")
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
        print(f"the table includes other cells of this folder: {few(sorted(others))}")


def main(check=check_cells):
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
                broken = run(cells, jobs, held, check)
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
