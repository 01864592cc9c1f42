"""Tables, results.json, pages, pictures, commands, and that a folder is there whole or not at all."""

import io
import json
import re
import shlex
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from engine import eval as command
from engine import evals
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.core.flags import read, written
from engine.evals import Features, Result, charts, report
from engine.evals.report import content, environment, figures, markdown, page
from engine.evals.result import over_seeds
from tests.strict import STRICT


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
    commands = {("MAE/2", "knn"): "python -m engine.eval --weights x"}
    report.write(tmp_path / "new" / "out", results, {"seed": 4}, pairs, STRICT, commands=commands)
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "report.html", "results.json", "results.md"]
    names = [
        "MAE-2-knn-confusion.png", "MAE-2-principal-components.png", "raw-pixels-knn-confusion.png",
        "raw-pixels-principal-components.png",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "pictures").iterdir()) == names
    assert all((out / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    whole = json.loads((out / "results.json").read_text())
    assert whole["run"] == {"seed": 4}
    assert set(whole["versions"]) == set(report.PACKAGES)
    assert whole["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert whole["machine"]["threads of torch"] == torch.get_num_threads()
    assert whole["features"]["MAE/2"] == {
        "feature": "as given", "width": 5, "training images": 90, "test images": 30, "classes": ["a", "b", "c"],
    }  # fmt: skip
    for stored, result in zip(whole["results"], results, strict=True):
        assert stored["values"] == result.values and stored["protocol"] == result.protocol
        assert stored["counts"] == {"training images": 90, "test images": 30} and stored["feature"] == "as given"
        assert "confusion" not in stored["details"]
    assert whole["results"][1]["details"]["runs"]["ACC"] == results[1].details["runs"]["ACC"]
    assert [stored["command"] is not None for stored in whole["results"]] == [False, False, True, False]
    assert whole["results"][2]["pictures"] == {"confusion": "pictures/MAE-2-knn-confusion.png"}
    assert [each["figure"] for each in whole["differences"] if each["protocol"] == "knn"] == ["top-1"]
    assert list(tmp_path.joinpath("new").iterdir()) == [out]


def test_an_earlier_evaluation_is_replaced_and_anything_else_is_not(judged, tmp_path):
    pairs, results = judged
    report.write(tmp_path / "out", results, {"run": 1}, pairs, STRICT)
    report.write(tmp_path / "out", results[:1], {"run": 2}, {"raw pixels": pairs["raw pixels"]}, STRICT)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"] == {"run": 2}
    assert sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir()) == [
        "raw-pixels-knn-confusion.png", "raw-pixels-principal-components.png",
    ]  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="not an earlier evaluation"):
        report.write(tmp_path / "other", results, {}, pairs, STRICT)
    with pytest.raises(BadInput, match="is a file"):
        report.write(tmp_path / "other" / "thesis.txt", results, {}, pairs, STRICT)
    with pytest.raises(BadInput, match="not a folder that can be written to"):
        report.write(tmp_path / "other" / "thesis.txt" / "out", results, {}, pairs, STRICT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("part", ["pictures.feature_map", "page.render", "markdown.render", "files.as_json"])
def test_a_failure_half_way_leaves_the_earlier_folder_and_nothing_else(part, judged, tmp_path, monkeypatch):
    pairs, results = {"MAE/2": judged[0]["MAE/2"]}, judged[1][2:3]
    report.write(tmp_path / "out", results, {"run": 1}, pairs, STRICT)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"engine.evals.report.{part}", fail)
    for name in ("out", "fresh"):
        with pytest.raises(KeyboardInterrupt):
            report.write(tmp_path / name, results, {"run": 2}, pairs, STRICT)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"] == {"run": 1}


def test_a_picture_or_a_text_that_fails_is_named_and_the_figures_are_kept(judged, tmp_path, monkeypatch):
    pairs, results = judged

    def fail(*args):
        raise ZeroDivisionError("no scale")

    monkeypatch.setattr("engine.evals.report.pictures.feature_map", fail)
    monkeypatch.setattr("engine.evals.report.page.render", fail)
    said: list[str] = []
    extras = Extras(said.append)
    report.write(tmp_path, results, {}, pairs, extras)
    whole = json.loads((tmp_path / "results.json").read_text())
    assert [found["values"] for found in whole["results"]] == [result.values for result in results]
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "results.json", "results.md"}
    assert len(list((tmp_path / "pictures").iterdir())) == 2  # of k-NN
    missing = ["picture 'principal components' of raw pixels", "picture 'principal components' of MAE/2", "report.html"]
    assert list(whole["left_out"]) == list(extras.left_out) == missing
    assert said[2].startswith("report.html left out: ZeroDivisionError: no scale (")


