"""GPT-2 is GPT-2, and localisation does what its definition says.

Weights come and go whole, or not at all.
"""

import hashlib
import json
import math
import pickle
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from conftest import ROOT
from locality import Partitioner, partition, reach, schedule
from model import (
    GPT,
    GPTConfig,
    attention_weights,
    block_mask,
    choose,
    clamp_lookback,
    head_loss,
    in_block,
    local_attention,
    tiled_mask,
)
from support import weights
from support.files import InputError
from support.machine import missing_compiler
from support.weights import download_gpt2

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def tiny(max_lookback=8, **shape):
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{
                "vocab_size": 101,
                "block_size": 64,
                "n_layer": 3,
                "n_head": 4,
                "n_embd": 32,
                **shape,
            },
            max_lookback=max_lookback,
        )
    ).eval()


def lively(model):
    """The model with larger matrices.

    So it does not repeat the last token for ever, and does not find all tokens as likely.
    """
    with torch.no_grad():
        model.ln_f.weight.mul_(4)
        for p in model.h.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


def published(folder, **shape):
    """A random GPT-2 of `transformers`, its weights in `folder` in the published format."""
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a mistake
        for p in reference.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    folder.mkdir(exist_ok=True)
    torch.save(
        {
            k.removeprefix("transformer."): v
            for k, v in reference.state_dict().items()
            if k != "lm_head.weight"
        },
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )  # as old as the published files
    reference.config.save_pretrained(folder)
    return reference


SMALL = {
    "vocab_size": 101,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


# ---- parity with transformers


@pytest.mark.parametrize(
    "shape",
    [SMALL, {**SMALL, "n_layer": 1, "n_head": 1, "vocab_size": 64}, {}],
    ids=["small", "one layer", "gpt2 124M"],
)
def test_logits_and_loss_equal_transformers_and_back_again(tmp_path, shape):
    reference = published(tmp_path, **shape)
    model = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, reference.config.vocab_size, (2, 33))
    with torch.no_grad():
        logits, loss = model(idx)[0], model(idx, targets=F.pad(idx[:, 1:], (0, 1), value=-1))[1]
        expected = reference(idx, labels=idx)
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss - expected.loss) < 1e-5
    model.save_pretrained(tmp_path / "out")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (again(idx).logits - expected.logits).abs().max() < 1e-5


def test_a_model_begins_as_gpt2_does():
    torch.manual_seed(0)
    model, std = (
        GPT(GPTConfig(64, 64, n_layer=8, n_head=1, n_embd=192)),
        0.04,
    )  # a quarter of the width, twice the std
    for name, p in model.named_parameters():
        if name == "wpe.weight":  # sinusoids: as large, and the nearer two places the more alike
            assert p.square().mean().sqrt().item() == pytest.approx(std, rel=0.05)
            alike = F.cosine_similarity(p[:1], p)
            assert (alike[1:8] < alike[:7]).all() and alike[8:].max() < alike[3]
        elif (
            p.dim() == 2
        ):  # the two matrices of a layer that add to the residual stream are smaller by sqrt(2 * 8)
            assert p.std().item() == pytest.approx(
                std / 4 if "c_proj" in name else std, rel=0.05
            ), name
        else:
            assert (p == (1 if ".ln_" in f".{name}" and name.endswith("weight") else 0)).all(), name


def test_what_transformers_saves_loads_too(tmp_path):
    pytest.importorskip("safetensors")
    reference = published(tmp_path / "bin", **SMALL)
    reference.save_pretrained(tmp_path / "safe")  # model.safetensors, names with "transformer."
    idx = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(
            GPT.from_pretrained(tmp_path / "safe")(idx)[0],
            GPT.from_pretrained(tmp_path / "bin")(idx)[0],
        )


