"""Cluster figures against exhaustive matching and formulas written out, and collapsed features."""

from itertools import combinations, permutations
from math import log

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples

from engine.core.errors import BadInput
from engine.evals.features import Features
from engine.evals.protocols import cluster


def blobs(spread: float, n: int = 60, classes: int = 4) -> Features:
    rng = np.random.default_rng(5)
    labels = np.arange(n) % classes
    values = 5 * np.eye(classes)[labels] + spread * rng.normal(size=(n, classes))
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), "blobs")


def exhaustive_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    names = range(max(labels.max(), clusters.max()) + 1)
    return max(np.mean(np.array(matching)[clusters] == labels) for matching in permutations(names))


def written_out_nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    def entropy(shares):
        return -sum(share * log(share) for share in shares if share > 0)

    a, b = ([float(np.mean(side == name)) for name in np.unique(side)] for side in (labels, clusters))
    joint = [float(np.mean((labels == i) & (clusters == j))) for i in np.unique(labels) for j in np.unique(clusters)]
    return 2 * (entropy(a) + entropy(b) - entropy(joint)) / (entropy(a) + entropy(b))


@pytest.mark.parametrize("seed", range(8))
def test_matched_accuracy_equals_exhaustive_search(seed):
    rng = np.random.default_rng(seed)
    labels, clusters = rng.integers(0, 5, 40), rng.integers(0, 2 + seed % 4, 40)
    assert cluster.matched_accuracy(labels, clusters) == pytest.approx(exhaustive_accuracy(labels, clusters))


@pytest.mark.parametrize("seed", range(6))
def test_figures_of_clusters_equal_ibots_script(seed):
    """Its `eval_pred`: the cost of giving a cluster to a class are the cluster's other images; all else counts pairs."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(45) % 5)
    clusters = np.where(
        rng.random(45) < 0.5, (labels + 2) % 5, rng.integers(0, 5 - seed % 3, 45)
    )  # up to two are empty
    counts = np.array([[np.sum((labels == i) & (clusters == j)) for j in range(5)] for i in range(5)])
    costs = counts.sum(0)[:, None] - counts.T
    best = min(permutations(range(5)), key=lambda names: sum(costs[j, names[j]] for j in range(5)))
    pairs = [(labels[a] == labels[b], clusters[a] == clusters[b]) for a, b in combinations(range(45), 2)]
    both, of_labels, of_clusters = (sum(map(of, pairs)) for of in (all, lambda pair: pair[0], lambda pair: pair[1]))
    chance = of_labels * of_clusters / len(pairs)
    found = cluster.agreement(labels, clusters)
    assert found["ACC"] == pytest.approx(np.mean(np.array(best)[clusters] == labels))
    assert found["NMI"] == pytest.approx(written_out_nmi(labels, clusters))
    assert found["ARI"] == pytest.approx((both - chance) / ((of_labels + of_clusters) / 2 - chance))
    assert found["FMI"] == pytest.approx(both / np.sqrt(of_labels * of_clusters))


def test_matching_is_one_to_one():
    # both clusters hold mostly class 0, only one of them may have it
    assert cluster.matched_accuracy(np.array([0, 0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(4 / 6)


def test_clear_clusters_are_found_and_names_do_not_matter():
    values = cluster.evaluate(blobs(0.01), blobs(0.01)).values
    for name in ("ACC", "NMI", "AMI", "ARI", "FMI"):
        assert values[name] == pytest.approx(1) and values[f"{name} std"] == pytest.approx(0)
    assert values["silhouette"] > 0.95


def test_mean_and_deviation_are_over_the_seeds():
    data = blobs(3.0)
    settings = cluster.Settings(runs=4, n_init=1, max_iterations=2, seed=7)
    result = cluster.evaluate(data, data, settings)
    assert result.settings["seeds"] == [7, 8, 9, 10]
    for name, runs in result.details["runs"].items():
        assert len(runs) == 4
        assert result.values[name] == pytest.approx(np.mean(runs)) and result.values[f"{name} std"] == pytest.approx(
            np.std(runs)
        )
    assert result.values["ACC std"] > 0
    again = cluster.evaluate(data, data, settings)
    assert again.values == result.values


def test_figures_belong_to_the_clusters(monkeypatch):
    data, rng = blobs(1.0), np.random.default_rng(0)
    clusters = rng.integers(0, 4, 60)
    monkeypatch.setattr(cluster.KMeans, "fit_predict", lambda self, values: clusters)
    values = cluster.evaluate(data, data, cluster.Settings(runs=1)).values
    labels = data.labels.numpy()
    assert values["ACC"] == pytest.approx(exhaustive_accuracy(labels, clusters))
    assert values["NMI"] == pytest.approx(written_out_nmi(labels, clusters))
    unit = torch.nn.functional.normalize(data.values).numpy()
    assert values["silhouette"] == pytest.approx(np.mean(silhouette_samples(unit, clusters)), abs=1e-6)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_collapsed_features_give_chance_not_an_error():
    collapsed = Features(torch.ones(40, 3), torch.arange(40) % 4, "collapsed")
    values = cluster.evaluate(collapsed, collapsed).values
    assert values["ACC"] == pytest.approx(0.25) and values["silhouette"] == 0 and values["ARI"] == 0


def test_refusals():
    one = Features(torch.eye(4), torch.zeros(4, dtype=torch.int64), "one")
    with pytest.raises(BadInput, match="two classes"):
        cluster.evaluate(blobs(1.0), one)
    few = Features(torch.eye(4), torch.arange(4), "few")
    with pytest.raises(BadInput, match="more images than classes"):
        cluster.evaluate(blobs(1.0), few)
    with pytest.raises(BadInput, match="n_init"):
        cluster.Settings(n_init=0)
