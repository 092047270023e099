"""The dial on models of `transformers`: localized attention for decoders, blocks for their tokens.

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
    model = hub.localize(model, tokenizer, schedule="quintic", floor=1.0, partition="semantic")
    model(**tokenizer(text, return_tensors="pt"))  # blocks are found from input_ids
    model.set_locality([...])                      # the dial, one number per layer
    model.save_pretrained("localized")             # hub.load("localized") has the same dial

The rest works as before: training, padding, `generate` with its caches and beams. If attention
weights are requested (`output_attentions=True`), they are the blended ones.

What it costs: both halves use dense masks, (B, 1, n, T) for n queries and T keys; a layer whose
locality is 0 or 1 computes only one half. Blocks are found on the CPU.

This is the only file that needs `transformers`. docs/HUB.md says which models were tried.
"""

import contextlib
import copy
import inspect
import json
import math
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import cached_file
from transformers.utils.versions import require_version

import locality
from fast.attention import BlockMask, blended_attention
from model import attention_weights
from prepare_data import check_partition
from support.files import InputError, fits, write_text
from support.prepared import is_background
from support.tokenizers import read_vocabulary
from support.weights import read_json

require_version("transformers>=5.6", 'hub.py needs it: pip install "transformers>=5.6"')

# --------------------------------------------------------------------------------------------------
# attention


