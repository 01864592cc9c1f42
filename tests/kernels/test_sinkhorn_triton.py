"""sinkhorn and sinkhorn_cross_entropy in Triton against the loop as it was published."""

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.agreement import assert_agrees, assert_close_as_plain
from tests.kernels.interpreted import DEVICE, MARKS, poisoned_memory
from tests.kernels.test_sinkhorn import (
    both,
    check_ranks_with_unequal_rows,
    published_cross_entropy,
    published_sinkhorn,
)

pytestmark = MARKS
# no matrix product here, so the interpreter may round bf16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["whole rows", "two passes", "two passes over small blocks"]

# `kernels.sinkhorn` is the function
triton_sinkhorn = importlib.import_module("kernels.sinkhorn.triton")


def choose(implementation: str) -> None:
    """For both ops that a cross-entropy is made of."""
    for op in ("sinkhorn", "soft_cross_entropy"):
        kernels.use(implementation, op)


@pytest.fixture(autouse=True)
def _in_triton():
    choose("triton")


def take(form: str, patch: pytest.MonkeyPatch) -> None:
    """Rows of any width go through the form; small blocks: several of them, of several tiles and slices each."""
    if form != "whole rows":
        patch.setattr(triton_sinkhorn, "_LARGEST_WHOLE", 0)
    if form == "two passes over small blocks":
        patch.setattr(triton_sinkhorn, "_WIDE", triton_sinkhorn._Tile(8, 64))
        patch.setattr(triton_sinkhorn, "_WIDTH", 128)
        patch.setattr(triton_sinkhorn, "_block", lambda rows, prototypes, element_size: 16)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    take(request.param, monkeypatch)


def assert_assigns_as_published(scores, temperature, iterations=3):
    """As near as logarithms in plain torch are, which are less near than products while these neither over- nor
    underflow, and to a millionth."""
    with poisoned_memory():
        ours = kernels.sinkhorn(scores, temperature, iterations)
    choose("reference")
    plain = kernels.sinkhorn(scores, temperature, iterations)
    choose("triton")
    truth = published_sinkhorn(scores.double(), temperature, iterations)
    assert_close_as_plain(ours, plain, truth)
    assert (ours - truth).norm() <= 1e-6 * truth.norm()
    torch.testing.assert_close(ours.sum(1), torch.ones_like(ours[:, 0]))


def assert_cross_entropy_as_published(scores, student, temperature, student_temperature, iterations=3):
    with poisoned_memory():
        assert_agrees(
            lambda s: kernels.sinkhorn_cross_entropy(scores, s, temperature, student_temperature, iterations),
            lambda s: published_cross_entropy(scores, s, temperature, student_temperature, iterations),
            [student],
        )


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 1), (1, 65), (2, 17), (17, 3), (63, 64), (64, 63), (65, 200)])
def test_assignment(dtype, rows, prototypes):
    """Exponents of up to 20, as cosines have at this temperature."""
    scores = torch.rand(rows, prototypes, device=DEVICE).mul_(2).sub_(1).to(dtype)
    assert_assigns_as_published(scores, 0.05)


@pytest.mark.parametrize(
    ("rows", "prototypes"), [(1000, 17), (3, 1000), (65, 1000), (1, 3001), (17, 3001), (3001, 2), (1000, 1)]
)
def test_assignment_of_many(rows, prototypes):
    """In the forms that are chosen for them."""
    assert_assigns_as_published(torch.randn(rows, prototypes, device=DEVICE), 0.5)


@pytest.mark.long
def test_assignment_to_more_than_a_program_holds():
    assert_assigns_as_published(torch.randn(2, triton_sinkhorn._LARGEST_WHOLE + 1, device=DEVICE).half(), 0.5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_iterations(iterations):
    assert_assigns_as_published(torch.randn(37, 101, device=DEVICE), 0.5, iterations)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(257, 65), (3, 300), (1, 2)])
