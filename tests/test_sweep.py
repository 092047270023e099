"""A sweep runs each cell once, resumes after any stop, and names the cells that broke."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, script_here
from conftest import TINY as TINY_CONFIG
from forks import children, started
from support.files import InputError, write_text
from support.jobs import run_jobs
from support.prepared import read_meta
from support.settings import to_toml
from sweep import command_of, prepare_cell, read_cells, read_sweep, sort_cells
from train import Config, read_values

SAMPLE = ROOT / "data" / "sample.txt"
SIZES = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 2}
TINY = {"source": str(SAMPLE), "tokenizer": "bytes", "max_lookback": 100, **SIZES, "max_steps": 3}
TINY |= {"eval_interval": 3, "eval_contexts": 2, "compile": False, "out": "sweep"}


def write_sweep(path, *tables, **keys):
    """A sweep file: the keys of TINY with changes, and a table [[sweep]] for each dict."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**TINY, **keys}.items()]
    for table in tables:
        lines += ["[[sweep]]", *(f"{key} = {json.dumps(list_)}" for key, list_ in table.items())]
    Path(path).write_text("\n".join(lines))


def test_a_cell_resumes_only_with_the_same_config(tmp_path):
    cell = Config(**{**TINY, "out": str(tmp_path / "cell")})
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "last.pt").touch()
    other = Config(**{**asdict(cell), "max_steps": 4, "learning_rate": 0.1})
    (tmp_path / "cell" / "config.toml").write_text(to_toml(other))
    with pytest.raises(InputError, match="another max_steps, learning_rate; delete it"):
        sort_cells({"cell": cell})


@pytest.mark.parametrize("there", ["quickstart.toml", "distributed.toml", "model.py"])
def test_a_sweep_leaves_a_folder_of_something_else_alone(tmp_path, monkeypatch, capsys, there):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for path in ("sweep.toml", f"mine/{there}", "mine/distributed.toml"):
        write_sweep(path, {"schedule": ["distributed"]})
    text = Path("sweep.toml").read_text()
    assert script_here("sweep.py", "sweep.toml", "--out", "mine") == 2
    assert "mine is not empty and contains no sweep" in capsys.readouterr().err
    Path("mine/other").mkdir()  # a sweep is there as well
    Path("mine/other/config.toml").touch()
    with pytest.raises(InputError, match="was not made by sweep.py"):
        command_of(Config(**{**TINY, "out": "mine/distributed"}))
    assert Path("mine/distributed.toml").read_text() == text
    Path("mine/cell.log").mkdir()  # a cell that cannot be started is broken, too
    command = command_of(Config(**{**TINY, "out": "mine/cell"}))
    ((name, why),) = run_jobs({"cell": command}, 1)
    assert name == "cell" and why.startswith("error: ") and "cell.log" in why


def test_matched_rivals_reach_back_as_far_as_the_semantic_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matched, means = ["window:matched", "block:matched", "aligned:matched"], []
    for like in ("semantic", "semantic:closed"):
        reach, sizes = [], []
        values = {**TINY, "max_lookback": 400, "sweep": [{"partition": [like, *matched]}]}
        for cell in read_cells(values).values():
            folder = prepare_cell(cell).folder
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
        read_cells({**TINY, "sweep": sweep})


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--seed", "7"], {"seed": [7]}),
        (
            ["--seed", "2,3", "--schedule=quintic,linear"],
            {"seed": [2, 3], "schedule": ["quintic", "linear"]},
        ),
        (["--floor", "0.5,.25"], {"floor": [0.5, 0.25]}),
        (["--source", '["a.txt", "b.txt"]'], {"source": [["a.txt", "b.txt"]]}),
        (["--anchor"], {"anchor": [True]}),
        (["--max_steps", "5"], {}),
    ],
)
def test_values_on_the_command_line_replace_a_list(tmp_path, words, expected):
    table = {"seed": [1, 2], "schedule": ["distributed"], "floor": [1.0], "source": ["c.txt"]}
    table |= {"anchor": [False]}
    write_sweep(tmp_path / "s.toml", table, {"seed": [1, 2]})
    tables = read_sweep([str(tmp_path / "s.toml"), *words])["sweep"]
    assert tables == [{**table, **expected}, {"seed": expected.get("seed", [1, 2])}]


