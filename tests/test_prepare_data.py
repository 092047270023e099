"""From a text to tokens and blocks: nothing lost, nothing seen ahead.

Nothing is left behind after a mistake.
"""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import eval
import locality
import prepare_data
from conftest import ROOT, flags, script_here
from forks import started
from locality import Partitioner, partition
from prepare_data import encode, get_encoding, prepare, read_meta, read_split, token_bytes
from support import sentences, sources
from support.files import InputError
from support.sources import pieces

PARTITIONS = ["semantic", "semantic:closed", "sentence", "window:20", "block:20", "shifted:200"]
TEXT = (ROOT / "data" / "sample.txt").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")


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
        assert np.array_equal(
            lookback, partition(tokens, vocabulary, method, 100, meta["background"])
        )
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
    write("out/train.bin", b"half")  # damaged
    prepare("book.txt", "out", "bytes", max_lookback=65)
    assert len(read_split(folder, "train")[0]) == read_meta(folder)["splits"]["train"]["tokens"]
    assert {p.name for p in folder.iterdir()} == {
        "meta.json",
        *(f"{s}{e}" for s in ("train", "val", "test") for e in (".bin", ".lookback.bin")),
    }


CODE = {
    "a constant": (locality, "SURE = 0.6", "SURE = 0.7"),
    "a line of the partitioner": (locality, "if block > self.topic and sure:", "if sure:"),
    "a pattern": (sentences, r"\d{1,3}[.)]", r"\d{1,2}[.)]"),
    "a word list": (sentences, "furthermore instead", "furthermore"),
}
NO_CODE = {
    "another schedule": (locality, '    "quintic": 5,\n', '    "quintic": 5,\n    "sextic": 6,\n'),
    "what a schedule does": (locality, "return [0.0] * n_layer", "return [0.1] * n_layer"),
    "a comment": (locality, "# a single layer is the last layer", "# one layer"),
    "a docstring": (locality, '"""A new document: forget everything."""', '"""Forget."""'),
    "a module's docstring": (sentences, '"""Where a sentence ends', '"""How a sentence ends'),
    "a format": (locality, "CHUNK = 1 << 16  #", "CHUNK = (\n    1 << 16\n)\n\n\n#"),
}


@pytest.mark.parametrize("name", [*CODE, *NO_CODE])
def test_data_is_made_again_when_the_code_of_blocks_has_changed_and_only_then(
    name, tmp_path, monkeypatch, capsys
):
    write("book.txt", TEXT[:9000])
    how = "book.txt", "out", "bytes", "semantic", 64
    made = (prepare(*how) / "train.bin").stat().st_ino
    module, before, after = {**CODE, **NO_CODE}[name]
    code = Path(module.__file__).read_text(encoding="utf-8")
    assert code.count(before) == 1
    write("edited.py", code.replace(before, after))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "edited.py"))
    again = (prepare(*how) / "train.bin").stat().st_ino
    printed = capsys.readouterr().out
    if name in CODE:
        assert (
            again != made
            and "again: it was made with another version of the code that decides blocks\n"
            in printed
        )
    else:
        assert again == made and not printed


def test_where_a_block_slides_at_the_cap_no_new_one_is_counted():
    # documents of 100 bytes
    write("book.txt", ("Here " + "are words " * 8 + "so<|endoftext|>") * 50)
    folder = prepare("book.txt", "out", "bytes", "document", max_lookback=20)
    for split, blocks in (("train", 40), ("val", 5), ("test", 5)):
        counts = read_meta(folder)["splits"][split]
        assert counts["blocks"] == blocks and counts["block_length_quartiles"] == [100, 100, 100]


def test_blocks_of_one_token_are_counted():
    write("book.txt", TEXT[:1000])
    counts = read_meta(prepare("book.txt", "out", "bytes", "block:1"))["splits"]["train"]
    assert counts["blocks"] == counts["tokens"] == 800
    assert counts["block_length_quartiles"] == [1, 1, 1] and counts["mean_lookback"] == 0


def test_a_text_that_is_one_document_is_said_to_be(capsys):
    for text, said in ((TEXT[:2000], True), (f"{TEXT[:600]}<|endoftext|>{TEXT[600:2000]}", False)):
        write("book.txt", text)
        assert (
            script_here(
                "prepare_data.py", "book.txt", *"--tokenizer bytes --partition document".split()
            )
            == 0
        )
        assert ("it is one document" in capsys.readouterr().out) == said


