"""Measure a run: perplexity, bits per byte, accuracy, and how local the attention of each layer is.

    python eval.py runs/quickstart
    python eval.py runs/quickstart --schedule localist --figure localist.png  # turn the dial
    python eval.py runs/quickstart --partition block:64 --json block64.json   # with other blocks
    python eval.py runs/quickstart --dial-sweep --figure dials.png            # what each dial costs
    python eval.py runs/quickstart --dial-sweep --floor 1                     # at one floor only
    python eval.py runs/quickstart --source my_book.txt --split all           # on another text
    python eval.py gpt2 --source my_book.txt --dial-sweep --contexts 32       # GPT-2 as published

Nothing is retrained: the weights stay as they are.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import itertools
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from locality import (
    SCHEDULES,
    check_causal,
    count_background,
    parse_partition,
    partition_names,
    partition_text,
    reach,
    schedule,
    schedule_names,
)
from model import GPT, attention_weights, clamp_lookback, in_block
from prepare_data import TextConfig, check_partition, prepare, read_contexts
from report import plots
from report.blocks import choose_stretch
from report.stats import paired, resampled_losses
from report.tables import dial_table, measures_table
from support import weights
from support.files import InputError, check_writable, is_replaceable, run_script, write_json
from support.machine import pick_device, provenance
from support.prepared import SPLITS
from support.published import exported_tokenizer
from support.run import find_checkpoint, is_run, read_checkpoint
from support.tokenizers import get_encoding, token_bytes, tokenizer_by_size, vocabulary_size

# --------------------------------------------------------------------------------------------------
# a model from disk


def load(name, device="cpu", source=None, plain=False):
    """A run of train.py or published weights: (model, config, trained_on).

    The model is in eval mode, with the locality of its training. config: the keys of train.Config,
    a dict. trained_on: what the checkpoint says of the text, a dict; empty for published weights,
    only the background if `source` names another text. plain: use the code of the lesson, without
    fast/.
    Raises InputError for anything else, or a damaged checkpoint.
    """
    if not is_run(name):
        return load_published(name, device, source, plain)
    path = find_checkpoint(name)
    state = read_checkpoint(path)
    try:
        config = state["config"] | {"plain": plain or state["config"]["plain"]}
        trained_on = {**state["text"], "cwd": state["cwd"]}
        model = GPT.from_state(state, path, plain=config["plain"])
        model.set_locality(schedule(config["schedule"], model.config.n_layer, config["floor"]))
        TextConfig.of(config)
        config["seed"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a checkpoint of train.py") from None
    if model.config.vocab_size != vocabulary_size(config["tokenizer"]):
        raise InputError(
            f"{path}: not a checkpoint of train.py: the model has {model.config.vocab_size} "
            f"tokens, its tokenizer {vocabulary_size(config['tokenizer'])}"
        )
    if source:
        config |= {"source": source, "data": ""}
        trained_on = {"background": trained_on["background"]}
    return model.to(device).eval(), config, trained_on


def load_published(name, device, source, plain):
    """`load` for a GPT-2 that train.py has not trained: its tokens are GPT-2's, unless it is an
    export of a run with another tokenizer. Raises InputError."""
    path = weights.find(name)
    state = weights.load(path)
    if "model_config" in state:  # its dial, its blocks and its text would be ignored
        raise InputError(f"{path} is a checkpoint of a run; give the folder of the run")
    model = GPT.from_state(state, path, plain=plain)
    size = model.config.vocab_size
    tokenizer = tokenizer_by_size(size)
    if tokenizer not in ("gpt2", exported_tokenizer(path)):
        raise InputError(
            f"{path} has {size:,} tokens and no vocabulary beside it, and is not an export with "
            "one of our tokenizers; if it reads GPT-2's tokens, put GPT-2's vocab.json and "
            "merges.txt there"
        )
    get_encoding(tokenizer)
    if tokenizer != "gpt2":
        print(f"{name} has {size} tokens; using the tokenizer {tokenizer}", file=sys.stderr)
    config = asdict(TextConfig(max_lookback=model.config.max_lookback, plain=plain))
    config |= {"source": source, "tokenizer": tokenizer}
    config |= {"schedule": "distributed", "floor": 1.0, "seed": None}
    return model.to(device).eval(), config, {}


def turn(model, config, name=None, floor=None):
    """Set the locality of a model to that of a schedule and a floor; None: those of the config.

    Returns (schedule, floor). Raises InputError.
    """
    name = name or config["schedule"]
    floor = config["floor"] if floor is None else floor
    model.set_locality(schedule(name, model.config.n_layer, floor))
    return name, floor


# --------------------------------------------------------------------------------------------------
# measuring

AT_ONCE = 2**20  # attention weights to measure at a time: they fit in a processor's cache


def windows(n, block_size, stride, limit=None):
    """Contexts that cover n tokens: a list of (start, first).

    In each, predictions from position `first` on are scored, so that every token is scored exactly
    once, except token 0, which nothing precedes. In all windows but the first, a scored token has
    at least block_size - stride tokens of context. limit: at most this many, evenly spread.
    """
    T = min(block_size, n - 1)
    starts = [*range(0, n - 1 - T, stride), n - 1 - T]
    ends = [0] + [start + T for start in starts]
    contexts = [(start, end - start) for start, end in zip(starts, ends)]
    if limit and limit < len(contexts):
        return [contexts[i] for i in np.linspace(0, len(contexts) - 1, limit, dtype=int)]
    return contexts


@torch.no_grad()
def evaluate(
    model, tokens, lookback, vocabulary, stride=None, batch_size=8, measure=True, limit=None
):
    """Score a split, in float32: bfloat16 would round the logits by up to half a nat.

    tokens, lookback: (n,) uint16. vocabulary: the bytes of each token, a list. stride: tokens
    between two contexts, by default half a context. measure: the attention of every layer too,
    in O(T) memory and O(T * T) time. limit: at most this many contexts, evenly spread.
    Returns a dict: loss, nats per token; perplexity = exp(loss); bits_per_byte; accuracy (top-1);
    the number of tokens scored and their bytes; mean_lookback of those that predict them; stride
    and context, tokens; by_position, see there; by_context, a list of (loss in nats, summed; tokens
    scored); reach, see `reached`; layers, the means of `add_measures`.
    Raises InputError for an impossible stride.
    """
    was_training, device = model.training, model.wte.weight.device
    model.eval()
    T = min(model.config.block_size, len(tokens) - 1)
    stride = max(T // 2, 1) if stride is None else stride
    if not 1 <= stride <= T:
        raise InputError(f"stride must be in 1 ... {T}, the length of a context, not {stride}")
    contexts = windows(len(tokens), T, stride, limit)
    n_bytes = torch.tensor([len(b) for b in vocabulary], device=device)
    by_context, correct, size, looked_back = [], 0, 0, 0
    sums = torch.zeros(model.config.n_layer, 4, dtype=torch.double)
    nats_at = torch.zeros(2, T, dtype=torch.double)  # per position of a context: nats, and count
    batches = range(0, len(contexts), batch_size)
    for at in tqdm(batches, desc="evaluating", leave=False, disable=None if measure else True):
        starts, firsts = zip(*contexts[at : at + batch_size])
        x, back, y = read_contexts((tokens, lookback, tokens[1:]), starts, T, device)  # (B, T)
        back = clamp_lookback(back, model.config.max_lookback)
        score = torch.arange(T, device=device) >= torch.tensor(firsts, device=device)[:, None]
        watch = partial(add_measures, sums, model, back, score) if measure else None
        nll, best = score_all(model, model.hidden(x, back, watch), y)  # (B, T) each
        count = anywhere(starts, T, len(tokens))
        nats_at += torch.stack([(nll * count).sum(0), count.sum(0)])
        looked_back += back[score].sum().item()
        by_context += zip((nll * score.cpu()).sum(1).tolist(), score.sum(1).tolist())
        correct += best[score].sum().item()
        size += n_bytes[y[score]].sum().item()
    model.train(was_training)
    nats, scored = map(sum, zip(*by_context))
    results = {
        "perplexity": math.exp(min(nats / scored, 700)),
        "loss": nats / scored,
        "bits_per_byte": nats / math.log(2) / size,
        "accuracy": correct / scored,
        **{"tokens": scored, "bytes": size, "stride": stride, "context": T},
        "mean_lookback": looked_back / scored,
        "by_position": by_position(nats_at),
        "by_context": by_context,
        "reach": reached(model, lookback, contexts, T),
    }
    if measure:
        names = "fidelity", "pointer_accuracy", "entropy", "first_token"
        rows = zip(model.locality, (sums / scored).tolist())
        results["layers"] = [{"locality": x, **dict(zip(names, row))} for x, row in rows]
    return results


def anywhere(starts, T, n):
    """Which tokens of some contexts can be at every position of a context? (B, T) booleans.

    starts: where in a text of n tokens each of B contexts begins. These tokens are all but the
    first T - 1 and the last T of the text. In a text shorter than three contexts few or none would
    be left, so all tokens count.
    """
    at = torch.tensor(starts)[:, None] + torch.arange(T)  # (B, T), places in the text
    return (at >= T - 1) & (at < n - T) | (n < 3 * T)


def by_position(nats_at):
    """The loss by length of context: a list of (minimum tokens of context, nats per token).

    The loss falls as long as the model benefits from more context. Entries that span at least one
    stride average over the same tokens. nats_at: (2, T): for each position, the summed loss and the
    number of tokens, counting only those that `anywhere` selects.
    """
    T = nats_at.size(1)
    edges = [0, *(2**i for i in range(4, 40) if 2**i < T), T]
    steps = [(a, nats_at[:, a:b].sum(1).tolist()) for a, b in zip(edges, edges[1:])]
    return [(a + 1, nats / n) for a, (nats, n) in steps if n]


def reached(model, lookback, contexts, T):
    """How many tokens back is the first that can change a prediction? See locality.reach.

    Returns {"median", "most"} over the predictions that are scored in the contexts, which are those
    of `windows`; None if that is the whole context.
    """
    if min(model.locality) < 1 or model.config.anchor:
        return None
    tokens, distances = np.arange(T), []
    for start, first in contexts:
        back = np.minimum(lookback[start : start + T], model.config.max_lookback)
        distances.append((tokens - reach(back, model.locality))[first:])
    distances = np.concatenate(distances)
    return {"median": float(np.median(distances)), "most": int(distances.max())}


def score_all(model, x, y):
    """Score the predictions of the output head for x, (B, T, C), which is what GPT.hidden returns.

    y: (B, T), the next tokens. Returns (loss in nats, float64 on the CPU; whether the most likely
    token is the right one, booleans), (B, T) each.
    """
    losses, best = [], []
    for part, target in zip(x.flatten(0, 1).split(512), y.flatten().split(512)):
        logits = model.head(part)  # (512, V)
        losses.append(F.cross_entropy(logits, target, reduction="none").cpu())
        best.append(logits.argmax(-1) == target)
    return torch.cat(losses).double().view(y.shape), torch.cat(best).view_as(y)


def add_measures(sums, model, lookback, score, layer, q, k, v):
    """Add to sums, (n_layer, 4) float64, how local the attention of a layer is, query by query.

    The columns: fidelity, the mass inside the block; pointer accuracy, whether the largest weight
    is inside; entropy in bits; the mass on the context's first token. Means over heads.
    lookback: (B, T) int64, clamped; score: (B, T) booleans, the queries that count; q, k, v: (B, H,
    T, D).
    """
    B, H, T, _ = q.shape
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


@torch.no_grad()
def attention_maps(model, idx, lookback):
    """Yield each layer's attention probabilities, (B, H, T, T). idx, lookback: (B, T)."""
    block, seen = model.in_block(lookback), []
    model.hidden(idx, lookback, lambda layer, q, k, v: seen.append((q, k)))
    for (q, k), locality in zip(seen, model.locality):
        yield attention_weights(q, k, block, locality)


