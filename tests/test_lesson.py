"""The lesson keeps its word: on a copy of the code, every check fails until its exercise is solved,
and the commands print what docs/LESSON.md promises."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = (ROOT / "docs" / "LESSON.md").read_text()
TEACHING = (ROOT / "docs" / "TEACHING.md").read_text()
EXERCISES = dict(enumerate(re.findall(r"## \d\. (.*?)(?=\n## |\Z)", LESSON, re.S), 1))
TASKS = {number: text.partition("<details>")[0] for number, text in EXERCISES.items()}
SOLUTIONS = {number: text.partition("<details>")[2] for number, text in EXERCISES.items()}


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


def commands(number):
    return [line for text in blocks(TASKS[number], "sh") for line in text.splitlines()]


def append(path, code):
    path.write_text(f"{path.read_text()}\n\n{code}")


def solve(number, folder, old="", new=""):
    """Paste the solution of an exercise into a copy of the code, with `old` replaced by `new`."""
    solution = SOLUTIONS[number]
    assert old in solution
    solution = solution.replace(old, new) if old else solution
    for change in blocks(solution, "diff"):
        done = subprocess.run(
            ["git", "apply", "-"], cwd=folder, input=change, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    for code in blocks(solution, "python"):
        append(folder / ("locality.py" if number == 3 else "lesson/exercises.py"), code)


def run(command, folder):
    """A command of the lesson, on the copy, with this Python."""
    words = command.split()
    assert words[0] == "python"
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, text=True, capture_output=True, timeout=240
    )


def output(command, folder):
    """What a command that succeeds prints."""
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TOGETHER = """
import contextlib, io, json, sys
sys.path.insert(0, "tests")
from conftest import script_here
printed = []
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = script_here(*line.split()[1:])
    assert status == 0, line
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def outputs(commands, folder):
    """The same for several commands in one process, which imports torch only once."""
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, *commands], cwd=folder, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def perplexity(printed):
    return re.search(r"^perplexity ([\d.]+)", printed, re.M)[1]


def column(printed, name):
    """A column of the table that eval.py prints, as floats."""
    header, *rows = re.search(r"^layer .*\n(?:\d+ .*\n)+", printed, re.M)[0].splitlines()
    column = re.split(r"\s{2,}", header).index(name)
    return [float(re.split(r"\s{2,}", row)[column]) for row in rows]


