"""GPT-2 is GPT-2; localisation does what its definition says; weights come and go whole or not at all."""

import hashlib
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from locality import InputError
from model import (GPT, GPTConfig, attention_weights, block_mask, clamp_lookback, download_gpt2, in_block,
                   local_attention)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def tiny(max_lookback=8, **shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab_size": 101, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32, **shape},
                         max_lookback=max_lookback)).eval()


def published(folder, **shape):
    """A randomly initialised GPT-2 of `transformers`, its weights in `folder` in the published format."""
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():    # biases and norms start at constants, which would hide a mistake
        for p in reference.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    folder.mkdir(exist_ok=True)
    torch.save({k.removeprefix("transformer."): v for k, v in reference.state_dict().items() if k != "lm_head.weight"},
               folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)    # as old as the published files
    reference.config.save_pretrained(folder)
    return reference


SMALL = {"vocab_size": 101, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 0,
         "eos_token_id": 0}


# ---- parity with transformers


@pytest.mark.parametrize("shape", [SMALL, {**SMALL, "n_layer": 1, "n_head": 1, "vocab_size": 64}, {}],
                         ids=["small", "one layer", "gpt2 124M"])
def test_logits_and_loss_equal_transformers_and_back_again(tmp_path, shape):
    reference = published(tmp_path, **shape)
    model = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, reference.config.vocab_size, (2, 33))
    with torch.no_grad():
        logits, loss = model(idx, targets=F.pad(idx[:, 1:], (0, 1), value=-1))
        expected = reference(idx, labels=idx)
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss - expected.loss) < 1e-5
    model.save_pretrained(tmp_path / "out")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (again(idx).logits - expected.logits).abs().max() < 1e-5


def test_what_transformers_saves_loads_too(tmp_path):
    pytest.importorskip("safetensors")
    reference = published(tmp_path / "bin", **SMALL)
    reference.save_pretrained(tmp_path / "safe")    # model.safetensors, names with "transformer."
    idx = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(GPT.from_pretrained(tmp_path / "safe")(idx)[0], GPT.from_pretrained(tmp_path / "bin")(idx)[0])


def test_gradients_equal_transformers(tmp_path):
    reference = published(tmp_path, **SMALL)
    model = GPT.from_pretrained(tmp_path)
    idx = torch.randint(0, 101, (2, 20))
    reference(idx, labels=idx).loss.backward()
    model(idx, targets=F.pad(idx[:, 1:], (0, 1), value=-1))[1].backward()
    assert torch.allclose(model.wte.weight.grad[:101], reference.transformer.wte.weight.grad, atol=1e-5)
    assert torch.allclose(model.h[1].attn.c_attn.weight.grad.T, reference.transformer.h[1].attn.c_attn.weight.grad,
                          atol=1e-5)
    assert not model.wte.weight.grad[101:].any()    # the padded vocabulary takes no part


# ---- the dial


