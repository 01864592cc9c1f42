"""The one list of what a checkpoint holds.

Whatever a step reads and the next step needs is named in `fields`, or is a pure function of the run's configuration and the
position (data order, crops, masks, neighbour draws, schedules: see engine/core/draws.py and engine/data/pipeline.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.core.phases import Phase
from engine.methods.base import Method
from engine.training.optimizers import load_state_tensors, state_tensors
from engine.training.spikes import Spikes
from engine.training.step import Update

Content = dict[str, dict[str, Tensor]]  # of a state: field -> tensor name -> tensor


@dataclass
class TrainState:
    """A run at a moment.

    Attributes:
        stage: index of the stage in the recipe.
        step: updates made in this stage.
        bad_files: (path, reason) of files that were found bad while training and replaced.
        spikes: what is remembered of this stage's loss.
        chosen: by stage the phases that it chose so far (`engine.training.token_choice`).
    """

    method: Method
    update: Update
    stage: int
    step: int
    bad_files: list[tuple[str, str]]
    spikes: Spikes = field(default_factory=Spikes)
    chosen: dict[str, list[Phase]] = field(default_factory=dict)


@dataclass(frozen=True)
class Field:
    """One part of the state: how to read it as tensors by name, and how to put it back."""

    get: Callable[[], dict[str, Tensor]]
    put: Callable[[dict[str, Tensor]], None]


def fields(state: TrainState) -> dict[str, Field]:
    """Every tensor of the state, in groups; each group becomes one file."""
    update, method = state.update, state.method

    scaling = {} if update.loss_scale is None else update.loss_scale.state()

    def put_guard(tensors: dict[str, Tensor]) -> None:
        update.skipped.copy_(tensors["skipped"])
        update.skipped_in_a_row = tensors["skipped_in_a_row"].to(update.skipped.device, copy=True)
        for name, value in scaling.items():
            value.copy_(tensors[name])

    def put_average(tensors: dict[str, Tensor]) -> None:
        for name, weights in update.average.weights.items():
            weights.copy_(tensors[name])

    return {
        "model": Field(method.state_dict, method.load_state_dict),
        "optimizer": Field(
            lambda: state_tensors(update.optimizer), lambda tensors: load_state_tensors(update.optimizer, tensors)
        ),
        "average": Field(lambda: dict(update.average.weights), put_average),
        "guard": Field(
            lambda: {"skipped": update.skipped, "skipped_in_a_row": update.skipped_in_a_row} | scaling, put_guard
        ),
    }


def position(state: TrainState) -> dict:
    """What is not tensors, as JSON."""
    return {
        "method": state.method.name,
        "stage": state.stage,
        "step": state.step,
        "bad_files": [list(entry) for entry in state.bad_files],
        "spikes": asdict(state.spikes),
        "chosen": {stage: [asdict(phase) for phase in phases] for stage, phases in state.chosen.items()},
    }


def content(state: TrainState) -> Content:
    """The tensors of every field, as they lie where the next update changes them."""
    return {name: {key: value.detach() for key, value in field.get().items()} for name, field in fields(state).items()}


class HostCopy:
    """Host memory that takes copies of the state, one after another: its first use costs ten times what a copy does.

    Tensors that share storage are copied apart, as safetensors asks.
    """

    def __init__(self) -> None:
        self._room: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def make_room(self, tensors: Content) -> None:
        """For copies of tensors like these: pinned where they lie on a GPU, so that it copies while the host goes on."""
        for name, named in tensors.items():
            for key, value in named.items():
                room = self._room.get((name, key))
                if room is None or room.shape != value.shape or room.dtype != value.dtype:
                    room = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                    room.reshape(-1).view(torch.uint8).numpy().fill(0)  # touched, by this thread alone
                    self._room[name, key] = room

    @torch.no_grad()
    def take(self, tensors: Content) -> Content:
        """The copy, in place of the one before. Of what lies on a GPU it is there after `wait`, and as it is now: the stream that
        updates it copies it, so what changes it later comes after the copy."""
        self.make_room(tensors)
        found = {name: {key: self._room[name, key] for key in named} for name, named in tensors.items()}
        for name, named in tensors.items():
            for key, value in named.items():
                found[name][key].copy_(value, non_blocking=True)
        on_gpu = any(value.is_cuda for named in tensors.values() for value in named.values())
        self._copied = torch.cuda.current_stream().record_event() if on_gpu else None
        return found

    def wait(self) -> None:
        """Until the copy is there; any thread may."""
        if self._copied is not None:
            self._copied.synchronize()


@torch.no_grad()
def restore(state: TrainState, tensors: dict[str, dict[str, Tensor]], where: dict) -> None:
    """Put a checkpoint's content back into a freshly built state.

    Raises:
        BadInput: it is that of another method, model or version.
    """
    wanted = fields(state)
    if tensors.keys() != wanted.keys():
        raise BadInput(
            f"the checkpoint holds {', '.join(sorted(tensors))}, and this run needs {', '.join(sorted(wanted))}."
        )
    for name, part in wanted.items():
        try:
            part.put(tensors[name])
        except (KeyError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise BadInput(
                f"the checkpoint's {name} does not fit this run ({first}); resume it by the version that wrote it."
            ) from error
    state.stage, state.step = where["stage"], where["step"]
    state.bad_files[:] = [tuple(entry) for entry in where["bad_files"]]
    state.spikes = Spikes(**where.get("spikes", {}))  # earlier versions remembered nothing
    chosen = where.get("chosen", {})  # and chose nothing
    state.chosen = {stage: [Phase.read(phase) for phase in phases] for stage, phases in chosen.items()}
