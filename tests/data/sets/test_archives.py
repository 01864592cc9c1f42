"""Published sets: pixels and labels come back exactly from files in the published formats, and what is wrong is named."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from engine import eval as eval_command
from engine import train as train_command
from engine.core.errors import BadInput
from engine.data import cache, sources
from engine.data.pipeline import TrainLoader, eval_batches
from engine.data.sets import archives, arrays
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from tests.data import published
from tests.data.published import CIFAR10, CIFAR100, WNIDS, cifar_files, python2, random_split, write_files, write_tar

FOLDERS = {
    ("cifar10", False): ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ("cifar10", True): ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    ("cifar100", False): ("cifar-100-python", "cifar-100-python.tar.gz"),
    ("cifar100", True): ("cifar-100-binary", "cifar-100-binary.tar.gz"),
}
TEN = random_split(10, 20, seed=0), random_split(10, 4, seed=1)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images_of(images: sources.ImageSet) -> np.ndarray:
    return np.stack([np.asarray(Image.open(images.root / path)) for path in images.paths])


def check_equal(images: sources.ImageSet, expected: published.Split, classes: tuple[str, ...]) -> None:
    """The set's images by the number in their name, which is their place in the published split."""
    order = np.argsort([int(Path(path).stem) for path in images.paths])
    assert np.array_equal(images_of(images)[order], expected[0])
    assert images.labels[order].tolist() == expected[1].tolist()
    assert images.classes == classes
    assert all(Path(path).parent.name == classes[label] for path, label in zip(images.paths, images.labels))


@pytest.mark.parametrize("place", ["folder", "itself", "archive"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_back_exactly(name, binary, place, tmp_path, home):
    classes = CIFAR10 if name == "cifar10" else CIFAR100
    train, test = random_split(len(classes), 100, seed=0), random_split(len(classes), 20, seed=1)
    files = cifar_files(len(classes), train, test, binary)
    if name == "cifar10" and not binary:  # five batches of 20 and a test of 20
        assert pickle.loads(files["batches.meta"], encoding="bytes")[b"num_cases_per_batch"] == 20
    folder, archive = FOLDERS[name, binary]
    if place == "archive":
        write_tar(
            tmp_path / archive, {f"{folder}/{name}": data for name, data in ({"readme.html": b"hello"} | files).items()}
        )
    else:
        write_files(tmp_path / folder, files)
    source = f"{name}:{tmp_path / folder if place == 'itself' else tmp_path}"
    assert sources.has_split(source, "train") and sources.has_split(source, "val")
    check_equal(sources.open_images(source, "train"), train, classes)
    check_equal(sources.open_images(source, "val"), test, classes)


def test_pickles_of_python_3_are_read_too(tmp_path, home):
    files = cifar_files(10, *TEN)
    again = {name: pickle.dumps(pickle.loads(data, encoding="bytes"), protocol=2) for name, data in files.items()}
    write_files(tmp_path / "cifar-10-batches-py", again)
    check_equal(sources.open_images(f"cifar10:{tmp_path}", "train"), TEN[0], CIFAR10)


def test_svhn_comes_back_exactly_and_ten_is_zero(tmp_path, home):
    train, test = random_split(10, 30, seed=0), random_split(10, 7, seed=1)
    published.write_svhn(tmp_path, train, test)
    assert loadmat(tmp_path / "train_32x32.mat")["y"].max() == 10
    check_equal(sources.open_images(f"svhn:{tmp_path}", "train"), train, tuple("0123456789"))
    check_equal(sources.open_images(f"svhn:{tmp_path}", "val"), test, tuple("0123456789"))


def test_training_and_evaluation_read_the_same_pixels_and_labels(tmp_path, home):
    write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, *TEN))
    images = sources.open_images(f"cifar10:{tmp_path}", "train")
    whole = Augmentation((32, 32), scale=(1, 1), ratio=(1, 1), flip=0.0)
    batches = [
        next(TrainLoader(images, (whole,), 20, seed=3, threads=1)),
        *eval_batches(images, (32, 32), 20, threads=1),
    ]
    for batch in batches:
        pixels = batch.images[0].permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN
        places = [int(Path(images.paths[index]).stem) for index in batch.ids]
        assert sorted(places) == list(range(20))
        assert np.array_equal(np.round(pixels * 255), TEN[0][0][places])
        assert batch.labels.tolist() == TEN[0][1][places].tolist()


