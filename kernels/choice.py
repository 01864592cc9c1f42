"""The one choice between an op's implementations: plain torch (reference), Triton, CUDA C++.

An implementation exists when its file does: `kernels/OP/triton.py` makes "triton" available for OP, and nothing else
needs to know. The choice is a plain Python value read when an op is called or traced, so a compiled graph carries it as
a constant, `use` makes the compiler trace again, and no choice ever breaks a graph.
"""

import importlib
from collections.abc import Iterable, Mapping
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

# by op, what was asked for, and whether it was asked of all ops: then one that lacks it runs what auto means
_requested: dict[str, str] = {}
_asked_of_all: set[str] = set()
_fault = ""  # what is wrong with the environment variable; told by the first call, since it must not break an import
_modules: dict[tuple[str, str], ModuleType] = {}
_needs_gpu: set[tuple[str, str]] = set()
_unusable: dict[tuple[str, str], str] = {}


def use(choice: str, op: str | None = None) -> None:
    """Choose the implementation that ops run from now on; the environment variable TESSERA_KERNELS does the same.

    Args:
        choice: "auto" (what a record has shown to be fastest on the device, else the reference), "reference", "triton" or
            "cuda". Without `op` also a list by op, such as "packed_attention=cuda,sinkhorn=triton", where the others run
            what stands without a name in front ("triton,sinkhorn=reference"), or auto.
        op: one op by its folder's name (see `describe`); None chooses for all of them where they have it: an op that lacks
            it runs what auto means, and `describe` says so. Named, an op never runs another than was asked for.

    Raises:
        ValueError: for an unknown op, an implementation that the op (every op, for None) does not have or that was not
            built, or a list of another form; nothing is changed then.
    """
    global _fault
    asked, of_all = understood(choice, op)
    for name, implementation in asked.items():
        if implementation in AVAILABLE[name]:
            _import(name, implementation)
    _fault = _fault if op else ""
    _take(asked, of_all)


def understood(choice: str, op: str | None = None) -> tuple[dict[str, str], set[str]]:
    """What a choice asks for, by op, and of which ops it asks it because it asks it of all. Errors as of `use`, but for what was
    not built."""
    asked = _read(choice) if op is None else {op: choice}
    of_all = set(AVAILABLE) - _named(choice) if op is None else set()
    for name, implementation in asked.items():
        if name not in AVAILABLE:
            raise ValueError(f"there is no kernel {name!r}; choose from {', '.join(AVAILABLE)}")
        exist = {known for each in (AVAILABLE if name in of_all else (name,)) for known in AVAILABLE[each]}
        if implementation != "auto" and implementation not in exist:
            raise ValueError(_missing(None if name in of_all else name, implementation, exist))
    return asked, of_all


def request(choice: str) -> None:
    """`use` for all ops without the check: a wrong environment variable must not break an import."""
    global _fault
    try:
        asked, of_all = _read(choice), set(AVAILABLE) - _named(choice)
        _fault = (
            "" if asked.keys() <= AVAILABLE.keys() else f"there is no kernel {min(asked.keys() - AVAILABLE.keys())!r}"
        )
    except ValueError as error:
        asked, of_all, _fault = {}, set(), str(error)
    _take({name: "auto" for name in AVAILABLE} | {name: asked[name] for name in asked if name in AVAILABLE}, of_all)


def _take(asked: Mapping[str, str], of_all: set[str]) -> None:
    for op, implementation in asked.items():
        names = {"reference", implementation}
        if DEFAULTS and torch.cuda.is_available():
            names |= {record[op] for record in DEFAULTS.values() if op in record}
            # not a decorator: it loads the compiler, which takes seconds
            torch.compiler.assume_constant_result(_recorded)
        for name in names.intersection(AVAILABLE[op]):
            try:
                _import(op, name)
            except ValueError as error:
                _unusable[op, name] = str(error)
        _requested[op] = implementation
        (_asked_of_all.add if op in of_all else _asked_of_all.discard)(op)


def _read(choice: str) -> dict[str, str]:
    """By op, what a choice for all of them asks for."""
    everywhere, asked = "auto", {}
    for place, entry in enumerate(choice.split(",")):
        op, named, implementation = (part.strip() for part in entry.partition("="))
        if named and op and implementation:
            asked[op] = implementation
        elif not named and op and place == 0:
            everywhere = op
        else:
            raise ValueError(f"kernels {choice!r} is no choice; write triton, or packed_attention=cuda,sinkhorn=triton")
    return dict.fromkeys(AVAILABLE, everywhere) | asked


def _named(choice: str) -> set[str]:
    """The ops that a choice names."""
    return {entry.partition("=")[0].strip() for entry in choice.split(",") if "=" in entry}


def chosen(op: str, device: torch.device) -> str:
    """The implementation that `op` runs on `device`; ValueError when one was asked of it that does not exist."""
    if _fault:
        raise ValueError(f"{_fault} (TESSERA_KERNELS)")
    requested = _requested[op]
    if requested == "auto" or (op in _asked_of_all and requested not in AVAILABLE[op] and requested in IMPLEMENTATIONS):
        return _recorded(op, device.type) if DEFAULTS else "reference"
    if requested not in AVAILABLE[op]:
        raise ValueError(_missing(op, requested, AVAILABLE[op]))
    obstacle = _obstacle(op, requested, device)
    if obstacle:
        raise ValueError(obstacle)
    return requested


def check(device: torch.device | str) -> None:
    """ValueError when an op cannot run on `device` what was asked of it."""
    for op in _requested:
        chosen(op, torch.device(device))


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
        lacks = ", which it has not" * (requested not in ("auto", *exist))
        lines.append(f"{op:<{width}}  {name}  (exists: {', '.join(exist)}; asked: {requested}{lacks})")
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
