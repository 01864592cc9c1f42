"""relation_loss, in every implementation, against cross-entropy over the stored map of logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.relation import cost, reference
from tests.kernels.agreement import assert_agrees
from tests.kernels.interpreted import (
    IMPLEMENTATION_AND_DEVICE,
    IMPLEMENTATION_DEVICE_DTYPE,
    moved,
    poisoned_memory,
)

SEEN = ("up left", "up", "up right", "left", "here", "right", "down left", "down", "down right")


def where(place, seen_from, columns):
    """Word for word, from two cells of the grid."""
    (row, column), (own_row, own_column) = divmod(place, columns), divmod(seen_from, columns)
    vertical = "up" if row < own_row else "down" if row > own_row else ""
    horizontal = "left" if column < own_column else "right" if column > own_column else ""
    return f"{vertical} {horizontal}".strip() or "here"


def targets_of(places, columns):
    """[B, N, N], pair by pair."""
    rows = [[[SEEN.index(where(a, b, columns)) for b in image] for a in image] for image in places.tolist()]
    return torch.tensor(rows, dtype=torch.int64, device=places.device).view(*places.shape, places.shape[1])


def plain_relation_loss(queries, keys, places, columns, scale=None):
    wide = torch.promote_types(queries.dtype, torch.float32)
    scale = queries.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bird,bjrd->brij", queries.to(wide), keys.to(wide)) * scale
    return F.cross_entropy(logits, targets_of(places, columns))


def random_input(images, tokens, channels, dtype=torch.float32, device="cpu"):
    """Queries, keys and the places of shuffled tokens, some of which were dropped."""
    queries, keys = (torch.randn(images, tokens, 9, channels, device=device).to(dtype) for _ in range(2))
    places = torch.rand(images, 2 * tokens).argsort(1)[:, :tokens]
    return queries, keys, places.to(device)


def assert_agrees_with_plain(queries, keys, places, columns, scale=None):
    with poisoned_memory():
        assert_agrees(
            lambda q, k: kernels.relation_loss(q, k, places, columns, scale),
            lambda q, k: plain_relation_loss(q, k, places, columns, scale),
            [queries, keys],
        )


@pytest.mark.parametrize(("implementation", "device", "dtype"), IMPLEMENTATION_DEVICE_DTYPE, ids=str)
@pytest.mark.parametrize(
    ("images", "tokens", "channels", "columns"),
    [(1, 1, 1, 1), (3, 9, 5, 3), (2, 16, 21, 4), (2, 25, 42, 6), (1, 49, 42, 7), (1, 64, 85, 8)],
)
def test_values_and_gradients(implementation, device, dtype, images, tokens, channels, columns):
    kernels.use(implementation, "relation")
    assert_agrees_with_plain(*random_input(images, tokens, channels, dtype, device), columns)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 8), st.integers(1, 30), st.integers(1, 9))
def test_any_number_of_images_at_a_time(images, tokens, channels, columns, step):
    inputs = random_input(images, tokens, channels, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_images_at_once", lambda queries: step)
        assert_agrees_with_plain(*inputs, columns)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("columns", [1, 3, 4, 100])
def test_targets_are_where_one_token_lies_seen_from_another(implementation, device, columns):
    """With logits of zero and queries that are unit vectors, the gradient of keys spells out the targets."""
    kernels.use(implementation, "relation")
    places = torch.rand(2, 12).argsort(1)
    places[1, :3] = places[1, 0]  # a cell may be met more than once
    places = places.to(device)
    queries = torch.eye(12, device=device)[None, :, None].repeat(2, 1, 9, 1)
    keys = torch.zeros_like(queries, requires_grad=True)
    (grad,) = torch.autograd.grad(kernels.relation_loss(queries, keys, places, columns, 1.0), keys)
    share = torch.einsum("bjra->braj", grad * 2 * 12**2)
    wanted = 1 / 9 - F.one_hot(targets_of(places, columns), 9).movedim(3, 1)
    torch.testing.assert_close(share, wanted.to(share))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_the_nine_cells_around_a_token_are_the_nine_classes_in_order(implementation, device):
    kernels.use(implementation, "relation")
    queries, keys = (torch.zeros(1, 9, 9, 1, device=device) for _ in range(2))
    # token a of nine votes for class a when it is seen from the cell in the middle, and no one else votes
    queries[0, range(9), range(9)] = 1
    keys[0, 4] = 60
    loss = kernels.relation_loss(queries, keys, torch.arange(9, device=device)[None], 3)
    assert loss.item() == pytest.approx(math.log(9) * 72 / 81)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_the_order_of_tokens_does_not_matter_when_their_places_move_along(implementation, device):
    kernels.use(implementation, "relation")
    queries, keys, places = random_input(2, 20, 6, device=device)
    order = torch.randperm(20, device=device)
    results = []
    for inputs in ((queries, keys, places), [x[:, order].contiguous() for x in (queries, keys, places)]):
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]
        loss = kernels.relation_loss(*leaves, inputs[2], 5)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    (loss, *grads), (permuted_loss, *permuted_grads) = results
    torch.testing.assert_close(permuted_loss, loss)
    torch.testing.assert_close(permuted_grads, [x[:, order] for x in grads])
    assert (kernels.relation_loss(queries, keys, places[:, order], 5) - loss).abs() > 1e-3


@pytest.mark.parametrize(("implementation", "device", "dtype"), IMPLEMENTATION_DEVICE_DTYPE, ids=str)
def test_large_logits_do_not_overflow(implementation, device, dtype):
    kernels.use(implementation, "relation")
    # whole numbers and a power of two: logits of up to 100,000 are exact, and only what comes after them rounds
    queries, keys = (torch.randint(-30, 31, (2, 10, 9, 16), device=device).to(dtype) for _ in range(2))
    assert_agrees_with_plain(queries, keys, random_input(2, 10, 1, device=device)[2], 4, 8.0)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_scale(implementation, device):
    kernels.use(implementation, "relation")
    inputs = random_input(2, 10, 7, device=device)
    for scale in (0.8, -0.5, 0.0, None):
        assert_agrees_with_plain(*inputs, 4, scale)
    assert kernels.relation_loss(*inputs, 4, 0.0).item() == pytest.approx(math.log(9))


def test_gradients_in_float64_are_those_of_finite_differences():
    queries, keys, places = random_input(2, 4, 2, torch.float64)
    leaves = queries.requires_grad_(), keys.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: kernels.relation_loss(q, k, places, 3), leaves)


def test_no_map_of_logits_is_kept():
    """What backward holds on to is its inputs and one number per pair."""
    kept = []
    queries, keys, places = random_input(3, 16, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        kernels.relation_loss(queries.requires_grad_(), keys.requires_grad_(), places, 4)
    assert sorted(kept) == [places.numel(), 3 * 16**2, queries.numel(), keys.numel()]


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_no_pairs(implementation, device, shape):
    kernels.use(implementation, "relation")
    queries, keys = (torch.zeros(*shape, 9, 4, device=device, requires_grad=True) for _ in range(2))
    with poisoned_memory():
        loss = kernels.relation_loss(queries, keys, torch.zeros(*shape, dtype=torch.int64, device=device), 3)
        grads = torch.autograd.grad(loss, (queries, keys))
    assert loss == 0
    assert all(grad.shape == (*shape, 9, 4) for grad in grads)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_gradient_in_keys_alone(implementation, device):
    kernels.use(implementation, "relation")
    queries, keys, places = random_input(2, 6, 4, device=device)
    assert_agrees(
        lambda k: kernels.relation_loss(queries.to(k.dtype), k, places, 3),
        lambda k: plain_relation_loss(queries.to(k.dtype), k, places, 3),
        [keys],
    )


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_not_finite_shows(implementation, device, bad):
    kernels.use(implementation, "relation")
    for side in (0, 1):
        inputs = random_input(2, 6, 4, device=device)
        inputs[side][1, 3, 8, 2] = bad
        assert not kernels.relation_loss(*inputs, 3).isfinite()


def strided(queries, keys, places):
    """The halves of one projection, tokens before images, channels before classes, every other place."""
    both = torch.cat((queries, keys), -1)
    yield *both.chunk(2, -1), places.repeat_interleave(2, 1)[:, ::2]
    yield (*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (queries, keys, places)),)
    yield queries.mT.contiguous().mT, keys, places


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_strides_do_not_matter(implementation, device):
    kernels.use(implementation, "relation")
    inputs = random_input(2, 12, 8, torch.float16, device)
    results = []
    for queries, keys, places in (inputs, *strided(*inputs)):
        leaves = queries.detach().requires_grad_(), keys.detach().requires_grad_()
        loss = kernels.relation_loss(*leaves, places, 5)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_same_bits_every_time(implementation, device):
    kernels.use(implementation, "relation")
    queries, keys, places = random_input(3, 30, 12, torch.float16, device)
    queries.requires_grad_()
    keys.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.relation_loss(queries, keys, places, 6)
        runs.append((loss, *torch.autograd.grad(loss, (queries, keys))))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_opcheck(implementation, device):
    kernels.use(implementation, "relation")
    queries, keys, places = random_input(2, 5, 4, device=device)
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    ops = torch.ops.tessera
    torch.library.opcheck(ops.relation_forward.default, (*leaves, places, 3, 0.5, implementation))
    loss, lse = ops.relation_forward(queries, keys, places, 3, 0.5, implementation)
    torch.library.opcheck(ops.relation_backward.default, (loss, queries, keys, places, lse, 3, 0.5, implementation))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(implementation, device, dynamic):
    kernels.use(implementation, "relation")
    torch.compiler.reset()

    def step(queries, keys, places):
        return kernels.relation_loss(queries * 3, keys + 1, places, 3)

    queries, keys, places = random_input(2, 9, 4, device=device)
    queries.requires_grad_()
    keys.requires_grad_()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        loss = function(queries, keys, places)
        results.append((loss, *torch.autograd.grad(loss, (queries, keys))))
    torch.testing.assert_close(*results)


def test_cost_reads_queries_and_keys_once_and_one_number_per_pair():
    forward, backward = cost(256, 64, 42, element_size=2)
    one = 256 * 64 * 9 * 42 * 2
    numbers = 256 * 64**2 * 4 + 256 * 64 * 8
    assert forward == (2 * one + numbers, 2 * 9 * 256 * 64**2 * 42)
    assert backward == (4 * one + numbers, 3 * forward.flops)


QUERIES, KEYS, PLACES = torch.ones(2, 3, 9, 4), torch.ones(2, 3, 9, 4), torch.zeros(2, 3, dtype=torch.int64)
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((QUERIES[0], KEYS[0], PLACES, 2), r"\[B, N, 9, D\] of one shape, got \[3, 9, 4\] and \[3, 9, 4\]"),
        ((QUERIES[:, :, :8], KEYS[:, :, :8], PLACES, 2), r"of one shape, got \[2, 3, 8, 4\] and \[2, 3, 8, 4\]"),
        ((QUERIES, KEYS[:, 1:], PLACES, 2), r"of one shape, got \[2, 3, 9, 4\] and \[2, 2, 9, 4\]"),
        ((QUERIES[..., :0], KEYS[..., :0], PLACES, 2), r"of one shape, got \[2, 3, 9, 0\] and"),
        ((QUERIES, KEYS.half(), PLACES, 2), "one of float16, .* float64, got torch.float32 and torch.float16"),
        ((QUERIES.int(), KEYS.int(), PLACES, 2), "one of float16, .* float64, got torch.int32 and torch.int32"),
        ((QUERIES.to(FP8), KEYS.to(FP8), PLACES, 2), "one of float16, .* float64, got torch.float8_e4m3fn"),
        ((QUERIES, KEYS, PLACES[:1], 2), r"needs places as int64 \[2, 3\], got torch.int64 \[1, 3\]"),
        ((QUERIES, KEYS, PLACES.int(), 2), r"needs places as int64 \[2, 3\], got torch.int32"),
        ((QUERIES.to("meta"), KEYS, PLACES, 2), "one device for all inputs, got meta, .* and "),
        ((QUERIES, KEYS.to("meta"), PLACES, 2), "one device for all inputs, got .*, meta and "),
        ((QUERIES, KEYS, PLACES.to("meta"), 2), "one device for all inputs, got .* and meta"),
        ((QUERIES, KEYS, PLACES - 1, 2), "needs places between 0 and 2147483647, got -1"),
        ((QUERIES, KEYS, PLACES + 2**31, 2), "needs places between 0 and 2147483647, got 2147483648"),
        ((QUERIES, KEYS, PLACES, 0), "needs at least one column, got 0"),
        ((QUERIES, KEYS, PLACES, 2, math.nan), "needs a finite scale, got nan"),
    ],
)
def test_bad_input_is_told_in_one_sentence(implementation, device, arguments, sentence):
    kernels.use(implementation, "relation")
    kernels.relation_loss(*moved((QUERIES, KEYS, PLACES, 2), device))
    with pytest.raises(ValueError, match=f"^relation_loss .*{sentence}"):
        kernels.relation_loss(*moved(arguments, device))
