"""Weights files in and out: checked, never executed.

Torch's files, and those of `safetensors` where that package is installed. A file holds a model as
train.py saves it, or GPT-2 in the published format. The four published sizes are downloaded.
"""

import json
import os
import pickle
import sys
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from support.download import CACHE, download
from support.files import InputError, replacing, write_json
from support.settings import RETIRED, lost

# pytorch_model.bin of each: its length in bytes, and its sha256 where we could verify one. For the
# others the hub's own record of the file is asked.
PRETRAINED = {
    "gpt2": (548118077, "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
    "gpt2-medium": (1520013706, None),
    "gpt2-large": (3247202234, None),
    "gpt2-xl": (6431878936, None),
}


CHECKPOINTS = ("best.pt", "last.pt")  # of a run, in the order of preference


def find(name_or_path):
    """The path of a weights file: of a published size, of a folder or run, or of the file itself.

    Raises InputError where there is none.
    """
    if name_or_path in PRETRAINED:
        return download_gpt2(name_or_path)
    path = Path(name_or_path)
    if path.is_file():
        return path
    for name in (*CHECKPOINTS, "pytorch_model.bin", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        files = "best.pt, pytorch_model.bin or model.safetensors"
        raise InputError(f"{path}: no {files} in this folder")
    names = ", ".join(PRETRAINED)
    raise InputError(f"{path}: no such file or folder, and not one of {names}")


def download_gpt2(name):
    """The path of pytorch_model.bin of a published size, downloaded if the cache has no copy.

    HF_ENDPOINT names a mirror, LOCALIST_CACHE another cache folder. Raises InputError when it
    cannot be had whole.
    """
    path = CACHE / name / "pytorch_model.bin"
    size, sha256 = PRETRAINED[name]
    if path.exists() and path.stat().st_size == size:
        return path  # a download was checked before it got this name; by hand it is the user's word
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    hub = f"{endpoint}/openai-community/{name}"
    try:
        if sha256 is None:
            pointer = path.with_name(f"pointer.{os.getpid()}")
            download(f"{hub}/raw/main/pytorch_model.bin", pointer, limit=1000)
            lines = pointer.read_text(errors="replace").splitlines()
            pointer.unlink()
            sha256 = next(line[-64:] for line in lines if line.startswith("oid sha256:"))
        return download(f"{hub}/resolve/main/pytorch_model.bin", path, size, sha256)
    except StopIteration:
        record = "names no sha256 for pytorch_model.bin; try another HF_ENDPOINT"
        raise InputError(f"{hub} {record}") from None
    except InputError as e:
        instead = f"put the file at {path}, or give a local folder"
        raise InputError(f"{e}. Without a network, {instead}") from None


def load(path):
    """torch.load that executes nothing: a dict of tensors and plain values. Raises InputError.

    torch.save writes a checksum of every tensor, which torch.load does not look at: one flipped bit
    would load as another weight. It is checked here, at 2 to 3 GB/s, faster than loading. Files in
    torch's old format have none.
    """
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # it reads or it refuses, nothing between
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError:
        more = "it is damaged, or holds more than plain weights; nothing in it was run"
        raise InputError(f"{path}: refused: {more}") from None
    except Exception as e:  # whatever a damaged archive trips over
        kind = f"not a readable weights file ({type(e).__name__})"
        raise InputError(f"{path}: {kind}: damaged or half a download") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: not the weights of a model")
    return state


def check_archive(path):
    """Raises InputError if something in a file of torch.save does not fit its checksum."""
    with zipfile.ZipFile(path) as archive:
        # an entry with attributes may be a folder, which torch reads as a tensor of whatever was
        # in memory
        entries = archive.infolist()
        odd = [entry.filename for entry in entries if entry.external_attr or entry.compress_type]
        damaged = odd[0] if odd else archive.testzip()
    if damaged:
        raise InputError(f"{path}: damaged: {damaged} in it does not fit its checksum")


def save(state, path):
    """torch.save, whole or not at all: `path` is always the old file or the new one. InputError."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        torch.save(state, f)


def read(path):
    """What `load` gives, of a file in the format of `safetensors` too. Raises InputError."""
    if path.suffix != ".safetensors":
        return load(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        instead = "'pip install safetensors'; or use pytorch_model.bin"
        raise InputError(f"{path}: reading it needs {instead}") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(f"{path}: not a readable weights file ({e})") from None


# --------------------------------------------------------------------------------------------------
# a model in a file: as train.py saves it, or in the published format

# the published weights store these as (in, out); nn.Linear wants (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PUBLISHED = {  # what config.json says of every GPT-2
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}


def pack(model):
    """A model as a checkpoint holds it, a dict of two keys; `unpack` reads them."""
    return {"model": model.state_dict(), "model_config": asdict(model.config)}


def unpack(state, path):
    """The tensors of a model by their names in nn.Module, and its settings: two dicts.

    state: what was read of the file `path`: a checkpoint of train.py, or published weights.
    Raises InputError for anything else.
    """
    ours = "model_config" in state
    tensors = state.get("model") if ours else state
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in tensors.items()
    ):
        raise InputError(f"{path}: not the weights of a model")
    tensors = {name.removeprefix("transformer."): v for name, v in tensors.items()}
    try:
        vocab_size, n_embd = tensors["wte.weight"].shape
        block_size, _ = tensors["wpe.weight"].shape
        n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    except (KeyError, ValueError, IndexError):
        lacks = "it lacks wte.weight or wpe.weight, or their shape is another"
        raise InputError(f"{path}: no GPT-2 in this file ({lacks})") from None
    shape = {"block_size": block_size, "n_layer": n_layer, "n_embd": n_embd}
    if ours:
        config = state["model_config"]
        plain = isinstance(config, dict) and not any(
            isinstance(value, torch.Tensor) for value in config.values()
        )
        if not plain or any(config.get(key) != shape[key] for key in shape):
            raise InputError(f"{path}: no GPT-2 in this file (model_config is of another shape)")
        for key in lost(config):
            less = f"this version has no {key} = {config[key]!r}, and reads the model without"
            print(f"{path}: {less} (docs/LOG.md)", file=sys.stderr)
        return tensors, {key: value for key, value in config.items() if key not in RETIRED}
    if not torch.equal(tensors.get("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
        raise InputError(f"{path}: its lm_head.weight is not tied to wte.weight, as in GPT-2")
    for name, v in tensors.items():
        tensors[name] = v.t() if name.endswith(TRANSPOSED) and v.dim() == 2 else v
    return tensors, {**shape, "vocab_size": vocab_size, "n_head": read_n_head(path, n_embd)}


def read_n_head(path, n_embd):
    """The number of heads, which leaves no trace in the weights.

    It comes from the config.json beside them; the published sizes have heads of 64. Raises
    InputError where that config.json is of another model than GPT-2, or is needed and missing.
    """
    beside = path.with_name("config.json")
    if not beside.is_file():
        if n_embd not in (768, 1024, 1280, 1600):
            raise InputError(f"{beside} is missing, which tells the number of heads")
        return n_embd // 64
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        n_head = int(found["n_head"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{beside} lacks n_head") from None
    gpt2 = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, values in gpt2.items():
        if key in found and found[key] not in values:
            raise InputError(f"{beside} has {key} = {found[key]}; GPT-2 has {values[0]}")
    return n_head


def fit(tensors, shapes, path):
    """The tensors that a model of these shapes wants, a dict. Raises InputError if one is missing,
    has another shape, or holds something else than finite numbers."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(f"{path}: tensor {name} is missing: not a whole GPT-2")
        found = tensors[name]
        if found.shape != shape:
            differ = f"has shape {tuple(found.shape)}, expected {tuple(shape)}"
            raise InputError(f"{path}: tensor {name} {differ}")
        if not found.is_floating_point() or not found.float().isfinite().all():
            raise InputError(f"{path}: tensor {name} holds something else than finite numbers")
    return {name: tensors[name] for name in shapes}


def publish(state, config, folder):
    """Write a model in the published format: pytorch_model.bin and config.json in `folder`.

    state: its tensors by name, without padding; config: its settings, a dataclass.
    Raises InputError where they cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, v in state.items():
        v = v.t() if name.endswith(TRANSPOSED) else v
        tensors[f"transformer.{name}"] = v.detach().cpu().contiguous()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save(tensors, folder / "pytorch_model.bin")
    shape = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    shape |= {"n_positions": config.block_size, "n_ctx": config.block_size}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    last = {"bos_token_id": config.vocab_size - 1, "eos_token_id": config.vocab_size - 1}
    write_json(folder / "config.json", {**PUBLISHED, **shape, **dropout, **last})
