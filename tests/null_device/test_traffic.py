"""What a step moves: bytes of an operation as they are by hand, and a whole step whose launches and operations are all accounted
for."""

import pytest
import torch

from engine.null_device import device
from engine.planning.counting import Count
from engine.planning.traffic import flops, moved, total
from tests.null_device import figures

aten = torch.ops.aten
X, Y, ROWS = torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(3, dtype=torch.int32)  # 128, 128 and 12 bytes


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "expected"),
    [
        (aten.add.Tensor, (X, Y), {}, 3 * 128),
        (aten.add.Tensor, (X, X), {}, 2 * 128),  # read once
        (aten.add.Tensor, (X, Y[:1].expand(8, 4)), {}, 128 + 16 + 128),
        (aten.add_.Tensor, (X, Y), {}, 3 * 128),
        (aten.copy_.default, (X, Y), {}, 2 * 128),
        (aten.index_select.default, (X, 0, ROWS), {}, 48 + 48 + 12),
        (aten.new_zeros.default, (X, (2, 3)), {}, 24),
        (aten.mm.out, (X, Y.t()), {"out": torch.zeros(8, 8)}, 128 + 128 + 256),
    ],
)
def test_bytes_of_an_operation(func, args: tuple, kwargs: dict, expected: int):
    assert moved(func, args, kwargs, func(*args, **kwargs)) == expected


def test_operations_of_a_product():
    assert flops(aten.mm.default, (X, Y.t()), {}, X @ Y.t()) == 2 * 8 * 4 * 8
    assert flops(aten.add.Tensor, (X, Y), {}, X + Y) == 0


@pytest.mark.null_device
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_step_is_accounted_for(on_device):
    found = device.answer("tests.null_device.traffic", ["mae", "vit_tiny_patch16_224", "8", "--eager"], on_device())
    count = Count.from_json(found)
    products = sum(row.flops for row in count.rows if "attention" not in row.name)
    version, stored = figures.stored()
    if version == torch.__version__:
        assert products == stored["mae"]["sm_90"]["0 mae, eager"]["product_flops"]
    assert count.launches <= total(count.rows).launches <= 1.01 * count.launches
    assert {row.part for row in count.rows} == {"forward, update", "backward"}
    assert count.peak_bytes > count.bytes / 100 > 0
