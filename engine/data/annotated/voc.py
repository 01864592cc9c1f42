"""Images with objects in the layout of PASCAL VOC 2007 to 2012: lists, an XML file per image, masks as PNG files of indices.

Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, and its development kit. VOC counts pixels from 1
and includes the last one: the box (xmin, ymin, xmax, ymax) is our (xmin - 1, ymin - 1, xmax, ymax). Sizes are those of the
image files; what an XML file says of them is passed over. VOC itself was not available where this was written: it was run on
small sets in its layout.

Shape suffixes: N images, n objects in one image, K categories, H x W pixels of one image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np

from engine.core.errors import BadInput
from engine.data import screen, sources
from engine.data.annotated import index_masks
from engine.data.annotated.objects import (
    BACKGROUND,
    MOST_CATEGORIES,
    VOID,
    Objects,
    ObjectSet,
    check_categories,
    fitted,
    readable,
)
from engine.data.sources import ImageSet

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = ("train", "val", "trainval", "test")
PLACES = (".", "VOC2007", "VOC2012", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012")
PRESENCE = {"1": 1, "0": -1, "-1": 0}  # in the lists of a category; ours is 1, 0 for absent, -1 for not to be counted


@dataclass(frozen=True)
class VocObjects(ObjectSet):
    """As ObjectSet; where all objects of a category are difficult, its target is -1."""

    def check_masks(self) -> None:
        for index, size in enumerate(self.images.sizes.tolist()):
            most = len(self.objects[index])
            read_indices(_mask_path(self.images, index, "SegmentationObject"), size, most, "objects", look_only=True)

    def masks(self, index: int) -> np.ndarray:
        """bool [n, H, W] from SegmentationObject/; pixels of the border belong to no object."""
        path = _mask_path(self.images, index, "SegmentationObject")
        indices = read_indices(path, self.images.sizes[index].tolist(), len(self.objects[index]), "objects")
        return indices == np.arange(1, len(self.objects[index]) + 1)[:, None, None]

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W] as SegmentationClass/ has it, with 255 on borders and difficult objects."""
        return _semantic(self.images, self.categories, index)


