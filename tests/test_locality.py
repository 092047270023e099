"""Schedules and partitions: causal, streaming, capped, and unharmed by any text."""

import json
import random
import re

import numpy as np
import pytest

from conftest import ROOT
from locality import (
    PARTITIONS,
    SCHEDULES,
    Partition,
    Partitioner,
    check_causal,
    count_background,
    parse_partition,
    partition_names,
    partition_text,
    reach,
    schedule,
)
from prepare_data import TextConfig
from support.files import InputError
from support.sentences import NOT_AN_END, any_rule, first_bytes
from support.settings import usage

BYTES = [bytes([i]) for i in range(256)]
SAMPLE = (ROOT / "data" / "sample.txt").read_bytes()
NAMES = [name + ":30" * entry.takes_n for name, entry in PARTITIONS.items()]

# joined at random, these make every kind of sentence end, and many that only look like one
WORDS = """the cat sat on mat whale sea ship Mr. Dr. U.S. e.g. No. 5 A. J. vol. Paris Whale Ship
    He I""".split()
SIGNS = "“ ” ‘ ’ „ « » › … é Э это Конец. Да. α Ω 。 」 「 海 鯨 は ！ ？ ． ３ ｃ ، ؟ ۔ । ॥ ។ ། ։"
SIGNS += " Ա ბ ა \u00a0 \u2003 \u3000 \u2028 \u2029 🙂 ‣ •"
PIECES = [piece.encode() for piece in [*WORDS, *SIGNS.split(" ")]]
PIECES += [b". . . ", b": ", b"II. ", b"[...] ", b'" ', b'"\n', b"\xc2", b"\xe2\x80"]
PIECES += [b". ", b".\n", b".\n\n", b"! ", b"? ", b"...", b"\n", b"\n\n", b" ", b"  ", b"\t"]
PIECES += [b"\r\n", b", ", b"; ", b"'", b"''", b'"', b"``", b")", b"(", b"_", b"- ", b"* ", b"# "]
PIECES += [b"12. ", b"1) ", b"<|endoftext|>", b"<|endo", b"ftext|>", b"\x00", b"\xff", b"\xe2\x82"]
PIECES += [b"\x80", b"x" * 120, b"y " * 70, *[b". ", b" ", b" ", b"\n"] * 6]


def random_text(seed, n=400):
    rng = random.Random(seed)
    return b"".join(p + rng.choice([b"", b" "]) for p in rng.choices(PIECES, k=n))


def random_tokens(seed, text):
    """A text cut at random, even within characters: (its tokens, uint16; the vocabulary)."""
    rng = random.Random(seed)
    vocabulary, tokens, ids = [b""], [], {}
    while text:
        n = rng.choice([1, 1, 2, 3, 4, 6, 9, 30])
        piece, text = text[:n], text[n:]
        if piece not in ids:
            ids[piece] = len(vocabulary)
            vocabulary.append(piece)
        tokens.append(ids[piece])
        if rng.random() < 0.02:
            tokens.append(0)  # a token without bytes
    return np.array(tokens, np.uint16), vocabulary


def as_bytes(text):
    text = text if isinstance(text, bytes) else text.encode()
    return np.frombuffer(text, np.uint8).astype(np.uint16)


def blocks_of(tokens, partition, max_lookback=65535, background=None, vocabulary=BYTES):
    """The token at which each token's block begins, and the lookback, (n,) int64 each."""
    lookback = partition_text(tokens, vocabulary, partition, max_lookback, background).astype(int)
    return np.arange(len(tokens)) - lookback, lookback


BACKGROUND = count_background(
    as_bytes("whale ship sea cat mat Paris это " * 30 + "конец 海 鯨 " * 4), BYTES
)

# --------------------------------------------------------------------------------------------------
# schedules, and what partitions refuse


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_layer", [1, 2, 12])
def test_schedule(name, n_layer):
    degree = {"localist": 0, "linear": 1, "quadratic": 2, "cubic": 3, "quartic": 4, "quintic": 5}
    for floor in (1.0, 0.6):
        got = schedule(name, n_layer, floor)
        if name == "distributed":
            assert got == [0.0] * n_layer
        elif n_layer == 1:
            assert got == [floor]
        elif name == "reversed":
            assert got == schedule("quintic", n_layer, floor)[::-1]
        else:  # a schedule that a user adds, too
            assert got == sorted(got) and got[0] >= 0 and got[-1] == floor
        if name in degree and n_layer > 1:
            depth = np.arange(n_layer) / (n_layer - 1)
            assert got == pytest.approx(floor * depth ** degree[name])


