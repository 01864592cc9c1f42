"""Where numbers were made: versions, machine, and the commit of the code."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "scikit-learn", "scipy", "numpy", "pycocotools")
_ROOT = Path(__file__).parents[3]


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """What the figures were computed with, besides the packages."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "GPU": gpu,
        "threads of torch": torch.get_num_threads(),
        "commit": commit(_ROOT),
    }
    return {name: value for name, value in about.items() if value}


def commit(root: Path) -> str:
    """Hash of the checkout's commit, "-dirty" at its end where files differ from it; "" where there is no checkout."""
    if not (root / ".git").exists():
        return ""
    ask = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
