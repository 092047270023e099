"""Where attention may look: how locality grows with depth, and which block each token sees.

Two things, both free of any model. `schedule` gives lambda_l, the dial of every layer. `partition`
and `Partitioner` give the *lookback* of every token: the block of token i is the tokens
i - lookback[i] ... i. Whatever the method, lookback[i] is a function of the tokens 0 ... i alone.
"""

import math

import numpy as np

from support.files import InputError
from support.machine import in_parallel
from support.sentences import END_OF_TEXT, LONGEST, N_STEMS, PERSONS, Sentences, Stems, carries_on
from support.settings import nearest

# --------------------------------------------------------------------------------------------------
# schedules: lambda_l = fidelity * (l / (L-1)) ** degree

SCHEDULES = {  # name: degree
    "distributed": None,  # lambda is 0 in every layer: plain GPT-2
    "localist": 0,
    "linear": 1,
    "quadratic": 2,
    "cubic": 3,
    "quartic": 4,
    "quintic": 5,
    "reversed": 5,  # quintic upside down, a control
}


def schedule(name, n_layer, fidelity=1.0):
    """lambda of each layer, a list of n_layer floats in [0, 1] (arXiv 2511.18375).

    It is `fidelity` at the last layer and fades towards the first. `reversed` is `fidelity` at the
    first layer and fades towards the last.
    Raises InputError for an unknown name, n_layer < 1, or a fidelity outside (0, 1].
    """
    if name not in SCHEDULES:
        known = f"did you mean {nearest(name, SCHEDULES)!r}? (one of {', '.join(SCHEDULES)})"
        raise InputError(f"unknown schedule {name!r}: {known}")
    if isinstance(n_layer, bool) or not isinstance(n_layer, (int, np.integer)) or n_layer < 1:
        raise InputError(f"n_layer must be a whole number of at least 1, not {n_layer!r}")
    number = isinstance(fidelity, (int, float, np.number)) and not isinstance(fidelity, bool)
    if not number or not 0 < fidelity <= 1:
        raise InputError(f"fidelity must be above 0 and at most 1, not {fidelity!r}")
    if name == "distributed":
        return [0.0] * n_layer
    last, degree = n_layer - 1, SCHEDULES[name]
    if last == 0:  # a single layer is the last layer
        return [float(fidelity)]
    lambdas = [float(fidelity) * (l / last) ** degree for l in range(n_layer)]
    return lambdas[::-1] if name == "reversed" else lambdas


# --------------------------------------------------------------------------------------------------
# the semantic partition, part 1: how well a sentence goes with the sentences before it

LIMIT = 32  # sentences: the longest block there is


