"""The operations a step is credited with are those torch counts in its matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import methods, vit
from engine.draws import Draws

SMALL = {"projector_hidden": 64, "predictor_hidden": 64, "embedding": 32, "queue_size": 32}
SETTINGS = {"mae": {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 2}, "nnclr": SMALL, "maect": SMALL}


def attention_flops(method, batch: int) -> float:
    """What the counter cannot see: the packed attention, 4 L^2 C a sequence, three times where gradients flow."""
    encoder, views = method.encoder, len(method.views())
    lengths = method.keep + 1 if method.name == "mae" else 17
    total = 0.0
    for index in range(len(encoder.blocks)):
        trained = {"mae": True, "nnclr": False, "maect": index >= 2}[method.name]
        total += (3 if trained else 1) * views * 4 * lengths**2 * encoder.embed_dim
    if method.name == "mae":
        total += 3 * len(method.decoder.decoder_blocks) * 4 * 17**2 * 64
    return batch * total


@pytest.mark.parametrize("name", methods.names())
def test_flops_equal_torch_s_count(name: str):
    torch.manual_seed(0)
    kind = methods.get(name)
    method = kind(vit.create("vit_micro_patch8_32", depth=4), kind.Settings(epochs=1, batch_size=8, **SETTINGS[name]))
    drawn = method.draw(Draws(0, batch=8, rows=slice(None), device=torch.device("cpu")))
    images = tuple(torch.randn(8, 3, 32, 32) for _ in method.views())
    with FlopCounterMode(display=False) as counter:
        method(images, torch.arange(8), drawn)["loss"].backward()
    counted = counter.get_total_flops() + attention_flops(method, 8)
    # Not credited: look-ups and similarities within the batch. Not computed: gradients of pixels and frozen inputs.
    assert 8 * method.flops_per_image() == pytest.approx(counted, rel=0.03)
