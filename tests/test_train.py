"""train.py: what a run writes, its steps, optimizers, divergence, configs and command line."""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import sys
import tomllib

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

from conftest import ROOT, TINY, flags, prepared_folder
from eval import evaluate, load
from locality import partition_text, schedule
from model import GPT, GPTConfig
from prepare_data import TextConfig
from support import console
from support.ddp import Process
from support.files import InputError
from support.prepared import Prepared
from support.run import Run
from support.settings import to_toml
from train import (
    Config,
    Muon,
    build_model,
    build_optimizers,
    learning_rate,
    newton_schulz,
    random_batch,
    read_config,
    start,
)

VOCABULARY = [bytes([i]) for i in range(256)]
CPU = Process(torch.device("cpu"), rank=0, world_size=1)


def read_metrics(run, key):
    """The lines of a run's metrics.jsonl that have this key."""
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return [line for line in lines if key in line]


def config_of(run):
    return Config(**tomllib.loads((run / "config.toml").read_text()))


# --------------------------------------------------------------------------------------------------
# a run


def test_a_run_writes_what_it_promises(place):
    run = place / "runs" / "tiny"
    names = (
        "config.toml metrics.jsonl best.pt last.pt results.json attention.png loss.png page.html"
    )
    assert {path.name for path in run.iterdir()} == set(names.split())
    config = config_of(run)
    assert (config.schedule, config.max_steps, config.seed) == ("quintic", 60, 1)
    val = [m["val_loss"] for m in read_metrics(run, "val_loss")]
    assert val[0] == pytest.approx(math.log(256), abs=0.3) and min(val) < 3.5
    results = json.loads((run / "results.json").read_text())
    assert [layer["locality"] for layer in results["layers"]] == schedule("quintic", 2)
    assert all(layer["fidelity"] >= layer["locality"] - 1e-6 for layer in results["layers"])
    last = results["layers"][-1]
    assert last["fidelity"] == pytest.approx(1) == last["pointer_accuracy"]
    bits = math.log2(results["perplexity"])  # a token is a byte
    assert results["bits_per_byte"] == pytest.approx(bits, abs=1e-6)
    assert {"command", "commit", "device", "date", "seed", "torch"} <= results.keys()
    # the optimizer got the learning rate that metrics.jsonl shows
    state = torch.load(run / "last.pt", weights_only=True)
    rates = {group["lr"] for group in state["optimizers"][0]["param_groups"]}
    assert rates == {learning_rate(59, config)} == {read_metrics(run, "lr")[-1]["lr"]}
    assert (run / "attention.png").read_bytes().startswith(b"\x89PNG")
    printed = (place / "printed.txt").read_text()
    assert f"perplexity {results['perplexity']:.3f}" in printed
    assert "some of the places where a block begins" in printed
    test = (ROOT / "data" / "sample.txt").read_bytes()[-results["bytes"] - 1 :]
    heading, _, sample = printed.partition("what it writes after ")[2].partition(":\n")
    blocks = "▌ marks the beginning of a block" if "▌" in sample else "no new block begins"
    assert heading == f"{test[:40].decode()!r} ({blocks})" and len(sample) > 300


def test_without_a_terminal_a_run_prints_plain_lines(place):
    """No progress bar and no carriage return; a line per log_interval."""
    printed, errors = (place / f"{name}.txt" for name in ("printed", "errors"))
    assert b"\r" not in printed.read_bytes() and not errors.read_bytes()
    line = r"^step (\d+)/60: loss [\d.]+(?:, (val) [\d.]+)?, lr .* tok/s(, about [\d.]+ \w+ left)?$"
    lines = re.findall(line, printed.read_text(), re.M)
    assert [step for step, _, _ in lines] == ["10", "20", "30", "40", "50", "60"]
    # the validation loss is printed when it is new, and the time left until nothing is left
    assert [step for step, val, _ in lines if val] == ["10", "20", "40", "60"]
    assert not lines[-1][2]
    words = [console.duration(seconds) for seconds in (1, 99, 119, 720, 6100, 86400)]
    assert words == ["1 s", "99 s", "2 min", "12 min", "1.7 h", "24.0 h"]


