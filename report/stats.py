"""Statistics that the sweep, the dial sweep and the faithfulness study share.

A comparison of two models is a dict:
    seeds            how many seeds both models have; everything is paired by seed
    difference       the mean of first minus second; or `ratio`, e to that power
    low, high        its 95 % interval over seeds (Student's t); None for a single seed
    p, least_p       the exact sign-flip test, and the smallest p that so many seeds can give
    text             its 95 % interval over the text, [low, high]; None if it was not computed
"""

import math

import numpy as np

# 97.5 % quantile of Student's t by degrees of freedom; between two entries the lower one counts
STUDENT = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 14: 2.145, 16: 2.120, 18: 2.101, 20: 2.086, 25: 2.060, 30: 2.042},
}
RESAMPLES = 2000  # bootstrap samples of the contexts of a text


def mean_interval(values):
    """(mean, standard deviation, half the width of the 95 % interval of the mean); the last two are
    None for a single value."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, None, None
    sd = float(np.std(values, ddof=1))
    return mean, sd, STUDENT[max(df for df in STUDENT if df < n)] * sd / math.sqrt(n)


def sign_flip_p(differences):
    """p of the two-sided exact permutation test of paired differences: the share of all 2^n ways to
    sign them whose mean is as far from 0 as the observed one. None for more than 20 differences, or
    if one of them is NaN."""
    d = np.asarray(differences, float)
    if len(d) > 20 or np.isnan(d).any():
        return None
    signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)  # (2^n, n)
    return float((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).mean())


def holm(ps):
    """The p values of several tests, corrected for multiple testing (Holm 1979): a list. If all
    below 0.05 are rejected, the chance of even one false rejection is at most 5%."""
    corrected, least = [1.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def bootstrap_weights(n):
    """How often each of n contexts is drawn in each bootstrap sample: (RESAMPLES, n) integers, the
    same in every call. The contexts are drawn as if they were independent."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)


def resampled_losses(first, second):
    """The losses of two lists of runs with the contexts of the test text resampled: {seed:
    (RESAMPLES,) nats per token} for each, of the seeds that both have. None for fewer than 20
    contexts or if the contexts are not the same."""
    sides = [{r["seed"]: np.array(r["by_context"]) for r in runs} for runs in (first, second)]
    seeds = sides[0].keys() & sides[1].keys()
    counts = [side[seed][:, 1] for side in sides for seed in seeds]  # tokens, (contexts,) each
    same = all(np.array_equal(n, counts[0]) for n in counts)
    if not seeds or len(counts[0]) < 20 or not same:
        return None
    drawn = bootstrap_weights(len(counts[0]))  # (RESAMPLES, contexts)
    total = drawn @ counts[0]  # (RESAMPLES,)
    return [{seed: drawn @ side[seed][:, 0] / total for seed in seeds} for side in sides]


def paired(first, second, resampled=None, ratio=False):
    """Compare two models: a comparison, or None if they share no seed.

    first, second: {seed: value}. resampled: the same two dicts with (RESAMPLES,) values, one for
    each sample of `bootstrap_weights`. ratio: compare e to the power of the values.
    """
    seeds = sorted(first.keys() & second.keys())
    scale = (lambda x: math.exp(min(x, 700))) if ratio else float  # exp(710) is no float
    if not seeds:
        return None
    d = [first[seed] - second[seed] for seed in seeds]
    mean, _, half = mean_interval(d)
    row = {"seeds": len(d), "ratio" if ratio else "difference": scale(mean)}
    for end, sign in (("low", -1), ("high", 1)):
        row[end] = None if half is None else scale(mean + sign * half)
    row |= {"p": sign_flip_p(d), "least_p": 2 / 2 ** len(d), "text": None}
    if resampled:
        means = np.mean([resampled[0][seed] - resampled[1][seed] for seed in seeds], axis=0)
        row["text"] = [scale(x) for x in np.percentile(means, (2.5, 97.5))]
    return row
