"""The faithfulness study finds what is there: it is run on models whose answer is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, script_here
from eval import load_run
from experiments import faithful_measure as fm
from experiments import faithful_report as fr
from experiments import faithfulness
from locality import Partitioner, schedule
from model import GPT, GPTConfig
from prepare_data import get_encoding, token_bytes
from report.stats import bootstrap_weights, holm
from support.files import InputError, run_script
from support.settings import to_toml
from train import Config

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
        start = fm.starts_of(LOOKBACK, 0, T)
        # boundaries of the right length in the wrong places
        elsewhere = [fm.starts_of(LOOKBACK, 8 * (1 + i % 2), T) for i in range(fm.SHIFTS)]
        foreign = [torch.tensor(rng.integers(V, size=(2, e - b))) for b, e in sentences]
        before = {b: torch.tensor(rng.integers(V, size=(16, b))) for b in fm.first_tokens(start)}
        tokens = rng.integers(V, size=T + 1)
        contexts.append(fm.Context(0, tokens, sentences, [start, *elsewhere], foreign, before, {}))
    return contexts


def values_in(measured, frames, eps):
    """Every measure of one model, {name: number}."""
    values = fr.values_of([fr.summarize(measured, frames, eps)], frames, np.ones((1, len(frames))))
    return {name: x.item() for name, x in values.items()}


def outcome(model, contexts=None):
    """Every measure of a model, {name: number}; and what was measured in each context."""
    contexts = contexts or some_contexts()
    each = [fm.measure(model, context, fm.starts_of(LOOKBACK, 0, T)) for context in contexts]
    measured = {f"{name}.{c}": x for c, at in enumerate(each) for name, x in at.items()}
    return values_in(measured, fr.frames_of(contexts), 1e-3), each


def test_a_model_that_sees_only_its_block_has_no_leak_and_a_boundary_effect():
    values, each = outcome(a_model(1.0, 1.0))
    assert values["leak"] < 1e-6 and abs(values["far"]) < 1e-6
    assert values["boundary"] > 3 and values["boundary"] > values["shifted"] + 2
    block = fm.starts_of(LOOKBACK, 0, T)
    for at in each:  # no sentence before the block has any influence
        begin = np.array(some_contexts(1)[0].sentences)[:, :1]
        out = np.isfinite(at["influence"]) & (begin < block)
        assert at["influence"][out].max() == 0 and at["raw"][out].max() == 0


def test_a_model_of_uniform_attention_has_a_leak_and_no_boundary_effect():
    values, _ = outcome(fm.uniform(a_model(0.0)), contexts=some_contexts(8))
    assert abs(values["boundary"]) < 0.15 and abs(values["shifted"]) < 0.15
    assert values["leak"] > 0.01 and abs(values["uniform"]) < 1e-6
    a = next(fm.uniform(a_model(0.0)).attention_maps(torch.arange(5)[None], torch.zeros(1, 5)))
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
    start = fm.starts_of(LOOKBACK, 0, T)
    measured = fm.measure(model, context, start, again=np.stack([start] * len(context.sentences)))
    lookback = torch.tensor(np.arange(T) - start)[None]
    x = torch.tensor(context.tokens[None, :-1])

    def log_p(idx, i):
        return model(idx, lookback)[0][0, i].double().log_softmax(-1)

    with torch.no_grad():
        for s, (begin, end) in list(enumerate(context.sentences))[::4]:
            assert np.isnan(measured["influence"][s, :end]).all()
            for i in range(end, T, 13):
                bits = []
                for text in context.foreign[s]:
                    idx = x.clone()
                    idx[0, begin:end] = text
                    idx[0, 0] = x[0, 0]
                    p, q = log_p(x, i), log_p(idx, i)
                    bits.append((p.exp() * (p - q)).sum().item() / math.log(2))
                assert measured["influence"][s, i] == pytest.approx(np.mean(bits), 1e-3, 1e-5)
    assert np.nanmax(np.abs(measured["moved"])) < 1e-6  # the same blocks again
    *_, a = model.attention_maps(x, lookback)
    seen = a[0].mean(0)  # (T, T)
    for s, (begin, end) in enumerate(context.sentences):
        sums = seen[:, max(begin, 1) : end].sum(1).detach().numpy()
        np.testing.assert_allclose(measured["raw"][s], sums, atol=1e-6)


def test_a_value_that_adds_nothing_weighs_nothing():
    model, (context,) = a_model(0.0), some_contexts(1)
    attn, x = model.h[-1].attn, torch.randn(1, T, 32)
    with torch.no_grad():
        before = fm.pointers(model, x, torch.zeros(1, T), context.sentences)
        attn.c_proj.weight.mul_(2)
        after = fm.pointers(model, x, torch.zeros(1, T), context.sentences)
        torch.testing.assert_close(after[0], before[0])
        torch.testing.assert_close(after[1], 2 * before[1])
        attn.c_attn.weight[64:], attn.c_attn.bias[64:] = 0, 0
        assert fm.pointers(model, x, torch.zeros(1, T), context.sentences)[1].abs().max() == 0


def test_the_leak_of_an_output_that_names_one_of_k_texts_is_log2_k():
    (context,) = some_contexts(1)
    before = {24: torch.arange(16)[:, None].repeat(1, 24), 48: torch.zeros(16, 48, dtype=int)}
    context = context._replace(before=before)
    y = torch.zeros(T, dtype=int)

    def model(idx, lookback):  # predicts the token at place 1
        return 50.0 * torch.nn.functional.one_hot(idx[:, 1:2], V).expand(-1, idx.size(1), -1), None

    measured = fm.leak(model, torch.ones(1, T, dtype=int), torch.zeros(1, T), y, context)
    bits, nats = measured["leak"].numpy(), measured["far"].numpy()
    assert bits[24:48] == pytest.approx(4) and bits[48:72] == pytest.approx(0)
    assert nats[24:48] == pytest.approx(50 * 15 / 16) and nats[48:72] == pytest.approx(0)
    assert np.isnan(bits[:24]).all() and np.isnan(bits[72:]).all()


def test_the_blocks_of_an_unchanged_text_stay_the_same(place, monkeypatch):
    monkeypatch.chdir(place)
    config = Config(source="data/sample.txt", tokenizer="bytes", max_lookback=300)
    vocabulary, size = token_bytes(get_encoding("bytes")), 1000
    study = faithfulness.Study(contexts=3, draws=1, leak_draws=2)
    with pytest.raises(InputError, match="a larger block_size"):
        fm.contexts_of(config, study, 60, vocabulary)
    contexts, _ = fm.contexts_of(config, study, size, vocabulary)
    for name in ("semantic", "semantic:closed"):
        text, place = fm.prepare(config, partition=name), contexts[1].place
        tokens, lookback = text.split("test")
        before = Partitioner(vocabulary, name, 300, text.meta["background"])
        before.push(tokens[:place])
        ids = tokens[place : place + size].astype(np.int64)
        (again,) = fm.blocks_again(before, ids, [(40, 90)], [torch.tensor(ids[40:90][None])])
        np.testing.assert_array_equal(again, fm.starts_of(lookback, place, size))
        assert (contexts[1].again[name] != fm.starts_of(lookback, place, size)).any()


def test_where_the_true_pieces_of_a_joined_text_begin_is_known(
    tmp_path, monkeypatch, gpt2_tokenizer
):
    monkeypatch.chdir(tmp_path)
    sentence = "The cat of the house sat on a mat. "
    Path("text.txt").write_text("<|endoftext|>".join(sentence * n for n in (9, 14, 11, 8) * 16))
    text = {"source": "text.txt", "tokenizer": "gpt2:300", "joined": True}
    config, vocabulary = Config(**text, test=0.3), token_bytes(get_encoding("gpt2:300"))
    study = faithfulness.Study(contexts=2, draws=1, leak_draws=2)
    contexts, _ = fm.contexts_of(config, study, 1000, vocabulary)
    tokens, _ = fm.prepare(config).split("test")
    ends = np.flatnonzero(np.array(tokens) == vocabulary.index(b"\n")) + 1  # between pieces
    for context in contexts:
        assert len(context.blocks) == 2 + fm.SHIFTS
        known = sorted({0, *(ends - context.place)} & set(range(1000)))
        assert len(known) > 3
        assert np.unique(context.blocks[-1]).tolist() == known
        assert set(known) <= {begin for begin, _ in context.sentences}


# --------------------------------------------------------------------------------------------------
# the statistics


def made_up(contexts, effects, kind=0, seed=1):
    """Frames, and measurements in which a sentence of the block has 2 ** effect times the influence
    of others, which also depends on distance, length and the context. effects: of each context."""
    rng, frames, measured = np.random.default_rng(seed), fr.frames_of(contexts), {}
    for c, (context, frame, effect) in enumerate(zip(contexts, frames, effects)):
        begin, end = np.array(context.sentences).T[..., None]
        y = -0.7 * np.log2(1 + np.maximum(frame.distance, 0)) + 2 * np.log2(end - begin) + c
        y = np.where(frame.pair, y + effect * frame.inside[kind], np.nan)
        y = y + rng.normal(0, 0.3, y.shape)
        at = {"influence": 2**y, "moved": np.full_like(y, np.nan)}
        at |= dict.fromkeys(("raw", "weighted", "even"), np.ones_like(y))
        at |= dict.fromkeys(("nats", "leak", "far", "uniform"), np.full(T, float(c)))
        measured |= {f"{name}.{c}": x for name, x in at.items()}
    return frames, measured


def test_the_regression_finds_an_effect_that_was_put_in():
    frames, measured = made_up(some_contexts(6), [1.5] * 6)
    summaries = [fr.summarize(measured, frames, 1e-9)]
    for weights in (np.ones((1, 6)), bootstrap_weights(6)[:50]):
        values = fr.values_of(summaries, frames, weights)
        assert values["boundary"] == pytest.approx(1.5, abs=0.1)
        assert values["finer"] == pytest.approx(values["boundary"], abs=1e-3)
        assert (values["shifted"] < 0).all()  # places next to the blocks have less influence
        assert (values["pointer"] == 0).all()  # a mass that is the same everywhere tells nothing
        assert np.isnan(values["moved"]).all()
        assert values["leak"] == pytest.approx((weights @ np.arange(6.0) / 6)[None])
    hidden = values_in(measured, frames, 1e6)  # eps hides what is weaker
    assert abs(hidden["boundary"]) < 0.01 and hidden["weak"] == 1


def test_the_true_pieces_are_measured_too():
    pieces = np.repeat([0, 54], (54, 42))
    contexts = [c._replace(blocks=[*c.blocks, pieces]) for c in some_contexts(6)]
    none, strong = (
        values_in(measured, frames, 1e-9)
        for frames, measured in (made_up(contexts, [x] * 6, kind=-1) for x in (0.0, 1.5))
    )
    assert abs(none["true boundary"]) < 0.1
    assert strong["true boundary"] == pytest.approx(1.5, abs=0.1)
    assert strong["true boundary"] > strong["boundary"]
    assert abs(none["piece"] - none["by distance"]) < 0.02
    assert strong["piece"] - strong["by distance"] > 0.1


def test_a_spline_is_a_line_beyond_its_knots_and_bends_between():
    x = np.linspace(-3, 9, 241)
    columns = np.stack(fr.spline(x, [0, 1, 2, 4, 6]))
    assert len(columns) == 4
    bend = np.abs(np.diff(columns, 2)).max(0)
    assert bend[x[1:-1] < -0.1].max() < 1e-9 and bend[x[1:-1] > 6.1].max() < 1e-9
    assert np.linalg.matrix_rank(np.vstack([columns, np.ones_like(x)])) == 5


def test_partial_ranks_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 6, (9, 20)).astype(float) for _ in range(3))
    among = rng.random((9, 20)) < 0.8
    among[:, 3] = np.arange(9) < 2  # too few
    partial = fr.partial_spearman(a, b, c, among)
    assert np.isnan(partial[3])
    for i in (i for i in range(20) if i != 3):
        rank = [
            fr.ranks(x[among[:, i], i][:, None], np.ones((among[:, i].sum(), 1), bool))
            for x in (a, b, c)
        ]
        left = []
        for x in rank[:2]:  # what a line through the third leaves of each
            design = np.column_stack([np.ones(len(x)), rank[2]])
            left.append(x[:, 0] - design @ np.linalg.lstsq(design, x[:, 0], rcond=None)[0])
        assert partial[i] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)
    assert fr.ranks(np.array([[3.0], [1], [3], [2]]), np.ones((4, 1), bool)).T.tolist() == [
        [3.5, 1, 3.5, 2]
    ]


def test_what_is_pointed_at_is_compared_with_what_is_as_far_away():
    bits = np.array([[1.0, 1, 1], [2, 8, 2]])
    mass = np.array([[0.9, 0.1, 0.9], [0.1, 0.9, 0.1]])
    block, bins = np.ones((2, 3), bool), np.array([[5, 5, 5], [3, 3, 3]])
    assert fr.pointed_at(bits, mass, block, bins).tolist() == [0, 0, 6]
    block[0] = False  # nothing to choose from
    assert fr.pointed_at(bits, mass, block, bins).tolist() == []


def test_a_comparison_is_paired_and_has_a_verdict():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 1.1, 2.1, 3.1, 4.1, 5.1, 6.1, 7.1, 8.1])
    values[8:] += np.linspace(-0.01, 0.01, 8)
    places = {"a": dict(zip(range(8), range(8))), "b": dict(zip(range(8), range(8, 16)))}
    row = fr.compare(values, np.repeat(values[:, None], 9, 1), places, "b", "a")
    assert row["seeds"] == 8 and row["p"] == row["least_p"] == 2 / 256
    assert row["low"] < row["difference"] < row["high"]
    assert row["difference"] == pytest.approx(0.1)
    row["holm"] = holm([row["p"], 0.5, 0.5])[0]
    assert fr.verdict(row, 0.01) == "higher"
    assert fr.verdict(row, 0.2) == "higher, by less than the bound"
    assert fr.verdict({**row, "low": 0.01}, 0.02) == "higher, possibly by less than the bound"
    assert fr.verdict({**row, "text": [-0.3, 0.5]}, 0.01) == "higher; may differ in another text"
    row |= {"holm": 0.4, "low": -0.01, "high": 0.02, "text": [-0.02, 0.04]}
    assert fr.verdict(row, 0.05) == "no difference above the bound"
    assert (
        fr.verdict(row, 0.001) == fr.verdict({**row, "text": [-0.1, 0.1]}, 0.05) == "not resolved"
    )
    assert fr.verdict({**row, "holm": None}, 0.001) == "not resolved"
    assert fr.verdict({**row, "seeds": 1}, 1) == "not tested: a single seed"


def test_a_difference_that_contexts_do_not_agree_on_is_not_one_of_the_text():
    contexts, summaries = some_contexts(6), []
    for seed in (1, 2, 3):
        for effects in ((0.0,) * 6, (2.0, -2.0) * 3, (1.0,) * 6):
            frames, measured = made_up(contexts, effects, seed=seed)
            summaries.append(fr.summarize(measured, frames, 1e-9))
    values, drawn = (
        fr.values_of(summaries, frames, w)["boundary"]
        for w in (np.ones((1, 6)), bootstrap_weights(6))
    )
    places = {name: {s: 3 * s + i for s in range(3)} for i, name in enumerate("abc")}
    mixed, same = (fr.compare(values[:, 0], drawn, places, name, "a") for name in "bc")
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
            run_script(faithfulness.main)
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
            tokens, lookback = fm.prepare(
                Config(**{key: config[key] for key in Config.__dataclass_fields__})
            ).split("test")
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
    # what is measured is not measured again, except if its file is deleted
    paths = sorted(folder.glob("*/*.npz"))
    assert len(paths) == 6
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    status, _, errors = study("study.toml", "--out", "runs/study")
    assert status == 2 and "is damaged" in errors and errors.count("\n") == 1
    paths[0].unlink()
    assert study("study.toml", "--out", "runs/study", "--report")[0] == 2
    assert study("study.toml", "--out", "runs/study")[0] == 0
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:]
    (folder / "faithfulness.json").unlink()
    assert study("study.toml", "--out", "runs/study", "--report")[0] == 0
    assert json.loads((folder / "faithfulness.json").read_text())["models"] == results["models"]


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("draws = 1", "draw = 1", "unknown key draw; the nearest is draws"),
        ("contexts = 2", "contexts = 900", "holds"),
        ("contexts = 2", "contexts = 1", "contexts must be at least 2"),
        ("[faithful]", '[faithful]\nfirst = "cubic semantic"', "no model is 'cubic semantic'"),
        ("[faithful]", "[faithfull]", "unknown key faithfull"),
        ("seed = [1, 2]\n[f", "seed = [1]\nfloor = [0.5, 1.0]\n[f", "two models have the same"),
        ("seed = [1, 2]\n[f", "seed = [3]\n[f", "share no seed"),
        ("seed = [1, 2]\n[f", "seed = [1]\nmax_steps = [2, 3]\n[f", "must not differ in max_steps"),
    ],
)
def test_bad_studies_are_one_line(study, old, new, words):
    Path("bad.toml").write_text(TINY.replace(old, new))
    status, _, errors = study("bad.toml", "--out", "runs/study")
    assert status == 2 and words in errors and errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_all_studies_test_the_same_models_with_the_same_bounds():
    studies = {}
    for path in sorted((ROOT / "configs").glob("faithful_*.toml")):
        values = faithfulness.read_values([str(path)], ("sweep", "faithful"))
        assert values["sweep"]
        studies[path.stem] = faithfulness.read_study(values)
    assert studies["faithful_smoke"] == faithfulness.Study(contexts=8, draws=1, leak_draws=4)
    for study in studies.values():
        sizes = {"contexts": 8, "draws": 1, "leak_draws": 4}
        assert replace(study, **sizes) == studies["faithful_smoke"]
