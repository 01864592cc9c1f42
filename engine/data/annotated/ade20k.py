"""ADE20K's scene parsing benchmark (ADEChallengeData2016): the 150 classes of pixels that segmentation is judged on.

Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017, and the benchmark's own description. A mask's value k is class k of
objectInfo150.txt, from 1; 0, "other", is not counted. ADE20K itself was not available where this was written: it was run on small
sets in its layout.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.annotated.index_masks import IndexMasks, open_folders
from engine.data.annotated.objects import VOID

CLASSES = 150
PLACES = (".", "ADEChallengeData2016")
FOLDERS = {"train": "training", "val": "validation"}
NAMES = "objectInfo150.txt"


def open_masks(
    folder: str | Path,
    split: Literal["train", "val"] = "val",
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> IndexMasks:
    """Reads images/SPLIT/*.jpg with annotations/SPLIT/*.png, where SPLIT is training or validation.

    Args:
        folder: that has images/ and annotations/ in it, or in ADEChallengeData2016/.
        bad_limit, screening: as for `engine.data.sources.open_images`.

    Returns:
        images in order of name. Classes are named by the first word of their line in objectInfo150.txt where it lies there, else
        numbered from 1.

    Raises:
        BadInput: nothing is laid out so, or as `index_masks.open_folders`; masks are looked into when they are asked for.
    """
    if split not in FOLDERS:
        raise BadInput(f"split {split!r} is unknown: choose {' or '.join(FOLDERS)}")
    folder, part = Path(folder).expanduser(), FOLDERS[split]
    needed = [f"{kind}/{part}" for kind in ("images", "annotations")]
    there = [folder / place for place in PLACES if all((folder / place / each).is_dir() for each in needed)]
    if not there:
        raise BadInput(
            f"{folder} is not laid out as ADE20K's benchmark: it needs {' and '.join(needed)}, maybe in {PLACES[1]}"
        )
    label_of = np.full(256, -1, np.int16)
    label_of[0], label_of[1 : CLASSES + 1] = VOID, np.arange(CLASSES)
    root = there[0].resolve()
    return open_folders(root, split, *needed, _names(root / NAMES), label_of, bad_limit, screening)


def _names(path: Path) -> tuple[str, ...]:
    """The 150 names: the last column, of whose synonyms only the first is kept unless another class has it."""
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, CLASSES + 1))
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text") from error
    rows = [row for row in rows if row[0].strip().isdigit()]
    if [int(row[0]) for row in rows] != list(range(1, CLASSES + 1)) or any(len(row) < 2 for row in rows):
        raise BadInput(f"{path} does not list the classes 1 to {CLASSES}, one per line with columns set apart by tabs")
    whole = [row[-1].strip() for row in rows]
    short = [name.partition(",")[0].strip() for name in whole]
    return tuple(name if short.count(name) == 1 else synonyms for name, synonyms in zip(short, whole, strict=True))
