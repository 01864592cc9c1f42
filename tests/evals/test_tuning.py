"""The search for rates, on figures that are a function of them: it moves to the best, settles there, and ends."""

import math

import pytest

from engine.core.errors import BadInput
from engine.evals.tuning import DROP_PATHS, Trial, search


def hill(lr: float, weight_decay: float, drop_path: float = 0.1):
    """A figure that is best at these, by steps of two."""

    def run(trial: Trial) -> float:
        steps = abs(math.log2(trial.lr / lr)), abs(math.log2(trial.weight_decay / weight_decay))
        return 1 - 0.01 * sum(steps) - abs(trial.drop_path - drop_path) / 10

    return run


def test_a_best_in_the_middle_is_nine_runs_without_drop_path_and_then_those_of_drop_path():
    best, trials, settled = search(hill(1e-3, 0.1), 1e-3, 0.1)
    assert settled and (best.lr, best.weight_decay, best.drop_path) == (1e-3, 0.1, 0.1)
    grid, ends = trials[:9], trials[9:]
    assert {(t.lr / 1e-3, t.weight_decay / 0.1) for t in grid} == {(a, b) for a in (0.5, 1, 2) for b in (0.5, 1, 2)}
    assert {(t.drop_path, t.part) for t in grid} == {(0.0, "grid")}
    assert [(t.lr, t.weight_decay, t.drop_path, t.part) for t in ends] == [
        (1e-3, 0.1, share, "drop path") for share in DROP_PATHS
    ]
    assert best.figure == max(t.figure for t in ends)


@pytest.mark.parametrize("place", [(4, 0), (0, -3), (2, 2), (-1, 4)])
def test_the_grid_moves_on_while_the_best_is_at_its_border(place):
    lr, weight_decay = 1e-3 * 2.0 ** place[0], 0.1 * 2.0 ** place[1]
    best, trials, settled = search(hill(lr, weight_decay), 1e-3, 0.1)
    assert settled and (best.lr, best.weight_decay) == (lr, weight_decay)
    grid = [(t.lr, t.weight_decay) for t in trials if t.part == "grid"]
    assert len(set(grid)) == len(grid) > 9
    around = {(lr * 2.0**i, weight_decay * 2.0**j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert around <= set(grid)


def test_a_figure_that_always_grows_ends_at_the_limit_and_says_so():
    _, trials, settled = search(lambda trial: trial.lr, 1e-3, 0.1, most=20)
    assert not settled and 9 < sum(t.part == "grid" for t in trials) <= 20


def test_equal_figures_stay_where_the_search_began():
    best, trials, settled = search(lambda trial: 0.5, 1e-3, 0.1)
    assert settled and len(trials) == 9 + len(DROP_PATHS)
    assert (best.lr, best.weight_decay, best.drop_path) == (1e-3, 0.1, 0.0)


def test_what_diverges_is_never_the_best():
    best, trials, _ = search(
        lambda t: None if t.lr > 1e-3 or t.drop_path else t.weight_decay / (1 + t.weight_decay**2), 1e-3, 1.0
    )
    assert best.lr == 1e-3 or best.lr == 5e-4
    assert best.figure == 0.5 and best.weight_decay == 1 and best.drop_path == 0
    assert sum(t.figure is None for t in trials) == 3 + 3
    only_grid, _, _ = search(lambda t: None if t.part == "drop path" else 0.3, 1e-3, 1.0)
    assert only_grid.part == "grid" and only_grid.figure == 0.3
    with pytest.raises(BadInput, match=r"all of 9 trial runs around lr 0\.001 diverged"):
        search(lambda t: None, 1e-3, 1.0)
