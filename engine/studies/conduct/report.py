"""What a study leaves: one table (on screen, Markdown, CSV), one figure, and every number behind them as JSON."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.table import Table

from engine.core.durable import write_file
from engine.core.extras import Extras
from engine.core.plotting import Figure
from engine.studies import Study

# Okabe and Ito's palette, which people who confuse colours can tell apart; each with a marker and a label of its own.
STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"))
INK, FAINT = "#222222", "#767676"
NOTE_CHARACTERS = 18  # of the smallest print, to an inch
DASHES = {"raw pixels": (0, (4, 2)), "untrained": (0, (1, 1.5))}
COLLAPSED = ("collapsing", "broken")
WORDS = ("broken", "collapsing", "failed", "not done yet", "watch", "healthy")  # the worst first


@dataclass(frozen=True)
class Judged:
    """A run or yardstick.

    Attributes:
        arm: its pretext task, or the yardstick's name.
        collapse: what kept prototypes from collapsing; "" where there are none, None for a yardstick.
        seed: of the training; None where nothing is random.
        figures: accuracies between 0 and 1 by name, one for each split; empty while there are none.
        verdict: the run's last, or why it has none.
        command: what repeats it.
        seconds: that its steps took.
        operations: of its steps, in matrix products.
    """

    arm: str
    collapse: str | None
    seed: int | None
    figures: Mapping[str, Sequence[float]]
    verdict: str = ""
    command: str = ""
    seconds: float | None = None
    operations: float | None = None


@dataclass(frozen=True)
class Row:
    """What the table shows of an arm under one way to keep it from collapsing: all its seeds together.

    Attributes:
        figures: every split of every seed, by figure's name.
        verdict: the worst one's first word, and how many have it if not all do.
        minutes: of training, one for each seed.
        operations: of the training of one seed, the same for all; None where it isn't known.
    """

    arm: str
    collapse: str | None
    seeds: tuple[int, ...]
    figures: Mapping[str, tuple[float, ...]]
    verdict: str
    minutes: tuple[float, ...] = ()
    operations: float | None = None

    @property
    def collapsed(self) -> bool:
        return self.verdict.startswith(COLLAPSED)

    @property
    def guard(self) -> str:
        return {None: "", "": "any (no prototypes)"}.get(self.collapse, self.collapse)

    @property
    def costs(self) -> list[str]:
        """Minutes and TFLOP."""
        time = f"{np.mean(self.minutes):.1f}" if self.minutes else ""
        return [time, "" if self.operations is None else f"{self.operations / 1e12:.1f}"]


@dataclass(frozen=True)
class Outcome:
    """A study so far; `about` says on what and how long, in words, `remark` what else is to be known."""

    study: Study
    about: str
    judged: tuple[Judged, ...]
    yardsticks: tuple[Judged, ...]
    remark: str = ""

    @property
    def rows(self) -> list[Row]:
        """In the grid's order, the yardsticks first."""
        groups: dict[tuple[str, str | None], list[Judged]] = {}
        for found in (*self.yardsticks, *self.judged):
            groups.setdefault((found.arm, found.collapse), []).append(found)
        return [_row(arm, collapse, found) for (arm, collapse), found in groups.items()]

    @property
    def names(self) -> list[str]:
        """Of all figures, in order."""
        return list(dict.fromkeys(name for found in (*self.yardsticks, *self.judged) for name in found.figures))

    @property
    def notes(self) -> list[str]:
        """What must be known to read the table."""
        seeds = len({found.seed for found in self.judged})
        spread = (
            "splits and seeds"
            if seeds > 1
            else "splits of the labelled images; one seed does not show that of training"
        )
        notes = [
            "Top-1 in %. n-shot: logistic regression on frozen features of n images per class (MSN's protocol), on disjoint "
            f"splits that are the same for every run. ± is the standard deviation over {spread}.",
        ]
        if self.study.reference:
            notes += [
                "Order of images, epochs, crops and masks are equal in all runs of a seed; learning rates are each method's own."
            ]
        else:
            notes += ["Every run has its own recipe's epochs, crops and learning rates."]
        if "linear" in self.study.protocols:
            notes += ["linear: a linear probe at its last epoch, the best of its learning rates on the test set."]
        if "cluster" in self.study.protocols:
            notes += [
                "cluster ACC: k-means on test features, clusters matched with classes; its ± is over starts as well."
            ]
        if self.study.classifies:
            notes += ["classifier: held-out accuracy of the classifier that the run itself trained."]
        if self.study.costs:
            notes += [
                "minutes: what the training steps took by the pace that the run logged, mean over seeds. TFLOP: what they "
                "computed in matrix products, counted."
            ]
        notes += [self.remark] if self.remark else []
        alone = list(dict.fromkeys(found.arm for found in self.judged if found.collapse == ""))
        if alone and self.study.collapse:
            has = "has" if len(alone) == 1 else "have"
            notes.append(
                f"{' and '.join(alone).capitalize()} {has} no prototypes: what keeps those from collapsing makes no difference, "
                "so there is one run per seed, and it stands for all."
            )
        notes += [
            f"{row.arm}, {row.guard}: {row.verdict}. Its figures say little." for row in self.rows if row.collapsed
        ]
        return notes


