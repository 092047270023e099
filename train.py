"""
Train or fine-tune a localised GPT-2: one TOML file in, one run folder out.

    python train.py configs/quickstart.toml
    python train.py configs/gpt2_quintic.toml --source my_book.txt --out runs/my_book
    python train.py runs/my_book --resume
    torchrun --nproc_per_node=4 train.py configs/gpt2_quintic.toml    # the same run, shared by four GPUs

Any key of the config can be overridden on the command line. The run folder holds config.toml (everything, as it was
run), metrics.jsonl, best.pt and last.pt, and at the end results.json and attention.png; or, of a run that diverged,
diverged.json: the step, and what was not finite any more.
"""

import contextlib
import ctypes
import datetime
import difflib
import errno
import json
import math
import os
import shutil
import signal
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# before torch is loaded: a CPU thread that waits for another gives up its core soon (GNU OpenMP). otherwise one busy
# process beside the training makes it not twice but tens of times slower
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# and MKL promises the same bits from run to run only where it is asked to
os.environ.setdefault("MKL_CBWR", "AUTO")

try:
    import fcntl
except ImportError:    # Windows
    fcntl = None

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from eval import evaluate, figure, pick_device, prepared, provenance, table
from locality import InputError, schedule
from model import GPT, GPTConfig, load, save
from prepare_data import (SPLITS, check_blocks, check_tokenizer, describe, get_encoding, read_meta, read_split, token_bytes,
                          write_text)


# ---------------------------------------------------------------------------------------------------------------------
# configuration


# what a value of each type in Config may be in TOML, and how we call it
KINDS = {str: ((str,), "a string"), int: ((int,), "a whole number"), float: ((float, int), "a number"),
         int | None: ((int, type(None)), "a whole number"), str | list: ((str, list), "a string or a list of strings"),
         bool: ((bool,), "true or false"), str | bool: ((str, bool), "true, false or \"auto\"")}


