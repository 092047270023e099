"""Thousands of damaged, absurd and hostile inputs: each works, or is answered with one line.

A case follows from the seed in the test's name. `FUZZ=100 pytest tests/test_fuzz.py` runs 100
seeds; FUZZ_SEED is the first. If a checksum guards a file, whatever can still be read from a
damaged one must be what was written: no wrong value passes.
"""

import json
import os
import random
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import tomllib
import torch

import eval
from conftest import ROOT, TINY, flags, script_here
from model import GPT, GPTConfig
from prepare_data import TextConfig, describe, prepare
from support.files import InputError
from support.prepared import SPLITS, Prepared, read_meta
from support.settings import to_toml
from support.weights import load
from train import Config, read_config, read_resumed

FIRST = int(os.environ.get("FUZZ_SEED", 0))
CASES = {"config": 1500, "meta": 600, "bin": 600, "flip": 900}
CASES |= {"truncate": 230, "object": 200, "weights": 600, "text": 300}
seeds = pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("FUZZ", 1))))

CHARACTERS = [*"\0\n\r\t \"'\\=[]{}#,.-09eé語\u202e\ufeff\u2028\x7f"]
CHARACTERS += ["\x1b[31m", "\U0001f9e0", "\ud7ff"]
NUMBERS = [0, 1, -1, 3, 7, 255, 65535, 65536, 2**31, 2**63, -(2**63), 10**30]
FLOATS = [0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf")]
NAMES = """gpt2 gpt2:300 gpt2:99999 bytes semantic window:0 block:16 window:-1 window:99999999999
    quintic auto""".split()
VALUES = [None, True, False, *NUMBERS, *FLOATS, "", "x", *NAMES, "a\nb", "a\0b", "語\u202e"]
VALUES += ["x" * 5000, [], [1], ["a"], [[]], {}, {"a": 1}]
PIECES = ["word ", "The mind is made of blocks. ", "\n", "\n\n", "\r\n", "\r", " ", "\t", "e\u0301"]
PIECES += ["語", "🧠", "שלום עולם. ", "مرحبا. ", "\u202e", "\ufeff", "\u2028", "\x85", "\x1b"]
PIECES += ["A.", "...", "?!", '"', "<|endoftext|>", "x" * 300, "-", "1.5", "\u200b", "ﬁ", "\x00"]
PARTITIONS = ["semantic", "sentence", "window:20", "block:20"]


def outcome(function, *args):
    """What the function returns; None if it refuses its input with one clear line."""
    try:
        return function(*args)
    except (InputError, OSError) as e:  # every script prints it, and ends with status 2
        assert str(e) and len(str(e).splitlines()) == 1, repr(str(e))


def attempts(kind, seed):
    """Number and generator of every case of a kind; if one fails, its number is printed."""
    for number in range(CASES[kind]):
        try:
            yield number, random.Random(f"{kind} {seed} {number}")
        except GeneratorExit:
            print(f"{kind}: seed {seed}, case {number}")
            raise


def prepared(source, data, partition="semantic", max_lookback=64):
    rules = {"tokenizer": "bytes", "partition": partition, "max_lookback": max_lookback}
    return prepare(TextConfig(source=source, data=str(data), **rules))


def read_split(folder, split):
    return Prepared(folder).split(split)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def mutated_text(text, rng):
    """The text with one to three small changes."""
    another_value = lambda _: json.dumps(rng.choice(VALUES))
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, lines = rng.randrange(len(text) + 1), text.split("\n")
        line, kind = rng.randrange(len(lines)), rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(CHARACTERS) * rng.choice([1, 1, 2, 2000]) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.choice([1, 2, 10, 200]) :]
        elif kind == 2:
            text = text[:at]
        else:
            if kind == 3:
                lines.insert(rng.randrange(len(lines)), lines[line])
            elif kind == 4:
                lines[line] = re.sub(r"(?<=[=:] )[^,]+", another_value, lines[line])
            else:
                lines[line] = "".join(rng.sample(lines[line], len(lines[line])))
            text = "\n".join(lines)
    return text


def mutated_bytes(content, rng):
    """The bytes with a bit flipped, or a part removed, inserted, zeroed or doubled, near one of the
    ends or anywhere."""
    content, n = bytearray(content), len(content)
    near = rng.randrange(min(n, 1000))
    at = rng.choice([rng.randrange(n), near, n - 1 - near])
    kind, size = rng.randrange(8), rng.choice([1, 2, 3, 64, 1000])
    if kind < 4:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 4:
        del content[at : at + size]
    elif kind == 5:
        content[at:at] = rng.randbytes(size)
    elif kind == 6:
        content[at : at + size] = bytes(len(content[at : at + size]))
    else:
        content[at:at] = content[at : at + size]
    return bytes(content)


