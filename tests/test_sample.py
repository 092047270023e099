"""Generation: the key-value cache changes nothing, and tokens are drawn correctly. sample.py."""

import io
import math
import random

import pytest
import tiktoken
import torch

import sample
from conftest import ROOT, prepared_folder
from forks import started
from locality import Partitioner, partition_text, schedule
from model import GPT, GPTConfig
from sample import KVCache, generate, sample_token, write
from support.files import InputError
from support.prepared import Prepared
from support.tokenizers import get_encoding, token_bytes

VOCABULARY = [b"ab. "[i % 4 : i % 4 + 1] for i in range(101)]


def tiny(**shape):
    torch.manual_seed(0)
    defaults = {"vocab_size": 101, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT(GPTConfig(**{**defaults, "max_lookback": 8, **shape})).eval()


def lively(model):
    """The model with larger matrices, so that it does not repeat the last token forever and its
    tokens are not all equally likely."""
    with torch.no_grad():
        model.ln_f.weight.mul_(4)
        for p in model.h.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


def uncached_logits(model, tokens, prompt, partition):
    """The logits that each token after the prompt is drawn from, (n, V).

    The whole context is read again for each. A full context is replaced by its last half.
    """
    size, start, logits = model.config.block_size, max(prompt - model.config.block_size, 0), []
    lookback = partition_text(tokens, VOCABULARY, partition, model.config.max_lookback)
    lookback = torch.from_numpy(lookback.astype(int))
    for end in range(prompt, len(tokens)):
        if end - start > size:
            start = end - (size + 1) // 2
        with torch.no_grad():
            context = torch.tensor([tokens[start:end]])
            logits.append(model(context, lookback[None, start:end])[0][0, -1])
    return torch.stack(logits)


def record_logits(model):
    """A list that fills with the logits, (B, V), that `generate` draws from."""
    seen, head = [], model.head
    model.head = lambda x: seen.append(head(x)) or seen[-1]
    return seen


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("name", ["distributed", "quintic", "localist"])
@pytest.mark.parametrize("block_size", [64, 16, 5, 1])
def test_the_cache_changes_nothing(plain, anchor, name, block_size):
    model = lively(tiny(block_size=block_size, anchor=anchor, plain=plain))
    model.set_locality(schedule(name, 3))
    prompts = [[3, 1, 4, 1, 5], [9], list(range(2, 32))]  # the last fits only a block_size of 64
    seen = record_logits(model)
    for temperature in (0, 9):  # greedy; and hot enough that no two tokens of a text are alike
        seen.clear()
        partitioners = [Partitioner(VOCABULARY, "sentence", 8) for _ in prompts]
        generator = torch.Generator().manual_seed(0)
        steps = generate(model, prompts, 40, partitioners, temperature, generator=generator)
        for prompt, tokens, logits in zip(prompts, zip(*steps), torch.stack(seen[:40], 1)):
            text = prompt + list(tokens)
            expected = uncached_logits(model, text, len(prompt), "sentence")  # (40, V)
            assert (logits - expected).abs().max() < 1e-3
            if temperature == 0:  # the same tokens, unless two are equally likely within rounding
                chosen = expected.take_along_dim(torch.tensor(tokens)[:, None], 1)[:, 0]
                assert (chosen > expected.amax(-1) - 2e-3).all()
            else:
                assert len(set(tokens)) > 20


def test_the_cache_of_a_local_layer_does_not_grow(monkeypatch):
    model, sizes = tiny(anchor=True), []
    model.set_locality([0, 0.9, 1])
    decode = sample.decode

    def record(model, token, lookback, at, caches):
        sizes.append([cache.k.size(2) for cache in caches])
        return decode(model, token, lookback, at, caches)

    monkeypatch.setattr("sample.decode", record)
    list(generate(model, [[1, 2, 3]], 60, [Partitioner(VOCABULARY, "window:9", 8)]))
    # the block consists of the token, the 8 before it, and token 0
    assert sizes == [[63, 63, 8 + 1 + 1]] * 59


def test_slots_are_overwritten_from_the_oldest_on():
    config = GPTConfig(101, 64, 1, 1, 16, max_lookback=4)
    at = torch.tensor([6, 2])
    cache = KVCache(config, 1.0, 64, at)
    assert cache.positions(at).tolist() == [[5, 6, 2, 3, 4], [0, 1, 2, -2, -1]]
    keys = torch.arange(7.0).view(1, 1, 7, 1).expand(2, 1, 7, 1)
    cache.fill(keys, keys)
    new = torch.tensor([7.0, 3.0]).view(2, 1, 1, 1)
    k = cache.update(new, new, at + 1, 5)[0].flatten(1).tolist()
    assert k[0] == [5, 6, 7, 3, 4] and k[1][:4] == [0, 1, 2, 3]


def test_generation_needs_the_blocks_if_a_layer_is_local():
    model = tiny()
    assert len(list(generate(model, [[1, 2]], 3))) == 3
    model.set_locality([0, 0, 1])
    with pytest.raises(InputError, match="lookback"):
        list(generate(model, [[1, 2]], 3))


def test_temperature_and_top_k_and_top_p_shape_the_draw():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 101, generator=generator)
    order = logits[0].argsort(descending=True)
    p = logits[0].softmax(-1)[order]

    def ranks(**options):  # how many tokens were more likely than the one that was drawn
        tokens = sample_token(logits.expand(3000, -1), generator=generator, **options)
        return torch.bincount((logits[0] > logits[0][tokens, None]).sum(-1), minlength=101) / 3000

    assert (ranks() - p).abs().max() < 0.04
    for options in ({"temperature": 0}, {"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert ranks(**options)[0] == 1
    hot = ranks(temperature=50, top_k=3)
    assert hot[3:].sum() == 0 and hot[:3].min() > 0.25  # any of three, about equally often
    assert ranks(temperature=50)[60:].sum() > 0.3
    for k in (1, 2, 5, 20):  # exactly this many are needed
        kept = ranks(top_p=float(p[:k].sum() - p[k - 1] / 2))
        assert kept[k:].sum() == 0 and (kept[:k] - p[:k] / p[:k].sum()).abs().max() < 0.04
    both = sample_token(torch.stack((logits[0], -logits[0])), temperature=0)  # row by row
    assert both.tolist() == [order[0], order[-1]]


def test_the_most_likely_token_is_kept_however_small_top_p_is():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    logits[0] = 0  # all equally likely
    tokens = sample_token(logits, top_p=1e-50)
    assert (logits.take_along_dim(tokens[:, None], 1) == logits.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_are_refused(value, temperature):
    logits = torch.zeros(2, 5)
    logits[1] = value
    with pytest.raises(InputError, match="the predictions of this model are not finite numbers"):
        sample_token(logits, temperature)


# --------------------------------------------------------------------------------------------------
# what is written

BYTES = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
STOPS = ["aab", "a", "aa", "ab", "b", "é", "\n", "<|endoftext|>", "abaabab", "\ufffd", None]


class Console(io.StringIO):
    """What is printed, and all that was printed at each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


@pytest.mark.parametrize("stop", STOPS)
def test_a_text_ends_before_the_first_place_where_stop_would_be_written(stop, monkeypatch):
    rng = random.Random(0)
    for _ in range(100):
        pieces = [*"aaabb<", "é", "\n", "<|endoftext|>"]
        rows = [[], []]
        for row in rows:
            for piece in rng.choices(pieces, k=rng.randrange(30)):
                row += [256] if len(piece) > 9 else piece.encode()
        n = max(map(len, rows))
        rows = [row + [97] * (n - len(row)) for row in rows]
        steps, console = iter(list(zip(*rows))), Console()
        monkeypatch.setattr("sys.stdout", console)
        write(["P", "Q"], steps, BYTES, stop)
        texts = [b"".join(BYTES[t] for t in row).decode(errors="replace") for row in rows]
        first, second = (t.partition(stop)[0] if stop else t for t in texts)
        assert console.getvalue() == f"P{first}\n\n---\nQ{second}\n"
        for before, after in zip(console.seen, console.seen[1:]):
            assert after.startswith(before) and console.getvalue().startswith(after)
        if stop and all(stop in text for text in texts):  # no more is generated than needed
            ends = [
                len((t.partition(stop)[0] + stop).replace("<|endoftext|>", "x").encode())
                for t in texts
            ]
            assert len(list(steps)) == n - max(ends)
        if stop is None:  # nothing waits, except for the rest of a character
            assert len(console.seen[-1]) >= len(f"P{first}") - 1


# --------------------------------------------------------------------------------------------------
# the command line


def test_sample_writes_the_same_text_for_the_same_seed(run):
    mind = "sample.py", "runs/tiny", "--prompt", "The mind "
    first, second = (run(*mind, "--tokens", 60, "--top-k", 20) for _ in range(2))
    assert first == second and first[0] == 0
    assert first[1].startswith("The mind ") and len(first[1]) > 30
    short = "sample.py", "runs/tiny", "--tokens", 20
    greedy, cold = (run(*short, "--temperature", t) for t in (0, 1e-46))
    assert greedy == cold and greedy[0] == 0
    # two texts for each of two prompts: with only one likely token each, they are the same as if
    # each prompt had its own call
    likely = "--tokens", 40, "--top-p", 1e-6
    _, a, _ = run(*mind, *likely)
    _, b, _ = run("sample.py", "runs/tiny", "--prompt", "I", *likely)
    _, printed, _ = run(*mind, "--prompt", "I", "--samples", 2, *likely)
    assert printed == "\n---\n".join((a, a, b, b))


def test_a_text_can_end_at_a_word(run):
    words = "sample.py", "runs/tiny", "--prompt", "The mind ", "--tokens", 60, "--temperature", 0
    status, text, _ = run(*words)
    written = text.removeprefix("The mind ")
    stop = written[9:12]
    assert run(*words, "--stop", stop)[:2] == (0, f"The mind {written.partition(stop)[0]}\n")


def test_weights_that_predict_no_numbers_are_refused_by_sampling(
    exported, run, tmp_path, gpt2_tokenizer
):
    model = GPT.from_pretrained(exported)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e30)
    model.save_pretrained(tmp_path / "w")
    for temperature in (0, 1):
        status, _, error = run("sample.py", tmp_path / "w", "--temperature", temperature)
        assert status == 2 and error.count("\n") == 1
        assert "the predictions of this model are not finite numbers" in error


ABSURD = ["--samples 0", f"--samples {10**19}", "--temperature nan", "--temperature inf"]
ABSURD += ["--top-p nan", "--top-p 0", "--top-k -1", "--tokens -1", "--stop=", "--prompt="]


@pytest.mark.parametrize("words", ABSURD)
def test_absurd_arguments_are_refused_in_one_line(run, words):
    status, printed, error = run("sample.py", "runs/tiny", *words.split())
    assert (status, printed) == (2, "") and error.count("\n") == 1
    assert words.partition("=")[0].split()[0] in error


def test_a_prompt_may_contain_any_character(place):
    words = "runs/tiny", "--prompt", "caf\udce9 \ud83e \x1b", "--tokens", 3
    with started(ROOT / "sample.py", *words, cwd=place, output="sampled.txt") as process:
        process.join(60)
    assert process.exitcode == 0
    assert (place / "sampled.txt").read_text().startswith("caf? ? \\x1b")


@pytest.fixture
def sampled(place, monkeypatch):
    """sampled(word, …) runs sample.py and returns the (model, ids of the prompts) that it gives to
    `generate`."""
    monkeypatch.chdir(place)
    calls = []

    def record(model, prompts, *args):
        calls.append((model, prompts))
        return generate(model, prompts, *args)

    def start(*words):
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
        sample.main()
        return calls.pop()

    monkeypatch.setattr(sample, "generate", record)
    return start


def test_sample_uses_the_dial_and_the_blocks_of_the_run(place, sampled, monkeypatch):
    partitioners = []

    def record(*args):
        partitioners.append(args)
        return Partitioner(*args)

    monkeypatch.setattr(sample, "Partitioner", record)
    for words, locality in (
        ([], [0, 1]),
        (["--schedule", "localist"], [1, 1]),
        (["--floor", 0.5], [0, 0.5]),
    ):
        model, _ = sampled("runs/tiny", *words, "--tokens", 2)
        assert model.locality == locality
    vocabulary = token_bytes(get_encoding("bytes"))
    background = Prepared(prepared_folder(place)).meta["background"]
    assert background and partitioners == [(vocabulary, "semantic", 1000, background, False)] * 3


def test_a_prompt_may_contain_the_end_of_a_text(sampled, monkeypatch):
    ranks, special = {bytes([i]): i for i in range(255)}, {"<|endoftext|>": 255}
    encoding = tiktoken.Encoding(
        "bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(sample, "get_encoding", lambda name: encoding)
    _, prompts = sampled("runs/tiny", "--prompt", "a<|endoftext|>b", "--tokens", 1)
    assert prompts == [[97, 255, 98]]


def test_exported_weights_are_sampled_at_dial_0_or_another(
    sampled, exported, gpt2_tokenizer, capsys
):
    prompt = gpt2_tokenizer.encode_ordinary("The mind is")
    words = exported, "--prompt", "The mind is", "--tokens", 5, "--temperature", 0
    for options, locality in (([], [0]), (["--schedule", "quintic"], [1])):
        model, _ = sampled(*words, *options)
        assert model.locality == locality
        model = GPT.from_pretrained(exported)
        model.set_locality(locality)
        blocks = Partitioner(token_bytes(gpt2_tokenizer), "semantic", 512)
        ids = [token for (token,) in generate(model, [prompt], 5, [blocks], 0)]
        assert capsys.readouterr().out == gpt2_tokenizer.decode(prompt + ids) + "\n"
