"""Which patches or pixels of an image a method hides: how many, and whether at random or in blocks. Random numbers in, masks
out; all on the CPU, so that how many patches are hidden is known without waiting for a device.

Shapes: R masks, N patches of an image, H and W the rows and columns of its grid (of its pixels for `gmml_blocks`), A masks that
are still growing, T tries.
"""

from collections.abc import Callable

import numpy as np

TRIES = 10
ASPECT = (0.3, 1 / 0.3)


def shares(uniforms_R2: np.ndarray, low: float, high: float, masked: float = 1.0) -> np.ndarray:
    """The share of its patches that each mask may hide, [R]: uniform in [low, high] with probability `masked`, else 0."""
    return np.where(uniforms_R2[:, 0] < masked, low + (high - low) * uniforms_R2[:, 1], 0.0)


def stratified_shares(places_R: np.ndarray, uniforms_R: np.ndarray, count: int, low: float, high: float) -> np.ndarray:
    """The share of its patches that each mask may hide, [R]: `count` masks share [low, high] out in equal strata, one each and
    uniform inside; all others hide nothing.

    Args:
        places_R: where each mask stands in a random order; the first `count` are the ones.
    """
    inside_R = low + (high - low) * (places_R + uniforms_R) / max(1, count)
    return np.where(places_R < count, inside_R, 0.0)


def random_patches(noise_RN: np.ndarray, counts_R: np.ndarray) -> np.ndarray:
    """Masks, bool [R, N], that hide the `counts_R` patches of lowest noise."""
    ranks_RN = noise_RN.argsort(1, kind="stable").argsort(1, kind="stable")
    return ranks_RN < counts_R[:, None]


def block_patches(
    uniforms: Callable[[int], np.ndarray],
    counts_R: np.ndarray,
    grid: tuple[int, int],
    smallest: int,
) -> np.ndarray:
    """Masks, bool [R, N], that grow block by block and hide at most `counts_R` patches (Bao et al., "BEiT: BERT Pre-Training of
    Image Transformers", ICLR 2022, algorithm 1, as iBOT and DINOv2 use it).

    A block has an area drawn uniformly between `smallest` and what is still wanted, and an aspect drawn log-uniformly from
    `ASPECT`. It is taken if it is narrower and lower than the grid, hides something new and not too much. A mask is complete when
    nothing is wanted any more, or after `TRIES` blocks in a row that were not taken: then it has fewer.

    Args:
        uniforms: round -> [R, T, 4] in [0, 1), the same T for every round. Rounds are asked for in order from 0, until every mask
            is complete, so a mask depends on its own rows of them only.
        counts_R: int [R].
        grid: patches of an image, (rows, columns).
        smallest: patches of the smallest block that is looked for.
    """
    height, width = grid
    rows_H, columns_W = np.arange(height), np.arange(width)
    masks_RHW = np.zeros((len(counts_R), height, width), dtype=bool)
    wanted_R, misses_R = counts_R.astype(np.int64), np.zeros(len(counts_R), dtype=np.int64)
    growing_A = np.flatnonzero(wanted_R > 0)
    low, high = np.log(ASPECT)
    round_ = 0
    while len(growing_A):
        for numbers_R4 in np.swapaxes(uniforms(round_), 0, 1):
            area_A, aspect_A, top_A, left_A = numbers_R4[growing_A].T.astype(np.float64)
            wanted_A = wanted_R[growing_A]
            area_A = smallest + (wanted_A - smallest) * area_A
            aspect_A = np.exp(low + (high - low) * aspect_A)
            tall_A, wide_A = np.rint(np.sqrt(area_A * aspect_A)), np.rint(np.sqrt(area_A / aspect_A))
            top_A1 = np.floor(top_A * (height - tall_A + 1))[:, None]
            left_A1 = np.floor(left_A * (width - wide_A + 1))[:, None]
            inside_AH = (rows_H >= top_A1) & (rows_H < top_A1 + tall_A[:, None])
            inside_AW = (columns_W >= left_A1) & (columns_W < left_A1 + wide_A[:, None])
            block_AHW = inside_AH[:, :, None] & inside_AW[:, None, :]
            new_A = (block_AHW & ~masks_RHW[growing_A]).sum((1, 2))
            fits_A = (tall_A < height) & (wide_A < width) & (new_A > 0) & (new_A <= wanted_A)
            masks_RHW[growing_A] |= block_AHW & fits_A[:, None, None]
            wanted_R[growing_A] -= new_A * fits_A
            misses_R[growing_A] = np.where(fits_A, 0, misses_R[growing_A] + 1)
            growing_A = growing_A[(wanted_R[growing_A] > 0) & (misses_R[growing_A] < TRIES)]
        round_ += 1
    return masks_RHW.reshape(len(counts_R), -1)


def gmml_blocks(
    uniforms: Callable[[int], np.ndarray],
    targets_R: np.ndarray,
    size: tuple[int, int],
    align: int = 1,
    largest: float = 0.3,
) -> np.ndarray:
    """Masks of pixels, bool [R, H, W], that grow block by block until each covers its target share (the corruption of GMML and
    SiT: Atito et al., "GMML is All you Need", 2022, and "SiT: Self-supervised vIsion Transformer", 2021).

    A block's top-left corner is uniform on a grid of `align` pixels, its sides are uniform over the multiples of `align` up to
    `largest` of the image's side, rounded, but at least `align`. What reaches past the edge is cut off there. Blocks overlap, and
    the last one may overshoot: a mask covers at least its target.

    Args:
        uniforms: round -> [R, T, 4] in [0, 1), the same T for every round. Rounds are asked for in order from 0, until every mask
            is complete, so a mask depends on its own rows of them only.
        targets_R: float [R], shares from 0 to below 1; the nearer to 1, the more blocks it takes.
        size: (H, W) in pixels.
    """
    masks_RHW = np.zeros((len(targets_R), *size), dtype=bool)
    missing_R = targets_R.astype(np.float64) * size[0] * size[1]
    places = [-(-side // align) for side in size]
    sides = [max(1, round(largest * side / align)) for side in size]
    choices_4 = np.array([*places, *sides])
    growing_A = np.flatnonzero(missing_R > 0)
    round_ = 0
    while len(growing_A):
        numbers_RT4 = uniforms(round_).astype(np.float64)
        blocks_RT4 = align * (np.floor(numbers_RT4 * choices_4).astype(np.int64) + np.array([0, 0, 1, 1]))
        for row in growing_A:
            for top, left, tall, wide in blocks_RT4[row].tolist():
                block = masks_RHW[row, top : top + tall, left : left + wide]
                missing_R[row] -= block.size - np.count_nonzero(block)
                block[...] = True
                if missing_R[row] <= 0:
                    break
        growing_A = growing_A[missing_R[growing_A] > 0]
        round_ += 1
    return masks_RHW
