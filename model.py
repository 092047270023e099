"""GPT-2 in a single file, with progressive localisation in its attention.

GPT-2: pre-norm layers, tanh-GELU, biases everywhere, learned positions, output head tied to the
token embedding. It loads the published weights, exports them again, and equals `transformers` to
within rounding.

What localisation adds; everything else is GPT-2:

1. `block_mask` and `local_attention`: attention inside a token's block, in O(T * W)
2. three lines in `CausalSelfAttention.forward` that blend it with the global attention
3. `GPT.set_locality`: the dial, one number per layer, changed at any time without retraining

The blend of layer l, with the dial lambda_l in [0, 1] and the block B_i = {i - lookback_i, ..., i}:

    a_ij = (1 - lambda_l) * softmax over j <= i (s_ij)  +  lambda_l * softmax over j in B_i (s_ij)

So at least lambda_l of every query's attention stays in its block, whatever the weights: that is
the certified floor of the layer (arXiv 2511.18375; the blend is ours).
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.nn.utils.rnn import pad_sequence

from support import weights
from support.files import InputError
from support.settings import check, key


@dataclass
class GPTConfig:
    vocab_size: int = key(50257, "tokens; inside, padded to a multiple of 64", at_least=1)
    block_size: int = key(1024, "longest context, in tokens", at_least=1)
    n_layer: int = key(12, "layers", at_least=1)
    n_head: int = key(12, "attention heads per layer", at_least=1)
    n_embd: int = key(768, "width of the model", at_least=1)
    dropout: float = key(0.0, "share of activations dropped in training", at_least=0, below=1)
    max_lookback: int = key(512, "no block reaches back further, in tokens", at_least=1)
    anchor: bool = key(False, "the first token of the context belongs to every block")

    def __post_init__(self):
        check(self)
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


# --------------------------------------------------------------------------------------------------
# localisation: attention inside the block

TILE = 128  # queries, or keys, that a kernel of a GPU takes at a time


def clamp_lookback(lookback, max_lookback):
    """The lookback that holds in this context: at most max_lookback, never before its first token.

    lookback: (B, T) integers, tokens from each query back to the start of its block.
    Returns (B, T) int64.
    """
    position = torch.arange(lookback.size(1), device=lookback.device)  # (T,)
    return lookback.long().clamp(0, max_lookback).minimum(position)  # (B, T)


def in_block(lookback, anchor=False, first=0):
    """Is key j in the block of query i? (B, n) lookback, clamped -> (B, n, first + n) booleans.

    The queries are the n tokens from `first` on, the keys all tokens up to the last of them.
    anchor: token 0 is in every block.
    """
    position = torch.arange(first + lookback.size(1), device=lookback.device)
    distance = position[first:, None] - position[None, :]  # (n, first + n)
    inside = (distance >= 0) & (distance <= lookback[:, :, None])  # (B, n, first + n)
    return inside | (position == 0) if anchor else inside


def attention_weights(q, k, block, locality):
    """The blend written down densely: the definition, and the reference of the fast path below.

    q: (B, H, n, D), the last n of the T tokens of k, (B, H, T, D); block: (B, 1, n, T) booleans
    from `in_block`; locality: the layer's lambda.
    Returns (B, H, n, T), the attention probabilities; rows sum to 1.
    """
    n, T = q.size(2), k.size(2)
    visible = torch.ones(n, T, dtype=torch.bool, device=q.device).tril(T - n)  # up to its own
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, n, T)
    if locality < 1:
        a = scores.masked_fill(~visible, -math.inf).softmax(-1)
    if locality > 0:
        a_local = scores.masked_fill(~block, -math.inf).softmax(-1)
        a = (1 - locality) * a + locality * a_local if locality < 1 else a_local
    return a  # (B, H, n, T)


class BlockMask(NamedTuple):
    """Which keys each query's block holds, in one of three forms that `local_attention` takes.

    A short context has a dense mask. A long one is cut into n chunks of C queries; each chunk looks
    at the W + C keys that end with its own: W = max_lookback before it, and the chunk itself.
    FlexAttention has tiles: see `tiled_mask`.
    """

    dense: torch.Tensor | None = None  # (B, 1, T, T) booleans
    chunked: torch.Tensor | None = None  # (B * n, 1, C, W + C) booleans
    anchored: bool = False  # chunked has one more column, the last, for token 0
    tiled: flex.BlockMask | None = None


def block_mask(lookback, max_lookback, anchor=False, tiled=False):
    """The BlockMask of a batch. lookback: (B, T) as `clamp_lookback` gives it.

    tiled: for FlexAttention. It has a backward pass on GPUs alone, and is fast where compiled.
    """
    if tiled:
        return BlockMask(tiled=tiled_mask(lookback, anchor))
    B, T = lookback.shape
    W, C = max_lookback, max(64, max_lookback // 2)  # shorter chunks make small, slow matmuls
    # On a GPU no mask ends with half a tile of keys: there cuDNN's attention can have gradients
    # that are NaN (pytorch issue 196678).
    cpu = lookback.is_cpu
    C += 0 if cpu else -(W + C + anchor) % TILE
    if T <= W + C and (cpu or T % TILE != TILE // 2):  # to cut such a context would save nothing
        return BlockMask(in_block(lookback, anchor)[:, None])
    n = -(-T // C)
    position = torch.arange(T, device=lookback.device)
    padded = F.pad(lookback, (0, n * C - T)).view(B * n, 1, C, 1)  # padding sees only itself
    i = torch.arange(C, device=lookback.device)[:, None]  # (C, 1)
    j = torch.arange(-W, C, device=lookback.device)[None, :]  # (1, W + C), from the chunk's start
    distance = i - j
    chunked = (distance >= 0) & (distance <= padded)  # (B * n, 1, C, W + C)
    if not anchor:
        return BlockMask(chunked=chunked)
    outside = lookback < position  # (B, T): whose block lacks token 0
    outside = F.pad(outside, (0, n * C - T)).view(B * n, 1, C, 1)
    return BlockMask(chunked=torch.cat((chunked, outside), -1), anchored=True)


class Windows(torch.autograd.Function):
    """(n * C, H, D) -> (n, W + C, H, D): each chunk of C tokens behind the W before it.

    Zeros come before the first. The windows share one copy. Autograd's own way back through
    overlapping views is slow; this one adds them up.
    """

    @staticmethod
    def forward(ctx, x, C, W):
        ctx.sizes = C, W
        return F.pad(x, (0, 0, 0, 0, W, 0)).unfold(0, W + C, C).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        (C, W), n = ctx.sizes, len(grad)
        total = grad.new_zeros(n * C + W + C, *grad.shape[2:])
        for at in range(0, W + C, C):  # the part at `at` of every window: no two of these overlap
            part = grad[:, at : at + C]
            total[at : at + n * C].unflatten(0, (n, C))[:, : part.size(1)] += part
        return total[W : W + n * C], None, None


def local_attention(q, k, v, mask, dropout=0.0):
    """Softmax attention of each query over its block alone, in O(T * W) time and memory.

    q, k, v: (B, H, T, D); mask: a BlockMask. Returns (B, H, T, D).
    """
    if mask.tiled is not None:
        return flex.flex_attention(q, k, v, block_mask=mask.tiled)
    if mask.chunked is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, dropout_p=dropout)
    B, H, T, D = q.shape
    n, C = mask.chunked.size(0) // B, mask.chunked.size(2)
    W = mask.chunked.size(3) - C - mask.anchored
    # the contexts one after another, like one text: the mask keeps them apart
    q, k, v = (F.pad(x, (0, 0, 0, n * C - T)).transpose(1, 2) for x in (q, k, v))  # (B, n*C, H, D)
    first = [x[:, None, :1].expand(B, n, 1, H, D).flatten(0, 1) for x in (k, v)]  # token 0
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * n * C, H, D)
    k, v = (Windows.apply(x, C, W) for x in (k, v))  # (B * n, W + C, H, D)
    if mask.anchored:  # one more key
        k, v = (torch.cat(pair, 1) for pair in zip((k, v), first))  # (B * n, W + C + 1, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q.unflatten(0, (B * n, C)), k, v))  # (B * n, H, .., D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.chunked, dropout_p=dropout)
    return y.transpose(1, 2).reshape(B, n * C, H, D)[:, :T].transpose(1, 2)  # (B, H, T, D)


def tiled_mask(lookback, anchor=False):
    """The mask of FlexAttention (Dong et al. 2024, arXiv 2412.05496), a BlockMask of torch's.

    lookback: (B, T), clamped. The kernel leaves out the tiles of keys that no query of a tile
    needs. It asks for single keys only in tiles that are seen in part. Both lists of tiles are made
    of the lookback alone, in O(T + (T / TILE)^2).
    """
    T = lookback.size(1)
    lookback = F.pad(lookback, (0, -T % TILE))  # padding sees only itself
    start = torch.arange(lookback.size(1), device=lookback.device) - lookback  # (B, n * TILE)

    def sees(b, h, query, key):
        inside = (key >= start[b, query]) & (key <= query)
        return inside | (key == 0) if anchor else inside

    tiles = start.unflatten(1, (-1, TILE))  # (B, n, TILE)
    first = tiles.amin(2, keepdim=True) // TILE  # (B, n, 1): the first tile of keys that any needs,
    clear = -(-tiles.amax(2, keepdim=True) // TILE)  # and the first that all of them see whole
    key = torch.arange(tiles.size(1), device=lookback.device)
    query = key[:, None]
    needed = (key >= first) & (key <= query)  # (B, n, n)
    needed = needed | (key == 0) if anchor else needed
    whole = (key >= clear) & (key < query)  # its own tile holds keys that come after a query
    lists = []
    for listed in (needed & ~whole, whole):  # how many they are, and their numbers, those first
        order = listed.int().argsort(dim=-1, descending=True, stable=True)
        lists += [listed.sum(-1, dtype=torch.int)[:, None], order[:, None].int()]
    how = {"BLOCK_SIZE": TILE, "mask_mod": sees, "seq_lengths": (T, T)}
    return flex.BlockMask.from_kv_blocks(*lists, **how)


# --------------------------------------------------------------------------------------------------
# GPT-2


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.locality = 0.0  # lambda of this layer; GPT.set_locality turns it

    def qkv(self, x):
        qkv = self.c_attn(x).unflatten(2, (3, self.n_head, -1))  # (B, T, 3, H, D)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D)

    def forward(self, x, mask, watch=None):
        """x: (B, T, C); mask: a BlockMask, None if every lambda is 0; watch: sees q, k and v."""
        q, k, v = self.qkv(x)  # (B, H, T, D)
        if watch:
            watch(q, k, v)
        dropout = self.dropout if self.training else 0.0
        # localisation: two standard attentions and one blend
        if self.locality < 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        if self.locality > 0:
            y_local = local_attention(q, k, v, mask, dropout)
            y = torch.lerp(y, y_local, self.locality) if self.locality < 1 else y_local
        y = self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)

    def step(self, x, cache, place):
        """The same for one more token of each context. x: (B, 1, C); place: its Place."""
        q, k, v = self.qkv(x)  # (B, H, 1, D)
        k, v = cache.push(k, v, place)  # (B, H, S, D)
        if self.locality < 1:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=place.visible)  # (B, H, 1, D)
        if self.locality > 0:
            y_local = F.scaled_dot_product_attention(q, k, v, attn_mask=place.block)
            y = torch.lerp(y, y_local, self.locality) if self.locality < 1 else y_local
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, 1, C)


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
        x = x + self.attn(self.ln_1(x), mask, watch)
        return x + self.mlp(self.ln_2(x))

    def step(self, x, cache, place):
        x = x + self.attn.step(self.ln_1(x), cache, place)
        return x + self.mlp(self.ln_2(x))


def head_loss(x, weight, targets, V):
    """The mean cross entropy of the logits x @ weight.T, a scalar in nats.

    x: (B, T, C); weight: (V + padding, C), of which the first V rows are tokens; targets: (B, T)
    int64, -1 = not scored.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if x.dtype == torch.float32 and x.requires_grad and not plain:
        return HeadLoss.apply(x, weight, targets, V)
    logits = F.linear(x, weight)[:, :V]  # (B * T, V)
    return F.cross_entropy(logits.float(), targets, ignore_index=-1)


