"""What tells patches where they are: fixed sine-cosine positions added to tokens, or learned relative ones in attention's scores.

Shapes: H heads, L tokens of a sequence, N patches of an image.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.core.errors import BadInput
from engine.core.lasting import lasting


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions of MAE, fp32 [h*w, dim]; MoCo v3's have the two halves the other way round.

    Half the channels belong to each axis, width first; base 10000. Raises BadInput unless dim is a multiple of 4.
    """
    if dim % 4:
        raise BadInput(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    height, width = (torch.arange(size, dtype=torch.float64, device="cpu") for size in grid)
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles_w = (width[:, None] * frequencies).expand(grid[0], -1, -1)
    angles_h = (height[:, None, None] * frequencies).expand(-1, grid[1], -1)
    positions = torch.cat([angles_w.sin(), angles_w.cos(), angles_h.sin(), angles_h.cos()], dim=-1)
    return positions.flatten(0, 1).float()


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
