"""Checkpoints are there whole or not at all, and hostile or damaged ones are refused or passed over."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.core import durable
from engine.core.durable import storage_fault
from engine.core.errors import BadInput
from engine.methods.mae import Mae, Settings
from engine.model import vit
from engine.training import checkpoint, state
from engine.training.step import Update
from tests.saved import copied

ROOT = Path(__file__).parents[2]


def content(number: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((64, 64), number), "count": torch.tensor(3)}, "average": {}}


def write(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoint.save(folder, step, content(step), {"step": step}, keep)


def test_round_trip_and_pruning(tmp_path: Path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-000000004", "step-000000003"]
    tensors, position = checkpoint.newest(tmp_path, print)
    assert position == {"step": 4}
    assert torch.equal(tensors["model"]["weight"], torch.full((64, 64), 4.0))
    assert tensors["model"]["count"] == 3
    assert tensors["average"] == {}


@pytest.mark.parametrize("file", ["model.safetensors", "average.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "cut", "gone"])
def test_a_damaged_file_falls_back_and_says_so(tmp_path: Path, file: str, fault: str):
    write(tmp_path, 1, 2)
    victim = tmp_path / "step-000000002" / file
    raw = bytearray(victim.read_bytes())
    if fault == "gone":
        victim.unlink()
    elif fault == "cut":
        victim.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)
    said = []
    _, position = checkpoint.newest(tmp_path, said.append)
    assert position == {"step": 1}
    assert len(said) == 1
    assert "step-000000002 is damaged" in said[0]


@pytest.mark.parametrize(
    "manifest",
    [
        "{}",
        "[]",
        "3",
        '{"state.json": 3}',
        '{"model.safetensors": "00"}',
        '{"state.json": "00", "../step-000000001/state.json": "00"}',
    ],
)
def test_a_manifest_that_save_did_not_write_is_no_proof(tmp_path: Path, manifest: str):
    write(tmp_path, 1, 2)
    (tmp_path / "step-000000002" / "manifest.json").write_text(manifest)
    said = []
    assert checkpoint.newest(tmp_path, said.append)[1] == {"step": 1}
    assert "step-000000002 is damaged" in said[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("model.safetensors", "is no file"), ("state.json", "is no file"), ("manifest.json", "is missing or unreadable")],
)
def test_a_name_that_is_no_file_is_not_read(tmp_path: Path, name: str, words: str, kind: str):
    write(tmp_path, 1, 2)
    victim = tmp_path / "step-000000002" / name
    aside = victim.rename(tmp_path / "aside")
    if kind == "pipe":
        os.mkfifo(victim)
    else:
        victim.symlink_to(aside if kind == "link" else "/dev/zero")
    said = []
    assert checkpoint.newest(tmp_path, said.append)[1] == {"step": 1}
    assert f"{name} {words}" in said[0]


def test_what_save_did_not_name_is_neither_read_nor_removed(tmp_path: Path):
    write(tmp_path, 1)
    for name in ("step-best", "step-9", "step-00000000x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000001" / ".DS_Store").write_text("x")
    (tmp_path / "step-000000001" / "foreign.safetensors").write_bytes(b"x")
    write(tmp_path, 2, 3, keep=1)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-000000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000003",
        "step-00000000x",
        "step-9",
        "step-best",
    ]
    assert checkpoint.newest(tmp_path, print)[1] == {"step": 3}


def test_a_damaged_later_one_does_not_cost_what_was_just_written(tmp_path: Path):
    write(tmp_path, 10, 30)
    (tmp_path / "step-000000030" / "state.json").unlink()
    assert checkpoint.newest(tmp_path, lambda _: None)[1] == {"step": 10}
    write(tmp_path, 20, keep=1)
    assert checkpoint.newest(tmp_path, lambda _: None)[1] == {"step": 20}


def test_of_more_steps_than_nine_digits_the_newest_is_the_newest(tmp_path: Path):
    write(tmp_path, 999_999_999, 1_000_000_000, keep=1)
    assert checkpoint.newest(tmp_path, print)[1] == {"step": 1_000_000_000}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("average"), "holds guard, model, optimizer, and this run needs average, guard"),
        (lambda tensors: tensors["guard"].pop("skipped"), "the checkpoint's guard does not fit this run"),
        (lambda tensors: tensors["model"].popitem(), "the checkpoint's model does not fit this run"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(change, words: str):
    method = Mae(vit.create("vit_micro_patch8_32", depth=1), Settings(decoder_dim=64, decoder_depth=1, decoder_heads=2))
    one = state.TrainState(method, Update(method, 10), 0, 0, [])
    tensors, where = copied(one), state.position(one)
    state.restore(one, tensors, where)
    change(tensors)
    with pytest.raises(BadInput, match=words):
        state.restore(one, tensors, where)


def test_nothing_sound_is_a_clear_refusal(tmp_path: Path):
    with pytest.raises(BadInput, match="there is none"):
        checkpoint.newest(tmp_path, print)
    write(tmp_path, 1)
    (tmp_path / "step-000000001" / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(BadInput, match="all 1 are damaged"):
        checkpoint.newest(tmp_path, print)


def test_a_pickle_is_never_run(tmp_path: Path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    write(tmp_path / "run", 1)
    folder = tmp_path / "run" / "step-000000001"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary()))
    # Even with a manifest that vouches for it.
    hashes = json.loads((folder / "manifest.json").read_text())
    hashes["model.safetensors"] = checkpoint._sha256(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(BadInput):
        checkpoint.newest(tmp_path / "run", print)
    assert not (tmp_path / "canary").exists()


def other_byte(path: Path) -> None:
    """The last one, with the length of the file and the header of safetensors as they were."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("fault", [other_byte, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_what_cannot_be_read_back_as_it_was_written_is_never_the_newest(
    fault: Callable[[Path], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_to_disk_alone", lambda path: path.name == name and fault(path))
    with pytest.raises(OSError) as raised:
        write(tmp_path, 2, keep=1)
    assert storage_fault(raised.value, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert checkpoint.newest(tmp_path, print)[1] == {"step": 1}


def test_it_is_read_back_before_it_has_its_name_and_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, check = [], checkpoint._check

    def looks(*given) -> None:
        check(*given)
        seen.append([path.name for path in checkpoint.found(tmp_path)])

    monkeypatch.setattr(checkpoint, "_check", looks)
    write(tmp_path, 1, 2, keep=1)
    assert seen == [[], ["step-000000001"]]
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-000000002"]


def test_content_that_is_not_finite_or_has_no_elements_is_read_back_as_it_was(tmp_path: Path):
    odd = {
        "nan": torch.tensor([float("nan"), -0.0]),
        "bf16": torch.ones(3).bfloat16(),
        "none": torch.empty(0, 3),
        "yes": torch.tensor(True),
    }
    checkpoint.save(tmp_path, 1, {"model": odd, "average": {}}, {"step": 1})
    assert checkpoint.newest(tmp_path, print)[0]["model"].keys() == odd.keys()


KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
from engine.training import checkpoint

folder = Path(sys.argv[1])


def keep_saving(step, announce):
    while True:
        step += 1
        tensors = {"model": {"weight": torch.full((256, 256), float(step))}, "average": {}}
        checkpoint.save(folder, step, tensors, {"step": step}, 2)
        os.write(announce, b"%d\\n" % step)


announced = 0
for moment in range(60):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        keep_saving(announced, writer)
    os.close(writer)
    with os.fdopen(reader) as said:
        first = int(said.readline())
        time.sleep(0.0004 * moment)  # a different place within the next save each time
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        announced = max([first, *map(int, said.read().split())])
    found = sorted(int(path.name[5:]) for path in checkpoint.found(folder) if not checkpoint.damage(path))
    print(announced, found[-1] if found else 0)
    announced = max(announced, found[-1])
"""


def test_killed_at_any_moment_leaves_the_last_announced_checkpoint_or_a_newer_one(tmp_path: Path):
    # A process of its own that never computes before it forks: threads do not survive a fork.
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rounds = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rounds) == 60
    assert all(newest >= announced for announced, newest in rounds), rounds
    assert list(tmp_path.glob(".*"))
    durable.clear(tmp_path)
    assert not list(tmp_path.glob(".*"))
    tensors, position = checkpoint.newest(tmp_path, print)
    assert torch.equal(tensors["model"]["weight"], torch.full((256, 256), float(position["step"])))