class Bag:
    """How well a sentence's words go with those before it, for each block that may be running.

    The words of a block follow a Pitman-Yor process (Teh 2006); with discount = 0 that is the
    Dirichlet-multinomial. After n words of a block, v of them distinct and m of them w, and with
    q the background's probability of w,

        p(w | block) = (max(m - discount, 0) + (alpha + discount * v) * q) / (alpha + n)

    So a word said before is likely to be said again, and a block that repeats itself is expected to
    go on doing so. q is learned as the document goes: its counts, on top of `prior` words spread as
    `base` (ids -> probability), on top of `least`.
    """

    def __init__(self, alpha, discount, base, prior, least):
        self.alpha, self.discount = alpha, discount
        self.base, self.prior, self.least = base, prior, least
        i = np.arange(LIMIT * LONGEST)
        # log of alpha (alpha + 1) ... (alpha + n - 1), and the same in steps of discount
        self.log_n = np.concatenate([[0.0], np.cumsum(np.log(alpha + i))])
        self.log_v = np.concatenate([[0.0], np.cumsum(np.log(alpha + discount * i))])
        self.counts, self.total = np.zeros(len(base), np.int32), 1
        self.reset()

    def reset(self):
        """A new document: forget everything."""
        if self.total:
            self.counts[:] = 0
        self.total = 0
        self.words = np.zeros(0, np.int64)  # of the last LIMIT - 1 sentences
        self.sizes = np.zeros(0, np.int64)  # of each of them, in words

    def gains(self, words, sizes):
        """log p(sentence | block of the `lag` sentences before it) - log p(sentence | no block).

        words: ids of the words of the new sentences, int64; sizes: words in each sentence, int64.
        Returns (LIMIT lags, sentences) float64, in nats. A sentence is scored as the set of its
        words; a word m times in the block counts with the v of its latest time there. Sums run in
        an order that does not depend on how many sentences come at once: streaming gives the same
        bits.
        """
        n_old, n_new = len(self.sizes), len(sizes)
        n, before = n_old + n_new, len(self.words)
        words = np.concatenate([self.words, words])
        sizes = np.concatenate([self.sizes, sizes])
        order = np.argsort(words, kind="stable")
        # the same words side by side, in the order of their sentences
        word, when = words[order], np.repeat(np.arange(n), sizes)[order]
        ago = np.full(len(word), LIMIT)  # sentences since each word was last said, at most LIMIT
        ago[1:] = np.where(word[1:] == word[:-1], np.minimum(when[1:] - when[:-1], LIMIT), LIMIT)
        n_words, n_distinct = block_sizes(ago, when, sizes)
        n_words, n_distinct = n_words[:, n_old:], n_distinct[:, n_old:]

        new = np.flatnonzero((ago > 0) & (when >= n_old))  # one of each word of each new sentence
        size = np.bincount(when[new] - n_old, minlength=n_new)
        # what every word costs
        gain = self.log_v[n_distinct + size] - self.log_v[n_distinct]
        gain = gain - self.log_n[n_words + size] + self.log_n[n_words]
        gain -= self.log_v[size] - self.log_n[size]
        # what the words said before bring
        brought, matched = self.rewards(word, when, new, n_distinct, sizes[n_old:], n_old)
        gain += brought
        gain -= matched

        np.add.at(self.counts, words[before:], 1)
        self.total += len(words) - before
        self.sizes = sizes[-(LIMIT - 1) :]
        self.words = words[len(words) - self.sizes.sum() :]
        return gain

    def rewards(self, word, when, new, n_distinct, sizes, n_old):
        """What words that were said within reach add to `gains`: two (LIMIT, sentences) float64.

        There is one entry for each time that a word of a new sentence was said before.
        """
        n_new = len(sizes)
        key = word * (n_old + n_new) + when
        column = when[new] - n_old
        seen = self.counts[word[new]] + new - np.searchsorted(key, key[new] - column)
        total = self.total + np.cumsum(sizes) - sizes
        q = (self.prior * self.base[word[new]] + seen) / (self.prior + total[column])
        q = self.least + q
        times = new - np.searchsorted(key, key[new] - np.minimum(when[new], LIMIT - 1))
        m = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times) + 1
        lag = np.repeat(when[new], times) - when[np.repeat(new, times) - m]
        cell = lag * n_new + np.repeat(column, times)
        open_mass = self.alpha + self.discount * n_distinct
        value = np.log(open_mass.reshape(-1)[cell] + (m - self.discount) / np.repeat(q, times))
        value[1:] -= np.where(m[1:] > 1, value[:-1], 0.0)
        shape = LIMIT, n_new
        brought = np.bincount(cell, value, minlength=LIMIT * n_new).reshape(shape)
        matched = np.bincount(cell[m == 1], minlength=LIMIT * n_new).reshape(shape)
        return np.cumsum(brought, axis=0), np.cumsum(matched, axis=0) * np.log(open_mass)


