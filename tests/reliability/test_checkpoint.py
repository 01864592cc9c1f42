"""Checkpoints are there whole or not at all, and hostile or damaged ones are refused or passed over."""

import json
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.errors import BadInput


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


def keep_saving(folder: Path, step: int, announce: int) -> None:
    """Save one checkpoint after the other, and say the number of each that is done."""
    while True:
        step += 1
        tensors = {"model": {"weight": torch.full((256, 256), float(step))}, "average": {}}
        checkpoint.save(folder, step, tensors, {"step": step}, 2)
        os.write(announce, b"%d\n" % step)


def test_killed_at_any_moment_leaves_the_last_announced_checkpoint_or_a_newer_one(tmp_path: Path):
    announced = 0
    for moment in range(60):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                keep_saving(tmp_path, announced, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as said:
            said.readline()
            # A different place within the next save each time.
            time.sleep(0.0004 * moment)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            announced = max([announced + 1, *map(int, said.read().split())])
        tensors, position = checkpoint.newest(tmp_path, print)
        assert position["step"] >= announced
        assert torch.equal(tensors["model"]["weight"], torch.full((256, 256), float(position["step"])))
        announced = position["step"]
