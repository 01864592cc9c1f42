"""Low-shot: L2-regularised multinomial logistic regression on frozen features of a few images per class.

MSN's protocol, which MAE-CT follows: 1, 2 and 5 images per class over three splits, and 1 % (here 10 % too) of the training
set; each feature row is centred by its own mean and L2-normalised; no intercept; penalty lambda / n with lambda = .00025.
Test rows get the same treatment, as MSN's code does and MAE-CT's does not; it makes no difference, for centred rows give weights
that sum to 0 over the dimensions. Other codebases use other lambdas and the figure depends on it, so a sweep is reported beside
the published one; its best is chosen on the test set and named so.

Shapes: n images of a subset, m test images, C feature width, K classes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.data.subsets import class_orders, listed
from engine.evals import charts, logistic, subset_draws
from engine.evals.features import Features, Labelled, as_numpy, check_labelled, class_counts
from engine.evals.result import Result

_PREPROCESSING = "rows centred by their own mean and L2-normalised, test rows too"


@dataclass(frozen=True)
class Settings:
    """Low-shot settings."""

    shots: tuple[int, ...] = (1, 2, 5)
    """Images per class."""
    percents: tuple[float, ...] = (1.0, 10.0)
    """Shares of the training set, in percent, drawn class by class."""
    splits: int = 3
    """Splits per subset, disjoint by construction; mean and deviation are over them."""
    files: tuple[Path, ...] = ()
    """Published split files instead of drawn ones, one image name per line; files of one stem are splits of one subset."""
    penalty: float = 0.00025
    """Lambda of the headline figure: the objective is mean loss + lambda / (2 n) |W|^2."""
    sweep: tuple[float, ...] = (0.0025, 0.01, 0.075, 0.1, 0.25)
    """Further lambdas, each reported."""
    max_iterations: int = 1000
    """L-BFGS iterations at most."""
    tolerance: float = 1e-6
    """L-BFGS stops when no entry of the gradient is larger."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        subset_draws.check("lowshot", self)
        for name in ("splits", "max_iterations"):
            if getattr(self, name) < 1:
                raise BadInput(f"lowshot {name} = {getattr(self, name)} must be at least 1.")
        if not all(value > 0 for value in (self.penalty, *self.sweep, self.tolerance)):
            raise BadInput("lowshot penalty, sweep and tolerance must be above 0.")


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("lowshot", train, test)
    subsets(train, settings)


def subsets(train: Labelled, settings: Settings) -> dict[str, list[np.ndarray]]:
    """Row numbers of every split of every subset, by the subset's name; a pure function of labels, order and seed.

    Within a class the images are permuted once; split s of a subset takes the s-th run of that permutation, so splits of
    one subset share no image and a smaller subset's first split lies inside a larger one's.

    Raises:
        BadInput: a class has too few images for disjoint splits, or a split file names no or unknown images.
    """
    if settings.files:
        published = listed(settings.files, train.paths, "lowshot")
        splits = {name: iter(splits) for name, splits in published.items()}
        for file in settings.files:
            if len(np.unique(as_numpy(train.labels)[next(splits[file.stem])])) < 2:
                raise BadInput(f"lowshot split file {file} names images of one class only; it needs at least two.")
        return published
    labels_n, counts_K = as_numpy(train.labels), class_counts(train)
    present = np.flatnonzero(counts_K)
    orders = class_orders(labels_n, settings.seed)
    wanted = {f"{shots}-shot": np.where(counts_K > 0, shots, 0) for shots in settings.shots}
    wanted |= {f"{percent:g}%": _stratified(counts_K, percent / 100) for percent in settings.percents}
    drawn = {}
    for name, take_K in wanted.items():
        splits = 1 if name == "100%" else settings.splits
        for c in present:
            if take_K[c] * splits > counts_K[c]:
                label = train.classes[c] if train.classes else c
                raise BadInput(
                    f"lowshot {name}: class {label} has {counts_K[c]} training images and {splits} disjoint splits "
                    f"need {take_K[c] * splits}; choose smaller subsets or fewer splits."
                )
        drawn[name] = [
            np.sort(np.concatenate([orders[c][split * take_K[c] : (split + 1) * take_K[c]] for c in present]))
            for split in range(splits)
        ]
    return drawn


