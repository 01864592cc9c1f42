"""What published recipes take from their authors' code beside the numbers: first weights, positions, resizing, warm-up. Recipes
for the digits keep this project's own."""

from dataclasses import fields

import pytest

from engine import recipes
from engine.model import vit

MICRO = "vit_micro_patch8_32"
# method: first weights, positions of small crops, resizing, form of the warm-up
RELEASED = {
    "mae": ("mae", "antialiased", "bicubic", "from-start"),
    "maect": ("mae", "antialiased", "bicubic", "between"),
    "mim_refiner": ("mae", "bicubic", "bicubic", "between"),
    "simmim": ("beit", "antialiased", "bilinear", "late"),
    "beit": ("beit", "antialiased", "bicubic", "through"),
    "relvit": ("dino", "offset", "bilinear", "from-start"),
    "mocov3": ("mocov3", "antialiased", "bilinear", "from-start"),
    "dino": ("dino", "offset", "bicubic", "through"),
    "ibot": ("dino", "offset", "bicubic", "through"),
    "mmc": ("dino", "offset", "bicubic", "through"),
    "mim_cluster": ("dino", "offset", "bicubic", "through"),
    "dinov2": ("dinov2", "offset", "bicubic", "through"),
    "msn": ("msn", "bicubic", "bilinear", "to-peak"),
    "swav": ("xavier", "antialiased", "bilinear", "through"),
}


@pytest.mark.parametrize("method", RELEASED)
def test_published_recipes_take_their_authors_ways_and_digits_ours(method: str):
    published = recipes.recipe(method, "vit_base_patch16_224", "plain", embedded=False)
    made = vit.create("vit_tiny_patch16_224", **published.encoder | {"depth": 1}).architecture
    own = [(s.resize, s.warmup_form) for name, s in published.stages if name == method]
    assert (made.initialisation, made.interpolation, *own[0]) == RELEASED[method]
    digits = recipes.recipe(method, MICRO, "digits", embedded=True)
    made = vit.create(MICRO, **digits.encoder | {"depth": 1}).architecture
    assert (made.initialisation, made.interpolation) == ("xavier", "antialiased")
    assert {(s.resize, s.warmup_form) for _, s in digits.stages} == {("bicubic", "from-start")}


@pytest.mark.parametrize("method", ["relvit", "supervised"])
def test_relvit_s_presets_of_sets_resize_and_fall_alike(method: str):
    ((_, settings),) = recipes.recipe(method, "vit_small_patch16_224", "cifar10", embedded=False).stages
    assert (settings.resize, settings.schedule, settings.warmup_form) == ("bilinear", "quarter-cosine", "from-start")


@pytest.mark.parametrize("model", ["vit_large_patch16_224", MICRO])
@pytest.mark.parametrize(
    ("method", "cheaper"),
    [
        ("maect", {("nnclr", "reuse"): 1, ("maect", "patch_keep"): 0.5, ("maect", "frozen_precision"): "bf16"}),
        ("mim_refiner", {("mim_heads", "patch_keep"): 0.5, ("mim_refiner", "patch_keep"): 0.5}),
        ("mae", {("mae", "epochs"): 400, ("mae", "mask_ratio"): 0.85, ("mae", "decoder_depth"): 4}),
    ],
)
def test_presets_that_cost_less_are_the_plain_recipe_but_for_what_they_say(method: str, cheaper: dict, model: str):
    presets = ("plain", "efficient" if method == "mae" else "thrift")
    plain, thrift = (recipes.recipe(method, model, preset, embedded=False) for preset in presets)
    assert thrift.encoder == plain.encoder and thrift.source.startswith("after M")
    changed = {
        (name, field.name): getattr(ours, field.name)
        for (name, ours), (_, theirs) in zip(thrift.stages, plain.stages, strict=True)
        for field in fields(ours)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    }
    assert changed == cheaper