def mutated_object(value, rng):
    """A copy of a checkpoint with one value in it, at any depth, missing or replaced."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.75:
        value = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = mutated_object(value[key], rng)
        return value
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        shapes = [value[:0], value.flatten(), value[None], torch.zeros(3, 5)]
        shapes += [value.to("meta"), value.to_sparse(), value.new_zeros(1).expand(2**40)]
        dtypes = [value.double(), value.long(), value.to(torch.complex64), value.bool()]
        return rng.choice(shapes + dtypes)
    return rng.choice(VALUES)


# ---- configs, as a file and on the command line


@seeds
def test_configs(seed, tmp_path):
    texts = [path.read_text() for path in sorted((ROOT / "configs").glob("*.toml"))]
    texts += [to_toml(Config())] * 5
    values = {key: value for key, value in asdict(Config()).items() if value is not None}
    path, works = tmp_path / "c.toml", 0
    for _, rng in attempts("config", seed):
        more = []
        if rng.random() < 0.5:
            content = mutated_text(rng.choice(texts), rng).encode("utf-8", "surrogatepass")
            damaged = content and rng.random() < 0.2
            path.write_bytes(mutated_bytes(content, rng) if damaged else content)
        else:  # another value for one key, perhaps of another type
            key = rng.choice([*values, "n_layer", "block_size", "sceduhle"])
            changed = {**values, key: rng.choice(VALUES[1:])}
            path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in changed.items()))
            if rng.random() < 0.5:
                words = str(rng.choice(VALUES)), json.dumps(rng.choice(VALUES))
                more = [["--" + key, word] for word in words]
                more = rng.choice([*more, ["--" + key], [key], [f"--{key}={'[' * 3000}"]])
        if config := outcome(read_config, [str(path), *more]):
            # the run folder would store the same config
            assert Config(**tomllib.loads(to_toml(config))) == config
            works += 1
    assert 0.05 * CASES["config"] < works < 0.8 * CASES["config"]


# ---- prepared folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder of 20 kB, and its source beside it."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "book.txt").write_text((ROOT / "data" / "sample.txt").read_text()[:20000])
    return prepared(str(place / "book.txt"), place / "prepared").folder


def prepared_again(folder):
    return prepared(str(folder.parent / "book.txt"), folder)


@seeds
def test_meta_json(folder, seed, capsys):
    path, text, meta = folder / "meta.json", (folder / "meta.json").read_text(), read_meta(folder)
    refused = 0
    for number, rng in attempts("meta", seed):
        if rng.random() < 0.5:
            path.write_text(json.dumps(mutated_object(meta, rng)))
        elif rng.random() < 0.5:
            path.write_bytes(mutated_bytes(text.encode(), rng))
        else:
            path.write_bytes(mutated_text(text, rng).encode("utf-8", "surrogatepass"))
        got = outcome(read_meta, folder)
        assert got is None or got == meta
        assert got is not None or outcome(read_split, folder, "train") is None
        refused += got is None
        if number % 30 == 0:  # a damaged folder is rebuilt, and a message says so
            assert describe(prepared_again(folder)) and read_meta(folder) == meta
            assert (f"rebuilding {folder}" in capsys.readouterr().out) == (got is None)
    path.write_text(text)
    assert refused > 0.5 * CASES["meta"]


@seeds
def test_token_and_lookback_files(folder, seed):
    whole = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    for number, rng in attempts("bin", seed):
        name, kind = rng.choice(list(whole)), rng.randrange(7)
        path, split = folder / name, name.split(".")[0]
        content, values = whole[name], np.frombuffer(whole[name], np.uint16).copy()
        if kind == 0:  # an id outside the vocabulary; a lookback that is too long
            values[rng.randrange(len(values))] = rng.choice([256, 65, 257, 1000, 65535])
            content = values.tobytes()
        elif kind == 1:  # stale lookbacks: off by one everywhere
            content = np.roll(values, 1).tobytes()
        elif kind == 2:  # the file of another split, or tokens instead of lookbacks
            content = rng.choice([c for c in whole.values() if c != content])
        elif kind == 3:  # an odd length
            content = content[: rng.randrange(len(content) // 2) * 2 + 1]
        elif kind == 4:
            content = content[: rng.randrange(len(content))]
        else:
            content = mutated_bytes(content, rng)
        path.write_bytes(content)
        if rng.random() < 0.05:
            path.unlink()
        intact = path.exists() and content == whole[name]
        assert (outcome(read_split, folder, split) is not None) == intact, name
        if number % 30 == 0 and outcome(prepared_again, folder):  # another length: it is rebuilt
            for each in SPLITS:
                if (arrays := outcome(read_split, folder, each)) is not None:
                    expected = [whole[f"{each}.bin"], whole[f"{each}.lookback.bin"]]
                    assert [x.tobytes() for x in arrays] == expected
        path.write_bytes(whole[name])


# ---- checkpoints


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of a run of two steps."""
    place = tmp_path_factory.mktemp("trained")
    small = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 2}
    small |= {"partition": "block:16", "max_lookback": 32, "max_steps": 2}
    small |= {"eval_interval": 1, "eval_contexts": 1, "data": place / "data", "out": place / "run"}
    assert script_here("train.py", TINY, *flags(source=folder.parent / "book.txt", **small)) == 0
    return place / "run"


