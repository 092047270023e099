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
from html import escape
from pathlib import Path

import numpy as np

from support.files import InputError, check_writable, open_regular, visible, write_text

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
# the numbers

# {name: (scale, what is added first)}: a value is stored as round((value + added) * scale)
SCALES = {"fidelity": (65535, 0), "entropy": (4096, 0), "roots": (255, 0), "bits": (256, 0)}
SCALES |= {"influence": (4096, 0), "change": (256, 128), "new_bits": (256, 0)}
BUDGET = 1e6, 14  # bytes of a page: so many, and so many more for each query of each head


def pack(arrays):
    """Many arrays as one string: {"arrays": {name: its place and type}, "numbers": base64}.

    arrays: {name + digits: values}, each stored as SCALES says for its name, in one byte or, if
    that is too small, in two (and clipped to them): first all low bytes, then all high bytes. All
    are then compressed (deflate).
    """
    places, stored, at = {}, [], 0
    for name, values in arrays.items():
        scale, added = SCALES.get(name.rstrip("0123456789"), (1, 0))
        values = np.rint((np.asarray(values, np.float64).reshape(-1) + added) * scale)
        n_bytes = 1 if values.max(initial=0) < 256 else 2
        values = values.clip(0, 65535).astype("<u2").view(np.uint8).reshape(-1, 2)
        stored.append(values[:, :n_bytes].tobytes("F"))
        places[name] = {"at": at, "n": len(values), "bytes": n_bytes}
        places[name] |= {"scale": scale, "added": added}
        at += len(stored[-1])
    numbers = base64.b64encode(zlib.compress(b"".join(stored))).decode()
    return {"arrays": places, "numbers": numbers}


def keep_strongest(measured, most):
    """Of the keys of every query, keep the strongest: about `most` at all dials together.

    measured: a dict per dial, with keys and weights, (L, H + 1, T, K), the largest first. They are
    replaced by n_keys, (L, H + 1, T), how many are kept, and by their keys and roots, the square
    roots of the weights, one after another. Returns the smallest weight that is always kept; for
    the mean over heads, the limit is 1 / H of it. The four largest of each query are always kept.
    """
    roots, ranked = [], []  # as they are stored, which is finer if weights are small
    for values in measured:
        weights, ranks = values["weights"], values["weights"].copy()
        ranks[:, -1] *= ranks.shape[1] - 1
        pair = [np.rint(255 * np.sqrt(w.clip(0, 1))).astype(np.uint8) for w in (weights, ranks)]
        roots.append(pair[0])
        ranked.append(pair[1])
    counts = sum(np.bincount(r.reshape(-1), minlength=256) for r in ranked)
    at_least = counts[::-1].cumsum()[::-1]  # how many roots are at least 0, 1, ...
    least = max(int(np.argmax(np.append(at_least, 0) <= max(most, 0))), 1)
    for values, r, rank in zip(measured, roots, ranked):
        kept = (rank >= least) & (r > 0)
        kept[..., :4] |= r[..., :4] > 0
        del values["weights"]
        values |= {"n_keys": kept.sum(-1), "keys": values["keys"][kept], "roots": r[kept] / 255}
    return min((least / 255) ** 2, 1)


def store(tokens, vocabulary, measured):
    """The numbers of a page and the tokens that it names, a dict.

    tokens: (T,) ids; vocabulary: the bytes of each token; measured: for each dial what
    view.measure_dial returned.
    """
    sizes = {key: sum(values[key].size for values in measured) for key in measured[0]}
    others = sum(sizes.values()) - sizes["keys"] - sizes["weights"]  # two bytes each, in base64
    queries = sizes["keys"] // measured[0]["keys"].shape[-1]
    least = keep_strongest(measured, (BUDGET[0] + BUDGET[1] * queries - 2.4 * others) / 2.6)
    # the page numbers the tokens that it names from 0 on
    named = [values[key].reshape(-1) for values in measured for key in ("likely", "new")]
    ids = np.unique(np.concatenate([tokens, *named]).astype(np.int64))
    arrays = {}
    for dial, values in enumerate(measured):
        numbered = {key: np.searchsorted(ids, values[key]) for key in ("likely", "new")}
        roots = {"influence": np.sqrt(values["influence"])}  # finer where they are small
        arrays |= {f"{key}{dial}": v for key, v in {**values, **numbered, **roots}.items()}
    return {
        "text": pieces_of([vocabulary[t] for t in tokens]),
        "tokens": np.searchsorted(ids, tokens).tolist(),
        "labels": [label(vocabulary[t]) for t in ids],
        "least": least,
        **pack(arrays),
    }


# --------------------------------------------------------------------------------------------------
# the file


class Page:
    """A page, which shows itself in a notebook.

    data: what it shows, a dict; path: where `save` writes it; html: the whole file.
    """

    def __init__(self, data, path):
        self.data, self.path = data, Path(path)

    @property
    def html(self):
        return fill(self.data)

    def save(self, path=None):
        """Write the page to `path`, by default into the folder of its run or, for weights, here,
        under a name that says what is on it. Returns the Path. Raises InputError if it cannot be
        written, or if another file has that name."""
        path = Path(path or self.path)
        check_page(path)
        write_text(path, self.html)
        return path

    def _repr_html_(self):
        # the frame may run the script of the page and do nothing else
        options = 'sandbox="allow-scripts" style="width: 100%; height: 54rem; border: 0"'
        return f'<iframe {options} srcdoc="{escape(self.html)}"></iframe>'


def check_page(path):
    """Raises InputError unless a page can be written to `path`, where it may replace a page."""
    if path.suffix != ".html":  # so that no text and no weights are overwritten
        raise InputError(f"{path}: the name of a page must end in .html")
    check_writable(path)
    if path.exists() and not is_page(path):
        raise InputError(f"{path} is not a page of view.py; give another --out")


def page_name(given, weights, pairs, partition):
    """A file name that says what is on a page: pages with other arguments have another name.

    given: arguments of view.page that are not the defaults, a dict; weights: their name, "" for a
    run; pairs: of schedule and floor.
    """
    text, split = given.get("text"), given.get("split", "test")
    dials = [name if floor == 1 else f"{name}_{floor:g}" for name, floor in pairs]
    which = "" if split == "test" else split
    if text is not None:
        which = text.stem if isinstance(text, Path) else "prompt"
    rest = [f"{key}={given[key]}" for key in ("text", "words", "tokens", "draws") if key in given]
    digits = hashlib.sha256("\n".join(rest).encode(errors="surrogateescape")).hexdigest()[:6]
    parts = ["view", weights[:20], *dials, partition, which[:20], digits if rest else ""]
    names = (re.sub(r"[^\w.+]+", "_", part).strip("_") for part in parts)
    return f"{'-'.join(filter(None, names))}.html"


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
