"""Every Triton kernel fits on the chips it is meant for, though none of them is here: compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.choice import AVAILABLE

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("op", [op for op, exist in AVAILABLE.items() if "triton" in exist])
def test_every_variant_compiles_within_its_limits(op):
    # a process of its own: the kernels of this one may be interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.resources", "--json", "--op", op]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    assert {row["capability"] for row in rows} == {80, 90}
    found = [f"{row['variant']} on sm_{row['capability']}: {fault}" for row in rows for fault in row["faults"]]
    assert not found, "\n".join(found)
    assert result.returncode == 0
