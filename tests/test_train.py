"""The whole way: text -> blocks -> training -> measures -> samples, run as a user runs it."""

import json
import math
import os
import pickle
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import locality
from eval import evaluate, figure, layer_mean, load_run, windows
from locality import SCHEDULES, InputError, partition, schedule
from model import GPT, GPTConfig
from prepare_data import read_meta, read_split
from train import (Config, build_model, build_optimizers, compiles, learning_rate, precision, random_batch, read_config,
                   to_toml)

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.toml"
VOCABULARY = [bytes([i]) for i in range(256)]


def python(script, *args, cwd):
    """Run a script of the repository in the folder `cwd`, as a user would, in a process of its own."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=cwd, text=True, capture_output=True,
                          timeout=240)


@pytest.fixture
def run(place, monkeypatch, capsys):
    """The same within this process, which spares importing torch again: run(script, …) -> (status, stdout, stderr)."""
    monkeypatch.chdir(place)

    def start(script, *args):
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return start


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with the sample text, and in runs/tiny a finished run of configs/tiny.toml."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    (folder / "data" / "sample.txt").symlink_to(ROOT / "data" / "sample.txt")
    done = python("train.py", TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def prepared_folder(place):
    """Where the run of configs/tiny.toml has put its data."""
    folder, = (place / "data").glob("sample.bytes.semantic.128.*")
    return folder


# ---- a run


def test_a_run_leaves_what_it_promises(place):
    run = place / "runs" / "tiny"
    assert {p.name for p in run.iterdir()} == {"config.toml", "metrics.jsonl", "best.pt", "last.pt", "results.json",
                                               "attention.png"}
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["schedule"] == "quintic" and config["max_steps"] == 60 and config["seed"] == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    val = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert val[0] == pytest.approx(math.log(256), abs=0.3) and min(val) < 3.5
    results = json.loads((run / "results.json").read_text())
    assert [layer["locality"] for layer in results["layers"]] == schedule("quintic", 2)
    assert all(layer["fidelity"] >= layer["locality"] - 1e-6 for layer in results["layers"])
    assert results["layers"][-1]["fidelity"] == pytest.approx(1) == results["layers"][-1]["pointer_accuracy"]
    assert results["bits_per_byte"] == pytest.approx(math.log2(results["perplexity"]), abs=1e-6)    # a token is a byte
    assert {"command", "commit", "device", "date", "seed", "torch"} <= results.keys()
    state = torch.load(run / "last.pt", weights_only=True)    # the optimizer was told the rate that the metrics tell
    assert {group["lr"] for group in state["optimizers"][0]["param_groups"]} == {learning_rate(59, Config(**config))}
    printed = (place / "printed.txt").read_text()
    assert f"perplexity {results['perplexity']:.3f}" in printed and "three of them begin at" in printed


def test_same_config_same_seed_same_bits(place, run):
    states = []
    for name in ("a", "b"):
        assert run("train.py", TINY, "--max_steps", 12, "--eval_interval", 6, "--dropout=0.1", "--out",
                   f"runs/{name}")[0] == 0
        states.append(torch.load(place / "runs" / name / "last.pt", weights_only=True))
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    assert states[0]["val_loss"] == states[1]["val_loss"]


def test_eval_reproduces_the_results_and_turns_the_dial(place, run):
    expected = json.loads((place / "runs" / "tiny" / "results.json").read_text())
    assert run("eval.py", "runs/tiny", "--json", "r.json", "--figure", "f.svg")[0] == 0
    results = json.loads((place / "r.json").read_text())
    assert results["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert results["layers"] == expected["layers"] and "</svg>" in (place / "f.svg").read_text()
    layers = expected["layers"]
    for option, value, key, says in (
            ("--schedule", "localist", "schedule", [1, 1]), ("--fidelity", 0.5, "fidelity", [0, 0.5]),
            ("--partition", "block:16", "partition", [0, 1]), ("--stride", 150, "stride", [0, 1]),
            ("--split", "val", "split", [0, 1])):    # each on its own
        assert run("eval.py", "runs/tiny", option, value, "--json", "r.json")[0] == 0
        results = json.loads((place / "r.json").read_text())
        assert [layer["locality"] for layer in results["layers"]] == says and results[key] == value != expected[key]
        assert abs(results["loss"] - expected["loss"]) > 1e-6 and results["layers"] != layers, option
        same = {"schedule", "fidelity", "partition", "stride", "split"} - {key}
        assert all(results[k] == expected[k] for k in same)
        if option != "--split":
            assert results["tokens"] == expected["tokens"]
        if option == "--partition":    # blocks of 16 bytes hold less of the attention of the first layer
            assert results["layers"][0]["fidelity"] < 0.5 * layers[0]["fidelity"]


def test_the_dial_goes_through_every_schedule(place, run):
    status, printed, _ = run("eval.py", "runs/tiny", "--dial-sweep", "--contexts", 2, "--json", "d.json", "--figure", "d.png")
    rows = json.loads((place / "d.json").read_text())["dials"]
    assert status == 0 and (place / "d.png").read_bytes().startswith(b"\x89PNG")
    assert [row["schedule"] for row in rows] == ["distributed"] + [s for s in SCHEDULES if s != "distributed" for _ in range(4)]
    assert rows[0]["ratio"] == 1 and len({row["tokens"] for row in rows}) == 1
    for row in rows:
        assert [layer["locality"] for layer in row["layers"]] == schedule(row["schedule"], 2, row["fidelity"])
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert f"{row['perplexity']:.3f}" in printed and layer_mean(row, "fidelity") >= layer_mean(row, "locality") - 1e-6
    found = {(row["schedule"], row["fidelity"]): row["loss"] for row in rows}
    for name, f in (("quintic", 1.0), ("reversed", 0.5), ("localist", 0.25)):
        assert run("eval.py", "runs/tiny", "--schedule", name, "--fidelity", f, "--contexts", 2, "--json", "r.json")[0] == 0
        assert json.loads((place / "r.json").read_text())["loss"] == pytest.approx(found[name, f], abs=1e-9)


def test_sample_writes_text_the_same_for_the_same_seed(run):
    texts = [run("sample.py", "runs/tiny", "--prompt", "The mind ", "--tokens", 60, "--top-k", 20) for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] == 0
    assert texts[0][1].startswith("The mind ") and len(texts[0][1]) > 30
    greedy, cold = (run("sample.py", "runs/tiny", "--tokens", 20, "--temperature", t) for t in (0, 1e-46))
    assert greedy == cold and greedy[0] == 0
    # two texts from each of two prompts; at one likely token each they are the texts that each prompt has alone
    options = ("--tokens", 40, "--top-p", 1e-6)
    alone = [run("sample.py", "runs/tiny", "--prompt", prompt, *options)[1].removesuffix("\n")
             for prompt in ("The mind ", "I")]
    _, printed, _ = run("sample.py", "runs/tiny", "--prompt", "The mind ", "--prompt", "I", "--samples", 2, *options)
    assert printed.removesuffix("\n").split("\n\n---\n") == [alone[0], alone[0], alone[1], alone[1]]


def test_sample_uses_the_dial_and_the_blocks_of_the_run(place, run, monkeypatch):
    dials, partitioners = [], []
    monkeypatch.setattr(GPT, "generate", lambda model, *args: dials.append(model.locality) or [])
    monkeypatch.setattr(locality, "Partitioner", lambda *args: partitioners.append(args))
    for options in ([], ["--schedule", "localist"], ["--fidelity", "0.5"]):
        assert run("sample.py", "runs/tiny", *options)[0] == 0
    assert dials == [[0, 1], [1, 1], [0, 0.5]]
    words = read_meta(prepared_folder(place))["background"]
    assert words and partitioners == [(VOCABULARY, "semantic", 128, words)] * 3


def test_a_run_is_its_best_model_not_its_last(place, run):
    # a rate that rises until it undoes what was learnt
    assert run("train.py", TINY, "--learning_rate", 1, "--warmup_steps", 40, "--max_steps", 40, "--eval_interval", 1,
               "--patience", 3, "--eval_contexts", 2, "--dropout", 0.1, "--out", "runs/undone")[0] == 0
    folder = place / "runs" / "undone"
    results = json.loads((folder / "results.json").read_text())
    val = [m["val_loss"] for m in map(json.loads, (folder / "metrics.jsonl").open()) if "val_loss" in m]
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert 0 < results["best_step"] == np.argmin(val) == results["steps"] - 3 == len(val) - 4 < 36
    assert (best["step"], last["step"], best["val_loss"]) == (results["best_step"], results["steps"], min(val))
    for model in (load_run(folder)[0], GPT.from_pretrained(folder)):
        assert all(torch.equal(value, best["model"][key]) for key, value in model.state_dict().items())
    assert not torch.equal(best["model"]["wte.weight"], last["model"]["wte.weight"])
    model, config = load_run(folder)
    assert model.locality == [0, 1] and not model.training
    loss = evaluate(model, *read_split(prepared_folder(place), "test"), VOCABULARY, measure=False)["loss"]
    assert results["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_run_fine_tunes_into_another_and_leaves_for_transformers(place, run):
    assert run("train.py", TINY, "--init_from", "runs/tiny", "--schedule", "localist", "--max_steps", 2, "--out",
               "runs/tuned")[0] == 0
    first = json.loads((place / "runs" / "tuned" / "metrics.jsonl").open().readline())
    assert first["val_loss"] < 3.5    # it did not start from nothing
    transformers = pytest.importorskip("transformers")
    model, _ = load_run(place / "runs" / "tuned")
    model.save_pretrained(place / "export")
    model.set_locality([0, 0])
    other = transformers.GPT2LMHeadModel.from_pretrained(place / "export").eval()
    idx = torch.arange(40)[None]
    with torch.no_grad():
        assert (other(idx).logits - model(idx)[0]).abs().max() < 1e-4


# ---- causality, the whole way from text to logits


@pytest.mark.parametrize("method", ["semantic", "sentence", "window:9", "block:9"])
def test_nothing_after_a_token_reaches_its_lookback_or_its_logits(method):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 300, n_layer=3, n_head=2, n_embd=32, max_lookback=40)).eval()
    model.set_locality(schedule("linear", 3))
    text = (ROOT / "data" / "sample.txt").read_bytes()[2000:2300]
    other = (ROOT / "data" / "sample.txt").read_bytes()[9000:9300]

    def run(text):
        tokens = np.frombuffer(text, np.uint8)
        lookback = partition(tokens, VOCABULARY, method, 40)
        with torch.no_grad():
            logits = model(*(torch.from_numpy(a.astype(np.int64))[None] for a in (tokens, lookback)))[0]
        return lookback, logits[0]

    lookback, logits = run(text)
    for i in range(0, 300, 23):
        changed_lookback, changed = run(text[:i + 1] + other[i + 1:])
        assert np.array_equal(changed_lookback[:i + 1], lookback[:i + 1])
        assert torch.allclose(changed[:i + 1], logits[:i + 1], atol=1e-6, rtol=0)


def test_localisation_is_learnt_around():
    """A localised last layer costs nothing if an earlier layer may look further.

    A text is eight random tokens and their copy, a block each. To predict the copy a model must look back into the
    first block: `localist` cannot and is left to guess among 8 tokens, `quintic` does it in its first layer.
    """
    losses = {}
    for name in ("localist", "quintic"):
        torch.manual_seed(1)
        model = GPT(GPTConfig(8, 16, n_layer=2, n_head=2, n_embd=32, max_lookback=8))
        model.set_locality(schedule(name, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        lookback = torch.arange(16).remainder(8).expand(64, 16)
        for step in range(150):
            tokens = torch.randint(8, (64, 8)).repeat(1, 2)
            logits = model(tokens, lookback)[0]
            loss = F.cross_entropy(logits[:, 8:-1].flatten(0, 1), tokens[:, 9:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    assert losses["localist"] > 0.95 * math.log(8)
    assert losses["quintic"] < 0.5 * math.log(8)


# ---- a step


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    tokens, lookback = np.arange(5000, dtype=np.uint16), np.arange(5000, dtype=np.uint16) % 7

    def batch(seed, number):
        return random_batch(tokens, lookback, 20, Config(seed=seed, batch_size=6), number, torch.device("cpu"))

    x, r, y = batch(1, 5)
    assert x.shape == (6, 20) and torch.equal(y, x + 1) and torch.equal(r, x % 7) and len(x[:, 0].unique()) > 3
    assert all(map(torch.equal, batch(1, 5), (x, r, y)))
    assert not torch.equal(batch(1, 6)[0], x) and not torch.equal(batch(2, 5)[0], x)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_matrices_alone_decay(name):
    model = GPT(GPTConfig(64, 16, n_layer=2, n_head=2, n_embd=16))
    config = Config(optimizer=name, weight_decay=0.3, beta1=0.8, beta2=0.7)
    optimizers = build_optimizers(model, config, torch.device("cpu"))
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    owned = [(p, type(optimizer).__name__, group["weight_decay"]) for optimizer, group in groups for p in group["params"]]
    assert len(owned) == len(list(model.parameters())) and all(g["betas"] == (0.8, 0.7) for _, g in groups if "betas" in g)
    found = {p: rest for p, *rest in owned}
    for parameter, p in model.named_parameters():
        assert found[p][1] == (0 if "ln_" in parameter or parameter.endswith("bias") else 0.3), parameter
        inner = name == "muon" and parameter.startswith("h.") and p.dim() == 2
        assert found[p][0] == ("Muon" if inner else "AdamW"), parameter


@pytest.mark.parametrize("grad_clip", [0.05, 0])
def test_a_step_follows_the_mean_gradient_of_its_batches_clipped(place, run, grad_clip):
    # at a rate of 0 the model stays where it began, and the optimizer's moving average of the gradients can be foretold
    assert run("train.py", TINY, "--learning_rate", 0, "--min_lr", 0, "--max_steps", 2, "--log_interval", 1,
               "--batch_size", 2, "--grad_accum", 2, "--grad_clip", grad_clip, "--eval_contexts", 1,
               "--out", f"runs/clip{grad_clip}")[0] == 0
    folder = place / "runs" / f"clip{grad_clip}"
    config = Config(**tomllib.loads((folder / "config.toml").read_text()))
    torch.manual_seed(config.seed)
    model, train, cpu = build_model(config, 256), read_split(prepared_folder(place), "train"), torch.device("cpu")
    (optimizer,) = build_optimizers(model, config, cpu)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    metrics = [m for m in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in m]
    average = 0
    for step in range(2):
        loss = sum(model(*random_batch(*train, 192, config, 2 * step + i, cpu))[1] for i in range(2)) / 2
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        norm = gradient.norm().item()
        assert (metrics[step]["loss"], metrics[step]["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-4)
        assert norm > 0.1
        average = 0.9 * average + 0.1 * gradient * min(1, (grad_clip or math.inf) / norm)
    moments = torch.load(folder / "last.pt", weights_only=True)["optimizers"][0]["state"]
    found = torch.cat([moments[i]["exp_avg"].flatten() for i in range(len(parameters))])
    assert (found - average).norm() < 1e-4 * average.norm()


def test_dropout_is_what_the_config_says_from_scratch_and_from_weights(place):
    small = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}
    for init in (small, {"init_from": str(place / "runs" / "tiny")}):
        model = build_model(Config(tokenizer="bytes", dropout=0.25, max_lookback=77, **init), 256)
        assert (model.config.dropout, model.config.max_lookback, model.h[0].attn.dropout) == (0.25, 77, 0.25)


def test_a_run_that_diverges_says_so_and_leaves_clean_metrics(place, run):
    status, _, error = run("train.py", TINY, "--learning_rate", 100, "--warmup_steps", 0, "--grad_clip", 0,
                           "--max_steps", 30, "--log_interval", 100, "--eval_interval", 15, "--eval_contexts", 1,
                           "--out", "runs/diverged")
    error = error[error.index("error: "):]    # what comes after the progress bar
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: training diverged at step ") and "learning_rate" in error

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (place / "runs" / "diverged" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [0]
    assert load_run(place / "runs" / "diverged")[0].wte.weight.isfinite().all()


@pytest.mark.parametrize("harm, says", [
    ("gradient", "diverged at step 6 (.*gradients: h.1.attn.c_attn.weight; "),    # in the backward pass of step 6
    ("activation", "diverged at step 6 (.*outputs: h.0.mlp.c_fc; "),              # weights that are finite and far too large
    ("weight", "diverged at step 7 (.*weights: h.1.mlp.c_proj.bias; "),
    ("weight, then a signal", "diverged at step 6 (.*weights: h.1.mlp.c_proj.bias; ")])    # about to be saved
def test_divergence_names_step_and_layer_and_is_never_saved(place, run, monkeypatch, harm, says):
    set_locality, calls = GPT.set_locality, []

    def set_and_harm(model, lambdas):
        set_locality(model, lambdas)

        def backward(gradient):
            calls.append(1)
            if len(calls) != 6:
                return gradient
            if harm == "gradient":
                return gradient * math.nan
            name, value = ("h.0.mlp.c_fc.weight", 3e38) if harm == "activation" else ("h.1.mlp.c_proj.bias", math.inf)
            dict(model.named_parameters())[name].data.fill_(value)
            if harm.endswith("signal"):
                os.kill(os.getpid(), signal.SIGTERM)

        model.h[1].attn.c_attn.weight.register_hook(backward)

    out = place / "runs" / harm.replace(" ", "_")
    options = [TINY, "--max_steps", 8, "--eval_interval", 4, "--log_interval", 100, "--eval_contexts", 1, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "set_locality", set_and_harm)
        status, _, error = run("train.py", *options)
    assert status == 2 and re.search(says.replace("(", r"\("), error.split("\r")[-1]), error
    report = json.loads((out / "diverged.json").read_text())
    kind, name = re.search(r"(\w+): ([\w.]+); ", says).groups()
    assert report[kind][0] == name and f"step {report['step']} " in says
    for path in (out / "last.pt", out / "best.pt"):
        state = torch.load(path, weights_only=True)
        assert state["step"] in (0, 4) and all(value.isfinite().all() for value in state["model"].values())
    assert run("train.py", out, "--resume")[0] == 0    # unharmed, it goes on from there
    assert not (out / "diverged.json").exists()


# ---- evaluation


@pytest.mark.parametrize("n, T, stride", [(100, 10, 10), (101, 10, 3), (57, 16, 8), (10, 30, 5), (12, 11, 1), (2, 1, 1)])
def test_strided_windows_score_every_token_but_the_first_exactly_once(n, T, stride):
    scored = []
    for start, first in windows(n, T, stride):
        assert 0 <= start and start + min(T, n - 1) < n
        scored += range(start + first + 1, start + min(T, n - 1) + 1)
    assert scored == list(range(1, n))


def test_evaluate_equals_counting_by_hand():
    torch.manual_seed(0)
    model = GPT(GPTConfig(5, 20, n_layer=2, n_head=2, n_embd=16, dropout=0.5, max_lookback=8)).eval()
    model.set_locality([0.3, 1])
    tokens = np.random.default_rng(0).integers(0, 5, 130).astype(np.uint16)
    vocabulary = [b"a", b"bc", b"def", b"ghij", b"klmno"]    # tokens of several bytes
    lookback = partition(tokens, vocabulary, "block:6", 8)
    nats, correct, layers, at = 0.0, 0, np.zeros((2, 4)), []
    for start, first in windows(130, 20, 5):
        x, r, y = (torch.from_numpy(a.astype(np.int64))[None] for a in (
            tokens[start:start + 20], lookback[start:start + 20], tokens[start + 1:start + 21]))
        with torch.no_grad():
            logits = model(x, r)[0][0]
        at.append(F.cross_entropy(logits, y[0], reduction="none").tolist())
        logits = logits[first:]
        nats += F.cross_entropy(logits, y[0, first:], reduction="sum").item()
        correct += (logits.argmax(-1) == y[0, first:]).sum().item()
        for layer, a in enumerate(model.attention_maps(x, r)):
            for i in range(first, 20):
                for row in a[0, :, i].tolist():
                    back = min(int(r[0, i]), i)
                    entropy = -sum(p * math.log2(p) for p in row if p > 0)
                    layers[layer] += sum(row[i - back:i + 1]), i - back <= np.argmax(row) <= i, entropy, row[0]
    n_bytes, layers = sum(len(vocabulary[t]) for t in tokens[1:]), layers / 129 / 2    # two heads
    assert 10 < correct < 60    # of 129
    for training in (False, True):    # it measures without dropout, and leaves the model as it was
        results = evaluate(model.train(training), tokens, lookback, vocabulary, stride=5)
        assert model.training == training and results["tokens"] == 129
        assert results["loss"] == pytest.approx(nats / 129, rel=1e-5)
        assert results["perplexity"] == pytest.approx(math.exp(nats / 129), rel=1e-5)
        assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert (results["bytes"], results["accuracy"]) == (n_bytes, correct / 129)
        (one, early), (seventeen, late) = results["by_position"]
        assert (one, seventeen) == (1, 17)
        assert (early, late) == pytest.approx((np.array(at)[:, :16].mean(), np.array(at)[:, 16:].mean()), rel=1e-5)
        for layer, expected in zip(results["layers"], layers.tolist()):
            found = [layer[key] for key in ("fidelity", "pointer_accuracy", "entropy", "first_token")]
            assert found == pytest.approx(expected, rel=1e-5)
        assert [layer["locality"] for layer in results["layers"]] == [0.3, 1]


def test_a_figure_is_drawn_without_dropout(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 20, n_layer=2, n_head=2, n_embd=16, dropout=0.5, max_lookback=8)).train()
    tokens = np.arange(60, dtype=np.uint16)
    maps, drawn = model.attention_maps, []
    monkeypatch.setattr(model, "attention_maps", lambda *a: drawn.append((a, list(maps(*a)))) or drawn[-1][1])
    results = {"layers": [{"locality": 0, "fidelity": 1, "pointer_accuracy": 1, "entropy": 1}] * 2}
    figure(model, tokens, tokens % 8, results, tmp_path / "f.png", "$ a title")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    (args, found), = drawn
    assert all(map(torch.equal, found, maps(*args)))
    model.train()
    assert not all(map(torch.equal, found, maps(*args)))


# ---- configurations


def test_every_config_in_the_folder_is_valid_and_says_only_what_differs():
    paths = sorted(path for path in (ROOT / "configs").glob("*.toml") if not path.stem.startswith("sweep"))
    assert {f"gpt2_{s}.toml" for s in ("distributed", "localist", "linear", "quadratic", "cubic", "quartic", "quintic",
                                       "window")} | {"quickstart.toml", "tiny.toml"} <= {p.name for p in paths}
    for path in paths:
        config = read_config([str(path)])
        said = tomllib.loads(path.read_text())
        assert Config(**tomllib.loads(to_toml(config))) == config
        assert path.stem == "tiny" or path.stem.split("_")[0] in ("quickstart", "gpt2", "pretrain")
        for key in said.keys() - {"source", "schedule", "fidelity", "max_lookback", "partition"}:
            assert said[key] != getattr(Config(), key), f"{path.name}: {key} repeats the default"


def test_overrides_and_the_learning_rate():
    config = read_config([str(TINY), "--max-steps=200", "--source", "x y.txt", "--compile", "false", "--fidelity", "0.5",
                          "--warmup_steps", "10", "--seed", "3"])
    assert (config.max_steps, config.source, config.compile, config.fidelity, config.seed) == (200, "x y.txt", False, 0.5, 3)
    rates = [learning_rate(step, config) for step in range(201)]
    assert rates[0] == pytest.approx(3e-4) and max(rates) == rates[10] == 3e-3 and rates[200] == pytest.approx(3e-5)
    assert read_config([str(TINY), "--source", '["a", "b"]']).source == ["a", "b"]
    assert read_config([str(TINY), "--out", ""]).out == "runs/tiny"


@pytest.mark.parametrize("override, says", [
    (["--schedul", "cubic"], "schedule"), (["--schedule", "septic"], "quintic|quartic|septic"),
    (["--n_layer", "two"], "n_layer"), (["--n_layer", "2.5"], "n_layer"), (["--n_layer", "0"], "n_layer"),
    (["--fidelity", "0"], "fidelity"), (["--fidelity", "1.5"], "fidelity"), (["--fidelity", "nan"], "fidelity"),
    (["--learning_rate", "inf"], "learning_rate"), (["--dropout", "1"], "dropout"), (["--compile", "maybe"], "compile"),
    (["--dtype", "float16"], "dtype"), (["--partition", "window:x"], "window"), (["--tokenizer", "bpe"], "tokenizer"),
    (["--tokenizer", "gpt2:99"], "tokenizer"), (["--min_lookback", "200"], "min_lookback"), (["--dial", "half"], "dial"),
    (["--anchor", "1"], "anchor"), (["--optimizer", "sgd"], "optimizer"),
    (["--seed", "true"], "seed"), (["--seed"], "seed"), (["seed", "3"], "seed"), (["--max_lookback", "-1"], "max_lookback"),
    (["--source", ""], "source"), (["--batch_size", "[4]"], "batch_size")])
def test_a_wrong_value_is_named(override, says):
    with pytest.raises(InputError, match=says):
        read_config([str(TINY), *override])


def test_mistakes_end_in_one_line_and_status_2(place, run, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))    # no tokenizer, and
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")    # no network
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (place / "broken.toml").write_text("schedule = quintic")
    (place / "three.toml").write_text("out = 3")
    (place / "false.toml").write_text("out = false")
    GPT(GPTConfig(1000, 128, n_layer=2, n_head=2, n_embd=32)).save_pretrained(tmp_path / "other")
    new_run = ("train.py", TINY, "--out", "runs/x")
    mistakes = [
        (["train.py"], "config"),
        (["train.py", "nothing.toml"], "nothing.toml"),
        (["train.py", "broken.toml"], "TOML"),
        (["train.py", TINY], "overwrite"),    # the run is there already
        ([*new_run, "--source", "nothing.txt"], "nothing.txt"),
        ([*new_run, "--n_embd", 30, "--n_head", 4], "divisible"),
        ([*new_run, "--block_size", 100000], "block_size"),
        ([*new_run, "--init_from", "runs/tiny", "--block_size", 1000], "block_size"),
        ([*new_run, "--init_from", "runs/tiny", "--n_layer", 3], "n_layer"),
        ([*new_run, "--init_from", "nowhere"], "nowhere"),
        ([*new_run, "--init_from", tmp_path / "other", "--block_size", 100], "1000"),
        ([*new_run, "--device", "cuda:99"], "cuda:99"),
        (["eval.py", "data"], "checkpoint"),
        (["eval.py", "nowhere", "--source", "data/sample.txt"], "nowhere"),
        (["eval.py", tmp_path / "other", "--source", "data/sample.txt"], "vocabulary"),
        (["eval.py", "runs/tiny", "--source", "data/sample.txt"], "--source"),
        (["eval.py", "runs/tiny", "--dial-sweep", "--fidelity", 0.5], "--dial-sweep"),
        (["eval.py", "runs/tiny", "--contexts", 0], "--contexts"),
        (["train.py", "three.toml"], "out must be"),
        (["train.py", "false.toml"], "out must be"),
        (["sweep.py", "three.toml"], "out must be"),
        (["sweep.py"], "config"),
        (["sweep.py", TINY], "sweep"),
        (["sweep.py", ROOT / "configs" / "sweep_smoke.toml", "--report", "--out", "runs/none"], "runs/none"),
        (["eval.py", "runs/tiny", "--schedule", "sextic"], "sextic"),
        (["eval.py", "runs/tiny", "--stride", 1000], "stride"),
        (["eval.py", "runs/tiny", "--figure", "f.gif"], "f.gif"),
        (["sample.py", "runs/tiny", "--prompt", ""], "prompt"),
        (["sample.py", "runs/tiny", "--top-p", 0], "top-p"),
        (["prepare_data.py", "nothing.txt"], "nothing.txt"),
        (["prepare_data.py", "data/sample.txt", "--tokenizer", "gpt2"], "TIKTOKEN_CACHE_DIR"),
    ]
    for command, says in mistakes:
        status, _, error = run(*command)
        error = error.split("\r")[-1]    # what stands after a progress bar was wiped
        assert status == 2 and error.count("\n") == 1, (command, error)
        assert error.startswith("error: ") and says in error, (command, error)
    assert not (place / "runs" / "x").exists()


# ---- stopping and going on


def endings(run):
    """What a finished run is, to the bit: weights, and metrics without their timings."""
    state = torch.load(run / "last.pt", weights_only=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return state["model"], [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in metrics]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_freed_memory_is_kept_and_comes_back_without_page_faults_unless_it_is_scarce():
    code = """if True:
        import resource, sys, torch
        from train import keep_memory
        keep_memory(int(sys.argv[1]))
        for _ in range(40):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(100 * 2 ** 20, dtype=torch.uint8).fill_(1)    # 25,600 pages of 4 KiB, or 50 of 2 MiB
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    new = []    # how often the memory was new
    for largest in (0, 10 ** 15):
        done = subprocess.run([sys.executable, "-c", code, str(largest)], cwd=ROOT, text=True, capture_output=True)
        new.append(sum(int(faults) >= 10 for faults in done.stdout.split()))
    assert new[0] <= 20 and new[1] == 40    # it takes a few rounds until the free places fit