@pytest.mark.parametrize("shape", [SMALL, {}], ids=["small", "gpt2 124M"])
def test_the_gradient_of_every_parameter_equals_that_of_transformers(tmp_path, shape):
    reference = published(tmp_path, **shape).eval()  # without dropout
    model = GPT.from_pretrained(tmp_path)
    V = model.config.vocab_size
    idx = torch.randint(0, V, (2, 20))
    reference(idx, labels=idx).loss.backward()
    loss = model(idx, targets=F.pad(idx[:, 1:], (0, 1), value=-1))[1]
    assert type(loss.grad_fn).__name__ == "HeadLossBackward"
    loss.backward()
    expected = dict(reference.transformer.named_parameters())
    for name, p in model.named_parameters():
        mine, theirs = p.grad, expected.pop(name).grad
        if name == "wte.weight":
            assert not mine[V:].any()  # the padded vocabulary takes no part
            mine = mine[:V]
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            theirs = theirs.T  # they keep these transposed
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max() + 1e-7, name
    assert not expected


@pytest.mark.parametrize("rows", [1, 7, 512, 1100])
def test_the_loss_and_its_gradient_are_those_of_all_logits_at_once(rows):
    torch.manual_seed(0)
    V, leaves = 101, (torch.randn(1, rows, 16), torch.randn(128, 16))  # 27 rows of padding
    targets = torch.randint(-1, V, (1, rows))  # some are not scored
    targets[0, 0] = 5
    found = []
    for by_rows in (True, False):
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        if by_rows:
            loss = 0.3 * head_loss(x, weight, targets, V)
        else:
            logits = (x.double() @ weight.double().T)[0, :, :V]
            loss = 0.3 * F.cross_entropy(logits, targets[0], ignore_index=-1)
        for _ in range(2):  # gradients add up
            loss.backward(retain_graph=True)
        found.append((loss.double(), x.grad.double(), weight.grad.double()))
    for mine, expected in zip(*found):
        assert (mine - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
    assert not found[0][2][V:].any()
    with torch.no_grad():  # nothing to find along the way
        assert head_loss(*leaves, targets, V).item() == pytest.approx(found[1][0].item() / 0.3)


# ---- the dial


def random_lookback(B, T, max_lookback, seed=0):
    """Lookbacks of random blocks, whose starts never go back; other ones in each row."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.rand(B, T, generator=generator) < 0.15
    start = torch.where(new, torch.arange(T), 0).cummax(1).values
    return (torch.arange(T) - start).clamp(max=max_lookback)


def plain_gpt2(model, idx):
    """GPT-2 written down once more, without any locality, with the weights of `model`."""

    def norm(x, layer):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)

    B, T = idx.shape
    x = model.wte.weight[idx] + model.wpe.weight[:T]
    for block in model.h:
        qkv = block.attn.c_attn(norm(x, block.ln_1)).view(B, T, 3, model.config.n_head, -1)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(norm(x, block.ln_2)), approximate="tanh"))
    return (norm(x, model.ln_f) @ model.wte.weight.T)[..., : model.config.vocab_size]


def test_dial_zero_is_plain_gpt2_to_the_bit():
    model, idx = lively(tiny()), torch.randint(0, 101, (2, 40))
    with torch.no_grad():
        plain = plain_gpt2(model, idx)
        assert torch.equal(model(idx)[0], plain)
        model.set_locality([1, 0.5, 0.2])
        turned = model(idx, random_lookback(2, 40, 8))[0]
        model.set_locality([0, 0, 0])
        back = model(idx, random_lookback(2, 40, 8))[0]
    assert torch.equal(plain, back) and not torch.allclose(plain, turned, atol=1e-4)


class ElsewhereTensor(torch.Tensor):
    """It says that it is on no CPU, so that a CPU takes the chunks of a GPU."""

    is_cpu = False


@pytest.mark.parametrize("T", [1, 5, 64, 72, 73, 128, 150, 200, 256])
@pytest.mark.parametrize("max_lookback", [1, 8, 31, 130, 300])
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("where", [torch.Tensor, ElsewhereTensor])
def test_local_attention_equals_the_dense_reference(T, max_lookback, anchor, where):
    torch.manual_seed(T)
    q, k, v = torch.randn(3, 2, 4, T, 12).unbind(0)
    r = clamp_lookback(random_lookback(2, T, max_lookback, seed=T), max_lookback)
    fast, dense = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    mask = block_mask(r.as_subclass(where), max_lookback, anchor)
    if where is ElsewhereTensor and T % 128 == 64:
        assert mask.dense is None
    y = local_attention(*fast, mask).as_subclass(torch.Tensor)
    z = attention_weights(dense[0], dense[1], in_block(r, anchor)[:, None], 1.0) @ dense[2]
    assert (y - z).abs().max() < 1e-5
    weight = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), fast),
        torch.autograd.grad((z * weight).sum(), dense),
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- the path of a GPU, as far as a CPU can check it


@pytest.mark.parametrize("anchor", [False, True])
def test_no_mask_of_a_gpu_ends_with_half_a_tile_of_keys(anchor):
    """There cuDNN's attention can have gradients that are NaN (pytorch issue 196678)."""
    r = torch.zeros(1, 4096, dtype=torch.long, device="meta")  # not a CPU
    for cap in (1, 8, 31, 32, 63, 64, 65, 128, 160, 256, 300, 383, 512, 768, 1000, 1024):
        assert block_mask(r, cap, anchor).chunked.size(-1) % 128 == 0
        for T in (64, 128, 192, 300, 320, 960, 1000):
            mask = block_mask(r[:, :T], cap, anchor)
            keys = (mask.dense if mask.chunked is None else mask.chunked).size(-1)
            assert keys % 128 != 64 and (mask.chunked is None or keys % 128 == 0)


@pytest.mark.parametrize("T", [128, 200, 384, 500])
@pytest.mark.parametrize("cap", [1, 100, 300])
@pytest.mark.parametrize("anchor", [False, True])
def test_tiles_are_those_that_the_queries_need(T, cap, anchor):
    r = clamp_lookback(random_lookback(2, T, cap, seed=T), cap)
    mask = tiled_mask(r, anchor)
    sees = F.pad(in_block(r, anchor), (0, -T % 128, 0, -T % 128))
    sees = (
        sees.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3)
    )  # (B, n, n, 128, 128)
    some, whole = sees.any(-1).any(-1), sees.all(-1).all(-1)
    partly = some & ~whole

    def check(count, order, expected):
        for b, i in np.ndindex(*expected.shape[:2]):
            listed = order[b, 0, i, : count[b, 0, i]].tolist()
            assert listed == expected[b, i].nonzero().flatten().tolist()

    check(mask.kv_num_blocks, mask.kv_indices, partly)
    check(mask.full_kv_num_blocks, mask.full_kv_indices, whole)
    check(mask.q_num_blocks, mask.q_indices, partly.mT)  # for the way back
    check(mask.full_q_num_blocks, mask.full_q_indices, whole.mT)


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) != "", reason="needs a compiler")
@torch.no_grad()
def test_a_kernel_that_skips_tiles_finds_the_same():
    torch._dynamo.reset()
    attend = torch.compile(flex.flex_attention)
    q, k, v = torch.randn(3, 2, 1, 500, 16).unbind(0)
    r = random_lookback(2, 500, 400)
    r[1] = torch.arange(500).clamp(max=400)  # here some tiles are seen whole
    mask = tiled_mask(r, anchor=True)
    expected = attention_weights(q, k, in_block(r, anchor=True)[:, None], 1.0) @ v
    assert (attend(q, k, v, block_mask=mask) - expected).abs().max() < 1e-5
    mask.full_kv_num_blocks.zero_()  # it does read the lists
    assert (attend(q, k, v, block_mask=mask) - expected).abs().max() > 0.01


