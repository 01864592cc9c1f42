"""InfoNCE in Triton: the softmax over keys is formed tile by tile and never leaves the chip.

B queries, M keys, C channels, S splits; R rows and K columns per tile, D channels of a gradient per program.

Forward: a program keeps R queries and walks through one split of the keys with a running maximum and sum; a second step
of one program merges the splits and sums the loss in a fixed order. Backward: one kernel in two roles. Queries (or keys)
are the rows that a program owns, keys (queries) the columns that it walks through; it forms the softmax of a tile again
from lse, subtracts the one-hot target and multiplies by the tile of columns, which for up to 256 channels is the one it
has just read. Wider gradients are cut into 256 channels per program, each forming the softmax for itself. Where rows are
too few to fill the chip, columns are split as well and the parts summed by torch. No atomics.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant, chip_class

_TEMPORARY_BYTES = 2**24


class _Tile(NamedTuple):
    """What a program works on: rows, columns, channels at a time, and channels of a gradient."""

    rows: int
    columns: int
    channels: int
    # all channels: the tile of rows is loaded once
    whole: bool
    warps: int
    stages: int
    gradient: int = 0

    def constants(self) -> dict[str, int]:
        sizes = {"BLOCK_R": self.rows, "BLOCK_K": self.columns, "BLOCK_C": self.channels, "WHOLE": self.whole}
        return sizes | ({"BLOCK_D": self.gradient} if self.gradient else {})


@triton.jit
def _load(x, row_R, rows, channel_C, channels, stride_row, stride_channel):
    offset_RC = row_R.to(tl.int64)[:, None] * stride_row + channel_C[None, :] * stride_channel
    return tl.load(x + offset_RC, mask=(row_R < rows)[:, None] & (channel_C < channels)[None, :], other=0.0)


@triton.jit
def _products(
    rows, columns, row_R, column_K, row_count, column_count, C,
    stride_r, stride_rc, stride_k, stride_kc, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Inner products [R, K] in fp32, some channels at a time."""
    products_RK = tl.zeros([row_R.shape[0], column_K.shape[0]], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel_C = first + tl.arange(0, BLOCK_C)
        rows_RC = _load(rows, row_R, row_count, channel_C, C, stride_r, stride_rc)
        columns_KC = _load(columns, column_K, column_count, channel_C, C, stride_k, stride_kc)
        products_RK = tl.dot(rows_RC, columns_KC.T, products_RK, input_precision="ieee")
    return products_RK


@triton.jit
def _forward(
    queries, keys, targets, lse, target_logit, B, M, C, scale, keys_per_split,
    stride_q, stride_qc, stride_k, stride_kc, stride_t,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over a split, and the target's logit if it lies there, else 0: [S, B] each."""
    query_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * keys_per_split
    target_R = tl.load(targets + query_R.to(tl.int64) * stride_t, mask=query_R < B, other=-1)
    if WHOLE:
        channel_C = tl.arange(0, BLOCK_C)
        queries_RC = _load(queries, query_R, B, channel_C, C, stride_q, stride_qc)
    largest_R = tl.full([BLOCK_R], -float("inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    hit_R = tl.zeros([BLOCK_R], tl.float32)
    for first in range(start, tl.minimum(start + keys_per_split, M), BLOCK_K):
        key_K = first + tl.arange(0, BLOCK_K)
        if WHOLE:
            keys_KC = _load(keys, key_K, M, channel_C, C, stride_k, stride_kc)
            logits_RK = tl.dot(queries_RC, keys_KC.T, input_precision="ieee") * scale
        else:
            logits_RK = scale * _products(
                queries, keys, query_R, key_K, B, M, C, stride_q, stride_qc, stride_k, stride_kc, BLOCK_C
            )
        hit_R += tl.sum(tl.where(target_R[:, None] == key_K[None, :], logits_RK, 0.0), 1)
        logits_RK = tl.where((key_K < M)[None, :], logits_RK, -float("inf"))
        larger_R = tl.maximum(largest_R, tl.max(logits_RK, 1))
        sum_R = sum_R * tl.exp(largest_R - larger_R) + tl.sum(tl.exp(logits_RK - larger_R[:, None]), 1)
        largest_R = larger_R
    out_R = tl.program_id(1).to(tl.int64) * B + query_R
    tl.store(lse + out_R, largest_R + tl.log(sum_R), mask=query_R < B)
    tl.store(target_logit + out_R, hit_R, mask=query_R < B)


@triton.jit
def _merge(lse_of_splits, target_logit, lse, loss, B, S, share, BLOCK: tl.constexpr):
    """Log-sum-exp over the splits [B] and the mean loss; a single program, so the order of the sum is fixed."""
    sum_R = tl.zeros([BLOCK], tl.float32)
    for first in range(0, B, BLOCK):
        query_R = first + tl.arange(0, BLOCK)
        inside_R = query_R < B
        lse_R = tl.load(lse_of_splits + query_R, mask=inside_R, other=0.0)
        hit_R = tl.load(target_logit + query_R, mask=inside_R, other=0.0)
        for split in range(1, S):
            place_R = tl.cast(split, tl.int64) * B + query_R
            other_R = tl.load(lse_of_splits + place_R, mask=inside_R, other=0.0)
            larger_R = tl.maximum(lse_R, other_R)
            lse_R = larger_R + tl.log(tl.exp(lse_R - larger_R) + tl.exp(other_R - larger_R))
            hit_R += tl.load(target_logit + place_R, mask=inside_R, other=0.0)
        tl.store(lse + query_R, lse_R, mask=inside_R)
        sum_R += tl.where(inside_R, lse_R - hit_R, 0.0)
    tl.store(loss, tl.sum(sum_R, 0) * share)


@triton.jit
def _backward(
    grad_loss, rows, columns, targets, lse, out, row_count, column_count, C, scale, share, columns_per_split,
    stride_r, stride_rc, stride_k, stride_kc, stride_t,
    OF_QUERIES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows by a split of the columns, [S, rows, C]; rows are queries or keys, columns the others."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * columns_per_split
    channel_D = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    # the least positive fp16 is large for a probability among many keys
    GAIN: tl.constexpr = 4096.0 if rows.dtype.element_ty == tl.float16 else 1.0
    if WHOLE:
        rows_RD = _load(rows, row_R, row_count, channel_D, C, stride_r, stride_rc)
    if OF_QUERIES:
        lse_R = tl.load(lse + row_R, mask=row_R < row_count, other=0.0)
        target_R = tl.load(targets + row_R.to(tl.int64) * stride_t, mask=row_R < row_count, other=-1)
    grad_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(start, tl.minimum(start + columns_per_split, column_count), BLOCK_K):
        column_K = first + tl.arange(0, BLOCK_K)
        columns_KD = _load(columns, column_K, column_count, channel_D, C, stride_k, stride_kc)
        if WHOLE:
            logits_RK = tl.dot(rows_RD, columns_KD.T, input_precision="ieee") * scale
        else:
            logits_RK = scale * _products(
                rows, columns, row_R, column_K, row_count, column_count, C,
                stride_r, stride_rc, stride_k, stride_kc, BLOCK_C,
            )  # fmt: skip
        if OF_QUERIES:
            p_RK = tl.exp(logits_RK - lse_R[:, None])
            hit_RK = target_R[:, None] == column_K[None, :]
        else:
            lse_K = tl.load(lse + column_K, mask=column_K < column_count, other=0.0)
            p_RK = tl.exp(logits_RK - lse_K[None, :])
            target_K = tl.load(targets + column_K.to(tl.int64) * stride_t, mask=column_K < column_count, other=-1)
            hit_RK = target_K[None, :] == row_R[:, None]
        inside_RK = (row_R < row_count)[:, None] & (column_K < column_count)[None, :]
        p_RK = tl.where(inside_RK, tl.where(hit_RK, p_RK - 1, p_RK) * GAIN, 0.0)
        grad_RD = tl.dot(p_RK.to(columns_KD.dtype), columns_KD, grad_RD, input_precision="ieee")
    grad_RD *= tl.load(grad_loss).to(tl.float32) * share / GAIN
    out_R = tl.program_id(1).to(tl.int64) * row_count + row_R
    inside_RD = (row_R < row_count)[:, None] & (channel_D < C)[None, :]
    tl.store(out + out_R[:, None] * C + channel_D[None, :], grad_RD, mask=inside_RD)


def forward(queries_BC: Tensor, keys_MC: Tensor, targets_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `kernels.info_nce`; returns (loss, lse [B]). Any strides."""
    if queries_BC.dtype == torch.float64:
        raise ValueError("info_nce in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it")
    (batch, channels), count = queries_BC.shape, len(keys_MC)
    capability, processors = _chip(queries_BC.device)
    tile = _forward_tile(queries_BC.dtype, channels, capability, _aligned(queries_BC) and _aligned(keys_MC))
    splits, keys_per_split = _splits(batch, count, tile, processors, bytes_per_row=8)
    parts_SB, hits_SB = queries_BC.new_empty(2, splits, batch, dtype=torch.float32)
    lse_B, loss = (queries_BC.new_empty(shape, dtype=torch.float32) for shape in (batch, ()))
    with torch.cuda.device_of(queries_BC):
        _forward[triton.cdiv(batch, tile.rows), splits](
            queries_BC, keys_MC, targets_B, parts_SB, hits_SB, batch, count, channels, 1 / temperature, keys_per_split,
            *queries_BC.stride(), *keys_MC.stride(), *targets_B.stride(),
            **tile.constants(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _merge[(1,)](parts_SB, hits_SB, lse_B, loss, batch, splits, 1 / max(batch, 1), BLOCK=1024, num_warps=8)
    return loss, lse_B


def backward(
    grad_loss: Tensor, queries_BC: Tensor, keys_MC: Tensor, targets_B: Tensor, lse_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.info_nce`; p is rounded to the dtype of the inputs before it meets them again."""
    pair = queries_BC, keys_MC
    share = 1 / (max(len(queries_BC), 1) * temperature)
    with torch.cuda.device_of(queries_BC):
        return tuple(
            _gradient(grad_loss, rows, columns, targets_B, lse_B, 1 / temperature, share, rows is queries_BC)
            for rows, columns in (pair, pair[::-1])
        )


def _gradient(
    grad_loss: Tensor,
    rows: Tensor,
    columns: Tensor,
    targets_B: Tensor,
    lse_B: Tensor,
    scale: float,
    share: float,
    of_queries: bool,
) -> Tensor:
    (count, channels), column_count = rows.shape, len(columns)
    capability, processors = _chip(rows.device)
    tile = _backward_tile(rows.dtype, channels, capability, _aligned(rows) and _aligned(columns))
    wide = max(1, triton.cdiv(channels, tile.gradient))
    splits, columns_per_split = _splits(count, column_count, tile, processors // wide, 4 * channels)
    dtype = rows.dtype if splits == 1 else torch.float32
    parts = rows.new_empty(splits, count, channels, dtype=dtype)
    _backward[triton.cdiv(count, tile.rows), splits, wide](
        grad_loss, rows, columns, targets_B, lse_B, parts, count, column_count, channels, scale, share,
        columns_per_split, *rows.stride(), *columns.stride(), *targets_B.stride(),
        OF_QUERIES=of_queries, **tile.constants(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(rows.dtype)


def variants(capability: int) -> list[Variant]:
    """Forward and both gradients at the widths of published projectors, in channels at a time, and at odd widths."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    asked = [("bf16", channels) for channels in (64, 128, 256, 1024, 1001)]
    asked += [("fp16", 256), ("fp32", 256), ("fp32", 1001)]
    found = []
    for name, channels in asked:
        aligned = channels % 16 == 0
        dtype, common = dtypes[name], {"targets": "*i64", "lse": "*fp32"}
        wide = ("C", "stride_q", "stride_r", "stride_k") if aligned else ()

        def add(title, kernel, pointers, floats, integers, constants, tile, name=name, channels=channels, wide=wide):
            signature = pointers | {key: "fp32" for key in floats} | {key: "i32" for key in integers}
            found.append(
                Variant(
                    f"{title} {name} C {channels}", kernel, signature | {key: "constexpr" for key in constants},
                    constants, tile.warps, tile.stages,
                    (*pointers, *(key for key in integers if key in wide or key.endswith("per_split"))),
                    matrix=name != "fp32",
                )
            )  # fmt: skip

        if name != "fp16":
            tile = _forward_tile(dtype, channels, capability, aligned)
            add(
                "forward", _forward, {"queries": f"*{name}", "keys": f"*{name}", "target_logit": "*fp32"} | common,
                ("scale",), ("B", "M", "C", "keys_per_split", "stride_q", "stride_k"),
                {"stride_qc": 1, "stride_kc": 1, "stride_t": 1} | tile.constants(), tile,
            )  # fmt: skip
        tile = _backward_tile(dtype, channels, capability, aligned)
        for of_queries in (True, False):
            add(
                f"gradient of {'queries' if of_queries else 'keys'}", _backward,
                {"grad_loss": "*fp32", "rows": f"*{name}", "columns": f"*{name}", "out": f"*{name}"} | common,
                ("scale", "share"), ("row_count", "column_count", "C", "columns_per_split", "stride_r", "stride_k"),
                {"stride_rc": 1, "stride_kc": 1, "stride_t": 1, "OF_QUERIES": of_queries} | tile.constants(), tile,
            )  # fmt: skip
    merge = {name: "*fp32" for name in ("lse_of_splits", "target_logit", "lse", "loss")}
    signature = merge | {"B": "i32", "S": "i32", "share": "fp32", "BLOCK": "constexpr"}
    found.append(Variant("merge", _merge, signature, {"BLOCK": 1024}, 8, aligned=tuple(merge), matrix=False))
    return found


def _forward_tile(dtype: torch.dtype, channels: int, capability: int, aligned: bool) -> _Tile:
    if not aligned:
        # what cannot be copied 16 bytes at a time passes through registers on its way
        columns, width = (32, 16) if dtype == torch.float32 else (64, 32)
        return _Tile(64, columns, width, False, 8, 2)
    if dtype == torch.float32:
        return _Tile(128, 64, 16, False, 8, 3)
    if channels > 256:
        return _Tile(128, 128, 64, False, 8, 3)
    width = max(64, triton.next_power_of_2(channels))
    if width == 256 and capability < 90:
        # 99 KB of shared memory hold 64 queries beside two tiles of keys
        return _Tile(64 if capability == 86 else 128, 64, width, True, 8, 3)
    # at 256 channels, two tiles of keys beside the queries fill Hopper's shared memory
    return _Tile(128, 128, width, True, 8, 3 if width < 256 else 2)


def _backward_tile(dtype: torch.dtype, channels: int, capability: int, aligned: bool) -> _Tile:
    width = min(256, max(64, triton.next_power_of_2(channels)))
    if not aligned:
        return _Tile(32, 32, 16 if dtype == torch.float32 else 32, False, 8, 2, min(width, 128))
    if dtype == torch.float32:
        return _Tile(64, 32, 16, False, 8, 2, width)
    if channels > 256:
        return _Tile(64, 64, 64, False, 8, 2, width)
    # the largest tiles whose sums and softmax fit into the registers
    rows, columns, stages = {
        64: (128, 64, 2),
        128: (128, 64, 2) if capability >= 90 else (128, 32, 3),
        256: (128, 32, 3) if capability >= 90 else (64, 64, 2),
    }[width]
    return _Tile(rows, columns, width, True, 8, stages, width)


def _aligned(x_RC: Tensor) -> bool:
    return x_RC.stride(1) == 1 and x_RC.stride(0) % 16 == 0 and x_RC.shape[1] % 16 == 0


def _splits(rows: int, columns: int, tile: _Tile, processors: int, bytes_per_row: int) -> tuple[int, int]:
    """(S, columns per split): one program per processor if there are columns enough, within the temporary memory."""
    blocks = max(1, triton.cdiv(columns, tile.columns))
    row_blocks = max(1, triton.cdiv(rows, tile.rows))
    splits = min(max(1, processors // row_blocks), max(1, _TEMPORARY_BYTES // max(1, rows * bytes_per_row)), blocks)
    per_split = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, per_split), per_split * tile.columns


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(class of chips, processors); the interpreter passes for a small chip."""
    if device.type == "cpu":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return chip_class(properties.major, properties.minor), properties.multi_processor_count
