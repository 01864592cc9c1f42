"""Sinkhorn-Knopp in Triton: every iteration reads the scores from memory once, and only `assign` writes anything as large.

B rows, K prototypes, S parts of the rows or of the columns; R rows and C columns per tile.

The first sweep is a log-sum-exp of columns: one read in any order. Later ones normalise rows before they sum columns, so
they need each row twice. Up to 16,384 prototypes a program holds whole rows in its registers and sums them as it goes.
Wider rows are read twice, in blocks of 8 MB, so that the second read finds them in the second-level cache: one launch,
in which the first pass over a block runs beside the second pass over the block before. Programs take their work by an
atomic ticket, and the second pass waits only for work of smaller tickets, which runs already, so it cannot wait for
ever. Atomics order the work and no sums: those are formed part by part, and the parts summed in a fixed order.

Scores * 1/T + log_u is one multiply-add, an exponential one more multiplication. Sums of exponentials are kept beside
their largest exponent. Where a sum runs over tiles, each place of the tile keeps a sum of its own until the end, at one
exponential per score whichever of the two is larger.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant

# prototypes in a row that one program can hold
_LARGEST_WHOLE = 16384
# of scores, which the second-level cache holds a few times over
_BLOCK_BYTES = 2**23
# below every exponent, yet finite: its difference to itself is 0
_LEAST = tl.constexpr(-3.4028234663852886e38)


class _Tile(NamedTuple):
    """What a program works on at a time: rows and columns; warps, and how many tiles are under way."""

    rows: int
    columns: int
    warps: int = 8
    stages: int = 3

    def constants(self) -> dict[str, int]:
        return {"R": self.rows, "C": self.columns, "STAGES": self.stages}


# of rows too wide for one program
_WIDE = _Tile(16, 256)
# columns that a reader takes of a wide row
_WIDTH = 2048
# two registers of a form that otherwise fills them all: bytes by chip
_SPILLS = {
    "rows summed fp32 K 3001": {80: 8, 86: 8},
    "rows summed fp32 K 8192": {80: 8, 86: 8},
    "rows summed in two passes bf16 K 131072": {90: 8},
}
# of the merges of parts, whose rows are the parts
_MERGE = _Tile(32, 64, 4)


@triton.jit
def _load(x, row_R, column_C, B, K, stride_b, stride_k):
    """[R, C] in fp32, 0 outside."""
    offset_RC = row_R.to(tl.int64)[:, None] * stride_b + column_C.to(tl.int64)[None, :] * stride_k
    inside_RC = (row_R < B)[:, None] & (column_C < K)[None, :]
    return tl.load(x + offset_RC, mask=inside_RC, other=0.0).to(tl.float32)


@triton.jit
def _logits(scores, log_u_C, row_R, column_C, B, K, scale, stride_b, stride_k):
    """[R, C]: scores / T + log_u; a column outside is -inf where log_u is."""
    return _load(scores, row_R, column_C, B, K, stride_b, stride_k) * scale + log_u_C[None, :]


@triton.jit
def _load_log_u(log_u, column_C, K):
    return tl.load(log_u + column_C, mask=column_C < K, other=-float("inf"))


@triton.jit
def _add(largest, total, x):
    """One more term exp(x) in total * exp(largest), each place for itself."""
    above = x - largest
    less = tl.exp(-tl.abs(above))
    return tl.maximum(largest, x), tl.where(above > 0, total * less + 1, total + less)


@triton.jit
def _join(largest, total, other_largest, other_total):
    """total * exp(largest) of two parts, together."""
    larger = tl.maximum(largest, other_largest)
    return larger, total * tl.exp(largest - larger) + other_total * tl.exp(other_largest - larger)


@triton.jit
def _column_lse(
    scores, largest, total, B, K, scale, rows_per_part, stride_b, stride_k,
    UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum of exp(scores / T) over a part of the rows, [S, K], beside the largest exponent."""
    K *= UNIT
    stride_b *= UNIT
    column_C = tl.program_id(0) * C + tl.arange(0, C)
    start = tl.program_id(1) * rows_per_part
    largest_RC = tl.full([R, C], _LEAST, tl.float32)
    total_RC = tl.zeros([R, C], tl.float32)
    for first in tl.range(start, tl.minimum(start + rows_per_part, B), R, num_stages=STAGES):
        row_R = first + tl.arange(0, R)
        x_RC = _load(scores, row_R, column_C, B, K, stride_b, stride_k) * scale
        largest_RC, total_RC = _add(largest_RC, total_RC, tl.where((row_R < B)[:, None], x_RC, -float("inf")))
    largest_C = tl.max(largest_RC, 0)
    total_C = tl.sum(total_RC * tl.exp(largest_RC - largest_C[None, :]), 0)
    out_C = tl.program_id(1).to(tl.int64) * K + column_C
    tl.store(largest + out_C, largest_C, mask=column_C < K)
    tl.store(total + out_C, total_C, mask=column_C < K)


