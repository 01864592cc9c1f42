"""The confusion matrix of segmentation against torchmetrics and scikit-learn, on random and degenerate label maps."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

from engine.evals.metrics import confusion as c

VOID = 255


def maps(seed: int, classes: int = 5, shape=(13, 17), void: float = 0.2, absent: tuple[int, ...] = ()):
    """A truth with void pixels, and a prediction that agrees with about half of it; some classes occur in neither."""
    rng = np.random.default_rng(seed)
    present = np.setdiff1d(np.arange(classes), absent)
    truth = rng.choice(present, shape)
    predicted = np.where(rng.random(shape) < 0.5, truth, rng.choice(present, shape))
    truth = np.where(rng.random(shape) < void, VOID, truth)
    return truth.astype(np.uint8), predicted.astype(np.uint8)


@pytest.mark.parametrize("absent", [(), (2,), (0, 4), (1, 2, 3, 4)])
def test_figures_over_several_images_are_torchmetrics(absent):
    images = [maps(seed, absent=absent) for seed in range(4)]
    found = c.SegmentationCounts(5)
    of = {"num_classes": 5, "ignore_index": VOID}
    matrix, jaccard = MulticlassConfusionMatrix(**of), MulticlassJaccardIndex(**of, average="macro")
    by_class, micro = MulticlassJaccardIndex(**of, average="none"), MulticlassAccuracy(**of, average="micro")
    macro = MulticlassAccuracy(**of, average="macro")
    for truth, predicted in images:
        found.add(truth, predicted)
        for metric in (matrix, jaccard, by_class, micro, macro):
            metric.update(torch.from_numpy(predicted).long(), torch.from_numpy(truth).long())
    values, _ = found.figures()
    assert found.matrix_KK.dtype == np.int64
    np.testing.assert_array_equal(found.matrix_KK, matrix.compute().numpy())
    assert values["mIoU"] == pytest.approx(float(jaccard.compute()), abs=1e-6)
    assert values["pixel accuracy"] == pytest.approx(float(micro.compute()), abs=1e-6)
    assert values["mean class accuracy"] == pytest.approx(float(macro.compute()), abs=1e-6)
    np.testing.assert_allclose(np.nan_to_num(c.class_iou(found.matrix_KK)), by_class.compute().numpy(), atol=1e-6)
    assert np.flatnonzero(np.isnan(c.class_iou(found.matrix_KK))).tolist() == list(absent)


def test_the_mean_within_an_image_is_torchmetrics_segmentation_score():
    images = [maps(seed, void=0, absent=(seed,)) for seed in range(3)]
    found, expected = c.SegmentationCounts(5), []
    for truth, predicted in images:
        found.add(truth, predicted)
        score = MeanIoU(num_classes=5, input_format="index", per_class=True)
        of_class = score(torch.from_numpy(predicted).long()[None], torch.from_numpy(truth).long()[None])
        expected.append(float(of_class[np.union1d(truth, predicted).tolist()].mean()))
    values, samples = found.figures("x ")
    assert samples["x image mIoU"].shape == (3,) and samples["x image mIoU"].dtype == np.float64
    agreement = [np.mean(truth == predicted) for truth, predicted in images]
    np.testing.assert_allclose(samples["x image pixel accuracy"], agreement)
    assert values["x image pixel accuracy"] == pytest.approx(np.mean(agreement))
    assert values["x image mIoU"] == pytest.approx(samples["x image mIoU"].mean())
    assert values["x image mIoU"] != pytest.approx(values["x mIoU"], abs=1e-4)
    np.testing.assert_allclose(samples["x image mIoU"], expected, atol=1e-6)


@given(
    pairs=st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, VOID]), st.integers(0, 3)), min_size=1, max_size=60),
)
def test_any_pixels_agree_with_scikit_learn(pairs):
    truth, predicted = (np.array(column) for column in zip(*pairs))
    matrix = c.confusion(truth, predicted, 4)
    t, p = truth[truth != VOID], predicted[truth != VOID]
    if not len(t):
        assert not matrix.any() and np.isnan(c.mean_iou(matrix)) and np.isnan(c.pixel_accuracy(matrix))
        return
    np.testing.assert_array_equal(matrix, sklearn.metrics.confusion_matrix(t, p, labels=range(4)))
    present = np.union1d(t, p)
    assert c.mean_iou(matrix) == pytest.approx(sklearn.metrics.jaccard_score(t, p, labels=present, average="macro"))
    assert c.pixel_accuracy(matrix) == pytest.approx(sklearn.metrics.accuracy_score(t, p))
    recall = sklearn.metrics.recall_score(t, p, labels=np.unique(t), average="macro")
    assert c.mean_class_accuracy(matrix) == pytest.approx(recall)


def test_a_class_that_is_only_predicted_counts_as_not_found():
    matrix = c.confusion(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), 4)
    np.testing.assert_array_equal(c.class_iou(matrix), [1, 0.5, 0, np.nan])
    assert c.mean_iou(matrix) == 0.5
    np.testing.assert_array_equal(c.class_accuracy(matrix), [1, 0.5, np.nan, np.nan])
    assert c.mean_class_accuracy(matrix) == 0.75


def test_one_class_and_no_counted_pixel():
    assert c.mean_iou(c.confusion(np.zeros((2, 3)), np.zeros((2, 3)), 1)) == 1
    found = c.SegmentationCounts(3)
    found.add(np.full((4, 4), VOID, np.uint8), np.ones((4, 4), np.uint8))
    assert all(np.isnan(value) for value in found.figures()[0].values())
    found.add(np.ones((4, 4), np.uint8), torch.ones(4, 4, dtype=torch.int64))
    values, samples = found.figures()
    assert set(values.values()) == {1.0}
    np.testing.assert_array_equal(samples["image mIoU"], [np.nan, 1])


def test_what_is_no_label_is_refused():
    for truth, predicted in (([0, 3], [0, 0]), ([0, 1], [0, 3]), ([0, -1], [0, 0]), ([0, 1], [0, 255])):
        with pytest.raises(ValueError, match=r"has 3 classes, and a (truth|prediction) from"):
            c.confusion(np.array(truth), np.array(predicted), 3)
    with pytest.raises(ValueError, match=r"got \[2\] and \[3\]"):
        c.confusion(np.zeros(3, np.uint8), np.zeros(2, np.uint8), 3)
