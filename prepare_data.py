"""
From a text to token ids, split in three, with the block of every token beside them.

    python prepare_data.py data/sample.txt --tokenizer bytes
    python prepare_data.py gutenberg:2529
    python prepare_data.py my_book.txt --partition block:64 --out data/my_book

SOURCE is a text file, a folder of .txt files, an http(s) address, or gutenberg:NUMBER; several are joined into one
corpus, with <|endoftext|> between the texts. The output folder holds

    train.bin val.bin test.bin                              token ids, uint16
    train.lookback.bin val.lookback.bin test.lookback.bin   tokens back to the start of the block, uint16
    meta.json                                               how it was made, what it counts, the background words, and a
                                                            sha256 of every file, itself included

The sha256 are checked whenever a file is opened to be used, at 1 to 2 GB/s: on 10 GB, some seconds before hours of training.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import locality
from download import CACHE, download, remove_stale
from locality import InputError, background, parse_partition, partition

SPLITS = ("train", "val", "test")
PIECE = 1 << 22    # characters in memory at a time


# ---------------------------------------------------------------------------------------------------------------------
# tokens


def check_tokenizer(name):
    """Raises InputError for a name that `get_encoding` does not know."""
    if name not in ("gpt2", "bytes") and not (re.fullmatch(r"gpt2:[0-9]{3,5}", name) and 257 <= int(name[5:]) < 50257):
        raise InputError(f"tokenizer must be gpt2, gpt2:N with N in 257 … 50256, or bytes, not {json.dumps(name)}")


def get_encoding(name):
    """The tokenizer as a tiktoken.Encoding: `gpt2` (fetched once by tiktoken); `gpt2:N`, the N - 1 tokens that GPT-2's
    byte pair encoding learned first, and <|endoftext|>; or `bytes`, 256 tokens, no download."""
    check_tokenizer(name)
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
        if name == "gpt2":
            return gpt2
        n = int(name[5:])
        ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < n - 1}
        return tiktoken.Encoding(name, pat_str=gpt2._pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": n - 1})
    except (OSError, ValueError) as e:    # requests' errors are OSErrors, a bad hash is a ValueError
        raise InputError(f"the gpt2 tokenizer could not be downloaded ({type(e).__name__}); check the network, set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer 'bytes'") from None


def token_bytes(encoding):
    """The bytes of every token id, a list: what a partitioner reads instead of ids."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]


# ---------------------------------------------------------------------------------------------------------------------
# text


def source_files(source):
    """The local text files that SOURCE (a string, or a list of them) stands for; what is remote is fetched once."""
    if not isinstance(source, str):
        return [path for one in source for path in source_files(one)]
    if not source or not source.isprintable():
        raise InputError(f"{source!r} does not name a source")
    if match := re.fullmatch(r"gutenberg:([0-9]{1,9})", source):
        number = match[1]
        path = CACHE / "texts" / f"gutenberg-{number}.txt"
        if not path.exists():
            mirror = os.environ.get("GUTENBERG_MIRROR", "https://www.gutenberg.org").rstrip("/")
            raw = download(f"{mirror}/cache/epub/{number}/pg{number}.txt", path.with_suffix(f".{os.getpid()}.raw"))
            try:
                write_text(path, strip_gutenberg("".join(pieces(raw))))
            except InputError as e:
                raise InputError(f"{source}: {e}") from None
            finally:
                raw.unlink()
        return [path]
    if source.startswith("gutenberg:"):
        raise InputError(f"{source}: a Gutenberg source is gutenberg:NUMBER, for example gutenberg:2529")
    if source.startswith(("http://", "https://")):
        path = CACHE / "texts" / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.txt"
        if not path.exists():
            raw = download(source, path.with_suffix(f".{os.getpid()}.raw"))
            try:
                start = next((piece for piece in pieces(raw)), "")
                if not start.strip() or re.match(r"\s*<(!doctype )?html", start, re.I):
                    raise InputError("a web page or nothing, not a plain text")
                os.replace(raw, path)
            except InputError as e:
                raw.unlink()
                raise InputError(f"{source}: {e}") from None
        return [path]
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise InputError(f"{source}: no .txt file in this folder")
        return files
    if not path.is_file():
        raise InputError(f"{source}: no such file or folder; a source is a text file, a folder of .txt files, "
                         "an http(s) address or gutenberg:NUMBER")
    return [path]


