"""Small data sets in the formats of the published ones."""

import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.data.corpus import picture, tar_bytes

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"thing_{index:02d}" for index in range(100))
WNIDS = tuple(f"n{1_000_000 + 7919 * index:08d}" for index in range(200))

Split = tuple[np.ndarray, np.ndarray]  # uint8 [n, 32, 32, 3], int64 [n]

ANY_COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)


def python2(value: object) -> bytes:
    """Protocol 2 as Python 2 writes it: its strings have no encoding."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: object) -> bytes:
    match value:
        case dict():
            return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(_python2, value)) + b"e"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes():
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
        case np.ndarray():
            kind = b"cnumpy\ndtype\n" + b"U\x02" + value.dtype.str[1:].encode() + b"K\x00K\x01\x87R(K\x03U\x01|NNN"
            kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            shape = b"(" + b"".join(map(_python2, value.shape)) + b"t"
            made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            return made + b"(K\x01" + shape + kind + b"\x89" + _python2(value.tobytes()) + b"tb"
    raise TypeError(value)


def random_split(classes: int, count: int, seed: int) -> Split:
    """Noise, with every class in it."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 32, 32, 3), np.uint8), generator.permutation(np.arange(count) % classes)


def rows(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 3072], a row per image: all its red, green and blue values."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def cifar_files(classes: int, train: Split, test: Split, binary: bool = False) -> dict[str, bytes]:
    """The files of CIFAR-10 or CIFAR-100 by name, for Python or binary."""
    parts = 5 if classes == 10 else 1
    splits = [(images, labels) for images, labels in zip(np.split(train[0], parts), np.split(train[1], parts))]
    if classes == 10:
        names = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
    else:
        names = ["train", "test"]
    contents = zip(names, [*splits, test])
    if binary:
        fill = 0 if classes == 10 else 1
        files = {
            f"{name}.bin": np.hstack(
                [np.full((len(labels), fill), 7, np.uint8), labels[:, None].astype(np.uint8), rows(images)]
            )
            for name, (images, labels) in contents
        }
        listed = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        words = CIFAR10 if classes == 10 else CIFAR100
        return {name: file.tobytes() for name, file in files.items()} | {listed: ("\n".join(words) + "\n\n").encode()}
    files = {}
    for name, (images, labels) in contents:
        extra = {b"labels": labels.tolist()} if classes == 10 else {
            b"coarse_labels": [0] * len(labels), b"fine_labels": labels.tolist(),
        }  # fmt: skip
        about = {b"batch_label": name.encode(), b"filenames": [b"x.png"] * len(labels)}
        files[name] = python2(about | {b"data": rows(images)} | extra)
    if classes == 10:
        meta = {
            b"num_cases_per_batch": len(test[0]),
            b"label_names": [name.encode() for name in CIFAR10],
            b"num_vis": 3072,
        }
        return files | {"batches.meta": python2(meta)}
    meta = {b"fine_label_names": [name.encode() for name in CIFAR100], b"coarse_label_names": [b"all"]}
    return files | {"meta": python2(meta)}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_svhn(folder: Path, train: Split, test: Split) -> Path:
    for name, (images, labels) in (("train", train), ("test", test)):
        arrays = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]}
        savemat(folder / f"{name}_32x32.mat", arrays, do_compression=True)
    return folder


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    picture(24, 20, seed).save(file, "jpeg")
    return file.getvalue()


