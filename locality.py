"""Where attention may look: how locality grows with depth, and which block of the text each token sees.

Two independent things, both free of any model. `schedule` gives the locality lambda_l of every layer. `partition` and
`Partitioner` give the *lookback* of every token: token i sees the block of tokens i - lookback[i] ... i. Whatever the method,
lookback[i] is a function of the tokens 0 ... i alone.
"""

import difflib
import re

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# schedules: lambda_l = fidelity * (l / (L-1)) ** degree

SCHEDULES = {"distributed": None, "localist": 0, "linear": 1, "quadratic": 2, "cubic": 3, "quartic": 4, "quintic": 5}


class InputError(ValueError):
    """A mistake of the user's: scripts print it as one line and exit with status 2."""


def schedule(name, n_layer, fidelity=1.0):
    """The locality of each layer, a list of n_layer floats in [0, 1]: `fidelity` at the last layer, fading towards the first.

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
    return [float(fidelity) * ((l / last) ** SCHEDULES[name] if last else 1.0) for l in range(n_layer)]


# ---------------------------------------------------------------------------------------------------------------------
# sentences: found in the bytes, each as soon as it can be known and no sooner
#
# an end is known when the first character of the next sentence has been read. every pattern below is decided by the
# bytes up to and including that character: nothing further on can undo a match or bring about an earlier one.

END_OF_TEXT = b"<|endoftext|>"
LONGEST = 800  # bytes; a longer sentence is cut at white space, so that text without punctuation has "sentences" too

STOP = rb"(?:[.!?]|\xe2\x80\xa6|\xe0\xa5[\xa4\xa5]|\xd8\x9f|\xdb\x94|\xd6\x89|\xe1\x8d\xa2)"  # . ! ? and … । ॥ ؟ ۔ ։ ።
WIDE_STOP = rb"(?:\xe3\x80\x82|\xef\xbc[\x81\x9f]|\xef\xbd\xa1)"  # 。！？｡ end a sentence without white space
CLOSE = rb"(?:[\"')\]*_]|\xe2\x80[\x99\x9d]|\xc2\xbb)*+"  # quotes and brackets that belong to the sentence they end
SPACED_CLOSE = rb"(?:[ \t]++(?:''|[)\]]|\xe2\x80\x9d)++)*+"  # tokenised text: said . ''
WIDE_CLOSE = rb"(?:\xe3\x80[\x8d\x8f\x91]|\xef\xbc\x89|[\"')\]]|\xe2\x80[\x99\x9d])*+"  # 」』】）
NOT_ASCII = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
ANY = rb"[^\s'\x80-\xff]|'[^']|" + NOT_ASCII
NOT_LOWER = rb"[^\s'\x80-\xffa-z,;:)\]]|'[^']|(?!\xe2\x80\x9d)(?:" + NOT_ASCII + rb")"
NOT_AFTER = (  # titles, initials and the like: their full stop ends nothing
    rb"(?<!(?<![\x80-\xff'])\b[A-HJ-Za-z]\.)(?<!(?<![\x80-\xffA-Za-z])[\xce-\xd1][\x80-\xbf]\.)"
    rb"(?<!\b(?:Mr|Dr|St|Lt|Mt|vs|cf)\.)(?<!\b(?:Mrs|Rev|Hon|Gen|Col|Sgt|Maj|Mme|viz)\.)(?<!\b(?:Prof|Capt|Mlle)\.)"
    rb"(?<!\bMessrs\.)(?!(?:(?<=\b[Nn]o\.)|(?<=\bpp\.)|(?<=\bch\.)|(?<=\b(?:[Vv]ol|[Ff]ig)\.))\s++\d)"
)
SENTENCE = STOP + NOT_AFTER + STOP + rb"*+" + CLOSE + SPACED_CLOSE + rb"\s++(?P<maybe>" + NOT_LOWER + rb")"
WIDE_SENTENCE = WIDE_STOP + rb"++" + WIDE_CLOSE + rb"\s*+(?P<wide>(?!" + WIDE_STOP + rb")(?:" + ANY + rb"))"
PARAGRAPH = rb"\n[ \t\r\f\v]*+\n\s*+(?P<blank>" + ANY + rb")"
LIST_ITEM = rb"\n[ \t]*+(?P<item>[*+-][ \t]|#++[ \t]|\xe2\x80\xa2|\d{1,3}[.)][ \t])"
LINE = rb"\n\s*+(?P<line>" + ANY + rb")"
FIRST = rb"(?=[.!?\n\xd6\xd8\xdb\xe0-\xe3\xef])"  # lets the search skip quickly
WRAPPED_END = re.compile(FIRST + rb"(?:" + rb"|".join([SENTENCE, PARAGRAPH, LIST_ITEM, WIDE_SENTENCE]) + rb")")
LINE_END = re.compile(FIRST + rb"(?:" + rb"|".join([SENTENCE, LINE, WIDE_SENTENCE]) + rb")")
LONG_LINE = re.compile(rb"^[^\n\x80-\xff]{101}", re.M)


def search_end(pattern, piece, stop):
    """The first end of a sentence in piece[:stop], as a match whose last group is the next sentence's first character."""
    match = pattern.search(piece, 0, stop)
    while match and match.lastgroup == "maybe" and match["maybe"][0] > 127 and match["maybe"].decode(errors="replace").islower():
        match = pattern.search(piece, match.start() + 1, stop)
    return match


