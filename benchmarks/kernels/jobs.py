"""What `benchmarks.gpu` has its guarded child do for the kernels: each function takes and returns JSON."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import kernels
from benchmarks.kernels import clock
from benchmarks.kernels.case import BACKWARD, CPU, GPU, Case, Machine, case, prepared, with_leaves
from kernels.calibration.tolerance import compared

ROOT = Path(__file__).parents[2]
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def machine(device: str) -> Machine:
    """The machine of a job, set up as for training."""
    if device == "cpu":
        return CPU
    torch.set_float32_matmul_precision("high")  # as engine.training.parts does
    return GPU


def facts(device: str) -> dict[str, Any]:
    """The machine and the software that the figures are of."""
    at = machine(device)
    found: dict[str, Any] = {
        "torch": torch.__version__, "triton": _version("triton"), "python": platform.python_version(),
        "dtype": str(at.dtype), "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(), "git": _git(),
    }  # fmt: skip
    if at.device == "cpu":
        return found | {"device": f"CPU {platform.machine()}"}
    chip = torch.cuda.get_device_properties(0)
    return found | {
        "device": torch.cuda.get_device_name(), "capability": f"sm_{chip.major}{chip.minor}", "memory": chip.total_memory,
        "multiprocessors": chip.multi_processor_count, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "driver": _nvidia_smi("driver_version"), "clocks": _nvidia_smi(*CLOCKS),
    }  # fmt: skip


def ceilings(device: str) -> dict[str, Any]:
    """See `clock.ceilings`; on a GPU also its clocks while a matrix product runs."""
    at = machine(device)
    found: dict[str, Any] = clock.ceilings(at)
    if at.device == "cuda":
        a = at.randn(8192, 8192)
        for _ in range(1000):  # more than a second of work
            a @ a
        found["clocks"] = _nvidia_smi(*CLOCKS)
    return found


def check(module: str, name: str, form: str, device: str) -> dict[str, Any]:
    """Compare a form with the formula in float64, at the size that is timed: outputs and gradients, on the case's part.

    Returns:
        By output and gradient, in order, what `kernels.calibration.tolerance.compared` returns, with the formula in the inputs'
        own dtype for plain torch.

    Raises:
        WrongAnswer: an error is larger, or a value is not finite.
    """
    fresh()
    one = case(module, name, machine(device))
    inputs = one.inputs()
    part, rows = one.part(tree_map_only(Tensor, torch.clone, inputs) if one.in_place else inputs)
    found, direction = _results(one, one.forms[form], inputs, None)
    if rows is not None:
        found = [x[rows] for x in found]
        direction = None if direction is None else direction[rows]
    del inputs
    wide = tree_map_only(Tensor, _double, part)
    plain, _ = _results(one, one.formula, part, direction)
    truth, _ = _results(one, one.formula, wide, direction)
    names = [*(f"output {i}" for i in range(len(found) - len(one.leaves))), *(f"gradient {i}" for i in one.leaves)]
    if BACKWARD not in one.directions:
        names = [f"output {i}" for i in range(len(found))]
    errors = [{"of": four[0]} | compared(*four) for four in zip(names, found, plain, truth, strict=True)]
    return {"errors": errors}


def time(module: str, name: str, form: str, direction: str, device: str) -> dict[str, Any]:
    """A form's time in one direction, see `clock.times`."""
    fresh()
    one = case(module, name, machine(device))
    with torch._functorch.config.patch(donated_buffer=False):  # a timed graph is gone through many times
        return clock.times(prepared(one.forms[form], one, direction, one.inputs()), device == "cuda")


def run_tests() -> dict[str, Any]:
    """Run the tests marked gpu; what they print is the job's output."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    return {"status": subprocess.run(command, cwd=ROOT, check=False).returncode}


def fresh() -> None:
    """Nothing is left of the job before: no choice, no compiled code, no cached memory. A function that is compiled too often to
    be compiled again fails, where by default it runs uncompiled without a word."""
    kernels.use("auto")
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    torch.manual_seed(0)


def _results(one: Case, form: Callable, inputs: tuple, direction: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Outputs, and gradients for `direction`, which is drawn where there is none; and that direction."""
    if BACKWARD not in one.directions:
        with torch.no_grad():
            return list(one.outputs(form(*inputs), inputs)), None
    inputs = with_leaves(one, inputs)
    out = form(*inputs)
    if direction is None:
        direction = torch.randn_like(out, dtype=torch.float32).bfloat16() if out.ndim else torch.ones_like(out)
    gradients = torch.autograd.grad(out, [inputs[i] for i in one.leaves], direction.to(out.dtype))
    return [*(x.detach() for x in one.outputs(out, inputs)), *gradients], direction


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """The commit, and how many files differ from it; None where this is no checkout."""
    try:
        commit = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
        return {
            "commit": commit,
            "changed_files": len(_said("git", "-C", str(ROOT), "status", "--porcelain").splitlines()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _nvidia_smi(*fields: str) -> dict[str, str] | None:
    """What the driver's tool says of the first device; None where there is no such tool."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        said = _said("nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError) as error:
        return {"failed": str(error)}
    return dict(zip(fields, (value.strip() for value in said.split(",")), strict=False))


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
