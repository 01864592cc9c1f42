"""Segmentation by frozen patches: both classifiers against scikit-learn, the whole against a restatement, what is refused."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torchmetrics.classification import MulticlassJaccardIndex

from engine.core.errors import BadInput
from engine.data.annotated import dense
from engine.data.annotated.dense import Frame
from engine.evals.features import encoder_of, raw_pixels
from engine.evals.protocols import segment_patches as sp
from engine.evals.subject import Subject
from engine.model.vit import create
from tests.evals.painted import Eye, paint


@dataclass(frozen=True)
class Seeing(Eye):
    """A `Subject` that tells colours apart without error."""

    batch_size: int = 3
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    def maps(self, images_B3HW: torch.Tensor, layer: str = "norm") -> torch.Tensor:
        return super().maps(images_B3HW, layer)


def objects(seed: int, count: int, aligned: bool = True, kinds: int = 4):
    """Squares of one or two categories per picture, on the grid of patches or off it."""
    rng, step = np.random.default_rng(seed), 8 if aligned else 1
    pictures = []
    for number in range(count):
        corners = step * rng.integers(0, 32 // step, (2, 2)) + 16 * np.array([[0, 0], [1, 1]])
        squares = [(slice(y, y + 16), slice(x, x + 16)) for y, x in corners]
        pictures.append(
            [((number + place) % kinds, where, False) for place, where in enumerate(squares[: 1 + number % 2])]
        )
    return pictures


@pytest.fixture
def pair(tmp_path):
    return paint(tmp_path, "train", objects(0, 12)), paint(tmp_path, "val", objects(1, 5))


def micro(**how) -> Subject:
    model = create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(0))
    return Subject("micro", encoder_of(model), **how)


def noisy(seed: int, count: int = 300, classes: int = 4, width: int = 12):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    values = 3 * centres[labels] + 4 * rng.normal(size=(count, width)) + 5
    return values.astype(np.float32), labels


@pytest.mark.parametrize("standardise", [True, False])
def test_neighbours_are_scikit_learns(standardise):
    (x, y), (queries, _) = noisy(0), noisy(1)
    settings = sp.Settings(k=7, temperature=0.2, standardise=standardise)
    predict = sp.by_neighbours(torch.from_numpy(x), torch.from_numpy(y), 4, settings)
    scale = StandardScaler().fit(x).transform if standardise else (lambda values: values)
    theirs = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.2))
    expected = theirs.fit(scale(x), y).predict(scale(queries))
    np.testing.assert_array_equal(predict(torch.from_numpy(queries)).numpy(), expected)
    assert len(np.unique(expected)) == 4


def test_logistic_regression_is_scikit_learns_and_an_absent_class_is_never_predicted():
    (x, y), (queries, _) = noisy(0), noisy(1)
    y = np.where(y == 1, 5, y)  # classes 0, 2, 3, 5
    settings = sp.Settings(tolerance=1e-9, max_iterations=5000)
    fits = sp.fitted(torch.from_numpy(x), torch.from_numpy(y), (0.001, 1.0), settings)
    scaler = StandardScaler().fit(x)
    for c, (predict, converged) in fits.items():
        theirs = LogisticRegression(C=c, fit_intercept=False, tol=1e-9, max_iter=5000)
        ones = [np.c_[scaler.transform(values), np.ones(len(values))] for values in (x, queries)]
        expected = theirs.fit(ones[0], y).predict(ones[1])
        np.testing.assert_array_equal(predict(torch.from_numpy(queries)).numpy(), expected)
        assert converged and set(expected.tolist()) <= {0, 2, 3, 5} and len(np.unique(expected)) > 1


def test_who_sees_the_classes_segments_as_well_as_the_grid_allows(tmp_path, pair):
    found = sp.evaluate(Seeing(), *pair, sp.Settings(k=5))
    figures = ("k-NN mIoU", "logistic mIoU", "k-NN pixel accuracy", "logistic image mIoU")
    assert all(found.values[figure] == 1 for figure in figures)
    beside = paint(tmp_path / "beside", "val", objects(1, 5, aligned=False))
    values = sp.evaluate(Seeing(), pair[0], beside, sp.Settings(k=5)).values
    bound = values["mIoU of the true class of each patch"]
    assert 0.5 < bound < 1
    assert values["logistic mIoU"] == pytest.approx(bound, abs=0.02) == values["k-NN mIoU"]
    blind = sp.evaluate(Seeing(blind=True), *pair, sp.Settings(k=5))
    assert blind.values["logistic mIoU"] == pytest.approx(blind.details["mIoU of the most frequent class everywhere"])


def test_the_whole_is_a_plain_restatement(tmp_path):
    train = paint(tmp_path, "train", objects(0, 12, aligned=False), (64, 80))
    test = paint(tmp_path, "val", objects(1, 5, aligned=False), (48, 72))
    subject, settings = micro(batch_size=2), sp.Settings(size=64, k=9, c=(0.1,), tolerance=1e-9, max_iterations=5000)
    found = sp.evaluate(subject, train, test, settings)
    how = Frame(64, "square", 8)

    def read(images):
        inputs = torch.stack([how.image(dense.read(images.images, i)) for i in range(len(images))])
        truth = [images.semantic(i) for i in range(len(images))]
        maps = subject.maps(dense.normalised(inputs)).flatten(0, 2).numpy()
        return StandardScaler().fit_transform(maps) if images is train else maps, truth, maps

    x, train_truth, raw = read(train)
    queries = StandardScaler().fit(raw).transform(read(test)[0])
    y = []
    for mask in train_truth:
        sized = how.masks(torch.from_numpy(mask)).numpy()
        y += [
            np.bincount(sized[r : r + 8, s : s + 8].ravel()).argmax() for r in range(0, 64, 8) for s in range(0, 64, 8)
        ]
    theirs = {
        "k-NN": KNeighborsClassifier(9, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, y).predict(queries),
        "logistic": LogisticRegression(C=0.1, fit_intercept=False, tol=1e-9, max_iter=5000)
        .fit(np.c_[x, np.ones(len(x))], y)
        .predict(np.c_[queries, np.ones(len(queries))]),
    }  # fmt: skip
    for name, predicted in theirs.items():
        jaccard, accuracies = MulticlassJaccardIndex(5), []
        for labels, truth in zip(predicted.reshape(-1, 8, 8), read(test)[1], strict=True):
            rows, columns = (np.arange(side) * 8 // side for side in truth.shape)
            at_pixels = labels[rows][:, columns]
            jaccard.update(torch.from_numpy(at_pixels), torch.from_numpy(truth))
            accuracies.append((at_pixels == truth).mean())
        assert found.values[f"{name} mIoU"] == pytest.approx(float(jaccard.compute()), abs=1e-6)
        np.testing.assert_allclose(found.samples[f"{name} image pixel accuracy"], accuracies)
    assert found.counts["training patches"] == len(y) and found.counts["test pixels"] == 5 * 48 * 72


def test_the_result_says_what_was_used(pair):
    settings = sp.Settings(k=5, most_patches=200, c=(1e-6, 1.0))
    result = sp.evaluate(micro(), *pair, settings)
    json.dumps(result.settings | result.details | result.counts, allow_nan=False)
    for name, samples in result.samples.items():
        assert samples.shape == (5,) and samples.mean() == pytest.approx(result.values[name])
    assert result.settings["size"] == 64 and result.settings["recipe"].startswith("after CAPI")
    assert result.settings["chosen C"] in settings.c and [row["C"] for row in result.details["choice of C"]] == [
        1e-6,
        1,
    ]
    assert result.counts["training patches"] == 200
    assert result.counts["labelled training patches not drawn"] == 12 * 64 - 200
    assert len(result.pictures) == 3 and all(isinstance(picture, Figure) for picture in result.pictures.values())
    assert sp.evaluate(micro(), *pair, settings).values == result.values


def test_the_strength_is_that_which_does_best_on_held_out_images():
    x, y = noisy(0, 600)
    image = np.arange(600) // 20
    c, rows = sp.chosen_c(torch.from_numpy(x), torch.from_numpy(y), image, 4, sp.Settings(seed=5))
    scores = [row["held-out mIoU of patches"] for row in rows]
    assert [row["C"] for row in rows] == sorted(sp.Settings().c) and len(set(scores)) > 1
    assert c == rows[int(np.argmax(scores))]["C"]
    held = np.random.RandomState(5).permutation(30)[:3]
    used = ~np.isin(image, held)
    predict, _ = sp.fitted(torch.from_numpy(x[used]), torch.from_numpy(y[used]), (c,), sp.Settings())[c]
    jaccard = MulticlassJaccardIndex(4)(predict(torch.from_numpy(x[~used])), torch.from_numpy(y[~used]))
    assert max(scores) == pytest.approx(float(jaccard), abs=0.02)


def spoilt(images, change):
    """The set with other masks."""

    class Changed:
        semantic_classes = images.semantic_classes

        def __init__(self):
            self.images = images.images

        def __len__(self):
            return len(images)

        def semantic(self, index):
            return change(images.semantic(index).copy())

    return Changed()


def test_void_pixels_count_nowhere(pair):
    def bordered(mask):
        mask[:8] = 255
        return mask

    train, test = (spoilt(images, bordered) for images in pair)
    result = sp.evaluate(Seeing(), train, test, sp.Settings(k=5))
    assert result.counts["void training patches left out"] == 12 * 8
    assert result.counts["test pixels"] == 5 * 56 * 64 and result.values["k-NN mIoU"] == 1


def test_what_cannot_be_judged_is_refused(tmp_path, pair):
    train, test = pair
    void = [spoilt(images, lambda mask: np.full_like(mask, 255)) for images in pair]
    ground = spoilt(train, np.zeros_like)
    with pytest.raises(BadInput, match="training set has 0 labelled patches of 0 classes"):
        sp.evaluate(Seeing(), void[0], test)
    with pytest.raises(BadInput, match="training set has 768 labelled patches of 1 classes; it needs at least k = 20"):
        sp.evaluate(Seeing(), ground, test)
    with pytest.raises(BadInput, match="no pixel of the test set is to be counted, all are 255"):
        sp.evaluate(Seeing(), train, void[1])
    with pytest.raises(BadInput, match="it needs at least k = 2000"):
        sp.evaluate(Seeing(), train, test, sp.Settings(k=2000))
    with pytest.raises(BadInput, match="size = 60 is no multiple of the patch size 8"):
        sp.evaluate(Seeing(), train, test, sp.Settings(size=60))
    with pytest.raises(BadInput, match="contain NaN or infinity"):
        sp.evaluate(Seeing(scale=float("nan")), train, test)
    with pytest.raises(BadInput, match="give the weights of a ViT"):
        sp.evaluate(Subject("raw", raw_pixels()), train, test)
    with pytest.raises(BadInput, match="needs two training images"):
        sp.check(paint(tmp_path / "one", "train", objects(0, 1)), test, sp.Settings())
    two = paint(tmp_path / "two", "train", [objects(0, 1)[0], []])
    with pytest.raises(BadInput, match="but for the images held out"):
        [sp.evaluate(Seeing(), two, test, sp.Settings(k=5, seed=seed)) for seed in range(8)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -8}, {"k": 0}, {"temperature": 0}, {"c": ()}, {"c": (0.0,)}, {"max_iterations": 0}, {"tolerance": 0},
        {"most_patches": -1},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        sp.Settings(**wrong)
