"""What calibration gives packed_attention, and which parts of it are held against float64."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DRAWN = 6  # sequences beside the first and the last


def fill(name: str, value: Any, arguments: Mapping[str, Any]) -> Any:
    """Keys of half of each sequence, where some tokens are no keys."""
    if name == "kv_lengths" and value is not None:
        return (arguments["cu_seqlens"].diff() + 1) // 2
    return value


def slices(
    call: str, arguments: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Callable[[Sequence[Tensor]], list[Tensor]]]]:
    """The first, the last and some drawn sequences, each as a call of its own, and what picks its outputs from the whole's."""
    ends = arguments["cu_seqlens"].tolist()
    sequences = len(ends) - 1
    drawn = torch.randint(sequences, (DRAWN,), generator=torch.Generator().manual_seed(0)).tolist() if sequences else []
    for s in sorted({0, sequences - 1, *drawn}) if sequences else []:
        rows = slice(ends[s], ends[s + 1])
        part = dict(arguments)
        for name in ("qkv", "out", "grad_out"):
            if name in part:
                part[name] = part[name][rows]
        if "lse" in part:
            part["lse"] = part["lse"][:, rows].contiguous()
        part["cu_seqlens"] = torch.tensor(
            [0, rows.stop - rows.start], dtype=torch.int32, device=arguments["cu_seqlens"].device
        )
        if part["kv_lengths"] is not None:
            part["kv_lengths"] = part["kv_lengths"][s : s + 1]
        yield part, lambda outputs, rows=rows: _picked(call, outputs, rows)


def _picked(call: str, outputs: Sequence[Tensor], rows: slice) -> list[Tensor]:
    if call == "packed_attention_backward":
        return [outputs[0][rows]]
    out_THD, lse_HT = outputs
    return [out_THD[rows], lse_HT[:, rows]]
