"""Train or fine-tune a localised GPT-2: one TOML file in, one run folder out.

    python train.py configs/quickstart.toml
    python train.py configs/gpt2_quintic.toml --source my_book.txt --out runs/my_book
    python train.py runs/my_book --resume
    torchrun --nproc_per_node=4 train.py configs/gpt2_quintic.toml    # the same run, on four GPUs

Any key of the config can be overridden on the command line; --overwrite replaces an older run.
The run folder holds config.toml, metrics.jsonl, best.pt and last.pt, and at the end results.json
and attention.png.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from eval import evaluate, figure, table
from locality import PARTITIONS, Partitioner, schedule
from model import GPT, GPTConfig
from prepare_data import (
    SPLITS,
    check_blocks,
    check_tokenizer,
    describe,
    get_encoding,
    mark_blocks,
    prepared,
    read_contexts,
    read_meta,
    read_split,
    token_bytes,
    vocabulary_size,
)
from support import machine, settings
from support.files import InputError, out_of_memory, run_script, write_json
from support.machine import precision
from support.run import Diverged, Run, check_finite, diagnose, read_checkpoint
from support.settings import key


@dataclass
class Config:
    # text: see prepare_data.py
    source: str | list = key(
        "data/sample.txt", "file, folder, http(s) address, gutenberg:NUMBER, or a list of these"
    )
    tokenizer: str = key("gpt2", "gpt2, gpt2:N (its first N tokens) or bytes")
    partition: str = key("semantic", PARTITIONS)
    max_lookback: int = key(512, "no block reaches back further, in tokens", at_least=1)
    val: float = key(0.1, "fraction of the text for validation")
    test: float = key(0.1, "fraction of the text for the final test")
    joined: bool = key(False, "a newline in place of <|endoftext|>: documents run into each other")
    data: str = key("", "prepared folder; empty: one under data/, named after the source")
    # locality
    schedule: str = key(
        "quintic",
        "distributed, localist, linear, quadratic, cubic, quartic, quintic or reversed",
    )
    fidelity: float = key(1.0, "the floor: lambda of the last layer, above 0 and at most 1")
    anchor: bool = key(False, "the first token of a context belongs to every block")
    # model
    init_from: str = key("scratch", "scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path")
    block_size: int | None = key(
        None, "context in tokens; none: as init_from has it, from scratch 1024", at_least=1
    )
    n_layer: int | None = key(None, "layers; none: as init_from, from scratch 12", at_least=1)
    n_head: int | None = key(None, "heads; none: as init_from, from scratch 12", at_least=1)
    n_embd: int | None = key(None, "width; none: as init_from, from scratch 768", at_least=1)
    dropout: float = key(0.0, "share of activations dropped in training", at_least=0, below=1)
    # optimisation: linear warm-up, cosine decay
    optimizer: str = key(
        "adamw",
        "adamw; or muon, for the matrices inside the layers (AdamW for the rest)",
        one_of=("adamw", "muon"),
    )
    batch_size: int = key(8, "contexts in one forward pass, of all processes together", at_least=1)
    grad_accum: int = key(1, "forward passes in one step", at_least=1)
    max_steps: int = key(1000, "steps in all", at_least=1)
    learning_rate: float = key(3e-4, "after the warm-up", at_least=0)
    min_lr: float = key(3e-5, "learning rate at max_steps", at_least=0)
    warmup_steps: int = key(50, "steps of linear warm-up", at_least=0)
    weight_decay: float = key(0.1, "on matrices, not on biases and norms", at_least=0)
    beta1: float = key(0.9, "AdamW's decay of the gradient's mean", at_least=0, below=1)
    beta2: float = key(0.95, "AdamW's decay of the gradient's square", at_least=0, below=1)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    # watching
    eval_interval: int = key(100, "steps between two scores of the validation split", at_least=1)
    eval_contexts: int = key(64, "contexts in such a score", at_least=1)
    patience: int = key(0, "stop after so many scores without a new best; 0: never", at_least=0)
    log_interval: int = key(10, "steps between two lines of metrics.jsonl", at_least=1)
    # machine
    seed: int = key(1, "of everything random", at_least=0)
    device: str = key("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1, mps")
    dtype: str = key(
        "auto",
        "float32, bfloat16 (autocast); auto: bfloat16 where it is faster",
        one_of=("auto", "float32", "bfloat16"),
    )
    compile: str | bool = key(
        "auto",
        "torch.compile; auto: where dtype auto means bfloat16",
        one_of=("auto", True, False),
    )
    out: str = key("", "run folder; empty: runs/ and the name of the config file")

    def __post_init__(self):
        """Check every value that can be checked before there is a text and a model."""
        settings.check(self)
        sources = self.source if isinstance(self.source, list) else [self.source]
        if not sources or not all(s and isinstance(s, str) for s in sources):
            raise InputError("source must name a text, or be a list of names")
        check_tokenizer(self.tokenizer)
        schedule(self.schedule, 1, self.fidelity)
        check_blocks(self.partition, self.max_lookback, self.val, self.test)
        if self.min_lr > self.learning_rate:
            above = f"is above learning_rate ({self.learning_rate:g})"
            raise InputError(f"min_lr ({self.min_lr:g}) {above}")
        if self.n_embd and self.n_head and self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


# --------------------------------------------------------------------------------------------------
# the parts of a step


def build_model(config, vocab_size, saved=None):
    """The model to train, from scratch or from weights, its dial set.

    saved: the checkpoint, a dict, of a run that goes on. Raises InputError where the config
    contradicts the weights or the vocabulary.
    """
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    shape = {name: value for name, value in shape.items() if value is not None}
    how = {name: getattr(config, name) for name in ("dropout", "max_lookback", "anchor")}
    origin = str(Path(config.out) / "last.pt") if saved else config.init_from
    if saved:
        model = GPT.from_state(saved, origin)
    elif config.init_from == "scratch":
        try:
            model = GPT(GPTConfig(vocab_size, **how, **shape))
        except (RuntimeError, MemoryError, OverflowError):
            large = f"a model of this shape does not fit in memory: {shape}"
            raise InputError(large) from None
    else:
        model = GPT.from_pretrained(config.init_from, config.block_size, **how)
        for name, value in shape.items():
            have = getattr(model.config, name)
            if have != value:
                differ = f"{name} is {value} in the config but {have} in {config.init_from}"
                raise InputError(f"{differ}; leave it out of the config")
    have = model.config.vocab_size
    if have != vocab_size:
        differ = f"the {config.tokenizer} tokenizer has {vocab_size} tokens"
        use = "use the tokenizer it was trained with"
        raise InputError(f"{differ}, {origin} has {have}; {use}")
    model.set_locality(schedule(config.schedule, model.config.n_layer, config.fidelity))
    return model


class Muon(torch.optim.Optimizer):
    """Steps as far in every direction of a matrix (Jordan et al. 2024).

    groups: of matrices, which hold `parts` matrices of equal height, 1 by default. Each part is
    stepped on its own: where queries, keys and values are one matrix, the gradient of the values is
    the largest, and would leave the others behind. A step is as large as one of AdamW's would be
    (Liu et al. 2025, arXiv 2502.16982), so both can share a learning rate.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        how = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1}
        super().__init__(groups, how)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                self.step_alike([p for p in group["params"] if p.shape == shape], **group)

    def step_alike(self, matrices, lr, weight_decay, momentum, parts, **_):
        """Step matrices of one shape, all at once: small products one by one are slow."""
        updates = []
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            updates += p.grad.lerp(average, momentum).chunk(parts)  # Nesterov
        steps = orthogonalise(torch.stack(updates))  # (n * parts, rows, columns)
        size = 0.2 * math.sqrt(max(steps.shape[1:]))
        for p, step in zip(matrices, steps.split(parts)):
            p.mul_(1 - lr * weight_decay).sub_(step.flatten(0, 1), alpha=lr * size)


