"""A run that was stopped, killed, shared or harmed continues, or says why it cannot."""

import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data
from conftest import ROOT, TINY, flags, prepared_folder
from eval import evaluate, load
from forks import children, started
from model import GPT
from prepare_data import TextConfig, prepare
from support import files, prepared
from support.ddp import Process
from support.files import InputError
from support.machine import code_version
from support.prepared import read_meta
from train import Config, random_batch, read_config


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def last_step(run):
    return torch.load(run / "last.pt", weights_only=True)["step"]


def ending(run):
    """All numbers of a finished run: metrics without their timings, and results."""
    times = "tokens_per_s", "seconds"
    metrics = [{k: v for k, v in line.items() if k not in times} for line in metrics_of(run)]
    results = json.loads((run / "results.json").read_text())
    keys = ("loss", "perplexity", "accuracy", "layers", "by_position", "best_step", "steps")
    return metrics, [results[key] for key in keys]


def assert_same_run(whole, folder):
    """The weights, last and best, the metrics and the results are the same to the bit."""
    assert ending(whole) == ending(folder)
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(run / name, weights_only=True)["model"] for run in (whole, folder))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert not list(folder.glob("*.tmp"))


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# killed, stopped, out of space


@pytest.mark.parametrize("n_threads, optimizer", [(1, "muon"), (2, "adamw")])
def test_killed_at_random_and_resumed_it_ends_at_the_same_bits(
    place, run, train, n_threads, optimizer, threads
):
    """KILLS=50 kills it 50 times instead of 3."""
    threads(n_threads)
    options = {"max_steps": 60, "eval_interval": 10, "log_interval": 2, "dropout": 0.1}
    whole = train(f"whole{n_threads}", **options, optimizer=optimizer)
    folder, killed = place / "runs" / f"killed{n_threads}", 0
    options = flags(**options, optimizer=optimizer, out=folder)
    rng = random.Random(5)
    kills = rng.choices(range(2, 35), k=int(os.environ.get("KILLS", 3)))
    for n_lines in sorted(kills):  # of metrics.jsonl
        command = [folder, "--resume"] if killed else [TINY, *options]
        with started(ROOT / "train.py", *command, cwd=place, n_threads=n_threads) as process:
            while process.is_alive() and count_lines(folder) < n_lines:
                time.sleep(0.002)
            time.sleep(rng.random() / 50)
            killed += process.is_alive()
    assert killed and run("train.py", folder, "--resume")[0] == 0
    assert_same_run(whole, folder)
    samples = [run("sample.py", name, "--tokens", 40)[:2] for name in (whole, folder)]
    assert samples[0] == samples[1] and samples[0][0] == 0


def count_lines(folder):
    """Lines of metrics; 0 as long as there is nothing to resume from."""
    if not (folder / "last.pt").exists():
        return 0
    return len((folder / "metrics.jsonl").read_bytes().splitlines())


DIES_SAVING = """
import os, signal, train
replace, saves = os.replace, []
def die(temporary, path):
    saves.append(path) if str(path).endswith("last.pt") else None
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)    # written, but not renamed
    replace(temporary, path)
os.replace = die
train.main()
"""


