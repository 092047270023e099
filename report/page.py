"""One HTML page from numbers and text: a single file that needs no library and requests nothing.

The template, page.html, is complete except for two marks: @DATA@, the data as JSON, and @HASHES@,
which let a browser run the script and the style of the page and nothing else. Text reaches the page
only as data.
"""

import base64
import codecs
import hashlib
import json
import os
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np

from support.files import open_regular, visible

TEMPLATE = Path(__file__).with_name("page.html")

# --------------------------------------------------------------------------------------------------
# text

ENDS = ".,;:!?…—-\"')]”’"
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
# the names of letters, marks and symbols that nobody sees
BLANK = re.compile(r"( FILLER| BLANK)$|VARIATION SELECTOR|GRAPHEME JOINER|VOWEL INHERENT")


def label(token):
    """A token (bytes) on its own: spaces and newlines as signs, other characters that nobody sees
    as, say, \\u200b, parts of a character as \\xe2, and an accent without a letter on a circle."""
    shown = ""
    for c in visible(token.decode(errors="backslashreplace")):
        if c in SIGNS:
            c = SIGNS[c]
        elif unicodedata.category(c) in ("Zs", "Cf") or BLANK.search(unicodedata.name(c, "")):
            c = c.encode("unicode_escape").decode()
        elif not shown and unicodedata.category(c).startswith("M"):
            c = f"◌{c}"
        shown += c
    return shown or "(empty)"


def pieces_of(tokens):
    """What the page shows for each token (bytes): a list of strings, which make up the text.

    A character of several tokens belongs to the last of them; the others are empty. Invalid bytes
    are shown as \\xe2. A single newline after a long line becomes a space, because such a text was
    wrapped and the page wraps it again. The newline stays if the line ends with one of ENDS and no
    lower-case letter follows, because that may be verse or a list.
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
    """Many arrays as one string: {"arrays": {name: its place and type}, "numbers": base64}.

    arrays: {name: (values, scale)}, values >= 0. Each is stored as round(values * scale), in one
    byte or, if that is too small, in two (and clipped to them). All are then compressed (deflate).
    """
    places, stored, at = {}, [], 0
    for name, (values, scale) in arrays.items():
        values = np.rint(np.asarray(values, np.float64) * scale)
        dtype = np.dtype(np.uint8 if values.max(initial=0) < 256 else "<u2")
        stored.append(values.clip(0, 65535).astype(dtype).tobytes())
        places[name] = {"at": at, "n": values.size, "bytes": dtype.itemsize, "scale": scale}
        at += len(stored[-1])
    numbers = base64.b64encode(zlib.compress(b"".join(stored), 9)).decode()
    return {"arrays": places, "numbers": numbers}


def is_page(path):
    """Whether a file is a page that `fill` made, as far as its beginning tells."""
    beginning = TEMPLATE.read_text(encoding="utf-8").partition("@HASHES@")[0].encode()
    with open(open_regular(path, os.O_RDONLY), "rb") as f:
        return f.read(len(beginning)) == beginning


def fill(data):
    """The page that shows `data`, anything that JSON can hold: a string of HTML, in ASCII."""
    html = TEMPLATE.read_text(encoding="utf-8")
    hashes = []
    for kind in ("script", "style"):
        content = html.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"{kind}-src 'sha256-{digest}'")
    html = html.replace("@HASHES@", "; ".join(hashes))
    # "<" as an escape of JSON, so that no text can end the element that holds it
    return html.replace("@DATA@", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
