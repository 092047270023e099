"""How good are the semantic blocks? Against known topic shifts, in figures, and on a page of text.

    python partition_quality.py --books BOOKS.txt [--first] [--tokenizer gpt2] [--no-background] [--seeds N] [--json FILE]
    python partition_quality.py --page data/sample.txt [--from WORDS] [--figure FILE]
    python partition_quality.py --lengths BOOK.txt BOOK.txt BOOK.txt [--figure FILE]

--books makes documents as Choi (2000, "Advances in domain independent linear text segmentation") did: ten pieces, each some
sentences in a row of another text, and asks where one piece ends and the next begins. BOOKS.txt holds the texts, with
<|endoftext|> or a title of WikiText between them. With --first a piece is the first sentences of its text, as Choi had it; else
it comes from anywhere in it, which suits few and long texts. The constants in locality.py were chosen on the texts 1, 4, 7 ...
(counting from 0) of 48 books, and looking at WikiText-2; the documents here are made of the texts 2, 5, 8 ..., and the
background comes from the texts 0, 3, 6 ...
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

import numpy as np

from locality import (
    END_OF_TEXT,
    PERSONS,
    STOP_WORDS,
    InputError,
    Partitioner,
    Stems,
    background,
    partition,
)
from prepare_data import get_encoding, token_bytes

SETS = {"3-11": (3, 11), "3-5": (3, 5), "6-8": (6, 8), "9-11": (9, 11)}
BREAK = re.compile(rb"<\|endoftext\|>|^ = [^=\n]+ = $", re.M)  # between texts
HEADING = re.compile(rb"^ = = .*$", re.M)
BYTES = [bytes([i]) for i in range(256)]
MAX_LOOKBACK = 2048  # tokens


def read(path):
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        data.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text") from e
    if not data.strip():
        raise InputError(f"{path} is empty")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# documents with known topic shifts


def sentences_of(book):
    """The sentences of a book (bytes) of at least four words, on one line each."""
    book = HEADING.sub(b"", book)
    tokens = np.frombuffer(book, np.uint8)
    starts = np.unique(np.arange(len(tokens)) - partition(tokens, BYTES, "sentence", 65535))
    pieces = [b" ".join(book[a:b].split()) for a, b in zip(starts, [*starts[1:], len(book)])]
    return [p for p in pieces if len(p.split()) >= 4]


def choi_documents(sources, shortest, longest, n, rng, first=False, n_pieces=10):
    """n documents of n_pieces runs of shortest ... longest sentences: a list of (sentences, number of the piece of each).

    sources: lists of sentences, a text each. Every piece of a document comes from another text while there are enough: the first
    sentences of it, or else some from anywhere in it.
    """
    documents = []
    for _ in range(n):
        books = (
            rng.sample(sources, n_pieces)
            if len(sources) >= n_pieces
            else rng.choices(sources, k=n_pieces)
        )
        sentences, piece = [], []
        for number, book in enumerate(books):
            size = rng.randint(shortest, longest)
            start = 0 if first else rng.randrange(len(book) - size + 1)
            sentences += book[start : start + size]
            piece += [number] * size
        documents.append((sentences, np.array(piece)))
    return documents


def same_place(sources, n_pieces=10):
    """Ten parts of one book in place of ten books: a harder set, since its parts share author, style and often subject."""
    return [
        [book[len(book) * i // n_pieces : len(book) * (i + 1) // n_pieces] for i in range(n_pieces)]
        for book in sources
    ]


# ---------------------------------------------------------------------------------------------------------------------
# measures: begin[i] is the sentence with which the block begins that is known after sentence i


def p_k(begin, piece):
    """Share of the pairs (i - k, i), k half a mean piece, that are put in the same block though apart, or apart though together.

    Beeferman, Berger & Lafferty 1999. A block start that sentence i has just revealed counts at once, one that it has not does not.
    """
    k = max(1, round(len(piece) / (piece[-1] + 1) / 2))
    i = np.arange(k, len(piece))
    return float(np.mean((begin[i] <= i - k) != (piece[i] == piece[i - k])))


def window_diff(begin, piece):
    """Share of the windows (i - k, i] that hold another number of boundaries than they should (Pevzner & Hearst 2002)."""
    k = max(1, round(len(piece) / (piece[-1] + 1) / 2))
    i = np.arange(k, len(piece))
    found = np.cumsum(np.isin(np.arange(len(piece)), begin) & (np.arange(len(piece)) > 0))
    return float(np.mean(found[i] - found[i - k] != piece[i] - piece[i - k]))


# ---------------------------------------------------------------------------------------------------------------------
# ours, and what it has to beat: (sentences, piece) -> begin


def partitioned(method, encode, vocabulary, known=None, joint=b" "):
    """The blocks of a partition, read at the first token of the sentence that follows."""

    def begins(sentences, piece):
        tokens = encode(joint.join(sentences))
        ends = np.cumsum([len(vocabulary[t]) for t in tokens])
        first_bytes = np.cumsum([0] + [len(s) + len(joint) for s in sentences[:-1]])
        first = np.searchsorted(ends, first_bytes, side="right")  # token of each sentence
        block = np.arange(len(tokens)) - partition(tokens, vocabulary, method, MAX_LOOKBACK, known)
        return (
            np.searchsorted(first, block[np.append(first[1:], len(tokens) - 1)], side="right") - 1
        )

    return begins


def one_block(sentences, piece):
    return np.zeros(len(sentences), int)


def block_per_sentence(sentences, piece):
    return np.arange(len(sentences))


def fixed_blocks(sentences, piece):
    """Blocks of as many sentences as a piece has on average, which the text does not tell."""
    i = np.arange(len(sentences))
    size = round(len(piece) / (piece[-1] + 1))
    return i - i % size


def text_tiling(sentences, piece):
    """Hearst 1997, in NLTK's implementation. It sees the whole document; its cuts fall between sentences, given as paragraphs."""
    from nltk.tokenize import TextTilingTokenizer

    text = "\n\n" + "\n\n".join(s.decode() for s in sentences)
    try:
        tiles = TextTilingTokenizer(stopwords=[*STOP_WORDS, *PERSONS]).tokenize(text)
    except ValueError:  # too short for it
        return one_block(sentences, piece)
    counts = np.cumsum(
        [0] + [len([p for p in tile.split("\n\n") if p.strip()]) for tile in tiles[:-1]]
    )
    return counts[np.searchsorted(counts, np.arange(len(sentences)), side="right") - 1]


