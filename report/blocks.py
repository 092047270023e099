"""Where blocks begin: found again in the lookbacks, counted, marked in the text, described."""

import numpy as np

STRETCH = 1 << 22  # tokens in memory at a time
MOST_FORCED = 0.2  # of the starts; above this, blocks follow max_lookback more than the text


def block_moves(lookback):
    """Where the block changes: (n,) integers -> the tokens from which on a new one holds, and the
    tokens at which it begins, (m,) int64 each, ascending. If a block slides at max_lookback, one
    token at a time, no new one begins; but blocks of a single token count."""
    moves = [np.zeros((2, 0), np.int64)]
    for at in range(1, len(lookback), STRETCH):
        i = np.arange(at - 1, min(at + STRETCH, len(lookback)))
        start = i - lookback[at - 1 : at + STRETCH]
        moved = (np.diff(start) > 1) | (start == i)[1:]
        moves.append(np.stack((i, start))[:, 1:][:, moved])
    return np.concatenate(moves, 1)


def block_starts(lookback):
    """The tokens at which blocks begin, including the first: (n,) integers -> int64, ascending."""
    return np.append(np.zeros(min(len(lookback), 1), np.int64), block_moves(lookback)[1])


def liveliest(lookback, T):
    """The first block start from which T tokens contain the most new blocks that begin and are
    noticed. lookback: (n,) integers."""
    (tokens, starts), T = block_moves(lookback), min(T, len(lookback))
    places = np.append(0, starts)
    places = places[places <= len(lookback) - T]
    seen = np.searchsorted(tokens, places + T) - np.searchsorted(starts, places, side="right")
    return int(places[np.argmax(seen)])


def most_hidden(lookback, T):
    """The T tokens in which the blocks hide most: (their first one, the share that is hidden).

    Of all pairs of a query and an earlier token, the share is that of those whose token is not in
    the query's block. lookback: (n,) integers.
    """
    n, T = len(lookback), min(T, len(lookback))
    at, start = np.arange(n - T + 1), np.arange(n) - lookback  # start never decreases
    first = np.searchsorted(start, at, side="right").clip(at, at + T)  # its block begins after at
    sums = np.append(0, np.cumsum(start))
    hidden = sums[at + T] - sums[first] - at * (at + T - first)
    best = int(hidden.argmax())
    return best, float(hidden[best]) / max(T * (T - 1) / 2, 1)


def choose_stretch(tokens, lookback, vocabulary, max_lookback, T):
    """A stretch of text that shows its blocks well: (its first token, its length, at most T).

    It has about 40 words or more, and is the shortest in which blocks hide more than half (it then
    has at least two changes of the block), or the one in which they hide most.
    """
    tokens, T = tokens[:STRETCH], min(T, len(tokens))
    lookback = np.minimum(lookback[:STRETCH].astype(np.int64), max_lookback)
    per_token = np.mean([len(vocabulary[t]) for t in tokens[:1000].tolist()])
    size = round(240 / max(per_token, 1))  # of 40 words
    sizes = [n for n in (size, 2 * size, 4 * size) if n < T] + [T]
    places = [(*most_hidden(lookback, n), n) for n in sizes]
    at, _, n = next((x for x in places if x[1] > 0.5), max(places, key=lambda x: x[1]))
    pieces = [vocabulary[t] for t in tokens[max(at - 40, 0) : at + 1].tolist()]
    back = next((i for i in range(len(pieces) - 1) if begins_word(*pieces[::-1][i : i + 2])), 0)
    return at - back, n


def begins_word(piece, before):
    """Whether a word, with the white space before it, begins at a token. piece: its bytes; before:
    those of the token before it."""
    return piece[:1].isspace() and not before.isspace()


def join_words(pieces, most=40):
    """Join tokens to words, and short words to groups: the first token of each group, (n,)
    integers. There are hardly more than `most`. pieces: the bytes of each token."""
    least, first = len(pieces) / most, [0]
    for i in range(1, len(pieces)):
        size = i - first[-1]
        if begins_word(pieces[i], pieces[i - 1]) and size >= least or size >= 4 * least:
            first.append(i)
    return np.array(first)


