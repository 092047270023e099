"""The report of a sweep: read its cells, group and compare them, write tables and figures."""

import json
import statistics

import numpy as np
import torch

from report.plots import draw_sweep, layer_mean, order
from report.stats import as_ratio, bootstrap_weights, mean_interval, paired
from report.tables import between, facts, listed, markdown, number, plus_minus, with_interval
from support.files import InputError, write_json, write_text
from support.machine import provenance

# --------------------------------------------------------------------------------------------------
# reading

NUMBERS = "loss", "perplexity", "accuracy", "bits_per_byte", "tokens", "seed", "mean_lookback"


def read_results(path):
    """results.json of a run as a dict, and its `folder`. Raises InputError if it is damaged."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        layers, config, reach = results["layers"], results["config"], results["reach"]
        numbers = [results[key] for key in NUMBERS] + [results["blocks"]["mean_lookback"]]
        numbers += [layer[key] for layer in layers for key in ("locality", "fidelity", "entropy")]
        numbers += [] if reach is None else [reach["median"]]
        words = [results[key] for key in ("date", "commit", "device", "torch")]
        words += [config[key] for key in ("schedule", "partition", "init_from")]
        if (
            not layers
            or np.array(results["by_context"], float).shape[1:] != (2,)
            or not all(isinstance(x, (int, float)) for x in (*numbers, config["max_lookback"]))
            or not all(isinstance(word, str) for word in words)
        ):
            raise ValueError
        return {**results, "folder": path.parent}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged; delete it and run the sweep again") from None


def read_curve(path):
    """The validation losses in metrics.jsonl: a list of (step, nats per token).

    Raises InputError if the file is damaged.
    """
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        curve = [(int(x["step"]), float(x["val_loss"])) for x in lines if "val_loss" in x]
        if not curve:
            raise ValueError
        return curve
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged; delete its folder and run the sweep again") from None


# --------------------------------------------------------------------------------------------------
# groups: cells that differ only in the seed

# what semantic blocks are compared with: partitions that were matched to them, and partitions with
# the same max_lookback
MATCHED = "window", "block", "aligned"
RIVALS = {
    "semantic": (*MATCHED, "shifted", "document", "semantic:closed"),
    "semantic:closed": (*MATCHED, "document"),
}
# the keys that do not matter to a distributed run
LOCAL = "schedule", "partition", "floor", "max_lookback", "anchor"


def collect(folder):
    """All finished cells of a sweep, in groups: (groups, the keys in which they differ).

    A group is a dict: runs (as `read_results` returns them), config, cap (max_lookback), schedule,
    blocks and name (words that tell it from other groups), block_stats of the training split, loss
    {seed: nats}, and vs_distributed, a comparison (see report.stats) or None. Raises InputError.
    """
    results = [read_results(path) for path in sorted(folder.glob("*/results.json"))]
    if not results:
        raise InputError(f"{folder} holds no finished cell; run the sweep first")
    for r in results:
        r["cap"] = r["config"]["max_lookback"]
        if kind(r) in MATCHED:  # their cap never binds, so it does not tell groups apart
            r["config"]["max_lookback"] = None
    keys = varied_keys([r["config"] for r in results])
    groups = {}
    for r in results:
        group = {"config": r["config"], "cap": r["cap"], "schedule": r["config"]["schedule"]}
        group |= {"block_stats": r["blocks"], "runs": [], "loss": {}}
        group = groups.setdefault(tuple(str(r["config"].get(key)) for key in keys), group)
        group["runs"].append(r)
        group["loss"][r["seed"]] = r["loss"]
    groups = list(groups.values())
    name_groups(groups, keys)
    shared = [key for key in keys if key not in LOCAL]
    for group in groups:
        bases = [g for g in groups if g["schedule"] == "distributed" and agree(g, group, shared)]
        row = paired(group["loss"], bases[0]["loss"]) if bases else None
        group["vs_distributed"] = row and as_ratio(row)
    groups.sort(key=lambda g: (g["blocks"] != "", g["blocks"], order(g["schedule"])))
    return groups, keys


def kind(group):
    """The partition of a group or a cell, without its N: a string."""
    name, _, n = group["config"]["partition"].partition(":")
    return name if n.isdigit() else group["config"]["partition"]


def agree(a, b, keys):
    """Whether the configs of two groups agree in all of these keys."""
    return all(a["config"].get(key) == b["config"].get(key) for key in keys)


def varied_keys(configs):
    """The keys in which the configs of a sweep differ, except for the seed and the folders."""
    ignored = {"max_lookback": {"None"}}  # of a partition whose cap never binds
    return [
        key
        for key in configs[0]
        if key not in ("seed", "out", "data")
        and len({str(config.get(key)) for config in configs} - ignored.get(key, set())) > 1
    ]


def name_groups(groups, keys):
    """Give each group its `blocks` and its `name`, which mention what most groups do not share."""
    usual = {}
    for key in keys:
        values = [str(g["config"].get(key)) for g in groups]
        value = statistics.mode(values)
        if values.count(value) > len(groups) / 2:
            usual[key] = value
    for group in groups:
        config, local = group["config"], group["schedule"] != "distributed"
        words = [config["partition"]] if local else []
        for key in keys:
            unusual = config.get(key) is not None and str(config[key]) != usual.get(key)
            if key not in ("schedule", "partition") and unusual and (local or key not in LOCAL):
                words.append(f"{key} {config[key]}")
        group["blocks"] = ", ".join(words)
        group["name"] = ", ".join([group["schedule"], *words])


# --------------------------------------------------------------------------------------------------
# comparisons


def comparisons(groups, keys):
    """The comparisons that the paper makes, and the controls.

    Returns a list of comparisons (see report.stats) as ratios of perplexities, with the names of
    the groups, `first` and `second`.
    """
    rows = []
    for partition, rivals in RIVALS.items():
        for rival in rivals:
            rows += compare(groups, keys, "partition", partition, rival)
    rows += compare(groups, keys, "schedule", "quintic", "localist")
    rows += compare(groups, keys, "schedule", "quintic", "reversed")
    for g in groups:
        if g["vs_distributed"] and g["schedule"] != "distributed":
            rows.append({"first": g["name"], "second": "distributed", **g["vs_distributed"]})
    return rows


def compare(groups, keys, key, first, second):
    """Compare the groups that differ in a single key, which is `first` in one, `second` in another.

    key: "schedule" or "partition" (without its N). If there are several pairs of partitions, their
    means are compared as well, seed by seed.
    """
    groups = [g for g in groups if g["schedule"] != "distributed"]
    value = kind if key == "partition" else lambda group: group["schedule"]
    fixed = [k for k in keys if k not in (key, "max_lookback")]
    pairs = []
    for a in (g for g in groups if value(g) == first):
        others = [
            b
            for b in groups
            if value(b) == second and agree(a, b, fixed) and a["loss"].keys() & b["loss"].keys()
        ]
        pairs += [(a, b) for b in comparable(a, others, groups)]
    rows = []
    for a, b in pairs:
        row = as_ratio(paired(a["loss"], b["loss"], resampled_losses(a["runs"], b["runs"])))
        rows.append({"first": a["name"], "second": b["name"], **row})
    if key == "partition" and len(pairs) > 1:
        seeds = set.intersection(*(a["loss"].keys() & b["loss"].keys() for a, b in pairs))
        a, b = (
            {s: sum(g["loss"][s] for g in side) / len(pairs) for s in seeds} for side in zip(*pairs)
        )
        if row := paired(a, b):
            names = {"first": f"{first}, mean of {len(pairs)}", "second": f"{second}, the same"}
            rows.append({**names, **as_ratio(row)})
    return rows


def comparable(a, others, groups):
    """Those of `others` that see as much of the text as group `a`. groups: all that are local.

    A partition that was matched reaches back as far on average: the nearest one counts if it is
    within 5 % or one token. All other partitions must have the same max_lookback.
    """
    if others and kind(others[0]) in MATCHED and kind(a) not in MATCHED:
        mean = a["block_stats"]["mean_lookback"]
        gaps = [abs(b["block_stats"]["mean_lookback"] - mean) for b in others]
        return [others[np.argmin(gaps)]] if min(gaps) <= max(0.05 * mean, 1) else []
    one_cap = len({g["config"]["max_lookback"] for g in groups} - {None}) < 2

    def uncapped(b):
        return None in (a["config"]["max_lookback"], b["config"]["max_lookback"])

    return [b for b in others if a["cap"] == b["cap"] or one_cap and uncapped(b)]


def resampled_losses(first, second):
    """The losses of two groups with the contexts of the test text resampled (see `paired`).

    first, second: lists of runs. Returns two dicts {seed: (RESAMPLES,) nats per token} of the seeds
    that both have, or None for fewer than 20 contexts or if the contexts are not the same.
    """
    sides = [{r["seed"]: np.array(r["by_context"]) for r in runs} for runs in (first, second)]
    seeds = sides[0].keys() & sides[1].keys()
    n_tokens = [side[seed][:, 1] for side in sides for seed in seeds]  # (contexts,) each
    if not seeds or len(n_tokens[0]) < 20:
        return None
    if not all(np.array_equal(n, n_tokens[0]) for n in n_tokens):
        return None
    drawn = bootstrap_weights(len(n_tokens[0]))  # (RESAMPLES, contexts)
    total = drawn @ n_tokens[0]  # (RESAMPLES,)
    return [{seed: drawn @ side[seed][:, 0] / total for seed in seeds} for side in sides]


# --------------------------------------------------------------------------------------------------
# the report

COLUMNS = """configuration | seeds | perplexity | 95 % interval | ratio to distributed [95 %] |
mean lookback, tokens: training | test | reach, tokens (median) | starts forced by the cap, % |
accuracy, % | bits per byte | fidelity: last layer | mean | entropy, bits: last layer | mean"""
PAIRS = """first | second | seeds | perplexity, first to second [95 %] | p, exact |
least p possible | 95 % over the text"""
NOTE = """± is the standard deviation over seeds. Ratios and differences are paired by seed; their
intervals are Student's t on the logarithms. A seed changes the order of the training data (and the
initial weights of a model that starts from scratch). The test text is the same for all seeds, so
these intervals say nothing about another book. "Starts forced" counts block starts of the training
split. "Reach" is how far back a token can be and still change a prediction through all layers;
"all" means the whole context.
"""
NOTE_P = """p is from an exact two-sided permutation test, which flips the signs of the paired
differences in all possible ways. It cannot be lower than the next column, however large the effect
is. It is not corrected for the number of comparisons. The interval over the text averages the seeds
and resamples the contexts of the test text (2,000 times) as if they were independent.
"""


def group_row(group):
    """The cells of a group in the table of configurations."""
    runs, reach, local = (
        group["runs"],
        group["runs"][0]["reach"],
        group["schedule"] != "distributed",
    )
    perplexity = [r["perplexity"] for r in runs]
    mean, _, half = mean_interval(perplexity)
    ends = None if half is None else (mean - half, mean + half)
    cells = [group["name"], len(runs), plus_minus(perplexity, 3), between(ends, 3)]
    cells.append(with_interval(group["vs_distributed"], 4))
    for lookbacks in (group["block_stats"], runs[0]):  # a distributed run does not use its blocks
        cells.append(number(lookbacks["mean_lookback"] if local else None, ".0f"))
    cells.append("all" if reach is None else number(reach["median"], ".0f"))
    forced = group["block_stats"].get("forced") if local else None
    cells.append(number(forced and 100 * forced, ".1f"))
    cells.append(plus_minus([100 * r["accuracy"] for r in runs], 2))
    cells.append(plus_minus([r["bits_per_byte"] for r in runs], 4))
    for key, form in (("fidelity", ".3f"), ("entropy", ".2f")):
        cells.append(number(np.mean([r["layers"][-1][key] for r in runs]), form))
        cells.append(number(np.mean([layer_mean(r, key) for r in runs]), form))
    return cells


def report_text(groups, rows, about):
    """The report as Markdown. groups: see `collect`; rows: see `comparisons`; about: a dict."""

    def columns(names):
        return " ".join(names.split()).split(" | ")

    text = markdown(columns(COLUMNS), map(group_row, groups)) + f"\n{NOTE}\n"
    if rows:
        cells = [
            [row["first"], row["second"], row["seeds"], with_interval(row, 4)]
            + [number(row["p"], ".3g"), number(row["least_p"], ".3g"), between(row["text"], 4)]
            for row in rows
        ]
        text += markdown(columns(PAIRS), cells) + f"\n{NOTE_P}\n"
    return text + facts(about)


def write_report(folder):
    """Write table.md, table.json and the figures of a sweep. Raises InputError."""
    groups, keys = collect(folder)
    rows = comparisons(groups, keys)
    runs = [r for g in groups for r in g["runs"]]
    about = {"command": provenance(torch.device("cpu"), None)["command"]}
    about |= {key: listed(r[key] for r in runs) for key in ("commit", "device", "torch")}
    about["dates"] = " … ".join(sorted({r["date"][:10] for r in runs}))
    about |= {"seeds": listed(r["seed"] for r in runs), "cells": len(runs)}
    about["base"] = listed(r["config"]["init_from"] for r in runs)
    about["test tokens"] = listed(f"{r['tokens']:,}" for r in runs)
    text, configurations = report_text(groups, rows, about), []
    for g in groups:
        g["curves"] = [read_curve(r["folder"] / "metrics.jsonl") for r in g["runs"]]
        kept = {key: g[key] for key in ("name", "vs_distributed", "config", "block_stats")}
        runs = [{k: v for k, v in r.items() if k not in ("folder", "config")} for r in g["runs"]]
        configurations.append({**kept, "runs": runs})
    table = {"about": about, "configurations": configurations, "comparisons": rows}
    write_json(folder / "table.json", table)
    write_text(folder / "table.md", text)
    figures = ", ".join(str(path) for path in draw_sweep(groups, folder) if path.suffix == ".png")
    print(f"{text}\ntable: {folder / 'table.md'}, {folder / 'table.json'}   figures: {figures}")
