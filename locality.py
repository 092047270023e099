"""Where attention may look: how locality grows with depth, and which block of the text each token sees.

Two independent things, both free of any model. `schedule` gives the locality lambda_l of every layer. `partition` and
`Partitioner` give the *lookback* of every token: token i sees the block of tokens i - lookback[i] ... i. Whatever the method,
lookback[i] is a function of the tokens 0 ... i alone.
"""

import difflib
import multiprocessing
import os
import re
import zlib
from itertools import chain
from queue import Empty

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# schedules: lambda_l = fidelity * (l / (L-1)) ** degree

SCHEDULES = {"distributed": None, "localist": 0, "linear": 1, "quadratic": 2, "cubic": 3, "quartic": 4, "quintic": 5, "reversed": 5}


class InputError(ValueError):
    """A mistake of the user's: scripts print it as one line and exit with status 2."""


def schedule(name, n_layer, fidelity=1.0):
    """The locality of each layer, a list of n_layer floats in [0, 1]: `fidelity` at the last layer, fading towards the first.

    `reversed` is quintic upside down, a control: `fidelity` at the first layer, fading towards the last.
    Raises InputError for an unknown name, n_layer < 1, or a fidelity outside (0, 1].
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name), SCHEDULES, 1, 0.0)[0]
        raise InputError(f"unknown schedule {name!r}: did you mean {near!r}? (one of {', '.join(SCHEDULES)})")
    if isinstance(n_layer, bool) or not isinstance(n_layer, (int, np.integer)) or n_layer < 1:
        raise InputError(f"n_layer must be a whole number of at least 1, not {n_layer!r}")
    if isinstance(fidelity, bool) or not isinstance(fidelity, (int, float, np.number)) or not 0 < fidelity <= 1:
        raise InputError(f"fidelity must be above 0 and at most 1, not {fidelity!r}")
    if name == "distributed":
        return [0.0] * n_layer
    last = n_layer - 1  # a single layer is the last layer
    lambdas = [float(fidelity) * ((l / last) ** SCHEDULES[name] if last else 1.0) for l in range(n_layer)]
    return lambdas[::-1] if name == "reversed" else lambdas


# ---------------------------------------------------------------------------------------------------------------------
# sentences: found in the bytes, each as soon as it can be known and no sooner
#
# an end is known when the first character of the next sentence has been read. every pattern below is decided by the
# bytes up to and including that character: nothing further on can undo a match or bring about an earlier one.

END_OF_TEXT = b"<|endoftext|>"
LONGEST = 800  # bytes; a longer sentence is cut at white space, so that text without punctuation has "sentences" too

FIRST = rb"[.!?\n\xd6\xd8\xdb\xe0-\xe3\xef]"  # the first byte of every pattern, which lets the search skip the others quickly
STOP = (  # . ! ? and … । ॥ ؟ ۔ ։ ።
    rb"(?:(?<=[.!?])|(?<=\xe2)\x80\xa6|(?<=\xe0)\xa5[\xa4\xa5]|(?<=\xd8)\x9f|(?<=\xdb)\x94|(?<=\xd6)\x89|(?<=\xe1)\x8d\xa2)"
)
WIDE_STOP = rb"(?:(?<=\xe3)\x80\x82|(?<=\xef)\xbc[\x81\x9f]|(?<=\xef)\xbd\xa1)"  # 。！？｡ end a sentence without white space
CLOSE = rb"(?:[\"')\]*_.!?]|\xe2\x80[\x99\x9d\xa6]|\xc2\xbb)*+"  # more stops, quotes and brackets that belong to the sentence
SPACED_CLOSE = rb"(?:[ \t]++(?:''|[)\]]|\xe2\x80\x9d)++)*+"  # tokenised text: said . ''
WIDE_CLOSE = rb"(?:\xe3\x80[\x82\x8d\x8f\x91]|\xef\xbc[\x81\x89\x9f]|\xef\xbd\xa1|[\"')\]]|\xe2\x80[\x99\x9d])*+"  # 」』】）
NOT_ASCII = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
ANY = rb"[^\s'\x80-\xff]|'[^']|" + NOT_ASCII
NOT_LOWER = rb"[^\s'\x80-\xffa-z,;:)\]]|'[^']|(?!\xe2\x80\x9d)(?:" + NOT_ASCII + rb")"
NOT_AFTER = (  # titles, initials and the like: their full stop ends nothing
    rb"(?<![.!?][.!?])(?<!(?<![\x80-\xff'])\b[A-HJ-Za-z]\.)(?<!(?<![\x80-\xffA-Za-z])[\xce-\xd1][\x80-\xbf]\.)"
    rb"(?<!\b(?:Mr|Dr|St|Lt|Mt|vs|cf)\.)(?<!\b(?:Mrs|Rev|Hon|Gen|Col|Sgt|Maj|Mme|viz)\.)(?<!\b(?:Prof|Capt|Mlle)\.)"
    rb"(?<!\bMessrs\.)(?!(?:(?<=\b[Nn]o\.)|(?<=\bpp\.)|(?<=\bch\.)|(?<=\b(?:[Vv]ol|[Ff]ig)\.))\s++\d)"
)
SENTENCE = STOP + NOT_AFTER + CLOSE + SPACED_CLOSE + rb"\s++(?P<maybe>" + NOT_LOWER + rb")"
WIDE_SENTENCE = WIDE_STOP + WIDE_CLOSE + rb"\s*+(?P<wide>" + ANY + rb")"
BLANK_LINE = rb"(?<=\n)(?<!\n\n)[ \t\r\f\v]*+\n\s*+(?P<blank>" + ANY + rb")"
LIST_ITEM = rb"(?<=\n)[ \t]*+(?P<item>[*+-][ \t]|#++[ \t]|\xe2\x80\xa2|\d{1,3}[.)][ \t])"
LINE = rb"(?<=\n)(?<!\n\n)\s*+(?P<line>" + ANY + rb")"
WRAPPED_END = re.compile(FIRST + rb"(?:" + rb"|".join([SENTENCE, BLANK_LINE, LIST_ITEM, WIDE_SENTENCE]) + rb")")
LINE_END = re.compile(FIRST + rb"(?:" + rb"|".join([SENTENCE, LINE, WIDE_SENTENCE]) + rb")")
LONG_LINE = re.compile(rb"^[^\n\x80-\xff]{101}", re.M)


def search_end(pattern, piece):
    """The first end of a sentence in a piece of text, as a match whose last group is the next sentence's first character."""
    match = pattern.search(piece)
    while match and match.lastgroup == "maybe" and match["maybe"][0] > 127 and match["maybe"].decode(errors="replace").islower():
        match = pattern.search(piece, match.start() + 1)  # a small letter that is not ASCII
    return match


