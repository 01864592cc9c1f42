"""The pictures of a study: accuracy against labelled images, and against what a run computes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from engine.core.durable import write_file
from engine.core.plotting import Figure
from engine.studies import Arm
from engine.studies.conduct.outcome import Outcome, Row, spread

# Okabe and Ito's palette, which people who confuse colours can tell apart; each with a marker and a label of its own.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^DvPX"
INK, FAINT = "#222222", "#767676"
NOTE_CHARACTERS = 18  # of the smallest print, to an inch
DASHES = {"raw pixels": (0, (4, 2)), "untrained": (0, (1, 1.5))}


def style(number: int) -> tuple[str, str]:
    """A colour and a marker; each of 49 numbers has another pair."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def draw(path: Path, outcome: Outcome) -> None:
    """A PNG of accuracy against labelled images per class: a panel for each way to keep prototypes from collapsing, a line for
    each pretext task; what has no prototypes is the same in all panels."""
    rows = outcome.rows
    shots = [name for name in outcome.names if name.endswith("-shot")]
    guards = list(dict.fromkeys(row.collapse for row in rows if row.collapse)) or [""]
    # as high as the labels at the ends of the lines need
    width, height = 4.3 * len(guards) + 0.9, max(4.4, 0.2 * len({(row.arm, row.collapse) for row in rows}) + 1.6)
    figure = _figure(outcome, width, height)
    panels = figure.subplots(1, len(guards), sharey=True, squeeze=False)[0]
    styles = {arm.name: style(number) for number, arm in enumerate(outcome.study.arms)}
    alone = any(row.collapse == "" for row in rows)
    for panel, guard in zip(panels, guards, strict=True):
        lines = [
            row for row in rows if row.collapse in (guard, "", None) and all(row.figures.get(name) for name in shots)
        ]
        if outcome.study.collapse:
            panel.set_title(guard or "no prototypes", loc="left", fontsize=11, color=INK)
        if not lines or not shots:
            panel.text(0.5, 0.5, "nothing is done yet", ha="center", transform=panel.transAxes, color=FAINT)
            panel.set_axis_off()
            continue
        _draw_lines(panel, lines, shots, styles)
    panels[0].set_ylabel("top-1 accuracy (%)", color=FAINT)
    seeds = len({found.seed for found in outcome.judged})
    note = f"bars: standard deviation over {'splits and seeds' if seeds > 1 else 'splits'}; {outcome.about}"
    if alone and len(guards) > 1:
        note += "\n" + next(text for text in outcome.notes if "no prototypes" in text)
    _finish(path, figure, panels, note)


def _draw_lines(panel: Axes, rows: Sequence[Row], shots: Sequence[str], styles: Mapping[str, tuple[str, str]]) -> None:
    """Means with bars, a little apart so that bars of one place do not cover each other; names stand at their ends."""
    places = np.log2([float(name.removesuffix("-shot")) for name in shots])
    gap = min(0.03, 0.24 / len(rows))
    for number, row in enumerate(rows):
        x = places + gap * (number - (len(rows) - 1) / 2)
        means, bars = zip(*(spread(row.figures[name]) for name in shots), strict=True)
        colour, marker = styles.get(row.arm, (FAINT, ""))
        look = {"linestyle": DASHES.get(row.arm, "-"), "linewidth": 1.2 if row.arm in DASHES else 1.8}
        panel.errorbar(
            x, means, [bar or 0.0 for bar in bars], color=colour, marker=marker or None, markersize=5, capsize=2.5,
            elinewidth=0.9, **look,
        )  # fmt: skip
        _label(panel, row, (places[-1] + 0.12, means[-1]), colour, "data")
    panel.set_xticks(places, [name.removesuffix("-shot") for name in shots])
    panel.set_xlim(places[0] - 0.25, places[-1] + 1.35)
    panel.set_xlabel("labelled images per class", color=FAINT)
    _plain(panel)


