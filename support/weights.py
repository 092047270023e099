"""Weights files in and out: checked, never executed.

A file is torch's, or, if the package safetensors is installed, in that format. It contains a model
saved by train.py, or GPT-2 in the published format. The four published sizes are downloaded.
"""

import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from support.download import CACHE, download
from support.files import InputError, replacing, write_json

# pytorch_model.bin of each: its length in bytes, and its sha256 if we could verify one. For the
# others, the hub is asked for its record of the file.
PRETRAINED = {
    "gpt2": (548118077, "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
    "gpt2-medium": (1520013706, None),
    "gpt2-large": (3247202234, None),
    "gpt2-xl": (6431878936, None),
}
CHECKPOINTS = ("best.pt", "last.pt")  # of a run, in order of preference
# published weights store these as (in, out); nn.Linear wants (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def find(name_or_path):
    """The path of a weights file: of a published size, in a folder or run, or the file itself.
    Raises InputError if there is none."""
    if name_or_path in PRETRAINED:
        return download_gpt2(name_or_path)
    path = Path(name_or_path)
    if path.is_file():
        return path
    if file := first_file(path, (*CHECKPOINTS, "pytorch_model.bin", "model.safetensors")):
        return file
    if path.is_dir():
        raise InputError(f"{path}: no best.pt, pytorch_model.bin or model.safetensors in here")
    raise InputError(f"{path}: no such file or folder, and not one of {', '.join(PRETRAINED)}")


def first_file(folder, names):
    """The path of the first of these files that is in the folder; None if there is none."""
    return next((path for name in names if (path := Path(folder, name)).is_file()), None)


def download_gpt2(name):
    """The path of pytorch_model.bin of a published size, downloaded unless the cache has it.
    HF_ENDPOINT names a mirror, LOCALIST_CACHE another cache folder. Raises InputError."""
    path, (size, sha256) = CACHE / name / "pytorch_model.bin", PRETRAINED[name]
    if path.exists() and path.stat().st_size == size:
        return path  # a download has this name only after its checks; a copy is up to the user
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    hub = f"{endpoint}/openai-community/{name}"
    try:
        if sha256 is None:
            pointer = path.with_name(f"pointer.{os.getpid()}")
            download(f"{hub}/raw/main/pytorch_model.bin", pointer, limit=1000)
            line = re.search(r"^oid sha256:(\w{64})$", pointer.read_text(errors="replace"), re.M)
            pointer.unlink()
            if not line:
                raise InputError(f"{hub} names no sha256 of its file; try another HF_ENDPOINT")
            sha256 = line[1]
        return download(f"{hub}/resolve/main/pytorch_model.bin", path, size, sha256)
    except InputError as e:
        message = f"{e}. Without a network, put the file at {path}, or give a local folder"
        raise InputError(message) from None


def load(path):
    """The content of a weights file, a dict of tensors and plain values. Raises InputError.

    Nothing in the file is executed. torch.save writes a checksum for every tensor, which torch.load
    ignores; here it is checked, at 2 to 3 GB/s. safetensors and torch's old format have none.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch reads an entry with attributes, like a folder, as uninitialized memory
                odd = [e.filename for e in archive.infolist() if e.external_attr or e.compress_type]
                if damaged := odd[0] if odd else archive.testzip():
                    raise InputError(f"{path}: damaged: {damaged} does not match its checksum")
        with warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except ImportError:
        message = f"{path}: run 'pip install safetensors' to read it, or use pytorch_model.bin"
        raise InputError(message) from None
    except pickle.UnpicklingError:
        message = f"{path}: refused: damaged, or not only plain weights; nothing in it was executed"
        raise InputError(message) from None
    except Exception as e:  # a damaged file can cause any error
        message = f"{path}: not a readable weights file ({type(e).__name__}): damaged or incomplete"
        raise InputError(message) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: not the weights of a model")
    return state


def save(state, path):
    """torch.save, whole or not at all: `path` is always the old file or the new one. InputError."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        torch.save(state, f)


def unpack(state, path, block_size=None):
    """The tensors of a model by their names in nn.Module, and its settings, keys of GPTConfig.

    state: the content of the file `path`: a checkpoint of train.py, or published weights.
    block_size: how many of its positions to use, by default all of them.
    Returns two dicts; `fit` checks the first, GPTConfig the second. Raises InputError if the file
    has no GPT-2, or one with fewer positions.
    """
    try:
        config = state.get("model_config")
        tensors = state["model"] if config else state
        tensors = {name.removeprefix("transformer."): v for name, v in tensors.items()}
        if not all(isinstance(v, torch.Tensor) for v in tensors.values()):
            raise TypeError
        wte, wpe = tensors["wte.weight"], tensors["wpe.weight"]
        (n_rows, n_embd), (n_positions, _) = wte.shape, wpe.shape
        n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
        sizes = {"block_size": n_positions, "n_layer": n_layer, "n_embd": n_embd}
        if config:  # wte may have more rows, which are padding
            same = all(config[key] == size for key, size in sizes.items())
            if not same or config["vocab_size"] > n_rows or config["n_head"] < 1:
                raise ValueError
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
        message = f"{path}: no GPT-2 in this file: tensors or sizes are missing or contradictory"
        raise InputError(message) from None
    if not config:
        if not torch.equal(tensors.get("lm_head.weight", wte), wte):
            raise InputError(f"{path}: lm_head.weight differs from wte.weight; GPT-2 ties the two")
        for name, v in tensors.items():
            tensors[name] = v.t() if name.endswith(TRANSPOSED) and v.dim() == 2 else v
        config = {**sizes, "vocab_size": n_rows, "n_head": read_n_head(path, n_embd)}
    if block_size and block_size > n_positions:
        raise InputError(f"{path} has {n_positions} positions, block_size {block_size} needs more")
    return tensors, {**config, "block_size": block_size or n_positions}


def read_n_head(path, n_embd):
    """The number of heads, which the weights do not show: from the config.json beside them, or, for
    a published width, of heads of 64. Raises InputError if that is missing or not of a GPT-2."""
    beside = Path(path).with_name("config.json")
    if not beside.is_file():
        if n_embd not in (768, 1024, 1280, 1600):
            raise InputError(f"{beside} is missing, which gives the number of heads")
        return n_embd // 64
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        n_head = int(config["n_head"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{beside} lacks n_head") from None
    gpt2 = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * n_embd)}
    gpt2 |= {"layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,)}
    gpt2 |= dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), (False,))
    for key, values in gpt2.items():
        if key in config and config[key] not in values:
            raise InputError(f"{beside} has {key} = {config[key]}; GPT-2 has {values[0]}")
    return n_head