def quality(path, encoding, seeds, n, use_background, first):
    """The tables: {title: {rival: {set: (Pk, WindowDiff)}}}, means over `seeds` x n documents a set."""
    books = BREAK.split(read(path))
    if len(books) < 3:
        raise InputError(
            f"{path} holds {len(books)} texts; at least 3 are needed, with {END_OF_TEXT.decode()} between them"
        )
    encoding = get_encoding(encoding)
    vocabulary = token_bytes(encoding)
    encode = lambda text: encoding.encode_to_numpy(text.decode(), allowed_special="all")
    known = (
        background(np.frombuffer(END_OF_TEXT.join(books[0::3]), np.uint8), BYTES)
        if use_background
        else None
    )
    enough = 11 if first else 200
    sources = [s for s in map(sentences_of, books[2::3]) if len(s) >= enough]
    if not sources:
        raise InputError(f"{path}: no text among the 2nd, 5th, 8th ... has {enough} sentences")
    rivals = {"semantic": partitioned("semantic", encode, vocabulary, known)}
    rivals |= {
        "one block": one_block,
        "a block per sentence": block_per_sentence,
        "fixed blocks, mean length": fixed_blocks,
    }
    try:
        import nltk  # noqa: F401

        rivals["TextTiling (sees all)"] = text_tiling
    except ImportError:
        print("nltk is not installed: no TextTiling", file=sys.stderr)
    tables = {}
    groups_of = (
        {"ten texts": [sources]}
        if first
        else {"ten books": [sources], "ten places of one book": same_place(sources)}
    )
    for title, groups in groups_of.items():
        table = tables[title] = {name: {} for name in rivals}
        for name, (shortest, longest) in SETS.items():
            documents = []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {name}")
                for i in range(n):
                    documents += choi_documents(
                        groups[i % len(groups)], shortest, longest, 1, rng, first
                    )
            for rival, begins in rivals.items():
                got = [(begins(*d), d[1]) for d in documents]
                table[rival][name] = (
                    np.mean([p_k(*g) for g in got]),
                    np.mean([window_diff(*g) for g in got]),
                )
    return tables


