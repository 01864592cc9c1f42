"""Sets whose images are annotated with more than one class: objects, masks, categories of pixels, videos; opened by name.

A source is "scenes" or "clips" (embedded), or NAME:DIR, a published set as it lies in DIR. What can be read from it has a kind:
    objects     boxes and what an image shows (`ObjectSet`)
    masks       objects with a mask each (`ObjectSet`); in ade20k, coco-stuff and voc-regions, the classes of pixels of an image;
                in davis-frames, the objects of each video's first frame
    semantic    the class of every pixel (`SemanticSet`)
    video       objects followed through frames (`engine.data.annotated.davis`)
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.annotated import ade20k, clips, coco, coco_stuff, davis, regions, voc
from engine.data.sets import scenes

Pair = tuple[Any, Any]  # a training and a test set; of videos, None and the set
Opener = Callable[[Path, float], Pair]


def _coco(folder: Path, bad_limit: float) -> Pair:
    train, test = (coco.open_objects(folder, split, bad_limit) for split in ("train", "val"))
    if train.categories != test.categories:
        raise BadInput(f"{folder}: the training and the validation file have different categories.")
    return train, test


def _splits(folder: Path, part: str) -> tuple[str, str]:
    """trainval and test as in VOC2007, or train and val as in VOC2012, whose test annotations are not public."""
    splits = voc.splits(folder, part)
    return ("trainval", "test") if {"trainval", "test"} <= splits else ("train", "val")


def _voc(part: str) -> Opener:
    def opened(folder: Path, bad_limit: float) -> Pair:
        train, test = _splits(folder, part)
        return tuple(voc.open_objects(folder, split, part, bad_limit=bad_limit) for split in (train, test))

    return opened


def _voc_masks(folder: Path, bad_limit: float) -> Pair:
    train, test = _splits(folder, "Segmentation")
    return tuple(voc.open_masks(folder, split, bad_limit=bad_limit) for split in (train, test))


def _ade20k(folder: Path, bad_limit: float) -> Pair:
    return tuple(ade20k.open_masks(folder, split, bad_limit) for split in ("train", "val"))


def _coco_stuff(folder: Path, bad_limit: float) -> Pair:
    return tuple(coco_stuff.open_masks(folder, split, bad_limit) for split in ("train", "val"))


def _regions(semantic: Opener) -> Opener:
    return lambda folder, bad_limit: tuple(regions.of_classes(masks) for masks in semantic(folder, bad_limit))


def _davis(folder: Path, bad_limit: float) -> Pair:
    return None, davis.open_videos(folder, "val", bad_limit)


def _davis_frames(folder: Path, bad_limit: float) -> Pair:
    return tuple(davis.open_frames(folder, split, bad_limit) for split in ("train", "val"))


EMBEDDED = {
    "clips": {"video": lambda limit: _davis(clips.write(), limit)},
    "scenes": {
        "objects": lambda limit: _coco(scenes.write() / "coco", limit),
        "masks": lambda limit: _coco(scenes.write() / "coco", limit),
        "semantic": lambda limit: _voc_masks(scenes.write() / "voc", limit),
    },
}
PUBLISHED: dict[str, dict[str, Opener]] = {
    "davis": {"video": _davis},
    "davis-frames": {"masks": _davis_frames},
    "coco": {"objects": _coco, "masks": _coco, "semantic": _coco},
    "voc": {"objects": _voc("Main"), "masks": _voc("Segmentation"), "semantic": _voc_masks},
    "voc-regions": {"masks": _regions(_voc_masks)},
    "ade20k": {"semantic": _ade20k, "masks": _regions(_ade20k)},
    "coco-stuff": {"semantic": _coco_stuff, "masks": _regions(_coco_stuff)},
}
DEFAULTS = {"objects": "scenes", "masks": "scenes", "semantic": "scenes", "video": "clips"}


def open_pair(kind: str, source: str | None = None, bad_limit: float = sources.BAD_LIMIT) -> Pair:
    """The training and the test set of one kind.

    Args:
        kind: objects, masks, semantic or video.
        source: see above; None takes the embedded set of that kind.

    Raises:
        BadInput: no such source, it has nothing of this kind, or what its reader raises.
    """
    source = source or DEFAULTS[kind]
    name, colon, folder = source.partition(":")
    known = PUBLISHED if colon else EMBEDDED
    if name not in known:
        all_names = [*EMBEDDED, *(f"{name}:DIR" for name in PUBLISHED)]
        near = difflib.get_close_matches(f"{name}:DIR" if colon else name, all_names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise BadInput(f"{source!r} is no annotated set{hint}; choose from {', '.join(all_names)}.")
    if kind not in known[name]:
        having = [*(n for n, kinds in EMBEDDED.items() if kind in kinds)]
        having += [f"{n}:DIR" for n, kinds in PUBLISHED.items() if kind in kinds]
        raise BadInput(f"{source} has no {kind}; give {', '.join(having)}.")
    if not colon:
        return known[name][kind](bad_limit)
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise BadInput(f"{folder or 'nothing'} after {name}: is no folder; give the one that {name} lies in.")
    return known[name][kind](root.resolve(), bad_limit)
