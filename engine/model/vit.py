"""The one backbone: a plain pre-norm vision transformer on packed tokens, with timm's state-dict keys.

Shapes: T packed tokens, S sequences, C channels, H heads, D head dim, B batch, N patches of an image, V visible
patches, L sequence length, R patch rows of a step, E elements of a patch (P * P * 3, channel last).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import beit as timm_beit
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.core.errors import BadInput
from engine.model.tokens import Packed, View, thinning_rows
from kernels.packed_attention import HEAD_DIMS

# Small models for 32-pixel images, as (timm name, what differs from it).
_OWN = {
    f"vit_micro_patch{patch}_32": (
        "vit_tiny_patch16_224",
        dict(img_size=32, patch_size=patch, embed_dim=128, depth=6, num_heads=4),
    )
    for patch in (4, 8)
} | {  # published by MAE-CT and MIM-Refiner, unknown to timm
    "vit_huge_patch16_224": ("vit_huge_patch14_224", {"patch_size": 16}),
    "vit_2b_patch14_224": ("vit_huge_patch14_224", {"embed_dim": 2560, "depth": 24, "num_heads": 32}),
}
_TIMM_OVERRIDES = (
    "img_size", "patch_size", "depth", "global_pool", "fc_norm", "reg_tokens", "init_values", "no_embed_class",
)  # fmt: skip
OVERRIDES = (*_TIMM_OVERRIDES, "positions", "drop_path")
POSITIONS = ("learned", "sincos", "none", "relative")


@dataclass(frozen=True)
class Architecture:
    """What a VisionTransformer is built from. `create(name, **dict(overrides))` gives the same one again."""

    name: str
    overrides: tuple[tuple[str, object], ...]
    img_size: tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    qkv_bias: bool
    class_token: bool
    reg_tokens: int
    no_embed_class: bool
    pre_norm: bool
    init_values: float | None
    eps: float
    global_pool: str
    fc_norm: bool
    positions: str
    drop_path: float

    @property
    def grid(self) -> tuple[int, int]:
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.reg_tokens

    def twin(self, device: str = "meta") -> timm_vit.VisionTransformer | timm_beit.Beit:
        """timm's own model of this shape, without a head and, on meta, without memory; it takes `timm_state`. With relative
        positions that is timm's BEiT, which alone has them."""
        if self.positions != "relative":
            return _timm_model(self.name, dict(self.overrides), device)
        return timm.create_model(
            "beit_base_patch16_224", num_classes=0, device=device, img_size=self.img_size, patch_size=self.patch_size,
            embed_dim=self.embed_dim, depth=self.depth, num_heads=self.num_heads, mlp_ratio=self.mlp_dim / self.embed_dim,
            qkv_bias=self.qkv_bias, init_values=self.init_values or 0, use_abs_pos_emb=False, use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True, global_pool=self.global_pool, use_fc_norm=self.fc_norm,
        )  # fmt: skip

    def timm_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this model under the names of `twin`. timm's BEiT has no bias of keys: it adds one number to all scores
        of a query, which softmax takes away."""
        if self.positions != "relative":
            return dict(state)
        named = {}
        for key, value in state.items():
            if key.endswith(".qkv.bias"):
                query, _, values = value.chunk(3)
                named |= {
                    key.replace("qkv.bias", "q_bias"): query.clone(),
                    key.replace("qkv.bias", "v_bias"): values.clone(),
                }
            else:
                named[re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", key)] = value
        return named


def create(name: str, *, generator: torch.Generator | None = None, **overrides: object) -> "VisionTransformer":
    """Builds the ViT `name`, initialised as MAE initialises (see `initialise`), in fp32 on the CPU.

    `name` is any timm ViT of the plain kind (`names()` lists them; a pretrained tag is ignored), vit_micro_patch8_32 or
    vit_micro_patch4_32. Its shape is read from timm's own model, built without memory on the meta device.

    Overrides: img_size (int or (height, width)), patch_size, depth, reg_tokens, no_embed_class and init_values
    (LayerScale) as in timm; global_pool "token" or "avg"; fc_norm (norm follows the pooling: as timm's model has it,
    but never because of another global_pool alone); positions "learned", "sincos", "none" (fixed zeros) or
    "relative" (BEiT's, see `RelativePositions`); drop_path (stochastic depth of the last block, falling linearly to 0 at the
    first).

    `generator` (CPU) draws the weights; None takes torch's global one.

    Raises BadInput for an unknown name or override, a value out of range, or a model this one cannot represent.
    """
    name = name.partition(".")[0]
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if v is not None}
    _check_overrides(overrides)
    if name not in _OWN and not timm.is_model(name):
        near = difflib.get_close_matches(name, names(), n=4, cutoff=0.5)
        hint = f"close to it are {', '.join(near)}" if near else "names look like vit_large_patch16_224"
        raise BadInput(f"unknown model {name!r}: {hint} (engine.model.names()() lists all)")
    if "global_pool" in overrides:
        overrides.setdefault("fc_norm", False)
    architecture = _read(name, overrides)
    with torch.device("meta"):
        model = VisionTransformer(architecture)
    model.to_empty(device="cpu")
    model.initialise(generator)
    return model


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every name `create` accepts without overrides: timm's plain ViTs and our own. Takes seconds the first time."""
    found = []
    for name in timm.list_models(module=("vision_transformer", "deit")):
        try:
            _read(name, {"depth": 1})
        except BadInput:
            continue
        found.append(name)
    return tuple(sorted([*found, *_OWN]))


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions of MAE and MoCo v3, fp32 [h*w, dim].

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


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialises every Linear and LayerNorm inside `module` in place, as MAE does (He et al. 2022, appendix A.1).

    Linear: Xavier uniform, zero bias. Patch projection (Conv2d): as the Linear on flattened patches that it is.
    LayerNorm: one and zero. Parameters held by other modules are left to their owner.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1), generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


