"""The faithfulness study measures what it says: it is run on models whose answer is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import view
from conftest import ROOT, script_here
from eval import attention_maps, load
from experiments import faithful_measure as fm
from experiments import faithful_report as fr
from experiments import faithfulness
from locality import Partitioner, schedule
from model import GPT, GPTConfig, attention_weights
from report.stats import bootstrap_weights, holm, paired
from support.files import InputError, run_script
from support.settings import to_toml
from support.tokenizers import get_encoding, token_bytes
from sweep import prepare_cell, read_sweep
from train import Config

T, V = 96, 64
LENGTHS = (3, 3, 4, 6, 8)  # of the sentences of a block, in tokens
LOOKBACK = np.arange(10 * T) % 24
START = fm.starts_of(LOOKBACK, 0, T)
BACK = torch.tensor(np.arange(T) - START)[None]


def a_model(*locality, seed=0):
    """A model of random weights, large enough that what it reads matters."""
    torch.manual_seed(seed)
    sizes = {"n_layer": len(locality), "n_head": 2, "n_embd": 32, "block_size": T}
    model = GPT(GPTConfig(vocab_size=V, max_lookback=T, **sizes)).eval().requires_grad_(False)
    model.wpe.weight.zero_()
    for name, p in model.named_parameters():
        if "c_proj" in name or "c_attn" in name:
            p.mul_(3)
    model.set_locality(list(locality))
    return model


def some_contexts(n=4, seed=0):
    """Contexts of random tokens, in blocks of 24, each of five sentences."""
    rng, contexts = np.random.default_rng(seed), []
    edges = np.cumsum([0, *LENGTHS * (T // 24)]).tolist()
    sentences = list(zip(edges, edges[1:]))
    # boundaries of the right length in the wrong places
    elsewhere = [fm.starts_of(LOOKBACK, 8 * (1 + i % 2), T) for i in range(fm.SHIFTS)]
    for _ in range(n):
        foreign = [torch.tensor(rng.integers(V, size=(2, e - b))) for b, e in sentences]
        before = {b: torch.tensor(rng.integers(V, size=(16, b))) for b in fm.first_tokens(START)}
        tokens = rng.integers(V, size=T + 1)
        contexts.append(fm.Context(0, tokens, sentences, [START, *elsewhere], foreign, before, {}))
    return contexts


def values_in(measured, frames, eps):
    """Every measure of one model, {name: number}."""
    values = fr.values_of([fr.summarize(measured, frames, eps)], frames, np.ones((1, len(frames))))
    return {name: x.item() for name, x in values.items()}


def outcome(model, n=4):
    """Every measure of a model, {name: number}; and what was measured in each context."""
    contexts = some_contexts(n)
    each = [fm.measure(model, context, START) for context in contexts]
    measured = {f"{name}.{c}": x for c, at in enumerate(each) for name, x in at.items()}
    return values_in(measured, fr.frames_of(contexts), 1e-3), each


def test_a_model_that_sees_only_its_block_has_no_leak_and_a_boundary_effect():
    values, each = outcome(a_model(1.0, 1.0))
    assert values["leak"] < 1e-6 and abs(values["far"]) < 1e-6
    assert values["boundary"] > 3 and values["boundary"] > values["shifted"] + 2
    begin = np.array(some_contexts(1)[0].sentences)[:, :1]
    for at in each:  # no sentence before the block has any influence
        out = np.isfinite(at["influence"]) & (begin < START)
        assert at["influence"][out].max() == 0 and at["raw"][out].max() == 0


def test_a_model_of_uniform_attention_has_a_leak_and_no_boundary_effect():
    uniform = fm.uniform(a_model(0.0))
    values, _ = outcome(uniform, 8)
    assert abs(values["boundary"]) < 0.15 and abs(values["shifted"]) < 0.15
    assert values["leak"] > 0.01 and abs(values["uniform"]) < 1e-6
    a = next(attention_maps(uniform, torch.arange(5)[None], torch.zeros(1, 5)))
    even = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(a, even.expand_as(a))


def test_a_pointer_is_true_where_all_influence_passes_through_it_and_not_where_none_does():
    for locality in (0.0, 1.0):
        values, _ = outcome(a_model(locality))
        assert values["pointer"] > 0.25 and values["sinkless"] > 0.25 and values["pointed"] > 0
        assert locality or values["everywhere"] > 0.25  # zeros outside the block count as pointing
    decoration = a_model(0.0, 0.0)  # the last layer attends, but contributes nothing
    decoration.h[-1].attn.c_proj.weight.zero_()
    values, _ = outcome(decoration)
    assert values["uniform"] == 0 and abs(values["everywhere"]) < 0.2
    assert abs(values["pointer"]) < 0.2 and abs(values["sinkless"]) < 0.2


def test_the_influence_that_is_kept_is_the_definition():
    model, (context,) = a_model(0.2, 1.0), some_contexts(1)
    measured = fm.measure(model, context, START, again=np.stack([START] * len(context.sentences)))
    x = torch.tensor(context.tokens[None, :-1])
    p = model(x, BACK)[0][0].double().log_softmax(-1)  # (T, V)
    seen = list(attention_maps(model, x, BACK))[-1][0].mean(0)  # (T, T)
    for s, (begin, end) in enumerate(context.sentences):
        sums = seen[:, max(begin, 1) : end].sum(1).numpy()
        np.testing.assert_allclose(measured["raw"][s], sums, atol=1e-6)
        bits = []
        for text in context.foreign[s]:
            idx = x.clone()
            idx[0, begin:end] = text
            idx[0, 0] = x[0, 0]
            q = model(idx, BACK)[0][0].double().log_softmax(-1)
            bits.append((p.exp() * (p - q)).sum(-1) / math.log(2))  # (T,)
        assert np.isnan(measured["influence"][s, :end]).all()
        expected = torch.stack(bits).mean(0)[end:].numpy()
        assert measured["influence"][s, end:] == pytest.approx(expected, 1e-3, 1e-5)
    assert np.nanmax(np.abs(measured["moved"])) < 1e-6  # the same blocks again


def test_without_token_0_every_head_attends_to_the_rest_only():
    model, (context,) = a_model(0.5), some_contexts(1)
    q, k = torch.randn(2, 1, 2, T, 16)
    k[0, 0, 0] = 20 * q[0, 0].mean(0)  # a sink, for the first head
    raw, sinkless = fm.pointers(model, q, k, BACK, context.sentences)
    a = attention_weights(q, k, model.in_block(BACK), 0.5)[0]  # (H, T, T)
    rest = a[:, 1:, 1:] / a[:, 1:, 1:].sum(-1, keepdim=True)
    for s, (begin, end) in enumerate(context.sentences):
        first = max(begin, 1)
        torch.testing.assert_close(raw[s], a[:, :, first:end].sum(-1).mean(0))
        expected = rest[:, :, first - 1 : end - 1].sum(-1).mean(0)
        torch.testing.assert_close(sinkless[s, 1:], expected)
    assert sinkless.sum(0)[1:].allclose(torch.ones(T - 1)) and (raw.sum(0)[1:] < 1).all()
    assert (sinkless[:, 0] == 0).all()


def test_the_leak_of_an_output_that_names_one_of_k_texts_is_log2_k():
    before = {24: torch.arange(16)[:, None].repeat(1, 24), 48: torch.zeros(16, 48, dtype=int)}
    context, y = some_contexts(1)[0]._replace(before=before), torch.zeros(T, dtype=int)

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
    context = fm.contexts_of(config, study, size, vocabulary)[0][1]
    for name in ("semantic", "semantic:closed"):
        text = prepare_cell(config, partition=name)
        tokens, lookback = text.split("test")
        before = Partitioner(vocabulary, name, 300, text.meta["background"])
        before.push(tokens[: context.place])
        ids, start = context.tokens[:-1], fm.starts_of(lookback, context.place, size)
        (again,) = fm.blocks_again(before, ids, [(40, 90)], [torch.tensor(ids[40:90][None])])
        np.testing.assert_array_equal(again, start)
        assert (context.again[name] != start).any()


def test_where_the_true_pieces_of_a_joined_text_begin_is_known(
    tmp_path, monkeypatch, gpt2_tokenizer
):
    monkeypatch.chdir(tmp_path)
    sentence = "The cat of the house sat on a mat. "
    Path("text.txt").write_text("<|endoftext|>".join(sentence * n for n in (9, 14, 11, 8) * 16))
    config = Config(source="text.txt", tokenizer="gpt2:300", joined=True, test=0.3)
    vocabulary = token_bytes(get_encoding("gpt2:300"))
    study = faithfulness.Study(contexts=2, draws=1, leak_draws=2)
    tokens, _ = prepare_cell(config).split("test")
    ends = np.flatnonzero(np.array(tokens) == vocabulary.index(b"\n")) + 1  # between pieces
    for context in fm.contexts_of(config, study, 1000, vocabulary)[0]:
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
        at |= dict.fromkeys(("raw", "sinkless", "even"), np.ones_like(y))
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
        for name in ("everywhere", "pointer", "sinkless", "even"):
            assert (values[name] == 0).all()  # a mass that is the same everywhere says nothing
        assert np.isnan(values["moved"]).all()
        assert values["leak"] == pytest.approx((weights @ np.arange(6.0) / 6)[None])
    hidden = values_in(measured, frames, 1e6)  # eps hides what is weaker
    assert abs(hidden["boundary"]) < 0.01 and hidden["weak"] == 1


def test_the_true_pieces_are_measured_too():
    pieces = np.repeat([0, 54], (54, 42))
    contexts = [c._replace(blocks=[*c.blocks, pieces]) for c in some_contexts(6)]
    none, strong = (
        values_in(measured, frames, 1e-9)
        for frames, measured in (made_up(contexts, [x] * 6, kind=-1) for x in (0.0, 2.0))
    )
    assert abs(none["true boundary"]) < 0.1
    assert strong["true boundary"] == pytest.approx(2, abs=0.1)
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
    ranks = fr.ranks(np.array([[3.0], [1], [3], [2]]), np.ones((4, 1), bool))
    assert ranks.T.tolist() == [[3.5, 1, 3.5, 2]]
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 6, (3, 9, 20)).astype(float)
    among = rng.random((9, 20)) < 0.8
    among[:, 3] = np.arange(9) < 2  # too few
    partial = fr.partial_spearman(a, b, c, among)
    assert np.isnan(partial[3])
    for i in {*range(20)} - {3}:
        columns = [x[among[:, i], i][:, None] for x in (a, b, c)]
        *rank, third = (fr.ranks(x, np.ones(x.shape, bool))[:, 0] for x in columns)
        # what a line through the third leaves of each
        design = np.column_stack([np.ones(len(third)), third])
        left = [x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in rank]
        assert partial[i] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)


def test_what_is_pointed_at_is_compared_with_what_is_as_far_away():
    bits = np.array([[1.0, 1, 1], [2, 8, 2]])
    mass = np.array([[0.9, 0.1, 0.9], [0.1, 0.9, 0.1]])
    block, bins = np.ones((2, 3), bool), np.array([[5, 5, 5], [3, 3, 3]])
    assert fr.pointed_at(bits, mass, block, bins).tolist() == [0, 0, 6]
    block[0] = False  # nothing to choose from
    assert fr.pointed_at(bits, mass, block, bins).tolist() == []


@pytest.mark.parametrize(
    "changes, bound, words",
    [
        ({}, 0.01, "higher"),
        ({"low": -0.3, "high": -0.2}, 0.01, "lower"),
        ({}, 0.2, "higher, by less than the bound"),
        ({"low": 0.01}, 0.02, "higher, possibly by less than the bound"),
        ({"text": [-0.3, 0.5]}, 0.01, "higher; may differ in another text"),
        ({"holm": 0.4}, 0.15, "no difference above the bound"),
        ({"low": -0.01}, 0.15, "no difference above the bound"),
        ({"holm": 0.4}, 0.001, "not resolved"),
        ({"holm": 0.4, "text": [-0.1, 0.2]}, 0.15, "not resolved"),
        ({"holm": None}, 0.001, "not resolved"),
        ({"seeds": 1}, 1, "not tested: a single seed"),
    ],
)
def test_a_comparison_has_a_verdict(changes, bound, words):
    row = {"seeds": 8, "low": 0.09, "high": 0.11, "text": [0.08, 0.12], "holm": 0.02}
    assert fr.verdict({**row, **changes}, bound) == words


def test_a_difference_that_contexts_do_not_agree_on_is_not_one_of_the_text():
    contexts, summaries = some_contexts(6), []
    for effects in ((0.0,) * 6, (2.0, -2.0) * 3, (1.0,) * 6):
        for seed in (1, 2, 3):
            frames, measured = made_up(contexts, effects, seed=seed)
            summaries.append(fr.summarize(measured, frames, 1e-9))
    none, mixed, same = (
        [
            dict(enumerate(fr.values_of(summaries[i : i + 3], frames, weights)["boundary"]))
            for weights in (np.ones((1, 6)), bootstrap_weights(6))
        ]
        for i in (0, 3, 6)
    )
    low, high = paired(mixed[0], none[0], (mixed[1], none[1]))["text"]
    assert low < -0.3 and high > 0.3
    row = paired(same[0], none[0], (same[1], none[1]))
    assert row["text"] == pytest.approx([1, 1], abs=0.15)
    assert row["difference"] == pytest.approx(1, abs=0.1)


# --------------------------------------------------------------------------------------------------
# the whole

KEYS = {"source": "data/sample.txt", "tokenizer": "bytes", "max_lookback": 1000, "block_size": 1200}
KEYS |= {"n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 1, "max_steps": 2}
KEYS |= {"eval_interval": 2, "eval_contexts": 1, "compile": False}
TINY = "".join(f"{key} = {json.dumps(value)}\n" for key, value in KEYS.items())
TINY += """
faithful = {contexts = 2, draws = 1, leak_draws = 2, second = ["distributed", "localist window:9"]}
sweep = [
  {schedule = ["distributed"], seed = [1, 2]},
  {schedule = ["quintic"], partition = ["semantic"], seed = [1, 2]},
  {schedule = ["localist"], partition = ["window:9"], seed = [1, 2]},
]
"""
SECOND = "distributed", "localist window:9"


def train_here(cells, jobs, held):
    for cell in cells.values():
        if not Path(cell.out, "results.json").exists():
            Path("cell.toml").write_text(to_toml(cell))
            assert script_here("train.py", "cell.toml") == 0
    return {}


@pytest.fixture
def study(place, monkeypatch, capsys):
    """study(text, *options) -> (status, stdout, stderr), in `place`, and in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(faithfulness, "run", train_here)

    def start(text, *options):
        Path("study.toml").write_text(text)
        argv = ["faithfulness", "study.toml", "--out", "runs/study", *options]
        monkeypatch.setattr("sys.argv", argv)
        try:
            run_script(faithfulness.main)
        except SystemExit as e:
            return e.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return start


