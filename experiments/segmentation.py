"""How good are the semantic blocks? Known topic shifts, a page of text, and block lengths.

    python -m experiments.segmentation --books BOOKS.txt [--first] [--seeds N] [--json FILE]
    python -m experiments.segmentation --haste --books BOOKS.txt [--seeds N] [--json FILE]
    python -m experiments.segmentation --page data/sample.txt [--from WORDS] [--figure FILE]
    python -m experiments.segmentation --lengths BOOK.txt BOOK.txt BOOK.txt [--figure FILE]

--books makes documents whose topic shifts are known, as Choi did (2000, "Advances in domain
independent linear text segmentation"). A document is ten pieces, and each piece is a few
consecutive sentences of another text. The task is to find where one piece ends and the next
begins. BOOKS.txt holds the texts, separated by <|endoftext|> or a title of WikiText. With --first
a piece is the first sentences of its text, like Choi's. Otherwise it can come from anywhere in the
text, which suits a few long texts.

--haste measures what it costs to decide sooner. A block starts when the odds for a new block are
good enough (SURE in locality.py). With lower odds the start is known sooner, and is wrong more
often.

Counting from 0, the documents are made of texts 2, 5, 8 ..., and the background words come from
texts 0, 3, 6 ... The constants in locality.py were chosen on texts 1, 4, 7 ... of 48 books, with
WikiText-2 in view.
"""

import argparse
import importlib.util
import random
import re
import sys
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

import locality
from locality import Partitioner, count_background, partition_text
from prepare_data import get_encoding, token_bytes
from report.blocks import block_moves
from support.files import InputError, check_writable, run_script, write_json
from report.plots import COLORS, bare, check_suffix, pyplot, save_figure
from support.sentences import END_OF_TEXT, FUNCTION_WORDS, STOP_WORDS, WordIds, first_bytes

PIECES = 10  # of a document
SETS = {"3-11": (3, 11), "3-5": (3, 5), "6-8": (6, 8), "9-11": (9, 11)}  # sentences of a piece
BREAK = re.compile(rb"<\|endoftext\|>|^ = [^=\n]+ = $", re.M)  # between texts
HEADING = re.compile(rb"^ = = .*$", re.M)
BYTES = [bytes([i]) for i in range(256)]
MAX_LOOKBACK = 2048  # tokens
SURES = 0.5, 0.6, 0.8, 0.9, 0.95, 0.99  # for --haste
ANY_LENGTH = 65535  # bytes: a lookback that cuts no block


def read(path):
    """The bytes of a UTF-8 text file. Raises InputError."""
    try:
        text = Path(path).read_bytes()
        text.decode()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text") from e
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


# the calls to locality.py: text as bytes, or as tokens with the bytes of each


def word_counts(text):
    """The background of a text (bytes): how often it has each word."""
    return count_background(np.frombuffer(text, np.uint8), BYTES)


def lookbacks(tokens, vocabulary, partition, counts, max_lookback=MAX_LOOKBACK):
    """The lookback of each token, (n,) uint16."""
    return partition_text(tokens, vocabulary, partition, max_lookback, counts)


def pieces_at(text, starts):
    """A text (bytes), cut where each piece starts: a list of bytes."""
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


# --------------------------------------------------------------------------------------------------
# documents with known topic shifts


def sentences_of(book):
    """The sentences of a book (bytes) of at least four words, each on one line."""
    text = HEADING.sub(b"", book)
    words = [sentence.split() for sentence in pieces_at(text, first_bytes(text))]
    return [b" ".join(w) for w in words if len(w) >= 4]


def choi_document(sources, shortest, longest, rng, first=False):
    """A document of PIECES runs of sentences: (sentences, the number of each sentence's piece).

    sources: the sentences of each text, a list of lists. Each piece comes from another text if
    there are enough. first: take the first sentences of the text, and not any.
    """
    enough = len(sources) >= PIECES
    texts = rng.sample(sources, PIECES) if enough else rng.choices(sources, k=PIECES)
    sentences, piece = [], []
    for number, text in enumerate(texts):
        size = rng.randint(shortest, longest)
        start = 0 if first else rng.randrange(len(text) - size + 1)
        sentences += text[start : start + size]
        piece += [number] * size
    return sentences, np.array(piece)


