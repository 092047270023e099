"""Time the parts of the project, side by side with their rivals.

    python -m experiments.bench [--only SECTION] [--nanogpt DIR] [--json FILE]
    python -m experiments.bench --only data --source BOOKS.txt

attention: one layer's attention, forward and backward. Against PyTorch's own, over the whole
           context and with a dense mask.
step:      a training step. Against nanoGPT's (--nanogpt: a checkout), and against that of
           `transformers` with the same mask. Also the memory it takes, and the loading of batches.
small:     the step of configs/pretrain_cpu.toml, with Muon. Against AdamW.
evaluate:  what `eval.py` does, with all its measures. Against the perplexity alone.
generate:  tokens a second with the cache. Against reading the context again for every token.
data:      to partition a text into semantic blocks. Against encoding it (tiktoken). Both for the
           text once, 4 times and 16 times in a row.

Contestants take turns, round after round, so that other work on the machine slows all of them
alike. A time is the median of its rounds. On a CPU, other software takes its steps in processes of
its own, without the settings of `support`: memory in large pages, threads that soon give up.

A CPU can be held to older instructions. With `ONEDNN_MAX_CPU_ISA=AVX512_CORE` in front of the
command it does as if it had no AMX. With `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2` it has AVX2 alone.

Each row has `seconds` or `tokens_per_s`. Its `ratio` is to the same number of its `baseline`.
What is not installed is left out, with a note. On a CUDA device the shapes are larger, and the
model is compiled.
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
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import support  # before torch: it sets what torch reads when it is loaded  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F

from eval import evaluate
from locality import Partitioner, background, partition, schedule
from model import GPT, GPTConfig, block_mask, clamp_lookback, in_block, local_attention
from prepare_data import get_encoding, token_bytes
from support.files import InputError, check_writable, run_script, write_json
from support.machine import compiles, peak_flops, pick_device, precision
from train import Config, build_optimizers, random_batch

W = 128  # max_lookback of all but `data`
WIDER = 256, 512, 768  # larger ones, for local attention in the shortest context
DIALS = ("distributed", "quintic", "localist")
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


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(contestants, device, rounds):
    """{name: function} -> {name: median seconds of a call}.

    They take turns. The first round warms up and does not count.
    """
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


def row(section, name, seconds=None, tokens_per_s=None, against=None, **more):
    """One row of the table, printed; a dict. against: the row of the baseline."""
    found = {"section": section, "name": name, "seconds": seconds, "tokens_per_s": tokens_per_s}
    found |= more
    value = ratio = ""
    if seconds:
        value = f"{1e3 * seconds:12,.1f} ms   "
    elif tokens_per_s:
        value = f"{tokens_per_s:12,.1f} tok/s"
    if against:
        key = "seconds" if seconds else "tokens_per_s"
        found |= {"baseline": against["name"], "ratio": found[key] / against[key]}
        ratio = f"{found['ratio']:7.3f} x {found['baseline']}"
    notes = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in more.items()}
    notes = ", ".join(f"{key} {note}" for key, note in notes.items() if note is not None)
    print(f"{name:44s} {value:18s} {ratio:56s} {notes}", flush=True)
    return {key: value for key, value in found.items() if value is not None}


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


def random_lookback(B, T, seed=0):
    """Lookbacks of random blocks of 60 tokens on average, (B, T) int64."""
    new = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / 60
    start = torch.where(new, torch.arange(T), 0).cummax(1).values
    return clamp_lookback(torch.arange(T) - start, W)


def free(device):
    """Forget what was compiled, and give back the memory of models that are gone."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# attention


