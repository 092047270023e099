"""From a text to tokens and blocks: nothing is lost, no block depends on later text, and a mistake
leaves nothing behind."""

import contextlib
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import eval
import locality
import prepare_data
from conftest import ROOT, flags, script_here
from fast import evidence
from forks import started
from locality import Partitioner, partition_text
from prepare_data import TextConfig, default_folder, encode, prepare
from report import blocks
from support import files, gutenberg, sentences, sources, tokenizers
from support.files import InputError
from support.prepared import SPLITS, Prepared, read_meta
from support.sources import pieces
from support.tokenizers import get_encoding, token_bytes

PARTITIONS = ["semantic", "semantic:closed", "sentence", "window:20", "block:20", "shifted:200"]
TEXT = (ROOT / "data" / "sample.txt").read_text(encoding="utf-8")
BYTES = [bytes([i]) for i in range(256)]


@pytest.fixture(autouse=True)
def folder_with_a_book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    write("book.txt", TEXT)


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def prepared(source="book.txt", data="", tokenizer="bytes", **more):
    return prepare(TextConfig(source=source, data=data, tokenizer=tokenizer, **more))


def text_of(data):
    """The whole text of a Prepared folder of bytes."""
    return b"".join(bytes(data.split(split)[0].astype(np.uint8)) for split in SPLITS).decode()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_splits_hold_the_whole_text_in_order_and_its_blocks(partition):
    data = prepared(partition=partition, max_lookback=100)
    for split in SPLITS:
        tokens, lookback = data.split(split)
        stats = data.meta["splits"][split]
        assert stats["tokens"] == len(tokens) == stats["bytes"]
        # the background words have been through JSON
        rules = partition, 100, data.meta["background"]
        assert np.array_equal(lookback, partition_text(tokens, BYTES, *rules))
    n = len(TEXT.encode())
    assert text_of(data) == TEXT
    assert data.meta["splits"]["train"]["tokens"] == pytest.approx(0.8 * n, abs=2)


# --------------------------------------------------------------------------------------------------
# when a folder is rebuilt


def test_a_folder_made_of_something_else_is_rebuilt_and_says_why(capsys):
    rules = {"data": "out", "partition": "sentence", "max_lookback": 64}
    folder = prepared(**rules).folder
    built = (folder / "train.bin").stat().st_ino
    assert prepared(**rules).folder == folder and (folder / "train.bin").stat().st_ino == built
    assert "rebuilding" not in capsys.readouterr().out
    for change in ({"max_lookback": 32}, {"partition": "block:9"}, {"plain": True}, {"val": 0.2}):
        rules |= change
        ((name, value),) = change.items()
        assert prepared(**rules).meta[name] == read_meta(folder)[name] == value
        message = f"rebuilding out: it was prepared with a different {name}\n"
        assert message in capsys.readouterr().out
    write("book.txt", TEXT + "One more sentence.")
    assert prepared(**rules).split("test")[0][-1] == ord(".")
    assert "it was prepared with a different text\n" in capsys.readouterr().out
    write("out/train.bin", b"half")
    tokens, _ = prepared(**rules).split("train")
    assert len(tokens) == read_meta(folder)["splits"]["train"]["tokens"]
    assert "rebuilding out: a file has the wrong length\n" in capsys.readouterr().out
    names = {f"{split}{end}" for split in SPLITS for end in (".bin", ".lookback.bin")}
    assert set(os.listdir(folder)) == {"meta.json", *names}


