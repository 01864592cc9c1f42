"""Images as they are: an image's own shape in whole patches, and so the size of its view (after NaViT, arXiv 2307.06304, and
Pix2Struct, arXiv 2210.03347, of which ours takes the nearest grid rather than the largest).

Shapes: B images, D of different size, G grids, N patches at most; 2 is (width, height) of an image as stored, (rows, columns) of
a grid, (height, width) of a view.
"""

from functools import lru_cache

import numpy as np

from engine.core.draws import seed_of
from engine.data.views import Augmentation


def nearest_grids(sizes_B2: np.ndarray, patches: int) -> np.ndarray:
    """The grid of at most so many patches that comes nearest to each image's shape, int64 [B, 2], (rows, columns).

    Of a width w and a height h, all N patches would make sqrt(N h / w) rows and sqrt(N w / h) columns; nearest is the grid of
    least squared distance to these in logarithms. Of two that are as near, the one with fewer rows.
    """
    different_D2, which_B = np.unique(sizes_B2.astype(np.float64), axis=0, return_inverse=True)
    grids_G2 = _grids(patches)
    half_D1 = np.log(different_D2[:, 1:] / different_D2[:, :1]) / 2
    wanted_D2 = np.log(patches) / 2 + half_D1 * (1, -1)
    distances_DG = np.square(wanted_D2[:, None] - np.log(grids_G2)).sum(-1)
    # rounded, so that what is as near in numbers is so on every machine
    return grids_G2[distances_DG.round(9).argmin(1)][which_B.reshape(-1)]


def shown_sizes(view: Augmentation, sizes_B2: np.ndarray, turns_B: np.ndarray | None = None) -> np.ndarray:
    """The (height, width) in pixels of each image's view, int64 [B, 2]: of a view with a `patch`.

    Args:
        turns_B: int64 [B], which of the view's `sides` an image's room has; the first, unless it is given.
    """
    turns_B = np.zeros(len(sizes_B2), np.int64) if turns_B is None else turns_B
    shown_B2 = np.empty(sizes_B2.shape, np.int64)
    for turn, side in enumerate(view.sides):
        rows, columns = (max(1, round(side * whole / view.patch)) for whole in view.size)
        shown_B2[turns_B == turn] = nearest_grids(sizes_B2[turns_B == turn], rows * columns) * view.patch
    return shown_B2


def turns(view: Augmentation, rows: slice, seed: int, step: int, index: int) -> np.ndarray:
    """Which of the view's `sides` each of these rows of a step's global batch has, int64 [B]: one after the other, beginning with
    any, so that all ranks have as many of each. Which images lie in which row is drawn for each epoch.

    Args:
        index: of the view among those of the step.
    """
    first = seed_of(seed, step, index, "side") % len(view.sides)
    return (np.arange(rows.start, rows.stop) + first) % len(view.sides)


@lru_cache(maxsize=64)
def _grids(patches: int) -> np.ndarray:
    """int64 [G, 2]: all of one to so many patches, by rows, then columns."""
    return np.array([(rows, columns) for rows in range(1, patches + 1) for columns in range(1, patches // rows + 1)])
