"""Folders of tar shards in WebDataset's layout, which are read where they lie: found, listed once, and given their classes.

    FOLDER/train/*.tar and FOLDER/val/*.tar, or FOLDER/*.tar, which is all training images
    FOLDER/classes.txt      optional: the names of the classes, one a line; an image's label is the number of its line, from 0

Nothing else than .tar files may be images there: a folder that has folders or images beside its .tar files is an image folder.
Files of a shard that share a key, which is the name up to the first dot behind the last slash, belong together:

    KEY.jpg     the image, or jpeg, png, webp, bmp, tif, tiff
    KEY.cls     its class: a number (the label), or a name
    KEY.json    used where there is no .cls: an object whose "cls", "label" or "class" is a number or a name. One of more than
                64 KiB is taken for something else than a label. "__path__" names the image as the folder it was packed from did

All images of a set have a class, or none has. Without classes.txt, classes that are all numbers are called by them, others sort
by name; val may have no class that train lacks. Keys without an image, other suffixes and hidden names are passed over. Ids
follow the names of the shards, and in a shard the order of its members.

What lies where is found out once (`engine.data.shards.index`).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.errors import BadInput
from engine.core.json_text import parsed
from engine.data import screen
from engine.data.listing import ACCEPTED, Listing, split_folder
from engine.data.names import Names
from engine.data.shards import manifest
from engine.data.shards.index import NONE, Index, Part, kept, opened, shown
from engine.data.shards.tar import Archive, Member

SUFFIX, CLASSES = ".tar", "classes.txt"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
LABEL_SUFFIXES = ("cls", "json")
LABEL_KEYS = ("cls", "label", "class")
PATH_KEY = "__path__"
LARGEST_LABEL = {"cls": 4096, "json": 1 << 16}  # bytes
MOST_CLASSES = 1_000_000
THREADS = 16


def holds_shards(folder: Path) -> bool:
    """Whether this folder's images are in .tar files: it has some, and neither folders nor images beside them."""
    found = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if not name.startswith(".") and (name.endswith(screen.SUFFIXES) or entry.is_dir()):
                    return False  # at the first one: there may be a million
                found |= not name.startswith(".") and name.endswith((SUFFIX, *COMPRESSED))
    except OSError as error:
        raise BadInput(f"the folder {folder} cannot be read: {error.strerror}") from error
    return found


def of_shards(root: Path, split: str) -> Listing:
    """Lists the shards of root/SPLIT, or of `root` itself where it has no train/.

    Raises:
        BadInput: a shard is torn, compressed, hostile or has a member that cannot be understood; some images have a class and
            others not; classes that do not agree; no images; or packing by `engine.shard` did not come to its end.
    """
    manifest.check_whole(root)
    train = split_folder(root, "train") or ""
    folder = (split_folder(root, split) or "") if train else ""
    own = _index(root, folder)
    trained = _index(root, train) if folder != train else own
    classes = _classes(root, trained)
    if classes is None and own.words:
        raise BadInput(f"the shards in {root / folder} have classes, and those in {root / train} have none")
    labels = None if classes is None else _labels(own, trained, classes, root, folder)
    ranges = own.ranges
    return Listing(root, own.paths, ranges.size, ranges.stamps[ranges.file, 1], labels, classes, ranges)


def _index(root: Path, split: str) -> Index:
    shards = _shards(root / split)
    index = kept(shards, f"webdataset {split}", lambda stamps: _read(shards, stamps, split))
    if not len(index.paths):
        raise BadInput(
            f"no images in the shards in {root / split}: the accepted files are {ACCEPTED}; ImageNet's own archives are read by "
            "--data imagenet:DIR"
        )
    if 0 < (without := int((index.codes == NONE).sum())) < len(index.codes):
        first = index.paths[int(np.flatnonzero(index.codes == NONE)[0])]
        raise BadInput(
            f"{without:,} of {len(index.codes):,} images in {root / split} have no class, {first} first: all or none"
        )
    return index


