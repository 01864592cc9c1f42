"""What a machine cannot do ends a run by a sentence: a driver older than the CUDA of this torch, a step that does not fit."""

import pytest

from engine.null_device import device

pytestmark = pytest.mark.null_device
MAE = ("-m", "engine.train", "--method", "mae", "--data", "synthetic")


def test_a_driver_that_is_too_old_ends_a_run_instead_of_leaving_it_to_the_cpu(on_device, tmp_path):
    done = device.process([*MAE, "--out", str(tmp_path / "run")], on_device() | {"NULLCUDA_DRIVER": "12040"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: this machine has a GPU that torch")
    assert "driver on your system is too old (found version 12040). docs/faq.md says what helps" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_step_that_does_not_fit_says_what_needs_less(on_device):
    flags = (
        "--model",
        "vit_tiny_patch16_224",
        "--batch-size",
        "256",
        "--compile",
        "off",
        "--kernels",
        "reference",
        "--dry-run",
    )
    done = device.process([*MAE, *flags], on_device() | {"NULLCUDA_MEMORY": str(2**29)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: CUDA out of memory. Tried to allocate ")
    assert " has a total capacity of 512.00 MiB of which " in done.stderr
    assert "; --accumulate N takes a batch in N parts" in done.stderr and done.stderr.count("\n") == 1
