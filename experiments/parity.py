"""Does a GPU find what a CPU finds? Loss and gradients of a small model, and whether all is finite.

    python -m experiments.parity [--device cuda] [--json FILE]

The reference is the CPU, in float32, not compiled. Against it: float32 and bfloat16, not compiled
and compiled. The dial is at 0, 0.5 and 1. Errors of gradients are relative: the norm of the
difference by the norm.

Then two questions. Are gradients finite where every score is far below 0, as with some trained
models? (There cuDNN's attention can fail: pytorch issue 196678.) And is a model compiled once, for
all the steps of a run, with looks at the validation split in between?
"""

import argparse
import contextlib
from pathlib import Path

import support  # before torch: it sets what torch reads when it is loaded  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F

from eval import evaluate
from experiments.bench import free, machine
from model import GPT, GPTConfig, block_mask, clamp_lookback, local_attention
from support.files import InputError, check_writable, run_script, write_json
from support.machine import compiles, pick_device

# tokens of context, max_lookback, anchor; 960 is half a tile of 128 more than a multiple of it
CASES = (1024, 128, False), (960, 128, True), (960, 256, False), (1024, 256, True)
SHAPE = {"vocab_size": 8192, "n_layer": 3, "n_head": 4, "n_embd": 256}
QUICK = {"vocab_size": 128, "n_layer": 3, "n_head": 1, "n_embd": 16}
ROWS, FILE = [], {}


def tell(what, **found):
    """Print a row, and write it beside those before."""
    shown = (f"{key} {v:.2e}" if isinstance(v, float) else f"{key} {v}" for key, v in found.items())
    print(f"{what:56s} {', '.join(shown)}", flush=True)
    ROWS.append({"what": what, **found})
    if FILE:
        write_json(FILE["path"], [{**each, "machine": FILE["machine"]} for each in ROWS])


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
    """(loss, all gradients as one vector) on the CPU, of a model that is moved to the device."""
    model, batch = model.to(device), [part.to(device) for part in batch]
    forward = torch.compile(model, dynamic=False) if compiled else model
    lower = (
        torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    )
    with lower:
        loss = forward(*batch)[1]
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    vector = torch.cat([g.float().flatten() for g in gradients]).cpu()
    model.cpu()
    return loss.item(), vector


def compare(args, shape):
    """A row for every case, and every way to compute it."""
    ways = [(t, c) for t in (torch.float32, torch.bfloat16) for c in (False, True)]
    for T, cap, anchor in CASES[:2] if args.quick else CASES:
        model, batch = example(shape, T, cap, anchor)
        loss, expected = step(model, batch, torch.device("cpu"))
        for dtype, compiled in ways:
            if compiled and not compiles(args.device, "auto") or args.quick and compiled:
                continue
            found, gradient = step(model, batch, args.device, dtype, compiled)
            error = ((gradient - expected).norm() / expected.norm()).item()
            how = f"{str(dtype).removeprefix('torch.')}{', compiled' * compiled}"
            how = f"T = {T}, {cap} back{', anchor' * anchor}: {how}"
            finite = bool(gradient.isfinite().all())
            tell(how, loss_error=abs(found - loss), gradient_error=error, finite=finite)
        free(args.device)


def far_below(device):
    """Attention whose every score is -120: is the way back finite? Not compiled, in bfloat16."""
    for cap, anchor in ((128, False), (128, True), (256, False), (256, True)):
        for T in (192, 320, 1024):
            q, k, v = (torch.randn(1, 1, T, 64, dtype=torch.bfloat16) for _ in range(3))
            q[..., 0], k[..., 0] = 1, -120 * 8
            q[..., 1:], k[..., 1:] = q[..., 1:] / 10, k[..., 1:] / 10
            q, k, v = (x.to(device).requires_grad_() for x in (q, k, v))
            mask = block_mask(random_blocks(1, T, cap).to(device), cap, anchor)
            y = local_attention(q, k, v, mask)
            finite = [g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v))]
            name = f"scores of -120, T = {T}, {cap} back{', anchor' * anchor}"
            tell(name, finite=bool(torch.stack(finite).all()))
    q, k, v = (x[:, :, :192].detach().requires_grad_() for x in (q, k, v))
    mask = torch.ones(192, 192, dtype=torch.bool, device=device).tril()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    finite = [g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v))]
    tell("the same with a mask of 192 keys, which we avoid", finite=bool(torch.stack(finite).all()))


def compile_once(args, shape):
    """How often a model is compiled in six steps, with scores of ragged batches in between."""
    torch._dynamo.utils.counters.clear()
    model, (x, _, y) = example(shape, 1024, 128, False)
    model, x, y = (part.to(args.device) for part in (model, x, y))
    compiled = torch.compile(model)
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], 4000, np.uint16)
    for _ in range(6):
        compiled(x, random_blocks(2, 1024, 128).to(args.device), y)[1].backward()
        blocks = np.zeros(4000, np.uint16)
        evaluate(model, tokens, blocks, [b"a"] * shape["vocab_size"], batch_size=4, measure=False)
    stats = torch._dynamo.utils.counters
    tell("six steps", graphs=stats["stats"]["unique_graphs"], breaks=len(stats["graph_break"]))


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
    log = machine(args.device)
    print("\n".join(f"{key:12s} {value}" for key, value in log.items()))
    if args.json:
        FILE.update(path=args.json, machine=log)
    shape = QUICK if args.quick else SHAPE
    compare(args, shape)
    far_below(args.device)
    if compiles(args.device, "auto") and not args.quick:
        compile_once(args, shape)
    wrong = [
        each["what"]
        for each in ROWS
        if not each.get("finite", True) and "avoid" not in each["what"]
    ]
    if wrong:
        raise InputError(f"not finite: {'; '.join(wrong)}")


if __name__ == "__main__":
    run_script(main)
