"""A disk that is full, read-only or away ends a run in one sentence: what failed, what is safe, how to go on; and it goes on."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from engine import train
from engine.core import durable
from engine.core.optim import Moment
from engine.methods.mae import Mae
from engine.training import checkpoint, folder
from engine.training.metrics import MetricsFile
from tests.reliability.images import FLAGS, awaited, folder_of_images

FAILURES = {
    "full": errno.ENOSPC,
    "over quota": errno.EDQUOT,
    "read-only": errno.EROFS,
    "broken": errno.EIO,
    "away": errno.ESTALE,
}
PLACES = {  # what writes there; tests/faults has every call of a run fail
    "weights of a checkpoint": (checkpoint, "save_file"),
    "metrics": (MetricsFile, "append"),
    "the export": (folder, "export"),
}


def fails(number: int, place: str) -> Callable:
    def write(*_: object, **__: object) -> None:
        if place == "weights of a checkpoint":
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize(
    ("failure", "place"), [("full", "weights of a checkpoint"), ("read-only", "metrics"), ("away", "the export")]
)
def test_a_disk_that_fails_is_one_sentence_and_the_run_goes_on(
    failure: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    images, run, begin = folder_of_images(tmp_path / "images"), tmp_path / "run", Mae.begin
    number = FAILURES[failure]

    def breaks(self: Mae, moment: Moment) -> None:
        if moment.step == 3:
            awaited(run / "export")  # the first two updates are saved
            monkeypatch.setattr(*PLACES[place], fails(number, place))
        begin(self, moment)

    monkeypatch.setattr(Mae, "begin", breaks)
    arguments = [*FLAGS, "--save-every", "1", "--log-every", "1", "--data", str(images), "--out", str(run)]
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        f"error: {run} cannot be written any more ({os.strerror(number)}). "
    )
    assert "is whole; mend that, and go on with: python -m engine.train --resume" in said
    if failure == "full":
        monkeypatch.undo()
        assert train.main(["--resume", str(run)]) == 0
        assert (run / "summary.json").is_file()


def test_before_anything_is_saved_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    images = folder_of_images(tmp_path / "images")
    monkeypatch.setattr(folder, "write_file", fails(errno.ENOSPC, "configuration"))
    assert train.main([*FLAGS, "--data", str(images), "--out", str(tmp_path / "run")]) == 2
    assert "(No space left on device). Nothing was saved yet" in capsys.readouterr().err


def test_an_error_that_is_no_disk_s_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = folder_of_images(tmp_path / "images")
    monkeypatch.setattr(folder, "export", fails(errno.ECHILD, "the export"))
    with pytest.raises(ChildProcessError):
        train.main([*FLAGS, "--data", str(images), "--out", str(tmp_path / "run")])


def test_what_is_missing_elsewhere_is_not_the_folder_s_fault(tmp_path: Path):
    here, there = (OSError(errno.ENOENT, "", str(path / "file")) for path in (tmp_path, Path("/elsewhere")))
    assert durable.storage_fault(here, tmp_path) == os.strerror(errno.ENOENT)
    assert durable.storage_fault(there, tmp_path) == durable.storage_fault(ValueError("nothing"), tmp_path) == ""


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folders_will_do(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fsync, folders = os.fsync, []

    def of_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            folders.append(descriptor)
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    durable.write_folder(tmp_path / "kept", lambda aside: (aside / "file").write_text("x"))
    durable.write_file(tmp_path / "kept" / "file", lambda aside: aside.write_text("y"))
    assert (tmp_path / "kept" / "file").read_text() == "y" and folders
