"""The one backbone: a plain pre-norm vision transformer on packed tokens, with timm's state-dict keys.

Shapes: T packed tokens, C channels, B batch, N patches of an image, V visible patches, L sequence length, R patch rows of a
step, E elements of a patch (P * P * 3, channel last).
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

import kernels
from engine.core.errors import BadInput
from engine.model import depth, residual
from engine.model.architecture import Architecture, check_overrides
from engine.model.blocks import Block, LayerScale, PatchEmbed
from engine.model.initialisation import KINDS, initialise
from engine.model.positions import FixedPositions, RelativePositions, resampled, sincos_positions
from engine.model.tokens import Packed, View


def create(name: str, *, generator: torch.Generator | None = None, **overrides: object) -> "VisionTransformer":
    """Builds the ViT `name`, with its first weights, in fp32 on the CPU.

    `name` is any timm ViT of the plain kind (`names()` lists them; a pretrained tag is ignored), vit_micro_patch8_32 or
    vit_micro_patch4_32. Its shape is read from timm's own model, built without memory on the meta device.

    Overrides: img_size (int or (height, width)), patch_size, depth, reg_tokens, no_embed_class and init_values (LayerScale)
    as in timm; gated_mlp (MLPs are SwiGLU of DINOv2's width, see `gated_width`); global_pool "token" or "avg"; fc_norm (norm
    follows the pooling: as timm's model has it, but never because of another global_pool alone); positions "learned",
    "sincos", "none" (fixed zeros) or "relative" (BEiT's, see `RelativePositions`); interpolation (of positions for images of
    another size, one of `engine.model.positions.INTERPOLATIONS`); initialisation (one of
    `engine.model.initialisation.KINDS`); drop_path (stochastic depth of the last block, falling linearly to 0 at the first,
    or, with drop_path_uniform, of every block).

    `generator` (CPU) draws the weights; None takes torch's global one.

    Raises BadInput for an unknown name or override, a value out of range, or a model this one cannot represent.
    """
    model = without_memory(name, **overrides)
    model.to_empty(device="cpu")
    model.initialise(generator)
    return model


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every name `create` accepts without overrides: timm's plain ViTs and our own. Takes seconds the first time."""
    from engine.model import twins  # here, since timm takes longer than torch, and --help needs no model

    found = []
    for name in twins.candidates():
        try:
            without_memory(name, depth=1)
        except BadInput:
            continue
        found.append(name)
    return tuple(sorted(found))


def without_memory(name: str, **overrides: object) -> "VisionTransformer":
    """What `create` makes, on the meta device: shapes without weights. Raises BadInput as that does."""
    from engine.model import twins  # here, as in `names`

    name = name.partition(".")[0]
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if v is not None}
    check_overrides(overrides)
    if not twins.exists(name):
        near = difflib.get_close_matches(name, names(), n=4, cutoff=0.5)
        hint = f"close to it are {', '.join(near)}" if near else "names look like vit_large_patch16_224"
        raise BadInput(f"unknown model {name!r}: {hint} (engine.model.names() lists all)")
    if "global_pool" in overrides:
        overrides.setdefault("fc_norm", False)
    architecture = _read(name, tuple(overrides), *overrides.values())
    with torch.device("meta"):
        return VisionTransformer(architecture)


@lru_cache(maxsize=256, typed=True)
def _read(name: str, keys: tuple[str, ...], *values: object) -> Architecture:
    """Of timm's model with these overrides, whose parameters are ours; kept, since timm takes its time to build one."""
    from engine.model import twins  # here, as in `names`

    architecture, twin = twins.read(name, dict(zip(keys, values, strict=True)))
    with torch.device("meta"):
        ours, theirs = architecture.timm_state(VisionTransformer(architecture).state_dict()), twin.state_dict()
    shapes = [{key: value.shape for key, value in state.items()} for state in (ours, theirs)]
    alien = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
    if alien:
        raise BadInput(f"{name} has other parameters than a plain pre-norm ViT: {', '.join(alien[:3])}")
    return architecture