def _row(arm: str, collapse: str | None, found: Sequence[Judged]) -> Row:
    names = dict.fromkeys(name for one in found for name in one.figures)
    figures = {name: tuple(value for one in found for value in one.figures.get(name, ())) for name in names}
    words = Counter(_word(one.verdict) for one in found)
    worst = min(words, key=lambda word: WORDS.index(word) if word in WORDS else -1)
    verdict = worst if len(words) == 1 else f"{worst} ({words[worst]} of {len(found)})"
    seeds = tuple(one.seed for one in found if one.seed is not None)
    minutes = tuple(one.seconds / 60 for one in found if one.seconds is not None)
    operations = next((one.operations for one in found if one.operations is not None), None)
    return Row(arm, collapse, seeds, figures, verdict, minutes, operations)


def _word(verdict: str) -> str:
    return verdict.partition(":")[0]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation in percent; None where there is one value only."""
    return 100 * float(np.mean(values)), 100 * float(np.std(values)) if len(values) > 1 else None


def _cell(values: Sequence[float], plus_minus: str = " ± ") -> str:
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f}{plus_minus}{deviation:.1f}"


def table(outcome: Outcome) -> Table:
    """For the screen, of 80 columns. Runs that collapsed are red."""
    grid = Table(
        title=f"{outcome.study.title}\n{outcome.about}",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    guarded = bool(outcome.study.collapse)
    grid.add_column("pretext", no_wrap=True)
    if guarded:
        grid.add_column("against\ncollapse", no_wrap=True)
    for name in outcome.names:
        grid.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for name in ("min", "TFLOP") if outcome.study.costs else ():
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("verdict")
    previous = None
    for row in outcome.rows:
        if guarded and row.arm != previous and row.collapse is not None:
            grid.add_section()
        guard = "any" if row.collapse == "" else row.guard
        cells = [row.arm if row.arm != previous else ""] + ([guard] if guarded else [])
        cells += [_cell(row.figures.get(name, ()), "±") for name in outcome.names]
        cells += row.costs if outcome.study.costs else []
        grid.add_row(*cells, row.verdict, style="red" if row.collapsed else None)
        previous = row.arm
    return grid


def markdown(outcome: Outcome) -> str:
    """table.md: the table and what must be known to read it."""
    guarded, costs = bool(outcome.study.collapse), ["minutes", "TFLOP"] if outcome.study.costs else []
    head = ["pretext", *["against collapse"] * guarded, *outcome.names, *costs, "verdict"]
    rule = ["---", *["---"] * guarded, *["---:"] * (len(outcome.names) + len(costs)), "---"]
    lines = [head, rule]
    for row in outcome.rows:
        verdict = f"**{row.verdict}**" if row.collapsed else row.verdict
        cells = [_cell(row.figures.get(name, ())) for name in outcome.names]
        lines.append([row.arm, *[row.guard] * guarded, *cells, *row.costs[: len(costs)], verdict])
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    arms = "\n".join(f"- {arm.name}: {arm.about}" for arm in outcome.study.arms if arm.about)
    notes = "\n\n".join(outcome.notes)
    return f"# {outcome.study.title}\n\n{outcome.about}\n\n{grid}\n\n{notes}\n\n{arms}\n"


def write(folder: Path, outcome: Outcome, extras: Extras) -> None:
    """Write results.json, then table.md, table.csv and the figure NAME.png, which are `extras`; each replaces an earlier one
    whole."""
    whole = {
        "study": outcome.study.name,
        "about": outcome.about,
        "notes": outcome.notes,
        "table": [asdict(row) for row in outcome.rows],
        "runs": [asdict(found) for found in outcome.judged],
        "yardsticks": [asdict(found) for found in outcome.yardsticks],
    }
    text = json.dumps(whole, indent=1, allow_nan=False)
    write_file(folder / "results.json", lambda aside: aside.write_text(text))
    with extras.of("table.md"):
        write_file(folder / "table.md", lambda aside: aside.write_text(markdown(outcome)))
    with extras.of("table.csv"):
        write_file(folder / "table.csv", lambda aside: _write_csv(aside, outcome))
    with extras.of(f"{outcome.study.name}.png"):
        draw(folder / f"{outcome.study.name}.png", outcome)


def _write_csv(path: Path, outcome: Outcome) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = [column for name in outcome.names for column in (f"{name} (%)", f"{name} std")]
        writer.writerow(["pretext", "collapse", "seeds", *columns, "minutes", "TFLOP", "verdict"])
        for row in outcome.rows:
            cells = []
            for name in outcome.names:
                mean, deviation = spread(row.figures[name]) if row.figures.get(name) else (None, None)
                cells += ["" if number is None else f"{number:.3f}" for number in (mean, deviation)]
            writer.writerow([row.arm, row.guard, " ".join(map(str, row.seeds)), *cells, *row.costs, row.verdict])


def draw(path: Path, outcome: Outcome) -> None:
    """A PNG of accuracy against labelled images per class: a panel for each way to keep prototypes from collapsing, a line for
    each pretext task; what has no prototypes is the same in all panels."""
    rows = outcome.rows
    shots = [name for name in outcome.names if name.endswith("-shot")]
    guards = list(dict.fromkeys(row.collapse for row in rows if row.collapse)) or [""]
    # as high as the labels at the ends of the lines need
    width, height = 4.3 * len(guards) + 0.9, max(4.4, 0.2 * len({(row.arm, row.collapse) for row in rows}) + 1.6)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    figure.suptitle(outcome.study.title, color=INK, fontsize=12, x=0.01, ha="left")
    panels = figure.subplots(1, len(guards), sharey=True, squeeze=False)[0]
    styles = {arm.name: STYLES[number % len(STYLES)] for number, arm in enumerate(outcome.study.arms)}
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
    note = "\n".join(fill(line, int(NOTE_CHARACTERS * width)) for line in note.splitlines())
    figure.supxlabel(note, color=FAINT, fontsize=8, x=0.01, ha="left")
    _label_ends(figure, panels)
    write_file(path, lambda aside: figure.savefig(aside, format="png"))


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
        text = f"{row.arm} (collapsed)" if row.collapsed else row.arm
        panel.annotate(
            text, (places[-1] + 0.12, means[-1]), xytext=(6, 0), textcoords="offset points", color=colour, fontsize=9,
            va="center", annotation_clip=False,
        )  # fmt: skip
    panel.set_xticks(places, [name.removesuffix("-shot") for name in shots])
    panel.set_xlim(places[0] - 0.25, places[-1] + 1.35)
    panel.set_xlabel("labelled images per class", color=FAINT)
    panel.grid(axis="y", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=FAINT, labelsize=9)


def _label_ends(figure: Figure, panels: Sequence[Axes]) -> None:
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