def localized_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """The attention of a localized layer, which `transformers` knows as "localist".

    query: (B, H, n, D); key, value: (B, groups, T, D); attention_mask: what `distances` returned;
    kwargs: "localist", which `Blocks.before` added, and others.
    Returns the output, (B, n, H, D), and, if requested, the weights, (B, H, n, T). Raises
    InputError for attention of another kind.
    """
    info = kwargs.get("localist")
    if info is None:
        raise InputError("the blocks did not reach this layer: call the model, not a part of it")
    if attention_mask is None or attention_mask.dtype != torch.int32:
        raise InputError("a localized model needs attention masks of the shape (B, T)")
    if kwargs.get("softcap") is not None:
        raise InputError("attention with soft-capped scores cannot be localized")
    visible = attention_mask >= 0  # (B, 1, n, T)
    block = attention_mask <= info.lookback[:, None, :, None].to(query.device)
    if info.first is not None:
        block |= attention_mask == info.first[:, None, :, None].to(query.device)
    block &= visible
    dial = module.config.locality[module.layer_idx]
    k, v = (x.repeat_interleave(query.size(1) // key.size(1), 1) for x in (key, value))
    q = query if scaling is None else query * (scaling * math.sqrt(query.size(-1)))
    if not info.weights:
        mask = BlockMask(dense=block, visible=visible)
        return blended_attention(q, k, v, mask, dial, dropout).transpose(1, 2), None
    a = attention_weights(q.float(), k.float(), block, dial, visible).to(v.dtype)  # (B, H, n, T)
    return (F.dropout(a, dropout) @ v).transpose(1, 2), a


def distances(**kwargs):
    """The attention mask of a localized model: how many places before each query a key is, or -1 if
    the query does not see it: because it comes later, is padding, or outside the layer's window.

    kwargs: those of transformers' mask functions. Returns (B, 1, n, T) int32. Even a query that is
    padding sees itself. Later keys that it sees, those of its own image, are at distance 0: in its
    block.
    """
    skip = dict.fromkeys(("allow_is_causal_skip", "allow_is_bidirectional_skip"), False)
    visible = sdpa_mask(**{**kwargs, **skip})  # (B, 1, n, T)
    query = torch.arange(kwargs["q_length"], device=visible.device) + kwargs["q_offset"]
    key = torch.arange(kwargs["kv_length"], device=visible.device) + kwargs["kv_offset"]
    distance = (query[:, None] - key).int()  # (n, T)
    return torch.where(visible | (distance == 0), distance.clamp(min=0), -1)


AttentionInterface.register("localist", localized_attention)
AttentionMaskInterface.register("localist", distances)

# --------------------------------------------------------------------------------------------------
# blocks


class TokenInfo(NamedTuple):
    """What `localized_attention` needs to know of the n new tokens of a call."""

    lookback: torch.Tensor  # (B, n) int64: places from each token back to the start of its block
    first: torch.Tensor | None = None  # and to the first token of its text, if that is an anchor
    weights: bool = False  # whether the attention weights are requested
    texts: torch.Tensor | None = None  # (B, T, 2) int64: the ids so far, and where a text begins


class Blocks:
    """Finds the block of every token that a localized model reads. Its arguments: see localize."""

    def __init__(self, model, tokenizer, partition, max_lookback, anchor, background):
        vocabulary = read_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
        self.unread = locality.Partitioner(vocabulary, partition, max_lookback, background)
        self.tokenizer, self.anchor, self.background = tokenizer, anchor, background
        self.partitioners = {}  # of the last call, by the tokens that they have read
        self.hooks, self.original = [], None  # original: the attention of the untouched model

    def attach(self, model, config):
        """Add the hooks that find blocks to the model, or to the models in it with this config.

        Adapters bypass the hooks of the outer model, but not those of the models inside it."""
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and part.config.get_text_config() is config:
                self.hooks.append(part.register_forward_pre_hook(self.before, with_kwargs=True))
                self.hooks.append(part.register_forward_hook(self.after, with_kwargs=True))

    def detach(self):
        for hook in self.hooks:
            hook.remove()

    @torch.compiler.disable
    def before(self, model, args, kwargs):
        """The hook that gives a call of the model the keyword argument "localist"."""
        if "localist" in kwargs:  # from the model around this one
            return args, kwargs
        if model.config.get_text_config()._attn_implementation != "localist":
            raise InputError("the attention was replaced after hub.localize; call it again")
        call = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        if call.get("output_attentions") is None:
            call["output_attentions"] = model.config.output_attentions
        return args, {**kwargs, "localist": self.read(**call)}

    @torch.compiler.disable
    def after(self, model, args, kwargs, output):
        """The hook that labels a cache that the model has made in this call."""
        for value in output.values() if isinstance(output, dict) else output:
            if isinstance(value, Cache):
                value.texts = kwargs["localist"].texts

    def read(self, **call):
        """The TokenInfo of the new tokens of a call of the model. call: the arguments of the call,
        such as a tokenizer returns. Raises InputError."""
        ids, mask, position = map(call.get, ("input_ids", "attention_mask", "position_ids"))
        cache = next((value for value in call.values() if isinstance(value, Cache)), None)
        n_old = 0 if cache is None else int(cache.get_seq_length())
        old = getattr(cache, "texts", None)
        if ids is None or ids.dim() != 2:
            raise InputError("blocks are found from input_ids, (B, n), which this call lacks")
        if n_old and (old is None or len(old) != len(ids) or old.size(1) < n_old):
            raise InputError(
                "the cache contains tokens that the localized model has not read; start with an "
                "empty one"
            )
        begins = torch.zeros_like(ids)
        if mask is None and position is not None and position.dim() == 2:  # packed texts
            begins[:, 1:] = position.diff() != 1
        texts = torch.stack((ids, begins), 2).cpu()  # (B, n, 2)
        texts = torch.cat((old[:, :n_old], texts), 1) if n_old else texts  # (B, T, 2)
        if cache is not None:
            cache.texts = texts  # beam search moves them: see with_texts
        shape = texts.shape[:2]
        mask = torch.ones(shape) if mask is None else mask
        if getattr(mask, "shape", None) != shape:
            raise InputError(
                f"the attention mask must have the shape {tuple(shape)}, with a 0 for padding and "
                "a 1 for each other token"
            )
        arrays = self.find(texts.numpy(), mask.bool().cpu().numpy(), n_old)
        lookback, first = (torch.from_numpy(x[:, n_old:]).to(ids.device) for x in arrays)
        first = first if self.anchor else None
        return TokenInfo(lookback, first, call.get("output_attentions"), texts)

    def find(self, texts, kept, n_old):
        """`read` without tensors: texts, (B, T, 2) int64, has the ids, and a 1 if a text begins.

        kept: (B, T) booleans, false for padding; n_old: how many of the T have been read before.
        Returns two arrays of integers, (B, T), whose first n_old columns mean nothing.
        """
        lookback, first = np.zeros(kept.shape, np.int64), np.zeros(kept.shape, np.int64)
        before, self.partitioners = self.partitioners, {}
        for row, (text, keep) in enumerate(zip(texts, kept)):
            places = np.flatnonzero(keep)
            for at in np.split(places, np.flatnonzero(text[places, 1])):
                tokens, n = text[at, 0], np.searchsorted(at, n_old)  # n of them are known
                if n == len(at):
                    continue
                partitioner = fork(before.get(tokens[:n].tobytes(), self.unread))
                partitioner.push(tokens[partitioner.n_tokens : n])
                back = partitioner.push(tokens[n:])
                lookback[row, at[n:]] = at[n:] - at[np.arange(n, len(at)) - back]
                first[row, at[n:]] = at[n:] - at[0]
                self.partitioners[tokens.tobytes()] = partitioner
        return lookback, first


def fork(partitioner):
    """A copy of a Partitioner, which continues by itself; what never changes is shared."""
    names = "token_bytes", "vocabulary", "n_bytes", "first_byte", "word_ids"
    shared = [getattr(partitioner, name) for name in names]
    if partitioner.change_points:
        shared.append(partitioner.change_points.evidence.base)
    return copy.deepcopy(partitioner, {id(value): value for value in shared})


def with_texts(method):
    """Wrap a method of Cache that reorders or repeats rows, so that it also does so with the rows
    of `cache.texts`. The argument of the method is a tensor with the old index of each new row, or
    an int, the number of copies of each row."""

    @wraps(method)
    def move(self, *args, **kwargs):
        method(self, *args, **kwargs)
        (how,) = *args, *kwargs.values()
        if hasattr(self, "texts"):
            rows = torch.arange(len(self.texts))
            rows = rows.repeat_interleave(how) if isinstance(how, int) else how.cpu()
            self.texts = self.texts[rows]

    return move


for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
    # unwrap: if this file is loaded again, the rows are still moved once
    setattr(Cache, name, with_texts(inspect.unwrap(getattr(Cache, name))))

# --------------------------------------------------------------------------------------------------
# the dial


def localize(
    model,
    tokenizer,
    schedule="quintic",
    floor=1.0,
    partition="semantic",
    max_lookback=512,
    anchor=False,
    background=None,
):
    """Give a model of `transformers` the dial, in place, and return it.

    model: a decoder; tokenizer: its own. schedule, floor: see locality.schedule. partition,
    max_lookback, background: see locality.Partitioner. anchor: the first token of a text belongs to
    every block. A second call replaces the first.
    Raises InputError for a model or a tokenizer that cannot be localized, and leaves it as it was.
    """
    if not isinstance(model, PreTrainedModel) or (
        model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False)
    ):
        raise InputError(f"{type(model).__name__} is not a decoder of transformers")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"{type(tokenizer).__name__} is not a tokenizer of transformers")
    if background is not None and not is_background(background):
        raise InputError("background must be what locality.count_background returns, or None")
    config = model.config.get_text_config()
    dial = locality.schedule(schedule, config.num_hidden_layers, floor)
    check_partition(partition, max_lookback)
    blocks = Blocks(model, tokenizer, partition, max_lookback, anchor, background)
    replace_attention(model, config, blocks)
    model.localist = blocks
    model.set_locality = partial(set_locality, model)
    model.save_pretrained = partial(save_pretrained, model)
    model.create_masks_for_generate = keep_mask
    settings = {"partition": partition, "max_lookback": blocks.unread.cap, "anchor": bool(anchor)}
    config.localist = {**getattr(config, "localist", {}), **settings}
    model.set_locality(dial)
    return model