def test_killed_while_it_saves_the_previous_checkpoint_is_whole(place, run):
    folder, script = place / "runs" / "unsaved", place / "dies.py"
    script.write_text(DIES_SAVING)
    with started(script, TINY, "--out", folder, cwd=place) as process:
        process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(list(folder.glob("last.pt.*.tmp"))) == 1
    assert last_step(folder) == 20
    assert run("train.py", "runs/unsaved", "--resume")[0] == 0
    assert_same_run(place / "runs" / "tiny", folder)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(train, run, file_size):
    rare = {"eval_interval": 4, "log_interval": 100, "eval_contexts": 1}
    roomy = train("roomy", warmup_steps=30, **rare, max_steps=8)
    folder = train("full", warmup_steps=30, **rare, max_steps=4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def resume_with(limit, **more):
        file_size(limit)
        status, _, error = run("train.py", folder, "--resume", *flags(**{"max_steps": 8, **more}))
        file_size(None)
        assert status == 2 and one_line(error) and "could not be written (" in error, error
        assert all(name in before for name in os.listdir(folder))  # no temporary file is left
        for name in ("best.pt", "last.pt"):
            assert (folder / name).read_bytes() == before[name]
        assert metrics_of(folder)
        return error

    assert ".pt" in resume_with(100_000)
    assert "metrics.jsonl" in resume_with(1500, log_interval=1, eval_interval=99, max_steps=30)
    # there is room again
    assert run("train.py", folder, "--resume", *flags(**rare, max_steps=8))[0] == 0
    assert_same_run(roomy, folder)


def test_a_second_run_in_the_same_folder_is_refused(place, run):
    folder = place / "runs" / "taken"
    options = flags(max_steps=100000, out=folder)
    with started(ROOT / "train.py", TINY, *options, cwd=place) as process:
        while not (folder / "last.pt").exists() and process.is_alive():
            time.sleep(0.05)
        for second in ([folder, "--resume"], [TINY, "--overwrite", "--out", folder]):
            status, _, error = run("train.py", *second)
            assert status == 2 and one_line(error) and "another process" in error, error
        assert process.is_alive() and (folder / "last.pt").exists()
    # the lock ended with the process
    assert run("train.py", folder, "--resume", "--max_steps", last_step(folder) + 1)[0] == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_long_run_grows_neither_in_memory_nor_in_open_files(place):
    small = {"block_size": 32, "n_layer": 1, "n_embd": 16, "batch_size": 2, "eval_contexts": 4}
    small |= {"partition": "block:16", "max_steps": 2000, "log_interval": 5, "eval_interval": 100}
    folder, seen = place / "runs" / "marathon", []
    with started(ROOT / "train.py", TINY, *flags(**small, out=folder), cwd=place) as process:
        while process.is_alive():
            time.sleep(0.1)
            try:
                metrics = (folder / "metrics.jsonl").read_text()
                # a line that crosses a page of the file may be seen half written
                if metrics and not metrics.endswith("\n"):
                    time.sleep(0.01)
                    metrics = (folder / "metrics.jsonl").read_text()
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
                handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            except (OSError, TypeError):
                continue  # it has not begun, or has just ended
            steps = [json.loads(line)["step"] for line in metrics.splitlines()]
            assert not metrics or metrics.endswith("\n")
            seen.append((steps[-1] if steps else 0, resident, handles))
    assert process.exitcode == 0
    metrics = metrics_of(folder)
    assert [m["step"] for m in metrics if "loss" in m] == list(range(5, 2001, 5))
    assert [m["step"] for m in metrics if "val_loss" in m] == list(range(0, 2001, 100))
    spans = (300, 700), (1600, 2000)
    early, late = ([(rss, n) for step, rss, n in seen if a <= step < b] for a, b in spans)
    assert len(early) > 2 and len(late) > 2
    assert max(rss for rss, _ in late) < 1.05 * max(rss for rss, _ in early)
    # one more: a file that is being saved
    assert max(n for _, n in late) <= max(n for _, n in early) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_cleanly_and_it_can_be_resumed(place, run, number):
    out, folder = f"runs/long-{number}", place / "runs" / f"long-{number}"
    options = flags(max_steps=3000, out=out)
    with started(ROOT / "train.py", TINY, *options, cwd=place) as process:
        while not (folder / "last.pt").exists() and process.is_alive():
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.join(60)
    assert process.exitcode == 128 + number
    assert f"python train.py {out} --resume" in (place / "output.txt").read_text()
    step = last_step(folder)
    status, printed, _ = run("train.py", folder, "--resume", "--max_steps", step + 4)
    assert status == 0 and f"from step {step}" in printed
    assert json.loads((folder / "results.json").read_text())["steps"] == step + 4
    status, _, error = run("train.py", folder, "--resume", "--floor", 0.5)
    assert status == 2 and "floor was 1.0, is 0.5" in error
    # a finished run that is extended is no longer finished
    with started(ROOT / "train.py", out, "--resume", *flags(max_steps=9000), cwd=place) as process:
        while last_step(folder) <= step + 4 and process.is_alive():
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.join(60)
    assert not (folder / "results.json").exists()
    assert run("train.py", "runs/none", "--resume")[0] == 2


def test_a_resumed_run_that_is_stopped_at_once_leaves_whole_metrics(train, run, monkeypatch):
    folder = train("stopped", eval_interval=2, eval_contexts=1, log_interval=100, max_steps=2)
    # like a run that was killed while it wrote, after its last checkpoint
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "val_loss": 3.0}\n' * 20 + '{"step": 6, "val')
    clip = torch.nn.utils.clip_grads_with_norm_

    def stop_and_clip(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    command = "train.py", folder, "--resume", "--max_steps", 6
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grads_with_norm_", stop_and_clip)
        assert run(*command)[0] == 128 + signal.SIGTERM
    assert last_step(folder) == 3
    assert [line["step"] for line in metrics_of(folder)] == [0, 2]
    assert run(*command)[0] == 0
    assert [line["step"] for line in metrics_of(folder)] == [0, 2, 4, 6]


@pytest.mark.parametrize("harm", ["stopped", "full"])
def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(
    place, run, file_size, monkeypatch, harm
):
    def stop(*args, **options):
        raise KeyboardInterrupt

    folder, few = place / "runs" / f"early-{harm}", flags(max_steps=2)
    with monkeypatch.context() as patch:
        if harm == "stopped":
            patch.setattr("eval.evaluate", stop)
        else:  # there is room for best.pt, and none for last.pt
            file_size((place / "runs" / "tiny" / "best.pt").stat().st_size + 1000)
        status, _, error = run("train.py", TINY, *few, "--out", folder)
        file_size(None)
    assert (status, error) == (130, "") if harm == "stopped" else status == 2 and one_line(error)
    assert "config.toml" in os.listdir(folder) and "last.pt" not in os.listdir(folder)
    status, _, error = run("train.py", folder, "--resume")
    assert status == 2 and "no last.pt to resume from; start the run again" in error
    assert run("train.py", TINY, *few, "--out", folder)[0] == 0
    status, _, error = run("train.py", TINY, *few, "--out", folder)
    assert status == 2 and "contains a run" in error and one_line(error)


def test_a_run_that_began_meanwhile_is_not_replaced(place, run, train, monkeypatch):
    """A run checks its folder before it prepares its data, and again when it has the lock."""
    out = place / "runs" / "meanwhile"

    def other_run(*args, **options):
        monkeypatch.undo()
        monkeypatch.chdir(place)
        shutil.copytree(place / "runs" / "tiny", out)
        return prepare(*args, **options)

    monkeypatch.setattr(prepare_data, "prepare", other_run)
    status, _, error = run("train.py", TINY, "--out", out)
    assert status == 2 and one_line(error) and "contains a run" in error, error
    assert_same_run(place / "runs" / "tiny", out)


def test_a_run_never_reads_what_another_prepared_in_the_same_folder(place, run, monkeypatch):
    other = {"tokenizer": "bytes", "partition": "block:32", "data": "data/both"}
    Prepared = prepared.Prepared

    def prepared_again(folder):  # by another process, just before it is read
        monkeypatch.setattr(prepared, "Prepared", Prepared)
        prepare(TextConfig(**other))
        return Prepared(folder)

    assert run("prepare_data.py", "data/sample.txt", *flags(**other))[0] == 0
    monkeypatch.setattr(prepared, "Prepared", prepared_again)
    status, _, error = run("train.py", TINY, *flags(data="data/both", out="runs/both-data"))
    assert status == 2 and one_line(error), error
    assert "data/both has just been prepared with partition = 'block:32'" in error


def test_a_run_says_which_versions_of_the_code_have_trained_it(train, run, monkeypatch):
    options = {"warmup_steps": 5, "eval_interval": 4, "eval_contexts": 1, "max_steps": 4}
    folder, here = train("versions", **options), code_version()
    assert json.loads((folder / "results.json").read_text())["code"] == here
    for version, expected in ((here, here), ("0" * 12, f"{here}+{'0' * 12}")):
        monkeypatch.setattr("support.run.code_version", version.__str__)
        status, _, error = run("train.py", folder, "--resume", "--max_steps", 8)
        says = "another version of the code until step" in error
        assert status == 0 and says == (version != here)
        assert json.loads((folder / "results.json").read_text())["code"] == expected


def test_a_run_is_not_resumed_for_fewer_steps_than_it_has_made_or_without_its_metrics(train, run):
    folder = train("few", max_steps=2)
    config = (folder / "config.toml").read_text()
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 1)
    assert status == 2 and one_line(error) and "has already run 2 steps; max_steps (1)" in error
    assert (folder / "config.toml").read_text() == config
    status, printed, _ = run("train.py", folder, "--resume")
    assert status == 0 and "from step 2 of 2" in printed
    (folder / "metrics.jsonl").write_text("{}\n")
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 2 and one_line(error) and "metrics.jsonl is shorter" in error
    assert (folder / "metrics.jsonl").read_text() == "{}\n"
    (folder / "metrics.jsonl").unlink()
    (folder / "a.1.tmp").mkdir()  # nothing of a run
    options = flags(max_steps=4, eval_interval=2, log_interval=1)
    status, _, error = run("train.py", folder, "--resume", *options)
    assert status == 0 and "metrics.jsonl was missing: a new one begins here" in error
    assert [line["step"] for line in metrics_of(folder)] == [3, 4, 4]


@pytest.mark.parametrize("other", [False, True])
def test_a_run_whose_folder_was_moved_or_replaced_saves_nothing_there(
    place, run, monkeypatch, other
):
    folder, kept = place / "runs" / f"moved-{other}", place / "runs" / f"kept-{other}"
    isfinite = math.isfinite

    def move(value):  # called for every step
        if not kept.exists() and (folder / "last.pt").exists() and last_step(folder) == 20:
            folder.rename(kept)
            if other:  # another run has the name now
                shutil.copytree(place / "runs" / "tiny", folder)
        return isfinite(value)

    with monkeypatch.context() as patch:
        patch.setattr(math, "isfinite", move)
        status, _, error = run("train.py", TINY, "--out", folder)
    assert status == 2 and one_line(error)
    assert f"{folder} was moved, removed or replaced while this run was using it" in error
    assert last_step(kept) == 20 and folder.exists() == other
    if other:
        assert_same_run(place / "runs" / "tiny", folder)
    assert run("train.py", kept, "--resume")[0] == 0
    assert_same_run(place / "runs" / "tiny", kept)


def test_a_run_is_resumed_only_with_its_own_best_model(train, run):
    options = {"max_steps": 4, "eval_interval": 2, "warmup_steps": 30}
    folder, other = train("mine", **options), train("theirs", **options, seed=2)
    narrow, best = train("narrow", **options, n_embd=16), folder / "best.pt"
    whole = best.read_bytes()
    half = torch.load(best, weights_only=True)
    torch.save({**half, "val_loss": half["val_loss"] + 1}, half_path := folder.parent / "half.pt")
    wrong = (other / "best.pt", narrow / "best.pt", half_path)
    for content in (*(path.read_bytes() for path in wrong), whole[:-100]):
        best.write_bytes(content)
        status, _, error = run("train.py", folder, "--resume", "--max_steps", 6)
        assert status == 2 and one_line(error) and f"{best}" in error, error
        assert "restore the file, or delete it" in error
        assert best.read_bytes() == content
    best.unlink()
    assert run("train.py", folder, "--resume")[0] == 0  # at its end already
    assert torch.load(best, weights_only=True)["step"] == 4
    best.unlink()
    assert run("train.py", folder, "--resume", *flags(max_steps=6))[0] == 0
    assert torch.load(best, weights_only=True)["step"] in (4, 6)
    assert json.loads((folder / "results.json").read_text())["steps"] == 6


def test_ctrl_c_that_reaches_the_compiler_stops_the_run_cleanly(place, run, train, monkeypatch):
    """Ctrl-C reaches the compiler as well, and torch raises an error. Other errors are raised."""
    whole, interrupted = train("uncompiled", max_steps=4, dropout=0.1), [True]

    def call(*args):
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            subprocess.run(["sh", "-c", "kill -INT $$"])
        raise RuntimeError("C++ compile error")

    out = "runs/a compiled run"
    options = flags(max_steps=4, dropout=0.1, compile="true", out=out)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: call)
        patch.setenv("CXX", sys.executable)  # any program that exists
        status, _, error = run("train.py", TINY, *options)
        interrupted.clear()
        with pytest.raises(RuntimeError, match="C.. compile error"):
            run("train.py", out, "--resume")
    assert status == 130 and error.startswith("stopped at step 0; ") and one_line(f"error: {error}")
    assert "python train.py 'runs/a compiled run' --resume" in error
    assert run("train.py", out, "--resume", "--compile", "false")[0] == 0
    assert_same_run(whole, place / out)


