"""Average precision against scikit-learn's and torchmetrics', and against restatements of the two VOC forms."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score
from torchmetrics.classification import MultilabelAveragePrecision

from engine.evals.metrics.average_precision import FORMS, average_precision, class_mean, curve

RANKED = arrays.array_shapes(min_dims=2, max_dims=2, max_side=25).flatmap(
    lambda shape: st.tuples(
        arrays.arrays(np.float64, shape, elements=st.integers(-3, 3)),  # few values: many ties
        arrays.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 1])),
    )
)


def restated(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Both VOC forms threshold by threshold, from their definitions."""
    scores, targets = scores[targets != -1], targets[targets != -1]
    points = []
    for threshold in np.unique(scores):
        chosen = scores >= threshold
        hits = int((targets[chosen] == 1).sum())
        points.append((hits, hits / chosen.sum()))
    positives = int((targets == 1).sum())

    def best(hits: float) -> float:
        return max((precision for reached, precision in points if reached >= hits - 1e-9), default=0.0)

    return {
        "envelope": sum(best(hit) for hit in range(1, positives + 1)) / positives,
        "11-point": sum(best(tenth * positives / 10) for tenth in range(11)) / 11,
    }


@given(RANKED)
def test_every_form_is_what_its_definition_says(ranked):
    scores_nK, targets_nK = ranked
    found = average_precision(scores_nK, targets_nK)
    assert tuple(found) == FORMS
    for k in range(scores_nK.shape[1]):
        counted = targets_nK[:, k] != -1
        if not (targets_nK[:, k] == 1).any():
            assert all(np.isnan(found[form][k]) for form in FORMS)
            continue
        expected = restated(scores_nK[:, k], targets_nK[:, k])
        expected["step"] = average_precision_score(targets_nK[counted, k] == 1, scores_nK[counted, k])
        for form in FORMS:
            assert found[form][k] == pytest.approx(expected[form], abs=1e-12)
        assert found["envelope"][k] >= found["step"][k] - 1e-12


@given(RANKED)
def test_step_form_equals_torchmetrics(ranked):
    # torchmetrics wants two classes or more, and of each an image that counts
    scores_nK, targets_nK = (np.pad(np.hstack([each, each]), [(1, 0), (0, 0)], constant_values=1) for each in ranked)
    scores_nK = scores_nK / 8 + 0.5
    metric = MultilabelAveragePrecision(scores_nK.shape[1], average="none", ignore_index=-1)
    expected = metric(torch.from_numpy(scores_nK), torch.from_numpy(targets_nK).long())
    np.testing.assert_allclose(average_precision(scores_nK, targets_nK)["step"], expected, atol=1e-6)


def test_a_ranking_by_hand():
    """Positives at ranks 1, 4 and 5: precisions 1, 1/2, 3/5; the envelope lifts the second to 3/5."""
    scores, targets = -np.arange(1.0, 7)[:, None], np.array([1, 0, 0, 1, 1, 0])[:, None]
    found = average_precision(scores, targets)
    assert found["step"][0] == pytest.approx((1 + 1 / 2 + 3 / 5) / 3)
    assert found["envelope"][0] == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    assert found["11-point"][0] == pytest.approx((4 * 1 + 7 * 3 / 5) / 11)


def test_a_recall_of_exactly_three_tenths_counts_for_its_point():
    targets = np.array([1] * 3 + [0] * 90 + [1] * 7)[:, None]
    found = average_precision(-np.arange(100.0)[:, None], targets)
    assert found["11-point"][0] == pytest.approx((4 * 1 + 7 * 0.1) / 11)


@pytest.mark.parametrize("scores", [np.zeros(8), np.full(8, -7.5)])
def test_constant_scores_give_the_share_of_positives(scores):
    targets = np.array([1, 0, 0, 1, -1, -1, 0, 0])
    found = average_precision(scores[:, None], targets[:, None])
    assert [found[form][0] for form in FORMS] == pytest.approx([1 / 3] * 3)


def test_one_image_and_none_that_counts():
    found = average_precision(np.zeros((1, 3)), np.array([[1, 0, -1]]))
    assert all(found[form][0] == 1 and np.isnan(found[form][1:]).all() for form in FORMS)
    assert all(np.isnan(values).tolist() == [True] * 2 for values in average_precision(*np.zeros((2, 0, 2))).values())


def test_classes_without_positives_are_left_out_of_the_mean():
    assert class_mean(np.array([0.5, np.nan, 1.0])) == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(class_mean(np.array([np.nan, np.nan])))


def test_the_curve_falls_in_recall():
    rng = np.random.default_rng(0)
    precision, recall = curve(rng.normal(size=50).round(1), rng.integers(-1, 2, 50))
    assert recall[0] == 1 and (np.diff(recall) <= 0).all() and len(precision) == len(recall) and (precision <= 1).all()


def test_broken_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        average_precision(np.array([[np.nan], [1.0]]), np.array([[1], [0]]))
    with pytest.raises(ValueError, match="different shapes"):
        average_precision(np.zeros((3, 1)), np.zeros((3, 2)))
