"""Semantic segmentation without training a network: k-NN and logistic regression on frozen patch features.

After CAPI (Darcet et al. 2025, arXiv 2502.08769; eval_segmentation.py): the whole image at 224 x 224, the class of a patch
is that of most of its pixels, features standardised, C of the logistic regression chosen on a tenth of the training images held
out and the fit repeated on all, each pixel judged as its patch. Ours: the vote weighted as in DINO's k-NN, with its k and
temperature (CAPI chooses k, and lets neighbours vote pixel by pixel); C chosen by the IoU of patches; masks judged at their own
resolution; at most so many training patches.

Shapes: n training images, m patches, K classes, C width, h x w patches of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.data.annotated import dense
from engine.data.annotated.objects import VOID, SemanticSet
from engine.evals import label_maps, logistic, segmenting, semantic_patches
from engine.evals.features import Features
from engine.evals.metrics.confusion import class_iou, confusion, mean_iou
from engine.evals.protocols import knn
from engine.evals.result import Result
from engine.evals.subject import Subject

READS, WANTS = "semantic", "model"
HELD_OUT = 10  # one image in so many
_SHOWN = 4


@dataclass(frozen=True)
class Settings:
    """Settings of segmentation by patches."""

    size: int = 0
    """Side of the square input in pixels, a multiple of the patch size; 0 is the nearest to 224, or to the images' own short side
    where that is less."""
    k: int = 20
    """Patches that vote."""
    temperature: float = 0.07
    """Votes weigh exp(cosine / temperature)."""
    c: tuple[float, ...] = tuple(float(f"{value:.3g}") for value in np.logspace(-6, 5, 8))
    """Strengths of the logistic regression, scikit-learn's C, to choose from."""
    max_iterations: int = 1000
    """L-BFGS iterations at most."""
    tolerance: float = 1e-4
    """L-BFGS stops when no entry of the gradient of the mean loss is larger; scikit-learn's default."""
    standardise: bool = True
    """Give every feature dimension the training patches' zero mean and unit deviation."""
    most_patches: int = 20_000
    """Training patches at most, drawn by the seed; 0 takes all. Each takes about 24 C + 40 K bytes (C features, K classes)."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        for name in ("size", "most_patches"):
            if getattr(self, name) < 0:
                raise BadInput(f"segment_patches {name} = {getattr(self, name)} must be at least 0.")
        for name in ("k", "max_iterations"):
            if getattr(self, name) < 1:
                raise BadInput(f"segment_patches {name} = {getattr(self, name)} must be at least 1.")
        if not self.temperature > 0 or not self.tolerance > 0:
            raise BadInput("segment_patches temperature and tolerance must be above 0.")
        if not self.c or not all(c > 0 for c in self.c):
            raise BadInput(f"segment_patches c = {self.c} must be one or more numbers above 0.")


def check(train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    segmenting.check_sets("segment_patches", train, test)
    if len(train) < 2:
        raise BadInput("protocol segment_patches needs two training images, of which one is held out to choose C.")


def check_model(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the input."""
    how = semantic_patches.frame("segment_patches", train, settings.size, subject.vit.patch_size)
    subject.check_input(how.size, how.size)


def by_neighbours(x_mC: Tensor, labels_m: Tensor, classes: int, settings: Settings) -> semantic_patches.Predict:
    """The class with the heaviest vote among the k most similar patches."""
    shift, scale = standardisation(x_mC, settings.standardise)
    train, chosen = (
        Features((x_mC - shift) / scale, labels_m, "patches"),
        knn.Settings(settings.k, settings.temperature),
    )
    return lambda values_BC: knn.predict(train, Features((values_BC - shift) / scale, None, "patches"), chosen, classes)


def fitted(
    x_mC: Tensor, labels_m: Tensor, strengths: Sequence[float], settings: Any
) -> dict[float, tuple[semantic_patches.Predict, bool]]:
    """By C, what logistic regression on these patches predicts, and whether it converged.

    Classes without a patch are never predicted; the intercept is regularised like the weights. Of the settings,
    max_iterations, tolerance and standardise are read.
    """
    present, places_m = labels_m.unique(return_inverse=True)
    shift, scale = standardisation(x_mC, settings.standardise)
    how = {"iterations": settings.max_iterations, "tolerance": settings.tolerance}
    truth_mK, penalties = F.one_hot(places_m), [1 / c for c in strengths]
    fits = logistic.path(with_ones((x_mC - shift) / scale), truth_mK, logistic.softmax, penalties, **how)

    def predictor(weight_CK: Tensor) -> semantic_patches.Predict:
        return lambda values_BC: present[(with_ones((values_BC - shift) / scale) @ weight_CK).argmax(1)]

    return {c: (predictor(fits[1 / c].weight_CK), fits[1 / c].converged) for c in strengths}


def with_ones(x_mC: Tensor) -> Tensor:
    """fp64 [m, C + 1], with a last column of ones for the intercept."""
    return F.pad(x_mC.double(), (0, 1), value=1.0)


