"""One update: the guard, accumulation, clipping, the average of weights, schedules."""

import math

import pytest
import torch

from engine.core import optim
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.mae import Mae
from engine.methods.mae import Settings as MaeSettings
from engine.methods.nnclr import Nnclr
from engine.methods.nnclr import Settings as NnclrSettings
from engine.model import vit
from engine.training.optimizers import load_state_tensors, state_tensors
from engine.training.step import Update
from tests.saved import content
from tests.updates import scaled_gradients


def mae(**settings: object) -> Mae:
    torch.manual_seed(0)
    values = {"epochs": 1, "batch_size": 8, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 1, "warmup": 0.0}
    return Mae(vit.create("vit_micro_patch8_32", depth=2, positions="sincos"), MaeSettings(**(values | settings)))


def nnclr() -> Nnclr:
    torch.manual_seed(0)
    sizes = {"projector_hidden": 16, "predictor_hidden": 16, "embedding": 8, "queue_size": 16}
    encoder = vit.create("vit_micro_patch8_32", depth=1)
    return Nnclr(encoder, NnclrSettings(epochs=1, batch_size=8, warmup=0.0, base_lr=1e-2, **sizes))


def drawn(method, step: int = 0):
    return method.draw(Draws(0, step, batch=8, rows=slice(None), device=torch.device("cpu")))


@pytest.mark.parametrize("make", [mae, nnclr])
@pytest.mark.parametrize("poison", ["image", "gradient", "loss"])
def test_a_bad_update_changes_nothing_and_is_counted(make, poison: str, monkeypatch: pytest.MonkeyPatch):
    method = make()
    update, views = Update(method, 10), len(method.views())
    images = tuple(torch.randn(8, 3, 32, 32) for _ in range(views))
    update(0, images, torch.arange(8), drawn(method))
    before = content(method, update)
    if poison == "image":
        update(1, tuple(torch.full_like(view, math.nan) for view in images), torch.arange(8), drawn(method, 1))
    elif poison == "gradient":
        hook = update.trained[0].register_hook(lambda gradient: gradient.clone().fill_(math.inf))
        update(1, images, torch.arange(8), drawn(method, 1))
        hook.remove()
    else:
        forward = method.forward
        monkeypatch.setattr(
            method,
            "forward",
            lambda *a: {"loss": forward(*a)["loss"].detach() + update.trained[0].sum() * 0 + math.inf},
        )
        update(1, images, torch.arange(8), drawn(method, 1))
        monkeypatch.undo()
    for name, value in content(method, update).items():
        assert torch.equal(value, before[name]), name
    assert (update.skipped.item(), update.skipped_in_a_row.item()) == (1, 1)
    update(2, images, torch.arange(8), drawn(method, 2))
    assert (update.skipped.item(), update.skipped_in_a_row.item()) == (1, 0)
    after = content(method, update)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_micro_batches_give_the_whole_batch_s_update():
    results = []
    for accumulate in (1, 4):
        method = mae()
        update = Update(method, 10, accumulate=accumulate)
        torch.manual_seed(1)
        for step in range(3):
            report = update(step, (torch.randn(8, 3, 32, 32),), torch.arange(8), drawn(method, step))
        results.append((report["loss"], content(method, update)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, atol=2e-5, rtol=1e-3, msg=name)


def test_gradients_are_clipped_to_the_norm():
    method = mae(clip_norm=1e-3)
    update = Update(method, 10)
    seen = {}
    update.optimizer.register_step_pre_hook(
        lambda _, given, __: seen.update(norm=torch.nn.utils.get_total_norm(list(scaled_gradients(*given).values())))
    )
    report = update(0, (torch.randn(8, 3, 32, 32),), torch.arange(8), drawn(method))
    assert report["gradient_norm"] > 1e-3
    assert seen["norm"].item() == pytest.approx(1e-3, rel=1e-3)


def test_weight_average_moves_by_its_decay_and_swaps_exactly():
    method = mae(weight_ema=0.9, base_lr=1e-2)
    update = Update(method, 10)
    name = "blocks.0.mlp.fc1.weight"
    old = update.average.weights[name].clone()
    update(0, (torch.randn(8, 3, 32, 32),), torch.arange(8), drawn(method))
    online = dict(method.encoder.named_parameters())[name]
    raw = online.detach().clone()
    torch.testing.assert_close(update.average.weights[name], 0.9 * old + 0.1 * raw)
    with update.average.in_place():
        torch.testing.assert_close(online.detach(), 0.9 * old + 0.1 * raw)
    assert torch.equal(online.detach(), raw)


def test_schedule_is_linear_then_cosine():
    shares = [optim.warmup_cosine(step, 100, 20) for step in range(101)]
    assert shares[0] == 0
    assert shares[10] == pytest.approx(0.5)
    assert shares[20] == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0)
    assert optim.warmup_cosine(0, 10, 0) == 1
    ahead = [optim.warmup_cosine(step, 100, 20, ahead=1) for step in range(101)]
    assert ahead[:21] == [(step + 1) / 21 for step in range(21)] and ahead[20:] == shares[20:]
    assert optim.scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_a_quarter_cosine_falls_from_the_peak_and_stops_at_the_end():
    shares = [optim.share_of_peak("quarter-cosine", step, 110, 10, end=0.01) for step in range(111)]
    assert shares[5] == pytest.approx(0.5)
    assert shares[10] == 1
    assert shares[60] == pytest.approx(math.cos(math.pi / 4))
    assert shares[110] == 0.01
    assert shares == sorted(shares[:10]) + sorted(shares[10:], reverse=True)


def test_steps_divide_by_ten_at_their_shares():
    shares = [optim.share_of_peak("steps", step, 100, 10, drops=(0.5, 0.9)) for step in range(100)]
    assert shares[5] == pytest.approx(0.5)
    assert [shares[step] for step in (10, 49, 50, 89, 90, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert optim.share_of_peak("steps", 95, 100, 10, end=0.05, drops=(0.5, 0.9)) == 0.05
    assert optim.share_of_peak("cosine", 60, 100, 20) == optim.warmup_cosine(60, 100, 20)


@pytest.mark.parametrize("flags", [{"schedule": "linear"}, {"schedule": "steps"}, {"drops": (0.5,)}])
def test_a_schedule_that_cannot_be_is_refused(flags: dict):
    with pytest.raises(BadInput, match=r"--mae\.(schedule|drops) is"):
        MaeSettings(**flags).check("mae")


def test_optimiser_state_round_trip_and_frozen_steps():
    method = mae()
    update = Update(method, 10)
    update(0, (torch.randn(8, 3, 32, 32),), torch.arange(8), drawn(method))
    tensors = {name: value.clone() for name, value in state_tensors(update.optimizer).items()}
    assert {name.rpartition("/")[2] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    other = Update(mae(), 10)
    load_state_tensors(other.optimizer, tensors)
    for name, value in state_tensors(other.optimizer).items():
        assert torch.equal(value, tensors[name]), name