def sentence_end(piece, long_lines):
    """Where the sentence at the start of `piece` (bytes) ends, if that can be told yet.

    long_lines: whether this paragraph is known to hold a line of over 100 characters, hence is not hard-wrapped, so that each of
    its newlines ends something. Returns (end, seen, long_lines): the next sentence begins at byte `end`, which is known once
    byte `seen` >= end has been read. Returns None where more text is needed.
    """
    piece = piece[:LONGEST]
    match = None
    seen = 0
    if not long_lines:
        long = LONG_LINE.search(piece)
        match = search_end(WRAPPED_END, piece, long.end() if long else len(piece))
        if long and not match:
            long_lines, seen = True, long.end() - 1
    if long_lines:
        match = search_end(LINE_END, piece, len(piece))
    if match:
        end = match.start(match.lastgroup)
        blank = piece.count(b"\n", match.start(), end) > 1
        return end, max(seen, match.end() - 1), long_lines and not blank
    if len(piece) < LONGEST:
        return None
    end = max(piece.rfind(b" ", LONGEST // 2), piece.rfind(b"\n", LONGEST // 2)) + 1
    if not end:  # no white space: between two characters
        end = LONGEST - 1
        while end > LONGEST - 4 and 128 <= piece[end] < 192:
            end -= 1
    return end, LONGEST - 1, long_lines


# ---------------------------------------------------------------------------------------------------------------------
# words: what a sentence is about, as stems

STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are as at be because been before being below between both but
    by can could did do does doing don down during each even every few for from further had has have having he her here hers
    herself him himself his how i if in into is it its itself just may me might more most much must my myself no nor not now of
    off on once one only or other our ours ourselves out over own same shall she should so some such than that the their theirs
    them themselves then there these they this those thou though through thus thy to too under until up upon us very was we were
    what when where which while who whom whose why will with would yet you your yours yourself yourselves""".split()
)
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORDS = re.compile(f"[{UNSPACED}]|[^\\W\\d_{UNSPACED}]+")
LETTERS = bytes(c if c > 127 or chr(c).isalpha() else 32 for c in range(256)).lower()


class Stems(dict):
    """bytes of a word -> the stems in it (a tuple of str; none for a stop word), remembered."""

    def __missing__(self, word):
        text = word.decode(errors="ignore").lower()
        found = [text] if text.isascii() else WORDS.findall(text)
        stems = tuple(w[:6] for w in found if w not in STOP_WORDS and (len(w) > 2 or not w.isascii()))
        if len(word) <= 40:  # a whole line of an unspaced script is not worth remembering
            if len(self) > 1_000_000:
                self.clear()
            self[word] = stems
        return stems


def stems_of(sentence, stems):
    """The stems of a sentence (bytes), in order."""
    return [s for word in sentence.translate(LETTERS).split() for s in stems[word]]


# ---------------------------------------------------------------------------------------------------------------------
# the semantic partition: Bayesian online change-point detection (Adams & MacKay 2007) over sentences as bags of words

ALPHA = 150.0  # pseudo-counts of the Dirichlet prior, in words
HAZARD = 1 / 10  # chance that a block ends with a given sentence
REACH = 64  # sentences; the longest block there is


class Blocks:
    """The posterior over where the running block began, sentence by sentence."""

    def __init__(self, background):
        self.background = background or {"total": 0, "words": {}}
        self.reset()

    def reset(self):
        """Start a new document."""
        self.time = 0
        self.where = {}  # stem -> the sentences it occurred in
        self.counts = {}
        self.total = 0
        self.sizes = np.zeros(REACH)  # words in each of the last sentences, newest first
        self.joint = np.full(REACH, -np.inf)  # log p(block began `lag` sentences ago, text)
        self.starts = np.zeros(REACH, np.int64)  # token at which that sentence began

    def probability(self, stem):
        return (self.background["words"].get(stem, 0) + self.counts.get(stem, 0) + 0.5) / (self.background["total"] + self.total + 10000.0)

    def observe(self, words, start):
        """Take in a sentence whose first token is `start`."""
        gain = np.zeros(REACH)
        for word in words:
            a = ALPHA * self.probability(word)
            earlier = self.where.setdefault(word, [])
            n = 0
            for t in reversed(earlier):
                if self.time - t >= REACH:
                    break
                n += 1
                gain[self.time - t] += np.log((a + n) / (a + n - 1))
            earlier.append(self.time)
            if len(earlier) > 2 * REACH * 10:
                del earlier[: len(earlier) // 2]
        for word in words:
            self.counts[word] = self.counts.get(word, 0) + 1
        self.total += len(words)
        gain = np.cumsum(gain)
        before = np.concatenate([[0.0], np.cumsum(self.sizes)[:-1]])
        for j in range(len(words)):
            gain -= np.log(ALPHA + before + j)
        self.sizes[1:] = self.sizes[:-1]
        self.sizes[0] = len(words)
        # a block goes on, or one begins
        joint = np.empty(REACH)
        joint[1:] = self.joint[:-1] + np.log(1 - HAZARD)
        joint[0] = np.logaddexp.reduce(self.joint) + np.log(HAZARD) if self.time else 0.0
        joint += gain
        self.joint = joint - joint.max()
        self.starts[1:] = self.starts[:-1]
        self.starts[0] = start
        self.time += 1

    def best(self, floor):
        """The posterior median of the block's first token among those at or after token `floor`; None if there is none."""
        ok = (self.starts >= floor) & (np.arange(REACH) < self.time)
        if not ok.any():
            return None
        p = np.exp(self.joint - self.joint[ok].max()) * ok
        lag = np.searchsorted(np.cumsum(p), p.sum() / 2)
        return int(self.starts[lag])

    def forget(self, floor):
        """Drop the blocks that began before token `floor`: no token will see that far again."""
        gone = self.starts < floor
        if not gone[0]:
            self.joint[gone] = -np.inf


# ---------------------------------------------------------------------------------------------------------------------
# partitioners


def parse_partition(method):
    """("semantic" or "sentence", None), or ("window" or "block", N). Raises InputError for anything else."""
    name, _, n = str(method).partition(":")
    if method in ("semantic", "sentence"):
        return name, None
    if name in ("window", "block") and n.isascii() and n.isdigit() and int(n) > 0:
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
        self.token_bytes = token_bytes
        self.n_bytes = np.array([len(b) for b in token_bytes], np.int64)
        self.blocks = Blocks(background) if self.method == "semantic" else None
        self.stems = Stems()
        self.n_tokens = 0  # tokens so far
        self.data = b""  # bytes from a little before the running sentence on
        self.data_at = 0  # byte of the text that data[0] is
        self.at = 0  # where in data the running sentence begins
        self.ends = np.zeros(0, np.int64)  # byte at which each of the last tokens ends
        self.start = 0  # first token of the running sentence
        self.block = 0  # first token of the running block
        self.seen = 0  # byte that told of the last end
        self.long_lines = False

    def push(self, tokens):
        """Lookback (uint16) of the next tokens (integers, any number of them)."""
        tokens = np.asarray(tokens).reshape(-1)
        if not len(tokens):
            return np.zeros(0, np.uint16)
        if tokens.min() < 0 or tokens.max() >= len(self.token_bytes):
            raise InputError(f"a token is not in the vocabulary of {len(self.token_bytes)}: {tokens.min()} ... {tokens.max()}")
        i = np.arange(self.n_tokens, self.n_tokens + len(tokens))
        self.n_tokens += len(tokens)
        if self.method == "window":
            return np.minimum(i, min(self.size - 1, self.cap)).astype(np.uint16)
        if self.method == "block":
            return np.minimum(i % self.size, self.cap).astype(np.uint16)
        since, block = self.find_blocks(tokens)
        block = np.repeat(block, np.diff(since + [self.n_tokens]))
        return np.minimum(i - block, self.cap).astype(np.uint16)

    def find_blocks(self, tokens):
        """Two lists: from token since[n] on, the block begins at token block[n]."""
        first = self.n_tokens - len(tokens)
        byte = self.data_at + len(self.data)
        self.data += b"".join([self.token_bytes[t] for t in tokens.tolist()])
        self.ends = np.concatenate([self.ends, byte + np.cumsum(self.n_bytes[tokens])])
        origin = self.n_tokens - len(self.ends)  # token that ends[0] is of
        ends = self.scan()
        at = np.array([e[:2] for e in ends], np.int64).reshape(-1, 2)
        at = origin + np.searchsorted(self.ends, at, side="right")

        since, block = [first], [self.block]
        for (start, seen), (end, _, sentence) in zip(at.tolist(), ends):
            self.keep_within_reach(since, block, seen)
            if sentence is None:  # a new document
                if self.blocks:
                    self.blocks.reset()
                best = start = seen + (self.ends[seen - origin] == end)
            elif self.blocks:
                self.blocks.forget(seen - self.cap)
                self.blocks.observe(stems_of(sentence, self.stems), self.start)
                best = self.blocks.best(seen - self.cap)
                best = max(self.block, start if best is None else best)
            else:
                best = start
            self.start = start
            self.block = best
            since.append(max(seen, start))
            block.append(best)
        self.keep_within_reach(since, block, self.n_tokens)

        # keep what may still be part of a sentence
        drop = max(0, self.at - len(END_OF_TEXT) + 1)
        self.data, self.data_at, self.at = self.data[drop:], self.data_at + drop, self.at - drop
        self.ends = self.ends[np.searchsorted(self.ends, self.data_at + self.at, side="right") :]
        return since, block

    def keep_within_reach(self, since, block, until):
        """Where the running block grows past the cap before token `until`, move on to the next best start within reach."""
        while self.block + self.cap < until - 1:
            token = max(since[-1], self.block + self.cap + 1)
            best = self.blocks.best(token - self.cap) if self.blocks else None
            if best is None:
                best = self.start
            if best <= self.block:
                return  # one sentence longer than the cap: the window slides
            self.block = best
            since.append(token)
            block.append(best)

    def scan(self):
        """The sentence ends in data, as (byte the next one begins at, byte that told, the sentence or None for a new document)."""
        ends = []
        begin = 0
        while True:
            stop = self.data.find(END_OF_TEXT, begin)
            over = stop >= 0
            stop = stop + len(END_OF_TEXT) if over else len(self.data)
            while found := sentence_end(self.data[self.at : min(stop, self.at + LONGEST)], self.long_lines):
                end, seen, self.long_lines = found
                self.seen = max(self.seen, self.data_at + self.at + seen)
                ends.append((self.data_at + self.at + end, self.seen, self.data[self.at : self.at + end]))
                self.at += end
            if not over:
                return ends
            ends.append((self.data_at + stop, self.data_at + stop - 1, None))
            begin = self.at = stop
            self.long_lines = False


CHUNK = 1 << 16  # tokens at a time


def partition(tokens, token_bytes, method, max_lookback, background=None, out=None):
    """Lookback (uint16, as long as `tokens`) of a whole sequence, into `out` if given; see Partitioner."""
    partitioner = Partitioner(token_bytes, method, max_lookback, background)
    out = np.empty(len(tokens), np.uint16) if out is None else out
    for i in range(0, len(tokens), CHUNK):
        out[i : i + CHUNK] = partitioner.push(tokens[i : i + CHUNK])
    return out


def background(tokens, token_bytes):
    """The word distribution of a text: {"total": words, "words": {stem: count}}, the 30,000 commonest stems. Plain JSON."""
    stems, counts = Stems(), {}
    rest = b""
    for i in range(0, len(tokens), CHUNK):
        data = rest + b"".join([token_bytes[t] for t in np.asarray(tokens[i : i + CHUNK]).tolist()])
        cut = max(data.rfind(b" "), data.rfind(b"\n")) + 1
        cut = cut if cut or len(data) < 1 << 20 else len(data)
        for s in stems_of(data[:cut].replace(END_OF_TEXT, b" "), stems):
            counts[s] = counts.get(s, 0) + 1
        rest = data[cut:]
        if len(counts) > 1_000_000:
            counts = dict(sorted(counts.items(), key=lambda c: -c[1])[:500_000])
    for s in stems_of(rest, stems):
        counts[s] = counts.get(s, 0) + 1
    top = sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:30_000]
    return {"total": sum(counts.values()), "words": dict(top)}
