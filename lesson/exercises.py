"""Six exercises: docs/LESSON.md asks the questions, and test_exercises.py checks the answers.

    python -m pytest lesson/ -k 1    # the check of exercise 1

Exercises 2 and 3 are solved in locality.py, all others here.
"""

import math

import numpy as np
import torch

# --------------------------------------------------------------------------------------------------
# 1. Where, not how much

# "distributed", "linear", "localist", "quintic", "reversed": from the lowest perplexity to the
# highest
ORDER = []

# --------------------------------------------------------------------------------------------------
# 4. The leak that makes a model better


def syllable(stream, tokens, i):
    """the syllable, which begins with the letter before its vowel: ba-na-na"""
    vowel = np.isin(tokens, list(b"aeiou"))
    begins = np.append(vowel[1:], False)  # at the letter before a vowel
    starts = np.where(begins, i, 0)
    starts = np.maximum.accumulate(np.append(stream.block, starts))[1:]
    stream.block = starts[-1]  # the next tokens may continue this block
    return i - starts


def looks_ahead(lookback_of, tokens):
    """Does the lookback of any token depend on the tokens after it?

    lookback_of: a partition as a function, tokens (n,) -> lookback (n,), for any n.
    tokens: (n,) integers, a text. Returns True or False.
    """


# --------------------------------------------------------------------------------------------------
# 5. Break the floor


def penalty(q, k, block, locality):
    """A rival of attention_weights in model.py, with the same arguments: one attention, in which
    every weight outside the block is multiplied by 1 - locality before the rows are normalized."""
    n, T = q.size(2), k.size(2)
    visible = torch.ones(n, T, dtype=torch.bool, device=q.device).tril(T - n)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, n, T)
    if locality > 0:
        scores = scores + torch.where(block, 0.0, math.log(max(1 - locality, 1e-30)))
    return scores.masked_fill(~visible, -math.inf).softmax(-1)  # (B, H, n, T)


def two_tokens():
    """The query and key vectors of two tokens, each a block of its own, that break the floor of
    `penalty`: (q, k), two float tensors of shape (2, 4)."""


# --------------------------------------------------------------------------------------------------
# 6. A certificate

# With window:8, a token sees itself and the 7 tokens before it. If all 12 layers are at 1, how many
# tokens before itself can change what the model predicts at a token?
REACH = None


def largest_change(logits_of, tokens, start, at):
    """Replace all tokens before token `start` with other ones. How much does that change the
    prediction at token `at`?

    logits_of: the model, tokens (T,) -> logits (T, V). It keeps the blocks of the original text.
    tokens: (T,) int64; every id from 0 to 255 is in the vocabulary. Returns the largest difference
    of two logits, a float.
    """