def test_scores_that_overflow_the_published_loop_in_fp32(dtype, rows, prototypes):
    """exp(20 / 0.05) is 5e173, which only fp64 holds. In fp32 an exponent of 400 is known to 1.5e-5, and so is Q."""
    scores = torch.rand(rows, prototypes, device=DEVICE).mul_(40).sub_(20).to(dtype)
    truth = published_sinkhorn(scores.double(), 0.05)
    with poisoned_memory():
        ours = kernels.sinkhorn(scores, 0.05)
    assert (ours - truth).norm() <= 3e-5 * truth.norm()
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=400 * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("form")
def test_scores_that_underflow_the_published_loop_even_in_fp64():
    scores = (torch.rand(49, 65, device=DEVICE) * 2 - 1) * 20
    scores[0], scores[1], scores[:, 2], scores[:, 3] = 20, -20, 20, -20
    assert published_sinkhorn(scores.double(), 0.05).isnan().any()
    log_q = scores.double() / 0.05
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    torch.testing.assert_close(kernels.sinkhorn(scores, 0.05).double(), log_q.exp(), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("form")
def test_what_is_not_a_number_is_not_hidden():
    scores = torch.randn(20, 40, device=DEVICE)
    scores[7, 9] = torch.nan
    assert kernels.sinkhorn(scores, 0.1).isnan().all()
    assert kernels.sinkhorn_cross_entropy(scores, torch.randn(20, 40, device=DEVICE), 0.1, 0.1).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 1), (1, 1000), (3, 17), (17, 65), (65, 64), (200, 3), (5, 3001)])
def test_cross_entropy_and_gradient(dtype, rows, prototypes):
    scores, student = torch.randn(2, rows, prototypes, device=DEVICE).to(dtype)
    assert_cross_entropy_as_published(scores, student, 0.2, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_of_large_scores_and_logits(dtype):
    """fp64 holds both exponents; the reference in fp32 is what plain torch can do without overflowing."""
    scores, student = torch.rand(2, 33, 300, device=DEVICE).mul_(40).sub_(20).to(dtype)
    leaves = [student.to(d).requires_grad_() for d in (torch.float64, dtype, dtype)]
    truth = published_cross_entropy(scores.double(), leaves[0], 0.05, 0.1)
    choose("reference")
    plain = kernels.sinkhorn_cross_entropy(scores, leaves[1], 0.05, 0.1)
    plain_grad = torch.autograd.grad(plain, leaves[1])[0]
    choose("triton")
    with poisoned_memory():
        ours = kernels.sinkhorn_cross_entropy(scores, leaves[2], 0.05, 0.1)
        grad = torch.autograd.grad(ours, leaves[2])[0]
    assert_close_as_plain(ours, plain, truth)
    assert_close_as_plain(grad, plain_grad, torch.autograd.grad(truth, leaves[0])[0])


@settings(max_examples=20)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from(FORMS), st.sampled_from(DTYPES), st.integers(1, 3))
def test_any_shape(rows, prototypes, form, dtype, iterations):
    with pytest.MonkeyPatch.context() as patch:
        take(form, patch)
        scores, student = torch.randn(2, rows, prototypes, device=DEVICE).to(dtype)
        assert_assigns_as_published(scores, 0.5, iterations)
        assert_cross_entropy_as_published(scores, student, 0.2, 0.1, iterations)