def write_flowers(folder: Path) -> dict[str, dict[str, int]]:
    """102 classes with an image each in trnid, valid and tstid. Returns {split: {path: label from 0}}."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(1, 103), 3))
    write_files(folder / "jpg", {f"image_{index + 1:05d}.jpg": jpeg(index % 5) for index in range(len(labels))})
    by_class = np.stack([generator.permutation(np.flatnonzero(labels == label)) + 1 for label in range(1, 103)])
    ids = dict(zip(("trnid", "valid", "tstid"), by_class.T))
    savemat(folder / "imagelabels.mat", {"labels": labels.astype(np.uint8)[None]})
    savemat(folder / "setid.mat", {name: values.astype(np.uint16)[None] for name, values in ids.items()})
    parts = {"train": ids["trnid"], "val": ids["tstid"]}
    return {part: {f"jpg/image_{n:05d}.jpg": int(labels[n - 1]) - 1 for n in values} for part, values in parts.items()}


def write_tiny_imagenet(folder: Path) -> dict[str, dict[str, int]]:
    """200 classes with an image each. Returns {split: {path: label}}."""
    write_files(folder, {"wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS[::-1]).encode()})
    for index, wnid in enumerate(WNIDS):
        write_files(folder / f"train/{wnid}/images", {f"{wnid}_0.JPEG": jpeg(index % 5)})
    order = np.random.default_rng(1).permutation(200).tolist()
    write_files(folder / "val/images", {f"val_{number}.JPEG": jpeg(number % 5) for number in range(200)})
    notes = "".join(f"val_{number}.JPEG\t{WNIDS[label]}\t0\t0\t9\t9\n" for number, label in enumerate(order))
    write_files(folder / "val", {"val_annotations.txt": notes.encode()})
    return {
        "train": {f"train/{wnid}/images/{wnid}_0.JPEG": label for label, wnid in enumerate(WNIDS)},
        "val": {f"val/images/val_{number}.JPEG": label for number, label in enumerate(order)},
    }


def write_imagenet100(folder: Path, kaggle: bool) -> dict[str, dict[str, int]]:
    """100 classes with an image each: in four folders as on Kaggle, or beside 100 others. Returns {split: {path: label}}."""
    chosen, expected = WNIDS[1::2], {}
    for split in ("train", "val"):
        expected[split] = {}
        for index, wnid in enumerate(chosen if kaggle else WNIDS):
            place = split if not kaggle else f"train.X{1 + index % 4}" if split == "train" else "val.X"
            write_files(folder / place / wnid, {"0.JPEG": jpeg(index % 5)})
            if wnid in chosen:
                expected[split][f"{place}/{wnid}/0.JPEG"] = chosen.index(wnid)
    listed = (
        json.dumps({wnid: "a thing" for wnid in chosen}) if kaggle else "".join(f"{w} a thing\n" for w in chosen[::-1])
    )
    write_files(folder, {"Labels.json" if kaggle else "imagenet100.txt": listed.encode()})
    return expected


def write_imagenet(folder: Path, plain: bool, classes: int = 5, each: int = 3) -> dict[str, dict[str, int]]:
    """ImageNet's archives with a few images: a tar of tars, a tar, and the classes in a devkit or a plain list. Numbers of
    classes do not follow the WNIDs. Returns {split: {path: label}}, in the order of an unpacked folder."""
    wnids, generator = WNIDS[:classes], np.random.default_rng(0)
    numbers = generator.permutation(classes) + 1
    inner = {
        wnid: {f"{wnid}_{index}.JPEG": jpeg(label * each + index) for index in generator.permutation(each).tolist()}
        for label, wnid in enumerate(wnids)
    }
    order = generator.permutation(np.arange(classes * 2) % classes)
    tars = {f"{wnid}.tar": tar_bytes(inner[wnid], tarfile.GNU_FORMAT) for wnid in (*wnids[2:], *wnids[:2])}
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in generator.permutation(len(order) + 1).tolist() if n}
    write_files(folder, {"ILSVRC2012_img_train.tar": tar_bytes(tars), "ILSVRC2012_img_val.tar": tar_bytes(val)})
    if plain:
        listed = "".join(f"{wnids[label]}\n" for label in order)
        write_files(folder, {"imagenet_2012_validation_synset_labels.txt": listed.encode()})
    else:
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
        rows = [(int(number), wnid, "a thing, or two", 0) for number, wnid in zip(numbers, wnids)]
        meta = io.BytesIO()
        savemat(
            meta,
            {"synsets": np.array([*rows, (classes + 1, "n09999999", "above", 2)], kinds)[:, None]},
            do_compression=True,
        )
        truth = "".join(f"{numbers[label]}\n" for label in order).encode()
        data = {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": meta.getvalue(), "readme.txt": b"words"}
        devkit = {
            f"ILSVRC2012_devkit_t12/{'data/' * (name != 'readme.txt')}{name}": part for name, part in data.items()
        }
        write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", devkit)
    return {
        "train": {f"train/{wnid}/{name}": label for label, wnid in enumerate(wnids) for name in sorted(inner[wnid])},
        "val": {
            f"val/{wnid}/ILSVRC2012_val_{n + 1:08d}.JPEG": label
            for label, wnid in enumerate(wnids)
            for n in np.flatnonzero(order == label)
        },
    }


def write_masked(image: Path, mask: Path, values: np.ndarray, colours: np.ndarray, palette: bool = False) -> None:
    """A mask of values uint8 [H, W], grey or with a palette, and a photograph that has `colours` [256, 3] of them."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours[values]).save(image, quality=100, subsampling=0)
    indices = Image.fromarray(values)
    if palette:
        indices.putpalette(ANY_COLOURS.tobytes())
    indices.save(mask)


def write_ade20k(
    root: Path, train: Sequence[np.ndarray], val: Sequence[np.ndarray], colours: np.ndarray = ANY_COLOURS
) -> Path:
    """Masks of values 0 to 150 of each split, uint8 [H, W], with photographs, named as ADE20K's."""
    for part, short, masks in (("training", "train", train), ("validation", "val", val)):
        for number, values in enumerate(masks, 1):
            name = f"ADE_{short}_{number:08d}"
            places = root / f"images/{part}/{name}.jpg", root / f"annotations/{part}/{name}.png"
            write_masked(*places, values, colours)
    return root


def write_coco_stuff(
    root: Path,
    train: Sequence[np.ndarray],
    val: Sequence[np.ndarray],
    layout: tuple[str, str] = ("images/{}", "annotations/{}"),
    colours: np.ndarray = ANY_COLOURS,
) -> Path:
    """Maps of values 0 to 181 or 255 of each split, uint8 [H, W], with photographs: 0, 1, ... and 10, 11, ..."""
    for first, split, maps in ((0, "train2017", train), (10, "val2017", val)):
        images, stuff = (root / place.format(split) for place in layout)
        for number, values in enumerate(maps, first):
            write_masked(images / f"{number:012d}.jpg", stuff / f"{number:012d}.png", values, colours)
    return root


def write_davis(
    root: Path,
    videos: Mapping[str, Sequence[np.ndarray]],
    lists: Mapping[str, Sequence[str]],
    colours: np.ndarray = ANY_COLOURS,
) -> Path:
    """Ids of each frame of each video, uint8 [H, W], with frames, and the videos of each split."""
    for video, frames in videos.items():
        for index, ids in enumerate(frames):
            places = (root / kind / "480p" / video / f"{index:05d}" for kind in ("JPEGImages", "Annotations"))
            image, mask = (path.with_suffix(suffix) for path, suffix in zip(places, (".jpg", ".png")))
            write_masked(image, mask, ids, colours, palette=True)
    (root / "ImageSets/2017").mkdir(parents=True)
    for split, names in lists.items():
        (root / f"ImageSets/2017/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root
