"""Where a sentence ends, as soon as that can be known; and its words, as numbers.

A sentence may end at a stop or a newline. ENDS finds these places in the bytes of a text, each up
to the first character of the next sentence; `is_end` decides whether one is an end. To change what
ends a sentence, add a character to STOPS or a rule to NOT_AN_END. Nothing is read beyond that
character, except where it is a quotation mark, a point or the sign of a list item, which take a few
more. Later text cannot undo an end.
"""

import re
import zlib
from itertools import chain
from typing import NamedTuple

import numpy as np
import regex  # before Python 3.11.5, re matches possessive groups wrongly (gh-106052)

END_OF_TEXT = b"<|endoftext|>"
LONGEST = 800  # bytes; a longer sentence, as in text without punctuation, is cut at white space

# --------------------------------------------------------------------------------------------------
# where a sentence may end: patterns of bytes, written as text in which a character is a byte

STOPS = ".!?:;…؟۔։\u037e"  # before white space; for : and ; see NOT_AN_END
UNSPACED_STOPS = "。！？．｡।॥།༎။።፧។៕"  # with or without white space
CLOSERS = "\"')]*_”’“‘»«›‹"  # directly after a stop, these belong to the sentence
UNSPACED_CLOSERS = (
    "\"')]”’»›」』】）〉》"  # after UNSPACED_STOPS; the marks left out would open a sentence
)
SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
SPACES += "\u202f\u205f\u3000"
PARAGRAPH = "\u2029"  # the character for a blank line
NEWLINES = "\u0085\u2028" + PARAGRAPH  # with SPACES, the white space outside ASCII


def utf8(characters):
    """The UTF-8 of some characters, as text in which a character is a byte."""
    return characters.encode().decode("latin-1")


def one_of(characters):
    """A pattern for one of these characters."""
    return f"(?:{'|'.join(re.escape(utf8(c)) for c in characters)})"


def after_first(characters):
    """The same, where the first byte has already been matched."""
    return f"(?:{'|'.join(f'(?<={re.escape(utf8(c)[0])}){utf8(c)[1:]}' for c in characters)})"


NOT_ASCII = r"(?:[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})"
CHARACTER = rf"(?:[\x00-\x7f]|{NOT_ASCII})"
BLANK = rf"(?:[ \t]|{one_of(SPACES)})"
SPACE = rf"(?:\s|{one_of(SPACES + NEWLINES)})"
GAP = rf"\s*+(?:{one_of(SPACES + NEWLINES)}\s*+)*+"  # any amount of white space
TWO_WAY = one_of("»›”")  # these close before white space, and may open elsewhere: »Ja.« ”Nej.”

# what belongs to a sentence after its stop, directly: said.”) and after blanks: said . '' | dit ? »
CLOSE = rf"(?:[.!?]|{one_of('…' + CLOSERS)})"
UNSPACED_CLOSE = rf"(?:[.!?]|{one_of('…' + UNSPACED_STOPS + UNSPACED_CLOSERS)})"
SPACED_CLOSE = "|".join(
    (
        rf"!(?!\[)|\?|\.(?!\w)|{one_of('…')}",  # he left . . .
        rf"''|[)\]]|{TWO_WAY}(?={SPACE})",
        r'"(?=[ \t\r]*+\n)',  # at the end of a line, it can only close
    )
)
# the first character of a sentence, and the one after it if that is needed to decide
NEXT = "|".join(
    (
        r"[^\s'\"\x80-\xffa-z.!?,;:)\]]",
        r"'[^']|\.\w|!\[|\"[ \t]*+[^\sa-z]",  # 'Tis | .38 caliber | ![image] | "Why
        rf"{TWO_WAY}(?!{SPACE}|[.!?,;:]){CHARACTER}",
        rf"(?!{one_of('”»›…' + UNSPACED_STOPS)}){NOT_ASCII}",
    )
)
ITEM = rf"[*+-][ \t]|#++[ \t]|{one_of('•')}|\d{{1,3}}[.)][ \t]"  # of a list, or a heading
# the first character of any line; ITEM and NEXT are known by the time it is
LINE = rf"(?:[*+-]|#++|\d{{1,3}}+[.)]?+|[.'!]|\"[ \t]*+|{TWO_WAY})?+{CHARACTER}"

