"""MSN against a plain restatement of the paper and its released code: patches dropped after embedding, probabilities sharpened
by a power, Sinkhorn-Knopp as a loop over probabilities, the mean prediction's entropy."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Moment
from engine.methods.msn import Msn, Settings
from engine.methods.parts.collapse import CHOICES
from engine.model import vit
from engine.model.heads import BatchNorm
from engine.model.vit import VisionTransformer
from engine.recipes import recipe
from engine.training.step import Update
from tests.methods.small import small
from tests.methods.test_mae import plain_block
from tests.updates import scaled_gradients

SETTINGS = Settings(**small(Settings, epochs=1, teacher_momentum=0.9))


def make(**changes: object) -> Msn:
    torch.manual_seed(0)
    return Msn(vit.create("vit_micro_patch8_32", depth=1), dataclasses.replace(SETTINGS, **changes))


def views_of(method: Msn, batch: int = 8, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, *view.size, generator=generator) for view in method.views())


def drawn_for(method: Msn, step: int = 0, batch: int = 8, rows: slice = slice(None)) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=rows, device=torch.device("cpu")))


def part_ways(method: Msn) -> None:
    """Move the teacher, so that it cannot be mistaken for the student, and the centre from zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
        if method.collapse.centre is not None:
            method.collapse.centre.normal_(0, 0.1)


def plain_encoder(encoder: VisionTransformer, images: Tensor, places: Tensor | None) -> Tensor:
    """All patches are embedded, then those at `places` [V] stay; class token after the last norm, [B, C]."""
    p = encoder.patch_size
    x = F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=p)
    x = x.flatten(2).transpose(1, 2) + encoder.positions((images.shape[2] // p, images.shape[3] // p))
    if places is not None:
        x = x[:, places]
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    for block in encoder.blocks:
        x = plain_block(x, block)
    return encoder.norm(x)[:, 0]


def plain_head(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, BatchNorm):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=1e-5)
        else:
            x = layer(x)
    return x


def plain_sinkhorn(q_BK: Tensor) -> Tensor:
    b, k = q_BK.shape
    q_KB = q_BK.T / q_BK.sum()
    for _ in range(3):
        q_KB = q_KB / q_KB.sum(1, keepdim=True) / k
        q_KB = q_KB / q_KB.sum(0, keepdim=True) / b
    return (q_KB * b).T


def plain_loss(method: Msn, views: tuple[Tensor, ...], places: Tensor | None) -> Tensor:
    settings, collapse = method.settings, method.settings.collapse
    prototypes = F.normalize(method.prototypes.weight, dim=1)

    def cosines(z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) @ prototypes.T

    large = settings.global_crops - 1
    pooled = [plain_encoder(method.encoder, view, places) for view in views[1 : 1 + large]]
    heads = [plain_head(method.head, torch.cat(pooled))]
    if settings.local_crops:
        small = torch.cat([plain_encoder(method.encoder, view, None) for view in views[1 + large :]])
        heads.append(plain_head(method.head, small))
    predictions = (cosines(torch.cat(heads)) / 0.1).softmax(1)
    with torch.no_grad():
        scores = cosines(plain_head(method.teacher.head, plain_encoder(method.teacher.encoder, views[0], None)))
        if collapse == "centring":
            scores = scores - method.collapse.centre
        sharp = (scores / 0.1).softmax(1) ** (1 / 0.25)
        targets = sharp / sharp.sum(1, keepdim=True)
        if "sinkhorn" in collapse:
            targets = plain_sinkhorn(targets)
        targets = targets.repeat(len(views) - 1, 1)
    loss = -(targets * predictions.log()).sum(1).mean()
    if "me-max" in collapse:
        mean = predictions.mean(0)
        loss = loss + math.log(len(mean)) + (mean * mean.log()).sum()
    return loss


@pytest.mark.parametrize("crops", [(2, 2), (3, 0)], ids=["one anchor and small ones", "two anchors"])
@pytest.mark.parametrize("collapse", CHOICES)
def test_loss_and_gradients_equal_a_plain_restatement(collapse: str, crops: tuple[int, int]):
    method = make(collapse=collapse, global_crops=crops[0], local_crops=crops[1])
    part_ways(method)
    views, drawn = views_of(method), drawn_for(method)
    expected = plain_loss(method, views, drawn["visible"][0])
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    loss = method(views, torch.arange(8), drawn)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    ours = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher.") for name in ours)
    for name, gradient in ours.items():
        # relative to the tensor's largest: the head starts with small outputs, whose directions have gradients above 10
        atol = 2e-5 + 1e-4 * theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], atol=atol, rtol=1e-3, msg=name)


