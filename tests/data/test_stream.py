"""What a stream keeps and mends: batches that stay as they were, bad files found late, errors that no file explains."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from nvidia.dali import backend

from engine.core.errors import BadInput
from engine.data import sources, stream
from engine.data.pipeline import eval_batches
from engine.data.views import byol_views
from tests.data.corpus import encoded, picture, with_bad_file
from tests.data.loading import SIZE, assert_same, loader, take


def test_a_batch_keeps_its_values_while_the_loader_runs_on(digits_train):
    batches = loader(digits_train)
    kept = [(batch, [view.clone() for view in batch.images]) for batch in take(batches, 8)]
    batches.close()
    for batch, copies in kept:
        assert all(torch.equal(view, copy) for view, copy in zip(batch.images, copies, strict=True))


@pytest.mark.parametrize("views", [1, 2])
def test_a_file_found_bad_while_training_is_replaced_like_one_found_before(tmp_path, views):
    with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"])
    known = sources.open_images(tmp_path, "train", bad_limit=0.1)
    unknown = sources.open_images(tmp_path, "train", bad_limit=0.1, screening="header")
    assert len(known.bad) == 2
    assert not unknown.bad
    ledger = []
    found = take(loader(unknown, byol_views(SIZE)[:views], batch_size=5, ledger=ledger), 9)
    assert_same(take(loader(known, byol_views(SIZE)[:views], batch_size=5), 9), found)
    assert sorted(ledger) == list(known.bad)
    assert not unknown.bad
    assert unknown.good.all()


def test_a_file_that_vanishes_or_changes_is_found(tmp_path):
    images = sources.open_images(with_bad_file(tmp_path, []), "train", bad_limit=0.2)
    (tmp_path / "train/a/photo001.jpg").unlink()
    picture(20, 20).save(tmp_path / "train/b/photo002.jpg")
    ledger = []
    take(loader(images, batch_size=20, ledger=ledger), 1)
    assert {path: reason.split()[0] for path, reason in ledger} == {
        "train/a/photo001.jpg": "unreadable:", "train/b/photo002.jpg": "changed:"
    }  # fmt: skip


@pytest.mark.parametrize("views", [1, 2])
def test_a_file_that_is_no_image_any_more_does_not_end_the_process(tmp_path, views):
    """Its header is read before the batch is decoded; DALI's decoder would crash."""
    images = sources.open_images(with_bad_file(tmp_path, []), "train", bad_limit=0.3)
    became = {1: b"\0", 2: b"words, where an image was", 4: encoded(1)[:300], 7: bytes(5000), 9: b""}
    for index, content in became.items():
        (tmp_path / images.paths[index]).write_bytes(content)
    ledger = []
    for _ in range(3):  # a crash doesn't come every time
        ledger.clear()
        (batch,) = take(loader(images, byol_views(SIZE)[:views], batch_size=20, ledger=ledger, threads=2), 1)
        assert not set(became) & set(batch.ids.tolist())
    assert [path for path, _ in sorted(ledger)] == [images.paths[index] for index in became]
    assert {reason for path, reason in ledger if path == images.paths[9]} == {"empty file"}


def test_too_many_files_found_bad_while_training_are_told_and_replaced(tmp_path):
    """The run ends where all its processes do, with what it has; an evaluation ends at once."""
    with_bad_file(tmp_path, ["a/photo003.jpg", "a/photo004.jpg"])
    images = sources.open_images(tmp_path, "train", bad_limit=0.05, screening="header")
    ledger, batches = [], loader(images, batch_size=20)
    assert not batches.over_limit
    batches = loader(images, batch_size=20, ledger=ledger)
    take(batches, 1)
    assert batches.over_limit and len(ledger) == 2
    with pytest.raises(BadInput, match="2 of 20 images are bad"):
        list(eval_batches(images, SIZE, 20, threads=1))


def test_a_set_of_which_nothing_is_left_ends_the_run(tmp_path):
    images = sources.open_images(with_bad_file(tmp_path, []), "train", bad_limit=1.0)
    for path in images.paths:
        (tmp_path / path).write_bytes(b"no image")
    with pytest.raises(BadInput, match="20 of 20 images are bad"):
        take(loader(images, batch_size=20), 1)


