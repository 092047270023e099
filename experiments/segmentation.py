"""How good are the semantic blocks? Against known topic shifts, on a page of text, in lengths.

    python -m experiments.segmentation --books BOOKS.txt [--first] [--seeds N] [--json FILE]
    python -m experiments.segmentation --haste --books BOOKS.txt [--seeds N] [--json FILE]
    python -m experiments.segmentation --page data/sample.txt [--from WORDS] [--figure FILE]
    python -m experiments.segmentation --lengths BOOK.txt BOOK.txt BOOK.txt [--figure FILE]

--books makes documents whose topic shifts are known, as Choi did (2000, "Advances in domain
independent linear text segmentation"). A document is ten pieces. Each piece is a few sentences in
a row from another text. Where does one piece end and the next begin? BOOKS.txt holds the texts,
with <|endoftext|> or a title of WikiText between them. With --first a piece is the first sentences
of its text, as Choi had it. Without, it comes from anywhere in it, which suits few and long texts.

--haste asks what it costs to decide sooner. A block start is taken when the odds for a new block
are good enough (SURE in locality.py); with lower odds it is known sooner, and it is wrong more
often.

Texts count from 0. The documents are made of the texts 2, 5, 8 ... The background words come from
the texts 0, 3, 6 ... The constants in locality.py were chosen on the texts 1, 4, 7 ... of 48 books,
and with WikiText-2 in view.
"""

import argparse
import random
import re
import sys
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

import locality
from locality import Partitioner, background, partition
from prepare_data import block_moves, get_encoding, token_bytes
from support.files import InputError, check_writable, run_script, write_json
from support.plots import COLOURS, bare, check_suffix, pyplot, save_figure
from support.sentences import END_OF_TEXT, PERSONS, STOP_WORDS, Stems, first_bytes

PIECES = 10  # of a document
SETS = {"3-11": (3, 11), "3-5": (3, 5), "6-8": (6, 8), "9-11": (9, 11)}  # sentences of a piece
BREAK = re.compile(rb"<\|endoftext\|>|^ = [^=\n]+ = $", re.M)  # between texts
HEADING = re.compile(rb"^ = = .*$", re.M)
BYTES = [bytes([i]) for i in range(256)]
MAX_LOOKBACK = 2048  # tokens
SURES = 0.5, 0.6, 0.8, 0.9, 0.95, 0.99  # for --haste
ANY_LENGTH = 65535  # bytes: a lookback that cuts no block


def read(path):
    try:
        data = Path(path).read_bytes()
        data.decode()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text") from e
    if not data.strip():
        raise InputError(f"{path} is empty")
    return data


def semantic_blocks(text, known):
    """The semantic blocks of a text (bytes), a list of bytes."""
    tokens = np.frombuffer(text, np.uint8)
    lookback = partition(tokens, BYTES, "semantic", ANY_LENGTH, known)
    return pieces_at(text, np.unique(np.arange(len(tokens)) - lookback))


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
    """PIECES runs of shortest ... longest sentences: (sentences, number of the piece of each).

    sources: of each text, a list of sentences. Each piece comes from another text, while there are
    enough. first: it is the first sentences of the text, not any.
    """
    enough = len(sources) >= PIECES
    books = rng.sample(sources, PIECES) if enough else rng.choices(sources, k=PIECES)
    sentences, piece = [], []
    for number, book in enumerate(books):
        size = rng.randint(shortest, longest)
        start = 0 if first else rng.randrange(len(book) - size + 1)
        sentences += book[start : start + size]
        piece += [number] * size
    return sentences, np.array(piece)


