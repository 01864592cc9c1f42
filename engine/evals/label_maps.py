"""Pictures of semantic segmentation: label maps beside images, the IoU of each class, patch features as colours.

Shapes: K classes, H x W pixels of an image, h x w patches, C width.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from sklearn.decomposition import PCA

from engine.core.plotting import Figure
from engine.data.annotated.objects import BACKGROUND, VOID

_NAMED = 20  # classes beyond this would overlap in a legend
_BARS = 40


def colours(classes: Sequence[str]) -> ListedColormap:
    """Of uint8 labels: the background dark, the others of all hues, 255 white."""
    table = np.ones((256, 4))
    things = [label for label, name in enumerate(classes) if name != BACKGROUND]
    wheel = matplotlib.colormaps["tab20" if len(things) <= 20 else "hsv"]
    for place, label in enumerate(things):
        table[label] = wheel(place if len(things) <= 20 else place / len(things))
    for label in set(range(len(classes))) - set(things):
        table[label] = (0.13, 0.13, 0.13, 1)
    return ListedColormap(table)


def beside(images: Sequence[Mapping[str, np.ndarray]], classes: Sequence[str]) -> Figure:
    """One row per image: by the title of its column an image, uint8 [H, W, 3], or a label map, uint8 [H, W]; white is void."""
    columns = list(images[0])
    figure = Figure(figsize=(1.5 * len(columns) + 1, 1.5 * len(images)), dpi=100, layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    table, shown = colours(classes), set()
    for row, shown_maps in zip(grid, images, strict=True):
        for axes, (title, map_) in zip(row, shown_maps.items(), strict=True):
            is_map = map_.ndim == 2
            axes.imshow(table(map_) if is_map else map_, interpolation="nearest" if is_map else None)
            axes.set(xticks=[], yticks=[])
            if axes in grid[0]:
                axes.set_title(title, fontsize=9)
            if is_map:
                shown |= set(np.unique(map_).tolist())
    named = sorted(shown - {VOID})
    if len(named) <= _NAMED:
        handles = [Patch(facecolor=table(label), label=classes[label]) for label in named]
        figure.legend(handles=handles, loc="outside right center", fontsize=7)
    return figure


def iou_bars(iou: Mapping[str, np.ndarray], pixels_K: np.ndarray, classes: Sequence[str]) -> Figure:
    """The IoU [K] of each class that occurs, by each of several methods; of many classes, those with the most true pixels."""
    occurs_K = ~np.all([np.isnan(iou_K) for iou_K in iou.values()], axis=0)
    labels = np.sort([label for label in np.argsort(-pixels_K, kind="stable") if occurs_K[label]][:_BARS])
    figure = Figure(figsize=(6, max(3, 0.2 * len(labels) * len(iou) ** 0.5 + 1)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / len(iou)
    for place, (name, iou_K) in enumerate(iou.items()):
        at = np.arange(len(labels)) + (place - (len(iou) - 1) / 2) * thick
        axes.barh(at, 100 * np.nan_to_num(iou_K[labels]), thick, label=name)
    few = f", the {_BARS} classes with the most pixels" if occurs_K.sum() > _BARS else ""
    axes.set_yticks(range(len(labels)), [classes[label] for label in labels], fontsize=7)
    axes.set(xlabel=f"IoU, %{few}", xlim=(0, 100))
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure


def components(images: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> Figure:
    """Images, uint8 [H, W, 3], above the first three principal components of all their patches [h, w, C] as red, green, blue."""
    rows = np.concatenate([map_hwC.reshape(-1, map_hwC.shape[-1]) for map_hwC in maps]).astype(np.float64)
    kept = min(3, *rows.shape)
    with np.errstate(invalid="ignore"):  # constant features have no variance to explain
        values = PCA(kept, random_state=0).fit_transform(rows)
    low, high = np.percentile(values, (1, 99), axis=0)
    colour = np.zeros((len(rows), 3))
    colour[:, :kept] = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    figure = Figure(figsize=(1.5 * len(images), 3.2), dpi=100, layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    parts = np.split(colour, np.cumsum([map_hwC[..., 0].size for map_hwC in maps])[:-1])
    for column, (image, map_hwC, part) in enumerate(zip(images, maps, parts, strict=True)):
        grid[0, column].imshow(image)
        grid[1, column].imshow(part.reshape(*map_hwC.shape[:2], 3), interpolation="nearest")
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
    return figure