def random_lookback(B, T, max_lookback, seed=0):
    """Lookbacks of random blocks, the starts of which never go back; a different one for each row."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.rand(B, T, generator=generator) < 0.15
    start = torch.where(new, torch.arange(T), 0).cummax(1).values
    return (torch.arange(T) - start).clamp(max=max_lookback)


def test_dial_zero_is_plain_gpt2_to_the_bit():
    model, idx = tiny(), torch.randint(0, 101, (2, 40))
    with torch.no_grad():
        plain = model(idx)[0]
        model.set_locality([1, 0.5, 0.2])
        turned = model(idx, random_lookback(2, 40, 8))[0]
        model.set_locality([0, 0, 0])
        back = model(idx, random_lookback(2, 40, 8))[0]
    assert torch.equal(plain, back) and not torch.allclose(plain, turned, atol=1e-4)


@pytest.mark.parametrize("T", [1, 5, 8, 9, 16, 24, 37, 64])
@pytest.mark.parametrize("max_lookback", [1, 8, 15, 100])
def test_local_attention_equals_the_dense_reference(T, max_lookback):
    torch.manual_seed(T)
    q, k, v = torch.randn(3, 2, 4, T, 12).unbind(0)
    r = clamp_lookback(random_lookback(2, T, max_lookback, seed=T), max_lookback)
    fast, dense = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    y = local_attention(*fast, block_mask(r, max_lookback))
    z = attention_weights(dense[0], dense[1], r, 1.0) @ dense[2]
    assert (y - z).abs().max() < 1e-5
    weight = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad((y * weight).sum(), fast), torch.autograd.grad((z * weight).sum(), dense)):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("locality", [0.0, 0.3, 1.0])
def test_the_layer_equals_the_dense_blend(locality):
    attn = tiny(max_lookback=8).h[1].attn
    attn.locality = locality
    x, r = torch.randn(2, 37, 32), random_lookback(2, 37, 8)
    q, k, v = attn.qkv(x)
    expected = attn.c_proj((attention_weights(q, k, r, locality) @ v).transpose(1, 2).flatten(2))
    assert (attn(x, block_mask(r, 8)) - expected).abs().max() < 1e-5


def test_dial_one_gives_exactly_nothing_outside_the_block():
    T, i = 50, 30
    q, k, v = torch.randn(3, 1, 2, T, 16).unbind(0)
    r = clamp_lookback(random_lookback(1, T, 8), 8)
    outside = ~in_block(r)[:, None].expand(1, 2, T, T)
    assert not attention_weights(q, k, r, 1.0)[outside].any()
    before = local_attention(q, k, v, block_mask(r, 8))[:, :, i]
    far = torch.ones(T, dtype=torch.bool)
    far[i - int(r[0, i]):i + 1] = False
    k[:, :, far], v[:, :, far] = 1e3, 1e3
    assert torch.equal(local_attention(q, k, v, block_mask(r, 8))[:, :, i], before)


def test_fidelity_is_certified_and_entropy_bounded_whatever_the_weights():
    model = tiny(max_lookback=16)
    with torch.no_grad():
        for p in model.parameters():    # wild weights: scores of any size, attention that hates its block
            p.mul_(30)
    model.set_locality([0.1, 0.5, 0.9])
    idx, r = torch.randint(0, 101, (4, 64)), random_lookback(4, 64, 16)
    size = (r + 1).double()[:, None]                                    # (B, 1, T): |B_i|
    outside = torch.arange(1, 65) - size
    for locality, a in zip(model.locality, model.attention_maps(idx, r)):
        a = a.double()
        m = (a * in_block(r)[:, None]).sum(-1).clamp(0, 1)              # (B, H, T)
        assert (m >= locality - 1e-6).all()
        entropy = torch.special.entr(a).sum(-1) / math.log(2)
        h2 = (torch.special.entr(m) + torch.special.entr(1 - m)) / math.log(2)
        assert (entropy <= h2 + m * size.log2() + (1 - m) * outside.clamp(min=1).log2() + 1e-5).all()


def test_a_lookback_that_reaches_out_of_the_context_is_cut_at_its_edge():
    model, idx = tiny(max_lookback=8), torch.randint(0, 101, (1, 20))
    model.set_locality([1, 1, 1])
    with torch.no_grad():
        assert torch.equal(model(idx, torch.full((1, 20), 500))[0],
                           model(idx, torch.arange(20)[None].clamp(max=8))[0])


def test_the_dial_wants_one_number_a_layer_and_a_lookback():
    model = tiny()
    for wrong in ([0.5], [0, 0, 1.1], [0, 0, float("nan")]):
        with pytest.raises(InputError):
            model.set_locality(wrong)
    model.set_locality([0, 0, 1])
    with pytest.raises(InputError, match="lookback"):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_compiles_to_one_graph():
    model, idx, r = tiny(), torch.randint(0, 101, (2, 40)), random_lookback(2, 40, 8)
    model.set_locality([0, 0.5, 1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(idx, r, idx)[1], model(idx, r, idx)[1], atol=1e-6)


def test_greedy_generation_follows_the_logits_past_the_block_size():
    model, prompt = tiny(block_size=16), [3, 1, 4, 1, 5]
    tokens = list(prompt)
    for token in model.generate(prompt, 20, temperature=0):
        assert token == model(torch.tensor([tokens[-16:]]))[0][0, -1].argmax()
        tokens.append(token)
    assert len(tokens) == 25


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


@pytest.mark.parametrize("damage", [break_truncate, break_garbage, break_empty, break_missing, break_shape, break_list,
                                    break_pickle, break_zip_pickle])
def test_a_bad_weights_file_is_refused_by_name(tmp_path, damage):
    published(tmp_path, **SMALL)
    damage(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin.*refused" if "pickle" in damage.__name__ else "pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_names_that_lead_nowhere(tmp_path):
    for name in ("gpt3", tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError):
            GPT.from_pretrained(name)


# ---- download, from a server on this machine


@pytest.fixture
def hub(tmp_path, monkeypatch, serve):
    """A mirror that serves a small GPT-2 as `gpt2`: (its files, a dict that tests may break; the published folder)."""
    published(tmp_path / "published", **{**SMALL, "n_layer": 1, "n_embd": 768, "n_head": 12})
    content = (tmp_path / "published" / "pytorch_model.bin").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    base, files = serve({"/openai-community/gpt2/resolve/main/pytorch_model.bin": content,
                         "/openai-community/gpt2-medium/resolve/main/pytorch_model.bin": content,
                         "/openai-community/gpt2-medium/raw/main/pytorch_model.bin":
                             f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()})
    monkeypatch.setenv("HF_ENDPOINT", base)
    monkeypatch.setattr(model_module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(model_module, "PRETRAINED", {"gpt2": (len(content), sha256), "gpt2-medium": (len(content), None)})
    return files, tmp_path / "published"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
def test_downloads_once_and_equals_what_was_published(hub, name, tmp_path):
    files, folder = hub
    model = GPT.from_pretrained(name)
    files.clear()    # a second time it comes from the cache
    again = GPT.from_pretrained(name)
    expected = GPT.from_pretrained(folder).state_dict()
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key], value) and torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("change, says", [
    (lambda content: content[:-100], "bytes"),                        # another length
    (lambda content: content[:-1] + b"?", "sha256"),                  # another content
    (lambda content: (content[:1000], len(content)), "broke off"),    # breaks off in the middle
    (lambda content: None, "404"),
])
def test_a_download_that_is_not_whole_is_named_and_not_kept(hub, change, says, tmp_path):
    files, _ = hub
    path = "/openai-community/gpt2/resolve/main/pytorch_model.bin"
    files[path] = change(files[path])
    with pytest.raises(InputError, match=says):
        download_gpt2("gpt2")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_no_network_is_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")    # nobody listens there
    monkeypatch.setattr(model_module, "CACHE", tmp_path)
    with pytest.raises(InputError, match="local folder"):
        GPT.from_pretrained("gpt2")