@pytest.mark.parametrize(
    "name, layers",
    [
        ("interleaved:2", "lglglg"),
        ("interleaved:2", "glglg"),
        ("interleaved:3", "llgllg"),
        ("interleaved:9", "lllllg"),
        ("interleaved:2:local", "glglgl"),
        ("interleaved:2:local", "lglgl"),
        ("interleaved:3:local", "lgllgl"),
        ("late_half", "gggll"),
        ("early_half", "llggg"),
        ("late_half", "ggglll"),
        ("early_half", "lllggg"),
        *((name, "l") for name in ("interleaved:2", "interleaved:2:local", "late_half")),
    ],
)
def test_which_layers_of_a_rival_are_local(name, layers):
    for floor in (1, 0.25):
        got = schedule(name, len(layers), floor)
        assert got == [floor * (x == "l") for x in layers]
        assert all(isinstance(x, float) for x in got)


def test_with_six_layers_these_rivals_and_linear_have_as_much_locality():
    for name in ("interleaved:2", "interleaved:2:local", "late_half", "early_half", "linear"):
        assert sum(schedule(name, 6)) == pytest.approx(3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(((name, 12), "unknown") for name in ("interleaved", "interleaved:1", "interleaved:two")),
        (("interleaved:2:", 12), "unknown"),
        (("interleaved:\u0662", 12), "unknown"),  # an Arabic digit
        (("late", 12), "late_half"),
        (("quintc", 12), "quintic"),  # the nearest name
        (("", 12), "unknown schedule"),
        ((None, 12), "unknown schedule"),
        (("linear", 3, 0), "floor"),
        (("linear", 3, 1.01), "floor"),
        (("linear", 3, "1"), "floor"),
        (("linear", 3, float("nan")), "floor"),
    ],
)
def test_schedule_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        schedule(*arguments)


REFUSED = ["", "semantics", "window", "window:", "window:0", "window:-1", "window:2.5", None, 3]
REFUSED += ["window:" + "9" * 5000, "block:x", "sentence:3", "semantic:open", "sentence:closed"]
REFUSED += ["aligned", "aligned:0", "shifted:matched"]


def test_impossible_partitions_and_lookbacks_are_refused():
    for partition in REFUSED:
        with pytest.raises(InputError, match="partition must be"):
            parse_partition(partition)
        with pytest.raises(InputError, match="partition must be"):
            partition_text(as_bytes("a b"), BYTES, partition, 8)
    for max_lookback in (0, -1, 65536):
        with pytest.raises(InputError, match="max_lookback must be"):
            partition_text(as_bytes("a b"), BYTES, "semantic", max_lookback)


# --------------------------------------------------------------------------------------------------
# what holds for every text


@pytest.mark.parametrize("partition", NAMES)
@pytest.mark.parametrize("seed", range(12))
def test_streaming_agrees_and_nothing_leaks(partition, seed):
    """Tokens one by one, in random pieces or all at once, with this future or another one: the
    lookback is the same."""
    rng = random.Random(seed)
    max_lookback, background = rng.choice([1, 3, 20, 100, 1000]), [None, BACKGROUND][seed % 2]
    tokens, vocabulary = random_tokens(seed, random_text(seed))
    rules = vocabulary, partition, max_lookback, background
    whole, i = partition_text(tokens, *rules), np.arange(len(tokens))
    assert whole.dtype == np.uint16 and whole.shape == tokens.shape
    assert (whole <= np.minimum(i, max_lookback)).all()
    if "window" not in partition:  # the start of the block never moves back
        assert (np.diff(i - whole.astype(int)) >= 0).all()
    for sizes in ([1], [0, 1, 2, 5, 50, 300]):
        stream, at, got = Partitioner(*rules), 0, []
        while at < len(tokens):
            n = rng.choice(sizes)
            got.append(stream.push(tokens[at : at + n].tolist()))
            at += n
        assert (np.concatenate(got) == whole).all()
    for _ in range(20):
        at = rng.randrange(len(tokens))
        other = np.append(tokens[:at], rng.choices(range(len(vocabulary)), k=30))
        assert (partition_text(other, *rules)[:at] == whole[:at]).all()


