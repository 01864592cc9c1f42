"""Which tiles the Triton forms of packed attention take: by direction, head dim, dtype and chip.

Chosen by the pipe model, `python -m kernels.resources --pipes`, among forms that fit into a chip's shared memory: the
least time of the busiest pipe. Where two are within a few percent, the one that loads the next tile ahead. Some hundred
spilled bytes cost less than keys that stream through shared memory twice as often.
"""

from typing import NamedTuple

import torch

HEAD_DIM_BLOCKS = {32: (32,), 64: (64,), 80: (64, 16), 96: (64, 32), 128: (128,)}
# at most this many tokens per sequence, with these head dims: programs take several sequences
GROUPED = 32
GROUPED_DIMS = (32, 64)

_SHORT = ((64,),)
# 197 keys cost 208; 257, a class token behind 16 x 16 patches, cost 272
_FORWARD = ((64,), (128,), (128, 64, 16), (128, 128), (128, 128, 16))
# How many keys a resident program may hold, in pieces that are powers of two, in rising order; longer sequences stream.
# Backward holds dK and dV of all keys in registers: larger heads leave room for fewer. On Hopper, where four warps
# multiply 64 rows, few large pieces ask less of shared memory than many that fit closely.
_PIECES = {
    ("forward", 32): {80: _FORWARD, 86: _FORWARD, 90: _FORWARD},
    ("forward", 64): {80: _FORWARD, 86: _FORWARD, 90: _FORWARD},
    ("forward", 80): {80: _FORWARD, 86: _FORWARD[:-1], 90: _FORWARD},
    ("backward", 32): {80: _FORWARD, 86: _FORWARD, 90: ((64,), (128,), (256,), (256, 16))},
    ("backward", 64): {80: _FORWARD[:-1], 86: _FORWARD[:-1], 90: ((64,), (128,), (128, 128), (128, 128, 16))},
    ("backward", 80): {80: _SHORT, 86: _SHORT, 90: ((64,), (128,), (128, 128))},
}


class Form(NamedTuple):
    """One compiled form: `pieces` of resident keys, none where they stream; `grouped`: several sequences a program."""

    pieces: tuple[int, ...]
    grouped: bool = False

    @property
    def capacity(self) -> float:
        """The longest sequence that it serves, in tokens."""
        return sum(self.pieces) if self.pieces else float("inf")


class Config(NamedTuple):
    """Queries per step of a resident program, or rows of a streaming one's own block; rows per step of the latter;
    warps; depth of the software pipeline."""

    rows: int
    step: int = 0
    warps: int = 4
    stages: int = 2


def key_pieces(direction: str, dim: int, dtype: torch.dtype, capability: int) -> tuple[tuple[int, ...], ...]:
    """What resident programs may hold, in rising order; nothing in fp32, which always streams."""
    if dtype == torch.float32:
        return ()
    return _PIECES.get((direction, dim), {}).get(capability, _SHORT)


def config(direction: str, form: Form, dim: int, dtype: torch.dtype, capability: int) -> Config:
    """The tiles of a form on a chip of the class 80, 86 or 90 (`kernels.compiled.chip_class`)."""
    if dtype == torch.float32:
        return Config(rows=32 if direction == "forward" or dim <= 80 else 16, step=16, stages=1)
    if not form.pieces:
        if direction == "forward":
            return Config(rows=64, step=64 if dim < 128 else 32)
        return Config(rows=64, step=16 if dim == 128 and capability < 90 else 32)
    if form.pieces == (64,):
        return Config(rows=64 if direction == "forward" else 32 if dim <= 64 else 16, stages=1)
    if direction == "forward":
        return Config(rows=64)
    if form.pieces == (128,) or (dim == 64 and form.pieces == (128, 128) and capability < 90):
        return Config(rows=32, warps=8)
    return Config(rows=64, warps=8) if capability == 90 else Config(rows=32)


def ladder(direction: str, dim: int, dtype: torch.dtype, capability: int, max_seqlen: int, equal: bool) -> list[Form]:
    """The forms for a batch, falling in capacity; one where all sequences are equally long."""
    resident = key_pieces(direction, dim, dtype, capability)
    if max_seqlen <= GROUPED and dim in GROUPED_DIMS and resident:
        return [Form((64,), grouped=True)]
    form = Form(next((sizes for sizes in resident if sum(sizes) >= max_seqlen), ()))
    shorter = [] if equal else dict.fromkeys((*resident[-1:], *resident[:1]))
    return [form, *(Form(sizes) for sizes in shorter if sum(sizes) < form.capacity)]


# Spilled bytes that were looked at, by chip.
SPILLS = {
    ("backward", 32, (128, 64, 16)): {80: 168, 86: 168},
    ("backward", 32, (128, 128)): {80: 136, 86: 136},
    ("backward", 32, (128, 128, 16)): {80: 360, 86: 360},
    ("backward", 32, (256, 16)): {90: 16},
    ("backward", 64, (128, 64, 16)): {80: 432, 86: 432},
    ("backward", 64, (128, 128)): {80: 16, 86: 16, 90: 56},
    ("backward", 64, (128, 128, 16)): {90: 208},
    ("backward", 80, (128, 128)): {90: 320},
    ("forward", 80, (128, 128, 16)): {90: 48},
    # fp32, where the assembler itself stops at 72 and 96 registers for the sake of more programs at once
    ("forward", 80, ()): {90: 8},
    ("forward", 96, ()): {80: 16, 86: 16},
}
