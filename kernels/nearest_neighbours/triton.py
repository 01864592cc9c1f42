"""Nearest neighbours in Triton: a matrix product over tiles of keys whose similarities never leave the chip.

B queries, M keys, C channels, k neighbours, S splits of the keys; R queries and K keys per tile.

A program keeps R queries and walks through one split of the keys, so that few queries fill the chip as well; queries are
the fastest axis of the grid, so that the programs which read the same keys run together and share the second-level
cache. For k = 1 the best similarity and its index stay in registers. For k > 1 they hold a list of the k best per query,
in no order: a tile is asked for its best key as long as that one beats the worst of the list, which soon is rare (k ln(M
/ k) times per query for keys in random order). Similarity and index are one int64 there, so no two entries are equal and
the lower index wins. Splits are merged in a second step; between the two lie B S k pairs, at most 16 MB.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant, chip_class

_LARGEST_K = 1024
_TEMPORARY_BYTES = 2**24
# a place in the list that no key fills yet lies below every similarity, one beyond k above all of them
_VACANT = tl.constexpr(-(2**63))
_CLOSED = tl.constexpr(2**63 - 1)


class _Tile(NamedTuple):
    """What a program works on: queries, keys, channels at a time, and places in the list."""

    queries: int
    keys: int
    channels: int
    # of the k best; 1 for none
    places: int
    # all channels: the tile of queries is loaded once
    whole: bool
    warps: int
    stages: int

    def constants(self, ids: bool) -> dict[str, int]:
        sizes = {"IDS": ids, "BLOCK_R": self.queries, "BLOCK_K": self.keys, "BLOCK_C": self.channels}
        return sizes | ({"WHOLE": self.whole} if self.places == 1 else {"LIST": self.places})


@triton.jit
def _load(x, row_R, rows, channel_C, channels, stride_row, stride_channel):
    inside_RC = (row_R < rows)[:, None] & (channel_C < channels)[None, :]
    return tl.load(
        x + row_R.to(tl.int64)[:, None] * stride_row + channel_C[None, :] * stride_channel, mask=inside_RC, other=0.0
    )


@triton.jit
def _similarity(
    whole_RC, queries, keys, query_ids, key_ids, query_R, key_K, B, M, C,
    stride_q, stride_qc, stride_k, stride_kc, stride_qi, stride_ki,
    IDS: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """[R, K] in fp32, -inf where a key is not there or has the query's id."""
    channel_C = tl.arange(0, BLOCK_C)
    if WHOLE:
        keys_KC = _load(keys, key_K, M, channel_C, C, stride_k, stride_kc)
        similarity_RK = tl.dot(whole_RC, keys_KC.T, input_precision="ieee")
    else:
        similarity_RK = tl.zeros([query_R.shape[0], key_K.shape[0]], tl.float32)
        for first in range(0, C, BLOCK_C):
            queries_RC = _load(queries, query_R, B, first + channel_C, C, stride_q, stride_qc)
            keys_KC = _load(keys, key_K, M, first + channel_C, C, stride_k, stride_kc)
            similarity_RK = tl.dot(queries_RC, keys_KC.T, similarity_RK, input_precision="ieee")
    eligible_RK = (key_K < M)[None, :]
    if IDS:
        query_id_R = tl.load(query_ids + query_R.to(tl.int64) * stride_qi, mask=query_R < B, other=0)
        key_id_K = tl.load(key_ids + key_K.to(tl.int64) * stride_ki, mask=key_K < M, other=0)
        eligible_RK = eligible_RK & (query_id_R[:, None] != key_id_K[None, :])
    return tl.where(eligible_RK, similarity_RK, -float("inf"))