ODD = [b"", b"a", b"\x00" * 3000, b"\n" * 3000, b" " * 3000, b"\xff\xfe" * 2000, b"word " * 2000]
ODD += [b"x" * 5000, "鯨".encode() * 2000, b"." * 3000, b". '" * 1500, b"<|endoftext|>" * 50]


@pytest.mark.parametrize("partition", NAMES)
@pytest.mark.parametrize("text", ODD)
def test_odd_texts(partition, text):
    tokens, stream = as_bytes(text), Partitioner(BYTES, partition, 300, BACKGROUND)
    whole = partition_text(tokens, BYTES, partition, 300, BACKGROUND)
    assert [int(stream.push([t])[0]) for t in tokens] == whole.tolist()


@pytest.mark.parametrize("partition", NAMES)
def test_chunks_and_processes_agree_with_one_push(partition, monkeypatch):
    vocabulary = [*BYTES, b"<|endoftext|>"]
    texts = [as_bytes(random_text(seed).replace(b"<|", b"")) for seed in range(12)]
    tokens = np.concatenate([np.append(text, 256) for text in texts])
    whole = Partitioner(vocabulary, partition, 100, BACKGROUND).push(tokens)
    for chunk in (97, 700):
        monkeypatch.setattr("locality.CHUNK", chunk)
        assert (partition_text(tokens, vocabulary, partition, 100, BACKGROUND) == whole).all()
    monkeypatch.setattr("locality.SHARE", 3000)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    assert (partition_text(tokens, vocabulary, partition, 100, BACKGROUND) == whole).all()
    with pytest.raises(InputError):  # an error in a child process is raised here
        partition_text(np.append(tokens, 257), vocabulary, partition, 100, BACKGROUND)


@pytest.mark.parametrize("partition", NAMES)
def test_memory_maps_are_read_and_written(partition, tmp_path):
    as_bytes(random_text(3)).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    out = np.memmap(tmp_path / "lookback.bin", np.uint16, "w+", shape=tokens.shape)
    assert partition_text(tokens, BYTES, partition, 50, BACKGROUND, out=out) is out
    assert (out == Partitioner(BYTES, partition, 50, BACKGROUND).push(tokens)).all()


@pytest.mark.parametrize("partition", ["semantic", "sentence"])
@pytest.mark.parametrize("background", [None, BACKGROUND])
def test_documents_are_independent(partition, background):
    one, two = (random_text(seed).replace(b"<|", b"") for seed in (1, 2))
    both = as_bytes(one + b"<|endoftext|>" + two)
    both = partition_text(both, BYTES, partition, 50, background)
    second = partition_text(as_bytes(two), BYTES, partition, 50, background)
    assert (both[len(one) + 13 :] == second).all()


def test_background_is_bounded_and_does_not_depend_on_the_tokens(monkeypatch):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(60_000)]
    many = count_background(as_bytes(" ".join(words)), BYTES)
    assert len(many["words"]) == 30_000 and len(json.dumps(many)) < 1 << 20
    text = random_text(7).replace(b"<|", b"")
    background = count_background(as_bytes(text), BYTES)
    assert count_background(*random_tokens(7, text)) == background
    monkeypatch.setattr("locality.CHUNK", 97)
    assert count_background(as_bytes(text), BYTES) == background


# --------------------------------------------------------------------------------------------------
# each kind of partition


def test_windows_and_fixed_blocks():
    tokens = as_bytes(random_text(0))
    i = np.arange(len(tokens))
    for partition, lookback in (("window:7", np.minimum(i, 6)), ("block:5", i % 5)):
        for cap in (100, 4, 2):
            expected = np.minimum(lookback, cap)
            assert (partition_text(tokens, BYTES, partition, cap) == expected).all()