def print_tables(tables):
    for title, table in tables.items():
        print(
            f"\n{title:26s}"
            + "".join(f"{s:>14s}" for s in SETS)
            + f"{'mean':>14s}\n{'':26s}"
            + "      Pk    WD" * (len(SETS) + 1)
        )
        for rival, row in table.items():
            cells = [*row.values(), np.mean(list(row.values()), axis=0)]
            print(f"{rival:26s}" + "".join(f"{pk:8.3f}{wd:6.3f}" for pk, wd in cells))


# ---------------------------------------------------------------------------------------------------------------------
# figures

COLOURS = [
    "#9ecae9",
    "#ffd08a",
    "#a8dcc0",
    "#f5b8d5",
    "#e9e48c",
]  # apart also for those who do not tell red from green
LINES = ["#0072b2", "#d55e00", "#009e73"]


def trace(text):
    """Every sentence of a text (bytes) as (its first byte, block start known before it ended, after it, evidence in bits).

    The evidence is log2 of the odds, once the sentence has ended, that the block began later than it was thought to.
    """
    tokens = np.frombuffer(text, np.uint8)
    partitioner = Partitioner(BYTES, "semantic", 65535, background(tokens, BYTES))
    sentences, start, block = [], 0, 0
    for token in tokens:
        partitioner.push([token])
        if partitioner.start != start:
            chance = np.clip(partitioner.blocks.chance_later(-1, block), 1e-9, 1 - 1e-9)
            bits = np.log2(chance / (1 - chance)) if block < start else -np.inf
            sentences.append((start, block, partitioner.block, bits))
            start, block = partitioner.start, partitioner.block
    return sentences


def draw_page(path, first_line, figure):
    """A page of a text in the colours of its blocks, the evidence after each sentence, words said again in their block in bold."""
    import matplotlib.pyplot as plt

    text = read(path)
    sentences = trace(text)
    starts = np.array([s[0] for s in sentences])
    blocks = np.unique([s[2] for s in sentences])
    evidence = {next_: s for s, next_ in zip(sentences, [*starts[1:].tolist(), len(text)])}
    stems = Stems()

    paragraphs = {0} | {i for i in starts.tolist() if text[:i].rstrip(b" ").endswith(b"\n")}
    hits = np.mean([b in paragraphs for b in blocks.tolist()[1:]])
    print(
        f"{len(starts)} sentences, {len(blocks)} blocks; {hits:.0%} of the blocks begin a paragraph, {len(paragraphs) / len(starts):.0%} of the sentences do"
    )

    position = text.find(first_line.encode())
    if position < 0:
        raise InputError(f"{path} does not hold the words {first_line!r}")
    position = int(blocks[np.searchsorted(blocks, position, side="right") - 1])
    width, height, size = 104, 38, 8.0
    cell = 0.602 * size / 72  # inches a character
    fig = plt.figure(figsize=((width + 4) * cell, (height + 10) * cell * 2.25))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-2, width + 2), ylim=(height + 5.5, -4.5))
    ax.axis("off")
    x = y = 0.0
    said = {}
    for word in re.finditer(rb"\S+", text[position:]):
        at = position + word.start()
        number = int(np.searchsorted(blocks, at, side="right"))
        colour = COLOURS[number % len(COLOURS)]
        shown = word[0].decode(errors="replace")
        if at in evidence and at > position:
            _, before, after, bits = evidence[at]
            label = f"{bits:+.0f}".replace("-", "−") if np.isfinite(bits) else ""
            style = (
                {"weight": "bold", "color": "#b00000"} if after > before else {"color": "#555555"}
            )
            ax.text(
                x,
                y - 0.12,
                label,
                size=size * 0.72,
                family="DejaVu Sans Mono",
                va="center",
                **style,
            )
            x += len(label) * 0.72 + 0.8
        if b"\n\n" in text[at - 3 : at] and at > position:
            x, y = 0, y + 1.5
        elif x + len(shown) > width:
            x, y = 0, y + 1
        if y > height:
            break
        again = False
        for stem in stems.of([word[0]])[0].tolist():
            again |= said.get(stem) == number and stem >= len(PERSONS)
            said[stem] = number
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), len(shown) + 1, 1, color=colour, lw=0))
        ax.text(
            x,
            y,
            shown,
            size=size,
            family="DejaVu Sans Mono",
            va="center",
            weight="bold" if again else "normal",
        )
        x += len(shown) + 1
    title = f"{Path(path).name}: each colour is a block, found while reading, without looking ahead"
    key = (
        "Bold: a word that was said in the block before. Small numbers: bits of evidence, at the end of a sentence, that a new block has begun\n"
        "(−3: odds of 1 to 8). Red: that was enough; the new colour begins where the new block is thought to have begun, up to a few sentences back.\n"
        f"In the whole text {hits:.0%} of the blocks begin with a paragraph, against {len(paragraphs) / len(starts):.0%} of the sentences do. (A paragraph makes a break likelier; the words decide.)"
    )
    ax.text(-0.5, -2.6, title, size=size * 1.25, weight="bold", va="center")
    ax.text(-0.5, height + 3.2, key, size=size * 0.82, va="center", linespacing=1.5)
    save(fig, figure or "figures/semantic_blocks.png")