def test_the_study_from_end_to_end(study, tmp_path, monkeypatch):
    status, printed, errors = study(TINY)
    assert status == 0, errors
    folder = Path("runs/study")
    results = json.loads((folder / "faithfulness.json").read_text())
    outcomes = [(row["second"], row["outcome"]) for row in results["tests"]]
    assert outcomes == [(x, o) for x in SECOND for o in ("boundary", "pointer", "leak")]
    names = [model["name"] for model in results["models"]]
    turned = "distributed, turned to quintic semantic"
    assert names == ["distributed", "quintic semantic", "localist window:9", turned]
    assert {"command", "commit", "device", "date", "seeds"} <= results["about"].keys()
    assert [row["holm"] for row in results["tests"]] == holm([row["p"] for row in results["tests"]])
    # the loss of each model is that of its own weights, at its own dial and blocks
    cells = "distributed", "quintic.semantic", "localist.window9", "distributed"
    for model, name in zip(results["models"], cells):
        for seed, nats in zip((1, 2), model["nats"]["by_seed"]):
            net, config, _ = load(folder / f"{name}.seed{seed}")
            if model["name"] == turned:
                net.set_locality(schedule("quintic", 2))
            split, losses = prepare_cell(Config(**config)).split("test"), []
            for at in (0, len(split[0]) - 1201):
                x, back = (torch.tensor(a[at : at + 1201].astype(int))[None] for a in split)
                losses.append(net(x[:, :-1], back[:, :-1], x[:, 1:])[1].item())
            assert nats == pytest.approx(np.mean(losses), rel=1e-5)
    for model in results["models"]:
        assert math.isfinite(model["pointer"]["mean"]) and math.isfinite(model["sinkless"]["mean"])
    means = [model["nats"]["by_seed"] for model in results["models"]]
    assert means[0] != means[1] != means[3] != means[0]
    assert (folder / "faithfulness.md").read_text().strip() in printed
    for name in ("distance", "pointers"):
        assert (folder / f"faithfulness_{name}.png").stat().st_size > 10_000
    # what is measured is not measured again, except if its file is deleted
    paths = sorted(folder.glob("*/*.npz"))
    assert len(paths) == 8
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    status, _, errors = study(TINY)
    assert status == 2 and "is damaged" in errors and errors.count("\n") == 1
    paths[0].unlink()
    assert study(TINY, "--report")[0] == 2
    assert study(TINY)[0] == 0
    with monkeypatch.context() as patch:  # in nats instead of bits, the measurements would be stale
        code = (ROOT / "view.py").read_text(encoding="utf-8")
        (tmp_path / "view.py").write_text(code.replace("/ math.log(2)", ""), encoding="utf-8")
        assert (tmp_path / "view.py").read_text(encoding="utf-8") != code
        patch.setattr(view, "__file__", str(tmp_path / "view.py"))
        assert study(TINY, "--report")[0] == 2
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:]
    (folder / "faithfulness.json").unlink()
    assert study(TINY, "--report")[0] == 0
    assert json.loads((folder / "faithfulness.json").read_text())["models"] == results["models"]


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("max_lookback = 1000", "max_lookback = 200", "no token with 4 earlier sentences"),
        ('["distributed", "localist', '["distributed", "distributed", "localist', "none twice"),
        ('["distributed", "localist', '[["distributed"], "localist', 'no model is "['),
        (", draws = 1", ", draw = 1", "unknown key draw; the nearest is draws"),
        ("contexts = 2", "contexts = 900", "holds"),
        ("contexts = 2", "contexts = 1", "contexts must be at least 2"),
        ("{contexts", '{first = "cubic semantic", contexts', "no model is 'cubic semantic'"),
        ("faithful", "faithfull", "unknown key faithfull"),
        ('"], seed = [1, 2]},\n]', '"], floor = [0.5, 1.0]},\n]', "two models have the same"),
        ('"], seed = [1, 2]},\n]', '"], seed = [3]},\n]', "share no seed"),
        ('"], seed = [1, 2]},\n]', '"], max_steps = [2, 3]},\n]', "must not differ in max_steps"),
    ],
)
def test_bad_studies_are_one_line(study, old, new, words):
    status, _, errors = study(TINY.replace(old, new))
    assert status == 2 and words in errors and errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_a_flag_chooses_among_the_cells_of_the_sweep(study):
    status, _, errors = study(TINY, "--partition", "window:9")
    assert status == 2 and "no model is 'quintic semantic'" in errors
    assert errors.endswith("there are distributed, localist window:9\n")


def test_all_studies_have_the_same_bounds():
    sizes, smoke = {"contexts": 8, "draws": 1, "leak_draws": 4}, []
    for path in sorted((ROOT / "configs").glob("faithful_*.toml")):
        values = read_sweep([str(path)], ("sweep", "faithful"))
        assert values["sweep"]
        study = faithfulness.read_study(values)
        assert replace(study, **sizes, second="distributed") == faithfulness.Study(**sizes)
        smoke += [study] * (path.stem == "faithful_smoke")
    assert smoke == [faithfulness.Study(**sizes)]
