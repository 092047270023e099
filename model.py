"""
GPT-2 in a single file, with progressive localisation in its attention.

GPT-2: pre-norm blocks, tanh-GELU, biases everywhere, learned positions, output head tied to the token embedding.
Loads the published weights, exports them again, and equals `transformers` to within rounding.

What localisation adds (everything else is GPT-2):
  1. `clamp_lookback`, `block_mask`, `local_attention`: attention inside a token's semantic block, in O(T * W);
  2. a few lines in `CausalSelfAttention.forward` that blend it with the global attention;
  3. `GPT.set_locality`: the dial, one number per layer, changed at any time without retraining.

The blend of layer l, with its dial lambda_l in [0, 1] and the block B_i = {i - lookback_i, …, i} of query i:

    a_ij = (1 - lambda_l) * softmax over j <= i (s_ij)  +  lambda_l * softmax over j in B_i (s_ij)

So at least lambda_l of every query's attention stays in its block, whatever the weights: a certified fidelity.
"""

import json
import math
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from download import CACHE, download
from locality import InputError


@dataclass
class GPTConfig:
    vocab_size: int = 50257    # what the outside sees; inside it is padded to a multiple of 64
    block_size: int = 1024     # longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    max_lookback: int = 256    # no block reaches back further, in tokens
    min_lookback: int = 0      # every block reaches back at least so far
    anchor: bool = False       # the first token of the context belongs to every block
    dial: str = "blend"        # how lambda works: blend (certified), or penalty on the weights outside the block

    def __post_init__(self):
        for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "max_lookback"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise InputError(f"{key} must be a whole number of at least 1, not {getattr(self, key)!r}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), not {self.dropout}")
        if not 0 <= self.min_lookback <= self.max_lookback:
            raise InputError(f"min_lookback must be in 0 … max_lookback ({self.max_lookback}), not {self.min_lookback}")
        if self.dial not in ("blend", "penalty"):
            raise InputError(f"dial must be blend or penalty, not {self.dial!r}")


# ---------------------------------------------------------------------------------------------------------------------
# attention inside the block


def clamp_lookback(lookback, max_lookback, min_lookback=0):
    """The lookback that holds in this context: within min_lookback … max_lookback, and no further than its first token.

    lookback: (B, T) integers, tokens back from each query to the start of its block; returns (B, T) int64.
    """
    position = torch.arange(lookback.size(1), device=lookback.device)          # (T,)
    return lookback.long().clamp(min_lookback, max_lookback).minimum(position) # (B, T)


