"""Does a GPU compute what a CPU computes? Loss and gradients of a small model.

    python -m experiments.parity [--device cuda] [--json FILE]

The reference is the CPU in float32, not compiled. It is compared with float32 and bfloat16, each
compiled and not compiled, and with bfloat16 compiled with attention in chunks, which a model with
dropout uses. The error of the gradients is the norm of the difference divided by their norm.

Two more checks: gradients must be finite when every score is far below 0, as in some trained models
(cuDNN's attention can fail there: PyTorch issue 196678); and a model must be compiled only once for
all steps of a run, even with evaluations in between. A value that is not finite, or an error larger
than rounding, ends the script with an error.
"""

import contextlib
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from unittest.mock import patch

import support  # before torch: it sets what torch reads when it is loaded  # noqa: F401

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from eval import evaluate
from experiments.bench import CPU, Table, free_memory
from fast.attention import block_mask, local_attention
from model import GPT, GPTConfig, clamp_lookback
from support.files import InputError, run_script
from support.machine import compiles, pick_device

# block_size, max_lookback, anchor; 960 is a multiple of 128, the tile of a kernel, plus half a
# tile; 1000 and 331 are ragged
CASES = (1024, 128, False), (960, 128, True), (960, 256, False), (1024, 256, True)
CASES += (1000, 128, False), (331, 128, True)
B = 3  # contexts, each with blocks of its own
SHAPE = {"vocab_size": 8192, "n_layer": 3, "n_head": 4, "n_embd": 256}
QUICK = {"vocab_size": 128, "n_layer": 3, "n_head": 1, "n_embd": 16}
LIMITS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.01, 0.05)}  # of the loss, of gradients


def random_lookback(B, T, max_lookback):
    """The lookback of random blocks of 100 tokens on average, (B, T) int64."""
    start = torch.where(torch.rand(B, T) < 0.01, torch.arange(T), 0).cummax(1).values
    return clamp_lookback(torch.arange(T) - start, max_lookback)


def example(shape, T, max_lookback, anchor):
    """A random model with all kinds of layers, and its batch (ids, lookbacks, targets)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, block_size=T, max_lookback=max_lookback, anchor=anchor))
    model.set_locality([0.0, 0.5, 1.0])
    x, y = torch.randint(model.config.vocab_size, (2, B, T))
    return model, (x, random_lookback(B, T, max_lookback), y)


def step(model, batch, device, dtype=torch.float32, compiled=False):
    """(loss, all gradients as one vector on the CPU) of a model that is moved to the device."""
    model, batch = model.to(device), [x.to(device) for x in batch]
    forward = torch.compile(model, dynamic=False) if compiled else model
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = forward(*batch)[1]
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    vector = torch.cat([g.float().flatten() for g in gradients]).cpu()
    model.cpu()
    return loss.item(), vector


def compare(device, compiled, shape, table):
    """Add a row for every case and every way to compute it. Returns the names that failed."""
    ways = [(dtype, way) for dtype in LIMITS for way in ("", ", compiled")[: 1 + compiled]]
    ways += [(torch.bfloat16, ", compiled, in chunks")] * compiled
    failed = []
    for T, max_lookback, anchor in CASES:
        model, batch = example(shape, T, max_lookback, anchor)
        (expected_loss, expected), rows = step(model, batch, CPU), {}
        for dtype, way in ways:
            chunks = contextlib.nullcontext()
            if "chunks" in way:
                torch.compiler.reset()
                chunks = patch("model.flex_applies", lambda *_: False)
            with chunks:
                loss, gradient = step(model, batch, device, dtype, bool(way))
            errors = (
                abs(loss - expected_loss),
                float((gradient - expected).norm() / expected.norm()),
            )
            name = f"T = {T}, {max_lookback} back{', anchor' * anchor}, {dtype}{way}"
            name = name.replace("torch.", "")
            rows[name] = {"loss_error": errors[0], "gradient_error": errors[1]}
            if not all(error < limit for error, limit in zip(errors, LIMITS[dtype])):  # or NaN
                failed.append(name)
        table.add("parity", rows)
        free_memory()
    return failed


def check_low_scores(device, table):
    """Are gradients finite when every score is -120? In bfloat16, not compiled.

    Adds a row for every case. Returns the names that failed.
    """
    avoided, cases, rows = "scores of -120, a mask of 192 keys, which we avoid", {}, {}
    for max_lookback, anchor in ((128, False), (128, True), (256, False), (256, True)):
        for T in (192, 320, 1024):
            lookback = random_lookback(1, T, max_lookback).to(device)
            name = f"scores of -120, T = {T}, {max_lookback} back{', anchor' * anchor}"
            cases[name] = T, local_attention, block_mask(lookback, max_lookback, anchor)
    mask = torch.ones(192, 192, dtype=torch.bool, device=device).tril()
    cases[avoided] = 192, scaled_dot_product_attention, mask
    cases[f"{avoided}, without cuDNN"] = 192, without_cudnn, mask
    for name, (T, attend, mask) in cases.items():
        q, k, v = torch.randn(3, 1, 1, T, 64) * torch.tensor([0.1, 0.1, 1]).view(3, 1, 1, 1, 1)
        q[..., 0], k[..., 0] = 1, -120 * math.sqrt(64)  # q @ k / 8 is close to -120 everywhere
        q, k, v = (x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v))
        gradients = torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v))
        rows[name] = {"finite": all(g.isfinite().all().item() for g in gradients)}
    table.add("parity", rows)
    return [name for name, row in rows.items() if not row["finite"] and avoided not in name]


def without_cudnn(q, k, v, mask):
    """Attention by any kernel except cuDNN's. If its gradients are finite and cuDNN's are not, that
    backend can be disabled, and masks may have any length."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return scaled_dot_product_attention(q, k, v, mask)


def check_compiled_once(device, table):
    """Add a row: is a model compiled once in six steps, with ragged evaluations in between?

    Returns a list with the complaint, empty if there is none.
    """
    torch._dynamo.utils.counters.clear()
    model, (x, _, y) = example(SHAPE, 1024, 128, False)
    model, x, y = (each.to(device) for each in (model, x, y))
    compiled, V = torch.compile(model), SHAPE["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, V, 4000, np.uint16)
    for _ in range(6):
        compiled(x, random_lookback(B, 1024, 128).to(device), y)[1].backward()
        evaluate(model, tokens, np.zeros_like(tokens), [b"a"] * V, batch_size=4, measure=False)
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    table.add("parity", {"six steps": {"graphs": graphs, "breaks": breaks}})
    return [] if (graphs, breaks) == (1, 0) else [f"compiled {graphs} graphs, {breaks} breaks"]


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cuda ...")
    parser.add_argument("--quick", action="store_true", help="a small model, not compiled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args()
    device = pick_device(args.device)
    table, compiled = Table(device, args.json), compiles(device, "auto") and not args.quick
    failed = check_low_scores(device, table)
    failed += compare(device, compiled, QUICK if args.quick else SHAPE, table)
    failed += check_compiled_once(device, table) if compiled else []
    if failed:
        raise InputError(f"the device does not agree with the CPU: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
