"""Calibration on a device that computes nothing: all candidates launch, none proves anything, the child lives on."""

import json
from pathlib import Path

import pytest

from engine.null_device import device
from kernels.calibration import inputs
from kernels.choice import CALLS

# the run of test_training calibrates too
pytestmark = [pytest.mark.null_device, pytest.mark.exhaustive, pytest.mark.long, pytest.mark.timeout(1800)]

LOST = ("killed by signal", "ended with status", "took longer", "context is lost", "CUDA error", "Triton Error")


def test_every_candidate_of_attention_and_losses_launches_and_the_child_outlives_it(on_device, tmp_path):
    seen = on_device() | {"WATCHED": str(tmp_path / "seen"), "TESSERA_CACHE": str(tmp_path)}  # none knows a call yet
    found = device.answer("tests.null_device.calibrating", [], seen)
    assert {CALLS[name].op for name in found["trials"]} == set(found["ops"])
    launched = {(seen["call"], seen["implementation"]): seen["launched"] for seen in found["seen"]}
    for name, forms in found["trials"].items():
        assert forms.keys() == set(inputs.candidates(CALLS[name].op, compiles=True))
        for implementation, form in forms.items():
            assert not any(sign in form.get("failure", "") for sign in LOST), f"{name} {implementation}: {form}"
        kernels = [
            kernel for kernel in launched[name, "triton"] if kernel.startswith("_") and not kernel.startswith("_Z")
        ]
        assert kernels, f"{name}: no kernel of ours was launched"
        # an output's surroundings, filled with a pattern, read as zero: nothing is proved here, and the record says so
        assert forms["triton"]["failure"] == "it wrote before one of its outputs"
        assert (name, "reference") not in launched  # it is proved where something could take its place
    assert not any(seen["refused"] for seen in found["seen"])
    assert "triton" not in {choice for by_class in found["frozen"].values() for choice in by_class.values()}
    attention = next(line for line in found["lines"] if line.startswith("packed_attention_forward"))
    assert ": reference" in attention and "triton: it wrote before one of its outputs" in attention
    record = json.loads(Path(found["record"]).read_text())
    assert record["machine"]["capability"] == "sm_90"
    assert record["machine"]["driver"].startswith("API 13")  # no module of the kernel tells its version
