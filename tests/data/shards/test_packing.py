"""Packed sets are the sets they were packed from; packing goes on where it was stopped, and gives the same bytes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.identity import Identity
from engine.data.shards.packing import How, Packing, packed
from tests.data.corpus import HOSTILE, picture, with_bad_file, write_hostile, write_photos


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, names in (("train", ("cat", "d.o.g é")), ("val", ("cat",))):
        for name in names:
            write_photos(tmp_path / "photos" / split / name, 5)
            write_photos(tmp_path / "photos" / split / name / "deep.er", 2, "png")
    return tmp_path / "photos"


def opened(source: Path, **options) -> dict[str, sources.ImageSet]:
    return {
        split: sources.open_images(source, split, **options)
        for split in ("train", "val")
        if sources.has_split(source, split)
    }


def pack(source: Path | dict, out: Path, threads: int = 2, **how) -> Packing:
    packing = Packing(source if isinstance(source, dict) else opened(source), out, How(**how))
    packing.run(threads, lambda more: None)
    return packing


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_packed_set_is_the_set_it_came_from(folder, tmp_path):
    packing = pack(folder, tmp_path / "out", images_per_shard=4)
    assert [shard.name for shard in packing.shards] == [
        *(f"train/{n:05d}.tar" for n in range(4)),
        "val/00000.tar",
        "val/00001.tar",
    ]
    assert not packing.left and not packing.left_out
    for split, images in opened(folder).items():
        found = sources.open_images(tmp_path / "out", split)
        assert found.paths == images.paths and found.classes == images.classes and found.bad == ()
        assert np.array_equal(found.labels, images.labels) and np.array_equal(found.sizes, images.sizes)
        assert Identity.of(found) == Identity.of(images)
        assert all(np.array_equal(found.read(index), images.read(index)) for index in range(len(images)))
    again = pack(tmp_path / "out", tmp_path / "again", threads=1, images_per_shard=4)
    assert [content(tmp_path / "out")[shard.name] == content(tmp_path / "again")[shard.name] for shard in again.shards]


def test_others_can_read_them(folder, tmp_path):
    """As WebDataset does: members with one key, up to the first dot of the name, follow one another."""
    pack(folder, tmp_path / "out")
    images = opened(folder)["train"]
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        members = [(member.name.partition("."), tar.extractfile(member).read()) for member in tar]
    assert [key for (key, _, _), _ in members] == [f"{number:09d}" for number in range(14) for _ in range(3)]
    assert [suffix for (_, _, suffix), _ in members[:3]] == ["cls", "json", "png"]  # deep.er/ comes first
    assert [int(data) for (_, _, suffix), data in members if suffix == "cls"] == images.labels.tolist()
    assert [json.loads(data)["cls"] for (_, _, suffix), data in members if suffix == "json"] == images.labels.tolist()


def test_a_set_without_classes_stays_without(tmp_path):
    write_photos(tmp_path / "photos/b", 3)
    pack(tmp_path / "photos", tmp_path / "out")
    found = sources.open_images(tmp_path / "out", "train")
    assert found.paths == ["b/photo000.jpg", "b/photo001.jpg", "b/photo002.jpg"] and found.labels is None
    assert not sources.has_split(tmp_path / "out", "val") and not (tmp_path / "out/classes.txt").exists()


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (301, 77), (64, 65)])
def test_large_images_are_resized_and_small_ones_keep_their_bytes(size):
    stream = io.BytesIO()
    picture(*size).save(stream, "jpeg", quality=95)
    for short in (0, min(size), 999):
        assert packed(stream.getvalue(), How(short=short)) == ("jpg", stream.getvalue())
    suffix, data = packed(stream.getvalue(), How(short=50))
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(stream.getvalue())) as whole:
        assert suffix == "jpg" and image.format == "JPEG" and min(image.size) == 50
        assert abs(max(image.size) - 50 * max(size) / min(size)) <= 0.5
        expected = whole.resize(image.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image, np.int64) - np.asarray(expected)).mean() < 2
    assert len(packed(stream.getvalue(), How(short=50, quality=30))[1]) < len(data)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixels_becomes_rgb(mode):
    whole = picture(90, 80).convert("L" if mode in ("L", "LA", "I;16") else "RGB")
    if mode == "I;16":
        kind, image = "png", Image.fromarray(np.asarray(whole).astype(np.uint16) * 257)
    else:
        kind, image = "tiff" if mode == "CMYK" else "png", whole.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    _, data = packed(stream.getvalue(), How(short=40))
    with Image.open(io.BytesIO(data)) as found:
        assert found.mode == "RGB" and found.size == (45, 40)
        expected = whole.convert("RGB").resize(found.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(found, np.int64) - np.asarray(expected)).mean() < (12 if mode == "P" else 3)


def test_packing_goes_on_where_it_was_stopped(folder, tmp_path):
    pack(folder, tmp_path / "whole", images_per_shard=3)
    packing, seen = Packing(opened(folder), tmp_path / "out", How(images_per_shard=3)), []

    def stop(more: int) -> None:
        seen.append(more)
        if len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packing.run(1, stop)
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.tar")}
    assert there == json.loads((tmp_path / "out/manifest.json").read_text())["shards"].keys() and len(there) == 2
    with pytest.raises(BadInput, match="was not packed to its end"):
        sources.open_images(tmp_path / "out", "train")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/train").iterdir()}
    assert len(pack(folder, tmp_path / "out", images_per_shard=3).shards) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "what was there is not written again"
    whole, out = content(tmp_path / "whole"), content(tmp_path / "out")
    assert {name: data for name, data in whole.items() if name != "manifest.json"} == {
        name: data for name, data in out.items() if name != "manifest.json"
    }
    assert json.loads(whole["manifest.json"]) == json.loads(out["manifest.json"])
    time = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    pack(folder, tmp_path / "out", images_per_shard=3)
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == time, "nothing is touched where nothing is left to do"
    (tmp_path / "out/train/00001.tar").write_bytes(b"cut off")
    pack(folder, tmp_path / "out", images_per_shard=3)
    assert content(tmp_path / "out")["train/00001.tar"] == whole["train/00001.tar"]


def test_what_is_there_is_not_mixed_with_something_else(folder, tmp_path):
    pack(folder, tmp_path / "out")
    with pytest.raises(BadInput, match="was begun in another way"):
        pack(folder, tmp_path / "out", short=16)
    write_photos(folder / "train/cat", 6)
    with pytest.raises(BadInput, match="was begun from other images"):
        pack(folder, tmp_path / "out")
    with pytest.raises(BadInput, match="holds something else already"):
        pack(folder, folder)
    (folder / "train/two\nlines").mkdir()
    write_photos(folder / "train/two\nlines", 1)
    with pytest.raises(BadInput, match="has a line break in its name"):
        pack(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    write_photos(tmp_path / "photos/m", 6)
    reasons = write_hostile(tmp_path / "photos/n")
    packing = pack(opened(tmp_path / "photos", bad_limit=1), tmp_path / "out", short=32)
    listed = json.loads((tmp_path / "out/manifest.json").read_text())["left_out"]["train"]
    assert (
        [path for path, _ in packing.left_out]
        == [path for path, _ in listed]
        == sorted(f"n/{name}" for name in HOSTILE)
    )
    assert all(reasons[path[2:]] in reason for path, reason in listed)
    found = sources.open_images(tmp_path / "out", "train")
    assert found.paths == [f"m/photo{number:03d}.jpg" for number in range(6)]


def test_an_image_that_cannot_be_resized_is_left_out_until_there_are_too_many(tmp_path):
    with_bad_file(tmp_path / "photos", ["a/photo003.jpg", "b/photo009.jpg"])
    sets = opened(tmp_path / "photos", bad_limit=0.1, screening="header")
    packing = pack(sets, tmp_path / "out", short=16, images_per_shard=7)
    assert [path for path, _ in packing.left_out] == ["train/a/photo003.jpg", "train/b/photo009.jpg"]
    assert len(sources.open_images(tmp_path / "out", "train")) == 18
    sets = opened(tmp_path / "photos", bad_limit=0.05, screening="header")
    with pytest.raises(BadInput, match=r"2 of 20 images are bad.*manifest\.json"):
        pack(sets, tmp_path / "few", short=16)
