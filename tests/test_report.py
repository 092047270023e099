"""Statistics are what they say, tables are tables, and a sweep compares what can be compared."""

import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments import faithful_report
from experiments.schedules import draw_schedules
from locality import SCHEDULES
from report import plots
from report.blocks import choose_stretch, join_attention, join_words, most_hidden
from report.stats import (
    bootstrap_weights,
    holm,
    mean_interval,
    paired,
    resampled_losses,
    sign_flip_p,
)
from report.sweep import (
    canonical,
    collect,
    comparisons,
    read_results,
    read_runs,
    report_text,
    write_report,
)
from report.tables import aligned, dial_table, markdown, plus_minus, with_interval
from support.files import InputError
from train import Config


def test_intervals_are_students_and_hold_the_mean_as_often_as_they_say():
    assert mean_interval([4.0]) == (4.0, None, None)
    mean, sd, half = mean_interval([1.0, 2.0, 4.0])
    assert (mean, sd) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert half == pytest.approx(4.303 * sd / math.sqrt(3))
    for n in (2, 5, 12):
        draws = np.random.default_rng(n).normal(3, 2, (2000, n))
        holds = [abs(mean - 3) <= half for mean, _, half in map(mean_interval, draws)]
        assert 0.935 < np.mean(holds) < 0.965


def test_the_permutation_test_is_exact():
    assert sign_flip_p([1, 2, 3]) == 0.25
    assert sign_flip_p([1, -1]) == sign_flip_p([0, 0, 0]) == 1
    d = np.random.default_rng(0).normal(0.4, 1, 7)
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=7)]
    assert sign_flip_p(d) == pytest.approx(np.mean([m >= abs(d.mean()) - 1e-12 for m in means]))
    assert sign_flip_p(d) == sign_flip_p(-d)
    assert sign_flip_p(range(21)) is None


def test_holm_corrects_for_all_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    rng = np.random.default_rng(0)
    wrong = [min(holm(rng.random(3).tolist())) < 0.05 for _ in range(2000)]
    assert np.mean(wrong) < 0.065


def test_pairs_share_their_seeds():
    pair = {1: 1.0, 2: 2.0, 3: 9.0}, {1: 0.9, 2: 1.8, 4: 7.0}
    row, ratio = paired(*pair), paired(*pair, ratio=True)
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(0.15)
    assert row["p"] == row["least_p"] == 0.5 and row["text"] is None
    assert row["low"] < row["difference"] < row["high"]
    assert "difference" not in ratio and ratio["ratio"] == pytest.approx(math.exp(0.15))
    assert [math.exp(row[end]) for end in ("low", "high")] == [ratio["low"], ratio["high"]]
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert paired({1: 1.0}, {1: 1.0}, ratio=True)["low"] is None
    same = paired({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}, ratio=True)
    assert same["low"] == same["ratio"] == same["high"] == 1


def over_text(a, b):
    """The interval over the text of a ratio of two groups, lists of (nats, tokens) by seed."""
    runs = [[{"seed": s, "by_context": x} for s, x in side.items()] for side in (a, b)]
    return paired(dict.fromkeys(a, 0), dict.fromkeys(b, 0), resampled_losses(*runs), True)["text"]