def block_sizes(ago, when, sizes):
    """The words, and the distinct words, of the block of `lag` sentences before each sentence.

    ago, when: of each word, sentences since it was last said, and its sentence; sizes: words in
    each sentence. Returns two (LIMIT lags, sentences) int64.
    """
    n = len(sizes)
    repeats = np.bincount(ago * n + when, minlength=(LIMIT + 1) * n).reshape(LIMIT + 1, n)
    fresh = sizes - np.cumsum(repeats[:LIMIT], axis=0)  # words new to a block of each length
    n_words, n_distinct = np.zeros((2, LIMIT, n), np.int64)
    for lag in range(1, min(LIMIT, n)):
        n_words[lag, lag:] = n_words[lag - 1, lag - 1 : -1] + sizes[lag - 1 : -1]
        n_distinct[lag, lag:] = n_distinct[lag - 1, lag - 1 : -1] + fresh[lag - 1, lag - 1 : -1]
    return n_words, n_distinct


# --------------------------------------------------------------------------------------------------
# the semantic partition, part 2: Bayesian online change-point detection (Adams & MacKay 2007)


def hazard(mean, shape):
    """The chance that a block ends after 1 ... LIMIT sentences if it got so far, (LIMIT,) float64.

    Lengths follow a gamma distribution, cut at LIMIT. mean: sentences.
    """
    i = np.arange(1, 20 * LIMIT) - 0.5
    p = i ** (shape - 1) * np.exp(-i * shape / mean)
    chance = p[:LIMIT] / np.cumsum(p[::-1])[::-1][:LIMIT]
    chance[-1] = 1.0
    return chance


# How long blocks are, and how regular, differs from text to text. A document follows one of these,
# (mean, shape); the posterior finds out which as it goes.
LENGTHS = ((4, 16), (7, 16), (10, 16), (7, 4))
END = np.stack([hazard(mean, shape) for mean, shape in LENGTHS])  # (len(LENGTHS), LIMIT)
PARAGRAPH = 16.0  # times as likely to begin a block as another sentence
LEANING = 0.2  # the same, of a sentence that leans on the one before it
SURE = 0.6  # a block start cannot be taken back: move on only at better than even chances


