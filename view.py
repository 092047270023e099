"""Look at a text through a model: one HTML file for any browser, which needs nothing else.

    python view.py runs/quickstart                                     # a page of the test split
    python view.py runs/quickstart --split train --from "In the early"  # starting at these words
    python view.py runs/quickstart --prompt "Attention is a habit. It is learned."
    python view.py runs/quickstart --schedule localist --schedule linear  # compare these two dials
    python view.py gpt2 --text my_page.txt                             # published weights

For every token the page shows where each head looks, how much of that stays in the block, and what
may come next. It also shows what the prediction depends on: each sentence before the token is
replaced with foreign text. It shows all this at two settings of the dial, with the same weights:
the one that the run was trained with, and 0.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from eval import add_model_arguments, attention_maps, entropy_of, fidelity_of, load
from locality import CHUNK, Partitioner, schedule
from prepare_data import TextConfig, get_encoding, prepare, token_bytes
from report.blocks import liveliest
from report.page import fill, is_page, label, pack, pieces_of
from support.files import InputError, check_writable, run_script, visible, write_text
from support.machine import pick_device, provenance
from support.prepared import SPLITS
from support.run import is_run
from support.sentences import first_bytes
from support.sources import pieces

TOKENS, MOST = 512, 4096  # tokens on a page: the default, the maximum
LIKELIEST = 10  # next tokens that are shown
SAMPLE = Path(__file__).parent / "data" / "sample.txt"

# --------------------------------------------------------------------------------------------------
# the text


class Text(NamedTuple):
    """A whole text, and what belongs to it."""

    name: str
    tokens: np.ndarray  # (n,) ids
    start: int  # the first token to show
    background: dict | None  # of the partition
    foreign: np.ndarray  # ids of another text, to replace sentences with
    lookback: np.ndarray | None = None  # (n,), if it was prepared


def own_text(data, split, T):
    """A split of a run's Prepared text; the foreign text is another split. T: tokens to show."""
    tokens, lookback = data.split(split)
    foreign, _ = data.split("val" if split == "test" else "test")
    start = liveliest(lookback, T)
    return Text(f"{split} split", tokens, start, data.meta["background"], foreign, lookback)


def given_text(config, trained_on, path, prompt):
    """The text of a file, or the prompt, for a run or for published weights.

    The foreign text is the run's test split; for weights, the sample text. Raises InputError.
    """
    encoding, background = get_encoding(config["tokenizer"]), None
    name, text = (path.name, "".join(pieces(path))) if path else ("a prompt", prompt)
    tokens = np.array(encoding.encode(text, allowed_special="all"), np.int64)
    if config["source"]:
        data = prepare(TextConfig.of(config), trained_on)
        background, (foreign, _) = data.meta["background"], data.split("test")
    else:
        foreign = np.array(encoding.encode("".join(pieces(SAMPLE)), allowed_special="all"))
    return Text(name, tokens, 0, background, foreign)


def find_words(text, vocabulary, words):
    """The first token of some words in a Text, whatever white space is between them.

    Raises InputError if the text does not contain them.
    """
    chunks = (text.tokens[i : i + CHUNK].tolist() for i in range(0, len(text.tokens), CHUNK))
    letters = b"".join(b"".join([vocabulary[t] for t in chunk]) for chunk in chunks)
    letters = letters.translate(bytes.maketrans(b"\t\n\v\f\r", b"     "))
    letters = np.frombuffer(letters, np.uint8)
    kept = letters != 32
    kept[1:] |= letters[:-1] != 32  # the first character of each run of white space
    wanted = " ".join(words.split()).encode(errors="surrogateescape")
    at = letters[kept].tobytes().find(wanted)
    if at < 0 or not wanted:
        raise InputError(f"{text.name} does not contain the words {words!r}; see --split")
    ends = np.cumsum(np.array([len(b) for b in vocabulary])[text.tokens])
    return int(np.searchsorted(ends, np.flatnonzero(kept)[at], side="right"))


class Excerpt(NamedTuple):
    """T tokens of a text, counted from the first of them, and what the partitioner found there."""

    shown: str  # which tokens of which text
    tokens: np.ndarray  # (T,) int64
    lookback: np.ndarray  # (T,) int64
    marks: list  # (token, block, words): where it was recognized that a block began at `block`
    sentences: list  # (begin, end), at least one


