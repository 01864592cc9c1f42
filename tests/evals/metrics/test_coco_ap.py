"""COCO's average precision against pycocotools run on files, torchmetrics, and cases that can be told by hand."""

import contextlib
import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import coco, cocoeval
from torchmetrics.detection import MeanAveragePrecision

from engine.evals.metrics import coco_ap
from engine.evals.metrics.coco_ap import Found, Truth, encoded

H, W, K = 120, 160, 4
NAMES = ("ap", "ap50", "ap75", "small", "medium", "large")


def rectangles(boxes: np.ndarray) -> np.ndarray:
    """bool [n, H, W]: boxes of whole pixels, filled, less a corner, so that masks differ from boxes."""
    masks = np.zeros((len(boxes), H, W), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
        mask[y0:y1, x0:x1] = True
        mask[y0 : y0 + (y1 - y0) // 3, x0 : x0 + (x1 - x0) // 3] = False
    return masks


def boxes_of(rng: np.random.Generator, n: int) -> np.ndarray:
    start = rng.integers(0, (W - 60, H - 60), (n, 2))
    return np.concatenate([start, start + rng.integers(3, 60, (n, 2))], 1).astype(np.float64)


def truth_of(boxes: np.ndarray, labels: list[int], ignored: list[bool] | None = None) -> Truth:
    masks = rectangles(boxes)
    ignored = np.zeros(len(boxes), bool) if ignored is None else np.array(ignored, bool)
    return Truth((H, W), boxes, np.array(labels, int), masks.sum((1, 2)).astype(float), ignored, encoded(masks))


def found_of(boxes: np.ndarray, labels: list[int], scores: list[float]) -> Found:
    return Found(boxes, np.array(labels, int), np.array(scores, float), encoded(rectangles(boxes)))


def random_case(seed: int, images: int = 6, shake: int = 8) -> tuple[list[Truth], list[Found]]:
    """Objects and detections near them, with tied scores, crowds, empty images, and a last category without object."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        n = int(rng.integers(0, 6))
        boxes, labels = boxes_of(rng, n), rng.integers(0, K - 1, n)
        truth.append(truth_of(boxes, labels, rng.random(n) < 0.2))
        chosen = rng.permutation(2 * n)[: int(rng.integers(n, 2 * n + 1))] // 2
        moved = boxes[chosen] + rng.integers(-shake, shake + 1, (len(chosen), 4))
        moved = np.clip(moved, 0, (W, H, W, H))
        kept = (moved[:, 2:] > moved[:, :2]).all(1)
        more = boxes_of(rng, int(rng.integers(0, 3)))
        guesses = np.concatenate([labels[chosen][kept], rng.integers(0, K, len(more))])
        scores = rng.integers(1, 5, len(guesses)) / 4
        found.append(found_of(np.concatenate([moved[kept], more]), guesses, scores))
    return truth, found


def official(truth: list[Truth], found: list[Found], kind: str, folder) -> dict[str, float]:
    """The figures as pycocotools prints them, from the files that its page describes."""
    annotations = [
        {
            "id": 1000 * image + row + 1,
            "image_id": image,
            "category_id": int(t.labels[row]) + 1,
            "bbox": [*t.boxes[row, :2], *(t.boxes[row, 2:] - t.boxes[row, :2])],
            "area": float(t.areas[row]),
            "iscrowd": int(t.ignored[row]),
            "segmentation": {"size": [H, W], "counts": t.runs[row]["counts"].decode()},
        }
        for image, t in enumerate(truth)
        for row in range(len(t.labels))
    ]
    images = [{"id": image, "height": H, "width": W} for image in range(len(truth))]
    categories = [{"id": label + 1, "name": str(label)} for label in range(K)]
    (folder / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    results = [
        {"image_id": image, "category_id": int(f.labels[row]) + 1, "score": float(f.scores[row])}
        | (
            {"bbox": [*f.boxes[row, :2], *(f.boxes[row, 2:] - f.boxes[row, :2])]}
            if kind == "box"
            else {"segmentation": {"size": [H, W], "counts": f.runs[row]["counts"].decode()}}
        )
        for image, f in enumerate(found)
        for row in range(len(f.labels))
    ]
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        api = coco.COCO(str(folder / "truth.json"))
        judged = cocoeval.COCOeval(api, api.loadRes(str(folder / "found.json")), {"box": "bbox", "mask": "segm"}[kind])
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return dict(zip(NAMES, np.where(judged.stats[:6] < 0, np.nan, judged.stats[:6])))


def agrees(ours: coco_ap.Precision, theirs: dict[str, float], tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose([getattr(ours, name) for name in NAMES], [theirs[n] for n in NAMES], atol=tolerance)


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(4))
def test_random_sets_give_what_pycocotools_gives_on_files(tmp_path, kind, seed):
    truth, found = random_case(seed)
    ours = coco_ap.coco_ap(truth, found, K, kind, "pycocotools")
    agrees(ours, official(truth, found, kind, tmp_path))
    assert 0.05 < ours.ap < ours.ap50 < 0.98 and ours.backend == "pycocotools"
    assert np.isnan(ours.by_category[K - 1]) and np.nanmean(ours.by_category) == pytest.approx(ours.ap)
    assert ours.curve.mean() == pytest.approx(ours.ap50)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_random_sets_give_what_torchmetrics_gives(kind):
    truth, found = random_case(11)
    metric = MeanAveragePrecision(iou_type={"box": "bbox", "mask": "segm"}[kind], backend="pycocotools")
    metric.warn_on_many_detections = False
    for t, f in zip(truth, found):
        rows = [
            {"boxes": torch.tensor(r.boxes).view(-1, 4), "labels": torch.tensor(r.labels)}
            | ({"masks": torch.tensor(rectangles(r.boxes))} if kind == "mask" else {})
            for r in (f, t)
        ]
        rows[0]["scores"] = torch.tensor(f.scores)
        rows[1] |= {"iscrowd": torch.tensor(t.ignored).int(), "area": torch.tensor(t.areas)}
        metric.update([rows[0]], [rows[1]])
    theirs = {name: float(value) for name, value in metric.compute().items() if value.numel() == 1}
    theirs = {
        name: np.nan if theirs[key] < 0 else theirs[key]
        for name, key in zip(NAMES, ("map", "map_50", "map_75", "map_small", "map_medium", "map_large"))
    }
    agrees(coco_ap.coco_ap(truth, found, K, kind), theirs, 1e-6)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 3))
def test_the_order_of_images_and_of_detections_of_different_score_does_not_matter(seed, images):
    truth, found = random_case(seed, images)
    rng = np.random.default_rng(seed)
    found = [Found(f.boxes, f.labels, rng.permutation(len(f.labels)) + rng.random(), f.runs) for f in found]
    turned = []
    for f in found:
        order = rng.permutation(len(f.labels))
        turned.append(Found(f.boxes[order], f.labels[order], f.scores[order], tuple(f.runs[i] for i in order)))
    swapped = rng.permutation(images)
    ours = coco_ap.coco_ap(truth, found, K, "mask")
    again = coco_ap.coco_ap([truth[i] for i in swapped], [turned[i] for i in swapped], K, "mask")
    agrees(again, {name: getattr(ours, name) for name in NAMES})


def test_cases_that_can_be_told_by_hand():
    none = np.zeros((0, 4))
    one = np.array([[10.0, 10, 60, 60]])
    nothing, empty = found_of(none, [], []), truth_of(none, [])
    perfect = found_of(one, [1], [0.5])
    for kind in ("box", "mask"):

        def ap(truth: list[Truth], found: list[Found], kind: str = kind) -> coco_ap.Precision:
            return coco_ap.coco_ap(truth, found, K, kind)

        assert ap([truth_of(one, [1])], [perfect]).ap == pytest.approx(1)
        assert ap([truth_of(one, [1]), empty], [perfect, nothing]).by_category[1] == pytest.approx(1)
        assert ap([truth_of(one, [1])], [nothing]).ap == 0
        assert ap([truth_of(one, [1])], [found_of(one, [2], [0.5])]).ap == 0
        for truth, found in (([], []), ([empty], [nothing]), ([empty], [perfect])):
            judged = ap(truth, found)
            assert all(np.isnan(getattr(judged, name)) for name in NAMES) and np.isnan(judged.curve).all()
        only_medium = ap([truth_of(one, [1])], [perfect])
        assert np.isnan(only_medium.small) and only_medium.medium == pytest.approx(1) and np.isnan(only_medium.large)
        # a wrong one in an empty image, with more confidence: every recall has precision 1/2
        wrong = found_of(one, [1], [0.9])
        assert ap([truth_of(one, [1]), empty], [perfect, wrong]).ap == pytest.approx(0.5)
        # of equal confidence: the image that comes first counts first
        tied = found_of(one, [1], [0.5])
        assert ap([truth_of(one, [1]), empty], [perfect, tied]).ap == pytest.approx(1)
        assert ap([empty, truth_of(one, [1])], [tied, perfect]).ap == pytest.approx(0.5)


def test_what_is_ignored_is_neither_found_nor_missed():
    both = np.array([[10.0, 10, 60, 60], [70.0, 60, 120, 110]])
    inside = np.array([[10.0, 10, 60, 60], [80.0, 80, 110, 100], [90.0, 90, 110, 100]])
    truth = [truth_of(both, [0, 0], [False, True])]
    judged = coco_ap.coco_ap(truth, [found_of(inside, [0, 0, 0], [0.1, 0.8, 0.9])], K, "box")
    assert judged.ap == pytest.approx(1)
    counted = coco_ap.coco_ap([truth_of(both, [0, 0])], [found_of(inside, [0, 0, 0], [0.1, 0.8, 0.9])], K, "box")
    assert counted.ap < 0.5
    assert np.isnan(coco_ap.coco_ap([truth_of(both, [0, 0], [True, True])], [found_of(inside, [0] * 3, [1] * 3)], K).ap)


def test_only_a_hundred_detections_of_an_image_count():
    one = np.array([[10.0, 10, 60, 60]])
    many = np.concatenate([np.tile([100.0, 60, 150, 110], (100, 1)), one])
    scores = np.linspace(1, 0.5, 101)
    assert coco_ap.coco_ap([truth_of(one, [0])], [found_of(many, [0] * 101, scores)], K).ap == 0
    assert coco_ap.coco_ap([truth_of(one, [0])], [found_of(many[1:], [0] * 100, scores[1:])], K).ap > 0


def test_nothing_is_printed_and_the_quick_package_runs_where_it_is_installed(capsys, monkeypatch):
    truth, found = random_case(3)
    plain = coco_ap.coco_ap(truth, found, K)
    quick = types.ModuleType("faster_coco_eval")
    quick.COCO, quick.COCOeval_faster = coco.COCO, cocoeval.COCOeval
    monkeypatch.setitem(sys.modules, "faster_coco_eval", quick)
    chosen = coco_ap.coco_ap(truth, found, K)
    assert chosen.backend == "faster-coco-eval" and chosen.ap == plain.ap
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # as if it were not installed
    assert coco_ap.coco_ap(truth, found, K).backend == "pycocotools"
    assert capsys.readouterr().out == ""
