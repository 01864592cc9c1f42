"""COCO-Stuff: COCO's images of 2017 with a class for every pixel, 80 of things and 91 of stuff.

Caesar et al., COCO-Stuff, CVPR 2018, and the description that comes with it: in the maps of stuff and things together, value v is
the id v + 1, ids 1 to 91 are COCO's things, 92 to 182 stuff, 255 is unlabelled. Eleven ids of things occur in no map; without
them 171 classes are left, numbered in order of id. COCO-Stuff itself was not available where this was written: it was run on
small sets in its layout.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.annotated.index_masks import IndexMasks, open_folders
from engine.data.annotated.objects import VOID

IDS = 182
# street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush
MISSING = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
USED = tuple(number for number in range(1, IDS + 1) if number not in MISSING)
IMAGES = ("images/{}", "{}")
MAPS = ("stuffthingmaps/{}", "annotations/{}", "{}")
NAMES = "labels.txt"


def open_masks(
    folder: str | Path,
    split: Literal["train", "val"] = "val",
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> IndexMasks:
    """Reads the images of SPLIT2017 with the maps of pixels.

    Args:
        folder: that has images in images/SPLIT2017/ or SPLIT2017/, and the maps (stuffthingmaps_trainval2017.zip) in
            stuffthingmaps/SPLIT2017/, annotations/SPLIT2017/ or SPLIT2017/.
        bad_limit, screening: as for `engine.data.sources.open_images`.

    Returns:
        images in order of name. Classes are named as labels.txt has them where it lies there, else by their id.

    Raises:
        BadInput: nothing is laid out so, or as `index_masks.open_folders`; maps are looked into when they are asked for.
    """
    if split not in ("train", "val"):
        raise BadInput(f"split {split!r} is unknown: choose train or val")
    root = Path(folder).expanduser().resolve()
    chosen = [_place(root, f"{split}2017", *where) for where in ((IMAGES, "*.jpg"), (MAPS, "*.png"))]
    label_of = np.full(256, -1, np.int16)
    label_of[VOID], label_of[np.array(USED) - 1] = VOID, np.arange(len(USED))
    return open_folders(root, split, *chosen, _names(root / NAMES), label_of, bad_limit, screening)


def _place(root: Path, part: str, places: tuple[str, ...], files: str) -> str:
    """The first of the places that has such files."""
    folders = [place.format(part) for place in places]
    for folder in folders:
        if next((root / folder).glob(files), None):
            return folder
    raise BadInput(f"{root} is not laid out as COCO-Stuff: it has no {files} in {' or '.join(folders)}")


def _names(path: Path) -> tuple[str, ...]:
    """The 171 names, from lines "ID: NAME"."""
    if not path.is_file():
        return tuple(f"id {number}" for number in USED)
    try:
        lines = [line.partition(":") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text") from error
    named = {number.strip(): name.strip() for number, _, name in lines}
    if unnamed := [number for number in USED if not named.get(str(number))]:
        raise BadInput(f"{path} has no name for the id {unnamed[0]}, in a line such as '1: person'")
    return tuple(named[str(number)] for number in USED)
