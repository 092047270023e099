"""Short passages of long texts in random order: a text in which topics jump.

    python -m experiments.anthology data/anthology.txt gutenberg:1342 gutenberg:2701 gutenberg:98
    python -m experiments.anthology data/sections.txt wiki.test.tokens --longest 2000 --seed 2

A passage is a few whole paragraphs. A heading of WikiText (= Title =) ends a passage and is left
out. Between two passages stands <|endoftext|>, so `partition = "document"` knows the true
boundaries. With `joined = true` a newline takes its place, and neither the model nor another
partition is told where a passage ends.
"""

import argparse
import math
import random
import re
from pathlib import Path

from support.files import InputError, run_script, write_text
from support.sources import pieces, source_files

HEADING = re.compile(r"\s*=.*=\s*")


def passages(text, rng, shortest, longest):
    """Yield the passages of a text, strings.

    Each is a few whole paragraphs, together at least as long as a length drawn for it: log-uniform
    between shortest and longest, in characters. What is left before a heading, or at the end, is a
    passage if it has `shortest` characters. rng: a random.Random.
    """

    def draw():
        return math.exp(rng.uniform(math.log(shortest), math.log(longest)))

    passage, wanted = "", draw()
    for paragraph in [*re.split(r"\n\s*\n", text.replace("<|endoftext|>", "\n\n= =\n\n")), "= ="]:
        heading = HEADING.fullmatch(paragraph)
        if not heading:
            passage = f"{passage}\n\n{paragraph.strip()}".strip()
        if len(passage) >= (shortest if heading else wanted):
            yield passage
        if heading or len(passage) >= wanted:
            passage, wanted = "", draw()


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
    add("--shortest", type=int, default=500, help="characters of a passage, at least about")
    add("--longest", type=int, default=3000, help="characters of a passage, at most about")
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    if not 1 <= args.shortest <= args.longest:
        raise InputError(f"--shortest must be in 1 … --longest ({args.longest})")
    found = anthology(source_files(args.source), args.shortest, args.longest, args.seed)
    if len(found) < 2:
        raise InputError(f"{len(found)} passages in {args.source}: too few; give a longer text")
    write_text(args.out, "\n<|endoftext|>".join(found) + "\n")
    mean = sum(map(len, found)) / len(found)
    print(f"{args.out}: {len(found):,} passages of {mean:,.0f} characters on average")


if __name__ == "__main__":
    run_script(main)
