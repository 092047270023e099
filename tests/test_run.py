"""A run that was stopped, killed, shared, harmed or is old goes on, or says why not."""

import contextlib
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
from eval import load_run
from forks import children, started
from model import GPT
from prepare_data import read_meta
from support.files import InputError
from train import Config, random_batch, read_config


def endings(run):
    """What a finished run is, to the bit: weights, and metrics without their timings."""
    state = torch.load(run / "last.pt", weights_only=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return state["model"], [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in metrics]


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


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# killed, stopped, out of space


@pytest.mark.parametrize("n_threads, optimizer", [(1, "muon"), (2, "adamw")])
def test_killed_at_random_and_resumed_it_ends_at_the_same_bits(
    place, run, train, n_threads, optimizer, threads
):
    """KILLS=50 kills it 50 times in place of 3."""
    threads(n_threads)
    options = {"max_steps": 60, "eval_interval": 10, "log_interval": 2, "dropout": 0.1}
    whole = train(f"whole{n_threads}", **options, optimizer=optimizer)
    folder, killed = place / "runs" / f"killed{n_threads}", 0
    options = flags(**options, optimizer=optimizer, out=folder)
    rng = random.Random(5)
    kills = rng.choices(range(2, 35), k=int(os.environ.get("KILLS", 3)))
    for lines in sorted(kills):  # so many lines of metrics
        command = [folder, "--resume"] if killed else [TINY, *options]
        with started(ROOT / "train.py", *command, cwd=place, n_threads=n_threads) as process:
            while process.is_alive() and count_lines(folder) < lines:
                time.sleep(0.002)
            time.sleep(rng.random() / 50)
            killed += process.is_alive()
    assert killed and run("train.py", folder, "--resume")[0] == 0
    assert_same_run(whole, folder)
    samples = [run("sample.py", name, "--tokens", 40)[:2] for name in (whole, folder)]
    assert samples[0] == samples[1] and samples[0][0] == 0


def count_lines(folder):
    """Lines of metrics; none as long as there is nothing to resume from."""
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


def test_killed_while_it_saves_the_checkpoint_of_before_is_whole(place, run):
    folder, script = place / "runs" / "unsaved", place / "dies.py"
    script.write_text(DIES_SAVING)
    with started(script, TINY, "--out", folder, cwd=place) as process:
        process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(list(folder.glob("last.pt.*.tmp"))) == 1
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 20
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
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
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
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    # the lock died with the process
    assert run("train.py", folder, "--resume", "--max_steps", step + 1)[0] == 0


def test_a_resume_without_its_metrics_is_refused(train, run):
    folder = train("unmetred", max_steps=2)
    (folder / "metrics.jsonl").write_text("{}\n")
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 2 and "metrics.jsonl is shorter" in error
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


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
                continue  # it has not begun, or just ended
            # whole lines, whenever one looks
            steps = [json.loads(line)["step"] for line in metrics.splitlines()]
            assert not metrics or metrics.endswith("\n")
            seen.append((steps[-1] if steps else 0, resident, handles))
    assert process.exitcode == 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(5, 2001, 5))
    assert [m["step"] for m in metrics if "val_loss" in m] == list(range(0, 2001, 100))
    spans = (300, 700), (1600, 2000)
    early, late = ([(rss, n) for step, rss, n in seen if a <= step < b] for a, b in spans)
    assert len(early) > 2 and len(late) > 2
    assert max(rss for rss, _ in late) < 1.05 * max(rss for rss, _ in early)
    # one more: a file that is just being saved
    assert max(n for _, n in late) <= max(n for _, n in early) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_cleanly_and_the_rest_follows(place, run, number):
    out = f"runs/long-{number}"
    folder = place / out
    options = flags(max_steps=3000, out=out)
    with started(ROOT / "train.py", TINY, *options, cwd=place) as process:
        while not (folder / "last.pt").exists() and process.is_alive():
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.join(60)
    assert process.exitcode == 128 + number
    assert f"python train.py {out} --resume" in (place / "output.txt").read_text()
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    status, printed, _ = run("train.py", folder, "--resume", "--max_steps", step + 4)
    assert status == 0 and f"from step {step}" in printed
    assert json.loads((folder / "results.json").read_text())["steps"] == step + 4
    status, _, error = run("train.py", folder, "--resume", "--fidelity", 0.5)
    assert status == 2 and "fidelity was 1.0, is 0.5" in error
    assert run("train.py", "runs/none", "--resume")[0] == 2


