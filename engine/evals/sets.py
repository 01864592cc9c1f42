"""The sets that protocols read: opened when they are first asked for, and checked once."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.errors import BadInput
from engine.data.annotated import opening as annotations
from engine.data.sources import BAD_LIMIT, open_images
from engine.evals.registry import protocol, reads

# kinds of sets, and the flag of engine.eval that names them
KINDS = {"classes": "data", "objects": "objects", "masks": "objects", "semantic": "objects", "video": "video"}


class Sets:
    """The sets that protocols read, by kind; each is opened when it is first asked for.

    Args:
        sources: by the names that KINDS gives: what `open_images` (data) or `annotations.open_pair` (the others) take, or an
            opened pair of a training and a test set, or None for the embedded ones.
    """

    def __init__(self, bad_limit: float = BAD_LIMIT, **sources: Any):
        self._sources, self._bad_limit, self._opened = sources, bad_limit, {}
        self._fit: dict[str, Any] = {}  # by protocol, the settings that were found to go with its sets

    def pair(self, kind: str) -> tuple[Any, Any]:
        """The training and the test set of a kind. Raises BadInput as what opens them."""
        if kind not in self._opened:
            source = self._sources.get(KINDS[kind])
            if isinstance(source, Sequence) and not isinstance(source, str):
                self._opened[kind] = tuple(source)
            elif kind == "classes":
                self._opened[kind] = tuple(open_images(source, split, self._bad_limit) for split in ("train", "val"))
            else:
                self._opened[kind] = annotations.open_pair(kind, source, self._bad_limit)
        return self._opened[kind]

    def name(self, kind: str) -> str:
        """What to call the sets of a kind."""
        source = self._sources.get(KINDS[kind])
        if isinstance(source, Sequence) and not isinstance(source, str):
            return str(getattr(source[1], "images", source[1]).root)
        return str(source or ("digits" if kind == "classes" else annotations.DEFAULTS[kind]))

    @property
    def opened(self) -> dict[str, tuple[Any, Any]]:
        """By kind, what has been asked for."""
        return dict(self._opened)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(path, reason) of every image of the opened sets that could not be read."""
        splits = [split for pair in self._opened.values() for split in pair if split is not None]
        return sorted({tuple(bad) for split in splits for bad in getattr(split, "images", split).bad})

    @property
    def objects_left_out(self) -> str:
        """How many annotated objects of the opened sets could not be used, and the first of them; "" where all could."""
        splits = [split for pair in self._opened.values() for split in pair if split is not None]
        found = dict.fromkeys(
            f"annotation {number} of {split.file}: {why}"
            for split in splits
            for number, why in getattr(split, "left_out", ())
        )
        return f"{len(found)} ({'; '.join(list(found)[:3])}{'; ...' if len(found) > 3 else ''})" if found else ""

    def check(self, name: str, settings: Any) -> None:
        """Raise BadInput for sets that cannot be opened, or that this protocol cannot judge; its name is in the sentence.

        What was found to fit is not looked at again: a large set has a file of masks for each of its images.
        """
        pair = self.pair(reads(name))
        if self._fit.get(name) == settings:
            return
        try:
            protocol(name).check(*pair, settings)
        except BadInput as error:
            raise BadInput(str(error) if name in str(error) else f"{name}: {error}") from error
        self._fit[name] = settings


def check(settings: Mapping[str, Any], sets: Sets) -> None:
    """`Sets.check` for each of these protocols and its settings."""
    for name, setting in settings.items():
        sets.check(name, setting)
