"""The CUDA C++ kernels of packed attention, on machines that have no GPU.

Their source runs in csrc/host_emulation.h, compiled by g++ with AddressSanitizer: values, gradients, races, wild
accesses. Where nvcc is, it is compiled for the chips too: registers, spills, matrix instructions, registration.
"""

import importlib
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from kernels import library
from kernels.packed_attention import HEAD_DIMS, reference
from kernels.packed_attention.layout import in_chunks
from tests.kernels.agreement import assert_agrees, assert_close_as_plain
from tests.kernels.emulated import (
    A100,
    CSRC,
    H100,
    ROOT,
    answer,
    build,
    build_main,
    inspect,
    memory_of,
    spanned,
)

LENGTHS = (1, 15, 16, 17, 37, 50, 64, 65, 196, 197, 208, 256)
HALF = (torch.float16, torch.bfloat16)
LONGEST = 320


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    grad_qkv: Tensor
    bank_conflicts: int


def mixed_keys(lengths):
    """One key, all keys, about a quarter of the keys, in turn."""
    return [(1, length, -(-length // 4))[i % 3] for i, length in enumerate(lengths)]


@pytest.fixture(scope="session")
def main_object(tmp_path_factory) -> Path:
    return build_main(tmp_path_factory.mktemp("emulation") / "host_main.o")


@pytest.fixture(scope="session")
def program(main_object) -> Path:
    text = (CSRC / "packed_attention.cu").read_text()
    return build(text, main_object, main_object.with_name("packed_attention"))


def emulate(
    program, qkv, lengths, keys=None, *, grad_out=None, scale=None, max_seqlen=None, seed=0, multiprocessor=A100
):
    """Forward and backward of one batch in a process of its own; RuntimeError with what it says when it fails."""
    tokens, _, heads, dim = qkv.shape
    grad_out = random_direction(qkv) if grad_out is None else grad_out
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    integers = (
        *(tokens, len(lengths), heads, dim, max(lengths) if max_seqlen is None else max_seqlen),
        *(qkv.dtype == torch.bfloat16, keys is not None),
        *(*qkv.stride()[:3], spanned(qkv), *grad_out.stride()[:2], spanned(grad_out)),
        *(seed, multiprocessor),
    )
    tensors = [qkv, grad_out, cu_seqlens, *([] if keys is None else [torch.tensor(keys, dtype=torch.int32)])]
    case = struct.pack("16qd", *integers, dim**-0.5 if scale is None else scale) + b"".join(map(memory_of, tensors))
    said = answer(program, "packed_attention", case)
    rows = tokens * heads
    parts = []
    for dtype, count in ((qkv.dtype, rows * dim), (torch.float32, rows), (qkv.dtype, 3 * rows * dim)):
        size = count * dtype.itemsize
        parts.append(torch.frombuffer(said[:size], dtype=dtype) if count else torch.empty(0, dtype=dtype))
        said = said[size:]
    out, lse, grad_qkv = parts
    conflicts = struct.unpack("q", said)[0]
    return Result(
        out.view(tokens, heads, dim), lse.view(heads, tokens), grad_qkv.view(tokens, 3, heads, dim), conflicts
    )


def random_qkv(lengths, dim, dtype, heads=1):
    return torch.randn(sum(lengths), 3, heads, dim).to(dtype)


def random_direction(qkv):
    tokens, _, heads, dim = qkv.shape
    # bf16, so that every dtype holds it exactly
    return torch.randn(tokens, heads, dim).bfloat16().to(qkv.dtype)


def assert_right(program, lengths, dim, dtype, keys=None, heads=1, **options):
    qkv = random_qkv(lengths, dim, dtype, heads)
    grad_out = random_direction(qkv)
    ours = emulate(program, qkv, lengths, keys, grad_out=grad_out, **options)
    layout = (
        torch.tensor([0, *lengths]).cumsum(0).int(),
        max(lengths),
        None if keys is None else torch.tensor(keys, dtype=torch.int32),
        options.get("scale") or dim**-0.5,
    )
    plain, truth = [], []
    for results, x in ((plain, qkv), (truth, qkv.double())):
        out, lse = reference.forward(x, *layout)
        results += [out, lse, reference.backward(grad_out.to(x.dtype), x, out, lse, *layout)]
    for by_us, by_plain, exact in zip(ours, plain, truth):
        assert_close_as_plain(by_us, by_plain, exact)
    assert ours.bank_conflicts == 0
    return ours


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "some_keys"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_every_length(program, dtype, some_keys):
    assert_right(program, LENGTHS, 64, dtype, mixed_keys(LENGTHS) if some_keys else None)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("multiprocessor", [A100, 0], ids=["staged-once", "staged-twice"])
def test_every_head_dim(program, dim, dtype, multiprocessor):
    lengths = (33, 50, 17)
    keys = None if multiprocessor else mixed_keys(lengths)
    assert_right(program, lengths, dim, dtype, keys, heads=2, multiprocessor=multiprocessor)


@pytest.mark.parametrize("dim", [32, 128])
def test_longest_sequence_fits_in_shared_memory(program, dim):
    assert_right(program, (LONGEST,), dim, torch.float16)
    with pytest.raises(RuntimeError, match="longer than these kernels take"):
        emulate(program, random_qkv((LONGEST + 1,), dim, torch.float16), (LONGEST + 1,))


def test_scale(program):
    assert_right(program, (17, 50), 64, torch.float16, scale=0.3)


def test_order_of_lanes_does_not_matter(program):
    """Whatever races for shared memory comes out differently when lanes, warps and copies take another turn."""
    # 229 tokens: 7 times 32 rows and once 16 for the 6 warps of backward
    lengths, keys = (37, 229, 16), (20, 90, 3)
    qkv = random_qkv(lengths, 32, torch.bfloat16, heads=2)
    grad_out = random_direction(qkv)
    runs = [
        emulate(program, qkv, lengths, keys, grad_out=grad_out, seed=seed, multiprocessor=multiprocessor)
        for seed, multiprocessor in ((0, A100), (1, A100), (2, H100), (3, 0), (4, 0))
    ]
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0][:3], again[:3]))


