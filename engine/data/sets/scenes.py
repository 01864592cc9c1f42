"""The embedded data set with objects: scikit-learn's handwritten digits on photographs, in COCO's and in VOC's layout.

500 JPEG files of 128x128 pixels, each a crop of a photograph that ships with scikit-learn or scikit-image, with one to five
digits drawn on it in some colour, 16 to 80 pixels high, later ones over earlier ones. Boxes and masks tell the visible part of
a digit. Training and validation share no photograph and no digit; the digits are split as in `engine.data.sets.digits`. All is
drawn from a fixed seed.

Sources: the digits as in `engine.data.sets.digits`; the files named in PHOTOGRAPHS, whose packages say who made them.
"""

import importlib.resources
import io
import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from engine.core.errors import BadInput
from engine.data import cache as user_cache
from engine.data.sets import digits

NAME = (
    "scenes-1"  # the number rises when pixels, objects or the split change: an old cache is not taken for the new set
)
SEED, SIDE = 20232, 128
COUNTS = {"train": 400, "val": 100}
PHOTOGRAPHS = {
    "train": (
        ("sklearn.datasets.images", "china.jpg"), ("skimage.data", "astronaut.png"), ("skimage.data", "coffee.png"),
        ("skimage.data", "motorcycle_left.png"), ("skimage.data", "camera.png"), ("skimage.data", "brick.png"),
    ),
    "val": (
        ("sklearn.datasets.images", "flower.jpg"), ("skimage.data", "chelsea.png"), ("skimage.data", "rocket.jpg"),
        ("skimage.data", "gravel.png"),
    ),
}  # fmt: skip
CATEGORIES = tuple("0123456789")
MOST_OBJECTS, LOWEST, HIGHEST, TRIES = 5, 16, 80, 20
SHOWN, DIFFICULT = (
    0.3,
    0.6,
)  # no digit has less than the first share of its pixels in sight; below the second it is "difficult"
EDGE = (0.3, 0.7)  # ink, of 1, at which a stroke begins to cover the photograph, and where it covers it wholly
VOID = 255


