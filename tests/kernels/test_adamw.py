"""AdamW over lists of tensors: every implementation against the formula in float64, on any device it runs on."""

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import choice
from kernels.adamw import cost, reference, triton
from kernels.adamw.arguments import Step
from tests.kernels import played_apex
from tests.kernels.agreement import DEVICES, assert_close_as_plain

# several programs, ends of blocks, one element, none, more tensors than a power of two
SHAPES = ((7,), (3, 5), (1024,), (1025,), (0,), (50, 61), (1,), (2, 3, 4), (0, 3))
NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


@dataclass
class Tensors:
    """What a call takes, by its names; and what to compare afterwards."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    moments: list[Tensor]
    squares: list[Tensor]
    step: Tensor
    averages: list[Tensor] = field(default_factory=list)

    @staticmethod
    def drawn(shapes: Any = SHAPES, device: str = "cpu", steps: int = 3, averaged: bool = True) -> "Tensors":
        lists = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(5 if averaged else 4)]
        if not steps:  # as they begin
            lists[2:4] = [[torch.zeros_like(x) for x in tensors] for tensors in lists[2:4]]
        squares = [x.abs() for x in lists[3]]
        return Tensors(*lists[:3], squares, torch.tensor(float(steps), device=device), *lists[4:])

    def copy(self, dtype: torch.dtype = torch.float32) -> "Tensors":
        lists = (self.parameters, self.gradients, self.moments, self.squares, self.averages)
        *first, averages = ([x.to(dtype, copy=True) for x in tensors] for tensors in lists)
        return Tensors(*first, self.step.clone(), averages)

    def compared(self) -> list[Tensor]:
        return [*self.parameters, *self.moments, *self.squares, *self.averages]


def formula(x: Tensors, scales: Tensor | None, applied: bool, weight: float) -> None:
    """The paper's algorithm 2, a tensor at a time."""
    if not applied:
        return
    (beta1, beta2), t = NUMBERS["betas"], int(x.step) + 1
    for i, (p, g, m, v) in enumerate(zip(x.parameters, x.gradients, x.moments, x.squares, strict=True)):
        g = g if scales is None else g * (scales[i] if scales.ndim else scales).to(g)
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p.copy_(p - NUMBERS["lr"] * (m_hat / (v_hat.sqrt() + NUMBERS["eps"]) + NUMBERS["weight_decay"] * p))
    for average, p in zip(x.averages, x.parameters, strict=False):
        average.copy_((1 - weight) * average + weight * p)


def run(x: Tensors, module: ModuleType, scales: Tensor | None, applied: Tensor | None, weight: float) -> None:
    numbers = NUMBERS["lr"], *NUMBERS["betas"], NUMBERS["eps"], NUMBERS["weight_decay"]
    module.step(Step(*vars(x).values(), scales, applied, weight, *numbers))


def scales_of(form: str, device: str = "cpu", count: int = len(SHAPES)) -> Tensor | None:
    """None, one for all, or one each."""
    return {
        "as they are": None, "scaled": torch.tensor(0.37, device=device), "scaled each": torch.rand(count, device=device)
    }[form]  # fmt: skip


@pytest.fixture
def apex(monkeypatch):
    """The implementation as it is where apex is built."""
    monkeypatch.setitem(sys.modules, "amp_C", played_apex.module())
    yield importlib.import_module("kernels.adamw.apex")
    for key in [("adamw", "apex")]:
        choice._modules.pop(key, None)
    sys.modules.pop("kernels.adamw.apex", None)


@pytest.fixture(params=["reference", "triton", "apex"])
def module(request):
    return {"reference": reference, "triton": triton}.get(request.param) or request.getfixturevalue("apex")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [0, 3, 1000])
