"""nearest_neighbours in Triton against a sorted matrix of all similarities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.agreement import assert_close_as_plain
from tests.kernels.interpreted import DEVICE, DTYPES, MARKS, poisoned_memory
from tests.kernels.test_nearest_neighbours import plain_neighbours

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "nearest_neighbours")


def small_integers(*shape):
    """Their products are exact in every dtype and order, and many are equal."""
    return torch.randint(-2, 3, shape, device=DEVICE).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "k"),
    [(65, 1437, 49, 1), (17, 300, 256, 1), (130, 100, 257, 1), (3, 600, 320, 1), (33, 515, 48, 20), (2, 300, 33, 5)],
)
def test_values(dtype, batch, count, channels, k):
    queries, keys = (torch.randn(n, channels, device=DEVICE).to(dtype) for n in (batch, count))
    with poisoned_memory():
        value, index = kernels.nearest_neighbours(queries, keys, k)
    truth, true_index = plain_neighbours(queries.double(), keys.double(), k)
    plain, _ = plain_neighbours(queries, keys, k)
    assert_close_as_plain(value, plain, truth)
    # where two keys are closer to each other than rounding, either may come first
    assert (index == true_index).double().mean() > 0.99
    assert index.dtype == torch.int64


@settings(max_examples=15, deadline=None)
@given(
    batch=st.sampled_from([0, 1, 15, 33, 100]),
    count=st.integers(0, 400),
    channels=st.sampled_from([1, 16, 17]),
    k=st.sampled_from([1, 2, 7]),
    ids=st.none() | st.integers(1, 6),
)
def test_any_shape_with_lower_indices_first_among_equals(batch, count, channels, k, ids):
    queries, keys = small_integers(batch, channels), small_integers(count, channels)
    # beyond 32 bits, and equal within them
    id_pair = (
        (None, None) if ids is None else (torch.randint(0, ids, (n,), device=DEVICE) << 32 for n in (batch, count))
    )
    id_pair = tuple(id_pair)
    with poisoned_memory():
        value, index = kernels.nearest_neighbours(queries.half(), keys.half(), k, *id_pair)
    wanted, wanted_index = plain_neighbours(queries, keys, k, *id_pair)
    filled = min(k, count)
    assert torch.equal(value[:, :filled], wanted)
    assert torch.equal(index[:, :filled], wanted_index)
    assert (value[:, filled:] == -torch.inf).all()
    assert (index[:, filled:] == -1).all()


@pytest.mark.parametrize("k", [32, 33, 257])
def test_long_lists(k):
    queries, keys = small_integers(2, 16), small_integers(300, 16)
    value, index = kernels.nearest_neighbours(queries, keys, k)
    wanted, wanted_index = plain_neighbours(queries, keys, k)
    assert torch.equal(value, wanted)
    assert torch.equal(index, wanted_index)


@pytest.mark.parametrize("k", [1, 3])
def test_places_that_no_key_fills(k):
    queries, keys = torch.randn(2, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    ids = torch.tensor([7, 7, 8], device=DEVICE)
    value, index = kernels.nearest_neighbours(queries, keys, k, torch.tensor([7, 9], device=DEVICE), ids)
    assert index[0].tolist() == [2, -1, -1][:k]
    assert value[0, 1:].tolist() == [-torch.inf] * (k - 1)
    value, index = kernels.nearest_neighbours(queries, keys[:0], k)
    assert (index == -1).all()
    assert (value == -torch.inf).all()


@pytest.mark.parametrize("k", [1, 4])
def test_similarities_of_one_sign(k):
    """Negative floats order the other way round as integers, and 0 lies between."""
    keys = torch.tensor([-3.0, -1.5, -2.0, -1e-30, -1e30, 0.0], device=DEVICE)[:, None]
    value, index = kernels.nearest_neighbours(torch.ones(1, 1, device=DEVICE), keys, k)
    assert index[0].tolist() == [5, 3, 1, 2][:k]
    assert torch.equal(value[0], keys[index[0], 0])


@pytest.mark.parametrize("k", [1, 3])
def test_lowest_index_wins_a_tie_over_tiles_and_splits(k):
    _, index = kernels.nearest_neighbours(torch.ones(3, 3, device=DEVICE), torch.ones(1000, 3, device=DEVICE), k)
    assert index.tolist() == [list(range(k))] * 3


@pytest.mark.parametrize("k", [1, 3])
def test_no_matrix_is_stored(k):
    queries, keys = torch.randn(64, 16, device=DEVICE), torch.randn(2000, 16, device=DEVICE)
    with poisoned_memory() as sizes:
        kernels.nearest_neighbours(queries, keys, k)
    assert 0 < sum(sizes) < 64 * 2000 * 4 / 10


@pytest.mark.parametrize("k", [1, 3])
def test_strides_do_not_matter_and_no_gradient_flows(k):
    queries, keys = torch.randn(5, 16, device=DEVICE), torch.randn(200, 16, device=DEVICE)
    ids = torch.arange(5, device=DEVICE), torch.arange(200, device=DEVICE)
    wanted = kernels.nearest_neighbours(queries, keys, k, *ids)
    strided = [x.T.contiguous().T.requires_grad_() for x in (queries, keys)]
    ids_apart = (x.repeat_interleave(2)[::2] for x in ids)
    value, index = kernels.nearest_neighbours(*strided, k, *ids_apart)
    torch.testing.assert_close(value, wanted[0])
    assert torch.equal(index, wanted[1])
    assert not value.requires_grad


@pytest.mark.parametrize("k", [1, 10])
def test_same_bits_every_time(k):
    queries, keys = torch.randn(32, 16, device=DEVICE), torch.randn(300, 16, device=DEVICE)
    runs = [kernels.nearest_neighbours(queries, keys, k) for _ in range(3)]
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(k, with_ids):
    queries, keys = torch.randn(4, 5, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    ids = (torch.arange(4, device=DEVICE), torch.arange(9, device=DEVICE)) if with_ids else (None, None)
    torch.library.opcheck(torch.ops.tessera.nearest_neighbours.default, (queries, keys, k, *ids, "triton"))


def test_compiles_without_a_graph_break():
    def look_up(queries, keys):
        value, index = kernels.nearest_neighbours(queries * 2, keys, 3)
        return value + 1, keys[index]

    queries, keys = torch.randn(4, 5, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    compiled = torch.compile(look_up, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(queries, keys), look_up(queries, keys)))


def test_what_it_does_not_take_is_told_in_one_sentence():
    queries, keys = torch.zeros(2, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="nearest_neighbours in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.nearest_neighbours(queries.double(), keys.double())
    with pytest.raises(ValueError, match="nearest_neighbours in Triton takes k up to 1024, got 1025"):
        kernels.nearest_neighbours(queries, keys, 1025)