def test_the_interval_over_the_text_holds_the_truth_as_often_as_it_says():
    """Contexts are drawn; the true ratio is e ** 0.02."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        n = rng.integers(100, 400, 60)
        nats = rng.normal(3, 0.5, 60) * n
        more = (0.02 + rng.normal(0, 0.05, 60)) * n
        a, b = (
            {s: np.stack((x + rng.normal(0, 1, 60), n), 1) for s in (1, 2)}
            for x in (nats + more, nats)
        )
        low, high = over_text(a, b)
        held += low <= math.exp(0.02) <= high
    assert 180 <= held < 200
    # both ends, for seeds that differ: 18 of 20 x 9, on average
    a, b = (
        {s: [(x, 9)] * 4 + [(0, 9)] * 16 for s, x in c.items()}
        for c in ({1: 9, 2: 27}, {1: 0, 2: 0})
    )
    share = np.random.default_rng(5).binomial(20, 0.2, 200_000) * 18 / 180
    expected = np.exp(np.percentile(share, (2.5, 97.5)))
    assert over_text(a, b) == pytest.approx(expected, abs=0.02)
    assert over_text(a, {**b, 2: b[2][:-1]}) is None  # another text
    assert over_text({1: a[1][:19]}, {1: b[1][:19]}) is None  # too few contexts


def test_tables():
    rows = [["a", 1, "x"], ["bcd", 10.5, "–"]]
    lines = ["| n | value |  |", "| --- | --- | --- |", "| a | 1 | x |", "| bcd | 10.5 | – |"]
    assert markdown(["n", "value", ""], rows).splitlines() == lines
    lines = ["n    value   ", "a        1  x", "bcd   10.5  –"]
    assert aligned(["n", "value", ""], rows).splitlines() == lines
    lines = ["n        v", "one,     1", "  two and", "  three", "abcdefg  2", "  hi"]
    assert (
        aligned(["n", "v"], [["one, two and three", 1], ["abcdefghi", 2]], 10).split("\n")[:-1]
        == lines
    )
    assert plus_minus([1, 3], 1) == "2.0 ± 1.4" and plus_minus([1], 2) == "1.00"
    assert plus_minus([1, 3], 1, interval=True) == "2.0 ± 12.7"
    assert plus_minus([99999, 99999], 1) == "99999.0 ± 0.0" and plus_minus([1e304], 1) == "1.0e+304"
    row = paired({1: 1.0, 2: 3.0}, {1: 0.0, 2: 0.0})
    assert with_interval(row, 1) == "2.0 [-10.7, 14.7]" and with_interval(None, 1) == "–"
    rows = [dial("distributed", 1, [1, 1]), dial("quintic", 1.015, [1.01, 1.0205], 0.5)]
    lines = dial_table([*rows, dial("localist", 0.9, None)]).splitlines()
    assert lines[1].split() == ["distributed", "–", "9.000", "–", "–", "0.000", "1.000"]
    assert "  0.50       9.135      +1.50  [+1.00, +2.05]" in lines[2]
    assert lines[3].split()[3:5] == ["-10.00", "–"]
    many = paired(dict.fromkeys(range(21), 1.0), {seed: seed for seed in range(21)}, ratio=True)
    assert "| – |" in report_text([], [{"first": "a", "second": "b", **many}], {})


def test_every_series_has_a_marker_of_its_own():
    series = [f"block:{n}" for n in range(14)]
    assert len({plots.look(series, blocks)[0] for blocks in series}) == 14


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_on_a_full_disk_is_one_line(tmp_path, file_size, suffix):
    path = tmp_path / f"f.{suffix}"
    file_size(1000)
    with pytest.raises(InputError, match=f"f.{suffix}: could not be written"):
        plots.draw_dials([dial("distributed", 1)], path, "title")
    file_size(None)
    assert not list(tmp_path.iterdir())


LAYER = {"locality": 0, "fidelity": 1, "entropy": 1}


def dial(name, ratio, text=None, floor=1.0, **layer):
    """A row of a dial sweep, as far as a figure shows it."""
    return {
        **{"schedule": name, "floor": floor, "ratio": ratio, "text": text},
        **{"perplexity": 9 * ratio, "layers": [LAYER | layer]},
    }


def group(name, ratio, partition="semantic", schedule="quintic", half=0.001):
    """A group of a sweep, as far as a figure shows it."""
    row = {"ratio": ratio, "low": ratio - half, "high": ratio + half}
    row["text"] = [ratio - 3 * half, ratio + 2 * half]
    shown = {"name": name, "schedule": schedule, "blocks": partition, "vs_distributed": row}
    curves, runs = [[(0, 2.0), (1, 1.0)]], [{"layers": [LAYER, LAYER]}]
    return {**shown, "config": {"partition": partition}, "runs": runs, "curves": curves}


@pytest.mark.parametrize("name", ["caf\udce9", "$\\x$", "a\x00b\x1b\u202e", "語🧠"])
def test_any_name_can_be_part_of_a_figure(tmp_path, name):
    pieces, back = [name.encode(errors="surrogateescape"), b" $\\y$", b"\x00 "], np.arange(3)
    maps = [np.tri(3) / [[1], [2], [3]]] * 2
    stretch = plots.Stretch(pieces, back, np.tri(3, dtype=bool), maps)
    plots.draw_attention(stretch, *[[LAYER]] * 3, tmp_path / "a.svg", name)
    for floors in ([1], [0.5, 1]):
        rows = [dial(name, 1, floor=f) for f in floors]
        plots.draw_dials(rows, tmp_path / f"{len(floors)}.svg", name)
    plots.draw_loss([{"step": 1, "loss": 1, "lr": 1}], tmp_path / "l.svg", name)
    groups = [group(name, x, blocks, name) for x, blocks in ((1, name), (2, "block:8"), (3, "x"))]
    plots.draw_sweep(groups, tmp_path)
    paths = list(tmp_path.glob("*.svg"))
    assert len(paths) == 8
    for path in paths:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize(
    "ratios", [[], [1], [1.0001, 1.0002], [0.993], [1.18, 0.99], [7.5], [1e4], [0, math.exp(700)]]
)
def test_an_axis_of_ratios_is_logarithmic_holds_them_all_and_spans_2_percent(ratios, axis):
    fig, ax = plots.panels(1, 1, 4, 4)
    plots.ratio_axis(ax, axis, ratios)
    low, high = getattr(ax, f"get_{axis}lim")()
    assert getattr(ax, f"get_{axis}scale")() == "log" and high / low > 1.01999
    assert all(low < x < high for x in np.clip([1, *ratios], 1e-90, 1e90))
    ticks = getattr(ax, f"get_{axis}ticks")()
    labels = [label.get_text() for label in getattr(ax, f"get_{axis}ticklabels")()]
    assert 2 <= len(ticks) < 12 and len(set(labels)) == len(ticks)
    assert [float(label) for label in labels] == pytest.approx(ticks, rel=1e-5)
    plots.pyplot().close(fig)


def rows_of_figure(fig):
    """{title of a panel: the names on its rows, from the top}, of a figure that is closed."""
    panels = [ax for ax in fig.axes if ax.get_yticklabels()]
    names = {ax.get_title("left"): [x.get_text() for x in ax.get_yticklabels()] for ax in panels}
    assert all(ax.get_ylim()[0] > ax.get_ylim()[1] for ax in fig.axes)
    plots.pyplot().close(fig)
    return names


def test_every_dial_is_a_row_with_its_interval_the_cheapest_at_the_top():
    rows = [dial("distributed", 1, [1, 1]), dial("localist", 1.2, [1.1, 1.3], locality=1)]
    rows += [dial("$\\new$", 1.1, None, locality=0.3), dial("reversed", 0.99, [0.98, 1.0])]
    fig = plots.draw_floor(rows)
    left, right = fig.axes
    drawn = [sorted(set(line.get_xdata())) for line in left.lines if len(line.get_xdata()) == 2]
    assert drawn[:4] == [[0.98, 1.0], [1], [1.1], [1.1, 1.3]]
    assert [text.get_text() for text in right.texts] == ["0.00", "0.00", "0.30", "1.00"]
    assert [bar.get_width() for bar in right.patches] == [0, 0, 0.3, 1]
    assert rows_of_figure(fig)[""] == ["reversed", "distributed", "$\\new$", "localist"]


def test_several_floors_are_curves_with_their_floors_and_intervals():
    rows = [dial("distributed", 1, [1, 1])]
    rows += [dial("localist", 1 + f, [1, 1 + 2 * f], f, locality=f) for f in (1, 0.25, 0.5)]
    rows += [dial("quintic", 1, None, f, locality=f / 4) for f in (0.25, 0.5, 1)]
    fig = plots.draw_floors(rows)
    for ax in fig.axes:
        assert ax.get_yscale() == "log" and [len(line.get_xdata()) for line in ax.lines] == [
            1,
            4,
            4,
        ]
        bars = [bar.tolist() for bar in ax.collections[1].get_segments()]
        assert [[y for _, y in bar] for bar in bars] == [[1, 1], [1, 1.5], [1, 2], [1, 3]]
    texts = [(text.get_text(), text.xy) for text in fig.axes[0].texts]
    assert texts == [(f"floor {f:g}", (f, 1 + f)) for f in (0.25, 0.5, 1)]
    plots.pyplot().close(fig)


def test_every_group_of_a_sweep_is_a_row_and_open_and_closed_blocks_are_apart():
    kinds = ["semantic", "window:9", "semantic+window:9", "shifted:9", "semantic:closed"]
    kinds += ["sentence", "block:9", "aligned:9", "document"]
    groups = [group(f"localist, {x}", 2 - i / 10, x) for i, x in enumerate(kinds)]
    names = rows_of_figure(plots.draw_ratios([*groups, group("base", 1, schedule="distributed")]))
    expected = [f"localist, {x}" for x in kinds[::-1]]  # the last is the cheapest
    assert names == {"open blocks": expected[5:], "closed blocks": expected[:5]}
    assert list(rows_of_figure(plots.draw_ratios(groups[:2]))) == ["open blocks"]


def test_beside_every_ratio_is_the_locality_of_every_layer():
    groups = [group(name, 1.1, schedule=name) for name in ("quintic", "reversed")]
    for g, locality in zip(groups, ([0, 0.5, 1], [1, 0.5, 0])):
        g["runs"][0]["layers"] = [{"locality": x} for x in locality]
    fig = plots.draw_ratios(groups)
    *_, texts = fig.axes[0].collections
    ends = [[x for x, _ in segment] for segment in texts.get_segments()]
    assert ends == pytest.approx(np.array([[1.097, 1.102]] * 2))
    cells = [np.ravel(mesh.get_array()).tolist() for mesh in fig.axes[1].collections]
    assert cells == [[0, 0.5, 1], [1, 0.5, 0]]
    plots.pyplot().close(fig)


@pytest.mark.parametrize(
    "schedules, shown",
    [
        (SCHEDULES, ["distributed", "quintic", "localist", "reversed"]),
        (["linear", "cubic"], ["linear", "cubic"]),
        (
            ["linear", "cubic", "quartic", "new", "quintic"],
            ["quintic", "linear", "cubic", "quartic"],
        ),
    ],
)
def test_at_most_four_schedules_are_compared_layer_by_layer(schedules, shown):
    fig = plots.draw_layers([group(x, 1, schedule=x) for x in schedules], "name")
    for ax in fig.axes:
        assert [line.get_label() for line in ax.lines] == shown
    plots.pyplot().close(fig)


def test_the_tradeoff_explains_its_colors_and_its_markers(tmp_path):
    names, series = ["distributed", "quintic", "localist"], ["semantic", "block:8"]
    groups = [group("x", 1.1, blocks, name) for name in names for blocks in series]
    fig = plots.draw_tradeoff(groups, names, series)
    keys = {x.get_title().get_text(): [y.get_text() for y in x.get_texts()] for x in fig.legends}
    assert keys == {"color: schedule": names, "marker: blocks": series}
    plots.pyplot().close(fig)


METRICS_ROWS = [{"step": 0, "val_loss": 5.0}]
METRICS_ROWS += [{"step": step, "loss": 4 - step / 10, "lr": 1e-3} for step in (10, 20, 30)]
METRICS_ROWS += [{"step": 20, "val_loss": 2.0}, {"step": 30, "val_loss": 2.5}]


@pytest.mark.parametrize(
    "rows, loss, val_loss, best",
    [
        ([], [], [], None),
        (METRICS_ROWS[:1], [], [(0, 5)], "best: 5.000 at step 0"),
        (METRICS_ROWS[1:2], [(10, 3)], [], None),
        (METRICS_ROWS, [(10, 3), (20, 2), (30, 1)], [(0, 5), (20, 2), (30, 2.5)], "at step 20"),
        # steps 20 and 30 were repeated
        ([*METRICS_ROWS, {"step": 20, "loss": 9, "lr": 1}], [(10, 3), (20, 9), (30, 1)], ..., ""),
    ],
)
def test_the_losses_of_a_run_are_drawn(monkeypatch, rows, loss, val_loss, best):
    figures = []
    monkeypatch.setattr(plots, "finish", lambda fig, *_: figures.append(fig))
    plots.draw_loss(rows, Path("loss.png"), "a run")
    (fig,) = figures
    drawn = [[*zip(*line.get_data())] for line in fig.axes[0].lines]
    assert drawn[0] == loss and (val_loss is ... or drawn[1] == val_loss)
    labels = [line.get_label() for line in fig.axes[0].lines]
    assert len(labels) == 2 if best is None else best in labels[2]
    assert [*fig.axes[1].lines[0].get_xdata()] == [step for step, _ in loss]
    plots.pyplot().close(fig)


def test_every_schedule_is_drawn_also_one_that_was_added(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "septic", 7)
    figures = []
    monkeypatch.setattr("experiments.schedules.finish", lambda fig, *_: figures.append(fig))
    draw_schedules(Path("schedules.png"))
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.texts] == [*SCHEDULES]
    for text, line in zip(ax.texts, ax.lines):  # each at its own curve
        assert text.xy in zip(*line.get_data()) and text.get_color() == line.get_color()
    assert ax.lines[-1].get_ydata()[5] == pytest.approx((5 / 11) ** 7)
    plots.pyplot().close(figures[0])


def test_the_models_that_are_tested_are_highlighted(monkeypatch):
    figures, names = [], ["distributed", "quintic semantic", "reversed", "x", "y"]
    monkeypatch.setattr(faithful_report, "finish", lambda fig, *_: figures.append(fig))
    models = [{"name": name, "mass": np.ones((2, 14, 2)) * 500} for name in names]
    study = {"first": "quintic semantic", "second": ["distributed", "reversed"]}
    faithful_report.draw_pointers({"models": models, "study": study}, Path("p.png"))
    for ax in figures[0].axes:
        lines = {x.get_label(): x for x in ax.lines if x.get_label() in names}
        colors = [lines[name].get_color() for name in names]
        assert len(set(colors)) == 4 and colors[3] == colors[4] == "#a0a0a0"
        assert len({line.get_marker() for line in lines.values()}) == 5
    plots.pyplot().close(figures[0])


# --------------------------------------------------------------------------------------------------
# attention between words


def test_attention_between_words_is_a_mean_over_queries_of_sums_over_keys():
    rng = np.random.default_rng(0)
    for _ in range(30):
        T = int(rng.integers(1, 30))
        first = np.array([0, *np.flatnonzero(rng.random(T - 1) < 0.4) + 1])
        a = rng.random((T, T)) * np.tri(T)
        a /= a.sum(1, keepdims=True)
        joined, edges = join_attention(a, first), [*first, T]
        assert joined.shape == (len(first), len(first))
        assert joined.sum(1) == pytest.approx(1)
        for i, query in enumerate(itertools.pairwise(edges)):
            for j, key in enumerate(itertools.pairwise(edges)):
                rows = [sum(a[x, y] for y in range(*key)) for x in range(*query)]
                assert joined[i, j] == pytest.approx(np.mean(rows))


TEXT = "It was  late.\n\nNobody had come, and extraordinarily long words were said. " * 3


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("text, spaces", [(TEXT, True), ("語" * 60, False), (" " * 70, False)])
def test_groups_of_words_hold_whole_words_if_there_are_any(text, spaces, size):
    text = text.encode()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    first = join_words(pieces, most=20)
    assert first[0] == 0 and (np.diff(first) > 0).all() and len(first) <= 21
    assert len(first) > 4 and np.diff(first, append=len(pieces)).max() <= 4 * len(pieces) / 20 + 1
    if spaces and size == 1:
        for i in first[1:]:
            assert pieces[i].isspace() and not pieces[i - 1].isspace()


def test_the_stretch_in_which_blocks_hide_most_is_found():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, T = int(rng.integers(1, 60)), int(rng.integers(1, 40))
        start = np.maximum.accumulate(np.where(rng.random(n) < 0.1, np.arange(n), 0))
        start = np.maximum.accumulate(start - rng.integers(0, 3, n)).clip(0)
        T, shares = min(T, n), []
        for at in range(n - T + 1):
            pairs = [(i, j) for i in range(at, at + T) for j in range(at, i)]
            shares.append(np.mean([j < start[i] for i, j in pairs] or [0]))
        at, share = most_hidden(np.arange(n) - start, T)
        assert share == pytest.approx(max(shares)) and shares[at] == pytest.approx(share)


@pytest.mark.parametrize("T", [1, 40, 100, 512, 10**4])
@pytest.mark.parametrize("n", [2, 60, 700])
def test_a_stretch_begins_with_a_word_and_shows_a_change_of_the_block(n, T):
    letters = (TEXT * 3).encode()[:n]
    tokens, vocabulary = np.frombuffer(letters, np.uint8), [bytes([i]) for i in range(256)]
    lookback = (np.arange(n) % 30).astype(np.uint16)
    at, size = choose_stretch(tokens, lookback, vocabulary, 1000, T)
    assert 0 <= at <= n - size and size <= T and (size == min(n, T) or 100 < size < 500)
    assert at == 0 or letters[at : at + 1].isspace() and not letters[at - 1 : at].isspace()
    assert size < 100 or most_hidden(lookback, size)[1] > 0.5


def results_of(**changes):
    """results.json of a run, as far as the report of a sweep reads it."""
    layer = dict.fromkeys(("locality", "fidelity", "entropy"), 1.0)
    results = {"seed": 1, "layers": [layer], "by_context": [[1.0, 2]], "reach": None}
    results |= dict.fromkeys(("perplexity", "accuracy", "bits_per_byte", "tokens", "loss"), 1)
    results |= dict.fromkeys(("date", "commit", "code", "device", "torch", "source_sha256"), "")
    results |= {"mean_lookback": 1, "blocks": {"mean_lookback": 1, "forced": 0.125}}
    return {**results, "config": asdict(Config(schedule="localist")), **changes}


def write_run(folder, metrics='{"step": 0, "val_loss": 1}', **changes):
    """A finished cell of a sweep, as far as the report reads it."""
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results_of(**changes)))
    (folder / "metrics.jsonl").write_text(metrics)


WRONG = {"by_context": [None, [], [[1, 2], [3]], [["a", 1]], [[1, 0]], [[1, True]]]}
WRONG |= {"blocks": [5, {}, {"mean_lookback": "1"}, {"mean_lookback": 1, "forced": "x"}]}
WRONG |= {"reach": [{}, 3, {"median": None}], "seed": [2, 1.0, None]}
WRONG |= {"layers": [[], [[]], {}, [{"locality": 1, "fidelity": 1, "entropy": None}]]}
WRONG |= {"loss": ["1", None, True, math.nan, math.inf, -1, -1e308], "torch": [2]}
WRONG |= {"config": [{}, [], {"schedule": "localist"}]}
WRONG["config"] += [
    {**results_of()["config"], **change}
    for change in ({"schedule": 3}, {"floor": 2}, {"n_layer": 2}, {"source": None}, {"x": 1})
]


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_of()))
    assert read_results(path, Config) == {**results_of(), "folder": tmp_path}
    texts = [json.dumps(results_of(**{key: x})) for key, values in WRONG.items() for x in values]
    lacking = [{k: v for k, v in results_of().items() if k != key} for key in results_of()]
    texts += [json.dumps(results) for results in lacking]
    for text in (*texts, texts[0].replace("1.0", "1e400"), "{", "[]", "[" * 10**5, "9" * 5000):
        path.write_text(text)
        with pytest.raises(InputError, match="results.json is damaged; delete .*results.json and"):
            read_results(path, Config)


METRICS = ["{", "[]", "3", '["val_loss"]', '{"val_loss": 1}', '{"step": 1}', "[" * 10**5]
METRICS += [f'{{"step": {step}, "val_loss": 1}}' for step in ("1e400", "1.5", '"1"', -1, "null")]
METRICS += [f'{{"step": 1, "val_loss": {loss}}}' for loss in ("NaN", "1e400", -1, '"1"', "true")]


@pytest.mark.parametrize("metrics", METRICS)
def test_a_cell_with_damaged_metrics_is_named_and_the_others_are_read(tmp_path, metrics):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", metrics=metrics, seed=2, config=asdict(Config(seed=2)))
    runs, broken = read_runs(tmp_path, Config)
    assert [run["folder"].name for run in runs] == ["a"] and list(broken) == ["b"]
    assert "metrics.jsonl is damaged; delete" in broken["b"]


def test_a_copy_of_a_cell_is_not_counted_twice(tmp_path):
    for name in "ab":
        config = Config(schedule="localist", out=f"runs/{name}")
        write_run(tmp_path / name, config=asdict(config))
    runs, broken = read_runs(tmp_path, Config)
    assert len(runs) == 1 and list(broken) == ["b"] and "the same config as" in broken["b"]
    assert read_runs(tmp_path, Config, without={"a"})[1] == {}


def test_runs_that_name_the_same_files_differently_are_one_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for seed, prefix in enumerate(("", "./", f"{tmp_path}/", f"{tmp_path}/link/")):
        names = {"source": prefix + "a.txt", "init_from": prefix + "runs/base", "out": prefix + "x"}
        config = Config(**names, seed=seed, data=prefix + "d", schedule="localist")
        write_run(tmp_path / str(seed), seed=seed, config=asdict(config))
    groups, keys = collect(read_runs(Path(), Config)[0])
    assert keys == [] and [len(g["runs"]) for g in groups] == [4]
    assert groups[0]["config"]["init_from"] == "runs/base"
    for source in ("https://example.org/a//b", ["gutenberg:1", "gpt2"], "/elsewhere/book.txt"):
        assert canonical({"source": source, "data": "", "init_from": "gpt2"})["source"] == source


def test_runs_with_fewer_layers_than_the_others_are_a_group_of_their_own(tmp_path):
    layer = dict.fromkeys(("locality", "fidelity", "entropy"), 1.0)
    for seed in (1, 2):
        config = asdict(Config(schedule="localist", seed=seed))
        write_run(tmp_path / str(seed), seed=seed, layers=[layer] * seed, config=config)
    groups, keys = collect(read_runs(tmp_path, Config)[0])
    assert keys == ["n_layer"] and [len(g["runs"]) for g in groups] == [1, 1]


def test_a_loss_may_be_larger_than_e_to_its_power_can_be():
    row = paired({1: 5000.0, 2: 4000.0}, {1: 1.0, 2: 2.0}, ratio=True)
    assert row["ratio"] == row["high"] == math.exp(700) and row["low"] == 0


def rows_of(text, column, value):
    """The rows of a report's tables, as dicts, whose `column` is `value`."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    header, rows = None, []
    for line, after in zip(lines, [*lines[1:], [""]]):
        header = line if after[0].startswith("---") else header
        rows.append(dict(zip(header, line)))
    return [row for row in rows if row.get(column) == value]


