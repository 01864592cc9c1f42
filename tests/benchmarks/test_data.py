"""What `benchmarks.data` compares: that all loaders make the same views, what is timed, and the command itself."""

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import data, photographs
from benchmarks.peers.loaders import TorchvisionViews, normalised, stacked
from engine.data.graph import view_graph
from engine.data.sources import open_images
from engine.data.views import Augmentation, byol_views
from tests.data.corpus import write_photos
from tests.data.loading import loader, pixels, take

SIZE = (32, 32)


def test_ours_is_the_loader_of_the_engine(tmp_path: Path):
    write_photos(tmp_path, 12)
    images, views = open_images(tmp_path, "train"), byol_views(SIZE)
    ours = list(data._ours(images, views, partial(view_graph, views), 5, 4, 1, 0))
    assert len(ours) == 4
    for batch, same in zip(ours[:2], take(loader(images, views, batch_size=5), 2), strict=True):
        assert torch.equal(batch.ids, same.ids)
        assert all(torch.equal(view, other) for view, other in zip(batch.images, same.images, strict=True))


@pytest.mark.parametrize("tensors", [True, False])
def test_peers_crop_resize_and_normalise_as_ours_does(tmp_path: Path, tensors: bool):
    write_photos(tmp_path, 1)
    images = open_images(tmp_path, "train")
    width, height = images.sizes[0]
    whole = Augmentation(SIZE, (1, 1), (width / height,) * 2, flip=0)
    mirrored = Augmentation(SIZE, (1, 1), (width / height,) * 2, flip=1)
    views = (whole, mirrored)
    ours = next(loader(images, views, batch_size=1)).images
    theirs = normalised(stacked([TorchvisionViews(views, tensors)(str(tmp_path / images.paths[0]))]))
    for view, other in zip(ours, theirs, strict=True):
        assert other.dtype == torch.float32 and other.shape == view.shape
        assert np.abs(pixels(view[0]) - pixels(other[0])).mean() < 1


@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("colour", ["jitter", "grayscale", "blur", "solarize"])
def test_peers_change_colours_where_the_view_says_so(tmp_path: Path, tensors: bool, colour: str):
    write_photos(tmp_path, 1)
    path = str(tmp_path / "photo000.jpg")
    plain = Augmentation(SIZE, (1, 1), (48 / 40,) * 2, flip=0)
    changed = Augmentation(SIZE, (1, 1), (48 / 40,) * 2, flip=0, blur_sigma=(2.0, 2.0), **{colour: 1.0})
    before, after = (view.float() for view in TorchvisionViews((plain, changed), tensors)(path))
    assert not torch.equal(before, after)
    if colour == "solarize":
        assert torch.equal(after, torch.where(before >= 128, 255 - before, before))
    if colour == "grayscale":
        assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
    if colour == "blur":
        assert after.diff(dim=2).abs().mean() < before.diff(dim=2).abs().mean()


def test_photographs_have_the_form_of_imagenet_s_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    folder = photographs.write(12)
    files = sorted(folder.glob("*.jpg"))
    sizes = [Image.open(file).size for file in files]
    assert len(files) == 12 and set(sizes) == {(500, 375), (375, 500)}
    assert len({file.read_bytes() for file in files}) == 12
    assert 30_000 < np.mean([file.stat().st_size for file in files]) < 150_000
    before = files[0].stat().st_mtime_ns
    assert photographs.write(12) == folder and files[0].stat().st_mtime_ns == before


def test_what_is_made_ahead_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def batches() -> Iterator[int]:
        yield from (0, 0, 0)  # these were ready
        while True:
            now[0] += 2
            yield 0

    monkeypatch.setattr(data.time, "perf_counter", lambda: now[0])
    seconds, busy = data.timed(batches(), 3, 4)
    assert seconds == 8 and busy >= 0


def test_shares_of_ours_are_of_its_own_processor_time():
    rates = {data.OURS: 10.0, data.PARTS[0]: 100.0, data.PARTS[1]: 25.0}
    shares = data._shares({name: {"images_per_core_second": rate} for name, rate in rates.items()})
    assert shares == pytest.approx({"files and hand-over": 0.1, "decode": 0.3, "augment": 0.6})


@pytest.mark.long
def test_the_command_times_all_loaders_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "record.json"
    arguments = ["--images", "16", "--batch-size", "8", "--batches", "1", "--rounds", "2", "--image-size", "32",
                 "--threads", "1", "--views", "mae", "dino"]  # fmt: skip
    assert data.main([*arguments, "--out", str(out)]) == 0
    record, shown = json.loads(out.read_text()), capsys.readouterr().out
    spdl = {data.SPDL} if importlib.util.find_spec("spdl") else set()
    every = {data.OURS, data.SHARDS, *data.PARTS, data.TENSORS, data.PILLOW} | spdl
    assert {case: set(found["median"]) for case, found in record["cases"].items()} == {
        "mae, 1": every | {data.TIMM}, "dino, 1": every | {data.LINEAR}
    }  # fmt: skip
    assert ("spdl is left out: it is not installed" in shown) == (not spdl)
    assert record["files"]["count"] == 16 and record["cases"]["dino, 1"]["batch"] == 2
    for found in record["cases"].values():
        assert sum(found["shares"].values()) == pytest.approx(1)
        for loader_name, rounds_of in found["rounds"].items():
            assert len(rounds_of) == 2
            for one, ours in zip(rounds_of, found["rounds"][data.OURS], strict=True):
                for key in data.RATES:
                    assert one[f"ours_over_this_{key}"] == pytest.approx(ours[key] / one[key]), loader_name
    assert "ours, dino, 1: files and hand-over" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--views", "simclr"], "--views has no 'simclr'; choose from mae, byol, dino"),
        (["--threads", "0"], "--threads is 0; it must be a whole number from 1"),
        (["--batches", "0"], "--batches is 0; it must be a whole number from 1"),
        (["--images", "4", "--batch-size", "8"], "--batch-size is 8, but there are 4 images; choose at most so many"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--out", "nowhere/record.json"], "--out is 'nowhere/record.json', but there is no folder 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert data.main(arguments) == 2
    assert sentence in capsys.readouterr().err