@pytest.fixture
def bytes_and_end_of_text(monkeypatch):
    """The 256 bytes and <|endoftext|>, in the place of a tokenizer that would be downloaded."""
    tokens = [bytes([i]) for i in range(256)]
    encoding = prepare_data.encoding_of("b", "(?s:.)", tokens, {"<|endoftext|>": 256})
    for module in (prepare_data, eval):
        monkeypatch.setattr(module, "get_encoding", lambda name: encoding)
    return "gpt2:257"


def test_documents_that_are_joined_show_no_seam_and_are_known_to_the_oracle_alone(
    bytes_and_end_of_text,
):
    texts = TEXT[:4000], TEXT[4000:9000], TEXT[9000:12000]
    write("book.txt", "<|endoftext|>".join(texts))
    write("seamless.txt", "\n".join(texts))
    how = {"tokenizer": bytes_and_end_of_text, "max_lookback": 6000}
    for method in ("document", "semantic", "sentence", "window:99"):
        folder = prepare("book.txt", f"{method[:4]}-1", method=method, joined=True, **how)
        seamless = prepare("seamless.txt", f"{method[:4]}-2", method=method, **how)
        for split in ("train", "val", "test"):
            tokens, lookback = read_split(folder, split)
            same, other = read_split(seamless, split)
            assert np.array_equal(tokens, same)
            assert np.array_equal(lookback, other) == (method != "document" or split != "train")
    folder = prepare("book.txt", "docu-1", method="document", joined=True, **how)
    tokens, lookback = read_split(folder, "train")
    assert np.unique(np.arange(len(tokens)) - lookback).tolist() == [0, 4001, 9002]
    # and the oracle is not asked about a text that has no seams any more
    config = {**how, "source": "book.txt", "data": "semaj", "val": 0.1, "test": 0.1}
    config |= {"joined": True, "partition": "semantic"}
    eval.read_text(config, "train", "sentence")
    with pytest.raises(InputError, match="is joined"):
        eval.read_text(config, "train", "document")
    # documents that are not joined stay apart for all
    tokens, _ = read_split(prepare("book.txt", "apart", method="sentence", **how), "train")
    assert (tokens == 256).sum() == 2


def test_joined_needs_a_token_that_ends_a_document():
    write("book.txt", TEXT)
    with pytest.raises(InputError, match="joined needs a tokenizer"):
        prepare("book.txt", tokenizer="bytes", joined=True)
    assert not list(Path("data").glob("*/meta.json"))


def test_joined_text_has_a_folder_of_its_own():
    how = "book.txt", "gpt2:300", "semantic", 100, 0.1, 0.1
    assert prepare_data.default_folder(*how, True) != prepare_data.default_folder(*how)


def test_blocks_that_are_shifted_by_most_of_a_split_are_refused():
    write("book.txt", TEXT)
    prepare("book.txt", "out", "bytes", "shifted:1500")
    with pytest.raises(InputError, match="shifted:2000"):
        prepare("book.txt", "out", "bytes", "shifted:2000")