FLOORS = 0.25, 0.5, 0.75, 1.0


def dial_sweep(model, split, vocabulary, names=None, floors=None, **options):
    """Turn the dial of one model; nothing is retrained.

    split: token ids and lookbacks, as in `evaluate`, which takes the options. names: of schedules,
    by default those of SCHEDULES, without the rivals; distributed is always the first. floors: by
    default FLOORS. Returns a list of dicts: the schedule, the floor, what `evaluate` returns, and
    the `ratio` of the perplexity to that of distributed with its interval over the text, `text`
    (see report.stats).
    Raises InputError if a loss is not a finite number.
    """
    local = dict.fromkeys(name for name in names or SCHEDULES if name != "distributed")
    dials = [("distributed", 1.0), *itertools.product(local, dict.fromkeys(floors or FLOORS))]
    rows = []
    for name, floor in tqdm(dials, desc="dials", unit="dial", disable=None):
        model.set_locality(schedule(name, model.config.n_layer, floor))
        results = evaluate(model, *split, vocabulary, **options)
        check_predictions(results)
        first = (rows or [results])[0]
        runs = [[{"seed": 0, "by_context": r["by_context"]}] for r in (results, first)]
        losses = {0: results["loss"]}, {0: first["loss"]}
        compared = paired(*losses, resampled_losses(*runs), ratio=True)
        ratio = {key: compared[key] for key in ("ratio", "text")}
        rows.append({"schedule": name, "floor": floor, **ratio, **results})
    return rows


