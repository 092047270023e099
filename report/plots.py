"""All figures. Most colors are Okabe & Ito's, for color-blind readers; markers help in print."""

import io
import logging
import math
import os
import warnings
from typing import NamedTuple

import numpy as np

from report.blocks import block_starts, join_attention, join_words
from support.files import InputError, replacing, visible

# color and marker of each schedule, in the order in which they are shown
STYLES = {
    name: (color, marker)
    for name, color, marker in zip(
        "distributed localist linear quadratic cubic quartic quintic reversed".split()
        + "late_half early_half interleaved:2 interleaved:2:local".split(),
        "#000000 #d55e00 #e69f00 #56b4e9 #009e73 #0072b2 #cc79a7 #888888".split()
        + "#8c4a9e #b8a0c8 #5c7a29 #a9c46c".split(),
        "os^vDP*Xpd<>",
    )
}
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #888888".split()
EDGE = SET = "#d55e00"  # where blocks begin; values that were set
MEASURED = "#0072b2"  # values that were measured
GREY = "#888888"
BLOCK_COLORS = "#0072b2 #b34a00 #007a55 #a3487a".split()  # of words, darker than COLORS
SIDE_LEGEND = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1, 1)}
FIDELITY = "fidelity, mean over layers: attention inside the block"
RATIO = "perplexity relative to distributed"
# partitions that pass nothing on from block to block (document: if max_lookback does not cut it)
CLOSED = "semantic:closed", "sentence", "block", "aligned", "document"
MOST_UNLIKE = "distributed", "quintic", "localist", "reversed"  # schedules
LEAST_SPAN = 1.02  # of an axis of ratios, so that noise does not look like a finding


def style(schedule):
    """(color, marker) of a schedule, known or not."""
    return STYLES.get(schedule, ("#a6761d", "h"))


def order(schedule):
    """The position of a schedule among the others, an integer; unknown ones come last."""
    return [*STYLES, schedule].index(schedule)


def layer_mean(results, key):
    """The mean over layers of a measure in the results of `evaluate`."""
    return float(np.mean([layer[key] for layer in results["layers"]]))


def pyplot():
    """matplotlib.pyplot, imported when the first figure is drawn. Raises InputError."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would log its font cache
    os.environ["MPLBACKEND"] = "Agg"  # a notebook sets one that is only there in the notebook
    try:
        from matplotlib import pyplot as plt
    except ImportError as e:  # it is missing, or there is too little memory to map it
        raise InputError(f"no figure was drawn: matplotlib could not be loaded ({e})") from None
    return plt


def panels(rows, columns, width, height, **options):
    """A figure of width x height inches, and its axes (an array if there are several)."""
    size = {"figsize": (width, height), "layout": "constrained"}
    return pyplot().subplots(rows, columns, **size, **options)


def check_suffix(path):
    """Raises InputError unless the path of a figure ends in .png, .svg or .pdf."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: the name of a figure must end in .png, .svg or .pdf")


def save_figure(fig, *paths):
    """Save a figure at each path, completely or not at all, and close it. Raises InputError."""
    try:
        for path in paths:
            drawn = io.BytesIO()  # if the disk is full, matplotlib would raise errors of its own
            with warnings.catch_warnings():
                # a character that the font lacks is drawn as a box
                warnings.filterwarnings("ignore", "Glyph .* missing from font")
                fig.savefig(drawn, dpi=130, format=path.suffix[1:])
            with replacing(path) as temporary:
                temporary.write_bytes(drawn.getvalue())
    finally:
        pyplot().close(fig)


def bare(fig):
    """Hide the upper and the right spine of every axis that shows no image."""
    for ax in fig.axes:
        if not ax.images:
            ax.spines[["top", "right"]].set_visible(False)


def finish(fig, title, *paths):
    """Give a figure its title, save it at each path, and close it. Raises InputError."""
    bare(fig)
    fig.suptitle(visible(title), parse_math=False)
    for legend in fig.findobj(lambda artist: hasattr(artist, "get_texts")):
        for text in legend.get_texts():
            text.set(text=visible(text.get_text()), parse_math=False)  # $ is no formula in a name
    save_figure(fig, *paths)


