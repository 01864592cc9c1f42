"""What a report says, before it is put into HTML, Markdown or JSON."""

import inspect
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.core.extras import Extras
from engine.evals import registry
from engine.evals.features import Features
from engine.evals.report import environment, pictures
from engine.evals.report.compare import Compared, compared
from engine.evals.report.figures import Cell, Key, cell, intervals, mark_best, tables, text
from engine.evals.report.pictures import Picture
from engine.evals.result import Result

COLUMNS = 7  # of a band of the summary: as many as a page holds
INTERVALS = (
    "± is a deviation; every protocol's section says over what. A bracket is the 95 % bootstrap interval over test samples: what "
    "other test images or objects might have shown, not what other training runs might."
)
_OURS = re.compile(r"\bproposal\b|\bours\b|^after (?!the\b)", re.IGNORECASE)
_TITLED = 3  # weights named in the title
_FEW = 12  # figures of a protocol that are read at once


@dataclass(frozen=True)
class Row:
    """One line of a table over weights: a text for each, or a single one where all are the same."""

    name: str
    texts: list[str]

    @property
    def same(self) -> bool:
        return len(set(self.texts)) == 1


@dataclass(frozen=True)
class Band:
    """Some columns of the summary, protocols together.

    Args:
        columns: (protocol, figure).
        rows: by weights, one cell or None per column.
    """

    columns: list[Key]
    rows: dict[str, list[Cell | None]]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The protocols and how many columns each has."""
        protocols = [protocol for protocol, _ in self.columns]
        return [(name, protocols.count(name)) for name in dict.fromkeys(protocols)]


@dataclass(frozen=True)
class Section:
    """All about one protocol.

    Args:
        about: what it is, one sentence.
        weights: that were judged by it.
        figures: by name, one cell or None for each weights.
        headline: the names that the summary shows; all where there are few.
        differences: of all figures to the first weights.
        facts, settings: one row for each, over the weights.
        ours: the settings that say they are no published ones.
        tables: by title, (weights, columns, rows).
        notes: (weights, name, text) of the other details.
        pictures: by title, those of all weights.
        commands: by weights.
    """

    protocol: str
    about: str
    weights: list[str]
    figures: dict[str, list[Cell | None]]
    headline: list[str]
    differences: list[Compared]
    facts: list[Row]
    settings: list[Row]
    ours: list[Row]
    tables: dict[str, list[tuple[str, list[str], list[list[str]]]]]
    notes: list[tuple[str, str, str]]
    pictures: dict[str, list[Picture]]
    commands: dict[str, str]


@dataclass(frozen=True)
class Content:
    """All of a report; see `content`."""

    title: str
    date: str
    weights: list[str]
    bands: list[Band]
    differences: list[Compared]
    sections: list[Section]
    maps: list[Picture]
    unreadable: list[tuple[str, str]]
    run: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    results: Sequence[Result] = field(repr=False)
    features: Mapping[str, tuple[Features, Features]] = field(repr=False)
    intervals: dict[tuple[str, str], dict[str, tuple[float, float]]] = field(repr=False)
    pictures: list[Picture] = field(repr=False)
    commands: Mapping[tuple[str, str], str] = field(repr=False)


def content(
    results: Sequence[Result],
    run: Mapping[str, Any],
    features: Mapping[str, tuple[Features, Features]],
    extras: Extras,
    map_kind: str = "pca",
    commands: Mapping[tuple[str, str], str] | None = None,
) -> Content:
    """Put together what the report on these results says; draws the pictures.

    Args:
        run: what was asked for, JSON-able.
        features: of test images, by weights, to be shown as a map.
        extras: each picture is one of them.
        map_kind: a key of `charts.MAPS`.
        commands: by weights and protocol, what repeats a result.
    """
    weights = list(dict.fromkeys(result.weights for result in results))
    protocols = list(dict.fromkeys(result.protocol for result in results))
    bounds = {(result.weights, result.protocol): intervals(result) for result in results}
    drawn = pictures.draw(results, features, extras, map_kind)
    run = dict(run)
    return Content(
        title=_title(weights),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
        weights=weights,
        bands=_bands(results, weights, protocols, bounds),
        differences=compared(results),
        sections=[_section(name, results, weights, bounds, drawn, commands or {}) for name in protocols],
        maps=[picture for picture in drawn if not picture.protocol],
        unreadable=[tuple(bad) for bad in run.get("unreadable images left out", ())],
        run=run,
        machine=environment.machine(),
        versions=environment.versions(),
        results=results,
        features=features,
        intervals=bounds,
        pictures=drawn,
        commands=commands or {},
    )


def _title(weights: Sequence[str]) -> str:
    named = weights if len(weights) <= _TITLED else [*weights[: _TITLED - 1], f"{len(weights) - _TITLED + 1} others"]
    return " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))


def _row_of_cells(name: str, found: Mapping[str, Result], weights: Sequence[str], bounds: Mapping) -> list[Cell | None]:
    """One figure of a protocol for all weights, the best marked."""
    cells = [
        cell(found[each], name, bounds[each, found[each].protocol].get(name))
        if each in found and name in found[each].values
        else None
        for each in weights
    ]
    return mark_best(cells, any(name in result.lower for result in found.values()))


def _by_weights(results: Sequence[Result], protocol: str) -> dict[str, Result]:
    return {result.weights: result for result in results if result.protocol == protocol}


def _bands(results: Sequence[Result], weights: Sequence[str], protocols: Sequence[str], bounds: Mapping) -> list[Band]:
    """The summary, broken between protocols where that is possible."""
    bands: list[list[Key]] = []
    columns: dict[Key, list[Cell | None]] = {}
    for protocol in protocols:
        found = _by_weights(results, protocol)
        names = list(dict.fromkeys(name for result in found.values() for name in result.shown))
        columns |= {(protocol, name): _row_of_cells(name, found, weights, bounds) for name in names}
        for start in range(0, len(names), COLUMNS):
            part = [(protocol, name) for name in names[start : start + COLUMNS]]
            if bands and len(bands[-1]) + len(part) <= COLUMNS:
                bands[-1].extend(part)
            else:
                bands.append(part)
    return [
        Band(keys, {name: [columns[key][place] for key in keys] for place, name in enumerate(weights)})
        for keys in bands
    ]


def _section(
    protocol: str,
    results: Sequence[Result],
    weights: Sequence[str],
    bounds: Mapping,
    drawn: Sequence[Picture],
    commands: Mapping[tuple[str, str], str],
) -> Section:
    found = _by_weights(results, protocol)
    judged = [name for name in weights if name in found]
    here = list(found.values())
    names = list(dict.fromkeys(name for result in here for name in result.values if not name.endswith(" std")))
    summarised = {name for result in here for name in result.shown}
    shown: dict[str, list] = {}
    for result in here:
        for title, table in tables(result).items():
            shown.setdefault(title, []).append((result.weights, *table))
    notes = [
        (result.weights, name, text(value))
        for result in here
        for name, value in result.details.items()
        if name not in shown and not isinstance(value, np.ndarray)
    ]
    settings = _rows([{name.replace("_", " "): value for name, value in result.settings.items()} for result in here])
    titles = dict.fromkeys(picture.title for picture in drawn if picture.protocol == protocol)
    return Section(
        protocol=protocol,
        about=_about(protocol),
        weights=judged,
        figures={name: _row_of_cells(name, found, judged, bounds) for name in names},
        headline=[name for name in names if name in summarised or len(names) <= _FEW],
        differences=compared([result for result in results if result.protocol == protocol], headline=False)
        if weights[0] in found
        else [],
        facts=_facts(here),
        settings=settings,
        ours=[row for row in settings if any(map(_OURS.search, row.texts))],
        tables=shown,
        notes=notes,
        pictures={title: [p for p in drawn if (p.protocol, p.title) == (protocol, title)] for title in titles},
        commands={name: commands[name, protocol] for name in judged if (name, protocol) in commands},
    )


def _about(protocol: str) -> str:
    """The first paragraph of what the protocol's file says about itself."""
    if protocol not in registry.protocols():
        return ""
    said = inspect.getdoc(registry.protocol(protocol)) or ""
    return " ".join(said.partition("\n\n")[0].split())


def _facts(results: Sequence[Result]) -> list[Row]:
    facts = []
    for result in results:
        seeds = result.settings.get("seeds", result.settings.get("seed"))
        spread = result.spread if any(name.endswith(" std") for name in result.values) else ""
        about = {"data set": result.data, "feature": result.feature}
        about |= {"seeds" if isinstance(seeds, (list, tuple)) else "seed": seeds, "± is the deviation over": spread}
        about |= {name: f"{count:,}" for name, count in result.counts.items()}
        about |= {"test samples of the intervals": _sample_counts(result), "time": f"{result.seconds:,.1f} s"}
        facts.append({name: value for name, value in about.items() if value not in ("", None)})
    return _rows(facts)


def _sample_counts(result: Result) -> str:
    """How many samples count, by figure; in one number if that is the same for all."""
    counts = {name: int(np.isfinite(samples_m).sum()) for name, samples_m in result.samples.items()}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,}"
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def _rows(by_weights: Sequence[Mapping[str, Any]]) -> list[Row]:
    names = dict.fromkeys(name for entries in by_weights for name in entries)
    return [Row(name, [text(entries[name]) if name in entries else "" for entries in by_weights]) for name in names]