@pytest.mark.parametrize("multiprocessor", [A100, 0], ids=["staged-once", "staged-twice"])
def test_tokens_that_are_not_keys_are_never_asked(program, multiprocessor):
    lengths, keys = (20, 7, 20, 40), (5, 0, 20, 17)
    qkv = random_qkv(lengths, 64, torch.float16)
    is_key = torch.cat([torch.arange(n) < k for n, k in zip(lengths, keys)])
    clean = emulate(program, qkv, lengths, keys, grad_out=torch.ones(87, 1, 64).half(), multiprocessor=multiprocessor)
    qkv[~is_key, 1:] = torch.nan
    out, lse, grad, _ = emulate(
        program, qkv, lengths, keys, grad_out=torch.ones(87, 1, 64).half(), multiprocessor=multiprocessor
    )
    assert torch.equal(out, clean.out) and torch.equal(grad, clean.grad_qkv)
    assert (out[20:27] == 0).all(), "a sequence without keys gives zeros"
    assert (lse[:, 20:27] == -torch.inf).all()
    assert (grad[~is_key, 1:] == 0).all()
    assert (grad[20:27] == 0).all()
    assert grad.isfinite().all() and out.isfinite().all()


@pytest.mark.parametrize("lengths", [(0, 5, 0), (0, 0), ()])
def test_empty_sequences(program, lengths):
    qkv = random_qkv(lengths, 32, torch.float16)
    result = emulate(program, qkv, lengths, max_seqlen=max(lengths, default=0))
    assert result.out.isfinite().all() and result.grad_qkv.isfinite().all()
    assert len(result.out) == sum(lengths)


