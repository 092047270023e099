"""Where a text comes from (a file, a folder, an address, Project Gutenberg) and how it is read."""

import codecs
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import stat
from functools import partial
from pathlib import Path

import regex  # before Python 3.11.5, re matches possessive groups wrongly (gh-106052)

from support.download import CACHE, download
from support.files import InputError
from support.gutenberg import books

PIECE = 1 << 18  # bytes in memory at a time
SIGNATURES = {  # how a file begins that is not a text; what it is, and what to do
    b"%PDF-": ("a PDF", "convert it to plain text first, for example with pdftotext"),
    b"PK\3\4": ("an EPUB, a Word document or a zip file", "export it as plain text, or unpack it"),
    b"\xd0\xcf\x11\xe0": ("an old Word document", "export it as plain text"),
    b"{\\rtf": ("an RTF document", "export it as plain text"),
    b"\x1f\x8b": ("a gzip file", "unpack it first"),
    b"\xfd7zXZ": ("an xz file", "unpack it first"),
    b"BZh": ("a bzip2 file", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it first"),
    b"\x89PNG": ("a PNG image", "extract its text first"),
    b"\xff\xd8\xff": ("a JPEG image", "extract its text first"),
}
WEB_PAGE = regex.compile(
    rb"(?>\s+|<\?.*?\?>|<!--.*?-->)*+<(?:!doctype\s+)?html[\s>]", regex.I | regex.S
)
STRING = rb'"(?:[^"\\]|\\.)*+"\s*'
# an object, an array of objects, or at least two strings: prose may be ["Yes."]
JSON = regex.compile(
    rb"\s*(?:(?:\[\s*)*+\{\s*" + STRING + rb":|(?:\[\s*)++" + STRING + rb',\s*")', regex.S
)
TEXT_TYPE = re.compile(r"text/(?!html$).*|(?:application|binary)/(?:octet-stream|binary)")


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
    """The .txt files in a folder and its subfolders, in natural order."""
    return [path for path in visible(folder) if path.suffix.lower() == ".txt" and path.is_file()]


def visible(folder):
    """Every path in a folder and its subfolders that is not hidden, in natural order."""
    paths = ((path, path.relative_to(folder).parts) for path in folder.rglob("*"))
    shown = (path for path, parts in paths if not any(part[0] == "." for part in parts))
    return sorted(shown, key=natural)


def natural(path):
    """A key that sorts numbers in paths by their values: "chapter 10" after "chapter 2"."""
    parts = (re.split("([0-9]+)", part) for part in path.parts)  # every other item is a number
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], path


def left_out(source, cwd=""):
    """Yield lines about what is not read of each source, a string or a list of strings: files of a
    folder that are no texts, and what Project Gutenberg adds to its books."""
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
        sizes = [outside_of_books(path) for path in source_files(one, cwd)]
        sizes = [size for size in sizes if size]
        if folder.is_dir() and sizes:
            yield (
                f"{one}: left out {sum(sizes):,} bytes of {len(sizes)} files, the headers and "
                "licenses of Project Gutenberg"
            )
        elif sizes:
            yield f"{one}: left out {sizes[0]:,} bytes, the header and license of Project Gutenberg"


def outside_of_books(path):
    """The number of bytes of a file that are not read: of a header and license."""
    return path.stat().st_size - sum(end - begin for begin, end in books(path))


# --------------------------------------------------------------------------------------------------
# the cache


def downloaded(source, url, name, fetch=True):
    """The path of a text in the cache, as UTF-8, downloaded once. Raises InputError if it is not a
    text, or half a book of Project Gutenberg."""
    path = CACHE / "texts" / name
    if path.exists():
        return path
    if not fetch:
        raise InputError(
            f"{source} is not in the cache; to download it, run: python prepare_data.py "
            f"{shlex.quote(source)}"
        )
    return download(url, path, check=partial(check_answer, source))


def check_answer(source, path, headers):
    """Raises InputError unless a server's answer to a source is a text, in full.

    path: of its content, which becomes UTF-8; headers: an email.message.Message.
    """
    try:
        if not TEXT_TYPE.fullmatch(headers.get_content_type()):  # text/plain if it has none
            raise InputError(
                f"the server's answer is of type {headers.get_content_type()!r}, not a plain text"
            )
        to_utf8(path, headers.get_content_charset() or "utf-8")
        if not sum(bool(text.strip()) for text in decoded(path)):  # reads all of it
            raise InputError("the server's answer is empty, not a plain text")
        if source.startswith("gutenberg:") and not outside_of_books(path):
            raise InputError("no START or END line of Gutenberg: not a book, or half of one")
    except InputError as e:
        raise InputError(f"{source}: {e}") from None


