"""Maps of patches: several layers from one pass, equal to those of a pass each and to what the model itself computes."""

import pytest
import torch

from engine.core.errors import BadInput
from engine.evals.features import encoder_of
from engine.evals.subject import Subject
from engine.model.vit import create


@pytest.fixture(params=["token", "avg"])
def model(request):
    """With global_pool "avg" the final norm follows the pooling."""
    made = create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(0), global_pool=request.param, depth=3)
    with torch.no_grad():
        for norm in (made.norm, made.fc_norm):
            for parameter in norm.parameters():
                parameter.uniform_(0.5, 1.5)
    return made


IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_layers_of_one_pass_equal_those_of_a_pass_each_and_the_model(model):
    subject, runs, keys = Subject("small", encoder_of(model)), [], []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: runs.append(0))
    hook = model.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, out: keys.append(out.chunk(3, -1)[1]))
    found = subject.maps_by_layer(IMAGES, ("keys", "norm"))
    assert len(runs) == 1 and list(found) == ["keys", "norm"]
    hook.remove()
    for layer in found:
        assert torch.equal(found[layer], subject.maps(IMAGES, layer))
        assert found[layer].shape == (2, 4, 6, model.embed_dim)
    normed = model.fc_norm(model(IMAGES)[:, model.num_prefix_tokens :])
    torch.testing.assert_close(found["norm"].flatten(1, 2), normed, atol=1e-6, rtol=0)
    tokens = keys[-1].unflatten(0, (2, -1))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(found["keys"].flatten(1, 2), tokens, atol=1e-6, rtol=0)


def test_one_layer_runs_no_more_than_it_needs(model):
    subject, attended = Subject("small", encoder_of(model)), []
    for number, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: attended.append(number))
    subject.maps(IMAGES, "keys")
    assert attended == [0, 1]
    subject.maps(IMAGES, blocks=(0,))
    assert attended == [0, 1, 0]


def test_blocks_stand_side_by_side_in_the_order_asked_for(model):
    subject = Subject("small", encoder_of(model))
    found = subject.maps(IMAGES, blocks=(2, 0))
    first, last = (subject.maps(IMAGES, blocks=(block,)) for block in (0, 2))
    assert torch.equal(found, torch.cat([last, first], -1))


def test_an_unknown_layer_is_named(model):
    with pytest.raises(BadInput, match="layer 'values' is none of norm, keys"):
        Subject("small", encoder_of(model)).maps_by_layer(IMAGES, ("norm", "values"))
