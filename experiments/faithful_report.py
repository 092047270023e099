"""What faithfulness.py makes of what it measured: three outcomes, statistics, tables, figures."""

from typing import NamedTuple

import numpy as np

from experiments.faithful_measure import SHIFTS
from support.plots import COLOURS, bare, pyplot, save_figure
from support.report import holm, interval, sign_flip_p

OUTCOMES = {"boundary": "doublings", "pointer": "correlation", "leak": "bits a token"}
LEAST = 4  # sentences before a token, to correlate anything over them
DRAWN = 2000  # times that the contexts are drawn anew
MASSES = 2.0 ** np.arange(-12, 1)  # the edges of bins of attention mass

# --------------------------------------------------------------------------------------------------
# the contexts


class Frame(NamedTuple):
    """What of a context does not depend on the model. A pair is a sentence and a later token."""

    pair: np.ndarray  # (S, T) booleans: the sentence ends before the token
    bins: np.ndarray  # (S, T) integers: half octaves of the distance
    distance: np.ndarray  # (S, T) tokens from the end of the sentence
    inside: list  # of (S, T) booleans, for each of context.blocks: the sentence is in the block
    design: np.ndarray  # (pairs, columns): splines of distance and length; then `inside`


def frames_of(contexts):
    """The Frames of some Contexts, a list."""
    raw = []
    for context in contexts:
        begin, end = np.array(context.sentences).T[..., None]  # (S, 1) each
        distance = np.arange(len(context.tokens) - 1) - end  # (S, T)
        pair = distance >= 0
        # a boundary from elsewhere may cut a sentence: then its middle decides
        inside = [pair & ((begin + end) / 2 >= start) for start in context.blocks]
        raw.append((pair, distance, np.broadcast_to(end - begin, pair.shape), inside))
    far = [np.log2(1 + distance[pair]) for pair, distance, _, _ in raw]
    long = [np.log2(length[pair]) for pair, _, length, _ in raw]
    knots = [np.percentile(np.concatenate(far), (5, 27.5, 50, 72.5, 95))]
    knots.append(np.percentile(np.concatenate(long), (10, 50, 90)))
    frames = []
    for (pair, distance, _, inside), x, z in zip(raw, far, long):
        columns = [*spline(x, knots[0]), *spline(z, knots[1]), *(some[pair] for some in inside)]
        design = np.stack(columns, 1).astype(float)
        bins = (2 * np.log2(1 + np.maximum(distance, 0))).astype(int)
        frames.append(Frame(pair, bins, distance, inside, design - design.mean(0)))
    return frames


def spline(x, knots):
    """A cubic spline of x that is a line beyond the knots: its columns, without the constant."""
    knots, columns = np.unique(knots), [x]
    for k in knots[:-2]:
        last, before = knots[-1], knots[-2]
        bend, *ends = [np.maximum(x - at, 0) ** 3 for at in (k, before, last)]
        bend = bend - (ends[0] * (last - k) - ends[1] * (before - k)) / (last - before)
        columns.append(bend / (last - knots[0]) ** 2)
    return columns


def ranks(x, among):
    """The rank of each value in its column, ties shared. x: (S, T); among: booleans, who counts."""
    below = (x[None] < x[:, None]) & among[None]  # (S, S, T)
    same = (x[None] == x[:, None]) & among[None]
    return below.sum(1) + (same.sum(1) + 1) / 2


