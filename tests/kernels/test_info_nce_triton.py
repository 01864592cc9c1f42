"""What only info_nce in Triton has to show; the rest is in test_info_nce.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.interpreted import DEVICE, MARKS, poisoned_memory
from tests.kernels.test_info_nce import assert_agrees_with_plain, plain_info_nce, random_input

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "info_nce")


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        *((torch.float32, channels) for channels in (100, 200)),
        *((torch.float16, channels) for channels in (64, 256, 300, 512)),
        *(pytest.param(torch.bfloat16, c, marks=pytest.mark.gpu) for c in (64, 256, 257, 1024, 4096)),
    ],
)
def test_widths(dtype, channels):
    assert_agrees_with_plain(*random_input(10, 40, channels, dtype, DEVICE), 0.1)


@settings(max_examples=8)
@given(st.integers(1, 140), st.integers(1, 140), st.integers(1, 40))
def test_any_shape(batch, count, channels):
    assert_agrees_with_plain(*random_input(batch, count, channels, torch.float16, DEVICE), 0.1, cancels=True)


def test_small_probabilities_survive_half_precision():
    """Every p is 1/3000 up to 1/3, far from its neighbours in fp16 if it were rounded as it is."""
    count = 3000
    queries = torch.ones(16, 16, device=DEVICE, dtype=torch.float16)
    keys = torch.zeros(count, 16, device=DEVICE, dtype=torch.float16)
    keys[:, 0] = torch.linspace(0, 1, count, device=DEVICE)
    targets = torch.zeros(16, dtype=torch.int64, device=DEVICE)
    results = []
    for function, dtype in ((kernels.info_nce, torch.float16), (plain_info_nce, torch.float64)):
        leaf = keys.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(function(queries.to(dtype), leaf, targets, 0.07) * 4096, leaf)
        results.append(grad.double())
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-7)


def test_no_matrix_of_similarities_is_stored():
    kept = []
    queries, keys, targets = random_input(96, 300, 8, torch.float16, DEVICE)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
        poisoned_memory() as sizes,
    ):
        kernels.info_nce(queries.requires_grad_(), keys.requires_grad_(), targets, 0.1).backward()
    assert max(kept) == keys.numel()
    assert 0 < sum(sizes) < 96 * 300 * 4 / 2


def test_what_it_does_not_take_is_told_in_one_sentence():
    queries, keys, targets = random_input(2, 3, 4, torch.float64, DEVICE)
    with pytest.raises(ValueError, match="info_nce in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.info_nce(queries, keys, targets, 0.1)
