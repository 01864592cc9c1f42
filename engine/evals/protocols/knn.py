"""Weighted k-NN: each of the k nearest training images votes for its class with exp(cosine / temperature).

DINO (Caron et al. 2021) and MIM-Refiner: k = 20, temperature 0.07; MAE-CT's script: k = 10, its logger standardises.

Shapes: n training images, m test images, C feature width, K classes, k neighbours.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

import kernels
from engine.errors import BadInput
from engine.evals.features import Features, Labelled, check_labelled, number_of_classes
from engine.evals.result import Result

_QUERIES = 4096  # at a time: bounds what the reference kernel holds


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


def predict(train: Features, test: Features, settings: Settings, classes: int) -> Tensor:
    """int64 [m]: the class with the heaviest vote; a tie goes to the lower class number."""
    train_nC, test_mC = train.values, test.values
    if settings.standardise:
        mean_C, std_C = train_nC.mean(0), train_nC.std(0) + 1e-5
        train_nC, test_mC = (train_nC - mean_C) / std_C, (test_mC - mean_C) / std_C
    train_nC, test_mC = normalize(train_nC), normalize(test_mC)
    found = [kernels.nearest_neighbours(queries, train_nC, settings.k) for queries in test_mC.split(_QUERIES)]
    similarity_mk = torch.cat([similarity for similarity, _ in found]).double()
    index_mk = torch.cat([index for _, index in found])
    # relative to the nearest neighbour, so that no temperature overflows
    weight_mk = ((similarity_mk - similarity_mk[:, :1]) / settings.temperature).exp()
    votes_mK = weight_mk.new_zeros(len(test_mC), classes).scatter_add_(1, train.labels[index_mk], weight_mk)
    return votes_mK.cpu().argmax(1)


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Top-1 accuracy on `test`, every image of `train` being a neighbour.

    Raises:
        BadInput: labels are missing, a class has no training image, or k exceeds the training set.
    """
    check(train, test, settings)
    classes = number_of_classes(train, test)
    predicted_m, labels_m = predict(train, test, settings, classes), test.labels.cpu()
    return Result(
        protocol="knn",
        values={"top-1": float(multiclass_accuracy(predicted_m, labels_m, classes, average="micro"))},
        settings=asdict(settings),
        details={"confusion": multiclass_confusion_matrix(predicted_m, labels_m, classes).numpy()},
    )