def test_a_window_under_several_caps_counts_once_per_seed(tmp_path):
    """Its models are the same, so the intervals must not take them for more seeds."""
    for number, (seed, cap) in enumerate(itertools.product((1, 2, 3), (64, 128))):
        for partition in ("semantic", "window:9"):
            config = Config(partition=partition, schedule="localist", max_lookback=cap, seed=seed)
            write_run(
                tmp_path / f"{partition[0]}{number}",
                config=asdict(config),
                seed=seed,
                loss=seed + (cap / 1000 if partition == "semantic" else 0),
            )
    groups = {group["name"]: group for group in collect(read_runs(tmp_path, Config)[0])[0]}
    seeds = {name: sorted(run["seed"] for run in group["runs"]) for name, group in groups.items()}
    assert len(seeds) == 3 and all(x == [1, 2, 3] for x in seeds.values()), seeds


def test_rivals_are_compared_with_the_blocks_that_reach_back_as_far(tmp_path):
    """Semantic and closed blocks in one sweep, each with rivals of its own mean lookback."""
    means = {"semantic": 60, "window:61": 60, "aligned:118": 61, "shifted:400": 60, "document": 90}
    means |= {"semantic:closed": 40, "window:41": 40, "block:81": 40, "block:95": 47}
    cells = [(partition, mean, 200) for partition, mean in means.items()]
    # another cap, under which semantic blocks hardly differ; and a document that has more in sight
    cells += [("semantic", 58, 150), ("window:59", 58, 150), ("document", 70, 150)]
    cells += [("block:129", 64, 150)]  # more than 5 % from all of them
    for number, (partition, mean, cap) in enumerate(cells):
        losses = np.random.default_rng(number).normal(10 * (1 + number), 3, 25)
        write_run(
            tmp_path / str(number),
            config=asdict(Config(partition=partition, schedule="localist", max_lookback=cap)),
            loss=1 + number,
            blocks={"mean_lookback": mean, "forced": 0.125},
            mean_lookback=mean + 2,
            reach={"median": 77.0, "most": 99},
            by_context=[(nats, 10) for nats in losses],
        )
    groups, keys = collect(read_runs(tmp_path, Config)[0])
    pairs = comparisons(groups, keys)
    rows = [tuple(row[k].removeprefix("localist, ") for k in ("first", "second")) for row in pairs]
    same = [name + ", max_lookback 200" for name in ("shifted:400", "document", "semantic:closed")]
    same.append("aligned:118, max_lookback 200")  # whose cap decided some starts
    assert len(rows) == 12 and set(rows) == {
        *(("semantic, max_lookback 200", rival) for rival in ("window:61", same[3], *same[:3])),
        *((same[2], rival) for rival in ("window:41", "block:81", same[1])),
        ("semantic, max_lookback 150", "window:59"),
        ("semantic, max_lookback 150", "document, max_lookback 150"),
        ("semantic, mean of 2", "window, the same"),
        ("semantic, mean of 2", "document, the same"),
    }
    mean = pairs[rows.index(("semantic, mean of 2", "window, the same"))]
    assert mean["ratio"] == pytest.approx(math.exp(-1))
    # over the text: the mean over both pairs, in the same resampled contexts
    of = lambda i: np.random.default_rng(i).normal(10 * (1 + i), 3, 25) / 10  # nats per token
    names = [partition for partition, *_ in cells]
    first, second = (
        [i for i, name in enumerate(names) if name in kinds]
        for kinds in (("semantic",), ("window:61", "window:59"))
    )
    difference = (sum(map(of, first)) - sum(map(of, second))) / 2
    text = np.exp(np.percentile(bootstrap_weights(25) @ difference / 25, (2.5, 97.5)))
    assert mean["text"] == pytest.approx(text.tolist())
    text = report_text(groups, pairs, {})
    (row,) = rows_of(text, "configuration", "localist, window:41")
    assert row["mean lookback, tokens: training"] == "40" and row["test"] == "42"
    assert row["reach, tokens (median)"] == "77" and row["starts forced by the cap, %"] == "12.5"
    assert row["fidelity: last layer"] == "1.000" and row["seeds"] == "1"
    row = rows_of(text, "first", "localist, semantic, max_lookback 200")[0]
    assert row["second"] == "localist, window:61"
    low, high = map(float, row["95 % over the text"].split(" … "))
    ratio = float(row["perplexity, first to second [95 %]"])
    assert ratio == pytest.approx(math.exp(-1), 1e-3) and low < ratio < high < 2 * low