def test_arrays_are_written_once_until_their_files_change(tmp_path, home, monkeypatch, capsys):
    folder = write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, *TEN))
    written, write = [], arrays._write
    monkeypatch.setattr(arrays, "_write", lambda *given: written.append(given) or write(*given))
    first = sources.open_images(f"cifar10:{tmp_path}", "train")
    assert "cifar10: writing 24 images into" in capsys.readouterr().err
    assert first.root.parent == home
    assert sources.open_images(f"cifar10:{folder}", "val").root == first.root
    assert len(written) == 1
    (first.root / first.paths[0]).unlink()
    assert len(sources.open_images(f"cifar10:{tmp_path}", "train")) == 20
    assert len(written) == 2
    os.utime(folder / "test_batch", ns=(0, 1))
    assert sources.open_images(f"cifar10:{tmp_path}", "train").root != first.root
    assert len(written) == 3


def test_a_write_that_was_killed_leaves_nothing_for_long(tmp_path, home, monkeypatch):
    write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, *TEN))
    monkeypatch.setattr(
        Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(BadInput, match=r"cannot be written \(No space left on device\): set TESSERA_CACHE"):
        sources.open_images(f"cifar10:{tmp_path}", "train")
    (lock,) = home.iterdir()
    assert lock.suffix == ".lock"
    left = home / f".{lock.stem}-killed"
    left.mkdir()
    monkeypatch.undo()
    monkeypatch.setenv("TESSERA_CACHE", str(home))
    assert len(sources.open_images(f"cifar10:{tmp_path}", "train")) == 20
    assert not left.exists()


def check_listed(images: sources.ImageSet, root: Path, expected: dict[str, int], classes: tuple[str, ...]) -> None:
    assert images.root == root
    assert dict(zip(images.paths, images.labels.tolist())) == expected
    assert len(images.paths) == len(expected)
    assert images.classes == classes
    assert (images.sizes == (24, 20)).all()


@pytest.mark.parametrize("below", ["", "flowers-102"])
def test_flowers_are_trnid_and_tstid(below, tmp_path, home):
    expected = published.write_flowers(tmp_path / below)
    for split in ("train", "val"):
        images = sources.open_images(f"flowers102:{tmp_path}", split)
        check_listed(images, tmp_path / below, expected[split], tuple(map(str, range(1, 103))))
    assert not list(home.glob("flowers*"))


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_takes_classes_from_its_annotations(below, tmp_path, home):
    expected = published.write_tiny_imagenet(tmp_path / below)
    listed = tmp_path / below / "wnids.txt"
    listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes())  # as editors on Windows begin a text file
    for split in ("train", "val"):
        images = sources.open_images(f"tiny-imagenet:{tmp_path}", split)
        check_listed(images, tmp_path / below, expected[split], WNIDS)


@pytest.mark.parametrize("kaggle", [False, True])
def test_imagenet100_takes_the_listed_classes(kaggle, tmp_path, home):
    expected = published.write_imagenet100(tmp_path, kaggle)
    for split in ("train", "val"):
        check_listed(sources.open_images(f"imagenet100:{tmp_path}", split), tmp_path, expected[split], WNIDS[1::2])


def test_a_damaged_image_of_a_list_is_replaced_as_in_any_folder(tmp_path, home):
    published.write_flowers(tmp_path)
    path = sources.open_images(f"flowers102:{tmp_path}", "train").paths[3]
    (tmp_path / path).write_bytes(b"")
    images = sources.open_images(f"flowers102:{tmp_path}", "train", bad_limit=0.01)
    assert images.bad == ((path, "empty file"),)
    assert images.substitute[3] == 4


# What goes wrong: (how it is spoilt, what the sentence says) for each set.
Spoil = tuple[Callable[[Path], object], str]