def replace_attention(model, config, blocks):
    """Give a model localized attention, with these Blocks. Raises InputError if it does not pass
    `try_out`, and leaves it as it was."""
    old, dial = getattr(model, "localist", None), vars(config).get("locality")
    blocks.original = old.original if old else config._attn_implementation
    if blocks.original not in ("sdpa", "eager"):
        raise InputError(
            f"the attention {blocks.original!r} cannot be localized; load the model with "
            "attn_implementation='sdpa'"
        )
    problem = "interrupted"
    try:
        if old:
            old.detach()
            set_attention(model, config, old.original)
        problem = try_out(model, config, blocks)
    except Exception as e:  # a model may raise anything
        problem = str(e).strip().split("\n")[0] or type(e).__name__
    finally:
        if problem:
            blocks.detach()
            vars(config).pop("locality", None)
            if dial is not None:
                config.locality = dial
            if old:
                old.attach(model, config)
            attention = "localist" if old else blocks.original
            if config._attn_implementation != attention:
                set_attention(model, config, attention)
    if problem:
        raise InputError(f"{type(model).__name__} cannot be localized: {problem}")


@torch.no_grad()
def try_out(model, config, blocks):
    """Replace the attention of a model, and check on eight tokens that nothing else must change.

    Returns None, or what is wrong, a string.
    """
    ids = torch.arange(8, device=model.device)[None] * (config.vocab_size // 8)  # (1, 8)
    first, last = ids.clone(), ids.clone()
    first[0, 0] = last[0, -1] = ids[0, 3]
    parts = (part for part in model.modules() if getattr(part, "config", None) is config)
    layers = {part.layer_idx for part in parts if hasattr(part, "layer_idx")}
    single = {"localist": TokenInfo(torch.zeros_like(ids))}  # every token is a block
    was_training = model.training
    model.eval()
    try:
        y, y_last = logits(model, ids), logits(model, last)
        if y.dim() != 3 or y.size(1) != 8:
            return "it does not give an output for every token"
        if not y.isfinite().all():
            return "its outputs are not finite"
        if not close(y[:, :-1], y_last[:, :-1]):
            return "its tokens see later ones, so it is not a decoder"
        set_attention(model, config, "localist")
        blocks.attach(model, config)
        config.locality = [0.0] * config.num_hidden_layers
        if not close(y, logits(model, ids)):
            return "its attention has parts that hub.py does not know"
        config.locality = [1.0] * config.num_hidden_layers
        local, local_first = logits(model, ids, **single), logits(model, first, **single)
        if not close(local[:, 1:], local_first[:, 1:]):
            return "its tokens interact outside attention"
        if layers != {*range(config.num_hidden_layers)}:
            return "the number of its layers is not num_hidden_layers"
    finally:
        model.train(was_training)


def logits(model, ids, **kwargs):
    """What the model says of the ids, (B, T): (B, T, V) or, without an output head, (B, T, C)."""
    return model(input_ids=ids, use_cache=False, **kwargs)[0]


def close(a, b):
    """Whether two outputs of a model, of the same shape, are equal except for rounding."""
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 0.05
    return torch.allclose(a, b, 0, tolerance * float(a.abs().max()))


def set_attention(model, config, attention):
    """Set the attention function of a model or, if it reads more than text, of its text part.
    Raises InputError if that is impossible."""
    parts = {"text_config": attention}
    model.set_attn_implementation(attention if config is model.config else parts)
    if config._attn_implementation != attention:
        raise InputError("transformers cannot replace its attention")


def set_locality(model, dial):
    """Turn the dial of a localized model: one number in [0, 1] per layer, such as those of
    locality.schedule. It holds from the next forward pass on. Raises InputError for anything else.
    """
    config, numbers = model.config.get_text_config(), []
    with contextlib.suppress(TypeError, ValueError):
        numbers = [float(x) for x in dial]
    n = config.num_hidden_layers
    if len(numbers) != n or not all(0 <= x <= 1 for x in numbers):
        raise InputError(f"set_locality takes {n} numbers in [0, 1], not {dial!r}")
    config.locality = numbers
    config.localist["floor"] = max(numbers)


def keep_mask(attention_mask=None, **_):
    """Makes no mask, so that the model gets that of `generate` with its two dimensions, (B, T)."""
    return attention_mask


# --------------------------------------------------------------------------------------------------
# to disk and back

RULES = {"partition": str, "max_lookback": int, "anchor": bool}
SAVED = {"locality": [float], "localist": RULES}  # in config.json


def save_pretrained(model, save_directory, *args, **kwargs):
    """save_pretrained of `transformers`, which also writes the dial, the tokenizer and the
    background. Without this file, `transformers` reads the folder as the model that it was."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    model.localist.tokenizer.save_pretrained(save_directory)
    path = Path(save_directory, "background.json")
    path.unlink(missing_ok=True)
    if model.localist.background:
        write_text(path, json.dumps(model.localist.background) + "\n")


def load(folder, **kwargs):
    """A localized model from a folder or a repository, with its dial.

    folder: what save_pretrained wrote, of this file or of GPT; kwargs: of from_pretrained. Raises
    InputError if there is no language model, or if it does not say how its blocks are found.
    """
    place = "subfolder", "revision", "token", "cache_dir", "local_files_only"
    place = {name: kwargs[name] for name in place if name in kwargs}
    inside = Path(folder, kwargs.get("subfolder", ""))
    if inside.is_dir() and not (inside / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; if it is a run, docs/HUB.md exports it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **place)
        options = {"output_loading_info": True, **kwargs}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        path = cached_file(
            folder, "background.json", _raise_exceptions_for_missing_entries=False, **place
        )
    except (OSError, ValueError) as e:
        raise InputError(f"{folder} cannot be loaded: {str(e).split(chr(10))[0]}") from None
    if info["missing_keys"]:
        raise InputError(f"{folder} is incomplete: it has no output head or lacks other weights")
    config = model.config.get_text_config()
    saved = {name: getattr(config, name, None) for name in SAVED}
    if not fits(saved, SAVED):
        raise InputError(f"{folder} does not say how its blocks are found; use hub.localize")
    rules = {name: saved["localist"][name] for name in RULES}
    localize(model, tokenizer, **rules, background=read_json(path) if path else None)
    model.set_locality(saved["locality"])
    return model
