"""Look at a text through a model: one HTML file for any browser, which needs nothing else.

    python view.py runs/quickstart                                     # a page of the test split
    python view.py runs/quickstart --split train --from "In the early"  # starting at these words
    python view.py runs/quickstart --prompt "Attention is a habit. It is learned."
    python view.py runs/quickstart --partition block:64                # with other blocks
    python view.py runs/quickstart --schedule localist --schedule linear  # compare these two
    python view.py gpt2 --text my_page.txt                             # published weights

For every token the page shows where each head looks, how much of that stays in the block, and what
may come next. It also shows what the prediction depends on: each sentence before the token is
replaced with foreign text. A slider turns the dial from 0, which is GPT-2, to the schedule of the
run, with the same weights. In a notebook, `view.page("runs/quickstart")` shows the page.
"""

import support  # first: it sets what torch reads when it is loaded  # noqa: F401

import argparse
import math
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval import add_model_arguments, attention_maps, check_other, entropy_of, fidelity_of, load
from locality import CHUNK, Partitioner, partition_names, schedule
from prepare_data import TextConfig, prepare
from report.blocks import liveliest
from report.excerpt import Text, cut, draw_foreign, find_words
from report.page import Page, check_page, fill, page_name, store
from support.files import InputError, run_script, visible, write_text
from support.machine import pick_device, provenance
from support.prepared import SPLITS
from support.run import is_run
from support.sources import pieces
from support.tokenizers import SAMPLE, get_encoding, token_bytes, token_ids

TOKENS, MOST = 512, 4096  # default and maximum number of tokens on a page
LIKELIEST = 10  # number of likely next tokens to show per token
KEYS = 32  # maximum number of keys to show per query
POSITIONS = 0, 0.25, 0.5, 0.75, 1  # of the dial

# --------------------------------------------------------------------------------------------------
# where the model looks, and what its predictions depend on


@torch.no_grad()
def look(model, idx, lookback, n_keys):
    """Where every head of a model looks, a dict of tensors. idx, lookback: (1, T).

    fidelity: the attention that stays in the block, (L, H, T); entropy: in bits, (L, H, T); keys,
    weights: the n_keys keys with the most attention, (L, H + 1, T, n_keys), where the mean over
    heads is one more head, the last.
    """
    block = model.in_block(lookback)  # (1, 1, T, T)
    layers = {"fidelity": [], "entropy": [], "keys": [], "weights": []}
    for a in attention_maps(model, idx, lookback):  # (1, H, T, T)
        layers["fidelity"].append(fidelity_of(a, block)[0])
        layers["entropy"].append(entropy_of(a)[0])
        top = torch.cat((a, a.mean(1, keepdim=True)), 1)[0].topk(n_keys)  # (H + 1, T, n_keys)
        layers["keys"].append(top.indices)
        layers["weights"].append(top.values)
    return {name: torch.stack(values) for name, values in layers.items()}


@torch.no_grad()
def influence(model, idx, lookback, log_p, sentence, foreign):
    """How much later predictions depend on a sentence: replace it with K texts, one by one.

    idx: (1, T); log_p: (T, V), the predictions with the original sentence, in nats; sentence: its
    (begin, end); foreign: (K, end - begin) ids to replace it with; lookback: (1, T), which holds
    meanwhile. Positions do not change, nor does the first token. The model is in eval mode, and
    everything is on its device.
    Returns, for every token after the sentence, KL(p || p with it replaced) in bits, (K, T - end),
    and p with it replaced, the mean over the K, (T - end, V). One pass serves all these tokens.
    """
    begin, end = max(sentence[0], 1), sentence[1]
    bits, mean_p = [], 0.0
    for text in foreign:
        replaced = idx.clone()
        replaced[0, begin:end] = text[begin - sentence[0] :]
        log_q = model(replaced, lookback)[0][0, end:].log_softmax(-1)  # (T - end, V)
        nats = (log_p[end:].exp() * (log_p[end:] - log_q)).sum(-1)  # (T - end,)
        bits.append(nats / math.log(2))
        mean_p = mean_p + log_q.exp() / len(foreign)
    return torch.stack(bits), mean_p