def test_a_resumed_run_that_is_stopped_at_once_leaves_whole_metrics(train, run, monkeypatch):
    folder = train("stopped", eval_interval=2, eval_contexts=1, log_interval=100, max_steps=2)
    metrics = folder / "metrics.jsonl"
    # as a run does that is killed while it writes, after its last checkpoint
    with metrics.open("a") as f:
        f.write('{"step": 4, "val_loss": 3.0}\n' * 20 + '{"step": 6, "val')
    clip = torch.nn.utils.clip_grads_with_norm_

    def stop_and_clip(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    command = "train.py", folder, "--resume", "--max_steps", 6
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grads_with_norm_", stop_and_clip)
        assert run(*command)[0] == 128 + signal.SIGTERM
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    assert [json.loads(line)["step"] for line in metrics.open()] == [0, 2]
    assert run(*command)[0] == 0
    assert [json.loads(line)["step"] for line in metrics.open()] == [0, 2, 4, 6]


@pytest.mark.parametrize("harm", ["stopped", "full"])
def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(
    place, run, file_size, monkeypatch, harm
):
    def stop(*args, **how):
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
    assert status == 2 and "no last.pt to go on from; start the run anew" in error
    assert run("train.py", TINY, *few, "--out", folder)[0] == 0
    status, _, error = run("train.py", TINY, *few, "--out", folder)
    assert status == 2 and "holds a run" in error and one_line(error)


def test_a_run_that_began_meanwhile_is_not_replaced(place, run, train, monkeypatch):
    """The second looks before it prepares its data, and again when it has the folder's lock."""
    out, prepared = place / "runs" / "meanwhile", prepare_data.prepared

    def other_run(*args, **how):
        monkeypatch.undo()
        monkeypatch.chdir(place)
        shutil.copytree(place / "runs" / "tiny", out)
        return prepared(*args, **how)

    monkeypatch.setattr(prepare_data, "prepared", other_run)
    status, _, error = run("train.py", TINY, "--out", out)
    assert status == 2 and one_line(error) and "holds a run" in error, error
    assert_same_run(place / "runs" / "tiny", out)


def test_a_run_never_reads_what_another_prepared_in_the_same_folder(place, run, monkeypatch):
    other = flags(tokenizer="bytes", partition="block:32", out="data/both")
    prepared = prepare_data.prepared

    def prepared_twice(*args):
        folder = prepared(*args)
        prepare_data.prepare("data/sample.txt", "data/both", "bytes", "block:32", 128)
        return folder

    assert run("prepare_data.py", "data/sample.txt", *other)[0] == 0
    monkeypatch.setattr(prepare_data, "prepared", prepared_twice)
    status, _, error = run("train.py", TINY, *flags(data="data/both", out="runs/both-data"))
    assert status == 2 and one_line(error), error
    assert "data/both has just been prepared with partition = 'block:32'" in error


def test_overwrite_overwrites_a_run_alone(place, run):
    (place / "settings").mkdir()
    (place / "settings" / "my.toml").write_text("seed = 2")
    status, _, error = run("train.py", TINY, "--out", "settings", "--overwrite")
    assert status == 2 and one_line(error) and "settings is not empty and holds no run" in error
    assert os.listdir(place / "settings") == ["my.toml"]


def test_a_run_is_not_resumed_for_fewer_steps_than_it_has_made(train, run):
    folder = train("few", max_steps=2)
    config = (folder / "config.toml").read_text()
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 1)
    assert status == 2 and one_line(error) and "has made 2 steps already; max_steps (1)" in error
    assert (folder / "config.toml").read_text() == config
    status, printed, _ = run("train.py", folder, "--resume")
    assert status == 0 and "from step 2 of 2" in printed


