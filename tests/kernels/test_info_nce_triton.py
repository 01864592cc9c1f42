"""info_nce in Triton against cross-entropy over the full matrix of similarities."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.agreement import assert_agrees
from tests.kernels.interpreted import DEVICE, DTYPES, MARKS, poisoned_memory
from tests.kernels.test_info_nce import plain_info_nce, random_input

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "info_nce")


def assert_agrees_with_plain(queries, keys, targets, temperature):
    with poisoned_memory():
        assert_agrees(
            lambda q, k: kernels.info_nce(q, k, targets, temperature),
            lambda q, k: plain_info_nce(q, k, targets, temperature),
            [queries, keys],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "temperature"),
    [(1, 1, 1, 0.1), (16, 15, 16, 0.05), (17, 65, 49, 1), (33, 100, 128, 0.05), (130, 257, 32, 0.1)],
)
def test_values_and_gradients(dtype, batch, count, channels, temperature):
    assert_agrees_with_plain(*random_input(batch, count, channels, dtype, DEVICE), temperature)


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


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 140), st.integers(1, 140), st.integers(1, 40))
def test_any_shape(batch, count, channels):
    assert_agrees_with_plain(*random_input(batch, count, channels, torch.float16, DEVICE), 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype):
    queries, keys, targets = random_input(8, 200, 16, dtype, DEVICE)
    assert_agrees_with_plain(queries * 100, keys * 100, targets, 0.1)


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


def test_no_queries():
    queries, keys, targets = random_input(0, 5, 4, device=DEVICE)
    queries.requires_grad_()
    keys.requires_grad_()
    with poisoned_memory():
        loss = kernels.info_nce(queries, keys, targets, 0.1)
        grads = torch.autograd.grad(loss, (queries, keys))
    assert loss == 0
    assert grads[0].shape == (0, 4)
    assert (grads[1] == 0).all()


def test_strides_do_not_matter():
    queries, keys, targets = random_input(12, 20, 8, device=DEVICE)
    results = []
    for pair, to in (
        ((queries, keys), targets),
        ([x.T.contiguous().T for x in (queries, keys)], targets.repeat_interleave(2)[::2]),
    ):
        leaves = [x.detach().requires_grad_() for x in pair]
        loss = kernels.info_nce(*leaves, to, 0.1)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain)


def test_same_bits_every_time():
    queries, keys, targets = random_input(40, 300, 16, torch.float16, DEVICE)
    queries.requires_grad_()
    keys.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.info_nce(queries, keys, targets, 0.1)
        runs.append((loss, *torch.autograd.grad(loss, (queries, keys))))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_opcheck():
    queries, keys, targets = random_input(5, 7, 4, device=DEVICE)
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    ops = torch.ops.tessera
    torch.library.opcheck(ops.info_nce_forward.default, (*leaves, targets, 0.1, "triton"))
    loss, lse = ops.info_nce_forward(queries, keys, targets, 0.1, "triton")
    torch.library.opcheck(ops.info_nce_backward.default, (loss, queries, keys, targets, lse, 0.1, "triton"))


def test_compiles_without_a_graph_break():
    def step(queries, keys, targets):
        return kernels.info_nce(F.normalize(queries, dim=1), keys * 2, targets, 0.1)

    queries, keys, targets = random_input(9, 11, 4, device=DEVICE)
    queries.requires_grad_()
    keys.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss = function(queries, keys, targets)
        results.append((loss, *torch.autograd.grad(loss, (queries, keys))))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_what_it_does_not_take_is_told_in_one_sentence():
    queries, keys, targets = random_input(2, 3, 4, torch.float64, DEVICE)
    with pytest.raises(ValueError, match="info_nce in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.info_nce(queries, keys, targets, 0.1)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs targets between 0 and 2, got 3 to 3"):
            kernels.info_nce(queries.float(), keys.float(), targets * 0 + 3, 0.1)
