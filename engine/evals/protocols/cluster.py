"""k-means on unlabelled test features, one cluster per class, compared with the classes.

ACC under the best one-to-one matching of clusters and classes (Hungarian), NMI, AMI, ARI, FMI, and the silhouette of the
clusters themselves. The figures MAE-CT and MIM-Refiner publish; their k-means settings are not, ours are in the result. iBOT's
script has the same ACC, NMI, ARI and FMI of other clusters: of the largest of its head's 1,000 outputs, which exported weights
do not have.

Shapes: m test images, C feature width, K classes.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    fowlkes_mallows_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix
from torch.nn.functional import normalize
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.evals.features import Features, Labelled, as_numpy, check_labelled, threads_for
from engine.evals.result import Result


@dataclass(frozen=True)
class Settings:
    """k-means settings."""

    runs: int = 3
    """Runs whose mean and deviation are reported, with seeds seed, seed + 1, ..."""
    n_init: int = 10
    """Starts per run; the one of lowest inertia counts."""
    max_iterations: int = 300
    """Lloyd iterations at most."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        for name in ("runs", "n_init", "max_iterations"):
            if getattr(self, name) < 1:
                raise BadInput(f"cluster {name} = {getattr(self, name)} must be at least 1.")


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("cluster", train, test)
    classes = len(np.unique(as_numpy(test.labels)))
    if not 2 <= classes < len(test.labels):
        raise BadInput(
            "cluster needs at least two classes and more images than classes; the test set has "
            f"{classes} classes and {len(test.labels)} images."
        )


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of samples that are right once clusters are matched one-to-one with classes as well as possible."""
    counts = contingency_matrix(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """How well clusters, int [m], agree with classes, int [m]: ACC as `matched_accuracy`, NMI with the arithmetic mean of the
    entropies, AMI, ARI, and FMI, the geometric mean of precision and recall over pairs (Fowlkes and Mallows 1983)."""
    return {
        "ACC": matched_accuracy(labels, clusters),
        "NMI": float(normalized_mutual_info_score(labels, clusters)),
        "AMI": float(adjusted_mutual_info_score(labels, clusters)),
        "ARI": float(adjusted_rand_score(labels, clusters)),
        "FMI": float(fowlkes_mallows_score(labels, clusters)),
    }


def _silhouette(values: np.ndarray, clusters: np.ndarray) -> float:
    # undefined for a single cluster, which is what a collapsed encoder gives: the neutral 0
    found = len(np.unique(clusters))
    return float(silhouette_score(values, clusters)) if 1 < found < len(values) else 0.0


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Mean and standard deviation of the cluster figures over `settings.runs` seeds; `train` is not used.

    Raises:
        BadInput: labels are missing, or the test set has fewer than two classes or no more images than classes.
    """
    check(train, test, settings)
    values_mC, labels_m = normalize(test.values).cpu().numpy(), as_numpy(test.labels)
    clusters = len(np.unique(labels_m))
    seeds = [settings.seed + run for run in range(settings.runs)]
    runs: list[dict[str, float]] = []
    for seed in seeds:
        kmeans = KMeans(clusters, n_init=settings.n_init, max_iter=settings.max_iterations, random_state=seed)
        with threads_for(2 * values_mC.size * clusters):
            clusters_m = kmeans.fit_predict(values_mC)
        runs.append(agreement(labels_m, clusters_m) | {"silhouette": _silhouette(values_mC, clusters_m)})
    figures = {name: [run[name] for run in runs] for name in runs[0]}
    values = {}
    for name, found in figures.items():
        values |= {name: float(np.mean(found)), f"{name} std": float(np.std(found))}
    return Result(
        protocol="cluster",
        values=values,
        settings=asdict(settings) | {"seeds": seeds, "clusters": clusters, "features": "L2-normalised"},
        details={"runs": figures},
        plain=frozenset({"silhouette", "silhouette std"}),
        spread="k-means seeds",
    )
