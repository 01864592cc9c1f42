"""What README, CONTRIBUTING and docs/ name exists: linked files and headings, paths, modules, and every flag of every command.

Commands are read by the parsers that the commands themselves use; nothing is run, and no file that a command names need exist.
"""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import fields as settings_of
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine import codebook, evals, export, methods, plan, replay, shard
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.evals import command_line
from engine.studies.conduct import command_line as study
from engine.training import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("engine", "kernels", "benchmarks", "docs", "tests", "csrc")
BENCHMARKS = ("gpu", "throughput", "multicrop", "detection_attention", "saving")
ELSEWHERE = {
    "--help",
    "--help-method",
    "--help-all",
    "--group",
    "--build",
}  # of uv and cmake, and those that only show help
OTHER_COMMANDS = {"&&", "|", ">", ";"}
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z]{2,}")


@dataclass(frozen=True)
class Page:
    """A Markdown file, taken apart.

    Attributes:
        path: where it lies; links are relative to its folder.
        text: without its code blocks.
        blocks: the lines of the code blocks, those that a backslash continues joined.
    """

    path: Path
    text: str
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, content: str) -> "Page":
        blocks = [block.group().split("\n", 1)[1].rsplit("\n", 1)[0] for block in FENCE.finditer(content)]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        return cls(path, FENCE.sub("", content), tuple(lines))

    @property
    def inline(self) -> tuple[str, ...]:
        """What stands in backticks; line breaks inside are spaces."""
        return tuple(" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.text))

    @property
    def anchors(self) -> set[str]:
        """Of the headings, as GitHub makes them."""
        found: dict[str, int] = {}
        for heading in re.findall(r"^#{1,6} +(.*?) *#*$", self.text, re.MULTILINE):
            shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
            anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            found[anchor] = found.get(anchor, -1) + 1
            if found[anchor]:
                found[f"{anchor}-{found[anchor]}"] = 0
        return set(found)

    def faults(self) -> list[str]:
        """What is named and isn't there, in words."""
        code = (*self.blocks, *self.inline)
        wrong = [*self._links(), *(fault for line in code for fault in (*paths(line), *command(line)))]
        return wrong + [fault for words in self.inline for fault in lone_flag(words)]

    def _links(self) -> Iterator[str]:
        prose = re.sub(r"(?<!`)`[^`]+`(?!`)", "", self.text)
        targets = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r'(?:href|src)="([^"]+)"', prose)
        for target in targets:
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = self.path.parent / name if name else self.path
            if not file.exists():
                yield f"no file {target}"
            elif anchor and anchor not in (self if file == self.path else Page.of(file, file.read_text())).anchors:
                yield f"no heading for {target}"


def paths(line: str) -> Iterator[str]:
    """Of a piece of code: paths into this repository that lead nowhere. Capitals stand for any name."""
    for word in re.split(r"[\s=]+", line):
        path = word.strip("'\"(),;:").partition("::")[0]
        if not path.startswith(tuple(f"{room}/" for room in ROOMS)) or (ROOT / path).exists():
            continue
        if not (PLACEHOLDER.search(path) and any(ROOT.glob(PLACEHOLDER.sub("*", path.rstrip("/"))))):
            yield f"no path {path}"


def command(line: str) -> Iterator[str]:
    """Of a piece of code: a module that is none, or a command whose flags its own parser refuses."""
    if not re.search(rf"-m ({'|'.join(ROOMS)})\.", line):
        return
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if word == "-m" and words[i + 1].partition(".")[0] in ROOMS)
    module, arguments = words[start + 1], words[start + 2 :]
    end = next((i for i, word in enumerate(arguments) if word in OTHER_COMMANDS), len(arguments))
    arguments = [word for word in arguments[:end] if word not in ("...", "--help")]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        yield f"no module {module} in: {line}"
    elif arguments and module in PARSERS:
        try:
            PARSERS[module](arguments)
        except BadInput as error:
            yield f"{line}: {error}"


def _train(arguments: Sequence[str]) -> None:
    """--resume reads a folder, which isn't there: what stands beside it is read as of a new run. Capitals stand for a name."""
    words = list(arguments)
    if "--resume" in words:
        place = words.index("--resume")
        assert words[place + 1 : place + 2], "--resume names no folder"
        del words[place : place + 2]
    config.parse(["mae" if PLACEHOLDER.fullmatch(word) else word for word in words])


def _eval(arguments: Sequence[str]) -> None:
    named = {"--weights", "--compare"} & set(arguments)
    command_line.parse([*arguments, *([] if named else ["--weights", "raw"])])


def _study(arguments: Sequence[str]) -> None:
    study.parse([word if word != "NAME" else "methods" for word in arguments])