FIRST = re.escape("".join(sorted({utf8(c)[0] for c in STOPS + UNSPACED_STOPS + "\n" + PARAGRAPH})))
ENDS = "|".join(
    (
        # the first of several stops (a limit of 9 keeps the search linear)
        rf"{after_first(STOPS)}(?<![.!?].){CLOSE}*+"
        rf"(?:{BLANK}{{1,9}}+(?:{SPACED_CLOSE}){CLOSE}*+){{,9}}+"
        rf"(?={SPACE}){GAP}(?P<next>{NEXT})",
        rf"{after_first(UNSPACED_STOPS)}{UNSPACED_CLOSE}*+"
        rf"(?:{BLANK}{{1,9}}+{one_of(UNSPACED_STOPS)}{UNSPACED_CLOSE}*+){{,9}}+"
        rf"{GAP}(?P<unspaced>{CHARACTER})",
        # a blank line
        rf"(?:(?<=\n)(?<!\n\n)[ \t\r\f\v]*+\n"
        rf"|{after_first(PARAGRAPH)}(?<!{utf8(2 * PARAGRAPH)})){GAP}(?P<paragraph>{LINE})",
        rf"(?<=\n)(?<!\n\n){GAP}(?:(?P<item>{ITEM})|(?P<line>{LINE}))",
    )
)
# the class at the beginning lets the search skip all other bytes quickly
ENDS = regex.compile(f"[{FIRST}](?:{ENDS})".encode("latin-1"))

# --------------------------------------------------------------------------------------------------
# where it does not

TITLES = """Mr Mrs Ms Mx Messrs MM Hr Dr Prof Rev Fr Sr St Mt Lt Cpl Sgt Capt Maj Col Gen Adm Gov
    Sen Rep Pres Hon Mme Mlle Sra Srta vs cf viz""".split()
NUMBERED = """No Nos no nos N° Nr nr p pp l ll v vv n nn ch chap sec sect vol fig figs eq eqs art bk
    pt Figs Eq Eqs Abb pág стр""".split()
PARTS = "Ch Chap Sec Sect Vol Fig Art Bk Pt Pl".split()
MONTHS = "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec".split()
HEADINGS = (
    "Chapter Part Book Section Act Scene Canto Volume Letter Lecture Article Appendix".split()
)


def any_of(words):
    """A pattern for one of these words, as it is or in capitals."""
    return rf"\b(?:{'|'.join(sorted({*words, *map(str.upper, words)}))})"


LETTER = "[A-Za-zÀ-ÖØ-ÞͰ-ӿԱ-և]"
NOT_AN_END = [  # the last word with its stop, the first character after the gap, an example
    (any_of(TITLES) + r"\.", r"\S", "Mr. Smith"),
    (any_of(NUMBERED) + r"\.", r"\d", "No. 5"),
    (any_of(PARTS) + r"\.", r"[\dIVXLC]", "Chap. IV"),
    (any_of(MONTHS) + r"\.", r"\d", "Oct. 5"),
    (r"al\.", r"[(\[]", "Doe et al. (2004)"),
    # initials, and abbreviations made of single letters; but I is a word
    (rf"(?!I\.\s)(?:{LETTER}\.)*{LETTER}\.", r"\S", "J. R. Brown of the U.S. Navy"),
    (r"(?:[Ａ-Ｚ]．)+", r"\S", "Ｊ．Ｋ．ローリング"),
    (r"\[(?:\.\.\.|…)\]\W*", r"\S", "He came [...] The sea"),  # an omission
    (r".*[．॥]", r"[\da-zａ-ｚ]", "円周率は３．１４"),
    # : ends a sentence only in Armenian, instead of ։; and ; only in Greek, as a question mark
    (r"(?!.*[Ա-֏][\W_]*:).*:[\W_]*", r"\S", "They need (“now”): Eggs"),
    (r"(?!.*[Ͱ-Ͽἀ-῿][\W_]*;).*;[\W_]*", r"\S", "He came (late); Tom left"),
]


