"""packed_attention in Triton against plain torch: in the interpreter where no GPU is, compiled where one is."""

import importlib
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.packed_attention import HEAD_DIMS
from kernels.packed_attention.tiles import key_pieces, ladder
from tests.kernels.agreement import assert_agrees
from tests.kernels.test_packed_attention import layout, mixed_keys, packed, plain_attention, random_qkv

triton_attention = importlib.import_module("kernels.packed_attention.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32]
LENGTHS = (1, 15, 16, 17, 37, 49, 50, 64, 65, 196, 197, 208, 256, 257, 273)


@pytest.fixture(autouse=True)
def _triton_chosen(_choice_restored):
    kernels.use("triton", "packed_attention")


def attention_with_keyless(qkv, lengths, keys):
    """`plain_attention`, with zeros for the sequences that have no key."""
    parts = []
    for sequence, length, kept in zip(qkv.split(list(lengths)), lengths, keys, strict=True):
        parts.append(plain_attention(sequence, (length,), (kept,)) if kept else sequence[:, 0] * 0)
    return torch.cat(parts)


def check(lengths, dim, dtype, keys=None, heads=1, device=DEVICE):
    assert_agrees(
        packed(lengths, device, keys),
        lambda qkv: attention_with_keyless(qkv, lengths, keys or lengths),
        [random_qkv(lengths, dim, dtype, device, heads)],
    )


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter takes as long for a large tile as for a small one, and fp32 has small ones."""
    choose = triton_attention.config

    def config(direction, form, dim, dtype, capability):
        chosen = choose(direction, form, dim, dtype, capability)
        return chosen if dtype != torch.float32 else chosen._replace(rows=128, step=64)

    monkeypatch.setattr(triton_attention, "config", config)
    triton_attention._plan.cache_clear()
    yield
    triton_attention._plan.cache_clear()


def grad_of(out, qkv):
    return torch.autograd.grad(out, qkv, torch.ones_like(out).cumsum(0) / len(out))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [length for length in LENGTHS if length < 100])
def test_equal_lengths(length, dtype):
    check((length,) * 2, 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [length for length in LENGTHS if length > 100])
def test_longer_sequences(length, dtype, large_tiles):
    check((length,), 64, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [577, 1025])
def test_long_sequences(length, dtype, large_tiles):
    check((length,), 32, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("keys", ["one", "all", "mixed", "none"])
def test_head_dims_and_keys(dim, dtype, keys):
    lengths = (16, 65, 30)
    kept = {"one": (1, 1, 1), "all": lengths, "mixed": mixed_keys(lengths), "none": (0, 7, 0)}[keys]
    check(lengths, dim, dtype, kept)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES], ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_length_class_at_once_on_a_gpu(dim, dtype):
    lengths = (*LENGTHS, 577, 1025, 4096)
    check(lengths, dim, dtype, mixed_keys(lengths), heads=3)
    for length in LENGTHS:
        check((length,) * 5, dim, dtype, heads=3)


@pytest.mark.parametrize("keys", [None, (17, 1, 100, 50, 3, 270)], ids=["all-keys", "some-keys"])
def test_every_length_class_at_once(keys):
    check((197, 16, 256, 50, 65, 300), 32, torch.float16, keys)


@settings(max_examples=12)
@given(st.data())
def test_any_layout(data):
    """Short sequences: several in a program; with one longer one: two launches."""
    longest = data.draw(st.sampled_from((8, 32, 90)))
    lengths = data.draw(st.lists(st.integers(0, longest), max_size=6))
    keys = data.draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)))
    dim = data.draw(st.sampled_from(HEAD_DIMS))
    dtype = data.draw(st.sampled_from(DTYPES))
    qkv = random_qkv(lengths, dim, dtype, DEVICE)
    if sum(lengths):
        check(lengths, dim, dtype, keys)
    else:
        assert packed(lengths, DEVICE, keys)(qkv).shape == (0, 2, dim)


@pytest.mark.parametrize("chip", [80, 86, 90])
@pytest.mark.parametrize(
    ("length", "dim"), [(50, 64), (50, 128), (101, 80), (197, 32), (197, 64), (197, 80), (257, 80)]
)
def test_configurations_of_each_chip(monkeypatch, chip, length, dim):
    monkeypatch.setattr(triton_attention, "_capability", lambda device: chip)
    check((length,), dim, torch.float16)


@pytest.mark.parametrize("dim", [32, 64, 80])
def test_a_mixed_batch_beside_a_class_token(monkeypatch, dim):
    """257 tokens, and shorter sequences of other classes, some of whose tokens are no keys, in every class at once."""
    monkeypatch.setattr(triton_attention, "_capability", lambda device: 90)
    check((257, 37, 272, 130, 64), dim, torch.float16, (257, 5, 271, 1, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_may_be_negative_or_zero(dtype):
    for scale in (0.3, 0.0, -0.2):
        assert_agrees(
            packed((17, 50), DEVICE, scale=scale),
            lambda qkv, scale=scale: plain_attention(qkv, (17, 50), scale=scale),
            [random_qkv((17, 50), 64, dtype, DEVICE)],
        )


@pytest.mark.parametrize("lengths", [(3, 9, 20, 0, 32, 5), (50, 17, 70), (0, 270, 0, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(monkeypatch, lengths, dtype):
    """Outputs that start as NaN, keys that are never asked as well: what comes back is finite and agrees."""
    plain_new_empty = torch.Tensor.new_empty
    poisoned = []

    def new_empty(self, *size, **options):
        result = plain_new_empty(self, *size, **options)
        if result.numel():
            poisoned.append(result.fill_(torch.nan))
        return result

    keys = tuple(-(-length // 3) if i % 2 else 0 for i, length in enumerate(lengths))
    qkv = random_qkv(lengths, 64, dtype, DEVICE)
    wanted_qkv = qkv.clone().requires_grad_()
    wanted = attention_with_keyless(wanted_qkv.float(), lengths, keys)
    is_key = torch.cat([torch.arange(n) < k for n, k in zip(lengths, keys, strict=True)]).to(DEVICE)
    qkv[~is_key, 1:] = torch.nan
    qkv.requires_grad_()
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    out = packed(lengths, DEVICE, keys)(qkv)
    grad = grad_of(out, qkv)
    monkeypatch.undo()
    kernels.use("triton", "packed_attention")
    # out, lse and the gradient
    assert len(poisoned) == 3
    near = {"atol": 2e-3, "rtol": 1e-2} if dtype == torch.float16 else {}
    torch.testing.assert_close(out, wanted.to(dtype), **near)
    torch.testing.assert_close(grad, grad_of(wanted, wanted_qkv), **near)
    assert (grad[~is_key, 1:] == 0).all()
    lse = poisoned[1]
    assert not lse.isnan().any()
    has_keys = torch.cat([torch.full((n,), k > 0) for n, k in zip(lengths, keys, strict=True)]).to(DEVICE)
    assert torch.equal(lse.isfinite(), has_keys.expand_as(lse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype):
    lengths = (50, 80)
    qkv = random_qkv(lengths, 64, dtype, DEVICE)
    _, lse = torch.ops.tessera.packed_attention_forward(qkv, *layout(lengths, DEVICE), 0.125, "triton")
    q, k = (part.double().transpose(0, 1).split(lengths, 1) for part in qkv.unbind(1)[:2])
    wanted = torch.cat([(a @ b.mT * 0.125).logsumexp(-1) for a, b in zip(q, k, strict=True)], 1)
    torch.testing.assert_close(lse.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 5, 0), (0, 70, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sequences(lengths, dtype):
    qkv = random_qkv(lengths, 32, dtype, DEVICE).requires_grad_()
    out = packed(lengths, DEVICE)(qkv)
    grad = grad_of(out, qkv)
    assert out.shape == (sum(lengths), 2, 32)
    assert grad.shape == qkv.shape
    assert grad.isfinite().all()


@pytest.mark.parametrize("lengths", [(17, 17), (66, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(lengths, dtype):
    qkv = random_qkv(lengths, 32, dtype, DEVICE)
    every_second_row = torch.stack((qkv, qkv), 1).flatten(0, 1)[::2]
    parts_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    dim_first = qkv.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    direction = torch.randn(sum(lengths), 2, 32, device=DEVICE).to(dtype)
    heads_first = direction.transpose(0, 1).contiguous().transpose(0, 1)
    same_everywhere = direction[:1, :1].expand_as(direction)
    for grad_out in (heads_first, same_everywhere):
        plain = qkv.clone().requires_grad_()
        wanted = packed(lengths, DEVICE)(plain)
        (wanted_grad,) = torch.autograd.grad(wanted, plain, grad_out.contiguous())
        for strided in (every_second_row, parts_first, dim_first)[: 3 if grad_out is heads_first else 1]:
            assert not strided.is_contiguous()
            leaf = strided.detach().requires_grad_()
            out = packed(lengths, DEVICE)(leaf)
            (grad,) = torch.autograd.grad(out, leaf, grad_out)
            assert torch.equal(out, wanted)
            assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(9, 17, 30), (50, 97, 37)])
def test_same_bits_every_time(lengths, dtype):
    qkv = random_qkv(lengths, 64, dtype, DEVICE, heads=1).requires_grad_()
    first, again = ((out, grad_of(out, qkv)) for out in (packed(lengths, DEVICE)(qkv) for _ in range(2)))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [None, (3, 7, 4)], ids=["all-keys", "some-keys"])
def test_opcheck(dtype, keys):
    qkv = random_qkv((5, 7, 5), 32, dtype, DEVICE).requires_grad_()
    torch.library.opcheck(
        torch.ops.tessera.packed_attention_forward.default, (qkv, *layout((5, 7, 5), DEVICE, keys), 0.2, "triton")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_graph_break(dtype):
    def block(qkv, cu_seqlens, max_seqlen, kv_lengths):
        return kernels.packed_attention(qkv * 2, cu_seqlens, max_seqlen, kv_lengths).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for lengths, keys in (((9, 9), None), ((9, 4, 9), (2, 4, 1))):
        qkv = random_qkv(lengths, 32, dtype, DEVICE).requires_grad_()
        where = layout(lengths, DEVICE, keys)
        eager, traced = ((out, grad_of(out, qkv)) for out in (f(qkv, *where) for f in (block, compiled)))
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match="takes float16, bfloat16 or float32, got float64"):
        packed((5,), DEVICE)(random_qkv((5,), 32, torch.float64, DEVICE))


@pytest.mark.parametrize(("direction", "chip"), [("forward", 80), ("forward", 90), ("backward", 80)])
def test_little_of_a_tile_is_wasted(direction, chip):
    """Rows of keys that are computed, over those that are needed, for what the forms choose by themselves; Hopper's
    backward trades products for fewer reads of shared memory."""
    for dim in (32, 64):
        for length, most in ((197, 1.07), (50, 1.3), (64, 1.0), (256, 1.0), (208, 1.0), (257, 1.07)):
            (form,) = ladder(direction, dim, torch.bfloat16, chip, length, equal=True)
            if length < 257 or (direction, dim) != ("backward", 64):
                assert form.pieces and form.capacity / length <= most


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pieces_rise_and_every_chip_has_them(direction):
    for dim in HEAD_DIMS:
        for chip in (80, 86, 90):
            capacities = [sum(pieces) for pieces in key_pieces(direction, dim, torch.bfloat16, chip)]
            assert capacities[0] == 64 and capacities == sorted(set(capacities))


def test_every_length_is_served_by_exactly_one_launch():
    asked = product(("forward", "backward"), HEAD_DIMS, (torch.bfloat16, torch.float32), (80, 86, 90))
    for direction, dim, dtype, chip in asked:
        for longest in (1, 32, 33, 64, 65, 197, 256, 257, 272, 273, 4096):
            plan = triton_attention._plan(direction, dim, dtype, longest, False, chip)
            bounds = [longest, *(step.longer_than for step in plan)]
            assert bounds == sorted(bounds, reverse=True)
            assert bounds[-1] == 0