class LayerScale(nn.Module):
    """Channels weighed by a learned vector that starts at `start` (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x_TC: Tensor) -> Tensor:
        return x_TC * self.gamma


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


@lru_cache(maxsize=64)
def _offsets(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Int64 [L, L]: which entry of the table belongs to two tokens. One tensor per grid and device, to read only."""
    height, width = grid
    with torch.inference_mode(False):  # the cached tensor outlives the mode of its first caller
        patches_N = torch.arange(height * width, device=device)
        rows_N, columns_N = patches_N // width, patches_N % width
        down_NN = rows_N[:, None] - rows_N + height - 1
        right_NN = columns_N[:, None] - columns_N + width - 1
        index_LL = F.pad(down_NN * (2 * width - 1) + right_NN, (1, 0, 1, 0))
        last = (2 * height - 1) * (2 * width - 1)
        index_LL[0], index_LL[:, 0] = last, last + 1
        index_LL[0, 0] = last + 2
    return index_LL


class Attention(nn.Module):
    """Multi-head self-attention inside each packed sequence.

    The packed kernels know no bias of scores: with one, all sequences are as long as it is, and torch's
    scaled_dot_product_attention takes them as a batch.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % heads or dim // heads not in HEAD_DIMS:
            raise BadInput(f"width {dim} over {heads} heads makes heads of {dim / heads:g}, not one of {HEAD_DIMS}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x_TC: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        kv_lengths: Tensor | None = None,
        bias_HLL: Tensor | None = None,
    ) -> Tensor:
        """[T, C] to [T, C]. `kv_lengths` as in kernels.packed_attention; `bias_HLL` is added to every sequence's scores.

        Raises ValueError for both at once.
        """
        qkv_T3HD = self.qkv(x_TC).unflatten(-1, (3, self.heads, -1))
        if bias_HLL is None:
            return self.proj(kernels.packed_attention(qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths).flatten(-2))
        if kv_lengths is not None:
            raise ValueError("attention takes kv_lengths or a bias, not both")
        q_SHLD, k_SHLD, v_SHLD = qkv_T3HD.unflatten(0, (-1, bias_HLL.shape[-1])).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_SHLD = F.scaled_dot_product_attention(q_SHLD, k_SHLD, v_SHLD, attn_mask=bias_HLL[None].to(q_SHLD.dtype))
        return self.proj(mixed_SHLD.transpose(1, 2).flatten(2).flatten(0, 1))


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TC)))


class Block(nn.Module):
    """One pre-norm transformer block on packed tokens; encoder and decoder share it.

    All blocks of one shape hold equal Python attributes, so that one compiled code serves them all.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int | None = None,
        *,
        qkv_bias: bool = True,
        init_values: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_dim or 4 * dim)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(
        self,
        x_TC: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        kv_lengths: Tensor | None = None,
        bias_HLL: Tensor | None = None,
    ) -> Tensor:
        """Attention and MLP, each added to its input: [T, C] to [T, C]. `kv_lengths` and `bias_HLL` as in Attention."""
        x_TC = x_TC + self.attend(x_TC, cu_seqlens, max_seqlen, kv_lengths, bias_HLL)
        return x_TC + self.feed(x_TC)

    def attend(
        self,
        x_TC: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        kv_lengths: Tensor | None = None,
        bias_HLL: Tensor | None = None,
    ) -> Tensor:
        """The attention branch alone, without the residual."""
        return self.ls1(self.attn(self.norm1(x_TC), cu_seqlens, max_seqlen, kv_lengths, bias_HLL))

    def feed(self, x_TC: Tensor) -> Tensor:
        """The MLP branch alone, without the residual."""
        return self.ls2(self.mlp(self.norm2(x_TC)))

    def flops(self, length: int) -> float:
        """Operations of one forward pass for a sequence of `length` tokens: matrix products only, two per multiply-add."""
        weights = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return 2.0 * length * weights + 4.0 * length**2 * self.attn.proj.in_features

    def forward_thinned(
        self, packed: Packed, rate: float, generator: torch.Generator, bias_HLL: Tensor | None = None
    ) -> Packed:
        """`forward` under stochastic depth (Huang et al. 2016): each branch runs only for a random subset of sequences.

        Each group keeps a fixed number, (1 - rate) of it rounded and at least one; the rows of the others are not
        computed at all. A kept branch weighs sequences / kept of its group. Random only through `generator`.
        """
        x_TC, layout, kept = packed.tokens_TC, packed.layout, packed.layout.thinned(rate)
        if kept == layout:
            return Packed(self(x_TC, packed.cu_seqlens, layout.max_seqlen, None, bias_HLL), layout)
        noise_2S = torch.rand(2, layout.sequences, generator=generator, device=generator.device).to(x_TC.device)

        def add(x_TC: Tensor, noise_S: Tensor, branch: object, *args: object) -> Tensor:
            rows, worth = thinning_rows(layout, kept, noise_S)
            change = branch(x_TC.index_select(0, rows), *args) * worth
            return x_TC.index_add(0, rows, change.to(x_TC.dtype))

        x_TC = add(x_TC, noise_2S[0], self.attend, kept.cu_seqlens(x_TC.device), kept.max_seqlen, None, bias_HLL)
        return Packed(add(x_TC, noise_2S[1], self.feed), layout)


