"""What faithfulness.py reports: three outcomes, their statistics, tables and figures."""

import itertools
from typing import NamedTuple

import numpy as np

from experiments.faithful_measure import SHIFTS
from report.plots import COLORS, finish, panels
from report.stats import bootstrap_weights, holm, mean_interval, paired
from report.tables import between, facts, markdown, number, plus_minus, with_interval
from support.files import InputError

# the measures that are compared, and their headings; the tests are about the first three
OUTCOMES = "boundary", "pointer", "leak"
BASE = "distributed"  # the model whose dial is turned to that of the first
COMPARED = {
    "boundary": "boundary, doublings",
    "pointer": "pointer in the block, correlation",
    "leak": "leak, bits per token",
    "above shifted": "boundary above those from elsewhere, doublings",
    "everywhere": "pointer over all sentences, correlation",
}
MIN_SENTENCES = 4  # before a token, for a correlation over them
BINS = 64  # half octaves of distance
MASSES = 2.0 ** np.arange(-12, 1)  # the edges of bins of attention mass


class Frame(NamedTuple):
    """What does not depend on the model in a context. A pair is a sentence and a later token."""

    pair: np.ndarray  # (S, T) booleans: the sentence ends before the token
    bins: np.ndarray  # (S, T) integers: half octaves of the distance
    distance: np.ndarray  # (S, T) tokens from the end of the sentence
    inside: list  # of (S, T) booleans, one for each of context.blocks: the sentence is in the block
    design: np.ndarray  # (pairs, columns): splines of distance and of length; then `inside`


def frames_of(contexts):
    """The Frames of Contexts, a list. Raises InputError if a context has no token whose block holds
    MIN_SENTENCES earlier sentences."""
    raw = []
    for context in contexts:
        begin, end = np.array(context.sentences).T[..., None]  # (S, 1) each
        distance = np.arange(len(context.tokens) - 1) - end  # (S, T)
        pair, length = distance >= 0, np.broadcast_to(end - begin, distance.shape)
        # a boundary from elsewhere may cut a sentence: then its middle decides
        inside = [pair & ((begin + end) / 2 >= start) for start in context.blocks]
        if inside[0].sum(0).max() < MIN_SENTENCES:
            raise InputError(
                f"[faithful]: a context has no token with {MIN_SENTENCES} earlier sentences in its "
                "block, so no pointer can be measured; set a larger max_lookback or block_size"
            )
        raw.append((pair, distance, inside, np.log2(1 + distance[pair]), np.log2(length[pair])))
    distance_knots = np.percentile(np.concatenate([x for *_, x, _ in raw]), (5, 27.5, 50, 72.5, 95))
    length_knots = np.percentile(np.concatenate([z for *_, z in raw]), (10, 50, 90))
    frames = []
    for pair, distance, inside, x, z in raw:
        columns = [*spline(x, distance_knots), *spline(z, length_knots)]
        design = np.stack([*columns, *(mask[pair] for mask in inside)], 1).astype(float)
        bins = (2 * np.log2(1 + np.maximum(distance, 0))).astype(int)
        frames.append(Frame(pair, bins, distance, inside, design - design.mean(0)))
    return frames


def spline(x, knots):
    """The columns of a cubic spline of x that is linear beyond the knots, without the constant."""
    knots, columns = np.unique(knots), [x]
    for k in knots[:-2]:
        last, before = knots[-1], knots[-2]
        bend, *ends = [np.maximum(x - at, 0) ** 3 for at in (k, before, last)]
        bend = bend - (ends[0] * (last - k) - ends[1] * (before - k)) / (last - before)
        columns.append(bend / (last - knots[0]) ** 2)
    return columns


def ranks(x, among):
    """The rank of each value in its column, with ties shared: (S, T). among: those that count."""
    below = (x[None] < x[:, None]) & among[None]  # (S, S, T)
    same = (x[None] == x[:, None]) & among[None]
    return below.sum(1) + (same.sum(1) + 1) / 2