def test_what_keeps_prototypes_apart_can_be_switched():
    losses = set()
    for collapse in CHOICES:
        method = make(collapse=collapse)
        part_ways(method)
        losses.add(round(method(views_of(method), torch.arange(8), drawn_for(method))["loss"].item(), 4))
    assert len(losses) == len(CHOICES)


def test_166_patches_are_kept_the_same_ones_in_every_image_of_every_rank():
    torch.manual_seed(0)
    settings = dataclasses.replace(SETTINGS, patch_drop=0.15, local_size=96)
    method = Msn(vit.create("vit_tiny_patch16_224", depth=1), settings)
    assert method.keep == math.floor(196 * 0.85) == 166
    seen = []
    for step in range(50):
        visible = drawn_for(method, step)["visible"]
        assert visible.shape == (8, 166)
        assert (visible == visible[0]).all()
        assert len(visible[0].unique()) == 166
        for rows in (slice(0, 4), slice(4, 8)):
            assert torch.equal(drawn_for(method, step, rows=rows)["visible"], visible[rows])
        seen.append(visible[0])
    assert torch.equal(drawn_for(method, 7)["visible"][0], seen[7])
    assert len({tuple(places.tolist()) for places in seen}) == 50
    often = torch.cat(seen).bincount(minlength=196) / 50
    assert (often - 166 / 196).abs().max() < 0.3  # six standard deviations of 50 draws
    assert "visible" not in drawn_for(make(patch_drop=0.0))


def test_dropped_patches_are_read_in_the_large_anchor_alone_by_nobody():
    method = make()
    views, drawn = views_of(method), drawn_for(method)
    before = method(views, torch.arange(8), drawn)["loss"]
    hidden = [place for place in range(16) if place not in drawn["visible"][0].tolist()]
    assert len(hidden) == 16 - method.keep == 3
    poisoned = [view.clone() for view in views]
    for place in hidden:
        row, column = 8 * (place // 4), 8 * (place % 4)
        poisoned[1][:, :, row : row + 8, column : column + 8] = float("nan")
    assert torch.equal(method(tuple(poisoned), torch.arange(8), drawn)["loss"], before)
    poisoned[0] = poisoned[1]  # the target is seen whole
    assert method(tuple(poisoned), torch.arange(8), drawn)["loss"].isnan()


def test_views_are_a_target_an_anchor_and_focal_crops_of_equal_colours():
    torch.manual_seed(0)
    method = Msn(vit.create("vit_tiny_patch16_224", depth=1), Settings(head_hidden=8, bottleneck=8, prototypes=4))
    views = method.views()
    assert [view.size for view in views] == [(224, 224)] * 2 + [(96, 96)] * 10
    assert {view.scale for view in views[:2]} == {(0.3, 1.0)}
    assert {view.scale for view in views[2:]} == {(0.05, 0.3)}
    for view in views:  # strengths .8, .8, .8, .2, halved
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.1)
        assert (view.jitter, view.grayscale, view.blur, view.solarize, view.flip) == (0.8, 0.2, 0.5, 0, 0.5)
    plain = make(augmentation="minimal", flip=0.0).views()
    assert all((view.jitter, view.grayscale, view.blur, view.flip) == (0, 0, 0, 0) for view in plain)


def test_prototypes_start_uniform_and_see_directions_only():
    method = make(prototypes=4096)
    weight = method.prototypes.weight
    assert weight.shape == (4096, 16)
    assert weight.abs().max() <= 1 / 4
    assert weight.abs().mean().item() == pytest.approx(1 / 8, rel=0.02)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = method.prototypes(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, F.cosine_similarity(x[:, None], weight[None], dim=2))
    torch.testing.assert_close(method.prototypes(3 * x), scores)


@pytest.mark.parametrize("form", ["from-start", "to-peak"])
def test_schedules_are_stretched_and_training_stops_on_the_way(form: str):
    method = make(epochs=10, warmup=0.1, warmup_form=form, base_lr=1e-3 * 32, teacher_momentum=0.996, batch_size=8)
    update = Update(method, total_steps=100)
    assert (update.total_steps, update.warmup_steps, update.peak_lr) == (125, 10, pytest.approx(1e-3))
    for step in (0, 5, 10, 50, 99):
        report = update(step, views_of(method, seed=step), torch.arange(8), drawn_for(method, step))
        at = step + (form == "to-peak")  # the authors count a step before they set its rates
        half_cosine = 0.5 * (1 + math.cos(math.pi * (at - 10) / 115))
        lr = 2e-4 + 8e-4 * at / 10 if step < 10 else 1e-6 + (1e-3 - 1e-6) * half_cosine
        assert report["lr"] == pytest.approx(lr)
        decay = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * at / 125))
        assert report["weight_decay"] == pytest.approx(decay)
        assert method.teacher_momentum() == pytest.approx(0.996 + 0.004 * step / 125)
    assert report["lr"] > 1e-4  # the end, 1e-6, is not reached
    method.begin(Moment(100, 125, 10))
    assert method.teacher_momentum() == pytest.approx(0.9992)


