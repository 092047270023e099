"""The schedules and partitioners: causal, streaming, capped, and at home in any text."""

import json
import random

import numpy as np
import pytest

from conftest import ROOT
from locality import (
    SCHEDULES,
    Partitioner,
    count_background,
    parse_partition,
    partition_text,
    reach,
    schedule,
)
from support.files import InputError
from support.sentences import first_bytes

BYTES = [bytes([i]) for i in range(256)]
PARTITIONS = ["semantic", "semantic:closed", "sentence", "document", "window:7", "block:5"]
PARTITIONS += ["aligned:40", "shifted:30"]

# pieces that, put together at random, make every kind of sentence end there is, and many that only
# look like one
WORDS = """the cat sat on mat whale sea ship Mr. Dr. U.S. e.g. No. 5 A. J. vol. Paris Whale Ship
    He I""".split()
SIGNS = (
    "“ ” ’ » … é Э это Конец. Да. α Ω 。 」 「 海 鯨 は ！ ？ ، ؟ ۔ । \u00a0 \u3000 🙂 ‣ •".split(
        " "
    )
)
PIECES = [word.encode() for word in WORDS]
PIECES += [
    b". ",
    b".\n",
    b".\n\n",
    b"! ",
    b"? ",
    b"...",
    b"\n",
    b"\n\n",
    b" ",
    b"  ",
    b"\t",
    b"\r\n",
]
PIECES += [b", ", b"; ", b"'", b"''", b'"', b"``", b")", b"(", b"_", b"- ", b"* ", b"# ", b"12. "]
PIECES += [b"1) ", b"<|endoftext|>", b"<|endo", b"ftext|>", b"\x00", b"\xff", b"\xe2\x82", b"\x80"]
PIECES += [b"x" * 120, b"y " * 70, *(sign.encode() for sign in SIGNS)]
PIECES += [b". ", b" ", b" ", b"\n"] * 6


def random_text(seed, n=400):
    rng = random.Random(seed)
    return b"".join(p + rng.choice([b"", b" "]) for p in rng.choices(PIECES, k=n))


def random_tokens(seed, text):
    """A made-up vocabulary of multi-byte tokens, and the text cut into them at random.

    Cuts fall within characters too.
    """
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
            tokens.append(0)  # a token of no bytes at all
    return np.array(tokens, np.uint16), vocabulary


def as_bytes(text):
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8).astype(
        np.uint16
    )


def sentences_of(text):
    """The sentences of a text, without the white space around them."""
    raw = text.encode()
    cuts = [*first_bytes(raw), len(raw)]
    return [raw[a:b].decode(errors="replace").strip() for a, b in zip(cuts, cuts[1:])]


SOME_BACKGROUND = count_background(
    as_bytes("whale ship sea cat mat Paris это " * 30 + "конец 海 鯨 " * 4), BYTES
)


# --------------------------------------------------------------------------------------------------


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
        else:
            assert got == pytest.approx(
                [floor * (l / (n_layer - 1)) ** degree[name] for l in range(n_layer)]
            )
            assert got[-1] == floor


@pytest.mark.parametrize(
    "args",
    [
        ("quintc", 12),
        ("", 12),
        (None, 12),
        ("linear", 3, 0),
        ("linear", 3, 1.01),
        ("linear", 3, "1"),
        ("linear", 3, float("nan")),
    ],
)
def test_schedule_refuses(args):
    with pytest.raises(InputError):
        schedule(*args)


def test_schedule_names_the_nearest():
    with pytest.raises(InputError, match="quintic"):
        schedule("quintc", 12)


@pytest.mark.parametrize(
    "partition",
    [
        "",
        "semantics",
        "window",
        "window:",
        "window:0",
        "window:-1",
        "window:2.5",
        "window:" + "9" * 5000,
        "block:x",
        "sentence:3",
        "semantic:open",
        "sentence:closed",
        "aligned",
        "aligned:0",
        "shifted:matched",
        None,
        3,
    ],
)
def test_parse_partition_refuses(partition):
    with pytest.raises(InputError):
        parse_partition(partition)
    with pytest.raises(InputError):
        partition_text(as_bytes("a b"), BYTES, partition, 8)


