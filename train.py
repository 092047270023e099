"""Train or fine-tune a localized GPT-2: one TOML file in, one run folder out.

    python train.py configs/quickstart.toml
    python train.py configs/gpt2_quintic.toml --source my_book.txt --out runs/my_book
    python train.py runs/my_book --resume
    torchrun --nproc_per_node=4 train.py configs/gpt2_quintic.toml    # the same run, on four GPUs

Every key of the config can be overridden on the command line; --overwrite replaces an older run.
The run folder contains config.toml, metrics.jsonl, best.pt and last.pt; page.html (the text in its
blocks) and loss.png, which are renewed during training; and at the end results.json and
attention.png.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from eval import evaluate, figure
from locality import Partitioner, schedule, schedule_names
from model import GPT, GPTConfig
from prepare_data import TextConfig, describe, prepare, read_contexts
from report import plots
from report.blocks import mark_blocks
from report.page import is_page
from report.tables import measures_table
from sample import generate
from support import console, ddp, machine, settings
from support.files import InputError, out_of_memory, run_script, write_json
from support.machine import precision
from support.prepared import SPLITS
from support.run import Diverged, Run, check_finite, check_resumable, check_same_run, diagnose
from support.settings import key
from support.tokenizers import get_encoding, token_bytes, vocabulary_size
from view import quick_page


@dataclass
class Config(TextConfig):
    # locality
    schedule: str = key("quintic", schedule_names())
    floor: float = key(1.0, "locality of the last layer, above 0 and at most 1")
    anchor: bool = key(False, "the first token of a context belongs to every block")
    # model
    init_from: str = key("scratch", "scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path")
    block_size: int | None = key(
        None, "context in tokens; none: as in init_from, or 1024 from scratch", 1, below=10**7
    )
    n_layer: int | None = key(None, "layers; none: as in init_from, or 12", 1, below=10**4)
    n_head: int | None = key(None, "heads; none: as in init_from, or 12", 1, below=10**4)
    n_embd: int | None = key(None, "width; none: as in init_from, or 768", 1, below=10**6)
    dropout: float = key(0.0, "share of activations dropped in training", at_least=0, below=1)
    # optimization: linear warm-up, cosine decay
    optimizer: str = key(
        "adamw",
        "adamw; or muon, for the matrices inside the layers (AdamW for the rest)",
        one_of=("adamw", "muon"),
    )
    batch_size: int = key(8, "contexts per forward pass, across all processes", 1, below=10**6)
    grad_accum: int = key(1, "forward passes per step", at_least=1, below=10**6)
    max_steps: int = key(1000, "steps in total", at_least=1)
    learning_rate: float = key(3e-4, "after the warm-up", at_least=0)
    min_lr: float = key(3e-5, "learning rate at max_steps", at_least=0)
    warmup_steps: int = key(50, "steps of linear warm-up", at_least=0)
    weight_decay: float = key(0.1, "on matrices, not on biases and norms", at_least=0)
    beta1: float = key(0.9, "AdamW's decay of the gradient's mean", at_least=0, below=1)
    beta2: float = key(0.95, "AdamW's decay of the gradient's square", at_least=0, below=1)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping", at_least=0)
    # evaluation and logging
    eval_interval: int = key(100, "steps between two evaluations of the validation split", 1)
    eval_contexts: int = key(64, "contexts per evaluation", at_least=1)
    patience: int = key(0, "stop after this many evaluations without a new best; 0: never", 0)
    log_interval: int = key(10, "steps between two lines of metrics.jsonl", at_least=1)
    # machine
    seed: int = key(1, "seed of every random number generator", at_least=0)
    device: str = key("auto", "auto (CUDA if available), cpu, cuda, cuda:1, mps")
    dtype: str = key(
        "auto",
        "float32, bfloat16 (autocast); auto: bfloat16 if it is faster",
        one_of=("auto", "float32", "bfloat16"),
    )
    compile: str | bool = key(
        "auto",
        "use torch.compile; auto: if bfloat16 is fast on this device and a compiler is found",
        one_of=("auto", True, False),
    )
    out: str = key("", "run folder; empty: runs/ and the name of the config file")

    def __post_init__(self):
        """Check every value that can be checked before there is a text and a model."""
        super().__post_init__()
        schedule(self.schedule, 1, self.floor)
        if self.min_lr > self.learning_rate:
            raise InputError(
                f"min_lr ({self.min_lr:g}) is above learning_rate ({self.learning_rate:g})"
            )
        if self.n_embd and self.n_head and self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if str(Path(self.out)).startswith("-"):  # Path drops the ./ of ./-x
            raise InputError(f"out must not begin with a dash, which marks a flag: {self.out}")


# --------------------------------------------------------------------------------------------------
# the parts of a step


def build_model(config, vocab_size, saved=None):
    """The model to train, from scratch or from weights, with its locality set.

    saved: the checkpoint, a dict, of a run that is resumed. Raises InputError if the config
    contradicts the weights or the vocabulary.
    """
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    shape = {name: value for name, value in shape.items() if value is not None}
    names = "dropout", "max_lookback", "anchor", "plain"
    options = {name: getattr(config, name) for name in names}
    origin = str(Path(config.out) / "last.pt") if saved else config.init_from
    if saved:
        model = GPT.from_state(saved, origin)
    elif config.init_from == "scratch":
        gpt = GPTConfig(vocab_size, **options, **shape)
        try:
            torch.empty(12 * gpt.n_layer * gpt.n_embd**2)  # fails at once, not after many layers
            model = GPT(gpt)
        except (RuntimeError, MemoryError, OverflowError):
            raise InputError(
                f"a model of {gpt.n_layer} layers, {gpt.n_embd} wide, for contexts of "
                f"{gpt.block_size} tokens does not fit in memory; lower n_layer, n_embd or "
                "block_size"
            ) from None
    else:
        model = GPT.from_pretrained(config.init_from, config.block_size, **options)
        for name, value in shape.items():
            actual = getattr(model.config, name)
            if actual != value:
                raise InputError(
                    f"{name} is {value} in the config but {actual} in {config.init_from}; leave it "
                    "out of the config"
                )
    if model.config.vocab_size != vocab_size:
        raise InputError(
            f"the {config.tokenizer} tokenizer has {vocab_size} tokens, but {origin} has "
            f"{model.config.vocab_size}; use the tokenizer it was trained with"
        )
    model.set_locality(schedule(config.schedule, model.config.n_layer, config.floor))
    return model


class Muon(torch.optim.Optimizer):
    """Steps equally far in every direction of a matrix (Jordan et al. 2024).

    groups: parameter groups of matrices; each matrix stacks `parts` matrices of equal height (1 by
    default), and each part gets its own update. When queries, keys and values share a matrix, the
    values have the largest gradient and would dominate a joint update. Updates are as large as
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so that both can share a learning rate.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                self.step_together([p for p in group["params"] if p.shape == shape], **group)

    def step_together(self, matrices, lr, weight_decay, momentum, parts, **_):
        """Step all matrices of one shape at once: small matrix products one by one are slow."""
        updates = []
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            updates += p.grad.lerp(average, momentum).chunk(parts)  # Nesterov
        steps = newton_schulz(torch.stack(updates))  # (n * parts, rows, columns)
        size = 0.2 * math.sqrt(max(steps.shape[1:]))
        for p, step in zip(matrices, steps.split(parts)):
            p.mul_(1 - lr * weight_decay).sub_(step.flatten(0, 1), alpha=lr * size)


