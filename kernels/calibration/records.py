"""What was measured on which machine: a JSON file per machine in the user's cache, and those that are shipped.

A record of another machine is neither read nor overwritten: its file has another name. In a file every trial names the state of
the op's sources that it is of; a trial of other sources is left where it is, and ignored.
"""

import ctypes
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
KERNELS = Path(__file__).parents[1]
SHIPPED = KERNELS / "records"
_KIND = (
    "device",
    "capability",
    "processors",
    "deterministic",
)  # of a machine, what a shipped record must share with it


@dataclass(frozen=True)
class Key:
    """Which trial: of a registered op, at a class of shapes, with these sources."""

    call: str
    shape_class: str
    sources: str

    def __str__(self) -> str:
        return f"{self.call} | {self.shape_class} | {self.sources}"


class Record:
    """The trials of one machine. `path` is where `save` puts them; None for what is never written."""

    def __init__(self, machine: Mapping[str, Any], trials: dict[str, dict[str, Any]], path: Path | None) -> None:
        self.machine, self.trials, self.path = dict(machine), trials, path
        self._passing: set[str] = set()

    def note(self, key: Key, trial: dict[str, Any], *, lasts: bool) -> None:
        """Take up a new trial; one that does not last is known as long as this object is, and never written."""
        self.trials[str(key)] = trial
        if not lasts:
            self._passing.add(str(key))

    @staticmethod
    def of(machine: Mapping[str, Any], home: Path | None = None) -> "Record":
        """The user's own; empty where there is none that can be read."""
        digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
        name = "-".join("".join(c if c.isalnum() else " " for c in machine["device"].lower()).split())
        path = (home or folder()) / f"{name}-{digest}.json"
        return Record(machine, _trials(path, machine, machine.keys()), path)

    @staticmethod
    def shipped(machine: Mapping[str, Any], home: Path = SHIPPED) -> "Record":
        """What came with the engine for this kind of device, whatever its driver and versions."""
        trials: dict[str, dict[str, Any]] = {}
        for path in sorted(home.glob("*.json")):
            trials |= _trials(path, machine, _KIND)
        return Record(machine, trials, None)

    def save(self) -> None:
        """Write the file whole or not at all, with what another process has added to it meanwhile."""
        if self.path is None:
            raise ValueError("a shipped record is not written")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lasting = {key: trial for key, trial in self.trials.items() if key not in self._passing}
        trials = _trials(self.path, self.machine, self.machine.keys()) | lasting
        handle, aside = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"format": FORMAT, "machine": self.machine, "trials": trials}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise


def folder() -> Path:
    """$TESSERA_CACHE/kernels, else in $XDG_CACHE_HOME/tessera, else in ~/.cache/tessera."""
    home = os.environ.get("TESSERA_CACHE")
    if home:
        return Path(home).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tessera" / "kernels"


def machine(device: torch.device, threads: int, deterministic: bool = False) -> dict[str, Any]:
    """What times depend on: the device, its driver, the libraries, whether torch's own kernels are held to the same bits at every
    run; on a CPU the threads, too."""
    versions = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton"), "deterministic": deterministic,
    }  # fmt: skip
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": _processor(), "capability": capability, "processors": threads, "driver": None} | versions
    chip = torch.cuda.get_device_properties(device)
    return {
        "device": chip.name, "capability": f"sm_{chip.major}{chip.minor}", "processors": chip.multi_processor_count,
        "driver": _driver(),
    } | versions  # fmt: skip


@cache
def sources(op: str) -> str:
    """A hash of everything that the op's implementations are made of."""
    files = [*(KERNELS / op).glob("*.py"), *(KERNELS.parent / "csrc").glob(f"{op}.*")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _trials(path: Path, machine: Mapping[str, Any], shared: Any) -> dict[str, dict[str, Any]]:
    """Those of a file, if it is of this format and shares so much with the machine; else none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return {}
    theirs = found.get("machine", {})
    return found["trials"] if all(theirs.get(name) == machine[name] for name in shared) else {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        version = ctypes.c_int()  # of the interface: all that WSL and some containers tell
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return f"API {version.value}"
    return next((word for word in line.split() if word[0].isdigit() and "." in word), line)
