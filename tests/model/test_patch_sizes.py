"""Patches of another size, embedded and predicted by weights made of the model's own: against the definition, written out."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model import vit
from engine.model.heads import Decoder
from engine.model.patch_sizes import embedding_for, prediction_for
from engine.model.tokens import View
from tests.model.shaken import MICRO, draw

SIZES = [(4, 8), (4, 5), (8, 12), (3, 7), (8, 6)]


def resizing(own: int, side: int) -> np.ndarray:
    """B [Q * Q, P * P]: column by column, what torch's bilinear resizing makes of a patch with one pixel of 1."""
    pixels = torch.eye(own * own, dtype=torch.float64).view(-1, 1, own, own)
    return F.interpolate(pixels, size=(side, side), mode="bilinear").flatten(1).T.numpy()


@pytest.mark.parametrize(("own", "side"), SIZES)
def test_embeddings_are_pi_resized(own: int, side: int):
    weight = torch.randn(5, 3, own, own, generator=draw())
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding_for(weight, side)
    expected = np.linalg.pinv(resizing(own, side).T) @ weight.double().flatten(2).numpy()[..., None]
    torch.testing.assert_close(found, torch.from_numpy(expected).view(5, 3, side, side).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("own", "side"), SIZES[:-1])
def test_a_patch_that_was_enlarged_is_embedded_and_predicted_as_it_was(own: int, side: int):
    weight = torch.randn(5, 3, own, own, dtype=torch.float64, generator=draw())
    patches = torch.randn(7, 3, own, own, dtype=torch.float64, generator=draw(1))

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(side, side), mode="bilinear")

    tokens, large = (F.conv2d(x, w) for x, w in ((patches, weight), (enlarged(patches), embedding_for(weight, side))))
    torch.testing.assert_close(large, tokens)
    layer = torch.randn(own * own * 3, 5, dtype=torch.float64, generator=draw(2))
    images = [
        F.linear(tokens[..., 0, 0], w).unflatten(1, (s, s, 3)).permute(0, 3, 1, 2)
        for w, s in ((layer, own), (prediction_for(layer, own, side), side))
    ]
    torch.testing.assert_close(images[1], enlarged(images[0]))
    bias = prediction_for(layer[:, 0], own, side)
    torch.testing.assert_close(bias, prediction_for(layer, own, side)[:, 0])


def test_gradients_reach_the_stored_weights():
    weight = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=draw(), requires_grad=True)
    layer = torch.randn(2 * 2 * 3, 1, dtype=torch.float64, generator=draw(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: embedding_for(w, 3), weight)
    assert torch.autograd.gradcheck(lambda w: prediction_for(w, 2, 3), layer)


def test_the_models_own_size_is_what_it_was_bit_for_bit():
    model = vit.create(MICRO, generator=draw())
    images = torch.randn(2, 3, 32, 32, generator=draw(1))
    assert embedding_for(model.patch_embed.proj.weight, 8) is model.patch_embed.proj.weight
    plain = model.encode([View(images)]).tokens_TC
    assert torch.equal(model.encode([View(images)], patch_size=8).tokens_TC, plain)


def test_an_image_that_was_enlarged_patch_by_patch_has_the_same_tokens_and_the_enlarged_prediction():
    model = vit.create(MICRO, generator=draw(), depth=2)
    decoder = Decoder(model.embed_dim, model.grid, 8, model.num_prefix_tokens, 32, 1, 1)
    images = torch.randn(2, 3, 32, 32, generator=draw(1))
    patches = images.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 1, 3, 5)  # [b, row, column, 3, P, P]
    large = F.interpolate(patches.flatten(0, 2), size=(12, 12), mode="bilinear").unflatten(0, (2, 4, 4))
    large = large.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    visible, masked = torch.randperm(16, generator=draw(2)).expand(2, -1).split([4, 12], 1)
    seen = [model.encode([View(x, visible)], patch_size=side).unpack()[0] for x, side in ((images, None), (large, 12))]
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)
    small, enlarged = (decoder([seen[0]], [visible], [masked], [(4, 4)], side)[0] for side in (8, 12))
    pixels = small.flatten(0, 1).unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
    expected = F.interpolate(pixels, size=(12, 12), mode="bilinear").permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(enlarged.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
