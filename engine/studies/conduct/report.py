"""What a study leaves: one table (on screen, Markdown, CSV), its pictures, and every number behind them as JSON."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from engine.core.durable import write_file
from engine.core.extras import Extras
from engine.studies.conduct import figures
from engine.studies.conduct.outcome import Outcome, spread


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
    """Write results.json, then table.md, table.csv, the figure NAME.png and, of a study that shows costs, NAME-costs.png, which
    are `extras`; each replaces an earlier one whole."""
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
        figures.draw(folder / f"{outcome.study.name}.png", outcome)
    if outcome.study.costs:
        with extras.of(f"{outcome.study.name}-costs.png"):
            figures.draw_costs(folder / f"{outcome.study.name}-costs.png", outcome)


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
