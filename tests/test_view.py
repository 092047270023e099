"""The page shows what was measured, keeps text as text, and works in a browser, offline."""

import json
import math
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

import view
from conftest import ROOT, TINY, flags, script_here
from eval import attention_maps, evaluate, load, read_text
from locality import (
    SURE,
    ChangePoints,
    Partitioner,
    count_background,
    partition_text,
    reach,
    schedule,
)
from model import GPT, GPTConfig
from prepare_data import TextConfig, prepare
from report.blocks import block_moves, block_starts, liveliest
from report.excerpt import (
    Excerpt,
    Text,
    cut,
    draw_foreign,
    find_words,
    join_short,
    sentence_starts,
    walk,
)
from report.page import Page, fill, label
from support.files import TURNS, InputError
from test_page import data_of
from view import given_text, influence, measure, own_text, quick_page, turns

BYTES = [bytes([i]) for i in range(256)]
SAMPLE = (ROOT / "data" / "sample.txt").read_bytes()
HOSTILE = (
    '</script><img src=x onerror="alert(1)"><!-- \u202ereversed\u202c \x07\x1b[31m <b>bold</b>. '
    "&lt;i&gt; مرحبا بالعالم. 👩\u200d👩\u200d👧 naïve 中文。 {{x}} ${1} \\u003c @DATA@ @HASHES@. "
    "And so on.\n\n"
    "A new paragraph begins here. It says a little more. "
)
# what a page says of its making, and the config of a run
FACTS = {"run": "a <run>", "partition": "sentence", "max_lookback": 20, "plain": False}
FACTS |= {"command": "c", "commit": "c", "date": "d", "device": "cpu", "torch": "t", "seed": None}
FACTS |= {"when": "", "positions": view.POSITIONS}


def at_dial(arrays, dial):
    return {name[:-1]: values for name, values in arrays.items() if name.endswith(str(dial))}


def keys_of(shown, shape):
    """The keys and weights of each query, as dense arrays, (..., K): 0 where fewer are stored."""
    n = shown["n_keys"].astype(int)
    keys, weights = np.zeros((2, len(n), n.max()))
    stored = np.arange(n.max()) < n[:, None]
    keys[stored], weights[stored] = shown["keys"], shown["roots"] ** 2
    return [values.reshape(*shape, -1) for values in (keys.astype(int), weights, stored)]


def excerpt_of(text, T, vocabulary, config):
    """What a page shows of a text, with the partition of a config."""
    partition, cap = config["partition"], config["max_lookback"]
    partitioner = Partitioner(vocabulary, partition, cap, text.background)
    return cut(text, T, vocabulary, partitioner, partition.startswith("semantic"))


def schedules(pairs):
    return {"schedules": [{"name": name, "floor": floor} for name, floor in pairs]}


@pytest.fixture
def make_page(run, tmp_path):
    """make_page(run or weights, ...): the page of view.py as (data, arrays)."""

    def make_page(name, *options):
        status, _, error = run("view.py", name, *options, "--out", tmp_path / "page.html")
        assert status == 0, error
        return data_of((tmp_path / "page.html").read_text(encoding="utf-8"))

    return make_page


# --------------------------------------------------------------------------------------------------
# the numbers