def ratio_axis(ax, axis, values):
    """Make the "x" or "y" axis of a panel logarithmic for these ratios. It includes 1, and spans at
    least LEAST_SPAN."""
    logs = np.log(np.clip([1.0, *values], 1e-90, 1e90))  # exp(700) is a ratio, too
    span = np.ptp(logs)
    margin = max(0.06 * span, (math.log(LEAST_SPAN) - span) / 2)
    low, high = np.exp([logs.min() - margin, logs.max() + margin])
    plt = pyplot()
    if high < 3 * low:
        locator = plt.MaxNLocator(6, steps=[1, 2, 5, 10])
    else:
        locator = plt.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=8)
    ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    ax.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
    ax.minorticks_off()
    ax.set(**{f"{axis}ticks": ticks, f"{axis}ticklabels": [f"{tick:g}" for tick in ticks]})


def draw_rows(ax, names, ratios, intervals, looks):
    """Draw a row for each name, from the top: a ratio and its interval.

    intervals: (low, high), or None for each. looks: (color, marker) for each.
    """
    for y, (ratio, ends, (color, marker)) in enumerate(zip(ratios, intervals, looks)):
        low, high = ends or (ratio, ratio)
        ax.plot([low, high], [y, y], "-|", color=color, lw=2, ms=7, alpha=0.6)
        ax.plot(ratio, y, marker, color=color, ms=7)
    ax.axvline(1, color="black", lw=0.8, zorder=0)
    ax.grid(axis="y", color="#eeeeee")
    ax.set_axisbelow(True)
    ax.set_yticks(range(len(names)), map(visible, names), parse_math=False)
    ax.set_ylim(len(names) - 0.4, -0.6)


def spread(ratios, intervals):
    """All numbers that an axis has to show: the ratios and the ends of their intervals."""
    return [*ratios, *(end for ends in intervals if ends for end in ends)]


# --------------------------------------------------------------------------------------------------
# one model


class Stretch(NamedTuple):
    """T tokens of a text, and the attention of the last layer there."""

    pieces: list  # the bytes of each token
    lookback: np.ndarray  # (T,) integers, clamped
    block: np.ndarray  # (T, T) booleans: which keys are in the block of each query
    maps: list  # two (T, T) attention weights, mean over heads: with the dial at 0 and at 1


def draw_attention(stretch, at_zero, own, layers, path, title):
    """Draw the attention of the last layer in a Stretch, and the measures of all layers.

    at_zero, own: the fidelity and entropy of each layer in the stretch, a dict, with every dial at
    0 and at that of the model. layers: the measures in the whole text, as `evaluate` returns them.
    """
    fig, axes = panels(2, 2, 11.5, 9.6, height_ratios=(1.9, 1))
    pieces, lookback, block, maps = stretch
    T, first = len(pieces), join_words(pieces)
    last = np.append(first[1:], T) - 1
    words = [b"".join(pieces[a : b + 1]).decode(errors="replace") for a, b in zip(first, last)]
    block_of = np.searchsorted(block_starts(lookback), last, side="right")
    colors = [BLOCK_COLORS[i % len(BLOCK_COLORS)] for i in block_of]
    # where each token is, and where the block of each query begins, in groups of words
    at = np.interp(np.arange(T + 1), [*first, T], np.arange(len(first) + 1)) - 0.5
    edge = at[np.append(np.arange(T) - lookback, T - 1 - lookback[-1])]
    shown = [join_attention(a, first) for a in maps]
    norm = pyplot().matplotlib.colors.PowerNorm(0.4, 0, max(a.max() for a in shown))
    for dial, (ax, a, weights) in enumerate(zip(axes[0], shown, maps)):
        hidden = ax.fill_betweenx(at, -0.5, edge, step="post", label="not visible at dial 1")
        hidden.set(facecolor="#f2f2f2", edgecolor="#c0c0c0", hatch="///", lw=0, zorder=0)
        image = ax.imshow(np.where(a > 0, a, np.nan), cmap="Blues", norm=norm, zorder=1)
        ax.step(edge, at, where="pre", color=EDGE, lw=1.6, label="start of the query's block")
        outside = 100 * (weights * ~block).sum() / T
        ax.set_title(f"layer {len(layers)}, dial at {dial}: {outside:.0f}% outside the block")
        name_words(ax, words, colors)
    axes[0, 0].set_ylabel("from (query)")
    axes[0, 1].legend(loc="upper right", frameon=False)
    fig.colorbar(image, ax=axes[0], label="attention from words to words", shrink=0.8)
    draw_measures(*axes[1], at_zero, own, layers)
    finish(fig, title, path)


