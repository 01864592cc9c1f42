"""The whole step of every method on a CUDA device that computes nothing: full graph, nothing compiled again when warm, no wait,
no spill, nothing copied from memory that is not pinned, and launches, bytes and memory as they are stored."""

import pytest
import torch

from engine import methods
from engine.null_device import device
from tests.null_device import figures

SHORT = ("mae", "maect", "dino")
pytestmark = [pytest.mark.null_device, pytest.mark.long, pytest.mark.timeout(1800)]


def sound(name: str, chip: int, seen: dict[str, str]) -> None:
    answer = device.answer("tests.null_device.steps", [name], seen)
    faults = {stage: report["faults"] for stage, report in answer.items() if report["faults"]}
    assert not faults
    counted = figures.of_answer(answer)
    assert {stage: of["bytes_from_pageable"] for stage, of in counted.items() if of["bytes_from_pageable"]} == {}
    version, of_methods = figures.stored()
    kept = of_methods.get(name, {}).get(f"sm_{chip}")
    assert kept is not None or name not in SHORT, f"no figures are stored: python -m tests.null_device.figures {name}"
    if kept is None:  # of this method nothing was counted yet that a change could move
        assert all(of["launches"] > 0 and of["peak_bytes"] > 0 for of in counted.values())
    elif version == torch.__version__:
        assert counted == kept
    else:  # another torch launches otherwise
        assert counted.keys() == kept.keys()
        assert all(of["launches"] > 0 and of["peak_bytes"] > 0 for of in counted.values())


@pytest.mark.parametrize("name", SHORT)
def test_a_step_is_sound_and_counts_what_it_counted(name, alone_on_device):
    sound(name, 90, alone_on_device(90))


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", device.CHIPS)
@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_sound_on_either_chip(name, chip, alone_on_device):
    sound(name, chip, alone_on_device(chip))
