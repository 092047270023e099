"""From a text to token ids, split in three, with the block of every token beside them.

    python prepare_data.py data/sample.txt --tokenizer bytes
    python prepare_data.py gutenberg:2529
    python prepare_data.py my_book.txt --partition block:64 --out data/my_book

SOURCE is a text file, a folder of .txt files, an http(s) address, or gutenberg:NUMBER. Several make
one corpus, with <|endoftext|> between the texts. The output folder holds

    train.bin val.bin test.bin                              token ids, uint16
    train.lookback.bin val.lookback.bin test.lookback.bin   tokens back to the block's start, uint16
    meta.json                                               how it was made, what it counts, the
                                                            background words, a sha256 of every file
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import hashlib
import json
import os
import platform
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import locality
from locality import PARTITIONS, SEMANTIC, background, parse_partition, partition
from support import files, sentences
from support.files import InputError
from support.sentences import END_OF_TEXT
from support.settings import ADDED
from support.sources import left_out, pieces, slug, source_files

SPLITS = ("train", "val", "test")
STRETCH = 1 << 22  # tokens in memory at a time
MOST_FORCED = 0.2  # of the starts; above this, blocks follow max_lookback more than the text

# --------------------------------------------------------------------------------------------------
# tokens


def check_tokenizer(name):
    """Raises InputError for a name that `get_encoding` does not know."""
    kind, _, n = name.partition(":")
    small = kind == "gpt2" and n.isascii() and n.isdigit() and len(n) < 6 and 257 <= int(n) < 50257
    if name not in ("gpt2", "bytes") and not small:
        known = "gpt2, gpt2:N with N in 257 … 50256, or bytes"
        raise InputError(f"tokenizer must be {known}, not {json.dumps(name)}")


def vocabulary_size(name):
    """How many tokens a tokenizer has, by its name."""
    return {"gpt2": 50257, "bytes": 256}.get(name) or int(name.partition(":")[2])


def get_encoding(name):
    """A tokenizer as a tiktoken.Encoding.

    `gpt2` is fetched once by tiktoken. `gpt2:N` has the N - 1 tokens that GPT-2's byte pair
    encoding learned first, and <|endoftext|>. `bytes` has 256 tokens and needs no download.
    Raises InputError for another name, or where it cannot be fetched.
    """
    check_tokenizer(name)
    if name == "bytes":
        return encoding_of(name, "(?s:.)", [bytes([i]) for i in range(256)])
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # requests' errors are OSErrors, a bad hash is a ValueError
        raise InputError(
            f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}); check the network, "
            "set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer 'bytes'"
        ) from None
    if name == "gpt2":
        return gpt2
    n = vocabulary_size(name) - 1
    first = sorted(gpt2._mergeable_ranks, key=gpt2._mergeable_ranks.get)[:n]
    return encoding_of(name, gpt2._pat_str, first, {"<|endoftext|>": n})


def encoding_of(name, pattern, tokens, special=None):
    ranks = {token: rank for rank, token in enumerate(tokens)}
    how = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special or {}}
    return tiktoken.Encoding(name, **how)


def token_bytes(encoding):
    """The bytes of every token id, a list: what a partitioner reads instead of ids."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]


def encode(paths, encoding, out):
    """Write the token ids of all files to `out`, uint16, <|endoftext|> between two files."""
    n_bytes = sum(path.stat().st_size for path in paths)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="encoding", leave=False, disable=None)
    with open(out, "wb") as f, bar:
        for number, path in enumerate(paths):
            between = ["<|endoftext|>"] if number else []
            for text in chain(between, pieces(path)):
                ids = encoding.encode_to_numpy(text, allowed_special="all")
                ids.astype(np.uint16).tofile(f)
                bar.update(len(text.encode()))


# --------------------------------------------------------------------------------------------------
# the prepared folder


def check_blocks(method, max_lookback, val, test):
    """Raises InputError for parameters of `prepare` that make no sense, or not together."""
    name, n = parse_partition(method)
    if not 1 <= max_lookback <= 65535:
        raise InputError(f"max_lookback must be in 1 … 65535, not {max_lookback}")
    if n and n - 1 > max_lookback and name != "shifted":
        reaches = f"{method} reaches {n - 1} tokens back, max_lookback allows {max_lookback}"
        raise InputError(f"{reaches}: take {name}:{max_lookback + 1}, or a larger max_lookback")
    if not (val > 0 and test > 0 and val + test < 1):
        fractions = "fractions of the text, above 0 and together below 1"
        raise InputError(f"val and test are {fractions}, not {val} and {test}")


