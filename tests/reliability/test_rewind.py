"""--rewind: from a spike of the loss back to the last good checkpoint, and on behind the batches that led there."""

import json
import math
from pathlib import Path

import pytest
import torch

from engine import train
from engine.training import checkpoint, loop
from engine.training.step import Update
from tests.reliability.images import FLAGS, folder_of_images

# two updates an epoch; 24 in all, of which LEAST are logged before anything can be judged
SPIKY = (*FLAGS, "--epochs", "12", "--log-every", "1", "--save-every", "1", "--keep", "99")


def spoil(monkeypatch: pytest.MonkeyPatch, steps: dict[int, float]) -> None:
    """Let the losses of these updates, of the whole run, be read as multiples of what they are."""
    read = loop._read

    def spoiled(report, state, *rest):
        values = read(report, state, *rest)
        return values | {"loss": values["loss"] * steps.get(state.step, 1.0)}

    monkeypatch.setattr(loop, "_read", spoiled)


def saved(run: Path, step: int) -> tuple[dict, dict]:
    return checkpoint.load(run / "checkpoints" / f"step-{step:09d}")


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[group][name]) for group, named in one.items() for name, value in named.items())


def test_a_spike_is_left_behind_and_a_resumed_run_ends_as_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, images = tmp_path / "run", folder_of_images(tmp_path / "images")
    spoil(monkeypatch, {17: 50.0, 18: 50.0, 19: math.inf})
    assert train.main([*SPIKY, "--rewind", "1", "--data", str(images), "--out", str(run)]) == 0
    (told,) = [event for event in events(run) if event["event"] == "went back"]
    assert told["step"] == 19 and "back to the weights of 3 updates ago" in told["words"]
    before, at, end = saved(run, 16), saved(run, 19), saved(run, 24)
    assert same(before[0], at[0]) and not same(at[0], end[0])
    assert (at[1]["step"], at[1]["spikes"]["rewound"], at[1]["spikes"]["above"]) == (19, 1, 0)
    assert "went back" in [event["event"] for event in json.loads((run / "summary.json").read_text())["events"]]
    monkeypatch.undo()
    for step in (20, 22, 24):
        folder = run / "checkpoints" / f"step-{step:09d}"
        folder.rename(tmp_path / folder.name)
    (run / "summary.json").unlink()
    assert train.main(["--resume", str(run)]) == 0
    assert same(end[0], saved(run, 24)[0])


def test_updates_that_are_not_finite_are_left_behind_as_often_as_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run, images, gradients = tmp_path / "run", folder_of_images(tmp_path / "images"), Update.gradients
    made = []

    def poisoned(self: Update, views: tuple[torch.Tensor, ...], *rest) -> dict[str, torch.Tensor]:
        made.append(math.nan if len(made) >= 8 else 1.0)
        return gradients(self, tuple(view * made[-1] for view in views), *rest)

    monkeypatch.setattr(Update, "gradients", poisoned)
    flags = [*SPIKY, "--abort-after", "3", "--rewind", "1", "--data", str(images), "--out", str(run)]
    assert train.main(flags) == 2
    assert len(made) == 14
    assert (
        "stage mae were skipped because loss or gradients were not finite again, after --rewind 1"
        in capsys.readouterr().err
    )
    (told,) = [event for event in events(run) if event["event"] == "went back"]
    assert told["step"] == 11 and "3 updates ago" in told["words"] and same(saved(run, 8)[0], saved(run, 11)[0])


def test_a_spike_before_the_first_checkpoint_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run, images = tmp_path / "run", folder_of_images(tmp_path / "images")
    spoil(monkeypatch, {step: math.inf for step in (4, 5, 6)})
    flags = [*SPIKY, "--save-every", "0", "--rewind", "3", "--data", str(images), "--out", str(run)]
    assert train.main(flags) == 2
    assert "--rewind finds no checkpoint of at most 3 updates to go on from" in capsys.readouterr().err