@pytest.mark.parametrize("partition", [None, "block:24"])
def test_the_page_shows_what_eval_and_the_model_say(make_page, partition):
    """At each position of the slider, with the blocks of the run and with others."""
    data, arrays = make_page("runs/tiny", *(["--partition", partition] if partition else []))
    model, config, trained_on = load("runs/tiny")
    (tokens, lookback), vocabulary = read_text(
        config, trained_on, "test", partition or config["partition"]
    )
    at, last = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", data["shown"])[:2])
    T, L, H = last - at + 1, data["layers"], data["heads"]
    tokens = tokens[at : at + T]
    lookback = np.minimum(lookback[at : at + T], np.arange(T))
    assert data["lookback"] == lookback.tolist() and data["partition"] == partition or "semantic"
    assert [data["labels"][i] for i in data["tokens"]] == [label(vocabulary[t]) for t in tokens]
    assert data["schedules"] == [{"name": "quintic", "floor": 1.0}]
    assert data["positions"] == [0, 0.25, 0.5, 0.75, 1]
    x, back = (torch.tensor(a.astype(np.int64))[None] for a in (tokens, lookback))
    for i, (dial, position) in enumerate(zip(data["dials"], data["positions"], strict=True)):
        model.set_locality([position * full for full in schedule("quintic", L)])
        assert dial["locality"] == model.locality
        shown = at_dial(arrays, i)
        fidelity, entropy = (shown[name].reshape(L, H, T) for name in ("fidelity", "entropy"))
        floors = np.rint(65535 * np.array(dial["locality"])) / 65535
        assert (fidelity >= floors[:, None, None] - 1.1 / 65535).all()
        # eval scores T - 1 predictions
        results = evaluate(model, tokens, lookback, vocabulary)
        assert dial["perplexity"] == pytest.approx(results["perplexity"], rel=1e-5)
        means = fidelity[:, :, :-1].mean((1, 2)), entropy[:, :, :-1].mean((1, 2))
        for layer, share, bits in zip(results["layers"], *means):
            assert share == pytest.approx(layer["fidelity"], abs=1e-5)
            assert bits == pytest.approx(layer["entropy"], abs=2e-4)
        # every key that is drawn, and no stronger one is left out
        keys, weights, stored = keys_of(shown, (L, H + 1, T))
        for layer, a in enumerate(attention_maps(model, x, back)):
            a = torch.cat((a[0], a[0].mean(0, keepdim=True))).numpy()  # (H + 1, T, T)
            drawn = np.take_along_axis(a, keys[layer], -1) * stored[layer]
            assert np.abs(np.sqrt(drawn) - np.sqrt(weights[layer])).max() < 0.51 / 255
            best = -np.sort(-a, -1)[..., : keys.shape[-1]] * stored[layer]
            np.testing.assert_allclose(drawn, best, atol=1e-6)
        # what may come next
        bits = -predict(model, x, back).numpy() / math.log(2)
        names = [label(token) for token in vocabulary]
        for t in (0, 1, T // 2, T - 2):
            best = np.argsort(bits[t], kind="stable")[: data["likeliest"]]
            likely = shown["likely"].reshape(T, -1)[t].astype(int)
            assert [data["labels"][n] for n in likely] == [names[n] for n in best]
            shown_bits = shown["bits"].reshape(T, -1)[t]
            np.testing.assert_allclose(shown_bits, bits[t][[*best, tokens[t + 1]]], atol=3e-3)
            assert shown["rank"][t] == (bits[t] < bits[t][tokens[t + 1]]).sum() + 1


def small_model(**more):
    torch.manual_seed(3)
    shape = {"vocab_size": 256, "block_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**{**shape, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that predictions depend on the text
    return model


@torch.no_grad()
def predict(model, x, lookback):
    """The log probabilities, (T, V) in nats. x, lookback: (1, T)."""
    return model(x, lookback)[0][0].log_softmax(-1)


@torch.no_grad()
def by_definition(model, x, lookback, sentence, text, i):
    """KL in bits between p_i and p_i with a sentence replaced by a text, and the latter."""
    other = x.clone()
    for position in range(max(sentence[0], 1), sentence[1]):
        other[0, position] = text[position - sentence[0]]
    p, q = (model(context, lookback)[0][0, i].double() for context in (x, other))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return kl_div(q, p, log_target=True, reduction="sum").item() / math.log(2), q.exp()


@pytest.mark.parametrize("anchor", [False, True])
def test_influence_in_one_pass_is_the_definition_in_two(anchor):
    model = small_model(anchor=anchor)
    model.set_locality([0.0, 0.5, 1.0])
    x = torch.randint(256, (1, 40))
    lookback = torch.tensor([[i % 9 for i in range(40)]])
    log_p = predict(model, x, lookback)
    for sentence in ((0, 5), (5, 17), (17, 39)):
        begin, end = sentence
        foreign = torch.randint(256, (3, end - begin))
        bits, p = influence(model, x, lookback, log_p, sentence, foreign)
        assert bits.shape == (3, 40 - end) and p.shape == (40 - end, 256)
        for i in range(end, 40):
            expected = [by_definition(model, x, lookback, sentence, text, i) for text in foreign]
            assert bits[:, i - end].tolist() == pytest.approx([e[0] for e in expected], 1e-3, 1e-5)
            torch.testing.assert_close(p[i - end], (sum(e[1] for e in expected) / 3).float())
        assert bits.max() > 1e-4  # a layer below 1 reaches every sentence
        same = x[:, begin:end].repeat(2, 1)
        assert influence(model, x, lookback, log_p, sentence, same)[0].abs().max() < 1e-6
    # if every layer is at 1, a sentence has influence only in its block, tokens 9 ... 17
    model.set_locality([1.0] * 3)
    log_p, foreign = predict(model, x, lookback), torch.randint(256, (2, 9))
    for end in (14, 18):
        bits, _ = influence(model, x, lookback, log_p, (9, end), foreign[:, : end - 9])
        assert (bits[:, : 18 - end] > 1e-4).all() and bits[:, 18 - end :].max() < 1e-9


@pytest.fixture(scope="module")
def measured():
    """A model with an anchor and three heads, and what a page shows of it: (model, excerpt, drawn,
    dials, data)."""
    model = small_model(anchor=True, n_head=3, n_embd=48, max_lookback=20)
    tokens = np.random.default_rng(4).integers(97, 103, 60)
    tokens[[9, 10, 23, 24, 35, 36, 48, 49]] = list(b". " * 4)
    tokens[[11, 25, 37, 50]] = list(b"ABCD")
    excerpt = excerpt_of(Text("it", tokens, 0, None, None), 60, BYTES, FACTS)
    assert len(excerpt.sentences) == 5
    pairs, _, dials = turns(["quintic", "localist"], [0.8, 0.3], {}, 3)
    foreign = np.array(list(b"One. And another, longer. More. And so on and on it goes. " * 5))
    drawn = draw_foreign(foreign, BYTES, excerpt.sentences[:-1], 3)
    before = model.locality
    data = measure(model, excerpt, BYTES, foreign, dials, 3) | FACTS | schedules(pairs)
    assert model.locality == before
    return model, excerpt, drawn, dials, data


def test_the_page_shows_the_influence_of_its_sentences(measured):
    """And its sign: what a sentence adds to log2 p of the likeliest tokens and the actual one."""
    model, excerpt, drawn, dials, data = measured
    _, arrays = data_of(fill(data))
    x, lookback = (torch.tensor(a)[None] for a in (excerpt.tokens, excerpt.lookback))
    names = [label(byte) for byte in BYTES]
    assert len(dials) == 9
    for dial, locality in enumerate(dials):
        model.set_locality(locality)
        at, shown = 0, at_dial(arrays, dial)
        before = predict(model, x, lookback).numpy() / math.log(2)  # log2 p
        for (begin, end), texts in zip(excerpt.sentences[:-1], drawn):
            for i in (end, 59):
                pairs = [by_definition(model, x, lookback, (begin, end), t, i) for t in texts]
                bits, p = sum(x for x, _ in pairs) / 3, sum(q for _, q in pairs).numpy() / 3
                slot = at + i - end
                assert shown["influence"][slot] ** 2 == pytest.approx(bits, rel=5e-3, abs=1e-5)
                assert shown["new_bits"][slot] == pytest.approx(-np.log2(p.max()), abs=3e-3)
                assert data["labels"][int(shown["new"][slot])] == names[p.argmax()]
                likely = shown["likely"].reshape(60, -1)[i].astype(int)
                ids = [names.index(data["labels"][k]) for k in likely]
                ids += excerpt.tokens[i + 1 : i + 2].tolist()
                change = shown["change"].reshape(-1, data["likeliest"] + 1)[slot]
                expected = before[i][ids] - np.log2(p[ids])
                np.testing.assert_allclose(change[: len(ids)], expected, atol=3e-3)
            at += 60 - end
        assert at == len(shown["influence"])


def test_a_small_influence_is_stored_and_only_a_certified_one_is_exactly_zero(monkeypatch):
    """With closed blocks and every layer at 1."""
    model, tokens = small_model(), np.arange(60) % 50 + 60
    lookback = np.arange(60) - np.array([0, 20, 40]).repeat(20)
    excerpt = Excerpt("", tokens, lookback, [], [(at, at + 10) for at in range(0, 60, 10)])
    *_, dials = turns(["localist"], None, {"floor": 1.0}, 3)
    data = measure(model, excerpt, BYTES, 255 - tokens, dials, 2)
    first = reach(lookback, [1.0] * 3)
    for dial in range(5):
        shown, at = at_dial(data_of(fill(data))[1], dial), 0
        for _, end in excerpt.sentences[:-1]:
            stored = shown["influence"][at : at + 60 - end]
            changes = shown["change"].reshape(-1, 11)[at : at + 60 - end]
            certified = (first[end:] >= end) & (dial == 4)
            assert (stored[certified] == 0).all() and (changes[certified] == 0).all()
            assert (stored[~certified] > 0).sum() >= 0.7 * (~certified).sum()
            at += 60 - end

    def faint(model, idx, lookback, log_p, sentence, foreign):
        return torch.full((1, 60 - sentence[1]), 2e-7), log_p[sentence[1] :].exp()

    monkeypatch.setattr(view, "influence", faint)
    data = measure(model, excerpt, BYTES, tokens, dials[:1], 1)
    assert (data_of(fill(data))[1]["influence0"] > 0).all()


def test_evidence_is_the_odds_of_the_change_point_model_and_the_cap_has_none(monkeypatch):
    tokens = np.frombuffer(SAMPLE[:9000], np.uint8)
    background = count_background(tokens, BYTES)
    chances, chance_later = [], ChangePoints.chance_later

    def recorded(self, *where):
        chances.append(chance_later(self, *where))
        return chances[-1]

    monkeypatch.setattr(ChangePoints, "chance_later", recorded)
    for partition, cap in (("semantic", 65535), ("semantic", 190), ("sentence", 65535)):
        chances.clear()
        lookback, moves = walk(tokens, Partitioner(BYTES, partition, cap, background))
        walked = np.array(chances)
        stream, streamed = Partitioner(BYTES, partition, cap, background), []
        for token in tokens:
            stream.push([token])
            streamed += stream.moves[1:]
        sure = [move for move in moves if move[2] is not None]
        assert sure == [move for move in streamed if move[2] is not None]
        block = 0
        for (token, start, bits), (until, _, _) in zip(moves, [*moves[1:], (len(tokens), 0, 0)]):
            assert start > block
            if bits is not None:
                assert token - block <= cap  # otherwise the cap has decided
                likely = 2**bits / (1 + 2**bits)
                assert likely > SURE and min(abs(walked - likely)) < 1e-9
            block = start
            inside = np.arange(token, until)
            assert (inside - lookback[token:until] == np.maximum(start, inside - cap)).all()
        assert bool(sure) == (partition == "semantic")
        assert (len(sure) == len(moves)) == (partition == "semantic" and cap == 65535)


@pytest.mark.parametrize("partition", ["semantic", "sentence", "window:30", "block:64"])
def test_an_excerpt_has_the_blocks_that_were_prepared(partition):
    """Even from the middle of a text of several documents."""
    vocabulary = [*BYTES, b"<|endoftext|>"]
    documents = [list(SAMPLE[a:b]) for a, b in ((0, 5000), (9000, 12000), (3000, 8000))]
    tokens = np.array([*documents[0], 256, *documents[1], 256, *documents[2]])
    background = count_background(tokens, vocabulary)
    config = FACTS | {"partition": partition, "max_lookback": 300}
    lookback = partition_text(tokens, vocabulary, partition, 300, background)
    _, moves = walk(tokens, Partitioner(vocabulary, partition, 300, background))
    moves = {move[:2]: move[2] for move in moves}
    for start in (0, 4900, 7000, len(tokens) - 400, *block_starts(lookback)[:20].tolist()):
        excerpt = excerpt_of(Text("it", tokens, start, background, None), 300, vocabulary, config)
        assert excerpt.tokens.tolist() == tokens[start : start + 300].tolist()
        expected = np.minimum(lookback[start : start + 300], np.arange(300))
        assert excerpt.lookback.tolist() == expected.tolist()
        for token, block, words in excerpt.marks:
            assert partition == "semantic" and 0 < block <= token < 300
            assert token - excerpt.lookback[token] == block  # true from here on
            assert lookback[start + token] != lookback[start + token - 1] + 1  # but not before
            bits = moves[start + token, start + block]
            sure = "> 40 bits" if bits and bits > 39.9 else f"{bits or 0:.1f} bits"
            assert words == ("cap" if bits is None else sure)
    # a joined text no longer says where a document ends: the prepared lookback counts
    prepared = (np.arange(len(tokens)) % 77).astype(np.uint16)
    text = Text("it", tokens, 4900, background, None, prepared)
    excerpt = excerpt_of(text, 300, vocabulary, config)
    assert excerpt.lookback.tolist() == np.minimum(prepared[4900:5200], np.arange(300)).tolist()


def test_the_liveliest_place_shows_the_most_blocks():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, T = rng.integers(2, 300), int(rng.integers(2, 100))
        block = np.maximum.accumulate(np.where(rng.random(n) < 0.05, np.arange(n) - 3, 0)).clip(0)
        lookback = (np.arange(n) - block).astype(np.uint16)
        moves = list(zip(*block_moves(lookback)))
        fits = [0, *(start for _, start in moves if start <= n - T)]
        seen = [sum(at < start and token < at + T for token, start in moves) for at in fits]
        assert liveliest(lookback, T) == fits[seen.index(max(seen))]


def test_foreign_texts_begin_with_a_sentence_and_are_not_the_same_twice():
    foreign = np.array(list(b"One thing. Two things. Three things. Four things. Five things."))
    starts = [bytes(foreign[i:].tolist()) for i in sentence_starts(foreign, BYTES)]
    assert len(starts) == 5
    for texts, length in zip(draw_foreign(foreign, BYTES, [(0, 7), (7, 20)], 3), (7, 13)):
        drawn = [bytes(text.tolist()) for text in texts]
        assert texts.shape == (3, length) and len(set(drawn)) == 3
        assert all(any(start.startswith(text) for start in starts) for text in drawn)
    longer = draw_foreign(foreign, BYTES, [(0, 200)], 7)[0]  # than the whole text: it repeats
    assert longer.shape == (7, 200)


def test_words_are_found_at_the_token_where_they_begin():
    rng = random.Random(3)
    vocabulary = [b"a", b"b", b" ", b"\n", b" a", b"ab ", b"\r\n", b"\t"]
    for _ in range(200):
        ids = np.array([rng.randrange(len(vocabulary)) for _ in range(40)])
        tokens = [vocabulary[i] for i in ids]
        match = re.search(r"a\s+b", b"".join(tokens).decode())
        ends = np.cumsum([len(token) for token in tokens])
        at = next((i for i, end in enumerate(ends) if match and end > match.start()), None)
        assert find_words(ids, vocabulary, " a \n b ") == at


def test_what_the_slider_turns():
    config = {"schedule": "quintic", "floor": 0.5}

    def pairs(names=None, floors=None, config=config):
        shown, _, dials = turns(names, floors, config, 3)
        full = [schedule(name, 3, floor) for name, floor in shown]
        expected = [[f * x for x in locality] for locality in full for f in (0.25, 0.5, 0.75, 1)]
        assert dials == [[0.0] * 3, *expected]  # 0 is the same for both
        return shown

    assert pairs() == [("quintic", 0.5)]
    assert pairs(["linear"], [0.8]) == [("linear", 0.8)]
    assert pairs(["linear", "cubic"]) == [("linear", 0.5), ("cubic", 0.5)]
    assert pairs(["linear", "cubic"], [1.0, 0.2]) == [("linear", 1.0), ("cubic", 0.2)]
    assert pairs(None, [1.0, 0.2]) == [("quintic", 1.0), ("quintic", 0.2)]
    assert pairs(["linear", "linear"]) == [("linear", 0.5)]
    # the dial of distributed is 0 everywhere, which every page shows
    assert pairs(config={"schedule": "distributed", "floor": 1.0}) == [("quintic", 1.0)]
    assert pairs(["distributed", "linear"]) == [("linear", 0.5)]
    with pytest.raises(InputError, match="two schedules"):
        pairs(["linear"] * 3)


def test_sentences_cover_the_excerpt_and_are_not_too_short():
    rng = random.Random(5)
    for _ in range(300):
        T = rng.randrange(2, 700)
        starts = [0, *sorted(rng.sample(range(1, T), rng.randrange(0, min(T, 300))))]
        joined = join_short(starts, T)
        assert [begin for begin, _ in joined] == [0, *(end for _, end in joined[:-1])]
        assert joined[-1][1] == T and {begin for begin, _ in joined} <= set(starts)
        assert all(end - begin >= max(T / 32, 2) for begin, end in joined[:-1])
        assert len(joined) <= 33 and (len(joined) > 1 or starts[-1] < T / 32 + 2)


@pytest.mark.parametrize("layers, heads, most", [(4, 4, 2e6), (12, 12, 8e6)])
def test_the_size_of_a_page(layers, heads, most, monkeypatch):
    """With random weights, whose attention compresses worst, and as many sentences as possible."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 512, layers, heads, 4 * heads, max_lookback=256)).eval()
    with torch.no_grad():
        for layer in model.h:
            layer.attn.c_attn.weight.mul_(4)
    tokens, foreign = np.random.default_rng(0).integers(97, 123, (2, 512))
    lookback = np.minimum(np.arange(512), np.arange(512) % 100)
    excerpt = Excerpt("", tokens, lookback, [], join_short(range(0, 512, 16), 512))
    *_, dials = turns(["quintic"], [1.0], {}, layers)
    generator = torch.Generator().manual_seed(0)

    def numbers(model, idx, lookback, log_p, sentence, foreign):  # as many, without the passes
        p = torch.randn(512 - sentence[1], 256, generator=generator).softmax(-1)
        return torch.rand(1, 512 - sentence[1], generator=generator), p

    monkeypatch.setattr(view, "influence", numbers)
    data = measure(model, excerpt, BYTES, foreign, dials, 1)
    n_keys = data_of(fill(data))[1]["n_keys4"]
    assert n_keys.mean() > 3.9
    assert most / 2 < len(fill(data | FACTS)) < most


# --------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture(scope="module")
def hostile(place, tmp_path_factory):
    """A page of the hostile text, whose file has a hostile name: 192 tokens of bytes."""
    folder = tmp_path_factory.mktemp("hostile")
    text, out = folder / "<img src=x>\u202e.txt", folder / "page.html"
    text.write_text(HOSTILE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert script_here("view.py", "runs/tiny", "--text", text, "--out", out) == 0
    return out


def test_a_hostile_text_is_data_and_nothing_else(hostile):
    html, empty = hostile.read_text(encoding="utf-8"), fill({})
    data, _ = data_of(html)
    assert data["shown"].startswith("<img src=x>\\u202e.txt, tokens 0 ")
    assert "\\u202e" in data["command"]
    assert not set(TURNS) & set(json.dumps(data, ensure_ascii=False))
    assert html.count("<script") == empty.count("<script") == 2
    assert html.count("</script") == 2 and "<img" not in html and "onerror" not in empty
    shown = "".join(data["text"])
    assert shown.startswith("</script><img src=x onerror=") and "\\u202ereversed" in shown
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_the_examples_work(run, tmp_path):
    lines = re.findall(r"^ +python (view.py runs/quickstart.*)", view.__doc__, re.M)
    assert len(lines) == 5
    for line in lines:
        script, *words = shlex.split(line.replace("quickstart", "tiny"), comments=True)
        assert run(script, *words, "--out", tmp_path / "page.html")[0] == 0, line


def test_which_text_is_shown_and_which_is_foreign(make_page, tmp_path):
    words = "--split", "train", "--from", "Colin  Cherry", "--tokens", 50
    data, _ = make_page("runs/tiny", *words)
    assert "".join(data["text"]).startswith("Colin Cherry") and len(data["text"]) == 50
    assert data["shown"].startswith("train split, tokens ")
    # in the middle of a text, the blocks are those of the text
    _, config, trained_on = load("runs/tiny")
    text = prepare(TextConfig.of(config), trained_on)
    _, lookback = text.split("train")
    at = int(re.search(r"\d[\d,]*", data["shown"])[0].replace(",", ""))
    assert data["lookback"] == np.minimum(lookback[at : at + 50], np.arange(50)).tolist()
    data, _ = make_page("runs/tiny", "--prompt", "Two words.")
    assert data["shown"] == "a prompt, all 10 tokens" and "".join(data["text"]) == "Two words."
    (tmp_path / "long.txt").write_text("one line, no end, " * 600)
    data, _ = make_page("runs/tiny", "--text", tmp_path / "long.txt")
    assert data["shown"] == "long.txt, tokens 0 … 191 of 10,800"
    # the foreign text: another split, and for weights the sample text
    for split, other in (("train", "test"), ("val", "test"), ("test", "val")):
        assert own_text(text, split, 50).foreign.tolist() == text.split(other)[0].tolist()
    given = given_text(config, text, "x y")
    assert given.foreign.tolist() == text.split("test")[0].tolist()
    weights = given_text({"tokenizer": "bytes"}, None, "x y")
    assert bytes(weights.foreign.tolist()) == SAMPLE
    with pytest.raises(InputError, match="a prompt: tiktoken cannot split this text"):
        given_text({"tokenizer": "sample"}, None, "One." + " " * 1_100_000)


def test_the_page_is_written_to_the_run_and_named_last(place, run):
    for _ in range(2):  # a page is replaced
        status, printed, _ = run("view.py", "runs/tiny", "--tokens", 30)
        shown, last = printed.splitlines()
        assert status == 0 and shown.startswith("test split, tokens ")
        path = re.fullmatch(r"page: (runs/tiny/view-.*\.html) \(\d.\d MB\), for any browser", last)[
            1
        ]
    page = place / path
    data, _ = data_of(page.read_text())
    assert data["command"] == "python view.py runs/tiny --tokens 30" and data["commit"]
    page.write_text("<!doctype html>\n<title>Somebody's own page</title>")
    status, _, error = run("view.py", "runs/tiny", "--tokens", 30)
    assert status == 2 and f"{path} is not a page of view.py" in error
    assert "own page" in page.read_text()
    page.unlink()


def test_no_page_takes_the_name_of_another(place, run, tmp_path):
    """The name says what is on the page; the same command has the same name."""
    small_model().save_pretrained(tmp_path / "weights")
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "x y.txt").write_text("One thing. And another. And so on. More of it.")
    words = tmp_path / "weights", "--text", tmp_path / "x y.txt"
    expected = {
        "quintic-semantic": ("runs/tiny",),
        "quintic_0.5-semantic": ("runs/tiny", "--floor", 0.5),
        "localist-semantic": ("runs/tiny", "--schedule", "localist"),
        "quintic-localist-semantic_closed": (
            *("runs/tiny", "--schedule", "quintic", "--schedule", "localist"),
            *("--partition", "semantic:closed"),
        ),
        "quintic-block_24-val": ("runs/tiny", "--partition", "block:24", "--split", "val"),
        "quintic-semantic-[0-9a-f]{6}": ("runs/tiny", "--tokens", 30),
        "quintic-semantic-[0-9a-f]{6} ": ("runs/tiny", "--tokens", 31),
        "quintic-semantic-[0-9a-f]{6}  ": ("runs/tiny", "--from", "the "),
        "quintic-semantic-prompt-[0-9a-f]{6}": ("runs/tiny", "--prompt", "One. Two."),
        "quintic-semantic-prompt-[0-9a-f]{6} ": ("runs/tiny", "--prompt", "Two. One."),
        "quintic-semantic-x_y-[0-9a-f]{6}": ("runs/tiny", *words[1:]),
        "quintic-semantic-x_y-[0-9a-f]{6} ": ("runs/tiny", "--text", tmp_path / "a" / "x y.txt"),
        "weights-quintic-semantic-x_y-[0-9a-f]{6}": words,
    }
    names = []
    for pattern, command in expected.items():
        status, printed, error = run("view.py", *command, "--draws", 2)
        assert status == 0, error
        path = place / re.search(r"page: (.*\.html)", printed)[1]
        assert path.parent == (place if command is words else place / "runs" / "tiny")
        assert re.fullmatch(f"view-{pattern.strip()}\\.html", path.name), path.name
        names.append(path)
    assert len(set(names)) == len(expected)
    for path in names:
        path.unlink()


def test_the_pages_of_a_run_go_when_it_is_replaced(train, run):
    folder = train("viewed", max_steps=2)
    assert run("view.py", folder, "--tokens", 20)[0] == 0
    (page,) = folder.glob("view-*.html")
    for name in ("view-mine.html", f"{page.name}.77.tmp"):
        (folder / name).write_text("")
    assert run("train.py", folder, "--resume", "--max_steps", 3)[0] == 0
    assert page.exists() and not Path(f"{page}.77.tmp").exists()
    status, _, error = run("train.py", TINY, *flags(out=folder, max_steps=2), "--overwrite")
    assert status == 0, error
    assert not page.exists() and (folder / "view-mine.html").exists()


def test_a_notebook_shows_the_page_and_keeps_it(place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    status, _, error = run(
        *("view.py", "runs/tiny", "--prompt", "One. Two. Three.", "--schedule", "linear"),
        *("--partition", "sentence", "--out", tmp_path / "a.html"),
    )
    assert status == 0, error
    page = view.page("runs/tiny", "One. Two. Three.", schedule="linear", partition="sentence")
    assert page.save(tmp_path / "b.html") == tmp_path / "b.html"
    pages = [data_of((tmp_path / name).read_text())[0] for name in ("a.html", "b.html")]
    command = "view.page(run='runs/tiny', text='One. Two. Three.', partition='sentence', "
    assert pages[1].pop("command") == f"{command}schedule='linear')"
    pages[0].pop("command")
    dates = [page.pop("date") for page in pages]
    assert pages[0] == pages[1] and all(dates)
    frame = page._repr_html_()
    assert re.match(r'<iframe sandbox="allow-scripts" style="[^"<>]*" srcdoc="', frame)
    assert frame.count('"') == 6 and frame.count("<") == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(place)
    assert page.save() == page.path and page.path.parent == Path("runs/tiny")
    page.path.unlink()
    with pytest.raises(InputError, match="must end in .html"):
        page.save("best.pt")
    with pytest.raises(InputError, match="split must be one of"):
        view.page(place / "runs" / "tiny", split="tset")


@pytest.mark.parametrize("error", [InputError("not finite"), RuntimeError("out of memory")])
def test_a_page_that_fails_leaves_the_dial_where_it_was(place, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.chdir(place)
    monkeypatch.setattr(view, "look", fail)
    model, config, trained_on = load("runs/tiny")
    data = prepare(TextConfig.of(config), trained_on)
    with pytest.raises(type(error)):
        quick_page(tmp_path / "page.html", model.train(), config, data, 3)
    assert model.locality == schedule("quintic", 2) and model.training


def test_pages_of_two_runs_have_two_names(place, monkeypatch):
    monkeypatch.chdir(place)
    shutil.copytree("runs/tiny", "runs/twin")
    paths = [view.page(f"runs/{name}", tokens=9, draws=1).path for name in ("tiny", "twin")]
    assert paths[0] != paths[1] and paths[0].name == paths[1].name
    shutil.rmtree("runs/twin")


def test_a_quick_page_leaves_a_training_as_it_was(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    model, config, trained_on = load("runs/tiny")
    data = prepare(TextConfig.of(config), trained_on)
    config |= {"out": "runs/<x>", "max_steps": 900, "schedule": "linear"}
    model.train().set_locality([0.25, 0.75])
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for step in (0, 300, 300):
        quick_page(tmp_path / f"{step}.html", model, config, data, step)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.random.get_state()[1].tolist() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert model.locality == [0.25, 0.75]
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    shown, arrays = data_of((tmp_path / "300.html").read_text())
    assert shown["when"] == "step 300 of 900" and shown["run"] == "runs/<x>"
    assert shown["shown"].startswith("val split, ") and shown["draws"] == 0
    first, _ = data_of((tmp_path / "0.html").read_text())
    assert first["when"] == "before training" and first["numbers"] == shown["numbers"]
    assert shown["positions"] == [0, 1]
    assert [dial["locality"] for dial in shown["dials"]] == [[0, 0], schedule("linear", 2)]
    model.set_locality(schedule("linear", 2))
    at = int(re.search(r"\d[\d,]*", shown["shown"])[0].replace(",", ""))
    tokens, lookback = (a[at : at + 192] for a in data.split("val"))
    results = evaluate(model, tokens, lookback, BYTES)
    assert shown["dials"][1]["perplexity"] == pytest.approx(results["perplexity"], rel=1e-5)
    assert not len(arrays["influence1"])


def test_weights_need_a_text_and_plain_code_shows_the_same(run, make_page, tmp_path):
    small_model().save_pretrained(tmp_path / "weights")
    words = tmp_path / "weights", "--prompt", "The mind is. It was. So be it."
    data, arrays = make_page(*words)
    assert data["schedules"] == [{"name": "quintic", "floor": 1.0}]
    assert data["seed"] is None and data["partition"] == "semantic"
    plain, same = make_page(*words, "--plain")
    assert plain["lookback"] == data["lookback"] and same.keys() == arrays.keys()
    for name in ("fidelity0", "entropy1", "bits1", "influence4", "change4"):
        np.testing.assert_allclose(same[name], arrays[name], atol=5e-3)
    data, _ = make_page(*words, "--partition", "block:9")
    assert data["lookback"] == [i % 9 for i in range(30)]
    status, _, error = run("view.py", tmp_path / "weights")
    assert status == 2 and error.startswith("error: ") and "--text" in error


@pytest.mark.parametrize(
    "words, message",
    [
        ("runs/tiny --from 'no such words'", "does not contain the words"),
        ("runs/tiny --from ' '", "does not contain the words"),
        ("runs/tiny --prompt a", "at least 2 tokens"),
        ("runs/tiny --prompt ''", "at least 2 tokens"),
        ("runs/tiny --text nothing.txt", "nothing.txt: cannot be read"),
        ("runs/tiny --text runs/tiny/best.pt", "best.pt"),
        ("runs/tiny --text data/sample.txt --prompt x", "not both"),
        ("runs/tiny --prompt 'some words' --split val", "--split"),
        ("runs/tiny --tokens 193", "2 ... 192 tokens, not 193"),
        ("runs/tiny --tokens 1", "2 ... 192 tokens, not 1"),
        ("runs/tiny --draws 0", "draws must be"),
        ("runs/tiny --schedule qintic", "quintic"),
        ("runs/tiny --schedule distributed", "begins at distributed; give another"),
        ("runs/tiny --floor 2", "floor must be"),
        ("runs/tiny --schedule linear --schedule linear --schedule linear", "two schedules"),
        ("runs/tiny --partition blok:3", "partition must be one of"),
        ("runs/tiny --partition ''", "partition must be one of"),
        ("runs/tiny --partition block:1300", "reaches back 1299 tokens"),
        ("runs/tiny --out no/such/folder.html", "cannot be written"),
        ("runs/tiny --out runs/tiny/best.pt", "must end in .html"),
        ("runs/tiny --device abacus", "abacus"),
        ("runs/none", "runs/none"),
        ("data", "data"),
        ("configs/tiny.toml", "configs/tiny.toml"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(place, run, words, message):
    pages = sorted((place / "runs" / "tiny").glob("*.html"))
    status, printed, error = run("view.py", *shlex.split(words))
    assert status == 2 and message in error and not printed
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted((place / "runs" / "tiny").glob("*.html")) == pages


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
def open_page(browser):
    """open_page(path, width, link): a tab with a page from disk that requests nothing and has no
    errors."""
    contexts, faults = [], []

    def open_page(path, width=1280, link="", **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
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
    for context in contexts:
        words = context.pages[0].locator("body").inner_text()
        faults += re.findall(r".*undefined.*|.*NaN.*|.*\[object.*", words)
        context.close()
    assert not faults


@pytest.fixture
def open_data(open_page, tmp_path):
    """open_data(data, width, link): a tab with the page that shows these data."""

    def open_data(data, *options):
        path = tmp_path / "page.html"
        path.write_text(fill(data), encoding="utf-8")
        return open_page(path, *options)

    return open_data


def visible(tab, selector=""):
    """The elements that a selector finds in the views that are not hidden."""
    return tab.locator(f".view:not([hidden]) {selector}")


def test_a_browser_shows_the_text_and_runs_nothing_of_it(hostile, open_page):
    data, _ = data_of(hostile.read_text())
    tab = open_page(hostile)
    assert visible(tab, ".text span").all_text_contents() == data["text"]
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


def test_clicks_and_keys_move_and_a_link_comes_back(hostile, open_page):
    data, arrays = data_of(hostile.read_text())
    T, L, H = len(data["text"]), data["layers"], data["heads"]
    tab = open_page(hostile)
    visible(tab, ".text span").nth(150).click()
    assert tab.evaluate("state.t") == 150 and "t=150" in tab.url
    for key, t in (("ArrowLeft", 149), ("ArrowRight", 150), ("End", T - 1), ("Home", 0)):
        tab.keyboard.press(key)
        assert tab.evaluate("state.t") == t
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("state.t") > 10
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("state.t") == 0
    # the page says what the arrays hold
    visible(tab, ".text span").nth(180).click()
    tab.select_option("#layer", index=0)
    tab.select_option("#head", index=1)
    share = arrays["fidelity4"].reshape(L, H, T)[0, 1, 180]
    title = visible(tab, ".cell.on").get_attribute("title")
    assert title == f"layer 1, head 2: {share:.3f} in the block, floor 0.000"
    # a sentence
    likely = visible(tab, ".likely")
    before = likely.text_content()
    visible(tab, ".owed button").first.click()
    assert likely.text_content().count("→") >= 10 > before.count("→")
    link = tab.url
    tab.keyboard.press("Escape")
    assert likely.text_content() == before
    # the link
    other = open_page(hostile, link="#" + link.partition("#")[2])
    assert other.evaluate("[state.t, state.layer, state.head, state.position]") == [180, 0, 1, 4]
    assert other.evaluate("state.sentence") >= 0
    other.evaluate("location.hash = '#t=7'")
    other.wait_for_function("state.t === 7")
    odd = open_page(hostile, link="#t=99999&d=x&l=-1&h=%00&s=1e9&k=1&w=-1&c=x")
    assert odd.evaluate("state.layer") == L - 1 and 0 <= odd.evaluate("state.t") < T
    assert odd.evaluate("[state.position, state.schedule, state.word]") == [4, 0, -1]


def test_the_dial_is_a_slider(measured, open_data):
    """With a mouse, the keyboard and a link; everything on the page moves with it."""
    *_, dials, data = measured
    tab = open_data(data)
    slider = tab.locator("#dial")
    assert slider.get_attribute("max") == "4" and slider.input_value() == "4"

    def locality(n=0):
        column = visible(tab).nth(n).locator("tbody td.number:nth-child(2)")
        return [float(x) for x in column.all_text_contents()]

    def seen():
        return [visible(tab, part).first.inner_html() for part in (".text", ".heads", ".owed")]

    tab.evaluate("pick({ t: 55, layer: 1 })")
    views = {4: seen()}
    slider.focus()
    for position in (3, 2, 1, 0):
        tab.keyboard.press("ArrowLeft")
        assert tab.evaluate("[state.position, state.t]") == [position, 55]  # not another token
        assert locality() == [round(x, 3) for x in dials[position]]
        assert f"d={data['positions'][position]}" in tab.url
        perplexity = data["dials"][position]["perplexity"]
        words = f"perplexity {float(f'{perplexity:.4g}'):,.10g}"
        assert words in visible(tab, ".reading p").text_content()
        views[position] = seen()
    for part in range(3):
        assert len({view[part] for view in views.values()}) == 5
    assert "relative to dial 0" not in visible(tab, ".reading p").text_content()
    # the other schedule: the same at 0, and its own dials above that
    tab.locator("#schedules input").nth(1).check()
    assert seen() == [
        part.replace("-0-", "-1-").replace("0-", "1-") if i else part
        for i, part in enumerate(views[0])
    ]
    box = slider.bounding_box()
    tab.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2)
    assert tab.evaluate("state.position") == 2 and locality() == [0.15] * 3
    tab.locator("#schedules input").nth(2).check()  # side by side
    assert visible(tab).count() == 2
    assert [locality(0), locality(1)] == [[round(x, 3) for x in dials[i]] for i in (2, 6)]
    link = "#" + tab.url.partition("#")[2]
    names = ["quintic: late layers local, at most 0.8", "localist: every layer local, at most 0.3"]
    assert visible(tab, "h2").all_text_contents() == names
    again = open_data(data, 1280, link)
    assert again.evaluate("[state.position, state.schedule]") == [2, 2]
    assert visible(again).count() == 2 and again.locator("#dial").input_value() == "2"


def test_what_a_browser_reads_is_what_was_measured(measured, open_data):
    """Every number that the page can show, of every token, layer, head, sentence and dial."""
    _, excerpt, _, dials, data = measured
    tab, (_, arrays) = open_data(data), data_of(fill(data))
    T, L, H, N = 60, 3, 3, data["likeliest"]
    ends = [end for _, end in excerpt.sentences[:-1]]
    first = np.cumsum([0, *(T - end for end in ends)]).tolist()  # values before each sentence's
    for dial in range(len(dials)):
        stored = at_dial(arrays, dial)
        for name in ("fidelity", "entropy"):
            shaped = stored[name].reshape(L, H, T)
            shaped = np.concatenate((shaped, shaped.mean(1, keepdims=True)), 1)
            every = f"[...Array({L * (H + 1) * T}).keys()].map(i => measure('{name}', {dial}, "
            every += f"Math.floor(i / {(H + 1) * T}), Math.floor(i / {T}) % {H + 1}, i % {T}))"
            np.testing.assert_allclose(tab.evaluate(every), shaped.flatten())
        keys, weights, drawn = keys_of(stored, (L, H + 1, T))
        for layer, head, t in ((0, 0, 0), (1, 2, 30), (2, 3, 59)):
            pairs = tab.evaluate(f"strongest({dial}, {layer}, {head}, {t})")
            expected = zip(*(values[layer, head, t] for values in (keys, weights, drawn)))
            np.testing.assert_allclose(pairs, [pair for *pair, there in expected if there])
        losses = stored["bits"].reshape(T, N + 1)[:-1, -1]
        read = tab.evaluate(f"[...Array({T}).keys()].map(t => loss({dial}, t))")
        assert read == [0, *losses.tolist()]
        for t in range(0, T, 1 + dial):
            slots = [(s, first[s] + t - end) for s, end in enumerate(ends) if end <= t]
            pairs = tab.evaluate(f"influences({dial}, {t})")
            assert pairs == [[s, stored["influence"][at] ** 2] for s, at in slots]
            for s, at in [(-1, None), *slots][-2:]:
                rows = tab.evaluate(f"nextTokens({dial}, {t}, {s})")
                ids = stored["likely"][t * N : (t + 1) * N].astype(int).tolist()
                assert [row["id"] for row in rows[:N]] == ids
                actual = [row["id"] for row in rows if row["isActual"]]
                assert actual == data["tokens"][t + 1 : t + 2]
                bits = stored["bits"].reshape(T, N + 1)[t]
                assert [row["p"] for row in rows[:N]] == pytest.approx((2 ** -bits[:N]).tolist())
                after = [row["after"] for row in rows]
                if at is None:
                    assert set(after) == {None}
                else:
                    change = stored["change"].reshape(-1, N + 1)[at]
                    expected = 2 ** -(bits + change)
                    assert after[:N] == pytest.approx(expected[:N].tolist())
                    assert stored["new"][at] in [row["id"] for row in rows]
                    read = [tab.evaluate(f"change({dial}, {s}, {t}, {n})") for n in (0, N)]
                    assert read == change[[0, N]].tolist()
        assert tab.evaluate(f"[...numbers.rank{dial}]") == stored["rank"].tolist()
        assert not tab.evaluate(f"[...Array({T}).keys()].some(t => reach({dial}, t))")  # an anchor


def test_what_the_words_of_a_page_say(measured, open_data):
    _, excerpt, _, dials, data = measured
    tab, (_, arrays) = open_data(data), data_of(fill(data))
    assert 2 * tab.evaluate("state.t") >= 58
    assert tab.locator("#lead").text_content() == (
        "Each color is a block, one sentence. At dial 1, in the last layer, a token spends at "
        "least 80 % of its attention inside its own color."
    )
    tab.evaluate("pick({ t: 55 })")
    panel = visible(tab, ".panel").text_content()
    assert "is token 55. Its block: " in panel and "and the first token" in panel
    assert f"rank {arrays['rank4'][55]:.0f}" in panel
    start = 55 - excerpt.lookback[55]
    rows = visible(tab, ".heads tbody tr").count()
    names = visible(tab, ".heads th").all_text_contents()
    assert rows == 3 and names == (
        [*("", "locality", "head 1", "head 2", "head 3", "mean", "fidelity")]
        + [f"layer {n}" for n in (1, 2, 3)]
    )
    ranked = sorted(tab.evaluate("influences(4, 55)"), key=lambda pair: -pair[1])
    for (s, _), words in zip(ranked, visible(tab, ".owed .words").all_text_contents(), strict=True):
        begin, end = excerpt.sentences[s]
        where = "outside" if end <= start else "partly in" if begin < start else "in"
        assert words.startswith(f"{where} the block: ")
    names = [name.split() for name in tab.evaluate("views[0].tokens.map(node => node.className)")]
    for i, name in enumerate(names):
        assert ("mine" in name) == (start <= i <= 55 or i == 0)
        assert ("later" in name) == (i > 55)
    bars = [i for i, name in enumerate(names) if "start" in name]
    assert bars == block_starts(excerpt.lookback)[1:].tolist()


def test_a_sentence_shows_what_it_adds_to_a_word_that_is_picked(measured, open_data):
    _, excerpt, _, dials, data = measured
    tab, (_, arrays) = open_data(data), data_of(fill(data))
    tab.evaluate("pick({ t: 55 })")
    rows = tab.evaluate("nextTokens(4, 55, -1)")
    n = next(i for i, row in enumerate(rows) if not row["isActual"] and i > 0)
    tab.locator(".view:not([hidden]) .likely button").nth(n).click()
    assert tab.evaluate("state.word") == rows[n]["id"] and f"w={rows[n]['id']}" in tab.url
    heads = visible(tab, ".owed li:first-child .token").all_text_contents()
    came = data["labels"][data["tokens"][56]]
    assert heads == [came, data["labels"][rows[n]["id"]]]
    ranked = sorted(tab.evaluate("influences(4, 55)"), key=lambda pair: -pair[1])
    ends = [end for _, end in excerpt.sentences[:-1]]
    first = np.cumsum([0, *(60 - end for end in ends)])
    change = arrays["change4"].reshape(-1, data["likeliest"] + 1)
    buttons = visible(tab, ".owed button")
    for i, (s, _) in enumerate(ranked):
        for column, k in ((3, data["likeliest"]), (4, n)):
            x = change[first[s] + 55 - ends[s], k]
            words = buttons.nth(i).locator(f":nth-child({column})").first.text_content()
            sign = "−" if x < 0 else "+"
            assert words == ("< ±0.01" if abs(x) < 0.005 else f"{sign}{abs(x):.2f}")
    link = "#" + tab.url.partition("#")[2]
    assert open_data(data, 1280, link).evaluate("state.word") == rows[n]["id"]
    tab.keyboard.press("Escape")
    assert tab.evaluate("state.word") == -1
    tab.locator(".view:not([hidden]) .likely button").nth(n).press("Enter")
    assert tab.evaluate("state.word") == rows[n]["id"]
    tab.evaluate("pick({ t: 56 })")
    assert tab.evaluate("state.word") == -1  # it belongs to the token


def test_zero_is_certified_or_not_shown(measured, open_data):
    """A small number keeps its first digits, and one that could be 0 by chance is not called 0."""
    tab = open_data(measured[-1])
    for x, words in (
        *((0, "< 0.001"), (1e-9, "< 0.001"), (0.00099, "< 0.001"), (0.0011, "0.001")),
        *((0.0042, "0.004"), (0.0123, "0.012"), (0.0949, "0.095"), (0.31, "0.31"), (12.3, "12.3")),
    ):
        assert tab.evaluate(f"small({x})") == words
    for x, words in ((0, "< ±0.01"), (-0.0049, "< ±0.01"), (0.306, "+0.31"), (-1.2, "−1.20")):
        assert tab.evaluate(f"signed({x})") == words


def test_the_page_tells_the_reach(open_data):
    """The first token that can change a prediction, and the sentences that cannot."""
    model, tokens = small_model(max_lookback=300), np.frombuffer(SAMPLE, np.uint8).astype(int)
    background = count_background(tokens, BYTES)
    pairs, _, dials = turns(["localist", "quintic"], [1.0], {}, 3)
    for partition, window in (("semantic:closed", False), ("semantic", False), ("window:9", True)):
        config = FACTS | {"partition": partition, "max_lookback": 300} | schedules(pairs)
        excerpt = excerpt_of(Text("it", tokens, 4000, background, None), 60, BYTES, config)
        excerpt = excerpt._replace(sentences=[(at, at + 6) for at in range(0, 60, 6)])
        lookback = np.arange(60) - np.maximum.accumulate(np.array([0, 7, 19, 33, 50]).repeat(12))
        excerpt = excerpt if window else excerpt._replace(lookback=lookback, marks=[])
        tab = open_data(measure(model, excerpt, BYTES, tokens, dials, 1) | config)
        first = tab.evaluate("[...Array(60).keys()].map(t => reach(4, t))")
        assert first == reach(excerpt.lookback, [1.0] * 3).tolist() and max(first) > 30
        tab.evaluate("pick({ t: 55 })")
        panel, sizes = visible(tab, ".panel"), visible(tab, ".owed button > :nth-child(2)")
        certified = f"nothing before token {first[55]}, {55 - first[55]} tokens back, can change it"
        assert certified in panel.text_content()
        ranked = sorted(tab.evaluate("influences(4, 55)"), key=lambda pair: -pair[1])[:8]
        for (s, x), words in zip(ranked, sizes.all_text_contents(), strict=True):
            assert (words == "0, certified") == (6 * (s + 1) <= first[55])
            assert words != "0, certified" or x == 0
        assert "0, certified" in sizes.all_text_contents()
        for changes in ("{ position: 3 }", "{ position: 4, schedule: 1 }"):
            tab.evaluate(f"pick({changes})")
            assert "the whole text before can change it" in panel.text_content()
            assert not set(sizes.all_text_contents()) & {"0", "0.00", "0, certified"}
        kind = tab.locator("#kind").text_content()
        assert ("was noticed" in kind) == (partition == "semantic:closed")
        lead = tab.locator("#lead").text_content()
        assert "At dial 1, in the last layer, a token may look only inside " in lead  # quintic
        assert ("the blue" in lead) == window
        tab.evaluate("pick({ schedule: 0 })")
        assert "At dial 1 a token may look only inside " in tab.locator("#lead").text_content()


def test_pointing_shows_sources_and_what_depends_on_a_sentence(measured, open_data):
    """Of the token or the sentence under the mouse, without a click."""
    _, excerpt, _, _, data = measured
    tab = open_data(data)
    tab.evaluate("pick({ t: 55 })")
    chosen = visible(tab, ".panel").inner_html()

    def classes(name):
        all_names = tab.evaluate("views[0].tokens.map(node => node.className.split(' '))")
        return [i for i, names in enumerate(all_names) if name in names]

    def lines():
        line = "node => +node.style.getPropertyValue('--u')"
        return tab.evaluate(f"views[0].tokens.map({line})")

    def thick(x):
        return 0 if x < 0.001 else max(1, min(5, 3 * x**0.5))

    visible(tab, ".text span").nth(27).hover()
    assert classes("on") == [27] and classes("later") == list(range(28, 60))
    keys = [key for key, _ in tab.evaluate("strongest(4, 2, MEAN, 27)")]
    assert classes("look") == sorted(keys)
    begin, end = next(pair for pair in excerpt.sentences if pair[1] > 27)
    s = excerpt.sentences.index((begin, end))
    assert classes("then") == list(range(end, 60))
    depends = dict(tab.evaluate("influences(4, 27)"))
    for i, line in enumerate(lines()):
        source = next(n for n, pair in enumerate(excerpt.sentences) if pair[1] > i)
        x = tab.evaluate(f"influence(4, {s}, {i})") if i >= end else depends.get(source, 0)
        assert line == pytest.approx(thick(x), abs=0.006)
    assert visible(tab, ".panel").inner_html() == chosen and tab.evaluate("state.t") == 55
    assert tab.locator("#over").text_content().startswith("token 27: ")
    tab.mouse.move(1, 1)
    assert classes("on") == [55] and not classes("then")
    visible(tab, ".owed button").last.hover()
    ranked = sorted(tab.evaluate("influences(4, 55)"), key=lambda pair: -pair[1])
    assert classes("then") == list(range(excerpt.sentences[ranked[-1][0]][1], 60))
    tab.mouse.move(1, 1)
    assert not classes("then")


def test_the_text_can_be_colored_by_its_loss(measured, open_data):
    tab = open_data(measured[-1])
    assert tab.locator("#scale").is_hidden() and visible(tab, ".text.loss").count() == 0
    tab.select_option("#color", value="loss")
    assert tab.locator("#scale").is_visible() and visible(tab, ".text.loss").count() == 1
    shares = tab.evaluate("views[0].tokens.map(node => +node.style.getPropertyValue('--l'))")
    losses = tab.evaluate("[...Array(60).keys()].map(t => loss(4, t))")
    most = int(re.fullmatch(r"(\d+) bits", tab.locator("#darkest").text_content())[1])
    lighter = np.mean(tab.evaluate("data.tokens.map((_, t) => loss(0, t))") < np.float64(most))
    assert 0.88 <= lighter <= 1
    assert shares == pytest.approx([min(1, x / most) for x in losses], abs=6e-4)
    colors = tab.evaluate("views[0].tokens.map(n => getComputedStyle(n).backgroundColor)")
    assert len(set(colors)) == len(set(shares)) > 3
    again = open_data(measured[-1], 1280, "#" + tab.url.partition("#")[2])
    assert again.locator("#color").input_value() == "loss"


def test_a_quick_page_says_what_would_add_the_rest(place, open_page, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    model, config, trained_on = load("runs/tiny")
    data = prepare(TextConfig.of(config), trained_on)
    quick_page(tmp_path / "quick.html", model, config, data, 0)
    tab = open_page(tmp_path / "quick.html")
    assert tab.title() == "A text, read by runs/tiny, before training"
    assert "python view.py runs/tiny adds what" in visible(tab, ".panel").text_content()
    assert visible(tab, ".owed").count() == 0 and not tab.locator(".depends").first.is_visible()
    for t in (0, 100, 191):
        tab.evaluate(f"pick({{ t: {t}, position: {t % 2} }})")
        assert visible(tab, ".likely tr").count() >= 10


def test_the_frame_of_a_notebook_shows_the_page(measured, browser):
    context = browser.new_context()
    tab, faults = context.new_page(), []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.set_content(f"<body>{Page(measured[-1], 'x.html')._repr_html_()}</body>")
    frame = tab.frame_locator("iframe")
    frame.locator("body[data-ready]").wait_for(timeout=20000)
    frame.locator(".view:not([hidden]) .text span").nth(30).click()
    assert "is token 30." in frame.locator(".view:not([hidden]) .panel").text_content()
    frame.locator("#dial").press("ArrowLeft")
    assert "dial 0.75" in frame.locator(".view:not([hidden]) .reading p").text_content()
    assert not faults
    context.close()


def test_a_certified_floor_is_never_rounded_up(measured, open_data):
    tab = open_data(measured[-1])
    for floor, words in ((0, "0 %"), (0.125, "12.5 %"), (0.3, "30 %"), (0.99999, "99.9 %")):
        assert tab.evaluate(f"atLeast({floor})") == words
    assert tab.evaluate("[atLeast(1), atLeast(0.5), atLeast(0.29)]") == ["100 %", "50 %", "29 %"]


def test_the_marks_name_the_blocks_where_they_were_noticed(make_page, open_data):
    data, _ = make_page("runs/tiny")
    t = np.arange(192)  # blocks that begin at 40 and 100 are noticed at 60 and 130
    start = np.where(t < 60, 0, np.where(t < 130, 40, 100))
    data |= {"lookback": (t - start).tolist(), "marks": [[60, 40, "2.5 bits"], [130, 100, "cap"]]}
    tab = open_data(data)
    marks = tab.evaluate("""[...views[0].text.querySelectorAll(".mark")].map(mark => {
        let next = mark;
        while (!next.dataset.t) next = next.nextElementSibling;
        return [+next.dataset.t, mark.textContent] })""")
    starts = [0, *block_starts(np.array(data["lookback"]))[1:].tolist()]
    expected = [[start, str(n)] for n, start in enumerate(starts, 1)]
    expected += [[t, f"{starts.index(start) + 1}: {words}"] for t, start, words in data["marks"]]
    assert sorted(marks) == sorted(expected) and [130, "3: cap"] in marks


def test_a_long_page_begins_with_its_token_in_sight_and_does_not_jump(measured, open_data):
    """On a phone too, where the text has its own box. Only another token may scroll the page."""
    data = {**measured[-1], "text": [piece + "\n\n" for piece in measured[-1]["text"]]}
    for width in (390, 1280):
        tab = open_data(data, width)
        assert tab.evaluate("scrollY") == 0
        tab.evaluate("$('legend').open = false")
        assert tab.evaluate("""() => { const box = views[0].text.getBoundingClientRect();
            const at = views[0].tokens[state.t].getBoundingClientRect();
            const end = innerWidth < 400 ? box.bottom : innerHeight;  // of what scrolls
            return at.top >= box.top && at.bottom <= end }""")
        # the line about the token under the mouse is up to date and keeps its height
        tab.evaluate("pick({ t: 10 })")
        visible(tab, ".text span").nth(12).hover()
        line = tab.locator("#over")
        assert line.text_content().startswith("token 12: ")
        height = line.bounding_box()["height"]
        tab.keyboard.press("ArrowRight")
        assert line.text_content().startswith("token 11: ")
        assert line.bounding_box()["height"] == height
    visible(tab, ".text").focus()
    tab.keyboard.press("End")
    assert tab.evaluate("scrollY") > 100 and tab.evaluate("state.t") == 59
    tab.evaluate("scrollTo(0, 60)")
    visible(tab, ".cell").first.click()
    tab.keyboard.press("Escape")
    button = visible(tab, ".owed button").nth(1)
    button.evaluate("button => button.focus({ preventScroll: true })")
    tab.keyboard.press("Enter")
    assert tab.evaluate("scrollY") == 60 and tab.evaluate("state.sentence") >= 0
    tab.keyboard.press("Enter")  # the focus is still there
    assert tab.evaluate("state.sentence") == -1


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(hostile, open_page, make_page, tmp_path, width):
    """Not even 10,000 letters on one line. A tap selects a token, as a click does."""
    (tmp_path / "long.txt").write_text("x" * 10_000)
    make_page("runs/tiny", "--text", tmp_path / "long.txt")
    for path in (hostile, tmp_path / "page.html"):
        tab = open_page(path, width, has_touch=True)
        visible(tab, ".text span").nth(20).tap()
        assert tab.evaluate("state.t") == 20
        for position in range(5):
            tab.evaluate(f"pick({{ position: {position}, color: 'loss' }})")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [390, 1280])
def test_two_schedules_fit_side_by_side_and_the_text_comes_first(measured, open_data, width):
    tab = open_data(measured[-1], width, "#k=2")
    assert visible(tab).count() == 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    text, tools = visible(tab, ".text").first.bounding_box(), tab.locator("#tools").bounding_box()
    assert (text["y"] < tools["y"]) == (width == 390)


def test_blank_lines_leave_no_gaps(measured, open_data):
    """A run of newlines, in one token or several, is a single break; the text stays as it is."""
    text = ["word "] * 60
    text[20], text[30], text[31], text[32], text[40] = "\n", "\n\n", "\n", "\n\n \n", ".\n"
    tab = open_data({**measured[-1], "text": text})
    assert visible(tab, ".text span").all_text_contents() == text
    tops = tab.evaluate("views[0].tokens.map(node => node.getClientRects()[0].top)")
    steps = {t: tops[t + 1] - tops[t] for t in (20, 32, 40)}
    line = min(b - a for a, b in zip(tops, tops[1:]) if b > a + 6)
    assert steps[20] == pytest.approx(line, abs=2) == pytest.approx(steps[40], abs=2)
    assert line + 2 < steps[32] < 1.6 * line
    tab.evaluate("pick({ t: 31 })")
    assert visible(tab, ".text .on i").count() == 1


def test_it_prints_without_its_tools(hostile, open_page):
    tab = open_page(hostile)
    tab.emulate_media(media="print", color_scheme="dark")
    assert not tab.locator("#tools").is_visible() and visible(tab, ".panel").is_visible()
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(253, 252, 250)"
