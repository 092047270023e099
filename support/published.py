"""GPT-2 in the published format: from the tensors of a file to a model, and back.

The tensors of a checkpoint of train.py pass through here, too.
"""

import hashlib
import json
import re
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

from support.files import InputError, write_json, writing
from support.weights import read_json, read_text, save

# the tensors of a layer of GPT-2
PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
LAYER = [f"{part}.{kind}" for part in PARTS for kind in ("weight", "bias")]
# published weights store these as (in, out); nn.Linear wants (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "vocab.txt", "spiece.model")
# GPT-2's tokens as vocab.json writes them, with a character for every byte: single bytes, in this
# order, what its merges make, and the end of a text. The sha256 is that of their list as JSON.
BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
GPT2_TOKENS = "ae640db5fc48332d32101df91998abf45c421979a55c96d0df9f812b7d32d806"
EXPORTED = "localist-gpt: tokenizer "  # so begins the tokenizer_class of an export

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
            raise InputError(f"{path}: tensor {name} is missing: not a whole GPT-2")
    if not config:
        vocab_size = read_vocabulary(path, n_rows)
        for name, v in tensors.items():
            tensors[name] = v.t() if name.endswith(TRANSPOSED) and v.dim() == 2 else v
        tensors["wte.weight"] = wte[:vocab_size]
        config = {**sizes, "vocab_size": vocab_size, "n_head": read_n_head(path, n_layer, n_embd)}
    if block_size and block_size > n_positions:
        raise InputError(f"{path} has {n_positions} positions, block_size {block_size} needs more")
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
            f"{path}: a model of nanoGPT or minGPT, which store matrices the other way round; save "
            "it in the format of transformers"
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
            raise InputError(f"{beside} is missing, which gives the number of heads")
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
    """The number of tokens of published weights with n_rows embeddings: GPT-2's 50257 if its
    vocabulary is beside the file `path`, as any further rows are padding or special tokens; n_rows
    if no vocabulary is there. Raises InputError if there is another one, whose ids mean other
    tokens."""
    beside = [file for name in VOCABULARIES if (file := Path(path).with_name(name)).exists()]
    for file in beside:
        try:
            tokens = json.dumps(read_tokens(file)).encode()
        except (AttributeError, KeyError, TypeError):
            tokens = b""
        if hashlib.sha256(tokens).hexdigest() != GPT2_TOKENS:
            raise InputError(
                f"{file} is not GPT-2's vocabulary; models with other vocabularies cannot be used"
            )
    if beside and n_rows < 50257:
        raise InputError(f"{path} has {n_rows:,} tokens, but GPT-2's vocabulary beside it 50,257")
    if beside and n_rows > 50257:
        print(f"{path} has {n_rows:,} tokens; using the 50,257 of GPT-2", file=sys.stderr)
    return 50257 if beside else n_rows


def read_tokens(file):
    """The first 50257 tokens of a vocabulary file, in the order of their ids, as strings; of
    another kind of tokenizer, none. Raises InputError, AttributeError, KeyError or TypeError."""
    if file.name == "merges.txt":
        merges = [line.split() for line in read_text(file).splitlines() if line[:8] != "#version"]
        return [*BYTES, *map("".join, merges), "<|endoftext|>"]
    if file.name == "vocab.json":
        vocabulary = read_json(file)
    elif file.name == "tokenizer.json" and read_json(file)["model"].get("type", "BPE") == "BPE":
        vocabulary = read_json(file)["model"]["vocab"]
    else:
        return []
    tokens = {i: token for token, i in vocabulary.items()}
    return [tokens.get(i) for i in range(50257)]


def tokenizer_by_size(vocab_size):
    """The name of our tokenizer with so many tokens."""
    return {50257: "gpt2", 1001: "sample", 256: "bytes"}.get(vocab_size, f"gpt2:{vocab_size}")


def is_export(path, vocab_size):
    """Whether the config.json beside the file `path` says that this project wrote the weights, and
    with so many tokens."""
    config = read_json(Path(path).with_name("config.json"))
    return config.get("tokenizer_class") == EXPORTED + tokenizer_by_size(vocab_size)


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


def publish(state, config, folder):
    """Write pytorch_model.bin and config.json, the published format, to `folder`, or raise
    InputError. state: the tensors of the model by name, without padding; config: its GPTConfig.

    The folder must be new or empty or contain an earlier export: other weights there, or another
    vocabulary, would be read instead of these, or with them.
    """
    folder, tensors = Path(folder), {}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = {p.name for p in folder.iterdir() if p.suffix != ".tmp" and p.name[0] != "."}
    if str(read_json(folder / "config.json").get("tokenizer_class")).startswith(EXPORTED):
        names -= {"pytorch_model.bin", "config.json"}
    if names:
        raise InputError(
            f"{folder} contains files that are not of an earlier export ({min(names)}); export to "
            "an empty folder"
        )
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
    # no class of transformers: otherwise AutoTokenizer would make up a tokenizer without tokens
    shape |= {"tokenizer_class": EXPORTED + tokenizer_by_size(config.vocab_size)}
    write_json(folder / "config.json", shape)
