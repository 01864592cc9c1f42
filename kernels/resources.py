"""What every Triton kernel takes on a chip that need not be there: registers, spills, shared memory, matrix instructions.

    python -m kernels.resources [--op packed_attention] [--distinct] [--json]

compiles every variant that `kernels/OP/triton.py` launches, for sm_80 and sm_90, and prints the table; with --distinct,
one of those that differ in nothing but fp16 for bf16. No GPU is needed: Triton's own compiler and NVIDIA's object tools
come with it.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kernels.choice import AVAILABLE

# bytes of shared memory that one block may have, by compute capability
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# matrix instructions in SASS: mma.sync, wgmma and their integer and fp64 kin
_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|IMMA|DMMA)\b")


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, exactly as a launch would ask for it.

    `signature` names the type of every argument in Triton's spelling ("*bf16", "i32", "fp32", "constexpr");
    `constants` holds the values of the constexprs. `aligned` names pointers and integers that are divisible by 16 at
    launch, which Triton finds out by itself there. `matrix` says whether its dot products must become matrix
    instructions. `spills` is the number of spilled bytes that was looked at and accepted on a chip.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    aligned: tuple[str, ...] = ()
    matrix: bool = True
    spills: dict[int, int] = field(default_factory=dict)


def distinct(variants: Iterable[Variant]) -> list[Variant]:
    """Without those that an earlier one equals in all but its name and its 16-bit dtype, which moves a few registers: no
    spill, no byte of shared memory and no matrix instruction, where both are compiled.
    """
    kept: dict[tuple, Variant] = {}
    for variant in variants:
        signature = {name: kind.replace("fp16", "bf16") for name, kind in variant.signature.items()}
        parts = (signature.items(), variant.constants.items(), sorted(variant.aligned), sorted(variant.spills.items()))
        kept.setdefault((variant.kernel, variant.warps, variant.stages, variant.matrix, *map(tuple, parts)), variant)
    return list(kept.values())


class Resources(NamedTuple):
    """Registers per thread; bytes of spills (stack frame) per thread and of shared memory per block; instructions."""

    registers: int
    spills: int
    shared: int
    matrix_instructions: int


def measure(variant: Variant, capability: int) -> Resources:
    """Compile `variant` for a chip of this compute capability (80 or 90) and read its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(variant.kernel, variant.signature, constants, attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        # slow, and not needed to know that there are none: the assembler makes none that PTX lacks
        sass = _tool("nvdisasm", "-c", "-ndf", file.name) if "mma." in compiled.asm["ptx"] else ""
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared, len(_MATRIX.findall(sass)))


def faults(variant: Variant, capability: int, resources: Resources) -> list[str]:
    """What is wrong with it, in sentences; empty when it may run."""
    found = []
    if resources.shared > SHARED_LIMIT[capability]:
        found.append(f"takes {resources.shared} bytes of shared memory, the chip has {SHARED_LIMIT[capability]}")
    if resources.spills > variant.spills.get(capability, 0):
        found.append(f"spills {resources.spills} bytes, {variant.spills.get(capability, 0)} were accepted")
    if variant.matrix and not resources.matrix_instructions:
        found.append("its dot products did not become matrix instructions")
    return found


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    command = [str(Path(nvidia.__file__).parent / "bin" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    ops = [op for op, exist in AVAILABLE.items() if "triton" in exist]
    parser = argparse.ArgumentParser(prog="python -m kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--op", choices=ops, nargs="*", default=ops, help="ops to compile (default: all)")
    parser.add_argument("--distinct", action="store_true", help="compile fp16 only where a form has no like in bf16")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects instead of the table")
    asked = parser.parse_args(arguments)
    # interpreted functions cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    chosen = distinct if asked.distinct else list
    jobs = [
        (op, variant, capability)
        for op in asked.op
        for capability in SHARED_LIMIT
        for variant in chosen(importlib.import_module(f"kernels.{op}.triton").variants(capability))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = list(pool.map(lambda job: measure(*job[1:]), jobs))
    rows = [
        {"op": op, "variant": v.name, "capability": c, **r._asdict(), "faults": faults(v, c, r)}
        for (op, v, c), r in zip(jobs, measured, strict=True)
    ]
    if asked.json:
        print(json.dumps(rows))
    else:
        print(f"{'op':<20} {'variant':<44} {'chip':<6} {'registers':>9} {'spills':>7} {'shared':>8} {'matrix':>7}")
        for row in rows:
            print(
                f"{row['op']:<20} {row['variant']:<44} sm_{row['capability']:<3} {row['registers']:>9} "
                f"{row['spills']:>7} {row['shared']:>8} {row['matrix_instructions']:>7}  {'; '.join(row['faults'])}"
            )
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