def test_ctrl_c_that_reaches_the_compiler_stops_the_run_cleanly(place, run, train, monkeypatch):
    """Ctrl-C goes to the compiler as well; torch makes an error of that."""
    whole = train("uncompiled", max_steps=4, dropout=0.1)

    def compile(model):
        def call(*args):
            os.kill(os.getpid(), signal.SIGINT)
            subprocess.run(["sh", "-c", "kill -INT $$"])
            raise RuntimeError("C++ compile error")

        return call

    out = "runs/a compiled run"
    options = flags(max_steps=4, dropout=0.1, compile="true", out=out)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        patch.setenv("CXX", sys.executable)  # any program that is there
        status, _, error = run("train.py", TINY, *options)
    how = "go on with: python train.py 'runs/a compiled run' --resume"
    assert status == 130 and error == f"stopped at step 0; {how}\n"
    assert run("train.py", out, "--resume", "--compile", "false")[0] == 0
    assert_same_run(whole, place / out)


def test_without_ctrl_c_an_error_of_the_compiler_is_an_error(run, monkeypatch):
    def call(*args):
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(torch, "compile", lambda model: call)
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(RuntimeError, match="C.. compile error"):
        run("train.py", TINY, *flags(max_steps=2, compile="true", out="runs/uncompilable"))


