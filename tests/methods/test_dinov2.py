"""DINOv2 against plain restatements: its three losses and their gradients, the masks' strata, KoLeo where images coincide,
ranks that hold different numbers of masked patches, rates by depth."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
from torch import Tensor

from engine import methods
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Moment
from engine.methods.dinov2 import Dinov2, Settings, koleo
from engine.methods.parts.collapse import CHOICES
from engine.model import vit
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.test_ibot import (
    assert_padding_changes_nothing,
    assert_same_gradients,
    crops,
    drawn,
    masks_of,
    plain_losses,
    plain_tokens,
)
from tests.methods.test_ibot import make as make_ibot
from tests.updates import scaled_gradients

WORLD = 2


def make(**settings: object) -> Dinov2:
    return make_ibot(Dinov2, **({"smallest_block": 1} | settings))


def plain_koleo(features: Tensor) -> Tensor:
    unit = features / features.norm(dim=1, keepdim=True)
    with torch.no_grad():
        similarity = (unit @ unit.T).fill_diagonal_(-2)
    return -(((unit - unit[similarity.argmax(1)]) ** 2).sum(1).sqrt() + 1e-8).log().mean()


@pytest.mark.parametrize("patch_prototypes", [0, 40])
@pytest.mark.parametrize("choice", ["centring", "sinkhorn"])
def test_losses_and_gradients_equal_the_paper(choice: str, patch_prototypes: int):
    method = make(collapse=choice, patch_prototypes=patch_prototypes, patch_bottleneck=24)
    images, numbers = crops(method), drawn(method)
    report = method(images, torch.arange(4), numbers)
    plain = plain_losses(method, images, numbers["masks"])
    masks = numbers["masks"].transpose(0, 1)
    seen = [plain_tokens(method.encoder, x, m, method.mask_token)[:, 0] for x, m in zip(images[:2], masks)]
    spread = sum(plain_koleo(x) for x in seen)
    assert report["class_loss"].item() == pytest.approx(plain["class"].item(), abs=2e-5)
    assert report["patch_loss"].item() == pytest.approx(plain["patch"].item(), abs=2e-5)
    assert report["koleo"].item() == pytest.approx(spread.item() / 2, abs=2e-5)
    assert_same_gradients(method, report["loss"], plain["class"] + plain["patch"] + 0.1 * spread)


@pytest.mark.parametrize("which", ["drawn", "none", "all"])
@pytest.mark.parametrize("choice", CHOICES)
def test_padding_changes_nothing(choice: str, which: str, monkeypatch: pytest.MonkeyPatch):
    method = make(collapse=choice, patch_prototypes=40, patch_bottleneck=24)
    assert_padding_changes_nothing(method, crops(method), masks_of(drawn(method), which), monkeypatch)


def test_patch_loss_is_the_weighted_sum_over_masked_patches_by_twice_the_batch():
    """As the paper's code counts: 1 / (masked patches of the crop) each, and crops without a mask in the denominator."""
    method = make()
    images, masks = crops(method), torch.zeros(4, 2, 16, dtype=torch.bool)
    masks[1, 0, :5] = masks[2, 1, 3] = True
    report = method(images, torch.arange(4), {"masks": masks})
    alone = []
    for image, crop in ((1, 0), (2, 1)):
        one = torch.zeros_like(masks)
        one[image, crop] = masks[image, crop]
        alone.append(method(images, torch.arange(4), {"masks": one})["patch_loss"] * 8)  # the mean over its own patches
    assert report["patch_loss"].item() == pytest.approx(sum(alone).item() / 8, abs=1e-5)


def test_the_patches_centre_follows_masked_patches_alone():
    method = make()
    images, numbers = crops(method), drawn(method)
    before, plain = method.patch_collapse.centre.clone(), plain_losses(method, images, numbers["masks"])
    assert not torch.allclose(plain["masked_mean"], plain["patch_mean"], atol=1e-3)
    method(images, torch.arange(4), numbers)
    method.after_step(torch.tensor(False))
    assert torch.equal(method.patch_collapse.centre, before)
    method(images, torch.arange(4), numbers)
    method.after_step(torch.tensor(True))
    torch.testing.assert_close(method.patch_collapse.centre, 0.9 * before + 0.1 * plain["masked_mean"])
    method(images, torch.arange(4), {"masks": torch.zeros_like(numbers["masks"])})
    before = method.patch_collapse.centre.clone()
    method.after_step(torch.tensor(True))
    assert torch.equal(method.patch_collapse.centre, before)


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_exactly_half_of_the_crops_are_masked_with_ratios_from_every_stratum(batch: int):
    method = make()
    draws = Draws(0, batch=batch, rows=slice(None), device=torch.device("cpu"))
    shares = method.mask_shares(draws)
    masked = shares[shares > 0]
    assert len(shares) == 2 * batch and len(masked) == batch
    assert np.sort((masked - 0.1) / 0.4 * batch).astype(int).tolist() == list(range(batch))
    masks = method.draw(Draws(0, batch=batch, rows=slice(None), device=torch.device("cpu")))["masks"]
    assert (masks.flatten(0, 1).sum(1).numpy() <= shares * 16).all()
    if batch == 32:
        assert np.abs(np.corrcoef(masked, np.arange(32))[0, 1]) < 0.7  # shuffled
        assert not torch.equal(masks, drawn(method, 1, batch)["masks"])