@triton.jit
def _merge_lse(largest, total, column_lse, S, K, R: tl.constexpr, C: tl.constexpr):
    """Log-sum-exp [K] over the parts [S, K], R at a time."""
    column_C = tl.program_id(0) * C + tl.arange(0, C)
    largest_RC = tl.full([R, C], _LEAST, tl.float32)
    total_RC = tl.zeros([R, C], tl.float32)
    for first in range(0, S, R):
        part_R = first + tl.arange(0, R)
        place_RC = part_R.to(tl.int64)[:, None] * K + column_C[None, :]
        inside_RC = (part_R < S)[:, None] & (column_C < K)[None, :]
        part_largest_RC = tl.load(largest + place_RC, mask=inside_RC, other=_LEAST)
        part_total_RC = tl.load(total + place_RC, mask=inside_RC, other=0.0)
        largest_RC, total_RC = _join(largest_RC, total_RC, part_largest_RC, part_total_RC)
    largest_C = tl.max(largest_RC, 0)
    total_C = tl.sum(total_RC * tl.exp(largest_RC - largest_C[None, :]), 0)
    tl.store(column_lse + column_C, largest_C + tl.log(total_C), mask=column_C < K)


@triton.jit
def _merge_sums(parts, log_u, column_lse, S, K, R: tl.constexpr, C: tl.constexpr):
    """log(sum over the parts [S, K]) - log_u, [K], R at a time.

    Columns summed to 1 before rows did, so some entry of each is at least 1 / (B K): a plain sum cannot underflow.
    """
    column_C = tl.program_id(0) * C + tl.arange(0, C)
    total_RC = tl.zeros([R, C], tl.float32)
    for first in range(0, S, R):
        part_R = first + tl.arange(0, R)
        place_RC = part_R.to(tl.int64)[:, None] * K + column_C[None, :]
        total_RC += tl.load(parts + place_RC, mask=(part_R < S)[:, None] & (column_C < K)[None, :], other=0.0)
    log_u_C = tl.load(log_u + column_C, mask=column_C < K, other=0.0)
    tl.store(column_lse + column_C, tl.log(tl.sum(total_RC, 0)) - log_u_C, mask=column_C < K)


