"""
Measure a run: perplexity, bits per byte, accuracy, and per layer how local its attention really is.

    python eval.py runs/quickstart
    python eval.py runs/quickstart --schedule localist --figure localist.png     # turn the dial, no retraining
    python eval.py runs/quickstart --partition block:64 --json block64.json      # other blocks, same weights
    python eval.py runs/quickstart --dial-sweep --figure dials.png               # what would each dial cost this model?
    python eval.py gpt2 --source my_book.txt --dial-sweep --contexts 32          # the same of weights never fine-tuned
"""

import argparse
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from locality import SCHEDULES, InputError, background, partition, schedule
from model import GPT, PRETRAINED, clamp_lookback, load
from prepare_data import (SPLITS, block_starts, check_blocks, check_tokenizer, digest, get_encoding, prepare, read_meta,
                          read_split, source_files, token_bytes, write_text)


# ---------------------------------------------------------------------------------------------------------------------
# a run from disk


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps … -> torch.device. Raises InputError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise InputError(f"device {name} is not available here; use auto or cpu") from None


# what of a run's config says which text it was trained on, and how that was prepared
TEXT_KEYS = {"source": (str, list), "data": str, "tokenizer": str, "partition": str, "max_lookback": int, "val": float,
             "test": float, "seed": int}


def load_run(run, device="cpu"):
    """The best model of a run folder, its dial set as it was trained, and the run's config, a dict."""
    run = Path(run)
    path = next((run / name for name in ("best.pt", "last.pt") if (run / name).is_file()), None)
    if path is None:
        raise InputError(f"{run}: no checkpoint here; a run is the folder that 'python train.py CONFIG' fills")
    try:
        config = load(path)["config"]
        model = GPT.from_pretrained(path)
        model.set_locality(schedule(config["schedule"], model.config.n_layer, config["fidelity"]))
        check_tokenizer(config["tokenizer"])
        if not all(isinstance(config[key], kind) for key, kind in TEXT_KEYS.items()):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a checkpoint of train.py") from None
    size = {"gpt2": 50257, "bytes": 256}.get(config["tokenizer"]) or int(config["tokenizer"][5:])
    if model.config.vocab_size != size:
        raise InputError(f"{path}: a model of {model.config.vocab_size} tokens that names a tokenizer of {size}, "
                         f"{config['tokenizer']}: not as train.py wrote it")
    return model.to(device).eval(), config


def load_weights(name, source, device="cpu"):
    """A GPT-2 that train.py never saw, and a config (a dict) to measure it with on `source`; its dial is at 0."""
    if not source:
        raise InputError(f"{name}: no checkpoint of a run here; to measure other weights, say on which text: --source my_book.txt")
    model = GPT.from_pretrained(name)
    if model.config.vocab_size != 50257:
        raise InputError(f"{name} has {model.config.vocab_size} tokens, which is not GPT-2's vocabulary")
    return model.to(device).eval(), {
        "source": source, "data": "", "tokenizer": "gpt2", "partition": "semantic", "val": 0.1, "test": 0.1, "seed": None,
        "max_lookback": model.config.max_lookback, "schedule": "distributed", "fidelity": 1.0}