def sentence_end(piece, long_lines):
    """Where the sentence at the start of `piece` (bytes, at most LONGEST) ends, if that can be told yet.

    long_lines: whether this paragraph is known to hold a line of over 100 characters, hence is not hard-wrapped, so that each of
    its newlines ends something. Returns (end, seen, long_lines, paragraph): the next sentence begins at byte `end`, which is known
    once byte `seen` >= end has been read; long_lines for it; whether it begins a paragraph. None where more text is needed.
    """
    seen = 0
    match = search_end(LINE_END if long_lines else WRAPPED_END, piece)
    if not long_lines:
        read = match.end() if match else len(piece)
        long = LONG_LINE.search(piece, 0, read) if read > 100 else None
        if long and not (match and long.end() == read):
            long_lines, seen = True, long.end() - 1
            match = search_end(LINE_END, piece)
    if match:
        end = match.start(match.lastgroup)
        newlines = piece.count(b"\n", match.start(), end)
        return end, max(seen, match.end() - 1), long_lines and newlines < 2, newlines > (not long_lines)
    if len(piece) < LONGEST:
        return None
    end = max(piece.rfind(space, LONGEST // 2, LONGEST - 1) for space in (b" ", b"\n")) + 1
    if not end:  # no white space: between two characters
        end = LONGEST - 1
        while end > LONGEST - 4 and 128 <= piece[end] < 192:
            end -= 1
    return end, LONGEST - 1, long_lines, False


# ---------------------------------------------------------------------------------------------------------------------
# words: what a sentence is about, as numbers

PERSONS = """
    i me my mine myself we us our ours ourselves you your yours he him his himself she her hers herself they them their
    theirs themselves it its itself who whom whose is are was were be been am has have had do does did can could may might must
    shall should will would
    """.split()
PERSONS = {word: i for i, word in enumerate(PERSONS)}
STOP_WORDS = frozenset(
    """about above after again against all also and any because before being below between both but doing don down during each
    even every few for from further having here how into just more most much nor not now off once one only other out over own
    same some such than that the then there these this those thou though through thus thy too under until upon very what when
    where which while why with yet yourself yourselves""".split()
)
CARRIES_ON = frozenset(  # a sentence that begins with one of these leans on the sentence before it
    b"""he she it they him them his her their its this these that those such however but also therefore thus moreover furthermore
    instead""".split()
)
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W\\d_{UNSPACED}]+")  # one character of a script without spaces is a word
LETTERS = bytes(c if c > 127 or chr(c).isalpha() else 32 for c in range(256)).lower()
N_STEMS = 1 << 18


class Stems(dict):
    """The bytes of a word -> a tuple of the ids of the stems in it, remembered.

    Ids below len(PERSONS) are pronouns and auxiliaries: who is spoken of, and when. Any other id is a hash of the first five letters
    of a word, a crude stem. Stop words have none.
    """

    def __init__(self):
        self[b"\n"] = (-1,)  # see `of`

    def __missing__(self, word):
        text = word.decode(errors="ignore").lower()
        ids = tuple(i for w in ([text] if text.isascii() else WORD.findall(text)) for i in self.stem(w))
        if len(word) <= 40:  # a whole line of a script without spaces is not worth remembering
            if len(self) >= 500_000:
                self.clear()
                self.__init__()
            self[word] = ids
        return ids

    def stem(self, word):
        if word in PERSONS:
            return (PERSONS[word],)
        if word in STOP_WORDS or len(word.encode()) < 3:
            return ()
        return (max(len(PERSONS), zlib.crc32(word[:5].encode()) % N_STEMS),)

    def of(self, sentences):
        """The ids in each of a list of sentences (bytes), in order: all of them, int64, and how many each has."""
        marked = b" \n ".join(s.translate(LETTERS) for s in sentences)  # LETTERS leaves no newline
        ids = np.fromiter(chain.from_iterable(map(self.__getitem__, marked.split(b" "))), np.int64)
        ends = np.append(np.flatnonzero(ids < 0), len(ids))
        return ids[ids >= 0], np.diff(ends, prepend=-1) - 1


def first_word(sentence):
    return sentence[:40].translate(LETTERS).lstrip().partition(b" ")[0]


# ---------------------------------------------------------------------------------------------------------------------
# the semantic partition: Bayesian online change-point detection (Adams & MacKay 2007) over sentences as bags of words

REACH = 32  # sentences: the longest block there is


class Bag:
    """How well the words of a sentence go with the sentences before it, as far back as each block that may be running.

    The words of a block follow a Pitman-Yor process (Teh 2006), which is the Dirichlet-multinomial if discount = 0. After n
    words of a block, v of them distinct and m of them w, and with q the background's probability of w,

        p(w | block) = (max(m - discount, 0) + (alpha + discount * v) * q) / (alpha + n)

    so that a word said before is likely to be said again, and a block that repeats itself is expected to go on doing so. q is
    learned as the document goes: its counts, on top of `prior` words spread as `base` (ids -> probability), on top of `floor`.
    """

    def __init__(self, alpha, discount, base, prior, floor):
        self.alpha, self.discount, self.base, self.prior, self.floor = alpha, discount, base, prior, floor
        i = np.arange(REACH * LONGEST)
        self.log_n = np.concatenate([[0.0], np.cumsum(np.log(alpha + i))])  # log of alpha (alpha + 1) ... (alpha + n - 1)
        self.log_v = np.concatenate([[0.0], np.cumsum(np.log(alpha + discount * i))])
        self.counts, self.total = np.zeros(len(base), np.int32), 1
        self.reset()

    def reset(self):
        """A new document: forget everything."""
        if self.total:
            self.counts[:] = 0
        self.total = 0
        self.words = np.zeros(0, np.int64)  # of the last REACH - 1 sentences
        self.sizes = np.zeros(0, np.int64)  # of each of them, in words

    def gains(self, words, sizes):
        """log p(sentence | block of the `lag` sentences before it) - log p(sentence | no block), (REACH lags, sentences) float64.

        words: ids of the words of the new sentences, int64; sizes: words in each sentence. A sentence is scored as the set of its
        words; a word m times in the block counts with the v of its latest time there. Sums run in an order that does not
        depend on how many sentences come at once, so that streaming gives the same bits.
        """
        alpha, discount, n_old, n_new = self.alpha, self.discount, len(self.sizes), len(sizes)
        n, before = n_old + n_new, len(self.words)
        words, sizes = np.concatenate([self.words, words]), np.concatenate([self.sizes, sizes])
        order = np.argsort(words, kind="stable")
        word, when = words[order], np.repeat(np.arange(n), sizes)[order]  # the same words side by side, in order of their sentences
        key = word * n + when

        # sentences since each word was last said (REACH: out of reach), hence the words that are new to a block of each length
        ago = np.full(len(word), REACH)
        ago[1:] = np.where(word[1:] == word[:-1], np.minimum(when[1:] - when[:-1], REACH), REACH)
        repeats = np.bincount(ago * n + when, minlength=(REACH + 1) * n).reshape(REACH + 1, n)
        fresh = sizes - np.cumsum(repeats[:REACH], axis=0)
        n_words, n_distinct = np.zeros((2, REACH, n), np.int64)
        for lag in range(1, min(REACH, n)):
            n_words[lag, lag:] = n_words[lag - 1, lag - 1 : -1] + sizes[lag - 1 : -1]
            n_distinct[lag, lag:] = n_distinct[lag - 1, lag - 1 : -1] + fresh[lag - 1, lag - 1 : -1]
        n_words, n_distinct = n_words[:, n_old:], n_distinct[:, n_old:]

        # what every word costs ...
        new = np.flatnonzero((ago > 0) & (when >= n_old))  # one of each word of each new sentence
        column = when[new] - n_old
        size = np.bincount(column, minlength=n_new)
        gain = self.log_v[n_distinct + size] - self.log_v[n_distinct] - self.log_n[n_words + size] + self.log_n[n_words]
        gain -= self.log_v[size] - self.log_n[size]

        # ... and what the words said before bring: one entry for each time that a word was said within reach
        seen = self.counts[word[new]] + new - np.searchsorted(key, key[new] - column)
        total = self.total + np.cumsum(sizes[n_old:]) - sizes[n_old:]
        q = self.floor + (self.prior * self.base[word[new]] + seen) / (self.prior + total[column])
        times = new - np.searchsorted(key, key[new] - np.minimum(when[new], REACH - 1))
        m = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times) + 1
        lag = np.repeat(when[new], times) - when[np.repeat(new, times) - m]
        cell = lag * n_new + np.repeat(column, times)
        open_mass = alpha + discount * n_distinct
        value = np.log(open_mass.reshape(-1)[cell] + (m - discount) / np.repeat(q, times))
        value[1:] -= np.where(m[1:] > 1, value[:-1], 0.0)
        gain += np.cumsum(np.bincount(cell, value, minlength=gain.size).reshape(gain.shape), axis=0)
        matched = np.cumsum(np.bincount(cell[m == 1], minlength=gain.size).reshape(gain.shape), axis=0)
        gain -= matched * np.log(open_mass)

        np.add.at(self.counts, words[before:], 1)
        self.total += len(words) - before
        self.sizes = sizes[-(REACH - 1) :]
        self.words = words[len(words) - self.sizes.sum() :]
        return gain


