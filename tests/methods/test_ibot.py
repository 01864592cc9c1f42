"""iBOT against plain restatements: both losses and their gradients, the masks, both centres, the teacher, a skipped update."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import methods
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Moment
from engine.methods import ibot
from engine.methods.base import Method
from engine.methods.ibot import Ibot, Masked, Settings, padded_rows
from engine.methods.parts.collapse import CHOICES
from engine.model import vit, weights
from engine.model.heads import DinoHead
from engine.model.tokens import View
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.parts.test_collapse import published_sinkhorn
from tests.methods.small import small
from tests.methods.test_dino import plain_head
from tests.methods.test_mae import plain_block
from tests.saved import content
from tests.updates import finish

SMALL = small(Settings, epochs=4, augmentation="minimal", target_temperature_epochs=0)


def make(kind: type[Ibot] = Ibot, **settings: object) -> Ibot:
    torch.manual_seed(0)
    method = kind(vit.create("vit_micro_patch8_32", depth=2), kind.Settings(**(SMALL | settings)))
    with torch.no_grad():  # the teacher has gone its own way, and the mask token is seen
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        method.mask_token.normal_()
        for guard in (method.collapse, method.patch_collapse):
            if guard.centre is not None:
                guard.centre.normal_(std=0.3)
    return method


def crops(method: Ibot, seed: int = 0, batch: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, *view.size, generator=generator) for view in method.views())


def drawn(method: Ibot, step: int = 0, batch: int = 4, rows: slice = slice(None)) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=rows, device=torch.device("cpu")))


def plain_tokens(encoder: vit.VisionTransformer, images: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """A plain ViT in which `token` stands for masked patches, before positions are added."""
    weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
    tokens = F.conv2d(images, weight, bias, stride=encoder.patch_size).flatten(2).transpose(1, 2)
    tokens = tokens * (1 - mask.float()[..., None]) + token * mask.float()[..., None]
    start = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([start, tokens + encoder.pos_embed[:, 1:]], 1)
    for block in encoder.blocks:
        x = plain_block(x, block)
    return encoder.norm(x)


def heads_of(owner: object) -> tuple[DinoHead, DinoHead]:
    return owner.head, getattr(owner, "patch_head", owner.head)


def plain_distribution(method: Ibot, scores: Tensor, centre: Tensor | None) -> Tensor:
    temperature = method.target_temperature
    if "sinkhorn" in method.settings.collapse:
        return published_sinkhorn(scores, temperature)
    return ((scores if centre is None else scores - centre) / temperature).softmax(-1)


def plain_spread(method: Ibot, scores: Tensor) -> Tensor:
    mean = (scores / method.settings.student_temperature).softmax(1).mean(0)
    return math.log(scores.shape[1]) + (mean * mean.log()).sum()


def plain_losses(method: Ibot, images: tuple[Tensor, ...], masks: Tensor) -> dict[str, Tensor]:
    """Zhou et al. 2022, section 3, with multi-crop: class loss over pairs of crops, patch loss within a crop."""
    s, masks = method.settings, masks.transpose(0, 1)
    with torch.no_grad():
        nothing = torch.zeros_like(masks[0])
        taught = [plain_tokens(method.teacher.encoder, x, nothing, method.mask_token) for x in images[:2]]
        head, patch_head = heads_of(method.teacher)
        taught_class = torch.stack([plain_head(head, x[:, 0]) for x in taught])
        taught_patch = torch.stack(
            [plain_head(patch_head, x[:, 1:].flatten(0, 1)).view(*x[:, 1:].shape[:2], -1) for x in taught]
        )
        targets = plain_distribution(method, taught_class.flatten(0, 1), method.collapse.centre).view_as(taught_class)
        patch_targets = torch.zeros_like(taught_patch)
        patch_targets[masks] = plain_distribution(method, taught_patch[masks], method.patch_collapse.centre)
    seen = [plain_tokens(method.encoder, x, m, method.mask_token) for x, m in zip(images[:2], masks)]
    head, patch_head = heads_of(method)
    classes = [plain_head(head, x[:, 0]) for x in seen] + [
        plain_head(head, method.encoder(x)[:, 0]) for x in images[2:]
    ]
    terms = [
        -(q * (z / s.student_temperature).log_softmax(1)).sum(1).mean()
        for i, q in enumerate(targets)
        for j, z in enumerate(classes)
        if i != j
    ]
    patches = [plain_head(patch_head, x[:, 1:].flatten(0, 1)).view_as(taught_patch[0]) for x in seen]
    patch_terms = []
    for q, z, mask in zip(patch_targets, patches, masks):
        losses = -(q * (z / s.student_temperature).log_softmax(2)).sum(2)
        patch_terms.append(((losses * mask).sum(1) / mask.sum(1).clamp_min(1)).mean())
    spread = torch.zeros(())
    if "me-max" in s.collapse:
        spread = plain_spread(method, torch.cat(classes)) + plain_spread(method, torch.stack(patches)[masks])
    return {
        "class": sum(terms) / len(terms),
        "patch": sum(patch_terms) / 2,
        "spread": spread,
        "class_mean": taught_class.mean((0, 1)),
        "patch_mean": taught_patch.mean((0, 1, 2)),
        "masked_mean": taught_patch[masks].mean(0),
    }


def assert_same_gradients(method: Ibot, loss: Tensor, plain: Tensor) -> None:
    loss.backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    plain.backward()
    theirs = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert not any(name.startswith("teacher") for name in ours)
    assert ours["mask_token"].abs().max() > 0
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("patch_prototypes", [0, 40])
@pytest.mark.parametrize("choice", CHOICES)
def test_losses_and_gradients_equal_the_paper(choice: str, patch_prototypes: int):
    method = make(collapse=choice, patch_prototypes=patch_prototypes, patch_bottleneck=24, patch_weight=0.7)
    images, numbers = crops(method), drawn(method)
    assert numbers["masks"].any((1, 2)).sum() > 1 and not numbers["masks"].any(2).all()
    report = method(images, torch.arange(4), numbers)
    plain = plain_losses(method, images, numbers["masks"])
    assert report["class_loss"].item() == pytest.approx(plain["class"].item(), abs=2e-5)
    assert report["patch_loss"].item() == pytest.approx(plain["patch"].item(), abs=2e-5)
    if "me-max" in choice:
        expected = report["class_loss"] + 0.7 * report["patch_loss"]
        assert report["loss"] > expected
        method.settings = Settings(**(vars(method.settings) | {"patch_weight": 1.0}))
        report = method(images, torch.arange(4), numbers)
        assert_same_gradients(method, report["loss"], plain["class"] + plain["patch"] + plain["spread"])
    else:
        assert_same_gradients(method, report["loss"], plain["class"] + 0.7 * plain["patch"])


def test_both_centres_move_after_the_update_the_patches_by_all_patches():
    method = make()
    images, numbers = crops(method), drawn(method)
    plain = plain_losses(method, images, numbers["masks"])
    before = method.collapse.centre.clone(), method.patch_collapse.centre.clone()
    for applied, share in ((False, 0.0), (True, 0.1)):
        method(images, torch.arange(4), numbers)
        assert torch.equal(method.patch_collapse.centre, before[1])
        finish(method, applied)
        torch.testing.assert_close(method.collapse.centre, (1 - share) * before[0] + share * plain["class_mean"])
        torch.testing.assert_close(method.patch_collapse.centre, (1 - share) * before[1] + share * plain["patch_mean"])


def test_only_masked_patches_are_blank_and_only_for_the_student():
    method = make()
    images, masks = crops(method), drawn(method)["masks"]
    masked = Masked.of(masks, 1, torch.device("cpu"), 0.5)
    for poisoned, same in ((masks, True), (~masks, False)):
        pixels = poisoned.transpose(0, 1).float().unflatten(2, (4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
        changed = tuple(view + 9 * p[:, None] for view, p in zip(images, pixels)) + images[2:]
        for ours, theirs in zip(method.see(images, masked, {})[:2], method.see(changed, masked, {})):
            assert torch.equal(ours, theirs) == same
        assert not torch.equal(*(method.teach([View(view) for view in seen[:2]])[0] for seen in (images, changed)))


def test_rows_and_weights_of_masked_patches():
    masks = torch.zeros(2, 2, 4, dtype=torch.bool)
    masks[0, 0, [1, 3]] = masks[1, 0, 2] = masks[1, 1, [0, 1, 2]] = True  # image, crop, patch
    masked = Masked.of(masks, 1, torch.device("cpu"), 0.5)
    tokens = [torch.arange(10.0).view(2, 5, 1) + 100 * view for view in range(2)]
    assert torch.cat(masked.rows_of(tokens))[:, 0].tolist() == [2, 4, 8, 106, 107, 108]
    assert masked.count == 6 and masked.patches.tolist() == [1, 3, 6, 12, 13, 14] + [0] * 10
    torch.testing.assert_close(masked.weights, torch.tensor([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3] + [0] * 10) / 4)
    assert masked.padded(masked.rows_of(tokens))[:, 0].tolist() == [2, 4, 8, 106, 107, 108] + [2] * 10
    second = [view[:0] if index == 0 else view for index, view in enumerate(masked.rows_of(tokens))]
    assert replace(masked, count=3, weights=torch.zeros(5)).padded(second)[:, 0].tolist() == [106, 107, 108, 106, 106]
    assert [view.tolist() for view in masked.hidden] == masks.transpose(0, 1).tolist()


def test_rows_are_padded_to_the_next_tenth_of_what_is_expected():
    assert [padded_rows(count, 3763.2) for count in (0, 1, 384, 385, 3763, 3841)] == [0, 384, 384, 768, 3840, 4224]
    assert [padded_rows(count, 10.0) for count in (0, 1, 16, 17, 128)] == [0, 16, 16, 32, 128]


def learned(method: Method, images: tuple[Tensor, ...], numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the method reports of a batch, its gradients, and the buffers that an update with it leaves."""
    method.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    report = method(images, torch.arange(len(images[0])), numbers)
    report["loss"].backward()
    found = {name: value.detach() for name, value in report.items()}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.after_step(torch.tensor(True))
    for name, buffer in method.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
        buffer.copy_(buffers[name])
    return found


