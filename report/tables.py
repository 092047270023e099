"""Tables for Markdown and for a terminal, and the numbers in them."""

import math
import textwrap

from report.plots import layer_mean
from report.stats import mean_interval


def markdown(header, rows):
    """A Markdown table. header: a list of strings; rows: lists of as many cells, of any type."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def aligned(header, rows, width=math.inf):
    """The same table for a terminal: the first column is aligned left, all others right. The first
    cell of a line that would be longer than `width` continues below it."""
    first, *others = (list(map(str, column)) for column in zip(header, *rows))
    others = [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
    rest = sum(2 + len(column[0]) for column in others)
    left, lines = min(max(map(len, first)), max(width - rest, 6)), []
    for name, *cells in zip(first, *others):
        head = name if len(name) <= left else textwrap.wrap(name, left)[0]
        lines.append("  ".join([head.ljust(left), *cells]))
        below = name[len(head) :].strip()
        lines += (f"  {line}" for line in textwrap.wrap(below, width - 2))
    return "".join(f"{line}\n" for line in lines)


def number(value, form):
    """A number in a format such as ".3f"; a dash for None."""
    return "–" if value is None else format(value, form)


def fixed(value, digits):
    """A number with so many decimals, or in scientific notation if it is large."""
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def plus_minus(values, digits, interval=False):
    """The mean of the values ± their standard deviation, or ± half of its 95 % interval."""
    mean, sd, half = mean_interval(values)
    spread = half if interval else sd
    return fixed(mean, digits) + ("" if spread is None else f" ± {fixed(spread, digits)}")


def with_interval(row, digits):
    """The ratio or difference of a comparison (see report.stats), and its interval over seeds."""
    if row is None:
        return "–"
    value = fixed(row["ratio" if "ratio" in row else "difference"], digits)
    ends = [] if row["low"] == row["high"] else [fixed(row[end], digits) for end in ("low", "high")]
    return value + (f" [{', '.join(ends)}]" if ends else "")


def between(ends, digits):
    """An interval, (low, high); a dash for None."""
    return "–" if ends is None else " … ".join(fixed(end, digits) for end in ends)


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
    digits = {"locality": 3, "fidelity": 3, "pointer_accuracy": 3, "entropy": 2, "first_token": 3}
    rows = [
        [number, *(f"{layer[key]:.{n}f}" for key, n in digits.items())]
        for number, layer in enumerate(results["layers"], 1)
    ]
    losses = ", ".join(f"from {n} {nats:.3f}" for n, nats in results["by_position"])
    span = "reach: the whole context (a layer's locality is below 1, or anchor is on)"
    if results["reach"]:
        span = (
            f"reach, certified: {results['reach']['median']:.0f} tokens (median), at most "
            f"{results['reach']['most']}; as long as the blocks stay the same, no earlier token "
            "can change a prediction, whatever the weights"
        )
    return (
        f"{aligned(header, rows)}"
        f"perplexity {results['perplexity']:.3f}   bits per byte {results['bits_per_byte']:.4f}   "
        f"accuracy {100 * results['accuracy']:.2f}%   "
        f"({results['tokens']:,} tokens, stride {results['stride']})\n"
        f"loss in nats by tokens of context: {losses}\n{span}"
    )


def percent(ratio):
    """How far a ratio is from 1, in percent: "+1.49"."""
    return f"{100 * (ratio - 1):+.2f}"


def dial_table(rows):
    """What `dial_sweep` returned, as lines of text."""
    header = "schedule", "floor", "perplexity", "change, %", "95 % interval", "locality", "fidelity"
    lines = []
    for row in rows:
        local = row["schedule"] != "distributed"
        ends = local and row["text"] and map(percent, row["text"])
        lines.append([row["schedule"], f"{row['floor']:.2f}" if local else "–"])
        lines[-1] += [f"{row['perplexity']:.3f}", percent(row["ratio"]) if local else "–"]
        lines[-1] += [f"[{', '.join(ends)}]" if ends else "–"]
        lines[-1] += [f"{layer_mean(row, key):.3f}" for key in ("locality", "fidelity")]
    return (
        f"{aligned(header, lines)}"
        "change: of the perplexity, relative to distributed. Its interval resamples the contexts\n"
        "of this text (at least 20) as if they were independent. locality, fidelity: means over\n"
        "layers"
    )
