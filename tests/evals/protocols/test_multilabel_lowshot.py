"""Multi-label low-shot: its draws, its figures against scikit-learn's, its published lists."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from engine import evals
from engine.core.errors import BadInput
from engine.data.annotated import opening as annotations
from engine.data.annotated.greedy import few_positives
from engine.evals.features import Features
from engine.evals.protocols import multilabel, multilabel_lowshot

NAMES = ("ant", "bee", "cat", "dog")
SUBSETS = ("1-positive", "2-positive", "5-positive", "1%", "10%")


def shown(seed: int, n: int = 600, **more) -> Features:
    """Images that show each of four classes in a quarter of cases; each class adds a direction of its own to the features."""
    rng = np.random.default_rng([seed, 4])
    targets = (rng.random((n, 4)) < 0.25).astype(np.int8)
    values = 2 * targets @ np.random.default_rng(0).normal(size=(4, 12)) + rng.normal(size=(n, 12))
    targets[rng.random((n, 4)) < 0.05] = -1
    more = {"classes": NAMES, "paths": tuple(f"images/{i:03d}.jpg" for i in range(n))} | more
    return Features(
        torch.tensor(values, dtype=torch.float32), None, "given", **{"targets": torch.from_numpy(targets)} | more
    )


@pytest.fixture(scope="module")
def result() -> evals.Result:
    return multilabel_lowshot.evaluate(shown(0), shown(1))


def test_draws_are_greedy_or_random_and_fixed_by_their_seeds():
    train = shown(0)
    drawn = multilabel_lowshot.subsets(train, shown(1), multilabel_lowshot.Settings())
    assert tuple(drawn) == SUBSETS and all(len(draws) == 3 for draws in drawn.values())
    for count in (1, 2, 5):
        for seed, rows in enumerate(drawn[f"{count}-positive"]):
            assert rows.tolist() == few_positives(train.targets.numpy(), count, seed).tolist()
            assert ((train.targets[rows] == 1).sum(0) >= count).all()
    assert [len(rows) for name in ("1%", "10%") for rows in drawn[name]] == [6] * 3 + [60] * 3
    assert set(drawn["1%"][2]) < set(drawn["10%"][2]) != set(drawn["10%"][1])
    other = multilabel_lowshot.subsets(train, shown(1), multilabel_lowshot.Settings(draws=(2,)))
    assert other["10%"][0].tolist() == drawn["10%"][2].tolist()


def test_figures_are_sklearns_average_precisions(result):
    train, test = shown(0), shown(1)
    x, y = (multilabel.normalised(each.values).numpy() for each in (train, test))
    for name in ("5-positive", "10%"):
        ap_DK = np.empty((3, 4))
        for draw, paths in enumerate(result.details["drawn"][name]):
            rows = np.array([train.paths.index(path) for path in paths])
            for k in range(4):
                truth, counted = train.targets[rows, k].numpy(), test.targets[:, k].numpy() != -1
                model = LogisticRegression(C=10, solver="liblinear", tol=1e-8, max_iter=10000, random_state=0)
                scores = model.fit(x[rows[truth != -1]], truth[truth != -1]).decision_function(y)
                ap_DK[draw, k] = average_precision_score(test.targets[counted, k] == 1, scores[counted])
        np.testing.assert_allclose(result.samples[f"{name} mAP (step)"], ap_DK.mean(0), atol=2e-3)
        assert result.values[f"{name} mAP (step)"] == pytest.approx(ap_DK.mean(), abs=1e-3)
        assert result.values[f"{name} mAP (step) std"] == pytest.approx(ap_DK.mean(1).std(), abs=1e-3)


def test_every_form_is_given_with_its_spread_and_the_sweep_is_named(result):
    for name in SUBSETS:
        for form in ("envelope", "step", "11-point"):
            figure = f"{name} mAP ({form})"
            assert result.values[figure] == pytest.approx(np.nanmean(result.samples[figure]))
            assert 0 <= result.values[f"{figure} std"] < 0.2
        assert result.values[f"{name} mAP (envelope)"] >= result.values[f"{name} mAP (step)"]
    assert result.values["5-positive mAP (step)"] > result.values["1-positive mAP (step)"] > 0.4
    assert result.headline == tuple(f"{name} mAP (step)" for name in SUBSETS)
    table = result.details["mAP (step) by lambda, over draws"]
    assert [row["lambda"] for row in table] == [0.00025, 0.0025, 0.01, 0.075, 0.1, 0.25]
    assert table[4] == {"lambda": 0.1} | {name: result.values[f"{name} mAP (step)"] for name in SUBSETS}
    for name in SUBSETS:
        assert result.values[f"{name} mAP (step) sweep-best"] == max(row[name] for row in table)
    assert (
        result.settings["label"].startswith("proposal")
        and "(proposal)" in result.pictures["low-shot curve"].axes[0].get_title()
    )
    assert result.details["fits that did not reach the tolerance"] == 0


def test_a_class_that_a_draw_lacks_is_left_out_of_it_and_named(tmp_path):
    train = shown(0)
    shows = train.targets.numpy() == 1
    ant, bee, cat = (np.flatnonzero(shows[:, k] & (shows.sum(1) == 1))[:3] for k in range(3))
    lists = {"a/few.txt": np.concatenate([ant, bee]), "b/few.txt": np.concatenate([ant, cat])}
    for name, rows in lists.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("\n".join(f"{row:03d}" for row in rows))
    settings = multilabel_lowshot.Settings(files=tuple(tmp_path / name for name in lists))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = multilabel_lowshot.evaluate(train, shown(1), settings)
    assert result.details["classes left out"] == {"few": [["cat", "dog"], ["bee", "dog"]]}
    assert result.details["drawn"] == {"few": [[train.paths[row] for row in sorted(rows)] for rows in lists.values()]}
    assert result.counts == {"classes": 4, "classes without test positives": 0, "classes left out of draws": 4}
    ap_K = result.samples["few mAP (step)"]
    assert np.isnan(ap_K).tolist() == [False, False, False, True]
    assert result.values["few mAP (step)"] == pytest.approx(ap_K[:3].mean())
    (tmp_path / "a/few.txt").write_text("\n".join(f"{row:03d}" for row in ant))
    with pytest.raises(BadInput, match="few: draw 0 has 3 images, and no tested class that some of them show"):
        multilabel_lowshot.check(train, shown(1), settings)
    (tmp_path / "a/few.txt").write_text("900\n")
    with pytest.raises(
        BadInput, match=r"multilabel_lowshot split file .*few\.txt names 900, which is not one training"
    ):
        multilabel_lowshot.check(train, shown(1), settings)


def test_published_draws_are_taken_back(result, tmp_path):
    files = tuple(tmp_path / str(seed) / "2-positive.txt" for seed in range(3))
    for file, paths in zip(files, result.details["drawn"]["2-positive"], strict=True):
        file.parent.mkdir()
        file.write_text("\n".join(paths))
    again = multilabel_lowshot.evaluate(shown(0), shown(1), multilabel_lowshot.Settings(files=files))
    assert again.values == {name: value for name, value in result.values.items() if name.startswith("2-positive")}


def test_classes_that_no_image_shows_are_not_drawn_and_rare_ones_are_named():
    train = shown(0)
    train.targets[:, 1] = 0
    settings = multilabel_lowshot.Settings(percents=())
    result = multilabel_lowshot.evaluate(train, shown(1), settings)
    assert result.details["classes left out"]["5-positive"] == [["bee"]] * 3
    train.targets[:4, 1] = 1
    with pytest.raises(BadInput, match="class bee is shown by 4 of 600 images, which is less than 5"):
        multilabel_lowshot.check(train, shown(1), settings)
    with pytest.raises(BadInput, match="multilabel_lowshot needs images that may show several classes"):
        multilabel_lowshot.check(shown(0, targets=None), shown(1), settings)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"positives": (), "percents": ()}, "all are empty"),
        ({"positives": (0,)}, "positives"),
        ({"percents": (0.0,)}, "percents"),
        ({"draws": ()}, "draws"),
        ({"draws": (1, 1)}, "different seeds"),
        ({"draws": (-1,)}, "draws"),
        ({"penalty": 0.0}, "penalty"),
        ({"max_iterations": 0}, "max_iterations"),
    ],
)
def test_settings_are_checked(wrong, match):
    with pytest.raises(BadInput, match=match):
        multilabel_lowshot.Settings(**wrong)


def test_scenes_through_the_reader_of_coco():
    train, test = annotations.open_pair("objects")
    settings = multilabel_lowshot.Settings(positives=(1,), percents=(), sweep=())
    how = {"settings": {"multilabel_lowshot": settings}, "batch_size": 100}
    sets = evals.Sets(objects=(train, test))
    (result,) = evals.evaluate({"pixels": evals.raw_pixels((8, 8))}, sets, ("multilabel_lowshot",), **how)
    rows = few_positives(train.targets, 1, 0)
    assert result.details["drawn"]["1-positive"][0] == [train.images.paths[row] for row in rows]
    assert 0.2 < result.values["1-positive mAP (step)"] < 0.5 and result.data == str(test.images.root)
