"""What a suite of faults came to: a line a part, printed and kept as JSON."""

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.runs import Verdict

MOST = 50  # failures that are told in full


@dataclass
class Part:
    """Of one part of the suite.

    Attributes:
        injected: faults.
        survived: of these, those after which all was as it should be.
        lost, most_lost: steps done again, over all faults, and after the worst.
        left, most_left: MiB that were left half-written, over all faults, and by the worst.
        false_words: sentences that weren't true, tracebacks, and silence where a sentence was due.
        notes: figures besides, in words.
    """

    name: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    most_lost: int = 0
    left: float = 0.0
    most_left: float = 0.0
    false_words: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, verdict: Verdict, faults: int = 1) -> None:
        """`what` was done, so that it can be done again."""
        self.injected += faults
        self.survived += faults if verdict.survived else faults - 1
        self.lost += verdict.lost
        self.most_lost = max(self.most_lost, verdict.lost)
        self.left += verdict.left / 2**20
        self.most_left = max(self.most_left, verdict.left / 2**20)
        self.false_words += len(verdict.words)
        self.outcomes[verdict.outcome] = self.outcomes.get(verdict.outcome, 0) + 1
        if verdict.words or not verdict.survived:
            self.failures.append({"what": what, "why": verdict.why, "words": verdict.words})

    @property
    def sound(self) -> bool:
        return self.survived == self.injected and not self.false_words


class Results:
    """Of a whole suite, run by `command`; what is added is shown as it comes, with the time left, and kept in the file `path`."""

    def __init__(self, path: Path, command: str, console: Console | None = None):
        self.path, self.command = path, command
        self.parts: list[Part] = []
        self._console = console or Console()
        self._shown = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        part, began = Part(name), time.monotonic()
        self.parts.append(part)
        self._console.print(f"{name} ...")
        try:
            yield part
        finally:
            part.seconds = round(time.monotonic() - began, 1)
            self.save()

    def progress(self, part: Part, done: int, of: int, began: float) -> None:
        """Say at most every ten seconds how far a part is."""
        now = time.monotonic()
        if now - self._shown >= 10 and done:
            self._shown, left = now, (now - began) / done * (of - done)
            bad = len(part.failures)
            self._console.print(f"  {done} of {of}, {bad} not as they should be, {left / 60:.0f} min left")
            self.save()

    def save(self) -> None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        told = {
            "date": time.strftime("%Y-%m-%d %H:%M"), "command": self.command, "commit": commit.stdout.strip(),
            "machine": platform.processor() or platform.machine(), "parts": [asdict(part) for part in self.parts],
        }  # fmt: skip
        self.path.write_text(json.dumps(told, indent=1))

    def show(self) -> None:
        table = Table(
            "part",
            *(
                f"{name}"
                for name in ("injected", "survived", "lost steps", "most", "false words", "most left, MiB", "s")
            ),
        )
        for part in self.parts:
            figures = (part.injected, part.survived, part.lost, part.most_lost, part.false_words)
            table.add_row(part.name, *map(str, figures), f"{part.most_left:.1f}", f"{part.seconds:.0f}")
        self._console.print(table)
        for part in self.parts:
            for note in part.notes:
                self._console.print(f"{part.name}: {note}", markup=False)
            for failure in part.failures[:MOST]:
                told = "; ".join(filter(None, [failure["why"], *failure["words"]]))
                self._console.print(f"{part.name}: {failure['what']}: {told}", markup=False)

    @property
    def sound(self) -> bool:
        return all(part.sound for part in self.parts)
