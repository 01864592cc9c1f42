"""What a VisionTransformer is built from, read from timm's own model, and which of timm's models this backbone cannot be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import timm
from timm.models import beit as timm_beit
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from engine.core.errors import BadInput

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


def exists(name: str) -> bool:
    """Whether timm or this house has a model of that name, whatever it is."""
    return name in _OWN or timm.is_model(name)


def candidates() -> tuple[str, ...]:
    """The names among which plain ViTs are: of timm's modules that hold such, and our own."""
    return (*timm.list_models(module=("vision_transformer", "deit")), *_OWN)


def check_overrides(overrides: Mapping[str, object]) -> None:
    """BadInput for an override that is unknown or out of range."""
    unknown = [key for key in overrides if key not in OVERRIDES]
    if unknown:
        raise BadInput(f"unknown model override {', '.join(unknown)}: choose among {', '.join(OVERRIDES)}")
    for key, choices in {"global_pool": ("token", "avg"), "positions": POSITIONS}.items():
        if key in overrides and overrides[key] not in choices:
            raise BadInput(f"{key} {overrides[key]!r} is none of {', '.join(choices)}")
    if not 0 <= overrides.get("drop_path", 0) < 1:
        raise BadInput(f"drop_path {overrides['drop_path']} should lie in [0, 1)")


def read(name: str, overrides: Mapping[str, object]) -> tuple[Architecture, nn.Module]:
    """The architecture of timm's model, and its twin without memory. Whether parameters agree is left to who builds it.

    Raises BadInput where timm cannot build it or has parts that this backbone has not.
    """
    try:
        twin = _timm_model(name, overrides, "meta")
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise BadInput(f"timm cannot build {name} with {overrides}: {str(error) or repr(error)}") from error
    alien = _unsupported(twin)
    if alien:
        raise BadInput(
            f"{name} has {alien}, but this backbone is a plain pre-norm ViT (engine.model.names() lists all)"
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
    return architecture, twin


def _timm_model(name: str, overrides: Mapping[str, object], device: str) -> nn.Module:
    base, args = _OWN.get(name, (name, {}))
    args = args | {key: overrides[key] for key in _TIMM_OVERRIDES if key in overrides}
    return timm.create_model(base, num_classes=0, device=device, **args)


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
