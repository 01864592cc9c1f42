"""What a study leaves: table, figure, numbers."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from engine.core.plotting import Figure
from engine.studies import Arm, Study
from engine.studies.conduct import figures, grid, report
from engine.studies.conduct.outcome import Judged, Outcome
from tests.strict import STRICT
from tests.studies.small import CHAIN, LOWSHOT


def outcome(seeds: tuple[int, ...] = (0, 1)) -> Outcome:
    figures = {"k-NN": [0.5], "1-shot": [0.2, 0.3, 0.4], "5-shot": [0.5, 0.6, 0.7], "1%": [0.3, 0.3, 0.3]}
    judged = []
    for run in grid.grid(LOWSHOT, seeds=seeds):
        verdict = "healthy: all well"
        if (run.arm.name, run.collapse, run.seed) == ("both", "centring", 0):
            verdict = "collapsing: all the same"
        missing = run.arm.name == "clustering" and run.collapse == "me-max"
        judged.append(
            Judged(
                run.arm.name, run.collapse, run.seed, {} if missing else figures, "not done yet" if missing else verdict
            )
        )
    return Outcome(LOWSHOT, "on something", tuple(judged), (Judged("raw pixels", None, None, figures),))


def test_table_marks_what_collapsed_and_shows_what_is_missing(tmp_path: Path):
    report.write(tmp_path, outcome(), STRICT)
    text = (tmp_path / "table.md").read_text()
    assert "| both | centring | 50.0 ± 0.0 | 30.0 ± 8.2 | 60.0 ± 8.2 | 30.0 ± 0.0 | **collapsing (1 of 2)** |" in text
    assert "| clustering | me-max |  |  |  |  | not done yet |" in text
    assert text.count("\n| masked | any (no prototypes) |") == 1
    assert "both, centring: collapsing (1 of 2)." in text and "Contrastive and masked have no prototypes" in text
    assert "splits and seeds" in text and "one seed does not show" not in text
    assert "one seed does not show" in report.markdown(outcome((0,)))
    with (tmp_path / "table.csv").open() as file:
        rows = {(row["pretext"], row["collapse"]): row for row in csv.DictReader(file)}
    assert len(rows) == 9
    assert float(rows["both", "sinkhorn"]["1-shot (%)"]) == 30 and rows["both", "sinkhorn"]["seeds"] == "0 1"
    assert rows["clustering", "me-max"]["1-shot (%)"] == ""
    whole = json.loads((tmp_path / "results.json").read_text())
    assert len(whole["runs"]) == 16 and whole["table"][1]["figures"]["1-shot"] == [0.2, 0.3, 0.4] * 2
    console = Console(width=80, record=True)
    console.print(report.table(outcome((0,))))
    shown = console.export_text()
    assert "30.0±8.2" in shown and "collapsing" in shown and "…" not in shown


def test_a_study_of_own_recipes_has_costs_and_no_column_of_operators():
    figures = {"k-NN": [0.5], "cluster ACC": [0.4]}
    judged = [
        Judged(arm.name, "", seed, figures, "healthy: yes", seconds=60.0 * (1 + seed), operations=2.5e12)
        for arm in CHAIN.arms
        for seed in (0, 1)
    ]
    whole = Outcome(CHAIN, "on something", tuple(judged), (Judged("raw pixels", None, None, {"k-NN": [0.9]}),))
    text = report.markdown(whole)
    assert "| pretext | k-NN | cluster ACC | minutes | TFLOP | verdict |" in text
    assert "| neighbours | 50.0 ± 0.0 | 40.0 ± 0.0 | 1.5 | 2.5 | healthy |" in text
    assert "| raw pixels | 90.0 |  |  |  |  |" in text
    assert "own recipe's" in text and "no prototypes" not in text and "k-means" in text
    console = Console(width=80, record=True)
    console.print(report.table(whole))
    assert "1.5" in console.export_text()


def drawn_by(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from here on, none of which is written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "write_file", lambda path, write: drawn.append(write.__closure__[0].cell_contents))
    return drawn


def labels_stand_apart(figure: Figure) -> None:
    for panel in figure.axes:
        boxes = sorted((text.get_window_extent() for text in panel.texts), key=lambda box: box.y0)
        assert all(lower.y0 + 8 < upper.y0 for lower, upper in pairwise(boxes))


def test_figure_has_a_panel_for_each_operator_and_names_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = drawn_by(monkeypatch)
    figures.draw(tmp_path / "x.png", outcome())
    (figure,) = drawn
    named = {panel.get_title(loc="left"): [text.get_text() for text in panel.texts] for panel in figure.axes}
    assert list(named) == ["centring", "me-max", "sinkhorn"]
    assert set(named["sinkhorn"]) == {"raw pixels", "contrastive", "clustering", "masked", "both"}
    assert set(named["me-max"]) == {"raw pixels", "contrastive", "masked", "both"}, "what is missing has no line"
    assert "both (collapsed)" in named["centring"]
    labels_stand_apart(figure)
    figures.draw(tmp_path / "y.png", replace(outcome(), judged=(), yardsticks=()))


def test_costs_have_a_panel_for_each_method_and_join_what_differs_in_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arms = (
        *(Arm("whole", "mae", clusters=False), Arm("half", "mae", clusters=False, epochs=0.5)),
        *(Arm("small", "mae", ("--tokens", "fast"), clusters=False), Arm("crops", "dino", clusters=False)),
        Arm("more crops", "dino", ("--dino.local-crops", "9"), clusters=False),
    )
    study = Study("costly", "Costly", arms, costs=True)
    judged = [
        Judged(arm.name, "", seed, {"k-NN": [0.5 + seed / 10], "5-shot": [0.2, 0.4]}, operations=number * 1e12)
        for number, arm in enumerate(arms, 1)
        for seed in (0, 1)
    ]
    drawn = drawn_by(monkeypatch)
    figures.draw_costs(tmp_path / "x.png", Outcome(study, "on something", tuple(judged), ()))
    (figure,) = drawn
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles == ["mae: k-NN", "mae: 5-shot", "dino: k-NN", "dino: 5-shot"]
    of_mae = figure.axes[0]
    joined, alone = (bars[0].get_xydata().tolist() for bars in of_mae.containers)
    assert joined == [[1, pytest.approx(55)], [2, pytest.approx(55)]] and alone == [[3, pytest.approx(55)]]
    bars = of_mae.containers[0][2][0].get_segments()
    assert bars[0].tolist() == [[1, pytest.approx(50)], [1, pytest.approx(60)]], "seeds, not splits"
    assert {text.get_text() for text in of_mae.texts} == {"whole", "half", "small"}
    labels_stand_apart(figure)
    one = tuple(found for found in judged if found.arm != "more crops")
    figures.draw_costs(tmp_path / "y.png", Outcome(study, "on something", one, ()))
    assert [panel.get_title(loc="left") for panel in drawn[1].axes] == ["k-NN", "5-shot"], "dino has one arm"
    figures.draw_costs(tmp_path / "z.png", Outcome(study, "on something", (), ()))
    assert len(drawn) == 2, "nothing is done yet"


def test_styles_differ():
    assert len({figures.style(number) for number in range(49)}) == 49


def test_labels_move_as_little_as_needed():
    assert figures.apart([], 10) == []
    assert figures.apart([0, 50], 10) == [0, 50]
    assert figures.apart([20, 20], 10) == [15, 25]
    assert figures.apart([0, 1, 2, 80], 10) == pytest.approx([-9, 1, 11, 80])