def name_words(ax, words, colors):
    """Write a word, in its color, at each row and column of an image."""
    words = [visible(" ".join(word.split())) or "␣" for word in words]
    words = [word if len(word) < 16 else word[:14] + "…" for word in words]
    font = {"fontsize": min(8, 320 / len(words)), "parse_math": False}
    ax.set_xticks(range(len(words)), words, rotation=90, **font)
    ax.set_yticks(range(len(words)), words, **font)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        for label, color in zip(labels, colors):
            label.set_color(color)
    ax.tick_params(length=0)
    ax.set(xlabel="to (key)", xlim=(-0.5, len(words) - 0.5), ylim=(len(words) - 0.5, -0.5))


def draw_measures(left, right, at_zero, own, layers):
    """Draw the fidelity of every layer, and on the right its entropy. For the lists, see
    `draw_attention`."""
    x = np.arange(1, len(layers) + 1)
    floor = [layer["locality"] for layer in layers]
    left.fill_between(x, floor, color=SET, alpha=0.15, lw=0)
    left.plot(x, floor, "--", color=SET, label="certified floor: the dial of the layer")
    for ax, key in ((left, "fidelity"), (right, "entropy")):
        zero, mine, all_ = ([layer[key] for layer in side] for side in (at_zero, own, layers))
        ax.plot(x, mine, "o-", color=MEASURED, label="these words")
        ax.plot(x, zero, "s:", color=GREY, label="these words, every dial at 0")
        ax.plot(x, all_, "D", color=MEASURED, mfc="none", label="all of the text")
        ax.set(xlabel="layer", xticks=x)
        ax.set_ylim(0, 1.1 * max(1, *mine, *zero, *all_) if key == "entropy" else 1.04)
    left.set_title("fidelity: attention that stays in the block")
    right.set_title("entropy of the attention, bits")
    right.legend(*left.get_legend_handles_labels(), frameon=False, loc="lower left", fontsize=9)


def draw_dials(rows, path, title):
    """Draw what each dial costs in perplexity, and how local it is: a row for each schedule, or a
    curve if there are several floors. rows: as `eval.dial_sweep` returns them."""
    floors = {row["floor"] for row in rows if row["schedule"] != "distributed"}
    fig = draw_floors(rows) if len(floors) > 1 else draw_floor(rows)
    finish(fig, title, path)


def draw_floor(rows):
    """Draw the cost of each schedule, the cheapest at the top, beside its mean locality."""
    rows = sorted(rows, key=lambda row: row["ratio"])
    size = 9, 1.6 + 0.36 * len(rows)
    fig, (left, right) = panels(1, 2, *size, sharey=True, width_ratios=(2, 1))
    ratios, intervals = ([row[key] for row in rows] for key in ("ratio", "text"))
    looks = [style(row["schedule"]) for row in rows]
    draw_rows(left, [row["schedule"] for row in rows], ratios, intervals, looks)
    ratio_axis(left, "x", spread(ratios, intervals))
    left.set_xlabel(f"{RATIO}, 95 % interval over the text")
    for y, (row, (color, _)) in enumerate(zip(rows, looks)):
        locality = layer_mean(row, "locality")
        right.barh(y, locality, 0.5, color=color, alpha=0.5)
        right.text(locality + 0.02, y, f"{locality:.2f}", va="center", size=9)
    floor = max((row["floor"] for row in rows if row["schedule"] != "distributed"), default=1)
    label = f"locality, mean over layers\n(floor {floor:g})"
    right.set(xlabel=label, xlim=(0, 1.2), xticks=[0, 0.5, 1])
    right.tick_params(axis="y", length=0)
    return fig