@torch.no_grad()
def measure_dial(model, excerpt, drawn, bar):
    """What a page shows of a model at its dial, a dict of arrays, and the loss in nats per token.

    drawn: what `draw_foreign` returned, or [] to replace no sentence; bar: counts the passes.
    Besides what `look` returns: likely, (T, N) ids of the likeliest next tokens; bits, (T, N + 1),
    -log2 p of these and of the token that came; rank, (T,), of the latter. For every token after
    each sentence, one sentence after another: influence, in bits; change, what the sentence adds to
    log2 p of those N + 1 tokens; new, the likeliest token without the sentence, and its -log2 p.
    Raises InputError.
    """
    device, T = model.wte.weight.device, len(excerpt.tokens)
    idx = torch.tensor(excerpt.tokens, device=device)[None]  # (1, T)
    lookback = torch.tensor(excerpt.lookback, device=device)[None]  # (1, T)
    log_p = model(idx, lookback)[0][0].log_softmax(-1)  # (T, V)
    if not log_p.isfinite().all():
        raise InputError("the predictions of this model are not finite numbers")
    seen = look(model, idx, lookback, min(T, KEYS))
    bar.update()
    true = idx[0].roll(-1)[:, None]  # (T, 1), the next tokens; nothing follows the last
    likely = log_p.topk(min(LIKELIEST, log_p.size(1))).indices
    ranked = torch.cat((likely, true), 1)  # (T, N + 1)
    log_ranked = log_p.gather(1, ranked)
    rank = (log_p > log_ranked[:, -1:]).sum(1) + 1
    arrays = {**seen, "likely": likely, "bits": -log_ranked / math.log(2), "rank": rank}
    arrays = {name: values.cpu().numpy() for name, values in arrays.items()}
    replaced = {"influence": [], "change": [], "new": [], "new_bits": []}
    for (begin, end), foreign in zip(excerpt.sentences, drawn):
        bits, p = influence(model, idx, lookback, log_p, (begin, end), foreign.to(device))
        change = log_ranked[end:] / math.log(2) - p.gather(1, ranked[end:]).log2()
        best = p.max(1)
        values = bits.mean(0).clamp(min=0), change, best.indices, -best.values.log2()
        for name, value in zip(replaced, values):
            replaced[name].append(value.flatten().cpu().numpy())
        bar.update()
    arrays |= {name: np.concatenate([[], *values]) for name, values in replaced.items()}
    return arrays, -log_ranked[:-1, -1].cpu().double().mean().item()


def measure(model, excerpt, vocabulary, foreign, dials, n_draws):
    """Everything that report/page.html shows of a model and an Excerpt, a dict.

    foreign: (n,) token ids; dials: the locality of each layer, a list per dial; n_draws: foreign
    texts per sentence, or 0. The model keeps its own dial. Raises InputError.
    """
    sentences = excerpt.sentences[:-1] if n_draws else []  # nothing follows the last one
    drawn = draw_foreign(foreign, vocabulary, sentences, n_draws)
    before, measured, at_dials = model.locality, [], []
    total, quiet = len(dials) * (1 + len(drawn)), None if n_draws else True
    with tqdm(total=total, desc="viewing", leave=False, disable=quiet) as bar:
        try:
            for locality in dials:
                model.set_locality(locality)
                arrays, loss = measure_dial(model, excerpt, drawn, bar)
                measured.append(arrays)
                at_dials.append({"locality": locality, "perplexity": math.exp(min(loss, 700))})
        finally:
            model.set_locality(before)
    return {
        "shown": visible(excerpt.shown),
        "lookback": excerpt.lookback.tolist(),
        "marks": excerpt.marks,
        "sentences": excerpt.sentences,
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "anchor": model.config.anchor,
        "draws": n_draws,
        "most_keys": KEYS,
        "likeliest": min(LIKELIEST, len(vocabulary)),
        "dials": at_dials,
        **store(excerpt.tokens, vocabulary, measured),
    }


