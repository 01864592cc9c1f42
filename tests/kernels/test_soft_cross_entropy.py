"""soft_cross_entropy against softmax, log-softmax and a product, as published."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import chunks
from kernels.soft_cross_entropy import cost
from tests.kernels.agreement import DEVICES, HALF_AND_FULL, assert_agrees


@pytest.fixture(autouse=True, params=["reference", "plain"])
def _traced_or_not(request):
    kernels.use(request.param, "soft_cross_entropy")


# what would do the same twice
ONLY_REFERENCE = pytest.mark.parametrize("_traced_or_not", ["reference"], indirect=True)


def plain_soft_cross_entropy(
    teacher, student, teacher_temperature, student_temperature, centre=None, weights=None, teacher_rows=None
):
    wide = torch.promote_types(student.dtype, torch.float32)
    centred = teacher.to(wide) - (0 if centre is None else centre)
    q = F.softmax(centred / teacher_temperature, 1)
    log_p = F.log_softmax(student.to(wide) / student_temperature, 1)
    if teacher_rows is None:
        losses = -(q * log_p).sum(1)
    else:
        no_teacher = torch.zeros_like(q[:1])
        q = torch.cat((q, no_teacher))
        losses = sum(-(q[rows] * log_p).sum(1) for rows in teacher_rows.view(len(student), -1).T)
    return losses.mean() if weights is None else (weights.to(wide) * losses).sum()


def random_input(teachers, students, prototypes, dtype=torch.float32, device="cpu", size=1.0):
    """Both logits, uniform in +-size, and a centre."""
    teacher, student = (
        ((torch.rand(rows, prototypes, device=device) * 2 - 1) * size).to(dtype) for rows in (teachers, students)
    )
    return teacher, student, torch.randn(prototypes, device=device) * size / 4


def random_rows(teachers, students, met, device="cpu"):
    """Names of teacher rows, none among them."""
    return torch.randint(-1, teachers, (students, met), device=device)


def agrees(teacher, student, *temperatures, **options):
    assert_agrees(
        lambda s: kernels.soft_cross_entropy(teacher.to(s.dtype), s, *temperatures, **options),
        lambda s: plain_soft_cross_entropy(teacher.to(s.dtype), s, *temperatures, **options),
        [student],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 1), (17, 65), (50, 257), (3, 4099)])
@pytest.mark.parametrize("temperatures", [(0.04, 0.1), (0.1, 0.04), (1, 1)])
def test_values_and_gradients(device, dtype, rows, prototypes, temperatures):
    teacher, student, centre = random_input(rows, rows, prototypes, dtype, device)
    agrees(teacher, student, *temperatures)
    agrees(teacher, student, *temperatures, centre=centre, weights=torch.rand(rows, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("temperatures", [(0.04, 0.1), (0.1, 0.1)])
@pytest.mark.parametrize("met", [0, 2])
def test_large_logits(device, dtype, temperatures, met):
    """exp(20 / 0.04) is 1e217, and a row may agree with its teacher to the last bit."""
    teacher, student, centre = random_input(33, 33, 301, dtype, device, size=20)
    rows = random_rows(33, 33, met, device) if met else None
    agrees(teacher, student, *temperatures, centre=centre, teacher_rows=rows)
    agrees(teacher, teacher, *temperatures, teacher_rows=rows)
    agrees(teacher, student + 1000, *temperatures, teacher_rows=rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize(("teachers", "students", "met"), [(1, 1, 1), (5, 31, 1), (9, 40, 2), (40, 7, 3)])
def test_named_teacher_rows(device, dtype, teachers, students, met):
    teacher, student, centre = random_input(teachers, students, 129, dtype, device)
    rows, weights = random_rows(teachers, students, met, device), torch.rand(students, device=device)
    agrees(teacher, student, 0.04, 0.1, centre=centre, teacher_rows=rows)
    agrees(teacher, student, 0.04, 0.1, weights=weights, teacher_rows=rows[:, 0])


@ONLY_REFERENCE
@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.integers(0, 3), st.integers(1, 7),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_number_of_rows_at_a_time(teachers, students, prototypes, met, step, centred, weighted):
    teachers = teachers if met else students
    teacher, student, centre = random_input(teachers, students, prototypes, torch.float64)
    options = {"centre": centre if centred else None, "weights": torch.rand(students) if weighted else None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "rows_at_once", lambda x: step)
        agrees(
            teacher, student, 0.1, 0.2, teacher_rows=random_rows(teachers, students, met) if met else None, **options
        )  # fmt: skip


def test_multi_crop_in_one_call():
    """Two teacher views, five student views of which the first two are the teacher's: all pairs but a view with itself."""
    images, views, prototypes = 6, 5, 33
    teacher, student, centre = random_input(2 * images, views * images, prototypes, torch.float64)
    student.requires_grad_()
    q = F.softmax((teacher - centre) / 0.04, 1).chunk(2)
    log_p = F.log_softmax(student / 0.1, 1).chunk(views)
    terms = [-(q[i] * log_p[j]).sum(1).mean() for i in range(2) for j in range(views) if i != j]
    published = torch.stack(terms).mean()
    rows = torch.arange(2 * images).view(2, images).T.repeat(views, 1)
    rows[:images, 0] = rows[images : 2 * images, 1] = -1
    weights = torch.full((views * images,), 1 / (len(terms) * images))
    loss = kernels.soft_cross_entropy(teacher, student, 0.04, 0.1, centre, weights, rows)
    # weights are fp32
    torch.testing.assert_close(loss, published, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(published, student), rtol=1e-7, atol=1e-12
    )


