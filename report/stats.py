"""Statistics that the sweep and the faithfulness study share.

A comparison of two models is a dict:
    seeds            how many seeds both models have; everything is paired by seed
    difference       the mean of first minus second; `as_ratio` turns it into `ratio`
    low, high        its 95 % interval over seeds (Student's t); None for a single seed
    p, least_p       the exact sign-flip test, and the smallest p that so many seeds can give
    text             its 95 % interval over the text, [low, high]; None if it was not computed
"""

import math

import numpy as np

# 97.5 % quantile of Student's t by degrees of freedom. Between two entries the lower degrees of
# freedom count, which makes the interval wider.
STUDENT = {
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 14: 2.145, 16: 2.120, 18: 2.101, 20: 2.086, 25: 2.060, 30: 2.042},
}
RESAMPLES = 2000  # bootstrap samples of the contexts of a text


def mean_interval(values):
    """(mean, standard deviation, half the width of the 95 % interval of the mean).

    The last two are None for a single value.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return float(values.mean()), None, None
    sd = float(values.std(ddof=1))
    t = STUDENT[max(df for df in STUDENT if df <= n - 1)]
    return float(values.mean()), sd, t * sd / math.sqrt(n)


def sign_flip_p(differences):
    """p of the two-sided exact permutation test of paired differences.

    It is the share of all 2^n ways to sign them whose mean is as far from 0 as the observed mean,
    so it is never below 2 / 2^n. None for more than 20 differences, which have too many ways.
    """
    d = np.asarray(differences, float)
    if len(d) > 20:
        return None
    signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)  # (2^n, n)
    return float((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).mean())


def holm(ps):
    """The p of several tests, each corrected for all of them (Holm 1979): a list.

    Rejecting what is below 0.05 makes even one error in at most 5 % of such families of tests.
    """
    corrected, least = [1.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def bootstrap_weights(n):
    """How often each of n contexts is drawn in each bootstrap sample: (RESAMPLES, n) integers.

    The contexts are drawn as if they were independent. Every call draws the same samples.
    """
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)


def paired(first, second, resampled=None):
    """Compare two models: a comparison, or None if they share no seed.

    first, second: {seed: value}. resampled: the same two dicts with (RESAMPLES,) values, one for
    each sample of `bootstrap_weights`.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    d = [first[seed] - second[seed] for seed in seeds]
    mean, _, half = mean_interval(d)
    row = {"seeds": len(seeds), "difference": mean, "low": None, "high": None}
    if half is not None:
        row |= {"low": mean - half, "high": mean + half}
    row |= {"p": sign_flip_p(d), "least_p": 2 / 2 ** len(d), "text": None}
    if resampled:
        means = np.mean([resampled[0][seed] - resampled[1][seed] for seed in seeds], axis=0)
        row["text"] = np.percentile(means, (2.5, 97.5)).tolist()
    return row


def as_ratio(row):
    """A comparison of losses in nats as one of perplexities: `ratio` replaces `difference`."""
    row = {"seeds": row["seeds"], "ratio": row["difference"], **row}
    del row["difference"]
    for key in ("ratio", "low", "high"):
        row[key] = None if row[key] is None else math.exp(row[key])
    return {**row, "text": row["text"] and [math.exp(x) for x in row["text"]]}