def orthogonalise(x):
    """The same matrices with all singular values near 1: (n, rows, columns).

    Five steps of a Newton-Schulz iteration, with the coefficients of Jordan et al. 2024. In
    bfloat16 where that is fast; it has digits enough.
    """
    if x.size(1) > x.size(2):
        return orthogonalise(x.mT).mT
    x = x.to(torch.bfloat16 if machine.fast_bfloat16(x.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def build_optimizers(model, config):
    """A list of optimizers: AdamW, and Muon for the matrices of the layers if it is asked for."""
    inner = [p for p in model.h.parameters() if p.dim() == 2]
    outer = [model.wte.weight, model.wpe.weight]
    plain = [p for p in model.parameters() if p.dim() < 2]  # biases and norms
    rate, decay, betas = config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    muon = config.optimizer == "muon"
    groups = [
        {"params": outer if muon else outer + inner, "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)]
    if muon:
        joint = [layer.attn.c_attn.weight for layer in model.h]  # queries, keys and values
        rest = [p for n, p in model.h.named_parameters() if p.dim() == 2 and "c_attn" not in n]
        groups = [{"params": rest}, {"params": joint, "parts": 3}]
        optimizers.append(Muon(groups, lr=rate, weight_decay=decay))
    return optimizers


def learning_rate(step, config):
    """Linear warm-up, then a cosine from learning_rate down to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def random_batch(tokens, lookback, T, config, number, device, rank=0, world=1):
    """Contexts at random places: ids, lookbacks and targets, (B, T) int64 each.

    They are a function of the seed and the batch's number alone. Where `world` processes share the
    batch, only the contexts of this one are read: each world-th from `rank` on.
    """
    rng = np.random.default_rng((config.seed, number))
    starts = rng.integers(0, len(tokens) - T, config.batch_size)[rank::world]
    return read_contexts((tokens, lookback, tokens[1:]), starts, T, device)


class Text:
    """The prepared text of a run: its splits, its vocabulary, and how it was prepared."""

    def __init__(self, folder, config):
        self.meta = meta = read_meta(folder)
        for name in ("source", "tokenizer", "partition", "max_lookback", "val", "test", "joined"):
            if meta[name] != getattr(config, name):
                other = f"has just been prepared with {name} = {meta[name]!r} by another process"
                raise InputError(f"{folder} {other}; give each a data folder of its own")
        self.train, self.val, self.test = (read_split(folder, split, meta) for split in SPLITS)
        self.vocabulary = token_bytes(get_encoding(self.meta["tokenizer"]))

    def identity(self):
        """What a checkpoint says of its text, so that a run is measured on that text alone."""
        return {name: self.meta[name] for name in ("source_sha256", "files", "background")}


# --------------------------------------------------------------------------------------------------
# the run


def train(run, config, model, fast_model, optimizers, text, here):
    """The training loop. Raises KeyboardInterrupt(n) if it was stopped by signal n, and saved.

    fast_model: the model, compiled or shared by processes. here: (device, rank, world).
    """
    device, rank, world = here
    T, batches_of = model.config.block_size, config.grad_accum
    if not run.goes_on:
        validate(run, config, model, text, here)
        run.keep()
    first, seen, clock, stop = run.step, 0, time.perf_counter(), False
    with machine.stop_signals() as asked, progress(run, config, rank) as bar:
        while run.step < config.max_steps and not 0 < config.patience <= run.looks_since_best:
            lr = learning_rate(run.step, config)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr

            # forward, backward
            loss = 0.0
            for number in range(run.step * batches_of, (run.step + 1) * batches_of):
                x, lookback, y = random_batch(*text.train, T, config, number, *here)
                if world > 1:  # gradients are averaged after the last backward pass of a step
                    fast_model.require_backward_grad_sync = (number + 1) % batches_of == 0
                with precision(device, config.dtype):
                    part = fast_model(x, lookback, y)[1] / batches_of
                part.backward()
                loss += part.detach()

            # update
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            logs = (run.step + 1) % config.log_interval == 0
            if device.type == "cpu" or logs:  # on a GPU a check would stall the pipeline
                check_finite(run.step + 1, loss=float(loss), gradient=float(norm))
            clip_grads_with_norm_(model.parameters(), config.grad_clip or math.inf, norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            run.step += 1
            seen += batches_of * config.batch_size * T
            bar.update()

            # watch, save
            stop, looks = bool(asked) and world == 1, run.step % config.eval_interval == 0
            if logs:
                loss, stop = machine.shared_mean([loss, bool(asked)], world, device)
                speed = seen / max(time.perf_counter() - clock, 1e-9)
                run.log(loss=loss, lr=lr, grad_norm=float(norm), tokens_per_s=round(speed))
            if looks or run.step == config.max_steps:
                validate(run, config, model, text, here)
                run.keep()
            if logs:
                show(bar, run, config, model, loss, lr, speed, here)
            if logs or looks or run.step == first + 1:  # to compile or to look is not to train
                seen, clock = 0, time.perf_counter()
            if stop:
                run.keep()
                raise KeyboardInterrupt(asked[0] if asked else 15)  # another process was asked


def validate(run, config, model, text, here):
    """Score the validation split, and keep the model if it is the best so far.

    Where there are several processes, the first one does it and tells the others.
    """
    device, rank, world = here
    if rank == 0:
        T = min(model.config.block_size, len(text.val[0]) - 1)
        how = {"batch_size": max(1, config.batch_size // world), "limit": config.eval_contexts}
        found = evaluate(model, *text.val, text.vocabulary, T, measure=False, **how)
        run.best(found["loss"])
    told = [run.val_loss, run.best_loss, run.looks_since_best]
    run.val_loss, run.best_loss, run.looks_since_best = machine.from_first(told, world, device)


def start(config, resume=False, overwrite=False):
    """One run, from its config to its results. Raises InputError."""
    device, rank, world = here = machine.join(config.device, config.batch_size)
    compiled = machine.compiles(device, config.compile)
    machine.precision(device, config.dtype)  # does the card have it? there is no folder yet
    torch.manual_seed(config.seed)
    with Run(config.out, resume, overwrite, writes=rank == 0) as run:
        with machine.in_turn(rank, world):
            get_encoding(config.tokenizer)  # it may have to be fetched
            folder = prepared(run.saved["config"] if resume else asdict(config))
            vocab_size = vocabulary_size(config.tokenizer)
            model = build_model(config, vocab_size, run.saved).to(device)
        text = Text(folder, config)
        check_length(text, model, config)
        optimizers = build_optimizers(model, config)
        fast_model = torch.compile(model) if compiled else model
        if world > 1:
            fast_model = DistributedDataParallel(fast_model)
        run.begin(model, optimizers, config, text.identity())
        if rank == 0:
            describe(folder, text.meta, *text.train)
            print(headline(run, model, config, here))
        else:  # each process draws its own dropout
            torch.manual_seed(config.seed + 1000 * run.step + rank)
        try:
            train(run, config, model, fast_model, optimizers, text, here)
            machine.part()
            if rank == 0:
                finish(run, config, model, text, here)
        except Diverged as e:
            explain(run, e, config, model, text, here)
        except (RuntimeError, MemoryError) as e:
            if out_of_memory(e):
                raise InputError(too_large(run, config, model, world)) from None
            raise
        except KeyboardInterrupt:
            machine.part()
            if rank == 0 and run.kept is not None:
                how = shlex.join(["python", "train.py", config.out, "--resume"])
                print(f"stopped at step {run.kept}; go on with: {how}", file=sys.stderr)
            raise


# --------------------------------------------------------------------------------------------------
# what the user sees


def check_length(text, model, config):
    n, T = len(text.train[0]), model.config.block_size
    if n <= T:
        short = f"the training split has {n} tokens, block_size is {T}"
        raise InputError(f"{config.source}: {short}; use a longer text or a smaller block_size")


def headline(run, model, config, here):
    device, _, world = here
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    where = f"{device} and {world - 1} more" if world > 1 else f"{device}"
    dial = ", ".join(f"{x:.3g}" for x in model.locality)
    since = f", from step {run.step} of {config.max_steps}" if run.goes_on else ""
    missing = machine.missing_compiler(device)
    if config.compile == "auto" and machine.fast_bfloat16(device) and missing:
        where += f", not compiled, so slower ({missing} was not found)"
    return f"{run.folder}: {size} on {where}, {config.schedule}, dial by layer: {dial}{since}"


def progress(run, config, rank):
    """A bar on a terminal, nothing elsewhere: there `show` prints a line now and then."""
    return tqdm(
        initial=run.step,
        total=config.max_steps,
        desc=run.folder.name,
        unit="step",
        disable=True if rank else None,
    )


def show(bar, run, config, model, loss, lr, speed, here):
    """How training goes, beside the bar; as a line of its own where there is no terminal."""
    device, _, world = here
    told = f"loss {loss:.3f}, val {run.val_loss:.3f}, lr {lr:.1e}, {speed:,.0f} tok/s"
    if peak := machine.peak_flops(device):
        flops = speed / world * model.flops_per_token(model.config.block_size)
        told += f", MFU {100 * flops / peak:.0f} %"
    bar.set_postfix_str(told)
    if bar.disable and run.writes:
        print(f"step {run.step}/{config.max_steps}: {told}", flush=True)


def explain(run, e, config, model, text, here):
    """Say where training diverged, by reading the batches of the step again. Raises InputError."""
    T, first = model.config.block_size, max(e.step - 1, 0) * config.grad_accum
    numbers = range(first, first + config.grad_accum)
    batches = (random_batch(*text.train, T, config, n, *here) for n in numbers)
    with precision(here.device, config.dtype):
        found = diagnose(model, batches)
    advice = f"lower learning_rate ({config.learning_rate:g})"
    run.diverged(e, found, advice, lr=learning_rate(e.step, config))


def too_large(run, config, model, world):
    """In words: memory is short, and what to change. A step keeps its size, if it can."""
    share, T = config.batch_size // world, model.config.block_size
    if run.step >= config.max_steps or 0 < config.patience <= run.looks_since_best:
        how = f"python eval.py {shlex.quote(config.out)} --batch-size {max(share // 2, 1)}"
        return f"out of memory while scoring; training is done, so go on with: {how}"
    if share > 1:  # its smallest factor: 2, unless it is odd
        n = next(n for n in range(2, share + 1) if share % n == 0)
        change = f"--batch_size {config.batch_size // n} --grad_accum {config.grad_accum * n}"
        gain = f"the same step in about 1/{n} of the memory"
    else:
        change, gain = f"--block_size {max(T // 2, 1)}", "contexts half as long"
    told = f"out of memory at step {run.step + 1}, with {share} contexts of {T} tokens at a time"
    anew = f"start anew with {change} --overwrite ({gain})"
    if run.kept:
        anew += f", or free memory and go on from step {run.kept} with --resume"
    return f"{told}; {anew}"


def finish(run, config, model, text, here):
    """What the best model is worth, on text it has never seen: results, table, figure, a sample."""
    best_step, val_loss = run.load_best()
    batch_size = max(1, config.batch_size // here.world)
    results = {name: getattr(config, name) for name in ("schedule", "fidelity", "partition")}
    results |= {"split": "test", "blocks": text.meta["splits"]["train"]}
    results["source_sha256"] = text.meta["source_sha256"]
    results |= evaluate(model, *text.test, text.vocabulary, batch_size=batch_size)
    results |= {"val_loss": val_loss, "best_step": best_step, "steps": run.step}
    results["seconds"] = round(run.elapsed(), 1)
    results |= {**machine.provenance(here.device, config.seed), "config": asdict(config)}
    write_json(run.folder / "results.json", results)
    picture = run.folder / "attention.png"
    title = f"{run.folder.name}: {config.schedule}, {config.partition} blocks, test split"
    figure(model, *text.test, text.vocabulary, results, picture, title)
    best = f"the best model (step {best_step}, validation loss {val_loss:.3f})"
    print(f"\n{run.folder}: {best} on the test split")
    print(table(results))
    prompt, more = written(model, config, text)
    blocks = "▌ where a block begins" if "▌" in more else "no new block begins"
    print(f"\nwhat it writes after {prompt!r}, {blocks}:\n{more}\n")
    print(f"figure: {picture}   all numbers: {run.folder / 'results.json'}")


def written(model, config, text, n_bytes=300):
    """(a few words of the test split, what the model writes after them, its blocks marked)."""
    tokens, train = text.test[0][:40].tolist(), text.meta["splits"]["train"]
    n = math.ceil(n_bytes * train["tokens"] / train["bytes"])
    blocks = text.vocabulary, config.partition, config.max_lookback, text.meta["background"]
    generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed)
    how = {"temperature": 0.8, "generator": generator}
    for (token,) in model.eval().generate([tokens], n, [Partitioner(*blocks)], **how):
        tokens.append(token)
    lookback, start = Partitioner(*blocks).push(tokens), len(tokens) - n
    prompt = b"".join(text.vocabulary[t] for t in tokens[:start]).decode(errors="replace")
    return prompt, mark_blocks(tokens[start:], lookback[start:], text.vocabulary)[1:]


# --------------------------------------------------------------------------------------------------
# the command line

# what a resumed run may change: how long it goes, how often it is looked at, the compiler
MAY_CHANGE = {"max_steps", "patience", "eval_interval", "log_interval", "compile", "out"}
USAGE = f"""{__doc__}
Keys, in the file or as --key value:
{settings.usage(Config)}"""


def read_values(argv, more=()):
    """The keys that a command line, `CONFIG.toml [--key value ...]`, sets: a dict.

    more: names of keys that Config does not know. Raises InputError.
    """
    if not argv or argv[0].startswith("-"):
        example = "for example configs/quickstart.toml; --help lists the keys"
        raise InputError(f"give a config, {example}")
    if Path(argv[0]).is_dir():
        how = "a run goes on with --resume"
        raise InputError(f"{argv[0]} is a folder; give a config, a TOML file ({how})")
    values = settings.read(Config, argv, more)
    out = values.get("out", "")
    if not isinstance(out, str):
        raise InputError(f"out must be a string, not {json.dumps(out, default=str)}")
    return {**values, "out": out or f"runs/{Path(argv[0]).stem}"}


def read_config(argv):
    """The Config of a command line. Raises InputError for what it does not understand."""
    return Config(**read_values(argv))


def resumed(argv):
    """The Config with which the run in folder argv[0] goes on.

    Raises InputError where it would not be the same run.
    """
    out = Path(argv[0]) if argv else Path()
    if not (out / "last.pt").is_file():
        if (out / "config.toml").is_file():
            raise InputError(f"{out}: no last.pt to go on from; start the run anew")
        how = "give the folder of a run: python train.py runs/NAME --resume"
        raise InputError(f"{out}: no last.pt to resume from; {how}")
    config = read_config([str(out / "config.toml"), *argv[1:], "--out", str(out)])
    state = read_checkpoint(out / "last.pt")
    before = state["config"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in asdict(config).items()
        if name not in MAY_CHANGE and before.get(name) != value
    ]
    changed += [f"{name} was {before[name]!r}" for name in settings.lost(before)]
    if changed:
        only = f"only {', '.join(sorted(MAY_CHANGE - {'out'}))} may change"
        raise InputError(f"{out} cannot go on with another config ({'; '.join(changed)}); {only}")
    if config.max_steps < state["step"]:
        made = f"{out} has made {state['step']} steps already"
        raise InputError(f"{made}; max_steps ({config.max_steps}) cannot be fewer")
    return config


def main():
    flags = {"--overwrite", "--resume"} & set(sys.argv)
    argv = [word for word in sys.argv[1:] if word not in flags]
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    if "--resume" in flags:
        return start(resumed(argv), resume=True)
    config = read_config(argv)
    out = Path(config.out)
    if config.data and out.absolute() == Path(config.data).absolute():
        same = f"data and out are the same folder, {out}"
        raise InputError(f"{same}; a run wants a folder of its own")
    start(config, overwrite="--overwrite" in flags)


if __name__ == "__main__":
    run_script(main)
