"""DINO against plain restatements: the loss over pairs of views, the centre, the teacher, the schedules, what is frozen."""

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
from engine.data.views import byol_views
from engine.methods.dino import Dino, Settings
from engine.methods.parts.collapse import CHOICES
from engine.model import depth, vit
from engine.model.heads import DinoHead, WeightNormed
from engine.recipes import recipe
from engine.training.build import compile_regions
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.small import small
from tests.methods.test_mae import plain_block
from tests.updates import finish, scaled_gradients

SMALL = small(Settings, epochs=4, weight_decay_end=0.4, augmentation="minimal")


def make(encoder: dict[str, object] | None = None, **settings: object) -> Dino:
    torch.manual_seed(0)
    method = Dino(vit.create("vit_micro_patch8_32", **({"depth": 2} | (encoder or {}))), Settings(**(SMALL | settings)))
    with torch.no_grad():  # the teacher has gone its own way
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return method


def crops(method: Dino, seed: int = 0, batch: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, *view.size, generator=generator) for view in method.views())


def drawn(method: Dino, step: int = 0, batch: int = 4) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=slice(None), device=torch.device("cpu")))


def plain_cls(encoder: vit.VisionTransformer, images: Tensor) -> Tensor:
    """The class token of a plain ViT, positions of small crops interpolated as timm does."""
    weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
    tokens = F.conv2d(images, weight, bias, stride=encoder.patch_size).flatten(2).transpose(1, 2)
    positions = encoder.pos_embed[:, 1:]
    if tokens.shape[1] != positions.shape[1]:
        grid = positions.unflatten(1, encoder.grid).permute(0, 3, 1, 2)
        size = (images.shape[2] // encoder.patch_size, images.shape[3] // encoder.patch_size)
        grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True, align_corners=False)
        positions = grid.flatten(2).transpose(1, 2)
    start = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([start, tokens + positions], 1)
    for block in encoder.blocks:
        x = plain_block(x, block)
    return encoder.norm(x)[:, 0]


def plain_head(head: DinoHead, x: Tensor) -> Tensor:
    first, second, third = head.mlp[0], head.mlp[2], head.mlp[4]
    x = third(F.gelu(second(F.gelu(first(x)))))
    x = x / x.norm(dim=1, keepdim=True)
    weight = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    return x @ (head.last_layer.weight_g * weight).T


def plain_loss(method: Dino, images: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Caron et al. 2021, algorithm 1 with multi-crop; returns the loss and the batch's part of the next centre."""
    student = [plain_head(method.head, plain_cls(method.encoder, view)) for view in images]
    with torch.no_grad():
        teacher = [plain_head(method.teacher.head, plain_cls(method.teacher.encoder, view)) for view in images[:2]]
    centre, terms = method.collapse.centre, []
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i != j:
                q = ((t - centre) / temperature).softmax(1)
                terms.append(-(q * (s / method.settings.student_temperature).log_softmax(1)).sum(1).mean())
    return sum(terms) / len(terms), torch.cat(teacher).mean(0)


@pytest.mark.parametrize("free_norm", [False, True])
def test_loss_and_gradients_equal_the_paper(free_norm: bool):
    method = make(free_norm=free_norm)
    method.collapse.centre.normal_(std=0.3)
    images, centre = crops(method), method.collapse.centre.clone()
    loss = method(images, torch.arange(4), drawn(method))["loss"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    plain, mean = plain_loss(method, images, 0.04)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    theirs = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert not any(name.startswith("teacher") for name in ours)
    assert ("head.last_layer.weight_g" in ours) == free_norm
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)
    assert torch.equal(method.collapse.centre, centre)
    finish(method)
    torch.testing.assert_close(method.collapse.centre, 0.9 * centre + 0.1 * mean)


@pytest.mark.parametrize("choice", CHOICES)
def test_any_choice_against_collapse_trains(choice: str):
    method = make(collapse=choice, freeze_last_layer=0)
    update = Update(method, 8)
    reports = [update(step, crops(method), torch.arange(4), drawn(method)) for step in range(1, 4)]
    assert all(math.isfinite(report["loss"]) for report in reports)
    assert {"prototype_usage", "target_entropy"} <= reports[0].keys()
    assert ("centre_norm" in reports[0]) == (choice == "centring")
    assert method.settings.splits == (choice in ("centring", "none"))


def test_micro_batches_give_the_whole_batch_s_update():
    centres, losses = [], []
    for accumulate in (1, 2):
        method = make(freeze_last_layer=0)
        update = Update(method, 8, accumulate=accumulate)
        losses.append([update(step, crops(method), torch.arange(4), drawn(method))["loss"] for step in (1, 2)])
        centres.append(method.collapse.centre)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*centres)