def strip_gutenberg(text):
    """The book alone: what stands between Project Gutenberg's START and END lines, without licence and headers.

    Raises InputError where one of them is missing: then it is not the whole book.
    """
    start = re.search(r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG.*?\*\*\*[ \t]*$", text, re.M | re.I | re.S)
    end = re.search(r"^\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG", text, re.M | re.I)
    if not start or not end:
        raise InputError("the START or END line of a Project Gutenberg text is missing: not a book, or half a download")
    return text[start.end():end.start()].strip() + "\n"


def pieces(path):
    """Yield the text of a file in pieces of about PIECE characters, cut where every tokenizer cuts anyway.

    That is before a white-space character that follows another character: encoding the pieces gives the same tokens as
    encoding the whole. Raises InputError for what is not UTF-8 text.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as f:    # reads CRLF as a newline
            while text := f.read(PIECE):
                if "\0" in text:
                    raise InputError(f"{path}: holds NUL bytes: a binary file, not a text")
                rest += text
                cuts = [m.start() + 1 for m in re.finditer(r"\S\s", rest[-4096:])]
                if cuts:
                    cut = max(len(rest) - 4096, 0) + cuts[-1]
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte 0x{e.object[e.start]:02x}, {e.reason}); convert it first, "
                         f"for example with iconv -f latin1 -t utf-8") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    if rest:
        yield rest


def write_text(path, text):
    """Write to a temporary name, then rename: `path` is always a whole file. Raises InputError where the disk is full."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: could not be written ({e.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def digest(files):
    """sha256 over the content of the files, in order."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# the prepared folder


def check_blocks(method, max_lookback, val, test):
    """Raises InputError for parameters of `prepare` that make no sense, or not together."""
    name, n = parse_partition(method)
    if not 1 <= max_lookback <= 65535:
        raise InputError(f"max_lookback must be in 1 … 65535, not {max_lookback}")
    if n and n - 1 > max_lookback:
        raise InputError(f"{method} reaches {n - 1} tokens back, max_lookback allows {max_lookback}: "
                         f"raise max_lookback or use {name}:{max_lookback + 1}")
    if not (val > 0 and test > 0 and val + test < 1):
        raise InputError(f"val and test are fractions of the text, above 0 and together below 1, not {val} and {test}")


def default_folder(source, tokenizer, method, max_lookback, val, test):
    """A folder under data/ that says what is in it; the six digits tell apart what the name leaves out."""
    first = source if isinstance(source, str) else source[0]
    name = re.sub(r"\W+", "-", first if ":" in first else Path(first).stem).strip("-")[:60]
    rest = hashlib.sha256(json.dumps([source, val, test]).encode()).hexdigest()[:6]
    return Path("data") / f"{name}.{tokenizer.replace(':', '')}.{method.replace(':', '')}.{max_lookback}.{rest}"


def prepare(source, out=None, tokenizer="gpt2", method="semantic", max_lookback=256, val=0.1, test=0.1):
    """Make the prepared folder, unless it is there and still fits the source and the parameters. Returns its Path.

    source: a string or a list of strings; val, test: the fractions held out, taken from the end of the text. A folder
    that was made of something else is made again, and the reason printed.
    Raises InputError for a source that is no text or too short, or a full disk; then nothing is left behind.
    """
    check_blocks(method, max_lookback, val, test)
    files = source_files(source)
    # the code counts too: a partitioner that was changed makes other blocks
    made_from = {"source": source, "source_sha256": digest(files), "code_sha256": digest([Path(locality.__file__)]),
                 "tokenizer": tokenizer, "partition": method, "max_lookback": max_lookback, "val": val, "test": test}
    folder = Path(out) if out else default_folder(source, tokenizer, method, max_lookback, val, test)
    remove_stale(folder, ".preparing-{}")
    reason = misfit(folder, made_from)
    if not reason:
        return folder
    foreign = [path.name for path in folder.iterdir() if not re.fullmatch(
        r"(train|val|test)(\.lookback)?\.bin|meta\.json|\.preparing-\d+", path.name)] if folder.exists() else []
    if foreign:
        raise InputError(f"{folder} holds other files ({foreign[0]}, …); prepare into a folder of its own")
    if (folder / "meta.json").exists():
        print(f"{folder} is made again: {reason}")

    encoding = get_encoding(tokenizer)
    vocabulary = token_bytes(encoding)
    new = [path for path in [folder, *folder.parents] if not path.exists()]
    work = folder / f".preparing-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        encode(files, encoding, work / "all.bin")
        if not (work / "all.bin").stat().st_size:
            raise InputError(f"{source}: the text is empty")
        tokens = np.memmap(work / "all.bin", np.uint16, "r")
        n = len(tokens)
        ends = [n - round(n * val) - round(n * test), n - round(n * test), n]
        if min(np.diff([0, *ends])) < 2:
            raise InputError(f"{source}: the text is too short: {n} tokens cannot be split in three")
        words = background(tokens[:ends[0]], vocabulary) if method == "semantic" else None
        counts = {}
        for split, start, end in zip(SPLITS, [0, *ends], ends):
            tokens[start:end].tofile(work / f"{split}.bin")
            with open(work / f"{split}.lookback.bin", "wb") as f:    # a full disk is an error here, in a memory map a crash
                f.truncate(2 * (end - start))
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, 2 * (end - start))
            lookback = np.memmap(work / f"{split}.lookback.bin", np.uint16, "r+")
            partition(tokens[start:end], vocabulary, method, max_lookback, words, out=lookback)
            lookback.flush()
            counts[split] = statistics(tokens[start:end], lookback, vocabulary, method)
            del lookback
        del tokens
        (work / "all.bin").unlink()
        meta = {**made_from, "vocab_size": encoding.n_vocab, "splits": counts,
                "versions": {"python": platform.python_version(), "numpy": np.__version__,
                             "tiktoken": tiktoken.__version__},
                "files": {path.name: digest([path]) for path in sorted(work.iterdir())}, "background": words}
        meta["sha256"] = digest_of(meta)
        write_text(work / "meta.json", json.dumps(meta, indent=1, ensure_ascii=False))
        (folder / "meta.json").unlink(missing_ok=True)    # from here to the last rename the folder counts as not prepared
        for path in sorted(work.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, folder / path.name)
    except OSError as e:
        raise InputError(f"{folder}: could not be written ({e.strerror or e})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not (folder / "meta.json").exists():
            with contextlib.suppress(OSError):    # a folder that is not empty: someone else has put something there
                for path in new:
                    path.rmdir()
    return folder


def misfit(folder, made_from):
    """Why this folder is not a whole, prepared one, from this source with these parameters; "" if it is one."""
    try:
        meta = read_meta(folder)
        tokens = {name: meta["splits"][name.split(".")[0]]["tokens"] for name in meta["files"]}
        whole = all((folder / name).stat().st_size == 2 * n for name, n in tokens.items())
    except (InputError, OSError) as e:
        return str(e)
    other = [key for key, value in made_from.items() if meta.get(key) != value]
    return f"it was made with another {', '.join(other)}" if other else "" if whole else "a file has another length"


def digest_of(meta):
    """sha256 of what meta.json says, apart from this very number."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(folder):
    """meta.json as a dict. Raises InputError if the folder holds no prepared data, or not what prepare_data.py wrote."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{folder}: no prepared data here (no meta.json); run prepare_data.py") from None
    except (ValueError, RecursionError):
        raise InputError(f"{folder}/meta.json is damaged; it has to be prepared again") from None
    if not isinstance(meta, dict) or meta.get("sha256") != digest_of(meta):
        raise InputError(f"{folder}/meta.json was edited, damaged, or written by an earlier version: "
                         "it has to be prepared again")
    return meta


def read_split(folder, split):
    """Token ids and lookbacks of one split, two uint16 memory maps of the same length.

    Raises InputError where one of the files is not, byte for byte, what was prepared: a stale lookback would quietly
    train and measure another model.
    """
    files = read_meta(folder)["files"]
    for name in (f"{split}.bin", f"{split}.lookback.bin"):
        try:
            same = digest([Path(folder) / name]) == files[name]
        except OSError as e:
            raise InputError(f"{folder}/{name} cannot be read ({e.strerror}); delete the folder and prepare again") from None
        if not same:
            raise InputError(f"{folder}/{name} is not what was prepared (edited, damaged or of another preparation): "
                             "delete the folder and prepare again")
    return [np.memmap(Path(folder) / name, np.uint16, "r") for name in (f"{split}.bin", f"{split}.lookback.bin")]


def encode(files, encoding, path):
    """Write the token ids of all files to `path`, <|endoftext|> between two files."""
    bar = tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, desc="encoding", leave=False)
    with open(path, "wb") as out, bar:
        for number, file in enumerate(files):
            if number:
                encoding.encode_to_numpy("<|endoftext|>", allowed_special="all").astype(np.uint16).tofile(out)
            for text in pieces(file):
                encoding.encode_to_numpy(text, allowed_special="all").astype(np.uint16).tofile(out)
                bar.update(len(text.encode()))


def block_starts(lookback):
    """The tokens at which blocks begin. Where a block slides at the cap, a token at a time, no new one begins.

    lookback: (n,) uint16. Returns int64, ascending; reads a memory map stretch by stretch.
    """
    starts = [np.zeros(min(len(lookback), 1), np.int64)]
    for at in range(0, len(lookback), PIECE):
        before = max(at - 1, 0)
        start = np.arange(before, min(at + PIECE, len(lookback))) - lookback[before:at + PIECE]
        starts.append(start[1:][np.diff(start) > 1])
    return np.concatenate(starts)


def statistics(tokens, lookback, vocabulary, method):
    """What meta.json counts of a split: tokens, bytes, blocks and their lengths in tokens. Reads it stretch by stretch."""
    length = np.array([len(b) for b in vocabulary])
    n_bytes = sum(int(length[tokens[at:at + PIECE]].sum()) for at in range(0, len(tokens), PIECE))
    counts = {"tokens": len(tokens), "bytes": n_bytes,
              "mean_lookback": round(float(lookback.sum(dtype=np.int64)) / len(tokens), 2)}
    if not method.startswith("window"):
        starts = block_starts(lookback)
        quartiles = np.percentile(np.diff(starts, append=len(tokens)), (25, 50, 75)).tolist()
        counts |= {"blocks": len(starts), "block_length_quartiles": quartiles}
    return counts


def describe(folder):
    """Print what the partition found, with three boundaries in context."""
    meta = read_meta(folder)
    encoding = get_encoding(meta["tokenizer"])
    counts = meta["splits"]
    print(f"{folder}: " + ", ".join(f"{split} {counts[split]['tokens']:,}" for split in SPLITS) + f" tokens "
          f"({meta['tokenizer']}), {counts['train']['bytes'] / counts['train']['tokens']:.2f} bytes a token")
    train = counts["train"]
    if "blocks" not in train:
        print(f"{meta['partition']}: a sliding window, mean lookback {train['mean_lookback']:.0f} tokens")
        return
    q1, median, q3 = train["block_length_quartiles"]
    print(f"{meta['partition']}: {train['blocks']:,} blocks in train, median length {median:.0f} tokens "
          f"(quartiles {q1:.0f} and {q3:.0f}), mean lookback {train['mean_lookback']:.0f}; three of them begin at")
    tokens, lookback = (np.fromfile(folder / name, np.uint16, PIECE) for name in ("train.bin", "train.lookback.bin"))
    starts = block_starts(lookback)[1:]
    width = 60 if meta["tokenizer"] == "bytes" else 16
    for start in starts[np.linspace(0, len(starts), 5, dtype=int)[1:-1]] if len(starts) > 3 else starts:
        before, after = (encoding.decode(tokens[a:b].tolist()).replace("\n", " ")
                         for a, b in ((max(start - width, 0), start), (start, start + width)))
        print(f"  … {before} ▌{after} …")


def main():
    parser = argparse.ArgumentParser(description="text -> token ids, split, with the block of every token",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", nargs="+", help="text file, folder, http(s) address or gutenberg:NUMBER")
    parser.add_argument("--out", help="folder to write (default: one under data/, named after the source)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, gpt2:N (its first N tokens) or bytes")
    parser.add_argument("--partition", default="semantic", help="semantic, sentence, window:N or block:N")
    parser.add_argument("--max-lookback", type=int, default=256, help="no block reaches back further, in tokens")
    parser.add_argument("--val", type=float, default=0.1, help="fraction of the text for validation")
    parser.add_argument("--test", type=float, default=0.1, help="fraction of the text for the final test")
    args = parser.parse_args()
    source = args.source[0] if len(args.source) == 1 else args.source
    describe(prepare(source, args.out, args.tokenizer, args.partition, args.max_lookback, args.val, args.test))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