@pytest.mark.parametrize("key", sorted(Config.__dataclass_fields__.keys() - {"out"}))
def test_every_key_of_a_table_can_be_replaced_on_the_command_line(tmp_path, key):
    write_sweep(tmp_path / "s.toml", {key: ["3"]})
    (table,) = read_sweep([str(tmp_path / "s.toml"), f"--{key}", "1,2"])["sweep"]
    assert [str(value) for value in table[key]] == ["1", "2"]


@pytest.mark.parametrize(
    "words, names",
    [
        (["--schedule", "distributed,quintic", "--seed", "1"], ["distributed", "quintic.sentence"]),
        (["--schedule", "linear", "--seed", "2"], ["linear.sentence"]),
        (
            ["--seed", "1"],
            ["distributed", "linear.sentence", "quintic.sentence", "localist.semanticclosed"]
            + ["localist.window"],
        ),
        (["--partition", "window:matched", "--seed=1"], ["distributed", "localist.window"]),
    ],
)
def test_values_on_the_command_line_choose_cells_of_tables_that_differ(tmp_path, words, names):
    """The chosen cells have the names and folders that the whole sweep gives them."""
    write_sweep(
        tmp_path / "s.toml",
        {"schedule": ["distributed"], "seed": [1, 2]},
        {"schedule": ["linear", "quintic"], "partition": ["sentence"], "seed": [1, 2]},
        {"schedule": ["localist"], "partition": ["semantic:closed", "window:matched"], "seed": [1]},
    )
    every = read_cells(read_sweep([str(tmp_path / "s.toml")]))
    cells = read_cells(read_sweep([str(tmp_path / "s.toml"), *words]))
    assert [name.partition(".seed")[0].rstrip("0123456789") for name in cells] == names
    assert all(every[name] == cell for name, cell in cells.items())


def test_a_value_that_no_table_of_a_sweep_lists_is_an_error_if_the_tables_differ(tmp_path):
    write_sweep(tmp_path / "s.toml", {"schedule": ["distributed"]}, {"schedule": ["linear"]})
    with pytest.raises(InputError, match="no .* table lists 'quintic'"):
        read_sweep([str(tmp_path / "s.toml"), "--schedule", "linear,quintic"])


def test_values_that_no_cell_has_together_are_an_error(tmp_path):
    tables = {"schedule": ["linear"], "seed": [1]}, {"schedule": ["quintic"], "seed": [2]}
    write_sweep(tmp_path / "s.toml", *tables)
    words = [str(tmp_path / "s.toml"), "--schedule", "linear", "--seed", "2"]
    with pytest.raises(InputError, match="no cell .* values: schedule linear; seed 2"):
        read_cells(read_sweep(words))


def test_a_list_on_the_command_line_leaves_the_tables_without_that_key_alone(tmp_path):
    write_sweep(
        tmp_path / "s.toml",
        {"schedule": ["distributed"], "seed": [1]},
        {"schedule": ["quintic"], "partition": ["semantic"], "seed": [1]},
    )
    words = [str(tmp_path / "s.toml"), "--partition", "semantic,window:8", "--max_lookback", "9"]
    cells = read_cells(read_sweep(words))
    assert list(cells) == ["distributed.seed1", "quintic.semantic.seed1", "quintic.window8.seed1"]
    assert cells["distributed.seed1"].partition == Config().partition
    assert {cell.max_lookback for cell in cells.values()} == {9}


def test_a_list_on_the_command_line_is_checked_like_one_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sweep("s.toml", {"seed": [1], "schedule": ["distributed"]})
    for words, complaint in (
        (["--seed", "1,x"], "seed must be a whole number"),
        (["--schedule", "quintc,"], "quintic"),
    ):
        assert script_here("sweep.py", "s.toml", *words) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1


