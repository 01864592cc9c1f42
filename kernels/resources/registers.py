"""Registers, spills, shared memory and matrix instructions of a Triton kernel, read from its machine code."""

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from kernels.compiled import SHARED_LIMIT, Variant, compiled_for, identity, tool

# matrix instructions in SASS: mma.sync, wgmma and their integer and fp64 kin
_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|IMMA|DMMA)\b")


def distinct(variants: Iterable[Variant]) -> list[Variant]:
    """Without those that an earlier one equals in all but its name and its 16-bit dtype, which moves a few registers: no
    spill, no byte of shared memory and no matrix instruction, where both are compiled.
    """
    kept: dict[tuple, Variant] = {}
    for variant in variants:
        signature = {name: kind.replace("fp16", "bf16") for name, kind in variant.signature.items()}
        kept.setdefault(asked_for(replace(variant, signature=signature)), variant)
    return list(kept.values())


def asked_for(variant: Variant) -> tuple:
    """All but its name."""
    parts = (
        variant.signature.items(),
        variant.constants.items(),
        sorted(variant.aligned),
        sorted(variant.spills.items()),
    )
    return (variant.kernel, variant.warps, variant.stages, variant.matrix, *map(tuple, parts))


AGAIN = 16  # of so many variants that are known one is compiled all the same


class Resources(NamedTuple):
    """Registers per thread; bytes of spills (stack frame) per thread and of shared memory per block; instructions."""

    registers: int
    spills: int
    shared: int
    matrix_instructions: int


def measure(variant: Variant, capability: int) -> Resources:
    """Compile `variant` for a chip of this compute capability (80, 86 or 90) and read its cubin."""
    compiled = compiled_for(variant, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        # slow, and not needed to know that there are none: the assembler makes none that PTX lacks
        sass = tool("nvdisasm", "-c", "-ndf", file.name) if "mma." in compiled.asm["ptx"] else ""
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared, len(_MATRIX.findall(sass)))


def of_known(variant: Variant, capability: int, known: Mapping[str, Sequence[int]]) -> Resources | None:
    """What is known of its machine code by `identity`; None of one that isn't, and of one in `AGAIN`, so that a table that is
    wrong is found out."""
    name = identity(variant, capability)
    return Resources(*known[name]) if name in known and int(name, 16) % AGAIN else None


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