def cut(text, T, vocabulary, config):
    """The Excerpt of T tokens of a Text, or of as many as there are from its start on.

    config: a dict with the partition, which reads the text from its beginning. Raises InputError if
    there are fewer than 2 tokens.
    """
    start, n = text.start, len(text.tokens)
    end = min(start + T, n)
    if end - start < 2:
        raise InputError(f"{text.name}: a page needs at least 2 tokens, not {end - start}")
    partition, cap = config["partition"], config["max_lookback"]
    partitioner = Partitioner(vocabulary, partition, cap, text.background, config["plain"])
    lookback, moves = walk(text.tokens[:end], partitioner)
    if text.lookback is not None:  # a joined text no longer says where a document ends
        lookback = text.lookback[:end].astype(np.int64)
    marks = [
        (token - start, block - start, "cap" if bits is None else bits_in_words(bits))
        for token, block, bits in moves
        if partition in ("semantic", "semantic:closed") and block > start and bits != math.inf
    ]
    which = f"tokens {start:,} … {end - 1:,} of {n:,}" if end - start < n else f"all {n:,} tokens"
    return Excerpt(
        f"{text.name}, {which}",
        text.tokens[start:end].astype(np.int64),
        np.minimum(lookback[start:], np.arange(end - start)),
        marks,
        join_short(sentence_starts(text.tokens[start:end], vocabulary), end - start),
    )


def bits_in_words(bits):
    return f"{bits:.1f} bits" if bits < 39.9 else "> 40 bits"  # see ChangePoints.bits_later


def walk(tokens, partitioner):
    """What a fresh Partitioner finds in a text: the lookback, (n,) int64, and all moves."""
    lookback, moves = [], []
    for i in range(0, len(tokens), CHUNK):
        lookback.append(partitioner.push(tokens[i : i + CHUNK]))
        moves += partitioner.moves[1:]
    return np.concatenate(lookback).astype(np.int64), moves


def sentence_starts(tokens, vocabulary):
    """The first token of each sentence of a text, a list that begins with 0."""
    text = [vocabulary[t] for t in tokens]
    ends = np.cumsum([len(b) for b in text])
    starts = np.unique(np.searchsorted(ends, first_bytes(b"".join(text)), side="right"))
    return starts[starts < len(text)].tolist()


def join_short(starts, T, apart=()):
    """The (begin, end) of the sentences of T tokens. starts: their first tokens, the first at 0.

    A sentence shorter than T / 32 is joined with the next, because each takes a forward pass.
    apart: sentences that begin at these tokens are not joined with what precedes them.
    """
    edges = [0]
    for start in starts:
        if start - edges[-1] >= max(T / 32, 2) or start in apart and start > edges[-1]:
            edges.append(start)
    return list(zip(edges, [*edges[1:], T]))


# --------------------------------------------------------------------------------------------------
# where the model looks, and what its predictions depend on


@torch.no_grad()
def look(model, idx, lookback, n_keys):
    """Where every head of a model looks, a dict of tensors. idx, lookback: (1, T).

    fidelity: the attention that stays in the block, (L, H, T); entropy: in bits, (L, H, T); keys,
    weights: the n_keys keys with the most attention, (L, H + 1, T, n_keys), where the mean over
    heads is one more head, the last.
    """
    block = model.in_block(lookback)  # (1, 1, T, T)
    layers = {"fidelity": [], "entropy": [], "keys": [], "weights": []}
    for a in attention_maps(model, idx, lookback):  # (1, H, T, T)
        layers["fidelity"].append(fidelity_of(a, block)[0])
        layers["entropy"].append(entropy_of(a)[0])
        top = torch.cat((a, a.mean(1, keepdim=True)), 1)[0].topk(n_keys)  # (H + 1, T, n_keys)
        layers["keys"].append(top.indices)
        layers["weights"].append(top.values)
    return {name: torch.stack(values) for name, values in layers.items()}


@torch.no_grad()
def influence(model, idx, lookback, log_p, sentence, foreign):
    """How much later predictions depend on a sentence: replace it with K texts, one by one.

    idx: (1, T); log_p: (T, V), the predictions with the original sentence, in nats; sentence: its
    (begin, end); foreign: (K, end - begin) ids to replace it with; lookback: (1, T), which holds
    meanwhile. Positions do not change, nor does the first token. The model is in eval mode, and
    everything is on its device.
    Returns, for every token after the sentence, KL(p || p with it replaced) in bits, (K, T - end),
    and p with it replaced, the mean over the K, (T - end, V). One pass serves all these tokens.
    """
    begin, end = max(sentence[0], 1), sentence[1]
    bits, mean_p = [], 0.0
    for text in foreign:
        replaced = idx.clone()
        replaced[0, begin:end] = text[begin - sentence[0] :]
        log_q = model(replaced, lookback)[0][0, end:].log_softmax(-1)  # (T - end, V)
        nats = (log_p[end:].exp() * (log_p[end:] - log_q)).sum(-1)  # (T - end,)
        bits.append(nats / math.log(2))
        mean_p = mean_p + log_q.exp() / len(foreign)
    return torch.stack(bits), mean_p