def _stratified(counts_K: np.ndarray, share: float) -> np.ndarray:
    """How many images of each class make `share` of the whole: by largest remainder, at least one of each."""
    exact = counts_K * share
    take = np.maximum(np.floor(exact), counts_K > 0).astype(np.int64)
    missing = round(exact.sum()) - int(take.sum())
    if missing > 0:
        take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    return take


def preprocess(values_nC: Tensor) -> Tensor:
    """fp64 [n, C]: every row minus its own mean, then L2-normalised (MSN; the `cyanure` package's row centring)."""
    values_nC = values_nC.double()
    return normalize(values_nC - values_nC.mean(1, keepdim=True))


def regularisation_path(
    x_nC: Tensor, labels_n: Tensor, penalties: tuple[float, ...], settings: Settings
) -> dict[float, logistic.Fit]:
    """One fit per penalty, [C, K] each; labels are 0 ... K-1, all present."""
    how = {"iterations": settings.max_iterations, "tolerance": settings.tolerance}
    return logistic.path(x_nC, torch.nn.functional.one_hot(labels_n), logistic.softmax, penalties, **how)


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Top-1 of every subset at the published lambda, mean and deviation over its splits, and the sweep's best mean.

    Raises:
        BadInput: labels are missing, a class has too few images, or a split file does not fit the training set.
    """
    check(train, test, settings)
    drawn = subsets(train, settings)
    test_mC, labels_m = preprocess(test.values), test.labels
    penalties = (settings.penalty, *settings.sweep)
    values, sweeps, samples, unfinished = {}, {}, {}, 0
    for name, splits in drawn.items():
        correct = {penalty: [] for penalty in sorted(penalties)}
        for rows in splits:
            present, labels_n = train.labels[rows].unique(return_inverse=True)
            fits = regularisation_path(preprocess(train.values[rows]), labels_n, penalties, settings)
            unfinished += sum(not found.converged for found in fits.values())
            for penalty, found in fits.items():
                predicted_m = present[(test_mC @ found.weight_CK).argmax(1)]
                correct[penalty].append((predicted_m == labels_m).double().cpu().numpy())
        top1 = {penalty: [float(correct_m.mean()) for correct_m in runs] for penalty, runs in correct.items()}
        values |= {name: float(np.mean(top1[settings.penalty])), f"{name} std": float(np.std(top1[settings.penalty]))}
        values[f"{name} sweep-best"] = max(float(np.mean(runs)) for runs in top1.values())
        samples[name] = np.mean(correct[settings.penalty], 0)
        sweeps[name] = {f"{penalty:g}": runs for penalty, runs in top1.items()}
    means = [
        {"lambda": penalty} | {name: float(np.mean(sweep[f"{penalty:g}"])) for name, sweep in sweeps.items()}
        for penalty in sorted(penalties)
    ]
    sizes = {name: [len(rows) for rows in splits] for name, splits in drawn.items()}
    runs = [sweep[f"{settings.penalty:g}"] for sweep in sweeps.values()]
    curve = charts.over_images(
        "low-shot", "top-1", list(drawn), [float(np.mean(size)) for size in sizes.values()], runs
    )
    return Result(
        protocol="lowshot",
        values=values,
        settings=asdict(settings) | {"files": [str(file) for file in settings.files], "features": _PREPROCESSING},
        details={
            "images per split": sizes,
            "top-1 by lambda, mean over splits": means,
            "top-1 by lambda": sweeps,
            "sweep-best is": "the lambda whose mean over splits is best on the test set",
            "fits that did not reach the tolerance": unfinished,
        },
        headline=tuple(drawn),
        spread="splits",
        samples=samples,
        pictures={"low-shot curve": curve},
    )