def choi_documents(sources, name, seeds, n, first):
    """n documents of the set `name` per seed. sources: one list of texts, or several in turn."""
    documents = []
    for seed in range(seeds):
        rng = random.Random(f"{seed} {name}")
        for i in range(n):
            texts = sources[i % len(sources)]
            documents.append(choi_document(texts, *SETS[name], rng, first))
    return documents


def parts_of(book):
    """Ten parts of one book, to be used like ten books.

    They are harder to tell apart: they share an author, a style and often a subject.
    """
    edges = [len(book) * i // PIECES for i in range(PIECES + 1)]
    return [book[a:b] for a, b in zip(edges, edges[1:])]


# --------------------------------------------------------------------------------------------------
# measures
#
# begin[i]: the first sentence of the block of sentence i, as far as it is known after sentence i
# piece[i]: the number of the piece of sentence i


def half_a_piece(piece):
    return max(1, round(len(piece) / (piece[-1] + 1) / 2))


def p_k(begin, piece):
    """The share of pairs (i - k, i) that are wrong: in one block but two pieces, or the reverse.

    k is half a mean piece (Beeferman, Berger & Lafferty 1999). A block start counts as soon as
    sentence i has revealed it, and not before.
    """
    k = half_a_piece(piece)
    i = np.arange(k, len(piece))
    return float(np.mean((begin[i] <= i - k) != (piece[i] == piece[i - k])))


def window_diff(begin, piece):
    """The share of windows (i - k, i] in which the number of boundaries is wrong.

    k is half a mean piece (Pevzner & Hearst 2002).
    """
    k = half_a_piece(piece)
    i = np.arange(k, len(piece))
    count = np.cumsum(np.isin(np.arange(len(piece)), begin) & (np.arange(len(piece)) > 0))
    return float(np.mean(count[i] - count[i - k] != piece[i] - piece[i - k]))


def mean_scores(begins, documents):
    """[Pk, WindowDiff], means over documents. begins: (sentences, piece) -> begin."""
    results = [(begins(sentences, piece), piece) for sentences, piece in documents]
    return np.mean([(p_k(*r), window_diff(*r)) for r in results], axis=0).tolist()


# --------------------------------------------------------------------------------------------------
# ours, and its rivals: (sentences, piece) -> begin


def semantic(encoding, counts):
    """Our blocks, as they are known at the first token of the next sentence."""
    vocabulary = token_bytes(encoding)

    def begins(sentences, piece):
        text = b" ".join(sentences).decode()
        tokens = encoding.encode_to_numpy(text, allowed_special="all")
        ends = np.cumsum([len(vocabulary[t]) for t in tokens])
        first_bytes = np.cumsum([0] + [len(s) + 1 for s in sentences[:-1]])
        first = np.searchsorted(ends, first_bytes, side="right")  # token of each sentence
        block = np.arange(len(tokens)) - lookbacks(tokens, vocabulary, "semantic", counts)
        known_at = np.append(first[1:], len(tokens) - 1)
        return np.searchsorted(first, block[known_at], side="right") - 1

    return begins


def fixed_blocks(sentences, piece):
    """Blocks as long as the mean piece, which the text itself does not tell."""
    i = np.arange(len(sentences))
    return i - i % round(len(piece) / (piece[-1] + 1))


def text_tiling(sentences, piece):
    """TextTiling (Hearst 1997) of NLTK. It sees the whole document.

    It only cuts between paragraphs, so every sentence is given as a paragraph.
    """
    from nltk.tokenize import TextTilingTokenizer

    text = "\n\n" + "\n\n".join(s.decode() for s in sentences)
    try:
        tiles = TextTilingTokenizer(stopwords=[*STOP_WORDS, *FUNCTION_WORDS]).tokenize(text)
    except ValueError:  # too short for it
        return 0 * piece
    sizes = [sum(bool(p.strip()) for p in tile.split("\n\n")) for tile in tiles]
    counts = np.cumsum([0, *sizes[:-1]])
    return counts[np.searchsorted(counts, np.arange(len(sentences)), side="right") - 1]


def rivals(encoding, counts):
    """{name: (sentences, piece) -> begin}"""
    contest = {
        "semantic": semantic(encoding, counts),
        "one block": lambda sentences, piece: 0 * piece,
        "a block per sentence": lambda sentences, piece: np.arange(len(piece)),
        "fixed blocks, mean length": fixed_blocks,
    }
    if importlib.util.find_spec("nltk"):
        contest["TextTiling (sees all)"] = text_tiling
    else:
        print("nltk is not installed: no TextTiling", file=sys.stderr)
    return contest


def read_books(path, use_background, first):
    """(sentences of texts 2, 5, 8 ... of a file, a list of lists; word counts of 0, 3, 6 ...).

    The counts are None without use_background. Raises InputError if there are too few texts.
    """
    books = BREAK.split(read(path))
    if len(books) < 3:
        raise InputError(
            f"{path} holds {len(books)} texts; at least 3 are needed, separated by <|endoftext|>"
        )
    enough = 11 if first else 200
    sources = [s for s in map(sentences_of, books[2::3]) if len(s) >= enough]
    if not sources:
        raise InputError(f"{path}: none of the texts 2, 5, 8 ... has {enough} sentences")
    return sources, word_counts(END_OF_TEXT.join(books[0::3])) if use_background else None


def quality(path, tokenizer, seeds, n, use_background, first):
    """The tables: {title: {rival: {set: (Pk, WindowDiff)}}}, means over `seeds` x n documents."""
    sources, counts = read_books(path, use_background, first)
    contest = rivals(get_encoding(tokenizer), counts)
    groups_of = {"ten books": [sources], "ten places of one book": [*map(parts_of, sources)]}
    if first:
        groups_of = {"ten texts": [sources]}
    tables = {title: {rival: {} for rival in contest} for title in groups_of}
    for title, groups in groups_of.items():
        for name in SETS:
            documents = choi_documents(groups, name, seeds, n, first)
            for rival, begins in contest.items():
                tables[title][rival][name] = mean_scores(begins, documents)
    return tables


def haste(path, tokenizer, seeds, n, use_background, first):
    """What it costs to decide sooner: a list of dicts, one per value of SURE.

    sure; Pk and WindowDiff; lag, the median number of tokens from the start of a block to where it
    is known; mean lookback, in tokens, of the blocks and of the same blocks closed. Means over
    `seeds` x n documents of pieces of 3 to 11 sentences.
    """
    sources, counts = read_books(path, use_background, first)
    encoding, rows, usual = get_encoding(tokenizer), [], locality.SURE
    vocabulary = token_bytes(encoding)
    documents = choi_documents([sources], "3-11", seeds, n, first)
    texts = [encoding.encode_to_numpy(b" ".join(s).decode()) for s, _ in documents]
    try:
        for sure in SURES:
            locality.SURE = sure
            scores = mean_scores(semantic(encoding, counts), documents)
            names = "semantic", "semantic:closed"
            blocks = [[lookbacks(t, vocabulary, name, counts) for name in names] for t in texts]
            lags = [np.subtract(*block_moves(lookback)) for lookback, _ in blocks]
            means = np.mean([[b.mean(dtype=float) for b in pair] for pair in blocks], axis=0)
            keys = "sure", "Pk", "WindowDiff", "lag", "mean lookback", "closed"
            lag = np.median(np.concatenate(lags))
            rows.append(dict(zip(keys, map(float, (sure, *scores, lag, *means)))))
    finally:
        locality.SURE = usual
    return rows


def print_haste(rows):
    print("how sure      Pk    WD   lag, tokens   mean lookback   the same, closed")
    for row in rows:
        usual = "  (the default)" if row["sure"] == locality.SURE else ""
        print(
            f"{row['sure']:8.2f}{row['Pk']:8.3f}{row['WindowDiff']:6.3f}{row['lag']:14.0f}"
            f"{row['mean lookback']:16.0f}{row['closed']:19.0f}{usual}"
        )


def print_tables(tables):
    for title, table in tables.items():
        print(f"\n{title:26s}" + "".join(f"{name:>14s}" for name in [*SETS, "mean"]))
        print(" " * 26 + "      Pk    WD" * (len(SETS) + 1))
        for rival, row in table.items():
            cells = [*row.values(), np.mean(list(row.values()), axis=0)]
            print(f"{rival:26s}" + "".join(f"{pk:8.3f}{wd:6.3f}" for pk, wd in cells))


# --------------------------------------------------------------------------------------------------
# a page of text in the colors of its blocks

TINTS = ("#9ecae9", "#ffd08a", "#a8dcc0", "#f5b8d5", "#e9e48c")  # distinct for the color-blind, too
WIDTH, HEIGHT = 104, 38  # of a page, in characters and lines
SIZE = 9.2  # of its letters, in points: 10 pixels wide in a PNG, so words are evenly spaced
MONO = {"family": "DejaVu Sans Mono", "va": "center"}


class Sentence(NamedTuple):
    """A sentence, and the state of the partitioner at its end."""

    start: int  # first byte of the sentence
    next: int  # first byte of the next one
    block: int  # first byte of the current block
    moved: bool  # whether that block is new
    bits: float  # log2 of the odds that the block before it has ended


def trace(text):
    """All sentences of a text (bytes) in the partitioner's reading order, a list."""
    partitioner = Partitioner(BYTES, "semantic", ANY_LENGTH, word_counts(text))
    sentences, start, block = [], 0, 0
    for token in text:
        partitioner.push([token])
        if partitioner.start != start:
            bits = partitioner.change_points.bits_later(-1, block) if block < start else -np.inf
            moved = partitioner.block > block
            sentences.append(Sentence(start, partitioner.start, partitioner.block, moved, bits))
            start, block = partitioner.start, partitioner.block
    return sentences


def draw_page(path, words, figure):
    """Draw a page of a text, starting with the block that holds `words`.

    Each block has a color. Each sentence is followed by its evidence. Words that the block repeats
    are bold.
    """
    text = read(path)
    position = text.find(words.encode())
    if position < 0:
        raise InputError(f"{path} does not contain the words {words!r}")
    sentences = trace(text)
    starts = {s.start for s in sentences}
    blocks = sorted({s.block for s in sentences})
    if len(blocks) < 2:
        raise InputError(f"{path} is too short: all of it is one block")
    paragraphs = starts & {0, *(line.end() for line in re.finditer(rb"\n *", text))}
    share = np.mean([block in paragraphs for block in blocks[1:]])
    shares = (
        f"{share:.0%} of the blocks begin a paragraph, "
        f"and {len(paragraphs) / len(starts):.0%} of the sentences"
    )
    print(f"{len(starts)} sentences, {len(blocks)} blocks; {shares}")

    cell = 0.602 * SIZE / 72  # inches per character
    fig = pyplot().figure(figsize=((WIDTH + 4) * cell, (HEIGHT + 10) * cell * 2.25))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-2, WIDTH + 2), ylim=(HEIGHT + 5.5, -4.5))
    ax.axis("off")
    position = blocks[np.searchsorted(blocks, position, side="right") - 1]
    write_page(ax, text, position, sentences, blocks)
    title = f"{Path(path).name}: each color is a block, found while reading, without looking ahead"
    ax.text(-0.5, -2.6, title, size=SIZE * 1.25, weight="bold", va="center")
    key = (
        "Bold: a word that its block has used before. Small numbers: at the end of a sentence, the "
        "bits of evidence that a new block has begun\n(−3: odds of 1 to 8). Red: that was enough; "
        "the new color begins where the new block seems to begin, up to a few sentences back.\n"
        f"In the whole text, {shares}. (A paragraph makes a break likelier; the words decide.)"
    )
    ax.text(-0.5, HEIGHT + 3.2, key, size=SIZE * 0.82, va="center", linespacing=1.5)
    save(fig, figure or Path("figures/semantic_blocks.png"))


