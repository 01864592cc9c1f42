"""The residual stream's number format: kept from the first block to the last, under each form of stochastic depth, and nowhere
without autocast."""

import pytest
import torch
from torch import Tensor

from engine.core.draws import Draws
from engine.methods.mae import Mae, Settings
from engine.model import depth, residual, vit
from engine.model.blocks import Block
from engine.model.tokens import View
from tests.model.shaken import MICRO, draw


def streams(model: torch.nn.Module, run) -> list[torch.dtype]:
    """What every block is given and gives, in order."""
    seen: list[torch.dtype] = []
    hooks = []

    def hook(block: Block, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen.extend((given[0].dtype, made.dtype))

    for block in (part for part in model.modules() if isinstance(part, Block)):
        hooks.append(block.register_forward_hook(hook))
    run()
    for handle in hooks:
        handle.remove()
    return seen


@pytest.mark.parametrize("choice", residual.DTYPES)
@pytest.mark.parametrize(("init_values", "rate"), [(None, 0.0), (0.1, 0.0), (0.1, 0.01)])
def test_it_is_one_format_from_end_to_end(choice: str, init_values: float | None, rate: float):
    model = vit.create(MICRO, init_values=init_values, drop_path=rate, positions="sincos")
    assert not depth.drops(rate, torch.device("cpu"))
    residual.choose(model, choice)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.encode([View(torch.randn(4, 3, 32, 32, generator=draw()))], draw(1) if rate else None)

    assert set(streams(model, run)) == {residual.DTYPES[choice]}


def test_without_autocast_nothing_is_rounded():
    model = vit.create(MICRO)
    images = torch.randn(2, 3, 32, 32, generator=draw())
    expected = model(images)
    residual.choose(model, "bf16")
    assert torch.equal(model(images), expected)


def test_rows_that_sit_out_keep_their_bits():
    x_TC, change_RC = torch.randn(3, 8, generator=draw()).bfloat16(), torch.randn(2, 8, generator=draw(1)).bfloat16()
    rows, places = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 0, 1], dtype=torch.int32)
    worth = torch.tensor([[1.5], [0.0], [1.5]])
    found = depth.put(x_TC, change_RC, rows, places, worth)
    change_TC = torch.stack([change_RC[0], torch.zeros(8), change_RC[1]]).float() * 1.5
    assert found.dtype == torch.bfloat16 and torch.equal(found, x_TC + change_TC.bfloat16())


def test_gradients_of_both_formats_agree_to_16_bits():
    found = {}
    for choice in residual.DTYPES:
        torch.manual_seed(0)
        method = Mae(vit.create(MICRO, generator=draw()), Settings(decoder_dim=64, decoder_depth=2, decoder_heads=2))
        residual.choose(method, choice)
        assert method.encoder.residual == method.decoder.residual == choice
        images = torch.rand(8, 3, 32, 32, generator=draw(1))
        drawn = method.draw(Draws(0, batch=8, rows=slice(None), device=torch.device("cpu")))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            method((images,), torch.arange(8), drawn)["loss"].backward()
        found[choice] = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    wide, narrow = found["fp32"], found["bf16"]
    assert not torch.equal(wide, narrow)
    assert torch.linalg.vector_norm(narrow - wide) < 0.05 * torch.linalg.vector_norm(wide)