def test_as_wide_as_the_widest_head():
    teacher, student, centre = random_input(3, 5, 131072)
    agrees(teacher, student[:3], 0.04, 0.1, centre=centre)
    agrees(teacher, student, 0.04, 0.1, centre=centre, teacher_rows=random_rows(3, 5, 2))


def test_dtypes_may_differ():
    teacher, student, centre = random_input(9, 9, 30)
    student.requires_grad_()
    loss = kernels.soft_cross_entropy(teacher.bfloat16(), student, 0.1, 0.1, centre)
    (grad,) = torch.autograd.grad(loss, student)
    wanted = plain_soft_cross_entropy(teacher.bfloat16(), student, 0.1, 0.1, centre)
    torch.testing.assert_close((loss, grad), (wanted, *torch.autograd.grad(wanted, student)))
    assert kernels.soft_cross_entropy(teacher.double(), student.half(), 0.1, 0.1).dtype == torch.float64


def test_a_centre_in_fp64_is_taken_as_exactly_as_teacher_logits_in_fp64():
    teacher, student, centre = random_input(9, 9, 30, torch.float64)
    centre, rows = centre.double() / 3, random_rows(9, 9, 2)
    assert (centre != centre.float()).any()
    for options in ({}, {"teacher_rows": rows}):
        agrees(teacher, student, 0.04, 0.1, centre=centre, **options)
    in_fp32 = kernels.soft_cross_entropy(teacher, student, 0.04, 0.1, centre.float())
    assert in_fp32 != kernels.soft_cross_entropy(teacher, student, 0.04, 0.1, centre)
    assert kernels.soft_cross_entropy(teacher, student.half(), 0.04, 0.1, centre).isfinite()


def test_gradient_goes_to_the_student_only():
    teacher, student, centre = random_input(4, 9, 30)
    leaves = [x.requires_grad_() for x in (teacher, centre, torch.rand(9), student)]
    loss = kernels.soft_cross_entropy(
        teacher, student, 0.1, 0.1, *leaves[1:3], teacher_rows=random_rows(4, 9, 2)
    )  # fmt: skip
    *others, grad = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert others == [None] * 3
    assert grad.abs().sum() > 0