class ChangePoints:
    """Where did the running block begin, and which of LENGTHS does the document follow?

    The posterior over both, sentence by sentence.
    """

    def __init__(self, background):
        base = np.zeros(N_STEMS)
        if background:
            base[background["stems"]] = np.array(background["counts"]) / background["total"]
        persons = np.full(len(PERSONS), 1 / len(PERSONS))
        prior = 5000 if background else 1000
        self.bags = [  # what is spoken of; who is spoken of
            Bag(alpha=16.0, discount=0.65, base=base, prior=prior, least=1e-4),
            Bag(alpha=60.0, discount=0.0, base=persons, prior=300, least=0.0),
        ]
        self.reset()

    def reset(self):
        """A new document."""
        for bag in self.bags:
            bag.reset()
        self.starts = np.zeros(0, np.int64)  # first tokens of the last sentences
        self.n_sentences, self.n_paragraphs, self.n_leaning = 0, 0, 0
        # p(lengths, block began `lag` sentences before the last one | text up to it)
        self.joint = np.zeros((len(LENGTHS), LIMIT))
        self.joint[:, -1] = 1 / len(LENGTHS)  # a block has just ended
        self.posterior = self.joint.sum(axis=0, keepdims=True)  # (last sentences, LIMIT)

    def observe(self, words, sizes, starts, earliest, paragraphs, leaning):
        """Take in new sentences (see Stems.of) that begin at tokens `starts`.

        earliest: blocks that began before these tokens are forgotten. paragraphs, leaning: whether
        a blank line precedes each sentence; whether it `carries_on`.
        Returns the median of the token at which the block began, a list, one for each sentence.
        """
        when = np.repeat(np.arange(len(sizes)), sizes)
        gain = 0.0
        for bag, mine in zip(self.bags, (words >= len(PERSONS), words < len(PERSONS))):
            gain = gain + bag.gains(words[mine], np.bincount(when[mine], minlength=len(sizes)))
        n = len(starts)
        self.starts = np.concatenate([self.starts[-LIMIT:], starts])
        last = len(self.starts) - n + np.arange(n)  # in self.starts, each new sentence
        longest = last - np.searchsorted(
            self.starts, earliest
        )  # the longest lag that is not too long

        # a block goes on, or ends with the sentence before and another one begins
        end = self.chance_of_end(paragraphs, leaning)  # (n, len(LENGTHS), LIMIT)
        likely = np.exp(np.clip(gain[1:].T.copy(), -300, 300))
        likely = likely * (np.arange(1, LIMIT) <= longest[:, None])
        go_on = likely[:, None] * (1 - end[:, :, :-1])
        joint = np.empty((n + 1, *self.joint.shape))
        joint[0] = self.joint
        for old, now, goes_on, ends in zip(joint, joint[1:], go_on, end):
            np.multiply(old[:, :-1], goes_on, out=now[:, 1:])
            np.add.reduce(old * ends, axis=1, out=now[:, 0])
            now /= np.add.reduce(now, axis=None)
        self.joint = joint[-1].copy()
        self.posterior = joint.sum(axis=1)
        self.later = np.cumsum(self.posterior, axis=1)
        return self.starts[last - (self.later[1:] < 0.5).sum(axis=1)].tolist()

    def chance_of_end(self, paragraphs, leaning):
        """The chance that a block ends before each new sentence: (n, len(LENGTHS), LIMIT) float64.

        A paragraph makes a break PARAGRAPH times as likely as elsewhere, a sentence that leans on
        the one before it LEANING times. Over the document so far breaks stay as likely as END says:
        a document that is all paragraphs, or has none, is none the wiser.
        """
        n_sentences = self.n_sentences + np.arange(len(paragraphs)) + 1
        factor = 1.0
        for times, here, before in (
            (PARAGRAPH, paragraphs, self.n_paragraphs),
            (LEANING, leaning, self.n_leaning),
        ):
            share = (before + np.cumsum(here)) / n_sentences
            factor = factor * np.where(here, times, 1) / (1 + (times - 1) * share)
        end = np.minimum(1, END * factor[:, None, None])
        end[:, :, -1] = 1
        self.n_sentences += len(paragraphs)
        self.n_paragraphs += int(np.sum(paragraphs))
        self.n_leaning += int(np.sum(leaning))
        return end

    def chance_later(self, i, block):
        """At row i of the posterior, the chance that the block began after token `block`, where
        some sentence did."""
        n_posterior = len(self.posterior)
        last = len(self.starts) - n_posterior + i % n_posterior
        n_later = last + 1 - np.searchsorted(self.starts, block, side="right")
        return self.later[i, min(n_later, LIMIT) - 1]

    def bits_later(self, i, block):
        """That chance in bits: log2 of the odds, in -40 … 40. Float64 cannot tell more."""
        chance = min(max(self.chance_later(i, block), 2**-40), 1 - 2**-40)
        return math.log2(chance / (1 - chance))

    def best(self, i, earliest):
        """The median at row i of the posterior, among the blocks that began at token
        `earliest` or later. None if there are none."""
        n_posterior = len(self.posterior)
        last = len(self.starts) - n_posterior + i % n_posterior
        n_reach = last + 1 - np.searchsorted(self.starts, earliest)
        if n_reach < 1:
            return None
        p = np.cumsum(self.posterior[i, :n_reach])
        return int(self.starts[last - (p < p[-1] / 2).sum()])


# --------------------------------------------------------------------------------------------------
# partitioners


FOLLOW_TEXT = ("semantic", "semantic:closed", "sentence", "document")
TAKE_LENGTH = ("window", "block", "aligned", "shifted")
SEMANTIC = ("semantic", "semantic:closed", "shifted")  # these know the words of the training split
PARTITIONS = ", ".join([*FOLLOW_TEXT, *(f"{name}:N" for name in TAKE_LENGTH)])


