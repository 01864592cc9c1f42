"""Phases of fewer tokens: which steps lie in which, what size a crop then has, and what is drawn."""

import pytest

from engine.core.errors import BadInput
from engine.core.phases import WHOLE, Phase, Phases
from engine.methods.mae import Settings


@pytest.mark.parametrize(
    ("starts", "total", "expected"),
    [
        ((0.0,), 5, [(0, 5)]),
        ((0.0, 0.5, 0.8), 10, [(0, 5), (5, 8), (8, 10)]),
        ((0.0, 0.9), 3, [(0, 2), (2, 3)]),  # the last phase always has a step
        ((0.0, 0.1, 0.2), 2, [(0, 2)]),  # and others may have none
    ],
)
def test_every_step_lies_in_one_phase(starts: tuple[float, ...], total: int, expected: list[tuple[int, int]]):
    sides = [1 - 0.1 * left for left in range(len(starts))][::-1]
    phases = Phases.of(starts, sides, (1.0,))
    found = phases.steps(total)
    assert [(first, end) for first, end, _ in found] == expected
    assert found[-1][2] == WHOLE


def test_crops_are_of_whole_patches_and_those_of_none_are_as_they_were():
    assert [Phase(5 / 7).size((224, 224), 16), Phase(5 / 7).size((96, 96), 16)] == [(160, 160), (64, 64)]
    assert Phase(0.5).size((224, 112), 16) == (112, 64)  # 3.5 patches are 4
    assert Phase(0.01).size((32, 32), 8) == (8, 8)
    assert WHOLE.size((37, 41), 8) == (37, 41)


def test_crops_are_of_whole_larger_patches():
    assert [Phase(patch=patch).size((224, 96), 16) for patch in (1.25, 1.5, 2)] == [(220, 100), (216, 96), (224, 96)]
    assert Phase(0.5, patch=1.5).size((224, 224), 16) == (120, 120)
    assert [Phase(patch=patch).patch_size(14) for patch in (1, 1.5, 2)] == [14, 21, 28]


def test_steps_of_all_phases_but_the_last_draw_their_patches():
    phases = Phases.of((0.0, 0.8), (1.0,), (1.0,), (1.5, 1.0), (1.0, 2.0))
    first, last = phases.phases
    assert first.forms == (Phase(patch=1.5), Phase(patch=3.0)) and last == WHOLE and last.forms == (WHOLE,)
    drawn = [first.form(0, 0, step) for step in range(1000)]
    assert 450 < drawn.count(first.forms[0]) < 550 and set(drawn) == set(first.forms)
    assert drawn == [first.form(0, 0, step) for step in range(1000)]  # by the step alone
    assert drawn != [first.form(0, 1, step) for step in range(1000)] != [first.form(1, 1, step) for step in range(1000)]


def test_crops_of_all_phases_but_the_last_are_of_several_sides():
    first, last = Phases.of((0.0, 0.8), (0.5, 1.0), (1.0,), of_images=(0.5, 1.0), depths=(2.0, 1.0)).phases
    assert first.evenly == (Phase(0.25, depth=2.0), Phase(0.5, depth=2.0)) and last == WHOLE and last.evenly == (WHOLE,)
    assert first.forms == (first,)


def test_at_least_one_patch_is_shown():
    assert [Phase(keep=keep).kept(16) for keep in (1, 0.5, 0.25, 0.01)] == [16, 8, 4, 1]


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"phases": ()}, "phases"),
        ({"phases": (0.1,)}, "phases"),
        ({"phases": (0.0, 0.5, 0.5)}, "phases"),
        ({"phases": (0.0, 1.0)}, "phases"),
        ({"phases": (0.0, 0.5), "phase_sides": (0.5, 0.7)}, "phase-sides"),
        ({"phases": (0.0, 0.5), "phase_sides": (0.5,)}, "phase-sides"),
        ({"phases": (0.0, 0.5), "phase_sides": (0.5, 0.7, 1.0)}, "phase-sides"),
        ({"phases": (0.0, 0.5), "phase_keeps": (0.0, 1.0)}, "phase-keeps"),
        ({"phases": (0.0, 0.5), "phase_keeps": (1.5, 1.0)}, "phase-keeps"),
        ({"phases": (0.0, 0.5), "phase_locals": (-0.5, 1.0)}, "phase-locals"),
        ({"phases": (0.0, 0.5), "phase_locals": (0.0, 0.5)}, "phase-locals"),
        ({"phases": (0.0, 0.5), "phase_patches": (0.5, 1.0)}, "phase-patches"),
        ({"phases": (0.0, 0.5), "phase_patches": (2.0, 1.5)}, "phase-patches"),
        ({"phases": (0.0, 0.5), "phase_depths": (-1.0, 1.0)}, "phase-depths"),
        ({"phases": (0.0, 0.5), "phase_depths": (2.0, 0.0)}, "phase-depths"),
        ({"phases": (0.0, 0.5), "side_draws": (0.5, 1.0)}, "side-draws"),  # crops of one shape are of one size
        ({"side_draws": (0.5, 1.0), "aspect": "keep"}, "side-draws"),
        ({"phases": (0.0, 0.5), "side_draws": (0.5, 0.5), "aspect": "keep"}, "side-draws"),
        ({"phases": (0.0, 0.5), "side_draws": (0.5, 2.0), "aspect": "keep"}, "side-draws"),
        ({"patch_draws": (1.0, 2.0)}, "patch-draws"),
        ({"phases": (0.0, 0.5), "patch_draws": (2.0, 2.0)}, "patch-draws"),
        ({"phases": (0.0, 0.5), "patch_draws": (1.0, 0.5)}, "patch-draws"),
        ({"phases": (0.0, 0.5), "patch_draws": ()}, "patch-draws"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict, flag: str):
    with pytest.raises(BadInput, match=rf"^--mae\.{flag} is "):
        Settings(**wrong).check("mae")