def hazard(mean, shape):
    """The chance that a block ends after 1 ... REACH sentences if it got so far; lengths follow a gamma distribution, cut at REACH."""
    i = np.arange(1, 20 * REACH) - 0.5
    p = i ** (shape - 1) * np.exp(-i * shape / mean)
    chance = p[:REACH] / np.cumsum(p[::-1])[::-1][:REACH]
    chance[-1] = 1.0
    return chance


# how long blocks are, and how regular, differs from text to text: a document is taken to follow one of these, (mean, shape), and
# the posterior finds out which as it goes
LENGTHS = ((4, 16), (7, 16), (10, 16), (7, 4))
END = np.stack([hazard(mean, shape) for mean, shape in LENGTHS])  # (len(LENGTHS), REACH)
PARAGRAPH = 16.0  # times as likely to begin a block as another sentence
LEANING = 0.2  # the same, of a sentence that leans on the one before it
SURE = 0.6  # a block start cannot be taken back: move on at better than even chances


class Blocks:
    """The posterior over where the running block began and which of LENGTHS the document follows, sentence by sentence."""

    def __init__(self, background):
        base = np.zeros(N_STEMS)
        if background:
            base[background["stems"]] = np.array(background["counts"]) / background["total"]
        persons = np.full(len(PERSONS), 1 / len(PERSONS))
        self.bags = [  # what is spoken of; who is spoken of
            Bag(alpha=16.0, discount=0.65, base=base, prior=5000 if background else 1000, floor=1e-4),
            Bag(alpha=60.0, discount=0.0, base=persons, prior=300, floor=0.0),
        ]
        self.reset()

    def reset(self):
        """A new document."""
        for bag in self.bags:
            bag.reset()
        self.starts = np.zeros(0, np.int64)  # first tokens of the last sentences
        self.n_sentences, self.n_paragraphs, self.n_leaning = 0, 0, 0
        self.joint = np.zeros((len(LENGTHS), REACH))  # p(lengths, block began `lag` sentences before the last one | text up to it)
        self.joint[:, -1] = 1 / len(LENGTHS)  # a block has just ended
        self.posterior = self.joint.sum(axis=0, keepdims=True)  # (last sentences, REACH), over all lengths

    def observe(self, words, sizes, starts, floors, paragraphs, leaning):
        """Take in new sentences (see Stems.of) that begin at tokens `starts`; forget blocks that began before token `floors`.

        paragraphs, leaning: whether a blank line precedes each sentence; whether its first word CARRIES_ON. They make a break
        PARAGRAPH and LEANING times as likely as elsewhere, while over the document so far breaks stay as likely as END says: a
        document that is all paragraphs, or has none, is none the wiser.
        Returns a list of the median of the token at which the block began, one for each sentence.
        """
        when = np.repeat(np.arange(len(sizes)), sizes)
        gain = 0.0
        for bag, mine in zip(self.bags, (words >= len(PERSONS), words < len(PERSONS))):
            gain = gain + bag.gains(words[mine], np.bincount(when[mine], minlength=len(sizes)))
        n = len(starts)
        self.starts = np.concatenate([self.starts[-REACH:], starts])
        last = len(self.starts) - n + np.arange(n)  # in self.starts, each new sentence
        reach = last - np.searchsorted(self.starts, floors)  # the longest lag that is not too long

        # a block goes on, or ends with the sentence before and another one begins
        n_sentences = self.n_sentences + np.arange(n) + 1
        factor = 1.0
        for times, here, before in ((PARAGRAPH, paragraphs, self.n_paragraphs), (LEANING, leaning, self.n_leaning)):
            share = (before + np.cumsum(here)) / n_sentences
            factor = factor * np.where(here, times, 1) / (1 + (times - 1) * share)
        end = np.minimum(1, END * factor[:, None, None])  # (n, len(LENGTHS), REACH)
        end[:, :, -1] = 1
        self.n_sentences += n
        self.n_paragraphs += int(np.sum(paragraphs))
        self.n_leaning += int(np.sum(leaning))
        likely = np.exp(np.clip(gain[1:].T.copy(), -300, 300)) * (np.arange(1, REACH) <= reach[:, None])
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

    def chance_later(self, i, block):
        """At row i of the posterior, the chance that the block began after token `block`, where some sentence did."""
        n_later = len(self.starts) - len(self.posterior) + i % len(self.posterior) + 1 - np.searchsorted(self.starts, block, side="right")
        return self.later[i, min(n_later, REACH) - 1]

    def best(self, i, floor):
        """The median at row i of the posterior, among the blocks that began at token `floor` or later; None if there are none."""
        last = len(self.starts) - len(self.posterior) + i % len(self.posterior)
        n_reach = last + 1 - np.searchsorted(self.starts, floor)
        if n_reach < 1:
            return None
        p = np.cumsum(self.posterior[i, :n_reach])
        return int(self.starts[last - (p < p[-1] / 2).sum()])


