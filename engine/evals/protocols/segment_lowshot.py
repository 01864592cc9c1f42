"""Low-shot semantic segmentation: logistic regression on the frozen patches of a few images in which each class occurs.

A proposal: no published protocol was found, so nothing here compares with published figures. Images are drawn greedily until
each class occurs in 1, 2 or 5 of them (`engine.data.annotated.greedy`), or are 1 % or 10 % of the training set at random; mean
and deviation are over three draws of fixed seeds. A class occurs in an image if a patch has it; the background is left out of
the rule, and so are classes that occur in too few images of the whole set. All labelled patches of a drawn image are used. The
images of each draw are in the result, by path, and lists of others are taken by `files`.

Patches, features and the judging at the pixels are those of `segment_patches`, but there is nothing to choose C on: it is fixed,
and others are reported beside it.

Shapes: n training images, m patches, K classes, h x w patches of an image.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from engine.core.errors import BadInput
from engine.data.annotated.greedy import few_positives
from engine.data.annotated.objects import BACKGROUND, VOID, SemanticSet
from engine.data.subsets import listed
from engine.evals import charts, segmenting, semantic_patches, subset_draws
from engine.evals.metrics.confusion import mean_iou
from engine.evals.protocols.segment_patches import fitted, pictures
from engine.evals.result import Result
from engine.evals.subject import Subject

READS, WANTS = "semantic", "model"


@dataclass(frozen=True)
class Settings:
    """Settings of low-shot segmentation."""

    shots: tuple[int, ...] = (1, 2, 5)
    """Images in which each class occurs, at least."""
    percents: tuple[float, ...] = (1.0, 10.0)
    """Shares of the training set, in percent, drawn at random."""
    draws: tuple[int, ...] = (0, 1, 2)
    """Seeds of the draws; mean and deviation are over them."""
    files: tuple[Path, ...] = ()
    """Lists to use instead of draws, one image name per line; files of one stem are draws of one subset."""
    size: int = 0
    """Side of the square input in pixels, a multiple of the patch size; 0 is the nearest to 224, or to the images' own short side
    where that is less."""
    c: float = 0.1
    """Strength of the headline figures, scikit-learn's C (ours)."""
    sweep: tuple[float, ...] = (0.001, 0.01, 1.0)
    """Further strengths, each reported."""
    max_iterations: int = 1000
    """L-BFGS iterations at most."""
    tolerance: float = 1e-4
    """L-BFGS stops when no entry of the gradient of the mean loss is larger; scikit-learn's default."""
    standardise: bool = True
    """Give every feature dimension the drawn patches' zero mean and unit deviation."""
    most_patches: int = 20_000
    """Patches of a draw at most, drawn by its seed; 0 takes all. Each takes about 24 C + 40 K bytes (C features, K classes)."""

    def __post_init__(self):
        subset_draws.check("segment_lowshot", self)
        for name, least in {"size": 0, "most_patches": 0, "max_iterations": 1}.items():
            if getattr(self, name) < least:
                raise BadInput(f"segment_lowshot {name} = {getattr(self, name)} must be at least {least}.")
        if not all(value > 0 for value in (self.c, *self.sweep, self.tolerance)):
            raise BadInput("segment_lowshot c, sweep and tolerance must be above 0.")


