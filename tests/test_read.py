"""The page shows what was measured, keeps text as text, and works in a browser, from disk alone."""

import base64
import json
import math
import random
import re
import shlex
import shutil
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

import read
from conftest import ROOT, script_here
from eval import evaluate, load_run, read_text
from locality import ChangePoints, Partitioner, background, partition, reach, schedule
from model import GPT, GPTConfig
from prepare_data import block_moves, block_starts, liveliest
from read import (
    Excerpt,
    Text,
    cut,
    draw_foreign,
    find_words,
    given_text,
    influence,
    join_short,
    measure,
    own_text,
    two_dials,
)
from support.files import InputError
from support.page import TURNS, fill, label, pack, pieces_of

BYTES = [bytes([i]) for i in range(256)]
HOSTILE = (
    '</script><img src=x onerror="alert(1)"><!-- \u202ereversed\u202c \x07\x1b[31m <b>bold</b>. '
    "&lt;i&gt; مرحبا بالعالم. 👩\u200d👩\u200d👧 naïve 中文。 {{x}} ${1} \\u003c @DATA@ @HASHES@. "
    "And so on.\n\n"
    "A new paragraph begins here. It says a little more. "
)


def data_of(html):
    """What a page holds: its data, and its arrays."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    data = json.loads(text)
    raw, arrays = zlib.decompress(base64.b64decode(data["numbers"])), {}
    for name, how in data["arrays"].items():
        kind = {1: np.uint8, 2: "<u2"}[how["bytes"]]
        values = np.frombuffer(raw, kind, how["n"], how["at"])
        arrays[name] = values / how["scale"]
    return data, arrays


@pytest.fixture
def read_page(place, run, tmp_path):
    """read_page(run or weights, …): read.py's page, as (data, arrays, html)."""

    def read_page(name, *options):
        out = tmp_path / "page.html"
        status, _, error = run("read.py", name, *options, "--out", out)
        assert status == 0, error
        html = out.read_text(encoding="utf-8")
        return *data_of(html), html

    return read_page


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# the numbers


