"""What --help shows: a line per flag, so that all of them fit on a screen."""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

NAMES, WIDTH = 19, 100  # columns: of the flags' names, and of a line


def short_help(kind: type, usage: str, groups: Mapping[str, Sequence[str]], also: str) -> str:
    """The flags of a dataclass in groups, each with the first clause of what is said of it and its default.

    Args:
        usage: the first line.
        groups: by heading, the names of fields; every field belongs to one.
        also: what stands at the end, such as where more is said.
    """
    said, defaults = _said(kind), {field.name: field.default for field in fields(kind)}
    lines = [usage]
    for heading, names in groups.items():
        lines += [f"{heading}:", *(_line(name, said[name], defaults[name]) for name in names)]
    return "\n".join([*lines, "", *textwrap.wrap(also, WIDTH)])


def _line(name: str, said: str, default: Any) -> str:
    flag = f"  --{name.replace('_', '-')}"
    first = re.split(r";|(?<=[a-z)])\.(?=\s|$)", said, maxsplit=1)[0].strip()
    shown = "" if default in (MISSING, "", (), False) else f" [{'on' if default is True else default}]"
    room = WIDTH - NAMES - 1 - len(shown)
    return f"{flag:{NAMES}} {textwrap.shorten(first, room, placeholder=' ...')}{shown}"


def _said(kind: type) -> dict[str, str]:
    """By field, the string that stands below it in the source, or the help of its annotation."""
    said = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    for field, below in zip(body, [*body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            said[field.target.id] = " ".join(below.value.value.split()) if is_text else ""
    for field in fields(kind):
        for note in getattr(field.type, "__metadata__", ()):
            said[field.name] = getattr(note, "help", None) or said[field.name]
    return said
