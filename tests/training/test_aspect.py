"""Runs on images of their own aspect: that they go on bit for bit wherever they stopped, see the same in micro-batches, can be
compiled, and are refused where they can't be had."""

import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from engine.core import dist
from engine.core.errors import BadInput
from engine.training import config
from engine.training.build import build
from engine.training.feeding import Feeding
from engine.training.parts import Parts, prepare
from engine.training.state import TrainState, content, restore
from tests.data.corpus import picture
from tests.faults.runs import flags

SIZES = ((90, 30), (40, 40), (30, 90), (64, 48), (48, 64), (40, 41), (200, 20), (64, 40))
STEPS = 4


@pytest.fixture(scope="module")
def ranks() -> dist.Ranks:
    return dist.start("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    for index, (width, height) in enumerate(SIZES):
        path = root / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(width, height, seed=index).save(path)
    return root


def parts_of(method: str, data: Path, ranks: dist.Ranks, *more: str) -> Parts:
    return prepare(config.parse([*flags(method, data, epochs=STEPS // 2), f"--{method}.aspect", "keep", *more]), ranks)


def train(parts: Parts, state: TrainState, until: int) -> list[float]:
    """The losses up to a step."""
    losses = []
    with Feeding(parts, state) as feeding:
        while state.step < until:
            batch = next(feeding)
            assert len(batch.sizes[:, 0].unique(dim=0)) > 1
            losses.append(float(state.update(state.step, batch.images, batch.ids, feeding.drawn(state.step))["loss"]))
            state.step += 1
    return losses


@pytest.mark.long
@pytest.mark.parametrize(("method", "tokens"), [("mae", "naflex"), ("dino", "progressive"), ("dino", "naflex")])
def test_a_stopped_run_goes_on_bit_for_bit(method: str, tokens: str, data: Path, ranks: dist.Ranks):
    grows = ("--tokens", tokens)
    parts = parts_of(method, data, ranks, *grows)
    whole = build(parts, 0, None)
    losses = train(parts, whole, STEPS)
    assert all(map(math.isfinite, losses))
    parts = parts_of(method, data, ranks, *grows)  # the encoder is a run's own
    half = build(parts, 0, None)
    begun = train(parts, half, 1)
    kept = {name: {key: value.clone() for key, value in named.items()} for name, named in content(half).items()}
    again = build(parts, 0, None, anew=False)
    restore(again, kept, {"stage": 0, "step": 1, "bad_files": []})
    assert begun + train(parts, again, STEPS) == losses
    ends = [content(state) for state in (whole, again)]
    assert ends[0].keys() == ends[1].keys()
    for name, named in ends[0].items():
        assert all(torch.equal(value, ends[1][name][key]) for key, value in named.items()), name


@pytest.mark.parametrize("method", ["mae"])
def test_micro_batches_give_the_whole_batch_s_update(method: str, data: Path, ranks: dist.Ranks):
    ends = []
    for accumulate in ("1", "2"):
        parts = parts_of(method, data, ranks, "--accumulate", accumulate)
        ends.append(train(parts, build(parts, 0, None), 2))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.long
def test_a_compiled_run_compiles_for_any_shape(data: Path, ranks: dist.Ranks):
    """Encoder's and decoder's blocks once each, the loss for one image of a shape and for several."""
    losses = []
    torch.compiler.reset()
    counters.clear()
    for compiles in ("off", "on"):
        parts = parts_of("mae", data, ranks, "--compile", compiles)
        losses.append(train(parts, build(parts, 0, None), STEPS))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 4


def test_runs_that_cannot_be_had_are_refused(data: Path, ranks: dist.Ranks):
    with pytest.raises(BadInput) as refused:
        parts_of("simmim", data, ranks)
    assert str(refused.value) == "--simmim.aspect keep: simmim can only be trained on crops of one shape."
    with pytest.raises(BadInput) as refused:
        config.parse(["--method", "mae", "--mae.aspect", "square"])
    assert str(refused.value) == (
        "--mae.aspect is square; it must be crop, or keep where no step draws the size of its patches."
    )
    with pytest.raises(BadInput) as refused:
        config.parse(["--method", "dino", "--tokens", "anneal", "--dino.aspect", "keep"])
    assert str(refused.value) == (
        "--dino.aspect is keep; it must be crop, or keep where all phases show all patches, of no size that is drawn."
    )
