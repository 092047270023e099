"""Measure a run: perplexity, bits per byte, accuracy, and per layer how local its attention is.

    python eval.py runs/quickstart
    python eval.py runs/quickstart --schedule localist --figure localist.png  # turn the dial
    python eval.py runs/quickstart --partition block:64 --json block64.json   # other blocks
    python eval.py runs/quickstart --dial-sweep --figure dials.png            # what each dial costs
    python eval.py runs/quickstart --source my_book.txt --split train         # on another text
    python eval.py gpt2 --source my_book.txt --dial-sweep --contexts 32       # GPT-2 as published

Nothing is retrained: the weights stay as they are.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from locality import (
    PARTITIONS,
    SCHEDULES,
    SEMANTIC,
    background,
    parse_partition,
    partition,
    reach,
    schedule,
)
from model import GPT, attention_weights, clamp_lookback, in_block
from prepare_data import (
    SPLITS,
    check_blocks,
    check_shift,
    check_tokenizer,
    get_encoding,
    liveliest,
    prepared,
    read_contexts,
    read_meta,
    read_split,
    token_bytes,
    vocabulary_size,
)
from support import plots
from support.files import InputError, check_writable, run_script, write_json
from support.machine import pick_device, provenance
from support.plots import layer_mean
from support.run import find_checkpoint, is_run, read_checkpoint
from support.weights import PRETRAINED

# --------------------------------------------------------------------------------------------------
# a model from disk

# what of a run's config says which text it was trained on, and how that was prepared
TEXT_KEYS = {
    "source": (str, list),
    "data": str,
    "tokenizer": str,
    "partition": str,
    "max_lookback": int,
    "val": float,
    "test": float,
    "joined": bool,
    "seed": int,
}


def load_run(folder, device="cpu"):
    """The best model of a run, its dial set as it was trained, and the run's config, a dict.

    Raises InputError for a folder that holds no run, or a checkpoint that is not train.py's.
    """
    path = find_checkpoint(folder)
    state = read_checkpoint(path)
    config = state["config"]
    try:
        model = GPT.from_state(state, path)
        model.set_locality(schedule(config["schedule"], model.config.n_layer, config["fidelity"]))
        check_tokenizer(config["tokenizer"])
        if not all(isinstance(config[key], kind) for key, kind in TEXT_KEYS.items()):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a checkpoint of train.py") from None
    have, size = model.config.vocab_size, vocabulary_size(config["tokenizer"])
    if have != size:
        named = f"that names a tokenizer of {size}, {config['tokenizer']}"
        raise InputError(f"{path}: a model of {have} tokens {named}: not as train.py wrote it")
    return model.to(device).eval(), config


def load_weights(name, device="cpu"):
    """A GPT-2 that train.py never saw, its dial at 0, and a config for it, a dict without a text.

    name: as in GPT.from_pretrained. The size of its vocabulary tells the tokenizer.
    Raises InputError.
    """
    model = GPT.from_pretrained(name)
    size = model.config.vocab_size
    tokenizer = {50257: "gpt2", 256: "bytes"}.get(size, f"gpt2:{size}")
    try:
        check_tokenizer(tokenizer)
    except InputError:
        raise InputError(f"{name} has {size} tokens, and no tokenizer here has as many") from None
    get_encoding(tokenizer)
    if tokenizer != "gpt2":
        print(f"{name} has {size} tokens; read with the tokenizer {tokenizer}", file=sys.stderr)
    text = {"source": None, "data": "", "tokenizer": tokenizer, "joined": False}
    text |= {"val": 0.1, "test": 0.1, "seed": None}
    blocks = {"partition": "semantic", "max_lookback": model.config.max_lookback}
    dial = {"schedule": "distributed", "fidelity": 1.0}
    return model.to(device).eval(), {**text, **blocks, **dial}


def load_model(name, device="cpu", source=None):
    """A run or other weights, by `load_run` or `load_weights`.

    source: the text to measure it on; None for a run's own. Raises InputError.
    """
    if name in PRETRAINED or not is_run(name):
        model, config = load_weights(name, device)
        return model, {**config, "source": source}
    model, config = load_run(name, device)
    if source:  # what its own text was, and where, does not count
        own = "cwd", "source_sha256", "files"
        config = {key: value for key, value in config.items() if key not in own}
        config |= {"source": source, "data": ""}
    return model, config


def turn(model, config, name=None, fidelity=None):
    """Set the dial to a schedule and a fidelity; what is None is as in the config, a dict.

    Returns (schedule, fidelity). Raises InputError.
    """
    name = name or config["schedule"]
    fidelity = config["fidelity"] if fidelity is None else fidelity
    model.set_locality(schedule(name, model.config.n_layer, fidelity))
    return name, fidelity


# --------------------------------------------------------------------------------------------------
# measuring

AT_ONCE = 2**20  # attention weights to measure at a time: they fit in a processor's cache


def windows(n, block_size, stride):
    """Contexts that cover n tokens: a list of (start, first).

    In each, predictions from position `first` on are scored. So every token is scored exactly once,
    but for token 0, which nothing precedes. All windows but the first give a scored token at least
    block_size - stride tokens of context.
    """
    T = min(block_size, n - 1)
    starts = [*range(0, n - 1 - T, stride), n - 1 - T]
    ends = [0] + [start + T for start in starts]
    return [(start, end - start) for start, end in zip(starts, ends)]


@torch.no_grad()
def evaluate(
    model, tokens, lookback, vocabulary, stride=None, batch_size=8, measure=True, limit=None
):
    """Score a split, in float32: bfloat16 would round the logits by up to half a nat.

    tokens, lookback: (n,) uint16. vocabulary: the bytes of each token, a list. stride: tokens
    between two contexts, by default half a context. measure: the attention of every layer too,
    in O(T) memory, O(T * T) time. limit: at most so many contexts, evenly spread.
    Returns a dict: loss, nats per token; perplexity = exp(loss); bits_per_byte; accuracy (top-1);
    the tokens scored and their bytes; mean_lookback of those that predict them; stride and context,
    tokens; by_position, see there; by_context, a list of (loss in nats, summed; tokens scored);
    reach, as `reached` has it; layers, the means of `add_measures`.
    Raises InputError for an impossible stride.
    """
    was_training, device = model.training, model.wte.weight.device
    model.eval()
    T = min(model.config.block_size, len(tokens) - 1)
    stride = max(T // 2, 1) if stride is None else stride
    if not 1 <= stride <= T:
        raise InputError(f"stride must be in 1 … {T}, the length of a context, not {stride}")
    contexts = windows(len(tokens), T, stride)
    if limit and limit < len(contexts):
        contexts = [contexts[i] for i in np.linspace(0, len(contexts) - 1, limit, dtype=int)]
    n_bytes = torch.tensor([len(b) for b in vocabulary], device=device)
    by_context, correct, size = [], 0, 0
    sums = torch.zeros(model.config.n_layer, 4, dtype=torch.double)
    nats_at = torch.zeros(2, T, dtype=torch.double)  # each position of a context: nats, how many
    seen = 0
    batches = range(0, len(contexts), batch_size)
    for at in tqdm(batches, desc="evaluating", leave=False, disable=None if measure else True):
        starts, firsts = zip(*contexts[at : at + batch_size])
        arrays = tokens, lookback, tokens[1:]
        x, back, y = read_contexts(arrays, starts, T, device)  # (B, T) each
        score = torch.arange(T, device=device) >= torch.tensor(firsts, device=device)[:, None]
        watch = partial(add_measures, sums, model, back, score) if measure else None
        nll, best = score_all(model, model.hidden(x, back, watch), y)  # (B, T) each
        count = anywhere(starts, T, len(tokens))
        nats_at += torch.stack([(nll * count).sum(0), count.sum(0)])
        seen += clamp_lookback(back, model.config.max_lookback)[score].sum().item()
        by_context += zip((nll * score.cpu()).sum(1).tolist(), score.sum(1).tolist())
        correct += best[score].sum().item()
        size += n_bytes[y[score]].sum().item()
    model.train(was_training)
    nats, scored = map(sum, zip(*by_context))
    results = {"perplexity": math.exp(min(nats / scored, 700)), "loss": nats / scored}
    results |= {"bits_per_byte": nats / math.log(2) / size, "accuracy": correct / scored}
    results |= {"tokens": scored, "bytes": size, "stride": stride, "context": T}
    results["mean_lookback"] = seen / scored
    results["by_position"] = by_position(nats_at)
    results["by_context"] = by_context
    results["reach"] = reached(model, lookback, contexts, T)
    if measure:
        keys = "fidelity", "pointer_accuracy", "entropy", "first_token"
        rows = zip(model.locality, (sums / scored).tolist())
        results["layers"] = [{"locality": x, **dict(zip(keys, row))} for x, row in rows]
    return results


def anywhere(starts, T, n):
    """Which tokens of some contexts can stand at every position of a context? (B, T) booleans.

    starts: where in a text of n tokens each of B contexts begins. It is all but the first and the
    last T tokens of the text. In a text of less than three contexts hardly any are left; all count.
    """
    at = torch.tensor(starts)[:, None] + torch.arange(T)  # (B, T), places in the text
    return (at >= T - 1) & (at < n - T) | (n < 3 * T)


def by_position(nats_at):
    """The loss with more and more context, a list of (tokens of context at least, loss in nats).

    It falls for as long as the model uses more context. Steps no shorter than the stride compare
    the same tokens. nats_at: (2, T), at each position the losses of tokens that can stand
    `anywhere`, summed, and how many they are.
    """
    T = nats_at.size(1)
    edges = [0, *(2**i for i in range(4, 40) if 2**i < T), T]
    steps = [(a, nats_at[:, a:b].sum(1).tolist()) for a, b in zip(edges, edges[1:])]
    return [(a + 1, nats / n) for a, (nats, n) in steps if n]


def reached(model, lookback, contexts, T):
    """How many tokens back is the first that can change a prediction? See locality.reach.

    {"median", "most"} over the predictions that contexts, as `windows` gives them, score; None
    where it is the whole context.
    """
    if min(model.locality) < 1 or model.config.anchor:
        return None
    tokens, found = np.arange(T), []
    for start, first in contexts:
        back = np.minimum(lookback[start : start + T], model.config.max_lookback)
        found.append((tokens - reach(back, model.locality))[first:])
    found = np.concatenate(found)
    return {"median": float(np.median(found)), "most": int(found.max())}


def score_all(model, x, y):
    """What the head makes of x, (B, T, C), as `GPT.hidden` gives it: (loss in nats, float64 on the
    CPU; is the likeliest token the right one, booleans), (B, T) each. y: (B, T), what comes next.
    """
    losses, best = [], []
    for part, target in zip(x.flatten(0, 1).split(512), y.flatten().split(512)):
        logits = model.head(part)  # (512, V)
        losses.append(F.cross_entropy(logits, target, reduction="none").cpu())
        best.append(logits.argmax(-1) == target)
    return torch.cat(losses).double().view(y.shape), torch.cat(best).view_as(y)


def add_measures(sums, model, lookback, score, layer, q, k, v):
    """Add to sums, (n_layer, 4) float64, how local one layer's attention is, query by query.

    The columns: fidelity, the mass inside the block; pointer accuracy, whether the largest weight
    is inside; entropy in bits; the mass on the context's first token. Means over heads.
    lookback: (B, T) int64; score: (B, T) booleans, the queries that count; q, k: (B, H, T, D).
    """
    B, H, T, _ = q.shape
    lookback = clamp_lookback(lookback, model.config.max_lookback)
    n = max(AT_ONCE // (B * H * T), 1)
    for first in range(score.any(0).nonzero()[0].item(), T, n):
        end = min(first + n, T)
        block = in_block(lookback[:, first:end], model.config.anchor, first)[:, None]
        a = attention_weights(q[:, :, first:end], k[:, :, :end], block, model.locality[layer])
        pointer = block.expand_as(a).gather(-1, a.argmax(-1, keepdim=True)).squeeze(-1)
        values = fidelity_of(a, block), pointer, entropy_of(a), a[..., 0]  # (B, H, n) each
        values = torch.stack([v.cpu().double().mean(1) for v in values], -1)  # (B, n, 4)
        sums[layer] += values[score[:, first:end].cpu()].sum(0)


def fidelity_of(a, block):
    """The attention of each query that stays in its block, (B, H, n) in [0, 1].

    a: (B, H, n, T) attention probabilities of n queries; block: (B, 1, n, T) booleans.
    """
    return (a * block).sum(-1)


def entropy_of(a):
    """The entropy of each query's attention in bits, (B, H, n). a: (B, H, n, T) probabilities."""
    return torch.special.entr(a).sum(-1) / math.log(2)


