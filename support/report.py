"""The report of a sweep: its cells read from disk, the statistics, the tables."""

import json
import math
import statistics

import numpy as np
import torch

from support.files import InputError, write_json, write_text
from support.machine import provenance
from support.plots import draw_sweep, layer_mean, order
from support.settings import ADDED, RETIRED

# --------------------------------------------------------------------------------------------------
# reading


def read_results(path):
    """results.json of a cell, as a dict. Raises InputError where it is not as train.py wrote it."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        keys = "loss", "perplexity", "accuracy", "bits_per_byte", "tokens", "seed"
        numbers = [results[key] for key in keys]
        for layer in results["layers"]:
            numbers += [layer[key] for key in ("locality", "fidelity", "entropy")]
        keys = "schedule", "partition", "init_from"
        words = [results["date"], *(results["config"][key] for key in keys)]
        contexts = np.array(results.get("by_context", np.zeros((0, 2))), float)
        if (
            not results["layers"]
            or contexts.shape[1:] != (2,)
            or not isinstance(results.get("blocks", {}), dict)
            or not {"commit", "device", "torch"} <= results.keys()
            or not all(isinstance(n, (int, float)) for n in numbers)
            or not all(isinstance(word, str) for word in words)
        ):
            raise ValueError
        config = {"max_lookback": None, **RETIRED, **ADDED, **results["config"]}
        return {**results, "config": config, "folder": path.parent}
    except (ValueError, KeyError, TypeError, RecursionError):
        mend = "delete it, and the cell is brought to its end again"
        raise InputError(f"{path} is damaged; {mend}") from None


def read_curve(path):
    """The validation losses in metrics.jsonl: a list of (step, nats).

    Raises InputError where it is damaged.
    """
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        curve = [
            (int(line["step"]), float(line["val_loss"])) for line in lines if "val_loss" in line
        ]
        if not curve:
            raise ValueError
        return curve
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        mend = "delete the folder, and the cell is run again"
        raise InputError(f"{path} is damaged; {mend}") from None


# --------------------------------------------------------------------------------------------------
# statistics

# 97.5 % quantile of Student's t by degrees of freedom; between two entries the smaller, which is
# the cautious one
STUDENT = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 14: 2.145, 16: 2.120, 18: 2.101, 20: 2.086, 25: 2.060, 30: 2.042},
}


def interval(values):
    """(mean, standard deviation, half the width of the mean's 95 % interval) of some numbers.

    The last two are None for one value.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return values.mean(), None, None
    t = STUDENT[max(df for df in STUDENT if df <= n - 1)]
    return values.mean(), values.std(ddof=1), t * values.std(ddof=1) / math.sqrt(n)


def sign_flip_p(differences):
    """p of the two-sided exact permutation test of paired differences.

    The share of all 2^n ways to sign them whose mean is as far from 0 as theirs; never below
    2 / 2^n. None for more than 20: those are too many ways.
    """
    d = np.asarray(differences, float)
    if len(d) > 20:
        return None
    signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)  # (2^n, n)
    means = np.abs(signs @ d)
    return float((means >= abs(d.sum()) * (1 - 1e-12)).mean())