@dataclass
class Config:
    # text: see prepare_data.py
    source: str | list = "data/sample.txt"    # file, folder, http(s) address, gutenberg:NUMBER, or a list of these
    tokenizer: str = "gpt2"                   # gpt2, gpt2:N (the first N of its tokens) or bytes
    partition: str = "semantic"               # semantic, sentence, window:N or block:N
    max_lookback: int = 256                   # no block reaches back further, in tokens
    val: float = 0.1                          # fractions of the text held out
    test: float = 0.1
    data: str = ""                            # prepared folder; empty: one under data/, named after the source
    # locality
    schedule: str = "quintic"                 # distributed, localist, linear, quadratic, cubic, quartic, quintic, reversed
    fidelity: float = 1.0                     # lambda of the last layer, in (0, 1]
    min_lookback: int = 0                     # every block reaches back at least so many tokens
    anchor: bool = False                      # the first token of a context belongs to every block
    dial: str = "blend"                       # blend: certified; penalty: on the weights outside the block, to compare
    # model
    init_from: str = "scratch"                # scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path
    block_size: int | None = None             # context in tokens; None: what init_from has, from scratch 1024
    n_layer: int | None = None                # None: what init_from has, from scratch 12
    n_head: int | None = None                 # … 12
    n_embd: int | None = None                 # … 768
    dropout: float = 0.0
    # optimisation: linear warm-up, cosine decay
    optimizer: str = "adamw"                  # adamw; or muon, for the matrices inside the layers (AdamW for the rest)
    batch_size: int = 8                       # contexts in one forward pass, of all processes together
    grad_accum: int = 1                       # forward passes in one step
    max_steps: int = 1000
    learning_rate: float = 3e-4
    min_lr: float = 3e-5                      # at max_steps
    warmup_steps: int = 50
    weight_decay: float = 0.1                 # on matrices, not on biases and norms
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                    # norm of the gradient; 0: no clipping
    # watching
    eval_interval: int = 100                  # steps between two looks at the validation split
    eval_contexts: int = 64                   # contexts in such a look
    patience: int = 0                         # stop after so many looks without a new best; 0: never
    log_interval: int = 10                    # steps between two lines of metrics.jsonl
    # machine
    seed: int = 1
    device: str = "auto"                      # auto: CUDA where there is one
    dtype: str = "auto"                       # float32, bfloat16 (autocast); auto: bfloat16 where it is faster
    compile: str | bool = "auto"              # torch.compile; auto: where dtype auto means bfloat16
    out: str = ""                             # run folder; empty: runs/ and the name of the config file

    def __post_init__(self):
        """Check every value that can be checked before there is a text and a model. Raises InputError."""
        for field in fields(self):
            value, (types, words) = getattr(self, field.name), KINDS[field.type]
            if not isinstance(value, types) or isinstance(value, bool) and bool not in types:
                raise InputError(f"{field.name} must be {words}, not {json.dumps(value, default=str)}")
            if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) >= 2 ** 63:
                raise InputError(f"{field.name} must be a finite number, of reasonable size")
            if isinstance(value, str) and value and not value.isprintable():
                raise InputError(f"{field.name} holds characters that cannot be written: {value!r}")
            if field.type is float:
                setattr(self, field.name, float(value))
        if not self.source or isinstance(self.source, list) and not all(s and isinstance(s, str) for s in self.source):
            raise InputError("source must name a text, or be a list of names")
        least = {"max_lookback": 1, "block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "batch_size": 1, "seed": 0,
                 "grad_accum": 1, "max_steps": 1, "warmup_steps": 0, "eval_interval": 1, "eval_contexts": 1,
                 "patience": 0, "log_interval": 1, "learning_rate": 0, "min_lr": 0, "weight_decay": 0, "grad_clip": 0}
        for key, value in least.items():
            if getattr(self, key) is not None and getattr(self, key) < value:
                raise InputError(f"{key} must be at least {value}, not {getattr(self, key)}")
        for key in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"{key} must be in [0, 1), not {getattr(self, key)}")
        choices = {"dial": ("blend", "penalty"), "optimizer": ("adamw", "muon"), "dtype": ("auto", "float32", "bfloat16"),
                   "compile": ("auto", True, False)}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                shown = ", ".join(json.dumps(a) for a in allowed)
                raise InputError(f"{key} must be one of {shown}, not {json.dumps(getattr(self, key))}")
        check_tokenizer(self.tokenizer)
        schedule(self.schedule, 1, self.fidelity)
        check_blocks(self.partition, self.max_lookback, self.val, self.test)
        if not 0 <= self.min_lookback <= self.max_lookback:
            raise InputError(f"min_lookback must be in 0 … max_lookback ({self.max_lookback}), not {self.min_lookback}")
        if self.min_lr > self.learning_rate:
            raise InputError(f"min_lr ({self.min_lr:g}) is above learning_rate ({self.learning_rate:g})")
        if self.n_embd and self.n_head and self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


def read_values(argv, more=()):
    """The keys that a command line, `CONFIG.toml [--key value …]`, sets, a dict; `more` names what Config does not know.

    Raises InputError for what it does not understand.
    """
    if not argv or argv[0].startswith("-"):
        raise InputError("give a config: python train.py configs/quickstart.toml [--key value …]")
    path = Path(argv[0])
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:    # not TOML, not UTF-8, or brackets without end
        raise InputError(f"{path}: not a TOML file: {e}") from None
    names = {field.name: field.type for field in fields(Config)}
    rest = [word for a in argv[1:] for word in (a.split("=", 1) if a.startswith("--") else [a])]
    for key, text in zip(rest[::2], rest[1::2] + [None] * (len(rest) % 2)):
        name = key[2:].replace("-", "_")
        if not key.startswith("--") or text is None:
            raise InputError(f"{key}: overrides come in pairs, --key value")
        values[name] = text
        if names.get(name) is not str and not (names.get(name) == str | list and not text.startswith("[")):
            try:
                values[name] = tomllib.loads(f"value = {text}")["value"]
            except (ValueError, RecursionError):
                pass    # a word; Config says what it should have been
    for key in values.keys() - set(more):
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, cutoff=0)[0]
            raise InputError(f"unknown key {key}; the nearest known one is {near}")
    if values.get("out", "") == "":
        values["out"] = f"runs/{path.stem}"
    if not isinstance(values["out"], str):
        raise InputError(f"out must be a string, not {json.dumps(values['out'], default=str)}")
    return values


