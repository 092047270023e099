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


def test_passages_are_whole_paragraphs_of_about_the_length_asked_for():
    text = SAMPLE.read_text()
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text)]
    found = list(passages(text, random.Random(0), 400, 1600))
    whole = "\n\n".join(paragraphs)
    assert whole.startswith("\n\n".join(found)) and len("\n\n".join(found)) > len(whole) - 1600
    lengths = [len(passage) for passage in found]
    assert min(lengths) >= 400 and len(set(lengths)) > 10
    assert 400 < sum(lengths) / len(lengths) < 1600 + max(map(len, paragraphs))


def test_headings_and_documents_end_a_passage_and_are_left_out():
    found = list(passages(WIKI + "<|endoftext|>Fifth .", random.Random(0), 1, 9999))
    assert found == ["A first line .\n\nA second .", "Third .", "Fourth .", "Fifth ."]
    assert list(passages(WIKI, random.Random(0), 9, 9999)) == ["A first line .\n\nA second ."]


def test_the_order_is_random_and_always_the_same(tmp_path):
    (tmp_path / "two.txt").write_text(SAMPLE.read_text().upper())
    paths = [SAMPLE, tmp_path / "two.txt"]
    one, again, other = (anthology(paths, 300, 900, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert {p.isupper() for p in one[:12]} == {True, False}  # the texts are mixed


def test_refrains_are_words_of_a_passage_again_and_again_and_as_many_as_asked_for():
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


def test_a_refrain_of_a_text_without_spaces_is_short_too():
    found = refrain("ab" * 3000, random.Random(0), 900)
    assert found == " ".join(["ab" * 225] * 2)


def test_a_file_that_is_there_is_not_written_over(monkeypatch, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text(SAMPLE.read_text())
    monkeypatch.setattr("sys.argv", ["anthology", str(book), str(SAMPLE)])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2 and "is there already" in capsys.readouterr().err
    assert book.read_text() == SAMPLE.read_text()


def test_the_script_writes_passages_with_an_end_of_text_between_them(monkeypatch, tmp_path, capsys):
    out = tmp_path / "passages.txt"
    monkeypatch.setattr("sys.argv", ["anthology", str(out), str(SAMPLE), "--longest", "900"])
    run_script(main)
    told = capsys.readouterr().out
    found = out.read_text().split("\n<|endoftext|>")
    assert f"{len(found)} passages" in told and len(found) > 20
    assert all(p.strip() in SAMPLE.read_text() for p in found)


@pytest.mark.parametrize(
    "options, says",
    [
        (["nowhere.txt"], "nowhere.txt"),
        ([str(SAMPLE), "--shortest", "0"], "--shortest"),
        ([str(SAMPLE), "--shortest", "4000"], "--shortest"),
        ([str(SAMPLE), "--refrain", "-1"], "--refrain"),
        ([str(SAMPLE), "--longest", "-1"], "--longest must"),
        ([str(SAMPLE), "--longest", "1" + 400 * "0"], "--longest must"),
        ([str(SAMPLE), "--shortest", "50000", "--longest", "60000", "--refrain", "1"], "too few"),
        ([str(SAMPLE), "--shortest", "90000", "--longest", "90000"], "too few"),
    ],
)
def test_mistakes_end_in_one_line(options, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["anthology", str(tmp_path / "out.txt"), *options])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out.txt").exists()
