"""Prompting patches on flat pictures, whose figures are known, and against scikit-image, scikit-learn and restatements."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu
from sklearn.metrics import average_precision_score, roc_auc_score

from engine import evals
from engine.core.errors import BadInput
from engine.evals.metrics.boundary import f, j
from engine.evals.protocols import prompt
from engine.model.vit import create
from tests.evals.painted import Eye, paint

ALL = slice(None)
LEFT, MIDDLE, RIGHT = (ALL, slice(0, 16)), (ALL, slice(16, 40)), (ALL, slice(40, 64))
CORNER, DOT = (slice(8, 19), slice(48, 62)), (slice(2, 8), slice(20, 26))
THICK = (slice(3, 45), slice(5, 40))
HALF = int(np.flatnonzero(prompt.THRESHOLDS == 0.5)[0])


def stripes(scale: float = 1.0, blind: bool = False) -> tuple[torch.Tensor, np.ndarray]:
    """Features [8, 8, 3] of two flat objects left and right of a background, and the left one's mask."""
    kind = torch.tensor([0, 0, 2, 2, 2, 1, 1, 1]).expand(8, 8)
    features = torch.nn.functional.one_hot(kind, 3).float() * scale
    mask = np.zeros((64, 64), bool)
    mask[LEFT] = True
    return torch.ones_like(features) * scale if blind else features, mask


def of_stripes(**how) -> tuple[np.ndarray, np.ndarray]:
    """IoU by threshold, and figures, of the left stripe."""
    features, mask = stripes(**how)
    ignored = np.zeros_like(mask)
    pixels = prompt.prompts(mask, 3, 0)
    (map_, *others) = prompt.similarity_maps(features, prompt.patches.patch_of(pixels, (64, 64), (8, 8)), (64, 64))
    for other in others:
        np.testing.assert_array_equal(other, map_)
    ious = prompt.iou_by_threshold(map_, mask, ignored)
    return ious, prompt.figures(map_, mask, ignored, ious, HALF)


def test_two_flat_objects_are_found_as_well_as_the_grid_allows():
    _, mask = stripes()
    ious, found = of_stripes()
    assert prompt.grid_iou(mask, np.zeros_like(mask), (8, 8)) == 1
    named = dict(zip(prompt.FIGURES, found, strict=True))
    assert named == dict.fromkeys(prompt.FIGURES, 1.0)
    assert ious[HALF] == ious.max() == 1


def test_constant_features_find_everything_or_nothing():
    _, mask = stripes()
    ious, found = of_stripes(blind=True)
    assert ious.max() == mask.mean() == 0.25
    named = dict(zip(prompt.FIGURES, found, strict=True))
    assert (named["AUROC"], named["AP"]) == (0.5, 0.25)
    assert [named[f"IoU, {regime}"] for regime in prompt.REGIMES] == [0.25] * 3


def test_the_scale_of_features_does_not_matter():
    features = torch.randn(8, 8, 5, generator=torch.Generator().manual_seed(0))
    _, mask = stripes()
    found = []
    for scale in (1.0, 1e-3, 37.0):
        (map_,) = prompt.similarity_maps(features * scale, np.array([[4, 1]]), (64, 64))
        ious = prompt.iou_by_threshold(map_, mask, np.zeros_like(mask))
        found.append(prompt.figures(map_, mask, np.zeros_like(mask), ious, 9))
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    np.testing.assert_allclose(found[2], found[0], atol=1e-4)
    assert 0.3 < found[0][-1] < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_independent_ones(seed):
    rng = np.random.default_rng(seed)
    map_ = (gaussian_filter(rng.normal(size=(30, 44)), 2) * 3).clip(-1, 1).round(2)
    truth = gaussian_filter(rng.normal(size=map_.shape), 3) + 0.1 * map_ > 0.05
    ignored = (rng.random(map_.shape) < 0.1) & ~truth
    ious = prompt.iou_by_threshold(map_, truth, ignored)
    assert ious.tolist() == pytest.approx([j(map_ >= t, truth, ignored) for t in prompt.THRESHOLDS])
    one, oracle, otsu, ap, auroc = np.split(prompt.figures(map_, truth, ignored, ious, 5), [3, 6, 9, 10])
    thresholds = (prompt.THRESHOLDS[5], prompt.THRESHOLDS[ious.argmax()], threshold_otsu(map_))
    for found, threshold in zip((one, oracle, otsu), thresholds, strict=True):
        iou, border = j(map_ >= threshold, truth, ignored), f(map_ >= threshold, truth, ignored=ignored)
        assert found.tolist() == pytest.approx([iou, border, (iou + border) / 2])
    assert oracle[0] >= max(one[0], ious.max())
    labels, scores = truth[~ignored], map_[~ignored]
    assert ap[0] == pytest.approx(average_precision_score(labels, scores))
    assert auroc[0] == pytest.approx(roc_auc_score(labels, scores))


