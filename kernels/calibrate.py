"""Prove and time the implementations of every op on this very device, and keep what was found.

    python -m kernels.calibrate --for mae vit_large_patch16_224 1024

Each implementation runs in a child process that may die: a crash, a hang or a GPU error marks that one alone. First it must be
right, values and gradients, at the sizes of the run (`kernels.calibration.jobs`); then those that are take turns under the clock.
`engine.train` does the same by itself at its first run on a GPU (--calibrate).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.calibration import circumstances, inputs, records
from kernels.calibration.calls import Call
from kernels.calibration.records import Key, Record
from kernels.calibration.verdict import INCUMBENT, Verdict, judge
from kernels.choice import AVAILABLE, CALLS, op_of
from kernels.guarded import Guard, Outcome

PROVE_SECONDS = 60.0  # after which an implementation counts as hanging, compilation included
TIME_SECONDS = 1.0  # of each call's implementations together, under the clock
JOBS = "kernels.calibration.jobs"
ALONE = "nothing else runs here"


def measure(
    calls: Iterable[Call],
    device: torch.device,
    *,
    seconds: float,
    compiles: bool = False,
    deterministic: bool = False,
    again: bool = False,
    say: Callable[[str], None] = print,
    home: Path | None = None,
    preload: tuple[str, ...] = (),
    prove_seconds: float = PROVE_SECONDS,
) -> Record:
    """Try what the user's record of this machine doesn't have yet, the largest calls first; the record is kept after each.

    Args:
        calls: what the run calls, see `kernels.calibration.calls`.
        device: where.
        seconds: in all; calls that don't fit into them stay untried, and on the reference.
        compiles: try what only a compiling run can use, too.
        deterministic: with torch's own kernels held to the same bits at every run.
        again: measure what is known, too.
        say: is told what goes on.
        home: of the record; None is the user's cache.
        preload: modules that the child imports beside its own.
        prove_seconds: one implementation's limit.
    """
    threads = torch.get_num_threads()
    record = Record.of(records.machine(device, threads, deterministic), home)
    ends = time.monotonic() + seconds
    wanted = sorted(calls, key=lambda call: -call.elements)
    new = [call for call in wanted if again or not _known(record, call, compiles)]
    if not new:
        return record
    where = {"device": str(device), "threads": threads, "deterministic": deterministic}
    with Guard(preload=(JOBS, *preload)) as guard:
        around = circumstances.look(guard, device)
        if around.obstacle:
            say(f"calibration: not now, {around.obstacle}; the next run tries again")
            return record
        if around.crowded:
            taken, total = (nbytes / 2**30 for nbytes in (around.total - around.free, around.total))
            say(
                f"calibration: {taken:.0f} of the card's {total:.0f} GiB are taken; the next run tries again what needs more"
            )
        for place, call in enumerate(new):
            left = ends - time.monotonic()
            if left <= 0:
                late = len(new) - place
                say(
                    f"calibration: {late} of {len(new)} calls did not fit into {seconds:.0f} s; they stay on the reference"
                )
                break
            trial = _trial(guard, call, where, compiles, min(prove_seconds, left))
            passes = any(around.passes(form.get("failure", "")) for form in trial["forms"].values())
            record.note(key_of(call), trial, lasts=not passes)
            record.save()
            verdict = judge(trial["forms"], compiles=compiles)
            say(f"calibration {place + 1} of {len(new)}: {line(call.name, call.shape_class, verdict)}")
    return record


def table(
    calls: Iterable[Call], found: Sequence[Record], *, compiles: bool, bit_stable: bool = False
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """What to freeze: by registered op and class of shapes the implementation, of the first record that has a trial of the call;
    and for people a line for each."""
    frozen: dict[str, dict[str, str]] = {}
    lines = []
    for call in calls:
        key = str(key_of(call))
        trial = next((record.trials[key] for record in found if key in record.trials), None)
        if trial is None:
            lines.append(f"{call.name} {call.shape_class}: {INCUMBENT}, for want of a record")
            continue
        verdict = judge(trial["forms"], compiles=compiles, bit_stable=bit_stable)
        lines.append(line(call.name, call.shape_class, verdict))
        if verdict.choice != INCUMBENT:
            frozen.setdefault(call.name, {})[call.shape_class] = verdict.choice
    return frozen, lines


def known(device: torch.device) -> dict[str, dict[str, str]]:
    """What is known of this machine, without a run that would say which calls it makes: the table of all trials of its record,
    and of shipped ones where that has none, for code that does not compile."""
    here = records.machine(device, torch.get_num_threads())
    trials = Record.shipped(here).trials | Record.of(here).trials
    frozen: dict[str, dict[str, str]] = {}
    for text, trial in trials.items():
        key = Key(*text.split(" | "))
        choice = judge(trial["forms"], compiles=False).choice
        if key.call in CALLS and key.sources == records.sources(op_of(key.call)) and choice != INCUMBENT:
            frozen.setdefault(key.call, {})[key.shape_class] = choice
    return frozen


def line(name: str, shape_class: str, verdict: Verdict) -> str:
    """A verdict in a line: op, shapes, choice, milliseconds, the next one's ratio, and why the others lost."""
    took = "" if verdict.ms is None else f", {verdict.ms:.3g} ms"
    ratio = "" if verdict.ratio is None else f", the next takes {verdict.ratio:.2f} times as long"
    reasons: dict[str, list[str]] = {}
    for one, why in verdict.why.items():
        if one != verdict.choice:
            reasons.setdefault(_brief(why), []).append(one)
    lost = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
    return f"{name} {shape_class}: {verdict.choice}{took}{ratio}{f' ({lost})' if lost else ''}"


