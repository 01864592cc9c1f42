"""metrics.jsonl, the record of a run: one strict JSON object per line, append only.

Each line is handed to the system in one write, so that a crash leaves whole lines. Steps count finished updates through all
stages, from 1; a checkpoint of step g holds g updates. Whatever belongs to step g is logged before that checkpoint is
taken: then a resumed run's file equals an uninterrupted one's, but for `TIME_FIELDS`.
"""

import json
import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path

from engine.core.durable import write_file
from engine.core.json_text import parsed

TIME_FIELDS = ("time", "images_per_second", "mfu", "waiting_for_data")
OF_THE_LINE = ("step", "stage", "kind", "time", "not_finite")
RESERVED = ("step", "stage", "kind", "not_finite", *TIME_FIELDS)
KINDS = ("train", "probe", "event")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, oldest first, without lines that are torn by a crash, still being written, or not ours."""
    return [record for record in map(_parsed, path.read_bytes().splitlines()) if record is not None]


def values_of(record: Mapping) -> dict[str, float | str]:
    """What was logged as one record: its values without the line's own fields, numbers that aren't finite as they were."""
    odd = record.get("not_finite", {})
    return {
        name: float(odd.get(name, "nan")) if v is None else v for name, v in record.items() if name not in OF_THE_LINE
    }


def keep_until(path: Path, last_step: float) -> None:
    """Cut off the lines of later steps, and lines that are torn."""
    content = path.read_bytes()
    lines = [line for line in content.splitlines() if (record := _parsed(line)) and record["step"] <= last_step]
    kept = b"".join(line + b"\n" for line in lines)
    if kept != content:
        write_file(path, lambda aside: aside.write_bytes(kept))


class MetricsFile:
    """A metrics.jsonl that is being written."""

    def __init__(self, path: Path):
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            keep_until(path, math.inf)
        self._file = path.open("ab")

    def append(self, record: Mapping) -> None:
        """Add one line, and hand it to the system."""
        self._file.write((json.dumps(strict(record), allow_nan=False) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """End the file, durably."""
        os.fsync(self._file.fileno())
        self._file.close()


def strict(values: Mapping) -> dict:
    """JSON has no NaN and no infinity: null stands for them, and "not_finite" tells which they were, by dotted name."""
    odd: dict[str, str] = {}

    def plain(value: object, name: str) -> object:
        if isinstance(value, Mapping):
            return {str(k): plain(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v, f"{name}.{i}") for i, v in enumerate(value)]
        if isinstance(value, bool):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            if math.isfinite(value):
                return float(value)
            odd[name] = str(float(value))
            return None
        return value

    found = plain(values, "")
    return found | {"not_finite": odd} if odd else found


def _parsed(line: bytes) -> dict | None:
    try:
        record = parsed(line)
    except ValueError:
        return None
    fields = {"step": int, "stage": str, "kind": str}
    ours = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return record if ours else None