def test_without_a_compiler_a_run_says_so(place, run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    command = ["train.py", TINY, *flags(max_steps=1, out="runs/no compiler")]
    status, _, error = run(*command, "--compile", "true")
    assert status == 2 and one_line(error) and "compile is true, and a compiler" in error
    assert not (place / "runs" / "no compiler").exists()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    status, printed, _ = run(*command, "--compile", "auto", "--dtype", "float32")
    assert status == 0 and "not compiled, so slower (a compiler (" in printed


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
    status, _, told = run(
        "train.py", TINY, *few, *"--batch_size 6 --grad_accum 2 --overwrite".split()
    )
    change = "start anew with --batch_size 3 --grad_accum 4 --overwrite"
    assert status == 2 and one_line(told) and "memory at step 1, with 6 contexts of 64" in told
    assert change in told and "1/2 of the memory" in told and "--resume" not in told
    allowed += 8 * [None]
    status, _, told = run("train.py", TINY, *few, *change.split()[3:])
    assert status == 2 and "at step 3" in told and "go on from step 2 with --resume" in told
    assert "--batch_size 1 --grad_accum 12 --overwrite" in told  # 3 has no smaller factor
    allowed += 4 * [None]
    assert run("train.py", "runs/greedy", "--resume")[0] == 0
    status, _, told = run("train.py", TINY, *few, "--batch_size", 1, "--overwrite")
    assert status == 2 and one_line(told) and "start anew with --block_size 32 --overwrite" in told


def test_or_if_only_the_last_score_is_too_much_how_to_go_on(run, monkeypatch):
    def greedy(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    few = flags(max_steps=1, eval_interval=1, batch_size=6, out="runs/at the end")
    with monkeypatch.context() as patch:
        patch.setattr("support.run.Run.load_best", greedy)
        status, _, told = run("train.py", TINY, *few)
    how = "python eval.py 'runs/at the end' --batch-size 3"
    assert status == 2 and one_line(told) and "training is done" in told and how in told
    assert run(*shlex.split(how)[1:])[0] == 0


@pytest.mark.parametrize("command", [("eval.py", "runs/tiny"), ("sample.py", "runs/tiny")])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_any_other_script_says_so_too(command, error, run, monkeypatch):
    def greedy(*args):
        raise error

    monkeypatch.setattr(GPT, "hidden", greedy)
    status, _, told = run(*command)
    assert status == 2 and one_line(told) and "error: out of memory; end what" in told


def test_ctrl_c_at_the_end_of_a_run_says_how_to_go_on(place, run, train, monkeypatch):
    whole = train("ended", max_steps=2)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("eval.table", stop)
        status, _, error = run("train.py", TINY, *flags(max_steps=2, out="runs/end"))
    assert status == 130 and error.startswith("stopped at step 2; go on with: python train.py")
    assert run("train.py", "runs/end", "--resume")[0] == 0
    assert_same_run(whole, place / "runs" / "end")


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
def test_two_processes_train_what_one_does_and_when_one_dies_the_run_ends_and_can_go_on(
    place, train
):
    options = {"max_steps": 30, "grad_accum": 2, "log_interval": 1, "eval_interval": 5}
    alone, folder = train("alone", **options), place / "runs" / "both"
    metrics = folder / "metrics.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "train.py", TINY, *flags(**options, out=folder)]
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=place, **how)
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
    with contextlib.ExitStack() as stack:  # as torchrun does, which would import torch once more
        ranks = []
        for rank in range(2):
            how = {"output": f"rank{rank}", "environment": {**met, "RANK": str(rank)}}
            process = started(ROOT / "train.py", folder, "--resume", cwd=place, **how)
            ranks.append(stack.enter_context(process))
        for process in ranks:
            process.join(200)
        assert [process.exitcode for process in ranks] == [0, 0]
    printed = [(place / f"rank{rank}").read_text().count("the best model") for rank in range(2)]
    assert printed == [1, 0]
    files = (name / "metrics.jsonl" for name in (alone, folder))
    one, both = ([json.loads(line) for line in path.open()] for path in files)
    assert len(both) == len(one) == 37 and json.loads(before[3]) == both[3]
    for a, b in zip(one, both):
        assert a["step"] == b["step"] and a.get("lr") == b.get("lr")
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:  # rounding grows in time
            near = 1e-5 if a["step"] <= 20 else 1e-3
            assert a[key] == pytest.approx(b[key], abs=near), (key, a["step"])


def test_processes_share_a_batch_without_overlap():
    tokens, config, cpu = np.arange(5000, dtype=np.uint16), Config(batch_size=6), "cpu"
    how = tokens, tokens, 20, config, 7, torch.device(cpu)
    whole = random_batch(*how)
    shares = [random_batch(*how, rank, 3) for rank in range(3)]
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
    for config in ({}, [], None):
        torch.save({**state, "config": config}, place / "runs" / "bare" / "best.pt")
        with pytest.raises(InputError, match="best.pt"):
            load_run(place / "runs" / "bare")
    for script in ("eval.py", "sample.py", "read.py"):
        status, _, error = run(script, "runs/bare")
        assert status == 2 and one_line(error)


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
            ["read.py", folder],
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
    folder = train("own", data=data, max_steps=2)
    commands = ["eval.py", folder], ["train.py", folder, "--resume", "--max_steps", 4]
    lookback = (data / "test.lookback.bin").read_bytes()
    (data / "test.lookback.bin").write_bytes(lookback[:-2] + b"\0\0")  # as long as it was
    for command in commands:
        status, _, error = run(*command)
        assert status == 2 and one_line(error)
        assert "test.lookback.bin is not what was prepared" in error
    (data / "test.lookback.bin").write_bytes(lookback)
    other = flags(tokenizer="bytes", partition="block:9", out=data)
    assert run("prepare_data.py", "data/sample.txt", *other)[0] == 0
    # prepared with other parameters since then: made again, and said
    status, printed, _ = run(*commands[0])
    assert status == 0
    assert "own is made again: it was made with another source_sha256" not in printed
    assert "own is made again: it was made with another partition, max_lookback" in printed

    def other_blocks(tokens, *args, out):
        out[:] = 1

    def other_tokens(files, encoding, path):
        path.write_bytes(b"a\0b\0" * 50000)

    for name, code, says in (
        ("partition", other_blocks, "other blocks: the partitioner"),
        ("encode", other_tokens, "other tokens: the tokenizer"),
    ):
        with monkeypatch.context() as patch:  # another version of the code
            patch.setattr(f"prepare_data.{name}", code)
            shutil.rmtree(data)
            for command in commands:
                status, _, error = run(*command)
                assert status == 2 and one_line(error) and says in error, error
    shutil.rmtree(data)
    assert run(*commands[0])[0] == 0
    for name in ("best.pt", "last.pt"):
        change(folder / name, tokenizer="gpt2:300")
    for script in ("eval.py", "sample.py", "read.py"):
        status, _, error = run(script, folder)
        assert status == 2 and "a model of 256 tokens that names a tokenizer of 300" in error


def test_a_run_whose_text_is_gone_is_measured_and_resumed_on_what_was_prepared(place, run, train):
    how = {"warmup_steps": 30, "eval_interval": 2}  # the same steps, whatever max_steps
    whole = train("present", max_steps=4, **how)
    shutil.copy(ROOT / "data" / "sample.txt", place / "lent.txt")
    folder = train("absent", source="lent.txt", max_steps=2, **how)
    before = run("eval.py", folder)
    (place / "lent.txt").unlink()
    status, printed, error = run("eval.py", folder)
    assert (status, printed) == (0, before[1]) and error.count("\n") == 1
    assert "lent.txt: no such file" in error and "not compared with the text" in error
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 0 and error.count("not compared with the text") == 1
    assert_same_run(whole, folder)
    (data,) = (place / "data").glob("lent.*")
    (data / "val.bin").write_bytes(b"\0\0" + (data / "val.bin").read_bytes()[2:])
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 5)
    assert status == 2 and "val.bin is not what was prepared" in error