class VisionTransformer(nn.Module):
    """A plain ViT (Dosovitskiy et al. 2021) that takes views of any length mixture in one pass. Made by `create`.

    A sequence is class token, registers, then its visible patches in the order the view names them.

    Attributes:
        residual: the stream's number format under autocast, one of `engine.model.residual.DTYPES`.
        tokens_learned_from: how many left the last block with gradients so far, by shapes alone; who reads it may set it to 0.
    """

    residual: str = "fp32"
    tokens_learned_from: int = 0

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.img_size, self.patch_size, self.grid = a.img_size, a.patch_size, a.grid
        self.embed_dim, self.depth, self.num_heads = a.embed_dim, a.depth, a.num_heads
        self.num_prefix_tokens, self.no_embed_class = a.num_prefix_tokens, a.no_embed_class
        self.global_pool = a.global_pool
        rising = [a.drop_path * i / max(1, a.depth - 1) for i in range(a.depth)]
        self.drop_path_rates = (a.drop_path,) * a.depth if a.drop_path_uniform else tuple(rising)

        self.cls_token = nn.Parameter(torch.empty(1, 1, a.embed_dim)) if a.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, a.reg_tokens, a.embed_dim)) if a.reg_tokens else None
        if a.positions == "relative":
            self.pos_embed, self.rel_pos_bias = None, RelativePositions(a.grid, a.num_heads)
        else:
            positions = a.grid[0] * a.grid[1] + (0 if a.no_embed_class else a.num_prefix_tokens)
            learns = a.positions == "learned"
            self.pos_embed = nn.Parameter(torch.empty(1, positions, a.embed_dim), requires_grad=learns)
            self.rel_pos_bias = None
        self.patch_embed = PatchEmbed(a.patch_size, a.embed_dim, bias=not a.pre_norm)
        self.norm_pre = nn.LayerNorm(a.embed_dim, eps=a.eps) if a.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                a.embed_dim,
                a.num_heads,
                a.mlp_dim,
                qkv_bias=a.qkv_bias,
                init_values=a.init_values,
                eps=a.eps,
                gated=a.gated_mlp,
            )
            for _ in range(a.depth)
        )
        norm = nn.LayerNorm(a.embed_dim, eps=a.eps)
        self.norm, self.fc_norm = (nn.Identity(), norm) if a.fc_norm else (norm, nn.Identity())
        self._fixed_positions = FixedPositions(a.grid, a.interpolation)

    def copy(self, drop_path: float | None = None) -> "VisionTransformer":
        """Another one of equal weights on the same device, uncompiled whatever this one is; maybe of another stochastic depth."""
        architecture = self.architecture
        if drop_path is not None:
            overrides = dict(architecture.overrides) | {"drop_path": drop_path}
            architecture = replace(architecture, drop_path=drop_path, overrides=tuple(overrides.items()))
        with torch.device(self.patch_embed.proj.weight.device):
            twin = VisionTransformer(architecture)
        twin.load_state_dict(self.state_dict())
        return twin

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fills every parameter as the architecture's kind of `engine.model.initialisation` has it; relative positions with 0."""
        kind = KINDS[self.architecture.initialisation]
        initialise(self, generator, self.architecture.initialisation)
        for layer, block in enumerate(self.blocks if kind.shrinks else (), 1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                weight.div_(math.sqrt(2 * layer))
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                kind.token(token, generator=generator)
        for scale in (part for part in self.modules() if isinstance(part, LayerScale)):
            scale.gamma.fill_(self.architecture.init_values)
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.relative_position_bias_table.zero_()
        elif self.architecture.positions == "learned":
            kind.positions(self.pos_embed, generator=generator)
        elif self.architecture.positions == "sincos":
            fixed = sincos_positions(self.embed_dim, self.grid, kind.rows_first)
            self.pos_embed.zero_()[0, -len(fixed) :] = fixed
        else:
            self.pos_embed.zero_()

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions of the patches of an image of `grid` patches, [h*w, C]; interpolated if not the model's. Absolute ones."""
        patches = self.pos_embed[0, self.pos_embed.shape[1] - self.grid[0] * self.grid[1] :]
        if grid == self.grid:
            return patches
        if self.architecture.positions == "learned":
            return resampled(patches, self.grid, grid, self.architecture.interpolation)
        return self._fixed_positions.resampled(patches, grid)

    def prefix(self) -> Tensor:
        """Class token and registers with their positions, [1, num_prefix_tokens, C]."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1)
        bare = self.no_embed_class or self.pos_embed is None
        return prefix if bare else prefix + self.pos_embed[:, : self.num_prefix_tokens]

    def embed(self, views: Sequence[View], patch_size: int | None = None) -> Packed:
        """Tokens of all views before the first block, one group per view. Only visible patches are read and embedded; of another
        size than the model's, where `patch_size` is given, by weights that are made of its own (`engine.model.patch_sizes`).

        Raises BadInput for images that are not a multiple of the patch size, or, with relative positions, not of the model's
        size or shown in part.
        """
        rows, places, patch_size = [], [], patch_size or self.patch_size
        positions_of: dict[tuple[int, int], Tensor] = {}  # interpolated once for all crops of a size
        for view in views:
            grid, visible = self._grid_of(view.images, patch_size), view.visible
            if self.rel_pos_bias is not None:
                self._check_whole(grid, visible)
                places.append(None)
            else:
                if grid not in positions_of:
                    positions_of[grid] = self.positions(grid)
                places.append(positions_of[grid] if visible is None else positions_of[grid][visible])
            if visible is None:
                visible = torch.arange(grid[0] * grid[1], device=view.images.device).expand(len(view.images), -1)
            rows.append(kernels.gather_patches(view.images, visible, patch_size))
        patches_RE = torch.cat([patches.flatten(0, 1) for patches in rows]) if len(rows) > 1 else rows[0].flatten(0, 1)
        parts = self.patch_embed(patches_RE).split([patches.shape[0] * patches.shape[1] for patches in rows])
        groups = []
        for view, part, patches, place in zip(views, parts, rows, places, strict=True):
            tokens_BVC = part.unflatten(0, patches.shape[:2])
            if view.hidden is not None:
                tokens_BVC = torch.where(view.hidden[..., None], view.blank.to(tokens_BVC.dtype), tokens_BVC)
            if place is not None:
                tokens_BVC = tokens_BVC + place
            if self.num_prefix_tokens:
                prefix = self.prefix().expand(len(patches), -1, -1)
                tokens_BVC = torch.cat([prefix.to(tokens_BVC.dtype), tokens_BVC], dim=1)
            groups.append(tokens_BVC)
        packed = Packed.pack(groups, any(view.passing for view in views))
        return Packed(self.norm_pre(packed.tokens_TC), packed.layout)

    def run_blocks(
        self,
        packed: Packed,
        start: int = 0,
        stop: int | None = None,
        generator: torch.Generator | None = None,
        rate_scale: float = 1.0,
    ) -> Packed:
        """Blocks start to stop (all by default); with a `generator`, which is on the CPU, and drop_path > 0 under stochastic
        depth, at `rate_scale` times the model's rates: what a call draws is for all its blocks at once."""
        layout, device = packed.layout, packed.tokens_TC.device
        x_TC = residual.enter(packed.tokens_TC, self.residual)
        blocks, rates = self.blocks[start:stop], [rate_scale * rate for rate in self.drop_path_rates[start:stop]]
        bias_HLL = None if self.rel_pos_bias is None else self.rel_pos_bias()
        thins = generator is not None and any(rates)
        drawn = depth.draw(layout, rates, generator, device) if thins else [depth.Weighed(None)] * len(blocks)
        for block, who in zip(blocks, drawn, strict=True):
            if isinstance(who, depth.Dropped):
                of_kept = who.layout.cu_seqlens(device), who.layout.max_seqlen
                x_TC = block.forward_dropped(x_TC, who.worth_2T1, who.rows_2R, who.places_2T, *of_kept, bias_HLL)
            else:
                x_TC = block(x_TC, packed.cu_seqlens, layout.max_seqlen, None, bias_HLL, who.worth_2T1)
        if x_TC.requires_grad and stop in (None, self.depth):
            self.tokens_learned_from += layout.tokens
        return Packed(x_TC, layout)

    def encode(
        self,
        views: Sequence[View],
        generator: torch.Generator | None = None,
        patch_size: int | None = None,
        rate_scale: float = 1.0,
    ) -> Packed:
        """All tokens of all views after the final norm, one group [B, num_prefix_tokens + V, C] per view; `patch_size` as in
        `embed`, `generator` and `rate_scale` as in `run_blocks`."""
        packed = self.run_blocks(self.embed(views, patch_size), generator=generator, rate_scale=rate_scale)
        return Packed(self.norm(packed.tokens_TC), packed.layout)

    def pool(self, tokens_BLC: Tensor) -> Tensor:
        """One vector per sequence, [B, C]: the class token or the mean of the patch tokens, then any fc_norm."""
        patches = tokens_BLC[:, self.num_prefix_tokens :]
        return self.fc_norm(tokens_BLC[:, 0] if self.global_pool == "token" else patches.mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Images fp32 [B, 3, H, W] to tokens [B, num_prefix_tokens + N, C] after the final norm.

        H and W are any multiples of the patch size: positions are interpolated; with relative ones they are the model's. Raises
        BadInput otherwise.
        """
        return self.encode([View(images)]).unpack()[0]

    def layer_of(self, name: str) -> int:
        """The depth that the parameter of this name counts as: i for block i of L, L for the final norm, -1 for all else."""
        if name.startswith("blocks."):
            return int(name.split(".")[1])
        return self.depth if name.startswith(("norm.", "fc_norm.")) else -1

    def flops(
        self,
        patches: int,
        start: int = 0,
        stop: int | None = None,
        *,
        rate_scale: float = 0.0,
        patch_size: int | None = None,
    ) -> float:
        """Operations of one forward pass for one image of `patches` visible patches, which are of `patch_size` as in `embed`;
        embedding counts if `start` is 0.

        `rate_scale`: under stochastic depth at so many times the model's rates, on average; what is computed to be multiplied by
        zero does not count.
        """
        length = self.num_prefix_tokens + patches
        pixels = 3 * (patch_size or self.patch_size) ** 2
        embedding = 0.0 if start else 2.0 * patches * pixels * self.embed_dim
        pairs = list(zip(self.blocks, self.drop_path_rates, strict=True))[start:stop]
        return embedding + sum((1 - rate_scale * rate) * block.flops(length) for block, rate in pairs)

    def _grid_of(self, images: Tensor, side: int) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % side or width % side:
            shape = tuple(images.shape)
            raise BadInput(f"images {shape} should be [batch, 3, height, width] in multiples of the patch size {side}")
        return height // side, width // side

    def _check_whole(self, grid: tuple[int, int], visible: Tensor | None) -> None:
        if grid != self.grid:
            raise BadInput(
                f"relative positions are those of a grid of {self.grid[0]}x{self.grid[1]} patches, which images of "
                f"{grid[0]}x{grid[1]} do not fit: set img_size to theirs, or positions to learned or sincos"
            )
        if visible is not None:
            raise BadInput(
                "relative positions want whole images: hide patches behind a token, or set positions to learned or sincos"
            )
