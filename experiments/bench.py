"""Time the parts of the project, side by side with their rivals.

    python -m experiments.bench [--only SECTION] [--nanogpt DIR] [--json FILE]
    python -m experiments.bench --only data --source BOOKS.txt

attention: one layer's attention, forward and backward. Against PyTorch's own, over the whole
           context and with a dense mask.
step:      a training step. Against nanoGPT's (--nanogpt: a checkout), and against that of
           `transformers` with the same mask. Also the memory it takes, and the loading of batches.
long:      a training step with one long context. Localist against distributed.
blend:     two ways to compute the blend of global and local attention. Against each other.
small:     the step of configs/pretrain_cpu.toml, with Muon. Against AdamW.
evaluate:  what `eval.py` does, with all its measures. Against the perplexity alone.
generate:  tokens a second with the cache. Against reading the context again for every token.
data:      to partition a text into semantic blocks. Against encoding it (tiktoken). Both for the
           text once, 4 times and 16 times in a row.

Contestants take turns, round after round, so that other work on the machine slows all of them
alike. A time is the median of its rounds. All blocks reach back as far as they may.

On a CPU, other software takes its steps in processes of its own, without the settings of `support`:
memory in large pages, threads that soon give up.

A CPU can be held to older instructions. With `ONEDNN_MAX_CPU_ISA=AVX512_CORE` in front of the
command it does as if it had no AMX. With `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2` it has AVX2 alone.

Each row has `seconds` or `tokens_per_s`. Its `ratio` is to the same number of its `baseline` in the
same race. (On a GPU the baseline's own row may be of an earlier race, and differ a little.) It is
printed and written as soon as it is known. What is not installed is left out, with a note. On a
CUDA device the shapes are larger, the models are compiled, and the card's own clock is read.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import support  # before torch: it sets what torch reads when it is loaded  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from eval import evaluate
from locality import Partitioner, background, partition, schedule
from model import (
    GPT,
    GPTConfig,
    attention_weights,
    block_mask,
    clamp_lookback,
    in_block,
    local_attention,
    tiled_mask,
)
from prepare_data import get_encoding, token_bytes
from support.files import InputError, check_writable, run_script, write_json
from support.machine import compiles, missing_compiler, peak_flops, pick_device, precision
from train import Config, build_optimizers, random_batch

W = 256  # max_lookback of all but `data`
OTHERS = 128, 512, 768  # other ones, for local attention in the shortest context
AT_ONCE = 2**14  # tokens that keep a GPU busy
DIALS = ("distributed", "quintic", "localist")
PRODUCTS = "matrix products alone"
SMALL = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512}
CPU = torch.device("cpu")
SPAWN = multiprocessing.get_context("spawn")

# --------------------------------------------------------------------------------------------------
# measuring


def machine(device):
    """What the times depend on, a dict."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        cpu = read_field("/proc/cpuinfo", "model name")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "dtype": str(auto_dtype(device)).removeprefix("torch."),
        "compiled": compiles(device, "auto"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def begin(device, path):
    """Print what the times depend on. From now on `row` writes all rows to `path`, unless None."""
    log = machine(device)
    print("\n".join(f"{key:12s} {value}" for key, value in log.items()))
    if path:
        FILE.update(path=path, machine=log)
    if device.type == "cuda":  # many models share one code: none may run uncompiled, unnoticed
        limits = torch._dynamo.config
        limits.recompile_limit, limits.fail_on_recompile_limit_hit = 64, True


def read_field(path, key):
    """What Linux says of `key` in a file of lines `key: value`. Raises OSError, StopIteration."""
    lines = Path(path).read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key))


def read_mb(path, key):
    return int(read_field(path, key).split()[0]) / 1024


def auto_dtype(device):
    """What `dtype = "auto"` means on this device."""
    with precision(device, "auto"):
        lower = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if lower else torch.float32