def test_storage_that_was_away_is_waited_for_and_condemns_nobody(tmp_path, monkeypatch, capsys):
    images = sources.open_images(with_bad_file(tmp_path / "images", []), "train", bad_limit=0.1)
    expected = take(loader(images, batch_size=10), 3)
    (tmp_path / "images").rename(tmp_path / "away")
    paused = []

    def comes_back(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            (tmp_path / "away").rename(tmp_path / "images")

    monkeypatch.setattr(stream.time, "sleep", comes_back)
    ledger = []
    assert_same(expected, take(loader(images, batch_size=10, ledger=ledger), 3))
    assert paused == [1, 2, 4] and not ledger
    assert "10 of 10 images of a batch in" in capsys.readouterr().err


def test_storage_that_stays_away_is_said(tmp_path, monkeypatch):
    images = sources.open_images(with_bad_file(tmp_path / "images", []), "train", bad_limit=0.1)
    (tmp_path / "images").rename(tmp_path / "away")
    paused, ledger = [], []
    monkeypatch.setattr(stream.time, "sleep", paused.append)
    with pytest.raises(BadInput, match=r"cannot be read .* after 123 s of waiting; see whether the storage is there"):
        take(loader(images, batch_size=10, ledger=ledger), 1)
    assert paused == list(stream.PAUSES) and not ledger


def test_evaluation_goes_on_without_a_file_found_bad(tmp_path):
    with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"])
    images = sources.open_images(tmp_path, "train", bad_limit=0.1, screening="header")
    ledger = []
    batches = list(eval_batches(images, SIZE, 4, threads=1, ledger=ledger))
    assert torch.cat([batch.ids for batch in batches]).tolist() == [id for id in range(20) if id not in (3, 19)]
    assert [batch.step for batch in batches] == list(range(5))
    assert len(ledger) == 2


def test_an_error_that_no_file_explains_is_tried_once_more_and_then_raised(photos, monkeypatch):
    batches = loader(photos, batch_size=8)
    expected = next(loader(photos, batch_size=8))
    build, failures = batches._stream._build, []

    class Failing:
        def run(self):
            failures.append(1)
            raise RuntimeError("out of memory")

    monkeypatch.setattr(batches._stream, "_build", lambda: build() if failures else Failing())
    assert_same([expected], [next(batches)])
    monkeypatch.setattr(batches._stream, "_build", Failing)
    batches.close()
    with pytest.raises(RuntimeError, match="out of memory"):
        next(batches)
    assert len(failures) == 3


def test_a_library_of_dali_that_nothing_here_calls_is_not_missed(monkeypatch):
    """What DALI says before a process's first pipeline for a GPU, on a machine without NPP and cuFFT."""
    monkeypatch.setattr(backend, "cuda_checked", False)
    for name, version in (("GetCudaVersion", 13000), ("GetNppVersion", -1), ("GetCufftVersion", -1)):
        monkeypatch.setattr(backend, name, lambda version=version: version)
    with warnings.catch_warnings(record=True) as said:
        stream._built(SimpleNamespace(build=backend.check_cuda_runtime))
    (alone,) = (str(warning.message) for warning in said)
    assert "cuFFT is typically provided" in alone


@pytest.mark.gpu
def test_a_batch_on_the_gpu_keeps_its_values_while_the_loader_runs_on(digits_train):
    batches = loader(digits_train, device="cuda")
    kept = [(batch, [view.clone() for view in batch.images]) for batch in take(batches, 12)]
    batches.close()
    for batch, copies in kept:
        assert all(torch.equal(view, copy) for view, copy in zip(batch.images, copies, strict=True))


@pytest.mark.gpu
def test_a_loader_on_the_gpu_resumes_and_replaces_bad_files(tmp_path):
    with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"])
    images = sources.open_images(tmp_path, "train", bad_limit=0.1, screening="header")
    ledger = []
    whole = take(loader(images, batch_size=5, device="cuda", ledger=ledger), 9)
    assert {path for path, _ in ledger} == {"train/a/photo003.jpg", "train/b/photo009.jpg"}
    known = sources.open_images(tmp_path, "train", bad_limit=0.1)
    assert_same(whole[3:], take(loader(known, batch_size=5, device="cuda", start_step=3), 6))