@triton.jit
def _nearest(
    queries, keys, query_ids, key_ids, value_out, index_out, B, M, C, keys_per_split,
    stride_q, stride_qc, stride_k, stride_kc, stride_qi, stride_ki,
    IDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Best of a split for k = 1, [S, B]."""
    query_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * keys_per_split
    whole_RC = None
    if WHOLE:
        whole_RC = _load(queries, query_R, B, tl.arange(0, BLOCK_C), C, stride_q, stride_qc)
    best_R = tl.full([BLOCK_R], -float("inf"), tl.float32)
    index_R = tl.full([BLOCK_R], -1, tl.int32)
    for first in range(start, tl.minimum(start + keys_per_split, M), BLOCK_K):
        similarity_RK = _similarity(
            whole_RC, queries, keys, query_ids, key_ids, query_R, first + tl.arange(0, BLOCK_K), B, M, C,
            stride_q, stride_qc, stride_k, stride_kc, stride_qi, stride_ki, IDS, BLOCK_C, WHOLE,
        )  # fmt: skip
        value_R, place_R = tl.max(similarity_RK, 1, return_indices=True)
        # an equal one further on does not win
        better_R = value_R > best_R
        best_R = tl.where(better_R, value_R, best_R)
        index_R = tl.where(better_R, first + place_R, index_R)
    out_R = tl.program_id(1).to(tl.int64) * B + query_R
    tl.store(value_out + out_R, best_R, mask=query_R < B)
    tl.store(index_out + out_R, index_R, mask=query_R < B)


@triton.jit
def _nearest_of_splits(value, index, value_out, index_out, B, S, BLOCK_R: tl.constexpr):
    query_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    best_R = tl.full([BLOCK_R], -float("inf"), tl.float32)
    index_R = tl.full([BLOCK_R], -1, tl.int64)
    for split in range(0, S):
        place_R = tl.cast(split, tl.int64) * B + query_R
        value_R = tl.load(value + place_R, mask=query_R < B, other=-float("inf"))
        better_R = value_R > best_R
        best_R = tl.where(better_R, value_R, best_R)
        index_R = tl.where(better_R, tl.load(index + place_R, mask=query_R < B, other=-1), index_R)
    tl.store(value_out + query_R, best_R, mask=query_R < B)
    tl.store(index_out + query_R, index_R, mask=query_R < B)


@triton.jit
def _best_entry(similarity_RK, first):
    """The best key of each row, whether there is one, its place, and (similarity, index) as an int64 of that order."""
    value_R, place_R = tl.max(similarity_RK, 1, return_indices=True)
    bits_R = value_R.to(tl.int32, bitcast=True)
    # floats order as integers of sign and magnitude
    order_R = bits_R ^ ((bits_R >> 31) & 0x7FFFFFFF)
    entry_R = (order_R.to(tl.int64) << 32) | (0x7FFFFFFF - (first + place_R)).to(tl.int64)
    return value_R > -float("inf"), place_R, entry_R


@triton.jit
def _candidates(
    queries, keys, query_ids, key_ids, out, B, M, C, k, keys_per_split,
    stride_q, stride_qc, stride_k, stride_kc, stride_qi, stride_ki,
    IDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The k best entries of a split, [B, S, k]."""
    query_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * keys_per_split
    slot_L = tl.arange(0, LIST)
    empty_L = tl.where(slot_L < k, _VACANT + slot_L.to(tl.int64), _CLOSED)
    list_RL = tl.broadcast_to(empty_L[None, :], [BLOCK_R, LIST])
    worst_R = tl.min(list_RL, 1)
    for first in range(start, tl.minimum(start + keys_per_split, M), BLOCK_K):
        similarity_RK = _similarity(
            None, queries, keys, query_ids, key_ids, query_R, first + tl.arange(0, BLOCK_K), B, M, C,
            stride_q, stride_qc, stride_k, stride_kc, stride_qi, stride_ki, IDS, BLOCK_C, False,
        )  # fmt: skip
        there_R, place_R, entry_R = _best_entry(similarity_RK, first)
        enters_R = there_R & (entry_R > worst_R)
        while tl.max(enters_R.to(tl.int32), 0) > 0:
            list_RL = tl.where((list_RL == worst_R[:, None]) & enters_R[:, None], entry_R[:, None], list_RL)
            worst_R = tl.min(list_RL, 1)
            taken_RK = tl.arange(0, BLOCK_K)[None, :] == place_R[:, None]
            similarity_RK = tl.where(taken_RK, -float("inf"), similarity_RK)
            there_R, place_R, entry_R = _best_entry(similarity_RK, first)
            enters_R = there_R & (entry_R > worst_R)
    out_R = (query_R.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * k
    tl.store(out + out_R[:, None] + slot_L[None, :], list_RL, mask=(query_R < B)[:, None] & (slot_L < k)[None, :])


def forward(
    queries_BC: Tensor, keys_MC: Tensor, k: int, query_ids_B: Tensor | None, key_ids_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.nearest_neighbours`; any strides, k up to 1024."""
    if queries_BC.dtype == torch.float64:
        raise ValueError("nearest_neighbours in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it")
    if k > _LARGEST_K:
        raise ValueError(f"nearest_neighbours in Triton takes k up to {_LARGEST_K}, got {k}; the reference takes it")
    (batch, channels), count = queries_BC.shape, len(keys_MC)
    capability, processors = _chip(queries_BC.device)
    tile = _tile(queries_BC.dtype, channels, k, capability, _aligned(queries_BC) and _aligned(keys_MC))
    splits, keys_per_split = _splits(batch, count, k, tile, processors)
    ids = (queries_BC, keys_MC) if query_ids_B is None else (query_ids_B, key_ids_M)
    strides = (*queries_BC.stride(), *keys_MC.stride(), ids[0].stride(0), ids[1].stride(0))
    options = tile.constants(query_ids_B is not None) | {"num_warps": tile.warps, "num_stages": tile.stages}
    grid = triton.cdiv(batch, tile.queries), splits
    new = queries_BC.new_empty
    with torch.cuda.device_of(queries_BC):
        if k > 1:
            entries = new(batch, splits * k, dtype=torch.int64)
            _candidates[grid](
                queries_BC, keys_MC, *ids, entries, batch, count, channels, k, keys_per_split, *strides, **options
            )
            return _unpack(entries.topk(k, 1).values)
        value, index = new(splits, batch, dtype=torch.float32), new(splits, batch, dtype=torch.int64)
        _nearest[grid](
            queries_BC, keys_MC, *ids, value, index, batch, count, channels, keys_per_split, *strides, **options
        )
        if splits > 1:
            value_of_splits, index_of_splits = value, index
            value, index = new(batch, dtype=torch.float32), new(batch, dtype=torch.int64)
            _nearest_of_splits[(triton.cdiv(batch, 128),)](
                value_of_splits, index_of_splits, value, index, batch, splits, BLOCK_R=128, num_warps=4
            )
    return value.view(batch, 1), index.view(batch, 1)


def variants(capability: int) -> list[Variant]:
    """k = 1 at the widths of a queue and of a feature bank, with ids; k > 1 for every length of the list; odd widths."""
    integers = ("B", "M", "C", "keys_per_split", "stride_q", "stride_k")
    ones = {name: 1 for name in ("stride_qc", "stride_kc", "stride_qi", "stride_ki")}
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    asked = [("bf16", channels, 1) for channels in (64, 128, 256, 1024)] + [("fp32", 256, 1)]
    asked += [(name, 1024, k) for name in dtypes for k in (20, 200, 1024)]
    asked += [("bf16", 1001, k) for k in (1, 20, 200, 1024)] + [("fp32", 1001, 1)]
    found = []
    for name, channels, k in asked:
        aligned = channels % 16 == 0
        tile = _tile(dtypes[name], channels, k, capability, aligned)
        constants = ones | tile.constants(ids=k == 1)
        pointers = {"queries": f"*{name}", "keys": f"*{name}", "query_ids": "*i64", "key_ids": "*i64"}
        pointers |= {"value_out": "*fp32", "index_out": "*i64"} if k == 1 else {"out": "*i64"}
        signature = pointers | {name: "i32" for name in (*integers, *(["k"] if k > 1 else []))}
        found.append(
            Variant(
                f"{name} C {channels} k {k}", _nearest if k == 1 else _candidates,
                signature | {name: "constexpr" for name in constants}, constants, tile.warps, tile.stages,
                (*pointers, "keys_per_split", *(("C", "stride_q", "stride_k") if aligned else ())),
                matrix=name != "fp32",
            )
        )  # fmt: skip
    merge = {"value": "*fp32", "index": "*i64", "value_out": "*fp32", "index_out": "*i64"}
    signature = merge | {"B": "i32", "S": "i32", "BLOCK_R": "constexpr"}
    found.append(
        Variant("merge k 1", _nearest_of_splits, signature, {"BLOCK_R": 128}, aligned=tuple(merge), matrix=False)
    )
    return found


def _tile(dtype: torch.dtype, channels: int, k: int, capability: int, aligned: bool) -> _Tile:
    places = next(places for places in (1, 32, 256, _LARGEST_K) if k <= places)
    queries, keys = {1: (128, 128), 32: (64, 128), 256: (32, 128), _LARGEST_K: (16, 128)}[places]
    if not aligned:
        # what cannot be copied 16 bytes at a time passes through registers on its way
        keys, width = (32, 16) if dtype == torch.float32 else (64, 32)
        return _Tile(min(queries, 64), keys, width, places, False, 8, 2)
    if dtype == torch.float32:
        return _Tile(queries, keys if k == 1 else 64, 16, places, False, 8, 3)
    if k > 1 or channels > 256:
        return _Tile(queries, keys, 64, places, False, 8, 3)
    width = max(64, triton.next_power_of_2(channels))
    if width == 256 and capability < 90:
        # 99 KB of shared memory hold 64 queries beside two tiles of keys
        return _Tile(64 if capability == 86 else queries, 64, width, places, True, 8, 3)
    if width == 128 and capability == 86:
        return _Tile(queries, 64, width, places, True, 8, 3)
    # at 256 channels, two tiles of keys beside the queries fill Hopper's shared memory
    return _Tile(queries, keys, width, places, True, 8, 3 if width < 256 else 2)


def _aligned(x_RC: Tensor) -> bool:
    return x_RC.stride(1) == 1 and x_RC.stride(0) % 16 == 0 and x_RC.shape[1] % 16 == 0


def _splits(batch: int, count: int, k: int, tile: _Tile, processors: int) -> tuple[int, int]:
    """(S, keys per split): one program per processor if there are keys enough, within the temporary memory."""
    blocks = max(1, triton.cdiv(count, tile.keys))
    row_blocks = max(1, triton.cdiv(batch, tile.queries))
    splits = min(max(1, processors // row_blocks), max(1, _TEMPORARY_BYTES // max(1, 8 * batch * k)), blocks)
    per_split = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, per_split), per_split * tile.keys


def _unpack(entries: Tensor) -> tuple[Tensor, Tensor]:
    order = (entries >> 32).to(torch.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    vacant = entries < _VACANT.value + 2**32
    return value.masked_fill_(vacant, -torch.inf), (0x7FFFFFFF - (entries & 0xFFFFFFFF)).masked_fill_(vacant, -1)


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(class of chips, processors); the interpreter passes for a small chip."""
    if device.type == "cpu":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return chip_class(properties.major, properties.minor), properties.multi_processor_count