def partial_spearman(a, b, c, among):
    """Spearman's correlation of a and b over each column, with c removed: (T,).

    a, b, c: (S, T); among: (S, T) booleans, the rows that count. 0 where a or b says nothing more
    than c does; NaN where fewer than LEAST count.
    """
    n, centred = among.sum(0), []
    for x in (a, b, c):
        r = np.where(among, ranks(x, among), 0)
        centred.append(np.where(among, r - r.sum(0) / np.maximum(n, 1), 0))

    def correlation(x, y):
        size = np.sqrt((x**2).sum(0) * (y**2).sum(0))
        return np.divide((x * y).sum(0), size, out=np.zeros(len(n)), where=size > 0)

    ab, ac, bc = (correlation(centred[i], centred[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    left = (1 - ac**2) * (1 - bc**2)
    partial = np.divide(
        ab - ac * bc, np.sqrt(np.maximum(left, 0)), out=np.zeros(len(n)), where=left > 1e-9
    )
    return np.where(n >= LEAST, partial, np.nan)


# --------------------------------------------------------------------------------------------------
# the outcomes of one model


class Summary(NamedTuple):
    """What is left of a model's measurements: sums over each of C contexts."""

    cross: np.ndarray  # (2, C, columns): of Frame.design and log2(influence + eps), or + eps / 10
    sums: dict  # {measure: (C, 2)}: its sum, and over how many
    near: np.ndarray  # (2, bins, 2) inside and outside the block: sums by distance, and how many
    mass: np.ndarray  # (2, bins, 2) of all pairs and of those inside: by mass, see `by_mass`


def summarise(found, frames, eps):
    """The Summary of a model. found: as `read_measured` gives it; eps: bits."""
    cross, sums, near, mass = [], {}, 0.0, 0.0
    for c, frame in enumerate(frames):
        at = {name.split(".")[0]: x for name, x in found.items() if name.endswith(f".{c}")}
        at = {name: x.astype(float) for name, x in at.items()}
        y, finer = (np.log2(at["influence"] + e)[frame.pair] for e in (eps, eps / 10))  # (pairs,)
        cross.append([frame.design.T @ (some - some.mean()) for some in (y, finer)])
        at["weak"] = at["influence"][frame.pair] < eps
        for name, (total, n) in means_of(at, frame).items():
            sums.setdefault(name, []).append((total, n))
        bins, inside = frame.bins[frame.pair], frame.inside[0][frame.pair]
        near = near + np.stack([by_bin(y, bins, 64, some) for some in (inside, ~inside)])
        some = np.ones_like(inside), inside
        mass = mass + np.stack([by_mass(y, at["raw"][frame.pair], bins, among) for among in some])
    cross = np.array(cross).swapaxes(0, 1)
    return Summary(cross, {k: np.array(v) for k, v in sums.items()}, near, mass)


def by_bin(values, bins, n, among=slice(None)):
    """(n, 2): in each bin, the sum of the values and how many they are."""
    values, bins = values[among], bins[among]
    return np.stack([np.bincount(bins, values, n), np.bincount(bins, minlength=n)], 1)[:n]


def by_mass(y, mass, bins, among):
    """(bins, 2): in each bin of mass, the sum of y, less its mean at the same distance; how many.

    y, mass, bins (of the distance), among (booleans): (pairs,).
    """
    usual = by_bin(y, bins, 64, among)
    rest = y - (usual[:, 0] / np.maximum(usual[:, 1], 1))[bins]
    return by_bin(rest, np.searchsorted(MASSES, mass, side="right"), len(MASSES) + 1, among)


def means_of(at, frame):
    """Measures of a context that are means: {name: (sum, over how many)}.

    at: what `measure` found there, a dict of arrays.
    """
    bits, block = np.where(frame.pair, at["influence"], 0), frame.inside[0]
    values = {
        "nats": at["nats"],
        "influence": bits[frame.pair],
        "weak": at["weak"],
        "moved": at["moved"],
        "pointer": partial_spearman(bits, at["raw"], frame.distance, frame.pair),
        "weighted": partial_spearman(bits, at["weighted"], frame.distance, frame.pair),
        "even": partial_spearman(bits, at["even"], frame.distance, frame.pair),
        "inside": partial_spearman(bits, at["raw"], frame.distance, block),
        "even inside": partial_spearman(bits, at["even"], frame.distance, block),
        "pointed": pointed_at(bits, at["raw"], block, frame.bins),
        "leak": at["leak"],
        "far": at["far"] - at["nats"],
        "uniform": at["uniform"] - at["nats"],
    }
    found = {name: (np.nansum(x), np.isfinite(x).sum()) for name, x in values.items()}
    if len(frame.inside) > 1 + SHIFTS:  # the true pieces are known
        piece = frame.inside[-1]
        usual, out = (
            by_bin(bits, frame.bins, 64, among) for among in (frame.pair, frame.pair & ~piece)
        )
        sums = np.where(out[:, 1:] < 100, usual, out)  # near ones are hardly ever outside
        usual = (sums[:, 0] / np.maximum(sums[:, 1], 1))[frame.bins]  # (S, T)
        expected = usual[piece].sum(), usual[frame.pair].sum()
        found |= {"piece": (bits[piece].sum(), bits[frame.pair].sum()), "by distance": expected}
    return found


def pointed_at(bits, mass, block, bins):
    """How much more a token depends on the sentence of its block with the largest mass than on
    others of a block at the same distance: bits, one for each token that has two to choose from.

    bits, mass: (S, T); block: (S, T) booleans; bins: (S, T) integers, the distance.
    """
    chosen = np.arange(len(bits))[:, None] == np.where(block, mass, -1).argmax(0)  # (S, T)
    others = by_bin(bits, bins, 64, block & ~chosen)
    usual = np.divide(*others.T, out=np.full(64, np.nan), where=others[:, 1] > 0)
    chosen &= block & (block.sum(0) > 1)
    return bits[chosen] - usual[bins[chosen]]


# --------------------------------------------------------------------------------------------------
# statistics


def values_of(summaries, frames, weights):
    """Every measure of every model: {name: (models, B)}. weights: (B, C), of the contexts.

    boundary: the coefficient of "in the block" in log2(influence + eps) = spline(distance) +
    spline(length) + boundary [in the block] + context. finer: the same with eps / 10; shifted: of
    boundaries from elsewhere; true boundary: of the true pieces. NaN where nothing was measured.
    """
    gram = np.stack([f.design.T @ f.design for f in frames])  # (C, columns, columns)
    gram = np.tensordot(weights, gram, 1)  # (B, columns, columns)
    kinds = len(frames[0].inside)
    n, effects = gram.shape[1] - kinds, []
    for kind in range(kinds):
        use = [*range(n), n + kind]
        row = np.linalg.pinv(gram[:, use][:, :, use], hermitian=True)[:, -1]  # (B, n + 1)
        effects.append([(weights @ s.cross[..., use] * row).sum(-1) for s in summaries])
    effects = np.array(effects).transpose(2, 0, 1, 3)  # (2, kinds, models, B)
    found = {"boundary": effects[0, 0], "finer": effects[1, 0]}
    found["shifted"] = effects[0, 1 : 1 + SHIFTS].mean(0)
    found["above shifted"] = found["boundary"] - found["shifted"]
    if kinds > 1 + SHIFTS:
        found["true boundary"] = effects[0, -1]
    for name in summaries[0].sums:
        sums = np.stack([weights @ s.sums[name] for s in summaries])  # (models, B, 2)
        found[name] = np.divide(
            *np.moveaxis(sums, -1, 0), where=sums[..., 1] > 0, out=np.full(sums.shape[:-1], np.nan)
        )
    return found


def compare(values, drawn, places, first, second):
    """The difference of a measure between two models, paired by seed: a dict.

    values: (models,); drawn: (models, DRAWN), the same with the contexts drawn anew; places: {name:
    {seed: number of the model}}. low, high: 95 % over seeds, by Student; text: 95 % if there had
    been other contexts like these; p: exact, as `sign_flip_p` has it.
    """
    seeds = sorted(places[first].keys() & places[second].keys())
    a, b = ([places[name][seed] for seed in seeds] for name in (first, second))
    mean, _, half = interval(values[a] - values[b])
    mean, half = float(mean), None if half is None else float(half)
    text = np.percentile((drawn[a] - drawn[b]).mean(0), (2.5, 97.5)).tolist()
    row = {"first": first, "second": second, "seeds": len(seeds), "difference": mean}
    row |= {"low": None if half is None else mean - half, "text": text}
    row |= {"high": None if half is None else mean + half}
    return {**row, "p": sign_flip_p(values[a] - values[b])}


def verdict(row, bound):
    """What a comparison says, in words. bound: a smaller difference is none."""
    if row["seeds"] < 2:
        return "one seed tells nothing"
    ends, text = (row["low"], row["high"]), row["text"]
    small = max(map(abs, ends)) < bound
    if row["holm"] is not None and row["holm"] < 0.05 and min(ends) * max(ends) > 0:
        said = "higher" if min(ends) > 0 else "lower"
        if small:
            said += ", by less than counts"
        elif min(map(abs, ends)) < bound:
            said += ", perhaps by less than counts"
        return said + ("; another text may differ" if min(text) <= 0 <= max(text) else "")
    same = small and max(map(abs, text)) < bound
    return "no difference that counts" if same else "not resolved"


def analyse(subjects, summaries, frames, study):
    """All numbers of the report, a dict. subjects: with a name and a seed each; study: a dict."""
    ones = np.ones((1, len(frames)))
    again = np.random.default_rng(0).multinomial(len(frames), ones[0] / len(frames), DRAWN)
    values, drawn = (values_of(summaries, frames, w.astype(float)) for w in (ones, again))
    values, places = {name: x[:, 0] for name, x in values.items()}, {}
    for i, subject in enumerate(subjects):
        places.setdefault(subject.name, {})[subject.seed] = i
    first, second, tests = study["first"], study["second"], []
    for name in OUTCOMES:
        row = compare(values[name], drawn[name], places, first, second)
        tests.append({"outcome": name, "bound": study[name], **row})
    ps = [1 if row["p"] is None else row["p"] for row in tests]
    for row, p in zip(tests, holm(ps)):
        row |= {"holm": None if row["p"] is None else p}
        row["verdict"] = verdict(row, row["bound"])
    models = []
    for name, seeds in places.items():
        row = {"name": name, "seeds": len(seeds)}
        for measure, x in values.items():
            some = x[list(seeds.values())]
            if np.isnan(some).any():  # distributed has no blocks to find again
                row[measure] = None
                continue
            mean, _, half = interval(some)
            row[measure] = {"mean": float(mean), "half": half, "by_seed": some.tolist()}
        some = [summaries[i] for i in seeds.values()]
        row["near"], row["mass"] = (
            sum(s.near for s in some).tolist(),
            sum(s.mass for s in some).tolist(),
        )
        models.append(row)
    pairs = [(name, second) for name in places if name != second]
    pairs += [(first, name) for name in places if name not in (first, second)]
    rows = []
    for a, b in pairs:
        for name in (*OUTCOMES, "above shifted", "inside"):
            if places[a].keys() & places[b].keys():
                rows.append({"outcome": name, **compare(values[name], drawn[name], places, a, b)})
    return {"study": study, "tests": tests, "models": models, "comparisons": rows}


# --------------------------------------------------------------------------------------------------
# the report

# the tables of all models: of each measure its heading, and how many digits
COLUMNS = {
    "Boundary effect, in doublings": {
        "boundary": ("boundary effect", 2),
        "shifted": ("of boundaries from elsewhere", 2),
        "above shifted": ("above those", 2),
        "finer": ("with a tenth of eps", 2),
        "weak": ("share of influences below eps", 2),
        "influence": ("influence of a sentence, bits", 4),
        "moved": ("more if the blocks are found again", 4),
    },
    "Pointer, a correlation": {
        "pointer": ("all sentences", 3),
        "weighted": ("the same, weighted by values", 3),
        "even": ("the same, uniform last layer", 3),
        "inside": ("sentences of the block", 3),
        "even inside": ("the same, uniform last layer", 3),
        "pointed": ("pointed at: bits more", 4),
    },
    "Leak, and what it costs": {
        "leak": ("leak, bits", 4),
        "far": ("loss added by foreign text before the block, nats", 4),
        "uniform": ("loss added by a uniform last layer, nats", 4),
        "nats": ("loss, nats", 3),
    },
    "The true pieces of the text": {
        "piece": ("share of the influence that stays in the piece", 3),
        "by distance": ("expected if only distance counted", 3),
        "true boundary": ("boundary effect of the pieces", 2),
    },
}
NOTE = """± is half the width of the 95 % interval over seeds (Student). The seeds share the base,
the test text and the foreign texts. Over the text: the contexts of the test text drawn anew; they
are few, so these intervals are somewhat too narrow.

All models are asked about the same blocks, the open semantic ones, and not about their own. A
sentence is one of the text; short ones are joined.

- Boundary effect: 1 means twice the influence (plus eps) of a sentence outside, as far away and as
  long. A layer at 1 makes some of it by its mask alone. From elsewhere: the same model, with the
  semantic blocks of four other places of the text. Blocks found again: the partitioner reads the
  foreign text too.
- Pointer: Spearman correlation of the last layer's mass on a sentence with its influence, the
  distance removed. Over all sentences, the zeros of a layer at 1 count as pointing: only models of
  the same dial can be compared. Long sentences get more of both: compare with the uniform layer,
  which looks at all it may see alike. Pointed at: the influence of the sentence of the block with
  the largest mass, less that of other sentences of a block, as far away.
- Leak: how much the outputs differ when all before the block is replaced by one foreign text or
  another; at most log2 of their number. A model that ignores its context has none: see the loss.
"""


def tell(row, digits=3):
    """A difference with its interval, in words."""
    if row["low"] is None:
        return f"{row['difference']:.{digits}f}"
    return f"{row['difference']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def show(value, digits):
    """A mean with its interval, as `analyse` has it, in words."""
    if value is None:
        return "–"
    half = "" if value["half"] is None else f" ± {value['half']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def tables(results):
    """The report as Markdown. results: as `analyse` gives it, and `about`."""

    def table(heads, rows):
        rows = [heads, ["---"] * len(heads), *rows]
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"

    rows = []
    for row in results["tests"]:
        unit, (low, high) = OUTCOMES[row["outcome"]], row["text"]
        cells = [f"{row['outcome']}, {unit}", tell(row), f"{low:.3f} … {high:.3f}"]
        cells += ["–" if row[p] is None else f"{row[p]:.3g}" for p in ("p", "holm")]
        rows.append([*cells, row["bound"], row["verdict"]])
    heads = "outcome | difference [95 % over seeds] | 95 % over the text | p, exact | p, Holm"
    heads += " | smaller is none | so it is"
    study = results["study"]
    first = f"**The three tests**: {study['first']} less {study['second']}.\n\n"
    text = first + table(heads.split(" | "), rows)
    for title, columns in COLUMNS.items():
        shown = {name: head for name, head in columns.items() if name in results["models"][0]}
        rows = []
        for model in results["models"]:
            cells = [show(model[name], digits) for name, (_, digits) in shown.items()]
            rows.append([model["name"], *cells])
        heads = [head for head, _ in shown.values()]
        text += f"\n**{title}.**\n\n" + table(["model", *heads], rows) if shown else ""
    text += f"\n{NOTE}"
    pairs = {}
    for row in results["comparisons"]:
        pairs.setdefault((row["first"], row["second"], row["seeds"]), {})[row["outcome"]] = row
    text += "\n**Further differences**, without correction: [95 % over seeds], p.\n\n"
    rows = []
    for (a, b, _), found in pairs.items():
        row = [f"{a} less {b}"]
        for name in found:
            p = found[name]["p"]
            row.append(tell(found[name]) + ("" if p is None else f", {p:.2g}"))
        rows.append(row)
    units = {**OUTCOMES, "above shifted": "doublings", "inside": "correlation"}
    names = {
        "above shifted": "boundary above those from elsewhere",
        "inside": "pointer in the block",
    }
    heads = ["models", *(f"{names.get(name, name)}, {units[name]}" for name in found)]
    text += table(heads, rows)
    return text + "\n" + "; ".join(f"{k} {v}" for k, v in results["about"].items()) + "\n"


# --------------------------------------------------------------------------------------------------
# figures


def grid(n):
    """A figure of n axes with shared scales, and the axes."""
    wide = min(4, n)
    size = (3 * wide, 2.9 * -(-n // wide) + 0.5)
    fig, axes = pyplot().subplots(
        -(-n // wide),
        wide,
        figsize=size,
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[n:]:
        ax.axis("off")
    return fig, axes.flat


def mean_of(sums, least=200):
    """The mean in each bin, where there are enough. sums: (bins, 2). NaN elsewhere."""
    sums = np.asarray(sums)
    return np.divide(*sums.T, out=np.full(len(sums), np.nan), where=sums[:, 1] >= least)


def draw_distance(results, path):
    """Influence against distance, inside and outside the block, one panel for each model."""
    fig, axes = grid(len(results["models"]))
    for ax, model in zip(axes, results["models"]):
        for sums, colour, marker, label in zip(
            model["near"], COLOURS, "os", ("in the block", "outside of it")
        ):
            distance = 2 ** ((np.arange(64) + 0.5) / 2) - 1
            ax.plot(distance, 2 ** mean_of(sums), marker=marker, ms=4, color=colour, label=label)
        effect = model["boundary"]
        half = "" if effect["half"] is None else f" ± {effect['half']:.2f}"
        name = model["name"].replace(", ", ",\n")
        ax.set_title(f"{name}\nboundary effect {effect['mean']:.2f}{half} doublings", size=9)
        ax.set(xscale="log", yscale="log", xlim=(2, None))
    axes[0].legend(frameon=False, fontsize=9)
    fig.supxlabel("distance: tokens since the sentence ended")
    fig.supylabel("influence of a sentence on a prediction,\nbits, plus eps (geometric mean)")
    fig.suptitle("Do predictions depend on the block, or on what is near?")
    bare(fig)
    save_figure(fig, path)


def draw_pointers(results, path):
    """Influence by the last layer's mass on a sentence, against sentences at the same distance."""
    fig, axes = pyplot().subplots(
        1, 2, figsize=(11, 5.2), sharex=True, sharey=True, layout="constrained"
    )
    at, shown = [MASSES[0] / 2, *MASSES[:-1] * 2**0.5], []  # the middle of each bin
    for panel, (ax, title) in enumerate(
        zip(axes, ("all sentences before a token", "sentences of its block"))
    ):
        for number, model in enumerate(results["models"]):
            y = 2 ** mean_of(model["mass"][panel])[: len(at)]
            shown.append(y)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "os^vDP*X"[number % 8]}
            ax.plot(at[1:], y[1:], ms=5, lw=1.2, label=model["name"], **style)
            ax.plot(at[0], y[0], ms=5, **style)
        ax.axhline(1, color="#888888", lw=1, zorder=0)
        ax.set(
            xscale="log",
            yscale="log",
            title=title,
            xlabel="attention of the last layer on a sentence (mass)",
        )
        ax.set_xticks([at[0], 1e-3, 1e-2, 1e-1, 1], ["less", "0.001", "0.01", "0.1", "1"])
        ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
        ax.set_yticks(ticks, ticks)
        ax.minorticks_off()
    axes[0].set_ylim(min(0.45, 0.9 * np.nanmin(shown)), max(2.2, 1.1 * np.nanmax(shown)))
    axes[0].set_ylabel(
        "influence of that sentence, as a multiple\nof what is usual at its distance"
    )
    fig.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4
    )
    fig.suptitle("Where the last layer looks: does the prediction depend on it?")
    bare(fig)
    save_figure(fig, path)