def prepared(config):
    """The prepared folder that a config (a dict) names, made if it is not there or no longer fits.

    Raises InputError if the config is of a run, and the text, its tokens or its blocks are not those any more that it
    was trained on. (A run of an earlier version tells the sha256 of the text alone.)
    """
    if config.get("source_sha256") not in (None, digest(source_files(config["source"]))):
        raise InputError(f"{config['source']} has changed since this run was trained on it; put the old text back")
    folder = prepare(config["source"], config["data"] or None, config["tokenizer"], config["partition"],
                     config["max_lookback"], config["val"], config["test"])
    files, before = read_meta(folder)["files"], config.get("files")
    changed = [name for name in files if before and before.get(name) != files[name]]
    if changed:
        what = "blocks: the partitioner" if all("lookback" in name for name in changed) else "tokens: the tokenizer"
        raise InputError(f"{folder} has other {what} has changed since this run was trained; go back to the code of then "
                         f"({', '.join(changed)})")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def windows(n, block_size, stride):
    """Contexts that cover n tokens: a list of (start, first), predictions from position `first` of each are scored.

    Every token but token 0, which nothing precedes, is predicted and scored exactly once; all but the first window give
    a scored token at least block_size - stride tokens of context.
    """
    T = min(block_size, n - 1)
    starts = [*range(0, n - 1 - T, stride), n - 1 - T]
    ends = [0] + [start + T for start in starts]
    return [(start, end - start) for start, end in zip(starts, ends)]