@pytest.mark.parametrize("max_lookback", [0, -1, 65536])
def test_max_lookback_refuses(max_lookback):
    with pytest.raises(InputError):
        partition_text(as_bytes("a b"), BYTES, "semantic", max_lookback)


def test_rulers():
    tokens = as_bytes(random_text(0))
    i = np.arange(len(tokens))
    assert (partition_text(tokens, BYTES, "window:7", 100) == np.minimum(i, 6)).all()
    assert (partition_text(tokens, BYTES, "window:7", 4) == np.minimum(i, 4)).all()
    assert (partition_text(tokens, BYTES, "block:5", 100) == i % 5).all()
    assert (partition_text(tokens, BYTES, "block:5", 2) == np.minimum(i % 5, 2)).all()


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("seed", range(12))
def test_streaming_agrees_and_nothing_leaks(partition, seed):
    """The same lookback, token for token, however the tokens come.

    They come one by one, in random pieces, at once, and from a text whose future is another.
    """
    rng = random.Random(seed)
    max_lookback = rng.choice([1, 3, 20, 100, 1000])
    known = [None, SOME_BACKGROUND][seed % 2]
    tokens, vocabulary = random_tokens(seed, random_text(seed))
    whole = partition_text(tokens, vocabulary, partition, max_lookback, known)
    i = np.arange(len(tokens))
    assert whole.dtype == np.uint16 and whole.shape == tokens.shape
    assert (whole <= np.minimum(i, max_lookback)).all()
    if "window" not in partition:  # the window and the cap slide; nothing ever goes back
        assert (np.diff(i - whole.astype(int)) >= 0).all()

    one = Partitioner(vocabulary, partition, max_lookback, known)
    assert (
        np.concatenate([one.push(tokens[n : n + 1]) for n in range(len(tokens))]) == whole
    ).all()

    pieces, at, got = Partitioner(vocabulary, partition, max_lookback, known), 0, []
    while at < len(tokens):
        n = rng.choice([0, 1, 2, 5, 50, 300])
        got.append(pieces.push(tokens[at : at + n].tolist()))
        at += n
    assert (np.concatenate(got) == whole).all()

    for _ in range(20):
        at = rng.randrange(len(tokens))
        other = np.concatenate([tokens[:at], rng.choices(range(len(vocabulary)), k=30)]).astype(
            np.uint16
        )
        assert (
            partition_text(other, vocabulary, partition, max_lookback, known)[:at] == whole[:at]
        ).all()


def block_starts_of(tokens, vocabulary, partition, max_lookback, known=None):
    """The token at which each token's block begins, and the lookback, (n,) int64 each."""
    lookback = partition_text(tokens, vocabulary, partition, max_lookback, known).astype(int)
    return np.arange(len(tokens)) - lookback, lookback


@pytest.mark.parametrize("partition", ["semantic:closed", "sentence", "block:9", "aligned:40"])
@pytest.mark.parametrize("seed", range(6))
def test_no_token_of_a_closed_block_looks_further_back_than_the_block(partition, seed):
    known = [None, SOME_BACKGROUND][seed % 2]
    for max_lookback in (8, 40, 150, 3000):
        tokens, vocabulary = random_tokens(seed, random_text(seed, 900))
        start, lookback = block_starts_of(tokens, vocabulary, partition, max_lookback, known)
        assert (start[start] == start).all()  # a block's first token looks at itself alone
        assert len(np.unique(start)) > 3 and lookback.max() <= max_lookback
        # the cap cuts: the next block begins when the one before is full, or earlier
        assert (np.diff(np.append(np.unique(start), len(tokens))) <= max_lookback + 1).all()


