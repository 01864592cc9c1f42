"""Steps that are captured and replayed on the device that computes nothing: what the host still launches, that nothing of a
capture is refused or left out of the graph, that such faults are found, and a whole run."""

import json

import pytest
import torch

from engine.null_device import device
from tests.methods.small import REPLAYED

pytestmark = [pytest.mark.null_device, pytest.mark.long, pytest.mark.timeout(1800)]

COULD_NOT = "the step could not be captured as a CUDA graph ("
NOT_PERMITTED = COULD_NOT + "CUDA error: operation not permitted when stream is capturing)"
# by stage: launches of a step as it is and replayed, counted with torch 2.11.0 (ViT-Ti, 8 images, not compiled)
COUNTED = {
    "mae": {"mae": (1338, 43)},
    "maect": {"mae": (1340, 44), "nnclr": (916, 113), "maect": (1500, 288)},
}
FLAGS = (
    "--method mae --model vit_tiny_patch16_224 --data synthetic:48 --batch-size 8 --epochs 1 --device cuda --no-compile "
    "--calibrate never --graphs on"
)


def sound(found: dict[str, object]) -> None:
    assert found["faults"] == []
    assert found["replays"] == 1
    # what was launched before is in the graph or outside of it still, and its buffers are filled besides
    assert found["as_it_is"] == found["nodes"] + found["replayed"] - found["replays"] - found["filled"]


@pytest.mark.parametrize("name", COUNTED)
def test_the_host_launches_few_kernels_where_a_graph_has_the_others(name, on_device):
    (answer,) = device.answer("tests.null_device.graphs", ["counted", "eager", name], on_device()).values()
    for found in answer.values():
        sound(found)
        assert found["replayed"] < found["as_it_is"] / 5
    if torch.__version__.startswith("2.11.0"):
        assert {stage: (found["as_it_is"], found["replayed"]) for stage, found in answer.items()} == COUNTED[name]


def test_faults_in_a_capture_are_caught(on_device):
    found = device.answer("tests.null_device.graphs", ["planted"], on_device())
    bare = found.pop("bare")
    assert set(found) == {
        "read", "synchronised", "nonzero", "of_pageable_memory", "of_pinned_memory", "on_another_stream", "left_behind",
    }  # fmt: skip
    for name, call in (("read", "Stream"), ("synchronised", "Device"), ("nonzero", "Stream")):
        assert found[name]["said"] == f"{NOT_PERMITTED}; go on with --graphs off."
        assert found[name]["seen"][0] == f"refused while capturing: cuda{call}Synchronize"
    assert found["of_pageable_memory"]["said"].startswith(f"{COULD_NOT}Cannot copy between CPU and CUDA tensors during")
    assert found["left_behind"]["said"].startswith(f"{COULD_NOT}CUDA error: capturing stream has unjoined work)")
    # what a driver takes, and a replay would not do again as it should
    assert found["of_pinned_memory"] == {
        "said": "",
        "seen": ["between host and device in a graph: {'copy_to_device': 1}"],
    }
    assert found["on_another_stream"] == {"said": "", "seen": ["not captured: {'launch': 1}"]}
    unsupported, isolation, invalidated, illegal = 900, 905, 901, 401  # of cudaError_t
    for call in ("memcpy_of_pageable_memory", "memcpy", "malloc", "synchronize", "query", "event_query"):
        assert bare[call] == [0, unsupported, invalidated], call
    assert bare["event_of_before"] == [0, isolation, invalidated]
    assert bare["malloc, relaxed"] == [0, 0, 0]
    assert bare["legacy stream"] == [unsupported, illegal]


def test_a_run_replays_its_steps_to_its_end(on_device, tmp_path):
    out = tmp_path / "run"
    done = device.process(["-m", "tests.null_device.training", *FLAGS.split(), "--out", str(out)], on_device())
    assert done.returncode == 0, done.stderr[-4000:]
    assert "steps replayed from a CUDA graph" in done.stdout.splitlines()
    trained = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in trained if record["kind"] == "train"][-1] == 6


def test_a_run_tries_whether_it_replays_its_steps(on_device, tmp_path):
    """What takes less time is open there; the child that tries, the record and what the run makes of it are not."""
    out, seen = tmp_path / "run", on_device() | {"TESSERA_CACHE": str(tmp_path / "cache")}
    flags = [*FLAGS.replace("--graphs on", "--graphs auto --kernels reference").replace("never", "auto").split()]
    done = device.process(["-m", "tests.null_device.training", *flags, "--out", str(out)], seen)
    assert done.returncode == 0, done.stderr[-4000:]
    (record,) = (tmp_path / "cache" / "kernels").glob("nvidia-h200-*.json")
    ((key, trial),) = json.loads(record.read_text())["trials"].items()
    assert key.startswith("replayed step | mae | ")
    assert trial["apart"] == [0.0, 0.0] and trial["forms"].keys() == {"reference", "replayed"}
    why = json.loads((out / "kernels.json").read_text())["graphs"]["mae"]
    said = f"no CUDA graph: {why}" if why else "steps replayed from a CUDA graph"
    assert said in done.stdout.splitlines()


def test_graphs_that_cannot_be_had_are_refused_before_a_run_begins(on_device, tmp_path):
    out = tmp_path / "run"
    flags = FLAGS.replace("--method mae", "--method simmim --preset plain").split()
    done = device.process(["-m", "engine.train", *flags, "--out", str(out)], on_device())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --graphs on cannot be had in stage simmim: stochastic depth is drawn on the host; leave it out."
    )
    assert not out.exists()


@pytest.mark.exhaustive
def test_every_form_that_is_replayed_is_captured_whole(on_device):
    found = device.answer("tests.null_device.graphs", ["forms"], on_device())
    assert found.keys() == REPLAYED.keys()
    for name, form in found.items():
        assert (name, form["faults"], form["replays"]) == (name, [], 1)
        assert form["replayed"] < form["as_it_is"] / 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", device.CHIPS)
@pytest.mark.parametrize("compiles", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["maect", "mocov3", "swav", "msn", "mim_refiner"])
def test_published_steps_are_captured_whole_on_either_chip(name, compiles, chip, on_device):
    (answer,) = device.answer("tests.null_device.graphs", ["counted", compiles, name], on_device(chip)).values()
    for found in answer.values():
        sound(found)