def rewrite(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Changes what a pickle of CIFAR-10 holds."""

    def spoil(root: Path) -> None:
        path = root / "cifar-10-batches-py" / name
        value = pickle.loads(path.read_bytes(), encoding="bytes")
        change(value)
        path.write_bytes(python2(value))

    return spoil


def cut(name: str, share: float = 0.5) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(
        (root / name).read_bytes()[: int(share * (root / name).stat().st_size)]
    )


def mat(name: str, **arrays: np.ndarray) -> Callable[[Path], object]:
    return lambda root: savemat(
        root / name, {key: value for key, value in (loadmat(root / name) | arrays).items() if key[0] != "_"}
    )


def text(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(change((root / name).read_text()))


CIFAR: list[Spoil] = [
    (lambda root: os.rename(root / "cifar-10-batches-py", root / "cifar"), "holds no cifar10: it needs one of cifar-10"),
    (lambda root: (root / "cifar-10-batches-py/data_batch_4").unlink(), "data_batch_4 is missing: cifar10 needs batches.meta"),
    (lambda root: (root / "cifar-10-batches-py/batches.meta").unlink(), "batches.meta is missing"),
    (cut("cifar-10-batches-py/data_batch_2"), "data_batch_2 is no pickle that can be read"),
    (rewrite("data_batch_1", lambda value: value[b"labels"].pop()), "data_batch_1 has 4 images and 3 labels"),
    (rewrite("data_batch_1", lambda value: value[b"labels"].__setitem__(0, 10)), "data_batch_1 has the label 10, which is not"),
    (rewrite("test_batch", lambda value: value[b"labels"].__setitem__(0, -1)), "test_batch has the label -1"),
    (rewrite("test_batch", lambda value: value.pop(b"labels")), "test_batch has no list of whole numbers 'labels'"),
    (rewrite("test_batch", lambda value: value.pop(b"data")), "test_batch has no 'data' of uint8"),
    (rewrite("test_batch", lambda value: value.update({b"data": np.zeros((4, 3072), "<i2")})), "no 'data' of uint8"),
    (rewrite("test_batch", lambda value: value.update({b"data": value[b"data"][:, :9]})), "test_batch has no 'data' of uint8"),
    (rewrite("batches.meta", lambda value: value.update({b"num_cases_per_batch": 5})), "batches.meta says 5 for each batch"),
    (rewrite("batches.meta", lambda value: value[b"label_names"].pop()), "batches.meta does not name 10 classes"),
    (rewrite("batches.meta", lambda value: value[b"label_names"].__setitem__(0, b"../../evil")), "class names that are no words"),
    (rewrite("batches.meta", lambda value: value[b"label_names"].__setitem__(0, b"dog")), "no words, or one twice"),
    (lambda root: [rewrite(f"data_batch_{n}", lambda value: value.update({b"labels": [1] * 4}))(root) for n in range(1, 6)],
     "cifar10 has no training image of class 'airplane'"),
    (lambda root: write_files(root / "cifar-10-batches-py", {"test_batch": pickle.dumps({b"data": os.system}, 2)}),
     "test_batch is refused: it asks for posix.system"),
]  # fmt: skip
SVHN: list[Spoil] = [
    (lambda root: (root / "test_32x32.mat").unlink(), "test_32x32.mat is missing"),
    (cut("train_32x32.mat"), "train_32x32.mat"),
    (
        mat("test_32x32.mat", y=np.array([[1, 2, 11]], np.uint8)),
        "test_32x32.mat holds 11 in 'y', where whole numbers from 1 to 10",
    ),
    (mat("test_32x32.mat", y=np.array([[0.5]])), "holds 0.5 in 'y'"),
    (mat("test_32x32.mat", y=np.array([[np.nan]])), "holds nan in 'y'"),
    (mat("test_32x32.mat", y=np.array([[1, 2]])), "test_32x32.mat has 7 images and 2 labels"),
    (mat("test_32x32.mat", y=np.array([["a"]], object)), "test_32x32.mat holds cell as 'y', where an array of numbers"),
    (mat("test_32x32.mat", X=np.zeros((32, 32, 3, 7))), "has 'X' of float64 [32, 32, 3, 7], not uint8"),
    (mat("test_32x32.mat", X=np.zeros((32, 3, 7), np.uint8)), "has 'X' of uint8 [32, 3, 7]"),
    (lambda root: savemat(root / "test_32x32.mat", {"y": np.ones(3)}), "test_32x32.mat holds nothing as 'X'"),
    (
        lambda root: (root / "test_32x32.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000)),
        "test_32x32.mat is no MATLAB file",
    ),
]
FLOWERS: list[Spoil] = [
    (lambda root: (root / "setid.mat").unlink(), "setid.mat is missing"),
    (lambda root: (root / "imagelabels.mat").unlink(), "imagelabels.mat is missing"),
    (
        lambda root: (root / "jpg/image_00007.jpg").unlink(),
        "jpg/image_00007.jpg is missing, which imagelabels.mat has a label for",
    ),
    (lambda root: os.rename(root / "jpg", root / "jpeg"), "jpg cannot be read: No such file"),
    (
        lambda root: write_files(root / "jpg", {"image_00307.jpg": b"x"}),
        "jpg has 307 images and imagelabels.mat 306 labels",
    ),
    (
        mat("imagelabels.mat", labels=np.full((1, 306), 103)),
        "imagelabels.mat holds 103 in 'labels', where whole numbers from 1 to 102",
    ),
    (
        mat("imagelabels.mat", labels=np.full((1, 306), 5)),
        "no training image of class 1: setid.mat and imagelabels.mat do not agree",
    ),
    (mat("setid.mat", tstid=np.array([[307]])), "setid.mat holds 307 in 'tstid', where whole numbers from 1 to 306"),
    (mat("setid.mat", tstid=np.array([[3, 3]])), "setid.mat has an image twice"),
    (cut("setid.mat", 0.9), "setid.mat"),
]
TINY: list[Spoil] = [
    (lambda root: (root / "wnids.txt").unlink(), "wnids.txt is missing"),
    (
        text("wnids.txt", lambda words: words[10:]),
        "wnids.txt lists 199 different classes in 199 entries; it must be 200",
    ),
    (text("wnids.txt", lambda words: words[10:] + words[-10:]), "wnids.txt lists 199 different classes in 200 entries"),
    (text("wnids.txt", lambda words: "../../etc\n" + words), "wnids.txt holds '../../etc', where a WNID such as"),
    (lambda root: (root / "wnids.txt").write_bytes(b"\xff\xfe"), "wnids.txt is no text file"),
    (
        lambda root: (root / f"train/{WNIDS[3]}/images/{WNIDS[3]}_0.JPEG").unlink(),
        f"train/{WNIDS[3]}/images has no images",
    ),
    (
        lambda root: os.rename(root / f"train/{WNIDS[3]}", root / "away"),
        f"train/{WNIDS[3]}/images cannot be read: No such file",
    ),
    (
        lambda root: (root / "train/n00000001/images").mkdir(parents=True),
        "has the class 'n00000001' that wnids.txt has not",
    ),
]
TINY_VAL: list[Spoil] = [
    (lambda root: (root / "val/val_annotations.txt").unlink(), "val/val_annotations.txt cannot be read: No such file"),
    (lambda root: (root / "val/images/val_9.JPEG").unlink(), "val_9.JPEG is missing, which val/val_annotations.txt has"),
    (text("val/val_annotations.txt", lambda lines: lines[lines.index("\n") + 1 :]), "val_0.JPEG is not in val_annotations.txt"),
    (text("val/val_annotations.txt", lambda lines: lines + "val_0.JPEG\tn00000001\t0"), "the class 'n00000001' in line 201"),
    (text("val/val_annotations.txt", lambda lines: lines + "val_0.JPEG"), "the class '' in line 201"),
    (text("val/val_annotations.txt", lambda lines: f"val_0.JPEG\t{WNIDS[0]}\nval_0.JPEG\t{WNIDS[1]}\n" + lines),
     "a second class for 'val_0.JPEG' in line 2"),
]  # fmt: skip
HUNDRED: list[Spoil] = [
    (
        lambda root: (root / "imagenet100.txt").unlink(),
        "no list of the 100 classes: it needs imagenet100.txt or Labels.json",
    ),
    (text("imagenet100.txt", lambda words: words.partition("\n")[2]), "imagenet100.txt lists 99 different classes"),
    (
        text("imagenet100.txt", lambda words: "n99999999\n" + words.partition("\n")[2]),
        "lists n99999999, which is missing in",
    ),
    (lambda root: (root / "train" / WNIDS[1] / "0.JPEG").unlink(), f"train/{WNIDS[1]} has no images"),
    (
        lambda root: os.rename(root / "train", root / "training"),
        "looked in train, train.X1, train.X2, train.X3, train.X4",
    ),
    (lambda root: (root / "imagenet100.txt").rename(root / "Labels.json"), "Labels.json is no JSON that can be read"),
    (
        lambda root: [(root / "imagenet100.txt").unlink(), (root / "Labels.json").write_text("[1]")],
        "Labels.json is no JSON object",
    ),
    (
        lambda root: [(root / "imagenet100.txt").unlink(), (root / "Labels.json").write_text("[" * 100_000)],
        "no JSON that can be read",
    ),
]
MAKE: dict[str, Callable[[Path], object]] = {
    "cifar10": lambda root: write_files(root / "cifar-10-batches-py", cifar_files(10, *TEN)),
    "svhn": lambda root: published.write_svhn(root, random_split(10, 30, seed=0), random_split(10, 7, seed=1)),
    "flowers102": published.write_flowers,
    "tiny-imagenet": published.write_tiny_imagenet,
    "imagenet100": lambda root: published.write_imagenet100(root, kaggle=False),
}
WRONG = [
    (name, split, *spoil)
    for name, split, spoils in [
        ("cifar10", "train", CIFAR), ("svhn", "train", SVHN), ("flowers102", "train", FLOWERS),
        ("tiny-imagenet", "train", TINY), ("tiny-imagenet", "val", TINY_VAL), ("imagenet100", "train", HUNDRED),
    ]
    for spoil in spoils
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "split", "spoil", "sentence"), WRONG, ids=[f"{name}: {words}" for name, _, _, words in WRONG]
)
def test_what_is_wrong_is_one_sentence_that_names_the_file(name, split, spoil, sentence, tmp_path, home):
    root = tmp_path / "data"
    root.mkdir()
    MAKE[name](root)
    spoil(root)
    with pytest.raises(BadInput) as caught:
        sources.open_images(f"{name}:{root}", split)
    assert sentence in str(caught.value)
    assert str(root) in str(caught.value) or "cifar10 has no" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in home.rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda root: root.write_bytes(b"no archive"), "cifar-10-python.tar.gz is no whole .tar.gz"),
        (lambda root: write_tar(root, {}), "has no cifar-10-batches-py/batches.meta"),
        (lambda root: root.write_bytes(gzip.compress(bytes(3000))), "has no cifar-10-batches-py/batches.meta"),
    ],
)
def test_an_archive_that_is_none_is_named(data, sentence, tmp_path, home):
    data(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(BadInput) as caught:
        sources.open_images(f"cifar10:{tmp_path}", "train")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_truncated_archive_is_named(share, tmp_path, home):
    files = {f"cifar-10-batches-py/{name}": data for name, data in cifar_files(10, *TEN).items()}
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    cut("cifar-10-python.tar.gz", share)(tmp_path)
    with pytest.raises(BadInput, match=r"cifar-10-python.tar.gz is no whole .tar.gz"):
        sources.open_images(f"cifar10:{tmp_path}", "train")


def add(tar: tarfile.TarFile, name: str, data: bytes = b"evil", **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data) if member.isreg() else None)


def test_an_archive_writes_nothing_outside_the_cache(tmp_path, home):
    """Members that would climb out, or are links, are passed over; nothing is unpacked under a member's name."""
    (tmp_path / "deep/er").mkdir(parents=True)
    with tarfile.open(tmp_path / "deep/er/cifar-10-python.tar.gz", "w:gz") as tar:
        for name in (
            "../evil",
            "../../evil",
            str(tmp_path / "evil"),
            "cifar-10-batches-py/../../evil",
            "cifar-10-batches-py/extra",
        ):
            add(tar, name)
        add(tar, "cifar-10-batches-py/link", b"", type=tarfile.SYMTYPE, linkname="../..")
        add(tar, "cifar-10-batches-py/link/evil")
        for name, data in cifar_files(10, *TEN).items():
            add(tar, f"./cifar-10-batches-py/{name}", data)
    before = set(tmp_path.rglob("*"))
    check_equal(sources.open_images(f"cifar10:{tmp_path / 'deep/er'}", "train"), TEN[0], CIFAR10)
    assert all(home in path.parents or path == home for path in set(tmp_path.rglob("*")) - before)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "as something else than one regular file"),
        (
            {"type": tarfile.LNKTYPE, "linkname": "cifar-10-batches-py/batches.meta"},
            "as something else than one regular file",
        ),
        ({"type": tarfile.FIFOTYPE}, "as something else than one regular file"),
        ({"type": tarfile.DIRTYPE}, "as something else than one regular file"),
        ({"size": 2**40}, "with 1099511627776 bytes, more than any file of CIFAR"),
    ],
)
def test_a_member_that_is_no_regular_file_of_its_size_is_refused(attributes, sentence, tmp_path, home):
    files = cifar_files(10, *TEN)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        for key, value in attributes.items():
            setattr(member, key, value)
        tar.fileobj.write(member.tobuf())  # the header alone: a declared size costs nothing
        for name, data in files.items():
            add(tar, f"cifar-10-batches-py/{name}", data)
    with pytest.raises(BadInput) as caught:
        sources.open_images(f"cifar10:{tmp_path}", "train")
    assert sentence in str(caught.value) and "data_batch_1" in str(caught.value)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, home, monkeypatch):
    monkeypatch.setattr(arrays, "LIMITS", replace(arrays.LIMITS, unpacked=1 << 20))
    write_tar(tmp_path / "cifar-10-python.tar.gz", {"zeros": bytes(4 << 20)})
    with pytest.raises(BadInput, match="unpacks to more than 1 MiB, which no archive of CIFAR does"):
        sources.open_images(f"cifar10:{tmp_path}", "train")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, home):
    folder = write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, *TEN))
    with (folder / "data_batch_3").open("wb") as file:
        file.truncate(1 << 40)  # takes no space on the disk
    with pytest.raises(BadInput, match="data_batch_3 has more than 256 MiB"):
        sources.open_images(f"cifar10:{tmp_path}", "train")