@torch.no_grad()
def evaluate(model, tokens, lookback, vocabulary, stride=None, batch_size=8, measure=True, limit=None):
    """Score a split, two uint16 arrays of n tokens, in float32: bfloat16 would round the logits by up to half a nat.

    vocabulary: list of bytes per token id. stride: tokens between two contexts, default half a context.
    measure: also the attention of every layer (dense, slower). limit: at most so many contexts, evenly spread.
    Returns a dict: perplexity = exp(mean nats per token), bits_per_byte, accuracy (top-1), tokens scored; by_position, a
    list of (tokens of context at least, loss in nats), which falls for as long as the model uses more context; layers.
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
    if measure:    # keep the dense maps of a batch under about half a gigabyte
        batch_size = max(1, min(batch_size, 2 ** 27 // (model.config.n_head * T * T)))
    n_bytes = torch.tensor([len(b) for b in vocabulary], device=device)
    nats, correct, scored, size = 0.0, 0, 0, 0
    nats_at = torch.zeros(T, dtype=torch.double)    # at each position of a context
    sums = torch.zeros(model.config.n_layer, 4, dtype=torch.double)    # fidelity, pointer accuracy, entropy, first token
    for at in tqdm(range(0, len(contexts), batch_size), desc="evaluating", leave=False, disable=not measure):
        batch = contexts[at:at + batch_size]
        x, r, y = (torch.from_numpy(np.stack(rows).astype(np.int64)).to(device) for rows in zip(*(
            (tokens[s:s + T], lookback[s:s + T], tokens[s + 1:s + T + 1]) for s, _ in batch)))    # (B, T) each
        first = torch.tensor([f for _, f in batch], device=device)[:, None]
        score = torch.arange(T, device=device) >= first                        # (B, T)
        logits = model(x, r)[0]                                                # (B, T, V)
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        nats += nll[score].cpu().double().sum().item()                         # not every device has float64
        nats_at += nll.cpu().double().sum(0)
        correct += (logits.argmax(-1) == y)[score].sum().item()
        scored += score.sum().item()
        size += n_bytes[y[score]].sum().item()
        if measure:
            block = model.blocks(r)                                            # (B, 1, T, T)
            for layer, a in enumerate(model.attention_maps(x, r)):             # (B, H, T, T)
                inside = (a * block).sum(-1)                                   # (B, H, T)
                pointer = block.expand_as(a).gather(-1, a.argmax(-1, keepdim=True)).squeeze(-1)
                entropy = torch.special.entr(a).sum(-1) / math.log(2)
                for column, value in enumerate((inside, pointer, entropy, a[..., 0])):
                    sums[layer, column] += value.cpu().double().mean(1)[score.cpu()].sum().item()
    model.train(was_training)
    results = {"perplexity": math.exp(min(nats / scored, 700)), "loss": nats / scored,
               "bits_per_byte": nats / math.log(2) / size, "accuracy": correct / scored,
               "tokens": scored, "bytes": size, "stride": stride, "context": T}
    edges = [0, *(2 ** i for i in range(4, 40) if 2 ** i < T), T]    # from a position on, so many tokens are in sight
    results["by_position"] = [(a + 1, nats_at[a:b].mean().item() / len(contexts)) for a, b in zip(edges, edges[1:])]
    if measure:
        results["layers"] = [
            {"locality": locality, "fidelity": f, "pointer_accuracy": p, "entropy": e, "first_token": first}
            for locality, (f, p, e, first) in zip(model.locality, (sums / scored).tolist())]
    return results


def dial_sweep(model, split, vocabulary, **how):
    """Turn the dial of one model through every schedule at four fidelities, without retraining; distributed comes first.

    split: token ids and lookbacks, as `read_split` gives them; how: further arguments of `evaluate`. Returns a list of
    dicts: what `evaluate` returns, and the schedule, the fidelity, and the ratio of the perplexity to distributed's.
    """
    dials = [("distributed", 1.0)] + [(name, f) for name in SCHEDULES if name != "distributed" for f in (0.25, 0.5, 0.75, 1.0)]
    rows = []
    for name, f in tqdm(dials, desc="dials", unit="dial"):
        model.set_locality(schedule(name, model.config.n_layer, f))
        results = evaluate(model, *split, vocabulary, **how)
        rows.append({"schedule": name, "fidelity": f, "ratio": math.exp(results["loss"] - (rows or [results])[0]["loss"]),
                     **results})
    return rows


def layer_mean(results, key):
    return sum(layer[key] for layer in results["layers"]) / len(results["layers"])


# ---------------------------------------------------------------------------------------------------------------------
# showing

# colours told apart by every eye (Okabe & Ito), and markers for print in black and white
STYLES = {"distributed": ("#000000", "o"), "localist": ("#d55e00", "s"), "linear": ("#e69f00", "^"),
          "quadratic": ("#56b4e9", "v"), "cubic": ("#009e73", "D"), "quartic": ("#0072b2", "P"),
          "quintic": ("#cc79a7", "*"), "reversed": ("#888888", "X")}


def table(results):
    """The results as lines of text."""
    lines = ["layer  locality  fidelity  pointer accuracy  entropy (bits)  on the first token"]
    lines += [f"{number:5d}  {layer['locality']:8.3f}  {layer['fidelity']:8.3f}  {layer['pointer_accuracy']:16.3f}  "
              f"{layer['entropy']:14.2f}  {layer['first_token']:18.3f}" for number, layer in enumerate(results["layers"], 1)]
    lines.append(f"perplexity {results['perplexity']:.3f}   bits per byte {results['bits_per_byte']:.4f}   "
                 f"accuracy {100 * results['accuracy']:.2f} %   ({results['tokens']:,} tokens, stride {results['stride']})")
    lines.append("loss, nats, by tokens of context: " + ", ".join(f"from {n} {nats:.3f}" for n, nats in results["by_position"]))
    return "\n".join(lines)


def dial_table(rows):
    """The dials as lines of text."""
    lines = ["schedule     fidelity  perplexity  ratio to distributed  accuracy  mean over layers: locality  fidelity  entropy (bits)"]
    lines += [f"{row['schedule']:11s}  {row['fidelity']:8.2f}  {row['perplexity']:10.3f}  {row['ratio']:20.4f}  "
              f"{100 * row['accuracy']:6.2f} %  {layer_mean(row, 'locality'):26.3f}  {layer_mean(row, 'fidelity'):8.3f}  "
              f"{layer_mean(row, 'entropy'):14.2f}" for row in rows]
    return "\n".join(lines)


def dial_figure(rows, path, title):
    """Draw `path`: what each dial costs in perplexity, against the dial's mean and against the fidelity that it gives."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for ax, key, label in ((axes[0], "locality", "locality, mean over layers: what the dial is set to"),
                           (axes[1], "fidelity", "fidelity, mean over layers: attention inside the block")):
        for name in dict.fromkeys(row["schedule"] for row in rows):
            color, marker = STYLES[name]
            mine = [row for row in rows if row["schedule"] in (name, "distributed")]    # every curve begins at dial 0
            ax.plot([layer_mean(row, key) for row in mine], [row["ratio"] for row in mine], color=color, marker=marker,
                    label=name, lw=1.5, ls="--" if name == "reversed" else "-")
        ax.set(xlabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("perplexity, ratio to distributed")
    axes[1].legend(frameon=False)
    fig.suptitle(title, parse_math=False)
    save_figure(fig, path)


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def save_figure(fig, path, close=True):
    """Save to a temporary name, then rename; and close."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        fig.savefig(temporary, dpi=130)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        if close:
            pyplot().close(fig)


@torch.no_grad()
def figure(model, tokens, lookback, results, path, title):
    """Draw `path`: the attention of the first and last layer over one stretch of text, and the layers in numbers."""
    model.eval()
    plt = pyplot()
    from matplotlib.colors import PowerNorm

    device = model.wte.weight.device
    T = min(model.config.block_size, len(tokens), 256)
    # of all stretches, the one in which the block moves on most often
    at = max(range(0, len(tokens) - T + 1, max(T // 8, 1)),
             key=lambda at: len(block_starts(lookback[at:at + T].clip(max=np.arange(T)))))
    x, r = (torch.from_numpy(a[at:at + T].astype(np.int64))[None].to(device) for a in (tokens, lookback))
    maps = [a[0].mean(0).cpu().numpy() for a in model.attention_maps(x, r)]    # heads averaged, (T, T) each
    start = np.arange(T) - clamp_lookback(r, model.config.max_lookback, model.config.min_lookback)[0].cpu().numpy()

    n_layer = model.config.n_layer
    layers = np.arange(1, n_layer + 1)
    fig, axes = plt.subplots(2, 2, figsize=(10, 8.6), height_ratios=(1.55, 1), layout="constrained")
    for ax, layer in zip(axes[0], (0, n_layer - 1)):
        shown = np.where(np.tri(T, dtype=bool), maps[layer], np.nan)
        image = ax.imshow(shown, cmap="Blues", norm=PowerNorm(0.35, 0, 1), interpolation="nearest")
        ax.step([*start - 0.5, start[-1] - 0.5], np.arange(T + 1) - 0.5, where="pre", color="#d55e00", lw=1.3)
        ax.set(title=f"layer {layer + 1}, locality {model.locality[layer]:.2f}", xlabel="key (token)", xlim=(-0.5, T - 0.5))
    axes[0, 0].set_ylabel("query (token)")
    axes[0, 0].plot([], [], color="#d55e00", label="start of the query's block")
    axes[0, 0].legend(loc="upper right", frameon=False)
    fig.colorbar(image, ax=axes[0], label="attention weight, mean over heads", shrink=0.9)
    values = {key: [layer[key] for layer in results["layers"]] for key in results["layers"][0]}
    axes[1, 0].fill_between(layers, values["locality"], color="#d55e00", alpha=0.15, lw=0)
    axes[1, 0].plot(layers, values["locality"], "--", color="#d55e00", label="locality: the certified floor")
    axes[1, 0].plot(layers, values["fidelity"], "o-", color="#0072b2", label="fidelity: mass inside the block")
    axes[1, 0].plot(layers, values["pointer_accuracy"], "^:", color="#666666", label="pointer accuracy")
    axes[1, 0].set(xlabel="layer", ylim=(-0.03, 1.5), xticks=layers, yticks=np.arange(0, 1.1, 0.2),
                   title="attention that stays in the block")
    axes[1, 0].legend(frameon=False, loc="upper left")
    axes[1, 1].plot(layers, values["entropy"], "o-", color="#0072b2")
    axes[1, 1].set(xlabel="layer", ylabel="bits", xticks=layers, ylim=(0, 1.1 * max(values["entropy"])),
                   title="entropy of the attention")
    for ax in axes[1]:
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, parse_math=False)
    save_figure(fig, path)


def provenance(device, seed):
    """Where a number comes from: command, commit, device, date, seed, version."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True,
                                capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit, "device": name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seed": seed,
            "torch": torch.__version__}


