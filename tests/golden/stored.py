"""What `curves.json` holds, and where it holds. Brings in neither the engine nor Triton: pytest asks before anything else."""

import json
import platform
from pathlib import Path

import torch

FILE = Path(__file__).with_name("curves.json")
PROCESSORS = ("AVX2", "AVX512")  # as torch calls what they can

Losses = dict[str, list[float]]  # by stage


def content() -> dict:
    """ "torch", the version; "curves": by method "because", "taken_with" and "losses"."""
    return json.loads(FILE.read_text())


def obstacle() -> str:
    """Why the losses don't hold in this environment, in words; "" where they do."""
    version = content()["torch"]
    if version != torch.__version__:
        return f"the losses are of torch {version}, here is {torch.__version__}"
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() not in PROCESSORS:
        return "the losses are of x86-64 processors with AVX2, here torch finds another"
    return ""