@pytest.mark.parametrize("scaled", ["as they are", "scaled", "scaled each"])
def test_all_compute_the_formula(module: ModuleType, device: str, steps: int, scaled: str):
    start, scales = Tensors.drawn(device=device, steps=steps), scales_of(scaled, device)
    truth, plain, ours = start.copy(torch.float64), start.copy(), start.copy()
    formula(truth, scales, True, 0.3)
    formula(plain, scales, True, 0.3)
    run(ours, module, scales, None, 0.3)
    for by_ours, by_plain, true in zip(ours.compared(), plain.compared(), truth.compared(), strict=True):
        assert_close_as_plain(by_ours, by_plain, true)
    assert ours.step == steps


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_applied_changes_no_bit_even_of_nan(module: ModuleType, device: str):
    start = Tensors.drawn(device=device)
    for gradient in start.gradients:
        gradient.fill_(torch.nan)
    ours, scales = start.copy(), scales_of("scaled each", device)
    run(ours, module, scales, torch.tensor(False, device=device), 0.3)
    assert ours.step == start.step
    assert all(torch.equal(a, b) for a, b in zip(ours.compared(), start.compared(), strict=True))
    fed = start.copy()
    fed.gradients = [torch.ones_like(x) for x in fed.gradients]
    flagged, free = fed.copy(), fed.copy()
    run(flagged, module, None, torch.tensor(True, device=device), 0.3)
    run(free, module, None, None, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(flagged.compared(), free.compared(), strict=True))


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 2100), min_size=1, max_size=17), shift=st.integers(0, 3), averaged=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_triton_takes_any_sizes_and_gradients_from_anywhere_in_a_bucket(
    sizes: list[int], shift: int, averaged: bool, seed: int
):
    torch.manual_seed(seed)
    start = Tensors.drawn([(size,) for size in sizes], averaged=averaged)
    bucket = torch.cat([torch.zeros(shift), *start.gradients])
    ours, plain = start.copy(), start.copy()
    ours.gradients = list(bucket[shift:].split(sizes))
    run(ours, triton, None, None, 0.25)
    run(plain, reference, None, None, 0.25)
    torch.testing.assert_close(ours.compared(), plain.compared(), rtol=2e-6, atol=1e-6)


def test_the_reference_in_float64_is_the_formula():
    start, scales = Tensors.drawn().copy(torch.float64), scales_of("scaled")
    ours, truth = start.copy(torch.float64), start.copy(torch.float64)
    run(ours, reference, scales, torch.tensor(True), 0.3)
    formula(truth, scales, True, 0.3)
    torch.testing.assert_close(ours.compared(), truth.compared(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="takes float32"):
        run(ours, triton, None, None, 0.3)


def test_apex_takes_all_tensors_at_once_and_fp32_only(apex: ModuleType):
    start = Tensors.drawn()
    run(start, apex, None, None, 0.3)
    assert sys.modules["amp_C"].used == [len(SHAPES)]
    with pytest.raises(ValueError, match="float32"):
        run(start.copy(torch.float64), apex, None, None, 0.3)


def test_apex_that_is_not_there_is_a_reason():
    assert "amp_C" in choice.usable("adamw", "apex", torch.device("cuda"))


def test_the_public_op_moves_what_its_implementation_moves():
    for implementation in ("reference", "triton"):
        ours, wanted = Tensors.drawn(), None
        wanted = ours.copy()
        kernels.use(implementation, "adamw")
        lists = dict(vars(ours))
        kernels.adamw(**lists, **NUMBERS, average_weight=0.2, applied=torch.tensor(True))
        run(wanted, importlib.import_module(f"kernels.adamw.{implementation}"), None, None, 0.2)
        assert all(torch.equal(a, b) for a, b in zip(ours.compared(), wanted.compared(), strict=True))
    kernels.adamw([], [], [], [], torch.zeros(()), **NUMBERS)


def test_what_does_not_fit_is_refused():
    fits = vars(Tensors.drawn(((4, 6), (3,))))
    for wrong, said in (
        ({"gradients": fits["gradients"][:1]}, "as many gradients as parameters, got 1 and 2"),
        ({"moments": [x.double() for x in fits["moments"]]}, "moments like their parameters"),
        ({"squares": [fits["squares"][0].T.contiguous().T, fits["squares"][1]]}, "contiguous squares"),
        ({"averages": fits["averages"][::-1]}, "averages like their parameters"),
        ({"step": torch.zeros(2)}, r"step as a floating point number \[\]"),
        ({"scales": torch.ones(3)}, r"scales \[\] or \[2\], got \[3\]"),
        ({"applied": torch.ones(())}, r"applied as bool \[\]"),
    ):
        with pytest.raises(ValueError, match=said):
            kernels.adamw(**(fits | wrong), **NUMBERS)
    half = {name: [x.half() for x in value] if isinstance(value, list) else value for name, value in fits.items()}
    with pytest.raises(ValueError, match="all in float32 or all in float64"):
        kernels.adamw(**half, **NUMBERS)


def test_the_floor_counts_every_number_once():
    assert cost(10, averaged=False).bytes == 10 * 4 * 7
    assert cost(10, averaged=True).bytes == 10 * 4 * 9
