"""Published sets of image files whose classes or splits stand in a list beside them; the files are read where they are.

Flowers-102: Nilsback and Zisserman, ICVGIP 2008. Tiny-ImageNet-200: Stanford CS231n. ImageNet-100: Tian et al., arXiv 1906.05849,
and others; which 100 classes are meant differs, so a list has to lie with the images.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from engine.core.errors import BadInput
from engine.core.json_text import parsed
from engine.data.listing import File, Listing, class_names, in_class, walk
from engine.data.sets import matlab

FLOWERS, TINY, HUNDRED = 102, 200, 100  # classes
WNID = re.compile(r"n\d{8}")
LISTS = ("imagenet100.txt", "Labels.json")
PLACES = {"train": ("train", ("train.X1", "train.X2", "train.X3", "train.X4")), "val": ("val", ("val.X",))}


def flowers102(folder: Path, split: str) -> Listing:
    """Flowers-102 from jpg/, imagelabels.mat and setid.mat. The classes are "1" to "102", as published.

    The splits are those of the published protocol: trnid (10 images per class) trains, tstid is held out; valid is in neither.
    """
    root = _within(folder, "flowers-102", "imagelabels.mat")
    (labels,) = matlab.read(root / "imagelabels.mat", "labels")
    labels = matlab.whole(root / "imagelabels.mat", "labels", labels, 1, FLOWERS)
    ids = dict(zip(("trnid", "tstid"), matlab.read(root / "setid.mat", "trnid", "tstid")))
    ids = {name: matlab.whole(root / "setid.mat", name, values, 1, len(labels)) for name, values in ids.items()}
    taken = np.concatenate(list(ids.values()))
    if len(np.unique(taken)) < len(taken):
        raise BadInput(f"{root / 'setid.mat'} has an image twice in 'trnid' and 'tstid'")
    if len(missing := np.setdiff1d(np.arange(1, FLOWERS + 1), labels[ids["trnid"] - 1])):
        raise BadInput(
            f"{root} has no training image of class {missing[0]}: setid.mat and imagelabels.mat do not agree"
        )
    found = _files(root, "jpg")
    wanted = [f"jpg/image_{number:05d}.jpg" for number in range(1, len(labels) + 1)]
    _check_present(root, "imagelabels.mat", wanted, found)
    if len(found) > len(wanted):
        raise BadInput(f"{root / 'jpg'} has {len(found)} images and imagelabels.mat {len(labels)} labels")
    chosen = ids["trnid" if split == "train" else "tstid"] - 1
    classes = tuple(str(number) for number in range(1, FLOWERS + 1))
    return Listing.of(root, [found[wanted[index]] for index in chosen], labels[chosen] - 1, classes)


def tiny_imagenet(folder: Path, split: str) -> Listing:
    """Tiny-ImageNet from wnids.txt, train/WNID/images/ and val/images/ with val/val_annotations.txt; the unlabelled test is left
    out.
    """
    root = _within(folder, "tiny-imagenet-200", "wnids.txt")
    classes = _wnids(root / "wnids.txt", (line.strip() for line in _lines(root / "wnids.txt")), TINY)
    if split == "train":
        if unknown := sorted(set(class_names(root, "train")) - set(classes)):
            raise BadInput(f"{root / 'train'} has the class {unknown[0]!r} that wnids.txt has not")
        return Listing.of_classes(root, [(name, in_class(root, f"train/{name}/images")) for name in classes], classes)
    notes, labels = root / "val" / "val_annotations.txt", {}
    for number, line in enumerate(_lines(notes), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in classes:
            raise BadInput(f"{notes} has the class {wnid!r} in line {number}, which wnids.txt has not")
        if labels.setdefault(f"val/images/{name}", wnid) != wnid:
            raise BadInput(f"{notes} has a second class for {name!r} in line {number}")
    found = _files(root, "val/images")
    _check_present(root, "val/val_annotations.txt", labels, found)
    if unknown := sorted(found.keys() - labels.keys()):
        raise BadInput(f"{root / unknown[0]} is not in {notes.name}: {len(found)} images, {len(labels)} labels")
    return Listing.of_classes(root, [(labels[path], [file]) for path, file in found.items()], classes)


def imagenet100(folder: Path, split: str) -> Listing:
    """100 classes of an ImageNet folder: imagenet100.txt (a WNID at the start of each line) or Labels.json (an object with the
    WNIDs as keys) says which. The images are in train/WNID and val/WNID, other classes there are passed over; or, as they lie
    on Kaggle, in train.X1 to train.X4 and val.X.
    """
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if not lists:
        raise BadInput(f"{folder} has no list of the 100 classes: it needs {' or '.join(LISTS)}")
    if lists[0].suffix == ".json":
        try:
            named = parsed("\n".join(_lines(lists[0])))
        except ValueError as error:
            raise BadInput(f"{lists[0]} is no JSON that can be read") from error
        if not isinstance(named, dict):
            raise BadInput(f"{lists[0]} is no JSON object with the class folders as keys")
        classes = _wnids(lists[0], named, HUNDRED)
    else:
        classes = _wnids(lists[0], (line.split()[0] for line in _lines(lists[0])), HUNDRED)
    one, parts = PLACES[split]
    places = (one,) if (folder / one).is_dir() else parts
    members: list[tuple[str, list[File]]] = []
    for name in classes:
        there = [f"{place}/{name}" for place in places if (folder / place / name).is_dir()]
        if not there:
            raise BadInput(
                f"{lists[0]} lists {name}, which is missing in {folder}: looked in {', '.join(dict.fromkeys((one, *parts)))}"
            )
        members.append((name, [file for place in there for file in in_class(folder, place)]))
    return Listing.of_classes(folder, members, classes)


def _within(folder: Path, below: str, file: str) -> Path:
    """The folder or the one in it of the published name, whichever has the file."""
    for root in (folder, folder / below):
        if (root / file).is_file():
            return root
    raise BadInput(f"{folder / file} is missing, and so is {below}/{file} there")


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text file") from error


def _wnids(path: Path, names: Iterable[str], count: int) -> tuple[str, ...]:
    """Sorted, as an image folder's classes are."""
    listed = tuple(names)
    if odd := [name for name in listed if not WNID.fullmatch(name)]:
        raise BadInput(f"{path} holds {odd[0][:40]!r}, where a WNID such as n01440764 belongs")
    if len(listed) != count or len(set(listed)) != count:
        raise BadInput(
            f"{path} lists {len(set(listed))} different classes in {len(listed)} entries; it must be {count}"
        )
    return tuple(sorted(listed))


def _files(root: Path, folder: str) -> dict[str, File]:
    return {file.path: file for file in walk(root, folder)}


def _check_present(root: Path, list_: str, wanted: Iterable[str], found: dict[str, File]) -> None:
    for path in wanted:
        if path not in found:
            raise BadInput(f"{root / path} is missing, which {list_} has a label for")