def figure(model, tokens, lookback, vocabulary, results, path, title):
    """Draw the attention of the last layer in a stretch of text, with its dial at 0 and at 1, and
    the fidelity and the entropy of all layers.

    vocabulary: the bytes of each token. results: what `evaluate` returned. path: of the figure,
    .png, .svg or .pdf.
    """
    model.eval()
    cap, own, device = model.config.max_lookback, model.locality, model.wte.weight.device
    at, T = choose_stretch(tokens, lookback, vocabulary, cap, min(model.config.block_size, 1024))
    idx, back = read_contexts((tokens, lookback), [at], T, device)  # (1, T) each
    block, maps, measures = model.in_block(back), [], []
    for locality in ([*own[:-1], 0.0], [*own[:-1], 1.0], [0.0] * len(own), own):
        model.set_locality(locality)
        layers = []
        for a in attention_maps(model, idx, back):  # (1, H, T, T)
            values = zip(("fidelity", "entropy"), (fidelity_of(a, block), entropy_of(a)))
            layers.append({name: value.mean().item() for name, value in values})
        maps.append(a[0].mean(0).cpu().numpy())  # (T, T), of the last layer
        measures.append(layers)
    pieces, back = [vocabulary[t] for t in idx[0].tolist()], clamp_lookback(back, cap)
    stretch = plots.Stretch(pieces, back[0].cpu().numpy(), block[0, 0].cpu().numpy(), maps[:2])
    plots.draw_attention(stretch, *measures[2:], results["layers"], path, title)


