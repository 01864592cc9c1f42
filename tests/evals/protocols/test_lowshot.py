"""Low-shot against scikit-learn's logistic regression, and its splits."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from engine.core.errors import BadInput
from engine.evals.features import Features
from engine.evals.protocols import lowshot

SUBSETS = ("1-shot", "2-shot", "5-shot", "1%", "10%")
EXACT = lowshot.Settings(tolerance=1e-11, max_iterations=20000)


def blobs(seed: int, n: int = 300, classes: int = 5, width: int = 8, **more) -> Features:
    rng = np.random.default_rng([seed, 2])
    labels = np.arange(n) % classes
    values = np.random.default_rng(0).normal(size=(classes, width))[labels] + 0.8 * rng.normal(size=(n, width))
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), "blobs", **more)


@pytest.mark.parametrize("n, width", [(60, 8), (10, 30)])
@pytest.mark.parametrize("penalty", [0.00025, 0.1, 1.0])
def test_solution_equals_sklearn(n, width, penalty):
    train = blobs(0, n=n, width=width)
    x_nC = lowshot.preprocess(train.values)
    ours = lowshot.regularisation_path(x_nC, train.labels, (penalty, 10.0), EXACT)[penalty].weight_CK
    model = LogisticRegression(C=1 / penalty, fit_intercept=False, solver="newton-cg", tol=1e-10, max_iter=10000)
    theirs = model.fit(x_nC.numpy(), train.labels.numpy()).coef_

    def objective(weight_CK):
        p_nK = torch.softmax(x_nC @ weight_CK, 1)
        loss = -torch.log(p_nK[torch.arange(n), train.labels]).mean()
        return float(loss + penalty / (2 * n) * weight_CK.square().sum())

    assert objective(ours) == pytest.approx(objective(torch.from_numpy(theirs.T)), rel=1e-7)
    np.testing.assert_allclose(ours.numpy(), theirs.T, atol=2e-3 * np.abs(theirs).max())


def test_default_tolerance_predicts_as_the_exact_solution():
    train, test = blobs(0, n=50), lowshot.preprocess(blobs(1).values)
    penalties = (0.00025, 0.1)
    x_nC = lowshot.preprocess(train.values)
    solve = lowshot.regularisation_path
    loose, exact = (solve(x_nC, train.labels, penalties, settings) for settings in (lowshot.Settings(), EXACT))
    for penalty in penalties:
        same = (test @ loose[penalty].weight_CK).argmax(1) == (test @ exact[penalty].weight_CK).argmax(1)
        assert loose[penalty].converged and same.float().mean() > 0.99


def msns_script(train: Features, test: Features, lambd: float, treats_tests: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores and predictions: rows less their mean and of length 1, softmax regression without intercept, lambda / n."""

    def treated(values):
        rows = values.double().numpy()
        rows = rows - rows.mean(1, keepdims=True)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    x, y = treated(train.values), treated(test.values) if treats_tests else test.values.double().numpy()
    truth = np.eye(5)[train.labels.numpy()]

    def objective(flat):
        weight = flat.reshape(5, -1)
        scores = x @ weight.T
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        slope = (np.exp(log_p) - truth).T @ x / len(x) + lambd / len(x) * weight
        return -(truth * log_p).sum() / len(x) + lambd / len(x) / 2 * np.square(weight).sum(), slope.ravel()

    found = minimize(
        objective, np.zeros(5 * x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}
    )
    scores = y @ found.x.reshape(5, -1).T
    return scores, scores.argmax(1)


@pytest.mark.parametrize("lambd", [0.00025, 0.0025, 0.075])
def test_predictions_equal_msns_script_and_mae_cts_which_leaves_test_rows_alone(lambd, tmp_path):
    paths = tuple(f"image{i}.png" for i in range(300))
    train, test = replace(blobs(0, paths=paths), name="train"), blobs(1)
    test = replace(test, values=test.values + torch.linspace(-3, 3, 300)[:, None])  # each row has another mean
    (tmp_path / "2imgs_class.txt").write_text("\n".join(paths[:10]))
    settings = lowshot.Settings(
        files=(tmp_path / "2imgs_class.txt",), penalty=lambd, tolerance=1e-10, max_iterations=20000
    )
    result = lowshot.evaluate(train, test, settings)
    few = Features(train.values[:10], train.labels[:10], "few")
    scores, predicted = msns_script(few, test, lambd, treats_tests=True)
    untreated, again = msns_script(few, test, lambd, treats_tests=False)
    assert np.abs(scores - untreated).max() > 0.1
    np.testing.assert_array_equal(predicted, again)
    np.testing.assert_array_equal(result.samples["2imgs_class"], predicted == test.labels.numpy())


