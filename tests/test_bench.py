"""The benchmark times what its rows say, and parity with the CPU is checked case by case."""

import contextlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from experiments import bench, parity
from experiments.bench import CPU, SECTIONS, Table, attention, main, peak_mb, race
from model import GPT, GPTConfig, attention_weights, clamp_lookback, in_block
from support.files import run_script


def test_contestants_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def turn(name, seconds):
        order.append(name)
        clock[0] += seconds.pop(0)

    turns = {"a": partial(turn, "a", [100, 1, 5, 2]), "b": partial(turn, "b", [100, 3, 3, 9])}
    rows = race(turns, CPU, 3)
    assert order == ["a", "b"] * 4
    assert rows == {"a": {"seconds": pytest.approx(2)}, "b": {"seconds": pytest.approx(3)}}
    turns = {"c": partial(turn, "c", [4])}
    assert race(turns, CPU, 1, tokens=8, warm_up=False) == {"c": {"tokens_per_s": 2}}


def test_each_row_is_compared_with_all_before_it_and_written_at_once(tmp_path, capsys):
    path = tmp_path / "b.json"
    table = Table(CPU, path)
    for n in (1, 2):
        table.add("x", {f"row {n}": {"seconds": n}})
        rows = json.loads(path.read_text())
        assert [row["seconds"] for row in rows] == [1, 2][:n]
        assert all(row["machine"]["device"].startswith("cpu") and not row["ratio"] for row in rows)
    for speed in (8, 2):  # the second time they replace their rows
        speeds = {"a": {"tokens_per_s": speed}, "b": {"tokens_per_s": 4, "peak_mb": None}}
        table.add("y", {**speeds, "c": {"tokens_per_s": 16, "peak_mb": 7}})
    rows = {(row["section"], row["name"]): row for row in json.loads(path.read_text())}
    assert len(rows) == 5 and rows["y", "c"]["ratio"] == {"a": 8, "b": 4}
    assert "3. c            16        7    8    4" in capsys.readouterr().out