@dataclass(frozen=True)
class _Drawn:
    """A digit on a scene.

    Attributes:
        cover: float32 [SIDE, SIDE], how much of the photograph it covers.
        visible: bool [SIDE, SIDE], pixels that it covers by half or more, and no later digit does.
        share: of its pixels that are visible.
    """

    label: int
    cover: np.ndarray
    visible: np.ndarray
    share: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1), the last column and row not included."""
        columns, rows = np.flatnonzero(self.visible.any(0)), np.flatnonzero(self.visible.any(1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class _Scene:
    number: int
    jpeg: bytes
    drawn: tuple[_Drawn, ...]

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


def write(cache: Path | None = None) -> Path:
    """Writes the set below `cache` (default: the user's cache) unless it is there whole; returns its folder.

    coco/ has images/SPLIT/NNNNNN.jpg and annotations/instances_SPLIT.json, with masks as run lengths. voc/ has the same
    images in JPEGImages/, Annotations/, ImageSets/Main/, ImageSets/Segmentation/, SegmentationClass/ and SegmentationObject/;
    there 255 marks the pixels of no object that a stroke covers in part, and digits of which less than 60 % is visible are
    difficult. SPLIT is train (400 images) or val (100). It appears at once, complete, as the digits do.

    Raises:
        BadInput: the cache folder cannot be written, or a photograph is missing in its package.
    """
    return user_cache.kept((cache or user_cache.folder()) / NAME, _fill)


def _fill(folder: Path) -> None:
    from sklearn.datasets import load_digits  # slow to import, and wanted once

    source = load_digits()
    ink = np.round(source.images * (255 / 16)).astype(np.uint8)
    is_val = digits.is_val(source.target)
    scenes: dict[str, list[_Scene]] = {}
    first = 1
    for place, (split, count) in enumerate(COUNTS.items()):
        photographs = [photograph(*file) for file in PHOTOGRAPHS[split]]
        chosen = np.flatnonzero(is_val == (split == "val"))
        scenes[split] = []
        for number in range(first, first + count):
            # RandomState, whose stream numpy has frozen
            rng = np.random.RandomState([SEED, place, number])
            scenes[split].append(_scene(number, rng, photographs, ink[chosen], source.target[chosen]))
        first += count
    _write_coco(folder / "coco", scenes)
    _write_voc(folder / "voc", scenes)


def photograph(package: str, name: str) -> Image.Image:
    """A file of an installed package, in RGB. Raises BadInput where it is missing."""
    try:
        with (importlib.resources.files(package) / name).open("rb") as file, Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise BadInput(
            f"the photograph {name} is missing in the installed package {package}: install it whole again"
        ) from error


def _scene(
    number: int, rng: np.random.RandomState, photographs: list[Image.Image], ink: np.ndarray, labels: np.ndarray
) -> _Scene:
    photograph = photographs[rng.randint(len(photographs))]
    side = rng.randint(SIDE, min(*photograph.size, 2 * SIDE) + 1)
    x, y = (rng.randint(whole - side + 1) for whole in photograph.size)
    crop = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    pixels = np.asarray(crop, np.float32)
    drawn: list[_Drawn] = []
    for _ in range(rng.randint(1, MOST_OBJECTS + 1)):
        for _ in range(TRIES):
            chosen = rng.randint(len(labels))
            cover = _cover(rng, ink[chosen])
            solid = cover >= 0.5
            below = [_under(other, solid) for other in drawn]
            if all(other.share >= SHOWN for other in below):
                drawn = [*below, _Drawn(int(labels[chosen]), cover, solid, 1.0)]
                pixels = _painted(rng, pixels, cover)
                break
    stream = io.BytesIO()
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(stream, "JPEG", quality=95, subsampling=0)
    return _Scene(number, stream.getvalue(), tuple(drawn))


def _cover(rng: np.random.RandomState, ink: np.ndarray) -> np.ndarray:
    """A digit of some size and place, float32 [SIDE, SIDE] from 0 to 1."""
    height = round(LOWEST * (HIGHEST / LOWEST) ** rng.random_sample())
    width = round(height * (0.75 + 0.25 * rng.random_sample()))
    large = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
    x, y = rng.randint(SIDE - width + 1), rng.randint(SIDE - height + 1)
    cover = np.zeros((SIDE, SIDE), np.float32)
    cover[y : y + height, x : x + width] = covered(large)
    return cover


def covered(ink: Image.Image) -> np.ndarray:
    """float32 [H, W] from 0 to 1, how much of what lies beneath the ink of a grey image covers."""
    low, high = EDGE
    return ((np.asarray(ink, np.float32) / 255 - low) / (high - low)).clip(0, 1)


def _under(drawn: _Drawn, solid: np.ndarray) -> _Drawn:
    """The digit after another one was drawn over it."""
    visible = drawn.visible & ~solid
    return _Drawn(drawn.label, drawn.cover, visible, visible.sum() / (drawn.cover >= 0.5).sum())


def _painted(rng: np.random.RandomState, pixels: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """float32 [SIDE, SIDE, 3], with the digit in a colour that stands out."""
    return pixels + cover[:, :, None] * (colour_on(rng, pixels[cover >= 0.5].mean(0)) - pixels)


def colour_on(rng: np.random.RandomState, beneath: np.ndarray) -> np.ndarray:
    """float32 [3], that of eight colours which differs most from what lies beneath."""
    colours = rng.randint(0, 256, (8, 3)).astype(np.float32)
    return colours[np.square(colours - beneath).sum(1).argmax()]


def _write_coco(folder: Path, scenes: dict[str, list[_Scene]]) -> None:
    categories = [
        {"id": 2 * label + 1, "name": name} for label, name in enumerate(CATEGORIES)
    ]  # gaps, as in COCO's own
    (folder / "annotations").mkdir(parents=True)
    annotation = 0
    for split, members in scenes.items():
        (folder / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for scene in members:
            (folder / "images" / split / f"{scene.name}.jpg").write_bytes(scene.jpeg)
            images.append({"id": scene.number, "file_name": f"{scene.name}.jpg", "width": SIDE, "height": SIDE})
            for drawn in scene.drawn:
                annotation += 1
                x0, y0, x1, y1 = drawn.box
                annotations.append(
                    {
                        "id": annotation,
                        "image_id": scene.number,
                        "category_id": 2 * drawn.label + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": int(drawn.visible.sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": [SIDE, SIDE], "counts": _runs(drawn.visible)},
                    }
                )
        whole = {"info": {"description": NAME}, "images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole, separators=(",", ":")))


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0, 1, 0, ... down the columns, the form that COCO calls uncompressed RLE."""
    flat = mask.ravel(order="F")
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    return [0] * int(flat[0]) + np.diff(bounds).tolist()


def _write_voc(folder: Path, scenes: dict[str, list[_Scene]]) -> None:
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"):
        (folder / name).mkdir(parents=True)
    for scene in (scene for members in scenes.values() for scene in members):
        (folder / "JPEGImages" / f"{scene.name}.jpg").write_bytes(scene.jpeg)
        (folder / "Annotations" / f"{scene.name}.xml").write_text(_xml(scene))
        partly = np.any([drawn.cover > 0 for drawn in scene.drawn], axis=0)
        classes = np.where(partly, VOID, 0).astype(np.uint8)
        objects = classes.copy()
        for place, drawn in enumerate(scene.drawn):
            classes[drawn.visible], objects[drawn.visible] = drawn.label + 1, place + 1
        for kind, indices in (("SegmentationClass", classes), ("SegmentationObject", objects)):
            image = Image.fromarray(indices)
            image.putpalette(palette())
            image.save(folder / kind / f"{scene.name}.png")
    for part in ("Main", "Segmentation"):
        lists = folder / "ImageSets" / part
        lists.mkdir(parents=True)
        for split, members in {**scenes, "trainval": [*scenes["train"], *scenes["val"]]}.items():
            (lists / f"{split}.txt").write_text("".join(f"{scene.name}\n" for scene in members))
            for label, name in enumerate(CATEGORIES if part == "Main" else ()):
                lines = (f"{scene.name} {_presence(scene, label):2d}\n" for scene in members)
                (lists / f"{name}_{split}.txt").write_text("".join(lines))


def _presence(scene: _Scene, label: int) -> int:
    """1, 0 where all digits of the class are difficult, -1 where there are none."""
    shares = [drawn.share for drawn in scene.drawn if drawn.label == label]
    return -1 if not shares else int(max(shares) >= DIFFICULT)


def _xml(scene: _Scene) -> str:
    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    root = ElementTree.Element("annotation")
    add(root, folder="voc", filename=f"{scene.name}.jpg")
    add(ElementTree.SubElement(root, "size"), width=SIDE, height=SIDE, depth=3)
    add(root, segmented=1)
    for drawn in scene.drawn:
        node = ElementTree.SubElement(root, "object")
        add(node, name=CATEGORIES[drawn.label], pose="Unspecified", truncated=0)
        add(node, occluded=int(drawn.share < 1), difficult=int(drawn.share < DIFFICULT))
        x0, y0, x1, y1 = drawn.box
        add(
            ElementTree.SubElement(node, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1
        )  # from 1, the last included
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def palette() -> list[int]:
    """VOC's colours: of an index's bits, every third belongs to red, green or blue, the lowest to the highest bit there."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
