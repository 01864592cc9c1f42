"""events.jsonl tells all that became of a run, whoever went on with it, and summary.json has it."""

import json
import os
import signal
from pathlib import Path

import pytest

from engine import train
from engine.core.optim import Moment
from engine.methods.mae import Mae
from engine.training import folder
from tests.reliability.images import FLAGS, folder_of_images
from tests.reliability.test_replay import planted


def told(run: Path) -> list[str]:
    return [event["event"] for event in folder.events(run)]


def test_what_became_of_a_run_is_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    images, run, begin = folder_of_images(tmp_path / "images"), tmp_path / "run", Mae.begin
    flags = [*FLAGS, "--epochs", "6", "--log-every", "3", "--save-every", "1", "--keep", "9", "--bad-limit", "0.5"]

    def at(self: Mae, moment: Moment) -> None:
        if moment.step == 2:
            (images / "train" / "cat" / "1.png").write_bytes(b"no image any more")
        if moment.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, moment)

    with planted(), monkeypatch.context() as patch:  # the eighth update is left out
        inner = Mae.begin
        patch.setattr(Mae, "begin", lambda self, moment: (at(self, moment), inner(self, moment))[1])
        assert train.main([*flags, "--data", str(images), "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "1 updates up to step 9 were left out: loss or gradients not finite" in said
    assert told(run) == ["begun", "bad files", "updates left out", "stopped"]
    (run / folder.EVENTS).open("a").write('{"torn": ')
    (run / "checkpoints" / "step-000000010" / "model.safetensors").write_bytes(b"")
    (images / "train" / "cat").rename(images / "train" / "cats")
    assert train.main(["--resume", str(run)]) == 2
    assert train.main(["--resume", str(run), "--changed-data"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert [event["event"] for event in summary["events"]] == told(run)
    assert told(run)[4:6] == ["begun", "checkpoint damaged"] and told(run)[-1] == "trained"
    assert {"failed", "other images", "resumed"} <= set(told(run))
    failed = next(event for event in folder.events(run) if event["event"] == "failed")
    assert failed["words"].startswith("--resume finds other images")
    steps = [event["step"] for event in folder.events(run) if event["event"] in ("stopped", "resumed", "trained")]
    assert steps == [10, 8, 12]
