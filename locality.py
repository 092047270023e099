"""Where attention may look: how locality grows with depth, and which block of text a token sees.

Neither part knows about the model. `schedule` gives the locality of every layer. `Partitioner` and
`partition_text` give the *lookback* of every token: the block of token i consists of the tokens
i - lookback[i] ... i. Every partition is causal: lookback[i] is a function of tokens 0 ... i.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from fast.evidence import FastEvidence
from support.files import InputError
from support.machine import in_parallel
from support.sentences import END_OF_TEXT, N_WORD_IDS, Sentences, WordIds
from support.settings import nearest

# --------------------------------------------------------------------------------------------------
# schedules: locality[l] = floor * (l / (L - 1)) ** degree, and their rivals

SCHEDULES = {  # name: degree
    "distributed": None,  # 0 in every layer: plain GPT-2
    "localist": 0,
    "linear": 1,
    "quadratic": 2,
    "cubic": 3,
    "quartic": 4,
    "quintic": 5,
    "reversed": 5,  # quintic upside down, a control
}
# In a rival, some layers are at the floor and the others are global. Published models interleave
# them and keep the last layer global.
RIVALS = "interleaved:N", "interleaved:N:local", "late_half", "early_half"


def schedule_names():
    """The names of all schedules as a user writes them, such as interleaved:N; a string."""
    return ", ".join([*SCHEDULES, *RIVALS])


def schedule(name, n_layer, floor=1.0):
    """The locality of each layer, a list of n_layer floats in [0, 1] (arXiv 2511.18375).

    The last layer gets `floor`, and locality fades toward the first layer. With "reversed" the
    first layer gets `floor`. In a rival, the local layers get it; a single layer is always local.
    Raises InputError for an unknown name or a floor outside (0, 1].
    """
    local = local_layers(name, n_layer)
    if name not in SCHEDULES and local is None:
        raise InputError(
            f"unknown schedule {name!r}: did you mean {nearest(name, [*SCHEDULES, *RIVALS])!r}? "
            f"The schedules are {schedule_names()}, where N is 2 or more"
        )
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor <= 1:
        raise InputError(f"floor must be above 0 and at most 1, not {floor!r}")
    if name == "distributed":
        return [0.0] * n_layer
    last = n_layer - 1
    if last == 0:  # a single layer is the last layer
        return [float(floor)]
    if local:
        return [float(floor) if x else 0.0 for x in local]
    locality = [float(floor) * (l / last) ** SCHEDULES[name] for l in range(n_layer)]
    return locality[::-1] if name == "reversed" else locality


def local_layers(name, n_layer):
    """Which layers of a rival are local, a list of n_layer booleans; None for any other name.

    interleaved:N        every N-th layer is global, counting back from the last, which is global
    interleaved:N:local  the same pattern one layer earlier, so the last layer is local
    late_half            the last n_layer // 2 layers are local
    early_half           the first n_layer // 2 layers are local
    """
    to_last = [n_layer - 1 - l for l in range(n_layer)]  # 0 for the last layer
    if name == "late_half":
        return [d < n_layer // 2 for d in to_last]
    if name == "early_half":
        return [d >= n_layer - n_layer // 2 for d in to_last]
    match = re.fullmatch("interleaved:([0-9]{1,4})(:local)?", str(name))
    if not match or int(match[1]) < 2:
        return None
    return [(d - bool(match[2])) % int(match[1]) > 0 for d in to_last]


# --------------------------------------------------------------------------------------------------
# the semantic partition, part 1: does a sentence belong with the sentences before it?

ALPHA = 300.0  # words: a block of this length says as much about the next word as the background
LEAST = 1e-5  # added to the background probability of every word, so that none is 0
LIMIT = 32  # sentences: no block is longer


def evidence(sentence, block, q):
    """log p(sentence | it continues the block) - log p(sentence | it begins a block), in nats.

    sentence: the set of its word ids. block: a Counter of the words of the block so far. q: the
    probability of each word of the sentence in the background, a dict.

    The words of a block follow a Dirichlet-multinomial around the background (Utiyama & Isahara
    2001; Eisenstein & Barzilay 2008). After n words, m of them w,

        p(w | block) = (m + ALPHA * q[w]) / (n + ALPHA)

    so a word that the block has used is likely to be used again.
    """
    n, nats = block.total(), 0.0
    for i, word in enumerate(sentence):  # i words of the sentence have been read
        continues = (block[word] + ALPHA * q[word]) / (n + i + ALPHA)
        begins = ALPHA * q[word] / (i + ALPHA)
        nats += math.log(continues / begins)
    return nats


class Evidence:
    """The evidence of each sentence of a document for every block that may be running.

    base: the probability of every word id, (N_WORD_IDS,) float64. The background probabilities are
    these, updated with the words of the document so far as if `prior` words had been read before.
    """

    def __init__(self, base, prior):
        self.base, self.prior = base, prior
        self.reset()

    def reset(self):
        """Forget everything: a new document begins."""
        self.recent = []  # the words of each of the last LIMIT - 1 sentences
        self.counts = Counter()  # of the words of the document so far

    def gains(self, words, sizes):
        """The evidence of some new sentences for the block of the `lag` sentences before each.

        words: the word ids of the sentences, one after another, int64; sizes: words per sentence.
        Returns (LIMIT lags, sentences) float64, in nats.
        """
        sentences = np.split(words, np.cumsum(sizes)[:-1])
        return np.stack([self.observe(sentence.tolist()) for sentence in sentences], 1)

    def observe(self, sentence):
        """The evidence of the next sentence, a list of word ids: (LIMIT,) float64, by lag."""
        gains, block, total = np.zeros(LIMIT), Counter(), self.prior + self.counts.total()
        p = {word: (self.prior * self.base[word] + self.counts[word]) / total for word in sentence}
        q = {word: LEAST + p[word] for word in p}
        for lag, before in enumerate(reversed(self.recent), 1):
            block.update(before)
            gains[lag] = evidence(q.keys(), block, q)
        self.counts.update(sentence)
        self.recent = [*self.recent, sentence][1 - LIMIT :]
        return gains


# --------------------------------------------------------------------------------------------------
# the semantic partition, part 2: Bayesian online change-point detection (Adams & MacKay 2007)


def hazard(mean, shape):
    """The chance that a block ends after 1 ... LIMIT sentences, given that it got so far.

    Block lengths follow a gamma distribution with this mean, in sentences, and this shape, cut off
    at LIMIT. Returns (LIMIT,) float64.
    """
    i = np.arange(1, 20 * LIMIT) - 0.5
    p = i ** (shape - 1) * np.exp(-i * shape / mean)
    chance = p[:LIMIT] / np.cumsum(p[::-1])[::-1][:LIMIT]
    chance[-1] = 1.0
    return chance


# How long blocks are, and how regular, differs from text to text. A document follows one of these
# (mean, shape); the posterior learns which.
LENGTHS = ((4, 16), (7, 16), (10, 16), (7, 4))
END = np.stack([hazard(mean, shape) for mean, shape in LENGTHS])  # (len(LENGTHS), LIMIT)
PARAGRAPH = 16.0  # a paragraph is this many times as likely to begin a block as another sentence
SURE = 0.7  # a block start cannot be taken back, so it moves only at better than even odds


class ChangePoints:
    """The posterior over where the running block began and which of LENGTHS the document follows.

    It is updated sentence by sentence. background: the words of a text of the same kind, as
    count_background returns them; None: learn from the document itself, as it is read. plain: use
    the plain twin of FastEvidence.
    """

    def __init__(self, background, plain=False):
        base, prior = np.zeros(N_WORD_IDS), 1000
        if background:
            base[background["words"]] = np.array(background["counts"]) / background["total"]
            prior = 1e9  # the document has no say: learning from it as well made blocks worse
        kind = Evidence if plain else partial(FastEvidence, alpha=ALPHA, least=LEAST, limit=LIMIT)
        self.evidence = kind(base, prior)
        self.reset()

    def reset(self):
        """Forget everything: a new document begins."""
        self.evidence.reset()
        self.starts = np.zeros(0, np.int64)  # first tokens of the last sentences
        self.n_sentences = self.n_paragraphs = 0
        # p(lengths, the block began `lag` sentences before the last one | the text so far)
        self.joint = np.zeros((len(LENGTHS), LIMIT))
        self.joint[:, -1] = 1 / len(LENGTHS)  # as if a block had just ended
        self.posterior = self.joint.sum(axis=0, keepdims=True)  # (last sentences, LIMIT)

    def observe(self, words, sizes, starts, earliest, paragraphs):
        """Update the posterior with new sentences, whose words and sizes are those of WordIds.of.

        starts: the first token of each sentence; earliest: blocks that began before these tokens
        are ruled out; paragraphs: whether each sentence begins a paragraph.
        Returns the posterior median of the token at which the block began, per sentence: a list.
        """
        n = len(sizes)
        gain = self.evidence.gains(words, sizes)  # (LIMIT, n)
        self.starts = np.concatenate([self.starts[-LIMIT:], starts])
        last = len(self.starts) - n + np.arange(n)  # where in self.starts each new sentence is
        longest = last - np.searchsorted(self.starts, earliest)  # the longest lag within reach

        # the block continues, or it ends with the sentence before and another one begins
        end = self.chance_of_end(paragraphs)  # (n, len(LENGTHS), LIMIT)
        likelihood = np.exp(np.clip(gain[1:].T.copy(), -300, 300))  # (n, LIMIT - 1)
        likelihood = likelihood * (np.arange(1, LIMIT) <= longest[:, None])
        growth = likelihood[:, None] * (1 - end[:, :, :-1])  # (n, len(LENGTHS), LIMIT - 1)
        joint = np.empty((n + 1, *self.joint.shape))
        joint[0] = self.joint
        for before, after, grows, ends in zip(joint, joint[1:], growth, end):
            np.multiply(before[:, :-1], grows, out=after[:, 1:])
            np.add.reduce(before * ends, axis=1, out=after[:, 0])
            after /= np.add.reduce(after, axis=None)
        self.joint = joint[-1].copy()
        self.posterior = joint.sum(axis=1)  # (n + 1, LIMIT)
        self.later = np.cumsum(self.posterior, axis=1)  # p(the block began at most `lag` ago)
        return self.starts[last - (self.later[1:] < 0.5).sum(axis=1)].tolist()

    def chance_of_end(self, paragraphs):
        """The chance that a block ends before each new sentence: (n, len(LENGTHS), LIMIT) float64.

        A new paragraph makes an end PARAGRAPH times as likely as any other sentence does. The
        chances are rescaled so that ends remain as frequent in the document so far as END says; if
        all sentences begin paragraphs, or none do, paragraphs have no effect.
        """
        n_sentences = self.n_sentences + np.arange(len(paragraphs)) + 1
        share = (self.n_paragraphs + np.cumsum(paragraphs)) / n_sentences
        factor = np.where(paragraphs, PARAGRAPH, 1) / (1 + (PARAGRAPH - 1) * share)
        end = np.minimum(1, END * factor[:, None, None])
        end[:, :, -1] = 1
        self.n_sentences += len(paragraphs)
        self.n_paragraphs += int(np.sum(paragraphs))
        return end

    def reach_back(self, row, token):
        """At a row of the posterior: (the index of its sentence in self.starts, how many of the
        last sentences begin at `token` or later)."""
        n = len(self.posterior)
        last = len(self.starts) - n + row % n
        return last, last + 1 - np.searchsorted(self.starts, token)

    def chance_later(self, row, token):
        """At a row of the posterior, the chance that the block began after `token`, for a token
        after which a sentence began."""
        _, n_later = self.reach_back(row, token + 1)
        return self.later[row, min(n_later, LIMIT) - 1]

    def bits_later(self, row, token):
        """That chance as log2 of the odds, in -40 ... 40: float64 cannot resolve more."""
        chance = min(max(self.chance_later(row, token), 2**-40), 1 - 2**-40)
        return math.log2(chance / (1 - chance))

    def best(self, row, earliest):
        """The median at a row of the posterior among the blocks that began at token `earliest` or
        later; None if no sentence did."""
        last, n_within = self.reach_back(row, earliest)
        if n_within < 1:
            return None
        p = np.cumsum(self.posterior[row, :n_within])
        return int(self.starts[last - (p < p[-1] / 2).sum()])


# --------------------------------------------------------------------------------------------------
# from a text to the start of the block of every token


class Partitioner:
    """The lookback of a text that arrives piece by piece.

    token_bytes: the bytes of every vocabulary entry, a list. partition: see PARTITIONS.
    max_lookback: 1 ... 65535 tokens. background: what count_background returned for the training
    split, or None; see ChangePoints. plain: use the plain twin of FastEvidence. Raises InputError.

    moves: what the last push found in a partition that follows sentences or documents, a list of
    (token, block, bits): from that token on, the block begins at token `block`. The first entry
    says where it began before. bits: how sure the change-point model was that a new block had
    begun, as log2 of the odds; None if max_lookback decided or there is no such model; inf where a
    document begins.
    """

    def __init__(self, token_bytes, partition, max_lookback, background=None, plain=False):
        self.partition, self.n = parse_partition(partition)
        if not 1 <= max_lookback <= 65535:
            raise InputError(f"max_lookback must be in 1 ... 65535 tokens, not {max_lookback}")
        self.cap, self.token_bytes = int(max_lookback), token_bytes
        self.vocabulary = np.frombuffer(b"".join(token_bytes), np.uint8)
        self.n_bytes = np.array([len(b) for b in token_bytes], np.int64)
        self.first_byte = np.cumsum(self.n_bytes) - self.n_bytes  # of each token, in `vocabulary`
        self.sentences, self.word_ids = Sentences(), WordIds()
        self.change_points = ChangePoints(background, plain) if self.partition.reads_words else None
        self.delayed = np.zeros(0, np.int64)  # lookback of the last N tokens, for shifted:N
        self.n_tokens = self.n_read = 0  # tokens and bytes so far
        self.n_found = 0  # tokens that find_blocks has seen
        self.ends = np.zeros(0, np.int64)  # byte at which each of the last tokens ends
        self.start = 0  # first token of the current sentence
        self.known = 0  # token at which `start` became known
        self.block = 0  # first token of the current block
        self.topic = 0  # where that block would begin if it were not closed
        self.moves = []

    def push(self, tokens):
        """The lookback of the next tokens: any number of integers -> (n,) uint16."""
        tokens = np.asarray(tokens).reshape(-1)
        if not len(tokens):
            return np.zeros(0, np.uint16)
        if tokens.min() < 0 or tokens.max() >= len(self.n_bytes):
            raise InputError(f"a token is outside the vocabulary of {len(self.n_bytes)} tokens")
        i = np.arange(self.n_tokens, self.n_tokens + len(tokens))
        self.n_tokens += len(tokens)
        lookback = np.asarray(self.partition.lookback(self, tokens, i))
        if lookback.shape != i.shape or lookback.dtype.kind not in "iu":
            raise InputError(
                f"a partition must return {len(i)} integers for {len(i)} tokens, not "
                f"{lookback.dtype} of shape {lookback.shape}"
            )
        if (lookback < 0).any() or (lookback > i).any():
            raise InputError("a partition must return a lookback in 0 ... i for token i")
        return np.minimum(lookback, self.cap).astype(np.uint16)

    def find_blocks(self, tokens, closed=False, at_least=None):
        """The token at which the block of each new token begins: (n,) integers -> (n,) int64.

        closed: begin a block at the token where it was recognized, so that no token in it looks
        past its start. at_least: the minimum number of tokens per block; None: use ChangePoints.
        """
        if at_least is None and not self.change_points:
            raise InputError("a partition that follows topics needs reads_words=True in PARTITIONS")
        if self.n_found + len(tokens) != self.n_tokens:
            raise InputError("a partition may call find_blocks only once, with all new tokens")
        self.n_found = self.n_tokens
        self.closed, self.at_least = closed, at_least
        n = self.n_bytes[tokens]
        ends = np.cumsum(n)
        at = np.repeat(self.first_byte[tokens] - ends + n, n) + np.arange(ends[-1])
        text = self.vocabulary[at].tobytes()
        self.ends = np.concatenate([self.ends, self.n_read + ends])
        self.n_read += len(text)
        origin = self.n_tokens - len(self.ends)  # the token that self.ends[0] belongs to
        ended = self.sentences.push(text)
        # the token at which the next sentence begins, and the token at which that is known
        known = np.array([(e.next, e.seen) for e in ended], np.int64).reshape(-1, 2)
        known = origin + np.searchsorted(self.ends, known, side="right")  # bytes -> tokens

        self.moves = [(self.n_tokens - len(tokens), self.block, None)]
        begin = 0
        for stop in [i for i, e in enumerate(ended) if e.text is None] + [len(ended)]:
            self.take_sentences(ended[begin:stop], *known[begin:stop].T)
            if stop < len(ended):
                # a new document begins with the next token, or with this one if it contains more
                seen = int(known[stop, 1])
                self.begin_document(seen + int(self.ends[seen - origin] == ended[stop].next))
            begin = stop + 1
        self.keep_within_reach(-1, self.n_tokens)
        self.ends = self.ends[np.searchsorted(self.ends, self.sentences.begin, side="right") :]
        since, block, _ = zip(*self.moves)
        return np.repeat(block, np.diff([*since, self.n_tokens]))

    def take_sentences(self, ended, starts, seen):
        """Advance by some sentences of one document, a list of support.sentences.Ended.

        The sentence after each begins at token starts[i], which is known at token seen[i].
        """
        if not ended or self.at_least == math.inf:
            return
        blocks = starts.tolist()
        if self.change_points:
            blocks = self.change_points.observe(
                *self.word_ids.of([e.text for e in ended]),
                starts=np.concatenate([[self.start], starts[:-1]]),
                earliest=np.zeros_like(seen) if self.closed else seen - self.cap,
                paragraphs=np.array([e.paragraph for e in ended]),
            )
        for i, (start, known, block) in enumerate(zip(starts.tolist(), seen.tolist(), blocks)):
            self.keep_within_reach(i, known)
            self.start, self.known = start, known
            if block <= self.topic:
                continue
            if self.change_points:
                sure = self.change_points.chance_later(i + 1, self.topic) > SURE
            else:
                sure = block >= self.block + self.at_least
            if sure:
                capped = self.block + self.cap < known  # the old block was out of reach
                bits = None
                if self.change_points and not capped:
                    bits = self.change_points.bits_later(i + 1, self.topic)
                self.topic = block
                if block > self.block:  # a closed block may already begin later
                    self.block = known if self.closed else block
                    self.moves.append((known, self.block, bits))

    def begin_document(self, start):
        """A document has ended, and the next one begins at token `start`."""
        self.keep_within_reach(-1, start)
        self.start = self.block = self.topic = self.known = start
        self.moves.append((start, start, math.inf))
        if self.change_points:
            self.change_points.reset()

    def keep_within_reach(self, row, until):
        """If the block outgrows max_lookback before token `until`, move its start to the median of
        this row of the posterior within reach. If it is closed, start a new block at the limit."""
        while self.block + self.cap < until - 1:
            if self.closed:
                self.block += self.cap + 1
                self.moves.append((self.block, self.block, None))
                continue
            token = max(self.known, self.block + self.cap + 1)
            best = self.change_points.best(row, token - self.cap) if self.change_points else None
            if best is None:
                best = self.start
            if best <= self.block:
                return  # one sentence is longer than the cap: the block slides like a window
            self.block = self.topic = best
            self.moves.append((token, best, None))


# --------------------------------------------------------------------------------------------------
# partitions: each takes a Partitioner, the new tokens and their positions i, (n,) integers each,
# and returns the lookback of these tokens, (n,) integers


def semantic(stream, tokens, i):
    """the stretch about one topic, found by ChangePoints"""
    return i - stream.find_blocks(tokens)


def semantic_closed(stream, tokens, i):
    """the same, but a block begins at the token where it was recognized"""
    return i - stream.find_blocks(tokens, closed=True)


def semantic_window(stream, tokens, i):
    """the semantic block or the last N tokens, whichever reaches further back"""
    return np.maximum(semantic(stream, tokens, i), window(stream, tokens, i))


def sentence(stream, tokens, i):
    """the sentence; it begins where that is known, usually at its first token"""
    return i - stream.find_blocks(tokens, closed=True, at_least=0)


def document(stream, tokens, i):
    """everything since the last <|endoftext|>"""
    return i - stream.find_blocks(tokens, at_least=math.inf)


def window(stream, tokens, i):
    """the last N tokens"""
    return np.minimum(i, stream.n - 1)


def block(stream, tokens, i):
    """fixed blocks of N tokens: 0 ... N - 1, N ... 2 N - 1, ..."""
    return i % stream.n


def aligned(stream, tokens, i):
    """a block begins with the first sentence after N tokens: aligned with sentences, like semantic
    blocks, but blind to meaning"""
    return i - stream.find_blocks(tokens, closed=True, at_least=stream.n)


def shifted(stream, tokens, i):
    """the semantic blocks of the text N tokens earlier: right lengths, wrong places; the first N
    tokens keep their own"""
    lookback = np.minimum(semantic(stream, tokens, i), stream.cap)
    known = np.concatenate([stream.delayed, lookback])
    n_first = max(stream.n - len(stream.delayed), 0)
    stream.delayed = known[-stream.n :]
    return np.concatenate([lookback[:n_first], known[: max(len(lookback) - n_first, 0)]])


class Partition(NamedTuple):
    lookback: Callable  # one of the functions above; its docstring says what a block is
    takes_n: bool = False  # the name is followed by :N, in tokens
    reads_words: bool = False  # it uses ChangePoints, and so the words of the training split
    restarts: bool = False  # with every document, so documents do not depend on each other


PARTITIONS = {
    "semantic": Partition(semantic, reads_words=True, restarts=True),
    "semantic:closed": Partition(semantic_closed, reads_words=True, restarts=True),
    "semantic+window": Partition(semantic_window, takes_n=True, reads_words=True),
    "sentence": Partition(sentence, restarts=True),
    "document": Partition(document, restarts=True),
    "window": Partition(window, takes_n=True),
    "block": Partition(block, takes_n=True),
    "aligned": Partition(aligned, takes_n=True, restarts=True),
    "shifted": Partition(shifted, takes_n=True, reads_words=True),
}


def partition_names():
    """The names of all partitions as a user writes them, such as window:N; a string."""
    return ", ".join(name + ":N" * entry.takes_n for name, entry in PARTITIONS.items())


def parse_partition(partition):
    """(the entry of PARTITIONS, N in tokens or None) of a name such as "semantic" or "window:64".

    Raises InputError for another name.
    """
    entry = PARTITIONS.get(partition)
    if entry and not entry.takes_n:
        return entry, None
    name, _, n = str(partition).partition(":")
    entry = PARTITIONS.get(name)
    if entry and entry.takes_n and n.isascii() and n.isdigit() and len(n) < 10 and int(n) > 0:
        return entry, int(n)
    raise InputError(
        f"partition must be one of {partition_names()}, where N is a number of tokens, not "
        f"{partition!r}"
    )


def check_causal(tokens, token_bytes, partition, *rules):
    """Raises InputError if a partition looks ahead within the first CHECKED tokens of a text.

    They are read all at once and one by one. When tokens are read one by one, a lookback cannot
    depend on tokens that have not been read. The arguments are those of partition_text.
    """

    def push(n):
        return Partitioner(token_bytes, partition, *rules).push(tokens[:n])

    stream, whole = Partitioner(token_bytes, partition, *rules), push(CHECKED)
    for i, at_once in enumerate(whole):
        alone = stream.push(tokens[i : i + 1])[0]
        if alone != at_once:
            j = next((j for j in range(i, len(whole)) if push(j + 1)[i] != alone), i)
            cause = f"token {j}" if j > i else "the number of tokens in a push"
            raise InputError(
                f"{partition} looks ahead: the lookback of token {i} changes with {cause}"
            )


def reach(lookback, locality, anchor=False):
    """The earliest token that can influence the output at each token, through all layers.

    lookback: (n,) integers of one context; locality: that of every layer; anchor: token 0 belongs
    to every block. Returns (n,) int64.
    A layer at 1 lets a token read its block. Each token of the block has read, one layer below,
    its own block, and so on down to the first layer. If a layer's locality is below 1, it reads
    the whole context; with an anchor, it always reads token 0. Both make the result 0 everywhere.
    Whatever the weights, no earlier token can change the output if the blocks stay the same.
    """
    tokens = np.arange(len(lookback))
    if anchor or min(locality) < 1:
        return np.zeros_like(tokens)
    start, earliest = tokens - np.minimum(lookback, tokens), tokens
    for _ in locality:
        earliest = start[earliest]
    return earliest


# --------------------------------------------------------------------------------------------------
# a whole text

CHUNK = 1 << 16  # tokens at a time
CHECKED = 2000  # tokens, by check_causal
SHARE = 1 << 20  # the least tokens that are worth a process


def partition_text(
    tokens, token_bytes, partition, max_lookback, background=None, out=None, plain=False
):
    """The lookback of a whole text, (n,) integers -> (n,) uint16, written to `out` if given.

    For the other arguments, and what it raises, see Partitioner. If the partition restarts with
    every document and one token ends a document, the processors share the documents in groups.
    """
    Partitioner(token_bytes, partition, max_lookback, background)  # raises InputError early
    out = np.empty(len(tokens), np.uint16) if out is None else out
    cuts = [0]
    if parse_partition(partition)[0].restarts and END_OF_TEXT in token_bytes:
        end_of_text = token_bytes.index(END_OF_TEXT)
        for i in range(0, len(tokens), CHUNK):
            ends = np.flatnonzero(tokens[i : i + CHUNK] == end_of_text) + i + 1
            ends = ends[(ends >= cuts[-1] + SHARE) & (ends <= len(tokens) - SHARE)]
            cuts += ends[:1].tolist()
    cuts.append(len(tokens))

    def share(first, last):
        partitioner = Partitioner(token_bytes, partition, max_lookback, background, plain)
        for i in range(first, last, CHUNK):
            yield i, partitioner.push(tokens[i : min(i + CHUNK, last)])

    for i, lookback in in_parallel(share, list(zip(cuts, cuts[1:]))):
        out[i : i + len(lookback)] = lookback
    return out


def count_background(tokens, token_bytes):
    """The word distribution of a text, for Partitioner: {"total", "words": ids, "counts"}, ints.

    It keeps the 30,000 most common words, which take less than a megabyte as JSON. It needs a
    bounded amount of memory if `tokens` is a memory map.
    """
    word_ids, counts, rest = WordIds(), np.zeros(N_WORD_IDS, np.int64), b""
    for i in range(0, len(tokens), CHUNK):
        chunk = np.asarray(tokens[i : i + CHUNK]).tolist()
        text = rest + b"".join([token_bytes[t] for t in chunk])
        cut = max(text.rfind(b" "), text.rfind(b"\n")) + 1  # a word may continue in the next chunk
        if i + CHUNK >= len(tokens) or len(text) - cut > 1 << 20:
            cut = len(text)
        ids, _ = word_ids.of([text[:cut].replace(END_OF_TEXT, b" ")])
        counts += np.bincount(ids, minlength=N_WORD_IDS)
        rest = text[cut:]
    commonest = np.argsort(-counts, kind="stable")[:30_000]
    commonest = np.sort(commonest[counts[commonest] > 0])
    total = int(max(1, counts.sum()))
    return {"total": total, "words": commonest.tolist(), "counts": counts[commonest].tolist()}