def parse_partition(method):
    """(name, N), N in tokens; None for a name that takes no N. Raises InputError for another name.

    semantic         blocks about one thing. Where one began is known only later: `ChangePoints`
    semantic:closed  the same, but a block begins at the token where it became known
    sentence         the sentence; it begins where that is known, as a rule at its first token
    document         everything since the last <|endoftext|>
    window:N         the last N tokens
    block:N          tokens 0 … N - 1, N … 2 N - 1, …: cut by a ruler
    aligned:N        a block begins with the first sentence after N tokens: aligned with sentences,
                     as semantic blocks are, and blind to meaning
    shifted:N        the semantic blocks of the text N tokens before: right lengths, wrong places
    """
    name, _, n = str(method).partition(":")
    if method in FOLLOW_TEXT:
        return method, None
    if name in TAKE_LENGTH and n.isascii() and n.isdigit() and len(n) < 10 and int(n) > 0:
        return name, int(n)
    raise InputError(f"partition must be one of {PARTITIONS} (N > 0 tokens), not {method!r}")


def reach(lookback, lambdas, anchor=False):
    """The earliest token that can reach the output at each token, through all layers.

    lookback: (n,) integers of one context; lambdas: the dial of every layer; anchor: token 0 is in
    every block. Returns (n,) int64.
    A layer at 1 lets a token read from the start of its block on. A token in there has read, one
    layer below, from the start of its own block on; and so down to the first layer. A layer below 1
    reads the whole context, and so does an anchor. Whatever the weights, no token before this one
    can change the output by one bit (as long as the blocks stay the same).
    """
    tokens = np.arange(len(lookback))
    if anchor or min(lambdas) < 1:
        return np.zeros_like(tokens)
    start, earliest = tokens - np.minimum(lookback, tokens), tokens
    for _ in lambdas:
        earliest = start[earliest]
    return earliest


