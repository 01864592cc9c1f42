"""Folders of shards: what is an image, what is its class, what is refused; listed once, and again when a shard changes."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.identity import Identity
from engine.data.shards import manifest, webdataset
from engine.data.subsets import few_per_class, subset
from tests.data.corpus import HOSTILE, HOSTILE_TARS, encoded, tar_bytes

ONE, TWO, THREE = (encoded(seed) for seed in range(3))


def shard(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, form))
    return path


def images_of(root: Path, split: str = "train", **options) -> sources.ImageSet:
    return sources.open_images(root, split, **options)


def test_a_folder_of_shards_is_read_in_the_order_of_names_and_members(tmp_path):
    shard(tmp_path / "b.tar", {"z/2.jpg": TWO, "z/1.png": encoded(1, "png"), "z/3.txt": b"passed over"})
    shard(tmp_path / "a.tar", {"./x.JPEG": THREE, ".hidden.jpg": ONE, "._x.jpg": ONE, ".d/y.jpg": ONE, "LICENSE": b"x"})
    (tmp_path / ".c.tar").write_bytes(b"passed over")
    (tmp_path / "README.md").write_text("passed over")
    images = images_of(tmp_path)
    assert images.paths == ["a.tar/x.JPEG", "b.tar/z/2.jpg", "b.tar/z/1.png"]
    assert images.labels is None and images.classes is None and not images.bad
    assert images.sizes.tolist() == [[58, 46], [53, 43], [53, 43]]
    assert images.read(0).tobytes() == THREE and images.read(1).tobytes() == TWO
    with images.open(2) as file:
        assert file.read() == encoded(1, "png")
        assert file.seek(-3, os.SEEK_END) and file.read(9) == encoded(1, "png")[-3:] and file.read() == b""
    assert not sources.has_split(tmp_path, "val")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_classes_come_from_cls_and_json(tmp_path, form):
    long = "n" * 70 + "/" + "é" * 40
    shard(tmp_path / "train/0.tar", {f"{long}.jpg": ONE, f"{long}.cls": b"dog\n", "2.jpg": TWO, "2.cls": b"cat"}, form)
    shard(tmp_path / "train/1.tar", {"3.json": b'{"label": "cat", "url": 5}', "3.jpg": THREE}, form)
    shard(tmp_path / "val/0.tar", {"9.cls": b"dog", "9.jpg": ONE, "9.json": b'{"cls": "passed over"}'}, form)
    train, val = images_of(tmp_path), images_of(tmp_path, "val")
    assert train.classes == val.classes == ("cat", "dog")
    assert train.labels.tolist() == [1, 0, 0] and val.labels.tolist() == [1] and train.labels.dtype == np.int64
    assert train.paths == [f"train/0.tar/{long}.jpg", "train/0.tar/2.jpg", "train/1.tar/3.jpg"]
    assert val.paths == ["val/0.tar/9.jpg"]


def test_numbers_are_labels_and_a_list_names_them(tmp_path):
    shard(tmp_path / "train/0.tar", {"1.jpg": ONE, "1.cls": b"10", "2.jpg": TWO, "2.json": b'{"class": 2}'})
    shard(tmp_path / "val/0.tar", {"1.jpg": ONE, "1.cls": b"02"})
    train = images_of(tmp_path)
    assert train.labels.tolist() == [10, 2] and train.classes == tuple(map(str, range(11)))
    assert images_of(tmp_path, "val").labels.tolist() == [2]
    (tmp_path / "classes.txt").write_text("".join(f"class {number}\r\n" for number in range(20)))
    assert images_of(tmp_path).classes[10] == "class 10" and len(images_of(tmp_path, "val").classes) == 20


def test_an_annotation_that_is_no_label_is_passed_over(tmp_path):
    """As SA-1B's shards have them, beside its images."""
    masks = json.dumps({"label": "x", "annotations": ["x" * 100] * 1000}).encode()
    shard(tmp_path / "sa_000.tar", {"./sa_1.jpg": ONE, "./sa_1.json": masks, "./sa_2.jpg": TWO, "./sa_2.json": b"[1]"})
    images = images_of(tmp_path)
    assert images.paths == ["sa_000.tar/sa_1.jpg", "sa_000.tar/sa_2.jpg"] and images.labels is None


