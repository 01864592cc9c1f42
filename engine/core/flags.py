"""Command-line flags from dataclasses, by tyro; what does not parse becomes one sentence."""

import contextlib
import io
import re
import threading
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import tyro

from engine.core.errors import BadInput

_ALONE = threading.Lock()  # tyro's caches, and stderr, belong to all threads
_SUPPRESSED = tyro.conf.Suppress[int].__metadata__[0]


def read(kind: Any, arguments: Sequence[str], **options: Any) -> Any:
    """The dataclass `kind` filled from the arguments; `options` go to `tyro.cli`.

    Raises:
        BadInput: a flag does not exist, or its value does not parse.
        SystemExit: status 0 after --help.
    """
    said = io.StringIO()
    try:
        with _ALONE, contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), **options)
    except SystemExit as leave:
        if leave.code:
            raise BadInput(_one_sentence(said.getvalue())) from None
        raise


def written(chosen: Any, prefix: str = "") -> list[str]:
    """The arguments that `read` makes this dataclass of again: every flag whose value is not its default, after `prefix`."""
    arguments: list[str] = []
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value == default or _SUPPRESSED in getattr(field.type, "__metadata__", ()):
            continue
        name = f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(value):
            arguments += written(value, f"{name}.")
        elif isinstance(value, bool):
            # tyro writes the "no" behind the last dot
            before, dot, last = name.rpartition(".")
            arguments.append(f"--{name}" if value else f"--{before}{dot}no-{last}")
        else:
            arguments += [f"--{name}", *(map(str, value) if isinstance(value, (tuple, list)) else [str(value)])]
    return arguments


def _one_sentence(box: str) -> str:
    """What tyro draws as a box, in one line: its first section, without frame."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    # Our own sentences already say what they are about.
    sentence = re.sub(r"^Error parsing ([^-:][^:]*: )?", "", " ".join(filter(None, lines[:end])))
    return sentence if sentence.endswith(".") else f"{sentence}; --help lists all flags and their choices."
