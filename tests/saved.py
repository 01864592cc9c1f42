"""What a checkpoint would hold after an update."""

from torch import Tensor

from engine.methods.base import Method
from engine.training.state import Content, HostCopy, TrainState
from engine.training.state import content as tensors_of
from engine.training.step import Update


def copied(state: TrainState) -> Content:
    """On the CPU."""
    return HostCopy().take(tensors_of(state))


def content(method: Method, update: Update) -> dict[str, Tensor]:
    """By part and name, but for the guard's counts."""
    state = copied(TrainState(method, update, 0, 0, []))
    del state["guard"]
    return {f"{part}/{name}": value for part, named in state.items() for name, value in named.items()}