def any_rule(rules):
    """A pattern for the last word before a stop, the stop with its closers and the white space
    after it, and the first character of the next sentence. It matches if there is no end."""
    alternatives = "|".join(rf"{word}\s*{first}\Z" for word, first, _ in rules)
    return re.compile(rf"(?:\S*[^\w'’])?(?:{alternatives})")


ANY_RULE = any_rule(NOT_AN_END)
# the same for a sentence that is only the number of a heading or of a list item
ROMAN = "(?=[IVXLC])(?:XC|XL|L?X{0,3}|C)(?:IX|IV|V?I{0,3})"
LABEL = rf"(?:{any_of(HEADINGS)} |{any_of(PARTS)}\. |第)"
DIGITS = r"(?:\d{1,3}\.)*\d{1,3}"
NUMBER = re.compile(rf"\W*{LABEL}?(?:{DIGITS}|{ROMAN}|{ROMAN.lower()})(?:\.\)?\s+|．\s*)\S\Z")
WIDEST = 100  # characters; a paragraph that was wrapped has no longer line
STOPPED = ("", *STOPS, *UNSPACED_STOPS, *CLOSERS, *UNSPACED_CLOSERS)


def is_end(text, begin, document, match):
    """Whether a match of ENDS in a text (bytes) is an end of the sentence that begins at `begin`.

    document: the byte at which the document begins.
    """
    place, at = match.lastgroup, match.start(match.lastgroup)
    if place in ("paragraph", "item"):
        return True
    if place == "line":
        return not may_wrap(text, document, match.start())
    first = text[at : at + 4].decode(errors="ignore")[:1]
    # A small letter continues a sentence if its script begins sentences with capitals.
    # (Georgian has small letters, and capitals for headlines, but no title case.)
    if place == "next" and first != first.title():
        return False
    if text[match.start()] in b"!?":
        return True  # no rule is about these
    words = text[max(begin, match.start() - 40) : match.start()].decode(errors="ignore").split()
    rest = text[match.start() : at].decode(errors="ignore") + first
    if len(words) < 3 and NUMBER.match(" ".join(words) + rest):
        return False
    return not ANY_RULE.match("".join(words[-1:]) + rest)


