"""What calibration gives adamw."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PROVED = 8  # tensors whose results are compared with float64


def fill(name: str, value: Any, arguments: Mapping[str, Any]) -> Any:
    """Squares from 0, some steps taken, and scales whose reciprocal is exact, in whatever form an implementation takes them."""
    if name == "squares":
        return [square.abs_() for square in value]
    if name == "step":
        return value.fill_(7)
    if name == "applied" and value is not None:
        return value.fill_(True)
    if name == "scales" and value is not None:
        return value.fill_(0.5) if not value.ndim else value.copy_(0.5 ** (torch.arange(len(value)) % 3))
    return value


def slices(
    name: str, arguments: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Callable[[list[Tensor]], list[Tensor]]]]:
    """The first tensors, the last, and some between, together."""
    count = len(arguments["parameters"])
    some = sorted({round(place) for place in torch.linspace(0, count - 1, min(count, PROVED)).tolist()})
    part = {
        key: [value[i] for i in some] if isinstance(value, list) and value else value
        for key, value in arguments.items()
    }
    if part["scales"] is not None and part["scales"].ndim:
        part["scales"] = part["scales"][some]

    def pick(found: list[Tensor]) -> list[Tensor]:
        """Of what was written: parameters, gradients, moments, squares and averages of these tensors."""
        return [found[first + i] for first in range(0, len(found), count) for i in some]

    yield part, pick


def comparable(outputs: list[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
    """All but the gradients, of which nothing is promised."""
    count = len(arguments["parameters"])
    return outputs[:count] + outputs[2 * count :]
