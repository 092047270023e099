"""Draw the locality of every layer in every schedule: 12 layers, floor 1.

    python -m experiments.schedules figures/schedules.png

A schedule that you add to locality.SCHEDULES is drawn, too.
"""

import argparse
from pathlib import Path

import numpy as np

from locality import SCHEDULES, schedule
from report.plots import check_suffix, finish, panels, style
from support.files import check_writable, run_script

N_LAYER = 12


def draw_schedules(path):
    """Draw a curve for each schedule, with its name where the other curves are far."""
    fig, ax = panels(1, 1, 8.5, 5)
    x = np.arange(1, N_LAYER + 1)
    curves = {name: np.array(schedule(name, N_LAYER)) for name in SCHEDULES}
    for name, y in curves.items():
        (color, marker), line = style(name), "--" if name == "reversed" else "-"
        ax.plot(x, y, color=color, marker=marker, ms=5, ls=line)
        gaps = [abs(y - other) for other in curves.values() if other is not y]
        at = np.min(gaps, 0)[1:-1].argmax() + 1
        place = {"xytext": (5, -3), "textcoords": "offset points", "va": "top", "size": 9}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        ax.annotate(name, (x[at], y[at]), **place, color=color, bbox=box)
    ax.set(xlabel="layer", ylabel="locality: the dial of the layer", xticks=x, ylim=(-0.1, 1.04))
    finish(fig, "The schedules", path)


def main():
    parser = argparse.ArgumentParser(description="draw the locality of every layer")
    parser.add_argument("figure", type=Path, help="where to draw it: .png, .svg or .pdf")
    path = parser.parse_args().figure
    check_suffix(path)
    check_writable(path)
    draw_schedules(path)
    print(f"drew {path}")


if __name__ == "__main__":
    run_script(main)
