"""Soft cross-entropy in Triton: forward reads a row once, backward once more, and only the gradient is written.

G teacher rows, B student rows, K prototypes, V teacher rows that a student row meets (0: one each, in order), S parts of
the columns; a tile is R rows by J stretches of C neighbouring columns.

Every place [R, C] keeps its own largest entry and its own sums until the end of its part of the columns, so that a tile
costs one exponential per entry and one per place, and threads meet only at the end: the J entries of a place belong to one
thread, as the order of the dimensions makes Triton lay them out. Parts are merged in a fixed order. Teacher and student
are summed together. Where indices name teacher rows, their largest entries and sums are taken first, for all of them
once, and the student's pass forms the sum of the V distributions at once. Programs that run side by side have the same
columns, so a teacher row that several student rows meet comes from the second-level cache. No atomics.

Largest entries are of the logits as they are, a difference to them is exact or nearly so, and only that is divided by the
temperature: an exponent does not suffer from the size of the logits.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant

# below every entry, yet finite: its difference to itself is 0
_LEAST = tl.constexpr(-3.4028234663852886e38)
_WARPS = 4


class _Tile(NamedTuple):
    """What a program works on at a time: rows, and stretches of columns."""

    rows: int
    stretches: int
    columns: int

    def constants(self) -> dict[str, int]:
        return {"R": self.rows, "J": self.stretches, "C": self.columns}

    @property
    def width(self) -> int:
        return self.stretches * self.columns


@triton.jit
def _load(x, row_R, inside_R, column_JC, K, stride_b, stride_k):
    """[R, J, C] in fp32, -inf outside."""
    offset_RJC = row_R.to(tl.int64)[:, None, None] * stride_b + column_JC.to(tl.int64)[None, :, :] * stride_k
    inside_RJC = inside_R[:, None, None] & (column_JC < K)[None, :, :]
    return tl.load(x + offset_RJC, mask=inside_RJC, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_teacher(teacher, centre_RJC, row_R, inside_R, column_JC, K, stride_b, stride_k):
    """[R, J, C]: teacher - centre, -inf outside."""
    return _load(teacher, row_R, inside_R, column_JC, K, stride_b, stride_k) - centre_RJC


@triton.jit
def _load_centre(centre, column_JC, K, R: tl.constexpr):
    """The same for all rows, [R, J, C], so that every thread finds its own columns."""
    if centre is None:
        return 0.0
    else:
        column_RJC = tl.broadcast_to(column_JC[None, :, :], [R, column_JC.shape[0], column_JC.shape[1]])
        return tl.load(centre + column_RJC, mask=column_RJC < K, other=0.0)


@triton.jit
def _columns(first, J: tl.constexpr, C: tl.constexpr):
    return first + tl.arange(0, J)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _targets(
    teacher, centre_RJC, teacher_rows, teacher_sums, row_R, inside_R, column_JC, G, K, scale, stride_g, stride_k,
    V: tl.constexpr,
):  # fmt: skip
    """[R, J, C]: the sum of the teacher's distributions that each row meets; and how many these are, [R]."""
    pairs_R = tl.zeros_like(row_R)
    for v in tl.static_range(max(V, 1)):
        if V == 0:
            teacher_R = tl.where(inside_R, row_R, -1)
        else:
            teacher_R = tl.load(teacher_rows + row_R.to(tl.int64) * V + v, mask=inside_R, other=-1).to(tl.int32)
        there_R = teacher_R >= 0
        largest_R = tl.load(teacher_sums + teacher_R, mask=there_R, other=0.0)
        share_R = 1 / tl.load(teacher_sums + G + teacher_R, mask=there_R, other=1.0)
        x_RJC = _load_teacher(teacher, centre_RJC, teacher_R, there_R, column_JC, K, stride_g, stride_k)
        q_RJC = tl.exp2((x_RJC - largest_R[:, None, None]) * scale) * share_R[:, None, None]
        if v == 0:
            target_RJC = q_RJC
        else:
            target_RJC += q_RJC
        pairs_R += there_R.to(tl.int32)
    return target_RJC, pairs_R


