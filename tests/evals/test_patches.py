"""Masks against patches: shares, windows and places against plain restatements."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import BadInput
from engine.evals import patches
from engine.evals.features import encoder_of
from engine.evals.subject import Subject
from engine.model.vit import create
from tests.evals.painted import paint


@settings(max_examples=30)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_shares_equal_those_of_a_mask_drawn_large(height, width, rows, columns, seed):
    masks = np.random.default_rng(seed).random((2, height, width)) < 0.5
    large = masks.repeat(rows, 1).repeat(columns, 2).astype(float)  # each patch is now whole pixels
    expected = large.reshape(2, rows, height, columns, width).mean((2, 4))
    np.testing.assert_allclose(patches.shares(masks, (rows, columns)), expected, atol=1e-12)


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_pixel_lies_in_the_patch_under_its_centre(pixels, cells):
    places = np.stack([np.arange(pixels)] * 2, 1)
    found = patches.patch_of(places, (pixels, pixels), (cells, cells))
    expected = [int(np.floor((place + 0.5) * cells / pixels + 1e-12)) for place in range(pixels)]
    assert found[:, 0].tolist() == found[:, 1].tolist() == expected


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (40, 40), (33, 80)])
def test_the_window_of_a_crop_is_what_the_frame_shows(shape):
    how = patches.frame("crop:64", 8)
    rows, columns = patches.window(how, *shape)
    side = min(shape)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (side, side)
    ramps = torch.stack([torch.arange(n).reshape(-1, *s).expand(shape) for n, s in zip(shape, ((1,), ()), strict=True)])
    shown = how.masks(ramps)[:, 32, 32].tolist()  # coordinates of the pixel just after the middle
    assert shown == pytest.approx([rows.start + side / 2, columns.start + side / 2], abs=1)
    assert patches.window(patches.frame("short:64", 8), *shape) == (slice(0, shape[0]), slice(0, shape[1]))


def test_shown_images_have_maps_and_masks_of_their_own_resolution(tmp_path):
    left, top, crowd = np.s_[:, :20], np.s_[5:40, 10:30], np.s_[30:, 15:60]
    test = paint(tmp_path, "val", [[(0, left, False)], [], [(1, top, False), (2, crowd, True)]], shape=(48, 80))
    subject = Subject("small", encoder_of(create("vit_micro_patch8_32", depth=1)), threads=1)
    found = list(patches.shown(subject, test, [2, 0], patches.frame("crop:64", 8), ("norm", "keys")))
    assert [each.index for each in found] == [2, 0]
    for each in found:
        assert each.pixels.shape == (3, 64, 64)
        assert {layer: tuple(map_.shape[:2]) for layer, map_ in each.maps.items()} == {"norm": (8, 8), "keys": (8, 8)}
        np.testing.assert_array_equal(each.masks, test.masks(each.index)[:, :, 16:64])
    assert not found[1].ignored.any()
    whole = np.zeros((48, 80), bool)
    whole[crowd] = True
    whole[top] = False  # an object's pixels count, whatever else lies there
    np.testing.assert_array_equal(found[0].ignored, whole[:, 16:64])


def test_cosines_of_equal_directions_are_one_whatever_their_length():
    one = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = patches.cosines(patches.directions(one), patches.directions(one * 1e4))
    assert found.tolist() == [1.0] * 5
    assert patches.cosines(patches.directions(torch.zeros(1, 3)), patches.directions(torch.ones(1, 3))).tolist() == [0]


@pytest.mark.parametrize(
    "inputs, layers, said",
    [
        (("crop",), ("norm",), "MODE:PIXELS"),
        (("half:64",), ("norm",), "crop, short, square"),
        (("crop:-8",), ("norm",), "MODE:PIXELS"),
        (("crop:64", "crop:64"), ("norm",), "names one twice"),
        ((), (), "missing"),
        ((), ("values",), "norm, keys"),
    ],
)
def test_inputs_and_layers_that_make_no_sense(inputs, layers, said):
    with pytest.raises(BadInput, match=said):
        patches.check_inputs(inputs, layers)


def test_an_input_that_is_no_multiple_of_the_patch():
    with pytest.raises(BadInput, match="multiple of the patch size 16"):
        patches.frame("crop:100", 16)
