"""GPT-2 in the published format: from the tensors of a file to a model, and back.

The tensors of a checkpoint of train.py pass through here, too.
"""

import contextlib
import hashlib
import json
import re
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

from support.files import InputError, filling, fits, remove_stale, write_json, write_text, writing
from support.prepared import is_identity
from support.tokenizers import (
    BYTES,
    check_tokenizer,
    get_encoding,
    spell,
    tokenizer_by_size,
    vocabulary_size,
    write_tokenizer,
)
from support.weights import read_json, read_text, save

# the tensors of a layer of GPT-2
PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
LAYER = [f"{part}.{kind}" for part in PARTS for kind in ("weight", "bias")]
# published weights store these as (in, out); nn.Linear wants (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "vocab.txt", "spiece.model")
# the sha256 of GPT-2's tokens, as `spell` writes them, in a JSON list
GPT2_TOKENS = "ae640db5fc48332d32101df91998abf45c421979a55c96d0df9f812b7d32d806"
# the files of an export, some of which it may lack
EXPORT = (
    "pytorch_model.bin tokenizer.json tokenizer_config.json background.json config.json".split()
)

# --------------------------------------------------------------------------------------------------
# the GPT-2 in a file


def unpack(state, path, block_size=None):
    """The tensors of a model by their names in nn.Module, and its settings, keys of GPTConfig.

    state: the content of the file `path`: a checkpoint of train.py, or published weights.
    block_size: how many of its positions to use, by default all of them.
    Returns two dicts; `fit` checks the first, GPTConfig the second. Raises InputError if the file
    has no GPT-2, or one with fewer positions, or one with another vocabulary beside it.
    """
    try:
        config, tensors = state.get("model_config"), bare(state)
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
        check_published(state, tensors, path)
    names = (f"h.{i}.{name}" for i in range(max(n_layer, 1)) for name in LAYER)
    for name in chain(("ln_f.weight", "ln_f.bias"), names):
        if name not in tensors:
            raise InputError(f"{path}: tensor {name} is missing: not a complete GPT-2")
    if not config:
        vocab_size = read_vocabulary(path, n_rows)
        for name, v in tensors.items():
            tensors[name] = v.t() if name.endswith(TRANSPOSED) and v.dim() == 2 else v
        tensors["wte.weight"] = wte[:vocab_size]
        config = {**sizes, "vocab_size": vocab_size, "n_head": read_n_head(path, n_layer, n_embd)}
    if block_size and block_size > n_positions:
        raise InputError(f"{path} has {n_positions} positions; lower block_size ({block_size})")
    return tensors, {**config, "block_size": block_size or n_positions}


def bare(state):
    """The tensors of a model without what programs wrap around them and put before their names.
    Raises TypeError, KeyError or ValueError if there are other things than tensors."""
    wrapped = (state.get(key) for key in ("model", "state_dict", "model_state_dict"))
    state = next((value for value in wrapped if isinstance(value, dict)), state)
    prefix = r"((module|model|_orig_mod|transformer)\.)+"
    tensors = {re.sub(f"^{prefix}", "", name): v for name, v in state.items()}
    if len(tensors) < len(state) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise ValueError
    if "wte.weight" not in tensors:  # safetensors keeps one name of tensors that share memory
        tensors["wte.weight"] = tensors["lm_head.weight"]
    return tensors


def check_published(state, tensors, path):
    """Raises InputError if these are not weights in the published format: if the two embeddings are
    not tied, or the matrices are stored as in nn.Linear."""
    wte = tensors["wte.weight"]
    head, c_attn = tensors.get("lm_head.weight", wte), tensors.get("h.0.attn.c_attn.weight", wte)
    if "model_args" in state or c_attn.shape == (3 * wte.size(1), wte.size(1)):
        raise InputError(
            f"{path}: a nanoGPT or minGPT model, whose matrices are stored transposed; "
            "save it in the format of transformers"
        )
    if head.dtype != wte.dtype or not torch.equal(head, wte):
        raise InputError(f"{path}: lm_head.weight differs from wte.weight; GPT-2 ties the two")


