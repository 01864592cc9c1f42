"""Tables, results.json, pictures, and that a folder is there whole or not at all."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from engine import evals
from engine.errors import BadInput
from engine.evals import Features, Result, report


def pair(name: str, seed: int = 0) -> tuple[Features, Features]:
    rng = np.random.default_rng(seed)
    splits = []
    for n in (90, 30):
        labels = np.arange(n) % 3
        values = 3 * np.eye(5)[labels] + rng.normal(size=(n, 5))
        splits.append(Features(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), name, ("a", "b", "c")))
    return tuple(splits)


@pytest.fixture(scope="module")
def judged():
    pairs = {"raw pixels": pair("raw pixels"), "MAE/2": pair("MAE/2", 1)}
    return pairs, evals.evaluate(pairs, protocols=("knn", "cluster"), seed=4)


def test_every_weights_meets_every_protocol_in_order(judged):
    _, results = judged
    assert [(result.weights, result.protocol) for result in results] == [
        ("raw pixels", "knn"), ("raw pixels", "cluster"), ("MAE/2", "knn"), ("MAE/2", "cluster"),
    ]  # fmt: skip
    assert all(result.seconds > 0 for result in results)
    assert results[1].settings["seeds"] == [4, 5, 6]


def test_the_folder_holds_everything(judged, tmp_path):
    pairs, results = judged
    report.write(tmp_path / "new" / "out", results, {"seed": 4}, pairs)
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "MAE-2-knn-confusion.png", "MAE-2-pca.png", "raw-pixels-knn-confusion.png", "raw-pixels-pca.png",
        "results.json", "results.md",
    ]  # fmt: skip
    whole = json.loads((out / "results.json").read_text())
    assert whole["run"] == {"seed": 4}
    assert set(whole["versions"]) == set(report.PACKAGES)
    assert whole["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert whole["features"]["MAE/2"] == {
        "feature": "as given", "width": 5, "training images": 90, "test images": 30, "classes": ["a", "b", "c"],
    }  # fmt: skip
    for stored, result in zip(whole["results"], results, strict=True):
        assert stored["values"] == result.values and stored["protocol"] == result.protocol
        assert "confusion" not in stored["details"]
    assert whole["results"][1]["details"]["runs"]["ACC"] == results[1].details["runs"]["ACC"]
    assert all(
        (out / name).read_bytes().startswith(b"\x89PNG") for name in ("MAE-2-pca.png", "MAE-2-knn-confusion.png")
    )
    assert list(tmp_path.joinpath("new").iterdir()) == [out]


def test_an_earlier_evaluation_is_replaced_and_anything_else_is_not(judged, tmp_path):
    pairs, results = judged
    report.write(tmp_path / "out", results, {"run": 1}, pairs)
    report.write(tmp_path / "out", results[:1], {"run": 2}, {"raw pixels": pairs["raw pixels"]})
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"] == {"run": 2}
    assert not (tmp_path / "out" / "MAE-2-pca.png").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="not an earlier evaluation"):
        report.write(tmp_path / "other", results, {}, pairs)
    with pytest.raises(BadInput, match="is a file"):
        report.write(tmp_path / "other" / "thesis.txt", results, {}, pairs)
    with pytest.raises(BadInput, match="not a folder that can be written to"):
        report.write(tmp_path / "other" / "thesis.txt" / "out", results, {}, pairs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_failure_half_way_leaves_the_earlier_folder_and_nothing_else(judged, tmp_path, monkeypatch):
    pairs, results = judged
    report.write(tmp_path / "out", results, {"run": 1}, pairs)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report, "draw_map", fail)
    for name in ("out", "fresh"):
        with pytest.raises(OSError, match="disk full"):
            report.write(tmp_path / name, results, {"run": 2}, pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"] == {"run": 1}


def results_by_hand() -> list[Result]:
    lowshot = {"1-shot": 0.64, "1-shot std": 0.012, "1-shot sweep-best": 0.65}
    return [
        Result("knn", {"top-1": 0.9641}, {}, weights="raw"),
        Result("lowshot", lowshot, {}, headline=("1-shot",), weights="raw"),
        Result("knn", {"top-1": 0.5}, {}, weights="MAE"),
        Result("cluster", {"silhouette": 0.1234}, {}, plain=frozenset({"silhouette"}), weights="MAE"),
    ]


def test_markdown_has_one_row_per_weights():
    assert report.markdown(results_by_hand()).splitlines() == [
        "| weights | knn top-1 | lowshot 1-shot | cluster silhouette |",
        "| --- | ---: | ---: | ---: |",
        "| raw | 96.4 % | 64.0 ± 1.2 % |  |",
        "| MAE | 50.0 % |  | 0.123 |",
    ]
    assert "sweep-best" in report.markdown(results_by_hand(), headline=False)


def test_the_screen_shows_every_figure_of_every_weights():
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.table(results_by_hand(), "title"))
    text = console.export_text()
    for part in ("title", "raw", "MAE", "96.4 %", "64.0 ± 1.2 %", "1-shot sweep-best", "65.0 %", "0.123"):
        assert part in text


@pytest.mark.parametrize("kind, classes", [("pca", 25), ("tsne", 3)])
def test_maps_of_few_and_of_many_classes(kind, classes, tmp_path):
    labels = torch.arange(100) % classes
    report.draw_map(tmp_path / "map.png", Features(torch.randn(100, 6), labels, "x"), kind)
    assert (tmp_path / "map.png").stat().st_size > 5000
