"""MoCo v3 against a plain restatement: the symmetric contrast, the momentum encoder, the frozen projection, the recipe."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.optim import Moment
from engine.data.views import byol_views, minimal
from engine.methods.mocov3 import Mocov3, Settings
from engine.model import vit
from engine.model.heads import BatchNorm, normed_mlp
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.small import small
from tests.methods.test_dino import plain_cls
from tests.saved import content
from tests.updates import finish

SMALL = small(Settings, epochs=4, warmup=0.0)
FROZEN = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}


def make(**settings: object) -> Mocov3:
    torch.manual_seed(0)
    encoder = vit.create("vit_micro_patch8_32", depth=2, positions="sincos", global_pool="token")
    method = Mocov3(encoder, Settings(**(SMALL | settings)))
    with torch.no_grad():  # the momentum encoder has gone its own way
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return method


def crops(seed: int = 0, batch: int = 6) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).unbind())


def plain_mlp(head: nn.Sequential, x: Tensor) -> Tensor:
    for layer in head:
        if isinstance(layer, BatchNorm):
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
            x = x if layer.weight is None else x * layer.weight + layer.bias
        else:
            x = layer(x)
    return x


def plain_loss(method: Mocov3, images: tuple[Tensor, Tensor]) -> Tensor:
    """Chen, Xie and He 2021, algorithm 1."""
    tau = method.settings.temperature

    def ctr(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return 2 * tau * F.cross_entropy(logits / tau, torch.arange(len(q)))

    q1, q2 = (plain_mlp(method.predictor, plain_mlp(method.projector, plain_cls(method.encoder, x))) for x in images)
    with torch.no_grad():
        k1, k2 = (plain_mlp(method.teacher.projector, plain_cls(method.teacher.encoder, x)) for x in images)
    return ctr(q1, k2) + ctr(q2, k1)


@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_equal_the_paper(frozen: bool):
    # batch norm over few rows makes gradients, and their rounding, large
    method, images = make(freeze_patch_embed=frozen), crops(batch=16)
    loss = method(images, torch.arange(16), {})["loss"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    plain = plain_loss(method, images)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    theirs = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert not any(name.startswith("teacher") for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_patch_projection_is_frozen_on_request(frozen: bool):
    method = make(freeze_patch_embed=frozen)
    update = Update(method, 8)
    before = {name: p.clone() for name, p in method.encoder.patch_embed.named_parameters()}
    update(0, crops(), torch.arange(6), {})
    changed = {name for name, p in method.encoder.patch_embed.named_parameters() if not torch.equal(p, before[name])}
    assert changed == (set() if frozen else {"proj.weight", "proj.bias"})
    trained = {name for group in update.optimizer.param_groups for name in group["names"]}
    kept = {"encoder.pos_embed"} | (FROZEN if frozen else set())
    everything = {name for name, _ in method.named_parameters() if not name.startswith("teacher.")}
    assert trained == everything - kept


def test_weight_decay_is_of_all_parameters():
    (group,) = make(weight_decay=0.1, base_lr=1.5e-4).groups(4096)
    assert (group.weight_decay, group.peak_lr) == (0.1, pytest.approx(2.4e-3))
    assert {"encoder.norm.bias", "encoder.cls_token", "projector.1.weight"} <= group.parameters.keys()


def test_keys_are_made_by_the_average_moved_as_the_paper_moves_it():
    """It moves by the update's own momentum before it makes the keys, and the optimiser steps after."""
    method = make(teacher_momentum=0.5, teacher_momentum_end=1.0, base_lr=0.1)
    update, total = Update(method, 4), 4
    average = {name: p.clone() for name, p in method.teacher.named_parameters()}
    for step in range(total):
        online = dict(method.named_parameters())
        if step:  # before the first keys both are equal in a run
            momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / total)) / 2
            for name, value in average.items():
                if online[name].requires_grad:
                    average[name] = momentum * value + (1 - momentum) * online[name].detach()
        for name, p in method.teacher.named_parameters():
            torch.testing.assert_close(p, average[name], msg=f"{name} at step {step}")
        update(step, crops(step), torch.arange(6), {})
    last = {name: p.clone() for name, p in method.teacher.named_parameters()}
    for name, p in last.items():
        torch.testing.assert_close(p, average[name], msg=f"{name}: at the end it keeps all of itself")


def test_the_average_starts_as_the_encoder_and_keeps_batch_statistics_of_its_own():
    torch.manual_seed(0)
    method = Mocov3(vit.create("vit_micro_patch8_32", depth=1), Settings(**SMALL))
    online = method.state_dict()
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, online[name]), name
    method.begin(Moment(0, 8, 2))
    method(crops(), torch.arange(6), {})
    finish(method)
    with torch.no_grad():
        method.projector[0].weight.mul_(-2.0)  # a constant added would cancel, for inputs are layer-normed
    method(crops(1), torch.arange(6), {})
    finish(method)
    statistics, own = method.teacher.projector[1].running_mean, method.projector[1].running_mean
    assert method.teacher.projector[1].num_batches_tracked == 4
    assert not torch.allclose(statistics, own)


