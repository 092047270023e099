"""
The paper's experiment: schedules x partitions x seeds, each cell a run of train.py; then one table, and figures.

    python sweep.py configs/sweep_smoke.toml
    python sweep.py configs/sweep_mind.toml --source my_book.txt --out runs/my_sweep
    python sweep.py configs/sweep_mind.toml --report        # table and figures again, from what is on disk

A sweep is a config of train.py with one or more tables [[sweep]] of lists: each stands for all combinations of its lists.
Finished cells are not run again, half-run ones go on where they stopped, broken ones are reported at the end. window:matched
and block:matched become the N that reaches back as far on average as the semantic blocks of the same text.
"""

import concurrent.futures
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval import STYLES, layer_mean, pick_device, prepared, provenance, pyplot, save_figure
from locality import SCHEDULES, InputError
from prepare_data import read_split, write_text
from train import Config, read_config, read_values, to_toml

ROOT = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# running the cells


def read_cells(values):
    """The cells of a sweep: a dict, name -> Config, from the keys of its TOML file. Raises InputError."""
    tables = values.pop("sweep", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) and table for table in tables):
        raise InputError("a sweep needs a table [[sweep]] of lists, for example schedule = [\"distributed\", \"quintic\"]")
    known = Config.__dataclass_fields__.keys() - {"out"}
    for table in tables:
        for key, choices in table.items():
            if key not in known:
                raise InputError(f"[[sweep]]: {key} is not a key that cells can differ in")
            if not isinstance(choices, list) or not choices:
                raise InputError(f"[[sweep]]: {key} must be a list of one or more values")
    cells = {}
    for table in tables:
        for choice in itertools.product(*table.values()):
            cell = resolve({**values, **dict(zip(table, choice))})
            if any(asdict(cell) == {**asdict(other), "out": cell.out} for other in cells.values()):
                continue    # another table has it too
            words = [f"{'' if key in ('schedule', 'partition') else key}{getattr(cell, key)}" for key in sorted(table, key=shown_order)]
            name = re.sub(r"[^\w.+-]", "", ".".join(words))
            cell.out = str(Path(values["out"]) / name)
            if name in cells:
                raise InputError(f"[[sweep]]: two cells would share the folder {cell.out}; put them in two files")
            cells[name] = cell
    return cells


def shown_order(key):
    """The order of keys in names: the schedule and the blocks first, the seed last."""
    return {"schedule": 0, "partition": 1, "seed": 3}.get(key, 2)


def resolve(values):
    """The Config of one cell, with the N of window:matched or block:matched worked out. Prepares its data.

    A window of N tokens reaches back N - 1, a block of N tokens (N - 1) / 2 on average.
    """
    kind, _, n = str(values.get("partition", "")).partition(":")
    if n == "matched" and kind in ("window", "block"):
        config = Config(**{**values, "partition": "semantic"})
        lookback = read_split(prepared(asdict(config)), "train")[1]
        mean = float(np.maximum(lookback, config.min_lookback).mean(dtype=float))
        n = round(mean) + 1 if kind == "window" else 2 * round(mean) + 1
        values = {**values, "partition": f"{kind}:{n}", "max_lookback": max(config.max_lookback, n - 1)}
    config = Config(**values)
    prepared(asdict(config))    # here, so that cells which run side by side find it
    return config


