"""COCO's average precision of detections, boxes or masks (Lin et al., Microsoft COCO, ECCV 2014, and cocodataset.org).

pycocotools computes it, or faster-coco-eval where it is installed, from memory and without a word.

Shapes: n objects and d detections of one image, H x W its pixels, K categories. Boxes are (x0, y0, x1, y1) in pixels.
"""

import contextlib
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BACKENDS = {
    "faster-coco-eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
}
SIZES = ("all", "small", "medium", "large")
MOST = 100  # detections of an image that count
RECALL = np.linspace(0, 1, 101)
Runs = tuple[dict[str, Any], ...]  # COCO's run lengths of masks, [H, W] each


@dataclass(frozen=True)
class Truth:
    """The objects of one image.

    Attributes:
        size: (H, W).
        boxes: float [n, 4].
        labels: int [n], from 0 to K - 1.
        areas: float [n], in pixels; they say which objects are small, medium or large.
        ignored: bool [n]. These count neither as found nor as missed, and a detection that lies in one is no mistake, as with
            COCO's crowds; VOC's difficult objects are taken the same way.
        runs: n masks; None where only boxes are judged.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    runs: Runs | None = None


@dataclass(frozen=True)
class Found:
    """The detections in one image, in any order: boxes float [d, 4], labels int [d], scores float [d], and d masks, or None."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    runs: Runs | None = None


@dataclass(frozen=True)
class Precision:
    """Average precision over recalls 0, .01, ... 1, from 0 to 1; NaN where no object counts.

    Attributes:
        ap: mean over categories with an object and over overlaps .5, .55, ... .95.
        ap50, ap75: at one overlap.
        small, medium, large: of objects below 32^2 pixels, up to 96^2, and above.
        by_category: float64 [K], as `ap`.
        curve: float64 [101], precision at each recall of RECALL, at overlap .5, mean over categories.
        backend: the package that ran.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    by_category: np.ndarray
    curve: np.ndarray
    backend: str


def encoded(masks: np.ndarray) -> Runs:
    """Run lengths of masks, bool [n, H, W]."""
    from pycocotools import mask  # slow to import, and wanted here only

    return tuple(mask.encode(np.asfortranarray(one, np.uint8)) for one in masks)


def backend() -> str:
    """faster-coco-eval where it is installed, else pycocotools."""
    for name, (module, _, _) in BACKENDS.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            return name
    raise ImportError("neither faster-coco-eval nor pycocotools is installed")


def coco_ap(
    truth: Sequence[Truth],
    found: Sequence[Found],
    categories: int,
    kind: Literal["box", "mask"] = "box",
    package: str | None = None,
) -> Precision:
    """Judge the detections of a set of images.

    Args:
        truth, found: of the same images in the same order; for kind "mask" all with masks.
        categories: K. Those without an object do not count, whatever was found of them.
        package: a key of BACKENDS; by default what `backend` says.
    """
    package = package or backend()
    tools, evaluation, judge = BACKENDS[package]
    images = [{"id": place, "height": t.size[0], "width": t.size[1]} for place, t in enumerate(truth, 1)]
    about = {"images": images, "categories": [{"id": label, "name": str(label)} for label in range(1, categories + 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        sets = []
        for rows in (_objects(truth, kind), _detections(found, kind)):
            # an id of 0 would read as "matched with nothing"
            rows = [row | {"id": number} for number, row in enumerate(rows, 1)]
            sets.append(importlib.import_module(tools).COCO())
            sets[-1].dataset = about | {"annotations": rows}
            sets[-1].createIndex()
        evaluated = getattr(importlib.import_module(evaluation), judge)(*sets, {"box": "bbox", "mask": "segm"}[kind])
        evaluated.params.maxDets = [1, 10, MOST]
        evaluated.evaluate()
        evaluated.accumulate()
    # overlaps, recalls, categories, sizes of objects; -1 where no object counts
    precision_TRKA = np.asarray(evaluated.eval["precision"])[..., -1].astype(np.float64)
    precision_TRKA[precision_TRKA < 0] = np.nan
    whole_TRK = precision_TRKA[..., 0]
    by_size = [_mean(precision_TRKA[..., place]) for place in range(1, len(SIZES))]
    counting = ~np.isnan(whole_TRK).any((0, 1))
    return Precision(
        _mean(whole_TRK),
        _mean(whole_TRK[0]),
        _mean(whole_TRK[5]),
        *by_size,
        np.array([_mean(whole_TRK[..., label]) for label in range(categories)]),
        whole_TRK[0][:, counting].mean(1) if counting.any() else np.full(len(RECALL), np.nan),
        package,
    )


def _objects(truth: Sequence[Truth], kind: str) -> list[dict[str, Any]]:
    return [
        {
            "image_id": place,
            "category_id": int(t.labels[row]) + 1,
            "bbox": _corner_and_sides(t.boxes[row]),
            "area": float(t.areas[row]),
            "iscrowd": int(t.ignored[row]),
        }
        | ({"segmentation": t.runs[row]} if kind == "mask" else {})
        for place, t in enumerate(truth, 1)
        for row in range(len(t.labels))
    ]


def _detections(found: Sequence[Found], kind: str) -> list[dict[str, Any]]:
    from pycocotools import mask

    rows = []
    for place, f in enumerate(found, 1):
        for row in range(len(f.labels)):
            box = _corner_and_sides(f.boxes[row])
            area = float(mask.area(f.runs[row])) if kind == "mask" else box[2] * box[3]
            rows.append(
                {
                    "image_id": place,
                    "category_id": int(f.labels[row]) + 1,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                    "score": float(f.scores[row]),
                }
                | ({"segmentation": f.runs[row]} if kind == "mask" else {})
            )
    return rows


def _corner_and_sides(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(side) for side in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
