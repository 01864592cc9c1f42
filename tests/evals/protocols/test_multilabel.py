"""Multi-label classifiers against scikit-learn's, and what their figures, samples and pictures say."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from engine import evals
from engine.core.errors import BadInput
from engine.data.annotated import opening as annotations
from engine.evals import logistic
from engine.evals.features import Features
from engine.evals.protocols import multilabel

NAMES = ("ant", "bee", "cat", "dog")
QUICK = multilabel.Settings(costs=(0.1, 1, 10))


def shown(seed: int, n: int = 150, uncounted: float = 0.0, **more) -> Features:
    """Images that show each of four classes in a third of cases; each class adds a direction of its own to the features."""
    rng = np.random.default_rng([seed, 3])
    targets = (rng.random((n, 4)) < 1 / 3).astype(np.int8)
    values = targets @ np.random.default_rng(0).normal(size=(4, 12)) + rng.normal(size=(n, 12))
    targets[rng.random((n, 4)) < uncounted] = -1
    more = {"classes": NAMES} | more
    return Features(torch.tensor(values, dtype=torch.float32), None, "given", targets=torch.from_numpy(targets), **more)


def altered(features: Features, row: slice, column: int, value: int) -> Features:
    targets = features.targets.clone()
    targets[row, column] = value
    return Features(features.values, None, "given", targets=targets, classes=features.classes)


@pytest.mark.parametrize("as_negatives", [False, True])
def test_the_svm_is_what_cross_validation_by_sklearn_chooses_and_fits(as_negatives):
    train, test = shown(0, uncounted=0.1), shown(1, uncounted=0.1)
    settings = multilabel.Settings(classifiers=("svm",), costs=(0.1, 1, 10), uncounted_as_negatives=as_negatives)
    result = multilabel.evaluate(train, test, settings)
    x, y = (values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-5) for values in (
        train.values.double().numpy(), test.values.double().numpy()))  # fmt: skip
    for k, name in enumerate(NAMES):
        truth, rows = train.targets[:, k].numpy(), slice(None)
        if not as_negatives:
            rows = truth != -1
        models = [
            LinearSVC(C=cost, class_weight={1: 2, 0: 1}, max_iter=2000, random_state=0, dual=True)
            for cost in settings.costs
        ]
        positive = (truth[rows] == 1).astype(int)
        judged = [
            cross_val_score(model, x[rows], positive, cv=3, scoring="average_precision").mean() for model in models
        ]
        best = int(np.argmax(judged))
        counted = test.targets[:, k].numpy() != -1
        scores = models[best].fit(x[rows], positive).decision_function(y)[counted]
        expected = average_precision_score(test.targets[:, k].numpy()[counted] == 1, scores)
        row = result.details["by class"][k]
        assert (row["class"], row["SVM cost"]) == (name, settings.costs[best]) and "SVM cost" in result.plain
        assert row["SVM AP (step)"] == result.samples["SVM mAP (step)"][k] == pytest.approx(expected)
    assert result.details["fits"] == {"SVM": {"fits": 4 * (3 * 3 + 1), "not converged": 0}}


@pytest.mark.parametrize("n", [150, 9])
def test_the_logistic_regression_is_liblinears_class_by_class(n):
    train = shown(0, n=n, uncounted=0.1)
    x_nC = multilabel.normalised(train.values)
    fits = logistic.path(
        multilabel.with_ones(x_nC), train.targets, logistic.sigmoid, (0.1, 1.0), iterations=5000, tolerance=1e-8
    )
    for penalty, (weight_CK, converged) in fits.items():
        assert converged and weight_CK.shape == (13, 4)
        for k in range(4):
            truth = train.targets[:, k].numpy()
            rows = truth != -1
            model = LogisticRegression(C=1 / penalty, solver="liblinear", tol=1e-9, max_iter=10000, random_state=0)
            model.fit(x_nC.numpy()[rows], truth[rows])
            expected = np.append(model.coef_[0], model.intercept_)
            np.testing.assert_allclose(weight_CK[:, k], expected, atol=1e-4)


def test_each_class_has_the_scores_of_its_own_cost():
    train, test = shown(0), shown(1)
    x_nC, test_mC = multilabel.normalised(train.values), multilabel.normalised(test.values)
    ranking = multilabel.logistic_regression(x_nC, train.targets.numpy(), test_mC, QUICK)
    assert set(ranking.costs_K) <= {0.1, 1, 10} and len(set(ranking.costs_K)) > 1
    assert ranking.fits == 3 * 3 + len(set(ranking.costs_K)) and ranking.unfinished == 0
    for cost in set(ranking.costs_K):
        alone = multilabel.logistic_regression(
            x_nC, train.targets.numpy(), test_mC, multilabel.Settings(costs=(float(cost),))
        )
        of_cost = ranking.costs_K == cost
        np.testing.assert_allclose(ranking.scores_mK[:, of_cost], alone.scores_mK[:, of_cost], atol=1e-2)


def test_figures_are_means_over_classes():
    result = multilabel.evaluate(shown(0), shown(1), QUICK)
    assert list(result.values) == [
        "SVM mAP (envelope)", "SVM mAP (step)", "SVM mAP (11-point)", "logistic mAP (envelope)", "logistic mAP (step)",
    ]  # fmt: skip
    for name, value in result.values.items():
        assert result.samples[name].shape == (4,) and value == pytest.approx(result.samples[name].mean())
        assert 0.75 < value < 1
    assert result.values["SVM mAP (envelope)"] > result.values["SVM mAP (step)"]
    assert "SVM mAP (11-point)" not in result.headline and len(result.headline) == 4
    assert result.counts == {"classes": 4, "classes left out": 0}
    assert "left out of training" in result.settings["SVM"] and result.settings["logistic"].startswith("ours")


def test_what_cannot_be_learned_or_tested_is_left_out_and_named():
    train = altered(altered(shown(0), slice(None), 0, 0), slice(None), 1, 1)  # no ant, nothing but bees
    test = altered(shown(1), slice(None), 2, 0)  # no cat to be found
    result = multilabel.evaluate(train, test, QUICK)
    assert result.details["classes left out of the means"] == ["ant", "bee", "cat"]
    assert result.counts == {"classes": 1, "classes left out": 3}
    for name, value in result.values.items():
        assert np.isnan(result.samples[name]).tolist() == [True, True, True, False]
        assert value == result.samples[name][3]
    assert [row["class"] for row in result.details["by class"]] == ["dog"]


def test_classes_with_few_positives_have_fewer_folds_and_one_has_the_middle_cost():
    train = altered(altered(shown(0), slice(None), 0, 0), slice(None), 1, 0)
    train = altered(altered(train, slice(0, 1), 0, 1), slice(0, 2), 1, 1)
    by_class = multilabel.evaluate(train, shown(1), QUICK).details["by class"]
    assert by_class[0]["SVM cost"] == 1
    alone = multilabel.evaluate(train, shown(1), multilabel.Settings(costs=(5,), classifiers=("svm",)))
    assert alone.details["fits"]["SVM"]["fits"] == 4 and alone.details["by class"][3]["SVM cost"] == 5


def test_the_choice_may_use_a_part_of_the_images():
    train, test = shown(0), shown(1)
    x_nC, test_mC = multilabel.normalised(train.values), multilabel.normalised(test.values)
    whole, part = (
        multilabel.svm(x_nC, train.targets.numpy(), test_mC, multilabel.Settings(costs=(0.01, 1, 100), **more))
        for more in ({}, {"choice_images": 30})
    )
    assert (whole.costs_K != part.costs_K).any() and whole.fits == part.fits
    same = whole.costs_K == part.costs_K
    assert same.any()
    np.testing.assert_array_equal(whole.scores_mK[:, same], part.scores_mK[:, same])


def test_the_primal_problem_has_the_same_solution():
    train, test = shown(0), shown(1)
    x_nC, test_mC = multilabel.normalised(train.values), multilabel.normalised(test.values)
    how = {"costs": (1.0,), "max_iterations": 20000}
    dual, primal = (
        multilabel.svm(x_nC, train.targets.numpy(), test_mC, multilabel.Settings(dual=dual, **how)).scores_mK
        for dual in (True, False)
    )
    np.testing.assert_allclose(dual, primal, atol=2e-3)


def test_fits_that_do_not_converge_are_counted_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = multilabel.evaluate(shown(0), shown(1), multilabel.Settings(costs=(1000.0,), max_iterations=3))
    assert result.details["fits"] == {
        "SVM": {"fits": 4, "not converged": 4},
        "logistic": {"fits": 1, "not converged": 1},
    }


def test_collapsed_features_give_chance():
    train = Features(torch.ones(60, 3), None, "collapsed", targets=shown(0, n=60).targets)
    share = (train.targets == 1).double().mean(0).numpy()
    result = multilabel.evaluate(train, train, QUICK)
    for name in result.values:
        np.testing.assert_allclose(result.samples[name], share)
    assert result.details["share of positives, about what a random ranking reaches"] == pytest.approx(share.mean())


def test_pictures_show_every_class():
    result = multilabel.evaluate(shown(0), shown(1), QUICK)
    bars = result.pictures["average precision by class"].axes[0]
    assert [label.get_text() for label in bars.get_xticklabels()] == list(NAMES)
    heights = [patch.get_height() for patch in bars.patches]
    expected = np.concatenate([result.samples[f"{name} mAP (envelope)"] for name in ("SVM", "logistic")])
    np.testing.assert_allclose(heights, 100 * expected)
    for label in ("SVM", "logistic"):
        picture = result.pictures[f"precision and recall, {label}"]
        assert [line.get_label() for line in picture.axes[0].lines] == list(NAMES)


def test_refusals():
    unlabelled = Features(torch.eye(30), None, "given")
    with pytest.raises(BadInput, match="the training set says nothing of them; give --objects coco:DIR"):
        multilabel.evaluate(unlabelled, shown(1))
    with pytest.raises(BadInput, match="training has 4 classes and test 3"):
        fewer = Features(torch.ones(5, 12), None, "given", targets=torch.ones(5, 3, dtype=torch.int8))
        multilabel.check(shown(0), fewer, multilabel.Settings())
    with pytest.raises(BadInput, match="no class has training images with and without it"):
        nothing = Features(torch.ones(5, 12), None, "given", targets=torch.zeros(5, 4, dtype=torch.int8))
        multilabel.check(shown(0), nothing, multilabel.Settings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"classifiers": ("tree",)},
        {"classifiers": ()},
        {"costs": ()},
        {"costs": (0.0,)},
        {"folds": 1},
        {"choice_images": -1},
        {"max_iterations": 0},
        {"tolerance": 0.0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        multilabel.Settings(**wrong)


def test_scenes_through_the_reader_of_coco():
    train, test = annotations.open_pair("objects")
    encoders = {"pixels": evals.raw_pixels((8, 8))}
    how = {"settings": {"multilabel": multilabel.Settings(costs=(0.1,))}, "batch_size": 100}
    (result,) = evals.evaluate(encoders, evals.Sets(objects=(train, test)), ("multilabel",), **how)
    assert tuple(row["class"] for row in result.details["by class"]) == train.categories
    assert result.counts == {"training images": 400, "test images": 100, "classes": 10, "classes left out": 0}
    assert 0.2 < result.values["SVM mAP (step)"] < 0.5
