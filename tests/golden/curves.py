"""The losses of fifty steps of every method on the digits, as they are, to the last bit.

    python -m tests.golden.curves [METHOD ...] --because "REASON"

takes them again, all methods or these, twice each, and writes what has changed into `curves.json`, with the reason beside it: do
it when a change of the engine moves them on purpose (the difference then belongs to what is reviewed), or when torch is another
one (then all of them).

Bits hang on the torch, the number of threads, and the processor, after whom libraries choose their code. `settled` settles the
last two: one thread, and what every x86-64 processor with AVX2 has, of whichever maker.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine import methods
from engine.core.errors import BadInput
from engine.data.sets import digits
from engine.training import config
from engine.training.metrics import read_metrics
from tests.faults.runs import Server
from tests.golden.stored import FILE, Losses, content

MODEL, BATCH, OF_EACH, EPOCHS = "vit_micro_patch8_32", 8, 8, 5  # eight of each digit, so ten steps an epoch
STEPS = EPOCHS * 10 * OF_EACH // BATCH


def settled() -> dict[str, str]:
    """Variables of a process whose bits are those of any processor that `obstacle` accepts; they are read with the libraries."""
    of_numpy = np.show_config(mode="dicts")["SIMD Extensions"]
    known = [name for which in ("found", "not found") for name in of_numpy.get(which, ())]
    wide = [name for name in known if "512" in name or name == "X86_V4"]
    return {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": " ".join(wide),
        "MKL_CBWR": "COMPATIBLE",  # its AVX2 is for Intel's processors alone
        "TESSERA_KERNELS": "auto",
    }  # fmt: skip


def images(folder: Path) -> Path:
    """Eight training images of each embedded digit, in `folder`; made where they aren't there."""
    if not folder.is_dir():
        whole = digits.write(folder.parent / "cache")
        for of_class in sorted((whole / "train").iterdir()):
            home = folder / "train" / of_class.name
            home.mkdir(parents=True)
            for image in sorted(of_class.iterdir())[:OF_EACH]:
                shutil.copy(image, home)
    return folder


def flags(method: str, data: Path) -> list[str]:
    """A run of fifty steps by the method's recipe for the digits; stages share them, earlier ones have fewer."""
    count = len(config.parse(["--method", method, "--preset", "digits"]).stages)
    epochs = [EPOCHS // count + (index >= count - EPOCHS % count) for index in range(count)]
    return [
        "--method", method, "--preset", "digits", "--model", MODEL, "--device", "cpu", "--threads", "1", "--no-compile",
        "--data", str(data), "--epochs", *map(str, epochs), "--batch-size", str(BATCH), "--log-every", "1",
        "--probe-every", "0", "--save-every", "0", "--no-evaluate",
    ]  # fmt: skip


def server(scratch: Path, library: Path | None = None) -> Server:
    """A process that forks runs with settled bits; `library` is loaded before all others."""
    return Server(scratch, library, settled())


def take(server: Server, scratch: Path, method: str, *before: str, module: str = "tests.golden.short_run") -> Losses:
    """The losses of a run of `method` in a new folder under `scratch`, as the `main` of `module` runs it, given the arguments
    `before` a run's.

    Raises:
        RuntimeError: the run failed; with what it said.
    """
    data = images(scratch / "images")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        run = Path(folder) / "run"
        arguments = [*before, *flags(method, data), "--out", str(run)]
        ended = server.wait(server.start(arguments, module=module, TESSERA_CACHE=str(scratch / "cache")))
        if ended is None or ended.status:
            raise RuntimeError(f"the run of {method} {'still works' if ended is None else 'failed'}: {ended}")
        losses: Losses = {}
        for record in read_metrics(run / "metrics.jsonl"):
            if record["kind"] == "train":
                losses.setdefault(record["stage"], []).append(record["loss"])
    return losses


def difference(kept: Losses, found: Losses) -> str:
    """Where `found` leaves what is kept, in words; "" where all are equal, to the last bit."""
    shape, other = ({stage: len(losses) for stage, losses in of.items()} for of in (kept, found))
    if shape != other:
        return f"steps by stage are {other}, not {shape}"
    pairs = [
        (stage, step, *pair)
        for stage, losses in kept.items()
        for step, pair in enumerate(zip(losses, found[stage], strict=True), 1)
    ]
    odd = [place for place in pairs if place[2] != place[3]]
    if not odd:
        return ""
    stage, step, was, now = odd[0]
    return f"{len(odd)} of {len(pairs)} losses differ, from step {step} of {stage} on, which was {was!r} and is {now!r}"


def versions() -> dict[str, str]:
    """What the losses were taken with, besides torch: for who looks for the cause of a difference."""
    of_packages = {name: importlib.metadata.version(name) for name in ("numpy", "timm", "nvidia-dali-cuda130")}
    return of_packages | {"libc": " ".join(platform.libc_ver()), "processor": _processor()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.curves", description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(methods.names())} [all]")
    parser.add_argument("--because", required=True, metavar="REASON", help="kept beside the losses that change")
    chosen = parser.parse_args(arguments)
    try:
        _renew(chosen.methods, " ".join(chosen.because.split()))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _renew(names: Sequence[str], reason: str) -> None:
    if not reason:
        raise BadInput("--because is empty: say what moves the losses.")
    for name in names:
        methods.get(name)
    version, curves = content()["torch"], content()["curves"]
    if version != torch.__version__:
        if names:
            raise BadInput(f"the losses are of torch {version}, here is {torch.__version__}: take all methods.")
        curves = {}
    curves = {name: curve for name, curve in curves.items() if name in methods.names()}
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as process:
        for name in names or methods.names():
            found, again = (take(process, Path(folder), name) for _ in range(2))
            if odd := difference(found, again):
                raise BadInput(f"two runs of {name} do not lose the same: {odd}.")
            moved = difference(curves[name]["losses"], found) if name in curves else "new"
            print(f"{name}: {moved or 'unchanged'}", flush=True)
            if moved:
                curves[name] = {"because": reason, "taken_with": versions(), "losses": found}
            renewed = {"torch": torch.__version__, "curves": dict(sorted(curves.items()))}
            FILE.write_text(json.dumps(renewed, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