def dial_sweep(model, split, vocabulary, **how):
    """Turn the dial of one model through every schedule at four fidelities; nothing is retrained.

    split: token ids and lookbacks, as `read_split` gives them; how: further arguments of
    `evaluate`. Returns a list of dicts, distributed first: what `evaluate` returns, the schedule,
    the fidelity, and the ratio of the perplexity to distributed's.
    """
    local = [name for name in SCHEDULES if name != "distributed"]
    dials = [("distributed", 1.0), *((name, f) for name in local for f in (0.25, 0.5, 0.75, 1.0))]
    rows = []
    for name, f in tqdm(dials, desc="dials", unit="dial", disable=None):
        model.set_locality(schedule(name, model.config.n_layer, f))
        results = evaluate(model, *split, vocabulary, **how)
        ratio = math.exp(results["loss"] - (rows or [results])[0]["loss"])
        rows.append({"schedule": name, "fidelity": f, "ratio": ratio, **results})
    return rows


# --------------------------------------------------------------------------------------------------
# showing


def table(results):
    """The results as lines of text."""
    lines = ["layer      dial  fidelity  pointer accuracy  entropy (bits)  on the first token"]
    for number, layer in enumerate(results["layers"], 1):
        lines.append(
            f"{number:5d}  {layer['locality']:8.3f}  {layer['fidelity']:8.3f}"
            f"  {layer['pointer_accuracy']:16.3f}  {layer['entropy']:14.2f}"
            f"  {layer['first_token']:18.3f}"
        )
    lines.append(
        f"perplexity {results['perplexity']:.3f}   bits per byte {results['bits_per_byte']:.4f}   "
        f"accuracy {100 * results['accuracy']:.2f} %   "
        f"({results['tokens']:,} tokens, stride {results['stride']})"
    )
    losses = ", ".join(f"from {n} {nats:.3f}" for n, nats in results["by_position"])
    lines.append(f"loss, nats, by tokens of context: {losses}")
    lines.append(say_reach(results["reach"]))
    return "\n".join(lines)


