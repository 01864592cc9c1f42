"""What a VisionTransformer is built from, read from timm's own model, and which of timm's models this backbone cannot be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import timm
from timm.layers import GluMlp
from timm.models import beit as timm_beit
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from engine.core.errors import BadInput
from engine.model.initialisation import KINDS
from engine.model.positions import INTERPOLATIONS

# Small models for 32-pixel images, as (timm name, what differs from it).
_OWN = {
    f"vit_micro_patch{patch}_32": (
        "vit_tiny_patch16_224",
        dict(img_size=32, patch_size=patch, embed_dim=128, depth=6, num_heads=4),
    )
    for patch in (4, 8)
} | {  # published by MAE-CT, MIM-Refiner and MoCo v3, unknown to timm
    "vit_huge_patch16_224": ("vit_huge_patch14_224", {"patch_size": 16}),
    "vit_2b_patch14_224": ("vit_huge_patch14_224", {"embed_dim": 2560, "depth": 24, "num_heads": 32}),
    "vit_small_12heads_patch16_224": ("vit_small_patch16_224", {"num_heads": 12}),
}
_TIMM_OVERRIDES = (
    "img_size", "patch_size", "depth", "global_pool", "fc_norm", "reg_tokens", "init_values", "no_embed_class",
)  # fmt: skip
OVERRIDES = (
    *_TIMM_OVERRIDES, "gated_mlp", "positions", "interpolation", "initialisation", "drop_path", "drop_path_uniform",
)  # fmt: skip
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
    interpolation: str
    initialisation: str
    drop_path: float
    drop_path_uniform: bool
    gated_mlp: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.reg_tokens

    def twin(self, device: str = "meta") -> timm_vit.VisionTransformer | timm_beit.Beit:
        """timm's own model of this shape, without a head, of weights that nobody drew and, on meta, without memory; it takes
        `timm_state`. With relative positions that is timm's BEiT, with gated MLPs its DINOv2 giant in another size, which alone
        have them."""
        if dict(self.overrides).get("gated_mlp"):
            return timm.create_model(
                "vit_giant_patch14_dinov2", num_classes=0, device=device, img_size=self.img_size, patch_size=self.patch_size,
                embed_dim=self.embed_dim, depth=self.depth, num_heads=self.num_heads,
                mlp_ratio=(2 * self.mlp_dim + 0.5) / self.embed_dim,  # of both halves, which timm rounds down
                qkv_bias=self.qkv_bias, init_values=self.init_values or 0, reg_tokens=self.reg_tokens,
                no_embed_class=self.no_embed_class, global_pool=self.global_pool, fc_norm=self.fc_norm,
            )  # fmt: skip
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
    choices_of = {
        "global_pool": ("token", "avg"), "positions": POSITIONS, "interpolation": INTERPOLATIONS, "initialisation": KINDS,
    }  # fmt: skip
    for key, choices in choices_of.items():
        if key in overrides and overrides[key] not in choices:
            raise BadInput(f"{key} {overrides[key]!r} is none of {', '.join(choices)}")
    for key, value in overrides.items():
        try:
            hash(value)
        except TypeError:
            raise BadInput(f"{key} {value!r} is neither text nor numbers") from None
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
        mlp_dim=block.mlp.fc2.in_features,
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
        interpolation=overrides.get("interpolation", "antialiased"),
        initialisation=overrides.get("initialisation", "xavier"),
        drop_path=overrides.get("drop_path", 0.0),
        drop_path_uniform=bool(overrides.get("drop_path_uniform", False)),
        gated_mlp=isinstance(block.mlp, GluMlp),
    )
    size, side = architecture.img_size, architecture.patch_size
    if min(size) < side or size[0] % side or size[1] % side:
        raise BadInput(f"image size {size} is not a multiple of the patch size {side}")
    if overrides.get("gated_mlp"):
        _check(
            architecture,
            "gated MLPs",
            "leave gated_mlp out",
            {"relative positions": architecture.positions == "relative"},
        )
        architecture = replace(architecture, gated_mlp=True, mlp_dim=gated_width(architecture.embed_dim))
        twin = architecture.twin()
    elif architecture.positions == "relative":
        unlike = {"registers": architecture.reg_tokens > 0, "gated MLPs": architecture.gated_mlp}
        _check(architecture, "relative positions", "choose learned or sincos", unlike)
        twin = architecture.twin()
    return architecture, twin


def _timm_model(name: str, overrides: Mapping[str, object], device: str) -> nn.Module:
    base, args = _OWN.get(name, (name, {}))
    args = args | {key: overrides[key] for key in _TIMM_OVERRIDES if key in overrides}
    if timm.model_entrypoint(base).__module__ == timm_vit.__name__:
        args["weight_init"] = (
            "skip"  # weights come from elsewhere, and timm takes most of its time to draw them, on meta, too
        )
    return timm.create_model(base, num_classes=0, device=device, **args)


def gated_width(width: int) -> int:
    """Products that the second layer of a gated MLP reads: two thirds of an ungated one's, in eights (DINOv2,
    layers/swiglu_ffn.py)."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


def _check(a: Architecture, what: str, instead: str, unlike: dict[str, bool]) -> None:
    """BadInput where the one model of timm with what is asked for can't be this one, which is told."""
    reasons = {
        "no class token": not a.class_token,
        "a norm before its blocks": a.pre_norm,
        f"norms with an epsilon of {a.eps:g}": a.eps != 1e-6,
    } | unlike
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise BadInput(f"{a.name} has {found[0]}, which does not go with {what}: {instead}")


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
            f"the MLP {type(mlp).__name__}": type(mlp) is timm_vit.Mlp or _is_swiglu(mlp),
            f"the activation {mlp.act}": _is_swiglu(mlp)
            or (isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"),
            f"the norm {type(block.norm1).__name__}": isinstance(block.norm1, nn.LayerNorm),
        }
    return next((reason for reason, holds in checks.items() if not holds), None)


def _is_swiglu(mlp: nn.Module) -> bool:
    return (
        type(mlp) is GluMlp and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last and isinstance(mlp.norm, nn.Identity)
    )