class HeadLoss(torch.autograd.Function):
    """The same, 512 rows of logits at a time, with the gradient found along the way.

    All logits at once take more memory than all the rest, and to get it takes time. A compiled
    model, or one in bfloat16, has them at once all the same: there it was faster (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, V):
        rows, n, loss = min(512, len(x)), (targets >= 0).sum(), x.new_zeros(())
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        buffers = x.new_empty(2, rows, len(weight))
        for first in range(0, len(x), rows):
            part, y = x[first : first + rows], targets[first : first + rows, None]  # (rows, 1)
            logits, p = buffers[:, : len(y)]  # (rows, V + padding) each
            torch.mm(part, weight.T, out=logits)
            logits[:, V:] = -math.inf
            torch.log_softmax(logits, -1, out=p)
            share, y = (y >= 0) / n, y.clamp(min=0)  # (rows, 1)
            loss -= (p.gather(1, y) * share).sum()
            p.exp_().scatter_add_(1, y, -torch.ones_like(share))  # d loss / d logits / share
            dx[first : first + rows] = p @ weight * share
            dweight.addmm_(p.T, part * share)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = (d if grad == 1 else d * grad for d in ctx.saved_tensors)
        return dx, dweight, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(-(-config.vocab_size // 64) * 64, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's 0.02 at its width of 768; a narrower model learns much faster from larger weights
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # residual branches start smaller, so that depth does not blow up the stream
                # (Radford et al. 2019)
                small = std / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=small if name.endswith("c_proj.weight") else std)
        # sinusoids (Vaswani et al. 2017) in place of noise: a position can be told from its
        # neighbours from the first step on. By numpy: torch's first sin of a process is now and
        # then less exact (pytorch issue 188792), and no two runs would begin at the same bits.
        angle = np.arange(config.block_size)[:, None]
        angle = angle / 1e4 ** np.linspace(0, 1, -(-config.n_embd // 2))  # (block_size, C / 2)
        waves = np.concatenate((np.sin(angle), np.cos(angle)), 1)[:, : config.n_embd]
        with torch.no_grad():
            self.wpe.weight.copy_(math.sqrt(2) * std * torch.from_numpy(waves))

    def forward(self, idx, lookback=None, targets=None):
        """Read a batch of contexts.

        idx: (B, T) int64 token ids; lookback: (B, T) integers, needed unless every lambda is 0;
        targets: (B, T) int64, -1 = not scored.
        Returns logits (B, T, vocab_size) and None, or with targets None and the mean loss in nats.
        Raises InputError for a context that is too long, or a lookback that is missing.
        """
        x = self.hidden(idx, lookback)  # (B, T, C)
        if targets is None:
            return self.head(x), None
        return None, head_loss(self.ln_f(x), self.wte.weight, targets, self.config.vocab_size)

    def hidden(self, idx, lookback=None, watch=None):
        """What the head reads of a batch, (B, T, C). watch: called with each layer's number, from 0
        on, and its q, k and v, (B, H, T, D) each. For the rest see `forward`."""
        mask, x = self.mask(lookback), self.embed(idx)  # (B, T, C)
        for number, layer in enumerate(self.h):
            x = layer(x, mask, watch and partial(watch, number))
        return x

    def embed(self, idx):
        T = idx.size(1)
        if T > self.config.block_size:
            longest = self.config.block_size
            raise InputError(f"a context of {T} tokens is longer than the model's {longest}")
        x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C)
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, x):
        # the padded rows of wte make a faster matmul; the slice hides them, without a copy
        return F.linear(self.ln_f(x), self.wte.weight)[..., : self.config.vocab_size]

    # -- the dial

    @property
    def locality(self):
        """lambda_l of every layer, a list of floats."""
        return [layer.attn.locality for layer in self.h]

    def set_locality(self, lambdas):
        """Turn the dial: one lambda in [0, 1] per layer. It holds from the next forward pass on.

        Raises InputError for anything else than n_layer such numbers.
        """
        if len(lambdas) != len(self.h) or not all(0 <= x <= 1 for x in lambdas):
            wanted = f"{len(self.h)} numbers in [0, 1]"
            raise InputError(f"locality takes {wanted}, not {list(lambdas)}")
        for layer, x in zip(self.h, lambdas):
            layer.attn.locality = float(x)

    def mask(self, lookback):
        """The BlockMask of a batch, (B, T) lookback as prepared; None if every lambda is 0."""
        if not any(self.locality):
            return None
        if lookback is None:
            needs = "it needs the lookback of its tokens"
            raise InputError(f"this model's attention is localised: {needs}")
        lookback = clamp_lookback(lookback, self.config.max_lookback)
        tiled = self.fuses(lookback)
        return block_mask(lookback, self.config.max_lookback, self.config.anchor, tiled)

    def fuses(self, lookback):
        """Whether FlexAttention does the local half: compiled, on CUDA, and it has no dropout.

        It takes heads of 16 at least. Above 64 its kernels do not fit on every card.
        """
        D, dropout = self.config.n_embd // self.config.n_head, self.training and self.config.dropout
        fits = 16 <= D <= 64 and lookback.size(1) >= TILE and not dropout
        return lookback.is_cuda and torch.compiler.is_compiling() and fits

    def blocks(self, lookback):
        """Which keys are in the block of each query? (B, T) lookback -> (B, 1, T, T) booleans."""
        lookback = clamp_lookback(lookback, self.config.max_lookback)
        return in_block(lookback, self.config.anchor)[:, None]

    @torch.no_grad()
    def attention_maps(self, idx, lookback):
        """Yield each layer's attention probabilities, (B, H, T, T): to measure, not to train."""
        inside, seen = self.blocks(lookback), []
        self.hidden(idx, lookback, lambda _, q, k, v: seen.append((q, k)))
        for (q, k), locality in zip(seen, self.locality):
            yield attention_weights(q, k, inside, locality)

    def flops_per_token(self, T):
        """Floating-point operations to train on a token of a context of T (PaLM, appendix B).

        The global half of a layer's attention is T wide, the local half as wide as a block can be.
        """
        n = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        W = min(T, self.config.max_lookback + 1)
        wide = sum(T * (x < 1) + W * (x > 0) for x in self.locality)
        return 6 * n + 12 * self.config.n_embd * wide

    # -- generation

    @torch.no_grad()
    def generate(
        self, prompts, n, partitioners=None, temperature=1.0, top_k=0, top_p=1.0, generator=None
    ):
        """Yield n times a list of the next token id of each of some texts.

        prompts: lists of ids, none empty, of any lengths. partitioners: a fresh Partitioner for
        each, which finds the blocks as the text grows; needed unless every lambda is 0. For the
        rest see `choose`.
        A context that has block_size tokens goes on with the last half of them, as if the text
        began there: positions count from the start of the context, so to move on by one token would
        change all that was computed.
        """
        size, device = self.config.block_size, self.wte.weight.device
        texts, starts, caches = [list(prompt) for prompt in prompts], [0] * len(prompts), None
        lookbacks = None
        if partitioners:
            lookbacks = [p.push(text).tolist() for p, text in zip(partitioners, texts)]
        longest = min(size, max(map(len, texts)) + n)

        def contexts(rows):  # padded at the end, where causality keeps the padding out of sight
            rows = [torch.tensor(row[start:]) for row, start in zip(rows, starts)]
            return pad_sequence(rows, True).to(device)  # (B, T)

        def newest(rows):
            return torch.tensor([row[-1] for row in rows], device=device)  # (B,)

        for _ in range(n):
            full = [len(text) - start > size for text, start in zip(texts, starts)]
            for i, text in enumerate(texts):
                starts[i] = len(text) - (size + 1) // 2 if full[i] else starts[i]
            at = [len(text) - start - 1 for text, start in zip(texts, starts)]
            at = torch.tensor(at, device=device)  # (B,)
            if caches is None or any(full):
                caches = [Cache(self.config, locality, longest, at) for locality in self.locality]
                x = self.read(contexts(texts), lookbacks and contexts(lookbacks), at, caches)
            else:
                x = self.step(newest(texts), lookbacks and newest(lookbacks), at, caches)
            logits = self.head(x).float()  # (B, V)
            tokens = choose(logits, temperature, top_k, top_p, generator).tolist()
            yield tokens
            for i, token in enumerate(tokens):
                texts[i].append(token)
                if partitioners:
                    lookbacks[i].extend(partitioners[i].push([token]).tolist())

    def read(self, idx, lookback, at, caches):
        """Fill the caches with contexts, (B, T), that end at positions `at`, (B,). Returns (B, C),
        for the head."""
        x = self.hidden(idx, lookback, lambda layer, q, k, v: caches[layer].fill(k, v))
        return x[torch.arange(len(at), device=at.device), at]

    def step(self, token, lookback, at, caches):
        """Go on by a token each: what it is, its lookback, its position, (B,) each."""
        x = (self.wte(token) + self.wpe(at))[:, None]  # (B, 1, C)
        if lookback is not None:
            lookback = lookback.clamp(0, self.config.max_lookback).minimum(at)
        places = {}  # layers whose caches are of one size have one place
        for layer, cache in zip(self.h, caches):
            if cache.size not in places:
                places[cache.size] = cache.place(at, lookback, x.dtype)
            x = layer.step(x, cache, places[cache.size])
        return x[:, 0]

    # -- weights in and out

    @classmethod
    def from_pretrained(cls, name_or_path, block_size=None, **settings):
        """GPT-2 with published or saved weights, every lambda 0.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once, then cached); or a
        folder or file in the published format (pytorch_model.bin, or model.safetensors where that
        package is installed); or a run of train.py. block_size: use fewer positions than the
        weights have. settings: dropout, max_lookback, anchor of GPTConfig; a run has its own.
        Raises InputError for anything that is not a whole GPT-2.
        """
        path = weights.find(name_or_path)
        return cls.from_state(weights.read(path), path, block_size, **settings)

    @classmethod
    def from_state(cls, state, path, block_size=None, **settings):
        """The same from what was read of the file `path` already, a dict."""
        tensors, config = weights.unpack(state, path)
        try:
            config = GPTConfig(**config)
        except (InputError, TypeError) as e:
            raise InputError(f"{path}: no GPT-2 in this file ({e})") from None
        if block_size and block_size > config.block_size:
            have = f"the {config.block_size} positions of {path}"
            raise InputError(f"block_size {block_size} is more than {have}")
        config = replace(config, block_size=block_size or config.block_size, **settings)
        rows, padding = len(tensors["wte.weight"]), -config.vocab_size % 64
        if rows not in (config.vocab_size, config.vocab_size + padding):
            raise InputError(f"{path}: no GPT-2 in this file: {rows} rows of wte.weight")
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        tensors["wpe.weight"] = tensors["wpe.weight"][: config.block_size]
        tensors["wte.weight"] = F.pad(
            tensors["wte.weight"][: config.vocab_size], (0, 0, 0, padding)
        )
        model.to_empty(device="cpu").load_state_dict(weights.fit(tensors, shapes, path))
        return model

    def save_pretrained(self, folder):
        """Write pytorch_model.bin and config.json, which `transformers` loads as GPT2LMHeadModel.

        It knows no locality. Raises InputError where they cannot be written.
        """
        state = self.state_dict()
        state["wte.weight"] = state["wte.weight"][: self.config.vocab_size]
        weights.publish(state, self.config, folder)


