"""One update: the guard, accumulation, clipping, the average of weights, schedules."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from engine.core import optim
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group
from engine.methods.dino import Dino
from engine.methods.dino import Settings as DinoSettings
from engine.methods.mae import Mae
from engine.methods.mae import Settings as MaeSettings
from engine.methods.nnclr import Nnclr
from engine.methods.nnclr import Settings as NnclrSettings
from engine.model import vit
from engine.training.optimizers import AdamW, drop_frozen, load_state_tensors, set_lr, state_tensors
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


def per_iteration(form: str, base: float, first: float, last: float, total: int, warm: int) -> np.ndarray:
    """The schedules that the authors' code lays out, restated as arrays of rates."""
    if form == "through":  # DINO, iBOT, DINOv2, SwAV, BEiT, SiT, MC-SSL
        done = np.arange(total - warm) / (total - warm)
        return np.concatenate([np.linspace(first, base, warm), last + (base - last) * (1 + np.cos(np.pi * done)) / 2])
    if form == "to-peak":  # MSN, which counts a step before it sets its rate
        steps = np.arange(1, total + 1)
        falling = last + (base - last) * (1 + np.cos(np.pi * (steps - warm) / (total - warm))) / 2
        return np.where(steps < warm, first + (base - first) * steps / warm, falling)
    if form == "between":  # MAE-CT, MIM-Refiner: neither 0 nor the peak is in the rise, both ends are in the fall
        rising = np.linspace(first, base, warm + 2)[1:-1]
        return np.concatenate([rising, last + (base - last) * (1 + np.cos(np.linspace(0, np.pi, total - warm))) / 2])
    steps = np.arange(total)  # MAE, MoCo v3
    if form == "late":  # SimMIM, where an update sets the rate of the next one
        steps = np.maximum(steps - 1, 0)
    falling = last + (base - last) * (1 + np.cos(np.pi * (steps - warm) / (total - warm))) / 2
    return np.where(steps < warm, first + (base - first) * steps / warm, falling)


@pytest.mark.parametrize("form", optim.WARMUPS)
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (2e-4, 1e-6)])
def test_warm_ups_and_cosines_are_the_authors(form: str, first: float, last: float):
    base, total, warm = 1e-3, 110, 10
    ends = {"start": first / base, "end": last / base, "warmup": form}
    rates = [base * optim.share_of_peak("cosine", step, total, warm, **ends) for step in range(total)]
    assert rates == pytest.approx(per_iteration(form, base, first, last, total, warm), rel=1e-9, abs=1e-15)


def test_relvit_s_quarter_cosine_spans_the_warm_up_too():
    lr, end, total, warm = 5e-4, 1.25e-6, 200, 20
    for step in range(total):
        done = 1 - math.cos(step / total * math.pi / 2)
        expected = lr * step / warm if step < warm else done * end + (1 - done) * lr
        assert lr * optim.share_of_peak("quarter-cosine", step, total, warm, end=end / lr) == pytest.approx(expected)


def test_a_late_quarter_cosine_falls_from_the_peak_and_stops_at_the_end():
    shares = [optim.share_of_peak("late-quarter-cosine", step, 110, 10, end=0.01) for step in range(111)]
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


@pytest.mark.parametrize(
    "flags",
    [{"schedule": "linear"}, {"schedule": "steps"}, {"drops": (0.5,)}, {"warmup_form": "soon"}, {"resize": "nearest"}],
)
def test_a_schedule_or_filter_that_cannot_be_is_refused(flags: dict):
    with pytest.raises(BadInput, match=r"--mae\.(schedule|drops|warmup-form|resize) is"):
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


@pytest.mark.parametrize("watches", [False, True])
def test_frozen_parameters_stay_and_the_optimiser_knows_of_them_where_it_watches(watches: bool):
    still, moving = (nn.Parameter(torch.ones(3)) for _ in range(2))
    common = {"peak_lr": 0.1, "weight_decay": 0.5}
    groups = [Group({"still": still}, **common, frozen_epochs=2, watches=watches), Group({"moving": moving}, **common)]
    optimiser, plain = AdamW(groups, (0.9, 0.999)), torch.zeros(3)
    for epoch in range(3):
        set_lr(optimiser, 1.0, epoch)
        still.grad = moving.grad = torch.full((3,), float(epoch + 1))
        drop_frozen(optimiser, epoch)
        optimiser.step()
        plain = 0.9 * plain + 0.1 * (epoch + 1) if watches or epoch == 2 else plain
        assert torch.equal(still, torch.ones(3)) == (epoch < 2) and (moving < 1).all()
        if watches or epoch == 2:
            torch.testing.assert_close(optimiser.state[still]["exp_avg"], plain)
        else:
            assert still not in optimiser.state


def test_how_many_tokens_of_an_image_were_learned_from_is_reported():
    prefix, patches = 1, 16
    of_mae = [
        Update(method := mae(mask_ratio=0.75, crops=crops), 10, accumulate=accumulate)(
            0, (torch.randn(8, 3, 32, 32),) * crops, torch.arange(8), drawn(method)
        )
        for crops, accumulate in ((1, 1), (1, 4), (2, 1))
    ]
    assert [report["tokens_per_image"] for report in of_mae] == [prefix + patches / 4] * 2 + [
        2 * (prefix + patches / 4)
    ]

    encoder = vit.create("vit_micro_patch8_32", depth=2)
    sizes = {"head_hidden": 16, "bottleneck": 8, "prototypes": 12, "local_size": 16, "local_crops": 3}
    for collapse, accumulate in (("centring", 1), ("sinkhorn", 2)):  # the latter represents every image twice
        dino = Dino(encoder, DinoSettings(epochs=1, batch_size=8, warmup=0.0, collapse=collapse, **sizes))
        images = tuple(torch.randn(8, 3, *view.size) for view in dino.views())
        report = Update(dino, 10, accumulate=accumulate)(0, images, torch.arange(8), drawn(dino))
        assert report["tokens_per_image"] == 2 * (prefix + patches) + 3 * (prefix + 4)  # the teacher's do not count

    method = nnclr()  # trains heads on a frozen encoder
    views = tuple(torch.randn(8, 3, 32, 32) for _ in method.views())
    assert "tokens_per_image" not in Update(method, 10)(0, views, torch.arange(8), drawn(method))