def write_page(ax, text, position, sentences, blocks):
    """Write a text from byte `position` on, word by word, until the page is full."""
    ended = {s.next: s for s in sentences}
    word_ids, last_block = WordIds(), {}  # word id: the last block that used it
    x = y = 0.0
    for word in re.compile(rb"\S+").finditer(text, position):
        at, shown = word.start(), word[0].decode(errors="replace")
        block = int(np.searchsorted(blocks, at, side="right"))
        if at > position:
            if at in ended:
                x += write_evidence(ax, x, y, ended[at])
            if b"\n\n" in text[at - 3 : at]:
                x, y = 0, y + 1.5
            elif x + len(shown) > WIDTH:
                x, y = 0, y + 1
        if y > HEIGHT:
            break
        again = False
        for i in word_ids.of([word[0]])[0].tolist():
            again |= last_block.get(i) == block and i >= len(FUNCTION_WORDS)
            last_block[i] = block
        color = TINTS[block % len(TINTS)]
        box = pyplot().Rectangle((x - 0.5, y - 0.5), len(shown) + 1, 1, color=color, lw=0)
        ax.add_patch(box)
        ax.text(x, y, shown, size=SIZE, weight="bold" if again else "normal", **MONO)
        x += len(shown) + 1


def write_evidence(ax, x, y, sentence):
    """Write the bits of evidence after a sentence. Returns the width, in characters."""
    label = f"{sentence.bits:+.0f}".replace("-", "−") if np.isfinite(sentence.bits) else ""
    style = {"weight": "bold", "color": "#b00000"} if sentence.moved else {"color": "#555555"}
    ax.text(x, y - 0.12, label, size=SIZE * 0.72, **style, **MONO)
    return len(label) * 0.72 + 0.8


