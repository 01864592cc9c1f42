import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.core.errors import BadInput
from engine.model import vit
from engine.model.positions import INTERPOLATIONS, resampled, resampled_table, sincos_positions
from tests.model.shaken import MICRO, RELATIVE, draw
from tests.model.tables import as_beit_s_code


def test_sincos_positions_follow_the_formula():
    positions, (height, width), dim = sincos_positions(12, (3, 2)), (3, 2), 12
    for row in range(height):
        for column in range(width):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[row * width + column], torch.tensor(expected))
    with pytest.raises(BadInput, match="multiple of 4"):
        sincos_positions(10, (2, 2))


def test_relative_positions_follow_the_formula():
    model = vit.create(MICRO, img_size=(16, 24), **RELATIVE)  # 2 x 3 patches
    table = model.rel_pos_bias.relative_position_bias_table.data.normal_(generator=draw())
    bias = model.rel_pos_bias()
    assert table.shape == (3 * 5 + 3, 4) and bias.shape == (4, 7, 7)
    assert torch.equal(bias[:, 0, 0], table[17])
    for asks in range(6):
        assert torch.equal(bias[:, 0, 1 + asks], table[15]) and torch.equal(bias[:, 1 + asks, 0], table[16])
        for asked in range(6):
            down, right = asks // 3 - asked // 3, asks % 3 - asked % 3
            assert torch.equal(bias[:, 1 + asks, 1 + asked], table[(down + 1) * 5 + right + 2])


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((4, 4), (9, 7)), ((6, 9), (4, 3)), ((3, 5), (10, 6))])
def test_a_table_for_another_grid_is_as_by_beit_s_code(old, new):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 3, generator=draw())
    torch.testing.assert_close(resampled_table(table, old, new), as_beit_s_code(table, old, new), atol=1e-5, rtol=1e-5)


def test_an_axis_of_a_table_that_stays_as_long_is_left_and_one_of_one_patch_is_repeated():
    table = torch.randn(7 * 5 + 3, 3, generator=draw())
    assert torch.equal(resampled_table(table, (4, 3), (4, 3)), table)
    wide = resampled_table(table, (4, 3), (4, 6))
    assert wide.shape == (7 * 11 + 3, 3) and torch.equal(wide[-3:], table[-3:])
    torch.testing.assert_close(wide[:-3].unflatten(0, (7, 11))[:, 5], table[:-3].unflatten(0, (7, 5))[:, 2])
    flat = torch.randn(1 * 5 + 3, 3, generator=draw())
    tall = resampled_table(flat, (1, 3), (2, 3))[:-3].unflatten(0, (3, 5))
    assert torch.equal(tall, flat[:-3].expand(3, 5, 3))


def as_published(positions_1Chw: Tensor, new: tuple[int, int], kind: str) -> Tensor:
    """By torch's interpolation as the authors call it: DINO's, iBOT's and DINOv2's scale is a tenth of a patch too large; MSN,
    which knows squares only, gives the root of the ratio of patches, and MIM-Refiner the size."""
    old = positions_1Chw.shape[2:]
    if kind == "offset":
        return F.interpolate(positions_1Chw, scale_factor=[(n + 0.1) / o for n, o in zip(new, old)], mode="bicubic")
    if kind == "bicubic" and old[0] == old[1] and new[0] == new[1]:
        return F.interpolate(positions_1Chw, scale_factor=math.sqrt(new[0] ** 2 / old[0] ** 2), mode="bicubic")
    return F.interpolate(positions_1Chw, size=new, mode="bicubic", antialias=kind == "antialiased")


@pytest.mark.parametrize("kind", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (6, 6)), ((16, 16), (7, 7)), ((4, 4), (2, 2)), ((6, 9), (4, 3)), ((14, 14), (24, 18))]
)
def test_positions_of_other_sizes_are_as_published(old, new, kind):
    positions = torch.randn(old[0] * old[1], 8, generator=draw()).requires_grad_()
    expected = as_published(positions.double().T.reshape(1, 8, *old), new, kind)[0].flatten(1).T.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = resampled(positions, old, new, kind)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    taught = torch.randn(found.shape, generator=draw(1))
    gradients = [torch.autograd.grad((made * taught).sum(), positions)[0] for made in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_kinds_of_positions_differ_and_the_encoder_takes_its_own():
    images = torch.randn(1, 3, 16, 16, generator=draw())
    models = [vit.create(MICRO, generator=draw(), depth=1, interpolation=kind) for kind in INTERPOLATIONS]
    for kind, model in zip(INTERPOLATIONS, models):
        assert torch.equal(model.positions((2, 2)), resampled(model.pos_embed[0, 1:], (4, 4), (2, 2), kind))
    first, second, third = (model(images) for model in models)
    assert min((a - b).abs().max() for a, b in ((first, second), (second, third), (first, third))) > 1e-4