def test_the_teacher_follows_by_a_momentum_that_is_a_function_of_the_step():
    method = make(teacher_momentum=0.9, teacher_momentum_end=1.0)
    for step, momentum in ((0, 0.9), (5, 0.95), (10, 1.0)):
        before = {name: p.clone() for name, p in method.teacher.named_parameters()}
        with torch.no_grad():
            for parameter in (*method.encoder.parameters(), *method.head.parameters()):
                parameter.add_(torch.randn_like(parameter))
        method.begin(Moment(step, 10, 5))
        finish(method, applied=False)
        assert all(torch.equal(p, before[name]) for name, p in method.teacher.named_parameters())
        finish(method)
        online = dict(method.named_parameters())
        for name, p in method.teacher.named_parameters():
            expected = momentum * before[name] + (1 - momentum) * online[name]
            if online[name].requires_grad:
                torch.testing.assert_close(p, expected, msg=name)
            else:
                assert torch.equal(p, before[name]), name


def test_the_teacher_is_what_is_judged():
    method = make({"global_pool": "token"})
    images = torch.randn(3, 3, 32, 32)
    assert method.evaluated is method.teacher.encoder
    torch.testing.assert_close(method.features(images), plain_cls(method.teacher.encoder, images), atol=1e-5, rtol=1e-4)
    chosen = method.choose(method.features(images))
    scores = plain_head(method.teacher.head, plain_cls(method.teacher.encoder, images))
    assert torch.equal(chosen, (scores - method.collapse.centre).argmax(1))
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_target_temperature_rises_by_epochs_and_stays():
    method = make(target_temperature_start=0.04, target_temperature=0.07, target_temperature_epochs=4)
    seen = []
    for step in range(12):
        method.begin(Moment(step, 12, 2))
        seen.append(method.target_temperature)
    assert seen[::2] == seen[1::2] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    method = make(target_temperature=0.04)
    assert method.target_temperature == 0.04


def test_rates_and_decay_along_a_stage():
    method = make(
        epochs=10, warmup=0.1, base_lr=5e-4, end_lr=1e-6, weight_decay=0.04, weight_decay_end=0.4, batch_size=512
    )
    update, seen = Update(method, 100), {}
    for step in (0, 5, 10, 55, 99):
        report = update(step, crops(method), torch.arange(4), drawn(method))
        seen[step] = report["lr"], report["weight_decay"]
        group = next(g for g in update.optimizer.param_groups if "encoder.patch_embed.proj.weight" in g["names"])
        assert (group["lr"], group["weight_decay"]) == pytest.approx(seen[step])
        assert all(g["weight_decay"] == 0 for g in update.optimizer.param_groups if "encoder.norm.bias" in g["names"])
    assert [lr for lr, _ in seen.values()] == pytest.approx(
        [0, 5e-4, 1e-3, 1e-6 + (1e-3 - 1e-6) / 2, 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * 89 / 90)) / 2]
    )
    wanted = [0.4 - 0.36 * (1 + math.cos(math.pi * step / 100)) / 2 for step in seen]
    assert [decay for _, decay in seen.values()] == pytest.approx(wanted)


def test_the_last_layer_is_frozen_for_an_epoch_and_everything_else_is_not():
    method = make(epochs=4, warmup=0.0, base_lr=1e-2, free_norm=True)
    update = Update(method, 8)  # two steps an epoch
    for step in range(3):
        before = {name: p.clone() for name, p in method.named_parameters() if p.requires_grad}
        update(step, crops(method, step), torch.arange(4), drawn(method, step))
        still = {name for name, p in method.named_parameters() if name in before and torch.equal(p, before[name])}
        assert still == ({"head.last_layer.weight_g", "head.last_layer.weight_v"} if step < 2 else set())
    names = {name for group in update.optimizer.param_groups for name in group["names"]}
    assert names == {name for name, p in method.named_parameters() if p.requires_grad}


def test_each_tensor_is_clipped_by_its_own_norm():
    method, clipped = make(freeze_last_layer=0), {}
    method(crops(method), torch.arange(4), drawn(method))["loss"].backward()
    raw = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    largest = torch.stack([gradient.norm() for gradient in raw.values()]).median().item()
    method = make(freeze_last_layer=0, clip_norm=largest, clip_over="tensor")
    update, named = Update(method, 8), dict(method.named_parameters())

    def look(_: object, given: tuple, __: dict) -> None:
        scaled = scaled_gradients(*given)
        clipped.update({name: scaled[named[name]] for name in raw})

    update.optimizer.register_step_pre_hook(look)
    update(0, crops(method), torch.arange(4), drawn(method))
    for name, gradient in raw.items():
        factor = min(1.0, largest / (gradient.norm().item() + 1e-6))
        torch.testing.assert_close(clipped[name], gradient * factor, atol=1e-6, rtol=1e-4, msg=name)
    assert {gradient.norm().item() > largest for gradient in raw.values()} == {True, False}