def read_config(argv):
    """The Config of a command line. Raises InputError for what it does not understand."""
    return Config(**read_values(argv))


def to_toml(config):
    """The config as TOML, every key written out, so that a run folder says all of what was run."""
    lines = []
    for key, value in asdict(config).items():
        if value is not None:    # JSON writes numbers, booleans, lists and printable strings as TOML does
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# pieces of the loop


def build_model(config, vocab_size):
    """The model to train, from scratch or from weights, its dial set. Raises InputError where the config contradicts it."""
    shape = {key: getattr(config, key) for key in ("block_size", "n_layer", "n_head", "n_embd")}
    shape = {key: value for key, value in shape.items() if value is not None}
    settings = {key: getattr(config, key) for key in ("dropout", "max_lookback", "min_lookback", "anchor", "dial")}
    if config.init_from == "scratch":
        try:
            model = GPT(GPTConfig(vocab_size, **settings, **shape))
        except (RuntimeError, MemoryError, OverflowError):
            raise InputError(f"a model of this shape does not fit in memory: {shape}") from None
    else:
        model = GPT.from_pretrained(config.init_from, config.block_size, **settings)
        for key, value in shape.items():
            if getattr(model.config, key) != value:
                raise InputError(f"{key} is {value} in the config but {getattr(model.config, key)} in "
                                 f"{config.init_from}; leave it out of the config")
        if model.config.vocab_size != vocab_size:
            raise InputError(f"the {config.tokenizer} tokenizer has {vocab_size} tokens, "
                             f"{config.init_from} has {model.config.vocab_size}; use the tokenizer it was trained with")
    model.set_locality(schedule(config.schedule, model.config.n_layer, config.fidelity))
    return model


