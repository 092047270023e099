"""Look at a text through a model: one HTML file for any browser, which needs nothing else.

    python read.py runs/quickstart                                  # a page of the test split
    python read.py runs/quickstart --split train --from "The mind"  # from these words on
    python read.py runs/quickstart --prompt "Attention is a habit. It is learned."
    python read.py runs/quickstart --schedule localist --schedule linear  # two other dials
    python read.py gpt2 --text my_page.txt                          # weights, never localised

For every token the page shows where each head looks, how much of that stays in the block, and what
may come next. It also shows what the prediction depends on: each sentence before the token is
replaced by foreign text. All this at two dials, with the same weights: the run's own, and 0.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from eval import entropy, load_model, mass_inside
from locality import CHUNK, Partitioner, schedule
from prepare_data import (
    SPLITS,
    block_starts,
    get_encoding,
    prepared,
    read_meta,
    read_split,
    token_bytes,
)
from support.files import InputError, check_writable, run_script, write_text
from support.machine import pick_device, provenance
from support.page import fill, label, pack, pieces_of
from support.run import is_run
from support.sentences import END_OF_TEXT
from support.sources import pieces
from support.weights import PRETRAINED

TOKENS, MOST = 512, 4096  # of a page: if nothing is said; at most
LIKELIEST = 10  # next tokens that are shown
SAMPLE = Path(__file__).parent / "data" / "sample.txt"

# --------------------------------------------------------------------------------------------------
# the page of text


class Page(NamedTuple):
    """T tokens of a text, counted from the page's first, and what the partitioner said of them."""

    shown: str  # which part of which text
    tokens: np.ndarray  # (T,) int64
    lookback: np.ndarray  # (T,) int64
    moves: list  # (token, block, bits), as Partitioner has them
    sentences: list  # (begin, end), at least one


def choose_page(args, config, block_size):
    """What a command line asks for: (Page, vocabulary, foreign text).

    vocabulary: the bytes of each token. The foreign text, (n,) token ids, is what sentences are
    replaced with: another split of the run's text; for weights, the sample text.
    Raises InputError.
    """
    encoding = get_encoding(config["tokenizer"])
    vocabulary, split, words = token_bytes(encoding), args.split or "test", None
    T, name, text = args.tokens or min(TOKENS, block_size), f"{split} split", args.prompt
    if T > block_size:
        raise InputError(f"this model reads {block_size} tokens at most, not {T}; lower --tokens")
    if args.text:
        name, text = args.text.name, "".join(pieces(args.text))
    elif text is not None:
        name = "a prompt"
    if config["source"]:
        folder = prepared(config)
        meta = read_meta(folder)
        elsewhere = "val" if split == "test" and text is None else "test"
        words, foreign = meta["background"], read_split(folder, elsewhere, meta)[0]
    else:
        foreign = np.array(encoding.encode("".join(pieces(SAMPLE))))
    if text is None:
        tokens, lookback = read_split(folder, split, meta)
        at = liveliest(lookback, T)
    else:
        tokens, at = np.array(encoding.encode(text, allowed_special="all"), np.int64), 0
    if args.words is not None:
        at = find_words(tokens, vocabulary, args.words, name)
    if len(tokens) - at < 2:
        raise InputError(f"{name}: a page needs at least 2 tokens, and here is {len(tokens) - at}")
    how = vocabulary, config["partition"], config["max_lookback"], words
    return cut_page(name, tokens, at, at + T, *how), vocabulary, foreign


def liveliest(lookback, T):
    """The start of the block from which the most blocks begin within T tokens, the first such."""
    starts = block_starts(lookback)
    starts = starts[starts <= max(len(lookback) - T, 0)]
    return int(starts[np.argmax(np.searchsorted(starts, starts + T) - np.arange(len(starts)))])


def find_words(tokens, vocabulary, words, name):
    """The first token of some words in a text, whatever white space is between them.

    name: of the text, for the InputError where they are not in it.
    """
    chunks = (tokens[i : i + CHUNK].tolist() for i in range(0, len(tokens), CHUNK))
    text = b"".join(b"".join([vocabulary[t] for t in chunk]) for chunk in chunks)
    text = np.frombuffer(text.translate(bytes.maketrans(b"\t\n\v\f\r", b"     ")), np.uint8)
    kept = text != 32
    kept[1:] |= text[:-1] != 32  # of white space, the first character
    wanted = " ".join(words.split()).encode(errors="surrogateescape")
    found = text[kept].tobytes().find(wanted)
    if found < 0 or not wanted:
        raise InputError(f"{name}: the words {words!r} are not there")
    ends = np.cumsum(np.array([len(b) for b in vocabulary])[tokens])
    return int(np.searchsorted(ends, np.flatnonzero(kept)[found], side="right"))


