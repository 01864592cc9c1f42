"""Region similarity J and boundary accuracy F of segmentation masks, as the DAVIS benchmark scores them.

Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016, section 5: J is the
intersection over the union; F is the F-measure of the precision and recall of the mask's boundary pixels, a pixel being matched
that has one of the other boundary within a distance. The distance and the scores of empty masks are those of the
DAVIS-2017 toolkit.

Shapes: H x W pixels; leading dimensions, if any, are those of a batch.
"""

import math

import numpy as np
from scipy.spatial import cKDTree

TOLERANCE = 0.008  # of the image's diagonal, rounded up to whole pixels


def j(mask: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray | float:
    """Intersection over union of bool [..., H, W] masks, float64 [...]; 1 where both are empty. `ignored` pixels don't count.

    Raises ValueError for shapes that do not broadcast.
    """
    mask, truth = _counted(mask, truth, ignored)
    union = np.logical_or(mask, truth).sum((-2, -1))
    both = np.logical_and(mask, truth).sum((-2, -1))
    return np.where(union == 0, 1.0, both / np.maximum(union, 1))[()]


def f(
    mask: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE, ignored: np.ndarray | None = None
) -> np.ndarray | float:
    """F-measure of the boundaries of bool [..., H, W] masks, float64 [...].

    Where neither mask has a boundary (both empty, or full) it is 1; where only one has, 0.

    Args:
        tolerance: of the diagonal, at which distance a boundary pixel is still matched.
        ignored: bool [..., H, W], pixels taken out of both masks before their boundaries are drawn.

    Raises:
        ValueError: the shapes do not broadcast.
    """
    mask, truth = np.broadcast_arrays(*_counted(mask, truth, ignored))
    reach = math.ceil(tolerance * math.hypot(*mask.shape[-2:]))
    scores = np.empty(mask.shape[:-2])
    for place in np.ndindex(scores.shape):
        scores[place] = _of_pair(boundary(mask[place]), boundary(truth[place]), reach)
    return scores[()]


def boundary(mask_HW: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels that differ from the one to the right, below, or diagonally below; none beyond the image's edge."""
    padded = np.pad(mask_HW, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])


def _counted(mask, truth, ignored) -> tuple[np.ndarray, np.ndarray]:
    mask, truth = np.asarray(mask, bool), np.asarray(truth, bool)
    if ignored is None:
        return mask, truth
    kept = ~np.asarray(ignored, bool)
    return mask & kept, truth & kept


def _of_pair(mine_HW: np.ndarray, true_HW: np.ndarray, reach: int) -> float:
    mine, true = np.argwhere(mine_HW), np.argwhere(true_HW)
    if not len(mine) or not len(true):
        return float(len(mine) == len(true))
    precision, recall = _matched(mine, true, reach), _matched(true, mine, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _matched(points: np.ndarray, others: np.ndarray, reach: int) -> float:
    """The share of points that have another one within reach."""
    # squared distances are whole numbers, so half a unit more keeps those at exactly `reach`
    distance, _ = cKDTree(others).query(points, distance_upper_bound=math.sqrt(reach**2 + 0.5))
    return float(np.isfinite(distance).mean())