def read_results(path):
    """results.json of a cell, as a dict. Raises InputError where it is not as train.py wrote it."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        numbers = [results[key] for key in ("loss", "perplexity", "accuracy", "bits_per_byte", "tokens", "seed")]
        numbers += [layer[key] for layer in results["layers"] for key in ("locality", "fidelity", "entropy")]
        words = [results["date"], *(results["config"][key] for key in ("schedule", "partition", "init_from"))]
        if not results["layers"] or not {"commit", "device", "torch"} <= results.keys() or not all(
                isinstance(n, (int, float)) for n in numbers) or not all(isinstance(word, str) for word in words):
            raise ValueError
        return {**results, "config": {"max_lookback": None, **results["config"]}, "folder": path.parent}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged; delete it, and the cell is brought to its end again") from None


def read_curve(path):
    """The validation losses in metrics.jsonl: a list of (step, nats). Raises InputError where it is damaged."""
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        curve = [(int(line["step"]), float(line["val_loss"])) for line in lines if "val_loss" in line]
        if not curve:
            raise ValueError
        return curve
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged; delete the folder, and the cell is run again") from None


def run_cell(cell, threads):
    """Bring one cell to its end in a process of its own. Returns None, or in a line why it broke."""
    out = Path(cell.out)
    finished, begun = (out / "results.json").is_file(), (out / "last.pt").is_file()
    if finished or begun:
        try:
            before = read_results(out / "results.json")["config"] if finished else asdict(read_config([str(out / "config.toml")]))
        except InputError as e:
            return str(e)
        changed = [key for key, value in asdict(cell).items() if before.get(key) != value]
        if changed:
            return f"{out} was run with another {', '.join(changed)}; delete it, or give another --out"
    if finished:
        return None
    config = out.with_name(out.name + ".toml")
    write_text(config, to_toml(cell))
    arguments = [out, "--resume"] if begun else [config, "--overwrite"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    with open(out.with_name(out.name + ".log"), "w") as log:
        status = subprocess.run([sys.executable, ROOT / "train.py", *arguments], stdout=log, stderr=log,
                                env=environment).returncode
    if status == 0:
        return None
    lines = Path(log.name).read_text(errors="replace").replace("\r", "\n").strip().split("\n")
    return next((line for line in reversed(lines) if line.startswith("error: ")), f"error: exit status {status}: {lines[-1]}")


def run(cells, jobs):
    """Run all cells, `jobs` at a time. Returns {name: why} of those that broke."""
    device = pick_device(next(iter(cells.values())).device)
    if jobs is None:    # a small model leaves a large card idle
        jobs = max(1, torch.cuda.get_device_properties(device).total_memory // 2 ** 35) if device.type == "cuda" else 1
    threads = max(1, os.cpu_count() // jobs) if jobs > 1 and device.type == "cpu" else None
    broken = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), unit="run") as bar:
        running = {pool.submit(run_cell, cell, threads): name for name, cell in cells.items()}
        try:
            for done in concurrent.futures.as_completed(running):
                if why := done.result():
                    broken[running[done]] = why
                bar.set_description(f"last: {running[done]}" + (f", {len(broken)} broken" if broken else ""))
                bar.update()
        except BaseException:    # the interrupt reached the runs as well: they save, and stop
            pool.shutdown(cancel_futures=True)
            raise
    return broken


# ---------------------------------------------------------------------------------------------------------------------
# statistics

# 97.5 % quantile of Student's t by degrees of freedom; between two entries the smaller, which is the cautious one
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179,
           14: 2.145, 16: 2.120, 18: 2.101, 20: 2.086, 25: 2.060, 30: 2.042}


def interval(values):
    """(mean, standard deviation, half the width of the 95 % interval of the mean), the last two None for one value."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return values.mean(), None, None
    t = STUDENT[max(df for df in STUDENT if df <= n - 1)]
    return values.mean(), values.std(ddof=1), t * values.std(ddof=1) / math.sqrt(n)


def sign_flip_p(differences):
    """Two-sided exact permutation test of paired differences: the share of all 2^n ways to sign them whose mean is as far
    from 0 as theirs. Never below 2 / 2^n."""
    d = np.asarray(differences, float)
    if len(d) > 20:
        raise InputError(f"{len(d)} seeds: an exact test goes through 2^n ways to sign them; 20 are enough")
    signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)    # (2^n, n)
    means = np.abs(signs @ d)
    return float((means >= abs(d.sum()) * (1 - 1e-12)).mean())


