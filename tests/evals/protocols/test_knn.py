"""k-NN against scikit-learn's, and its degenerate inputs."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from engine.core.errors import BadInput
from engine.evals.features import Features
from engine.evals.protocols import knn


def features(values, labels, **more) -> Features:
    return Features(torch.as_tensor(values, dtype=torch.float32), torch.as_tensor(labels), "given", **more)


def random_pair(seed: int, classes: int = 5, n: int = 90, m: int = 60, width: int = 7) -> tuple[Features, Features]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = rng.permutation(np.arange(n + m) % classes)
    values = centres[labels] + rng.normal(size=(n + m, width))
    return features(values[:n], labels[:n]), features(values[n:], labels[n:])


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.5), (10, 0.07), (20, 0.07), (100, 0.07), (200, 0.07)])
def test_predictions_equal_sklearn(k, temperature, standardise):
    """The last four are those of DINO's script; 10, that of MAE-CT's, whose logger standardises."""
    train, test = random_pair(k, n=max(90, k))
    x, y = train.values.double().numpy(), test.values.double().numpy()
    if standardise:
        mean, std = x.mean(0), x.std(0, ddof=1) + 1e-5
        x, y = (x - mean) / std, (y - mean) / std
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = model.fit(x, train.labels.numpy()).predict(y)
    settings = knn.Settings(k, temperature, standardise)
    np.testing.assert_array_equal(knn.predict(train, test, settings, 5).numpy(), expected)
    result = knn.evaluate(train, test, settings)
    assert result.values == {"top-1": pytest.approx(np.mean(expected == test.labels.numpy()))}
    np.testing.assert_array_equal(result.samples["top-1"], expected == test.labels.numpy())
    assert result.settings == {"k": k, "temperature": temperature, "standardise": standardise}
    expected_confusion = np.zeros((5, 5), int)
    np.add.at(expected_confusion, (test.labels.numpy(), expected), 1)
    np.testing.assert_array_equal(result.details["confusion"], expected_confusion)


def test_a_tie_goes_to_the_lower_class():
    train = features([[1, 0], [1, 0], [0, 1], [0, 1]], [2, 1, 0, 2])
    test = features([[1, 0], [0, 2]], [1, 0])
    assert knn.predict(train, test, knn.Settings(k=2), 3).tolist() == [1, 0]


def test_a_class_that_only_one_set_has():
    train = features([[1, 0], [0, 1]], [0, 1])
    test = features([[1, 0], [0, 1], [1, 0.1]], [0, 1, 2])
    result = knn.evaluate(train, test, knn.Settings(k=1))
    assert result.values["top-1"] == pytest.approx(2 / 3)
    assert result.details["confusion"].shape == (3, 3)


def test_no_temperature_overflows():
    train, test = random_pair(0)
    cold = knn.predict(train, test, knn.Settings(k=20, temperature=1e-4), 5)
    assert torch.equal(cold, knn.predict(train, test, knn.Settings(k=1), 5))


@pytest.mark.parametrize(
    "train, match",
    [
        (features(torch.eye(3), [0, 1, 1]), "more than the 3 training images"),
        (features(torch.eye(30), [0] * 30), "at least two classes"),
        (features(torch.eye(30), [0, 2] * 15, classes=("a", "b", "c")), "class b has no training image"),
        (Features(torch.eye(30), None, "given"), "needs labels and the training set has none"),
    ],
)
def test_refusals(train, match):
    with pytest.raises(BadInput, match=match):
        knn.evaluate(train, features(torch.eye(30), [0, 1] * 15))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        knn.Settings(**wrong)


@pytest.mark.parametrize("keys, queries", [(7, 5), (50, 3), (64, 100)])
def test_pieces_of_a_large_set_give_the_neighbours_of_the_whole(monkeypatch, keys, queries):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(101, 16, generator=generator), torch.randn(13, 16, generator=generator)
    whole = knn.neighbours(train, test, 20, train.mean(0), train.std(0))
    monkeypatch.setattr(knn, "_KEYS", keys)
    monkeypatch.setattr(knn, "_QUERIES", queries)
    similarity, index = knn.neighbours(train, test, 20, train.mean(0), train.std(0))
    torch.testing.assert_close(similarity, whole[0])
    assert torch.equal(index, whole[1])
