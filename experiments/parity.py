"""Does a GPU find what a CPU finds? Loss and gradients of a small model, and whether all is finite.

    python -m experiments.parity [--device cuda] [--json FILE]

The reference is the CPU, in float32, not compiled. Against it: float32 and bfloat16, not compiled
and compiled; and bfloat16 compiled with attention in chunks, as it is where there is dropout. The
dial is at 0, 0.5 and 1. The error of the gradients is the norm of the difference, by the norm.

Before that: are gradients finite where every score is far below 0, as in some trained models?
(There cuDNN's attention can fail: pytorch issue 196678.) And after it: is a model compiled once,
for all the steps of a run, with looks at the validation split in between?

What is not finite, or further off than rounding, ends in an error.
"""

import argparse
import contextlib
import math
from pathlib import Path

import support  # before torch: it sets what torch reads when it is loaded  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F

from eval import evaluate
from experiments.bench import begin, free, row
from model import GPT, GPTConfig, block_mask, clamp_lookback, local_attention
from support.files import InputError, check_writable, run_script
from support.machine import compiles, pick_device

# tokens of context, max_lookback, anchor; 960 is half a tile of 128 more than a multiple of it
CASES = (1024, 128, False), (960, 128, True), (960, 256, False), (1024, 256, True)
SHAPE = {"vocab_size": 8192, "n_layer": 3, "n_head": 4, "n_embd": 256}
QUICK = {"vocab_size": 128, "n_layer": 3, "n_head": 1, "n_embd": 16}
LIMITS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.01, 0.05)}  # of the loss, of gradients


def random_blocks(B, T, cap):
    """Lookbacks of random blocks of 100 tokens on average, (B, T) int64."""
    start = torch.where(torch.rand(B, T) < 0.01, torch.arange(T), 0).cummax(1).values
    return clamp_lookback(torch.arange(T) - start, cap)


def example(shape, T, cap, anchor):
    """A random model with every kind of layer, and a batch, on the CPU."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, block_size=T, max_lookback=cap, anchor=anchor))
    model.set_locality([0.0, 0.5, 1.0])
    x, y = torch.randint(model.config.vocab_size, (2, 2, T))
    return model, (x, random_blocks(2, T, cap), y)


def step(model, batch, device, dtype=torch.float32, compiled=False):
    """(loss, all gradients as one vector on the CPU) of a model that is moved to the device."""
    model, batch = model.to(device), [part.to(device) for part in batch]
    forward = torch.compile(model, dynamic=False) if compiled else model
    lower = dtype != torch.float32
    with torch.autocast(device.type, dtype) if lower else contextlib.nullcontext():
        loss = forward(*batch)[1]
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    vector = torch.cat([g.float().flatten() for g in gradients]).cpu()
    model.cpu()
    return loss.item(), vector


def compare(args, shape):
    """A row for every case, and every way to compute it. Returns the names of those that failed."""
    ways = [(dtype, way) for dtype in LIMITS for way in ("", ", compiled")]
    ways, failed = [*ways, (torch.bfloat16, ", compiled, in chunks")], []
    for T, cap, anchor in CASES:
        model, batch = example(shape, T, cap, anchor)
        loss, expected = step(model, batch, torch.device("cpu"))
        for dtype, way in ways:
            if way and (args.quick or not compiles(args.device, "auto")):
                continue
            if "chunks" in way:
                model.fuses = lambda lookback: False
                torch.compiler.reset()
            found, gradient = step(model, batch, args.device, dtype, bool(way))
            vars(model).pop("fuses", None)
            off = abs(found - loss), ((gradient - expected).norm() / expected.norm()).item()
            name = f"T = {T}, {cap} back{', anchor' * anchor}, {dtype}{way}".replace("torch.", "")
            row("parity", name, loss_error=off[0], gradient_error=off[1])
            if not all(
                error < limit for error, limit in zip(off, LIMITS[dtype])
            ):  # nor if it is NaN
                failed.append(name)
        free(args.device)
    return failed


def far_below(device):
    """Attention whose every score is -120, not compiled, in bfloat16: is the way back finite?

    Returns the names of those that failed.
    """
    failed = []
    for cap, anchor in ((128, False), (128, True), (256, False), (256, True)):
        for T in (192, 320, 1024):
            q, k, v = scores_of_minus_120(T, device)
            mask = block_mask(random_blocks(1, T, cap).to(device), cap, anchor)
            name = f"scores of -120, T = {T}, {cap} back{', anchor' * anchor}"
            if not tell_finite(name, local_attention(q, k, v, mask), (q, k, v)):
                failed.append(name)
    q, k, v = scores_of_minus_120(192, device)
    mask = torch.ones(192, 192, dtype=torch.bool, device=device).tril()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    tell_finite("scores of -120, a mask of 192 keys, which we avoid", y, (q, k, v))
    return failed


def scores_of_minus_120(T, device):
    """q, k and v, (1, 1, T, 64) bfloat16, of which q @ k / 8 is near -120 everywhere."""
    q, k, v = (torch.randn(1, 1, T, 64) for _ in range(3))
    q, k = q / 10, k / 10
    q[..., 0], k[..., 0] = 1, -120 * math.sqrt(64)
    return [x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v)]


def tell_finite(name, y, qkv):
    gradients = torch.autograd.grad(y.sum(), qkv)
    finite = all(g.isfinite().all().item() for g in gradients)
    row("parity", name, finite=finite)
    return finite


def compile_once(args, shape):
    """How often is a model compiled in six steps, with scores of ragged batches in between?"""
    torch._dynamo.utils.counters.clear()
    model, (x, _, y) = example(shape, 1024, 128, False)
    model, x, y = (part.to(args.device) for part in (model, x, y))
    compiled = torch.compile(model)
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], 4000, np.uint16)
    for _ in range(6):
        compiled(x, random_blocks(2, 1024, 128).to(args.device), y)[1].backward()
        blocks = np.zeros(4000, np.uint16)
        evaluate(model, tokens, blocks, [b"a"] * shape["vocab_size"], batch_size=4, measure=False)
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    row("parity", "six steps", graphs=graphs, breaks=breaks)
    return [] if (graphs, breaks) == (1, 0) else [f"compiled {graphs} graphs, {breaks} breaks"]


def main():
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = argparse.ArgumentParser(prog="python -m experiments.parity", **how)
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cuda ...")
    parser.add_argument("--quick", action="store_true", help="small, and not compiled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    args.device = pick_device(args.device)
    begin(args.device, args.json)
    shape = QUICK if args.quick else SHAPE
    failed = far_below(args.device) + compare(args, shape)
    if compiles(args.device, "auto") and not args.quick:
        failed += compile_once(args, shape)
    if failed:
        raise InputError(f"no parity: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
