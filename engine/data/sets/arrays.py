"""Published sets whose images lie inside arrays, written once as train/CLASS/NNNNN.png and val/CLASS/NNNNN.png into the cache.

CIFAR-10 and CIFAR-100: Krizhevsky 2009, versions for Python and binary. SVHN, cropped digits: Netzer et al., 2011. NNNNN is an
image's place in its split. The cache's folder is named after path, size and modification time of what it was made from.

Shape suffixes: N images, H = W = 32 pixels, C = 3 channels.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from engine.core.errors import BadInput
from engine.data import cache
from engine.data.sets import gzipped, matlab, pickled

VERSION = 1  # rises when pixels or folders change: an old cache is not taken for the new set
SIDE, PIXELS = 32, 3 * 32 * 32
LARGEST = 1 << 28  # bytes of a file; the largest, CIFAR-100's training images, has 155 MB
LIMITS = gzipped.Limits("CIFAR", LARGEST, 1 << 30)  # an archive unpacks to 190 MB
CLASS = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]*")  # becomes the name of a folder


@dataclass(frozen=True)
class Arrays:
    """A set before it is written: uint8 [N, H, W, C] and int64 [N] per split, the names of the labels."""

    classes: tuple[str, ...]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Cifar:
    """One of the forms CIFAR is published in.

    Attributes:
        folder, archive: as published; the archive holds the folder.
        names: the file of class names.
        keys: of class names and labels, in the pickles; none in the binary version.
        label_bytes: before each image in the binary version, of which the last one counts.
    """

    classes: int
    folder: str
    archive: str
    names: str
    train: tuple[str, ...]
    test: str
    keys: tuple[bytes, bytes] = (b"", b"")
    label_bytes: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (self.names, *self.train, self.test)


_TEN = (
    _Cifar(
        10, "cifar-10-batches-py", "cifar-10-python.tar.gz", "batches.meta", tuple(f"data_batch_{n}" for n in range(1, 6)),
        "test_batch", keys=(b"label_names", b"labels"),
    ),
    _Cifar(
        10, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "batches.meta.txt",
        tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin", label_bytes=1,
    ),
)  # fmt: skip
_HUNDRED = (
    _Cifar(
        100, "cifar-100-python", "cifar-100-python.tar.gz", "meta", ("train",), "test",
        keys=(b"fine_label_names", b"fine_labels"),
    ),
    _Cifar(
        100, "cifar-100-binary", "cifar-100-binary.tar.gz", "fine_label_names.txt", ("train.bin",), "test.bin", label_bytes=2,
    ),
)  # fmt: skip


def cifar10(folder: Path) -> Path:
    """CIFAR-10 as an image folder in the cache; see `engine.data.sets.archives`."""
    return _cifar("cifar10", _TEN, folder)


def cifar100(folder: Path) -> Path:
    """CIFAR-100 with its fine classes as an image folder in the cache; see `engine.data.sets.archives`."""
    return _cifar("cifar100", _HUNDRED, folder)


def svhn(folder: Path) -> Path:
    """SVHN's cropped digits as an image folder in the cache; see `engine.data.sets.archives`."""
    files = {"train": folder / "train_32x32.mat", "val": folder / "test_32x32.mat"}
    return _written("svhn", list(files.values()), lambda: _read_svhn(files))


def _read_svhn(files: dict[str, Path]) -> Arrays:
    splits = {}
    for split, path in files.items():
        images_HWCN, labels = matlab.read(path, "X", "y")
        if images_HWCN.dtype != np.uint8 or images_HWCN.shape[:-1] != (SIDE, SIDE, 3):
            raise BadInput(f"{path} has 'X' of {images_HWCN.dtype} {list(images_HWCN.shape)}, not uint8 [32, 32, 3, n]")
        labels = matlab.whole(path, "y", labels, 1, 10) % 10  # the digit 0 is labelled 10
        if len(labels) != images_HWCN.shape[-1]:
            raise BadInput(f"{path} has {images_HWCN.shape[-1]} images and {len(labels)} labels")
        splits[split] = images_HWCN.transpose(3, 0, 1, 2), labels
    return Arrays(tuple("0123456789"), splits)


def _cifar(name: str, forms: Sequence[_Cifar], folder: Path) -> Path:
    form, place = _find(name, forms, folder)
    files = [place] if place.is_file() else [place / file for file in form.files]
    return _written(name, files, lambda: _read_cifar(form, place))


def _find(name: str, forms: Sequence[_Cifar], folder: Path) -> tuple[_Cifar, Path]:
    """The form that is there, and the folder or archive that holds it; folders come first."""
    for form in forms:
        for place in (folder, folder / form.folder):
            if any((place / file).is_file() for file in form.files):
                return form, place
    for form in forms:
        if (folder / form.archive).is_file():
            return form, folder / form.archive
    accepted = ", ".join(name for form in forms for name in (f"{form.folder}/", form.archive))
    raise BadInput(f"{folder} holds no {name}: it needs one of {accepted}")


