"""Relations of tokens in Triton: the nine logits of a pair stay in registers, one class after the other.

B images, N tokens, D channels of one of the 9 classes; inside a program A tokens that are looked at, B tokens that they are
seen from, C channels at a time; in a gradient R rows, which are queries or keys, K columns, which are the others, and D
channels of the rows.

Forward: a program takes a tile of pairs of one image through the classes with a running maximum and sum, and keeps the logit
of the target as it passes. One exponential per logit: of maximum and logit the larger is taken from both, and gives 1.
Backward needs no class but its own, for the log-sum-exp of all nine is known. Up to 64 tokens and 128 channels in 16 bit a
program reads queries and keys of a class once, forms its whole matrix once and multiplies it both ways. Otherwise one kernel
in two roles, a launch each: it owns queries or keys, walks through the others and forms each tile again; gradients above 128
channels are cut into slices. No atomics; torch adds up the parts of the loss.

Neither 42 channels nor 85 is a multiple of 8: a copy is as wide as the strides allow, 4 bytes at 42 in 16 bit, and channels
are padded in registers only.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant

_CLASSES = tl.constexpr(9)
# tokens and channels of the longest image whose matrix of a class one program holds, in 16 bit
_WHOLE_TOKENS, _WHOLE_CHANNELS = 64, 128


class _Tile(NamedTuple):
    """What a program works on: rows, columns, channels at a time, and channels of a gradient."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int
    gradient: int = 0

    def constants(self, rows: str, columns: str | None, channels: str, gradient: str | None = None) -> dict[str, int]:
        """Under the names that a kernel has for them."""
        sizes = {rows: self.rows, columns: self.columns, channels: self.channels, gradient: self.gradient}
        return {name: size for name, size in sizes.items() if name}


@triton.jit
def _load(x, token_R, N, channel_C, D: tl.constexpr, stride_n, stride_d, UNIT: tl.constexpr):
    """Some channels of one class of some tokens, [R, C]; strides are in units, so that the compiler sees their factor."""
    offset_RC = (token_R * stride_n * UNIT)[:, None] + (channel_C * stride_d)[None, :]
    return tl.load(x + offset_RC, mask=(token_R < N)[:, None] & (channel_C < D)[None, :], other=0.0)


