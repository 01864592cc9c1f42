"""Matrices taken some rows at a time, so that what is made of them stays small. B rows, K columns."""

from collections.abc import Iterator

from torch import Tensor


def row_chunks(x_BK: Tensor) -> Iterator[slice]:
    """All rows of [B, K], in order; none for B = 0."""
    step = rows_at_once(x_BK)
    return (slice(start, min(start + step, len(x_BK))) for start in range(0, len(x_BK), step))


def rows_at_once(x_BK: Tensor) -> int:
    """At least 1."""
    # a CPU keeps 1 MB of fp32 in its cache; a GPU wants few, large launches
    elements = 2**18 if x_BK.device.type == "cpu" else 2**26
    return max(1, elements // x_BK.shape[1])
