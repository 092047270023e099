"""All figures. Colors suit color-blind readers (Okabe & Ito); markers serve black and white."""

import logging
import warnings

import numpy as np

from support.files import InputError, replacing

# color and marker of each schedule, in the order in which they are shown
STYLES = {
    "distributed": ("#000000", "o"),
    "localist": ("#d55e00", "s"),
    "linear": ("#e69f00", "^"),
    "quadratic": ("#56b4e9", "v"),
    "cubic": ("#009e73", "D"),
    "quartic": ("#0072b2", "P"),
    "quintic": ("#cc79a7", "*"),
    "reversed": ("#888888", "X"),
}
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #888888".split()
EDGE = SET = "#d55e00"  # where blocks begin; values that were set
MEASURED = "#0072b2"  # values that were measured
SIDE_LEGEND = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1, 1)}
FIDELITY = "fidelity, mean over layers: attention inside the block"
RATIO = "perplexity, ratio to distributed"


def style(schedule):
    """(color, marker) of a schedule, known or not."""
    return STYLES.get(schedule, ("#a6761d", "h"))


def order(schedule):
    """The position of a schedule among the others, an integer; unknown ones come last."""
    return list(STYLES).index(schedule) if schedule in STYLES else len(STYLES)


def pyplot():
    """matplotlib.pyplot, imported when the first figure is drawn."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would log its font cache
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def check_suffix(path):
    """Raises InputError unless the path of a figure ends in .png, .svg or .pdf."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: the name of a figure must end in .png, .svg or .pdf")


def save_figure(fig, path, close=True):
    """Save a figure, completely or not at all, and close it. Raises InputError."""
    try:
        with replacing(path) as temporary, warnings.catch_warnings():
            # a character that the font lacks is drawn as a box
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            fig.savefig(temporary, dpi=130, format=path.suffix[1:])
    finally:
        if close:
            pyplot().close(fig)


def bare(fig):
    """Hide the upper and the right spine of every axis that shows no image."""
    for ax in fig.axes:
        if not ax.images:
            ax.spines[["top", "right"]].set_visible(False)


def finish(fig, title, *paths):
    """Give a figure its title, save it at each path, and close it. Raises InputError."""
    bare(fig)
    fig.suptitle(title, parse_math=False)
    for path in paths:
        save_figure(fig, path, close=path == paths[-1])


def layer_mean(results, key):
    """The mean over layers of a measure in the results of `evaluate`."""
    return float(np.mean([layer[key] for layer in results["layers"]]))


# --------------------------------------------------------------------------------------------------
# one model


def draw_attention(maps, start, words, layers, path, title):
    """Draw the attention of the first and the last layer over a text, and measures of all layers.

    maps: {layer: (T, T) weights, mean over heads} of these two; start: (T,) where each query's
    block begins; words: {token: first words of the block that begins there}; layers: for each, a
    dict of measures (as `evaluate` returns them).
    """
    fig, axes = pyplot().subplots(
        2, 2, figsize=(10, 8.6), height_ratios=(1.55, 1), layout="constrained"
    )
    for ax, layer in zip(axes[0], (0, len(layers) - 1)):
        image = draw_map(ax, maps[layer], start)
        dial = f"dial at {layers[layer]['locality']:.2f}"
        ax.set(title=f"layer {layer + 1}, {dial}", xlabel="key (token)")
    axes[0, 0].set_ylabel("query (token)")
    axes[0, 0].plot([], [], color=EDGE, label="start of the query's block")
    axes[0, 0].legend(loc="upper right", frameon=False)
    T, last = len(start), -np.inf
    font = {"size": 7, "va": "center", "color": EDGE, "parse_math": False}
    for token, text in sorted(words.items()):  # in the empty corner, next to the start of the block
        if 0 < token < 0.8 * T and token > last + 0.04 * T:
            axes[0, 1].text(token + 0.02 * T, token, f"{text} …", in_layout=False, **font)
            last = token
    fig.colorbar(image, ax=axes[0], label="attention weight, mean over heads", shrink=0.9)
    draw_measures(axes[1], layers)
    finish(fig, title, path)


