"""Measure the speed and memory of this project next to its alternatives.

    python -m experiments.bench [--only SECTION] [--nanogpt DIR] [--json FILE]
    python -m experiments.bench --only data --source BOOKS.txt

attention: one layer's attention, forward and backward: causal, with a dense mask, local
step:      a training step: nanoGPT's (--nanogpt names a checkout), that of `transformers` given the
           same mask, its matrix products, ours; also its memory, and loading batches
long:      a training step with one long context: distributed, localist
blend:     two ways to compute the blend of global and local attention (only on a GPU)
small:     a training step of a small model: AdamW, Muon
evaluate:  eval.py's evaluation: perplexity, all measures; also its memory
generate:  sampling: the whole context read for every token, the key-value cache
data:      encoding a text with tiktoken, partitioning it into blocks; 1, 4 and 16 times the text

The contestants of a section take turns, round after round, so that other load on the machine slows
all of them equally. A time is the median over the rounds. Every block is as long as max_lookback
allows. On a CUDA device the shapes are larger and the models are compiled. On a CPU, other software
runs in processes of its own, without the memory and thread settings of `support`.

To make a CPU behave like an older one, put these variables in front of the command:
without AMX:    ONEDNN_MAX_CPU_ISA=AVX512_CORE
only AVX2:      ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

Each row has `seconds` or `tokens_per_s`. Its `ratio` divides that number by the same number of each
contestant before it: {name: ratio}.
"""

import argparse
import contextlib
import gc
import importlib.util
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
from fast.attention import block_mask, local_attention, tiled_mask
from locality import Partitioner, count_background, partition_text, schedule
from model import GPT, GPTConfig, clamp_lookback, in_block
from prepare_data import get_encoding, token_bytes
from sample import generate
from support.console import flops_per_token
from support.ddp import Process
from support.files import InputError, check_writable, run_script, write_json
from support.machine import compiles, missing_compiler, peak_flops, pick_device, precision
from train import Config, build_optimizers, random_batch

W = 256  # max_lookback of everything that does not name another
GPU_TOKENS = 2**14  # tokens that keep a GPU busy
SMALL = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512}
SPAWN = multiprocessing.get_context("spawn")

# --------------------------------------------------------------------------------------------------
# measuring: a race, its table, peak memory


def describe_machine(device):
    """Everything that a time depends on, a dict of strings, numbers and booleans."""
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
        "system": platform.platform(),
    }


def auto_dtype(device):
    """The dtype that `dtype = "auto"` chooses on this device."""
    with precision(device, "auto"):
        lower = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if lower else torch.float32


class Table:
    """The rows of a benchmark. Each is printed, and written to a JSON file, as soon as it is known.

    device: a torch.device, described in every row of the file. path: the JSON file, or None.
    """

    def __init__(self, device, path=None):
        self.path, self.rows, self.machine = path, [], describe_machine(device)
        print("\n".join(f"{key:12s} {value}" for key, value in self.machine.items()))
        if device.type == "cuda":  # many models share their code: none may silently run uncompiled
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True

    def row(self, section, name, seconds=None, tokens_per_s=None, against=(), **columns):
        """Add a row and return it, a dict. against: the rows that it is compared with.

        columns: further values, left out if None. Raises InputError if the file cannot be written.
        """
        key, value = ("seconds", seconds) if seconds else ("tokens_per_s", tokens_per_s)
        row = {"section": section, "name": name, key: value, **columns}
        if against:
            row["ratio"] = {other["name"]: value / other[key] for other in against}
        row = {key: value for key, value in row.items() if value is not None}
        self.rows.append(row)
        shown = f"{1e3 * seconds:12,.2f} ms" if seconds else ""
        shown = f"{tokens_per_s:12,.1f} tok/s" if tokens_per_s else shown
        notes = [f"{k} {row[k]:.4g}" for k in columns if k in row]
        print(f"{name:46s} {shown:20s} {', '.join(notes)}".rstrip())
        for other, ratio in row.get("ratio", {}).items():
            print(f"{'':46s} {ratio:12,.3f} x {other}")
        sys.stdout.flush()
        if self.path:
            write_json(self.path, [{**each, "machine": self.machine} for each in self.rows])
        return row

    def compare(self, section, times, tokens=None, **columns):
        """Add a row for every contestant of a race that has none yet, compared with all before it.

        times: {name: seconds}. tokens: how many tokens those seconds are for; if given, the rows
        are speeds. columns: {name: value} for each further column.
        """
        before, known = [], {(row["section"], row["name"]) for row in self.rows}
        for name, seconds in times.items():
            value = {"tokens_per_s": tokens / seconds} if tokens else {"seconds": seconds}
            if (section, name) not in known:
                more = {key: values.get(name) for key, values in columns.items()}
                self.row(section, name, **value, against=before, **more)
            before.append({"name": name, **value})


