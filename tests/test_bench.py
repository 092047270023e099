"""The benchmark's rows say what was timed, against what, and no more than was run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import SECTIONS, attention_turn, main, peak_of, race, row
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
