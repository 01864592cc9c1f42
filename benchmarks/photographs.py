"""A folder of photographs as ImageNet's are: JPEG files of 500 x 375 pixels, a quarter of them upright.

Each is a crop of a photograph that ships with scikit-learn or scikit-image, enlarged a little where that is smaller. They are few
scenes again and again, which decoding does not notice.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data import cache
from engine.data.sets.scenes import photograph

NAME = "photographs-1"  # the number rises when the files change
SIZE, QUALITY = (500, 375), 95
LEAST = 0.8  # of the largest crop's side
SOURCES = (
    ("sklearn.datasets.images", "china.jpg"), ("sklearn.datasets.images", "flower.jpg"), ("skimage.data", "astronaut.png"),
    ("skimage.data", "coffee.png"), ("skimage.data", "rocket.jpg"), ("skimage.data", "motorcycle_left.png"),
)  # fmt: skip


def write(count: int) -> Path:
    """The folder of `count` files in the user's cache, written the first time.

    Raises:
        BadInput: the cache folder cannot be written, or a photograph is missing in its package.
    """
    return cache.kept(cache.folder() / f"{NAME}-{count}", partial(_fill, count))


def _fill(count: int, folder: Path) -> None:
    sources = [photograph(*source) for source in SOURCES]
    for number in range(count):
        rng = np.random.RandomState([20260, number])  # whose stream numpy has frozen
        source = sources[number % len(sources)]
        width, height = SIZE if rng.rand() < 0.75 else SIZE[::-1]
        scale = min(source.width / width, source.height / height) * rng.uniform(LEAST, 1)
        left, top = rng.uniform(source.width - scale * width), rng.uniform(source.height - scale * height)
        right, bottom = min(left + scale * width, source.width), min(top + scale * height, source.height)
        image = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else image
        image.save(folder / f"{number:05d}.jpg", quality=QUALITY)