def check_shift(method, n, text):
    """Raises InputError for shifted:N that leaves too much of n tokens as it was."""
    name, late = parse_partition(method)
    if name == "shifted" and late > n / 4:
        short = f"{method} begins after {late} tokens, more than a quarter of a split"
        raise InputError(f"{text}: {short}; take a smaller N")


def default_folder(source, tokenizer, method, max_lookback, val, test, joined=False):
    """A folder under data/ that says what is in it; six digits stand for what it leaves out."""
    rest = [source, val, test, *["joined"] * joined]
    rest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:6]
    words = slug(source), tokenizer.replace(":", ""), method.replace(":", ""), max_lookback, rest
    return Path("data") / ".".join(map(str, words))


def prepare(
    source,
    out=None,
    tokenizer="gpt2",
    method="semantic",
    max_lookback=512,
    val=0.1,
    test=0.1,
    joined=False,
    cwd="",
):
    """Make the prepared folder, unless it is there and still fits. Returns its Path.

    source: a string or a list of strings; val, test: the fractions held out, taken from the end of
    the text. joined: a newline takes the place of <|endoftext|>, once the blocks of `document` are
    found. cwd: where relative paths start from. A folder that was made of something else is
    made again, and the reason printed. Where the text is gone, what was made of it is enough.
    Several processes may ask for one folder: the first makes it, the others wait.
    Raises InputError for a source that is no text or too short, or a full disk; then nothing is
    left behind.
    """
    check_blocks(method, max_lookback, val, test)
    how = tokenizer, method, max_lookback, val, test, joined
    folder = Path(cwd, out or default_folder(source, *how))
    # the code counts too: another partitioner makes other blocks. a schedule makes none
    code = files.digest_code(
        [locality.__file__, sentences.__file__], without=("SCHEDULES", "schedule")
    )
    made_from = {
        "source": source,
        "code_sha256": code,
        "tokenizer": tokenizer,
        "partition": method,
        "max_lookback": max_lookback,
        "val": val,
        "test": test,
        "joined": joined,
    }
    try:
        paths = source_files(source, cwd)
    except InputError as gone:
        if misfit(folder, made_from):
            raise
        on = f"going on with what was prepared in {folder}, not compared with the text"
        print(f"{gone}; {on}", file=sys.stderr)
        return folder
    made_from["source_sha256"] = files.digest(paths)
    files.remove_stale(folder, ".preparing-{}")
    if misfit(folder, made_from):
        with files.alone(folder):
            if reason := misfit(folder, made_from):  # or another process has made it meanwhile
                for line in left_out(source, cwd):
                    print(line, file=sys.stderr)
                make(folder, paths, made_from, reason)
    return folder


def make(folder, paths, made_from, reason):
    """Make or make again a prepared folder.

    paths: of the text; made_from: what meta.json says it was made from, a dict; reason: why what
    is there does not fit. Raises InputError.
    """
    ours = {f"{split}{end}" for split in SPLITS for end in (".bin", ".lookback.bin")} | {
        "meta.json"
    }
    for path in folder.iterdir():
        if path.name not in ours and not path.name.startswith(".preparing-"):
            own = "prepare into a folder of its own"
            raise InputError(f"{folder} holds other files ({path.name}, …); {own}")
    if (folder / "meta.json").exists():
        print(f"{folder} is made again: {reason}")
    with files.filling(folder, last="meta.json") as work:
        encoding = get_encoding(made_from["tokenizer"])
        encode(paths, encoding, work / "all.bin")
        if not (work / "all.bin").stat().st_size:
            raise InputError(f"{made_from['source']}: the text is empty")
        tokens = np.memmap(work / "all.bin", np.uint16, "r+")
        made = split_and_partition(tokens, encoding, work, made_from)
        del tokens
        (work / "all.bin").unlink()
        versions = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tiktoken": tiktoken.__version__,
        }
        digests = {path.name: files.digest([path]) for path in sorted(work.iterdir())}
        meta = {**made_from, **made, "versions": versions, "files": digests}
        files.write_json(work / "meta.json", files.seal(meta))


