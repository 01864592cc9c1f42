"""Which images there are: lists a source, screens it once, and says what is read in place of a bad file.

Image folders are listed by `engine.data.listing`, tar shards by `engine.data.shards.webdataset`, published sets and
parquet files by `engine.data.sets.archives`. Sets with objects have readers of their own, `engine.data.annotated.coco` and
`engine.data.annotated.voc`, which are screened here, too.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.core.errors import BadInput
from engine.core.progress import watched
from engine.data import cache, listing, screen
from engine.data.listing import Listing
from engine.data.sets import archives, digits, scenes, synthetic
from engine.data.shards.webdataset import holds_shards, of_shards
from engine.data.stored import Ranges, Stored

_VERDICTS = ("sizes", "ids", "reasons")
SCREEN_VERSION = 3  # rises when screening judges differently, so that old verdicts are not reused
BAD_LIMIT = 0.001
SHOWN = 3
EMBEDDED = ("", "digits", "scenes")


@dataclass(frozen=True)
class ImageSet(Stored):
    """A listed and screened set of n image files; an image's id is its place in the list.

    Attributes:
        root: folder that the paths are relative to.
        split: "train" or "val"; sets with objects may have others.
        paths: n relative paths, in order of name.
        labels: int64 [n], or None where the set has no classes.
        classes: names, the label is the index; or None.
        sizes: int32 [n, 2], (width, height) in pixels as stored; zero where the file is bad.
        substitute: int64 [n], the id that is read for each id: itself, or for a bad file the next good one, cyclically.
        bad: (path, reason) of every bad file, in order.
        bad_limit: fraction of bad files above which work stops, also counting those found while training.
        ranges: where the images lie that are no files of their own, but parts of shards; or None.
    """

    root: Path
    split: str
    paths: Sequence[str]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    sizes: np.ndarray
    substitute: np.ndarray
    bad: tuple[tuple[str, str], ...] = ()
    bad_limit: float = BAD_LIMIT
    ranges: Ranges | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def synthetic(self) -> bool:
        """Whether there are no files, and the images are made."""
        return isinstance(self.paths, synthetic.Names)

    @property
    def good(self) -> np.ndarray:
        """bool [n]: the files that can be read."""
        return self.substitute == np.arange(len(self))


def open_images(
    source: str | Path | None,
    split: Literal["train", "val"],
    bad_limit: float = BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> ImageSet:
    """Lists and screens the images of a source.

    Args:
        source: None or "digits" for the embedded set with classes, "scenes" for the training images of the one with objects,
            without labels; "synthetic" or "synthetic:N" for images that are made (`engine.data.made`); NAME:DIR for a published
            set, or parquet files, in DIR (`engine.data.sets.archives` says which); else a folder: train/CLASS/* and val/CLASS/*
            (images may lie deeper), or any folder of images without labels, searched with its subfolders, or tar shards
            (`engine.data.shards.webdataset` says how they lie). Splits may be spelled otherwise (Train, training, validation);
            a test split is never trained on unless it is named itself. Files of other suffixes than jpg, jpeg, jfif, png, webp,
            bmp, tif and tiff are passed over, and so are hidden ones and what systems leave (__MACOSX, @eaDir).
        split: which part; a folder without train/ and val/ has "train" only.
        bad_limit: fraction of unreadable files above which this refuses.
        screening: "decode" reads all pixels, "header" only headers; "auto" decodes up to 50,000 images. The verdicts
            are cached by path, size and modification time of every file.

    Raises:
        BadInput: no such folder or split, no images, an empty class, a class in val that train lacks, an unreadable
            folder, files of a published set that are missing or damaged, or too many bad files.
    """
    if split not in ("train", "val"):
        raise BadInput(f"split {split!r} is unknown: choose train or val")
    if screening not in ("auto", "header", "decode"):
        raise BadInput(f"screening {screening!r} is unknown: choose auto, header or decode")
    if not 0 <= bad_limit <= 1:
        raise BadInput(f"bad_limit {bad_limit} is not a fraction between 0 and 1")
    if count := synthetic.named(source):
        return _synthetic(count, split)
    return of_listing(_list(source, split), split, bad_limit, screening)


def of_listing(
    listed: Listing, split: str, bad_limit: float = BAD_LIMIT, screening: Literal["auto", "header", "decode"] = "auto"
) -> ImageSet:
    """Screens listed files; arguments as for `open_images`, any name for a split. Raises BadInput if too many are bad."""
    paths = listed.paths
    decode = screening == "decode" or (screening == "auto" and len(paths) <= screen.DECODED_UP_TO)
    sizes, reasons, ledger = _screen(listed, decode)
    bad = tuple((paths[index], reason) for index, reason in reasons.items())
    check_bad(bad, len(paths), bad_limit, ledger)
    good = np.ones(len(paths), bool)
    good[list(reasons)] = False
    return ImageSet(
        listed.root,
        split,
        paths,
        listed.labels,
        listed.classes,
        sizes,
        substitutes(good),
        bad,
        bad_limit,
        listed.ranges,
    )


def _synthetic(count: int, split: str) -> ImageSet:
    """So many images, in classes by turns; training images only."""
    if split != "train":
        raise BadInput(f"{synthetic.NAME} images have no {split} split")
    classes = tuple(f"class {index}" for index in range(synthetic.CLASSES))
    sizes = np.full((count, 2), synthetic.SIDE, np.int32)
    labels, ids = np.arange(count) % synthetic.CLASSES, np.arange(count)
    return ImageSet(Path(synthetic.NAME), split, synthetic.Names(count), labels, classes, sizes, ids)


def located(source: str) -> str:
    """The source as it is named from any working directory: a folder by its absolute path, others as they are."""
    if source in EMBEDDED or synthetic.named(source):
        return source
    if chosen := archives.named(source):
        return ":".join((chosen[0], os.path.abspath(Path(chosen[1]).expanduser())))
    return os.path.abspath(Path(source).expanduser())


def has_split(source: str | Path | None, split: Literal["train", "val"]) -> bool:
    """Whether the source has this split. Raises BadInput if there is no such source."""
    if synthetic.named(source):
        return split == "train"
    if chosen := archives.named(source):
        return archives.has_split(*chosen, split)
    root = _locate(source)
    return split == "train" if listing.is_flat(root) else listing.split_folder(root, split) is not None


def substitutes(good: np.ndarray) -> np.ndarray:
    """int64 [n] from bool [n]: each good id itself, each bad one the next good id in the list, cyclically."""
    good_ids = np.flatnonzero(good)
    return good_ids[np.searchsorted(good_ids, np.arange(len(good))) % len(good_ids)]


def check_bad(bad: tuple[tuple[str, str], ...], total: int, limit: float, ledger: str | Path = "") -> None:
    """Raises BadInput if more than `limit` of `total` files are bad, or all of them; the sentence names `ledger`."""
    if len(bad) <= limit * total and len(bad) < total:
        return
    first = "; ".join(f"{path}: {reason}" for path, reason in bad[:SHOWN]) + ("; ..." if len(bad) > SHOWN else "")
    raise BadInput(
        f"{len(bad)} of {total} images are bad, above the limit of {limit:g} ({first}): mend or remove them"
        f"{ledger and f' (all are listed in {ledger})'}, or raise the limit"
    )


def _locate(source: str | Path | None) -> Path:
    if source is None or str(source) == "digits":
        return digits.write()
    if str(source) == "scenes":
        return scenes.write() / "coco" / "images" / "train"
    root = Path(source).expanduser()
    if not root.is_dir():
        raise BadInput(
            f"{source} is no folder: give a folder of images or of tar shards, 'digits' or 'scenes' (the embedded sets), "
            f"'synthetic', or NAME:DIR with NAME one of {', '.join(archives.NAMES)}"
        )
    if listing.is_flat(root):
        if held_out := listing.split_folder(root, "val"):
            raise BadInput(f"{root} has a folder {held_out}/ but no train/, which names the classes")
        if held_out := listing.split_folder(root, "test"):
            raise BadInput(
                f"{root} has a folder {held_out}/ but no train/: name the folder to train on, that or another"
            )
    return root.resolve()


def _list(source: str | Path | None, split: Literal["train", "val"]) -> Listing:
    if chosen := archives.named(source):
        return archives.list_split(*chosen, split)
    root = _locate(source)
    if not has_split(source, split):
        raise BadInput(f"{root} has no {split} split: it needs a folder {split}/ with one folder of images per class")
    if holds_shards(root / (listing.split_folder(root, "train") or "")):
        return of_shards(root, split)
    return listing.of_folder(root, split)


def _screen(listed: Listing, decode: bool) -> tuple[np.ndarray, dict[int, str], Path]:
    """Sizes, {index: reason} and the ledger file; from the cache if these very files were screened before."""
    paths = listed.paths
    key = hashlib.blake2b(
        f"{SCREEN_VERSION}\0{decode}\0{listed.root}\0".encode("utf-8", "surrogateescape"), digest_size=16
    )
    for column in (paths.ends, paths.text, listed.sizes, listed.modified):
        key.update(column)
    verdicts = cache.folder() / "screened" / f"{key.hexdigest()}.npz"
    begun, ledger = verdicts.with_suffix(".begun.npz"), verdicts.with_suffix(".bad.txt")

    def look() -> dict[str, np.ndarray]:
        before = cache.read_arrays(begun, _VERDICTS)
        with watched(len(paths), "looking at images") as watch:
            sizes, reasons = screen.inspect_all(
                listed.open, len(paths), decode, 2 * usable_cpus(), before and _as_verdicts(before),
                keep=lambda some: cache.write_arrays(begun, _as_arrays(*some)), watch=watch,
            )  # fmt: skip
        lines = "".join(f"{paths[place]}\t{reason}\n" for place, reason in reasons.items())
        ledger.write_text(lines, encoding="utf-8", errors="surrogateescape")
        return _as_arrays(sizes, reasons)

    stored = cache.arrays(verdicts, _VERDICTS, look)
    with suppress(OSError):  # of no use beside the verdicts, and no harm
        begun.unlink()
    return *_as_verdicts(stored), ledger


def _as_arrays(sizes: np.ndarray, reasons: dict[int, str]) -> dict[str, np.ndarray]:
    found = sizes, np.array(list(reasons), np.int64), np.array(list(reasons.values()), str)
    return dict(zip(_VERDICTS, found, strict=True))


def _as_verdicts(arrays: Mapping[str, np.ndarray]) -> screen.Verdicts:
    sizes, ids, reasons = (arrays[name] for name in _VERDICTS)
    return sizes, dict(zip(ids.tolist(), reasons.tolist(), strict=True))


def usable_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