def test_the_page_shows_what_eval_and_the_model_say(place, read_page):
    data, arrays, _ = read_page("runs/tiny")
    model, config = load_run("runs/tiny")
    (tokens, lookback), _, vocabulary = read_text(config, "test")
    at, last = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", data["shown"])[:2])
    T, L, H, K = last - at + 1, data["layers"], data["heads"], data["keys"]
    tokens = tokens[at : at + T]
    lookback = np.minimum(lookback[at : at + T], np.arange(T))
    assert data["lookback"] == lookback.tolist()
    assert [data["labels"][i] for i in data["tokens"]] == [label(vocabulary[t]) for t in tokens]
    assert [dial["schedule"] for dial in data["dials"]] == ["quintic", "distributed"]
    x, back = (torch.tensor(a.astype(np.int64))[None] for a in (tokens, lookback))
    for i, dial in enumerate(data["dials"]):
        model.set_locality(schedule(dial["schedule"], L, dial["fidelity"]))
        assert dial["locality"] == model.locality
        shaped = {name[:-1]: values for name, values in arrays.items() if name.endswith(str(i))}
        fidelity, entropy = (shaped[name].reshape(L, H, T) for name in ("fidelity", "entropy"))
        floors = np.rint(65535 * np.array(dial["locality"])) / 65535
        assert (fidelity >= floors[:, None, None] - 1.1 / 65535).all()
        # eval scores T - 1 predictions
        results = evaluate(model, tokens, lookback, vocabulary)
        assert dial["perplexity"] == pytest.approx(results["perplexity"], rel=1e-5)
        means = fidelity[:, :, :-1].mean((1, 2)), entropy[:, :, :-1].mean((1, 2))
        for layer, share, bits in zip(results["layers"], *means):
            assert share == pytest.approx(layer["fidelity"], abs=1e-5)
            assert bits == pytest.approx(layer["entropy"], abs=2e-4)
        # every key that is drawn, and no stronger one left out
        keys = shaped["keys"].reshape(L, H + 1, T, K).astype(int)
        weights = shaped["roots"].reshape(L, H + 1, T, K) ** 2
        for layer, a in enumerate(model.attention_maps(x, back)):
            a = torch.cat((a[0], a[0].mean(0, keepdim=True))).numpy()  # (H + 1, T, T)
            drawn = np.take_along_axis(a, keys[layer], -1)
            assert np.abs(np.sqrt(drawn) - np.sqrt(weights[layer])).max() < 0.51 / 255
            np.testing.assert_allclose(drawn, -np.sort(-a, -1)[..., :K], atol=1e-6)
        # what comes next
        with torch.no_grad():
            bits = -model(x, back)[0][0].log_softmax(-1).numpy() / math.log(2)
        ids = [label(vocabulary[t]) for t in range(len(vocabulary))]
        for t in (0, 1, T // 2, T - 2):
            best = np.argsort(bits[t], kind="stable")[: data["likeliest"]]
            said = shaped["likely"].reshape(T, -1)[t].astype(int)
            assert [data["labels"][n] for n in said] == [ids[n] for n in best]
            said = shaped["bits"].reshape(T, -1)[t]
            np.testing.assert_allclose(said, bits[t][[*best, tokens[t + 1]]], atol=1e-3)
            rank = (bits[t] < bits[t][tokens[t + 1]]).sum() + 1
            assert shaped["rank"][t] == rank


def small_model(**more):
    torch.manual_seed(3)
    shape = {"vocab_size": 256, "block_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**{**shape, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # predictions that differ
    return model


def by_definition(model, x, lookback, sentence, text, i):
    """KL in bits between p_i and p_i with a sentence replaced by a text, and the latter."""
    other = x.clone()
    for position in range(max(sentence[0], 1), sentence[1]):
        other[0, position] = text[position - sentence[0]]
    with torch.no_grad():
        p, q = (model(context, lookback)[0][0, i].double() for context in (x, other))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return kl_div(q, p, log_target=True, reduction="sum").item() / math.log(2), q.exp()


@pytest.mark.parametrize("anchor", [False, True])
def test_influence_in_one_pass_is_the_definition_in_two(anchor):
    model = small_model(anchor=anchor)
    model.set_locality([0.0, 0.5, 1.0])
    x = torch.randint(256, (1, 40))
    lookback = torch.tensor([[i % 9 for i in range(40)]])
    with torch.no_grad():
        log_p = model(x, lookback)[0][0].log_softmax(-1)
    for sentence in ((0, 5), (5, 17), (17, 39)):
        begin, end = sentence
        foreign = torch.randint(256, (3, end - begin))
        bits, p = influence(model, x, lookback, log_p, sentence, foreign)
        assert bits.shape == (3, 40 - end) and p.shape == (40 - end, 256)
        for i in range(end, 40):
            expected = [by_definition(model, x, lookback, sentence, text, i) for text in foreign]
            assert bits[:, i - end].tolist() == pytest.approx([e[0] for e in expected], 1e-3, 1e-5)
            torch.testing.assert_close(p[i - end].double(), sum(e[1] for e in expected) / 3)
        same = x[:, begin:end].repeat(2, 1)
        assert influence(model, x, lookback, log_p, sentence, same)[0].abs().max() < 1e-6


def test_a_sentence_that_no_layer_can_reach_has_no_influence_and_one_in_reach_has():
    model = small_model()
    lookback = torch.tensor([[i % 10 for i in range(40)]])  # blocks cut by the ruler are closed
    x, foreign = torch.randint(256, (1, 40)), torch.randint(256, (2, 10))
    for lambdas, blind in (([1.0] * 3, True), ([0.0, 1.0, 1.0], False)):
        model.set_locality(lambdas)
        with torch.no_grad():
            log_p = model(x, lookback)[0][0].log_softmax(-1)
        bits, _ = influence(model, x, lookback, log_p, (10, 20), foreign)
        assert (bits.max() < 1e-9) == blind
    model.set_locality([1.0] * 3)
    with torch.no_grad():
        log_p = model(x, lookback)[0][0].log_softmax(-1)
    bits, _ = influence(model, x, lookback, log_p, (10, 15), foreign[:, :5])
    assert bits[:, :5].min() > 1e-4 and bits[:, 5:].max() < 1e-9  # its own block, 10 … 19, alone


@pytest.fixture(scope="module")
def a_page():
    """A model with an anchor and three heads, and what a page shows of it: (model, excerpt, drawn,
    dials, data)."""
    model = small_model(anchor=True, n_head=3, n_embd=48, max_lookback=20)
    tokens = np.random.default_rng(4).integers(97, 103, 60)
    tokens[[9, 10, 23, 24, 35, 36, 48, 49]] = list(b". " * 4)
    tokens[[11, 25, 37, 50]] = list(b"ABCD")
    excerpt = cut(Text("it", tokens, 0, None, None), 60, BYTES, "sentence", 20)
    assert len(excerpt.sentences) == 5
    dials = two_dials(["quintic", "localist"], [0.8, 0.3], {"fidelity": 1.0}, 3)
    foreign = np.array(list(b"One. And another, longer. More. And so on and on it goes. " * 5))
    with pytest.MonkeyPatch.context() as patch:
        drawn = draw_foreign(foreign, BYTES, excerpt.sentences[:-1], 3)
        patch.setattr(read, "draw_foreign", lambda *_: drawn)
        data = measure(model, excerpt, BYTES, foreign, dials, 3)
    data |= {"run": "a <run>", "partition": "sentence", "max_lookback": 20, "seed": None}
    data |= {"command": "c", "commit": "c", "date": "d", "device": "cpu", "torch": "t"}
    return model, excerpt, drawn, dials, data


def test_the_page_shows_the_influence_of_its_sentences(a_page):
    model, excerpt, drawn, dials, data = a_page
    _, arrays = data_of(fill(data))
    x, lookback = (torch.tensor(a)[None] for a in (excerpt.tokens, excerpt.lookback))
    names = [label(byte) for byte in BYTES]
    for dial, (_, _, lambdas) in enumerate(dials):
        model.set_locality(lambdas)
        at = 0
        for (begin, end), texts in zip(excerpt.sentences[:-1], drawn):
            for i in (end, 59):
                found = [by_definition(model, x, lookback, (begin, end), t, i) for t in texts]
                bits, p = sum(f[0] for f in found) / 3, sum(f[1] for f in found).numpy() / 3
                slot = at + i - end
                assert arrays[f"influence{dial}"][slot] == pytest.approx(bits, abs=2e-3)
                assert arrays[f"new_bits{dial}"][slot] == pytest.approx(-np.log2(p.max()), abs=2e-3)
                assert data["labels"][int(arrays[f"new{dial}"][slot])] == names[p.argmax()]
                likely = arrays[f"likely{dial}"].reshape(60, -1)[i].astype(int)
                ids = [names.index(data["labels"][k]) for k in likely]
                ids += excerpt.tokens[i + 1 : i + 2].tolist()
                after = arrays[f"after{dial}"].reshape(-1, data["likeliest"] + 1)[slot]
                np.testing.assert_allclose(after[: len(ids)], -np.log2(p[ids]), atol=2e-3)
            at += 60 - end
        assert at == len(arrays[f"influence{dial}"])


def test_evidence_is_the_odds_of_the_change_point_model_and_the_cap_has_none():
    text = (ROOT / "data" / "sample.txt").read_bytes()[:9000]
    tokens = np.frombuffer(text, np.uint8)
    words = background(tokens, BYTES)
    chances = []
    chance_later = ChangePoints.chance_later

    def noted(self, *where):
        chances.append(chance_later(self, *where))
        return chances[-1]

    for method, cap in (("semantic", 65535), ("semantic", 190), ("sentence", 65535)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChangePoints, "chance_later", noted)
            lookback, moves = read.walk(tokens, BYTES, method, cap, words)
        stream, streamed = Partitioner(BYTES, method, cap, words), []
        for token in tokens:
            stream.push([token])
            streamed += stream.moves[1:]
        known = [move for move in moves if move[2] is not None]
        assert known == [move for move in streamed if move[2] is not None]
        block = 0
        for (token, start, bits), (until, _, _) in zip(moves, [*moves[1:], (len(tokens), 0, 0)]):
            assert start > block
            if bits is not None:
                assert token - block <= cap  # else the cap has decided
                likely = 2**bits / (1 + 2**bits)
                assert likely > 0.6 and min(abs(np.array(chances) - likely)) < 1e-9
            block = start
            inside = np.arange(token, until)
            assert (inside - lookback[token:until] == np.maximum(start, inside - cap)).all()
        assert bool(known) == (method == "semantic")
        assert (len(known) == len(moves)) == (method == "semantic" and cap == 65535)


@pytest.mark.parametrize("method", ["semantic", "sentence", "window:30", "block:64"])
def test_an_excerpt_has_the_blocks_that_were_prepared(method):
    """From the middle of a text of several documents too."""
    vocabulary, text = [*BYTES, b"<|endoftext|>"], (ROOT / "data" / "sample.txt").read_bytes()
    documents = [list(text[a:b]) for a, b in ((0, 5000), (9000, 12000), (3000, 8000))]
    tokens = np.array([*documents[0], 256, *documents[1], 256, *documents[2]])
    words = background(tokens, vocabulary)
    lookback = partition(tokens, vocabulary, method, 300, words)
    moves = {move[:2]: move[2] for move in read.walk(tokens, vocabulary, method, 300, words)[1]}
    begins = block_starts(lookback)[:20].tolist()
    for start in (0, 4900, 7000, len(tokens) - 400, *begins):
        excerpt = cut(Text("it", tokens, start, words, None), 300, vocabulary, method, 300)
        assert excerpt.tokens.tolist() == tokens[start : start + 300].tolist()
        expected = np.minimum(lookback[start : start + 300], np.arange(300))
        assert excerpt.lookback.tolist() == expected.tolist()
        for token, block, said in excerpt.marks:
            assert method == "semantic" and 0 < block <= token < 300
            assert token - excerpt.lookback[token] == block  # from here on it is so
            bits = moves[start + token, start + block]
            sure = "> 40 bits" if bits and bits > 39.9 else f"{bits or 0:.1f} bits"
            assert said == ("cap" if bits is None else sure)
            assert lookback[start + token] != lookback[start + token - 1] + 1  # not before
    # a joined text does not say any more where a document ends: what was prepared holds
    known = (np.arange(len(tokens)) % 77).astype(np.uint16)
    excerpt = cut(Text("it", tokens, 4900, words, None, known), 300, vocabulary, method, 300)
    assert excerpt.lookback.tolist() == np.minimum(known[4900:5200], np.arange(300)).tolist()


def test_the_liveliest_place_shows_the_most_blocks():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, T = rng.integers(2, 300), int(rng.integers(2, 100))
        block = np.maximum.accumulate(np.where(rng.random(n) < 0.05, np.arange(n) - 3, 0)).clip(0)
        lookback = (np.arange(n) - block).astype(np.uint16)

        at = liveliest(lookback, T)
        tokens, starts = block_moves(lookback)
        fits = [0, *(start for start in starts if start <= n - T)]
        seen = [
            sum(place < start and token < place + T for token, start in zip(tokens, starts))
            for place in fits
        ]
        assert at == fits[seen.index(max(seen))]


def test_foreign_texts_begin_with_a_sentence_and_are_not_the_same_twice():
    foreign = np.array(list(b"One thing. Two things. Three things. Four things. Five things."))
    starts = [bytes(foreign[i:].tolist()) for i in read.sentence_starts(foreign, BYTES)]
    assert len(starts) == 5
    for texts, length in zip(draw_foreign(foreign, BYTES, [(0, 7), (7, 20)], 3), (7, 13)):
        said = [bytes(text.tolist()) for text in texts]
        assert texts.shape == (3, length) and len(set(said)) == 3
        assert all(any(start.startswith(text) for start in starts) for text in said)
    longer = draw_foreign(foreign, BYTES, [(0, 200)], 7)[0]  # than there is: it begins again
    assert longer.shape == (7, 200)


def test_words_are_found_at_the_token_where_they_begin():
    rng = random.Random(3)
    for _ in range(200):
        tokens = [
            rng.choice([b"a", b"b", b" ", b"\n", b" a", b"ab ", b"\r\n", b"\t"]) for _ in range(40)
        ]
        vocabulary = sorted(set(tokens))
        ids = np.array([vocabulary.index(token) for token in tokens])
        text = b"".join(tokens).decode()
        begins = [m.start() for m in re.finditer(r"a\s+b", text)]
        whole = Text("it", ids, 0, None, None)
        if not begins:
            with pytest.raises(InputError, match="not there"):
                find_words(whole, vocabulary, "a b")
        else:
            ends = np.cumsum([len(token) for token in tokens])
            at = find_words(whole, vocabulary, " a \n b ")
            assert at == next(i for i, end in enumerate(ends) if end > begins[0])


def test_two_dials():
    config = {"schedule": "quintic", "fidelity": 0.5}

    def shown(names=None, floors=None, of=config):
        return [dial[:2] for dial in two_dials(names, floors, of, 3)]

    assert shown() == [("quintic", 0.5), ("distributed", 0.5)]
    assert shown(["linear"], [0.8]) == [("linear", 0.8), ("distributed", 0.8)]
    assert shown(["linear", "cubic"]) == [("linear", 0.5), ("cubic", 0.5)]
    assert shown(["linear", "cubic"], [1.0, 0.2]) == [("linear", 1.0), ("cubic", 0.2)]
    weights = {"schedule": "distributed", "fidelity": 1.0}
    assert shown(of=weights) == [("distributed", 1.0), ("quintic", 1.0)]
    assert two_dials(None, None, config, 3)[0][2] == schedule("quintic", 3, 0.5)
    assert shown(None, [1.0, 0.2]) == [("quintic", 1.0), ("quintic", 0.2)]
    with pytest.raises(InputError, match="two dials"):
        two_dials(["linear"] * 3, None, config, 3)


def test_sentences_cover_the_excerpt_and_are_not_too_short():
    rng = random.Random(5)
    for _ in range(300):
        T = rng.randrange(2, 700)
        starts = [0, *sorted(rng.sample(range(1, T), rng.randrange(0, min(T, 300))))]
        found = join_short(starts, T)
        assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
        assert found[-1][1] == T and {begin for begin, _ in found} <= set(starts)
        assert all(end - begin >= max(T / 32, 2) for begin, end in found[:-1])
        assert len(found) <= 33 and (len(found) > 1 or starts[-1] < T / 32 + 2)


@pytest.mark.parametrize("layers, heads, most", [(8, 6, 3e6), (12, 12, 8e6)])
def test_the_size_of_a_page(layers, heads, most, monkeypatch):
    """With random weights, whose attention packs worst, and as many sentences as there may be."""
    torch.manual_seed(0)
    width = 4 * heads
    model = GPT(GPTConfig(256, 512, layers, heads, width, max_lookback=256)).eval()
    with torch.no_grad():
        for layer in model.h:
            layer.attn.c_attn.weight.mul_(4)
    rng = np.random.default_rng(0)
    tokens, foreign = rng.integers(97, 123, (2, 512))
    lookback = np.minimum(np.arange(512), np.arange(512) % 100)
    excerpt = Excerpt("", tokens, lookback, [], join_short(range(0, 512, 16), 512))
    dials = two_dials(None, None, {"schedule": "quintic", "fidelity": 1.0}, layers)
    generator = torch.Generator().manual_seed(0)

    def numbers(model, idx, lookback, log_p, sentence, foreign):  # as many, without the passes
        p = torch.randn(512 - sentence[1], 256, generator=generator).softmax(-1)
        return torch.rand(1, 512 - sentence[1], generator=generator), p

    monkeypatch.setattr(read, "influence", numbers)
    data = measure(model, excerpt, BYTES, foreign, dials, 1)
    assert (
        data["keys"] >= 16
        and 1e6 < len(fill({**data, "run": "x", "partition": "block:100"})) < most
    )


# --------------------------------------------------------------------------------------------------
# the text


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


def test_a_text_cut_into_lines_is_set_anew_and_verse_is_not():
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


def test_a_hostile_text_is_data_and_nothing_else(place, read_page, tmp_path):
    path = tmp_path / "<img src=x>.txt"
    path.write_text(HOSTILE, encoding="utf-8")
    data, _, html = read_page("runs/tiny", "--text", path, "--tokens", 192)
    assert data["shown"].startswith("<img src=x>.txt, tokens 0 ")
    empty = fill({})
    assert html.count("<script") == empty.count("<script") == 2
    assert html.count("</script") == 2 and "<img" not in html and "onerror" not in empty
    shown = "".join(data["text"])
    assert shown.startswith("</script><img src=x onerror=") and "\\u202ereversed" in shown
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


# --------------------------------------------------------------------------------------------------
# the command line


def test_the_examples_work(place, run, tmp_path):
    lines = re.findall(r"^ +python (read.py runs/quickstart.*)", read.__doc__, re.M)
    assert len(lines) == 4
    for line in lines:
        script, *words = shlex.split(line.replace("quickstart", "tiny"), comments=True)
        assert run(script, *words, "--out", tmp_path / "page.html")[0] == 0, line


def test_which_text_is_shown(place, read_page, tmp_path):
    data, _, _ = read_page(
        "runs/tiny", "--split", "train", "--from", "Colin  Cherry", "--tokens", 50
    )
    assert "".join(data["text"]).startswith("Colin Cherry") and len(data["text"]) == 50
    assert data["shown"].startswith("train split, tokens ")
    # in the middle of a text, blocks are those of the text
    _, config = load_run("runs/tiny")
    (_, lookback), _, _ = read_text(config, "train")
    at = int(re.search(r"\d[\d,]*", data["shown"])[0].replace(",", ""))
    assert data["lookback"] == np.minimum(lookback[at : at + 50], np.arange(50)).tolist()
    data, _, _ = read_page("runs/tiny", "--prompt", "Two words.")
    assert data["shown"] == "a prompt, all 10 tokens" and "".join(data["text"]) == "Two words."
    long = tmp_path / "long.txt"
    long.write_text("one line, no end, " * 600)
    data, _, _ = read_page("runs/tiny", "--text", long)
    assert data["shown"] == "long.txt, tokens 0 … 191 of 10,800"


def test_the_foreign_text_is_another_split(place, monkeypatch):
    monkeypatch.chdir(place)
    _, config = load_run("runs/tiny")
    other = {"train": "test", "val": "test", "test": "val"}
    foreign = {split: own_text(config, split, 50).foreign for split in other}
    foreign["a prompt"] = given_text(config, None, "x y").foreign
    for split, ids in foreign.items():
        assert ids.tolist() == read_text(config, other.get(split, "test"))[0][0].tolist()
    weights = given_text({"tokenizer": "bytes", "source": None}, None, "x y")
    assert bytes(weights.foreign.tolist()) == (ROOT / "data" / "sample.txt").read_bytes()


def test_the_page_lies_in_the_run_and_is_named_last(place, run):
    for _ in range(2):  # a page is replaced
        status, printed, _ = run("read.py", "runs/tiny", "--tokens", 30)
        said, last = printed.splitlines()
        assert status == 0 and said.startswith("test split, tokens ")
        assert re.fullmatch(r"page: runs/tiny/page.html \(\d.\d MB\), for any browser", last)
    data, _ = data_of((place / "runs" / "tiny" / "page.html").read_text())
    assert data["command"] == "python read.py runs/tiny --tokens 30" and data["commit"]
    (place / "runs" / "tiny" / "page.html").unlink()


def test_weights_are_read_with_a_text_of_the_users(place, run, read_page, tmp_path):
    small_model().save_pretrained(tmp_path / "weights")
    data, _, _ = read_page(tmp_path / "weights", "--prompt", "The mind is. It was. So be it.")
    assert [dial["schedule"] for dial in data["dials"]] == ["distributed", "quintic"]
    assert data["seed"] is None and data["partition"] == "semantic"
    status, _, error = run("read.py", tmp_path / "weights")
    assert status == 2 and one_line(error) and "--text" in error


@pytest.mark.parametrize(
    "options, says",
    [
        (["--from", "no such words"], "are not there"),
        (["--from", " "], "are not there"),
        (["--prompt", "a"], "2 tokens are needed at least, and here is 1"),
        (["--prompt", ""], "2 tokens are needed at least, and here is 0"),
        (["--text", "nothing.txt"], "nothing.txt: cannot be read"),
        (["--text", "runs/tiny/best.pt"], "best.pt"),
        (["--text", "data/sample.txt", "--prompt", "x"], "not both"),
        (["--prompt", "some words", "--split", "val"], "--split"),
        (["--tokens", 193], "192 tokens at most"),
        (["--tokens", 1], "--tokens"),
        (["--draws", 0], "--draws"),
        (["--schedule", "qintic"], "quintic"),
        (["--fidelity", 2], "fidelity"),
        (["--schedule", "linear"] * 3, "two dials"),
        (["--out", "no/such/folder.html"], "cannot be written"),
        (["--out", "runs/tiny/best.pt"], "ends in .html"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(place, run, options, says):
    status, printed, error = run("read.py", "runs/tiny", *options)
    assert status == 2 and one_line(error) and says in error and not printed
    assert not (place / "runs" / "tiny" / "page.html").exists()


def test_what_is_no_run_is_named(place, run):
    for name in ("runs/none", "data", "configs/tiny.toml"):
        status, _, error = run("read.py", name)
        assert status == 2 and one_line(error) and name in error


# --------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    names = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """opened(path, width, link): a page from disk, which asks for nothing and has no error."""
    contexts, faults = [], []

    def open_page(path, width=1280, link="", **how):
        context = browser.new_context(viewport={"width": width, "height": 800}, **how)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda r: r.url.startswith(path.as_uri()) or faults.append(r.url))
        tab.goto(path.as_uri() + link)
        tab.wait_for_selector("body[data-ready]", timeout=20000)
        return tab

    yield open_page
    assert not faults
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def hostile(place, tmp_path_factory):
    """A page of the hostile text, 192 tokens of bytes."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text.txt").write_text(HOSTILE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        out = folder / "page.html"
        assert script_here("read.py", "runs/tiny", "--text", folder / "text.txt", "--out", out) == 0
    return out


SHOWN = ".view:not([hidden])"


def chosen(tab):
    return tab.evaluate("state.t")


def test_a_browser_shows_the_text_and_runs_nothing_of_it(hostile, opened):
    data, _ = data_of(hostile.read_text())
    tab = opened(hostile)
    spans = tab.locator(SHOWN + " .text span")
    assert spans.all_text_contents() == data["text"]
    assert tab.evaluate("document.images.length + document.querySelectorAll('.text b').length") == 0
    assert tab.title() == "A text, read by runs/tiny"


def test_no_script_runs_but_the_page_s_own(hostile, browser):
    """Even if a text became part of the page, which it does not."""
    tab = browser.new_page()
    tab.goto(hostile.as_uri())
    tab.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.hit = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hit = 2'>");
        document.body.insertAdjacentHTML("beforeend", "<p id=p style='color: red'>p</p>");
    }""")
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hit") is None
    assert tab.evaluate("getComputedStyle($('p')).color") != "rgb(255, 0, 0)"
    tab.close()


def test_clicks_and_keys_move_and_a_link_comes_back(hostile, opened):
    data, arrays = data_of(hostile.read_text())
    T, L, H = len(data["text"]), data["layers"], data["heads"]
    tab = opened(hostile)
    tab.locator(SHOWN + " .text span").nth(150).click()
    assert chosen(tab) == 150 and "t=150" in tab.url
    for key, t in (("ArrowLeft", 149), ("ArrowRight", 150), ("End", T - 1), ("Home", 0)):
        tab.keyboard.press(key)
        assert chosen(tab) == t
    tab.keyboard.press("ArrowDown")
    assert chosen(tab) > 10
    tab.keyboard.press("ArrowUp")
    assert chosen(tab) == 0
    # what the page says is what the arrays hold
    tab.locator(SHOWN + " .text span").nth(180).click()
    tab.select_option("#layer", index=0)
    tab.select_option("#head", index=1)
    share = arrays["fidelity0"].reshape(L, H, T)[0, 1, 180]
    title = tab.locator(SHOWN + " .cell.on").get_attribute("title")
    assert title == f"layer 1, head 2: {share:.3f} in the block, floor 0.000"
    # a sentence
    before = tab.locator(SHOWN + " .likely").text_content()
    tab.locator(SHOWN + " .owed button").first.click()
    assert tab.locator(SHOWN + " .likely").text_content().count("→") >= 10 > before.count("→")
    link = tab.url
    tab.keyboard.press("Escape")
    assert tab.locator(SHOWN + " .likely").text_content() == before
    # side by side, and the link
    tab.locator("#dials input").nth(2).check()
    assert tab.locator(SHOWN).count() == 2
    other = opened(hostile, link="#" + link.partition("#")[2])
    assert other.evaluate("[state.t, state.layer, state.head, state.dial]") == [180, 0, 1, 0]
    assert other.evaluate("state.sentence") >= 0
    other.evaluate("location.hash = '#t=7'")
    other.wait_for_function("state.t === 7")
    odd = opened(hostile, link="#t=99999&d=x&l=-1&h=%00&s=1e9")
    assert odd.evaluate("state.layer") == L - 1 and 0 <= chosen(odd) < T


def test_what_a_browser_reads_is_what_was_measured(a_page, opened, tmp_path):
    """Every number that the page can show, of every token, layer, head, sentence and dial."""
    _, excerpt, _, _, data = a_page
    (tmp_path / "page.html").write_text(fill(data), encoding="utf-8")
    tab, (_, arrays) = opened(tmp_path / "page.html"), data_of(fill(data))
    T, L, H, K, N = 60, 3, 3, data["keys"], data["likeliest"]
    ends = [end for _, end in excerpt.sentences[:-1]]
    depends = {t: max(x for _, x in tab.evaluate(f"influences(0, {t})")) for t in range(29, 59)}
    assert depends[chosen(tab)] == max(depends.values())  # the page opens at a telling token
    for dial in (0, 1):
        of = {name[:-1]: values for name, values in arrays.items() if name.endswith(str(dial))}
        for name in ("fidelity", "entropy"):
            shaped = of[name].reshape(L, H, T)
            shaped = np.concatenate((shaped, shaped.mean(1, keepdims=True)), 1)
            every = f"[...Array({L * (H + 1) * T}).keys()].map(i => measure('{name}', {dial}, "
            every += f"Math.floor(i / {(H + 1) * T}), Math.floor(i / {T}) % {H + 1}, i % {T}))"
            np.testing.assert_allclose(tab.evaluate(every), shaped.flatten())
        keys, roots = (of[name].reshape(L, H + 1, T, K) for name in ("keys", "roots"))
        for layer, head, t in ((0, 0, 0), (1, 2, 30), (2, 3, 59)):
            found = tab.evaluate(f"strongest({dial}, {layer}, {head}, {t})")
            wanted = zip(keys[layer, head, t], roots[layer, head, t] ** 2)
            np.testing.assert_allclose(found, [pair for pair in wanted if pair[1]])
        for t in range(T):
            before = [s for s, end in enumerate(ends) if end <= t]
            offset = [sum(T - end for end in ends[:s]) + t - ends[s] for s in before]
            found = tab.evaluate(f"influences({dial}, {t})")
            assert found == [[s, of["influence"][at]] for s, at in zip(before, offset)]
            for s, at in [(-1, None), *zip(before, offset)][-2:]:
                rows = tab.evaluate(f"nextTokens({dial}, {t}, {s})")
                ids = of["likely"][t * N : (t + 1) * N].astype(int).tolist()
                assert [row["id"] for row in rows[:N]] == ids
                true = [row["id"] for row in rows if row["isTrue"]]
                assert true == (data["tokens"][t + 1 : t + 2])
                p = 2 ** -of["bits"].reshape(T, N + 1)[t]
                assert [row["p"] for row in rows[:N]] == pytest.approx(p[:N].tolist())
                after = [row["after"] for row in rows]
                if at is None:
                    assert set(after) == {None}
                else:
                    wanted = 2 ** -of["after"].reshape(-1, N + 1)[at]
                    assert after[:N] == pytest.approx(wanted[:N].tolist())
                    assert of["new"][at] in [row["id"] for row in rows]
        assert tab.evaluate(f"[...numbers.rank{dial}]") == of["rank"].tolist()
        assert not tab.evaluate(f"[...Array({T}).keys()].some(t => reach({dial}, t))")  # an anchor
    # what the words say
    tab.evaluate("pick({ t: 55, dial: 0, sentence: -1 })")
    panel = tab.locator(SHOWN + " .panel").text_content()
    assert (
        "token 55 of this page. Its block: " in panel and "and the first token" in panel
    )  # the anchor
    assert f"rank {arrays['rank0'][55]:.0f}" in panel
    start = 55 - excerpt.lookback[55]
    said = tab.locator(SHOWN + " .owed .words").all_text_contents()
    ranked = sorted(tab.evaluate("influences(0, 55)"), key=lambda pair: -pair[1])
    shown = tab.locator(SHOWN + " .owed button > :nth-child(2)").all_text_contents()
    assert shown == [f"{x:.{2 if x < 9.995 else 1}f} bits" for _, x in ranked]
    for (s, _), words in zip(ranked, said):
        begin, end = excerpt.sentences[s]
        where = "outside" if end <= start else "partly in" if begin < start else "in"
        assert words.startswith(f"{where} the block: ")
    names = tab.evaluate("[...views[0].tokens].map(node => node.className)")
    for i, name in enumerate(names):
        assert ("mine" in name.split()) == (start <= i <= 55 or i == 0)
        assert ("later" in name.split()) == (i > 55)
    bars = [i for i, name in enumerate(names) if "start" in name.split()]
    assert bars == block_starts(excerpt.lookback)[1:].tolist()


def test_the_page_tells_the_reach(opened, tmp_path):
    """The first token that can change a prediction, where every layer is at 1."""
    model, text = small_model(max_lookback=300), (ROOT / "data" / "sample.txt").read_bytes()
    tokens = np.frombuffer(text, np.uint8).astype(int)
    known = background(tokens, BYTES)
    for method, window in (("semantic:closed", False), ("semantic", False), ("window:9", True)):
        excerpt = cut(Text("it", tokens, 4000, known, None), 60, BYTES, method, 300)
        lookback = np.arange(60) - np.maximum.accumulate(np.array([0, 7, 19, 33, 50]).repeat(12))
        excerpt = excerpt if window else excerpt._replace(lookback=lookback, marks=[])
        dials = two_dials(["localist", "quintic"], [1.0], {"fidelity": 1.0}, 3)
        data = measure(model, excerpt, BYTES, tokens, dials, 1)
        data |= {"run": "a", "partition": method, "max_lookback": 300, "seed": None}
        data |= {"command": "c", "commit": "c", "date": "d", "device": "cpu", "torch": "t"}
        (tmp_path / "page.html").write_text(fill(data), encoding="utf-8")
        tab = opened(tmp_path / "page.html")
        found = tab.evaluate("[...Array(60).keys()].map(t => reach(0, t))")
        assert found == reach(excerpt.lookback, [1.0] * 3).tolist() and max(found) > 30
        tab.evaluate("pick({ t: 55, dial: 0 })")
        panel = tab.locator(SHOWN + " .panel")
        said = f"nothing before token {found[55]}, {55 - found[55]} tokens back, can change it"
        assert said in panel.text_content()
        tab.evaluate("pick({ t: 55, dial: 1 })")
        assert "the whole text before it can change it" in panel.text_content()
        shown = tab.locator("#kind").text_content()
        assert ("was noticed" in shown) == (method == "semantic:closed")


def test_the_marks_name_the_blocks_and_stand_where_they_were_noticed(place, read_page, opened):
    data, _, html = read_page("runs/tiny")
    path = place / "marks.html"
    path.write_text(html, encoding="utf-8")
    tab = opened(path)
    found = tab.evaluate("""[...views[0].text.querySelectorAll(".mark")].map(mark => {
        let next = mark;
        while (!next.dataset.t) next = next.nextElementSibling;
        return [+next.dataset.t, mark.textContent] })""")
    starts = [0, *block_starts(np.array(data["lookback"]))[1:].tolist()]
    wanted = [[start, str(n)] for n, start in enumerate(starts, 1)]
    wanted += [[t, f"{starts.index(start) + 1}: {said}"] for t, start, said in data["marks"]]
    assert sorted(found) == sorted(wanted) and len(data["marks"]) > 1


def test_the_page_begins_with_its_token_in_sight_and_the_line_keeps_up(a_page, opened, tmp_path):
    """On a phone too, where the text has a box of its own."""
    data = {**a_page[-1], "text": [piece + "\n\n" for piece in a_page[-1]["text"]]}
    (tmp_path / "page.html").write_text(fill(data), encoding="utf-8")
    for width in (390, 1280):
        tab = opened(tmp_path / "page.html", width)
        tab.evaluate("$('legend').open = false")
        inside = """() => { const box = views[0].text.getBoundingClientRect();
            const at = views[0].tokens[state.t].getBoundingClientRect();
            const end = innerWidth < 400 ? box.bottom : innerHeight;  // of what scrolls
            return at.top >= box.top && at.bottom <= end }"""
        assert tab.evaluate(inside)
        tab.evaluate("pick({ t: 10 })")
        tab.locator(SHOWN + " .text span").nth(12).hover()
        assert tab.locator("#over").text_content().endswith("not read yet")
        height = tab.locator("#over").bounding_box()["height"]
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#over").text_content().startswith("token 11: ")
        tab.evaluate("(told = { dial: 0, t: 12 }, tell(), pick({ t: 13 }), 0)")
        assert "not read yet" not in tab.locator("#over").text_content()
        assert tab.locator("#over").bounding_box()["height"] == height


def test_a_page_does_not_jump_and_the_focus_stays(a_page, opened, tmp_path):
    """A text that is longer than the screen: only another token may move what is in sight."""
    data = {**a_page[-1], "text": [piece + "\n\n" for piece in a_page[-1]["text"]]}
    (tmp_path / "page.html").write_text(fill(data), encoding="utf-8")
    tab = opened(tmp_path / "page.html")
    assert tab.evaluate("scrollY") == 0
    box = tab.evaluate("views[0].tokens[state.t].getBoundingClientRect().bottom")
    assert box < 800  # the token that is chosen at first is in sight
    tab.locator(SHOWN + " .text").focus()
    tab.keyboard.press("End")
    assert tab.evaluate("scrollY") > 100 and chosen(tab) == 59
    tab.evaluate("scrollTo(0, 60)")
    tab.locator(SHOWN + " .cell").first.click()
    tab.keyboard.press("Escape")
    button = tab.locator(SHOWN + " .owed button").nth(1)
    button.evaluate("button => button.focus({ preventScroll: true })")
    tab.keyboard.press("Enter")
    assert tab.evaluate("scrollY") == 60 and tab.evaluate("state.sentence") >= 0
    tab.keyboard.press("Enter")  # the focus is still there
    assert tab.evaluate("state.sentence") == -1


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(hostile, opened, place, run, tmp_path, width):
    """Nor with 10,000 letters on one line. A finger moves as a mouse does."""
    (tmp_path / "long.txt").write_text("x" * 10_000)
    out = tmp_path / "long.html"
    assert run("read.py", "runs/tiny", "--text", tmp_path / "long.txt", "--out", out)[0] == 0
    for path in (hostile, out):
        tab = opened(path, width, has_touch=True)
        tab.locator(SHOWN + " .text span").nth(20).tap()
        assert chosen(tab) == 20
        for dial in range(3):
            tab.locator("#dials input").nth(dial).check()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints_without_its_tools(hostile, opened):
    tab = opened(hostile)
    tab.emulate_media(media="print", color_scheme="dark")
    assert not tab.locator("#tools").is_visible()
    assert tab.locator(SHOWN + " .panel").is_visible()
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(252, 251, 248)"
