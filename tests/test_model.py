"""GPT-2 is GPT-2, and localization does what its definition says."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from eval import attention_maps
from locality import partition_text, reach
from model import GPT, GPTConfig, in_block
from support.console import flops_per_token
from support.files import InputError

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def tiny(max_lookback=8, **shape):
    torch.manual_seed(0)
    defaults = {"vocab_size": 101, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT(GPTConfig(**{**defaults, **shape}, max_lookback=max_lookback)).eval()


def lively(model):
    """The model with larger matrices, so that its tokens are not all equally likely."""
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


def test_arithmetic_is_counted_as_wide_as_it_is():
    model = tiny(max_lookback=15)
    n = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    for locality, width in (([0, 0, 0], 3 * 64), ([0, 0.5, 1], 64 + 80 + 16), ([1, 1, 1], 3 * 16)):
        model.set_locality(locality)
        assert flops_per_token(model, 64) == 6 * n + 12 * 32 * width
    assert flops_per_token(model, 8) == 6 * n + 12 * 32 * 3 * 8  # no block is wider than that


def test_the_anchor_widens_the_blocks_and_nothing_else():
    r = random_lookback(2, 40, 8)
    plain, wide = tiny(), tiny(anchor=True)
    first = torch.arange(40) == 0
    assert torch.equal(wide.in_block(r), plain.in_block(r) | first)
    idx = torch.randint(0, 101, (2, 40))
    wide.set_locality([1, 1, 1])
    plain.set_locality([1, 1, 1])
    for a in attention_maps(wide, idx, r):
        assert not a[~wide.in_block(r).expand_as(a)].any()
        assert torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(wide(idx, r)[0], plain(idx, r)[0], atol=1e-4)


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
@pytest.mark.parametrize("partition", ["semantic:closed", "sentence", "block:60", "aligned:40"])
@torch.no_grad()
def test_closed_blocks_are_blind_to_what_lies_before_them_to_the_bit(partition, cap):
    """A certificate from end to end: whatever the text before the block, and whatever the weights,
    with every layer at 1 the output is the same."""
    blocks = partition_text(TOKENS, BYTES, partition, cap).astype(int)
    checked = 0
    for seed, at in enumerate((1000, 4200, 7700)):
        rng = np.random.default_rng(seed)
        idx = TOKENS[at : at + 300]
        lookback = np.minimum(blocks[at : at + 300], np.arange(300))
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
    blocks = partition_text(TOKENS, BYTES, "semantic", 60).astype(int)
    inside = further = 0
    for seed, at in enumerate((1000, 4200)):
        idx = TOKENS[at : at + 300]
        lookback = np.minimum(blocks[at : at + 300], np.arange(300))
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
    for locality, a in zip(model.locality, attention_maps(model, idx, r)):
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


@pytest.mark.parametrize("plain", [False, True])
def test_dropout_is_only_in_training_and_in_every_place(plain):
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 32, "dropout": 0.5, "max_lookback": 8}
    model = GPT(GPTConfig(101, 100, **shape, plain=plain))
    attn, lookback = model.h[0].attn, random_lookback(2, 100, 8)
    x, idx = torch.randn(2, 100, 32), torch.randint(0, 101, (2, 100))
    with torch.no_grad():  # every value is 1, so the output is the sum of the attention weights
        for p in attn.parameters():
            p.zero_()
        attn.c_attn.bias[64:] = 1
        attn.c_proj.weight.copy_(torch.eye(32))
    for locality in (0, 0.5, 1):
        model.set_locality([locality])
        mask = model.mask(lookback)
        y = attn.train()(x, mask)
        left = y[y != 0]
        assert 0.3 < len(left) / y.numel() < 0.6  # of the output
        assert (left - 2).abs().mean() > 0.1  # of the weights
        assert torch.allclose(attn.eval()(x, mask), torch.ones(()))
    inputs = []
    model.h[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for training, low, high in ((True, 0.4, 0.6), (False, 0, 0)):
        model.train(training)
        model(idx, lookback)
        for dropped in (inputs[-1] == 0, model.h[0].mlp(x) == 0):  # of the embedding, of the MLP
            assert low <= dropped.float().mean() <= high
