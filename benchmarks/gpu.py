"""One command for a machine with a GPU: tests, kernels against their peers, whole training steps, records.

    python -m benchmarks.gpu --out benchmarks/records/DATE-device

In this order, each part within its share of --minutes: the tests marked `gpu`; the ceilings of the card (a large copy, a large
matrix product); every kernel in every implementation beside every peer that is installed; whole steps, eager and compiled, on the
reference and on our kernels, those of DINO beside the usual forms of multi-crop. What did not fit into the time is listed as
not run. `record.json` holds everything, `record.md` the tables, `roofline.png` the picture.
"""

import importlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kernels
from benchmarks import multicrop, roofline, throughput
from benchmarks.kernels.case import CPU, Case, Machine, machine
from engine.core.durable import write_folder
from engine.core.errors import BadInput
from engine.core.flags import read
from kernels.choice import AVAILABLE

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Test and time everything on this machine's GPU, and write a record."""

    out: str = ""
    """The record's folder; empty: benchmarks/records/DATE-device. An earlier record there is replaced."""
    minutes: float = 9.0
    """The time it may take; what does not fit is listed as not run."""
    ops: tuple[str, ...] = ()
    """Only these kernels; empty: all."""
    tests: bool = True
    """Run the tests marked gpu."""
    steps: bool = True
    """Time whole training steps."""
    cpu: bool = False
    """Small cases on the CPU, without a GPU: shows that the command works, its figures say nothing about a GPU."""


@dataclass
class Budget:
    """Wall-clock time: what may still be started."""

    ends: float

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()


def milliseconds(call: Callable[[], Any], on_gpu: bool, seconds: float = 0.15) -> list[float]:
    """Times of single calls; on a GPU by events, the L2 cache overwritten before each call, so that it reads memory."""
    call()
    if not on_gpu:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(5, min(100, math.ceil(seconds / max(time.perf_counter() - start, 1e-5))))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in marks:
        flush.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in marks)


