"""The loop of a stage: what it tells the update beforehand of what it logs, and where it takes from what is drawn."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from engine.core.draws import Draws
from engine.core.optim import Moment
from engine.core.stopping import StopRequest
from engine.core.timetable import Timetable
from engine.data.batch import Batch
from engine.methods.mae import Mae
from engine.methods.mae import Settings as MaeSettings
from engine.model import vit
from engine.training.drawing import drawing
from engine.training.log import RunLog
from engine.training.loop import Cadence, Stage, Stopped, run_stage
from engine.training.metrics import read_metrics
from engine.training.state import TrainState
from engine.training.step import Update
from tests.saved import content

IMAGES, STEPS = 4, 8
CPU = torch.device("cpu")


def never(until: int, why: str) -> None:
    raise AssertionError(why)


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield Batch(torch.arange(IMAGES), (torch.randn(IMAGES, 3, 32, 32, generator=generator),), None, 0)


def draws(step: int) -> Draws:
    return Draws(0, step, batch=IMAGES, rows=slice(None), device=CPU)


def new_state() -> TrainState:
    torch.manual_seed(0)
    sizes = {"epochs": 1, "batch_size": IMAGES, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 1}
    encoder = vit.create("vit_micro_patch8_32", depth=1, positions="sincos")
    method = Mae(encoder, MaeSettings(**sizes)).train()
    return TrainState(method, Update(method, STEPS), 0, 0, [])


class Unsaved:
    """Where nothing is kept."""

    def begin(self) -> None:
        pass

    check = finish = begin


def train(state: TrainState, folder: Path, log_every: int = 3, stops: bool = False) -> None:
    with (
        RunLog(folder, quiet=True) as log,
        StopRequest() as stop,
        drawing(state.method, draws, state.step, STEPS) as drawn,
    ):
        stop.raised = stops
        run_stage(
            state, Stage("mae", 0, 1, 0, Timetable(STEPS * IMAGES, IMAGES, 1)), batches(), drawn, log,
            Cadence(log_every, 0, 0, 10, 0), stop,
            watch=nullcontext, probe=dict, saving=Unsaved(), turn=lambda: None, go_back=never,
            over_limit=lambda: False, labels=None,
        )  # fmt: skip


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_an_update_is_told_that_it_is_logged_where_the_loop_reads_it(log_every: int, tmp_path: Path):
    state, told = new_state(), []
    begin = state.method.begin

    def heard(moment: Moment) -> None:
        told.append(moment)
        begin(moment)

    state.method.begin = heard
    train(state, tmp_path, log_every)
    logged = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    assert [moment.step for moment in told] == list(range(STEPS))
    assert [moment.step + 1 for moment in told if moment.logged] == logged
    assert logged[-1] == STEPS


def test_steps_that_are_drawn_ahead_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(Mae, "draws_ahead", ahead)
        state = new_state()
        train(state, tmp_path / str(ahead))
        found.append(content(state.method, state.update))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_stopped_stage_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Mae, "draws_ahead", True)
    before, state = set(threading.enumerate()), new_state()
    with pytest.raises(Stopped):
        train(state, tmp_path, stops=True)
    assert state.step == 1 and set(threading.enumerate()) <= before
