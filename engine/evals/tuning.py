"""The search for a learning rate, a weight decay and a drop path, as the benchmark of ViT detectors does it (Li et al. 2021,
arXiv 2111.11429): a grid of factors of two around a first guess, moved on while the best is at its border; then the drop
path at the best of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.core.errors import BadInput

DROP_PATHS = (0.0, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Trial:
    """One training run: what was chosen, in which part ("grid" or "drop path"), and its figure; None where it diverged."""

    lr: float
    weight_decay: float
    drop_path: float
    part: str
    figure: float | None = None


def search(
    run: Callable[[Trial], float | None],
    lr: float,
    weight_decay: float,
    drop_paths: Sequence[float] = DROP_PATHS,
    most: int = 36,
) -> tuple[Trial, list[Trial], bool]:
    """Runs a 3x3 grid around (lr, weight decay) without drop path, those around the best that are missing until there are none,
    and then each drop path at the best.

    Args:
        run: a trial to its figure, of which more is better; None if it diverged.
        most: trials of the grid at which it stops anyway.

    Returns:
        the best trial, all trials in the order they ran, and whether the best of the grid had all its neighbours tried. Of equal
        ones the first is the best.

    Raises:
        BadInput: all diverged.
    """
    grid: dict[tuple[int, int], Trial] = {}
    place, settled = (0, 0), False
    while not settled:
        missing = [
            (place[0] + i, place[1] + j)
            for i in (0, -1, 1)
            for j in (0, -1, 1)
            if (place[0] + i, place[1] + j) not in grid
        ]
        settled = not missing
        if len(grid) + len(missing) > most:
            break
        for i, j in missing:
            grid[i, j] = _tried(run, Trial(lr * 2.0**i, weight_decay * 2.0**j, 0.0, "grid"))
        place = max(grid, key=lambda spot: _worth(grid[spot]))
        if grid[place].figure is None:
            raise BadInput(f"all of {len(grid)} trial runs around lr {lr:g} diverged; start from a lower one.")
    best = grid[place]
    ends = [_tried(run, replace(best, drop_path=share, part="drop path", figure=None)) for share in drop_paths]
    chosen = max(ends, key=_worth, default=best)
    return (chosen if chosen.figure is not None else best), [*grid.values(), *ends], settled


def _tried(run: Callable[[Trial], float | None], trial: Trial) -> Trial:
    return replace(trial, figure=run(trial))


def _worth(trial: Trial) -> float:
    return float("-inf") if trial.figure is None else trial.figure
