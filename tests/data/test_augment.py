from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp, kstest, truncnorm
from torchvision.transforms import RandomResizedCrop

from engine.data.augment import (
    OPERATIONS,
    drawn_operations,
    epoch_order,
    operation_parameters,
    uniforms,
    view_parameters,
    view_uniforms,
)
from engine.data.views import Augmentation, byol_views, minimal

BATCH = 20_000


def parameters(view, size=(500, 375), batch=BATCH, seed=0):
    sizes = np.tile(np.array(size, np.int32), (batch, 1))
    return view_parameters(view, sizes, view_uniforms(slice(0, batch), seed, 0, 0))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    seed=st.integers(0, 2**40),
    low=st.floats(0.01, 1.0),
)
@settings(max_examples=200)
def test_crops_lie_inside_the_image(sizes, seed, low):
    sizes = np.array(sizes, np.int32)
    drawn = view_parameters(minimal((32, 32), (low, 1.0)), sizes, view_uniforms(slice(0, len(sizes)), seed, 0, 0))
    assert (drawn["start"] >= 0).all()
    assert (drawn["shape"] >= 1).all()
    assert (drawn["start"] + drawn["shape"] <= sizes).all()


@pytest.mark.parametrize("size", [(500, 375), (32, 32), (100, 30)])
def test_crops_have_the_distribution_of_torchvision(size):
    view = minimal((224, 224), (0.2, 1.0))
    drawn = parameters(view, size)
    image = torch.empty(3, size[1], size[0])
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(view.scale), list(view.ratio)) for _ in range(4000)])
    ours = np.concatenate([drawn["start"][:, ::-1], drawn["shape"][:, ::-1]], 1)[:4000]
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, column


def test_an_image_too_narrow_for_any_try_gives_its_largest_centred_crop():
    drawn = parameters(minimal((32, 32), (0.9, 1.0)), size=(1000, 40), batch=8)
    assert (drawn["shape"] == [53, 40]).all()
    assert (drawn["start"] == [473, 0]).all()
    drawn = parameters(minimal((32, 32), (0.9, 1.0)), size=(40, 1000), batch=8)
    assert (drawn["shape"] == [40, 53]).all()
    assert (drawn["start"] == [0, 473]).all()


@pytest.mark.parametrize("size", [(500, 375), (32, 32), (100, 30)])
def test_a_crop_that_is_cut_is_the_first_one_of_byols_sampler(size):
    view = Augmentation((224, 224), (0.08, 1.0), clip=True)
    drawn, u = parameters(view, size, batch=500), view_uniforms(slice(0, 500), 0, 0, 0)
    cut = 0
    for row, (area, log_ratio, left, top) in enumerate(u[:, [0, 10, 20, 21]]):  # columns of the first try
        area = size[0] * size[1] * (0.08 + 0.92 * area)
        ratio = (4 / 3) ** (2 * log_ratio - 1)
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        cut += width > size[0] or height > size[1]
        width, height = min(width, size[0]), min(height, size[1])
        corner = int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1))
        assert tuple(drawn["shape"][row]) == (width, height) and tuple(drawn["start"][row]) == corner
    assert cut > 25


def test_probabilities_and_ranges_are_those_asked_for():
    first, second = (replace(view, colours="linear") for view in byol_views((224, 224)))
    drawn, other = parameters(first), parameters(second, seed=1)

    def near(share, wanted):
        assert abs(share.mean() - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / BATCH) + 1e-12

    near(drawn["mirror"], 0.5)
    near(drawn["brightness"] != 1, 0.8)
    near(drawn["saturation"] == 0, 0.2)
    near(drawn["window"] == 0, 1.0)
    near(other["window"] == 0, 0.1)
    near(other["solarize_from"] == 128, 0.2)
    assert "solarize_from" not in drawn
    jittered = drawn["brightness"] != 1
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        values = drawn[name][jittered & (drawn["saturation"] > 0)]
        assert ks_2samp(values, np.linspace(1 - strength, 1 + strength, 2000)).pvalue > 1e-3
    assert ks_2samp(drawn["hue"][jittered], np.linspace(-36, 36, 2000)).pvalue > 1e-3
    assert ks_2samp(drawn["sigma"], np.linspace(0.1, 2, 2000)).pvalue > 1e-3
    assert abs(np.corrcoef(drawn["brightness"][jittered], drawn["contrast"][jittered])[0, 1]) < 0.03