def test_prototypes_neither_decay_nor_clip():
    method = make(clip_norm=1e-3)
    groups = {name: group for group in method.groups(8) for name in group.parameters}
    assert groups.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    for name, group in groups.items():
        own = name == "prototypes.weight"
        decays = not own and method.get_parameter(name).ndim > 1
        assert (group.weight_decay, group.clips) == (0.04 if decays else 0, not own), name
    method(views_of(method), torch.arange(8), drawn_for(method))["loss"].backward()
    whole = method.prototypes.weight.grad.clone()
    method.zero_grad()
    method.after_step(torch.tensor(False))
    update, norms = Update(method, total_steps=10), {}

    def look(optimizer: torch.optim.Optimizer, given: tuple, _: dict) -> None:
        scaled = scaled_gradients(*given)
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                norms[name] = scaled[p]
            if "prototypes.weight" in group["names"]:
                assert group["weight_decay"] == 0

    update.optimizer.register_step_pre_hook(look)
    update(9, views_of(method), torch.arange(8), drawn_for(method))
    torch.testing.assert_close(norms.pop("prototypes.weight"), whole)
    assert whole.norm() > 0.01
    together = torch.stack([gradient.norm() for gradient in norms.values()]).norm()
    assert together.item() == pytest.approx(1e-3, rel=1e-2)


def test_prototypes_can_stay_frozen_for_some_epochs():
    method = make(freeze_last_layer=1, epochs=2, warmup=0.0)
    update, before = Update(method, total_steps=4), method.prototypes.weight.clone()
    for step in range(3):
        assert torch.equal(method.prototypes.weight, before)
        update(step, views_of(method), torch.arange(8), drawn_for(method))
    assert not torch.equal(method.prototypes.weight, before)


def test_teacher_follows_encoder_and_head():
    method = make(warmup=0.0, teacher_momentum=0.9)
    part_ways(method)
    update = Update(method, total_steps=4)
    old = {name: p.clone() for name, p in method.teacher.named_parameters()}
    update(2, views_of(method), torch.arange(8), drawn_for(method))
    momentum = 0.9 + 0.1 * 2 / 5
    assert {name.partition(".")[0] for name in old} == {"encoder", "head"}
    for name, p in method.teacher.named_parameters():
        torch.testing.assert_close(p, momentum * old[name] + (1 - momentum) * method.get_parameter(name), msg=name)
        assert not p.requires_grad
    assert method.evaluated is method.teacher.encoder


