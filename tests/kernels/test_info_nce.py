"""info_nce against cross-entropy over the full matrix of similarities."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.info_nce import cost, reference
from tests.kernels.agreement import DEVICES, HALF_AND_FULL, assert_agrees


def plain_info_nce(queries, keys, targets, temperature):
    wide = torch.promote_types(queries.dtype, torch.float32)
    return F.cross_entropy((queries.to(wide) @ keys.to(wide).T) / temperature, targets)


def random_input(batch, count, channels, dtype=torch.float32, device="cpu"):
    queries, keys = (F.normalize(torch.randn(n, channels, device=device), dim=1).to(dtype) for n in (batch, count))
    return queries, keys, torch.randint(0, count, (batch,), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize(("batch", "count", "channels"), [(1, 1, 1), (17, 65, 49), (64, 197, 256)])
@pytest.mark.parametrize("temperature", [0.05, 0.15, 1])
def test_values_and_gradients(device, dtype, batch, count, channels, temperature):
    queries, keys, targets = random_input(batch, count, channels, dtype, device)
    assert_agrees(
        lambda q, k: kernels.info_nce(q, k, targets, temperature),
        lambda q, k: plain_info_nce(q, k, targets, temperature),
        [queries, keys],
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 400))
def test_any_number_of_rows_at_a_time(batch, count, channels, elements):
    queries, keys, targets = random_input(batch, count, channels, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_ELEMENTS", elements)
        assert_agrees(
            lambda q, k: kernels.info_nce(q, k, targets, 0.1),
            lambda q, k: plain_info_nce(q, k, targets, 0.1),
            [queries, keys],
        )


def test_large_logits_do_not_overflow():
    queries, keys, targets = random_input(8, 30, 16)
    assert_agrees(
        lambda q, k: kernels.info_nce(q, k, targets, 0.1),
        lambda q, k: plain_info_nce(q, k, targets, 0.1),
        [queries * 100, keys * 100],
    )


def test_no_matrix_of_similarities_is_kept():
    """What backward holds on to is its inputs and one number per query."""
    kept = []
    queries, keys, targets = random_input(128, 512, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        kernels.info_nce(queries.requires_grad_(), keys.requires_grad_(), targets, 0.1)
    assert max(kept) == keys.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_no_queries(device):
    queries, keys, targets = random_input(0, 5, 4, device=device)
    queries.requires_grad_()
    keys.requires_grad_()
    loss = kernels.info_nce(queries, keys, targets, 0.1)
    grads = torch.autograd.grad(loss, (queries, keys))
    assert loss == 0
    assert grads[0].shape == (0, 4)
    assert (grads[1] == 0).all()


def test_gradient_in_keys_alone():
    queries, keys, targets = random_input(6, 9, 4, torch.float64)
    assert_agrees(
        lambda k: kernels.info_nce(queries.to(k.dtype), k, targets, 0.1),
        lambda k: plain_info_nce(queries.to(k.dtype), k, targets, 0.1),
        [keys],
    )


def test_strides_do_not_matter():
    queries, keys, targets = random_input(12, 20, 8)
    wanted = kernels.info_nce(queries, keys, targets, 0.1)
    strided = [x.T.contiguous().T for x in (queries, keys)]
    torch.testing.assert_close(kernels.info_nce(*strided, targets.repeat_interleave(2)[::2], 0.1), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device):
    queries, keys, targets = random_input(64, 300, 32, device=device)
    queries.requires_grad_()
    keys.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.info_nce(queries, keys, targets, 0.1)
        runs.append((loss, *torch.autograd.grad(loss, (queries, keys))))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    queries, keys, targets = random_input(5, 7, 4, torch.float64, device)
    torch.library.opcheck(
        torch.ops.tessera.info_nce_forward.default,
        (queries.requires_grad_(), keys.requires_grad_(), targets, 0.1, "reference"),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    def step(queries, keys, targets):
        return kernels.info_nce(F.normalize(queries, dim=1), keys * 2, targets, 0.1)

    queries, keys, targets = random_input(9, 11, 4, device=device)
    queries.requires_grad_()
    keys.requires_grad_()
    results = [
        (loss, *torch.autograd.grad(loss, (queries, keys)))
        for loss in (
            f(queries, keys, targets) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
        )
    ]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_cost_counts_no_matrix():
    forward, backward = cost(queries=4096, keys=4096, channels=256, element_size=2)
    assert forward.bytes == 8192 * 256 * 2 + 12 * 4096
    assert backward.bytes == 2 * 8192 * 256 * 2 + 12 * 4096
    assert backward.flops == 3 * forward.flops == 6 * 4096 * 4096 * 256


QUERIES, KEYS, TARGETS = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((QUERIES[0], KEYS, TARGETS, 0.1), r"needs queries \[B, C\] and keys \[M, C\], got \[4\] and \[3, 4\]"),
        ((QUERIES, KEYS[:, 1:], TARGETS, 0.1), r"got \[2, 4\] and \[3, 3\]"),
        ((QUERIES, KEYS.double(), TARGETS, 0.1), "one floating dtype, got torch.float32 and torch.float64"),
        ((QUERIES.int(), KEYS.int(), TARGETS, 0.1), "one floating dtype"),
        ((QUERIES, KEYS, TARGETS[:1], 0.1), r"needs targets as int64 \[2\], got torch.int64 \[1\]"),
        ((QUERIES, KEYS, TARGETS.int(), 0.1), r"needs targets as int64 \[2\], got torch.int32"),
        ((QUERIES, KEYS, TARGETS + 3, 0.1), "needs targets between 0 and 2, got 3 to 3"),
        ((QUERIES, KEYS, TARGETS, 0), "needs a positive temperature, got 0"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        kernels.info_nce(*arguments)