def test_a_run_that_began_from_weights_goes_on_without_them(place, run, train):
    how = {"warmup_steps": 30, "eval_interval": 2}
    whole = train("from-weights", init_from="runs/tiny", max_steps=4, **how)
    shutil.copytree(place / "runs" / "tiny", place / "lent")
    folder = train("lent-weights", init_from="lent", max_steps=2, **how)
    shutil.rmtree(place / "lent")
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 0, error
    assert_same_run(whole, folder)


@pytest.mark.parametrize("data", ["", "own/data"])
def test_the_paths_of_a_run_go_out_from_where_it_was_started(
    run, train, tmp_path, monkeypatch, data
):
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home, away):
        folder.mkdir()
    shutil.copy(ROOT / "data" / "sample.txt", home / "book.txt")
    monkeypatch.chdir(home)
    how = flags(source="book.txt", max_steps=2, **({"data": data} if data else {}))
    assert run("train.py", TINY, *how, "--out", "runs/book")[0] == 0
    _, told, _ = run("eval.py", "runs/book")
    told = told.split("\n", 1)[1]

    def evaluated(path):
        status, printed, error = run("eval.py", path)
        assert (status, error) == (0, ""), error
        return printed.split("\n", 1)[1]

    monkeypatch.chdir(away)
    assert evaluated(home / "runs" / "book") == told
    assert run("train.py", home / "runs" / "book", "--resume", "--max_steps", 3)[0] == 0
    _, resumed, _ = run("eval.py", home / "runs" / "book")
    assert os.listdir(away) == []
    home.rename(tmp_path / "moved")  # all of it
    assert evaluated(tmp_path / "moved" / "runs" / "book") == resumed.split("\n", 1)[1]
    shutil.copytree(tmp_path / "moved" / "runs" / "book", away / "copy")
    monkeypatch.chdir(tmp_path / "moved")  # a copy of the run alone, measured where its text is
    assert evaluated(away / "copy") == resumed.split("\n", 1)[1]
    (away.parent / "book.txt").write_text("Another text of this name. " * 2000)
    assert evaluated(away / "copy") == resumed.split("\n", 1)[1]


def test_a_run_may_be_in_a_folder_of_any_name(place, run):
    odd = place / "pro\u00a0ject\u3000 'x"
    (odd / "here").mkdir(parents=True)
    (odd / "here" / "book.txt").write_bytes((ROOT / "data" / "sample.txt").read_bytes())
    os.chdir(odd / "here")
    how = flags(source="book.txt", max_steps=2, out="../out")
    assert run("train.py", TINY, *how)[0] == 0
    os.chdir(place)
    assert run("eval.py", odd / "out")[0] == 0


def test_a_run_is_not_measured_on_what_was_prepared_of_another_text(place, run, train):
    text, how = place / "one.txt", {"source": "one.txt", "data": "data/shared", "max_steps": 1}
    text.write_bytes((ROOT / "data" / "sample.txt").read_bytes())
    folder = train("first-text", **how)
    text.write_bytes((ROOT / "data" / "sample.txt").read_bytes()[:40000])
    train("second-text", **how)
    text.unlink()
    for name in ("best.pt", "last.pt"):  # as an earlier version wrote it
        change(folder / name, files=None, cwd=None)
    for command in (["eval.py", folder], ["train.py", folder, "--resume", "--max_steps", 2]):
        status, _, error = run(*command)
        assert status == 2 and "has changed since this run was trained" in error, error


