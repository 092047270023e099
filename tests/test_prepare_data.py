"""From a text to tokens and blocks: nothing lost, nothing seen ahead, nothing left behind after a mistake."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_data
from locality import InputError, Partitioner, partition
from prepare_data import encode, get_encoding, pieces, prepare, read_meta, read_split, token_bytes

PARTITIONS = ["semantic", "sentence", "window:20", "block:20"]
TEXT = (Path(__file__).parent.parent / "data" / "sample.txt").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "CACHE", tmp_path / "cache")


def write(name, content):
    with open(name, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return name


@pytest.mark.parametrize("method", PARTITIONS)
def test_splits_hold_the_whole_text_in_order_and_its_blocks(method):
    write("book.txt", TEXT)
    folder = prepare("book.txt", tokenizer="bytes", method=method, max_lookback=100)
    meta, vocabulary = read_meta(folder), token_bytes(get_encoding("bytes"))
    content = b""
    for split in ("train", "val", "test"):
        tokens, lookback = read_split(folder, split)
        content += bytes(tokens.astype(np.uint8))
        assert meta["splits"][split]["tokens"] == len(tokens) == meta["splits"][split]["bytes"]
        assert np.array_equal(lookback, partition(tokens, vocabulary, method, 100, meta["background"]))
    assert content == TEXT.encode()
    assert meta["splits"]["train"]["tokens"] == pytest.approx(0.8 * len(content), abs=2)


def test_a_prepared_folder_is_made_again_only_when_something_changed():
    write("book.txt", TEXT)
    folder = prepare("book.txt", "out", "bytes", max_lookback=64)
    made = (folder / "train.bin").stat().st_ino
    assert prepare("book.txt", "out", "bytes", max_lookback=64) == folder
    assert (folder / "train.bin").stat().st_ino == made
    prepare("book.txt", "out", "bytes", max_lookback=65)
    assert read_meta(folder)["max_lookback"] == 65
    write("book.txt", TEXT + "One more sentence.")
    prepare("book.txt", "out", "bytes", max_lookback=65)
    assert read_split(folder, "test")[0][-1] == ord(".")
    write("out/train.bin", b"half")    # damaged
    prepare("book.txt", "out", "bytes", max_lookback=65)
    assert len(read_split(folder, "train")[0]) == read_meta(folder)["splits"]["train"]["tokens"]
    assert {p.name for p in folder.iterdir()} == {"meta.json", *(f"{s}{e}" for s in ("train", "val", "test")
                                                               for e in (".bin", ".lookback.bin"))}


def test_where_a_block_slides_at_the_cap_no_new_one_is_counted():
    write("book.txt", ("Here " + "are words " * 8 + "and then some. ") * 50)    # sentences of 100 bytes
    folder = prepare("book.txt", "out", "bytes", "sentence", max_lookback=20)
    for split, blocks in (("train", 40), ("val", 5), ("test", 5)):
        counts = read_meta(folder)["splits"][split]
        assert counts["blocks"] == blocks and counts["block_length_quartiles"] == [100, 100, 100]


def test_a_folder_of_someone_elses_is_left_alone(tmp_path):
    write("book.txt", TEXT)
    os.mkdir("mine")
    write("mine/diary.txt", "Dear diary.")
    write("mine/train.bin", "not tokens")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with pytest.raises(InputError, match="diary.txt"):
        prepare("book.txt", "mine", "bytes")
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def words_encoding():
    """A small BPE-like encoding of whole words, standing in for gpt2's, which would have to be downloaded."""
    words = sorted({" " + w for w in TEXT.split() if w.isalpha()})
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:    # every prefix is a token, so that merging letter by letter reaches the word
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
    return tiktoken.Encoding("words", pat_str=r" ?[A-Za-z]+|\s+(?!\S)|\s|[^\sA-Za-z]+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


@pytest.mark.parametrize("piece", [7, 50, 5000])
def test_encoding_piece_by_piece_equals_encoding_the_whole(piece, monkeypatch):
    encoding, rng = words_encoding(), random.Random(piece)
    text = "".join(rng.choice(["a", "mind ", " \n", "\n\n", "  ", "é", "don't ", "語", "<|endoftext|>", " the soup"])
                   for _ in range(2000)) + TEXT[:3000]
    write("text.txt", text)
    monkeypatch.setattr(prepare_data, "PIECE", piece)
    assert "".join(pieces("text.txt")) == text
    encode([Path("text.txt")], encoding, "tokens.bin")
    assert np.fromfile("tokens.bin", np.uint16).tolist() == encoding.encode(text, allowed_special="all")


def test_several_sources_are_joined_with_an_end_of_text():
    os.mkdir("texts")
    write("texts/b.txt", "Second. " * 20)
    write("texts/a.txt", "First. " * 20)
    folder = prepare(["texts", "texts/a.txt"], "out", "bytes", "sentence")
    content = b"".join(bytes(read_split(folder, s)[0].astype(np.uint8)) for s in ("train", "val", "test")).decode()
    assert content == "First. " * 20 + "<|endoftext|>" + "Second. " * 20 + "<|endoftext|>" + "First. " * 20


def test_crlf_and_byte_order_mark_are_read_as_plain_text():
    write("dos.txt", b"\xef\xbb\xbf" + b"One line.\r\nAnother line.\r\n" * 20)
    assert "".join(pieces("dos.txt")) == "One line.\nAnother line.\n" * 20


def test_gutenberg_and_addresses_are_fetched_once_and_stripped(serve, monkeypatch):
    page = ("The Project Gutenberg eBook of Nothing\n\nLicence.\n*** START OF THE PROJECT GUTENBERG EBOOK NOTHING ***\n\n"
            + TEXT[:5000] + "\n*** END OF THE PROJECT GUTENBERG EBOOK NOTHING ***\nMore licence.\n")
    base, files = serve({"/cache/epub/7/pg7.txt": page.replace("\n", "\r\n").encode(), "/my.txt": TEXT.encode()})
    monkeypatch.setenv("GUTENBERG_MIRROR", base)
    for source, content in (("gutenberg:7", TEXT[:5000].strip() + "\n"), (f"{base}/my.txt", TEXT)):
        folder = prepare(source, tokenizer="bytes", method="sentence")
        read = b"".join(bytes(read_split(folder, s)[0].astype(np.uint8)) for s in ("train", "val", "test"))
        assert read.decode() == content
    files.clear()
    prepare("gutenberg:7", "again", "bytes", "sentence")
    with pytest.raises(InputError, match="404"):
        prepare("gutenberg:8", tokenizer="bytes")


def test_a_page_that_is_no_book_is_refused_and_not_cached(serve, monkeypatch, tmp_path):
    start = "*** START OF THE PROJECT GUTENBERG EBOOK NOTHING ***\n"
    base, _ = serve({"/cache/epub/7/pg7.txt": (start + TEXT[:5000]).encode(),
                     "/cache/epub/8/pg8.txt": (TEXT[:5000] + start.replace("START", "END")).encode(),
                     "/page": b"\n<!DOCTYPE html>\n<p>" + TEXT[:5000].encode(), "/nothing": b" \n",
                     "/old": b"<HTML>" + TEXT[:5000].encode()})
    monkeypatch.setenv("GUTENBERG_MIRROR", base)
    for source, says in (("gutenberg:7", "half a download"), ("gutenberg:8", "not a book"),
                         (f"{base}/page", "web page"), (f"{base}/old", "web page"), (f"{base}/nothing", "nothing")):
        with pytest.raises(InputError, match=says):
            prepare(source, "out", "bytes", "sentence")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content, says", [
    (None, "no such file"), (b"", "empty"), (b"Hi.", "too short"), (b"\x89PNG\r\n\x1a\n\0\0\0", "binary|UTF-8"),
    (b"a\0b" * 100, "binary"), ("Caf\u00e9. ".encode("latin1") * 100, "UTF-8")])
