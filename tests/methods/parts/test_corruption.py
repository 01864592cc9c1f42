"""Corruption of images: where, how much and by what; a function of the row, not of the rank; the mean over corrupted pixels."""

import math

import pytest
import torch
from torch import Tensor

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.parts.corruption import CorruptionSettings, corrupt, draw_corruption, masked_mean

SIZE = (24, 32)


def drawn(
    settings: CorruptionSettings, batch: int = 8, rows: slice = slice(None), step: int = 0, crops: int = 2
) -> dict[str, Tensor]:
    return draw_corruption(settings, Draws(3, 0, step, batch=batch, rows=rows, device=torch.device("cpu")), crops, SIZE)


def crops(batch: int = 8, count: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, *SIZE, generator=generator) for _ in range(count))


def test_shares_are_drawn_between_and_half_of_the_crops_get_alien_pixels():
    settings = CorruptionSettings(drop=(0.5, 0.75), alien=0.2, alien_probability=0.5, largest_block=0.1)
    numbers = drawn(settings, batch=1000)
    covered, alien = numbers["corrupted"].double().mean((2, 3)), numbers["alien"]
    assert covered.shape == alien.shape == (1000, 2)
    assert all(x.device.type == "cpu" for x in numbers.values()) and "noise" not in numbers
    assert alien.double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2000))
    assert (alien[:, 0] ^ alien[:, 1]).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(1000))
    most = 2 * 3 / (24 * 32)  # a block
    assert covered[alien].min() >= 0.2 and covered[alien].max() < 0.2 + most
    lost = covered[~alien]
    assert lost.min() >= 0.5 and lost.max() < 0.75 + most
    # uniform in between: mean and variance of U(.5, .75), but for the overshoot of half a block at most
    assert lost.mean().item() == pytest.approx(0.625, abs=5 * 0.25 / math.sqrt(12 * 1000) + most)
    assert lost.std().item() == pytest.approx(0.25 / math.sqrt(12), rel=0.1)


def test_lost_pixels_are_zero_alien_ones_the_neighbours_and_others_stay():
    settings = CorruptionSettings()
    images, numbers = crops(), drawn(settings)
    before = [view.clone() for view in images]
    results = corrupt(settings, images, numbers)
    assert numbers["alien"].any() and not numbers["alien"].all()
    for crop, (view, result) in enumerate(zip(images, results, strict=True)):
        assert torch.equal(view, before[crop])
        for i, image in enumerate(view):
            mask = numbers["corrupted"][i, crop]
            assert torch.equal(result[i][:, ~mask], image[:, ~mask])
            other = view[i + 1 if i % 2 == 0 else i - 1] if numbers["alien"][i, crop] else torch.zeros_like(image)
            assert torch.equal(result[i][:, mask], other[:, mask])


@pytest.mark.parametrize(("batch", "sources"), [(1, [0]), (2, [1, 0]), (3, [1, 0, 1]), (5, [1, 0, 3, 2, 3])])
def test_an_odd_number_of_images_has_neighbours_too(batch: int, sources: list[int]):
    settings = CorruptionSettings(alien_probability=1.0)
    images, numbers = crops(batch, 1), drawn(settings, batch, crops=1)
    numbers["corrupted"] = torch.ones_like(numbers["corrupted"])
    (result,) = corrupt(settings, images, numbers)
    assert torch.equal(result, images[0][sources])


def test_noise_is_standard_normal_and_of_the_image_s_own_seed():
    settings = CorruptionSettings(fill="noise", alien_probability=0.0)
    images, numbers = crops(), drawn(settings)
    results = corrupt(settings, images, numbers)
    filled = torch.cat([r.movedim(1, -1)[numbers["corrupted"][:, crop]].flatten() for crop, r in enumerate(results)])
    assert filled.mean().abs() < 5 / math.sqrt(len(filled))
    assert filled.std().item() == pytest.approx(1.0, abs=5 / math.sqrt(2 * len(filled)))
    assert len(filled.unique()) > 0.99 * len(filled)  # no two crops or images share it
    assert all(torch.equal(a, b) for a, b in zip(results, corrupt(settings, images, numbers), strict=True))
    half = corrupt(settings, tuple(view[4:] for view in images), {k: v[4:] for k, v in numbers.items()})
    assert all(torch.equal(a[4:], b) for a, b in zip(results, half, strict=True))


@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_ranks_and_micro_batches_compute_their_rows_of_one_process(fill: str):
    settings = CorruptionSettings(fill=fill)
    images, whole = crops(), drawn(settings)
    parts = [slice(0, 4), slice(4, 8)]
    of_ranks = [drawn(settings, rows=rows) for rows in parts]
    assert of_ranks[0].keys() == whole.keys()
    assert all(torch.equal(torch.cat([p[name] for p in of_ranks]), whole[name]) for name in whole)
    by_rank = [corrupt(settings, tuple(v[rows] for v in images), p) for rows, p in zip(parts, of_ranks, strict=True)]
    for crop, result in enumerate(corrupt(settings, images, whole)):
        assert torch.equal(torch.cat([results[crop] for results in by_rank]), result)
    assert not torch.equal(drawn(settings, step=1)["corrupted"], whole["corrupted"])


def test_masked_mean_is_over_pixels_of_an_image_then_over_images():
    loss, masks = torch.rand(4, *SIZE, dtype=torch.float64), drawn(CorruptionSettings(), 4)["corrupted"][:, 0]
    masks[2] = False
    expected = sum(float(loss[i][masks[i]].mean()) for i in (0, 1, 3)) / 4
    assert masked_mean(loss, masks).item() == pytest.approx(expected, abs=1e-12)
    halves = [masked_mean(loss[rows], masks[rows]).item() for rows in (slice(0, 2), slice(2, 4))]
    assert sum(halves) / 2 == pytest.approx(expected, abs=1e-12)


def test_rules_name_what_cannot_be_meant():
    assert all(holds for holds, _ in CorruptionSettings().corruption_rules().values())
    wrong = {
        "drop": (0.6, 0.5), "fill": "mud", "alien": 0.0, "alien_probability": 1.5, "largest_block": 0.0, "block_align": 0,
    }  # fmt: skip
    for name, value in wrong.items():
        rules = CorruptionSettings(**{name: value}).corruption_rules()
        assert [flag for flag, (holds, _) in rules.items() if not holds] == [name.replace("_", "-")]
    CorruptionSettings(block_align=8).check_corruption("x", [(24, 32)])
    with pytest.raises(BadInput, match=r"--x.block-align is 16; it must divide both sides of crops of 24 x 32 pixels"):
        CorruptionSettings(block_align=16).check_corruption("x", [(24, 32)])
