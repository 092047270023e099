"""A sweep runs each cell once, resumes after any stop, and names the cells that broke."""

import contextlib
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
from support.settings import to_toml
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


def test_a_cell_resumes_only_with_the_same_config(tmp_path):
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


def test_a_cell_that_cannot_be_started_is_broken_and_the_others_run(tmp_path):
    cell = Config(**{**TINY, "out": str(tmp_path / "cell")})
    (tmp_path / "cell.log").mkdir()
    why = run_cell(cell, 1, None, set(), [])
    assert why.startswith("error: ") and "cell.log" in why


def test_matched_rivals_reach_back_as_far_as_the_semantic_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matched = ["window:matched", "block:matched", "aligned:matched"]
    means = []
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
        means.append(reach[0])
    assert means[0] > means[1] + 4 > 20


@pytest.mark.parametrize(
    "sweep, words",
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
def test_a_sweep_that_makes_no_sense_is_refused(tmp_path, monkeypatch, sweep, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
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

    def __init__(self, command, stdout=None, **options):
        self.fork = None
        if command[0] != sys.executable:
            return super().__init__(command, stdout=stdout, **options)
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
    groups = {c["name"]: c for c in table["configurations"]}
    assert [len(c["runs"]) for c in groups.values()] == [2, 2] and table["about"]["seeds"] == "1, 2"
    losses = {}
    for name in cells:
        r = json.loads((tmp_path / "sweep" / name / "results.json").read_text())
        losses.setdefault(r["schedule"], {})[r["seed"]] = r["loss"]
    ratio = next(c["vs_distributed"] for name, c in groups.items() if name.startswith("localist"))
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
        patch.setattr("report.sweep.draw_sweep", lambda *args: [])  # drawn twice before
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