def _read_cifar(form: _Cifar, place: Path) -> Arrays:
    wanted = {f"{form.folder}/{name}": name for name in form.files}
    contents = (
        gzipped.read(place, wanted, LIMITS)
        if place.is_file()
        else {name: _content(place / name) for name in form.files}
    )
    where = f"{place}:{form.folder}/" if place.is_file() else f"{place}/"
    classes, rows = _class_names(form, where + form.names, contents[form.names])
    splits = {}
    for split, files in (("train", form.train), ("val", (form.test,))):
        batches = [_batch(form, where + file, contents.pop(file), rows) for file in files]
        pixels_NP, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        splits[split] = pixels_NP.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels
    return Arrays(classes, splits)


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} has more than {LARGEST >> 20} MiB, which no file of CIFAR has")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _class_names(form: _Cifar, file: str, data: bytes) -> tuple[tuple[str, ...], int | None]:
    """The classes, and how many images a batch must have where the file says that."""
    if form.label_bytes:
        names, rows = data.split(), None
    else:
        found = pickled.load(data, file)
        names, rows = found.get(form.keys[0]), found.get(b"num_cases_per_batch")
    if not isinstance(names, list) or len(names) != form.classes:
        raise BadInput(f"{file} does not name {form.classes} classes")
    classes = tuple(name.decode("latin1") if isinstance(name, bytes) else "" for name in names)
    if not all(map(CLASS.fullmatch, classes)) or len(set(classes)) < form.classes:
        raise BadInput(f"{file} has class names that are no words, or one twice")
    return classes, rows if isinstance(rows, int) else None


def _batch(form: _Cifar, file: str, data: bytes, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, C * H * W] and int64 [N]."""
    if form.label_bytes:
        record = form.label_bytes + PIXELS
        if not data or len(data) % record:
            raise BadInput(f"{file} is cut off: {len(data)} bytes are no whole number of records of {record}")
        records = np.frombuffer(data, np.uint8).reshape(-1, record)
        pixels, labels = records[:, form.label_bytes :], records[:, form.label_bytes - 1].tolist()
    else:
        batch = pickled.load(data, file)
        pixels, labels = batch.get(b"data"), batch.get(form.keys[1])
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
            raise BadInput(f"{file} has no 'data' of uint8 [n, {PIXELS}]")
        if not isinstance(labels, list) or not all(type(label) is int and label.bit_length() < 64 for label in labels):
            raise BadInput(f"{file} has no list of whole numbers {form.keys[1].decode()!r}")
    if len(labels) != len(pixels):
        raise BadInput(f"{file} has {len(pixels)} images and {len(labels)} labels")
    if rows is not None and len(labels) != rows:
        raise BadInput(f"{file} has {len(labels)} images, but {form.names} says {rows} for each batch")
    if outside := [label for label in labels if not 0 <= label < form.classes]:
        raise BadInput(f"{file} has the label {outside[0]}, which is not between 0 and {form.classes - 1}")
    return pixels, np.array(labels, np.int64)


def _written(name: str, files: Sequence[Path], read: Callable[[], Arrays]) -> Path:
    """The image folder in the cache that was or now is made from these files."""
    try:
        home = cache.home_of(f"{name}-{VERSION}", files)
    except OSError as error:
        needed = ", ".join(file.name for file in files)
        raise BadInput(f"{error.filename} is missing: {name} needs {needed}") from error
    return cache.kept(home, lambda folder: _write(name, home, folder, read()))


def _write(name: str, home: Path, folder: Path, arrays: Arrays) -> None:
    train_labels = arrays.splits["train"][1]
    if len(empty := np.setdiff1d(np.arange(len(arrays.classes)), train_labels)):
        raise BadInput(f"{name} has no training image of class {arrays.classes[empty[0]]!r}: its files do not agree")
    total = sum(len(labels) for _, labels in arrays.splits.values())
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{name}: writing {total:,} images into {home}, once", highlight=False, markup=False)
    for split, (images_NHWC, labels) in arrays.splits.items():
        for label in np.unique(labels):
            (folder / split / arrays.classes[label]).mkdir(parents=True)
        pairs = zip(images_NHWC, labels.tolist(), strict=True)
        shown = track(
            enumerate(pairs),
            f"{name} {split}",
            len(labels),
            console=console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        for index, (image_HWC, label) in shown:
            path = folder / split / arrays.classes[label] / f"{index:05d}.png"
            Image.fromarray(np.ascontiguousarray(image_HWC)).save(path, compress_level=1)