def draw_floors(rows):
    """Draw the cost of each schedule at several floors, against its mean locality and against the
    fidelity it gives."""
    fig, axes = panels(1, 2, 11, 5, sharey=True)
    rows = sorted(rows, key=lambda row: row["floor"])
    labels = {"locality": "locality, mean over layers: the dial that is set", "fidelity": FIDELITY}
    for ax, key in zip(axes, labels):
        for name in sorted(dict.fromkeys(row["schedule"] for row in rows), key=order):
            (color, marker), line = style(name), "--" if name == "reversed" else "-"
            # every curve begins at dial 0
            curve = [row for row in rows if row["schedule"] == "distributed"]
            curve += [row for row in rows if row["schedule"] == name != "distributed"]
            x, y = [layer_mean(row, key) for row in curve], [row["ratio"] for row in curve]
            ends = [row["text"] or (row["ratio"], row["ratio"]) for row in curve]
            ax.vlines(x, *zip(*ends), color=color, alpha=0.6)
            ax.plot(x, y, color=color, marker=marker, label=name, lw=1.5, ls=line, ms=5)
        ax.set_xlabel(labels[key])
    ratio_axis(axes[0], "y", spread(*([row[key] for row in rows] for key in ("ratio", "text"))))
    # the floors are written beside the curve that rises most; on the others they are the same
    local = [row for row in rows if row["schedule"] != "distributed"]
    steepest = max(local, key=lambda row: row["ratio"])["schedule"]
    for row in (row for row in local if row["schedule"] == steepest):
        at = layer_mean(row, "locality"), row["ratio"]
        place = {"xytext": (7, -4), "textcoords": "offset points", "va": "top", "size": 9}
        axes[0].annotate(f"floor {row['floor']:g}", at, **place, color=style(steepest)[0])
    axes[0].set_ylabel(f"{RATIO}\n(bars: 95 % interval over the text)")
    axes[0].margins(x=0.16)
    axes[1].legend(**SIDE_LEGEND)
    return fig


def draw_loss(rows, path, title):
    """Draw the losses of a run and, below, its learning rate. rows: the lines of metrics.jsonl, a
    list of dicts; a step that is there twice counts as the last of them says."""
    fig, axes = panels(2, 1, 7, 5, sharex=True, height_ratios=(3, 1))
    keys = "loss", "val_loss", "lr"
    loss, val_loss, lr = ({r["step"]: r[key] for r in rows if key in r} for key in keys)
    for ax, curve, look in (
        (axes[0], loss, {"color": GREY, "label": "training"}),
        (axes[0], val_loss, {"color": MEASURED, "marker": "o", "ms": 4, "label": "validation"}),
        (axes[1], lr, {"color": "black"}),
    ):
        steps = sorted(curve)
        dot = {"marker": "."} if len(steps) == 1 else {}  # a line of one point is not visible
        ax.plot(steps, [curve[step] for step in steps], **{**dot, **look})
    if val_loss:
        best, nats = min(val_loss.items(), key=lambda item: item[1])
        label = f"best: {nats:.3f} at step {best}"
        axes[0].plot(best, nats, "*", color=SET, ms=13, label=label)
    axes[0].set_ylabel("loss, nats per token")
    axes[0].legend(frameon=False)
    axes[1].set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    finish(fig, title, path)


# --------------------------------------------------------------------------------------------------
# a sweep: groups as report.sweep.collect returns them, and "curves", lists of (step, loss); a
# series is all groups with the same blocks


