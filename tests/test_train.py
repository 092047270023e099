"""The whole way: text -> blocks -> training -> measures -> samples, run as a user runs it."""

import json
import math
import random
import runpy
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

from eval import evaluate, load_run, windows
from locality import InputError, partition, schedule
from model import GPT, GPTConfig
from prepare_data import get_encoding, token_bytes
from train import Config, learning_rate, read_config, to_toml

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
    assert run("eval.py", "runs/tiny", "--schedule", "localist", "--fidelity", 0.5, "--partition", "block:16",
               "--stride", 100, "--json", "r.json")[0] == 0
    results = json.loads((place / "r.json").read_text())
    assert [layer["locality"] for layer in results["layers"]] == [0.5, 0.5]
    assert results["perplexity"] != expected["perplexity"] and results["partition"] == "block:16"


def test_sample_writes_text_the_same_for_the_same_seed(run):
    texts = [run("sample.py", "runs/tiny", "--prompt", "The mind ", "--tokens", 60, "--top-k", 20) for _ in range(2)]
    assert texts[0] == texts[1] and texts[0][0] == 0
    assert texts[0][1].startswith("The mind ") and len(texts[0][1]) > 30


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
    """Recovery: the token before a block is copied inside it only by a model whose first layers may look out of it."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (64, 24))
    tokens[:, 12:] = tokens[:, :12]                             # the second block repeats the first
    lookback = torch.arange(24).remainder(12).expand(64, 24)    # … and cannot see it
    losses = {}
    for name in ("localist", "quintic"):
        torch.manual_seed(1)
        model = GPT(GPTConfig(16, 24, n_layer=3, n_head=2, n_embd=48, max_lookback=12))
        model.set_locality(schedule(name, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(250):
            tokens[:, :12] = torch.randint(1, 9, (64, 12), generator=torch.Generator().manual_seed(step))
            tokens[:, 12:] = tokens[:, :12]
            logits = model(tokens, lookback)[0]
            loss = F.cross_entropy(logits[:, 12:-1].flatten(0, 1), tokens[:, 13:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    assert losses["localist"] > 0.95 * math.log(8)    # nothing inside the block tells what comes
    assert losses["quintic"] < 0.5 * math.log(8)


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
    model = GPT(GPTConfig(256, 20, n_layer=2, n_head=2, n_embd=16, max_lookback=8)).eval()
    model.set_locality([0.3, 1])
    text = (ROOT / "data" / "sample.txt").read_bytes()[:130]
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    lookback = partition(tokens, VOCABULARY, "block:6", 8)
    results = evaluate(model, tokens, lookback, VOCABULARY, stride=5)
    nats, fidelity, at = 0.0, 0.0, 0
    for start, first in windows(130, 20, 5):
        x, r, y = (torch.from_numpy(a.astype(np.int64))[None] for a in (
            tokens[start:start + 20], lookback[start:start + 20], tokens[start + 1:start + 21]))
        with torch.no_grad():
            nats += F.cross_entropy(model(x, r)[0][0, first:], y[0, first:], reduction="sum").item()
            a = list(model.attention_maps(x, r))[0][0]
        for i in range(first, 20):
            back = min(int(r[0, i]), i)
            fidelity += a[:, i, i - back:i + 1].sum(-1).mean().item()
    assert results["tokens"] == 129 and results["loss"] == pytest.approx(nats / 129, rel=1e-5)
    assert results["layers"][0]["fidelity"] == pytest.approx(fidelity / 129, rel=1e-5)
    assert results["bits_per_byte"] == pytest.approx(nats / 129 / math.log(2), rel=1e-5)


# ---- configurations


def test_every_config_in_the_folder_is_valid_and_says_only_what_differs():
    paths = sorted((ROOT / "configs").glob("*.toml"))
    assert {f"gpt2_{s}.toml" for s in ("distributed", "localist", "linear", "quadratic", "cubic", "quartic", "quintic",
                                       "window")} | {"quickstart.toml", "tiny.toml"} <= {p.name for p in paths}
    for path in paths:
        config = read_config([str(path)])
        said = tomllib.loads(path.read_text())
        assert Config(**tomllib.loads(to_toml(config))) == config
        assert path.stem == "tiny" or path.stem.split("_")[0] in ("quickstart", "gpt2")
        for key in said.keys() - {"source", "schedule", "fidelity", "max_lookback", "partition"}:
            assert said[key] != getattr(Config(), key), f"{path.name}: {key} repeats the default"


def test_overrides_and_the_learning_rate():
    config = read_config([str(TINY), "--max-steps=200", "--source", "x y.txt", "--compile", "false", "--fidelity", "0.5",
                          "--warmup_steps", "10", "--seed", "3"])
    assert (config.max_steps, config.source, config.compile, config.fidelity, config.seed) == (200, "x y.txt", False, 0.5, 3)
    rates = [learning_rate(step, config) for step in range(201)]
    assert rates[0] == pytest.approx(3e-4) and max(rates) == rates[10] == 3e-3 and rates[200] == pytest.approx(3e-5)
    assert read_config([str(TINY), "--source", '["a", "b"]']).source == ["a", "b"]


@pytest.mark.parametrize("override, says", [
    (["--schedul", "cubic"], "schedule"), (["--schedule", "septic"], "quintic|quartic|septic"),
    (["--n_layer", "two"], "n_layer"), (["--n_layer", "2.5"], "n_layer"), (["--n_layer", "0"], "n_layer"),
    (["--fidelity", "0"], "fidelity"), (["--fidelity", "1.5"], "fidelity"), (["--fidelity", "nan"], "fidelity"),
    (["--learning_rate", "inf"], "learning_rate"), (["--dropout", "1"], "dropout"), (["--compile", "maybe"], "compile"),
    (["--dtype", "float16"], "dtype"), (["--partition", "window:x"], "window"), (["--tokenizer", "bpe"], "tokenizer"),
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
        (["eval.py", "runs/tiny", "--schedule", "sextic"], "sextic"),
        (["eval.py", "runs/tiny", "--stride", 1000], "stride"),
        (["eval.py", "runs/tiny", "--figure", "f.gif"], "f.gif"),
        (["sample.py", "runs/tiny", "--prompt", ""], "prompt"),
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


def test_killed_at_random_and_resumed_it_ends_at_the_same_bits(place):
    options = ["--max_steps", "60", "--eval_interval", "10", "--log_interval", "2", "--dropout", "0.1", "--out"]
    assert python("train.py", TINY, *options, "runs/whole", cwd=place).returncode == 0
    run, killed = place / "runs" / "killed", 0
    for lines in sorted(random.Random(5).sample(range(2, 35), 3)):    # kill it when the metrics have so many lines
        command = ["runs/killed", "--resume"] if killed else [str(TINY), *options, "runs/killed"]
        with subprocess.Popen([sys.executable, ROOT / "train.py", *command], cwd=place, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (run / "last.pt").exists() or \
                    process.poll() is None and len((run / "metrics.jsonl").read_bytes().splitlines()) < lines:
                time.sleep(0.002)
            killed += process.poll() is None
            process.kill()
    assert killed and python("train.py", "runs/killed", "--resume", cwd=place).returncode == 0
    expected, found = endings(place / "runs" / "whole"), endings(run)
    assert found[1] == expected[1]
    assert all(torch.equal(value, found[0][key]) for key, value in expected[0].items())


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


def test_a_run_is_not_measured_on_a_text_that_changed(place, run):
    (place / "book.txt").write_text((ROOT / "data" / "sample.txt").read_text())
    assert run("train.py", TINY, "--source", "book.txt", "--max_steps", 2, "--out", "runs/book")[0] == 0
    (place / "book.txt").write_text("Another text. " * 2000)
    for command in (["eval.py", "runs/book"], ["train.py", "runs/book", "--resume", "--max_steps", 4]):
        status, _, error = run(*command)
        assert status == 2 and "changed" in error
