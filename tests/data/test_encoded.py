"""Images in shards come out of the loaders as their files do: bit for bit, after a resume, on ranks, around bad ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data import sources
from engine.data.encoded import ReadAhead
from engine.data.pipeline import each_once, eval_batches
from engine.data.views import byol_views
from tests.data.corpus import tar_bytes, with_bad_file
from tests.data.loading import SIZE, assert_same, loader, take


def packed(images: sources.ImageSet, folder: Path, each: int = 7) -> Path:
    """The images of a set as shards that call them as the set does."""
    (folder / "train").mkdir(parents=True)
    for start in range(0, len(images), each):
        files = {}
        for index in range(start, min(start + each, len(images))):
            said = {"cls": int(images.labels[index]), "__path__": images.paths[index]}
            files[f"{index}.jpg"], files[f"{index}.json"] = images.read(index).tobytes(), json.dumps(said).encode()
        (folder / "train" / f"{start:03d}.tar").write_bytes(tar_bytes(files))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in images.classes))
    return folder


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory) -> sources.ImageSet:
    return sources.open_images(packed(photos, tmp_path_factory.mktemp("packed")), "train")


@pytest.mark.parametrize("threads", [1, 3])
def test_training_sees_the_same_bits(photos, shards, threads):
    assert shards.ranges is not None and photos.ranges is None
    assert_same(take(loader(photos, batch_size=8), 9), take(loader(shards, batch_size=8, threads=threads), 9))


def test_a_resumed_loader_continues_exactly(photos, shards):
    for start in (3, 5):
        found = take(loader(shards, batch_size=8, start_step=start), 4)
        assert_same(take(loader(photos, batch_size=8), start + 4)[start:], found)


def test_ranks_together_see_what_one_process_sees(photos, shards):
    whole = take(loader(photos, batch_size=8), 6)
    parts = [take(loader(shards, batch_size=8, rank=rank, world=2), 6) for rank in range(2)]
    joined = [
        dataclasses.replace(
            one,
            ids=torch.cat([one.ids, two.ids]),
            images=tuple(torch.cat(views) for views in zip(one.images, two.images)),
            labels=torch.cat([one.labels, two.labels]),
        )
        for one, two in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)


def test_evaluation_and_each_once_see_the_same_bits_to_their_end(photos, shards):
    assert_same(*(list(eval_batches(images, (96, 96), 16, threads=2)) for images in (photos, shards)))
    by = {"seed": 3, "turn": 1, "rank": 1, "world": 2, "threads": 1}
    assert_same(*(list(each_once(images, byol_views(SIZE), 12, **by)) for images in (photos, shards)))


@pytest.mark.parametrize("views", [1, 2])
def test_an_image_found_bad_while_training_is_replaced_as_a_file_is(tmp_path, views):
    folder = sources.open_images(
        with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"]), "train", bad_limit=0.1, screening="header"
    )
    packed(folder, tmp_path / "packed")
    known, unknown = (
        sources.open_images(tmp_path / "packed", "train", bad_limit=0.1, screening=how) for how in ("decode", "header")
    )
    assert len(known.bad) == 2 and not unknown.bad
    ledgers = [], []
    one, other = (
        take(loader(images, byol_views(SIZE)[:views], batch_size=5, ledger=ledger), 9)
        for images, ledger in zip((folder, unknown), ledgers)
    )
    assert_same(one, other)
    assert_same(take(loader(known, byol_views(SIZE)[:views], batch_size=5), 9), other)
    assert sorted(ledgers[0]) == sorted(ledgers[1]) == list(known.bad)


def test_a_shard_that_changes_or_vanishes_takes_its_images_with_it(photos, tmp_path):
    packed(photos, tmp_path / "packed", each=1)
    images = sources.open_images(tmp_path / "packed", "train", bad_limit=0.1)
    (tmp_path / "packed/train/001.tar").unlink()
    (tmp_path / "packed/train/002.tar").write_bytes((tmp_path / "packed/train/003.tar").read_bytes() + bytes(512))
    (tmp_path / "packed/train/004.tar").write_bytes(b"")
    ledger = []
    batches = loader(images, batch_size=40, ledger=ledger)
    assert sorted(set(range(40)) - set(next(batches).ids.tolist())) == [1, 2, 4]
    assert {path: reason for path, reason in ledger} == {
        photos.paths[1]: "unreadable: No such file or directory",
        photos.paths[2]: "unreadable: the shard was changed since it was listed",
        photos.paths[4]: "unreadable: the shard was changed since it was listed",
    }
    for index in (10, 11):
        (tmp_path / f"packed/train/{index:03d}.tar").unlink()
    take(batches, 9)
    assert len(ledger) == 5 and batches.over_limit


def test_a_step_is_read_while_the_one_before_is_asked_for(shards):
    asked = []

    def plan(step):
        if step == 3:
            raise StopIteration
        asked.append(step)
        return np.array([step, 5]), {}

    read = ReadAhead(shards.ranges, plan, threads=2)
    for step in range(3):
        found = read(step)
        assert found.ids.tolist() == [step, 5] and asked == list(range(min(step + 2, 3)))
        assert [image.tobytes() for image in found.images()] == [shards.read(step).tobytes(), shards.read(5).tobytes()]
    with pytest.raises(StopIteration):
        read(3)
    read.close()


@pytest.mark.gpu
def test_on_the_gpu_shards_resume_and_replace_bad_images(tmp_path):
    folder = sources.open_images(
        with_bad_file(tmp_path, ["a/photo003.jpg"]), "train", bad_limit=0.1, screening="header"
    )
    images = sources.open_images(packed(folder, tmp_path / "packed"), "train", bad_limit=0.1, screening="header")
    ledger = []
    whole = take(loader(images, batch_size=5, device="cuda", ledger=ledger), 9)
    assert [path for path, _ in ledger] == ["train/a/photo003.jpg"]
    known = sources.open_images(tmp_path / "packed", "train", bad_limit=0.1)
    assert_same(whole[3:], take(loader(known, batch_size=5, device="cuda", start_step=3), 6))
