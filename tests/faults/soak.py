"""One run goes on and on, with faults that it has to live with, now and then stopped or killed; its memory stays as it is.

The faults are reads and writes that do half of what was asked or are interrupted, folders that cannot be flushed, and images that
are away for a second.
"""

import errno
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from engine.training import folder
from tests.faults.injected import Fault
from tests.faults.results import Part, Results
from tests.faults.runs import Server, Verdict, false_words, flags, images, left_over, logged, lost

EVERY = 0.5  # seconds between looks at the memory
WARM = 0.4  # the share of a process's life in which it may still grow: buffers, caches, the first export
SLOPE = 3.0  # MiB a minute that a warm process may grow by, beyond what it takes a look for
SPAN = 60.0  # seconds that a process has to be warm for, or its slope says nothing
ONE_IN = 7  # calls
AWAY, AWAY_EVERY, AWAY_FOR = "images away", 10.0, 1.0  # the latter in seconds
FAULTS = {
    "writes of half": lambda run, data, seed: Fault([run], "half", ("write",), one_in=ONE_IN, seed=seed),
    "reads of half": lambda run, data, seed: Fault([run, data], "half", ("read",), one_in=ONE_IN, seed=seed),
    "folders not flushed": lambda run, data, seed: Fault(
        [run], "fail", ("flush",), errno.EINVAL, one_in=2, seed=seed, folders_only=True
    ),
    "interrupted reads": lambda run, data, seed: Fault(
        [run, data], "fail", ("read",), errno.EINTR, one_in=ONE_IN, seed=seed
    ),
    AWAY: lambda run, data, seed: None,
}


@dataclass
class Life:
    """What a process of the run took, by the seconds since it began."""

    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)

    def look(self, process: int, seconds: float) -> None:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:  # it has just ended
            return
        resident = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]
        if resident:
            self.seconds.append(seconds)
            self.mib += resident

    def slope(self) -> float | None:
        """MiB a minute once it is warm, by least squares; None where that was too short."""
        warm = [(s, m) for s, m in zip(self.seconds, self.mib) if s >= WARM * self.seconds[-1]]
        if len(warm) < 10 or warm[-1][0] - warm[0][0] < SPAN:
            return None
        mean_s, mean_m = (sum(values) / len(warm) for values in zip(*warm))
        spread = sum((s - mean_s) ** 2 for s, _ in warm)
        return 60 * sum((s - mean_s) * (m - mean_m) for s, m in warm) / spread


def soak(server: Server, scratch: Path, minutes: float, draw: random.Random, part: Part, results: Results) -> None:
    """One run for so many minutes, in processes of half of that at most, each with a fault of its own all its life and an end
    that is drawn."""
    data = images(scratch / "images")
    run = scratch / "run"
    arguments = flags("mae", data, epochs=10**6)
    began, until = time.monotonic(), time.monotonic() + 60 * minutes
    names, slopes, most = list(FAULTS), [], 0.0
    for number in range(10**6):
        left = until - time.monotonic()
        if left <= 0:
            break
        # long lives for the memory, short ones between them for the ends
        seconds = min(left, 30 * minutes if number % 3 == 0 else draw.uniform(4, 2 + 3 * minutes))
        name, end = names[number % len(names)], draw.choice([signal.SIGTERM, signal.SIGKILL])
        fault = FAULTS[name](str(run), str(data), draw.randrange(2**32))
        started = ["--resume", str(run)] if run.is_dir() else [*arguments, "--out", str(run)]
        before, process, life = logged(run), server.start(started, fault), Life()
        ended, start = None, time.monotonic()
        while ended is None and time.monotonic() - start < seconds:
            ended = server.wait(process, EVERY)
            life.look(process, time.monotonic() - start)
            if name == AWAY and draw.random() < EVERY / AWAY_EVERY:
                aside = data.rename(data.with_name("away"))
                time.sleep(AWAY_FOR)
                aside.rename(data)
        verdict = Verdict(True, 0, outcome=name)
        if ended is not None:
            verdict.survived, verdict.why = False, f"ended by itself with {ended.status}: {ended.said[-300:]}"
        else:
            os.kill(process, end)
            ended = server.wait(process)
            # before there is anything to save, it ends at once
            if end == signal.SIGTERM and ended.status not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
                verdict.survived, verdict.why = False, f"SIGTERM, and it ended with {ended.status}: {ended.said[-300:]}"
        verdict.words, verdict.lost, verdict.left = false_words(run, ended), lost(run), left_over(run)
        slope = life.slope()
        if slope is not None:
            slopes.append(slope)
            if slope > SLOPE:
                verdict.survived, verdict.why = False, f"its memory grows by {slope:.1f} MiB a minute"
        most = max([most, *life.mib])
        part.add(f"{name}, then {end.name} after {seconds:.0f} s, from step {before}", verdict)
        results.progress(part, int(time.monotonic() - began), int(60 * minutes), began)
    grown = f"{max(slopes):.2f} MiB a minute at most in {len(slopes)} processes" if slopes else "too short to say"
    part.notes.append(f"{logged(run):,} steps; resident {most:.0f} MiB at most, growing by {grown}")
    part.notes.append(f"events: {dict(Counter(event['event'] for event in folder.events(run)))}")
