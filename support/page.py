"""One HTML page from numbers and text: a single file, no library, no request.

The template, page.html, is whole but for two marks: @DATA@, the data as JSON, and @HASHES@, which
let a browser run its own script and style and nothing else. Text reaches the page as data alone.
"""

import base64
import codecs
import hashlib
import json
import unicodedata
import zlib
from pathlib import Path

import numpy as np

TEMPLATE = Path(__file__).with_name("page.html")

# --------------------------------------------------------------------------------------------------
# text

# characters that turn the direction of what follows them
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ENDS = ".,;:!?…—-\"')]”’"
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def visible(text):
    """A text with every character that would not show, or would turn the text, as \\u202e."""
    hidden = {
        c
        for c in set(text) - {"\n", "\t"}
        if c in TURNS or unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cn", "Co")
    }
    return "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in text)


def label(token):
    """A token (bytes) by itself, spaces and newlines too as signs; part of a character as \\xe2."""
    text = visible(token.decode(errors="backslashreplace"))
    return "".join(SIGNS.get(c, c) for c in text) or "(empty)"


def pieces_of(tokens):
    """What a page shows for each of some tokens (bytes): a list of str; together, the text.

    A character of several tokens stands at the last of them; the others show nothing. Bytes that
    are no character stand as \\xe2. A single newline after a long line is a space: such a text was
    cut into lines, and a page makes lines of its own. (It stays where the line ends with one of
    ENDS and no small letter follows: that may be verse, or a list.)
    """
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    pieces = [decoder.decode(token) for token in tokens]
    pieces[-1] += decoder.decode(b"", final=True)
    text, begin = list("".join(pieces)), 0
    for i, c in enumerate(text):
        if c == "\n":
            after = text[i + 1] if i + 1 < len(text) else "\n"
            verse = text[i - 1] in ENDS and not after.islower()
            if i - begin > 50 and not after.isspace() and not verse:
                text[i] = " "
            begin = i + 1
    shown = iter(text)
    return [visible("".join(next(shown) for _ in piece)) for piece in pieces]


# --------------------------------------------------------------------------------------------------
# the file


def pack(arrays):
    """Many arrays as one string: {"arrays": {name: where and how}, "numbers": base64 of deflate}.

    arrays: {name: (values, scale)}. What is stored is round(values * scale), in one byte each or,
    where that is not enough, in two. So values are at least 0; what is too large is cut.
    """
    where, stored, at = {}, [], 0
    for name, (values, scale) in arrays.items():
        values = np.rint(np.asarray(values, np.float64) * scale)
        kind = np.uint8 if values.max(initial=0) < 256 else np.uint16
        raw = values.clip(0, 65535).astype(kind).astype(np.dtype(kind).newbyteorder("<")).tobytes()
        where[name] = {"at": at, "n": values.size, "bytes": kind().itemsize, "scale": scale}
        stored.append(raw)
        at += len(raw)
    numbers = base64.b64encode(zlib.compress(b"".join(stored), 9)).decode()
    return {"arrays": where, "numbers": numbers}


def fill(data):
    """The page that shows `data`, anything that JSON can hold: a string of HTML, in ASCII."""
    html = TEMPLATE.read_text(encoding="utf-8")
    hashes = []
    for kind in ("script", "style"):
        content = html.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"{kind}-src 'sha256-{digest}'")
    html = html.replace("@HASHES@", "; ".join(hashes))
    # JSON's own way to write "<": so no text can end the element that holds it
    return html.replace("@DATA@", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
