"""What the guarded child does, in this process."""

from types import SimpleNamespace

import pytest
import torch

from kernels import choice
from kernels.adamw import reference
from kernels.calibration import inputs, jobs
from kernels.calibration.calls import Call

GATHER = Call.of(
    "gather_patches",
    {
        "images": torch.empty(2, 3, 8, 8),
        "indices": torch.empty(2, 3, dtype=torch.int64, device="meta"),
        "patch_size": 4,
    },
)
HERE = {"device": "cpu", "threads": torch.get_num_threads(), "deterministic": False}


def test_the_reference_is_right_and_stable():
    found = jobs.prove(GATHER.name, GATHER.arguments, "reference", **HERE)
    assert found["stable"] is True
    assert found["errors"] == [{"error": 0.0, "plain_error": 0.0, "allowed": pytest.approx(0, abs=1e-5)}]


def test_nothing_is_proved_by_zeros(monkeypatch):
    made = inputs.make
    monkeypatch.setattr(inputs, "make", lambda *call: made(*call) | {"images": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(jobs.WrongAnswer, match="nothing but zeros"):
        jobs.prove(GATHER.name, GATHER.arguments, "reference", **HERE)


def optimiser_call(scales: torch.Tensor | None) -> Call:
    lists = [[torch.empty(n, 7, device="meta") for n in (1, 300, 2)] for _ in range(5)]
    others = {"step": torch.empty((), device="meta"), "averages": lists[4], "scales": scales, "applied": None}
    numbers = {"average_weight": 0.1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    return Call.of("adamw", dict(zip(("parameters", "gradients", "moments", "squares"), lists)) | others | numbers)


@pytest.mark.parametrize(
    ("scales", "scaled"),
    [
        (None, ""),
        (torch.empty((), device="meta"), " scaled"),
        (torch.empty(3, device="meta"), " scaled each"),
    ],
)
def test_an_op_that_writes_to_lists_of_tensors_is_proved_on_copies(scales: torch.Tensor | None, scaled: str):
    call = optimiser_call(scales)
    assert call.shape_class == f"float32 2^12 averaged{scaled}"
    assert call.elements == 5 * 2121 + 1 + (0 if scales is None else scales.numel())
    assert "moments 3 of 2121" in call.shapes
    found = jobs.prove(call.name, call.arguments, "reference", **HERE)
    assert found["stable"] is True
    assert len(found["errors"]) == 4 * 3  # parameters, both moments, averages
    assert all(one["allowed"] > 0 for one in found["errors"])
    assert set(jobs.time(call.name, call.arguments, ["reference"], seconds=0.01, **HERE)) == {"reference"}


@pytest.mark.parametrize("forgotten", ["average", "moments of one tensor"])
def test_an_optimiser_that_is_wrong_in_one_of_its_lists_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch):
    right = reference.step
    monkeypatch.setattr(jobs, "bring", lambda op, name: {"triton": wrong, "reference": reference}[name])
    monkeypatch.setattr(jobs, "usable", lambda *_: "")

    def step(given):
        kept = given.moments[-1].clone()
        right(given._replace(averages=[x.clone() for x in given.averages]) if forgotten == "average" else given)
        if forgotten == "moments of one tensor":
            given.moments[-1].copy_(kept)

    wrong = SimpleNamespace(step=step)
    monkeypatch.setitem(choice._modules, ("adamw", "triton"), wrong)
    call = optimiser_call(None)
    with pytest.raises(jobs.WrongAnswer, match="is off by"):
        jobs.prove(call.name, call.arguments, "triton", **HERE)