def read_n_head(path, n_layer, n_embd):
    """The number of heads, which the weights do not show: from the config.json beside them, or, for
    a published width, of heads of 64. Raises InputError if that is missing or not of this GPT-2."""
    beside = Path(path).with_name("config.json")
    config = read_json(beside)
    if not config:
        if n_embd not in (768, 1024, 1280, 1600):
            raise InputError(f"{beside} is missing; add it, because it gives the number of heads")
        return n_embd // 64
    if type(config.get("n_head")) is not int:
        raise InputError(f"{beside} lacks n_head, the number of heads, an integer")
    gpt2 = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * n_embd)}
    gpt2 |= {"layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,)}
    gpt2 |= dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), (False,))
    gpt2 |= {"n_layer": (n_layer,)}
    for key, values in gpt2.items():
        if key in config and config[key] not in values:
            raise InputError(f"{beside} has {key} = {config[key]!r}; expected {values[0]!r}")
    return config["n_head"]


# --------------------------------------------------------------------------------------------------
# the vocabulary of published weights


def read_vocabulary(path, n_rows):
    """The number of tokens of published weights with n_rows embeddings: that of the vocabulary
    beside the file `path`, as any further rows are padding or special tokens; n_rows if no
    vocabulary is there. Raises InputError unless it is GPT-2's, or, beside an export, that of its
    tokenizer: its ids would mean other tokens."""
    beside = [file for name in VOCABULARIES if (file := Path(path).with_name(name)).exists()]
    if not beside:
        return n_rows
    tokenizer = exported_tokenizer(path) or "gpt2"
    size, expected = vocabulary_size(tokenizer), GPT2_TOKENS
    if tokenizer != "gpt2":
        expected = digest(spell(get_encoding(tokenizer)))
    title = "GPT-2" if tokenizer == "gpt2" else f"the tokenizer {tokenizer}"
    for file in beside:
        try:
            tokens = read_tokens(file, size)
        except (AttributeError, KeyError, TypeError):
            tokens = []
        if digest(tokens) != expected:
            raise InputError(
                f"{file} is not the vocabulary of {title}; models with other vocabularies cannot "
                "be used"
            )
    if n_rows < size:
        raise InputError(f"{path} has {n_rows:,} tokens, but the vocabulary beside it {size:,}")
    if n_rows > size:
        print(f"{path} has {n_rows:,} tokens; using the {size:,} of {title}", file=sys.stderr)
    return size