def split_and_partition(tokens, encoding, work, made_from):
    """Write the tokens and the lookback of each split to the folder `work`.

    tokens: (n,) uint16, of the whole text. Returns what meta.json says of them, a dict.
    """
    vocabulary, method = token_bytes(encoding), made_from["partition"]
    n, val, test = len(tokens), made_from["val"], made_from["test"]
    ends = [n - round(n * val) - round(n * test), n - round(n * test), n]
    if min(np.diff([0, *ends])) < 2:
        short = f"the text is too short: {n} tokens cannot be split in three"
        raise InputError(f"{made_from['source']}: {short}")
    name = parse_partition(method)[0]
    check_shift(method, min(np.diff([0, *ends])), made_from["source"])
    if made_from["joined"] and method != "document":
        join_documents(tokens, vocabulary)
    words = background(tokens[: ends[0]], vocabulary) if name in SEMANTIC else None
    counts = {}
    for split, start, end in zip(SPLITS, [0, *ends], ends):
        with open(work / f"{split}.lookback.bin", "wb") as f:
            f.truncate(2 * (end - start))
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, in a map a crash
                os.posix_fallocate(f.fileno(), 0, 2 * (end - start))
        lookback = np.memmap(work / f"{split}.lookback.bin", np.uint16, "r+")
        cap = made_from["max_lookback"]
        partition(tokens[start:end], vocabulary, method, cap, words, out=lookback)
        lookback.flush()
        if made_from["joined"]:
            join_documents(tokens[start:end], vocabulary)
        tokens[start:end].tofile(work / f"{split}.bin")
        counts[split] = statistics(tokens[start:end], lookback, vocabulary, method, cap)
    return {"vocab_size": encoding.n_vocab, "splits": counts, "background": words}


def join_documents(tokens, vocabulary):
    """Put a newline in the place of every <|endoftext|>, in place. tokens: (n,) uint16.

    Raises InputError for a vocabulary (the bytes of each token, a list) that has no such token.
    """
    if END_OF_TEXT not in vocabulary:
        raise InputError("joined needs a tokenizer that has <|endoftext|>: gpt2 or gpt2:N")
    end_of_text, newline = vocabulary.index(END_OF_TEXT), vocabulary.index(b"\n")
    for at in range(0, len(tokens), STRETCH):
        some = tokens[at : at + STRETCH]
        some[some == end_of_text] = newline


def misfit(folder, made_from):
    """Why this folder is not a whole, prepared one, made of this; "" if it is one."""
    try:
        meta = read_meta(folder)
        tokens = {name: meta["splits"][name.split(".")[0]]["tokens"] for name in meta["files"]}
        whole = all((folder / name).stat().st_size == 2 * n for name, n in tokens.items())
    except (InputError, OSError) as e:
        return str(e)
    names = {"source_sha256": "text", "code_sha256": "version of the code that decides blocks"}
    meta = {**ADDED, **meta}
    other = [names.get(k, k) for k, value in made_from.items() if meta.get(k) != value]
    if other:
        return f"it was made with another {', '.join(other)}"
    return "" if whole else "a file has another length"


