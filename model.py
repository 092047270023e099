"""GPT-2 in a single file, with progressive localization in its attention.

GPT-2: pre-norm layers, tanh-GELU, biases everywhere, learned positions, and an output head tied to
the token embedding. It loads the published weights, exports them again, and equals `transformers`
to within rounding.

Localization adds three things; everything else is GPT-2:

1. `in_block`: which keys belong to the block of each query
2. `attention_weights`: the blend of attention over the context and attention over the block
3. `GPT.set_locality`: the dial, one number per layer, which can be turned at any time

With lambda_l in [0, 1], the locality of layer l, and the block B_i = {i - lookback_i, ..., i}:

    a_ij = (1 - lambda_l) * softmax over j <= i (s_ij)  +  lambda_l * softmax over j in B_i (s_ij)

So at least lambda_l of every query's attention stays in its block, whatever the weights are. This
is the certified floor of the layer (arXiv 2511.18375; the blend is ours).

fast/attention.py and fast/loss.py compute the same, faster. With `plain = True` in the config, the
model uses only the code in this file: a change to the definition takes effect at once.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fast.attention import BlockMask, blended_attention, block_mask, flex_applies
from fast.loss import head_loss
from support import published, weights
from support.files import InputError
from support.settings import check, key


@dataclass
class GPTConfig:
    vocab_size: int = key(50257, "tokens; padded internally to a multiple of 64", at_least=1)
    block_size: int = key(1024, "longest context, in tokens", at_least=1)
    n_layer: int = key(12, "layers", at_least=1)
    n_head: int = key(12, "attention heads per layer", at_least=1)
    n_embd: int = key(768, "width of the model", at_least=1)
    dropout: float = key(0.0, "share of activations dropped in training", at_least=0, below=1)
    max_lookback: int = key(512, "no block reaches back further, in tokens", at_least=1)
    anchor: bool = key(False, "the first token of the context belongs to every block")
    plain: bool = key(False, "compute everything as this file defines it, without fast/")

    def __post_init__(self):
        check(self)
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


# --------------------------------------------------------------------------------------------------
# localization


def clamp_lookback(lookback, max_lookback, position=None):
    """Cut the lookback to the context: at most max_lookback, and never before its first token.

    lookback: (B, T) integers, tokens from each query back to the start of its block. position: of
    each query in its context, if that is not 0 ... T - 1.
    Returns (B, T) int64.
    """
    if position is None:
        position = torch.arange(lookback.size(1), device=lookback.device)  # (T,)
    return lookback.long().clamp(0, max_lookback).minimum(position)  # (B, T)


def in_block(lookback, anchor=False, first=0):
    """Is key j in the block of query i? (B, n) clamped lookback -> (B, n, first + n) booleans.

    The queries are the n tokens from `first` on; the keys are all tokens up to the last of them.
    anchor: token 0 belongs to every block.
    """
    position = torch.arange(first + lookback.size(1), device=lookback.device)
    distance = position[first:, None] - position[None, :]  # (n, first + n)
    inside = (distance >= 0) & (distance <= lookback[:, :, None])  # (B, n, first + n)
    return inside | (position == 0) if anchor else inside


def attention_weights(q, k, block, locality, visible=None):
    """The definition: attention over the context, blended with attention over the block.

    q: (B, H, n, D), the last n of the T tokens of k, (B, H, T, D); block: (B, 1, n, T) booleans
    from `in_block`; locality: lambda of this layer; visible: booleans like block, if the context is
    not every earlier token.
    Returns the attention probabilities, (B, H, n, T). Rows sum to 1.
    """
    if visible is None:
        n, T = q.size(2), k.size(2)
        visible = torch.ones(n, T, dtype=torch.bool, device=q.device).tril(T - n)  # causal
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, n, T)
    if locality < 1:
        a = scores.masked_fill(~visible, -math.inf).softmax(-1)
    if locality > 0:
        a_local = scores.masked_fill(~block, -math.inf).softmax(-1)
        a = (1 - locality) * a + locality * a_local if locality < 1 else a_local
    return a  # (B, H, n, T)


# --------------------------------------------------------------------------------------------------
# GPT-2


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout, self.plain = config.n_head, config.dropout, config.plain
        self.locality = 0.0  # lambda of this layer; GPT.set_locality changes it

    def qkv(self, x):
        qkv = self.c_attn(x).unflatten(2, (3, self.n_head, -1))  # (B, T, 3, H, D)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D)

    def forward(self, x, mask, watch=None):
        """x: (B, T, C); mask: see GPT.mask; watch: see GPT.hidden."""
        q, k, v = self.qkv(x)  # (B, H, T, D)
        if watch and (cached := watch(q, k, v)):
            k, v, mask = cached  # (B, H, S, D), the keys and values to look at
        dropout = self.dropout if self.training else 0.0
        if self.plain:
            a = attention_weights(q, k, mask, self.locality)  # (B, H, T, T)
            y = F.dropout(a, dropout) @ v  # (B, H, T, D)
        else:
            y = blended_attention(q, k, v, mask, self.locality, dropout)
        y = self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, watch=None):
        x = x + self.attn(self.ln_1(x), mask, watch)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(-(-config.vocab_size // 64) * 64, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.partition = self.background = None  # of the run that it is from; exports keep them
        self.init_weights()

    def init_weights(self):
        # GPT-2's 0.02 at its width of 768; a narrower model learns much faster from larger weights
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # residual branches start smaller, so that depth does not blow up the stream
                # (Radford et al. 2019)
                small = std / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=small if name.endswith("c_proj.weight") else std)
        # Positions start as sinusoids (Vaswani et al. 2017) instead of noise, so that a position
        # differs from its neighbors from the first step on. They are computed by numpy because the
        # first sin that torch computes in a process is sometimes less exact (PyTorch issue 188792),
        # and then no two runs would start from the same bits.
        angle = np.arange(self.config.block_size)[:, None]
        angle = angle / 1e4 ** np.linspace(0, 1, -(-self.config.n_embd // 2))  # (block_size, C / 2)
        waves = np.concatenate((np.sin(angle), np.cos(angle)), 1)[:, : self.config.n_embd]
        with torch.no_grad():
            self.wpe.weight.copy_(math.sqrt(2) * std * torch.from_numpy(waves))

    def forward(self, idx, lookback=None, targets=None):
        """Read a batch of contexts.

        idx: (B, T) int64 token ids; lookback: (B, T) integers, needed unless every lambda is 0;
        targets: (B, T) int64, -1 = not scored.
        Returns (logits (B, T, vocab_size), None); with targets, (None, the mean loss in nats).
        Raises InputError if the context is too long or the lookback is missing.
        """
        x = self.hidden(idx, lookback)  # (B, T, C)
        if targets is None:
            return self.head(x), None
        if self.config.plain:
            logits = self.head(x).flatten(0, 1).float()  # (B * T, V)
            return None, F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
        return None, head_loss(self.ln_f(x), self.wte.weight, targets, self.config.vocab_size)

    def hidden(self, idx, lookback=None, watch=None, position=None):
        """The input of the output head for a batch, (B, T, C).

        watch: called with the number of each layer, from 0 on, and its q, k and v, (B, H, T, D)
        each. It may return other keys, values and mask to use instead: see sample.KVCache.
        position: (B, T) int64, if it is not 0 ... T - 1. For the rest see `forward`.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise InputError(
                f"a context of {T} tokens is longer than the {self.config.block_size} that this "
                "model can read"
            )
        mask = self.mask(lookback) if position is None else None
        p = self.wpe.weight[:T] if position is None else self.wpe(position)  # (T, C) or (B, T, C)
        x = F.dropout(self.wte(idx) + p, self.config.dropout, self.training)  # (B, T, C)
        for number, layer in enumerate(self.h):
            x = layer(x, mask, watch and partial(watch, number))
        return x

    def head(self, x):
        # the padded rows of wte make a faster matmul; the slice hides them, without a copy
        return F.linear(self.ln_f(x), self.wte.weight)[..., : self.config.vocab_size]

    # -- the dial

    @property
    def locality(self):
        """lambda_l of every layer, a list of floats."""
        return [layer.attn.locality for layer in self.h]

    def set_locality(self, locality):
        """Turn the dial: one number in [0, 1] per layer. It holds from the next forward pass on.

        Raises InputError for anything but n_layer such numbers.
        """
        if len(locality) != len(self.h) or not all(0 <= x <= 1 for x in locality):
            raise InputError(
                f"set_locality takes {len(self.h)} numbers in [0, 1], not {list(locality)}"
            )
        for layer, x in zip(self.h, locality):
            layer.attn.locality = float(x)

    def in_block(self, lookback):
        """Which keys are in the block of each query? (B, T) lookback -> (B, 1, T, T) booleans."""
        lookback = clamp_lookback(lookback, self.config.max_lookback)
        return in_block(lookback, self.config.anchor)[:, None]

    def mask(self, lookback):
        """The mask for a (B, T) lookback: (B, 1, T, T) booleans if plain, otherwise a BlockMask."""
        c = self.config
        if c.plain and lookback is not None:
            return self.in_block(lookback)
        if not any(self.locality):
            return BlockMask()
        if lookback is None:
            raise InputError("this model's attention is localized: pass the lookback of its tokens")
        dropout = c.dropout if self.training else 0.0
        tiled = flex_applies(lookback, c.n_embd // c.n_head, dropout)
        lookback = clamp_lookback(lookback, c.max_lookback)
        return block_mask(lookback, c.max_lookback, c.anchor, tiled)

    # -- weights in and out

    @classmethod
    def from_pretrained(cls, name_or_path, block_size=None, **settings):
        """GPT-2 with published or saved weights and a locality of 0 in every layer.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once, then cached); or a
        folder or file in the published format (pytorch_model.bin, or model.safetensors if that
        package is installed); or a run of train.py. block_size: use fewer positions than the
        weights have. settings: dropout, max_lookback, anchor, plain of GPTConfig.
        Raises InputError for anything that is not a complete GPT-2.
        """
        path = weights.find(name_or_path)
        return cls.from_state(weights.load(path), path, block_size, **settings)

    @classmethod
    def from_state(cls, state, path, block_size=None, **settings):
        """The same from the content of the file `path`, a dict."""
        tensors, config = published.unpack(state, path, block_size)
        try:
            config = GPTConfig(**{**config, **settings})
        except (InputError, TypeError) as e:
            raise InputError(f"{path}: there is no GPT-2 in this file ({e})") from None
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        tensors = published.fit(tensors, shapes, model.config.vocab_size, path)
        model.to_empty(device="cpu").load_state_dict(tensors)
        model.partition, model.background = published.origin_of(state)
        return model

    def save_pretrained(self, folder):
        """Write the model and its tokenizer, which `transformers` loads as a plain GPT-2.

        config.json keeps the dial as it is now: see support/published.py. Raises InputError if the
        export cannot be written.
        """
        published.publish(self, folder)
