"""Every fast twin computes what its plain twin computes: values, and gradients if it has any."""

import ast
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from conftest import ROOT
from fast.attention import (
    BlockMask,
    block_mask,
    blended_attention,
    flex_applies,
    local_attention,
    tiled_mask,
)
from fast.evidence import FastEvidence
from fast.loss import head_loss
from locality import (
    ALPHA,
    LEAST,
    LIMIT,
    PARTITIONS,
    Evidence,
    Partitioner,
    count_background,
    partition_text,
    schedule,
)
from model import GPT, GPTConfig, attention_weights, clamp_lookback, in_block
from sample import generate
from support.machine import missing_compiler

BYTES = [bytes([i]) for i in range(256)]
SAMPLE = np.frombuffer((ROOT / "data" / "sample.txt").read_bytes(), np.uint8)


def random_lookback(B, T, max_lookback, seed=0):
    """Lookbacks of random blocks, whose starts never move back; different ones in each row."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.rand(B, T, generator=generator) < 0.15
    start = torch.where(new, torch.arange(T), 0).cummax(1).values
    return (torch.arange(T) - start).clamp(max=max_lookback)


def test_everything_in_fast_is_compared_with_its_twin_here():
    mine = (ROOT / "tests" / "test_fast.py").read_text(encoding="utf-8")
    for path in (ROOT / "fast").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                called = path.read_text(encoding="utf-8").count(node.name) > 1  # by a function here
                assert called or node.name in mine, node.name


# ---- attention


class ElsewhereTensor(torch.Tensor):
    """It claims not to be on a CPU, so that a CPU computes with the chunks of a GPU."""

    is_cpu = False


@pytest.mark.parametrize("T", [1, 5, 64, 72, 73, 128, 150, 200, 256])
@pytest.mark.parametrize("max_lookback", [1, 8, 31, 130, 300])
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("where", [torch.Tensor, ElsewhereTensor])
def test_attention_equals_the_definition(T, max_lookback, anchor, where):
    torch.manual_seed(T)
    q, k, v = torch.randn(3, 2, 4, T, 12).unbind(0)
    lookback = clamp_lookback(random_lookback(2, T, max_lookback, seed=T), max_lookback)
    fast, plain = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    mask = block_mask(lookback.as_subclass(where), max_lookback, anchor)
    if where is ElsewhereTensor and T % 128 == 64:
        assert mask.dense is None
    block = in_block(lookback, anchor)[:, None]
    for locality in (1.0, 0.3):
        y = blended_attention(*fast, mask, locality).as_subclass(torch.Tensor)
        expected = attention_weights(plain[0], plain[1], block, locality) @ plain[2]
        assert (y - expected).abs().max() < 1e-5
        weight = torch.randn_like(y)
        gradients = torch.autograd.grad((y * weight).sum(), fast)
        for a, b in zip(gradients, torch.autograd.grad((expected * weight).sum(), plain)):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_locality_no_mask_is_needed():
    q, k, v = torch.randn(3, 1, 2, 50, 8).unbind(0)
    y = blended_attention(q, k, v, BlockMask(), 0.0)
    assert (y - attention_weights(q, k, None, 0.0) @ v).abs().max() < 1e-5


def test_full_locality_gives_exactly_nothing_outside_the_block():
    T, i = 150, 130
    q, k, v = torch.randn(3, 1, 2, T, 16).unbind(0)
    lookback = clamp_lookback(random_lookback(1, T, 8), 8)
    block = in_block(lookback)[:, None]
    assert not attention_weights(q, k, block, 1.0)[~block.expand(1, 2, T, T)].any()
    before = local_attention(q, k, v, block_mask(lookback, 8))[:, :, i]
    far = torch.ones(T, dtype=torch.bool)
    far[i - int(lookback[0, i]) : i + 1] = False
    k[:, :, far], v[:, :, far] = 1e3, 1e3
    assert torch.equal(local_attention(q, k, v, block_mask(lookback, 8))[:, :, i], before)


# ---- the path of a GPU, as far as a CPU can check it


@pytest.mark.parametrize("anchor", [False, True])
def test_no_mask_of_a_gpu_ends_with_half_a_tile_of_keys(anchor):
    """With such a mask cuDNN's attention can return gradients that are NaN (PyTorch 196678)."""
    lookback = torch.zeros(1, 4096, dtype=torch.long, device="meta")  # not a CPU
    for cap in (1, 8, 31, 32, 63, 64, 65, 128, 160, 256, 300, 383, 512, 768, 1000, 1024):
        assert block_mask(lookback, cap, anchor).chunked.size(-1) % 128 == 0
        for T in (64, 128, 192, 300, 320, 960, 1000):
            mask = block_mask(lookback[:, :T], cap, anchor)
            keys = (mask.dense if mask.chunked is None else mask.chunked).size(-1)
            assert keys % 128 != 64 and (mask.chunked is None or keys % 128 == 0)