def test_long_values_of_a_sweep_give_short_names_and_every_cell_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["\U00020000" * 40 + end for end in "ab"] + ["x" * 150]
    for name in names:
        shutil.copy(SAMPLE, name + ".txt")
        Path(f"{name}-base").mkdir()
    sources, bases = [name + ".txt" for name in names], [name + "-base" for name in names]
    cells = read_cells({**TINY, "sweep": [{"source": sources, "init_from": bases}]})
    assert len(cells) == 9
    for name, cell in cells.items():
        Path(cell.out).mkdir(parents=True)
        write_text(Path(cell.out + ".toml"), "")  # a temporary file has an even longer name
        assert Path(cell.out).name == name


@pytest.mark.parametrize("out", ["-x", "./-x", "-x/y"])
def test_a_folder_whose_name_looks_like_a_flag_is_refused(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    write_sweep("s.toml", {"seed": [1]})
    for words in (["sweep.py", "s.toml"], ["train.py", TINY_CONFIG]):
        assert script_here(*words, f"--out={out}") == 2
        error = capsys.readouterr().err
        assert "out must not begin with a dash" in error and error.count("\n") == 1
    assert not Path("-x").exists()


def test_every_sweep_in_the_folder_is_understood():
    paths = sorted((ROOT / "configs").glob("sweep_*.toml"))
    assert len(paths) > 1
    for path in paths:
        values = read_values([str(path)], more=("sweep",))
        assert values["out"] == f"runs/{path.stem}"
        for table in values["sweep"]:
            assert table.keys() <= Config.__dataclass_fields__.keys()
            assert all(isinstance(choices, list) for choices in table.values())


@contextlib.contextmanager
def forked(command, stdout=None, env=None, start=subprocess.Popen, **options):
    """subprocess.Popen, which starts a cell of a sweep without importing torch anew."""
    if command[0] != sys.executable:
        with start(command, stdout=stdout, env=env, **options) as process:
            yield process
    else:
        with started(*command[1:], cwd=".", output=stdout.name, environment=env) as process:
            process.wait = lambda: process.join() or process.exitcode
            yield process


def test_a_sweep_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(SAMPLE.read_bytes()[:20000])
    tables = {"schedule": ["distributed", "localist"], "seed": [1, 2]}, {"schedule": ["quintic"]}
    broken = {**tables[1], "learning_rate": [1e30], "warmup_steps": [0]}
    write_sweep("sweep.toml", tables[0], broken, source="book.txt")
    folder = Path("sweep")

    def sweep(*more):
        return script_here("sweep.py", "sweep.toml", *more), capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", forked)
        status, error = sweep("--jobs", "2")
    assert status == 1, error
    assert error.strip().count("broken: quintic") == 1 and "diverged" in error
    command = error.strip().rpartition("to run only this cell: python ")[2].split()
    assert script_here(*command) == 2 and "diverged" in capsys.readouterr().err  # as before
    assert not list(folder.glob("[dl]*/last.pt")) and len(list(folder.glob("[dl]*/best.pt"))) == 4
    paths = sorted(folder.glob("*/results.json"))
    assert len(paths) == 4 and not any("quintic" in str(path) for path in paths)
    for name in ("ratio", "tradeoff", "layers", "curves"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
    table = json.loads((folder / "table.json").read_text())
    groups = {c["name"]: c for c in table["configurations"]}
    assert [len(c["runs"]) for c in groups.values()] == [2, 2] and table["about"]["seeds"] == "1, 2"
    runs = [json.loads(path.read_text()) for path in paths]
    losses = {(r["schedule"], r["seed"]): r["loss"] for r in runs}
    ratio = next(c["vs_distributed"] for name, c in groups.items() if name.startswith("localist"))
    d = [losses["localist", seed] - losses["distributed", seed] for seed in (1, 2)]
    assert ratio["ratio"] == pytest.approx(math.exp(np.mean(d)))

    before, text = [p.stat().st_mtime_ns for p in paths], (folder / "table.md").read_text()
    write_sweep("sweep.toml", *tables, source="book.txt")
    status, error = sweep()  # the broken cell is mended: only this one is run
    assert status == 0, error
    assert len(list(folder.glob("*/results.json"))) == 5
    assert [p.stat().st_mtime_ns for p in paths] == before
    assert (folder / "table.md").read_text() != text
    (folder / "table.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("report.sweep.draw_sweep", lambda *args: [])  # drawn twice before
        assert sweep("--report")[0] == 0
    table = (folder / "table.md").read_text()
    assert "quintic" in table
    assert [sweep("--jobs", wrong)[0] for wrong in ("no", "0", "\u00b2")] == [2, 2, 2]
    first, second = paths[0].with_name("metrics.jsonl"), paths[1]
    whole = first.read_text(), second.read_text()
    first.unlink()
    second.write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr("report.sweep.draw_sweep", lambda *args: [])
        for more in ([], ["--report"]):  # the others are in the table
            status, error = sweep(*more)
            assert status == 1 and error.count("is damaged; delete") == error.count("\n") == 2
            assert "broken: distributed.seed1: error: sweep/distributed.seed1/metrics" in error
            assert "broken: distributed.seed2: error: sweep/distributed.seed2/results" in error
            rows = (folder / "table.md").read_text()
            assert rows.count("| localist, semantic | 2 |") == 1 and "| distributed |" not in rows
    first.write_text(whole[0])
    second.write_text(whole[1].replace(runs[1]["code"], "0123456789ab"))
    with monkeypatch.context() as patch:
        patch.setattr("report.sweep.draw_sweep", lambda *args: [])
        status, error = sweep()
    assert "another version of the code: distributed.seed2 (delete" in error and status == 0
    assert "2 versions of the code" in (folder / "table.md").read_text()
    second.write_text(whole[1])
    (folder / "table.md").write_text(table)
    absolute = [str(Path(name).absolute()) for name in ("sweep", "book.txt")]
    shutil.move("sweep", "moved")  # the same cells under other names
    Path("sweep").symlink_to("moved")
    with monkeypatch.context() as patch:
        patch.setattr("report.sweep.draw_sweep", lambda *args: [])
        for out in (absolute[0], "moved"):
            assert sweep("--out", out, "--source", absolute[1]) == (0, "")
    (folder / "table.md").write_text(table)
    status, error = sweep("--max_steps", "7")  # refused before any work: no new table
    assert status == 2 and "with another max_steps" in error and error.count("\n") == 1
    assert (folder / "table.md").read_text() == table
    Path("book.txt").write_bytes(SAMPLE.read_bytes()[:20001])
    status, error = sweep()
    assert status == 2 and "run with another text; delete it" in error and error.count("\n") == 1
    status, error = sweep("--init_from", "runs/nowhere", "--out", "other")
    assert status == 2 and error.count("runs/nowhere: no such file") == error.count("\n") == 1
    assert not Path("other").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_a_sweep_that_is_stopped_stops_its_runs_and_one_that_is_killed_leaves_them_waited_for(
    tmp_path,
):
    write_sweep(tmp_path / "s.toml", {"schedule": ["distributed", "localist"]}, max_steps=100000)
    cell, output = tmp_path / "sweep" / "distributed", tmp_path / "output.txt"

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

    def until_later():
        before = steps()
        until(lambda: steps() > before)

    def end(sweep, stop):
        stop()
        sweep.join(60)
        return sweep.exitcode

    with started(ROOT / "sweep.py", "s.toml", cwd=tmp_path) as sweep:
        until(lambda: steps() > 2)
        (child,) = children(sweep.pid)
        assert end(sweep, sweep.terminate) == 128 + signal.SIGTERM
    assert output.read_text().endswith("stopped; run the same command to continue\n")
    assert not Path(f"/proc/{child}").exists()  # it has saved, and ended
    assert "stopped at step" in cell.with_suffix(".log").read_text()
    assert (cell / "last.pt").exists() and not (tmp_path / "sweep" / "localist").exists()

    with started(ROOT / "sweep.py", "s.toml", cwd=tmp_path) as sweep:
        until_later()
        (child,) = children(sweep.pid)
        end(sweep, sweep.kill)
    with started(ROOT / "sweep.py", "s.toml", cwd=tmp_path) as sweep:
        until(lambda: "waiting for another" in output.read_text())
        assert Path(f"/proc/{child}").exists() and not children(sweep.pid)
        os.kill(child, signal.SIGTERM)
        until(lambda: children(sweep.pid))
        assert children(sweep.pid) != [child]
        until_later()
        assert end(sweep, sweep.terminate) == 128 + signal.SIGTERM
