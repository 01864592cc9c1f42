"""The operations a step is credited with are those torch counts in its matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from engine import methods
from engine.core.draws import Draws
from engine.core.phases import WHOLE, Phase
from engine.methods.base import Labels
from engine.model import vit
from tests.methods.small import small

PHASES = {
    "": (WHOLE, lambda kind: True),
    "-small": (Phase(side=0.5), lambda kind: kind.shrinks),
    "-dropped": (Phase(keep=0.5), lambda kind: kind.drops_patches),
    "-large-patches": (Phase(patch=2.0), lambda kind: kind.shrinks),
}
CASES = [
    pytest.param(name, phase, id=name + what)
    for what, (phase, takes) in PHASES.items()
    for name in methods.names()
    if takes(methods.get(name))
]


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_flops_equal_torch_s_count(name: str, phase: Phase, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    kind = methods.get(name)
    settings = kind.Settings(**small(kind.Settings, epochs=1, decoder_depth=2, head_hidden=64))
    known = (Labels(torch.arange(32) % 3, ("a", "b", "c")),) if settings.labelled else ()
    method = kind(vit.create("vit_micro_patch8_32", depth=4), settings, *known)
    method.phase = phase
    batch = 32 if phase.patch > 1 else 8  # weights are resized once a step, which is not credited
    drawn = method.draw(Draws(0, batch=batch, rows=slice(None), device=torch.device("cpu")))
    images = tuple(torch.randn(batch, 3, *view.size) for view in method.views())
    attention, packed_attention = [], kernels.packed_attention

    def counted(qkv: torch.Tensor, cu_seqlens: torch.Tensor, *others: object) -> torch.Tensor:
        """What the counter cannot see: 4 L^2 C a sequence, three times where gradients flow."""
        out = packed_attention(qkv, cu_seqlens, *others)
        squares = cu_seqlens.diff().double().square().sum().item()
        attention.append((3 if out.requires_grad else 1) * 4 * squares * out.shape[1] * out.shape[2])
        return out

    monkeypatch.setattr(kernels, "packed_attention", counted)
    with FlopCounterMode(display=False) as counter:
        method(images, torch.arange(batch), drawn)["loss"].backward()
    # Not credited: look-ups and similarities within the batch. Not computed: gradients of pixels and frozen inputs.
    assert batch * method.flops_per_image() == pytest.approx(counter.get_total_flops() + sum(attention), rel=0.03)
