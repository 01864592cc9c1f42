"""Multi-label low-shot: logistic regression per class on frozen features of a few images that show each class a few times.

A proposal: no published protocol was found, so nothing here compares with published figures. Three draws of fixed seeds; images
are drawn greedily until each class is shown 1, 2 or 5 times (`engine.data.annotated.greedy`), or are 1 % or 10 % of the
training set at random. The images of each draw are in the result, by path, and lists of others are taken by `files`. All that a
draw shows is used: an image drawn for one class is labelled for all of them. A class that a draw shows never, or always, has no
classifier; it is left out of that draw's mean and named.

Rows are L2-normalised, and the lambda is MOCA's for ImageNet; as in single-label low-shot, others are reported beside it.

Shapes: n training images, m test images, C feature width, K classes, D draws.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.data.annotated.greedy import few_positives
from engine.data.subsets import listed
from engine.evals import charts, logistic, subset_draws
from engine.evals.features import Features
from engine.evals.metrics.average_precision import FORMS, average_precision, class_mean
from engine.evals.protocols.multilabel import (
    PREPROCESSING,
    learnable,
    names_of,
    normalised,
    positive_share,
    targets_of,
    with_ones,
)
from engine.evals.result import Result

READS = "objects"


@dataclass(frozen=True)
class Settings:
    """Multi-label low-shot settings."""

    positives: tuple[int, ...] = (1, 2, 5)
    """Images that show each class, at least."""
    percents: tuple[float, ...] = (1.0, 10.0)
    """Shares of the training set, in percent, drawn at random."""
    draws: tuple[int, ...] = (0, 1, 2)
    """Seeds of the draws; mean and deviation are over them."""
    files: tuple[Path, ...] = ()
    """Lists to use instead of draws, one image name per line; files of one stem are draws of one subset."""
    penalty: float = 0.1
    """Lambda of the headline figures: the objective is the sum of losses + lambda / 2 |W|^2."""
    sweep: tuple[float, ...] = (0.00025, 0.0025, 0.01, 0.075, 0.25)
    """Further lambdas, each reported."""
    max_iterations: int = 1000
    """L-BFGS iterations at most."""
    tolerance: float = 1e-6
    """L-BFGS stops when no entry of the gradient is larger."""

    def __post_init__(self):
        subset_draws.check("multilabel_lowshot", self, "positives")
        if not self.max_iterations >= 1:
            raise BadInput(f"multilabel_lowshot max_iterations = {self.max_iterations} must be at least 1.")
        if not all(value > 0 for value in (self.penalty, *self.sweep, self.tolerance)):
            raise BadInput("multilabel_lowshot penalty, sweep and tolerance must be above 0.")


def check(train: Any, test: Any, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    subsets(train, test, settings)


def subsets(train: Any, test: Any, settings: Settings) -> dict[str, list[np.ndarray]]:
    """Row numbers of every draw of every subset, by the subset's name; a pure function of targets, their order and the settings.

    Args:
        train: an ObjectSet or Features, as `test`.

    Raises:
        BadInput: a class is shown too rarely, a list names no or unknown images, or a draw can teach no class.
    """
    train_nK, test_mK = targets_of("multilabel_lowshot", train, test)
    names = names_of(train, train_nK.shape[1])
    if settings.files:
        paths = train.images.paths if hasattr(train, "images") else train.paths
        drawn = listed(settings.files, paths, "multilabel_lowshot")
    else:
        shown = (train_nK == 1).any(0)  # a category that the whole set lacks cannot be drawn
        drawn = {
            f"{count}-positive": [
                few_positives(train_nK[:, shown], count, seed, np.array(names)[shown].tolist())
                for seed in settings.draws
            ]
            for count in settings.positives
        }
        drawn |= subset_draws.at_random(len(train_nK), settings.percents, settings.draws)
    for name, draws in drawn.items():
        for place, rows in enumerate(draws):
            if not (learnable(train_nK[rows]) & (test_mK == 1).any(0)).any():
                raise BadInput(
                    f"multilabel_lowshot {name}: draw {place} has {len(rows)} images, and no tested class that some of them "
                    "show and some don't; choose larger subsets."
                )
    return drawn


def average_precisions(
    train: Features, test_mC: Tensor, rows: np.ndarray, test_mK: np.ndarray, settings: Settings
) -> tuple[dict[float, dict[str, np.ndarray]], int]:
    """By lambda and form, the APs [K] after learning from `rows`, NaN for a class left out; the fits that did not converge."""
    targets_nK = train.targets[torch.from_numpy(rows).to(train.targets.device)]
    x_nC = with_ones(normalised(train.values[torch.from_numpy(rows).to(train.values.device)]))
    how = {"iterations": settings.max_iterations, "tolerance": settings.tolerance}
    fits = logistic.path(x_nC, targets_nK, logistic.sigmoid, (settings.penalty, *settings.sweep), **how)
    known_K = learnable(targets_nK.cpu().numpy())
    found = {}
    for penalty, (weight_CK, _) in fits.items():
        by_form = average_precision((test_mC @ weight_CK).cpu().numpy(), test_mK)
        found[penalty] = {form: np.where(known_K, ap_K, np.nan) for form, ap_K in by_form.items()}
    return found, sum(not fit.converged for fit in fits.values())


def over_draws(ap_DK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP of each class, [K], over the draws that taught it (NaN: none did), and the mean of each draw, [D]."""
    counted_K = (~np.isnan(ap_DK)).sum(0)
    ap_K = np.where(counted_K, np.nansum(ap_DK, 0) / np.maximum(counted_K, 1), np.nan)
    return ap_K, np.array([class_mean(ap) for ap in ap_DK])


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Class-mean AP of every subset, in three forms: mean over the classes of each one's mean over draws, deviation over draws.

    Raises:
        BadInput: as `subsets`.
    """
    drawn = subsets(train, test, settings)
    _, test_mK = targets_of("multilabel_lowshot", train, test)
    names, test_mC = names_of(train, test_mK.shape[1]), with_ones(normalised(test.values))
    values, samples, sweeps, left_out, steps, unfinished = {}, {}, {}, {}, [], 0
    for name, draws in drawn.items():
        runs, missed = zip(*(average_precisions(train, test_mC, rows, test_mK, settings) for rows in draws))
        unfinished += sum(missed)
        for form in FORMS:
            figure = f"{name} mAP ({form})"
            ap_K, means_D = over_draws(np.stack([run[settings.penalty][form] for run in runs]))
            values |= {figure: class_mean(ap_K), f"{figure} std": float(means_D.std())}
            samples[figure] = ap_K
        headline_DK = np.stack([run[settings.penalty]["step"] for run in runs])
        steps.append(over_draws(headline_DK)[1].tolist())
        left_out[name] = [[names[k] for k in np.flatnonzero(np.isnan(ap_K))] for ap_K in headline_DK]
        sweeps[name] = {
            penalty: class_mean(over_draws(np.stack([run[penalty]["step"] for run in runs]))[0]) for penalty in runs[0]
        }
        values[f"{name} mAP (step) sweep-best"] = max(sweeps[name].values())
    sizes = {name: [len(rows) for rows in draws] for name, draws in drawn.items()}
    means = [
        {"lambda": penalty} | {name: sweep[penalty] for name, sweep in sweeps.items()}
        for penalty in sorted({settings.penalty, *settings.sweep})
    ]
    curve = charts.over_images(
        "multi-label low-shot (proposal)",
        "class-mean average precision (step)",
        list(drawn),
        [float(np.mean(size)) for size in sizes.values()],
        steps,
    )
    return Result(
        protocol="multilabel_lowshot",
        values=values,
        settings=asdict(settings)
        | {
            "files": [str(file) for file in settings.files],
            "features": PREPROCESSING,
            "label": "proposal: no published protocol was found; lambda is MOCA's for ImageNet",
            "samples": "average precisions of the classes, not images",
        },
        details={
            "images per draw": sizes,
            "mAP (step) by lambda, over draws": means,
            "sweep-best is": "the lambda whose figure is best on the test set",
            "classes left out": left_out,
            "fits that did not reach the tolerance": unfinished,
            "share of positives, about what a random ranking reaches": positive_share(test_mK, (test_mK == 1).any(0)),
            "drawn": {name: [[train.paths[row] for row in rows] for rows in draws] for name, draws in drawn.items()}
            if train.paths
            else {},
        },
        headline=tuple(f"{name} mAP (step)" for name in drawn),
        spread="draws",
        samples=samples,
        pictures={"low-shot curve": curve},
        counts={
            "classes": test_mK.shape[1],
            "classes without test positives": int((~(test_mK == 1).any(0)).sum()),
            "classes left out of draws": sum(len(missing) for draws in left_out.values() for missing in draws),
        },
    )