def median(values: list[float]) -> float:
    return values[len(values) // 2]


def ceilings(at: Machine) -> dict[str, float]:
    """Bytes per second of a copy (read and written), and operations per second of a matrix product, on random data."""
    on_gpu = at.device == "cuda"
    source = at.randn(2**30 if on_gpu else 2**22)
    target = torch.empty_like(source)
    copy = median(milliseconds(lambda: target.copy_(source), on_gpu))
    side = 8192 if on_gpu else 1024
    a, b = at.randn(side, side), at.randn(side, side)
    product = median(milliseconds(lambda: a @ b, on_gpu))
    return {
        "bytes_per_second": 2e3 * source.numel() * source.element_size() / copy,
        "flops_per_second": 2e3 * side**3 / product,
    }


def measure(case: Case, ceiling: dict[str, float], on_gpu: bool) -> dict[str, Any]:
    """Every form of a case; a peer that fails says why in its place, an implementation of ours fails the record."""
    floor = 1e3 * case.cost.floor_seconds(**ceiling)
    forms: dict[str, dict[str, Any]] = {}
    for name, form in case.forms.items():
        torch.manual_seed(0)
        try:
            call = form(*case.inputs())
            times = milliseconds(call, on_gpu)
        except Exception as error:
            forms[name] = {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        else:
            forms[name] = {
                "ms": median(times), "ms_best": times[0], "ms_worst": times[-1], "runs": len(times),
                "gigabytes_per_second": 1e-6 * case.cost.bytes / median(times), "share_of_floor": floor / median(times),
            }  # fmt: skip
        finally:
            call = None
            kernels.use("auto")
            if on_gpu:
                torch.cuda.empty_cache()
    peers = {name: found["ms"] for name, found in forms.items() if name not in case.ours and "ms" in found}
    best = min(peers, key=peers.get) if peers else None
    for found in forms.values():
        if best and "ms" in found:
            found["speed_against_best_peer"] = peers[best] / found["ms"]
    return {
        "op": case.op, "case": case.name, "bytes": case.cost.bytes, "flops": case.cost.flops, "floor_ms": floor,
        "best_peer": best, "ours": list(case.ours), "forms": forms,
    }  # fmt: skip


def cases(at: Machine, ops: tuple[str, ...]) -> Iterator[Case]:
    for op in ops:
        yield from importlib.import_module(f"benchmarks.kernels.bench_{op}").cases(at)


def run_tests(budget: Budget) -> dict[str, Any]:
    """The tests marked gpu, in a process of their own; what they printed last is kept."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    start = time.monotonic()
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1, budget.left / 2)
        )
        output, status = result.stdout + result.stderr, result.returncode
    except subprocess.TimeoutExpired as error:
        output, status = (error.stdout or b"").decode(errors="replace"), None
    ending = output.strip().splitlines()[-1] if output.strip() else ""
    return {
        "command": "python -m pytest -m gpu", "status": status, "summary": ending, "output": output[-20000:],
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A measurement of whole steps with one choice of kernels, and the seconds that must be left to begin it."""

    name: str
    implementation: str
    seconds: float
    measure: Callable[[], dict]


def planned_steps(at: Machine) -> Iterator[Planned]:
    """MAE, multi-crop DINO in its forms, two-view tuning and, on a GPU, RelViT: on the reference and on each of our
    implementations."""
    on_gpu = at.device == "cuda"
    model, batch = ("vit_large_patch16_224", 256) if on_gpu else ("vit_tiny_patch16_224", 2)
    own = sorted({one for exist in AVAILABLE.values() for one in exist} - {"reference"}) if on_gpu else []
    for method in ("mae", "dino", "maect", *(("relvit",) if on_gpu else ())):
        for compiles in (False, True):
            for implementation in ("reference", *own):
                name = f"{method} {model}, {'compiled' if compiles else 'eager'}, kernels: {implementation}"
                common = {
                    "model": model,
                    "compile": compiles,
                    "device": at.device,
                    "rounds": 3,
                    "steps": 2 if on_gpu else 1,
                }
                if method != "dino":
                    peer = method == "mae" and implementation == "reference"
                    options = throughput.Options(method=method, batch_size=batch, peer=peer, **common)
                    yield Planned(name, implementation, 90 if on_gpu else 20, partial(throughput.measure, options))
                elif compiles == on_gpu:
                    # lightly's form takes minutes to compile: `benchmarks.multicrop` has it
                    forms = (multicrop.OURS, multicrop.USUAL, *(("padded",) if implementation == "reference" else ()))
                    sizes = {"batch_size": 32} if on_gpu else {"batch_size": 2, "prototypes": 1024, "memory": False}
                    options = multicrop.Options(forms=forms, **sizes, **common)
                    yield Planned(name, implementation, 150 if on_gpu else 40, partial(multicrop.measure, options))


def whole_steps(at: Machine, budget: Budget, say: Callable[[str], None]) -> tuple[list[dict], list[str]]:
    """The planned steps that fit into the time, and the names of those that do not."""
    found, left_out = [], []
    for planned in planned_steps(at):
        if budget.left < planned.seconds:
            left_out.append(planned.name)
            continue
        try:
            for op, exist in AVAILABLE.items():
                kernels.use(planned.implementation if planned.implementation in exist else "reference", op)
            record = planned.measure()
        except Exception as error:
            record = {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
        finally:
            kernels.use("auto")
            torch.compiler.reset()
        found.append({"name": planned.name} | record)
        say(f"{planned.name}: {_speed(record)}")
    return found, left_out


def profile(at: Machine) -> list[dict[str, Any]]:
    """Where the time of an MAE step goes: the twenty most expensive operations on the device."""
    model, batch = ("vit_large_patch16_224", 256) if at.device == "cuda" else ("vit_tiny_patch16_224", 2)
    options = throughput.Options(method="mae", model=model, batch_size=batch, device=at.device)
    step, _ = throughput.ours(options, torch.device(at.device), "bf16" if at.device == "cuda" else "fp32")
    for _ in range(3):
        step()
    with torch.profiler.profile() as seen:
        for _ in range(3):
            step()
        if at.device == "cuda":
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if at.device == "cuda" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, attribute))
    total = sum(getattr(row, attribute) for row in rows) or 1.0
    return [
        {"operation": row.key[:120], "share": getattr(row, attribute) / total, "calls": row.count} for row in rows[:20]
    ]


def _speed(record: dict) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    parts = []
    for name, found in record["median"].items():
        part = f"{name} {found['images_per_second']:,.1f} images/s, {found['share_of_peak']:.1%} of the matrix product"
        if "ratio" in found and name != record["base"]:
            part += f", {found['ratio']:.2f}x {record['base']}"
        if name in record.get("peak_memory", {}):
            part += f", {record['peak_memory'][name] / 2**30:.1f} GiB"
        parts.append(part)
    return "; ".join(parts + [f"{name} left out: {why}" for name, why in record.get("left_out", {}).items()])


def tables(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    lines = [f"# {record['device']}, {record['date']}", "", f"torch {record['torch']}, {record['dtype']}.", ""]
    if record["ceilings"]:
        lines += [
            f"Ceilings measured: copy {record['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s, "
            f"matrix product {record['ceilings']['flops_per_second'] / 1e12:.1f} TFLOP/s.", "",
        ]  # fmt: skip
    if record["tests"]:
        lines += [f"Tests (`{record['tests']['command']}`): {record['tests']['summary']}", ""]
    lines += [
        "| op | case | form | ms | GB/s | floor / time | best peer / this |", "|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in record["kernels"]:
        for name, found in row["forms"].items():
            label = f"**{name}**" if name in row["ours"] else name
            if "failed" in found:
                cells = (f"does not run: {found['failed']}".replace("|", "/"), "", "", "")
            else:
                ratio = found.get("speed_against_best_peer")
                cells = (
                    f"{found['ms']:.3f}", f"{found['gigabytes_per_second']:,.0f}", f"{found['share_of_floor']:.0%}",
                    "" if ratio is None else f"{ratio:.2f}x",
                )  # fmt: skip
            lines.append(f"| {row['op']} | {row['case']} | {label} | {' | '.join(cells)} |")
    if record["steps"]:
        lines += ["", "## Whole steps", ""] + [f"- {step['name']}: {_speed(step)}" for step in record["steps"]]
    if record["profile"]:
        lines += ["", "## Where an MAE step spends its time", "", "| share | calls | operation |", "|---:|---:|---|"]
        lines += [f"| {row['share']:.1%} | {row['calls']} | `{row['operation']}` |" for row in record["profile"]]
    if record["not_run"]:
        lines += ["", "## Not run for want of time", ""] + [f"- {name}" for name in record["not_run"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    try:
        options = read(Options, sys.argv[1:] if arguments is None else arguments, prog="benchmarks.gpu")
        wrong = [op for op in options.ops if op not in AVAILABLE]
        if wrong:
            raise BadInput(f"--ops has no kernel {wrong[0]!r}; choose from {', '.join(AVAILABLE)}.")
        if options.minutes <= 0:
            raise BadInput(f"--minutes is {options.minutes:g}; it must be above 0.")
        if not options.cpu and not torch.cuda.is_available():
            raise BadInput(
                "benchmarks.gpu needs a CUDA device and torch sees none; --cpu tries the command without one."
            )
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    at = CPU if options.cpu else machine()
    device = torch.cuda.get_device_name() if at.device == "cuda" else f"CPU {platform.machine()}"
    date = datetime.now(UTC).date().isoformat()
    name = f"{date}-{''.join(c if c.isalnum() else '-' for c in device.lower())}"
    folder = Path(options.out or ROOT / "benchmarks" / "records" / name)
    budget, console = Budget(time.monotonic() + 60 * options.minutes), Console()
    record: dict[str, Any] = {
        "device": device, "date": date, "torch": torch.__version__, "dtype": str(at.dtype), "options": asdict(options),
        "available": {op: list(exist) for op, exist in AVAILABLE.items()},
        "tests": None, "ceilings": None, "kernels": [], "steps": [], "profile": [], "not_run": [],
    }  # fmt: skip

    def save() -> None:
        def fill(aside: Path) -> None:
            (aside / "record.json").write_text(json.dumps(record, indent=1))
            (aside / "record.md").write_text(tables(record))
            if record["kernels"]:
                roofline.draw(record, aside / "roofline.png")

        write_folder(folder, fill)

    if options.tests and at.device == "cuda":
        record["tests"] = run_tests(budget)
        console.print(f"tests: {record['tests']['summary']}")
        save()
    record["ceilings"] = ceilings(at)
    for case in cases(at, options.ops or tuple(AVAILABLE)):
        # whole steps keep a third of the time
        if budget.left < 20 * options.minutes * options.steps:
            record["not_run"].append(f"{case.op}: {case.name}")
            continue
        found = measure(case, record["ceilings"], at.device == "cuda")
        record["kernels"].append(found)
        shown = ", ".join(f"{n} {f['ms']:.3f}" if "ms" in f else f"{n} -" for n, f in found["forms"].items())
        console.print(f"{case.op}: {case.name}: floor {found['floor_ms']:.3f} ms; {shown}")
    save()
    if options.steps:
        record["steps"], left_out = whole_steps(at, budget, console.print)
        record["not_run"] += left_out
        if budget.left > 45:
            record["profile"] = profile(at)
        else:
            record["not_run"].append("profile of an MAE step")
    save()
    console.print(f"record: {folder}")
    ours_failed = [
        f"{row['op']} {name}: {row['forms'][name]['failed']}"
        for row in record["kernels"]
        for name in row["ours"]
        if "failed" in row["forms"][name]
    ]
    for sentence in ours_failed:
        console.print(f"failed: {sentence}")
    tests_bad = record["tests"] is not None and record["tests"]["status"] != 0
    return 1 if ours_failed or tests_bad else 0


if __name__ == "__main__":
    sys.exit(main())
