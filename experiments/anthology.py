"""Short passages of long texts in random order: a text in which topics jump.

    python -m experiments.anthology data/anthology.txt gutenberg:1342 gutenberg:2701 gutenberg:98
    python -m experiments.anthology data/sections.txt wiki.test.tokens --longest 2000 --seed 2

A passage is a few whole paragraphs. In WikiText a line is a paragraph, and a heading (= Title =)
ends a passage and is left out. Between two passages stands <|endoftext|>, so `partition =
"document"` knows the true boundaries. With `joined = true` a newline takes its place, and neither
the model nor another partition is told where a passage ends.

--refrain mixes in some words of the passages, again and again. From these a model learns to copy
what it has seen before, which it has to learn before it can use a long context.
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
    """Yield the passages of a text, strings.

    Each is a few whole paragraphs, together at least as long as a length drawn for it: log-uniform
    between shortest and longest, in characters. What is left before a heading, or at the end, is a
    passage if it has `shortest` characters. rng: a random.Random.
    """

    def draw():
        return math.exp(rng.uniform(math.log(shortest), math.log(longest)))

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
    """4 to 80 words of a passage, 2 to 40 times in a row; a string.

    Not more than `longest` characters in all, but for the spaces. rng: a random.Random.
    """
    words = passage.split()
    n = round(math.exp(rng.uniform(math.log(4), math.log(80))))
    first = rng.randrange(max(1, len(words) - n))
    line = " ".join(words[first : first + n])[: max(1, longest // 2)]
    times = min(rng.choice((2, 3, 5, 10, 20, 40)), max(2, longest // len(line)))
    return " ".join([line] * times)


def with_refrains(found, share, longest, seed):
    """Mix refrains into some passages: `share` characters of them for each one that is there."""
    rng, mixed, size, refrains = random.Random(seed), [], 0, 0
    for passage in found:
        mixed.append(passage)
        size += len(passage)
        while refrains < share * size:
            mixed.append(refrain(rng.choice(found), rng, longest))
            refrains += len(mixed[-1])
    rng.shuffle(mixed)
    return mixed


def anthology(paths, shortest, longest, seed):
    """The passages of some files (Paths) in random order, a list of strings."""
    rng, found = random.Random(seed), []
    for path in paths:
        found += passages("".join(pieces(path)), rng, shortest, longest)
    rng.shuffle(found)
    return found


def main():
    parser = argparse.ArgumentParser(description="short passages of long texts, in random order")
    add = parser.add_argument
    add("out", type=Path, help="the text file to write")
    add("source", nargs="+", help="text file, folder, http(s) address or gutenberg:NUMBER")
    add("--shortest", type=int, default=500, help="least characters of a passage")
    add(
        "--longest", type=int, default=3000, help="a passage ends with the paragraph that gets here"
    )
    add(
        "--refrain",
        type=float,
        default=0.0,
        help="characters of refrains for each character of text",
    )
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    if not 1 <= args.longest <= 10**9:
        raise InputError(f"--longest must be in 1 … 1,000,000,000, not {args.longest}")
    if not 1 <= args.shortest <= args.longest:
        raise InputError(f"--shortest must be in 1 … --longest ({args.longest})")
    if not 0 <= args.refrain <= 10:
        raise InputError(f"--refrain must be in 0 … 10, not {args.refrain}")
    if args.out.exists():  # it may be one of the sources
        raise InputError(f"{args.out} is there already; delete it, or write to another name")
    check_writable(args.out)
    found = anthology(source_files(args.source), args.shortest, args.longest, args.seed)
    if len(found) < 2:
        raise InputError(f"{len(found)} passages in {args.source}: too few; give a longer text")
    mixed = with_refrains(found, args.refrain, args.longest, args.seed) if args.refrain else found
    write_text(args.out, "\n<|endoftext|>".join(mixed) + "\n")
    mean = sum(map(len, found)) / len(found)
    refrains = f" and {len(mixed) - len(found):,} refrains" if args.refrain else ""
    print(f"{args.out}: {len(found):,} passages of {mean:,.0f} characters on average{refrains}")


if __name__ == "__main__":
    run_script(main)
