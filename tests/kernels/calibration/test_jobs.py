"""What the guarded child does, in this process."""

import pytest
import torch

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
    assert found["errors"] == [{"error": 0.0, "allowed": pytest.approx(0, abs=1e-5)}]


def test_nothing_is_proved_by_zeros(monkeypatch):
    made = inputs.make
    monkeypatch.setattr(inputs, "make", lambda *call: made(*call) | {"images": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(jobs.WrongAnswer, match="nothing but zeros"):
        jobs.prove(GATHER.name, GATHER.arguments, "reference", **HERE)