def draw_foreign(tokens, vocabulary, sentences, n, seed=0):
    """n foreign texts to replace each sentence with: a list of (n, length) int64.

    The same seed draws the same texts. Each begins where a sentence of `tokens`, (n_tokens,), does
    and has the length of the sentence it replaces. (When the first sentence is replaced,
    `influence` keeps its first token.)
    """
    tokens = tokens[:CHUNK].astype(np.int64)  # enough to choose from
    starts, drawn = np.array(sentence_starts(tokens, vocabulary)), []
    rng = np.random.default_rng(seed)
    for begin, end in sentences:
        long_enough = starts[starts <= len(tokens) - (end - begin)]
        candidates = long_enough if len(long_enough) else starts
        chosen = rng.choice(candidates, n, replace=len(candidates) < n)
        texts = [np.resize(tokens[start : start + end - begin], end - begin) for start in chosen]
        drawn.append(torch.tensor(np.stack(texts)))
    return drawn


# --------------------------------------------------------------------------------------------------
# the page


def two_dials(schedules, floors, config, n_layer):
    """The two dials to show: (schedule, floor, locality of each layer).

    What is None is taken from the config, a dict. A single schedule is shown beside `distributed`,
    and that beside `quintic`. Raises InputError.
    """
    names, floors = schedules or [config["schedule"]], floors or [config["floor"]]
    if max(len(names), len(floors)) > 2:
        raise InputError("a page shows two dials: give --schedule and --floor at most twice each")
    if len(names) == 1 and len(floors) == 1:
        names = [*names, "quintic" if names[0] == "distributed" else "distributed"]
    pairs = zip([*names, names[-1]], [*floors, floors[-1]][:2])
    return [(name, floor, schedule(name, n_layer, floor)) for name, floor in pairs]


def measure(model, excerpt, vocabulary, foreign, dials, n_draws):
    """Everything that report/page.html shows of a model and an Excerpt, a dict.

    It turns the model's dial. foreign: (n,) token ids; dials: what `two_dials` returned; n_draws:
    foreign texts per sentence. Raises InputError.
    """
    L, H, T = model.config.n_layer, model.config.n_head, len(excerpt.tokens)
    # 16 keys of each head; up to 32 if that takes less than 2 MB, at 3 bytes per key
    n_keys = min(T, max(16, min(32, int(2e6 / (2 * 3 * T * L * (H + 1))))))
    drawn = draw_foreign(foreign, vocabulary, excerpt.sentences[:-1], n_draws)
    facts, arrays = [], {}
    with tqdm(total=2 * len(excerpt.sentences), desc="viewing", leave=False, disable=None) as bar:
        for i, (name, floor, locality) in enumerate(dials):
            model.set_locality(locality)
            loss, measured = measure_dial(model, excerpt, drawn, n_keys, bar)
            perplexity = math.exp(min(loss, 700))
            facts.append(
                {"schedule": name, "floor": floor, "locality": locality, "perplexity": perplexity}
            )
            arrays |= {f"{key}{i}": value for key, value in measured.items()}
    # the page numbers the tokens that it names from 0 on
    named = [f"{key}{i}" for key in ("likely", "new") for i in (0, 1)]
    ids = [excerpt.tokens, *(arrays[key][0].flatten() for key in named)]
    ids = np.unique(np.concatenate(ids).astype(np.int64))
    arrays |= {key: (np.searchsorted(ids, arrays[key][0]), 1) for key in named}
    return {
        "shown": visible(excerpt.shown),
        "text": pieces_of([vocabulary[t] for t in excerpt.tokens]),
        "tokens": np.searchsorted(ids, excerpt.tokens).tolist(),
        "labels": [label(vocabulary[t]) for t in ids],
        "lookback": excerpt.lookback.tolist(),
        "marks": excerpt.marks,
        "sentences": excerpt.sentences,
        "layers": L,
        "heads": H,
        "anchor": model.config.anchor,
        "keys": n_keys,
        "draws": n_draws,
        "likeliest": min(LIKELIEST, len(vocabulary)),
        "dials": facts,
        **pack(arrays),
    }