def test_semantic_blocks_are_not_closed_and_closed_ones_lie_within_them():
    text = (ROOT / "data" / "sample.txt").read_bytes()[:30_000]
    tokens, known = as_bytes(text), count_background(as_bytes(text), BYTES)
    start, _ = block_starts_of(tokens, BYTES, "semantic", 65535, known)
    closed, _ = block_starts_of(tokens, BYTES, "semantic:closed", 65535, known)
    assert len(np.unique(closed)) > 10 and (start[start] < start).any()
    assert (closed >= start).all()
    moved = (np.flatnonzero(np.diff(start)) + 1).tolist()
    for cap in (65535, 400, 150):
        cuts = [0]  # where a block was noticed that begins after the last cut, or the cap cuts
        for token in [*moved, len(tokens)]:
            while cuts[-1] + cap + 1 < token:
                cuts.append(cuts[-1] + cap + 1)
            if token in moved and start[token] > cuts[-1]:
                cuts.append(token)
        closed, _ = block_starts_of(tokens, BYTES, "semantic:closed", cap, known)
        assert np.unique(closed).tolist() == cuts
        assert len(cuts) < len(np.unique(start)) or cap < 65535  # some moves are cut already


def test_aligned_blocks_begin_with_the_first_sentence_after_n_tokens():
    text = "".join(f"Here are {'so many ' * (i % 7)}words. " for i in range(200))
    for n in (90, len("Here are words. Here are so many words. ")):
        start, _ = block_starts_of(as_bytes(text), BYTES, f"aligned:{n}", 65535)
        expected = [0]
        for begin in first_bytes(text.encode()):
            if begin - expected[-1] >= n:
                expected.append(begin)
        assert np.unique(start).tolist() == expected and len(expected) > 20
    assert expected[1] == n  # exactly


def test_shifted_blocks_have_the_right_lengths_in_the_wrong_places():
    tokens = as_bytes((ROOT / "data" / "sample.txt").read_bytes()[:20_000])
    lookback = partition_text(tokens, BYTES, "semantic", 900)
    shifted = partition_text(tokens, BYTES, "shifted:1500", 900)
    assert (shifted[:1500] == lookback[:1500]).all()
    assert (shifted[1500:] == lookback[:-1500]).all() and (shifted != lookback).any()


def test_documents_are_blocks():
    text = b"one. Two<|endoftext|>three. Four!<|endoftext|><|endoftext|>five"
    start, _ = block_starts_of(as_bytes(text), BYTES, "document", 1000)
    assert np.unique(start).tolist() == [0, 21, 46, 59]
    # a document that outgrows the cap slides
    start, lookback = block_starts_of(as_bytes(text), BYTES, "document", 10)
    assert lookback.max() == 10 and start[20] == 10 and start[21] == 21


@pytest.mark.parametrize("seed", range(5))
def test_reach_is_what_the_layers_hand_on(seed):
    """Against a product of the layers' matrices: who sees whom."""
    rng = np.random.default_rng(seed)
    n = 60
    for lookback in (rng.integers(0, 20, n), np.full(n, 7), np.arange(n) % 13, np.arange(n)):
        i = np.arange(n)
        start = np.maximum.accumulate(np.maximum(i - lookback, 0))  # blocks never go back
        sees = (i[None] >= start[:, None]) & (i[None] <= i[:, None])  # query, key
        for locality in ([1.0], [1.0] * 4, [1.0, 0.5, 1.0], [0.0, 1.0]):
            through = np.eye(n, dtype=bool)
            for x in locality:
                through = through @ (sees if x == 1 else np.tri(n, dtype=bool))
            for anchor in (False, True):
                earliest = np.zeros(n) if anchor else through.argmax(1)
                assert (reach(i - start, locality, anchor) == earliest).all()


