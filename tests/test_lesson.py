"""docs/LESSON.md says what a reader should see; here its changes are made on a copy, and seen."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = (ROOT / "docs" / "LESSON.md").read_text()
EXERCISES = {
    int(number): text for number, text in re.findall(r"## (\d)\. (.*?)(?=\n## |\Z)", LESSON, re.S)
}


def blocks(number, kind):
    return re.findall(rf"```{kind}\n(.*?)```", EXERCISES[number], re.S)


def apply(number, folder):
    """Make the changes of an exercise, exactly as the lesson prints them."""
    for change in blocks(number, "diff"):
        done = subprocess.run(
            ["git", "apply", "-"], cwd=folder, input=change, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr


def commands(number):
    lines = [line for text in blocks(number, "sh") for line in text.splitlines()]
    assert lines
    return lines


def run(command, folder):
    """A command of the lesson, on the copy, with this Python; the tiny run is its trained run."""
    words = re.findall(r'"[^"]*"|\S+', command.replace("runs/quickstart", "runs/tiny"))
    assert words[0] == "python"
    words = [sys.executable, *(word.strip('"') for word in words[1:])]
    return subprocess.run(words, cwd=folder, text=True, capture_output=True, timeout=240)


def measure(command, folder):
    """The results of an eval.py command."""
    done = run(f"{command} --json results.json", folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A copy of the code with a finished run of configs/tiny.toml."""
    folder = tmp_path_factory.mktemp("lesson") / "code"
    folder.mkdir()
    for name in ("configs", "data", "docs", "fast", "report", "support", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.bin", "meta.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    done = run("python train.py configs/tiny.toml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "code"))


def test_exercise_1_the_dial_turns_and_fidelity_never_falls_below_it(trained):
    own, local, half = (measure(command, trained) for command in commands(1))
    for results in (own, local, half):
        for layer in results["layers"]:
            assert layer["fidelity"] >= layer["locality"] - 1e-6
    assert [layer["fidelity"] for layer in local["layers"]] == pytest.approx([1, 1])
    assert [layer["locality"] for layer in half["layers"]] == [0.5, 0.5]
    assert local["layers"][0]["entropy"] < own["layers"][0]["entropy"]
    assert local["perplexity"] == pytest.approx(own["perplexity"], rel=0.1)


def test_exercise_2_a_schedule_is_one_line_and_rebuilds_no_data(copy):
    apply(2, copy)
    (command,) = commands(2)
    done = run(f"{command} --max_steps 2 --eval_contexts 1", copy)
    promised = re.search(r"`(locality by layer: [\d., ]+)`", EXERCISES[2])[1]
    assert done.returncode == 0 and promised in done.stdout, done.stderr
    assert "rebuilding" not in done.stdout
    done = run("python train.py configs/tiny.toml --schedule septic --out runs/x", copy)
    assert done.returncode == 2 and "sextic" in done.stderr and done.stderr.count("\n") == 1


def test_exercises_3_and_4_a_partition_passes_and_one_that_looks_ahead_is_caught(copy):
    apply(3, copy)
    test, evaluation = commands(3)
    done = run(test, copy)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
    done = run(evaluation, copy)
    assert done.returncode == 0 and "line blocks" in done.stdout, done.stderr
    assert "rebuilding" in done.stdout
    apply(4, copy)
    preparation, test = commands(4)
    done = run(preparation, copy)
    (promised,) = re.findall(r"`(changes with [^`]+)`", EXERCISES[4])
    assert done.returncode == 2 and promised in done.stderr and done.stderr.count("\n") == 1
    done = run(test, copy)
    assert done.returncode == 1 and " failed" in done.stdout
    assert re.search(r"`(test_\w+)`", EXERCISES[4])[1] in done.stdout


def test_exercise_5_a_penalty_breaks_the_certified_floor(copy):
    evaluation, test = commands(5)
    before = measure(evaluation, copy)
    apply(5, copy)
    after = measure(evaluation, copy)
    for kept, broken in zip(before["layers"], after["layers"]):
        assert kept["fidelity"] > kept["locality"] == 0.5 > 2 * broken["fidelity"]
    fast = measure(evaluation.replace(" --plain", ""), copy)
    # without --plain, the model computes as before and only the measuring changes
    assert fast["loss"] == pytest.approx(before["loss"], rel=1e-5) != after["loss"]
    done = run(test, copy)
    assert done.returncode == 1
    for name in re.findall(r"`(test_\w+)`", EXERCISES[5]):
        assert f"::{name}" in done.stdout, done.stdout