def test_the_cap_says_how_much_it_decides(capsys, monkeypatch):
    """A start is forced where the block before had come to the cap."""
    write("book.txt", TEXT)
    vocabulary, shares = token_bytes(get_encoding("bytes")), []
    for cap in (300, 500, 900, 4000):
        folder = prepare("book.txt", f"cap{cap}", "bytes", "semantic", cap)
        meta = read_meta(folder)
        tokens, _ = read_split(folder, "train")
        partitioner = Partitioner(vocabulary, "semantic", cap, meta["background"])
        partitioner.push(tokens)
        bits = [bits for _, _, bits in partitioner.moves[1:]]
        train = meta["splits"]["train"]
        assert train["forced"] == pytest.approx(bits.count(None) / len(bits), abs=0.002)
        lags = [token - block for token, block, _ in partitioner.moves[1:]]
        assert train["lag"] == np.median(lags)
        shares.append(train["forced"])
        capsys.readouterr()
        prepare_data.describe(folder, meta, *read_split(folder, "train"))
        told = capsys.readouterr().out
        assert f"{100 * train['forced']:.0f} % of the starts were forced" in told
        assert ("raise it above" in told) == (train["forced"] > 0.2)
    assert shares[0] > 0.5 and shares[-1] == 0 and shares == sorted(shares, reverse=True)
    assert (
        "forced" not in read_meta(prepare("book.txt", "d", "bytes", "document"))["splits"]["train"]
    )
    monkeypatch.setattr(prepare_data, "MOST_FORCED", train["forced"])
    prepare_data.describe(folder, meta, *read_split(folder, "train"))
    assert "raise it above" not in capsys.readouterr().out  # not above the limit


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
    """A small BPE-like encoding of whole words. It stands in for gpt2's, a download."""
    words = sorted({" " + w for w in TEXT.split() if w.isalpha()})
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:  # every prefix is a token, so that merging letter by letter reaches the word
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
    return tiktoken.Encoding(
        "words",
        pat_str=r" ?[A-Za-z]+|\s+(?!\S)|\s|[^\sA-Za-z]+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )


@pytest.mark.parametrize("piece", [7, 50, 5000])
def test_encoding_piece_by_piece_equals_encoding_the_whole(piece, monkeypatch):
    encoding, rng = words_encoding(), random.Random(piece)
    text = (
        "".join(
            rng.choice(
                [
                    "a",
                    "mind ",
                    " \n",
                    "\n\n",
                    "  ",
                    "é",
                    "don't ",
                    "語",
                    "<|endoftext|>",
                    " the soup",
                ]
            )
            for _ in range(2000)
        )
        + TEXT[:3000]
    )
    write("text.txt", text)
    monkeypatch.setattr(sources, "PIECE", piece)
    assert "".join(pieces("text.txt")) == text
    encode([Path("text.txt")], encoding, "tokens.bin")
    assert np.fromfile("tokens.bin", np.uint16).tolist() == encoding.encode(
        text, allowed_special="all"
    )


def test_several_sources_are_joined_with_an_end_of_text():
    os.mkdir("texts")
    write("texts/b.txt", "Second. " * 20)
    write("texts/a.txt", "First. " * 20)
    folder = prepare(["texts", "texts/a.txt"], "out", "bytes", "sentence")
    content = b"".join(
        bytes(read_split(folder, s)[0].astype(np.uint8)) for s in ("train", "val", "test")
    ).decode()
    assert (
        content
        == "First. " * 20 + "<|endoftext|>" + "Second. " * 20 + "<|endoftext|>" + "First. " * 20
    )


def test_crlf_and_byte_order_mark_are_read_as_plain_text():
    write("dos.txt", b"\xef\xbb\xbf" + b"One line.\r\nAnother line.\r\n" * 20)
    assert "".join(pieces("dos.txt")) == "One line.\nAnother line.\n" * 20


def test_gutenberg_and_addresses_are_fetched_once_and_stripped(serve, monkeypatch):
    start, end = (
        f"*** {word} OF THE PROJECT GUTENBERG EBOOK NOTHING ***" for word in ("START", "END")
    )
    page = f"The Project Gutenberg eBook of Nothing\n\nLicence.\n{start}\n\n"
    page += f"{TEXT[:5000]}\n{end}\nMore licence.\n"
    base, files = serve(
        {"/cache/epub/7/pg7.txt": page.replace("\n", "\r\n").encode(), "/my.txt": TEXT.encode()}
    )
    monkeypatch.setenv("GUTENBERG_MIRROR", base)
    for source, content in (("gutenberg:7", TEXT[:5000].strip() + "\n"), (f"{base}/my.txt", TEXT)):
        folder = prepare(source, tokenizer="bytes", method="sentence")
        read = b"".join(
            bytes(read_split(folder, s)[0].astype(np.uint8)) for s in ("train", "val", "test")
        )
        assert read.decode() == content
    files.clear()
    prepare("gutenberg:7", "again", "bytes", "sentence")
    with pytest.raises(InputError, match="404"):
        prepare("gutenberg:8", tokenizer="bytes")


def test_a_page_that_is_no_book_is_refused_and_not_cached(serve, monkeypatch, tmp_path):
    start = "*** START OF THE PROJECT GUTENBERG EBOOK NOTHING ***\n"
    base, _ = serve(
        {
            "/cache/epub/7/pg7.txt": (start + TEXT[:5000]).encode(),
            "/cache/epub/8/pg8.txt": (TEXT[:5000] + start.replace("START", "END")).encode(),
            "/page": b"\n<!DOCTYPE html>\n<p>" + TEXT[:5000].encode(),
            "/nothing": b" \n",
            "/old": b"<HTML>" + TEXT[:5000].encode(),
        }
    )
    monkeypatch.setenv("GUTENBERG_MIRROR", base)
    for source, says in (
        ("gutenberg:7", "half a download"),
        ("gutenberg:8", "not a book"),
        (f"{base}/page", "web page"),
        (f"{base}/old", "web page"),
        (f"{base}/nothing", "nothing"),
    ):
        with pytest.raises(InputError, match=says):
            prepare(source, "out", "bytes", "sentence")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"Hi.", "too short"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "binary|UTF-8"),
        (b"a\0b" * 100, "binary"),
        ("Caf\u00e9. ".encode("latin1") * 100, "UTF-8.*iconv -f latin1"),
        ("Caf\u00e9. ".encode("utf-16") * 100, "UTF-8.*iconv -f utf-16"),
        ("Caf\u00e9. ".encode("utf-32") * 100, "UTF-8.*iconv -f utf-32"),
        ("Cafe. ".encode("utf-16-le") * 100, "UTF-16"),
    ],
)
def test_a_bad_source_is_refused_and_leaves_nothing(content, says, tmp_path):
    if content is not None:
        write("bad.txt", content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says):
        prepare("bad.txt", "out", "bytes")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_parameters_are_refused():
    write("book.txt", TEXT)
    for wrong in (
        {"method": "paragraph"},
        {"method": "window:0"},
        {"max_lookback": 0},
        {"max_lookback": 70000},
        {"method": "window:66", "max_lookback": 64},
        {"method": "block:66", "max_lookback": 64},
        {"val": 0},
        {"val": 0.6, "test": 0.5},
        {"tokenizer": "gpt5"},
    ):
        with pytest.raises(InputError):
            prepare("book.txt", "out", **{"tokenizer": "bytes", **wrong})
    for fits in ("window:65", "block:65"):
        prepare("book.txt", fits.replace(":", ""), "bytes", fits, max_lookback=64)
    with pytest.raises(InputError, match="gutenberg:2529"):
        prepare("gutenberg:russell", "out", "bytes")


