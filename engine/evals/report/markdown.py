"""A report in Markdown, as GitHub reads it: results.md beside the pictures it shows."""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from engine.evals.report.compare import NOTE, Compared
from engine.evals.report.content import INTERVALS, Band, Content, Row, Section
from engine.evals.report.figures import Cell, change, text
from engine.evals.report.pictures import Picture


def render(whole: Content) -> str:
    """The whole report."""
    parts = [f"# {said(whole.title)}", f"Evaluated {whole.date}."]
    parts += [_band(band) for band in whole.bands]
    parts.append(INTERVALS)
    if whole.differences:
        parts += ["## Differences", said(NOTE.format(first=whole.weights[0])), _differences(whole.differences)]
    for section in whole.sections:
        parts += _section(section)
    if whole.maps:
        parts += ["## Test features in two dimensions", _pictures(whole.maps)]
    if whole.unreadable:
        parts += ["## Unreadable images, left out", grid(["image", "reason"], whole.unreadable)]
    parts.append("## How it was run")
    facts = whole.run | whole.machine | whole.versions
    parts.append(
        grid(["", ""], [(name, text(value)) for name, value in facts.items() if value not in ("", [], (), None)])
    )
    return "\n\n".join(parts) + "\n"


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """A table of plain text; the last `right` columns are numbers."""
    return _lines([said(name) for name in columns], [[said(each) for each in row] for row in rows], right)


def said(words: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(words.split()))


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int) -> str:
    marks = ["---"] * (len(columns) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, marks, *rows))


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    value = f"**{cell}**" if cell.best else str(cell)
    return f"{value} {said(cell.interval)}".strip()


def _band(band: Band) -> str:
    columns = ["weights", *(said(f"{protocol} {figure}") for protocol, figure in band.columns)]
    return _lines(columns, [[said(name), *map(_cell, row)] for name, row in band.rows.items()], len(band.columns))


def _differences(compared: Sequence[Compared]) -> str:
    rows = [(each.protocol, each.figure, each.weights, *change(each)) for each in compared]
    return grid(["protocol", "figure", "weights", "", "difference", ""], rows)


def _section(section: Section) -> list[str]:
    parts = [f"## {said(section.protocol)}"] + ([said(section.about)] if section.about else [])
    figures = [[said(name), *map(_cell, cells)] for name, cells in section.figures.items()]
    parts.append(_lines(["figure", *map(said, section.weights)], figures, len(section.weights)))
    parts.append(_over_weights(section.facts, section.weights))
    for picture in section.pictures.values():
        parts.append(_pictures(picture))
    if section.ours:
        parts += ["Proposals, or ours, not published as such:", _over_weights(section.ours, section.weights)]
    for title, found in section.tables.items():
        for weights, columns, rows in found:
            parts += [f"{said(title)} ({said(weights)}):", grid(columns, rows, len(columns) - 1)]
    for weights, name, note in section.notes:
        parts.append(f"{said(name)} ({said(weights)}): {said(note)}")
    if section.settings:
        parts += ["Settings:", _over_weights(section.settings, section.weights)]
    parts += [f"{said(weights)}:\n```\n{command}\n```" for weights, command in section.commands.items()]
    return parts


def _over_weights(rows: Sequence[Row], weights: Sequence[str]) -> str:
    """One column where all weights agree, else one for each."""
    if all(row.same for row in rows):
        return grid(["", ""], [(row.name, row.texts[0]) for row in rows])
    return grid(["", *weights], [(row.name, *row.texts) for row in rows])


def _pictures(pictures: Sequence[Picture]) -> str:
    """Side by side, under the names of their weights."""
    shown = [f"![{said(picture.alt)}]({quote(picture.file)})" for picture in pictures]
    return f"{said(pictures[0].title)}:\n\n" + _lines([said(picture.weights) for picture in pictures], [shown], 0)