def clock(function, device, n=1):
    """The seconds that one call of function() takes, a mean over n calls."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    for _ in range(n):
        function()
    wait()
    return (time.perf_counter() - start) / n


def race(contestants, device, rounds, warm_up=True):
    """{name: function} -> {name: median seconds of a call}. The contestants take turns.

    warm_up: a first round does not count, and on a GPU a turn is as many calls as take 50 ms.
    """
    times, calls = {name: [] for name in contestants}, dict.fromkeys(contestants, 1)
    for name, function in contestants.items() if warm_up else ():
        clock(function, device)
        if device.type == "cuda":
            calls[name] = math.ceil(0.05 / clock(function, device))
    for _ in range(rounds):
        for name, function in contestants.items():
            times[name].append(clock(function, device, calls[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def peak_mb(make, *args):
    """The most memory, in MB, that make(*args) and two calls of what it returns add to a process.

    Two, because an optimizer has its moments only after the first. The last of args is the device.
    On a CPU it is a new process, because nothing may have raised its peak before. Returns None
    where the system does not tell (only Linux does).
    """
    device = args[-1]
    if device.type != "cuda":
        return in_new_process(peak_mb_of_this_process, make, args)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call_twice(make(*args))
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_mb_of_this_process(make, args):
    with contextlib.suppress(OSError, StopIteration):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        before = read_mb("/proc/self/status", "VmRSS")
        call_twice(make(*args))
        return read_mb("/proc/self/status", "VmHWM") - before


def call_twice(function):
    function()
    function()


def in_new_process(function, *args):
    with ProcessPoolExecutor(1, SPAWN) as process:
        return process.submit(function, *args).result()


def read_field(path, key):
    """The value of `key` in a file with lines "key: value". Raises OSError, StopIteration."""
    lines = Path(path).read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key))


def read_mb(path, key):
    return int(read_field(path, key).split()[0]) / 1024


def free_memory(device):
    """Forget what was compiled, and give back the memory of models that are gone."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# attention


def full_lookback(B, T, max_lookback=W):
    """The lookback of blocks as long as max_lookback allows, (B, T) int64."""
    return clamp_lookback(torch.full((B, T), max_lookback), max_lookback)