class Place(NamedTuple):
    """Where a new token of each context goes in a Cache, and what it sees there."""

    rows: torch.Tensor  # (B,), 0 to B - 1
    slot: torch.Tensor  # (B,)
    block: torch.Tensor  # (B, 1, 1, S), 0 in the token's block and -inf elsewhere
    visible: torch.Tensor  # the same of all that is there


class Cache:
    """The keys and values of one layer while text is generated.

    Where lambda is 1 it holds the last max_lookback + 1 tokens alone, plus token 0 if the block is
    anchored there: no block reaches further, so the cache does not grow. Position p lies in slot
    p % size; the newest token overwrites the oldest.
    """

    def __init__(self, config, locality, longest, at):
        """longest: tokens, of any context to come. at: (B,), where the contexts end now."""
        self.size = min(config.max_lookback + 1, longest) if locality == 1 else longest
        self.anchor = config.anchor
        self.sink = config.anchor and self.size < longest  # a slot for token 0 alone, the last
        self.at = at

    def positions(self, at):
        """The position in each slot when the newest is `at`, (B,) int64: (B, S); negative where a
        slot is empty."""
        slots = torch.arange(self.size, device=at.device)
        p = at[:, None] - (at[:, None] - slots) % self.size
        return torch.cat((p, -(at[:, None] < self.size).long()), 1) if self.sink else p

    def fill(self, k, v):
        """Take what is needed of the keys and values of whole contexts, (B, H, T, D)."""
        p = self.positions(self.at).clamp(min=0)[:, None, :, None]
        self.k, self.v = k.take_along_dim(p, 2), v.take_along_dim(p, 2)  # (B, H, S, D)

    def place(self, at, lookback, dtype):
        """The Place of a token at positions `at`, (B,), with these lookbacks, (B,) or None."""
        p = self.positions(at)  # (B, S)
        newest = int(at.max())
        p = p[:, : newest + 1] if newest < self.size else p  # later slots are empty yet
        start = at if lookback is None else at - lookback  # no lookback: no layer asks for it
        block = p >= start[:, None]
        block = block | (p == 0) if self.anchor else block
        masks = (block, p >= 0)
        masks = (torch.zeros_like(m, dtype=dtype).masked_fill(~m, -math.inf) for m in masks)
        rows = torch.arange(len(at), device=at.device)
        return Place(rows, at % self.size, *(m[:, None, None] for m in masks))

    def push(self, k, v, place):
        """Add a token. k, v: (B, H, 1, D). Returns the keys and values to look at, (B, H, S, D)."""
        self.k[place.rows, :, place.slot] = k[:, :, 0]
        self.v[place.rows, :, place.slot] = v[:, :, 0]
        S = place.block.size(-1)
        return self.k[:, :, :S], self.v[:, :, :S]


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """A token for each row of logits, (B, V) float32 -> (B,) int64.

    It is drawn from softmax(logits / temperature). temperature 0: the likeliest. top_k: among the k
    likeliest alone; 0: all. top_p: among the fewest likeliest that have the probability p together.
    """
    # below, the likeliest is certain by far; lower still, float32 would divide by 0
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        likeliest, token = p.sort(descending=True)
        # the tokens before it have p already
        likeliest[likeliest.cumsum(-1) - likeliest >= top_p] = 0
        p = torch.zeros_like(p).scatter(1, token, likeliest)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