def newton_schulz(x):
    """The same matrices with all singular values near 1: (n, rows, columns).

    Five steps of a Newton-Schulz iteration, with the coefficients of Jordan et al. 2024. It runs in
    bfloat16 where that is fast, which is precise enough.
    """
    if x.size(1) > x.size(2):
        return newton_schulz(x.mT).mT
    x = x.to(torch.bfloat16 if machine.fast_bfloat16(x.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def build_optimizers(model, config):
    """A list of optimizers: AdamW, and with `muon` also Muon for the matrices of the layers."""
    inner = [p for p in model.h.parameters() if p.dim() == 2]
    outer = [model.wte.weight, model.wpe.weight]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and norms
    rate, decay, betas = config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    muon = config.optimizer == "muon"
    groups = [
        {"params": outer if muon else outer + inner, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
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


def random_batch(split, T, config, number, process):
    """Contexts at random places of a split: ids, lookbacks and targets, (B, T) int64 each.

    They are a function of the seed and the batch's number only. If several processes share the
    batch, each reads its own contexts: every world_size-th from its rank on.
    """
    tokens, lookback = split
    rng = np.random.default_rng((config.seed, number))
    starts = rng.integers(0, len(tokens) - T, config.batch_size)
    starts = starts[process.rank :: process.world_size]
    return read_contexts((tokens, lookback, tokens[1:]), starts, T, process.device)


# --------------------------------------------------------------------------------------------------
# the run


def train(run, config, model, compiled, optimizers, data, process):
    """The training loop. Raises KeyboardInterrupt(n) after signal n, once the run is saved.

    compiled: the model, compiled or shared among processes as the config says.
    """
    device, world_size, T = process.device, process.world_size, model.config.block_size
    split, first_step = data.split("train"), run.step + 1
    if run.best_loss == math.inf:
        validate(run, config, model, data, process)
        run.save_last()
    progress = console.Progress(run, config, model, process)
    with machine.stop_signals() as received, progress:
        while not is_finished(run, config):
            lr = learning_rate(run.step, config)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr

            # forward, backward
            loss = 0.0
            for micro_step in range(config.grad_accum):
                number = run.step * config.grad_accum + micro_step
                x, lookback, y = random_batch(split, T, config, number, process)
                if world_size > 1:  # average the gradients after the last backward pass
                    compiled.require_backward_grad_sync = micro_step == config.grad_accum - 1
                with precision(device, config.dtype):
                    part = compiled(x, lookback, y)[1] / config.grad_accum
                part.backward()
                loss += part.detach()

            # update
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            is_log_step = (run.step + 1) % config.log_interval == 0
            if device.type == "cpu" or is_log_step:  # on a GPU the check would stall the pipeline
                check_finite(run.step + 1, loss=float(loss), gradient=float(norm))
            clip_grads_with_norm_(model.parameters(), config.grad_clip or math.inf, norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            run.step += 1
            progress.update()

            # log, evaluate, save
            is_eval_step = run.step % config.eval_interval == 0
            stop = bool(received) and world_size == 1
            if is_log_step:
                loss, stop = ddp.mean([loss, bool(received)], process)
                speed = progress.tokens_per_s()
                run.log(loss=loss, lr=lr, grad_norm=float(norm), tokens_per_s=round(speed))
            if is_eval_step or run.step == config.max_steps:
                validate(run, config, model, data, process)
                run.save_last()
                if run.writes and run.step < config.max_steps and progress.is_time_to_draw():
                    draw(run, config, model, data, run.step)
            if is_log_step:
                progress.show(loss, lr, speed)
            if is_log_step or is_eval_step or run.step == first_step:
                progress.restart_clock()
            if stop:
                run.save_last()
                raise KeyboardInterrupt(received[0] if received else 15)  # 15: another rank got one


def is_finished(run, config):
    return run.step >= config.max_steps or 0 < config.patience <= run.evals_since_best


def validate(run, config, model, data, process):
    """Score the validation split, and save the model if it is the best so far.

    If there are several processes, the first one does it and the others get the result.
    """
    if process.rank == 0:
        tokens, lookback = data.split("val")
        results = evaluate(
            model,
            tokens,
            lookback,
            token_bytes(get_encoding(config.tokenizer)),
            stride=min(model.config.block_size, len(tokens) - 1),  # no overlap: fast
            batch_size=max(1, config.batch_size // process.world_size),
            measure=False,
            limit=config.eval_contexts,
        )
        run.save_if_best(results["loss"])
    state = ddp.broadcast([run.val_loss, run.best_loss, run.evals_since_best], process)
    run.val_loss, run.best_loss, run.evals_since_best = *state[:2], int(state[2])


def draw(run, config, model, data, step):
    """Renew the pictures of a run: a page of the validation split, and the losses so far.

    step: of the model. Returns whether they were drawn; if not, the training continues without.
    """
    try:
        quick_page(run.path("page.html"), model, asdict(config), data, step)
        if rows := run.rows():
            plots.draw_loss(rows, run.path("loss.png"), run.folder.name)
        return True
    except (InputError, OSError, RuntimeError, MemoryError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        console.warn_once(f"{reason}; the run continues without its pictures")
        return False


def start(config, resume=False, overwrite=False):
    """One run, from its config to its results. Raises InputError."""
    process = ddp.init(config.device, config.batch_size)
    device, first = process.device, process.rank == 0
    use_compiler = machine.compiles(device, config.compile)
    precision(device, config.dtype)  # raises InputError before there is a run folder
    torch.manual_seed(config.seed)
    with Run(config.out, resume, overwrite, writes=first) as run:
        with ddp.in_turn(process):
            get_encoding(config.tokenizer)  # it may have to be downloaded
            trained_on = resume and {**run.saved["text"], "cwd": run.saved["cwd"]}
            data = prepare(TextConfig.of(asdict(config)), trained_on)
            model = build_model(config, vocabulary_size(config.tokenizer), run.saved).to(device)
        T = model.config.block_size
        check_splits(config, T, data)
        optimizers = build_optimizers(model, config)
        compiled = torch.compile(model) if use_compiler else model
        if process.world_size > 1:
            compiled = DistributedDataParallel(compiled)
        run.begin(model, optimizers, config, data.identity())
        for path in run.folder.glob("view-*.html") if first and not resume else ():
            if path.is_file() and is_page(path):  # it shows the model that was here before
                path.unlink()
        if first:
            print(describe(data))
            print(console.headline(run, model, config, process))
        else:  # each process draws its own dropout
            torch.manual_seed(config.seed + 1000 * run.step + process.rank)
        try:
            if first and draw(run, config, model, data, run.step):
                print(f"page: {run.folder}/page.html shows the blocks; training updates it")
            train(run, config, model, compiled, optimizers, data, process)
            ddp.shut_down()
            if first:
                finish(run, config, model, data, process)
        except Diverged as e:
            explain(run, e, config, model, data, process)
        except (RuntimeError, MemoryError) as e:
            if out_of_memory(e):
                finished = is_finished(run, config)
                advice = console.memory_advice(run, config, process, T, finished)
                raise InputError(advice) from None
            if machine.compiler_failed(e):
                command = shlex.join(["python", "train.py", config.out, "--resume"])
                raise InputError(
                    f"torch.compile failed ({' '.join(str(e).split())[:200]}); to continue without "
                    f"it: {command} --compile false"
                ) from None
            raise
        except KeyboardInterrupt:
            ddp.shut_down()
            if first and run.last_saved is not None:
                command = shlex.join(["python", "train.py", config.out, "--resume"])
                print(f"stopped at step {run.last_saved}; resume with: {command}", file=sys.stderr)
            raise


def check_splits(config, T, data):
    """Raises InputError if a split is damaged, or the training split too short for a context of T
    tokens."""
    n = {split: len(data.split(split)[0]) for split in SPLITS}["train"]
    if n <= T:
        raise InputError(
            f"{config.source}: the training split has {n} tokens, but block_size is {T}; use a "
            "longer text or a smaller block_size"
        )


def explain(run, error, config, model, data, process):
    """Report where training diverged, by reading the batches of the step again: InputError."""
    T, first = model.config.block_size, max(error.step - 1, 0) * config.grad_accum
    numbers, split = range(first, first + config.grad_accum), data.split("train")
    batches = (random_batch(split, T, config, n, process) for n in numbers)
    with precision(process.device, config.dtype):
        diagnosis = diagnose(model, batches)
    advice = f"lower learning_rate ({config.learning_rate:g})"
    run.report_divergence(error, diagnosis, advice, lr=learning_rate(error.step, config))


def finish(run, config, model, data, process):
    """Measure the best model on text it has never seen: results, table, figure and a sample."""
    if run.step < config.max_steps:
        print(
            f"{run.folder}: training ended at step {run.step} because of patience: "
            f"{run.evals_since_best} evaluations without a new best model"
        )
    best_step, val_loss = run.load_best()
    draw(run, config, model, data, best_step)
    vocabulary, split = token_bytes(get_encoding(config.tokenizer)), data.split("test")
    batch_size = max(1, config.batch_size // process.world_size)
    results = {name: getattr(config, name) for name in ("schedule", "floor", "partition")}
    results |= {"split": "test", "blocks": data.meta["splits"]["train"]}
    results["source_sha256"] = data.meta["source_sha256"]
    results |= evaluate(model, *split, vocabulary, batch_size=batch_size)
    check_finite(run.step, test_loss=results["loss"])
    results |= {"val_loss": val_loss, "best_step": best_step, "steps": run.step}
    results["seconds"] = round(run.elapsed(), 1)
    results |= {**machine.provenance(process.device, config.seed), "code": run.about["code"]}
    results["config"] = asdict(config)
    write_json(run.path("results.json"), results)
    print(
        f"\n{run.folder}: the best model (step {best_step}, validation loss {val_loss:.3f}) on the "
        f"test split\n{measures_table(results)}"
    )
    prompt, text = write_sample(model, config, data, vocabulary)
    blocks = "▌ marks the beginning of a block" if "▌" in text else "no new block begins"
    print(f"\nwhat it writes after {prompt!r} ({blocks}):\n{text}\n")
    picture = run.path("attention.png")
    title = f"{run.folder.name}: {config.schedule}, {config.partition} blocks, test split"
    figure(model, *split, vocabulary, results, picture, title)
    print(f"figure: {picture}   all numbers: {run.folder / 'results.json'}")


def write_sample(model, config, data, vocabulary, n_bytes=300):
    """(some words of the test split, what the model writes after them with its blocks marked)."""
    tokens, stats = data.split("test")[0][:40].tolist(), data.meta["splits"]["train"]
    n = math.ceil(n_bytes * stats["tokens"] / stats["bytes"])
    rules = config.partition, config.max_lookback, data.meta["background"], config.plain
    generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed)
    partitioners = [Partitioner(vocabulary, *rules)]
    steps = generate(model.eval(), [tokens], n, partitioners, temperature=0.8, generator=generator)
    for (token,) in steps:
        tokens.append(token)
    lookback, begin = Partitioner(vocabulary, *rules).push(tokens), len(tokens) - n
    prompt = b"".join(vocabulary[t] for t in tokens[:begin]).decode(errors="replace")
    return prompt, mark_blocks(tokens[begin:], lookback[begin:], vocabulary)[1:]


# --------------------------------------------------------------------------------------------------
# the command line

# what a resumed run may change: how long it runs, how often it is evaluated, and on what
MAY_CHANGE = {"max_steps", "patience", "eval_interval", "log_interval", "device", "compile", "out"}


def read_values(argv, more=()):
    """The keys that a command line, `CONFIG.toml [--key value ...]`, sets: a dict.

    more: names of keys that Config does not know. Raises InputError.
    """
    if not argv or argv[0].startswith("-"):
        raise InputError(
            "give a config, for example configs/quickstart.toml; --help lists the keys"
        )
    if Path(argv[0]).is_dir():
        raise InputError(
            f"{argv[0]} is a folder; give a config, a TOML file (or resume a run with --resume)"
        )
    check_config_name(Path(argv[0]), "sweep.py" if more else "train.py")
    values = settings.read(Config, argv, more)
    out = values.get("out", "")
    if not isinstance(out, str):
        raise InputError(f"out must be a string, not {json.dumps(out, default=str)}")
    return {**values, "out": out or f"runs/{Path(argv[0]).stem}"}


def check_config_name(path, script):
    """Raises InputError if `path` is a checkpoint or a text rather than a config. (An empty text
    would be a valid config without keys.) script: the file name of the running script."""
    if path.suffix == ".pt":
        command = shlex.join(["python", "train.py", str(path.parent), "--resume"])
        raise InputError(f"{path} is a checkpoint, not a config; to resume its run: {command}")
    if path.suffix != ".toml":
        config = {"train.py": "configs/quickstart.toml", "sweep.py": "configs/sweep_gpt2.toml"}
        command = shlex.join(["python", script, config[script], "--source", str(path)])
        raise InputError(
            f"{path} is not a config, which is a file whose name ends in .toml; if it is a text, "
            f"pass it to a config: {command}"
        )


def read_config(argv):
    """The Config of a command line. Raises InputError for what it does not understand."""
    return Config(**read_values(argv))


def read_resumed(argv):
    """The Config with which the run in the folder argv[0] is resumed. Raises InputError if it would
    not be the same run."""
    out = Path(argv[0]) if argv else Path()
    check_resumable(out)
    config = read_config([str(out / "config.toml"), *argv[1:], "--out", str(out)])
    check_same_run(out, config, MAY_CHANGE)
    return config


def main():
    flags = {"--overwrite", "--resume"} & set(sys.argv)
    argv = [word for word in sys.argv[1:] if word not in flags]
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys, in the file or as --key value:\n{settings.usage(Config)}")
        return
    if "--resume" in flags:
        return start(read_resumed(argv), resume=True)
    config = read_config(argv)
    out = Path(config.out)
    if config.data and out.absolute() == Path(config.data).absolute():
        raise InputError(f"data and out are the same folder, {out}; give the run its own folder")
    start(config, overwrite="--overwrite" in flags)


if __name__ == "__main__":
    run_script(main)
