"""Which images every step of a stage has, and what its clock shows, beside a plain walk through epochs and phases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.phases import WHOLE, Phase, Phases
from engine.core.timetable import Timetable, grown


@st.composite
def stages(draw: st.DrawFn) -> tuple[int, int, int, Phases, dict[Phase, int], dict[Phase, float]]:
    """Images, batch, epochs, phases, and for each batch and cost."""
    batch = draw(st.integers(1, 6))
    images = draw(st.integers(batch, 40))
    starts = [0.0, *sorted(draw(st.sets(st.floats(0.01, 0.99), max_size=3)))]
    phases = Phases.of(starts, [*(0.1 * number for number in range(1, len(starts))), 1.0], (1.0,))
    batches = {phase: batch * draw(st.integers(1, images // batch)) for phase in phases.phases[:-1]}
    costs = {phase: draw(st.floats(0.05, 3.0)) for phase in phases.phases}
    return images, batch, draw(st.integers(1, 5)), phases, batches, costs


def walked(images: int, batch: int, epochs: int, phases: Phases, batches: dict[Phase, int]) -> list[tuple]:
    """Of every step its phase, epoch and positions: a phase is handed its images one by one, and makes a step of each so many."""
    per_epoch = images // batch
    starts = [min(round(start * epochs * per_epoch), epochs * per_epoch - 1) for start in phases.starts]
    found = []
    for epoch in range(epochs):
        waiting, before = [], None
        for position in range(images):
            # what is left over at an epoch's end belongs to its last step
            among = epoch * per_epoch + min(position // batch, per_epoch - 1)
            number = max(number for number, start in enumerate(starts) if start <= among)
            waiting = [*(waiting if number == before else []), position]
            before, phase = number, phases.phases[number]
            if len(waiting) == batches.get(phase, batch):
                found.append((phase, epoch, waiting))
                waiting = []
    return found


def as_told(timetable: Timetable) -> list[tuple]:
    found = []
    for step in range(timetable.total_steps):
        place, stretch = timetable.place(step), timetable.stretch(step)
        assert stretch.first <= step < stretch.end
        found.append((stretch.phase, place.epoch, list(range(place.position, place.position + stretch.images))))
    return found


@given(stages())
def test_every_step_has_the_images_of_a_plain_walk(stage: tuple):
    images, batch, epochs, phases, batches, _ = stage
    timetable = Timetable(images, batch, epochs, phases, batches=batches)
    expected = walked(images, batch, epochs, phases, batches)
    assert as_told(timetable) == expected
    seen = 0
    for step, (_, epoch, positions) in enumerate(expected):
        place = timetable.place(step)
        assert (place.seen, place.clock) == (seen, epoch * (images // batch) + positions[0] / batch)
        assert 0 <= place.clock < timetable.length
        seen += len(positions)


@given(st.integers(1, 6), st.integers(0, 30), st.integers(1, 6), st.integers(1, 3))
def test_where_nothing_differs_a_step_is_a_step(batch: int, more: int, epochs: int, every: int):
    images = batch + more
    per_epoch = images // batch
    timetable = Timetable(images, batch, epochs)
    assert timetable.total_steps == timetable.length == epochs * per_epoch
    for step in range(timetable.total_steps + 2 * per_epoch):  # also past the end, for what is made ahead
        epoch, place = divmod(step, per_epoch)
        assert timetable.place(step) == (epoch, place * batch, step * batch, step)
        assert timetable.ends_epochs(step + 1, every) == ((step + 1) % (every * per_epoch) == 0)


@given(stages())
def test_a_clock_of_compute_shows_the_share_that_is_spent(stage: tuple):
    images, batch, epochs, phases, _, costs = stage
    timetable = Timetable(images, batch, epochs, phases, costs=costs)
    # with one batch all epochs are whole, and each step is paid for
    assert timetable.total_steps == timetable.length
    spent = [costs[timetable.stretch(step).phase] for step in range(timetable.total_steps)]
    for step in range(timetable.total_steps):
        assert timetable.place(step).clock == pytest.approx(timetable.length * sum(spent[:step]) / sum(spent))
    for start, phase in zip(phases.starts, phases.phases, strict=True):
        # rounding to steps moves each boundary by less than a step, and each step costs 3 at most
        before = sum(
            cost
            for step, cost in enumerate(spent)
            if phases.phases.index(timetable.stretch(step).phase) < phases.phases.index(phase)
        )
        assert abs(before - start * sum(spent)) <= 3 * 2 * len(phases.phases)


def test_stages_of_equal_compute_see_images_as_efficienttrain_has_them():
    """arXiv 2211.09703: ten stages of equal compute, at 96, 160, 192 and 224 pixels; whoever is cheaper by the square of its side
    sees as many more images."""
    sides = (96, 160, 192, 224)
    phases = Phases.of((0.0, 0.2, 0.6, 0.8), [side / 224 for side in sides], (1.0,))
    costs = {phase: phase.side**2 for phase in phases.phases}
    timetable = Timetable(1000, 1, 100, phases, costs=costs)
    shares = [width * (224 / side) ** 2 for width, side in zip((0.2, 0.4, 0.2, 0.2), sides, strict=True)]
    lengths = [stretch.end - stretch.first for stretch in timetable.stretches]
    assert lengths == pytest.approx([100_000 * share / sum(shares) for share in shares], abs=1)
    assert timetable.place(timetable.stretches[2].first).clock == pytest.approx(60_000, rel=1e-4)


def test_a_grown_batch_costs_what_a_step_of_whole_images_does():
    half, middle, few = Phase(0.5), Phase(5 / 7), Phase(keep=0.75)
    costs = {WHOLE: 196.0, half: 49.0, middle: 100.0, few: 147.0}
    # 1.96 and 1.33 batches are 2, within a twentieth, and 1
    assert grown(64, costs, 10_000) == {WHOLE: 64, half: 256, middle: 128, few: 64}
    assert grown(64, costs, 130) == {WHOLE: 64, half: 128, middle: 128, few: 64}  # no more than there are
    timetable = Timetable(10_000, 64, 10, Phases.of((0.0, 0.5), (0.5, 1.0), (1.0,)), batches=grown(64, costs, 10_000))
    assert [(one.first, one.end, one.images) for one in timetable.stretches] == [(0, 195, 256), (195, 975, 64)]
    assert timetable.place(195).clock == 780.0
