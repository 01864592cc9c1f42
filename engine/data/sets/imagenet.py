"""ImageNet (ILSVRC 2012, Russakovsky et al., IJCV 2015) from its archives as they are downloaded, which are read where they lie.

ILSVRC2012_img_train.tar holds a tar for each class, WNID.tar; ILSVRC2012_img_val.tar holds the images of all classes, and the
devkit says their classes: line N of its list is the number of the class of image N, and its meta.mat has the WNID of each number.
Ids and paths are those of the unpacked folder: train/WNID/NAME and val/WNID/NAME, classes by WNID, images by name.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.core.errors import BadInput
from engine.data import screen
from engine.data.listing import Listing
from engine.data.names import Names
from engine.data.sets import gzipped, matlab
from engine.data.shards.index import NONE, Index, Part, kept, opened, shown
from engine.data.shards.tar import Archive, Member

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
PLAIN = "imagenet_2012_validation_synset_labels.txt"
TRUTH, META = (f"ILSVRC2012_devkit_t12/data/{name}" for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
CLASS = re.compile(r"(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
WNID = re.compile(r"n\d{8}")
LIMITS = gzipped.Limits("ImageNet", 1 << 24, 1 << 28)
THREADS = 16


def imagenet(folder: Path, split: str) -> Listing:
    """Lists a split; val needs the training archive, too, which has the classes.

    Raises:
        BadInput: an archive is missing, torn, or holds something else; the lists of classes do not agree with the images.
    """
    train = kept([folder / TRAIN], "imagenet train", lambda stamps: _train(folder / TRAIN, stamps[0].tolist()))
    classes = tuple(train.words)
    if split == "train":
        return _listing(folder, train, train.paths, train.codes, classes)
    val = kept([folder / VAL], "imagenet val", lambda stamps: _val(folder / VAL, stamps[0].tolist()))
    wnids = _val_classes(folder)
    if len(wnids) != len(val.paths):
        raise BadInput(
            f"{folder / VAL} has {len(val.paths):,} images, and the list of their classes has {len(wnids):,}"
        )
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    if unknown := sorted(set(wnids) - label_of.keys()):
        raise BadInput(f"the list of classes in {folder} has {unknown[0]}, which {TRAIN} has not")
    labels = np.array([label_of[wnid] for wnid in wnids], np.int64)
    order = np.argsort(labels, kind="stable")  # as an unpacked folder is listed
    paths = Names.of(f"val/{wnids[row]}/{val.paths[row]}" for row in order)
    return _listing(folder, val, paths, labels, classes, order)


def _listing(
    folder: Path,
    index: Index,
    paths: Names,
    labels: np.ndarray,
    classes: tuple[str, ...],
    order: np.ndarray | slice = slice(None),
) -> Listing:
    ranges = index.ranges.take(order)
    return Listing(folder, paths, ranges.size, ranges.stamps[ranges.file, 1], labels[order], classes, ranges)


def _train(path: Path, stamp: Sequence[int]) -> Iterator[tuple[int, Part]]:
    def images(member: Member) -> Part:
        wnid = member.name.removesuffix(".tar")
        archive = Archive(file, f"{path}:{member.name}", member.start, member.start + member.size)
        found = sorted(each for each in archive.members() if each.name.lower().endswith(screen.SUFFIXES))
        if not found:
            raise BadInput(f"{path}:{member.name} holds no images")
        return _part(found, f"train/{wnid}/", wnid)

    with opened(path, stamp) as file, ThreadPoolExecutor(THREADS) as pool:
        within = sorted(Archive(file, str(path)).members())
        if not within:
            raise BadInput(f"{path} holds no archives of classes")
        if wrong := [member for member in within if not CLASS.fullmatch(member.name)]:
            raise BadInput(f"{path} holds {wrong[0].name!r}, where an archive of a class such as n01440764.tar belongs")
        yield from ((0, part) for part in shown(pool.map(images, within), len(within)))


def _val(path: Path, stamp: Sequence[int]) -> Iterator[tuple[int, Part]]:
    """In the order of their numbers, which are 1, 2, ..."""
    with opened(path, stamp) as file:
        found = sorted(Archive(file, str(path)).members())
    for number, member in enumerate(found, 1):
        matched = VAL_IMAGE.fullmatch(member.name)
        if not matched or int(matched[1]) != number:
            raise BadInput(f"{path} holds {member.name!r}, where ILSVRC2012_val_{number:08d}.JPEG belongs")
    yield 0, _part(found)


def _part(members: Sequence[Member], below: str = "", word: str | None = None) -> Part:
    places = np.array([(member.start, member.size) for member in members], np.int64).reshape(-1, 2)
    codes = np.full(len(members), NONE if word is None else 0, np.int64)
    return Part(Names.of(below + member.name for member in members), places, codes, () if word is None else (word,))


def _val_classes(folder: Path) -> list[str]:
    """The WNID of each image, in the order of their numbers."""
    plain, devkit = folder / PLAIN, folder / DEVKIT
    if plain.is_file():
        wnids = _text(plain, plain.read_bytes())
        if wrong := [wnid for wnid in wnids if not WNID.fullmatch(wnid)]:
            raise BadInput(f"{plain} holds {wrong[0][:40]!r}, where a WNID such as n01440764 belongs")
        return wnids
    if not devkit.is_file():
        raise BadInput(f"{folder} has neither {DEVKIT} nor {PLAIN}, which say the classes of {VAL}")
    contents = gzipped.read(devkit, {name: name for name in (TRUTH, META)}, LIMITS)
    where = Path(f"{devkit}:{META}")
    wnid_of: dict[str, str] = {}
    for number, wnid in matlab.read_records(where, contents[META], "synsets", "ILSVRC2012_ID", "WNID"):
        if type(number) is not int or not isinstance(wnid, str) or not WNID.fullmatch(wnid) or str(number) in wnid_of:
            raise BadInput(f"{where} has the class {str(number)[:20]} twice, or without a WNID")
        wnid_of[str(number)] = wnid
    numbers = _text(Path(f"{devkit}:{TRUTH}"), contents[TRUTH])
    if wrong := [number for number in numbers if number not in wnid_of]:
        raise BadInput(f"{devkit}:{TRUTH} has the class {wrong[0][:40]!r}, which {META} has not")
    return [wnid_of[number] for number in numbers]


def _text(path: Path, content: bytes) -> list[str]:
    try:
        return content.decode("ascii").split()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text file") from error
