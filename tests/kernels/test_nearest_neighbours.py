"""nearest_neighbours, in every implementation, against a sorted matrix of all similarities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.nearest_neighbours import cost, reference
from tests.kernels.agreement import assert_close_as_plain
from tests.kernels.interpreted import (
    IMPLEMENTATION_AND_DEVICE,
    IMPLEMENTATION_DEVICE_DTYPE,
    moved,
    poisoned_memory,
)


def plain_neighbours(queries, keys, k, query_ids=None, key_ids=None):
    wide = torch.promote_types(queries.dtype, torch.float32)
    similarity = queries.to(wide) @ keys.to(wide).T
    if query_ids is not None:
        similarity[query_ids[:, None] == key_ids] = -torch.inf
    value, index = similarity.sort(dim=1, descending=True, stable=True)
    value, index = value[:, :k], index[:, :k].clone()
    index[value == -torch.inf] = -1
    return value, index


@pytest.mark.parametrize(("implementation", "device", "dtype"), IMPLEMENTATION_DEVICE_DTYPE, ids=str)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "k"),
    [(65, 1437, 49, 1), (17, 300, 256, 1), (130, 100, 257, 1), (3, 600, 320, 1), (33, 515, 48, 20), (2, 300, 33, 5)],
)
def test_values(implementation, device, dtype, batch, count, channels, k):
    kernels.use(implementation, "nearest_neighbours")
    queries, keys = (torch.randn(n, channels, device=device).to(dtype) for n in (batch, count))
    with poisoned_memory():
        value, index = kernels.nearest_neighbours(queries, keys, k)
    truth, true_index = plain_neighbours(queries.double(), keys.double(), k)
    plain, _ = plain_neighbours(queries, keys, k)
    assert_close_as_plain(value, plain, truth)
    # where two keys are closer to each other than rounding, either may come first
    assert (index == true_index).double().mean() > 0.99
    assert index.dtype == torch.int64


@settings(max_examples=40)
@given(
    batch=st.integers(0, 9),
    count=st.integers(0, 40),
    k=st.integers(1, 12),
    step=st.integers(1, 40),
    ids=st.none() | st.integers(1, 6),
)
def test_any_number_of_keys_at_a_time(batch, count, k, step, ids):
    queries, keys = (torch.randn(n, 5, dtype=torch.float64) for n in (batch, count))
    id_pair = (None, None) if ids is None else tuple(torch.randint(0, ids, (n,)) for n in (batch, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_step", lambda batch, k: step)
        value, index = kernels.nearest_neighbours(queries, keys, k, *id_pair)
    wanted, wanted_index = plain_neighbours(queries, keys, k, *id_pair)
    filled = min(k, count)
    torch.testing.assert_close(value[:, :filled], wanted)
    assert torch.equal(index[:, :filled], wanted_index)
    assert (value[:, filled:] == -torch.inf).all()
    assert (index[:, filled:] == -1).all()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_keys_of_the_same_id_are_skipped(implementation, device):
    kernels.use(implementation, "nearest_neighbours")
    keys = torch.eye(4, device=device)
    ids = torch.arange(4, device=device)
    _, itself = kernels.nearest_neighbours(keys, keys)
    _, other = kernels.nearest_neighbours(keys, keys, 1, ids, ids)
    assert torch.equal(itself.squeeze(1), ids)
    assert (other.squeeze(1) != ids).all()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("k", [1, 3])
def test_places_that_no_key_fills(implementation, device, k):
    kernels.use(implementation, "nearest_neighbours")
    queries, keys = torch.randn(2, 4, device=device), torch.randn(3, 4, device=device)
    ids = torch.tensor([7, 7, 8], device=device)
    value, index = kernels.nearest_neighbours(queries, keys, k, torch.tensor([7, 9], device=device), ids)
    assert index[0].tolist() == [2, -1, -1][:k]
    assert value[0, 1:].tolist() == [-torch.inf] * (k - 1)
    assert sorted(index[1].tolist()) == [0, 1, 2] if k == 3 else index[1, 0] >= 0
    all_skipped = kernels.nearest_neighbours(queries, keys, k, torch.tensor([7, 7], device=device), ids * 0 + 7)
    for value, index in (all_skipped, kernels.nearest_neighbours(queries, keys[:0], k)):
        assert (index == -1).all()
        assert (value == -torch.inf).all()
    assert kernels.nearest_neighbours(queries[:0], keys, k)[1].shape == (0, k)


def test_lowest_index_wins_a_tie():
    keys = torch.ones(1000, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_step", lambda batch, k: 64)
        _, index = kernels.nearest_neighbours(torch.ones(5, 3), keys)
    assert (index == 0).all()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("k", [1, 3])
def test_strides_do_not_matter_and_no_gradient_flows(implementation, device, k):
    kernels.use(implementation, "nearest_neighbours")
    queries, keys = torch.randn(5, 16, device=device), torch.randn(200, 16, device=device)
    ids = torch.arange(5, device=device), torch.arange(200, device=device)
    wanted = kernels.nearest_neighbours(queries, keys, k, *ids)
    strided = [x.T.contiguous().T.requires_grad_() for x in (queries, keys)]
    ids_apart = (x.repeat_interleave(2)[::2] for x in ids)
    value, index = kernels.nearest_neighbours(*strided, k, *ids_apart)
    torch.testing.assert_close(value, wanted[0])
    assert torch.equal(index, wanted[1])
    assert not value.requires_grad
    assert not index.requires_grad


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("k", [1, 10])
def test_same_bits_every_time(implementation, device, k):
    kernels.use(implementation, "nearest_neighbours")
    queries, keys = torch.randn(32, 16, device=device), torch.randn(300, 16, device=device)
    runs = [kernels.nearest_neighbours(queries, keys, k) for _ in range(3)]
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_opcheck(implementation, device, k, with_ids):
    kernels.use(implementation, "nearest_neighbours")
    queries, keys = torch.randn(4, 5, device=device), torch.randn(9, 5, device=device)
    ids = (torch.arange(4, device=device), torch.arange(9, device=device)) if with_ids else (None, None)
    torch.library.opcheck(torch.ops.tessera.nearest_neighbours.default, (queries, keys, k, *ids, implementation))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_compiles_without_a_graph_break(implementation, device):
    kernels.use(implementation, "nearest_neighbours")

    def look_up(queries, keys):
        value, index = kernels.nearest_neighbours(queries * 2, keys, 3)
        return value + 1, keys[index]

    queries, keys = torch.randn(4, 5, device=device), torch.randn(9, 5, device=device)
    compiled = torch.compile(look_up, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries, keys), look_up(queries, keys))


def test_cost_counts_no_matrix():
    assert cost(4096, 65536, 256, 2) == ((4096 + 65536) * 512 + 12 * 4096, 2 * 4096 * 65536 * 256)


QUERIES, KEYS, IDS = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
KEY_IDS, FP8 = torch.zeros(3, dtype=torch.int64), torch.float8_e4m3fn


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((QUERIES[0], KEYS), r"needs queries \[B, C\] and keys \[M, C\], got \[4\] and \[3, 4\]"),
        ((QUERIES, KEYS[:, 1:]), r"got \[2, 4\] and \[3, 3\]"),
        ((QUERIES, KEYS.half()), r"float64 on one device, got torch.float32 on [^ ]+ and torch.float16 on"),
        ((QUERIES.int(), KEYS.int()), "one of float16, .* float64 on one device, got torch.int32 on"),
        ((QUERIES.to(FP8), KEYS.to(FP8)), "one of float16, .* float64 on one device, got torch.float8_e4m3fn on"),
        ((QUERIES.to("meta"), KEYS), "on one device, got torch.float32 on meta and"),
        ((QUERIES, KEYS.to("meta")), "on one device, got .* and torch.float32 on meta"),
        ((QUERIES, KEYS, 0), "needs k of at least 1, got 0"),
        ((QUERIES, KEYS, 1, IDS), "needs query_ids and key_ids together"),
        ((QUERIES, KEYS, 1, None, KEY_IDS), "needs query_ids and key_ids together"),
        ((QUERIES, KEYS, 1, IDS, IDS), r"needs key_ids as int64 \[3\] on .*, got torch.int64 \[2\] on"),
        ((QUERIES, KEYS, 1, IDS.int(), KEY_IDS), r"needs query_ids as int64 \[2\] on .*, got torch.int32 \[2\] on"),
        ((QUERIES, KEYS, 1, IDS.to("meta"), KEY_IDS), r"needs query_ids as .*, got torch.int64 \[2\] on meta"),
        ((QUERIES, KEYS, 1, IDS, KEY_IDS.to("meta")), r"needs key_ids as .*, got torch.int64 \[3\] on meta"),
    ],
)
def test_bad_input_is_told_in_one_sentence(implementation, device, arguments, sentence):
    kernels.use(implementation, "nearest_neighbours")
    kernels.nearest_neighbours(*moved((QUERIES, KEYS, 1, IDS, KEY_IDS), device))
    with pytest.raises(ValueError, match=f"^nearest_neighbours .*{sentence}"):
        kernels.nearest_neighbours(*moved(arguments, device))