def paired(a, b):
    """Compare two groups of results, {seed: loss in nats} each: the ratio of perplexities over the seeds they share."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    d = [a[seed] - b[seed] for seed in seeds]
    mean, _, half = interval(d)
    return {"seeds": len(d), "ratio": math.exp(mean), "low": None if half is None else math.exp(mean - half),
            "high": None if half is None else math.exp(mean + half), "p": sign_flip_p(d), "p_least": 2 / 2 ** len(d)}


# ---------------------------------------------------------------------------------------------------------------------
# the report

# what a distributed run does not depend on
LOCAL = ("schedule", "partition", "fidelity", "min_lookback", "max_lookback", "anchor", "dial")


def collect(out):
    """All finished cells of a sweep, as groups that differ in the seed alone: a list of dicts, in a telling order."""
    results = [read_results(path) for path in sorted(out.glob("*/results.json"))]
    if not results:
        raise InputError(f"{out}: no finished cell here; run the sweep first")
    for r in results:    # a cap that never binds tells nothing apart
        r["cap"] = r["config"]["max_lookback"]
        if r["config"]["partition"].startswith(("window", "block")):
            r["config"]["max_lookback"] = None
    configs = [r["config"] for r in results]
    varied = [key for key in configs[0] if key not in ("seed", "out", "data") and len({str(c.get(key)) for c in configs}) > 1]
    keys = [key for key in varied if not (key == "max_lookback" and len({c[key] for c in configs} - {None}) < 2)]
    groups = {}
    for r in results:
        group = groups.setdefault(tuple(str(r["config"].get(key)) for key in keys), {"config": r["config"], "cap": r["cap"], "runs": []})
        group["runs"].append(r)
    in_most = {key: value for key in keys for value in [statistics.mode(str(g["config"][key]) for g in groups.values())]
               if sum(str(g["config"][key]) == value for g in groups.values()) > len(groups) / 2}
    for group in groups.values():    # named by what is not as in most
        c = group["config"]
        other = [f"{key} {c[key]}" for key in keys if key not in ("schedule", "partition") and c[key] is not None
                 and str(c[key]) != in_most.get(key) and not (key in LOCAL and c["schedule"] == "distributed")]
        group["schedule"] = c["schedule"]
        group["blocks"] = ", ".join([*([c["partition"]] if c["schedule"] != "distributed" else []), *other])
        group["name"] = ", ".join(filter(None, [c["schedule"], group["blocks"]]))
        group["loss"] = {r["seed"]: r["loss"] for r in group["runs"]}
    for group in groups.values():
        base = [g for g in groups.values() if g["schedule"] == "distributed" and all(
            g["config"].get(key) == group["config"].get(key) for key in keys if key not in LOCAL)]
        group["ratio"] = paired(group["loss"], base[0]["loss"]) if base else None
    order = list(SCHEDULES)
    return sorted(groups.values(), key=lambda g: (g["blocks"] != "", g["blocks"], order.index(g["schedule"]))), keys


def comparisons(groups, keys):
    """The pairs that the paper compares, and the controls: a list of dicts with `first`, `second` and what `paired` gives."""
    rows = []
    caps = {g["config"]["max_lookback"] for g in groups} - {None}

    def fits(a, b):
        """A window or a block of the ruler was matched to the semantic blocks of its own max_lookback."""
        return a["cap"] == b["cap"] or len(caps) < 2 and None in (a["config"]["max_lookback"], b["config"]["max_lookback"])

    def compare(key, first, second):
        pairs = [(a, b) for a in groups for b in groups if str(a["config"][key]).startswith(first)
                 and str(b["config"][key]).startswith(second) and "distributed" not in (a["schedule"], b["schedule"])
                 and fits(a, b) and all(a["config"].get(k) == b["config"].get(k) for k in keys if k not in (key, "max_lookback"))]
        pairs = [(a, b, row) for a, b in pairs if (row := paired(a["loss"], b["loss"]))]
        rows.extend({"first": a["name"], "second": b["name"], **row} for a, b, row in pairs)
        if key != "schedule" and len(pairs) > 1:    # all of them in one: the mean over pairs, seed by seed
            seeds = set.intersection(*(a["loss"].keys() & b["loss"].keys() for a, b, _ in pairs))
            mean = [{s: sum(p[side]["loss"][s] for p in pairs) / len(pairs) for s in seeds} for side in (0, 1)]
            if row := paired(*mean):
                rows.append({"first": f"{first}, mean of {len(pairs)}", "second": f"{second}, the same", **row})

    for rival in ("window", "block"):
        compare("partition", "semantic", rival)
    compare("dial", "blend", "penalty")
    compare("schedule", "quintic", "localist")
    compare("schedule", "quintic", "reversed")
    rows.extend({"first": g["name"], "second": "distributed", **g["ratio"]} for g in groups
                if g["ratio"] and g["schedule"] != "distributed")
    return rows


def markdown(groups, rows, about):
    """The report as Markdown."""
    def plus_minus(values, digits, scale=1):
        mean, sd, _ = interval([scale * v for v in values])
        return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")

    def with_interval(row):
        return "–" if row is None else f"{row['ratio']:.4f}" + (
            "" if row["low"] is None or row["ratio"] == 1 else f" [{row['low']:.4f}, {row['high']:.4f}]")

    lines = ["| configuration | seeds | perplexity | 95 % interval | ratio to distributed [95 %] | accuracy, % | bits per byte "
             "| fidelity: last layer | mean | entropy, bits: last layer | mean |", "| --- " * 11 + "|"]
    for g in groups:
        runs = g["runs"]
        mean, _, half = interval([r["perplexity"] for r in runs])
        lines.append(f"| {g['name']} | {len(runs)} | {plus_minus([r['perplexity'] for r in runs], 3)} "
                     f"| {f'{mean - half:.3f} … {mean + half:.3f}' if half is not None else '–'} | {with_interval(g['ratio'])} "
                     f"| {plus_minus([r['accuracy'] for r in runs], 2, 100)} | {plus_minus([r['bits_per_byte'] for r in runs], 4)} "
                     + "".join(f"| {interval([value(r, key) for r in runs])[0]:.{digits}f} "
                               for key, digits in (("fidelity", 3), ("entropy", 2))
                               for value in (lambda r, key: r["layers"][-1][key], layer_mean)) + "|")
    lines += ["", "± is the standard deviation over seeds. Ratios and differences are paired by seed; their intervals are Student's t "
              "on the logarithms. A seed changes the order of the training data (and the weights, from scratch); the test text "
              "is the same for all, so nothing here speaks for another book.", ""]
    if rows:
        lines += ["| first | second | seeds | perplexity, first to second [95 %] | p, exact | least p possible |", "| --- " * 6 + "|"]
        lines += [f"| {row['first']} | {row['second']} | {row['seeds']} | {with_interval(row)} | {row['p']:.3g} | {row['p_least']:.3g} |"
                  for row in rows]
        lines += ["", "p: exact two-sided permutation test, all ways to flip the signs of the paired differences. It cannot fall below "
                  "the last column, however large the effect. No correction for the number of comparisons.", ""]
    lines.append("; ".join(f"{key} {value}" for key, value in about.items()))
    return "\n".join(lines) + "\n"


def figures(groups, out):
    """Draw ratio, layers, tradeoff and curves, each as PNG and SVG. Returns their paths."""
    plt = pyplot()
    names = [name for name in SCHEDULES if any(g["schedule"] == name for g in groups)]
    series = list(dict.fromkeys(g["blocks"] for g in groups if g["schedule"] != "distributed"))
    # one line a schedule: of the blocks with the most schedules, semantic ones if they are among them
    main = max(series or [""], key=lambda s: (sum(g["blocks"] == s for g in groups), s.startswith("semantic")))
    shown = [g for g in groups if g["blocks"] == main or g["schedule"] == "distributed"]
    colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888"]
    looks = {blocks: ("os^Dv*PX"[i % 8], colors[(i + i // 8) % 8]) for i, blocks in enumerate(series)}
    outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    drawn = []

    def finish(fig, name, title):
        for ax in fig.axes:
            ax.spines[["top", "right"]].set_visible(False)
        fig.suptitle(title, parse_math=False)
        for suffix in (".png", ".svg"):
            drawn.append(out / (name + suffix))
            save_figure(fig, drawn[-1], close=suffix == ".svg")

    rated = [g for g in groups if g["ratio"] and g["schedule"] != "distributed"]
    if rated:
        fig, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
        x = {name: i for i, name in enumerate(n for n in names if n != "distributed")}
        for i, blocks in enumerate(series):
            mine = [g for g in rated if g["blocks"] == blocks]
            at = [x[g["schedule"]] + 0.7 * ((i + 0.5) / len(series) - 0.5) for g in mine]
            ratio = [g["ratio"]["ratio"] for g in mine]
            error = [[abs(g["ratio"]["ratio"] - (g["ratio"][end] or g["ratio"]["ratio"])) for g in mine] for end in ("low", "high")]
            marker, color = looks[blocks]
            ax.errorbar(at, ratio, error, fmt=marker, color=color, capsize=3, label=blocks)
        ax.axhline(1, color="black", lw=0.8)
        ax.set(xticks=range(len(x)), xticklabels=list(x), ylabel="perplexity, ratio to distributed")
        ax.legend(frameon=False, **(outside if len(series) > 4 else {}))
        finish(fig, "ratio", "What locality costs, by schedule (mean over seeds, 95 % interval)")

        fig, ax = plt.subplots(figsize=(7, 5), layout="constrained")
        by_schedule = len(names) > 2    # what the colours tell: with one schedule beside distributed, the blocks
        for g in rated + [g for g in groups if g["schedule"] == "distributed"]:
            marker, color = looks.get(g["blocks"], ("o", STYLES["distributed"][0]))
            ax.plot(np.mean([layer_mean(r, "fidelity") for r in g["runs"]]), g["ratio"]["ratio"], marker,
                    color=STYLES[g["schedule"]][0] if by_schedule else color, ms=8)
        for name in names if by_schedule else ():
            ax.plot([], [], "o", color=STYLES[name][0], label=name)
        for blocks in series if len(series) > 1 else ():
            marker, color = looks[blocks]
            ax.plot([], [], marker, **({"color": "white", "mec": "black"} if by_schedule else {"color": color}), label=blocks)
        ax.axhline(1, color="black", lw=0.8)
        ax.set(xlabel="fidelity, mean over layers: attention inside the block", ylabel="perplexity, ratio to distributed")
        ax.legend(frameon=False, **outside)
        finish(fig, "tradeoff", "The trade-off: every configuration a point")

    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for g in shown:
        color, marker = STYLES[g["schedule"]]
        layers = range(1, len(g["runs"][0]["layers"]) + 1)
        for ax, key in zip(axes, ("fidelity", "entropy")):
            ax.plot(layers, np.mean([[layer[key] for layer in r["layers"]] for r in g["runs"]], axis=0), marker=marker, color=color,
                    label=g["name"] if len(shown) > len(names) else g["schedule"])
            ax.set(xlabel="layer", xticks=layers)
    axes[0].set(ylabel="fidelity: attention inside the block", ylim=(0, 1.03))
    axes[1].set(ylabel="entropy of the attention, bits", ylim=(0, None))
    axes[1].legend(frameon=False, **outside)
    finish(fig, "layers", f"Layer by layer{', ' * bool(main)}{main} (mean over seeds)")

    fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for g in shown:
        curves = []
        for r in g["runs"]:
            curves.append(read_curve(r["folder"] / "metrics.jsonl"))
        n = min(map(len, curves))    # a run may have stopped early
        mean = np.mean([curve[:n] for curve in curves], axis=0)    # (n, 2)
        color, marker = STYLES[g["schedule"]]
        ax.plot(*mean.T, marker=marker, ms=4, color=color, label=g["name"] if len(shown) > len(names) else g["schedule"])
    ax.set(xlabel="step", ylabel="validation loss, nats a token")
    ax.legend(frameon=False, **outside)
    finish(fig, "curves", f"Training{', ' * bool(main)}{main} (mean over seeds)")
    return drawn


def report(out):
    """Write table.md, table.json and the figures of a sweep, from the results.json of its cells."""
    groups, keys = collect(out)
    rows = comparisons(groups, keys)
    runs = [r for g in groups for r in g["runs"]]
    about = {"command": provenance(torch.device("cpu"), None)["command"]}
    for key in ("commit", "device", "torch"):
        about[key] = ", ".join(sorted({str(r[key]) for r in runs}))
    about |= {"dates": " … ".join(sorted({r["date"][:10] for r in runs})), "seeds": ", ".join(map(str, sorted({r["seed"] for r in runs}))),
              "cells": len(runs), "base": ", ".join(sorted({r["config"]["init_from"] for r in runs})),
              "test tokens": ", ".join(sorted({f"{r['tokens']:,}" for r in runs}))}
    text = markdown(groups, rows, about)
    table = [{"name": g["name"], "ratio": g["ratio"], "config": g["config"], "runs": [
        {key: value for key, value in r.items() if key not in ("folder", "config")} for r in g["runs"]]} for g in groups]
    write_text(out / "table.json", json.dumps({"about": about, "configurations": table, "comparisons": rows}, indent=1) + "\n")
    write_text(out / "table.md", text)
    drawn = figures(groups, out)
    print(text)
    print(f"table: {out / 'table.md'}, {out / 'table.json'}   figures: {', '.join(str(p) for p in drawn if p.suffix == '.png')}")


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    jobs = None
    if "--jobs" in argv:
        at = argv.index("--jobs")
        number = "".join(argv[at + 1:at + 2])
        if not re.fullmatch("[1-9][0-9]{0,3}", number):
            raise InputError("--jobs takes a number of runs to go at a time")
        jobs = int(number)
        del argv[at:at + 2]
    values = read_values(argv, more=("sweep",))
    out = Path(values["out"])
    broken = {}
    if "--report" not in sys.argv:
        cells = read_cells(values)
        out.mkdir(parents=True, exist_ok=True)
        broken = run(cells, jobs)
    if not broken or any(out.glob("*/results.json")):
        report(out)
    for name, why in broken.items():
        print(f"broken: {name}: {why}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
