"""ImageNet's archives as they are downloaded: the same set as the unpacked folder, and what is wrong with them is named."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.identity import Identity
from engine.data.sets import matlab
from tests.data import published
from tests.data.corpus import tar_bytes
from tests.data.published import write_files, write_tar

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
PLAIN = "imagenet_2012_validation_synset_labels.txt"
DATA = "ILSVRC2012_devkit_t12/data"


def unpacked(archives: Path, folder: Path, expected: dict[str, dict[str, int]]) -> Path:
    """The folder that everybody makes of them."""
    with tarfile.open(archives / TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                write_files(
                    folder / "train" / member.name.removesuffix(".tar"),
                    {each.name: inner.extractfile(each).read() for each in inner},
                )
    with tarfile.open(archives / VAL) as tar:
        for path in expected["val"]:
            write_files((folder / path).parent, {Path(path).name: tar.extractfile(Path(path).name).read()})
    return folder


@pytest.mark.parametrize("plain", [False, True])
def test_it_is_the_set_that_the_unpacked_folder_is(tmp_path, plain):
    expected = published.write_imagenet(tmp_path / "archives", plain)
    folder = unpacked(tmp_path / "archives", tmp_path / "folder", expected)
    for split in ("train", "val"):
        ours, theirs = (sources.open_images(each, split) for each in (f"imagenet:{tmp_path / 'archives'}", folder))
        assert ours.paths == list(expected[split]) == theirs.paths
        assert ours.labels.tolist() == list(expected[split].values()) == theirs.labels.tolist()
        assert ours.classes == theirs.classes and np.array_equal(ours.sizes, theirs.sizes)
        assert Identity.of(ours) == Identity.of(theirs)
        assert all(np.array_equal(ours.read(index), theirs.read(index)) for index in range(len(ours)))


def test_without_the_archive_of_val_there_is_no_val(tmp_path):
    published.write_imagenet(tmp_path, plain=True)
    (tmp_path / VAL).unlink()
    source = f"imagenet:{tmp_path}"
    assert sources.has_split(source, "train") and not sources.has_split(source, "val")
    assert len(sources.open_images(source, "train")) == 15
    with pytest.raises(BadInput, match=r"has no ILSVRC2012_img_val\.tar, which holds ImageNet's val split"):
        sources.open_images(source, "val")


def outer(content: dict[str, bytes]):
    return lambda root: (root / TRAIN).write_bytes(tar_bytes(content))


def inner(content: bytes):
    return outer({"n00000001.tar": content})


def devkit(**files: bytes):
    """Another devkit; underscores stand for dots."""
    return lambda root: write_tar(
        root / DEVKIT,
        {f"{DATA}/{name.replace('_mat', '.mat').replace('_txt', '.txt')}": data for name, data in files.items()},
    )


def mat(**values) -> bytes:
    stream = io.BytesIO()
    savemat(stream, values, do_compression=True)
    return stream.getvalue()


def synsets(*rows) -> bytes:
    return mat(synsets=np.array(list(rows), [("ILSVRC2012_ID", "O"), ("WNID", "O")])[:, None])


BOMB = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
BOMB += (lambda packed: b"\x0f\0\0\0" + len(packed).to_bytes(4, "little") + packed)(zlib.compress(bytes(80 << 20)))
TRUTH = {"ILSVRC2012_validation_ground_truth_txt": b"1\n" * 10}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: (root / TRAIN).unlink(), f"{TRAIN} cannot be read: No such file"),
        (lambda root: (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:30_000]), f"{TRAIN} is torn"),
        (lambda root: (root / TRAIN).write_bytes(gzip.compress(b"x")), f"{TRAIN} is compressed by gzip"),
        (outer({"n00000001.tar": b"", "words.txt": b"x"}), f"{TRAIN} holds 'words.txt', where an archive of a class"),
        (outer({}), f"{TRAIN} holds no archives of classes"),
        (inner(b""), f"{TRAIN}:n00000001.tar is no tar"),
        (inner(tar_bytes({"a.txt": b""})), f"{TRAIN}:n00000001.tar holds no images"),
        (inner(tar_bytes({"a.JPEG": b"xy"})[:1024]), f"{TRAIN}:n00000001.tar is torn"),
        (inner(tar_bytes({"../a.JPEG": b"xy"})), f"{TRAIN}:n00000001.tar holds '../a.JPEG', whose name leads out"),
        (outer({"n09999999.tar": tar_bytes({"a.JPEG": b"xy"})}), "has n01000000, which ILSVRC2012_img_train.tar has not"),
        (
            lambda root: (root / VAL).write_bytes(tar_bytes({"ILSVRC2012_val_00000002.JPEG": b"x"})),
            "where ILSVRC2012_val_00000001.JPEG belongs",
        ),
        (
            lambda root: (root / VAL).write_bytes(tar_bytes({"ILSVRC2012_val_00000001.JPEG": b"x"})),
            "has 1 images, and the list of their classes has 10",
        ),
        (lambda root: (root / DEVKIT).unlink(), f"has neither {DEVKIT} nor {PLAIN}"),
        (lambda root: (root / DEVKIT).write_bytes(b"words"), "is no whole .tar.gz"),
        (lambda root: (root / PLAIN).write_text("n01440764\nwords\n"), "holds 'words', where a WNID"),
        (lambda root: (root / PLAIN).write_bytes(b"\xff"), "is no text file"),
        (devkit(**TRUTH), "has no ILSVRC2012_devkit_t12/data/meta.mat"),
        (devkit(**TRUTH, meta_mat=b"words"), "meta.mat is no MATLAB file"),
        (devkit(**TRUTH, meta_mat=BOMB), "it unpacks to more than 64 MiB"),
        (devkit(**TRUTH, meta_mat=mat(other=1)), "meta.mat holds nothing [] as 'synsets', where an array of structs"),
        (devkit(**TRUTH, meta_mat=mat(synsets=1)), "as 'synsets', where an array of structs"),
        (devkit(**TRUTH, meta_mat=mat(synsets={"WNID": "x"})), "meta.mat has no ILSVRC2012_ID in 'synsets'"),
        (devkit(**TRUTH, meta_mat=synsets((1, "words"), (2, "n01000000"))), "has the class 1 twice, or without a WNID"),
        (devkit(**TRUTH, meta_mat=synsets((1, "n01000000"), (1, "n01007919"))), "has the class 1 twice"),
        (devkit(**TRUTH, meta_mat=synsets((5, "n01000000"), (2, "n01007919"))), "has the class '1', which"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, spoil, sentence):
    published.write_imagenet(tmp_path, plain=False)
    spoil(tmp_path)
    with pytest.raises(BadInput) as caught:
        sources.open_images(f"imagenet:{tmp_path}", "val", bad_limit=1.0)
    assert sentence in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_damage_to_records_gives_anything_but_records_or_a_sentence(tmp_path):
    content = bytearray(synsets((1, "n01000000"), (2, "n01007919")))
    generator = np.random.default_rng(0)
    for _ in range(8):  # each in a process of its own
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 2):
            damaged[place] = generator.integers(256)
        damaged = bytes(damaged[: generator.integers(len(damaged) // 2, 2 * len(damaged))])
        try:
            found = matlab.read_records(tmp_path / "x", damaged, "synsets", "ILSVRC2012_ID", "WNID")
        except BadInput as refused:
            found = str(refused)
        assert isinstance(found, list) or found.startswith(str(tmp_path))