def results_by_hand() -> list[Result]:
    lowshot = {"1-shot": 0.64, "1-shot std": 0.012, "1-shot sweep-best": 0.65}
    return [
        Result("knn", {"top-1": 0.9641}, {}, weights="raw"),
        Result("lowshot", lowshot, {}, headline=("1-shot",), weights="raw"),
        Result("knn", {"top-1": 0.5}, {}, weights="MAE"),
        Result("cluster", {"silhouette": 0.1234}, {}, plain=frozenset({"silhouette"}), weights="MAE"),
    ]


def rendered(results: list[Result], **more) -> tuple[str, str]:
    """The page and the Markdown."""
    whole = content.content(results, {}, {}, STRICT, **more)
    return page.render(whole), markdown.render(whole)


def visible(html: str) -> str:
    """What a page says, in one line."""

    class Reader(HTMLParser):
        said: tuple[str, ...] = ()
        inside = ""

        def handle_starttag(self, tag, attributes):
            self.inside = tag

        def handle_data(self, data):
            if self.inside not in ("style", "script"):
                self.said += (data,)

    reader = Reader()
    reader.feed(html.replace("<wbr>", ""))
    return " ".join(" ".join(reader.said).split())


def test_markdown_has_one_row_per_weights():
    text = rendered(results_by_hand())[1]
    table = [
        "| weights | knn top-1 | lowshot 1-shot | cluster silhouette |",
        "| --- | ---: | ---: | ---: |",
        "| raw | **96.4 %** | 64.0 ± 1.2 % |  |",
        "| MAE | 50.0 % |  | 0.123 |",
    ]
    assert "\n".join(table) in text
    assert "sweep-best" not in text.partition("## Differences")[0] and "| 1-shot sweep-best | 65.0 % |" in text


def test_wide_summaries_are_broken_between_protocols():
    values = {str(number): 0.5 for number in range(5)}
    results = [Result(protocol, values, {}, weights="x") for protocol in ("a", "b", "c")]
    results.append(Result("d", {str(number): 0.5 for number in range(9)}, {}, weights="x"))
    groups = [band.groups for band in content.content(results, {}, {}, STRICT).bands]
    assert groups == [[("a", 5)], [("b", 5)], [("c", 5)], [("d", 7)], [("d", 2)]]
    narrow = [replace(result, headline=("0", "1")) for result in results[:3]]
    assert [band.groups for band in content.content(narrow, {}, {}, STRICT).bands] == [[("a", 2), ("b", 2), ("c", 2)]]


def test_the_screen_shows_every_figure_of_every_weights():
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.table(results_by_hand(), "title"))
    text = console.export_text()
    for part in ("title", "raw", "MAE", "96.4 %", "64.0 ± 1.2 %", "1-shot sweep-best", "65.0 %", "0.123"):
        assert part in text


@pytest.mark.parametrize(
    "value, plain, sign, shown",
    [
        (0.9641, False, "", "96.4"), (0.1234, True, "", "0.123"), (12345.6, True, "", "12,346"),
        (0.023, False, "+", "+2.3"), (-0.00001, False, "+", "0.0"), (0.0, True, "+", "0.000"),
        (float("nan"), False, "", "–"), (None, True, "", "–"),
    ],
)  # fmt: skip
def test_numbers_read_well(value, plain, sign, shown):
    assert figures.number(value, plain, sign) == shown


