"""A sweep runs each cell once and says which one broke; its statistics are what they say."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, script_here
from forks import children, started
from prepare_data import read_meta
from support.files import InputError
from support.plots import look
from support.report import (
    collect,
    comparisons,
    interval,
    markdown,
    over_text,
    paired,
    read_results,
    sign_flip_p,
)
from support.settings import ADDED, RETIRED, to_toml
from sweep import read_cells, run_cell
from train import Config, read_values

TINY = {
    "source": str(ROOT / "data" / "sample.txt"),
    "tokenizer": "bytes",
    "max_lookback": 100,
    "block_size": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 2,
    "max_steps": 3,
    "eval_interval": 3,
    "eval_contexts": 2,
    "compile": False,
    "out": "sweep",
}


def test_intervals_are_students_and_hold_the_mean_as_often_as_they_say():
    assert interval([4.0]) == (4.0, None, None)
    mean, sd, half = interval([1.0, 2.0, 4.0])
    assert (mean, sd) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert half == pytest.approx(4.303 * sd / math.sqrt(3))
    for n in (2, 5, 12):
        draws = np.random.default_rng(n).normal(3, 2, (2000, n))
        holds = sum(abs(mean - 3) <= half for mean, _, half in map(interval, draws)) / 2000
        assert 0.935 < holds < 0.965


MANY = [{seed: 1 + seed * step for seed in range(21)} for step in (0.1, 0.2)]  # 21 seeds


def test_the_permutation_test_is_exact():
    assert sign_flip_p([1, 2, 3]) == 0.25
    assert sign_flip_p([1, -1]) == 1
    assert sign_flip_p([0, 0, 0]) == 1
    d = np.random.default_rng(0).normal(0.4, 1, 7)
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=7)]
    assert sign_flip_p(d) == pytest.approx(np.mean([m >= abs(d.mean()) - 1e-12 for m in means]))
    assert sign_flip_p(d) == sign_flip_p(-d)
    assert sign_flip_p(range(21)) is None
    assert "| – |" in markdown([], [{"first": "a", "second": "b", **paired(*MANY)}], {})


def test_every_kind_of_blocks_has_a_sign_of_its_own():
    kinds = [f"block:{n}" for n in range(14)]
    assert len({look(kinds, kind)[0] for kind in kinds}) == 14


def test_pairs_share_their_seeds():
    row = paired({1: 1.0, 2: 2.0, 3: 9.0}, {1: 0.9, 2: 1.8, 4: 7.0})
    assert row["seeds"] == 2
    assert row["ratio"] == pytest.approx(math.exp(0.15))
    assert row["p"] == row["p_least"] == 0.5
    assert row["low"] < row["ratio"] < row["high"]
    assert paired({1: 1.0}, {2: 1.0}) is None and paired({1: 1.0}, {1: 1.0})["low"] is None
    same = paired({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})
    assert same["low"] == same["ratio"] == same["high"] == 1


def test_the_interval_over_the_text_holds_the_truth_as_often_as_it_says():
    """Contexts are drawn; the true ratio is e ** 0.02."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(100, 400, 60)
        nats = rng.normal(3, 0.5, 60) * tokens
        more = (0.02 + rng.normal(0, 0.05, 60)) * tokens
        a, b = (
            [
                {"seed": s, "by_context": list(zip((n + rng.normal(0, 1, 60)), tokens))}
                for s in (1, 2)
            ]
            for n in (nats + more, nats)
        )
        low, high = over_text(a, b)
        held += low <= math.exp(0.02) <= high
    assert 180 <= held < 200
    # both ends, of seeds that differ
    a, b = (
        [{"seed": s, "by_context": [(x, 9)] * 4 + [(0, 9)] * 16} for s in (1, 2)] for x in (9, 0)
    )
    a[1]["by_context"] = [(27, 9)] * 4 + [(0, 9)] * 16  # 18 of 20 x 9, on average
    share = np.random.default_rng(5).binomial(20, 0.2, 200_000) * 18 / 180
    expected = np.exp(np.percentile(share, (2.5, 97.5)))
    assert over_text(a, b) == pytest.approx(expected, abs=0.02)
    b[1]["by_context"] = b[1]["by_context"][:-1]  # another text
    assert over_text(a, b) is None
    assert over_text(a[:1], b[1:]) is None and over_text([{"seed": 1}], [{"seed": 1}]) is None


