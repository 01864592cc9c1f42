"""Libraries that stand between a process and what it calls: built when they are wanted, and loaded before all others."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def can_be_built() -> bool:
    return sys.platform == "linux" and shutil.which("g++") is not None


def build(source: Path, folder: Path) -> Path:
    """The library of a C++ file, in `folder`, named after what the file says; built where it isn't there.

    Raises:
        subprocess.CalledProcessError: g++ failed; what it said is on stderr.
    """
    home = folder / f"{source.stem}-{hashlib.blake2b(source.read_bytes(), digest_size=8).hexdigest()}.so"
    if not home.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / home.name
            command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(made), "-ldl"]
            subprocess.run(command, check=True)
            made.replace(home)
    return home
