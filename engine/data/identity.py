"""Which images a set holds, in few words: so that a run that goes on, and ranks that read copies of their own, see the same."""

import hashlib
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.data.sources import ImageSet

SHOWN = 3


@dataclass(frozen=True)
class Identity:
    """What must be equal for two sets to be taken for one. Where they lie and what the files hold is not in it.

    Attributes:
        images: how many there are, bad ones too.
        classes: their names, the label is the index; or None.
        names: a digest of every image's path below the root, in order, with its label. Accents count the same however a file
            system spells them (NFC, NFD).
    """

    images: int
    classes: tuple[str, ...] | None
    names: str

    @staticmethod
    def of(images: ImageSet) -> "Identity":
        digest = hashlib.blake2b(digest_size=16)
        if not images.synthetic:
            text = unicodedata.normalize("NFC", "\0".join(map(str, images.paths)))
            digest.update(text.encode("utf-8", "surrogateescape"))
        if images.labels is not None:
            digest.update(np.ascontiguousarray(images.labels).tobytes())
        return Identity(len(images), images.classes, digest.hexdigest())

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Identity":
        classes = content["classes"]
        return Identity(content["images"], None if classes is None else tuple(classes), content["names"])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def difference(self, before: "Identity") -> str:
        """What is not as it was, in words; "" where nothing is."""
        told = []
        if self.images != before.images:
            told.append(f"{self.images:,} images instead of {before.images:,}")
        if self.classes != before.classes:
            told.append(_of_classes(self.classes or (), before.classes or ()))
        if not told and self.names != before.names:
            told.append(f"as many images ({self.images:,}), but not of the same names in the same classes")
        return "; ".join(told)


def _of_classes(now: tuple[str, ...], before: tuple[str, ...]) -> str:
    added, gone = (
        [name for name in some if name not in set(others)] for some, others in ((now, before), (before, now))
    )
    if not added and not gone:
        return "the same classes in another order, so that labels would mean others"
    words = [f"{_some(names)} {what}" for names, what in ((added, "new"), (gone, "gone")) if names]
    return f"other classes ({', '.join(words)}), so that labels may mean others"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