def test_rows_are_centred_by_their_own_mean_and_normalised():
    x_nC = lowshot.preprocess(torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]]))
    expected = [[-(0.5**0.5), 0, 0.5**0.5], [-(1 / 6**0.5), -(1 / 6**0.5), 2 / 6**0.5]]
    torch.testing.assert_close(x_nC, torch.tensor(expected, dtype=torch.float64))


def test_splits_are_fixed_disjoint_and_balanced():
    drawn = lowshot.subsets(blobs(0), lowshot.Settings())
    labels = blobs(0).labels.numpy()
    assert list(drawn) == ["1-shot", "2-shot", "5-shot", "1%", "10%"]
    for name, shots in (("1-shot", 1), ("2-shot", 2), ("5-shot", 5), ("1%", 1), ("10%", 6)):
        rows = np.concatenate(drawn[name])
        assert len(drawn[name]) == 3 and len(np.unique(rows)) == len(rows)
        for split in drawn[name]:
            assert np.bincount(labels[split]).tolist() == [shots] * 5
    assert set(drawn["1-shot"][0]) < set(drawn["2-shot"][0]) < set(drawn["5-shot"][0])
    digest = hashlib.sha256(b"".join(rows.astype(np.int64).tobytes() for splits in drawn.values() for rows in splits))
    assert digest.hexdigest()[:16] == "b07e87c3960c322b"


def test_splits_depend_on_the_class_list_and_the_seed_only():
    one = lowshot.subsets(blobs(0), lowshot.Settings())
    other = lowshot.subsets(blobs(9), lowshot.Settings())
    reseeded = lowshot.subsets(blobs(0), lowshot.Settings(seed=1))
    assert all(np.array_equal(a, b) for name in one for a, b in zip(one[name], other[name]))
    assert not np.array_equal(one["5-shot"][0], reseeded["5-shot"][0])


@pytest.mark.parametrize("counts", [(50, 50, 50), (143, 146, 141, 147), (1000, 30, 7)])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.333, 1.0])
def test_shares_follow_the_class_sizes(counts, share):
    counts = np.array(counts)
    take = lowshot._stratified(counts, share)
    assert (take >= 1).all() and (take <= counts).all() and (np.abs(take - counts * share) <= 1).all()
    if (counts * share >= 1).all():
        assert take.sum() == round(counts.sum() * share)


def test_figures_are_means_over_splits_at_the_published_lambda():
    result = lowshot.evaluate(blobs(0), blobs(1))
    assert result.headline == SUBSETS
    for name in result.headline:
        sweep = result.details["top-1 by lambda"][name]
        assert list(sweep) == ["0.00025", "0.0025", "0.01", "0.075", "0.1", "0.25"]
        assert result.values[name] == pytest.approx(np.mean(sweep["0.00025"]))
        assert result.values[f"{name} std"] == pytest.approx(np.std(sweep["0.00025"]))
        assert result.values[f"{name} sweep-best"] == pytest.approx(max(np.mean(runs) for runs in sweep.values()))
        assert result.samples[name].shape == (300,) and set(np.unique(3 * result.samples[name])) <= {0, 1, 2, 3}
        assert result.samples[name].mean() == pytest.approx(result.values[name])
    means = result.details["top-1 by lambda, mean over splits"]
    assert [row["lambda"] for row in means] == [0.00025, 0.0025, 0.01, 0.075, 0.1, 0.25]
    assert means[0] == {"lambda": 0.00025} | {name: result.values[name] for name in result.headline}
    assert result.values["5-shot"] > result.values["1-shot"] > 0.3
    assert result.details["images per split"]["5-shot"] == [25, 25, 25]
    assert result.details["fits that did not reach the tolerance"] == 0
    (axes,) = result.pictures["low-shot curve"].axes
    (line,) = axes.containers[0].lines[:1]
    expected = {
        name: (np.mean(result.details["images per split"][name]), 100 * result.values[name]) for name in SUBSETS
    }
    assert sorted(map(tuple, line.get_xydata())) == [pytest.approx(point) for point in sorted(expected.values())]
    assert {text.get_text() for text in axes.texts} == set(SUBSETS)


