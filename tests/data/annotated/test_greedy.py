"""The greedy draw against its rule, gone through image by image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.core.errors import BadInput
from engine.data.annotated.greedy import few_positives

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 5))
TARGETS = arrays.arrays(np.int8, SHAPES, elements=st.sampled_from([-1, 0, 0, 1]))


@given(TARGETS, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_class_is_shown_often_enough_and_no_image_is_taken_in_vain(targets, k, seed):
    shown = (targets == 1).sum(0)
    if (shown < k).any():
        with pytest.raises(BadInput, match=rf"class {np.flatnonzero(shown < k)[0]} is shown by"):
            few_positives(targets, k, seed)
        return
    ids = few_positives(targets, k, seed)
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all()
    order = [row for row in np.random.RandomState(seed).permutation(len(targets)) if row in set(ids.tolist())]
    assert len(order) == len(ids)
    assert ((targets[ids] == 1).sum(0) >= k).all()
    for place, row in enumerate(order):
        before = (targets[order[:place]] == 1).sum(0)
        assert any(targets[row, c] == 1 and before[c] < k for c in range(targets.shape[1]))


@given(TARGETS, st.integers(0, 9))
def test_fewer_are_among_more(targets, seed):
    targets = np.concatenate([targets, *[np.eye(targets.shape[1], dtype=np.int8)] * 3])
    one, two, three = (set(few_positives(targets, k, seed).tolist()) for k in (1, 2, 3))
    assert one <= two <= three


def test_the_draw_is_fixed_for_good():
    targets = (np.arange(200).reshape(40, 5) % 7 == 0).astype(np.int8)
    drawn = [few_positives(targets, 2, seed).tolist() for seed in (0, 1)]
    assert drawn == [[2, 4, 5, 15, 22, 25, 28, 33, 35, 37], [2, 19, 21, 22, 26, 28, 29, 30, 32, 39]]


def test_a_class_that_is_shown_too_rarely_is_named():
    targets = np.array([[1, 1], [1, -1], [1, 0]], np.int8)
    with pytest.raises(BadInput, match="class dog is shown by 1 of 3 images, which is less than 2"):
        few_positives(targets, 2, 0, ("cat", "dog"))
