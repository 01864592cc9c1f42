"""Implementations of info_nce that misbehave, each in one way, and two that do not; imported where they are to be known."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.choice import AVAILABLE
from kernels.info_nce import reference

_kept: list[Tensor] = []
_turns = count()
_known: dict[int, Any] = {}


def _off(results: Any, by: float) -> Any:
    first, second = results
    return first + by * first.abs().max(), second


def _unwritten(results: Any) -> Any:
    return tuple(torch.empty_like(x) for x in results)


def _leaks(results: Any) -> Any:
    _kept.append(results[0].new_empty(1000))
    return results


def _trespasses(results: Any) -> Any:
    own = results[1].new_empty(results[1].shape).copy_(results[1])
    ctypes.memset(own.data_ptr() + own.nbytes, 0, 4)
    return results[0], own


def _differs(results: Any) -> Any:
    up = next(_turns) // 2 % 2  # forward and backward take one each
    return (torch.nextafter(results[0], torch.full_like(results[0], torch.inf)) if up else results[0]), results[1]


def _slowly(results: Any) -> Any:
    time.sleep(0.05)
    return results


def _changes_its_input(queries: Tensor, *_: Any) -> None:
    queries[0, 0] += 1


def _always(act: Callable[..., Any]) -> dict[str, Callable]:
    """Both directions do this to what the reference gives."""
    return {
        "forward": lambda *inputs: act(reference.forward(*inputs)),
        "backward": lambda *inputs: act(reference.backward(*inputs)),
    }


def _before(act: Callable[..., Any]) -> dict[str, Callable]:
    """Forward does this first."""
    return {"forward": lambda *inputs: (act(*inputs), reference.forward(*inputs))[1], "backward": reference.backward}


def _remembered(direction: str) -> Callable:
    """Right, and faster than anything that computes: the answer to the same question."""

    def answer(*inputs: Any) -> Any:
        question = (direction, *(x.data_ptr() if isinstance(x, Tensor) and x.ndim > 1 else 0 for x in inputs))
        if question not in _known:
            _known[question] = tuple(x.clone() for x in getattr(reference, direction)(*inputs))
        return tuple(x.clone() for x in _known[question])

    return answer


def _runs_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _refuses(*_: Any) -> None:
    raise ValueError("info_nce in this form takes rows of 7 channels, got others")


FORMS: dict[str, dict[str, Callable]] = {
    "wrong": {"forward": lambda *inputs: _off(reference.forward(*inputs), 1e-2), "backward": reference.backward},
    "wrong_gradient": {
        "forward": reference.forward,
        "backward": lambda *inputs: _off(reference.backward(*inputs), 1e-2),
    },
    "unwritten": _always(_unwritten),
    "crashes": _before(lambda *_: os.kill(os.getpid(), signal.SIGSEGV)),
    "hangs": _before(lambda *_: time.sleep(3600)),
    "leaks": _always(_leaks),
    "trespasses": _always(_trespasses),
    "changes_its_input": _before(_changes_its_input),
    "refuses": _before(_refuses),
    "runs_out_of_memory": _before(_runs_out_of_memory),
    "differs": _always(_differs),
    "slower": _always(_slowly),
    "faster": {direction: _remembered(direction) for direction in ("forward", "backward")},
}
NAMES = ("reference", *FORMS, "missing")


def plant() -> None:
    """Make them implementations of info_nce in this process; "missing" has a name and no module."""
    AVAILABLE["info_nce"] = NAMES
    for name, functions in FORMS.items():
        module = ModuleType(f"kernels.info_nce.{name}")
        vars(module).update(functions)
        sys.modules[module.__name__] = module