@pytest.mark.parametrize("partition", ["semantic:closed", "sentence", "block:9", "aligned:40"])
@pytest.mark.parametrize("seed", range(6))
def test_no_token_of_a_closed_block_looks_further_back_than_the_block(partition, seed):
    background = [None, BACKGROUND][seed % 2]
    for max_lookback in (8, 40, 150, 3000):
        tokens, vocabulary = random_tokens(seed, random_text(seed, 900))
        start, lookback = blocks_of(tokens, partition, max_lookback, background, vocabulary)
        assert (start[start] == start).all()  # the first token of a block sees only itself
        assert len(np.unique(start)) > 3 and lookback.max() <= max_lookback
        # the cap cuts: a full block ends
        assert (np.diff(np.append(np.unique(start), len(tokens))) <= max_lookback + 1).all()


def test_semantic_blocks_are_not_closed_and_closed_ones_are_within_them():
    tokens = as_bytes(SAMPLE[:30_000])
    background = count_background(tokens, BYTES)
    start, _ = blocks_of(tokens, "semantic", background=background)
    closed, _ = blocks_of(tokens, "semantic:closed", background=background)
    assert len(np.unique(closed)) > 10 and (start[start] < start).any()
    assert (closed >= start).all()
    moved = (np.flatnonzero(np.diff(start)) + 1).tolist()
    for cap in (65535, 400, 150):
        # a cut: a block that begins after the last cut is noticed, or the cap is reached
        cuts = [0]
        for token in [*moved, len(tokens)]:
            while cuts[-1] + cap + 1 < token:
                cuts.append(cuts[-1] + cap + 1)
            if token in moved and start[token] > cuts[-1]:
                cuts.append(token)
        closed, _ = blocks_of(tokens, "semantic:closed", cap, background)
        assert np.unique(closed).tolist() == cuts
        assert len(cuts) < len(np.unique(start)) or cap < 65535  # not every move is a cut


def test_aligned_blocks_begin_with_the_first_sentence_after_n_tokens():
    text = "".join(f"Here are {'so many ' * (i % 7)}words. " for i in range(200))
    for n in (90, len("Here are words. Here are so many words. ")):
        start, _ = blocks_of(as_bytes(text), f"aligned:{n}")
        expected = [0]
        for begin in first_bytes(text.encode()):
            if begin - expected[-1] >= n:
                expected.append(begin)
        assert np.unique(start).tolist() == expected and len(expected) > 20
    assert expected[1] == n  # exactly


def test_shifted_blocks_have_the_right_lengths_in_the_wrong_places():
    tokens = as_bytes(SAMPLE[:20_000])
    lookback = partition_text(tokens, BYTES, "semantic", 900, BACKGROUND)
    shifted = partition_text(tokens, BYTES, "shifted:1500", 900, BACKGROUND)
    assert (shifted[:1500] == lookback[:1500]).all()
    assert (shifted[1500:] == lookback[:-1500]).all() and (shifted != lookback).any()


def test_documents_are_blocks():
    tokens = as_bytes("one. Two<|endoftext|>three. Four!<|endoftext|><|endoftext|>five")
    start, _ = blocks_of(tokens, "document", 1000)
    assert np.unique(start).tolist() == [0, 21, 46, 59]
    # if a document outgrows the cap, its block slides
    start, lookback = blocks_of(tokens, "document", 10)
    assert lookback.max() == 10 and start[20] == 10 and start[21] == 21


@pytest.mark.parametrize("seed", range(5))
def test_reach_is_what_the_layers_hand_on(seed):
    """The definition: a product of the layers' matrices of who sees whom."""
    rng, n = np.random.default_rng(seed), 60
    i = np.arange(n)
    for lookback in (rng.integers(0, 20, n), np.full(n, 7), i % 13, i):
        start = np.maximum.accumulate(np.maximum(i - lookback, 0))  # starts never move back
        sees = (i[None] >= start[:, None]) & (i[None] <= i[:, None])  # (query, key)
        for locality in ([1.0], [1.0] * 4, [1.0, 0.5, 1.0], [0.0, 1.0]):
            through = np.eye(n, dtype=bool)
            for x in locality:
                through = through @ (sees if x == 1 else np.tri(n, dtype=bool))
            for anchor in (False, True):
                earliest = np.zeros(n) if anchor else through.argmax(1)
                assert (reach(i - start, locality, anchor) == earliest).all()


