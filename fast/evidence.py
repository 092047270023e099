"""locality.Evidence for many sentences at once: each against every block length, in numpy.

Its plain twin is `Evidence` in locality.py, where the model is explained.
"""

import numpy as np

from support.sentences import LONGEST


class FastEvidence:
    """See locality.Evidence. Sums run in an order that does not depend on how many sentences come
    at once, so that streaming gives the same bits."""

    def __init__(self, alpha, discount, base, prior, least, limit):
        self.alpha, self.discount, self.limit = alpha, discount, limit
        self.base, self.prior, self.least = base, prior, least
        i = np.arange(limit * LONGEST)
        # log of alpha (alpha + 1) ... (alpha + n - 1), and the same in steps of discount
        self.log_n = np.concatenate([[0.0], np.cumsum(np.log(alpha + i))])
        self.log_v = np.concatenate([[0.0], np.cumsum(np.log(alpha + discount * i))])
        self.counts = np.zeros(len(base), np.int32)
        self.total = 0
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
        n, before = n_old + n_new, len(self.words)
        words = np.concatenate([self.words, words])
        sizes = np.concatenate([self.sizes, sizes])
        order = np.argsort(words, kind="stable")
        # equal words side by side, in the order of their sentences
        word, when = words[order], np.repeat(np.arange(n), sizes)[order]
        ago = np.full(len(word), limit)  # sentences since each word was last used, at most limit
        ago[1:] = np.where(word[1:] == word[:-1], np.minimum(when[1:] - when[:-1], limit), limit)
        n_words, n_distinct = block_sizes(ago, when, sizes, limit)
        n_words, n_distinct = n_words[:, n_old:], n_distinct[:, n_old:]

        new = np.flatnonzero((ago > 0) & (when >= n_old))  # each word of each new sentence once
        size = np.bincount(when[new] - n_old, minlength=n_new)
        # what every word costs
        gain = self.log_v[n_distinct + size] - self.log_v[n_distinct]
        gain = gain - self.log_n[n_words + size] + self.log_n[n_words]
        gain -= self.log_v[size] - self.log_n[size]
        # what repeated words bring
        reward, matched = self.rewards(word, when, new, n_distinct, sizes[n_old:], n_old)
        gain += reward
        gain -= matched

        np.add.at(self.counts, words[before:], 1)
        self.total += len(words) - before
        self.sizes = sizes[-(limit - 1) :]
        self.words = words[len(words) - self.sizes.sum() :]
        return gain

    def rewards(self, word, when, new, n_distinct, sizes, n_old):
        """What words that were used within reach add to `gains`: two (limit, sentences) float64.

        There is one entry for each earlier use of a word of a new sentence.
        """
        limit, n_new = self.limit, len(sizes)
        key = word * (n_old + n_new) + when
        column = when[new] - n_old
        seen = self.counts[word[new]] + new - np.searchsorted(key, key[new] - column)
        total = self.total + np.cumsum(sizes) - sizes
        q = (self.prior * self.base[word[new]] + seen) / (self.prior + total[column])
        q = self.least + q
        times = new - np.searchsorted(key, key[new] - np.minimum(when[new], limit - 1))
        m = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times) + 1
        lag = np.repeat(when[new], times) - when[np.repeat(new, times) - m]
        cell = lag * n_new + np.repeat(column, times)
        new_mass = self.alpha + self.discount * n_distinct
        value = np.log(new_mass.reshape(-1)[cell] + (m - self.discount) / np.repeat(q, times))
        value[1:] -= np.where(m[1:] > 1, value[:-1], 0.0)
        reward = np.bincount(cell, value, minlength=limit * n_new).reshape(limit, n_new)
        matched = np.bincount(cell[m == 1], minlength=limit * n_new).reshape(limit, n_new)
        return np.cumsum(reward, axis=0), np.cumsum(matched, axis=0) * np.log(new_mass)


def block_sizes(ago, when, sizes, limit):
    """The number of words, and of distinct words, in the `lag` sentences before each sentence.

    ago, when: for each word, the sentences since it was last used, and its sentence; sizes: words
    per sentence. Returns two (limit lags, sentences) int64.
    """
    n = len(sizes)
    repeats = np.bincount(ago * n + when, minlength=(limit + 1) * n).reshape(limit + 1, n)
    fresh = sizes - np.cumsum(repeats[:limit], axis=0)  # words new to a block of each length
    n_words, n_distinct = np.zeros((2, limit, n), np.int64)
    for lag in range(1, min(limit, n)):
        n_words[lag, lag:] = n_words[lag - 1, lag - 1 : -1] + sizes[lag - 1 : -1]
        n_distinct[lag, lag:] = n_distinct[lag - 1, lag - 1 : -1] + fresh[lag - 1, lag - 1 : -1]
    return n_words, n_distinct