def main():
    parser = argparse.ArgumentParser(description="measure a run, at its own dial or another")
    parser.add_argument("run", help="a run folder of train.py; or weights: gpt2, gpt2-medium … or a path, with --source")
    parser.add_argument("--source", help="the text to measure weights on, as in prepare_data.py")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--schedule", help="another schedule than the one it was trained with")
    parser.add_argument("--fidelity", type=float, help="another fidelity, in (0, 1]")
    parser.add_argument("--partition", help="other blocks: semantic, sentence, window:N or block:N")
    parser.add_argument("--dial-sweep", action="store_true", help="every schedule at four fidelities, without retraining")
    parser.add_argument("--contexts", type=int, help="measure on so many contexts, evenly spread (default: all)")
    parser.add_argument("--stride", type=int, help="tokens between two contexts (default: half a context)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--figure", type=Path, help="draw the figure here, .png, .svg or .pdf")
    args = parser.parse_args()
    for path in (args.json, args.figure):
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise InputError(f"{path}: a file cannot be written there")
    if args.figure and args.figure.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{args.figure}: a figure ends in .png, .svg or .pdf")

    if args.batch_size < 1 or args.contexts is not None and args.contexts < 1:
        raise InputError("--batch-size and --contexts must be at least 1")
    if args.dial_sweep and (args.schedule or args.fidelity is not None):
        raise InputError("--dial-sweep goes through all schedules and fidelities; leave out --schedule and --fidelity")

    device = pick_device(args.device)
    is_run = args.run not in PRETRAINED and any((Path(args.run) / name).is_file() for name in ("best.pt", "last.pt"))
    if is_run and args.source:
        raise InputError(f"{args.run} is a run and has its own text; --source is for weights")
    model, config = load_run(args.run, device) if is_run else load_weights(args.run, args.source, device)
    dial = args.schedule or config["schedule"], config["fidelity"] if args.fidelity is None else args.fidelity
    model.set_locality(schedule(dial[0], model.config.n_layer, dial[1]))
    folder = prepared(config)
    tokens, lookback = read_split(folder, args.split)
    vocabulary = token_bytes(get_encoding(config["tokenizer"]))
    method = args.partition or config["partition"]
    if method != config["partition"]:
        check_blocks(method, config["max_lookback"], config["val"], config["test"])
        words = read_meta(folder)["background"]
        if words is None and method == "semantic":
            words = background(read_split(folder, "train")[0], vocabulary)
        lookback = partition(tokens, vocabulary, method, config["max_lookback"], words)

    how = {"stride": args.stride, "batch_size": args.batch_size, "limit": args.contexts}
    common = {"run": str(args.run), "split": args.split, "partition": method, **provenance(device, config["seed"])}
    title = f"{args.run}, {args.split} split, {method} blocks"
    if args.dial_sweep:
        rows = dial_sweep(model, (tokens, lookback), vocabulary, **how)
        results = {**common, "dials": rows}
        print(f"{title}: the dial turned, nothing retrained ({rows[0]['tokens']:,} tokens)")
        print(dial_table(rows))
    else:
        results = evaluate(model, tokens, lookback, vocabulary, **how)
        results = {**common, "schedule": dial[0], "fidelity": dial[1], **results}
        print(f"{title}: {dial[0]}, fidelity {dial[1]:g}")
        print(table(results))
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")
    if args.figure and args.dial_sweep:
        dial_figure(rows, args.figure, title)
    elif args.figure:
        figure(model, tokens, lookback, results, args.figure, f"{title}: {dial[0]}, fidelity {dial[1]:g}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