@triton.jit
def _products(
    rows, columns, row_R, column_K, N, stride_rn, stride_rd, stride_kn, stride_kd,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Inner products [R, K] of one class in fp32, some channels at a time."""
    if D <= BLOCK_C:
        rows_RC = _load(rows, row_R, N, tl.arange(0, BLOCK_C), D, stride_rn, stride_rd, UNIT)
        columns_KC = _load(columns, column_K, N, tl.arange(0, BLOCK_C), D, stride_kn, stride_kd, UNIT)
        products_RK = tl.dot(rows_RC, columns_KC.T, input_precision="ieee")
    else:
        products_RK = tl.zeros([row_R.shape[0], column_K.shape[0]], tl.float32)
        for first in range(0, D, BLOCK_C):
            channel_C = first + tl.arange(0, BLOCK_C)
            rows_RC = _load(rows, row_R, N, channel_C, D, stride_rn, stride_rd, UNIT)
            columns_KC = _load(columns, column_K, N, channel_C, D, stride_kn, stride_kd, UNIT)
            products_RK = tl.dot(rows_RC, columns_KC.T, products_RK, input_precision="ieee")
    return products_RK


@triton.jit
def _cell(places, token_R, N, columns, stride_pn):
    """Row and column of the grid, [R] each."""
    place_R = tl.load(places + token_R * stride_pn, mask=token_R < N, other=0).to(tl.int32)
    return place_R // columns, place_R % columns


@triton.jit
def _order(first_R, second_K):
    """0, 1 or 2 where the first number is less than the second, equal or more, [R, K]."""
    after_RK = (first_R[:, None] >= second_K[None, :]).to(tl.int32)
    return after_RK + (first_R[:, None] > second_K[None, :]).to(tl.int32)


@triton.jit
def _forward(
    queries, keys, places, lse, parts, N, tiles_a, tiles_b, columns, scale, share,
    stride_qb, stride_qn, stride_qr, stride_qd, stride_kb, stride_kn, stride_kr, stride_kd, stride_pb, stride_pn,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of pairs of one image, and their share of the loss."""
    program = tl.program_id(0)
    image = (program // (tiles_a * tiles_b)).to(tl.int64)
    queries += image * stride_qb * UNIT
    keys += image * stride_kb * UNIT
    places += image * stride_pb
    a_A = program // tiles_b % tiles_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b_B = program % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    row_A, column_A = _cell(places, a_A, N, columns, stride_pn)
    row_B, column_B = _cell(places, b_B, N, columns, stride_pn)
    target_AB = 3 * _order(row_A, row_B) + _order(column_A, column_B)
    largest_AB = tl.full([BLOCK_A, BLOCK_B], -float("inf"), tl.float32)
    sum_AB = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    hit_AB = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for c in range(_CLASSES):
        logits_AB = scale * _products(
            queries + c * stride_qr * UNIT, keys + c * stride_kr * UNIT, a_A, b_B, N,
            stride_qn, stride_qd, stride_kn, stride_kd, D, UNIT, BLOCK_C,
        )  # fmt: skip
        hit_AB = tl.where(target_AB == c, logits_AB, hit_AB)
        smaller_AB = tl.exp(-tl.abs(logits_AB - largest_AB))
        rises_AB = logits_AB > largest_AB
        sum_AB = tl.where(rises_AB, sum_AB * smaller_AB + 1, sum_AB + smaller_AB)
        largest_AB = tl.where(rises_AB, logits_AB, largest_AB)
    lse_AB = largest_AB + tl.log(sum_AB)
    inside_AB = (a_A < N)[:, None] & (b_B < N)[None, :]
    tl.store(lse + image * N * N + a_A[:, None] * N + b_B[None, :], lse_AB, mask=inside_AB)
    tl.store(parts + program, tl.sum(tl.sum(tl.where(inside_AB, lse_AB - hit_AB, 0.0), 1), 0) * share)


@triton.jit
def _backward_whole(
    grad_loss, queries, keys, places, lse, grad_queries, grad_keys, N, columns, scale, share,
    stride_qb, stride_qn, stride_qr, stride_qd, stride_kb, stride_kn, stride_kr, stride_kd, stride_pb, stride_pn,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both gradients of one class of one image."""
    GAIN: tl.constexpr = _gain(queries.dtype.element_ty)
    image, c = (tl.program_id(0) // _CLASSES).to(tl.int64), tl.program_id(0) % _CLASSES
    queries += (image * stride_qb + c * stride_qr) * UNIT
    keys += (image * stride_kb + c * stride_kr) * UNIT
    places += image * stride_pb
    token_N, channel_C = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    queries_NC = _load(queries, token_N, N, channel_C, D, stride_qn, stride_qd, UNIT)
    keys_NC = _load(keys, token_N, N, channel_C, D, stride_kn, stride_kd, UNIT)
    row_N, column_N = _cell(places, token_N, N, columns, stride_pn)
    hit_NN = 3 * _order(row_N, row_N) + _order(column_N, column_N) == c
    inside_NN = (token_N < N)[:, None] & (token_N < N)[None, :]
    lse += image * N * N
    lse_NN = tl.load(lse + token_N[:, None] * N + token_N[None, :], mask=inside_NN, other=float("inf"))
    p_NN = tl.exp(tl.dot(queries_NC, keys_NC.T, input_precision="ieee") * scale - lse_NN)
    p_NN = (tl.where(inside_NN & hit_NN, p_NN - 1, p_NN) * GAIN).to(keys_NC.dtype)
    factor = tl.load(grad_loss).to(tl.float32) * share / GAIN
    offset_NC = token_N[:, None] * (_CLASSES * D) + channel_C[None, :]
    inside_NC = (token_N < N)[:, None] & (channel_C < D)[None, :]
    first = (image * N * _CLASSES + c) * D
    grad_NC = tl.dot(p_NN, keys_NC, input_precision="ieee") * factor
    tl.store(grad_queries + first + offset_NC, grad_NC, mask=inside_NC)
    grad_NC = tl.dot(p_NN.T, queries_NC, input_precision="ieee") * factor
    tl.store(grad_keys + first + offset_NC, grad_NC, mask=inside_NC)


@triton.jit
def _backward(
    grad_loss, own, other, places, lse, out, N, tiles, columns, scale, share,
    stride_rb, stride_rn, stride_rr, stride_rd, stride_kb, stride_kn, stride_kr, stride_kd, stride_pb, stride_pn,
    D: tl.constexpr, UNIT: tl.constexpr, OF_QUERIES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of some rows of one class: of its own queries or keys, by the others, which are columns of the tile."""
    GAIN: tl.constexpr = _gain(own.dtype.element_ty)
    program = tl.program_id(0)
    image, c = (program // (tiles * _CLASSES)).to(tl.int64), program // tiles % _CLASSES
    own += (image * stride_rb + c * stride_rr) * UNIT
    other += (image * stride_kb + c * stride_kr) * UNIT
    places += image * stride_pb
    lse += image * N * N
    row_R = program % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    channel_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    down_R, right_R = _cell(places, row_R, N, columns, stride_pn)
    # all channels at once: a row is loaded once, and a column serves both products
    WHOLE: tl.constexpr = D <= BLOCK_C
    if WHOLE:
        own_RD = _load(own, row_R, N, channel_D, D, stride_rn, stride_rd, UNIT)
    grad_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_K):
        column_K = first + tl.arange(0, BLOCK_K)
        down_K, right_K = _cell(places, column_K, N, columns, stride_pn)
        other_KD = _load(other, column_K, N, channel_D, D, stride_kn, stride_kd, UNIT)
        if WHOLE:
            logits_RK = scale * tl.dot(own_RD, other_KD.T, input_precision="ieee")
        else:
            logits_RK = scale * _products(
                own, other, row_R, column_K, N, stride_rn, stride_rd, stride_kn, stride_kd, D, UNIT, BLOCK_C
            )
        if OF_QUERIES:
            target_RK = 3 * _order(down_R, down_K) + _order(right_R, right_K)
            place_RK = row_R[:, None] * N + column_K[None, :]
        else:
            # what a key sees of a query is the other way round
            target_RK = 8 - 3 * _order(down_R, down_K) - _order(right_R, right_K)
            place_RK = column_K[None, :] * N + row_R[:, None]
        inside_RK = (row_R < N)[:, None] & (column_K < N)[None, :]
        p_RK = tl.exp(logits_RK - tl.load(lse + place_RK, mask=inside_RK, other=float("inf")))
        p_RK = tl.where(inside_RK & (target_RK == c), p_RK - 1, p_RK) * GAIN
        grad_RD = tl.dot(p_RK.to(other_KD.dtype), other_KD, grad_RD, input_precision="ieee")
    grad_RD *= tl.load(grad_loss).to(tl.float32) * share / GAIN
    out += (image * N * _CLASSES + c) * D
    out_RD = row_R[:, None] * (_CLASSES * D) + channel_D[None, :]
    tl.store(out + out_RD, grad_RD, mask=(row_R < N)[:, None] & (channel_D < D)[None, :])


@triton.constexpr_function
def _gain(dtype):
    # the least positive fp16 is large for the probability of a class that is rightly found unlikely
    return 4096.0 if dtype == tl.float16 else 1.0


def forward(
    queries_BNRD: Tensor, keys_BNRD: Tensor, places_BN: Tensor, columns: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.relation_loss`; returns (loss, lse [B, N, N]). Any strides."""
    if queries_BNRD.dtype == torch.float64:
        raise ValueError("relation_loss in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it")
    images, tokens, _, channels = queries_BNRD.shape
    pair = tuple(map(_near, (queries_BNRD, keys_BNRD)))
    unit = _unit(*pair)
    tile = _forward_tile(queries_BNRD.dtype, tokens, channels)
    tiles = triton.cdiv(tokens, tile.rows), triton.cdiv(tokens, tile.columns)
    programs = images * math.prod(tiles)
    lse_BNN = queries_BNRD.new_empty(images, tokens, tokens, dtype=torch.float32)
    parts = queries_BNRD.new_empty(programs, dtype=torch.float32)
    with torch.cuda.device_of(queries_BNRD):
        _forward[(programs,)](
            *pair, places_BN, lse_BNN, parts, tokens, *tiles, columns, scale, 1 / max(lse_BNN.numel(), 1),
            *_in_units(pair[0], unit), *_in_units(pair[1], unit), *places_BN.stride(), D=channels, UNIT=unit,
            **tile.constants("BLOCK_A", "BLOCK_B", "BLOCK_C"), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return parts.sum(), lse_BNN


def backward(
    grad_loss: Tensor,
    queries_BNRD: Tensor,
    keys_BNRD: Tensor,
    places_BN: Tensor,
    lse_BNN: Tensor,
    columns: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.relation`; p less the target is rounded to the dtype of the inputs before it meets them again."""
    images, tokens, _, channels = queries_BNRD.shape
    pair = tuple(map(_near, (queries_BNRD, keys_BNRD)))
    unit = _unit(*pair)
    strides = [_in_units(x, unit) for x in pair]
    share = scale / max(lse_BNN.numel(), 1)
    grads = tuple(x.new_empty(x.shape) for x in pair)
    with torch.cuda.device_of(queries_BNRD):
        if _is_whole(queries_BNRD.dtype, tokens, channels):
            tile = _whole_tile(tokens, channels)
            _backward_whole[(images * _CLASSES.value,)](
                grad_loss, *pair, places_BN, lse_BNN, *grads, tokens, columns, scale, share,
                *strides[0], *strides[1], *places_BN.stride(), D=channels, UNIT=unit,
                **tile.constants("BLOCK_N", None, "BLOCK_C"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return grads
        tile = _backward_tile(queries_BNRD.dtype, tokens, channels)
        tiles = triton.cdiv(tokens, tile.rows)
        for own, other in ((0, 1), (1, 0)):
            _backward[images * _CLASSES.value * tiles, triton.cdiv(channels, tile.gradient)](
                grad_loss, pair[own], pair[other], places_BN, lse_BNN, grads[own], tokens, tiles, columns, scale, share,
                *strides[own], *strides[other], *places_BN.stride(), D=channels, UNIT=unit, OF_QUERIES=own == 0,
                **tile.constants("BLOCK_R", "BLOCK_K", "BLOCK_C", "BLOCK_D"),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return grads


def variants(capability: int) -> list[Variant]:
    """5 x 5, 7 x 7, 8 x 8 and 14 x 14 tokens at the widths of ViT-Ti, S and B, and at others, up to one whose gradient is cut
    in slices."""
    found = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    asked = [("bf16", tokens, channels) for tokens in (49, 64, 196) for channels in (42, 85)]
    asked += [("bf16", 25, 42), ("bf16", 64, 21), ("bf16", 64, 64), ("bf16", 64, 128), ("bf16", 64, 320)]
    asked += [("fp16", 64, 42), ("fp16", 196, 85), ("fp32", 64, 42), ("fp32", 196, 85)]
    for name, tokens, channels in asked:
        dtype = dtypes[name]
        example = torch.empty(1, tokens, 9, channels, dtype=dtype, device="meta")
        unit = _unit(example, example)
        values = {
            f"stride_{x}{axis}": y for x in "qkr" for axis, y in zip("bnr", _in_units(example, unit), strict=False)
        }
        values |= {"N": tokens, "columns": math.isqrt(tokens), "stride_pb": tokens}

        def add(title, kernel, tile, constants, name=name, tokens=tokens, channels=channels, unit=unit, values=values):
            names = kernel.arg_names
            tiles = {"tiles_a": tile.rows, "tiles_b": tile.columns, "tiles": tile.rows}
            integers = values | {key: triton.cdiv(tokens, size) for key, size in tiles.items()}
            integers = {key: value for key, value in integers.items() if key in names}
            # a launch takes a 1 for a constant
            constants = {"D": channels, "UNIT": unit} | constants | {key: 1 for key, y in integers.items() if y == 1}
            constants |= {key: 1 for key in names if key in ("stride_qd", "stride_kd", "stride_rd", "stride_pn")}
            kinds = {key: "i32" for key in integers} | {"places": "*i64", "scale": "fp32", "share": "fp32"}
            kinds |= {key: "*fp32" for key in ("lse", "parts", "grad_loss")} | {key: "constexpr" for key in constants}
            signature = {key: kinds.get(key, f"*{name}") for key in names}
            pointers = (key for key, kind in signature.items() if kind.startswith("*"))
            aligned = (*pointers, *(key for key, value in integers.items() if value % 16 == 0))
            title = f"{title} {name} N {tokens} D {channels}"
            matrix = name != "fp32"
            found.append(Variant(title, kernel, signature, constants, tile.warps, tile.stages, aligned, matrix))

        tile = _forward_tile(dtype, tokens, channels)
        add("forward", _forward, tile, tile.constants("BLOCK_A", "BLOCK_B", "BLOCK_C"))
        if _is_whole(dtype, tokens, channels):
            tile = _whole_tile(tokens, channels)
            add("gradients", _backward_whole, tile, tile.constants("BLOCK_N", None, "BLOCK_C"))
            continue
        tile = _backward_tile(dtype, tokens, channels)
        for title, of_queries in (("queries", True), ("keys", False)):
            constants = {"OF_QUERIES": of_queries} | tile.constants("BLOCK_R", "BLOCK_K", "BLOCK_C", "BLOCK_D")
            add(f"gradient of {title}", _backward, tile, constants)
    return found


def _block(size: int, largest: int) -> int:
    """A power of two of at least 16, which matrix instructions ask for."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _forward_tile(dtype: torch.dtype, tokens: int, channels: int) -> _Tile:
    if dtype == torch.float32:
        return _Tile(_block(tokens, 64), _block(tokens, 64), 16, 8 if tokens > 32 else 4, 2)
    return _Tile(_block(tokens, 64), _block(tokens, 32), _channels_at_once(channels), 8 if tokens > 32 else 4, 2)


def _is_whole(dtype: torch.dtype, tokens: int, channels: int) -> bool:
    return dtype != torch.float32 and tokens <= _WHOLE_TOKENS and channels <= _WHOLE_CHANNELS


def _whole_tile(tokens: int, channels: int) -> _Tile:
    size = _block(tokens, _WHOLE_TOKENS)
    return _Tile(size, size, _block(channels, _WHOLE_CHANNELS), 4, 1)


def _backward_tile(dtype: torch.dtype, tokens: int, channels: int) -> _Tile:
    width = _block(channels, 128)
    if dtype == torch.float32:
        return _Tile(
            _block(tokens, 64), _block(tokens, 32 if width <= 64 else 64), 16, 8 if tokens > 32 else 4, 2, width
        )
    return _Tile(_block(tokens, 64), _block(tokens, 32), _channels_at_once(channels), 4, 2, width)


def _channels_at_once(channels: int) -> int:
    """All of up to 64; 85 are padded to three times 32, which also keeps the pointers to them few."""
    return _block(channels, 64) if channels <= 64 else 32


def _near(x_BNRD: Tensor) -> Tensor:
    """With the entries of an image close enough to one another for 32-bit offsets."""
    span = sum((size - 1) * stride for size, stride in zip(x_BNRD.shape[1:], x_BNRD.stride()[1:], strict=True))
    return x_BNRD if span < 2**31 else x_BNRD.contiguous()


def _unit(queries_BNRD: Tensor, keys_BNRD: Tensor) -> int:
    """The largest power of two up to 16 that divides all strides but those of channels."""
    return math.gcd(16, *queries_BNRD.stride()[:3], *keys_BNRD.stride()[:3])


def _in_units(x_BNRD: Tensor, unit: int) -> tuple[int, int, int, int]:
    """Strides, those of channels as they are."""
    *outer, stride_d = x_BNRD.stride()
    return (*(stride // unit for stride in outer), stride_d)
