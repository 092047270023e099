"""eval.py: windows, every measure against a count by hand, other dials, blocks, texts and weights,
and figures."""

import contextlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from eval import (
    FLOORS,
    attention_maps,
    entropy_of,
    evaluate,
    fidelity_of,
    figure,
    load,
    read_text,
    windows,
)
from locality import SCHEDULES, partition_text, schedule
from model import GPT, GPTConfig
from report import plots
from report.plots import layer_mean


def tiny(vocab_size, block_size, n_layer=2):
    torch.manual_seed(0)
    shape = {"n_layer": n_layer, "n_head": 2, "n_embd": 16}
    return GPT(GPTConfig(vocab_size, block_size, **shape, dropout=0.5, max_lookback=8))


@pytest.fixture
def measure(place, run):
    """measure(run, option, …) runs eval.py. Returns (results, stdout, stderr)."""

    def start(*words):
        status, printed, error = run("eval.py", *words, "--json", "r.json")
        assert status == 0, error
        return json.loads((place / "r.json").read_text()), printed, error

    return start


# --------------------------------------------------------------------------------------------------
# the command line


def test_eval_reproduces_the_results_and_turns_the_dial(place, measure):
    expected = json.loads((place / "runs" / "tiny" / "results.json").read_text())
    results, _, _ = measure("runs/tiny", "--figure", "f.svg")
    assert results["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert results["layers"] == expected["layers"]
    assert "</svg>" in (place / "f.svg").read_text()
    for option, value, locality in (
        ("schedule", "localist", [1, 1]),
        ("floor", 0.5, [0, 0.5]),
        ("partition", "block:16", [0, 1]),
        ("stride", 150, [0, 1]),
        ("split", "val", [0, 1]),
    ):
        results, _, _ = measure("runs/tiny", f"--{option}", value)
        assert [layer["locality"] for layer in results["layers"]] == locality
        assert results[option] == value != expected[option]
        assert abs(results["loss"] - expected["loss"]) > 1e-6, option
        assert results["layers"] != expected["layers"], option
        same = {"schedule", "floor", "partition", "stride", "split", "tokens"} - {option}
        same -= {"tokens"} if option == "split" else set()
        assert all(results[key] == expected[key] for key in same)
        if option == "partition":  # blocks of 16 bytes hold less of the first layer's attention
            assert results["layers"][0]["fidelity"] < 0.5 * expected["layers"][0]["fidelity"]


def test_eval_measures_a_run_on_another_text(place, measure):
    expected = json.loads((place / "runs" / "tiny" / "results.json").read_text())
    text = (place / "data" / "sample.txt").read_text()
    for other in (text, text.upper()):
        (place / "other.txt").write_text(other)
        results, printed, _ = measure("runs/tiny", "--source", "other.txt")
        assert results["source"] == "other.txt" in printed
        assert results["tokens"] == pytest.approx(expected["tokens"], 0.02)
        if other == text:
            assert results["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        else:
            assert results["loss"] > expected["loss"] + 0.3


def test_the_blocks_of_another_text_are_found_with_the_background_of_the_run(place):
    text = (place / "data" / "sample.txt").read_text()
    (place / "half.txt").write_text(text[len(text) // 2 :])
    with contextlib.chdir(place):
        _, config, trained_on = load("runs/tiny", source="half.txt")
        (tokens, lookback), vocabulary = read_text(config, trained_on, "all", "semantic")
    background = load(place / "runs" / "tiny")[2]["background"]
    rules = "semantic", config["max_lookback"]
    assert np.array_equal(lookback, partition_text(tokens, vocabulary, *rules, background))
    assert not np.array_equal(lookback, partition_text(tokens, vocabulary, *rules))


def test_an_export_of_a_run_keeps_its_blocks_and_the_dial(place, tmp_path):
    run, folder = place / "runs" / "tiny", tmp_path / "exported"
    trained, config, trained_on = load(run)
    blocks = {name: config[name] for name in ("tokenizer", "partition", "max_lookback", "anchor")}
    for model in (GPT.from_pretrained(run), trained):
        model.save_pretrained(folder)
        exported = json.loads((folder / "config.json").read_text())
        assert exported["locality"] == model.locality
        assert exported["localist"] == {**blocks, "floor": max(model.locality)}
        background = json.loads((folder / "background.json").read_text())
        assert background == trained_on["background"] and background["counts"]
    assert max(trained.locality) == config["floor"]
    GPT.from_pretrained(folder).save_pretrained(folder)  # published weights have no partition
    assert not (folder / "background.json").exists()


def test_a_dial_sweep_goes_through_every_schedule(place, measure):
    few = "runs/tiny", "--contexts", 2
    results, printed, _ = measure(*few, "--dial-sweep", "--figure", "d.png")
    assert (place / "d.png").read_bytes().startswith(b"\x89PNG")
    rows = results["dials"]
    local = [name for name in SCHEDULES if name != "distributed" for _ in range(4)]
    assert [row["schedule"] for row in rows] == ["distributed", *local]
    assert rows[0]["ratio"] == 1 and len({row["tokens"] for row in rows}) == 1
    for row in rows:
        locality = [layer["locality"] for layer in row["layers"]]
        assert locality == schedule(row["schedule"], 2, row["floor"])
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert f"{row['perplexity']:.3f}" in printed
        assert layer_mean(row, "fidelity") >= layer_mean(row, "locality") - 1e-6
    losses = {(row["schedule"], row["floor"]): row["loss"] for row in rows}
    for name, floor in (("quintic", 1.0), ("reversed", 0.5), ("localist", 0.25)):
        results, _, _ = measure(*few, "--schedule", name, "--floor", floor)
        assert results["loss"] == pytest.approx(losses[name, floor], abs=1e-9)


def test_a_dial_sweep_of_chosen_dials_has_intervals_over_the_text(measure):
    many = "runs/tiny", "--partition", "window:8", "--stride", 64  # enough contexts
    dials = "--schedule", "reversed", "--schedule", "quintic", "--schedule", "reversed"
    dials += "--floor", 1, "--floor", 0.5
    results, printed, _ = measure(*many, "--dial-sweep", *dials)
    rows = results["dials"]
    assert [(row["schedule"], row["floor"]) for row in rows] == [
        ("distributed", 1.0),
        *((name, floor) for name in ("reversed", "quintic") for floor in (1.0, 0.5)),
    ]
    assert rows[0]["text"] == [1, 1]
    for row in rows[1:]:
        low, high = row["text"]
        assert low < row["ratio"] < high
        assert f"{100 * (row['ratio'] - 1):+.2f}  [{100 * (low - 1):+.2f}, " in printed
    results, printed, _ = measure("runs/tiny", "--dial-sweep", "--contexts", 2, *dials[:2])
    assert [row["floor"] for row in results["dials"]] == [1.0, *FLOORS]
    assert all(row["text"] is None for row in results["dials"])  # too few contexts


def test_exported_weights_are_measured_on_any_text_with_the_tokenizer_of_their_size(
    place, measure, train, exported, gpt2_tokenizer
):
    (place / "short.txt").write_text((ROOT / "data" / "sample.txt").read_text()[:20000])
    source, blocks = ("--source", "short.txt"), ("--partition", "block:16")
    for tokenizer in ("bytes", "gpt2:300"):
        values = {"tokenizer": tokenizer, "source": "short.txt", "max_steps": 1, "block_size": 32}
        folder = train(f"export-{tokenizer[:4]}", **values)
        export, (model, _, _) = folder / "export", load(folder)
        model.save_pretrained(export)
        expected, _, _ = measure(folder, *blocks)
        options = *source, *blocks, "--schedule", "quintic"
        whole, _, _ = measure(export, *options)  # no part of the text was for training
        text = folder.parent.parent / "short.txt"
        assert whole["split"] == "all" and whole["bytes"] >= len(text.read_bytes()) - 20
        results, _, error = measure(export, *options, "--split", "test")
        assert results["loss"] == expected["loss"]
        size = model.config.vocab_size
        assert error == f"{export} has {size} tokens; using the tokenizer {tokenizer}\n"
    for options, locality in (([], 0), (["--schedule", "quintic"], 1)):
        results, _, _ = measure(exported, *source, *options)
        (layer,) = results["layers"]
        assert layer["locality"] == locality <= layer["fidelity"] + 1e-6
        assert results["loss"] == pytest.approx(math.log(50257), abs=0.5)


@pytest.mark.parametrize("name", ["best.pt", "results.json", "config.toml", "new.txt"])
def test_results_are_not_written_over_a_file_of_something_else(place, run, name):
    path = place / "runs" / "tiny" / name
    before = path.read_bytes() if path.exists() else None
    status, _, error = run("eval.py", "runs/tiny", "--contexts", 1, "--json", path)
    assert status == 2 and error.startswith("error: --json ") and error.count("\n") == 1
    assert (path.read_bytes() if path.exists() else None) == before


def test_predictions_that_are_not_finite_are_one_line(run, tmp_path):
    torch.manual_seed(0)
    model = tiny(256, 32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e30)
    model.save_pretrained(tmp_path / "huge")
    for more in ([], ["--dial-sweep"], ["--json", tmp_path / "r.json"]):
        source = "--source", "data/sample.txt", "--contexts", 1
        status, _, error = run("eval.py", tmp_path / "huge", *source, *more)
        assert status == 2 and "predictions of this model are not finite" in error
        assert error.count("error: ") == 1 and "Traceback" not in error
    assert not (tmp_path / "r.json").exists()


# --------------------------------------------------------------------------------------------------
# measures


@pytest.mark.parametrize(
    "n, T, stride", [(100, 10, 10), (101, 10, 3), (57, 16, 8), (10, 30, 5), (12, 11, 1), (2, 1, 1)]
)
def test_windows_score_every_token_but_the_first_exactly_once(n, T, stride):
    scored = []
    for start, first in windows(n, T, stride):
        assert 0 <= start and start + min(T, n - 1) < n
        scored += range(start + first + 1, start + min(T, n - 1) + 1)
    assert scored == list(range(1, n))


def count_by_hand(model, tokens, lookback, vocabulary, contexts):
    """What `evaluate` returns for contexts of 20 of 130 tokens, query by query."""
    nats, correct, layers, by_context = 0.0, 0, np.zeros((2, 4)), []
    near, far, backs = [], [], []  # losses after at most 16 tokens, and after more; lookbacks
    for start, first in contexts:
        rows = (a[start : start + 20] for a in (tokens, lookback, tokens[1:]))
        x, r, y = (torch.from_numpy(row.astype(np.int64))[None] for row in rows)
        with torch.no_grad():
            logits = model(x, r)[0][0]
        losses = F.cross_entropy(logits, y[0], reduction="none").tolist()
        for i in range(20):
            if 19 <= start + i < 110:  # only these tokens are at every position of a context
                (near if i < 16 else far).append(losses[i])
        back = [min(int(r[0, i]), i) for i in range(20)]
        backs += back[first:]
        nats += sum(losses[first:])
        by_context.append((sum(losses[first:]), 20 - first))
        correct += (logits[first:].argmax(-1) == y[0, first:]).sum().item()
        for layer, a in enumerate(attention_maps(model, x, r)):
            for i in range(first, 20):
                for row in a[0, :, i].tolist():  # per head
                    entropy = -sum(p * math.log2(p) for p in row if p > 0)
                    pointer = i - back[i] <= np.argmax(row) <= i
                    layers[layer] += sum(row[i - back[i] : i + 1]), pointer, entropy, row[0]
    n_bytes = sum(len(vocabulary[t]) for t in tokens[1:])
    return {
        "loss": nats / 129,
        "perplexity": math.exp(nats / 129),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "accuracy": correct / 129,
        **{"tokens": 129, "bytes": n_bytes, "stride": 5, "context": 20},
        "mean_lookback": np.mean(backs),
        "by_position": [(1, np.mean(near)), (17, np.mean(far))],
        "by_context": by_context,
        "layers": (layers / 129 / 2).tolist(),  # two heads
        "reach": None,  # a layer below 1 sees everything
    }


def test_evaluate_equals_counting_by_hand(monkeypatch):
    model = tiny(5, 20).eval()
    model.set_locality([0.3, 1])
    tokens = np.random.default_rng(0).integers(0, 5, 130).astype(np.uint16)
    vocabulary = [b"a", b"bc", b"def", b"ghij", b"klmno"]  # tokens of several bytes
    lookback = partition_text(tokens, vocabulary, "block:6", 8)
    expected = count_by_hand(model, tokens, lookback, vocabulary, windows(130, 20, 5))
    assert 10 < expected["accuracy"] * 129 < 60
    # it measures without dropout, restores the mode of the model, and the number of queries at a
    # time changes nothing
    for training, at_once in ((False, 10**9), (True, 1), (True, 7 * 8 * 2 * 20)):
        monkeypatch.setattr("eval.AT_ONCE", at_once)
        results = evaluate(model.train(training), tokens, lookback, vocabulary, stride=5)
        assert model.training == training and results.keys() == expected.keys()
        layers = results.pop("layers")
        assert [layer.pop("locality") for layer in layers] == [0.3, 1]
        keys = "fidelity", "pointer_accuracy", "entropy", "first_token"
        results["layers"] = [[layer[key] for key in keys] for layer in layers]
        for key, value in expected.items():
            if key != "reach":
                assert np.array(results[key]) == pytest.approx(np.array(value), rel=1e-5), key
        assert results["reach"] is None


def test_the_reach_of_a_local_model_equals_counting_by_hand():
    model, rng = tiny(5, 20), np.random.default_rng(1)
    model.set_locality([1, 1])
    i = np.arange(130)
    starts = np.maximum.accumulate(i - np.minimum(rng.integers(4, 30, 130), i // 2))
    lookback = i - starts  # some of it is above max_lookback, 8
    results = evaluate(model, i.astype(np.uint16) % 5, lookback, [b"a"] * 5, stride=5)
    distances = []
    for start, first in windows(130, 20, 5):
        for i in range(first, 20):
            j = i
            for _ in model.h:
                j -= min(int(lookback[start + j]), 8, j)
            distances.append(i - j)
    assert results["reach"] == {"median": np.median(distances), "most": max(distances)}
    assert lookback.max() > 8


# --------------------------------------------------------------------------------------------------
# figures


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "n_layer, block_size, words, title",
    [(2, 20, b"$\\newcommand{x}$ ", "$ is not a formula"), (1, 1, "漢字".encode(), "漢字")],
    ids=["no formula", "no glyph"],
)
def test_a_figure_is_drawn_without_dropout_and_warns_of_nothing(
    tmp_path, monkeypatch, n_layer, block_size, words, title
):
    model, T, drawn, draw = tiny(256, block_size, n_layer), block_size, [], plots.draw_attention
    tokens, own, zero = np.arange(60, dtype=np.uint16), [0.25] * n_layer, [0.0] * n_layer
    model.train().set_locality(own)
    monkeypatch.setattr("eval.choose_stretch", lambda *args: (3, T))
    monkeypatch.setattr(plots, "draw_attention", lambda *args: drawn.append(args) or draw(*args))
    layers = [{"locality": 0, "fidelity": 1, "entropy": n_layer - 1}] * n_layer
    figure(model, tokens, tokens % 8, [words] * 256, {"layers": layers}, tmp_path / "f.png", title)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    ((stretch, at_zero, at_own, *_),) = drawn
    idx, back = torch.arange(3, 3 + T)[None], torch.arange(3, 3 + T)[None] % 8
    block = model.in_block(back)
    assert model.locality == own  # as before
    assert (stretch.block == block[0, 0].numpy()).all() and stretch.pieces == [words] * T
    for locality, measured in ((zero, at_zero), (own, at_own)):
        model.eval().set_locality(locality)
        for a, row in zip(attention_maps(model, idx, back), measured, strict=True):
            assert row["fidelity"] == pytest.approx(fidelity_of(a, block).mean().item())
            assert row["entropy"] == pytest.approx(entropy_of(a).mean().item())
    for dial, weights in enumerate(stretch.maps):
        model.set_locality([*own[:-1], dial])
        expected = [a[0].mean(0) for a in attention_maps(model, idx, back)][-1]
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_a_figure_needs_no_home():
    code = "from report.plots import pyplot; pyplot().figure()"
    environment = {**os.environ, "HOME": "/dev/null"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
