"""SimMIM against a plain restatement: mask tokens in place of whole squares, a convolution and pixel shuffle, L1 on what is
masked; the masks, the rate's conversion and its drop, the pictures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core import pictures
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.simmim import Settings, Simmim
from engine.model import vit
from engine.recipes import recipe
from engine.training import pictures as run_pictures
from engine.training.config import parse
from engine.training.state import TrainState
from engine.training.step import Update
from tests.methods.small import small
from tests.methods.test_beit import plain_tokens
from tests.methods.test_mae import plain_block
from tests.saved import content

SMALL = small(Settings, epochs=4, warmup=0.0)
CPU = torch.device("cpu")


def make(encoder: dict[str, object] | None = None, **settings: object) -> Simmim:
    torch.manual_seed(0)
    model = vit.create("vit_micro_patch4_32", **({"depth": 2, "positions": "sincos"} | (encoder or {})))
    return Simmim(model, Settings(**(SMALL | settings)))


def batch(seed: int = 0, size: tuple[int, int] = (32, 32)) -> tuple[Tensor]:
    return (torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(seed)),)


def drawn(method: Simmim, step: int = 0, images: int = 4) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=images, rows=slice(None), device=CPU))


def grids(method: Simmim, noise: Tensor) -> Tensor:
    """Masks as bool [b, rows, columns] of patches."""
    masked = method.masked(noise)
    rows, columns = method.encoder.grid
    flat = torch.zeros(len(noise), rows * columns, dtype=torch.bool)
    for image, patches in enumerate(masked.tolist()):
        assert len(set(patches)) == len(patches)
        flat[image, patches] = True
    return flat.view(-1, rows, columns)


def fixed_positions_tokens(method: Simmim, images: Tensor, mask: Tensor) -> Tensor:
    """[b, 1 + N, C]"""
    encoder, p = method.encoder, method.encoder.patch_size
    patches = F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=p)
    weight = mask.flatten(1)[..., None].float()
    x = patches.flatten(2).transpose(1, 2) * (1 - weight) + method.mask_token * weight + encoder.pos_embed[:, 1:]
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1), x], 1)
    for block in encoder.blocks:
        x = plain_block(x, block)
    return encoder.norm(x)


def plain_loss(method: Simmim, images: Tensor, mask: Tensor) -> Tensor:
    """Xie et al. 2022, sections 3.2 to 3.4; `mask` is bool [b, rows, columns] of patches."""
    encoder, p = method.encoder, method.encoder.patch_size
    released = encoder.rel_pos_bias is not None  # as BEiT's
    x = plain_tokens(method, images, mask.flatten(1)) if released else fixed_positions_tokens(method, images, mask)
    x = x[:, 1:].transpose(1, 2).unflatten(2, encoder.grid)
    linear = method.decoder.mlp[0]
    kernel = linear.weight.view(p, p, 3, -1).permute(2, 0, 1, 3).flatten(0, 2)[:, :, None, None]
    bias = linear.bias.view(p, p, 3).permute(2, 0, 1).flatten()
    restored = F.pixel_shuffle(F.conv2d(x, kernel, bias), p)
    pixels = mask.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None].float()
    return ((restored - images).abs() * pixels).sum() / pixels.sum() / 3


RELEASED = {"positions": "relative", "initialisation": "beit", "init_values": 0.1}


@pytest.mark.parametrize("encoder", [{}, RELEASED])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_loss_and_gradients_equal_the_paper(size: tuple[int, int], encoder: dict[str, object]):
    method = make({"img_size": size} | encoder)
    if encoder:
        torch.nn.init.normal_(method.encoder.rel_pos_bias.relative_position_bias_table)  # which starts at zero
    (images,), random = batch(size=size), drawn(method)
    loss = method((images,), torch.arange(4), random)["loss"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    plain = plain_loss(method, images, grids(method, random["noise"]))
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    theirs = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("size", "patch", "unit", "ratio", "hidden"),
    [
        ((224, 224), 16, 32, 0.6, 30),  # 29.4 of 49
        ((224, 224), 16, 16, 0.6, 118),
        ((32, 64), 4, 8, 0.5, 16),
        ((40, 80), 4, 4, 0.55, 110),  # of 200: floats make it 110.00000000000001
        ((32, 32), 4, 16, 0.7, 3),
    ],
)
def test_masks_are_whole_squares_of_the_wanted_number(
    size: tuple[int, int], patch: int, unit: int, ratio: float, hidden: int
):
    method = make({"img_size": size, "patch_size": patch, "depth": 1}, mask_unit=unit, mask_ratio=ratio)
    masks = grids(method, drawn(method, images=16)["noise"])
    side = unit // patch
    squares = masks.unflatten(2, (-1, side)).unflatten(1, (-1, side)).sum((2, 4))
    assert set(squares.flatten().tolist()) == {0, side**2}
    assert (squares > 0).sum((1, 2)).tolist() == [hidden] * 16


def test_masks_are_uniform_and_differ_between_images_and_steps():
    method = make(mask_unit=8, mask_ratio=0.5)
    masks = torch.stack([grids(method, drawn(method, step, 16)["noise"]) for step in range(200)])
    assert (masks.float().mean((0, 1)) - 0.5).abs().max() < 0.045  # 3,200 draws: five standard deviations
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 200
    rows = Draws(0, 3, batch=16, rows=slice(4, 8), device=CPU)
    assert torch.equal(method.draw(rows)["noise"], drawn(method, 3, 16)["noise"][4:8])


def test_hidden_pixels_are_not_seen():
    method, (images,) = make(), batch()
    noise = drawn(method)["noise"]
    pixels = grids(method, noise).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    masked = method.masked(noise)
    expected = method.predict(images, masked, {})
    assert torch.equal(
        method.predict(torch.where(pixels, 100 * torch.randn_like(images), images), masked, {}), expected
    )
    shown = method.predict(torch.where(pixels, images, torch.randn_like(images)), masked, {})
    assert not torch.allclose(shown, expected)


def test_stochastic_depth_is_a_function_of_seed_stage_and_step():
    method = make({"drop_path": 0.5, "depth": 3})
    images, ids = batch(), torch.arange(4)

    def loss(step: int, **others: Tensor) -> float:
        return method(images, ids, drawn(method, step) | others)["loss"].item()

    noise = drawn(method)["noise"]
    assert loss(1) == loss(1)
    assert loss(1, noise=noise) != loss(2, noise=noise), "the same mask, other sequences dropped"
    assert drawn(make()).keys() == {"noise"}


def test_micro_batches_give_the_whole_batch_s_update():
    found = []
    for accumulate in (1, 2):
        method = make(clip_norm=0.0)
        update = Update(method, 8, accumulate=accumulate)
        losses = [update(step, batch(step), torch.arange(4), drawn(method, step))["loss"] for step in (1, 2)]
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found)
    assert Settings().splits


def test_a_skipped_update_changes_nothing():
    method = make({"drop_path": 0.5}, weight_ema=0.9)
    update = Update(method, 8)
    update(0, batch(), torch.arange(4), drawn(method))
    before = content(method, update)
    update(1, (batch(1)[0] * float("nan"),), torch.arange(4), drawn(method, 1))
    after = content(method, update)
    assert update.skipped == 1
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any("patches_UI" in name for name in before), "what follows from the settings is not saved"


def test_published_recipe_with_its_rate_per_512_images():
    chosen = recipe("simmim", "vit_base_patch16_224", "auto", embedded=False)
    ((name, s),) = chosen.stages
    assert chosen.source == "SimMIM's released ViT-B recipe (S) on 2048 images"
    assert recipe("simmim", "vit_large_patch16_224", "auto", embedded=False).source.startswith("after SimMIM")
    assert chosen.encoder == {
        "initialisation": "beit", "positions": "relative", "init_values": 0.1, "global_pool": "avg", "drop_path": 0.1
    }  # fmt: skip
    assert (name, s.epochs, s.batch_size, s.warmup * s.epochs) == ("simmim", 800, 2048, 10)
    assert (s.weight_decay, s.clip_norm, s.clip_over, s.optimizer) == (0.05, 5, "all", "adamw")
    assert (s.mask_unit, s.mask_ratio, s.crop_scale, s.flip) == (32, 0.6, (0.67, 1.0), 0.5)
    (view,) = Simmim(vit.create("vit_tiny_patch16_224", depth=1), s).views()
    assert (view.size, view.scale, view.jitter, view.blur, view.resize) == ((224, 224), (0.67, 1.0), 0, 0, "bilinear")
    decays = {
        name: group.weight_decay for group in make(decay_token=s.decay_token).groups(2048) for name in group.parameters
    }
    assert decays["encoder.cls_token"] == 0 < decays["mask_token"] == 0.05
    assert all(
        bool(decays[name]) == (p.ndim > 1) for name, p in make().named_parameters() if name in decays and p.ndim < 3
    )
    assert "encoder.cls_token" in next(iter(make().groups(2048))).parameters
    named = ("epochs", "start_lr", "base_lr", "warmup", "warmup_form", "schedule", "drops", "batch_size")
    method = make(**{name: getattr(s, name) for name in named})
    update, seen = Update(method, 800), {}
    for step in (0, 1, 6, 11, 700, 701, 799):
        seen[step] = update(step, batch(), torch.arange(4), drawn(method))["lr"]
    peak = 1e-4 * 2048 / 512
    assert seen == pytest.approx(
        {0: 2e-6, 1: 2e-6, 6: (2e-6 + peak) / 2, 11: peak, 700: peak, 701: peak / 10, 799: peak / 10}
    )
    ((_, small_images),) = recipe("simmim", "vit_micro_patch8_32", "plain", embedded=False).stages
    small_images.check_encoder("simmim", vit.create("vit_micro_patch8_32", depth=1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mask_unit": 6}, r"--simmim.mask-unit is 6; it must be a multiple of the patch size 4 and divide both sides"),
        ({"mask_unit": 12}, r"--simmim.mask-unit is 12; .* model's 32 x 32 pixels"),
        ({"mask_unit": 32}, r"of the image's 1 squares of 32 pixels that hides all"),
        ({"mask_unit": 16, "mask_ratio": 0.76}, r"of the image's 4 squares of 16 pixels that hides all"),
    ],
)
def test_squares_must_consist_of_patches_and_leave_some(settings: dict[str, float], named: str):
    with pytest.raises(BadInput, match=named):
        Settings(**(SMALL | settings)).check_encoder("simmim", vit.create("vit_micro_patch4_32", depth=1))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--simmim.mask-unit", "0"], "--simmim.mask-unit is 0; it must be a whole number from 1"),
        (["--simmim.mask-ratio", "1"], "--simmim.mask-ratio is 1.0; it must be a share between 0 and 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput) as refusal:
        parse(["--method", "simmim", *flags])
    assert named in str(refusal.value)


def test_pictures_show_predictions_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method, (images,) = make(), batch()
    masked, prediction = method.reconstruct(images, Draws(0, batch=4, rows=slice(None), device=CPU))
    assert masked.shape == (4, method.hidden_units * 4)
    torch.testing.assert_close(prediction, method.predict(images, masked, {}))
    seen, fill = [], pictures.fill
    monkeypatch.setattr(pictures, "fill", lambda *given, normalised: seen.append(normalised) or fill(*given))
    monkeypatch.setattr(run_pictures, "_shown_images", lambda parts: images)
    parts = SimpleNamespace(
        stages=[SimpleNamespace(index=0, name="simmim")],
        settings=lambda index: method.settings,
        plan=SimpleNamespace(train=SimpleNamespace(seed=0)),
        ranks=SimpleNamespace(device=CPU),
        precision="fp32",
    )
    run_pictures.draw(parts, TrainState(method, Update(method, 8), 0, 0, []), tmp_path)
    assert seen == [False]
    assert {path.name for path in tmp_path.iterdir()} == {"1-simmim-reconstructions.png", "1-simmim-patch-pca.png"}
