"""The pipe model: what it reads from code is right on code written for it, and no kernel has become worse by it.

Whole forms are compiled in a process of their own, since the kernels of this one may be interpreted.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kernels.resources import rates
from kernels.resources.forms import stored, worsened
from kernels.resources.pipes import PIPES, Loop, Trips, Unmodelled, demand, frequencies, loops_of, milliseconds, parse

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).with_name("pipes.json")
# few of many, since compiling takes seconds each: `python -m kernels.resources --pipes --against` looks at all
WATCHED = "attention: Triton, .*(50|197) tokens, D 64|backward: 197 tokens, D 32|soft_cross_entropy"


def code(*lines: str):
    """Lines are instructions, or labels that end in a colon."""
    text, place = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{place:04x}*/                   {line} ;")
            place += 16
    return parse("\n".join(text))


NESTED = (
    "MOV R1, R2",
    ".L_x_0:",
    "FADD R1, R1, R2",
    ".L_x_1:",
    "MUFU.EX2 R3, R3",
    "@P0 BRA `(.L_x_1)",
    "LDS.128 R4, [R5]",
    "@!P1 BRA `(.L_x_0)",
    "STG.E.64 [R2], R4",
    "EXIT",
    ".L_x_2:",
    "BRA `(.L_x_2)",
)


def test_loops_and_what_they_ask_for():
    nested = code(*NESTED)
    loops = loops_of(nested)
    assert [(loop.head, loop.outer) for loop in loops] == [(1, None), (2, 0)]
    assert loops[1] == Loop(2, {2}, 0)
    asked = demand(nested, frequencies(nested, (Trips(3), Trips(5))))
    assert asked == Counter(
        issue=1 + 3 * (1 + 2 * 5 + 2) + 2, integer=1, fp32=3, special=15, shared=3 * 32 * 16 + 32 * 8
    )


def test_loops_that_the_source_has_not_are_refused():
    nested = code(*NESTED)
    with pytest.raises(Unmodelled, match="has 2 loops where its source has 1"):
        frequencies(nested, (Trips(3),))
    # what runs once may have been left without a loop
    asked = frequencies(nested, (Trips(3), Trips(1, may_vanish=True), Trips(5)))
    assert asked == frequencies(nested, (Trips(3), Trips(5)))


def test_programs_of_two_roles():
    """A program runs one of two loops; what leads to both or follows from both runs in all programs."""
    roles = code(
        "IADD3 R1, R1, R2, R3",
        "@P0 BRA `(.L_x_1)",
        "FADD R1, R1, R2",
        ".L_x_0:",
        "FMUL R1, R1, R2",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_1:",
        "MUFU.RCP R1, R1",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    )
    asked = demand(roles, frequencies(roles, (Trips(4, 0.25), Trips(8, 0.75))))
    assert (asked["integer"], asked["fp32"], asked["special"]) == (1, 0.25 * (1 + 4), 0.75 * 8)


def test_a_jump_to_where_lanes_are_apart_is_not_taken():
    apart = code("BRA.DIV ~URZ, `(.L_x_0)", "FADD R1, R1, R2", "EXIT", ".L_x_0:", "FMUL R1, R1, R2", "EXIT")
    assert demand(apart, frequencies(apart, ()))["issue"] == 3


@pytest.mark.parametrize(
    ("instruction", "asked"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {"mma": 16 * 8 * 16}),
        ("HGMMA.64x32x16.F32.BF16 R88, gdesc[UR8], R88", {"wgmma": 64 * 32 * 4, "shared": (32 * 16 * 2 + 2048) / 4}),
        ("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24", {"wgmma": 64 * 64 * 4, "shared": 64 * 16 * 2 / 4}),
        ("LDSM.16.MT88.4 R140, [R185+UR60]", {"shared": 512}),
        ("SHFL.BFLY PT, R3, R2, 0x1, 0x1f", {"shared": 128}),
        ("LDGSTS.E.BYPASS.128 [R246+0xe000], [R2.64]", {"shared": 512}),
        ("STL [R1+0x10], R4", {"shared": 128}),
        ("LDG.E.U16 R4, [R2.64]", {"shared": 64}),
        ("LDGDEPBAR", {}),
        ("IMAD.WIDE R2, R3, R4, R6", {"multiply": 1}),
        ("F2FP.BF16.PACK_AB R2, R3, R4", {"integer": 1}),
        ("UIADD3 UR4, UR5, UR6, URZ", {}),
        ("BAR.SYNC 0x0", {}),
        ("@!PT LDS RZ, [RZ]", {}),
    ],
)
def test_each_kind_of_instruction(instruction, asked):
    assert demand(code(instruction, "EXIT"), [1.0]) == Counter(asked | {"issue": 2})


@pytest.mark.parametrize("instruction", ["BRX R2", "DFMA R2, R4, R6, R8"])
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(Unmodelled, match=r"jumps by a register|no pipe is known"):
        demand(code(instruction, "EXIT"), [1.0])


def test_time_of_each_pipe():
    """One multiprocessor's second of each pipe, on each chip."""
    for chip in rates.CHIPS.values():
        second = chip.clock * chip.sms
        asked = Counter(
            issue=second * chip.issue, mma=second * chip.mma / 2, wgmma=second * chip.wgmma / 2,
            special=second * chip.special, fp32=second * chip.fp32 / 2, multiply=second * chip.multiply / 2,
            integer=second * chip.integer, shared=second * chip.shared,
        )  # fmt: skip
        expected = dict.fromkeys(PIPES, 1e3) | ({} if chip.wgmma else {"tensor": 500})
        assert milliseconds(asked, chip) == pytest.approx(expected)


