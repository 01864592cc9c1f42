"""Twenty steps equal ten, a new process, and ten more, bit for bit; and every saved part is needed for that."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.reliability.driver import STAGES, drive, finish, state_of, steps_of


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    whole = drive(folder / "whole", "--last", 20, "--poison")
    finish(drive(folder / "half", "--last", 10, "--poison"))
    finish(whole, drive(folder / "rest", "--load", folder / "half", "--first", 10, "--last", 20, "--controls"))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact(resumed: Path, stage: str):
    assert steps_of(resumed / "half", stage) + steps_of(resumed / "rest", stage) == steps_of(resumed / "whole", stage)
    whole, rest = state_of(resumed / "whole", stage), state_of(resumed / "rest", stage)
    assert whole.keys() == rest.keys()
    assert whole["guard/skipped"] == 1
    for name, value in whole.items():
        assert torch.equal(value, rest[name]), name


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_every_saved_part_is_needed(resumed: Path, stage: str):
    verdicts = json.loads((resumed / "rest" / f"{stage}.json").read_text())["controls"]
    assert {"model", "optimizer", "guard", "position", "optimizer/step", "optimizer/exp_avg_sq"} <= verdicts.keys()
    assert stage == "nnclr" or "average" in verdicts
    assert stage == "mae" or {"model/queue.keys", "model/queue.ids", "model/queue.pointer"} <= verdicts.keys()
    assert [name for name, differs in verdicts.items() if not differs] == []


@pytest.mark.long
def test_resume_is_bit_exact_when_compiled(tmp_path: Path):
    whole = drive(tmp_path / "whole", "--last", 20, "--compile")
    finish(drive(tmp_path / "half", "--last", 10, "--compile"))
    finish(whole, drive(tmp_path / "rest", "--load", tmp_path / "half", "--first", 10, "--last", 20, "--compile"))
    for stage in STAGES:
        assert steps_of(tmp_path / "half", stage) + steps_of(tmp_path / "rest", stage) == steps_of(
            tmp_path / "whole", stage
        )
        whole_state, rest_state = state_of(tmp_path / "whole", stage), state_of(tmp_path / "rest", stage)
        for name, value in whole_state.items():
            assert torch.equal(value, rest_state[name]), name


@pytest.mark.long
def test_two_ranks_equal_one_process(tmp_path: Path):
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    alone = drive(tmp_path / "alone", "--last", 6)
    ranks = [
        drive(tmp_path / "two", "--last", 6, environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    finish(alone, *ranks)
    for stage in STAGES:
        one, two = steps_of(tmp_path / "alone", stage), steps_of(tmp_path / "two", stage)
        assert [step["ids"] for step in one] == [step["ids"] for step in two]
        losses = [[float.fromhex(step["loss"]) for step in steps] for steps in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=2e-4)
        alone_state, two_state = state_of(tmp_path / "alone", stage), state_of(tmp_path / "two", stage)
        assert alone_state.keys() == two_state.keys()
        for name, value in alone_state.items():
            if not name.startswith("optimizer/"):  # Adam's first steps turn rounding into signs: weights are compared
                torch.testing.assert_close(two_state[name], value, atol=3e-4, rtol=1e-3, msg=name)