def test_the_gpt2_tokenizer_and_its_first_tokens(gpt2_tokenizer):
    encoding = gpt2_tokenizer
    vocabulary = token_bytes(encoding)
    tokens = np.array(encoding.encode_ordinary(TEXT[:20000]))
    assert b"".join(vocabulary[t] for t in tokens).decode() == TEXT[:20000]
    small = get_encoding("gpt2:1000")  # its first tokens, which spell the same text
    fewer = small.encode("a b<|endoftext|>" + TEXT[:20000], allowed_special="all")
    assert max(fewer) == 999 == small.eot_token
    assert fewer[2] == 999
    assert small.decode(fewer[3:]) == TEXT[:20000]
    assert token_bytes(small)[:999] == vocabulary[:999] and len(fewer) > len(tokens)
    stream = Partitioner(vocabulary, "semantic", 128)
    assert np.array_equal(
        partition(tokens, vocabulary, "semantic", 128),
        np.concatenate([stream.push(tokens[i : i + 7]) for i in range(0, len(tokens), 7)]),
    )


def test_what_a_killed_preparation_left_goes_and_a_living_one_stays():
    write("book.txt", TEXT)
    Path("dies.py").write_text("""if True:
        import os, signal, prepare_data
        prepare_data.statistics = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        prepare_data.prepare("book.txt", "out", "bytes")""")
    with started(Path("dies.py").absolute(), cwd=".") as process:
        process.join(60)
    (left,) = os.listdir("out")
    assert process.exitcode == -signal.SIGKILL and left.startswith(".preparing-")
    living = f".preparing-{os.getppid()}"
    os.mkdir(f"out/{living}")
    os.mkdir(f"out/.preparing-{os.getpid()}")  # of a container before this one
    prepare("book.txt", "out", "bytes")
    assert {name for name in os.listdir("out") if name.startswith(".")} == {living}
    assert read_meta("out")["splits"]["train"]["tokens"] == len(read_split("out", "train")[0])


