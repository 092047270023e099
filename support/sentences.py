"""Where a sentence ends, in bytes, as soon as it can be known; and its words, as numbers.

The end of a sentence is known once the first character of the next sentence has been read. Every
pattern below is decided by the bytes up to and including that character: later bytes can neither
undo a match nor lead to an earlier one.
"""

import re
import zlib
from itertools import chain
from typing import NamedTuple

import numpy as np

END_OF_TEXT = b"<|endoftext|>"
LONGEST = 800  # bytes; a longer sentence, as in text without punctuation, is cut at white space

# --------------------------------------------------------------------------------------------------
# the patterns

# the first byte of every match; with it, the search skips other bytes quickly
FIRST = rb"[.!?\n\xd6\xd8\xdb\xe0-\xe3\xef]"
STOP = (  # . ! ? and … । ॥ ؟ ۔ ։ ።
    rb"(?:(?<=[.!?])|(?<=\xe2)\x80\xa6|(?<=\xe0)\xa5[\xa4\xa5]|(?<=\xd8)\x9f|(?<=\xdb)\x94"
    rb"|(?<=\xd6)\x89|(?<=\xe1)\x8d\xa2)"
)
# 。！？｡ end a sentence without white space
WIDE_STOP = rb"(?:(?<=\xe3)\x80\x82|(?<=\xef)\xbc[\x81\x9f]|(?<=\xef)\xbd\xa1)"
# more stops, quotes and brackets that belong to the sentence
CLOSE = rb"(?:[\"')\]*_.!?]|\xe2\x80[\x99\x9d\xa6]|\xc2\xbb)*+"
SPACED_CLOSE = rb"(?:[ \t]++(?:''|[)\]]|\xe2\x80\x9d)++)*+"  # tokenized text: said . ''
WIDE_CLOSE = (  # 」』】）
    rb"(?:\xe3\x80[\x82\x8d\x8f\x91]|\xef\xbc[\x81\x89\x9f]|\xef\xbd\xa1|[\"')\]]"
    rb"|\xe2\x80[\x99\x9d])*+"
)
NOT_ASCII = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
ANY = rb"[^\s'\x80-\xff]|'[^']|" + NOT_ASCII
NOT_LOWER = rb"[^\s'\x80-\xffa-z,;:)\]]|'[^']|(?!\xe2\x80\x9d)(?:" + NOT_ASCII + rb")"
NOT_AFTER = (  # titles, initials and the like, whose period ends no sentence
    rb"(?<![.!?][.!?])(?<!(?<![\x80-\xff'])\b[A-HJ-Za-z]\.)"
    rb"(?<!(?<![\x80-\xffA-Za-z])[\xce-\xd1][\x80-\xbf]\.)"
    rb"(?<!\b(?:Mr|Dr|St|Lt|Mt|vs|cf)\.)(?<!\b(?:Mrs|Rev|Hon|Gen|Col|Sgt|Maj|Mme|viz)\.)"
    rb"(?<!\b(?:Prof|Capt|Mlle)\.)(?<!\bMessrs\.)"
    rb"(?!(?:(?<=\b[Nn]o\.)|(?<=\bpp\.)|(?<=\bch\.)|(?<=\b(?:[Vv]ol|[Ff]ig)\.))\s++\d)"
)
SENTENCE = STOP + NOT_AFTER + CLOSE + SPACED_CLOSE + rb"\s++(?P<maybe>" + NOT_LOWER + rb")"
WIDE_SENTENCE = WIDE_STOP + WIDE_CLOSE + rb"\s*+(?P<wide>" + ANY + rb")"
BLANK_LINE = rb"(?<=\n)(?<!\n\n)[ \t\r\f\v]*+\n\s*+(?P<blank>" + ANY + rb")"
LIST_ITEM = rb"(?<=\n)[ \t]*+(?P<item>[*+-][ \t]|#++[ \t]|\xe2\x80\xa2|\d{1,3}[.)][ \t])"
LINE = rb"(?<=\n)(?<!\n\n)\s*+(?P<line>" + ANY + rb")"
WRAPPED_END = re.compile(
    FIRST + rb"(?:" + rb"|".join([SENTENCE, BLANK_LINE, LIST_ITEM, WIDE_SENTENCE]) + rb")"
)
LINE_END = re.compile(FIRST + rb"(?:" + rb"|".join([SENTENCE, LINE, WIDE_SENTENCE]) + rb")")
LONG_LINE = re.compile(rb"^[^\n\x80-\xff]{101}", re.M)


def search_end(pattern, piece):
    """The first end of a sentence in a piece of text (bytes), a match or None. Its last group is
    the first character of the next sentence, which is not a lowercase letter."""
    match = pattern.search(piece)
    while match and match.lastgroup == "maybe" and match["maybe"][0] > 127:  # not ASCII
        if not match["maybe"].decode(errors="replace").islower():
            break  # the pattern itself excludes a to z
        match = pattern.search(piece, match.start() + 1)
    return match


