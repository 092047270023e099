"""What a page is made of: text that stays text, labels, and packed numbers."""

import base64
import itertools
import json
import random
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from report.page import SCALES, fill, keep_strongest, label, pack, page_name, pieces_of
from support.files import TURNS


def data_of(html):
    """What a page holds: its data, and its arrays."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    data = json.loads(text)
    raw, arrays = zlib.decompress(base64.b64decode(data["numbers"])), {}
    for name, place in data["arrays"].items():
        at, n = place["at"], place["n"]
        stored = np.frombuffer(raw, np.uint8, n * place["bytes"], at).reshape(place["bytes"], n)
        arrays[name] = sum(256.0**i * part for i, part in enumerate(stored)) / place["scale"]
        arrays[name] -= place["added"]
    return data, arrays


def test_pieces_are_the_text_and_a_character_stands_with_its_last_token():
    rng = random.Random(7)
    characters = [*"abc .,\n\té中👩🙂\u202e\x00\x85\ufeffﷺ", "\n\n", "x" * 60]
    for _ in range(200):
        text = "".join(rng.choices(characters, k=40))
        data, tokens = text.encode(), []
        while data:
            n = rng.choice([1, 1, 2, 3, 7])
            tokens.append(data[:n])
            data = data[n:]
        pieces, read_so_far = pieces_of(tokens), b""
        assert len(pieces) == len(tokens)
        for token, piece in zip(tokens, pieces):
            read_so_far += token
            before = read_so_far[: len(read_so_far) - len(token)].decode(errors="ignore")
            assert bool(piece) == (len(read_so_far.decode(errors="ignore")) > len(before))
        shown = "".join(pieces)
        assert "\ufffd" not in shown and not set(shown) & set(TURNS)
        hidden = {c for c in shown if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
        assert not hidden
        undone = shown
        for c in sorted(set(text) & {*TURNS, "\x00", "\x85"}):
            undone = undone.replace(c.encode("unicode_escape").decode(), c)
        assert undone.replace("\n", " ") == text.replace("\n", " ")


def test_a_text_cut_into_lines_is_wrapped_again_and_verse_is_not():
    prose = b"a line of a book that was cut into lines as long as this one\nand goes on. And on."
    verse = b"A line of verse,\nand one more.\n\nAnother."
    long_verse = b"A line of verse that is about as long as a line of prose may be,\nAnd one more."
    assert pieces_of([prose])[0].count("\n") == 0
    assert pieces_of([verse]) == [verse.decode()] and pieces_of([long_verse])[0].count("\n") == 1
    assert pieces_of([prose[:60] + b"\n\n", b"New."])[0].endswith("\n\n")


def test_labels_say_what_would_not_show():
    assert label(b" the") == "␣the" and label(b"\n\n") == "↵↵" and label(b"\xe4") == "\\xe4"
    assert label("é".encode()) == "é" and label(b"\x07") == "\\x07" and label(b"") == "(empty)"
    assert label("\u202e".encode()) == "\\u202e"


# characters that a browser draws nothing for: Unicode's "default ignorable" ones, and a blank
IGNORABLE = [0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164]
IGNORABLE += [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x2800]
IGNORABLE += [
    *range(0xFE00, 0xFE10),
    0xFEFF,
    0xFFA0,
    *range(0xFFF0, 0xFFF9),
    *range(0x1BCA0, 0x1BCA4),
]
IGNORABLE += [*range(0x1D173, 0x1D17B), *range(0xE0000, 0xE1000)]


def test_no_label_is_invisible():
    hidden = {chr(n) for n in IGNORABLE}
    for n in range(0x110000):
        c, kind = chr(n), unicodedata.category(chr(n))
        if kind == "Cs" or kind in ("Lo", "Cn", "Co") and n % 100 and c not in hidden:
            continue
        for text in (c, f" {c}"):
            shown = label(text.encode())
            assert not hidden & set(shown), hex(n)
            assert all(unicodedata.category(x)[0] not in "ZC" for x in shown), hex(n)
            assert unicodedata.category(shown[0])[0] != "M", hex(n)
    assert label("\u0301".encode()) == "◌\u0301" and label("e\u0301".encode()) == "e\u0301"
    assert label("\xa0\u200d\u3000".encode()) == "\\xa0\\u200d\\u3000"


def test_pack_keeps_numbers_to_half_a_step():
    rng = np.random.default_rng(0)
    many = {"fidelity3": rng.random((3, 4)), "roots0": rng.random(7)}
    many |= {"change12": rng.normal(0, 9, (2, 50)), "x": [0, 300, 70000], "none": []}
    _, arrays = data_of(fill(pack(many)))
    for name in ("fidelity3", "roots0", "change12"):
        scale, _ = SCALES[name.rstrip("0123456789")]
        assert np.abs(arrays[name] - many[name].reshape(-1)).max() <= 0.5001 / scale
    assert arrays["x"].tolist() == [0, 300, 65535] and not len(arrays["none"])
    _, arrays = data_of(fill(pack({"change0": [1e9, -1e9, np.inf]})))
    assert np.abs(arrays["change0"]).min() > 127  # clipped, not wrapped around


@pytest.mark.parametrize("most", [0, 500, 3000, 10**6])
def test_the_strongest_keys_of_all_dials_are_kept(most):
    rng = np.random.default_rng(1)
    shape = 2, 4, 30, 12  # layers, heads and their mean, queries, keys
    weights = [-np.sort(-rng.dirichlet(np.full(12, 0.5), shape[:3]), -1) for _ in range(3)]
    keys = [rng.integers(0, 30, shape) for _ in weights]
    measured = [{"keys": k, "weights": w} for k, w in zip(keys, weights)]
    least = keep_strongest(measured, most)
    kept = 0
    for values, k, w in zip(measured, keys, weights):
        ends, at = np.cumsum(values["n_keys"].reshape(-1)), 0
        for query, end in enumerate(ends):
            n, mean = end - at, query // 30 % 4 == 3
            all_keys, all_weights = k.reshape(-1, 12)[query], w.reshape(-1, 12)[query]
            assert values["keys"][at:end].tolist() == all_keys[:n].tolist()
            assert np.abs(values["roots"][at:end] - np.sqrt(all_weights[:n])).max() < 0.51 / 255
            above = (all_weights * (3 if mean else 1) > least * 1.1 + 1e-3).sum()
            assert n >= above and n >= (all_weights[:4] > 0.001).sum()
            kept, at = kept + max(n - 4, 0), end
    assert kept <= most
    assert most < 10**6 or kept > 0.6 * 3 * np.prod(shape[:3]) * 8


def test_a_file_name_fits_every_disk():
    pairs = [("quintic", 1.0), ("a/b", 0.25)]
    name = page_name({}, 'c\\c:d*e?"<f>|\x00', pairs, "semantic+window:8")
    assert name == "view-c_c_d_e_f-quintic-a_b_0.25-semantic+window_8.html"
    for text in (Path("é" * 300), "é" * 300):
        assert len(page_name({"text": text}, "é" * 300, pairs, "sentence").encode()) < 230


def test_the_example_is_what_the_readme_says():
    """docs/RUNNING.md has its command; run that again after every change of page.html."""
    html = (ROOT / "docs" / "example.html").read_text(encoding="utf-8")
    data, _ = data_of(html)
    assert fill(data) == html and len(html) < 2e6
    command = (ROOT / "docs" / "RUNNING.md").read_text(encoding="utf-8").replace("\\\n", " ")
    assert data["command"].replace("'", '"') in " ".join(command.split())
    starts = np.arange(len(data["lookback"])) - data["lookback"]
    edges = [*np.unique(starts), len(starts)]
    blocks = ["".join(data["text"][a:b]) for a, b in itertools.pairwise(edges)]
    assert len(blocks) >= 4 and all(len(re.findall(r"\.(?!\w)", block)) >= 2 for block in blocks)
    assert data["partition"] == "semantic:closed" and not data["anchor"]
    assert [1.0] * data["layers"] in [dial["locality"] for dial in data["dials"]]