def test_a_bad_source_is_refused_and_leaves_nothing(content, says, tmp_path):
    if content is not None:
        write("bad.txt", content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says):
        prepare("bad.txt", "out", "bytes")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_parameters_are_refused():
    write("book.txt", TEXT)
    for wrong in ({"method": "paragraph"}, {"method": "window:0"}, {"max_lookback": 0}, {"max_lookback": 70000},
                  {"method": "window:66", "max_lookback": 64}, {"method": "block:66", "max_lookback": 64},
                  {"val": 0}, {"val": 0.6, "test": 0.5}, {"tokenizer": "gpt5"}):
        with pytest.raises(InputError):
            prepare("book.txt", "out", **{"tokenizer": "bytes", **wrong})
    for fits in ("window:65", "block:65"):
        prepare("book.txt", fits.replace(":", ""), "bytes", fits, max_lookback=64)
    with pytest.raises(InputError, match="gutenberg:2529"):
        prepare("gutenberg:russell", "out", "bytes")


def test_gpt2_tokenizer_where_it_is_at_hand():
    try:
        encoding = get_encoding("gpt2")
    except InputError:
        pytest.skip("the gpt2 tokenizer is not cached on this machine")
    vocabulary = token_bytes(encoding)
    tokens = np.array(encoding.encode_ordinary(TEXT[:20000]))
    assert b"".join(vocabulary[t] for t in tokens).decode() == TEXT[:20000]
    small = get_encoding("gpt2:1000")    # its first tokens, which spell the same text
    fewer = small.encode("a b<|endoftext|>" + TEXT[:20000], allowed_special="all")
    assert max(fewer) == 999 == small.eot_token and fewer[2] == 999 and small.decode(fewer[3:]) == TEXT[:20000]
    assert token_bytes(small)[:999] == vocabulary[:999] and len(fewer) > len(tokens)
    stream = Partitioner(vocabulary, "semantic", 128)
    assert np.array_equal(partition(tokens, vocabulary, "semantic", 128),
                          np.concatenate([stream.push(tokens[i:i + 7]) for i in range(0, len(tokens), 7)]))