def test_the_teacher_s_batch_norm_has_statistics_of_what_the_teacher_saw():
    method = make(warmup=0.0)
    part_ways(method)
    views = views_of(method)
    linear, own, theirs = method.teacher.head[0], method.teacher.head[1], nn.BatchNorm1d(32)
    with torch.no_grad():
        theirs(linear(plain_encoder(method.teacher.encoder, views[0], None)))
    Update(method, total_steps=4)(0, views, torch.arange(8), drawn_for(method))
    torch.testing.assert_close(own.running_mean, theirs.running_mean, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(own.running_var, theirs.running_var, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(own.running_mean, method.head[1].running_mean, atol=1e-3)


@pytest.mark.parametrize("collapse", ["me-max+sinkhorn", "centring"])
def test_a_skipped_update_changes_nothing(collapse: str):
    method = make(collapse=collapse, warmup=0.0)
    part_ways(method)
    update = Update(method, total_steps=4)
    update(0, views_of(method), torch.arange(8), drawn_for(method))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    views = views_of(method)
    views[-1][3, 0, 0, 0] = float("nan")
    update(1, views, torch.arange(8), drawn_for(method))
    assert update.skipped == 1
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not method.collapse.pending
    assert not any(module.pending for module in method.modules() if isinstance(module, BatchNorm))
    update(2, views_of(method), torch.arange(8), drawn_for(method))
    kept = {name for name, value in method.state_dict().items() if torch.equal(value, before[name])}
    assert not kept, "a sound update moves everything"


WORLD = 2


def one_rank(rank: int, folder: str) -> None:
    """Loss and gradients of a batch shared by two ranks against those of one process, computed here before they meet."""
    torch.set_num_threads(1)
    whole = make()
    part_ways(whole)
    views = views_of(whole)
    alone = whole(views, torch.arange(8), drawn_for(whole))
    alone["loss"].backward()
    td.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    method = make(clip_norm=0.0)
    part_ways(method)
    rows = slice(4 * rank, 4 * rank + 4)
    update, seen = Update(method, total_steps=4), {}

    def look(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})

    update.optimizer.register_step_pre_hook(look)
    share = tuple(view[rows] for view in views)
    report = update(0, share, torch.arange(8)[rows], drawn_for(method, rows=rows))
    loss = report["loss"].detach().clone()
    td.all_reduce(loss)
    torch.testing.assert_close(loss / WORLD, alone["loss"].detach(), atol=2e-5, rtol=1e-5)
    for name, p in whole.named_parameters():
        if p.requires_grad:
            times = WORLD if name == "prototypes.weight" else 1
            atol = 2e-5 + 1e-4 * p.grad.abs().max().item()
            torch.testing.assert_close(seen[name], times * p.grad, atol=atol, rtol=1e-3, msg=name)
    td.destroy_process_group()


@pytest.mark.long
def test_two_ranks_average_gradients_but_sum_those_of_the_prototypes(tmp_path: Path):
    mp.spawn(one_rank, (str(tmp_path),), nprocs=WORLD)


def test_operations_count_kept_patches_and_one_whole_target():
    method = make()
    encoder = method.encoder
    head = 2.0 * (encoder.embed_dim * 32 + 32 * 32 + 32 * 16 + 16 * 48)
    student = encoder.flops(13) + 2 * encoder.flops(4) + 3 * head
    assert method.flops_per_image() == pytest.approx(3 * student + encoder.flops(16) + head)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_crops": 1}, "--msn.global-crops is 1; it must be a whole number from 2"),
        ({"patch_drop": 1.0}, "--msn.patch-drop is 1.0; it must be a share from 0 to below 1"),
        ({"augmentation": "byol"}, "--msn.augmentation is byol; it must be minimal or simclr"),
        ({"free_norm": True}, "--msn.free-norm is True; it must be False"),
        ({"local_crops": -1}, "--msn.local-crops is -1; it must be a whole number from 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, object], words: str):
    with pytest.raises(BadInput, match=words):
        dataclasses.replace(SETTINGS, **changes).check("msn")


def test_an_anchor_keeps_a_patch_and_batches_do_not_split():
    dataclasses.replace(SETTINGS, local_crops=0).check("msn")
    with pytest.raises(BadInput, match="leaves none of 16 patches"):
        dataclasses.replace(SETTINGS, patch_drop=0.95).check_encoder("msn", vit.create("vit_micro_patch8_32", depth=1))
    assert not dataclasses.replace(SETTINGS, collapse="centring").splits


@pytest.mark.parametrize(
    ("model", "epochs", "after"),
    [("vit_small_patch16_224", 800, False), ("vit_base_patch16_224", 600, True), ("vit_large_patch16_224", 600, True),
     ("vit_tiny_patch16_224", 800, True)],
)  # fmt: skip
def test_published_numbers(model: str, epochs: int, after: bool):
    chosen = recipe("msn", model, "plain", embedded=False)
    ((name, s),) = chosen.stages
    assert chosen.source.startswith("after ") == after
    encoder = {"initialisation": "msn", "interpolation": "bicubic", "global_pool": "token"}
    assert (name, chosen.encoder) == ("msn", encoder)
    assert (s.resize, s.warmup_form) == ("bilinear", "to-peak")
    assert (s.epochs, s.batch_size, s.warmup * s.epochs, s.horizon) == (epochs, 1024, pytest.approx(15), 1.25)
    assert (s.base_lr * 1024 / 256, s.start_lr, s.end_lr) == (1e-3, 2e-4, 1e-6)
    assert (s.weight_decay, s.weight_decay_end, s.betas) == (0.04, 0.4, (0.9, 0.999))
    assert (s.clip_norm, s.clip_over, s.freeze_last_layer) == (3.0, "all", 0)
    assert (s.student_temperature, s.target_temperature, s.patch_drop) == (0.1, 0.1 * 0.25, 0.15)
    assert (s.prototypes, s.bottleneck, s.head_hidden, s.head_layers) == (1024, 256, 2048, 3)
    assert (s.teacher_momentum, s.teacher_momentum_end) == (0.996, 1.0)
    assert (s.collapse, s.me_max_weight) == ("me-max+sinkhorn", 1.0)
    assert (s.global_crops, s.local_crops, s.local_size, s.augmentation) == (2, 10, 96, "simclr")
    s.check("msn")
    recipe("msn", model, "digits", embedded=True).stages[0][1].check("msn")
