"""What only nearest_neighbours in Triton has to show; the rest is in test_nearest_neighbours.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.interpreted import DEVICE, MARKS, poisoned_memory
from tests.kernels.test_nearest_neighbours import plain_neighbours

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "nearest_neighbours")


def small_integers(*shape):
    """Their products are exact in every dtype and order, and many are equal."""
    return torch.randint(-2, 3, shape, device=DEVICE).float()


@settings(max_examples=15)
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


def test_what_it_does_not_take_is_told_in_one_sentence():
    queries, keys = torch.zeros(2, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="nearest_neighbours in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.nearest_neighbours(queries.double(), keys.double())
    with pytest.raises(ValueError, match="nearest_neighbours in Triton takes k up to 1024, got 1025"):
        kernels.nearest_neighbours(queries, keys, 1025)
