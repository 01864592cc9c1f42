"""info_nce, in every implementation, against cross-entropy over the full matrix of similarities."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.info_nce import cost, reference
from tests.kernels import interpreted
from tests.kernels.agreement import HALF_AND_FULL, assert_agrees
from tests.kernels.interpreted import moved, place, poisoned_memory

PLAIN = [("plain", "cpu"), ("plain", "cuda")]
IMPLEMENTATION_AND_DEVICE = [*interpreted.IMPLEMENTATION_AND_DEVICE, *(place(*where) for where in PLAIN)]
IMPLEMENTATION_DEVICE_DTYPE = [
    *interpreted.IMPLEMENTATION_DEVICE_DTYPE,
    *(place(*where, dtype) for where in PLAIN for dtype in HALF_AND_FULL),
]


def plain_info_nce(queries, keys, targets, temperature):
    wide = torch.promote_types(queries.dtype, torch.float32)
    return F.cross_entropy((queries.to(wide) @ keys.to(wide).T) / temperature, targets)


def random_input(batch, count, channels, dtype=torch.float32, device="cpu"):
    queries, keys = (F.normalize(torch.randn(n, channels, device=device), dim=1).to(dtype) for n in (batch, count))
    return queries, keys, torch.randint(0, count, (batch,), device=device)


def assert_agrees_with_plain(queries, keys, targets, temperature, cancels=False):
    """`cancels`: one key may be nearly certain, as the only one is. Then the loss and (p - 1) key / (T B) are what rounding
    leaves of logits, at most 1 / T large."""
    logit = 1 / temperature if cancels else 0.0
    with poisoned_memory():
        assert_agrees(
            lambda q, k: kernels.info_nce(q, k, targets, temperature),
            lambda q, k: plain_info_nce(q, k, targets, temperature),
            [queries, keys],
            cancelled=(logit, logit / (temperature * len(queries))),
        )


@pytest.mark.parametrize(("implementation", "device", "dtype"), IMPLEMENTATION_DEVICE_DTYPE, ids=str)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "temperature"),
    [
        *((1, 1, 1, 0.1), (16, 15, 16, 0.05), (17, 65, 49, 1), (33, 100, 128, 0.05), (64, 197, 256, 0.15)),
        (130, 257, 32, 0.1),
    ],
)
def test_values_and_gradients(implementation, device, dtype, batch, count, channels, temperature):
    kernels.use(implementation, "info_nce")
    assert_agrees_with_plain(*random_input(batch, count, channels, dtype, device), temperature)


@settings(max_examples=25)
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


@pytest.mark.parametrize(("implementation", "device", "dtype"), IMPLEMENTATION_DEVICE_DTYPE, ids=str)
def test_large_logits_do_not_overflow(implementation, device, dtype):
    kernels.use(implementation, "info_nce")
    # whole numbers and a power of two: logits of up to 100,000 are exact, and only what comes after them rounds
    queries, keys = (torch.randint(-30, 31, (n, 16), device=device).to(dtype) for n in (8, 200))
    assert_agrees_with_plain(queries, keys, torch.randint(0, 200, (8,), device=device), 0.125)


def test_no_matrix_of_similarities_is_kept():
    """What backward holds on to is its inputs and one number per query."""
    kept = []
    queries, keys, targets = random_input(128, 512, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        kernels.info_nce(queries.requires_grad_(), keys.requires_grad_(), targets, 0.1)
    assert max(kept) == keys.numel()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("count", [0, 5])
def test_no_queries(implementation, device, count):
    kernels.use(implementation, "info_nce")
    queries, keys = (torch.zeros(n, 4, device=device, requires_grad=True) for n in (0, count))
    with poisoned_memory():
        loss = kernels.info_nce(queries, keys, torch.zeros(0, dtype=torch.int64, device=device), 0.1)
        grads = torch.autograd.grad(loss, (queries, keys))
    assert loss == 0
    assert grads[0].shape == (0, 4)
    assert torch.equal(grads[1], torch.zeros_like(keys))


def test_gradient_in_keys_alone():
    queries, keys, targets = random_input(6, 9, 4, torch.float64)
    assert_agrees(
        lambda k: kernels.info_nce(queries.to(k.dtype), k, targets, 0.1),
        lambda k: plain_info_nce(queries.to(k.dtype), k, targets, 0.1),
        [keys],
    )


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_strides_do_not_matter(implementation, device):
    kernels.use(implementation, "info_nce")
    queries, keys, targets = random_input(12, 20, 8, device=device)
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


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_same_bits_every_time(implementation, device):
    kernels.use(implementation, "info_nce")
    queries, keys, targets = random_input(40, 300, 16, torch.float16, device)
    queries.requires_grad_()
    keys.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.info_nce(queries, keys, targets, 0.1)
        runs.append((loss, *torch.autograd.grad(loss, (queries, keys))))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize(("implementation", "device"), interpreted.IMPLEMENTATION_AND_DEVICE)
def test_opcheck(implementation, device):
    kernels.use(implementation, "info_nce")
    queries, keys, targets = random_input(5, 7, 4, device=device)
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    ops = torch.ops.tessera
    torch.library.opcheck(ops.info_nce_forward.default, (*leaves, targets, 0.1, implementation))
    loss, lse = ops.info_nce_forward(queries, keys, targets, 0.1, implementation)
    torch.library.opcheck(ops.info_nce_backward.default, (loss, queries, keys, targets, lse, 0.1, implementation))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_compiles_without_a_graph_break(implementation, device):
    kernels.use(implementation, "info_nce")

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
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((QUERIES[0], KEYS, TARGETS, 0.1), r"needs queries \[B, C\] and keys \[M, C\], got \[4\] and \[3, 4\]"),
        ((QUERIES, KEYS[:, 1:], TARGETS, 0.1), r"got \[2, 4\] and \[3, 3\]"),
        ((QUERIES, KEYS.half(), TARGETS, 0.1), "one of float16, .* float64, got torch.float32 and torch.float16"),
        ((QUERIES.int(), KEYS.int(), TARGETS, 0.1), "one of float16, .* float64, got torch.int32 and torch.int32"),
        ((QUERIES.to(FP8), KEYS.to(FP8), TARGETS, 0.1), "one of float16, .* float64, got torch.float8_e4m3fn"),
        ((QUERIES, KEYS[:0], TARGETS, 0.1), "needs keys that targets can name, got none for 2 queries"),
        ((QUERIES, KEYS, TARGETS[:1], 0.1), r"needs targets as int64 \[2\], got torch.int64 \[1\]"),
        ((QUERIES, KEYS, TARGETS.int(), 0.1), r"needs targets as int64 \[2\], got torch.int32"),
        ((QUERIES.to("meta"), KEYS, TARGETS, 0.1), "one device for all inputs, got meta, .* and "),
        ((QUERIES, KEYS.to("meta"), TARGETS, 0.1), "one device for all inputs, got .*, meta and "),
        ((QUERIES, KEYS, TARGETS.to("meta"), 0.1), "one device for all inputs, got .* and meta"),
        ((QUERIES, KEYS, TARGETS + 3, 0.1), "needs targets between 0 and 2, got 3"),
        ((QUERIES, KEYS, TARGETS - 1, 0.1), "needs targets between 0 and 2, got -1"),
        ((QUERIES, KEYS, TARGETS, 0), "needs a positive temperature, got 0"),
        ((QUERIES, KEYS, TARGETS, float("nan")), "needs a positive temperature, got nan"),
    ],
)
def test_bad_input_is_told_in_one_sentence(implementation, device, arguments, sentence):
    kernels.use(implementation, "info_nce")
    kernels.info_nce(*moved((QUERIES, KEYS, TARGETS, 0.1), device))
    with pytest.raises(ValueError, match=f"^info_nce .*{sentence}"):
        kernels.info_nce(*moved(arguments, device))
