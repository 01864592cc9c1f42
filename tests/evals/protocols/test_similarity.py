"""Pairs of patches on flat features, whose figures are known, and against restatements that list every pair."""

import itertools

import numpy as np
import pytest
import torch

from engine.core.errors import BadInput
from engine.evals.protocols import similarity
from engine.evals.protocols.similarity import BACKGROUND, Group, across, compare, groups, within
from tests.evals.painted import Eye, paint

ALL = slice(None)
LEFT, RIGHT, MIDDLE = (ALL, slice(0, 16)), (ALL, slice(40, 64)), (ALL, slice(16, 40))
CORNER, DOT = (slice(40, 64), slice(48, 64)), (slice(2, 8), slice(20, 26))


def stripes(scale: float = 1.0, blind: bool = False) -> list[Group]:
    """The groups of an image of two flat objects, left and right of a flat background."""
    kind = torch.tensor([0, 0, 2, 2, 2, 1, 1, 1]).expand(8, 8)
    features = scale * (torch.ones(8, 8, 3) if blind else torch.nn.functional.one_hot(kind, 3).float())
    masks = np.zeros((2, 64, 64), bool)
    masks[0][LEFT], masks[1][RIGHT] = True, True
    return groups(features, masks, np.array([4, 7]), np.zeros((64, 64), bool), 0.9)


def compared(image: list[Group]) -> dict[str, float]:
    intra, inter = within(image, 200, np.random.default_rng(0))
    return compare(intra.scores(), inter.scores())


def drawn(image: int, label: int, n: int, seed: int) -> Group:
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).double()
    return Group(image, label, torch.nn.functional.normalize(features, dim=-1))


@pytest.mark.parametrize("background", [False, True])
def test_two_flat_objects_do_not_overlap(background):
    found = compared([group for group in stripes() if background or group.label != BACKGROUND])
    assert (found["overlap"], found["AUROC"], found["equal error"]) == (0, 1, 0)
    assert (found["intra"], found["inter"], found["equal-error threshold"]) == (pytest.approx(1), 0, 0.5)
    assert found["d'"] == 999


def test_constant_features_overlap_wholly():
    found = compared(stripes(blind=True))
    assert (found["overlap"], found["AUROC"], found["d'"]) == (pytest.approx(1), pytest.approx(0.5), 0)


def test_the_scale_of_features_does_not_matter():
    def scaled(scale):
        features = scale * torch.randn(8, 8, 5, generator=torch.Generator().manual_seed(0))
        masks = np.zeros((2, 64, 64), bool)
        masks[0][LEFT], masks[1][RIGHT] = True, True
        return compared(groups(features, masks, np.array([0, 1]), np.zeros((64, 64), bool), 0.9))

    plain = scaled(1.0)
    for scale in (1e-3, 37.0):
        assert scaled(scale) == pytest.approx(plain, abs=1e-3)
    assert 0.3 < plain["AUROC"] < 0.7


def test_a_patch_belongs_to_the_object_that_has_nine_tenths_of_it():
    features = torch.arange(1, 5).float().reshape(2, 2, 1) * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 1.0])
    masks = np.zeros((2, 20, 20), bool)
    masks[0, :10, :9] = True  # 90 % of the first patch
    masks[1, 10:, 11:] = True  # 90 % of the last
    ignored = np.zeros((20, 20), bool)
    found = groups(features, masks, np.array([3, 5]), ignored, 0.9, image=2)
    assert [(group.image, group.label, len(group.features)) for group in found] == [
        (2, 3, 1),
        (2, 5, 1),
        (2, BACKGROUND, 2),
    ]
    assert [group.label for group in groups(features, masks, np.array([3, 5]), ignored, 0.91)] == [BACKGROUND]
    ignored[0, 19] = True
    assert [len(group.features) for group in groups(features, masks, np.array([3, 5]), ignored, 0.9)] == [1, 1, 1]
    masks[1, :10, :10] = True  # now two objects have the first patch
    assert [group.label for group in groups(features, masks, np.array([3, 5]), ignored, 0.9)] == [5, BACKGROUND]


def test_all_pairs_of_an_image_are_those_listed():
    image = [drawn(0, 1, 4, 0), drawn(0, 1, 1, 1), drawn(0, 2, 3, 2)]
    intra, inter = within(image, 10**6, np.random.default_rng(0))

    def listed(pairs):
        return sorted(round(float(a @ b), 6) for a, b in pairs)

    alike = [pair for group in image for pair in itertools.combinations(group.features, 2)]
    apart = [(a, b) for one, two in itertools.permutations(image, 2) for a in one.features for b in two.features]
    assert sorted(np.concatenate(intra.values).tolist()) == pytest.approx(listed(alike), abs=2e-6)
    assert sorted(np.concatenate(inter.values).tolist()) == pytest.approx(listed(apart), abs=2e-6)