def build_optimizers(model, config, device):
    """A list of optimizers, which share the learning rate: AdamW, and for the matrices of the layers Muon if asked for."""
    inner = [p for p in model.h.parameters() if p.dim() == 2]
    outer = [model.wte.weight, model.wpe.weight]
    plain = [p for p in model.parameters() if p.dim() < 2]    # biases and norms
    muon = config.optimizer == "muon"
    groups = [{"params": outer if muon else outer + inner, "weight_decay": config.weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    if not muon:
        return [adamw]
    return [adamw, torch.optim.Muon(inner, lr=config.learning_rate, weight_decay=config.weight_decay,
                                    adjust_lr_fn="match_rms_adamw")]


def restore(optimizer, saved, fresh):
    """Give the optimizer its saved moments; what else it has follows from the config. Raises ValueError if some are missing.

    fresh: it has made no step yet, and so has none.
    """
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = all(isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape in (p.shape, ())
                for p in parameters for value in optimizer.state[p].values())
    kinds = {tuple(optimizer.state[p]) for p in parameters}    # the names of its moments, the same for every parameter
    if not whole or not fresh and (len(kinds) != 1 or () in kinds):
        raise ValueError


def learning_rate(step, config):
    """Linear warm-up, then a cosine from learning_rate down to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def random_batch(tokens, lookback, T, config, number, device, rank=0, world=1):
    """Contexts at random places, a function of the seed and the batch's number alone: (B, T) ids, lookbacks, targets.

    Where `world` processes share the batch, only the contexts of this one are read: each world-th from `rank` on.
    """
    starts = np.random.default_rng((config.seed, number)).integers(0, len(tokens) - T, config.batch_size)[rank::world]
    rows = [np.stack([a[s:s + T] for s in starts]) for a, starts in (
        (tokens, starts), (lookback, starts), (tokens, starts + 1))]
    batch = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    if device.type == "cuda":
        return [b.pin_memory().to(device, non_blocking=True) for b in batch]
    return [b.to(device) for b in batch]


def fast_bfloat16(device):
    """Whether bfloat16 is faster than float32: on CUDA cards that have it, and on CPUs with AMX. AVX-512 alone has the
    instructions too, but its matrix products take about twice as long in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def precision(device, dtype):
    """The context of a forward pass: bfloat16 arithmetic, or plain float32. dtype auto: whatever is faster."""
    if dtype == "bfloat16" or dtype == "auto" and fast_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def compiles(device, choice):
    """Whether to use torch.compile. auto: on CUDA, where there is the C compiler that it needs; on a CPU with AMX, where
    there is one for C++. On other CPUs, where nearly all the time goes into matrix products, it won next to nothing."""
    if choice == "auto":
        cuda = device.type == "cuda"
        names = (os.environ.get("CC", "cc"), "gcc", "clang") if cuda else (os.environ.get("CXX", "c++"), "g++")
        return (cuda or fast_bfloat16(device)) and any(map(shutil.which, names))
    return choice


def keep_memory(largest=0):
    """On a CPU, have this process keep the memory it frees until it ends, where the C library is glibc.

    glibc gives a block above 32 MB back to the system at once, and every page of the next one is fetched and zeroed anew:
    with GPT-2's vocabulary, a good part of a step. largest: bytes of the largest tensor; keeping takes room for some four
    more of it, and so is left alone where eight of them are more than a third of the machine's memory.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):    # other C libraries have no mallopt
        if 8 * largest > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 3:
            return
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)     # M_MMAP_MAX: no block in a mapping of its own,
        mallopt(-1, -1)    # M_TRIM_THRESHOLD: and none given back


def join(config):
    """(device, rank, world) of this process: number `rank` of the `world` that torchrun started, or the only one, 0 of 1.

    Processes talk by NCCL, each on a GPU of its own, or by Gloo where the device is the CPU. Raises InputError.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if config.batch_size % world:
        raise InputError(f"batch_size ({config.batch_size}) must be divisible by the {world} processes that share it")
    own_gpu = world > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{local}" if own_gpu else config.device)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    return device, rank, world


@contextlib.contextmanager
def in_turn(rank, world):
    """What one process downloads or writes and the others then read: rank 0 is through with it first, then the first
    process of each other machine, which may have a disk of its own, then all others."""
    turn = 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn if world > 1 else 0):
        distributed.barrier()
    yield
    for _ in range(2 - turn if world > 1 else 0):
        distributed.barrier()


@contextlib.contextmanager
def stop_signals():
    """Collect SIGINT and SIGTERM in a list in place of dying of them: the step in hand is finished and saved first."""
    asked = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_metrics(out):
    """metrics.jsonl of the run folder, open to append to, and locked: two runs in one folder would ruin each other.

    The lock dies with the process, however that ends. Raises InputError if another one has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "metrics.jsonl", "ab", buffering=0)
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another process is training in this folder; stop it, or give another --out") from None
    except OSError as e:
        print(f"{out} could not be locked ({e}): take care that only one run uses it", file=sys.stderr)
    for path in out.glob("*.*.tmp"):    # of a run that was killed while it saved
        path.unlink()
    return file


@torch.no_grad()
def diagnose(model, batches):
    """Where numbers stopped being finite, a dict of names in the order in which they are met.

    weights: of parameters. outputs: of modules, in a forward pass over `batches`, an iterable of what random_batch gives.
    gradients: of parameters, on the way back, which begins at the last layer: the first named is where it broke. large:
    the parameter with the largest gradient, where all are finite and only their squares are not.
    """
    parameters, outputs = list(model.named_parameters()), {}
    hooks = [module.register_forward_hook(
        lambda module, x, y, name=name: None if y.isfinite().all() else outputs.update({name: None}))
        for name, module in model.named_modules() if not list(module.children())]
    for batch in batches:
        model(*batch)
    for hook in hooks:
        hook.remove()
    return {"weights": [name for name, p in parameters if not p.isfinite().all()], "outputs": list(outputs),
            "gradients": [name for name, p in reversed(parameters) if p.grad is not None and not p.grad.isfinite().all()],
            "large": [max((p.grad.abs().max().item(), name) for name, p in parameters if p.grad is not None)[1]]
            if parameters[0][1].grad is not None else []}


# dense bfloat16 peak of a card in flop/s, without sparsity, from NVIDIA's data sheets
PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def utilisation(model, tokens_per_second, T, device):
    """Model flop utilisation, 0 to 1, or None where the peak is unknown: (6 N + 12 L C T) flop a token (PaLM, app. B)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for card, peak in PEAK.items() if card in name), None)
    n = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    return peak and tokens_per_second * (6 * n + 12 * model.config.n_layer * model.config.n_embd * T) / peak


