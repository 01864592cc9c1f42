"""Charts of what protocols found, as matplotlib figures.

Shapes: K classes, n images, C feature width.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from engine.core.plotting import Figure
from engine.evals.features import Features, as_numpy, threads_for
from engine.training.curves import COLOURS

MAPS = {"pca": "principal components", "tsne": "t-SNE"}
_SIZE = (6, 5.2)
_MAP_POINTS = 5000  # t-SNE and the eye gain nothing from more
_FEWEST_ON_A_MAP = 4  # neither method has anything to say of fewer, and each refuses some of them
_PERPLEXITY = 30.0  # scikit-learn's default; it must be less than the points
_NAMED_CLASSES = 20  # beyond this, class names would overlap


def confusion(counts_KK: np.ndarray, classes: Sequence[str] | None = None) -> Figure:
    """The confusion matrix (true by predicted class, whole numbers), every true class's row in percent."""
    share_KK = 100 * counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(counts_KK) <= _NAMED_CLASSES:
        numbers = [str(label) for label in range(len(counts_KK))]
        names = classes if classes and len(classes) == len(numbers) else numbers
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(counts_KK):
            dark = "white" if share_KK[row, column] > 50 else "black"
            axes.text(column, row, counts_KK[row, column], ha="center", va="center", color=dark, fontsize=8)
    return figure


def feature_map(test: Features, kind: str = "pca") -> Figure:
    """Labelled features in two dimensions, coloured by class; at most 5,000 of them, evenly spaced. `kind` is a key of MAPS."""
    rows = np.unique(np.linspace(0, len(test.values) - 1, min(len(test.values), _MAP_POINTS)).round().astype(int))
    values_nC, labels_n = test.values.cpu().numpy()[rows], as_numpy(test.labels)[rows]
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    if len(rows) < _FEWEST_ON_A_MAP:
        figure = Figure(figsize=_SIZE)
        figure.text(0.5, 0.5, f"a map wants {_FEWEST_ON_A_MAP} images or more, and there are {len(rows)}", ha="center")
        return figure
    reduce = PCA(2, random_state=0) if kind == "pca" else TSNE(2, init="pca", perplexity=perplexity, random_state=0)
    with threads_for(2 * values_nC.size):
        xy_n2 = reduce.fit_transform(values_nC)
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    present = np.unique(labels_n)
    colours = matplotlib.colormaps["tab10" if len(present) <= 10 else "turbo"]
    for i, label in enumerate(present):
        of_class = labels_n == label
        colour = colours(i if len(present) <= 10 else i / (len(present) - 1))
        name = test.classes[label] if test.classes else str(label)
        axes.scatter(*xy_n2[of_class].T, s=9, color=colour, label=name)
    if len(present) <= _NAMED_CLASSES:
        figure.legend(loc="outside right upper", markerscale=2, fontsize=8)
    axes.set(xticks=[], yticks=[])
    return figure


def over_images(title: str, figure: str, names: list[str], images: list[float], runs: list[list[float]]) -> Figure:
    """A picture of a figure over the images of each subset: mean and deviation of its runs, in percent, and each run."""
    order = np.argsort(images, kind="stable")
    picture = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = picture.add_subplot()
    means, spreads = zip(*((100 * np.mean(runs[i]), 100 * np.std(runs[i])) for i in order))
    axes.errorbar([images[i] for i in order], means, spreads, marker="o", capsize=3)
    for i in order:
        axes.plot([images[i]] * len(runs[i]), 100 * np.array(runs[i]), ".", color="grey", markersize=3)
        axes.annotate(names[i], (images[i], 100 * np.mean(runs[i])), (4, 6), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    ticks = np.unique(images)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel="labelled images", ylabel=f"{figure}, %")
    axes.grid(alpha=0.3)
    return picture


def losses(courses: Mapping[str, Sequence[float]], looks: Mapping[int, float] | None = None) -> Figure:
    """The running mean of losses by update, and of a single course each loss, faintly; mIoU where it was looked at on the way."""
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, course) in enumerate(courses.items()):
        colour = COLOURS[number % len(COLOURS)]
        steps, window = np.arange(1, len(course) + 1), max(1, len(course) // 20)
        if len(courses) == 1:
            axes.plot(steps, course, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps[window - 1 :], np.convolve(course, np.ones(window) / window, "valid"), color=colour, label=name)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    if len(courses) > 1:
        axes.legend()
    if looks:
        other = axes.twinx()
        other.plot(list(looks), [100 * value for value in looks.values()], "o-", color=COLOURS[1], markersize=4)
        other.set(ylabel="mIoU (%)", ylim=(0, 100))
    return figure
