"""What tells patches where they are: fixed sine-cosine positions added to tokens, or learned relative ones in attention's scores;
and positions for images of another size.

Shapes: H heads, L tokens of a sequence, N patches of an image, M of one of another size, C width.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.core.errors import BadInput
from engine.core.lasting import lasting

INTERPOLATIONS = {
    "antialiased": "bicubic, antialiased: timm's",
    "offset": "bicubic, with a tenth of a patch too many in the scale: DINO's, iBOT's, DINOv2's, RelViT's, SiT's",
    "bicubic": "bicubic: MSN's, MIM-Refiner's",
}


def sincos_positions(dim: int, grid: tuple[int, int], rows_first: bool = False) -> Tensor:
    """Fixed 2-D sine-cosine positions, fp32 [h*w, dim].

    Half the channels belong to each axis, width first (MAE) or height first (MoCo v3); base 10000. Raises BadInput unless dim is
    a multiple of 4.
    """
    if dim % 4:
        raise BadInput(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    height, width = (torch.arange(size, dtype=torch.float64, device="cpu") for size in grid)
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles_w = (width[:, None] * frequencies).expand(grid[0], -1, -1)
    angles_h = (height[:, None, None] * frequencies).expand(-1, grid[1], -1)
    angles = (angles_h, angles_w) if rows_first else (angles_w, angles_h)
    positions = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)
    return positions.flatten(0, 1).float()


def resampled(positions_NC: Tensor, old: tuple[int, int], new: tuple[int, int], kind: str) -> Tensor:
    """Positions of the `old` grid (rows, columns) for the `new` one, [M, C], by one of `INTERPOLATIONS`.

    One product with a fixed matrix, in fp64 whatever the caller computes in: the same bits at every run, which the backward pass
    of torch's interpolation does not give on GPUs.
    """
    matrix_MN = _resampling(old, new, kind, positions_NC.device)
    return (matrix_MN @ positions_NC.double()).to(positions_NC.dtype)


class FixedPositions:
    """Positions that nobody trains, of one grid, for others: each made once, until what is stored changes.

    Args:
        grid: (rows, columns) of what is stored.
        kind: one of `INTERPOLATIONS`.
    """

    def __init__(self, grid: tuple[int, int], kind: str):
        self._grid, self._kind = grid, kind
        self._made: dict[tuple[int, int], tuple[tuple[int, int], Tensor]] = {}

    def resampled(self, stored_NC: Tensor, grid: tuple[int, int]) -> Tensor:
        """[M, C] of what is stored; to read only."""
        version = (stored_NC.data_ptr(), stored_NC._version)  # changes when positions are loaded or moved
        if self._made.get(grid, (None,))[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                fixed = resampled(stored_NC.clone(), self._grid, grid, self._kind)
            self._made[grid] = (version, fixed)
        return self._made[grid][1]


@cache  # a captured step reads them where they lie
def _resampling(old: tuple[int, int], new: tuple[int, int], kind: str, device: torch.device) -> Tensor:
    """fp64 [M, N]: what each place of the new grid takes of those of the old one. One tensor per arguments, to read only."""
    with lasting(), torch.device("cpu"):
        rows, columns = (_along(of_old, of_new, kind) for of_old, of_new in zip(old, new, strict=True))
        return torch.kron(rows, columns).to(device)


def _along(old: int, new: int, kind: str) -> Tensor:
    """fp64 [new, old]: the interpolation of one axis, the other one being left alone."""
    axis = torch.eye(old, dtype=torch.float64)[None, None]  # [1, 1, place, of which]
    options = {"mode": "bicubic", "antialias": kind == "antialiased"}
    if kind == "offset":
        return F.interpolate(axis, scale_factor=((new + 0.1) / old, 1.0), **options)[0, 0]
    return F.interpolate(axis, size=(new, old), **options)[0, 0]


def resampled_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of `RelativePositions` of the `old` grid for the `new` one, as BEiT's fine-tuning has it; also a table without the
    rows of the class token.

    The old offsets are taken to lie at distances that grow geometrically, so that the outermost are those of the new grid, and
    cubic splines run through what stands there, along rows and along columns. An axis that stays as long is left as it is.
    """
    offsets = [2 * side - 1 for side in old]
    of_patches, others = table.split([offsets[0] * offsets[1], len(table) - offsets[0] * offsets[1]])
    down, right = (_between_offsets(*sides).to(table.device) for sides in zip(old, new, strict=True))
    moved = torch.einsum("yi,xj,ijh->yxh", down, right, of_patches.double().unflatten(0, offsets))
    return torch.cat([moved.flatten(0, 1).to(table.dtype), others])


def _between_offsets(old: int, new: int) -> Tensor:
    """fp64 [2 new - 1, 2 old - 1]: what each offset of one axis takes of the old ones."""
    if old == new:
        return torch.eye(2 * old - 1, dtype=torch.float64)
    if old == 1:
        return torch.ones(2 * new - 1, 1, dtype=torch.float64)
    from scipy.interpolate import make_interp_spline  # slow to import, and wanted for few models

    low, high, steps = 1.01, 1.5, np.arange(old - 1)
    while high - low > 1e-6:
        factor = (low + high) / 2  # from step to step
        low, high = (low, factor) if (factor**steps).sum() > new - 1 else (factor, high)
    distances = np.cumsum(factor**steps)
    places = np.concatenate([-distances[::-1], [0], distances])
    spline = make_interp_spline(places, np.eye(len(places)), k=min(3, len(places) - 1))
    return torch.from_numpy(spline(np.arange(1 - new, new).clip(places[0], places[-1])))


class RelativePositions(nn.Module):
    """What BEiT adds to attention's scores in place of positions added to tokens (Bao et al. 2022, after Raffel et al. 2020, T5):
    a learned number per head and offset between two patches, one table for all blocks, with timm's keys.

    The table is [(2h-1) * (2w-1) + 3, H]: offsets in rows, then in columns, from -(h-1) and -(w-1) on; then what the class token
    asks of patches, what patches ask of it, and what it asks of itself. It starts at zero.
    """

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, heads))

    def forward(self) -> Tensor:
        """[H, L, L] for L = 1 + h * w tokens: what each (row) asks of each (column)."""
        table = self.relative_position_bias_table
        return table[_offsets(self.grid, table.device)].permute(2, 0, 1).contiguous()


@cache  # a captured step reads them where they lie
def _offsets(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Int64 [L, L]: which entry of the table belongs to two tokens. One tensor per grid and device, to read only."""
    height, width = grid
    with lasting():
        patches_N = torch.arange(height * width, device=device)
        rows_N, columns_N = patches_N // width, patches_N % width
        down_NN = rows_N[:, None] - rows_N + height - 1
        right_NN = columns_N[:, None] - columns_N + width - 1
        index_LL = F.pad(down_NN * (2 * width - 1) + right_NN, (1, 0, 1, 0))
        last = (2 * height - 1) * (2 * width - 1)
        index_LL[0], index_LL[:, 0] = last, last + 1
        index_LL[0, 0] = last + 2
    return index_LL