def partial_spearman(a, b, c, among):
    """Spearman's correlation of a and b in each column, with c removed: (T,).

    a, b, c: (S, T); among: (S, T) booleans, the rows that count. It is 0 if a or b is determined by
    c, and NaN if fewer than MIN_SENTENCES rows count.
    """
    n = among.sum(0)  # (T,)
    r = np.where(among, [ranks(x, among) for x in (a, b, c)], 0)  # (3, S, T)
    r = np.where(among, r - r.sum(1, keepdims=True) / np.maximum(n, 1), 0)

    def correlation(x, y):
        return ratio((x * y).sum(0), np.sqrt((x**2).sum(0) * (y**2).sum(0)), 0)

    ab, ac, bc = (correlation(r[i], r[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    left = (1 - ac**2) * (1 - bc**2)
    partial = ratio(ab - ac * bc, np.sqrt(np.where(left > 1e-9, left, 0)), 0)
    return np.where(n >= MIN_SENTENCES, partial, np.nan)


def ratio(x, y, missing=np.nan):
    """x / y; `missing` where y is not above 0."""
    return np.divide(x, y, where=y > 0, out=np.full(np.shape(y), missing, float))


class Summary(NamedTuple):
    """What the statistics need of a model: sums over each of C contexts."""

    cross: np.ndarray  # (2, C, columns): Frame.design times log2(influence + eps), or + eps / 10
    sums: dict  # {measure: (C, 2)}: its sum, and the number of values
    near: np.ndarray  # (2, bins, 2) inside and outside the block: see `by_bin`
    mass: np.ndarray  # (2, bins, 2) of all pairs and of those inside: see `by_mass`


def summarize(measured, frames, eps):
    """The Summary of a model. measured: as `read_measured` returns it; eps: bits."""
    cross, totals, near, mass = [], [], 0.0, 0.0
    for c, frame in enumerate(frames):
        pair, inside = frame.pair, frame.inside[0][frame.pair]
        at = {k.split(".")[0]: x.astype(float) for k, x in measured.items() if k.endswith(f".{c}")}
        y, finer = (np.log2(at["influence"] + e)[pair] for e in (eps, eps / 10))  # (pairs,) each
        cross.append([frame.design.T @ (x - x.mean()) for x in (y, finer)])
        at["weak"] = at["influence"][pair] < eps
        totals.append(totals_of(at, frame))
        bins, raw = frame.bins[pair], at["raw"][pair]
        near = near + np.stack([by_bin(y, bins, BINS, x) for x in (inside, ~inside)])
        mass = mass + np.stack([by_mass(y, raw, bins, x) for x in (inside | True, inside)])
    sums = {name: np.array([total[name] for total in totals]) for name in totals[0]}
    return Summary(np.array(cross).swapaxes(0, 1), sums, near, mass)


def by_bin(values, bins, n, among):
    """(n, 2): the sum and the number of the values in each bin. among: the values that count."""
    values, bins = values[among], bins[among]
    return np.stack([np.bincount(bins, values, n), np.bincount(bins, minlength=n)], 1)[:n]


def by_mass(y, mass, bins, among):
    """(bins, 2): in each bin of mass, the sum of y minus its mean at that distance; the count. y,
    mass, bins (of the distance), among (booleans): (pairs,)."""
    rest = y - ratio(*by_bin(y, bins, BINS, among).T)[bins]
    return by_bin(rest, np.searchsorted(MASSES, mass, side="right"), len(MASSES) + 1, among)


def totals_of(at, frame):
    """The measures of a context that are means: {name: (sum, number of values)}. at: the arrays
    that `measure` returned for it."""
    pair, block, bins, distance = frame.pair, frame.inside[0], frame.bins, frame.distance
    bits = np.where(pair, at["influence"], 0)
    values = {
        "nats": at["nats"],
        "influence": bits[pair],
        "weak": at["weak"],
        "moved": at["moved"],
        "pointer": partial_spearman(bits, at["raw"], distance, block),
        "sinkless": partial_spearman(bits, at["sinkless"], distance, block),
        "even": partial_spearman(bits, at["even"], distance, block),
        "everywhere": partial_spearman(bits, at["raw"], distance, pair),
        "even everywhere": partial_spearman(bits, at["even"], distance, pair),
        "pointed": pointed_at(bits, at["raw"], block, bins),
        "leak": at["leak"],
        "far": at["far"] - at["nats"],
        "uniform": at["uniform"] - at["nats"],
    }
    totals = {name: (np.nansum(x), np.isfinite(x).sum()) for name, x in values.items()}
    if len(frame.inside) > 1 + SHIFTS:  # the true pieces are known
        piece = frame.inside[-1]
        usual, outside = (by_bin(bits, bins, BINS, among) for among in (pair, pair & ~piece))
        sums = np.where(outside[:, 1:] < 100, usual, outside)  # near sentences are rarely outside
        usual = ratio(*sums.T)[bins]  # (S, T)
        totals["piece"] = bits[piece].sum(), bits[pair].sum()
        totals["by distance"] = usual[piece].sum(), usual[pair].sum()
    return totals


def pointed_at(bits, mass, block, bins):
    """The influence of the sentence of the block with the largest mass, minus the mean influence of
    others of a block at that distance: in bits, for each token with at least two to choose from.
    bits, mass: (S, T); block: (S, T) booleans; bins: (S, T) integers, the distance."""
    chosen = np.arange(len(bits))[:, None] == np.where(block, mass, -1).argmax(0)  # (S, T)
    usual = ratio(*by_bin(bits, bins, BINS, block & ~chosen).T)
    chosen &= block & (block.sum(0) > 1)
    return bits[chosen] - usual[bins[chosen]]


# --------------------------------------------------------------------------------------------------
# statistics


def values_of(summaries, frames, weights):
    """Every measure of every model: {name: (models, B)}. weights: (B, C), of the contexts.

    boundary: the coefficient of "in the block" in log2(influence + eps) = spline(distance) +
    spline(length) + boundary [in the block] + context. finer: the same with eps / 10. shifted: the
    same for boundaries from elsewhere. true boundary: the same for the true pieces. A value is NaN
    if nothing was measured.
    """
    weights = weights.astype(float)
    gram = np.stack([f.design.T @ f.design for f in frames])  # (C, columns, columns)
    gram = np.tensordot(weights, gram, 1)  # (B, columns, columns)
    kinds, effects = len(frames[0].inside), []
    n = gram.shape[1] - kinds
    for kind in range(kinds):
        columns = [*range(n), n + kind]
        inverse = np.linalg.pinv(gram[:, columns][:, :, columns], hermitian=True)
        row = inverse[:, -1]  # (B, n + 1)
        effects.append([(weights @ s.cross[..., columns] * row).sum(-1) for s in summaries])
    (boundary, *others), (finer, *_) = np.array(effects).transpose(2, 0, 1, 3)  # (models, B) each
    values = {"boundary": boundary, "finer": finer, "shifted": np.mean(others[:SHIFTS], 0)}
    values["above shifted"] = boundary - values["shifted"]
    if kinds > 1 + SHIFTS:
        values["true boundary"] = others[-1]
    for name in summaries[0].sums:
        sums = np.stack([weights @ s.sums[name] for s in summaries])  # (models, B, 2)
        values[name] = ratio(*np.moveaxis(sums, -1, 0))
    return values


def verdict(row, bound):
    """What a comparison says, in words. bound: a smaller difference does not count."""
    if row["seeds"] < 2:
        return "not tested: a single seed"
    low, high, text = row["low"], row["high"], row["text"]
    least, most = sorted((abs(low), abs(high)))
    if (row["holm"] or 1) < 0.05 and low * high > 0:
        words = "higher" if low > 0 else "lower"
        if least < bound:
            words += (", possibly" if most >= bound else ",") + " by less than the bound"
        return words + ("; may differ in another text" if text[0] <= 0 <= text[1] else "")
    same = max(most, *map(abs, text)) < bound
    return "no difference above the bound" if same else "not resolved"


def analyze(subjects, summaries, frames, study):
    """All numbers of the report, a dict. subjects: have a name and a seed each; study: a dict."""
    values = values_of(summaries, frames, np.ones((1, len(frames))))
    values = {name: x[:, 0] for name, x in values.items()}
    resampled, places = values_of(summaries, frames, bootstrap_weights(len(frames))), {}
    for i, s in enumerate(subjects):
        places.setdefault(s.name, {})[s.seed] = i

    def compare(measure, first, second):
        once, again = (
            [{seed: x[measure][i] for seed, i in places[name].items()} for name in (first, second)]
            for x in (values, resampled)
        )
        row = paired(*once, resampled=again)
        return row and {"outcome": measure, "first": first, "second": second, **row}

    first, pairs = study["first"], itertools.product(study["second"], OUTCOMES)
    tests = [{**compare(name, first, second), "bound": study[name]} for second, name in pairs]
    for row, p in zip(tests, holm([row["p"] or 1 for row in tests])):
        row["holm"] = row["p"] and p  # p is None for too many seeds
        row["verdict"] = verdict(row, row["bound"])
    models = []
    for name, seeds in places.items():
        model = {"name": name, "seeds": len(seeds)}
        for measure, x in values.items():
            by_seed = x[list(seeds.values())]
            mean, _, half = mean_interval(by_seed)
            kept = {"mean": mean, "half": half, "by_seed": by_seed.tolist()}
            model[measure] = None if np.isnan(mean) else kept  # nothing was measured
        for key in ("near", "mass"):
            model[key] = sum(getattr(summaries[i], key) for i in seeds.values()).tolist()
        models.append(model)
    pairs = [(first, name) for name in places if name != first]
    pairs += [(name, BASE) for name in places if BASE in places and name not in (first, BASE)]
    rows = [compare(name, *pair) for pair in pairs for name in COMPARED]
    return {"study": study, "tests": tests, "models": models, "comparisons": [*filter(None, rows)]}


# --------------------------------------------------------------------------------------------------
# tables

# the tables of all models: for each measure its heading and the number of digits
COLUMNS = {
    "Boundary effect, in doublings": {
        "boundary": ("boundary effect", 2),
        "shifted": ("of boundaries from elsewhere", 2),
        "above shifted": ("above those", 2),
        "finer": ("with a tenth of eps", 2),
        "weak": ("share of influences below eps", 2),
        "influence": ("influence of a sentence, bits", 4),
        "moved": ("increase if the partition reads the foreign text", 4),
    },
    "Pointer, a correlation": {
        "pointer": ("sentences of the block", 3),
        "sinkless": ("sentences of the block, without token 0", 3),
        "even": ("sentences of the block, uniform last layer", 3),
        "everywhere": ("all sentences", 3),
        "even everywhere": ("all sentences, uniform last layer", 3),
        "pointed": ("extra influence of the top sentence, bits", 4),
    },
    "Leak, and what it costs": {
        "leak": ("leak, bits", 4),
        "far": ("loss added by foreign text before the block, nats", 4),
        "uniform": ("loss added by a uniform last layer, nats", 4),
        "nats": ("loss, nats", 3),
    },
    "The true pieces of the text": {
        "piece": ("share of the influence that stays in the piece", 3),
        "by distance": ("expected from distance only", 3),
        "true boundary": ("boundary effect of the pieces", 2),
    },
}
TESTS = """compared with | outcome | difference [95 % over seeds] | 95 % over the text | p, exact |
p, Holm | bound | verdict"""
NOTE = """± is half the width of the 95 % interval over seeds (Student's t). The seeds share the
base model, the test text and the foreign texts. The interval over the text resamples the contexts
of the test text; there are few contexts, so these intervals are somewhat too narrow.

All models are measured with the same blocks, the open semantic ones, not with their own.
Sentences are those of the text; short ones are joined.

- Boundary effect: 1 means that a sentence in the block has twice the influence (plus eps) of one
  outside that is as far away and as long. A layer with its dial at 1 causes part of it by its mask.
  "From elsewhere": the same model with the semantic blocks of four other places of the text.
- Pointer: Spearman correlation of the last layer's mass on a sentence with the sentence's
  influence, with distance removed, over the sentences of the block. Over all sentences, the zeros
  of a layer at 1 count as pointing, so only models with the same last dial can be compared. Long
  sentences get more mass and have more influence: compare with the uniform layer, which attends
  equally to everything that it may see. Token 0 belongs to no sentence; "without token 0" also
  removes its share of each head's attention. "Extra influence": the sentence of the block with
  the largest mass, minus other sentences of a block that are as far away.
- Leak: how much the outputs depend on which foreign text replaces everything before the block; at
  most log2 of the number of texts. A model that ignores its context has no leak, so read it
  together with the loss.
"""


def report_text(results):
    """The report as Markdown. results: as `analyze` returns them, and a dict `about`."""
    study, models = results["study"], results["models"]
    rows = [
        [row["second"], COMPARED[row["outcome"]], with_interval(row, 3), between(row["text"], 3)]
        + [number(row["p"], ".3g"), number(row["holm"], ".3g"), row["bound"], row["verdict"]]
        for row in results["tests"]
    ]
    text = f"**The {len(rows)} tests**: {study['first']} minus each of these models.\n\n"
    text += markdown(" ".join(TESTS.split()).split(" | "), rows)
    for title, columns in COLUMNS.items():
        if columns.keys() <= models[0].keys():
            rows = [[m["name"], *(cell(m[k], n) for k, (_, n) in columns.items())] for m in models]
            text += f"\n**{title}.**\n\n"
            text += markdown(["model", *(heading for heading, _ in columns.values())], rows)
    text += f"\n{NOTE}\n**Further differences**, uncorrected: [95 % over seeds], p.\n\n"
    rows = {}
    for row in results["comparisons"]:
        name, p = f"{row['first']} minus {row['second']}", row["p"] and f", {row['p']:.2g}"
        rows.setdefault(name, [name]).append(with_interval(row, 3) + (p or ""))
    text += markdown(["models", *COMPARED.values()], rows.values())
    return f"{text}\n{facts(results['about'])}"


def cell(measure, digits):
    """A measure of a model in a table: its mean and the 95 % interval over seeds."""
    return "–" if measure is None else plus_minus(measure["by_seed"], digits, interval=True)


# --------------------------------------------------------------------------------------------------
# figures


def mean_of(sums, least=200):
    """The mean in each bin; NaN if it has fewer than `least` values. sums: (bins, 2)."""
    total, count = np.array(sums).T
    return ratio(total, np.where(count < least, 0, count))


def draw_distance(results, path):
    """Draw influence against distance, inside and outside the block, one panel per model."""
    n = len(results["models"])
    rows = -(-n // 4)
    shape = rows, -(-n // rows)
    size = 3 * shape[1], 2.9 * shape[0] + 0.5
    fig, axes = panels(*shape, *size, sharex=True, sharey=True, squeeze=False)
    distance = 2 ** ((np.arange(BINS) + 0.5) / 2) - 1
    for ax, model in zip(axes.flat, results["models"]):
        lines = zip(model["near"], COLORS, "os", ("in the block", "outside the block"))
        for sums, color, marker, label in lines:
            ax.plot(distance, 2 ** mean_of(sums), marker=marker, ms=4, color=color, label=label)
        name, effect = model["name"].replace(", ", ",\n"), cell(model["boundary"], 2)
        ax.set_title(f"{name}\nboundary effect {effect} doublings", size=9)
        ax.set(xscale="log", yscale="log", xlim=(2, None))
    for ax in axes.flat[n:]:
        ax.axis("off")
    for ax in axes.flat[n - shape[1] : n]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    axes[0, 0].legend(frameon=False, fontsize=9)
    fig.supxlabel("distance: tokens since the end of the sentence")
    fig.supylabel("influence of a sentence on a prediction,\nbits, plus eps (geometric mean)")
    finish(fig, "Do predictions depend on the block, or on what is near?", path)


def draw_pointers(results, path):
    """Draw influence, relative to its usual value at that distance, by the last layer's mass."""
    fig, axes = panels(1, 2, 11, 5.2, sharex=True, sharey=True)
    study = results["study"]
    tested = [study["first"], *study["second"]]  # highlighted
    colors = dict(zip(tested, [COLORS[1], COLORS[0], *COLORS[2:]]))
    at, shown = [MASSES[0] / 2, *MASSES[:-1] * 2**0.5], []  # the middle of each bin
    titles = "all sentences before a token", "sentences of its block"
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
    for panel, (ax, title) in enumerate(zip(axes, titles)):
        for i, model in enumerate(results["models"]):
            y = 2 ** mean_of(model["mass"][panel])[: len(at)]
            shown.append(y)
            color = colors.get(model["name"])
            lines = {"lw": 2, "zorder": 3} if color else {"lw": 1, "zorder": 1}
            lines |= {"color": color or "#a0a0a0", "marker": "os^vDP*X"[i % 8], "ms": 5}
            ax.plot(at[1:], y[1:], label=model["name"], **lines)
            ax.plot(at[0], y[0], **lines)
        ax.axhline(1, color="#888888", lw=1, zorder=0)
        ax.set(xscale="log", yscale="log", title=title)
        ax.set_xlabel("attention of the last layer to a sentence (mass)")
        ax.set_xticks([at[0], 1e-3, 1e-2, 1e-1, 1], ["less", "0.001", "0.01", "0.1", "1"])
        ax.set_yticks(ticks, ticks)
        ax.minorticks_off()
    axes[0].set_ylim(min(0.45, 0.9 * np.nanmin(shown)), max(2.2, 1.1 * np.nanmax(shown)))
    axes[0].set_ylabel("influence of that sentence, as a multiple\nof the usual at its distance")
    labels = axes[0].get_legend_handles_labels()
    fig.legend(*labels, frameon=False, loc="outside lower center", ncols=4)
    finish(fig, "Where the last layer looks: does the prediction depend on it?", path)
