"""BEiT's table of relative positions for another grid, as its fine-tuning code gets to it."""

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor


def places(old: int, new: int) -> list[float]:
    """Where the offsets of one axis are taken to lie: the step's factor is sought by halving, then steps are added up."""
    left, right, steps = 1.01, 1.5, (2 * old - 1) // 2
    while right - left > 1e-6:
        factor = (left + right) / 2
        if (1 - factor**steps) / (1 - factor) > (2 * new - 1) // 2:
            right = factor
        else:
            left = factor
    outwards = [sum(factor**step for step in range(count)) for count in range(1, steps + 1)]
    return [-place for place in reversed(outwards)] + [0.0, *outwards]


def as_beit_s_code(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[(2 rows - 1) * (2 columns - 1) + 3, H] of the `old` grid for the `new` one, both of whose sides differ; the class token's
    three stay. By the routine of FITPACK that SciPy's interp2d called."""
    rows, columns = 2 * old[0] - 1, 2 * old[1] - 1
    wanted = [np.arange(1.0 - side, side) for side in new]
    heads = []
    for head in table[: rows * columns].T:
        spline = RectBivariateSpline(
            places(old[0], new[0]), places(old[1], new[1]), head.reshape(rows, columns).numpy()
        )
        heads.append(torch.from_numpy(spline(*wanted)).float().flatten())
    return torch.cat([torch.stack(heads, 1), table[rows * columns :]])
