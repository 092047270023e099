"""Tables for Markdown and for a terminal, and the numbers in them."""

from report.plots import layer_mean
from report.stats import mean_interval


def markdown(header, rows):
    """A Markdown table. header: a list of strings; rows: lists of as many cells, of any type."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def aligned(header, rows):
    """The same table for a terminal: the first column is aligned left, all others right."""
    lines = [list(map(str, cells)) for cells in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ""
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(x.rjust(n) for x, n in zip(others, widths[1:]))]
        text += "  ".join(cells) + "\n"
    return text


def number(value, form):
    """A number in a format such as ".3f"; a dash for None."""
    return "–" if value is None else format(value, form)


def plus_minus(values, digits, interval=False):
    """The mean of the values ± their standard deviation, or ± half of its 95 % interval."""
    mean, sd, half = mean_interval(values)
    spread = half if interval else sd
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def with_interval(row, digits):
    """The ratio or difference of a comparison (see report.stats), and its interval over seeds."""
    if row is None:
        return "–"
    value = f"{row['ratio' if 'ratio' in row else 'difference']:.{digits}f}"
    if row["low"] is None or row["low"] == row["high"]:
        return value
    return f"{value} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def between(ends, digits):
    """An interval, (low, high); a dash for None."""
    return "–" if ends is None else f"{ends[0]:.{digits}f} … {ends[1]:.{digits}f}"


def listed(values):
    """The different values, in order: "1, 2, 3"."""
    return ", ".join(map(str, sorted(set(values))))


def facts(about):
    """A dict of facts as one line: "commit 022790a; seeds 1, 2"."""
    return "; ".join(f"{key} {value}" for key, value in about.items()) + "\n"


# --------------------------------------------------------------------------------------------------
# what eval.py prints


def measures_table(results):
    """What `evaluate` returned, as lines of text."""
    header = "layer", "locality", "fidelity", "pointer accuracy", "entropy (bits)", "on first token"
    forms = {
        "locality": ".3f",
        "fidelity": ".3f",
        "pointer_accuracy": ".3f",
        "entropy": ".2f",
        "first_token": ".3f",
    }
    rows = [
        [number, *(format(layer[key], form) for key, form in forms.items())]
        for number, layer in enumerate(results["layers"], 1)
    ]
    losses = ", ".join(f"from {n} {nats:.3f}" for n, nats in results["by_position"])
    span = "reach: the whole context (a layer below 1, or an anchor, sees all of it)"
    if results["reach"]:
        span = (
            f"reach, certified: {results['reach']['median']:.0f} tokens (median), at most "
            f"{results['reach']['most']}; as long as the blocks stay the same, no earlier token "
            "can change a prediction, whatever the weights"
        )
    return (
        f"{aligned(header, rows)}"
        f"perplexity {results['perplexity']:.3f}   bits per byte {results['bits_per_byte']:.4f}   "
        f"accuracy {100 * results['accuracy']:.2f} %   "
        f"({results['tokens']:,} tokens, stride {results['stride']})\n"
        f"loss in nats by tokens of context: {losses}\n{span}"
    )


def dial_table(rows):
    """What `dial_sweep` returned, as lines of text. The last three columns: means over layers."""
    header = ["schedule", "floor", "perplexity", "ratio to distributed", "accuracy"]
    header += ["locality", "fidelity", "entropy (bits)"]
    lines = [
        (
            row["schedule"],
            "–" if row["schedule"] == "distributed" else f"{row['floor']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['ratio']:.4f}",
            f"{100 * row['accuracy']:.2f} %",
            f"{layer_mean(row, 'locality'):.3f}",
            f"{layer_mean(row, 'fidelity'):.3f}",
            f"{layer_mean(row, 'entropy'):.2f}",
        )
        for row in rows
    ]
    return aligned(header, lines) + "locality, fidelity and entropy are means over layers"
