"""
Times, side by side and with their log.

    python bench.py [--only attention|step|generate|data] [--nanogpt DIR] [--json FILE]
    python bench.py --only data --source BOOKS.txt

attention: a layer's attention, forward and backward, against what PyTorch has for the whole context or for any mask
step:      a training step, against nanoGPT's (--nanogpt: a checkout) and `transformers` given the same mask; the loader
generate:  tokens a second with the cache, against reading the context anew for every token
data:      encoding a text (tiktoken) and partitioning it (semantic blocks), at 1, 4 and 16 times the text

Contestants take turns, round after round, so that other work on the machine slows all of them alike; a time is the
median of its rounds. On a CPU the steps of other software run in processes of their own, where memory is handled as they
leave it. A row's `ratio` is to its `baseline`: of seconds where it has `seconds`, of tokens a second where it has
`tokens_per_s`. What is not installed here is left out, and said. On a CUDA device the shapes are larger, and the model is
compiled.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch is loaded: see train.py

import numpy as np
import torch
import torch.nn.functional as F

from eval import pick_device
from locality import InputError, Partitioner, background, partition, schedule
from model import GPT, GPTConfig, block_mask, clamp_lookback, in_block, local_attention
from prepare_data import get_encoding, token_bytes, write_text
from train import (
    Config,
    build_optimizers,
    compiles,
    keep_memory,
    precision,
    random_batch,
    utilisation,
)

W = 128  # max_lookback of all but `data`


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def machine(device):
    """What the times depend on, a dict."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(
            line.split(":", 1)[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": load,
        "dtype": str(auto_dtype(device)).removeprefix("torch."),
        "compiled": compiles(device, "auto"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def auto_dtype(device):
    """What `dtype = "auto"` means on this device."""
    with precision(device, "auto"):
        return (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else torch.float32
        )


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(contestants, device, rounds):
    """{name: function} -> {name: median seconds of a call}. They take turns; the first round warms up and does not count."""
    times = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, turn in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            turn()
            synchronize(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def apart(make, *args):
    """make(*args), which returns a turn, done in a new process: a function to call; None where make returns None."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    if process.submit(take_turn, make, args).result():
        return lambda: process.submit(take_turn).result()


def take_turn(make=None, args=()):
    """In that process: make the turn, and say whether there is one; or, without arguments, take it."""
    global TURN
    if make:
        TURN = make(*args)
        return TURN is not None
    TURN()


def row(section, name, seconds=None, tokens_per_s=None, against=None, **more):
    """One line of the table, printed. against: the row of the baseline."""
    found = {
        "section": section,
        "name": name,
        "seconds": seconds,
        "tokens_per_s": tokens_per_s,
        **more,
    }
    if against:
        key = "seconds" if seconds else "tokens_per_s"
        found.update(baseline=against["name"], ratio=found[key] / against[key])
    found = {key: value for key, value in found.items() if value is not None}
    value = (
        f"{1e3 * seconds:12,.1f} ms   "
        if seconds
        else f"{tokens_per_s:12,.1f} tok/s"
        if tokens_per_s
        else " " * 18
    )
    ratio = f"{found['ratio']:7.3f} x {found['baseline']}" if against else ""
    print(
        f"{name:44s} {value} {ratio:56s} "
        + ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in more.items()
            if v is not None
        ),
        flush=True,
    )
    return found


def peak_of(function, *args, device):
    """MB that function(*args), which returns a turn, and one turn hold at most, beyond what was there before.

    On a CPU in a fresh process, whose peak nothing else has raised; None where the system does not say.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function(*args)()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_here, (function, args))


def peak_here(function, args):
    """The same of this process, from Linux's record of its largest size, which is set back first."""

    def size(key):
        return (
            next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
            / 1024
        )

    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = size("VmRSS")
        function(*args)()
        return size("VmHWM") - before
    except (OSError, StopIteration):
        return None


def random_lookback(B, T, seed=0):
    """Lookbacks of random blocks of 60 tokens on average, (B, T) int64."""
    new = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / 60
    return clamp_lookback(
        torch.arange(T) - torch.where(new, torch.arange(T), 0).cummax(1).values, W
    )


# ---------------------------------------------------------------------------------------------------------------------
# attention


def attention_turn(name, T, device, heads=12, dtype=torch.float32):
    """One layer's attention over T tokens, forward and backward: a function to call."""
    q, k, v = (
        torch.randn(1, T, heads, 64, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    lookback = random_lookback(1, T).to(device)
    if name == "local":
        mask = block_mask(lookback, W)
    elif name == "dense mask":
        mask = in_block(lookback)[:, None]

    def turn():
        if name == "local":
            y = local_attention(q, k, v, mask, W)
        elif name == "dense mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return turn


def bench_attention(args):
    cuda = args.device.type == "cuda"
    lengths = (
        (256, 512) if args.quick else (1024, 2048, 4096, 8192, 16384) + ((32768,) if cuda else ())
    )
    settings = (args.device, 12, torch.bfloat16 if cuda else torch.float32)
    rows, local = [], {}
    print(
        f"12 heads x 64, blocks of at most {W} tokens back, batch 1, {str(settings[2]).removeprefix('torch.')}"
    )
    for T in lengths:
        # the others take too long, or too much, beyond
        names = ["local"] + ["causal"] * (T <= 4096 or cuda) + ["dense mask"] * (T <= 4096)
        times = race(
            {name: attention_turn(name, T, *settings) for name in names}, args.device, args.rounds
        )
        found = {
            name: row(
                "attention",
                f"{name}, T = {T}",
                times[name],
                peak_mb=peak_of(attention_turn, name, T, *settings, device=args.device),
            )
            for name in names[1:]
        }
        peak = peak_of(attention_turn, "local", T, *settings, device=args.device)
        local[T] = row(
            "attention",
            f"local, T = {T}",
            times["local"],
            against=found.get("causal"),
            peak_mb=peak,
        )
        rows += [*found.values(), local[T]]
        if "dense mask" in found:
            rows.append(
                row("attention", f"local, T = {T}", times["local"], against=found["dense mask"])
            )
    slopes = {
        key: np.polyfit(np.log(lengths), np.log([local[T][key] for T in lengths]), 1)[0]
        for key in ("seconds", "peak_mb")
        if all(local[T].get(key) for T in lengths)
    }
    rows.append(
        row(
            "attention",
            f"local, exponent of T from {lengths[0]} to {lengths[-1]}",
            **{f"exponent_of_{key}": float(slope) for key, slope in slopes.items()},
        )
    )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# a training step


def load_nanogpt(folder):
    """nanoGPT's model.py as a module; None, and said, where there is no checkout to compare with."""
    if not folder:
        print("(nanoGPT left out: --nanogpt DIR names a checkout of it)")
        return None
    try:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (
            module.GPT,
            module.GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8, bias=False),
        )
        return module
    except Exception as e:  # it is whatever stands there
        raise InputError(
            f"--nanogpt {folder}: its model.py cannot be used as nanoGPT's ({type(e).__name__}: {e})"
        ) from None


def optimise(model, loss, optimizer):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_step(name, shape, B, device):
    """A step of train.py with the schedule `name`: a function to call."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).to(device)
    model.set_locality(schedule(name, model.config.n_layer))
    # as static as the only model of a run is: the compiler would take lambda for a variable where several share the code
    fast_model = torch.compile(model, dynamic=False) if compiles(device, "auto") else model
    (optimizer,) = build_optimizers(model, Config(), device)
    x, r, y = random_tokens(shape, B, device)

    def turn():
        with precision(device, "auto"):
            loss = fast_model(x, r, y)[1]
        optimise(model, loss, optimizer)

    return turn


def random_tokens(shape, B, device):
    T, V = shape["block_size"], shape.get("vocab_size", 50257)
    return (
        torch.randint(V, (B, T), device=device),
        random_lookback(B, T).to(device),
        torch.randint(V, (B, T), device=device),
    )


def head_turn(shape, B, device):
    """The three products of a step with the output head, by far its largest matrix: a function to call."""
    rows, V, C = B * shape["block_size"], shape.get("vocab_size", 50304), shape["n_embd"]
    x, w, dy = (
        torch.randn(size, device=device, dtype=auto_dtype(device))
        for size in ((rows, C), (V, C), (rows, V))
    )
    return lambda: (x @ w.T, dy @ w, dy.T @ x)


def nanogpt_step(folder, shape, B, device, kept=False, defaults=False, compiled=False):
    """The step of nanoGPT's train.py: with the biases and the AdamW that ours has, or with its defaults. kept: as if it,
    too, kept the memory it frees."""
    nanogpt = load_nanogpt(folder)
    if kept:
        keep_memory()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(**{"vocab_size": 50304, **shape}, bias=not defaults)
        ).to(device)
        optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device.type)
    if not defaults:
        groups = [
            {key: group[key] for key in ("params", "weight_decay")}
            for group in optimizer.param_groups
        ]
        optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    fast_model = torch.compile(model) if compiled or compiles(device, "auto") else model
    x, _, y = random_tokens(shape, B, device)

    def turn():
        with precision(device, "auto"):
            loss = fast_model(x, y)[1]
        optimise(model, loss, optimizer)

    return turn


def transformers_step(shape, B, device):
    """The same with GPT-2 of `transformers`, the blocks as a 4-D additive mask; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("(transformers left out: it is not installed)")
        return None
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **{"n_positions" if key == "block_size" else key: value for key, value in shape.items()},
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        attn_implementation="sdpa",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).to(device).train()
    fast_model = torch.compile(model) if compiles(device, "auto") else model
    groups = [
        {
            "params": [p for p in model.parameters() if (p.dim() < 2) == small],
            "weight_decay": 0.0 if small else 0.1,
        }
        for small in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    x, r, _ = random_tokens(shape, B, device)

    def turn():
        mask = torch.zeros(B, 1, x.size(1), x.size(1), device=device).masked_fill(
            ~in_block(r)[:, None], -math.inf
        )
        with precision(device, "auto"):
            loss = fast_model(x, attention_mask=mask, labels=x).loss
        optimise(model, loss, optimizer)

    return turn


def bench_step(args):
    cuda = args.device.type == "cuda"
    shape, B = (
        {"block_size": 1024, "n_layer": 12 if cuda else 4, "n_head": 12, "n_embd": 768},
        16 if cuda else 1,
    )
    if args.quick:
        shape, B = (
            {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512},
            1,
        )
    T, names = shape["block_size"], ("distributed", "quintic", "localist")
    print(f"{shape}, batch {B}, blocks of at most {W} tokens back, AdamW")
    turns = {name: our_step(name, shape, B, args.device) for name in names}
    rival = (lambda make, *args: make(*args)) if cuda else apart
    if load_nanogpt(args.nanogpt):
        turns["nanoGPT"] = rival(nanogpt_step, args.nanogpt, shape, B, args.device)
        if not cuda:
            turns["nanoGPT, its memory kept"] = rival(
                nanogpt_step, args.nanogpt, shape, B, args.device, True
            )
        turns["nanoGPT, its defaults"] = rival(
            nanogpt_step,
            args.nanogpt,
            shape,
            B,
            args.device,
            False,
            True,
            not args.quick and any(map(shutil.which, ("c++", "g++"))),
        )
    turns["transformers, masked"] = rival(transformers_step, shape, B, args.device)
    # what a step would take if it were its matrix products alone, and all as fast as the largest
    turns["matrix products alone"] = head_turn(shape, B, args.device)
    turns = {name: turn for name, turn in turns.items() if turn}
    times = race(turns, args.device, args.rounds)
    sized = GPT(GPTConfig(**shape))
    matrices = sum(p.numel() for p in sized.parameters() if p.dim() == 2) - sized.wpe.weight.numel()
    times["matrix products alone"] *= matrices / sized.wte.weight.numel()
    others = [
        row("step", name, tokens_per_s=B * T / times[name]) for name in turns if name not in names
    ]
    rows, ours = [*others], None
    for name in names:
        for other in [ours, *others]:  # the first of ours is the baseline of the next two
            rows.append(
                row(
                    "step",
                    name,
                    tokens_per_s=B * T / times[name],
                    against=other,
                    mfu=utilisation(sized, B * T / times[name], T, args.device),
                )
            )
            ours = ours or rows[-1]
    del turns
    rows += bench_loader(T, B, ours)
    for T in (8192, 32768) if cuda and not args.quick else ():
        free(args.device)
        long = {**shape, "block_size": T}
        turns = {name: our_step(name, long, 1, args.device) for name in ("distributed", "localist")}
        times = race(turns, args.device, args.rounds)
        base = None
        for name, turn in turns.items():
            rows.append(
                row(
                    "step",
                    f"{name}, T = {T}",
                    tokens_per_s=T / times[name],
                    against=base,
                    peak_mb=peak_of(lambda: turn, device=args.device),
                )
            )
            base = base or rows[-1]
        del turns
    return rows


def free(device):
    """Forget what was compiled, and give back the memory of models that are gone."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_loader(T, B, step):
    """Batches from a file that is in the system's cache, 0.2 GB; and the memory it takes to open one of 10 GB (a hole)."""
    with tempfile.TemporaryDirectory() as folder:
        path, config, number = Path(folder) / "train.bin", Config(batch_size=B), iter(range(10**9))
        np.random.default_rng(0).integers(0, 50257, 10**8).astype(np.uint16).tofile(path)
        tokens = np.memmap(path, np.uint16, "r")
        tokens.max()
        cpu = torch.device("cpu")
        turn = lambda: [
            random_batch(tokens, tokens, T, config, next(number), cpu) for _ in range(100)
        ]
        seconds = race({"loader": turn}, cpu, 5)["loader"] / 100
        os.truncate(path, 10**10)
        to_open = peak_of(open_and_read, path, T, device=cpu)
        del tokens
    return [
        row(
            "step",
            "loader",
            tokens_per_s=B * T / seconds,
            against=step,
            mb_for_a_file_of_10_GB=to_open,
        )
    ]


def open_and_read(path, T):
    tokens = np.memmap(path, np.uint16, "r")
    return lambda: random_batch(tokens, tokens, T, Config(), 0, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# generation


def recompute(forward, prompt, n):
    """Greedy decoding that reads the context anew for every token, as nanoGPT's sample.py does: a list of n tokens."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            logits = forward(tokens)[0][:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens[0, len(prompt) :].tolist()


def bench_generate(args):
    device, n, rows = torch.device("cpu"), 256, []
    shape, prompts = {}, (16, 512)
    if args.quick:
        shape, prompts, n = (
            {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512},
            (16,),
            32,
        )
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).eval()
    vocabulary = [b"ab. "[i % 4 : i % 4 + 1] for i in range(model.config.vocab_size)]
    weights = torch.randn(sum(p.numel() for p in model.parameters()))
    print(
        f"{len(weights) / 1e6:.0f} M parameters, random; {n} new tokens, greedy, float32, on the CPU"
    )
    slow, name = model, "reading anew"
    nanogpt = load_nanogpt(args.nanogpt)
    if nanogpt:
        c = model.config
        with contextlib.redirect_stdout(io.StringIO()):
            slow = nanogpt.GPT(
                nanogpt.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
            ).eval()
        state = {
            f"transformer.{key}": value[: c.vocab_size] if key == "wte.weight" else value
            for key, value in model.state_dict().items()
        }
        slow.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
        name = "nanoGPT, reading anew"

    def generate(prompt, dial, copies=1):
        model.set_locality(schedule(dial, model.config.n_layer))
        partitioners = [Partitioner(vocabulary, f"window:{W}", W) for _ in range(copies)]
        return [
            tokens[0]
            for tokens in model.generate([prompt] * copies, n, partitioners, temperature=0)
        ]

    for length in prompts:
        prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
        model.set_locality([0.0] * model.config.n_layer)
        with torch.no_grad():
            slow(torch.tensor([prompt]))  # warm up
        start = time.perf_counter()
        expected = recompute(slow, prompt, n)
        base = row(
            "generate",
            f"{name}, prompt of {length}",
            tokens_per_s=n / (time.perf_counter() - start),
        )
        turns = {
            dial: lambda dial=dial: generate(prompt, dial)
            for dial in ("distributed", "quintic", "localist")
        }
        times = race(turns, device, 2)
        same = generate(prompt, "distributed") == expected
        rows += [base] + [
            row(
                "generate",
                f"cached, {dial}, prompt of {length}",
                tokens_per_s=n / times[dial],
                against=base,
                same_tokens=same if dial == "distributed" else None,
            )
            for dial in turns
        ]
    name = f"cached, distributed, 8 prompts of {length}"
    seconds = race({name: lambda: generate(prompt, "distributed", 8)}, device, 1)[name]
    rows.append(row("generate", name, tokens_per_s=8 * n / seconds, against=base))
    # no token of one text comes faster than the weights can be read
    seconds = race({"reading": weights.sum}, device, args.rounds)["reading"]
    return [row("generate", "reading the weights alone", tokens_per_s=1 / seconds), *rows]


# ---------------------------------------------------------------------------------------------------------------------
# data


def held():
    """MB that this process and its children hold now, files apart, and what they share counted once. Linux alone."""
    pids = [os.getpid(), *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration):  # a child may be gone
            total += (
                next(
                    int(line.split()[1])
                    for line in open(f"/proc/{pid}/smaps_rollup")
                    if line.startswith("Pss_Anon")
                )
                / 1024
            )
    return total


def encode_and_partition(text, times, tokenizer, max_lookback):
    """(tokens, seconds to encode, seconds to partition, the most MB that partitioning held, looked at ten times a second)."""
    encoding = get_encoding(tokenizer)
    vocabulary = token_bytes(encoding)
    start = time.perf_counter()
    tokens = np.concatenate(
        [
            encoding.encode_to_numpy(text, allowed_special="all").astype(np.uint16)
            for _ in range(times)
        ]
    )
    encode = time.perf_counter() - start
    known = background(tokens[: len(tokens) // times], vocabulary)
    peaks, done = [], threading.Event()

    def watch():
        with contextlib.suppress(OSError):  # no such files: not Linux
            before = held()
            while not done.wait(0.1):
                peaks.append(held() - before)

    with tempfile.TemporaryDirectory() as folder:
        lookback = np.memmap(Path(folder) / "lookback.bin", np.uint16, "w+", shape=len(tokens))
        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        try:
            partition(tokens, vocabulary, "semantic", max_lookback, known, lookback)
        finally:
            done.set()
        split = time.perf_counter() - start
        watcher.join()
        del lookback
    return len(tokens), encode, split, max(peaks, default=None)


def bench_data(args):
    """Encoding against partitioning. Time should grow with the text, memory should not, and the ratio be at most three."""
    try:
        text = Path(args.source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {args.source} as UTF-8 text: {e}") from e
    if len(text) < 1000:
        raise InputError(f"{args.source} is too short to time: {len(text)} characters")
    rows = []
    for times in (1, 4, 16):
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as process:  # as fresh as prepare_data.py's
            n, encode, split, peak = process.submit(
                encode_and_partition, text, times, args.tokenizer, args.max_lookback
            ).result()
        mb = times * len(text.encode()) / 1e6
        rows.append(row("data", f"encode, {mb:,.1f} MB", encode, tokens=n))
        rows.append(
            row("data", f"partition, {mb:,.1f} MB", split, against=rows[-1], tokens=n, peak_mb=peak)
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------

SECTIONS = {
    "attention": bench_attention,
    "step": bench_step,
    "generate": bench_generate,
    "data": bench_data,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SECTIONS, help="one section; default: all")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to compare with")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes, to see that it works: the numbers mean nothing",
    )
    parser.add_argument(
        "--source", default="data/sample.txt", metavar="FILE", help="the text of `data`"
    )
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    parser.add_argument("--max-lookback", type=int, default=256, help="of `data`")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows here, with the machine in each"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds is at least 1, not {args.rounds}")
    if not 1 <= args.max_lookback <= 65535:
        raise InputError(f"--max-lookback is in 1 … 65535, not {args.max_lookback}")
    if args.json and (args.json.is_dir() or not os.access(args.json.absolute().parent, os.W_OK)):
        raise InputError(f"{args.json}: a file cannot be written there")
    args.device = pick_device(args.device)
    if args.device.type == "cpu":
        keep_memory()  # as train.py does
    log = machine(args.device)
    print("\n".join(f"{key:12s} {value}" for key, value in log.items()))
    rows = []
    for name in [args.only] if args.only else SECTIONS:
        print(f"\n{name}")
        rows += SECTIONS[name](args)
        free(args.device)
    if args.json:
        write_text(
            args.json, json.dumps([{**found, "machine": log} for found in rows], indent=1) + "\n"
        )


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