def test_the_best_of_a_column_is_marked_and_less_may_be_better():
    values = (
        {"a": 0.5, "d": 2.0, "same": 0.1},
        {"a": 0.7, "d": 1.0, "same": 0.1},
        {"a": 0.70004, "d": float("nan"), "same": 0.1},
    )
    results = [
        Result("p", each, {}, plain=frozenset({"d"}), lower=frozenset({"d"}), weights=name)
        for each, name in zip(values, "xyz")
    ]
    (band,) = content.content(results, {}, {}, STRICT).bands
    assert [[cell.best for cell in row] for row in band.rows.values()] == [
        [False, False, False], [True, True, False], [True, False, False],
    ]  # fmt: skip
    assert band.rows["z"][1].text == "–"


def of_two_weights(seed: int = 0) -> list[Result]:
    """A figure with samples, one with seeds only, one with neither; the second weights are better in all, surely in one."""
    rng = np.random.default_rng(seed)
    hits = (rng.random(200) < 0.6).astype(float)
    better = np.where(rng.random(200) < 0.2, 1.0, hits)
    results = []
    for name, samples, gain in (("A", hits, 0.0), ("B", better, 0.05)):
        one = Result(
            "p", {"hits": samples.mean(), "alike": 0.5 + gain / 50}, {"seed": 0}, weights=name,
            samples={"hits": samples, "alike": 0.5 + rng.normal(size=200) * 0.2}, counts={"test images": 200},
        )  # fmt: skip
        seeded = [Result("q", {"score": 0.3 + gain + 0.01 * run + gain * run}, {}, weights=name) for run in range(3)]
        results += [one, over_seeds(seeded, range(3)), Result("r", {"only": 0.4 + gain}, {}, weights=name)]
    return results


def test_differences_say_what_they_rest_on():
    found = {each.figure: each for each in report.compared(of_two_weights())}
    assert list(found) == ["hits", "alike", "score", "only"]
    hits = found["hits"]
    assert hits.over == "samples" and hits.count == 200 and hits.sure and hits.better
    assert hits.interval[0] < hits.mean < hits.interval[1]
    assert found["alike"].over == "samples" and not found["alike"].sure
    assert (found["score"].over, found["score"].count, found["score"].interval) == ("seeds", 3, None)
    assert found["score"].mean == pytest.approx(0.1)
    assert found["score"].spread == pytest.approx(np.std([0.05, 0.1, 0.15]))
    assert (found["only"].over, found["only"].mean) == ("", pytest.approx(0.05))
    html, text = rendered(of_two_weights())
    for shown in (text.replace("\\", ""), visible(html).replace("\N{MINUS SIGN}", "-")):
        assert "± 4.1 over 3 seeds" in shown and "no interval" in shown and "n = 200" in shown and "▲" in shown
    console = Console(width=100, record=True, file=StringIO())
    console.print(report.differences(report.compared(of_two_weights()), "A"))
    assert "differences to A" in console.export_text(clear=False) and "▲" in console.export_text()


def test_samples_that_are_not_the_same_ones_are_not_paired():
    first, second = (
        Result("p", {"a": m.mean()}, {}, samples={"a": m}, weights=str(len(m))) for m in (np.eye(4)[0], np.eye(5)[0])
    )
    (found,) = report.compared([first, second])
    assert found.over == "" and found.mean == pytest.approx(0.2 - 0.25)
    undefined = replace(second, values={"a": float("nan")})
    assert report.compared([first, undefined]) == []


def test_best_epoch_figures_bring_their_last_epoch_ones():
    values = {"last-epoch top-1 (best lr)": 0.8, "best-epoch top-1": 0.9}
    results = [Result("linear", values, {}, headline=("best-epoch top-1",), weights=name) for name in "ab"]
    html, text = rendered([results[0], replace(results[1], values={name: v - 0.1 for name, v in values.items()})])
    whole = content.content(results, {}, {}, STRICT)
    assert [figure for _, figure in whole.bands[0].columns] == list(values)
    for shown in (visible(html), text):
        assert shown.count("last-epoch top-1 (best lr)") == shown.count("best-epoch top-1") >= 3


