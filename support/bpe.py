"""The tokenizer `sample`: a byte pair encoding of data/sample.txt, which needs no download."""

import contextlib
import functools
import hashlib
import heapq
import re
from collections import Counter, defaultdict
from pathlib import Path

from support.files import InputError, read_text

SAMPLE = Path(__file__).parent.parent / "data" / "sample.txt"
N_CHARACTERS = 58_000  # of the sample: no part of its validation or test split
# a word or a number with the space before it, other characters, white space; much like GPT-2's
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
SHA256 = "a65aba16a7c6dff304d676cc20b67df7659d88725d1dd8e0430792a345403afb"  # of these


def learn(text, n):
    """The first n tokens of the byte pair encoding of a text (Sennrich et al., arXiv 1508.07909).

    Returns a list of bytes: the 256 single bytes, and then the most frequent pair of neighbors
    within a word, again and again. The text must contain enough pairs.
    """
    counts = Counter(re.findall(PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    counts, pairs, places = list(counts.values()), Counter(), defaultdict(set)
    tokens, heap = [bytes([b]) for b in range(256)], []

    def add(i, sign):  # the pairs of word i
        for pair in zip(words[i], words[i][1:]):
            pairs[pair] += sign * counts[i]
            places[pair].add(i)
            changed.add(pair)

    changed = set()
    for i in range(len(words)):
        add(i, 1)
    while len(tokens) < n:
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        frequency, best = heapq.heappop(heap)
        if pairs[best] == -frequency:  # it has not changed since it was pushed
            tokens.append(b"".join(best))
            for i in places.pop(best):
                add(i, -1)
                words[i] = merge(words[i], best)
                add(i, 1)
    return tokens


def merge(word, pair):
    """A word, a list of tokens, in which every occurrence of the pair has become one token."""
    new = []
    for token in word:
        if new and (new[-1], token) == pair:
            new[-1] += token
        else:
            new.append(token)
    return new


@functools.cache
def sample_tokens():
    """The 1,000 tokens that `learn` finds in the sample. Raises InputError if the sample changed:
    the tokens of every run that was trained with them would mean something else."""
    text = ""
    with contextlib.suppress(OSError, ValueError):
        text = read_text(SAMPLE)[:N_CHARACTERS]
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise InputError(
            f"{SAMPLE} is missing or was changed, and the tokenizer 'sample' is learned from it; "
            "restore it (to use another text, copy it to another file), or use the tokenizer "
            "'bytes'"
        )
    return learn(text, 1000)
