"""One command for a machine with a GPU: checks, kernels against their peers, whole training steps, tests, records.

    python -m benchmarks.gpu --out benchmarks/records/DATE-device

Every check, every form of every case in one direction and every step is a job in a guarded child process (`kernels.guarded`):
what crashes, hangs or loses the GPU costs itself alone, and is told in its place. In this order, each part until its share of
--minutes is over:

1. values and gradients of all implementations, at the sizes that are timed, against float64, for four minutes at most (--smoke
   ends here);
2. the ceilings of the card (a large copy, a large matrix product), then all implementations of all ops, timed, and the peers that
   need no compiler; those ops first from which most is expected;
3. whole steps, compiled, replayed from CUDA graphs and eager, on the reference and on our kernels, those of DINO beside the usual
   forms of multi-crop;
4. the tests marked `gpu`; the peers that torch compiles.

What failed its check is not timed. Every result is appended to `record.jsonl` at once; at the end, or by --fold DIR from what a
stopped command left, `record.json` holds everything, `record.md` the tables, `roofline.png` the picture. The kernels' part needs
torch and Triton only.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import whole_steps
from benchmarks.kernels.case import CPU, GPU, Case, Machine, cases
from benchmarks.record import Record, fold, speed
from engine.core.errors import BadInput
from kernels.choice import AVAILABLE
from kernels.guarded import Guard, Outcome

ROOT = Path(__file__).parents[1]
MODULE = "benchmarks.kernels.bench_{op}"
JOBS = "benchmarks.kernels.jobs"
WORTH = ("soft_cross_entropy", "sinkhorn", "packed_attention")  # ops from which most is expected, in this order
SMOKE_SECONDS = 240
# by part: the share of the time after which none of it begins any more
UNTIL = {
    "facts": 1.0, "check": 0.4, "ceilings": 1.0, "ours": 0.6, "peers": 0.68, "step": 0.84, "profile": 0.86, "tests": 0.95,
    "compiled": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Check and time everything on this machine's GPU, and write a record."""

    out: str = field(default="", metadata={"help": "the record's folder, an earlier record there is replaced; default: "
                                                   "benchmarks/records/DATE-device"})  # fmt: skip
    minutes: float = field(
        default=9.0, metadata={"help": "the time it may take; what does not fit is listed as not run"}
    )
    ops: tuple[str, ...] = field(default=(), metadata={"help": "only these kernels; default: all"})
    smoke: bool = field(default=False, metadata={"help": "only check values and gradients, at most four minutes"})
    tests: bool = field(default=True, metadata={"help": "run the tests marked gpu"})
    steps: bool = field(default=True, metadata={"help": "time whole training steps"})
    cpu: bool = field(default=False, metadata={"help": "small cases on the CPU, without a GPU: shows that the command works, its "
                                                       "figures say nothing about a GPU"})  # fmt: skip
    fold: str = field(default="", metadata={"help": "make the tables of the record in this folder, and nothing else"})


@dataclass(frozen=True)
class Job:
    """A call of the guarded child."""

    part: str
    name: str
    function: str
    arguments: dict[str, Any]
    seconds: float
    """It is stopped after so many."""
    about: dict[str, Any] = field(default_factory=dict)
    """What its line of the record holds beside the outcome."""
    least: float = 0.0
    """The seconds that must be left to begin it."""


def jobs(at: Machine, options: Options) -> Iterator[Job]:
    """All that is to be done, in order."""
    yield Job("facts", "facts", f"{JOBS}:facts", {"device": at.device}, 120)
    listed = list(_cases(at, options.ops))
    yield from _checks(listed, at)
    if options.smoke:
        return
    yield Job("ceilings", "ceilings", f"{JOBS}:ceilings", {"device": at.device}, 120)
    for part in ("ours", "peers"):
        for module, case in listed:
            yield from _times(part, module, case, at)
    if options.steps:
        for one in whole_steps.planned(at.device):
            arguments = {"implementation": one.implementation, "benchmark": one.benchmark, "options": one.options}
            yield Job("step", one.name, "benchmarks.whole_steps:measure", arguments, 300, least=one.seconds)
        yield Job(
            "profile", "profile of an MAE step", "benchmarks.whole_steps:profile", {"device": at.device}, 120, least=30
        )
    if options.tests and at.device == "cuda":
        yield Job("tests", "tests marked gpu", f"{JOBS}:run_tests", {}, 600)
    for module, case in listed:
        yield from _times("compiled", module, case, at)