@torch.no_grad()
def measure_dial(model, excerpt, drawn, n_keys, bar):
    """What a page shows of a model at its dial: the loss, nats per token, and arrays.

    drawn: what `draw_foreign` returned; bar: counts the passes. The arrays are {name: (values,
    scale)} as report.page.pack takes them; the tokens in them are ids. Raises InputError.
    """
    device = model.wte.weight.device
    idx = torch.tensor(excerpt.tokens, device=device)[None]  # (1, T)
    lookback = torch.tensor(excerpt.lookback, device=device)[None]  # (1, T)
    log_p = model(idx, lookback)[0][0].log_softmax(-1)  # (T, V)
    if not log_p.isfinite().all():
        raise InputError("the predictions of this model are not finite numbers")
    seen = look(model, idx, lookback, n_keys)
    bar.update()
    true = idx[0].roll(-1)[:, None]  # (T, 1), the next tokens; nothing follows the last
    likely = log_p.topk(min(LIKELIEST, log_p.size(1))).indices
    ranked = torch.cat((likely, true), 1)  # (T, LIKELIEST + 1)
    log_ranked = log_p.gather(1, ranked)
    arrays = {
        "fidelity": (seen["fidelity"], 65535),
        "entropy": (seen["entropy"], 4096),
        "keys": (seen["keys"], 1),
        "roots": (seen["weights"].sqrt(), 255),  # of the weights: finer where these are small
        "likely": (likely, 1),
        "bits": (-log_ranked / math.log(2), 1024),
        "rank": ((log_p > log_ranked[:, -1:]).sum(1) + 1, 1),
    }
    arrays = {name: (values.cpu().numpy(), scale) for name, (values, scale) in arrays.items()}
    replaced = {"influence": [], "after": [], "new": [], "new_bits": []}
    for (begin, end), foreign in zip(excerpt.sentences[:-1], drawn):  # nothing follows the last
        bits, p = influence(model, idx, lookback, log_p, (begin, end), foreign.to(device))
        best = p.max(1)
        values = bits.mean(0), -p.gather(1, ranked[end:]).log2(), best.indices, -best.values.log2()
        for name, value in zip(replaced, values):
            replaced[name].append(value.flatten().cpu().numpy())
        bar.update()
    for name, values in replaced.items():  # those of all sentences, one after another
        arrays[name] = np.concatenate([[], *values]), 1 if name == "new" else 1024
    return -log_ranked[:-1, -1].cpu().double().mean().item(), arrays


def main():
    parser = argparse.ArgumentParser(description="look at a text through a model: an HTML page")
    add_model_arguments(parser, action="append")
    add = parser.add_argument
    add("--split", choices=SPLITS, help="of the run's text (default: test)")
    add("--text", type=Path, help="another text, a file")
    add("--prompt", help="another text, given here")
    add("--from", dest="words", help="words to begin with (default: where most blocks begin)")
    add("--tokens", type=int, help=f"how many (default: {TOKENS}, or the model's context)")
    add("--draws", type=int, default=2, help="foreign texts per sentence (default: 2)")
    add("--out", type=Path, help="a file (default: page.html, in the run's folder or here)")
    args = parser.parse_args()
    out = check_arguments(args)

    device = pick_device(args.device)
    model, config, trained_on = load(args.run, device, plain=args.plain)
    dials = two_dials(args.schedule, args.floor, config, model.config.n_layer)
    T = args.tokens or min(TOKENS, model.config.block_size)
    if not 2 <= T <= model.config.block_size:
        raise InputError(f"this model reads at most {model.config.block_size} tokens, not {T}")
    vocabulary = token_bytes(get_encoding(config["tokenizer"]))
    if args.text or args.prompt is not None:
        text = given_text(config, trained_on, args.text, args.prompt)
    else:
        text = own_text(prepare(TextConfig.of(config), trained_on), args.split or "test", T)
    if args.words is not None:
        text = text._replace(start=find_words(text, vocabulary, args.words))
    excerpt = cut(text, T, vocabulary, config)
    data = measure(model, excerpt, vocabulary, text.foreign, dials, args.draws)
    data |= {"run": visible(args.run), "partition": config["partition"]}
    data |= {"max_lookback": config["max_lookback"], **provenance(device, config["seed"])}
    write_text(out, fill(data))
    names = [name if name == "distributed" else f"{name} {floor:g}" for name, floor, _ in dials]
    print(f"{excerpt.shown}; {' and '.join(names)}")
    print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB), for any browser")


def check_arguments(args):
    """The Path of the page. Raises InputError for what would otherwise fail only later."""
    run = is_run(args.run)
    out = args.out or Path(args.run if run else "", "page.html")
    if out.suffix != ".html":  # so that no text and no weights are overwritten
        raise InputError(f"{out}: the name of a page must end in .html")
    check_writable(out)
    if out.exists() and not is_page(out):
        raise InputError(f"{out} is not a page of view.py; give another --out")
    other = args.text or args.prompt is not None
    if args.text and args.prompt is not None:
        raise InputError("give --text or --prompt, not both")
    if other and args.split:
        raise InputError(
            "--split selects a part of the run's text; it does not apply to --text or --prompt"
        )
    if not other and not run:
        raise InputError(
            f"{args.run} contains no checkpoint of a run; to look at other weights, give a text: "
            "--text my_page.txt, or --prompt"
        )
    if args.tokens is not None and not 2 <= args.tokens <= MOST:
        raise InputError(f"--tokens must be in 2 ... {MOST}, not {args.tokens}")
    if not 1 <= args.draws <= 100:
        raise InputError(f"--draws must be in 1 ... 100, not {args.draws}")
    return out


if __name__ == "__main__":
    run_script(main)
