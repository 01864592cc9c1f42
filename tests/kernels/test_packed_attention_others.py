"""packed_attention by others' kernels. No CPU has them: there the formula plays them, which proves what we do around them."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from benchmarks.kernels import case
from kernels import choice
from kernels.packed_attention import HEAD_DIMS, cudnn, efficient, reference
from tests.kernels import played, played_xformers
from tests.kernels.agreement import assert_agrees
from tests.kernels.test_packed_attention import layout, packed, plain_attention, random_qkv

XFORMERS = "kernels.packed_attention.xformers"
# (lengths, keys, max_seqlen or None for the longest)
LAYOUTS = {
    "equal": ((50, 50, 50), None, None),
    "equal, rows as padded": ((64, 64), None, None),
    "one": ((37,), None, None),
    "mixed": ((33, 1, 64, 5), None, None),
    "mixed, some empty": ((0, 7, 0, 20, 0), None, None),
    "mixed, loose bound": ((3, 5), None, 40),
    "equal, some keys": ((20, 20, 20), (13, 1, 20), None),
    "mixed, some keys, none": ((20, 5, 33, 7, 0), (13, 0, 33, 1, 0), None),
}


@pytest.fixture
def xformers(monkeypatch):
    """The implementation as it is where xformers is installed with both flash attentions."""
    yield with_xformers(monkeypatch)
    forget(XFORMERS)


def with_xformers(monkeypatch, **kernels_of_others):
    for name, module in played_xformers.modules(**kernels_of_others).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    forget(XFORMERS)
    return importlib.import_module(XFORMERS)


def forget(name):
    sys.modules.pop(name, None)
    choice._modules.pop(("packed_attention", "xformers"), None)


@pytest.fixture(params=["efficient", "cudnn", "xformers"])
def other(request, monkeypatch):
    """Each of them, with the formula in the place of its kernel, on a CPU."""
    if request.param == "xformers":
        module = request.getfixturevalue("xformers")
        monkeypatch.setattr(module, "_check", lambda qkv: None)
        return module
    module = {"efficient": efficient, "cudnn": cudnn}[request.param]
    monkeypatch.setattr(module, "_aten", {"efficient": played.efficient, "cudnn": played.cudnn}[request.param]())
    monkeypatch.setattr(module, "_check", lambda qkv, *layout: layout and cudnn.check_layout(len(qkv), *layout))
    return module


@pytest.mark.parametrize(("lengths", "keys", "longest"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_lse_scale_and_gradients(other, lengths, keys, longest):
    where = layout(lengths, "cpu", keys)
    where = (where[0], longest or where[1], where[2])
    qkv = random_qkv(lengths, 32, torch.float64)
    if other is cudnn and (keys or len(set(lengths)) > 1):
        with pytest.raises(ValueError, match="cudnn takes"):
            other.forward(qkv, *where, 0.3)
        return
    grad_out = torch.randn(sum(lengths), 2, 32, dtype=torch.float64)
    out, lse = other.forward(qkv, *where, 0.3)
    wanted_out, wanted_lse = reference.forward(qkv, *where, 0.3)
    torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    # from the reference's forward: what is saved means the same everywhere
    grad = other.backward(grad_out, qkv, wanted_out, wanted_lse, *where, 0.3)
    wanted = reference.backward(grad_out, qkv, wanted_out, wanted_lse, *where, 0.3)
    torch.testing.assert_close(grad, wanted)
    assert grad.is_contiguous()
    torch.testing.assert_close(reference.backward(grad_out, qkv, out, lse, *where, 0.3), wanted)


def test_strides_do_not_matter(other):
    where = layout((17, 17), "cpu")
    qkv = random_qkv((17, 17), 32, torch.float64)
    strided = qkv.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    grad_out = torch.ones(1, 1, 1, dtype=torch.float64).expand(34, 2, 32)
    found = other.forward(strided, *where, 0.2)
    for ours, wanted in zip(found, reference.forward(qkv, *where, 0.2), strict=True):
        torch.testing.assert_close(ours, wanted)
    wanted = reference.backward(grad_out, qkv, *found, *where, 0.2)
    torch.testing.assert_close(other.backward(grad_out, strided, *found, *where, 0.2), wanted)


def test_no_tokens(other):
    qkv, where = random_qkv((), 32, torch.float32), layout((), "cpu")
    out, lse = other.forward(qkv, *where, 0.2)
    assert (out.shape, lse.shape, lse.dtype) == ((0, 2, 32), (2, 0), torch.float32)
    assert other.backward(out, qkv, out, lse, *where, 0.2).shape == (0, 3, 2, 32)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("module", "dtype", "lengths", "keys"),
    [
        (module, dtype, lengths, keys)
        for module in (efficient, cudnn)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for lengths, keys in (((50, 50), None), ((50, 7), None), ((50, 7), (5, 7)))
        # cuDNN takes 16 bit and equal lengths
        if module is efficient or (dtype != torch.float32 and lengths[0] == lengths[1])
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else str(value),
)
def test_shapes_on_a_gpu_by_atens_own_word(monkeypatch, module, dim, dtype, lengths, keys):
    """aten's functions of shapes run on fake tensors of a GPU; what comes out is laid out as it was agreed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    aten = torch.ops.aten

    def backward(*args, scale, **kwargs):
        # torch 2.11's function of shapes has forgotten the argument `out`, so all behind it are off by one and scale is double
        return aten._efficient_attention_backward(*args, **kwargs)

    if module is efficient:
        names = {
            "_efficient_attention_forward": aten._efficient_attention_forward,
            "_efficient_attention_backward": backward,
        }
        monkeypatch.setattr(efficient, "_aten", SimpleNamespace(**names))
    with FakeTensorMode():
        qkv = torch.empty(sum(lengths), 3, 2, dim, dtype=dtype, device="cuda")
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="cuda")
        where = (cu_seqlens, max(lengths), None if keys is None else cu_seqlens[1:].contiguous())
        out, lse = module.forward(qkv, *where, 0.3)
        grad = module.backward(torch.empty_like(out), qkv, out, lse, *where, 0.3)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((sum(lengths), 2, dim), dtype, True)
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, sum(lengths)), torch.float32, True)
    assert (grad.shape, grad.dtype, grad.is_contiguous()) == (qkv.shape, dtype, True)
    assert {x.device.type for x in (out, lse, grad)} == {"cuda"}


