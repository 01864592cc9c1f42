"""J and F of objects that are followed through a video, as the DAVIS-2017 toolkit scores its semi-supervised task.

Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016, section 5; Pont-Tuset
et al., The 2017 DAVIS Challenge, arXiv 1704.00675, section 3. The first frame is given and the last one is left out; 255 in a
true mask counts as no object; objects are weighed equally, whatever their video's length.

Shapes: T frames of H x W pixels, K objects, S scored frames (T - 2).
"""

from typing import NamedTuple

import numpy as np

from engine.evals.metrics import boundary

RECALLED = 0.5


class OverTime(NamedTuple):
    """Statistics of one object's J or F.

    Attributes:
        mean: over frames.
        recall: share of the frames in which it is above 0.5.
        decay: mean of the first quarter of the frames less that of the last. Quarters share the frame between them.
    """

    mean: float
    recall: float
    decay: float


def over_time(values_S: np.ndarray) -> OverTime:
    """Statistics of float [S], S at least 1."""
    values_S = np.asarray(values_S, float)
    first, last = np.floor((len(values_S) - 1) * np.array([0.25, 0.75]) + 0.5).astype(int)  # half a frame is rounded up
    decay = values_S[: first + 1].mean() - values_S[last:].mean()
    return OverTime(float(values_S.mean()), float((values_S > RECALLED).mean()), float(decay))


def scored(found_THW: np.ndarray, truth_THW: np.ndarray, objects: int) -> np.ndarray:
    """J and F of each object in each frame but the first and the last.

    Args:
        found_THW: integer ids, 0 for none.
        truth_THW: the true ids; those above `objects` are nobody's.
        objects: K; they have the ids 1 to K.

    Returns:
        float64 [2, K, S], J before F.

    Raises:
        ValueError: the shapes differ, or there are fewer than three frames.
    """
    if found_THW.shape != truth_THW.shape or len(found_THW) < 3:
        raise ValueError(f"ids {found_THW.shape} and {truth_THW.shape} are not those of the same three or more frames")
    pairs = [(found_THW[1:-1] == k, truth_THW[1:-1] == k) for k in range(1, objects + 1)]
    return np.array([[metric(*pair) for pair in pairs] for metric in (boundary.j, boundary.f)])
