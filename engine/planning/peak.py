"""What lies in a GPU's memory at a step's peak, by what it is for, from the allocator's own record of one step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.training.step import Update

PARTS = ("weights", "averages", "optimiser", "gradients", "activations", "heads and losses", "temporaries")
GROWING = PARTS[4:]  # with the images of a step
_HEADS, _BLOCKS = ("engine/methods/", "engine/model/heads"), "engine/model/"


@dataclass
class Peak:
    """Bytes at a step's peak, by part; filled when the step has been taken.

    weights: parameters and buffers, a teacher's too. averages: of the weights, beside them. optimiser: its moments. gradients: of
    the weights. activations: made by the forward pass of encoder and decoders, and kept. heads and losses: likewise, by all else
    of a method. temporaries: made by backward and the update, and what else was there.
    """

    bytes: dict[str, int] = field(default_factory=dict)


@contextmanager
def recorded(update: Update) -> Iterator[Peak]:
    """Around one warm step of an update."""
    peak, of_gradients = Peak(), set()
    hook = update.optimizer.register_step_pre_hook(
        lambda *_: of_gradients.update(p.grad.data_ptr() for p in update.trained if p.grad is not None)
    )
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=10_000_000)
    try:
        yield peak
        events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
        hook.remove()
    standing = _standing(update)
    peak.bytes = standing | _made(events, of_gradients)
    peak.bytes["temporaries"] += max(0, before - sum(standing.values()))


def _standing(update: Update) -> dict[str, int]:
    """What outlives a step."""
    method, seen = update.method, set()

    def new(tensors: Iterable[Tensor]) -> int:
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.is_cuda}
        fresh = found.keys() - seen
        seen.update(fresh)
        return sum(found[place] for place in fresh)

    return {
        "weights": new([*method.parameters(), *method.buffers()]),
        "averages": new(
            average for one in [*method.averages(), *update.average.averages(1)] for average, _ in one.pairs
        ),
        "optimiser": new(
            t for state in update.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        ),
    }


def _made(events: list[dict[str, Any]], of_gradients: set[int]) -> dict[str, int]:
    """What was made during the step and lay there at its peak."""
    alive: dict[int, tuple[int, int]] = {}  # by address the size, and which event made it
    now = most = 0
    at_peak: dict[int, tuple[int, int]] = {}
    last_made: dict[int, int] = {}
    for number, event in enumerate(events):
        if event["action"] == "alloc":
            alive[event["addr"]] = (event["size"], number)
            last_made[event["addr"]] = number
            now += event["size"]
            if now > most:
                most, at_peak = now, dict(alive)
        elif event["action"] == "free_completed":
            size, _ = alive.pop(event["addr"], (0, 0))
            now -= size
    parts = dict.fromkeys(PARTS[3:], 0)
    for address, (size, number) in at_peak.items():
        is_gradient = address in of_gradients and last_made[address] == number
        parts["gradients" if is_gradient else _part(events[number].get("frames", []))] += size
    return parts


def _part(frames: list[dict[str, Any]]) -> str:
    """By the innermost of our own files that asked for it."""
    for frame in frames:
        name = frame["filename"]
        if "site-packages" in name:
            continue
        if any(place in name for place in _HEADS):
            return "heads and losses"
        if _BLOCKS in name:
            return "activations"
    return "temporaries"
