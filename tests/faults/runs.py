"""Runs that faults are put into: how they are started, what they should end as, and what is said of one that was disturbed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.core.errors import BadInput
from engine.training import checkpoint, config
from engine.training.metrics import TIME_FIELDS, read_metrics
from tests.data.corpus import picture
from tests.faults.injected import Fault
from tests.methods.small import small

ROOT = Path(__file__).parents[2]
SECONDS = 300.0  # for a run, on a machine that others use
IMAGES, BATCH, EPOCHS = 8, 4, 3  # two steps an epoch, each saved; with `--keep 1` the second save prunes the first
INTERVAL = IMAGES // BATCH  # steps between checkpoints


@dataclass(frozen=True)
class Ended:
    """A process that has ended: the status as a shell has it (-N by signal N), and its greatest resident memory in MiB."""

    status: int
    mib: float
    said: str


class Server:
    """The process of tests.faults.server, in which runs are forked: with a library loaded before all others, and with variables
    that are read once, when torch is loaded."""

    def __init__(self, scratch: Path, library: Path | None = None, environment: Mapping[str, str] | None = None):
        self._scratch, self._logs, self._running = scratch, 0, {}
        scratch.mkdir(parents=True, exist_ok=True)
        preloaded = {} if library is None else {"LD_PRELOAD": str(library)}
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | preloaded
        environment = os.environ | own | dict(environment or {})
        with (scratch / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.server"],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                process_group=0,  # Ctrl-C is for who asks
            )  # fmt: skip
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the server did not start; see {scratch / 'server.log'}")

    def start(
        self, arguments: Sequence[str], fault: Fault | None = None, module: str = "engine.train", **environment: str
    ) -> int:
        """Begin a command with these arguments. Returns the process's id."""
        self._logs += 1
        log = self._scratch / f"{self._logs:06d}.log"
        environment = {"TESSERA_CACHE": str(self._scratch / "cache")} | environment
        request = {"module": module, "arguments": list(arguments), "log": str(log), "environment": environment}
        process = self._ask({"start": request | {"fault": asdict(fault) if fault else None}})
        self._running[process] = log
        return process

    def wait(self, process: int, seconds: float = SECONDS) -> Ended | None:
        """How it ended; None if it is still at work after so many seconds."""
        answer = self._ask({"wait": process, "seconds": seconds})
        if answer is None:
            return None
        log = self._running.pop(process)
        said = log.read_text(errors="replace")
        log.unlink()
        return Ended(answer["status"], answer["mib"], said)

    def run(self, arguments: Sequence[str], fault: Fault | None = None, **environment: str) -> Ended:
        """The command to its end. One that takes longer than `SECONDS` is killed, and ends by SIGALRM."""
        process = self.start(arguments, fault, **environment)
        ended = self.wait(process)
        if ended is None:
            os.kill(process, signal.SIGKILL)
            ended = self.wait(process)
            return Ended(-signal.SIGALRM, ended.mib, ended.said)
        return ended

    def _ask(self, request: dict) -> object:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def images(folder: Path) -> Path:
    """Eight images of two classes; made where they aren't there."""
    for index in range(IMAGES):
        path = folder / "train" / f"class{index % 2}" / f"{index}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(40, 36, seed=index).save(path)
    return folder


def flags(method: str, data: Path, epochs: int = EPOCHS, keep: int = 1) -> list[str]:
    """A run of a few steps of every stage of a method at the sizes of tests/methods/small.py, which saves every second step."""
    stages = config.parse(["--method", method]).stages
    sizes = []
    for name, settings in stages:
        for of, value in small(type(settings)).items():
            if of != "batch_size":
                sizes += [f"--{name}.{of.replace('_', '-')}", str(value)]
    return [
        "--method", method, "--model", "vit_micro_patch8_32", "--device", "cpu", "--threads", "1", "--data", str(data),
        "--epochs", *[str(epochs)] * len(stages), "--batch-size", str(BATCH), "--probe-every", "0", "--no-evaluate",
        "--save-every", "1", "--log-every", "1", "--keep", str(keep), *sizes,
    ]  # fmt: skip


