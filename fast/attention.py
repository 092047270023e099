"""Blended attention without the T x T matrix: two standard attentions, one of them over the block.

Its plain twin is `attention_weights` in model.py, which defines the same function. Attention inside
the block costs O(T * W), where W is max_lookback:

- On a short context it is dense, with a mask.
- A longer one is cut into chunks of C queries. Each chunk sees the W + C keys that end with its
  own last key: W = max_lookback keys before the chunk, and the chunk itself.
- In a compiled model on CUDA, FlexAttention skips the tiles of keys that no query needs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

TILE = 128  # queries, or keys, that a GPU kernel processes at a time


class BlockMask(NamedTuple):
    """Which keys are in the block of each query, in one of three forms.

    If all three are None, no layer has a local half.
    """

    dense: torch.Tensor | None = None  # (B, 1, T, T) booleans, or floats to add to the scores
    chunked: torch.Tensor | None = None  # (B * n, 1, C, W + C) booleans, for n chunks
    anchored: bool = False  # chunked has one more column, the last, for token 0
    tiled: flex.BlockMask | None = None  # for FlexAttention
    visible: torch.Tensor | None = None  # what the global half sees, if not every earlier token


def blended_attention(q, k, v, mask, locality, dropout=0.0):
    """(1 - locality) * attention over the context + locality * attention over the block.

    q: (B, H, n, D); k, v: (B, H, T, D); mask: a BlockMask. Returns (B, H, n, D).
    """
    if locality < 1:
        visible = mask.visible
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, dropout_p=dropout
        )
    if locality > 0:
        y_local = local_attention(q, k, v, mask, dropout)
        y = torch.lerp(y, y_local, locality) if locality < 1 else y_local
    return y


def block_mask(lookback, max_lookback, anchor=False, tiled=False):
    """The BlockMask of a batch of contexts. lookback: (B, T), clamped to them.

    tiled: for FlexAttention. Its backward pass exists only on GPUs, and it is fast only when
    compiled.
    """
    if tiled:
        return BlockMask(tiled=tiled_mask(lookback, anchor))
    B, T = lookback.shape
    W, C = max_lookback, max(64, max_lookback // 2)  # shorter chunks make small, slow matmuls
    # On a GPU no mask may end with half a tile of keys: with such a mask, cuDNN's attention can
    # return gradients that are NaN (PyTorch issue 196678).
    cpu = lookback.is_cpu
    C += 0 if cpu else -(W + C + anchor) % TILE
    position = torch.arange(T, device=lookback.device)
    if T <= W + C and (cpu or T % TILE != TILE // 2):  # cutting such a context would save nothing
        distance = position[:, None] - position  # (T, T)
        dense = (distance >= 0) & (distance <= lookback[:, :, None])  # (B, T, T)
        return BlockMask((dense | (position == 0) if anchor else dense)[:, None])
    n = -(-T // C)
    padded = F.pad(lookback, (0, n * C - T)).view(B * n, 1, C, 1)  # padding sees only itself
    i = torch.arange(C, device=lookback.device)[:, None]  # (C, 1)
    j = torch.arange(-W, C, device=lookback.device)[None, :]  # (1, W + C), from the chunk's start
    distance = i - j
    chunked = (distance >= 0) & (distance <= padded)  # (B * n, 1, C, W + C)
    if not anchor:
        return BlockMask(chunked=chunked)
    outside = lookback < position  # (B, T): the block of the query does not contain token 0
    outside = F.pad(outside, (0, n * C - T)).view(B * n, 1, C, 1)
    return BlockMask(chunked=torch.cat((chunked, outside), -1), anchored=True)


def flex_applies(lookback, head_size, dropout):
    """Whether FlexAttention computes the local half: in a compiled model on CUDA, without dropout.

    It needs heads of at least 16. Above 64 its kernels do not fit on every GPU.
    """
    fits = 16 <= head_size <= 64 and lookback.size(1) >= TILE and not dropout
    return lookback.is_cuda and torch.compiler.is_compiling() and fits


class Windows(torch.autograd.Function):
    """(n * C, H, D) -> (n, W + C, H, D): each chunk of C tokens, preceded by the W before it.

    Zeros precede the first chunk. The windows share one copy. Autograd's backward pass through
    overlapping views is slow; this one adds the windows up.
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
    """Softmax attention of each query over its block, in O(T * W) time and memory.

    q, k, v: (B, H, T, D); mask: a BlockMask. Returns (B, H, T, D).
    """
    if mask.tiled is not None:
        return flex.flex_attention(q, k, v, block_mask=mask.tiled)
    if mask.chunked is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, dropout_p=dropout)
    B, H, T, D = q.shape
    n, C = mask.chunked.size(0) // B, mask.chunked.size(2)
    W = mask.chunked.size(3) - C - mask.anchored
    # the contexts one after another, like a single text: the mask keeps them apart
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
    """The mask for FlexAttention (Dong et al. 2024, arXiv 2412.05496): torch's BlockMask.

    lookback: (B, T), clamped. The kernel skips every tile of keys that no query of a tile needs. It
    asks about single keys only in tiles that are partly visible. Both lists of tiles are computed
    from the lookback, in O(T + (T / TILE)^2).
    """
    T = lookback.size(1)
    lookback = F.pad(lookback, (0, -T % TILE))  # padding sees only itself
    start = torch.arange(lookback.size(1), device=lookback.device) - lookback  # (B, n * TILE)

    def sees(b, h, query, key):
        inside = (key >= start[b, query]) & (key <= query)
        return inside | (key == 0) if anchor else inside

    tiles = start.unflatten(1, (-1, TILE))  # (B, n, TILE)
    first = tiles.amin(2, keepdim=True) // TILE  # (B, n, 1): the first tile that any query needs,
    clear = -(-tiles.amax(2, keepdim=True) // TILE)  # and the first that every query sees whole
    key = torch.arange(tiles.size(1), device=lookback.device)
    query = key[:, None]
    needed = (key >= first) & (key <= query)  # (B, n, n)
    needed = needed | (key == 0) if anchor else needed
    whole = (key >= clear) & (key < query)  # a query's own tile holds keys that come after it
    lists = []
    for listed in (needed & ~whole, whole):  # the number of listed tiles, and their indices first
        order = listed.int().argsort(dim=-1, descending=True, stable=True)
        lists += [listed.sum(-1, dtype=torch.int)[:, None], order[:, None].int()]
    return flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(T, T))