# --------------------------------------------------------------------------------------------------
# lengths


def draw_lengths(paths, figure):
    """Print and plot the lengths of the blocks of each text, in words."""
    fig, ax = pyplot().subplots(figsize=(7, 3.6), layout="constrained")
    bins = np.geomspace(4, 1000, 28)
    for path, color, line in zip(paths, cycle(COLORS), cycle(("-", "--", ":"))):
        text, name = read(path), Path(path).stem
        tokens = np.frombuffer(text, np.uint8)
        lookback = lookbacks(tokens, BYTES, "semantic", word_counts(text), ANY_LENGTH)
        blocks = pieces_at(text, np.unique(np.arange(len(tokens)) - lookback))
        words = np.array([len(block.split()) for block in blocks])
        low, middle, high = np.percentile(words, [25, 50, 75])
        print(
            f"{name}: {len(words)} blocks, median {middle:.0f} words, "
            f"quartiles {low:.0f} and {high:.0f}, longest {words.max()}"
        )
        share = np.histogram(words, bins)[0] / len(words)
        label = f"{name} (median {middle:.0f})"
        ax.stairs(share, bins, color=color, linestyle=line, lw=2, label=label)
    ax.set(xlabel="length of a block, words", ylabel="share of the blocks", xscale="log")
    ax.set_title("Block length follows the text")
    ticks = [5, 10, 20, 50, 100, 200, 500, 1000]
    ax.set_xticks(ticks, ticks)
    ax.legend(frameon=False, fontsize=9)
    bare(fig)
    save(fig, figure or Path("figures/block_lengths.png"))


