"""The paper's experiment is checked and timed before it starts, and can be rehearsed anywhere."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from conftest import ROOT, flags, script_here
from experiments import replicate
from model import GPT, GPTConfig
from support.files import InputError
from sweep import read_cells, read_sweep
from test_sweep import TINY, forked, write_sweep
from train import Config, read_config

# a process in which gpt2 means the weights that the test serves, with the test's cache
PATCHED = """
import runpy, sys
from pathlib import Path
sys.argv[:] = sys.argv[1:]
sys.path[0] = {root!r}
from support import sources, weights
sources.CACHE = weights.CACHE = Path({cache!r})
weights.PRETRAINED["gpt2"] = {expected!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def evening(tmp_path, monkeypatch, serve):
    """A working folder, and a server with a book of Project Gutenberg and with weights in the
    published format: a GPT-2 of one layer that reads bytes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    GPT(GPTConfig(256, 64, n_layer=1, n_head=12, n_embd=768)).save_pretrained("published")
    weights = Path("published/pytorch_model.bin").read_bytes()
    text = (ROOT / "data" / "sample.txt").read_bytes()[:20_000]
    edge = b"*** %s OF THE PROJECT GUTENBERG EBOOK THE ANALYSIS OF MIND ***"
    book = b"\n\n".join((edge % b"START", text, edge % b"END"))
    names = "/openai-community/gpt2/resolve/main/pytorch_model.bin", "/cache/epub/2529/pg2529.txt"
    address, files = serve(dict(zip(names, (weights, book))))
    expected = len(weights), hashlib.sha256(weights).hexdigest()
    for name in ("HF_ENDPOINT", "GUTENBERG_MIRROR"):
        monkeypatch.setenv(name, address)
    cache = tmp_path / "cache"
    for name in ("support.weights.CACHE", "support.sources.CACHE"):
        monkeypatch.setattr(name, cache)
    monkeypatch.setattr("support.weights.PRETRAINED", {"gpt2": expected})
    values = {"root": str(ROOT), "cache": str(cache), "expected": expected}
    Path("patched.py").write_text(PATCHED.format(**values))
    return files


def replicated(*words):
    """Run the command in this process. Returns its exit status."""
    return script_here("experiments/replicate.py", *words)


CONFIG = ROOT / "configs" / "sweep_gpt2.toml"
KEYS = {"tokenizer": "bytes", "schedule": "distributed,quintic"}
REHEARSAL = [CONFIG, "--quick", *flags(**KEYS)]


def test_a_rehearsal_without_a_gpu_leads_from_two_addresses_to_the_table(
    evening, monkeypatch, capsys
):
    """It is stopped after the first cell, and continued with the same command."""
    folder, ended = Path("runs/sweep_gpt2_quick"), []

    def patched(command, stdout=None, **options):
        if command[0] != sys.executable:
            return forked(command, stdout, **options)
        command = [command[0], "patched.py", *command[1:]]
        if len(ended) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        ended.append(command)
        return forked(command, stdout, env=dict(os.environ))

    monkeypatch.setattr("support.jobs.subprocess.Popen", patched)
    assert replicated(*REHEARSAL) == 128 + signal.SIGTERM
    out, error = capsys.readouterr()
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines[:6] == ["device", "compiler", "tokenizer", "text", "weights", "disk"]
    assert "runs: 4, 1 at a time, 0.2 GB on disk" in out and "NOT OK" not in out
    assert error.endswith("stopped; run the same command to continue\n")
    evening.clear()  # nothing is downloaded a second time
    assert replicated(*REHEARSAL) == 0
    out, error = capsys.readouterr()
    assert re.search("runs: [23], 1 at a time", out) and not error  # the second may have finished
    assert "4/4 quintic.seed2: perplexity" in out
    assert sum("distributed.seed1" in str(command) for command in ended) == 1
    table = (folder / "table.md").read_text()
    assert "| distributed | 2 |" in table and "| quintic, semantic | 2 |" in table
    for name in ("distributed.seed1", "quintic.seed2"):  # what the report and view.py need
        kept = {path.name for path in (folder / name).iterdir()}
        assert {"best.pt", "results.json", "metrics.jsonl", "config.toml"} <= kept
        assert "last.pt" not in kept
    assert replicated(*REHEARSAL, "--report") == 0
    assert capsys.readouterr().out.endswith(
        "rehearsal: a few steps of small batches. Its numbers mean nothing.\n"
    )


def no_gpu(monkeypatch):
    return {"device": "cuda"}


def no_bfloat16(monkeypatch):
    monkeypatch.setattr("support.machine.fast_bfloat16", lambda device: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "GeForce GTX 1080")
    device = namedtuple("device", "type")("cuda")
    for name in ("support.jobs.pick_device", "experiments.replicate.pick_device"):
        monkeypatch.setattr(name, lambda name: device)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (8 << 30, 8 << 30))
    return {"dtype": "bfloat16"}


def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    return {"compile": "true"}


def no_book(monkeypatch):
    return {"source": "my_bok.txt"}


def no_weights(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return {}


def other_weights(monkeypatch):
    return {"tokenizer": "sample"}


def small_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2e9, 1.9e9, 1e8))
    return {}


NEEDS = [
    (no_gpu, "device", "device cuda is not available here.*add --quick"),
    (no_bfloat16, "device", "GeForce GTX 1080 has no bfloat16"),
    (no_compiler, "compiler", "no-such-compiler.* was not found"),
    (no_book, "text", "my_bok.txt: no such file or folder"),
    (no_weights, "weights", "could not be downloaded.*or give a local folder"),
    (other_weights, "weights", "the sample tokenizer has 1001 tokens, but gpt2 has 256"),
    (
        small_disk,
        "disk",
        "the disk of runs/sweep_gpt2_quick has 0.1 GB free, but 4 runs need 0.3 GB",
    ),
]


@pytest.mark.parametrize("spoil, name, words", NEEDS, ids=[spoil.__name__ for spoil, *_ in NEEDS])
def test_whatever_is_missing_is_named_once_before_any_run(
    evening, monkeypatch, capsys, spoil, name, words
):
    def start(*args, **options):
        raise AssertionError("a run was started")

    monkeypatch.setattr("support.jobs.subprocess.Popen", start)
    words_of = [CONFIG, "--quick", *flags(**{**KEYS, **spoil(monkeypatch)})]
    monkeypatch.setattr(sys, "argv", ["replicate.py", *map(str, words_of)])
    with pytest.raises(InputError, match=f"{name}: .*{words}") as caught:
        replicate.main()
    assert "\n" not in str(caught.value)
    lines = capsys.readouterr().out.splitlines()
    missing = {line.split()[0] for line in lines if "NOT OK" in line}
    assert missing == {name} and not Path("runs").exists()
    unknown = [line.split()[0] for line in lines if "not checked, because" in line]
    assert unknown == (["disk"] if name == "weights" else [])
    names = ["device", "compiler", "tokenizer", "text", "weights", "disk"]
    assert [line.split()[0] for line in lines] == names


def test_a_disk_that_is_too_small_is_noticed(evening, capsys):
    """A real file system of 2 MB, where the system lets us mount one."""
    Path("small").mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=2m", "none", "small"]
    if not mount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert replicated(*REHEARSAL, "--out", "small/sweep") == 2
        assert not list(Path("small").iterdir())
    finally:
        subprocess.run(["umount", "small"], check=True)
    assert (
        "the disk of small/sweep has 0.0 GB free, but 4 runs need 0.3 GB" in capsys.readouterr().err
    )


# --------------------------------------------------------------------------------------------------
# the estimate


def test_the_time_of_a_run_follows_from_its_steps_evaluations_and_the_rest(tmp_path, monkeypatch):
    """A trial in which a step takes 2 s, an evaluation with its checkpoints 5 s, all else 30 s."""
    monkeypatch.chdir(tmp_path)
    clock = [0.0]

    def run_jobs(commands, n, held, threads, kill):
        for out in commands:
            rows, clock[0] = [], clock[0] + 30 + 5  # the first evaluation comes before all steps
            for step in range(1, replicate.STEPS + 1):
                clock[0] += 2
                rows.append({"step": step, "loss": 1.0, "seconds": clock[0]})
                if step % replicate.LOOK == 0:
                    rows.append({"step": step, "val_loss": 1.0, "seconds": clock[0] + 1})
                    clock[0] += 5
            Path(out).mkdir(parents=True)
            Path(out, "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            yield out, None

    monkeypatch.setattr(replicate, "run_jobs", run_jobs)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    cell = Config(**{**TINY, "max_steps": 101, "eval_interval": 20, "out": "sweep/localist"})
    assert replicate.time_trial(cell, 1, None) == pytest.approx(30 + 101 * 2 + 7 * 5)
    assert not list(Path("sweep").iterdir())


def test_a_trial_runs_first_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes((ROOT / "data" / "sample.txt").read_bytes()[:20000])
    table = {"schedule": ["distributed", "linear"]}
    write_sweep("sweep.toml", table, source="book.txt", max_steps=13, eval_interval=6)
    started = []

    def start(command, **options):
        if command[0] == sys.executable:
            started.append(str(command[2]))
        return forked(command, **options)

    monkeypatch.setattr("support.jobs.subprocess.Popen", start)
    assert (
        replicated("sweep.toml", "--jobs", "2", "--learning_rate", "1e30", "--warmup_steps", 0) == 2
    )
    error = capsys.readouterr().err
    assert error.count("a trial of 6 steps failed, so no run was started: error: training div") == 1
    assert error.count("\n") == 1 and len(started) == 2
    assert not list(Path("sweep").glob("*/results.json"))
    assert replicated("sweep.toml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "timing 6 steps of linear" in lines
    assert any(line.startswith("runs: 2, 1 at a time, 0.0 GB on disk, about") for line in lines)
    assert len(started) == 5 and not list(Path("sweep").glob(".trial*"))
    results = [json.loads(path.read_text()) for path in Path("sweep").glob("*/results.json")]
    assert [r["steps"] for r in results] == [13, 13]


def test_a_trial_ends_at_once_if_it_is_stopped(tmp_path, monkeypatch, capsys):
    """Its model is so large that a step would take minutes."""
    monkeypatch.chdir(tmp_path)
    large = {"n_embd": 512, "n_layer": 12, "n_head": 8, "block_size": 1024, "batch_size": 64}
    write_sweep("sweep.toml", {"seed": [1]}, max_steps=100, **large)

    def start(command, **options):
        if command[0] == sys.executable:
            threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return forked(command, **options)

    monkeypatch.setattr("support.jobs.subprocess.Popen", start)
    assert replicated("sweep.toml") == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped; run the same command to continue\n"
    assert not Path("sweep").exists()


# --------------------------------------------------------------------------------------------------
# the recipe


def test_the_configs_of_gpt2_are_cells_of_the_sweep(monkeypatch):
    """Apart from what does not change the result of a run, and from the window of the first
    version."""
    free = {"out", "seed", "device", "dtype", "compile"}
    seven = "distributed,localist,linear,quadratic,cubic,quartic,quintic"
    values = read_sweep([str(CONFIG), "--schedule", seven, "--seed", "1"])
    cells = {cell.schedule: asdict(cell) for cell in read_cells(values).values()}
    assert len(cells) == 7
    paths = sorted((ROOT / "configs").glob("gpt2_*.toml"))
    assert len(paths) == 8
    for path in paths:
        config = asdict(read_config([str(path)]))
        cell = cells[config["schedule"]]
        differ = {key for key in config if config[key] != cell[key]} - free
        assert differ == ({"partition", "max_lookback"} if path.stem == "gpt2_window" else set())


def test_what_the_user_gives_takes_the_place_of_what_a_rehearsal_would_set(monkeypatch, capsys):
    given = {}

    def main(check):
        given.update(read_sweep(sys.argv[1:]))
        raise SystemExit(0)

    monkeypatch.setattr("sweep.main", main)
    monkeypatch.chdir(ROOT)
    for words, steps, seeds, out in (
        (["--quick", "--max-steps=3", "--seed", "7"], 3, [7], "runs/sweep_gpt2_quick"),
        (["--max_steps=2"], 2, [1, 2, 3, 4, 5], "runs/sweep_gpt2"),
    ):
        monkeypatch.setattr(sys, "argv", ["replicate.py", *words])
        with pytest.raises(SystemExit):
            replicate.main()
        assert given["max_steps"] == steps and given["sweep"][0]["seed"] == seeds
        assert given["out"] == out and given.get("block_size") == (
            64 if "--quick" in words else None
        )
        assert ("rehearsal" in capsys.readouterr().out) == ("--quick" in words)
        given.clear()


def test_a_rehearsal_has_cells_of_every_table(tmp_path, monkeypatch):
    cells = {}

    def main(check):
        cells.update(read_cells(read_sweep(sys.argv[1:])))

    monkeypatch.setattr("sweep.main", main)
    path = tmp_path / "s.toml"
    path.write_text(
        '[[sweep]]\nschedule = ["distributed"]\nseed = [1, 2, 3]\nmax_steps = [7, 9]\n'
        '[[sweep]]\nschedule = ["quintic"]\nseed = [11, 12, 13]\nmax_steps = [7, 9]\n'
    )
    monkeypatch.setattr(sys, "argv", ["replicate.py", str(path), "--quick"])
    replicate.main()
    assert sorted((cell.schedule, cell.seed, cell.max_steps) for cell in cells.values()) == [
        *(("distributed", seed, 2) for seed in (1, 2)),
        *(("quintic", seed, 2) for seed in (11, 12)),
    ]
