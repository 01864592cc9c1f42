"""Results as a table on screen, Markdown, results.json and pictures."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from engine.durable import write_folder
from engine.errors import BadInput
from engine.evals.features import Features, as_numpy, threads_for
from engine.evals.result import Result

PACKAGES = ("torch", "torchmetrics", "scikit-learn", "scipy", "numpy")
MAPS = {"pca": "principal components", "tsne": "t-SNE"}
_MAP_POINTS = 5000  # t-SNE and the eye gain nothing from more
_NAMED_CLASSES = 20  # beyond this, class names would overlap

Cells = dict[tuple[str, str], str]


def cells(results: Sequence[Result], headline: bool = False) -> dict[str, Cells]:
    """By weights: (protocol, figure) -> text such as "96.4 %", or "64.0 ± 1.2 %" where the result has a spread."""
    shown: dict[str, Cells] = {}
    for result in results:
        row = shown.setdefault(result.weights, {})
        for name, value in result.values.items():
            if name.endswith(" std") or (headline and result.headline and name not in result.headline):
                continue
            scale, digits, unit = (1, 3, "") if name in result.plain else (100, 1, " %")
            spread = result.values.get(f"{name} std")
            spread = "" if spread is None else f" ± {scale * spread:.{digits}f}"
            row[result.protocol, name] = f"{scale * value:.{digits}f}{spread}{unit}"
    return shown


def _figures(shown: Mapping[str, Cells]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(key for row in shown.values() for key in row))


def table(results: Sequence[Result], title: str | None = None) -> Table:
    """For the screen: one row per figure, one column per weights, so that it fits a terminal and stages lie side by side."""
    shown = cells(results)
    grid = Table("protocol", "figure", title=title)
    for weights in shown:
        grid.add_column(weights, justify="right")
    previous = None
    for protocol, figure in _figures(shown):
        if protocol != previous:
            grid.add_section()
        values = [row.get((protocol, figure), "") for row in shown.values()]
        grid.add_row(protocol if protocol != previous else "", figure, *values)
        previous = protocol
    return grid


def sweeps(result: Result) -> list[Table]:
    """For the screen: the tables in a result's details, such as the accuracy at every learning rate."""
    tables = []
    for title, rows in result.details.items():
        if isinstance(rows, list):
            grid = Table(*rows[0], title=f"{result.protocol}: {title}")
            for row in rows:
                first, *others = row.values()
                grid.add_row(f"{first:g}", *(f"{100 * x:.1f} %" if isinstance(x, float) else str(x) for x in others))
            tables.append(grid)
    return tables


def sentence(result: Result) -> str:
    """The settings behind a result, in one line."""
    said = {name.replace("_", " "): value for name, value in result.settings.items() if value not in ((), [])}
    return ", ".join(f"{name} {_short(value)}" for name, value in said.items())


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def markdown(results: Sequence[Result], headline: bool = True) -> str:
    """A Markdown table: one row per weights, one column per figure; only the headline figures unless told otherwise."""
    shown = cells(results, headline)
    figures = _figures(shown)
    lines = [["weights", *(f"{protocol} {figure}" for protocol, figure in figures)], ["---", *["---:"] * len(figures)]]
    lines += [[weights, *(row.get(figure, "") for figure in figures)] for weights, row in shown.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_json(
    results: Sequence[Result], run: Mapping[str, Any], features: Mapping[str, tuple[Features, Features]]
) -> str:
    """results.json: what was run, on what, with which versions, and every figure, setting and table of every result."""
    about = {
        name: {
            "feature": test.pooling,
            "width": test.values.shape[1],
            "training images": len(train.values),
            "test images": len(test.values),
            "classes": list(train.classes) if train.classes else None,
        }
        for name, (train, test) in features.items()
    }
    found = [
        {
            "weights": result.weights,
            "protocol": result.protocol,
            "values": result.values,
            "settings": result.settings,
            "details": {key: value for key, value in result.details.items() if not isinstance(value, np.ndarray)},
            "seconds": round(result.seconds, 3),
        }
        for result in results
    ]
    versions = {package: version(package) for package in PACKAGES}
    whole = {"run": dict(run), "features": about, "results": found, "versions": versions}
    return json.dumps(whole, indent=1, default=str, allow_nan=False)


def write(
    folder: Path,
    results: Sequence[Result],
    run: Mapping[str, Any],
    features: Mapping[str, tuple[Features, Features]],
    map_kind: str = "pca",
) -> None:
    """Write results.json, results.md and pictures into `folder`: aside first, then renamed, so never half a folder.

    An earlier evaluation at `folder` is replaced.

    Raises:
        BadInput: `folder` holds something else, or cannot be written.
    """
    check_folder(folder)

    def fill(aside: Path) -> None:
        (aside / "results.json").write_text(as_json(results, run, features))
        (aside / "results.md").write_text(markdown(results, headline=False))
        for result in results:
            if "confusion" in result.details:
                names = features[result.weights][0].classes
                draw_confusion(aside / f"{_stem(result.weights)}-{result.protocol}-confusion.png", result, names)
        for name, (_, test) in features.items():
            draw_map(aside / f"{_stem(name)}-{map_kind}.png", test, map_kind)

    write_folder(folder, fill)


def check_folder(folder: Path) -> None:
    """Refuse a place where results can't go, or would replace something that is not an earlier evaluation.

    Raises:
        BadInput: see above.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; choose a new folder for the results.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "results.json").exists():
        raise BadInput(f"{folder} exists and is not an earlier evaluation; choose a new folder for the results.")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"{folder} cannot be created: {nearest} is not a folder that can be written to; choose another.")


def draw_confusion(path: Path, result: Result, classes: Sequence[str] | None) -> None:
    """A PNG of the confusion matrix, every true class's row in percent."""
    counts_KK = result.details["confusion"]
    share_KK = 100 * counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class")
    axes.set(title=f"{result.weights}: {result.protocol}", xlabel="predicted class", ylabel="true class")
    if len(counts_KK) <= _NAMED_CLASSES:
        names = classes or [str(label) for label in range(len(counts_KK))]
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(counts_KK):
            dark = "white" if share_KK[row, column] > 50 else "black"
            axes.text(column, row, counts_KK[row, column], ha="center", va="center", color=dark, fontsize=8)
    figure.savefig(path, dpi=120)


def draw_map(path: Path, test: Features, kind: str = "pca") -> None:
    """A PNG of the test features in two dimensions, coloured by class; at most 5,000 of them, evenly spaced."""
    rows = np.unique(np.linspace(0, len(test.values) - 1, min(len(test.values), _MAP_POINTS)).round().astype(int))
    values_nC, labels_n = test.values.cpu().numpy()[rows], as_numpy(test.labels)[rows]
    reduce = PCA(2, random_state=0) if kind == "pca" else TSNE(2, init="pca", random_state=0)
    with threads_for(2 * values_nC.size):
        xy_n2 = reduce.fit_transform(values_nC)
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    present = np.unique(labels_n)
    colours = matplotlib.colormaps["tab10" if len(present) <= 10 else "turbo"]
    for i, label in enumerate(present):
        of_class = labels_n == label
        colour = colours(i if len(present) <= 10 else i / (len(present) - 1))
        name = test.classes[label] if test.classes else str(label)
        axes.scatter(*xy_n2[of_class].T, s=9, color=colour, label=name)
    if len(present) <= _NAMED_CLASSES:
        figure.legend(loc="outside right upper", markerscale=2, fontsize=8)
    axes.set(title=f"{test.name}: {MAPS[kind]} of test features", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def _stem(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