def save(fig, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(fig, path)
    print(f"drew {path}")


# --------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--books", metavar="FILE", help="measure on these texts, separated by <|endoftext|>")
    add("--page", metavar="FILE", help="draw a page of this text in the colors of its blocks")
    add("--lengths", metavar="FILE", nargs="+", help="draw the lengths of the blocks of texts")
    add = parser.add_argument
    add("--haste", action="store_true", help="with --books: what it costs to decide sooner")
    add("--first", action="store_true", help="pieces are the first sentences of their texts")
    add("--tokenizer", choices=["gpt2", "bytes"], default="bytes", help="(default: bytes)")
    add("--no-background", action="store_true", help="do not use the words of other books")
    add("--seeds", type=int, default=3, metavar="N", help="draws of documents (default: 3)")
    add("--documents", type=int, default=50, metavar="N", help="per set and draw (default: 50)")
    add("--json", type=Path, metavar="FILE", help="also write the tables here")
    add("--from", dest="words", default="", metavar="WORDS", help="where the page begins")
    add("--figure", type=Path, metavar="FILE", help="where to draw (default: in figures/)")
    args = parser.parse_args()
    if args.seeds < 1 or args.documents < 1:
        raise InputError("--seeds and --documents must be at least 1")
    if args.haste and not args.books:
        raise InputError("--haste needs --books")
    if args.figure:
        check_suffix(args.figure)
    if args.json:
        check_writable(args.json)
    if args.page:
        draw_page(args.page, args.words, args.figure)
    elif args.lengths:
        draw_lengths(args.lengths, args.figure)
    else:
        measure, show = (haste, print_haste) if args.haste else (quality, print_tables)
        background_too, draws = not args.no_background, (args.seeds, args.documents)
        tables = measure(args.books, args.tokenizer, *draws, background_too, args.first)
        show(tables)
        if args.json:
            write_json(args.json, tables)


if __name__ == "__main__":
    run_script(main)