def to_utf8(path, charset):
    """Rewrite a file from the charset that its server declares, unless it is in UTF-8 nevertheless.
    Raises InputError if it is in neither."""
    if charset in ("utf-8", "utf8", "us-ascii"):
        return  # `decoded` checks it
    content = path.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        if not content.isascii():
            return  # no other text looks like UTF-8 by chance
    try:
        if codecs.lookup(charset).name in ("idna", "punycode"):
            raise LookupError  # they are for the names of hosts, and slow
        text = content.decode({"iso-8859-1": "windows-1252"}.get(charset, charset))
        path.write_bytes(text.encode())
    except (LookupError, ValueError):
        raise InputError(
            f"the text is neither in {charset!r}, as its server declares, nor in UTF-8"
        ) from None


# --------------------------------------------------------------------------------------------------
# reading


def pieces(path, update=lambda chunk: None):
    """Yield the text of a file in pieces of about PIECE characters, without byte order marks, with
    "\n" as its only newline, and without Project Gutenberg's header and license.

    update is called with all bytes of the file, in chunks: with what the pieces were made from.
    The pieces give the same tokens as the whole text: one ends only where tokenizers split it
    anyway, before a white-space character that follows another character.
    Raises InputError if the file is not UTF-8 text.
    """
    rest = ""
    try:
        for text in decoded(path, update):
            rest += text
            cuts = [m.start() + 1 for m in re.finditer(r"\S\s", rest[-4096:])]
            if cuts:
                cut = max(len(rest) - 4096, 0) + cuts[-1]
                yield rest[:cut]
                rest = rest[cut:]
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    if rest:
        yield rest


def decoded(path, update=lambda chunk: None):
    """Yield what `pieces` yields, cut anywhere. Its InputErrors do not name the file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError("not a regular file")
    check_start(path)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), True)
    is_utf8 = False  # which no other text is by chance, except ASCII
    for at, chunk in chunks_of_books(path, update):
        if b"\0" in chunk:
            place = place_of(path, at + chunk.index(b"\0"))
            raise InputError(f"a NUL at {place}; remove it, unless this is a binary file")
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as e:
            place = place_of(path, at + len(chunk) - len(e.object) + e.start)
            raise not_utf8(e, place, is_utf8) from None
        is_utf8 = is_utf8 or not text.isascii()
        yield text.replace("\ufeff", "")


def chunks_of_books(path, update):
    """Yield what `books` keeps of a file, as (offset, bytes), and finally no bytes. update: is
    called with all bytes of the file, in chunks."""
    parts, at = books(path), 0
    with open(path, "rb") as f:
        while chunk := f.read(PIECE):
            update(chunk)
            for begin, end in parts:
                if kept := chunk[max(begin - at, 0) : max(end - at, 0)]:
                    yield max(begin, at), kept
            at += len(chunk)
    yield at, b""


def check_start(path):
    """Raises InputError if the first bytes of a file show that it is not a plain text in UTF-8."""
    with open(path, "rb") as f:
        start = f.read(4096)
    for signature, (kind, remedy) in SIGNATURES.items():
        if start.startswith(signature):
            raise InputError(f"{kind}, not a plain text; {remedy}")
    code = json.detect_encoding(start)
    if not code.startswith("utf-8"):
        name = code.replace("-le", "le").replace("-be", "be")  # as iconv spells it
        raise InputError(
            f"probably {code.upper()}, not UTF-8; convert it first, for example with "
            f"iconv -f {name} -t utf-8"
        )
    start = start.removeprefix(codecs.BOM_UTF8)
    if WEB_PAGE.match(start):
        raise InputError("a web page, not a plain text; save the page as text")
    if JSON.match(start):
        raise InputError("JSON, not a plain text; extract the text from it")


def place_of(path, at):
    """The place of a byte in a file, in words."""
    with open(path, "rb") as f:
        line = 1 + sum(f.read(min(PIECE, at - i)).count(b"\n") for i in range(0, at, PIECE))
    return f"byte {at:,}, line {line:,}"


def not_utf8(error, place, is_utf8):
    """An InputError for a UnicodeDecodeError. place: of its byte, in words; is_utf8: whether the
    text before what was decoded is in UTF-8."""
    byte, text = error.object[error.start], error.object.decode(errors="replace")
    bad = text.count("\ufffd")
    good = len(text) - len(text.encode("ascii", "ignore")) - bad  # of more than one byte
    if is_utf8 or good > bad or error.reason == "unexpected end of data":
        return InputError(
            f"0x{byte:02x} at {place} is not UTF-8, but the rest is; replace or remove this byte"
        )
    return InputError(
        f"not UTF-8 (0x{byte:02x} at {place}); convert it first, for example with "
        "iconv -f windows-1252 -t utf-8 if it is in a Western European language"
    )


def slug(source):
    """A short name for a source, suitable as the name of a folder."""
    first = source if isinstance(source, str) else source[0]
    name = re.sub(r"\W+", "-", first if ":" in first else Path(first).stem).strip("-")
    return name.encode()[:60].decode(errors="ignore")  # a disk counts bytes
