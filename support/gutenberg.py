"""Which parts of a file are books of Project Gutenberg, without their headers and licenses."""

import os
import re

CHUNK = 1 << 18  # bytes in memory at a time
OVERLAP = 1 << 12  # bytes, more than a MARK takes
LICENSE = 40_000  # bytes; no header and no license is longer

# A book begins after START, with its title in up to 400 characters, or after SMALL_PRINT, which
# ended the headers of the 1990s. A paragraph on who produced the file may follow.
START = (
    r"\*\*\*[ \t]*START\s+OF\s+TH(?:E|IS)\s+(?:COPYRIGHTED\s+)?PROJECT\s+GUTENBERG"
    r"(?:(?:[^\n]|\n(?![ \t\r]*\n)){0,400}?\*\*\*|[^\n]*)"
)
SMALL_PRINT = r"\*END[* \t]*THE\s+SMALL\s+PRINT[^\n]*"
CREDITS = (
    r"\s{1,99}(?:Produced|Transcribed|(?:This\s+)?e-?(?:text|book)\s+(?:was\s+)?(?:prepared|produced))"
    r"\s(?:[^\n]|\n(?![ \t\r]*\n)){0,2000}(?=\n[ \t\r]*\n)"
)
END = (
    r"(?:\*\*\*[ \t]*END\s+OF\s+TH(?:E|IS)\s+(?:COPYRIGHTED\s+)?|End\s+of\s+(?:th(?:e|is)\s+)?)"
    r"PROJECT\s+GUTENBERG"
)
MARK = re.compile(  # a newline and the first character after it are quick to look for
    rf"\n(?=\xef|[ \t]|\*|E)(?:\xef\xbb\xbf)?[ \t]*(?:(?:(?P<start>{START})|"
    rf"(?P<small_print>{SMALL_PRINT}))(?:{CREDITS})?|(?P<end>{END}))(?=(?P<space>\s*))".encode(
        "latin1"
    ),
    re.I,
)


def books(path):
    """The parts of a file to read, a list of (begin, end) in bytes: all of it, unless a line starts
    a book and a later line ends it.

    Several books in a file are kept, the last one even if its end is missing, and so is a text
    beside them that is too long for a license. A file with <|endoftext|> is kept as it is.
    """
    size = os.path.getsize(path)
    gaps, at, inside, is_book = [], 0, False, False
    for kind, begin, end in marks(path):
        if kind == "joined":
            return [(0, size)]
        if kind == "end":
            is_book = is_book or (inside and begin > at)
            at = begin if inside or at == 0 else at  # the first of two ends
        else:
            if (not inside or kind == "small_print") and end - at <= LICENSE:
                gaps.append((at, end))
            at = end
        inside = kind in ("start", "small_print")
    parts, at = [], 0
    for begin, end in [*gaps, (size, size)] if is_book else [(size, size)]:
        if begin > at:
            parts.append((at, begin))
        at = end
    return parts


def marks(path):
    """Yield (kind, begin, end) in bytes for each line of a file that starts or ends a book, with
    the white space after it; for <|endoftext|>, the kind "joined"; and finally "" and the size."""
    with open(path, "rb") as f:
        window, offset, chunk = b"\n", -1, b"\n"
        while chunk:
            chunk = f.read(CHUNK)
            window += chunk
            if b"<|endoftext|>" in window:
                yield "joined", 0, 0
            done = max(len(window) - OVERLAP, 0) if chunk else len(window)
            for mark in MARK.finditer(window):
                if mark.start() < done:
                    kind = next(name for name in ("start", "small_print", "end") if mark[name])
                    yield kind, offset + mark.start() + 1, offset + mark.end("space")
            window, offset = window[done:], offset + done
    yield "", offset, offset
