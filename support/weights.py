"""Weights files in and out: checked, never executed.

A file is torch's, or, if the package safetensors is installed, in that format. It contains a model
saved by train.py, or GPT-2 in the published format, in one file or in shards. The four published
sizes are downloaded. What a file means is the job of published.py.
"""

import importlib.util
import itertools
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from support import files
from support.download import CACHE, download
from support.files import InputError, open_regular, out_of_memory, replacing

# pytorch_model.bin of each: its length in bytes, and its sha256 if we could verify one. For the
# others, the hub is asked for its record of the file.
PRETRAINED = {
    "gpt2": (548118077, "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
    "gpt2-medium": (1520013706, None),
    "gpt2-large": (3247202234, None),
    "gpt2-xl": (6431878936, None),
}
CHECKPOINTS = ("best.pt", "last.pt")  # of a run, in order of preference
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")  # an index lists shards
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
UNREADABLE = (".h5", ".msgpack", ".onnx", ".gguf", ".ckpt.index")  # TensorFlow, Flax and others
# what a weights file may contain besides dicts, lists and tuples
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}
DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
MOST_VALUES, DEEPEST = 1 << 22, 32

# --------------------------------------------------------------------------------------------------
# which file


def find(name_or_path):
    """The path of a weights file, or of the index of its shards: the file itself, in a folder or
    run, or of a published size. Raises InputError if there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        return find_in(path)
    if name_or_path in PRETRAINED:
        return download_gpt2(name_or_path)
    raise InputError(f"{path}: no such file or folder, and not one of {', '.join(PRETRAINED)}")


def find_in(folder):
    """`find` in a folder. If it has both formats, the one that transformers reads is preferred, and
    a message says so."""
    if path := first_file(folder, CHECKPOINTS):
        return path
    safe, pickled = first_file(folder, SAFETENSORS), first_file(folder, TORCH)
    if safe and pickled and importlib.util.find_spec("safetensors"):
        print(f"{folder}: using {safe.name}, not {pickled.name}", file=sys.stderr)
    elif safe and pickled:
        print(
            f"{folder}: using {pickled.name}, not {safe.name}, because the package safetensors is "
            "not installed",
            file=sys.stderr,
        )
        return pickled
    if path := safe or pickled:
        return path
    names = sorted(path.name for path in folder.iterdir())
    if adapters := [name for name in names if name.startswith("adapter_")]:
        raise InputError(
            f"{folder} contains an adapter ({adapters[0]}), not a model; merge it into its base "
            "model and save that"
        )
    if steps := [int(name[11:]) for name in names if re.fullmatch("checkpoint-[1-9][0-9]*", name)]:
        raise InputError(
            f"{folder} contains training checkpoints, but no weights; give the newest checkpoint, "
            f"{folder / f'checkpoint-{max(steps)}'}"
        )
    if others := [name for name in names if name.endswith(UNREADABLE)]:
        raise InputError(
            f"{folder}: the format of {others[0]} cannot be read; save the model as "
            "model.safetensors or pytorch_model.bin"
        )
    raise InputError(f"{folder}: no best.pt, model.safetensors or pytorch_model.bin in here")


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


# --------------------------------------------------------------------------------------------------
# reading a file


def load(path):
    """The content of a weights file, a dict of tensors and plain values. Raises InputError.

    Nothing in the file is executed, and all of it has passed through `rebuild`. If `path` is the
    index of shards, they are all read. torch.save writes a checksum for every tensor, which
    torch.load ignores; here it is checked, at 2 to 3 GB/s. safetensors and torch's old format have
    none.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return load_shards(path)
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as f:
            begin = f.read(40)
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    if begin.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a git-lfs pointer, not the weights; run git lfs pull")
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except ImportError:
        message = f"{path}: run 'pip install safetensors' to read it, or use pytorch_model.bin"
        raise InputError(message) from None
    except pickle.UnpicklingError:
        message = f"{path}: refused: damaged, or not only plain weights; nothing in it was executed"
        raise InputError(message) from None
    except Exception as e:  # a damaged file can cause any error
        if isinstance(e, InputError) or out_of_memory(e):
            raise
        message = f"{path}: not a readable weights file ({type(e).__name__}): damaged or incomplete"
        raise InputError(message) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: not the weights of a model")
    sizes = []
    state = rebuild(state, path, sizes, itertools.count())
    if sum(sizes) > 2 * path.stat().st_size:  # twice: embedding and output head may share memory
        raise InputError(f"{path}: its tensors claim {sum(sizes):,} bytes, more than the file has")
    return state