@pytest.mark.parametrize("T", [128, 200, 384, 500])
@pytest.mark.parametrize("cap", [1, 100, 300])
@pytest.mark.parametrize("anchor", [False, True])
def test_tiles_are_those_that_the_queries_need(T, cap, anchor):
    lookback = clamp_lookback(random_lookback(2, T, cap, seed=T), cap)
    mask = tiled_mask(lookback, anchor)
    sees = F.pad(in_block(lookback, anchor), (0, -T % 128, 0, -T % 128))
    sees = sees.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3)  # (B, n, n, ..)
    needed, whole = sees.any(-1).any(-1), sees.all(-1).all(-1)
    partly = needed & ~whole

    def check(count, order, expected):
        for b, i in np.ndindex(*expected.shape[:2]):
            listed = order[b, 0, i, : count[b, 0, i]].tolist()
            assert listed == expected[b, i].nonzero().flatten().tolist()

    check(mask.kv_num_blocks, mask.kv_indices, partly)
    check(mask.full_kv_num_blocks, mask.full_kv_indices, whole)
    check(mask.q_num_blocks, mask.q_indices, partly.mT)  # for the backward pass
    check(mask.full_q_num_blocks, mask.full_q_indices, whole.mT)


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) != "", reason="needs a compiler")
@torch.no_grad()
def test_a_kernel_that_skips_tiles_computes_the_same():
    torch._dynamo.reset()
    attend = torch.compile(flex.flex_attention)
    q, k, v = torch.randn(3, 2, 1, 500, 16).unbind(0)
    lookback = random_lookback(2, 500, 400)
    lookback[1] = torch.arange(500).clamp(max=400)  # here some tiles are seen whole
    mask = tiled_mask(lookback, anchor=True)
    expected = attention_weights(q, k, in_block(lookback, anchor=True)[:, None], 1.0) @ v
    assert (attend(q, k, v, block_mask=mask) - expected).abs().max() < 1e-5
    mask.full_kv_num_blocks.zero_()  # the kernel does read the lists
    assert (attend(q, k, v, block_mask=mask) - expected).abs().max() > 0.01