def draw_costs(path: Path, outcome: Outcome) -> None:
    """A PNG of accuracy against what a run computes: a column of panels for k-NN and one for the most labelled images per class,
    a row for each method where each has several arms. Arms that differ in epochs alone have one colour and a line: what lies
    above it is worth more than training as it is for shorter."""
    arms = {arm.name: arm for arm in outcome.study.arms}
    shots = [name for name in outcome.names if name.endswith("-shot")]
    names = [name for name in ("k-NN", *shots[-1:]) if name in outcome.names]
    done = [row for row in outcome.rows if row.operations and all(row.figures.get(name) for name in names)]
    if not names or not done:
        return
    of_methods: dict[str, list[Row]] = {}
    for row in done:
        of_methods.setdefault(arms[row.arm].method, []).append(row)
    if min(map(len, of_methods.values())) < 2:
        of_methods = {"": done}
    highest = max(map(len, of_methods.values()))
    width, height = 4.6 * len(names) + 0.9, max(3.4, 0.2 * highest + 1.6) * len(of_methods) + 0.6
    figure = _figure(outcome, width, height)
    panels = figure.subplots(len(of_methods), len(names), sharey="col", squeeze=False)
    for line, (method, rows) in zip(panels, of_methods.items(), strict=True):
        alike: dict[tuple[Arm, str | None], list[Row]] = {}
        for row in rows:
            arm = replace(arms[row.arm], name="", about="", epochs=1)
            alike.setdefault((arm, row.collapse), []).append(row)
        for panel, name in zip(line, names, strict=True):
            _draw_costs(panel, list(alike.values()), name)
            panel.set_title(": ".join(filter(None, (method, name))), loc="left", fontsize=11, color=INK)
        line[0].set_ylabel("top-1 accuracy (%)", color=FAINT)
    _finish(path, figure, panels.flat, f"bars: standard deviation over seeds; {outcome.about}")


def _draw_costs(panel: Axes, alike: Sequence[Sequence[Row]], name: str) -> None:
    """Means with bars; rows that are alike but for their epochs are joined."""
    for number, rows in enumerate(alike):
        rows, (colour, marker) = sorted(rows, key=lambda row: row.operations), style(number)
        operations = [row.operations / 1e12 for row in rows]
        means, bars = zip(*(spread(row.means[name]) for row in rows), strict=True)
        panel.errorbar(
            operations, means, [bar or 0.0 for bar in bars], color=colour, marker=marker, markersize=6, capsize=2.5,
            elinewidth=0.9, linewidth=0.9,
        )  # fmt: skip
        for row, mean in zip(rows, means, strict=True):
            _label(panel, row, (1.0, mean), colour, ("axes fraction", "data"))
    panel.set_xlim(left=0)
    panel.set_xlabel("TFLOP", color=FAINT)
    _plain(panel)


def _figure(outcome: Outcome, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    figure.suptitle(outcome.study.title, color=INK, fontsize=12, x=0.01, ha="left")
    return figure


def _finish(path: Path, figure: Figure, panels: Iterable[Axes], note: str) -> None:
    """Put the note below, the labels apart, and the file in its place."""
    characters = int(NOTE_CHARACTERS * figure.get_figwidth())
    note = "\n".join(fill(line, characters) for line in note.splitlines())
    figure.supxlabel(note, color=FAINT, fontsize=8, x=0.01, ha="left")
    _label_ends(figure, panels)
    write_file(path, lambda aside: figure.savefig(aside, format="png"))


def _label(panel: Axes, row: Row, place: tuple[float, float], colour: str, coordinates: str | tuple[str, str]) -> None:
    panel.annotate(
        f"{row.arm} (collapsed)" if row.collapsed else row.arm, place, xycoords=coordinates, xytext=(6, 0),
        textcoords="offset points", color=colour, fontsize=9, va="center", annotation_clip=False,
    )  # fmt: skip


def _plain(panel: Axes) -> None:
    panel.grid(axis="y", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=FAINT, labelsize=9)


def _label_ends(figure: Figure, panels: Iterable[Axes]) -> None:
    """Move the labels of a panel apart, in order of height, until none covers another."""
    figure.canvas.draw()  # only now are places in pixels known
    points = 72 / figure.dpi
    for panel in panels:
        labels = sorted(panel.texts, key=lambda label: label.xy[1]) if panel.axison else []
        wanted = [panel.transData.transform(label.xy)[1] * points for label in labels]
        for label, old, new in zip(labels, wanted, apart(wanted, 11.0), strict=True):
            label.set_position((6, new - old))


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed (least squares) so that neighbours are `gap` apart or more."""
    blocks: list[tuple[float, int]] = []  # (mean of height minus place, members): isotonic regression by pooling
    for number, height in enumerate(heights):
        blocks.append((height - gap * number, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (upper, more), (lower, count) = blocks.pop(), blocks.pop()
            blocks.append(((upper * more + lower * count) / (more + count), more + count))
    levels = [level for level, count in blocks for _ in range(count)]
    return [level + gap * number for number, level in enumerate(levels)]
