"""The picture of a record: what every kernel reaches, under the roof that the card's two ceilings make."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")


def draw(record: dict[str, Any], path: Path) -> None:
    """Every form of every case of `record` (see `benchmarks.gpu`): operations per byte against operations per second.

    Ours are filled marks, the best peer of a case is a ring; a line joins them.
    """
    bandwidth, peak = record["ceilings"]["bytes_per_second"], record["ceilings"]["flops_per_second"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in record["kernels"] if row["flops"] and any("ms" in found for found in row["forms"].values())]
    intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    span = np.geomspace(min(*intensities, 1.0) / 2, max(*intensities, peak / bandwidth) * 4, 200)
    axes.loglog(span, np.minimum(span * bandwidth, peak) / 1e12, color="0.3", label="roof")
    ops = sorted({row["op"] for row in rows})
    for row, intensity in zip(rows, intensities, strict=False):
        colour = COLOURS[ops.index(row["op"]) % len(COLOURS)]
        reached = {name: row["flops"] / found["ms"] / 1e9 for name, found in row["forms"].items() if "ms" in found}
        mine = [reached[name] for name in row["ours"] if name in reached]
        axes.loglog([intensity] * len(mine), mine, "o", color=colour, markersize=6, alpha=0.8)
        if row["best_peer"]:
            peer = reached[row["best_peer"]]
            axes.loglog(intensity, peer, "o", markerfacecolor="none", color=colour, markersize=9)
            axes.loglog([intensity] * 2, [peer, max([peer, *mine])], color=colour, linewidth=0.8, alpha=0.5)
    for op in ops:
        axes.plot([], [], "o", color=COLOURS[ops.index(op) % len(COLOURS)], label=op)
    axes.plot([], [], "o", color="0.3", markerfacecolor="none", label="best peer of the case")
    axes.set(
        xlabel="operations per byte that must move", ylabel="TFLOP/s", title=f"{record['device']}, {record['date']}"
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
