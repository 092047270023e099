"""locality.Evidence for many sentences at once: each against every block length, in numpy.

Its plain twin is `Evidence` in locality.py, where the model is explained.
"""

import numpy as np

from support.sentences import LONGEST


class FastEvidence:
    """See locality.Evidence; alpha, limit: its ALPHA and LIMIT. Sums run in an order that does not
    depend on how many sentences come at once, so that streaming gives the same bits."""

    def __init__(self, q, alpha, limit):
        self.q, self.alpha, self.limit = q, alpha, limit
        # log of alpha (alpha + 1) ... (alpha + n - 1)
        self.log_rising = np.cumsum(np.log(alpha - 1 + np.arange(limit * LONGEST + 1)))
        self.log_rising -= self.log_rising[0]
        self.reset()

    def reset(self):
        """Forget everything: a new document begins."""
        self.words = np.zeros(0, np.int64)  # of the last limit - 1 sentences
        self.sizes = np.zeros(0, np.int64)  # of each of them, in words

    def gains(self, words, sizes):
        """See locality.Evidence.gains. Returns (limit lags, sentences) float64, in nats."""
        limit, n_old, n_new = self.limit, len(self.sizes), len(sizes)
        n = n_old + n_new
        words = np.concatenate([self.words, words])
        sizes = np.concatenate([self.sizes, sizes])
        self.sizes = sizes[1 - limit :]
        self.words = words[len(words) - self.sizes.sum() :]

        # each word of each sentence once, equal words side by side, in the order of the sentences
        key, count = np.unique(words * n + np.repeat(np.arange(n), sizes), return_counts=True)
        word, sentence = np.divmod(key, n)
        used = np.append(0, np.cumsum(count))  # how often words before this one are used
        new = np.flatnonzero(sentence >= n_old)

        # what every word costs: log of p(words | begins) / p(words | continues), were they new
        size = np.bincount(sentence[new] - n_old, minlength=n_new)
        before = np.cumsum(sizes) - sizes  # words before each sentence
        sentences, lags = np.arange(n_old, n), np.arange(limit)[:, None]
        n_words = before[sentences] - before[np.maximum(sentences - lags, 0)]  # of the block
        gain = self.log_rising[size] + self.log_rising[n_words] - self.log_rising[n_words + size]

        # what a word brings that the block has used m times. There is one entry for each sentence
        # of the block that uses it, the nearest first
        nearest = np.maximum(sentence[new] - limit + 1, 0)
        times = new - np.searchsorted(key, word[new] * n + nearest)
        here = np.repeat(new, times)
        there = here - np.arange(len(here)) + np.repeat(np.cumsum(times) - times, times) - 1
        m = used[here] - used[there]
        value = np.log1p(m / (self.alpha * self.q[word[here]]))
        value[1:] -= np.where(here[1:] == here[:-1], value[:-1], 0.0)
        cell = (sentence[here] - sentence[there]) * n_new + sentence[here] - n_old
        bonus = np.bincount(cell, value, minlength=limit * n_new).reshape(limit, n_new)
        gain += np.cumsum(bonus, axis=0)
        gain[lags > sentences] = 0.0  # no block has more sentences than there are
        return gain