def test_a_row_without_a_teacher_costs_nothing():
    teacher, student, _ = random_input(4, 3, 30)
    student.requires_grad_()
    rows = torch.tensor([[1, -1], [-1, -1], [0, 3]])
    loss = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, teacher_rows=rows)
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad[1] == 0).all()
    assert (grad[[0, 2]] != 0).any(1).all()
    none = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, teacher_rows=torch.full((3,), -1))
    assert none == 0


@pytest.mark.parametrize("named", [False, True])
def test_what_is_not_finite_shows(named):
    """One NaN in a row of either side makes the loss NaN; in a teacher row that nobody meets it does nothing."""
    rows = torch.tensor([0, 1, 1]) if named else None
    for bad in (torch.nan, torch.inf):
        for side in (0, 1):
            logits = list(random_input(3, 3, 30)[:2])
            logits[side][1, 7] = bad
            assert kernels.soft_cross_entropy(*logits, 0.1, 0.1, teacher_rows=rows).isnan()
    teacher, student, _ = random_input(3, 3, 30)
    teacher[2] = torch.nan
    student.requires_grad_()
    loss = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, teacher_rows=torch.tensor([0, -1, 1]))
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("named", [False, True])
def test_distributions_are_not_stored(named):
    """Backward holds the two inputs and some vectors; nothing else of size [B, K]."""
    kept = []
    teacher, student, centre = random_input(16, 16, 40)
    student.requires_grad_()
    rows = random_rows(16, 16, 2) if named else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, centre, teacher_rows=rows)
    large = {x.data_ptr() for x in kept if x.numel() >= teacher.numel()}
    assert large == {teacher.data_ptr(), student.data_ptr()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("named", [False, True])
def test_no_rows(device, named):
    teacher, student = torch.zeros(0, 5, device=device), torch.zeros(0, 5, device=device, requires_grad=True)
    for options in ({}, {"weights": torch.zeros(0, device=device)}):
        if named:
            options |= {"teacher_rows": torch.zeros(0, 2, dtype=torch.int64, device=device)}
        loss = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, **options)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss == 0
        assert grad.shape == (0, 5)