def test_a_skipped_update_changes_nothing():
    method = make(weight_ema=0.9)
    update = Update(method, 8)
    update(0, crops(), torch.arange(6), {})
    before = content(method, update)
    update(1, tuple(view * float("nan") for view in crops(1)), torch.arange(6), {})
    after = content(method, update)
    assert update.skipped == 1
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    update(2, crops(1), torch.arange(6), {})
    moved = content(method, update)
    for part in ("model/encoder.", "model/projector.", "model/predictor.", "model/teacher.encoder.", "average/"):
        assert any(name.startswith(part) and not torch.equal(value, moved[name]) for name, value in before.items())


def test_each_rank_s_queries_find_their_keys_among_those_of_all(monkeypatch: pytest.MonkeyPatch):
    method = make(temperature=0.5)
    queries, keys = F.normalize(torch.randn(3, 16), dim=1), F.normalize(torch.randn(6, 16), dim=1)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    expected = F.cross_entropy(queries @ keys.T / 0.5, torch.tensor([3, 4, 5]))
    torch.testing.assert_close(method.contrast(queries, keys), expected)  # 2 * 0.5 is 1


def test_the_trained_encoder_is_what_is_judged():
    method, images = make(), torch.randn(3, 3, 32, 32)
    assert method.evaluated is method.encoder
    torch.testing.assert_close(method.features(images), plain_cls(method.encoder, images), atol=1e-5, rtol=1e-4)


def test_heads_have_the_published_shapes():
    head = normed_mlp(768, 4096, 4096, 256)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "0.weight": (4096, 768), "1.weight": (4096,), "1.bias": (4096,), "3.weight": (4096, 4096), "4.weight": (4096,),
        "4.bias": (4096,), "6.weight": (256, 4096),
    }  # fmt: skip
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    method = make()
    shapes = [tuple(p.shape) for part in (method.projector, method.predictor) for p in part.parameters() if p.ndim == 2]
    assert shapes == [(32, 128), (32, 32), (16, 32), (32, 16), (16, 32)]


def test_crops_are_the_published_ones():
    ((_, settings),) = recipe("mocov3", "vit_base_patch16_224", "plain", embedded=False).stages
    method = Mocov3(vit.create("vit_tiny_patch16_224", depth=1), replace(settings, projector_hidden=8))
    linear = tuple(replace(view, resize="bilinear") for view in byol_views((224, 224), (0.08, 1.0)))
    assert method.views() == linear  # torchvision's default, as they name no other
    method.settings = replace(settings, augmentation="minimal", flip=0.25, resize="bicubic")
    assert method.views() == (replace(minimal((224, 224), (0.08, 1.0)), flip=0.25),) * 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("vit_base_patch16_224", "MoCo v3's released ViT recipe"),
        (
            "vit_small_patch16_224",
            "after MoCo v3's released ViT recipe (O), whose ViT-S has 12 heads and not 6 (vit_small_12heads_patch16_224)",
        ),
        ("vit_small_12heads_patch16_224", "MoCo v3's released ViT recipe (O)"),
        ("vit_large_patch16_224", "after MoCo v3's released ViT recipe (O) for ViT-S and ViT-B"),
    ],
)
def test_published_recipe(model: str, said: str):
    chosen = recipe("mocov3", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    assert chosen.source.startswith(said)
    assert chosen.encoder == {"initialisation": "mocov3", "positions": "sincos", "global_pool": "token"}
    assert (name, s.epochs, s.batch_size, s.warmup * s.epochs) == ("mocov3", 300, 4096, 40)
    assert (s.base_lr, s.weight_decay, s.optimizer, s.schedule, s.end_lr) == (1.5e-4, 0.1, "adamw", "cosine", 0)
    assert (s.projector_hidden, s.predictor_hidden, s.embedding, s.temperature) == (4096, 4096, 256, 0.2)
    assert (s.teacher_momentum, s.teacher_momentum_end, s.freeze_patch_embed) == (0.99, 1.0, True)
    assert (s.crop_scale, s.augmentation, s.flip, s.clip_norm) == ((0.08, 1.0), "byol", 0.5, 0)
    with pytest.raises(BadInput, match="plain, digits"):
        recipe("mocov3", model, "aug", embedded=False)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mocov3.augmentation", "strong"], "--mocov3.augmentation is strong; it must be minimal or byol"),
        (["--mocov3.temperature", "0"], "--mocov3.temperature is 0"),
        (["--mocov3.teacher-momentum", "1.1"], "--mocov3.teacher-momentum is 1.1"),
        (["--mocov3.teacher-momentum-end", "-1"], "--mocov3.teacher-momentum-end is -1"),
        (["--mocov3.embedding", "0"], "--mocov3.embedding is 0"),
        (["--mocov3.projector-hidden", "0"], "--mocov3.projector-hidden is 0"),
        (["--mocov3.predictor-hidden", "0"], "--mocov3.predictor-hidden is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput) as refusal:
        parse(["--method", "mocov3", *flags])
    assert named in str(refusal.value)
    assert not Settings().splits, "images of a batch are compared"
