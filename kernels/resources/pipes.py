"""What a kernel's machine code asks of each pipe of a chip, counted without the chip: a lower bound on its time.

    python -m kernels.resources --pipes [--op packed_attention] [--rates RECORD.json] [--json]

compiles a form, takes its cubin apart, finds its loops, multiplies each instruction by how often the shape makes it run,
and divides by the rates of `kernels/resources/rates.py`. What comes out is modelled, not measured: the time that the busiest pipe
needs if it never waits. Latency, occupancy, bank conflicts, barriers and the second-level cache are left out; rows behind
the last of a sequence count as those before it.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kernels.compiled import tool
from kernels.resources.rates import Rates

PIPES = ("issue", "tensor", "special", "fp32", "integer", "shared")

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"\.L_x_\d+|0x[0-9a-f]+")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8|16)\b")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}

# opcodes by the pipe that runs them (Nsight Compute's names: FMA, ALU, XU, LSU); uniform ones, branches, barriers and
# constants take an issue slot and nothing else that is counted
_FP32 = re.compile(r"FFMA|FADD|FMUL|FSWZADD|HFMA2|HADD2|HMUL2")
_MULTIPLY = re.compile(r"IMAD|IDP")
_SPECIAL = re.compile(r"MUFU|F2F\b|F2I\b|I2F\b|FRND|POPC|FLO|BREV")
_INTEGER = re.compile(
    r"IADD|LOP|SHF|LEA|ISETP|SEL|IMNMX|MOV|PLOP|P2R|R2P|IABS|BMSK|SGXT|VIADD|VIMNMX|CS2R|VOTE|PRMT|F2FP|I2FP|I2I|"
    r"FMNMX|FSEL|FSET|FSETP|FCHK|HMNMX|HSET|LEPC|CSEL|VABSDIFF"
)
_MEMORY = re.compile(r"LDS|STS|LDG|STG|LDL|STL|LD\b|ST\b|RED|ATOM")
_SLOT_ONLY = re.compile(
    r"U(?!BLK|TMA)|S2R|S2UR|R2UR|LDC|BRA|EXIT|NOP|BSSY|BSYNC|CALL|RET|BREAK|YIELD|JMP|BAR|WARPSYNC|DEPBAR|LDGDEPBAR|"
    r"WARPGROUP|MEMBAR|FENCE|ERRBAR|SYNCS|CCTL|NANOSLEEP|ELECT|ACQBULK|REDUX|MATCH|BMOV|BPT|GETLMEMBASE|ARRIVES|KILL|PMTRIG"
)
_MATRIX = re.compile(r"HMMA\.(16816|1688)\b")
_WIDE_MATRIX = re.compile(r"HGMMA\.64x(\d+)x16\b")


class Instruction(NamedTuple):
    """`predicate` such as "@!P0", or empty."""

    predicate: str
    opcode: str
    operands: str


class Unmodelled(ValueError):
    """Why a form's time cannot be derived from its code, in a sentence."""


@dataclass
class Code:
    """A kernel as basic blocks in the order of their addresses: instructions, and the blocks that may follow each."""

    blocks: list[list[Instruction]]
    following: list[list[int]]


@dataclass
class Loop:
    """`head` is entered from outside; `body` holds all blocks, those of inner loops too; `outer` is the next loop around."""

    head: int
    body: set[int]
    outer: int | None = None


class Trips(NamedTuple):
    """How often a loop's body runs each time that the loop is entered, and the share of programs that enter it. One that
    `may_vanish` runs once, so that a compiler may leave no loop of it."""

    count: float
    share: float = 1.0
    may_vanish: bool = False


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, as nvdisasm writes it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tool("nvdisasm", "-c", "-ndf", file.name)


