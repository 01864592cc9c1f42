"""The CUDA C++ kernels of Sinkhorn-Knopp, on machines that have no GPU.

Their source runs in csrc/host_emulation.h, compiled by g++ with AddressSanitizer: values, races within and between
blocks, wild accesses. Where nvcc is, it is compiled for the chips too: registers, spills, registration.
"""

import importlib
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import choice, library
from kernels.sinkhorn import reference
from tests.kernels.agreement import assert_close_as_plain
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

SOURCE = (CSRC / "sinkhorn.cu").read_text()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # as csrc/sinkhorn.h numbers them
TEMPERATURE = 0.1


class Plan(NamedTuple):
    groups: int
    slices: int
    batches: int
    resident: int


class Result(NamedTuple):
    plans: tuple[Plan, Plan]  # of balance and assign
    log_u: Tensor
    q: Tensor


@pytest.fixture(scope="session")
def main_object(tmp_path_factory) -> Path:
    return build_main(tmp_path_factory.mktemp("emulation") / "host_main.o")


@pytest.fixture(scope="session")
def program(main_object) -> Path:
    return build(SOURCE, main_object, main_object.with_name("sinkhorn"))


def narrowed(text: str) -> str:
    """Blocks of at most two warps: rows of more than 1,024 columns are cut, so small cases have many slices."""
    assert "constexpr int MAX_THREADS = 256;" in text
    return text.replace("constexpr int MAX_THREADS = 256;", "constexpr int MAX_THREADS = 64;")


@pytest.fixture(scope="session")
def narrow(main_object) -> Path:
    return build(narrowed(SOURCE), main_object, main_object.with_name("narrow"))


@pytest.fixture
def cuda(monkeypatch) -> ModuleType:
    """The module without the library."""
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.delitem(sys.modules, "kernels.sinkhorn.cuda", raising=False)
    yield importlib.import_module("kernels.sinkhorn.cuda")
    del sys.modules["kernels.sinkhorn.cuda"]


def emulate(
    program, scores, *, temperature=TEMPERATURE, iterations=3, start=None, seed=0, processors=4, multiprocessor=A100
) -> Result:
    """Both passes on one case in a process of its own; RuntimeError with what it says when it fails."""
    rows, prototypes = scores.shape
    integers = (
        *(rows, prototypes, DTYPES.index(scores.dtype), iterations, start is not None),
        *(scores.stride(0), spanned(scores), seed, processors, multiprocessor),
    )
    tensors = [scores, *([] if start is None else [start])]
    case = struct.pack("10qd", *integers, temperature) + b"".join(map(memory_of, tensors))
    said = answer(program, "sinkhorn", case)
    plans = tuple(Plan(*struct.unpack("4q", said[i * 32 : i * 32 + 32])) for i in range(2))
    numbers = torch.frombuffer(said[2 * 32 :], dtype=torch.float32)
    log_u, q = numbers.split([prototypes, rows * prototypes])
    return Result(plans, log_u, q.view(rows, prototypes))


def published_sinkhorn(scores, temperature, iterations=3):
    """Prototypes x samples, brought to total 1, then rows to 1/K and columns to 1/B in turn."""
    q = torch.exp(scores / temperature).T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def assert_right(cuda, program, scores, **options) -> Result:
    """Against the published loop in float64, by the tolerance rule; plain torch is the reference in the same dtype."""
    temperature, iterations = options.get("temperature", TEMPERATURE), options.get("iterations", 3)
    ours = emulate(program, cuda._in_chunks(scores), **options)
    plain = kernels.sinkhorn(scores, temperature, iterations)
    assert_close_as_plain(ours.q, plain, published_sinkhorn(scores.double(), temperature, iterations))
    return ours