def say_reach(found):
    """In words, what `reached` found."""
    if found is None:
        return (
            "reach: the whole context (a layer with a dial below 1, or an anchor, sees all of it)"
        )
    median, most = found["median"], found["most"]
    held = "no earlier token can change a prediction while the blocks stay, whatever the weights"
    return f"reach, certified: {median:.0f} tokens (median), {most} at most; {held}"


def dial_table(rows):
    """The dials as lines of text."""
    lines = [
        "schedule        floor  perplexity  ratio to distributed  accuracy  "
        "mean over layers:     dial  fidelity  entropy (bits)"
    ]
    for row in rows:
        floor = "–" if row["schedule"] == "distributed" else f"{row['fidelity']:.2f}"
        dial, fidelity, bits = (layer_mean(row, k) for k in ("locality", "fidelity", "entropy"))
        lines.append(
            f"{row['schedule']:11s}  {floor:>8s}  {row['perplexity']:10.3f}"
            f"  {row['ratio']:20.4f}  {100 * row['accuracy']:6.2f} %"
            f"  {dial:26.3f}  {fidelity:8.3f}  {bits:14.2f}"
        )
    return "\n".join(lines)


@torch.no_grad()
def figure(model, tokens, lookback, vocabulary, results, path, title):
    """Draw `path`: the attention of the first and the last layer over one stretch of text, and the
    layers in numbers.

    vocabulary: the bytes of each token, to name the blocks by their first words. results: as
    `evaluate` gives them.
    """
    model.eval()
    T = min(model.config.block_size, len(tokens), 1024)
    at = liveliest(lookback, T)
    device = model.wte.weight.device
    idx, back = read_contexts((tokens, lookback), [at], T, device)  # (1, T) each
    maps = {}
    for layer, a in enumerate(model.attention_maps(idx, back)):
        if layer in (0, model.config.n_layer - 1):
            maps[layer] = a[0].mean(0).cpu().numpy()  # (T, T)
    start = np.arange(T) - clamp_lookback(back, model.config.max_lookback)[0].cpu().numpy()
    words = {}
    for token in np.unique(start).tolist():
        text = b"".join(vocabulary[t] for t in tokens[at + token : at + token + 40].tolist())
        words[token] = " ".join(text.decode(errors="replace").split()[:4])[:40]
    plots.draw_attention(maps, start, words, results["layers"], path, title)


