"""Where a text comes from: a file, a folder, an address, or Project Gutenberg."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

from support.download import CACHE, download
from support.files import InputError, write_text

PIECE = 1 << 22  # characters in memory at a time
BOOK = (  # of Project Gutenberg, between two lines
    r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG.*?\*\*\*[ \t]*$(.*?)"
    r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG"
)


def source_files(source, cwd="", fetch=True):
    """The local text files that a source (a string or a list of strings) names, a list of Paths.

    cwd: where relative paths start. fetch: whether to download what is not in the cache.
    Raises InputError for anything that names no text.
    """
    if not isinstance(source, str):
        return [path for one in source for path in source_files(one, cwd, fetch)]
    if not source or not source.isprintable():
        raise InputError(f"{source!r} does not name a source")
    if match := re.fullmatch("gutenberg:([0-9]{1,9})", source):
        mirror = os.environ.get("GUTENBERG_MIRROR", "https://www.gutenberg.org").rstrip("/")
        url = f"{mirror}/cache/epub/{match[1]}/pg{match[1]}.txt"
        return [downloaded(source, url, f"gutenberg-{match[1]}.txt", fetch)]
    if source.startswith("gutenberg:"):
        raise InputError(f"{source}: a Gutenberg source is gutenberg:NUMBER, like gutenberg:2529")
    if source.startswith(("http://", "https://")):
        digits = hashlib.sha256(source.encode()).hexdigest()[:16]
        return [downloaded(source, source, f"{digits}.txt", fetch)]
    path = Path(cwd, source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            f"{source}: no such file or folder; a source is a text file, a folder of .txt files, "
            "an http(s) address or gutenberg:NUMBER"
        )
    if files := texts(path):
        return files
    raise InputError(f"{source}: no .txt file in this folder")


def texts(folder):
    """The .txt files in a folder and its subfolders, sorted."""
    return [path for path in visible(folder) if path.suffix.lower() == ".txt" and path.is_file()]


def visible(folder):
    """Every path in a folder and its subfolders that is not hidden, sorted."""
    paths = ((path, path.relative_to(folder).parts) for path in folder.rglob("*"))
    return sorted(path for path, parts in paths if not any(part[0] == "." for part in parts))


def left_out(source, cwd=""):
    """Yield a line for each folder among the sources that contains more than its texts."""
    for one in [source] if isinstance(source, str) else source:
        folder = Path(cwd, one)
        files, names = set(texts(folder)), []
        for path in visible(folder):
            entered = path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK)
            if path not in files and not entered:
                names.append(str(path.relative_to(folder)))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            yield f"{one}: skipped {', '.join(names[:5])}{more}"


def downloaded(source, url, name, fetch=True):
    """The path of a text in the cache, downloaded once; a book without Gutenberg's license. Raises
    InputError for a web page, and for half a book."""
    path = CACHE / "texts" / name
    if path.exists():
        return path
    if not fetch:
        raise InputError(
            f"{source} is not in the cache; to download it, run: python prepare_data.py "
            f"{shlex.quote(source)}"
        )
    raw = download(url, path.with_suffix(f".{os.getpid()}.raw"))
    try:
        if source == url:
            start = next(pieces(raw), "")
            if not start.strip() or re.match(r"\s*<(!doctype )?html", start, re.I):
                raise InputError("a web page or nothing, not a plain text")
            os.replace(raw, path)
        else:
            book = re.search(BOOK, "".join(pieces(raw)), re.M | re.I | re.S)
            if not book:
                raise InputError("no START or END line of Gutenberg: not a book, or half of one")
            write_text(path, book[1].strip() + "\n")
    except InputError as e:
        raise InputError(f"{source}: {e}") from None
    finally:
        raw.unlink(missing_ok=True)
    return path


def pieces(path):
    """Yield the text of a file in pieces of about PIECE characters. Raises InputError if the file
    is not UTF-8 text.

    They give the same tokens as the whole text: a piece ends only where tokenizers split it anyway,
    before a white-space character that follows another character.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as f:  # reads CRLF as a newline
            while text := f.read(PIECE):
                if "\0" in text:
                    raise InputError(f"{path}: holds NUL bytes: a binary file, or text in UTF-16")
                rest += text
                cuts = [m.start() + 1 for m in re.finditer(r"\S\s", rest[-4096:])]
                if cuts:
                    cut = max(len(rest) - 4096, 0) + cuts[-1]
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as e:
        code = json.detect_encoding(e.object)
        code = "latin1" if code.startswith("utf-8") else code
        raise InputError(
            f"{path}: not UTF-8 text (byte 0x{e.object[e.start]:02x}, {e.reason}); convert it "
            f"first, for example with iconv -f {code} -t utf-8"
        ) from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    if rest:
        yield rest


def slug(source):
    """A short name for a source, suitable as the name of a folder."""
    first = source if isinstance(source, str) else source[0]
    return re.sub(r"\W+", "-", first if ":" in first else Path(first).stem).strip("-")[:60]