def test_a_calibration_replaces_what_it_measured(tmp_path):
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"chip": "H200", "origin": "card 3, 2027-01-02", "rates": {"dram": 4.1e12}}))
    found = rates.read(record)
    assert found["H200"].dram == 4.1e12 and found["H200"].origin == "card 3, 2027-01-02"
    assert found["H200"].shared == rates.CHIPS["H200"].shared and found["A100"] == rates.CHIPS["A100"]
    assert rates.read(None) == rates.CHIPS
    assert all(chip.origin == rates.NOT_CALIBRATED for chip in rates.CHIPS.values())


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"chip": "B200", "origin": "x", "rates": {}}, "needs a chip of A100, H100, H200, got 'B200'"),
        ({"chip": "A100", "rates": {}}, "needs its origin"),
        ({"chip": "A100", "origin": "x", "rates": {"drams": 1}}, "needs rates by name"),
        ({"chip": "A100", "origin": "x", "rates": {"dram": -1}}, "needs a positive number for dram, got -1"),
        ([], "not a JSON object"),
    ],
)
def test_a_wrong_calibration_is_refused(tmp_path, record, told):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=told):
        rates.read(path)


def test_what_counts_as_worse():
    row = {"op": "patches", "form": "Triton, gather", "shape": "a", "chip": "A100", "largest": "issue"}
    before = stored([row | {"ratio": 1.5}])
    assert before == {"A100": {"patches: Triton, gather: a": 1.5}}
    assert not worsened([row | {"ratio": 1.57}], before)
    assert "took 1.50 times the floor and takes 1.58 now" in worsened([row | {"ratio": 1.58}], before)[0]
    assert "is not modelled any more: why" in worsened([row | {"not_modelled": "why"}], before)[0]
    assert "is not in the stored table" in worsened([row | {"ratio": 1.0}], {})[0]
    assert not worsened([row | {"form": "CUDA, forward", "ratio": 9.0}], before)


def modelled(only: str, *chips: str, first: str = "") -> subprocess.CompletedProcess:
    """The comparison with the stored table, after a statement that may change what is compiled."""
    arguments = ["--pipes", "--json", "--only", only, "--chip", *chips, "--against", str(TABLE)]
    script = f"import sys\n{first}\nfrom kernels.resources.__main__ import main\nsys.exit(main({arguments!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["A100", "H200"])
def test_no_form_has_become_worse(chip):
    result = modelled(WATCHED, chip)
    assert result.returncode == 0, result.stderr
    rows = [row for row in json.loads(result.stdout) if row["form"].startswith("Triton")]
    assert len(rows) == 7 and all("ratio" in row for row in rows)


@pytest.mark.long
def test_a_worse_configuration_is_caught():
    """The tiles that backward had at 197 tokens before the model chose them."""
    planted = (
        "import importlib\n"
        "t = importlib.import_module('kernels.packed_attention.triton')\n"
        "t.config = lambda *asked: t.Config(rows=32, step=32, warps=8)"
    )  # fmt: skip
    result = modelled("Triton, backward: 197 tokens, D 64", "A100", first=planted)
    assert result.returncode == 1
    assert "takes 3.04 now (shared)" in result.stderr