def test_strides_do_not_matter():
    teacher, student, centre = random_input(9, 9, 30)
    rows = random_rows(9, 9, 2)
    wanted = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, centre, teacher_rows=rows)
    strided = [x.T.contiguous().T for x in (teacher, student)]
    found = kernels.soft_cross_entropy(
        *strided, 0.1, 0.1, centre.repeat_interleave(2)[::2], teacher_rows=rows.T.contiguous().T
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("named", [False, True])
def test_same_bits_every_time(device, named):
    teacher, student, centre = random_input(33, 33, 1000, device=device)
    rows = random_rows(33, 33, 2, device) if named else None
    student.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.soft_cross_entropy(teacher, student, 0.04, 0.1, centre, teacher_rows=rows)
        runs.append((loss, *torch.autograd.grad(loss, student)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def check_op(implementation, dtype, device):
    ops = torch.ops.tessera
    teacher, student, centre = random_input(5, 5, 7, dtype, device)
    weights, rows = torch.rand(5, device=device), random_rows(5, 5, 2, device)
    for vectors in ((None, None, None), (centre, rows, weights)):
        given = teacher, student, *vectors, 0.04, 0.1, implementation
        torch.library.opcheck(
            ops.soft_cross_entropy_forward.default, (teacher, student.clone().requires_grad_(), *given[2:])
        )
    loss, *sums = ops.soft_cross_entropy_forward(*given)
    torch.library.opcheck(
            ops.soft_cross_entropy_backward.default, (loss, *given[:5], *sums, *given[5:])
        )  # fmt: skip


@ONLY_REFERENCE
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    check_op("reference", torch.float64, device)


def check_compiles(device):
    teacher, student, centre = random_input(9, 9, 12, device=device)
    rows, weights = random_rows(9, 9, 2, device), torch.rand(9, device=device)
    student.requires_grad_()

    def step(teacher, student, centre, weights, rows):
        named = kernels.soft_cross_entropy(teacher * 2, student * 3, 0.04, 0.1, centre, weights, rows)
        return named + kernels.soft_cross_entropy(teacher, student * 3, 0.04, 0.1)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(teacher, student, centre, weights, rows)
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    check_compiles(device)


@ONLY_REFERENCE
def test_cost_reads_every_row_once():
    forward, backward = cost(128, 640, 65536, element_size=2, pairs=1152)
    assert forward.bytes == (128 + 640) * 65536 * 2
    assert backward.bytes == (128 + 2 * 640) * 65536 * 2
    assert forward.flops > cost(128, 640, 65536, element_size=2)[0].flops


LOGITS, ROWS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((LOGITS[0], LOGITS), {}, r"teacher_logits \[rows, prototypes\] in float16, .*, got torch.float32 \[3\]"),
        ((LOGITS, LOGITS.int()), {}, r"student_logits \[rows, prototypes\] in .* got torch.int32"),
        ((LOGITS[:, :0], LOGITS), {}, r"teacher_logits .* got torch.float32 \[2, 0\]"),
        ((LOGITS[:, 1:], LOGITS), {}, r"as many prototypes in both logits, got \[2, 2\] and \[2, 3\]"),
        ((LOGITS[1:], LOGITS), {}, "teacher_rows where logits have different rows, got 1 and 2"),
        ((LOGITS, LOGITS), {"teacher_rows": ROWS.int()}, r"teacher_rows as int64 \[2\] or \[2, V\], got torch.int32"),
        ((LOGITS, LOGITS), {"teacher_rows": ROWS[:1]}, r"teacher_rows as int64 .* got torch.int64 \[1\]"),
        (
            (LOGITS, LOGITS),
            {"teacher_rows": ROWS[:, None][:, :0]},
            r"teacher_rows as int64 .* got torch.int64 \[2, 0\]",
        ),
        ((LOGITS, LOGITS), {"teacher_rows": ROWS + 2}, "teacher_rows between -1 and 1, got 2"),
        ((LOGITS, LOGITS), {"teacher_rows": ROWS - 2}, "teacher_rows between -1 and 1, got -2"),
        ((LOGITS[:0], LOGITS), {"teacher_rows": ROWS - 1}, "a teacher row where there are student rows, got none"),
        ((LOGITS, LOGITS), {"centre": LOGITS}, r"centre as fp32 \[3\], got torch.float32 \[2, 3\]"),
        ((LOGITS, LOGITS), {"centre": LOGITS[0].double()}, r"centre as fp32 \[3\], got torch.float64"),
        ((LOGITS, LOGITS.double()), {"centre": LOGITS[0].double()}, r"centre as fp32 \[3\], got torch.float64"),
        ((LOGITS.double(), LOGITS), {"centre": LOGITS[0].half()}, r"centre as fp32 or fp64 \[3\], got torch.float16"),
        ((LOGITS.double(), LOGITS), {"centre": LOGITS.double()}, r"centre as fp32 or fp64 \[3\], .* \[2, 3\]"),
        ((LOGITS, LOGITS), {"weights": LOGITS[0]}, r"weights as fp32 \[2\], got torch.float32 \[3\]"),
        ((LOGITS, LOGITS.to("meta")), {}, "one device for all inputs, got cpu and meta"),
        ((LOGITS, LOGITS), {"teacher_temperature": 0}, "a positive teacher_temperature, got 0"),
        ((LOGITS, LOGITS), {"student_temperature": -1}, "a positive student_temperature, got -1"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, options, sentence):
    options = {"teacher_temperature": 0.04, "student_temperature": 0.1} | options
    with pytest.raises(ValueError, match=f"soft_cross_entropy needs {sentence}"):
        kernels.soft_cross_entropy(*arguments, **options)
