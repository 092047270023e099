"""Short passages of long texts in random order: a text in which topics jump.

    python -m experiments.anthology data/anthology.txt gutenberg:1342 gutenberg:2701 gutenberg:98
    python -m experiments.anthology data/sections.txt wiki.test.tokens --longest 2000 --seed 2

A passage is a few whole paragraphs. In WikiText a line is a paragraph, and a heading (= Title =)
ends a passage and is left out. Between two passages stands <|endoftext|>, so `partition =
"document"` knows the true boundaries. With `joined = true` a newline takes its place, and neither
the model nor another partition is told where a passage ends.

--echo prints some short passages twice in a row. In such a text it pays to look far back.
"""

import argparse
import math
import random
import re
from pathlib import Path

from support.files import InputError, run_script, write_text
from support.sources import pieces, source_files

HEADING = re.compile(r"\s*=.*=\s*")
WIKITEXT = re.compile(r"^ = [^=\n]+ = $", re.M)  # a title
SHORT = 1500  # characters: a passage that is not too long to be echoed


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


def anthology(paths, shortest, longest, echo, seed):
    """The passages of some files (Paths) in random order, a list of strings.

    echo: the share of the passages of at most SHORT characters that is there twice in a row.
    """
    rng, found = random.Random(seed), []
    for path in paths:
        found += passages("".join(pieces(path)), rng, shortest, longest)
    rng.shuffle(found)
    return [p + f"\n\n{p}" * (len(p) <= SHORT and rng.random() < echo) for p in found]


def main():
    parser = argparse.ArgumentParser(description="short passages of long texts, in random order")
    add = parser.add_argument
    add("out", type=Path, help="the text file to write")
    add("source", nargs="+", help="text file, folder, http(s) address or gutenberg:NUMBER")
    add("--shortest", type=int, default=500, help="least characters of a passage")
    add(
        "--longest", type=int, default=3000, help="a passage ends with the paragraph that gets here"
    )
    add("--echo", type=float, default=0.0, help="share of the short passages printed twice")
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    if not 1 <= args.shortest <= args.longest:
        raise InputError(f"--shortest must be in 1 … --longest ({args.longest})")
    if not 0 <= args.echo <= 1:
        raise InputError(f"--echo is a share, 0 … 1, not {args.echo}")
    if args.echo and args.shortest > SHORT:
        raise InputError(f"--echo is for passages of at most {SHORT} characters; lower --shortest")
    how = args.shortest, args.longest, args.echo, args.seed
    found = anthology(source_files(args.source), *how)
    if len(found) < 2:
        raise InputError(f"{len(found)} passages in {args.source}: too few; give a longer text")
    write_text(args.out, "\n<|endoftext|>".join(found) + "\n")
    mean = sum(map(len, found)) / len(found)
    print(f"{args.out}: {len(found):,} passages of {mean:,.0f} characters on average")


if __name__ == "__main__":
    run_script(main)
