"""What every Triton kernel takes on a chip that need not be there: registers, spills, shared memory, matrix instructions.

    python -m kernels.resources [--op packed_attention] [--distinct | --pipes] [--json]

compiles every variant that `kernels/OP/triton.py` launches, for sm_80, sm_86 and sm_90, and prints the table; with --distinct,
one of those that differ in nothing but fp16 for bf16; with --known, those only of which the table given has no equal code, and
one in 16 of the others, to prove the table. With --pipes it prints how busy each pipe of a chip would be instead,
and the busiest one's time over the floor (`kernels.resources.pipes`). No GPU is needed: Triton's own compiler and NVIDIA's object
tools come with it.
"""

import argparse
import importlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.choice import AVAILABLE
from kernels.compiled import SHARED_LIMIT, identity
from kernels.resources.forms import stored, table, worsened
from kernels.resources.pipes import PIPES
from kernels.resources.rates import CHIPS, read
from kernels.resources.registers import asked_for, distinct, faults, measure, of_known


def main(arguments: list[str] | None = None) -> int:
    ops = [op for op, exist in AVAILABLE.items() if "triton" in exist]
    parser = argparse.ArgumentParser(prog="python -m kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--op", choices=ops, nargs="*", default=ops, help="ops to compile (default: all)")
    parser.add_argument("--distinct", action="store_true", help="compile fp16 only where a form has no like in bf16")
    parser.add_argument("--pipes", action="store_true", help="model how busy each pipe of a chip is instead")
    parser.add_argument(
        "--chip", choices=list(CHIPS), nargs="*", default=list(CHIPS), help="with --pipes (default: all)"
    )
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="with --pipes: forms whose OP: FORM: SHAPE has it"
    )
    parser.add_argument(
        "--against", type=Path, metavar="TABLE.json", help="with --pipes: fail where a form became worse"
    )
    parser.add_argument(
        "--store", type=Path, metavar="TABLE.json", help="write the table to compare with, or to know later"
    )
    parser.add_argument(
        "--known", type=Path, metavar="TABLE.json", help="what an earlier --store found of equal code is taken from it"
    )
    parser.add_argument(
        "--rates", type=Path, metavar="RECORD.json", help="with --pipes: a calibration, see kernels/resources/rates.py"
    )
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects instead of the table")
    asked = parser.parse_args(arguments)
    # interpreted functions cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    if asked.pipes:
        return _print_pipes(asked)
    chosen = distinct if asked.distinct else list
    jobs = [
        (op, variant, capability)
        for op in asked.op
        for capability in SHARED_LIMIT
        for variant in chosen(importlib.import_module(f"kernels.{op}.triton").variants(capability))
    ]
    # what sm_86 shares with sm_80 is the same code, held against less shared memory
    known = {asked_for(variant) for _, variant, capability in jobs if capability == 80}
    targets = [80 if c == 86 and asked_for(variant) in known else c for _, variant, c in jobs]
    once = {(asked_for(v), target): (v, target) for (_, v, _), target in zip(jobs, targets, strict=True)}
    try:
        of_equal_code = json.loads(asked.known.read_text()) if asked.known else {}
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(
            zip(once, pool.map(lambda job: of_known(*job, of_equal_code) or measure(*job), once.values()), strict=True)
        )
    of_code = {identity(*job): list(found[name]) for name, job in once.items()}
    if asked.store:
        lines = (f'"{name}": {json.dumps(resources)}' for name, resources in sorted(of_code.items()))
        asked.store.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    wrong = [name for name, resources in of_code.items() if of_equal_code.get(name, resources) != resources]
    if wrong:
        print(f"{asked.known} says otherwise of {len(wrong)} variants: make it again by --store", file=sys.stderr)
        return 1
    measured = [found[asked_for(v), target] for (_, v, _), target in zip(jobs, targets, strict=True)]
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


def _print_pipes(asked: argparse.Namespace) -> int:
    try:
        rates = read(asked.rates)
        before = json.loads(asked.against.read_text()) if asked.against else {}
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = table(asked.op, [rates[name] for name in asked.chip], os.cpu_count(), asked.only)
    if asked.store:
        asked.store.write_text(json.dumps(stored(rows), indent=1) + "\n")
    worse = worsened(rows, before) if asked.against else []
    for sentence in worse:
        print(sentence, file=sys.stderr)
    if asked.json:
        print(json.dumps(rows))
        return 1 if worse else 0
    for name in asked.chip:
        print(f"{name}, modelled; rates: {rates[name].origin}")
        print(
            f"{'op':<19} {'form':<22} {'shape':<30} {'floor ms':>8} {'ratio':>6}  {'largest':<8}",
            *(f"{p:>7}" for p in PIPES),
        )
        for row in rows:
            if row["chip"] != name:
                continue
            title = f"{row['op']:<19} {row['form']:<22} {row['shape']:<30}"
            if "not_modelled" in row:
                print(f"{title} not modelled: {row['not_modelled']}")
                continue
            largest = row["largest"] if row["ratio"] > 1 else "dram"
            times = (f"{row['pipes'][pipe]:7.2f}" for pipe in PIPES)
            print(f"{title} {row['floor']:8.2f} {row['ratio']:6.2f}  {largest:<8}", *times)
        print()
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