def test_several_seeds_are_shown_with_what_the_spread_is_over():
    runs = [Result("p", {"a": 0.5 + 0.1 * seed}, {"seed": seed, "k": 3}, weights="x") for seed in range(2)]
    html, text = rendered([over_seeds(runs, [0, 1])])
    for shown in (visible(html).replace(" % ± 5.0", " ± 5.0 %"), text):
        assert "55.0 ± 5.0 %" in shown and "2 seeds" in shown and "± is the deviation over" in shown
    assert "seeds 0 1" in report.sentence(over_seeds(runs, [0, 1]))


NASTY = "<script>alert(\"x\")</script> & 'q' | `b` [l](u) 文字"


def test_names_are_text_wherever_they_stand():
    figure = Figure(figsize=(1, 1))
    results = [
        Result(
            NASTY, {NASTY: 0.5, f"{NASTY} std": 0.1}, {NASTY: NASTY}, {NASTY: [{NASTY: NASTY, "x": 0.25}], "note": NASTY},
            pictures={NASTY: figure}, counts={NASTY: 3}, weights=f"{NASTY} {n}", feature=NASTY, data=NASTY, spread=NASTY,
        )
        for n in range(2)
    ]  # fmt: skip
    run = {NASTY: NASTY, "unreadable images left out": [(NASTY, NASTY)]}
    commands = {(result.weights, NASTY): f"echo {shlex.quote(NASTY)}" for result in results}
    whole = content.content(results, run, {}, STRICT, commands=commands)
    html, text = page.render(whole), markdown.render(whole)
    assert html.count("<script>") == 1 and "alert(&#34;x&#34;)" in html
    assert visible(html).count(NASTY.replace("-", "\N{MINUS SIGN}")) > 15
    outside = re.sub(r"```\n.*?\n```", "", text, flags=re.DOTALL)
    assert "<script>" not in re.sub(r"\\.", "", outside) and "`" not in re.sub(r"\\.", "", outside)
    rows = [line for line in re.sub(r"\\.", "", outside).splitlines() if line.startswith("|")]
    assert rows and all(line.endswith("|") for line in rows)
    console = Console(width=300, record=True, file=StringIO())
    markup = [replace(result, weights=f"[/red][bold]{n}") for n, result in enumerate(results)]
    console.print(report.table(markup), report.differences(report.compared(markup), "[/a]"), *report.sweeps(markup[0]))
    assert "[/red][bold]1" in console.export_text()


def test_pages_need_nothing_beside_them():
    html, text = rendered(
        [replace(result, pictures={"drawing": charts.confusion(np.eye(3, dtype=int))}) for result in results_by_hand()]
    )
    assert not re.findall(
        r"https?:|//[a-z]|url\(|@import|<link", re.sub(r"base64,[^\"]*", "", html).replace("// sorting", "")
    )
    assert html.count("data:image/png;base64,") == 4
    assert text.count("](pictures/") == 4


def test_pictures_have_files_of_their_own_even_where_names_are_alike(tmp_path):
    names = ("MAE/2", "MAE-2", "mae 2", "文字" * 200, "/very/" + "long" * 100)
    results = [
        Result(
            "p",
            {"a": 0.5},
            {},
            weights=name,
            pictures={"curve": Figure(figsize=(1 + n, 1)), "t" * 300: Figure(figsize=(1, 1))},
        )
        for n, name in enumerate(names)
    ]
    report.write(tmp_path / "out", results, {}, {}, STRICT)
    files = sorted((tmp_path / "out" / "pictures").iterdir())
    assert len(files) == 10 and len({file.name.lower() for file in files}) == 10
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    stored = [tmp_path / "out" / file for result in whole["results"] for file in result["pictures"].values()]
    assert sorted(stored) == files
    for n, result in enumerate(whole["results"]):
        assert content.content(results, {}, {}, STRICT).pictures[2 * n].size == (100 * (1 + n), 100)
        assert (tmp_path / "out" / result["pictures"]["curve"]).read_bytes() == content.content(
            results, {}, {}, STRICT
        ).pictures[2 * n].png