def test_semantic_blocks_with_a_window_reach_back_at_least_as_far_as_either():
    tokens = as_bytes(SAMPLE[:20_000])
    background = count_background(tokens, BYTES)
    names = "semantic", "window:400", "semantic+window:400"
    semantic, window, both = (blocks_of(tokens, name, 900, background)[1] for name in names)
    assert (both == np.maximum(semantic, window)).all()
    assert (both > semantic).any() and (both > window).any()


# --------------------------------------------------------------------------------------------------
# a partition that a user adds


def leaky(stream, tokens, i):
    """whether the next token is a newline decides: it looks ahead"""
    newline = np.append(tokens[1:] == ord("\n"), False)
    return np.where(newline, 0, i)


def by_push(stream, tokens, i):
    """everything in the same push"""
    return i - i[0]


AT = SAMPLE.index(b"\n")


@pytest.mark.parametrize(
    "function, cause",
    [
        (leaky, f"the lookback of token {AT - 1} changes with token {AT}"),
        (by_push, "the lookback of token 1 changes with the number of tokens in a push"),
    ],
)
def test_a_partition_that_looks_ahead_is_caught(function, cause, monkeypatch):
    """The tests go through the table, and so check one that a user has added."""
    tokens = as_bytes(SAMPLE[:3000])
    for name in NAMES:
        check_causal(tokens, BYTES, name, 300, BACKGROUND)
    monkeypatch.setitem(PARTITIONS, "mine", Partition(function))
    with pytest.raises(InputError, match=f"mine looks ahead: {cause}"):
        check_causal(tokens, BYTES, "mine", 3000)


def test_the_documentation_and_the_help_list_every_partition():
    blocks = (ROOT / "docs" / "BLOCKS.md").read_text()
    listed = re.findall(r"^\| `([a-z:+]+?)(:N)?` \|", blocks, re.M)
    assert {name: bool(n) for name, n in listed} == {n: p.takes_n for n, p in PARTITIONS.items()}
    assert usage(TextConfig).count(partition_names()) == 1
    assert all(entry.lookback.__doc__ for entry in PARTITIONS.values())


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda stream, tokens, i: i - 1, "0 ... i"),
        (lambda stream, tokens, i: i + 1, "0 ... i"),
        (lambda stream, tokens, i: i[:1], "3 integers"),
        (lambda stream, tokens, i: i / 2, "3 integers"),
        (lambda stream, tokens, i: 0, "3 integers"),
        (lambda stream, tokens, i: None, "3 integers"),
        (lambda stream, tokens, i: i - stream.find_blocks(tokens), "reads_words=True"),
        (lambda stream, tokens, i: stream.find_blocks(tokens, at_least=0) * 0
         + stream.find_blocks(tokens, at_least=0), "only once"),
    ],
)  # fmt: skip
def test_a_partition_that_makes_no_sense_is_refused(function, message, monkeypatch):
    monkeypatch.setitem(PARTITIONS, "mine", Partition(function))
    with pytest.raises(InputError, match=message):
        Partitioner(BYTES, "mine", 300).push([1, 2, 3])
    monkeypatch.setitem(PARTITIONS, "mine", Partition(lambda stream, tokens, i: i.tolist()))
    assert Partitioner(BYTES, "mine", 300).push([1, 2, 3]).tolist() == [0, 1, 2]


# --------------------------------------------------------------------------------------------------
# sentences


