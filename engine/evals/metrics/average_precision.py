"""Average precision of rankings: how far images that show a class are ranked before those that don't.

Each threshold between different scores gives a precision and a recall; equal scores count as one step, as in scikit-learn. Of
that curve there are three summaries in use, and they differ by some percent:
    envelope   area under the monotone envelope, where precision at a recall is the best at that recall or beyond: VOC2010's
               devkit, and VISSL's on VOC2007
    step       area under the steps of the curve itself: scikit-learn's `average_precision_score`, torchmetrics'
    11-point   mean of the envelope at the recalls 0, .1, ... 1: VOC2007's devkit (Everingham et al. 2010, section 4.2)

Shapes: n images, K classes, T different scores.
"""

import numpy as np
from sklearn.metrics import precision_recall_curve

FORMS = ("envelope", "step", "11-point")
_ELEVEN = np.arange(11) / 10  # quotients, so that a recall of 3 in 10 is the third of them


def curve(scores_n: np.ndarray, targets_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at every threshold, float64 [T] each, in order of rising scores, so of falling recall.

    Args:
        scores_n: finite.
        targets_n: 1, 0, or -1 for what is not counted; at least one 1.

    Raises:
        ValueError: a score is not finite.
    """
    counted_n = targets_n != -1
    precision, recall, _ = precision_recall_curve(targets_n[counted_n] == 1, scores_n[counted_n])
    return precision[:-1], recall[:-1]  # the last is the curve's conventional end at (0, 1), of no threshold


def average_precision(scores_nK: np.ndarray, targets_nK: np.ndarray) -> dict[str, np.ndarray]:
    """Average precision of each class, by form; float64 [K], NaN for a class without positives.

    Args:
        scores_nK: higher is likelier.
        targets_nK: int8, 1 shown, 0 not, -1 not counted in this class.

    Raises:
        ValueError: a score is not finite, or the shapes differ.
    """
    scores_nK, targets_nK = np.asarray(scores_nK), np.asarray(targets_nK)
    if scores_nK.shape != targets_nK.shape:
        raise ValueError(f"scores {scores_nK.shape} and targets {targets_nK.shape} have different shapes")
    found = {form: np.full(scores_nK.shape[1], np.nan) for form in FORMS}
    for k in np.flatnonzero((targets_nK == 1).any(0)):
        precision_T, recall_T = curve(scores_nK[:, k], targets_nK[:, k])
        envelope_T = np.maximum.accumulate(precision_T)
        gained_T = recall_T - np.append(recall_T[1:], 0.0)
        reached = np.searchsorted(-recall_T, -_ELEVEN, side="right") - 1  # the last threshold of at least that recall
        found["envelope"][k] = envelope_T @ gained_T
        found["step"][k] = precision_T @ gained_T
        found["11-point"][k] = envelope_T[reached].mean()
    return found


def class_mean(ap_K: np.ndarray) -> float:
    """Mean average precision: over the classes that have one; NaN if none has."""
    return float(np.mean(ap_K[~np.isnan(ap_K)])) if not np.isnan(ap_K).all() else np.nan