@triton.jit
def _sum_teacher(
    teacher, centre, parts, G, K, scale, columns_per_part, stride_g, stride_k,
    R: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Over a part of the columns, [2, S, G]: largest entry, and sum of exp((entry - largest) / temperature)."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    start = tl.program_id(1) * columns_per_part
    largest_RC = tl.full([R, C], _LEAST, tl.float32)
    total_RC = tl.zeros([R, C], tl.float32)
    for first in range(start, tl.minimum(start + columns_per_part, K), J * C):
        column_JC = _columns(first, J, C)
        centre_RJC = _load_centre(centre, column_JC, K, R)
        x_RJC = _load_teacher(teacher, centre_RJC, row_R, row_R < G, column_JC, K, stride_g, stride_k)
        larger_RC = tl.maximum(largest_RC, tl.max(x_RJC, 1))
        total_RC *= tl.exp2((largest_RC - larger_RC) * scale)
        total_RC += tl.sum(tl.exp2((x_RJC - larger_RC[:, None, :]) * scale), 1)
        largest_RC = larger_RC
    largest_R = tl.max(largest_RC, 1)
    out = parts + tl.program_id(1).to(tl.int64) * G + row_R
    tl.store(out, largest_R, mask=row_R < G)
    total_RC *= tl.exp2((largest_RC - largest_R[:, None]) * scale)
    tl.store(out + tl.num_programs(1).to(tl.int64) * G, tl.sum(total_RC, 1), mask=row_R < G)


@triton.jit
def _merge_teacher(parts, teacher_sums, G, S, scale, R: tl.constexpr):
    """Largest entry and sum of each row, [2, G], over the parts [2, S, G]."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    largest_R = tl.full([R], _LEAST, tl.float32)
    total_R = tl.zeros([R], tl.float32)
    for part in range(0, S):
        place_R = parts + tl.cast(part, tl.int64) * G + row_R
        part_largest_R = tl.load(place_R, mask=row_R < G, other=0.0)
        part_total_R = tl.load(place_R + tl.cast(S, tl.int64) * G, mask=row_R < G, other=1.0)
        largest_R, total_R = _join(largest_R, total_R, part_largest_R, part_total_R, scale)
    tl.store(teacher_sums + row_R, largest_R, mask=row_R < G)
    tl.store(teacher_sums + G + row_R, total_R, mask=row_R < G)


@triton.jit
def _join(largest, total, other_largest, other_total, scale):
    """Sums of two parts, together, each beside the largest entry it refers to."""
    larger = tl.maximum(largest, other_largest)
    total = total * tl.exp2((largest - larger) * scale) + other_total * tl.exp2((other_largest - larger) * scale)
    return larger, total


@triton.jit
def _cross_entropy(
    teacher, centre, teacher_rows, teacher_sums, student, parts, G, B, K, scale, student_scale, columns_per_part,
    stride_g, stride_k, stride_b, stride_bk, V: tl.constexpr, R: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Over a part of the columns, [5, S, B]: largest entry and sum of the student; sum of the targets, and of targets
    times (student - its largest); largest entry of the teacher, to which the targets refer unless V is above 0."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    start = tl.program_id(1) * columns_per_part
    student_largest_RC = tl.full([R, C], _LEAST, tl.float32)
    student_total_RC = tl.zeros([R, C], tl.float32)
    total_RC = tl.zeros([R, C], tl.float32)
    product_RC = tl.zeros([R, C], tl.float32)
    largest_RC = tl.full([R, C], _LEAST, tl.float32)
    for first in range(start, tl.minimum(start + columns_per_part, K), J * C):
        column_JC = _columns(first, J, C)
        centre_RJC = _load_centre(centre, column_JC, K, R)
        y_RJC = _load(student, row_R, row_R < B, column_JC, K, stride_b, stride_bk)
        if V == 0:
            x_RJC = _load_teacher(teacher, centre_RJC, row_R, row_R < B, column_JC, K, stride_g, stride_k)
            larger_RC = tl.maximum(largest_RC, tl.max(x_RJC, 1))
            target_RJC = tl.exp2((x_RJC - larger_RC[:, None, :]) * scale)
            less_RC = tl.exp2((largest_RC - larger_RC) * scale)
            total_RC *= less_RC
            product_RC *= less_RC
            largest_RC = larger_RC
        else:
            target_RJC, _ = _targets(
                teacher, centre_RJC, teacher_rows, teacher_sums, row_R, row_R < B, column_JC, G, K, scale, stride_g,
                stride_k, V,
            )  # fmt: skip
        larger_RC = tl.maximum(student_largest_RC, tl.max(y_RJC, 1))
        below_RJC = y_RJC - larger_RC[:, None, :]
        less_RC = student_largest_RC - larger_RC
        student_total_RC *= tl.exp2(less_RC * student_scale)
        student_total_RC += tl.sum(tl.exp2(below_RJC * student_scale), 1)
        # what was summed before refers to the largest entry from now on
        product_RC += less_RC * total_RC
        below_RJC = tl.where((column_JC < K)[None, :, :], below_RJC, 0.0)
        product_RC += tl.sum(target_RJC * below_RJC, 1)
        total_RC += tl.sum(target_RJC, 1)
        student_largest_RC = larger_RC
    student_largest_R = tl.max(student_largest_RC, 1)
    less_RC = student_largest_RC - student_largest_R[:, None]
    student_total_RC *= tl.exp2(less_RC * student_scale)
    product_RC += less_RC * total_RC
    out = parts + tl.program_id(1).to(tl.int64) * B + row_R
    apart = tl.num_programs(1).to(tl.int64) * B
    if V == 0:
        largest_R = tl.max(largest_RC, 1)
        less_RC = tl.exp2((largest_RC - largest_R[:, None]) * scale)
        total_RC *= less_RC
        product_RC *= less_RC
        tl.store(out + 4 * apart, largest_R, mask=row_R < B)
    tl.store(out, student_largest_R, mask=row_R < B)
    tl.store(out + apart, tl.sum(student_total_RC, 1), mask=row_R < B)
    tl.store(out + 2 * apart, tl.sum(total_RC, 1), mask=row_R < B)
    tl.store(out + 3 * apart, tl.sum(product_RC, 1), mask=row_R < B)


@triton.jit
def _merge(
    parts, weights, teacher_sums, student_sums, losses, B, S, scale, student_scale, temperature, V: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """Over the parts [5, S, B]: largest entries and sums, [2, B] each (the teacher's for V = 0), and the losses [B]."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    apart = tl.cast(S, tl.int64) * B
    student_largest_R = tl.full([R], _LEAST, tl.float32)
    student_total_R = tl.zeros([R], tl.float32)
    largest_R = tl.full([R], _LEAST, tl.float32)
    total_R = tl.zeros([R], tl.float32)
    product_R = tl.zeros([R], tl.float32)
    for part in range(0, S):
        place_R = parts + tl.cast(part, tl.int64) * B + row_R
        part_student_largest_R = tl.load(place_R, mask=row_R < B, other=0.0)
        part_student_total_R = tl.load(place_R + apart, mask=row_R < B, other=1.0)
        part_total_R = tl.load(place_R + 2 * apart, mask=row_R < B, other=1.0)
        part_product_R = tl.load(place_R + 3 * apart, mask=row_R < B, other=0.0)
        larger_R = tl.maximum(student_largest_R, part_student_largest_R)
        product_R += (student_largest_R - larger_R) * total_R
        part_product_R += (part_student_largest_R - larger_R) * part_total_R
        if V == 0:
            part_largest_R = tl.load(place_R + 4 * apart, mask=row_R < B, other=0.0)
            _, product_R = _join(largest_R, product_R, part_largest_R, part_product_R, scale)
            largest_R, total_R = _join(largest_R, total_R, part_largest_R, part_total_R, scale)
        else:
            product_R += part_product_R
            total_R += part_total_R
        student_largest_R, student_total_R = _join(
            student_largest_R, student_total_R, part_student_largest_R, part_student_total_R, student_scale
        )  # fmt: skip
    tl.store(student_sums + row_R, student_largest_R, mask=row_R < B)
    tl.store(student_sums + B + row_R, student_total_R, mask=row_R < B)
    if V == 0:
        tl.store(teacher_sums + row_R, largest_R, mask=row_R < B)
        tl.store(teacher_sums + B + row_R, total_R, mask=row_R < B)
        product_R /= total_R
        total_R /= total_R
    loss_R = total_R * tl.log(student_total_R) - product_R / temperature
    if weights is not None:
        loss_R *= tl.load(weights + row_R, mask=row_R < B, other=0.0)
    tl.store(losses + row_R, loss_R, mask=row_R < B)


@triton.jit
def _gradient(
    grad_loss, teacher, centre, teacher_rows, weights, teacher_sums, student, student_sums, out, G, B, K, scale,
    student_scale, share, stride_g, stride_k, stride_b, stride_bk,
    V: tl.constexpr, R: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Softmax of the student, once per pair, minus the targets, [B, K], times grad_loss * share (* weights)."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_JC = _columns(tl.program_id(1) * J * C, J, C)
    centre_RJC = _load_centre(centre, column_JC, K, R)
    y_RJC = _load(student, row_R, row_R < B, column_JC, K, stride_b, stride_bk)
    target_RJC, pairs_R = _targets(
        teacher, centre_RJC, teacher_rows, teacher_sums, row_R, row_R < B, column_JC, G, K, scale, stride_g, stride_k, V
    )  # fmt: skip
    largest_R = tl.load(student_sums + row_R, mask=row_R < B, other=0.0)
    total_R = tl.load(student_sums + B + row_R, mask=row_R < B, other=1.0)
    p_RJC = tl.exp2((y_RJC - largest_R[:, None, None]) * student_scale)
    grad_RJC = p_RJC * (pairs_R.to(tl.float32) / total_R)[:, None, None] - target_RJC
    share_R = tl.zeros([R], tl.float32) + tl.load(grad_loss).to(tl.float32) * share
    if weights is not None:
        share_R *= tl.load(weights + row_R, mask=row_R < B, other=0.0)
    place_RJC = row_R.to(tl.int64)[:, None, None] * K + column_JC[None, :, :]
    inside_RJC = (row_R < B)[:, None, None] & (column_JC < K)[None, :, :]
    tl.store(out + place_RJC, grad_RJC * share_R[:, None, None], mask=inside_RJC)


def forward(
    teacher_GK: Tensor,
    student_BK: Tensor,
    centre_K: Tensor | None,
    teacher_rows_BV: Tensor | None,
    weights_B: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.soft_cross_entropy`; any strides of logits."""
    if torch.float64 in (teacher_GK.dtype, student_BK.dtype):
        raise ValueError("soft_cross_entropy in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it")
    batch, prototypes = student_BK.shape
    tile = _tile(prototypes, max(teacher_GK.element_size(), student_BK.element_size()))
    scale, student_scale = _scale(teacher_temperature), _scale(student_temperature)
    named = 0 if teacher_rows_BV is None else teacher_rows_BV.shape[1]
    new = student_BK.new_empty
    with torch.cuda.device_of(student_BK):
        if named:
            teacher_sums_2G = _sum_rows(teacher_GK, centre_K, scale, tile)
        else:
            teacher_sums_2G = new(2, batch, dtype=torch.float32)
        row_tiles = triton.cdiv(batch, tile.rows)
        parts, columns_per_part = _parts(prototypes, tile.width, row_tiles, student_BK.device, bool(named))
        parts_5SB = new(5, parts, batch, dtype=torch.float32)
        student_sums_2B, losses_B = new(2, batch, dtype=torch.float32), new(batch, dtype=torch.float32)
        _cross_entropy[row_tiles, parts](
            teacher_GK, centre_K, teacher_rows_BV, teacher_sums_2G, student_BK, parts_5SB, len(teacher_GK), batch,
            prototypes, scale, student_scale, columns_per_part, *teacher_GK.stride(), *student_BK.stride(), V=named,
            **tile.constants(), num_warps=_WARPS,
        )  # fmt: skip
        _merge[(triton.cdiv(batch, 128),)](
            parts_5SB, weights_B, teacher_sums_2G, student_sums_2B, losses_B, batch, parts, scale, student_scale,
            student_temperature, V=named, R=128, num_warps=_WARPS,
        )  # fmt: skip
        loss = losses_B.sum()
        return loss / max(batch, 1) if weights_B is None else loss, teacher_sums_2G, student_sums_2B


def backward(
    grad_loss: Tensor,
    teacher_GK: Tensor,
    student_BK: Tensor,
    centre_K: Tensor | None,
    teacher_rows_BV: Tensor | None,
    weights_B: Tensor | None,
    teacher_sums_2G: Tensor,
    student_sums_2B: Tensor,
    teacher_temperature: float,
    student_temperature: float,
) -> Tensor:
    """See `kernels.soft_cross_entropy`; any strides of logits."""
    batch, prototypes = student_BK.shape
    tile = _tile(prototypes, max(teacher_GK.element_size(), student_BK.element_size()))
    share = 1 / student_temperature / (max(batch, 1) if weights_B is None else 1)
    grad_BK = student_BK.new_empty(student_BK.shape)
    with torch.cuda.device_of(student_BK):
        _gradient[triton.cdiv(batch, tile.rows), triton.cdiv(prototypes, tile.width)](
            grad_loss, teacher_GK, centre_K, teacher_rows_BV, weights_B, teacher_sums_2G, student_BK, student_sums_2B,
            grad_BK, len(teacher_GK), batch, prototypes, _scale(teacher_temperature), _scale(student_temperature),
            share, *teacher_GK.stride(), *student_BK.stride(),
            V=0 if teacher_rows_BV is None else teacher_rows_BV.shape[1], **tile.constants(), num_warps=_WARPS,
        )  # fmt: skip
    return grad_BK


def _sum_rows(teacher_GK: Tensor, centre_K: Tensor | None, scale: float, tile: _Tile) -> Tensor:
    """Largest entry and sum of every teacher row, [2, G]."""
    rows, prototypes = teacher_GK.shape
    row_tiles = triton.cdiv(rows, tile.rows)
    parts, columns_per_part = _parts(prototypes, tile.width, row_tiles, teacher_GK.device, False)
    parts_2SG = teacher_GK.new_empty(2, parts, rows, dtype=torch.float32)
    teacher_sums_2G = teacher_GK.new_empty(2, rows, dtype=torch.float32)
    _sum_teacher[row_tiles, parts](
        teacher_GK, centre_K, parts_2SG, rows, prototypes, scale, columns_per_part, *teacher_GK.stride(),
        **tile.constants(), num_warps=_WARPS,
    )  # fmt: skip
    _merge_teacher[(triton.cdiv(rows, 128),)](
        parts_2SG, teacher_sums_2G, rows, parts, scale, R=128, num_warps=_WARPS
    )  # fmt: skip
    return teacher_sums_2G


def variants(capability: int) -> list[Variant]:
    """Forms of wide heads, whose tiles are all alike: of each dtype with teacher rows in order and named twice, of odd K,
    and without a centre."""
    found = []

    def add(title, kernel, pointers, floats, integers, constants, aligned=(), absent=()):
        signature = pointers | {name: "fp32" for name in floats} | {name: "i32" for name in integers}
        constants = constants | {name: None for name in absent}
        signature |= {name: "constexpr" for name in constants}
        aligned = [name for name in (*pointers, *aligned) if name not in absent]
        found.append(Variant(title, kernel, signature, constants, _WARPS, aligned=tuple(aligned), matrix=False))

    asked = [("bf16", 65536, named, True) for named in (0, 1, 2)]
    asked += [("bf16", 65536, 0, False), ("bf16", 65537, 0, True), ("bf16", 65537, 2, True), ("fp16", 65536, 2, True)]
    asked += [("fp32", 65536, 0, True), ("fp32", 65536, 2, True), ("fp32", 65537, 2, True)]
    for dtype, prototypes, named, centred in asked:
        title = f"{dtype} K {prototypes} V {named}{'' if centred else ', no centre'}"
        vectors = {"centre": "*fp32", "teacher_sums": "*fp32", "teacher_rows": "*i64"}
        both = {"teacher": f"*{dtype}", "student": f"*{dtype}"} | vectors
        scales, sizes = ("scale", "student_scale"), _tile(prototypes, 4 if dtype == "fp32" else 2).constants()
        constants = {"stride_k": 1, "stride_bk": 1, "V": named} | sizes
        wide = ("K", "stride_g", "stride_b") if prototypes % 16 == 0 else ()
        absent = (*(() if named else ("teacher_rows",)), *(() if centred else ("centre",)))
        add(
            f"cross-entropy {title}", _cross_entropy, both | {"parts": "*fp32"}, scales,
            ("G", "B", "K", "columns_per_part", "stride_g", "stride_b"), constants, (*wide, "columns_per_part"), absent,
        )  # fmt: skip
        more = {"grad_loss": "*fp32", "weights": "*fp32", "student_sums": "*fp32", "out": f"*{dtype}"}
        add(
            f"gradient {title}", _gradient, both | more, (*scales, "share"), ("G", "B", "K", "stride_g", "stride_b"),
            constants, wide, absent if named else (*absent, "weights"),
        )  # fmt: skip
        if named == 2:
            add(
                f"sums of the teacher {dtype} K {prototypes}", _sum_teacher,
                {"teacher": f"*{dtype}", "centre": "*fp32", "parts": "*fp32"}, ("scale",),
                ("G", "K", "columns_per_part", "stride_g"), {"stride_k": 1} | sizes, ("columns_per_part", *wide[:2]),
            )  # fmt: skip
    sums = {"parts": "*fp32", "teacher_sums": "*fp32"}
    add("merge of the teacher's sums", _merge_teacher, sums, ("scale",), ("G", "S"), {"R": 128})
    sums |= {"weights": "*fp32", "student_sums": "*fp32", "losses": "*fp32"}
    for named, absent in ((0, ("weights",)), (2, ())):
        constants = {"V": named, "R": 128}
        add(f"merge V {named}", _merge, sums, (*scales, "temperature"), ("B", "S"), constants, (), absent)
    return found


def _tile(prototypes: int, element_size: int) -> _Tile:
    """8 KB of the wider logits; rows of 256 columns keep a warp each in 16 bit."""
    columns = min(256, max(16, triton.next_power_of_2(prototypes)))
    return _Tile(1024 // columns, 8 // element_size, columns)


def _parts(prototypes: int, width: int, row_tiles: int, device: torch.device, named: bool) -> tuple[int, int]:
    """(S, columns per part): enough programs for the chip; where teacher rows are named, parts that its cache holds."""
    tiles = triton.cdiv(prototypes, width)
    wanted = 16 if named else min(16, _programs(device) // max(1, row_tiles))
    per_part = triton.cdiv(tiles, max(1, min(wanted, tiles)))
    return triton.cdiv(tiles, per_part), per_part * width


def _scale(temperature: float) -> float:
    """What a difference of logits is multiplied by to be an exponent of 2."""
    return math.log2(math.e) / temperature


@cache
def _programs(device: torch.device) -> int:
    """Enough to keep every processor at work to the end; the interpreter passes for a small chip."""
    processors = 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    return 32 * processors