SIZES = [(1, 1), (1, 3000), (257, 1), (37, 101), (5, 1025), (70, 63), (16, 2600)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), SIZES)
def test_values(cuda, narrow, rows, prototypes, dtype):
    ours = assert_right(cuda, narrow, torch.randn(rows, prototypes).to(dtype))
    assert ours.plans[0].slices == -(-prototypes // 1024)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_iterations(cuda, narrow, iterations):
    assert_right(cuda, narrow, torch.randn(37, 1100).half(), iterations=iterations, temperature=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", [True, False])
def test_rows_that_stay_in_shared_memory_and_rows_that_do_not(cuda, narrow, dtype, resident):
    """Four groups of two slices, each with seven batches of rows, on eight multiprocessors or on two."""
    ours = assert_right(cuda, narrow, torch.randn(101, 1280).to(dtype), processors=8 if resident else 2)
    assert ours.plans[0] == ours.plans[1] == (4, 2, 7, resident)


@pytest.mark.parametrize(("processors", "multiprocessor"), [(1, A100), (2, 20_000), (5, H100), (40, A100)], ids=str)
def test_any_gpu(cuda, narrow, processors, multiprocessor):
    """From one group to more groups than are merged by one warp."""
    scores = torch.randn(300, 65).bfloat16()
    ours = assert_right(cuda, narrow, scores, processors=processors, multiprocessor=multiprocessor)
    assert (ours.plans[0].groups > 32) == (processors == 40)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(9, 3000), (13, 8200), (40, 4097)])