# ---------------------------------------------------------------------------------------------------------------------
# partitioners


def parse_partition(method):
    """("semantic" or "sentence", None), or ("window" or "block", N). Raises InputError for anything else."""
    name, _, n = str(method).partition(":")
    if method in ("semantic", "sentence"):
        return name, None
    if name in ("window", "block") and n.isascii() and n.isdigit() and len(n) < 10 and int(n) > 0:
        return name, int(n)
    raise InputError(f"partition must be semantic, sentence, window:N or block:N with N > 0 tokens, not {method!r}")


class Partitioner:
    """Lookback of a text that arrives piece by piece.

    token_bytes: the bytes of every vocabulary entry. method: see parse_partition. max_lookback: tokens, 1 ... 65535.
    background: what `background` made of a training split, or None. Raises InputError.
    """

    def __init__(self, token_bytes, method, max_lookback, background=None):
        if isinstance(max_lookback, bool) or not isinstance(max_lookback, (int, np.integer)) or not 1 <= max_lookback <= 65535:
            raise InputError(f"max_lookback must be 1 to 65535 tokens, not {max_lookback!r}")
        self.method, self.size = parse_partition(method)
        self.cap = int(max_lookback)
        self.vocabulary = np.frombuffer(b"".join(token_bytes), np.uint8)
        self.n_bytes = np.array([len(b) for b in token_bytes], np.int64)
        self.bytes_at = np.cumsum(self.n_bytes) - self.n_bytes  # where in `vocabulary` each token's bytes begin
        self.blocks = Blocks(background) if self.method == "semantic" else None
        self.stems = Stems()
        self.n_tokens = 0  # tokens so far
        self.data = b""  # bytes from a little before the running sentence on
        self.data_at = 0  # byte of the text that data[0] is
        self.at = 0  # where in data the running sentence begins
        self.ends = np.zeros(0, np.int64)  # byte at which each of the last tokens ends
        self.start = 0  # first token of the running sentence
        self.known = 0  # token that told of it
        self.block = 0  # first token of the running block
        self.seen = 0  # byte that told of the last end
        self.long_lines = False
        self.paragraph = False  # whether a blank line came before the running sentence

    def push(self, tokens):
        """Lookback (uint16) of the next tokens (integers, any number of them)."""
        tokens = np.asarray(tokens).reshape(-1)
        if not len(tokens):
            return np.zeros(0, np.uint16)
        if tokens.min() < 0 or tokens.max() >= len(self.n_bytes):
            raise InputError(f"a token is not in the vocabulary of {len(self.n_bytes)}: {tokens.min()} ... {tokens.max()}")
        i = np.arange(self.n_tokens, self.n_tokens + len(tokens))
        self.n_tokens += len(tokens)
        if self.method == "window":
            return np.minimum(i, min(self.size - 1, self.cap)).astype(np.uint16)
        if self.method == "block":
            return np.minimum(i % self.size, self.cap).astype(np.uint16)
        since, block = zip(*self.find_blocks(tokens))
        block = np.repeat(block, np.diff([*since, self.n_tokens]))
        return np.minimum(i - block, self.cap).astype(np.uint16)

    def find_blocks(self, tokens):
        """A list of (token, block): from that one of the new tokens on, the block begins at token `block`."""
        n = self.n_bytes[tokens]
        ends = np.cumsum(n)
        letters = np.repeat(self.bytes_at[tokens] - ends + n, n) + np.arange(ends[-1])
        self.ends = np.concatenate([self.ends, self.data_at + len(self.data) + ends])
        self.data += self.vocabulary[letters].tobytes()
        origin = self.n_tokens - len(self.ends)  # token that ends[0] is of
        ends = self.scan()
        at = np.array([e[:2] for e in ends], np.int64).reshape(-1, 2)
        at = origin + np.searchsorted(self.ends, at, side="right")

        self.moves = [(self.n_tokens - len(tokens), self.block)]
        begin = 0
        for stop in [i for i, e in enumerate(ends) if e[2] is None] + [len(ends)]:
            self.take_sentences([e[2] for e in ends[begin:stop]], np.array([e[3] for e in ends[begin:stop]]), *at[begin:stop].T)
            if stop < len(ends):
                seen = int(at[stop, 1])  # a new document begins with the next token, or with this one if it holds more than the old
                self.keep_within_reach(-1, seen)
                self.start = self.block = self.known = seen + int(self.ends[seen - origin] == ends[stop][0])
                self.moves.append((self.start, self.start))
                if self.blocks:
                    self.blocks.reset()
            begin = stop + 1
        self.keep_within_reach(-1, self.n_tokens)

        # keep what may still be part of a sentence
        drop = max(0, self.at - len(END_OF_TEXT) + 1)
        self.data, self.data_at, self.at = self.data[drop:], self.data_at + drop, self.at - drop
        self.ends = self.ends[np.searchsorted(self.ends, self.data_at + self.at, side="right") :]
        return self.moves

    def take_sentences(self, sentences, paragraphs, starts, seen):
        """Move on by some sentences of one document: the next one after each begins at token starts[i], known at token seen[i]."""
        if not sentences:
            return
        best = starts.tolist()
        if self.blocks:
            begun = np.concatenate([[self.start], starts[:-1]])
            leaning = np.array([first_word(s) in CARRIES_ON for s in sentences])
            best = self.blocks.observe(*self.stems.of(sentences), begun, seen - self.cap, paragraphs, leaning)
        for i, (start, known, block) in enumerate(zip(starts.tolist(), seen.tolist(), best)):
            self.keep_within_reach(i, known)
            self.start, self.known = start, known
            if block > self.block and (not self.blocks or self.blocks.chance_later(i + 1, self.block) > SURE):
                self.block = block
                self.moves.append((known, block))

    def keep_within_reach(self, i, until):
        """Where the block after sentence i outgrows the cap before token `until`, move on to the next best start within reach."""
        while self.block + self.cap < until - 1:
            token = max(self.known, self.block + self.cap + 1)
            best = self.blocks.best(i, token - self.cap) if self.blocks else None
            if best is None:
                best = self.start
            if best <= self.block:
                return  # one sentence longer than the cap: the window slides
            self.block = best
            self.moves.append((token, best))

    def scan(self):
        """The ends of sentences in data: (byte the next one begins at, byte that told, the sentence, whether a paragraph begins with it).

        The sentence is None where a document ends.
        """
        ends = []
        begin = 0
        while True:
            stop = self.data.find(END_OF_TEXT, begin)
            over = stop >= 0
            stop = stop + len(END_OF_TEXT) if over else len(self.data)
            while found := sentence_end(self.data[self.at : min(stop, self.at + LONGEST)], self.long_lines):
                end, seen, self.long_lines, paragraph = found
                self.seen = max(self.seen, self.data_at + self.at + seen)
                ends.append((self.data_at + self.at + end, self.seen, self.data[self.at : self.at + end], self.paragraph))
                self.at += end
                self.paragraph = paragraph
            if not over:
                return ends
            ends.append((self.data_at + stop, self.data_at + stop - 1, None, None))
            begin = self.at = stop
            self.long_lines = self.paragraph = False


