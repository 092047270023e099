"""The benchmark's rows say what was timed, against what, and no more than was run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench as benchmark
from experiments import parity
from experiments.bench import (
    SECTIONS,
    attention_turn,
    blend_error,
    blend_masks,
    block_and_rest,
    main,
    peak_of,
    race,
    row,
    two_kernels,
)
from model import attention_weights, clamp_lookback, in_block
from support.files import run_script

ROOT = Path(__file__).parent.parent


def bench(folder, *options):
    command = [sys.executable, "-m", "experiments.bench", "--quick", *options]
    # to compile such small models takes far longer than to run them
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}
    how = {"cwd": folder, "env": env, "text": True, "capture_output": True, "timeout": 400}
    return subprocess.run(command, **how)


def test_contestants_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def turn(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds.pop(0)

        return run

    turns = {"a": turn("a", [100, 1, 5, 2]), "b": turn("b", [100, 3, 3, 9])}
    found = race(turns, torch.device("cpu"), 3)
    assert order == ["a", "b"] * 4 and found == {"a": pytest.approx(2), "b": pytest.approx(3)}


def test_a_ratio_is_of_seconds_or_of_speeds():
    slow, fast = row("x", "slow", 4.0), row("x", "fast", tokens_per_s=30.0)
    assert "ratio" not in slow
    assert row("x", "half", 2.0, against=slow)["ratio"] == 0.5
    assert row("x", "thrice", tokens_per_s=90.0, against=fast)["ratio"] == 3


def test_a_row_is_written_as_soon_as_it_is_known(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    monkeypatch.setattr(benchmark, "FILE", {"path": path, "machine": {"device": "mine"}})
    monkeypatch.setattr(benchmark, "ROWS", [])
    for n in (1, 2):
        row("x", f"row {n}", float(n))
        rows = json.loads(path.read_text())
        assert [found["seconds"] for found in rows] == [1.0, 2.0][:n]
        assert {found["machine"]["device"] for found in rows} == {"mine"}


@pytest.mark.parametrize("way", [two_kernels, block_and_rest])
def test_both_ways_round_the_blend_find_it(way, monkeypatch):
    """And its gradients. A CPU can do it too, tracing but without a kernel."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    T = 200
    start = torch.where(torch.rand(2, T) < 0.03, torch.arange(T), 0).cummax(1).values
    lookback = clamp_lookback(torch.arange(T) - start, 60)
    masks = blend_masks(lookback)
    compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 2, T, 16).requires_grad_().unbind(0)
    expected = attention_weights(q, k, in_block(lookback)[:, None], benchmark.LAMBDA) @ v
    found = compiled(q, k, v, *masks)
    assert (found - expected).abs().max() < 1e-5
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert blend_error(lambda *args: expected + 0.5, q, k, v, lookback, masks) == pytest.approx(0.5)


@pytest.mark.parametrize("broken", ["", "nan", "wrong"])
def test_parity_is_told_case_by_case_and_a_failure_is_an_error(
    broken, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark, "ROWS", [])
    monkeypatch.setattr(benchmark, "FILE", {})
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
        told = capsys.readouterr().err
        name = {"nan": "scores of -120, T = 192", "wrong": "T = 1024, 128 back, float32"}[broken]
        assert stopped.value.code == 2 and told.startswith(f"error: no parity: {name}")
    rows = json.loads((tmp_path / "p.json").read_text())
    assert all(
        found["finite"] for found in rows if "finite" in found and "avoid" not in found["name"]
    ) == (broken != "nan")
    assert sum("gradient_error" in found for found in rows) == 8


def test_the_script_for_a_gpu_names_what_there_is_and_keeps_its_time(tmp_path):
    script = ROOT / "experiments" / "gpu.sh"
    text = script.read_text()
    assert {*re.findall(r"^  bench \d+ (\w+)", text, re.M)} <= set(SECTIONS)
    assert all((ROOT / path).is_file() for path in re.findall(r"configs/\w+\.toml", text))
    to_kill = int(re.search(r"--kill-after=(\d+)", text)[1])
    parts = re.split(r"^\d\)$", text, flags=re.M)[1:]
    assert len(parts) == 3
    for part in parts:
        limits = re.findall(r"^  (?:bench|limited|timeout) (\d+)", part, re.M)
        assert limits and sum(map(int, limits)) + to_kill * len(limits) <= 600
    (tmp_path / "there").mkdir()
    new = ["3", "out", "books", "book"]
    for words in ([], ["1"], ["4", "out"], ["3", "out", "books"], new):
        how = {"cwd": tmp_path, "env": {**os.environ, "RUNS": "there"}}
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True, **how)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_the_peak_is_of_the_contestant_alone():
    cpu = torch.device("cpu")
    small, large = (peak_of(attention_turn, "local", T, cpu, device=cpu) for T in (2048, 8192))
    qkv = 3 * 2048 * 768 * 4 / 2**20
    assert 8 * qkv > small > 2 * qkv  # these and their gradients, and more
    assert large < 5 * small  # in proportion to T


def test_every_section_runs_and_its_rows_agree(tmp_path):
    text = ROOT / "data" / "sample.txt"
    options = "--rounds", "1", "--tokenizer", "bytes", "--json", "b.json", "--source", text
    done = bench(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nanoGPT left out") == 2
    rows = json.loads((tmp_path / "b.json").read_text())
    measured = set(SECTIONS) - {"blend"}  # which needs a GPU
    assert {found["section"] for found in rows} == measured
    assert not any("nanoGPT" in found["name"] for found in rows)
    assert [found["same_tokens"] for found in rows if "same_tokens" in found] == [True]
    compared = [found for found in rows if "ratio" in found]
    assert len(compared) > 12
    assert {found["section"] for found in compared} == measured
    for found in compared:
        key = "seconds" if "seconds" in found else "tokens_per_s"
        (base,) = {other.get(key) for other in rows if other["name"] == found["baseline"]}
        assert found["ratio"] == pytest.approx(found[key] / base)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--nanogpt", "nowhere"),
        ("--nanogpt", "."),
        ("--rounds", "0"),
        ("--device", "abacus"),
        ("--max-lookback", "0"),
        ("--json", "nowhere/b.json"),
    ],
)
def test_mistakes_end_in_one_line(option, value, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.py").write_text("class GPT: pass")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--only", "step", option, value])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert value in told


def test_so_does_the_script(tmp_path):
    done = bench(tmp_path, "--rounds", "0")
    assert (done.returncode, done.stderr) == (2, "error: --rounds is at least 1, not 0\n")
