"""What the device that computes nothing is there to find is found: planted, each by its own kind; else nothing."""

import pytest

from engine.null_device import device

pytestmark = [pytest.mark.null_device, pytest.mark.long]

WAITS = "waits for the device: {'cudaStreamSynchronize': "
LET_THROUGH = ("mask_as_index", "copy_to_host", "nonzero")  # by torch.compile, full graph or not
READING = ("read_for_a_branch", "list_to_device", *LET_THROUGH)


def test_each_planted_fault_is_caught_by_its_own_kind(on_device):
    found = device.answer("tests.null_device.faults", [], on_device())
    assert found.pop("none") == found.pop("none, compiled") == []
    expected = {name: WAITS for name in READING}
    expected |= {f"{name}, compiled": WAITS for name in LET_THROUGH}
    expected |= {
        "synchronised": "waits for the device: {'cudaDeviceSynchronize': 1}",
        "read_for_a_branch, compiled": "not one graph: UserError",
        "synchronised, compiled": "not one graph: Unsupported",
        "break_of_the_graph, compiled": "not one graph: Unsupported",
        "another number, compiled": "compiled again when warm: ",
        "spills": "spills registers, bytes a thread: {'too_large': ",
        "refused": "Triton Error [CUDA]: refused by the null device",
    }
    assert found.keys() == expected.keys()
    for name, sentence in expected.items():
        assert found[name][0].startswith(sentence), f"{name}: {found[name]}"
    for name in READING:  # and where, by the line of the plant
        assert "first at tests/null_device/faults.py:" in found[name][0]