def digest(tokens):
    """sha256 of a list of strings: hex digits."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def read_tokens(file, n):
    """The first n tokens of a vocabulary file, in the order of their ids, as strings; None for an
    id without a token, as in another kind of tokenizer. Raises InputError, AttributeError, KeyError
    or TypeError."""
    if file.name == "merges.txt":
        merges = [line.split() for line in read_text(file).splitlines() if line[:8] != "#version"]
        return [*BYTES, *map("".join, merges), "<|endoftext|>"]
    vocabulary = read_json(file) if file.suffix == ".json" else {}
    if file.name == "tokenizer.json":
        model = vocabulary["model"]
        vocabulary = model["vocab"] if model.get("type", "BPE") == "BPE" else {}
    tokens = {i: token for token, i in vocabulary.items()}
    return [tokens.get(i) for i in range(n)]


def exported_tokenizer(path):
    """The name of our tokenizer whose ids the weights in the file `path` read, according to the
    config.json beside it; "" if this is not an export, or one without a tokenizer of ours."""
    config = read_json(Path(path).with_name("config.json"))
    if fits(config, {"localist": {"tokenizer": str}}):
        with contextlib.suppress(InputError):
            check_tokenizer(config["localist"]["tokenizer"])
            return config["localist"]["tokenizer"]
    return ""


def fit(tensors, shapes, vocab_size, path):
    """The tensors of `unpack` as a state_dict for a model of these shapes, {name: shape}.

    If the model has fewer positions, it gets the first rows of wpe.weight. The rows of wte.weight
    after vocab_size, padding, become zeros. Raises InputError if a tensor has another shape, or
    contains anything but finite numbers.
    """
    fitted = {}
    for name, shape in shapes.items():
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


# --------------------------------------------------------------------------------------------------
# the export


def origin_of(state):
    """The partition and the background of the run that saved a checkpoint, the content of a file;
    of anything else, (None, None)."""
    if fits(state, {"config": {"partition": str}, "text": dict}) and is_identity(state["text"]):
        return state["config"]["partition"], state["text"]["background"]
    return None, None


def publish(model, folder):
    """Write a GPT to `folder` in the published format, whole or not at all. Raises InputError.

    pytorch_model.bin, config.json: the weights and the shape, with the dial in the keys "locality",
    lambda of every layer, and "localist", the rest of what localizes the attention.
    tokenizer.json, tokenizer_config.json: the tokenizer. It is left out if the size of the
    vocabulary is that of none of ours, or, with a message, if it cannot be downloaded.
    background.json: the background of the partition, if the model is from a run and has one.

    The folder must be new or empty or contain an earlier export: other weights there, or another
    vocabulary, would be read instead of these, or with them.
    """
    folder, config = Path(folder), model.config
    check_folder(folder)
    tokenizer = tokenizer_by_size(config.vocab_size)
    encoding = find_encoding(tokenizer, folder)
    about = shape_of(config, tokenizer) | {"locality": model.locality}
    about["localist"] = {
        "tokenizer": tokenizer,
        "partition": model.partition,
        "max_lookback": config.max_lookback,
        "anchor": config.anchor,
        "floor": max(model.locality),
    }
    if not encoding:  # no class of transformers: AutoTokenizer would make up one without tokens
        about["tokenizer_class"] = "localist-gpt: this export has no tokenizer"
    remove_stale(folder, ".preparing-{}")
    with filling(folder, last="config.json") as work:
        save(published_tensors(model), work / "pytorch_model.bin")
        if encoding:
            write_tokenizer(encoding, config.block_size, work)
        if model.background:
            write_text(work / "background.json", json.dumps(model.background) + "\n")
        write_json(work / "config.json", about)
        (folder / "config.json").unlink(missing_ok=True)  # without it, nothing here can be read
        for name in EXPORT:  # of an earlier export
            if not (work / name).exists():
                (folder / name).unlink(missing_ok=True)


def check_folder(folder):
    """Create the folder of an export. Raises InputError if it contains anything but an earlier
    one."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    if fits(read_json(folder / "config.json"), {"localist": {"tokenizer": (str, None)}}):
        names -= {*EXPORT}
    if names:
        raise InputError(
            f"{folder} contains files that are not of an earlier export ({min(names)}); export to "
            "an empty folder"
        )


def find_encoding(tokenizer, folder):
    """The tokenizer to export to a folder, by its name; None, with a message, if it cannot be
    downloaded or learned, or if the name is None."""
    try:
        return tokenizer and get_encoding(tokenizer)
    except InputError as e:
        print(
            f"{folder} will have no tokenizer until you export again: {e}",
            file=sys.stderr,
        )
        return None


def published_tensors(model):
    """The tensors of a GPT by their published names and in their shapes, on the CPU: a dict."""
    tensors = {}
    for name, v in model.state_dict().items():
        v = v[: model.config.vocab_size] if name == "wte.weight" else v
        v = v.t() if name.endswith(TRANSPOSED) else v
        tensors[f"transformer.{name}"] = v.detach().cpu().contiguous()
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}


def shape_of(config, tokenizer):
    """What `transformers` has to know about a GPT: keys of its GPT2Config, a dict."""
    shape = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    shape |= dict.fromkeys(("n_positions", "n_ctx"), config.block_size)
    shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    end_of_text = None if tokenizer in ("bytes", None) else config.vocab_size - 1
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text)
    shape |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    shape |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    return shape | {"initializer_range": 0.02, "tie_word_embeddings": True}