class Partitioner:
    """Lookback of a text that arrives piece by piece.

    token_bytes: the bytes of every vocabulary entry, a list. method: see parse_partition.
    max_lookback: tokens, 1 ... 65535. background: what `background` made of a training split, or
    None. Raises InputError.

    moves: what the last push found in a partition that follows sentences or documents, a list of
    (token, block, bits): from that token on, the block begins at token `block`. The first entry
    says where it began before. bits: how sure the change-point model was that a new block had
    begun, log2 of the odds; None where the cap decided, or there is no such model; inf where a
    document begins.
    """

    def __init__(self, token_bytes, method, max_lookback, background=None):
        whole = isinstance(max_lookback, (int, np.integer)) and not isinstance(max_lookback, bool)
        if not whole or not 1 <= max_lookback <= 65535:
            raise InputError(f"max_lookback must be 1 to 65535 tokens, not {max_lookback!r}")
        self.method, self.size = parse_partition(method)
        self.cap = int(max_lookback)
        self.vocabulary = np.frombuffer(b"".join(token_bytes), np.uint8)
        self.n_bytes = np.array([len(b) for b in token_bytes], np.int64)
        self.bytes_at = np.cumsum(self.n_bytes) - self.n_bytes  # in `vocabulary`, each token's
        self.sentences, self.stems = Sentences(), Stems()
        # no token of a closed block has looked further back than the block does
        self.closed = self.method in ("semantic:closed", "sentence", "aligned")
        self.blocks = ChangePoints(background) if self.method in SEMANTIC else None
        self.late = np.zeros(0, np.uint16)  # lookback of the last N tokens, for shifted:N
        self.n_tokens = 0  # tokens so far
        self.n_read = 0  # bytes so far
        self.ends = np.zeros(0, np.int64)  # byte at which each of the last tokens ends
        self.start = 0  # first token of the running sentence
        self.known = 0  # token that told of it
        self.block = 0  # first token of the running block
        self.topic = 0  # the same, had a closed block not been cut
        self.moves = []

    def push(self, tokens):
        """Lookback of the next tokens: integers, any number of them -> (n,) uint16."""
        tokens = np.asarray(tokens).reshape(-1)
        if not len(tokens):
            return np.zeros(0, np.uint16)
        if tokens.min() < 0 or tokens.max() >= len(self.n_bytes):
            found = f"{tokens.min()} ... {tokens.max()}"
            raise InputError(f"a token is not in the vocabulary of {len(self.n_bytes)}: {found}")
        i = np.arange(self.n_tokens, self.n_tokens + len(tokens))
        self.n_tokens += len(tokens)
        if self.method == "window":
            return np.minimum(i, min(self.size - 1, self.cap)).astype(np.uint16)
        if self.method == "block":
            return np.minimum(i % self.size, self.cap).astype(np.uint16)
        since, block, _ = zip(*self.find_blocks(tokens))
        block = np.repeat(block, np.diff([*since, self.n_tokens]))
        lookback = np.minimum(i - block, self.cap).astype(np.uint16)
        return self.shift(lookback) if self.method == "shifted" else lookback

    def shift(self, lookback):
        """For shifted:N: each token gets the lookback of the token N before; the first N tokens
        keep their own."""
        known = np.concatenate([self.late, lookback])
        early = max(self.size - len(self.late), 0)  # so many of them have none before
        self.late = known[-self.size :]
        return np.concatenate([lookback[:early], known[: max(len(lookback) - early, 0)]])

    def find_blocks(self, tokens):
        """`moves`, for new tokens."""
        n = self.n_bytes[tokens]
        ends = np.cumsum(n)
        letters = np.repeat(self.bytes_at[tokens] - ends + n, n) + np.arange(ends[-1])
        self.ends = np.concatenate([self.ends, self.n_read + ends])
        self.n_read += int(ends[-1])
        origin = self.n_tokens - len(self.ends)  # token that self.ends[0] is of
        ended = self.sentences.push(self.vocabulary[letters].tobytes())
        at = np.array([(e.next, e.seen) for e in ended], np.int64).reshape(-1, 2)
        at = origin + np.searchsorted(self.ends, at, side="right")  # bytes -> tokens

        self.moves = [(self.n_tokens - len(tokens), self.block, None)]
        begin = 0
        for stop in [i for i, e in enumerate(ended) if e.text is None] + [len(ended)]:
            self.take_sentences(ended[begin:stop], *at[begin:stop].T)
            if stop < len(ended):
                # a new document begins with the next token, or with this one if it goes on after
                seen = int(at[stop, 1])
                self.begin_document(seen + int(self.ends[seen - origin] == ended[stop].next))
            begin = stop + 1
        self.keep_within_reach(-1, self.n_tokens)
        self.ends = self.ends[np.searchsorted(self.ends, self.sentences.begin, side="right") :]
        return self.moves

    def take_sentences(self, ended, starts, seen):
        """Move on by some sentences of one document, a list of Ended. The next one after each
        begins at token starts[i], which is known at token seen[i]."""
        if not ended or self.method == "document":
            return
        best = starts.tolist()
        if self.blocks:
            begun = np.concatenate([[self.start], starts[:-1]])
            texts = [e.text for e in ended]
            paragraphs = np.array([e.paragraph for e in ended])
            leaning = np.array([carries_on(text) for text in texts])
            words = self.stems.of(texts)
            earliest = np.zeros_like(seen) if self.closed else seen - self.cap
            best = self.blocks.observe(*words, begun, earliest, paragraphs, leaning)
        for i, (start, known, block) in enumerate(zip(starts.tolist(), seen.tolist(), best)):
            self.keep_within_reach(i, known)
            self.start, self.known = start, known
            if self.blocks:
                sure = self.blocks.chance_later(i + 1, self.topic) > SURE
            else:
                sure = block >= self.block + (self.size or 0)  # aligned:N
            if block > self.topic and sure:
                capped = self.block + self.cap < known  # the block before was out of the question
                bits = self.blocks.bits_later(i + 1, self.topic) if self.blocks else None
                self.topic = block
                if block > self.block:  # a closed block may begin later already
                    self.block = known if self.closed else block
                    self.moves.append((known, self.block, None if capped else bits))

    def begin_document(self, start):
        """A document has ended; the next one begins at token `start`."""
        self.keep_within_reach(-1, start)
        self.start = self.block = self.topic = self.known = start
        self.moves.append((start, start, math.inf))
        if self.blocks:
            self.blocks.reset()

    def keep_within_reach(self, i, until):
        """Where the block after sentence i outgrows the cap before token `until`, move on to the
        next best start within reach. A closed block is cut there."""
        while self.block + self.cap < until - 1:
            if self.closed:
                self.block += self.cap + 1
                self.moves.append((self.block, self.block, None))
                continue
            token = max(self.known, self.block + self.cap + 1)
            best = self.blocks.best(i, token - self.cap) if self.blocks else None
            if best is None:
                best = self.start
            if best <= self.block:
                return  # one sentence longer than the cap: the window slides
            self.block = self.topic = best
            self.moves.append((token, best, None))


