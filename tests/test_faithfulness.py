"""The faithfulness study finds what is there: it is run on models whose answer is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, script_here
from experiments import faithfulness
from experiments.faithful_measure import (
    SHIFTS,
    Context,
    contexts_of,
    first_tokens,
    found_again,
    leak,
    measure,
    pointers,
    starts_of,
    uniform,
)
from experiments.faithful_report import (
    DRAWN,
    compare,
    frames_of,
    partial_spearman,
    pointed_at,
    ranks,
    spline,
    summarise,
    values_of,
    verdict,
)
from eval import load_run
from locality import Partitioner, schedule
from model import GPT, GPTConfig
from prepare_data import get_encoding, prepared, read_meta, read_split, token_bytes
from experiments.faithfulness import main
from support.files import InputError, run_script
from support.report import holm
from support.settings import to_toml

T, V = 96, 64
LENGTHS = (6, 8, 10)  # of the sentences of a block, in tokens
LOOKBACK = np.arange(10 * T) % 24


def a_model(*locality, seed=0):
    """A model of random weights, large enough that what it reads matters."""
    torch.manual_seed(seed)
    sizes = {"n_layer": len(locality), "n_head": 2, "n_embd": 32, "block_size": T}
    model = GPT(GPTConfig(vocab_size=V, max_lookback=T, **sizes)).eval()
    with torch.no_grad():
        model.wpe.weight.zero_()
        for name, p in model.named_parameters():
            if "c_proj" in name or "c_attn" in name:
                p.mul_(3)
    model.set_locality(list(locality))
    return model


def some_contexts(n=4, seed=0):
    """Contexts of random tokens, in blocks of 24, each of three sentences."""
    rng, contexts = np.random.default_rng(seed), []
    edges = np.cumsum([0, *LENGTHS * (T // 24)]).tolist()
    sentences = list(zip(edges, edges[1:]))
    for _ in range(n):
        start = starts_of(LOOKBACK, 0, T)
        # boundaries of the right length in the wrong places
        elsewhere = [starts_of(LOOKBACK, 8 * (1 + i % 2), T) for i in range(SHIFTS)]
        foreign = [torch.tensor(rng.integers(V, size=(2, e - b))) for b, e in sentences]
        before = {b: torch.tensor(rng.integers(V, size=(16, b))) for b in first_tokens(start)}
        tokens = rng.integers(V, size=T + 1)
        contexts.append(Context(0, tokens, sentences, [start, *elsewhere], foreign, before, {}))
    return contexts


def outcome(model, own=None, contexts=None):
    """Every measure of a model, {name: number}; and what was measured in each context."""
    contexts = contexts or some_contexts()
    own = starts_of(LOOKBACK, 0, T) if own is None else own
    measured = [measure(model, context, own) for context in contexts]
    found = {f"{name}.{c}": x for c, some in enumerate(measured) for name, x in some.items()}
    frames = frames_of(contexts)
    values = values_of([summarise(found, frames, 1e-3)], frames, np.ones((1, len(contexts))))
    return {name: x.item() for name, x in values.items()}, measured


def test_a_model_that_sees_its_block_alone_has_no_leak_and_a_boundary_effect():
    values, measured = outcome(a_model(1.0, 1.0))
    assert values["leak"] < 1e-6 and abs(values["far"]) < 1e-6
    assert values["boundary"] > 3 and values["boundary"] > values["shifted"] + 2
    block = starts_of(LOOKBACK, 0, T)
    for found in measured:  # no sentence before the block has any influence
        begin = np.array(some_contexts(1)[0].sentences)[:, :1]
        out = np.isfinite(found["influence"]) & (begin < block)
        assert found["influence"][out].max() == 0 and found["raw"][out].max() == 0


def test_a_model_of_uniform_attention_has_a_leak_and_no_boundary_effect():
    values, _ = outcome(uniform(a_model(0.0)), contexts=some_contexts(8))
    assert abs(values["boundary"]) < 0.15 and abs(values["shifted"]) < 0.15
    assert values["leak"] > 0.01 and abs(values["uniform"]) < 1e-6
    a = next(uniform(a_model(0.0)).attention_maps(torch.arange(5)[None], torch.zeros(1, 5)))
    even = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(a, even.expand_as(a))


def test_a_pointer_is_true_where_all_influence_passes_through_it_and_not_where_none_does():
    values, _ = outcome(a_model(0.0))
    assert values["pointer"] > 0.25 and values["weighted"] > 0.25 and values["pointed"] > 0
    decoration = a_model(0.0, 0.0)  # the last layer looks, and takes nothing along
    with torch.no_grad():
        decoration.h[-1].attn.c_proj.weight.zero_()
    values, _ = outcome(decoration)
    assert values["weighted"] == 0 and values["uniform"] == 0 and abs(values["pointer"]) < 0.2


def test_the_influence_that_is_kept_is_the_definition():
    model, (context,) = a_model(0.2, 1.0), some_contexts(1)
    start = starts_of(LOOKBACK, 0, T)
    found = measure(model, context, start, again=np.stack([start] * len(context.sentences)))
    lookback = torch.tensor(np.arange(T) - start)[None]
    x = torch.tensor(context.tokens[None, :-1])

    def log_p(idx, i):
        return model(idx, lookback)[0][0, i].double().log_softmax(-1)

    with torch.no_grad():
        for s, (begin, end) in list(enumerate(context.sentences))[::4]:
            assert np.isnan(found["influence"][s, :end]).all()
            for i in range(end, T, 13):
                bits = []
                for text in context.foreign[s]:
                    idx = x.clone()
                    idx[0, begin:end] = text
                    idx[0, 0] = x[0, 0]
                    p, q = log_p(x, i), log_p(idx, i)
                    bits.append((p.exp() * (p - q)).sum().item() / math.log(2))
                assert found["influence"][s, i] == pytest.approx(np.mean(bits), 1e-3, 1e-5)
    assert np.nanmax(np.abs(found["moved"])) < 1e-6  # the same blocks again
    *_, a = model.attention_maps(x, lookback)
    seen = a[0].mean(0)  # (T, T)
    for s, (begin, end) in enumerate(context.sentences):
        sums = seen[:, max(begin, 1) : end].sum(1).detach().numpy()
        np.testing.assert_allclose(found["raw"][s], sums, atol=1e-6)


def test_a_value_that_adds_nothing_weighs_nothing():
    model, (context,) = a_model(0.0), some_contexts(1)
    attn, x = model.h[-1].attn, torch.randn(1, T, 32)
    with torch.no_grad():
        before = pointers(model, x, torch.zeros(1, T), context.sentences)
        attn.c_proj.weight.mul_(2)
        after = pointers(model, x, torch.zeros(1, T), context.sentences)
        torch.testing.assert_close(after[0], before[0])
        torch.testing.assert_close(after[1], 2 * before[1])
        attn.c_attn.weight[64:], attn.c_attn.bias[64:] = 0, 0
        assert pointers(model, x, torch.zeros(1, T), context.sentences)[1].abs().max() == 0


def test_the_leak_of_an_output_that_names_one_of_k_texts_is_log2_k():
    (context,) = some_contexts(1)
    before = {24: torch.arange(16)[:, None].repeat(1, 24), 48: torch.zeros(16, 48, dtype=int)}
    context = context._replace(before=before)
    y = torch.zeros(T, dtype=int)

    def model(idx, lookback):  # says which token stands at place 1
        return 50.0 * torch.nn.functional.one_hot(idx[:, 1:2], V).expand(-1, idx.size(1), -1), None

    found = leak(model, torch.ones(1, T, dtype=int), torch.zeros(1, T), y, context)
    bits, nats = found["leak"].numpy(), found["far"].numpy()
    assert bits[24:48] == pytest.approx(4) and bits[48:72] == pytest.approx(0)
    assert nats[24:48] == pytest.approx(50 * 15 / 16) and nats[48:72] == pytest.approx(0)
    assert np.isnan(bits[:24]).all() and np.isnan(bits[72:]).all()


def test_the_blocks_of_a_text_that_is_not_changed_are_found_again(place, monkeypatch):
    monkeypatch.chdir(place)
    text = {"source": "data/sample.txt", "tokenizer": "bytes", "max_lookback": 300, "joined": False}
    config = {**text, "val": 0.1, "test": 0.1, "data": "", "partition": "semantic"}
    vocabulary, size = token_bytes(get_encoding("bytes")), 1000
    study = faithfulness.Study(contexts=3, draws=1, leak_draws=2)
    with pytest.raises(InputError, match="a longer block_size"):
        contexts_of(config, study, 60, vocabulary)
    contexts, _ = contexts_of(config, study, size, vocabulary)
    for name in ("semantic", "semantic:closed"):
        folder = prepared({**config, "partition": name})
        tokens, lookback = read_split(folder, "test")
        place = contexts[1].place
        before = Partitioner(vocabulary, name, 300, read_meta(folder)["background"])
        before.push(tokens[:place])
        some = tokens[place : place + size].astype(np.int64)
        same = torch.tensor(some[40:90][None])
        (again,) = found_again(before, some, [(40, 90)], [same])
        np.testing.assert_array_equal(again, starts_of(lookback, place, size))
        assert (contexts[1].again[name] != starts_of(lookback, place, size)).any()


def test_where_the_true_pieces_of_a_joined_text_begin_is_known(
    tmp_path, monkeypatch, gpt2_tokenizer
):
    monkeypatch.chdir(tmp_path)
    sentence = "The cat of the house sat on a mat. "
    pieces = [sentence * n for n in (9, 14, 11, 8) * 16]
    Path("text.txt").write_text("<|endoftext|>".join(pieces))
    text = {"source": "text.txt", "tokenizer": "gpt2:300", "max_lookback": 200, "joined": True}
    config = {**text, "val": 0.1, "test": 0.3, "data": "", "partition": "semantic"}
    vocabulary = token_bytes(get_encoding("gpt2:300"))
    study = faithfulness.Study(contexts=2, draws=1, leak_draws=2)
    contexts, _ = contexts_of(config, study, 1000, vocabulary)
    tokens, _ = read_split(prepared(config), "test")
    ends = np.flatnonzero(np.array(tokens) == vocabulary.index(b"\n")) + 1  # between pieces
    for context in contexts:
        assert len(context.blocks) == 2 + SHIFTS
        known = sorted({0, *(ends - context.place)} & set(range(1000)))
        assert len(known) > 3
        assert np.unique(context.blocks[-1]).tolist() == known
        assert set(known) <= {begin for begin, _ in context.sentences}


# --------------------------------------------------------------------------------------------------
# the statistics


def made_up(contexts, effect, kind=0, seed=1):
    """Frames, and measurements in which the influence of a sentence of a block is 2 ** effect
    times that of others, with distance, length and the context in it too."""
    rng, frames, found = np.random.default_rng(seed), frames_of(contexts), {}
    for c, (context, frame) in enumerate(zip(contexts, frames)):
        begin, end = np.array(context.sentences).T[..., None]
        y = -0.7 * np.log2(1 + np.maximum(frame.distance, 0)) + 2 * np.log2(end - begin) + c
        y = np.where(frame.pair, y + effect * frame.inside[kind], np.nan)
        y = y + rng.normal(0, 0.3, y.shape)
        at = {"influence": 2**y, "moved": np.full_like(y, np.nan)}
        at |= dict.fromkeys(("raw", "weighted", "even"), np.ones_like(y))
        at |= dict.fromkeys(("nats", "leak", "far", "uniform"), np.full(T, float(c)))
        found |= {f"{name}.{c}": x for name, x in at.items()}
    return frames, found


def test_the_regression_finds_an_effect_that_was_put_in():
    frames, found = made_up(some_contexts(6), 1.5)
    again = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), 50)
    for weights in (np.ones((1, 6)), again):
        values = values_of([summarise(found, frames, 1e-9)], frames, weights.astype(float))
        assert values["boundary"] == pytest.approx(1.5, abs=0.1)
        assert values["finer"] == pytest.approx(values["boundary"], abs=1e-3)
        assert (values["shifted"] < 0).all()  # and the places beside the blocks have less
        assert (values["pointer"] == 0).all()  # a mass that is the same everywhere tells nothing
        assert np.isnan(values["moved"]).all()
        assert values["leak"] == pytest.approx((weights @ np.arange(6.0) / 6)[None])
    strong = values_of([summarise(found, frames, 1e6)], frames, np.ones((1, 6)))
    assert abs(strong["boundary"]) < 0.01 and strong["weak"] == 1  # eps hides what is weaker


def test_the_true_pieces_are_asked_about_too():
    contexts = [
        context._replace(blocks=[*context.blocks, np.repeat([0, 54], (54, 42))])
        for context in some_contexts(6)
    ]
    values = {}
    for effect in (0.0, 1.5):
        frames, found = made_up(contexts, effect, kind=-1)
        some = values_of([summarise(found, frames, 1e-9)], frames, np.ones((1, 6)))
        values[effect] = {name: x.item() for name, x in some.items()}
    assert abs(values[0]["true boundary"]) < 0.1
    assert values[1.5]["true boundary"] == pytest.approx(1.5, abs=0.1)
    for some in values.values():
        assert some["true boundary"] > some["boundary"] or some is values[0]
    gap = [some["piece"] - some["by distance"] for some in values.values()]
    assert abs(gap[0]) < 0.02 and gap[1] > 0.1


def test_a_spline_is_a_line_beyond_its_knots_and_bends_between():
    x = np.linspace(-3, 9, 241)
    columns = np.stack(spline(x, [0, 1, 2, 4, 6]))
    assert len(columns) == 4
    bend = np.abs(np.diff(columns, 2)).max(0)
    assert bend[x[1:-1] < -0.1].max() < 1e-9 and bend[x[1:-1] > 6.1].max() < 1e-9
    assert np.linalg.matrix_rank(np.vstack([columns, np.ones_like(x)])) == 5


def test_partial_ranks_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 6, (9, 20)).astype(float) for _ in range(3))
    among = rng.random((9, 20)) < 0.8
    among[:, 3] = np.arange(9) < 2  # too few
    found = partial_spearman(a, b, c, among)
    assert np.isnan(found[3])
    for i in (i for i in range(20) if i != 3):
        rank = [
            ranks(x[among[:, i], i][:, None], np.ones((among[:, i].sum(), 1), bool))
            for x in (a, b, c)
        ]
        left = []
        for x in rank[:2]:  # what a line through the third leaves of each
            design = np.column_stack([np.ones(len(x)), rank[2]])
            left.append(x[:, 0] - design @ np.linalg.lstsq(design, x[:, 0], rcond=None)[0])
        assert found[i] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)
    assert ranks(np.array([[3.0], [1], [3], [2]]), np.ones((4, 1), bool)).T.tolist() == [
        [3.5, 1, 3.5, 2]
    ]


def test_what_is_pointed_at_is_compared_with_what_stands_as_far_away():
    bits = np.array([[1.0, 1, 1], [2, 8, 2]])
    mass = np.array([[0.9, 0.1, 0.9], [0.1, 0.9, 0.1]])
    block, bins = np.ones((2, 3), bool), np.array([[5, 5, 5], [3, 3, 3]])
    assert pointed_at(bits, mass, block, bins).tolist() == [0, 0, 6]
    block[0] = False  # nothing to choose from
    assert pointed_at(bits, mass, block, bins).tolist() == []


def test_holm_corrects_for_all_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        wrong += min(holm(rng.random(3).tolist())) < 0.05
    assert wrong / 2000 < 0.065


def test_a_comparison_is_paired_and_says_what_it_found():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 1.1, 2.1, 3.1, 4.1, 5.1, 6.1, 7.1, 8.1])
    values[8:] += np.linspace(-0.01, 0.01, 8)
    places = {"a": dict(zip(range(8), range(8))), "b": dict(zip(range(8), range(8, 16)))}
    row = compare(values, np.repeat(values[:, None], DRAWN, 1), places, "b", "a")
    assert row["seeds"] == 8 and row["p"] == 2 / 256
    assert row["low"] < row["difference"] < row["high"]
    assert row["difference"] == pytest.approx(0.1)
    row["holm"] = holm([row["p"], 0.5, 0.5])[0]
    assert verdict(row, 0.01) == "higher"
    assert verdict(row, 0.2) == "higher, by less than counts"
    assert verdict({**row, "low": 0.01}, 0.02) == "higher, perhaps by less than counts"
    assert verdict({**row, "text": [-0.3, 0.5]}, 0.01) == "higher; another text may differ"
    row |= {"holm": 0.4, "low": -0.01, "high": 0.02, "text": [-0.02, 0.04]}
    assert verdict(row, 0.05) == "no difference that counts"
    assert verdict(row, 0.001) == verdict({**row, "text": [-0.1, 0.1]}, 0.05) == "not resolved"
    assert verdict({**row, "holm": None}, 0.001) == "not resolved"
    assert verdict({**row, "seeds": 1}, 1) == "one seed tells nothing"


def test_a_difference_that_contexts_do_not_agree_on_is_not_one_of_the_text():
    contexts, effects = some_contexts(6), (2.0, -2.0) * 3
    frames, summaries = frames_of(contexts), []
    for seed in (1, 2, 3):
        for given in ((0.0,) * 6, effects, (1.0,) * 6):
            found = {}
            for c, effect in enumerate(given):
                _, some = made_up(contexts, effect, seed=seed)
                found |= {name: x for name, x in some.items() if name.endswith(f".{c}")}
            summaries.append(summarise(found, frames, 1e-9))
    again = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), 200).astype(float)
    values, drawn = (values_of(summaries, frames, w)["boundary"] for w in (np.ones((1, 6)), again))
    places = {name: {s: 3 * s + i for s in range(3)} for i, name in enumerate("abc")}
    mixed, same = (compare(values[:, 0], drawn, places, name, "a") for name in "bc")
    assert mixed["text"][0] < -0.3 and mixed["text"][1] > 0.3
    assert same["text"] == pytest.approx([1, 1], abs=0.15)
    assert same["difference"] == pytest.approx(1, abs=0.1) and same["p"] == 0.25


# --------------------------------------------------------------------------------------------------
# the whole


TINY = """
source = "data/sample.txt"
tokenizer = "bytes"
max_lookback = 200
block_size = 400
n_layer = 2
n_head = 2
n_embd = 16
batch_size = 1
max_steps = 2
eval_interval = 2
eval_contexts = 1
compile = false
[[sweep]]
schedule = ["distributed"]
seed = [1, 2]
[[sweep]]
schedule = ["quintic"]
partition = ["semantic"]
seed = [1, 2]
[faithful]
contexts = 2
draws = 1
leak_draws = 2
"""


def train_here(cells, jobs, held):
    for cell in cells.values():
        if not Path(cell.out, "results.json").exists():
            Path("cell.toml").write_text(to_toml(cell))
            assert script_here("train.py", "cell.toml") == 0
    return {}


@pytest.fixture
def study(place, monkeypatch, capsys):
    """study(*options) -> (status, stdout, stderr), in `place`, and in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(faithfulness, "run", train_here)

    def start(*options):
        monkeypatch.setattr("sys.argv", ["faithfulness", *map(str, options)])
        try:
            run_script(main)
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return start


