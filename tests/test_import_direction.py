"""Imports point one way, down the floors of the house, and nowhere in a circle: neither between rooms nor between files."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"train", "eval", "study", "plan", "replay", "codebook", "export", "shard"}
# From the commands down to the kernels; a room may use those below it, not those beside it.
FLOORS = [
    COMMANDS,
    {"studies"},
    {"evals", "planning"},
    {"training"},
    {"recipes"},
    {"methods"},
    {"model", "data"},
    {"core", "kernels", "null_device"},
]
MOST_IN_ROOT = 10  # folders, and files
LONGEST = 450  # lines of a file outside the kernels
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The folder under engine, the command, or kernels."""
    first, *rest = module.split(".")
    return first if first == "kernels" or not rest else rest[0]


FILES = {name_of(path): path for folder in ("engine", "kernels") for path in (ROOT / folder).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of this house that a file imports, wherever in it. `from package import name` means the module of that name
    where there is one, else the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            members = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in FILES else node.module for member in members.values()}
    return {module for module in found if module in FILES}


ARROWS = {module: imported(path) - {module} for module, path in FILES.items()}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle among the arrows, or nothing."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in FILES} - {"engine"}
    assert rooms == set(FLOOR_OF)


def test_imports_point_down():
    wrong = [
        f"{module} imports {target}"
        for module, targets in ARROWS.items()
        for target in targets
        if room_of(module) != room_of(target) and FLOOR_OF[room_of(target)] <= FLOOR_OF[room_of(module)]
    ]
    assert not wrong


def test_no_circle_between_files():
    assert not circle(ARROWS)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_the_root_can_be_taken_in_at_a_glance():
    entries = [path for path in (ROOT / "engine").iterdir() if path.name != "__pycache__"]
    assert sum(path.is_dir() for path in entries) <= MOST_IN_ROOT
    assert sum(path.is_file() for path in entries) <= MOST_IN_ROOT


@pytest.mark.parametrize("module", sorted(module for module in FILES if room_of(module) != "kernels"))
def test_no_file_is_too_full(module: str):
    assert len(FILES[module].read_text().splitlines()) <= LONGEST


def test_what_only_a_model_needs_is_not_waited_for_before_one_is_wanted():
    """timm brings torchvision and torch's compiler, which take longer than all else that --help needs."""
    slow = ("timm", "torchvision", "torch._dynamo")
    code = f"import sys, engine.train, engine.plan; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
