"""Semantic segmentation from one confusion matrix over all images: intersection over union (IoU) and accuracies.

The convention is that of Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.2.3, and of mmseg:
pixels are counted over the whole set, not image by image; those whose truth is 255 count nowhere, whatever is predicted there;
the mean IoU is over the classes that occur in truth or prediction, the mean class accuracy over those that occur in truth.

Shapes: K classes, H x W pixels of one image, m images.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

VOID = 255

Labels = np.ndarray | Tensor


def confusion(truth_HW: Labels, predicted_HW: Labels, classes: int) -> np.ndarray:
    """Counts pixels by true class (rows) and predicted class (columns).

    Args:
        truth_HW: integers from 0 to K - 1, or 255 for what is not counted; any shape.
        predicted_HW: integers from 0 to K - 1, as many; on the device of the truth.
        classes: K.

    Returns:
        int64 [K, K].

    Raises:
        ValueError: the shapes differ, or a counted pixel has another value.
    """
    truth, predicted = torch.as_tensor(truth_HW), torch.as_tensor(predicted_HW)
    if truth.shape != predicted.shape:
        raise ValueError(
            f"confusion needs as many predictions as truths, got {[*predicted.shape]} and {[*truth.shape]}"
        )
    counted = truth != VOID
    truth, predicted = truth[counted].long(), predicted[counted].long()
    for name, labels in (("truth", truth), ("prediction", predicted)):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"confusion has {classes} classes, and a {name} from {labels.min()} to {labels.max()}")
    counts = torch.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.view(classes, classes).cpu().numpy()


def class_iou(matrix_KK: np.ndarray) -> np.ndarray:
    """float64 [K]: of each class the pixels found over those true or predicted; NaN where there are neither."""
    return _share(matrix_KK.diagonal(), matrix_KK.sum(0) + matrix_KK.sum(1) - matrix_KK.diagonal())


def mean_iou(matrix_KK: np.ndarray) -> float:
    """The mean of `class_iou` over classes that occur in truth or prediction; NaN if no pixel is counted."""
    return _mean(class_iou(matrix_KK))


def class_accuracy(matrix_KK: np.ndarray) -> np.ndarray:
    """float64 [K]: of each class's true pixels the share found; NaN where it has none."""
    return _share(matrix_KK.diagonal(), matrix_KK.sum(1))


def mean_class_accuracy(matrix_KK: np.ndarray) -> float:
    """The mean of `class_accuracy` over classes that occur in truth; NaN if no pixel is counted."""
    return _mean(class_accuracy(matrix_KK))


def pixel_accuracy(matrix_KK: np.ndarray) -> float:
    """The share of counted pixels whose class was found; NaN if there is none."""
    return float(_share(matrix_KK.trace(), matrix_KK.sum()))


@dataclass
class SegmentationCounts:
    """What is counted over the images of a set, and what each contributes.

    Attributes:
        classes: K.
        matrix_KK: int64 [K, K], of all images so far.
        samples: by name, of each image so far: "image mIoU", the mean IoU within it, and "image pixel accuracy"; NaN where it has
            no counted pixel. Their means are figures of their own: the mean IoU of the set is no mean over images.
    """

    classes: int
    matrix_KK: np.ndarray = field(init=False)
    samples: dict[str, list[float]] = field(init=False)

    def __post_init__(self):
        self.matrix_KK = np.zeros((self.classes, self.classes), np.int64)
        self.samples = {"image mIoU": [], "image pixel accuracy": []}

    def add(self, truth_HW: Labels, predicted_HW: Labels) -> None:
        """Counts one image; arguments and errors as `confusion`."""
        counts_KK = confusion(truth_HW, predicted_HW, self.classes)
        self.matrix_KK += counts_KK
        self.samples["image mIoU"].append(mean_iou(counts_KK))
        self.samples["image pixel accuracy"].append(pixel_accuracy(counts_KK))

    def figures(self, prefix: str = "") -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Values and samples for a Result, each name after the prefix: "mIoU", "pixel accuracy", "mean class accuracy" of the
        whole set, and the means over images of the samples, float64 [m]."""
        values = {
            "mIoU": mean_iou(self.matrix_KK),
            "pixel accuracy": pixel_accuracy(self.matrix_KK),
            "mean class accuracy": mean_class_accuracy(self.matrix_KK),
        }
        samples = {name: np.array(each, np.float64) for name, each in self.samples.items()}
        values |= {name: _mean(each) for name, each in samples.items()}
        return tuple({prefix + name: each for name, each in found.items()} for found in (values, samples))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    """Over what is not NaN; NaN where all is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