def read_page(path):
    """What a page shows, a dict."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])


def test_the_first_thing_a_run_writes_is_its_text_in_blocks(place, monkeypatch):
    """Before the first step and before the first evaluation; then also what it has learned."""
    folder, seen = place / "runs" / "drawn", []

    def validate(*args, **options):
        seen.append({path.name for path in folder.iterdir()})
        if len(seen) == 1:
            before.update(read_page(folder / "page.html"))
        return evaluate(*args, **options)

    before = {}
    monkeypatch.chdir(place)
    monkeypatch.setattr("train.evaluate", validate)
    config = read_config(
        [str(TINY), *flags(out=folder, max_steps=4, eval_interval=2, eval_contexts=1)]
    )
    start(config)
    assert seen[0] == {"config.toml", "metrics.jsonl", "page.html"}
    assert before["when"] == "before training" and len(before["text"]) == 192
    after = read_page(folder / "page.html")
    assert after["when"] == "step 4 of 4" and after["lookback"] == before["lookback"]
    assert after["dials"][0]["perplexity"] < before["dials"][0]["perplexity"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error", [InputError, RuntimeError, MemoryError])
@pytest.mark.parametrize("picture", ["quick_page", "plots.draw_loss"])
def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(
    place, monkeypatch, capsys, picture, error
):
    def fail(*_):
        raise error("no picture today")

    console.warn_once.cache_clear()
    monkeypatch.chdir(place)
    monkeypatch.setattr(f"train.{picture}", fail)
    out = f"runs/{picture}-{error.__name__}"
    start(read_config([str(TINY), *flags(out=out, max_steps=1, eval_contexts=1)]))
    assert (place / out / "results.json").exists()
    printed, errors = capsys.readouterr()
    assert errors == "no picture today; the run continues without its pictures\n"
    assert ("page.html shows the blocks" in printed) == (picture != "quick_page")


def test_pictures_change_nothing_that_is_trained(place, run, train, monkeypatch):
    """The runs of `train` draw nothing."""
    values = {"max_steps": 4, "eval_interval": 2, "dropout": 0.1, "eval_contexts": 1}
    without = train("undrawn", **values)
    monkeypatch.chdir(place)
    start(read_config([str(TINY), *flags(out="runs/with", **values)]))
    a, b = (
        torch.load(folder / "last.pt", weights_only=True)
        for folder in (without, place / "runs" / "with")
    )
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert torch.equal(a["rng"], b["rng"])


def test_damaged_lines_of_metrics_are_left_out_of_the_picture(place, tmp_path):
    lines = [
        b'{"step": 1, "loss": 2.5}',
        b"{",
        b"[1]",
        b'{"step": "1"}',
        b'{"step": 2, "loss": NaN}',
    ]
    lines += [b'{"step": 3, "loss": 1e999}', b"\xff", b"[" * 10**5, b'{"step": 4, "val_loss": 2}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert Run(tmp_path).rows() == [{"step": 1, "loss": 2.5}, {"step": 4, "val_loss": 2}]


def test_same_config_same_seed_same_bits(train, threads):
    threads(2)
    values = {"max_steps": 12, "eval_interval": 6, "dropout": 0.1}
    a, b = (torch.load(train(x, **values) / "last.pt", weights_only=True) for x in "ab")
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert a["val_loss"] == b["val_loss"]


def test_the_result_of_a_run_is_its_best_model_not_its_last(place, run, train):
    # a learning rate that rises until it destroys what was learned
    rising = {"learning_rate": 1, "warmup_steps": 40, "max_steps": 40, "dropout": 0.1}
    folder = train("rising", **rising, eval_interval=1, patience=3, eval_contexts=2)
    results = json.loads((folder / "results.json").read_text())
    val = [m["val_loss"] for m in read_metrics(folder, "val_loss")]
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert 0 < results["best_step"] == np.argmin(val) == results["steps"] - 3 == len(val) - 4 < 36
    assert (best["step"], last["step"]) == (results["best_step"], results["steps"])
    assert best["val_loss"] == min(val)
    model = load(folder)[0]
    for copy in (model, GPT.from_pretrained(folder)):
        state = copy.state_dict()
        assert all(torch.equal(value, best["model"][key]) for key, value in state.items())
    assert not torch.equal(best["model"]["wte.weight"], last["model"]["wte.weight"])
    assert model.locality == [0, 1] and not model.training
    test = Prepared(prepared_folder(place)).split("test")
    loss = evaluate(model, *test, VOCABULARY, measure=False)["loss"]
    assert results["loss"] == pytest.approx(loss, rel=1e-6)
    _, printed, _ = run("train.py", folder, "--resume", "--max_steps", 50)
    assert f"training ended at step {results['steps']} because of patience" in printed


def test_a_run_can_start_from_another(train):
    folder = train("tuned", init_from="runs/tiny", schedule="localist", max_steps=2)
    assert read_metrics(folder, "val_loss")[0]["val_loss"] < 3.5  # from scratch it would be 5.5


# --------------------------------------------------------------------------------------------------
# from text to logits


@pytest.mark.parametrize("partition", ["semantic", "sentence", "window:9", "block:9"])
def test_nothing_after_a_token_changes_its_lookback_or_its_logits(partition):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 300, n_layer=3, n_head=2, n_embd=32, max_lookback=40)).eval()
    model.set_locality(schedule("linear", 3))
    book = (ROOT / "data" / "sample.txt").read_bytes()
    text, other = book[2000:2300], book[9000:9300]

    def read(text):
        tokens = np.frombuffer(text, np.uint8)
        lookback = partition_text(tokens, VOCABULARY, partition, 40)
        rows = (torch.from_numpy(a.astype(np.int64))[None] for a in (tokens, lookback))
        with torch.no_grad():
            return lookback, model(*rows)[0][0]

    lookback, logits = read(text)
    for n in range(1, 301, 23):
        changed_lookback, changed_logits = read(text[:n] + other[n:])
        assert np.array_equal(changed_lookback[:n], lookback[:n])
        assert torch.allclose(changed_logits[:n], logits[:n], atol=1e-6, rtol=0)


def test_a_local_last_layer_costs_nothing_if_an_earlier_layer_sees_further():
    """Each text is eight random tokens and then the same eight, a block each.

    To predict the second block, a model must look back into the first. `localist` cannot, so it
    can only guess among 8 tokens. `quintic` does it in its first layer.
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


