"""Low-shot segmentation: the rule of its draws, each draw as plain logistic regression on its images, what is refused."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from engine.core.errors import BadInput
from engine.data.annotated.dense import Frame
from engine.evals import semantic_patches
from engine.evals.metrics.confusion import SegmentationCounts
from engine.evals.protocols import segment_lowshot as low
from tests.evals.painted import paint
from tests.evals.protocols.test_segment_patches import Seeing, micro, objects, spoilt

FEW = {"shots": (1, 2), "percents": (25.0,), "sweep": (1.0,)}


@pytest.fixture
def pair(tmp_path):
    return paint(tmp_path, "train", objects(0, 20, kinds=3)), paint(tmp_path, "val", objects(1, 4, kinds=3))


def test_each_class_but_the_background_occurs_often_enough(pair):
    result = low.evaluate(Seeing(), *pair, low.Settings(**FEW))
    train = pair[0]
    for shots in (1, 2):
        for draw in result.details["draws"][f"{shots}-shot"]:
            rows = [train.images.paths.index(path) for path in draw["images"]]
            shown = np.stack([np.bincount(train.semantic(row).ravel(), minlength=5) > 0 for row in rows])
            assert (shown[:, 1:4].sum(0) >= shots).all() and not shown[:, 4].any()
            assert draw["patches"] == 64 * len(rows) and draw["classes without a patch"] == ["colour 3"]
            assert len(rows) < 4 * shots
    shares = result.details["draws"]["25%"]
    assert [len(draw["images"]) for draw in shares] == [5, 5, 5]
    assert len({tuple(draw["images"]) for draw in shares}) == 3
    assert result.counts["classes that occur in no training image"] == 1
    assert result.values["2-shot mIoU"] == 1 and result.values["2-shot mIoU std"] == 0


def test_a_draw_is_logistic_regression_on_the_patches_of_its_images(pair):
    settings = low.Settings(shots=(2,), percents=(), draws=(4, 1), sweep=(), c=0.5, tolerance=1e-9, max_iterations=5000)
    subject, (train, test) = micro(), pair
    result = low.evaluate(subject, train, test, settings)
    how, scores, samples = Frame(64, "square", 8), [], []

    def patches(images, rows):
        chosen = np.zeros((len(images), 8, 8), bool)
        chosen[rows] = True
        labels = np.stack([images.semantic(row)[::8, ::8] for row in rows])  # squares lie on the grid
        return semantic_patches.features(subject, images, how, chosen).numpy(), labels

    queries, _ = patches(test, range(4))
    for draw in result.details["draws"]["2-shot"]:
        x, labels = patches(train, [train.images.paths.index(path) for path in draw["images"]])
        scaler = StandardScaler().fit(x)
        ones = [np.c_[scaler.transform(values), np.ones(len(values))] for values in (x, queries)]
        theirs = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-9, max_iter=5000).fit(ones[0], labels.ravel())
        counts = SegmentationCounts(5)
        for row, found in enumerate(theirs.predict(ones[1]).reshape(4, 8, 8)):
            counts.add(test.semantic(row), found.repeat(8, 0).repeat(8, 1))
        scores.append(counts.figures()[0]["mIoU"])
        samples.append(counts.samples["image mIoU"])
    assert result.values["2-shot mIoU"] == pytest.approx(np.mean(scores))
    assert result.values["2-shot mIoU std"] == pytest.approx(np.std(scores))
    np.testing.assert_allclose(result.samples["2-shot image mIoU"], np.mean(samples, 0))


def test_the_result_says_what_was_used(pair):
    result = low.evaluate(micro(), *pair, low.Settings(**FEW, most_patches=100))
    json.dumps(result.settings | result.details | result.counts, allow_nan=False)
    assert result.settings["recipe"].startswith("a proposal")
    assert result.headline == ("1-shot mIoU", "2-shot mIoU", "25% mIoU")
    for name, samples in result.samples.items():
        assert samples.shape == (4,) and samples.mean() == pytest.approx(result.values[name])
    table = result.details["mIoU by C, mean over draws"]
    assert [row["C"] for row in table] == [0.1, 1] and table[0]["1-shot"] == pytest.approx(result.values["1-shot mIoU"])
    assert {draw["patches"] for draws in result.details["draws"].values() for draw in draws} == {100}
    assert len(result.pictures) == 2 and all(isinstance(picture, Figure) for picture in result.pictures.values())


def test_published_lists_take_the_place_of_draws(tmp_path, pair):
    for folder, names in (("a", ("0", "1", "2", "5")), ("b", ("3", "4", "5", "6"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "four.txt").write_text("".join(f"{name}.png\n" for name in names))
    files = tuple(tmp_path / folder / "four.txt" for folder in "ab")
    result = low.evaluate(Seeing(), *pair, low.Settings(files=files, sweep=()))
    assert result.headline == ("four mIoU",) and result.values["four mIoU"] == 1
    assert [len(draw["images"]) for draw in result.details["draws"]["four"]] == [4, 4]
    (tmp_path / "b" / "four.txt").write_text("elsewhere.png\n")
    with pytest.raises(BadInput, match=r"four\.txt names elsewhere\.png"):
        low.check(*pair, low.Settings(files=files))


def test_what_cannot_be_judged_is_refused(pair):
    train, test = pair
    void = [spoilt(images, lambda mask: np.full_like(mask, 255)) for images in pair]
    with pytest.raises(BadInput, match="no class occurs in 1 training images; choose fewer shots"):
        low.evaluate(Seeing(), spoilt(train, np.zeros_like), test)
    with pytest.raises(BadInput, match="no class occurs in 99 training images"):
        low.evaluate(Seeing(), train, test, low.Settings(shots=(99,)))
    with pytest.raises(BadInput, match="no pixel of the test set is to be counted"):
        low.evaluate(Seeing(), train, void[1], low.Settings(**FEW))
    only = spoilt(train, np.zeros_like)
    with pytest.raises(BadInput, match=r"segment_lowshot 25%: the 5 images of draw 0 have patches of 1 class"):
        low.evaluate(Seeing(), only, test, low.Settings(shots=(), percents=(25.0,)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shots": (0,)}, {"percents": (0.0,)}, {"draws": ()}, {"draws": (1, 1)}, {"c": 0.0}, {"sweep": (-1.0,)},
        {"size": -1}, {"most_patches": -1}, {"max_iterations": 0}, {"tolerance": 0.0}, {"shots": (), "percents": ()},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        low.Settings(**wrong)
