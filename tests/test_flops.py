"""The operations a step is credited with are those torch counts in its matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from engine import methods
from engine.core.draws import Draws
from engine.methods.base import Labels
from engine.model import vit
from tests.methods.small import small


@pytest.mark.parametrize("name", methods.names())
def test_flops_equal_torch_s_count(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    kind = methods.get(name)
    settings = kind.Settings(**small(kind.Settings, epochs=1, decoder_depth=2, head_hidden=64))
    known = (Labels(torch.arange(8) % 3, ("a", "b", "c")),) if settings.labelled else ()
    method = kind(vit.create("vit_micro_patch8_32", depth=4), settings, *known)
    drawn = method.draw(Draws(0, batch=8, rows=slice(None), device=torch.device("cpu")))
    images = tuple(torch.randn(8, 3, *view.size) for view in method.views())
    attention, packed_attention = [], kernels.packed_attention

    def counted(qkv: torch.Tensor, cu_seqlens: torch.Tensor, *others: object) -> torch.Tensor:
        """What the counter cannot see: 4 L^2 C a sequence, three times where gradients flow."""
        out = packed_attention(qkv, cu_seqlens, *others)
        squares = cu_seqlens.diff().double().square().sum().item()
        attention.append((3 if out.requires_grad else 1) * 4 * squares * out.shape[1] * out.shape[2])
        return out

    monkeypatch.setattr(kernels, "packed_attention", counted)
    with FlopCounterMode(display=False) as counter:
        method(images, torch.arange(8), drawn)["loss"].backward()
    # Not credited: look-ups and similarities within the batch. Not computed: gradients of pixels and frozen inputs.
    assert 8 * method.flops_per_image() == pytest.approx(counter.get_total_flops() + sum(attention), rel=0.03)
