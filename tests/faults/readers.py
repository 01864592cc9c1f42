"""Readers of this house that take bytes from elsewhere: a samples of what each reads, how it is called, what it may raise."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from scipy.io import savemat

from engine.core.errors import BadInput
from engine.data import cache, screen, sources
from engine.data.annotated import coco, index_masks, voc
from engine.data.sets import gzipped, image_lists, matlab, pickled
from engine.data.shards import manifest
from engine.data.shards.tar import Archive
from engine.data.shards.webdataset import of_shards
from engine.model import sources as weight_sources
from engine.model import weights
from engine.training import checkpoint, config_file, folder, metrics
from tests.data.corpus import encoded, picture, png_bytes, tar_bytes
from tests.data.published import WNIDS, python2, write_tar


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        name: of the reader.
        samples: sound files, which are mutated.
        read: given a fresh folder and the bytes, reads them; raises what the reader does, and AssertionError where what it gave
            can't be.
        raises: what it may raise.
        is_json: whether samples are mutated as JSON, too.
    """

    name: str
    samples: Sequence[bytes]
    read: Callable[[Path, bytes], object]
    raises: tuple[type[Exception], ...] = (BadInput,)
    is_json: bool = False


def _written(place: Path, content: bytes) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def _tar(place: Path, content: bytes) -> None:
    path = _written(place / "a.tar", content)
    file = os.open(path, os.O_RDONLY)
    try:
        for member in Archive(file, str(path)).members():
            assert 0 <= member.start <= member.start + member.size <= len(content)
    finally:
        os.close(file)


def _shard(place: Path, content: bytes) -> None:
    _written(place / "set" / "a.tar", content)
    of_shards(place / "set", "train")


def _shard_index(place: Path, content: bytes) -> None:
    """What the cache holds of an archive is damaged: the archive is there, and is read."""
    _written(place / "set" / "a.tar", _SHARD)
    first = of_shards(place / "set", "train")
    for kept in (cache.folder() / "shards").glob("*.npz"):
        kept.write_bytes(content)
    assert list(of_shards(place / "set", "train").paths) == list(first.paths)


def _verdicts(place: Path, content: bytes) -> None:
    """What the cache holds of a folder's images is damaged: they are there, and are looked at."""
    _written(place / "set" / "train" / "a" / "1.png", encoded(1, "png"))
    first = sources.open_images(place / "set", "train").sizes
    for kept in (cache.folder() / "screened").glob("*.npz"):
        kept.write_bytes(content)
    assert np.array_equal(sources.open_images(place / "set", "train").sizes, first)


def _image(place: Path, content: bytes) -> None:
    for decode in (False, True):
        size, reason = screen.inspect(lambda: BytesIO(content), decode)
        assert (size == (0, 0)) == bool(reason)


def _checkpoint(file: str) -> Callable[[Path, bytes], None]:
    def read(place: Path, content: bytes) -> None:
        checkpoint.save(place / "run", 1, {"model": {"weight": torch.ones(3)}}, {"step": 1})
        _written(place / "run" / "step-000000001" / file, content)
        checkpoint.newest_sound(place / "run")
        checkpoint.newest(place / "run", lambda _: None)

    return read


def _manifest_of_shards(place: Path, content: bytes) -> None:
    _written(place / manifest.NAME, content)
    manifest.check_whole(place)


def _records(place: Path, content: bytes) -> None:
    path = _written(place / "metrics.jsonl", content)
    read = metrics.read_metrics(path)
    metrics.keep_until(path, 1e9)
    assert metrics.read_metrics(path) == read
    file = metrics.MetricsFile(path)
    file.append({"step": 10, "stage": "mae", "kind": "train", "loss": 1.0})
    file.close()
    assert metrics.read_metrics(path)[:-1] == read


def _events(place: Path, content: bytes) -> None:
    _written(place / folder.EVENTS, content)
    folder.events(place)


def _coco(place: Path, content: bytes) -> None:
    file = _written(place / "annotations" / "instances_val.json", content)
    (place / "val").mkdir()
    picture(12, 8).save(place / "val" / "1.jpg")
    found = coco.read_objects(file, place / "val", "val")
    for image in range(len(found.images)):
        found.masks(image)