def fit(tensors, shapes, vocab_size, path):
    """The tensors of `unpack` as a state_dict for a model of these shapes, {name: shape}.

    If the model has fewer positions, it gets the first rows of wpe.weight. The rows of wte.weight
    after vocab_size, padding, become zeros. Raises InputError if a tensor is missing, has another
    shape, or contains anything but finite numbers.
    """
    fitted = {}
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(f"{path}: tensor {name} is missing: not a whole GPT-2")
        v = tensors[name]
        if name == "wpe.weight":
            v = v[: shape[0]]
        if name == "wte.weight" and len(v) in (vocab_size, shape[0]):
            v = F.pad(v[:vocab_size], (0, 0, 0, shape[0] - vocab_size))
        if v.shape != shape:
            shape, actual = tuple(shape), tuple(tensors[name].shape)
            raise InputError(f"{path}: tensor {name} has shape {actual}, expected {shape}")
        if not v.is_floating_point() or not v.float().isfinite().all():
            raise InputError(f"{path}: tensor {name} contains something other than finite numbers")
        fitted[name] = v
    return fitted


def publish(state, config, folder):
    """Write pytorch_model.bin and config.json, the published format, to `folder`, or raise
    InputError. state: the tensors of the model by name, without padding; config: its GPTConfig."""
    folder, tensors = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, v in state.items():
        v = v.t() if name.endswith(TRANSPOSED) else v
        tensors[f"transformer.{name}"] = v.detach().cpu().contiguous()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save(tensors, folder / "pytorch_model.bin")
    shape = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    shape |= dict.fromkeys(("n_positions", "n_ctx"), config.block_size)
    shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
    shape |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    shape |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    shape |= {"initializer_range": 0.02, "tie_word_embeddings": True}
    write_json(folder / "config.json", shape)
