"""Candidates timed in turn, round by round, beside a large matrix product: what the benchmarks of whole steps share.

A machine whose speed drifts slows all candidates of a round alike, so ratios are taken within a round, and the median is shown.
"""

import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import kernels
from engine.core import dist
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.training.precision import AUTOCAST, automatic

Step = Callable[[], Any]
Make = Callable[[Any, torch.device, str], Step]  # of options, device and precision


@dataclass(frozen=True)
class Recorded:
    """What every benchmark of rounds is asked."""

    rounds: int = 5
    """Rounds; each times every candidate once."""
    out: str = ""
    """A JSON file for the record; empty writes none."""


@dataclass(frozen=True)
class Options(Recorded):
    """What every benchmark of whole steps is asked."""

    model: str = "vit_small_patch16_224"
    """A timm ViT name."""
    batch_size: int = 32
    """Images of a step."""
    compile: bool = True
    """Compile, ours and the peers."""
    precision: str = "auto"
    """fp32 or bf16; auto is bf16 on GPUs and fp32 on CPUs."""
    device: str = "auto"
    """auto, cpu or cuda."""
    steps: int = 3
    """Steps of a candidate in a round."""


AnyOptions = TypeVar("AnyOptions", bound=Recorded)


def machine(options: Options) -> tuple[torch.device, str]:
    """The device, and the precision on it.

    Raises:
        BadInput: a value that cannot be meant.
    """
    check(options, "batch_size", "rounds", "steps")
    if options.precision not in ("auto", *AUTOCAST):
        raise BadInput(f"--precision is {options.precision!r}; choose auto, {', '.join(AUTOCAST)}.")
    device = dist.start(options.device).device
    return device, automatic(device) if options.precision == "auto" else options.precision


def check(options: Recorded, *counts: str) -> None:
    """Raise BadInput where one of these is no count, or the record can't be written."""
    for name in counts:
        if getattr(options, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be a whole number from 1.")
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise BadInput(f"--out is {options.out!r}, but there is no folder {str(Path(options.out).parent)!r}.")
    if options.out and Path(options.out).is_dir():
        raise BadInput(f"--out is {options.out!r}, which is a folder; give a file in it, such as record.json.")


def seconds(run: Step, times: int, device: torch.device) -> float:
    """Of one call, on average over `times` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def matrix_product(device: torch.device, precision: str) -> tuple[Step, float]:
    """A large square product, and its operations: what the peak is taken from."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = AUTOCAST[precision] or torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: torch.mm(a, b), 2.0 * side**3


def prepared(
    makes: Mapping[str, Make], options: Options, device: torch.device, precision: str, ours: str, memory: bool
) -> tuple[dict[str, Step], dict[str, float], dict[str, int], dict[str, str]]:
    """Candidates that have made their first step.

    Args:
        makes: how each is made; functions of modules, which another process can be told.
        ours: the one whose failure is the benchmark's own.
        memory: whether peak memory is measured: that of a step, above what there was before the candidate was built. On GPUs it
            is what torch allocated; on CPUs the largest resident set of a process of the candidate's own.

    Returns:
        By candidate: the step, the seconds of its first call, peak memory in bytes, and why one was left out.
    """
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, make in makes.items():
        try:
            if device.type == "cuda" or not memory:
                steps[name], first[name], peaks[name] = _build(make, options, device, precision)
            else:
                first[name], peaks[name] = _alone(make, options, device, precision)
                steps[name] = make(options, device, precision)
                seconds(steps[name], 1, device)
        except Exception as error:
            if name == ours:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            for found in (steps, first, peaks):
                found.pop(name, None)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return steps, first, peaks, left_out


def _build(make: Make, options: Options, device: torch.device, precision: str) -> tuple[Step, float, int]:
    """A candidate's step, the seconds of its first call, and the bytes it needs."""
    before = _memory(device, "VmRSS")
    step = make(options, device, precision)
    first = seconds(step, 1, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds(step, 1, device)
    return step, first, _memory(device, "VmHWM") - before


def _alone(make: Make, options: Options, device: torch.device, precision: str) -> tuple[float, int]:
    """First step and memory of a candidate in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_this_process, make, options, device, precision).result()


def _in_this_process(make: Make, options: Options, device: torch.device, precision: str) -> tuple[float, int]:
    machine(options)
    if options.compile:  # so that the compiler itself counts as there before
        tiny = torch.compile(torch.nn.Linear(8, 8))
        tiny(torch.ones(8, 8)).sum().backward()
    return _build(make, options, device, precision)[1:]


def _memory(device: torch.device, line: str) -> int:
    """Bytes: on a GPU what torch has allocated, now or at most; else a line of this process's status, VmRSS (now) or VmHWM (at
    most)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() if line == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(found for found in lines if found.startswith(line)).split()[1])