def cut_page(name, tokens, at, end, vocabulary, *how):
    """The Page of tokens at … end - 1 of a text, or of as many as there are.

    name: of the text; how: the partition, as Partitioner takes it. It reads from the beginning of
    the document on.
    """
    begin, end = 0, min(end, len(tokens))
    if END_OF_TEXT in vocabulary:  # documents do not depend on each other
        ends = np.flatnonzero(tokens[:at] == vocabulary.index(END_OF_TEXT))
        begin = int(ends[-1]) + 1 if len(ends) else 0
    text, first, T = tokens[begin:end].astype(np.int64), at - begin, end - at
    lookback, moves = walk(text, vocabulary, *how)
    starts = [block - first for _, block, _ in walk(text, vocabulary, "sentence", 65535)[1]]
    which = f"tokens {at:,} … {end - 1:,} of" if T < len(tokens) else "all"
    return Page(
        f"{name}, {which} {len(tokens):,}",
        text[first:],
        np.minimum(lookback[first:], np.arange(T)),
        [(token - first, block - first, bits) for token, block, bits in moves if block >= first],
        cut_sentences(starts, T),
    )


def walk(tokens, *how):
    """What a Partitioner says of a text: the lookback, (n,) uint16, and all moves of the block.

    how: the arguments of Partitioner.
    """
    partitioner, lookback, moves = Partitioner(*how), [], []
    for i in range(0, len(tokens), CHUNK):
        lookback.append(partitioner.push(tokens[i : i + CHUNK]))
        moves += partitioner.moves[i > 0 :]  # the first says where the block was already
    return np.concatenate(lookback), moves


