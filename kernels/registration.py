"""How the body of an op is registered, and how it is kept from autocast."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kernels.checks import DTYPES
from kernels.choice import CALLS, Registered

_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def without_autocast(body: Callable) -> Callable:
    """The function with autocast off inside, on the device of its first tensor.

    Autocast reaches into a body in eager mode: products of an fp32 op would then be taken in 16 bit forward, and in fp32
    backward, which runs outside of it. What dtypes an op computes in is the op's own word.
    """

    @wraps(body)
    def as_written(*arguments: Any) -> Any:
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return body(*arguments)
        with torch.autocast(device, enabled=False):
            return body(*arguments)

    return as_written


def implement(name: str, shape_class: Callable[..., str] | None = None) -> Callable[[Callable], Callable]:
    """Registers a function as what the op `name` does on every device, `without_autocast`.

    With `shape_class`, which gives it a class of shapes by the op's arguments but the last, the implementation, calibration tries
    the op's implementations, and the frozen table names one by class.
    """

    def register(body: Callable) -> Callable:
        as_written = without_autocast(body)
        CALLS[name.removeprefix("tessera::")] = Registered(
            body.__module__.removeprefix("kernels."), shape_class, as_written
        )
        torch.library.impl(name, "CompositeExplicitAutograd")(as_written)
        return body

    return register


def name_of(dtype: torch.dtype) -> str:
    """A dtype in a class of shapes."""
    return _NAMES.get(dtype, "other")