def _voc(file: str) -> Callable[[Path, bytes], None]:
    def read(place: Path, content: bytes) -> None:
        (place / "JPEGImages").mkdir(parents=True)
        picture(12, 8).save(place / "JPEGImages" / "1.jpg")
        for name, sound in _VOC.items():
            _written(place / name, sound)
        _written(place / file, content)
        voc.open_objects(place, "val")

    return read


def _tiny_imagenet(file: str) -> Callable[[Path, bytes], None]:
    def read(place: Path, content: bytes) -> None:
        for name, sound in _TINY.items():
            _written(place / name, sound)
        _written(place / file, content)
        image_lists.tiny_imagenet(place, "val")

    return read


def _labels(place: Path, content: bytes) -> None:
    _written(place / "Labels.json", content)
    image_lists.imagenet100(place, "train")


def _weights(name: str) -> Callable[[Path, bytes], None]:
    return lambda place, content: weight_sources.read(_written(place / name, content))


def _exported(place: Path, content: bytes) -> None:
    _written(place / "model.safetensors", save({"patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)}))
    _written(place / "config.json", content)
    weight_sources.read(place)
    weights.create(place)


def _of_mat(values: dict) -> bytes:
    stream = BytesIO()
    savemat(stream, values, do_compression=True)
    return stream.getvalue()


def _torch_saved() -> bytes:
    stream = BytesIO()
    torch.save({"weight": torch.ones(2, 3)}, stream)
    return stream.getvalue()


def _packed(place: Path, content: bytes) -> None:
    path = _written(place / "a.tar.gz", content)
    gzipped.read(path, {"a/b": "b"}, gzipped.Limits("a set", 1 << 16, 1 << 20))


def _gzipped() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_tar(Path(folder) / "a.tar.gz", {"a/b": b"content" * 9, "c": b"x"}).read_bytes()


def _kept_of_a_shard() -> bytes:
    """What the cache holds of `_SHARD`."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE", f"{folder}/cache")
        _written(Path(folder) / "set" / "a.tar", _SHARD)
        of_shards(Path(folder) / "set", "train")
        (kept,) = Path(folder, "cache", "shards").glob("*.npz")
        return kept.read_bytes()


def _verdict() -> bytes:
    """What the cache holds of the image in `_verdicts`."""
    stream, size = BytesIO(), screen.inspect(lambda: BytesIO(encoded(1, "png")), False)[0]
    np.savez(stream, sizes=np.array([size], np.int32), ids=np.zeros(0, np.int64), reasons=np.array([], str))
    return stream.getvalue()


def _kept(place: Path, content: bytes) -> None:
    """A set in the cache whose own list of files is damaged is written again, or is taken as it is."""
    home = cache.folder() / "a"
    for _ in range(2):
        cache.kept(home, lambda new: (new / "file").write_text("x"))
        assert (home / "file").read_text() == "x"
        (home / cache.MANIFEST).write_bytes(content)


_SHARD = tar_bytes({"a/1.jpg": encoded(1), "a/1.cls": b"cat", "a/2.jpg": encoded(2), "a/2.json": b'{"label": "dog"}'})
_VOC = {
    "ImageSets/Main/val.txt": b"1\n",
    "ImageSets/Main/dog_val.txt": b"1 1\n",
    "Annotations/1.xml": b"<annotation><object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>"
    b"<xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>",
}
_TINY = {
    "wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS).encode(),
    "val/images/val_0.JPEG": encoded(1),
    "val/val_annotations.txt": f"val_0.JPEG\t{WNIDS[0]}\t0\t0\t9\t9\n".encode(),
}
_INSTANCES = {
    "images": [{"id": 1, "file_name": "1.jpg", "width": 12, "height": 8}],
    "categories": [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 4], "segmentation": [[1, 1, 6, 1, 6, 5]], "area": 9},
        {"id": 2, "image_id": 1, "category_id": 5, "bbox": [0, 0, 8, 8], "iscrowd": 1,
         "segmentation": {"counts": [0, 8, 88], "size": [8, 12]}},
    ],
}  # fmt: skip
_CONFIG = {"train": {"compile": True, "method": "mae"}, "source": "a", "model": "b", "encoder": {}, "stages": []}
_SIZE = {"pretrained_cfg": {"input_size": [3, 32, 32]}}
_EXPORT = json.dumps({"tessera": {"model": "vit_micro_patch8_32", "overrides": {"depth": 1}}} | _SIZE).encode()
_EXPORT_OF_TIMM = json.dumps({"architecture": "vit_micro_patch8_32", "model_args": {"depth": 1}} | _SIZE).encode()
_RECORD = b'{"step": 1, "stage": "mae", "kind": "train", "time": 1.5, "loss": null, "not_finite": {"loss": "nan"}}\n'
_LINE = b'{"time": 1.5, "event": "begun", "step": 0, "words": "x"}\n'
_STRUCTS = {"synsets": np.array([(1, "n01440764")], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])}


def readers() -> list[Reader]:
    """All of them, by the order of what they read: archives, images, sets, weights, runs."""
    images = [encoded(1, form) for form in ("jpeg", "png", "webp", "tiff", "bmp")]
    grey = BytesIO()
    picture(12, 8).convert("L").save(grey, "png")
    tiny = [("wnids.txt", _TINY["wnids.txt"]), ("val/val_annotations.txt", _TINY["val/val_annotations.txt"])]
    saved = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, {"format": "pt"})
    hashes = {"state.json": "0" * 64, "model.safetensors": "0" * 64}
    shards = {"format": manifest.FORMAT, "shards": {"train/0.tar": 12}, "left_out": {}, "complete": True}
    return [
        Reader("tar", [_SHARD, tar_bytes({"x" * 150: b"1"}, 2)], _tar),
        Reader("shard", [_SHARD], _shard),
        Reader("gzipped tar", [_gzipped()], _packed),
        Reader("manifest of shards", [json.dumps(shards).encode()], _manifest_of_shards, is_json=True),
        Reader("image", [*images, png_bytes(9, 9, 16, 2, bytes(9 * 55))], _image, ()),
        Reader("mask", [grey.getvalue()], lambda place, content: index_masks.read(_written(place / "m.png", content), (12, 8))),
        Reader(
            "MATLAB arrays", [_of_mat({"y": np.arange(9, dtype=np.uint8)})],
            lambda place, content: matlab.whole(place, "y", matlab.read(_written(place / "a.mat", content), "y")[0], 0, 9),
        ),
        Reader(
            "MATLAB structs", [_of_mat(_STRUCTS)],
            lambda place, content: matlab.read_records(place, content, "synsets", "ILSVRC2012_ID", "WNID"),
        ),
        Reader("pickle", [python2({b"data": np.ones((2, 3), np.uint8), b"labels": [1, 2]})],
               lambda _, content: pickled.load(content, "batch")),
        Reader("COCO", [json.dumps(_INSTANCES).encode()], _coco, is_json=True),
        *(Reader(f"VOC's {file}", [sound], _voc(file)) for file, sound in _VOC.items()),
        *(Reader(f"Tiny-ImageNet's {file}", [sound], _tiny_imagenet(file)) for file, sound in tiny),
        Reader("Labels.json", [json.dumps(dict.fromkeys(WNIDS[:100], "a")).encode()], _labels, is_json=True),
        Reader("safetensors", [saved], _weights("a.safetensors")),
        Reader("torch's files", [_torch_saved()], _weights("a.pth")),
        Reader("config.json of an export", [_EXPORT, _EXPORT_OF_TIMM], _exported, is_json=True),
        Reader("manifest of a checkpoint", [json.dumps(hashes).encode()], _checkpoint("manifest.json"), is_json=True),
        Reader("tensors of a checkpoint", [saved], _checkpoint("model.safetensors")),
        Reader("config.json of a run", [config_file.sealed(_CONFIG).encode(), json.dumps(_CONFIG).encode()],
               lambda place, content: config_file.opened(_written(place / "config.json", content)), is_json=True),
        Reader("metrics.jsonl", [_RECORD * 3], _records, ()),
        Reader("events.jsonl", [_LINE * 3], _events, ()),
        Reader("index of shards in the cache", [_kept_of_a_shard()], _shard_index),
        Reader("verdicts in the cache", [_verdict()], _verdicts),
        Reader("set in the cache", [b'{"file": 1}'], _kept, is_json=True),
    ]  # fmt: skip
