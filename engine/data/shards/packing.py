"""Packs sets of images into shards, which are read in place of the folders they came from (`engine.data.shards.webdataset`).

    OUT/train/00000.tar ...   KEY.jpg (png, ...) with KEY.cls, the label, where there are classes, and KEY.json, which has it too,
    OUT/val/00000.tar ...     and the path that the set calls the image by. KEY is the image's number among those that are packed
    OUT/classes.txt           a name a line, where there are classes
    OUT/manifest.json         from what and how it is packed, the size of every shard, the images left out, with the reason

Images keep their order, and so their ids: a run draws them at random anyway. What reads shards from end to end should shuffle.
Every shard is written aside and renamed, so one that is there is whole, and packing goes on where it was stopped. The same images
packed the same way give the same bytes.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.data.ahead import loaded
from engine.data.identity import Identity
from engine.data.screen import FORMATS, as_rgb
from engine.data.shards import manifest
from engine.data.shards.members import IMAGES_PER_SHARD, add_image, check_classes, new_shard, write_classes
from engine.data.sources import ImageSet, check_bad

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
DRAFT = 2  # a JPEG is decoded at least so many times as large as it is wanted, where that is less than all of it


@dataclass(frozen=True)
class How:
    """How images are packed.

    Attributes:
        short: pixels; an image whose short side is longer is resized to that and stored as a JPEG, others keep their bytes. 0
            keeps all bytes.
        quality: of these JPEGs, up to 100.
        images_per_shard: at most.
    """

    short: int = 0
    quality: int = 95
    images_per_shard: int = IMAGES_PER_SHARD


@dataclass(frozen=True)
class Shard:
    """One to be written: its name below the folder, its split, the number of its first image, and its images by id, int64 [n]."""

    name: str
    split: str
    first: int
    ids: np.ndarray


class Packing:
    """Images on their way into a folder.

    Args:
        splits: the sets, by split; unreadable images are left out, with the verdict of screening.
        folder: where shards go; empty, or begun by the same packing.

    Raises:
        BadInput: the folder holds something else, or other images, or the same in another way; class names with line breaks.
    """

    def __init__(self, splits: Mapping[str, ImageSet], folder: Path, how: How):
        self.splits, self.folder, self.how = splits, folder, how
        check_classes(splits["train"].classes or (), splits["train"].root)
        wanted = {"how": asdict(how), "sets": {split: _described(images) for split, images in splits.items()}}
        found = manifest.load(folder)
        if found is None:
            if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
                raise BadInput(f"{folder} holds something else already: give a folder that is new or empty")
            left_out = {split: [list(entry) for entry in images.bad] for split, images in splits.items()}
            found = wanted | {"complete": False, "shards": {}, "left_out": left_out}
        elif different := next((key for key in wanted if found.get(key) != wanted[key]), None):
            what = "in another way" if different == "how" else "from other images"
            raise BadInput(f"{folder} was begun {what}: give another folder, or remove it")
        self._content = found
        self.shards = [shard for split in splits for shard in self._planned(split)]

    @property
    def left(self) -> list[Shard]:
        """Shards that are not there yet."""
        return [shard for shard in self.shards if not self._is_there(shard)]

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """(path, reason) of the images that are not packed."""
        return [tuple(entry) for entries in self._content["left_out"].values() for entry in entries]

    def run(self, threads: int | None, watch: Callable[[int], object]) -> None:
        """Writes what is left, shard by shard; threads read and resize ahead. `watch` is told of every image.

        Raises:
            BadInput: the folder cannot be written, or too many images turn out unreadable.
        """
        left = self.left
        if not left and self._content["complete"]:
            return
        wanted = ((shard.split, index) for shard in left for index in shard.ids.tolist())
        made = loaded(self._packed, wanted, threads)
        try:
            self._begin()
            for shard in left:
                left_out: list[tuple[str, str]] = []
                write_file(self.folder / shard.name, partial(self._fill, shard, made, left_out, watch))
                self._note(shard, left_out)
            manifest.save(self.folder, self._content | {"complete": True})
        except OSError as error:
            raise BadInput(
                f"{self.folder} cannot be written ({error.strerror}): make room, and give the command again"
            ) from error
        finally:
            made.close()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._content["complete"] = False
        manifest.save(self.folder, self._content)
        if classes := self.splits["train"].classes:
            write_classes(self.folder, classes)

    def _planned(self, split: str) -> list[Shard]:
        ids, each = np.flatnonzero(self.splits[split].good), self.how.images_per_shard
        return [
            Shard(f"{split}/{number:05d}.tar", split, start, ids[start : start + each])
            for number, start in enumerate(range(0, len(ids), each))
        ]

    def _is_there(self, shard: Shard) -> bool:
        try:
            return os.stat(self.folder / shard.name).st_size == self._content["shards"].get(shard.name)
        except OSError:
            return False

    def _packed(self, image: tuple[str, int]) -> tuple[str, bytes] | str:
        """Of a split's image, what `packed` makes of it; or the reason why it is left out."""
        split, index = image
        try:
            return packed(self.splits[split].read(index).tobytes(), self.how)
        except Exception as error:  # decoders raise anything on hostile bytes; whatever it is, the image is bad
            return f"unreadable: {getattr(error, 'strerror', None) or error or type(error).__name__}"[:200]

    def _fill(
        self,
        shard: Shard,
        made: Iterator[tuple[str, bytes] | str],
        left_out: list[tuple[str, str]],
        watch: Callable[[int], object],
        path: Path,
    ) -> None:
        images = self.splits[shard.split]
        with new_shard(path) as tar:
            for number, index in enumerate(shard.ids.tolist(), shard.first):
                found = next(made)
                watch(1)
                if isinstance(found, str):
                    left_out.append((images.paths[index], found))
                    continue
                label = None if images.labels is None else int(images.labels[index])
                add_image(tar, number, images.paths[index], label, *found)

    def _note(self, shard: Shard, left_out: list[tuple[str, str]]) -> None:
        """Notes a shard that is there. Raises BadInput where too much had to be left out."""
        known = self._content["left_out"][shard.split]
        known += [list(entry) for entry in left_out if list(entry) not in known]
        self._content["shards"][shard.name] = (self.folder / shard.name).stat().st_size
        manifest.save(self.folder, self._content)
        images = self.splits[shard.split]
        check_bad(tuple(map(tuple, known)), len(images), images.bad_limit, self.folder / manifest.NAME)


def packed(content: bytes, how: How) -> tuple[str, bytes]:
    """An encoded image as it is packed, with the suffix for it. Resized images are RGB; their orientation stays as stored, as the
    loaders ignore what EXIF says of it. Raises whatever decoders raise.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        suffix, short = SUFFIXES[image.format], min(image.size)
        if not 0 < how.short < short:
            return suffix, content
        size = tuple(max(how.short, round(side * how.short / short)) for side in image.size)
        image.draft("RGB", tuple(DRAFT * side for side in size))
        resized = as_rgb(image).resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    resized.save(stream, "JPEG", quality=how.quality)
    return "jpg", stream.getvalue()


def _described(images: ImageSet) -> dict[str, object]:
    """What must be equal for a packing to go on: which images these are, and what screening found them to be."""
    identity = Identity.of(images)
    digest = hashlib.blake2b(np.ascontiguousarray(images.sizes), digest_size=16)
    digest.update("\0".join(images.classes or ()).encode("utf-8", "surrogateescape"))
    return {"images": len(images), "names": identity.names, "sizes_and_classes": digest.hexdigest()}