@pytest.mark.parametrize(
    "key, value",
    [("by_context", None), ("by_context", [[1, 2], [3]]), ("by_context", ["a"]), ("blocks", 5)],
)
def test_damaged_results_are_named(tmp_path, key, value):
    layer = dict.fromkeys(("locality", "fidelity", "entropy"), 1.0)
    results = {"seed": 1, "layers": [layer], "config": asdict(Config(**TINY))}
    results |= dict.fromkeys(("loss", "perplexity", "accuracy", "bits_per_byte", "tokens"), 1)
    results |= dict.fromkeys(("date", "commit", "device", "torch"), "")
    (tmp_path / "results.json").write_text(json.dumps(results))
    read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps({**results, key: value}))
    with pytest.raises(InputError, match="is damaged"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize("old", [0, 1, 2])
def test_a_rival_is_compared_with_the_blocks_that_it_was_matched_to(tmp_path, old):
    """`old`: seeds up to this one are of commit 2c59031, whose configs had two keys more."""
    for cap, window in ((64, "window:30"), (128, "window:60")):
        for partition in ("semantic", window):
            for seed in (1, 2):
                how = {"max_lookback": cap, "partition": partition, "schedule": "localist"}
                config = Config(**{**TINY, **how, "seed": seed})
                folder = tmp_path / f"{cap}.{partition}.{seed}"
                folder.mkdir()
                layer = dict.fromkeys(("locality", "fidelity", "entropy"), 1.0)
                config = asdict(config)
                if seed <= old:
                    config = {k: v for k, v in {**config, **RETIRED}.items() if k not in ADDED}
                results = {"seed": seed, "layers": [layer], "config": config}
                results |= dict.fromkeys(("perplexity", "accuracy", "bits_per_byte", "tokens"), 1)
                results |= dict.fromkeys(("date", "commit", "device", "torch"), "")
                results["loss"] = cap / 100 + len(partition) + seed
                (folder / "results.json").write_text(json.dumps(results))
    groups, keys = collect(tmp_path)
    rows = [(row["first"], row["second"]) for row in comparisons(groups, keys)]
    assert rows == [
        ("localist, semantic, max_lookback 128", "localist, window:60"),
        ("localist, semantic, max_lookback 64", "localist, window:30"),
        ("semantic, mean of 2", "window, the same"),
    ]


def rows_of(text, column, value):
    """The rows of a report's tables, as dicts, whose `column` is `value`."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    header, found = None, []
    for line, after in zip(lines, [*lines[1:], [""]]):
        header = line if after[0].startswith("---") else header
        found.append(dict(zip(header, line)))
    return [row for row in found if row.get(column) == value]


def test_rivals_are_compared_with_the_blocks_that_reach_back_as_far(tmp_path):
    """Semantic and closed blocks in one sweep, each with rivals of its own mean lookback."""
    means = {"semantic": 60, "window:61": 60, "aligned:118": 61, "shifted:400": 60, "document": 90}
    means |= {"semantic:closed": 40, "window:41": 40, "block:81": 40, "block:95": 47}
    cells = [(partition, mean, 200) for partition, mean in means.items()]
    # another cap, under which semantic blocks hardly differ; and a document that has more in sight
    cells += [("semantic", 58, 150), ("window:59", 58, 150), ("document", 70, 150)]
    cells += [("block:129", 64, 150)]  # more than 5 % from all of them
    for number, (partition, mean, cap) in enumerate(cells):
        how = {"partition": partition, "schedule": "localist", "max_lookback": cap}
        config = Config(**{**TINY, **how})
        layer = dict.fromkeys(("locality", "fidelity", "entropy"), 1.0)
        results = {"seed": 1, "layers": [layer], "config": asdict(config), "loss": 1 + number}
        results |= dict.fromkeys(("perplexity", "accuracy", "bits_per_byte", "tokens"), 1)
        results |= dict.fromkeys(("date", "commit", "device", "torch"), "")
        results["blocks"] = {"mean_lookback": mean, "forced": 0.125}
        results |= {"mean_lookback": mean + 2, "reach": {"median": 77.0, "most": 99}}
        losses = np.random.default_rng(number).normal(10 * (1 + number), 3, 25)
        results["by_context"] = [(nats, 10) for nats in losses]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.json").write_text(json.dumps(results))
    groups, keys = collect(tmp_path)
    pairs = comparisons(groups, keys)
    rows = {(row["first"], row["second"]) for row in pairs}
    rows = {tuple(name.removeprefix("localist, ") for name in row) for row in rows}
    same = [name + ", max_lookback 200" for name in ("shifted:400", "document", "semantic:closed")]
    assert {row for row in rows if "mean of" not in row[0]} == {
        *(("semantic, max_lookback 200", rival) for rival in ("window:61", "aligned:118", *same)),
        *((same[2], rival) for rival in ("window:41", "block:81", same[1])),
        ("semantic, max_lookback 150", "window:59"),
        ("semantic, max_lookback 150", "document, max_lookback 150"),
    }
    text = markdown(groups, pairs, {})
    (row,) = rows_of(text, "configuration", "localist, window:41")
    assert row["mean lookback, tokens: training"] == "40" and row["test"] == "42"
    assert row["reach, tokens (median)"] == "77" and row["starts forced by the cap, %"] == "12.5"
    assert row["fidelity: last layer"] == "1.000" and row["seeds"] == "1"
    row = rows_of(text, "first", "localist, semantic, max_lookback 200")[0]
    assert row["second"] == "localist, window:61"
    low, high = map(float, row["95 % over the text"].split(" … "))
    ratio = float(row["perplexity, first to second [95 %]"])
    assert ratio == pytest.approx(math.exp(-1), 1e-3) and low < ratio < high < 2 * low


def test_a_cell_that_was_begun_goes_on_only_as_what_it_was(tmp_path):
    cell = Config(**{**TINY, "out": str(tmp_path / "cell")})
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "last.pt").touch()
    (tmp_path / "cell" / "config.toml").write_text(
        to_toml(Config(**{**asdict(cell), "max_steps": 4, "learning_rate": 0.1}))
    )
    assert "another max_steps, learning_rate; delete it" in run_cell(cell, 1, None, set(), [])


@pytest.mark.parametrize("there", ["quickstart.toml", "distributed.toml", "model.py"])
def test_a_sweep_leaves_a_folder_of_something_else_alone(tmp_path, monkeypatch, capsys, there):
    monkeypatch.chdir(tmp_path)
    keys = [f"{key} = {json.dumps(value)}" for key, value in TINY.items()]
    lines = [*keys, "[[sweep]]", 'schedule = ["distributed"]', ""]
    Path("mine").mkdir()
    for path in (Path("sweep.toml"), Path("mine", there)):
        path.write_text("\n".join(lines))
    assert script_here("sweep.py", "sweep.toml", "--out", "mine") == 2
    assert "mine is not empty and holds no sweep" in capsys.readouterr().err
    Path("mine/other").mkdir()  # a sweep is there as well
    Path("mine/other/config.toml").touch()
    Path("mine/distributed.toml").write_text("\n".join(lines))
    cell = Config(**{**TINY, "out": "mine/distributed"})
    assert "was not made by sweep.py" in run_cell(cell, 1, None, set(), [])
    assert Path("mine/distributed.toml").read_text() == "\n".join(lines)


def test_a_cell_that_cannot_be_started_is_broken_and_the_others_go_on(tmp_path):
    cell = Config(**{**TINY, "out": str(tmp_path / "cell")})
    (tmp_path / "cell.log").mkdir()
    why = run_cell(cell, 1, None, set(), [])
    assert why.startswith("error: ") and "cell.log" in why


def test_matched_rivals_reach_back_as_far_as_the_semantic_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matched = ["window:matched", "block:matched", "aligned:matched"]
    found = []
    for like in ("semantic", "semantic:closed"):
        reach, sizes = [], []
        values = {**TINY, "max_lookback": 400, "sweep": [{"partition": [like, *matched]}]}
        for cell in read_cells(values).values():
            name = f"*.{cell.partition.replace(':', '')}.{cell.max_lookback}.*"
            (folder,) = Path("data").glob(name)
            reach.append(np.fromfile(folder / "train.lookback.bin", np.uint16).mean())
            assert read_meta(folder)["partition"] == cell.partition
            sizes.append(cell.partition.partition(":")[2])
        mean = round(reach[0].item())
        assert len(reach) == 4 and sizes[1:3] == [str(mean + 1), str(2 * mean + 1)]
        assert reach[1:3] == pytest.approx([reach[0]] * 2, abs=0.8)
        assert reach[3] == pytest.approx(reach[0], rel=0.05)
        found.append(reach[0])
    assert found[0] > found[1] + 4 > 20


@pytest.mark.parametrize(
    "sweep, says",
    [
        (None, "sweep"),
        ([], "sweep"),
        ({"seed": [1]}, "sweep"),
        ([{"seed": 1}], "list"),
        ([{"seed": []}], "list"),
        ([{"sched": ["quintic"]}], "sched"),
        ([{"out": ["a"]}], "out"),
        ([{"schedule": ["quintc"]}], "quintic"),
        ([{"partition": ["window:mached"]}], "partition"),
        ([{"partition": ["semantic", "semantic:closed", "window:matched"]}], "give each a table"),
        ([{"max_lookback": [20], "partition": ["aligned:matched"]}], "too long for aligned"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(tmp_path, monkeypatch, sweep, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        read_cells({**TINY, **({"sweep": sweep} if sweep is not None else {})})


def test_every_sweep_in_the_folder_is_understood():
    paths = sorted((ROOT / "configs").glob("sweep_*.toml"))
    assert len(paths) > 1
    for path in paths:
        values = read_values([str(path)], more=("sweep",))
        assert values["out"] == f"runs/{path.stem}"
        for table in values["sweep"]:
            assert table.keys() <= Config.__dataclass_fields__.keys()
            assert all(isinstance(choices, list) for choices in table.values())


class Forked(subprocess.Popen):
    """subprocess.Popen, which starts a cell of a sweep without importing torch anew."""

    def __init__(self, command, stdout=None, **how):
        self.fork = None
        if command[0] != sys.executable:
            return super().__init__(command, stdout=stdout, **how)
        self.args, self.stack = command, contextlib.ExitStack()
        self.fork = self.stack.enter_context(started(*command[1:], cwd=".", output=stdout.name))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.stack.close() if self.fork else super().__exit__(*error)

    def wait(self, timeout=None):
        if not self.fork:
            return super().wait(timeout)
        self.fork.join()
        return self.fork.exitcode

    def __del__(self):
        pass


def test_a_sweep_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes((ROOT / "data" / "sample.txt").read_bytes()[:20000])
    keys = {**TINY, "source": "book.txt"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines += ["[[sweep]]", 'schedule = ["distributed", "localist"]', "seed = [1, 2]"]
    lines += ["[[sweep]]", 'schedule = ["quintic"]', "seed = [1]"]
    lines += ["learning_rate = [1e30]", "warmup_steps = [0]", ""]
    config = tmp_path / "sweep.toml"
    config.write_text("\n".join(lines))

    def sweep(*more):
        return script_here("sweep.py", config, *more), capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", Forked)
        status, error = sweep("--jobs", "2")
    assert status == 1 and error.strip().count("broken: quintic") == 1 and "diverged" in error
    cells = sorted(p.parent.name for p in (tmp_path / "sweep").glob("*/results.json"))
    assert len(cells) == 4 and not any("quintic" in name for name in cells)
    for name in ("ratio", "tradeoff", "layers", "curves"):
        assert (tmp_path / "sweep" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "sweep" / f"{name}.svg").read_text()
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    found = {c["name"]: c for c in table["configurations"]}
    assert [len(c["runs"]) for c in found.values()] == [2, 2] and table["about"]["seeds"] == "1, 2"
    losses = {}
    for name in cells:
        r = json.loads((tmp_path / "sweep" / name / "results.json").read_text())
        losses.setdefault(r["schedule"], {})[r["seed"]] = r["loss"]
    ratio = next(c["ratio"] for name, c in found.items() if name.startswith("localist"))
    d = [losses["localist"][seed] - losses["distributed"][seed] for seed in (1, 2)]
    assert ratio["ratio"] == pytest.approx(math.exp(np.mean(d)))

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("*/results.json")}
    text = (tmp_path / "sweep" / "table.md").read_text()
    mended = config.read_text().replace("learning_rate = [1e30]\n", "")
    config.write_text(mended.replace("warmup_steps = [0]\n", ""))
    status, error = sweep()  # the broken cell is mended: it alone is run
    assert status == 0, error
    assert len(list((tmp_path / "sweep").glob("*/results.json"))) == 5
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    assert (tmp_path / "sweep" / "table.md").read_text() != text
    (tmp_path / "sweep" / "table.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("support.report.draw_sweep", lambda *args: [])  # drawn twice before
        assert sweep("--report")[0] == 0
    assert "quintic" in (tmp_path / "sweep" / "table.md").read_text()
    for wrong in ("no", "0", "\u00b2"):
        assert sweep("--jobs", wrong)[0] == 2
    path = tmp_path / "sweep" / cells[0] / "metrics.jsonl"
    whole, table = path.read_text(), (tmp_path / "sweep" / "table.md").read_text()
    for text in ("{", "[]", '{"val_loss": 1}', None):
        path.unlink() if text is None else path.write_text(text)
        status, error = sweep("--report")
        assert status == 2
        assert error.count("metrics.jsonl is damaged") == error.count("\n") == 1
        assert (tmp_path / "sweep" / "table.md").read_text() == table
    path.write_text(whole)
    status, error = sweep("--max_steps", "7")  # nothing of it could be run: no new table
    assert status == 1 and "with another max_steps" in error
    assert (tmp_path / "sweep" / "table.md").read_text() == table
    (tmp_path / "book.txt").write_bytes((ROOT / "data" / "sample.txt").read_bytes()[:20001])
    status, error = sweep()
    assert status == 1 and error.count("was run on another text; delete it") == 5
    status, error = sweep("--init_from", "runs/nowhere")
    assert status == 2 and error.count("runs/nowhere is not there; make it first") == 1
    for text in ("{", "[]", '{"config": {}}'):  # damaged: named, and mended when it is gone
        (tmp_path / "sweep" / cells[0] / "results.json").write_text(text)
        status, error = sweep("--report")
        assert status == 2
        assert error.count("results.json is damaged; delete it") == error.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_a_sweep_that_is_stopped_stops_its_runs_and_one_that_is_killed_leaves_them_waited_for(
    tmp_path,
):
    keys = {**TINY, "max_steps": 100000}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines += ["[[sweep]]", 'schedule = ["distributed", "localist"]', ""]
    (tmp_path / "long.toml").write_text("\n".join(lines))
    cell = tmp_path / "sweep" / "distributed"
    command = ROOT / "sweep.py", "long.toml"

    def steps():
        with contextlib.suppress(OSError):
            return (cell / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def until(condition):
        for _ in range(6000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError

    with started(*command, cwd=tmp_path) as sweep:
        until(lambda: steps() > 2)
        (child,) = children(sweep.pid)
        sweep.terminate()
        sweep.join(60)
    assert sweep.exitcode == 128 + signal.SIGTERM
    assert (tmp_path / "output.txt").read_text().endswith("stopped; the same command goes on\n")
    assert not Path(f"/proc/{child}").exists()  # it has saved, and ended
    assert "stopped at step" in (tmp_path / "sweep" / "distributed.log").read_text()
    assert (cell / "last.pt").exists() and not (tmp_path / "sweep" / "localist").exists()

    before = steps()
    with started(*command, cwd=tmp_path) as sweep:
        until(lambda: steps() > before)
        (child,) = children(sweep.pid)
        sweep.kill()
        sweep.join(60)
    with started(*command, cwd=tmp_path) as sweep:
        until(lambda: "waiting for another" in (tmp_path / "output.txt").read_text())
        assert Path(f"/proc/{child}").exists() and not children(sweep.pid)
        os.kill(child, signal.SIGTERM)
        until(lambda: children(sweep.pid))
        assert children(sweep.pid) != [child]
        before = steps()
        until(lambda: steps() > before)  # it goes on
        sweep.terminate()
        sweep.join(60)
    assert sweep.exitcode == 128 + signal.SIGTERM
