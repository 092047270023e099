"""How good are the semantic blocks? Known topic shifts, a page of text, and block lengths.

    python -m experiments.segmentation --books BOOKS.txt [--first] [--seeds N] [--json FILE]
    python -m experiments.segmentation --vary {ALPHA,SURE} --books BOOKS.txt [--first] [--tuning]
    python -m experiments.segmentation --page data/sample.txt [--from WORDS] [--figure FILE]
    python -m experiments.segmentation --lengths BOOK.txt BOOK.txt BOOK.txt [--figure FILE]

--books makes documents whose topic shifts are known, like Choi (2000, "Advances in domain
independent linear text segmentation"). A document is ten pieces, and each piece is a few
consecutive sentences of another text: its first ones with --first, like Choi's, otherwise from
anywhere, which suits a few long texts. The task is to find where one piece ends and the next
begins. BOOKS.txt holds the texts, separated by <|endoftext|> or a title of WikiText. Counting from
0, the documents are made of texts 2, 5, 8 ..., and the background words come from texts 0, 3, 6 ...
The constants in locality.py were chosen on texts 1, 4, 7 ..., which --tuning uses.

--vary measures other values of a constant of locality.py. With a smaller ALPHA or SURE, the start
of a block is known sooner, and is wrong more often.
"""

import importlib.util
import random
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

import locality
from locality import Partitioner, count_background, partition_text
from report.blocks import block_moves
from report.plots import COLORS, bare, check_suffix, pyplot, save_figure
from report.tables import aligned
from support.files import InputError, check_writable, run_script, write_json
from support.sentences import END_OF_TEXT, WordIds, first_bytes
from support.tokenizers import get_encoding, token_bytes

PIECES = 10  # of a document
SETS = {"3-11": (3, 11), "3-5": (3, 5), "6-8": (6, 8), "9-11": (9, 11)}  # sentences of a piece
BREAK = re.compile(rb"<\|endoftext\|>|^ = [^=\n]+ = $", re.M)  # between texts
HEADING = re.compile(rb"^ = = .*$", re.M)
BYTES = [bytes([i]) for i in range(256)]
MAX_LOOKBACK = 2048  # tokens
N_STOP_WORDS = 150  # the commonest words of the background, for TextTiling
VARIED = {"ALPHA": (100, 200, 300, 400, 500, 600), "SURE": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)}
ANY_LENGTH = 65535  # bytes: a lookback that cuts no block


def read(path):
    """The bytes of a UTF-8 text file. Raises InputError or OSError."""
    text = Path(path).read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def word_counts(text):
    """The background of a text (bytes): how often it has each word."""
    return count_background(np.frombuffer(text, np.uint8), BYTES)


def pieces_at(text, starts):
    """A text (bytes), cut where each piece starts: a list of bytes."""
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


# --------------------------------------------------------------------------------------------------
# documents with known topic shifts: (sentences, the number of each sentence's piece)


def sentences_of(book):
    """The sentences of a book (bytes) of at least four words, each on one line."""
    text = HEADING.sub(b"", book)
    words = [sentence.split() for sentence in pieces_at(text, first_bytes(text))]
    return [b" ".join(w) for w in words if len(w) >= 4]


def read_books(args):
    """(sentences of texts 2, 5, 8 ... of a file, a list of lists; text of 0, 3, 6 ..., bytes)."""
    books = BREAK.split(read(args.books))
    if len(books) < 3:
        raise InputError(f"{args.books} holds {len(books)} texts; at least 3 are needed")
    enough = 11 if args.first else 200
    books = {"judging": books[2::3], "tuning": books[1::3], "background": books[0::3]}
    sources = map(sentences_of, books["tuning" if args.tuning else "judging"])
    sources = [sentences for sentences in sources if len(sentences) >= enough]
    if not sources:
        raise InputError(f"{args.books}: none of the texts to judge has {enough} sentences")
    return sources, END_OF_TEXT.join(books["background"])


def choi_documents(sources, name, args):
    """Documents of the set `name`, as many per seed as args say.

    sources: for each document in turn, the sentences of each text, a list of lists. Each piece
    comes from another text if there are enough.
    """
    (shortest, longest), documents = SETS[name], []
    for seed in range(args.seeds):
        rng = random.Random(f"{seed} {name}")
        for _, texts in zip(range(args.documents), cycle(sources)):
            enough = len(texts) >= PIECES
            texts = rng.sample(texts, PIECES) if enough else rng.choices(texts, k=PIECES)
            sentences, piece = [], []
            for number, text in enumerate(texts):
                size = rng.randint(shortest, longest)
                start = 0 if args.first else rng.randrange(len(text) - size + 1)
                sentences += text[start : start + size]
                piece += [number] * size
            documents.append((sentences, np.array(piece)))
    return documents