def test_thresholds_are_those_of_the_sheet():
    np.testing.assert_array_equal(prompt.THRESHOLDS, np.linspace(-0.2, 0.95, 24).round(2))


def test_the_interior_point_is_furthest_from_all_else():
    mask = gaussian_filter(np.random.default_rng(3).normal(size=(40, 40)), 4) > 0.02
    row, column = prompt.interior_point(mask)
    outside = np.argwhere(~np.pad(mask, 1)) - 1

    def clearance(y, x):
        return np.hypot(*(outside - (y, x)).T).min()

    assert clearance(row, column) == max(clearance(y, x) for y, x in np.argwhere(mask))
    everywhere = prompt.interior_point(np.ones((9, 9), bool))
    assert everywhere.tolist() == [4, 4]


def test_random_prompts_lie_on_the_mask_evenly_and_repeat():
    mask = np.zeros((12, 12), bool)
    mask[3:5, 6:11] = True
    drawn = prompt.prompts(mask, 2000, 7, 1)
    assert mask[tuple(drawn.T)].all()
    np.testing.assert_array_equal(drawn, prompt.prompts(mask, 2000, 7, 1))
    assert (drawn != prompt.prompts(mask, 2000, 8, 1)).any()
    counts = np.unique(drawn[1:], axis=0, return_counts=True)[1]
    assert len(counts) == 10 and counts.min() > 150


def test_patches_that_the_truth_covers_by_more_than_half():
    mask = np.zeros((16, 24), bool)
    mask[0:8, 0:13] = True  # of the second patch 5 of 8 columns
    assert prompt.grid_iou(mask, np.zeros_like(mask), (2, 3)) == 13 / 16
    mask[:, 12] = False  # just half of it
    assert prompt.grid_iou(mask, np.zeros_like(mask), (2, 3)) == 8 / 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    train = paint(folder, "train", [[(0, LEFT, False), (1, RIGHT, False)]] * 10)
    test = paint(
        folder,
        "val",
        [
            [(0, LEFT, False), (1, RIGHT, False)],
            [(1, LEFT, False), (0, CORNER, False), (2, DOT, False)],
            [(3, (ALL, ALL), False)],
            [(0, THICK, False), (0, CORNER, True)],
            [],
        ],
    )
    return train, test


def test_a_model_that_sees_colours_finds_flat_objects(sets):
    result = prompt.evaluate(Eye(), *sets, prompt.Settings(layers=("norm",), random_prompts=2))
    assert result.counts == {
        "test images": 4,
        "ignored objects": 1,
        "objects": 5,
        "left out, smaller than a patch": 1,
        "left out, fill the image": 1,
        "objects that the threshold was chosen on": 2,
    }
    samples = result.samples["IoU, one threshold: norm, interior point"]
    np.testing.assert_array_equal(np.isnan(samples), [False, False, False, False, True, True, False])
    np.testing.assert_array_equal(samples[:3], 1)
    assert 0.45 <= result.settings["one threshold"]["norm"] <= 0.55  # half-way between the centres of two patches
    assert 0.5 < samples[6] < 1
    for name, each in result.samples.items():
        assert result.values[name] == pytest.approx(np.nanmean(each))
    of_class_0 = np.nanmean(samples[[0, 3, 6]])
    assert result.values["IoU, one threshold: norm, interior point, over classes"] == pytest.approx(
        (of_class_0 + 1) / 2
    )
    assert set(result.details) == {*prompt.REGIMES, "without a threshold"}
    assert len(result.pictures) == 3
    assert all(name in result.values for name in result.headline)
    assert not any("oracle" in name or "Otsu" in name for name in result.headline)