def parse(text: str) -> Code:
    """The basic blocks of one kernel in what nvdisasm or `cuobjdump -sass` writes; Unmodelled for a jump by a register."""
    instructions: list[Instruction] = []
    places: dict[str | int, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            places[int(found[1], 16)] = len(instructions)
            instructions.append(Instruction((found[2] or "").strip(), found[3], found[4]))
    leaders, jumps = {0}, {}
    for i, instruction in enumerate(instructions):
        name = instruction.opcode.split(".")[0]
        if name in ("BRX", "JMX", "JMP"):
            raise Unmodelled("its code jumps by a register")
        # taken where lanes are apart, which no kernel of ours makes them
        if instruction.opcode.startswith("BRA.DIV"):
            continue
        # a call without a return is how the assembler writes some jumps
        if name == "BRA" or instruction.opcode.startswith("CALL.REL"):
            target = _TARGET.search(instruction.operands)
            place = target and (int(target[0], 16) if target[0].startswith("0x") else target[0])
            if place not in places:
                raise Unmodelled(f"its code jumps to an unknown place: {instruction.operands}")
            jumps[i] = places[place]
        if i in jumps or name in ("EXIT", "RET"):
            leaders |= {i + 1, jumps.get(i, i + 1)}
    starts = sorted(place for place in leaders if place < len(instructions))
    number = {start: block for block, start in enumerate(starts)}
    blocks, following = [], []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        after = [number[jumps[end - 1]]] if end - 1 in jumps else []
        leaves = end - 1 in jumps or last.opcode.split(".")[0] in ("EXIT", "RET")
        # a second predicate may stand before the target
        conditional = last.predicate not in ("", "@PT", "@UPT") or "P" in last.operands.split("`")[0].split("0x")[0]
        if end in number and (not leaves or conditional):
            after.append(number[end])
        blocks.append(instructions[start:end])
        following.append(after)
    return Code(blocks, following)


def loops_of(code: Code) -> list[Loop]:
    """The loops that can be reached from the kernel's start, in the order of their addresses, outer ones first."""
    reached = _reachable(code.following, {0})
    before: list[list[int]] = [[] for _ in code.blocks]
    for block in reached:
        for after in code.following[block]:
            before[after].append(block)
    bodies: dict[int, set[int]] = {}
    above = _dominators(before, reached)
    for latch in sorted(reached):
        # a jump back to what every path to it has passed; others leave a loop's code that was laid out elsewhere
        for head in above[latch].intersection(code.following[latch]):
            bodies.setdefault(head, set()).update(_reachable(before, {latch}, stop=head))
    loops = [Loop(head, body) for head, body in sorted(bodies.items())]
    for i, loop in enumerate(loops):
        around = [j for j, other in enumerate(loops) if j != i and loop.body < other.body]
        loop.outer = min(around, key=lambda j: len(loops[j].body), default=None)
    return loops


def frequencies(code: Code, trips: Sequence[Trips]) -> list[float]:
    """How often each block runs in one program, where `trips` tells it of the loops, as `loops_of` orders them.

    A block outside of all loops runs in the programs whose loops it leads to or comes from; without loops all run once.
    Inside of a loop both sides of a branch count as run.

    Raises:
        Unmodelled: where the code has other loops than these.
    """
    loops = loops_of(code)
    expected = trips if len(trips) == len(loops) else [trip for trip in trips if not trip.may_vanish]
    if len(expected) != len(loops):
        raise Unmodelled(f"its code has {len(loops)} loops where its source has {len(trips)}")
    runs: dict[int, float] = {}
    for i in sorted(range(len(loops)), key=lambda i: -len(loops[i].body)):
        outer = loops[i].outer
        runs[i] = expected[i].share * expected[i].count * (1 if outer is None else runs[outer])
    following = code.following
    before: list[list[int]] = [[] for _ in following]
    for block, after in enumerate(following):
        for other in after:
            before[other].append(block)
    outermost = [i for i, loop in enumerate(loops) if loop.outer is None]
    near = {i: _reachable(following, {loops[i].head}) | _reachable(before, {loops[i].head}) for i in outermost}
    reached = _reachable(following, {0})
    result = []
    for block in range(len(code.blocks)):
        holding = [i for i, loop in enumerate(loops) if block in loop.body]
        if block not in reached:
            result.append(0.0)
        elif holding:
            result.append(runs[min(holding, key=lambda i: len(loops[i].body))])
        elif not loops:
            result.append(1.0)
        else:
            result.append(min(1.0, sum(expected[i].share for i in outermost if block in near[i])))
    return result


def _dominators(before: Sequence[Sequence[int]], reached: set[int]) -> dict[int, set[int]]:
    """Of each block that is reached, those that every path from block 0 to it passes, itself included."""
    above = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            passed = {block} | set.intersection(*(above[other] for other in before[block]))
            changed |= passed != above[block]
            above[block] = passed
    return above


def _reachable(following: Sequence[Sequence[int]], start: set[int], stop: int | None = None) -> set[int]:
    """The blocks that follow from `start`, itself included; beyond `stop` nothing is followed."""
    found, waiting = set(start), list(start)
    while waiting:
        block = waiting.pop()
        if block == stop:
            continue
        fresh = set(following[block]) - found
        found |= fresh
        waiting += fresh
    return found


def demand(code: Code, runs: Sequence[float]) -> Counter:
    """What a warp asks for: instructions by kind, "mma" and "wgmma" in multiply-adds, "shared" in bytes."""
    total: Counter = Counter()
    for block, times in zip(code.blocks, runs, strict=True):
        for instruction in block if times else ():
            for kind, amount in _asked_by(instruction).items():
                total[kind] += amount * times
    return total


def _asked_by(instruction: Instruction) -> dict[str, float]:
    predicate, opcode, operands = instruction
    name = opcode.split(".")[0]
    asked: dict[str, float] = {"issue": 1}
    if predicate == "@!PT":
        # never runs: it keeps a distance to what stands before
        return asked
    if matrix := _MATRIX.match(opcode):
        return asked | {"mma": 2048 if matrix[1] == "16816" else 1024}
    if matrix := _WIDE_MATRIX.match(opcode):
        # four warps together; the right operand always comes from shared memory, the left one where two are named there
        columns = int(matrix[1])
        left = 0 if re.match(r"R\d+, R\d+", operands) else 64 * 16 * 2
        return asked | {"wgmma": 64 * 16 * columns / 4, "shared": (columns * 16 * 2 + left) / 4}
    if name in ("LDSM", "STSM"):
        matrices = re.search(r"\.([124])$", opcode)
        return asked | {"shared": 128 * (int(matrices[1]) if matrices else 1)}
    if name == "SHFL":
        return asked | {"shared": 128}
    if _SLOT_ONLY.match(name):
        return asked
    if _MEMORY.match(name):
        width = _WIDTH.search(opcode)
        return asked | {"shared": 32 * (_BYTES[width[1]] if width else 4)}
    for kind, names in (("special", _SPECIAL), ("fp32", _FP32), ("multiply", _MULTIPLY)):
        if names.match(opcode):
            return asked | {kind: 1}
    if _INTEGER.match(name):
        return asked | {"integer": 1}
    raise Unmodelled(f"no pipe is known for its instruction {opcode}")


def milliseconds(asked: Counter, rates: Rates) -> dict[str, float]:
    """By pipe, how long a chip takes for what all warps ask for."""
    clocks = {
        "issue": asked["issue"] / rates.issue,
        "tensor": asked["mma"] / rates.mma + (asked["wgmma"] / rates.wgmma if asked["wgmma"] else 0),
        "special": asked["special"] / rates.special,
        "fp32": asked["fp32"] / rates.fp32 + asked["multiply"] / rates.multiply,
        "integer": asked["integer"] / rates.integer,
        "shared": asked["shared"] / rates.shared,
    }
    return {pipe: clocks[pipe] / rates.sms / rates.clock * 1e3 for pipe in PIPES}