def _cases(at: Machine, ops: Sequence[str]) -> Iterator[tuple[str, Case]]:
    chosen = ops or AVAILABLE
    for op in (*(op for op in WORTH if op in chosen), *(op for op in chosen if op not in WORTH)):
        module = MODULE.format(op=op)
        for case in cases(module, at):
            yield module, case


def _checks(listed: Sequence[tuple[str, Case]], at: Machine) -> Iterator[Job]:
    """One case of every op before the others, the reference last: the time for checks is short."""
    seen: set[str] = set()
    found: list[tuple[bool, bool, Job]] = []
    for module, case in listed:
        for form in case.ours:
            about = {"op": case.op, "case": case.name, "form": form, "ours": True}
            arguments = {"module": module, "name": case.name, "form": form, "device": at.device}
            job = Job("check", f"check {case.op}: {case.name}: {form}", f"{JOBS}:check", arguments, 60, about)
            found.append((form == "reference", case.op in seen, job))
        seen.add(case.op)
    yield from (job for *_, job in sorted(found, key=lambda one: one[:2]))


def _times(part: str, module: str, case: Case, at: Machine) -> Iterator[Job]:
    """Those of one part: our forms, peers, peers that are compiled."""
    ours = case.ours
    compiled = {form for form in case.theirs if form.startswith("compiled")}
    forms = {"ours": ours, "peers": [form for form in case.theirs if form not in compiled], "compiled": compiled}[part]
    for form in sorted(forms) if part == "compiled" else forms:
        for direction, cost in zip(case.directions, case.costs, strict=True):
            about = {
                "op": case.op, "case": case.name, "form": form, "direction": direction, "ours": form in ours,
                "bytes": cost.bytes, "flops": cost.flops,
            }  # fmt: skip
            arguments = {"module": module, "name": case.name, "form": form, "direction": direction, "device": at.device}
            limit = 120 if "compiled" in form else 60
            yield Job(
                part, f"time {case.op}: {case.name}, {direction}: {form}", f"{JOBS}:time", arguments, limit, about
            )


def work(planned: Sequence[Job], record: Record, seconds: float, smoke: bool) -> None:
    """Do the jobs that fit into the time, and append what became of each to the record."""
    start = time.monotonic()
    wrong: dict[tuple, str] = {}
    with Guard(preload=("torch", JOBS)) as guard, Guard() as bare:
        for job in planned:
            left = start + seconds - time.monotonic()
            until = start + seconds * (1.0 if smoke else UNTIL[job.part]) - time.monotonic()
            if job.part == "check":
                until = min(until, start + SMOKE_SECONDS - time.monotonic())
            if job.part in ("check", "tests"):
                left = until
            if until <= 0 or left < job.least:
                continue
            limit = min(job.seconds, left)
            key = tuple(job.about.get(name) for name in ("op", "case", "form"))
            if job.part != "check" and key in wrong:
                outcome = Outcome(None, f"not timed, its check failed: {wrong[key]}", 0.0, "")
            else:
                # the tests start processes of their own, which want the device's memory
                worker = bare if job.part == "tests" else guard
                if worker is bare:
                    guard.close()
                outcome = worker.run(job.function, job.arguments, limit)
            if outcome.failure and outcome.seconds >= limit < job.seconds and job.part != "tests":
                print(f"{job.name}: stopped, the time is over", flush=True)
                continue  # it has not failed: it was not given its time
            if job.part == "check" and outcome.failure:
                wrong[key] = outcome.failure
            line = {"job": job.name, **job.about, "value": outcome.value, "failure": outcome.failure}
            line |= {"seconds": round(outcome.seconds, 3)}
            if outcome.failure or job.part == "tests":
                line["output"] = outcome.output
            part = "time" if "direction" in job.about else job.part
            record.append(part=part, **line)
            print(f"{job.name}: {_shown(part, outcome)}", flush=True)
    record.append(part="end")


