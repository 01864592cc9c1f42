"""A set of images that do not exist: how many there are, in how many classes. `engine.data.made` makes them."""

from collections.abc import Sequence
from pathlib import Path

from engine.core.errors import BadInput

NAME = "synthetic"
IMAGES, CLASSES = 1_281_167, 1000  # as ImageNet's training set has
SIDE = 256  # pixels, of an image as it would be stored


def named(source: str | Path | None) -> int:
    """How many images the source is made of, if it is `synthetic` or `synthetic:N`; else 0.

    Raises:
        BadInput: N is no number above 0.
    """
    name, colon, count = str(source or "").partition(":")
    if name != NAME:
        return 0
    if colon and not (count.isdecimal() and int(count)):
        raise BadInput(f"{source} is no number of images: give {NAME} ({IMAGES:,} of them) or {NAME}:N with N from 1")
    return int(count) if colon else IMAGES


class Names(Sequence[str]):
    """`synthetic/0` and so on, made when asked for."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return f"{NAME}/{index}"
