"""Weights come and go whole, or not at all."""

import hashlib
import json
from dataclasses import asdict

import pytest
import torch

from model import GPT, GPTConfig
from support import weights
from support.files import InputError

SHAPE = {"vocab_size": 101, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 48}


def published(folder, **shape):
    """The path of a small random GPT-2, written in the old format, like the published ones."""
    torch.manual_seed(0)
    GPT(GPTConfig(**{**SHAPE, **shape})).save_pretrained(folder)
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    del state["lm_head.weight"]
    state = {name.removeprefix("transformer."): v for name, v in state.items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def changed(path, **tensors):
    """Save the weights again with other tensors; None removes one."""
    state = {**torch.load(path, weights_only=True), **tensors}
    torch.save({name: v for name, v in state.items() if v is not None}, path)


BIAS, POSITIONS = "h.1.mlp.c_fc.bias", "wpe.weight"
DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "not a readable"),
    "a web page": (lambda path: path.write_bytes(b"<html>not found</html>"), "refused"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable"),
    "a tensor less": (lambda path: changed(path, **{BIAS: None}), f"{BIAS} is missing"),
    "a shape": (lambda path: changed(path, **{BIAS: torch.zeros(7)}), r"shape \(7,\), expected"),
    "not finite": (lambda path: changed(path, **{BIAS: torch.zeros(192) / 0}), "finite numbers"),
    "integers": (lambda path: changed(path, **{BIAS: torch.ones(192).int()}), "finite numbers"),
    "no matrix": (lambda path: changed(path, **{POSITIONS: torch.zeros(9)}), "no GPT-2"),
    "no positions": (lambda path: changed(path, **{POSITIONS: torch.zeros(0, 48)}), "no GPT-2"),
    "untied": (lambda path: changed(path, **{"lm_head.weight": torch.ones(101, 48)}), "lm_head"),
    "a list": (lambda path: torch.save([torch.zeros(3)], path), "not the weights"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_weights_file_is_refused_by_name(tmp_path, name):
    damage, message = DAMAGES[name]
    damage(published(tmp_path))
    with pytest.raises(InputError, match=f"pytorch_model.bin: .*{message}"):
        GPT.from_pretrained(tmp_path)


OTHERS = {"activation_function": "relu", "layer_norm_epsilon": 1e-6, "n_inner": 100, "n_head": 5}
OTHERS |= {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}


@pytest.mark.parametrize("key, value", [*OTHERS.items(), ("n_head", None)])
def test_another_model_than_gpt2_is_refused(tmp_path, key, value):
    path = published(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=f"(config.json|model.bin).*{key}"):
        GPT.from_pretrained(path)


CHANGES = [("vocab_size", 2**62), ("vocab_size", 30), ("vocab_size", 0), ("block_size", 65)]
CHANGES += [("n_layer", torch.zeros(2)), ("n_head", 5), ("max_lookback", [1]), ("depth", 1)]
CHANGES += [(name, None) for name in SHAPE]  # keys that are missing


@pytest.mark.parametrize("key, value", CHANGES)
def test_a_model_config_that_does_not_match_its_weights_is_refused(tmp_path, key, value):
    model = GPT(GPTConfig(**SHAPE))
    config = {**asdict(model.config), key: value}
    if value is None:
        del config[key]
    torch.save({"model": model.state_dict(), "model_config": config}, tmp_path / "best.pt")
    with pytest.raises(InputError, match="best.pt"):
        GPT.from_pretrained(tmp_path)


def test_a_model_may_use_fewer_positions_but_not_more(tmp_path):
    path = published(tmp_path)
    whole, short = GPT.from_pretrained(path), GPT.from_pretrained(path, 16)
    assert short.config.block_size == 16 and whole.config.block_size == 64
    assert torch.equal(short.wpe.weight, whole.wpe.weight[:16])
    assert whole.wte.weight.shape == (128, 48) and not whole.wte.weight[101:].any()
    with pytest.raises(InputError, match="bin has 64 positions, block_size 65 needs more"):
        GPT.from_pretrained(path, 65)


def test_the_export_says_what_the_model_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(**SHAPE, dropout=0.25, max_lookback=8)
    GPT(config).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path, dropout=0.25, max_lookback=8).config == config
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    assert theirs.attn_pdrop == theirs.embd_pdrop == theirs.resid_pdrop == 0.25
    assert SHAPE.items() <= {**theirs.to_dict(), "block_size": theirs.n_positions}.items()


def test_what_is_missing_is_named(tmp_path):
    for name in ("gpt3", tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError):
            weights.find(name)
    path = published(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="config.json.*heads"):  # 48 wide: how many heads?
        GPT.from_pretrained(path)


@pytest.fixture
def hub(tmp_path, monkeypatch, serve):
    """A mirror that serves a small GPT-2 as gpt2 and gpt2-medium: ({path: content}, the folder that
    it was published in). Tests may change the dict."""
    content = published(tmp_path / "published", n_layer=1, n_embd=768, n_head=12).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 9\n"
    path = "/openai-community/{}/{}/main/pytorch_model.bin"
    base, files = serve({path.format(name, "resolve"): content for name in ("gpt2", "gpt2-medium")})
    files[path.format("gpt2-medium", "raw")] = pointer.encode()
    monkeypatch.setenv("HF_ENDPOINT", base)
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    sizes = {"gpt2": (len(content), sha256), "gpt2-medium": (len(content), None)}
    monkeypatch.setattr(weights, "PRETRAINED", sizes)
    return files, tmp_path / "published"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
def test_downloads_once_and_equals_what_was_published(hub, name):
    files, folder = hub
    model = GPT.from_pretrained(name)
    files.clear()  # the second time it comes from the cache
    again, expected = GPT.from_pretrained(name).state_dict(), GPT.from_pretrained(folder)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) and torch.equal(again[key], value)


BROKEN = [
    (lambda content: content[:-100], "bytes"),  # another length
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "sha256"),  # another content
    (lambda content: (content[:1000], len(content)), "broke off"),  # the connection breaks
    (lambda content: None, "404.*local folder"),
]


@pytest.mark.parametrize("change, message", BROKEN)
def test_a_download_that_is_not_whole_is_named_and_not_kept(hub, change, message, tmp_path):
    files, _ = hub
    path = "/openai-community/gpt2/resolve/main/pytorch_model.bin"
    files[path] = change(files[path])
    with pytest.raises(InputError, match=message):
        weights.download_gpt2("gpt2")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
