"""Which image files can be read: a look at every file once, before training, so that none ends a run half-way.

A header look refuses empty files, files that are no image of an accepted format, animations and multi-page files, and
images above 64 megapixels, which are never decoded. A decode look also finds truncated and damaged pixel data.
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
DECODED_UP_TO = 50_000  # images; for more, a full decode costs minutes, and what it would find is mended in training
PART = 64  # images that a thread takes at a time
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
TIFF_MODES = ("L", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B")  # what the decoder of the pipeline takes, too


def inspect(opened: Callable[[], BinaryIO], decode: bool) -> tuple[tuple[int, int], str]:
    """Looks at the file that `opened` gives. Returns ((width, height) in pixels as stored, "") or ((0, 0), the reason to refuse
    it).

    The EXIF orientation is left alone, here and in the pipeline.
    """
    try:
        with opened() as file:
            return _inspect(file, decode)
    except Image.DecompressionBombError:
        return (0, 0), f"above the limit of {MAX_PIXELS / 1e6:.0f} megapixels"
    except UnidentifiedImageError:
        return (0, 0), "not a JPEG, PNG, WebP, BMP or TIFF image"
    except Exception as error:  # decoders raise anything on hostile bytes; whatever it is, the file is bad
        return (0, 0), f"unreadable: {getattr(error, 'strerror', None) or error or type(error).__name__}"


def _inspect(file: BinaryIO, decode: bool) -> tuple[tuple[int, int], str]:
    if file.seek(0, os.SEEK_END) == 0:
        return (0, 0), "empty file"
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow swaps the sides of a rotated TIFF, the pipeline does not
            width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
            if image.mode not in TIFF_MODES:
                return (0, 0), f"TIFF of pixel type {image.mode}"
        if width * height > MAX_PIXELS:
            return (0, 0), f"{width}x{height} pixels, above the limit of {MAX_PIXELS / 1e6:.0f} megapixels"
        # a JPEG with further pictures behind the first (format MPO) is one picture to every decoder
        if image.format in ("PNG", "WEBP", "TIFF") and (frames := getattr(image, "n_frames", 1)) > 1:
            return (0, 0), f"animated or multi-page ({frames} frames)"
        if decode:
            image.draft(image.mode, (1, 1))  # JPEG: reads all the data, but computes an eighth of the pixels
            image.load()
        return (width, height), ""


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image in 8-bit RGB: grey is repeated, palettes are looked up, CMYK is converted, alpha is dropped."""
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    grey = np.asarray(image).astype(np.int64) >> 8  # 16 bits, which Pillow would cut off at 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def inspect_all(
    opened: Callable[[int], BinaryIO], count: int, decode: bool, threads: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Looks at `count` files, which `opened` gives by index.

    Returns:
        sizes int32 [count, 2] (width, height; 0 where bad), and {index: reason} of the bad.
    """
    Image.init()  # the plug-ins register themselves once, before threads ask for them
    sizes, reasons = np.zeros((count, 2), np.int32), {}

    def look(part: int) -> None:
        for index in range(part, min(part + PART, count)):
            sizes[index], reason = inspect(partial(opened, index), decode)
            if reason:
                reasons[index] = reason

    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files: the verdict says what matters
        list(pool.map(look, range(0, count, PART)))
    return sizes, dict(sorted(reasons.items()))
