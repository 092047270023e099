"""Measure the speed and memory of this project next to its alternatives.

    python -m experiments.bench [--only SECTION] [--nanogpt DIR] [--json FILE]
    python -m experiments.bench --only data --source BOOKS.txt

attention: one layer's attention, forward and backward: causal, with a dense mask, local
step:      a training step: nanoGPT's (--nanogpt names a checkout), that of `transformers` given the
           same mask, its matrix products, ours; also its memory, and loading batches
long:      a training step with one long context: distributed, localist
blend:     three ways to compute the blend of global and local attention, in blocks of random
           lengths (only on a GPU)
small:     a training step of a small model: AdamW, Muon
evaluate:  eval.py's evaluation: perplexity, all measures; also its memory
generate:  sampling: the whole context read for every token, the key-value cache
hub:       a GPT-2 of `transformers`, untouched and with the dial: reading a text, generating
data:      encoding a text with tiktoken, partitioning it into blocks; 1, 4 and 16 times the text

The contestants of a section take turns, round after round, so that other load on the machine slows
all of them equally. A time is the median over the rounds; the columns "/ 1", "/ 2" ... divide it by
that of row 1, row 2 ... Blocks are as long as max_lookback allows. On a CUDA device the shapes are
larger and the models are compiled. On a CPU, other software runs in processes of its own, without
the memory and thread settings of `support`, unless a row says so.

To make a CPU behave like an older one, put these variables in front of the command:
without AMX:    ONEDNN_MAX_CPU_ISA=AVX512_CORE
only AVX2:      ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

import contextlib
import gc
import importlib.util
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import support  # before torch: it sets what torch reads when it is loaded  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from eval import evaluate
from fast.attention import blended_attention, block_mask, local_attention, tiled_mask
from locality import Partitioner, count_background, partition_text, schedule
from model import GPT, GPTConfig, in_block
from report.tables import aligned, number
from sample import generate
from support import machine
from support.console import flops_per_token
from support.ddp import Process
from support.files import InputError, check_writable, run_script, write_json
from support.tokenizers import SAMPLE, get_encoding, token_bytes, vocabulary_size
from train import Config, build_optimizers, random_batch

W = 256  # max_lookback of everything that does not name another
GPU_TOKENS = 2**14  # tokens that keep a GPU busy
GPT2 = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
SMALL = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512}
CPU, SPAWN = torch.device("cpu"), multiprocessing.get_context("spawn")

# --------------------------------------------------------------------------------------------------
# measuring: a table, a race, peak memory


class Table:
    """The rows of a benchmark, which are printed and, if there is a path, written as JSON."""

    def __init__(self, device, path):
        if path:
            check_writable(path)
        self.path, self.rows, self.machine = path, {}, machine.provenance(device, seed=0)
        self.machine["instructions"] = torch.backends.cpu.get_cpu_capability()
        self.machine["threads"] = torch.get_num_threads()
        self.machine["bfloat16"] = machine.fast_bfloat16(device)
        self.machine["compiled"] = machine.compiles(device, "auto")
        print("\n".join(f"{key:12s} {value}" for key, value in self.machine.items()))
        if device.type == "cuda":  # many models share their code: none may silently run uncompiled
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True

    def add(self, section, rows):
        """Print and write rows, {name: {column: number or None}}, or other numbers of such rows.

        Rows with seconds or tokens_per_s get a `ratio` to each row before them, {name: ratio}.
        """
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        timed = next((key for key in ("seconds", "tokens_per_s") if key in columns), None)
        names, lines = list(rows) if timed else [], []
        for i, (name, row) in enumerate(rows.items()):
            ratio = {before: row[timed] / rows[before][timed] for before in names[:i]}
            cells = [*map(row.get, columns), *ratio.values(), *[None] * (len(names) - 1 - i)]
            lines.append([f"{i + 1}. {name}", *(number(x, ",.5g") for x in cells)])
            row = {"section": section, "name": name, **row, "ratio": ratio}
            self.rows[section, name] = row | {"machine": self.machine}
        print(aligned(["", *columns, *(f"/ {i}" for i in range(1, len(names)))], lines), flush=True)
        if self.path:
            write_json(self.path, list(self.rows.values()))


def race(contestants, device, rounds, tokens=None, warm_up=True):
    """{name: function} -> {name: {"seconds": median of a call}}. The contestants take turns.

    tokens: of a call; with it, the rows are {"tokens_per_s": ...}. warm_up: a first round does not
    count, and on a GPU a turn is as many calls as take 50 ms.
    """
    times, calls = {name: [] for name in contestants}, dict.fromkeys(contestants, 1)
    cuda = device.type == "cuda"
    for turn in range(-(1 + cuda) * warm_up, rounds):
        for name, function in contestants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            if cuda:
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - start) / calls[name]
            if turn >= 0:
                times[name].append(seconds)
            elif cuda:
                calls[name] = math.ceil(0.05 / seconds)
    key, value = ("tokens_per_s", lambda s: tokens / s) if tokens else ("seconds", float)
    return {name: {key: value(np.median(each))} for name, each in times.items()}


def peak_mb(make, device):
    """The most memory, in MB, that make() and calls of what it returns add; None if unknown."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        race({"": make()}, device, 1)  # at least two calls: an optimizer's moments come after one
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not multiprocessing.parent_process():  # nothing may have raised the peak before
        with ProcessPoolExecutor(1, SPAWN) as process:
            return process.submit(peak_mb, make, device).result()
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        before = read_mb("/proc/self/status", "VmRSS")
        race({"": make()}, device, 1)
        return read_mb("/proc/self/status", "VmHWM") - before


