"""The benchmark times what its rows say, and parity with the CPU is checked case by case."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from experiments import bench, parity
from experiments.bench import SECTIONS, Table, attention, main, peak_mb, race
from model import GPT, GPTConfig, attention_weights, clamp_lookback, in_block
from support.files import run_script

CPU = torch.device("cpu")


def script(folder, *options):
    command = [sys.executable, "-m", "experiments.bench", "--quick", *options]
    # compiling such small models takes far longer than running them
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=400)


def test_contestants_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def turn(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds.pop(0)

        return run

    turns = {"a": turn("a", [100, 1, 5, 2]), "b": turn("b", [100, 3, 3, 9])}
    times = race(turns, CPU, 3)
    assert order == ["a", "b"] * 4 and times == {"a": pytest.approx(2), "b": pytest.approx(3)}


def test_each_row_is_compared_with_all_before_it_and_written_at_once(tmp_path):
    path = tmp_path / "b.json"
    table = Table(CPU, path)
    for n in (1, 2):
        table.row("x", f"row {n}", float(n))
        rows = json.loads(path.read_text())
        assert [row["seconds"] for row in rows] == [1.0, 2.0][:n]
        assert all(row["machine"]["device"] == "cpu" and "ratio" not in row for row in rows)
    times = {"a": 4.0, "b": 2.0, "c": 1.0}
    table.compare("seconds", times, peak_mb={"b": 7})
    table.compare("speeds", times, tokens=8)
    table.compare("speeds", {"a": 8.0, "d": 8.0}, tokens=8)  # a has its row already
    rows = {(row["section"], row["name"]): row for row in table.rows}
    assert len(rows) == len(table.rows) == 9
    assert rows["seconds", "c"]["ratio"] == {"a": 0.25, "b": 0.5}
    assert rows["speeds", "c"]["tokens_per_s"] == 8
    assert (
        rows["speeds", "c"]["ratio"] == {"a": 4, "b": 2} and rows["speeds", "d"]["ratio"]["a"] == 1
    )
    assert [row["name"] for row in rows.values() if "peak_mb" in row] == ["b"]


@pytest.mark.parametrize("way", [bench.two_kernels, bench.block_and_rest])
def test_both_ways_to_compute_the_blend_give_its_values_and_gradients(way, monkeypatch):
    """A CPU can do it too, by tracing, without the kernel."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    T = 200
    start = torch.where(torch.rand(2, T) < 0.03, torch.arange(T), 0).cummax(1).values
    lookback = clamp_lookback(torch.arange(T) - start, 60)
    compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 2, T, 16).requires_grad_().unbind(0)
    expected = attention_weights(q, k, in_block(lookback)[:, None], bench.LAMBDA) @ v
    y = compiled(q, k, v, *bench.blend_masks(lookback))
    assert (y - expected).abs().max() < 1e-5
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((each * weight).sum(), (q, k, v)) for each in (y, expected))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_both_ways_to_generate_give_the_same_tokens():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**bench.SMALL)).eval()
    anew = bench.generate_anew(model, [1, 2, 3], 20)
    assert bench.generate_cached(model, "distributed", [1, 2, 3], 20, copies=2) == anew
    bench.generate_cached(model, "localist", [1, 2, 3], 1)
    assert bench.generate_anew(model, [1, 2, 3], 20) == anew  # whatever the dial was


@pytest.mark.parametrize("broken", ["", "nan", "wrong"])
def test_parity_is_checked_case_by_case_and_a_failure_is_an_error(
    broken, tmp_path, monkeypatch, capsys
):
    command = ["parity", "--quick", "--device", "cpu", "--json", str(tmp_path / "p.json")]
    monkeypatch.setattr("sys.argv", command)
    if broken == "nan":
        lost = lambda q, k, v, mask: (q + k + v) * torch.nan
        monkeypatch.setattr(parity, "local_attention", lost)
    elif broken:  # in all but the reference
        step = parity.step
        shift = lambda *args: [value + 1e-3 * (len(args) > 3) for value in step(*args)]
        monkeypatch.setattr(parity, "step", shift)
    if not broken:
        run_script(parity.main)
    else:
        with pytest.raises(SystemExit) as stopped:
            run_script(parity.main)
        name = {"nan": "scores of -120, T = 192", "wrong": "T = 1024, 128 back, float32"}[broken]
        assert stopped.value.code == 2
        assert f"does not agree with the CPU: {name}" in capsys.readouterr().err
    rows = json.loads((tmp_path / "p.json").read_text())
    finite = [row["finite"] for row in rows if "finite" in row and "avoid" not in row["name"]]
    assert all(finite) == (broken != "nan")
    assert sum("gradient_error" in row for row in rows) == 8


def test_the_script_for_a_gpu_names_existing_things_and_keeps_its_time(tmp_path):
    path = ROOT / "experiments" / "gpu.sh"
    text = path.read_text()
    assert {*re.findall(r"^  bench \d+ (\w+)", text, re.M)} <= set(SECTIONS)
    assert all((ROOT / config).is_file() for config in re.findall(r"configs/\w+\.toml", text))
    to_kill = int(re.search(r"--kill-after=(\d+)", text)[1])
    parts = re.split(r"^\d\)$", text, flags=re.M)[1:]
    assert len(parts) == 3
    for part in parts:
        limits = re.findall(r"^  (?:bench|limited|timeout) (\d+)", part, re.M)
        assert limits and sum(map(int, limits)) + to_kill * len(limits) <= 600
    (tmp_path / "there").mkdir()
    existing = ["3", "out", "books", "book"]
    for words in ([], ["1"], ["4", "out"], ["3", "out", "books"], existing):
        env = {**os.environ, "RUNS": "there"}
        command = ["bash", path, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_the_peak_is_that_of_the_contestant():
    small, large = (peak_mb(attention, "local", T, CPU) for T in (2048, 8192))
    qkv = 3 * 2048 * 768 * 4 / 2**20
    assert 8 * qkv > small > 2 * qkv  # these, their gradients, and more
    assert large < 5 * small  # in proportion to T


def test_every_section_runs_and_its_rows_agree(tmp_path):
    text = ROOT / "data" / "sample.txt"
    done = script(tmp_path, "--rounds", "1", "--json", "b.json", "--source", text)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())
    measured = set(SECTIONS) - {"blend"}  # which needs a GPU
    assert {row["section"] for row in rows} == measured
    assert not any("nanoGPT" in row["name"] for row in rows)
    compared = [row for row in rows if "ratio" in row]
    assert len(compared) > 12 and {row["section"] for row in compared} == measured
    by_name = {(row["section"], row["name"]): row for row in rows}
    assert len(by_name) == len(rows)
    for row in compared:
        key = "seconds" if "seconds" in row else "tokens_per_s"
        for name, ratio in row["ratio"].items():
            assert ratio == pytest.approx(row[key] / by_name[row["section"], name][key])


@pytest.mark.parametrize(
    "option, value",
    [
        ("--nanogpt", "nowhere"),
        ("--nanogpt", "."),
        ("--rounds", "0"),
        ("--device", "abacus"),
        ("--json", "nowhere/b.json"),
        ("--source", "nowhere.txt"),
        ("--source", "model.py"),  # too short to time
    ],
)
def test_mistakes_end_in_one_line(option, value, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.py").write_text("class GPT: pass")
    monkeypatch.chdir(tmp_path)
    section = "data" if option == "--source" else "step"
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--only", section, option, value])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert value in error