# --------------------------------------------------------------------------------------------------
# measures
#
# begin[i]: the first sentence of the block of sentence i, as far as it is known after sentence i
# piece[i]: the number of the piece of sentence i


def windows(piece):
    """(i - k, i) for every sentence i that has a sentence i - k. k: half a mean piece."""
    k = max(1, round(len(piece) / (piece[-1] + 1) / 2))
    return np.arange(len(piece) - k), np.arange(k, len(piece))


def p_k(begin, piece):
    """The share of pairs (i - k, i) that are wrong: in one block but two pieces, or the reverse.

    A block start counts as soon as sentence i has revealed it (Beeferman, Berger & Lafferty 1999).
    """
    first, i = windows(piece)
    return float(np.mean((begin[i] <= first) != (piece[i] == piece[first])))


def window_diff(begin, piece):
    """The share of windows (i - k, i] with a wrong number of boundaries (Pevzner & Hearst 2002)."""
    first, i = windows(piece)
    count = np.cumsum(np.isin(np.arange(len(piece)), begin) & (np.arange(len(piece)) > 0))
    return float(np.mean(count[i] - count[first] != piece[i] - piece[first]))


def mean_scores(begins, documents):
    """[Pk, WindowDiff], means over documents. begins: (sentences, piece) -> begin."""
    results = [(begins(sentences, piece), piece) for sentences, piece in documents]
    return np.mean([(p_k(*r), window_diff(*r)) for r in results], axis=0).tolist()


# --------------------------------------------------------------------------------------------------
# ours, and its rivals: (sentences, piece) -> begin


def semantic(encoding, counts, sentences, piece):
    """Our blocks, as they are known at the first token of the next sentence."""
    vocabulary = token_bytes(encoding)
    tokens = encoding.encode_to_numpy(b" ".join(sentences).decode(), allowed_special="all")
    ends = np.cumsum([len(vocabulary[t]) for t in tokens])
    starts = np.cumsum([0] + [len(s) + 1 for s in sentences[:-1]])  # bytes
    first = np.searchsorted(ends, starts, side="right")  # token of each sentence
    lookback = partition_text(tokens, vocabulary, "semantic", MAX_LOOKBACK, counts)
    known_at = np.append(first[1:], len(tokens) - 1)
    block = np.arange(len(tokens)) - lookback
    return np.searchsorted(first, block[known_at], side="right") - 1


def fixed_blocks(sentences, piece):
    """Blocks as long as the mean piece, which the text itself does not tell."""
    i = np.arange(len(sentences))
    return i - i % round(len(piece) / (piece[-1] + 1))


def text_tiling(stop_words, sentences, piece):
    """NLTK's TextTiling (Hearst 1997) with every sentence as a paragraph. It sees everything."""
    from nltk.tokenize import TextTilingTokenizer

    text = "\n\n" + "\n\n".join(s.decode() for s in sentences)
    try:
        tiles = TextTilingTokenizer(stopwords=stop_words).tokenize(text)
    except ValueError:  # too short for it
        return 0 * piece
    sizes = [sum(bool(p.strip()) for p in tile.split("\n\n")) for tile in tiles]
    counts = np.cumsum([0, *sizes[:-1]])
    return counts[np.searchsorted(counts, np.arange(len(sentences)), side="right") - 1]