def draw_map(ax, weights, start):
    """Draw (T, T) attention weights and where each query's block begins. Returns the image."""
    from matplotlib.colors import PowerNorm

    T = len(start)
    shown = np.where(np.tri(T, dtype=bool), weights, np.nan)
    image = ax.imshow(shown, cmap="Blues", norm=PowerNorm(0.35, 0, 1), interpolation="nearest")
    edge = [*start - 0.5, start[-1] - 0.5]
    ax.step(edge, np.arange(T + 1) - 0.5, where="pre", color=EDGE, lw=1.3)
    ax.set(xlim=(-0.5, T - 0.5))
    return image


def draw_measures(axes, layers):
    """Draw fidelity and pointer accuracy of every layer, and their entropy."""
    x = np.arange(1, len(layers) + 1)
    values = {key: [layer[key] for layer in layers] for key in layers[0]}
    ax = axes[0]
    ax.fill_between(x, values["locality"], color=SET, alpha=0.15, lw=0)
    ax.plot(x, values["locality"], "--", color=SET, label="dial: the certified floor")
    label = "fidelity: mass inside the block"
    ax.plot(x, values["fidelity"], "o-", color=MEASURED, label=label)
    ax.plot(x, values["pointer_accuracy"], "^:", color="#666666", label="pointer accuracy")
    ax.set(xlabel="layer", ylim=(-0.03, 1.5), xticks=x, yticks=np.arange(0, 1.1, 0.2))
    ax.set_title("attention that stays in the block")
    ax.legend(frameon=False, loc="upper left")
    ax, top = axes[1], 1.1 * max(values["entropy"]) or 1
    ax.plot(x, values["entropy"], "o-", color=MEASURED)
    ax.set(xlabel="layer", ylabel="bits", xticks=x, ylim=(0, top))
    ax.set_title("entropy of the attention")


def draw_dials(rows, path, title):
    """Draw what each dial costs in perplexity, against its mean and against the fidelity it gives.

    rows: a dict for each dial, distributed first: schedule, ratio, layers.
    """
    fig, axes = pyplot().subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    labels = {"locality": "lambda, mean over layers: the setting of the dial", "fidelity": FIDELITY}
    for ax, key in zip(axes, labels):
        for name in dict.fromkeys(row["schedule"] for row in rows):
            color, marker = style(name)
            # every curve begins at dial 0
            curve = [row for row in rows if row["schedule"] in (name, "distributed")]
            x, y = [layer_mean(row, key) for row in curve], [row["ratio"] for row in curve]
            line = "--" if name == "reversed" else "-"
            ax.plot(x, y, color=color, marker=marker, label=name, lw=1.5, ls=line)
        ax.set(xlabel=labels[key])
    axes[0].set_ylabel(RATIO)
    axes[1].legend(frameon=False)
    finish(fig, title, path)


# --------------------------------------------------------------------------------------------------
# a sweep: groups as report.sweep.collect returns them, and "curves", lists of (step, loss); a
# series is all groups with the same blocks


def draw_sweep(groups, folder):
    """Draw a sweep: ratio, tradeoff, layers, curves, each as PNG and SVG. Returns the paths."""
    names = sorted({g["schedule"] for g in groups}, key=order)
    bases = [g for g in groups if g["schedule"] == "distributed"]
    local = [g for g in groups if g["schedule"] != "distributed"]
    series = list(dict.fromkeys(g["blocks"] for g in local))

    # layers and curves show a single series: the one with the most schedules, preferably semantic
    def weight(blocks):
        return sum(g["blocks"] == blocks for g in groups), blocks.startswith("semantic")

    main = max(series or [""], key=weight)
    shown = [g for g in groups if g["blocks"] == main or g["schedule"] == "distributed"]
    rated = [g for g in local if g["vs_distributed"]]
    label = "name" if len(shown) > len(names) else "schedule"
    subject = f", {main} (mean over seeds)" if main else " (mean over seeds)"
    figures = {}
    if rated:
        figures["ratio"] = draw_ratios(rated, names, series)
        figures["tradeoff"] = draw_tradeoff(rated, bases, names, series)
    figures |= {"layers": draw_layers(shown, label), "curves": draw_curves(shown, label)}
    titles = {
        "ratio": "What locality costs, by schedule (mean over seeds, 95 % interval)",
        "tradeoff": "The trade-off: one point per configuration",
        "layers": f"Layer by layer{subject}",
        "curves": f"Training{subject}",
    }
    drawn = []
    for name, fig in figures.items():
        paths = [folder / f"{name}{suffix}" for suffix in (".png", ".svg")]
        finish(fig, titles[name], *paths)
        drawn += paths
    return drawn