def holm(ps):
    """The p of several tests, each corrected for all of them (Holm 1979); a list.

    To reject where these are below 0.05 errs even once in at most 5 % of such families of tests.
    """
    corrected, least = [1.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def paired(a, b):
    """Compare two groups, {seed: loss in nats} each: the ratio of perplexities, paired by seed.

    Returns a dict, or None where they share no seed.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    d = [a[seed] - b[seed] for seed in seeds]
    mean, _, half = interval(d)
    return {
        "seeds": len(d),
        "ratio": math.exp(mean),
        "low": None if half is None else math.exp(mean - half),
        "high": None if half is None else math.exp(mean + half),
        "p": sign_flip_p(d),
        "p_least": 2 / 2 ** len(d),
    }


def over_text(a, b):
    """The 95 % interval of a ratio of perplexities, if the test text had other contexts like these.

    a, b: runs, as `read_results` gives them; the seeds that both have are averaged. The contexts of
    the text are drawn anew, 2,000 times, as if they did not depend on each other. Returns (low,
    high); None where there are fewer than 20, or the runs were not measured on the same ones.
    """
    a, b = ({r["seed"]: np.array(r.get("by_context", [])) for r in runs} for runs in (a, b))
    seeds = sorted(a.keys() & b.keys())
    found = [of[seed] for seed in seeds for of in (a, b)]  # (contexts, 2): nats, tokens
    if not seeds or len(found[0]) < 20:
        return None
    if any(x.shape != found[0].shape or (x != found[0])[:, 1].any() for x in found):
        return None
    d = np.mean([a[seed][:, 0] - b[seed][:, 0] for seed in seeds], axis=0)  # (contexts,)
    n = len(d)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000)  # (2000, contexts)
    ratios = np.exp(drawn @ d / (drawn @ found[0][:, 1]))
    return tuple(np.percentile(ratios, (2.5, 97.5)).tolist())


# --------------------------------------------------------------------------------------------------
# groups: cells that differ in the seed alone

# what blocks are compared with: those that were matched to them, and those of the same cap
MATCHED = "window", "block", "aligned"
RIVALS = {
    "semantic": (*MATCHED, "shifted", "document", "semantic:closed"),
    "semantic:closed": (*MATCHED, "document"),
}
# what a distributed run does not depend on
LOCAL = ("schedule", "partition", "fidelity", "max_lookback", "anchor", *RETIRED)


def collect(folder):
    """All finished cells of a sweep, in groups. Returns (groups, keys in which they differ).

    A group is a dict: config, cap (max_lookback), runs, schedule, blocks, name, loss by seed,
    and the ratio to distributed as `paired` has it. Raises InputError.
    """
    results = [read_results(path) for path in sorted(folder.glob("*/results.json"))]
    if not results:
        raise InputError(f"{folder}: no finished cell here; run the sweep first")
    for r in results:  # a cap that never binds tells nothing apart
        r["cap"] = r["config"]["max_lookback"]
        if kind(r) in MATCHED:
            r["config"]["max_lookback"] = None
    keys = differing([r["config"] for r in results])
    groups = {}
    for r in results:
        values = tuple(str(r["config"].get(key)) for key in keys)
        found = r.get("blocks") or {}
        new = {"config": r["config"], "cap": r["cap"], "blocks_found": found, "runs": []}
        groups.setdefault(values, new)["runs"].append(r)
    groups = list(groups.values())
    name_groups(groups, keys)
    for group in groups:
        group["loss"] = {r["seed"]: r["loss"] for r in group["runs"]}
    shared = [key for key in keys if key not in LOCAL]
    for group in groups:
        base = [
            g["loss"]
            for g in groups
            if g["schedule"] == "distributed"
            and all(g["config"].get(key) == group["config"].get(key) for key in shared)
        ]
        group["ratio"] = paired(group["loss"], base[0]) if base else None
    groups.sort(key=lambda g: (g["blocks"] != "", g["blocks"], order(g["schedule"])))
    return groups, keys


def kind(group):
    """The partition of a group, or of a cell, without the N: a string."""
    name, _, n = group["config"]["partition"].partition(":")
    return name if n.isdigit() else group["config"]["partition"]


def differing(configs):
    """The keys in which the configs of a sweep differ, apart from the seed and where they lie."""
    keys = []
    for key in configs[0]:
        values = {str(config.get(key)) for config in configs}
        if key in ("seed", "out", "data") or len(values) < 2:
            continue
        if key == "max_lookback" and len(values - {"None"}) < 2:
            continue
        keys.append(key)
    return keys


def name_groups(groups, keys):
    """Give each group its schedule, blocks and name: what is not as in most."""
    most = {}
    for key in keys:
        values = [str(g["config"].get(key)) for g in groups]
        value = statistics.mode(values)
        if values.count(value) > len(groups) / 2:
            most[key] = value
    for group in groups:
        c, local = group["config"], group["config"]["schedule"] != "distributed"
        words = [c["partition"]] if local else []
        for key in keys:
            tells = c.get(key) is not None and str(c[key]) != most.get(key)
            if key not in ("schedule", "partition") and tells and (local or key not in LOCAL):
                words.append(f"{key} {c[key]}")
        group["schedule"], group["blocks"] = c["schedule"], ", ".join(words)
        group["name"] = ", ".join([c["schedule"], *words])


def comparisons(groups, keys):
    """The pairs that the paper compares, and the controls.

    Returns a list of dicts with `first`, `second` and what `paired` gives.
    """
    rows = []
    for blocks, rivals in RIVALS.items():
        for rival in rivals:
            rows += compare(groups, keys, "partition", blocks, rival)
    rows += compare(groups, keys, "schedule", "quintic", "localist")
    rows += compare(groups, keys, "schedule", "quintic", "reversed")
    for g in groups:
        if g["ratio"] and g["schedule"] != "distributed":
            rows.append({"first": g["name"], "second": "distributed", **g["ratio"]})
    return rows


def compare(groups, keys, key, first, second):
    """Compare all groups that differ in one key alone, `first` there against `second`.

    key: "schedule" or "partition", there without its N. Where there are several pairs of blocks,
    their mean is compared too, seed by seed.
    """
    same = [k for k in keys if k not in (key, "max_lookback")]
    groups = [g for g in groups if g["schedule"] != "distributed"]
    value = kind if key == "partition" else lambda group: group["schedule"]
    pairs = []
    for a in (g for g in groups if value(g) == first):
        others = [
            b
            for b in groups
            if value(b) == second
            and all(a["config"].get(k) == b["config"].get(k) for k in same)
            and paired(a["loss"], b["loss"])
        ]
        pairs += [(a, b) for b in fitting(a, others, groups)]
    rows = [
        {
            "first": a["name"],
            "second": b["name"],
            **paired(a["loss"], b["loss"]),
            "text": over_text(a["runs"], b["runs"]),
        }
        for a, b in pairs
    ]
    if key == "schedule" or len(pairs) < 2:
        return rows
    seeds = set.intersection(*(a["loss"].keys() & b["loss"].keys() for a, b in pairs))
    mean = [{s: sum(p[i]["loss"][s] for p in pairs) / len(pairs) for s in seeds} for i in (0, 1)]
    if row := paired(*mean):
        names = {"first": f"{first}, mean of {len(pairs)}", "second": f"{second}, the same"}
        rows.append({**names, **row})
    return rows


def fitting(a, others, groups):
    """Those of `others` that may be compared with the group `a`: with as much in sight.

    Rivals that were matched reach back as far on average: of several, the nearest one counts. All
    others have the same cap. groups: all that are local.
    """
    mean = a["blocks_found"].get("mean_lookback")
    means = [b["blocks_found"].get("mean_lookback") for b in others]
    if others and kind(others[0]) in MATCHED and kind(a) not in MATCHED and None not in means:
        if mean is not None:
            gap, nearest = min((abs(m - mean), i) for i, m in enumerate(means))
            return [others[nearest]] if gap <= max(0.05 * mean, 1) else []
    caps = {g["config"]["max_lookback"] for g in groups} - {None}

    def one_sided(b):
        return None in (a["config"]["max_lookback"], b["config"]["max_lookback"])

    return [b for b in others if a["cap"] == b["cap"] or len(caps) < 2 and one_sided(b)]


# --------------------------------------------------------------------------------------------------
# tables

COLUMNS = """configuration | seeds | perplexity | 95 % interval | ratio to distributed [95 %] |
mean lookback, tokens: training | test | reach, tokens (median) | starts forced by the cap, % |
accuracy, % | bits per byte | fidelity: last layer | mean | entropy, bits: last layer | mean"""
PAIRS = """first | second | seeds | perplexity, first to second [95 %] | p, exact |
least p possible | 95 % over the text"""
NOTE = """± is the standard deviation over seeds. Ratios and differences are paired by seed; their
intervals are Student's t on the logarithms. A seed changes the order of the training data (and the
weights, from scratch); the test text is the same for all, so they do not speak for another book.
Starts are of the training split. Reach: how far back a token can change a prediction, through all
layers; "all" is the whole context.
"""
NOTE_P = """p: exact two-sided permutation test, all ways to flip the signs of the paired
differences. It cannot fall below the next column, however large the effect. No correction for the
number of comparisons. Over the text: the mean of the seeds, with the contexts of the test text
drawn anew (2,000 times), as if they did not depend on each other.
"""


def plus_minus(values, digits):
    mean, sd, _ = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def with_interval(row):
    if row is None:
        return "–"
    if row["low"] is None or row["ratio"] == 1:
        return f"{row['ratio']:.4f}"
    return f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"


def markdown(groups, rows, about):
    """The report as Markdown."""

    def line(cells):
        return f"| {' | '.join(map(str, cells))} |"

    columns = COLUMNS.replace("\n", " ")
    lines = [f"| {columns} |", "| --- " * (columns.count("|") + 1) + "|"]
    for g in groups:
        runs, last = g["runs"], [r["layers"][-1] for r in g["runs"]]
        perplexity = [r["perplexity"] for r in runs]
        mean, _, half = interval(perplexity)
        width = f"{mean - half:.3f} … {mean + half:.3f}" if half is not None else "–"
        cells = [g["name"], len(runs), plus_minus(perplexity, 3), width, with_interval(g["ratio"])]
        found = g["blocks_found"] if g["blocks"] else {}  # a distributed run does not use them
        for blocks in (found, runs[0] if g["blocks"] else {}):
            cells.append(f"{blocks['mean_lookback']:.0f}" if "mean_lookback" in blocks else "–")
        reach = runs[0].get("reach")
        cells.append(f"{reach['median']:.0f}" if reach else "all")
        cells.append(f"{100 * found['forced']:.1f}" if "forced" in found else "–")
        cells.append(plus_minus([100 * r["accuracy"] for r in runs], 2))
        cells.append(plus_minus([r["bits_per_byte"] for r in runs], 4))
        for key, digits in (("fidelity", 3), ("entropy", 2)):
            cells.append(f"{np.mean([layer[key] for layer in last]):.{digits}f}")
            cells.append(f"{np.mean([layer_mean(r, key) for r in runs]):.{digits}f}")
        lines.append(line(cells))
    lines += ["", NOTE]
    if rows:
        columns = PAIRS.replace("\n", " ")
        lines += [f"| {columns} |", "| --- " * (columns.count("|") + 1) + "|"]
        for row in rows:
            cells = [row["first"], row["second"], row["seeds"], with_interval(row)]
            cells.append("–" if row["p"] is None else f"{row['p']:.3g}")
            cells.append(f"{row['p_least']:.3g}")
            text = row.get("text")
            lines.append(line([*cells, f"{text[0]:.4f} … {text[1]:.4f}" if text else "–"]))
        lines += ["", NOTE_P]
    lines.append("; ".join(f"{key} {value}" for key, value in about.items()))
    return "\n".join(lines) + "\n"


def report(folder):
    """Write table.md, table.json and the figures of a sweep, from the results of its cells."""
    groups, keys = collect(folder)
    rows = comparisons(groups, keys)
    runs = [r for g in groups for r in g["runs"]]

    def all_of(values):
        return ", ".join(sorted(set(map(str, values))))

    about = {"command": provenance(torch.device("cpu"), None)["command"]}
    about |= {key: all_of(r[key] for r in runs) for key in ("commit", "device", "torch")}
    about["dates"] = " … ".join(sorted({r["date"][:10] for r in runs}))
    about["seeds"] = ", ".join(map(str, sorted({r["seed"] for r in runs})))
    about["cells"] = len(runs)
    about["base"] = all_of(r["config"]["init_from"] for r in runs)
    about["test tokens"] = all_of(f"{r['tokens']:,}" for r in runs)
    configurations = []
    for g in groups:
        kept = [{k: v for k, v in r.items() if k not in ("folder", "config")} for r in g["runs"]]
        found = {key: g[key] for key in ("name", "ratio", "config", "blocks_found")}
        configurations.append({**found, "runs": kept})
    table = {"about": about, "configurations": configurations, "comparisons": rows}
    text = markdown(groups, rows, about)
    for g in groups:
        g["curves"] = [read_curve(r["folder"] / "metrics.jsonl") for r in g["runs"]]
    write_json(folder / "table.json", table)
    write_text(folder / "table.md", text)
    drawn = draw_sweep(groups, folder)
    print(text)
    pictures = ", ".join(str(path) for path in drawn if path.suffix == ".png")
    print(f"table: {folder / 'table.md'}, {folder / 'table.json'}   figures: {pictures}")
