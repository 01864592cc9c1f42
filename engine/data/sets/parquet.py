"""Sets of images in parquet files, as Hugging Face publishes them: written once as tar shards into the user's cache.

    DIR/train-00000-of-00012.parquet ...        or below DIR/data/
    DIR/validation-00000-of-00001.parquet ...   or val-..., else test-...: our "val"
    DIR/train/*.parquet ...                     the same with a folder for each split

A test split is never trained on, and not read where there is a validation split; files of other splits are passed over. Ids
follow the names of the files, and in a file its rows. An image is called FILE:ROW, from row 0; one without bytes keeps its
place, and screening finds it bad.

Images lie in compressed pages, and cannot be read in place as those in tars are. What is made of them is known by path, size and
modification time of every file. `engine.data.sets.parquet_files` says which columns are read.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console

from engine.core.errors import BadInput
from engine.core.progress import watched
from engine.data import cache
from engine.data.listing import Listing
from engine.data.sets import parquet_files
from engine.data.shards.index import NONE
from engine.data.shards.members import IMAGES_PER_SHARD, add_image, check_classes, new_shard, write_classes
from engine.data.shards.webdataset import of_shards

VERSION = 1  # rises when shards are made otherwise: an old cache is not taken for the new set
SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
SUFFIX = ".parquet"
NUMBERED = re.compile(r"-(\d{1,9})-of-(\d{1,9})\b")
MAGIC = {b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
OVERHEAD = 3 << 10  # bytes that a shard has of an image besides its own, at most


def has_split(folder: Path, split: str) -> bool:
    """Whether there are files of this split, "train" or "val". Raises BadInput for a folder that cannot be read."""
    return bool(_files(folder, split))


def parquet(folder: Path, split: str) -> Listing:
    """Lists a split; at the first time all files are read, and written as shards.

    Raises:
        BadInput: a file is missing, damaged, has no images, or is not like the others; labels have no name, or some are missing;
            the cache has no room; pyarrow is not installed.
    """
    files = {each: _files(folder, each) for each in SPLITS}
    for each in ("train", split):
        if not files[each]:
            accepted = " or ".join(f"{name}-*{SUFFIX}" for name in SPLITS[each])
            raise BadInput(
                f"{folder} has no {each} split: it needs {accepted} there, in data/, or in a folder so named"
            )
    home = _home(files)
    return of_shards(cache.kept(home, lambda into: _write(folder, files, into, home)), split)


def _home(files: dict[str, list[Path]]) -> Path:
    try:
        return cache.home_of(f"parquet-{VERSION}", [path for found in files.values() for path in found])
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}") from error


def _files(folder: Path, split: str) -> list[Path]:
    """Of the first place that has any of a split, those of the first name of this split."""
    for place in (folder, folder / "data"):
        if any(_named(place, name) for names in SPLITS.values() for name in names):
            return next((found for name in SPLITS[split] if (found := _named(place, name))), [])
    return []


def _named(place: Path, name: str) -> list[Path]:
    """Of place/NAME-*.parquet or place/NAME/*.parquet, in order. Raises BadInput where the names say that some are missing."""
    try:
        beside = [path for path in place.iterdir() if re.match(rf"{name}[-_.]", path.name)] if place.is_dir() else []
        within = list((place / name).iterdir()) if (place / name).is_dir() else []
    except OSError as error:
        raise BadInput(f"the folder {error.filename} cannot be read: {error.strerror}") from error
    beside, within = (
        sorted(path for path in found if path.name.endswith(SUFFIX) and not path.name.startswith("."))
        for found in (beside, within)
    )
    if beside and within:
        raise BadInput(
            f"{place} has files of {name} twice, {beside[0].name} and {name}/{within[0].name}: remove one kind"
        )
    found = beside or within
    numbers = [NUMBERED.search(path.name) for path in found]
    if any(numbers):
        said = [(int(matched[1]), int(matched[2])) if matched else (0, 0) for matched in numbers]
        if said != [(number, len(found)) for number in range(len(found))]:
            total = max(total for _, total in said)
            raise BadInput(
                f"{found[0].parent} has {len(found):,} files of {name}, which are not the {total:,} that {found[0].name} and "
                "others are numbered as: fetch what is missing, and remove what is of another version"
            )
    return found


def _write(folder: Path, files: dict[str, list[Path]], into: Path, home: Path) -> None:
    """Writes all splits as shards; what can be refused before the images are read is."""
    parquet_files.check_installed()
    console = Console(stderr=True, soft_wrap=True)
    everything = [path for found in files.values() for path in found]
    columns = parquet_files.agreed(everything)
    classes, labels = _classes(files, columns)
    images, size = map(sum, zip(*map(parquet_files.stored, everything), strict=True))
    needed, free = size + images * OVERHEAD, shutil.disk_usage(into).free
    if needed > free:
        raise BadInput(
            f"{folder} takes {needed / 2**30:,.2f} GiB as shards, and {home.parent} has {free / 2**30:,.2f} GiB free: make room, "
            "or set TESSERA_CACHE to a folder that has it"
        )
    told = f"{len(classes):,} classes of {columns.label!r}" if classes is not None else "no classes"
    console.print(
        f"{folder}: writing {images:,} images of {columns.image!r}, with {told}, as about {needed / 2**30:,.2f} GiB of shards "
        f"into {home}, once",
        highlight=False,
        markup=False,
    )
    if classes is not None:
        write_classes(into, classes)
    with watched(images, "writing") as watch:
        for split, found in files.items():
            if found:
                (into / split).mkdir()
                _fill(into / split, folder, found, columns.image, labels.get(split), watch)
    if _home(files) != home:
        raise BadInput(f"files in {folder} were written while they were read: start again when they are whole")


def _fill(
    into: Path, folder: Path, files: Sequence[Path], column: str, labels: np.ndarray | None, watch: Callable[[], object]
) -> None:
    """Writes the shards of a split."""
    number = empty = 0
    with ExitStack() as last:
        for path in files:
            name = path.relative_to(folder).as_posix()
            for row, content in enumerate(parquet_files.images(path, column)):
                if number % IMAGES_PER_SHARD == 0:
                    last.close()
                    tar = last.enter_context(new_shard(into / f"{number // IMAGES_PER_SHARD:05d}.tar"))
                label = None if labels is None else int(labels[number])
                add_image(tar, number, f"{name}:{row}", label, _suffix(content), content)
                number, empty = number + 1, empty + (not content)
                watch(1)
    if empty == number:
        raise BadInput(f"{files[0]} has no image: none of {number:,} rows of {into.name} has bytes in {column!r}")


def _suffix(content: bytes) -> str:
    """Of an image's name. What is of no known kind is called a JPEG, too, which screening then finds it not to be."""
    return next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), "jpg")


def _classes(
    files: dict[str, list[Path]], columns: parquet_files.Columns
) -> tuple[tuple[str, ...] | None, dict[str, np.ndarray]]:
    """The names of the classes, and int64 [n] of each split; or None and nothing where there are no classes."""
    if not columns.label:
        return None, {}
    vocabulary: dict[str, int] = {}
    codes = {
        split: [parquet_files.codes(path, columns, vocabulary) for path in found] for split, found in files.items()
    }
    trained = np.unique(np.concatenate([np.empty(0, np.int64), *codes["train"]]))
    if not any((part != NONE).any() for found in codes.values() for part in found):
        return None, {}
    if columns.words:
        words = list(vocabulary)
        classes = tuple(sorted(words[code] for code in trained if code != NONE))
        check_classes(classes, files["train"][0])
    else:
        words, classes = [], columns.names or tuple(map(str, range(int(trained.max(initial=NONE)) + 1)))
    label_of = {name: label for label, name in enumerate(classes)}
    to_label = np.array([label_of.get(word, len(classes)) for word in words], np.int64)
    for split, found in files.items():
        for path, part in zip(found, codes[split], strict=True):
            if len(without := np.flatnonzero(part == NONE)):
                raise BadInput(
                    f"{path} has {len(without):,} of {len(part):,} rows without a class in {columns.label!r}, row {without[0]} "
                    "first: all images of a set have one, or none has"
                )
            labels = to_label[part] if columns.words else part
            if len(wrong := np.flatnonzero((labels < 0) | (labels >= len(classes)))):
                value = repr(words[part[wrong[0]]][:80]) if columns.words else part[wrong[0]]
                known = "" if columns.names else " of the training images"
                raise BadInput(
                    f"{path} has the class {value} in row {wrong[0]}, which is none of the {len(classes):,}{known}"
                )
            part[:] = labels
    return classes, {split: np.concatenate(found) for split, found in codes.items() if found}
