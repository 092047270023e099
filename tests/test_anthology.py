"""Passages are whole paragraphs of the text, none lost but headings and rests, in random order."""

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
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text)]
    texts = list(passages(text, random.Random(0), 400, 1600))
    whole = "\n\n".join(paragraphs)
    assert whole.startswith("\n\n".join(texts)) and len("\n\n".join(texts)) > len(whole) - 1600
    lengths = [len(passage) for passage in texts]
    assert min(lengths) >= 400 and len(set(lengths)) > 10
    assert 400 < sum(lengths) / len(lengths) < 1600 + max(map(len, paragraphs))


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
    texts, times = [" ".join(p.split()) for p in plain], []
    for words in map(str.split, refrains):
        n = next(n for n in range(1, len(words)) if words == words[:n] * (len(words) // n))
        times.append(len(words) // n)
        assert any(" ".join(words[:n]) in text for text in texts)
    assert min(times) >= 2 and max(times) > 10 and len(set(times)) > 4
    assert max(map(len, refrains)) <= 2 * 900
    assert refrain("ab" * 3000, random.Random(0), 900) == " ".join(["ab" * 225] * 2)  # no spaces


@pytest.fixture
def script(monkeypatch, capsys):
    """script(*options) -> (status, stdout, stderr)"""

    def run(*options):
        monkeypatch.setattr("sys.argv", ["anthology", *map(str, options)])
        try:
            run_script(main)
            return 0, *capsys.readouterr()
        except SystemExit as stopped:
            return stopped.code, *capsys.readouterr()

    return run


def test_the_script_separates_passages_and_overwrites_no_file(script, tmp_path):
    out = tmp_path / "passages.txt"
    status, printed, _ = script(out, SAMPLE, "--longest", 900)
    text = out.read_text()
    texts = text.split("\n<|endoftext|>")
    assert status == 0 and f"{len(texts)} passages" in printed and len(texts) > 20
    assert all(p.strip() in SAMPLE.read_text() for p in texts)
    status, _, error = script(out, SAMPLE)
    assert status == 2 and "already exists" in error and out.read_text() == text


@pytest.mark.parametrize(
    "options, says",
    [
        (["nowhere.txt"], "nowhere.txt"),
        ([SAMPLE, "--shortest", 0], "--shortest"),
        ([SAMPLE, "--shortest", 4000], "--shortest"),
        ([SAMPLE, "--refrain", -1], "--refrain"),
        ([SAMPLE, "--longest", -1], "--longest must"),
        ([SAMPLE, "--longest", "1" + 400 * "0"], "--longest must"),
        ([SAMPLE, "--shortest", 50000, "--longest", 60000, "--refrain", 1], "longer text"),
        ([SAMPLE, "--shortest", 90000, "--longest", 90000], "longer text"),
    ],
)
def test_mistakes_end_in_one_line(options, says, script, tmp_path):
    status, _, error = script(tmp_path / "out.txt", *options)
    assert status == 2 and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out.txt").exists()
