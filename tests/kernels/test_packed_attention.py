"""packed_attention against a loop over sequences in plain torch."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.packed_attention import HEAD_DIMS, cost, reference
from tests.kernels.agreement import DEVICES, HALF_AND_FULL, assert_agrees
from tests.kernels.interpreted import IMPLEMENTATION_AND_DEVICE, moved

LENGTHS = (1, 15, 16, 17, 37, 49, 50, 64, 65, 196, 197, 256, 257)
HEADS = 2


def plain_attention(qkv, lengths, keys=None, scale=None):
    """One sequence after the other, the formula as it is written."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    outs = [qkv[:0, 0]]
    for sequence, kept in zip(qkv.split(list(lengths)), keys or lengths, strict=True):
        q, k, v = sequence.transpose(0, 2).unbind(1)
        outs.append((torch.softmax(q @ k[:, :kept].mT * scale, -1) @ v[:, :kept]).transpose(0, 1))
    return torch.cat(outs)


def layout(lengths, device, keys=None):
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    kv_lengths = None if keys is None else torch.tensor(keys, device=device, dtype=torch.int32)
    return cu_seqlens, max(lengths, default=0), kv_lengths


def packed(lengths, device, keys=None, scale=None):
    where = layout(lengths, device, keys)
    return lambda qkv: kernels.packed_attention(qkv, *where, scale)


def random_qkv(lengths, dim, dtype=torch.float32, device="cpu", heads=HEADS):
    return torch.randn(sum(lengths), 3, heads, dim, device=device).to(dtype)


