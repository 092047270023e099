"""All figures. Colors suit color-blind readers (Okabe & Ito); markers serve black and white."""

import io
import logging
import os
import warnings

import numpy as np

from support.files import InputError, replacing, visible

# color and marker of each schedule, in the order in which they are shown
STYLES = {
    name: (color, marker)
    for name, color, marker in zip(
        "distributed localist linear quadratic cubic quartic quintic reversed".split(),
        "#000000 #d55e00 #e69f00 #56b4e9 #009e73 #0072b2 #cc79a7 #888888".split(),
        "os^vDP*X",
    )
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
    for legend in filter(None, (ax.get_legend() for ax in fig.axes)):
        for text in legend.get_texts():
            text.set(text=visible(text.get_text()), parse_math=False)  # $ is no formula in a name
    save_figure(fig, *paths)


# --------------------------------------------------------------------------------------------------
# one model


def draw_attention(maps, start, words, layers, path, title):
    """Draw the attention of the first and the last layer over a text, and measures of all layers.

    maps: {layer: (T, T) weights, mean over heads} of these two; start: (T,) where each query's
    block begins; words: {token: first words of the block that begins there}; layers: for each, a
    dict of measures (as `evaluate` returns them).
    """
    fig, axes = panels(2, 2, 10, 8.6, height_ratios=(1.55, 1))
    norm = pyplot().matplotlib.colors.PowerNorm(0.35, 0, 1)
    T, last = len(start), -np.inf
    for ax, layer in zip(axes[0], (0, len(layers) - 1)):
        shown = np.where(np.tri(T, dtype=bool), maps[layer], np.nan)
        image = ax.imshow(shown, cmap="Blues", norm=norm, interpolation="nearest")
        edge = [*start - 0.5, start[-1] - 0.5]
        ax.step(edge, np.arange(T + 1) - 0.5, where="pre", color=EDGE, lw=1.3)
        dial = f"dial at {layers[layer]['locality']:.2f}"
        ax.set(title=f"layer {layer + 1}, {dial}", xlabel="key (token)", xlim=(-0.5, T - 0.5))
    axes[0, 0].set_ylabel("query (token)")
    axes[0, 0].plot([], [], color=EDGE, label="start of the query's block")
    axes[0, 0].legend(loc="upper right", frameon=False)
    font = {"size": 7, "va": "center", "color": EDGE, "parse_math": False}
    for token, text in sorted(words.items()):  # in the empty corner, next to the start of the block
        if 0 < token < 0.8 * T and token > last + 0.04 * T:
            axes[0, 1].text(token + 0.02 * T, token, f"{visible(text)} …", in_layout=False, **font)
            last = token
    fig.colorbar(image, ax=axes[0], label="attention weight, mean over heads", shrink=0.9)
    draw_measures(*axes[1], layers)
    finish(fig, title, path)


def draw_measures(left, right, layers):
    """Draw fidelity and pointer accuracy of every layer, and on the right their entropy."""
    x = np.arange(1, len(layers) + 1)
    values = {key: [layer[key] for layer in layers] for key in layers[0]}
    left.fill_between(x, values["locality"], color=SET, alpha=0.15, lw=0)
    left.plot(x, values["locality"], "--", color=SET, label="dial: the certified floor")
    left.plot(x, values["fidelity"], "o-", color=MEASURED, label="fidelity: mass inside the block")
    left.plot(x, values["pointer_accuracy"], "^:", color="#666666", label="pointer accuracy")
    left.set(xlabel="layer", ylim=(-0.03, 1.5), xticks=x, yticks=np.arange(0, 1.1, 0.2))
    left.set_title("attention that stays in the block")
    left.legend(frameon=False, loc="upper left")
    right.plot(x, values["entropy"], "o-", color=MEASURED)
    right.set(xlabel="layer", ylabel="bits", xticks=x, ylim=(0, 1.1 * max(values["entropy"]) or 1))
    right.set_title("entropy of the attention")


def draw_dials(rows, path, title):
    """Draw what each dial costs in perplexity, against its mean and against the fidelity it gives.
    rows: a dict for each dial, distributed first: schedule, ratio, layers."""
    fig, axes = panels(1, 2, 10, 4.6, sharey=True)
    labels = {"locality": "lambda, mean over layers: the setting of the dial", "fidelity": FIDELITY}
    for ax, key in zip(axes, labels):
        for name in dict.fromkeys(row["schedule"] for row in rows):
            (color, marker), line = style(name), "--" if name == "reversed" else "-"
            # every curve begins at dial 0
            curve = [row for row in rows if row["schedule"] in (name, "distributed")]
            x, y = [layer_mean(row, key) for row in curve], [row["ratio"] for row in curve]
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
        title = "What locality costs, by schedule (mean over seeds, 95 % interval)"
        figures.append(("ratio", draw_ratios(rated, names, series), title))
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


def draw_ratios(groups, names, series):
    """Draw the perplexity of every group as a ratio to distributed, with its interval."""
    fig, ax = panels(1, 1, 8, 4.4)
    x = {name: i for i, name in enumerate(n for n in names if n != "distributed")}
    for i, blocks in enumerate(series):
        members = [g for g in groups if g["blocks"] == blocks]
        rows, shift = [g["vs_distributed"] for g in members], 0.7 * ((i + 0.5) / len(series) - 0.5)
        at, ratio = [x[g["schedule"]] + shift for g in members], [row["ratio"] for row in rows]
        error = [
            [abs(r["ratio"] - (r[end] or r["ratio"])) for r in rows] for end in ("low", "high")
        ]
        marker, color = look(series, blocks)
        ax.errorbar(at, ratio, error, fmt=marker, color=color, capsize=3, label=blocks)
    ax.axhline(1, color="black", lw=0.8)
    ax.set(xticks=range(len(x)), xticklabels=list(x), ylabel=RATIO)
    ax.legend(**(SIDE_LEGEND if len(series) > 4 else {"frameon": False}))
    return fig


def draw_tradeoff(groups, names, series):
    """Draw perplexity against fidelity, one point per group."""
    fig, ax = panels(1, 1, 7, 5)
    by_schedule = len(names) > 2  # colors show the schedule; if there is only one, the blocks
    for g in groups:
        marker, color = look(series, g["blocks"])
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
    fig, axes = panels(1, 2, 10, 4.4)
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
    fig, ax = panels(1, 1, 7, 4.4)
    for g in groups:
        n = min(map(len, g["curves"]))  # a run may have stopped early
        steps, nats = np.mean([curve[:n] for curve in g["curves"]], axis=0).T
        color, marker = style(g["schedule"])
        ax.plot(steps, nats, marker=marker, ms=4, color=color, label=g[label])
    ax.set(xlabel="step", ylabel="validation loss, nats per token")
    ax.legend(**SIDE_LEGEND)
    return fig
