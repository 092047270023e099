"""The report of a sweep: read its cells, group and compare them, write tables and figures."""

import contextlib
import json
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import fill

import numpy as np
import torch

from report.plots import draw_sweep, layer_mean, order
from report.stats import mean_interval, paired, resampled_losses
from report.tables import (
    aligned,
    between,
    facts,
    fixed,
    listed,
    markdown,
    number,
    plus_minus,
    with_interval,
)
from support.files import InputError, fits, read_text, write_json, write_text
from support.machine import provenance

# what the report needs of results.json
NUMBER, MEASURES = (int, float), "loss perplexity accuracy bits_per_byte tokens mean_lookback"
SHAPE = dict.fromkeys(MEASURES.split(), NUMBER)
SHAPE |= dict.fromkeys(("date", "commit", "code", "device", "torch", "source_sha256"), str)
SHAPE |= {"seed": int, "blocks": {"mean_lookback": NUMBER}, "reach": (None, {"median": NUMBER})}
SHAPE |= {"layers": [{"locality": NUMBER, "fidelity": NUMBER, "entropy": NUMBER}]}
SHAPE |= {"by_context": [[NUMBER]], "config": dict}
# keys of a config that can name a path
PATHS = "source", "data", "init_from"


@contextlib.contextmanager
def undamaged(path, remedy):
    """Raises InputError if what is read inside is not what a run writes to the file `path`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError):
        raise InputError(f"{path} is damaged; delete {remedy} and run the sweep again") from None


def parse(text):
    """The JSON that a run has written. Raises ValueError for any other text, also if a number in it
    is negative, other than by rounding, or not finite."""

    def number(digits, kind=float):
        if not -0.001 <= (value := kind(digits)) <= 1e305:  # exp(700) is the largest perplexity
            raise ValueError
        return value

    whole = partial(number, kind=int)
    return json.loads(text, parse_float=number, parse_int=whole, parse_constant=number)


def read_results(path, config_class):
    """results.json of a run as a dict, its `config` as `canonical` returns it, and its `folder`.
    config_class: the dataclass of the config. Raises InputError if the file is damaged."""
    with undamaged(path, path):
        results = parse(read_text(path))
        if not fits(results, SHAPE) or not fits(results["blocks"].get("forced", 0), NUMBER):
            raise TypeError
        config, layers, contexts = results["config"], results["layers"], results["by_context"]
        whole = layers and config["n_layer"] in (None, len(layers)) and contexts
        if not whole or not all(len(x) == 2 and x[1] > 0 for x in contexts):  # nats, tokens
            raise ValueError
        if asdict(config_class(**config)) != config or config["seed"] != results["seed"]:
            raise ValueError
        return {**results, "config": canonical(config), "folder": path.parent}


def read_curve(path):
    """The validation losses in metrics.jsonl: a list of (step, nats per token). Raises InputError
    if there are none or the file is damaged."""
    with undamaged(path, path.parent):
        lines = [parse(line) for line in read_text(path).splitlines()]
        lines = [line for line in lines if "val_loss" in line]
        if not lines or not fits(lines, [{"step": int, "val_loss": NUMBER}]):
            raise ValueError
        return [(line["step"], line["val_loss"]) for line in lines]


def canonical(config):
    """The config of a run, a dict, with paths below the working directory as relative paths and all
    others as absolute ones, so that the same file has the same name in every run."""
    return {**config, **{key: one_name(config[key]) for key in PATHS}}


def one_name(source):
    """A path, or a list of them, as `canonical` writes it; an address or "" as it is."""
    if isinstance(source, list):
        return [one_name(name) for name in source]
    if not source or "://" in source:
        return source
    path, here = Path(source).resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def read_runs(folder, config_class, without=()):
    """The finished cells of a sweep, except for the names in `without`: (runs, broken).

    runs: a list of what `read_results` returns, each with its `curve` (see `read_curve`); broken:
    {name: why} of the cells whose files are damaged, or that repeat another cell.
    """
    runs, broken, folders = [], {}, {}
    for path in sorted(folder.glob("*/results.json")):
        if path.parent.name in without:
            continue
        try:
            run = read_results(path, config_class)
            run["curve"] = read_curve(path.with_name("metrics.jsonl"))
            config = str({**run["config"], "out": "", "data": ""})
            if (first := folders.setdefault(config, path.parent)) != path.parent:
                raise InputError(
                    f"{path.parent} has the same config as {first}; delete one of them"
                )
            runs.append(run)
        except InputError as e:
            broken[path.parent.name] = f"error: {e}"
    return runs, broken


# --------------------------------------------------------------------------------------------------
# groups: cells that differ only in the seed

# partitions that are matched to the mean lookback of semantic blocks; their cap does not bind
MATCHED = "window", "block", "aligned"
# the keys that do not matter to a distributed run
LOCAL = "schedule", "partition", "floor", "max_lookback", "anchor"


def collect(runs):
    """The runs of a sweep, as `read_runs` returns them, in groups: (groups, the keys in which they
    differ).

    A group is a dict: runs, config, schedule, partition (without its N), blocks and name (words
    that tell it from other groups), block_stats of the training split, loss {seed: nats}, and
    vs_distributed, a comparison or None.
    """
    configs, groups = [r["config"] for r in runs], {}
    for r, config in zip(runs, configs):
        config["n_layer"] = len(r["layers"])  # the config need not say it
        cap_binds = kind(config) == "aligned" and r["blocks"].get("forced")
        if kind(config) in MATCHED and not cap_binds:
            config["max_lookback"] = None  # it does not tell groups apart
    keys = [key for key in configs[0] if varies(key, configs)]
    for r, config in zip(runs, configs):
        group = {"config": config, "schedule": config["schedule"], "partition": kind(config)}
        group |= {"block_stats": r["blocks"], "runs": [], "loss": {}}
        group = groups.setdefault(tuple(str(config[key]) for key in keys), group)
        if r["seed"] not in group["loss"]:  # otherwise the same model, with another max_lookback
            group["runs"].append(r)
            group["loss"][r["seed"]] = r["loss"]
    groups = list(groups.values())
    name_groups(groups, keys)
    shared = [key for key in keys if key not in LOCAL]
    bases = [g for g in groups if g["schedule"] == "distributed"]
    for group in groups:
        base = next((g for g in bases if agree(g, group, shared)), {"loss": {}, "runs": []})
        resampled = resampled_losses(group["runs"], base["runs"])
        group["vs_distributed"] = paired(group["loss"], base["loss"], resampled, ratio=True)
    groups.sort(key=lambda g: (g["blocks"] != "", g["blocks"], order(g["schedule"])))
    return groups, keys


def kind(config):
    """The partition of a config without its N, a string."""
    name, _, n = config["partition"].partition(":")
    return name if n.isdigit() else config["partition"]


def varies(key, configs):
    """Whether some configs differ in a key, other than the seed and the folders."""
    values = {str(config[key]) for config in configs} - {"None" if key == "max_lookback" else ""}
    return key not in ("seed", "out", "data") and len(values) > 1


def agree(a, b, keys):
    """Whether the configs of two groups agree in all of these keys."""
    return all(a["config"][key] == b["config"][key] for key in keys)


def name_groups(groups, keys):
    """Give each group its `blocks` and its `name`, which mention what most groups do not share."""
    usual = {}
    for key in keys:
        value, n = Counter(str(g["config"][key]) for g in groups).most_common(1)[0]
        if n > len(groups) / 2:
            usual[key] = value
    for group in groups:
        config, local = group["config"], group["schedule"] != "distributed"
        words = [config["partition"]] if local else []
        for key in keys:
            unusual = config[key] is not None and str(config[key]) != usual.get(key)
            if key not in ("schedule", "partition") and unusual and (local or key not in LOCAL):
                words.append(f"{key} {config[key]}")
        group["blocks"] = ", ".join(words)
        group["name"] = ", ".join([group["schedule"], *words])
    names = Counter(group["name"] for group in groups)
    for group in groups:
        if names[name := group["name"]] > 1:  # distributed runs measured in different blocks
            others = [key for key in keys if key != "schedule" and f"{key} " not in name]
            group["name"] = ", ".join([name, *(f"{key} {group['config'][key]}" for key in others)])


# --------------------------------------------------------------------------------------------------
# comparisons: those that the paper makes, and the controls

COMPARED = [
    *(("partition", "semantic", x) for x in (*MATCHED, "shifted", "document", "semantic:closed")),
    *(("partition", "semantic:closed", x) for x in (*MATCHED, "document")),
    *(("partition", "semantic+window", x) for x in ("semantic", "window", "shifted")),
    ("schedule", "quintic", "localist"),
    ("schedule", "quintic", "reversed"),
    # as much locality in other layers, if their number is even; in the first of each pair, the last
    # layer is local
    ("schedule", "late_half", "early_half"),
    ("schedule", "late_half", "interleaved:2"),
    ("schedule", "linear", "interleaved:2"),
    ("schedule", "interleaved:2:local", "interleaved:2"),
    ("schedule", "quintic", "interleaved:2"),  # less locality
]


def comparisons(groups, keys):
    """A list of comparisons (see report.stats) as ratios of perplexities, with the names of the
    groups, `first` and `second`."""
    local = [g for g in groups if g["schedule"] != "distributed"]
    rows = [row for compared in COMPARED for row in compare(local, keys, *compared)]
    for g in local:
        if g["vs_distributed"]:
            rows.append({"first": g["name"], "second": "distributed", **g["vs_distributed"]})
    return rows


def compare(groups, keys, key, first, second):
    """Compare the groups that differ only in `key`, schedule or partition.

    For a matched partition, only the group whose mean lookback is closest is compared, and only if
    it is within 5 % or one token. All others must have the same max_lookback. If there are several
    pairs of partitions, their means are compared as well, seed by seed.
    """
    fixed, pairs, rows = [k for k in keys if k not in (key, "max_lookback")], [], []
    for a in [g for g in groups if g[key] == first]:
        mean = a["block_stats"]["mean_lookback"]
        others = [
            (abs(b["block_stats"]["mean_lookback"] - mean), i, b)
            for i, b in enumerate(groups)
            if b[key] == second and agree(a, b, fixed) and a["loss"].keys() & b["loss"].keys()
        ]
        if second in MATCHED:
            pairs += [(a, b) for gap, _, b in sorted(others)[:1] if gap <= max(0.05 * mean, 1)]
        else:
            pairs += [(a, b) for _, _, b in others if agree(a, b, ["max_lookback"])]
    losses = [(a["loss"], b["loss"]) for a, b in pairs]
    resampled = [resampled_losses(a["runs"], b["runs"]) for a, b in pairs]
    for (a, b), loss, text in zip(pairs, losses, resampled):
        row = paired(*loss, text, ratio=True)
        rows.append({"first": a["name"], "second": b["name"], **row})
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in losses)) if losses else ()
    if key == "partition" and len(pairs) > 1 and seeds:

        def means(sides):  # of both sides, {seed: mean over the pairs}
            return [
                {s: sum(x[s] for x in side) / len(pairs) for s in seeds} for side in zip(*sides)
            ]

        text = means(resampled) if all(resampled) else None
        names = {"first": f"{first}, mean of {len(pairs)}", "second": f"{second}, the same"}
        rows.append({**names, **paired(*means(losses), text, ratio=True)})
    return rows


# --------------------------------------------------------------------------------------------------
# the report

# the ratios that the paper's abstracts give, by schedule: in v1, in v2 and v3
PAPER = {"distributed": ("1", "1"), "quintic": ("1.89", "near 1"), "localist": ("6.6", "–")}
COLUMNS = """configuration | seeds | perplexity | 95 % interval | ratio to distributed [95 %] |
95 % over the text | the paper's ratio: v1 | v2, v3 | mean lookback, tokens: training | test |
reach, tokens (median) | starts forced by the cap, % | accuracy, % | bits per byte |
fidelity: last layer | mean | entropy, bits: last layer | mean"""
PAIRS = """first | second | seeds | perplexity, first to second [95 %] | p, exact |
least p possible | 95 % over the text"""
SHORT = "configuration | seeds | perplexity ± sd | ratio [95 %] | fidelity | paper: v1 | v2, v3"
NOTE = """± is the standard deviation over seeds. Ratios and differences are paired by seed; their
intervals are Student's t on the logarithms. A seed changes the order of the training data (and the
initial weights of a model that starts from scratch). The test text is the same for all seeds, so
these intervals say nothing about another text; those over the text resample its contexts. "Starts
forced" counts block starts of the training split. "Reach" is how far back a token can be and still
change a prediction through all layers; "all" means the whole context.
"""
NOTE_SHORT = """± is the standard deviation over seeds. The ratio to distributed and its 95 %
interval are paired by seed. Fidelity is the share of attention inside the block, the mean over
layers.
"""
NOTE_PAPER = """The paper's ratios are all that the abstracts of its versions (arXiv 2511.18375)
give, for another book. v1 uses a fixed window; it quotes the 6.6, for strict locality, from earlier
work. v2 and v3 use semantic blocks; they say "near baseline".
"""
NOTE_P = """p is from an exact two-sided permutation test, which flips the signs of the paired
differences in all possible ways. It cannot be lower than the next column, however large the effect
is. It is not corrected for the number of comparisons. The interval over the text averages the seeds
and resamples the contexts of the test text (2,000 times) as if they were independent.
"""


def paper_ratios(group):
    """The ratios that the paper's abstracts give for this schedule with a floor of 1: (in v1, in v2
    and v3, which have semantic blocks), strings."""
    first, later = PAPER.get(group["schedule"], "––")
    if group["schedule"] != "distributed" and group["config"]["floor"] < 1:
        return "–", "–"
    return first, later if group["partition"] == "semantic" else "–"


def group_row(group):
    """The cells of a group in the table of configurations."""
    runs, stats, local = group["runs"], group["block_stats"], group["schedule"] != "distributed"
    perplexity, reach = [r["perplexity"] for r in runs], runs[0]["reach"]
    mean, _, half = mean_interval(perplexity)
    forced = stats.get("forced") if local else None  # a distributed run does not use its blocks
    cells = [
        *(group["name"], len(runs), plus_minus(perplexity, 3)),
        between(None if half is None else (mean - half, mean + half), 3),
        with_interval(group["vs_distributed"], 4),
        between((group["vs_distributed"] or {}).get("text"), 4),
        *paper_ratios(group),
        *(number(x["mean_lookback"] if local else None, ".0f") for x in (stats, runs[0])),
        "all" if reach is None else f"{reach['median']:.0f}",
        number(forced and 100 * forced, ".1f"),
        plus_minus([100 * r["accuracy"] for r in runs], 2),
        plus_minus([r["bits_per_byte"] for r in runs], 4),
    ]
    for key, form in (("fidelity", ".3f"), ("entropy", ".2f")):
        cells.append(format(np.mean([r["layers"][-1][key] for r in runs]), form))
        cells.append(format(np.mean([layer_mean(r, key) for r in runs]), form))
    return cells


def code_versions(groups):
    """A paragraph that says how many versions of the code made the runs; "" if only one did."""
    runs = [r for group in groups for r in group["runs"]]
    codes = {code for r in runs for code in r["code"].split("+")}
    if len(codes) < 2:
        return ""
    commits = listed(r["commit"] for r in runs)
    plural = "s" * (", " in commits)
    text = f"These runs were made by {len(codes)} versions of the code (commit{plural} {commits})."
    return f"\n{fill(text, 100)}\n"


def report_text(groups, rows, about):
    """The report as Markdown. groups: see `collect`; rows: see `comparisons`; about: a dict."""
    columns, pairs = (" ".join(names.split()).split(" | ") for names in (COLUMNS, PAIRS))
    text = markdown(columns, map(group_row, groups)) + f"\n{NOTE}\n{NOTE_PAPER}\n"
    cells = [
        [row["first"], row["second"], row["seeds"], with_interval(row, 4), number(row["p"], ".3g")]
        + [number(row["least_p"], ".3g"), between(row["text"], 4)]
        for row in rows
    ]
    if rows:
        text += markdown(pairs, cells) + f"\n{NOTE_P}\n"
    return text + facts(about) + code_versions(groups)


def terminal_text(groups):
    """The main results for a terminal of 100 columns. groups: see `collect`."""
    rows = []
    for group in groups:
        runs = group["runs"]
        row = [group["name"], len(runs), plus_minus([r["perplexity"] for r in runs], 3)]
        row += [with_interval(group["vs_distributed"], 3)]
        row += [fixed(np.mean([layer_mean(r, "fidelity") for r in runs]), 3)]
        rows.append([*row, *paper_ratios(group)])
    table = aligned(SHORT.split(" | "), rows, 100)
    return f"{table}\n{fill(NOTE_SHORT + NOTE_PAPER, 100)}\n{code_versions(groups)}"


def write_report(folder, runs):
    """Write table.md, table.json and the figures of a sweep, and print the main results. runs: what
    `read_runs` returned, at least one. Raises InputError."""
    groups, keys = collect(runs)
    rows = comparisons(groups, keys)
    about = {"command": provenance(torch.device("cpu"), None)["command"]}
    about |= {key: listed(r[key] for r in runs) for key in ("commit", "device", "torch")}
    about["dates"] = " … ".join(sorted({r["date"][:10] for r in runs}))
    about |= {"seeds": listed(r["seed"] for r in runs), "cells": len(runs)}
    about["base"] = listed(r["config"]["init_from"] for r in runs)
    about["test tokens"] = listed(f"{r['tokens']:,}" for r in runs)
    text, configurations = report_text(groups, rows, about), []
    for g in groups:
        g["curves"] = [r["curve"] for r in g["runs"]]
        kept = {key: g[key] for key in ("name", "vs_distributed", "config", "block_stats")}
        omitted = "folder", "config", "curve"
        runs = [{k: v for k, v in r.items() if k not in omitted} for r in g["runs"]]
        configurations.append({**kept, "runs": runs})
    table = {"about": about, "configurations": configurations, "comparisons": rows}
    write_json(folder / "table.json", table)
    write_text(folder / "table.md", text)
    print(terminal_text(groups))
    figures = ", ".join(path.name for path in draw_sweep(groups, folder))
    print(f"all columns and comparisons: {folder / 'table.md'}")
    print(f"in the same folder: table.json, {figures}")
