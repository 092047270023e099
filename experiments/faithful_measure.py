"""What faithfulness.py measures of a model: in each context, what a prediction depends on."""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from locality import Partitioner
from model import attention_weights
from report.excerpt import draw_foreign, join_short, sentence_starts
from support.files import InputError
from sweep import prepare_cell
from view import influence

SHIFTS = 4  # other places of the split from which the control takes its boundaries
FOLLOWED = "semantic", "semantic:closed"  # partitions that also read the foreign text
MIN_TOKENS = 8  # of a block whose leak is measured; a block that slides moves with every token


class Context(NamedTuple):
    """T tokens of the test split, cut into S sentences, and the blocks that the study is about:
    (T,) integers, the first token of each token's block."""

    place: int  # of the first token in the split
    tokens: np.ndarray  # (T + 1,) int64; the last one is only predicted
    sentences: list  # S of (begin, end)
    # the semantic blocks; SHIFTS times those of another place; the true pieces if they are known
    blocks: list
    foreign: list  # S of (draws, end - begin) ids that replace each sentence
    before: dict  # {first token of a block: (leak_draws, first token) ids that replace all before}
    again: dict  # {partition: (S, T)}: its blocks when a foreign text replaces each sentence


def starts_of(lookback, place, T):
    """The first token of each token's block, (T,), in the context that begins at `place`. Beyond
    its end, the lookback of the split, (n,), continues from its beginning."""
    i = np.arange(T)
    return i - np.minimum(lookback[(place + i) % len(lookback)].astype(np.int64), i)


def first_tokens(start):
    """The first tokens of the blocks of a context that have text before them: a list."""
    tokens, n = np.unique(start, return_counts=True)
    return tokens[(n >= MIN_TOKENS) & (tokens > 1)].tolist()


def blocks_again(partitioner, tokens, sentences, foreign):
    """The blocks of a context, (T,) tokens, when the first foreign text replaces each sentence:
    (S, T). The partitioner has read everything before the context."""
    blocks = []
    for (begin, end), texts in zip(sentences, foreign):
        replaced, first = tokens.copy(), max(begin, 1)  # the first token is never replaced
        replaced[first:end] = texts[0][first - begin :]
        blocks.append(starts_of(copy.deepcopy(partitioner).push(replaced), 0, len(tokens)))
    return np.stack(blocks)