# --------------------------------------------------------------------------------------------------
# of an earlier version


def change(path, model=None, **config):
    """Save a checkpoint again, with other values in the config of the run and of the model.

    None: without that key.
    """
    state = torch.load(path, weights_only=True)
    for key, values in (("config", config), ("model_config", model or {})):
        state[key] = {k: v for k, v in {**state[key], **values}.items() if v is not None}
    torch.save(state, path)


def test_runs_and_folders_of_an_earlier_version_are_read(place, run, train):
    data = place / "data" / "early"
    folder = train("early", data=data, max_steps=2)
    meta = read_meta(data)
    old = {key: value for key, value in meta.items() if key not in ("files", "sha256")}
    (data / "meta.json").write_text(json.dumps(old))
    for name in ("best.pt", "last.pt"):
        change(folder / name, files=None)
    status, printed, _ = run("eval.py", folder)
    assert status == 0 and printed.count("is made again") == 1 and read_meta(data) == meta
    told = run("sample.py", folder, "--tokens", 30)
    # of a version earlier still, which left it in meta.json alone
    change(folder / "best.pt", background=None)
    assert told == run("sample.py", folder, "--tokens", 30) and told[0] == 0
    assert run("train.py", folder, "--resume", "--max_steps", 4)[0] == 0


def old_run(folder, **retired):
    """Make a run one of commit 2c59031, which had two keys more; `retired` gives their values.

    And it had one less, `joined`.
    """
    retired = {"min_lookback": 0, "dial": "blend", **retired}
    for name in ("best.pt", "last.pt"):
        change(folder / name, retired, joined=None, **retired)
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in retired.items())
    config = (folder / "config.toml").read_text()
    assert config.count("joined = false\n") == 1
    (folder / "config.toml").write_text(config.replace("joined = false\n", "") + lines)


def test_a_run_with_retired_keys_at_their_defaults_is_the_same_run(train, run):
    new, old = train("new", max_steps=2), train("old", max_steps=2)
    old_run(old)
    results, texts = [], []
    for folder in (new, old):
        assert run("eval.py", folder, "--json", "r.json")[2] == ""
        results.append(json.loads(Path("r.json").read_text()))
        texts.append(run("sample.py", folder, "--tokens", 30))
        status, printed, error = run("train.py", folder, "--resume", "--max_steps", 4)
        assert (status, error) == (0, "") and "from step 2" in printed
    keys = "loss", "perplexity", "accuracy", "layers", "by_position"
    assert [results[0][key] for key in keys] == [results[1][key] for key in keys]
    assert texts[0] == texts[1] and texts[0][0] == 0
    assert_same_run(new, old)
    assert not {"min_lookback", "dial"} & load_run(old)[1].keys()
    assert "dial" not in (old / "config.toml").read_text()


@pytest.mark.parametrize("retired", [{"dial": "penalty"}, {"min_lookback": 16}])
def test_a_run_that_used_a_retired_key_is_read_with_a_warning_and_not_resumed(train, run, retired):
    ((key, value),) = retired.items()
    folder = train(f"retired-{key}", max_steps=2)
    old_run(folder, **retired)
    for command in (["eval.py", folder], ["sample.py", folder, "--tokens", 9]):
        status, printed, error = run(*command)
        assert status == 0 and printed and error.count("\n") == 1
        assert f"{folder / 'best.pt'}: this version has no {key} = {value!r}" in error
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 2 and error.startswith(f"error: {key} has left") and one_line(error), error
    toml = (folder / "config.toml").read_text().splitlines(keepends=True)
    kept = [line for line in toml if not line.startswith(key)]  # by hand
    (folder / "config.toml").write_text("".join(kept))
    status, _, error = run("train.py", folder, "--resume", "--max_steps", 4)
    assert status == 2 and f"{key} was {value!r}" in error and one_line(error), error
