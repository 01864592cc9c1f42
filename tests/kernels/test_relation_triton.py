"""What only relation_loss in Triton has to show; the rest is in test_relation.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.relation import triton as relation_triton
from tests.kernels.interpreted import DEVICE, MARKS, poisoned_memory
from tests.kernels.test_relation import assert_agrees_with_plain, plain_relation_loss, random_input

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "relation")


@pytest.mark.parametrize(
    ("dtype", "tokens", "channels"),
    [
        *((torch.float16, 20, channels) for channels in (128, 130, 300)),
        *((torch.float16, tokens, 42) for tokens in (64, 65)),
        (torch.float16, 70, 85),
        (torch.float32, 17, 144),
        *(pytest.param(torch.bfloat16, *size, marks=pytest.mark.gpu) for size in ((64, 42), (49, 85), (196, 85))),
        *(pytest.param(torch.float32, 196, channels, marks=pytest.mark.gpu) for channels in (42, 85)),
    ],
)
def test_sizes(dtype, tokens, channels):
    """Both gradients at once up to 64 tokens and 128 channels, one after the other beyond; slices above 128 channels."""
    assert_agrees_with_plain(*random_input(1, tokens, channels, dtype, DEVICE), 8)


@settings(max_examples=6)
@given(st.integers(1, 2), st.integers(1, 80), st.integers(1, 70), st.integers(1, 20))
def test_any_shape(images, tokens, channels, columns):
    assert_agrees_with_plain(*random_input(images, tokens, channels, torch.float16, DEVICE), columns)


def test_both_ways_to_the_gradients_agree(monkeypatch):
    queries, keys, places = random_input(2, 30, 42, torch.float16, DEVICE)
    queries.requires_grad_()
    keys.requires_grad_()
    results = []
    for longest in (64, 0):
        monkeypatch.setattr(relation_triton, "_WHOLE_TOKENS", longest)
        loss = kernels.relation_loss(queries, keys, places, 6)
        results.append(torch.autograd.grad(loss, (queries, keys)))
    torch.testing.assert_close(*results)


def test_small_probabilities_survive_half_precision():
    """Classes that are rightly found unlikely, at about 1e-6 each, of which fp16 as it is keeps four bits."""
    queries, keys, places = random_input(1, 16, 16, torch.float16, DEVICE)
    queries, keys = queries.abs() / 8, keys.abs() / 8
    queries[:, :, 4, 0] = 3.5
    keys[:, :, 4, 0] = 4
    results = []
    for function, dtype in ((kernels.relation_loss, torch.float16), (plain_relation_loss, torch.float64)):
        leaf = keys.to(dtype).requires_grad_()
        loss = function(queries.to(dtype), leaf, torch.zeros_like(places), 4, 1.0)
        (grad,) = torch.autograd.grad(loss * 2**20, leaf)
        results.append(torch.cat((grad[:, :, :4], grad[:, :, 5:]), 2).double())
    torch.testing.assert_close(*results, rtol=3e-3, atol=1e-5)
    assert 1e-3 < results[1].mean() < 1e-2


@pytest.mark.parametrize("tokens", [40, 80])
def test_no_map_of_logits_is_stored(tokens):
    kept = []
    queries, keys, places = random_input(1, tokens, 5, torch.float16, DEVICE)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
        poisoned_memory() as sizes,
    ):
        kernels.relation_loss(queries.requires_grad_(), keys.requires_grad_(), places, 8).backward()
    pairs, one = tokens**2, queries.numel()
    assert sorted(kept) == sorted([tokens, pairs, one, one])
    # the log-sum-exp of pairs, both gradients, and a number per tile
    assert 0 < sum(sizes) - 4 * pairs - 4 * one < 100


@pytest.mark.parametrize(("channels", "unit"), [(85, 1), (42, 2), (20, 4), (64, 16)])
def test_copies_are_as_wide_as_the_strides_allow(channels, unit):
    queries, keys, _ = random_input(2, 3, channels)
    assert relation_triton._unit(queries, keys) == unit
    assert relation_triton._unit(*torch.cat((queries, keys), 2).chunk(2, 2)) == unit
    odd = torch.nn.functional.pad(queries, (0, 1 - channels % 2))[..., :channels]
    assert relation_triton._unit(odd, keys) == 1


def test_an_image_that_is_spread_too_far_is_copied():
    """Offsets within an image are 32-bit."""
    spread = torch.empty(2**34, device="meta").as_strided((2, 3, 9, 4), (1, 2**30, 8, 2))
    assert relation_triton._near(spread).is_contiguous()
    near = spread[:, :2]
    assert relation_triton._near(near) is near


def test_what_it_does_not_take_is_told_in_one_sentence():
    queries, keys, places = random_input(2, 3, 4, torch.float64, DEVICE)
    with pytest.raises(ValueError, match="relation_loss in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.relation_loss(queries, keys, places, 2)