@dataclass(frozen=True)
class End:
    """What a run ended as: all that has to be equal, to the bit."""

    step: int
    state: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    records: list[dict]

    @classmethod
    def of(cls, run: Path) -> "End":
        """Raises BadInput where there is no sound checkpoint, OSError where a file is missing."""
        newest = checkpoint.newest_sound(run / "checkpoints")
        if newest is None:
            raise BadInput(f"{run} has no sound checkpoint")
        tensors, _ = checkpoint.load(newest)
        exported = sorted([run / "export", *(run / "stages").glob("[0-9]*")])
        records = [
            {name: value for name, value in record.items() if name not in TIME_FIELDS}
            for record in read_metrics(run / "metrics.jsonl")
        ]
        return cls(
            step_of(newest),
            {f"{file}/{name}": value for file, named in tensors.items() for name, value in named.items()},
            {f"{one.name}/{k}": v for one in exported for k, v in load_file(one / "model.safetensors").items()},
            records,
        )

    def difference(self, other: "End") -> str:
        """What is not equal; empty where all is."""
        if self.step != other.step:
            return f"ended at step {other.step}, not {self.step}"
        for what in ("state", "weights"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine.keys() != theirs.keys():
                return f"{what}: not the same tensors"
            # NaN counts as equal to itself, as the bits are
            odd = [name for name in mine if not _same_bits(mine[name], theirs[name])]
            if odd:
                return f"{what}: {len(odd)} tensors differ, first {odd[0]}"
        return "" if self.records == other.records else "metrics.jsonl differs"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.numpy().tobytes()) == bytes(b.numpy().tobytes())


def step_of(saved: Path | None) -> int:
    return int(saved.name.removeprefix(checkpoint.PREFIX)) if saved else 0