def read_mb(path, key):
    """The MB that Linux gives in the line `key` of a file in /proc."""
    lines = Path(path).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def free_memory():
    """Forget what was compiled, and give back the memory of models that are gone."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# attention, and three ways to compute the blend

LAMBDA = 0.5
BLENDS = "two kernels", "block and rest", "packed"


def before_and_inside(lookback):
    """FlexAttention's masks of everything before the block of each query, and of the block."""
    B, T = lookback.shape
    start = torch.arange(T, device=lookback.device) - lookback  # (B, T)
    is_before = lambda b, h, query, key: key < start[b, query]
    before = flex.create_block_mask(is_before, B, None, T, T, device=lookback.device)
    return before, tiled_mask(lookback)


def block_and_rest(q, k, v, masks):
    """The blend from everything before the block and the block, so that each key is read once.

    The two are joined by their log-sum-exps. q, k, v: (B, H, T, D). Returns (B, H, T, D).
    """
    attend = partial(flex.flex_attention, q, k, v, return_aux=flex.AuxRequest(lse=True))
    (y_out, m_out), (y_in, m_in) = (attend(block_mask=mask) for mask in masks)
    # the share of attention that stays in the block, (B, H, T)
    w = LAMBDA + (1 - LAMBDA) * torch.sigmoid(m_in.lse - m_out.lse)
    return torch.lerp(y_out, y_in, w[..., None].to(y_in.dtype))


def stretches(lookback):
    """The queries of a batch in stretches that share the start of their block, for varlen_attn.

    lookback: (B, T), clamped. A stretch of queries i ... j needs the keys start ... j, causal from
    the bottom right. Returns (keys, cu_seq_q, cu_seq_k, max_q, max_k): the keys of all
    stretches, (K,) int64 indices of tokens of the batch; where each stretch begins among queries
    and among keys, int32, padded with empty stretches to a multiple of 256, so that their shapes
    change little; the most queries and keys of a stretch.
    """
    (B, T), device = lookback.shape, lookback.device
    place = torch.arange(B * T, device=device)
    start = place - lookback.flatten()  # (B * T,)
    moves = F.pad(start[1:] != start[:-1], (1, 0), value=True)
    first = place[moves]  # the first query of each stretch, (n,)
    n_queries = torch.diff(first, append=torch.tensor([B * T], device=device))
    n_keys = first + n_queries - start[first]
    pad = 0, -(len(first) + 1) % 256
    cu_q, cu_k = (F.pad(F.pad(n, pad).cumsum(0), (1, 0)).int() for n in (n_queries, n_keys))
    offset = start[first] - cu_k[: len(first)]
    keys = torch.arange(n_keys.sum(), device=device) + offset.repeat_interleave(n_keys)
    return keys, cu_q, cu_k, int(n_queries.max()), int(n_keys.max())