def test_the_scale_of_features_does_not_matter_to_the_whole(sets):
    settings = prompt.Settings(layers=("norm",), random_prompts=2)
    small, large = (prompt.evaluate(Eye(scale), *sets, settings).values for scale in (0.01, 50.0))
    assert small == large


def test_a_blind_model_finds_what_share_the_objects_have(sets):
    result = prompt.evaluate(Eye(blind=True), *sets, prompt.Settings(layers=("norm",), random_prompts=0))
    areas = result.samples["IoU, oracle thresholds (upper bound): norm, interior point"]
    # the crowd's pixels don't count
    crowd, thick = 11 * 14, 42 * 35
    np.testing.assert_allclose(areas[[0, 1, 2, 6]], [0.25, 0.375, 0.25, thick / (64 * 64 - crowd)])
    assert result.values["AUROC: norm, interior point"] == pytest.approx(0.5)
    assert not any("random" in name for name in result.values)


def test_inputs_are_reported_apart_and_objects_are_drawn(sets):
    settings = prompt.Settings(inputs=("crop:64", "short:128"), random_prompts=1, most_objects=3)
    result = prompt.evaluate(Eye(), *sets, settings)
    assert result.values["IoU, one threshold: keys, interior point at short:128"] > 0.5
    assert {len(each) for each in result.samples.values()} == {3}
    assert result.settings["one threshold"].keys() == {f"{a} at {b}" for a in ("norm", "keys") for b in settings.inputs}


def test_a_threshold_from_the_test_set_is_chosen_on_images_that_do_not_count(sets):
    settings = prompt.Settings(layers=("norm",), random_prompts=0, chosen_on="test")
    on, choosing, judged = prompt._sets(*sets, settings)
    assert on is sets[1]
    assert len(choosing) == 1 and not set(choosing) & set(judged)
    assert set(choosing) | set(judged) == {0, 1, 2, 3}


def test_two_seeds_of_random_prompts_report_their_spread(sets):
    model = create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(0), depth=1)
    (result,) = evals.evaluate(
        {"small": model},
        evals.Sets(objects=sets),
        ("prompt",),
        settings={"prompt": prompt.Settings(layers=("norm",), random_prompts=2)},
        seeds=2,
        threads=1,
    )
    runs = [run["IoU, one threshold: norm, random pixels"] for run in result.details["by seed"].values()]
    assert len(set(runs)) == 2
    assert result.values["IoU, one threshold: norm, random pixels"] == pytest.approx(np.mean(runs))
    assert result.values["IoU, one threshold: norm, random pixels std"] >= np.std(runs)
    assert result.values["IoU, one threshold: norm, interior point std"] == 0


def test_default_inputs_fit_the_set_and_the_patch(sets):
    assert prompt.inputs_for(sets[1], prompt.Settings(), 14) == ("crop:70",)
    images = dataclasses.replace(sets[1].images, sizes=sets[1].images.sizes * 8)
    large = dataclasses.replace(sets[1], images=images)
    assert prompt.inputs_for(large, prompt.Settings(), 16) == ("crop:224", "short:480")
    assert prompt.inputs_for(large, prompt.Settings(), 14) == ("crop:224", "short:476")


def test_what_cannot_be_judged(sets, tmp_path):
    train, test = sets
    for settings, said in (({"random_prompts": -1}, "random prompts"), ({"layers": ("x",)}, "norm, keys")):
        with pytest.raises(BadInput, match=said):
            prompt.Settings(**settings)
    crowds = paint(tmp_path / "a", "val", [[(0, LEFT, True)], []])
    with pytest.raises(BadInput, match="the test set has no object that counts"):
        prompt.check(train, crowds, prompt.Settings())
    with pytest.raises(BadInput, match="the training set has no object that counts"):
        prompt.check(crowds, test, prompt.Settings())
    dots = paint(tmp_path / "b", "val", [[(0, DOT, False)]])
    with pytest.raises(BadInput, match="each test object is smaller than a patch"):
        prompt.evaluate(Eye(), train, dots)
    with pytest.raises(BadInput, match="each object that the threshold is chosen on"):
        prompt.evaluate(Eye(), dots, test)
    with pytest.raises(BadInput, match="two test images"):
        prompt.check(train, dots, prompt.Settings(chosen_on="test"))
    with pytest.raises(BadInput, match="features of eye contain NaN"):
        prompt.evaluate(Eye(float("nan")), train, test)
