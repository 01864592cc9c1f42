"""`python -m benchmarks.saving`: every form in every round, its record, refusals."""

import json
from pathlib import Path

import pytest

from benchmarks import saving

SMALL = ["--model", "vit_micro_patch8_32", "--batch-size", "2", "--no-compile", "--rounds", "2", "--steps", "2"]


def test_every_form_takes_its_turn_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    out, folder = tmp_path / "record.json", tmp_path / "saves"
    folder.mkdir()
    assert saving.main([*SMALL, "--folder", str(folder), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {form: len(times) for form, times in record["rounds"].items()} == dict.fromkeys(saving.FORMS, 2)
    never, waited, beside = (record["rounds"][form][0] for form in saving.FORMS)
    assert never["slower"] == 0 and never["held_up"] < waited["held_up"] < waited["seconds"]
    assert waited["slower"] == pytest.approx(waited["seconds"] - never["seconds"])
    assert beside["slower_of_interval"] == pytest.approx(beside["seconds"] / never["seconds"] - 1)
    assert record["saved_bytes"] > 1e6 and not list(folder.iterdir())
    assert "held up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "maect"), "one stage in one process is timed"),
        (("--folder", "/nowhere"), "--folder is '/nowhere', which is no folder"),
        (("--steps", "0"), "--steps is 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture):
    assert saving.main([*SMALL, *arguments]) == 2
    assert words in capsys.readouterr().err