@pytest.mark.parametrize("anchor", [False, True])
def test_the_compiled_gpu_path_is_one_graph_with_the_same_gradients(anchor, monkeypatch):
    """A CPU traces FlexAttention, too, but has no backward kernel for it."""
    monkeypatch.setattr("model.flex_applies", lambda *args: torch.compiler.is_compiling())
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    model = small_model(block_size=300, anchor=anchor)
    model.set_locality([0, 0.5, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):  # other tokens and blocks each time
            idx, lookback = torch.randint(0, 101, (2, 300)), random_lookback(2, 300, 8, seed)
            assert_same_step(model, compiled, idx, lookback)


def test_flex_attention_is_used_on_a_gpu_if_possible(monkeypatch):
    cpu = torch.zeros(1, 128)
    gpu = SimpleNamespace(is_cuda=True, size=cpu.size)
    short = SimpleNamespace(is_cuda=True, size=torch.zeros(1, 127).size)
    assert not flex_applies(gpu, 64, 0.0)  # not compiled
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert flex_applies(gpu, 64, 0.0) and flex_applies(gpu, 16, 0.0)
    assert not flex_applies(cpu, 64, 0.0) and not flex_applies(short, 64, 0.0)
    assert not flex_applies(gpu, 8, 0.0) and not flex_applies(gpu, 128, 0.0)
    assert not flex_applies(gpu, 64, 0.1)


# ---- the loss


@pytest.mark.parametrize("rows", [1, 7, 512, 1100])
def test_the_loss_and_its_gradient_are_those_of_all_logits_at_once(rows):
    torch.manual_seed(0)
    V, leaves = 101, (torch.randn(1, rows, 16), torch.randn(128, 16))  # 27 rows of padding
    targets = torch.randint(-1, V, (1, rows))  # some are not scored
    targets[0, 0] = 5
    results = []
    for by_rows in (True, False):
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        if by_rows:
            loss = 0.3 * head_loss(x, weight, targets, V)
        else:
            logits = (x.double() @ weight.double().T)[0, :, :V]
            loss = 0.3 * F.cross_entropy(logits, targets[0], ignore_index=-1)
        for _ in range(2):  # gradients accumulate
            loss.backward(retain_graph=True)
        results.append((loss.double(), x.grad.double(), weight.grad.double()))
    for actual, expected in zip(*results):
        assert (actual - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
    assert not results[0][2][V:].any()
    with torch.no_grad():  # without a gradient
        assert head_loss(*leaves, targets, V).item() == pytest.approx(results[1][0].item() / 0.3)


# ---- the whole model


def small_model(plain=False, **shape):
    torch.manual_seed(0)
    defaults = {"vocab_size": 101, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT(GPTConfig(**{**defaults, "max_lookback": 8, "plain": plain, **shape})).eval()


def assert_same_step(model, other, idx, lookback):
    """The loss and every gradient of two models with the same weights."""
    results = []
    for forward in (model, other):
        loss = forward(idx, lookback, idx)[1]
        results.append([loss, *torch.autograd.grad(loss, [*forward.parameters()])])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["distributed", "quintic", "localist"])
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("T", [1, 33, 150])
def test_a_plain_model_is_the_same_model(name, anchor, T):
    models = [small_model(plain, block_size=150, anchor=anchor) for plain in (False, True)]
    for model in models:
        model.set_locality(schedule(name, 3, 0.7))
    idx, lookback = torch.randint(0, 101, (2, T)), random_lookback(2, T, 8)
    assert_same_step(*models, idx, lookback)
    with torch.no_grad():
        a, b = (model(idx, lookback)[0] for model in models)
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("block_size", [64, 16, 1])
def test_plain_generation_needs_no_cache_and_writes_the_same(block_size):
    texts = []
    for plain in (False, True):
        model = small_model(plain, block_size=block_size)
        model.set_locality([0, 0.5, 1])
        partitioners = [Partitioner(BYTES, "block:7", 8) for _ in range(2)]
        generator = torch.Generator().manual_seed(0)
        texts.append(
            list(generate(model, [[3, 1, 4], [9] * 30], 40, partitioners, generator=generator))
        )
    assert texts[0] == texts[1] and len(texts[0]) == 40


# ---- evidence


@pytest.mark.parametrize("prior", [50, 1e9])
@pytest.mark.parametrize("seed", range(3))
def test_the_evidence_of_many_sentences_at_once_is_that_of_one_after_another(prior, seed):
    rng = np.random.default_rng(seed)
    base = rng.dirichlet(np.ones(40))
    twins = FastEvidence(base, prior, ALPHA, LEAST, LIMIT), Evidence(base, prior)
    for n in (1, 5, 40, 7, 60):
        sizes = rng.integers(0, 12, n)  # some sentences have no words, or the same word twice
        words = rng.integers(0, 40, sizes.sum())
        fast, plain = (twin.gains(words, sizes) for twin in twins)
        assert fast == pytest.approx(plain, abs=1e-9)
        if n == 40:
            for twin in twins:
                twin.reset()


@pytest.mark.parametrize(
    "partition", [n + ":900" * p.takes_n for n, p in PARTITIONS.items() if p.reads_words]
)
@pytest.mark.parametrize("max_lookback", [200, 65535])
def test_plain_blocks_are_the_same_blocks(partition, max_lookback):
    for background in (None, count_background(SAMPLE, BYTES)):
        fast, plain = (
            partition_text(SAMPLE, BYTES, partition, max_lookback, background, plain=plain)
            for plain in (False, True)
        )
        assert (fast == plain).all() and fast.max() > 100


# ---- the whole project


def test_a_plain_run_is_the_same_run_within_rounding(place, run, train):
    train("plain", plain="true")
    losses = []
    for name in ("tiny", "plain"):
        lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line["val_loss"] for line in map(json.loads, lines) if "val_loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 4
    results = []
    for name, options in (("tiny", ()), ("tiny", ("--plain",)), ("plain", ())):
        status, _, error = run("eval.py", place / "runs" / name, "--json", "out.json", *options)
        assert status == 0, error
        results.append(json.loads((place / "out.json").read_text()))
    fast, turned, plain = results
    assert turned["perplexity"] == pytest.approx(fast["perplexity"], rel=1e-5)
    assert plain["perplexity"] == pytest.approx(fast["perplexity"], rel=1e-3)
    for a, b in zip(fast["layers"], turned["layers"]):
        assert a == pytest.approx(b, abs=1e-5)