def draw_lengths(paths, figure):
    """Print and plot how long the blocks of each text are, in words."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    bins = np.geomspace(4, 1000, 28)
    for path, colour, style in zip(paths, LINES * len(paths), ["-", "--", ":"] * len(paths)):
        text = np.frombuffer(read(path), np.uint8)
        begin = np.unique(
            np.arange(len(text))
            - partition(text, BYTES, "semantic", 65535, background(text, BYTES)).astype(np.int64)
        )
        words = np.array(
            [len(text[a:b].tobytes().split()) for a, b in zip(begin, [*begin[1:], len(text)])]
        )
        low, middle, high = np.percentile(words, [25, 50, 75])
        name = Path(path).stem
        print(
            f"{name}: {len(words)} blocks, of {middle:.0f} words at the median, quartiles {low:.0f} and {high:.0f}, longest {words.max()}"
        )
        share, _ = np.histogram(words, bins)
        ax.stairs(
            share / len(words),
            bins,
            color=colour,
            linestyle=style,
            lw=2,
            label=f"{name} (median {middle:.0f})",
        )
    ax.set(
        xscale="log",
        xlabel="length of a block, words",
        ylabel="share of the blocks",
        title="Block length follows the text",
    )
    ax.set_xticks([5, 10, 20, 50, 100, 200, 500, 1000], [5, 10, 20, 50, 100, 200, 500, 1000])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    save(fig, figure or "figures/block_lengths.png")


def save(fig, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    print(f"drew {path}")


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--books", metavar="FILE", help="text of many books, with <|endoftext|> between them"
    )
    what.add_argument(
        "--page", metavar="FILE", help="draw a page of this text in the colours of its blocks"
    )
    what.add_argument(
        "--lengths", metavar="FILE", nargs="+", help="draw how long the blocks of these texts are"
    )
    parser.add_argument(
        "--first",
        action="store_true",
        help="pieces are the first sentences of their texts, not any",
    )
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="bytes")
    parser.add_argument(
        "--no-background",
        action="store_true",
        help="start from nothing instead of the words of other books",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--documents", type=int, default=50, help="documents a set and seed (default 50)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the table here too")
    parser.add_argument(
        "--from",
        dest="first_line",
        default="",
        metavar="WORDS",
        help="words of the text with whose block the page begins",
    )
    parser.add_argument("--figure", metavar="FILE", help="where to draw (default: under figures/)")
    args = parser.parse_args()
    if args.seeds < 1 or args.documents < 1:
        raise InputError("--seeds and --documents must be at least 1")
    if args.page:
        draw_page(args.page, args.first_line, args.figure)
    elif args.lengths:
        draw_lengths(args.lengths, args.figure)
    else:
        tables = quality(
            args.books,
            args.tokenizer,
            args.seeds,
            args.documents,
            not args.no_background,
            args.first,
        )
        print_tables(tables)
        if args.json:
            Path(args.json).write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(f"partition_quality.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
