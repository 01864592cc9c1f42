"""sinkhorn, sinkhorn_centre and sinkhorn_cross_entropy against the loop as it was published."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import chunks
from kernels.sinkhorn import cost
from tests.kernels.agreement import DEVICES, HALF_AND_FULL, assert_agrees, assert_close_as_plain


@pytest.fixture(autouse=True, params=["reference", "plain"])
def _traced_or_not(request):
    kernels.use(request.param, "soft_cross_entropy")
    kernels.use(request.param, "sinkhorn")


# what would do the same twice
ONLY_REFERENCE = pytest.mark.parametrize("_traced_or_not", ["reference"], indirect=True)


def published_sinkhorn(scores, temperature, iterations=3):
    """Prototypes x samples, brought to total 1, then rows to 1/K and columns to 1/B in turn."""
    q = torch.exp(scores / temperature).T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def published_cross_entropy(scores, student, temperature, student_temperature, iterations=3):
    wide = torch.promote_types(student.dtype, torch.float32)
    q = published_sinkhorn(scores.to(wide), temperature, iterations)
    return -(q * F.log_softmax(student.to(wide) / student_temperature, 1)).sum(1).mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_assignment(device, dtype, iterations):
    scores = torch.randn(37, 101, device=device).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    ours = kernels.sinkhorn(scores, 0.5, iterations)
    plain = published_sinkhorn(scores.to(wide), 0.5, iterations)
    assert_close_as_plain(ours, plain, published_sinkhorn(scores.double(), 0.5, iterations))
    torch.testing.assert_close(ours.sum(1), torch.ones_like(ours[:, 0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_softmax_of_centred_scores_is_the_assignment(device, dtype, iterations):
    scores = torch.randn(37, 101, device=device).to(dtype)
    centre = kernels.sinkhorn_centre(scores.requires_grad_(), 0.5, iterations)
    wide = torch.promote_types(dtype, torch.float32)
    assert centre.dtype == wide and not centre.requires_grad
    torch.testing.assert_close(centre.mean(), torch.zeros_like(centre[0]))
    found = F.softmax((scores.detach().to(wide) - centre) / 0.5, 1)
    plain = published_sinkhorn(scores.detach().to(wide), 0.5, iterations)
    assert_close_as_plain(found, plain, published_sinkhorn(scores.detach().double(), 0.5, iterations))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_that_overflow_the_published_loop_in_fp32(device, dtype):
    """exp(20 / 0.05) is 5e173, which only fp64 holds; a logit of 400 is known to 400 units in the last place of 1."""
    scores = ((torch.rand(257, 65, device=device) * 2 - 1) * 20).to(dtype)
    truth = published_sinkhorn(scores.double(), 0.05)
    ours = kernels.sinkhorn(scores, 0.05)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=800 * torch.finfo(dtype).eps)


def test_scores_that_underflow_the_published_loop_even_in_fp64():
    """A sample and a prototype that all others outdo by exp(800) still get their share, written here in logarithms."""
    scores = (torch.rand(49, 65, dtype=torch.float64) * 2 - 1) * 20
    scores[0], scores[1], scores[:, 2], scores[:, 3] = 20, -20, 20, -20
    assert published_sinkhorn(scores, 0.05).isnan().any()
    log_q = scores / 0.05
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    torch.testing.assert_close(kernels.sinkhorn(scores, 0.05), log_q.exp())
    torch.testing.assert_close(kernels.sinkhorn(scores.float(), 0.05).double(), log_q.exp(), rtol=0, atol=1e-4)


def test_a_shift_per_sample_would_be_wrong():
    scores = torch.randn(20, 10, dtype=torch.float64)
    shifted = scores + torch.randn(20, 1, dtype=torch.float64)
    assert not torch.allclose(published_sinkhorn(scores, 0.1), published_sinkhorn(shifted, 0.1), atol=1e-3)
    torch.testing.assert_close(kernels.sinkhorn(shifted, 0.1), published_sinkhorn(shifted, 0.1))
    torch.testing.assert_close(kernels.sinkhorn(scores + 1000, 0.1), published_sinkhorn(scores, 0.1))


@ONLY_REFERENCE
@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.integers(1, 7))
def test_any_number_of_rows_at_a_time(rows, prototypes, iterations, step):
    scores, student = torch.randn(2, rows, prototypes, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "rows_at_once", lambda x: step)
        torch.testing.assert_close(
            kernels.sinkhorn(scores, 0.1, iterations), published_sinkhorn(scores, 0.1, iterations)
        )
        assert_agrees(
            lambda s: kernels.sinkhorn_cross_entropy(scores, s, 0.1, 0.2, iterations),
            lambda s: published_cross_entropy(scores, s, 0.1, 0.2, iterations),
            [student],
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(17, 65), (50, 257), (1, 1)])
def test_cross_entropy_and_gradient(device, dtype, rows, prototypes):
    scores, student = torch.randn(2, rows, prototypes, device=device).to(dtype)
    assert_agrees(
        lambda s: kernels.sinkhorn_cross_entropy(scores.to(s.dtype), s, 0.1, 0.1),
        lambda s: published_cross_entropy(scores, s, 0.1, 0.1),
        [student],
    )


def test_dtypes_may_differ():
    scores, student = torch.randn(2, 9, 30)
    loss = kernels.sinkhorn_cross_entropy(scores.bfloat16(), student.requires_grad_(), 0.1, 0.1)
    loss.backward()
    torch.testing.assert_close(loss, published_cross_entropy(scores.bfloat16(), student, 0.1, 0.1))
    assert student.grad.dtype == torch.float32


def test_dtypes_of_two_widths_meet_in_the_wider():
    scores, student = torch.randn(2, 9, 30, dtype=torch.float64)
    wanted = published_cross_entropy(scores, student, 0.1, 0.1)
    for pair in ((scores, student.float()), (scores.float(), student)):
        loss = kernels.sinkhorn_cross_entropy(*pair, 0.1, 0.1)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy_of_large_scores_and_logits(device):
    """fp64 holds both exponents; what plain torch can do without overflowing stores the assignment."""
    scores, student = (torch.rand(2, 33, 300, device=device) * 2 - 1) * 20
    results = []
    for dtype in (torch.float64, torch.float32, torch.float32):
        leaf, ours = student.to(dtype).requires_grad_(), len(results) == 2
        if ours:
            loss = kernels.sinkhorn_cross_entropy(scores, leaf, 0.05, 0.1)
        else:
            q = kernels.sinkhorn(scores.to(dtype), 0.05)
            loss = -(q * F.log_softmax(leaf / 0.1, 1)).sum(1).mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for truth, plain, found in zip(*results, strict=True):
        assert_close_as_plain(found, plain, truth)


def test_a_prototype_that_one_sample_cannot_have():
    scores, student = torch.randn(2, 9, 30)
    scores[4, 7:20] = -torch.inf
    loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
    torch.testing.assert_close(loss, published_cross_entropy(scores, student, 0.1, 0.1))


def test_what_is_not_a_number_is_not_hidden():
    scores, student = torch.randn(2, 9, 30)
    scores[4, 7] = torch.nan
    assert kernels.sinkhorn_centre(scores, 0.1).isnan().all()
    assert kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1).isnan()


def test_gradient_goes_to_the_student_only():
    scores, student = torch.randn(2, 9, 30).requires_grad_().unbind(0)
    assert not kernels.sinkhorn(scores, 0.1).requires_grad
    loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
    assert torch.autograd.grad(loss, (scores, student), allow_unused=True)[0] is None


def test_targets_are_not_stored():
    """Backward holds the two inputs and some vectors; nothing else of size [B, K]."""
    kept = []
    scores, student = torch.randn(2, 16, 40)
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
    large = {x.data_ptr() for x in kept if x.numel() >= scores.numel()}
    assert large == {scores.data_ptr(), student.data_ptr()}


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    scores, student = torch.zeros(0, 5, device=device), torch.zeros(0, 5, device=device, requires_grad=True)
    loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert grad.shape == (0, 5)
    assert kernels.sinkhorn(scores, 0.1).shape == (0, 5)


def test_strides_do_not_matter():
    scores, student = torch.randn(2, 9, 30)
    strided = [x.T.contiguous().T for x in (scores, student)]
    torch.testing.assert_close(kernels.sinkhorn(strided[0], 0.1), kernels.sinkhorn(scores, 0.1))
    torch.testing.assert_close(
        kernels.sinkhorn_cross_entropy(*strided, 0.1, 0.1), kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device):
    scores, student = torch.randn(2, 33, 1000, device=device)
    student.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
        runs.append((kernels.sinkhorn(scores, 0.1), loss, *torch.autograd.grad(loss, student)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@ONLY_REFERENCE
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    ops = torch.ops.tessera
    scores = torch.randn(5, 7, dtype=torch.float64, device=device)
    log_u = torch.randn(7, dtype=torch.float64, device=device)
    torch.library.opcheck(ops.sinkhorn_balance.default, (scores, 0.1, 3, "reference"))
    torch.library.opcheck(ops.sinkhorn_sweep.default, (scores, None, 0.1, "reference"))
    torch.library.opcheck(ops.sinkhorn_sweep.default, (scores, log_u, 0.1, "reference"))
    torch.library.opcheck(ops.sinkhorn_assign.default, (scores, log_u, 0.1, "reference"))


def both(scores, student, group=None):
    return kernels.sinkhorn(scores, 0.1, 3, group), kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.2, 3, group)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    scores, student = torch.randn(2, 9, 12, device=device)
    student.requires_grad_()
    results = []
    for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        assignment, loss = f(scores, student)
        results.append((assignment, loss, *torch.autograd.grad(loss, student)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


ROWS = (5, 12)


def one_rank(rank: int, folder: str, implementation: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cpu":
        # a new process: Triton's kernels are not defined yet
        os.environ["TRITON_INTERPRET"] = "1"
    for op in ("sinkhorn", "soft_cross_entropy"):
        kernels.use(implementation, op)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(ROWS))
    whole = torch.load(f"{folder}/input.pt", map_location=device)
    scores, student = (x.split(ROWS)[rank] for x in whole)
    student = student.clone().requires_grad_()
    assignment, loss = both(scores, student, dist.group.WORLD)
    results = [assignment, loss.detach(), *torch.autograd.grad(loss, student)]
    # once more with all rows on the last rank
    rows = sum(ROWS) if rank == len(ROWS) - 1 else 0
    results += both(whole[0][:rows], whole[1][:rows], dist.group.WORLD)
    torch.save([x.cpu() for x in results], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check_ranks_with_unequal_rows(folder: Path, implementation: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """They find what the published loop finds in one process in float64, also where one of them has no rows."""
    scores, student = torch.randn(2, sum(ROWS), 9, dtype=dtype)
    torch.save((scores, student), folder / "input.pt")
    mp.spawn(one_rank, (str(folder), implementation, device), nprocs=len(ROWS))
    scores, student = scores.double(), student.double().requires_grad_()
    whole = published_sinkhorn(scores, 0.1)
    whole_loss = published_cross_entropy(scores, student, 0.1, 0.2)
    (whole_grad,) = torch.autograd.grad(whole_loss, student)
    per_row = -(whole * F.log_softmax(student.detach() / 0.2, 1)).sum(1)
    assert ROWS[0] != ROWS[1]
    for rank, (wanted, losses, grads) in enumerate(
        zip(whole.split(ROWS), per_row.split(ROWS), whole_grad.split(ROWS), strict=True)
    ):
        assignment, loss, grad, one_sided, one_sided_loss = torch.load(folder / f"{rank}.pt")
        has_all = rank == len(ROWS) - 1
        for ours, truth in (
            (assignment, wanted),
            (loss, losses.mean()),
            (grad * ROWS[rank], grads * sum(ROWS)),
            (one_sided, whole if has_all else whole[:0]),
            (one_sided_loss, whole_loss.detach() * has_all),
        ):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, truth.to(dtype))


def test_ranks_with_unequal_rows_find_what_one_process_finds(tmp_path: Path):
    check_ranks_with_unequal_rows(tmp_path, "reference", torch.float64)


def test_compiles_with_a_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        scores, student = torch.randn(2, 9, 12)
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        results = compiled(scores, student, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(results, both(scores, student))


@ONLY_REFERENCE
def test_cost_reads_once_per_iteration_and_once_more():
    assign, forward, backward = cost(2048, 65536, element_size=2, iterations=3)
    elements = 2048 * 65536
    assert assign.bytes == (8 + 4) * elements
    assert forward.bytes == (8 + 2) * elements
    assert backward.bytes == 6 * elements


SCORES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((SCORES[0], 0.1), r"needs scores \[rows, prototypes\] in float16, .*, got torch.float32 \[3\]"),
        ((SCORES.int(), 0.1), r"needs scores .* in .* float64, got torch.int32"),
        ((SCORES.to(torch.float8_e4m3fn), 0.1), "needs scores .* got torch.float8_e4m3fn"),
        ((SCORES[:, :0], 0.1), r"needs scores .* got torch.float32 \[2, 0\]"),
        ((SCORES, 0), "needs a positive temperature, got 0"),
        ((SCORES, 0.1, 0), "needs at least 1 iteration, got 0"),
    ],
)
@pytest.mark.parametrize("op", ["sinkhorn", "sinkhorn_centre"])
def test_bad_input_is_told_in_one_sentence(op, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{op} {sentence}"):
        getattr(kernels, op)(*arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((SCORES[0], SCORES, 0.1, 0.1), r"needs scores \[rows, prototypes\]"),
        (
            (SCORES, SCORES[:1], 0.1, 0.1),
            r"needs student_logits of shape \[2, 3\] in float16, .* on cpu, got torch.float32 \[1, 3\] on cpu",
        ),
        ((SCORES, SCORES.int(), 0.1, 0.1), "needs student_logits .* got torch.int32"),
        ((SCORES, SCORES.to("meta"), 0.1, 0.1), "needs student_logits .* on cpu, got .* on meta"),
        ((SCORES, SCORES, 0, 0.1), "needs a positive teacher_temperature, got 0"),
        ((SCORES, SCORES, 0.1, -1), "needs a positive student_temperature, got -1"),
        ((SCORES, SCORES, 0.1, 0.1, 0), "needs at least 1 iteration, got 0"),
    ],
)
def test_bad_cross_entropy_input_is_told_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=f"^sinkhorn_cross_entropy {sentence}"):
        kernels.sinkhorn_cross_entropy(*arguments)