class PatchEmbed(nn.Module):
    """The patch projection: `proj` holds timm's convolution weight [C, 3, P, P], applied as one matrix product."""

    def __init__(self, patch_size: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size, bias=bias)

    def forward(self, patches_RE: Tensor) -> Tensor:
        weight_CE = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # patches come (row, column, channel)
        return F.linear(patches_RE.to(weight_CE.dtype), weight_CE, self.proj.bias)


class VisionTransformer(nn.Module):
    """A plain ViT (Dosovitskiy et al. 2021) that takes views of any length mixture in one pass. Made by `create`.

    A sequence is class token, registers, then its visible patches in the order the view names them.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.img_size, self.patch_size, self.grid = a.img_size, a.patch_size, a.grid
        self.embed_dim, self.depth, self.num_heads = a.embed_dim, a.depth, a.num_heads
        self.num_prefix_tokens, self.no_embed_class = a.num_prefix_tokens, a.no_embed_class
        self.global_pool = a.global_pool
        self.drop_path_rates = tuple(a.drop_path * i / max(1, a.depth - 1) for i in range(a.depth))

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
            Block(a.embed_dim, a.num_heads, a.mlp_dim, qkv_bias=a.qkv_bias, init_values=a.init_values, eps=a.eps)
            for _ in range(a.depth)
        )
        norm = nn.LayerNorm(a.embed_dim, eps=a.eps)
        self.norm, self.fc_norm = (nn.Identity(), norm) if a.fc_norm else (norm, nn.Identity())
        self._fixed_positions: dict[tuple[int, int], tuple[tuple[int, int], Tensor]] = {}

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
        """Fills every parameter: as `initialise`, N(0, .02) prefix tokens, truncated N(0, .02), sin-cos or no positions; relative
        ones are zero."""
        initialise(self, generator)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02, generator=generator)
        for scale in (part for part in self.modules() if isinstance(part, LayerScale)):
            scale.gamma.fill_(self.architecture.init_values)
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.relative_position_bias_table.zero_()
        elif self.architecture.positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        elif self.architecture.positions == "sincos":
            fixed = sincos_positions(self.embed_dim, self.grid)
            self.pos_embed.zero_()[0, -len(fixed) :] = fixed
        else:
            self.pos_embed.zero_()

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions of the patches of an image of `grid` patches, [h*w, C]; interpolated if not the model's. Absolute ones."""
        patches = self.pos_embed[:, self.pos_embed.shape[1] - self.grid[0] * self.grid[1] :]
        if grid == self.grid:
            return patches[0]
        if self.architecture.positions == "learned":
            return resample_abs_pos_embed(patches, list(grid), list(self.grid), num_prefix_tokens=0)[0]
        stored = (self.pos_embed.data_ptr(), self.pos_embed._version)  # changes when positions are loaded or moved
        if self._fixed_positions.get(grid, (None,))[0] != stored:
            with torch.inference_mode(False), torch.no_grad():
                fixed = resample_abs_pos_embed(patches.clone(), list(grid), list(self.grid), num_prefix_tokens=0)[0]
            self._fixed_positions[grid] = (stored, fixed)
        return self._fixed_positions[grid][1]

    def prefix(self) -> Tensor:
        """Class token and registers with their positions, [1, num_prefix_tokens, C]."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1)
        bare = self.no_embed_class or self.pos_embed is None
        return prefix if bare else prefix + self.pos_embed[:, : self.num_prefix_tokens]

    def embed(self, views: Sequence[View]) -> Packed:
        """Tokens of all views before the first block, one group per view. Only visible patches are read and embedded.

        Raises BadInput for images that are not a multiple of the patch size, or, with relative positions, not of the model's
        size or shown in part.
        """
        rows, places = [], []
        for view in views:
            grid, visible = self._grid_of(view.images), view.visible
            if self.rel_pos_bias is not None:
                self._check_whole(grid, visible)
                places.append(None)
            else:
                positions_NC = self.positions(grid)
                places.append(positions_NC if visible is None else positions_NC[visible])
            if visible is None:
                visible = torch.arange(grid[0] * grid[1], device=view.images.device).expand(len(view.images), -1)
            rows.append(kernels.gather_patches(view.images, visible, self.patch_size))
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
        packed = Packed.pack(groups)
        return Packed(self.norm_pre(packed.tokens_TC), packed.layout)

    def run_blocks(
        self, packed: Packed, start: int = 0, stop: int | None = None, generator: torch.Generator | None = None
    ) -> Packed:
        """Blocks start to stop (all by default); with a `generator` and drop_path > 0 under stochastic depth."""
        bias_HLL = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for index in range(self.depth)[start:stop]:
            block, rate = self.blocks[index], self.drop_path_rates[index]
            if generator is not None and rate > 0:
                packed = block.forward_thinned(packed, rate, generator, bias_HLL)
            else:
                tokens_TC = block(packed.tokens_TC, packed.cu_seqlens, packed.layout.max_seqlen, None, bias_HLL)
                packed = Packed(tokens_TC, packed.layout)
        return packed

    def encode(self, views: Sequence[View], generator: torch.Generator | None = None) -> Packed:
        """All tokens of all views after the final norm, one group [B, num_prefix_tokens + V, C] per view."""
        packed = self.run_blocks(self.embed(views), generator=generator)
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

    def flops(self, patches: int, start: int = 0, stop: int | None = None, *, thinned: bool = False) -> float:
        """Operations of one forward pass for one image of `patches` visible patches; embedding counts if `start` is 0.

        `thinned`: under stochastic depth, on average.
        """
        length = self.num_prefix_tokens + patches
        embedding = 0.0 if start else 2.0 * patches * self.patch_embed.proj.weight.numel()
        rates = self.drop_path_rates if thinned else (0.0,) * self.depth
        pairs = list(zip(self.blocks, rates, strict=True))[start:stop]
        return embedding + sum((1 - rate) * block.flops(length) for block, rate in pairs)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.patch_size or width % self.patch_size:
            shape, side = tuple(images.shape), self.patch_size
            raise BadInput(f"images {shape} should be [batch, 3, height, width] in multiples of the patch size {side}")
        return height // self.patch_size, width // self.patch_size

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


def _check_overrides(overrides: dict[str, object]) -> None:
    unknown = [key for key in overrides if key not in OVERRIDES]
    if unknown:
        raise BadInput(f"unknown model override {', '.join(unknown)}: choose among {', '.join(OVERRIDES)}")
    for key, choices in {"global_pool": ("token", "avg"), "positions": POSITIONS}.items():
        if key in overrides and overrides[key] not in choices:
            raise BadInput(f"{key} {overrides[key]!r} is none of {', '.join(choices)}")
    if not 0 <= overrides.get("drop_path", 0) < 1:
        raise BadInput(f"drop_path {overrides['drop_path']} should lie in [0, 1)")


def _timm_model(name: str, overrides: dict[str, object], device: str) -> nn.Module:
    base, args = _OWN.get(name, (name, {}))
    args = args | {key: overrides[key] for key in _TIMM_OVERRIDES if key in overrides}
    return timm.create_model(base, num_classes=0, device=device, **args)


def _read(name: str, overrides: dict[str, object]) -> Architecture:
    """The architecture of timm's model; BadInput where timm cannot build it or this backbone cannot be it."""
    try:
        twin = _timm_model(name, overrides, "meta")
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise BadInput(f"timm cannot build {name} with {overrides}: {str(error) or repr(error)}") from error
    alien = _unsupported(twin)
    if alien:
        raise BadInput(
            f"{name} has {alien}, but this backbone is a plain pre-norm ViT (engine.model.names()() lists all)"
        )
    block, embed = twin.blocks[0], twin.patch_embed
    architecture = Architecture(
        name=name,
        overrides=tuple(overrides.items()),
        img_size=tuple(embed.img_size),
        patch_size=embed.patch_size[0],
        embed_dim=twin.embed_dim,
        depth=len(twin.blocks),
        num_heads=block.attn.num_heads,
        mlp_dim=block.mlp.fc1.out_features,
        qkv_bias=block.attn.qkv.bias is not None,
        class_token=twin.has_class_token,
        reg_tokens=twin.num_reg_tokens,
        no_embed_class=twin.no_embed_class,
        pre_norm=isinstance(twin.norm_pre, nn.LayerNorm),
        init_values=getattr(block.ls1, "init_values", None),
        eps=block.norm1.eps,
        global_pool=twin.global_pool,
        fc_norm=isinstance(twin.fc_norm, nn.LayerNorm),
        positions=overrides.get("positions", "learned"),
        drop_path=overrides.get("drop_path", 0.0),
    )
    size, side = architecture.img_size, architecture.patch_size
    if min(size) < side or size[0] % side or size[1] % side:
        raise BadInput(f"image size {size} is not a multiple of the patch size {side}")
    if architecture.positions == "relative":
        _check_relative(architecture)
        twin = architecture.twin()
    with torch.device("meta"):
        ours, theirs = architecture.timm_state(VisionTransformer(architecture).state_dict()), twin.state_dict()
    shapes = [{key: value.shape for key, value in state.items()} for state in (ours, theirs)]
    alien = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
    if alien:
        raise BadInput(f"{name} has other parameters than a plain pre-norm ViT: {', '.join(alien[:3])}")
    return architecture


