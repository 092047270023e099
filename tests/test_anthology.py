"""Passages are whole paragraphs of the text, none lost but headings and rests, in random order."""

import contextlib
import random
import re

import pytest

from conftest import ROOT
from experiments.anthology import anthology, main, passages, refrain, with_refrains
from support.files import run_script

SAMPLE = ROOT / "data" / "sample.txt"
WIKI = " = One = \n\n A first line .\n A second .\n\n = = Part = = \n\n Third .\n\n"
WIKI += " = Two = \n\n Fourth .\n"


def test_passages_are_whole_paragraphs_of_about_the_length_given():
    text = SAMPLE.read_text()
    whole = "\n\n".join(p.strip() for p in re.split(r"\n\s*\n", text))
    texts = list(passages(text, random.Random(0), 400, 1600))
    joined = "\n\n".join(texts)
    assert whole.startswith(joined) and len(joined) > len(whole) - 1600
    lengths = [len(passage) for passage in texts]
    assert min(lengths) >= 400 and len(set(lengths)) > 10
    assert 600 < sum(lengths) / len(lengths) < 2000


def test_headings_and_documents_end_a_passage_and_are_left_out():
    texts = list(passages(WIKI + "<|endoftext|>Fifth .", random.Random(0), 1, 9999))
    assert texts == ["A first line .\n\nA second .", "Third .", "Fourth .", "Fifth ."]
    assert list(passages(WIKI, random.Random(0), 9, 9999)) == ["A first line .\n\nA second ."]


def test_the_order_is_random_and_always_the_same(tmp_path):
    (tmp_path / "two.txt").write_text(SAMPLE.read_text().upper())
    paths = [SAMPLE, tmp_path / "two.txt"]
    one, again, other = (anthology(paths, 300, 900, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert {p.isupper() for p in one[:12]} == {True, False}  # the texts are mixed


def test_refrains_are_words_of_a_passage_again_and_again_and_as_many_as_given():
    plain = anthology([SAMPLE], 300, 900, 1)
    mixed = with_refrains(plain, 0.5, 900, 1)
    refrains = [p for p in mixed if p not in plain]
    assert sorted(set(mixed) - set(refrains)) == sorted(set(plain))
    assert sum(map(len, refrains)) == pytest.approx(0.5 * sum(map(len, plain)), rel=0.1)
    words, times = " ".join(" ".join(plain).split()), []
    for line in map(str.split, refrains):
        n = next(n for n in range(1, len(line)) if line == line[:n] * (len(line) // n))
        times.append(len(line) // n)
        assert " ".join(line[:n]) in words
    assert min(times) >= 2 and max(times) > 10 and max(map(len, refrains)) <= 2 * 900
    assert refrain("ab" * 3000, random.Random(0), 900) == " ".join(["ab" * 225] * 2)  # no spaces


@pytest.fixture
def script(monkeypatch, capsys):
    """script(*options) runs the script in this process and returns (stdout, stderr)."""

    def run(*options):
        monkeypatch.setattr("sys.argv", ["anthology", *map(str, options)])
        with contextlib.suppress(SystemExit):
            run_script(main)
        return capsys.readouterr()

    return run


def test_the_script_separates_passages_and_overwrites_no_file(script, tmp_path):
    out = tmp_path / "passages.txt"
    printed, _ = script(out, SAMPLE, "--longest", 900)
    text = out.read_text()
    texts = text.split("\n<|endoftext|>")
    assert f"{len(texts)} passages" in printed and len(texts) > 20
    assert all(p.strip() in SAMPLE.read_text() for p in texts)
    assert "already exists" in script(out, SAMPLE)[1] and out.read_text() == text


@pytest.mark.parametrize(
    "options, says",
    [
        ("--shortest 0", "--shortest"),
        ("--shortest 4000", "--shortest"),
        ("--refrain -1", "--refrain"),
        ("--longest -1", "--longest must"),
        ("--longest 1" + 400 * "0", "--longest must"),
        ("--shortest 50000 --longest 60000 --refrain 1", "longer text"),
        ("nowhere.txt", "nowhere.txt"),
    ],
)
def test_mistakes_end_in_one_line(options, says, script, tmp_path):
    _, error = script(tmp_path / "out.txt", SAMPLE, *options.split())
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out.txt").exists()
