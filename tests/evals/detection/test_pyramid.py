"""The pyramids: sizes of their levels, what each is made of, strides."""

import pytest
import torch

from engine.evals.detection import pyramid

BOTH = ("four-blocks", "simple")


def maps(kind: str, height: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 64, height, width, generator=generator) for _ in range(4 if kind == "four-blocks" else 1)]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("norm", ["bn", "ln"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (1, 2)])
def test_five_levels_at_any_size(kind: str, norm: str, height: int, width: int):
    found = pyramid.create(64, 16, kind, norm)(maps(kind, height, width))
    halves = [(-(-height // share), -(-width // share)) for share in (2, 4)]
    sizes = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width), *halves]
    assert list(found) == ["0", "1", "2", "3", "pool"]
    assert [tuple(level.shape) for level in found.values()] == [(2, 16, *size) for size in sizes]


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_reach_every_parameter_and_every_map(kind: str):
    made, given = pyramid.create(64, 16, kind, "bn"), [found.requires_grad_() for found in maps(kind, 5, 6)]
    sum(level.square().mul(torch.rand_like(level)).sum() for level in made(given).values()).backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in (*made.parameters(), *given))


def test_a_level_has_a_block_of_its_own_and_what_comes_down_from_later_ones():
    made, given = pyramid.create(64, 16, "four-blocks", "bn").eval(), maps("four-blocks", 4, 4)
    before = made(given)
    for changed in range(4):
        after = made([found + (index == changed) for index, found in enumerate(given)])
        differs = [not torch.equal(before[name], after[name]) for name in pyramid.LEVELS]
        assert differs == [level <= changed for level in range(4)]


def test_the_simple_pyramid_normalises_each_place_over_channels():
    made, given = pyramid.create(64, 16, "simple", "bn"), maps("simple", 4, 4)
    for level in made(given).values():
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), atol=1e-5, rtol=0)
    alone = made([given[0][:1]])
    torch.testing.assert_close(made(given)["1"][:1], alone["1"], atol=1e-5, rtol=1e-5)


def test_strides():
    assert pyramid.strides(16) == (4, 8, 16, 32, 64)
    assert pyramid.strides(14) == (3.5, 7, 14, 28, 56)