@pytest.mark.parametrize("threads, optimizer", [(1, "muon"), (2, "adamw")])
def test_killed_at_random_and_resumed_it_ends_at_the_same_bits(place, run, threads, optimizer, monkeypatch):
    """KILLS=50 kills it 50 times in place of 3."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    options = ["--max_steps", "60", "--eval_interval", "10", "--log_interval", "2", "--dropout", "0.1",
               "--optimizer", optimizer, "--out"]
    whole, folder, killed = place / "runs" / f"whole{threads}", place / "runs" / f"killed{threads}", 0
    assert python("train.py", TINY, *options, whole, cwd=place).returncode == 0
    rng = random.Random(5)
    for lines in sorted(rng.choices(range(2, 35), k=int(os.environ.get("KILLS", 3)))):    # so many lines of metrics
        command = [folder, "--resume"] if killed else [TINY, *options, folder]
        with subprocess.Popen([sys.executable, ROOT / "train.py", *command], cwd=place, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (folder / "last.pt").exists() or \
                    process.poll() is None and len((folder / "metrics.jsonl").read_bytes().splitlines()) < lines:
                time.sleep(0.002)
            time.sleep(rng.random() / 50)
            killed += process.poll() is None
            process.kill()
    assert killed and python("train.py", folder, "--resume", cwd=place).returncode == 0
    assert_same_run(whole, folder)
    samples = [run("sample.py", name, "--tokens", 40)[:2] for name in (whole, folder)]
    assert samples[0] == samples[1] and samples[0][0] == 0


def assert_same_run(whole, folder):
    """Weights, last and best, metrics and results are the same, to the bit."""
    expected, found = endings(whole), endings(folder)
    assert found[1] == expected[1]
    assert all(torch.equal(value, found[0][key]) for key, value in expected[0].items())
    best = [torch.load(name / "best.pt", weights_only=True)["model"] for name in (whole, folder)]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())
    keys = ("loss", "perplexity", "accuracy", "layers", "by_position", "best_step", "steps")
    results = [json.loads((name / "results.json").read_text()) for name in (whole, folder)]
    assert [results[0][key] for key in keys] == [results[1][key] for key in keys]
    assert not list(folder.glob("*.tmp"))


def test_killed_while_it_saves_the_checkpoint_of_before_is_whole(place):
    code = """if True:
        import os, signal, sys
        sys.path.insert(0, sys.argv.pop(1))
        import train
        replace, saves = os.replace, []
        def die(temporary, path):
            saves.append(path) if str(path).endswith("last.pt") else None
            if len(saves) == 3:
                os.kill(os.getpid(), signal.SIGKILL)    # written, but not renamed
            replace(temporary, path)
        os.replace = die
        train.main()"""
    done = subprocess.run([sys.executable, "-c", code, ROOT, TINY, "--out", "runs/unsaved"], cwd=place, capture_output=True)
    folder = place / "runs" / "unsaved"
    assert done.returncode == -signal.SIGKILL and len(list(folder.glob("last.pt.*.tmp"))) == 1
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 20
    assert python("train.py", "runs/unsaved", "--resume", cwd=place).returncode == 0
    assert_same_run(place / "runs" / "tiny", folder)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(place, run):
    options = [TINY, "--warmup_steps", "30", "--eval_interval", "4", "--log_interval", "100", "--eval_contexts", "1"]
    assert run("train.py", *options, "--max_steps", "8", "--out", "runs/roomy")[0] == 0
    assert run("train.py", *options, "--max_steps", "4", "--out", "runs/full")[0] == 0
    folder = place / "runs" / "full"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def resume_with(limit, *more):    # no file may grow longer than that, as on a disk that is full
        done = subprocess.run([sys.executable, ROOT / "train.py", "runs/full", "--resume", "--max_steps", "8", *more],
                              cwd=place, text=True, capture_output=True, timeout=240,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and error.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
        assert "could not be written (" in error
        assert all(name in before for name in os.listdir(folder))    # no temporary file is left
        for name in ("best.pt", "last.pt"):
            assert (folder / name).read_bytes() == before[name]
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        return error

    assert ".pt" in resume_with(100_000)
    assert "metrics.jsonl" in resume_with(1500, "--log_interval", "1", "--eval_interval", "99", "--max_steps", "30")
    assert run("train.py", "runs/full", "--resume", *options[3:], "--max_steps", "8")[0] == 0    # there is room again
    assert_same_run(place / "runs" / "roomy", folder)


def test_a_second_run_in_the_same_folder_is_refused(place, run):
    command = [sys.executable, ROOT / "train.py", TINY, "--max_steps", "100000", "--out", "runs/taken"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (place / "runs" / "taken" / "last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        for second in (["runs/taken", "--resume"], [TINY, "--overwrite", "--out", "runs/taken"]):
            status, _, error = run("train.py", *second)
            assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and "another process" in error
        assert process.poll() is None and (place / "runs" / "taken" / "last.pt").exists()
        process.kill()
    step = torch.load(place / "runs" / "taken" / "last.pt", weights_only=True)["step"]
    assert run("train.py", "runs/taken", "--resume", "--max_steps", step + 1)[0] == 0    # the lock died with the process


def test_a_resume_without_its_metrics_is_refused(place, run):
    assert run("train.py", TINY, "--max_steps", 2, "--out", "runs/unmetred")[0] == 0
    (place / "runs" / "unmetred" / "metrics.jsonl").write_text("{}\n")
    status, _, error = run("train.py", "runs/unmetred", "--resume", "--max_steps", 4)
    assert status == 2 and "metrics.jsonl is shorter" in error
    assert (place / "runs" / "unmetred" / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_long_run_grows_neither_in_memory_nor_in_open_files(place):
    small = ["--block_size", "32", "--n_embd", "16", "--batch_size", "2", "--eval_interval", "100", "--eval_contexts", "4",
             "--partition", "block:16", "--max_steps", "2000", "--log_interval", "5", "--out", "runs/marathon"]
    folder, seen = place / "runs" / "marathon", []
    with subprocess.Popen([sys.executable, ROOT / "train.py", TINY, *small], cwd=place, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            time.sleep(0.1)
            try:
                metrics = (folder / "metrics.jsonl").read_text()
                resident = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])
                handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            except (OSError, TypeError):
                continue    # it has not begun, or just ended
            steps = [json.loads(line)["step"] for line in metrics.splitlines()]    # whole lines, whenever one looks
            assert not metrics or metrics.endswith("\n")
            seen.append((steps[-1] if steps else 0, resident, handles))
    assert process.returncode == 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(5, 2001, 5))
    assert [m["step"] for m in metrics if "val_loss" in m] == list(range(0, 2001, 100))
    early, late = ([(rss, n) for step, rss, n in seen if a <= step < b] for a, b in ((300, 700), (1600, 2000)))
    assert len(early) > 2 and len(late) > 2
    assert max(rss for rss, _ in late) < 1.05 * max(rss for rss, _ in early)
    assert max(n for _, n in late) <= max(n for _, n in early) + 1    # a file that is just being saved


def test_a_signal_ends_a_run_cleanly_and_the_rest_follows(place, run):
    command = [sys.executable, "-u", str(ROOT / "train.py"), str(TINY), "--max_steps", "3000", "--out", "runs/long"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (place / "runs" / "long" / "last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "python train.py runs/long --resume" in error
    step = torch.load(place / "runs" / "long" / "last.pt", weights_only=True)["step"]
    status, printed, _ = run("train.py", "runs/long", "--resume", "--max_steps", step + 4)
    assert status == 0 and f"from step {step}" in printed
    assert json.loads((place / "runs" / "long" / "results.json").read_text())["steps"] == step + 4
    status, _, error = run("train.py", "runs/long", "--resume", "--fidelity", 0.5)
    assert status == 2 and "fidelity was 1.0, is 0.5" in error
    assert run("train.py", "runs/none", "--resume")[0] == 2


def test_a_resumed_run_that_is_stopped_at_once_leaves_whole_metrics(place, run, monkeypatch):
    options = ["--eval_interval", 2, "--eval_contexts", 1, "--log_interval", 100]
    assert run("train.py", TINY, *options, "--max_steps", 2, "--out", "runs/stopped")[0] == 0
    metrics = place / "runs" / "stopped" / "metrics.jsonl"
    with metrics.open("a") as f:    # as a run does that is killed while it writes, after its last checkpoint
        f.write('{"step": 4, "val_loss": 3.0}\n' * 20 + '{"step": 6, "val')
    clip = torch.nn.utils.clip_grads_with_norm_

    def stop_and_clip(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grads_with_norm_", stop_and_clip)
        assert run("train.py", "runs/stopped", "--resume", "--max_steps", 6)[0] == 128 + signal.SIGTERM
    assert torch.load(place / "runs" / "stopped" / "last.pt", weights_only=True)["step"] == 3
    assert [json.loads(line)["step"] for line in metrics.open()] == [0, 2]
    assert run("train.py", "runs/stopped", "--resume", "--max_steps", 6)[0] == 0
    assert [json.loads(line)["step"] for line in metrics.open()] == [0, 2, 4, 6]


# ---- several processes


def children(pid):
    """The processes that process `pid` has started, from Linux's /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:    # it has ended
            continue
        found += [int(path.parent.name)] * (parent == pid)
    return found