def test_a_matlab_file_that_declares_more_than_it_holds_is_refused_unread(tmp_path, home, monkeypatch):
    MAKE["svhn"](tmp_path)
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, 7), np.uint8), "y": np.ones((7, 1), np.uint8)}, do_compression=False)
    declared = np.array([32, 32, 3, 7], "<i4").tobytes()
    path.write_bytes(path.read_bytes().replace(declared, np.array([32, 32, 3, 2**30], "<i4").tobytes()))
    monkeypatch.setattr("scipy.io.loadmat", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(BadInput, match=r"train_32x32.mat declares more for 'X' than its"):
        sources.open_images(f"svhn:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("cifar10:", "cifar10: names no folder: give cifar10:DIR"),
        ("cifar10:/no/such", "cifar10:/no/such names no folder"),
        (
            "cifar11:/data",
            "cifar11:/data is no folder: give a folder of images or of tar shards, "
            "'digits' or 'scenes' (the embedded sets), 'synthetic', or "
            "NAME:DIR with NAME one of",
        ),
        ("imagenet100:EMPTY", "EMPTY has no list of the 100 classes"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_commands_end_with_one_sentence_and_status_2(command, data, sentence, tmp_path, home, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    data, sentence = data.replace("EMPTY", empty), sentence.replace("EMPTY", empty)
    run, flags = (
        (train_command.main, ["--method", "mae"]) if command == "train" else (eval_command.main, ["--weights", "raw"])
    )
    assert run([*flags, "--data", data, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (tmp_path / "out").exists()


def test_only_known_names_before_a_colon_are_sets(tmp_path, home):
    published.write_imagenet100(tmp_path / "a:b", kaggle=False)
    assert len(sources.open_images(tmp_path / "a:b", "train").classes) == 200
    assert archives.named(None) is archives.named("digits") is archives.named("/data/cifar10:x") is None
    assert archives.named("svhn:~/x") == ("svhn", Path.home() / "x")
    assert archives.named("cifar10:a:b") == ("cifar10", Path("a:b"))
    assert set(archives.NAMES) == {*archives._IN_ARRAYS, *archives._IN_FILES}


def test_evaluation_judges_raw_pixels_of_a_named_set(tmp_path, home, capsys):
    write_files(tmp_path / "cifar-10-batches-py", cifar_files(10, *TEN))
    flags = ["--weights", "raw", "--protocol", "knn", "--data", f"cifar10:{tmp_path}", "--out", str(tmp_path / "out")]
    assert eval_command.main([*flags, "--device", "cpu", "--threads", "1", "--knn.k", "1"]) == 0
    assert "top-1" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert found["counts"] == {"training images": 20, "test images": 4}
    assert cache.folder() == home