def packed_blend(q, k, v, mask):
    """The blend with the block in one packed sequence, without a mask. q, k, v: (B, H, T, D); mask:
    what `stretches` returned. Returns (B, H, T, D)."""
    keys, *sizes = mask
    y = scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, D)
    y_local = varlen.varlen_attn(q, k[keys], v[keys], *sizes, window_size=(-1, 0))
    return torch.lerp(y, y_local.view(y.transpose(1, 2).shape).transpose(1, 2), LAMBDA)


def topics(B, T, cap):
    """The lookback of open blocks of random length: like the starts of semantic blocks, each start
    is recognized late, here after cap / 8 tokens. (B, T) int64, at most cap."""
    starts, lag = torch.zeros(B, T, dtype=torch.long), cap // 8
    for row in starts:
        lengths = torch.randint(cap // 4, cap - lag + 1, (4 * T // cap + 1,))
        begin = lengths.cumsum(0)
        begin = begin[begin + lag < T]
        row[begin + lag] = begin
    return torch.arange(T) - starts.cummax(1).values


def attention(way, cap, T, device):
    """Returns a function: one layer's attention over contexts of T tokens, forward and backward.

    12 heads of 64; bfloat16 on CUDA, where ours are compiled, otherwise float32. cap: max_lookback.
    The blend is computed in blocks of `topics`, all else in blocks as long as the cap allows.
    """
    cuda, attend = device.type == "cuda", scaled_dot_product_attention
    B, dtype = (max(1, GPU_TOKENS // T), torch.bfloat16) if cuda else (1, torch.float32)
    x = torch.randn(3, B, T, 12, 64, device=device, dtype=dtype).requires_grad_()
    q, k, v = x.transpose(2, 3)  # (B, 12, T, 64)
    lookback = torch.arange(T, device=device).clamp(max=cap).repeat(B, 1)
    if way in BLENDS:
        lookback = topics(B, T, cap).to(device)
    if way == "causal":
        more = {"is_causal": True}
    elif way == "dense mask":
        more = {"attn_mask": in_block(lookback)[:, None]}
    elif way == "local":
        attend, more = local_attention, {"mask": block_mask(lookback, cap, tiled=cuda)}
    elif way == "two kernels":
        more = {"mask": block_mask(lookback, cap, tiled=True), "locality": LAMBDA}
        attend = blended_attention
    elif way == "block and rest":
        attend, more = block_and_rest, {"masks": before_and_inside(lookback)}
    else:
        attend, more = packed_blend, {"mask": stretches(lookback)}
    if cuda and attend is not scaled_dot_product_attention:
        attend = torch.compile(attend, dynamic=False)

    def forward_and_backward():
        y = attend(q, k, v, **more)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return forward_and_backward


def bench_attention(args, table):
    cuda, device, measured = args.device.type == "cuda", args.device, []
    lengths = (1024, 8192, 32768) if cuda else (1024, 2048, 4096, 8192, 16384)
    lengths = (256, 512) if args.quick else lengths
    for T in lengths:
        # in longer contexts the others take too long, or too much memory
        ways = ["causal"] * (T <= 4096 or cuda) + ["dense mask"] * (T <= 4096) + ["local"]
        turns = {f"{way}, T = {T}": attention(way, W, T, device) for way in ways}
        for cap in (128, 512, 768) if T == lengths[0] else ():
            turns[f"local, {cap} back, T = {T}"] = attention("local", cap, T, device)
        rows = race(turns, device, args.rounds)
        row = rows[f"local, T = {T}"]
        row["peak_mb"] = peak_mb(partial(attention, "local", W, T, device), device)
        table.add("attention", rows)
        measured.append((row["seconds"], row["peak_mb"]))
    if not cuda and None not in measured[0]:  # on a GPU the batch changes with T
        slopes = np.polyfit(np.log(lengths), np.log(measured), 1)[0].tolist()
        row = {"exponent_of_seconds": slopes[0], "exponent_of_peak_mb": slopes[1]}
        table.add("attention", {f"local, T from {lengths[0]} to {lengths[-1]}": row})


def bench_blend(args, table):
    if args.device.type != "cuda":
        return print("(left out: the backward pass of FlexAttention exists only on GPUs)")
    for T in (256,) if args.quick else (1024, 8192):
        turns = {f"{way}, T = {T}": attention(way, W, T, args.device) for way in BLENDS}
        table.add("blend", race(turns, args.device, args.rounds))


# --------------------------------------------------------------------------------------------------
# a training step: the sections step, long and small

SCHEDULES = "distributed", "quintic", "localist"
OUR_SETTINGS, PRODUCTS = "nanoGPT, our settings", "matrix products only"
DEFAULTS = {"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "300000"}  # without `support`
STEP = []  # in a process that `apart` has started: the step that it takes


def new_model(shape, name, device):
    """A model of ours with the schedule `name`."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).to(device)
    model.set_locality(schedule(name, model.config.n_layer))
    return model


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


def make_step(name, shape, B, device, folder=None, optimizer="adamw"):
    """Returns a function: a training step of train.py, or of other software.

    name: a schedule; or it begins with nanoGPT (folder: its checkout) or transformers. These have
    our kind of AdamW. "nanoGPT, its defaults" has its own, no biases, and is compiled if possible.
    """
    torch.manual_seed(0)
    x, y = torch.randint(shape["vocab_size"], (2, B, shape["block_size"]), device=device)
    lookback = torch.arange(x.size(1), device=device).clamp(max=W).repeat(B, 1)
    compiled, optimizers = machine.compiles(device, "auto"), None
    if name.startswith("nanoGPT"):
        nanogpt, defaults = load_nanogpt(folder), name.endswith("defaults")
        padded = {**shape, "vocab_size": -(-shape["vocab_size"] // 64) * 64}
        model = nanogpt.GPT(nanogpt.GPTConfig(**padded, bias=not defaults)).to(device)
        loss_of = lambda: forward(x, y)[1]
        if defaults:
            compiled = not machine.missing_compiler(device)
            optimizers = [model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device.type)]
    elif name.startswith("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        keys = {key: value for key, value in shape.items() if key != "block_size"}
        config = transformers.GPT2Config(n_positions=shape["block_size"], use_cache=False, **keys)
        model = transformers.GPT2LMHeadModel(config).to(device).eval()  # no dropout
        zeros = torch.zeros(B, 1, x.size(1), x.size(1), device=device)
        mask = lambda: zeros.masked_fill(~in_block(lookback)[:, None], -math.inf)  # (B, 1, T, T)
        loss_of = lambda: forward(x, attention_mask=mask(), labels=x).loss
    else:
        model = new_model(shape, name, device)
        loss_of = lambda: forward(x, lookback, y)[1]
        optimizers = build_optimizers(model, Config(optimizer=optimizer))
    optimizers = optimizers or [torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)]
    # dynamic=False: otherwise the compiler would take lambda for a variable, because several models
    # share the code here; in a run there is one model, and its lambda is a constant
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with machine.precision(device, "auto"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)

    return step


def apart(make, environment):
    """Returns a function: what make() returns, called in a process with these variables."""
    process = ProcessPoolExecutor(1, SPAWN)
    with patch.dict(os.environ, environment):
        process.submit(int).result()  # starts it
    return lambda: process.submit(take_step, make).result()


def take_step(make):
    STEP or STEP.append(make())
    STEP[0]()


def head_products(n, V, C, device):
    """Returns a function: the three matrix products of the head in a step of n tokens."""
    dtype = torch.bfloat16 if machine.fast_bfloat16(device) else torch.float32
    x, w, dy = (torch.randn(*size, device=device, dtype=dtype) for size in ((n, C), (V, C), (n, V)))
    return lambda: (x @ w.T, dy @ w, dy.T @ x)


def loading(T, B):
    """Returns a function: read a batch at random places of 0.2 GB of tokens."""
    tokens, config, process = np.ones(10**8, np.uint16), Config(batch_size=B), Process(CPU, 0, 1)
    return lambda: random_batch((tokens, tokens), T, config, time.perf_counter_ns(), process)


def bench_step(args, table):
    device, cuda, peak = args.device, args.device.type == "cuda", machine.peak_flops(args.device)
    shape, B = (GPT2, GPU_TOKENS // 1024) if cuda else ({**GPT2, "n_layer": 4}, 1)
    shape, B = (SMALL, 1) if args.quick else (shape, B)
    print(f"{shape}, batch {B}, max_lookback {W}, AdamW")
    T, model = shape["block_size"], GPT(GPTConfig(**shape, max_lookback=W))
    make = partial(make_step, shape=shape, B=B, device=device, folder=args.nanogpt)
    names = ["nanoGPT", *[OUR_SETTINGS] * (not cuda), "nanoGPT, its defaults"] * bool(args.nanogpt)
    names += ["transformers, masked"] * bool(importlib.util.find_spec("transformers"))
    makers, turns = {name: partial(make, name) for name in names}, {}
    for name in names if not cuda else ():
        makers[name] = partial(apart, makers[name], DEFAULTS if name != OUR_SETTINGS else {})
    makers[PRODUCTS] = partial(head_products, B * T, *model.wte.weight.shape, device)
    makers |= {name: partial(make, name) for name in SCHEDULES}
    makers["loading batches"] = partial(loading, T, B)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.wpe.weight.numel()
    for name in makers:
        turns[name] = makers[name]()
        if not cuda and len(turns) < len(makers):
            continue  # on a GPU they race again as each of them joins, so that there are rows soon
        rows = race(turns, device, args.rounds, B * T)
        if PRODUCTS in rows:  # as if all products were as fast as those with the head
            rows[PRODUCTS]["tokens_per_s"] *= model.wte.weight.numel() / matrices
        for ours in rows.keys() & {*SCHEDULES} if peak else ():
            model.set_locality(schedule(ours, model.config.n_layer))
            rows[ours]["mfu"] = flops_per_token(model, T) * rows[ours]["tokens_per_s"] / peak
        table.add("step", rows)
    ours_and_nanogpt = ["distributed", *["nanoGPT"] * bool(args.nanogpt)]  # in our settings
    memory = {name: peak_mb(partial(make, name), device) for name in ours_and_nanogpt}
    table.add("step", {f"memory, {name}": {"peak_mb": peak} for name, peak in memory.items()})


def bench_long(args, table):
    cuda, shape = args.device.type == "cuda", SMALL if args.quick else GPT2
    for T in (512,) if args.quick else (8192, 32768) if cuda else (4096,):
        shape = {**shape, "block_size": T, "n_layer": 12 if cuda else 2}
        print(f"{shape}, batch 1, max_lookback {W}, AdamW")
        names = "distributed", "localist"
        turns = {f"{name}, T = {T}": make_step(name, shape, 1, args.device) for name in names}
        table.add("long", race(turns, args.device, args.rounds, T))


def bench_small(args, table):
    shape = {"block_size": 1024, "n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 2048}
    shape, B = (SMALL, 1) if args.quick else (shape, 4)
    print(f"{shape}, batch {B}")
    make = partial(make_step, "distributed", shape, B, args.device)
    turns = {name: make(optimizer=name) for name in ("adamw", "muon")}
    table.add("small", race(turns, args.device, args.rounds))


# --------------------------------------------------------------------------------------------------
# evaluation, generation, data


def evaluation(measure, shape, device):
    """Returns a function: `evaluate` on two contexts. measure: with all its measures."""
    T, V = shape["block_size"], shape["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, V, 2 * T + 1, np.uint16)
    lookback = np.arange(2 * T + 1).clip(max=W).astype(np.uint16)
    model = new_model(shape, "quintic", device)
    return partial(evaluate, model, tokens, lookback, [b"a"] * V, T, measure=measure)


def bench_evaluate(args, table):
    shape, lengths = (SMALL, (256,)) if args.quick else (GPT2, (1024, 8192))
    names = {f"perplexity, T = {lengths[0]}": False, f"all measures, T = {lengths[0]}": True}
    turns = {name: evaluation(measure, shape, args.device) for name, measure in names.items()}
    table.add("evaluate", race(turns, args.device, min(args.rounds, 3)))
    for T in lengths:
        shape = {
            **shape,
            "block_size": T,
            "n_layer": 2,
        }  # they are measured one by one: two suffice
        peak = peak_mb(partial(evaluation, True, shape, args.device), args.device)
        row = {"peak_mb": peak, "kb_per_token": peak and 1024 * peak / (2 * T)}
        table.add("evaluate", {f"memory, T = {T}": row})


def generate_anew(model, prompt, n):
    """The n likeliest tokens after a prompt, a list, with the context read again for each of them.

    It is what nanoGPT's sample.py does, on a GPU in bfloat16. model: nanoGPT's, or ours.
    """
    if isinstance(model, GPT):
        model.set_locality([0.0] * model.config.n_layer)
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt], device=device)  # (1, T)
    dtype = "auto" if device.type == "cuda" else "float32"
    with torch.no_grad(), machine.precision(device, dtype):
        for _ in range(n):
            logits = model(tokens)[0][:, -1]  # (1, V)
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens[0, len(prompt) :].tolist()


def generate_cached(model, name, copies, prompt, n):
    """The same with the key-value cache, in float32, with the schedule `name`, for many copies."""
    model.set_locality(schedule(name, model.config.n_layer))
    vocabulary = [b"a"] * model.config.vocab_size
    partitioners = [Partitioner(vocabulary, f"window:{W}", W) for _ in range(copies)]
    steps = generate(model, [prompt] * copies, n, partitioners, temperature=0)
    return [tokens[0] for tokens in steps]


def bench_generate(args, table):
    device, copies = args.device, 32 if args.device.type == "cuda" else 8
    shape, lengths, n = (SMALL, (16, 64), 32) if args.quick else (GPT2, (16, 512), 256)
    model = other = new_model(shape, "distributed", device).eval()
    if args.nanogpt:
        nanogpt = load_nanogpt(args.nanogpt)
        other = nanogpt.GPT(nanogpt.GPTConfig(**shape)).to(device).eval()
    weights = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    print(f"{len(weights) / 1e6:.0f} M random weights; {n} new tokens, greedy; ours in float32")
    anew = "nanoGPT, whole context" if args.nanogpt else "whole context"
    many = f"distributed, {copies} at once"
    for length in lengths:
        prompt = torch.randint(shape["vocab_size"], (length,)).tolist()
        turns = {  # a single text cannot grow faster than the weights can be read
            "reading the weights": lambda n: [weights.sum() for _ in range(n)],
            anew: partial(generate_anew, other, prompt),
            "distributed": partial(generate_cached, model, "distributed", 1, prompt),
            "localist": partial(generate_cached, model, "localist", 1, prompt),
            many: partial(generate_cached, model, "distributed", copies, prompt),
        }
        for turn in turns.values():
            turn(n=1)
        turns = {name: partial(turn, n=n) for name, turn in turns.items()}
        rows = race(turns, device, min(args.rounds, 2), n, warm_up=False)
        rows[many]["tokens_per_s"] *= copies
        table.add("generate", {f"{name}, after {length}": row for name, row in rows.items()})


def bench_hub(args, table):
    if not importlib.util.find_spec("transformers"):
        return print("transformers is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hub import localize

    T, n = (64, 8) if args.quick else (1024, 64)
    shape = {**(SMALL if args.quick else GPT2), "block_size": T + n}
    shape["vocab_size"] = vocabulary_size("sample")  # a tokenizer that needs no download
    ids = torch.tensor([get_encoding("sample").encode(SAMPLE.read_text("utf-8"))[:T]])
    ids = ids.to(args.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        new_model(shape, "distributed", CPU).save_pretrained(folder)
        untouched, model = (
            AutoModelForCausalLM.from_pretrained(folder).to(args.device) for _ in range(2)
        )
        localize(model, AutoTokenizer.from_pretrained(folder), max_lookback=min(W, T))
        print(f"{shape}, {T} tokens of the sample, semantic blocks")

        def read(model, name, n=None):
            if name:
                model.set_locality(schedule(name, shape["n_layer"]))
            options = {"min_new_tokens": n, "do_sample": False}
            return model.generate(ids, max_new_tokens=n, **options) if n else model(ids)

        turns = {"untouched": partial(read, untouched, None)}
        turns |= {
            name: partial(read, model, name) for name in ("distributed", "quintic", "localist")
        }
        rows = race(turns, args.device, args.rounds, T)
        table.add("hub", {f"reading {T} tokens, {name}": row for name, row in rows.items()})
        turns = {name: partial(turn, n=n) for name, turn in turns.items()}
        rows = race(turns, args.device, min(args.rounds, 3), n)
        table.add("hub", {f"{n} new tokens, {name}": row for name, row in rows.items()})


def watch(samples, done):
    """Append the MB that this process and its children hold, without files, until `done` is set."""
    with contextlib.suppress(OSError):  # not Linux
        while not samples or not done.wait(0.1):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            pids = "self", *children  # memory that they share counts once
            samples.append(sum(read_mb(f"/proc/{pid}/smaps_rollup", "Pss_Anon") for pid in pids))


def encode_and_partition(text, times, tokenizer):
    """{"encode": row, "partition": row} of a text that is repeated."""
    encoding, samples, done = get_encoding(tokenizer), [], threading.Event()
    encode = lambda: encoding.encode_to_numpy(text, allowed_special="all").astype(np.uint16)
    rows = race({"encode": lambda: [encode() for _ in range(times)]}, CPU, 1, warm_up=False)
    once, vocabulary = encode(), token_bytes(encoding)
    tokens, counts = np.tile(once, times), count_background(once, vocabulary)
    threading.Thread(target=watch, args=(samples, done), daemon=True).start()
    with tempfile.TemporaryFile() as file:
        lookback = np.memmap(file, np.uint16, "w+", shape=len(tokens))
        partition = partial(partition_text, tokens, vocabulary, "semantic", W, counts, lookback)
        rows |= race({"partition": partition}, CPU, 1, warm_up=False)
    done.set()
    rows["partition"]["peak_mb"] = max(samples) - samples[0] if samples else None
    return rows


def bench_data(args, table):
    text = Path(args.source).read_text("utf-8", "replace")
    if len(text) < 1000:
        raise InputError(f"{args.source} is too short to time: {len(text)} characters")
    for times in (1, 4, 16):
        tokenizer = "bytes" if args.quick else "gpt2"
        with ProcessPoolExecutor(1, SPAWN) as process:  # as prepare_data.py is one
            rows = process.submit(encode_and_partition, text, times, tokenizer).result()
        size = f"{times * len(text.encode()) / 1e6:,.1f} MB"
        table.add("data", {f"{name}, {size}": row for name, row in rows.items()})


SECTIONS = [bench_attention, bench_step, bench_long, bench_blend]
SECTIONS += [bench_small, bench_evaluate, bench_generate, bench_hub, bench_data]
SECTIONS = {section.__name__.removeprefix("bench_"): section for section in SECTIONS}


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
    if args.nanogpt:
        load_nanogpt(args.nanogpt)
    args.device = machine.pick_device(args.device)
    table = Table(args.device, args.json)
    for name in [args.only] if args.only else SECTIONS:
        print(f"\n{name}")
        SECTIONS[name](args, table)
        free_memory()


if __name__ == "__main__":
    run_script(main)