def contexts_of(config, study, T, vocabulary):
    """The Contexts of a study, T tokens each, and the sha256 of the text and its blocks. config: of
    any cell, a train.Config. Raises InputError if the text or the contexts are too short."""
    text = prepare_cell(config, data="", partition="semantic")
    (tokens, lookback), (others, _) = text.split("test"), text.split("val")
    n, fit = len(tokens), (len(tokens) - 1) // T
    if fit < study.contexts:
        raise InputError(f"[faithful]: the test split holds {fit} contexts, not {study.contexts}")
    if config.joined:  # then only the partition `document` says where a piece begins
        whole = {"data": "", "partition": "document", "max_lookback": 65535}
        _, pieces = prepare_cell(config, **whole).split("test")
    rules = config.max_lookback, text.meta["background"]
    followed = {name: Partitioner(vocabulary, name, *rules) for name in FOLLOWED}
    contexts, n_read = [], 0
    for number, place in enumerate(np.linspace(0, n - 1 - T, study.contexts).astype(int).tolist()):
        places = [place + n * i // (SHIFTS + 1) for i in range(SHIFTS + 1)]
        blocks = [starts_of(lookback, p, T) for p in places]
        blocks += [starts_of(pieces, place, T)] if config.joined else []
        ids, first = tokens[place : place + T + 1].astype(np.int64), first_tokens(blocks[0])
        # sentences of different blocks or pieces are not joined
        apart = {*first, *(first_tokens(blocks[-1]) if config.joined else [])}
        sentences = join_short(sorted({*sentence_starts(ids[:T], vocabulary), *apart}), T, apart)
        if len(sentences) < 3:
            raise InputError(
                f"[faithful]: a context of {T} tokens holds only {len(sentences)} sentences; "
                "set a larger block_size"
            )
        foreign = draw_foreign(others, vocabulary, sentences, study.draws, 2 * number)
        spans = [(0, token) for token in first]
        before = draw_foreign(others, vocabulary, spans, study.leak_draws, 2 * number + 1)
        again = {}
        for name, partitioner in followed.items():
            partitioner.push(tokens[n_read:place])
            again[name] = blocks_again(partitioner, ids[:T], sentences, foreign)
        n_read, before = place, dict(zip(first, before))
        contexts.append(Context(place, ids, sentences, blocks, foreign, before, again))
    return contexts, text.meta["sha256"]


# --------------------------------------------------------------------------------------------------
# one model


@torch.no_grad()
def measure(model, context, start, again=None):
    """All measures of a model in a context: a dict of float32 arrays, NaN if there is no value.

    start: (T,) the first token of each token's block in the model's own partition; again: (S, T)
    the same with a foreign text replacing each sentence. The model is in eval mode.

        influence       (S, T) bits: how much a prediction depends on an earlier sentence
        moved           (S, T) bits more if the partition reads the foreign text as well
        raw, sinkless   (S, T) what the last layer attends to, see `pointers`
        even            (S, T) `raw` if the last layer is uniform
        nats, uniform   (T,) the loss, and the loss if the last layer is uniform
        leak, far       (T,) bits and nats, see `leak`
    """
    device, T = model.wte.weight.device, len(start)
    tokens = torch.tensor(context.tokens, device=device)[None]  # (1, T + 1)
    idx, y, i, layers = tokens[:, :-1], tokens[0, 1:], torch.arange(T), []
    lookback = (i - torch.tensor(start))[None].to(device)  # (1, T)
    x = model.hidden(idx, lookback, lambda layer, *qkv: layers.append(qkv))
    log_p = model.head(x)[0].log_softmax(-1)  # (T, V)
    log_q = uniform(model)(idx, lookback)[0][0].log_softmax(-1)  # (T, V)
    q, k, _ = layers[-1]
    raw, sinkless = pointers(model, q, k, lookback, context.sentences)
    even, _ = pointers(model, 0 * q, k, lookback, context.sentences)
    bits, moved = torch.full((2, len(context.sentences), T), math.nan)
    for s, sentence in enumerate(context.sentences):
        foreign, end = context.foreign[s].to(device), sentence[1]
        if end == T:  # nothing follows the last sentence
            continue
        each, _ = influence(model, idx, lookback, log_p, sentence, foreign)  # (draws, T - end)
        bits[s, end:] = each.mean(0).clamp(min=0).cpu()
        if again is not None:
            back = (i - torch.tensor(again[s]))[None].to(device)
            other, _ = influence(model, idx, back, log_p, sentence, foreign[:1])
            moved[s, end:] = (other - each[:1])[0].cpu()
    measured = {"influence": bits, "moved": moved, "raw": raw, "sinkless": sinkless, "even": even}
    measured["nats"] = F.nll_loss(log_p, y, reduction="none")
    measured["uniform"] = F.nll_loss(log_q, y, reduction="none")
    measured |= leak(model, idx, lookback, y, context)
    return {name: values.float().cpu().numpy() for name, values in measured.items()}


def pointers(model, q, k, lookback, sentences):
    """How much each token attends to each sentence in the last layer: two tensors (S, T).

    q, k: (1, H, T, D), of that layer. The first is the attention mass, mean over heads. In the
    second, each head attends as if token 0, the attention sink (Xiao et al. 2023), were not there:
    its other mass is scaled to sum to 1. Token 0 belongs to no sentence, because it is never
    replaced.
    """
    attn = model.h[-1].attn
    a = attention_weights(q, k, model.in_block(lookback), attn.locality)[0]  # (H, T, T)
    keys = torch.arange(a.size(-1), device=q.device)
    begin, end = torch.tensor(sentences, device=q.device).clamp(min=1).T  # (S,) each
    inside = ((keys[:, None] >= begin) & (keys[:, None] < end)).to(a)  # (T, S)
    mass, rest = a @ inside, a[..., 1:].sum(-1, keepdim=True)  # (H, T, S), (H, T, 1)
    return mass.mean(0).T, (mass / rest.clamp(min=1e-9)).mean(0).T


@torch.no_grad()
def uniform(model):
    """A copy of a model whose last layer attends uniformly to everything it may see: with all
    queries at 0, all scores are 0 (a baseline of Wiegreffe & Pinter 2019)."""
    flat = copy.deepcopy(model)
    for p in flat.h[-1].attn.c_attn.parameters():  # the rows of the queries come first
        p[: flat.config.n_embd] = 0
    return flat


def leak(model, idx, lookback, y, context):
    """How much each output tells of the text before its block: {"leak": (T,), "far": (T,)}.

    K foreign texts replace everything before the block. leak, in bits: (1/K) sum_k KL(p_k || mean
    p), the entropy of the mean prediction minus the mean of the entropies, at most log2 K. far, in
    nats: the loss, mean over the K.
    """
    start, T = context.blocks[0], idx.size(1)
    bits, nats = torch.full((2, T), math.nan, dtype=torch.double)
    for begin, foreign in context.before.items():
        at = torch.tensor(np.flatnonzero(start == begin), device=idx.device)  # the block: (n,)
        end, mean_p, entropy, loss = at[-1] + 1, 0.0, 0.0, 0.0
        for text in foreign.to(idx.device):
            replaced = idx[:, :end].clone()
            replaced[0, 1:begin] = text[1:]  # the first token is never replaced
            log_p = model(replaced, lookback[:, :end])[0][0, at].double().log_softmax(-1)  # (n, V)
            mean_p = mean_p + log_p.exp() / len(foreign)
            entropy = entropy + torch.special.entr(log_p.exp()).sum(-1) / len(foreign)
            loss = loss + F.nll_loss(log_p, y[at], reduction="none") / len(foreign)
        gained = torch.special.entr(mean_p).sum(-1) - entropy  # (n,)
        bits[at.cpu()], nats[at.cpu()] = gained.cpu().clamp(min=0) / math.log(2), loss.cpu()
    return {"leak": bits, "far": nats}
