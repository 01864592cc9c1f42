"""How the body of an op is registered."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def implement(name: str) -> Callable[[Callable], Callable]:
    """Registers a function as what the op `name` does on every device, with autocast off inside.

    Autocast reaches into a body in eager mode and not in compiled code: products of an fp32 op would then be taken in 16 bit
    forward, and in fp32 backward, which runs outside of it. What dtypes an op computes in is the op's own word.
    """

    def register(body: Callable) -> Callable:
        @wraps(body)
        def as_written(*arguments: Any) -> Any:
            device = next(x.device.type for x in arguments if isinstance(x, Tensor))
            if not torch.is_autocast_enabled(device):
                return body(*arguments)
            with torch.autocast(device, enabled=False):
                return body(*arguments)

        torch.library.impl(name, "CompositeExplicitAutograd")(as_written)
        return body

    return register