def _shards(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadInput(f"the folder {folder} cannot be read: {error.strerror}") from error
    if packed := [path for path in found if path.name.lower().endswith(COMPRESSED)]:
        raise BadInput(
            f"{packed[0]} is compressed, and cannot be read in place: unpack it to a .tar, images gain nothing"
        )
    shards = [path for path in found if path.name.lower().endswith(SUFFIX)]
    if not shards:
        raise BadInput(f"{folder} has no shards (.tar), which train/ beside it has")
    return shards


def _read(shards: Sequence[Path], stamps: np.ndarray, split: str) -> Iterator[tuple[int, Part]]:
    below = [f"{split}/{path.name}" if split else path.name for path in shards]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from enumerate(shown(pool.map(_images, shards, stamps.tolist(), below), len(shards)))


def _images(shard: Path, stamp: list[int], below: str) -> Part:
    with opened(shard, stamp) as file:
        archive = Archive(file, str(shard))
        images: dict[str, Member] = {}
        labels: dict[str, dict[str, str]] = {suffix: {} for suffix in (*LABEL_SUFFIXES, PATH_KEY)}
        for member in archive.members():
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not stem or any(part.startswith(".") for part in folder.split("/")):
                continue
            key, suffix = f"{folder}{slash}{stem}", suffix.lower()
            if dot + suffix in screen.SUFFIXES:
                if key in images:
                    raise BadInput(f"{shard} has two images of one key, {images[key].name!r} and {member.name!r}")
                images[key] = member
            elif suffix in LABEL_SUFFIXES and member.size <= LARGEST_LABEL[suffix]:
                label, path = _said(archive, member, suffix)
                labels[suffix] |= {} if label is None else {key: label}
                labels[PATH_KEY] |= {} if path is None else {key: path}
            elif suffix == "cls":
                raise BadInput(f"{shard} has {member.name!r} with {member.size} bytes, which is no class")
    named, words = labels[PATH_KEY], {}
    paths = Names.of(named.get(key, f"{below}/{member.name}") for key, member in images.items())
    found = [labels["cls"].get(key, labels["json"].get(key)) for key in images]
    codes = [NONE if word is None else words.setdefault(word, len(words)) for word in found]
    places = np.array([(member.start, member.size) for member in images.values()], np.int64).reshape(-1, 2)
    return Part(paths, places, np.array(codes, np.int64), tuple(words))


def _said(archive: Archive, member: Member, suffix: str) -> tuple[str | None, str | None]:
    """The class that a small member names, and the path; None where it names none."""
    body = archive.read(member.start, member.size)
    try:
        content = body.decode().strip() if suffix == "cls" else parsed(body)
    except ValueError as error:
        kind = "JSON" if suffix == "json" else "text"
        raise BadInput(f"{archive.where} has {member.name!r}, which is no {kind}") from error
    if suffix == "cls":
        return _word(archive, member, content), None
    if not isinstance(content, dict):
        return None, None
    given: Any = next((content[key] for key in LABEL_KEYS if key in content), None)
    label = _word(archive, member, str(given)) if type(given) in (int, str) else None
    path = content.get(PATH_KEY)
    return label, None if path is None else _word(archive, member, path)


def _word(archive: Archive, member: Member, word: Any) -> str:
    usable = isinstance(word, str) and 0 < len(word) <= LARGEST_LABEL["cls"] and "\0" not in word
    try:
        if usable:
            word.encode("utf-8", "surrogateescape")
            return word
    except UnicodeEncodeError:
        pass
    raise BadInput(f"{archive.where} has {member.name!r}, which names no class or path: {str(word)[:40]!r}")


def _classes(root: Path, trained: Index) -> tuple[str, ...] | None:
    """The names of the classes, from classes.txt or from what the training images have."""
    if not trained.words:
        return None
    listed = root / CLASSES
    if listed.is_file():
        try:
            lines = listed.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        except OSError as error:
            raise BadInput(f"{listed} cannot be read: {error.strerror}") from error
        names = tuple(line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1]))
        if not all(names) or len(set(names)) < len(names):
            raise BadInput(f"{listed} has a line without a class, or a class twice")
        return names
    if all(map(_is_number, trained.words)):
        return tuple(map(str, range(max(map(int, trained.words)) + 1)))
    return tuple(sorted(trained.words))


def _labels(own: Index, trained: Index, classes: tuple[str, ...], root: Path, split: str) -> np.ndarray:
    """int64 [n]. Where the training images have numbers, those are the labels."""
    if not own.words:
        raise BadInput(f"the shards in {root / split} have no classes, and those in {root / 'train'} have some")
    numbers, label_of = all(map(_is_number, trained.words)), {name: label for label, name in enumerate(classes)}
    found = np.empty(len(own.words), np.int64)
    for code, word in enumerate(own.words):
        label = (int(word) if _is_number(word) else NONE) if numbers else label_of.get(word, NONE)
        if not 0 <= label < len(classes):
            known = root / CLASSES if (root / CLASSES).is_file() else "the training images"
            raise BadInput(
                f"the shards in {root / split} have the class {word!r}, which is none of the {len(classes)} of {known}"
            )
        found[code] = label
    return found[own.codes]


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and int(word[:10]) < MOST_CLASSES
