"""Is what one reads from a localised model true? Three outcomes, fixed before the run; controls.

    python -m experiments.faithfulness configs/faithful_smoke.toml               # in two minutes
    python -m experiments.faithfulness configs/faithful_sections.toml --jobs 2
    python -m experiments.faithfulness configs/faithful_sections.toml --report   # only count again

A config is that of a sweep, with one more table, [faithful]: the keys of `Study`. Models that are
missing are trained, as sweep.py does it. Each is measured once, into `faithful.npz` in its folder.
The same command goes on after any stop. The report, in the folder of the sweep: faithfulness.md,
faithfulness.json and two figures.

boundary  Does a sentence of the block change a prediction more than one outside of it, as far away
          and as long? In doublings of its influence.
pointer   Where the last layer looks, is that what the prediction depends on? Spearman's correlation
          over the sentences before a token, with the distance removed.
leak      What does an output still tell of the text before its block? In bits a token.

All models are asked about the same blocks, the open semantic ones. While the text is replaced, the
blocks stay as they were.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import copy
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval import load_run
from experiments.faithfulness_report import (
    SHIFTS,
    analyse,
    draw_distance,
    draw_pointers,
    frames_of,
    summarise,
    tables,
)
from locality import Partitioner, schedule
from model import attention_weights
from prepare_data import get_encoding, prepared, read_meta, read_split, token_bytes
from read import draw_foreign, influence, join_short, sentence_starts
from support.files import InputError, alone, digest, replacing, run_script, write_json, write_text
from support.machine import pick_device, provenance
from support.report import read_results
from support.run import find_checkpoint
from support.settings import check, key, nearest, usage
from sweep import check_folder, read_cells, run, take_jobs
from train import read_values

FOLLOW = ("semantic", "semantic:closed")  # the blocks that are found again
FEW = 8  # tokens; a smaller block is passed over: where a cap decides, blocks slide token by token


@dataclass
class Study:
    contexts: int = key(16, "stretches of the test split, as long as a context", at_least=2)
    draws: int = key(2, "foreign texts in place of a sentence", at_least=1)
    leak_draws: int = key(16, "foreign texts in place of all before a block", at_least=2)
    eps: float = key(1e-3, "bits added to an influence before its logarithm", at_least=1e-9)
    first: str = key("quintic semantic", "the model that the tests are about")
    second: str = key("distributed", "the model that it is compared with")
    boundary: float = key(0.1, "a smaller difference is none: doublings of influence", at_least=0)
    pointer: float = key(0.02, "a smaller difference is none: correlation", at_least=0)
    leak: float = key(0.005, "a smaller difference is none: bits a token", at_least=0)

    def __post_init__(self):
        check(self)


def read_study(values):
    """The Study in the table [faithful] of a config, which is taken out. Raises InputError."""
    table, known = values.pop("faithful", {}), list(Study.__dataclass_fields__)
    if not isinstance(table, dict):
        raise InputError("faithful must be a table, [faithful]")
    for name in table.keys() - set(known):
        raise InputError(f"[faithful]: unknown key {name}; the nearest is {nearest(name, known)}")
    return Study(**table)


# --------------------------------------------------------------------------------------------------
# the contexts, the same for all models


class Context(NamedTuple):
    """T tokens of the test split, cut into S sentences, and the blocks that models are asked about.

    Blocks are (T,) integers, the first token of each token's block.
    """

    place: int  # of the first token in the split
    tokens: np.ndarray  # (T + 1,) int64; the last is only predicted
    sentences: list  # S of (begin, end)
    blocks: (
        list  # the semantic blocks; SHIFTS times those of another place; the true pieces, if known
    )
    foreign: list  # S of (draws, end - begin) ids: in place of each sentence
    before: dict  # {first token: (leak_draws, first token) ids}: in place of all before a block
    again: dict  # {partition: (S, T)}: the blocks, found again with the first foreign text in place


def starts_of(lookback, place, T):
    """The first token of each token's block, (T,), in a context that begins at `place` of a split,
    with the lookback that the split has there, or from the beginning again."""
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
    for place in np.linspace(0, n - 1 - T, study.contexts).astype(int).tolist():
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
        foreign = draw_foreign(others, vocabulary, sentences, study.draws)
        before = draw_foreign(others, vocabulary, [(0, b) for b in first], study.leak_draws)
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
    (S, T) the mass of the last layer on each sentence; nats: (T,) the loss; uniform: (T,) the same
    with the last layer uniform; leak: (T,) bits, and far: (T,) the loss, with all before the block
    replaced. NaN where there is nothing to measure.
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
    found = {"raw": raw, "weighted": weighted}
    found["nats"] = F.nll_loss(log_p, y, reduction="none")  # (T,)
    log_q = uniform(model)(idx, lookback)[0][0].log_softmax(-1)
    found["uniform"] = F.nll_loss(log_q, y, reduction="none")
    bits, moved = torch.full((2, len(context.sentences), T), math.nan)
    for s, foreign in enumerate(context.foreign):
        begin, end = context.sentences[s]
        if end == T:  # nothing follows the last
            continue
        how, foreign = (log_p, (begin, end)), foreign.to(device)
        some, _ = influence(model, idx, lookback, *how, foreign)  # (draws, T - end)
        bits[s, end:] = some.mean(0).clamp(min=0).cpu()
        if again is not None:
            back = torch.arange(T, device=device)[None] - torch.tensor(again[s], device=device)
            more = influence(model, idx, back, *how, foreign[:1])[0] - some[:1]
            moved[s, end:] = more[0].cpu()
    found |= {"influence": bits, "moved": moved, **leak(model, idx, lookback, y, context)}
    return {name: values.float().cpu().numpy() for name, values in found.items()}


def pointers(model, x, lookback, sentences):
    """How much the last layer attends to each sentence, at each token: two tensors (S, T).

    x: (1, T, C), what that layer's attention reads. The first is the mass, mean over heads. In the
    second every key counts as much as its value can add to the stream: the norm of v W_O
    (Kobayashi et al. 2020), summed over heads.
    """
    attn = model.h[-1].attn
    q, k, v = attn.qkv(x)  # (1, H, T, D)
    a = attention_weights(q, k, model.blocks(lookback), attn.locality)[0]  # (H, T, T)
    out = attn.c_proj.weight.unflatten(1, (attn.n_head, -1))  # (C, H, D)
    norms = torch.einsum("htd,chd->htc", v[0], out).norm(dim=-1)  # (H, T)
    keys = torch.arange(a.size(-1), device=x.device)
    begin, end = torch.tensor(sentences, device=x.device).T
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


# --------------------------------------------------------------------------------------------------
# measuring all of them


class Subject(NamedTuple):
    """A model to measure: the weights of a cell, at a dial."""

    name: str
    seed: int
    folder: Path  # of the cell
    schedule: str
    partition: str
    path: Path  # of what is measured


def subjects_of(cells, study):
    """The Subjects of a study, a list: each cell; and `second`, its dial turned to that of `first`.

    cells: {name: Config}. Raises InputError where one of the two is not among them.
    """
    subjects = []
    for cell in cells.values():
        distributed, folder = cell.schedule == "distributed", Path(cell.out)
        partition = "semantic" if distributed else cell.partition
        name = cell.schedule if distributed else f"{cell.schedule} {partition}"
        how = cell.schedule, partition, folder / "faithful.npz"
        subjects.append(Subject(name, cell.seed, folder, *how))
    names = {s.name: s for s in subjects}
    for name in (study.first, study.second):
        if name not in names:
            raise InputError(f"[faithful]: no model is {name!r}; there are {', '.join(names)}")
    first = names[study.first]
    for s in [s for s in subjects if s.name == study.second]:
        name, path = f"{s.name}, turned to {first.name}", s.folder / "faithful.turned.npz"
        how = {"schedule": first.schedule, "partition": first.partition}
        subjects.append(s._replace(name=name, path=path, **how))
    return subjects


def measure_all(subjects, configs, study, device, jobs=1):
    """Measure what was not measured yet, `jobs` models at a time.

    configs: {folder of a cell: its config, a dict}. Returns the Contexts. Raises InputError.
    """
    model, config = load_run(subjects[0].folder, device)
    vocabulary = token_bytes(get_encoding(config["tokenizer"]))
    config, T = configs[subjects[0].folder], model.config.block_size
    contexts, text = contexts_of(config, study, T, vocabulary)
    asked = {name: getattr(study, name) for name in ("contexts", "draws", "leak_draws")}
    todo = {}
    for s in subjects:
        about = {"text": text, "weights": digest([find_checkpoint(s.folder)]), **asked}
        about |= {"schedule": s.schedule, "partition": s.partition}
        if read_measured(s.path).get("about") != about:
            todo[s] = about
    # each thread has a number of threads of its own
    threads, stop = max(1, torch.get_num_threads() // jobs), []
    bar = tqdm(total=len(todo) * len(contexts), unit="context", disable=None)
    with bar, ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(threads)) as pool:
        how = contexts, device, bar, stop
        running = [pool.submit(measure_one, s, todo[s], configs[s.folder], *how) for s in todo]
        try:
            for future in running:
                future.result()
        except BaseException:  # Ctrl-C: what is finished is kept
            stop.append(True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return contexts


def measure_one(subject, about, config, contexts, device, bar, stop):
    """Write what `measure` finds of a Subject into its file. stop: a list; not empty, it stops.

    about: a dict, to be written there too; config: of its cell, a dict.
    """
    model, _ = load_run(subject.folder, device)
    n_layer = model.config.n_layer
    model.set_locality(schedule(subject.schedule, n_layer, config["fidelity"]))
    folder, found = prepared({**config, "partition": subject.partition, "data": ""}), {}
    lookback = read_split(folder, "test")[1]
    for c, context in enumerate(contexts):
        if stop:
            return
        start = starts_of(lookback, context.place, len(context.tokens) - 1)
        # `distributed` has no blocks to find
        again = context.again.get(subject.partition) if any(model.locality) else None
        for name, values in measure(model, context, start, again).items():
            found[f"{name}.{c}"] = values
        bar.set_postfix_str(f"{subject.name}, seed {subject.seed}", refresh=False)
        bar.update()
    known = {"about": about, "made": provenance(device, subject.seed)}
    known = {name: json.dumps(value) for name, value in known.items()}
    with replacing(subject.path) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **known, **found)


def read_measured(path):
    """What `measure_all` wrote, a dict; {} where there is none.

    Arrays "NAME.CONTEXT"; about: what was asked, of which weights; made: when, where and by what.
    Raises InputError where it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            known = {name: json.loads(str(found[name])) for name in ("about", "made")}
            return {**found, **known}
    except FileNotFoundError:
        return {}
    except Exception as e:  # zipfile, zlib and numpy each raise their own
        raise InputError(f"{path} is damaged ({e}); delete it, and it is measured again") from None