CODE = {
    "a constant": (locality, "SURE = 0.7", "SURE = 0.6"),
    "a line of the partitioner": (locality, "if block <= self.topic:", "if block < self.topic:"),
    "the choice of a twin": (locality, "kind = Evidence if plain else partial(", "kind = partial("),
    "a line of the fast twin": (evidence, "np.log1p(", "np.log2("),
    "a pattern": (sentences, "」』】）〉》", "」』】）〉"),
    "how a text is cut": (prepare_data, "n - round(n * text.test), n]", "n - 7, n]"),
    "how a text is read": (sources, 'text.replace("\\ufeff", "")', "text"),
    "the end of a book": (gutenberg, "LICENSE = 40_000", "LICENSE = 9_000"),
    "a tokenizer": (tokenizers, "[:N_CHARACTERS]", "[:9000]"),
    "a rule": (sentences, '(r"al\\.", r"[(\\[]", "Doe et al. (2004)"),', ""),
}
NO_CODE = {
    "another schedule": (locality, '    "quintic": 5,\n', '    "quintic": 5,\n    "sextic": 6,\n'),
    "what a schedule does": (locality, "return [0.0] * n_layer", "return [0.1] * n_layer"),
    "a comment": (locality, "# a single layer is the last layer", "# one layer"),
    "a comment in fast": (evidence, "# if the block had used none", "# a cost per word"),
    "a docstring": (locality, '"""The lookback of a text that arrives', '"""Of a text that comes'),
    "a module's docstring": (sentences, ", as soon as that can be known;", ";"),
    "a format": (locality, "CHUNK = 1 << 16  #", "CHUNK = (\n    1 << 16\n)\n\n\n#"),
}


@pytest.mark.parametrize("name", [*CODE, *NO_CODE])
def test_data_is_rebuilt_if_the_code_that_finds_blocks_has_changed_and_only_then(
    name, tmp_path, monkeypatch, capsys
):
    write("book.txt", TEXT[:9000])
    built = (prepared(data="out").folder / "train.bin").stat().st_ino
    module, before, after = {**CODE, **NO_CODE}[name]
    code = Path(module.__file__).read_text(encoding="utf-8")
    assert code.count(before) == 1
    write("edited.py", code.replace(before, after))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "edited.py"))
    rebuilt = (prepared(data="out").folder / "train.bin").stat().st_ino != built
    printed = capsys.readouterr().out
    assert rebuilt == (name in CODE) == bool(printed)
    assert not rebuilt or "a different version of the code that prepares it\n" in printed


def test_joined_and_plain_data_have_default_folders_of_their_own():
    changes = {}, {"joined": True}, {"plain": True}, {"joined": True, "plain": True}
    folders = {default_folder(TextConfig(tokenizer="gpt2:300", **change)) for change in changes}
    assert len(folders) == 4


def test_prepared_data_is_enough_if_the_text_is_missing(capsys):
    rules = {"data": "out", "partition": "block:9"}
    folder = prepared(**rules).folder
    os.rename("book.txt", "moved.txt")
    capsys.readouterr()
    assert prepared(**rules).folder == folder
    assert "could not be compared with the text" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        prepared(data="out", partition="block:8")
    os.truncate("out/val.bin", 10)
    with pytest.raises(InputError, match="no such file"):
        prepared(**rules)


