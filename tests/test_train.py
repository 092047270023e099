"""The whole way: text -> blocks -> training -> measures -> samples, run as a user runs it."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import locality
import prepare_data
from conftest import ROOT, TINY, flags, prepared_folder
from eval import evaluate, figure, layer_mean, load_run, windows
from locality import SCHEDULES, Partitioner, partition, schedule
from model import GPT, GPTConfig
from prepare_data import read_meta, read_split, token_bytes
from support.files import InputError
from support.settings import to_toml
from train import (
    Config,
    Muon,
    Text,
    build_model,
    build_optimizers,
    learning_rate,
    orthogonalise,
    random_batch,
    read_config,
)

VOCABULARY = [bytes([i]) for i in range(256)]


# ---- a run


def test_a_run_leaves_what_it_promises(place):
    run = place / "runs" / "tiny"
    names = "config.toml metrics.jsonl best.pt last.pt results.json attention.png"
    assert {p.name for p in run.iterdir()} == set(names.split())
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["schedule"] == "quintic" and config["max_steps"] == 60 and config["seed"] == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    val = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert val[0] == pytest.approx(math.log(256), abs=0.3) and min(val) < 3.5
    results = json.loads((run / "results.json").read_text())
    assert [layer["locality"] for layer in results["layers"]] == schedule("quintic", 2)
    assert all(layer["fidelity"] >= layer["locality"] - 1e-6 for layer in results["layers"])
    last = results["layers"][-1]
    assert last["fidelity"] == pytest.approx(1) == last["pointer_accuracy"]
    bits = math.log2(results["perplexity"])  # a token is a byte
    assert results["bits_per_byte"] == pytest.approx(bits, abs=1e-6)
    assert {"command", "commit", "device", "date", "seed", "torch"} <= results.keys()
    # the optimizer was told the rate that the metrics tell
    state = torch.load(run / "last.pt", weights_only=True)
    rates = {group["lr"] for group in state["optimizers"][0]["param_groups"]}
    assert rates == {learning_rate(59, Config(**config))}
    assert (run / "attention.png").read_bytes().startswith(b"\x89PNG")
    printed = (place / "printed.txt").read_text()
    assert f"perplexity {results['perplexity']:.3f}" in printed
    assert "some of the blocks begin at" in printed
    test = (ROOT / "data" / "sample.txt").read_bytes()[-results["bytes"] - 1 :]
    told, _, more = printed.partition("what it writes after ")[2].partition(":\n")
    told = told.removeprefix(f"{test[:40].decode()!r}, ")
    assert told == ("▌ where a block begins" if "▌" in more else "no new block begins")
    assert len(more) > 300


def test_without_a_terminal_a_run_prints_plain_lines(place):
    """No bar and no carriage return; a line for each log_interval."""
    printed, errors = (place / f"{name}.txt" for name in ("printed", "errors"))
    assert b"\r" not in printed.read_bytes() + errors.read_bytes() and not errors.read_bytes()
    lines = re.findall(r"^step (\d+)/60: loss [\d.]+, val [\d.]+, ", printed.read_text(), re.M)
    assert lines == ["10", "20", "30", "40", "50", "60"]


def test_same_config_same_seed_same_bits(train, threads):
    threads(2)
    states = []
    for name in ("a", "b"):
        folder = train(name, max_steps=12, eval_interval=6, dropout=0.1)
        states.append(torch.load(folder / "last.pt", weights_only=True))
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
    # each on its own
    for option, value, key, says in (
        ("--schedule", "localist", "schedule", [1, 1]),
        ("--fidelity", 0.5, "fidelity", [0, 0.5]),
        ("--partition", "block:16", "partition", [0, 1]),
        ("--stride", 150, "stride", [0, 1]),
        ("--split", "val", "split", [0, 1]),
    ):
        assert run("eval.py", "runs/tiny", option, value, "--json", "r.json")[0] == 0
        results = json.loads((place / "r.json").read_text())
        assert [layer["locality"] for layer in results["layers"]] == says
        assert results[key] == value != expected[key]
        assert abs(results["loss"] - expected["loss"]) > 1e-6, option
        assert results["layers"] != layers, option
        same = {"schedule", "fidelity", "partition", "stride", "split"} - {key}
        assert all(results[k] == expected[k] for k in same)
        if option != "--split":
            assert results["tokens"] == expected["tokens"]
        # blocks of 16 bytes hold less of the attention of the first layer
        if option == "--partition":
            assert results["layers"][0]["fidelity"] < 0.5 * layers[0]["fidelity"]


def test_eval_measures_a_run_on_another_text(place, run):
    expected = json.loads((place / "runs" / "tiny" / "results.json").read_text())
    text = (place / "data" / "sample.txt").read_text()
    for other, same in ((text, True), (text.upper(), False)):
        (place / "other.txt").write_text(other)
        status, printed, _ = run(
            "eval.py", "runs/tiny", "--source", "other.txt", "--json", "r.json"
        )
        results = json.loads((place / "r.json").read_text())
        assert status == 0 and results["source"] == "other.txt" in printed
        assert results["tokens"] == pytest.approx(expected["tokens"], 0.02)
        if same:
            assert results["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        else:
            assert results["loss"] > expected["loss"] + 0.3


def test_the_dial_goes_through_every_schedule(place, run):
    files = "--json", "d.json", "--figure", "d.png"
    status, printed, _ = run("eval.py", "runs/tiny", "--dial-sweep", "--contexts", 2, *files)
    rows = json.loads((place / "d.json").read_text())["dials"]
    assert status == 0 and (place / "d.png").read_bytes().startswith(b"\x89PNG")
    local = [name for name in SCHEDULES if name != "distributed" for _ in range(4)]
    assert [row["schedule"] for row in rows] == ["distributed", *local]
    assert rows[0]["ratio"] == 1 and len({row["tokens"] for row in rows}) == 1
    for row in rows:
        dial = [layer["locality"] for layer in row["layers"]]
        assert dial == schedule(row["schedule"], 2, row["fidelity"])
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert f"{row['perplexity']:.3f}" in printed
        assert layer_mean(row, "fidelity") >= layer_mean(row, "locality") - 1e-6
    found = {(row["schedule"], row["fidelity"]): row["loss"] for row in rows}
    for name, f in (("quintic", 1.0), ("reversed", 0.5), ("localist", 0.25)):
        dial = "--schedule", name, "--fidelity", f
        assert run("eval.py", "runs/tiny", *dial, "--contexts", 2, "--json", "r.json")[0] == 0
        loss = json.loads((place / "r.json").read_text())["loss"]
        assert loss == pytest.approx(found[name, f], abs=1e-9)


def test_sample_writes_text_the_same_for_the_same_seed(run):
    mind = "sample.py", "runs/tiny", "--prompt", "The mind "
    texts = [run(*mind, "--tokens", 60, "--top-k", 20) for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] == 0
    assert texts[0][1].startswith("The mind ") and len(texts[0][1]) > 30
    short = "sample.py", "runs/tiny", "--tokens", 20
    greedy, cold = (run(*short, "--temperature", t) for t in (0, 1e-46))
    assert greedy == cold and greedy[0] == 0
    # two texts from each of two prompts; with one likely token each, they are what each prompt
    # gives alone
    options = ("--tokens", 40, "--top-p", 1e-6)
    alone = [
        run("sample.py", "runs/tiny", "--prompt", prompt, *options)[1].removesuffix("\n")
        for prompt in ("The mind ", "I")
    ]
    _, printed, _ = run(*mind, "--prompt", "I", "--samples", 2, *options)
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


def test_a_prompt_may_hold_the_end_of_a_text(run, monkeypatch):
    letters = [bytes([i]) for i in range(255)]
    encoding = prepare_data.encoding_of("bytes", "(?s:.)", letters, {"<|endoftext|>": 255})
    prompts = []
    monkeypatch.setattr(prepare_data, "get_encoding", lambda name: encoding)
    monkeypatch.setattr(GPT, "generate", lambda model, ids, *more: prompts.extend(ids) or [])
    assert run("sample.py", "runs/tiny", "--prompt", "a<|endoftext|>b")[0] == 0
    assert prompts == [[97, 255, 98]]


def test_exported_weights_are_read_with_the_tokenizer_of_their_size(
    place, run, train, gpt2_tokenizer
):
    (place / "short.txt").write_text((ROOT / "data" / "sample.txt").read_text()[:20000])
    how = {"source": "short.txt", "max_steps": 1, "block_size": 32}
    for tokenizer in ("bytes", "gpt2:300"):
        folder = train(f"leaves-{tokenizer[:4]}", tokenizer=tokenizer, **how)
        model, _ = load_run(folder)
        model.save_pretrained(folder / "export")
        measured = []
        source = ("--source", "short.txt", "--schedule", "quintic")
        for command in ([folder], [folder / "export", *source]):
            same = "--partition", "block:16", "--json", "r.json"
            status, _, error = run("eval.py", *command, *same)
            assert status == 0, error
            measured.append(json.loads((place / "r.json").read_text())["loss"])
        assert error == f"{folder / 'export'} has {model.config.vocab_size} tokens; " + (
            f"read with the tokenizer {tokenizer}\n"
        )
        assert measured[0] == measured[1]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder of weights that train.py never saw: a small GPT with GPT-2's vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    GPT(GPTConfig(50257, 64, n_layer=1, n_head=2, n_embd=48)).save_pretrained(folder)
    return folder


def test_exported_weights_are_sampled_with_the_dial_at_0_and_turned(
    run, exported, gpt2_tokenizer, monkeypatch
):
    generate, dials = GPT.generate, []

    def watched(model, *args, **how):
        dials.append(model.locality)
        return generate(model, *args, **how)

    monkeypatch.setattr(GPT, "generate", watched)
    command = "sample.py", exported, "--prompt", "The mind is", "--tokens", 5, "--temperature", 0
    found = [run(*command, *more) for more in ([], ["--schedule", "quintic"])]
    assert dials == [[0], [1]]
    prompt = gpt2_tokenizer.encode_ordinary("The mind is")
    for dial, (status, printed, _) in zip(dials, found):
        model = GPT.from_pretrained(exported)
        model.set_locality(dial)
        blocks = Partitioner(token_bytes(gpt2_tokenizer), "semantic", 256)
        ids = [token for (token,) in generate(model, [prompt], 5, [blocks], 0)]
        text = b"".join(map(gpt2_tokenizer.decode_single_token_bytes, prompt + ids))
        assert status == 0 and printed == text.decode(errors="replace") + "\n"


def test_exported_weights_are_measured_on_any_text(place, run, exported, gpt2_tokenizer):
    (place / "few.txt").write_text((ROOT / "data" / "sample.txt").read_text()[:6000])
    command = "eval.py", exported, "--source", "few.txt", "--json", "r.json"
    for more, dial in (([], 0), (["--schedule", "quintic"], 1)):
        assert run(*command, *more)[0] == 0
        results = json.loads((place / "r.json").read_text())
        (layer,) = results["layers"]
        assert layer["locality"] == dial <= layer["fidelity"] + 1e-6
        assert results["loss"] == pytest.approx(math.log(50257), abs=0.5)


def test_a_run_is_its_best_model_not_its_last(place, train):
    # a rate that rises until it undoes what was learnt
    rate = {"learning_rate": 1, "warmup_steps": 40, "max_steps": 40, "dropout": 0.1}
    folder = train("undone", **rate, eval_interval=1, patience=3, eval_contexts=2)
    results = json.loads((folder / "results.json").read_text())
    metrics = map(json.loads, (folder / "metrics.jsonl").open())
    val = [m["val_loss"] for m in metrics if "val_loss" in m]
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert 0 < results["best_step"] == np.argmin(val) == results["steps"] - 3 == len(val) - 4 < 36
    assert (best["step"], last["step"]) == (results["best_step"], results["steps"])
    assert best["val_loss"] == min(val)
    for model in (load_run(folder)[0], GPT.from_pretrained(folder)):
        for key, value in model.state_dict().items():
            assert torch.equal(value, best["model"][key]), key
    assert not torch.equal(best["model"]["wte.weight"], last["model"]["wte.weight"])
    model, config = load_run(folder)
    assert model.locality == [0, 1] and not model.training
    test = read_split(prepared_folder(place), "test")
    loss = evaluate(model, *test, VOCABULARY, measure=False)["loss"]
    assert results["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_run_fine_tunes_into_another_and_leaves_for_transformers(place, train):
    folder = train("tuned", init_from="runs/tiny", schedule="localist", max_steps=2)
    first = json.loads((folder / "metrics.jsonl").open().readline())
    assert first["val_loss"] < 3.5  # it did not start from nothing
    transformers = pytest.importorskip("transformers")
    model, _ = load_run(folder)
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
            rows = (torch.from_numpy(a.astype(np.int64))[None] for a in (tokens, lookback))
            logits = model(*rows)[0]
        return lookback, logits[0]

    lookback, logits = run(text)
    for i in range(0, 300, 23):
        changed_lookback, changed = run(text[: i + 1] + other[i + 1 :])
        assert np.array_equal(changed_lookback[: i + 1], lookback[: i + 1])
        assert torch.allclose(changed[: i + 1], logits[: i + 1], atol=1e-6, rtol=0)


def test_localisation_is_learnt_around():
    """A localised last layer costs nothing if an earlier layer may look further.

    A text is eight random tokens and their copy, a block each. To predict the copy a model must
    look back into the first block. `localist` cannot, and is left to guess among 8 tokens.
    `quintic` does it in its first layer.
    """
    losses = {}
    for name in ("localist", "quintic"):
        torch.manual_seed(1)
        model = GPT(GPTConfig(8, 16, n_layer=2, n_head=2, n_embd=32, max_lookback=8))
        model.set_locality(schedule(name, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        lookback = torch.arange(16).remainder(8).expand(64, 16)
        for _ in range(150):
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
        config, cpu = Config(seed=seed, batch_size=6), torch.device("cpu")
        return random_batch(tokens, lookback, 20, config, number, cpu)

    x, r, y = batch(1, 5)
    assert x.shape == (6, 20) and len(x[:, 0].unique()) > 3
    assert torch.equal(y, x + 1) and torch.equal(r, x % 7)
    assert all(map(torch.equal, batch(1, 5), (x, r, y)))
    assert not torch.equal(batch(1, 6)[0], x) and not torch.equal(batch(2, 5)[0], x)


def test_a_text_that_was_prepared_otherwise_is_refused(place, monkeypatch):
    folder = prepared_folder(place)
    config = Config(**tomllib.loads((place / "runs" / "tiny" / "config.toml").read_text()))
    meta = Text(folder, config).meta
    others = {"source": "x", "tokenizer": "gpt2", "partition": "block:9", "max_lookback": 9}
    for name, other in (others | {"val": 0.2, "test": 0.3, "joined": True}).items():
        monkeypatch.setattr("train.read_meta", lambda _, new={name: other}: meta | new)
        with pytest.raises(InputError, match=re.escape(f"prepared with {name} = {other!r}")):
            Text(folder, config)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_matrices_alone_decay(name):
    model = GPT(GPTConfig(64, 16, n_layer=2, n_head=2, n_embd=16))
    config = Config(optimizer=name, weight_decay=0.3, beta1=0.8, beta2=0.7)
    optimizers = build_optimizers(model, config)
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    owned = [
        (p, type(optimizer).__name__, group["weight_decay"])
        for optimizer, group in groups
        for p in group["params"]
    ]
    assert sum(p.numel() for p, *_ in owned) == sum(p.numel() for p in model.parameters())
    assert all(g["betas"] == (0.8, 0.7) for _, g in groups if "betas" in g)
    found = {p.data_ptr(): rest for p, *rest in owned}
    for parameter, p in model.named_parameters():
        plain = "ln_" in parameter or parameter.endswith("bias")
        assert found[p.data_ptr()][1] == (0 if plain else 0.3), parameter
        inner = name == "muon" and parameter.startswith("h.") and p.dim() == 2
        assert found[p.data_ptr()][0] == ("Muon" if inner else "AdamW"), parameter


def test_muon_steps_as_far_for_queries_keys_and_values_whatever_their_gradients():
    model = GPT(GPTConfig(64, 16, n_layer=2, n_head=2, n_embd=32))
    optimizers = build_optimizers(model, Config(optimizer="muon", weight_decay=0.0))
    before = [layer.attn.c_attn.weight.detach().clone() for layer in model.h]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for layer in model.h:
        layer.attn.c_attn.weight.grad[64:] *= 1e3  # the values'
    for optimizer in optimizers:
        optimizer.step()
    for layer, was in zip(model.h, before):
        q, k, v = (part.norm().item() for part in (layer.attn.c_attn.weight - was).chunk(3))
        assert q > 0 and (k, v) == pytest.approx((q, q), rel=0.1)


@pytest.mark.parametrize("fast", [True, False], ids=["bfloat16", "float32"])
def test_muon_steps_as_that_of_pytorch_does(monkeypatch, fast):
    monkeypatch.setattr("support.machine.fast_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    shapes = (8, 24), (24, 8), (16, 16), (8, 24), (16, 16)
    mine, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    stacked = torch.nn.Parameter(torch.ones(48, 16))  # three matrices in one
    theirs += [torch.nn.Parameter(torch.ones(16, 16)) for _ in range(3)]
    groups = [{"params": mine}, {"params": [stacked], "parts": 3}]
    optimizers = [
        Muon(groups, lr=0.1, weight_decay=0.5),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for a, b in zip(mine, theirs):
            a.grad = b.grad = torch.randn_like(a)
        for b in theirs[-3:]:
            b.grad = torch.randn_like(b)
        stacked.grad = torch.cat([b.grad for b in theirs[-3:]])
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip([*mine, *stacked.chunk(3)], theirs):
        moved = (b - 0.95**3).norm()  # without a gradient, decay alone
        assert (a - b).norm() < 0.05 * moved and moved > 0.1  # theirs has bfloat16's digits
    assert orthogonalise(torch.randn(2, 9, 5)).dtype == (torch.bfloat16 if fast else torch.float32)


def test_a_compiled_run_is_the_same_run(train, monkeypatch):
    compile, made = torch.compile, []

    def compile_quickly(model):  # traced, but no code is made of it, which takes long
        made.append(compile(model, backend="eager"))
        return made[-1]

    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    few = {"n_layer": 1, "max_steps": 3, "eval_interval": 3, "log_interval": 1}
    folders = [train(f"compiled-{how}", **few, compile=how) for how in ("true", "false")]
    assert len(made) == 1
    plain, compiled = ([*map(json.loads, (f / "metrics.jsonl").open())] for f in folders)
    for a, b in zip(plain, compiled, strict=True):
        for key in a.keys() - {"tokens_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    names = (torch.load(f / "best.pt", weights_only=True)["model"].keys() for f in folders)
    assert next(names) == next(names)


@pytest.mark.parametrize("grad_clip", [0.05, 0])
def test_a_step_follows_the_mean_gradient_of_its_batches_clipped(place, train, grad_clip):
    # at a rate of 0 the model stays where it began, and the optimizer's moving average of the
    # gradients can be foretold
    still = {"learning_rate": 0, "min_lr": 0, "max_steps": 2, "log_interval": 1}
    small = {"batch_size": 2, "grad_accum": 2, "eval_contexts": 1}
    folder = train(f"clip{grad_clip}", **still, **small, grad_clip=grad_clip)
    config = Config(**tomllib.loads((folder / "config.toml").read_text()))
    torch.manual_seed(config.seed)
    model, cpu = build_model(config, 256), torch.device("cpu")
    tokens = read_split(prepared_folder(place), "train")
    (optimizer,) = build_optimizers(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    metrics = [m for m in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in m]
    average = 0
    for step in range(2):
        batches = (random_batch(*tokens, 192, config, 2 * step + i, cpu) for i in range(2))
        loss = sum(model(*batch)[1] for batch in batches) / 2
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        norm = gradient.norm().item()
        found = metrics[step]["loss"], metrics[step]["grad_norm"]
        assert found == pytest.approx((loss.item(), norm), rel=1e-4)
        assert norm > 0.1
        average = 0.9 * average + 0.1 * gradient * min(1, (grad_clip or math.inf) / norm)
    moments = torch.load(folder / "last.pt", weights_only=True)["optimizers"][0]["state"]
    found = torch.cat([moments[i]["exp_avg"].flatten() for i in range(len(parameters))])
    assert (found - average).norm() < 1e-4 * average.norm()


def test_dropout_is_what_the_config_says_from_scratch_and_from_weights(place):
    small = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}
    for init in (small, {"init_from": str(place / "runs" / "tiny")}):
        model = build_model(Config(tokenizer="bytes", dropout=0.25, max_lookback=77, **init), 256)
        assert (model.config.dropout, model.config.max_lookback) == (0.25, 77)
        assert model.h[0].attn.dropout == 0.25


def test_a_run_that_diverges_says_so_and_leaves_clean_metrics(place, run):
    wild = {"learning_rate": 100, "warmup_steps": 0, "grad_clip": 0, "max_steps": 30}
    rare = {"log_interval": 100, "eval_interval": 15, "eval_contexts": 1}
    status, _, error = run("train.py", TINY, *flags(**wild, **rare, out="runs/diverged"))
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: training diverged at step ") and "learning_rate" in error

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (place / "runs" / "diverged" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [0]
    assert load_run(place / "runs" / "diverged")[0].wte.weight.isfinite().all()


@pytest.mark.parametrize(
    "harm, says",
    [
        # in the backward pass of step 6
        ("gradient", "diverged at step 6 (.*gradients: h.1.attn.c_attn.weight; "),
        # weights that are finite and far too large
        ("activation", "diverged at step 6 (.*outputs: h.0.mlp.c_fc; "),
        ("weight", "diverged at step 7 (.*weights: h.1.mlp.c_proj.bias; "),
        # about to be saved
        ("weight, then a signal", "diverged at step 6 (.*weights: h.1.mlp.c_proj.bias; "),
    ],
)
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
            name, value = "h.1.mlp.c_proj.bias", math.inf
            if harm == "activation":
                name, value = "h.0.mlp.c_fc.weight", 3e38
            dict(model.named_parameters())[name].data.fill_(value)
            if harm.endswith("signal"):
                os.kill(os.getpid(), signal.SIGTERM)

        model.h[1].attn.c_attn.weight.register_hook(backward)

    out = place / "runs" / harm.replace(" ", "_")
    options = {"max_steps": 8, "eval_interval": 4, "log_interval": 100, "eval_contexts": 1}
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "set_locality", set_and_harm)
        status, _, error = run("train.py", TINY, *flags(**options, out=out))
    assert status == 2 and re.search(says.replace("(", r"\("), error), error
    report = json.loads((out / "diverged.json").read_text())
    kind, name = re.search(r"(\w+): ([\w.]+); ", says).groups()
    assert report[kind][0] == name and f"step {report['step']} " in says
    for path in (out / "last.pt", out / "best.pt"):
        state = torch.load(path, weights_only=True)
        assert state["step"] in (0, 4)
        assert all(value.isfinite().all() for value in state["model"].values())
    assert run("train.py", out, "--resume")[0] == 0  # unharmed, it goes on from there
    assert not (out / "diverged.json").exists()


# ---- evaluation


@pytest.mark.parametrize(
    "n, T, stride", [(100, 10, 10), (101, 10, 3), (57, 16, 8), (10, 30, 5), (12, 11, 1), (2, 1, 1)]
)
def test_strided_windows_score_every_token_but_the_first_exactly_once(n, T, stride):
    scored = []
    for start, first in windows(n, T, stride):
        assert 0 <= start and start + min(T, n - 1) < n
        scored += range(start + first + 1, start + min(T, n - 1) + 1)
    assert scored == list(range(1, n))


def test_evaluate_equals_counting_by_hand(monkeypatch):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(5, 20, **shape, dropout=0.5, max_lookback=8)).eval()
    model.set_locality([0.3, 1])
    tokens = np.random.default_rng(0).integers(0, 5, 130).astype(np.uint16)
    vocabulary = [b"a", b"bc", b"def", b"ghij", b"klmno"]  # tokens of several bytes
    lookback = partition(tokens, vocabulary, "block:6", 8)
    nats, correct, layers, at = 0.0, 0, np.zeros((2, 4)), []
    near, far, backs = (
        [],
        [],
        [],
    )  # losses with up to 16 tokens of context, and with more; lookbacks
    contexts = windows(130, 20, 5)
    for start, first in contexts:
        rows = (a[start : start + 20] for a in (tokens, lookback, tokens[1:]))
        x, r, y = (torch.from_numpy(row.astype(np.int64))[None] for row in rows)
        with torch.no_grad():
            logits = model(x, r)[0][0]
        at.append(F.cross_entropy(logits, y[0], reduction="none").tolist())
        for i in range(20):
            if i >= first:
                backs.append(min(int(r[0, i]), i))
            if 19 <= start + i < 110:  # these stand at every place in a context, the others do not
                (near if i < 16 else far).append(at[-1][i])
        logits = logits[first:]
        nats += F.cross_entropy(logits, y[0, first:], reduction="sum").item()
        correct += (logits.argmax(-1) == y[0, first:]).sum().item()
        for layer, a in enumerate(model.attention_maps(x, r)):
            for i in range(first, 20):
                for row in a[0, :, i].tolist():
                    back = min(int(r[0, i]), i)
                    entropy = -sum(p * math.log2(p) for p in row if p > 0)
                    inside, pointer = sum(row[i - back : i + 1]), i - back <= np.argmax(row) <= i
                    layers[layer] += inside, pointer, entropy, row[0]
    n_bytes, layers = sum(len(vocabulary[t]) for t in tokens[1:]), layers / 129 / 2  # two heads
    assert 10 < correct < 60  # of 129
    # it measures without dropout, leaves the model as it was, and takes as many queries at a time
    # as it likes
    for training, at_once in ((False, 10**9), (True, 1), (True, 7 * 8 * 2 * 20)):
        monkeypatch.setattr("eval.AT_ONCE", at_once)
        results = evaluate(model.train(training), tokens, lookback, vocabulary, stride=5)
        assert model.training == training and results["tokens"] == 129
        assert results["loss"] == pytest.approx(nats / 129, rel=1e-5)
        assert results["perplexity"] == pytest.approx(math.exp(nats / 129), rel=1e-5)
        assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert (results["bytes"], results["accuracy"]) == (n_bytes, correct / 129)
        (one, early), (seventeen, late) = results["by_position"]
        assert (one, seventeen) == (1, 17)
        assert (early, late) == pytest.approx([np.mean(near), np.mean(far)], rel=1e-5)
        assert results["mean_lookback"] == pytest.approx(np.mean(backs))
        for layer, expected in zip(results["layers"], layers.tolist()):
            keys = "fidelity", "pointer_accuracy", "entropy", "first_token"
            found = [layer[key] for key in keys]
            assert found == pytest.approx(expected, rel=1e-5)
        assert [layer["locality"] for layer in results["layers"]] == [0.3, 1]
        by_context = [(sum(x[first:]), 20 - first) for x, (_, first) in zip(at, contexts)]
        assert np.array(results["by_context"]) == pytest.approx(np.array(by_context), rel=1e-5)
        assert results["reach"] is None  # a layer below 1 sees all
    model.set_locality([1.0, 1.0])
    lookback = np.minimum(np.random.default_rng(1).integers(4, 30, 130), np.arange(130) // 2)
    lookback = np.arange(130) - np.maximum.accumulate(np.arange(130) - lookback)  # never goes back
    found = evaluate(model, tokens, lookback, vocabulary, stride=5)["reach"]
    back = []
    for start, first in contexts:
        for i in range(first, 20):
            j = i
            for _ in range(2):  # two layers
                j -= min(int(lookback[start + j]), 8, j)
            back.append(i - j)
    assert found == {"median": np.median(back), "most": max(back)} and lookback.max() > 8


def test_a_figure_is_drawn_without_dropout(tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(256, 20, **shape, dropout=0.5, max_lookback=8)).train()
    tokens = np.arange(60, dtype=np.uint16)
    maps, drawn = model.attention_maps, []
    monkeypatch.setattr(
        model, "attention_maps", lambda *a: drawn.append((a, list(maps(*a)))) or drawn[-1][1]
    )
    results = {"layers": [{"locality": 0, "fidelity": 1, "pointer_accuracy": 1, "entropy": 1}] * 2}
    odd = [b"$\\newcommand{x}$ "] * 256  # the words in the picture are words, and no formula
    figure(model, tokens, tokens % 8, odd, results, tmp_path / "f.png", "$ a title")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    ((args, found),) = drawn
    assert all(map(torch.equal, found, maps(*args)))
    model.train()
    assert not all(map(torch.equal, found, maps(*args)))


def test_a_figure_needs_no_home(tmp_path):
    code = "from support.plots import pyplot; pyplot().figure()"
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HOME": "/dev/null"}, **how
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.filterwarnings("error")
def test_a_figure_of_odd_things_warns_of_nothing(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 1, n_layer=1, n_head=2, n_embd=16, max_lookback=8))
    tokens = np.arange(60, dtype=np.uint16)
    layer = {"locality": 0, "fidelity": 1, "pointer_accuracy": 1, "entropy": 0}
    results, words = {"layers": [layer]}, ["漢字".encode()] * 256
    figure(model, tokens, tokens % 8, words, results, tmp_path / "f.png", "漢字")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


# ---- configurations


def test_every_config_in_the_folder_is_valid_and_says_only_what_differs():
    others = "sweep", "faithful"
    paths = sorted(
        path for path in (ROOT / "configs").glob("*.toml") if not path.stem.startswith(others)
    )
    names = "distributed localist linear quadratic cubic quartic quintic window".split()
    known = {*(f"gpt2_{name}.toml" for name in names), "quickstart.toml", "tiny.toml"}
    assert known <= {path.name for path in paths}
    for path in paths:
        config = read_config([str(path)])
        said = tomllib.loads(path.read_text())
        assert Config(**tomllib.loads(to_toml(config))) == config
        assert path.stem == "tiny" or path.stem.split("_")[0] in ("quickstart", "gpt2", "pretrain")
        for key in said.keys() - {"source", "schedule", "fidelity", "max_lookback", "partition"}:
            assert said[key] != getattr(Config(), key), f"{path.name}: {key} repeats the default"


@pytest.mark.parametrize(
    "script, flag", [("train", "--help"), ("train", "-h"), ("sweep", "--help")]
)
def test_help_names_every_key_with_type_default_and_meaning(run, script, flag):
    status, printed, error = run(f"{script}.py", flag)
    assert (status, error) == (0, "") and f"python {script}.py configs/" in printed
    for field in dataclasses.fields(Config):
        default = "none" if field.default is None else json.dumps(field.default)
        line = rf"--{field.name}: (a |true).*; default {re.escape(default)}\n +(.+)\n"
        meaning = re.search(line, printed)[2]
        assert meaning == field.metadata["meaning"] and len(meaning) > 9


def test_overrides_and_the_learning_rate():
    more = "--compile false --fidelity 0.5 --warmup_steps 10 --seed 3".split()
    config = read_config([str(TINY), "--max-steps=200", "--source", "x y.txt", *more])
    assert (config.max_steps, config.source, config.compile) == (200, "x y.txt", False)
    assert (config.fidelity, config.seed) == (0.5, 3)
    rates = [learning_rate(step, config) for step in range(201)]
    assert rates[0] == pytest.approx(3e-4)
    assert max(rates) == rates[10] == 3e-3
    assert rates[200] == pytest.approx(3e-5)
    assert read_config([str(TINY), "--source", '["a", "b"]']).source == ["a", "b"]
    assert read_config([str(TINY), "--out", ""]).out == "runs/tiny"


@pytest.mark.parametrize(
    "override, says",
    [
        (["--schedul", "cubic"], "schedule"),
        (["--schedule", "septic"], "quintic|quartic|septic"),
        (["--n_layer", "two"], "n_layer"),
        (["--n_layer", "2.5"], "n_layer"),
        (["--n_layer", "0"], "n_layer"),
        (["--fidelity", "0"], "fidelity"),
        (["--fidelity", "1.5"], "fidelity"),
        (["--fidelity", "nan"], "fidelity"),
        (["--learning_rate", "inf"], "learning_rate"),
        (["--dropout", "1"], "dropout"),
        (["--compile", "maybe"], "compile"),
        (["--dtype", "float16"], "dtype"),
        (["--partition", "window:x"], "window"),
        (["--tokenizer", "bpe"], "tokenizer"),
        (["--tokenizer", "gpt2:99"], "tokenizer"),
        (["--min_lookback", "200"], "min_lookback"),
        (["--dial", "half"], "dial"),
        (["--anchor", "1"], "anchor"),
        (["--optimizer", "sgd"], "optimizer"),
        (["--seed", "true"], "seed"),
        (["--seed"], "seed"),
        (["seed", "3"], "seed"),
        (["--max_lookback", "-1"], "max_lookback"),
        (["--source", ""], "source"),
        (["--batch_size", "[4]"], "batch_size"),
    ],
)
def test_a_wrong_value_is_named(override, says):
    with pytest.raises(InputError, match=says):
        read_config([str(TINY), *override])


def test_mistakes_end_in_one_line_and_status_2(place, run, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # no tokenizer, and
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (place / "broken.toml").write_text("schedule = quintic")
    (place / "three.toml").write_text("out = 3")
    (place / "false.toml").write_text("out = false")
    GPT(GPTConfig(1000, 128, n_layer=2, n_head=2, n_embd=32)).save_pretrained(tmp_path / "other")
    GPT(GPTConfig(100, 8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "odd")
    new_run = ("train.py", TINY, "--out", "runs/x")
    smoke = ROOT / "configs" / "sweep_smoke.toml"
    mistakes = [
        (["train.py"], "config"),
        (["train.py", "nothing.toml"], "nothing.toml"),
        (["train.py", "broken.toml"], "TOML"),
        (["train.py", TINY], "overwrite"),  # the run is there already
        ([*new_run, "--source", "nothing.txt"], "nothing.txt"),
        ([*new_run, "--n_embd", 30, "--n_head", 4], "divisible"),
        ([*new_run, "--block_size", 100000], "block_size"),
        ([*new_run, "--init_from", "runs/tiny", "--block_size", 1000], "block_size"),
        ([*new_run, "--init_from", "runs/tiny", "--n_layer", 3], "n_layer"),
        ([*new_run, "--init_from", "nowhere"], "nowhere"),
        ([*new_run, "--init_from", tmp_path / "other", "--block_size", 100], "1000"),
        ([*new_run, "--device", "cuda:99"], "cuda:99"),
        (["eval.py", "data"], "checkpoint"),
        (["eval.py", "gpt2"], "--source"),  # before anything is downloaded
        (["eval.py", "nowhere", "--source", "data/sample.txt"], "nowhere"),
        (["eval.py", tmp_path / "other", "--source", "data/sample.txt"], "TIKTOKEN_CACHE_DIR"),
        (["eval.py", tmp_path / "odd", "--source", "data/sample.txt"], "no tokenizer here"),
        (["eval.py", "runs/tiny", "--source", "nowhere.txt"], "nowhere.txt"),
        (["eval.py", "runs/tiny", "--partition", "shifted:9000"], "a quarter of a split"),
        (["eval.py", "runs/tiny", "--dial-sweep", "--fidelity", 0.5], "--dial-sweep"),
        (["eval.py", "runs/tiny", "--contexts", 0], "--contexts"),
        (["train.py", "three.toml"], "out must be"),
        (["train.py", "false.toml"], "out must be"),
        (["sweep.py", "three.toml"], "out must be"),
        (["sweep.py"], "config"),
        (["sweep.py", TINY], "sweep"),
        (["sweep.py", smoke, "--report", "--out", "runs/none"], "runs/none"),
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
        assert status == 2 and error.count("\n") == 1, (command, error)
        assert error.startswith("error: ") and says in error, (command, error)
    assert not (place / "runs" / "x").exists()