def read_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def read_torch(path):
    """torch.load without executing anything, and with the checksums of a zip file checked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch reads an entry with attributes, like a folder, as uninitialized memory
            odd = [e.filename for e in archive.infolist() if e.external_attr or e.compress_type]
            if damaged := odd[0] if odd else archive.testzip():
                raise InputError(f"{path}: damaged: {damaged!r} does not match its checksum")
    with warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def rebuild(value, path, sizes, counter, depth=0):
    """The same value, made anew of plain dicts, lists, tuples, strings, numbers and dense tensors,
    without what a crafted file may have attached to them, such as methods.

    sizes: a list, to which the bytes of its tensors and strings are added; counter: counts values.
    Raises InputError for anything else, too many values, and values nested too deeply.
    """
    if next(counter) > MOST_VALUES:
        raise InputError(f"{path} contains more than {MOST_VALUES:,} values")
    if depth > DEEPEST:
        raise InputError(f"{path} contains values nested more than {DEEPEST} levels deep")
    kind, more = type(value), (path, sizes, counter, depth + 1)
    if issubclass(kind, torch.Tensor):
        check_tensor(value, path)
        value = torch.Tensor.detach(value)
        sizes.append(value.numel() * value.element_size())
        return value
    if issubclass(kind, dict) and all(type(key) in (str, int) for key in dict.keys(value)):
        return {key: rebuild(item, *more) for key, item in dict.items(value)}
    if issubclass(kind, list):
        return [rebuild(item, *more) for item in list.__iter__(value)]
    if issubclass(kind, tuple):
        return tuple(rebuild(item, *more) for item in tuple.__iter__(value))
    if kind is str:
        sizes.append(len(value))
    if value is None or kind in (bool, str, float) or kind is int and -(2**63) <= value < 2**64:
        return value
    raise InputError(f"{path} contains a {kind.__name__}, which does not belong in weights")


def check_tensor(value, path):
    """Raises InputError unless a tensor is dense and on the CPU and has one of DTYPES."""
    dense = value.layout == torch.strided and not value.is_nested
    if not dense or value.device.type != "cpu" or value.dtype not in DTYPES:
        kind = f"{value.dtype}, {value.layout}, {value.device}"
        raise InputError(f"{path} contains a tensor that is not plain numbers on a CPU ({kind})")


def load_shards(index):
    """The tensors of a model in several files. index: the path of a JSON file that names the file
    of each. Raises InputError."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{index} is not an index of shards: it has no weight_map")
    for file in files.values():
        if not re.fullmatch(r"[\w-]+\.(bin|safetensors)", file):
            raise InputError(f"{index} names {file!r}, which is not the name of a shard beside it")
    shards = {file: load(index.with_name(file)) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in shards[file]:
            raise InputError(f"{index.with_name(file)}: tensor {name!r} is missing")
    return {name: shards[file][name] for name, file in files.items()}


def read_json(path):
    """The object in a JSON file, a dict, which is empty if there is no file. Raises InputError."""
    try:
        value = json.loads(read_text(path) or "{}")
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not contain a JSON object")
    return value


def read_text(path):
    """The content of a text file, "" if there is no file. Raises InputError."""
    try:
        return files.read_text(path)
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    except ValueError:
        raise InputError(f"{path} is not UTF-8 text, or too long") from None


def save(state, path):
    """torch.save, whole or not at all: `path` is always the old file or the new one. InputError."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        torch.save(state, f)
