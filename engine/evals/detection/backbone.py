"""A plain ViT as a detector's backbone: attention inside windows, but for a few blocks that see the whole image.

After Li et al. 2021, "Benchmarking Detection Transfer Learning with Vision Transformers": absolute positions resampled to the
larger grid, no class token, windows from the upper left corner on, global blocks at equal distances, and, where asked, relative
position biases as in Swin and BEiT, which start at zero. An encoder with BEiT's relative positions gives both tables their start,
and its absolute positions are new.

Where the grid is no multiple of the window, the paper pads it by zeros, which take part in attention as keys. Here the windows at
the right and lower edge are smaller instead: no token attends to padding, and none is computed.

Which kernel runs: without relative biases all windows of all images, of whatever sizes, are one call of
`kernels.packed_attention`. That has no place for a bias; with one, the windows of each size are a batch of torch's
scaled_dot_product_attention (see `engine.model.blocks.Attention`), up to four calls.

Shapes: B images, h x w patches of an image, N = h * w, T = B * N tokens, C channels, H heads, L tokens of a window or an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from engine.core.errors import BadInput
from engine.core.lasting import lasting
from engine.evals.detection.form import Form
from engine.model.blocks import Block
from engine.model.positions import RelativePositions, resampled_table
from engine.model.tokens import Group, Layout, View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Tiling:
    """How a grid of patches falls into windows, those of one size behind one another.

    Attributes:
        order_N: int64 [N], which patch, row by row over the grid, comes at each place.
        places_N: int64 [N], at which place each patch comes: the inverse.
        sizes: (rows, columns, windows of this size), as they follow.
    """

    order_N: Tensor
    places_N: Tensor
    sizes: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=64)
def tiling(grid: tuple[int, int], window: int, device: torch.device) -> Tiling:
    """Windows of `window` x `window` patches from the upper left corner on; at the right and lower edge what is left."""
    with lasting():
        patches_hw = torch.arange(grid[0] * grid[1], device=device).view(grid)
        orders, sizes = [], []
        for rows, height in _bands(grid[0], window):
            for columns, width in _bands(grid[1], window):
                windows = patches_hw[rows, columns].unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
                orders.append(windows.flatten())
                sizes.append((height, width, windows.shape[0] * windows.shape[1]))
        order_N = torch.cat(orders)
        return Tiling(order_N, order_N.argsort(), tuple(sizes))


def _bands(side: int, window: int) -> list[tuple[slice, int]]:
    """The stretch of whole windows along a side, and the rest; how long a window is in each."""
    whole = side // window * window
    return [
        (slice(start, stop), length)
        for start, stop, length in ((0, whole, window), (whole, side, side - whole))
        if stop > start
    ]


def spread(depth: int, count: int) -> tuple[int, ...]:
    """The last block of each of `count` equal stretches of the depth: 2, 5, 8, 11 for 4 of 12. Shares are rounded down."""
    return tuple((index + 1) * depth // count - 1 for index in range(count))


class RelativeBias(nn.Module):
    """A learned number per head and offset between two patches of a grid (Swin; BEiT without its class token), from zero."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid, self.heads = grid, heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1), heads))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """[H, L, L] for the L = h * w patches of a grid up to the own: what each (row) adds to its score of each (column)."""
        (own_h, own_w), (h, w) = self.grid, grid
        table = self.relative_position_bias_table.unflatten(0, (2 * own_h - 1, 2 * own_w - 1)).permute(2, 0, 1)
        table = table[:, own_h - h : own_h + h - 1, own_w - w : own_w + w - 1]
        # windows slid over offsets, not an index of L * L entries, whose gradient is slow
        return table.unfold(1, h, 1).unfold(2, w, 1).flip(3, 4).reshape(self.heads, h * w, h * w)

    @torch.no_grad()
    def start_from(self, found: RelativePositions) -> None:
        """Take BEiT's table without its three entries of the class token, resampled for the own grid as BEiT does."""
        table = found.relative_position_bias_table.detach()[:-3]
        self.relative_position_bias_table.copy_(resampled_table(table, found.grid, self.grid))


@dataclass(frozen=True)
class _Part:
    """Sequences of all images that attend in one call: rows start to stop of each image, maybe with a bias."""

    start: int
    stop: int
    layout: Layout
    bias_HLL: Tensor | None


