import math

import pytest
import timm
import torch

import kernels
from engine.core.errors import BadInput
from engine.model import twins, vit
from engine.model.positions import sincos_positions
from engine.model.tokens import Group, Layout, View, random_masking
from tests.model.shaken import MICRO, RELATIVE, draw, shaken


def twin_of(model, **extra):
    """timm's model of the same shape, holding the same parameters."""
    twin = twins.twin_of(model.architecture)
    if extra:
        twin = timm.create_model(twin.pretrained_cfg["architecture"], device="meta", **twin._model_args | extra)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def assert_equals_timm(model, images, twin=None, **extra):
    twin = twin or twin_of(model, **extra)
    with torch.no_grad():
        ours, theirs = model(images), twin.forward_features(images)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.pool(ours), twin.forward_head(theirs, pre_logits=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_micro_patch4_32", {}),
        ("vit_tiny_patch16_224", dict(positions="sincos")),
        ("vit_small_patch16_224", dict(depth=6, global_pool="avg")),
        ("vit_tiny_patch16_224", dict(global_pool="avg", fc_norm=True, depth=4)),
        ("vit_base_patch16_224", dict(depth=3, init_values=0.1)),
        ("vit_base_patch14_reg4_dinov2", dict(depth=2, img_size=(224, 112), init_values=0.1)),
        ("vit_small_patch16_224", dict(depth=4, reg_tokens=3, patch_size=32)),
        ("vit_medium_patch16_gap_240", dict(depth=3)),
        ("vit_base_patch16_clip_224", dict(depth=3)),
        ("deit3_small_patch16_224", dict(depth=3)),
        (MICRO, dict(gated_mlp=True, init_values=0.1, depth=2)),
        ("vit_giant_patch14_dinov2", dict(depth=1, img_size=28)),
    ],
)
def test_equals_timm(name, overrides):
    model = shaken(name, **overrides)
    assert_equals_timm(model, torch.randn(1, 3, *model.img_size, generator=draw()))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (MICRO, dict(init_values=0.1)),
        (MICRO, dict(img_size=(24, 40), global_pool="avg", depth=2)),
        (MICRO, dict(global_pool="avg", fc_norm=True, depth=2)),
        ("vit_base_patch16_224", dict(depth=2, init_values=0.1, global_pool="avg")),
    ],
)
def test_with_relative_positions_equals_timm_s_beit(name, overrides):
    model = shaken(name, **overrides, **RELATIVE)
    assert model.rel_pos_bias.relative_position_bias_table.std() > 0.01
    twin = twins.twin_of(model.architecture, "cpu").eval()
    assert type(twin).__name__ == "Beit"
    twin.load_state_dict(model.architecture.timm_state(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model.rel_pos_bias(), twin.rel_pos_bias())
    assert_equals_timm(model, torch.randn(2, 3, *model.img_size, generator=draw()), twin)


def test_relative_gradients_equal_timm():
    model, images = shaken(MICRO, depth=2, init_values=0.5, **RELATIVE), torch.randn(2, 3, 32, 32, generator=draw())
    twin, weight = twins.twin_of(model.architecture, "cpu"), torch.randn(2, 17, 128, generator=draw(1))
    twin.load_state_dict(model.architecture.timm_state(model.state_dict()))
    (model(images) * weight).sum().backward()
    (twin.forward_features(images) * weight).sum().backward()
    ours = model.architecture.timm_state({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert ours["rel_pos_bias.relative_position_bias_table"].abs().sum(1).min() > 0


def test_relative_positions_want_whole_images_of_the_model_s_size():
    model, images = vit.create(MICRO, depth=1, **RELATIVE), torch.zeros(2, 3, 32, 32)
    with pytest.raises(BadInput, match="grid of 4x4 patches, which images of 6x4 do not fit"):
        model(torch.zeros(2, 3, 48, 32))
    with pytest.raises(BadInput, match="whole images"):
        model.encode([View(images, torch.arange(4).expand(2, -1))])
    with pytest.raises(ValueError, match="kv_lengths or a bias"):
        lengths = torch.tensor([17], dtype=torch.int32)
        model.blocks[0].attn(
            torch.zeros(17, 128), Layout((Group(1, 17),)).cu_seqlens("cpu"), 17, lengths, model.rel_pos_bias()
        )


def test_views_with_relative_positions_share_a_pass():
    model = shaken(MICRO, depth=2, **RELATIVE)
    views = [View(torch.randn(batch, 3, 32, 32, generator=draw(batch))) for batch in (4, 2)]
    with torch.no_grad():
        for together, view in zip(model.encode(views).unpack(), views, strict=True):
            torch.testing.assert_close(together, model(view.images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "width"), [("vit_large_patch16_224", 1024), ("vit_huge_patch14_224", 1280)])
def test_large_and_huge_with_two_blocks_equal_timm(name, width):
    model = vit.create(name, depth=2)
    assert model.embed_dim == width
    assert_equals_timm(model, torch.randn(1, 3, 224, 224, generator=draw()))


@pytest.mark.parametrize("overrides", [{}, dict(positions="sincos", reg_tokens=2), dict(no_embed_class=True)])
def test_interpolated_positions_equal_timm(overrides):
    images = torch.randn(2, 3, 48, 24, generator=draw())
    assert_equals_timm(shaken(MICRO, **overrides), images, dynamic_img_size=True)


def test_gradients_equal_timm():
    model, images = shaken(MICRO, depth=2, reg_tokens=1, init_values=0.5), torch.randn(2, 3, 32, 32, generator=draw())
    twin, weight = twin_of(model), torch.randn(2, 18, 128, generator=draw(1))
    (model(images) * weight).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (twin.forward_features(images) * weight).sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_mixture_of_lengths_equals_its_sequences_one_by_one():
    model = shaken("vit_micro_patch4_32")
    whole, local = torch.randn(2, 3, 32, 32, generator=draw(1)), torch.randn(8, 3, 16, 16, generator=draw(2))
    visible, _ = random_masking(torch.rand(2, 64, generator=draw(3)), keep=16)
    with torch.no_grad():
        mixed = model.encode([View(whole), View(local), View(whole, visible)])
        assert mixed.layout == Layout((Group(2, 65), Group(8, 17), Group(2, 17)))
        single = [[model(image[None])[0] for image in whole], [model(image[None])[0] for image in local], []]
        for image, patches in zip(whole, visible, strict=True):
            single[2].append(model.encode([View(image[None], patches[None])]).tokens_TC)
    for group, one_by_one in zip(mixed.unpack(), single, strict=True):
        torch.testing.assert_close(group, torch.stack(one_by_one), atol=1e-5, rtol=1e-5)


def test_hidden_patches_are_never_read():
    model, images = shaken(MICRO), torch.randn(2, 3, 32, 32, generator=draw())
    visible, masked = random_masking(torch.rand(2, 16, generator=draw()), keep=4)
    with torch.no_grad():
        clean = model.encode([View(images, visible)]).tokens_TC
        patches = images.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 3, 8, 8)
        patches[torch.arange(2)[:, None], masked] = math.nan
        spoiled = patches.view(2, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
        assert spoiled.isnan().any()
        assert torch.equal(model.encode([View(spoiled, visible)]).tokens_TC, clean)


def test_visible_order_carries_the_positions_along():
    model, images = shaken(MICRO), torch.randn(1, 3, 32, 32, generator=draw())
    order = torch.randperm(16, generator=draw())[None]
    with torch.no_grad():
        whole, shuffled = model(images), model.encode([View(images, order)]).unpack()[0]
    torch.testing.assert_close(shuffled[:, 1:], whole[:, 1:][:, order[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [32, 48])
def test_without_positions_moved_patches_are_moved_tokens(columns):
    model, images = vit.create(MICRO, positions="none", depth=2), torch.randn(1, 3, 32, columns, generator=draw())
    assert not model.pos_embed.any()
    assert not model.pos_embed.requires_grad
    assert_equals_timm(model, images, dynamic_img_size=True)
    with torch.no_grad():
        whole, moved = (model(x)[:, 1:].unflatten(1, (4, -1)) for x in (images, images.roll((8, 16), (2, 3))))
    torch.testing.assert_close(moved, whole.roll((1, 2), (1, 2)), atol=1e-5, rtol=1e-5)
    assert (moved - whole).abs().max() > 0.1


def test_run_blocks_in_parts_equals_whole_and_frozen_part_takes_no_gradient():
    model, images = shaken(MICRO), torch.randn(2, 3, 32, 32, generator=draw())
    with torch.no_grad():
        lower = model.run_blocks(model.embed([View(images)]), stop=3)
    upper = model.run_blocks(lower, start=3)
    whole = model.run_blocks(model.embed([View(images)]))
    torch.testing.assert_close(upper.tokens_TC, whole.tokens_TC, atol=1e-6, rtol=1e-6)
    upper.tokens_TC.sum().backward()
    assert model.blocks[2].attn.qkv.weight.grad is None
    assert model.blocks[3].attn.qkv.weight.grad is not None


def test_stochastic_depth_needs_a_generator_and_a_rate():
    images = torch.randn(4, 3, 32, 32, generator=draw())
    still, dropping = shaken(MICRO), shaken(MICRO, drop_path=0.5)
    assert dropping.drop_path_rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert shaken(MICRO, drop_path=0.5, drop_path_uniform=True).drop_path_rates == (0.5,) * 6
    with torch.no_grad():
        plain = still(images)
        assert torch.equal(dropping(images), plain)
        assert torch.equal(still.encode([View(images)], draw()).unpack()[0], plain)
        first, again, other = (dropping.encode([View(images)], draw(seed)).tokens_TC for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_stochastic_depth_passes_gradients_through_kept_and_dropped_rows():
    model = shaken(MICRO, drop_path=0.5)
    packed = model.embed([View(torch.randn(4, 3, 32, 32, generator=draw()))])
    packed.tokens_TC.retain_grad()
    (model.run_blocks(packed, generator=draw()).tokens_TC ** 2).sum().backward()
    assert (packed.tokens_TC.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_fixed_positions_are_constant_zero_for_the_prefix_and_cached_per_size():
    model = vit.create(MICRO, positions="sincos", reg_tokens=2)
    assert not model.pos_embed.requires_grad
    assert (model.pos_embed[:, :3] == 0).all()
    torch.testing.assert_close(model.pos_embed[0, 3:], sincos_positions(128, (4, 4)))
    with torch.inference_mode():
        first = model.positions((6, 2))
    assert model.positions((6, 2)) is first
    assert not first.is_inference()
    with torch.no_grad():
        model.pos_embed.mul_(2)
    torch.testing.assert_close(model.positions((6, 2)), 2 * first)


def test_learned_positions_learn_at_every_size():
    model = vit.create(MICRO)
    before = model.positions((6, 6)).detach()
    model.pos_embed.data.mul_(2)  # as a moving average may write: without a trace
    torch.testing.assert_close(model.requires_grad_(False).positions((6, 6)), 2 * before)
    model.requires_grad_(True)(torch.randn(1, 3, 48, 48, generator=draw())).square().sum().backward()
    assert (model.pos_embed.grad.abs().sum(dim=2) > 0).all()


def test_initialisation_is_complete_bounded_and_drawn_from_the_generator():
    model, again = (vit.create(MICRO, generator=draw(5), reg_tokens=1, init_values=0.3) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.initialise(draw(5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for linear in (part for part in model.modules() if isinstance(part, torch.nn.Linear)):
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert (linear.bias == 0).all()
    bound = math.sqrt(6 / (3 * 8 * 8 + 128))
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert 0.01 < model.cls_token.std() < 0.03
    assert 0.015 < model.pos_embed.std() < 0.025
    assert (model.blocks[0].ls1.gamma == 0.3).all()


def test_names_are_creatable_and_cover_the_usual_ones():
    names = vit.names()
    assert {MICRO, "vit_micro_patch4_32", "vit_tiny_patch16_224", "vit_huge_patch14_gap_224"} <= set(names)
    assert {"vit_base_patch14_reg4_dinov2", "deit3_huge_patch14_224"} <= set(names)
    assert not any("siglip_224" in name or "rope" in name or "giant_patch14_224" in name for name in names)


def test_images_of_a_broken_size_are_refused():
    for shape in [(1, 3, 30, 32), (1, 1, 32, 32), (3, 32, 32)]:
        with pytest.raises(BadInput, match="multiples of the patch size 8"):
            vit.create(MICRO, depth=1)(torch.zeros(shape))


def test_only_visible_patches_are_gathered(monkeypatch):
    model, gathered = shaken(MICRO, depth=1), []
    original = kernels.gather_patches
    monkeypatch.setattr(kernels, "gather_patches", lambda *args: gathered.append(args[1].shape) or original(*args))
    visible, _ = random_masking(torch.rand(2, 16, generator=draw()), keep=4)
    model.encode([View(torch.zeros(2, 3, 32, 32), visible)])
    assert gathered == [(2, 4)]
