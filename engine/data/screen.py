"""Which image files can be read: a look at every file once, before training, so that none ends a run half-way.

A header look refuses empty files, files that are no image of an accepted format, animations and multi-page files, and
images above 64 megapixels, which are never decoded. A decode look also finds truncated and damaged pixel data.
"""

import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
DECODED_UP_TO = 50_000  # images; for more, a full decode costs minutes, and what it would find is mended in training
PART = 64  # images that a thread takes at a time
KEEP_EVERY = 60.0  # seconds between the times at which verdicts are kept
Verdicts = tuple[np.ndarray, dict[int, str]]
TIFF_WIDTH, TIFF_HEIGHT, TIFF_BANDS, TIFF_EXTRA_BANDS, TIFF_NUMBERS = 256, 257, 277, 338, 339
# what the decoder of the pipeline takes, too; of numbers it takes those without a sign
TIFF_MODES = ("L", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B")
TIFF_COMPRESSIONS = ("raw", "tiff_raw_16", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "tiff_deflate", "packbits", "zstd")
UNSIGNED = (1,)


def inspect(opened: Callable[[], BinaryIO], decode: bool) -> tuple[tuple[int, int], str]:
    """Looks at the file that `opened` gives. Returns ((width, height) in pixels as stored, "") or ((0, 0), the reason to refuse
    it).

    The EXIF orientation is left alone, here and in the pipeline.
    """
    try:
        with opened() as file:
            try:
                return _inspect(file, decode)
            except UnidentifiedImageError:
                return (0, 0), _unidentified(file)
    except Image.DecompressionBombError:
        return (0, 0), f"above the limit of {MAX_PIXELS / 1e6:.0f} megapixels"
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
            if reason := _of_tiff(image):
                return (0, 0), reason
        if image.format == "BMP" and image.info.get("compression") == 0 and image.tile[0].args[0] == "BGR;15":
            return (0, 0), "BMP of 16 bits a pixel without bit masks, which the decoder refuses"
        if width * height > MAX_PIXELS:
            return (0, 0), f"{width}x{height} pixels, above the limit of {MAX_PIXELS / 1e6:.0f} megapixels"
        # a JPEG with further pictures behind the first (format MPO) is one picture to every decoder
        if image.format in ("PNG", "WEBP", "TIFF") and (frames := getattr(image, "n_frames", 1)) > 1:
            return (0, 0), f"animated or multi-page ({frames} frames)"
        if decode:
            image.draft(image.mode, (1, 1))  # JPEG: reads all the data, but computes an eighth of the pixels
            image.load()
        return (width, height), ""


def _of_tiff(image: Image.Image) -> str:
    """Why the decoder of the pipeline refuses a TIFF, or would drop a part of it; "" where it takes it."""
    if image.mode not in TIFF_MODES:
        return f"TIFF of pixel type {image.mode}"
    if image.info["compression"] not in TIFF_COMPRESSIONS:
        return f"TIFF compressed by {image.info['compression']}, which the decoder refuses"
    if image.tag_v2.get(TIFF_NUMBERS, UNSIGNED)[0] not in UNSIGNED:
        return "TIFF of signed numbers, which the decoder refuses"
    bands, unnamed = image.tag_v2.get(TIFF_BANDS, 1), image.tag_v2.get(TIFF_EXTRA_BANDS, ())
    if image.mode == "RGB" and 0 in unnamed:  # not alpha, so it means something
        return f"TIFF of {bands} bands, of which only three can be used: write those as an image of their own"
    return ""


def _unidentified(file: BinaryIO) -> str:
    """Why Pillow knows nothing to do with a file."""
    file.seek(0)
    if (head := file.read(8))[:4] in PREFIXES:
        tags = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        if (bands := tags.get(TIFF_BANDS, 1)) > 4:
            return f"TIFF of {bands} bands; images have one, three, or four with alpha"
    return "not a JPEG, PNG, WebP, BMP or TIFF image"


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image in 8-bit RGB: grey is repeated, palettes are looked up, CMYK is converted, alpha is dropped."""
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    grey = np.asarray(image).astype(np.int64) >> 8  # 16 bits, which Pillow would cut off at 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def inspect_all(
    opened: Callable[[int], BinaryIO],
    count: int,
    decode: bool,
    threads: int,
    begun: Verdicts | None = None,
    keep: Callable[[Verdicts], object] = lambda verdicts: None,
    watch: Callable[[int], object] = lambda more: None,
) -> Verdicts:
    """Looks at `count` files, which `opened` gives by index.

    Args:
        begun: on the first ones, by someone who was stopped.
        keep: given the verdicts so far about once a minute.
        watch: told how many more were looked at.

    Returns:
        sizes int32 [count, 2] (width, height; 0 where bad), and {index: reason} of the bad.
    """
    Image.init()  # the plug-ins register themselves once, before threads ask for them
    sizes, reasons, done = np.zeros((count, 2), np.int32), {}, 0
    if begun is not None:
        done, reasons = len(begun[0]), dict(begun[1])
        sizes[:done] = begun[0]
        watch(done)

    def look(part: int) -> int:
        end = min(part + PART, count)
        for index in range(part, end):
            sizes[index], reason = inspect(partial(opened, index), decode)
            if reason:
                reasons[index] = reason
        return end

    kept = time.monotonic()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files: the verdict says what matters
        try:
            for end in pool.map(look, range(done, count, PART)):
                watch(end - done)
                done, now = end, time.monotonic()
                if now - kept > KEEP_EVERY:
                    kept = now
                    keep((sizes[:done], {index: reason for index, reason in sorted(reasons.items()) if index < done}))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sizes, dict(sorted(reasons.items()))
