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
from kernels.resources.registers import AGAIN, distinct

ROOT = Path(__file__).parents[3]
KNOWN = Path(__file__).with_name("registers.json")  # made by `python -m kernels.resources --distinct --store`


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


def answered(*arguments: str) -> tuple[int, list[dict], str]:
    # a process of its own: the kernels of this one may be interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.resources", "--json", "--distinct", *arguments]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.returncode, json.loads(result.stdout or "[]"), result.stderr


@pytest.mark.long
def test_every_variant_compiles_within_its_limits():
    """Of code that is as it was, what was found of it is taken from the table, all but one in 16; `exhaustive` compiles all."""
    status, rows, said = answered("--known", str(KNOWN))
    assert {row["op"] for row in rows} == {op for op, exist in AVAILABLE.items() if "triton" in exist}, said
    assert {row["capability"] for row in rows} == {80, 86, 90}
    found = [f"{row['variant']} on sm_{row['capability']}: {fault}" for row in rows for fault in row["faults"]]
    assert not found, "\n".join(found)
    assert status == 0


@pytest.mark.exhaustive
def test_the_table_says_what_every_variant_compiles_to(tmp_path: Path):
    status, _, said = answered("--store", str(tmp_path / "now.json"))
    assert status == 0, said
    now, known = (json.loads(path.read_text()) for path in (tmp_path / "now.json", KNOWN))
    assert now == known


@pytest.mark.long
def test_a_table_that_is_wrong_is_found_out_and_limits_hold_for_what_it_says(tmp_path: Path):
    table = tmp_path / "table.json"
    known = {name: (255, 0, 300_000, 1) for name in json.loads(KNOWN.read_text())}
    table.write_text(json.dumps(known))
    status, rows, said = answered("--op", "patches", "--known", str(table))
    assert status == 1 and not rows and f"{table} says otherwise of " in said
    table.write_text(json.dumps({name: known[name] for name in known if int(name, 16) % AGAIN}))
    status, rows, _ = answered("--op", "patches", "--known", str(table))
    assert status == 1 and "takes 300000 bytes of shared memory, the chip has" in rows[0]["faults"][0]


def test_what_machine_code_follows_from_is_in_its_identity():
    """Nothing else is: a name or what was accepted of it does not make other code."""
    # a process of its own, as above
    planted = """
import json
from dataclasses import replace
import kernels.patches.triton as patches
from kernels.compiled import identity
one = next(iter(patches.variants(80)))
name, value = next(iter(one.constants.items()))
others = [
    replace(one, warps=2 * one.warps),
    replace(one, stages=one.stages + 1),
    replace(one, constants={**one.constants, name: 2 * value}),
    replace(one, aligned=()),
    replace(one, name="other", spills={80: 8}),
]
print(json.dumps([identity(one, 80), identity(one, 90), *(identity(other, 80) for other in others)]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = json.loads(subprocess.check_output([sys.executable, "-c", planted], env=environment, cwd=ROOT, text=True))
    assert len({*found[:-1]}) == len(found) - 1 and found[-1] == found[0]