def attention(kind, T, device, max_lookback=W):
    """Returns a function: one layer's attention over contexts of T tokens, forward and backward.

    kind: "causal", "dense mask" or "local". 12 heads of 64; bfloat16 on CUDA, otherwise float32.
    """
    cuda = device.type == "cuda"
    B, dtype = (max(1, GPU_TOKENS // T), torch.bfloat16) if cuda else (1, torch.float32)
    x = (torch.randn(B, T, 12, 64, device=device, dtype=dtype) for _ in range(3))
    q, k, v = (each.transpose(1, 2).requires_grad_() for each in x)  # (B, 12, T, 64)
    lookback = full_lookback(B, T, max_lookback).to(device)
    if kind == "local":
        mask = block_mask(lookback, max_lookback, tiled=cuda)
        attend = torch.compile(local_attention, dynamic=False) if cuda else local_attention
        attend = partial(attend, mask=mask)
    elif kind == "dense mask":
        attend = partial(F.scaled_dot_product_attention, attn_mask=in_block(lookback)[:, None])
    else:
        attend = partial(F.scaled_dot_product_attention, is_causal=True)
    return lambda: backward(attend(q, k, v), (q, k, v))


def backward(y, inputs):
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def bench_attention(args, table):
    cuda, local = args.device.type == "cuda", []
    lengths = (1024, 8192, 32768) if cuda else (1024, 2048, 4096, 8192, 16384)
    lengths = (256, 512) if args.quick else lengths
    for T in lengths:
        # in longer contexts the others take too long, or too much memory
        kinds = ["causal"] * (T <= 4096 or cuda) + ["dense mask"] * (T <= 4096) + ["local"]
        turns = {f"{kind}, T = {T}": attention(kind, T, args.device) for kind in kinds}
        name = f"local, T = {T}"
        for cap in (128, 512, 768) if T == lengths[0] else ():
            turns[f"local, {cap} back, T = {T}"] = attention("local", T, args.device, cap)
        times = race(turns, args.device, args.rounds)
        peak = peak_mb(attention, "local", T, args.device)
        table.compare("attention", times, peak_mb={name: peak})
        local.append((times[name], peak))
        free_memory(args.device)
    if not cuda and None not in local[0]:  # on a GPU the batch changes with T
        slopes = np.polyfit(np.log(lengths), np.log(local), 1)[0].tolist()
        name = f"local, exponent of T from {lengths[0]} to {lengths[-1]}"
        table.row("attention", name, exponent_of_seconds=slopes[0], exponent_of_peak_mb=slopes[1])


# --------------------------------------------------------------------------------------------------
# a training step: ours


def training_step(model, optimizers, loss_of, device):
    """Returns a function: a training step. loss_of: a function, the forward pass."""

    def step():
        with precision(device, "auto"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def random_tokens(shape, B, device):
    """A batch like `random_batch`'s: ids, lookbacks and targets, (B, T) int64 each."""
    T, V = shape["block_size"], shape.get("vocab_size", 50257)
    x, lookback = torch.randint(V, (B, T), device=device), full_lookback(B, T).to(device)
    return x, lookback, torch.randint(V, (B, T), device=device)


def our_step(name, shape, B, device, optimizer="adamw"):
    """Returns a function: a step of train.py with the schedule `name`."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).to(device)
    model.set_locality(schedule(name, model.config.n_layer))
    # dynamic=False: otherwise the compiler would take lambda for a variable, because several models
    # share the code here; in a run there is one model, and its lambda is a constant
    fast_model = torch.compile(model, dynamic=False) if compiles(device, "auto") else model
    optimizers = build_optimizers(model, Config(optimizer=optimizer))
    x, lookback, y = random_tokens(shape, B, device)
    return training_step(model, optimizers, lambda: fast_model(x, lookback, y)[1], device)


def head_products(shape, B, device):
    """Returns a function: the three matrix products of a step with its largest matrix, the head."""
    n, V, C = B * shape["block_size"], shape.get("vocab_size", 50304), shape["n_embd"]
    sizes, dtype = ((n, C), (V, C), (n, V)), auto_dtype(device)
    x, w, dy = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    return lambda: (x @ w.T, dy @ w, dy.T @ x)


# --------------------------------------------------------------------------------------------------
# a training step: other software's

OUR_SETTINGS, PRODUCTS = "nanoGPT, our settings", "matrix products only"
DEFAULTS = {"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "300000"}  # without `support`
STEP = []  # in a process that `apart` has started: the step that it takes


def apart(make, environment):
    """Returns a function: what make() returns, called in a process with these variables."""
    before = {name: os.environ[name] for name in environment}
    os.environ.update(environment)
    process = ProcessPoolExecutor(1, SPAWN)
    process.submit(make_step, make).result()
    os.environ.update(before)
    return lambda: process.submit(take_step).result()


def make_step(make):
    STEP.append(make())


def take_step():
    STEP[0]()


def adamw(model):
    """The AdamW of our steps, for a model of other software."""
    large = [p for p in model.parameters() if p.dim() >= 2]
    small = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)


@cache  # its code is compiled once, and not for each contestant
def load_nanogpt(folder):
    """The module model.py of a checkout of nanoGPT. Raises InputError."""
    try:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _ = module.GPT, module.GPTConfig(**SMALL, bias=False)
        return module
    except Exception as e:  # the file may hold any code
        raise InputError(
            f"--nanogpt {folder}: its model.py is not nanoGPT's ({type(e).__name__}: {e})"
        ) from None


def nanogpt_step(folder, shape, B, device, defaults=False, compiled=False):
    """Returns a function: a step of nanoGPT's train.py.

    It has the biases and the AdamW of our steps, or with `defaults` its own. It is compiled if ours
    is, or if `compiled`.
    """
    torch.manual_seed(0)
    nanogpt = load_nanogpt(folder)
    config = nanogpt.GPTConfig(**{"vocab_size": 50304, **shape}, bias=not defaults)
    model, adam = nanogpt.GPT(config).to(device), (0.1, 3e-4, (0.9, 0.95), device.type)
    optimizer = model.configure_optimizers(*adam) if defaults else adamw(model)
    fast_model = torch.compile(model) if compiled or compiles(device, "auto") else model
    x, _, y = random_tokens(shape, B, device)
    return training_step(model, [optimizer], lambda: fast_model(x, y)[1], device)


def transformers_step(shape, B, device):
    """Returns a function: the same for GPT-2 of `transformers`, with the blocks as a 4-D mask."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    keys = {key: value for key, value in shape.items() if key != "block_size"}
    config = transformers.GPT2Config(n_positions=shape["block_size"], use_cache=False, **keys)
    model = transformers.GPT2LMHeadModel(config).to(device).eval()  # no dropout
    fast_model = torch.compile(model) if compiles(device, "auto") else model
    x, lookback, _ = random_tokens(shape, B, device)

    def loss_of():
        mask = torch.zeros(B, 1, x.size(1), x.size(1), device=device)
        mask = mask.masked_fill(~in_block(lookback)[:, None], -math.inf)  # (B, 1, T, T)
        return fast_model(x, attention_mask=mask, labels=x).loss

    return training_step(model, [adamw(model)], loss_of, device)


def other_steps(args, shape, B):
    """{name: function that makes a step}, as far as the other software is there."""
    cuda, makers = args.device.type == "cuda", {}
    if args.nanogpt:
        nanogpt = partial(nanogpt_step, args.nanogpt, shape, B, args.device)
        makers["nanoGPT"] = nanogpt
        if not cuda:
            makers[OUR_SETTINGS] = nanogpt
        compiled = not args.quick and not missing_compiler(args.device)
        makers["nanoGPT, its defaults"] = partial(nanogpt, defaults=True, compiled=compiled)
    if importlib.util.find_spec("transformers"):
        makers["transformers, masked"] = partial(transformers_step, shape, B, args.device)
    else:
        print("(transformers is left out: it is not installed)")
    if cuda:
        return makers
    variables = {name: {} if name == OUR_SETTINGS else DEFAULTS for name in makers}
    return {name: partial(apart, make, variables[name]) for name, make in makers.items()}


# --------------------------------------------------------------------------------------------------
# a training step: the sections step, long and small


def bench_step(args, table):
    device, cuda = args.device, args.device.type == "cuda"
    shape = {"block_size": 1024, "n_layer": 12 if cuda else 4, "n_head": 12, "n_embd": 768}
    shape, B = (SMALL, 1) if args.quick else (shape, GPU_TOKENS // 1024 if cuda else 1)
    print(f"{shape}, batch {B}, max_lookback {W}, AdamW")
    makers = other_steps(args, shape, B) | {PRODUCTS: partial(head_products, shape, B, device)}
    for name in ("distributed", "quintic", "localist"):
        makers[name] = partial(our_step, name, shape, B, device)
    model = GPT(GPTConfig(**shape, max_lookback=W))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.wpe.weight.numel()
    turns, T = {}, shape["block_size"]
    # on a GPU they race again as each of them joins, so that there are rows soon
    for joining in [[name] for name in makers] if cuda else [[*makers]]:
        turns |= {name: makers[name]() for name in joining}
        times = race(turns, device, args.rounds)
        if PRODUCTS in times:  # as if all products were as fast as those with the head
            times[PRODUCTS] *= matrices / model.wte.weight.numel()
        peak, mfu = peak_flops(device), {}
        for name in {*times} & {"distributed", "quintic", "localist"} if peak else ():
            model.set_locality(schedule(name, model.config.n_layer))
            mfu[name] = flops_per_token(model, T) * B * T / times[name] / peak
        table.compare("step", times, tokens=B * T, mfu=mfu)
    times = {"distributed": times["distributed"], "loading batches": load_seconds(T, B)}
    table.compare("step", times, tokens=B * T)
    memory = {"distributed": (our_step, "distributed")}
    if args.nanogpt:
        memory = {"nanoGPT" if cuda else OUR_SETTINGS: (nanogpt_step, args.nanogpt), **memory}
    for name, make in memory.items():
        table.row("step", f"memory, {name}", peak_mb=peak_mb(*make, shape, B, device))


def load_seconds(T, B):
    """The seconds to read one batch from a file of 0.2 GB that the system has in its cache."""
    config, number = Config(batch_size=B), itertools.count()
    process = Process(torch.device("cpu"), rank=0, world_size=1)
    with tempfile.NamedTemporaryFile() as file:
        np.random.default_rng(0).integers(0, 50257, 10**8, np.uint16).tofile(file)
        tokens = np.memmap(file.name, np.uint16, "r")
        read = lambda: random_batch((tokens, tokens), T, config, next(number), process)
        return race({"read": lambda: [read() for _ in range(100)]}, process.device, 5)["read"] / 100


def bench_long(args, table):
    cuda = args.device.type == "cuda"
    shape = {"n_layer": 12 if cuda else 2, "n_head": 12, "n_embd": 768}
    lengths = (8192, 32768) if cuda else (4096,)
    shape, lengths = (SMALL, (512,)) if args.quick else (shape, lengths)
    print(f"{shape}, batch 1, max_lookback {W}, AdamW")
    for T in lengths:
        make = partial(our_step, shape={**shape, "block_size": T}, B=1, device=args.device)
        turns = {f"{name}, T = {T}": make(name) for name in ("distributed", "localist")}
        table.compare("long", race(turns, args.device, args.rounds), tokens=T)
        turns.clear()
        free_memory(args.device)


def bench_small(args, table):
    shape = {"vocab_size": 2048, "block_size": 1024, "n_layer": 4, "n_head": 4, "n_embd": 256}
    shape, B = (SMALL, 1) if args.quick else (shape, 4)
    print(f"{shape}, batch {B}")
    make = partial(our_step, "distributed", shape, B, args.device)
    turns = {name: make(optimizer=name) for name in ("adamw", "muon")}
    table.compare("small", race(turns, args.device, args.rounds))


# --------------------------------------------------------------------------------------------------
# two ways to compute the blend

LAMBDA = 0.5


def two_kernels(q, k, v, inside, before):
    """The blend as the model computes it: global attention, local attention, and a lerp.

    q, k, v: (B, H, T, D). inside, before: the masks of `blend_masks`. Returns (B, H, T, D).
    """
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.lerp(y, flex.flex_attention(q, k, v, block_mask=inside), LAMBDA)


def block_and_rest(q, k, v, inside, before):
    """The same from the block and from everything before it, so that each key is read once.

    The two are joined by their log-sum-exps. w is the share of attention that stays in the block.
    """
    lse = flex.AuxRequest(lse=True)
    y_in, m_in = flex.flex_attention(q, k, v, block_mask=inside, return_aux=lse)
    y_out, m_out = flex.flex_attention(q, k, v, block_mask=before, return_aux=lse)
    w = LAMBDA + (1 - LAMBDA) * torch.sigmoid(m_in.lse - m_out.lse)  # (B, H, T)
    return torch.lerp(y_out, y_in, w[..., None].to(y_in.dtype))


def blend_masks(lookback):
    """FlexAttention's masks of the block of each query, and of everything before the block.

    lookback: (B, T), clamped.
    """
    B, T = lookback.shape
    start = torch.arange(T, device=lookback.device) - lookback  # (B, T)
    is_before = lambda b, h, query, key: key < start[b, query]
    before = flex.create_block_mask(is_before, B, None, T, T, device=lookback.device)
    return tiled_mask(lookback), before


def bench_blend(args, table):
    if args.device.type != "cuda":
        print("(left out: the backward pass of FlexAttention exists only on GPUs)")
        return
    for T in (256,) if args.quick else (1024, 8192):
        B = max(1, GPU_TOKENS // T)
        qkv = torch.randn(3, B, 12, T, 64, device=args.device, dtype=torch.bfloat16)
        qkv = [x.requires_grad_() for x in qkv]
        masks = blend_masks(full_lookback(B, T).to(args.device))
        ways = {"two kernels": two_kernels, "block and rest": block_and_rest}
        turns = {f"{name}, T = {T}": blend(way, qkv, masks) for name, way in ways.items()}
        table.compare("blend", race(turns, args.device, args.rounds))
        free_memory(args.device)


def blend(way, qkv, masks):
    """Returns a function: one of these ways, compiled, forward and backward."""
    compiled = torch.compile(way, dynamic=False)
    return lambda: backward(compiled(*qkv, *masks), qkv)


# --------------------------------------------------------------------------------------------------
# evaluation and generation


def evaluation(shape, measure, device):
    """Returns a function: `evaluate` on two contexts. measure: with all its measures."""
    torch.manual_seed(0)
    model, T = GPT(GPTConfig(**shape, max_lookback=W)).to(device), shape["block_size"]
    model.set_locality(schedule("quintic", model.config.n_layer))
    n = 2 * T + 1
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, n, np.uint16)
    lookback = full_lookback(1, n)[0].numpy().astype(np.uint16)
    return partial(
        evaluate, model, tokens, lookback, [b"a"] * model.config.vocab_size, T, measure=measure
    )


def bench_evaluate(args, table):
    shape = {**SMALL, "block_size": 128} if args.quick else {"block_size": 1024}
    names = (f"{what}, T = {shape['block_size']}" for what in ("perplexity", "all measures"))
    turns = {name: evaluation(shape, i == 1, args.device) for i, name in enumerate(names)}
    table.compare("evaluate", race(turns, args.device, min(args.rounds, 3)))
    for T in (1024, 8192) if not args.quick else (128,):
        shape |= {"block_size": T, "n_layer": 2}  # layers are measured one by one: two are enough
        peak = peak_mb(evaluation, shape, True, args.device)
        per_token = peak and 1024 * peak / (2 * T)
        table.row("evaluate", f"memory, T = {T}", peak_mb=peak, kb_per_token=per_token)


def generate_anew(model, prompt, n):
    """The n likeliest tokens after a prompt, a list, with the context read again for each of them.

    It is what nanoGPT's sample.py does, on a GPU in bfloat16. model: nanoGPT's, or ours.
    """
    if isinstance(model, GPT):
        model.set_locality([0.0] * model.config.n_layer)
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt], device=device)  # (1, T)
    with torch.no_grad(), precision(device, "auto" if device.type == "cuda" else "float32"):
        for _ in range(n):
            logits = model(tokens)[0][:, -1]  # (1, V)
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens[0, len(prompt) :].tolist()


def generate_cached(model, name, prompt, n, copies=1):
    """The same with the key-value cache, in float32, and the schedule `name`.

    copies: of the prompt, side by side.
    """
    model.set_locality(schedule(name, model.config.n_layer))
    partitioners = [
        Partitioner([b"a"] * model.config.vocab_size, f"window:{W}", W) for _ in range(copies)
    ]
    steps = generate(model, [prompt] * copies, n, partitioners, temperature=0)
    return [tokens[0] for tokens in steps]


def bench_generate(args, table):
    device, shape, lengths, n = args.device, {}, (16, 512), 256
    if args.quick:
        shape, lengths, n = {**SMALL, "block_size": 128}, (16, 32), 32
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).to(device).eval()
    weights = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    print(f"{len(weights) / 1e6:.0f} M random weights; {n} new tokens, greedy; ours in float32")
    # a single text cannot grow faster than the weights can be read
    times = race({"reading the weights": weights.sum}, device, args.rounds)
    table.compare("generate", times, tokens=1)
    other, name, copies = model, "whole context", 32 if device.type == "cuda" else 8
    if args.nanogpt:
        c, nanogpt = model.config, load_nanogpt(args.nanogpt)
        c = nanogpt.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
        other, name = nanogpt.GPT(c).to(device).eval(), "nanoGPT, whole context"
    for length in lengths:
        prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
        after, many = f"after {length}", f"cached, distributed, {copies} at once, after {length}"
        turns = {
            f"{name}, {after}": partial(generate_anew, other, prompt),
            f"cached, distributed, {after}": partial(generate_cached, model, "distributed", prompt),
            f"cached, localist, {after}": partial(generate_cached, model, "localist", prompt),
            many: partial(generate_cached, model, "distributed", prompt, copies=copies),
        }
        for turn in turns.values():
            turn(n=1)
        turns = {name: partial(turn, n=n) for name, turn in turns.items()}
        times = race(turns, device, min(args.rounds, 2), warm_up=False)
        times[many] /= copies
        table.compare("generate", times, tokens=n)


# --------------------------------------------------------------------------------------------------
# data


def held_mb():
    """The memory, in MB, that this process and its children hold now. Only Linux tells it.

    Files do not count, and memory that processes share counts once. Raises OSError elsewhere.
    """
    children, total = f"/proc/self/task/{os.getpid()}/children", 0
    for pid in [os.getpid(), *Path(children).read_text().split()]:
        with contextlib.suppress(OSError, StopIteration):  # a child may be gone
            total += read_mb(f"/proc/{pid}/smaps_rollup", "Pss_Anon")
    return total


def watch(samples, done):
    """Append the MB held beyond those at the start, ten times per second, until `done` is set."""
    with contextlib.suppress(OSError):  # not Linux
        before = held_mb()
        while not done.wait(0.1):
            samples.append(held_mb() - before)


def encode_and_partition(text, times, tokenizer):
    """(tokens, seconds to encode, seconds to partition, peak MB of partitioning or None)."""
    encoding = get_encoding(tokenizer)
    vocabulary, samples, done = token_bytes(encoding), [], threading.Event()
    encode = lambda: encoding.encode_to_numpy(text, allowed_special="all").astype(np.uint16)
    start = time.perf_counter()
    tokens = np.concatenate([encode() for _ in range(times)])
    encoded = time.perf_counter()
    counts = count_background(tokens[: len(tokens) // times], vocabulary)
    threading.Thread(target=watch, args=(samples, done), daemon=True).start()
    with tempfile.NamedTemporaryFile() as file:
        lookback = np.memmap(file.name, np.uint16, "w+", shape=len(tokens))
        begun = time.perf_counter()
        partition_text(tokens, vocabulary, "semantic", W, counts, lookback)
        partitioned = time.perf_counter()
    done.set()
    return len(tokens), encoded - start, partitioned - begun, max(samples, default=None)


def bench_data(args, table):
    text = Path(args.source).read_text("utf-8", "replace")
    if len(text) < 1000:
        raise InputError(f"{args.source} is too short to time: {len(text)} characters")
    for times in (1, 4, 16):
        n, encoding, partitioning, peak = in_new_process(  # as prepare_data.py is one
            encode_and_partition, text, times, "bytes" if args.quick else "gpt2"
        )
        size = f"{times * len(text.encode()) / 1e6:,.1f} MB"
        seconds = {f"encode, {size}": encoding, f"partition, {size}": partitioning}
        peaks, sizes = {f"partition, {size}": peak}, dict.fromkeys(seconds, n)
        table.compare("data", seconds, text_tokens=sizes, peak_mb=peaks)


SECTIONS = {
    section.__name__.removeprefix("bench_"): section
    for section in (bench_attention, bench_step, bench_long, bench_blend)
    + (bench_small, bench_evaluate, bench_generate, bench_data)
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=SECTIONS, help="run one section (default: all)")
    add("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to compare with")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda ...")
    add("--rounds", type=int, default=7, metavar="N", help="turns per contestant (default: 7)")
    add("--quick", action="store_true", help="small shapes, to see that it works, not how fast")
    add("--source", default="data/sample.txt", metavar="FILE", help="the text of section `data`")
    add("--json", type=Path, metavar="FILE", help="write the rows here, with the machine in each")
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {args.rounds}")
    if args.json:
        check_writable(args.json)
    if args.nanogpt:
        load_nanogpt(args.nanogpt)
    args.device = pick_device(args.device)
    table = Table(args.device, args.json)
    for name in [args.only] if args.only else SECTIONS:
        print(f"\n{name}")
        SECTIONS[name](args, table)
        free_memory(args.device)


if __name__ == "__main__":
    run_script(main)
