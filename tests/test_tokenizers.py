"""The tokenizers: what `sample` learns, and what an export says of them to `transformers`."""

import random
import re
import unicodedata
from collections import Counter

import pytest

from conftest import ROOT
from prepare_data import TextConfig
from support import tokenizers
from support.files import InputError
from support.tokenizers import get_encoding, tokenizer_by_size, vocabulary_size, write_tokenizer

TEXT = (ROOT / "data" / "sample.txt").read_text(encoding="utf-8")

# --------------------------------------------------------------------------------------------------
# learned from the sample


def most_frequent_pairs(text, n):
    """The definition of `learn`: count all pairs again for every new token."""
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(tokenizers.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(b"".join(pair))
        words = [tokenizers.merge(word, pair) for word in words]
    return tokens


@pytest.mark.parametrize(
    "text", [TEXT[:6000], "aaaaaaa aaa baaab abab " * 9, "né né né\n\nnéné 12"]
)
def test_a_byte_pair_encoding_merges_the_most_frequent_pair(text):
    n = 260 if len(text) < 100 else 300 if len(text) > 1000 else 268
    tokens = tokenizers.learn(text, n)
    assert tokens == most_frequent_pairs(text, n) and len(set(tokens)) == n
    assert tokenizers.merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) == [b"aa", b"a", b"b"]


def test_the_sample_tokenizer_needs_no_network_and_no_text_that_is_held_out(monkeypatch):
    monkeypatch.setattr(tokenizers, "download_gpt2", None)
    encoding, sample = get_encoding("sample"), tokenizers.SAMPLE.read_text(encoding="utf-8")
    assert encoding.n_vocab == tokenizers.vocabulary_size("sample")
    tokens = encoding.encode_ordinary(sample)
    assert encoding.decode(tokens) == sample and 2.7 < len(sample) / len(tokens) < 3
    for text in ("", "naïve 語🧠\r\n\t  x_y's 3.14", "\x00\ufeff a"):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    share = TextConfig().val  # of the validation split, and of the test split
    n_bytes = len(sample[: tokenizers.N_CHARACTERS].encode())
    assert n_bytes < len(sample.encode()) * (1 - 2 * share)


def test_a_sample_that_was_changed_has_no_tokenizer(monkeypatch, tmp_path):
    changed = tmp_path / "sample.txt"
    changed.write_bytes(tokenizers.SAMPLE.read_bytes().replace(b"the", b"teh"))
    monkeypatch.setattr(tokenizers, "SAMPLE", changed)
    tokenizers.sample_tokens.cache_clear()
    for _ in ("changed", "missing"):
        with pytest.raises(InputError, match="sample.txt is missing or was changed"):
            get_encoding("sample")
        changed.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# by name, and by size


def test_one_size_is_that_of_one_tokenizer():
    for name in ("gpt2", "sample", "bytes", "gpt2:257", "gpt2:50256"):
        assert tokenizer_by_size(vocabulary_size(name)) == name
    for size in (0, 101, 255, 50258, 10**9):
        assert tokenizer_by_size(size) is None


# --------------------------------------------------------------------------------------------------
# for transformers

ODD = [
    "",
    "\n",
    " ",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>\n<|endof",
    "<|endoftext|>" * 3,
]
ODD += [
    "don't I'll we've 'sx ''ll 'S DON'T",
    "x\u00a0y \u00a0 z\u3000",
    "\t\t\n\n \r\n x \n\n\ny  ",
]
ODD += ["語は日本語テキスト", "👩‍👩‍👧‍👦 🇩🇪 é e\u0301", "1234 ½²³ ⅷ ٣٤ x²", "_a__b_ x_y\u203fz"]
ODD += ["\x00\x01\ufeff\ufffd\U0010ffff\ue000", "\u200c\u200d a\u200db \u180e", "Ⓐⓑ हिन्दी עברית"]
ODD += [
    "\u2028\u2029\x85 x \x1c\x1f",
    "a" * 999,
    " " * 999,
    "\n" * 999 + "x",
    "ab" * 99 + "totot" * 9,
]
ODD += ["Before  he .\n , spoke n't ."]  # decoded as it is, and not tidied up


def texts():
    """Odd texts, mixtures of them, random characters, and each character next to which the class of
    the characters changes, between letters, digits and spaces."""
    yield from ODD
    generator = random.Random(1)
    for _ in range(300):
        start = generator.randrange(len(TEXT))
        pieces = [
            *ODD,
            TEXT[start : start + 40],
            "the",
            " of",
            "12",
            "'s",
            ".",
            " ",
            "\n",
            "_",
            "é",
        ]
        yield "".join(piece[:50] for piece in generator.choices(pieces, k=9))
        last = generator.choice([0x7F, 0x2FF, 0x2FFF, 0xD7FF])
        yield "".join(chr(generator.randint(0, last)) for _ in range(20))
    kinds = [unicodedata.category(chr(c)) for c in range(0x110000)]
    edges = [
        c
        for c in range(1, 0x110000)
        if kinds[c] != kinds[c - 1] and "Cs" not in kinds[c - 1 : c + 1]
    ]
    for at in range(0, len(edges), 100):
        near = (chr(c) for edge in edges[at : at + 100] for c in (edge - 1, edge))
        yield " ".join(f"a{c}a 1{c}1 {c}{c} _{c}." for c in near)
    yield TEXT


@pytest.mark.parametrize("name", ["gpt2", "gpt2:1000", "sample", "bytes"])
def test_transformers_reads_and_writes_every_text_as_we_do(name, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    if name.startswith("gpt2"):
        request.getfixturevalue("gpt2_tokenizer")
    encoding = get_encoding(name)
    write_tokenizer(encoding, 64, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        ids = encoding.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    generator = random.Random(1)
    for _ in range(100):  # parts of characters, too
        ids = generator.choices(range(encoding.n_vocab), k=20)
        assert theirs.decode(ids) == encoding.decode(ids)
    # token types would change the embeddings
    assert list(theirs("a")) == ["input_ids", "attention_mask"]
    assert len(theirs) == encoding.n_vocab and theirs.model_max_length == 64
    end_of_text = None if name == "bytes" else encoding.n_vocab - 1
    assert theirs.eos_token_id == theirs.bos_token_id == end_of_text