def look(series, blocks):
    """(marker, color) of a series."""
    i = series.index(blocks) if blocks in series else 0
    return "os^Dv*PX<>phd8"[i % 14], COLORS[(i + i // 8) % 8]


def draw_ratios(groups, names, series):
    """Draw the perplexity of every group as a ratio to distributed, with its interval."""
    fig, ax = pyplot().subplots(figsize=(8, 4.4), layout="constrained")
    x = {name: i for i, name in enumerate(n for n in names if n != "distributed")}
    for i, blocks in enumerate(series):
        members = [g for g in groups if g["blocks"] == blocks]
        shift = 0.7 * ((i + 0.5) / len(series) - 0.5)
        rows = [g["vs_distributed"] for g in members]
        error = [
            [abs(row["ratio"] - (row[end] or row["ratio"])) for row in rows]
            for end in ("low", "high")
        ]
        marker, color = look(series, blocks)
        at, ratio = [x[g["schedule"]] + shift for g in members], [row["ratio"] for row in rows]
        ax.errorbar(at, ratio, error, fmt=marker, color=color, capsize=3, label=blocks)
    ax.axhline(1, color="black", lw=0.8)
    ax.set(xticks=range(len(x)), xticklabels=list(x), ylabel=RATIO)
    ax.legend(**(SIDE_LEGEND if len(series) > 4 else {"frameon": False}))
    return fig


def draw_tradeoff(groups, bases, names, series):
    """Draw perplexity against fidelity, one point per group."""
    fig, ax = pyplot().subplots(figsize=(7, 5), layout="constrained")
    by_schedule = len(names) > 2  # colors show the schedule; if there is only one, the blocks
    for g in groups + [g for g in bases if g["vs_distributed"]]:
        marker, color = look(series, g["blocks"]) if g["blocks"] in series else ("o", "#000000")
        color = style(g["schedule"])[0] if by_schedule else color
        fidelity = np.mean([layer_mean(r, "fidelity") for r in g["runs"]])
        ax.plot(fidelity, g["vs_distributed"]["ratio"], marker, color=color, ms=8)
    for name in names if by_schedule else ():
        ax.plot([], [], "o", color=style(name)[0], label=name)
    for blocks in series if len(series) > 1 else ():
        marker, color = look(series, blocks)
        color, edge = ("white", "black") if by_schedule else (color, color)
        ax.plot([], [], marker, label=blocks, color=color, mec=edge)
    ax.axhline(1, color="black", lw=0.8)
    ax.set(xlabel=FIDELITY, ylabel=RATIO)
    if by_schedule or len(series) > 1:
        ax.legend(**SIDE_LEGEND)
    return fig


def draw_layers(groups, label):
    """Draw fidelity and entropy of every layer, a line for each group. label: a key of a group."""
    fig, axes = pyplot().subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for g in groups:
        color, marker = style(g["schedule"])
        layers = range(1, len(g["runs"][0]["layers"]) + 1)
        for ax, key in zip(axes, ("fidelity", "entropy")):
            mean = np.mean([[layer[key] for layer in r["layers"]] for r in g["runs"]], axis=0)
            ax.plot(layers, mean, marker=marker, color=color, label=g[label])
            ax.set(xlabel="layer", xticks=layers)
    axes[0].set(ylabel="fidelity: attention inside the block", ylim=(0, 1.03))
    axes[1].set(ylabel="entropy of the attention, bits", ylim=(0, None))
    axes[1].legend(**SIDE_LEGEND)
    return fig


def draw_curves(groups, label):
    """Draw the validation loss during training, a line for each group."""
    fig, ax = pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    for g in groups:
        n = min(map(len, g["curves"]))  # a run may have stopped early
        steps, nats = np.mean([curve[:n] for curve in g["curves"]], axis=0).T
        color, marker = style(g["schedule"])
        ax.plot(steps, nats, marker=marker, ms=4, color=color, label=g[label])
    ax.set(xlabel="step", ylabel="validation loss, nats per token")
    ax.legend(**SIDE_LEGEND)
    return fig
