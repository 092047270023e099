"""Known topic shifts are scored as defined, and the figures of blocks are drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import locality
from conftest import ROOT
from experiments.segmentation import main, p_k, trace, window_diff
from support.files import run_script

SAMPLE = ROOT / "data" / "sample.txt"


@pytest.fixture
def segmentation(monkeypatch, capsys):
    """segmentation(*options) runs the script in this process and returns what it prints."""

    def run(*options):
        monkeypatch.setattr("sys.argv", ["segmentation", *map(str, options)])
        run_script(main)
        return capsys.readouterr().out

    return run


@pytest.fixture
def books(tmp_path):
    """Options that name a file of three texts, each made of chapters of the sample, twice over."""
    chapters = re.split(r"(?m)^(?=Chapter \d)", SAMPLE.read_text())[1:]
    path = tmp_path / "books.txt"
    path.write_text("<|endoftext|>".join("".join(chapters[i::3]) * 2 for i in range(3)))
    return "--books", path, "--seeds", 1, "--documents", 2, "--json", tmp_path / "table.json"


def test_the_measures():
    piece = np.repeat([0, 1, 2], 4)
    perfect, single = piece * 4, np.zeros(12, int)
    assert p_k(perfect, piece) == window_diff(perfect, piece) == 0
    # k is 2: of the ten pairs (i - 2, i) four are apart
    assert p_k(single, piece) == window_diff(single, piece) == 0.4
    assert p_k(np.arange(12), piece) == 0.6 and window_diff(np.arange(12), piece) == 1


def test_documents_from_books(books, segmentation):
    printed = segmentation(*books)
    tables = json.loads(books[-1].read_text())
    assert list(tables) == ["ten books", "ten places of one book"]
    for title, rivals in tables.items():
        assert title in printed
        scores = {rival: np.array(list(row.values())) for rival, row in rivals.items()}
        assert all(s.shape == (4, 2) and s.min() >= 0 and s.max() <= 1 for s in scores.values())
        # every pair that one block gets wrong, a block per sentence gets right
        one, each = scores["one block"], scores["a block per sentence"]
        assert one[:, 0] + each[:, 0] == pytest.approx(1) and (each[:, 1] > 0.9).all()
    segmentation(*books)
    assert json.loads(books[-1].read_text()) == tables  # drawn at random, and always the same
    printed = segmentation(*books, "--first", "--tuning")
    assert "ten texts" in printed and "semantic" in printed


@pytest.mark.parametrize("constant", ["ALPHA", "SURE"])
def test_a_larger_constant_costs_lag_and_is_restored(constant, books, segmentation):
    usual = getattr(locality, constant)
    printed = segmentation("--vary", constant, *books, "--documents", 3)
    rows = json.loads(books[-1].read_text())
    assert getattr(locality, constant) == usual and printed.count("(the default)") == 1
    assert len({(row["mean"][0], row["lag"], row["mean lookback"]) for row in rows}) > 3
    assert all(row["closed"] < row["mean lookback"] for row in rows)
    first, last = rows[0], rows[-1]
    assert first["lag"] <= last["lag"] and first["mean lookback"] < last["mean lookback"]


def test_a_page_and_lengths_are_drawn(tmp_path, segmentation):
    figure = tmp_path / "new" / "page.png"
    printed = segmentation("--page", SAMPLE, "--from", "Chapter 2.", "--figure", figure)
    assert "666 sentences, 215 blocks" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    figure = tmp_path / "lengths.svg"
    printed = segmentation("--lengths", SAMPLE, "--figure", figure)
    assert printed.startswith("sample: 215 blocks") and "<svg" in figure.read_text()


def test_a_trace_goes_through_the_text_sentence_by_sentence():
    text = SAMPLE.read_bytes()[:3000]
    sentences = trace(text)
    assert [s.next for s in sentences[:-1]] == [s.start for s in sentences[1:]]
    assert sentences[0].start == 0 and sentences[0].bits == -np.inf
    blocks = [0] + [s.block for s in sentences]
    assert blocks == sorted(blocks)
    assert [s.moved for s in sentences] == [a < b for a, b in zip(blocks, blocks[1:])]
    assert any(s.moved for s in sentences) and all(s.bits > 0 for s in sentences if s.moved)


@pytest.mark.parametrize(
    "options, why",
    [
        ("--page nowhere.txt", "nowhere.txt"),
        ("--page short.txt", "one block"),
        ("--page short.txt --from rainy", "rainy"),
        ("--page latin.txt", "UTF-8"),
        ("--page short.txt --figure page.doc", "page.doc"),
        ("--lengths empty.txt", "empty.txt is empty"),
        ("--books short.txt", "at least 3"),
        ("--books few.txt", "200 sentences"),
        ("--books few.txt --seeds 0", "at least 1"),
        ("--page short.txt --vary SURE", "--vary needs --books"),
        ("--books few.txt --json nowhere/t.json", "nowhere/t.json"),
    ],
)
def test_mistakes_end_in_one_line(options, why, segmentation, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("It rained all day. We stayed in and played cards.")
    Path("few.txt").write_text("One. Two.<|endoftext|>One. Two.<|endoftext|>One. Two.")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    Path("empty.txt").write_text(" \n")
    with pytest.raises(SystemExit, match="2"):
        segmentation(*options.split())
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and why in error
