"""Command-line flags from dataclasses, by tyro; what does not parse becomes one sentence."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

from engine.errors import BadInput


def read(kind: Any, arguments: Sequence[str], **options: Any) -> Any:
    """The dataclass `kind` filled from the arguments; `options` go to `tyro.cli`.

    Raises:
        BadInput: a flag does not exist, or its value does not parse.
        SystemExit: status 0 after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), **options)
    except SystemExit as leave:
        if leave.code:
            raise BadInput(_one_sentence(said.getvalue())) from None
        raise


def _one_sentence(box: str) -> str:
    """What tyro draws as a box, in one line: its first section, without frame."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    # Our own sentences already say what they are about.
    sentence = re.sub(r"^Error parsing ([^-:][^:]*: )?", "", " ".join(filter(None, lines[:end])))
    return sentence if sentence.endswith(".") else f"{sentence}; --help lists all flags and their choices."
