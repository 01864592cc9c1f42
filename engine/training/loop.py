"""The loop of one stage: when to log, probe, save and stop. It waits for the device only when something is logged."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.host_memory import to_device
from engine.core.stopping import StopRequest
from engine.core.timetable import Timetable
from engine.data.batch import Batch
from engine.training.log import RunLog
from engine.training.probe import neighbour_agreement
from engine.training.state import TrainState
from engine.training.waits import Waits


@dataclass(frozen=True)
class Stage:
    """Where a stage lies in its run, and its steps, which are updates; `first_step` counts those of the stages before."""

    name: str
    index: int
    count: int
    first_step: int
    timetable: Timetable

    @property
    def total_steps(self) -> int:
        return self.timetable.total_steps


@dataclass(frozen=True)
class Cadence:
    """Steps between logged values; epochs between probes and between checkpoints (0: only at the end of a stage); updates skipped
    in a row after which training ends; how often a stage may go back to an earlier checkpoint."""

    log_every: int
    probe_every: int
    save_every: int
    abort_after: int
    rewind: int


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


class Saves(Protocol):
    """What makes a state durable beside the steps (`engine.training.saving`)."""

    def begin(self) -> None:
        """Save the state of this moment; where bad files are too many over all ranks, it is waited for and BadInput raised."""

    def check(self) -> None:
        """After every step: raise what went wrong with the save under way."""

    def finish(self) -> None:
        """Wait for it, on all ranks."""


def run_stage(
    state: TrainState,
    stage: Stage,
    batches: Iterator[Batch],
    drawn: Callable[[int], dict[str, Tensor]],
    log: RunLog,
    cadence: Cadence,
    stop: StopRequest,
    *,
    watch: Callable[[], AbstractContextManager[None]],
    probe: Callable[[], dict[str, float | str]],
    saving: Saves,
    turn: Callable[[], None],
    go_back: Callable[[int, str], None],
    over_limit: Callable[[], bool],
    labels: np.ndarray | None,
) -> None:
    """Train from `state.step` to the end of the stage.

    Args:
        batches: this rank's rows of the batches from `state.step` on.
        drawn: the random choices of a step, asked for step by step.
        watch: entered around every step, for a profile.
        probe: measures the encoder; its values are logged.
        saving: of `state`.
        turn: called before each step, for what comes between two of them.
        go_back: gives the state the weights of the newest checkpoint of at most so many updates of the run; told why.
        over_limit: whether this rank knows of too many.
        labels: class by dataset id, where the data have classes: only for the agreement of looked-up neighbours.

    Raises:
        Stopped: a signal came; the state was saved.
        BadInput: too many updates in a row were not finite; or the batches or `saving` raise it. What was trained is saved then,
            but where another rank can't be asked to.
    """
    log.start_stage(
        stage.name,
        stage.index,
        stage.count,
        stage.first_step,
        stage.total_steps,
        state.update.images_per_step,
        flops_per_image=state.update.flops_per_image(),
    )
    device = state.update.skipped.device
    waits = Waits(device)
    while state.step < stage.total_steps:
        turn()
        with watch():
            batch = _fetched(waits, batches, saving, log)
            images, ids = batch.images, to_device(batch.ids, device)
            done, last = stage.first_step + state.step + 1, state.step + 1 == stage.total_steps
            logs = last or (state.step + 1) % cadence.log_every == 0
            report, wrong = state.update(state.step, images, ids, drawn(state.step), logs), None
            state.step += 1
            log.tick(done)
            saving.check()
            if logs:
                values = _read(report, state, batch, labels)
                if len({stretch.images for stretch in stage.timetable.stretches}) > 1:
                    values["images_seen"] = stage.timetable.place(state.step).seen
                if len(stage.timetable.stretches) > 1:
                    values["operations"] = _operations(state, stage)
                # the slowest rank keeps all others waiting, in the next sum over ranks
                log.log(done, values, waited=dist.largest(waits.seconds(), device))
                if wrong := _went_wrong(state, values["loss"], stage, cadence, saving):
                    go_back(*wrong)
        # Ranks agree on stopping only where they wait for one another anyway.
        agreeing = logs or dist.world_size() == 1
        stopping = agreeing and dist.any_rank(stop.raised, device)
        too_many = agreeing and dist.any_rank(over_limit(), device)
        if last or _due(state.step, stage, cadence.probe_every):
            with log.aside():
                measured = probe()
            log.log(done, measured, kind="probe")
        if last or stopping or too_many or wrong or _due(state.step, stage, cadence.save_every):
            with log.aside():
                saving.begin()
                if last or stopping:
                    saving.finish()
        if stopping:
            raise Stopped


def _fetched(waits: Waits, batches: Iterator[Batch], saving: Saves, log: RunLog) -> Batch:
    """The next batch. Where there is none, what was trained is saved first, unless that takes other ranks."""
    try:
        return waits.fetch(batches)
    except BadInput:
        if dist.world_size() == 1:
            with log.aside():
                saving.begin()
                saving.finish()
        raise


def _operations(state: TrainState, stage: Stage) -> float:
    """Of the stage so far, as `Method.flops_per_image` has them; on average, where steps draw what they show."""
    chosen, spent = state.chosen.get(stage.name, ()), 0.0
    for number, one in enumerate(stage.timetable.stretches):
        if state.step <= one.first:
            break
        images = (min(state.step, one.end) - one.first) * one.images
        spent += images * state.method.flops_in(chosen[number] if number < len(chosen) else one.phase)
    return spent


def _due(step: int, stage: Stage, every: int) -> bool:
    return every > 0 and stage.timetable.ends_epochs(step, every)


def _read(
    report: dict[str, Tensor | float], state: TrainState, batch: Batch, labels: np.ndarray | None
) -> dict[str, float]:
    """One wait for the device: every reported scalar as a float, averaged over ranks."""
    scalars = {name: value for name, value in report.items() if isinstance(value, Tensor)}
    scalars["skipped_updates"] = state.update.skipped
    if state.method.neighbours is not None and labels is not None:
        found = dist.all_gather(state.method.neighbours)
        own = dist.all_gather(batch.ids.to(found.device))
        classes = torch.as_tensor(labels, device=found.device)
        of_found = torch.where(found >= 0, classes[found.clamp_min(0)], -1)
        scalars["neighbour_agreement"] = neighbour_agreement(classes[own], of_found)
    values = torch.stack([value.detach().double() for value in scalars.values()])
    values = (dist.all_reduce(values) / dist.world_size()).tolist()
    return dict(zip(scalars, values)) | {name: v for name, v in report.items() if not isinstance(v, Tensor)}


def _went_wrong(
    state: TrainState, loss: float, stage: Stage, cadence: Cadence, saving: Saves
) -> tuple[int, str] | None:
    """How many updates of the run were made before training went wrong, and how it did; None if it didn't.

    Raises:
        BadInput: it did, and must not go back (again).
    """
    usual, spike = state.spikes.usual, state.spikes.note(loss) and cadence.rewind > 0
    in_a_row = int(state.update.skipped_in_a_row)
    if in_a_row >= cadence.abort_after:
        since = in_a_row
        words = (
            f"the last {in_a_row} updates of stage {stage.name} were skipped because loss or gradients were not finite"
        )
    elif spike:
        since = state.spikes.above * cadence.log_every
        words = f"the loss of stage {stage.name} is {loss:.4g}, after {usual:.4g} before"
    else:
        return None
    saving.finish()  # it may be gone back to; and no rank leaves while the first one writes
    if state.spikes.rewound >= cadence.rewind:
        again = f" again, after --rewind {cadence.rewind}" if cadence.rewind else ""
        raise BadInput(
            f"{words}{again}; python -m engine.replay RUN says where what is not finite arises; try a lower learning rate, "
            "--precision fp32 or gradient clipping, and resume from the last checkpoint."
        )
    return stage.first_step + max(0, state.step - since), words