def may_wrap(text, document, newline):
    """Whether the newline at this byte of a text may be one that only wraps a paragraph.

    It is not if the last lines of the paragraph end at very different lengths, as in a chat or a
    song: if this one, or two of them, have less than two thirds of the length of the longest, and
    no stop at the end. Nor if one of them has more than WIDEST characters. Short lines at the
    beginning may be headings, and do not count.
    """
    since = max(document, newline - LONGEST)
    since = max(since, text.rfind(b"\n\n", since, newline) + 2)
    lines = text[since:newline].decode(errors="ignore").rsplit("\n", 7)
    if len(lines) > 7 or since == newline - LONGEST:
        lines = lines[1:] or lines  # only the end of the first one is in sight
    lengths = list(map(len, lines))
    if 3 * min(lengths) >= 2 * max(lengths):
        return max(lengths) <= WIDEST
    lines = [line.strip() for line in lines]
    while "" in lines:  # the paragraph begins after the last blank line
        lines = lines[lines.index("") + 1 :]
    longest = max(map(len, lines), default=0)
    short = [3 * len(line) < 2 * longest for line in lines]
    headings = short.index(False) if lines else 0
    free = [a and line[-1] not in STOPPED for a, line in zip(short, lines)][headings:]
    return longest <= WIDEST and sum(free) < 2 and not any(free[-1:])


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
        self.data = b""  # of the text: the current sentence, and what is remembered before it
        self.data_at = 0  # byte of the text at which data begins
        self.at = 0  # where in data the current sentence begins
        self.searched = 0  # no end is before this place in data
        self.document = 0  # where in data the document begins, if it does
        self.seen = 0  # byte with which the last end became known
        self.paragraph = False  # whether the current sentence begins a paragraph

    @property
    def begin(self):
        """Byte of the text at which the current sentence begins."""
        return self.data_at + self.at

    def push(self, data):
        """Add bytes to the text. Returns what has ended since, a list of Ended, in order."""
        self.data += data
        ended = self.scan()
        drop = max(0, self.at - LONGEST)
        self.data, self.data_at = self.data[drop:], self.data_at + drop
        self.at, self.searched = self.at - drop, self.searched - drop
        self.document = max(0, self.document - drop)
        return ended

    def scan(self):
        ended = []
        while True:
            stop = self.data.find(END_OF_TEXT, self.document)
            document_ended = stop >= 0
            stop = stop + len(END_OF_TEXT) if document_ended else len(self.data)
            while found := self.find_end(stop):
                end, seen, paragraph = found
                self.seen = max(self.seen, self.data_at + seen)
                text = self.data[self.at : end]
                ended.append(Ended(self.data_at + end, self.seen, text, self.paragraph))
                self.at = self.searched = end
                self.paragraph = paragraph
            if not document_ended:
                return ended
            ended.append(Ended(self.data_at + stop, self.data_at + stop - 1, None, False))
            self.document = self.at = self.searched = stop
            self.paragraph = False

    def is_long(self, at):
        """Whether the line that ends at `at` in self.data has more than WIDEST characters."""
        since = max(self.document, at - LONGEST)
        since = max(since, self.data.rfind(b"\n", since, at) + 1)
        return len(self.data[since:at].decode(errors="ignore")) > WIDEST

    def find_end(self, stop):
        """The end of the current sentence in self.data[:stop], or None if more text is needed.

        Returns (end, seen, paragraph): the next sentence begins at byte `end` of self.data, which
        is known once byte `seen` >= end has been read; whether it begins a paragraph.
        """
        until = min(stop, self.at + LONGEST)
        while match := ENDS.search(self.data, self.searched, until):
            if is_end(self.data, self.at, self.document, match):
                end = match.start(match.lastgroup)
                newlines = self.data.count(b"\n", match.start(), end)
                new = newlines > 1 or match.lastgroup == "paragraph"
                new = new or PARAGRAPH.encode() in self.data[match.start() : end]
                new = new or newlines == 1 and self.is_long(match.start())
                return end, match.end() - 1, new
            self.searched = match.start() + 1
        if until < self.at + LONGEST:
            return None
        half = self.at + LONGEST // 2
        end = max(self.data.rfind(space, half, until - 1) for space in (b" ", b"\n")) + 1
        if not end:  # no white space: cut between two characters
            end = until - 1
            while end > until - 4 and 128 <= self.data[end] < 192:
                end -= 1
        return end, until - 1, False


def first_bytes(text):
    """The bytes at which the sentences of a text (bytes) begin, a list; the first is 0."""
    return [0, *(end.next for end in Sentences().push(text))]


# --------------------------------------------------------------------------------------------------
# words

# scripts without spaces: each character counts as a word
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
WORD = re.compile(f"[{UNSPACED}]|[^\\W\\d_{UNSPACED}]+")
LETTERS = bytes(c if c > 127 or chr(c).isalpha() else 32 for c in range(256)).lower()
N_WORD_IDS = 1 << 18


class WordIds(dict):
    """A cache: the bytes of a word -> a tuple of the ids of the words in it.

    An id is a hash of the first five letters of a word, a crude stem.
    """

    def __init__(self):
        self[b"\n"] = (-1,)  # see `of`

    def __missing__(self, word):
        text = word.decode(errors="ignore").lower()
        words = [text] if text.isascii() else WORD.findall(text)
        ids = tuple(zlib.crc32(w[:5].encode()) % N_WORD_IDS for w in words if w)
        if len(word) <= 40:  # do not store whole lines without spaces
            if len(self) >= 500_000:
                self.clear()
                self.__init__()
            self[word] = ids
        return ids

    def of(self, sentences):
        """The word ids of a list of n sentences (bytes), in order.

        Returns the ids of all of them, one after another, and how many each has, (n,); both int64.
        """
        marked = b" \n ".join(s.translate(LETTERS) for s in sentences)  # LETTERS leaves no newline
        ids = np.fromiter(chain.from_iterable(map(self.__getitem__, marked.split(b" "))), np.int64)
        ends = np.append(np.flatnonzero(ids < 0), len(ids))
        return ids[ids >= 0], np.diff(ends, prepend=-1) - 1
