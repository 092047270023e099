"""Collect short passages of long texts in random order: a text whose topics jump.

    python -m experiments.anthology data/anthology.txt gutenberg:1342 gutenberg:2701 gutenberg:98
    python -m experiments.anthology data/sections.txt wiki.test.tokens --longest 2000 --seed 2

A passage is a few whole paragraphs. In WikiText every line is a paragraph. A heading (= Title =)
ends a passage and is left out. Passages are separated by <|endoftext|>, so `partition = "document"`
knows the true boundaries. With `joined = true` it is replaced by a newline, and nothing else shows
where a passage ends.

--refrain mixes in a few words of the passages, repeated many times. From these a model learns to
copy what it has seen before, which it has to learn before it can use a long context.
"""

import argparse
import math
import random
import re
from pathlib import Path

from support.files import InputError, check_writable, run_script, write_text
from support.sources import pieces, source_files

HEADING = re.compile(r"\s*=.*=\s*")
WIKITEXT = re.compile(r"^ = [^=\n]+ = $", re.M)  # a title


def passages(text, rng, shortest, longest):
    """Yield the passages of a text, strings. rng: a random.Random.

    Each is a few whole paragraphs, together at least as long as a length that is drawn for it,
    log-uniformly between shortest and longest, in characters. The remainder before a heading, or at
    the end, is a passage if it has `shortest` characters.
    """
    draw = lambda: math.exp(rng.uniform(math.log(shortest), math.log(longest)))
    passage, wanted = "", draw()
    between = r"\n" if WIKITEXT.search(text) else r"\n\s*\n"
    text = text.replace("<|endoftext|>", "\n\n= =\n\n") + "\n\n= ="
    for paragraph in re.split(between, text):
        heading = HEADING.fullmatch(paragraph)
        if not heading:
            passage = f"{passage}\n\n{paragraph.strip()}".strip()
        if len(passage) >= (shortest if heading else wanted):
            yield passage
        if heading or len(passage) >= wanted:
            passage, wanted = "", draw()


def refrain(passage, rng, longest):
    """4 to 80 words of a passage, repeated 2 to 40 times; a string.

    It has at most `longest` characters, not counting the spaces. rng: a random.Random.
    """
    words = passage.split()
    n = round(math.exp(rng.uniform(math.log(4), math.log(80))))
    first = rng.randrange(max(1, len(words) - n))
    line = " ".join(words[first : first + n])[: max(1, longest // 2)]
    times = min(rng.choice((2, 3, 5, 10, 20, 40)), max(2, longest // len(line)))
    return " ".join([line] * times)


def with_refrains(texts, share, longest, seed):
    """Mix refrains into a list of passages: `share` characters of refrain per character of text."""
    rng, mixed, size, refrains = random.Random(seed), [], 0, 0
    for passage in texts:
        mixed.append(passage)
        size += len(passage)
        while refrains < share * size:
            mixed.append(refrain(rng.choice(texts), rng, longest))
            refrains += len(mixed[-1])
    rng.shuffle(mixed)
    return mixed


def anthology(paths, shortest, longest, seed):
    """The passages of text files (Paths) in random order, a list of strings."""
    rng = random.Random(seed)
    texts = [p for path in paths for p in passages("".join(pieces(path)), rng, shortest, longest)]
    rng.shuffle(texts)
    return texts


def main():
    parser = argparse.ArgumentParser(description="short passages of long texts, in random order")
    add = parser.add_argument
    add("out", type=Path, help="the text file to write")
    add("source", nargs="+", help="text file, folder, http(s) address or gutenberg:NUMBER")
    add("--shortest", type=int, default=500, help="minimum length of a passage, in characters")
    add("--longest", type=int, default=3000, help="it ends with the paragraph that gets here")
    add("--refrain", type=float, default=0.0, help="characters of refrain per character of text")
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    if not 1 <= args.longest <= 10**9:
        raise InputError(f"--longest must be in 1 … 1,000,000,000, not {args.longest}")
    if not 1 <= args.shortest <= args.longest:
        raise InputError(f"--shortest must be in 1 … --longest ({args.longest})")
    if not 0 <= args.refrain <= 10:
        raise InputError(f"--refrain must be in 0 … 10, not {args.refrain}")
    if args.out.exists():  # it may be one of the sources
        raise InputError(f"{args.out} already exists; delete it, or choose another name")
    check_writable(args.out)
    texts = anthology(source_files(args.source), args.shortest, args.longest, args.seed)
    if len(texts) < 2:
        raise InputError(f"{args.source} has only {len(texts)} such passages; use a longer text")
    mixed = with_refrains(texts, args.refrain, args.longest, args.seed) if args.refrain else texts
    write_text(args.out, "\n<|endoftext|>".join(mixed) + "\n")
    mean = sum(map(len, texts)) / len(texts)
    refrains = f" and {len(mixed) - len(texts):,} refrains" if args.refrain else ""
    print(f"{args.out}: {len(texts):,} passages of {mean:,.0f} characters on average{refrains}")


if __name__ == "__main__":
    run_script(main)