def refused(module, dtype=torch.bfloat16, device="cuda", lengths=(50, 50), keys=None, dim=64):
    with FakeTensorMode():
        qkv = torch.empty(sum(lengths), 3, 2, dim, dtype=dtype, device=device)
        cu_seqlens = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
        where = (cu_seqlens, max(lengths), cu_seqlens[1:] if keys else None)
        out, lse = qkv[:, 0], torch.empty(2, sum(lengths), device=device)
        for call in (
            lambda: module.forward(qkv, *where, 0.3),
            lambda: module.backward(out, qkv, out, lse, *where, 0.3),
        ):
            with pytest.raises(ValueError) as caught:
                call()
    return str(caught.value)


def test_what_they_cannot_take_is_told_in_one_sentence(monkeypatch, xformers):
    assert refused(efficient, torch.float64).startswith(
        "efficient takes float16, bfloat16 or float32 on a GPU, got torch.float64"
    )
    assert "on cpu; use reference" in refused(efficient, device="cpu")
    assert refused(cudnn, torch.float32).startswith("cudnn takes float16 or bfloat16 on a GPU, got torch.float32")
    assert refused(cudnn, lengths=(50, 7)) == "cudnn takes sequences of equal length, got 57 tokens in 2 of up to 50"
    assert refused(cudnn, keys=True).startswith("cudnn takes no kv_lengths: the host does not know them")
    assert refused(cudnn, lengths=(1, 1)).startswith("cudnn takes sequences of two tokens or more")
    assert refused(xformers, torch.float32).startswith("xformers takes float16 or bfloat16 on a GPU, got torch.float32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert refused(efficient).startswith("efficient takes bfloat16 from sm_80 on")
    assert refused(cudnn, torch.float16).startswith("cudnn needs a GPU of sm_80 or later")
    assert (
        refused(xformers, torch.float16) == "xformers has fa3F@pip_pkg, fa2F@2.8.3 here, none for head dim 64 on sm_75"
    )


def test_xformers_takes_the_newest_kernel_that_takes_the_head_dim_on_this_gpu(monkeypatch, xformers):
    monkeypatch.setattr(xformers, "_check", lambda qkv: None)
    fmha = sys.modules["xformers.ops.fmha"]
    for capability, dim, module in (((9, 0), 64, fmha.flash3), ((9, 0), 32, fmha.flash), ((12, 0), 64, fmha.flash)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, capability=capability: capability)
        qkv, where = random_qkv((5, 5), dim, torch.float64), layout((5, 5), "cpu")
        out, lse = xformers.forward(qkv, *where, 0.3)
        xformers.backward(out, qkv, out, lse, *where, 0.3)
        assert fmha.used[-2:] == [module.FwOp, module.BwOp]


def test_xformers_that_is_missing_or_has_no_kernel_of_its_own_is_the_reason(monkeypatch):
    on_gpu = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "xformers", None)
    forget(XFORMERS)
    assert choice.usable("packed_attention_forward", "xformers", on_gpu).startswith("it cannot be imported: ")
    with pytest.raises(ValueError, match="it cannot be imported"):
        kernels.use("xformers", "packed_attention")
    for flash in ("", "fa2F@v2.5.7-pt"):  # without the package, and with what only wraps aten's kernel
        with pytest.raises(ValueError, match="xformers finds neither flash_attn_3 nor flash_attn here"):
            with_xformers(monkeypatch, flash=flash, flash3=False)
    assert with_xformers(monkeypatch, flash3=False).OPERATORS
    assert choice.usable("packed_attention_forward", "xformers", on_gpu) == ""
    forget(XFORMERS)


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_they_need_a_gpu(name):
    assert name in choice.AVAILABLE["packed_attention"]
    why = choice.usable("packed_attention_forward", name, torch.device("cpu"))
    assert why == f"packed_attention needs tensors on a GPU to run {name}, got them on the CPU"
    assert choice.usable("packed_attention_forward", name, torch.device("cuda")) == ""


