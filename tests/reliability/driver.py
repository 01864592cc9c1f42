"""Starts drive_stages.py in processes of its own, and reads what they left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from engine import methods
from engine.training import checkpoint

ROOT = Path(__file__).parents[2]
METHODS = methods.names()


def drive(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("drive_stages.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output


def state_of(folder: Path, method: str) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.newest(folder / method, print)
    return {f"{file}/{name}": value for file, named in tensors.items() for name, value in named.items()}


def steps_of(folder: Path, method: str) -> list[dict]:
    return json.loads((folder / f"{method}.json").read_text())["steps"]
