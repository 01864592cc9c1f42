"""The embedded data set: scikit-learn's 1,797 handwritten digits as an image folder of 32x32 PNG files.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998; 8x8 pixels of 17 grey levels, as
shipped in scikit-learn. They are enlarged once, by bicubic interpolation, and take the same road as any other folder.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from engine.data import cache as user_cache

NAME = "digits-1"  # the number rises when the pixels or the split change: an old cache is not taken for the new set
SIDE, VAL_IMAGES, SPLIT_SEED = 32, 360, 20221


def write(cache: Path | None = None) -> Path:
    """Writes the set below `cache` (default: the user's cache) unless it is there whole; returns its folder.

    The folder holds train/CLASS/NNNN.png (1,437 images) and val/CLASS/NNNN.png (360), grey, 32x32, split by class in
    proportion. It appears at once, complete, also when several processes ask for it together.

    Raises:
        BadInput: the cache folder cannot be written.
    """
    return user_cache.kept((cache or user_cache.folder()) / NAME, _fill)


def _fill(folder: Path) -> None:
    from sklearn.datasets import load_digits  # slow to import, and wanted once

    digits = load_digits()
    held_out = is_val(digits.target)
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if held_out[index] else "train") / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def is_val(labels: np.ndarray) -> np.ndarray:
    """bool [n]: the lowest relative ranks over all classes, each class in a fixed random order."""
    noise = np.random.Philox(np.random.SeedSequence(SPLIT_SEED)).random_raw(len(labels))
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members[np.argsort(noise[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    val = np.zeros(len(labels), bool)
    val[np.argsort(rank, kind="stable")[:VAL_IMAGES]] = True
    return val