def test_crops_are_the_published_ones():
    ((_, settings),) = recipe("dino", "vit_base_patch16_224", "plain", embedded=False).stages
    method = Dino(vit.create("vit_tiny_patch16_224", depth=1), replace(settings, prototypes=8))
    views = method.views()
    assert [view.size for view in views] == [(224, 224)] * 2 + [(96, 96)] * 8
    assert [view.scale for view in views] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 8
    assert views[:2] == byol_views((224, 224), (0.4, 1.0))
    assert [(view.blur, view.solarize) for view in views] == [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * 8
    assert all((view.jitter, view.grayscale, view.flip) == (0.8, 0.2, 0.5) for view in views)
    assert [method.patches(view) for view in views] == [196] * 2 + [36] * 8


@pytest.mark.parametrize(
    ("model", "epochs", "free_norm", "said"),
    [
        ("vit_small_patch16_224", 300, True, "DINO's 300-epoch ViT-S recipe"),
        ("vit_base_patch16_224", 100, False, "DINO's released command for ViT-B"),
        ("vit_large_patch16_224", 100, False, "after "),
    ],
)
def test_published_recipe(model: str, epochs: int, free_norm: bool, said: str):
    chosen = recipe("dino", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    assert chosen.source.startswith(said)
    of_dino = {"initialisation": "dino", "interpolation": "offset"}
    assert chosen.encoder == of_dino | {"global_pool": "token", "drop_path": 0.1}
    assert (name, s.epochs, s.free_norm, s.warmup * s.epochs) == ("dino", epochs, free_norm, 10)
    assert (s.base_lr, s.end_lr, s.weight_decay, s.weight_decay_end, s.betas) == (5e-4, 1e-6, 0.04, 0.4, (0.9, 0.999))
    assert (s.clip_norm, s.clip_over, s.freeze_last_layer) == (3, "tensor", 1)
    assert (s.prototypes, s.head_hidden, s.head_layers, s.bottleneck) == (65536, 2048, 3, 256)
    warmer = (0.04, 0.07, 30) if epochs == 300 else (0.04, 0.04, 0)  # the command for ViT-B names no temperature
    assert (s.target_temperature_start, s.target_temperature, s.target_temperature_epochs) == warmer
    assert (s.resize, s.warmup_form) == ("bicubic", "through")
    assert (s.student_temperature, s.collapse, s.centre_momentum) == (0.1, "centring", 0.9)
    assert (s.teacher_momentum, s.teacher_momentum_end, s.optimizer) == (0.996, 1.0, "adamw")
    with pytest.raises(BadInput, match="plain, digits"):
        recipe("dino", model, "aug", embedded=False)


def test_head_has_the_published_shape_and_unit_prototypes():
    head = DinoHead(384, prototypes=100)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if p.ndim > 1}
    assert shapes == {
        "mlp.0.weight": (2048, 384), "mlp.2.weight": (2048, 2048), "mlp.4.weight": (256, 2048),
        "last_layer.weight_g": (100, 1), "last_layer.weight_v": (100, 256),
    }  # fmt: skip
    assert not head.last_layer.weight_g.requires_grad
    scores = head(torch.randn(5, 384))
    assert scores.abs().max() <= 1 + 1e-6
    layer, x = WeightNormed(6, 9, free_norm=True), torch.randn(4, 6)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 9, bias=False))
    theirs.parametrizations.weight.original0.data.copy_(layer.weight_g)
    theirs.parametrizations.weight.original1.data.copy_(layer.weight_v)
    torch.testing.assert_close(layer(x), theirs(x))


def test_stochastic_depth_is_a_function_of_seed_stage_and_step():
    method, device = make({"drop_path": 0.5, "depth": 3}), torch.device("cpu")
    images, ids = crops(method), torch.arange(4)

    def loss(*keys: int, rows: slice = slice(None), batch: int = 4) -> Tensor:
        return method(images, ids, method.draw(Draws(*keys, batch=batch, rows=rows, device=device)))["loss"]

    assert torch.equal(loss(0, 1), loss(0, 1))
    assert not torch.equal(loss(0, 1), loss(0, 2))
    assert not torch.equal(loss(0, 1, batch=8, rows=slice(0, 4)), loss(0, 1, batch=8, rows=slice(4, 8)))
    assert drawn(make()) == {}


