"""From a text to token ids, in three splits, with the block of every token beside them.

    python prepare_data.py data/sample.txt --tokenizer bytes
    python prepare_data.py gutenberg:2529
    python prepare_data.py my_book.txt --partition block:64 --data data/my_book

A source is a text file, a folder of .txt files, an http(s) address, or gutenberg:NUMBER. Several
sources become one corpus, with <|endoftext|> between the texts. train.py prepares its text in the
same way; it takes the same flags. support/prepared.py describes the folder.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import hashlib
import json
import platform
import sys
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import locality
from fast import evidence
from locality import (
    check_causal,
    count_background,
    parse_partition,
    partition_names,
    partition_text,
)
from report import blocks
from report.blocks import block_stats
from support import files, gutenberg, prepared, sentences, settings, sources, tokenizers
from support.files import InputError
from support.prepared import SPLITS
from support.sentences import END_OF_TEXT
from support.settings import key
from support.sources import pieces, slug
from support.tokenizers import check_tokenizer, get_encoding, token_bytes, token_ids

STRETCH = 1 << 22  # tokens in memory at a time


@dataclass
class TextConfig:
    """A text, and how it becomes tokens and blocks. Raises InputError for impossible values."""

    source: str | list = key(
        "data/sample.txt", "file, folder, http(s) address, gutenberg:NUMBER, or a list of these"
    )
    tokenizer: str = key("gpt2", "gpt2, gpt2:N (its first N tokens), sample or bytes")
    partition: str = key("semantic", partition_names())
    max_lookback: int = key(512, "no block reaches back further, in tokens", 1, below=65536)
    val: float = key(0.1, "fraction of the text for validation")
    test: float = key(0.1, "fraction of the text for the final test")
    joined: bool = key(False, "replace <|endoftext|> with a newline, so that documents are joined")
    data: str = key("", "prepared folder; empty: one under data/, named after the source")
    plain: bool = key(False, "run the code of the lesson without fast/: slow, for changing it")

    def __post_init__(self):
        settings.check(self)
        sources = self.source if isinstance(self.source, list) else [self.source]
        if not sources or not all(s and isinstance(s, str) for s in sources):
            raise InputError("source must name a text, or be a list of names")
        check_tokenizer(self.tokenizer)
        check_partition(self.partition, self.max_lookback)
        if not (self.val > 0 and self.test > 0 and self.val + self.test < 1):
            raise InputError(
                f"val and test are fractions of the text: above 0, and together below 1, not "
                f"{self.val} and {self.test}"
            )

    @classmethod
    def of(cls, config, **changes):
        """The part of a config, a dict, that is about the text, with some values changed."""
        return cls(**{**{f.name: config[f.name] for f in fields(cls)}, **changes})


# --------------------------------------------------------------------------------------------------
# tokens


def encode(paths, encoding, out):
    """Write the token ids of all files to `out`, uint16, with <|endoftext|> between two files.

    Returns the sha256 of what it read, in the form of files.digest.
    """
    n_bytes = sum(path.stat().st_size for path in paths)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="encoding", leave=False, disable=None)
    total = hashlib.sha256()
    with open(out, "wb") as f, bar:
        for number, path in enumerate(paths):
            between, digest = ["<|endoftext|>"] if number else [], hashlib.sha256()
            for text in chain(between, pieces(path, digest.update)):
                token_ids(encoding, text, path).tofile(f)
                bar.update(len(text.encode()))
            total.update(digest.digest())
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------
# the splits: tokens and lookbacks


def check_partition(partition, max_lookback, n_tokens=None):
    """Raises InputError for a partition that does not fit max_lookback, or shifted:N that would
    leave too much of n_tokens unchanged."""
    _, n = parse_partition(partition)
    name = partition.partition(":")[0]
    if n and n - 1 > max_lookback and name != "shifted":
        raise InputError(
            f"{partition} reaches back {n - 1} tokens, but max_lookback allows {max_lookback}: use "
            f"{name}:{max_lookback + 1}, or a larger max_lookback"
        )
    if name == "shifted" and n_tokens is not None and n > n_tokens / 4:
        raise InputError(
            f"{partition} leaves the first {n} tokens of a split as they are, more than a quarter "
            f"of its {n_tokens}: use a smaller N, or a longer text"
        )


def default_folder(text):
    """A folder under data/, named after the main settings and a six-digit hash of the others."""
    omitted = [text.source, text.val, text.test, *["joined"] * text.joined, *["plain"] * text.plain]
    digits = hashlib.sha256(json.dumps(omitted).encode()).hexdigest()[:6]
    name = f"{slug(text.source)}.{text.tokenizer}.{text.partition}.{text.max_lookback}.{digits}"
    return Path("data") / name.replace(":", "")


def prepare(text, trained_on=None):
    """The Prepared folder of a TextConfig, built if it is missing or stale.

    trained_on: what the checkpoint of a run says about its text. If it is given, the tokens and
    blocks must match it. Since the run may come from an untrusted source, nothing is downloaded
    then, and files are written only under data/ in the working directory.
    Raises InputError for a text that cannot be read, is too short, or has changed.
    """
    folder, cwd, reason = Path(text.data or default_folder(text)), "", ""
    # the code that makes tokens and blocks is part of the recipe; schedules do not affect them
    modules = locality, sentences, evidence, sources, gutenberg, tokenizers
    code = files.digest_code(
        [__file__, *(module.__file__ for module in modules)],
        without=tuple(
            "SCHEDULES RIVALS schedule_names schedule local_layers describe main".split()
        ),
    )
    recipe = {f.name: getattr(text, f.name) for f in fields(TextConfig) if f.name != "data"}
    recipe["code_sha256"] = code
    if trained_on:
        cwd = prepared.find_cwd(text.source, folder, trained_on)
        own, expected = Path(cwd, folder), {**recipe, "source_sha256": trained_on["source_sha256"]}
        reason = prepared.stale_because(own, expected)
        folder = default_folder(text) if reason else own
    make = partial(build, text)
    data = prepared.open_or_build(folder, recipe, cwd, make, fetch=not trained_on)
    if trained_on:
        prepared.check_identity(data, trained_on)
    if reason and own.exists() and own != folder:
        print(f"using {folder}, because {own} cannot be used: {reason}", file=sys.stderr)
    return data


def build(text, paths, work):
    """Write the tokens and lookbacks of each split of a TextConfig to the folder `work`.

    paths: of its text files. Returns what meta.json says about them, a dict. Raises InputError.
    """
    encoding = get_encoding(text.tokenizer)
    vocabulary = token_bytes(encoding)
    source_sha256 = encode(paths, encoding, work / "all.bin")
    if not (work / "all.bin").stat().st_size:
        raise InputError(f"{text.source}: the text is empty")
    tokens = np.memmap(work / "all.bin", np.uint16, "r+")
    n = len(tokens)
    edges = [0, n - round(n * text.val) - round(n * text.test), n - round(n * text.test), n]
    shortest = min(np.diff(edges))
    if shortest < 2:
        raise InputError(
            f"{text.source}: the text is too short: {n} tokens cannot be split in three"
        )
    check_partition(text.partition, text.max_lookback, shortest)
    if text.joined and text.partition != "document":
        join_documents(tokens, vocabulary)
    reads_words = parse_partition(text.partition)[0].reads_words
    background = count_background(tokens[: edges[1]], vocabulary) if reads_words else None
    stats, rules = {}, (text.partition, text.max_lookback)
    check_causal(tokens, vocabulary, *rules, background, text.plain)
    for split, start, end in zip(SPLITS, edges, edges[1:]):
        part = tokens[start:end]
        lookback = prepared.new_array(work / f"{split}.lookback.bin", end - start)
        partition_text(part, vocabulary, *rules, background, lookback, text.plain)
        lookback.flush()
        if text.joined:
            join_documents(part, vocabulary)
        part.tofile(work / f"{split}.bin")
        stats[split] = block_stats(part, lookback, vocabulary, *rules)
    del tokens, part
    (work / "all.bin").unlink()
    return {
        "source_sha256": source_sha256,
        "vocab_size": encoding.n_vocab,
        "splits": stats,
        "background": background,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tiktoken": tiktoken.__version__,
        },
    }


def join_documents(tokens, vocabulary):
    """Replace every <|endoftext|> with a newline, in place. tokens: (n,) uint16.

    vocabulary: the bytes of each token, a list. Raises InputError if it has no <|endoftext|>.
    """
    if END_OF_TEXT not in vocabulary:
        raise InputError("joined needs a tokenizer that has <|endoftext|>: gpt2 or gpt2:N")
    end_of_text, newline = vocabulary.index(END_OF_TEXT), vocabulary.index(b"\n")
    for at in range(0, len(tokens), STRETCH):
        stretch = tokens[at : at + STRETCH]
        stretch[stretch == end_of_text] = newline


def read_contexts(arrays, starts, T, device):
    """T values of each of several arrays, (n,) integers, from each start: a list of (B, T) int64.

    To get the targets, pass tokens[1:] as another array.
    """
    contexts = []
    for values in arrays:
        rows = np.stack([values[start : start + T] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64))  # (B, T)
        rows = rows.pin_memory() if device.type == "cuda" else rows
        contexts.append(rows.to(device, non_blocking=device.type == "cuda"))
    return contexts


def describe(data):
    """What the training split of a Prepared folder contains, with three block boundaries: text."""
    tokens, lookback = data.split("train")
    vocabulary = token_bytes(get_encoding(data.meta["tokenizer"]))
    return blocks.describe(data.folder, data.meta, tokens, lookback, vocabulary)


def main():
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nFlags, --key value:\n{settings.usage(TextConfig)}")
        return
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    values = settings.read_flags(TextConfig, argv[first_flag:])
    if (sources := argv[:first_flag]) and "source" in values:
        raise InputError("name the sources before the flags, or with --source, but not both")
    if sources:
        values["source"] = sources[0] if len(sources) == 1 else sources
    if "source" not in values:
        raise InputError("give a text, for example data/sample.txt; --help lists the flags")
    print(describe(prepare(TextConfig(**values))))


if __name__ == "__main__":
    files.run_script(main)