def test_without_pictures_there_is_no_folder_for_them(tmp_path):
    report.write(tmp_path / "out", results_by_hand(), {}, {}, STRICT)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "results.json", "results.md"]
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


def test_json_holds_no_nan_and_no_numpy(tmp_path):
    nan = float("nan")
    result = Result(
        "p", {"a": nan, "b": np.float32(0.5)}, {"n": np.int64(3), "inf": [float("-inf")], "path": Path("x")},
        {"array": np.ones(3), "deep": {"a": (np.ones(2), nan)}, "rows": [{"k": 1, "v": nan}]},
        samples={"a": np.full(4, nan), "b": np.array([nan, 0.0, 1.0, 0.5])}, weights="x",
    )  # fmt: skip
    report.write(tmp_path / "out", [result], {"x": nan}, {}, STRICT)

    def refuse(word):
        raise AssertionError(word)

    whole = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    (stored,) = whole["results"]
    assert stored["values"] == {"a": None, "b": 0.5} and stored["settings"] == {"n": 3, "inf": [None], "path": "x"}
    assert stored["details"] == {"deep": {"a": [[1.0, 1.0], None]}, "rows": [{"k": 1, "v": None}]}
    assert list(stored["intervals"]) == ["b"] and whole["run"] == {"x": None}
    assert "nan" not in visible((tmp_path / "out" / "report.html").read_text()).split()