CHUNK = 1 << 16  # tokens at a time
SHARE = 1 << 20  # tokens at least that a process gets


def partition(tokens, token_bytes, method, max_lookback, background=None, out=None):
    """Lookback (uint16, as long as `tokens`) of a whole sequence, into `out` if given; see Partitioner.

    Documents do not depend on each other: where one token ends a document, groups of them are dealt out to the processors.
    """
    Partitioner(token_bytes, method, max_lookback, background)  # complains early
    out = np.empty(len(tokens), np.uint16) if out is None else out
    cuts = [0]
    if method in ("semantic", "sentence") and END_OF_TEXT in token_bytes and "fork" in multiprocessing.get_all_start_methods():
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


def in_parallel(function, arguments):
    """Everything that function(*a) yields for each of the arguments, in any order, from as many processes as there are processors."""
    n = min(len(arguments), os.cpu_count() or 1)
    if n < 2:
        for a in arguments:
            yield from function(*a)
        return
    fork = multiprocessing.get_context("fork")  # children read `tokens` where they are
    queue = fork.Queue(4 * n)

    def work(mine):
        try:
            for a in mine:
                for result in function(*a):
                    queue.put(result)
            queue.put(None)
        except Exception as e:
            queue.put(e)

    children = [fork.Process(target=work, args=(arguments[i::n],), daemon=True) for i in range(n)]
    try:
        for child in children:
            child.start()
        while n:
            try:
                result = queue.get(timeout=1)
            except Empty:
                if any(child.exitcode for child in children):
                    raise RuntimeError("a process that partitioned a part of the text was killed") from None
                continue
            if isinstance(result, Exception):
                raise result
            if result is None:  # a child is done
                n -= 1
            else:
                yield result
    finally:
        for child in children:
            child.terminate()


def background(tokens, token_bytes):
    """The word distribution of a text, for Partitioner: {"total": words, "stems": ids, "counts": of each}, plain ints.

    The 30,000 commonest stems, so that it is below a megabyte as JSON. Takes bounded memory on a memory-mapped `tokens`.
    """
    stems, counts, rest = Stems(), np.zeros(N_STEMS, np.int64), b""
    for i in range(0, len(tokens), CHUNK):
        data = rest + b"".join([token_bytes[t] for t in np.asarray(tokens[i : i + CHUNK]).tolist()])
        cut = max(data.rfind(b" "), data.rfind(b"\n")) + 1  # a word may go on in the next chunk
        if i + CHUNK >= len(tokens) or len(data) - cut > 1 << 20:
            cut = len(data)
        counts += np.bincount(stems.of([data[:cut].replace(END_OF_TEXT, b" ")])[0], minlength=N_STEMS)
        rest = data[cut:]
    counts[: len(PERSONS)] = 0
    commonest = np.argsort(-counts, kind="stable")[:30_000]
    commonest = np.sort(commonest[counts[commonest] > 0])
    return {"total": int(max(1, counts.sum())), "stems": commonest.tolist(), "counts": counts[commonest].tolist()}
