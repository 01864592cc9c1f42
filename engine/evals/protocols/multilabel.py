"""Multi-label classification: a linear SVM and a logistic regression per class on frozen features, judged by average precision.

The SVM is that of VISSL (Goyal et al. 2019, arXiv 1905.01235, and released code) on VOC2007: rows L2-normalised, a squared hinge
with L2 penalty solved in the dual, positives weighing twice, its cost chosen for each class by threefold cross-validation on the
step form of AP; VISSL's figure is the mean over classes of AP under the precision envelope. The logistic regression is ours: the
same rows and costs, all classes weighing the same, all solved at once. On large sets (COCO has 118,000 images and 80 classes)
choose fewer `costs`, a part of the images for the choice (`choice_images`), and the primal problem (`--multilabel.no-dual`: the
same optimum, faster where images far outnumber channels).

An average precision is no mean over images, so the samples of a mean are the APs of the classes: equal places are equal classes.

Shapes: n training images, m test images, C feature width, K classes, J costs.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.evals import logistic
from engine.evals.features import Features, as_numpy
from engine.evals.metrics.average_precision import average_precision, class_mean, curve
from engine.evals.result import Result

READS = "objects"
CLASSIFIERS = {"svm": "SVM", "logistic": "logistic"}
PREPROCESSING = "rows L2-normalised, test rows too"
_EPS = 1e-5  # added to norms, VISSL's
_SHOWN = 20  # classes that a picture can hold


@dataclass(frozen=True)
class Settings:
    """Multi-label settings."""

    classifiers: tuple[str, ...] = ("svm", "logistic")
    """svm, logistic, or both."""
    costs: tuple[float, ...] = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    """Costs C that each class chooses from (1 / lambda, on sums over images); VISSL's."""
    folds: int = 3
    """Parts that the training set is cut into for the choice; VISSL's. With one cost nothing is cut."""
    choice_images: int = 0
    """Images at most that the cost is chosen on, drawn at random; 0 takes all."""
    dual: bool = True
    """Solve the dual problem of the SVM, as VISSL does, or the primal one."""
    max_iterations: int = 2000
    """Iterations of the SVM at most, VISSL's, and of L-BFGS."""
    tolerance: float = 1e-5
    """The logistic regression stops when no entry of the gradient is larger."""
    uncounted_as_negatives: bool = False
    """Train the SVM with images that are not counted in a class (VOC's difficult ones) as negatives of it, as VISSL's code does.
    Otherwise they are left out, as they always are of tests."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        wrong = [name for name in self.classifiers if name not in CLASSIFIERS]
        if wrong or not self.classifiers:
            raise BadInput(f"multilabel classifiers = {self.classifiers} must be some of {', '.join(CLASSIFIERS)}.")
        if not self.costs or not all(0 < cost < np.inf for cost in self.costs):
            raise BadInput(f"multilabel costs = {self.costs} must be one or more numbers above 0.")
        for name, least in {"folds": 2, "choice_images": 0, "max_iterations": 1}.items():
            if getattr(self, name) < least:
                raise BadInput(f"multilabel {name} = {getattr(self, name)} must be at least {least}.")
        if not self.tolerance > 0:
            raise BadInput(f"multilabel tolerance = {self.tolerance} must be above 0.")


class Ranking(NamedTuple):
    """How one kind of classifier ranks the test images: scores [m, K], the K costs chosen, fits made and not converged."""

    scores_mK: np.ndarray
    costs_K: np.ndarray
    fits: int
    unfinished: int


def targets_of(protocol: str, train: Any, test: Any) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, K] and [m, K] of an ObjectSet or Features.

    Raises:
        BadInput: there are none, they have different classes, or no class can be learned and tested.
    """
    found = []
    for which, images in (("training", train), ("test", test)):
        if getattr(images, "targets", None) is None:
            raise BadInput(
                f"protocol {protocol} needs images that may show several classes and the {which} set says nothing of them; "
                "give --objects coco:DIR or voc:DIR, or leave --objects out for the embedded scenes."
            )
        found.append(as_numpy(images.targets))
    train_nK, test_mK = found
    if train_nK.shape[1] != test_mK.shape[1]:
        raise BadInput(
            f"protocol {protocol}: training has {train_nK.shape[1]} classes and test {test_mK.shape[1]}; give the same."
        )
    if not (learnable(train_nK) & (test_mK == 1).any(0)).any():
        raise BadInput(
            f"protocol {protocol}: no class has training images with and without it and a test image with it; add images."
        )
    return train_nK, test_mK


def learnable(targets_nK: np.ndarray) -> np.ndarray:
    """bool [K]: the classes that some images show and some don't."""
    return (targets_nK == 1).any(0) & (targets_nK == 0).any(0)


def positive_share(targets_nK: np.ndarray, classes_K: np.ndarray) -> float:
    """Mean over some classes (bool [K]) of the share of counted images that show one: about the AP of a random ranking."""
    return float(((targets_nK == 1).sum(0) / np.maximum((targets_nK != -1).sum(0), 1))[classes_K].mean())