def logged(run: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    path = run / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.is_file() else 0


def lost(run: Path) -> int:
    """Steps that were logged and are in no sound checkpoint."""
    return max(0, logged(run) - step_of(checkpoint.newest_sound(run / "checkpoints")))


def left_over(run: Path) -> int:
    """Bytes under hidden names, which things have before they are renamed into place."""
    hidden = (path for path in run.rglob("*") if any(part.startswith(".") for part in path.relative_to(run).parts))
    return sum(path.stat().st_size for path in hidden if path.is_file() and path.name != ".lock")


def false_words(run: Path, ended: Ended) -> list[str]:
    """What a process said of itself that is not so, as the disk shows it right afterwards; no sentence where one was due."""
    found = []
    said, status, last = ended.said, ended.status, checkpoint.newest_sound(run / "checkpoints")
    if "Traceback (most recent call last)" in said:
        found.append("a traceback: " + said.strip().splitlines()[-1][:200])
    elif status == 2 and len(re.findall(r"^error( \(rank \d+\))?: ", said, re.MULTILINE)) != 1:
        found.append("status 2 without one sentence")
    elif status not in (0, 1, 2) and status > 0 and not said.strip():
        found.append(f"status {status} without a word")
    for name in re.findall(r"Checkpoint (step-\d+) is whole", said):
        if last is None or last.name != name:
            found.append(f"says {name} is whole, and the newest sound one is {last and last.name}")
    if "Nothing was saved yet" in said and last is not None:
        found.append(f"says that nothing was saved, and {last.name} is sound")
    if "What is safe cannot be read now" in said:
        found.append("says that it cannot be read, and it can")
    if "nothing was written" in said and run.is_dir() and any(run.iterdir()):
        found.append("says that nothing was written, and there is")
    whole = "the training is whole" in said or (run / "summary.json").is_file() or status in (0, 1)
    steps = _json(run / "summary.json").get("steps") or _steps(run)
    if whole and "stopped and saved" not in said and step_of(last) != steps:
        found.append(f"says that the training is whole, and of {steps} steps {step_of(last)} are saved")
    if status == 1 and "left_out" not in _json(run / "summary.json"):
        found.append("status 1, and summary.json names nothing that is left out")
    for folder in (run / "export", *(run / "stages").glob("[0-9]*")):
        if folder.is_dir() and (fault := _not_whole(folder)):
            found.append(f"{folder.relative_to(run)} is there and not whole: {fault}")
    for name in ("config.json", "kernels.json", "summary.json"):
        if (run / name).is_file() and not _json(run / name):
            found.append(f"{name} is there and not whole")
    return found


def _steps(run: Path) -> int:
    """Of the whole run, as its configuration says; 0 where it has none."""
    return INTERVAL * sum(stage["epochs"] for stage in _json(run / "config.json").get("stages", []))


def _not_whole(folder: Path) -> str:
    try:
        load_file(folder / "model.safetensors")
        json.loads((folder / "config.json").read_text())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@dataclass
class Verdict:
    """What became of one fault, or of several on one run.

    Attributes:
        survived: the run ended as the undisturbed one, or nothing was saved yet and that was said.
        lost: steps that were done and had to be done again.
        left: bytes that the disturbed process left half-written and nobody has removed.
        words: false ones.
        why: what was wrong, if it did not survive.
        outcome: how the disturbed process ended, in a word or two.
    """

    survived: bool
    lost: int
    left: int = 0
    words: list[str] = field(default_factory=list)
    why: str = ""
    outcome: str = ""


class Subject:
    """One kind of run: where it is started, what it should end as, how a disturbed one is judged."""

    def __init__(self, server: Server, scratch: Path, method: str, own_cache: bool = False, keep: int = 1):
        """`own_cache`: each run screens its images anew, so that what is written of that is met, too; `keep`: checkpoints."""
        self.server, self.method, self._own_cache = server, method, own_cache
        self._scratch, self._count = scratch / method, 0
        self._arguments = flags(method, images(scratch / "images"), keep=keep)
        reference = self.folder()
        self.record = self._scratch / "calls"
        self.record.unlink(missing_ok=True)  # of an earlier subject here: lines are added to it
        began = time.monotonic()
        ended = self.begin(reference, Fault([str(reference), self.cache(reference)], record=str(self.record)))
        self.seconds = time.monotonic() - began
        if ended.status != 0:
            raise RuntimeError(f"the undisturbed run of {method} ended with {ended.status}:\n{ended.said}")
        self.end = End.of(reference)
        self.calls = [Call.of(line, reference) for line in self.record.read_text().splitlines()]
        self.clear(reference)

    def folder(self) -> Path:
        """Where a run will lie, and beside it its cache."""
        self._count += 1
        place = self._scratch / f"{self._count:05d}"
        place.mkdir(parents=True)
        return place / "run"

    def cache(self, run: Path) -> str:
        return str(run.parent / "cache" if self._own_cache else self._scratch / "cache")

    def clear(self, run: Path) -> None:
        shutil.rmtree(run.parent)

    def begin(self, run: Path, fault: Fault | None = None) -> Ended:
        return self.server.run([*self._arguments, "--out", str(run)], fault, TESSERA_CACHE=self.cache(run))

    def begun(self, run: Path, fault: Fault | None = None) -> int:
        return self.server.start([*self._arguments, "--out", str(run)], fault, TESSERA_CACHE=self.cache(run))

    def resume(self, run: Path, fault: Fault | None = None) -> Ended:
        return self.server.run(["--resume", str(run)], fault, TESSERA_CACHE=self.cache(run))

    def resumed(self, run: Path, fault: Fault | None = None) -> int:
        return self.server.start(["--resume", str(run)], fault, TESSERA_CACHE=self.cache(run))

    def can_go_on(self, run: Path) -> bool:
        return checkpoint.newest_sound(run / "checkpoints") is not None

    def judge(self, run: Path, ended: Ended) -> Verdict:
        """What became of a run that a fault was put into, and whose process has ended so: it is gone on with, and compared."""
        outcome = f"signal {-ended.status}" if ended.status < 0 else f"status {ended.status}"
        verdict = Verdict(False, lost(run), words=false_words(run, ended), outcome=outcome)
        if verdict.lost > 2 * INTERVAL:
            verdict.why = f"{verdict.lost} steps are lost, with a checkpoint every {INTERVAL}"
        elif ended.status == -signal.SIGALRM:
            verdict.why = f"it still worked after {SECONDS:.0f} s"
        elif not self.can_go_on(run):
            # a new run is as good; what stands there must not be taken for one
            refused = self.resume(run) if run.is_dir() and any(run.iterdir()) else ended
            verdict.survived = refused.status in (2, ended.status) and "Traceback" not in refused.said
            verdict.why = "" if verdict.survived else f"--resume of nothing: {refused.status}: {refused.said[-300:]}"
        else:
            verdict.why = self._finished(run, ended)
            verdict.survived = not verdict.why
            verdict.left = left_over(run)
        return verdict

    def _finished(self, run: Path, ended: Ended) -> str:
        """Go on with it where it hasn't ended well; what is then not as it should be."""
        if ended.status != 0:
            at = step_of(checkpoint.newest_sound(run / "checkpoints"))
            again = self.resume(run)
            if again.status != 0:
                return f"--resume ended with {again.status}: {again.said[-300:]}"
            if f"going on from step {at:,}" not in again.said:
                return f"--resume did not go on from step {at}"
            if false := false_words(run, again):
                return f"--resume: {false[0]}"
        try:
            return self.end.difference(End.of(run))
        except (OSError, BadInput, KeyError) as error:
            return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Call:
    """One call of the undisturbed run.

    Attributes:
        number: from 1.
        kind: one of `injected.CHANGES`.
        place: the part of the run folder that it changes, or "cache".
        file: the name, without what is drawn.
    """

    number: int
    kind: str
    place: str
    file: str

    @classmethod
    def of(cls, line: str, run: Path) -> "Call":
        number, kind, path = line.split(" ", 2)
        if not Path(path).is_relative_to(run):
            return cls(int(number), kind, "cache", Path(path).name)
        inside = Path(path).relative_to(run)
        first = inside.parts[0] if inside.parts else "run folder"
        known = ("checkpoints", "export", "stages", "pictures", "tensorboard")
        part = next((name for name in known if first.strip(".").startswith(name)), None)
        if part is None:
            part = re.sub(r"^\.?(config|kernels|summary|lock)\b.*", r"\1", first)
        return cls(int(number), kind, part, inside.name)
