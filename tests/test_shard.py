"""The command that packs shards: a run on them is the run on the folder, loss by loss; what is wrong is one sentence."""

import json
from pathlib import Path

import pytest

from engine import shard, train
from engine.data import sources
from tests.reliability.images import FLAGS, folder_of_images


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.long
def test_a_run_on_shards_is_the_run_on_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, shards = folder_of_images(tmp_path / "folder"), tmp_path / "shards"
    assert shard.main([str(folder), str(shards), "--images-per-shard", "3"]) == 0
    assert f"train with --data {shards}" in capsys.readouterr().out
    flags = [*FLAGS, "--log-every", "1"]
    for data in (folder, shards):
        assert train.main([*flags, "--data", str(data), "--out", str(tmp_path / f"on_{data.name}")]) == 0
    assert len(losses(tmp_path / "on_folder")) == 4
    assert losses(tmp_path / "on_folder") == losses(tmp_path / "on_shards")
    # the run on the folder goes on with the shards: they are the same images
    assert train.main(["--resume", str(tmp_path / "on_folder"), "--data", str(shards)]) == 0


def test_digits_are_packed_in_their_order_and_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["digits", str(tmp_path / "out"), "--images-per-shard", "500"]
    assert shard.main(command) == 0 and "packing 1,797 images into 4 shards in" in capsys.readouterr().out
    for split, count in (("train", 1437), ("val", 360)):
        ours, theirs = sources.open_images(tmp_path / "out", split), sources.open_images("digits", split)
        assert len(ours) == count and ours.paths == theirs.paths and ours.labels.tolist() == theirs.labels.tolist()
    assert shard.main(command) == 0 and "packing 0 images into 0 shards, of 4 in" in capsys.readouterr().out
    assert shard.main([*command, "--short", "16"]) == 2
    assert "was begun in another way" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "what to pack or where to is missing"),
        (["digits"], "what to pack or where to is missing"),
        (["/no/such/folder", "out"], "/no/such/folder is no folder"),
        (["synthetic:9", "out"], "there is nothing to pack"),
        (["digits", "out", "--short", "-1"], "--short is -1; it must be a number of pixels, or 0"),
        (["digits", "out", "--quality", "101"], "--quality is 101; it must be a whole number from 1 to 100"),
        (["digits", "out", "--images-per-shard", "0"], "--images-per-shard is 0; it must be"),
        (["digits", "out", "--bad-limit", "2"], "--bad-limit is 2.0; it must be a share"),
        (["digits", "out", "--threads", "-2"], "--threads is -2; it must be"),
        (["digits", "out", "--size", "5"], "--size"),
        (["digits", "/proc/nothing"], "/proc/nothing cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert shard.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and sentence in told
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_the_command_goes_on_afterwards(tmp_path, monkeypatch, capsys):
    folder, out = folder_of_images(tmp_path / "folder"), tmp_path / "out"
    write = shard.Packing._fill

    def full(self, wanted, *rest):
        if wanted.first == 3:
            raise OSError(28, "No space left on device")
        write(self, wanted, *rest)

    command = [str(folder), str(out), "--images-per-shard", "3", "--threads", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(shard.Packing, "_fill", full)
        assert shard.main(command) == 2
    assert "cannot be written (No space left on device): make room" in capsys.readouterr().err
    assert not [path for path in out.rglob(".*") if path.name != ".lock"], "nothing half-written is left"
    assert shard.main(command) == 0 and len(sources.open_images(out, "train")) == 8


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(self, threads, watch):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard.Packing, "run", stop)
    assert shard.main(["digits", str(tmp_path / "out")]) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
