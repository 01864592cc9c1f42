import pytest

from engine.core.errors import BadInput
from engine.model import vit
from tests.model.shaken import MICRO


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_lrge_patch16_224", {}, "close to it are vit_large_patch16_224.*names"),
        ("nonsense!", {}, "names look like vit_large_patch16_224"),
        ("resnet50", {}, "architecture of its own"),
        ("beit_base_patch16_224", {}, "architecture of its own"),
        ("vit_giant_patch14_224", {}, "heads of 88"),
        ("vit_base_patch16_siglip_224", {}, "pooling 'map'"),
        ("vit_base_patch16_clip_quickgelu_224", {}, "activation"),
        ("vit_medium_patch16_gap_240", dict(global_pool="token"), "class token"),
        ("vit_base_patch16_xp_224", {}, "."),
        (MICRO, dict(width=3), "unknown model override width: choose among img_size"),
        (MICRO, dict(global_pool="max"), "none of token, avg"),
        (MICRO, dict(positions="rope"), "none of learned, sincos"),
        (MICRO, dict(positions="relative", gated_mlp=True), "relative positions, which does not go with gated MLPs"),
        ("vit_giant_patch14_dinov2", dict(positions="relative"), "gated MLPs, which does not go with relative"),
        ("vit_base_patch16_clip_224", dict(gated_mlp=True), "a norm before its blocks, which does not go with gated"),
        (MICRO, dict(positions="relative", reg_tokens=2), "registers, which does not go with relative"),
        ("vit_base_patch16_clip_224", dict(positions="relative"), "a norm before its blocks"),
        ("vit_medium_patch16_gap_240", dict(positions="relative"), "no class token"),
        (MICRO, dict(interpolation="nearest"), "none of antialiased, offset, bicubic"),
        (MICRO, dict(initialisation="zeros"), "none of xavier, mae, dino, dinov2, msn, beit, mocov3"),
        (MICRO, dict(drop_path=1.0), r"\[0, 1\)"),
        (MICRO, dict(img_size=(32, 30)), "multiple of the patch size 8"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(name, overrides, message):
    with pytest.raises(BadInput, match=message):
        vit.create(name, **overrides)
