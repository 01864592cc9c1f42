"""Many protocols and weights in one call: what is told, what a failure or Ctrl-C leaves, names, several processes."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from engine import eval as command
from engine import evals
from engine.core.errors import BadInput
from engine.evals import Course, registry
from engine.evals.command_line import Eval
from engine.evals.encoders import encoder
from engine.model import vit, weights
from tests.ranks import torchrun

ROOT = Path(__file__).parents[2]
FEW = ("attentive", "cluster", "knn", "propagation")


@pytest.fixture
def call(folder, tmp_path, capsys):
    """Runs the command on the folder: the exit status, what it said on stderr by line, results.json or None."""

    def run(*arguments):
        out = tmp_path / "out"
        status = command.main([*arguments, "--data", str(folder), "--knn.k", "3", "--out", str(out), "--threads", "1"])
        file = out / "results.json"
        assert file.exists() == (out / "report.html").exists() == (out / "results.md").exists()
        return status, capsys.readouterr().err.splitlines(), json.loads(file.read_text()) if file.exists() else None

    return run


def made(whole) -> list[tuple[str, str]]:
    return [(result["weights"], result["protocol"]) for result in whole["results"]]


def test_it_is_told_what_runs_on_what_and_how_far_it_is(call):
    status, said, whole = call("--weights", "raw", "random:vit_micro_patch8_32", "--protocol", "knn", "cluster")
    assert status == 0 and len(made(whole)) == 4
    assert said[0].startswith("judging raw pixels, random vit_micro_patch8_32 by knn, cluster on /")
    places = [line.partition(" on ")[0] for line in said[1::2]]
    assert places == [
        "1 of 4: knn of raw pixels",
        "2 of 4: cluster of raw pixels",
        "3 of 4: knn of random vit_micro_patch8_32",
        "4 of 4: cluster of random vit_micro_patch8_32",
    ]
    assert [line[:15] for line in said[2::2]] == [f"{number} of 4: done in" for number in (1, 2, 3, 4)]


def test_time_so_far_is_told_in_minutes(monkeypatch):
    said = []
    course = Course(tell=said.append, plan={("a", "knn"): "digits", ("a", "linear"): "digits"})
    course.announce()
    started = course.started
    monkeypatch.setattr(time, "perf_counter", lambda: started + 150)
    with course.step("a", "linear"):
        pass
    assert said == [
        "judging a by knn, linear on digits",
        "2 of 2: linear on digits (2.5 min so far)",
        "2 of 2: done in 0.0 s",
    ]


def test_one_protocol_is_told_of_by_its_result_alone(call):
    assert call("--weights", "raw")[:2] == (0, [])


def test_all_means_every_protocol():
    assert tuple(evals.settings_for(("knn", "all"))) == evals.protocols()


def test_all_leaves_out_what_does_not_go_with_the_weights(call, monkeypatch):
    monkeypatch.setattr(registry, "protocols", lambda: FEW)
    status, said, whole = call("--weights", "raw", "--protocol", "all")
    assert status == 0 and made(whole) == [("raw pixels", "cluster"), ("raw pixels", "knn")]
    reasons = [f"{name} of raw pixels, left out: raw pixels (32x32 pixels) have no patch" for name in FEW[::3]]
    assert [line.startswith(reason) for line, reason in zip(said[1:3], reasons, strict=True)] == [True, True]
    assert whole["run"]["without a result"] == said[1:3]


def test_what_is_left_out_for_one_reason_is_told_of_together(call, monkeypatch):
    monkeypatch.setattr(registry, "protocols", lambda: ("detection", "knn", "prompt"))
    said = call("--weights", "raw", "--protocol", "all")[1]
    assert said[1].startswith("detection, prompt of raw pixels, left out: raw pixels (32x32 pixels) have no patches")


def test_all_leaves_out_sizes_that_a_model_does_not_take(call, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "protocols", lambda: ("knn", "multilabel", "propagation"))
    weights.export(vit.create("vit_micro_patch8_32", positions="relative", depth=1), tmp_path / "one-size")
    status, said, whole = call("--weights", str(tmp_path / "one-size"), "--protocol", "all")
    assert status == 0 and made(whole) == [("one-size", "knn")]
    assert said[1].startswith("multilabel of one-size, left out: one-size has relative positions, for inputs of 32x32")
    assert said[2].startswith("propagation of one-size, left out: ")


def test_nothing_is_written_where_nothing_goes_with_the_weights(call):
    status, said, whole = call("--weights", "raw", "--protocol", "attentive", "propagation")
    assert (status, len(said), whole) == (2, 1, None) and "have no patch tokens" in said[0]


def failing(error):
    def evaluate(*judged):
        raise error

    return evaluate


def test_a_failure_loses_no_other_result(call, monkeypatch):
    monkeypatch.setattr(evals.protocol("cluster"), "evaluate", failing(BadInput("the clusters got lost.")))
    status, said, whole = call("--weights", "raw", "random:vit_micro_patch8_32", "--protocol", "cluster", "knn")
    assert status == 2 and made(whole) == [("raw pixels", "knn"), ("random vit_micro_patch8_32", "knn")]
    assert said[-1] == "error: cluster of raw pixels failed (and 1 more): the clusters got lost."
    assert whole["run"]["without a result"] == [
        f"cluster of {weights}, failed: the clusters got lost." for weights, _ in made(whole)
    ]


def test_the_failure_of_the_only_protocol_is_its_sentence_and_nothing_is_written(call, monkeypatch):
    monkeypatch.setattr(evals.protocol("cluster"), "evaluate", failing(BadInput("the clusters got lost.")))
    assert call("--weights", "raw", "--protocol", "cluster") == (2, ["error: the clusters got lost."], None)


@pytest.mark.parametrize("others", [(), ("other",)])
def test_nor_is_a_folder_left_that_the_command_chose(others, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in others:
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.setattr(evals.protocol("cluster"), "evaluate", failing(BadInput("the clusters got lost.")))
    arguments = ["--weights", "raw", "--protocol", "cluster", "--data", str(folder), "--threads", "1"]
    assert command.main(arguments) == 2 and capsys.readouterr().err == "error: the clusters got lost.\n"
    assert [path.name for path in tmp_path.glob("runs/*")] == list(others)
    assert (tmp_path / "runs").exists() == bool(others)


def test_ctrl_c_keeps_what_is_finished(call, monkeypatch, tmp_path):
    monkeypatch.setattr(evals.protocol("cluster"), "evaluate", failing(KeyboardInterrupt()))
    status, said, whole = call("--weights", "raw", "--protocol", "knn", "cluster")
    assert status == 130 and made(whole) == [("raw pixels", "knn")]
    assert said[-1] == f"stopped; {tmp_path / 'out' / 'report.html'} has what was finished"
    assert whole["run"]["without a result"] == ["cluster of raw pixels, not finished: the evaluation was stopped"]


def test_ctrl_c_before_anything_is_finished_leaves_nothing(call, monkeypatch):
    monkeypatch.setattr(evals.protocol("cluster"), "evaluate", failing(KeyboardInterrupt()))
    status, said, whole = call("--weights", "raw", "--protocol", "cluster", "knn")
    assert (status, said[-1], whole) == (130, "stopped; nothing was finished", None)


def test_a_defect_of_ours_loses_no_other_result_and_shows_itself(call, monkeypatch):
    monkeypatch.setattr(evals.protocol("cluster"), "evaluate", failing(ZeroDivisionError("no cluster")))
    status, said, whole = call("--weights", "raw", "--protocol", "cluster", "knn")
    assert status == 1 and made(whole) == [("raw pixels", "knn")]
    assert said[-1].startswith("error: cluster of raw pixels failed: ZeroDivisionError: no cluster (")
    assert whole["run"]["without a result"] == [
        said[-1].replace("error: cluster of raw pixels failed", "cluster of raw pixels, failed")
    ]


def test_a_picture_that_fails_shows_in_the_exit_status(call, monkeypatch):
    monkeypatch.setattr("engine.evals.report.pictures.feature_map", failing(ZeroDivisionError()))
    status, _, whole = call("--weights", "raw", "--protocol", "knn")
    assert status == 1 and made(whole) == [("raw pixels", "knn")]
    assert list(whole["left_out"]) == ["picture 'principal components' of raw pixels"]


def test_random_weights_are_drawn_by_the_seed(call):
    status, _, whole = call("--weights", "random:vit_micro_patch8_32", "--seed", "1")
    assert status == 0 and made(whole) == [("random vit_micro_patch8_32", "knn")]
    assert "--weights random:vit_micro_patch8_32 --protocol knn" in whole["results"][0]["command"]
    assert " --seed 1" in whole["results"][0]["command"]
    drawn = [encoder("random:vit_micro_patch8_32", Eval(seed=seed), "cpu")[1] for seed in (1, 1, 2)]
    assert drawn[0].fingerprint == drawn[1].fingerprint != drawn[2].fingerprint


@pytest.mark.parametrize("name", ["resnet50", "nothing", ""])
def test_random_wants_the_name_of_a_vit(call, name):
    status, said, whole = call("--weights", f"random:{name}")
    assert (status, len(said), whole) == (2, 1, None) and said[0].startswith("error: ") and repr(name)[1:-1] in said[0]


def test_weights_of_one_name_are_told_apart_and_compared_in_the_given_order(call, tmp_path):
    places = [str(tmp_path / run / "export") for run in ("b", "a")]
    for place in places:
        weights.export(vit.create("vit_micro_patch8_32", depth=1), place)
    status, _, whole = call("--weights", places[0], "--compare", "raw", places[1])
    assert status == 0 and made(whole) == [(places[0], "knn"), ("raw pixels", "knn"), (places[1], "knn")]
    assert list(dict.fromkeys(each["weights"] for each in whole["differences"])) == ["raw pixels", places[1]]
    status, _, whole = call("--compare", "raw", places[1], "--protocol", "knn")
    assert status == 0 and made(whole) == [("raw pixels", "knn"), ("export", "knn")]


@pytest.mark.long
def test_two_processes_find_what_one_does(call, folder, tmp_path):
    sources = ["--weights", "random:vit_micro_patch8_32", "--protocol", "knn", "attentive"]
    status, _, alone = call(*sources, "--batch-size", "2", "--attentive.epochs", "2")
    assert status == 0
    flags = ["--data", folder, "--knn.k", "3", "--out", tmp_path / "both", "--threads", "1", "--batch-size", "2"]
    done = subprocess.run(
        torchrun(2, "-m", "engine.eval", *sources, "--attentive.epochs", "2", *map(str, flags)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TESSERA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "both" / "results.json").read_text())
    assert made(together) == made(alone)
    for one, other in zip(alone["results"], together["results"], strict=True):
        assert one["values"] == pytest.approx(other["values"], abs=1e-6)
    assert done.stdout.count("report: ") == 1