def test_paths_that_are_no_text_do_not_stop_a_report(tmp_path):
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    result = Result("p", {"a": 0.5}, {}, weights=odd, pictures={"x": Figure(figsize=(1, 1))})
    report.write(
        tmp_path / "out",
        [result],
        {"unreadable images left out": [(odd, "broken")]},
        {},
        STRICT,
        commands={(odd, "p"): odd},
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["weights"] == odd
    assert "caf?.png" in (tmp_path / "out" / "report.html").read_text()


def test_tables_of_details_show_fractions_in_percent_and_the_rest_as_it_is():
    rows = [
        {"category": "cat", "images": 3, "IoU": 0.5, "d'": 1.25},
        {"category": "dog", "images": 0, "IoU": float("nan")},
    ]
    result = Result(
        "p", {"a": 0.5}, {}, {"by category": rows, "none": [], "list": [1, 2]}, plain=frozenset({"d'"}), weights="x"
    )
    assert figures.tables(result) == {
        "by category": (["category", "images", "IoU", "d'"], [["cat", "3", "50.0 %", "1.25"], ["dog", "0", "–", ""]])
    }
    html, text = rendered([result])
    assert "| cat | 3 | 50.0 % | 1.25 |" in text and "50.0 %" in visible(html) and "list (x): 1 2" in text


def test_settings_that_are_no_published_ones_stand_out():
    ours = {"threshold": "a proposal of the sheet", "lr": "ours: 0.1", "recipe": "after CAPI's code"}
    settings = ours | {"layer": "after the final norm", "hours": "three hours"}
    html, text = rendered([Result("p", {"a": 0.5}, settings, weights="x")])
    assert re.findall(r'class="ours">([^<]*)<', html) == [words.replace("'", "&#39;") for words in ours.values()]
    named = text.partition("Proposals, or ours")[2].partition("Settings:")[0]
    assert all(words in named for words in ours.values()) and "final norm" not in named


@pytest.mark.parametrize(
    "arguments",
    [
        "--weights raw --protocol knn",
        "--weights raw random:vit_micro_patch8_32 --protocol knn --seed 3 --seeds 2 --knn.k 5 --knn.standardise",
        "--weights raw --protocol lowshot --lowshot.shots 1 3 --lowshot.percents --lowshot.penalty 1e-05 --out 'a b'",
        "--weights random:vit_micro_patch8_32 --protocol segment_lowshot --segment-lowshot.c 2 --seed 1",
        "--weights raw --protocol cluster linear --linear.base-lrs 0.5 0.25 --data 'cifar10:/a b/$c' --no-cache --map tsne",
        "--weights FILE --compare raw --model vit_micro_patch8_32 --pool avg --image-size 32 64 --precision fp32 --objects voc:x",
    ],
)
def test_the_command_of_a_number_gives_the_same_settings(arguments, tmp_path):
    (tmp_path / "weights 1.pth").touch()
    words = [str(tmp_path / "weights 1.pth") if word == "FILE" else word for word in shlex.split(arguments)]
    flags, settings = command.parse(words)
    for source in flags.judged:
        for protocol, chosen in settings.items():
            python, *rest = shlex.split(command.command(flags, source, protocol, chosen))
            assert python == "python" and rest[:2] == ["-m", "engine.eval"]
            again, found = command.parse(rest[2:])
            assert found == {protocol: chosen} and again.judged == (source,)
            same = ("data", "image_size", "device", "precision", "batch_size", "cache", "bad_limit", "seed", "seeds")
            assert [getattr(again, name) for name in same] == [getattr(flags, name) for name in same]
            assert again.model == ("" if source in ("raw", "random:vit_micro_patch8_32") else flags.model)
            assert again.pool == ("" if source == "raw" else flags.pool)
            assert not again.objects and not again.out


def changed(settings):
    """The same settings with another value wherever the dataclass accepts one."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 or 0.25, tuple: lambda x: x[:-1]}
        with suppress(BadInput):
            if each.name != "seed":
                settings = replace(settings, **{each.name: other.get(type(value), lambda x: x)(value)})
    return settings


@pytest.mark.parametrize("name", evals.protocols())
def test_settings_of_every_protocol_can_be_written_as_flags(name):
    settings = evals.protocol(name).Settings
    assert written(settings()) == []
    other = changed(settings())
    assert other != settings() and read(settings, written(other)) == other


@dataclass(frozen=True)
class Inner:
    """One."""

    deep_flag: bool = True


@dataclass(frozen=True)
class Odd:
    """Another."""

    levels: tuple[float, ...] = (-0.5, 0.5)
    path: Path | None = None
    text: str = "x"
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "odd",
    [Odd((-1.5, -1e-7), Path("a b"), ""), Odd((), None, "$(x) 'y'", Inner(False)), Odd(inner=Inner(False))],
)
def test_odd_values_survive_the_shell(odd):
    assert read(Odd, shlex.split(shlex.join(written(odd)))) == odd


def test_the_commit_of_a_checkout_is_told_and_nothing_without_one(tmp_path):
    assert environment.commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = environment.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("2")
    assert environment.commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize("kind, classes, n", [("pca", 25, 100), ("tsne", 3, 100), ("tsne", 2, 12)])
def test_maps_of_few_and_of_many_classes(kind, classes, n):
    labels = torch.arange(n) % classes
    figure = charts.feature_map(Features(torch.randn(n, 6), labels, "x"), kind)
    assert len(figure.axes[0].collections) == classes


@pytest.mark.parametrize("kind", charts.MAPS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_map_of_a_handful_is_a_picture_or_says_why_not(kind, n):
    figure = charts.feature_map(Features(torch.randn(n, 6), torch.zeros(n, dtype=torch.int64), "x"), kind)
    figure.savefig(io.BytesIO())
    assert bool(figure.axes) == (n == 4)


def test_names_that_would_be_broken_formulas_are_drawn():
    names, drawn = [r"$\frac{$", "a_{b$"], io.BytesIO()
    figure = charts.confusion(np.eye(2, dtype=int), names)
    figure.savefig(drawn)
    assert drawn.getvalue().startswith(b"\x89PNG")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == names


def test_confusions_name_classes_where_there_is_room():
    few, many = charts.confusion(np.eye(2, dtype=int), ["cat", "dog"]), charts.confusion(np.eye(30, dtype=int))
    assert [tick.get_text() for tick in few.axes[0].get_xticklabels()] == ["cat", "dog"]
    assert not many.axes[0].texts