def test_strides_do_not_matter(program):
    lengths = (17, 5)
    qkv = random_qkv(lengths, 32, torch.float16, heads=2)
    grad_out = random_direction(qkv)
    wanted = emulate(program, qkv, lengths, grad_out=grad_out)
    heads_first = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    every_second = torch.stack((grad_out, torch.full_like(grad_out, torch.nan)), 1).flatten(0, 1)[::2]
    result = emulate(program, heads_first, lengths, grad_out=every_second)
    assert all(map(torch.equal, wanted[:3], result[:3]))


@pytest.mark.parametrize(
    ("lengths", "max_seqlen", "keys"),
    [
        ((17, 30), 16, None),
        ((17, 30), 30, (40, 40)),
        ((17, 30), 30, (-3, 17)),
        ((60, 2), 60, None),
        ((17, -9), 30, None),
    ],
    ids=["longer-than-told", "more-keys-than-tokens", "fewer-than-no-keys", "more-than-all-tokens", "falling"],
)
def test_broken_promises_touch_no_foreign_memory(program, lengths, max_seqlen, keys):
    """A GPU trusts the layout; when it lies, results are wrong, but nothing outside the tensors is read or written."""
    qkv = random_qkv((47,), 32, torch.float16)
    assert emulate(program, qkv, lengths, keys, max_seqlen=max_seqlen).out.shape == (47, 1, 32)


@pytest.mark.exhaustive  # of the emulation itself: a build for each fault
@pytest.mark.parametrize(
    ("broken", "symptom"),
    [
        (("wait_copies();", ""), "a thread ended before its copies"),
        (
            ("const bool real = tile * TILE + row < rows;", "const bool real = true;"),
            "AddressSanitizer",
        ),
        (("if (real) *reinterpret_cast<uint4*>", "*reinterpret_cast<uint4*>"), "AddressSanitizer"),
        (
            ("transpose_in_quad(word);\n        if (real)", "if (real) transpose_in_quad(word);\n        if (real)"),
            "lanes",
        ),
        (("__syncthreads();", ""), None),
    ],
    ids=["no-wait", "wild-read", "wild-write", "diverged-warp", "no-barrier"],
)
def test_emulation_tells_what_is_broken(main_object, tmp_path, broken, symptom):
    text = (CSRC / "packed_attention.cu").read_text()
    assert broken[0] in text
    for dim in set(HEAD_DIMS) - {32}:
        text = text.replace(f"    CASE({dim})\n", "")
    program = build(text.replace(*broken), main_object, tmp_path / "broken", "-O0")
    lengths = (50, 37)
    qkv = random_qkv(lengths, 32, torch.float16)
    if symptom:
        with pytest.raises(RuntimeError, match=symptom):
            emulate(program, qkv, lengths)
    else:
        assert emulate(program, qkv, lengths, multiprocessor=0).out.isnan().any()


def test_missing_library_is_told_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "build" / "libtessera_kernels.so")
    monkeypatch.delitem(sys.modules, "kernels.packed_attention.cuda", raising=False)
    with pytest.raises(ValueError, match=r"the CUDA kernels are not built: .* run cmake -S .* && cmake --build"):
        kernels.use("cuda", "packed_attention")
    library.LIBRARY.parent.mkdir()
    library.LIBRARY.write_text("not a library")
    with pytest.raises(ValueError, match="the CUDA kernels do not load"):
        kernels.use("cuda", "packed_attention")


# of a kernel: pass, dtype, head dim, of backward whether all is staged once
KERNEL = r"(forward|backward)_kernelINS_\d(\w?Float16)ELi(\d+)E(?:Lb([01])E)?"
EVERY_KERNEL = {
    (chip, kernel, dtype, str(dim), once)
    for chip in ("sm_80", "sm_90a")
    for kernel, once in (("forward", None), ("backward", "0"), ("backward", "1"))
    for dtype in ("Float16", "BFloat16")
    for dim in HEAD_DIMS
}


