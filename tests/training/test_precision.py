"""Number formats by device, and training in fp16 with a scaled loss."""

import pytest
import torch

from engine.training import precision
from engine.training.precision import LossScale
from engine.training.state import TrainState, fields
from engine.training.step import Update
from tests.training.test_step import drawn, mae, nnclr
from tests.updates import scaled_gradients

# of a seed with which rounding to fp16 leaves every nearest neighbour who it is
IMAGES = (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_old_cards_take_fp16(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.automatic(torch.device("cuda")) == name
    said = precision.described(name, torch.device("cuda"))
    torch.set_float32_matmul_precision("highest")
    assert said.startswith(name) and said.endswith("fp32 products in full fp32")
    torch.set_float32_matmul_precision("high")
    try:
        assert precision.described(name, torch.device("cuda")).endswith("TF32") == (capability >= (8, 0))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cpus_take_fp32():
    assert precision.automatic(torch.device("cpu")) == "fp32"
    assert precision.described("fp32", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("kind", "clipping"),
    [("mae", {}), ("mae", {"clip_norm": 0.1}), ("mae", {"clip_norm": 0.01, "clip_over": "tensor"}), ("nnclr", {})],
)
def test_a_step_in_fp16_takes_the_gradients_of_fp32(
    kind: str, clipping: dict, accumulate: int, monkeypatch: pytest.MonkeyPatch
):
    """With several micro-batches also where images are compared, whose gradients are cached."""
    monkeypatch.setattr(LossScale, "FIRST", 2.0**8)
    steps = []
    for name in ("fp32", "fp16"):
        method = mae(**clipping) if kind == "mae" else nnclr()
        update, seen = Update(method, 10, name, accumulate), {}

        def look(optimizer: torch.optim.Optimizer, given: tuple, _: dict, seen: dict = seen) -> None:
            scaled = scaled_gradients(*given)
            for group in optimizer.param_groups:
                seen.update({n: scaled[p] for n, p in zip(group["names"], group["params"]) if p in scaled})

        update.optimizer.register_step_pre_hook(look)
        images = IMAGES if kind == "mae" else IMAGES * 2
        report = update(0, images, torch.arange(8), drawn(method))
        steps.append((report["gradient_norm"].item(), seen))
    (norm, plain), (half_norm, half) = steps
    assert half_norm == pytest.approx(norm, rel=2e-2)
    assert plain.keys() == half.keys()
    largest = max(gradient.abs().max().item() for gradient in plain.values())
    for parameter, gradient in plain.items():
        # a bias before a norm over the batch has none, but for rounding
        atol = 0.05 * gradient.abs().max().item() + 1e-3 * largest
        torch.testing.assert_close(half[parameter], gradient, rtol=0.05, atol=atol, msg=parameter)


def test_the_scale_halves_where_a_gradient_overflows_and_nothing_else_moves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LossScale, "FIRST", 2.0**40)
    monkeypatch.setattr(LossScale, "INTERVAL", 3)
    method = mae()
    update = Update(method, 40, "fp16")
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    update(0, IMAGES, torch.arange(8), drawn(method))
    assert (update.loss_scale.scale, update.skipped) == (2.0**39, 1)
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())
    update.loss_scale.scale.fill_(2.0**10)
    for step in range(1, 4):
        update(step, IMAGES, torch.arange(8), drawn(method, step))
    assert (update.loss_scale.scale, update.skipped, update.skipped_in_a_row) == (2.0**11, 1, 0)


def test_the_scale_is_part_of_the_state():
    state, other = (TrainState(method, Update(method, 10, "fp16"), 0, 0, []) for method in (mae(), mae()))
    state.update(0, IMAGES, torch.arange(8), drawn(state.method))
    state.update.loss_scale.scale.fill_(8.0)
    saved = {name: value.clone() for name, value in fields(state)["guard"].get().items()}
    assert saved.keys() == {"skipped", "skipped_in_a_row", "loss_scale", "loss_scale_good"}
    fields(other)["guard"].put(saved)
    assert (other.update.loss_scale.scale, other.update.loss_scale.good) == (8.0, 1)
    assert other.update.loss_scale.scale is not state.update.loss_scale.scale
