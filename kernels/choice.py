"""The one choice between an op's implementations: plain torch (reference), plain torch that the compiler
sees through (plain), Triton, CUDA C++, and what others have made.

An implementation exists when its file does: `kernels/OP/triton.py` makes "triton" available for OP, and nothing else
needs to know. What its import lacks is why it cannot run here. A module that is for GPUs only says NEEDS_GPU = True;
Triton's are known by their functions, which a CPU may interpret.

What is asked for by name is read when an op is called or traced, so a compiled graph carries it as a constant, `use` makes the
compiler trace again, and no choice ever breaks a graph. What "auto" means stands in a table, by registered op and class of
shapes, that calibration on this very kind of device has filled (`kernels.calibrate`) and that is frozen before the first step:
without one, auto is the reference.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

IMPLEMENTATIONS = ("reference", "plain", "written", "flash", "efficient", "cudnn", "xformers", "apex", "triton", "cuda")
AVAILABLE: dict[str, tuple[str, ...]] = {
    folder.name: tuple(name for name in IMPLEMENTATIONS if (folder / f"{name}.py").is_file())
    for folder in sorted(Path(__file__).parent.iterdir())
    if (folder / "reference.py").is_file()
}

AUTO = "auto"
# An implementation by class of shapes, by registered op, as in {"packed_attention_forward": {"bfloat16 D64 L197": "triton"}}
Table = Mapping[str, Mapping[str, str]]


class Registered(NamedTuple):
    """What stands behind a name that is registered with torch."""

    op: str
    """The folder that registers it."""
    shape_class: Callable[..., str] | None
    """Of its arguments but the implementation, those that decide which is fastest; None where it follows another's choice."""
    body: Callable[..., Any]
    """What runs behind the dispatcher."""


CALLS: dict[str, Registered] = {}  # by that name; filled by `kernels.registration`

# what auto means on devices of this type; whatever has no entry runs the reference
_frozen: dict[str, dict[str, str]] = {}
_frozen_for = ""
# by op, what was asked for, and whether it was asked of all ops: then one that lacks it runs what auto means
_requested: dict[str, str] = {}
_asked_of_all: set[str] = set()
_fault = ""  # what is wrong with the environment variable; told by the first call, since it must not break an import
_modules: dict[tuple[str, str], ModuleType] = {}
_needs_gpu: set[tuple[str, str]] = set()
_unusable: dict[tuple[str, str], str] = {}
_listing = False


