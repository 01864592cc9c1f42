import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.evals.metrics import boundary, video

values = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def plain(values):
    """The toolkit's statement: frames counted from 1, the bounds of four bins rounded, each bin with both of its bounds."""
    bounds = []
    for bin_ in range(5):
        place = 1 + bin_ * (len(values) - 1) / 4
        bounds.append(int(np.round(place + 1e-10)) - 1)
    first, last = values[bounds[0] : bounds[1] + 1], values[bounds[3] : bounds[4] + 1]
    recall = sum(value > 0.5 for value in values) / len(values)
    return sum(values) / len(values), recall, sum(first) / len(first) - sum(last) / len(last)


@given(values)
def test_statistics_equal_a_plain_restatement(values):
    np.testing.assert_allclose(video.over_time(values), plain(values), atol=1e-12)


def test_statistics_of_constants_ties_and_a_fall():
    assert video.over_time(np.full(7, 0.5)) == (0.5, 0.0, 0.0)  # not above one half
    assert video.over_time(np.ones(1)) == (1.0, 1.0, 0.0)
    fallen = np.repeat([1.0, 0.0], 8)
    assert video.over_time(fallen) == (0.5, 0.5, 1.0)


def test_scores_are_those_of_each_object_without_the_first_and_the_last_frame():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (6, 9, 13)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.1] = 255
    found = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 4, truth.shape)).astype(np.uint8)
    found[found == 255] = 0
    scores = video.scored(found, truth, objects=3)
    assert scores.shape == (2, 3, 4) and scores.dtype == np.float64
    for k in range(1, 4):
        for frame in range(1, 5):
            mine, true = ({tuple(p) for p in np.argwhere(ids[frame] == k)} for ids in (found, truth))
            assert scores[0, k - 1, frame - 1] == pytest.approx(len(mine & true) / len(mine | true))
            expected = boundary.f(found[frame] == k, truth[frame] == k)
            assert scores[1, k - 1, frame - 1] == expected
    changed = found.copy()
    changed[[0, -1]] = 0
    np.testing.assert_array_equal(video.scored(changed, truth, 3), scores)


def test_objects_that_are_gone_or_never_found():
    truth, found = (np.zeros((4, 8, 8), np.uint8) for _ in range(2))
    truth[:2, 2:5, 2:5] = 1  # gone in the third frame
    scores = video.scored(found, truth, 2)  # the second one is nowhere
    assert scores[:, 0].tolist() == [[0, 1]] * 2 and (scores[:, 1] == 1).all()
    np.testing.assert_array_equal(video.scored(truth, truth, 1), 1)
    truth[:, 0, 0], found[:, 0, 0] = 255, 1  # what is not to be counted is no object
    assert (video.scored(found, truth, 1)[0, 0] == 0).all()


def test_other_shapes_and_too_few_frames_are_refused():
    with pytest.raises(ValueError, match="three or more frames"):
        video.scored(np.zeros((3, 4, 4)), np.zeros((4, 4, 4)), 1)
    with pytest.raises(ValueError, match="three or more frames"):
        video.scored(np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), 1)