def main():
    parser = argparse.ArgumentParser(description="measure a run, at its own dial or another")
    add = parser.add_argument
    add("run", help="a run of train.py; or weights: gpt2, gpt2-medium … or a path, with --source")
    add("--source", help="another text than the run's own, as in prepare_data.py")
    add("--split", default="test", choices=SPLITS)
    add("--schedule", help="another schedule than the one it was trained with")
    add("--fidelity", type=float, help="another fidelity, in (0, 1]")
    add("--partition", help=f"other blocks: {PARTITIONS}")
    add("--dial-sweep", action="store_true", help="every schedule at four fidelities")
    add("--contexts", type=int, help="at most so many contexts, evenly spread (default: all)")
    add("--stride", type=int, help="tokens between two contexts (default: half a context)")
    add("--batch-size", type=int, default=8)
    add("--device", default="auto")
    add("--json", type=Path, help="write the results here")
    add("--figure", type=Path, help="draw the figure here, .png, .svg or .pdf")
    args = parser.parse_args()
    check_arguments(args)

    device = pick_device(args.device)
    model, config = load_model(args.run, device, args.source)
    name, fidelity = turn(model, config, args.schedule, args.fidelity)
    split, method, vocabulary = read_text(config, args.split, args.partition)
    how = {"stride": args.stride, "batch_size": args.batch_size, "limit": args.contexts}
    results = {"run": str(args.run), "source": config["source"], "split": args.split}
    results |= {"partition": method, **provenance(device, config["seed"])}
    which = f"{args.split} split of {args.source}" if args.source else f"{args.split} split"
    title = f"{args.run}, {which}, {method} blocks"
    if args.dial_sweep:
        results["dials"] = rows = dial_sweep(model, split, vocabulary, **how)
        n_tokens = f"{rows[0]['tokens']:,} tokens"
        print(f"{title}: the dial turned, nothing retrained ({n_tokens})\n{dial_table(rows)}")
    else:
        results |= {"schedule": name, "fidelity": fidelity}
        results |= evaluate(model, *split, vocabulary, **how)
        title = f"{title}: {name}, floor {fidelity:g}"
        print(f"{title}\n{table(results)}")
    if args.json:
        write_json(args.json, results)
    if args.figure and args.dial_sweep:
        plots.draw_dials(rows, args.figure, title)
    elif args.figure:
        figure(model, *split, vocabulary, results, args.figure, title)


