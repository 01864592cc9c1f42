"""Labels of patches and pixels of patches, against plain restatements."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mode

from engine.core.errors import BadInput
from engine.data.annotated.dense import Frame
from engine.evals import semantic_patches
from engine.evals.features import encoder_of
from engine.evals.metrics.confusion import pixel_accuracy
from engine.evals.subject import Subject
from engine.model.vit import create
from tests.evals.painted import paint

VOID = 255


def picture(*, at: int, category: int = 0, side: int = 16):
    return [(category, (slice(at, at + side), slice(at, at + side)), False)]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 4]), st.integers(1, 4), st.integers(1, 3))
def test_the_majority_is_that_of_each_patch_and_ties_go_to_the_lower_label(seed, side, rows, larger):
    size = side * rows
    truth = np.random.default_rng(seed).choice([0, 1, 2, VOID], (size, size)).astype(np.uint8)
    stored = truth.repeat(larger, 0).repeat(larger, 1)  # squeezing it gives the truth again
    how = Frame(size, "square", side)
    patches = truth.reshape(rows, side, rows, side).swapaxes(1, 2).reshape(rows * rows, -1)
    expected = mode(patches, axis=1).mode.reshape(rows, rows)  # scipy's gives the least of equals
    np.testing.assert_array_equal(semantic_patches.majority(stored, how), expected)
    known = [np.bincount(patch[patch != VOID]).argmax() if (patch != VOID).any() else VOID for patch in patches]
    np.testing.assert_array_equal(semantic_patches.majority(stored, how, void=False).ravel(), known)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_a_pixel_is_judged_as_the_patch_under_its_centre(height, width, rows, columns):
    labels = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    row = np.floor((np.arange(height) + 0.5) * rows / height + 1e-9).astype(int)
    column = np.floor((np.arange(width) + 0.5) * columns / width + 1e-9).astype(int)
    np.testing.assert_array_equal(semantic_patches.at_pixels(labels, (height, width)), labels[row][:, column])


def test_a_draw_takes_so_many_of_the_usable_patches_and_is_repeated():
    usable = np.random.default_rng(0).random((5, 4, 4)) < 0.5
    drawn = semantic_patches.drawn(usable, 7, 3)
    assert drawn.sum() == 7 and not (drawn & ~usable).any()
    np.testing.assert_array_equal(drawn, semantic_patches.drawn(usable, 7, 3))
    assert (drawn != semantic_patches.drawn(usable, 7, 4)).any()
    for most in (0, 1000):
        np.testing.assert_array_equal(semantic_patches.drawn(usable, most, 3), usable)


def test_features_are_those_of_the_chosen_patches_in_order(tmp_path):
    images = paint(tmp_path, "train", [picture(at=at) for at in (0, 16, 24, 40, 8)], (64, 80))
    subject = Subject("x", encoder_of(create("vit_micro_patch8_32")), batch_size=2)
    how = semantic_patches.frame("p", images, 32, 8)
    chosen = np.random.default_rng(1).random((5, 4, 4)) < 0.4
    chosen[2] = False
    found = semantic_patches.features(subject, images, how, chosen)
    whole = {}
    for ids, truths, maps in semantic_patches.encoded(subject, images, range(5), how):
        assert len(ids) <= 2 and truths == [None] * len(ids)
        whole |= dict(zip(ids, maps.numpy(), strict=True))
    expected = np.concatenate([whole[index][chosen[index]] for index in range(5)])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_the_grid_is_judged_as_its_true_majorities(tmp_path):
    images = paint(tmp_path, "val", [picture(at=16), picture(at=19)])
    subject = Subject("x", encoder_of(create("vit_micro_patch8_32")))
    how = semantic_patches.frame("p", images, 0, 8)
    assert how.size == 64
    counts, grid = semantic_patches.judged(subject, images, how, {"none": lambda x: x[:, 0].long() * 0})
    assert grid.samples["image pixel accuracy"][0] == 1 > grid.samples["image pixel accuracy"][1] > 0.95
    assert pixel_accuracy(counts["none"].matrix_KK) == pytest.approx(1 - 256 / 4096)


def test_the_size_follows_the_images_and_must_fit_the_patches(tmp_path):
    images = paint(tmp_path, "val", [picture(at=0)] * 3, (300, 500))
    assert semantic_patches.frame("p", images, 0, 16).size == semantic_patches.frame("p", images, 0, 14).size == 224
    assert semantic_patches.frame("p", images, 448, 16) == Frame(448, "square", 16)
    with pytest.raises(BadInput, match="protocol p: size = 225 is no multiple of the patch size 16"):
        semantic_patches.frame("p", images, 225, 16)
