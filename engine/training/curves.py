"""The curves of a run's metrics as one PNG, written aside and renamed."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from engine.core.durable import write_file
from engine.core.pictures import DPI, FAINT, INK
from engine.core.plotting import Figure
from engine.training.metrics import read_metrics

COLOURS = ("#3b6fb6", "#c8553d", "#4a9c6d", "#8e6bb0", "#c08a2e")  # one per stage
CURVES = {"loss": "loss", "lr": "learning rate", "knn_top1": "k-NN top-1 (%)", "rank_me": "effective rank (RankMe)"}


def draw(path: Path, metrics_jsonl: Path, *, title: str = "") -> None:
    """Write loss, learning rate, k-NN and RankMe over the steps, each where the run has any.

    Every stage has its colour; a dotted line marks where it begins. Steps whose value was not finite have a cross at
    the foot of the panel.

    Args:
        path: the PNG to write.
        metrics_jsonl: of the run; it may be growing.
        title: for example the run's name.
    """
    records = read_metrics(metrics_jsonl)
    stages = {record["stage"]: record["step"] for record in records}  # its last step, which is where the next begins
    shown = [(key, label) for key, label in CURVES.items() if any(key in record for record in records)]
    columns = min(2, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.0 * rows + 0.5), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title or "Training", color=INK, fontsize=12, x=0.01, ha="left")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel, (key, label) in zip(panels, shown, strict=False):
        _draw_curve(panel, [r for r in records if key in r], key, stages)
        panel.set_title(label, loc="left", fontsize=10, color=INK)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    if not shown:
        panels[0].text(0.5, 0.5, "nothing logged yet", ha="center", color=FAINT)
    for panel in panels[max(0, len(shown) - columns) : len(shown)]:
        panel.set_xlabel("step", color=FAINT)
        panel.tick_params(labelbottom=True)
    if len(stages) > 1:
        lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=stage) for i, stage in enumerate(stages)]
        figure.legend(handles=lines, loc="outside upper right", ncols=len(stages), frameon=False, fontsize=9)
    write_file(path, lambda aside: figure.savefig(aside, format="png"))


def _draw_curve(panel: Axes, records: list[dict], key: str, stages: dict[str, int]) -> None:
    numbers = [record[key] for record in records if record[key] is not None]
    # Stages differ in what they minimise: a log axis shows a loss of 0.4 beside one of 8.
    if key == "loss" and numbers and min(numbers) > 0 and max(numbers) > 10 * min(numbers):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    for step in list(stages.values())[:-1]:
        panel.axvline(step, color=FAINT, linewidth=0.8, linestyle=":")
    for number, stage in enumerate(stages):
        points = [(r["step"], r[key]) for r in records if r["stage"] == stage and r[key] is not None]
        if points:
            style = {"marker": "o", "markersize": 3} if len(points) < 40 else {}
            panel.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], linewidth=1.4, **style)
    lost = [record["step"] for record in records if record[key] is None]
    if lost:
        foot = panel.get_xaxis_transform()
        panel.plot(lost, [0.02] * len(lost), "x", color="#d00000", transform=foot, clip_on=False, label="not finite")
        panel.legend(frameon=False, fontsize=8, loc="lower right")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=FAINT, labelsize=8)