def _check_relative(architecture: Architecture) -> None:
    """BadInput where timm's BEiT, the one model there with relative positions, cannot be this one."""
    a = architecture
    reasons = {
        "no class token": not a.class_token,
        "registers": a.reg_tokens > 0,
        "a norm before its blocks": a.pre_norm,
        f"norms with an epsilon of {a.eps:g}": a.eps != 1e-6,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise BadInput(f"{a.name} has {found[0]}, which does not go with relative positions: choose learned or sincos")


def _unsupported(twin: nn.Module) -> str | None:
    """What about a timm model is not a plain ViT, in words; None where it is one."""
    if type(twin) is not timm_vit.VisionTransformer:
        return f"an architecture of its own ({type(twin).__name__})"
    block, embed = twin.blocks[0], twin.patch_embed
    checks = {
        f"the block {type(block).__name__}": type(block) is timm_vit.Block,
        f"the patch embedding {type(embed).__name__}": type(embed) is timm_vit.PatchEmbed,
        "a norm or patches of unequal sides in its patch embedding": isinstance(embed.norm, nn.Identity)
        and embed.patch_size[0] == embed.patch_size[1],
        "no learned positions": twin.pos_embed is not None,
        f"pooling {twin.global_pool!r} (override global_pool with token or avg)": twin.global_pool in ("token", "avg"),
        "pooling over its prefix tokens": not twin.pool_include_prefix,
    }
    if type(block) is timm_vit.Block:
        attention, mlp = block.attn, block.mlp
        checks |= {
            f"the attention {type(attention).__name__}": type(attention) is timm_vit.Attention,
            "qk-norm": isinstance(getattr(attention, "q_norm", None), nn.Identity),
            f"the MLP {type(mlp).__name__}": type(mlp) is timm_vit.Mlp,
            f"the activation {mlp.act}": isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none",
            f"the norm {type(block.norm1).__name__}": isinstance(block.norm1, nn.LayerNorm),
        }
    return next((reason for reason, holds in checks.items() if not holds), None)