@pytest.mark.usefixtures("form")
def test_nothing_as_large_as_the_scores_is_stored():
    """Of an iteration, and of the loss; backward keeps the two inputs and some vectors."""
    kept = []
    scores, student = torch.randn(2, 256, 320, device=DEVICE)
    with (
        poisoned_memory() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        kernels.sinkhorn_cross_entropy(scores, student.requires_grad_(), 0.1, 0.1, 2)
    assert 0 < max(sizes) < scores.nbytes / 4
    large = {x.data_ptr() for x in kept if x.numel() >= scores.numel()}
    assert large == {scores.data_ptr(), student.data_ptr()}


@pytest.mark.usefixtures("form")
def test_no_rows():
    scores, student = torch.zeros(0, 50, device=DEVICE), torch.zeros(0, 50, device=DEVICE, requires_grad=True)
    with poisoned_memory():
        loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
        (grad,) = torch.autograd.grad(loss, student)
        assert kernels.sinkhorn(scores, 0.1).shape == (0, 50)
        for log_u in (None, torch.zeros(50, device=DEVICE)):
            column_lse = torch.ops.tessera.sinkhorn_sweep(scores, log_u, 0.1, "triton")
            # what another process adds to it is all there is
            assert (column_lse == -torch.inf).all()
    assert loss == 0
    assert grad.shape == (0, 50)


@pytest.mark.usefixtures("form")
def test_strides_do_not_matter():
    scores, student = torch.randn(2, 20, 48, device=DEVICE)
    results = []
    for strided in (
        (scores, student),
        [x.T.contiguous().T for x in (scores, student)],
        [x.repeat_interleave(2, 1)[:, ::2] for x in (scores, student)],
        [torch.cat((x, x), 1)[:, 48:] for x in (scores, student)],
    ):
        pair = [x.detach().requires_grad_() for x in strided]
        loss = kernels.sinkhorn_cross_entropy(*pair, 0.1, 0.1)
        results.append((kernels.sinkhorn(strided[0], 0.1), loss, torch.autograd.grad(loss, pair[1])[0]))
    for other in results[1:]:
        for plain, strided in zip(results[0], other, strict=True):
            torch.testing.assert_close(strided, plain)


def test_dtypes_may_differ():
    scores, student = torch.randn(2, 9, 30, device=DEVICE)
    loss = kernels.sinkhorn_cross_entropy(scores.half(), student.requires_grad_(), 0.1, 0.1)
    loss.backward()
    torch.testing.assert_close(loss, published_cross_entropy(scores.half(), student, 0.1, 0.1))
    assert student.grad.dtype == torch.float32


def test_gradient_goes_to_the_student_only():
    scores, student = torch.randn(2, 9, 30, device=DEVICE).requires_grad_().unbind(0)
    assert not kernels.sinkhorn(scores, 0.1).requires_grad
    loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
    assert torch.autograd.grad(loss, (scores, student), allow_unused=True)[0] is None


@pytest.mark.usefixtures("form")
def test_same_bits_every_time():
    scores, student = torch.randn(2, 70, 300, device=DEVICE)
    student.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.sinkhorn_cross_entropy(scores, student, 0.1, 0.1)
        runs.append((kernels.sinkhorn(scores, 0.1), loss, *torch.autograd.grad(loss, student)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(2048, 65536), (300, 131072), (1, 65537), (4096, 8192), (1023, 3000)])
def test_published_heads_on_a_gpu(dtype, rows, prototypes):
    """Here the programs of both passes run side by side, and each run orders them anew."""
    scores, student = torch.randn(2, rows, prototypes, device="cuda").to(dtype)
    assert_assigns_as_published(scores, 0.5)
    assert_cross_entropy_as_published(scores, student, 0.5, 0.2)
    runs = [kernels.sinkhorn(scores, 0.5) for _ in range(20)]
    assert all(torch.equal(runs[0], again) for again in runs[1:])


@pytest.mark.usefixtures("form")
def test_opcheck():
    ops = torch.ops.tessera
    scores, log_u = torch.randn(5, 7, device=DEVICE), torch.randn(7, device=DEVICE)
    torch.library.opcheck(ops.sinkhorn_balance.default, (scores, 0.1, 3, "triton"))
    for given_log_u in (None, log_u):
        torch.library.opcheck(ops.sinkhorn_sweep.default, (scores, given_log_u, 0.1, "triton"))
    torch.library.opcheck(ops.sinkhorn_assign.default, (scores, log_u, 0.1, "triton"))


@pytest.mark.usefixtures("form")
def test_compiles_without_a_graph_break():
    scores, student = torch.randn(2, 9, 12, device=DEVICE)
    student.requires_grad_()
    results = []
    for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        assignment, loss = f(scores, student)
        results.append((assignment, loss, *torch.autograd.grad(loss, student)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_ranks_with_unequal_rows_find_what_one_process_finds(tmp_path: Path):
    check_ranks_with_unequal_rows(tmp_path, "triton", torch.float32, DEVICE)


def test_what_it_does_not_take_is_told_in_one_sentence():
    scores, student = torch.randn(2, 3, 4, device=DEVICE)
    sentence = "in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it"
    for op in (kernels.sinkhorn, kernels.sinkhorn_centre):
        with pytest.raises(ValueError, match=f"^sinkhorn {sentence}"):
            op(scores.double(), 0.1)
    with pytest.raises(ValueError, match=f"^soft_cross_entropy {sentence}"):
        kernels.sinkhorn_cross_entropy(scores, student.double(), 0.1, 0.1)
