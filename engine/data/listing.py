"""Which files a split has, with their classes, before any of them is looked at; and how image folders are listed.

A `Listing` is all that a kind of data set has to give; screening, substitutes and labels follow from it in `engine.data.sources`.

A folder is walked at every start: only the sizes and times of its files tell of one that was written anew in place (the time of
the folder doesn't), and what screening knows of a file holds for that size and time only. Shards, whose few files say the same
for all images in them, are listed once (`engine.data.shards.index`).
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from engine.core.errors import BadInput
from engine.data import screen
from engine.data.names import Names
from engine.data.stored import Ranges, Stored

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}  # of splits, each also with a capital, or in capitals
LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
ACCEPTED = ", ".join(suffix[1:] for suffix in screen.SUFFIXES)


class File(NamedTuple):
    """An image file: its path below the root, its size in bytes (-1 where it cannot be had), its modification time in ns."""

    path: str
    size: int
    modified: int


@dataclass(frozen=True)
class Listing(Stored):
    """The n images of a split.

    Attributes:
        root: folder that the paths are relative to.
        paths: in the order of their ids.
        sizes, modified: int64 [n], as of `File`; of an image in a larger file, the modification time of that.
        labels: int64 [n], or None where the set has no classes.
        classes: names, the label is the index; or None.
        ranges: where images that are no files lie; or None.
    """

    root: Path
    paths: Names
    sizes: np.ndarray
    modified: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    ranges: Ranges | None = None

    @classmethod
    def of(
        cls,
        root: Path,
        files: Iterable[File],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> "Listing":
        """From files, which are gone through once and not kept."""
        sizes, modified = array("q"), array("q")

        def paths() -> Iterator[str]:
            for path, size, time in files:
                sizes.append(size)
                modified.append(time)
                yield path

        names = Names.of(paths())
        return cls(root, names, np.array(sizes, np.int64), np.array(modified, np.int64), labels, classes)

    @classmethod
    def of_classes(cls, root: Path, members: Iterable[tuple[str, Iterable[File]]], classes: Sequence[str]) -> "Listing":
        """From (class, its files), in order."""
        index, labels = {name: label for label, name in enumerate(classes)}, array("q")

        def files() -> Iterator[File]:
            for name, within in members:
                for file in within:
                    labels.append(index[name])
                    yield file

        found = cls.of(root, files())
        return replace(found, labels=np.array(labels, np.int64), classes=tuple(classes))


def split_folder(root: Path, split: str) -> str | None:
    """What a folder calls a split, spelled as others do (Train, training, validation); None where it has none."""
    spelled = (way(name) for name in SPELLINGS.get(split, (split,)) for way in (str, str.capitalize, str.upper))
    return next((name for name in spelled if (root / name).is_dir()), None)


def is_flat(root: Path) -> bool:
    """Whether a folder's images have no classes: it has no train/."""
    return split_folder(root, "train") is None


def of_folder(root: Path, split: str) -> Listing:
    """Lists split/CLASS/* (images may lie deeper), or all images of a flat folder.

    Raises:
        BadInput: no images, an empty class, a class in val that train lacks, or an unreadable folder.
    """
    if is_flat(root):
        found = Listing.of(root, walk(root, ""))
        if not len(found.paths):
            raise BadInput(f"no images in {root}: the accepted files are {ACCEPTED}")
        return found
    folders = {name: split_folder(root, name) for name in ("train", "val", split)}
    classes = class_names(root, folders["train"])
    # one name may be written in two ways (é, or e and an accent): file systems of different makes have each its own
    known = {normalize("NFC", name): name for name in classes}
    if len(known) < len(classes):
        twice = next(name for name in classes if known[normalize("NFC", name)] != name)
        raise BadInput(f"{root / folders['train']} has the class {twice!r} in two forms of Unicode; merge the folders")
    for name in class_names(root, folders["val"]) if folders["val"] else ():
        if normalize("NFC", name) not in known:
            raise BadInput(f"{root / folders['val']} has the class {name!r} that {root / folders['train']} has not")
    folder = folders[split]
    members = (
        (known[normalize("NFC", name)], in_class(root, f"{folder}/{name}")) for name in class_names(root, folder)
    )
    return Listing.of_classes(root, members, classes)


def class_names(root: Path, split: str) -> tuple[str, ...]:
    """The folders of a split. Raises BadInput if there are none."""
    names = tuple(sorted(entry.name for entry in _scan(root / split) if entry.is_dir() and not _is_foreign(entry.name)))
    if not names:
        raise BadInput(f"no class folders in {root / split}: images belong in {split}/CLASS/")
    return names


def in_class(root: Path, folder: str) -> list[File]:
    """The images of a class folder. Raises BadInput if there are none."""
    files = list(walk(root, folder))
    if not files:
        raise BadInput(f"the class folder {root / folder} has no images: the accepted files are {ACCEPTED}")
    return files


def walk(root: Path, folder: str, walked: set[str] | None = None) -> Iterator[File]:
    """The images below root/folder, in order of name; of a folder that several links lead to, or one that leads back up, once."""
    walked, real = set() if walked is None else walked, os.path.realpath(root / folder)
    if real in walked:
        return
    walked.add(real)
    for entry in sorted(_scan(root / folder), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if _is_foreign(entry.name):
            continue
        if entry.is_dir():
            yield from walk(root, path, walked)
        elif path.lower().endswith(screen.SUFFIXES):
            try:
                status = entry.stat()
                yield File(path, status.st_size, status.st_mtime_ns)
            except OSError:  # a dangling link keeps its place in the list; screening says what is wrong with it
                yield File(path, -1, 0)


def _is_foreign(name: str) -> bool:
    """Whether an entry is hidden, or what systems leave in anybody's folders: copies of images that are none."""
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise BadInput(f"the folder {folder} cannot be read: {error.strerror}") from error