def places(book):
    """Parts of one book in place of several books.

    These are harder to tell apart: they share author, style and often subject.
    """
    edges = [len(book) * i // PIECES for i in range(PIECES + 1)]
    return [book[a:b] for a, b in zip(edges, edges[1:])]


# --------------------------------------------------------------------------------------------------
# measures
#
# begin[i]: the sentence with which the block begins, as far as is known after sentence i
# piece[i]: the number of the piece that sentence i is in


def half_a_piece(piece):
    return max(1, round(len(piece) / (piece[-1] + 1) / 2))


def p_k(begin, piece):
    """The share of pairs (i - k, i) that are wrong: put in the same block though apart, or apart
    though together. k is half a mean piece. (Beeferman, Berger & Lafferty 1999.)

    A block start counts as soon as sentence i has revealed it, and not before.
    """
    k = half_a_piece(piece)
    i = np.arange(k, len(piece))
    return float(np.mean((begin[i] <= i - k) != (piece[i] == piece[i - k])))


def window_diff(begin, piece):
    """The share of windows (i - k, i] in which the number of boundaries is wrong.

    k is half a mean piece. (Pevzner & Hearst 2002.)
    """
    k = half_a_piece(piece)
    i = np.arange(k, len(piece))
    found = np.cumsum(np.isin(np.arange(len(piece)), begin) & (np.arange(len(piece)) > 0))
    return float(np.mean(found[i] - found[i - k] != piece[i] - piece[i - k]))


# --------------------------------------------------------------------------------------------------
# ours, and its rivals: (sentences, piece) -> begin


def semantic(encoding, known):
    """Our blocks, read at the first token of the sentence that follows."""
    vocabulary = token_bytes(encoding)

    def begins(sentences, piece):
        text = b" ".join(sentences).decode()
        tokens = encoding.encode_to_numpy(text, allowed_special="all")
        ends = np.cumsum([len(vocabulary[t]) for t in tokens])
        first_bytes = np.cumsum([0] + [len(s) + 1 for s in sentences[:-1]])
        first = np.searchsorted(ends, first_bytes, side="right")  # token of each sentence
        lookback = partition(tokens, vocabulary, "semantic", MAX_LOOKBACK, known)
        block = np.arange(len(tokens)) - lookback
        read_at = np.append(first[1:], len(tokens) - 1)
        return np.searchsorted(first, block[read_at], side="right") - 1

    return begins


def one_block(sentences, piece):
    return np.zeros(len(sentences), int)


def block_per_sentence(sentences, piece):
    return np.arange(len(sentences))


def fixed_blocks(sentences, piece):
    """Blocks as long as the mean piece. The text itself does not tell how long that is."""
    i = np.arange(len(sentences))
    return i - i % round(len(piece) / (piece[-1] + 1))


def text_tiling(sentences, piece):
    """Hearst 1997, as NLTK has it. It sees the whole document.

    It cuts between paragraphs, so each sentence is given as one.
    """
    from nltk.tokenize import TextTilingTokenizer

    text = "\n\n" + "\n\n".join(s.decode() for s in sentences)
    try:
        tiles = TextTilingTokenizer(stopwords=[*STOP_WORDS, *PERSONS]).tokenize(text)
    except ValueError:  # too short for it
        return one_block(sentences, piece)
    sizes = [sum(bool(p.strip()) for p in tile.split("\n\n")) for tile in tiles]
    counts = np.cumsum([0, *sizes[:-1]])
    return counts[np.searchsorted(counts, np.arange(len(sentences)), side="right") - 1]


def rivals(encoding, known):
    found = {
        "semantic": semantic(encoding, known),
        "one block": one_block,
        "a block per sentence": block_per_sentence,
        "fixed blocks, mean length": fixed_blocks,
    }
    try:
        import nltk  # noqa: F401

        found["TextTiling (sees all)"] = text_tiling
    except ImportError:
        print("nltk is not installed: no TextTiling", file=sys.stderr)
    return found


def read_books(path, use_background, first):
    """The sentences of every third text of a file, a list of lists; and the background words of
    others, or None. Raises InputError for too few texts."""
    books = BREAK.split(read(path))
    if len(books) < 3:
        needed = f"at least 3 are needed, with {END_OF_TEXT.decode()} between them"
        raise InputError(f"{path} holds {len(books)} texts; {needed}")
    enough = 11 if first else 200
    sources = [s for s in map(sentences_of, books[2::3]) if len(s) >= enough]
    if not sources:
        raise InputError(f"{path}: no text among the 2nd, 5th, 8th ... has {enough} sentences")
    known = None
    if use_background:
        known = background(np.frombuffer(END_OF_TEXT.join(books[0::3]), np.uint8), BYTES)
    return sources, known


def quality(path, tokenizer, seeds, n, use_background, first):
    """The tables: {title: {rival: {set: (Pk, WindowDiff)}}}, means over `seeds` x n documents."""
    sources, known = read_books(path, use_background, first)
    contest = rivals(get_encoding(tokenizer), known)
    groups_of = {"ten books": [sources], "ten places of one book": [places(s) for s in sources]}
    if first:
        groups_of = {"ten texts": [sources]}
    tables = {}
    for title, groups in groups_of.items():
        table = tables[title] = {rival: {} for rival in contest}
        for name, sizes in SETS.items():
            documents = []
            for seed in range(seeds):
                rng = random.Random(f"{seed} {name}")
                for i in range(n):
                    documents.append(choi_document(groups[i % len(groups)], *sizes, rng, first))
            for rival, begins in contest.items():
                got = [(begins(sentences, piece), piece) for sentences, piece in documents]
                scores = [(p_k(*g), window_diff(*g)) for g in got]
                table[rival][name] = np.mean(scores, axis=0).tolist()
    return tables


def haste(path, tokenizer, seeds, n, use_background, first):
    """What it costs to decide sooner: a list of dicts, one for each value of SURE.

    sure; Pk and WindowDiff; lag, the median of the tokens from where a block begins to where that
    is known; mean lookback, tokens, of the blocks and of the same blocks closed. Means over `seeds`
    x n documents of pieces of 3 to 11 sentences.
    """
    sources, known = read_books(path, use_background, first)
    encoding, rows, usual = get_encoding(tokenizer), [], locality.SURE
    vocabulary = token_bytes(encoding)
    documents = []
    for seed in range(seeds):
        rng = random.Random(f"{seed} 3-11")
        documents += [choi_document(sources, *SETS["3-11"], rng, first) for _ in range(n)]
    texts = [encoding.encode_to_numpy(b" ".join(s).decode()) for s, _ in documents]
    try:
        for sure in SURES:
            locality.SURE = sure
            got = [(semantic(encoding, known)(*document), document[1]) for document in documents]
            scores = np.mean([(p_k(*g), window_diff(*g)) for g in got], axis=0).tolist()
            lags, means = [], []
            for tokens in texts:
                how = MAX_LOOKBACK, known
                open_, closed = (
                    partition(tokens, vocabulary, method, *how)
                    for method in ("semantic", "semantic:closed")
                )
                lags.append(np.subtract(*block_moves(open_)))
                means.append((open_.mean(dtype=float), closed.mean(dtype=float)))
            row = {"sure": sure, "Pk": scores[0], "WindowDiff": scores[1]}
            row |= {"lag": float(np.median(np.concatenate(lags)))}
            row |= dict(zip(("mean lookback", "closed"), np.mean(means, axis=0).tolist()))
            rows.append(row)
    finally:
        locality.SURE = usual
    return rows


def print_haste(rows):
    print("how sure      Pk    WD   lag, tokens   mean lookback   the same, closed")
    for row in rows:
        usual = "  (as it is)" if row["sure"] == locality.SURE else ""
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
# a page of text in the colours of its blocks

# apart also for those who do not tell red from green
TINTS = ("#9ecae9", "#ffd08a", "#a8dcc0", "#f5b8d5", "#e9e48c")
WIDTH, HEIGHT = 104, 38  # of a page, in characters and lines
SIZE = 9.2  # of its letters, in points: 10 pixels wide in a PNG, so words are evenly spaced
MONO = {"family": "DejaVu Sans Mono", "va": "center"}


class Sentence(NamedTuple):
    """A sentence, and what the partitioner thinks when it has ended."""

    start: int  # first byte of the sentence
    next: int  # first byte of the next one
    block: int  # first byte of the running block
    moved: bool  # whether that block is new
    bits: float  # log2 of the odds that the block before has ended


def trace(text):
    """All sentences of a text (bytes) as the partitioner reads them, a list."""
    tokens = np.frombuffer(text, np.uint8)
    partitioner = Partitioner(BYTES, "semantic", ANY_LENGTH, background(tokens, BYTES))
    sentences, start, block = [], 0, 0
    for token in tokens:
        partitioner.push([token])
        if partitioner.start != start:
            bits = partitioner.blocks.bits_later(-1, block) if block < start else -np.inf
            moved = partitioner.block > block
            sentences.append(Sentence(start, partitioner.start, partitioner.block, moved, bits))
            start, block = partitioner.start, partitioner.block
    return sentences


def draw_page(path, words, figure):
    """Draw a page of a text, from the block that holds `words` on.

    Each block has a colour. After each sentence stands its evidence. Bold: what the block repeats.
    """
    text = read(path)
    position = text.find(words.encode())
    if position < 0:
        raise InputError(f"{path} does not hold the words {words!r}")
    sentences = trace(text)
    starts = {s.start for s in sentences}
    blocks = sorted({s.block for s in sentences})
    if len(blocks) < 2:
        raise InputError(f"{path} is too short: all of it is one block")
    paragraphs = starts & {0, *(line.end() for line in re.finditer(rb"\n *", text))}
    of_blocks = f"{np.mean([block in paragraphs for block in blocks[1:]]):.0%} of the blocks"
    of_sentences = f"{len(paragraphs) / len(starts):.0%} of the sentences"
    counts = f"{len(starts)} sentences, {len(blocks)} blocks"
    print(f"{counts}; {of_blocks} begin a paragraph, and {of_sentences}")

    cell = 0.602 * SIZE / 72  # inches a character
    fig = pyplot().figure(figsize=((WIDTH + 4) * cell, (HEIGHT + 10) * cell * 2.25))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-2, WIDTH + 2), ylim=(HEIGHT + 5.5, -4.5))
    ax.axis("off")
    position = blocks[np.searchsorted(blocks, position, side="right") - 1]
    write_page(ax, text, position, sentences, blocks)
    title = f"{Path(path).name}: each colour is a block, found while reading, without looking ahead"
    ax.text(-0.5, -2.6, title, size=SIZE * 1.25, weight="bold", va="center")
    key = (
        "Bold: a word that its block has used before. Small numbers: at the end of a sentence, the "
        "bits of evidence that a new block has begun\n(−3: odds of 1 to 8). Red: that was enough; "
        "the new colour begins where the new block seems to begin, up to a few sentences back.\n"
        f"In the whole text {of_blocks} begin a paragraph, and {of_sentences}. "
        "(A paragraph makes a break likelier; the words decide.)"
    )
    ax.text(-0.5, HEIGHT + 3.2, key, size=SIZE * 0.82, va="center", linespacing=1.5)
    save(fig, figure or Path("figures/semantic_blocks.png"))


