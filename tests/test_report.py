"""Statistics are what they say, tables are tables, and a sweep compares what can be compared."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from report.plots import draw_attention, draw_dials, look
from report.stats import holm, mean_interval, paired, resampled_losses, sign_flip_p
from report.sweep import (
    canonical,
    collect,
    comparisons,
    read_results,
    read_runs,
    report_text,
)
from report.tables import aligned, markdown, plus_minus, with_interval
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
    assert plus_minus([1, 3], 1) == "2.0 ± 1.4" and plus_minus([1], 2) == "1.00"
    assert plus_minus([1, 3], 1, interval=True) == "2.0 ± 12.7"
    row = paired({1: 1.0, 2: 3.0}, {1: 0.0, 2: 0.0})
    assert with_interval(row, 1) == "2.0 [-10.7, 14.7]" and with_interval(None, 1) == "–"
    many = paired(dict.fromkeys(range(21), 1.0), {seed: seed for seed in range(21)}, ratio=True)
    assert "| – |" in report_text([], [{"first": "a", "second": "b", **many}], {})


def test_every_series_has_a_marker_of_its_own():
    series = [f"block:{n}" for n in range(14)]
    assert len({look(series, blocks)[0] for blocks in series}) == 14


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_on_a_full_disk_is_one_line(tmp_path, file_size, suffix):
    path = tmp_path / f"f.{suffix}"
    row = {"schedule": "distributed", "ratio": 1, "layers": results_of()["layers"]}
    file_size(1000)
    with pytest.raises(InputError, match=f"f.{suffix}: could not be written"):
        draw_dials([row], path, "title")
    file_size(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["caf\udce9", "$\\x$", "a\x00b\x1b\u202e", "語🧠"])
def test_any_name_can_be_part_of_a_figure(tmp_path, name):
    layer = {"locality": 0, "fidelity": 1, "pointer_accuracy": 1, "entropy": 1}
    maps, start = {0: np.eye(9)}, np.array([0, 0, 0, 3, 3, 3, 3, 3, 3])
    draw_attention(maps, start, {3: name}, [layer], tmp_path / "f.svg", name)
    draw_dials([{"schedule": name, "ratio": 1, "layers": [layer]}], tmp_path / "g.svg", name)
    for path in tmp_path.iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def results_of(**changes):
    """results.json of a run, as far as the report of a sweep reads it."""
    layer = dict.fromkeys(("locality", "fidelity", "entropy"), 1.0)
    results = {"seed": 1, "layers": [layer], "by_context": [[1.0, 2]], "reach": None}
    results |= dict.fromkeys(("perplexity", "accuracy", "bits_per_byte", "tokens", "loss"), 1)
    results |= dict.fromkeys(("date", "commit", "device", "torch", "source_sha256"), "")
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
    assert len(rows) == 12 and set(rows) == {
        *(("semantic, max_lookback 200", rival) for rival in ("window:61", "aligned:118", *same)),
        *((same[2], rival) for rival in ("window:41", "block:81", same[1])),
        ("semantic, max_lookback 150", "window:59"),
        ("semantic, max_lookback 150", "document, max_lookback 150"),
        ("semantic, mean of 2", "window, the same"),
        ("semantic, mean of 2", "document, the same"),
    }
    mean = pairs[rows.index(("semantic, mean of 2", "window, the same"))]
    assert mean["ratio"] == pytest.approx(math.exp(-1)) and mean["text"] is None
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