def sentence_end(piece, long_lines):
    """Where the sentence at the start of `piece` ends, or None if more text is needed.

    piece: at most LONGEST bytes. long_lines: whether this paragraph is known to have a line of more
    than 100 characters; then it is not hard-wrapped, and each of its newlines ends a sentence.
    Returns (end, seen, long_lines, paragraph): the next sentence begins at byte `end`, which is
    known once byte `seen` >= end has been read; long_lines of the next sentence; whether the next
    sentence begins a paragraph.
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
        seen = max(seen, match.end() - 1)
        return end, seen, long_lines and newlines < 2, newlines > (not long_lines)
    if len(piece) < LONGEST:
        return None
    end = max(piece.rfind(space, LONGEST // 2, LONGEST - 1) for space in (b" ", b"\n")) + 1
    if not end:  # no white space: cut between two characters
        end = LONGEST - 1
        while end > LONGEST - 4 and 128 <= piece[end] < 192:
            end -= 1
    return end, LONGEST - 1, long_lines, False


# --------------------------------------------------------------------------------------------------
# a text that arrives in pieces


class Ended(NamedTuple):
    """A sentence or a document that has ended."""

    next: int  # byte of the text at which the next sentence begins
    seen: int  # byte of the text with which this became known
    text: bytes | None  # the sentence; None if a document ended
    paragraph: bool  # whether the sentence begins a paragraph


class Sentences:
    """Finds the sentences of a text that arrives in pieces."""

    def __init__(self):
        self.data = b""  # of the text: the current sentence, and a few bytes before it
        self.data_at = 0  # byte of the text at which data begins
        self.at = 0  # where in data the current sentence begins
        self.seen = 0  # byte with which the last end became known
        self.long_lines = False
        self.paragraph = False  # whether the current sentence begins a paragraph

    @property
    def begin(self):
        """Byte of the text at which the current sentence begins."""
        return self.data_at + self.at

    def push(self, data):
        """Add bytes to the text. Returns what has ended since, a list of Ended, in order."""
        self.data += data
        ended = self.scan()
        # keep what may be part of the next sentence, or of an END_OF_TEXT
        drop = max(0, self.at - len(END_OF_TEXT) + 1)
        self.data, self.data_at, self.at = self.data[drop:], self.data_at + drop, self.at - drop
        return ended

    def scan(self):
        ended, begin = [], 0
        while True:
            stop = self.data.find(END_OF_TEXT, begin)
            document_ended = stop >= 0
            stop = stop + len(END_OF_TEXT) if document_ended else len(self.data)
            while result := sentence_end(
                self.data[self.at : min(stop, self.at + LONGEST)], self.long_lines
            ):
                end, seen, self.long_lines, paragraph = result
                self.seen = max(self.seen, self.begin + seen)
                text = self.data[self.at : self.at + end]
                ended.append(Ended(self.begin + end, self.seen, text, self.paragraph))
                self.at += end
                self.paragraph = paragraph
            if not document_ended:
                return ended
            ended.append(Ended(self.data_at + stop, self.data_at + stop - 1, None, False))
            begin = self.at = stop
            self.long_lines = self.paragraph = False


def first_bytes(text):
    """The bytes at which the sentences of a text (bytes) begin, a list; the first is 0."""
    return [0, *(end.next for end in Sentences().push(text))]


# --------------------------------------------------------------------------------------------------
# words

FUNCTION_WORDS = """
    i me my mine myself we us our ours ourselves you your yours he him his himself she her hers
    herself they them their theirs themselves it its itself who whom whose is are was were be been
    am has have had do does did can could may might must shall should will would
    """.split()
FUNCTION_WORDS = {word: i for i, word in enumerate(FUNCTION_WORDS)}
STOP_WORDS = frozenset(
    """about above after again against all also and any because before being below between both but
    doing don down during each even every few for from further having here how into just more most
    much nor not now off once one only other out over own same some such than that the then there
    these this those thou though through thus thy too under until upon very what when where which
    while why with yet yourself yourselves""".split()
)
LEANING = frozenset(  # a sentence that begins with one of these leans on the sentence before it
    b"""he she it they him them his her their its this these that those such however but also
    therefore thus moreover furthermore instead""".split()
)
# scripts without spaces: each character counts as a word
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
WORD = re.compile(f"[{UNSPACED}]|[^\\W\\d_{UNSPACED}]+")
LETTERS = bytes(c if c > 127 or chr(c).isalpha() else 32 for c in range(256)).lower()
N_WORD_IDS = 1 << 18


class WordIds(dict):
    """A cache: the bytes of a word -> a tuple of the ids of the words in it.

    Ids below len(FUNCTION_WORDS) are pronouns and auxiliaries: who acts, and when. All other ids
    are hashes of the first five letters of a word, a crude stem. Stop words have no id.
    """

    def __init__(self):
        self[b"\n"] = (-1,)  # see `of`

    def __missing__(self, word):
        text = word.decode(errors="ignore").lower()
        words = [text] if text.isascii() else WORD.findall(text)
        ids = tuple(i for w in words for i in self.ids_of(w))
        if len(word) <= 40:  # do not store whole lines without spaces
            if len(self) >= 500_000:
                self.clear()
                self.__init__()
            self[word] = ids
        return ids

    def ids_of(self, word):
        if word in FUNCTION_WORDS:
            return (FUNCTION_WORDS[word],)
        if word in STOP_WORDS or len(word.encode()) < 3:
            return ()
        return (max(len(FUNCTION_WORDS), zlib.crc32(word[:5].encode()) % N_WORD_IDS),)

    def of(self, sentences):
        """The word ids of a list of n sentences (bytes), in order.

        Returns the ids of all of them, one after another, and how many each has, (n,); both int64.
        """
        marked = b" \n ".join(s.translate(LETTERS) for s in sentences)  # LETTERS leaves no newline
        ids = np.fromiter(chain.from_iterable(map(self.__getitem__, marked.split(b" "))), np.int64)
        ends = np.append(np.flatnonzero(ids < 0), len(ids))
        return ids[ids >= 0], np.diff(ends, prepend=-1) - 1


def leans_on_previous(sentence):
    """Whether a sentence (bytes) begins with a word that leans on the sentence before it."""
    return sentence[:40].translate(LETTERS).lstrip().partition(b" ")[0] in LEANING