@pytest.mark.nvcc
@pytest.mark.long
def test_nothing_spills(built):
    """Nor does any kernel take more registers than its block of up to 8 warps, or two blocks for short rows, can have."""
    # two blocks of 8 warps forward, of 6 and 4 backward
    most = {("forward", "32"): 128, ("forward", "64"): 128, ("backward", "32"): 168}
    usage = inspect(built, KERNEL, "--dump-resource-usage")
    assert set(usage) == EVERY_KERNEL
    for kernel, text in usage.items():
        registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
        assert stack == 0, f"{kernel} spills {stack} bytes"
        assert registers <= most.get((kernel[1], kernel[3]), 255), f"{kernel} takes {registers} registers"


@pytest.mark.nvcc
@pytest.mark.long
def test_matrix_instructions_and_asynchronous_copies(built):
    code = inspect(built, KERNEL, "-sass")
    assert set(code) == EVERY_KERNEL
    for kernel, text in code.items():
        for instruction in (r"HMMA\.16816\.F32", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDGSTS\.E\.BYPASS\.128"):
            assert re.search(instruction, text), f"{kernel} has no {instruction}"
        assert not re.search(r"\b(ATOM|RED|LDL|STL)\b", text), f"{kernel} has atomics or local memory"


@pytest.mark.nvcc
@pytest.mark.long
def test_library_loads_and_refuses_what_it_cannot_do(built):
    script = f"""
import torch
from pathlib import Path
from kernels import library
library.LIBRARY = Path({str(built)!r})
import kernels
kernels.use("cuda", "packed_attention")
library.load()
from kernels.packed_attention import cuda
for name in ("forward", "backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tessera_cuda::packed_attention_{{name}}", "CUDA")
def told(call):
    try:
        call()
    except ValueError as error:
        return str(error)
layout = torch.tensor([0, 4], dtype=torch.int32), 4, None, 0.1
half = torch.zeros(4, 3, 1, 64, dtype=torch.float16)
assert "needs tensors on a GPU to run cuda" in told(lambda: kernels.packed_attention(half, *layout))
assert "takes float16 or bfloat16" in told(lambda: cuda.forward(half.float(), *layout))
assert "up to {LONGEST} tokens, got torch.float16 and {LONGEST + 1}" in told(
    lambda: cuda.forward(half, layout[0], {LONGEST + 1}, None, 0.1)
)
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def cuda(monkeypatch):
    """The module without the library."""
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.delitem(sys.modules, "kernels.packed_attention.cuda", raising=False)
    yield importlib.import_module("kernels.packed_attention.cuda")
    del sys.modules["kernels.packed_attention.cuda"]


def test_longest_sequence_is_told_alike_in_python_and_cpp(cuda):
    (cpp,) = re.findall(r"MAX_LENGTH = (\d+);", (CSRC / "packed_attention.h").read_text())
    assert int(cpp) == cuda.MAX_LENGTH == LONGEST


def test_only_rows_that_are_not_in_whole_chunks_are_copied(cuda):
    x = torch.randn(9, 3, 2, 32).half()
    for good in (x, x[::2], x[1:], x[:, :, 1:]):
        assert in_chunks(good) is good
    for bad in (x.flatten()[1:577].view(3, 3, 2, 32), x[..., ::2], x.transpose(2, 3)):
        copied = in_chunks(bad)
        assert copied.is_contiguous() and copied.data_ptr() % 16 == 0
        assert torch.equal(copied, bad)


@pytest.mark.gpu
@pytest.mark.nvcc
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_on_a_gpu(built, dim, dtype, monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", built)
    lengths = (*LENGTHS, LONGEST)
    keys = mixed_keys(lengths)
    layout = (
        torch.tensor([0, *lengths], device="cuda").cumsum(0).int(),
        LONGEST,
        torch.tensor(keys, device="cuda", dtype=torch.int32),
    )

    def run(implementation):
        def attend(qkv):
            kernels.use(implementation if qkv.dtype in HALF else "reference", "packed_attention")
            return kernels.packed_attention(qkv, *layout)

        return attend

    qkv = random_qkv(lengths, dim, dtype, heads=3).cuda()
    assert_agrees(run("cuda"), run("reference"), [qkv])
    first, second = (run("cuda")(qkv) for _ in range(2))
    assert torch.equal(first, second)
