"""What a page needs from a text: a stretch of it, its blocks and sentences, and foreign text."""

import math
from typing import NamedTuple

import numpy as np
import torch

from support.files import InputError
from support.sentences import first_bytes

CHUNK = 1 << 16  # tokens at a time


class Text(NamedTuple):
    """A whole text, and what belongs to it."""

    name: str
    tokens: np.ndarray  # (n,) ids
    start: int  # the first token to show
    background: dict | None  # of the partition
    foreign: np.ndarray  # ids of another text, to replace sentences with
    lookback: np.ndarray | None = None  # (n,), if it was prepared


class Excerpt(NamedTuple):
    """T tokens of a text, counted from the first of them, and what the partitioner found there."""

    shown: str  # which tokens of which text
    tokens: np.ndarray  # (T,) int64
    lookback: np.ndarray  # (T,) int64
    marks: list  # (token, block, words): where it was recognized that a block began at `block`
    sentences: list  # (begin, end), at least one


def cut(text, T, vocabulary, partitioner, marked):
    """The Excerpt of T tokens of a Text, or of as many as there are from its start on.

    partitioner: a fresh locality.Partitioner, which reads the text from its beginning; marked:
    whether to mark where it recognized blocks. Raises InputError if there are fewer than 2 tokens.
    """
    start, n = text.start, len(text.tokens)
    end = min(start + T, n)
    if end - start < 2:
        raise InputError(f"{text.name}: a page needs at least 2 tokens, not {end - start}")
    lookback, moves = walk(text.tokens[:end], partitioner)
    if text.lookback is not None:  # a joined text no longer says where a document ends
        lookback = text.lookback[:end].astype(np.int64)
    marks = [
        (token - start, block - start, bits_in_words(bits))
        for token, block, bits in moves
        if marked and block > start and bits != math.inf
    ]
    which = f"tokens {start:,} … {end - 1:,} of {n:,}" if end - start < n else f"all {n:,} tokens"
    return Excerpt(
        f"{text.name}, {which}",
        text.tokens[start:end].astype(np.int64),
        np.minimum(lookback[start:], np.arange(end - start)),
        marks,
        join_short(sentence_starts(text.tokens[start:end], vocabulary), end - start),
    )


def walk(tokens, partitioner):
    """What a fresh Partitioner finds in a text: the lookback, (n,) int64, and all moves."""
    lookback, moves = [], []
    for i in range(0, len(tokens), CHUNK):
        lookback.append(partitioner.push(tokens[i : i + CHUNK]))
        moves += partitioner.moves[1:]
    return np.concatenate(lookback).astype(np.int64), moves


def find_words(tokens, vocabulary, words):
    """The first token of some words in a text, whatever white space is between them; None if the
    text does not contain them. tokens: (n,) ids."""
    chunks = (tokens[i : i + CHUNK].tolist() for i in range(0, len(tokens), CHUNK))
    letters = b"".join(b"".join([vocabulary[t] for t in chunk]) for chunk in chunks)
    letters = letters.translate(bytes.maketrans(b"\t\n\v\f\r", b"     "))
    letters = np.frombuffer(letters, np.uint8)
    kept = letters != 32
    kept[1:] |= letters[:-1] != 32  # the first character of each run of white space
    wanted = " ".join(words.split()).encode(errors="surrogateescape")
    at = letters[kept].tobytes().find(wanted)
    if at < 0 or not wanted:
        return None
    ends = np.cumsum(np.array([len(b) for b in vocabulary])[tokens])
    return int(np.searchsorted(ends, np.flatnonzero(kept)[at], side="right"))


def bits_in_words(bits):
    """How sure the partitioner was, for a mark: see the moves of locality.Partitioner."""
    if bits is None:
        return "cap"
    return f"{bits:.1f} bits" if bits < 39.9 else "> 40 bits"  # see ChangePoints.bits_later


def sentence_starts(tokens, vocabulary):
    """The first token of each sentence of a text, a list that begins with 0."""
    text = [vocabulary[t] for t in tokens]
    ends = np.cumsum([len(b) for b in text])
    starts = np.unique(np.searchsorted(ends, first_bytes(b"".join(text)), side="right"))
    return starts[starts < len(text)].tolist()


def join_short(starts, T, apart=()):
    """The (begin, end) of the sentences of T tokens. starts: their first tokens, the first at 0.

    A sentence shorter than T / 32 is joined with the next, because each takes a forward pass.
    apart: sentences that begin at these tokens are not joined with what precedes them.
    """
    edges = [0]
    for start in starts:
        if start - edges[-1] >= max(T / 32, 2) or start in apart and start > edges[-1]:
            edges.append(start)
    return list(zip(edges, [*edges[1:], T]))


def draw_foreign(tokens, vocabulary, sentences, n, seed=0):
    """n foreign texts to replace each sentence with: a list of (n, length) int64.

    The same seed draws the same texts. Each begins where a sentence of `tokens`, (n_tokens,), does
    and has the length of the sentence it replaces. (When the first sentence is replaced,
    view.influence keeps its first token.)
    """
    tokens = tokens[:CHUNK].astype(np.int64)  # enough to choose from
    starts, drawn = np.array(sentence_starts(tokens, vocabulary)), []
    rng = np.random.default_rng(seed)
    for begin, end in sentences:
        long_enough = starts[starts <= len(tokens) - (end - begin)]
        candidates = long_enough if len(long_enough) else starts
        chosen = rng.choice(candidates, n, replace=len(candidates) < n)
        texts = [np.resize(tokens[start : start + end - begin], end - begin) for start in chosen]
        drawn.append(torch.tensor(np.stack(texts)))
    return drawn