def block_mask(lookback, max_lookback, anchor=False):
    """Who sees whom in `local_attention`: queries in chunks of C, against the keys of their chunk and the W before it.

    lookback: (B, T) as `clamp_lookback` gives it; W = max_lookback, so that no block begins before those keys.
    Returns (B * n, 1, C, W + C) booleans for the n = ceil(T / C) chunks; or (B, 1, T, T), one chunk, where T <= W + C:
    cutting such a context would save nothing. anchor: every query sees token 0 as well, in a column of its own, the last,
    where there are chunks.
    """
    B, T = lookback.shape
    W, C = max_lookback, max(64, max_lookback // 2)    # shorter chunks look at fewer keys in vain, but make small matmuls
    n = -(-T // C)
    if T <= W + C:
        return in_block(lookback, anchor)[:, None]                             # (B, 1, T, T)
    outside = lookback < torch.arange(T, device=lookback.device)               # (B, T), whose block lacks token 0
    outside = F.pad(outside, (0, n * C - T)).view(B * n, 1, C, 1)
    r = F.pad(lookback, (0, n * C - T)).view(B * n, 1, C, 1)                   # a padded query sees only itself
    i = torch.arange(C, device=lookback.device)[:, None]                       # (C, 1)
    j = torch.arange(-W, C, device=lookback.device)[None, :]                   # (1, W + C), counted from the chunk's start
    distance = i - j
    mask = (distance >= 0) & (distance <= r)                                   # (B * n, 1, C, W + C)
    return torch.cat((mask, outside), -1) if anchor else mask


class Windows(torch.autograd.Function):
    """(n * C, H, D) -> (n, W + C, H, D): each chunk of C tokens behind the W before it (zeros before the first).

    One copy that the windows share: autograd's own way back through overlapping views is slow, this one adds them up.
    """

    @staticmethod
    def forward(ctx, x, C, W):
        ctx.sizes = C, W
        return F.pad(x, (0, 0, 0, 0, W, 0)).unfold(0, W + C, C).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        (C, W), n = ctx.sizes, len(grad)
        total = grad.new_zeros(n * C + W + C, *grad.shape[2:])
        for at in range(0, W + C, C):    # the part at `at` of every window: no two of these overlap
            part = grad[:, at:at + C]
            total[at:at + n * C].unflatten(0, (n, C))[:, :part.size(1)] += part
        return total[W:W + n * C], None, None


def local_attention(q, k, v, mask, max_lookback, dropout=0.0):
    """Softmax attention of each query over its block alone, in O(T * W) time and memory.

    q, k, v: (B, H, T, D); mask: from `block_mask`, for the same max_lookback W. Returns (B, H, T, D).
    """
    B, H, T, D = q.shape
    C, W = mask.size(-2), max_lookback
    n = mask.size(0) // B
    if n == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # the contexts one after another, like one text: the mask keeps them apart
    q, k, v = (F.pad(x, (0, 0, 0, n * C - T)).transpose(1, 2) for x in (q, k, v))                      # (B, n * C, H, D)
    first = [x[:, None, :1].expand(B, n, 1, H, D).flatten(0, 1) for x in (k, v)]                       # token 0
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))                             # (B * n * C, H, D)
    k, v = (Windows.apply(x, C, W) for x in (k, v))                            # (B * n, W + C, H, D)
    if mask.size(-1) > W + C:    # the anchor
        k, v = (torch.cat(pair, 1) for pair in zip((k, v), first))             # (B * n, W + C + 1, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q.unflatten(0, (B * n, C)), k, v))  # (B * n, H, C or W + C, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)                     # (B * n, H, C, D)
    return y.transpose(1, 2).reshape(B, n * C, H, D)[:, :T].transpose(1, 2)    # (B, H, T, D)


def in_block(lookback, anchor=False):
    """(B, T) lookback, clamped -> (B, T, T) booleans: key j is in the block of query i. anchor: so is token 0, always."""
    position = torch.arange(lookback.size(1), device=lookback.device)
    distance = position[:, None] - position[None, :]                           # (T, T)
    inside = (distance >= 0) & (distance <= lookback[:, :, None])              # (B, T, T)
    return inside | (position == 0) if anchor else inside


def causal(T, device):
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()            # (T, T)


def penalty_bias(block, visible, locality):
    """What the dial as a penalty adds to the scores: log(1 - lambda) outside the block, so that a_ij is in proportion to
    exp(s_ij) * (1 - lambda * [j outside]). Larger scores can undo it: the fidelity is not certified, unless lambda is 1.

    block: (B, 1, T, T) booleans from `in_block`; visible: booleans that broadcast with it, see `causal`. Returns float32 in
    the shape of block, -inf where nothing is visible.
    """
    outside = math.log1p(-locality) if locality < 1 else -math.inf
    return torch.zeros(block.shape, device=block.device).masked_fill(~block, outside).masked_fill(~visible, -math.inf)


def attention_weights(q, k, block, locality, dial="blend", visible=None):
    """The attention probabilities written down densely: the reference that the fast path is tested against, and what
    generation uses for its one query.

    q, k: (B, H, T, D); block: (B, 1, T, T) booleans from `in_block`; locality: the layer's lambda; dial: as in GPTConfig;
    visible: the keys there are for each query, by default all up to its own. Returns (B, H, T, T), rows sum to 1.
    """
    visible = causal(q.size(2), q.device) if visible is None else visible
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                   # (B, H, T, T)
    if dial == "penalty":
        return (scores + penalty_bias(block, visible, locality)).softmax(-1)
    a_global = scores.masked_fill(~visible, -math.inf).softmax(-1)
    a_local = scores.masked_fill(~block, -math.inf).softmax(-1)
    return (1 - locality) * a_global + locality * a_local                      # (B, H, T, T)