def test_all_pairs_across_images_are_those_listed():
    objects = [drawn(0, 1, 2, 0), drawn(0, 1, 3, 1), drawn(1, 1, 2, 2), drawn(1, 2, 1, 3), drawn(2, 2, 2, 4)]
    same, other = across(objects, 10**6, np.random.default_rng(0))
    for pairs, alike in ((same, True), (other, False)):
        listed = sorted(
            float(a @ b)
            for one, two in itertools.permutations(objects, 2)
            if one.image != two.image and (one.label == two.label) is alike
            for a in one.features
            for b in two.features
        )
        assert sorted(np.concatenate(pairs.values).tolist()) == pytest.approx(listed, abs=2e-6)


def test_so_many_pairs_of_an_object_and_none_of_a_patch_with_itself():
    image = [drawn(0, 1, 40, 0), drawn(0, 2, 30, 1), drawn(0, 3, 2, 2)]
    intra, inter = within(image, 50, np.random.default_rng(0))
    assert [len(values) for values in intra.values] == [50, 50, 1]
    assert [len(values) for values in inter.values] == [50, 50, 50]
    assert max(values.max() for values in intra.values) < 1
    assert all(len(np.unique(values)) > 45 for values in inter.values)
    again, _ = within(image, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(np.concatenate(again.values), np.concatenate(intra.values))
    other, _ = within(image, 50, np.random.default_rng(1))
    assert (np.concatenate(other.values) != np.concatenate(intra.values)).any()


def test_each_image_has_the_same_weight():
    pairs = similarity.Pairs()
    for image, n in ((0, 30), (1, 3)):
        one = drawn(image, 0, n, image)
        pairs.add(one, np.arange(n), torch.flip(one.features, [0]))
    first, second = (values.mean() for values in pairs.values)
    assert pairs.scores().mean == pytest.approx((first + second) / 2)
    np.testing.assert_allclose(pairs.means([1, 5, 0]), [second, np.nan, first])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    train = paint(folder, "train", [[(0, LEFT, False)]])
    test = paint(
        folder,
        "val",
        [
            [(0, LEFT, False), (1, RIGHT, False)],
            [(1, LEFT, False), (0, CORNER, False), (2, DOT, False)],
            [(0, LEFT, False), (3, RIGHT, True)],
            [(2, RIGHT, True)],
            [],
        ],
    )
    return train, test


SETTINGS = similarity.Settings(layers=("norm",), inputs=("crop:64",))


def test_a_model_that_sees_colours_tells_flat_objects_apart(sets):
    result = similarity.evaluate(Eye(), *sets, SETTINGS)
    assert result.counts == {
        "test images": 3,
        "objects with a patch of their own": 5,
        "objects with two or more": 5,
        "left out, objects without": 1,
        "patches of objects": 16 + 24 + 16 + 6 + 16,
    }
    for comparison in similarity.COMPARISONS:
        assert result.values[f"{comparison} overlap: norm"] == 0
        assert result.values[f"{comparison} AUROC: norm"] == pytest.approx(1)
    np.testing.assert_array_equal(result.samples["objects AUROC, mean of images: norm"], [1, 1, np.nan])
    for name, each in result.samples.items():
        assert result.values[name] == pytest.approx(np.nanmean(each))
    assert {name for name in result.values if "overlap" in name or "equal error:" in name} == result.lower
    assert set(result.headline) <= set(result.values)
    assert len(result.pictures) == 1 and [len(rows) for rows in result.details.values()] == [3, 3]


def test_a_blind_model_tells_nothing_apart(sets):
    result = similarity.evaluate(Eye(blind=True), *sets, SETTINGS)
    for comparison in similarity.COMPARISONS:
        assert result.values[f"{comparison} overlap: norm"] == pytest.approx(1)
        assert result.values[f"{comparison} AUROC: norm"] == pytest.approx(0.5)
        assert result.values[f"{comparison} d': norm"] == 0


def test_default_inputs_give_thin_objects_patches(sets):
    assert similarity.inputs_for(sets[1], similarity.Settings(), 8) == ("crop:128",)
    assert similarity.inputs_for(sets[1], similarity.Settings(), 14) == ("crop:224",)
    result = similarity.evaluate(Eye(), *sets, similarity.Settings(layers=("keys",), most_images=2))
    assert result.settings["inputs"] == ("crop:128",)
    assert result.counts["test images"] == 2


def test_what_cannot_be_judged(sets, tmp_path):
    for settings, said in (
        ({"share": 0.5}, "share"),
        ({"pairs": 0}, "pairs"),
        ({"most_images": -1}, "most images"),
        ({"layers": ()}, "layers"),
    ):
        with pytest.raises(BadInput, match=said):
            similarity.Settings(**settings)
    crowds = paint(tmp_path / "a", "val", [[(0, LEFT, True)], []])
    with pytest.raises(BadInput, match="no object that counts"):
        similarity.evaluate(Eye(), sets[0], crowds)
    alone = paint(tmp_path / "b", "val", [[(0, LEFT, False)], [(1, LEFT, False)]])
    with pytest.raises(BadInput, match="no image two objects"):
        similarity.evaluate(Eye(), sets[0], alone)
    dots = paint(tmp_path / "c", "val", [[(0, DOT, False), (1, (slice(50, 55), slice(50, 54)), False)]])
    with pytest.raises(BadInput, match="no object has two patches"):
        similarity.evaluate(Eye(), sets[0], dots, SETTINGS)
