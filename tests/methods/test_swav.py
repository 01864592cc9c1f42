"""SwAV against plain restatements: swapped predictions of Sinkhorn's codes, the queue, prototypes of length 1, LARC."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, Moment
from engine.methods.parts.collapse import CHOICES
from engine.methods.swav import Settings, Swav
from engine.model import vit
from engine.model.heads import UnitPrototypes, swav_projector
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.optimizers import Larc
from engine.training.step import Update
from tests.methods.parts.test_collapse import published_sinkhorn
from tests.methods.small import small
from tests.methods.test_nnclr import plain_head

SMALL = small(Settings, epochs=4, augmentation="minimal", queue_size=0, local_crops=3)
BATCH = SMALL["batch_size"]


def make(**settings: object) -> Swav:
    torch.manual_seed(0)
    return Swav(vit.create("vit_micro_patch8_32", depth=1), Settings(**(SMALL | settings)))


def crops(method: Swav, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, 3, *view.size, generator=generator) for view in method.views())


def drawn(method: Swav) -> dict[str, Tensor]:
    return method.draw(Draws(0, batch=BATCH, rows=slice(None), device=torch.device("cpu")))


def plain_embeddings(method: Swav, images: tuple[Tensor, ...]) -> Tensor:
    """One pass of the head over all crops, as main_swav.py has it; [V, b, E], unit vectors."""
    pooled = torch.cat([method.encoder.pool(method.encoder(view)) for view in images])
    return F.normalize(plain_head(method.projector, pooled), dim=1).unflatten(0, (len(images), BATCH))


def plain_loss(method: Swav, images: tuple[Tensor, ...], queued: list[Tensor]) -> Tensor:
    """Caron et al. 2020, equations 2 to 5 with multi-crop: each large crop's codes, balanced with the queue, from all others."""
    z = plain_embeddings(method, images)
    scores = z @ method.prototypes.weight.T
    terms = []
    for s in range(2):
        with torch.no_grad():
            rows = torch.cat([queued[s] @ method.prototypes.weight.T, scores[s]]) if queued else scores[s]
            q = published_sinkhorn(rows.double(), 0.05)[-BATCH:].float()
        terms += [-(q * (scores[t] / 0.1).log_softmax(1)).sum(1).mean() for t in range(len(images)) if t != s]
    assert len(terms) == 2 * (len(images) - 1)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("queue", [False, True])
def test_loss_and_gradients_equal_the_paper(queue: bool):
    method = make(queue_size=3 * BATCH * queue, queue_from=1)
    queued = []
    if queue:
        method.begin(Moment(3, 8, 2, seen=3 * BATCH))
        for part in method.queues:
            part.keys.copy_(F.normalize(torch.randn_like(part.keys), dim=1))
        queued = [part.keys for part in method.queues]
    images = crops(method)
    plain = plain_loss(method, images, queued)
    plain.backward()
    theirs = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    loss = method(images, torch.arange(BATCH), drawn(method))["loss"]
    loss.backward()
    ours = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


def test_the_queue_is_used_from_its_epoch_on_and_when_it_is_full():
    method = make(queue_size=3 * BATCH, queue_from=2)
    used = []
    for step in range(6):
        method.begin(Moment(step, 12, 2, seen=step * BATCH))
        used.append(method.queue_in_use)
    assert used == [False] * 4 + [True] * 2
    method = make(queue_size=6 * BATCH, queue_from=0)
    method.begin(Moment(5, 12, 2, seen=5 * BATCH))
    assert not method.queue_in_use
    method.begin(Moment(6, 12, 2, seen=6 * BATCH))
    assert method.queue_in_use
    assert not make().queue_in_use


def test_each_large_crop_has_its_queue_written_after_the_update():
    method = make(queue_size=2 * BATCH)
    images, ids = crops(method), torch.arange(BATCH) + 40
    before = [queue.keys.clone() for queue in method.queues]
    assert len(before) == 2
    method(images, ids, drawn(method))
    expected = plain_embeddings(method, images)[:2]
    assert all(torch.equal(queue.keys, old) for queue, old in zip(method.queues, before))
    method.after_step(torch.tensor(False))
    assert all(torch.equal(queue.keys, old) for queue, old in zip(method.queues, before))
    method(images, ids, drawn(method))
    method.after_step(torch.tensor(True))
    for queue, new, old in zip(method.queues, expected, before):
        torch.testing.assert_close(queue.keys[:BATCH], new, atol=1e-5, rtol=1e-4)
        assert torch.equal(queue.keys[BATCH:], old[BATCH:])
        assert queue.ids[:BATCH].tolist() == ids.tolist()


