"""Overlap, AUROC, d', equal error and average precision against scikit-learn and plain restatements; ties and flat sets."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from engine.evals.metrics.overlap import Scores, auroc, average_precision, d_prime, equal_error, histogram, overlap


def drawn(seed: int, n: int, digits: int, weighted: bool, shift: float = 0.0) -> Scores:
    rng = np.random.default_rng([seed, n])
    values = np.tanh(rng.normal(size=n) + shift).round(digits)
    return Scores(values, rng.random(n) + 0.1 if weighted else None)


def as_labelled(high: Scores, low: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights = [np.ones(len(each.values)) if each.weights is None else each.weights for each in (high, low)]
    labels = np.repeat([1, 0], [len(high.values), len(low.values)])
    return labels, np.concatenate([high.values, low.values]), np.concatenate(weights)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 1, 9]), st.booleans())
def test_equals_sklearn(seed, n, m, digits, weighted):
    high, low = drawn(seed, n, digits, weighted, 0.5), drawn(seed + 1, m, digits, weighted)
    labels, values, weights = as_labelled(high, low)
    assert average_precision(high, low) == pytest.approx(average_precision_score(labels, values, sample_weight=weights))
    # each set has weight one in all: sklearn's AUROC does not depend on it
    assert auroc(high, low) == pytest.approx(roc_auc_score(labels, values, sample_weight=weights))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 9]), st.booleans())
def test_overlap_and_d_prime_equal_restatements(seed, n, m, digits, weighted):
    high, low = drawn(seed, n, digits, weighted, 0.5), drawn(seed + 1, m, digits, weighted)
    edges = np.linspace(-1, 1, 101)
    shared = 0.0
    for number, (lower, upper) in enumerate(pairwise(edges)):
        shares = []
        for each in (high, low):
            inside = (each.values >= lower) & ((each.values < upper) | (number == 99))
            weights = np.ones(len(each.values)) if each.weights is None else each.weights
            shares.append(weights[inside].sum() / weights.sum())
        shared += min(shares)
    assert overlap(high, low) == pytest.approx(shared)
    mean, var = [], []
    for each in (high, low):
        mean.append(np.average(each.values, weights=each.weights))
        var.append(np.average((each.values - mean[-1]) ** 2, weights=each.weights))
    if sum(var) > 1e-12:
        assert d_prime(high, low) == pytest.approx((mean[0] - mean[1]) / np.sqrt(sum(var) / 2))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 1, 9]), st.booleans())
def test_equal_error_equals_the_best_of_the_roc_curve(seed, n, m, digits, weighted):
    high, low = drawn(seed, n, digits, weighted, 0.5), drawn(seed + 1, m, digits, weighted)
    labels, values, weights = as_labelled(high, low)
    taken, found, _ = roc_curve(labels, values, sample_weight=weights, drop_intermediate=False)
    threshold, error = equal_error(high, low)
    shares = [each.shares for each in (high, low)]
    missed_there = shares[0][high.values < threshold].sum()
    taken_there = shares[1][low.values >= threshold].sum()
    assert error == pytest.approx((missed_there + taken_there) / 2)
    assert abs(missed_there - taken_there) == pytest.approx(np.abs(1 - found - taken).min(), abs=1e-9)


def test_sets_that_lie_apart_and_equal_ones():
    ones, zeros = Scores(np.ones(5)), Scores(np.zeros(3))
    assert (overlap(ones, zeros), auroc(ones, zeros), average_precision(ones, zeros)) == (0, 1, 1)
    assert (auroc(zeros, ones), d_prime(ones, zeros), d_prime(zeros, ones)) == (0, math.inf, -math.inf)
    assert equal_error(ones, zeros) == (0.5, 0.0)
    assert (overlap(ones, ones), auroc(ones, ones), d_prime(ones, ones)) == (pytest.approx(1), 0.5, 0)
    assert equal_error(ones, ones)[1] == 0.5
    assert average_precision(ones, Scores(np.ones(15))) == pytest.approx(0.25)


@pytest.mark.parametrize("weighted", [False, True])
def test_rounding_gives_flat_sets_neither_spread_nor_more_than_all(weighted):
    rng = np.random.default_rng(0)
    for n, value in ((7, 0.1), (1000, 0.3), (12345, 1 / 3)):
        high, low = (Scores(np.full(n, x), rng.random(n) + 0.1 if weighted else None) for x in (value, value - 1))
        assert (high.mean, high.variance) == (value, 0)
        assert (auroc(high, low), auroc(low, high), auroc(high, high), d_prime(high, high)) == (1, 0, 0.5, 0)


def test_what_rounding_puts_beyond_one_is_counted():
    shares = histogram(Scores(np.array([1 + 1e-7, -1 - 1e-7, 0.0, 0.999])))
    assert shares.sum() == pytest.approx(1)
    assert shares[[0, 50, 99]] == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize("values", [[], [np.nan], [[1.0]]])
def test_no_scores(values):
    with pytest.raises(ValueError, match="finite"):
        Scores(np.array(values, float))


def test_weights_of_another_number():
    with pytest.raises(ValueError, match="2 scores have 3 weights"):
        Scores(np.zeros(2), np.ones(3))
