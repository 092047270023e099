"""What a source names is read as the text it is, and what is not a plain text is refused."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from conftest import ROOT, flags, script_here
from support import gutenberg, sources
from support.files import InputError
from support.gutenberg import books
from support.sources import left_out, pieces, source_files

TEXT = (ROOT / "data" / "sample.txt").read_text(encoding="utf-8")[:3000].strip() + "\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of downloaded texts, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "texts"


def text_of(content, name="text.txt"):
    """What is read of a file with this content, text or bytes."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return "".join(pieces(name))


# --------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 22])
def test_newlines_and_byte_order_marks_are_read_alike_wherever_a_chunk_ends(piece, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", piece)
    content = "\ufeffOne é.\r\nTwo 語.\r\r\n\nThree.\n\ufeffFour 🧠.\r\n".encode() + b"End\r"
    assert text_of(content) == "One é.\nTwo 語.\n\n\nThree.\nFour 🧠.\nEnd\n"
    chunks = []
    list(pieces("text.txt", chunks.append))
    assert b"".join(chunks) == content and max(map(len, chunks)) <= piece


NO_TEXTS = {
    "a PDF.*pdftotext": b"%PDF-1.7\nonly ASCII, so far",
    "an EPUB, a Word document or a zip": b"PK\x03\x04\x14\0mimetypeapplication/epub+zip",
    "an old Word document": bytes.fromhex("d0cf11e0a1b11ae1"),
    "an RTF document": b"{\\rtf1\\ansi Hello}",
    "a gzip file.*unpack": gzip.compress(TEXT.encode()),
    "an xz file": b"\xfd7zXZ\0\0",
    "a bzip2 file": b"BZh91AY&SY",
    "a zstd file": b"\x28\xb5\x2f\xfd\x04",
    "a PNG image": b"\x89PNG\r\n\x1a\n",
    "a JPEG image": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "UTF-16,.*iconv -f utf-16 -t utf-8": "Café. ".encode("utf-16"),
    "UTF-16-LE,.*iconv -f utf-16le": "Cafe. ".encode("utf-16-le"),
    "UTF-16-BE,.*iconv -f utf-16be": "Cafe. ".encode("utf-16-be"),
    "UTF-32,.*iconv -f utf-32 ": "Café. ".encode("utf-32"),
    "a NUL at byte 9, line 2": b"One.\nTwo.\0 Three.",
    # Windows-1252 has quotes where Latin-1 has nothing
    r"0x93 at byte 8, line 1\).*iconv -f windows-1252": "He said “good day”.".encode("cp1252"),
    r"0xe9 at byte 15, line 3\)": "One.\r\nTwo.\r\nCafé.".encode("cp1252"),
    "0x80 at byte 7, line 2 is not UTF-8, but": "é語.\n".encode() + b"\x80" + "à語".encode(),
    "0xe8 at byte 2, line 1 is not UTF-8, but": "é語".encode()[:-1],
    "a web page": "\ufeff\n <!DOCTYPE html><p>Hello.",
    "a web page,": "<HTML>Hello.",
    "a web page, ": "<?xml version='1.0'?>\n<!-- <?a -->\n<html lang='en'>Hello.",
    "JSON": '{"text": "It was late."}',
    "JSON,": '\n[\n {"text" : 1}]',
    "JSON, ": '["It was \\"late\\".", "It was early."]',
}
TEXTS = [
    "",
    "{\\it TeX}",
    "<html is the first tag of a web page>".replace("<", "The <"),
    "<|endoftext|>The tag <html> is the first of a web page.",
    "<p> is a tag, unlike <html>.",
    "<!--" * 500 + "<?>" * 500,
    '["Come in," he said, "and sit down."]',
    '[Enter "Hamlet", a prince.]',
    '{"Come in," he said}',
    '"Come in": the door was open.',
    "[1] A footnote, and [2] another.",
    "PK is not a zip file, and %PDF- is only the beginning of one.",
    "\u202eשלום",
]


@pytest.mark.parametrize("message", NO_TEXTS)
def test_what_is_not_a_plain_text_is_named_with_what_to_do(message):
    with pytest.raises(InputError, match=f"^text.txt: .*{message}") as refused:
        text_of(NO_TEXTS[message])
    assert "latin" not in str(refused.value).lower()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_only_looks_a_little_like_something_else_is_read(text):
    assert text_of(text) == text


@pytest.mark.parametrize("bad, message", [(b"\0", "a NUL"), (b"\x80", "0x80")])
def test_the_place_of_a_bad_byte_counts_from_the_start_of_the_file(bad, message, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 100)
    page = book_page("Café.\r\n" * 2000).replace("\n", "\r\n").encode()
    at = page.index("Café".encode(), 10_000) + 5
    line = 1 + page[:at].count(b"\n")
    with pytest.raises(InputError, match=f"{message} at byte {at:,}, line {line:,}"):
        text_of(page[:at] + bad + page[at:])


def test_one_bad_byte_in_utf_8_is_no_reason_to_convert_the_text(monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 100)
    for before in ("é" + "a " * 900, "é" * 50, "\ufeff" + "a " * 900):
        with pytest.raises(InputError, match="0x92 .* is not UTF-8, but the rest is; replace"):
            text_of(before.encode() + b"It\x92s")


def test_only_regular_files_are_opened():
    os.mkfifo("pipe.txt")
    for path in ("pipe.txt", "/dev/zero", "."):
        with pytest.raises(InputError, match=f"{path}: not a regular file"):
            next(pieces(path))


def test_numbers_in_names_are_sorted_by_their_values():
    names = ["a/x 9.txt", "chapter 1.txt", "chapter 2.txt", "chapter 10.txt"]
    names += ["part 2/b1.txt", "part 2/b01c.txt", "part 10/a.txt", "part ٣/a.txt"]
    for name in reversed(names):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    assert [str(path) for path in source_files(".")] == names


# --------------------------------------------------------------------------------------------------
# addresses


def answer(content, kind):
    """An answer of a server with a Content-Type."""

    def send(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        handler.wfile.write(content)

    return send


ANSWERS = {
    "text/plain; charset=windows-1252": ("“Café”", "cp1252"),
    'text/plain; charset="ISO-8859-1"': ("“Café”", "cp1252"),  # as browsers read it
    "text/markdown; charset=UTF-16LE": ("“Café”", "utf-16-le"),
    "text/plain; charset=iso-2022-jp": ("日本語", "iso-2022-jp"),
    "text/plain;charset=latin1": ("“Café”", "utf-8"),  # the server is wrong
    "text/plain; charset=us-ascii": ("“Café”", "utf-8-sig"),
    "text/plain; charset=no-such": ("“Café”", "utf-8"),
    "application/octet-stream": ("“Café”", "utf-8"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_stored_as_utf_8_whatever_its_charset(kind, serve):
    text, charset = ANSWERS[kind]
    base, _ = serve({"/x": answer((text * 50).encode(charset), kind)})
    (path,) = source_files(f"{base}/x")
    assert path.read_text(encoding="utf-8-sig") == text * 50 == "".join(pieces(path))


NO_ANSWERS = {
    "text/html": (b"<p>Hello.", "type 'text/html', not a plain text"),
    "application/xhtml+xml": (b"<p>Hello.", "type 'application/xhtml"),
    "application/json; charset=utf-8": (b"[1]", "type 'application/json'"),
    "application/pdf": (b"?", "type 'application/pdf'"),
    "video/mp4": (b"?", "type 'video/mp4'"),
    "text/plain": (b"<!doctype html><p>Hello.", "a web page"),
    "application/octet-stream": (gzip.compress(b"Hello."), "a gzip file"),
    "text/plain; charset=utf-8": ("Café.".encode("cp1252"), "0xe9 at byte 3"),
    "text/plain; charset=utf-16": (b"odd,\xff", "neither in 'utf-16'"),
    "text/plain; charset=no-such": ("Café.".encode("cp1252"), "neither in 'no-such'"),
    "text/plain; charset=hex": ("Café.".encode("cp1252"), "neither in 'hex'"),
    "text/plain; charset=-puny_code": (b"ab" * 10**6, "neither in"),
    "text/csv": (b" \n", "is empty"),
    "text/x-log": (TEXT.encode() + b"\xff", "0xff"),  # not in the first piece
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_an_answer_that_is_not_a_text_names_its_source_and_is_not_kept(
    kind, serve, cache, monkeypatch
):
    content, message = NO_ANSWERS[kind]
    monkeypatch.setattr(sources, "PIECE", 1000)
    base, _ = serve({"/x": answer(content, kind)})
    with pytest.raises(InputError, match=message) as refused:
        source_files(f"{base}/x")
    assert str(refused.value).startswith(f"{base}/x: ") and str(cache) not in str(refused.value)
    assert not list(cache.iterdir())


def test_remains_of_a_killed_download_are_removed(serve, cache):
    base, _ = serve({"/x": TEXT.encode()})
    (path,) = source_files(f"{base}/x")
    path.rename(f"{path}.{2**22 + 1}.tmp")  # no process has this number
    source_files(f"{base}/x")
    assert list(cache.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------
# Project Gutenberg


START = "*** START OF THE PROJECT GUTENBERG EBOOK NOTHING ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK NOTHING ***"
HEADER = "\ufeffThe Project Gutenberg eBook of Nothing\n\nThis eBook is for the use of anyone.\n\n"
LICENSE = "Updated editions will replace the previous one.\n\n" * 300
SMALL_PRINT = "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nPlease read.\n"
STARTS = [
    START,
    "***START OF THIS PROJECT GUTENBERG EBOOK NOTHING***",
    "  *** start of this Copyrighted project gutenberg ebook nothing ***  ",
    "*** START OF THE PROJECT GUTENBERG EBOOK NOTHING AT ALL, OR\nMUCH ADO ABOUT\nIT ***",
    "*** START OF THIS PROJECT GUTENBERG EBOOK NOTHING",
    f"{START}\n\n\nProduced by Ann Example and the\nproofreaders of http://example.org",
    f"{START}\n\nE-text prepared by Ann Example",
    f"{START}\n\nTranscribed from the 1901 Example Press edition by Ann Example",
    f"{START}\n\n{SMALL_PRINT}*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
    f"{SMALL_PRINT}*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
    f"{SMALL_PRINT}*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*",
]
ENDS = [
    END,
    "***END OF THIS PROJECT GUTENBERG EBOOK NOTHING***",
    " *** end of the copyrighted Project Gutenberg ebook",
    f"End of Project Gutenberg's Nothing, by Nobody\n\n{END}",
    f"End of the Project Gutenberg EBook of Nothing\n\n\n{END}",
    f"End of this Project Gutenberg’s Nothing\n{END}",
    "End of The Project Gutenberg Etext of Nothing",
]


def book_page(text=TEXT, start=START, end=END):
    return f"{HEADER}{start}\n\n\n{text}{end}\n\n{LICENSE}"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "start, end", [*((start, END) for start in STARTS), *((START, end) for end in ENDS)]
)
def test_a_book_is_read_without_header_and_license(start, end, newline):
    assert text_of(book_page(TEXT, start, end).replace("\n", newline)) == TEXT
    # from its own first line to its last
    assert text_of(f"{start}\n\n{TEXT}{end}".replace("\n", newline)) == TEXT


NO_BOOKS = [
    HEADER + TEXT,
    f"{HEADER}{START}\n{TEXT}",
    f"{TEXT}{END}\n{LICENSE}",
    f"{END}\n{TEXT}\n{START}\n",
    f"{START}\n \n{END}\n{LICENSE}",
    f"{HEADER}{START}\n{END}\n{LICENSE}",
    f"A book begins with {START}\n{TEXT} and ends with {END}\n",
    f"{book_page()}<|endoftext|>{book_page()}",  # someone has joined texts
    "*** START OF THE PROJECT\n\nEND OF PROJECT\n",
]


@pytest.mark.parametrize("text", NO_BOOKS)
def test_a_file_without_both_lines_around_a_text_is_read_as_it_is(text):
    assert text_of(text) == text.replace("\ufeff", "")
    assert not list(left_out("text.txt"))


def test_every_book_of_a_file_is_kept_and_so_is_a_text_between_them():
    others, short = "I wrote this. " * 3000 + "\n", "Go to the next book.\n"
    file = book_page("One.\n") + short + book_page("Two.\n")
    assert text_of(file) == "One.\nTwo.\n"
    assert text_of(file + HEADER + START + "\n\nThree.\n") == "One.\nTwo.\nThree.\n"
    assert text_of(file + f"{SMALL_PRINT}*END THE SMALL PRINT! *END*\n") == "One.\nTwo.\n"
    assert others in text_of(file + others) and "Two.\n" in text_of(file + others)
    assert text_of(others + file).startswith(others) and "Two.\n" in text_of(others + file)
    between = text_of(book_page("One.\n") + others + book_page("Two.\n"))
    assert between.startswith("One.\n") and others in between and between.endswith("Two.\n")
    assert text_of(f"One.\n{END}\n{file}") == "One.\nOne.\nTwo.\n"  # its start is missing


@pytest.mark.parametrize("chunk", [1, 100, 5000])
def test_the_lines_around_a_book_are_seen_wherever_a_chunk_ends(chunk, monkeypatch):
    for more in ("", "x" * 2900, "x\n" * 999):
        Path("text.txt").write_text(more + book_page(TEXT + more, STARTS[5], ENDS[3]))
        whole = books("text.txt")
        with monkeypatch.context() as patch:
            patch.setattr(gutenberg, "CHUNK", chunk)
            assert books("text.txt") == whole and len(whole) == 1


HOSTILE = ["*** START OF THE PROJECT GUTENBERG *\n", f"{START}\n\nProduced by ", "\n" + " " * 999]
HOSTILE += ["\n*END*THE SMALL PRINT", "\nEnd of Project Gutenberg", "\nEnd \n", "*** START OF \n"]


@pytest.mark.parametrize("line", HOSTILE)
def test_the_time_to_look_for_books_is_linear(line):
    Path("text.txt").write_text(line * (4_000_000 // len(line)))
    started = time.monotonic()
    books("text.txt")
    assert time.monotonic() - started < 10


def test_gutenberg_books_are_fetched_once_stored_as_they_came_and_stripped_when_read(
    serve, monkeypatch, cache
):
    page = book_page().replace("\n", "\r\n").encode()
    base, files = serve({"/cache/epub/7/pg7.txt": page, "/my.txt": page})
    monkeypatch.setenv("GUTENBERG_MIRROR", base)
    for _ in range(2):
        for source in ("gutenberg:7", f"{base}/my.txt"):
            (path,) = source_files(source)
            assert path.read_bytes() == page and "".join(pieces(path)) == TEXT
        files.clear()
    with pytest.raises(InputError, match="404"):
        source_files("gutenberg:8")


@pytest.mark.parametrize("page", NO_BOOKS)
def test_a_gutenberg_answer_that_is_no_book_is_refused_and_not_kept(
    page, serve, monkeypatch, cache
):
    base, _ = serve({"/cache/epub/7/pg7.txt": page.encode()})
    monkeypatch.setenv("GUTENBERG_MIRROR", base)
    with pytest.raises(InputError, match="^gutenberg:7: no START or END line"):
        source_files("gutenberg:7")
    assert not list(cache.iterdir())


def test_white_space_that_tiktoken_cannot_split_is_one_line(gpt2_tokenizer, capsys):
    Path("gap.txt").write_text(TEXT + " " * 2_000_000 + TEXT)
    assert script_here("prepare_data.py", "gap.txt", "--tokenizer", "gpt2:300") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gap.txt: tiktoken cannot split") and error.count("\n") == 1


def test_what_is_left_out_of_books_is_said_once_per_source(capsys):
    os.mkdir("shelf")
    n = len(book_page().encode()) - len(TEXT.encode())
    for name in ("book.txt", "shelf/1.txt", "shelf/2.txt"):
        Path(name).write_text(book_page())
    Path("shelf/mine.txt").write_text(TEXT)
    words = flags(tokenizer="bytes", partition="sentence", data="out")
    for _ in range(2):
        assert script_here("prepare_data.py", "book.txt", "shelf", *words) == 0
    assert capsys.readouterr().err == (
        f"book.txt: left out {n:,} bytes, the header and license of Project Gutenberg\n"
        f"shelf: left out {2 * n:,} bytes of 2 files, the headers and licenses of Project "
        "Gutenberg\n"
    )
    tokens = json.loads(Path("out/meta.json").read_text())["splits"]
    n_separators = 3 * len("<|endoftext|>")
    assert sum(s["bytes"] for s in tokens.values()) == 4 * len(TEXT.encode()) + n_separators