def draw_sweep(groups, folder):
    """Draw a sweep: ratio, tradeoff, layers, curves, each as PNG and SVG. Returns the paths."""
    local = [g for g in groups if g["schedule"] != "distributed"]
    names = sorted({g["schedule"] for g in groups}, key=order)
    series = list(dict.fromkeys(g["blocks"] for g in local))

    # layers and curves show a single series: the one with the most schedules, preferably semantic
    def weight(blocks):
        return sum(g["blocks"] == blocks for g in groups), blocks.startswith("semantic")

    main = max(series, key=weight, default="")
    shown = [g for g in groups if g["blocks"] == main or g["schedule"] == "distributed"]
    label = "name" if len(shown) > len(names) else "schedule"
    subject = f", {main} (mean over seeds)" if main else " (mean over seeds)"
    figures = [
        ("layers", draw_layers(shown, label), f"Layer by layer{subject}"),
        ("curves", draw_curves(shown, label), f"Training{subject}"),
    ]
    if any(g["vs_distributed"] for g in local):
        rated = [g for g in groups if g["vs_distributed"]]
        title = "What locality costs (mean over seeds)"
        figures.append(("ratio", draw_ratios(rated), title))
        title = "The trade-off: one point per configuration"
        figures.append(("tradeoff", draw_tradeoff(rated, names, series), title))
    for name, fig, title in figures:
        finish(fig, title, folder / f"{name}.png", folder / f"{name}.svg")
    return [folder / f"{name}.png" for name, _, _ in figures]