def test_every_file_is_held_to_its_sha256():
    data = prepared(partition="sentence", max_lookback=64)
    folder, meta = data.folder, data.meta
    assert set(meta["files"]) == {f"{s}{e}.bin" for s in SPLITS for e in ("", ".lookback")}
    for name in meta["files"]:
        content, split = (folder / name).read_bytes(), name.split(".")[0]
        (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(InputError, match=f"{name} was changed.*delete the folder"):
            Prepared(folder).split(split)
        (folder / name).write_bytes(content)
        Prepared(folder).split(split)
    write(folder / "meta.json", json.dumps({**meta, "tokenizer": "gpt2"}))
    with pytest.raises(InputError, match="edited"):
        Prepared(folder)


def test_a_partition_that_looks_ahead_is_refused_and_leaves_nothing(monkeypatch, capsys):
    leaky = lambda stream, tokens, i: np.where(np.append(tokens[1:] == ord("."), False), 0, i)
    monkeypatch.setitem(locality.PARTITIONS, "leaky", locality.Partition(leaky))
    at = TEXT.encode().index(b".")
    words = flags(tokenizer="bytes", partition="leaky", data="out")
    assert script_here("prepare_data.py", "book.txt", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: leaky looks ahead") and error.count("\n") == 1
    assert f"token {at - 1} changes with token {at}" in error and not os.path.exists("out")


# --------------------------------------------------------------------------------------------------
# statistics


def test_blocks_are_counted_even_if_they_slide_or_have_one_token():
    write("book.txt", ("Here " + "are words " * 8 + "so<|endoftext|>") * 50)  # 100 bytes each
    meta = prepared(partition="document", max_lookback=20).meta
    for split, n in (("train", 40), ("val", 5), ("test", 5)):
        stats = meta["splits"][split]
        assert stats["blocks"] == n and stats["block_length_quartiles"] == [100, 100, 100]
    write("book.txt", TEXT[:1000])
    stats = prepared(partition="block:1").meta["splits"]["train"]
    assert stats["blocks"] == stats["tokens"] == 800
    assert stats["block_length_quartiles"] == [1, 1, 1] and stats["mean_lookback"] == 0


def test_a_text_of_one_document_is_described_as_such(capsys):
    texts = (TEXT[:2000], True), (f"{TEXT[:600]}<|endoftext|>{TEXT[600:2000]}", False)
    for text, is_one in texts:
        write("book.txt", text)
        words = flags(tokenizer="bytes", partition="document")
        assert script_here("prepare_data.py", "book.txt", *words) == 0
        assert ("it is one document" in capsys.readouterr().out) == is_one


def test_the_description_says_how_many_starts_max_lookback_forced(monkeypatch):
    shares = []
    for cap in (300, 500, 900, 4000):
        data = prepared(max_lookback=cap)
        train, background = data.meta["splits"]["train"], data.meta["background"]
        partitioner = Partitioner(BYTES, "semantic", cap, background)
        partitioner.push(data.split("train")[0])
        tokens, begun, bits = zip(*partitioner.moves[1:])
        assert train["forced"] == pytest.approx(bits.count(None) / len(bits), abs=0.002)
        assert train["lag"] == np.median(np.subtract(tokens, begun))
        shares.append(train["forced"])
        text = prepare_data.describe(data)
        assert f"max_lookback ({cap}) forced {100 * train['forced']:.0f}% of the starts" in text
        assert ("raise it above" in text) == (train["forced"] > 0.2)
    assert shares[0] > 0.5 and shares[-1] == 0 and shares == sorted(shares, reverse=True)
    assert "forced" not in prepared(partition="document").meta["splits"]["train"]
    monkeypatch.setattr(blocks, "MOST_FORCED", 0.0)
    assert "raise it above" not in prepare_data.describe(data)  # not above the limit


# --------------------------------------------------------------------------------------------------
# joined documents


@pytest.fixture
def bytes_and_end_of_text(monkeypatch):
    """The 256 bytes and <|endoftext|>, instead of a tokenizer that would be downloaded."""
    special = {"<|endoftext|>": 256}
    ranks = {token: i for i, token in enumerate(BYTES)}
    encoding = tiktoken.Encoding(
        "b", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens=special
    )
    for module in (prepare_data, eval):
        monkeypatch.setattr(module, "get_encoding", lambda name: encoding)
    return "gpt2:257"


def test_joined_documents_show_no_seam_and_only_the_oracle_knows_them(bytes_and_end_of_text):
    texts = TEXT[:4000], TEXT[4000:9000], TEXT[9000:12000]
    write("book.txt", "<|endoftext|>".join(texts))
    write("seamless.txt", "\n".join(texts))
    rules = {"tokenizer": bytes_and_end_of_text, "max_lookback": 6000}
    for partition in ("document", "semantic", "sentence", "window:99"):
        joined = prepared(partition=partition, joined=True, **rules)
        seamless = prepared("seamless.txt", partition=partition, **rules)
        for split in SPLITS:
            tokens, lookback = joined.split(split)
            same, other = seamless.split(split)
            assert np.array_equal(tokens, same)
            is_oracle = partition == "document" and split == "train"
            assert np.array_equal(lookback, other) != is_oracle
    tokens, lookback = prepared(partition="document", joined=True, **rules).split("train")
    assert np.unique(np.arange(len(tokens)) - lookback).tolist() == [0, 4001, 9002]
    # there is no oracle for a text that was prepared without its seams
    config = {**vars(TextConfig()), **rules, "source": "book.txt", "joined": True}
    eval.read_text(config, {}, "train", "sentence")
    with pytest.raises(InputError, match="is joined"):
        eval.read_text(config, {}, "train", "document")
    # documents that are not joined stay apart
    tokens, _ = prepared(partition="sentence", **rules).split("train")
    assert (tokens == 256).sum() == 2


def test_joined_needs_a_token_that_ends_a_document():
    with pytest.raises(InputError, match="joined needs a tokenizer"):
        prepared(joined=True)
    assert not Path("data").exists()


# --------------------------------------------------------------------------------------------------
# tokens


def words_encoding():
    """A small encoding of whole words, like a BPE, instead of gpt2, which would be downloaded."""
    words = sorted({" " + w for w in TEXT.split() if w.isalpha()})
    ranks = {token: i for i, token in enumerate(BYTES)}
    for word in words:  # every prefix is a token, so merging letter by letter reaches the word
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
    words = ["a", "mind ", " \n", "\n\n", "  ", "é", "don't ", "語", "<|endoftext|>", " the soup"]
    text = "".join(random.Random(piece).choices(words, k=2000)) + TEXT[:3000]
    write("text.txt", text)
    monkeypatch.setattr(sources, "PIECE", piece)
    assert "".join(pieces("text.txt")) == text
    encoding = words_encoding()
    encode([Path("text.txt")], encoding, "tokens.bin")
    whole = encoding.encode(text, allowed_special="all")
    assert np.fromfile("tokens.bin", np.uint16).tolist() == whole


def test_the_gpt2_tokenizer_and_its_first_tokens(gpt2_tokenizer):
    text, vocabulary = TEXT[:20000], token_bytes(gpt2_tokenizer)
    tokens = np.array(gpt2_tokenizer.encode_ordinary(text))
    assert b"".join(vocabulary[t] for t in tokens).decode() == text
    small = get_encoding("gpt2:1000")  # its first tokens, which spell the same text
    ids = small.encode("a b<|endoftext|>" + text, allowed_special="all")
    assert max(ids) == ids[2] == small.eot_token == 999
    assert small.decode(ids[3:]) == text
    assert token_bytes(small)[:999] == vocabulary[:999] and len(ids) > len(tokens)
    stream = Partitioner(vocabulary, "semantic", 128)
    streamed = [stream.push(tokens[i : i + 7]) for i in range(0, len(tokens), 7)]
    whole = partition_text(tokens, vocabulary, "semantic", 128)
    assert np.array_equal(whole, np.concatenate(streamed))


# --------------------------------------------------------------------------------------------------
# sources


def test_several_sources_are_separated_by_an_end_of_text():
    os.mkdir("texts")
    write("texts/b.txt", "Second. " * 20)
    write("texts/a.txt", "First. " * 20)
    words = flags(tokenizer="bytes", data="out", partition="sentence")
    assert script_here("prepare_data.py", "texts", "texts/a.txt", *words) == 0
    first, second = "First. " * 20, "Second. " * 20
    assert text_of(Prepared("out")) == "<|endoftext|>".join([first, second, first])


def test_what_a_folder_contains_besides_its_texts_is_named(capsys):
    Path("book/part").mkdir(parents=True)
    write("book/a.txt", "One. ")
    write("book/part/UP.TXT", "Two. " * 40)
    prepared("book", partition="block:9")
    assert capsys.readouterr().err == ""
    write("book/notes.md", "x")
    os.mkfifo("book/pipe.txt")
    os.symlink("nowhere", "book/part/gone.txt")
    os.mkdir("book/.git")
    for hidden in (".hidden.txt", ".git/HEAD", ".git/notes.txt"):
        write(f"book/{hidden}", "x")
    prepared("book", "out", partition="block:9")
    assert [path.name for path in sources.source_files("book")] == ["a.txt", "UP.TXT"]
    skipped = "book: skipped notes.md, part/gone.txt, pipe.txt\n"
    assert capsys.readouterr().err == skipped


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"Hi.", "too short"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"a text\0" * 100, "a NUL"),
        ("Caf\u00e9. ".encode("cp1252") * 100, "not UTF-8"),
    ],
)
def test_a_bad_source_is_refused_and_leaves_nothing(content, message, tmp_path):
    if content is not None:
        write("bad.txt", content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        prepared("bad.txt", "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "values, message",
    [
        ({"partition": "paragraph"}, "partition must be"),
        ({"partition": "window:0"}, "partition must be"),
        ({"partition": "window:66", "max_lookback": 64}, "window:65"),
        ({"partition": "block:66", "max_lookback": 64}, "block:65"),
        ({"partition": "shifted:2000"}, "shifted:2000"),  # more than a quarter of a split
        ({"max_lookback": 0}, "max_lookback"),
        ({"max_lookback": 70000}, "max_lookback"),
        ({"val": 0}, "val and test"),
        ({"val": 0.6, "test": 0.5}, "val and test"),
        ({"tokenizer": "gpt5"}, "tokenizer must be"),
        ({"source": "gutenberg:russell"}, "gutenberg:2529"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        prepared(**{"data": "out", **values})
    assert not Path("out").exists()


def test_partitions_that_just_fit_are_accepted():
    for partition in ("window:65", "block:65", "shifted:1500"):
        prepared(partition=partition, max_lookback=64)


# --------------------------------------------------------------------------------------------------
# failures, and other processes


def test_a_folder_with_other_files_is_left_unchanged(tmp_path):
    os.mkdir("mine")
    write("mine/diary.txt", "Dear diary.")
    write("mine/train.bin", "not tokens")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with pytest.raises(InputError, match="diary.txt"):
        prepared(data="mine")
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


@pytest.mark.parametrize("meta", [None, "{}", '{"vocab_size": 65}'])
def test_train_bin_of_another_tool_is_not_overwritten(meta):
    content = {"train.bin": "theirs", "val.bin": "theirs"} | ({"meta.json": meta} if meta else {})
    os.mkdir("mine")
    for name, text in content.items():
        write(f"mine/{name}", text)
    with pytest.raises(InputError, match="not prepared here"):
        prepared(data="mine")
    assert {name: Path("mine", name).read_text() for name in os.listdir("mine")} == content
    prepared(data="ours")
    for name in ("meta.json", "test.bin", "train.bin"):  # a folder of ours that lacks a file
        os.unlink(f"ours/{name}")
        assert text_of(prepared(data="ours")) == TEXT


def test_what_was_checked_is_what_is_read(monkeypatch):
    """Even if the folder is prepared anew from another text between the two."""
    data, before, digest, opened = prepared(data="out"), read_meta("out"), files.digest, []

    def digest_and_replace(paths):
        result = digest(paths)
        opened.extend(f for f in paths if hasattr(f, "read"))
        if len(opened) == 2:  # the tokens and the lookback
            monkeypatch.setattr(files, "digest", digest)
            write("book.txt", TEXT[::-1])
            prepared(data="out")
        return result

    monkeypatch.setattr(files, "digest", digest_and_replace)
    tokens, _ = data.split("train")
    assert read_meta("out")["files"] != before["files"]
    assert tokens.astype(np.uint8).tobytes() == TEXT.encode()[: len(tokens)]
    with pytest.raises(InputError, match="val.bin was changed, damaged or replaced"):
        data.split("val")


def test_a_preparation_in_another_container_keeps_its_working_folder():
    """The numbers of its processes say nothing here; its lock does."""
    with ThreadPoolExecutor(1) as pool:
        with files.alone(Path("out")):
            os.makedirs("out/.preparing-4194305")  # no process here has this number
            waiting = pool.submit(prepared, data="out")
            time.sleep(0.5)
            assert os.listdir("out") == [".preparing-4194305"] and not waiting.done()
        assert text_of(waiting.result()) == TEXT
    assert len(os.listdir("out")) == 7


def test_all_is_the_whole_text_in_order():
    data = prepared()
    tokens, lookback = data.split("all")
    parts = [data.split(split) for split in SPLITS]
    assert all(
        (whole == np.concatenate(x)).all() for whole, x in zip((tokens, lookback), zip(*parts))
    )
    assert tokens.astype(np.uint8).tobytes().decode() == TEXT


META = {
    "files": [[1], {}, {"../x": "0"}, None],
    "splits": [{}, [], {"train": {}}, {split: {"tokens": 0, "bytes": 0} for split in SPLITS}],
    "source_sha256": [None, 3],
    "background": [5, {"a": 1}, {"total": 1, "words": [1], "counts": []}],
    "source": [[1], None, {}],
    "tokenizer": [None, 3],
}


@pytest.mark.parametrize("key", META)
def test_a_crafted_meta_json_is_rebuilt_even_if_it_is_sealed(key):
    prepared(data="out")
    for value in META[key]:
        meta = {**read_meta("out"), key: value}
        for crafted in (meta, {name: meta[name] for name in meta if name != key}):
            write("out/meta.json", json.dumps(files.seal(crafted)))
            with pytest.raises(InputError, match="not what prepare_data.py writes"):
                Prepared("out")
            assert text_of(prepared(data="out")) == TEXT


def test_a_failure_removes_nothing_that_others_have_written(monkeypatch):
    def encode_beside_others(*args):
        os.mkdir("data/other")
        return encode(*args)

    write("book.txt", "Hi.")
    monkeypatch.setattr(prepare_data, "encode", encode_beside_others)
    with pytest.raises(InputError, match="too short"):
        prepared(data="data/mine")
    assert os.listdir("data") == ["other"]


def test_a_text_that_changes_while_it_is_prepared_is_refused(monkeypatch):
    def encode_another_text(*args):
        write("book.txt", TEXT.replace("a", "o"))
        digest = encode(*args)
        write("book.txt", TEXT)
        return digest

    monkeypatch.setattr(prepare_data, "encode", encode_another_text)
    with pytest.raises(InputError, match="book.txt changed while .* run the command again"):
        prepared(data="out")
    assert not Path("out").exists() and Path("book.txt").read_text() == TEXT


def test_a_full_disk_is_one_line_and_leaves_nothing(file_size, capsys):
    file_size(20000)
    status = script_here("prepare_data.py", "book.txt", *flags(tokenizer="bytes", data="out"))
    file_size(None)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: out: could not be written (")
    assert not os.path.exists("out")


def test_remains_of_a_killed_preparation_are_removed_and_those_of_a_living_one_are_not():
    Path("dies.py").write_text("""if True:
        import os, signal, prepare_data
        prepare_data.block_stats = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        text = prepare_data.TextConfig(source="book.txt", data="out", tokenizer="bytes")
        prepare_data.prepare(text)""")
    with started(Path("dies.py").absolute(), cwd=".") as process:
        process.join(60)
    (remains,) = os.listdir("out")
    assert process.exitcode == -signal.SIGKILL and remains.startswith(".preparing-")
    living = f".preparing-{os.getppid()}"
    os.mkdir(f"out/{living}")
    os.mkdir(f"out/.preparing-{os.getpid()}")  # of an earlier container
    assert text_of(prepared(data="out")) == TEXT
    assert {name for name in os.listdir("out") if name.startswith(".")} == {living}


def test_processes_that_prepare_the_same_data_at_the_same_moment_all_succeed():
    Path("prepares.py").write_text("""if True:
        import os, time, prepare_data
        from pathlib import Path
        encode = prepare_data.encode
        def encode_while_others_wait(*args):
            while n == 0 and not any("waiting" in p.read_text() for p in Path().glob("output*")):
                time.sleep(0.001)
            return encode(*args)
        prepare_data.encode = encode_while_others_wait
        os.close(os.open(f"ready{os.getpid()}", os.O_CREAT))
        while not os.path.exists("go"):
            time.sleep(0.001)
        for n in range(8):
            rules = {"tokenizer": "bytes", "partition": "block:9"}
            text = prepare_data.TextConfig(source="book.txt", data=f"out{n}", **rules)
            data = prepare_data.prepare(text)
            for split in ("train", "val", "test"):
                data.split(split)
        print("whole")""")
    with contextlib.ExitStack() as stack:
        names = [f"output{i}.txt" for i in range(3)]
        script = Path("prepares.py").absolute()
        processes = [stack.enter_context(started(script, cwd=".", output=n)) for n in names]
        while len(list(Path().glob("ready*"))) < 3:
            time.sleep(0.01)
        write("go", "")
        for process in processes:
            process.join(60)
    outputs = [Path(name).read_text() for name in names]
    assert all(text.endswith("whole\n") for text in outputs), outputs
    assert not any("rebuilding" in text for text in outputs)
    assert any("waiting for another process" in text for text in outputs)
    assert len(os.listdir("out7")) == 7