def check_encoder(encoder: VisionTransformer, form: Form) -> None:
    """Raise BadInput for an encoder that no detector of this form can be built on: one with relative positions where the form has
    none, another patch size than divides the form's size, or fewer blocks than are global."""
    if encoder.rel_pos_bias is not None and not form.relative:
        raise BadInput(
            f"{encoder.architecture.name} has relative positions, but this form has relative = False; choose True, or a model "
            "with learned, sincos or no positions."
        )
    if form.size % encoder.patch_size:
        raise BadInput(f"size {form.size} is not a multiple of the patch size {encoder.patch_size}; choose one.")
    four = form.pyramid == "four-blocks"
    if max(form.global_blocks, 4 * four) > encoder.depth:
        name = (
            f"global_blocks {form.global_blocks}" if form.global_blocks > encoder.depth else "the pyramid four-blocks"
        )
        raise BadInput(
            f"{name} wants more blocks than the {encoder.depth} of {encoder.architecture.name}; choose fewer or simple."
        )


class WindowedViT(nn.Module):
    """A ViT that turns images into maps of patch features, with windowed and global blocks.

    Args:
        encoder: its weights are copied; positions are resampled to the form's size once, and learn there. Relative ones, of a
            BEiT, become the start of both tables of biases, and absolute ones are new (the paper), drawn from truncated N(0, .02)
            by torch's global generator on the CPU. Its class token, registers and final norm have no part in the maps: they stay
            in the state dict and do not learn.
        form: which blocks attend where.

    Stochastic depth, at the encoder's rates and in training mode only, is drawn per image, whatever its windows, and weighs a
    branch by 0 or 1 / (1 - rate), as timm does: with one or two images per device a fixed number of dropped ones, as in
    pre-training, would be none. It is random through torch's global generator, as torchvision's sampling is.

    Raises:
        BadInput: as `check_encoder`.
    """

    def __init__(self, encoder: VisionTransformer, form: Form) -> None:
        super().__init__()
        check_encoder(encoder, form)
        depth, four = encoder.depth, form.pyramid == "four-blocks"
        self.encoder = _at_size(encoder, form.size)
        self.window = form.window
        self.global_blocks = spread(depth, form.global_blocks if form.window else depth)
        self.taps = spread(depth, 4 if four else 1)
        heads, side = encoder.num_heads, (form.window, form.window)
        has_windows = len(self.global_blocks) < depth
        self.window_bias = RelativeBias(side, heads) if form.relative and has_windows else None
        self.global_bias = RelativeBias(self.encoder.grid, heads) if form.relative and self.global_blocks else None
        if encoder.rel_pos_bias is not None:
            for bias in (self.window_bias, self.global_bias):
                if bias is not None:
                    bias.start_from(encoder.rel_pos_bias)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised images of any multiple of the patch size to the outputs of the blocks in `taps`, each [B, C, h, w].

        With relative biases images are at most of the form's size; raises BadInput else.
        """
        encoder = self.encoder
        tokens_BLC = encoder.embed([View(images_B3HW)]).unpack()[0]
        grid = images_B3HW.shape[2] // encoder.patch_size, images_B3HW.shape[3] // encoder.patch_size
        if self.global_bias is not None and (grid[0] > encoder.grid[0] or grid[1] > encoder.grid[1]):
            raise BadInput(
                f"images of {grid[0]}x{grid[1]} patches are larger than the {encoder.grid[0]}x{encoder.grid[1]} that the "
                "relative biases are for; choose a larger size."
            )
        batch, patches = len(tokens_BLC), grid[0] * grid[1]
        x_TC = tokens_BLC[:, encoder.num_prefix_tokens :].flatten(0, 1)
        tiles = tiling(grid, self.window or max(grid), x_TC.device)
        parts = {True: self._windows(batch, tiles), False: self._whole(batch, grid)}

        def moved(x_TC: Tensor, order_N: Tensor) -> Tensor:
            return x_TC.unflatten(0, (batch, patches)).index_select(1, order_N).flatten(0, 1)

        maps, in_windows = [], False
        for index, block in enumerate(encoder.blocks):
            if in_windows != (index not in self.global_blocks):
                in_windows = not in_windows
                x_TC = moved(x_TC, tiles.order_N if in_windows else tiles.places_N)
            x_TC = _run(block, x_TC, batch, parts[in_windows], self._worth(index, batch, x_TC.device))
            if index in self.taps:
                map_TC = moved(x_TC, tiles.places_N) if in_windows else x_TC
                maps.append(map_TC.unflatten(0, (batch, *grid)).permute(0, 3, 1, 2))
        return maps

    def regions(self) -> Iterator[tuple[object, str]]:
        """Functions, as (owner, attribute), that may be compiled full-graph; shapes are static while those of images are."""
        for block in self.encoder.blocks:
            yield from ((block, name) for name in ("forward", "attend", "feed"))

    def _windows(self, batch: int, tiles: Tiling) -> list[_Part]:
        groups = [Group(count, rows * columns) for rows, columns, count in tiles.sizes]
        if self.window_bias is None:
            layout = Layout(tuple(groups) * batch)
            return [_Part(0, len(tiles.order_N), layout, None)]
        parts, start = [], 0
        for group, (rows, columns, _) in zip(groups, tiles.sizes, strict=True):
            layout = Layout((Group(batch * group.sequences, group.length),))
            parts.append(_Part(start, start + group.tokens, layout, self.window_bias((rows, columns))))
            start += group.tokens
        return parts

    def _whole(self, batch: int, grid: tuple[int, int]) -> list[_Part]:
        patches = grid[0] * grid[1]
        bias_HLL = None if self.global_bias is None else self.global_bias(grid)
        return [_Part(0, patches, Layout((Group(batch, patches),)), bias_HLL)]

    def _worth(self, index: int, batch: int, device: torch.device) -> Tensor | None:
        """What the two branches of a block are worth for each image, fp32 [2, B, 1, 1]; None where all are worth 1."""
        rate = self.encoder.drop_path_rates[index]
        if not self.training or not rate:
            return None
        return (torch.rand(2, batch, 1, 1, device=device) >= rate) / (1 - rate)


def _run(block: Block, x_TC: Tensor, batch: int, parts: list[_Part], worth: Tensor | None) -> Tensor:
    """One block on the tokens of `batch` images."""
    if worth is None and len(parts) == 1:
        layout = parts[0].layout
        return block(x_TC, layout.cu_seqlens(x_TC.device), layout.max_seqlen, None, parts[0].bias_HLL)

    def add(x_TC: Tensor, change_TC: Tensor, branch: int) -> Tensor:
        if worth is not None:
            weighed = change_TC.unflatten(0, (batch, -1)) * worth[branch].to(change_TC.dtype)
            change_TC = weighed.flatten(0, 1)
        return x_TC + change_TC

    x_TC = add(x_TC, _attended(block, x_TC, batch, parts), 0)
    return add(x_TC, block.feed(x_TC), 1)


def _attended(block: Block, x_TC: Tensor, batch: int, parts: list[_Part]) -> Tensor:
    changes = []
    for part in parts:
        rows_TC = x_TC
        if len(parts) > 1:
            rows_TC = x_TC.unflatten(0, (batch, -1))[:, part.start : part.stop].flatten(0, 1)
        cu_seqlens, longest = part.layout.cu_seqlens(x_TC.device), part.layout.max_seqlen
        changes.append(block.attend(rows_TC, cu_seqlens, longest, None, part.bias_HLL))
    if len(changes) == 1:
        return changes[0]
    return torch.cat([change.unflatten(0, (batch, -1)) for change in changes], 1).flatten(0, 1)


def _at_size(encoder: VisionTransformer, size: int) -> VisionTransformer:
    """A copy on the same device for images of size x size: its positions are absolute, a parameter of that grid."""
    architecture, relative = encoder.architecture, encoder.rel_pos_bias is not None
    positions = "learned" if relative else architecture.positions
    overrides = dict(architecture.overrides) | {"img_size": (size, size), "positions": positions}
    architecture = replace(architecture, img_size=(size, size), positions=positions, overrides=tuple(overrides.items()))
    device = encoder.patch_embed.proj.weight.device
    with torch.device(device):
        twin = VisionTransformer(architecture)
    state = encoder.state_dict()
    with torch.no_grad():
        if relative:
            state = {name: value for name, value in state.items() if not name.startswith("rel_pos_bias.")}
            drawn = nn.init.trunc_normal_(torch.empty(twin.pos_embed.shape, device="cpu"), std=0.02)
            state["pos_embed"] = drawn.to(device)
        else:
            prefix = state["pos_embed"][:, : -(encoder.grid[0] * encoder.grid[1])]
            state["pos_embed"] = torch.cat([prefix, encoder.positions(twin.grid)[None]], 1)
    twin.load_state_dict(state)
    for name, parameter in twin.named_parameters():
        if name in ("cls_token", "reg_token") or name.startswith(("norm.", "fc_norm.")):
            parameter.requires_grad_(False)
    return twin


@torch.no_grad()
def initialise_as_beit(encoder: VisionTransformer, seed: int = 0) -> None:
    """Fills a ViT in place as BEiT's code does, which the paper takes for training from scratch: truncated N(0, .02), zero
    biases, also of relative positions, and the last layer of each branch of block i, from 1, divided by sqrt(2 i)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: Tensor) -> None:
        values = nn.init.trunc_normal_(torch.empty(parameter.shape), std=0.02, generator=generator)
        parameter.copy_(values)

    for part in encoder.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            draw(part.weight)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            draw(token)
    if encoder.architecture.positions == "learned":
        draw(encoder.pos_embed)
    if encoder.rel_pos_bias is not None:
        nn.init.zeros_(encoder.rel_pos_bias.relative_position_bias_table)
    for number, block in enumerate(encoder.blocks, 1):
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.div_((2 * number) ** 0.5)
