"""docs/LESSON.md says what one should see; here each of its changes is made on a copy, and seen."""

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
    """Make the changes of an exercise, as the lesson prints them."""
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A copy of the code with a finished run of configs/tiny.toml."""
    folder = tmp_path_factory.mktemp("lesson") / "code"
    folder.mkdir()
    for name in ("configs", "data", "docs", "support", "tests"):
        kept = shutil.ignore_patterns("__pycache__", "*.bin", "meta.json")
        shutil.copytree(ROOT / name, folder / name, ignore=kept)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    done = run("python train.py configs/tiny.toml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "code"))


def test_exercise_1_the_dial_turns_and_fidelity_never_falls_below_it(trained):
    found = []
    for number, command in enumerate(commands(1)):
        assert run(f"{command} --json {number}.json", trained).returncode == 0
        found.append(json.loads((trained / f"{number}.json").read_text()))
    own, local, half = found
    for results in found:
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
    promised = re.search(r"`(dial by layer: [\d., ]+)`", EXERCISES[2])[1]
    assert done.returncode == 0 and promised in done.stdout, done.stderr
    assert "made again" not in done.stdout
    done = run("python train.py configs/tiny.toml --schedule septic --out runs/x", copy)
    assert done.returncode == 2 and "sextic" in done.stderr and done.stderr.count("\n") == 1


def test_exercises_3_and_4_a_partitioner_passes_and_one_that_looks_ahead_is_caught(copy):
    apply(3, copy)
    test, measure = commands(3)
    done = run(test, copy)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
    done = run(measure, copy)
    assert done.returncode == 0 and "line blocks" in done.stdout, done.stderr
    apply(4, copy)
    (test,) = commands(4)
    done = run(test, copy)
    assert done.returncode == 1 and " failed" in done.stdout
    assert re.search(r"`(test_\w+)`", EXERCISES[4])[1] in done.stdout


def test_exercise_5_a_penalty_breaks_the_certified_floor(copy):
    (test,) = commands(5)
    assert run(test, copy).returncode == 0
    apply(5, copy)
    done = run(test, copy)
    assert done.returncode == 1
    for name in re.findall(r"`(test_\w+)[`.]", EXERCISES[5]):
        assert f"FAILED tests/test_model.py::{name}" in done.stdout, done.stdout
