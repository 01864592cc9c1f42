"""A run whose clock goes by compute, and one whose batch grows where images are cheap: that it goes on bit for bit wherever it
stopped, that rates and averages follow, and who refuses it."""

from pathlib import Path

import pytest
import torch

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.optim import Moment, cosine, share_of_peak
from engine.core.phases import Phase, Phases
from engine.core.timetable import Timetable
from engine.training import config
from engine.training.build import build
from engine.training.operations import costs, operations
from engine.training.parts import Parts, prepare
from engine.training.portions import portions
from engine.training.state import TrainState, restore
from engine.training.step import Update
from tests.faults.runs import flags, images
from tests.training.test_phases import assert_equal, tensors, train

EPOCHS, BATCH = 4, 2  # of eight images: sixteen steps of whole images
GROWING = "--{0}.phases 0 0.4375 0.75 --{0}.phase-sides 0.5 0.75 1 --{0}.phase-batch grow"


@pytest.fixture
def ranks() -> dist.Ranks:
    return dist.start("cpu")


def parts_of(method: str, data: Path, ranks: dist.Ranks, words: str) -> Parts:
    own = [*flags(method, images(data), epochs=EPOCHS), "--batch-size", str(BATCH), *words.format(method).split()]
    return prepare(config.parse(own), ranks)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("mae", GROWING),
        ("mae", GROWING + " --{0}.phase-clock compute"),
        pytest.param("dino", GROWING, marks=pytest.mark.long),
        pytest.param("nnclr", GROWING, marks=pytest.mark.long),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit_across_a_change_of_batch(
    method: str, words: str, tmp_path: Path, ranks: dist.Ranks
):
    parts = parts_of(method, tmp_path, ranks, words)
    (stage,) = parts.stages
    sizes = [one.images for one in stage.timetable.stretches]
    assert sizes[0] >= 2 * sizes[-1] == 2 * BATCH and stage.total_steps < EPOCHS * 8 // BATCH
    whole = build(parts, 0, None)
    losses = train(parts, whole, stage.total_steps)
    first = stage.timetable.stretches[0].end
    for stop in {first} if "compute" in words else {1, first}:  # within the first phase, and where the batch changes
        parts = parts_of(method, tmp_path, ranks, words)  # the encoder is a run's own
        half = build(parts, 0, None)
        begun = train(parts, half, stop)
        kept, where = tensors(half), {"stage": 0, "step": stop, "bad_files": []}
        again = build(parts, 0, None, anew=False)
        restore(again, kept, where)
        assert begun + train(parts, again, stage.total_steps) == losses
        assert_equal(tensors(again), tensors(whole))


def test_the_images_of_a_phase_are_those_of_one_batch(tmp_path: Path, ranks: dist.Ranks):
    """Whatever their number in a step; but those that fill no step."""
    shown = []
    for words in (GROWING, GROWING.replace("grow", "same")):
        parts = parts_of("mae", tmp_path, ranks, words)
        state, ids = build(parts, 0, None), {}
        for stretch in parts.stages[0].timetable.stretches:
            state.step = stretch.first
            state.update.begin_phase(stretch.phase, stretch.images)
            loader = parts.loader(state)
            steps = range(stretch.first, stretch.end)
            ids[stretch.phase] = [image for _ in steps for image in next(loader).ids.tolist()]
            loader.close()
        shown.append(ids)
    grown, same = shown
    assert grown.keys() == same.keys()
    for phase, found in grown.items():
        left = iter(same[phase])
        assert all(image in left for image in found)  # in this order
        assert len(same[phase]) - len(found) < 2 * max(2 * BATCH, 8)


