"""What calibration gives nearest_neighbours, and what it compares."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fill(name: str, value: Any, arguments: Mapping[str, Any]) -> Any:
    """Rows of length 1; each query's id belongs to one key."""
    if name in ("queries", "keys"):
        return F.normalize(value, dim=1)
    if name in ("query_ids", "key_ids") and value is not None:
        return torch.arange(len(value), device=value.device)
    return value


def comparable(outputs: Sequence[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
    """The similarities, and those of the keys that the indices name: of two equally near either may be named."""
    similarity_Bk, index_Bk = outputs
    named_BkC = arguments["keys"][index_Bk]
    return [similarity_Bk, (named_BkC @ arguments["queries"][:, :, None]).squeeze(2).to(similarity_Bk.dtype)]