def test_checkpoints_truncated_at_every_kilobyte(trained, tmp_path):
    count = 0
    for name in ("best.pt", "last.pt"):
        path = shutil.copy(trained / name, tmp_path / name)
        whole = path.stat().st_size
        for size in sorted({*range(0, whole, 1024), *range(whole - 40, whole)}, reverse=True):
            os.truncate(path, size)
            assert outcome(load, path) is None
            count += 1
    assert outcome(eval.load, tmp_path) is None and outcome(read_resumed, [str(tmp_path)]) is None
    assert count >= CASES["truncate"]


@seeds
def test_checkpoints_with_flipped_bits(trained, tmp_path, seed):
    names, refused = ("best.pt", "last.pt"), 0
    whole = {name: ((trained / name).read_bytes(), load(trained / name)) for name in names}
    for _, rng in attempts("flip", seed):
        name = rng.choice(names)
        content, state = whole[name]
        (tmp_path / name).write_bytes(mutated_bytes(content, rng))
        got = outcome(load, tmp_path / name)
        assert got is None or same(got, state), "a changed value was read"
        refused += got is None
    assert refused > 0.5 * CASES["flip"]


@seeds
def test_checkpoints_with_other_contents(trained, tmp_path, seed, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    states = {name: load(trained / name) for name in ("best.pt", "last.pt")}
    resume = "train.py", run, "--resume", "--max_steps", 3
    for number, rng in attempts("object", seed):
        name = rng.choice(list(states))
        torch.save(mutated_object(states[name], rng), run / name)
        outcome(eval.load, run)
        outcome(GPT.from_pretrained, run / name)
        if outcome(read_resumed, [str(run)]) and name == "last.pt" and number % 4 == 0:
            assert script_here(*resume) in (0, 2)
            error = capsys.readouterr().err
            assert error.count("error: ") <= 1 >= error.count("\n"), error
            assert "Traceback" not in error, error
            shutil.copytree(trained, run, dirs_exist_ok=True)
        shutil.copy(trained / name, run / name)
    assert script_here(*resume) == 0


# ---- published weights


@seeds
def test_weight_files(tmp_path, seed):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    GPT(GPTConfig(70, 16, n_layer=2, n_head=2, n_embd=8)).save_pretrained(tmp_path)
    state = load(tmp_path / "pytorch_model.bin")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    tensors = {name: value.clone() for name, value in state.items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    names = "pytorch_model.bin", "old.bin", "model.safetensors", "config.json"
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    expected = GPT.from_pretrained(tmp_path / "pytorch_model.bin").state_dict()
    works = 0
    for _, rng in attempts("weights", seed):
        name, kind = rng.choice(names[:3]), rng.randrange(4)
        if kind == 0:
            text = mutated_text(whole["config.json"].decode(), rng)
            (tmp_path / "config.json").write_text(text)
        elif kind == 1:
            torch.save(mutated_object(state, rng), tmp_path / name)
        elif kind == 2:
            (tmp_path / name).write_bytes(whole[name][: rng.randrange(len(whole[name]))])
        else:
            (tmp_path / name).write_bytes(mutated_bytes(whole[name], rng))
        model = outcome(GPT.from_pretrained, tmp_path / name)
        if model and kind == 3 and name == "pytorch_model.bin":  # the only format with checksums
            assert same(dict(model.state_dict()), dict(expected))
        works += model is not None
        for damaged in (name, "config.json"):
            (tmp_path / damaged).write_bytes(whole[damaged])
    assert 0.02 * CASES["weights"] < works < 0.7 * CASES["weights"]


# ---- texts


def check_text(content, tmp_path, partition, max_lookback=64):
    """Prepare the bytes as a text. Either this works, and nothing of the text is lost, or it is
    refused and nothing is left behind. Returns whether it works."""
    (tmp_path / "t.txt").write_bytes(content)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    source, out = str(tmp_path / "t.txt"), tmp_path / "out"
    data = outcome(prepared, source, out, partition, max_lookback)
    if data is None:
        assert not out.exists()
        return False
    splits = [data.split(split) for split in SPLITS]
    text = content.decode().replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    assert b"".join(tokens.astype(np.uint8).tobytes() for tokens, _ in splits) == text.encode()
    assert all((r <= np.minimum(max_lookback, np.arange(len(r)))).all() for _, r in splits)
    return True


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    "name, content, fine",
    [
        ("empty", b"", False),
        ("one byte", b"x", False),
        ("NULs", b"\0" * 5000, False),
        ("invalid UTF-8", b"a\xff\xfe" * 2000, False),
        ("half a character", "a語".encode()[:-1] * 900, False),
        ("surrogates", b"a\xed\xa0\x80 " * 900, False),
        ("UTF-16", "Some text. ".encode("utf-16") * 500, False),
        ("only newlines", b"\n" * 5000, True),
        ("only emoji", "🧠🪢".encode() * 2000, True),
        ("right to left", "שלום עולם. ".encode() * 500, True),
        ("CRLF", b"A line.\r\n" * 900, True),
        ("CR", b"A line.\r" * 900, True),
        ("a BOM", b"\xef\xbb\xbfText. " + b"More. " * 900, True),
        ("no sentence ends", b"word " * 4000, True),
        ("one word", b"x" * 20000, True),
        ("periods", b"." * 20000, True),
    ],
)
def test_uniform_texts(name, content, fine, partition, tmp_path):
    assert check_text(content, tmp_path, partition) == fine


def test_ten_megabytes_on_one_line(tmp_path):
    text = (ROOT / "data" / "sample.txt").read_text().replace("\n", " ").encode()
    text = (text * (10**7 // len(text) + 1))[: 10**7].decode(errors="ignore").encode()
    assert check_text(text, tmp_path, "block:20")
    assert check_text(b"x" * 10**7, tmp_path, "window:20")


@seeds
def test_random_texts(seed, tmp_path):
    works = 0
    for _, rng in attempts("text", seed):
        pieces = rng.sample(PIECES, rng.randint(1, len(PIECES)))
        content = "".join(rng.choices(pieces, k=rng.choice([1, 5, 50, 600]))).encode()
        if rng.random() < 0.15:
            content = mutated_bytes(content, rng)
        works += check_text(content, tmp_path, rng.choice(PARTITIONS), rng.choice([19, 64]))
    assert 0.2 * CASES["text"] < works < 0.9 * CASES["text"]


NOWHERE = ["gutenberg:../../x", "gutenberg:٣", "gutenberg:" + "9" * 400, "http://", "http://[::1"]
NOWHERE += ["http:///x", "https://127.0.0.1:99999/x", "http://127.0.0.1:9/../../../x"]
NOWHERE += ["http://127.0.0.1:9/\u202e語 x", "ftp://127.0.0.1/x", "file:///etc/passwd", "a" * 5000]
NOWHERE += ["/dev/null", "/dev/zero", "..", "~", "\0", "a\nb", "", [], [[]], ["x", ""]]


@pytest.mark.parametrize("source", NOWHERE)
def test_sources_that_name_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.sources.CACHE", tmp_path / "cache")
    assert outcome(prepared, source, tmp_path / "out") is None
    assert {path.name for path in tmp_path.rglob("*")} <= {"cache", "texts"}  # no file anywhere


# ---- the same on the command line


def test_the_scripts_end_with_one_line_and_status_2(folder, trained, tmp_path, capsys):
    rng, run, config, text = (random.Random(FIRST), *map(tmp_path.joinpath, ("r", "c.toml", "t")))
    commands = [["eval.py", run], ["sample.py", run], ["view.py", run], ["train.py", config]]
    commands += [["train.py", run, "--resume"], ["sweep.py", config]]
    commands += [["prepare_data.py", text, *flags(tokenizer="bytes", data=tmp_path / "out")]]
    for _ in range(6):
        shutil.copytree(trained, run, dirs_exist_ok=True)
        for name in ("best.pt", "last.pt"):
            content = (trained / name).read_bytes()
            (run / name).write_bytes(content[: rng.randrange(len(content))])
        config.write_text(rng.choice(["n_layer = 0", "n_layr = 1", "a" * 99, "[" * 9999]))
        text.write_bytes(rng.choice([b"", b"x", b"\0" * 99, b"\xff" * 99]))
        for command in commands:
            status, error = script_here(*command), capsys.readouterr().err
            assert status == 2 and error.startswith("error: "), (command, error)
            assert error.count("\n") == 1, (command, error)