def test_portions_and_operations_are_those_of_the_steps(tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of("mae", tmp_path, ranks, GROWING)
    (stage,) = parts.stages
    found = portions(parts.plan, parts.stages)
    assert [one.images_per_step for one in found] == [one.images for one in stage.timetable.stretches]
    assert sum(one.steps for one in found) == stage.total_steps
    cost = costs(parts.plan, 0, [one.phase for one in found])
    expected = sum(one.steps * one.images_per_step * cost[one.phase] for one in found)
    assert operations(parts.plan, parts.stages) == {"mae": pytest.approx(expected)}


def grown_update(method: str, tmp_path: Path, ranks: dist.Ranks) -> tuple[TrainState, Timetable]:
    """Of which each step has three times the settings' batch."""
    parts = parts_of(method, tmp_path, ranks, f"--{method}.weight-ema 0.9" if method == "mae" else "")
    state, half = build(parts, 0, None), Phase(0.5)
    timetable = Timetable(60, BATCH, 1, Phases((0.0, 0.6), (half, Phase())), batches={half: 3 * BATCH})
    state.update = Update(state.method, timetable.length, timetable=timetable)
    state.update.begin_phase(half, 3 * BATCH)
    return state, timetable


def test_learning_rates_follow_the_batch_and_schedules_the_images(tmp_path: Path, ranks: dist.Ranks):
    state, timetable = grown_update("mae", tmp_path, ranks)
    update, s = state.update, state.method.settings
    assert update.moment(4) == Moment(12.0, 30, 30 // EPOCHS, False, 4 * 6, 3.0)
    peak = max(group.peak_lr for group in state.method.groups(3 * BATCH))
    assert peak == pytest.approx(3 * max(group.peak_lr for group in state.method.groups(BATCH)))
    for step in range(6):
        clock = timetable.place(step).clock
        share = share_of_peak("cosine", 3 * step, 30, round(30 * s.warmup), s.start_lr / peak, s.end_lr / peak)
        assert clock == 3 * step and update._set_rates(clock)["lr"] == pytest.approx(peak * share)
    update.begin_phase(Phase(), BATCH)
    assert update._set_rates(18.0)["lr"] == pytest.approx(
        peak / 3 * share_of_peak("cosine", 18, 30, round(30 * s.warmup), end=s.end_lr / (peak / 3))
    )


def test_averages_keep_as_much_of_themselves_by_images(tmp_path: Path, ranks: dist.Ranks):
    """arXiv 2307.13813: m at one batch is m^3 at three."""
    state, _ = grown_update("dino", tmp_path, ranks)
    state.method.begin(state.update.moment(2))
    s = state.method.settings
    momentum = cosine(6, 30, s.teacher_momentum, s.teacher_momentum_end)
    (average,) = state.method.averages()
    assert average.weight == pytest.approx(1 - momentum**3)
    state, _ = grown_update("mae", tmp_path, ranks)
    (average,) = state.update.average.averages(3.0)
    assert average.weight == pytest.approx(1 - 0.9**3)


def test_clock_that_stands_between_steps_never_warms_up_past_the_peak():
    for form in ("from-start", "to-peak", "through", "between"):
        shares = [share_of_peak("cosine", step / 4, 20, 6, warmup=form) for step in range(80)]
        assert max(shares) <= 1 and min(shares) >= 0
        rising = shares[:24]
        assert rising == sorted(rising) and shares[24:] == sorted(shares[24:], reverse=True)


@pytest.mark.parametrize(
    ("method", "words", "sentence"),
    [
        ("mae", "--mae.phase-clock steps", "--mae.phase-clock is steps; it must be one of images, compute."),
        ("mae", "--mae.phase-batch half", "--mae.phase-batch is half; it must be one of same, grow."),
        (
            "nnclr", GROWING + " --nnclr.queue-size 4",
            "--nnclr.phase-batch grow makes batches of 6, more than the queue's 4; set --nnclr.queue-size higher.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(method: str, words: str, sentence: str, tmp_path: Path, ranks: dist.Ranks):
    with pytest.raises(BadInput) as refused:
        parts_of(method, tmp_path, ranks, words)
    assert str(refused.value) == sentence


def test_torch_sees_each_phase_as_large_as_it_is(tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of("mae", tmp_path, ranks, GROWING)
    state, batches = build(parts, 0, None), []
    forward = state.method.forward

    def seen(images: tuple[torch.Tensor, ...], ids: torch.Tensor, drawn: dict[str, torch.Tensor]) -> dict:
        batches.append((len(ids), images[0].shape[-1], len(drawn["noise"])))
        return forward(images, ids, drawn)

    state.method.forward = seen
    train(parts, state, parts.stages[0].total_steps)
    expected = [
        (one.images, state.method.encoder.patch_size * round(4 * one.phase.side), one.images)
        for one in parts.stages[0].timetable.stretches
        for _ in range(one.first, one.end)
    ]
    assert batches == expected
