"""The folder of an evaluation: all of its files, or none."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.durable import write_folder
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.evals.features import Features
from engine.evals.report import markdown, page, pictures
from engine.evals.report.content import Content, content
from engine.evals.result import Result


def write(
    folder: Path,
    results: Sequence[Result],
    run: Mapping[str, Any],
    features: Mapping[str, tuple[Features, Features]],
    extras: Extras,
    map_kind: str = "pca",
    commands: Mapping[tuple[str, str], str] | None = None,
) -> None:
    """Write report.html, results.md, results.json and pictures/ into `folder`: aside first, then renamed, so never half of it.

    An earlier evaluation at `folder` is replaced. Arguments as for `content`. The figures are in results.json whatever fails: a
    picture or a text that can't be made is one of the `extras`, left out and named there.

    Raises:
        BadInput: `folder` holds something else, or cannot be written.
    """
    check_folder(folder)
    whole = content(results, run, features, extras, map_kind, commands)
    texts = {}
    for name, render in (("results.md", markdown.render), ("report.html", page.render)):
        with extras.of(name):
            texts[name] = render(whole)

    def fill(aside: Path) -> None:
        pictures.save(whole.pictures, aside)
        (aside / "results.json").write_text(as_json(whole, extras.left_out))
        for name, text in texts.items():
            # a path that is no text has letters that UTF-8 cannot hold
            (aside / name).write_text(text, encoding="utf-8", errors="replace")

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


def as_json(whole: Content, left_out: Mapping[str, str]) -> str:
    """results.json: what was run, on what, with which versions, and every figure, setting and table of every result.

    What is not finite is null.
    """
    features = {
        name: {
            "feature": test.pooling,
            "width": test.values.shape[1],
            "training images": len(train.values),
            "test images": len(test.values),
            "classes": list(train.classes) if train.classes else None,
        }
        for name, (train, test) in whole.features.items()
    }
    found = [
        {
            "weights": result.weights,
            "protocol": result.protocol,
            "values": result.values,
            "intervals": whole.intervals[result.weights, result.protocol],
            "headline": result.shown,
            "plain": sorted(result.plain),
            "lower": sorted(result.lower),
            "spread": result.spread,
            "settings": result.settings,
            "details": {key: value for key, value in result.details.items() if not isinstance(value, np.ndarray)},
            "feature": result.feature,
            "data": result.data,
            "counts": result.counts,
            "seconds": round(result.seconds, 3),
            "pictures": {
                picture.title: picture.file
                for picture in whole.pictures
                if (picture.weights, picture.protocol) == (result.weights, result.protocol)
            },
            "command": whole.commands.get((result.weights, result.protocol)),
        }
        for result in whole.results
    ]
    everything = {
        "date": whole.date,
        "run": whole.run,
        "features": features,
        "results": found,
        "differences": [asdict(each) for each in whole.differences],
        "machine": whole.machine,
        "versions": whole.versions,
        "left_out": left_out,
    }
    return json.dumps(_plain(everything), indent=1, default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    """The same in JSON's own types; NaN and infinity, which JSON lacks, are None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
