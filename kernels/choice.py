"""The one choice between an op's implementations: plain torch (reference), Triton, CUDA C++.

An implementation exists when its file does: `kernels/OP/triton.py` makes "triton" available for OP, and nothing else
needs to know. The choice is a plain Python value read when an op is called or traced, so a compiled graph carries it as
a constant, `use` makes the compiler trace again, and no choice ever breaks a graph.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch

IMPLEMENTATIONS = ("reference", "triton", "cuda")
AVAILABLE: dict[str, tuple[str, ...]] = {
    folder.name: tuple(name for name in IMPLEMENTATIONS if (folder / f"{name}.py").is_file())
    for folder in sorted(Path(__file__).parent.iterdir())
    if (folder / "reference.py").is_file()
}

# What "auto" means on a GPU, as {"sm_90": {"packed_attention": "triton"}}. Every entry needs a record of that device
# under benchmarks/records/ in which it beats the reference; whatever has no entry, and every CPU, runs the reference.
DEFAULTS: dict[str, dict[str, str]] = {}

_requested: dict[str, str] = {}
_modules: dict[tuple[str, str], ModuleType] = {}
_needs_gpu: set[tuple[str, str]] = set()
_unusable: dict[tuple[str, str], str] = {}


def use(implementation: str, op: str | None = None) -> None:
    """Choose the implementation that ops run from now on; the environment variable TESSERA_KERNELS does the same for
    all.

    Args:
        implementation: "auto" (what a record has shown to be fastest on the device, else the reference), "reference",
            "triton" or "cuda".
        op: one op by its folder's name (see `describe`); None chooses for all of them. An op that lacks what was asked
            for all of them says so when it is called; it never falls back to another.

    Raises:
        ValueError: for an unknown op, or an implementation that the op (every op, for None) does not have or that was
            not built.
    """
    if op is not None and op not in AVAILABLE:
        raise ValueError(f"there is no kernel {op!r}; choose from {', '.join(AVAILABLE)}")
    ops = tuple(AVAILABLE) if op is None else (op,)
    exist = {name for asked in ops for name in AVAILABLE[asked]}
    if implementation != "auto" and implementation not in exist:
        raise ValueError(_missing(op, implementation, exist))
    for asked in ops:
        if implementation in AVAILABLE[asked]:
            _import(asked, implementation)
    request(implementation, ops)


def request(implementation: str, ops: Iterable[str] = tuple(AVAILABLE)) -> None:
    """`use` without the check: a wrong environment variable must not break an import, so the first call tells it."""
    for op in ops:
        names = {"reference", implementation}
        if implementation == "auto" and DEFAULTS and torch.cuda.is_available():
            names |= {record[op] for record in DEFAULTS.values() if op in record}
            # not a decorator: it loads the compiler, which takes seconds
            torch.compiler.assume_constant_result(_recorded)
        for name in names.intersection(AVAILABLE[op]):
            try:
                _import(op, name)
            except ValueError as error:
                _unusable[op, name] = str(error)
        _requested[op] = implementation


def chosen(op: str, device: torch.device) -> str:
    """The implementation that `op` runs on `device`; ValueError when one was asked for that does not exist."""
    requested = _requested[op]
    if requested == "auto":
        return _recorded(op, device.type) if DEFAULTS else "reference"
    if requested not in AVAILABLE[op]:
        raise ValueError(_missing(op, requested, AVAILABLE[op]))
    obstacle = _obstacle(op, requested, device)
    if obstacle:
        raise ValueError(obstacle)
    return requested


def check(device: torch.device | str) -> None:
    """ValueError when an op has the implementation that was asked for, but cannot run it on `device`."""
    for op, requested in _requested.items():
        obstacle = _obstacle(op, requested, torch.device(device))
        if obstacle:
            raise ValueError(obstacle)


def load(op: str, implementation: str) -> ModuleType:
    """The module `kernels.OP.IMPLEMENTATION`; it was imported when it was asked for, since a trace cannot import."""
    return _modules[op, implementation]


def describe(device: torch.device | str = "cpu") -> str:
    """One line per op, in alphabetical order: which implementation runs on `device`, and which exist."""
    width = max(map(len, AVAILABLE))
    lines = []
    for op, exist in AVAILABLE.items():
        requested = _requested[op]
        try:
            name = chosen(op, torch.device(device))
        except ValueError:
            name = f"none ({requested} asked)"
        lines.append(f"{op:<{width}}  {name}  (exists: {', '.join(exist)}; asked: {requested})")
    return "\n".join(lines)


def _recorded(op: str, device_type: str) -> str:
    if device_type != "cuda":
        return "reference"
    major, minor = torch.cuda.get_device_capability()
    return DEFAULTS.get(f"sm_{major}{minor}", {}).get(op, "reference")


def _obstacle(op: str, implementation: str, device: torch.device) -> str:
    """Why an implementation that exists cannot run on the device, in a sentence; empty when it can."""
    if (op, implementation) in _unusable:
        return f"{op} cannot run {implementation}: {_unusable[op, implementation]}"
    if device.type == "cpu" and (op, implementation) in _needs_gpu:
        hint = "; TRITON_INTERPRET=1 in the environment has Triton's kernels interpreted there, slowly"
        return f"{op} needs tensors on a GPU to run {implementation}, got them on the CPU" + hint * (
            implementation == "triton"
        )
    return ""


def _import(op: str, implementation: str) -> None:
    module = importlib.import_module(f"kernels.{op}.{implementation}")
    _modules[op, implementation] = module
    _unusable.pop((op, implementation), None)
    # a function that Triton interprets has another type than one that it compiles
    if implementation == "cuda" or any(type(value).__name__ == "JITFunction" for value in vars(module).values()):
        _needs_gpu.add((op, implementation))


def _missing(op: str | None, implementation: str, exist: Iterable[str]) -> str:
    owner = "no kernel has an" if op is None else f"{op} has no"
    names = ", ".join(("auto", *(name for name in IMPLEMENTATIONS if name in exist)))
    return f"{owner} implementation {implementation!r}; choose from {names} (kernels.use or TESSERA_KERNELS)"
