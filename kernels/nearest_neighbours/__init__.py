"""Nearest neighbours by inner product in a large set of keys, without the matrix of all similarities.

B queries, M keys, C channels, k neighbours.

Why an op: a look-up of 4096 queries in a queue of 65,536 keys would write 1 GB of similarities to read them once for
the best of each row; the compiler does not fuse a top-k into a matrix product. Floor: read queries and keys once, write
k pairs per query, 2 B M C flops (see `cost`).

Every implementation is a module with this function:
    forward(queries, keys, k, query_ids, key_ids) -> (similarity[B,k], index[B,k])
similarity is fp64 for fp64 input, else fp32.
"""

import torch
from torch import Tensor

from kernels.checks import DTYPES
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of

torch.library.define(
    "tessera::nearest_neighbours",
    "(Tensor queries, Tensor keys, SymInt k, Tensor? query_ids, Tensor? key_ids, str implementation)"
    " -> (Tensor, Tensor)",
)


def nearest_neighbours(
    queries: Tensor, keys: Tensor, k: int = 1, query_ids: Tensor | None = None, key_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k keys of largest inner product with each query, best first; a look-up, so no gradient flows.

    Args:
        queries: [B, C], fp16, bf16, fp32 or fp64, used as they are (normalise them for a cosine).
        keys: [M, C] in the dtype of queries.
        k: how many, at least 1; more than M is allowed.
        query_ids: int64 [B], any numbers; with key_ids or not at all.
        key_ids: int64 [M]: keys whose id equals the query's are skipped, such as other views of the same image in a
            queue.

    Returns:
        similarity [B, k], fp64 for fp64 input, else fp32, and index int64 [B, k] into keys. Where fewer than k keys
        remain for a query, its last places hold similarity -inf and index -1. Among equal similarities, k = 1 takes the
        lowest index.

    Raises:
        ValueError: for a shape, dtype, device or k that is not the above.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"nearest_neighbours needs queries [B, C] and keys [M, C], got {list(queries.shape)} and {list(keys.shape)}"
        )
    if queries.dtype != keys.dtype or queries.dtype not in DTYPES or queries.device != keys.device:
        raise ValueError(
            "nearest_neighbours needs queries and keys in one of float16, bfloat16, float32 and float64 on one device, "
            f"got {queries.dtype} on {queries.device} and {keys.dtype} on {keys.device}"
        )
    if k < 1:
        raise ValueError(f"nearest_neighbours needs k of at least 1, got {k}")
    if (query_ids is None) != (key_ids is None):
        raise ValueError("nearest_neighbours needs query_ids and key_ids together, got only one of them")
    if query_ids is not None and key_ids is not None:
        for name, ids, of in (("query_ids", query_ids, queries), ("key_ids", key_ids, keys)):
            if ids.shape != of.shape[:1] or ids.dtype != torch.int64 or ids.device != of.device:
                raise ValueError(
                    f"nearest_neighbours needs {name} as int64 [{of.shape[0]}] on {of.device}, "
                    f"got {ids.dtype} {list(ids.shape)} on {ids.device}"
                )
    shape_class = _shape_class(queries, keys, k)
    implementation = chosen("nearest_neighbours", queries.device, "nearest_neighbours", shape_class)
    return torch.ops.tessera.nearest_neighbours(queries.detach(), keys.detach(), k, query_ids, key_ids, implementation)


def cost(queries: int, keys: int, channels: int, element_size: int, k: int = 1) -> Cost:
    """Floor of one look-up."""
    return Cost((queries + keys) * channels * element_size + 12 * queries * k, 2 * queries * keys * channels)


def _shape_class(queries: Tensor, keys: Tensor, k: int, *_: object) -> str:
    return f"{name_of(queries.dtype)} C{queries.shape[1]} k{k}"


@implement("tessera::nearest_neighbours", _shape_class)
def _forward(queries, keys, k, query_ids, key_ids, implementation):
    return load("nearest_neighbours", implementation).forward(queries, keys, k, query_ids, key_ids)


@torch.library.register_fake("tessera::nearest_neighbours")
def _forward_fake(queries, keys, k, query_ids, key_ids, implementation):
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=wide), queries.new_empty(shape, dtype=torch.int64)
