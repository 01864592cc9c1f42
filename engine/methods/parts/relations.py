"""Where an image's patches lie, as targets and as what heads on their tokens say of it (RelViT; Camporese, Izzo & Ballan, "Where
are my Neighbors? Exploiting Patches Relations in Self-Supervised Vision Transformer", BMVC 2022, arXiv 2206.00481).

Shapes: B images, N patches of an image, C encoder width, H heads, D width of a head, 2 is (column, row).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.model.initialisation import initialise

DIRECTIONS = 9  # left, level, right of it, times above, level, below
Grid = tuple[int, int]


def distances(grid: Grid) -> Tensor:
    """fp32 [N, N]: Euclidean distances of the patches of a grid (rows, columns), from -1 for none to 1 for the largest."""
    places_N2 = _places(grid)
    return _scaled((places_N2[:, None] - places_N2).norm(dim=2))


def angles(grid: Grid) -> Tensor:
    """fp32 [N, N]: angles between the patches' positions as vectors from a point half a grid left of and above the first patch,
    from -1 for none to 1 for the largest. Symmetric; a patch has none with itself.

    The authors' code adds 1e-4 to the product of the lengths, and so does this.
    """
    rows, columns = grid
    places_N2 = _places(grid) + torch.tensor([columns / 2, rows / 2], dtype=torch.float64)
    lengths_N = places_N2.norm(dim=1)
    cosines_NN = (places_N2 @ places_N2.T) / (lengths_N[:, None] * lengths_N + 1e-4)
    return _scaled(cosines_NN.acos().fill_diagonal_(0))


def _places(grid: Grid) -> Tensor:
    """fp64 [N, 2], row by row."""
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    return torch.stack([columns, rows], 2).flatten(0, 1)


def _scaled(map_NN: Tensor) -> Tensor:
    return (2 * map_NN / map_NN.max() - 1).float()


class PairHead(nn.Module):
    """A logit for every ordered pair of tokens and each of H heads, as attention has it: bias-free queries and keys of width
    D = C // H, and their products over sqrt(D). No softmax and no values. Layers start as MAE's or, as RelViT's do, as torch's.
    """

    def __init__(self, features: int, heads: int, as_torch: bool = False):
        super().__init__()
        self.heads, self.width = heads, features // heads
        self.query = nn.Linear(features, heads * self.width, bias=False)
        self.key = nn.Linear(features, heads * self.width, bias=False)
        if not as_torch:
            initialise(self)

    def forward(self, tokens_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, [B, N, H, D] each."""
        return tuple(part(tokens_BNC).unflatten(2, (self.heads, self.width)) for part in (self.query, self.key))

    def flops(self, patches: int) -> float:
        """Operations of one forward pass for one image: matrix products only."""
        projections = patches * (self.query.weight.numel() + self.key.weight.numel())
        return 2.0 * (projections + patches**2 * self.heads * self.width)


class DirectionHead(PairHead):
    """In which of nine directions one patch lies as seen from another (RelViT's SpatRel): one head for each direction.

    Args:
        features: encoder width C, at least nine.
        columns: of the grid.
    """

    def __init__(self, features: int, columns: int, as_torch: bool = False):
        super().__init__(features, DIRECTIONS, as_torch)
        self.columns = columns

    def loss(self, tokens_BNC: Tensor, places_BN: Tensor) -> Tensor:
        """Mean cross-entropy over all pairs, fp32; `places_BN` int64 says where in the grid each token's patch comes from."""
        queries, keys = self(tokens_BNC)
        return kernels.relation_loss(queries, keys, places_BN, self.columns)


class MapHead(PairHead):
    """A number for each pair of patches, learned as it stands in a map (RelViT's Dist and Ang): one head of the whole width.

    Args:
        features: encoder width C.
        map_NN: what is wanted, by places in the grid.
    """

    def __init__(self, features: int, map_NN: Tensor, as_torch: bool = False):
        super().__init__(features, 1, as_torch)
        self.register_buffer("map", map_NN, persistent=False)

    def loss(self, tokens_BNC: Tensor, places_BN: Tensor) -> Tensor:
        """Mean squared error over all pairs, fp32; `places_BN` as for `DirectionHead`."""
        queries, keys = self(tokens_BNC)
        logits_BNN = queries.squeeze(2) @ keys.squeeze(2).mT * self.width**-0.5
        return F.mse_loss(logits_BNN.float(), self.map[places_BN[:, :, None], places_BN[:, None]])


class PlaceHead(nn.Linear):
    """Which place of the grid a token's patch comes from (RelViT's AbsPos)."""

    def __init__(self, features: int, grid: Grid, as_torch: bool = False):
        super().__init__(features, grid[0] * grid[1])
        if not as_torch:
            initialise(self)

    def loss(self, tokens_BNC: Tensor, places_BN: Tensor) -> Tensor:
        """Mean cross-entropy over all tokens, fp32."""
        return F.cross_entropy(self(tokens_BNC).flatten(0, 1).float(), places_BN.flatten())

    def flops(self, patches: int) -> float:
        """Operations of one forward pass for one image: matrix products only."""
        return 2.0 * patches * self.weight.numel()