def clock(turn, device, n=1):
    """The seconds that a call takes, the mean of n; on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(n):
            turn()
        return (time.perf_counter() - start) / n
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(n):  # the GPU falls behind Python, and then never waits for it
        turn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / n


def race(contestants, device, rounds):
    """{name: function} -> {name: median seconds of a call}.

    They take turns. The first round warms up and does not count. On a GPU a turn is as many calls
    as take 50 ms.
    """
    times, calls = {name: [] for name in contestants}, dict.fromkeys(contestants, 1)
    for name, turn in contestants.items():
        clock(turn, device)
        if device.type == "cuda":
            calls[name] = math.ceil(0.05 / clock(turn, device))
    for _ in range(rounds):
        for name, turn in contestants.items():
            times[name].append(clock(turn, device, calls[name]))
    return {name: statistics.median(each) for name, each in times.items()}


ROWS, FILE = [], {}  # all rows so far; where they are written, and the machine that each names


def row(section, name, seconds=None, tokens_per_s=None, against=None, **more):
    """One row of the table, printed and written; a dict. against: the row of the baseline."""
    found = {"section": section, "name": name, "seconds": seconds, "tokens_per_s": tokens_per_s}
    found |= more
    value = ratio = ""
    if seconds:
        value = f"{1e3 * seconds:12,.2f} ms   "
    elif tokens_per_s:
        value = f"{tokens_per_s:12,.1f} tok/s"
    if against:
        key = "seconds" if seconds else "tokens_per_s"
        found |= {"baseline": against["name"], "ratio": found[key] / against[key]}
        ratio = f"{found['ratio']:7.3f} x {found['baseline']}"
    notes = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in more.items()}
    notes = ", ".join(f"{key} {note}" for key, note in notes.items() if note is not None)
    print(f"{name:44s} {value:18s} {ratio:56s} {notes}", flush=True)
    found = {key: value for key, value in found.items() if value is not None}
    ROWS.append(found)
    if FILE:
        write_json(FILE["path"], [{**each, "machine": FILE["machine"]} for each in ROWS])
    return found


def in_new_process(function, *args):
    """function(*args) in a process that has done nothing else."""
    with ProcessPoolExecutor(1, SPAWN) as process:
        return process.submit(function, *args).result()


def peak_of(make, *args, device):
    """The most MB that make(*args), which returns a turn, and one turn hold: what they add.

    On a CPU in a new process, where nothing else has raised the peak. None where the system does
    not say.
    """
    if device.type != "cuda":
        return in_new_process(peak_here, make, args)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    make(*args)()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_here(make, args):
    """The same for this process. Linux keeps a record of its largest size, which is reset first."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = read_mb("/proc/self/status", "VmRSS")
        make(*args)()
        return read_mb("/proc/self/status", "VmHWM") - before
    except (OSError, StopIteration):
        return None


def farthest(B, T, cap=W):
    """The lookback of blocks that reach back as far as they may, (B, T) int64."""
    return clamp_lookback(torch.full((B, T), cap), cap)


