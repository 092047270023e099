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


def source_files(source, cwd=""):
    """The local text files that a source (a string, or a list of them) stands for, a list of Paths.

    cwd: where relative paths start from. What is remote is fetched once, into the cache. Raises
    InputError for what names no text.
    """
    if not isinstance(source, str):
        return [path for one in source for path in source_files(one, cwd)]
    if not source or not source.isprintable():
        raise InputError(f"{source!r} does not name a source")
    if match := re.fullmatch(r"gutenberg:([0-9]{1,9})", source):
        return [from_gutenberg(match[1])]
    if source.startswith("gutenberg:"):
        example = "a Gutenberg source is gutenberg:NUMBER, for example gutenberg:2529"
        raise InputError(f"{source}: {example}")
    if source.startswith(("http://", "https://")):
        return [from_address(source)]
    path = Path(cwd, source)
    if path.is_dir():
        files = texts(path)
        if not files:
            raise InputError(f"{source}: no .txt file in this folder")
        return files
    if not path.is_file():
        known = "a text file, a folder of .txt files, an http(s) address or gutenberg:NUMBER"
        raise InputError(f"{source}: no such file or folder; a source is {known}")
    return [path]


def texts(folder):
    """The .txt files of a folder and those within it, sorted."""
    return sorted(f for f in seen(folder) if f.suffix.lower() == ".txt" and f.is_file())


def seen(folder):
    """Yield every path within a folder that is not hidden."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def left_out(source, cwd=""):
    """Yield a line for each folder among the sources that holds more than its texts."""
    if not isinstance(source, str):
        for one in source:
            yield from left_out(one, cwd)
        return
    folder, names = Path(cwd, source), []
    files = set(texts(folder)) if folder.is_dir() else ()
    for path in sorted(seen(folder)) if files else ():
        inside = path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK)
        if path not in files and not inside:
            names.append(str(path.relative_to(folder)))
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield f"{source}: skipped {', '.join(names[:5])}{more}"


def from_gutenberg(number):
    """A book of Project Gutenberg, fetched once, without licence and headers."""
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
    """The plain text at an http(s) address, fetched once."""
    path = CACHE / "texts" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt"
    if not path.exists():
        raw = download(url, path.with_suffix(f".{os.getpid()}.raw"))
        try:
            start = next((piece for piece in pieces(raw)), "")
            if not start.strip() or re.match(r"\s*<(!doctype )?html", start, re.I):
                raise InputError("a web page or nothing, not a plain text")
            os.replace(raw, path)
        except InputError as e:
            raw.unlink()
            raise InputError(f"{url}: {e}") from None
    return path


def strip_gutenberg(text):
    """The book alone: what stands between Project Gutenberg's START and END lines.

    Raises InputError where one of them is missing: then it is not the whole book.
    """
    start = re.search(FIRST_LINE, text, re.M | re.I | re.S)
    end = re.search(LAST_LINE, text, re.M | re.I)
    if not start or not end:
        missing = "the START or END line of a Project Gutenberg text is missing"
        raise InputError(f"{missing}: not a book, or half a download")
    return text[start.end() : end.start()].strip() + "\n"


def pieces(path):
    """Yield the text of a file in pieces of about PIECE characters.

    They are cut where tokenizers cut anyway: before a white-space character that follows another
    character. So the pieces give the same tokens as the whole. Raises InputError for what is not
    UTF-8 text.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as f:  # reads CRLF as a newline
            while text := f.read(PIECE):
                if "\0" in text:
                    binary = "holds NUL bytes: a binary file, or a text in UTF-16, not in UTF-8"
                    raise InputError(f"{path}: {binary}")
                rest += text
                cuts = [m.start() + 1 for m in re.finditer(r"\S\s", rest[-4096:])]
                if cuts:
                    cut = max(len(rest) - 4096, 0) + cuts[-1]
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as e:
        with open(path, "rb") as f:
            start = f.read(4)
        marks = {BOM_UTF32_LE: "utf-32", BOM_UTF32_BE: "utf-32"}
        marks |= {BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}
        code = next((code for mark, code in marks.items() if start.startswith(mark)), "latin1")
        raise InputError(
            f"{path}: not UTF-8 text (byte 0x{e.object[e.start]:02x}, {e.reason}); convert it "
            f"first, for example with iconv -f {code} -t utf-8"
        ) from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    if rest:
        yield rest


def slug(source):
    """A short name for a source, good as the name of a folder."""
    first = source if isinstance(source, str) else source[0]
    return re.sub(r"\W+", "-", first if ":" in first else Path(first).stem).strip("-")[:60]