def check(train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    segmenting.check_sets("segment_lowshot", train, test)
    if settings.files:
        listed(settings.files, train.images.paths, "segment_lowshot")


def check_model(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the input."""
    how = semantic_patches.frame("segment_lowshot", train, settings.size, subject.vit.patch_size)
    subject.check_input(how.size, how.size)


def subsets(train: SemanticSet, occurs_nK: np.ndarray, settings: Settings) -> dict[str, list[np.ndarray]]:
    """Rows of every draw of every subset, by the subset's name; a pure function of what occurs, its order and the settings.

    Args:
        occurs_nK: int8, 1 where a patch of the image has the class.

    Raises:
        BadInput: no class but the background occurs in as many images as asked for, or a list names no or unknown images.
    """
    if settings.files:
        return listed(settings.files, train.images.paths, "segment_lowshot")
    things_K = np.array([name != BACKGROUND for name in train.semantic_classes])
    drawn = {}
    for shots in settings.shots:
        ruled_K = things_K & (occurs_nK.sum(0) >= shots)
        if not ruled_K.any():
            raise BadInput(f"segment_lowshot: no class occurs in {shots} training images; choose fewer shots.")
        drawn[f"{shots}-shot"] = [few_positives(occurs_nK[:, ruled_K], shots, seed) for seed in settings.draws]
    return drawn | subset_draws.at_random(len(train), settings.percents, settings.draws)


def evaluate(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings = Settings()) -> Result:
    """mIoU of every subset, mean and deviation over its draws.

    Raises:
        BadInput: the sets do not fit, an image or a mask cannot be read, a draw has patches of one class only, no pixel of the
            test set counts, or as `subsets`.
    """
    check(train, test, settings)
    classes, names = len(train.semantic_classes), np.array(train.semantic_classes)
    how = semantic_patches.frame("segment_lowshot", train, settings.size, subject.vit.patch_size)
    labels_nhw = semantic_patches.labels(train, how, subject.threads)
    occurs_nK = (labels_nhw[..., None] == np.arange(classes)).any((1, 2)).astype(np.int8)
    drawn = subsets(train, occurs_nK, settings)
    predictors, used, unfinished = {}, {}, 0
    for name, draws in drawn.items():
        for place, rows in enumerate(draws):
            usable_nhw = (labels_nhw != VOID) & np.isin(np.arange(len(train)), rows)[:, None, None]
            seed = settings.draws[place] if place < len(settings.draws) else place
            chosen_nhw = semantic_patches.drawn(usable_nhw, settings.most_patches, seed)
            labels_m = torch.from_numpy(labels_nhw[chosen_nhw]).long().to(subject.device)
            if len(labels_m.unique()) < 2:
                raise BadInput(
                    f"segment_lowshot {name}: the {len(rows)} images of draw {place} have patches of "
                    f"{len(labels_m.unique())} class; choose larger subsets."
                )
            x_mC = semantic_patches.features(subject, train, how, chosen_nhw)
            fits = fitted(x_mC, labels_m, sorted({settings.c, *settings.sweep}), settings)
            predictors |= {(name, place, c): predict for c, (predict, _) in fits.items()}
            used[name, place] = {
                "images": [train.images.paths[row] for row in rows],
                "patches": len(labels_m),
                "classes without a patch": names[np.setdiff1d(np.arange(classes), labels_m.cpu().numpy())].tolist(),
            }
            unfinished += sum(not converged for _, converged in fits.values())
    found, grid = semantic_patches.judged(subject, test, how, predictors)
    if not grid.matrix_KK.any():
        raise BadInput(f"protocol segment_lowshot: no pixel of the test set is to be counted, all are {VOID}.")
    values, samples, sweeps = {}, {}, {}
    for name, draws in drawn.items():
        figures = [found[name, place, settings.c].figures(f"{name} ") for place in range(len(draws))]
        for figure in figures[0][0]:
            runs = [its_values[figure] for its_values, _ in figures]
            values |= {figure: float(np.mean(runs)), f"{figure} std": float(np.std(runs))}
        samples |= {figure: np.mean([its[figure] for _, its in figures], 0) for figure in figures[0][1]}
        sweeps[name] = {
            c: float(np.mean([mean_iou(found[name, place, c].matrix_KK) for place in range(len(draws))]))
            for c in sorted({settings.c, *settings.sweep})
        }
    runs = [
        [mean_iou(found[name, place, settings.c].matrix_KK) for place in range(len(d))] for name, d in drawn.items()
    ]
    sizes = [float(np.mean([len(rows) for rows in draws])) for draws in drawn.values()]
    first = {name: predictors[name, 0, settings.c] for name in drawn}
    return Result(
        protocol="segment_lowshot",
        values=values,
        headline=tuple(f"{name} mIoU" for name in drawn),
        spread="draws",
        samples=samples,
        settings=asdict(settings)
        | {
            "recipe": "a proposal: greedy draws, C and standardisation are ours",
            "files": [str(file) for file in settings.files],
            "size": how.size,
            "fits not converged": unfinished,
            "mIoU": "over classes that occur in truth or prediction, from one confusion matrix at the masks' resolution",
        },
        details={
            "mIoU by C, mean over draws": [
                {"C": c} | {name: by_c[c] for name, by_c in sweeps.items()}
                for c in sorted({settings.c, *settings.sweep})
            ],
            "draws": {name: [used[name, place] for place in range(len(draws))] for name, draws in drawn.items()},
            "mIoU of the true class of each patch": mean_iou(grid.matrix_KK),
        },
        pictures=pictures(subject, test, how, first, features=False)
        | {"mIoU over labelled images": charts.over_images("segmentation", "mIoU", list(drawn), sizes, runs)},
        counts={
            "training images": len(train),
            "test images": len(test),
            "classes that occur in no training image": int((occurs_nK.sum(0) == 0).sum()),
            "test pixels": int(grid.matrix_KK.sum()),
        },
        feature="patch tokens after the final norm",
    )