def test_the_processes_that_the_readme_starts_can_share_a_batch():
    lines = (ROOT / "README.md").read_text().replace("\\\n", "").splitlines()
    commands = [line for line in lines if line.startswith("    torchrun") and "configs/" in line]
    assert len(commands) >= 2
    for line in commands:
        world = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", line))
        assert read_config([str(ROOT / re.search(r"configs/\w+\.toml", line)[0])]).batch_size % world == 0, line


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_two_processes_train_what_one_does_and_when_one_dies_the_run_ends_and_can_go_on(place, run):
    options = [str(TINY), "--max_steps", "60", "--grad_accum", "2", "--log_interval", "1", "--eval_interval", "5", "--out"]
    assert run("train.py", *options, "runs/alone")[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = place / "runs" / "both" / "metrics.jsonl"
    process = subprocess.Popen([*torchrun, *options, "runs/both"], cwd=place, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 10):
        time.sleep(0.005)
    before = metrics.read_text().splitlines()
    os.kill(max(children(process.pid)), signal.SIGKILL)    # the other one must not wait for it for ever
    error = process.communicate(timeout=100)[1]
    assert process.returncode and "Signal 9 (SIGKILL)" in error and not (metrics.parent / "results.json").exists()
    done = subprocess.run([*torchrun, "runs/both", "--resume"], cwd=place, text=True, capture_output=True, timeout=200,
                          env=environment)
    assert done.returncode == 0 and done.stdout.count("the best model") == 1, done.stderr
    one, both = ([json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").open()]
                 for name in ("alone", "both"))
    assert len(both) == len(one) == 73 and json.loads(before[3]) == both[3]
    for a, b in zip(one, both):
        assert a["step"] == b["step"] and a.get("lr") == b.get("lr")
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:    # rounding grows in time
            assert a[key] == pytest.approx(b[key], abs=1e-5 if a["step"] <= 20 else 1e-3), (key, a["step"])


def test_processes_share_a_batch_without_overlap():
    tokens, config = np.arange(5000, dtype=np.uint16), Config(batch_size=6)
    whole = random_batch(tokens, tokens, 20, config, 7, torch.device("cpu"))
    shares = [random_batch(tokens, tokens, 20, config, 7, torch.device("cpu"), rank, 3) for rank in range(3)]
    for all_rows, *rows in zip(whole, *shares):
        assert {tuple(row) for row in all_rows.tolist()} == {tuple(row) for part in rows for row in part.tolist()}
        assert [len(part) for part in rows] == [2, 2, 2]


def test_a_batch_that_cannot_be_shared_is_refused(place, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    status, _, error = run("train.py", TINY, "--out", "runs/shared")
    assert status == 2 and error.count("\n") == 1 and "batch_size (4)" in error and "3 processes" in error


def test_bfloat16_is_chosen_where_the_machine_has_fast_matrix_products_in_it(monkeypatch):
    cases = ((True, "c++", (True, True)), (True, None, (True, False)), (False, "c++", (False, False)))
    for amx, compiler, expected in cases:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": amx}, raising=False)
        monkeypatch.setattr("shutil.which", lambda name: compiler)
        device = torch.device("cpu")
        with precision(device, "auto"):
            assert (torch.is_autocast_enabled("cpu"), compiles(device, "auto")) == expected
        with precision(device, "float32"):
            assert not torch.is_autocast_enabled("cpu") and compiles(device, True) and not compiles(device, False)


def test_a_checkpoint_without_its_config_is_refused(place, run):
    (place / "runs" / "bare").mkdir()
    state = torch.load(place / "runs" / "tiny" / "best.pt", weights_only=True)
    for config in ({}, [], None):
        torch.save({**state, "config": config}, place / "runs" / "bare" / "best.pt")
        with pytest.raises(InputError, match="best.pt"):
            load_run(place / "runs" / "bare")
    for script in ("eval.py", "sample.py"):
        status, _, error = run(script, "runs/bare")
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_any_place_is_refused_and_not_run(place, run):
    folder, executed = place / "runs" / "bombed", place / "executed"
    bare, zipped = place / "bare.pkl", place / "zipped.pkl"
    bare.write_bytes(pickle.dumps(Bomb(executed)))
    torch.save({"step": 1, "config": Bomb(executed)}, zipped)
    for bomb in (bare, zipped):
        shutil.copytree(place / "runs" / "tiny", folder, dirs_exist_ok=True)
        for name in ("best.pt", "last.pt"):
            shutil.copy(bomb, folder / name)
        (place / "model.safetensors").write_bytes(bomb.read_bytes())
        for command in (["eval.py", folder], ["sample.py", folder], ["train.py", folder, "--resume"], ["train.py", bomb],
                        ["train.py", TINY, "--init_from", bomb, "--out", "runs/x"], ["sweep.py", bomb],
                        ["train.py", TINY, "--init_from", place / "model.safetensors", "--out", "runs/x"],
                        ["train.py", TINY, "--source", bomb, "--out", "runs/x"], ["prepare_data.py", bomb]):
            status, _, error = run(*command)
            assert status == 2 and error.split("\r")[-1].startswith("error: ") and error.count("\n") == 1, (command, error)
    shutil.copytree(prepared_folder(place), place / "data" / "bombed")
    shutil.copy(bare, place / "data" / "bombed" / "meta.json")
    with pytest.raises(InputError, match="meta.json"):
        read_meta(place / "data" / "bombed")
    assert not executed.exists()


def test_a_run_is_not_measured_on_a_text_that_changed(place, run):
    (place / "book.txt").write_text((ROOT / "data" / "sample.txt").read_text())
    assert run("train.py", TINY, "--source", "book.txt", "--max_steps", 2, "--out", "runs/book")[0] == 0
    (place / "book.txt").write_text("Another text. " * 2000)
    for command in (["eval.py", "runs/book"], ["train.py", "runs/book", "--resume", "--max_steps", 4]):
        status, _, error = run(*command)
        assert status == 2 and "changed" in error


def changed(place, path, **config):
    """Save the checkpoint again with another config."""
    state = torch.load(path, weights_only=True)
    state["config"] = {key: value for key, value in {**state["config"], **config}.items() if value is not None}
    torch.save(state, path)


def test_a_run_is_not_measured_on_other_tokens_or_blocks_than_its_own(place, run, monkeypatch):
    folder, data = place / "runs" / "own", place / "data" / "own"
    assert run("train.py", TINY, "--data", data, "--max_steps", 2, "--out", folder)[0] == 0
    commands = ["eval.py", folder], ["train.py", folder, "--resume", "--max_steps", 4]
    lookback = (data / "test.lookback.bin").read_bytes()
    (data / "test.lookback.bin").write_bytes(lookback[:-2] + b"\0\0")    # as long as it was
    for command in commands:
        status, _, error = run(*command)
        assert status == 2 and "test.lookback.bin is not what was prepared" in error and error.count("\n") == 1
    (data / "test.lookback.bin").write_bytes(lookback)
    assert run("prepare_data.py", "data/sample.txt", "--tokenizer", "bytes", "--partition", "block:9", "--out", data)[0] == 0
    status, printed, _ = run(*commands[0])    # prepared with other parameters since then: made again, and said
    assert status == 0 and "own is made again: it was made with another source_sha256" not in printed
    assert "own is made again: it was made with another partition, max_lookback" in printed
    for name, says in (("partition", "other blocks: the partitioner"), ("encode", "other tokens: the tokenizer")):
        with monkeypatch.context() as patch:    # another version of the code
            if name == "partition":
                patch.setattr("prepare_data.partition", lambda tokens, *args, out: out.__setitem__(slice(None), 1))
            else:
                patch.setattr("prepare_data.encode", lambda files, encoding, path: path.write_bytes(b"a\0b\0" * 50000))
            shutil.rmtree(data)
            for command in commands:
                status, _, error = run(*command)
                assert status == 2 and says in error and error.split("\r")[-1].count("\n") == 1, error
    shutil.rmtree(data)
    assert run(*commands[0])[0] == 0
    for name in ("best.pt", "last.pt"):
        changed(place, folder / name, tokenizer="gpt2:300")
    for script in ("eval.py", "sample.py"):
        status, _, error = run(script, folder)
        assert status == 2 and "a model of 256 tokens that names a tokenizer of 300" in error


def test_runs_and_folders_of_an_earlier_version_are_read(place, run):
    folder, data = place / "runs" / "early", place / "data" / "early"
    assert run("train.py", TINY, "--data", data, "--max_steps", 2, "--out", folder)[0] == 0
    meta = read_meta(data)
    old = {key: value for key, value in meta.items() if key not in ("files", "sha256")}
    (data / "meta.json").write_text(json.dumps(old))
    for name in ("best.pt", "last.pt"):
        changed(place, folder / name, files=None)
    status, printed, _ = run("eval.py", folder)
    assert status == 0 and printed.count("is made again") == 1 and read_meta(data) == meta
    told, before = run("sample.py", folder, "--tokens", 30), torch.load(folder / "best.pt", weights_only=True)
    del before["config"]["background"]    # of a version earlier still, which left it in meta.json alone
    torch.save(before, folder / "best.pt")
    assert told == run("sample.py", folder, "--tokens", 30) and told[0] == 0
    assert run("train.py", folder, "--resume", "--max_steps", 4)[0] == 0