# --------------------------------------------------------------------------------------------------
# the command line


def add_model_arguments(parser, action="store", several="; give it twice to compare two"):
    """What eval.py, sample.py and view.py share. action: of --schedule and --floor; with "append",
    `several` says what happens if they are given several times."""
    add = parser.add_argument
    add("run", help="a run of train.py; or weights: gpt2, gpt2-medium ... or a path")
    several = several if action == "append" else ""
    names = f"{schedule_names()}{several}"
    add("--schedule", action=action, help=f"overrides that of the run: {names}")
    add("--floor", type=float, action=action, help=f"another floor, above 0 and at most 1{several}")
    add("--plain", action="store_true", help="run the code of the lesson, without fast/")
    add("--device", default="auto", help="auto (CUDA if available), cpu, cuda, cuda:1, mps")


def main():
    parser = argparse.ArgumentParser(description="measure a run, at its own dial or another")
    several = "; with --dial-sweep, it can be given several times"
    add_model_arguments(parser, "append", several)
    add = parser.add_argument
    add("--source", help="another text, as in prepare_data.py; required for weights")
    add(
        "--split",
        choices=(*SPLITS, "all"),
        help="the part of the text to measure (default: test for a run, all for weights)",
    )
    add("--partition", help=f"other blocks: {partition_names()}")
    add(
        "--dial-sweep",
        action="store_true",
        help="compare the given schedules (default: all but the rivals) and floors (default: four)",
    )
    add("--contexts", type=int, help="at most this many contexts, evenly spread (default: all)")
    add("--stride", type=int, help="tokens between two contexts (default: half a context)")
    add("--batch-size", type=int, default=8)
    add("--json", type=Path, help="write the results here")
    add("--figure", type=Path, help="draw the figure here, .png, .svg or .pdf")
    args = parser.parse_args()
    check_arguments(args)

    device = pick_device(args.device)
    model, config, trained_on = load(args.run, device, args.source, args.plain)
    partition = args.partition or config["partition"]
    split = args.split or ("test" if is_run(args.run) else "all")
    arrays, vocabulary = read_text(config, trained_on, split, partition)
    options = {"stride": args.stride, "batch_size": args.batch_size, "limit": args.contexts}
    results = {"run": str(args.run), "source": config["source"], "split": split}
    results |= {"partition": partition, **provenance(device, config["seed"])}
    of = f" of {args.source}" if args.source else ""
    which = "whole text" if split == "all" else f"{split} split"
    title = f"{args.run}, {which}{of}, {partition} blocks"
    if args.dial_sweep:
        dials = args.schedule, args.floor
        results["dials"] = rows = dial_sweep(model, arrays, vocabulary, *dials, **options)
        print(f"{title}: the dial turned, nothing retrained ({rows[0]['tokens']:,} tokens)")
        print(dial_table(rows))
    else:
        given = [(values or [None])[0] for values in (args.schedule, args.floor)]
        name, floor = turn(model, config, *given)
        results |= {"schedule": name, "floor": floor}
        results |= evaluate(model, *arrays, vocabulary, **options)
        check_predictions(results)
        title = f"{title}: {name}, floor {floor:g}"
        print(f"{title}\n{measures_table(results)}")
    if args.json:
        write_json(args.json, results)
    if args.figure and args.dial_sweep:
        plots.draw_dials(rows, args.figure, title)
    elif args.figure:
        figure(model, *arrays, vocabulary, results, args.figure, title)