# --------------------------------------------------------------------------------------------------
# a whole sequence

CHUNK = 1 << 16  # tokens at a time
SHARE = 1 << 20  # tokens at least that a process gets


def partition(tokens, token_bytes, method, max_lookback, background=None, out=None):
    """Lookback of a whole sequence, (n,) integers -> (n,) uint16, into `out` if given.

    For the rest, and what it raises, see Partitioner. Documents do not depend on each other: where
    one token ends a document, groups of them are dealt out to the processors.
    """
    Partitioner(token_bytes, method, max_lookback, background)  # complains early
    out = np.empty(len(tokens), np.uint16) if out is None else out
    cuts = [0]
    name, _ = parse_partition(method)
    if name in (*FOLLOW_TEXT, "aligned") and END_OF_TEXT in token_bytes:
        end_of_text = token_bytes.index(END_OF_TEXT)
        for i in range(0, len(tokens), CHUNK):
            ends = np.flatnonzero(tokens[i : i + CHUNK] == end_of_text) + i + 1
            ends = ends[(ends >= cuts[-1] + SHARE) & (ends <= len(tokens) - SHARE)]
            cuts += ends[:1].tolist()
    cuts.append(len(tokens))

    def share(first, last):
        partitioner = Partitioner(token_bytes, method, max_lookback, background)
        for i in range(first, last, CHUNK):
            yield i, partitioner.push(tokens[i : min(i + CHUNK, last)])

    for i, lookback in in_parallel(share, list(zip(cuts, cuts[1:]))):
        out[i : i + len(lookback)] = lookback
    return out


def background(tokens, token_bytes):
    """The word distribution of a text, for Partitioner: {"total": words, "stems": ids, "counts":
    of each}, plain ints.

    The 30,000 commonest stems, below a megabyte as JSON. Takes bounded memory on a memory map.
    """
    stems, counts, rest = Stems(), np.zeros(N_STEMS, np.int64), b""
    for i in range(0, len(tokens), CHUNK):
        some = np.asarray(tokens[i : i + CHUNK]).tolist()
        data = rest + b"".join([token_bytes[t] for t in some])
        cut = max(data.rfind(b" "), data.rfind(b"\n")) + 1  # a word may go on in the next chunk
        if i + CHUNK >= len(tokens) or len(data) - cut > 1 << 20:
            cut = len(data)
        ids, _ = stems.of([data[:cut].replace(END_OF_TEXT, b" ")])
        counts += np.bincount(ids, minlength=N_STEMS)
        rest = data[cut:]
    counts[: len(PERSONS)] = 0
    commonest = np.argsort(-counts, kind="stable")[:30_000]
    commonest = np.sort(commonest[counts[commonest] > 0])
    total = int(max(1, counts.sum()))
    return {"total": total, "stems": commonest.tolist(), "counts": counts[commonest].tolist()}