def printed_report(folder, monkeypatch, capsys):
    """What the report of the cells in a folder, a relative path, prints and writes: (the rows of
    the table, the lines below it, table.md). A row may have several lines."""
    monkeypatch.setattr("report.sweep.draw_sweep", lambda *args: [Path("ratio.png")])
    write_report(folder, read_runs(folder, Config)[0])
    table, notes = capsys.readouterr().out.split("\n\n", 1)
    return re.split(r"\n(?! )", table), notes.splitlines(), (folder / "table.md").read_text()


NAMED = {"short": [{"floor": 0.5}, {"floor": 1.0}]}
NAMED["long"] = [{"init_from": "runs/" + "x" * 90 + end, "block_size": 64} for end in "ab"]
NAMED["different in the middle"] = [
    {"init_from": f"runs/{name}/{'a long name' * 9}", "max_lookback": cap}
    for name in ("one", "two")
    for cap in (200, 768)
]


@pytest.mark.filterwarnings("ignore:overflow")  # of the standard deviation
@pytest.mark.parametrize("losses", [(3.6, 3.6), (12.5, 1), (700, 690)])
@pytest.mark.parametrize("changes", NAMED.values(), ids=NAMED)
def test_the_printed_table_has_100_columns_and_a_row_for_every_configuration(
    tmp_path, monkeypatch, capsys, changes, losses
):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    cells = itertools.product(["distributed", "localist"], changes, [1, 2])
    for number, (schedule, change, seed) in enumerate(cells):
        loss = losses[1] if schedule == "distributed" else losses[0] - seed
        changed = {"config": asdict(Config(schedule=schedule, seed=seed, **change)), "loss": loss}
        changed |= {"seed": seed, "perplexity": math.exp(loss)}
        write_run(Path("runs", str(number)), **changed)
    rows, notes, text = printed_report(Path("runs"), monkeypatch, capsys)
    lines = [line for row in (*rows, *notes) for line in row.splitlines()]
    assert max(map(len, lines)) <= 100 and len(text.splitlines()) > 20
    names = [re.sub(r"  +2  .*", "", row) for row in rows[1:]]
    assert len(set(names)) == len(names) == 2 * len(changes)
    for name, line in zip(names, text.splitlines()[2:]):
        assert "".join(name.split()) == "".join(line.split(" | ")[0].strip("| ").split())
    assert notes[-2:] == [
        "all columns and comparisons: runs/table.md",
        "in the same folder: table.json, ratio.png",
    ]


