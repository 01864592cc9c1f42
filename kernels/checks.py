"""Checks that ops share. What a GPU's tensors hold is looked at in debug mode only, for each look waits for the GPU."""

import os

import torch
from torch import Tensor

# of the ops that promise these and no others
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checks_values(device: torch.device) -> bool:
    """Whether ops look at the values in tensors on `device` before they trust them: on the CPU always, on a GPU with
    TESSERA_DEBUG=1 in the environment, and nowhere while the compiler traces, for then there are none.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or (device.type == "cuda" and os.environ.get("TESSERA_DEBUG") == "1")


def check_temperature(op: str, name: str, temperature: float | Tensor, implementation: str) -> None:
    """ValueError unless the argument `name` of `op` is a positive number, or, where the implementation is "plain", a tensor of
    no dimensions, whose value is trusted."""
    if isinstance(temperature, Tensor):
        if implementation != "plain" or temperature.ndim:
            raise ValueError(
                f"{op} needs {name} as a number, or in its plain form as a tensor of no dimensions, "
                f"got a tensor {list(temperature.shape)} in {implementation}"
            )
    elif not temperature > 0:
        raise ValueError(f"{op} needs a positive {name}, got {temperature}")


def check_range(op: str, name: str, values: Tensor, end: int) -> None:
    """ValueError where `checks_values` and an element of `values`, the argument `name` of `op`, is not in [0, end)."""
    if not checks_values(values.device) or not values.numel():
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{op} needs {name} between 0 and {end - 1}, got {low if low < 0 else high}")
