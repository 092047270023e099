"""What a page is made of: text that stays text, labels, and packed numbers."""

import base64
import json
import random
import re
import unicodedata
import zlib

import numpy as np

from report.page import fill, label, pack, pieces_of
from support.files import TURNS


def data_of(html):
    """What a page holds: its data, and its arrays."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    data = json.loads(text)
    raw, arrays = zlib.decompress(base64.b64decode(data["numbers"])), {}
    for name, place in data["arrays"].items():
        kind = {1: np.uint8, 2: "<u2"}[place["bytes"]]
        values = np.frombuffer(raw, kind, place["n"], place["at"])
        arrays[name] = values / place["scale"]
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


def test_pack_keeps_numbers_to_half_a_step():
    rng = np.random.default_rng(0)
    many = {"a": (rng.random((3, 4)), 65535), "b": (rng.random(7), 255), "c": ([0, 300, 70000], 1)}
    many["none"] = ([], 10)
    _, arrays = data_of(fill(pack(many)))
    for name in "ab":
        values, scale = many[name]
        assert np.abs(arrays[name] - values.reshape(-1)).max() <= 0.5001 / scale
    assert arrays["c"].tolist() == [0, 300, 65535] and not len(arrays["none"])