def _brief(why: str) -> str:
    """A reason's first words; the record has all of them."""
    if "needs tensors on a GPU" in why:
        return "for GPUs"
    why = why.partition(";")[0].partition(": /")[0]
    return why if len(why) <= 90 else f"{why[:87]}..."


def key_of(call: Call) -> Key:
    """Under which a record has a call's trial."""
    return Key(call.name, call.shape_class, records.sources(call.op))


def _known(record: Record, call: Call, compiles: bool) -> bool:
    trial = record.trials.get(str(key_of(call)))
    return trial is not None and set(inputs.candidates(call.op, compiles)) <= trial["forms"].keys()


def _trial(guard: Guard, call: Call, where: dict[str, Any], compiles: bool, seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    what = {"name": call.name, "arguments": dict(call.arguments)} | where
    forms: dict[str, dict[str, Any]] = {}
    for name in sorted(inputs.candidates(call.op, compiles), key=lambda name: name == INCUMBENT):
        if name == INCUMBENT and all("failure" in form for form in forms.values()):
            # whatever it would take: a step of a large model's optimiser moves gigabytes
            forms[name] = {"failure": ALONE}
            break
        outcome = guard.run(f"{JOBS}:prove", what | {"implementation": name}, seconds)
        forms[name] = {"failure": _short(outcome)} if outcome.failure else dict(outcome.value)
    right = [name for name, form in forms.items() if "failure" not in form]
    if right:
        together = guard.run(f"{JOBS}:time", what | {"implementations": right, "seconds": TIME_SECONDS}, seconds)
        for name in right:
            # one that fails under the clock must not take the others' times with it
            outcome = together if not together.failure else guard.run(
                f"{JOBS}:time", what | {"implementations": [name], "seconds": TIME_SECONDS / len(right)}, seconds
            )  # fmt: skip
            forms[name] = {"failure": _short(outcome)} if outcome.failure else forms[name] | outcome.value[name]
    return {"shapes": call.shapes, "forms": forms, "seconds": round(time.monotonic() - began, 1)}


def _short(outcome: Outcome) -> str:
    """The reason; of what an implementation says itself, its words."""
    return outcome.failure.removeprefix("raised ValueError: ").removeprefix("raised WrongAnswer: ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.calibrate", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--for", dest="run", nargs=3, metavar=("METHOD", "MODEL", "BATCH"), default=("mae", "vit_large_patch16_224", "256"),
        help="the run whose calls are tried; BATCH is the images of a step on this device",
    )  # fmt: skip
    parser.add_argument("--ops", nargs="+", choices=AVAILABLE, default=list(AVAILABLE), help="only these")
    parser.add_argument("--minutes", type=float, default=2.0, help="in all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--compile", action="store_true", help="try what a compiling run may use, too")
    parser.add_argument("--again", action="store_true", help="measure what the record has already, too")
    flags = parser.parse_args(arguments)
    if flags.minutes <= 0:
        parser.error(f"--minutes is {flags.minutes:g}; it must be above 0")
    device = torch.device(flags.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    calls = [call for call in _listed(*flags.run, device, parser) if call.op in flags.ops]
    record = measure(calls, device, seconds=60 * flags.minutes, compiles=flags.compile, again=flags.again)
    _, lines = table(calls, [record], compiles=flags.compile)
    print("\n".join(lines))
    print(f"record: {record.path}")
    return 0


def _listed(method: str, model: str, batch: str, device: torch.device, parser: argparse.ArgumentParser) -> list[Call]:
    """The calls of a run, by the engine, which lies above the kernels: in a process of its own."""
    command = [sys.executable, "-m", "engine.training.calls", method, model, batch, device.type]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        parser.error(f"the calls of {method} with {model} cannot be listed")
    return [Call(**call) for call in json.loads(done.stdout)]


if __name__ == "__main__":
    sys.exit(main())