def in_turn(
    candidates: dict[str, Step], options: Options, device: torch.device, precision: str, flops: float, base: str
) -> dict[str, Any]:
    """Time candidates that have made their first step.

    Args:
        flops: operations per image that a step must make; one number for all, so what a candidate makes beyond counts as lost.
        base: the candidate that ratios are taken to; where it is none of them, there are no ratios.

    Returns:
        The record: the machine, every round, and medians over rounds. A round of a candidate has images_per_second,
        share_of_peak, peak (operations per second of the matrix product in this round) and ratio (to `base`).
    """
    product, product_flops = matrix_product(device, precision)
    for run in (*candidates.values(), product):
        seconds(run, 1, device)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        before = product_flops / seconds(product, 3, device)
        rates = {name: options.batch_size / seconds(run, options.steps, device) for name, run in candidates.items()}
        peak = max(before, product_flops / seconds(product, 3, device))
        for name, rate in rates.items():
            one = {"images_per_second": rate, "share_of_peak": rate * flops / peak, "peak": peak}
            rounds[name].append(one | ({"ratio": rate / rates[base]} if base in rates else {}))
    about = {"kernels": kernels.describe(device).splitlines(), "flops_per_image": flops, "base": base}
    return recorded(options, device, precision, rounds, about)


def recorded(
    options: Recorded,
    device: torch.device,
    precision: str,
    rounds: dict[str, list[dict[str, float]]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The record of rounds, by what was timed: the machine, what else there is to say of them, every round, and medians."""
    return {
        "options": asdict(options),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,
        **about,
        "rounds": rounds,
        "median": {
            name: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in rounds.items()
        },
    }


def show(record: dict[str, Any], title: str) -> None:
    """The medians as a table. Shows "first_step_seconds" and "peak_memory" (bytes), by candidate, where the record has them."""
    options = record["options"]
    table = Table(title=f"{title} {options['model']}, batch {options['batch_size']}, {record['precision']}, "
                        f"{record['threads']} threads, medians of {options['rounds']} rounds")  # fmt: skip
    further = {
        "first step (s)": {name: f"{x:.1f}" for name, x in record.get("first_step_seconds", {}).items()},
        "peak memory (GiB)": {name: f"{x / 2**30:.2f}" for name, x in record.get("peak_memory", {}).items()},
    }
    further = {heading: cells for heading, cells in further.items() if cells}
    base = record["base"] if len(record["median"]) > 1 and record["base"] in record["median"] else ""
    headings = ("step", "images/s", "TFLOP/s", "share of the matrix product's", *([f"against {base}"] if base else []))
    for heading in (*headings, *further):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, found in record["median"].items():
        tflops = found["images_per_second"] * record["flops_per_image"] / 1e12
        cells = [f"{found['images_per_second']:,.1f}", f"{tflops:.3f}", f"{found['share_of_peak']:.1%}"]
        cells += [f"{found['ratio']:.2f}x"] if base else []
        table.add_row(name, *cells, *(column.get(name, "") for column in further.values()))
    Console().print(table)


def command(
    kind: type[AnyOptions],
    measure: Callable[[AnyOptions], dict[str, Any]],
    show_record: Callable[[dict[str, Any]], None],
    arguments: Sequence[str] | None,
    prog: str,
) -> int:
    """A benchmark as a command: flags, measurement, table, JSON. Returns the exit status."""
    try:
        options = read(kind, sys.argv[1:] if arguments is None else arguments, prog=prog)
        record = measure(options)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_record(record)
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1))
    return 0