def check_losses(folder, results):
    """The loss of each model of a study is that of its own weights, at its own dial and blocks."""
    for model in results["models"]:
        turned = "turned" in model["name"]
        name = model["name"].replace(" ", ".") if not turned else "distributed"
        for seed, nats in zip((1, 2), model["nats"]["by_seed"]):
            net, config = load_run(folder / f"{name}.seed{seed}")
            if turned:
                net.set_locality(schedule("quintic", 2))
            tokens, lookback = read_split(prepared(config), "test")
            losses = []
            for place in (0, len(tokens) - 401):
                part = [
                    torch.tensor(x[place : place + 401].astype(int)) for x in (tokens, lookback)
                ]
                x, y, back = part[0][None, :-1], part[0][None, 1:], part[1][None, :-1]
                losses.append(net(x, back, y)[1].item())
            assert nats == pytest.approx(np.mean(losses), rel=1e-5)
    means = [model["nats"]["by_seed"] for model in results["models"]]
    assert means[0] != means[1] != means[2] != means[0]


def test_the_study_from_end_to_end(study):
    Path("study.toml").write_text(TINY)
    status, printed, errors = study("study.toml", "--out", "runs/study")
    assert status == 0, errors
    folder = Path("runs/study")
    results = json.loads((folder / "faithfulness.json").read_text())
    assert [row["outcome"] for row in results["tests"]] == ["boundary", "pointer", "leak"]
    names = [model["name"] for model in results["models"]]
    turned = "distributed, turned to quintic semantic"
    assert names == ["distributed", "quintic semantic", turned]
    assert {"command", "commit", "device", "date", "seeds"} <= results["about"].keys()
    ps, corrected = ([row[p] for row in results["tests"]] for p in ("p", "holm"))
    assert corrected == holm(ps)
    check_losses(folder, results)
    assert (folder / "faithfulness.md").read_text().strip() in printed
    for name in ("distance", "pointers"):
        assert (folder / f"faithfulness_{name}.png").stat().st_size > 10_000
    # a second time nothing is measured; after other weights or another question, all of it
    measured = sorted(folder.glob("*/*.npz"))
    assert len(measured) == 6
    times = [path.stat().st_mtime_ns for path in measured]
    assert study("study.toml", "--out", "runs/study", "--report")[0] == 0
    assert [path.stat().st_mtime_ns for path in measured] == times
    assert json.loads((folder / "faithfulness.json").read_text())["models"] == results["models"]
    measured[0].write_bytes(measured[0].read_bytes()[:1000])
    status, _, errors = study("study.toml", "--out", "runs/study")
    assert status == 2 and "is damaged" in errors and errors.count("\n") == 1
    measured[0].unlink()
    assert study("study.toml", "--out", "runs/study")[0] == 0
    assert json.loads((folder / "faithfulness.json").read_text())["models"] == results["models"]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("draws = 1", "draw = 1", "unknown key draw; the nearest is draws"),
        ("contexts = 2", "contexts = 900", "holds"),
        ("contexts = 2", "contexts = 1", "contexts must be at least 2"),
        ("[faithful]", '[faithful]\nfirst = "cubic semantic"', "no model is 'cubic semantic'"),
        ("[faithful]", "[faithfull]", "unknown key faithfull"),
        ("seed = [1, 2]\n[f", "seed = [1]\nfidelity = [0.5, 1.0]\n[f", "two models differ neither"),
        ("seed = [1, 2]\n[f", "seed = [1]\nmax_steps = [2, 3]\n[f", "do not differ in max_steps"),
    ],
)
def test_bad_studies_are_one_line(study, old, new, said):
    Path("bad.toml").write_text(TINY.replace(old, new))
    status, _, errors = study("bad.toml", "--out", "runs/study")
    assert status == 2 and said in errors and errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_every_config_of_a_study_asks_about_the_same_models_with_the_same_bounds():
    studies = {}
    for path in sorted((ROOT / "configs").glob("faithful_*.toml")):
        values = faithfulness.read_values([str(path)], ("sweep", "faithful"))
        assert values["sweep"]
        studies[path.stem] = faithfulness.read_study(values)
    assert studies["faithful_smoke"] == faithfulness.Study(contexts=8, draws=1, leak_draws=4)
    for study in studies.values():
        asked = {"contexts": 8, "draws": 1, "leak_draws": 4}
        assert replace(study, **asked) == studies["faithful_smoke"]