@dataclass(frozen=True)
class VocMasks:
    """N readable images with semantic masks; `semantic` is that of `ObjectSet`.

    Attributes:
        images: in the order of the list; `images.bad` says which were left out.
        categories: K names.
    """

    images: ImageSet
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def semantic_classes(self) -> tuple[str, ...]:
        return BACKGROUND, *self.categories

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W] as SegmentationClass/ has it: 0 background, k + 1 for category k, 255 not to be counted.

        Raises:
            BadInput: the mask is damaged, has another size than its image, or an index that no category has.
        """
        return _semantic(self.images, self.categories, index)


def open_objects(
    folder: str | Path,
    split: str = "val",
    part: Literal["Main", "Segmentation"] = "Main",
    categories: Sequence[str] | None = None,
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> VocObjects:
    """Reads ImageSets/PART/SPLIT.txt with the images in JPEGImages/ and the boxes in Annotations/.

    Args:
        folder: that has JPEGImages/ in it, or in VOC2007/, VOC2012/ or one of these in VOCdevkit/.
        split: a file of ImageSets/PART/ without .txt.
        part: Main, or Segmentation for the images that have masks.
        categories: names in the order of the indices; by default those that have a list ImageSets/Main/NAME_SPLIT.txt for
            some split, in order of name; where there are none the twenty of VOC, or if an object in Annotations/ is of none of
            these, all that are named there, in order of name.
        bad_limit, screening: as for `engine.data.sources.open_images`.

    Returns:
        images (.jpg, or of another suffix) in the order of the list, objects in the order of their files. The targets are those
        of the lists ImageSets/Main/NAME_SPLIT.txt where each category has one and part is Main, else those of the objects.

    Raises:
        BadInput: a file is missing or of another form, a box lies more than a pixel outside its image or has no size, a
            category is unknown, a list does not fit the split, or too many images are bad.
    """
    root, names = _root(folder), _names(_root(folder), split, part)
    classes = tuple(categories or _categories(root, split))
    found, kept = _readable(root, names, split, part, classes, bad_limit, screening)
    label_of = {name: label for label, name in enumerate(classes)}
    objects = tuple(
        _objects(root / "Annotations" / f"{names[place]}.xml", size, label_of)
        for place, size in zip(kept, found.sizes.tolist(), strict=True)
    )
    lists = [root / "ImageSets" / "Main" / f"{name}_{split}.txt" for name in classes]
    if part == "Main" and all(path.is_file() for path in lists):
        targets = np.stack([_presence(path, names) for path in lists], 1)[kept]
    else:
        targets = np.zeros((len(objects), len(classes)), np.int8)
        for row, members in enumerate(objects):
            targets[row, members.labels[members.ignored]] = -1
            targets[row, members.labels[~members.ignored]] = 1
    return VocObjects(found, classes, objects, targets)


def open_masks(
    folder: str | Path,
    split: str = "val",
    categories: Sequence[str] | None = None,
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> VocMasks:
    """Reads ImageSets/Segmentation/SPLIT.txt with the images and their masks in SegmentationClass/; needs no Annotations/.

    Arguments as for `open_objects`.

    Raises:
        BadInput: a file is missing, a mask has another size than its image or no indices, or too many images are bad.
    """
    root, names = _root(folder), _names(_root(folder), split, "Segmentation")
    classes = tuple(categories or _categories(root, split))
    found, _ = _readable(root, names, split, "Segmentation", classes, bad_limit, screening)
    for index, size in enumerate(found.sizes.tolist()):
        read_indices(_mask_path(found, index, "SegmentationClass"), size, len(classes), "categories", look_only=True)
    return VocMasks(found, classes)


def splits(folder: str | Path, part: Literal["Main", "Segmentation"] = "Main") -> set[str]:
    """The splits that have a list in ImageSets/PART/. Raises BadInput where nothing is laid out as VOC."""
    lists = _root(folder) / "ImageSets" / part
    return {name for name in SPLITS if (lists / f"{name}.txt").is_file()}


def _root(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    there = [folder / place for place in PLACES if (folder / place / "JPEGImages").is_dir()]
    if not there:
        raise BadInput(
            f"{folder} is not laid out as VOC: it needs JPEGImages/, Annotations/ and ImageSets/, maybe in VOC2007/, VOC2012/ "
            "or one of these in VOCdevkit/"
        )
    if len(there) > 1:
        raise BadInput(f"{folder} has several sets, {', '.join(map(str, there))}: give one of them")
    return there[0].resolve()


def _names(root: Path, split: str, part: str) -> list[str]:
    """The images of a split, without .jpg."""
    lists = root / "ImageSets" / part
    if part not in ("Main", "Segmentation"):
        raise BadInput(f"part {part!r} is unknown: choose Main or Segmentation")
    if not (lists / f"{split}.txt").is_file():
        there = [name for name in SPLITS if (lists / f"{name}.txt").is_file()]
        raise BadInput(
            f"{lists / split}.txt is missing: {lists} has lists for {', '.join(there) or 'none of ' + ', '.join(SPLITS)}"
        )
    return [" ".join(words) for words in read_lines(lists / f"{split}.txt")]


def read_lines(path: Path) -> list[list[str]]:
    """The words of every line that has any. Raises BadInput for what cannot be read."""
    try:
        return [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text file") from error


def _categories(root: Path, split: str) -> Sequence[str]:
    """Those that have a list of their own for some split; else VOC's; else, of a set with its own, those of all objects."""
    main = root / "ImageSets" / "Main"
    endings = [f"_{name}.txt" for name in dict.fromkeys((split, *SPLITS))]
    lists = [(path, end) for end in endings for path in main.glob(f"?*{end}") if path.stem != split]
    if listed := {path.name.removesuffix(end) for path, end in lists}:
        return sorted(listed)
    named = {name for path in (root / "Annotations").glob("**/*.xml") for name in _named(_annotation(path))}
    return CATEGORIES if named <= set(CATEGORIES) else sorted(named)