@pytest.mark.parametrize("choice", CHOICES)
def test_any_choice_against_collapse_trains(choice: str):
    method = make(collapse=choice)
    update = Update(method, 8)
    reports = [update(step, crops(method), torch.arange(BATCH), drawn(method)) for step in range(1, 4)]
    assert all(math.isfinite(report["loss"]) for report in reports)
    assert ("centre_norm" in reports[0]) == (choice == "centring")


def test_prototypes_stay_of_length_one_and_are_frozen_for_an_epoch():
    method = make(warmup=0.0)
    update = Update(method, 8)  # two steps an epoch
    weights = [method.prototypes.weight.detach().clone()]
    for step in range(4):
        update(step, crops(method, step), torch.arange(BATCH), drawn(method))
        weights.append(method.prototypes.weight.detach().clone())
        torch.testing.assert_close(weights[-1].norm(dim=1), torch.ones(SMALL["prototypes"]))
    torch.testing.assert_close(weights[2], weights[0], atol=1e-6, rtol=0)
    assert not torch.allclose(weights[3], weights[2])
    layer = UnitPrototypes(4, 6)
    with torch.no_grad():
        layer.weight.mul_(3)
    layer.commit(torch.tensor(False))
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((6,), 3.0))


def test_larc_equals_the_published_steps_and_skips_on_the_device():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.zeros(5))]
    group = Group({"a": parameters[0], "b": parameters[1]}, peak_lr=2.0, weight_decay=0.1)
    optimizer = Larc([group], momentum=0.9)
    plain = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in range(5):
        skipped = step in (0, 3)
        gradients = [torch.randn_like(p) for p in parameters]
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient * math.nan if skipped else gradient.clone()
        optimizer.param_groups[0]["lr"] = 2.0
        optimizer.step(torch.tensor(not skipped))
        if not skipped:
            for p, momentum, gradient in zip(plain, momenta, gradients):
                size, slope = p.norm(), gradient.norm()
                scale = 1e-3 * size / (slope + 0.1 * size) if size > 0 else 1.0
                momentum.mul_(0.9).add_(scale * (gradient + 0.1 * p))
                p.sub_(2.0 * momentum)
        for p, q in zip(parameters, plain):
            torch.testing.assert_close(p.detach(), q, atol=1e-7, rtol=1e-5)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_published_recipe():
    chosen = recipe("swav", "vit_base_patch16_224", "auto", embedded=False)
    ((name, s),) = chosen.stages
    assert chosen.source.startswith("after ")
    assert (name, s.epochs, s.batch_size, s.warmup * s.epochs) == ("swav", 800, 4096, 10)
    assert (s.optimizer, s.betas[0], s.start_lr, s.end_lr, s.weight_decay) == ("larc", 0.9, 0.3, 0.0048, 1e-6)
    assert (s.prototypes, s.projector_hidden, s.embedding) == (3000, 2048, 128)
    assert (s.collapse, s.target_temperature, s.student_temperature) == ("sinkhorn", 0.05, 0.1)
    assert (s.freeze_last_layer, s.clip_norm, s.queue_size, s.queue_from) == (1, 0, 0, 15)
    method = Swav(vit.create("vit_tiny_patch16_224", depth=1), s)
    views = method.views()
    assert [(view.size, view.scale) for view in views] == [((224, 224), (0.14, 1.0))] * 2 + [
        ((96, 96), (0.05, 0.14))
    ] * 6
    for view in views:
        assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.8, 0.8, 0.8, 0.2)
        assert (view.grayscale, view.blur, view.solarize, view.flip, view.resize) == (0.2, 0.5, 0, 0.5, "bilinear")
        assert view.std == (0.228, 0.224, 0.225)
    groups = list(method.groups(4096))
    assert {(group.peak_lr, group.weight_decay) for group in groups} == {(4.8, 1e-6)}
    assert "encoder.norm.bias" in {name for group in groups for name in group.parameters}
    assert {group.weight_decay for group in Swav(method.encoder, replace(s, decay_all=False)).groups(4096)} == {0, 1e-6}
    update = Update(method, 8000)
    shares = [update._set_rates(step)["lr"] for step in (0, 99, 100, 8000)]
    assert shares == pytest.approx([0.3, 4.8, 4.8, 0.0048])
    shapes = [tuple(p.shape) for p in swav_projector(2048).parameters() if p.ndim == 2]
    assert shapes == [(2048, 2048), (128, 2048)]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--swav.queue-size", "33"], "--swav.queue-size is 33"),
        (["--swav.optimizer", "lars"], "one of adamw, larc"),
        (["--swav.global-crops", "1"], "--swav.global-crops is 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput) as refusal:
        parse(["--method", "swav", *flags])
    assert named in str(refusal.value)