def attention_turn(name, T, device, heads=12, dtype=torch.float32, cap=W):
    """One layer's attention over T tokens, forward and backward: a function to call."""
    q, k, v = (
        torch.randn(1, T, heads, 64, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    lookback = random_lookback(1, T).to(device)
    if name == "local":
        attend = partial(local_attention, mask=block_mask(lookback, cap))
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
    lengths = (1024, 2048, 4096, 8192, 16384) + ((32768,) if cuda else ())
    if args.quick:
        lengths = (256, 512)
    dtype = torch.bfloat16 if cuda else torch.float32
    what = f"12 heads x 64, blocks of at most {W} tokens back, batch 1"
    print(f"{what}, {str(dtype).removeprefix('torch.')}")
    rows, local = [], {}
    for T in lengths:
        # longer contexts take the others too long, or too much memory
        names = ["local"] + ["causal"] * (T <= 4096 or cuda) + ["dense mask"] * (T <= 4096)
        how = {name: (name, T, args.device, 12, dtype) for name in names}
        if T == lengths[0]:  # blocks that reach back further
            wider = {f"local, {cap} back": cap for cap in WIDER}
            how |= {name: ("local", T, args.device, 12, dtype, cap) for name, cap in wider.items()}
            names = [*names, *wider]
        times = race({n: attention_turn(*how[n]) for n in names}, args.device, args.rounds)
        found = {}
        for name in [*names[1:], "local"]:
            peak = peak_of(attention_turn, *how[name], device=args.device)
            against = found.get("causal") if name.startswith("local") else None
            title = f"{name}, T = {T}"
            found[name] = row("attention", title, times[name], against=against, peak_mb=peak)
        rows += found.values()
        local[T] = found["local"]
        if "dense mask" in found:
            against = found["dense mask"]
            rows.append(row("attention", f"local, T = {T}", times["local"], against=against))
    slopes = {}
    for key in ("seconds", "peak_mb"):
        if all(local[T].get(key) for T in lengths):
            values = np.log([local[T][key] for T in lengths])
            slopes[f"exponent_of_{key}"] = float(np.polyfit(np.log(lengths), values, 1)[0])
    title = f"local, exponent of T from {lengths[0]} to {lengths[-1]}"
    return [*rows, row("attention", title, **slopes)]


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
    x, lookback = torch.randint(V, (B, T), device=device), random_lookback(B, T).to(device)
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
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _ = module.GPT, module.GPTConfig(**SMALL, bias=False)
        return module
    except Exception as e:  # any code may stand there
        why = f"its model.py cannot be used as nanoGPT's ({type(e).__name__}: {e})"
        raise InputError(f"--nanogpt {folder}: {why}") from None


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


def rival_turns(args, shape, B):
    """The steps of other software, as far as it is installed: {name: function}."""
    cuda, rivals = args.device.type == "cuda", {}
    if load_nanogpt(args.nanogpt):
        nanogpt = partial(nanogpt_step, args.nanogpt, shape, B, args.device)
        rivals["nanoGPT"] = nanogpt
        if not cuda:
            rivals[OUR_WAY] = nanogpt
        compiled = not args.quick and any(map(shutil.which, ("c++", "g++")))
        rivals["nanoGPT, its defaults"] = partial(nanogpt, defaults=True, compiled=compiled)
    rivals["transformers, masked"] = partial(transformers_step, shape, B, args.device)
    turns = {
        name: make() if cuda else apart(make, {} if name == OUR_WAY else DEFAULTS)
        for name, make in rivals.items()
    }
    return {name: turn for name, turn in turns.items() if turn}


# --------------------------------------------------------------------------------------------------
# a training step: the race


def bench_step(args):
    cuda = args.device.type == "cuda"
    shape = {"block_size": 1024, "n_layer": 12 if cuda else 4, "n_head": 12, "n_embd": 768}
    B = 16 if cuda else 1
    if args.quick:
        shape, B = SMALL, 1
    print(f"{shape}, batch {B}, blocks of at most {W} tokens back, AdamW")
    rows = race_steps(args, shape, B)
    ours = next(found for found in rows if found["name"] == "distributed")
    rows.append(bench_loader(shape["block_size"], B, ours))
    for T in (8192, 32768) if cuda and not args.quick else ():
        free(args.device)
        rows += race_long_steps(args, {**shape, "block_size": T})
    return rows


def race_steps(args, shape, B):
    """Our steps against those of other software, and against what no step can beat: rows."""
    products = "matrix products alone"  # as if a step were nothing else, all as fast as the largest
    turns = {dial: our_step(dial, shape, B, args.device) for dial in DIALS}
    turns |= rival_turns(args, shape, B)
    turns[products] = head_turn(shape, B, args.device)
    times = race(turns, args.device, args.rounds)
    sized, T = GPT(GPTConfig(**shape)), shape["block_size"]
    matrices = sum(p.numel() for p in sized.parameters() if p.dim() == 2) - sized.wpe.weight.numel()
    times[products] *= matrices / sized.wte.weight.numel()
    speeds = {name: B * T / seconds for name, seconds in times.items()}
    others = [row("step", name, tokens_per_s=speeds[name]) for name in turns if name not in DIALS]
    rows, ours, peak = [*others], None, peak_flops(args.device)
    size = shape, B, args.device
    held = peak_of(after_one, our_step, "distributed", *size, device=args.device)
    for dial in DIALS:
        speed = speeds[dial]
        mfu = peak and speed * sized.flops_per_token(T) / peak
        for other in [ours, *others]:  # the first of ours is the baseline of the other two
            rows.append(row("step", dial, tokens_per_s=speed, against=other, mfu=mfu))
            ours = ours or rows[-1]
    if args.nanogpt:
        other = peak_of(after_one, nanogpt_step, args.nanogpt, *size, device=args.device)
        rows.append(row("step", f"memory, {OUR_WAY}", peak_mb=other))
    return [*rows, row("step", "memory, distributed", peak_mb=held)]


def race_long_steps(args, shape):
    """Steps with one long context: rows."""
    T, rows = shape["block_size"], []
    turns = {dial: our_step(dial, shape, 1, args.device) for dial in ("distributed", "localist")}
    times = race(turns, args.device, args.rounds)
    for dial, turn in turns.items():
        peak = peak_of(lambda turn: turn, turn, device=args.device)
        against = rows[0] if rows else None
        title = f"{dial}, T = {T}"
        speed = T / times[dial]
        rows.append(row("step", title, tokens_per_s=speed, against=against, peak_mb=peak))
    return rows


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
    return row("step", "loader", tokens_per_s=speed, against=step, mb_for_a_file_of_10_GB=to_open)


def reader(tokens, T, B, n):
    """Reads n batches: a function to call."""
    config, number = Config(batch_size=B), itertools.count()
    return lambda: [random_batch(tokens, tokens, T, config, next(number), CPU) for _ in range(n)]


def open_and_read(path, T):
    return reader(np.memmap(path, np.uint16, "r"), T, 8, 1)


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
    times, rows = race(turns, args.device, args.rounds), []
    for name in turns:
        rows.append(row("small", name, times[name], against=rows[0] if rows else None))
    return rows


# --------------------------------------------------------------------------------------------------
# evaluation


def evaluation(shape, measure, device):
    """Two contexts through `evaluate`: a function to call. measure: with all its measures."""
    torch.manual_seed(0)
    model, T = GPT(GPTConfig(**shape, max_lookback=W)).to(device), shape["block_size"]
    model.set_locality(schedule("quintic", model.config.n_layer))
    n = 2 * T + 1
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, n, np.uint16)
    lookback = random_lookback(1, n)[0].numpy().astype(np.uint16)
    vocabulary = [b"a"] * model.config.vocab_size
    return partial(evaluate, model, tokens, lookback, vocabulary, T, measure=measure)


def bench_evaluate(args):
    shape = {**SMALL, "block_size": 128} if args.quick else {"block_size": 1024}
    alone, whole = (f"{what}, T = {shape['block_size']}" for what in ("perplexity", "all measures"))
    turns = {alone: evaluation(shape, False, args.device)}
    turns[whole] = evaluation(shape, True, args.device)
    times = race(turns, args.device, min(args.rounds, 3))
    rows = [row("evaluate", alone, times[alone])]
    rows.append(row("evaluate", whole, times[whole], against=rows[0]))
    for T in (1024, 8192) if not args.quick else (128,):  # two layers: memory is not for each
        long = {**shape, "block_size": T, "n_layer": 2}
        peak = peak_of(evaluation, long, True, args.device, device=args.device)
        per_token = peak and 1024 * peak / (2 * T)
        rows.append(row("evaluate", f"memory, T = {T}", peak_mb=peak, kb_a_token=per_token))
    return rows


# --------------------------------------------------------------------------------------------------
# generation


def nanogpt_twin(nanogpt, model):
    """nanoGPT with the weights of our model."""
    c = model.config
    with quiet():
        config = nanogpt.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
        twin = nanogpt.GPT(config).eval()
    state = {f"transformer.{key}": value for key, value in model.state_dict().items()}
    head = state["transformer.wte.weight"][: c.vocab_size]  # without the padding
    twin.load_state_dict({**state, "transformer.wte.weight": head, "lm_head.weight": head})
    return twin


def read_anew(forward, prompt, n):
    """The likeliest n tokens after a prompt, a list. Reads the context again for each of them.

    nanoGPT's sample.py does so too.
    """
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            logits = forward(tokens)[0][:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens[0, len(prompt) :].tolist()


def generate(model, dial, prompt, n, copies=1):
    """The same with the cache, several copies of the prompt at once: the tokens of the first."""
    model.set_locality(schedule(dial, model.config.n_layer))
    vocabulary = [b"a"] * model.config.vocab_size  # a window does not read what they say
    partitioners = [Partitioner(vocabulary, f"window:{W}", W) for _ in range(copies)]
    steps = model.generate([prompt] * copies, n, partitioners, temperature=0)
    return [tokens[0] for tokens in steps]


def race_prompt(model, slow, name, prompt, n):
    """Rows for one prompt: `slow`, the model called `name`, reads anew; ours has the cache."""
    of = f"prompt of {len(prompt)}"
    model.set_locality([0.0] * model.config.n_layer)
    with torch.no_grad():
        slow(torch.tensor([prompt]))  # warm up
    start = time.perf_counter()
    expected = read_anew(slow, prompt, n)
    speed = n / (time.perf_counter() - start)
    base = row("generate", f"{name}, {of}", tokens_per_s=speed)
    times = race({dial: partial(generate, model, dial, prompt, n) for dial in DIALS}, CPU, 2)
    same = {"distributed": generate(model, "distributed", prompt, n) == expected}
    rows = [base]
    for dial in DIALS:
        how = {"against": base, "same_tokens": same.get(dial)}
        rows.append(row("generate", f"cached, {dial}, {of}", tokens_per_s=n / times[dial], **how))
    return rows


def bench_generate(args):
    shape, lengths, n = {}, (16, 512), 256
    if args.quick:
        shape, lengths, n = {**SMALL, "block_size": 128}, (16,), 32
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, max_lookback=W)).eval()
    weights = torch.randn(sum(p.numel() for p in model.parameters()))
    size = f"{len(weights) / 1e6:.0f} M parameters, random"
    print(f"{size}; {n} new tokens, greedy, float32, on the CPU")
    slow, name = model, "reading anew"
    if nanogpt := load_nanogpt(args.nanogpt):
        slow, name = nanogpt_twin(nanogpt, model), "nanoGPT, reading anew"
    rows = []
    for length in lengths:
        prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
        base, *cached = race_prompt(model, slow, name, prompt, n)
        rows += [base, *cached]
    name = f"cached, distributed, 8 prompts of {length}"
    turn = partial(generate, model, "distributed", prompt, n, copies=8)
    seconds = race({name: turn}, CPU, 1)[name]
    rows.append(row("generate", name, tokens_per_s=8 * n / seconds, against=base))
    # no token of a single text comes faster than the weights can be read
    seconds = race({"reading": weights.sum}, CPU, args.rounds)["reading"]
    return [row("generate", "reading the weights alone", tokens_per_s=1 / seconds), *rows]


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
    rows = []
    for times in (1, 4, 16):
        how = text, times, args.tokenizer, args.max_lookback
        # a new process, as prepare_data.py is one
        n, encoded, split, peak = in_new_process(encode_and_partition, *how)
        size = f"{times * len(text.encode()) / 1e6:,.1f} MB"
        base = row("data", f"encode, {size}", encoded, tokens=n)
        more = {"against": base, "tokens": n, "peak_mb": peak}
        rows += [base, row("data", f"partition, {size}", split, **more)]
    return rows


# --------------------------------------------------------------------------------------------------

SECTIONS = {
    "attention": bench_attention,
    "step": bench_step,
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
    log = machine(args.device)
    print("\n".join(f"{key:12s} {value}" for key, value in log.items()))
    rows = []
    for name in [args.only] if args.only else SECTIONS:
        print(f"\n{name}")
        rows += SECTIONS[name](args)
        free(args.device)
    if args.json:
        write_json(args.json, [{**found, "machine": log} for found in rows])


if __name__ == "__main__":
    run_script(main)
