"""What faithfulness.py measures of one model: the contexts, and what depends on what in them."""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from locality import Partitioner
from model import attention_weights
from prepare_data import prepared, read_meta, read_split
from read import draw_foreign, influence, join_short, sentence_starts
from support.files import InputError

SHIFTS = 4  # other places of the split that the control takes its boundaries from
FOLLOW = ("semantic", "semantic:closed")  # the blocks that are found again
FEW = 8  # tokens; a smaller block is passed over: where a cap decides, blocks slide token by token

# --------------------------------------------------------------------------------------------------
# the contexts, the same for all models


class Context(NamedTuple):
    """T tokens of the test split, cut into S sentences, and the blocks that models are asked about.

    Blocks are (T,) integers, the first token of each token's block.
    """

    place: int  # of the first token in the split
    tokens: np.ndarray  # (T + 1,) int64; the last is only predicted
    sentences: list  # S of (begin, end)
    # the semantic blocks; SHIFTS times those of another place; the true pieces, where known
    blocks: list
    foreign: list  # S of (draws, end - begin) ids: in place of each sentence
    before: dict  # {first token: (leak_draws, first token) ids}: in place of all before a block
    again: dict  # {partition: (S, T)}: the blocks, found again with the first foreign text in place


def starts_of(lookback, place, T):
    """The first token of each token's block, (T,), in a context of a split.

    place: in the split, whose lookback is taken. Past its end it goes on at its start.
    """
    i = np.arange(T)
    return i - np.minimum(lookback[(place + i) % len(lookback)].astype(np.int64), i)


def first_tokens(start):
    """Where the blocks of a context begin that something stands before, a list."""
    tokens, n = np.unique(start, return_counts=True)
    return tokens[(n >= FEW) & (tokens > 1)].tolist()


def found_again(partitioner, tokens, sentences, foreign):
    """The blocks of a context with the first foreign text in place of each sentence, (S, T).

    partitioner: has read all before the context; tokens: (T,).
    """
    blocks = []
    for (begin, end), texts in zip(sentences, foreign):
        replaced = tokens.copy()
        replaced[max(begin, 1) : end] = texts[0][max(begin, 1) - begin :]
        blocks.append(starts_of(copy.deepcopy(partitioner).push(replaced), 0, len(tokens)))
    return np.stack(blocks)