def turns(schedules, floors, config, n_layer, positions=POSITIONS):
    """What the slider of a page turns: its schedules, its positions, and the locality at each dial.

    schedules, floors: lists; None or empty: use the value in config, a dict. With `distributed`,
    every dial would be 0, so quintic replaces it. positions: those of the slider, starting at 0.
    Returns one or two (schedule, floor); positions; a list of localities, n_layer floats each:
    GPT-2, which is position 0 of both schedules, then the other positions of the first schedule,
    then those of the second. Raises InputError.
    """
    names, floors = schedules or [config["schedule"]], floors or [config["floor"]]
    n = max(len(names), len(floors))
    if n > 2:
        raise InputError("a page shows two schedules: give --schedule and --floor at most twice")
    pairs = [(names[min(i, len(names) - 1)], floors[min(i, len(floors) - 1)]) for i in range(n)]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[0] != "distributed"]
    if schedules and not pairs:
        raise InputError("the dial of a page begins at distributed; give another schedule")
    pairs = pairs or [("quintic", floors[0])]
    full = [schedule(name, n_layer, floor) for name, floor in pairs]
    dials = [[position * x for x in locality] for locality in full for position in positions[1:]]
    return pairs, positions, [[0.0] * n_layer, *dials]


# --------------------------------------------------------------------------------------------------
# a page


def page(
    run,
    text=None,
    split=None,
    words=None,
    partition=None,
    schedule=None,
    floor=None,
    tokens=None,
    draws=2,
    plain=False,
    device="auto",
):
    """A Page of a run of train.py, or of published weights. A notebook shows it; `save` keeps it.

    text: a string, or the Path of a file; None: a split of the run's own text, by default test.
    words: begin with these; by default, where most blocks begin. partition: other blocks.
    schedule, floor: others than those of the run; a list of two compares them. tokens: how many, by
    default 512 or the context of the model. draws: foreign texts per sentence.
    Raises InputError.
    """
    given = {**locals()}
    check_arguments(run, text, split, draws)
    device = pick_device(device)
    model, config, trained_on = load(run, device, plain=plain)
    schedules = [schedule] if isinstance(schedule, str) else schedule
    floors = [floor] if isinstance(floor, (int, float)) else floor
    turned = turns(schedules, floors, config, model.config.n_layer)
    most = min(MOST, model.config.block_size)
    T = min(TOKENS, most) if tokens is None else tokens
    if not 2 <= T <= most:
        raise InputError(f"a page of this model has 2 ... {most} tokens, not {T}")
    partition = config["partition"] if partition is None else partition
    own = prepare(TextConfig.of(config), trained_on) if config["source"] else None
    whole = own_text(own, split or "test", T) if text is None else given_text(config, own, text)
    vocabulary = token_bytes(get_encoding(config["tokenizer"]))
    if partition != config["partition"]:  # `cut` finds the blocks
        background = check_other(partition, config, whole.tokens, vocabulary, own)
        whole = whole._replace(background=background, lookback=None)
    if words is not None:
        whole = whole._replace(start=find_words(whole.tokens, vocabulary, words))
        if whole.start is None:
            raise InputError(f"{whole.name} does not contain the words {words!r}; see --split")
    data = everything(run, model, whole, T, config | {"partition": partition}, turned, draws)
    usual = {name: p.default for name, p in signature(page).parameters.items()}
    given = {name: value for name, value in given.items() if value != usual[name]}
    call = ", ".join(f"{name}={value!r}" for name, value in given.items())
    data["command"] = visible(f"view.page({call})")
    folder, weights = (run, "") if is_run(run) else ("", Path(run).name)
    return Page(data, Path(folder, page_name(given, weights, turned[0], partition)))


def quick_page(path, model, config, data, step):
    """Write a page of the validation split to `path` while a model trains, at dial 0 and dial 1.

    config: the keys of train.Config, a dict; data: Prepared; step: how many have been made. No
    sentence is replaced, so the page does not say what predictions depend on. The model, its dial
    and all random number generators are left as they are. Raises InputError.
    """
    T, was_training = min(TOKENS, model.config.block_size), model.training
    turned = turns(None, None, config, model.config.n_layer, positions=(0, 1))
    text = own_text(data, "val", T, within=CHUNK)
    model.eval()
    try:
        shown = everything(config["out"], model, text, T, config, turned, n_draws=0)
    finally:
        model.train(was_training)
    shown["when"] = f"step {step} of {config['max_steps']}" if step else "before training"
    write_text(path, fill(shown))