def test_without_a_compiler_a_run_says_so(place, run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    command = ["train.py", TINY, *flags(max_steps=1, out="runs/no compiler")]
    status, _, error = run(*command, "--compile", "true")
    assert status == 2 and one_line(error) and "compile is true, and a compiler" in error
    assert not (place / "runs" / "no compiler").exists()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    status, printed, _ = run(*command, "--compile", "auto", "--dtype", "float32")
    assert status == 0 and "not compiled, so slower (a compiler (" in printed


def test_a_compiler_that_fails_is_one_line_and_the_run_continues_without_it(
    place, run, train, monkeypatch
):
    whole, folder = train("no-compiler", max_steps=2), place / "runs" / "failing compiler"

    def fail(model):
        def forward(*args):
            raise torch._dynamo.exc.TorchDynamoException("fatal error: Python.h:\nno such file")

        return forward

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr("support.machine.missing_compiler", lambda device: "")
    options = flags(max_steps=2, compile="true", out=folder)
    status, _, error = run("train.py", TINY, *options)
    assert status == 2 and one_line(error) and "(fatal error: Python.h: no such file)" in error
    assert run(*shlex.split(error.rpartition("continue without it: python ")[2]))[0] == 0
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")]
)
def test_a_run_for_which_memory_is_too_small_says_what_to_change(error, place, run, monkeypatch):
    forward, allowed = GPT.forward, []

    def greedy(model, idx, *more):
        if not allowed or idx.numel() > 3 * 64:
            raise error
        allowed.pop()
        return forward(model, idx, *more)

    monkeypatch.setattr(GPT, "forward", greedy)
    few = flags(max_steps=3, eval_interval=1, block_size=64, out="runs/greedy")
    status, _, message = run(
        "train.py", TINY, *few, *"--batch_size 6 --grad_accum 2 --overwrite".split()
    )
    change = "start over with --batch_size 3 --grad_accum 4 --overwrite"
    assert (
        status == 2 and one_line(message) and "memory at step 1, with 6 contexts of 64" in message
    )
    assert change in message and "1/2 of the memory" in message and "--resume" not in message
    allowed += 8 * [None]
    status, _, message = run("train.py", TINY, *few, *change.split()[3:])
    assert (
        status == 2 and "at step 3" in message and "continue from step 2 with --resume" in message
    )
    assert "--batch_size 1 --grad_accum 12 --overwrite" in message  # 3 has no smaller factor
    allowed += 4 * [None]
    assert run("train.py", "runs/greedy", "--resume")[0] == 0
    status, _, message = run("train.py", TINY, *few, "--batch_size", 1, "--overwrite")
    assert (
        status == 2
        and one_line(message)
        and "start over with --block_size 32 --overwrite" in message
    )