def write_page(ax, text, position, sentences, blocks):
    """Write a text from byte `position` on, word by word, until the page is full."""
    ended = {s.next: s for s in sentences}
    stems, said = Stems(), {}  # stem: the block in which it was last said
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
        for stem in stems.of([word[0]])[0].tolist():
            again |= said.get(stem) == block and stem >= len(PERSONS)
            said[stem] = block
        colour = TINTS[block % len(TINTS)]
        box = pyplot().Rectangle((x - 0.5, y - 0.5), len(shown) + 1, 1, color=colour, lw=0)
        ax.add_patch(box)
        ax.text(x, y, shown, size=SIZE, weight="bold" if again else "normal", **MONO)
        x += len(shown) + 1


def write_evidence(ax, x, y, sentence):
    """Write the bits of evidence after a sentence. Returns how wide that is, in characters."""
    label = f"{sentence.bits:+.0f}".replace("-", "−") if np.isfinite(sentence.bits) else ""
    style = {"weight": "bold", "color": "#b00000"} if sentence.moved else {"color": "#555555"}
    ax.text(x, y - 0.12, label, size=SIZE * 0.72, **style, **MONO)
    return len(label) * 0.72 + 0.8


# --------------------------------------------------------------------------------------------------
# lengths


def draw_lengths(paths, figure):
    """Print and plot how long the blocks of each text are, in words."""
    fig, ax = pyplot().subplots(figsize=(7, 3.6), layout="constrained")
    bins = np.geomspace(4, 1000, 28)
    for path, colour, line in zip(paths, cycle(COLOURS), cycle(("-", "--", ":"))):
        text, name = read(path), Path(path).stem
        known = background(np.frombuffer(text, np.uint8), BYTES)
        words = np.array([len(block.split()) for block in semantic_blocks(text, known)])
        low, middle, high = np.percentile(words, [25, 50, 75])
        print(
            f"{name}: {len(words)} blocks, of {middle:.0f} words at the median, "
            f"quartiles {low:.0f} and {high:.0f}, longest {words.max()}"
        )
        share = np.histogram(words, bins)[0] / len(words)
        label = f"{name} (median {middle:.0f})"
        ax.stairs(share, bins, color=colour, linestyle=line, lw=2, label=label)
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
    add("--books", metavar="FILE", help="measure on these texts, <|endoftext|> between them")
    add("--page", metavar="FILE", help="draw a page of this text in the colours of its blocks")
    add("--lengths", metavar="FILE", nargs="+", help="draw how long the blocks of texts are")
    add = parser.add_argument
    add("--haste", action="store_true", help="with --books: what it costs to decide sooner")
    add("--first", action="store_true", help="pieces are the first sentences of their texts")
    add("--tokenizer", choices=["gpt2", "bytes"], default="bytes", help="(default: bytes)")
    add("--no-background", action="store_true", help="do without the words of other books")
    add("--seeds", type=int, default=3, metavar="N", help="draws of documents (default: 3)")
    add("--documents", type=int, default=50, metavar="N", help="of a set in a draw (default: 50)")
    add("--json", type=Path, metavar="FILE", help="write the tables here too")
    add("--from", dest="words", default="", metavar="WORDS", help="where the page begins")
    add("--figure", type=Path, metavar="FILE", help="where to draw (default: in figures/)")
    args = parser.parse_args()
    if args.seeds < 1 or args.documents < 1:
        raise InputError("--seeds and --documents must be at least 1")
    if args.haste and not args.books:
        raise InputError("--haste goes with --books")
    if args.figure:
        check_suffix(args.figure)
    if args.json:
        check_writable(args.json)
    if args.page:
        draw_page(args.page, args.words, args.figure)
    elif args.lengths:
        draw_lengths(args.lengths, args.figure)
    else:
        how = args.tokenizer, args.seeds, args.documents, not args.no_background, args.first
        tables = haste(args.books, *how) if args.haste else quality(args.books, *how)
        (print_haste if args.haste else print_tables)(tables)
        if args.json:
            write_json(args.json, tables)


if __name__ == "__main__":
    run_script(main)
