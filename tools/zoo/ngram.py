"""Unigram and trigram models: what a language model has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DISCOUNT = 0.75
"""Absolute discount of the interpolated Kneser-Ney model (Ney, Essen, Kneser 1994)."""

Tokens = NDArray[np.int64]


def unigram_perplexity(train: Tokens, test: Tokens, vocabulary: int) -> float:
    """Perplexity of ``test`` under the frequencies of ``train``, each raised by one.

    ``train``, ``test``: token ids, ``[n]`` i64, below ``vocabulary``.
    """
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[test].mean()))


def trigram_perplexity(train: Tokens, test: Tokens, vocabulary: int) -> float:
    """Perplexity of ``test[2:]`` under an interpolated Kneser-Ney trigram model of ``train``.

    P(c|ab) = max(n(abc) - D, 0) / n(ab) + D * t(ab) / n(ab) * P(c|b), where t counts the kinds of
    tokens seen after a context; the lower orders count contexts instead of occurrences.
    """
    a, b, c = test[:-2], test[1:-1], test[2:]
    unigram = np.bincount(np.unique(_key(train[:-1], train[1:], vocabulary)) % vocabulary,
                          minlength=vocabulary) + 0.5  # fmt: skip
    p_one = (unigram / unigram.sum())[c]
    trigrams = np.unique(_key(_key(train[:-2], train[1:-1], vocabulary), train[2:], vocabulary))
    # Continuation counts: how many different tokens came before each pair.
    pairs, pair_counts = np.unique(trigrams % vocabulary**2, return_counts=True)
    p_two = _interpolated(pairs, pair_counts, _key(b, c, vocabulary), p_one, vocabulary)
    full, full_counts = np.unique(
        _key(_key(train[:-2], train[1:-1], vocabulary), train[2:], vocabulary), return_counts=True
    )
    queries = _key(_key(a, b, vocabulary), c, vocabulary)
    p_three = _interpolated(full, full_counts, queries, p_two, vocabulary)
    return float(np.exp(-np.log(p_three).mean()))


def _key(high: Tokens, low: Tokens, vocabulary: int) -> Tokens:
    return high * vocabulary + low


def _interpolated(
    grams: Tokens, counts: Tokens, queries: Tokens, lower: NDArray[np.float64], vocabulary: int
) -> NDArray[np.float64]:
    contexts, kinds = np.unique(grams // vocabulary, return_counts=True)
    places = np.searchsorted(contexts, grams // vocabulary)
    totals: NDArray[np.float64] = np.bincount(places, weights=counts).astype(np.float64)
    count = _lookup(grams, counts.astype(np.float64), queries)
    total = _lookup(contexts, totals, queries // vocabulary)
    kind = _lookup(contexts, kinds.astype(np.float64), queries // vocabulary)
    safe = np.maximum(total, 1.0)
    mixed = np.maximum(count - DISCOUNT, 0.0) / safe + DISCOUNT * kind / safe * lower
    return np.where(total > 0, mixed, lower)


def _lookup(keys: Tokens, values: NDArray[np.float64], queries: Tokens) -> NDArray[np.float64]:
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0.0)
