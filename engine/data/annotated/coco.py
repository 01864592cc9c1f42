"""Images with objects in COCO's format: a JSON file of instances beside a folder of images.

Lin et al., Microsoft COCO, ECCV 2014; the fields are those of cocodataset.org/#format-data. Polygons become masks as
pycocotools makes them. COCO itself was not available where this was written: it was run on small sets in its format.

Shape suffixes: N images, n objects in one image, K categories, H x W pixels of one image.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np

from engine.core.errors import BadInput
from engine.core.json_text import parsed
from engine.data import sources
from engine.data.annotated.objects import MOST_CATEGORIES, Objects, ObjectSet, check_categories, fitted, readable

YEARS = ("", "2017", "2014")
ID = int | str
MASK = list[np.ndarray] | dict[str, Any] | None  # polygons, float64 [2 * points] each; run lengths; or nothing


@dataclass(frozen=True)
class CocoObjects(ObjectSet):
    """As ObjectSet; a crowd counts as a sight of its category in `targets`, and no target is -1.

    Attributes:
        file: the JSON file.
        image_ids: N, as in the file, for files of results; whole numbers, or texts.
        category_ids: K, likewise.
        annotation_ids: N, the ids of each image's objects.
        outlines: N, what the file says of each object's mask.
        left_out: (annotation id, reason) of objects whose box has no width or no height, or that lack a mask where others have
            one.
    """

    file: Path
    image_ids: tuple[ID, ...]
    category_ids: tuple[ID, ...]
    annotation_ids: tuple[tuple[ID, ...], ...]
    outlines: tuple[tuple[MASK, ...], ...]
    left_out: tuple[tuple[ID, str], ...]

    def check_masks(self) -> None:
        for index, ((width, height), outlines) in enumerate(
            zip(self.images.sizes.tolist(), self.outlines, strict=True)
        ):
            for place, outline in enumerate(outlines):
                runs = outline["counts"] if isinstance(outline, dict) else None
                if outline is None or (isinstance(runs, np.ndarray) and runs.sum() != height * width):
                    self.mask(index, place)  # its own sentence

    def mask(self, index: int, place: int) -> np.ndarray:
        """bool [H, W] of one object of an image.

        Raises:
            BadInput: the file has no mask for it, or run lengths that do not fill the image.
        """
        entry = f"annotation {self.annotation_ids[index][place]} of {self.file}"
        outline, (width, height) = self.outlines[index][place], self.images.sizes[index].tolist()
        if outline is None:
            raise BadInput(f"{entry} has no segmentation, so there is no mask")
        if isinstance(outline, dict):
            return _of_runs(outline["counts"], height, width, entry)
        from pycocotools import mask  # wanted by sets with polygons only

        filled = mask.decode(mask.merge(mask.frPyObjects(outline, height, width)))
        return filled.astype(bool)

    def masks(self, index: int) -> np.ndarray:
        """bool [n, H, W]; see `mask`."""
        width, height = self.images.sizes[index].tolist()
        masks = np.zeros((len(self.objects[index]), height, width), bool)
        for place in range(len(masks)):
            masks[place] = self.mask(index, place)
        return masks

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W]: the masks painted over each other, crowds first, then from the largest area to the smallest.

        Raises:
            BadInput: as `mask`, or more categories than a byte can tell apart.
        """
        if len(self.categories) > MOST_CATEGORIES:
            raise BadInput(
                f"{self.file} has {len(self.categories)} categories; semantic masks have room for {MOST_CATEGORIES}"
            )
        width, height = self.images.sizes[index].tolist()
        objects, painted = self.objects[index], np.zeros((height, width), np.uint8)
        for place in np.lexsort((-objects.areas, ~objects.ignored)):
            painted[self.mask(index, int(place))] = objects.labels[place] + 1
        return painted


def find(folder: str | Path, split: str) -> tuple[Path, Path]:
    """The JSON file and the folder of images of a split, as COCO and `engine.data.sets.scenes` lay them out.

    They are annotations/instances_SPLIT.json and images/SPLIT/ or SPLIT/, also with 2017 or 2014 after SPLIT.

    Raises:
        BadInput: there are none.
    """
    folder = Path(folder).expanduser()
    for year in YEARS:
        file = folder / "annotations" / f"instances_{split}{year}.json"
        for images in (folder / "images" / f"{split}{year}", folder / f"{split}{year}"):
            if file.is_file() and images.is_dir():
                return file, images
    raise BadInput(
        f"{folder} is not laid out as COCO: it needs annotations/instances_{split}.json and images/{split}/ or {split}/, "
        f"or both with 2017 or 2014 after {split}"
    )


