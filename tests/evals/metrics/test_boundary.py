"""J and F against a restatement by dilation with a disk, and masks without a boundary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, gaussian_filter
from skimage.morphology import disk

from engine.evals.metrics.boundary import boundary, f, j


def plain_boundary(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    found = np.zeros(mask.shape, bool)
    for y in range(height):
        for x in range(width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            found[y, x] = len({mask[y, x], mask[below, x], mask[y, right], mask[below, right]}) > 1
    return found


def plain_f(mask: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    mine, true = plain_boundary(mask), plain_boundary(truth)
    reach = int(np.ceil(tolerance * np.linalg.norm(mask.shape)))
    wide_mine, wide_true = (binary_dilation(each, disk(reach)) for each in (mine, true))
    if mine.sum() == 0 or true.sum() == 0:
        return float(mine.sum() == true.sum())
    precision, recall = (mine & wide_true).sum() / mine.sum(), (true & wide_mine).sum() / true.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    return gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 3) > 0.03


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.sampled_from([0.008, 0.03, 0.1]), st.floats(0, 1)
)
def test_equals_the_restatement_on_random_masks(seed, height, width, tolerance, share):
    mask, truth = np.random.default_rng(seed).random((2, height, width)) < share
    np.testing.assert_array_equal(boundary(mask), plain_boundary(mask))
    assert f(mask, truth, tolerance) == pytest.approx(plain_f(mask, truth, tolerance), abs=1e-12)
    either = (mask | truth).sum()
    assert j(mask, truth) == pytest.approx((mask & truth).sum() / either if either else 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_restatement_on_blobs(seed):
    mask, truth = blobs(seed), np.roll(blobs(seed), (1, seed), (0, 1))
    assert 0 < f(mask, truth) <= 1
    assert f(mask, truth) == pytest.approx(plain_f(mask, truth, 0.008), abs=1e-12)


def test_a_pixel_at_exactly_the_distance_is_matched():
    mask, truth = np.zeros((2, 30, 30), bool)
    mask[:, :10] = True
    truth[:, :13] = True
    diagonal = np.hypot(30, 30)
    assert f(mask, truth, 3 / diagonal - 1e-9) == 1.0
    assert f(mask, truth, 2 / diagonal - 1e-9) == 0.0


def test_masks_without_a_boundary():
    empty, full, dot = np.zeros((3, 20, 30), bool)
    full[:], dot[7, 9] = True, True
    assert j(empty, empty) == j(full, full) == j(dot, dot) == 1.0
    assert j(empty, full) == j(dot, empty) == 0.0
    assert j(dot, full) == pytest.approx(1 / 600)
    assert f(empty, empty) == f(full, full) == f(dot, dot) == 1.0
    assert f(empty, full) == 1.0  # no boundary either: the edge of the image is none
    assert f(dot, empty) == f(empty, dot) == f(dot, full) == f(full, dot) == 0.0
    assert boundary(np.ones((1, 1), bool)).sum() == 0


def test_batches_and_ignored_pixels():
    masks, truth = np.stack([blobs(seed) for seed in range(6)]).reshape(2, 3, 40, 56), blobs(9)
    for score in (j, f):
        singly = [[score(mask, truth) for mask in row] for row in masks]
        np.testing.assert_array_equal(score(masks, truth), singly)
    ignored = np.zeros((40, 56), bool)
    ignored[:, 20:] = True
    wrong_there = truth ^ ignored
    assert j(wrong_there, truth, ignored) == f(wrong_there, truth, ignored=ignored) == 1.0
    assert j(wrong_there, truth) < 1.0
    assert isinstance(j(truth, truth), float) and isinstance(f(truth, truth), float)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="broadcast"):
        f(np.zeros((3, 4), bool), np.zeros((4, 3), bool))
