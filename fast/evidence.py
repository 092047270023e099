"""locality.Evidence for many sentences at once: each against every block length, in numpy.

Its plain twin is `Evidence` in locality.py, where the model is explained.
"""

import numpy as np

from support.sentences import LONGEST


class FastEvidence:
    """See locality.Evidence; alpha, least and limit are its ALPHA, LEAST and LIMIT. Sums run in an
    order that does not depend on how many sentences come at once, so that streaming gives the same
    bits."""

    def __init__(self, base, prior, alpha, least, limit):
        self.base, self.prior = base, prior
        self.alpha, self.least, self.limit = alpha, least, limit
        # log of alpha (alpha + 1) ... (alpha + n - 1)
        logs = np.log(alpha + np.arange(limit * LONGEST))
        self.log_rising = np.concatenate([[0.0], np.cumsum(logs)])
        self.counts, self.total = np.zeros(len(base), np.int32), 0  # words of the document so far
        self.reset()

    def reset(self):
        """Forget everything: a new document begins."""
        if self.total:
            self.counts[:] = 0
        self.total = 0
        self.words = np.zeros(0, np.int64)  # of the last limit - 1 sentences
        self.sizes = np.zeros(0, np.int64)  # of each of them, in words

    def gains(self, words, sizes):
        """See locality.Evidence.gains. Returns (limit lags, sentences) float64, in nats."""
        limit, n_old, n_new = self.limit, len(self.sizes), len(sizes)
        n, n_words_old = n_old + n_new, len(self.words)
        words = np.concatenate([self.words, words])
        sizes = np.concatenate([self.sizes, sizes])
        before = np.cumsum(sizes) - sizes  # words before each sentence

        # each word of each sentence once, equal words side by side, in the order of the sentences
        key, count = np.unique(words * n + np.repeat(np.arange(n), sizes), return_counts=True)
        word, sentence = np.divmod(key, n)
        used = np.append(0, np.cumsum(count))  # how often words before this one are used
        new = np.flatnonzero(sentence >= n_old)

        # if the block had used none of the words: log of p(words | continues) / p(words | begins)
        size = np.bincount(sentence[new] - n_old, minlength=n_new)
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
        seen = self.counts[word[new]] + used[new]
        seen -= used[np.searchsorted(key, word[new] * n + n_old)]  # in the sentences before
        total = self.prior + self.total + before[sentence[new]] - n_words_old
        q = self.least + (self.prior * self.base[word[new]] + seen) / total
        value = np.log1p(m / np.repeat(self.alpha * q, times))
        value[1:] -= np.where(here[1:] == here[:-1], value[:-1], 0.0)
        cell = (sentence[here] - sentence[there]) * n_new + sentence[here] - n_old
        bonus = np.bincount(cell, value, minlength=limit * n_new).reshape(limit, n_new)
        gain += np.cumsum(bonus, axis=0)
        gain[lags > sentences] = 0.0  # no block has more sentences than there are

        np.add.at(self.counts, words[n_words_old:], 1)
        self.total += len(words) - n_words_old
        self.sizes = sizes[1 - limit :]
        self.words = words[len(words) - self.sizes.sum() :]
        return gain
