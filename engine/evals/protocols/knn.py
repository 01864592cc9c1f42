"""Weighted k-NN: each of the k nearest training images votes for its class with exp(cosine / temperature).

DINO (Caron et al. 2021) and MIM-Refiner: k = 20, temperature 0.07; MAE-CT's script: k = 10, its logger standardises.

Shapes: n training images, m test images, C feature width, K classes, k neighbours.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import multiclass_confusion_matrix

import kernels
from engine.core.errors import BadInput
from engine.evals.charts import confusion
from engine.evals.features import Features, Labelled, check_labelled, number_of_classes
from engine.evals.result import Result

# At a time: together they bound the memory to 1 GB at width 1024 (a piece of keys and two copies of it on the way), beside the
# features themselves, which may be mapped from a file: 1,281,167 training images are twenty pieces.
_QUERIES, _KEYS = 4096, 65_536


@dataclass(frozen=True)
class Settings:
    """k-NN settings."""

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Votes weigh exp(cosine / temperature)."""
    standardise: bool = False
    """Give every feature dimension the training set's zero mean and unit deviation before the cosine."""

    def __post_init__(self):
        if self.k < 1:
            raise BadInput(f"knn k = {self.k} must be at least 1.")
        if not self.temperature > 0:
            raise BadInput(f"knn temperature = {self.temperature} must be above 0.")


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("knn", train, test)
    if settings.k > len(train.labels):
        raise BadInput(f"knn k = {settings.k} is more than the {len(train.labels)} training images; lower it.")


def neighbours(
    train_nC: Tensor, test_mC: Tensor, k: int, mean_C: Tensor | float = 0.0, std_C: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines [m, k], falling, and rows int64 [m, k] of the nearest training features, all less the mean, over the deviation."""
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(train_nC), _KEYS):
        keys = normalize((train_nC[start : start + _KEYS] - mean_C) / std_C)
        for place, queries in enumerate(test_mC.split(_QUERIES)):
            queries = normalize((queries - mean_C) / std_C)
            similarity, index = kernels.nearest_neighbours(queries, keys, min(k, len(keys)))
            index = index + start
            if start:
                similarity = torch.cat((best[place][0], similarity), 1)
                index = torch.cat((best[place][1], index), 1)
                similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
                best[place] = similarity, index.gather(1, order)
            else:
                best.append((similarity, index))
    return tuple(torch.cat(parts) for parts in zip(*best))


def predict(train: Features, test: Features, settings: Settings, classes: int) -> Tensor:
    """int64 [m]: the class with the heaviest vote; a tie goes to the lower class number."""
    mean_C, std_C = 0.0, 1.0
    if settings.standardise:
        mean_C, std_C = train.values.mean(0), train.values.std(0) + 1e-5
    similarity_mk, index_mk = neighbours(train.values, test.values, settings.k, mean_C, std_C)
    similarity_mk = similarity_mk.double()
    # relative to the nearest neighbour, so that no temperature overflows
    weight_mk = ((similarity_mk - similarity_mk[:, :1]) / settings.temperature).exp()
    votes_mK = weight_mk.new_zeros(len(weight_mk), classes).scatter_add_(1, train.labels[index_mk], weight_mk)
    return votes_mK.cpu().argmax(1)


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Top-1 accuracy on `test`, every image of `train` being a neighbour.

    Raises:
        BadInput: labels are missing, a class has no training image, or k exceeds the training set.
    """
    check(train, test, settings)
    classes = number_of_classes(train, test)
    predicted_m, labels_m = predict(train, test, settings, classes), test.labels.cpu()
    counts_KK = multiclass_confusion_matrix(predicted_m, labels_m, classes).numpy()
    correct_m = (predicted_m == labels_m).double().numpy()
    return Result(
        protocol="knn",
        values={"top-1": float(correct_m.mean())},
        settings=asdict(settings),
        details={"confusion": counts_KK},
        samples={"top-1": correct_m},
        pictures={"confusion": confusion(counts_KK, train.classes)},
    )