def assert_padding_changes_nothing(
    method: Method,
    images: tuple[Tensor, ...],
    numbers: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Values, gradients and what an update leaves: of padded rows against those of exactly the masked patches."""
    monkeypatch.setattr(DinoHead, "embed", lambda head, x: F.normalize(head.mlp(x), dim=-1))  # whose own is in fp32
    method.to(dtype)
    images = tuple(view.to(dtype) for view in images)
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    count, sizes = int(numbers["masks"].sum()), []

    def padded_further(count: int, expected: float) -> int:
        sizes.append(16 * (count // 16 + 1) if count else 0)  # so that something is padded, also where all are masked
        return sizes[-1]

    for name, rows in (("padded", padded_further), ("bare", lambda count, expected: count)):
        Masked.of.cache_clear()
        monkeypatch.setattr(ibot, "padded_rows", rows)
        found = learned(method, images, numbers)
        if name == "padded":
            padded = found
    Masked.of.cache_clear()
    assert sizes and all(size > count or count == 0 for size in sizes)
    assert padded.keys() == found.keys() and any("gradient" in name for name in found)
    for name, value in found.items():
        torch.testing.assert_close(padded[name], value, msg=name, **close)


def masks_of(numbers: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """The draws with masks as drawn, with none or with all patches masked."""
    masks = numbers["masks"]
    return numbers | {"masks": {"drawn": masks, "none": masks & False, "all": masks | True}[which]}


@pytest.mark.parametrize("which", ["drawn", "none", "all"])
@pytest.mark.parametrize("patch_prototypes", [0, 40])
@pytest.mark.parametrize("choice", CHOICES)
def test_padding_changes_nothing(choice: str, patch_prototypes: int, which: str, monkeypatch: pytest.MonkeyPatch):
    method = make(collapse=choice, patch_prototypes=patch_prototypes)
    assert_padding_changes_nothing(method, crops(method), masks_of(drawn(method), which), monkeypatch)


@pytest.mark.parametrize("way", ["blocks", "random"])
def test_half_of_the_crops_are_masked_by_a_tenth_to_a_half(way: str):
    method = make(masking=way)
    masks = torch.cat([drawn(method, step, 64)["masks"] for step in range(30)])
    hidden = masks.sum(2)
    assert masks.shape == (1920, 2, 16) and masks.device.type == "cpu"
    assert hidden.max() <= 8
    share = (hidden > 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(3840))
    if way == "random":  # floor(16 U(.1, .5)) is 1 to 7, the first one less often
        expected = torch.tensor([0.4, 1, 1, 1, 1, 1, 1]) / 6.4
        counted = hidden[hidden > 0].bincount(minlength=8)[1:] / (hidden > 0).sum()
        torch.testing.assert_close(counted, expected, atol=0.04, rtol=0)
    crossed = (hidden[:, 0] > 0) ^ (hidden[:, 1] > 0)
    assert crossed.double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(1920))


def test_masks_are_functions_of_seed_step_and_row():
    method = make()
    whole = drawn(method, 3, 8)["masks"]
    parts = [drawn(method, 3, 8, rows)["masks"] for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(drawn(method, 4, 8)["masks"], whole)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_batch_without_masks_has_no_patch_loss(choice: str):
    method = make(collapse=choice)
    numbers = {"masks": torch.zeros(4, 2, 16, dtype=torch.bool)}
    report = method(crops(method), torch.arange(4), numbers)
    report["loss"].backward()
    assert report["patch_loss"] == report["patch_prototype_usage"] == 0
    assert all(value.isfinite() for value in report.values())
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    finish(method)
    assert all(p.isfinite().all() for p in method.state_dict().values())


def test_micro_batches_give_the_whole_batch_s_update():
    states, losses = [], []
    for accumulate in (1, 2):
        method = make(freeze_last_layer=0)
        update = Update(method, 8, accumulate=accumulate)
        losses.append([update(step, crops(method), torch.arange(4), drawn(method))["loss"] for step in (1, 2)])
        states.append((method.collapse.centre, method.patch_collapse.centre))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("poisoned", [0, 3])
def test_a_skipped_update_changes_nothing(poisoned: int):
    method = make(patch_prototypes=40, freeze_last_layer=0)
    update = Update(method, 8)
    update(1, crops(method), torch.arange(4), drawn(method))
    before = content(method, update)
    images = crops(method, seed=1)
    images[poisoned][2, 1] = math.nan
    update(2, images, torch.arange(4), drawn(method, 2))
    after = content(method, update)
    assert update.skipped == 1 and before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    update(2, crops(method, seed=1), torch.arange(4), drawn(method, 2))
    last = content(method, update)
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, last[name])}
    assert {"model/encoder", "model/head", "model/patch_head", "model/mask_token", "model/teacher"} <= moved
    assert {"model/collapse", "model/patch_collapse"} <= moved


def test_the_teacher_follows_encoder_and_both_heads():
    method = make(patch_prototypes=40, teacher_momentum=0.9)
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    assert {name.split(".")[0] for name in before} == {"encoder", "head", "patch_head"}
    method.begin(Moment(0, 10, 5))
    finish(method)
    online = dict(method.named_parameters())
    for name, p in method.teacher.named_parameters():
        moved = 0.9 * before[name] + 0.1 * online[name] if online[name].requires_grad else before[name]
        torch.testing.assert_close(p, moved, msg=name)


def test_prototypes_of_both_heads_are_frozen_for_an_epoch():
    method = make(patch_prototypes=40)
    frozen = {n: g.frozen_epochs for g in method.groups(64) for n in g.parameters}
    assert {n for n, epochs in frozen.items() if epochs} == {
        "head.last_layer.weight_v",
        "patch_head.last_layer.weight_v",
    }
    assert "mask_token" in frozen and not any(name.startswith("teacher") for name in frozen)


def test_the_exported_encoder_knows_no_mask_token(tmp_path):
    method = make()
    weights.export(method.evaluated, tmp_path)
    again = vit.create("vit_micro_patch8_32", depth=2)
    weights.load(again, str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), method.teacher.encoder(images))
    assert not any("mask" in name for name in method.evaluated.state_dict())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--ibot.masking", "blobs"], "--ibot.masking is blobs; it must be one of blocks, random"),
        (["--ibot.mask-ratio", "0.5", "0.1"], "mask-ratio"),
        (["--ibot.masked-crops", "0"], "masked-crops"),
        (["--ibot.patch-prototypes", "1"], "patch-prototypes"),
        (["--ibot.smallest-block", "-1"], "smallest-block"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput, match=named):
        parse(["--method", "ibot", *flags])


def test_masks_must_fit_the_encoder():
    for encoder, settings in (({}, {"mask_ratio": (0.01, 0.05)}), ({"img_size": (8, 64)}, {"local_crops": 0})):
        model = vit.create("vit_micro_patch8_32", depth=1, **encoder)
        with pytest.raises(BadInput, match=r"hides none|needs a grid"):
            Settings(**(SMALL | settings)).check_encoder("ibot", model)


@pytest.mark.parametrize("model", ["vit_small_patch16_224", "vit_base_patch16_224"])
def test_published_recipe(model: str):
    chosen = recipe("ibot", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    s.check("ibot")
    assert methods.get(name) is Ibot
    assert (s.epochs, s.batch_size, s.warmup * s.epochs, s.base_lr, s.end_lr) == (800, 1024, 10, 5e-4, 1e-6)
    assert (s.crop_scale, s.local_crops, s.local_size, s.local_scale) == ((0.25, 1.0), 10, 96, (0.05, 0.25))
    assert (s.prototypes, s.patch_prototypes, s.bottleneck, s.mask_ratio) == (8192, 0, 256, (0.1, 0.5))
    assert (s.target_temperature_start, s.target_temperature, s.target_temperature_epochs) == (0.04, 0.07, 30)
    assert (s.clip_norm, s.clip_over, s.weight_decay, s.weight_decay_end) == (3.0, "tensor", 0.04, 0.4)
    assert chosen.source.startswith("after ") == (model != "vit_small_patch16_224")