def everything(run, model, text, T, config, turned, n_draws):
    """All that a page shows, a dict: T tokens of a Text, and where they come from.

    config: with the partition of the page, a dict; turned: what `turns` returned; for the rest see
    `measure`. Raises InputError.
    """
    (pairs, positions, dials), partition = turned, config["partition"]
    vocabulary = token_bytes(get_encoding(config["tokenizer"]))
    rules = partition, config["max_lookback"], text.background, config["plain"]
    marked = partition in ("semantic", "semantic:closed")
    excerpt = cut(text, T, vocabulary, Partitioner(vocabulary, *rules), marked)
    data = measure(model, excerpt, vocabulary, text.foreign, dials, n_draws)
    data |= {"run": visible(str(run)), "when": "", "positions": positions}
    data |= {"schedules": [{"name": name, "floor": floor} for name, floor in pairs]}
    data |= {"partition": partition, "max_lookback": config["max_lookback"]}
    data |= provenance(model.wte.weight.device, config["seed"])
    return data | {"command": visible(data["command"])}


# --------------------------------------------------------------------------------------------------
# the text


def own_text(data, split, T, within=None):
    """A split of a run's Prepared text; the foreign text is another split. T: tokens to show, of
    the first `within` of the split."""
    tokens, lookback = data.split(split)
    foreign, _ = data.split("val" if split == "test" else "test")
    start = liveliest(lookback[:within], T)
    return Text(f"{split} split", tokens, start, data.meta["background"], foreign, lookback)


def given_text(config, data, text):
    """The text of a file, a Path, or a string. data: the run's Prepared text; None for weights.

    The foreign text is the run's test split; for weights, the sample text. Raises InputError.
    """
    encoding = get_encoding(config["tokenizer"])
    name = text.name if isinstance(text, Path) else "a prompt"
    text = "".join(pieces(text)) if isinstance(text, Path) else text
    tokens = token_ids(encoding, text, name).astype(np.int64)
    if data:
        return own_text(data, "val", 2)._replace(name=name, tokens=tokens, start=0, lookback=None)
    foreign = token_ids(encoding, "".join(pieces(SAMPLE)), SAMPLE).astype(np.int64)
    return Text(name, tokens, 0, None, foreign)


# --------------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description="look at a text through a model: an HTML page")
    add_model_arguments(parser, action="append")
    add = parser.add_argument
    add("--split", choices=SPLITS, help="of the run's text (default: test)")
    add("--text", type=Path, help="another text, a file")
    add("--prompt", help="another text, given here")
    add("--from", dest="words", help="words to begin with (default: where most blocks begin)")
    add("--partition", help=f"other blocks: {partition_names()}")
    add("--tokens", type=int, help=f"how many (default: {TOKENS}, or the model's context)")
    add("--draws", type=int, default=2, help="foreign texts per sentence (default: 2)")
    add("--out", type=Path, help="a file (default: in the run's folder or here, named after it)")
    args = vars(parser.parse_args())
    out, prompt = args.pop("out"), args.pop("prompt")
    if args["text"] and prompt is not None:
        raise InputError("give --text or --prompt, not both")
    args["text"] = args["text"] or prompt
    if out:
        check_page(out)  # before the work is done
    made = page(**args)
    made.data["command"] = visible(provenance(torch.device("cpu"), None)["command"])
    out = made.save(out)
    names = [f"{x['name']} {x['floor']:g}" for x in made.data["schedules"]]
    print(f"{made.data['shown']}; {' and '.join(names)}")
    print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB), for any browser")


def check_arguments(run, text, split, draws):
    """Raises InputError for what would otherwise fail only later. For the arguments see `page`."""
    if text is not None and split:
        raise InputError(
            "--split selects a part of the run's text; it does not apply to --text or --prompt"
        )
    if split not in (None, *SPLITS):
        raise InputError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if text is None and not is_run(run):
        raise InputError(
            f"{run} contains no checkpoint of a run; to look at other weights, give a text: "
            "--text my_page.txt, or --prompt"
        )
    if not 1 <= draws <= 100:
        raise InputError(f"draws must be in 1 ... 100, not {draws}")


if __name__ == "__main__":
    run_script(main)