@triton.jit
def _whole_rows(
    scores, log_u, out, B, K, scale, rows_per_program, stride_b, stride_k,
    UNIT: tl.constexpr, WRITE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Normalised rows [B, K] if WRITE, else their sum over the rows of each program, [S, K]; C columns are a row."""
    K *= UNIT
    stride_b *= UNIT
    column_C = tl.arange(0, C)
    log_u_C = _load_log_u(log_u, column_C, K)
    start = tl.program_id(0) * rows_per_program
    sum_RC = tl.zeros([R, C], tl.float32)
    for first in tl.range(start, tl.minimum(start + rows_per_program, B), R, num_stages=STAGES):
        row_R = first + tl.arange(0, R)
        x_RC = _logits(scores, log_u_C, row_R, column_C, B, K, scale, stride_b, stride_k)
        weight_RC = tl.exp(x_RC - tl.max(x_RC, 1)[:, None])
        share_R = tl.where(row_R < B, 1 / tl.sum(weight_RC, 1), 0.0)
        if WRITE:
            place_RC = row_R.to(tl.int64)[:, None] * K + column_C[None, :]
            inside_RC = (row_R < B)[:, None] & (column_C < K)[None, :]
            tl.store(out + place_RC, weight_RC * share_R[:, None], mask=inside_RC)
        else:
            sum_RC += weight_RC * share_R[:, None]
    if not WRITE:
        out_C = tl.program_id(0).to(tl.int64) * K + column_C
        tl.store(out + out_C, tl.sum(sum_RC, 0), mask=column_C < K)


@triton.jit
def _read_rows(
    scores, log_u, largest, total, row_R, part, B, K, scale, stride_b, stride_k,
    WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum of exp(scores / T + log_u) over WIDTH columns of some rows, into [S, B], beside the largest exponent."""
    largest_RC = tl.full([R, C], _LEAST, tl.float32)
    total_RC = tl.zeros([R, C], tl.float32)
    for first in tl.range(part * WIDTH, tl.minimum(part * WIDTH + WIDTH, K), C, num_stages=STAGES):
        column_C = first + tl.arange(0, C)
        x_RC = _logits(
            scores, _load_log_u(log_u, column_C, K), row_R, column_C, B, K, scale, stride_b, stride_k
        )  # fmt: skip
        largest_RC, total_RC = _add(largest_RC, total_RC, x_RC)
    largest_R = tl.max(largest_RC, 1)
    total_R = tl.sum(total_RC * tl.exp(largest_RC - largest_R[:, None]), 1)
    out_R = tl.cast(part, tl.int64) * B + row_R
    tl.store(largest + out_R, largest_R, mask=row_R < B)
    tl.store(total + out_R, total_R, mask=row_R < B)


@triton.jit
def _close_block(largest, total, rows, row_N, B, S, N: tl.constexpr, P: tl.constexpr):
    """Of every row of a block the largest exponent and 1 / sum, [2, B], over the parts [S, B], P at a time."""
    largest_PN = tl.full([P, N], _LEAST, tl.float32)
    total_PN = tl.zeros([P, N], tl.float32)
    for first in range(0, S, P):
        part_P = first + tl.arange(0, P)
        place_PN = part_P.to(tl.int64)[:, None] * B + row_N[None, :]
        inside_PN = (part_P < S)[:, None] & (row_N < B)[None, :]
        # written by other programs: not from the first-level cache
        part_largest_PN = tl.load(largest + place_PN, mask=inside_PN, other=_LEAST, cache_modifier=".cg")
        part_total_PN = tl.load(total + place_PN, mask=inside_PN, other=0.0, cache_modifier=".cg")
        largest_PN, total_PN = _join(largest_PN, total_PN, part_largest_PN, part_total_PN)
    largest_N = tl.max(largest_PN, 0)
    total_N = tl.sum(total_PN * tl.exp(largest_PN - largest_N[None, :]), 0)
    tl.store(rows + row_N, largest_N, mask=row_N < B)
    tl.store(rows + B + row_N, 1 / total_N, mask=row_N < B)


@triton.jit
def _use_rows(
    scores, log_u, rows, out, block, column_C, B, K, scale, stride_b, stride_k,
    WRITE: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of a block of N normalised rows: into [B, K] if WRITE, else their sum over rows into [S, K]."""
    log_u_C = _load_log_u(log_u, column_C, K)
    sum_RC = tl.zeros([R, C], tl.float32)
    for first in tl.range(block * N, tl.minimum(block * N + N, B), R, num_stages=STAGES):
        row_R = first + tl.arange(0, R)
        # a row outside has no weight, whatever log_u is
        largest_R = tl.load(rows + row_R, mask=row_R < B, other=float("inf"), cache_modifier=".cg")
        share_R = tl.load(rows + B + row_R, mask=row_R < B, other=0.0, cache_modifier=".cg")
        x_RC = _logits(scores, log_u_C, row_R, column_C, B, K, scale, stride_b, stride_k)
        weight_RC = tl.exp(x_RC - largest_R[:, None]) * share_R[:, None]
        if WRITE:
            place_RC = row_R.to(tl.int64)[:, None] * K + column_C[None, :]
            inside_RC = (row_R < B)[:, None] & (column_C < K)[None, :]
            # past the cache, which is for the scores
            tl.store(out + place_RC, weight_RC, mask=inside_RC, cache_modifier=".cs")
        else:
            sum_RC += weight_RC
    if not WRITE:
        tl.store(out + tl.cast(block, tl.int64) * K + column_C, tl.sum(sum_RC, 0), mask=column_C < K)


@triton.jit
def _two_passes(
    scores, log_u, largest, total, rows, order, out, B, K, scale, parts, readers, users, stride_b, stride_k,
    UNIT: tl.constexpr, WRITE: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both passes over the rows, in blocks of N.

    Tickets run through the readers of block 0, the readers of block 1 and the users of block 0, and so on. `order` holds
    the next ticket, then for each block how many of its readers are done; the last one of them closes the block.
    """
    K *= UNIT
    stride_b *= UNIT
    ticket = tl.atomic_add(order, 1)
    turn = ticket // (readers + users)
    task = ticket % (readers + users)
    if task < readers:
        if turn * N < B:
            row_R = turn * N + task // parts * R + tl.arange(0, R)
            _read_rows(
                scores,
                log_u,
                largest,
                total,
                row_R,
                task % parts,
                B,
                K,
                scale,
                stride_b,
                stride_k,
                WIDTH,
                R,
                C,
                STAGES,
            )
            # all threads have written before one of them says so
            tl.debug_barrier()
            done = tl.atomic_add(order + 1 + turn, 1, sem="acq_rel")
            if done == readers - 1:
                _close_block(largest, total, rows, turn * N + tl.arange(0, N), B, parts, N, P)
                tl.debug_barrier()
                tl.atomic_add(order + 1 + turn, 1, sem="release")
    elif turn > 0:
        while tl.atomic_add(order + turn, 0, sem="acquire") <= readers:
            pass
        column_C = (task - readers) * C + tl.arange(0, C)
        _use_rows(
            scores, log_u, rows, out, turn - 1, column_C, B, K, scale, stride_b, stride_k, WRITE, N, R, C, STAGES
        )  # fmt: skip


def sweep(scores_BK: Tensor, log_u_K: Tensor | None, temperature: float) -> Tensor:
    """See `kernels.sinkhorn`; any strides."""
    _refuse_fp64(scores_BK)
    prototypes = scores_BK.shape[1]
    column_lse_K = scores_BK.new_empty(prototypes, dtype=torch.float32)
    grid, sizes = (triton.cdiv(prototypes, _MERGE.columns),), {"R": _MERGE.rows, "C": _MERGE.columns}
    with torch.cuda.device_of(scores_BK):
        if log_u_K is None:
            parts_2SK = _sum_columns(scores_BK, temperature)
            _merge_lse[grid](*parts_2SK, column_lse_K, parts_2SK.shape[1], prototypes, **sizes, num_warps=_MERGE.warps)
        else:
            parts_SK = _normalise_rows(scores_BK, log_u_K, temperature, write=False)
            _merge_sums[grid](
                parts_SK, log_u_K, column_lse_K, len(parts_SK), prototypes, **sizes, num_warps=_MERGE.warps
            )
    return column_lse_K


def assign(scores_BK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    """See `kernels.sinkhorn`; any strides."""
    _refuse_fp64(scores_BK)
    with torch.cuda.device_of(scores_BK):
        return _normalise_rows(scores_BK, log_u_K, temperature, write=True)


def _sum_columns(scores_BK: Tensor, temperature: float) -> Tensor:
    """Largest exponent and sum of each column over each part of the rows, [2, S, K]."""
    (rows, prototypes), tile = scores_BK.shape, _tile(scores_BK.shape[1])
    column_tiles = triton.cdiv(prototypes, tile.columns)
    parts, rows_per_part = _parts(rows, tile.rows, _programs(scores_BK.device) // column_tiles)
    parts_2SK = scores_BK.new_empty(2, parts, prototypes, dtype=torch.float32)
    unit, strides = _units(scores_BK)
    _column_lse[column_tiles, parts](
        scores_BK, *parts_2SK, rows, prototypes // unit, 1 / temperature, rows_per_part, *strides,
        UNIT=unit, **tile.constants(), num_warps=tile.warps,
    )  # fmt: skip
    return parts_2SK


def _normalise_rows(scores_BK: Tensor, log_u_K: Tensor, temperature: float, write: bool) -> Tensor:
    """Rows of exp(scores / T + log_u), normalised: themselves [B, K], or their sums over parts of the rows, [S, K]."""
    rows, prototypes = scores_BK.shape
    whole = prototypes <= _LARGEST_WHOLE
    if whole:
        tile = _whole_tile(prototypes)
        parts, rows_per_program = _parts(rows, tile.rows, _programs(scores_BK.device) // 4)
    else:
        tile, block = _WIDE, _block(rows, prototypes, scores_BK.element_size())
        parts = triton.cdiv(rows, block)
    out = scores_BK.new_empty(rows if write else parts, prototypes, dtype=torch.float32)
    unit, strides = _units(scores_BK)
    given, options = (rows, prototypes // unit, 1 / temperature), {"UNIT": unit, "WRITE": write} | tile.constants()
    if whole:
        _whole_rows[(parts,)](
            scores_BK, log_u_K, out, *given, rows_per_program, *strides, **options, num_warps=tile.warps
        )
        return out
    slices, users = triton.cdiv(prototypes, _WIDTH), triton.cdiv(prototypes, tile.columns)
    readers = slices * (block // tile.rows)
    found_2SB = scores_BK.new_empty(2, slices, rows, dtype=torch.float32)
    rows_2B = scores_BK.new_empty(2, rows, dtype=torch.float32)
    order = scores_BK.new_zeros(1 + parts, dtype=torch.int32)
    # one turn more, for the users of the last block
    _two_passes[((parts + 1) * (readers + users) if parts else 0,)](
        scores_BK, log_u_K, *found_2SB, rows_2B, order, out, *given, slices, readers, users, *strides,
        **options, N=block, WIDTH=_WIDTH, P=16, num_warps=tile.warps,
    )  # fmt: skip
    return out


def variants(capability: int) -> list[Variant]:
    """Every form at the widths of published heads: whole rows of all widths, wide rows in blocks of 64, 32 and 16."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = []

    def add(title, kernel, pointers, floats, integers, constants, tile, aligned=()):
        signature = pointers | {name: "fp32" for name in floats} | {name: "i32" for name in integers}
        signature |= {name: "constexpr" for name in constants}
        found.append(
            Variant(
                title,
                kernel,
                signature,
                constants,
                tile.warps,
                aligned=(*pointers, *aligned),
                matrix=False,
                spills=_SPILLS.get(title, {}),
            )
        )

    asked = [("bf16", prototypes) for prototypes in (1024, 3000, 3001, 8192, 16384, 65536, 65537, 131072)]
    asked += [("fp16", 65536), ("fp32", 3001), ("fp32", 8192), ("fp32", 16384), ("fp32", 65536), ("fp32", 131072)]
    for name, prototypes in asked:
        title, unit = f"{name} K {prototypes}", 1 if prototypes % 8 else 8
        wide = ("K", "stride_b") if prototypes // unit % 16 == 0 else ()
        vectors = ("largest", "total", "rows", "log_u", "out")
        scores = {"scores": f"*{name}", "log_u": "*fp32"}
        tile = _tile(prototypes)
        add(
            f"column sums {title}", _column_lse, {"scores": f"*{name}", "largest": "*fp32", "total": "*fp32"},
            ("scale",), ("B", "K", "rows_per_part", "stride_b"), {"stride_k": 1, "UNIT": unit} | tile.constants(), tile,
            (*wide, *(["rows_per_part"] if tile.rows % 16 == 0 else [])),
        )  # fmt: skip
        for write in (False, True):
            form = "rows written" if write else "rows summed"
            if prototypes <= _LARGEST_WHOLE:
                tile = _whole_tile(prototypes)
                add(
                    f"{form} {title}",
                    _whole_rows,
                    scores | {"out": "*fp32"},
                    ("scale",),
                    ("B", "K", "rows_per_program", "stride_b"),
                    {"stride_k": 1, "UNIT": unit, "WRITE": write} | tile.constants(),
                    tile,
                    wide,
                )
            else:
                block = _block(2048, prototypes, dtypes[name].itemsize)
                add(
                    f"{form} in two passes {title}",
                    _two_passes,
                    scores | {key: "*fp32" for key in vectors if key != "log_u"} | {"order": "*i32"},
                    ("scale",),
                    ("B", "K", "parts", "readers", "users", "stride_b"),
                    {"stride_k": 1, "UNIT": unit, "WRITE": write, "N": block, "WIDTH": _WIDTH, "P": 16}
                    | _WIDE.constants(),
                    _WIDE,
                    wide,
                )
    sizes = {"R": _MERGE.rows, "C": _MERGE.columns}
    lse = {name: "*fp32" for name in ("largest", "total", "column_lse")}
    add("merge of column sums", _merge_lse, lse, (), ("S", "K"), sizes, _MERGE)
    sums = {name: "*fp32" for name in ("parts", "log_u", "column_lse")}
    add("merge of rows summed", _merge_sums, sums, (), ("S", "K"), sizes, _MERGE)
    return found


def _tile(prototypes: int) -> _Tile:
    """Of what sums columns."""
    columns = min(256, max(16, triton.next_power_of_2(prototypes)))
    return _Tile(4096 // columns, columns)


def _whole_tile(prototypes: int) -> _Tile:
    columns = max(16, triton.next_power_of_2(prototypes))
    return _Tile(max(1, 8192 // max(128, columns)), columns, 16, 2)


def _block(rows: int, prototypes: int, element_size: int) -> int:
    """Rows of a block: a power of two."""
    fit = min(_BLOCK_BYTES // (prototypes * element_size), triton.next_power_of_2(rows))
    return 64 if fit >= 64 else 32 if fit >= 32 else 16


def _units(x_BK: Tensor) -> tuple[int, tuple[int, int]]:
    """(unit, strides, that of rows in units): 8 lets Triton know of lengths that 8 divides and 16 does not."""
    row_stride, stride = x_BK.stride()
    unit = 1 if x_BK.shape[1] % 8 or row_stride % 8 else 8
    return unit, (row_stride // unit, stride)


def _parts(count: int, step: int, wanted: int) -> tuple[int, int]:
    """(S, count per part): about as many parts as wanted, of whole steps; one that is empty for a count of 0."""
    steps = max(1, triton.cdiv(count, step))
    per_part = triton.cdiv(steps, max(1, min(wanted, steps)))
    return triton.cdiv(steps, per_part), per_part * step


@cache
def _programs(device: torch.device) -> int:
    """Enough to keep every processor at work to the end; the interpreter passes for a small chip."""
    processors = 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    return 8 * processors


def _refuse_fp64(scores: Tensor) -> None:
    if scores.dtype == torch.float64:
        raise ValueError("sinkhorn in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it")