def test_the_second_way_to_compute_the_blend_gives_its_values_and_gradients(monkeypatch):
    """A CPU can do it too, by tracing, without the kernel."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    T = 200
    start = torch.where(torch.rand(2, T) < 0.03, torch.arange(T), 0).cummax(1).values
    lookback = clamp_lookback(torch.arange(T) - start, 60)
    compiled = torch.compile(bench.block_and_rest, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 2, T, 16).requires_grad_()
    expected = attention_weights(q, k, in_block(lookback)[:, None], bench.LAMBDA) @ v
    y = compiled(q, k, v, bench.before_and_inside(lookback))
    assert (y - expected).abs().max() < 1e-5
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((each * weight).sum(), (q, k, v)) for each in (y, expected))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
    """What varlen_attn computes on a GPU, sequence by sequence. q: (N, H, D); k, v: (K, H, D)."""
    assert window_size == (-1, 0)  # causal, from the bottom right
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    out, sizes = [], torch.stack([cu_q.diff(), cu_k.diff()], 1)
    assert sizes.amax(0).tolist() == [max_q, max_k] and cu_k[-1] == len(k)
    for (n, m), i, j in zip(sizes.tolist(), cu_q.tolist(), cu_k.tolist()):
        if n:
            a, b, c = q[i : i + n], k[j : j + m], v[j : j + m]
            seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            a, b, c = (x.transpose(0, 1)[None] for x in (a, b, c))
            y = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=seen)
            out.append(y[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("T", [200, 1000])
def test_the_third_way_packs_the_stretches_that_share_a_start(monkeypatch, T):
    monkeypatch.setattr(bench.varlen, "varlen_attn", varlen)
    torch.manual_seed(0)
    starts = torch.where(torch.rand(2, T) < 0.03, torch.arange(T), 0).cummax(1).values
    sliding = clamp_lookback(torch.arange(T) - starts, 60)  # a block that outgrows the cap slides
    for lookback in (sliding, bench.topics(2, T, 128), torch.zeros(2, T, dtype=torch.long)):
        q, k, v = torch.randn(3, 2, 2, T, 16).requires_grad_()
        expected = attention_weights(q, k, in_block(lookback)[:, None], bench.LAMBDA) @ v
        mask = bench.stretches(lookback)
        assert (len(mask[1]) - 1) % 256 == 255  # the shape hardly depends on the blocks
        y = bench.packed_blend(q, k, v, mask)
        assert (y - expected).abs().max() < 1e-5
        weight = torch.randn_like(expected)
        gradients = (
            torch.autograd.grad((each * weight).sum(), (q, k, v)) for each in (y, expected)
        )
        for a, b in zip(*gradients):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_blocks_of_the_blend_vary_and_are_recognized_late():
    lookback = bench.topics(3, 5000, 128)
    assert lookback.max() <= 128 and (lookback >= 0).all() and lookback.shape == (3, 5000)
    starts = torch.arange(5000) - lookback
    assert (starts.diff() >= 0).all()
    moved = starts[:, 1:] != starts[:, :-1]
    assert (lookback[:, 1:][moved] == 16).all()
    lengths = starts.diff()[moved]
    assert 32 <= lengths.min() < 50 and 90 < lengths.max() <= 112
    keys, *_ = bench.stretches(lookback)
    assert len(keys) > 1.1 * lookback.numel()  # tokens before a recognition are read twice


def test_both_ways_to_generate_give_the_same_tokens():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**bench.SMALL)).eval()
    anew = bench.generate_anew(model, [1, 2, 3], 20)
    assert bench.generate_cached(model, "distributed", 2, [1, 2, 3], 20) == anew
    bench.generate_cached(model, "localist", 1, [1, 2, 3], 1)
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
    with pytest.raises(SystemExit, match="2") if broken else contextlib.nullcontext():
        run_script(parity.main)
    name = {"nan": "scores of -120, T = 192", "wrong": "T = 1024, 128 back, float32", "": ""}[
        broken
    ]
    error = f"does not agree with the CPU: {name}" if broken else ""
    assert error in capsys.readouterr().err
    rows = json.loads((tmp_path / "p.json").read_text())
    finite = [row["finite"] for row in rows if "finite" in row and "avoid" not in row["name"]]
    assert len(finite) == 12 and all(finite) == (broken != "nan")
    assert sum("gradient_error" in row for row in rows) == 2 * len(parity.CASES)


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
    env = {**os.environ, "RUNS": "there"}
    for words in ("", "1", "4 out", "3 out books", "3 out books book"):
        command = ["bash", path, *words.split()]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_the_peak_is_that_of_the_contestant():
    make = partial(attention, "local", bench.W)
    small, large = (peak_mb(partial(make, T, CPU), CPU) for T in (2048, 8192))
    qkv = 3 * 2048 * 768 * 4 / 2**20
    assert 10 * qkv > small > 2 * qkv  # these, their gradients, and more
    assert large < 5 * small  # in proportion to T


def test_every_section_runs_and_its_rows_agree(tmp_path):
    command = [sys.executable, "-m", "experiments.bench", "--quick", "--rounds", "1"]
    command += ["--json", "b.json", "--source", ROOT / "data" / "sample.txt"]
    # compiling such small models takes far longer than running them
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())
    measured = set(SECTIONS) - {"blend"}  # which needs a GPU
    assert not any("nanoGPT" in row["name"] for row in rows)
    compared = [row for row in rows if row["ratio"]]
    assert len(compared) > 12 and {row["section"] for row in compared} == measured
    by_name = {(row["section"], row["name"]): row for row in rows}
    assert len(by_name) == len(rows)
    for row in compared:
        key = "seconds" if "seconds" in row else "tokens_per_s"
        for name, ratio in row["ratio"].items():
            assert ratio == pytest.approx(row[key] / by_name[row["section"], name][key])


MISTAKES = "--nanogpt nowhere|--nanogpt .|--rounds 0|--device abacus|--json nowhere/b.json"
MISTAKES += "|--source nowhere.txt|--source model.py"  # the last is too short to time


@pytest.mark.parametrize("mistake", MISTAKES.split("|"))
def test_mistakes_end_in_one_line(mistake, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.py").write_text("class GPT: pass")
    monkeypatch.chdir(tmp_path)
    section, words = "data" if "--source" in mistake else "step", mistake.split()
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--only", section, *words])
    with pytest.raises(SystemExit, match="2"):
        run_script(main)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words[1] in error