def test_processes_that_prepare_the_same_data_at_the_same_moment_all_succeed():
    write("book.txt", TEXT)
    Path("prepares.py").write_text("""if True:
        import os, time, prepare_data
        from pathlib import Path
        encode = prepare_data.encode
        def encode_while_others_wait(*args):
            while n == 0 and not any("waiting" in p.read_text() for p in Path().glob("told*")):
                time.sleep(0.001)
            encode(*args)
        prepare_data.encode = encode_while_others_wait
        os.close(os.open(f"ready{os.getpid()}", os.O_CREAT))
        while not os.path.exists("go"):
            time.sleep(0.001)
        for n in range(8):
            folder = prepare_data.prepare("book.txt", f"out{n}", "bytes", "block:9")
            prepare_data.read_meta(folder)
            for split in ("train", "val", "test"):
                prepare_data.read_split(folder, split)
        print("whole")""")
    with contextlib.ExitStack() as stack:
        names = [f"told{i}.txt" for i in range(3)]
        script = Path("prepares.py").absolute()
        processes = [stack.enter_context(started(script, cwd=".", output=n)) for n in names]
        while len(list(Path().glob("ready*"))) < 3:
            time.sleep(0.01)
        write("go", "")
        for process in processes:
            process.join(60)
    told = [Path(name).read_text() for name in names]
    assert all(text.endswith("whole\n") for text in told), told
    assert not any("made again" in text for text in told)
    assert any("waiting for another process" in text for text in told)
    assert len(os.listdir("out7")) == 7


def test_what_is_prepared_outlives_its_text(capsys):
    write("book.txt", TEXT)
    folder = prepare("book.txt", "out", "bytes", "block:9")
    os.rename("book.txt", "moved.txt")
    capsys.readouterr()
    assert prepare("book.txt", "out", "bytes", "block:9") == folder
    assert "not compared with the text" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):  # other blocks
        prepare("book.txt", "out", "bytes", "block:8")
    os.truncate("out/val.bin", 10)
    with pytest.raises(InputError, match="no such file"):
        prepare("book.txt", "out", "bytes", "block:9")


def test_what_a_folder_has_besides_its_texts_is_named(capsys):
    Path("book/part").mkdir(parents=True)
    write("book/a.txt", "One. ")
    write("book/part/UP.TXT", "Two. " * 40)
    assert [path.name for path in sources.source_files("book")] == ["a.txt", "UP.TXT"]
    prepare("book", "out", "bytes", "block:9")
    assert capsys.readouterr().err == ""
    write("book/notes.md", "x")
    os.mkfifo("book/pipe.txt")
    os.symlink("nowhere", "book/part/gone.txt")
    Path("book/.git").mkdir()
    for hidden in (".hidden.txt", ".git/HEAD", ".git/notes.txt"):
        write(f"book/{hidden}", "x")
    prepare("book", "out2", "bytes", "block:9")
    assert [path.name for path in sources.source_files("book")] == ["a.txt", "UP.TXT"]
    names = "notes.md, part/gone.txt, pipe.txt"
    assert capsys.readouterr().err == f"book: skipped {names}\n"


def test_a_failure_takes_nothing_with_it_that_others_have_written(monkeypatch):
    write("book.txt", "Hi.")
    monkeypatch.setattr(
        prepare_data, "encode", lambda *args: (encode(*args), os.mkdir("data/other"))
    )
    with pytest.raises(InputError, match="too short"):
        prepare("book.txt", "data/mine", "bytes")
    assert os.listdir("data") == ["other"]


def test_a_full_disk_is_one_line_and_leaves_nothing(file_size, capsys):
    write("book.txt", TEXT)
    file_size(20000)
    status = script_here("prepare_data.py", "book.txt", *flags(tokenizer="bytes", out="out"))
    file_size(None)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: out: could not be written (")
    assert not os.path.exists("out")


def test_every_file_is_held_to_its_sha256():
    write("book.txt", TEXT)
    folder = prepare("book.txt", "out", "bytes", "sentence", 64)
    assert set(read_meta(folder)["files"]) == {
        f"{s}{e}.bin" for s in ("train", "val", "test") for e in ("", ".lookback")
    }
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
    for parameters, says in (
        (("bytes", "sentence", 32), "another max_lookback"),
        (("bytes", "block:9", 32), "another partition"),
    ):
        prepare("book.txt", "out", *parameters)
        assert f"out is made again: it was made with {says}\n" in capsys.readouterr().out
    os.truncate("out/val.bin", 10)
    prepare("book.txt", "out", "bytes", "block:9", 32)
    assert "another length" in capsys.readouterr().out
