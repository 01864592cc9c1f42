"""lightly's backbone over timm's ViT, of the shape of ours: what the peers made of lightly's modules share."""

from functools import partial

from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from engine.model.architecture import Architecture


def backbone(a: Architecture, drop_path: float = 0.0, several_sizes: bool = False) -> MaskedVisionTransformerTIMM:
    """A new one.

    Args:
        drop_path: rate of stochastic depth in the last block.
        several_sizes: it will see images of other sizes than the model's, too.
    """
    vit = VisionTransformer(
        a.img_size, a.patch_size, embed_dim=a.embed_dim, depth=a.depth, num_heads=a.num_heads,
        mlp_ratio=a.mlp_dim / a.embed_dim, qkv_bias=a.qkv_bias, init_values=a.init_values, class_token=a.class_token,
        reg_tokens=a.reg_tokens, no_embed_class=a.no_embed_class, pre_norm=a.pre_norm, fc_norm=a.fc_norm,
        norm_layer=partial(nn.LayerNorm, eps=a.eps), global_pool=a.global_pool, num_classes=0,
        dynamic_img_size=several_sizes, drop_path_rate=drop_path,
    )  # fmt: skip
    positions = {"learned": "learn", "sincos": "sincos"}[a.positions]
    return MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization=positions)
