"""A Triton kernel compiled ahead of time for a chip that need not be there, and NVIDIA's object tools that read it: both come
with Triton."""

import hashlib
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# bytes of shared memory that one block may have, by class of chips
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


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


def chip_class(major: int, minor: int) -> int:
    """Whose tiles a chip of this compute capability takes: 80, 86 (8.6, 8.9 and 12.x, whose blocks have 99 KB of shared
    memory) or 90 (and 10.x, which has as much; its own matrix instructions are not planned for)."""
    if major in (9, 10):
        return 90
    return 86 if major > 10 or (major, minor) in ((8, 6), (8, 9)) else 80


def compiled_for(variant: Variant, capability: int) -> Any:
    """`variant` for a chip of this compute capability, as `triton.compile` returns it: asm["cubin"], metadata.shared."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(_source(variant), target=GPUTarget("cuda", capability, 32), options=options)


def identity(variant: Variant, capability: int) -> str:
    """Of all that its machine code follows from: the kernel's text and what that calls, types and constants, the chip, Triton's
    release. Hexadecimal."""
    import triton

    parts = (_source(variant).hash(), variant.warps, variant.stages, capability, triton.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _source(variant: Variant) -> Any:
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    return ASTSource(variant.kernel, variant.signature, constants, attributes)


def tool(name: str, *arguments: str) -> str:
    """What cuobjdump or nvdisasm answers."""
    import triton.backends.nvidia as nvidia

    command = [str(Path(nvidia.__file__).parent / "bin" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