def open_objects(
    folder: str | Path,
    split: str = "val",
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> CocoObjects:
    """Reads a split where `find` finds it; see `read_objects`. Raises BadInput as both."""
    return read_objects(*find(folder, split), split, bad_limit, screening)


def read_objects(
    annotations: str | Path,
    images: str | Path,
    split: str,
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> CocoObjects:
    """Reads a file of instances, and screens its images.

    Args:
        annotations: JSON with images (id, file_name, width, height), categories (id, name) and annotations (id, image_id,
            category_id, bbox as [x, y, width, height]; maybe area, iscrowd, segmentation as polygons or run lengths).
        images: folder that the file names are relative to.
        split: what the set is called.
        bad_limit, screening: as for `engine.data.sources.open_images`.

    Returns:
        images in the order of the file, objects in the order of theirs, categories in the order of their ids. Categories
        without an object are kept, unless another has their name (a root, as Roboflow writes one), and images without one, too.
        A file name of another machine (an absolute path) means the file of that name below `images`.

    Raises:
        BadInput: a file is missing or of another form; an entry refers to nothing, or is there twice; a box lies more than a
            pixel outside its image; an image or a mask has another size than the file says; or too many images are bad.
    """
    file, root = Path(annotations).expanduser(), Path(images).expanduser()
    whole = _load(file)
    numbered = [_category(entry, file, place) for place, entry in enumerate(whole["categories"])]
    _places([number for number, _ in numbered], "category", file)
    used = {_known(entry.get("category_id")) for entry in whole["annotations"]}
    twice = {name for name, count in Counter(name for _, name in numbered).items() if count > 1}
    categories = sorted(
        ((number, name) for number, name in numbered if number in used or name not in twice),
        key=lambda category: (isinstance(category[0], str), category[0]),
    )
    names, category_ids = tuple(name for _, name in categories), tuple(number for number, _ in categories)
    check_categories(names, file)
    label_of = _places(category_ids, "category", file)
    if not root.is_dir():
        raise BadInput(f"{root} is no folder; it should hold the images of {file}")
    listed = [_image(entry, file, place, root) for place, entry in enumerate(whole["images"])]
    place_of = _places([number for number, _, _ in listed], "image", file)
    found, kept = readable(root.resolve(), [name for _, name, _ in listed], split, file, bad_limit, screening)
    for (number, name, size), stored in zip((listed[place] for place in kept), found.sizes.tolist(), strict=True):
        if stored != list(size):
            raise BadInput(
                f"image {number} ({name}) has {stored[0]}x{stored[1]} pixels, but {file} says {size[0]}x{size[1]}"
            )
    row_of = {int(place): row for row, place in enumerate(kept)}
    rows: list[list[tuple]] = [[] for _ in kept]
    ids: list[list[ID]] = [[] for _ in kept]
    outlines: list[list[MASK]] = [[] for _ in kept]
    left_out: list[tuple[ID, str]] = []
    masked = any(entry.get("segmentation") for entry in whole["annotations"])
    targets = np.zeros((len(kept), len(names)), np.int8)
    seen: set[ID] = set()
    for place, entry in enumerate(whole["annotations"]):
        number = _id(entry, "id", f"annotation {place} (counted from 0) of {file}")
        where = f"annotation {number} of {file}"
        if number in seen:
            raise BadInput(f"{where} is there twice")
        seen.add(number)
        image, category = _id(entry, "image_id", where), _id(entry, "category_id", where)
        if image not in place_of:
            raise BadInput(f"{where} has the image_id {image}, which is not among the images")
        if category not in label_of:
            raise BadInput(f"{where} has the category_id {category}, which is not among the categories")
        row = row_of.get(place_of[image])
        if row is None:  # the image cannot be read
            continue
        width, height = listed[place_of[image]][2]
        x, y, across, down = _box(entry, where)
        box = fitted((x, y, x + across, y + down), width, height, where)
        if box[0] == box[2] or box[1] == box[3]:
            left_out.append((number, "its box has no width or no height"))
            continue
        outline = _outline(entry.get("segmentation"), width, height, where)
        if outline is None and masked:
            left_out.append((number, "it has no mask, as others have"))
            continue
        crowd = entry.get("iscrowd") or 0  # null where a tool knows no crowds
        if crowd not in (0, 1):
            raise BadInput(f"{where} has the iscrowd {crowd!r}, which must be 0 or 1")
        area = across * down if entry.get("area") is None else entry["area"]
        if not _is_number(area) or area < 0:
            raise BadInput(f"{where} has the area {area!r}, which is no size")
        rows[row].append((box, label_of[category], area, bool(crowd)))
        ids[row].append(number)
        outlines[row].append(outline)
        targets[row, label_of[category]] = 1
    return CocoObjects(
        found,
        names,
        tuple(Objects.of_rows(members) for members in rows),
        targets,
        file,
        tuple(listed[place][0] for place in kept),
        category_ids,
        tuple(map(tuple, ids)),
        tuple(map(tuple, outlines)),
        tuple(left_out),
    )


def _load(file: Path) -> dict[str, list]:
    try:
        whole = parsed(file.read_bytes())
    except FileNotFoundError as error:
        raise BadInput(f"the file of annotations {file} is missing") from error
    except OSError as error:
        raise BadInput(f"the file of annotations {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{file} is no JSON that can be read: {str(error)[:100]}") from error
    for key in ("images", "annotations", "categories"):
        entries = whole.get(key) if isinstance(whole, dict) else None
        if not isinstance(entries, list):
            raise BadInput(f"{file} has no list {key!r}: a file of instances has images, annotations and categories")
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise BadInput(f"{file} has something else than an object as entry {place} (from 0) of {key!r}")
    return whole


def _whole(entry: dict, key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise BadInput(f"{where} has {str(value)[:40]!r} as {key}, where a whole number belongs")
    return value


def _id(entry: dict, key: str, where: str) -> ID:
    value = _known(entry.get(key))
    if value is None:
        raise BadInput(f"{where} has {str(entry.get(key))[:40]!r} as {key}, where a whole number or a text belongs")
    return value


def _known(value: object) -> ID | None:
    """What is meant by an id; None if nothing can be. 3.0 is 3, as tables write it where some are missing."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int or (isinstance(value, str) and value) else None


def _text(entry: dict, key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise BadInput(f"{where} has {str(value)[:40]!r} as {key}, where a text belongs")
    return value


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e9 and math.isfinite(value)


def _category(entry: dict, file: Path, place: int) -> tuple[ID, str]:
    where = f"category {place} (counted from 0) of {file}"
    return _id(entry, "id", where), _text(entry, "name", where)


def _image(entry: dict, file: Path, place: int, root: Path) -> tuple[ID, str, tuple[int, int]]:
    number = _id(entry, "id", f"image {place} (counted from 0) of {file}")
    where = f"image {number} of {file}"
    size = _whole(entry, "width", where), _whole(entry, "height", where)
    return number, _below(root, _text(entry, "file_name", where)), size


def _below(root: Path, name: str) -> str:
    """A file's name relative to the root. Of an absolute path, perhaps of another machine, the longest end that is there."""
    path = PureWindowsPath(name)  # knows both kinds of separators
    if not path.root:
        return name
    ends = ("/".join(path.parts[first:]) for first in range(1, len(path.parts)))
    return next((end for end in ends if (root / end).is_file()), name)


def _places(ids: tuple[ID, ...] | list[ID], kind: str, file: Path) -> dict[ID, int]:
    places: dict[ID, int] = {}
    for place, number in enumerate(ids):
        if places.setdefault(number, place) != place:
            raise BadInput(f"{kind} {number} of {file} is there twice")
    return places


def _box(entry: dict, where: str) -> tuple[float, float, float, float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise BadInput(f"{where} has the bbox {str(box)[:60]}, where [x, y, width, height] belongs")
    return tuple(map(float, box))


def _outline(found: object, width: int, height: int, where: str) -> MASK:
    """What makes the mask, held against the image's size; None where there is nothing."""
    if found is None or found == []:
        return None
    if isinstance(found, dict):
        size, counts = found.get("size"), found.get("counts")
        if size != [height, width]:
            raise BadInput(
                f"{where} has a mask of size {str(size)[:40]}, but its image is [{height}, {width}] (rows, columns)"
            )
        if isinstance(counts, str) and counts.isascii():
            return {"counts": counts}
        if isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
            return {"counts": np.array([min(count, 2**31) for count in counts], np.int64)}
        raise BadInput(f"{where} has run lengths that are neither a text nor a list of whole numbers")
    if not isinstance(found, list):
        raise BadInput(f"{where} has a segmentation that is neither a list of polygons nor run lengths")
    polygons = []
    for polygon in found:
        try:
            points = np.asarray(polygon, np.float64)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{where} has a polygon that is no list of numbers") from error
        if points.ndim != 1 or len(points) % 2:
            raise BadInput(f"{where} has a polygon that is no list of x, y, x, y, ...")
        # far beyond the image, rasterising would cost memory without end
        if len(points) and not (points.min() >= -max(width, height) and points.max() <= 2 * max(width, height)):
            raise BadInput(f"{where} has a polygon far outside its image of {width}x{height} pixels")
        if len(points) >= 6:  # two points cover nothing, and pycocotools takes them for a box
            polygons.append(points)
    return polygons or None


def _of_runs(counts: np.ndarray | str, height: int, width: int, where: str) -> np.ndarray:
    """bool [H, W] from lengths of runs of 0, 1, 0, ... down the columns."""
    lengths = _unpacked(counts, where) if isinstance(counts, str) else counts
    if lengths.sum() != height * width or (len(lengths) and lengths.min() < 0):
        raise BadInput(f"{where} has run lengths that do not fill its image of {width}x{height} pixels")
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return flat.reshape(width, height).T


def _unpacked(counts: str, where: str) -> np.ndarray:
    """Lengths from COCO's compressed form, int64.

    Each is a number in pieces of five bits, the lowest first, in characters from "0" on: bit 5 says that more pieces follow,
    bit 4 of the last one is the sign. From the fourth number on it is the difference from the length two places before.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        piece = ord(character) - 48
        if not 0 <= piece < 64 or shift > 30:
            raise BadInput(f"{where} has run lengths that are no compressed ones of COCO")
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:
            if piece & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise BadInput(f"{where} has run lengths that are cut off")
    return np.array(lengths, np.int64)