def sentences(text):
    cuts = [*first_bytes(text.encode()), len(text.encode())]
    return [text.encode()[a:b].decode() for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize(
    "marked",  # | is where a sentence begins
    [
        "The cat sat on the mat. |It purred. |Then, alas! |What now? |The end",
        "Mr. Smith met Dr. J. R. Brown of the U.S. Navy, e.g. at sea. |See vol. 3, pp. 4 and No. 5."
        " |No. |I won't.",
        "MR. BROWN met Ms. Jones, Gov. White, Sen. Black and Sr. Rosa on Oct. 5. |See Chap. IV and "
        "Sect. 4, or Doe et al. (2004). |You and I. |World War I. |It began. |“No”--Mr. Jones.",
        "“Come here,” she said. |“Why?” he asked. |He came.",
        "Alas! |'twas late. |'Tis very late. |(So it is.) |[Indeed.] |_Quite._ |Good",
        "It cost 3.50 at example.com today. |He said so . '' |`` No , '' she said . |Fine",
        'He left . " \n|The next line . |" She stayed . "\n\n|"And then?" |The end',
        # an ellipsis; a number that begins like one
        "He thought . . . and thought. |And then . . . |He left... |“Well . . . .” |The [...] Sea",
        "He had a gun. |.38 caliber. |It was. . . . |Then . . ? |Yes . . .",
        # numbers of headings and lists
        "Steps: open it. |1. Open the door. |2. Go in. |10.) Sit down. |II. The Second Part. "
        "|Chapter IV. Home. |Fig. 2. A door. |SECT. VIII. Of beauty. |3.1. Here is the text. "
        "|It has 3. |Part 12. Go on. |End",
        # other quotation marks
        "Han gick. |”Nej.” |Hon kom. |Look. |![A picture](x.png)",
        "Er kam. |„Wo warst du?“ |„Am See.“ |Sie lachte. |»Und?« |»Nichts.« |‚Gut.‘ |So war es.",
        "Il entra. |« Bonjour. » |Elle rit. |«\xa0Déjà\u202f?\xa0» dit-il. |« Oui. » |Il partit.",
        # other white space
        "He came.\xa0|She left.\u3000|They met.\u2003|It\u2028rained.\u2028|Title\u2029|It stopped",
        "A paragraph that was wrapped\nin the middle of a sentence\nby hand. |Another one,\n"
        "with Mr.\nSmith in it.",
        # other scripts
        "Мы пришли домой. |Он ушёл. |А. С. Пушкин писал т. е. сочинял. |Конец",
        "Ἦλθεν ὁ ἄνθρωπος. |Καλημέρα. |Πού είναι; |Εδώ: Τέλος",
        "Ես եկա: |Նա գնաց։ |Վերջ",
        "ეს პირველი წინადადებაა. |ეს მეორეა! |ესეც? |ბოლო",
        "यह एक वाक्य है। |यह दूसरा है। |अंत",
        "我们走进森林。|树很高！|「你好。」|他说？|“是。”|１．概述。|第2．章。|完",
        "네. |그래요. |네",
        "クジラは海にいる。|船が来た！|本当？|今日は晴れ．|気温は３．５度．|はい",
        "ខ្ញុំមក។ |គាត់ទៅ៕ |យើងនៅ",
        "သူလာတယ်။ |ငါသွားတယ်။|သူ",
        "ང་ཡོང་། །|ཁོ་སོང་། |ང",
        "እኔ መጣሁ። |እሱ ሄደ።|እሷ",
        "آیا آمد؟ |بله. |او رفت۔ |پایان",
        # paragraphs, headings, lists
        "CHAPTER ONE\n\n|It was late\nand dark\n\n|The next day",
        "We need:\n|- eggs\n|- flour\n|2. milk\n|* tea\n|# Title\n\n|End",
        # lines that are too long, or too different, to be those of a wrapped paragraph
        "the first line is one of those that run to a good deal more than a hundred characters "
        "without an end, as lines do\n|a short one\n|another\n|and so on",
        "10:00 did you see the game last night\n10:01 yes\n|10:02 it was great lol\n|10:03 brb\n"
        "|10:04 did you see what they said about it\n|10:05 no\n|10:06 ok",
        # but headings may stand directly above a wrapped paragraph
        "CHAPTER I\nLoomings\nCall me Ishmael, he said to those who had come\nfrom far away to "
        "hear him, and the few who sat\nnear the door, where it was cold that night,\ndid so.",
        "One\r\n\r\n|Two\r\n\r\n|Here is a paragraph that somebody has wrapped by\r\nhand, as many "
        "people did in those days, with lines\r\nthat are alike. |End",
    ],
)
def test_sentences(marked):
    assert sentences(marked.replace("|", "")) == marked.split("|")


@pytest.mark.parametrize("rule", NOT_AN_END, ids=lambda rule: rule[2])
def test_each_rule_keeps_its_example_together(rule, monkeypatch):
    """And nothing else does."""
    assert sentences(rule[2]) == [rule[2]]
    others = [other for other in NOT_AN_END if other is not rule]
    monkeypatch.setattr("support.sentences.ANY_RULE", any_rule(others))
    assert len(sentences(rule[2])) > 1


def test_sentence_start_is_known_at_its_first_token():
    text = "One ends here. Two ends there.\nThree ends now! “Four” too.\n\nFive"
    words = text.replace(" ", "| ").replace("\n", "|\n|").split("|")
    vocabulary = sorted(set(words))
    tokens = np.array([vocabulary.index(word) for word in words])
    lookback = partition_text(tokens, [word.encode() for word in vocabulary], "sentence", 50)
    first = [word.strip() for word, back in zip(words, lookback) if back == 0]
    assert first == ["One", "Two", "Three", "“Four”", "Five"]


def test_without_punctuation_sentences_and_blocks_end_at_white_space():
    tokens = as_bytes("all work and no play makes it a dull day indeed " * 200)
    blocks = np.unique(blocks_of(tokens, "semantic", 5000)[0])
    sentences = first_bytes(tokens.astype(np.uint8).tobytes())
    assert len(blocks) > 1 and len(sentences) > 3
    assert all(first == 0 or tokens[first - 1] == ord(" ") for first in (*blocks, *sentences))


# --------------------------------------------------------------------------------------------------
# semantic blocks

TOPICS = [
    "whale ship sea harpoon captain sailor ocean deck mast wave storm anchor".split(),
    "flour butter oven sugar bake cake dough kitchen recipe egg cream spoon".split(),
    "senate law vote judge court minister election treaty party crown parliament tax".split(),
    "кит море корабль волна капитан парус шторм якорь матрос палуба".split(),
    "树 林 山 河 花 鸟 石 叶".split(),
]


def text_about(order, seed=0, n=12):
    """n sentences of six words about each topic: (text, the bytes at which the topics begin)."""
    rng = random.Random(seed)
    text, begins = "", []
    for topic in order:
        begins.append(len(text.encode()))
        for _ in range(n):
            words = rng.sample(TOPICS[topic], 6)
            text += "".join(words) + "。" if topic == 4 else f"The {' of the '.join(words)}. "
    return text, begins


def mixed_sentences(n=300):
    """Sentences about three topics at once."""
    rng, words = random.Random(0), TOPICS[0] + TOPICS[1] + TOPICS[2]
    return [f"The {' of the '.join(rng.sample(words, 5))}." for _ in range(n)]


def test_blocks_begin_where_the_topic_changes():
    text, begins = text_about([0, 1, 2, 3, 0, 4, 2])
    for background in (None, count_background(as_bytes(text), BYTES)):
        start, _ = blocks_of(as_bytes(text), "semantic", background=background)
        assert np.unique(start).tolist() == begins


def test_a_topic_that_outgrows_the_cap_is_cut_between_sentences_if_there_are_any():
    tokens = as_bytes(text_about([0], n=100)[0])
    first = np.unique(blocks_of(tokens, "semantic", 400)[0])
    assert len(first) > 5 and all(tokens[f] == ord("T") for f in first)
    _, lookback = blocks_of(as_bytes("x" * 700), "semantic", 50)
    assert (lookback == np.minimum(np.arange(700), 50)).all()


def test_paragraphs_mean_nothing_if_every_sentence_is_one():
    text, begins = text_about([0, 1, 2, 0, 1], n=8)
    start, _ = blocks_of(as_bytes(text.replace(". ", ".\n\n")), "semantic")
    assert len(np.unique(start)) == len(begins)


def test_blocks_prefer_paragraphs():
    """If a break is needed within one topic, it is mostly at a blank line."""
    text = "".join(s + ("\n\n" if i % 6 == 5 else " ") for i, s in enumerate(mixed_sentences()))
    first = np.unique(blocks_of(as_bytes(text), "semantic")[0])[1:]
    assert len(first) > 10 and np.mean([text[f - 2 : f] == "\n\n" for f in first]) > 0.5
