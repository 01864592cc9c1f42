import math

import pytest
import torch

from engine.core.errors import BadInput
from engine.model import vit
from engine.model.positions import sincos_positions
from tests.model.shaken import MICRO, RELATIVE, draw


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