def cut_sentences(starts, T):
    """The (begin, end) of each sentence of T tokens, from where sentences start, ascending.

    What is shorter than a 32nd of the page goes with the next: each will take a forward pass.
    """
    edges = [0]
    for start in starts:
        if edges[-1] + max(T // 32, 2) <= start < T:
            edges.append(start)
    return list(zip(edges, [*edges[1:], T]))


# --------------------------------------------------------------------------------------------------
# where it looks, and what that depends on


@torch.no_grad()
def look(model, idx, lookback, n_keys):
    """Where every head of a model looks, a dict of tensors. idx, lookback: (1, T).

    mass: the attention that stays in the block, (L, H, T); entropy: its entropy in bits, (L, H, T);
    keys, weights: the n_keys keys with the most attention, (L, H + 1, T, n_keys). There, the mean
    over heads is one more head, the last.
    """
    block, found = model.blocks(lookback), {"mass": [], "entropy": [], "keys": [], "weights": []}
    for a in model.attention_maps(idx, lookback):  # (1, H, T, T)
        found["mass"].append(mass_inside(a, block)[0])
        found["entropy"].append(entropy(a)[0])
        top = torch.cat((a, a.mean(1, keepdim=True)), 1)[0].topk(n_keys)  # (H + 1, T, n_keys)
        found["keys"].append(top.indices)
        found["weights"].append(top.values)
    return {name: torch.stack(layers) for name, layers in found.items()}


@torch.no_grad()
def influence(model, idx, lookback, log_p, sentence, foreign):
    """What later predictions owe to a sentence: replace it; positions and blocks stay as they are.

    idx, lookback: (1, T); log_p: (T, V), the predictions with the sentence in place, in nats;
    sentence: its (begin, end); foreign: (K, end - begin) token ids to put there. The first token of
    the context stays. Returns, for every token after the sentence, KL(p || p with it replaced) in
    bits, (T - end,), and p with it replaced, (T - end, V), both means over the K. One pass serves
    all of these tokens.
    """
    begin, end = sentence
    replaced = idx.repeat(len(foreign), 1)  # (K, T)
    replaced[:, max(begin, 1) : end] = foreign[:, max(begin, 1) - begin :]
    logits = model(replaced, lookback.expand_as(replaced))[0][:, end:]  # (K, T - end, V)
    log_q, log_p = logits.log_softmax(-1), log_p[end:]
    nats = (log_p.exp() * (log_p - log_q)).sum(-1)  # (K, T - end)
    return nats.mean(0).clamp(min=0) / math.log(2), log_q.exp().mean(0)


def draw_foreign(tokens, vocabulary, sentences, n):
    """n foreign texts to replace each sentence with: a list of (n, length) int64, always the same.

    Each begins where a sentence of `tokens`, (n_tokens,), does, and is as long as it has to be.
    """
    tokens = tokens[:CHUNK].astype(np.int64)  # enough to choose from
    starts = [block for _, block, _ in walk(tokens, vocabulary, "sentence", 65535)[1]]
    rng, drawn = np.random.default_rng(0), []
    for begin, end in sentences:
        texts = [tokens[start : start + end - begin] for start in rng.choice(starts, n)]
        drawn.append(torch.tensor(np.stack([np.resize(text, end - begin) for text in texts])))
    return drawn


# --------------------------------------------------------------------------------------------------
# the file


def two_dials(schedules, fidelities, config, n_layer):
    """The two dials to show: (schedule, fidelity, lambda of each layer).

    What is not given, None, is as in the config, a dict. One schedule is shown beside
    `distributed`, and that beside `quintic`. Raises InputError.
    """
    names, floors = schedules or [config["schedule"]], fidelities or [config["fidelity"]]
    if max(len(names), len(floors)) > 2:
        raise InputError("a page shows two dials: --schedule and --fidelity come twice at most")
    if len(names) == 1:
        names = [*names, "quintic" if names[0] == "distributed" else "distributed"]
    return [(name, f, schedule(name, n_layer, f)) for name, f in zip(names, [*floors, floors[-1]])]


def read(model, page, vocabulary, foreign, dials, n_draws):
    """All that support/page.html shows, a dict. Turns the model's dial.

    page: a Page; foreign: (n,) token ids; dials: as `two_dials` gives them; n_draws: foreign
    texts to replace each sentence with.
    """
    L, H, T = model.config.n_layer, model.config.n_head, len(page.tokens)
    # 16 keys of each head; up to 32 where that takes less than 2 MB
    n_keys = min(T, max(16, min(32, int(2e6 / (6 * T * L * (H + 1))))))
    drawn = draw_foreign(foreign, vocabulary, page.sentences[:-1], n_draws)
    facts, arrays = [], {}
    with tqdm(total=2 * len(page.sentences), desc="reading", leave=False, disable=None) as bar:
        for i, (name, fidelity, lambdas) in enumerate(dials):
            model.set_locality(lambdas)
            loss, found = read_dial(model, page, drawn, n_keys, bar)
            known = {"locality": lambdas, "loss": loss, "perplexity": math.exp(min(loss, 700))}
            facts.append({"schedule": name, "fidelity": fidelity, **known})
            arrays |= {f"{key}{i}": value for key, value in found.items()}
    # the page numbers the tokens that it names from 0 on
    named = [f"{key}{i}" for key in ("likely", "new") for i in (0, 1)]
    ids = np.unique(np.concatenate([page.tokens, *(arrays[key][0].flatten() for key in named)]))
    arrays |= {key: (np.searchsorted(ids, arrays[key][0]), 1) for key in named}
    return {
        "shown": page.shown,
        "text": pieces_of([vocabulary[t] for t in page.tokens]),
        "tokens": np.searchsorted(ids, page.tokens).tolist(),
        "labels": [label(vocabulary[t]) for t in ids],
        "lookback": page.lookback.tolist(),
        "moves": page.moves,
        "sentences": page.sentences,
        "layers": L,
        "heads": H,
        "anchor": model.config.anchor,
        "keys": n_keys,
        "draws": n_draws,
        "likeliest": min(LIKELIEST, len(vocabulary)),
        "dials": facts,
        **pack(arrays),
    }


def read_dial(model, page, drawn, n_keys, bar):
    """What a page shows of a model at its dial: the loss of the page, nats per token, and arrays.

    drawn: as `draw_foreign` gives it; bar: counts the passes. The arrays are {name: (values,
    scale)}, as support.page.pack takes them; the tokens in them are ids. Raises InputError.
    """
    device = model.wte.weight.device
    idx, lookback = (torch.tensor(x, device=device)[None] for x in (page.tokens, page.lookback))
    with torch.no_grad():
        log_p = model(idx, lookback)[0][0].log_softmax(-1)  # (T, V)
    if not log_p.isfinite().all():
        raise InputError("the predictions of this model are not finite numbers")
    seen = look(model, idx, lookback, n_keys)
    bar.update()
    true = idx[0].roll(-1)[:, None]  # (T, 1), the next tokens; nothing follows the last
    likely = log_p.topk(min(LIKELIEST, log_p.size(1))).indices
    watched = torch.cat((likely, true), 1)  # (T, LIKELIEST + 1)
    nats = -log_p.gather(1, watched)
    depends = [[nats[:0, 0]] * 4]  # so that there is something to join
    for sentence, foreign in zip(page.sentences[:-1], drawn):  # nothing follows the last
        bits, p = influence(model, idx, lookback, log_p, sentence, foreign.to(device))
        after = p.gather(1, watched[sentence[1] :])
        depends.append([bits, -after.log2().flatten(), p.argmax(1), -p.amax(1).log2()])
        bar.update()
    bits, after, new, new_bits = (torch.cat(values) for values in zip(*depends))
    loss = nats[:-1, -1].double().mean().item()
    arrays = {
        "mass": (seen["mass"], 65535),
        "entropy": (seen["entropy"], 4096),
        "keys": (seen["keys"], 1),
        "roots": (seen["weights"].sqrt(), 255),  # of the weights: finer where these are small
        "likely": (likely, 1),
        "bits": (nats / math.log(2), 1024),
        "rank": ((log_p > -nats[:, -1:]).sum(1) + 1, 1),
        "influence": (bits, 1024),
        "after": (after, 1024),
        "new": (new.long(), 1),
        "new_bits": (new_bits, 1024),
    }
    return loss, {name: (values.cpu().numpy(), scale) for name, (values, scale) in arrays.items()}


def main():
    parser = argparse.ArgumentParser(description="look at a text through a model: an HTML page")
    add = parser.add_argument
    add("run", help="a run of train.py; or weights: gpt2, gpt2-medium … or a path, with a text")
    add("--split", choices=SPLITS, help="of the run's text (default: test)")
    add("--text", type=Path, help="another text, a file")
    add("--prompt", help="another text, given here")
    add("--from", dest="words", help="words to begin with (default: where most blocks begin)")
    add("--tokens", type=int, help=f"how many (default: {TOKENS}, or the model's context)")
    add("--schedule", action="append", help="another schedule than the run's; or two of them")
    add("--fidelity", type=float, action="append", help="another fidelity; or one for each")
    add("--draws", type=int, default=2, help="texts to replace each sentence with (default: 2)")
    add("--out", type=Path, help="the file to write (default: page.html, in the run's folder)")
    add("--device", default="auto")
    args = parser.parse_args()
    out = check_arguments(args)

    device = pick_device(args.device)
    model, config = load_model(args.run, device)
    dials = two_dials(args.schedule, args.fidelity, config, model.config.n_layer)
    page, vocabulary, foreign = choose_page(args, config, model.config.block_size)
    data = read(model, page, vocabulary, foreign, dials, args.draws)
    data |= {"run": args.run, "partition": config["partition"]}
    data |= {"max_lookback": config["max_lookback"], **provenance(device, config["seed"])}
    write_text(out, fill(data))
    print(f"{page.shown}; {' and '.join(dial[0] for dial in dials)}")
    print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB), for any browser")


def check_arguments(args):
    """Where to write the page, a Path. Raises InputError for what could only fail later."""
    run = args.run not in PRETRAINED and is_run(args.run)
    out = args.out or Path(args.run if run else "", "page.html")
    check_writable(out)
    other = args.text or args.prompt is not None
    if args.text and args.prompt is not None:
        raise InputError("give --text or --prompt, not both")
    if other and args.split:
        raise InputError("--split is of the run's own text; it does not go with another text")
    if not other and not run:
        which = "to look at weights, say which text: --text my_page.txt, or --prompt"
        raise InputError(f"{args.run}: no checkpoint of a run here; {which}")
    if args.tokens is not None and not 2 <= args.tokens <= MOST:
        raise InputError(f"--tokens is in 2 … {MOST}, not {args.tokens}")
    if not 1 <= args.draws <= 100:
        raise InputError(f"--draws is in 1 … 100, not {args.draws}")
    return out


if __name__ == "__main__":
    run_script(main)