def test_blocks_of_full_width(cuda, program, rows, prototypes, dtype):
    ours = assert_right(cuda, program, torch.randn(rows, prototypes).to(dtype), seed=1)
    assert ours.plans[0].slices == -(-prototypes // 4096)


@pytest.mark.long
def test_widest_rows(cuda, program):
    scores = torch.randn(5, cuda.MAX_PROTOTYPES).half()
    ours = assert_right(cuda, program, scores, iterations=2, processors=16)
    assert ours.plans[0].slices == 32
    with pytest.raises(RuntimeError, match="rows are wider than these kernels take"):
        emulate(program, scores.new_zeros(1, cuda.MAX_PROTOTYPES + 8))
    with pytest.raises(RuntimeError, match="the GPU has too few multiprocessors for rows of this width"):
        emulate(program, scores, processors=15)


@pytest.mark.parametrize("rows_and_prototypes", [(1, 1), (3, 2047), (64, 65), (501, 129), (33, 3001)], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.7])
def test_fp32_agrees_with_the_published_loop(cuda, narrow, rows_and_prototypes, temperature):
    """To 1e-6 of its size, for scores that are cosines."""
    scores = torch.rand(rows_and_prototypes) * 2 - 1
    ours = emulate(narrow, cuda._in_chunks(scores), temperature=temperature).q
    truth = published_sinkhorn(scores.double(), temperature)
    assert (ours - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(cuda, narrow, dtype):
    """exp(20 / 0.05) is 5e173; an exponent of 400 is known to 400 units in the last place of 1."""
    scores = ((torch.rand(57, 1065) * 2 - 1) * 20).to(dtype)
    ours = assert_right(cuda, narrow, scores, temperature=0.05)
    truth = published_sinkhorn(scores.double(), 0.05)
    torch.testing.assert_close(ours.q.double(), truth, rtol=0, atol=800 * torch.finfo(torch.float32).eps)


def test_rows_and_columns_that_others_outdo(cuda, narrow):
    """A sample and a prototype that all others outdo by exp(800) still get their share, written here in logarithms."""
    scores = (torch.rand(49, 65) * 2 - 1) * 20
    scores[0], scores[1], scores[:, 2], scores[:, 3] = 20, -20, 20, -20
    log_q = scores.double() / 0.05
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    ours = emulate(narrow, cuda._in_chunks(scores), temperature=0.05)
    torch.testing.assert_close(ours.q.double(), log_q.exp(), rtol=0, atol=1e-4)


def test_every_float16_score_can_be_held(cuda, narrow):
    scores = torch.tensor([65504.0, -65504.0, 0.0, 1.0]).half().repeat(9, 2)
    scores[3] = -65504
    ours = emulate(narrow, scores, temperature=0.05)
    assert (ours.q >= 0).all()
    torch.testing.assert_close(ours.q.sum(1), torch.ones(9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_lanes_and_blocks_does_not_matter(narrow, dtype):
    """Whatever races for memory comes out differently when lanes, warps, blocks and copies take another turn."""
    scores = torch.randn(90, 2056).to(dtype)
    runs = [emulate(narrow, scores, seed=seed, processors=3, multiprocessor=70_000) for seed in range(5)]
    assert runs[0].plans[0] == (3, 3, 8, False)
    for again in runs[1:]:
        assert again.plans == runs[0].plans
        assert all(map(torch.equal, runs[0][1:], again[1:]))


def test_sweeps_one_by_one_are_the_same(narrow):
    """Given log_u, one iteration is what a process group runs between its collectives; a number in all of log_u is free."""
    scores = torch.randn(41, 1104)
    log_u = None
    for _ in range(3):
        log_u = emulate(narrow, scores, iterations=1, start=log_u, seed=1).log_u
    together = emulate(narrow, scores, iterations=3).log_u
    torch.testing.assert_close(together - together.mean(), log_u - log_u.mean(), rtol=1e-6, atol=5e-6)
    truth = None
    for _ in range(3):
        truth = -reference.sweep(scores.double(), truth, TEMPERATURE)
    torch.testing.assert_close(log_u.double(), truth, rtol=1e-6, atol=1e-6)


def test_no_rows(narrow):
    ours = emulate(narrow, torch.zeros(0, 1032))
    assert (ours.log_u == torch.inf).all(), "another rank's rows decide"
    ours = emulate(narrow, torch.zeros(0, 1032), start=torch.zeros(1032))
    assert (ours.log_u == torch.inf).all()


def test_strides_do_not_matter(narrow):
    scores = torch.randn(21, 1032).half()
    wanted = emulate(narrow, scores)
    apart = torch.stack((scores, torch.full_like(scores, torch.nan)), 1).flatten(0, 1)[::2]
    longer = F.pad(scores, (0, 8), value=torch.nan)[:, :1032]
    assert apart.stride(0) == 2064 and longer.stride(0) == 1040
    for strided in (apart, longer):
        assert all(map(torch.equal, wanted[1:], emulate(narrow, strided)[1:]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_score_that_is_no_number_lets_no_block_wait_for_ever(narrow, bad):
    scores = torch.randn(21, 2056)
    scores[7, 1500] = bad
    assert emulate(narrow, scores).q.isfinite().all() == (bad == -torch.inf)


def test_a_prototype_that_one_sample_cannot_have(narrow):
    scores = torch.randn(21, 2056)
    scores[7, 1030:1050] = -torch.inf
    torch.testing.assert_close(emulate(narrow, scores).q, kernels.sinkhorn(scores, TEMPERATURE))


WRONG = "of plain torch"  # as the tolerance rule says it
BROKEN = {
    "no grid sync before the parts are read": ("    grid_sync();\n    merge_parts", "    merge_parts", WRONG),
    "no grid sync before log_u is read": ("    if (iteration + 1 < a.iterations) grid_sync();\n", "", WRONG),
    "every group writes the first part": ("parts + int64_t{stream.group} * a.slices * a.width", "parts", WRONG),
    "a part too far": ("parts + int64_t{stream.group} *", "parts + int64_t{stream.group + 1} *", "AddressSanitizer"),
    "a row's other slices are not waited for": ("await(words + other, news)", "words[other]", WRONG),
    "old words pass for new ones": ("const bool news = turn / 2 % 2 == 0;", "const bool news = true;", WRONG),
    "one set of words": ("* 2 + turn % 2) * LINES", "* 2) * LINES", "blocks wait for one another for ever"),
    "words that nobody writes": (
        "publish(words + slice,",
        "publish(words + slice / 2,",
        "blocks wait for one another for ever",
    ),
    "shares read before they are there": (
        "  __syncthreads();\n#pragma unroll\n  for (int line = 0; line < LINES; ++line) {\n    const float2 whole",
        "#pragma unroll\n  for (int line = 0; line < LINES; ++line) {\n    const float2 whole",
        WRONG,
    ),
    "a buffer filled before it was read": (
        "    const uint32_t place = stream.place(first + batch);\n",
        "    const uint32_t place = stream.place(first + batch);\n    stream.copy(first + batch + a.ahead);\n",
        WRONG,
    ),
    "copies not waited for": ("wait_copies_but(a.ahead - 1)", "wait_copies_but(a.ahead)", "ended before its copies"),
    "rows outside the group count": ("row + line < stream.rows ? share[line]", "row >= 0 ? share[line]", WRONG),
    "columns outside the row are read": ("max(0, min(left, 16))", "left > 0 ? 16 : 0", "AddressSanitizer"),
}


@pytest.mark.exhaustive  # of the emulation itself: a build for each fault
@pytest.mark.long
@pytest.mark.parametrize("name", [None, *BROKEN])
def test_emulation_tells_what_is_broken(cuda, main_object, tmp_path, name):
    text = narrowed(SOURCE)
    for other in ("BFloat16{}", "float{}"):
        text = text.replace(f"return run({other});", "break;")
    right, wrong, symptom = BROKEN.get(name, ("", "", ""))
    assert name is None or text.count(right) == 1
    program = build(text.replace(right, wrong, 1), main_object, tmp_path / "variant", "-O0")
    scores = torch.randn(35, 2055).half()

    def run():
        for seed in range(2):
            assert_right(cuda, program, scores, seed=seed, processors=3, multiprocessor=70_000)

    if name is None:
        run()
    else:
        with pytest.raises((RuntimeError, AssertionError), match=symptom):
            run()


def test_only_rows_that_are_not_in_whole_chunks_are_copied(cuda):
    x = torch.randn(9, 48).half()
    for good in (x, x[::2], x[1:], x[:, 8:], x[:, 8:21]):
        assert cuda._in_chunks(good) is good
    for bad in (x[:, 1:], x[:, ::2], x.T, torch.randn(9, 47).half(), x.flatten()[4:292].view(6, 48)):
        copied = cuda._in_chunks(bad)
        assert copied.stride(0) % 8 == 0 and copied.stride(1) == 1 and copied.data_ptr() % 16 == 0
        assert torch.equal(copied, bad)


def test_widest_row_is_told_alike_in_python_and_cpp(cuda):
    (cpp,) = re.findall(r"MAX_PROTOTYPES = (\d+);", (CSRC / "sinkhorn.h").read_text())
    assert int(cpp) == cuda.MAX_PROTOTYPES


class EmulatedLibrary:
    """What the library registers with torch, as a process of the emulation answers it."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def sinkhorn_balance(self, scores, start, temperature, iterations):
        return emulate(self.program, scores, temperature=temperature, iterations=iterations, start=start).log_u

    def sinkhorn_assign(self, scores, log_u, temperature):
        return emulate(self.program, scores, temperature=temperature, iterations=0, start=log_u).q


@pytest.fixture
def chosen_cuda(cuda, narrow, monkeypatch) -> None:
    """As after kernels.use("cuda", "sinkhorn"), with the emulation in the place of the library and of the GPU."""
    monkeypatch.setattr(cuda, "_ops", EmulatedLibrary(narrow))
    monkeypatch.setitem(choice._modules, ("sinkhorn", "cuda"), cuda)
    monkeypatch.setitem(choice._requested, "sinkhorn", "cuda")
    monkeypatch.setattr(choice, "_needs_gpu", choice._needs_gpu - {("sinkhorn", "cuda")})
    monkeypatch.delitem(choice._unusable, ("sinkhorn", "cuda"), raising=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_ops(chosen_cuda, dtype):
    scores, student = torch.randn(2, 19, 1029).to(dtype)
    student.requires_grad_()
    found = []
    for implementation in ("cuda", "reference"):
        choice._requested["sinkhorn"] = implementation
        loss = kernels.sinkhorn_cross_entropy(scores, student, TEMPERATURE, 0.2)
        outputs = kernels.sinkhorn(scores, TEMPERATURE), kernels.sinkhorn_centre(scores, TEMPERATURE), loss
        found.append((outputs, torch.autograd.grad(loss, student)))
    (ours, grad), (plain, plain_grad) = found
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, plain_grad)


def test_one_process_runs_all_iterations_at_once_and_a_group_one_by_one(chosen_cuda, tmp_path, monkeypatch):
    scores, asked = torch.randn(19, 1029), []
    balance = EmulatedLibrary.sinkhorn_balance

    def counted(self, scores, start, temperature, iterations):
        asked.append(iterations)
        return balance(self, scores, start, temperature, iterations)

    monkeypatch.setattr(EmulatedLibrary, "sinkhorn_balance", counted)
    alone = kernels.sinkhorn(scores, TEMPERATURE)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        together = kernels.sinkhorn(scores, TEMPERATURE, 3, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert asked == [3, 1, 1, 1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_done_is_told_in_one_sentence(chosen_cuda):
    double, wide = torch.randn(2, 3).double(), torch.zeros(1, 131080)
    with pytest.raises(
        ValueError, match=r"sinkhorn in CUDA C\+\+ takes float16, bfloat16 and float32 .* got torch.float64"
    ):
        kernels.sinkhorn(double, 0.1)
    with pytest.raises(ValueError, match=r"up to 131072 prototypes, got torch.float32 and 131080; the reference takes"):
        kernels.sinkhorn(wide, 0.1)


# of a kernel: its name and dtype
KERNEL = r"(balance|assign)_kernelI(?:NS_\d)?(f|\w?Float16)E"
EVERY_KERNEL = {
    (chip, kernel, dtype)
    for chip in ("sm_80", "sm_90a")
    for kernel in ("balance", "assign")
    for dtype in ("f", "Float16", "BFloat16")
}


@pytest.mark.nvcc
@pytest.mark.long
def test_nothing_spills(built):
    """Nor does any kernel take more registers than two blocks of 256 threads can have."""
    usage = inspect(built, KERNEL, "--dump-resource-usage")
    assert set(usage) == EVERY_KERNEL
    for kernel, text in usage.items():
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
        assert stack == local == 0, f"{kernel} spills {stack} bytes and has {local} in local memory"
        assert registers <= 128, f"{kernel} takes {registers} registers"


@pytest.mark.nvcc
@pytest.mark.long
def test_instructions(built):
    """Asynchronous copies, no sums by atomics, and integer ones for the barriers of the grid only."""
    code = inspect(built, KERNEL, "-sass")
    assert set(code) == EVERY_KERNEL
    for kernel, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{kernel} has local memory"
        assert not re.search(r"\b(ATOM|ATOMG|RED|REDG)\b\S*F(16|32|64)|\bREDUX\b", text), f"{kernel} has atomic sums"
        assert bool(re.search(r"\bATOM", text)) == (kernel[1] == "balance"), f"{kernel}: atomics"
        assert re.search(r"\bLDGSTS\.E\.BYPASS", text), f"{kernel}: copies"


@pytest.mark.nvcc
@pytest.mark.long
def test_library_loads(built):
    script = f"""
import torch
from pathlib import Path
from kernels import library
library.LIBRARY = Path({str(built)!r})
import kernels
kernels.use("cuda", "sinkhorn")
from kernels.sinkhorn import cuda
for name in ("balance", "assign"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tessera_cuda::sinkhorn_{{name}}", "CUDA")
try:
    kernels.sinkhorn(torch.zeros(2, 3), 0.1)
except ValueError as error:
    assert "sinkhorn needs tensors on a GPU to run cuda" in str(error)
else:
    raise AssertionError("CPU tensors were taken")
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.gpu
@pytest.mark.nvcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "prototypes"), [(1, 1), (257, 1), (37, 101), (2049, 3000), (16, 4097), (700, 65536), (64, 131072)]
)
def test_on_a_gpu(built, rows, prototypes, dtype, monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", built)
    scores = torch.randn(rows, prototypes, device="cuda").to(dtype)
    kernels.use("reference", "sinkhorn")
    plain, truth = kernels.sinkhorn(scores, TEMPERATURE), kernels.sinkhorn(scores.double(), TEMPERATURE)
    kernels.use("cuda", "sinkhorn")
    ours, again = (kernels.sinkhorn(scores, TEMPERATURE) for _ in range(2))
    assert_close_as_plain(ours, plain, truth)
    assert torch.equal(ours, again)