def _shown(part: str, outcome: Outcome) -> str:
    if outcome.failure:
        return outcome.failure
    if part == "time":
        return f"{outcome.value['ms']:.3f} ms"
    if part == "step":
        return speed(outcome.value)
    if part == "tests":
        return (outcome.output.strip().splitlines() or ["it said nothing"])[-1]
    return "right" if part == "check" else "done"


def read(arguments: Sequence[str]) -> Options:
    """The options; BadInput where they cannot be meant."""
    parser = _Parser(prog="benchmarks.gpu", description=Options.__doc__, allow_abbrev=False)
    for one in fields(Options):
        flag, options = f"--{one.name}", {"default": one.default, "help": one.metadata["help"]}
        if one.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif one.name == "ops":
            options |= {"nargs": "*", "metavar": "OP"}
        else:
            options["type"] = one.type
        parser.add_argument(flag, **options)
    found = vars(parser.parse_args(arguments))
    options = Options(**found | {"ops": tuple(found["ops"])})
    wrong = [op for op in options.ops if op not in AVAILABLE]
    if wrong:
        raise BadInput(f"--ops has no kernel {wrong[0]!r}; choose from {', '.join(AVAILABLE)}.")
    if not options.minutes > 0:
        raise BadInput(f"--minutes is {options.minutes:g}; it must be above 0.")
    if not options.cpu and not options.fold and not torch.cuda.is_available():
        raise BadInput("benchmarks.gpu needs a CUDA device and torch sees none; --cpu tries the command without one.")
    return options


def _device(at: Machine) -> str:
    """The device's name as part of a path; a GPU is asked by a child, so that this process takes nothing of it."""
    name = f"CPU {platform.machine()}"
    if at.device == "cuda":
        with Guard() as guard:
            asked = guard.run(f"{JOBS}:facts", {"device": at.device}, 120)
        if asked.failure:
            raise BadInput(f"the GPU of this machine cannot be used: {asked.failure}.")
        name = asked.value["device"]
    return "".join(c if c.isalnum() else "-" for c in name.lower())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message}; --help lists all flags.")


def failures(record: dict[str, Any]) -> list[str]:
    """Sentences on what is ours and failed; a peer may."""
    found = [
        f"{row['op']}: {row['case']}: {row['form']}: {row['failed']}" for row in record["checks"] if "failed" in row
    ]
    for row in record["kernels"]:
        failed = {name: row["forms"][name]["failed"] for name in row["ours"] if "failed" in row["forms"][name]}
        found += [f"{row['op']}: {row['case']}: {name}: {why}" for name, why in failed.items()]
    if record["tests"] is not None and record["tests"]["status"]:
        found.append(f"tests: {record['tests']['summary']}")
    return found


def main(arguments: list[str] | None = None) -> int:
    try:
        options = read(sys.argv[1:] if arguments is None else arguments)
        if options.fold:
            fold(Path(options.fold))
            return 0
        at = CPU if options.cpu else GPU
        date = datetime.now(UTC).date().isoformat()
        folder = Path(options.out or ROOT / "benchmarks" / "records" / f"{date}-{_device(at)}")
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out is {options.out!r}, which is a file; give a folder.")
        planned = list(jobs(at, options))
        record = Record(
            folder, date=date, options=asdict(options), plan=[job.name for job in planned],
            available={op: list(exist) for op, exist in AVAILABLE.items()},
        )  # fmt: skip
        try:
            work(planned, record, 60 * options.minutes, options.smoke)
        finally:
            found = fold(folder)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"record: {folder}; {len(found['not_run'])} of {len(planned)} jobs were not run")
    sentences = failures(found)
    for sentence in sentences:
        print(f"failed: {sentence}")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
