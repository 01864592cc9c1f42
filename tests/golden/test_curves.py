"""Fifty steps of every method lose what they lost, to the last bit, here and on another processor; a small mistake shows."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import methods
from tests.faults.runs import Server
from tests.golden import curves, planted, processor, stored
from tests.golden.curves import difference, take
from tests.golden.stored import Losses

golden, long = pytest.mark.golden, pytest.mark.long


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Server]:
    with curves.server(scratch) as server:
        yield server


def told(method: str, found: Losses) -> str:
    """Empty where the losses are as they were; else how they differ, and what to do."""
    kept = stored.content()["curves"][method]
    odd = difference(kept["losses"], found)
    return odd and (
        f"{method}: {odd}. Where that is meant: python -m tests.golden.curves {method} --because REASON. They were taken with "
        f"{kept['taken_with']}, here is {curves.versions()}"
    )


@golden
@long
@pytest.mark.parametrize("method", methods.names())
def test_losses_are_what_they_were(server: Server, scratch: Path, method: str):
    found = take(server, scratch, method)
    assert told(method, found) == ""


def test_every_method_and_no_other_has_a_curve_and_a_reason_for_it():
    kept = stored.content()["curves"]
    assert sorted(kept) == sorted(methods.names())
    for curve in kept.values():
        assert curve["because"] and sum(map(len, curve["losses"].values())) == curves.STEPS


# each, and the step whose loss shows it first
SHOWS = [
    ("rates a step ahead", "mae", 2),
    ("another epsilon in the loss", "mae", 1),
    ("schedules that end a step early", "dino", 4),
]


@golden
@long
@pytest.mark.parametrize(("mistake", "method", "step"), SHOWS)
def test_a_small_mistake_shows(server: Server, scratch: Path, mistake: str, method: str, step: int):
    assert {name for name, *_ in SHOWS} == planted.MISTAKES.keys()
    found = take(server, scratch, method, mistake, module="tests.golden.planted")
    assert f"losses differ, from step {step} of {method} on" in told(method, found)


@pytest.mark.other_processor
def test_another_processor_is_seen(tmp_path: Path):
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    environment = os.environ | {"LD_PRELOAD": str(processor.build(tmp_path))}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "AVX2\n"


@golden
@long
@pytest.mark.other_processor
def test_losses_are_the_same_on_another_processor(scratch: Path):
    with curves.server(scratch / "other", processor.build(scratch)) as elsewhere:
        for method in ("mae", "dinov2"):
            assert told(method, take(elsewhere, scratch / "other", method)) == ""