def test_if_memory_is_too_small_for_the_last_score_a_run_says_how_to_repeat_it(run, monkeypatch):
    def greedy(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    few = flags(max_steps=1, eval_interval=1, batch_size=6, out="runs/at the end")
    with monkeypatch.context() as patch:
        patch.setattr("support.run.Run.load_best", greedy)
        status, _, message = run("train.py", TINY, *few)
    command = "python eval.py 'runs/at the end' --batch-size 3"
    assert (
        status == 2 and one_line(message) and "training is done" in message and command in message
    )
    assert run(*shlex.split(command)[1:])[0] == 0


@pytest.mark.parametrize("command", [("eval.py", "runs/tiny"), ("sample.py", "runs/tiny")])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_any_other_script_for_which_memory_is_too_small_says_so(command, error, run, monkeypatch):
    def greedy(*args):
        raise error

    monkeypatch.setattr(GPT, "hidden", greedy)
    status, _, message = run(*command)
    assert (
        status == 2 and one_line(message) and message.startswith("error: out of memory; end other")
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_the_end_of_a_run_says_how_to_continue(place, run, train, monkeypatch, number):
    whole, folder = train(f"ended-{number}", max_steps=2), place / "runs" / f"end-{number}"
    with monkeypatch.context() as patch:
        patch.setattr("report.tables.measures_table", lambda _: os.kill(os.getpid(), number))
        status, _, error = run("train.py", TINY, *flags(max_steps=2, out=folder))
    assert status == 128 + number and error.startswith("stopped at step 2; ")
    assert run("train.py", folder, "--resume")[0] == 0
    assert_same_run(whole, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_evaluation_stops_the_run(place, run, train, monkeypatch, number):
    whole, folder = train(f"last-{number}", max_steps=2), place / "runs" / f"stop-{number}"
    calls = []

    def interrupted(*args, **options):
        calls.append(options)
        if len(calls) == 2:  # the first evaluation is before the first step
            os.kill(os.getpid(), number)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("eval.evaluate", interrupted)
        status, _, error = run("train.py", TINY, *flags(max_steps=2, out=folder))
    assert status == 128 + number and error.startswith("stopped at step 2; ")
    assert not (folder / "results.json").exists()
    assert run("train.py", folder, "--resume")[0] == 0
    assert_same_run(whole, folder)


# --------------------------------------------------------------------------------------------------
# several processes


def test_the_processes_that_the_docs_start_can_share_a_batch():
    lines = (ROOT / "docs" / "RUNNING.md").read_text().replace("\\\n", "").splitlines()
    commands = [line for line in lines if line.startswith("    torchrun") and "configs/" in line]
    assert len(commands) >= 2
    for line in commands:
        world = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", line))
        config = read_config([str(ROOT / re.search(r"configs/\w+\.toml", line)[0])])
        assert config.batch_size % world == 0, line


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_two_processes_train_like_one_and_if_one_dies_the_run_ends_and_can_be_resumed(place, train):
    options = {"max_steps": 30, "grad_accum": 2, "log_interval": 1, "eval_interval": 5}
    alone, folder = train("alone", **options), place / "runs" / "both"
    metrics = folder / "metrics.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "train.py", TINY, *flags(**options, out=folder)]
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and (
        not metrics.exists() or metrics.read_bytes().count(b"\n") < 10
    ):
        time.sleep(0.005)
    before = metrics.read_text().splitlines()
    os.kill(max(children(process.pid)), signal.SIGKILL)
    error = process.communicate(timeout=100)[1]  # the other one must not wait for it for ever
    assert process.returncode and "Signal 9 (SIGKILL)" in error
    assert not (folder / "results.json").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}

    def resumed(rank):  # like torchrun, which would import torch once more
        environment = {**met, "RANK": str(rank)}
        words = ROOT / "train.py", folder, "--resume"
        return started(*words, cwd=place, output=f"rank{rank}", environment=environment)

    with resumed(0) as first, resumed(1) as second:
        for process in (first, second):
            process.join(200)
            assert process.exitcode == 0
    printed = [(place / f"rank{rank}").read_text().count("the best model") for rank in range(2)]
    assert printed == [1, 0]
    one, both = metrics_of(alone), metrics_of(folder)
    assert len(both) == len(one) == 37 and json.loads(before[3]) == both[3]
    for a, b in zip(one, both):
        assert a["step"] == b["step"] and a.get("lr") == b.get("lr")
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:  # rounding grows in time
            near = 1e-5 if a["step"] <= 20 else 1e-3
            assert a[key] == pytest.approx(b[key], abs=near), (key, a["step"])


def test_processes_share_a_batch_without_overlap():
    tokens, config, cpu = (
        np.arange(5000, dtype=np.uint16),
        Config(batch_size=6),
        torch.device("cpu"),
    )
    arguments = (tokens, tokens), 20, config, 7
    whole = random_batch(*arguments, Process(cpu, 0, 1))
    shares = [random_batch(*arguments, Process(cpu, rank, 3)) for rank in range(3)]
    for all_rows, *rows in zip(whole, *shares):
        shared = {tuple(row) for part in rows for row in part.tolist()}
        assert {tuple(row) for row in all_rows.tolist()} == shared
        assert [len(part) for part in rows] == [2, 2, 2]


def test_a_batch_that_cannot_be_shared_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    status, _, error = run("train.py", TINY, "--out", "runs/shared")
    assert status == 2 and one_line(error)
    assert "batch_size (4)" in error and "3 processes" in error


# --------------------------------------------------------------------------------------------------
# harmed, hostile, or of another text


def test_a_checkpoint_without_its_config_is_refused(place, run):
    (place / "runs" / "bare").mkdir()
    state = torch.load(place / "runs" / "tiny" / "best.pt", weights_only=True)
    for change in ({"config": {}}, {"config": None}, {"text": {}}, {"cwd": 3}, {"cwd": "\0"}):
        torch.save({**state, **change}, place / "runs" / "bare" / "best.pt")
        with pytest.raises(InputError, match="best.pt: not a checkpoint of train.py"):
            load(place / "runs" / "bare")
    for script in ("eval.py", "sample.py", "view.py"):
        status, _, error = run(script, "runs/bare")
        assert status == 2 and one_line(error)


CRAFTED = {
    "config": [
        *[("source", value) for value in ([], [1, 2], [["x"]], ("a", "b"), torch.zeros(3))],
        *[("seed", value) for value in (torch.zeros(3), {}, [1])],
        *[("data", "a\0b"), ("schedule", ["quintic"]), ("floor", "high"), ("partition", 5)],
        *[("tokenizer", None), ("max_lookback", -1), ("learning_rate", torch.zeros(3))],
    ],
    "text": [
        *[("background", value) for value in (5, {"a": 1})],
        ("background", {"total": 9, "words": [1, 2], "counts": [1]}),
        ("background", {"total": 9, "words": [2**40], "counts": [1]}),
        ("background", {"total": 9, "words": [-1], "counts": [1]}),
        ("background", {"total": 0, "words": [], "counts": []}),
        *[("files", value) for value in ([1], "abc", ("a",), torch.zeros(3), {}, {"train.bin": 1})],
        ("source_sha256", torch.zeros(3)),
    ],
}


@pytest.mark.parametrize("part", CRAFTED)
def test_a_crafted_checkpoint_is_refused_by_every_script(place, run, part, tmp_path):
    folder = shutil.copytree(place / "runs" / "tiny", tmp_path / "crafted")
    states = {name: torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt")}
    for key, value in CRAFTED[part]:
        for name, state in states.items():
            torch.save({**state, part: {**state[part], key: value}}, folder / name)
        commands = [["eval.py", folder], ["sample.py", folder, "--tokens", 1], ["view.py", folder]]
        for command in (*commands, ["train.py", folder, "--resume", "--max_steps", 61]):
            status, _, error = run(*command)
            assert status == 2 and one_line(error), (key, value, command, error)


MOMENTS = {
    "a number": lambda v: torch.tensor(0.0),
    "one number for all": lambda v: torch.zeros(1).expand(v.shape),
    "other strides": lambda v: v.t().contiguous().t() if v.dim() == 2 else v,
    "missing": lambda v: None,
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_that_an_optimizer_would_not_have_saved_are_refused(place, run, tmp_path, name):
    """The kernel of AdamW trusts their shapes and strides: it would write out of bounds."""
    folder = shutil.copytree(place / "runs" / "tiny", tmp_path / "crafted")
    for key in ("exp_avg", "exp_avg_sq", "step"):
        if key == "step" and name != "missing":
            continue
        state = torch.load(place / "runs" / "tiny" / "last.pt", weights_only=True)
        for moments in state["optimizers"][0]["state"].values():
            moments[key] = MOMENTS[name](moments[key])
            if moments[key] is None:
                del moments[key]
        torch.save(state, folder / "last.pt")
        status, _, error = run("train.py", folder, "--resume", "--max_steps", 61)
        assert status == 2 and one_line(error) and "last.pt" in error, error


def test_a_run_from_a_stranger_writes_through_no_symlink(place, run, tmp_path):
    folder, victim = shutil.copytree(place / "runs" / "tiny", tmp_path / "evil"), tmp_path / "mine"
    victim.write_text("precious")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(victim)
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 61)
    assert status == 2 and one_line(error) and "metrics.jsonl" in error
    assert victim.read_text() == "precious"


def test_a_run_from_a_stranger_downloads_nothing_and_writes_only_under_data(
    place, run, serve, tmp_path, monkeypatch
):
    """Even if it names an address, a folder of someone else's data, or a text on this machine."""
    monkeypatch.setattr("support.sources.CACHE", tmp_path / "cache")
    asked, text = [], (ROOT / "data" / "sample.txt").read_bytes()
    base, _ = serve({"/beacon": lambda handler: asked.append(handler.path)})
    victim, here = tmp_path / "victim", tmp_path / "here"
    for folder in (victim, here):
        folder.mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        (victim / name).write_bytes(b"precious")
    (tmp_path / "book.txt").write_bytes(text)
    monkeypatch.chdir(here)
    evil = shutil.copytree(place / "runs" / "tiny", tmp_path / "evil")
    states = {name: torch.load(evil / name, weights_only=True) for name in ("best.pt", "last.pt")}
    trained = ["train.py", evil, "--resume", "--max_steps", 61]
    commands = [["eval.py", evil], ["sample.py", evil, "--tokens", 1], ["view.py", evil], trained]
    for source, status in ((f"{base}/beacon", 2), (str(tmp_path / "book.txt"), 0)):
        for data in (str(victim), str(tmp_path / "fresh"), "../fresh", ""):
            for name, state in states.items():
                config = {**state["config"], "source": source, "data": data}
                torch.save({**state, "config": config, "cwd": "../here"}, evil / name)
            config = (evil / "config.toml").read_text().splitlines()
            config = [line for line in config if not line.startswith(("source =", "data ="))]
            config += [f"source = {json.dumps(source)}", f"data = {json.dumps(data)}"]
            (evil / "config.toml").write_text("\n".join(config))
            for command in commands[: 4 if data == str(victim) else 1]:
                ended, _, error = run(*command)
                assert ended == (0 if command[0] == "sample.py" else status), error
                assert "Traceback" not in error
            if command is trained and status == 0:  # back to where it was
                shutil.copytree(place / "runs" / "tiny", evil, dirs_exist_ok=True)
    assert not asked and not (tmp_path / "fresh").exists() and not (tmp_path / "cache").exists()
    assert {path.read_bytes() for path in victim.iterdir()} == {b"precious"}
    assert os.listdir(here) == ["data"]


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
        for command in (
            ["eval.py", folder],
            ["sample.py", folder],
            ["view.py", folder],
            ["train.py", folder, "--resume"],
            ["train.py", bomb],
            ["train.py", TINY, "--init_from", bomb, "--out", "runs/x"],
            ["sweep.py", bomb],
            ["train.py", TINY, "--init_from", place / "model.safetensors", "--out", "runs/x"],
            ["train.py", TINY, "--source", bomb, "--out", "runs/x"],
            ["prepare_data.py", bomb],
        ):
            status, _, error = run(*command)
            assert status == 2 and one_line(error), (command, error)
    shutil.copytree(prepared_folder(place), place / "data" / "bombed")
    shutil.copy(bare, place / "data" / "bombed" / "meta.json")
    with pytest.raises(InputError, match="meta.json"):
        read_meta(place / "data" / "bombed")
    assert not executed.exists()


def test_a_run_is_not_measured_on_a_text_that_changed(place, run, train):
    (place / "book.txt").write_text((ROOT / "data" / "sample.txt").read_text())
    folder = train("book", source="book.txt", max_steps=2)
    (place / "book.txt").write_text("Another text. " * 2000)
    for command in (["eval.py", folder], ["train.py", folder, "--resume", "--max_steps", 4]):
        status, _, error = run(*command)
        assert status == 2 and "changed" in error


def test_a_run_is_not_measured_on_other_tokens_or_blocks_than_its_own(
    place, run, train, monkeypatch
):
    data = place / "data" / "own"
    shutil.copy(ROOT / "data" / "sample.txt", place / "own.txt")
    folder = train("own", source="own.txt", data=data, max_steps=2)
    commands = ["eval.py", folder], ["train.py", folder, "--resume", "--max_steps", 4]
    lookback = (data / "test.lookback.bin").read_bytes()
    (data / "test.lookback.bin").write_bytes(lookback[:-2] + b"\0\0")  # as long as it was
    for command in commands:
        status, _, error = run(*command)
        assert status == 2 and one_line(error)
        assert "test.lookback.bin was changed, damaged or replaced" in error
    (data / "test.lookback.bin").write_bytes(lookback)
    other = flags(tokenizer="bytes", partition="block:9", data=data)
    assert run("prepare_data.py", "own.txt", *other)[0] == 0
    # prepared with other parameters since then: it is left as it is
    status, _, error = run(*commands[0])
    assert status == 0 and error.startswith("using data/own.bytes.")
    assert error.endswith(
        "cannot be used: it was prepared with a different partition, max_lookback\n"
    )
    assert read_meta(data)["partition"] == "block:9"

    def other_blocks(tokens, vocabulary, partition, cap, background, out, plain):
        out[:] = 1

    def other_tokens(paths, encoding, out):
        out.write_bytes(b"a\0b\0" * 50000)
        return files.digest(paths)

    for name, code, says in (
        ("partition_text", other_blocks, "the partitioner has changed"),
        ("encode", other_tokens, "the tokenizer has changed"),
    ):
        with monkeypatch.context() as patch:  # another version of the code
            patch.setattr(f"prepare_data.{name}", code)
            for command in commands:
                for path in (place / "data").glob("own*"):
                    shutil.rmtree(path)
                status, _, error = run(*command)
                assert status == 2 and one_line(error) and says in error, error
    shutil.rmtree(next((place / "data").glob("own*")))
    assert run(*commands[0])[0] == 0
    for name in ("best.pt", "last.pt"):
        state = torch.load(folder / name, weights_only=True)
        state["config"]["tokenizer"] = "gpt2:300"
        torch.save(state, folder / name)
    for script in ("eval.py", "sample.py", "view.py"):
        status, _, error = run(script, folder)
        assert status == 2 and "the model has 256 tokens, its tokenizer 300" in error


def test_a_run_whose_text_is_gone_is_measured_and_resumed_on_what_was_prepared(place, run, train):
    same = {"warmup_steps": 30, "eval_interval": 2}  # the same steps, whatever max_steps is
    whole = train("present", max_steps=4, **same)
    shutil.copy(ROOT / "data" / "sample.txt", place / "lent.txt")
    folder = train("absent", source="lent.txt", max_steps=2, **same)
    before = run("eval.py", folder)
    (place / "lent.txt").unlink()
    status, printed, error = run("eval.py", folder)
    assert (status, printed) == (0, before[1]) and error.count("\n") == 1
    assert "lent.txt: no such file" in error and "could not be compared with the text" in error
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 0 and error.count("could not be compared with the text") == 1
    assert_same_run(whole, folder)
    (data,) = (place / "data").glob("lent.*")
    (data / "val.bin").write_bytes(b"\0\0" + (data / "val.bin").read_bytes()[2:])
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 5)
    assert status == 2 and "val.bin was changed, damaged or replaced" in error


def test_a_run_that_began_from_weights_continues_without_them(place, run, train):
    same = {"warmup_steps": 30, "eval_interval": 2}
    whole = train("from-weights", init_from="runs/tiny", max_steps=4, **same)
    shutil.copytree(place / "runs" / "tiny", place / "lent")
    folder = train("lent-weights", init_from="lent", max_steps=2, **same)
    shutil.rmtree(place / "lent")
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 0, error
    assert_same_run(whole, folder)


@pytest.mark.parametrize("data", ["", "own/data"])
def test_the_paths_of_a_run_start_where_it_was_started(run, train, tmp_path, monkeypatch, data):
    home, away, moved = tmp_path / "home", tmp_path / "away", tmp_path / "mo\u00a0ved\u3000 'x"
    for folder in (home, away):
        folder.mkdir()
    shutil.copy(ROOT / "data" / "sample.txt", home / "book.txt")
    monkeypatch.chdir(home)
    options = flags(source="book.txt", max_steps=2, out="runs/book", data=data)
    assert run("train.py", TINY, *options)[0] == 0

    def evaluated(path):
        status, printed, error = run("eval.py", path)
        assert (status, error) == (0, ""), error
        return printed.split("\n", 1)[1]

    at_home = evaluated("runs/book")
    monkeypatch.chdir(away)
    assert evaluated(home / "runs" / "book") == at_home
    assert run("train.py", home / "runs" / "book", "--resume", "--max_steps", 3)[0] == 0
    resumed = evaluated(home / "runs" / "book")
    assert os.listdir(away) == []
    home.rename(moved)  # with everything in it
    assert evaluated(moved / "runs" / "book") == resumed
    shutil.copytree(moved / "runs" / "book", away / "copy")
    monkeypatch.chdir(moved)  # only the run was copied; it is measured near its text
    assert evaluated(away / "copy") == resumed
    options[options.index("runs/book")] = "../new"
    assert run("train.py", TINY, *options)[0] == 0
    assert evaluated(tmp_path / "new") == at_home
    (away.parent / "book.txt").write_text("Another text of this name. " * 2000)
    assert evaluated(away / "copy") == resumed


def test_a_run_is_not_measured_on_what_was_prepared_of_another_text(place, run, train):
    text, same = place / "one.txt", {"source": "one.txt", "data": "data/shared", "max_steps": 1}
    text.write_bytes((ROOT / "data" / "sample.txt").read_bytes())
    folder = train("first-text", **same)
    text.write_bytes((ROOT / "data" / "sample.txt").read_bytes()[:40000])
    train("second-text", **same)
    text.unlink()
    for command in (["eval.py", folder], ["train.py", folder, "--resume", "--max_steps", 2]):
        status, _, error = run(*command)
        assert status == 2 and one_line(error) and "one.txt: no such file" in error, error