def free(device):
    """Forget what was compiled, and give back the memory of models that are gone."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# attention


def attention_turn(name, T, device, heads=12, dtype=torch.float32, cap=W):
    """One layer's attention in contexts of T tokens, forward and backward: a function to call."""
    cuda = device.type == "cuda"
    B = max(1, AT_ONCE // T) if cuda else 1
    q, k, v = (
        torch.randn(B, T, heads, 64, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    lookback = farthest(B, T, cap).to(device)
    if name.startswith("local"):
        mask = block_mask(lookback, cap, tiled=cuda and "chunks" not in name)
        attend = torch.compile(local_attention, dynamic=False) if cuda else local_attention
        attend = partial(attend, mask=mask)
    elif name == "dense mask":
        attend = partial(F.scaled_dot_product_attention, attn_mask=in_block(lookback)[:, None])
    else:
        attend = partial(F.scaled_dot_product_attention, is_causal=True)

    def turn():
        y = attend(q, k, v)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return turn


def bench_attention(args):
    cuda = args.device.type == "cuda"
    lengths = (1024, 8192, 32768) if cuda else (1024, 2048, 4096, 8192, 16384)
    if args.quick:
        lengths = (256, 512)
    dtype = torch.bfloat16 if cuda else torch.float32
    size = f"{AT_ONCE} tokens at least" if cuda else "batch 1"
    print(f"12 heads x 64, {W} tokens back, {size}, {str(dtype).removeprefix('torch.')}")
    local = {}
    for T in lengths:
        # longer contexts take the others too long, or too much memory
        names = ["causal"] * (T <= 4096 or cuda) + ["dense mask"] * (T <= 4096) + ["local"]
        names += ["local, in chunks"] * cuda
        how = {name: (name, T, args.device, 12, dtype) for name in names}
        if T == lengths[0] and not args.quick:  # blocks that reach back further, or less far
            other = {f"local, {cap} back": cap for cap in OTHERS}
            how |= {name: ("local", T, args.device, 12, dtype, cap) for name, cap in other.items()}
        times = race({n: attention_turn(*how[n]) for n in how}, args.device, args.rounds)
        found = {}
        for name in how:
            peak = peak_of(attention_turn, *how[name], device=args.device)
            against = found.get("causal") if name.startswith("local") else None
            title = f"{name}, T = {T}"
            found[name] = row("attention", title, times[name], against=against, peak_mb=peak)
        local[T] = found["local"]
        if "dense mask" in found:
            row("attention", f"local, T = {T}", times["local"], against=found["dense mask"])
        free(args.device)
    slopes = {}
    for key in ("seconds", "peak_mb"):
        if all(local[T].get(key) for T in lengths) and not cuda:  # there the batch changes with T
            values = np.log([local[T][key] for T in lengths])
            slopes[f"exponent_of_{key}"] = float(np.polyfit(np.log(lengths), values, 1)[0])
    if slopes:
        row("attention", f"local, exponent of T from {lengths[0]} to {lengths[-1]}", **slopes)


# --------------------------------------------------------------------------------------------------
# a training step: ours


def step_turn(model, optimizers, loss_of, device):
    """A training step: a function to call. loss_of(): the forward pass."""

    def turn():
        with precision(device, "auto"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return turn


def random_tokens(shape, B, device):
    """A batch as `random_batch` gives it: ids, lookbacks, targets, (B, T) each."""
    T, V = shape["block_size"], shape.get("vocab_size", 50257)
    x, lookback = torch.randint(V, (B, T), device=device), farthest(B, T).to(device)
    return x, lookback, torch.randint(V, (B, T), device=device)


def after_one(make, *args):
    """The turn of make(*args), after a first one: then an optimizer has its moments."""
    turn = make(*args)
    turn()
    return turn


def our_step(dial, shape, B, device, **how):
    """A step of train.py with the schedule `dial`: a function to call. how: keys of its Config."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).to(device)
    model.set_locality(schedule(dial, model.config.n_layer))
    # dynamic=False: where several models share the code, the compiler would take lambda for a
    # variable; a run has one model, and there it is a constant
    fast_model = torch.compile(model, dynamic=False) if compiles(device, "auto") else model
    optimizers = build_optimizers(model, Config(**how))
    x, lookback, y = random_tokens(shape, B, device)
    return step_turn(model, optimizers, lambda: fast_model(x, lookback, y)[1], device)


def head_turn(shape, B, device):
    """The three matrix products of a step with its largest matrix, the output head: a function."""
    rows, V, C = B * shape["block_size"], shape.get("vocab_size", 50304), shape["n_embd"]
    sizes, dtype = ((rows, C), (V, C), (rows, V)), auto_dtype(device)
    x, w, dy = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    return lambda: (x @ w.T, dy @ w, dy.T @ x)


# --------------------------------------------------------------------------------------------------
# a training step: that of other software

TURN = []  # in a process that `apart` started: the turn it takes
OUR_WAY = "nanoGPT, with our settings"
DEFAULTS = {"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "300000"}  # without `support`


def apart(make, environment):
    """The turn that make() returns, in a process of its own: a function to call. None for None.

    environment: a dict, of its own variables.
    """
    before = {name: os.environ[name] for name in environment}
    os.environ.update(environment)
    process = ProcessPoolExecutor(1, SPAWN)
    try:
        if process.submit(prepare_turn, make).result():
            return lambda: process.submit(take_turn).result()
    finally:
        os.environ.update(before)


def prepare_turn(make):
    TURN.append(make())
    return TURN[0] is not None


def take_turn():
    TURN[0]()


def quiet():
    return contextlib.redirect_stdout(io.StringIO())


def adamw(model):
    """The optimizer that ours has, for a model of other software."""
    large = [p for p in model.parameters() if p.dim() >= 2]
    small = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)


def load_nanogpt(folder):
    """nanoGPT's model.py as a module. None, with a note, if there is no checkout."""
    if not folder:
        print("(nanoGPT left out: --nanogpt DIR names a checkout of it)")
        return None
    try:
        return load_module(Path(folder) / "model.py")
    except Exception as e:  # any code may stand there
        why = f"its model.py cannot be used as nanoGPT's ({type(e).__name__}: {e})"
        raise InputError(f"--nanogpt {folder}: {why}") from None


@cache  # its code is compiled once, not once for each contestant
def load_module(path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _ = module.GPT, module.GPTConfig(**SMALL, bias=False)
    return module


def nanogpt_step(folder, shape, B, device, defaults=False, compiled=False):
    """A step of nanoGPT's train.py: a function to call.

    It has the biases and the AdamW that ours has, or with `defaults` its own. compiled: always, not
    just where ours is.
    """
    nanogpt = load_nanogpt(folder)
    torch.manual_seed(0)
    with quiet():
        config = nanogpt.GPTConfig(**{"vocab_size": 50304, **shape}, bias=not defaults)
        model = nanogpt.GPT(config).to(device)
        optimizer = adamw(model)
        if defaults:
            optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device.type)
    fast_model = torch.compile(model) if compiled or compiles(device, "auto") else model
    x, _, y = random_tokens(shape, B, device)
    return step_turn(model, [optimizer], lambda: fast_model(x, y)[1], device)


def transformers_step(shape, B, device):
    """The same of GPT-2 in `transformers`, the blocks as a 4-D mask. None if not installed."""
    try:
        import transformers
    except ImportError:
        print("(transformers left out: it is not installed)")
        return None
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    how = {"n_positions" if key == "block_size" else key: value for key, value in shape.items()}
    how |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0)
    how |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    config = transformers.GPT2Config(**how, attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(config).to(device).train()
    fast_model = torch.compile(model) if compiles(device, "auto") else model
    x, lookback, _ = random_tokens(shape, B, device)

    def loss_of():
        T = x.size(1)
        mask = torch.zeros(B, 1, T, T, device=device)
        mask = mask.masked_fill(~in_block(lookback)[:, None], -math.inf)
        return fast_model(x, attention_mask=mask, labels=x).loss

    return step_turn(model, [adamw(model)], loss_of, device)


def rivals(args, shape, B):
    """What makes the steps of other software, as far as it is there: {name: function}."""
    cuda, found = args.device.type == "cuda", {}
    if load_nanogpt(args.nanogpt):
        nanogpt = partial(nanogpt_step, args.nanogpt, shape, B, args.device)
        found["nanoGPT"] = nanogpt
        if not cuda:
            found[OUR_WAY] = nanogpt
        compiled = not args.quick and not missing_compiler(args.device)
        found["nanoGPT, its defaults"] = partial(nanogpt, defaults=True, compiled=compiled)
    found["transformers, masked"] = partial(transformers_step, shape, B, args.device)
    if cuda:
        return found
    environments = {name: {} if name == OUR_WAY else DEFAULTS for name in found}
    return {name: partial(apart, found[name], environments[name]) for name in found}


# --------------------------------------------------------------------------------------------------
# a training step: the race


def bench_step(args):
    cuda = args.device.type == "cuda"
    shape = {"block_size": 1024, "n_layer": 12 if cuda else 4, "n_head": 12, "n_embd": 768}
    B = AT_ONCE // 1024 if cuda else 1
    if args.quick:
        shape, B = SMALL, 1
    print(f"{shape}, batch {B}, {W} tokens back, AdamW")
    size, tokens = (shape, B, args.device), B * shape["block_size"]
    makers = rivals(args, shape, B)
    makers[PRODUCTS] = partial(head_turn, *size)
    makers |= {dial: partial(our_step, dial, *size) for dial in DIALS}
    sized = GPT(GPTConfig(**shape))
    matrices = sum(p.numel() for p in sized.parameters() if p.dim() == 2) - sized.wpe.weight.numel()
    # on a CPU one race of all; a GPU is steadier: there a race, and a row, as each of them joins
    turns = {}
    for joining in [[name] for name in makers] if cuda else [[*makers]]:
        turns |= {name: turn for name in joining if (turn := makers[name]())}
        times = race(turns, args.device, args.rounds)
        if PRODUCTS in times:  # as if a step were nothing else, all as fast as the largest
            times[PRODUCTS] *= matrices / sized.wte.weight.numel()
        speeds = {name: tokens / seconds for name, seconds in times.items()}
        for name in joining:
            if name in turns:
                tell_step(name, speeds, shape, args.device)
    ours = {"name": "distributed", "tokens_per_s": speeds["distributed"]}
    bench_loader(shape["block_size"], B, ours)
    if args.nanogpt:
        other = peak_of(after_one, nanogpt_step, args.nanogpt, *size, device=args.device)
        row("step", f"memory, {'nanoGPT' if cuda else OUR_WAY}", peak_mb=other)
    held = peak_of(after_one, our_step, "distributed", *size, device=args.device)
    row("step", "memory, distributed", peak_mb=held)


def tell_step(name, speeds, shape, device):
    """The rows of one contestant: its speed, and if it is ours, against each of the others.

    speeds: of one race, {name: tokens a second}.
    """
    if name not in DIALS:
        row("step", name, tokens_per_s=speeds[name])
        return
    sized = GPT(GPTConfig(**shape, max_lookback=W))
    sized.set_locality(schedule(name, sized.config.n_layer))
    peak = peak_flops(device)
    mfu = peak and speeds[name] * sized.flops_per_token(shape["block_size"]) / peak
    for other in speeds:
        if other not in DIALS or other == "distributed" != name:
            against = {"name": other, "tokens_per_s": speeds[other]}
            row("step", name, tokens_per_s=speeds[name], against=against, mfu=mfu)


def bench_loader(T, B, step):
    """A row: batches from a file of 0.2 GB in the system's cache, and the MB to open one of 10 GB.

    step: the row it is compared with.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, 50257, 10**8, np.uint16).tofile(path)
        tokens = np.memmap(path, np.uint16, "r")
        tokens.max()  # now it is in the cache
        seconds = race({"loader": reader(tokens, T, B, 100)}, CPU, 5)["loader"] / 100
        os.truncate(path, 10**10)  # a hole: it takes no room on the disk
        to_open = peak_of(open_and_read, path, T, device=CPU)
        del tokens
    speed = B * T / seconds
    row("step", "loader", tokens_per_s=speed, against=step, mb_for_a_file_of_10_GB=to_open)


def reader(tokens, T, B, n):
    """Reads n batches: a function to call."""
    config, number = Config(batch_size=B), itertools.count()
    return lambda: [random_batch(tokens, tokens, T, config, next(number), CPU) for _ in range(n)]


def open_and_read(path, T):
    return reader(np.memmap(path, np.uint16, "r"), T, 8, 1)


# --------------------------------------------------------------------------------------------------
# long contexts


def bench_long(args):
    cuda = args.device.type == "cuda"
    shape = {"n_layer": 12 if cuda else 2, "n_head": 12, "n_embd": 768}
    lengths = (8192, 32768) if cuda else (4096,)
    if args.quick:
        shape, lengths = SMALL, (512,)
    print(f"{shape}, batch 1, {W} tokens back, AdamW")
    for T in lengths:
        found, turns = None, {}
        for dial in ("distributed", "localist"):
            turns[dial] = our_step(dial, {**shape, "block_size": T}, 1, args.device)
        times = race(turns, args.device, args.rounds)
        for dial, turn in turns.items():
            peak = peak_of(lambda turn: turn, turn, device=args.device) if cuda else None
            how = {"against": found, "mb_for_activations": peak}
            found = row("long", f"{dial}, T = {T}", tokens_per_s=T / times[dial], **how)
        del turns, turn
        free(args.device)


# --------------------------------------------------------------------------------------------------
# a step of a small model, and Muon


def bench_small(args):
    shape = {"vocab_size": 2048, "block_size": 1024, "n_layer": 4, "n_head": 4, "n_embd": 256}
    shape, B = (SMALL, 1) if args.quick else (shape, 4)
    print(f"{shape}, batch {B}")
    turns = {
        name: our_step("distributed", shape, B, args.device, optimizer=name)
        for name in ("adamw", "muon")
    }
    times, found = race(turns, args.device, args.rounds), None
    for name in turns:
        found = row("small", name, times[name], against=found)


# --------------------------------------------------------------------------------------------------
# evaluation


def evaluation(shape, measure, device):
    """Two contexts through `evaluate`: a function to call. measure: with all its measures."""
    torch.manual_seed(0)
    model, T = GPT(GPTConfig(**shape, max_lookback=W)).to(device), shape["block_size"]
    model.set_locality(schedule("quintic", model.config.n_layer))
    n = 2 * T + 1
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, n, np.uint16)
    lookback = farthest(1, n)[0].numpy().astype(np.uint16)
    vocabulary = [b"a"] * model.config.vocab_size
    return partial(evaluate, model, tokens, lookback, vocabulary, T, measure=measure)


def bench_evaluate(args):
    shape = {**SMALL, "block_size": 128} if args.quick else {"block_size": 1024}
    alone, whole = (f"{what}, T = {shape['block_size']}" for what in ("perplexity", "all measures"))
    turns = {alone: evaluation(shape, False, args.device)}
    turns[whole] = evaluation(shape, True, args.device)
    times = race(turns, args.device, min(args.rounds, 3))
    row("evaluate", whole, times[whole], against=row("evaluate", alone, times[alone]))
    for T in (1024, 8192) if not args.quick else (128,):  # two layers: memory is not for each
        long = {**shape, "block_size": T, "n_layer": 2}
        peak = peak_of(evaluation, long, True, args.device, device=args.device)
        per_token = peak and 1024 * peak / (2 * T)
        row("evaluate", f"memory, T = {T}", peak_mb=peak, kb_a_token=per_token)


# --------------------------------------------------------------------------------------------------
# two ways to compute the blend

LAMBDA = 0.5


def two_kernels(q, k, v, inside, outside):
    """The blend as the model has it: global attention, local attention, and a lerp."""
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.lerp(y, flex.flex_attention(q, k, v, block_mask=inside), LAMBDA)


def block_and_rest(q, k, v, inside, outside):
    """The same from the block and the rest of the context, each key read once.

    They are joined by their log-sum-exps, m. A query's fidelity is what comes out as w.
    """
    lse = flex.AuxRequest(lse=True)
    y_in, m_in = flex.flex_attention(q, k, v, block_mask=inside, return_aux=lse)
    y_out, m_out = flex.flex_attention(q, k, v, block_mask=outside, return_aux=lse)
    w = LAMBDA + (1 - LAMBDA) * torch.sigmoid(m_in.lse - m_out.lse)  # (B, H, T)
    return torch.lerp(y_out, y_in, w[..., None].to(y_in.dtype))


def blend_masks(lookback):
    """The masks of FlexAttention for the block of each query, and for all that lies before it."""
    T = lookback.size(1)
    start = torch.arange(T, device=lookback.device) - lookback  # (B, T)
    how = {"B": len(start), "H": None, "Q_LEN": T, "KV_LEN": T, "device": lookback.device}
    before = flex.create_block_mask(lambda b, h, query, key: key < start[b, query], **how)
    return tiled_mask(lookback), before


def bench_blend(args):
    if args.device.type != "cuda":
        print("(left out: FlexAttention has a backward pass on GPUs alone)")
        return
    print(f"12 heads x 64, lambda {LAMBDA}, {W} tokens back, bfloat16")
    for T in (256,) if args.quick else (1024, 8192):
        B = max(1, AT_ONCE // T)
        lookback = farthest(B, T).to(args.device)
        masks = blend_masks(lookback)
        how = {"device": args.device, "dtype": torch.bfloat16, "requires_grad": True}
        q, k, v = (torch.randn(B, 12, T, 64, **how) for _ in range(3))
        ways = {"two kernels": two_kernels, "block and rest": block_and_rest}
        ways = {name: torch.compile(way, dynamic=False) for name, way in ways.items()}
        turns = {name: partial(blend_turn, way, q, k, v, masks) for name, way in ways.items()}
        times, found = race(turns, args.device, args.rounds), None
        for name, way in ways.items():
            error = blend_error(way, q, k, v, lookback, masks)
            found = row("blend", f"{name}, T = {T}", times[name], against=found, error=error)
        free(args.device)


def blend_turn(way, q, k, v, masks):
    y = way(q, k, v, *masks)
    torch.autograd.grad(y, (q, k, v), torch.ones_like(y))


def blend_error(way, q, k, v, lookback, masks):
    """How far the first head of the first context is from `attention_weights`, at most."""
    q1, k1, v1 = (x[:1, :1].detach().float() for x in (q, k, v))
    a = attention_weights(q1, k1, in_block(lookback[:1])[:, None], LAMBDA)  # (1, 1, T, T)
    return (way(q, k, v, *masks)[:1, :1].detach() - a @ v1).abs().max().item()


# --------------------------------------------------------------------------------------------------
# generation


def nanogpt_twin(nanogpt, model):
    """nanoGPT with the weights of our model."""
    c = model.config
    with quiet():
        config = nanogpt.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
        twin = nanogpt.GPT(config).to(model.wte.weight.device).eval()
    state = {f"transformer.{key}": value for key, value in model.state_dict().items()}
    head = state["transformer.wte.weight"][: c.vocab_size]  # without the padding
    twin.load_state_dict({**state, "transformer.wte.weight": head, "lm_head.weight": head})
    return twin


def read_anew(forward, prompt, n, copies, device):
    """The likeliest n tokens after a prompt, a list. Reads the context again for each of them.

    nanoGPT's sample.py does so too; on a GPU in bfloat16. copies: of the prompt, side by side.
    """
    tokens = torch.tensor([prompt] * copies, device=device)
    with torch.no_grad(), precision(device, "auto" if device.type == "cuda" else "float32"):
        for _ in range(n):
            logits = forward(tokens)[0][:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens[0, len(prompt) :].tolist()


def generate(model, dial, prompt, n, copies):
    """The same with the cache, as our sample.py does it, in float32."""
    model.set_locality(schedule(dial, model.config.n_layer))
    vocabulary = [b"a"] * model.config.vocab_size  # a window does not read what they say
    partitioners = [Partitioner(vocabulary, f"window:{W}", W) for _ in range(copies)]
    steps = model.generate([prompt] * copies, n, partitioners, temperature=0)
    return [tokens[0] for tokens in steps]


def race_prompt(model, slow, name, prompt, n, copies=1):
    """Rows for one prompt: `slow`, the model called `name`, reads anew; ours has the cache."""
    device, of = model.wte.weight.device, f"prompt of {len(prompt)}"
    of += f", {copies} at once" if copies > 1 else ""
    model.set_locality([0.0] * model.config.n_layer)
    read_anew(slow, prompt, 1, copies, device)  # warm up
    anew = partial(read_anew, slow, prompt, n, copies, device)
    base = row("generate", f"{name}, {of}", tokens_per_s=copies * n / clock(anew, device))
    for dial in DIALS:
        turn, same = partial(generate, model, dial, prompt, n, copies), None
        speed = copies * n / race({dial: turn}, device, 2)[dial]
        if dial == "distributed" and device.type == "cpu":  # elsewhere the precision differs
            same = turn() == anew()
        row("generate", f"cached, {dial}, {of}", tokens_per_s=speed, against=base, same_tokens=same)
    return base


def bench_generate(args):
    shape, lengths, n = {}, (16, 512), 256
    if args.quick:
        shape, lengths, n = {**SMALL, "block_size": 128}, (16,), 32
    device, cuda = args.device, args.device.type == "cuda"
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).to(device).eval()
    weights = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    size = f"{len(weights) / 1e6:.0f} M parameters, random"
    print(f"{size}; {n} new tokens, greedy; ours in float32")
    # no token of a single text comes faster than the weights can be read
    seconds = race({"reading": weights.sum}, device, args.rounds)["reading"]
    row("generate", "reading the weights alone", tokens_per_s=1 / seconds)
    slow, name = model, "reading anew"
    if nanogpt := load_nanogpt(args.nanogpt):
        slow, name = nanogpt_twin(nanogpt, model), "nanoGPT, reading anew"
    for length in lengths:
        prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
        base = race_prompt(model, slow, name, prompt, n)
        if cuda:
            race_prompt(model, slow, name, prompt, n, copies=32)
    if not cuda:
        name = f"cached, distributed, prompt of {length}, 8 at once"
        seconds = race({0: lambda: generate(model, "distributed", prompt, n, 8)}, device, 1)[0]
        row("generate", name, tokens_per_s=8 * n / seconds, against=base)


# --------------------------------------------------------------------------------------------------
# data


def held():
    """MB that this process and its children hold now. Linux alone says so.

    Files do not count. What the processes share counts once.
    """
    children, total = f"/proc/self/task/{os.getpid()}/children", 0
    for pid in [os.getpid(), *Path(children).read_text().split()]:
        with contextlib.suppress(OSError, StopIteration):  # a child may be gone
            total += read_mb(f"/proc/{pid}/smaps_rollup", "Pss_Anon")
    return total


@contextlib.contextmanager
def watching():
    """Yield a list that fills with the MB held beyond what is held now, ten times a second."""
    held_since, done = [], threading.Event()

    def watch():
        with contextlib.suppress(OSError):  # no such files: not Linux
            before = held()
            while not done.wait(0.1):
                held_since.append(held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield held_since
    finally:
        done.set()
        watcher.join()


def encode_and_partition(text, times, tokenizer, max_lookback):
    """(tokens, seconds to encode, seconds to partition, the most MB that partitioning held)."""
    encoding = get_encoding(tokenizer)
    vocabulary = token_bytes(encoding)
    encode = lambda: encoding.encode_to_numpy(text, allowed_special="all").astype(np.uint16)
    start = time.perf_counter()
    tokens = np.concatenate([encode() for _ in range(times)])
    encoded = time.perf_counter() - start
    known = background(tokens[: len(tokens) // times], vocabulary)
    with tempfile.TemporaryDirectory() as folder, watching() as held_since:
        lookback = np.memmap(Path(folder) / "lookback.bin", np.uint16, "w+", shape=len(tokens))
        start = time.perf_counter()
        partition(tokens, vocabulary, "semantic", max_lookback, known, lookback)
        split = time.perf_counter() - start
        del lookback
    return len(tokens), encoded, split, max(held_since, default=None)


def bench_data(args):
    """To encode against to partition.

    Time should grow with the text, and memory should not. The ratio should be at most three.
    """
    try:
        text = Path(args.source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {args.source} as UTF-8 text: {e}") from e
    if len(text) < 1000:
        raise InputError(f"{args.source} is too short to time: {len(text)} characters")
    for times in (1, 4, 16):
        how = text, times, args.tokenizer, args.max_lookback
        # a new process, as prepare_data.py is one
        n, encoded, split, peak = in_new_process(encode_and_partition, *how)
        size = f"{times * len(text.encode()) / 1e6:,.1f} MB"
        base = row("data", f"encode, {size}", encoded, tokens=n)
        more = {"against": base, "tokens": n, "peak_mb": peak}
        row("data", f"partition, {size}", split, **more)


# --------------------------------------------------------------------------------------------------

SECTIONS = {
    "attention": bench_attention,
    "step": bench_step,
    "long": bench_long,
    "blend": bench_blend,
    "small": bench_small,
    "evaluate": bench_evaluate,
    "generate": bench_generate,
    "data": bench_data,
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=SECTIONS, help="one section (default: all)")
    add("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to compare with")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda ...")
    add("--rounds", type=int, default=7, metavar="N", help="turns of each contestant (default: 7)")
    add("--quick", action="store_true", help="small shapes, to see that it works, not how fast")
    add("--source", default="data/sample.txt", metavar="FILE", help="the text of `data`")
    add("--tokenizer", choices=["gpt2", "bytes"], default="gpt2", help="of `data` (default: gpt2)")
    add("--max-lookback", type=int, default=256, metavar="N", help="of `data` (default: 256)")
    add("--json", type=Path, metavar="FILE", help="write the rows here, the machine in each")
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds is at least 1, not {args.rounds}")
    if not 1 <= args.max_lookback <= 65535:
        raise InputError(f"--max-lookback is in 1 … 65535, not {args.max_lookback}")
    if args.json:
        check_writable(args.json)
    args.device = pick_device(args.device)
    begin(args.device, args.json)
    for name in [args.only] if args.only else SECTIONS:
        print(f"\n{name}")
        SECTIONS[name](args)
        free(args.device)


if __name__ == "__main__":
    run_script(main)