def _readable(
    root: Path, names: list[str], split: str, part: str, classes: tuple[str, ...], bad_limit: float, screening: str
) -> tuple[ImageSet, np.ndarray]:
    """The readable images, and their places in the list."""
    source = root / "ImageSets" / part / f"{split}.txt"
    check_categories(classes, root)
    if len(classes) > MOST_CATEGORIES:
        raise BadInput(f"{root} has {len(classes)} categories; masks have room for {MOST_CATEGORIES}")
    there = {path.name for path in (root / "JPEGImages").iterdir()}
    suffixes = [next((end for end in screen.SUFFIXES if f"{name}{end}" in there), ".jpg") for name in names]
    paths = [f"JPEGImages/{name}{end}" for name, end in zip(names, suffixes, strict=True)]
    return readable(root, paths, split, source, bad_limit, screening)


def _presence(path: Path, names: list[str]) -> np.ndarray:
    """int8 [len(names)] from a category's list, whose lines are NAME and 1, 0 for difficult or -1 for absent."""
    stated: dict[str, int] = {}
    for number, words in enumerate(read_lines(path), 1):
        if len(words) != 2 or words[1] not in PRESENCE:
            raise BadInput(
                f"{path} has {' '.join(words)[:60]!r} in line {number}, where an image and 1, 0 or -1 belong"
            )
        if stated.setdefault(words[0], PRESENCE[words[1]]) != PRESENCE[words[1]]:
            raise BadInput(f"{path} has {words[0]} twice, with different values, in line {number}")
    if missing := [name for name in names if name not in stated]:
        raise BadInput(f"{path} has no line for {missing[0]}, which its split lists")
    return np.array([stated[name] for name in names], np.int8)


def _annotation(path: Path) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise BadInput(f"the annotation {path} cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise BadInput(f"{path} is no XML that can be read: {error}") from error
    if root.tag != "annotation":
        raise BadInput(f"{path} is <{root.tag}>, not an <annotation> of VOC")
    return root


def _named(annotation: ElementTree.Element) -> list[str]:
    """The category of each object."""
    return [(node.findtext("name") or "").strip() for node in annotation.findall("object")]


def _objects(path: Path, size: list[int], label_of: dict[str, int]) -> Objects:
    annotation, rows = _annotation(path), []
    for number, (node, name) in enumerate(zip(annotation.findall("object"), _named(annotation), strict=True), 1):
        where = f"object {number} of {path}"
        if name not in label_of:
            raise BadInput(
                f"{where} is of the category {name!r}, which is none of {', '.join(list(label_of)[:20])}"
                + (", ..." if len(label_of) > 20 else "")
            )
        xmin, ymin, xmax, ymax = (_coordinate(node, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
        x0, y0, x1, y1 = fitted((xmin - 1, ymin - 1, xmax, ymax), *size, where)
        if x0 == x1 or y0 == y1:
            raise BadInput(f"{where} has a box without width or height")
        difficult = (node.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise BadInput(f"{where} has {difficult[:40]!r} as difficult, which must be 0 or 1")
        rows.append(((x0, y0, x1, y1), label_of[name], (x1 - x0) * (y1 - y0), difficult == "1"))
    return Objects.of_rows(rows)


def _coordinate(node: ElementTree.Element, tag: str, where: str) -> float:
    text = node.findtext(f"bndbox/{tag}")
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(f"{where} has {text!r} as {tag} of its bndbox, where a number belongs")
    return value


def _mask_path(images: ImageSet, index: int, kind: str) -> Path:
    return (images.root / kind / images.paths[index].removeprefix("JPEGImages/")).with_suffix(".png")


def _semantic(images: ImageSet, categories: tuple[str, ...], index: int) -> np.ndarray:
    path = _mask_path(images, index, "SegmentationClass")
    return read_indices(path, images.sizes[index].tolist(), len(categories), "categories")


def read_indices(path: Path, size: list[int], most: int, what: str, look_only: bool = False) -> np.ndarray:
    """uint8 [H, W], each 0 to `most` or 255, of a mask; empty where only the header was looked at.

    Raises:
        BadInput: it is missing, damaged, not of `size` (width, height), has no indices, or one that none of `what` has.
    """
    indices = index_masks.read(path, size, look_only)
    outside = indices[(indices > most) & (indices != VOID)]
    if len(outside):
        raise BadInput(f"{path} has the index {outside[0]}, but there are {most} {what}")
    return indices