# --------------------------------------------------------------------------------------------------
# a step


def test_a_batch_depends_only_on_the_seed_and_its_number():
    split = np.arange(5000, dtype=np.uint16), np.arange(5000, dtype=np.uint16) % 7

    def batch(seed, number):
        return random_batch(split, 20, Config(seed=seed, batch_size=6), number, CPU)

    x, lookback, y = batch(1, 5)
    assert x.shape == (6, 20) and len(x[:, 0].unique()) > 3
    assert torch.equal(y, x + 1) and torch.equal(lookback, x % 7)
    assert all(map(torch.equal, batch(1, 5), (x, lookback, y)))
    assert not torch.equal(batch(1, 6)[0], x) and not torch.equal(batch(2, 5)[0], x)


def test_a_compiled_run_is_the_same_run(train, monkeypatch):
    compile, compiled = torch.compile, []

    def compile_quickly(model):  # traced only: generating code takes long
        compiled.append(compile(model, backend="eager"))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setenv("CXX", sys.executable)  # any program that exists
    short = {"n_layer": 1, "max_steps": 3, "eval_interval": 3, "log_interval": 1}
    folders = [train(f"compiled-{choice}", **short, compile=choice) for choice in ("true", "false")]
    assert len(compiled) == 1
    for a, b in zip(*(read_metrics(folder, "step") for folder in folders), strict=True):
        for key in a.keys() - {"tokens_per_s", "seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    a, b = (torch.load(folder / "best.pt", weights_only=True)["model"] for folder in folders)
    assert a.keys() == b.keys()


@pytest.mark.parametrize("grad_clip", [0.05, 0])
def test_a_step_follows_the_mean_gradient_of_its_batches_clipped(place, train, grad_clip):
    # with a learning rate of 0 the model does not change, so the optimizer's moving average of the
    # gradients can be predicted
    still = {"learning_rate": 0, "min_lr": 0, "max_steps": 2, "log_interval": 1}
    small = {"batch_size": 2, "grad_accum": 2, "eval_contexts": 1}
    folder = train(f"clip{grad_clip}", **still, **small, grad_clip=grad_clip)
    config = config_of(folder)
    torch.manual_seed(config.seed)
    model = build_model(config, 256)
    split = Prepared(prepared_folder(place)).split("train")
    (optimizer,) = build_optimizers(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    metrics, average = read_metrics(folder, "loss"), 0
    for step in range(2):
        batches = (random_batch(split, 192, config, 2 * step + i, CPU) for i in range(2))
        loss = sum(model(*batch)[1] for batch in batches) / 2
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        norm = gradient.norm().item()
        logged = metrics[step]["loss"], metrics[step]["grad_norm"]
        assert logged == pytest.approx((loss.item(), norm), rel=1e-4) and norm > 0.1
        average = 0.9 * average + 0.1 * gradient * min(1, (grad_clip or math.inf) / norm)
    moments = torch.load(folder / "last.pt", weights_only=True)["optimizers"][0]["state"]
    saved = torch.cat([moments[i]["exp_avg"].flatten() for i in range(len(parameters))])
    assert (saved - average).norm() < 1e-4 * average.norm()


def test_dropout_and_max_lookback_are_those_of_the_config_from_scratch_and_from_weights(place):
    small = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}
    for init in (small, {"init_from": str(place / "runs" / "tiny")}):
        model = build_model(Config(tokenizer="bytes", dropout=0.25, max_lookback=77, **init), 256)
        assert (model.config.dropout, model.config.max_lookback) == (0.25, 77)
        assert model.h[0].attn.dropout == 0.25


# --------------------------------------------------------------------------------------------------
# optimizers


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name):
    model = GPT(GPTConfig(64, 16, n_layer=2, n_head=2, n_embd=16))
    config = Config(optimizer=name, weight_decay=0.3, beta1=0.8, beta2=0.7)
    rows = []
    for optimizer in build_optimizers(model, config):
        for group in optimizer.param_groups:
            assert group.get("betas", (0.8, 0.7)) == (0.8, 0.7)
            row = type(optimizer), group["weight_decay"], group.get("parts")
            rows += [(p, *row) for p in group["params"]]
    assert sum(p.numel() for p, *_ in rows) == sum(p.numel() for p in model.parameters())
    by_parameter = {p: row for p, *row in rows}
    for parameter, p in model.named_parameters():
        vector = "ln_" in parameter or parameter.endswith("bias")
        expected = [torch.optim.AdamW, 0 if vector else 0.3, None]
        if name == "muon" and parameter.startswith("h.") and not vector:
            expected = [Muon, 0.3, 3 if "c_attn" in parameter else 1]  # queries, keys and values
        assert by_parameter[p] == expected, parameter


