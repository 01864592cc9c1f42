"""What micro-batches and computing again do to a step's peak memory, counted; and that neither waits for the device."""

import re

import pytest

from tests.null_device import device

pytestmark = [pytest.mark.null_device, pytest.mark.long, pytest.mark.timeout(1800)]

FLAGS = "--method maect --model vit_tiny_patch16_224 --preset plain --batch-size 256 --weights any --no-compile"


def test_options_that_save_memory_do(on_device):
    def peak(*options: str) -> float:
        """GiB, of the last stage."""
        done = device.process(["-m", "tests.null_device.peak", *FLAGS.split(), *options], on_device())
        assert done.returncode == 0, done.stderr[-4000:]
        found = re.fullmatch(r"1 maect, eager: ([\d.]+) GiB at its peak, [\d,]+ launches", done.stdout.splitlines()[-1])
        assert found, f"a fault: {done.stdout}"
        return float(found[1])

    plain, parts = peak(), peak("--accumulate", "4")
    selective, blocks = peak("--recompute", "selective"), peak("--recompute", "blocks")
    assert parts < 0.5 * plain
    assert blocks < 0.5 * plain
    assert blocks < selective < 0.8 * plain
