"""An update that was left out is found again, to the bit, and said is where in it values ceased to be finite."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import replay, train
from engine.core.optim import Moment
from engine.methods.mae import Mae
from engine.model.blocks import Mlp
from engine.training.replay import Seen, left_out
from tests.reliability.images import FLAGS, folder_of_images

EPOCHS = ("--epochs", "6", "--log-every", "3", "--save-every", "2", "--keep", "9")  # two steps each


@contextmanager
def planted() -> Iterator[None]:
    """At the eighth update, the second block's MLP gives infinities."""
    begin, forward = Mae.begin, Mlp.forward

    def begins(self: Mae, moment: Moment) -> None:
        begin(self, moment)
        for number, block in enumerate(self.encoder.blocks):
            block.mlp.planted = moment.step == 7 and number == 1

    def runs(self: Mlp, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return out * math.inf if getattr(self, "planted", False) else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mae, "begin", begins)
        patch.setattr(Mlp, "forward", runs)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    folder_of_images(folder / "images")
    with planted():
        assert train.main([*FLAGS, *EPOCHS, "--data", str(folder / "images"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_step_and_the_module_are_found(run: Path, capsys: pytest.CaptureFixture):
    (stretch,) = left_out(run)
    assert (stretch.before, stretch.last) == (6, 9)
    capsys.readouterr()
    with planted():
        assert replay.main([str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "going from step 4" in said[-2]
    assert said[-1].startswith("step 8: forward: encoder.blocks.1.mlp (Mlp), of finite input;")
    folder = run / "replay" / "step-000000008"
    what, batch = json.loads((folder / "what.json").read_text()), load_file(folder / "batch.safetensors")
    assert what["seen"]["images"] == what["seen"]["weights"] == []
    assert {"encoder.blocks.0.mlp.fc1.weight", "decoder.decoder_pred.weight"} <= set(what["seen"]["gradients"])
    assert batch["ids"].tolist() == what["ids"] and len(what["files"]) == 4
    assert batch["images.0"].shape == (4, 3, 32, 32) and any(name.startswith("drawn.") for name in batch)


def test_without_a_checkpoint_that_old_it_goes_from_the_start(run: Path, capsys: pytest.CaptureFixture):
    for checkpoint in sorted((run / "checkpoints").iterdir())[:1]:
        assert checkpoint.name == "step-000000004"
        shutil.rmtree(checkpoint)
    with planted():
        assert replay.main([str(run)]) == 0
    assert "from the first step of the run" in capsys.readouterr().out
    assert (run / "replay" / "step-000000008" / "what.json").is_file()


def test_what_cannot_be_replayed_is_one_sentence(run: Path, capsys: pytest.CaptureFixture):
    capsys.readouterr()
    assert replay.main([str(run), "--step", "9"]) == 2
    assert "left no update out after step 9" in capsys.readouterr().err
    assert replay.main([str(run / "nothing")]) == 2
    assert replay.main([str(run)]) == 2  # the fault is gone
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no update after step 6 up to 9 is left out now" in said[1]


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (Seen(images=[2]), "1 of its images hold values"),
        (Seen(weights=["norm.bias"], forward="x"), "1 weights are not finite, first norm.bias"),
        (Seen(loss=math.nan), "the loss, of outputs that are all finite"),
        (
            Seen(backward="the gradient of what a (B) gives", gradients=["w"]),
            "backward: the gradient of what a (B) gives; 1",
        ),
        (Seen(loss=1.0), "nothing: run uncompiled"),
    ],
)
def test_what_came_first_is_what_is_said(seen: Seen, said: str):
    assert said in str(seen)