def quality(args):
    """Print the tables and return them: {title: {rival: {set: [Pk, WindowDiff]}}}, means."""
    sources, background = read_books(args)
    counts = None if args.no_background else word_counts(background)
    rivals = {
        "semantic": partial(semantic, get_encoding(args.tokenizer), counts),
        "one block": lambda sentences, piece: 0 * piece,
        "a block per sentence": lambda sentences, piece: np.arange(len(piece)),
        "fixed blocks, mean length": fixed_blocks,
    }
    if importlib.util.find_spec("nltk"):
        words = Counter(re.findall(r"[a-z]+", background.decode().lower()))
        stop_words = [word for word, _ in words.most_common(N_STOP_WORDS)]
        rivals["TextTiling (sees all)"] = partial(text_tiling, stop_words)
    else:
        print("nltk is not installed: no TextTiling", file=sys.stderr)
    # parts of one book are harder to tell apart: they share an author, a style and often a subject
    edges = [[len(book) * i // PIECES for i in range(PIECES + 1)] for book in sources]
    parts = [[book[a:b] for a, b in zip(e, e[1:])] for book, e in zip(sources, edges)]
    tables = {"ten books": [sources], "ten places of one book": parts}
    tables = {"ten texts": [sources]} if args.first else tables
    header = [word for name in [*SETS, "mean"] for word in (f"{name}: Pk", "WD")]
    for title, groups in tables.items():
        documents, lines = {name: choi_documents(groups, name, args) for name in SETS}, []
        tables[title] = {rival: {} for rival in rivals}
        for rival, row in tables[title].items():
            row |= {name: mean_scores(rivals[rival], documents[name]) for name in SETS}
            cells = [*row.values(), np.mean([*row.values()], axis=0)]
            lines.append([rival, *(f"{x:.3f}" for pair in cells for x in pair)])
        print(f"\n{aligned([title, *header], lines)}", end="")
    return tables


def vary(args):
    """Print what the values of a constant do, and return it: a list of dicts, one per value.

    lag: the median number of tokens from the start of a block to where it is known, in the set
    3-11; mean lookback: in tokens; closed: that of the same blocks, closed.
    """
    sources, background = read_books(args)
    counts = None if args.no_background else word_counts(background)
    encoding, rows = get_encoding(args.tokenizer), []
    documents = {name: choi_documents([sources], name, args) for name in SETS}
    texts = [encoding.encode_to_numpy(b" ".join(s).decode()) for s, _ in documents["3-11"]]
    rules = {"token_bytes": token_bytes(encoding), "max_lookback": MAX_LOOKBACK}
    find = partial(partition_text, background=counts, **rules)
    for value in VARIED[args.vary]:
        with patch.object(locality, args.vary, value):
            scores = [
                mean_scores(partial(semantic, encoding, counts), d) for d in documents.values()
            ]
            blocks = [find(text, partition="semantic") for text in texts]
            closed = [find(text, partition="semantic:closed") for text in texts]
        lag = float(np.median(np.concatenate([np.subtract(*block_moves(b)) for b in blocks])))
        row = {args.vary: value, **dict(zip(SETS, scores))}
        row["mean"] = np.mean(scores, axis=0).tolist()
        row |= {"lag": lag, "mean lookback": mean_of(blocks), "closed": mean_of(closed)}
        rows.append(row)
    columns = [word for name in [*SETS, "mean"] for word in (f"{name}: Pk", "WD")]
    header = args.vary, *columns, "lag", "mean lookback", "closed"
    lines = [
        [f"{row[args.vary]}{' (the default)' * (row[args.vary] == getattr(locality, args.vary))}"]
        + [f"{x:.3f}" for name in [*SETS, "mean"] for x in row[name]]
        + [f"{row[name]:.0f}" for name in ("lag", "mean lookback", "closed")]
        for row in rows
    ]
    print(aligned(header, lines), end="")
    return rows


def mean_of(lookbacks):
    """The mean over texts of their mean lookbacks, a float."""
    return float(np.mean([lookback.mean(dtype=float) for lookback in lookbacks]))


# --------------------------------------------------------------------------------------------------
# a page of text in the colors of its blocks

TINTS = ("#9ecae9", "#ffd08a", "#a8dcc0", "#f5b8d5", "#e9e48c")  # distinct for the color-blind, too
WIDTH, HEIGHT = 104, 38  # of a page, in characters and lines
SIZE = 9.2  # of its letters, in points: 10 pixels wide in a PNG, so words are evenly spaced
COMMON = 1000  # a word is common if more than one in COMMON words of the text is this word
MONO = {"family": "DejaVu Sans Mono", "va": "center"}


class Sentence(NamedTuple):
    start: int  # first byte of the sentence
    next: int  # first byte of the next one
    block: int  # first byte of the current block, at the end of the sentence
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


def common_words(text):
    """The ids of the words of a text that are more than one in COMMON of its words, a set."""
    counts = word_counts(text)
    return {w for w, n in zip(counts["words"], counts["counts"]) if n * COMMON > counts["total"]}


def draw_page(path, words):
    """A page of a text, starting with the block that holds `words`: a figure.

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
    shares = f"{share:.0%} of the blocks begin a paragraph, "
    shares += f"and {len(paragraphs) / len(starts):.0%} of the sentences"
    print(f"{len(starts)} sentences, {len(blocks)} blocks; {shares}")
    cell = 0.602 * SIZE / 72  # inches per character
    fig = pyplot().figure(figsize=((WIDTH + 4) * cell, (HEIGHT + 10) * cell * 2.25))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-2, WIDTH + 2), ylim=(HEIGHT + 5.5, -4.5))
    ax.axis("off")
    position = blocks[np.searchsorted(blocks, position, side="right") - 1]
    write_page(ax, text, position, sentences, blocks, common_words(text))
    title = f"{Path(path).name}: each color is a block, found while reading, without looking ahead"
    ax.text(-0.5, -2.6, title, size=SIZE * 1.25, weight="bold", va="center")
    key = (
        "Bold: a word that its block has used before, if it is not common. Small numbers: at the "
        "end of a sentence, the bits of evidence\nthat a new block has begun (−3: odds of 1 to 8). "
        "Red: that was enough; the new color begins where the new block seems to begin.\n"
        f"In the whole text, {shares}. (A paragraph makes a break likelier; the words decide.)"
    )
    ax.text(-0.5, HEIGHT + 3.2, key, size=SIZE * 0.82, va="center", linespacing=1.5)
    return fig


def write_page(ax, text, position, sentences, blocks, common):
    """Write a text from byte `position` on, word by word, until the page is full."""
    ended = {s.next: s for s in sentences}
    word_ids, last_block = WordIds(), {}  # word id: the last block that used it
    x = y = 0.0
    for word in re.compile(rb"\S+").finditer(text, position):
        at, shown = word.start(), word[0].decode(errors="replace")
        block = int(np.searchsorted(blocks, at, side="right"))
        if at > position:
            if at in ended:
                bits, moved = ended[at].bits, ended[at].moved
                label = f"{bits:+.0f}".replace("-", "−") if np.isfinite(bits) else ""
                weight, color = ("bold", "#b00000") if moved else ("normal", "#555555")
                small = {"size": SIZE * 0.72, "weight": weight, "color": color}
                ax.text(x, y - 0.12, label, **small, **MONO)
                x += len(label) * 0.72 + 0.8
            if b"\n\n" in text[at - 3 : at]:
                x, y = 0, y + 1.5
            elif x + len(shown) > WIDTH:
                x, y = 0, y + 1
        if y > HEIGHT:
            break
        again = False
        for i in word_ids.of([word[0]])[0].tolist():
            again |= last_block.get(i) == block and i not in common
            last_block[i] = block
        color = TINTS[block % len(TINTS)]
        box = pyplot().Rectangle((x - 0.5, y - 0.5), len(shown) + 1, 1, color=color, lw=0)
        ax.add_patch(box)
        ax.text(x, y, shown, size=SIZE, weight="bold" if again else "normal", **MONO)
        x += len(shown) + 1


def draw_lengths(paths):
    """Print the lengths of the blocks of each text, in words; a figure."""
    fig, ax = pyplot().subplots(figsize=(7, 3.6), layout="constrained")
    bins = np.geomspace(4, 1000, 28)
    for path, color, line in zip(paths, cycle(COLORS), cycle(("-", "--", ":"))):
        text, name = read(path), Path(path).stem
        tokens = np.frombuffer(text, np.uint8)
        lookback = partition_text(tokens, BYTES, "semantic", ANY_LENGTH, word_counts(text))
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
    return fig


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--books", metavar="FILE", help="measure on these texts, separated by <|endoftext|>")
    add("--page", metavar="FILE", help="draw a page of this text in the colors of its blocks")
    add("--lengths", metavar="FILE", nargs="+", help="draw the lengths of the blocks of texts")
    add = parser.add_argument
    add("--vary", choices=VARIED, help="with --books: other values of a constant")
    add("--first", action="store_true", help="pieces are the first sentences of their texts")
    add("--tokenizer", choices=["gpt2", "bytes"], default="bytes", help="(default: bytes)")
    add("--no-background", action="store_true", help="do not use the words of other books")
    add("--tuning", action="store_true", help="use texts 1, 4, 7 ..., to choose constants")
    add("--seeds", type=int, default=3, metavar="N", help="draws of documents (default: 3)")
    add("--documents", type=int, default=50, metavar="N", help="per set and draw (default: 50)")
    add("--json", type=Path, metavar="FILE", help="also write the tables here")
    add("--from", dest="words", default="", metavar="WORDS", help="where the page begins")
    add("--figure", type=Path, metavar="FILE", help="where to draw (default: in figures/)")
    args = parser.parse_args()
    if args.seeds < 1 or args.documents < 1:
        raise InputError("--seeds and --documents must be at least 1")
    if args.vary and not args.books:
        raise InputError("--vary needs --books")
    if args.figure:
        check_suffix(args.figure)
    if args.json:
        check_writable(args.json)
    if args.books:
        tables = vary(args) if args.vary else quality(args)
        if args.json:
            write_json(args.json, tables)
        return
    fig = draw_page(args.page, args.words) if args.page else draw_lengths(args.lengths)
    name = "semantic_blocks.png" if args.page else "block_lengths.png"
    path = args.figure or Path("figures", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(fig, path)
    print(f"drew {path}")


if __name__ == "__main__":
    run_script(main)