class Cache:
    """The keys and values of one layer while text is generated. Where lambda is 1, those of the last max_lookback + 1 tokens
    alone, plus token 0 if the block is anchored there: no block reaches further, so that the cache does not grow.

    Position p lies in slot p % size, where the newest tokens overwrite the oldest. longest: tokens, of any context to come.
    """

    def __init__(self, config, locality, longest):
        self.size = min(config.max_lookback + 1, longest) if locality == 1 else longest
        self.anchor = config.anchor
        self.sink = config.anchor and self.size < longest    # token 0 needs a slot of its own, the last

    def positions(self, n):
        """The position in each slot when the newest is n, (B,) int64: (B, S), negative where a slot is empty."""
        p = n[:, None] - (n[:, None] - torch.arange(self.size, device=n.device)) % self.size
        return torch.cat((p, -(n[:, None] < self.size).long()), 1) if self.sink else p

    def fill(self, k, v, n):
        """Take what is needed of the keys and values of contexts, (B, H, T, D), that end at positions n, (B,)."""
        p = self.positions(n).clamp(min=0)[:, None, :, None]
        self.k, self.v = k.take_along_dim(p, 2), v.take_along_dim(p, 2)        # (B, H, S, D)

    def push(self, k, v, n, lookback):
        """Add tokens at positions n, (B,). k, v: (B, H, 1, D). Returns who is in the block of each, and who is there at
        all, (B, 1, 1, S) booleans."""
        rows = torch.arange(len(n), device=n.device)
        self.k[rows, :, n % self.size], self.v[rows, :, n % self.size] = k[:, :, 0], v[:, :, 0]
        p = self.positions(n)                                                  # (B, S)
        block = p >= (n if lookback is None else n - lookback)[:, None]        # no lookback: no layer asks for it
        block = block | (p == 0) if self.anchor else block
        return block[:, None, None], (p >= 0)[:, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.dial = config.dial
        self.max_lookback = config.max_lookback
        self.locality = 0.0    # lambda of this layer; GPT.set_locality turns it

    def qkv(self, x):
        qkv = self.c_attn(x).unflatten(2, (3, self.n_head, -1))                # (B, T, 3, H, D)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)                            # three of (B, H, T, D)

    def forward(self, x, mask, keep=None):
        q, k, v = self.qkv(x)                                                  # (B, H, T, D)
        if keep:
            keep(k, v)
        dropout = self.dropout if self.training else 0.0
        if self.dial == "penalty" and self.locality > 0:
            bias = penalty_bias(mask, causal(x.size(1), x.device), self.locality).to(q.dtype)      # (B, 1, T, T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        elif self.locality < 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        if self.dial == "blend" and self.locality > 0:
            y_local = local_attention(q, k, v, mask, self.max_lookback, dropout)
            y = y_local if self.locality == 1 else torch.lerp(y, y_local, self.locality)
        y = self.c_proj(y.transpose(1, 2).flatten(2))                          # (B, T, C)
        return F.dropout(y, self.dropout, self.training)

    def step(self, x, cache, n, lookback):
        """The same for one more token of each context. x: (B, 1, C), at positions n, (B,)."""
        q, k, v = self.qkv(x)                                                  # (B, H, 1, D)
        block, visible = cache.push(k, v, n, lookback)
        y = attention_weights(q, cache.k, block, self.locality, self.dial, visible) @ cache.v      # (B, H, 1, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))                       # (B, 1, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))              # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, keep=None):
        x = x + self.attn(self.ln_1(x), mask, keep)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(-(-config.vocab_size // 64) * 64, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's 0.02 at its width of 768; a narrower model learns much faster from proportionally larger weights
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # residual branches start smaller, so that depth does not blow up the stream (Radford et al. 2019)
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
        # sinusoids (Vaswani et al. 2017) in place of noise: a place can be told from its neighbours from the first step on.
        # by numpy: the first sin of a process that torch shares out among threads is now and then less exact in one of
        # them (pytorch issue 188792), and no two runs could be trusted to begin at the same bits
        angle = np.arange(config.block_size)[:, None] / 1e4 ** np.linspace(0, 1, -(-config.n_embd // 2))
        waves = np.concatenate((np.sin(angle), np.cos(angle)), 1)[:, :config.n_embd]   # (block_size, C)
        with torch.no_grad():
            self.wpe.weight.copy_(math.sqrt(2) * std * torch.from_numpy(waves))

    def forward(self, idx, lookback=None, targets=None):
        """idx: (B, T) int64 token ids; lookback: (B, T) integers (needed unless every lambda is 0);
        targets: (B, T) int64, -1 = not scored. Returns logits (B, T, vocab_size) and the mean loss in nats, or None."""
        mask = self._mask(idx, lookback)
        x = self.embed(idx)                                                    # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        if targets is None:
            return self.head(x), None
        # a bias of -inf keeps the padded rows of wte out of the loss; to slice the logits would copy them, here and back
        V = self.config.vocab_size
        bias = F.pad(torch.zeros(V, device=x.device), (0, len(self.wte.weight) - V), value=-math.inf)
        logits = F.linear(self.ln_f(x), self.wte.weight, bias)                 # (B, T, V and the padding)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits[..., :V], loss

    def embed(self, idx):
        if idx.size(1) > self.config.block_size:
            raise InputError(f"a context of {idx.size(1)} tokens is longer than the model's {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:idx.size(1)]                      # (B, T, C)
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, x):
        # the padded rows of wte make a faster matmul; the slice keeps them invisible, without a copy
        return F.linear(self.ln_f(x), self.wte.weight)[..., :self.config.vocab_size]

    # -- the dial

    @property
    def locality(self):
        """lambda_l of every layer, a list of floats."""
        return [block.attn.locality for block in self.h]

    def set_locality(self, lambdas):
        """Turn the dial: one lambda in [0, 1] per layer. Takes effect at the next forward, without retraining."""
        if len(lambdas) != len(self.h) or not all(0 <= x <= 1 for x in lambdas):
            raise InputError(f"locality takes {len(self.h)} numbers in [0, 1], not {list(lambdas)}")
        for block, x in zip(self.h, lambdas):
            block.attn.locality = float(x)

    def _mask(self, idx, lookback):
        if not any(self.locality):
            return None
        if lookback is None:
            raise InputError("this model's attention is localised: it needs the lookback of its tokens")
        if self.config.dial == "penalty":
            return self.blocks(lookback)
        lookback = clamp_lookback(lookback, self.config.max_lookback, self.config.min_lookback)
        return block_mask(lookback, self.config.max_lookback, self.config.anchor)

    def blocks(self, lookback):
        """(B, T) lookback as prepared -> (B, 1, T, T) booleans: which keys this model counts to the block of each query."""
        lookback = clamp_lookback(lookback, self.config.max_lookback, self.config.min_lookback)
        return in_block(lookback, self.config.anchor)[:, None]

    @torch.no_grad()
    def attention_maps(self, idx, lookback):
        """Yield each layer's attention probabilities, (B, H, T, T), dense: for measurement, not for training."""
        mask, inside = self._mask(idx, lookback), self.blocks(lookback)
        x = self.embed(idx)
        for block in self.h:
            q, k, _ = block.attn.qkv(block.ln_1(x))
            yield attention_weights(q, k, inside, block.attn.locality, self.config.dial)
            x = block(x, mask)

    # -- generation

    @torch.no_grad()
    def generate(self, prompts, n, partitioners=None, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Yield n times a list of the next token id of each of some texts.

        prompts: lists of ids, none empty, of any lengths. partitioners: a fresh locality.Partitioner for each, which finds
        the blocks as the text grows (needed unless every lambda is 0). For the rest see `choose`.
        A context that has block_size tokens goes on with the last half of them, as if the text began there: positions are
        counted from the start of the context, so that moving on by a token would change all that was computed.
        """
        size, device = self.config.block_size, self.wte.weight.device
        texts, starts, caches = [list(prompt) for prompt in prompts], [0] * len(prompts), None
        lookbacks = [p.push(text).tolist() for p, text in zip(partitioners, texts)] if partitioners else None
        longest = min(size, max(map(len, texts)) + n)

        def contexts(rows):    # padded at the end, where causality keeps the padding out of sight
            return pad_sequence([torch.tensor(row[start:]) for row, start in zip(rows, starts)], True).to(device)  # (B, T)

        def newest(rows):
            return torch.tensor([row[-1] for row in rows], device=device)                                          # (B,)

        for _ in range(n):
            full = [len(text) - start > size for text, start in zip(texts, starts)]
            starts = [len(text) - (size + 1) // 2 if f else start for f, text, start in zip(full, texts, starts)]
            at = torch.tensor([len(text) - start - 1 for text, start in zip(texts, starts)], device=device)        # (B,)
            if caches is None or any(full):
                caches = [Cache(self.config, locality, longest) for locality in self.locality]
                x = self.read(contexts(texts), lookbacks and contexts(lookbacks), at, caches)                      # (B, C)
            else:
                x = self.step(newest(texts), lookbacks and newest(lookbacks), at, caches)
            tokens = choose(self.head(x).float(), temperature, top_k, top_p, generator).tolist()
            yield tokens
            for i, token in enumerate(tokens):
                texts[i].append(token)
                if partitioners:
                    lookbacks[i].extend(partitioners[i].push([token]).tolist())

    def read(self, idx, lookback, at, caches):
        """Fill the caches with contexts, (B, T), that end at positions `at`, (B,). Returns (B, C), for the head."""
        mask, x = self._mask(idx, lookback), self.embed(idx)                   # (B, T, C)
        for block, cache in zip(self.h, caches):
            x = block(x, mask, lambda k, v: cache.fill(k, v, at))
        return x[torch.arange(len(at), device=at.device), at]

    def step(self, token, lookback, at, caches):
        """Go on from the caches by a token each. token, lookback, at: (B,), what it is, its blocks, its position."""
        x = (self.wte(token) + self.wpe(at))[:, None]                          # (B, 1, C)
        if lookback is not None:
            lookback = lookback.clamp(self.config.min_lookback, self.config.max_lookback).minimum(at)
        for block, cache in zip(self.h, caches):
            x = x + block.attn.step(block.ln_1(x), cache, at, lookback)
            x = x + block.mlp(block.ln_2(x))
        return x[:, 0]

    # -- weights in and out

    @classmethod
    def from_pretrained(cls, name_or_path, block_size=None, **settings):
        """GPT-2 with published or saved weights, every lambda 0.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once, then cached); or a folder or file in the
        published format (pytorch_model.bin, or model.safetensors where that package is installed), or a run of train.py.
        block_size: use fewer positions than the weights have. settings: dropout, max_lookback, min_lookback, anchor, dial
        of GPTConfig; a run has its own. Raises InputError for anything that is not a whole GPT-2.
        """
        path = download_gpt2(name_or_path) if name_or_path in PRETRAINED else find_weights(Path(name_or_path))
        state, config = read_weights(path)
        if block_size and block_size > config.block_size:
            raise InputError(f"block_size {block_size} is more than the {config.block_size} positions of {name_or_path}")
        config = replace(config, block_size=block_size or config.block_size, **settings)
        with torch.device("meta"):
            model = cls(config)
        expected = {name: p.shape for name, p in model.state_dict().items()}
        state["wpe.weight"] = state["wpe.weight"][:config.block_size]
        state["wte.weight"] = F.pad(state["wte.weight"], (0, 0, 0, expected["wte.weight"][0] - config.vocab_size))
        for name, shape in expected.items():
            if name not in state:
                raise InputError(f"{path}: tensor {name} is missing: not a whole GPT-2")
            if state[name].shape != shape:
                raise InputError(f"{path}: tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}")
            if not state[name].is_floating_point() or not state[name].float().isfinite().all():
                raise InputError(f"{path}: tensor {name} holds something else than finite numbers")
        model = model.to_empty(device="cpu")
        model.load_state_dict({name: state[name] for name in expected})
        return model

    def save_pretrained(self, folder):
        """Write pytorch_model.bin and config.json, which `transformers` loads as GPT2LMHeadModel (it knows no locality)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        c = self.config
        state = {}
        for name, p in self.state_dict().items():
            p = p[:c.vocab_size] if name == "wte.weight" else p
            state[f"transformer.{name}"] = (p.t() if name.endswith(TRANSPOSED) else p).detach().cpu().contiguous()
        state["lm_head.weight"] = state["transformer.wte.weight"]
        save(state, folder / "pytorch_model.bin")
        text = json.dumps({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
            "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer,
            "n_head": c.n_head, "n_embd": c.n_embd, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
            "attn_pdrop": c.dropout, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout, "tie_word_embeddings": True,
            "bos_token_id": c.vocab_size - 1, "eos_token_id": c.vocab_size - 1}, indent=2)
        temporary = folder / f"config.json.{os.getpid()}.tmp"
        temporary.write_text(text + "\n")
        os.replace(temporary, folder / "config.json")


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """A token for each row of logits, (B, V) float32 -> (B,) int64, drawn from softmax(logits / temperature).

    temperature 0: the likeliest. top_k: among the k likeliest alone; 0: all. top_p: among the fewest likeliest that have
    the probability p together.
    """
    if temperature < 1e-6:    # the likeliest token is certain by far, and float32 would divide by 0 some way below
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        likeliest, token = p.sort(descending=True)
        likeliest[likeliest.cumsum(-1) - likeliest >= top_p] = 0               # the tokens before it have p already
        p = torch.zeros_like(p).scatter(1, token, likeliest)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# files

# pytorch_model.bin of each: its length in bytes, and its sha256 where we could verify one (for the others the hub's own
# record of the file is asked)
PRETRAINED = {
    "gpt2": (548118077, "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
    "gpt2-medium": (1520013706, None),
    "gpt2-large": (3247202234, None),
    "gpt2-xl": (6431878936, None),
}
# the published weights store these as (in, out); nn.Linear wants (out, in)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def download_gpt2(name):
    """The path of pytorch_model.bin of one of the four published sizes, downloaded if the cache has no copy.

    HF_ENDPOINT names a mirror; LOCALIST_CACHE another cache folder. Raises InputError when it cannot be had whole.
    """
    path = CACHE / name / "pytorch_model.bin"
    size, sha256 = PRETRAINED[name]
    if path.exists() and path.stat().st_size == size:
        return path    # a download was checked before it got this name; what is put here by hand is the user's word
    hub = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/openai-community/{name}"
    try:
        if sha256 is None:
            pointer = download(f"{hub}/raw/main/pytorch_model.bin", path.with_name(f"pointer.{os.getpid()}"), limit=1000)
            lines = pointer.read_text(errors="replace").splitlines()
            pointer.unlink()
            sha256 = next(line[-64:] for line in lines if line.startswith("oid sha256:"))
        return download(f"{hub}/resolve/main/pytorch_model.bin", path, size, sha256)
    except StopIteration:
        raise InputError(f"{hub} names no sha256 for pytorch_model.bin; try another HF_ENDPOINT") from None
    except InputError as e:
        raise InputError(f"{e}. Without a network, put the file at {path}, or name a local folder in init_from") from None


def find_weights(path):
    if path.is_file():
        return path
    for name in ("best.pt", "last.pt", "pytorch_model.bin", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise InputError(f"{path}: no best.pt, pytorch_model.bin or model.safetensors in this folder")
    raise InputError(f"{path}: no such file or folder, and not one of {', '.join(PRETRAINED)}")


def load(path):
    """torch.load that executes nothing: a dict of tensors and plain values, or InputError.

    torch.save writes a checksum of every tensor that torch.load does not look at: one flipped bit would load as another
    weight. It is checked here, at 2 to 3 GB/s, which is faster than loading. Files in torch's old format have none.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # an entry with attributes may be a folder, which torch reads as a tensor of whatever was in memory
                odd = [entry.filename for entry in archive.infolist() if entry.external_attr or entry.compress_type]
                if damaged := odd[0] if odd else archive.testzip():
                    raise InputError(f"{path}: damaged: {damaged} in it does not fit its checksum")
        with warnings.catch_warnings(action="ignore"):    # it refuses, or it reads: nothing to wonder about in between
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise InputError(f"{path}: not the weights of a model")
        return state
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused: it is damaged, or holds more than plain weights; nothing in it was run") from None
    except Exception as e:    # whatever a damaged archive trips over
        raise InputError(f"{path}: not a readable weights file ({type(e).__name__}): damaged or half a download") from None


def save(state, path):
    """torch.save to a temporary name, synced, then renamed: `path` is always a whole file.

    Raises InputError where it cannot be written: the disk is full, or one is not allowed to.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        reason = e if isinstance(e, OSError) else e.__context__    # torch covers the system's error with one of its own
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path}: could not be written ({reason.strerror}); what stood there before is whole") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path):
    """The tensors of a weights file, under this model's names and orientation, and the GPTConfig that fits them.

    Reads what train.py saves and the published format. Raises InputError for anything else.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise InputError(f"{path}: reading it needs 'pip install safetensors'; or use pytorch_model.bin") from None
        try:
            state = load_file(path)
        except (SafetensorError, OSError, ValueError) as e:
            raise InputError(f"{path}: not a readable weights file ({e})") from None
    else:
        state = load(path)
    ours = "model_config" in state
    tensors = state.get("model") if ours else state
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in tensors.items()):
        raise InputError(f"{path}: not the weights of a model")
    tensors = {name.removeprefix("transformer."): v for name, v in tensors.items()}
    try:
        vocab_size, n_embd = tensors["wte.weight"].shape
        block_size, _ = tensors["wpe.weight"].shape
        n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
        if ours:
            config = GPTConfig(**state["model_config"])
            if (-(-config.vocab_size // 64) * 64, config.block_size, config.n_layer, config.n_embd) != (
                    vocab_size, block_size, n_layer, n_embd):
                raise InputError("its model_config is of another shape")
            return {**tensors, "wte.weight": tensors["wte.weight"][:config.vocab_size]}, config
        config = GPTConfig(vocab_size, block_size, n_layer, read_n_head(path, n_embd), n_embd)
    except (KeyError, ValueError, TypeError) as e:    # InputError is a ValueError
        reason = e if isinstance(e, InputError) else "it lacks wte.weight or wpe.weight, or their shape is another"
        raise InputError(f"{path}: no GPT-2 in this file ({reason})") from None
    if not torch.equal(tensors.get("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
        raise InputError(f"{path}: its lm_head.weight is not tied to wte.weight, as it is in GPT-2")
    return {name: v.t() if name.endswith(TRANSPOSED) and v.dim() == 2 else v for name, v in tensors.items()}, config


def read_n_head(path, n_embd):
    """The number of heads, which leaves no trace in the weights: from the config.json beside them, or the published size.

    Raises InputError where that config.json is of another model than GPT-2, or there is none and the size is not published.
    """
    beside = path.with_name("config.json")
    if not beside.is_file():
        if n_embd not in (768, 1024, 1280, 1600):
            raise InputError(f"{beside} is missing, which tells the number of heads")
        return n_embd // 64
    try:
        other = json.loads(beside.read_text(encoding="utf-8"))
        n_head = int(other["n_head"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{beside} lacks n_head") from None
    gpt2 = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,), "n_inner": (None, 4 * n_embd),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
    for key, values in gpt2.items():
        if key in other and other[key] not in values:
            raise InputError(f"{beside} has {key} = {other[key]}; GPT-2 has {values[0]}")
    return n_head