def read_meta(folder):
    """meta.json as a dict. Raises InputError if it is not there, or not as it was written."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except OSError:
        none = "no prepared data here (no meta.json); run prepare_data.py"
        raise InputError(f"{folder}: {none}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{folder}/meta.json is damaged; it has to be prepared again") from None
    if not files.is_sealed(meta):
        changed = "was edited, damaged, or written by an earlier version"
        raise InputError(f"{folder}/meta.json {changed}: it has to be prepared again")
    return meta


def read_split(folder, split, meta=None):
    """Token ids and lookbacks of one split, two uint16 memory maps of the same length.

    meta: what `read_meta` told of them, if it was read before. Raises InputError where one of the
    files is not, byte for byte, what was prepared: a stale lookback would quietly train and measure
    another model.
    """
    digests, paths = (meta or read_meta(folder))["files"], []
    for name in (f"{split}.bin", f"{split}.lookback.bin"):
        paths.append(Path(folder) / name)
        again = "delete the folder and prepare again"
        try:
            same = files.digest(paths[-1:]) == digests[name]
        except OSError as e:
            raise InputError(f"{paths[-1]} cannot be read ({e.strerror}); {again}") from None
        if not same:
            changed = "is not what was prepared (edited, damaged or of another preparation)"
            raise InputError(f"{paths[-1]} {changed}: {again}")
    return [np.memmap(path, np.uint16, "r") for path in paths]


def read_contexts(arrays, starts, T, device):
    """T values of each of some arrays, (n,) integers, from each start on: a list of (B, T) int64.

    The targets of tokens are those of tokens[1:].
    """
    contexts = []
    for values in arrays:
        rows = np.stack([values[start : start + T] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64))
        rows = rows.pin_memory() if device.type == "cuda" else rows
        contexts.append(rows.to(device, non_blocking=device.type == "cuda"))
    return contexts


def text_digest(source, cwd):
    """sha256 of the text of a source; None where it is gone."""
    try:
        return files.digest(source_files(source, cwd))
    except InputError:
        return None


def data_digest(folder):
    """sha256 of the text that a prepared folder was made from; None where there is none."""
    try:
        return read_meta(folder)["source_sha256"]
    except InputError:
        return None


def prepared(config):
    """The prepared folder that a config (a dict) names, made if it is missing or no longer fits.

    Raises InputError if the config is of a run, and the text, its tokens or its blocks are not
    those any more that it was trained on. (A run of an earlier version tells the sha256 alone.)
    """
    source, before = config["source"], config.get("source_sha256")
    how = [config[key] for key in ("tokenizer", "partition", "max_lookback", "val", "test")]
    how.append(config["joined"])
    out = config["data"] or default_folder(source, *how)
    since = "has changed since this run was trained on it; put the old text back"
    cwd = config.get("cwd", "")
    if before:
        # relative paths start from where the run was started, or from here, if its text is here
        digests = {place: text_digest(source, place) for place in (cwd, "")}
        known = [p for p in digests if before in (digests[p], data_digest(Path(p, out)))]
        cwd = known[0] if known else cwd
        if digests[cwd] not in (before, None):
            raise InputError(f"{source} {since}")
    folder = prepare(source, out, *how, cwd)
    if before and data_digest(folder) != before:  # its text is gone, and that of another is here
        raise InputError(f"{source} {since}")
    found, before = read_meta(folder)["files"], config.get("files")
    changed = [name for name in found if before and before.get(name) != found[name]]
    if changed:
        blocks = all("lookback" in name for name in changed)
        what = "blocks: the partitioner" if blocks else "tokens: the tokenizer"
        since = f"has other {what} has changed since this run was trained"
        back = f"use the version of the code that trained it ({', '.join(changed)})"
        raise InputError(f"{folder} {since}; {back}")
    return folder


# --------------------------------------------------------------------------------------------------
# what the partition found


def block_moves(lookback):
    """Where the block moves on: (n,) integers -> the tokens from which on a new one holds, and the
    tokens at which it begins, (m,) int64 each, ascending.

    Where a block slides at the cap, a token at a time, no new one begins; but blocks of one token
    count. Reads a memory map stretch by stretch.
    """
    tokens, starts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for at in range(0, len(lookback), STRETCH):
        before = max(at - 1, 0)
        i = np.arange(before, min(at + STRETCH, len(lookback)))
        back = lookback[before : at + STRETCH]
        start = i - back
        moved = (np.diff(start) > 1) | (back[1:] == 0)
        tokens.append(i[1:][moved])
        starts.append(start[1:][moved])
    return np.concatenate(tokens), np.concatenate(starts)


def block_starts(lookback):
    """The tokens at which blocks begin, the first among them: (n,) integers -> int64, ascending."""
    return np.append(np.zeros(min(len(lookback), 1), np.int64), block_moves(lookback)[1])


def liveliest(lookback, T):
    """Where to begin T tokens in which the most new blocks begin and are noticed: a block's start.

    lookback: (n,) integers. Of several such places, the first.
    """
    (tokens, starts), T = block_moves(lookback), min(T, len(lookback))
    places = np.append(0, starts)
    places = places[places <= len(lookback) - T]
    seen = np.searchsorted(tokens, places + T) - np.searchsorted(starts, places, side="right")
    return int(places[np.argmax(seen)])


def statistics(tokens, lookback, vocabulary, method, cap):
    """What meta.json counts of a split, a dict.

    Tokens, bytes and the mean lookback; for blocks, how many, and the quartiles of their lengths in
    tokens. For blocks that follow sentences also `lag`, the median of the tokens from where a block
    begins to where that is known; and `forced`, the share of the starts that moved when the block
    had come to `cap` tokens, max_lookback.
    """
    length, n_bytes = np.array([len(b) for b in vocabulary]), 0
    for at in range(0, len(tokens), STRETCH):
        n_bytes += int(length[tokens[at : at + STRETCH]].sum())
    mean = float(lookback.sum(dtype=np.int64)) / len(tokens)
    counts = {"tokens": len(tokens), "bytes": n_bytes, "mean_lookback": round(mean, 2)}
    name, _ = parse_partition(method)
    if name == "window":
        return counts
    known, begun = block_moves(lookback)
    starts = np.append(0, begun)
    quartiles = np.percentile(np.diff(starts, append=len(tokens)), (25, 50, 75)).tolist()
    counts |= {"blocks": len(starts), "block_length_quartiles": quartiles}
    if name not in ("block", "document") and len(begun):
        counts["lag"] = float(np.median(known - begun))
        counts["forced"] = round(float((lookback[known - 1] == cap).mean()), 3)
    return counts


def mark_blocks(tokens, lookback, vocabulary):
    """The text of some tokens, ▌ where a block begins. tokens, lookback: (n,) integers."""
    starts = set(block_starts(np.minimum(lookback, np.arange(len(tokens)))).tolist())
    marked = ["▌".encode() * (i in starts) + vocabulary[t] for i, t in enumerate(tokens)]
    return b"".join(marked).decode(errors="replace")


def describe(folder, meta, tokens, lookback):
    """Print what the partition found, with three boundaries in context.

    meta: as `read_meta` gives it; tokens, lookback: of the training split, as `read_split` does.
    """
    encoding, counts = get_encoding(meta["tokenizer"]), meta["splits"]
    train, method = counts["train"], meta["partition"]
    sizes = ", ".join(f"{split} {counts[split]['tokens']:,}" for split in SPLITS)
    ratio = train["bytes"] / train["tokens"]
    print(f"{folder}: {sizes} tokens ({meta['tokenizer']}), {ratio:.2f} bytes a token")
    mean = f"mean lookback {train['mean_lookback']:.0f}"
    if "blocks" not in train:
        print(f"{method}: a sliding window, {mean} tokens")
        return
    q1, median, q3 = train["block_length_quartiles"]
    lengths = f"median length {median:.0f} tokens (quartiles {q1:.0f} and {q3:.0f})"
    print(f"{method}: {train['blocks']:,} blocks in train, {lengths}, {mean}")
    if method == "document" and train["blocks"] == 1:
        print("no <|endoftext|> stands in this text: it is one document")
    cap, forced = meta["max_lookback"], train.get("forced")
    if forced is not None:
        lag = f"a new block is known {train['lag']:.0f} tokens after it began (median)"
        print(f"{lag}; {100 * forced:.0f} % of the starts were forced by max_lookback ({cap})")
        if forced > MOST_FORCED:
            print(f"max_lookback cuts many blocks that would go on: raise it above {cap}")
    tokens, lookback = tokens[:STRETCH], lookback[:STRETCH]
    starts = block_starts(lookback)[1:]
    if len(starts) > 3:
        starts = starts[np.linspace(0, len(starts), 5, dtype=int)[1:-1]]
    if len(starts):
        print("some of the blocks begin at")
    width = round(60 / ratio)  # 60 bytes
    for start in starts:
        sides = tokens[max(start - width, 0) : start], tokens[start : start + width]
        before, after = (encoding.decode(side.tolist()).replace("\n", " ") for side in sides)
        print(f"  … {before} ▌{after} …")


def main():
    parser = argparse.ArgumentParser(
        description="text -> token ids, split, with the block of every token",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("source", nargs="+", help="text file, folder, http(s) address or gutenberg:NUMBER")
    add("--out", help="folder to write (default: one under data/, named after the source)")
    add("--tokenizer", default="gpt2", help="gpt2, gpt2:N (its first N tokens) or bytes")
    add("--partition", default="semantic", help=PARTITIONS)
    add("--max-lookback", type=int, default=512, help="no block reaches back further, in tokens")
    add("--val", type=float, default=0.1, help="fraction of the text for validation")
    add("--test", type=float, default=0.1, help="fraction of the text for the final test")
    add("--joined", action="store_true", help="a newline in place of <|endoftext|>")
    args = parser.parse_args()
    source = args.source[0] if len(args.source) == 1 else args.source
    how = args.tokenizer, args.partition, args.max_lookback, args.val, args.test, args.joined
    folder = prepare(source, args.out, *how)
    meta = read_meta(folder)
    describe(folder, meta, *read_split(folder, "train", meta))


if __name__ == "__main__":
    files.run_script(main)