# ---------------------------------------------------------------------------------------------------------------------
# the run


def train(config, held, resume=False):
    """held: a contextlib.ExitStack, which closes metrics.jsonl and so gives the run folder back, whatever happens."""
    out = Path(config.out)
    device, rank, world = join(config)
    torch.manual_seed(config.seed)
    metrics = held.enter_context(open_metrics(out)) if resume and rank == 0 else None
    state = load(out / "last.pt") if resume else None
    with in_turn(rank, world):
        encoding = get_encoding(config.tokenizer)
        folder = prepared(state["config"] if resume else asdict(config))
        model = build_model(config, encoding.n_vocab)
    T = model.config.block_size
    splits = {split: read_split(folder, split) for split in SPLITS}
    if len(splits["train"][0]) <= T:
        raise InputError(f"{config.source}: the training split has {len(splits['train'][0])} tokens, block_size is {T}; "
                         "use a longer text or a smaller block_size")
    vocabulary, meta = token_bytes(encoding), read_meta(folder)
    model.to(device)
    if device.type == "cpu":
        keep_memory(config.batch_size * T * len(model.wte.weight) * 4)    # the logits
    optimizers = build_optimizers(model, config, device)
    fast_model = torch.compile(model) if compiles(device, config.compile) else model
    if world > 1:
        fast_model = torch.nn.parallel.DistributedDataParallel(fast_model)
    start, best, looks_since_best, written, spent = 0, math.inf, 0, 0, 0.0
    if resume:
        try:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                restore(optimizer, saved, fresh=state["step"] == 0)
            torch.set_rng_state(state["rng"])
            if device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], device)
            start, looks_since_best, written = (int(state[key]) for key in ("step", "looks_since_best", "metrics_bytes"))
            best, val, spent = (float(state[key]) for key in ("best", "val_loss", "seconds"))
            if min(start, written) < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as e:
            raise InputError(f"{out / 'last.pt'}: not a whole checkpoint of this model ({type(e).__name__})") from None
        del state    # as large as the model three times over

    if rank:    # rank 0 alone writes; and each draws its own dropout
        torch.manual_seed(config.seed + 1000 * start + rank)
    else:
        metrics = metrics or held.enter_context(open_metrics(out))
        for name in ("diverged.json",) if resume else RESULTS:    # of a run that is overwritten nothing stays
            (out / name).unlink(missing_ok=True)
        write_text(out / "config.toml", to_toml(config))
        if os.fstat(metrics.fileno()).st_size < written:
            raise InputError(f"{out / 'metrics.jsonl'} is shorter than it was when last.pt was written; put the whole one back")
        metrics.truncate(written)    # what a killed run wrote after its last checkpoint comes again
        describe(folder)
        print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device}"
              f"{f' and {world - 1} more' if world > 1 else ''}, {config.schedule}, locality "
              f"{' '.join(f'{x:.3g}' for x in model.locality)}" + (f", from step {start}" if resume else ""))

    def checkpoint(step, **more):
        if not all(p.isfinite().all() for p in model.parameters()):
            check_finite(step, weights=math.nan)
        return {"step": step, "model": model.state_dict(), "model_config": asdict(model.config),
                "config": {**asdict(config), "source_sha256": meta["source_sha256"], "files": meta["files"],
                           "background": meta["background"]},
                **more}

    def note(**line):
        """A line of metrics.jsonl, whole or not at all."""
        if rank:
            return
        before, text = metrics.seek(0, os.SEEK_END), (json.dumps(line) + "\n").encode()
        try:
            if metrics.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            metrics.truncate(before)
            raise InputError(f"{out / 'metrics.jsonl'}: could not be written ({e.strerror})") from None

    def check_finite(step, **values):
        """Stop the run, and leave in diverged.json where it broke, if one of the values is not finite."""
        if all(map(math.isfinite, values.values())):
            return
        first = max(step - 1, 0) * config.grad_accum
        batches = (random_batch(*splits["train"], T, config, first + micro, device, rank, world)
                   for micro in range(config.grad_accum))
        with precision(device, config.dtype):
            found = diagnose(model, batches)
        kind, name = next(((kind, names[0]) for kind, names in found.items() if names), ("outputs", "validation split only"))
        report = {"step": step, **{key: str(value) for key, value in values.items()}, "lr": learning_rate(step, config)}
        if rank == 0:
            write_text(out / "diverged.json", json.dumps({**report, **found}, indent=1) + "\n")
        late = "" if device.type == "cpu" else " or before, which --resume --log_interval 1 tells"
        raise InputError(f"training diverged at step {step}{late} ({', '.join(f'{k} {v}' for k, v in values.items())}; "
                         f"{kind}: {name}; more in {out / 'diverged.json'}); lower learning_rate "
                         f"({config.learning_rate:g}); the checkpoints in {out} are of before")

    def look(step):
        """Score the validation split; keep the model if it is the best so far. Returns the loss in nats."""
        nonlocal best, looks_since_best
        val = evaluate(model, *splits["val"], vocabulary, min(T, len(splits["val"][0]) - 1),
                       batch_size=max(1, config.batch_size // world), measure=False, limit=config.eval_contexts)
        check_finite(step, val_loss=val["loss"])
        note(step=step, val_loss=val["loss"], val_perplexity=val["perplexity"])
        looks_since_best += 1
        if val["loss"] < best:
            best, looks_since_best = val["loss"], 0
            save(checkpoint(step, val_loss=best), out / "best.pt")
        return val["loss"]

    def look_once(step):
        """The same where there are several processes: rank 0 looks, and tells the others what it has found."""
        nonlocal best, looks_since_best
        if world == 1:
            return look(step)
        found = [look(step), best, looks_since_best] if rank == 0 else [0.0] * 3
        found = torch.tensor(found, dtype=torch.double, device=device)
        distributed.broadcast(found, 0)
        val, best, looks_since_best = found.tolist()
        return val

    def keep(step):
        """Write all that the next step depends on, so that a resumed run goes on as if it had never stopped."""
        if rank:
            return
        os.fsync(metrics.fileno())    # the checkpoint counts on what stands there
        save(checkpoint(step, optimizers=[o.state_dict() for o in optimizers], rng=torch.get_rng_state(), best=best, val_loss=val,
                        cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                        looks_since_best=looks_since_best, metrics_bytes=metrics.seek(0, os.SEEK_END),
                        seconds=spent + time.perf_counter() - started), out / "last.pt")

    started = time.perf_counter()
    if not resume:
        val = look_once(0)
        keep(0)
    step, stop, seen, clock = start, False, 0, time.perf_counter()
    with stop_signals() as asked, tqdm(initial=start, total=config.max_steps, desc=out.name, unit="step",
                                       disable=rank > 0) as bar:
        while step < config.max_steps and not 0 < config.patience <= looks_since_best:
            lr = learning_rate(step, config)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            loss = 0.0
            for micro in range(config.grad_accum):
                x, r, y = random_batch(*splits["train"], T, config, step * config.grad_accum + micro, device, rank, world)
                if world > 1:    # gradients are averaged over the processes after the last backward pass of a step
                    fast_model.require_backward_grad_sync = micro == config.grad_accum - 1
                with precision(device, config.dtype):
                    part = fast_model(x, r, y)[1] / config.grad_accum
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if device.type == "cpu" or (step + 1) % config.log_interval == 0:    # on a card it would wait for the device
                check_finite(step + 1, loss=float(loss), gradient=float(norm))
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip or math.inf, norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seen += config.grad_accum * config.batch_size * T
            bar.update()
            stop = bool(asked) and world == 1
            if step % config.log_interval == 0:
                if world > 1:    # the mean loss, and whether any process was asked to stop
                    shared = torch.stack((loss, torch.full_like(loss, bool(asked))))
                    distributed.all_reduce(shared)
                    loss, stop = shared[0] / world, bool(shared[1])
                loss, norm = float(loss), float(norm)
                speed = seen / max(time.perf_counter() - clock, 1e-9)
                seen, clock = 0, time.perf_counter()
                mfu = utilisation(model, speed / world, T, device)
                bar.set_postfix_str(f"loss {loss:.3f}, val {val:.3f}, lr {lr:.1e}, {speed:,.0f} tok/s"
                                    + (f", MFU {100 * mfu:.0f} %" if mfu else ""))
                note(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(speed))
            if step % config.eval_interval == 0 or step == config.max_steps:
                val = look_once(step)
                keep(step)
                seen, clock = 0, time.perf_counter()
            if step == start + 1:    # compiling is not training
                seen, clock = 0, time.perf_counter()
            if stop:
                keep(step)
                break
    if world > 1:
        distributed.destroy_process_group()
    if stop:
        if rank == 0:
            print(f"stopped at step {step}; go on with: python train.py {out} --resume", file=sys.stderr)
        sys.exit(128 + (asked[0] if asked else signal.SIGTERM))
    if rank:
        return

    # what the best model is worth, on text it has never seen
    chosen = load(out / "best.pt")
    model.load_state_dict(chosen["model"])
    results = evaluate(model, *splits["test"], vocabulary, batch_size=max(1, config.batch_size // world))
    results = {"schedule": config.schedule, "fidelity": config.fidelity, "partition": config.partition, "split": "test",
               **results, "val_loss": chosen["val_loss"], "best_step": chosen["step"], "steps": step,
               "seconds": round(spent + time.perf_counter() - started, 1), **provenance(device, config.seed),
               "config": asdict(config)}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    figure(model, *splits["test"], results, out / "attention.png", f"{out.name}: {config.schedule}, "
           f"{config.partition} blocks, test split")
    print(f"\n{out}: the best model (step {chosen['step']}) on the test split")
    print(table(results))
    print(f"figure: {out / 'attention.png'}   all numbers: {out / 'results.json'}")


RESULTS = ("results.json", "attention.png", "diverged.json", "best.pt", "last.pt")
# what a resumed run may change: how long it goes and how often it is looked at
MAY_CHANGE = {"max_steps", "patience", "eval_interval", "log_interval", "out"}


def resumed(argv):
    """The Config with which the run in folder argv[0] goes on. Raises InputError where it would not be the same run."""
    out = Path(argv[0]) if argv else Path()
    if not (out / "last.pt").is_file():
        raise InputError(f"{out}: no last.pt to resume from; give the folder of a run: python train.py runs/NAME --resume")
    before = load(out / "last.pt").get("config")
    if not isinstance(before, dict):
        raise InputError(f"{out / 'last.pt'}: not a checkpoint of train.py")
    config = read_config([str(out / "config.toml"), *argv[1:], "--out", str(out)])
    changed = [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in asdict(config).items()
               if key not in MAY_CHANGE and before.get(key) != value]
    if changed:
        raise InputError(f"{out} cannot go on with another config ({'; '.join(changed)}); "
                         f"only {', '.join(sorted(MAY_CHANGE - {'out'}))} may change")
    return config


def main():
    argv = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    if "--resume" in sys.argv:
        with contextlib.ExitStack() as held:
            return train(resumed(argv), held, resume=True)
    config = read_config(argv)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and "--overwrite" not in sys.argv:
        raise InputError(f"{out} is not an empty folder: if it holds a run, go on with it (--resume) or --overwrite it; "
                         "or give another --out")
    if config.data and out.absolute() == Path(config.data).absolute():
        raise InputError(f"data and out are the same folder, {out}; a run wants a folder of its own")
    with contextlib.ExitStack() as held:
        train(config, held)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