def failures(folder):
    """The message of every check that fails, by the number of its exercise."""
    done = run("python -m pytest lesson/", folder)
    shown = done.stdout.partition("= FAILURES =")[2].partition("= short test summary")[0]
    return {int(n): text.strip("_=\n ") for n, text in re.findall(
        r"test_(\d)_\w+ _+\n(.*?)(?=\n_{5}|\n=|\Z)", shown, re.S)}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A copy of the code; a tiny model with four layers is its runs/quickstart."""
    folder = tmp_path_factory.mktemp("lesson") / "code"
    folder.mkdir()
    for name in ("configs", "data", "docs", "fast", "lesson", "report", "support", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.bin", "meta.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    output("python train.py configs/tiny.toml --n_layer 4 --out runs/quickstart", folder)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "code"))


def test_an_exercise_begins_with_a_check_that_says_in_one_line_what_to_do(trained):
    messages = failures(trained)
    assert list(messages) == list(EXERCISES) == [1, 2, 3, 4, 5, 6]
    for message in messages.values():
        assert "\n" not in message and message.endswith("."), message
        assert re.match("(Write|Add|Return) ", message) and ".py" in message


def test_the_solutions_pass_and_show_one_exact_zero(copy):
    for number in EXERCISES:
        solve(number, copy)
    done = run("python -m pytest lesson/ -s", copy)
    changes = re.findall(r"the largest change is ([\d.e-]+)", done.stdout)
    assert [float(change) == 0 for change in changes] == [True, False, False], done.stdout
    # the order on the page is that of a model which has learned to use its context
    assert "6 passed" in done.stdout or "1 failed, 5 passed" in done.stdout
    if measured := re.findall(r"^(\w+) +[\d.]+  [\d.]+$", done.stdout, re.M):
        append(copy / "lesson" / "exercises.py", f"ORDER = {measured}\n")
    assert "1 passed, 5 deselected" in output(commands(1)[0], copy)


ORDER = re.search(r"ORDER = (.*)", SOLUTIONS[1])[1]
WRONG = {  # exercise: (a part of the solution, what replaces it, a part of the message), ...
    1: [('"distributed", ', "", "Write your"), (ORDER, f"{ORDER}[::-1]", "You predicted")],
    2: [("max(0.0, 2 * l / last - 1)", "(l / last)", "first half"), ("2 * l", "1.5 * l", "floor")],
    3: [("np.append(stream.block, starts)", "np.append(0, starts)", "not causal"),
        ('b"\\n" in stream.token_bytes[token]', "token == 10", "inside a token")],
    4: [("n in range(len(tokens))", "n in [100]", "looks_ahead says"),
        ("np.where(vowel, np.maximum(i - 1, 0), 0)", "np.where(vowel, i, 0)", "For banana")],
    5: [("10.0)", "0.1)", "of the attention"), ("(2, 4)", "(1, 4)", "shape (2, 4)")],
    6: [("12 * 7", "7", "each of the 8 tokens"),
        ("other[:start]", "other[: start + 1]", "no other")],
}  # fmt: skip


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_wrong_answer_is_explained(copy, attempt):
    for number, attempts in WRONG.items():
        solve(number, copy, *attempts[attempt][:2])
    messages = failures(copy)
    assert list(messages) == list(WRONG)
    for number, attempts in WRONG.items():
        message = messages[number].partition("Measured,")[0]  # a table follows
        assert attempts[attempt][2] in message and "\n" not in message
    if table := dict(re.findall(r"^(\w+) +([\d.]+)  [\d.]+$", messages[1], re.M)):
        command = "python eval.py runs/quickstart --partition window:8 --schedule"
        measured = outputs([f"{command} {name}" for name in table], copy)
        assert [perplexity(printed) for printed in measured] == list(table.values())
        assert len(table) == 5


def test_exercises_2_and_3_every_script_knows_the_new_names(copy):
    solve(2, copy)
    solve(3, copy)
    command = re.search(r"`(python train.py .*?)`", SOLUTIONS[2], re.S)[1].replace("\n", " ")
    short = "--max_steps 2 --eval_contexts 1"
    late, _, _ = outputs([commands(2)[1], f"{command} {short}", commands(3)[1]], copy)
    promised = re.search(r"its dials: ([\d., ]+\d)\.", SOLUTIONS[2])[1]
    assert column(late, "locality") == [float(x) for x in promised.split(", ")]
    (page,) = (copy / "runs" / "quickstart").glob("*line.html")
    assert page.stat().st_size > 100_000


def test_the_demos_of_the_lecturer_show_what_to_point_at(trained):
    demos = [text.strip() for text in blocks(TEACHING, "sh") if "lesson.leak" not in text]
    assert len(demos) == 4
    _, dials, half, _ = outputs(demos, trained)
    rows = {row.split()[0]: row.split() for row in dials.splitlines() if " 1.00 " in row}
    assert rows["quintic"][-2] == rows["reversed"][-2] != rows["linear"][-2]  # mean locality
    assert min(column(half, "fidelity")) >= 0.5 == max(column(half, "locality"))
    # the two documents say the same about the leak
    assert set(re.findall(r"\d\.\d\d\b", TEACHING.partition("**4.")[2])) <= set(
        re.findall(r"\d\.\d\d\b", EXERCISES[4])
    )


def vowels(printed):
    """The share of vowels among the letters that a run of train.py writes at the end."""
    text = printed.partition("what it writes after")[2].partition("\n")[2].partition("\nfigure")[0]
    letters = [c for c in text.lower() if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / len(letters)


def test_exercise_4_the_leak_makes_the_model_better_and_its_text_worse(copy):
    leak, window = commands(4)[:2]
    leaky, honest = output(leak, copy), output(window, copy)
    solve(4, copy)
    repaired = output(leak, copy)
    promised = re.findall(r"\d+\.\d\d", TASKS[4]) + re.findall(r"\d+\.\d\d", SOLUTIONS[4])
    for printed, expected in zip((leaky, honest, repaired), promised, strict=True):
        assert float(perplexity(printed)) == pytest.approx(float(expected), rel=0.02)
    assert vowels(leaky) < 0.1 and vowels(honest) > 0.3 and vowels(repaired) > 0.3


def test_exercise_5_under_plain_one_place_changes_every_script(copy):
    small = "--partition block:16 --schedule localist --floor 0.5 --max_steps 9 --eval_contexts 1"
    train = f"python train.py configs/tiny.toml {small}"
    outputs([f"{train} --out runs/blocks"], copy)
    (measure,) = (command for command in commands(5) if "eval.py" in command)
    scripts = [
        f"{train} --plain true --overwrite",
        "python sample.py runs/blocks --plain",
        "python view.py runs/blocks --plain --out page.html",
        measure,
        "python sample.py runs/blocks",
    ]

    def what_they_show():
        training, text, _, table, fast_text = outputs(scripts, copy)
        losses = re.findall(r"loss ([\d.]+)", training)
        page = re.findall(r'"perplexity": ([\d.]+)', (copy / "page.html").read_text())
        assert losses and page
        return losses, text, page, column(table, "fidelity"), fast_text

    *before, fast = what_they_show()
    (line,) = blocks(TASKS[5], "python")
    append(copy / "model.py", line)
    *after, still_fast = what_they_show()
    assert fast == still_fast and all(a != b for a, b in zip(before, after))
    assert min(before[3]) >= 0.5 > 2 * max(after[3])