def use(choice: str, op: str | None = None) -> None:
    """Choose the implementation that ops run from now on; the environment variable TESSERA_KERNELS does the same.

    Args:
        choice: "auto" (what a record has shown to be fastest on the device, else the reference) or one of IMPLEMENTATIONS.
            Without `op` also a list by op, such as "packed_attention=cuda,sinkhorn=triton", where the others run what stands
            without a name in front ("triton,sinkhorn=reference"), or auto.
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
            bring(name, implementation)
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
        if implementation != AUTO and implementation not in exist:
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
    _take({name: AUTO for name in AVAILABLE} | {name: asked[name] for name in asked if name in AVAILABLE}, of_all)


def _take(asked: Mapping[str, str], of_all: set[str]) -> None:
    for op, implementation in asked.items():
        for name in {"reference", implementation}.intersection(AVAILABLE[op]):
            try:
                bring(op, name)
            except ValueError as error:
                _unusable[op, name] = str(error)
        _requested[op] = implementation
        (_asked_of_all.add if op in of_all else _asked_of_all.discard)(op)


def _read(choice: str) -> dict[str, str]:
    """By op, what a choice for all of them asks for."""
    everywhere, asked = AUTO, {}
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


def freeze(table: Table, device_type: str) -> None:
    """From now on "auto" means, for tensors on devices of this type ("cuda", "cpu"), what the table says of an op and a class
    of shapes, and the reference where it says nothing. An empty table makes auto the reference everywhere.

    Raises:
        ValueError: for an implementation in it that the op has not, or that cannot be imported here; nothing is changed then.
    """
    global _frozen_for
    for call, by_class in table.items():
        op = op_of(call)
        for implementation in set(by_class.values()):
            if implementation not in AVAILABLE[op]:
                raise ValueError(_missing(op, implementation, AVAILABLE[op]))
            bring(op, implementation)
    _frozen.clear()
    _frozen.update({call: dict(by_class) for call, by_class in table.items()})
    _frozen_for = device_type


def frozen() -> dict[str, dict[str, str]]:
    """The table that `freeze` was given last."""
    return {call: dict(by_class) for call, by_class in _frozen.items()}


def left_to_auto() -> set[str]:
    """The ops that nothing else was asked for than auto."""
    return {
        op for op, asked in _requested.items() if asked == AUTO or (op in _asked_of_all and asked not in AVAILABLE[op])
    }


def usable(call: str, implementation: str, device: torch.device) -> str:
    """Why a registered op cannot run an implementation on the device, in words; empty where it can. Imports it."""
    try:
        op = op_of(call)
        if implementation not in AVAILABLE[op]:
            return f"{op} has it no more"
        bring(op, implementation)
    except ValueError as error:
        return str(error)
    return _obstacle(op, implementation, device)


def op_of(call: str) -> str:
    """The op whose folder registers `call` and leaves it to the table. ValueError for another name."""
    if call not in CALLS or CALLS[call].shape_class is None:
        raise ValueError(f"no kernel leaves {call!r} to calibration")
    return CALLS[call].op


def chosen(op: str, device: torch.device, call: str = "", shape_class: str | None = None) -> str:
    """The implementation that `op` runs on `device`; ValueError when one was asked of it that does not exist.

    Args:
        op: by its folder's name.
        device: where its tensors are.
        call: the name under which the op is registered, for the frozen table.
        shape_class: of the call's tensors, for the frozen table. None leaves that to the registered op, which knows the shapes
            when it runs: the answer may then be "auto", for `resolved`.
    """
    if _listing:
        return AUTO
    if _fault:
        raise ValueError(f"{_fault} (TESSERA_KERNELS)")
    requested = _requested[op]
    if requested == AUTO or (op in _asked_of_all and requested not in AVAILABLE[op] and requested in IMPLEMENTATIONS):
        if device.type != _frozen_for:
            return "reference"
        return AUTO if shape_class is None else resolved(call, shape_class)
    if requested not in AVAILABLE[op]:
        raise ValueError(_missing(op, requested, AVAILABLE[op]))
    obstacle = _obstacle(op, requested, device)
    if obstacle:
        raise ValueError(obstacle)
    return requested


@contextmanager
def listed() -> Iterator[None]:
    """Inside, every op goes through what it registers with torch, also where the reference would be traced through: who watches
    the dispatcher sees all calls. For fake tensors: nothing could be run."""
    global _listing
    _listing = True
    try:
        yield
    finally:
        _listing = False


def resolved(call: str, shape_class: str) -> str:
    """What a registered op runs that was given "auto": the frozen table's word, read when the op runs, so that no compiled graph
    depends on it."""
    return _frozen.get(call, {}).get(shape_class, "reference")


def check(device: torch.device | str) -> None:
    """ValueError when an op cannot run on `device` what was asked of it."""
    for op in _requested:
        chosen(op, torch.device(device))


def load(op: str, implementation: str) -> ModuleType:
    """The module `kernels.OP.IMPLEMENTATION`; it was imported when it was asked for, since a trace cannot import."""
    return _modules[op, implementation]


def describe(device: torch.device | str = "cpu") -> str:
    """One line per op, in alphabetical order: which implementation runs on `device`, by class of shapes where a table says so,
    and which exist."""
    device, width = torch.device(device), max(map(len, AVAILABLE))
    lines = []
    for op, exist in AVAILABLE.items():
        requested = _requested[op]
        try:
            name = chosen(op, device, shape_class="")
        except ValueError:
            name = f"none ({requested} asked)"
        lacks = ", which it has not" * (requested not in (AUTO, *exist))
        frozen_in = {call: by_class for call, by_class in _frozen.items() if CALLS[call].op == op}
        if frozen_in and device.type == _frozen_for and (requested == AUTO or lacks):
            name = (
                ", ".join(
                    f"{call.removeprefix(f'{op}_')} {shape_class}: {implementation}"
                    for call, by_class in frozen_in.items()
                    for shape_class, implementation in by_class.items()
                )
                + ", else reference"
            )
        lines.append(f"{op:<{width}}  {name}  (exists: {', '.join(exist)}; asked: {requested}{lacks})")
    return "\n".join(lines)


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


def bring(op: str, implementation: str) -> ModuleType:
    """Import an implementation, so that a trace or a run may use it. ValueError where what it needs is not there."""
    try:
        module = importlib.import_module(f"kernels.{op}.{implementation}")
    except ImportError as error:
        raise ValueError(f"it cannot be imported: {error}") from error
    _modules[op, implementation] = module
    _unusable.pop((op, implementation), None)
    # a function that Triton interprets has another type than one that it compiles
    jitted = any(type(value).__name__ == "JITFunction" for value in vars(module).values())
    if jitted or getattr(module, "NEEDS_GPU", False):
        _needs_gpu.add((op, implementation))
    return module


def _missing(op: str | None, implementation: str, exist: Iterable[str]) -> str:
    owner = "no kernel has an" if op is None else f"{op} has no"
    names = ", ".join((AUTO, *(name for name in IMPLEMENTATIONS if name in exist)))
    return f"{owner} implementation {implementation!r}; choose from {names} (kernels.use or TESSERA_KERNELS)"