def test_koleo_equals_the_formula():
    features = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(koleo(features), features)
    (plain,) = torch.autograd.grad(plain_koleo(features), features)
    torch.testing.assert_close(koleo(features), plain_koleo(features))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("rows", ["one", "equal", "some equal", "zeros", "close"])
def test_koleo_stays_finite(rows: str):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    features = {
        "one": x[:1],
        "equal": x[:1].repeat(5, 1),
        "some equal": x[[0, 1, 1, 2, 3, 3]],
        "zeros": x * 0,
        "close": x[:1] + 1e-7 * x,
    }[rows].requires_grad_()
    term = koleo(features)
    term.backward()
    assert term.isfinite() and features.grad.isfinite().all()
    if rows == "one":
        assert term == 0 and not features.grad.any()
    elif rows != "close":
        assert term.item() == pytest.approx(-math.log(1e-8), abs=0.5 if rows != "some equal" else 20)
    if rows == "equal":
        assert not features.grad.any()


def test_a_batch_of_one_image_and_a_batch_of_equal_images_train():
    for batch in (1, 3):
        method = make(freeze_last_layer=0)
        update = Update(method, 8)
        images = tuple(view[:1].repeat(batch, 1, 1, 1) for view in crops(method, batch=batch))
        for step in range(1, 4):
            report = update(step, images, torch.arange(batch), drawn(method, step, batch))
            assert math.isfinite(report["loss"]) and math.isfinite(report["gradient_norm"])
        assert update.skipped == 0


def test_the_target_s_temperature_rises_step_by_step():
    method = make(target_temperature_epochs=2, target_temperature=0.07)
    method.begin(Moment(0, 100, 10))
    assert method.target_temperature == 0.04
    method.begin(Moment(5, 100, 10))
    assert method.target_temperature == pytest.approx(0.04 + 0.03 * 5 / 19)
    for step in (19, 20, 99):
        method.begin(Moment(step, 100, 10))
        assert method.target_temperature == pytest.approx(0.07)


def test_rates_fall_with_depth():
    method = make(layer_decay=0.9, patch_embed_lr=0.2, base_lr=4e-3, patch_prototypes=40)
    groups = {name: group for group in method.groups(256) for name in group.parameters}
    trained = {
        "encoder.mask_token" if n == "mask_token" else n for n, p in method.named_parameters() if p.requires_grad
    }
    assert groups.keys() == trained
    peak = 4e-3 * math.sqrt(256 / 1024)
    rates = {
        "encoder.pos_embed": 0.9**3, "encoder.cls_token": 0.9**3, "encoder.mask_token": 0.9**3,
        "encoder.patch_embed.proj.weight": 0.2 * 0.9**3, "encoder.patch_embed.proj.bias": 0.2 * 0.9**3,
        "encoder.blocks.0.attn.qkv.weight": 0.9**2, "encoder.blocks.1.norm2.bias": 0.9, "encoder.norm.weight": 1.0,
        "head.mlp.0.weight": 1.0, "patch_head.last_layer.weight_g": 1.0,
    }  # fmt: skip
    for name, rate in rates.items():
        assert groups[name].peak_lr == pytest.approx(rate * peak), name
    assert {n for n, group in groups.items() if group.frozen_epochs} == {
        f"{head}.last_layer.weight_{part}" for head in ("head", "patch_head") for part in "gv"
    }
    assert groups["encoder.blocks.1.norm2.bias"].weight_decay == 0 < groups["encoder.mask_token"].weight_decay


def test_the_optimiser_watches_frozen_prototypes_where_asked():
    for watches in (False, True):
        method = make(freeze_last_layer=1, frozen_moments=watches)
        frozen = [group for group in method.groups(256) if group.frozen_epochs]
        assert frozen and {group.watches for group in frozen} == {watches}