def look(series, blocks):
    """(marker, color) of a series; of distributed, which has no blocks, black."""
    if blocks not in series:
        return "o", "#000000"
    i = series.index(blocks)
    return "os^Dv*PX<>phd8"[i % 14], COLORS[(i + i // 8) % 8]


def is_closed(group):
    """Whether nothing is passed on from block to block, even through many layers."""
    partition = group["config"]["partition"]
    return partition in CLOSED or partition.partition(":")[0] in CLOSED


def draw_ratios(groups):
    """Draw the perplexity of every group as a ratio to distributed, with its interval: a row each,
    open blocks above closed ones, the cheapest at the top."""
    local = sorted(groups, key=lambda g: g["vs_distributed"]["ratio"])
    local = [g for g in local if g["schedule"] != "distributed"]
    sides = {"open blocks": [], "closed blocks": []}
    for g in local:
        sides["closed blocks" if is_closed(g) else "open blocks"].append(g)
    sides = {title: members for title, members in sides.items() if members}
    heights = [len(members) + 0.5 for members in sides.values()]
    size = 9, 1.3 + 0.5 * len(sides) + 0.27 * len(local)
    options = {"sharex": "col", "sharey": "row", "squeeze": False, "height_ratios": heights}
    fig, axes = panels(len(sides), 2, *size, width_ratios=(5, 1), **options)
    shown = []
    for (ax, right), (title, members) in zip(axes, sides.items()):
        ratios = [g["vs_distributed"]["ratio"] for g in members]
        intervals = [interval_of(g["vs_distributed"]) for g in members]
        looks = [style(g["schedule"]) for g in members]
        draw_rows(ax, [g["name"] for g in members], ratios, intervals, looks)
        ax.set_title(title, size=10, loc="left")
        texts = [g["vs_distributed"]["text"] or [1, 1] for g in members]
        colors = [color for color, _ in looks]
        ax.hlines(range(len(members)), *zip(*texts), colors=colors, lw=8, alpha=0.15)
        draw_placement(right, members)
        shown += spread(ratios, [*intervals, *texts])
    ratio_axis(axes[-1, 0], "x", shown)
    axes[-1, 0].set_xlabel(f"{RATIO}\n(95 % intervals: bars, over seeds; bands, over the text)")
    axes[-1, 1].set_xlabel("locality,\nfirst to last layer", size=9)
    return fig


def draw_placement(ax, groups):
    """Draw the locality of every layer, a row of cells for each group: the darker, the more."""
    rows = [[layer["locality"] for layer in g["runs"][0]["layers"]] for g in groups]
    x = np.arange(max(map(len, rows)) + 1) + 0.5
    for y, row in enumerate(rows):
        look = {"cmap": "Greys", "vmin": 0, "vmax": 1.2, "edgecolors": GREY, "lw": 0.6}
        ax.pcolormesh(x[: len(row) + 1], [y - 0.3, y + 0.3], [row], **look)
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)


def interval_of(row):
    """The interval over seeds of a comparison (see report.stats); None for a single seed."""
    return None if row["low"] is None else (row["low"], row["high"])


def draw_tradeoff(groups, names, series):
    """Draw perplexity against fidelity, one point per group."""
    fig, ax = panels(1, 1, 8, max(5, 1.2 + 0.22 * len(names + series)))  # two legends, one above
    # colors show the schedule; the blocks, if only they differ
    by_schedule = len(names) > 2 or len(series) < 2
    for g in groups:
        marker, color = look(series, g["blocks"])
        color = style(g["schedule"])[0] if by_schedule else color
        fidelity = np.mean([layer_mean(r, "fidelity") for r in g["runs"]])
        ax.plot(fidelity, g["vs_distributed"]["ratio"], marker, color=color, ms=8)
    ax.axhline(1, color="black", lw=0.8, zorder=0)
    ax.set(xlabel=FIDELITY, ylabel=RATIO)
    ratio_axis(ax, "y", [g["vs_distributed"]["ratio"] for g in groups])
    Line2D, keys = pyplot().Line2D, {"color: schedule": [], "marker: blocks": []}
    for name in names if by_schedule else ():
        color = style(name)[0]
        keys["color: schedule"].append(Line2D([], [], color=color, lw=5, label=name))
    for blocks in series if len(series) > 1 else ():
        marker, color = look(series, blocks)
        fill = {"mfc": "white", "mec": "black"} if by_schedule else {"color": color}
        point = Line2D([], [], marker=marker, ls="", label=blocks, **fill)
        keys["marker: blocks"].append(point)
    for (title, handles), place in zip(keys.items(), ("upper", "lower")):
        if handles:
            more = {"loc": f"outside right {place}", "alignment": "left", "frameon": False}
            fig.legend(handles=handles, title=title, **more)
    return fig


def draw_layers(groups, label):
    """Draw fidelity and entropy of every layer, a line for each group, but at most four: those that
    are most unlike each other. label: a key of a group."""
    unlike = {name: i for i, name in enumerate(MOST_UNLIKE)}
    groups = sorted(groups, key=lambda g: unlike.get(g["schedule"], len(unlike)))[:4]
    fig, axes = panels(1, 2, 10, 4.4)
    for g in groups:
        color, marker = style(g["schedule"])
        layers = range(1, len(g["runs"][0]["layers"]) + 1)
        line = "--" if g["schedule"] == "reversed" else "-"
        for ax, key in zip(axes, ("fidelity", "entropy")):
            mean = np.mean([[layer[key] for layer in r["layers"]] for r in g["runs"]], axis=0)
            ax.plot(layers, mean, marker=marker, color=color, ls=line, label=g[label])
            ax.set(xlabel="layer", xticks=layers)
    axes[0].set(ylabel="fidelity: attention inside the block", ylim=(0, 1.03))
    top = max(max(line.get_ydata()) for line in axes[1].lines)
    axes[1].set(ylabel="entropy of the attention, bits", ylim=(0, 1.05 * max(top, 0.1)))
    axes[1].legend(**SIDE_LEGEND)
    return fig


def draw_curves(groups, label):
    """Draw the validation loss during training, a line for each group. The loss before the first
    step is left out if at least two others follow: it would set the scale."""
    fig, ax = panels(1, 1, 7, 4.4)
    for g in groups:
        n = min(map(len, g["curves"]))  # a run may have stopped early
        steps, nats = np.mean([curve[:n] for curve in g["curves"]], axis=0).T
        color, marker = style(g["schedule"])
        first = int(n > 2 and steps[0] == 0)
        ax.plot(steps[first:], nats[first:], marker=marker, ms=4, color=color, label=g[label])
    ax.set(xlabel="step", ylabel="validation loss, nats per token")
    ax.legend(**SIDE_LEGEND)
    return fig
