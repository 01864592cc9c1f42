"""timm's models that a VisionTransformer is read from and exported as, and which of them this backbone cannot be.

timm takes longer to import than torch, so whoever is imported before a model is wanted imports this where it is.
"""

from collections.abc import Mapping
from dataclasses import replace

import timm
from timm.layers import GluMlp
from timm.models import beit as timm_beit
from timm.models import vision_transformer as timm_vit
from torch import nn

from engine.core.errors import BadInput
from engine.model.architecture import TIMM_OVERRIDES, Architecture

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


def exists(name: str) -> bool:
    """Whether timm or this house has a model of that name, whatever it is."""
    return name in _OWN or timm.is_model(name)


def candidates() -> tuple[str, ...]:
    """The names among which plain ViTs are: of timm's modules that hold such, and our own."""
    return (*timm.list_models(module=("vision_transformer", "deit")), *_OWN)


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
        twin = twin_of(architecture)
    elif architecture.positions == "relative":
        unlike = {"registers": architecture.reg_tokens > 0, "gated MLPs": architecture.gated_mlp}
        _check(architecture, "relative positions", "choose learned or sincos", unlike)
        twin = twin_of(architecture)
    return architecture, twin


def twin_of(a: Architecture, device: str = "meta") -> timm_vit.VisionTransformer | timm_beit.Beit:
    """timm's own model of this shape, without a head, of weights that nobody drew and, on meta, without memory; it takes
    its `timm_state`. With relative positions that is timm's BEiT, with gated MLPs its DINOv2 giant in another size, which alone
    have them."""
    if dict(a.overrides).get("gated_mlp"):
        return timm.create_model(
            "vit_giant_patch14_dinov2", num_classes=0, device=device, img_size=a.img_size, patch_size=a.patch_size,
            embed_dim=a.embed_dim, depth=a.depth, num_heads=a.num_heads,
            mlp_ratio=(2 * a.mlp_dim + 0.5) / a.embed_dim,  # of both halves, which timm rounds down
            qkv_bias=a.qkv_bias, init_values=a.init_values or 0, reg_tokens=a.reg_tokens,
            no_embed_class=a.no_embed_class, global_pool=a.global_pool, fc_norm=a.fc_norm,
        )  # fmt: skip
    if a.positions != "relative":
        return _timm_model(a.name, dict(a.overrides), device)
    return timm.create_model(
        "beit_base_patch16_224", num_classes=0, device=device, img_size=a.img_size, patch_size=a.patch_size,
        embed_dim=a.embed_dim, depth=a.depth, num_heads=a.num_heads, mlp_ratio=a.mlp_dim / a.embed_dim,
        qkv_bias=a.qkv_bias, init_values=a.init_values or 0, use_abs_pos_emb=False, use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True, global_pool=a.global_pool, use_fc_norm=a.fc_norm,
    )  # fmt: skip


def _timm_model(name: str, overrides: Mapping[str, object], device: str) -> nn.Module:
    base, args = _OWN.get(name, (name, {}))
    args = args | {key: overrides[key] for key in TIMM_OVERRIDES if key in overrides}
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