def test_the_ratios_of_the_paper_are_beside_those_of_its_schedules(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in SCHEDULES:
        write_run(Path(name), config=asdict(Config(schedule=name)))
    rows, notes, text = printed_report(Path(), monkeypatch, capsys)
    ratios = {"distributed": ["1", "1"], "localist": ["6.6", "–"], "quintic": ["1.89", "near 1"]}
    assert re.split("  +", rows[0])[-2:] == ["paper: v1", "v2, v3"]
    assert any("earlier" in line for line in notes) and "quotes the 6.6" in text
    for row in rows[1:]:
        name, *_, v1, v2 = re.split("  +", row)
        assert [v1, v2] == ratios.get(name.split(",")[0], ["–", "–"])
        (row,) = rows_of(text, "configuration", name)
        assert (row["the paper's ratio: v1"], row["v2, v3"]) == (v1, v2)
    assert len(rows) == len(SCHEDULES) + 1


@pytest.mark.parametrize(
    "codes, commits, says",
    [
        ("aa aa", "one two", None),
        ("aa bb", "one two", "2 versions of the code (commits one, two)."),
        ("aa aa+bb", "one one", "2 versions of the code (commit one)."),
        ("aa+bb bb+cc", "one two", "3 versions of the code (commits one, two)."),
    ],
)
def test_a_report_of_several_versions_of_the_code_says_so(
    tmp_path, monkeypatch, capsys, codes, commits, says
):
    monkeypatch.chdir(tmp_path)
    for seed, (code, commit) in enumerate(zip(codes.split(), commits.split())):
        changes = {"seed": seed, "config": asdict(Config(seed=seed))}
        write_run(Path(str(seed)), code=code, commit=commit, **changes)
    _, notes, text = printed_report(Path(), monkeypatch, capsys)
    for lines in (notes, text.splitlines()):
        said = [line for line in lines if "versions of the code" in line]
        assert said == ([f"These runs were made by {says}"] if says else [])
    runs = json.loads(Path("table.json").read_text())["configurations"][0]["runs"]
    assert [run["code"] for run in runs] == codes.split()


def test_distributed_runs_that_were_measured_in_different_blocks_have_different_names(tmp_path):
    for number, (schedule, partition) in enumerate(
        itertools.product(["distributed", "localist"], ["semantic", "window:9"])
    ):
        config = asdict(Config(schedule=schedule, partition=partition))
        write_run(tmp_path / str(number), config=config)
    groups, _ = collect(read_runs(tmp_path, Config)[0])
    assert [group["name"] for group in groups] == [
        *("distributed, partition semantic", "distributed, partition window:9"),
        *("localist, semantic", "localist, window:9"),
    ]