def test_named_images_are_taken_for_those_of_the_folder_they_came_from(tmp_path):
    for name, content in (("train/a/x.1.jpg", ONE), ("train/b/y.jpg", TWO)):
        (tmp_path / "folder" / name).parent.mkdir(parents=True)
        (tmp_path / "folder" / name).write_bytes(content)
    named = [
        json.dumps({"cls": label, "__path__": path}).encode()
        for label, path in ((0, "train/a/x.1.jpg"), (1, "train/b/y.jpg"))
    ]
    shard(tmp_path / "shards/train/0.tar", {"0.jpg": ONE, "0.json": named[0], "1.jpg": TWO, "1.json": named[1]})
    (tmp_path / "shards/classes.txt").write_text("a\nb\n")
    folder, shards = images_of(tmp_path / "folder"), images_of(tmp_path / "shards")
    assert shards.paths == folder.paths
    assert Identity.of(shards) == Identity.of(folder)


def test_parts_of_a_set_read_their_own_images(tmp_path):
    contents = [encoded(seed) for seed in range(6)]
    files = {f"{i}.jpg": content for i, content in enumerate(contents)} | {
        f"{i}.cls": b"%d" % (i % 2) for i in range(6)
    }
    shard(tmp_path / "x.tar", files)
    images = images_of(tmp_path)
    assert [subset(images, [4, 1]).read(place).tobytes() for place in range(2)] == [contents[4], contents[1]]
    few = few_per_class(images, 1, seed=0)
    assert [few.read(place).tobytes() for place in range(2)] == [contents[int(Path(path).stem)] for path in few.paths]


def test_bad_images_are_listed_with_their_reason_and_replaced(tmp_path):
    files = {f"{number}.jpg": encoded(number) for number in range(3)}
    expected = {}
    for name, (write, reason) in HOSTILE.items():
        write(tmp_path / name)
        if (tmp_path / name).is_file():  # there are no links and no pipes here
            files[f"z/{len(files)}/{name}"] = (tmp_path / name).read_bytes()
            expected[f"x.tar/z/{len(files) - 1}/{name}"] = reason
    shard(tmp_path / "shards/x.tar", files)
    images = images_of(tmp_path / "shards", bad_limit=1.0)
    assert [path for path, _ in images.bad] == list(expected)
    assert all(expected[path] in reason for path, reason in images.bad), images.bad
    assert images.good.tolist() == [True] * 3 + [False] * len(expected)
    with pytest.raises(BadInput, match=f"{len(expected)} of {len(images)} images are bad"):
        images_of(tmp_path / "shards")


GOOD = {"1.jpg": ONE, "1.cls": b"a", "2.jpg": TWO, "2.cls": b"b"}