def mixed_keys(lengths):
    """One key, all keys, about a quarter of the keys, in turn."""
    return [(1, length, -(-length // 4))[i % 3] for i, length in enumerate(lengths)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dim", "dtype", "keys"),
    [
        *((dim, torch.float32, mixed_keys(LENGTHS)) for dim in HEAD_DIMS),
        *((64, dtype, None) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
    ],
    ids=str,
)
def test_odd_lengths(device, dim, dtype, keys):
    assert_agrees(
        packed(LENGTHS, device, keys),
        lambda qkv: plain_attention(qkv, LENGTHS, keys),
        [random_qkv(LENGTHS, dim, dtype, device)],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", LENGTHS)
def test_equal_lengths(device, length):
    lengths = (length,) * 3
    assert_agrees(
        packed(lengths, device),
        lambda qkv: plain_attention(qkv, lengths),
        [random_qkv(lengths, 64, device=device)],
    )


@pytest.mark.parametrize("device", DEVICES)
def test_scale(device):
    lengths = (17, 50)
    assert_agrees(
        packed(lengths, device, scale=0.3),
        lambda qkv: plain_attention(qkv, lengths, scale=0.3),
        [random_qkv(lengths, 64, torch.float64, device)],
    )


@pytest.mark.parametrize("device", DEVICES)
def test_one_key_and_equal_keys(device):
    lengths = (50,) * 4
    for keys in ([1] * 4, [13] * 4, [13, 50, 13, 1]):
        assert_agrees(
            packed(lengths, device, keys),
            lambda qkv, keys=keys: plain_attention(qkv, lengths, keys),
            [random_qkv(lengths, 32, device=device)],
        )


@settings(max_examples=25)
@given(st.data())
def test_any_layout(data):
    lengths = data.draw(st.lists(st.integers(0, 20), max_size=6))
    keys = data.draw(st.none() | st.tuples(*(st.integers(min(1, length), length) for length in lengths)))
    dim = data.draw(st.sampled_from(HEAD_DIMS))
    assert_agrees(
        packed(lengths, "cpu", keys),
        lambda qkv: plain_attention(qkv, lengths, keys),
        [random_qkv(lengths, dim, torch.float64)],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tokens_that_are_not_keys_are_never_asked(device, dtype):
    lengths, keys = (20, 7, 20), (5, 0, 20)
    qkv = random_qkv(lengths, 64, dtype, device)
    is_key = torch.cat([torch.arange(n) < k for n, k in zip(lengths, keys, strict=True)]).to(device)
    qkv[~is_key, 1:] = torch.nan
    qkv.requires_grad_()
    out = packed(lengths, device, keys)(qkv)
    (grad,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert out.isfinite().all()
    assert (out[20:27] == 0).all(), "a sequence without keys gives zeros"
    assert grad.isfinite().all()
    assert (grad[~is_key, 1:] == 0).all()
    assert (grad[20:27] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 5, 0)])
def test_empty_sequences(device, lengths):
    qkv = random_qkv(lengths, 32, device=device).requires_grad_()
    out = packed(lengths, device)(qkv)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert out.shape == (sum(lengths), HEADS, 32)
    assert grad.shape == qkv.shape
    assert grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(17, 17), (17, 5)])
def test_strides_do_not_matter(device, lengths):
    qkv = random_qkv(lengths, 64, device=device)
    wanted = packed(lengths, device)(qkv)
    every_second_row = torch.stack((qkv, qkv), 1).flatten(0, 1)[::2]
    dim_first = qkv.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for strided in (every_second_row, dim_first):
        assert not strided.is_contiguous()
        strided.requires_grad_()
        out = packed(lengths, device)(strided)
        torch.testing.assert_close(out, wanted)
        grad_out = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
        (grad,) = torch.autograd.grad(out, strided, grad_out)
        plain = qkv.clone().requires_grad_()
        (wanted_grad,) = torch.autograd.grad(packed(lengths, device)(plain), plain, grad_out.contiguous())
        torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
def test_layout_may_have_strides(implementation, device):
    kernels.use(implementation, "packed_attention")
    lengths, keys = (17, 5, 40), (3, 5, 20)
    cu_seqlens, longest, kv_lengths = layout(lengths, device, keys)
    apart = [torch.stack((x, torch.full_like(x, 99)), 1)[:, 0] for x in (cu_seqlens, kv_lengths)]
    qkv = random_qkv(lengths, 32, device=device).requires_grad_()
    results = []
    for starts, kept in ((cu_seqlens, kv_lengths), apart):
        out = kernels.packed_attention(qkv, starts, longest, kept)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert not any(x.is_contiguous() for x in apart)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("compiled", [False, True])
def test_layout_that_was_written_to_since_is_not_read_in_backward(implementation, device, compiled):
    """The values are checked in forward only."""
    kernels.use(implementation, "packed_attention")
    where = layout((4, 5), device, (2, 5))
    qkv = random_qkv((4, 5), 32, device=device).requires_grad_()
    attend = kernels.packed_attention
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for i in (0, 2):
        out = attend(qkv, *where)
        where[i].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device):
    lengths = (50, 17, 50, 197)
    qkv = random_qkv(lengths, 64, device=device).requires_grad_()
    direction = torch.randn(sum(lengths), HEADS, 64, device=device)
    runs = []
    for _ in range(3):
        out = packed(lengths, device)(qkv)
        runs.append((out, *torch.autograd.grad(out, qkv, direction)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_a_sequence_does_not_depend_on_its_neighbours():
    lengths = (37, 37, 50)
    qkv = random_qkv(lengths, 64)
    alone = packed((37,), "cpu")(qkv[37:74])
    torch.testing.assert_close(packed(lengths, "cpu")(qkv)[37:74], alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [None, (3, 7, 4)], ids=["all-keys", "some-keys"])
def test_opcheck(device, dtype, keys):
    lengths = (5, 7, 5)
    qkv = random_qkv(lengths, 32, dtype, device).requires_grad_()
    torch.library.opcheck(
        torch.ops.tessera.packed_attention_forward.default, (qkv, *layout(lengths, device, keys), 0.2, "reference")
    )


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    def block(qkv, cu_seqlens, max_seqlen, kv_lengths):
        return kernels.packed_attention(qkv * 2, cu_seqlens, max_seqlen, kv_lengths).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for lengths, keys in (((9, 9), None), ((9, 4, 9), None), ((9, 4, 9), (2, 4, 1))):
        qkv = random_qkv(lengths, 32, device=device).requires_grad_()
        where = layout(lengths, device, keys)
        results = [(out, *torch.autograd.grad(out.sum(), qkv)) for out in (f(qkv, *where) for f in (block, compiled))]
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("keys", [None, (13, 0, 7, 1)], ids=["all-keys", "some-keys"])
def test_layout_handed_to_the_gpus_flash_attention(monkeypatch, keys):
    """What the CUDA path does around aten's op, which the formula plays: keys in front, garbage behind them."""

    def sequences(q, k, cu_q, cu_k):
        starts, key_starts = cu_q.tolist(), cu_k.tolist()
        for i in range(len(starts) - 1):
            yield slice(starts[i], starts[i + 1]), slice(key_starts[i], key_starts[i + 1])

    def attend(q, k, v, rows, key_rows, scale):
        return plain_cross_attention(q[rows], k[key_rows], v[key_rows], scale)

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        out = torch.full_like(q, torch.nan)
        for rows, key_rows in sequences(q, k, cu_q, cu_k):
            out[rows] = attend(q, k, v, rows, key_rows, scale)
        return out, torch.zeros(q.shape[1], len(q)), None, None, None

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale):
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for rows, key_rows in sequences(q, k, cu_q, cu_k):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q[rows], k[key_rows], v[key_rows])]
                out = plain_cross_attention(*leaves, scale)
            dq[rows], dk[key_rows], dv[key_rows] = torch.autograd.grad(out, leaves, grad[rows])
        return dq, dk, dv

    monkeypatch.setattr(reference, "_has_gpu_flash", lambda x: True)
    monkeypatch.setattr(
        reference, "_aten", SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    )
    lengths = (20, 5, 7, 30)
    qkv = random_qkv(lengths, 32, torch.float64).requires_grad_()
    direction = torch.randn(sum(lengths), HEADS, 32, dtype=torch.float64)
    outs = [f(qkv) for f in (packed(lengths, "cpu", keys), lambda x: plain_attention(x, lengths, keys))]
    grads = [torch.autograd.grad(out, qkv, direction)[0] for out in outs]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads)


def plain_cross_attention(q, k, v, scale):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return (torch.softmax(q @ k.mT * scale, -1) @ v).transpose(0, 1)


