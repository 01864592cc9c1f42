"""A run whose steps see fewer tokens at first: what is shown when, that it goes on bit for bit wherever it stopped, that a
schedule of full values changes nothing, and who refuses it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import methods
from engine.core import dist
from engine.core.errors import BadInput
from engine.core.phases import Phase
from engine.methods.crops import MultiCrop
from engine.training import config
from engine.training.build import build
from engine.training.feeding import Feeding
from engine.training.parts import Parts, prepare
from engine.training.portions import portions
from engine.training.state import TrainState, content, restore
from tests.faults.runs import flags, images

STEPS = 8  # of a stage
SHRINKING = {"phases": "0 0.25 0.5 0.75", "phase-sides": "0.5 1 0.75 1", "phase-patches": "1 2 1 1"}
DROPPING = {"phases": "0 0.5 0.75", "phase-keeps": "0.25 0.5 1"}
BOTH = SHRINKING | {"phase-keeps": "0.25 0.5 0.5 1"}
DRAWING = {"phases": "0 0.75", "patch-draws": "1 2"}
TAKEN = {
    "mae": BOTH,
    "dino": BOTH,
    "dinov2": DRAWING | {"phase-depths": "1.5 1"},
    "maect": BOTH,
    "mim_cluster": SHRINKING,
}


@pytest.fixture
def ranks() -> dist.Ranks:
    return dist.start("cpu")


def parts_of(method: str, data: Path, ranks: dist.Ranks, phases: dict[str, str], *more: str) -> Parts:
    """Of the method alone, after whatever stages come before it."""
    words = [word for name, values in phases.items() for word in (f"--{method}.{name}", *values.split())]
    return prepare(config.parse([*flags(method, images(data), epochs=STEPS // 2), *words, *more]), ranks)


def train(parts: Parts, state: TrainState, until: int, log: list[tuple[int, ...]] | None = None) -> list[float]:
    """The losses up to a step; and the side of a patch, then, view by view, of crops."""
    losses = []
    with Feeding(parts, state) as feeding:
        while state.step < until:
            batch = next(feeding)
            report = state.update(state.step, batch.images, batch.ids, feeding.drawn(state.step))
            losses.append(float(report["loss"]))
            if log is not None:
                log.append((state.method.patch_size, *(view.shape[-1] for view in batch.images)))
            state.step += 1
    return losses


def tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    kept = content(state)
    return {name: {key: value.clone() for key, value in named.items()} for name, named in kept.items()}


def assert_equal(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name, named in one.items():
        for key, value in named.items():
            assert torch.equal(value, other[name][key]), f"{name}/{key}"


def last(parts: Parts) -> int:
    return len(parts.stages) - 1


@pytest.mark.long
@pytest.mark.parametrize("method", TAKEN)
def test_crops_grow_with_the_phases_and_a_stopped_run_goes_on_bit_for_bit(
    method: str, tmp_path: Path, ranks: dist.Ranks
):
    parts = parts_of(method, tmp_path, ranks, TAKEN[method])
    sides: list[tuple[int, ...]] = []
    whole = build(parts, last(parts), None)
    losses = train(parts, whole, STEPS, sides)
    if method == "dinov2":
        assert {step[:2] for step in sides[:6]} == {(8, 32), (16, 32)} and {step[:2] for step in sides[6:]} == {(8, 32)}
    else:
        assert [step[:2] for step in sides] == [(8, 16)] * 2 + [(16, 32)] * 2 + [(8, 24)] * 2 + [(8, 32)] * 2
    if method == "dino":
        assert [step[-1] for step in sides] == [8] * 2 + [16] * 6  # three quarters of two patches are two
    for stop in (3, 4, 7) if method == "mae" else (3,):  # within phases, and where one begins
        parts = parts_of(method, tmp_path, ranks, TAKEN[method])  # the encoder is a run's own
        half = build(parts, last(parts), None)
        begun = train(parts, half, stop)
        kept, where = tensors(half), {"stage": half.stage, "step": stop, "bad_files": []}
        again = build(parts, last(parts), None, anew=False)
        restore(again, kept, where)
        assert begun + train(parts, again, STEPS) == losses
        assert_equal(tensors(again), tensors(whole))


@pytest.mark.parametrize("method", [n for n in methods.names() if issubclass(methods.get(n), MultiCrop) and n != "mmc"])
def test_small_crops_come_with_the_phases(method: str, tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of(method, tmp_path, ranks, {"phases": "0 0.25", "phase-locals": "0.5 1", "local-crops": "4"})
    state, seen, settings = build(parts, last(parts), None), [], parts.settings(last(parts))
    for until, small in ((1, 2), (3, 4)):
        costs = state.method.in_phase(Phase(small=small / 4)).flops_per_image()
        assert train(parts, state, until, seen)[-1] > 0
        assert len(seen[-1]) == 1 + settings.global_crops + small and state.method.flops_per_image() == costs
    assert len(seen[1]) == len(seen[0]) < len(seen[2])


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_full_values_change_nothing(method: str, tmp_path: Path, ranks: dist.Ranks):
    ends = []
    for phases in ({}, {"phases": "0 0.5"} | dict.fromkeys(("phase-sides", "phase-keeps", "phase-patches"), "1 1")):
        parts = parts_of(method, tmp_path, ranks, phases)
        state = build(parts, 0, None)
        ends.append((train(parts, state, STEPS), tensors(state)))
    assert ends[0][0] == ends[1][0]
    assert_equal(ends[0][1], ends[1][1])


def test_a_teacher_sees_all_patches_and_as_large_ones(
    tmp_path: Path, ranks: dist.Ranks, monkeypatch: pytest.MonkeyPatch
):
    parts = parts_of("dino", tmp_path, ranks, DROPPING | {"phase-patches": "2 1 1"})
    state, seen = build(parts, 0, None), {"student": [], "teacher": []}
    for who, encoder in (("student", state.method.encoder), ("teacher", state.method.teacher.encoder)):

        def embed(views: Sequence, patch_size: int, who: str = who, embed=encoder.embed):
            packed = embed(views, patch_size)
            seen[who].append(tuple(group.length - 1 for group in packed.layout.groups))
            return packed

        monkeypatch.setattr(encoder, "embed", embed)
    train(parts, state, STEPS)
    assert seen["teacher"] == [(4, 4)] * 4 + [(16, 16)] * 4
    # two small crops of two by two patches, or one, shown whole
    assert seen["student"] == [(1, 1, 1, 1)] * 4 + [(n, n, 4, 4) for n in [8] * 2 + [16] * 2]


def test_portions_and_presets(tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of("maect", tmp_path, ranks, {}, "--tokens", "progressive")
    found = portions(parts.plan, parts.stages)
    assert [(one.name, one.steps) for one in found if one.stage.name == "mae"] == [
        ("mae, phase 1", 4), ("mae, phase 2", 2), ("mae, phase 3", 2),
    ]  # fmt: skip
    assert parts.plan.source.startswith("after ") and "a schedule of ours" in parts.plan.source
    again = config.parse([*flags("maect", tmp_path, epochs=4), "--tokens", "progressive"])
    assert again.stages == parts.plan.stages


def test_steps_that_draw_are_portions_by_what_they_draw(tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of("dinov2", tmp_path, ranks, {}, "--tokens", "flexi")
    found = {one.name: one for one in portions(parts.plan, parts.stages)}
    assert list(found) == ["dinov2, phase 1, patches x 1", "dinov2, phase 1, patches x 2", "dinov2, phase 2"]
    (stage,), (first, _) = parts.stages, parts.settings(0).token_phases.phases
    drawn = [first.form(parts.plan.train.seed, 0, step).patch for step in range(6)]
    assert [one.steps for one in found.values()] == [drawn.count(1), drawn.count(2), 2] and stage.total_steps == 8
    assert [one.phase.patch for one in found.values()] == [1, 2, 1]


def test_steps_that_mix_sides_are_portions_by_side(tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of("mae", tmp_path, ranks, {}, "--tokens", "naflex")
    *mixed, last_one = portions(parts.plan, parts.stages)
    names = [f"mae, phase 1, sides x {side}" for side in ("0.5", "0.714", "1")]
    assert [(one.name, one.steps, one.mixed) for one in mixed] == [(name, 2, "mae, phase 1") for name in names]
    assert [one.phase for one in mixed] == [Phase(0.5), Phase(5 / 7), Phase()]
    assert (last_one.name, last_one.steps, last_one.mixed) == ("mae, phase 2", 2, "mae, phase 2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "beit", "--tokens", "fast"], "--tokens fast cannot be had: no stage of beit can do with fewer"),
        (["--method", "ibot", "--tokens", "anneal"], "--tokens anneal cannot be had: no stage of ibot"),
        (["--method", "mae", "--tokens", "some"], "--tokens is 'some'; choose one of none, progressive"),
    ],
)
def test_presets_that_no_stage_can_take_are_refused(arguments: list[str], sentence: str):
    with pytest.raises(BadInput) as refused:
        config.parse(arguments)
    assert str(refused.value).startswith(sentence)


def test_stochastic_depth_follows_the_phase(tmp_path: Path, ranks: dist.Ranks):
    """Of a method that needs every patch, too: less is computed where more is dropped, and nothing drawn where nothing is."""
    parts = parts_of("simmim", tmp_path, ranks, {"phases": "0 0.25 0.5", "phase-depths": "4 0 1"})
    state = build(parts, 0, None)
    drawn, computed = [], []
    with Feeding(parts, state) as feeding:
        for state.step in range(STEPS):
            next(feeding)
            drawn.append("depth" in feeding.drawn(state.step))
            computed.append(state.update.flops_per_image())
    assert drawn == [True] * 2 + [False] * 2 + [True] * 4
    first, second, third = (computed[step] for step in (0, 2, 4))
    assert first < third < second and second - first == pytest.approx(4 * (second - third))


@pytest.mark.parametrize(
    ("method", "phases", "sentence"),
    [
        ("simmim", SHRINKING, "--simmim.phase-sides: simmim can only be trained at the model's own image size."),
        ("dinov2", DROPPING, "--dinov2.phase-keeps: dinov2 needs every patch of a crop."),
        ("mae", {"phases": "0 0.5", "phase-locals": "0.5 1"}, "--mae.phase-locals: images of mae have no small crops here."),
        (
            "dino", {"phases": "0 0.5", "phase-locals": "0 1", "global-crops": "1", "local-crops": "2"},
            "--dino.phase-locals: there must be two crops of an image at least.",
        ),
        ("mae", {"phases": "0 0.5", "phase-depths": "2 1"}, "--mae.phase-depths: the model has no stochastic depth to scale."),
        (
            "simmim", {"phases": "0 0.5", "phase-depths": "10 1"},
            "--simmim.phase-depths: 10 times the model's rate of 0.1 leaves no branch.",
        ),
        ("simmim", DRAWING, "--simmim.patch-draws: simmim can only be trained with the model's own patches."),
        (
            "mae", {"phases": "0 0.5", "phase-patches": "1.2 1"},
            "--mae.phase-patches: 1.2 times the model's 8 pixels are no whole number, but 9.6.",
        ),
        (
            "mae", {"phases": "0 0.5", "phase-patches": "3 1"},
            "--mae.phase-patches: of patches of 24 pixels a large crop would have one row.",
        ),
        (
            "dino", DRAWING | {"patch-draws": "1 1.5"},
            "--dino.patch-draws: crops must stay at one size, and these would be 32 x 32 in patches of 8, 36 x 36 in patches of "
            "12 pixels.",
        ),
    ],
)  # fmt: skip
def test_methods_that_cannot_refuse(method: str, phases: dict, sentence: str, tmp_path: Path, ranks: dist.Ranks):
    with pytest.raises(BadInput) as refused:
        parts_of(method, tmp_path, ranks, phases)
    assert str(refused.value) == sentence