def _codebook(arguments: Sequence[str]) -> None:
    read(codebook.Fit, arguments)


def _replay(arguments: Sequence[str]) -> None:
    read(replay.Replay, arguments)


def _export(arguments: Sequence[str]) -> None:
    read(export.Export, arguments)


def _shard(arguments: Sequence[str]) -> None:
    read(shard.Shards, arguments)


PARSERS: dict[str, Callable[[Sequence[str]], None]] = {
    "engine.train": _train, "engine.eval": _eval, "engine.study": _study, "engine.codebook": _codebook,
    "engine.export": _export, "engine.plan": plan.parse, "engine.replay": _replay, "engine.shard": _shard,
}  # fmt: skip


def _known_flags() -> set[str]:
    """Every flag of every command here, with hyphens, and those that switch one off."""
    benchmarks = [importlib.import_module(f"benchmarks.{name}").Options for name in BENCHMARKS]
    commands = (config.Train, command_line.Eval, study.Flags, codebook.Fit, export.Export, plan.Flags, replay.Replay)
    kinds = [("", kind) for kind in (*commands, shard.Shards, *benchmarks)]
    kinds += [(f"{name}.", methods.get(name).Settings) for name in methods.names()]
    kinds += [(f"{name}.", evals.protocol(name).Settings) for name in evals.protocols()]
    named = {(prefix, field.name) for prefix, kind in kinds for field in settings_of(kind)}
    return {f"--{prefix}{no}{name}".replace("_", "-") for prefix, name in named for no in ("", "no-")} | ELSEWHERE


KNOWN_FLAGS = _known_flags()


def lone_flag(words: str) -> Iterator[str]:
    """Of what stands in backticks: flags that belong to no command here, where no command is named before them."""
    if words.startswith("--"):
        for flag in re.findall(r"(?<!\S)(--[a-z][\w.-]*)", words):
            if flag.replace("_", "-") not in KNOWN_FLAGS:
                yield f"no flag {flag}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_exists(path: Path):
    assert Page.of(path, path.read_text()).faults() == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[x](no_such.md)", "no file no_such.md"),
        ("![x](docs/none.png)", "no file docs/none.png"),
        ('<img src="docs/none.png">', "no file docs/none.png"),
        ("[x](docs/kernels.md#no-such-heading)", "no heading for docs/kernels.md#no-such-heading"),
        ("# One\n[x](#two)", "no heading for #two"),
        ("`engine/none.py`", "no path engine/none.py"),
        ("`engine/recipes/NAME.cpp`", "no path engine/recipes/NAME.cpp"),
        ("```\npytest tests/none/test_x.py\n```", "no path tests/none/test_x.py"),
        ("`python -m engine.none`", "no module engine.none"),
        ("`python -m benchmarks.none --x`", "no module benchmarks.none"),
        ("```\nuv run python -m engine.train --method mae \\\n  --mea.epochs 3\n```", "--mea.epochs"),
        ("```\nuv run torchrun --nproc-per-node 8 -m engine.train --method mea\n```", "'mea'"),
        ("`python -m engine.train --resume runs/x --no-such-flag`", "--no-such-flag"),
        ("`python -m engine.train --method dino --mae.epochs 3`", "--mae.epochs"),
        ("`python -m engine.eval --weights x --protocol nearest`", "nearest"),
        ("`python -m engine.eval --protocol knn --knn.neighbours 3`", "--knn.neighbours"),
        ("`python -m engine.study none`", "'none'"),
        ("`python -m engine.codebook --code 3`", "--code"),
        ("`--mae.epoch 3`", "no flag --mae.epoch"),
    ],
)
def test_what_is_not_there_is_found(content: str, fault: str):
    (found,) = Page.of(ROOT / "README.md", content).faults()
    assert fault in found


def test_what_is_there_is_let_pass():
    content = """
# One `code` & [two](README.md): *three*
# Twice
# Twice
[a](#one-code--two-three) [b](#twice-1) [c](docs/kernels.md#sinkhorn) [d](https://example.org/x#y) `[e](none.md)`
`engine/recipes/NAME.py` `kernels/OP/` `benchmarks/kernels/bench_OP.py` `--mim_cluster.class-weight 0` `--no-evaluate`
`python -m engine.train ...` and `python -m
engine.study NAME`
```
pip install uv && uv run python -m engine.train --method maect --compile   # --not-read
uv run torchrun --nproc-per-node 8 -m engine.train --method dino --data /no/such --weights none.pth \\
  --dino.local-crops 2 > out.txt
python -m engine.train --resume runs/none --threads 2
python -m engine.eval --weights runs/A runs/B --protocol all --seeds 3
```
"""
    assert Page.of(ROOT / "README.md", content).faults() == []
