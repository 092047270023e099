"""The checks of docs/LESSON.md, one per exercise: python -m pytest lesson/ -k 1

Each fails with one sentence that says what to do next, until its exercise is solved.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_locality as properties  # noqa: E402  # first: it sets what torch reads when it is loaded

import torch  # noqa: E402

from eval import evaluate, load, read_text  # noqa: E402
from lesson import exercises  # noqa: E402
from locality import (  # noqa: E402
    PARTITIONS,
    SCHEDULES,
    Partition,
    Partitioner,
    partition_text,
    reach,
    schedule,
)
from model import attention_weights, in_block  # noqa: E402
from support.files import InputError  # noqa: E402

BYTES, TEXT = properties.BYTES, properties.as_bytes(properties.SAMPLE[:400])


def check(condition, message):
    """Fail with the message only: no traceback, and no other error before it."""
    if not condition:
        raise pytest.fail.Exception(message, pytrace=False) from None


def trained_run(partition):
    """(model, tokens, lookback, vocabulary) of the test split of runs/quickstart."""
    try:
        model, config, trained_on = load(ROOT / "runs" / "quickstart")
        (tokens, lookback), vocabulary = read_text(config, trained_on, "test", partition)
    except InputError as e:
        check(False, f"This check needs the run of `make quickstart`: {e}")
    return model, tokens, lookback, vocabulary


def check_causal(name):
    """The property test of the partitions, on random texts."""
    for seed in range(6):
        try:
            properties.test_streaming_agrees_and_nothing_leaks(name, seed)
        except (AssertionError, InputError) as e:
            cause = f" ({e})" if isinstance(e, InputError) else ""
            check(
                False,
                f"The lookbacks of {name} are not causal{cause}: a token's lookback must be the "
                "same whatever follows it, and whether the text is read at once or in pieces.",
            )


def test_1_where_not_how_much():
    names = "distributed", "linear", "localist", "quintic", "reversed"
    check(
        sorted(exercises.ORDER) == sorted(names),
        f"Write your prediction in ORDER in lesson/exercises.py: put {', '.join(names)} in the "
        "order of their perplexity, the lowest first.",
    )
    model, *text = trained_run("window:8")
    perplexity = {}
    for name in names:
        model.set_locality(schedule(name, model.config.n_layer))
        perplexity[name] = evaluate(model, *text, measure=False)["perplexity"]
    order = sorted(names, key=perplexity.get)
    predicted = [perplexity[name] for name in exercises.ORDER]
    highest = np.maximum.accumulate(predicted)
    measured = "".join(
        f"\n{name:<12} {perplexity[name]:.3f}  {perplexity[name] / perplexity['distributed']:.3f}"
        for name in order
    )
    check(
        (predicted > 0.98 * highest).all(),  # less than 2% is a tie
        f"You predicted {', '.join(exercises.ORDER)}. Find out why it is otherwise, then correct "
        f"ORDER. Measured, with the ratio to distributed:{measured}",
    )


def test_2_a_schedule():
    check("late" in SCHEDULES, "Add a schedule with the name late to SCHEDULES in locality.py.")
    check(
        schedule("late", 1, 0.5) == [0.5],
        "A single layer is the last layer: its locality must be the floor.",
    )
    for n_layer in (2, 3, 4, 12):
        try:
            got = schedule("late", n_layer, 0.6)
        except (TypeError, ValueError, ArithmeticError, LookupError) as e:
            check(False, f"The function schedule in locality.py cannot compute late yet: {e}.")
        half, rounded = n_layer // 2, [round(x, 3) for x in got]
        now = f"With {n_layer} layers and a floor of 0.6, late gives {rounded}, but"
        check(len(got) == n_layer, f"{now} every layer needs a number.")
        check(not any(got[:half]), f"{now} the first half of the layers must be at 0.")
        check(got[-1] == 0.6, f"{now} the last layer must be at the floor.")
        check(got == sorted(got), f"{now} it must never decrease.")
        check(
            n_layer < 4 or np.ptp(np.diff(got[half:])) < 1e-6,
            f"{now} it must climb in equal steps in the second half.",
        )
        properties.test_schedule("late", n_layer)


def test_3_a_partition():
    check(
        "line" in PARTITIONS,
        "Write a function line in locality.py, and add it to PARTITIONS under that name.",
    )
    lines = [b"one\n", b"two\n", b"\n", b"three"]
    expected = [n for line in lines for n in range(len(line))]
    got = partition_text(properties.as_bytes(b"".join(lines)), BYTES, "line", 99).tolist()
    check(
        got == expected,
        f"For the bytes of {b''.join(lines)} the lookbacks must be {expected}, not {got}: a "
        "newline belongs to the line that it ends.",
    )
    vocabulary = [b"one", b".\n", b"\n\n", b" two"]
    got = partition_text(np.array([0, 1, 0, 3, 2, 3]), vocabulary, "line", 99).tolist()
    check(
        got == [0, 1, 0, 1, 2, 0],
        f"For the tokens {[vocabulary[t] for t in (0, 1, 0, 3, 2, 3)]} the lookbacks must be "
        f"[0, 1, 0, 1, 2, 0], not {got}: a newline may be inside a token, so look at "
        "stream.token_bytes.",
    )
    check_causal("line")


def lookback_of(partition):
    """A partition as a function of the tokens. partition: an entry of PARTITIONS."""

    def whole(tokens):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PARTITIONS, "mine", Partition(partition))
            try:
                return Partitioner(BYTES, "mine", 99).push(tokens)
            except InputError as e:
                check(False, f"{partition.__name__} is not a partition: {e}")

    return whole


def one_ahead(stream, tokens, i):
    """the next token decides"""
    begins = np.append(np.isin(tokens[1:], list(b"aeiou")), False)
    return i - np.maximum.accumulate(np.where(begins, i, 0))


def far_ahead(stream, tokens, i):
    """the token 20 tokens later decides"""
    later = np.append(tokens[20:], [0] * 20)[: len(tokens)]
    return np.where(later == ord("e"), 0, np.minimum(i, 7))


def eight(stream, tokens, i):
    """the last eight tokens"""
    return np.minimum(i, 7)


def test_4_the_leak(monkeypatch):
    for partition, ahead in ((one_ahead, True), (far_ahead, True), (eight, False)):
        got = exercises.looks_ahead(lookback_of(partition), TEXT)
        check(got is not None, "Write looks_ahead in lesson/exercises.py.")
        check(
            got == ahead,
            f"looks_ahead says {got} for this partition: {partition.__doc__}. Two texts with the "
            "same past and different futures must have the same lookbacks, token by token.",
        )
    check(
        not exercises.looks_ahead(lookback_of(exercises.syllable), TEXT),
        "Your looks_ahead says that syllable looks ahead. Repair syllable in lesson/exercises.py.",
    )
    got = lookback_of(exercises.syllable)(properties.as_bytes("banana")).tolist()
    check(
        got == [0, 1, 2, 1, 2, 1],
        f"For banana the lookbacks must be [0, 1, 2, 1, 2, 1], not {got}: the block still begins "
        "with the letter before the vowel, but nobody knows that before the vowel has been read.",
    )
    monkeypatch.setitem(PARTITIONS, "syllable", Partition(exercises.syllable))
    check_causal("syllable")


def test_5_break_the_floor():
    two = exercises.two_tokens()
    check(two is not None, "Return q and k from two_tokens in lesson/exercises.py.")
    q, k = two
    right = all(x.shape == (2, 4) and x.isfinite().all() for x in two)
    check(right, "Both q and k must be tensors of shape (2, 4) that contain finite numbers.")
    block = in_block(torch.zeros(1, 2))[:, None]  # two tokens, each a block of its own
    for locality in (0.5, 0.99):
        blend, rival = (
            (weights(q[None, None], k[None, None], block, locality) * block).sum(-1)[0, 0, 1].item()
            for weights in (attention_weights, exercises.penalty)
        )
        check(
            rival < 0.01,
            f"At a dial of {locality}, {rival:.1%} of the attention of the second token stays in "
            "its block with the penalty. Find q and k that leave less than 1%.",
        )
        check(
            blend >= locality - 1e-6,
            "The blend has lost its floor, too: take the penalty out of model.py again.",
        )


def test_6_a_certificate():
    check(exercises.REACH is not None, "Write your answer in REACH in lesson/exercises.py.")
    tokens = np.arange(200)
    certified = int(tokens[-1] - reach(np.minimum(tokens, 7), [1.0] * 12)[-1])
    check(
        exercises.REACH == certified,
        f"REACH is not {exercises.REACH}: each of the 8 tokens that a layer sees has seen more "
        "in the layer below.",
    )
    check_largest_change()
    closed = "semantic:closed"
    for partition, dial in ((closed, 1.0), (closed, 0.99), ("semantic", 1.0)):
        change = change_before_blocks(partition, dial)
        print(f"{partition} blocks, first layer at {dial}: the largest change is {change}")
        certified = partition == closed and dial == 1
        check(
            (change == 0) == certified,
            f"With {partition} blocks and the first layer at {dial}, your largest_change returns "
            f"{change} for runs/quickstart. Is it right?",
        )


def check_largest_change():
    """Try largest_change on models that read a single token."""
    tokens, start, at = torch.arange(1, 11), 4, 8
    for read in range(10):

        def logits_of(x, read=read):
            logits = x[:1].float().expand(10, 3).clone()
            logits[at] = x[read]
            return logits

        got = exercises.largest_change(logits_of, tokens, start, at)
        check(got is not None, "Write largest_change in lesson/exercises.py.")
        check(
            (got != 0) == (read < start),
            f"With start = {start} and at = {at}, largest_change returns {got} for a model whose "
            f"prediction at token {at} depends only on token {read}. Every token before token "
            f"{start} must be replaced with another one, and no other token.",
        )


@torch.no_grad()
def change_before_blocks(partition, dial):
    """The largest change of a logit of runs/quickstart if everything before a block is replaced.

    The first layer is at `dial`, all others are at 1. The block is that of the last token of each
    of several contexts, if it begins within the context.
    """
    model, tokens, lookback, _ = trained_run(partition)
    model.set_locality([dial] + [1.0] * (model.config.n_layer - 1))
    T, changes = model.config.block_size, []
    for end in range(T, len(tokens), T):
        idx, back = (
            torch.from_numpy(x[end - T : end].astype(np.int64)) for x in (tokens, lookback)
        )
        start = T - 1 - int(back[-1])
        if start > 0:
            logits_of = lambda x, back=back: model(x[None], back[None])[0][0]
            changes.append(exercises.largest_change(logits_of, idx, start, T - 1))
    return max(changes)
