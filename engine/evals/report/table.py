"""Results on the screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.evals.report.compare import SAMPLES, SEEDS, Compared, compared
from engine.evals.report.figures import bracket, cells, change, keys, tables, text
from engine.evals.result import Result

FEW = 4  # results whose sweeps fit on a screen


def show(results: Sequence[Result], title: str, folder: Path) -> None:
    """Print the table, of a few results their sweeps, the differences, the settings, and where the report lies."""
    console = Console()
    console.print(table(results, title))
    # more would bury the figures; the report has them all
    for result in results if len(results) <= FEW else ():
        for sweep in sweeps(result):
            console.print(sweep)
    if found := compared(results):
        console.print(differences(found, results[0].weights))
    for line in dict.fromkeys(f"{result.protocol}: {sentence(result)}" for result in results):
        console.print(line, style="dim", highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def table(results: Sequence[Result], title: str | None = None) -> Table:
    """One row per figure, one column per weights, so that it fits a terminal and stages lie side by side."""
    shown = cells(results)
    grid = _grid(title, list(shown))
    previous = None
    for protocol, figure in keys(shown):
        if protocol != previous:
            grid.add_section()
        values = [str(row.get((protocol, figure), "")) for row in shown.values()]
        grid.add_row(protocol if protocol != previous else "", escape(figure), *values)
        previous = protocol
    return grid


def differences(compared: Sequence[Compared], first: str) -> Table:
    """One row per figure, one column for each other weights: its difference to the first, and what is known about it."""
    columns = list(dict.fromkeys(each.weights for each in compared))
    found = {(each.protocol, each.figure, each.weights): each for each in compared}
    grid = _grid(f"differences to {first}", columns)
    grid.caption = escape("[95 % paired bootstrap interval over test samples], ± over seeds; ▲▼ excludes 0")
    previous = None
    for protocol, figure in dict.fromkeys((each.protocol, each.figure) for each in compared):
        if protocol != previous:
            grid.add_section()
        values = [_change(found.get((protocol, figure, weights))) for weights in columns]
        grid.add_row(protocol if protocol != previous else "", escape(figure), *values)
        previous = protocol
    return grid


def _change(compared: Compared | None) -> str:
    if compared is None:
        return ""
    arrow, mean, known = change(compared)
    short = {SAMPLES: bracket(compared.interval, compared.plain, "+"), SEEDS: known.partition(" over ")[0]}.get(
        compared.over, ""
    )
    return escape(" ".join(filter(None, (arrow, mean, short))))


def _grid(title: str | None, weights: Sequence[str]) -> Table:
    grid = Table("protocol", "figure", title=title and escape(title))
    for name in weights:
        grid.add_column(escape(name), justify="right", overflow="fold")
    return grid


def sweeps(result: Result) -> list[Table]:
    """The tables in a result's details, such as the accuracy at every learning rate."""
    found = []
    for title, (columns, rows) in tables(result).items():
        grid = Table(*map(escape, columns), title=escape(f"{result.protocol}: {title}"))
        for row in rows:
            grid.add_row(*map(escape, row))
        found.append(grid)
    return found


def sentence(result: Result) -> str:
    """The settings behind a result, in one line."""
    said: dict[str, Any] = {name.replace("_", " "): value for name, value in result.settings.items()}
    return ", ".join(f"{name} {text(value)}" for name, value in said.items() if value not in ((), []))
