"""Every Triton kernel fits on the chips it is meant for, though none of them is here: compiled ahead of time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.choice import AVAILABLE
from kernels.compiled import Variant
from kernels.resources.registers import distinct

ROOT = Path(__file__).parents[3]


def test_a_form_is_compiled_in_one_16_bit_dtype():
    """What differs in anything else is compiled as well."""
    bf16 = Variant("first", test_a_form_is_compiled_in_one_16_bit_dtype, {"x": "*bf16", "n": "i32"}, {"R": 16})
    fp16 = replace(bf16, name="second", signature={"x": "*fp16", "n": "i32"})
    others = [
        replace(bf16, signature={"x": "*fp32", "n": "i32"}),
        replace(fp16, constants={"R": 32}),
        replace(fp16, warps=8),
        replace(fp16, stages=3),
        replace(fp16, aligned=("x",)),
        replace(fp16, spills={80: 8}),
        replace(fp16, matrix=False),
        replace(fp16, kernel=distinct),
    ]
    assert distinct([bf16, fp16, bf16, *others]) == [bf16, *others]
    assert distinct([fp16]) == [fp16]


@pytest.mark.long
@pytest.mark.parametrize("op", [op for op, exist in AVAILABLE.items() if "triton" in exist])
def test_every_variant_compiles_within_its_limits(op):
    # a process of its own: the kernels of this one may be interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.resources", "--json", "--distinct", "--op", op]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    assert {row["capability"] for row in rows} == {80, 86, 90}
    found = [f"{row['variant']} on sm_{row['capability']}: {fault}" for row in rows for fault in row["faults"]]
    assert not found, "\n".join(found)
    assert result.returncode == 0