def join_attention(a, first):
    """The attention from group to group of tokens, (n, n): the sum over the tokens of a group as
    keys, the mean over its tokens as queries. Rows sum to 1 if those of a do.

    a: (T, T) weights from token to token; first: the first token of each group, (n,) integers.
    """
    sizes = np.diff(first, append=len(a))
    return np.add.reduceat(np.add.reduceat(a, first, 1), first, 0) / sizes[:, None]


def block_stats(tokens, lookback, vocabulary, partition, max_lookback):
    """Statistics of a split, a dict: tokens, bytes, the mean lookback.

    For blocks also their number and the quartiles of their lengths, in tokens. For blocks that
    follow sentences also `lag`, the median number of tokens from where a block begins to where that
    is known, and `forced`, the share of the starts that moved because of max_lookback.
    """
    n, length = len(tokens), np.array([len(b) for b in vocabulary])
    n_bytes = sum(int(length[tokens[at : at + STRETCH]].sum()) for at in range(0, n, STRETCH))
    mean = float(lookback.sum(dtype=np.int64)) / n
    stats = {"tokens": n, "bytes": n_bytes, "mean_lookback": round(mean, 2)}
    name = partition.partition(":")[0]
    if name in ("window", "semantic+window"):  # the start moves with every token
        return stats
    known, begun = block_moves(lookback)
    starts = np.append(0, begun)
    quartiles = np.percentile(np.diff(starts, append=n), (25, 50, 75)).tolist()
    stats |= {"blocks": len(starts), "block_length_quartiles": quartiles}
    if name not in ("block", "document") and len(begun):
        stats["lag"] = float(np.median(known - begun))
        stats["forced"] = round(float((lookback[known - 1] == max_lookback).mean()), 3)
    return stats


def mark_blocks(tokens, lookback, vocabulary):
    """The text of some tokens, with ▌ where a block begins. tokens, lookback: (n,) integers."""
    starts = set(block_starts(np.minimum(lookback, np.arange(len(tokens)))).tolist())
    marked = ["▌".encode() * (i in starts) + vocabulary[t] for i, t in enumerate(tokens)]
    return b"".join(marked).decode(errors="replace")


def describe(folder, meta, tokens, lookback, vocabulary):
    """What a prepared folder contains, with three block boundaries in context: lines of text.
    meta: its meta.json; tokens, lookback: (n,) integers of the training split."""
    stats, train, partition = meta["splits"], meta["splits"]["train"], meta["partition"]
    sizes = ", ".join(f"{split} {stats[split]['tokens']:,}" for split in stats)
    per_token = train["bytes"] / train["tokens"]
    lines = [f"{folder}: {sizes} tokens ({meta['tokenizer']}), {per_token:.2f} bytes per token"]
    mean = f"mean lookback {train['mean_lookback']:.0f} tokens"
    if "blocks" not in train:
        return f"{lines[0]}\n{partition}: a sliding window, {mean}"
    q1, median, q3 = train["block_length_quartiles"]
    lines.append(
        f"{partition}: {train['blocks']:,} blocks in train, median length {median:.0f} tokens "
        f"(quartiles {q1:.0f} and {q3:.0f}), {mean}"
    )
    if partition == "document" and train["blocks"] == 1:
        lines.append("this text contains no <|endoftext|>: it is one document")
    if "forced" in train:
        lines.append(
            f"a new block is recognized {train['lag']:.0f} tokens after it begins (median); "
            f"max_lookback ({meta['max_lookback']}) forced {100 * train['forced']:.0f}% of the "
            "starts"
        )
        if train["forced"] > MOST_FORCED:
            lines.append(f"max_lookback cuts many blocks: raise it above {meta['max_lookback']}")
    tokens, lookback = tokens[:STRETCH], lookback[:STRETCH]
    starts = block_starts(lookback)[1:]
    if len(starts) > 3:
        starts = starts[np.linspace(0, len(starts), 5, dtype=int)[1:-1]]
    if len(starts):
        lines.append("some of the places where a block begins:")
    width = round(60 / per_token)  # 60 bytes
    for start in starts:
        sides = tokens[max(start - width, 0) : start], tokens[start : start + width]
        text = [b"".join(vocabulary[t] for t in side).decode(errors="replace") for side in sides]
        lines.append("  … {} ▌{} …".format(*text).replace("\n", " "))
    return "\n".join(lines)