def test_what_a_killed_preparation_left_goes_and_a_living_one_stays():
    write("book.txt", TEXT)
    code = """if True:
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        import prepare_data
        prepare_data.statistics = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        prepare_data.prepare("book.txt", "out", "bytes")"""
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", code, root], capture_output=True)
    left, = os.listdir("out")
    assert killed.returncode == -signal.SIGKILL and left.startswith(".preparing-")
    living = f".preparing-{os.getppid()}"
    os.mkdir(f"out/{living}")
    prepare("book.txt", "out", "bytes")
    assert {name for name in os.listdir("out") if name.startswith(".")} == {living}
    assert read_meta("out")["splits"]["train"]["tokens"] == len(read_split("out", "train")[0])


def test_a_failure_takes_nothing_with_it_that_others_have_written(monkeypatch):
    write("book.txt", "Hi.")
    monkeypatch.setattr(prepare_data, "encode", lambda *args: (encode(*args), os.mkdir("data/other")))
    with pytest.raises(InputError, match="too short"):
        prepare("book.txt", "data/mine", "bytes")
    assert os.listdir("data") == ["other"]


def test_a_full_disk_is_one_line_and_leaves_nothing():
    write("book.txt", TEXT)
    script = Path(__file__).parent.parent / "prepare_data.py"
    done = subprocess.run([sys.executable, script, "book.txt", "--tokenizer", "bytes", "--out", "out"], text=True,
                          capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out: could not be written (") and not os.path.exists("out")


def test_every_file_is_held_to_its_sha256():
    write("book.txt", TEXT)
    folder = prepare("book.txt", "out", "bytes", "sentence", 64)
    assert set(read_meta(folder)["files"]) == {f"{s}{e}.bin" for s in ("train", "val", "test") for e in ("", ".lookback")}
    for name in read_meta(folder)["files"]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(InputError, match=f"{name} is not what was prepared.*delete the folder"):
            read_split(folder, name.split(".")[0])
        (folder / name).write_bytes(content)
        read_split(folder, name.split(".")[0])
    meta = read_meta(folder)
    write("out/meta.json", json.dumps({**meta, "tokenizer": "gpt2"}))
    with pytest.raises(InputError, match="edited"):
        read_meta(folder)


def test_a_folder_made_of_something_else_is_made_again_and_says_why(capsys):
    write("book.txt", TEXT)
    prepare("book.txt", "out", "bytes", "sentence", 64)
    assert "again" not in capsys.readouterr().out
    for parameters, says in ((("bytes", "sentence", 32), "another max_lookback"),
                             (("bytes", "block:9", 32), "another partition")):
        prepare("book.txt", "out", *parameters)
        assert f"out is made again: it was made with {says}\n" in capsys.readouterr().out
    os.truncate("out/val.bin", 10)
    prepare("book.txt", "out", "bytes", "block:9", 32)
    assert "another length" in capsys.readouterr().out