def names_of(images: Any, classes: int) -> tuple[str, ...]:
    """K names of an ObjectSet or Features; numbers where there are none."""
    named = getattr(images, "categories", None) or getattr(images, "classes", None)
    return tuple(named or map(str, range(classes)))


def check(train: Any, test: Any, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    targets_of("multilabel", train, test)


def normalised(values_nC: Tensor) -> Tensor:
    """fp64 [n, C], rows of length one (VISSL's: the length plus 1e-5 is what divides)."""
    values_nC = values_nC.double()
    return values_nC / (values_nC.norm(dim=1, keepdim=True) + _EPS)


def with_ones(x_nC: Tensor) -> Tensor:
    """[n, C + 1]: a last column of ones, whose weight is an intercept, regularised as LIBLINEAR does."""
    return torch.cat([x_nC, x_nC.new_ones(len(x_nC), 1)], 1)


def _support_vectors(x_nC: np.ndarray, positive_n: np.ndarray, cost: float, settings: Settings) -> LinearSVC:
    model = LinearSVC(
        C=cost,
        class_weight={1: 2, 0: 1},
        dual=settings.dual,
        max_iter=settings.max_iterations,
        random_state=settings.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        return model.fit(x_nC, positive_n.astype(int))


def _step_ap(scores_mK: np.ndarray, targets_mK: np.ndarray) -> np.ndarray:
    return average_precision(scores_mK, targets_mK)["step"]


def svm_of_class(
    x_nC: np.ndarray, targets_n: np.ndarray, test_mC: np.ndarray, settings: Settings
) -> tuple[np.ndarray, float, int, int]:
    """One column of `svm`: scores [m], the cost, fits made and not converged. The class is learnable."""
    rows = np.arange(len(x_nC)) if settings.uncounted_as_negatives else np.flatnonzero(targets_n != -1)
    x_nC, positive_n = x_nC[rows], targets_n[rows] == 1
    ap_J, iterations, cost = np.zeros(len(settings.costs)), [], settings.costs[len(settings.costs) // 2]
    part = _part(len(rows), settings)
    # a class with fewer images than folds gets fewer folds, one with a single image the middle cost
    folds = int(min(settings.folds, positive_n[part].sum(), (~positive_n[part]).sum()))
    if len(settings.costs) > 1 and folds > 1:
        for fitted, held in StratifiedKFold(folds).split(part, positive_n[part]):
            fitted, held = part[fitted], part[held]
            for j, each in enumerate(settings.costs):
                model = _support_vectors(x_nC[fitted], positive_n[fitted], each, settings)
                iterations.append(model.n_iter_)
                scores = model.decision_function(x_nC[held])
                ap_J[j] += _step_ap(scores[:, None], positive_n[held, None].astype(np.int8))[0]
        cost = settings.costs[int(ap_J.argmax())]
    model = _support_vectors(x_nC, positive_n, cost, settings)
    iterations.append(model.n_iter_)
    unfinished = sum(count >= settings.max_iterations for count in iterations)
    return model.decision_function(test_mC), cost, len(iterations), unfinished


def _part(n: int, settings: Settings) -> np.ndarray:
    """Rows that the cost is chosen on, ascending."""
    if not 0 < settings.choice_images < n:
        return np.arange(n)
    return np.sort(np.random.RandomState(settings.seed).permutation(n)[: settings.choice_images])


def svm(x_nC: Tensor, targets_nK: np.ndarray, test_mC: Tensor, settings: Settings) -> Ranking:
    """VISSL's linear SVMs; the scores of a class that can't be learned are 0, and its cost NaN."""
    x, test = x_nC.cpu().numpy(), test_mC.cpu().numpy()
    scores_mK = np.zeros((len(test), targets_nK.shape[1]))
    costs_K, fits, unfinished = np.full(targets_nK.shape[1], np.nan), 0, 0
    for k in np.flatnonzero(learnable(targets_nK)):
        scores_mK[:, k], costs_K[k], made, left = svm_of_class(x, targets_nK[:, k], test, settings)
        fits, unfinished = fits + made, unfinished + left
    return Ranking(scores_mK, costs_K, fits, unfinished)


def logistic_regression(x_nC: Tensor, targets_nK: np.ndarray, test_mC: Tensor, settings: Settings) -> Ranking:
    """Logistic regressions of all classes. Folds are the same for all; one without positives of a class tells nothing of it."""
    x_nC, test_mC, truth_nK = with_ones(x_nC), with_ones(test_mC), torch.from_numpy(targets_nK).to(x_nC.device)
    how = {"iterations": settings.max_iterations, "tolerance": settings.tolerance}
    costs_J, converged = np.array(sorted(set(settings.costs))), []
    chosen_K = np.full(targets_nK.shape[1], len(costs_J) // 2)
    part = _part(len(x_nC), settings)
    if len(costs_J) > 1 and len(part) >= settings.folds:
        ap_FJK = []
        for fitted, held in KFold(settings.folds, shuffle=True, random_state=settings.seed).split(part):
            fitted, held = part[fitted], part[held]
            found = logistic.path(x_nC[fitted], truth_nK[fitted], logistic.sigmoid, tuple(1 / costs_J), **how)
            converged += [each.converged for each in found.values()]
            scores = [(x_nC[held] @ found[1 / cost].weight_CK).cpu().numpy() for cost in costs_J]
            ap_FJK.append([_step_ap(each, targets_nK[held]) for each in scores])
        chosen_K = np.nan_to_num(ap_FJK).sum(0).argmax(0)
    found = logistic.path(x_nC, truth_nK, logistic.sigmoid, tuple(1 / costs_J[np.unique(chosen_K)]), **how)
    converged += [each.converged for each in found.values()]
    scores_mK = np.stack(
        [(test_mC @ found[1 / costs_J[j]].weight_CK[:, k]).cpu().numpy() for k, j in enumerate(chosen_K)], 1
    )
    return Ranking(scores_mK, costs_J[chosen_K], len(converged), converged.count(False))


def draw_bars(ap: dict[str, np.ndarray], names: Sequence[str]) -> Figure:
    """A picture of the APs [K] of each class, by what ranked; the classes in order where there are too many to be named."""
    picture = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = picture.add_subplot()
    width = 0.8 / len(ap)
    for i, (label, ap_K) in enumerate(ap.items()):
        at_K = np.arange(len(names)) - 0.4 + (i + 0.5) * width
        axes.bar(at_K, 100 * np.nan_to_num(ap_K), width, label=f"{label}, mean {100 * class_mean(ap_K):.1f} %")
    if len(names) <= _SHOWN:
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set(ylabel="average precision (envelope), %", xlabel="class", ylim=(0, 100))
    axes.legend(fontsize=8)
    return picture


def draw_curves(
    label: str, scores_mK: np.ndarray, targets_mK: np.ndarray, ap_K: np.ndarray, names: Sequence[str]
) -> Figure:
    """A picture of precision over recall, of the first twenty classes that have an AP."""
    picture = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = picture.add_subplot()
    for k in np.flatnonzero(~np.isnan(ap_K))[:_SHOWN]:
        precision_T, recall_T = curve(scores_mK[:, k], targets_mK[:, k])
        axes.plot(100 * recall_T, 100 * precision_T, drawstyle="steps-pre", linewidth=1, label=names[k])
    axes.set(title=label, xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 101))
    picture.legend(loc="outside right upper", fontsize=7)
    return picture


def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Mean average precision of both kinds of classifiers, by form.

    Raises:
        BadInput: there are no targets, or no class can be learned and tested.
    """
    train_nK, test_mK = targets_of("multilabel", train, test)
    x_nC, test_mC = normalised(train.values), normalised(test.values)
    names = names_of(train, train_nK.shape[1])
    judged_K = learnable(train_nK) & (test_mK == 1).any(0)
    rank = {"svm": svm, "logistic": logistic_regression}
    forms = {"svm": ("envelope", "step", "11-point"), "logistic": ("envelope", "step")}
    samples, fits, pictures, envelopes = {}, {}, {}, {}
    by_class = {k: {"class": names[k]} for k in np.flatnonzero(judged_K)}
    for classifier in dict.fromkeys(settings.classifiers):
        label = CLASSIFIERS[classifier]
        ranking = rank[classifier](x_nC, train_nK, test_mC, settings)
        found = average_precision(ranking.scores_mK, test_mK)
        for form in forms[classifier]:
            ap_K = np.where(judged_K, found[form], np.nan)
            samples[f"{label} mAP ({form})"] = ap_K
            for k, row in by_class.items():
                row[f"{label} AP ({form})"] = float(ap_K[k])
        for k, row in by_class.items():
            row[f"{label} cost"] = float(ranking.costs_K[k])
        envelopes[label] = samples[f"{label} mAP (envelope)"]
        fits[label] = {"fits": ranking.fits, "not converged": ranking.unfinished}
        pictures[f"precision and recall, {label}"] = draw_curves(
            label, ranking.scores_mK, test_mK, envelopes[label], names
        )
    left_out = [name for name, judged in zip(names, judged_K, strict=True) if not judged]
    return Result(
        protocol="multilabel",
        values={name: class_mean(ap_K) for name, ap_K in samples.items()},
        settings=asdict(settings)
        | {
            "features": PREPROCESSING,
            "SVM": "after VISSL's for VOC2007, which squeezes images into a square (--squeeze --resize bilinear)"
            + ("" if settings.uncounted_as_negatives else "; what is not counted is left out of training too"),
            "logistic": "ours: unweighted, costs chosen alike, folds the same for all classes",
            "samples": "average precisions of the classes, not images",
        },
        details={
            "by class": list(by_class.values()),
            "fits": fits,
            "classes left out of the means": left_out,
            "share of positives, about what a random ranking reaches": positive_share(test_mK, judged_K),
        },
        headline=tuple(name for name in samples if "11" not in name),
        plain=frozenset(f"{label} cost" for label in CLASSIFIERS.values()),
        samples=samples,
        pictures={"average precision by class": draw_bars(envelopes, names)} | pictures,
        counts={"classes": int(judged_K.sum()), "classes left out": len(left_out)},
    )
