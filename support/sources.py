"""Where a text comes from: a file, a folder, an address, or Project Gutenberg."""

import hashlib
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from pathlib import Path

from support.download import CACHE, download
from support.files import InputError, write_text

PIECE = 1 << 22  # characters in memory at a time
FIRST_LINE = r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG.*?\*\*\*[ \t]*$"
LAST_LINE = r"^\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG"
# byte order marks; that of UTF-32 begins with that of UTF-16
MARKS = {BOM_UTF32_LE: "utf-32", BOM_UTF32_BE: "utf-32"}
MARKS |= {BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}


def source_files(source, cwd=""):
    """The local text files that a source (a string or a list of strings) names, a list of Paths.

    cwd: where relative paths start. Remote texts are downloaded once, into the cache. Raises
    InputError for anything that names no text.
    """
    if not isinstance(source, str):
        return [path for one in source for path in source_files(one, cwd)]
    if not source or not source.isprintable():
        raise InputError(f"{source!r} does not name a source")
    if match := re.fullmatch(r"gutenberg:([0-9]{1,9})", source):
        return [from_gutenberg(match[1])]
    if source.startswith("gutenberg:"):
        raise InputError(f"{source}: a Gutenberg source is gutenberg:NUMBER, like gutenberg:2529")
    if source.startswith(("http://", "https://")):
        return [from_address(source)]
    path = Path(cwd, source)
    if path.is_dir():
        if files := texts(path):
            return files
        raise InputError(f"{source}: no .txt file in this folder")
    if not path.is_file():
        raise InputError(
            f"{source}: no such file or folder; a source is a text file, a folder of .txt files, "
            "an http(s) address or gutenberg:NUMBER"
        )
    return [path]


def texts(folder):
    """The .txt files in a folder and its subfolders, sorted."""
    return sorted(f for f in visible(folder) if f.suffix.lower() == ".txt" and f.is_file())


def visible(folder):
    """Yield every path in a folder and its subfolders that is not hidden."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def left_out(source, cwd=""):
    """Yield a line for each folder among the sources that contains more than its texts."""
    if not isinstance(source, str):
        for one in source:
            yield from left_out(one, cwd)
        return
    folder, names = Path(cwd, source), []
    files = set(texts(folder)) if folder.is_dir() else ()
    for path in sorted(visible(folder)) if files else ():
        subfolder = path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK)
        if path not in files and not subfolder:
            names.append(str(path.relative_to(folder)))
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield f"{source}: skipped {', '.join(names[:5])}{more}"


def from_gutenberg(number):
    """A book of Project Gutenberg without its license, downloaded once. Raises InputError."""
    path = CACHE / "texts" / f"gutenberg-{number}.txt"
    if not path.exists():
        mirror = os.environ.get("GUTENBERG_MIRROR", "https://www.gutenberg.org").rstrip("/")
        raw = path.with_suffix(f".{os.getpid()}.raw")
        download(f"{mirror}/cache/epub/{number}/pg{number}.txt", raw)
        try:
            write_text(path, strip_gutenberg("".join(pieces(raw))))
        except InputError as e:
            raise InputError(f"gutenberg:{number}: {e}") from None
        finally:
            raw.unlink()
    return path


def from_address(url):
    """The plain text at an http(s) address, downloaded once. Raises InputError for a web page."""
    path = CACHE / "texts" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt"
    if not path.exists():
        raw = download(url, path.with_suffix(f".{os.getpid()}.raw"))
        try:
            start = next(pieces(raw), "")
            if not start.strip() or re.match(r"\s*<(!doctype )?html", start, re.I):
                raise InputError("a web page or nothing, not a plain text")
            os.replace(raw, path)
        except InputError as e:
            raw.unlink()
            raise InputError(f"{url}: {e}") from None
    return path


def strip_gutenberg(text):
    """The book between the START and END lines of Project Gutenberg.

    Raises InputError if one of them is missing: then it is not the whole book.
    """
    start = re.search(FIRST_LINE, text, re.M | re.I | re.S)
    end = re.search(LAST_LINE, text, re.M | re.I)
    if not start or not end:
        raise InputError("no START or END line of Gutenberg: not a book, or half a download")
    return text[start.end() : end.start()].strip() + "\n"


def pieces(path):
    """Yield the text of a file in pieces of about PIECE characters. Raises InputError if the file
    is not UTF-8 text.

    A piece ends only where tokenizers split the text anyway: before a white-space character that
    follows another character. So the pieces give the same tokens as the whole text.
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
        with open(path, "rb") as f:
            start = f.read(4)
        code = next((code for mark, code in MARKS.items() if start.startswith(mark)), "latin1")
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
