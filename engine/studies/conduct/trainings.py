"""A training in a process of its own: what that is given, how far it is, and why it ended."""

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.studies.conduct.grid import Run, logged_step


@dataclass
class Training:
    """A run that is being trained by a process of its own."""

    run: Run
    slot: int
    process: subprocess.Popen
    folder: Path
    log: Path
    first_step: int
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def step(self) -> int:
        return max(self.first_step, logged_step(self.folder))

    def complaint(self) -> str:
        """Why it ended, by the last words of its log."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        last = error.removeprefix("error: ") if error else (lines[-1] if lines else "it said nothing")
        return f"status {self.process.returncode}: {last}"


def environment(slot: int, threads: int) -> dict[str, str]:
    """Of a training process: its share of the CPU's threads, and where there are several GPUs one of them."""
    given = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if torch.cuda.device_count() > 1:
        visible = (
            os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        ).split(",")
        given["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return given
