"""The benchmark's rows say what was timed, against what, and no more than was run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import attention_turn, peak_of, race, row

ROOT = Path(__file__).parent.parent


def bench(folder, *options):
    return subprocess.run([sys.executable, ROOT / "bench.py", "--quick", *options], cwd=folder, text=True,
                          capture_output=True, timeout=400)


def test_contestants_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def turn(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds.pop(0)
        return run

    found = race({"a": turn("a", [100, 1, 5, 2]), "b": turn("b", [100, 3, 3, 9])}, torch.device("cpu"), 3)
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
    qkv = 3 * 2048 * 768 * 4 / 2 ** 20
    assert 8 * qkv > small > 2 * qkv    # these and their gradients, and more
    assert large < 5 * small    # in proportion to T


def test_every_section_runs_and_its_rows_agree(tmp_path):
    text = ROOT / "data" / "sample.txt"
    done = bench(tmp_path, "--rounds", "1", "--tokenizer", "bytes", "--json", "b.json", "--source", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nanoGPT left out") == 2
    rows = json.loads((tmp_path / "b.json").read_text())
    assert {found["section"] for found in rows} == {"attention", "step", "generate", "data"}
    assert not any("nanoGPT" in found["name"] for found in rows)
    assert [found["same_tokens"] for found in rows if "same_tokens" in found] == [True]
    compared = [found for found in rows if "ratio" in found]
    assert len(compared) > 12 and {"attention", "step", "generate", "data"} == {found["section"] for found in compared}
    for found in compared:
        base, = {(other.get("seconds"), other.get("tokens_per_s")) for other in rows if other["name"] == found["baseline"]}
        key = "seconds" if "seconds" in found else "tokens_per_s"
        assert found["ratio"] == pytest.approx(found[key] / base[key != "seconds"])


def test_mistakes_end_in_one_line(tmp_path):
    (tmp_path / "model.py").write_text("class GPT: pass")
    for option, value in (("--nanogpt", "nowhere"), ("--nanogpt", "."), ("--rounds", "0"), ("--device", "abacus"),
                          ("--max-lookback", "0"), ("--json", "nowhere/b.json")):
        done = bench(tmp_path, "--only", "step", option, value)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert value in done.stderr