@pytest.mark.parametrize("partition", ["semantic", "sentence"])
def test_long_texts_agree_across_chunks(partition, monkeypatch):
    text = b" ".join(random_text(seed) for seed in range(20))
    tokens, vocabulary = random_tokens(1, text)
    whole = partition_text(tokens, vocabulary, partition, 200)
    for chunk in (97, 1000):
        monkeypatch.setattr("locality.CHUNK", chunk)
        assert (partition_text(tokens, vocabulary, partition, 200) == whole).all()


@pytest.mark.parametrize("partition", ["semantic", "sentence"])
@pytest.mark.parametrize("known", [None, SOME_BACKGROUND])
def test_documents_are_independent(partition, known):
    one, two = random_text(1).replace(b"<|", b""), random_text(2).replace(b"<|", b"")
    both = partition_text(as_bytes(one + b"<|endoftext|>" + two), BYTES, partition, 50, known)
    assert (
        both[len(one) + 13 :] == partition_text(as_bytes(two), BYTES, partition, 50, known)
    ).all()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_writes_into_out(partition, tmp_path):
    tokens = as_bytes(random_text(3))
    tokens.tofile(tmp_path / "tokens.bin")
    out = np.memmap(tmp_path / "lookback.bin", np.uint16, "w+", shape=tokens.shape)
    got = partition_text(
        np.memmap(tmp_path / "tokens.bin", np.uint16, "r"), BYTES, partition, 50, out=out
    )
    assert got is out and (out == partition_text(tokens, BYTES, partition, 50)).all()


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"a",
        b"\x00" * 3000,
        b"\n" * 3000,
        b" " * 3000,
        b"\xff\xfe" * 2000,
        b"word " * 2000,
        b"x" * 5000,
        "鯨".encode() * 2000,
        b"." * 3000,
        b". '" * 1500,
        b"<|endoftext|>" * 50,
    ],
)
def test_odd_texts(partition, text):
    tokens = as_bytes(text)
    whole = partition_text(tokens, BYTES, partition, 300)
    stream = Partitioner(BYTES, partition, 300)
    assert [int(stream.push([t])[0]) for t in tokens] == whole.tolist()


def test_background_survives_json():
    tokens = as_bytes(random_text(5))
    again = json.loads(json.dumps(SOME_BACKGROUND))
    assert (
        partition_text(tokens, BYTES, "semantic", 99, again)
        == partition_text(tokens, BYTES, "semantic", 99, SOME_BACKGROUND)
    ).all()


def test_background_is_bounded():
    text = " ".join(
        random.Random(0).choices(
            [
                f"{a}{b}{c}{d}"
                for a in "bcdfgh"
                for b in "aeiouyrl"
                for c in "klmnpqrst"
                for d in [
                    "tam",
                    "tor",
                    "ling",
                    "bas",
                    "eke",
                    "ul",
                    "ord",
                    "ist",
                    "ox",
                    "um",
                    "dra",
                    "wen",
                    "yth",
                    "id",
                    "ep",
                ]
            ],
            k=20_000,
        )
    )
    assert len(json.dumps(count_background(as_bytes(text), BYTES))) < 1 << 20


def test_background_does_not_depend_on_the_tokens():
    text = random_text(7).replace(b"<|", b"")
    tokens, vocabulary = random_tokens(7, text)
    assert count_background(tokens, vocabulary) == count_background(as_bytes(text), BYTES)


# --------------------------------------------------------------------------------------------------
# sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["The cat sat on the mat.", "It purred.", "Then, alas!", "What now?", "The end"],
        [
            "Mr. Smith met Dr. J. R. Brown of the U.S. Navy, e.g. at sea.",
            "See vol. 3, pp. 4 and No. 5.",
            "No.",
            "I won't.",
        ],
        ["“Come here,” she said.", "“Why?” he asked.", "He came."],
        ["'Tis late.", "'Tis very late.", "(So it is.)", "[Indeed.]", "_Quite._", "Good"],
        ["It cost 3.50 at example.com today.", "He said so . ''", "`` No , '' she said .", "Fine"],
        [
            "A paragraph that was wrapped\nin the middle of a sentence\nby hand.",
            "Another one,\nwith Mr.\nSmith in it.",
        ],
        ["Мы пришли домой.", "Он ушёл.", "А. С. Пушкин писал т. е. сочинял.", "Конец"],
        ["Ἦλθεν ὁ ἄνθρωπος.", "Καλημέρα.", "Τέλος"],
        ["यह एक वाक्य है।", "यह दूसरा है।", "अंत"],
    ],
)
def test_sentences(sentences):
    assert sentences_of(" ".join(sentences)) == sentences