def check_arguments(args):
    """Raises InputError for what could only fail after the work is done."""
    for path in filter(None, (args.json, args.figure)):
        check_writable(path)
    if args.figure:
        plots.check_suffix(args.figure)
    if args.batch_size < 1 or args.contexts is not None and args.contexts < 1:
        raise InputError("--batch-size and --contexts must be at least 1")
    if args.dial_sweep and (args.schedule or args.fidelity is not None):
        every = "goes through all schedules and fidelities; leave out --schedule and --fidelity"
        raise InputError(f"--dial-sweep {every}")
    if not args.source and (args.run in PRETRAINED or not is_run(args.run)):
        which = "to measure other weights, say on which text: --source my_book.txt"
        raise InputError(f"{args.run}: no checkpoint of a run here; {which}")


def read_text(config, split, method=None):
    """((tokens, lookback), partition, vocabulary) of a split of a config's text.

    method: another partition than the config's, with the same max_lookback. Raises InputError.
    """
    folder = prepared(config)
    tokens, lookback = read_split(folder, split)
    meta = read_meta(folder)
    vocabulary = token_bytes(get_encoding(meta["tokenizer"]))
    method = method or config["partition"]
    if method != config["partition"]:
        check_blocks(method, config["max_lookback"], config["val"], config["test"])
        check_shift(method, len(tokens), folder)
        words = meta["background"]
        if config["joined"] and method == "document":
            raise InputError(f"{folder} is joined: it does not say where a document ends")
        if words is None and parse_partition(method)[0] in SEMANTIC:
            words = background(read_split(folder, "train")[0], vocabulary)
        lookback = partition(tokens, vocabulary, method, config["max_lookback"], words)
    return (tokens, lookback), method, vocabulary


if __name__ == "__main__":
    run_script(main)