@pytest.mark.parametrize("form", ["written", "flash"])
@pytest.mark.parametrize("keys", [None, (13, 1, 7, 20)], ids=["all-keys", "some-keys"])
def test_each_form_of_a_cpu_at_any_length(form, keys):
    """The written-out formula is also what other devices run, and wide dtypes on a GPU."""
    kernels.use(form, "packed_attention")
    lengths = (20, 5, 70, 20)
    for dtype in HALF_AND_FULL:
        assert_agrees(
            packed(lengths, "cpu", keys),
            lambda qkv: plain_attention(qkv, lengths, keys),
            [random_qkv(lengths, 64, dtype)],
        )


def test_cost_counts_what_must_move():
    forward, backward = cost([50, 50], heads=2, head_dim=64, element_size=2)
    assert forward.bytes == 100 * 2 * (8 * 64 + 4)
    assert forward.flops == 2 * 2 * 50 * 50 * 64 * 4
    assert backward.bytes == 100 * 2 * (16 * 64 + 4)
    assert backward.flops == 2.5 * forward.flops


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = {"qkv": torch.zeros(5, 3, 2, 32), "cu_seqlens": int32(0, 2, 5), "max_seqlen": 3, "kv_lengths": int32(1, 3)}
RISE = "cu_seqlens must rise from 0 to the 5 tokens"
BETWEEN = "kv_lengths must lie between 0 and the length, got"


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"qkv": torch.zeros(5, 2, 2, 32)},
            r"packed_attention needs qkv of shape \[tokens, 3, heads, head dim\], got \[5, 2, 2, 32\]",
        ),
        (
            {"qkv": torch.zeros(5, 3, 2, 48)},
            "packed_attention needs qkv with a head dim of 32, 64, 80, 96, 128, got 48",
        ),
        (
            {"qkv": torch.zeros(5, 3, 2, 32, dtype=torch.int32)},
            "packed_attention needs qkv in float16, bfloat16, float32 or float64, got torch.int32",
        ),
        (
            {"qkv": torch.zeros(5, 3, 2, 32).to(torch.float8_e4m3fn)},
            "packed_attention needs qkv in float16, bfloat16, float32 or float64, got torch.float8_e4m3fn",
        ),
        (
            {"qkv": torch.zeros(5, 3, 2, 32, device="meta")},
            r"packed_attention needs cu_seqlens as int32 \[n\] on meta, got torch.int32 \[3\] on (cpu|cuda)",
        ),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "packed_attention needs cu_seqlens as int32 .*, got torch.int64"),
        ({"cu_seqlens": int32(0, 2, 5)[None]}, r"packed_attention needs cu_seqlens as int32 .*, got .* \[1, 3\] on"),
        ({"cu_seqlens": int32(0, 2, 5).to("meta")}, "packed_attention needs cu_seqlens as int32 .* on meta"),
        ({"cu_seqlens": int32()}, "packed_attention needs cu_seqlens of at least one element, got none"),
        ({"cu_seqlens": int32(1, 2, 5)}, f"{RISE} in steps of at most max_seqlen = 3, got 1 to 5 in steps of 1 to 3"),
        ({"cu_seqlens": int32(0, 2, 4)}, f"{RISE} .*, got 0 to 4"),
        ({"cu_seqlens": int32(0, 2, 9)}, f"{RISE} .*, got 0 to 9"),
        ({"cu_seqlens": int32(0, 6, 5)}, f"{RISE} .*, got 0 to 5 in steps of -1 to 6"),
        ({"cu_seqlens": int32(0, 1, 5)}, f"{RISE} in steps of at most max_seqlen = 3, got 0 to 5 in steps of 1 to 4"),
        ({"max_seqlen": 2}, f"{RISE} in steps of at most max_seqlen = 2, got 0 to 5 in steps of 2 to 3"),
        # as many as tokens would be if all were equally long
        ({"qkv": torch.zeros(6, 3, 2, 32), "kv_lengths": None}, "cu_seqlens must rise from 0 to the 6 tokens"),
        ({"kv_lengths": int32(1)}, "packed_attention needs one entry of kv_lengths per sequence, got 1 for 2"),
        ({"kv_lengths": torch.tensor([1.0, 1.0])}, "packed_attention needs kv_lengths as int32 .*, got torch.float32"),
        ({"kv_lengths": torch.tensor([1, 1])}, "packed_attention needs kv_lengths as int32 .*, got torch.int64"),
        ({"kv_lengths": int32(1, 1).to("meta")}, "packed_attention needs kv_lengths as int32 .* on meta"),
        ({"kv_lengths": int32(1, 4)}, f"{BETWEEN} 4 for a sequence of 3"),
        ({"kv_lengths": int32(-1, 3)}, f"{BETWEEN} -1 for a sequence of 2"),
    ],
)
def test_bad_input_is_told_in_one_sentence(implementation, device, changed, sentence):
    kernels.use(implementation, "packed_attention")
    kernels.packed_attention(*moved(GOOD.values(), device))
    with pytest.raises(ValueError, match=f"^{sentence}"):
        kernels.packed_attention(*moved((GOOD | changed).values(), device))
