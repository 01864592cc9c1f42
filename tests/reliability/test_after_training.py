"""What comes after training cannot take its results away: it is named, left out, and the exit status tells."""

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from engine import train
from engine.core.extras import Extras
from engine.core.optim import Moment
from engine.data import stream
from engine.methods.mae import Mae
from engine.training import checkpoint, pictures
from tests.reliability.images import FLAGS, folder_of_images


def run(folder: Path, *flags: str) -> tuple[int, dict]:
    status = train.main([*FLAGS, "--data", str(folder / "images"), "--out", str(folder / "run"), *flags])
    return status, json.loads((folder / "run" / "summary.json").read_text())


def test_what_fails_afterwards_is_named_and_the_rest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fails(*_) -> None:
        raise ZeroDivisionError("no picture")

    folder_of_images(tmp_path / "images")
    monkeypatch.setattr(pictures, "draw", fails)
    status, summary = run(tmp_path)
    assert status == 1
    assert summary["left_out"].keys() == {"pictures of stage mae"}
    assert summary["left_out"]["pictures of stage mae"].startswith("ZeroDivisionError: no picture (")
    assert summary["steps"] == 4 and summary["probes"]
    for left in ("export/model.safetensors", "stages/1-mae/model.safetensors", "pictures/curves.png"):
        assert (tmp_path / "run" / left).is_file(), left
    told = capsys.readouterr().out
    assert "pictures of stage mae left out: ZeroDivisionError: no picture" in told
    assert "the training is whole" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_judging_at_once_and_the_summary_stands(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    seen = []

    def is_stopped(parts, folder: Path, say) -> dict:
        seen.append(json.loads((folder / "summary.json").read_text()))
        os.kill(os.getpid(), number)
        raise AssertionError("judged on")

    folder_of_images(tmp_path / "images")
    monkeypatch.setattr(train, "evaluate", is_stopped)
    status, summary = run(tmp_path, "--evaluate")
    assert status == 128 + number
    assert summary == seen[0] and summary["steps"] == 4 and "evaluation" not in summary
    assert "the training is whole, judge it by: python -m engine.eval --weights" in capsys.readouterr().out


def test_a_signal_ends_what_comes_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A codebook, a centre, stored features: minutes that nothing is saved of."""
    folder_of_images(tmp_path / "images")
    monkeypatch.setattr(Mae, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main([*FLAGS, "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]) == 143
    assert "stopped at once, before anything was saved" in capsys.readouterr().out


def test_names_and_files_that_are_in_the_way_are_not(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Class names that are formulas, a val split of one image, a foreign line in the metrics, a stray file in the export."""
    folder = tmp_path / "images"
    folder_of_images(folder, (r"$\frac{", "a_{b$"))
    (folder / "val" / "a_{b$").mkdir(parents=True)
    Image.new("RGB", (40, 36)).save(folder / "val" / "a_{b$" / "one.png")
    assert run(tmp_path)[0] == 0
    (tmp_path / "run" / "export" / ".DS_Store").write_text("x")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\nnonsense\n')
    (tmp_path / "run" / "summary.json").unlink()
    assert train.main(["--resume", str(tmp_path / "run"), "--evaluate"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "left_out" not in summary and "evaluation" in summary
    assert "evaluation by cluster is left out: cluster needs at least two classes" in capsys.readouterr().out


def test_too_many_bad_files_end_a_run_that_is_saved_and_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    images, run, begin = folder_of_images(tmp_path / "images"), tmp_path / "run", Mae.begin

    def spoils(self: Mae, moment: Moment) -> None:
        if moment.step == 2:
            (images / "train" / "cat" / "1.png").write_bytes(b"no image any more")
        begin(self, moment)

    monkeypatch.setattr(Mae, "begin", spoils)
    arguments = [*FLAGS, "--epochs", "6", "--save-every", "0", "--data", str(images), "--out", str(run)]
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert "1 of 8 images are bad" in said and f"all are listed in {run / 'bad_files.json'}" in said
    assert json.loads((run / "bad_files.json").read_text())[0][0] == "train/cat/1.png"
    (saved,) = checkpoint.found(run / "checkpoints")
    assert checkpoint.damage(saved) == "" and int(saved.name.removeprefix("step-")) >= 3
    monkeypatch.undo()
    assert train.main(["--resume", str(run), "--bad-limit", "0.5"]) == 0


def test_storage_that_stays_away_ends_a_run_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    images, run, begin = folder_of_images(tmp_path / "images"), tmp_path / "run", Mae.begin

    def unmounts(self: Mae, moment: Moment) -> None:
        if moment.step == 2:
            images.rename(tmp_path / "away")
        begin(self, moment)

    monkeypatch.setattr(Mae, "begin", unmounts)
    monkeypatch.setattr(stream.time, "sleep", lambda seconds: None)
    arguments = [*FLAGS, "--epochs", "6", "--save-every", "0", "--data", str(images), "--out", str(run)]
    assert train.main(arguments) == 2
    assert "see whether the storage is there" in capsys.readouterr().err
    assert checkpoint.damage(checkpoint.found(run / "checkpoints")[0]) == "" and not (run / "bad_files.json").exists()
    monkeypatch.undo()
    (tmp_path / "away").rename(images)
    assert train.main(["--resume", str(run)]) == 0


def test_a_stop_request_is_not_an_error_of_a_part():
    extras = Extras(print)
    with pytest.raises(KeyboardInterrupt), extras.of("report"):
        raise KeyboardInterrupt
    assert extras.left_out == {}