@pytest.mark.long
def test_a_block_is_compiled_in_the_form_of_its_rate(monkeypatch: pytest.MonkeyPatch):
    compiler, compiled = torch.compile, make({"drop_path": 0.5, "depth": 5})
    monkeypatch.setitem(depth.DROPS_FROM, "cpu", 0.3)
    monkeypatch.setattr(torch, "compile", lambda region, **how: compiler(region, backend="eager", **how))
    plain = make({"drop_path": 0.5, "depth": 5})
    compile_regions(compiled)
    of_blocks = [vars(block).keys() & {"forward", "forward_dropped"} for block in compiled.encoder.blocks]
    assert of_blocks == [{"forward"}] * 3 + [{"forward", "forward_dropped"}] * 2
    images, ids = crops(plain, batch=8), torch.arange(8)
    losses = [method(images, ids, drawn(method, batch=8))["loss"] for method in (plain, compiled)]
    torch.testing.assert_close(*losses)


def test_the_teacher_of_a_compiled_encoder_is_not_its_student():
    encoder = vit.create("vit_micro_patch8_32", depth=1)
    for block in encoder.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    method = Dino(encoder, Settings(**SMALL))
    assert "forward" not in vars(method.teacher.encoder.blocks[0])
    for name, value in encoder.state_dict().items():
        assert torch.equal(method.teacher.encoder.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--collapse", "centering"],
            "--collapse is 'centering'; choose one of centring, me-max, sinkhorn, me-max+sinkhorn, none",
        ),
        (["--dino.collapse", "koleo"], "--dino.collapse is koleo; it must be one of centring, me-max"),
        (["--dino.weight-ema", "0.9"], "teacher is an average"),
        (["--dino.global-crops", "1", "--dino.local-crops", "0"], "--dino.local-crops is 0"),
        (["--dino.target-temperature", "0"], "--dino.target-temperature is 0"),
        (["--dino.clip-over", "layer"], "one of all, part, tensor"),
        (["--dino.weight-decay", "0", "--dino.weight-decay-end", "0.4"], "--dino.weight-decay-end"),
        (["--method", "mae", "--collapse", "none"], "which mae does not"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput) as refusal:
        parse(["--method", "dino", *flags])
    assert named in str(refusal.value)


def test_small_crops_must_consist_of_patches():
    with pytest.raises(BadInput, match=r"--dino.local-size is 20; it must be a multiple of the patch size 8"):
        Settings(**(SMALL | {"local_size": 20})).check_encoder("dino", vit.create("vit_micro_patch8_32", depth=1))


def test_collapse_is_chosen_for_all_stages_at_once():
    plan = parse(["--method", "dino", "--collapse", "sinkhorn"])
    assert plan.stages[0][1].collapse == "sinkhorn"
    assert "dino" in methods.names()
    assert "clustering" not in methods.names()


def test_images_of_their_own_aspect_are_represented_as_they_are_one_by_one():
    """Values, and the gradients of the student, through views of different size."""
    method = make(aspect="keep", local_crops=1)
    assert [(view.size, view.patch) for view in method.views()] == [((32, 32), 8)] * 2 + [((16, 16), 8)]
    images, large = crops(method), torch.tensor([[24, 40], [32, 32], [24, 40], [40, 24]])
    sizes = torch.stack([large, large, torch.tensor([[8, 24], [16, 16], [8, 24], [24, 8]])], 1)
    rows = method.represent(images, torch.arange(4), {"sizes": sizes})
    taught = method.represent_targets(images[:], torch.arange(4), {"sizes": sizes})
    worth = torch.randn(3, 4, method.encoder.embed_dim)

    def alone(encoder: vit.VisionTransformer, view: int) -> Tensor:
        shown = [
            row.flatten()[: 3 * h * w].view(1, 3, h, w) for row, (h, w) in zip(images[view], sizes[:, view].tolist())
        ]
        return torch.cat([encoder(image)[:, 0] for image in shown])

    ends = []
    for found in (torch.stack(rows["pooled"]), torch.stack([alone(method.encoder, view) for view in range(3)])):
        method.zero_grad()
        (found * worth).sum().backward()
        ends.append([found, *(p.grad.clone() for p in method.encoder.parameters())])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=1e-4)
    for view in range(2):
        torch.testing.assert_close(taught["taught"][view], alone(method.teacher.encoder, view), atol=1e-5, rtol=1e-5)


def test_images_that_fill_their_room_are_seen_as_crops_are():
    plain, own = make(), make(aspect="keep")
    images, chosen = crops(plain), drawn(plain)
    sizes = torch.tensor([view.size for view in own.views()]).expand(4, -1, -1)
    expected = plain(images, torch.arange(4), chosen)["loss"]
    assert torch.equal(own(images, torch.arange(4), chosen | {"sizes": sizes})["loss"], expected)
