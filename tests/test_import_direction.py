"""Imports point one way, down the list of the house: an upper part knows the lower ones, never the reverse."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the entry points down to the kernels; parts on one line are equals and may use each other.
FLOORS = [
    {"study"},
    {"train", "eval", "plan", "dry_run", "codebook"},
    {"studies"},
    {"evals"},
    {"config"},
    {"recipes"},
    {"loop"},
    {"state"},
    {"step", "probe"},
    {"methods"},
    {"detection", "segmentation"},
    {"heads", "relations", "collapse", "corruption", "mixing", "patch_augmentation", "tokenizers"},
    {"vit"},
    {"tokens"},
    {"data"},
    {"metrics"},
    {"kernels"},
]
# Leaves import no other part, but errors and durable; whoever wants may import them.
LEAVES = {
    "errors",
    "flags",
    "durable",
    "host_memory",
    "dist",
    "draws",
    "masking",
    "optim",
    "checkpoint",
    "log",
    "weights",
    "pictures",
}
LEAVES_MAY_USE = {"dist": {"host_memory"}, "weights": {"vit"}, "pictures": {"log"}}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    return relative.parts[0] if relative.parts[0] == "kernels" else relative.parts[1]


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dotted = [node.module] if node.module != "engine" else [f"engine.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            first, _, rest = name.partition(".")
            if first == "kernels":
                parts.add("kernels")
            elif first == "engine" and rest:
                parts.add(rest.partition(".")[0])
    return parts


def arrows() -> list[tuple[str, str, Path]]:
    files = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return [
        (part_of(path), target, path)
        for path in files
        if part_of(path) != "__init__"
        for target in imported_parts(path)
        if target != part_of(path)
    ]


def test_every_part_has_a_place():
    floors = set().union(*FLOORS)
    assert {part for part, _, _ in arrows()} <= floors | LEAVES
    assert not floors & LEAVES


def test_imports_point_down():
    floor_of = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for part, target, path in arrows()
        if part in floor_of and target in floor_of and floor_of[target] < floor_of[part]
    ]
    assert not wrong


def test_leaves_stay_leaves():
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for part, target, path in arrows()
        if part in LEAVES and target not in LEAVES_MAY_USE.get(part, set()) | {"errors", "durable"}
    ]
    assert not wrong


def test_kernels_know_nothing_of_the_engine():
    assert all(part != "kernels" for part, _, _ in arrows())