@pytest.mark.parametrize(
    ("train", "val", "sentence"),
    [
        ({**GOOD, "3.jpg": THREE}, None, "1 of 3 images in .*/train have no class, train/0.tar/3.jpg first"),
        (GOOD, {"1.jpg": ONE, "1.cls": b"c"}, "'c', which is none of the 2 of the training images"),
        (GOOD, {"1.jpg": ONE, "1.cls": b"1"}, "'1', which is none of the 2 of the training images"),
        ({"1.jpg": ONE, "1.cls": b"1"}, {"1.jpg": ONE, "1.cls": b"2"}, "'2', which is none of the 2 of"),
        ({"1.jpg": ONE, "1.cls": b"1"}, {"1.jpg": ONE, "1.cls": b"-1"}, "'-1', which is none of the 2 of"),
        (GOOD, {"1.jpg": ONE}, "/val have no classes, and those in .*/train have some"),
        ({"1.jpg": ONE}, GOOD, "/val have classes, and those in .*/train have none"),
        ({**GOOD, "1.png": ONE}, None, "two images of one key, '1.jpg' and '1.png'"),
        ({**GOOD, "2.cls": b""}, None, "'2.cls', which names no class"),
        ({**GOOD, "2.cls": b"\xff"}, None, "'2.cls', which is no text"),
        ({**GOOD, "2.cls": b"a\0b"}, None, "'2.cls', which names no class"),
        ({**GOOD, "2.cls": b"x" * 5000}, None, "'2.cls' with 5000 bytes, which is no class"),
        ({**GOOD, "2.json": b"{"}, None, "'2.json', which is no JSON"),
        ({**GOOD, "2.json": b"[" * 60_000}, None, "'2.json', which is no JSON"),
        ({**GOOD, "2.json": b'{"label": "\\ud800"}'}, None, "'2.json', which names no class"),
        ({**GOOD, "2.json": b'{"__path__": 5}'}, None, "'2.json', which names no class or path: '5'"),
        ({**GOOD, "1.json": b'{"__path__": "a"}', "2.json": b'{"__path__": "a"}'}, None, "2 images are called 'a'"),
        ({"1.cls": b"a"}, None, "no images in the shards"),
        ({"n01.tar": tar_bytes({"a.jpg": ONE})}, None, "no images in the shards .* imagenet:DIR"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_named(tmp_path, train, val, sentence):
    shard(tmp_path / "train/0.tar", train)
    if val is not None:
        shard(tmp_path / "val/0.tar", val)
    with pytest.raises(BadInput, match=sentence) as caught:
        images_of(tmp_path, "train" if val is None else "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torn in an image", "symbolic link", "absolute name", "one name twice", "gzip"])
def test_a_hostile_shard_among_good_ones_is_named(tmp_path, name):
    content, sentence = HOSTILE_TARS[name]
    shard(tmp_path / "0.tar", GOOD)
    (tmp_path / "1.tar").write_bytes(content)
    with pytest.raises(BadInput, match=r"1\.tar") as caught:
        images_of(tmp_path)
    assert sentence in str(caught.value)


def test_layouts_that_cannot_be_meant_are_named(tmp_path):
    shard(tmp_path / "packed/a.tar.gz", GOOD)
    with pytest.raises(BadInput, match=r"a\.tar\.gz is compressed, and cannot be read in place"):
        images_of(tmp_path / "packed")
    shard(tmp_path / "mixed/train/0.tar", GOOD)
    (tmp_path / "mixed/val/a").mkdir(parents=True)
    with pytest.raises(BadInput, match="val has no shards"):
        images_of(tmp_path / "mixed", "val")
    (tmp_path / "mixed/classes.txt").write_text("a\nb\na\n")
    with pytest.raises(BadInput, match=r"classes\.txt has a line without a class, or a class twice"):
        images_of(tmp_path / "mixed")


def test_archives_beside_images_or_folders_are_passed_over(tmp_path):
    for name in ("flat/a.jpg", "deep/b/a.jpg", "train/train/cat/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(ONE)
    for folder in ("flat", "deep", "train/train", "train"):
        shard(tmp_path / folder / "backup.tar", GOOD)
    assert [images_of(tmp_path / name).paths for name in ("flat", "deep", "train")] == [
        ["a.jpg"],
        ["b/a.jpg"],
        ["train/cat/a.jpg"],
    ]


def test_shards_are_listed_once_until_one_changes(tmp_path, monkeypatch):
    path = shard(tmp_path / "0.tar", GOOD)
    shard(tmp_path / "1.tar", {"a.jpg": THREE, "a.cls": b"b"})
    first = images_of(tmp_path)
    read, listed = webdataset._images, []
    monkeypatch.setattr(webdataset, "_images", lambda shard, *rest: listed.append(shard) or read(shard, *rest))
    assert images_of(tmp_path).paths == first.paths and not listed
    status = path.stat()
    path.write_bytes(tar_bytes({"1.jpg": TWO, "1.cls": b"a", "2.jpg": TWO, "2.cls": b"b"}, tarfile.GNU_FORMAT))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the time alone may tell
    again = images_of(tmp_path)
    assert len(listed) == 2 and again.read(0).tobytes() == TWO
    with pytest.raises(OSError, match="changed since it was listed"):
        first.read(0)
    assert first.read(2).tobytes() == THREE


def test_a_folder_that_was_not_packed_to_its_end_is_refused(tmp_path):
    path = shard(tmp_path / "train/0.tar", GOOD)
    (tmp_path / "manifest.json").write_text('{"of": "somebody else"}')
    assert len(images_of(tmp_path)) == 2
    manifest.save(tmp_path, {"complete": True, "shards": []})
    with pytest.raises(BadInput, match=r"manifest\.json is damaged"):
        images_of(tmp_path)
    manifest.save(tmp_path, {"complete": False, "shards": {}, "left_out": {}})
    with pytest.raises(BadInput, match="was not packed to its end"):
        images_of(tmp_path)
    manifest.save(tmp_path, {"complete": True, "shards": {"train/0.tar": path.stat().st_size}, "left_out": {}})
    assert len(images_of(tmp_path)) == 2
    for name, size, sentence in (
        ("train/0.tar", 1, "bytes, and manifest.json there says 1"),
        ("train/1.tar", 1, "is missing"),
    ):
        manifest.save(tmp_path, {"complete": True, "shards": {name: size}, "left_out": {}})
        with pytest.raises(BadInput, match=sentence):
            images_of(tmp_path)