def test_fits_that_end_early_are_counted():
    settings = lowshot.Settings(shots=(5,), percents=(), sweep=(), max_iterations=2)
    assert lowshot.evaluate(blobs(0), blobs(1), settings).details["fits that did not reach the tolerance"] == 3


def test_published_split_files(tmp_path):
    paths = tuple(f"train/c{i % 5}/image{i}.png" for i in range(300))
    train = blobs(0, paths=paths)
    files = []
    for split in range(2):
        (tmp_path / str(split)).mkdir()
        files.append(tmp_path / str(split) / "2imgs_class.txt")
        files[-1].write_text("\n".join(f"image{i}.png" for i in range(10 * split, 10 * split + 10)))
    settings = lowshot.Settings(files=tuple(files))
    drawn = lowshot.subsets(train, settings)
    assert [rows.tolist() for rows in drawn["2imgs_class"]] == [list(range(10)), list(range(10, 20))]
    values = lowshot.evaluate(train, blobs(1), settings).values
    assert list(values) == ["2imgs_class", "2imgs_class std", "2imgs_class sweep-best"]
    wrong = {
        "image1.png\nnone.png": "none.png, which is not one training image",
        "": "no image",
        "image0.png\nimage5.png": "one class",
    }
    for text, match in wrong.items():
        files[0].write_text(text)
        with pytest.raises(BadInput, match=match):
            lowshot.subsets(train, settings)
    with pytest.raises(BadInput, match="cannot be read"):
        lowshot.subsets(train, lowshot.Settings(files=(tmp_path / "none.txt",)))
    with pytest.raises(BadInput, match="know their image paths"):
        lowshot.subsets(blobs(0), settings)


def test_a_name_that_two_images_share_needs_its_folder(tmp_path):
    paths = tuple(f"train/c{i % 5}/image {i // 5}.png" for i in range(300))
    train, settings = blobs(0, paths=paths), lowshot.Settings(files=(tmp_path / "s.txt",))
    settings.files[0].write_text("c0/image 3.png\ntrain/c1/image 3.png\n")
    assert [rows.tolist() for rows in lowshot.subsets(train, settings)["s"]] == [[15, 16]]
    settings.files[0].write_text("image 3.png\n")
    with pytest.raises(BadInput, match=r"image 3\.png, which is not one training image"):
        lowshot.subsets(train, settings)


def test_a_split_without_some_class_never_predicts_it(tmp_path):
    paths = tuple(f"train/image{i}.png" for i in range(300))
    (tmp_path / "two.txt").write_text("image0.png\nimage4.png\n\nimage5.png\nimage9.png\n")  # classes 0 and 4
    result = lowshot.evaluate(blobs(0, paths=paths), blobs(1), lowshot.Settings(files=(tmp_path / "two.txt",)))
    assert 0.2 < result.values["two"] <= 0.4


def test_too_small_classes_are_named():
    with pytest.raises(BadInput, match="5-shot: class b has 6 training images and 3 disjoint splits need 15"):
        labels = torch.tensor([0] * 30 + [1] * 6)
        train = Features(torch.randn(36, 4), labels, "small", classes=("a", "b"))
        lowshot.evaluate(train, train)


@pytest.mark.parametrize(
    "wrong", [{"shots": (0,)}, {"percents": (101.0,)}, {"splits": 0}, {"penalty": 0.0}, {"sweep": (-1.0,)}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        lowshot.Settings(**wrong)


def test_nothing_to_draw():
    with pytest.raises(BadInput, match="all are empty"):
        lowshot.Settings(shots=(), percents=())
