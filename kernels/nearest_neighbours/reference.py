"""Nearest neighbours in plain torch, some keys at a time. B queries, M keys, C channels, R keys at a time."""

import torch
from torch import Tensor

# similarities alive at once: 16 MB in fp32
_ELEMENTS = 2**22


def forward(
    queries_BC: Tensor, keys_MC: Tensor, k: int, query_ids_B: Tensor | None, key_ids_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.nearest_neighbours`."""
    batch, wide = len(queries_BC), torch.promote_types(queries_BC.dtype, torch.float32)
    best_Bk = queries_BC.new_full((batch, k), -torch.inf, dtype=wide)
    index_Bk = torch.full_like(best_Bk, -1, dtype=torch.int64)
    queries_BC = queries_BC.to(wide)
    step = _step(batch, k)
    for start in range(0, len(keys_MC), step):
        similarity_BR = queries_BC @ keys_MC[start : start + step].to(wide).T
        if query_ids_B is not None:
            same_BR = query_ids_B[:, None] == key_ids_M[start : start + step]
            similarity_BR.masked_fill_(same_BR, -torch.inf)
        if k == 1:
            value, index = similarity_BR.max(1, keepdim=True)
            better = value > best_Bk
            best_Bk, index_Bk = torch.where(better, value, best_Bk), torch.where(better, index + start, index_Bk)
            continue
        value, index = similarity_BR.topk(min(k, similarity_BR.shape[1]), dim=1)
        value, index = torch.cat((best_Bk, value), 1), torch.cat((index_Bk, index + start), 1)
        best_Bk, place = value.topk(k, dim=1)
        index_Bk = index.gather(1, place)
    return best_Bk, index_Bk.masked_fill_(best_Bk == -torch.inf, -1)


def _step(batch: int, k: int) -> int:
    # too few keys at a time would spend the time on merging
    return max(_ELEMENTS // max(batch, 1), 4 * k, 256)