@pytest.mark.parametrize("fast", [True, False], ids=["bfloat16", "float32"])
def test_muon_steps_like_that_of_pytorch_also_for_several_matrices_in_one(monkeypatch, fast):
    monkeypatch.setattr("support.machine.fast_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    shapes = (8, 24), (24, 8), (16, 16), (8, 24), (16, 16)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    stacked = torch.nn.Parameter(torch.ones(48, 16))  # three matrices in one
    theirs += [torch.nn.Parameter(torch.ones(16, 16)) for _ in range(3)]
    groups = [{"params": ours}, {"params": [stacked], "parts": 3}]
    optimizers = [
        Muon(groups, lr=0.1, weight_decay=0.5),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for b in theirs:
            b.grad = torch.randn_like(b)
        theirs[-1].grad *= 1e3  # it must not move its part further
        for a, b in zip(ours, theirs):
            a.grad = b.grad
        stacked.grad = torch.cat([b.grad for b in theirs[-3:]])
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip([*ours, *stacked.chunk(3)], theirs, strict=True):
        moved = (b - 0.95**3).norm()  # with no gradient there would be only decay
        assert (a - b).norm() < 0.05 * moved and moved > 0.1  # theirs has the digits of bfloat16
    dtype = newton_schulz(torch.randn(2, 9, 5)).dtype
    assert dtype == (torch.bfloat16 if fast else torch.float32)


# --------------------------------------------------------------------------------------------------
# divergence


@pytest.mark.parametrize(
    "harm, step, kind, name",
    [
        ("gradient", 6, "gradients", "h.1.attn.c_attn.weight"),
        ("activation", 6, "outputs", "h.0.mlp.c_fc"),  # its weights are finite but far too large
        ("weight", 7, "weights", "h.1.mlp.c_proj.bias"),
        ("weight, then a signal", 6, "weights", "h.1.mlp.c_proj.bias"),  # about to be saved
    ],
)
def test_divergence_names_step_and_layer_and_is_never_saved(
    place, run, monkeypatch, harm, step, kind, name
):
    set_locality, calls = GPT.set_locality, []

    def harm_step_6(model, gradient):
        calls.append(1)
        if len(calls) != 6:
            return gradient
        if harm == "gradient":
            return gradient * math.nan
        target, value = "h.1.mlp.c_proj.bias", math.inf
        if harm == "activation":
            target, value = "h.0.mlp.c_fc.weight", 3e38
        dict(model.named_parameters())[target].data.fill_(value)
        if harm.endswith("signal"):
            os.kill(os.getpid(), signal.SIGTERM)

    def set_and_harm(model, locality):
        set_locality(model, locality)
        model.h[1].attn.c_attn.weight.register_hook(lambda gradient: harm_step_6(model, gradient))

    out = place / "runs" / harm.replace(" ", "_")
    options = {"max_steps": 8, "eval_interval": 4, "log_interval": 100, "eval_contexts": 1}
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "set_locality", set_and_harm)
        status, _, error = run("train.py", TINY, *flags(**options, out=out))
    assert status == 2 and error.startswith("error: training diverged") and error.count("\n") == 1
    assert "lower learning_rate" in error
    assert re.search(rf"diverged at step {step} \(.*{kind}: {re.escape(name)}; ", error), error
    report = json.loads((out / "diverged.json").read_text())
    assert report[kind][0] == name and report["step"] == step
    for path in (out / "last.pt", out / "best.pt"):
        state = torch.load(path, weights_only=True)
        assert state["step"] in (0, 4)
        assert all(value.isfinite().all() for value in state["model"].values())
    assert not re.search("NaN|Infinity", (out / "metrics.jsonl").read_text())  # it is valid JSON
    assert run("train.py", out, "--resume")[0] == 0  # without the harm, it continues from there
    assert not (out / "diverged.json").exists()


# --------------------------------------------------------------------------------------------------
# configs


def test_every_config_in_the_folder_is_valid_and_sets_only_what_is_not_the_default():
    paths = sorted((ROOT / "configs").glob("*.toml"))
    paths = [path for path in paths if not path.stem.startswith(("sweep", "faithful"))]
    names = "distributed localist linear quadratic cubic quartic quintic window".split()
    known = {*(f"gpt2_{name}.toml" for name in names), "quickstart.toml", "tiny.toml"}
    assert known <= {path.name for path in paths}
    for path in paths:
        config = read_config([str(path)])
        values = tomllib.loads(path.read_text())
        assert Config(**tomllib.loads(to_toml(config))) == config
        kinds = "tiny", "quickstart", "book", "gpt2", "pretrain"
        assert path.stem.split("_")[0] in kinds
        for key in values.keys() - {"source", "schedule", "floor", "max_lookback", "partition"}:
            assert values[key] != getattr(Config(), key), f"{path.name}: {key} repeats the default"


@pytest.mark.parametrize(
    "script, kind", [("train", Config), ("sweep", Config), ("prepare_data", TextConfig)]
)
def test_help_names_every_key_with_type_default_and_meaning(run, script, kind):
    status, printed, error = run(f"{script}.py", "--help")
    assert (status, printed, error) == (0, run(f"{script}.py", "-h")[1], "")
    assert f"python {script}.py " in printed
    for field in dataclasses.fields(kind):
        default = "none" if field.default is None else json.dumps(field.default)
        line = rf"--{field.name}: (a |true).*; default {re.escape(default)}\n +(.+)\n"
        meaning = re.search(line, printed)[2]
        assert meaning == field.metadata["meaning"] and len(meaning) > 9


def test_overrides_and_the_learning_rate():
    words = "--compile false --floor 0.5 --warmup_steps 10 --anchor --seed 3".split()
    config = read_config([str(TINY), "--max-steps=200", "--source", "x y.txt", *words])
    assert (config.max_steps, config.source, config.compile) == (200, "x y.txt", False)
    assert (config.floor, config.anchor, config.seed) == (0.5, True, 3)
    rates = [learning_rate(step, config) for step in range(201)]
    assert rates[0] == pytest.approx(3e-4)
    assert max(rates) == rates[10] == 3e-3
    assert rates[200] == pytest.approx(3e-5)
    assert read_config([str(TINY), "--source", '["a", "b"]']).source == ["a", "b"]
    assert read_config([str(TINY), "--out", ""]).out == "runs/tiny"


@pytest.mark.parametrize("word", [".5", "0.", "+.5", "5e-1", "0_0.5", "00.5", "0"])
def test_numbers_of_the_command_line_need_not_look_like_toml(word):
    assert read_config([str(TINY), f"--dropout={word}"]).dropout == float(word)
    assert read_config([str(TINY), "--seed", "+1_0", "--n_layer", "03"]).n_layer == 3
    for wrong in ("1.", "1e3", "", "x"):
        with pytest.raises(InputError, match="seed must be a whole number"):
            read_config([str(TINY), "--seed", wrong])


HUGE = """batch_size=1152921504606846976 grad_accum=1000000000 n_layer=10000000 n_head=1000000000
    n_embd=1000000000 block_size=1000000000"""


@pytest.mark.parametrize("setting", HUGE.split())
def test_a_number_that_no_machine_can_hold_is_refused_at_once(setting):
    key, value = setting.split("=")
    with pytest.raises(InputError, match=f"{key} must be below 10*, not {value}"):
        Config(**{key: int(value)})


@pytest.mark.parametrize("shape", [{"n_layer": 9999, "n_embd": 76800}, {"n_embd": 960000}])
def test_a_model_that_is_far_too_large_is_refused_before_its_layers_are_built(shape, monkeypatch):
    monkeypatch.setattr("model.Layer", None)
    with pytest.raises(
        InputError, match=f"a model of .* layers, {shape['n_embd']} wide, .* memory"
    ):
        build_model(Config(**shape), 256)


def test_something_other_than_a_config_is_named_with_what_to_do(tmp_path, run):
    book, empty, odd = (tmp_path / name for name in ("my book.txt", "empty", "odd.toml"))
    book.write_text("It was a dark night.")
    empty.write_text("")
    odd.write_text('"a\\nb\\u001b[31m" = 3')
    sweep = ROOT / "configs" / "sweep_smoke.toml"
    quoted = shlex.quote(str(book))
    for words, message in (
        (
            ["train.py", sweep],
            f"a sweep, not a run; run all its cells with: python sweep.py {sweep}",
        ),
        (["train.py", book], f"python train.py configs/quickstart.toml --source {quoted}"),
        (["sweep.py", book], f"python sweep.py configs/sweep_gpt2.toml --source {quoted}"),
        (["train.py", empty], f"configs/quickstart.toml --source {empty}"),
        (
            ["train.py", "runs/tiny/best.pt"],
            "to resume its run: python train.py runs/tiny --resume",
        ),
        (["train.py", odd], r"unknown key a\nb\x1b[31m; the nearest is"),
    ):
        status, _, error = run(*words)
        assert status == 2 and error.count("\n") == 1 and message in error, error


WRONG = """schedule=septic schedul=cubic floor=0 floor=1.5 floor=nan n_layer=two n_layer=2.5
    n_layer=0 learning_rate=inf dropout=1 compile=maybe dtype=float16 partition=window:x
    tokenizer=bpe tokenizer=gpt2:99 min_lookback=200 max_lookback=-1 dial=half anchor=1
    optimizer=sgd seed=true seed source= batch_size=[4]"""


@pytest.mark.parametrize("setting", WRONG.split())
def test_a_wrong_value_is_named(setting):
    with pytest.raises(InputError, match=setting.partition("=")[0]):
        read_config([str(TINY), f"--{setting}"])


# --------------------------------------------------------------------------------------------------
# the command line


def test_mistakes_end_in_one_line_and_status_2(place, run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # no tokenizer, and
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    for name, text in (
        ("broken", "schedule = quintic"),
        ("3", "out = 3"),
        ("deep", "seed.a" + ".a" * 3000 + " = 1"),
        ("long", "seed = 1" + " " * 100_000),
        ("false", "out = false"),
    ):
        (place / f"{name}.toml").write_text(text)
    GPT(GPTConfig(1000, 128, n_layer=2, n_head=2, n_embd=32)).save_pretrained(place / "w1000")
    GPT(GPTConfig(100, 8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(place / "odd")
    capsys.readouterr()  # one of them has no tokenizer
    x = f"train.py {TINY} --out runs/x"
    sample = "--source data/sample.txt"
    mistakes = [
        ("train.py", "config"),
        ("train.py data", "data is a folder"),
        ("train.py nothing.toml", "nothing.toml"),
        ("train.py broken.toml", "TOML"),
        ("train.py 3.toml", "out must be"),
        ("train.py deep.toml", "seed must be a whole number, not a table"),
        ("train.py long.toml", "longer than 100,000 bytes"),
        ("train.py false.toml", "out must be"),
        (f"train.py {TINY}", "overwrite"),  # this run exists
        (f"{x} seed 3", "seed: every key needs exactly one value"),
        (f"{x} --source nothing.txt", "nothing.txt"),
        (f"{x} --source a.txt --source b.txt", "--source is given twice; several sources are"),
        (f"{x} --floor 0.5 --floor=0.9", "--floor is given twice"),
        (f"{x} --data '~/x'", "data: write the name of the home folder instead of ~/x"),
        (f"{x} --n_embd 30 --n_head 4", "divisible"),
        (f"{x} --block_size 100000", "block_size"),
        (f"{x} --init_from runs/tiny --block_size 1000", "block_size"),
        (f"{x} --init_from runs/tiny --n_layer 3", "n_layer"),
        (f"{x} --init_from nowhere", "nowhere"),
        (f"{x} --init_from w1000 --block_size 100", "w1000 has 1000"),
        (f"{x} --device cuda:99", "cuda:99"),
        ("sweep.py", "config"),
        ("sweep.py 3.toml", "out must be"),
        (f"sweep.py {TINY}", "sweep"),
        (f"sweep.py {ROOT}/configs/sweep_smoke.toml --report --out runs/none", "runs/none"),
        ("eval.py data", "checkpoint"),
        ("eval.py runs/tiny --source ''", "need a value that is not empty"),
        ("eval.py runs/tiny --schedule ''", "need a value that is not empty"),
        (f"eval.py runs/tiny/best.pt {sample}", "is a checkpoint of a run; give the folder"),
        ("sample.py runs/tiny/last.pt", "is a checkpoint of a run; give the folder"),
        ("view.py runs/tiny/best.pt --prompt 'some words'", "is a checkpoint of a run; give"),
        ("eval.py gpt2", "--source"),  # before anything is downloaded
        (f"eval.py nowhere {sample}", "nowhere"),
        (f"eval.py w1000 {sample}", "TIKTOKEN_CACHE_DIR"),
        (f"eval.py odd {sample}", "one of our tokenizers"),
        ("eval.py runs/tiny --source nowhere.txt", "nowhere.txt"),
        ("eval.py runs/tiny --partition shifted:9000", "a quarter of"),
        ("eval.py runs/tiny --floor 0.5 --floor 0.9", "--dial-sweep"),
        ("eval.py runs/tiny --schedule linear --schedule cubic", "--dial-sweep"),
        ("eval.py runs/tiny --dial-sweep --schedule linear --schedule sextic", "sextic"),
        ("eval.py runs/tiny --dial-sweep --floor 1 --floor 0", "floor must be above 0"),
        ("eval.py runs/tiny --dial-sweep --schedule ''", "need a value that is not empty"),
        ("eval.py runs/tiny --contexts 0", "--contexts"),
        ("eval.py runs/tiny --schedule sextic", "sextic"),
        ("eval.py runs/tiny --stride 1000", "stride"),
        ("eval.py runs/tiny --figure f.gif", "f.gif"),
        ("sample.py runs/tiny --prompt ''", "prompt"),
        ("sample.py runs/tiny --top-p 0", "top-p"),
        ("prepare_data.py", "give a text"),
        ("prepare_data.py nothing.txt", "nothing.txt"),
        ("prepare_data.py data/sample.txt --source b.txt", "but not both"),
        ("prepare_data.py data/sample.txt --tokenizer gpt2", "TIKTOKEN_CACHE_DIR"),
    ]
    for command, message in mistakes:
        status, _, error = run(*shlex.split(command))
        assert status == 2 and error.count("\n") == 1, (command, error)
        assert error.startswith("error: ") and message in error, (command, error)
    assert not (place / "runs" / "x").exists()