def test_both_forms_of_colours_draw_the_same_factors():
    view = replace(byol_views((224, 224))[0], jitter=1.0)
    ours, linear = parameters(view), parameters(replace(view, colours="linear"))
    assert set(ours) - set(linear) == {"factors", "saturates", "hue_steps", "gray"}
    assert np.array_equal(ours["gray"] == 1, linear["saturation"] == 0)
    brightness, contrast = ours["factors"][:, :, (0, 2)].prod((1, 2)), ours["factors"][:, :, 1].prod(1)
    assert np.array_equal(brightness, linear["brightness"]) and np.array_equal(contrast, linear["contrast"])
    coloured = ours["gray"] == 0
    assert np.array_equal(ours["saturation"][coloured], linear["saturation"][coloured])
    turned = (ours["hue_steps"] + 128) % 256 - 128
    assert np.array_equal(turned, np.trunc(linear["hue"] / 360 * 255).astype(int))


def test_only_what_a_view_needs_is_drawn():
    assert set(parameters(minimal((8, 8)), batch=2)) == {"start", "shape", "mirror"}
    assert set(parameters(Augmentation((8, 8), (1, 1), flip=0), batch=2)) == {"start", "shape"}


def test_a_padded_crop_is_drawn_evenly_and_leaves_no_other_crop():
    drawn = parameters(Augmentation((32, 32), (0.2, 1), pad=4))
    assert set(drawn) == {"start", "shape", "shift", "mirror"}
    assert (drawn["start"] == 0).all()
    assert (drawn["shape"] == (500, 375)).all()
    for axis in range(2):
        counts = np.bincount(drawn["shift"][:, axis] + 4)
        assert len(counts) == 9
        assert chisquare(counts).pvalue > 1e-3


def test_operations_are_drawn_evenly_with_normal_magnitudes():
    view = Augmentation((32, 32), (0.2, 1), operations=2)
    uniforms = view_uniforms(slice(0, BATCH), 0, 0, 0)
    both = [drawn_operations(view, uniforms, index) for index in range(2)]
    for names, magnitudes in both:
        found, counts = np.unique(names, return_counts=True)
        assert set(found) == {"", *OPERATIONS}
        assert chisquare(counts[1:]).pvalue > 1e-3
        assert abs(counts[0] / BATCH - 0.5) < 0.015
        assert abs((magnitudes > 0).mean() - 0.5) < 0.015
        assert abs(magnitudes).max() == 10
        inside = abs(magnitudes)[abs(magnitudes) < 10]
        assert kstest(inside, truncnorm(-np.inf, 2, loc=9, scale=0.5).cdf).pvalue > 1e-3
    (first, strength), (second, other) = both
    assert abs(np.corrcoef(abs(strength), abs(other))[0, 1]) < 0.03
    assert abs((first == second)[(first != "") & (second != "")].mean() - 1 / 15) < 0.02


@pytest.mark.parametrize(
    ("name", "key", "low", "high"), [("posterize", "tones", 0xF0, 0x80), ("colour", "blend", 1.0, 1.9)]
)
def test_greater_magnitudes_are_stronger(name, key, low, high):
    drawn = operation_parameters(np.array([name] * 2), np.array([0.0, 10.0]), (32, 32))
    assert drawn[key][:, 0].tolist() == pytest.approx([low, high])


def test_numbers_are_a_function_of_their_keys_and_row():
    table = uniforms(slice(0, 1000), 100, 7)
    assert np.array_equal(uniforms(slice(300, 400), 100, 7), table[300:400])
    assert not np.array_equal(uniforms(slice(0, 1000), 100, 8), table)
    assert table.min() >= 0
    assert table.max() < 1
    assert abs(table.mean() - 0.5) < 0.005


def test_the_stream_of_numbers_is_the_published_one():
    """A change here means that old runs cannot be continued."""
    assert uniforms(slice(0, 1), 4, 0, 1, 2).round(6).tolist() == [[0.790175, 0.917957, 0.461142, 0.729678]]
    assert view_uniforms(slice(0, 1), 0, 0, 0)[0, [0, 31, 47, 48, 51]].round(6).tolist() == [
        0.607366,
        0.80534,
        0.499026,
        0.855725,
        0.692089,
    ]
    assert epoch_order(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_every_epoch_is_another_permutation():
    orders = [epoch_order(1000, seed=3, epoch=epoch) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
