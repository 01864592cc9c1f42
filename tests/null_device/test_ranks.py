"""Two ranks train by DDP over NCCL on devices that compute nothing: one graph a region, no wait, gradients averaged."""

import json
import subprocess
import sys

import pytest

from engine.null_device import device
from tests.null_device import figures
from tests.ranks import group

pytestmark = [pytest.mark.null_device, pytest.mark.exhaustive, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_two_ranks_under_ddp_are_sound_when_compiled(name, on_device):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.null_device.ranks", name], env=on_device() | told | {"LOCAL_RANK": "0"},
            cwd=device.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for told in group(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=device.SECONDS) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said[0][1][-4000:] + said[1][1][-4000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert (first["rank"], second["rank"], first["world"]) == (0, 1, 2)
    assert first["stages"] == second["stages"]
    _, alone = figures.stored()
    for stage, report in first["stages"].items():
        # DDP times its first ten steps, and every hundredth, by events of its own that it waits for
        assert [fault for fault in report["faults"] if "cudaEventSynchronize" not in fault] == [], stage
        # DDP cuts no region: as many graphs as one process has
        assert report["graphs"] == alone[name]["sm_90"][stage]["graphs"]
        counted = report["figures"]
        assert counted["collectives"] > 1 and counted["bytes_of_collectives"] > 2**20, "the gradients of a ViT-Ti"
