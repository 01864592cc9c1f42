"""Videos with objects that are followed from the first frame on, in the layout of DAVIS-2017 at its resolution 480p.

Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, arXiv 1704.00675. JPEGImages/480p/VIDEO/NNNNN.jpg has
the frames, Annotations/480p/VIDEO/NNNNN.png an object id for every pixel of each (0 none, 255 not to be counted), and
ImageSets/2017/SPLIT.txt the videos. DAVIS itself was not available where this was written: it was run on small sets in its
layout.

Shapes: H x W pixels of a frame.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.annotated import regions
from engine.data.annotated.objects import VOID, readable
from engine.data.annotated.regions import Regions
from engine.data.annotated.voc import read_indices, read_lines
from engine.data.sources import ImageSet
from engine.data.subsets import subset

RESOLUTION, YEAR = "480p", "2017"
PLACES = (".", "DAVIS")
SPLITS = ("train", "val")
CATEGORY = "object"  # of all objects: DAVIS does not say what they are


@dataclass(frozen=True)
class Video:
    """One video.

    Attributes:
        name: its folder's.
        images: its frames, in order, all of one size; without those that cannot be read.
        objects: the highest id of the first frame's mask. Ids above it, objects that appear later, are not judged, as in the
            benchmark's toolkit.
    """

    name: str
    images: ImageSet
    objects: int

    def __len__(self) -> int:
        return len(self.images)

    def masks(self, index: int) -> np.ndarray:
        """uint8 [H, W] of frame `index`: 0, an object's id, or 255. Raises BadInput where there is none or a damaged one."""
        return _ids(self.images, index)


@dataclass(frozen=True)
class VideoSet:
    """Videos of a split.

    Attributes:
        images: the readable frames of all of them; `images.bad` says which were left out.
        videos: in the order of the split's list.
    """

    images: ImageSet
    videos: tuple[Video, ...]

    def __len__(self) -> int:
        return len(self.videos)


def open_videos(
    folder: str | Path,
    split: str = "val",
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> VideoSet:
    """Reads ImageSets/2017/SPLIT.txt with the frames and the masks of its videos.

    Args:
        folder: that has JPEGImages/480p/ in it, or in DAVIS/.
        split: train or val, or another file of ImageSets/2017/ without .txt.
        bad_limit, screening: as for `engine.data.sources.open_images`.

    Raises:
        BadInput: a list is missing, a video has no frames or frames of several sizes, a frame has no mask or a mask no frame, a
            mask has another size than its frame or no ids, the first one has no object, or too many frames are bad.
    """
    root, source, frames = _listed(folder, split)
    paths = [path for of_video in frames.values() for path in of_video]
    images, kept = readable(root, paths, split, source, bad_limit, screening)
    video_of = np.repeat(list(frames), [len(of_video) for of_video in frames.values()])[kept]
    return VideoSet(images, tuple(_video(name, images, np.flatnonzero(video_of == name)) for name in frames))


def open_frames(
    folder: str | Path,
    split: str = "val",
    bad_limit: float = sources.BAD_LIMIT,
    screening: Literal["auto", "header", "decode"] = "auto",
) -> Regions:
    """The first frame of every video as an image with its objects; arguments are those of `open_videos`.

    Raises:
        BadInput: as `open_videos`, but nothing is looked into beyond first frames and their masks.
    """
    root, source, frames = _listed(folder, split)
    images, _ = readable(root, [paths[0] for paths in frames.values()], split, source, bad_limit, screening)
    found = regions.of_ids(images, (CATEGORY,), partial(_ids, images), np.zeros(VOID + 1, np.int64))
    for index, objects in enumerate(found.objects):
        _check_any(images, index, len(objects))
    return found


def _listed(folder: str | Path, split: str) -> tuple[Path, Path, dict[str, list[str]]]:
    """The root, the split's list, and the paths of each video's frames, in order."""
    root = _root(folder)
    source = root / "ImageSets" / YEAR / f"{split}.txt"
    if not source.is_file():
        there = [name for name in SPLITS if source.with_name(f"{name}.txt").is_file()]
        raise BadInput(
            f"{source} is missing: {source.parent} has lists for {', '.join(there) or 'none of ' + ', '.join(SPLITS)}"
        )
    names = [" ".join(words) for words in read_lines(source)]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise BadInput(f"{source} lists {twice} twice")
    return root, source, {name: _frames(root, name, source) for name in names}


def _root(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    for place in PLACES:
        if all((folder / place / kind / RESOLUTION).is_dir() for kind in ("JPEGImages", "Annotations")):
            return (folder / place).resolve()
    raise BadInput(
        f"{folder} is not laid out as DAVIS-{YEAR}: it needs JPEGImages/{RESOLUTION}/, Annotations/{RESOLUTION}/ and "
        f"ImageSets/{YEAR}/, maybe in DAVIS/"
    )


def _frames(root: Path, name: str, source: Path) -> list[str]:
    """The paths of a video's frames below the root, in order."""
    images, masks = (
        {path.stem for path in (root / kind / RESOLUTION / name).glob(f"*{suffix}") if path.name[0] != "."}
        for kind, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".png"))
    )
    if not images:
        raise BadInput(f"{source} lists {name}, but {root / 'JPEGImages' / RESOLUTION / name} has no frames (*.jpg)")
    if alone := sorted(images ^ masks):
        missing = ("Annotations", ".png") if alone[0] in images else ("JPEGImages", ".jpg")
        where = root / missing[0] / RESOLUTION / name / f"{alone[0]}{missing[1]}"
        raise BadInput(f"{where} is missing: every frame of {name} needs a mask and every mask its frame")
    return [f"JPEGImages/{RESOLUTION}/{name}/{stem}.jpg" for stem in sorted(images)]


def _video(name: str, images: ImageSet, members: np.ndarray) -> Video:
    if not len(members):
        raise BadInput(f"no frame of {name} in {images.root} can be read ({images.bad[0][0]}: {images.bad[0][1]})")
    found = subset(images, members)
    if len(sizes := np.unique(found.sizes, axis=0)) > 1:
        one, other = (f"{width}x{height}" for width, height in sizes[:2])
        raise BadInput(f"{name} in {images.root} has frames of {one} and of {other} pixels; a video has one size")
    for index in range(len(found)):
        _ids(found, index, look_only=True)
    first = _ids(found, 0)
    objects = int(first[first != VOID].max(initial=0))
    _check_any(found, 0, objects)
    return Video(name, found, objects)


def _check_any(images: ImageSet, index: int, objects: int) -> None:
    if not objects:
        raise BadInput(f"{_mask_path(images, index)} has no object; the first frame's are numbered from 1")


def _mask_path(images: ImageSet, index: int) -> Path:
    path = Path(images.paths[index])
    return images.root / "Annotations" / path.relative_to("JPEGImages").with_suffix(".png")


def _ids(images: ImageSet, index: int, look_only: bool = False) -> np.ndarray:
    return read_indices(_mask_path(images, index), images.sizes[index].tolist(), VOID, "ids", look_only)