def report(folder, subjects, contexts, study):
    """Count, and write the report into the folder of the sweep."""
    frames, summaries, made = frames_of(contexts), [], []
    for s in tqdm(subjects, desc="counting", leave=False, disable=None):
        found = read_measured(s.path)
        summaries.append(summarise(found, frames, study.eps))
        made.append(found["made"])
    results = analyse(subjects, summaries, frames, asdict(study))
    runs = [read_results(s.folder / "results.json") for s in subjects]
    about = provenance(torch.device("cpu"), None)
    about["seeds"] = ", ".join(map(str, sorted({s.seed for s in subjects})))
    for name in ("device", "commit"):
        about[f"measured: {name}"] = ", ".join(sorted({m[name] for m in made}))
    about["measured: dates"] = " … ".join(sorted({m["date"][:10] for m in made}))
    about["trained: commit"] = ", ".join(sorted({r["commit"] for r in runs}))
    about["base"] = ", ".join(sorted({r["config"]["init_from"] for r in runs}))
    results["about"] = {key: value for key, value in about.items() if key != "seed"}
    text = tables(results)
    write_json(folder / "faithfulness.json", results)
    write_text(folder / "faithfulness.md", text)
    draw_distance(results, folder / "faithfulness_distance.png")
    draw_pointers(results, folder / "faithfulness_pointers.png")
    print(text)
    print(f"table: {folder / 'faithfulness.md'}, and .json, _distance.png, _pointers.png beside it")


def main():
    argv = [word for word in sys.argv[1:] if word != "--report"]
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nKeys of [faithful]:\n{usage(Study)}")
        return
    jobs = take_jobs(argv)
    values = read_values(argv, more=("sweep", "faithful"))
    study, out, broken = read_study(values), Path(values["out"]), {}
    check_folder(out)
    cells = read_cells(values)
    subjects = subjects_of(cells, study)
    with alone(out) as held:
        if "--report" not in sys.argv:
            broken = run(cells, jobs, held)
        for name, why in broken.items():
            print(f"broken: {name}: {why}", file=sys.stderr)
        if broken:
            sys.exit(1)
        configs = {Path(cell.out): asdict(cell) for cell in cells.values()}
        device = pick_device(next(iter(cells.values())).device)
        contexts = measure_all(subjects, configs, study, device, jobs or 1)
        report(out, subjects, contexts, study)


if __name__ == "__main__":
    run_script(main)