def check_arguments(args):
    """Raises InputError for what would otherwise fail only after the work is done."""
    for path in filter(None, (args.json, args.figure)):
        check_writable(path)
    if args.json and not is_replaceable(args.json, "run"):
        raise InputError(
            f"--json {args.json}: give a new name that ends in .json, or a file that eval.py wrote"
        )
    schedules, floors = args.schedule or [], args.floor or []
    if "" in (args.source, args.partition, *schedules):
        raise InputError("--source, --partition and --schedule need a value that is not empty")
    if args.figure:
        plots.check_suffix(args.figure)
    if args.batch_size < 1 or args.contexts is not None and args.contexts < 1:
        raise InputError("--batch-size and --contexts must be at least 1")
    if not args.dial_sweep and max(len(schedules), len(floors)) > 1:
        raise InputError("only --dial-sweep compares several schedules or floors; add it")
    for name, floor in itertools.product(schedules or ["quintic"], floors or [1.0]):
        schedule(name, 1, floor)
    if not args.source and not is_run(args.run):
        raise InputError(
            f"{args.run} contains no checkpoint of a run; to measure other weights, name a text: "
            "--source my_book.txt"
        )


def check_predictions(results):
    """Raises InputError if the loss is not a finite number. results: what `evaluate` returned."""
    if not math.isfinite(results["loss"]):
        raise InputError("the predictions of this model are not finite numbers")


def read_text(config, trained_on, split, partition):
    """((tokens, lookback), vocabulary) of a split of a config's text, or of all of it.

    partition: if it is not the config's, or a run has a background of its own, the blocks are found
    anew. Raises InputError.
    """
    data = prepare(TextConfig.of(config), trained_on if "files" in trained_on else None)
    tokens, lookback = data.split(split)
    vocabulary = token_bytes(get_encoding(config["tokenizer"]))
    background = trained_on.get("background") or data.meta["background"]
    if partition != config["partition"] or background != data.meta["background"]:
        background = check_other(partition, config, tokens, vocabulary, data, background)
        cap, plain = config["max_lookback"], config["plain"]
        lookback = partition_text(tokens, vocabulary, partition, cap, background, plain=plain)
    return (tokens, lookback), vocabulary


def check_other(partition, config, tokens, vocabulary, data=None, background=None):
    """Check that tokens can get other blocks than those of a config: the background for these.

    tokens: (n,) ids; data: the Prepared text of the config, if it has one; background: that of a
    run, if not that of its text. Raises InputError.
    """
    cap, background = config["max_lookback"], background or data and data.meta["background"]
    check_partition(partition, cap, len(tokens))
    if config["joined"] and partition == "document":
        raise InputError(f"{data.folder} is joined: it does not say where a document ends")
    if data and background is None and parse_partition(partition)[0].reads_words:
        background = count_background(data.split("train")[0], vocabulary)
    check_causal(tokens, vocabulary, partition, cap, background, config["plain"])
    return background


if __name__ == "__main__":
    run_script(main)
