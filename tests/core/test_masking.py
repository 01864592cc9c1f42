"""Masks: their shares, their blocks against a plain restatement of BEiT's algorithm, and that they belong to rows, not ranks."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import masking
from engine.core.draws import Draws


def uniforms(masks: int, seed: int = 0, tries: int = 3):
    return lambda round_: np.random.default_rng((seed, round_)).random((masks, tries, 4))


def plain_blocks(count: int, grid: tuple[int, int], smallest: int, numbers: random.Random) -> np.ndarray:
    """BEiT's algorithm, one mask at a time."""
    (height, width), mask = grid, np.zeros(grid, dtype=bool)
    while mask.sum() < count:
        wanted = count - mask.sum()
        for _ in range(10):
            area = numbers.uniform(smallest, wanted)
            aspect = math.exp(numbers.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall >= height or wide >= width:
                continue
            top, left = numbers.randint(0, height - tall), numbers.randint(0, width - wide)
            new = (~mask[top : top + tall, left : left + wide]).sum()
            if 0 < new <= wanted:
                mask[top : top + tall, left : left + wide] = True
                break
        else:
            break
    return mask


@pytest.mark.parametrize(("grid", "smallest", "share"), [((14, 14), 16, 0.5), ((14, 14), 4, 0.3), ((4, 6), 1, 0.4)])
def test_blocks_hide_as_much_and_the_same_places_as_the_plain_algorithm(
    grid: tuple[int, int], smallest: int, share: float
):
    count, masks = int(share * grid[0] * grid[1]), 1500
    ours = masking.block_patches(uniforms(masks), np.full(masks, count), grid, smallest).reshape(-1, *grid)
    numbers = random.Random(0)
    plain = np.stack([plain_blocks(count, grid, smallest, numbers) for _ in range(masks)])
    hidden, expected = ours.sum((1, 2)), plain.sum((1, 2))
    assert hidden.max() <= count
    error = 5 * math.hypot(hidden.std(), expected.std()) / math.sqrt(masks)  # five standard deviations
    assert abs(hidden.mean() - expected.mean()) < max(error, 0.05)
    # how often each patch is hidden: the middle more than the corners
    assert np.abs(ours.mean(0) - plain.mean(0)).max() < 5 * math.sqrt(2 * 0.25 / masks)
    # neighbours are hidden together as often: blocks of the same shapes
    for axis in (1, 2):
        together = [np.mean(m & np.roll(m, 1, axis)) for m in (ours, plain)]
        assert together[0] == pytest.approx(together[1], rel=0.05)


def test_blocks_are_blocks():
    """A mask of one block is a rectangle, inside the grid and narrower than it."""
    masks = masking.block_patches(uniforms(400), np.full(400, 20), (14, 14), 20).reshape(-1, 14, 14)
    rectangles = 0
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.any() and len(rows) < 14 and len(columns) < 14
        rectangles += mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert rectangles > 40


def test_nothing_wanted_hides_nothing_and_masks_depend_on_their_own_rows_only():
    counts = np.array([0, 5, 0, 60, 98])
    masks = masking.block_patches(uniforms(5), counts, (14, 14), 4)
    assert not masks[[0, 2]].any() and masks[[1, 3, 4]].any(1).all()
    assert (masks.sum(1) <= counts).all()
    for row in range(5):
        alone = masking.block_patches(
            lambda r, row=row: uniforms(5)(r)[row : row + 1], counts[row : row + 1], (14, 14), 4
        )
        assert np.array_equal(alone[0], masks[row])


def test_a_grid_in_which_no_block_fits_ends_empty():
    assert not masking.block_patches(uniforms(3), np.full(3, 4), (1, 8), 1).any()


def test_random_patches_are_as_many_as_asked_and_anywhere():
    noise = np.random.default_rng(0).random((4000, 12))
    counts = np.arange(4000) % 7
    masks = masking.random_patches(noise, counts)
    assert np.array_equal(masks.sum(1), counts)
    assert np.abs(masks.mean(0) - 3 / 12).max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert noise[1][masks[1]] == noise[1].min()


def test_half_of_the_shares_are_zero_and_the_others_uniform():
    shares = masking.shares(np.random.default_rng(0).random((20_000, 2)), 0.1, 0.5, 0.5)
    drawn = shares[shares > 0]
    assert len(drawn) == pytest.approx(10_000, abs=5 * math.sqrt(5000))
    assert drawn.min() >= 0.1 and drawn.max() <= 0.5
    assert np.abs(np.histogram(drawn, 8, (0.1, 0.5))[0] / len(drawn) - 1 / 8).max() < 5 * math.sqrt(1 / 8 / len(drawn))
    assert drawn.mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_strata_are_met_once_each(count: int):
    numbers = np.random.default_rng(0)
    shares = masking.stratified_shares(numbers.permutation(16), numbers.random(16), count, 0.1, 0.5)
    assert (shares > 0).sum() == count
    strata = np.sort(np.floor((shares[shares > 0] - 0.1) / 0.4 * count)).astype(int)
    assert strata.tolist() == list(range(count))


def plain_gmml(share: float, size: tuple[int, int], align: int, largest: float, numbers: random.Random) -> np.ndarray:
    """GMML's blocks, one mask at a time."""
    (height, width), mask = size, np.zeros(size, dtype=bool)
    tall, wide = (max(align, align * round(largest * side / align)) for side in size)
    while mask.sum() < share * height * width:
        top, left = numbers.randrange(0, height, align), numbers.randrange(0, width, align)
        bottom = top + numbers.randrange(align, tall + 1, align)
        mask[top:bottom, left : left + numbers.randrange(align, wide + 1, align)] = True
    return mask


@pytest.mark.parametrize(
    ("size", "align", "share", "largest"),
    [((32, 32), 1, 0.5, 0.3), ((32, 32), 8, 0.5, 0.3), ((24, 40), 4, 0.3, 0.5), ((20, 20), 6, 0.4, 0.3)],
)
def test_gmml_hides_as_much_and_the_same_places_as_the_plain_algorithm(
    size: tuple[int, int], align: int, share: float, largest: float
):
    masks = 1000
    ours = masking.gmml_blocks(uniforms(masks), np.full(masks, share), size, align, largest)
    numbers = random.Random(0)
    plain = np.stack([plain_gmml(share, size, align, largest, numbers) for _ in range(masks)])
    hidden, expected = ours.mean((1, 2)), plain.mean((1, 2))
    assert abs(hidden.mean() - expected.mean()) < 5 * math.hypot(hidden.std(), expected.std()) / math.sqrt(masks) + 1e-9
    assert np.abs(ours.mean(0) - plain.mean(0)).max() < 5 * math.sqrt(2 * 0.25 / masks)
    for axis in (1, 2):
        together = [np.mean(m & np.roll(m, 1, axis)) for m in (ours, plain)]
        assert together[0] == pytest.approx(together[1], rel=0.05)


@settings(max_examples=60)
@given(
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    align=st.sampled_from([1, 2, 4, 5]),
    largest=st.floats(0.01, 1.0),
    share=st.floats(0.0, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_gmml_reaches_its_share_with_whole_cells(
    cells: tuple[int, int], align: int, largest: float, share: float, seed: int
):
    size = (cells[0] * align, cells[1] * align)
    masks = masking.gmml_blocks(uniforms(3, seed), np.array([share, 0.0, share / 2]), size, align, largest)
    targets = np.array([share, 0.0, share / 2]) * size[0] * size[1]
    # the last block began below the target
    most = np.prod([max(align, align * round(largest * side / align)) for side in size])
    covered = masks.sum((1, 2))
    assert (covered >= targets).all() and (covered <= targets + most).all() and covered[1] == 0
    by_cell = masks.reshape(3, cells[0], align, cells[1], align).any((2, 4))
    assert np.array_equal(by_cell.repeat(align, 1).repeat(align, 2), masks)


def test_a_gmml_block_is_a_rectangle_of_any_allowed_sides():
    masks = masking.gmml_blocks(uniforms(3000), np.full(3000, 1e-9), (32, 48), 4, 0.3)
    sides = set()
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert rows[0] % 4 == columns[0] % 4 == 0
        sides.add((len(rows), len(columns)))
    assert sides == {
        (tall, wide) for tall in (4, 8) for wide in (4, 8, 12, 16)
    }  # 0.3 * 32 and 0.3 * 48, to whole fours
    assert masks[:, -1, -1].any() and masks[:, 0, 0].any()


def test_gmml_masks_depend_on_their_own_rows_only():
    shares = np.array([0.3, 0.9, 0.5])
    masks = masking.gmml_blocks(uniforms(3), shares, (32, 32))
    for row in range(3):
        alone = masking.gmml_blocks(lambda r, row=row: uniforms(3)(r)[row : row + 1], shares[row : row + 1], (32, 32))
        assert np.array_equal(alone[0], masks[row])


def test_ranks_hold_their_rows_of_what_one_process_draws():
    def draws(rows: slice) -> Draws:
        return Draws(3, 1, 5, batch=8, rows=rows, device=torch.device("cpu"))

    parts = [slice(0, 4), slice(4, 8)]
    for draw in (lambda d: d.on_host("blocks/0", 2, 3), lambda d: d.places("strata", 2), lambda d: d.seeds()):
        assert torch.equal(torch.cat([draw(draws(rows)) for rows in parts]), draw(draws(slice(0, 8))))
    assert draws(slice(0, 8)).places("strata", 2).flatten().sort().values.tolist() == list(range(16))
    assert not torch.equal(draws(parts[0]).on_host("blocks/0", 4), draws(parts[0]).on_host("blocks/1", 4))