@pytest.fixture
def fused(monkeypatch):
    """The model takes the path of a GPU; a CPU can do it too, tracing but without a kernel."""
    monkeypatch.setattr(GPT, "fuses", lambda model, lookback: torch.compiler.is_compiling())
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)


@pytest.mark.parametrize("settings", [{}, {"anchor": True}])
def test_the_fused_path_is_one_graph_with_the_same_gradients(settings, fused):
    model = tiny(block_size=300, **settings)
    model.set_locality([0, 0.5, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):  # other tokens and blocks each time
            idx, r = torch.randint(0, 101, (2, 300)), random_lookback(2, 300, 8, seed)
            found = []
            for forward in (model, compiled):
                loss = forward(idx, r, idx)[1]
                found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
            for a, b in zip(*found):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_it_is_taken_on_a_gpu_where_it_can_be(monkeypatch):
    model, lookback = tiny(n_embd=64), torch.zeros(1, 128)
    assert not model.fuses(lookback)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not model.fuses(lookback)
    gpu = SimpleNamespace(is_cuda=True, size=lookback.size)
    assert model.fuses(gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert not model.fuses(gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not model.fuses(SimpleNamespace(is_cuda=True, size=torch.zeros(1, 127).size))
    assert not tiny(n_embd=32).fuses(gpu) and not tiny(n_embd=512).fuses(gpu)  # heads of 8, 128
    model.config.dropout = 0.1
    assert model.eval().fuses(gpu) and not model.train().fuses(gpu)


def test_arithmetic_is_counted_as_wide_as_it_is():
    model = tiny(max_lookback=15)
    n = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    for dial, wide in (([0, 0, 0], 3 * 64), ([0, 0.5, 1], 64 + 80 + 16), ([1, 1, 1], 3 * 16)):
        model.set_locality(dial)
        assert model.flops_per_token(64) == 6 * n + 12 * 32 * wide
    assert model.flops_per_token(8) == 6 * n + 12 * 32 * 3 * 8  # no block is wider than that


@pytest.mark.parametrize("locality", [0.0, 0.3, 1.0])
def test_the_layer_equals_the_dense_blend(locality):
    attn = tiny(max_lookback=8).h[1].attn
    attn.locality = locality
    x, r = torch.randn(2, 137, 32), random_lookback(2, 137, 8)
    q, k, v = attn.qkv(x)
    block = in_block(r)[:, None]
    expected = attn.c_proj(
        (attention_weights(q, k, block, locality) @ v).transpose(1, 2).flatten(2)
    )
    assert (attn(x, block_mask(r, 8)) - expected).abs().max() < 1e-5


def test_the_anchor_widens_the_blocks_and_nothing_else():
    r = random_lookback(2, 40, 8)
    plain, wide = tiny(), tiny(anchor=True)
    first = torch.arange(40) == 0
    assert torch.equal(wide.blocks(r), plain.blocks(r) | first)
    idx = torch.randint(0, 101, (2, 40))
    wide.set_locality([1, 1, 1])
    plain.set_locality([1, 1, 1])
    for a in wide.attention_maps(idx, r):
        assert not a[~wide.blocks(r).expand_as(a)].any()
        assert torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(wide(idx, r)[0], plain(idx, r)[0], atol=1e-4)


def test_dial_one_gives_exactly_nothing_outside_the_block():
    T, i = 150, 130
    q, k, v = torch.randn(3, 1, 2, T, 16).unbind(0)
    r = clamp_lookback(random_lookback(1, T, 8), 8)
    block = in_block(r)[:, None]
    assert not attention_weights(q, k, block, 1.0)[~block.expand(1, 2, T, T)].any()
    before = local_attention(q, k, v, block_mask(r, 8))[:, :, i]
    far = torch.ones(T, dtype=torch.bool)
    far[i - int(r[0, i]) : i + 1] = False
    k[:, :, far], v[:, :, far] = 1e3, 1e3
    assert torch.equal(local_attention(q, k, v, block_mask(r, 8))[:, :, i], before)


TOKENS = np.frombuffer((ROOT / "data" / "sample.txt").read_bytes()[:9000], np.uint8).astype(int)
BYTES = [bytes([i]) for i in range(256)]


def localist(seed, lookback, cap=250):
    """A random model, every layer at 1, and what it makes of 300 tokens in the given blocks."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(256, 300, 6, 2, 16, max_lookback=cap)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.set_locality([1.0] * 6)
    lookback = torch.from_numpy(lookback)[None]
    return lambda idx: model(torch.from_numpy(idx)[None], lookback)[0][0]


@pytest.mark.parametrize("cap", [250, 64])  # attention with one dense mask; in chunks
@pytest.mark.parametrize("method", ["semantic:closed", "sentence", "block:60", "aligned:40"])
@torch.no_grad()
def test_closed_blocks_are_blind_to_what_lies_before_them_to_the_bit(method, cap):
    """A certificate from end to end: whatever the text before the block, and whatever the weights,
    with every layer at 1 the output is the same."""
    found = partition(TOKENS, BYTES, method, cap).astype(int)
    checked = 0
    for seed, at in enumerate((1000, 4200, 7700)):
        rng = np.random.default_rng(seed)
        idx = TOKENS[at : at + 300]
        lookback = np.minimum(found[at : at + 300], np.arange(300))
        start, run = np.arange(300) - lookback, localist(seed, lookback, cap)
        logits = run(idx)
        assert (reach(lookback, [1.0] * 6) == start).all()
        for begin in np.unique(start)[1:]:
            mine = start == begin
            other = np.append(rng.integers(0, 256, begin), idx[begin:])
            assert (other != idx).any() and torch.equal(run(other)[mine], logits[mine])
            checked += 1
    assert checked > 2


@torch.no_grad()
def test_semantic_blocks_are_not_and_what_can_reach_a_token_does():
    """The reach is attained: the earliest token that may change an output does change it, and no
    earlier one does."""
    found = partition(TOKENS, BYTES, "semantic", 60).astype(int)
    inside = further = 0
    for seed, at in enumerate((1000, 4200)):
        idx = TOKENS[at : at + 300]
        lookback = np.minimum(found[at : at + 300], np.arange(300))
        run, earliest = localist(seed, lookback), reach(lookback, [1.0] * 6)
        logits = run(idx)
        for token in range(20, 300, 20):
            first = earliest[token]
            further += first < token - lookback[token]
            other = idx.copy()
            other[first] = (other[first] + 1) % 256
            assert not torch.equal(run(other)[token], logits[token])
            if first > 0:
                other = np.append((idx[:first] + 1) % 256, idx[first:])
                assert torch.equal(run(other)[token], logits[token])
                inside += 1
    assert inside > 3 and further > 10


def test_fidelity_is_certified_and_entropy_bounded_whatever_the_weights():
    model = tiny(max_lookback=16)
    with torch.no_grad():
        # wild weights: scores of any size, attention that hates its block
        for p in model.parameters():
            p.mul_(30)
    model.set_locality([0.1, 0.5, 0.9])
    idx, r = torch.randint(0, 101, (4, 64)), random_lookback(4, 64, 16)
    size = (r + 1).double()[:, None]  # (B, 1, T): |B_i|
    outside = torch.arange(1, 65) - size
    for locality, a in zip(model.locality, model.attention_maps(idx, r)):
        a = a.double()
        m = (a * in_block(r)[:, None]).sum(-1).clamp(0, 1)  # (B, H, T)
        assert (m >= locality - 1e-6).all()
        entropy = torch.special.entr(a).sum(-1) / math.log(2)
        h2 = (torch.special.entr(m) + torch.special.entr(1 - m)) / math.log(2)
        assert (
            entropy <= h2 + m * size.log2() + (1 - m) * outside.clamp(min=1).log2() + 1e-5
        ).all()


def test_a_lookback_that_reaches_out_of_the_context_is_cut_at_its_edge():
    model, idx = tiny(max_lookback=8), torch.randint(0, 101, (1, 20))
    model.set_locality([1, 1, 1])
    with torch.no_grad():
        assert torch.equal(
            model(idx, torch.full((1, 20), 500))[0],
            model(idx, torch.arange(20)[None].clamp(max=8))[0],
        )


def test_the_dial_wants_one_number_a_layer_and_a_lookback():
    model = tiny()
    for wrong in ([0.5], [0, 0, 1.1], [0, 0, float("nan")]):
        with pytest.raises(InputError):
            model.set_locality(wrong)
    model.set_locality([0, 0, 1])
    with pytest.raises(InputError, match="lookback"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("settings", [{}, {"anchor": True}])
def test_compiles_to_one_graph_that_lasts_for_a_whole_run(settings):
    model = tiny(block_size=100, **settings).train()
    model.set_locality([0, 0.5, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # steps of other tokens and blocks, with a look at the validation split in between
        for seed in range(4):
            idx, r = torch.randint(0, 101, (2, 90)), random_lookback(2, 90, 8, seed)
            with torch.no_grad():
                expected = model.eval()(idx, r, idx)[1]
            loss = compiled.train()(idx, r, idx)[1]
            assert torch.allclose(loss, expected, atol=1e-6)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def test_dropout_is_in_training_alone_and_in_every_place():
    torch.manual_seed(0)
    model = GPT(GPTConfig(101, 100, n_layer=1, n_head=4, n_embd=32, dropout=0.5, max_lookback=8))
    attn, mask = model.h[0].attn, block_mask(random_lookback(2, 100, 8), 8)
    x, idx = torch.randn(2, 100, 32), torch.randint(0, 101, (2, 100))
    with torch.no_grad():  # every value is 1: what comes out is the sum of the attention weights
        for p in attn.parameters():
            p.zero_()
        attn.c_attn.bias[64:] = 1
        attn.c_proj.weight.copy_(torch.eye(32))
    for locality in (0, 0.5, 1):
        attn.locality = locality
        y = attn.train()(x, mask)
        left = y[y != 0]
        assert 0.3 < len(left) / y.numel() < 0.6  # of the output
        assert (left - 2).abs().mean() > 0.1  # of the weights
        assert torch.allclose(attn.eval()(x, mask), torch.ones(()))
    for part, value in ((model.embed, idx), (model.h[0].mlp, x)):
        model.train()
        assert 0.4 < (part(value) == 0).float().mean() < 0.6
        model.eval()
        assert (part(value) != 0).all() and torch.equal(part(value), part(value))


# ---- generation

VOCABULARY = [b"ab. "[i % 4 : i % 4 + 1] for i in range(101)]


def uncached_logits(model, tokens, prompt, method):
    """The logits that each of the tokens after the prompt was chosen from, (n, V).

    The whole context is read anew for each. A full context goes on with its last half.
    """
    size, start, logits = model.config.block_size, 0, []
    lookback = torch.from_numpy(
        partition(tokens, VOCABULARY, method, model.config.max_lookback).astype(int)
    )
    for end in range(prompt, len(tokens)):
        if end - start > size:
            start = end - (size + 1) // 2
        with torch.no_grad():
            logits.append(
                model(torch.tensor([tokens[start:end]]), lookback[None, start:end])[0][0, -1]
            )
    return torch.stack(logits)


def record_logits(model):
    """A list that fills with the logits, (B, V), that `generate` chooses from."""
    seen, head = [], model.head
    model.head = lambda x: seen.append(head(x)) or seen[-1]
    return seen


@pytest.mark.parametrize("settings", [{}, {"anchor": True}])
@pytest.mark.parametrize("name", ["distributed", "quintic", "localist"])
@pytest.mark.parametrize("block_size", [64, 16, 5, 1])
def test_the_cache_changes_nothing(settings, name, block_size):
    model = lively(tiny(block_size=block_size, **settings))
    model.set_locality(schedule(name, 3))
    prompts = [
        [3, 1, 4, 1, 5],
        [9],
        list(range(2, 32)),
    ]  # the third does not fit, but where the block size is 64
    seen = record_logits(model)
    for temperature in (0, 9):  # greedy; and hot enough for a text in which no two tokens are alike
        seen.clear()
        partitioners = [Partitioner(VOCABULARY, "sentence", 8) for _ in prompts]
        generator = torch.Generator().manual_seed(0)
        found = list(
            zip(*model.generate(prompts, 40, partitioners, temperature, generator=generator))
        )
        for prompt, tokens, logits in zip(prompts, found, torch.stack(seen[:40], 1)):
            expected = uncached_logits(
                model, prompt + list(tokens), len(prompt), "sentence"
            )  # (40, V)
            assert (logits - expected).abs().max() < 1e-3
            if temperature == 0:  # the same tokens, but where two are as likely to within rounding
                chosen = expected.take_along_dim(torch.tensor(tokens)[:, None], 1)[:, 0]
                assert (chosen > expected.amax(-1) - 2e-3).all()
            else:
                assert len(set(tokens)) > 20


def test_a_local_layer_keeps_its_last_keys_and_no_more():
    model, kept = tiny(block_size=64, anchor=True), []
    model.set_locality([0, 0.9, 1])
    step = model.step
    model.step = lambda *args: kept.append([cache.k.size(2) for cache in args[-1]]) or step(*args)
    list(model.generate([[1, 2, 3]], 60, [Partitioner(VOCABULARY, "window:9", 8)]))
    assert (
        kept == [[63, 63, 8 + 1 + 1]] * 59
    )  # the block reaches 8 back from the token itself; and token 0


def test_generation_needs_the_blocks_where_the_dial_is_up():
    model = tiny()
    assert len(list(model.generate([[1, 2]], 3, generator=torch.Generator().manual_seed(0)))) == 3
    model.set_locality([0, 0, 1])
    with pytest.raises(InputError, match="lookback"):
        list(model.generate([[1, 2]], 3))


def test_temperature_and_top_k_and_top_p_shape_the_choice():
    logits, generator = (
        3 * torch.randn(1, 101, generator=torch.Generator().manual_seed(0)),
        torch.Generator().manual_seed(0),
    )
    order = logits[0].argsort(descending=True)
    p = logits[0].softmax(-1)[order]

    def ranks(**how):  # how many tokens were likelier than the one that was chosen
        tokens = choose(logits.expand(3000, -1), generator=generator, **how)
        return torch.bincount((logits[0] > logits[0][tokens, None]).sum(-1), minlength=101) / 3000

    assert (ranks() - p).abs().max() < 0.04
    assert (
        ranks(temperature=0)[0]
        == ranks(temperature=1e-4)[0]
        == ranks(top_k=1)[0]
        == ranks(top_p=1e-6)[0]
        == 1
    )
    hot = ranks(temperature=50, top_k=3)
    assert hot[3:].sum() == 0 and hot[:3].min() > 0.25  # any of three, each about as often
    assert ranks(temperature=50)[60:].sum() > 0.3
    for k in (1, 2, 5, 20):  # exactly so many are needed
        kept = ranks(top_p=float(p[:k].sum() - p[k - 1] / 2))
        assert kept[k:].sum() == 0 and (kept[:k] - p[:k] / p[:k].sum()).abs().max() < 0.04
    both = choose(torch.stack((logits[0], -logits[0])), temperature=0)  # each row on its own
    assert both.tolist() == [order[0], order[-1]]


# ---- weights that are not what they should be


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def break_truncate(path):
    path.write_bytes(path.read_bytes()[:-5000])


def break_garbage(path):
    path.write_bytes(b"<html>not found</html>")


def break_empty(path):
    path.write_bytes(b"")


def break_missing(path):
    state = torch.load(path, weights_only=True)
    del state["h.1.mlp.c_fc.bias"]
    torch.save(state, path)


def break_shape(path):
    state = torch.load(path, weights_only=True)
    state["h.1.mlp.c_fc.bias"] = torch.zeros(7)
    torch.save(state, path)


def break_list(path):
    torch.save([torch.zeros(3)], path)


def break_pickle(path):
    path.write_bytes(pickle.dumps(Bomb(path.with_name("executed"))))


def break_zip_pickle(path):
    torch.save({"wte.weight": Bomb(path.with_name("executed"))}, path)


@pytest.mark.parametrize(
    "damage",
    [
        break_truncate,
        break_garbage,
        break_empty,
        break_missing,
        break_shape,
        break_list,
        break_pickle,
        break_zip_pickle,
    ],
)
def test_a_bad_weights_file_is_refused_by_name(tmp_path, damage):
    published(tmp_path, **SMALL)
    damage(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        InputError,
        match="pytorch_model.bin.*refused" if "pickle" in damage.__name__ else "pytorch_model.bin",
    ):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_another_model_than_gpt2_is_refused(tmp_path, key, value):
    published(tmp_path, **SMALL)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=key):
        GPT.from_pretrained(tmp_path)


def test_weights_that_do_not_say_enough_or_say_too_much_are_refused(tmp_path):
    reference = published(tmp_path, **SMALL)
    path, untied = tmp_path / "pytorch_model.bin", tmp_path / "untied.bin"
    torch.save({**reference.state_dict(), "lm_head.weight": torch.zeros(101, 48)}, untied)
    with pytest.raises(InputError, match="lm_head"):
        GPT.from_pretrained(untied)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="config.json.*heads"):  # 48 wide: of how many heads?
        GPT.from_pretrained(path)
    whole = asdict(tiny().config)
    for config in ({}, {**whole, "vocab_size": 2**62}, {**whole, "n_layer": torch.zeros(2)}):
        torch.save({"model": tiny().state_dict(), "model_config": config}, tmp_path / "best.pt")
        with pytest.raises(InputError, match="best.pt"):
            GPT.from_pretrained(tmp_path)


def test_the_export_says_what_the_model_is(tmp_path):
    tiny(dropout=0.25).save_pretrained(tmp_path)
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.25
    assert (
        config.vocab_size,
        config.n_positions,
        config.n_layer,
        config.n_head,
        config.n_embd,
    ) == (101, 64, 3, 4, 32)
    assert (
        GPT.from_pretrained(tmp_path, dropout=0.25, max_lookback=8).config
        == tiny(dropout=0.25).config
    )


def test_names_that_lead_nowhere(tmp_path):
    for name in ("gpt3", tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError):
            GPT.from_pretrained(name)


# ---- download, from a server on this machine


@pytest.fixture
def hub(tmp_path, monkeypatch, serve):
    """A mirror that serves a small GPT-2 as `gpt2`.

    Returns its files, a dict that tests may break, and the published folder.
    """
    published(tmp_path / "published", **{**SMALL, "n_layer": 1, "n_embd": 768, "n_head": 12})
    content = (tmp_path / "published" / "pytorch_model.bin").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n"
    gpt2, medium = "/openai-community/gpt2", "/openai-community/gpt2-medium"
    base, files = serve(
        {
            f"{gpt2}/resolve/main/pytorch_model.bin": content,
            f"{medium}/resolve/main/pytorch_model.bin": content,
            f"{medium}/raw/main/pytorch_model.bin": f"{pointer}size {len(content)}\n".encode(),
        }
    )
    monkeypatch.setenv("HF_ENDPOINT", base)
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        weights,
        "PRETRAINED",
        {"gpt2": (len(content), sha256), "gpt2-medium": (len(content), None)},
    )
    return files, tmp_path / "published"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
def test_downloads_once_and_equals_what_was_published(hub, name, tmp_path):
    files, folder = hub
    model = GPT.from_pretrained(name)
    files.clear()  # a second time it comes from the cache
    again = GPT.from_pretrained(name)
    expected = GPT.from_pretrained(folder).state_dict()
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key], value)
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda content: content[:-100], "bytes"),  # another length
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "sha256"),  # another content
        (lambda content: (content[:1000], len(content)), "broke off"),  # breaks off in the middle
        (lambda content: None, "404"),
    ],
)
def test_a_download_that_is_not_whole_is_named_and_not_kept(hub, change, says, tmp_path):
    files, _ = hub
    path = "/openai-community/gpt2/resolve/main/pytorch_model.bin"
    files[path] = change(files[path])
    with pytest.raises(InputError, match=says):
        download_gpt2("gpt2")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_no_network_is_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(weights, "CACHE", tmp_path)
    with pytest.raises(InputError, match="local folder"):
        GPT.from_pretrained("gpt2")