def chosen_c(
    x_mC: Tensor, labels_m: Tensor, image_m: np.ndarray, classes: int, settings: Settings
) -> tuple[float, list[dict]]:
    """The C with the best mean IoU over the patches of the images held out, the least one of equals; and each one's."""
    images = np.unique(image_m)
    held = np.random.RandomState(settings.seed).permutation(images)[: max(1, len(images) // HELD_OUT)]
    is_held = torch.from_numpy(np.isin(image_m, held)).to(x_mC.device)
    if len(labels_m[~is_held].unique()) < 2:
        raise BadInput("protocol segment_patches: but for the images held out, the training patches are of one class.")
    fits = fitted(x_mC[~is_held], labels_m[~is_held], settings.c, settings)
    truth, rows = labels_m[is_held], []
    for c in sorted(settings.c):
        predict, converged = fits[c]
        iou = mean_iou(confusion(truth, predict(x_mC[is_held]), classes))
        rows.append({"C": c, "held-out mIoU of patches": iou, "converged": converged})
    return max(rows, key=lambda row: row["held-out mIoU of patches"])["C"], rows


def standardisation(x_mC: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """What to subtract from features, and what then to divide them by."""
    if not wanted:
        return x_mC.new_zeros(()), x_mC.new_ones(())
    return x_mC.mean(0), x_mC.std(0, correction=0) + 1e-5


def evaluate(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings = Settings()) -> Result:
    """mIoU of both over the whole test set, at the pixels of its masks.

    Raises:
        BadInput: the sets do not fit, an image or a mask cannot be read, too few patches are labelled, no pixel of the test set
            counts, or features are not finite.
    """
    check(train, test, settings)
    classes = len(train.semantic_classes)
    how = semantic_patches.frame("segment_patches", train, settings.size, subject.vit.patch_size)
    labels_nhw = semantic_patches.labels(train, how, subject.threads)
    usable_nhw = labels_nhw != VOID
    chosen_nhw = semantic_patches.drawn(usable_nhw, settings.most_patches, settings.seed)
    labels_m = torch.from_numpy(labels_nhw[chosen_nhw]).long().to(subject.device)
    if len(labels_m) < settings.k or len(labels_m.unique()) < 2:
        raise BadInput(
            f"protocol segment_patches: the training set has {len(labels_m)} labelled patches of {len(labels_m.unique())} "
            f"classes; it needs at least k = {settings.k} of two."
        )
    x_mC = semantic_patches.features(subject, train, how, chosen_nhw)
    neighbours = by_neighbours(x_mC, labels_m, classes, settings)
    image_m = np.flatnonzero(chosen_nhw) // chosen_nhw[0].size
    c, by_c = chosen_c(x_mC, labels_m, image_m, classes, settings)
    regression, converged = fitted(x_mC, labels_m, (c,), settings)[c]
    predictors = {"k-NN": neighbours, "logistic": regression}
    found, grid = semantic_patches.judged(subject, test, how, predictors)
    if not grid.matrix_KK.any():
        raise BadInput(f"protocol segment_patches: no pixel of the test set is to be counted, all are {VOID}.")
    values, samples = {}, {}
    for name, counts in found.items():
        its_values, its_samples = counts.figures(f"{name} ")
        values |= its_values
        samples |= its_samples
    values["mIoU of the true class of each patch"] = mean_iou(grid.matrix_KK)
    iou = {name: class_iou(counts.matrix_KK) for name, counts in found.items()}
    names, pixels_K = test.semantic_classes, grid.matrix_KK.sum(1)
    return Result(
        protocol="segment_patches",
        values=values,
        headline=("k-NN mIoU", "logistic mIoU", "k-NN pixel accuracy", "logistic pixel accuracy"),
        samples=samples,
        settings=asdict(settings)
        | {
            "recipe": "after CAPI's eval_segmentation.py; k-NN vote, choice of C by patches and resolution of masks are ours",
            "size": how.size,
            "chosen C": c,
            "converged": converged,
            "mIoU": "over classes that occur in truth or prediction, from one confusion matrix at the masks' resolution",
        },
        details={
            "choice of C": by_c,
            "IoU by class": {
                name: {k: None if np.isnan(v) else float(v) for k, v in zip(names, iou_K, strict=True)}
                for name, iou_K in iou.items()
            },
            "mIoU of the most frequent class everywhere": float(pixels_K.max() / pixels_K.sum() / (pixels_K > 0).sum()),
        },
        pictures=pictures(subject, test, how, predictors) | {"IoU by class": label_maps.iou_bars(iou, pixels_K, names)},
        counts={
            "training images": len(train),
            "test images": len(test),
            "training patches": len(labels_m),
            "labelled training patches not drawn": int(usable_nhw.sum()) - len(labels_m),
            "void training patches left out": int((~usable_nhw).sum()),
            "test pixels": int(grid.matrix_KK.sum()),
        },
        feature="patch tokens after the final norm",
    )


def pictures(
    subject: Subject,
    test: SemanticSet,
    how: dense.Frame,
    predictors: Mapping[str, semantic_patches.Predict],
    features: bool = True,
) -> dict[str, Figure]:
    """Some test images, evenly spaced in the set, with truth and predictions, and their `features` as colours."""
    indices = np.unique(np.linspace(0, len(test) - 1, min(len(test), _SHOWN)).round().astype(int)).tolist()
    rows, images, maps = [], [], []
    for ids, truths, maps_BhwC in semantic_patches.encoded(subject, test, indices, how, with_truth=True):
        found = {name: semantic_patches.predicted(predict, maps_BhwC) for name, predict in predictors.items()}
        for place, (index, truth_HW) in enumerate(zip(ids, truths, strict=True)):
            images.append(dense.read(test.images, index).permute(1, 2, 0).numpy())
            maps.append(maps_BhwC[place].cpu().numpy())
            at = {name: semantic_patches.at_pixels(each[place], truth_HW.shape) for name, each in found.items()}
            rows.append({"image": images[-1], "truth": truth_HW, **at})
    drawn = {"images, truth and prediction": label_maps.beside(rows, test.semantic_classes)}
    if features:
        drawn["patch features, three principal components"] = label_maps.components(images, maps)
    return drawn