def contexts_of(config, study, T, vocabulary):
    """The Contexts of a study, a list; and a sha256 of the text and its blocks.

    config: of any cell, a dict; T: tokens in a context. Raises InputError for too short a text.
    """
    folder = prepared({**config, "partition": "semantic", "data": ""})
    meta = read_meta(folder)
    tokens, lookback = read_split(folder, "test", meta)
    others = read_split(folder, "val", meta)[0]
    n, fit = len(tokens), (len(tokens) - 1) // T
    if fit < study.contexts:
        raise InputError(f"[faithful]: the test split holds {fit} contexts, not {study.contexts}")
    if config["joined"]:  # then only `document` is told where a piece begins
        whole = {**config, "partition": "document", "max_lookback": 65535, "data": ""}
        pieces = read_split(prepared(whole), "test")[1]
    how, read = (config["max_lookback"], meta["background"]), 0
    again = {name: Partitioner(vocabulary, name, *how) for name in FOLLOW}
    contexts = []
    for number, place in enumerate(np.linspace(0, n - 1 - T, study.contexts).astype(int).tolist()):
        elsewhere = [place + n * (i + 1) // (SHIFTS + 1) for i in range(SHIFTS)]
        blocks = [starts_of(lookback, p, T) for p in (place, *elsewhere)]
        blocks += [starts_of(pieces, place, T)] if config["joined"] else []
        some = tokens[place : place + T + 1].astype(np.int64)
        # sentences that stand apart, in blocks or in pieces, are not joined
        first = first_tokens(blocks[0])
        apart = {*first, *(first_tokens(blocks[-1]) if config["joined"] else [])}
        begins = sorted({*sentence_starts(some[:T], vocabulary), *apart})
        sentences = join_short(begins, T, apart)
        if len(sentences) < 3:
            few = f"a context of {T} tokens holds {len(sentences)} sentences"
            raise InputError(f"[faithful]: {few}; a longer block_size is needed")
        all_before, seed = [(0, b) for b in first], 2 * number
        foreign = draw_foreign(others, vocabulary, sentences, study.draws, seed)
        before = draw_foreign(others, vocabulary, all_before, study.leak_draws, seed + 1)
        for partitioner in again.values():
            partitioner.push(tokens[read:place])
        read = place
        found = {name: found_again(p, some[:T], sentences, foreign) for name, p in again.items()}
        before = dict(zip(first, before))
        contexts.append(Context(place, some, sentences, blocks, foreign, before, found))
    return contexts, meta["sha256"]


# --------------------------------------------------------------------------------------------------
# measuring one model


@torch.no_grad()
def measure(model, context, start, again=None):
    """All that is measured of a model in a context, a dict of arrays.

    start: (T,) the first token of each token's own block; again: (S, T) the same with a foreign
    text in place of each sentence. The model is in eval mode, on any device.
    influence: (S, T) bits; moved: (S, T) bits more where the blocks are found again; raw, weighted:
    (S, T) the mass of the last layer on each sentence; nats: (T,) the loss; even, uniform: the mass
    and the loss with the last layer uniform; leak: (T,) bits, and far: (T,) the loss, with all
    before the block replaced. NaN where there is nothing to measure.
    """
    device, T = model.wte.weight.device, len(start)
    tokens = torch.tensor(context.tokens, device=device)[None]  # (1, T + 1)
    idx, y = tokens[:, :-1], tokens[0, 1:]
    lookback = torch.arange(T, device=device)[None] - torch.tensor(start, device=device)  # (1, T)
    seen = []
    hook = model.h[-1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    log_p = model(idx, lookback)[0][0].log_softmax(-1)  # (T, V)
    hook.remove()
    raw, weighted = pointers(model, seen[0], lookback, context.sentences)
    flat = uniform(model)
    even, _ = pointers(flat, seen[0], lookback, context.sentences)
    found = {"raw": raw, "weighted": weighted, "even": even}
    found["nats"] = F.nll_loss(log_p, y, reduction="none")  # (T,)
    log_q = flat(idx, lookback)[0][0].log_softmax(-1)
    found["uniform"] = F.nll_loss(log_q, y, reduction="none")
    bits, moved = torch.full((2, len(context.sentences), T), math.nan)
    for s, sentence in enumerate(context.sentences):
        foreign, end = context.foreign[s].to(device), sentence[1]
        if end == T:  # nothing follows the last
            continue
        some, _ = influence(model, idx, lookback, log_p, sentence, foreign)  # (draws, T - end)
        bits[s, end:] = some.mean(0).clamp(min=0).cpu()
        if again is not None:
            back = torch.arange(T, device=device)[None] - torch.tensor(again[s], device=device)
            other, _ = influence(model, idx, back, log_p, sentence, foreign[:1])
            moved[s, end:] = (other - some[:1])[0].cpu()
    found |= {"influence": bits, "moved": moved, **leak(model, idx, lookback, y, context)}
    return {name: values.float().cpu().numpy() for name, values in found.items()}


def pointers(model, x, lookback, sentences):
    """How much the last layer attends to each sentence, at each token: two tensors (S, T).

    x: (1, T, C), what that layer's attention reads. The context's first token, which is never
    replaced, is of no sentence. The first is the mass, mean over heads. In the second every key
    counts as much as its value can add to the stream, the norm of v W_O; summed over heads
    (Kobayashi et al. 2020).
    """
    attn = model.h[-1].attn
    q, k, v = attn.qkv(x)  # (1, H, T, D)
    a = attention_weights(q, k, model.blocks(lookback), attn.locality)[0]  # (H, T, T)
    out = attn.c_proj.weight.unflatten(1, (attn.n_head, -1))  # (C, H, D)
    norms = torch.einsum("htd,chd->htc", v[0], out).norm(dim=-1)  # (H, T)
    keys = torch.arange(a.size(-1), device=x.device)
    begin, end = torch.tensor(sentences, device=x.device).clamp(min=1).T  # the first token stays
    inside = ((keys[:, None] >= begin) & (keys[:, None] < end)).to(a)  # (T, S)
    return (a.mean(0) @ inside).T, ((a * norms[:, None]).sum(0) @ inside).T


@torch.no_grad()
def uniform(model):
    """A copy of a model in which the last layer's attention is uniform over all it may see.

    (Wiegreffe & Pinter 2019.) Without queries all scores are 0.
    """
    flat = copy.deepcopy(model)
    c_attn = flat.h[-1].attn.c_attn
    for p in (c_attn.weight, c_attn.bias):  # the rows of the queries come first
        p[: flat.config.n_embd] = 0
    return flat


def leak(model, idx, lookback, y, context):
    """What the outputs tell of the text before the block, {"leak": (T,) bits, "far": (T,) nats}.

    With K foreign texts there: the entropy of the mean prediction less the mean of their entropies,
    which is (1/K) sum_k KL(p_k || mean p), log2 K at most. far: the loss, mean over the K.
    """
    start, T = context.blocks[0], idx.size(1)
    bits, nats = torch.full((2, T), math.nan, dtype=torch.double)
    for begin, foreign in context.before.items():
        at = torch.tensor(np.flatnonzero(start == begin), device=idx.device)
        end, mean_p, entropy, loss = at[-1] + 1, 0.0, 0.0, 0.0
        for text in foreign.to(idx.device):
            replaced = idx[:, :end].clone()
            replaced[0, 1:begin] = text[1:]  # the first token stays
            log_p = model(replaced, lookback[:, :end])[0][0, at].double().log_softmax(-1)  # (n, V)
            mean_p = mean_p + log_p.exp() / len(foreign)
            entropy = entropy + torch.special.entr(log_p.exp()).sum(-1) / len(foreign)
            loss = loss + F.nll_loss(log_p, y[at], reduction="none") / len(foreign)
        some = torch.special.entr(mean_p).sum(-1) - entropy
        bits[at.cpu()], nats[at.cpu()] = some.cpu().clamp(min=0) / math.log(2), loss.cpu()
    return {"leak": bits, "far": nats}
