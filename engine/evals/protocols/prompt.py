"""Zero-shot segmentation from a prompting patch: the patch under a point on an object is compared with all others, and where the
cosine is at least a threshold, there is the object.

After "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding" (Wu et al. 2023, arXiv 2308.11448), whose
abstract describes this and no more: where the prompts lie, the inputs, the thresholds and the figures are our proposal.

Thresholds come in three regimes that are never mixed. One: the same for all objects, chosen on other images. Otsu's: from each
map alone (Otsu 1979). Oracle: each object's best for IoU, which knows the truth, so an upper bound; F is that of the same mask.
Beside them stands the IoU of the truth itself when it is drawn with whole patches, those that it covers by more than half. It
tells what the grid allows; maps drawn between the patches can pass it.

A map of 480 x 640 pixels takes a CPU about a twentieth of a second, each object has about ten for each input, and as many threads
work as load images: with the defaults COCO is a matter of tens of minutes.

Shapes: H x W annotated pixels in sight, h x w patches, C width, Q prompts of an object (the interior point, then random ones), T
thresholds, M figures, n objects.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.ndimage import distance_transform_edt
from skimage.filters import threshold_otsu
from torch import Tensor
from tyro.conf import Suppress

from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.data import ahead
from engine.data.annotated.dense import Frame
from engine.data.annotated.objects import ObjectSet
from engine.evals import patches
from engine.evals.metrics.boundary import f, j
from engine.evals.metrics.overlap import Scores, auroc, average_precision
from engine.evals.patches import Shown
from engine.evals.result import Result
from engine.evals.subject import Subject

WANTS, READS = "model", "masks"
SOURCE = "proposal after arXiv 2308.11448, not a reproduction: the paper's numbers were not found"
THRESHOLDS = np.arange(-20, 100, 5) / 100
REGIMES = ("one threshold", "oracle thresholds (upper bound)", "Otsu's thresholds")
FIGURES = (*(f"{figure}, {regime}" for regime in REGIMES for figure in ("IoU", "F", "J&F")), "AP", "AUROC")
INTERIOR, RANDOM = "interior point", "random pixels"
GRID = "IoU of the truth in whole patches"
_EXAMPLES = 4


@dataclass(frozen=True)
class Settings:
    """Zero-shot segmentation from a prompting patch."""

    layers: tuple[str, ...] = ("norm", "keys")
    """Patch features: norm (tokens after the last norm), keys (of the last block's attention)."""
    inputs: tuple[str, ...] = ()
    """MODE:PIXELS, several are reported apart: crop (short side, then the centre), short (short side, all of it), square.
    Default: crop:224 short:480, or images of a small set at their own size."""
    random_prompts: int = 5
    """Random pixels of each object that prompt, besides the one furthest inside."""
    chosen_on: Literal["train", "test"] = "train"
    """The one threshold is chosen on a tenth of the training images, or of the test images, which then don't count."""
    most_objects: int = 2000
    """Objects judged, drawn at random, the same for all weights; 0 for all. The threshold is chosen on a tenth as many."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        patches.check_inputs(self.inputs, self.layers)
        for name in ("random_prompts", "most_objects"):
            if getattr(self, name) < 0:
                raise BadInput(f"prompt {name.replace('_', ' ')} = {getattr(self, name)} must be 0 or more.")


def check(train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    patches.check_objects("prompt", test, "test")
    if settings.chosen_on == "train":
        patches.check_objects("prompt", train, "training")
    elif len(test) < 2:
        raise BadInput("prompt chosen_on = test needs two test images at least; one has to be set aside.")


def check_model(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the inputs."""
    patches.check_model(subject, test, inputs_for(test, settings, subject.vit.patch_size))


def interior_point(mask_HW: np.ndarray) -> np.ndarray:
    """int64 [2], row and column of the pixel furthest from all that is not the object, or the edge; the first of equals."""
    inside_HW = distance_transform_edt(np.pad(mask_HW, 1))[1:-1, 1:-1]
    return np.array(np.unravel_index(inside_HW.argmax(), mask_HW.shape))


def prompts(mask_HW: np.ndarray, random: int, *seed: int) -> np.ndarray:
    """int64 [1 + random, 2]: the interior point, and pixels of the mask drawn uniformly, the same for equal seeds."""
    pixels = np.argwhere(mask_HW)
    drawn = np.random.default_rng(seed).integers(len(pixels), size=random)
    return np.concatenate([interior_point(mask_HW)[None], pixels[drawn]])


def similarity_maps(map_hwC: Tensor, patches_Q2: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """float64 [Q, H, W]: cosines of all patches with each of these, bilinear between their centres, six digits."""
    directions_hwC = patches.directions(map_hwC)
    prompts_QC = directions_hwC[patches_Q2[:, 0], patches_Q2[:, 1]]
    coarse_Qhw = torch.einsum("hwc,qc->qhw", directions_hwC, prompts_QC)
    fine = torch.nn.functional.interpolate(coarse_Qhw[None], shape, mode="bilinear", align_corners=False)[0]
    return fine.numpy().clip(-1, 1).round(patches.DIGITS)


def iou_by_threshold(map_HW: np.ndarray, truth_HW: np.ndarray, ignored_HW: np.ndarray) -> np.ndarray:
    """float64 [T]: IoU with the truth of what is at or above each of THRESHOLDS. The truth is not empty."""
    passed_HW = np.searchsorted(THRESHOLDS, map_HW, side="right")

    def at_or_above(pixels: np.ndarray) -> np.ndarray:
        return np.bincount(passed_HW[pixels], minlength=len(THRESHOLDS) + 1)[::-1].cumsum()[::-1][1:]

    inside_T, outside_T = at_or_above(truth_HW), at_or_above(~truth_HW & ~ignored_HW)
    return inside_T / (truth_HW.sum() + outside_T)


def figures(
    map_HW: np.ndarray, truth_HW: np.ndarray, ignored_HW: np.ndarray, ious_T: np.ndarray, one: int
) -> np.ndarray:
    """float64 [M], in the order of FIGURES. `one` is the place in THRESHOLDS of the one threshold."""
    regimes = THRESHOLDS[one], THRESHOLDS[ious_T.argmax()], threshold_otsu(map_HW)
    found_3HW = np.stack([map_HW >= threshold for threshold in regimes])
    ious = j(found_3HW, truth_HW, ignored_HW)
    borders = f(found_3HW, truth_HW, ignored=ignored_HW)
    object_, surroundings = Scores(map_HW[truth_HW]), Scores(map_HW[~truth_HW & ~ignored_HW])
    by_regime = np.stack([ious, borders, (ious + borders) / 2], 1)
    return np.array([*by_regime.flat, average_precision(object_, surroundings), auroc(object_, surroundings)])


def grid_iou(mask_HW: np.ndarray, ignored_HW: np.ndarray, grid: tuple[int, int]) -> float:
    """IoU of the truth with the patches that it covers by more than half: about what whole patches can reach."""
    taken_hw = patches.shares(mask_HW[None], grid)[0] > 0.5
    pixels_HW2 = np.moveaxis(np.indices(mask_HW.shape), 0, -1)
    rows, columns = np.moveaxis(patches.patch_of(pixels_HW2, mask_HW.shape, grid), -1, 0)
    return j(taken_hw[rows, columns], mask_HW, ignored_HW)


@dataclass(frozen=True, eq=False)
class Judged:
    """Of n objects of one input; NaN for those not counted.

    Attributes:
        figures: by layer, float64 [n, Q, M]; NaN where only curves were wanted.
        ious: by layer, float64 [n, Q, T].
        grid: float64 [n], see `grid_iou`.
        labels: int64 [n].
        small: objects left out because they are smaller than a patch.
        alone: likewise, because they leave no other pixel.
    """

    figures: dict[str, np.ndarray]
    ious: dict[str, np.ndarray]
    grid: np.ndarray
    labels: np.ndarray
    small: int
    alone: int

    @property
    def counted(self) -> int:
        return int((~np.isnan(self.grid)).sum())


Chosen = dict[int, list[int]]  # by image, the places of its objects


def chosen_objects(objects: ObjectSet, images: Sequence[int], most: int) -> Chosen:
    """Of these images, the objects that count, or so many of them, drawn at random from a fixed seed."""
    every = [(index, place) for index in images for place in np.flatnonzero(~objects.objects[index].ignored).tolist()]
    if most and most < len(every):
        every = [every[row] for row in np.sort(np.random.default_rng(0).permutation(len(every))[:most])]
    chosen: Chosen = {}
    for index, place in every:
        chosen.setdefault(index, []).append(place)
    return chosen


def judge(
    subject: Subject,
    objects: ObjectSet,
    chosen: Chosen,
    how: Frame,
    settings: Settings,
    one: dict[str, int] | None = None,
) -> Judged:
    """The figures of these objects, in order; without the one threshold of each layer, `ious` of the interior point only."""

    def score(shown: Shown) -> list[dict | str]:
        return [_score(shown, place, settings, one) for place in chosen[shown.index]]

    images = patches.shown(subject, objects, list(chosen), how, settings.layers)
    rows = [row for of_image in ahead.loaded(score, images, subject.threads) for row in of_image]
    labels = np.concatenate([objects.objects[index].labels[places] for index, places in chosen.items()])
    asked = 1 + settings.random_prompts if one else 1

    def gathered(kind: str, layer: str, width: int) -> np.ndarray:
        left_out = np.full((asked, width), np.nan)
        return np.stack([left_out if isinstance(row, str) else row[kind][layer] for row in rows])

    return Judged(
        {layer: gathered("figures", layer, len(FIGURES)) for layer in settings.layers},
        {layer: gathered("ious", layer, len(THRESHOLDS)) for layer in settings.layers},
        np.array([np.nan if isinstance(row, str) else row["grid"] for row in rows]),
        labels,
        rows.count(_SMALL),
        rows.count(_ALONE),
    )


_SMALL, _ALONE = "small", "alone"


def _score(shown: Shown, place: int, settings: Settings, one: dict[str, int] | None) -> dict | str:
    """What `judge` gathers of one object, or why it does not count."""
    truth_HW, ignored_HW, shape = shown.masks[place], shown.ignored, shown.ignored.shape
    grid = tuple(next(iter(shown.maps.values())).shape[:2])
    if truth_HW.sum() * grid[0] * grid[1] < truth_HW.size:
        return _SMALL
    if (truth_HW | ignored_HW).all():
        return _ALONE
    pixels_Q2 = prompts(truth_HW, settings.random_prompts if one else 0, settings.seed, shown.index, place)
    # pixels of one patch have one map between them
    patches_P2, map_of_Q = np.unique(patches.patch_of(pixels_Q2, shape, grid), axis=0, return_inverse=True)
    found = {"grid": grid_iou(truth_HW, ignored_HW, grid), "ious": {}, "figures": {}}
    for layer, map_hwC in shown.maps.items():
        maps_PHW = similarity_maps(map_hwC, patches_P2, shape)
        ious_PT = np.stack([iou_by_threshold(map_HW, truth_HW, ignored_HW) for map_HW in maps_PHW])
        figures_PM = np.full((len(maps_PHW), len(FIGURES)), np.nan)
        if one:
            for row, map_HW in enumerate(maps_PHW):
                figures_PM[row] = figures(map_HW, truth_HW, ignored_HW, ious_PT[row], one[layer])
        found["ious"][layer], found["figures"][layer] = ious_PT[map_of_Q], figures_PM[map_of_Q]
    return found


def over_classes(values_n: np.ndarray, labels_n: np.ndarray) -> float:
    """The mean over classes of the mean over their objects; NaN does not count."""
    means = [values_n[labels_n == label] for label in np.unique(labels_n[~np.isnan(values_n)])]
    return float(np.mean([np.nanmean(of_class) for of_class in means]))


def inputs_for(objects: ObjectSet, settings: Settings, patch: int) -> tuple[str, ...]:
    """Those of the settings, or what suits the set; sides are rounded to a multiple of the patch size."""
    return settings.inputs or patches.default_inputs(objects, patch)


def _sets(train: ObjectSet, test: ObjectSet, settings: Settings) -> tuple[ObjectSet, Chosen, Chosen]:
    """The set that the one threshold is chosen on, its objects, and the test set's; none is in both."""
    on = train if settings.chosen_on == "train" else test
    usable = [index for index, each in enumerate(on.objects) if (~each.ignored).any()]
    drawn = np.random.default_rng(0).permutation(usable)[: max(1, round(len(usable) / 10))]
    aside = set(drawn.tolist()) if on is test else set()
    most = settings.most_objects and max(1, settings.most_objects // 10)
    judged = [index for index in range(len(test)) if index not in aside]
    return on, chosen_objects(on, np.sort(drawn).tolist(), most), chosen_objects(test, judged, settings.most_objects)


def evaluate(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings = Settings()) -> Result:
    """All figures of all inputs and layers, from the interior point and from random pixels, over objects and over classes.

    Raises:
        BadInput: no object counts, an image or a mask cannot be read, or the weights are no ViT that takes these inputs.
    """
    check(train, test, settings)
    patch = subject.vit.patch_size
    inputs = inputs_for(test, settings, patch)
    on, choosing, judged = _sets(train, test, settings)
    if not judged:
        raise BadInput("prompt: once the images that the threshold is chosen on are set aside, no test object is left.")
    values, samples, counts, tables, curves, thresholds = {}, {}, {}, {}, [], {}
    for text in inputs:
        how = patches.frame(text, patch)
        before = judge(subject, on, choosing, how, settings)
        if not before.counted:
            raise BadInput(f"prompt: at {text}, each object that the threshold is chosen on is smaller than a patch.")
        one = {layer: int(np.nanmean(ious[:, 0], 0).argmax()) for layer, ious in before.ious.items()}
        found = judge(subject, test, judged, how, settings, one)
        if not found.counted:
            raise BadInput(
                f"prompt: at {text}, each test object is smaller than a patch; give a larger --prompt.inputs."
            )
        at = f" at {text}" if len(inputs) > 1 else ""
        values[GRID + at], samples[GRID + at] = float(np.nanmean(found.grid)), found.grid
        values[f"{GRID}, over classes{at}"] = over_classes(found.grid, found.labels)
        counts |= {
            f"objects{at}": found.counted,
            f"left out, smaller than a patch{at}": found.small,
            f"left out, fill the image{at}": found.alone,
            f"objects that the threshold was chosen on{at}": before.counted,
        }
        for layer in settings.layers:
            thresholds[f"{layer}{at}"] = float(THRESHOLDS[one[layer]])
            curves.append((f"{layer}{at}", np.nanmean(found.ious[layer][:, 0], 0), one[layer]))
            kinds = {INTERIOR: found.figures[layer][:, :1], RANDOM: found.figures[layer][:, 1:]}
            for kind, figures_nQM in kinds.items():
                if figures_nQM.shape[1]:
                    _enter(values, samples, tables, f"{layer}, {kind}{at}", figures_nQM, found.labels)
    at = f" at {inputs[0]}" if len(inputs) > 1 else ""
    named = "IoU, one threshold", "J&F, one threshold", "AUROC"
    headline = (*(f"{figure}: {settings.layers[0]}, {INTERIOR}{at}" for figure in named), GRID + at)
    return Result(
        protocol="prompt",
        values=values,
        settings=asdict(settings)
        | {
            "inputs": inputs,
            "patch size": patch,
            "one threshold": thresholds,
            "thresholds": f"{THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g} in steps of 0.05",
            "source": SOURCE,
        },
        details=tables,
        headline=headline,
        samples=samples,
        spread=f"{settings.random_prompts} random prompts of each object" if settings.random_prompts else "",
        counts={
            "test images": len(judged),
            "ignored objects": sum(int(each.ignored.sum()) for each in test.objects),
            **counts,
        },
        feature=f"patch tokens of the last layer: {' and '.join(settings.layers)}",
        pictures={
            "prompts and what they find": _draw_examples(subject, test, judged, inputs[0], settings, thresholds),
            "IoU by threshold": _draw_curves(curves),
            "IoU of objects": _draw_histogram(samples, headline[0], headline[-1]),
        },
    )


def _enter(
    values: dict, samples: dict, tables: dict, where: str, figures_nQM: np.ndarray, labels_n: np.ndarray
) -> None:
    """Enter the figures of one kind of prompt into the values, the samples and a table for each regime."""
    means = {
        "objects": lambda figures_nM: np.nanmean(figures_nM, 0),
        "classes": lambda figures_nM: np.array([over_classes(each_n, labels_n) for each_n in figures_nM.T]),
    }
    for over, mean in means.items():
        means_QM = np.stack([mean(figures_nM) for figures_nM in figures_nQM.swapaxes(0, 1)])
        rows = {table: {"prompt": where, "over": over} for table in (*REGIMES, "without a threshold")}
        for place, figure in enumerate(FIGURES):
            found = {"": float(means_QM[:, place].mean())}
            if len(means_QM) > 1:
                found[" std"] = float(means_QM[:, place].std())
            short, _, regime = figure.partition(", ")
            rows[regime or "without a threshold"].update({short + spread: value for spread, value in found.items()})
            if short == "IoU" or (short != "F" and over == "objects"):  # all others stand in the tables only
                name = f"{figure}: {where}" + (", over classes" if over == "classes" else "")
                values.update({name + spread: value for spread, value in found.items()})
        for table, row in rows.items():
            tables.setdefault(table, []).append(row)
    for place, figure in enumerate(FIGURES):
        if f"{figure}: {where}" in values:
            samples[f"{figure}: {where}"] = figures_nQM[..., place].mean(1)


def _draw_examples(
    subject: Subject, test: ObjectSet, judged: Chosen, text: str, settings: Settings, thresholds: dict[str, float]
) -> Figure:
    """Images with their prompts, maps, and what the three regimes make of them."""
    how, layer = patches.frame(text, subject.vit.patch_size), settings.layers[0]
    images = list(judged)
    some = [images[row] for row in np.unique(np.linspace(0, len(images) - 1, min(_EXAMPLES, len(images))).astype(int))]
    figure = Figure(figsize=(9, 1.6 * len(some) + 0.4), layout="constrained")
    grid_of_axes = figure.subplots(len(some), 6, squeeze=False)
    for row, shown in zip(grid_of_axes, patches.shown(subject, test, some, how, (layer,)), strict=True):
        place = max(judged[shown.index], key=lambda place: shown.masks[place].sum())
        truth_HW, shape = shown.masks[place], shown.ignored.shape
        if truth_HW.any():
            _draw_example(row, shown, truth_HW, shape, layer, next(iter(thresholds.values())))
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid_of_axes[0], ("prompt", "cosine", "one", "oracle", "Otsu", "truth"), strict=True):
        axes.set_title(title, fontsize=9)
    figure.suptitle(f"{layer}, {INTERIOR}, {text}; below: threshold and IoU", fontsize=9)
    return figure


def _draw_example(
    row: Sequence[Axes], shown: Shown, truth_HW: np.ndarray, shape: tuple[int, int], layer: str, one: float
) -> None:
    map_hwC = shown.maps[layer]
    pixel = interior_point(truth_HW)
    map_HW = similarity_maps(map_hwC, patches.patch_of(pixel, shape, tuple(map_hwC.shape[:2]))[None], shape)[0]
    oracle = THRESHOLDS[iou_by_threshold(map_HW, truth_HW, shown.ignored).argmax()]
    extent = (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)
    row[0].imshow(shown.pixels.permute(1, 2, 0).numpy(), extent=extent)
    row[0].plot(
        pixel[1], pixel[0], "o", markersize=6, markerfacecolor="none", markeredgecolor="white", markeredgewidth=3
    )
    row[0].plot(pixel[1], pixel[0], "o", markersize=6, markerfacecolor="none", markeredgecolor="crimson")
    row[1].imshow(map_HW, cmap="magma")
    for axes, threshold in zip(row[2:5], (one, oracle, threshold_otsu(map_HW)), strict=True):
        found_HW = map_HW >= threshold
        axes.imshow(found_HW, cmap="gray", vmin=0, vmax=1)
        axes.set_xlabel(f"{threshold:.2f}: {100 * j(found_HW, truth_HW, shown.ignored):.0f} %", fontsize=8)
    row[5].imshow(truth_HW, cmap="gray", vmin=0, vmax=1)


def _draw_curves(curves: Sequence[tuple[str, np.ndarray, int]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, ious_T, one in curves:
        (line,) = axes.plot(THRESHOLDS, 100 * ious_T, label=name)
        axes.plot(THRESHOLDS[one], 100 * ious_T[one], "o", color=line.get_color())
    axes.set(
        xlabel=f"threshold on the cosine; dots: chosen on other images ({INTERIOR})", ylabel="IoU (%)", ylim=(0, None)
    )
    axes.legend(fontsize=8)
    return figure


def _draw_histogram(samples: dict[str, np.ndarray], figure_name: str, grid_name: str) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in (figure_name, grid_name):
        axes.hist(100 * samples[name][~np.isnan(samples[name])], bins=np.arange(0, 101, 5), alpha=0.6, label=name)
    axes.set(xlabel="IoU (%)", ylabel="objects")
    figure.legend(fontsize=8, loc="outside upper center")
    return figure