def test_encoder_and_heads_are_clipped_apart():
    method = make(patch_prototypes=40, clip_norm=1e-3, freeze_last_layer=0)
    update, norms = Update(method, 8), {}

    def look(optimizer: torch.optim.Optimizer, given: tuple, _: dict) -> None:
        scaled = scaled_gradients(*given)
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                norms.setdefault(name.split(".")[0], []).append(scaled[p].norm())

    update.optimizer.register_step_pre_hook(look)
    update(1, crops(method), torch.arange(4), drawn(method))
    assert norms.keys() == {"encoder", "head", "patch_head"}
    for part, found in norms.items():
        assert torch.stack(found).norm().item() == pytest.approx(1e-3, rel=2e-3), part


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {}
    for choice in ("sinkhorn", "me-max+sinkhorn", "centring"):
        method = make(**over_ranks(choice))
        rows = slice(2 * rank, 2 * rank + 2)
        numbers = drawn(method, rows=rows)
        report = method(tuple(view[rows] for view in crops(method)), torch.arange(4)[rows], numbers)
        report["loss"].backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        method.after_step(torch.tensor(True))
        centre = torch.zeros(1) if method.patch_collapse.centre is None else method.patch_collapse.centre
        found[choice] = {
            "loss": report["loss"].detach(),
            "masked": numbers["masks"].sum(),
            "centre": centre,
            **gradients,
        }
    torch.save(found, f"{folder}/{rank}.pt")
    td.destroy_process_group()


def over_ranks(choice: str) -> dict[str, object]:
    # KoLeo looks among a rank's own images, as the released code does, so it is left out here
    return {"collapse": choice, "patch_prototypes": 40, "koleo_weight": 0.0}


def test_ranks_that_mask_differently_find_what_one_process_finds(tmp_path: Path):
    mp.spawn(one_rank, (str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for choice, first in ranks[0].items():
        second, method = ranks[1][choice], make(**over_ranks(choice))
        assert first["masked"] != second["masked"]
        loss = method(crops(method), torch.arange(4), drawn(method))["loss"]
        loss.backward()
        method.after_step(torch.tensor(True))
        torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss.detach(), atol=2e-5, rtol=1e-5)
        for name, p in method.named_parameters():
            if p.grad is not None:
                mean = (first[name] + second[name]) / 2
                torch.testing.assert_close(mean, p.grad, atol=2e-5, rtol=1e-3, msg=f"{choice} {name}")
        if choice == "centring":
            torch.testing.assert_close(first["centre"], method.patch_collapse.centre)
            assert torch.equal(first["centre"], second["centre"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dinov2.koleo-weight", "-1"], "koleo-weight"),
        (["--dinov2.layer-decay", "0"], "layer-decay"),
        (["--dinov2.patch-embed-lr", "0"], "patch-embed-lr"),
        (["--dinov2.masking", "blobs"], "masking"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput, match=named):
        parse(["--method", "dinov2", *flags])


def test_a_batch_splits_only_where_its_images_are_not_compared():
    settings = Settings()
    assert not settings.splits
    assert replace(settings, koleo_weight=0.0).splits
    assert not replace(settings, koleo_weight=0.0, collapse="sinkhorn").splits


@pytest.mark.parametrize("model", ["vit_large_patch14_224", "vit_large_patch16_224", "vit_base_patch14_reg4_dinov2"])
def test_published_recipe(model: str):
    chosen = recipe("dinov2", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    s.check("dinov2")
    assert methods.get(name) is Dinov2
    large = model == "vit_large_patch14_224"
    assert chosen.source.startswith("after ") == (model == "vit_base_patch14_reg4_dinov2")
    s.check_encoder("dinov2", vit.create(model, depth=1, img_size=224))
    assert (s.epochs, s.warmup * s.epochs, s.base_lr) == ((500, 80, 2e-4) if large else (100, 10, 4e-3))
    assert (s.prototypes, s.patch_prototypes) == ((131072, 131072) if large else (65536, 0))
    assert (s.bottleneck, s.patch_bottleneck, s.collapse) == (
        (384, 256, "sinkhorn") if large else (256, 256, "centring")
    )
    assert (s.teacher_momentum, s.weight_decay_end, s.layer_decay) == (
        (0.994, 0.2, 1.0) if large else (0.992, 0.4, 0.9)
    )
    assert (s.crop_scale, s.local_crops, s.local_scale) == ((0.32, 1.0), 8, (0.05, 0.32))
    assert (s.koleo_weight, s.smallest_block, s.clip_over, s.patch_embed_lr) == (0.1, 4, "part", 0.2)
    encoder = vit.create("vit_tiny_patch16_224", depth=1)
    views = Dinov2(encoder, replace(s, prototypes=8, patch_prototypes=0)).views()
    # released: transforms.GaussianBlur hands 1 - p on as the probability
    assert [(view.blur, view.solarize) for view in views] == [(0.0, 0.0), (0.9, 0.2)] + [(0.5, 0.0)] * 8
    assert (s.frozen_moments, s.warmup_form, s.freeze_last_layer) == (True, "through", 1)
    assert (
        s.free_norm and chosen.encoder["init_values"] == 1e-5 and chosen.encoder["drop_path"] == (0.4 if large else 0.3)
    )
    made = vit.without_memory(model, **chosen.encoder)
    assert made.drop_path_rates == (0.4 if large else 0.3,) * made.depth
    assert (made.architecture.gated_mlp, made.architecture.mlp_dim) == (
        (True, 2736) if large else (False, 4 * made.embed_dim)
    )
