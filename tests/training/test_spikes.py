"""What counts as a spike of the loss."""

import math
import random

import pytest

from engine.training.spikes import IN_A_ROW, LEAST, WINDOW, Spikes


def after(losses: list[float]) -> Spikes:
    spikes = Spikes()
    assert not any(spikes.note(loss) for loss in losses)
    return spikes


def around(level: float, count: int = WINDOW, deviation: float = 0.05) -> list[float]:
    draws = random.Random(0)
    return [draws.gauss(level, deviation) for _ in range(count)]


def test_three_far_up_in_a_row_are_a_spike_and_one_is_an_odd_batch():
    spikes = after(around(2))
    assert [spikes.note(loss) for loss in (9, 9, 2, 9, 9, 9)] == [False] * 5 + [True]
    assert len(spikes.losses) == WINDOW and max(spikes.losses) < 3  # what is far up is not what is usual


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_far_up_from_the_first_step_on(bad: float):
    assert [Spikes(above=IN_A_ROW - 1).note(bad), after([2.0]).note(bad)] == [True, False]


@pytest.mark.parametrize(
    "losses",
    [
        around(2, 500),
        [7 - 0.01 * step for step in range(500)],
        [2 + 0.004 * step for step in range(500)],  # what rises slowly, as DINO's does at first
        around(-1.9, 500, 0.001),
        [0.0] * 100 + [1e-9] * 2,
        around(9, LEAST - 5) + [90.0] * 5,  # nothing is usual yet
    ],
    ids=["noise", "falling", "rising", "negative", "nothing", "the first steps"],
)
def test_what_is_no_spike(losses: list[float]):
    after(losses)
