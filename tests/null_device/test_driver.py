"""A machine whose driver is too old for the CUDA of this torch: a run ends with what is wrong, and computes nothing."""

import pytest

from engine.null_device import device

pytestmark = pytest.mark.null_device


def test_a_driver_that_is_too_old_ends_a_run_instead_of_leaving_it_to_the_cpu(on_device, tmp_path):
    command = ["-m", "engine.train", "--method", "mae", "--data", "synthetic", "--out", str(tmp_path / "run")]
    done = device.process(command, on_device() | {"NULLCUDA_DRIVER": "12040"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: this machine has a GPU that torch")
    assert "driver on your system is too old (found version 12040). docs/faq.md says what helps" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
