"""What the tests of a run's log share: a clock, a console, a run of two stages that is logged."""

import io

import pytest
from rich.console import Console

from engine.training import dry_run, progress, speed, waits
from engine.training.log import RunLog


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        for module in (dry_run, progress, speed, waits):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})


def shown(run: RunLog) -> str:
    return run._progress._console.file.getvalue()


def train(folder, first, last, resume_at=None, **options):
    """Two stages of 10 steps; logs every second step and probes every fifth, as a loop would."""
    with RunLog(folder, **{"quiet": True} | options) as run:
        if resume_at is not None:
            run.resume(resume_at)
        for step in range(first, last + 1):
            if step == first or step == 11:
                stage = (step - 1) // 10
                run.start_stage(("mae", "nnclr")[stage], stage, 2, 10 * stage, 10, 64)
            run.tick(step)
            if step % 2 == 0:
                run.log(step, {"loss": 1 / step, "lr": 1e-3 * step})
            if step % 5 == 0:
                run.log(step, {"rank_me": float(step), "verdict": "healthy: yes"}, kind="probe")
