"""Figures as text: what stands in a cell of any table, on the screen, in Markdown and in HTML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.evals.report.compare import SAMPLES, SEEDS, Compared
from engine.evals.result import Result, interval

UNDEFINED = "–"

Key = tuple[str, str]  # protocol and figure


@dataclass(frozen=True)
class Cell:
    """A figure of one result.

    Args:
        value: to sort by; None where it is not defined.
        text, unit, spread, interval: "96.4", "%", "± 1.2", "[95.0, 97.6]"; the last three may be empty.
        best: none of the other weights is better.
    """

    value: float | None
    text: str
    unit: str = ""
    spread: str = ""
    interval: str = ""
    best: bool = False

    def __str__(self):
        return " ".join(filter(None, (self.text, self.spread, self.unit)))


def number(value: float | None, plain: bool, sign: str = "") -> str:
    """Fractions in percent with a decimal, plain ones with three, large ones with none."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    value, digits = (value, 3 if abs(value) < 1000 else 0) if plain else (100 * value, 1)
    value = round(value, digits)
    return f"{value:{sign if value else ''},.{digits}f}".removeprefix("" if value else "-")


def bracket(bounds: tuple[float, float] | None, plain: bool, sign: str = "") -> str:
    """An interval: "[95.0, 97.6]", or nothing."""
    return "" if bounds is None else f"[{number(bounds[0], plain, sign)}, {number(bounds[1], plain, sign)}]"


def cell(result: Result, name: str, bounds: tuple[float, float] | None = None) -> Cell:
    """One figure of a result, with its spread and its interval where there are any."""
    value, plain = result.values[name], name in result.plain
    if value is None or not math.isfinite(value):
        return Cell(None, UNDEFINED)
    spread = result.values.get(f"{name} std")
    spread = "" if spread is None else f"± {number(spread, plain)}"
    return Cell(value, number(value, plain), "" if plain else "%", spread, bracket(bounds, plain))


def intervals(result: Result) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of all figures that have samples."""
    found = {name: interval(samples_m) for name, samples_m in result.samples.items() if name in result.values}
    return {name: bounds for name, bounds in found.items() if bounds is not None}


def cells(results: Sequence[Result], headline: bool = False) -> dict[str, dict[Key, Cell]]:
    """By weights: (protocol, figure) -> cell; only the figures of the summary with `headline`."""
    shown: dict[str, dict[Key, Cell]] = {}
    for result in results:
        row = shown.setdefault(result.weights, {})
        for name in result.shown if headline else result.values:
            if not name.endswith(" std"):
                row[result.protocol, name] = cell(result, name)
    return shown


def keys(shown: Mapping[str, Mapping[Key, Cell]]) -> list[Key]:
    """All (protocol, figure) of some cells, protocols together, in the order of their first appearance."""
    found = list(dict.fromkeys(key for row in shown.values() for key in row))
    protocols = list(dict.fromkeys(protocol for protocol, _ in found))
    return sorted(found, key=lambda key: protocols.index(key[0]))


def mark_best(cells: Sequence[Cell | None], lower: bool) -> list[Cell | None]:
    """The same cells of one figure, the best of them marked, unless all read the same."""
    known = [each for each in cells if each is not None and each.value is not None]
    if len({each.text for each in known}) < 2:
        return list(cells)
    best = (min if lower else max)(known, key=lambda each: each.value).text
    return [each and replace(each, best=each.text == best) for each in cells]


def change(compared: Compared) -> tuple[str, str, str]:
    """A difference as its arrow (where it is sure), its number and what is known about it, in words."""
    arrow = "" if not compared.sure else "▲" if compared.mean > 0 else "▼"
    if compared.over == SAMPLES:
        known = f"{bracket(compared.interval, compared.plain, '+') or 'no interval,'} n = {compared.count:,}"
    elif compared.over == SEEDS:
        known = f"± {number(compared.spread, compared.plain)} over {compared.count} seeds"
    else:
        known = "no interval"
    return arrow, number(compared.mean, compared.plain, "+"), known


def text(value: Any) -> str:
    """A setting or detail in words."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return " ".join(map(text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else UNDEFINED
    return "none" if value is None or value == "" else str(value)


def table_cell(value: Any, first: bool, plain: bool) -> str:
    """What stands in a table of a result's details: the first column and whole numbers as they are, fractions in percent."""
    if isinstance(value, float) and not first and not plain:
        shown = number(value, False)
        return shown if shown == UNDEFINED else f"{shown} %"
    return text(value)


def tables(result: Result) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Of a result's details the lists of dicts: title -> (columns, rows of text)."""
    found = {}
    for title, rows in result.details.items():
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            found[title] = (
                columns,
                [
                    [
                        table_cell(row[column], place == 0, column in result.plain) if column in row else ""
                        for place, column in enumerate(columns)
                    ]
                    for row in rows
                ],
            )
    return found
