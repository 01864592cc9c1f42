"""Which implementation of each op a run takes: asked for by name, frozen by the run itself, or proved on this very device; and
whether its steps are replayed from a CUDA graph, where that is left to a trial.

The order of say: --kernels or TESSERA_KERNELS, then what the run froze when it began (`kernels.json` in its folder), then the
user's record of this machine, then shipped records, then the reference. What no record knows is measured first, at the first run
on a GPU (--calibrate); a resumed run never measures.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kernels
from engine.core import dist
from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.core.json_text import parsed
from engine.training import graph_trials
from engine.training.calls import calls_of
from engine.training.parts import Parts
from kernels.calibrate import measure, table
from kernels.calibration.records import Record, machine
from kernels.choice import left_to_auto, usable

FILE = "kernels.json"
SECONDS = 90.0  # that calibration may take at the beginning of a run
Say = Callable[[str], None]


def choose(parts: Parts, out: Path | None, say: Say) -> None:
    """Freeze the table of this run, and decide which stages replay their steps; say how either came about.

    Args:
        parts: of the run.
        out: its folder, where the table is written, or read by a resumed run; None writes nothing.
        say: is told; it shows the first rank's words only.

    Raises:
        BadInput: ranks have different devices, or the resumed run's table can't be read.
    """
    train, ranks = parts.plan.train, parts.ranks
    devices = dist.union([_kind(ranks.device)])
    if len(devices) > 1:
        listed = "; ".join(" ".join(map(str, device)) for device in devices)
        raise BadInput(f"the processes run on different devices ({listed}), which may not share a run's kernels.")
    if train.resume:
        found = dist.from_first(lambda: _saved(out / FILE))
        if "failed" in found:
            raise BadInput(found["failed"])
        _go_on_with(found, ranks.device, parts.compiles, say)
        parts.tried = found["graphs"]
        return
    found = dist.from_first(lambda: _found(parts, say))
    kernels.freeze(found["table"], ranks.device.type)
    parts.tried = found["graphs"] = graph_trials.decide(parts, found["table"], say)
    if ranks.first and out is not None:
        write_file(out / FILE, lambda aside: aside.write_text(json.dumps(found, indent=1)))


def _found(parts: Parts, say: Say) -> dict[str, Any]:
    """The table, lines for people, and the machine it is for; measured where that is wanted and not known."""
    train, device = parts.plan.train, parts.ranks.device
    here = machine(device, torch.get_num_threads(), train.deterministic)
    if not left_to_auto():
        return {"machine": here, "table": {}, "lines": []}
    records = [Record.of(here), Record.shipped(here)]
    measures = train.calibrate == "again" or (train.calibrate == "auto" and device.type == "cuda")
    if not measures and not any(record.trials for record in records):
        return {"machine": here, "table": {}, "lines": []}
    classes = len(parts.train_images.classes or ()) or 1
    calls = [
        call
        for call in calls_of(parts.plan, device, parts.ranks.world, parts.precision, classes, parts.stages)
        if call.op in left_to_auto()
    ]
    how = {"compiles": parts.compiles}
    if measures:
        again = train.calibrate == "again"
        known = "known ones too" if again else "known ones are not measured again"
        say(f"calibration: {len(calls)} calls on {here['device']}, at most {SECONDS:.0f} s; {known}")
        records[0] = measure(
            calls, device, seconds=SECONDS, again=again, say=say, deterministic=train.deterministic, **how
        )
    frozen, lines = table(calls, records, bit_stable=train.deterministic, **how)
    return {"machine": here, "table": frozen, "lines": lines}


def _saved(path: Path) -> dict[str, Any]:
    if not path.exists():  # the run began before there were tables
        return {"table": {}, "machine": None, "graphs": {}}
    try:
        found = parsed(path.read_text())
        return {"table": found["table"], "machine": found["machine"], "graphs": dict(found.get("graphs", {}))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"failed": f"{path} is not a table of kernels that this version wrote ({error}); --resume needs it."}


def _go_on_with(found: dict[str, Any], device: torch.device, compiles: bool, say: Say) -> None:
    """Freeze the run's table as far as it can run here; say what differs from when it began."""
    gone = {}
    frozen: dict[str, dict[str, str]] = {}
    for call, by_class in found["table"].items():
        for shape_class, implementation in by_class.items():
            why = usable(call, implementation, device)
            if not why and implementation == "plain" and not compiles:
                why = "it is for runs that compile"
            if why:
                gone[f"{call} {shape_class}"] = f"{implementation} ({why})"
            else:
                frozen.setdefault(call, {})[shape_class] = implementation
    kernels.freeze(frozen, device.type)
    here = _kind(device)[0]
    if found["machine"] and found["machine"]["device"] != here:
        say(
            f"kernels: chosen on {found['machine']['device']} when the run began, kept on {here}; nothing is measured again"
        )
    for what, it in gone.items():
        say(
            f"kernels: {what} was {it} when the run began, now the reference: from here on bits may differ from an unbroken run"
        )


def _kind(device: torch.device) -> tuple[str, str]:
    here = machine(device, 0)
    return here["device"], here["capability"]