@pytest.mark.parametrize("on_gpu", [False, True])
def test_benchmarks_have_them_among_the_peers_on_a_gpu_only(monkeypatch, on_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    one = case.Case("packed_attention", "", (), tuple, len, len, {})
    ours, theirs = set(one.ours), {f"our op on {name}" for name in ("efficient", "cudnn", "xformers")}
    assert ours == ({"reference", "triton", "cuda"} if on_gpu else {"reference", "written", "flash"})
    assert theirs & one.theirs.keys() == (theirs if on_gpu else set())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["efficient", "cudnn", "xformers"])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (128, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("lengths", "keys"), [each[:2] for each in LAYOUTS.values()], ids=LAYOUTS)
def test_on_a_gpu(name, dim, dtype, lengths, keys):
    why = choice.usable("packed_attention_forward", name, torch.device("cuda"))
    if why:
        pytest.skip(why)  # a package that this machine has not
    kernels.use(name, "packed_attention")
    if name == "cudnn" and (keys or len(set(lengths)) > 1):
        with pytest.raises(ValueError, match="cudnn takes"):
            packed(lengths, "cuda", keys)(random_qkv(lengths, dim, dtype, "cuda"))
        return
    assert_agrees(
        packed(lengths, "cuda", keys),
        lambda qkv: plain_attention(qkv, lengths, keys),
        [random_qkv(lengths, dim, dtype, "cuda")],
    )
