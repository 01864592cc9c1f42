"""In a process on the device that computes nothing: what it wrote down, and what that says of a step."""

import gc
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from engine.null_device.device import ROOT
from engine.null_device.record import Event, recorded

WARM = 2  # steps until everything is compiled and allocated


@dataclass
class Report:
    """What was seen of a step: its figures once warm, and its faults."""

    figures: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    """Compiled until it was warm."""
    faults: list[str] = field(default_factory=list)


def examine(step: Callable[[int], object], spills: int = 0) -> Report:
    """Take steps, the first `WARM` to compile and allocate, the next counted, one more to see that nothing is compiled.
    So many spilled bytes a thread are accepted."""
    counters.clear()
    report = Report()
    try:
        with recorded() as warming:
            for number in range(WARM):
                step(number)
        report.graphs = counters["stats"]["unique_graphs"]
        report.faults += _of_kernels(warming, spills)
        gc.collect()  # what is freed when must not hang on when Python last looked for cycles
        gc.disable()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        with recorded() as events:
            step(WARM)
        memory = torch.cuda.memory_stats()
        report.figures = _figures(events) | {
            # as asked for: how far the allocator rounds up hangs on which of its blocks is free
            "allocated_bytes": memory["requested_bytes.all.allocated"] - before,
            "peak_bytes": memory["requested_bytes.all.peak"],
        }
        with recorded() as after:
            step(WARM + 1)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        report.faults.append(f"not one graph: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return report
    finally:
        gc.enable()
    again = counters["stats"]["unique_graphs"] - report.graphs
    loaded = {event.text for event in events + after if event.kind == "load"}
    if again or loaded:
        report.faults.append(f"compiled again when warm: {again} graphs, kernels {sorted(loaded)}")
    report.faults += _of_kernels(events + after, spills)
    waits = Counter(event.text for event in events if event.kind == "wait")
    if waits:
        report.faults.append(f"waits for the device: {dict(waits)}, {_place(step)}")
    return report


def faults_of_capture(events: list[Event]) -> list[str]:
    """Of a step that was captured: what a replay would not do again as it should, or a driver refuses."""
    bounds = [place for place, event in enumerate(events) if event.kind == "capture"]
    if len(bounds) != 2:
        return [f"captured {len(bounds) / 2:g} times"]
    inside = events[bounds[0] + 1 : bounds[1]]
    refused = [event.text for event in inside if event.kind == "refused_in_capture"]
    from_host = Counter(e.kind.removeprefix("captured_") for e in inside if e.kind in _WITH_HOST)
    # the allocator takes new memory for the graph, which happens once and not in the graph
    others = Counter(e.kind for e in inside if not e.kind.startswith(("captured_", "refused_in_capture", "malloc")))
    return (
        [f"refused while capturing: {', '.join(refused)}"] * bool(refused)
        + [f"between host and device in a graph: {dict(from_host)}"] * bool(from_host)
        + [f"not captured: {dict(others)}"] * bool(others)
    )


_WITH_HOST = ("captured_copy_to_device", "captured_copy_from_device", "captured_copy_on_host", "captured_host_function")


def _figures(events: list[Event]) -> dict[str, int]:
    """Launches, and bytes that are copied; all counted. cuBLAS's products are calls, whose launches nobody knows here."""
    kinds = Counter(event.kind for event in events)
    copies = [event for event in events if event.kind.startswith("copy_")]
    spoken = [event.a for event in events if event.kind == "collective"]
    moved = Counter()
    for event in copies:
        moved[event.kind, event.text] += event.a
    return {
        "launches": kinds["launch"],
        "products": kinds["product"],
        "product_flops": sum(2 * event.a * event.b * event.c for event in events if event.kind == "product"),
        "memsets": kinds["memset"],
        "copies_on_device": kinds["copy_on_device"],
        "bytes_copied_on_device": moved["copy_on_device", ""],
        "bytes_from_pinned": moved["copy_to_device", "pinned"],
        "bytes_from_pageable": moved["copy_to_device", "pageable"],
        "bytes_to_host": moved["copy_from_device", "pinned"] + moved["copy_from_device", "pageable"],
    } | ({"collectives": len(spoken), "bytes_of_collectives": sum(spoken)} if spoken else {})  # of several ranks


def _of_kernels(events: list[Event], spills: int) -> list[str]:
    spilling = {event.text: event.b for event in events if event.kind == "load" and event.b > spills}
    refused = sorted({event.text for event in events if event.kind == "refused"})
    return [f"spills registers, bytes a thread: {spilling}"] * bool(spilling) + [f"launches refused: {refused}"] * bool(
        refused
    )


def _place(step: Callable[[int], object]) -> str:
    """Where a step first waits, as torch tells: it knows of what goes through aten's operations."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(WARM + 2)
    except RuntimeError as error:
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename.startswith(f"{ROOT}/") and "site-packages" not in frame.filename
        ]
        return f"first at {Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}: {own[-1].line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "where torch does not look"
