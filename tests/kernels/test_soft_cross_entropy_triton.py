"""soft_cross_entropy in Triton against softmax, log-softmax and a product."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.interpreted import DEVICE, HAS_GPU, MARKS, poisoned_memory
from tests.kernels.test_soft_cross_entropy import agrees, check_compiles, check_op, random_input, random_rows

pytestmark = MARKS
ROOT = Path(__file__).parents[2]
# the interpreter is right about bf16 where no matrix product is
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "soft_cross_entropy")


def agrees_poisoned(*inputs, **options):
    with poisoned_memory():
        agrees(*inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 1), (17, 65), (66, 16), (5, 257), (3, 4099), (2, 8192)])
@pytest.mark.parametrize("temperatures", [(0.04, 0.1), (0.1, 0.04)])
def test_values_and_gradients(dtype, rows, prototypes, temperatures):
    teacher, student, centre = random_input(rows, rows, prototypes, dtype, DEVICE)
    agrees_poisoned(teacher, student, *temperatures)
    weights = torch.rand(rows, device=DEVICE)
    agrees_poisoned(teacher, student, *temperatures, centre=centre, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("met", [0, 2])
def test_large_logits(dtype, met):
    teacher, student, centre = random_input(13, 13, 2301, dtype, DEVICE, size=20)
    rows = random_rows(13, 13, met, DEVICE) if met else None
    agrees_poisoned(teacher, student, 0.04, 0.1, centre=centre, teacher_rows=rows)
    agrees_poisoned(teacher, teacher, 0.1, 0.1, teacher_rows=rows)
    agrees_poisoned(teacher, student + 1000, 0.04, 0.1, teacher_rows=rows)


@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
def test_rows_whose_largest_comes_last_or_first(rising):
    """Each new largest of teacher or student alone, and of both, rescales what was summed before."""
    steps = torch.linspace(-2, 2, 9301, device=DEVICE).expand(5, -1)
    teacher, student = (steps + torch.randn(5, 9301, device=DEVICE) / 10 for _ in range(2))
    agrees_poisoned(teacher, student if rising else student.flip(1), 0.1, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("teachers", "students", "met"), [(1, 1, 1), (5, 31, 1), (9, 20, 2), (40, 7, 3)])
def test_named_teacher_rows(dtype, teachers, students, met):
    teacher, student, centre = random_input(teachers, students, 1129, dtype, DEVICE)
    rows, weights = random_rows(teachers, students, met, DEVICE), torch.rand(students, device=DEVICE)
    agrees_poisoned(teacher, student, 0.04, 0.1, centre=centre, teacher_rows=rows)
    agrees_poisoned(teacher, student, 0.04, 0.1, weights=weights, teacher_rows=rows[:, 0])


@settings(max_examples=15)
@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(1, 2100), st.integers(0, 3), st.booleans(), st.booleans()
)  # fmt: skip
def test_any_shape(teachers, students, prototypes, met, centred, weighted):
    teachers = teachers if met else students
    teacher, student, centre = random_input(teachers, students, prototypes, torch.float16, DEVICE)
    options = {
        "centre": centre if centred else None,
        "weights": torch.rand(students, device=DEVICE) if weighted else None,
        "teacher_rows": random_rows(teachers, students, met, DEVICE) if met else None,
    }
    agrees_poisoned(teacher, student, 0.1, 0.2, **options)


@pytest.mark.parametrize("prototypes", [17409, pytest.param(131072, marks=pytest.mark.long)])
def test_wide_heads(prototypes):
    """17,409 is one more than the columns of 17 tiles, which makes parts of two."""
    teacher, student, centre = random_input(3, 3, prototypes, torch.float16, DEVICE)
    agrees_poisoned(teacher, student, 0.04, 0.1, centre=centre)
    agrees_poisoned(teacher, student, 0.04, 0.1, centre=centre, teacher_rows=random_rows(3, 3, 2, DEVICE))


def test_logits_of_two_dtypes():
    teacher, student, centre = random_input(9, 9, 300, device=DEVICE)
    student.requires_grad_()
    results = []
    for implementation in ("reference", "triton"):
        kernels.use(implementation, "soft_cross_entropy")
        loss = kernels.soft_cross_entropy(teacher.bfloat16(), student, 0.1, 0.1, centre)
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("named", [False, True])
def test_what_is_not_finite_shows(named):
    rows = torch.tensor([0, 1, 1], device=DEVICE) if named else None
    for bad in (torch.nan, torch.inf):
        for side in (0, 1):
            logits = list(random_input(3, 3, 30, device=DEVICE)[:2])
            logits[side][1, 7] = bad
            assert kernels.soft_cross_entropy(*logits, 0.1, 0.1, teacher_rows=rows).isnan()
    teacher, student, _ = random_input(3, 3, 30, device=DEVICE)
    teacher[2] = torch.nan
    student.requires_grad_()
    names = torch.tensor([0, -1, 1], device=DEVICE)
    loss = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, teacher_rows=names)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("met", [0, 2])
def test_nothing_as_large_as_the_logits_is_stored_but_the_gradient(met):
    teacher, student, centre = random_input(16, 16, 4096, torch.float16, DEVICE)
    rows = random_rows(16, 16, met, DEVICE) if met else None
    student.requires_grad_()
    with poisoned_memory() as sizes:
        loss = kernels.soft_cross_entropy(teacher, student, 0.04, 0.1, centre, teacher_rows=rows)
        forward = sum(sizes)
        loss.backward()
    assert 0 < forward < student.nbytes / 10
    assert sum(sizes) - forward == student.nbytes


@pytest.mark.parametrize("named", [False, True])
def test_no_rows(named):
    teacher, student = torch.zeros(0, 5, device=DEVICE), torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    for options in ({}, {"weights": torch.zeros(0, device=DEVICE)}):
        if named:
            options |= {"teacher_rows": torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)}
        with poisoned_memory():
            loss = kernels.soft_cross_entropy(teacher, student, 0.1, 0.1, **options)
            (grad,) = torch.autograd.grad(loss, student)
        assert loss == 0
        assert grad.shape == (0, 5)


def test_strides_do_not_matter():
    teacher, student, centre = random_input(9, 9, 300, device=DEVICE)
    rows = random_rows(9, 9, 2, DEVICE)
    results = []
    for t, s, c, named in (
        (teacher, student, centre, rows),
        (teacher.T.contiguous().T, student.T.contiguous().T, centre.repeat_interleave(2)[::2], rows.T.contiguous().T),
    ):
        leaf = s.detach().requires_grad_()
        loss = kernels.soft_cross_entropy(t, leaf, 0.1, 0.1, c, teacher_rows=named)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("named", [False, True])
def test_same_bits_every_time(named):
    teacher, student, centre = random_input(9, 9, 3000, torch.float16, DEVICE)
    rows = random_rows(9, 9, 2, DEVICE) if named else None
    student.requires_grad_()
    runs = []
    for _ in range(3):
        loss = kernels.soft_cross_entropy(teacher, student, 0.04, 0.1, centre, teacher_rows=rows)
        runs.append((loss, *torch.autograd.grad(loss, student)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_opcheck():
    check_op("triton", torch.float32, DEVICE)


def test_compiles_without_a_graph_break():
    check_compiles(DEVICE)


def test_what_it_does_not_take_is_told_in_one_sentence():
    logits = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="soft_cross_entropy in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.soft_cross_entropy(logits.float(), logits, 0.1, 0.1)
    if not HAS_GPU:
        rows = torch.tensor([3, 0])
        with pytest.raises(ValueError, match="needs teacher_rows between -1 and 1, got 3"):
            kernels.soft_cross_entropy(logits.float(), logits.float(), 0.1, 0.1, teacher_rows=rows)


PLACES = """
import importlib, json
from kernels.resources.registers import measure
variants = importlib.import_module("kernels.soft_cross_entropy.triton").variants
names = ("cross-entropy bf16 K 65536 V 0", "cross-entropy bf16 K 65536 V 2", "gradient bf16 K 65536 V 2")
print(json.dumps([measure(v, c)._asdict() for c in (80, 90) for v in variants(c) if v.name in names]))
"""


@pytest.mark.long
def test_the_entries_of_a_place_belong_to_one_thread():
    """Only the sums of four rows pass through shared memory, at the end; a tile that did would take 16 KB."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PLACES]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 6
    assert all(form["shared"] <= 64 and form["spills"] == 0 for form in found), found