@pytest.mark.parametrize(
    "text", ["我们走进森林。树很高！「你好。」他说？是", "クジラは海にいる。船が来た！本当？はい"]
)
def test_sentences_without_spaces(text):
    assert sentences_of(text) == [
        s
        for s in text.replace("。", "。|")
        .replace("！", "！|")
        .replace("？", "？|")
        .replace("|」", "」|")
        .split("|")
        if s
    ]


def test_paragraphs_lists_headings():
    assert sentences_of("CHAPTER ONE\n\nIt was late\nand dark\n\nThe next day") == [
        "CHAPTER ONE",
        "It was late\nand dark",
        "The next day",
    ]
    assert sentences_of("We need:\n- eggs\n- flour\n2. milk\n* tea\n# Title\n\nEnd") == [
        "We need:",
        "- eggs",
        "- flour",
        "2. milk",
        "* tea",
        "# Title",
        "End",
    ]


def test_one_sentence_a_line():
    """No full stops, but lines too long to be hard-wrapped: each line is a sentence."""
    lines = [
        "the first line is one of those that go on for a good deal more than a hundred "
        "characters without an end, as lines do",
        "a short one",
        "another",
        "and so on",
    ]
    assert sentences_of("\n".join(lines)) == lines


def test_sentence_start_is_known_at_its_first_token():
    text = "One ends here. Two ends there.\nThree ends now! “Four” too.\n\nFive"
    vocabulary = sorted(set(text.replace(" ", "| ").replace("\n", "|\n|").split("|")))
    tokens = [vocabulary.index(w) for w in text.replace(" ", "| ").replace("\n", "|\n|").split("|")]
    lookback = partition_text(np.array(tokens), [w.encode() for w in vocabulary], "sentence", 50)
    first = [vocabulary[t].strip() for t, r in zip(tokens, lookback) if r == 0]
    assert first == ["One", "Two", "Three", "“Four”", "Five"]


def test_no_punctuation_at_all():
    """Text that never ends a sentence still has blocks, cut at white space."""
    text = "all work and no play makes it a dull day indeed " * 200
    tokens = as_bytes(text)
    lookback = partition_text(tokens, BYTES, "semantic", 5000)
    first = np.unique(np.arange(len(tokens)) - lookback.astype(int))
    assert len(first) > 1 and all(f == 0 or tokens[f - 1] == 32 for f in first)
    first = np.cumsum([len(sentence) + 1 for sentence in sentences_of(text)])[:-1]
    assert len(first) > 3 and all(tokens[f - 1] == 32 for f in first)


# --------------------------------------------------------------------------------------------------
# blocks

TOPICS = [
    "whale ship sea harpoon captain sailor ocean deck mast wave storm anchor".split(),
    "flour butter oven sugar bake cake dough kitchen recipe egg cream spoon".split(),
    "senate law vote judge court minister election treaty party crown parliament tax".split(),
    "кит море корабль волна капитан парус шторм якорь матрос палуба".split(),
    "树 林 山 河 花 鸟 石 叶".split(),
]


def document(order, seed=0, n=12):
    """Sentences of six words a topic; returns the text and the byte each topic begins at."""
    rng = random.Random(seed)
    text, begins = b"", []
    for topic in order:
        begins.append(len(text))
        for _ in range(n):
            words = rng.sample(TOPICS[topic], 6)
            text += (
                "".join(words) + "。" if topic == 4 else "The " + " of the ".join(words) + ". "
            ).encode()
    return text, begins


