"""Data sets that are in wide use, read as they are published: NAME:DIR is the set NAME that lies in the folder DIR.

cifar10, cifar100   cifar-10-batches-py/ or cifar-100-python/, the binary version, or the .tar.gz of either; DIR may also be that
                    folder itself. Of CIFAR-100 the 100 fine classes.
svhn                train_32x32.mat and test_32x32.mat, the cropped digits; the extra images are left out
flowers102          jpg/, imagelabels.mat and setid.mat; train is trnid, val is tstid
tiny-imagenet       wnids.txt, train/ and val/ with val_annotations.txt
imagenet100         train/WNID and val/WNID (or train.X1 to train.X4 and val.X) with the classes in imagenet100.txt or Labels.json
imagenet            ILSVRC2012_img_train.tar; for val ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz, or with
                    imagenet_2012_validation_synset_labels.txt, a WNID a line. Unpacked, it is a folder like any other
parquet             any set of images in parquet files, as Hugging Face publishes them: train-00000-of-00012.parquet, ...

What is published as the test split, or where its labels are not public as the validation split, is our "val". Images that lie
inside arrays or parquet files are written once into the user's cache, as PNG files (`engine.data.sets.arrays`) or in tar shards
(`engine.data.sets.parquet`); those that are files (`engine.data.sets.image_lists`) or lie in tars (`engine.data.sets.imagenet`)
are read where they are. The published archives themselves were not available where this was written: it was run on small sets in
their formats.
"""

from collections.abc import Callable
from pathlib import Path

from engine.core.errors import BadInput
from engine.data import listing
from engine.data.listing import Listing
from engine.data.sets import arrays, image_lists, imagenet, parquet

NAMES = ("cifar10", "cifar100", "svhn", "flowers102", "tiny-imagenet", "imagenet100", "imagenet", "parquet")
_IN_ARRAYS: dict[str, Callable[[Path], Path]] = {
    "cifar10": arrays.cifar10, "cifar100": arrays.cifar100, "svhn": arrays.svhn,
}  # fmt: skip
_IN_FILES: dict[str, Callable[[Path, str], Listing]] = {
    "flowers102": image_lists.flowers102, "tiny-imagenet": image_lists.tiny_imagenet, "imagenet100": image_lists.imagenet100,
    "imagenet": imagenet.imagenet, "parquet": parquet.parquet,
}  # fmt: skip


def named(source: str | Path | None) -> tuple[str, Path] | None:
    """The set's name and its folder, if the source has the form NAME:DIR; else None. Looks at no file.

    Raises:
        BadInput: DIR is missing.
    """
    name, colon, folder = str(source or "").partition(":")
    if not colon or name not in NAMES:
        return None
    if not folder:
        raise BadInput(f"{source} names no folder: give {name}:DIR, where DIR is the folder that holds the set")
    return name, Path(folder).expanduser()


def has_split(name: str, folder: Path, split: str) -> bool:
    """Whether the set has this split: it has, but for a val of ImageNet or in parquet files that is not there.

    Raises:
        BadInput: there is no such folder.
    """
    if not folder.is_dir():
        raise BadInput(f"{name}:{folder} names no folder: give {name}:DIR, where DIR is the folder that holds the set")
    if split == "train":
        return True
    return (
        parquet.has_split(folder, split)
        if name == "parquet"
        else name != "imagenet" or (folder / imagenet.VAL).exists()
    )


def list_split(name: str, folder: Path, split: str) -> Listing:
    """The files and classes of a split, "train" or "val". Images that lie inside arrays are written into the cache before.

    Raises:
        BadInput: a file is missing, damaged or does not agree with another one; or the cache cannot be written.
    """
    if not has_split(name, folder, split) and name == "imagenet":
        raise BadInput(f"{folder} has no {imagenet.VAL}, which holds ImageNet's {split} split")
    if name in _IN_ARRAYS:
        return listing.of_folder(_IN_ARRAYS[name](folder.resolve()), split)
    return _IN_FILES[name](folder.resolve(), split)
