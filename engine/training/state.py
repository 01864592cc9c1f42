"""The one list of what a checkpoint holds.

Whatever a step reads and the next step needs is named in `fields`, or is a pure function of the run's configuration and the
position (data order, crops, masks, neighbour draws, schedules: see engine/core/draws.py and engine/data/pipeline.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.methods.base import Method
from engine.training.optimizers import load_state_tensors, state_tensors
from engine.training.step import Update


@dataclass
class TrainState:
    """A run at a moment.

    Attributes:
        stage: index of the stage in the recipe.
        step: updates made in this stage.
        bad_files: (path, reason) of files that were found bad while training and replaced.
    """

    method: Method
    update: Update
    stage: int
    step: int
    bad_files: list[tuple[str, str]]


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
    }


def to_host(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """A copy of every field in host memory. Tensors that share storage are cloned apart, as safetensors asks."""
    return {
        name: {key: value.detach().to("cpu", copy=True).contiguous() for key, value in field.get().items()}
        for name, field in fields(state).items()
    }


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
    for name, field in wanted.items():
        try:
            field.put(tensors[name])
        except (KeyError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise BadInput(
                f"the checkpoint's {name} does not fit this run ({first}); resume it by the version that wrote it."
            ) from error
    state.stage, state.step = where["stage"], where["step"]
    state.bad_files[:] = [tuple(entry) for entry in where["bad_files"]]