@pytest.mark.parametrize("known", [None, SOME_BACKGROUND])
def test_blocks_begin_where_the_topic_changes(known):
    text, begins = document([0, 1, 2, 3, 0, 4, 2])
    tokens = as_bytes(text)
    lookback = partition_text(tokens, BYTES, "semantic", 65535, known).astype(int)
    assert sorted(set((np.arange(len(tokens)) - lookback).tolist())) == begins


def test_a_break_within_reach_beats_the_cap():
    """A topic longer than the cap: the block moves to a later sentence, not into one."""
    tokens = as_bytes(document([0], n=100)[0])
    first = np.unique(
        np.arange(len(tokens)) - partition_text(tokens, BYTES, "semantic", 400).astype(int)
    )
    assert len(first) > 5 and all(tokens[f] == ord("T") for f in first)


def test_one_endless_sentence_slides_at_the_cap():
    lookback = partition_text(as_bytes("x" * 700), BYTES, "semantic", 50)
    assert (lookback == np.minimum(np.arange(700), 50)).all()


# --------------------------------------------------------------------------------------------------
# many documents in many processes


@pytest.mark.parametrize("partition", PARTITIONS)
def test_processes_agree_with_one(partition, monkeypatch):
    vocabulary = [*BYTES, b"<|endoftext|>"]
    tokens = np.concatenate(
        [np.append(as_bytes(random_text(seed).replace(b"<|", b"")), 256) for seed in range(12)]
    )
    whole = partition_text(tokens, vocabulary, partition, 100)
    monkeypatch.setattr("locality.SHARE", 3000)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("locality.CHUNK", 700)
    assert (partition_text(tokens, vocabulary, partition, 100) == whole).all()
    with pytest.raises(IndexError):  # an error in a child process is an error here
        partition_text(np.append(tokens, 257), vocabulary, partition, 100)


# --------------------------------------------------------------------------------------------------
# paragraphs


def test_paragraphs_tell_nothing_where_every_sentence_is_one():
    text, begins = document([0, 1, 2, 0, 1], n=8)
    spaced = text.replace(b". ", b".\n\n")
    lookback = partition_text(as_bytes(spaced), BYTES, "semantic", 65535).astype(int)
    assert len(np.unique(np.arange(len(lookback)) - lookback)) == len(begins)


def test_blocks_prefer_paragraphs():
    """Words picked from one topic: where a break is needed, it is mostly at a blank line."""
    rng = random.Random(0)
    sentences = [
        "The " + " of the ".join(rng.sample(TOPICS[0] + TOPICS[1] + TOPICS[2], 5)) + "."
        for _ in range(300)
    ]
    text = "".join(s + ("\n\n" if i % 6 == 5 else " ") for i, s in enumerate(sentences))
    lookback = partition_text(as_bytes(text), BYTES, "semantic", 65535).astype(int)
    first = np.unique(np.arange(len(lookback)) - lookback)[1:]
    assert len(first) > 10 and np.mean([text[f - 2 : f] == "\n\n" for f in first]) > 0.5


def test_blocks_avoid_sentences_that_lean_on_the_one_before():
    """Half of the sentences begin with a word that carries on: blocks seldom do."""
    rng = random.Random(0)
    sentences = [
        " of the ".join(rng.sample(TOPICS[0] + TOPICS[1] + TOPICS[2], 5)) + "." for _ in range(300)
    ]
    text = " ".join(("However, the " if i % 2 else "The ") + s for i, s in enumerate(sentences))
    lookback = partition_text(as_bytes(text), BYTES, "semantic", 65535).astype(int)
    first = np.unique(np.arange(len(lookback)) - lookback)[1:]
    assert len(first) > 10 and np.mean([text[f:].startswith("However") for f in first]) < 0.3
