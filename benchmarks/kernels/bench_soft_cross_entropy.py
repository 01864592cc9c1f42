"""soft_cross_entropy against the published form: patches, row by row (iBOT), and multi-crop pairs (DINO, DINOv2)."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, wide
from kernels.soft_cross_entropy import cost

TEACHER, STUDENT = 0.04, 0.1
TEACHER_VIEWS, STUDENT_VIEWS = 2, 10
PAIRS = TEACHER_VIEWS * STUDENT_VIEWS - TEACHER_VIEWS


def published_rows(student: Tensor, teacher: Tensor, centre: Tensor) -> Tensor:
    q = F.softmax((teacher - centre) / TEACHER, 1)
    return -(q * F.log_softmax(wide(student) / STUDENT, 1)).sum(1).mean()


def published_multi_crop(student: Tensor, teacher: Tensor, centre: Tensor, *_: Tensor) -> Tensor:
    """A term for each pair of a teacher view and another student view."""
    q = F.softmax((teacher - centre) / TEACHER, 1).chunk(TEACHER_VIEWS)
    logits = (wide(student) / STUDENT).chunk(STUDENT_VIEWS)
    total = 0
    for i in range(TEACHER_VIEWS):
        for j in range(STUDENT_VIEWS):
            if i != j:
                total = total - (q[i] * F.log_softmax(logits[j], 1)).sum(1).mean()
    return total / PAIRS


def multi_crop(student: Tensor, teacher: Tensor, centre: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return kernels.soft_cross_entropy(teacher, student, TEACHER, STUDENT, centre, weights, rows)


def cases(at: Machine) -> Iterator[Case]:
    """On a GPU 2,048 patches, and 128 images in two global and eight local crops."""
    rows, images = 2 * at.rows, at.rows // 8
    for prototypes in (at.keys, 2 * at.keys):
        yield Case(
            "soft_cross_entropy", f"{rows} rows x {prototypes}", cost(rows, rows, prototypes, at.dtype.itemsize),
            partial(_inputs, at, rows, rows, prototypes),
            lambda student, teacher, centre: kernels.soft_cross_entropy(teacher, student, TEACHER, STUDENT, centre),
            published_rows, {}, leaves=(0,),
        )  # fmt: skip
        teachers, students = TEACHER_VIEWS * images, STUDENT_VIEWS * images
        yield Case(
            "soft_cross_entropy", f"{students} crops of {images} images x {prototypes}",
            cost(teachers, students, prototypes, at.dtype.itemsize, PAIRS * images),
            partial(_multi_crop_inputs, at, images, prototypes), multi_crop, published_multi_crop, {}, leaves=(0,),
        )  # fmt: skip


def _inputs(at: Machine, teachers: int, students: int, prototypes: int) -> tuple:
    """Student, teacher and centre."""
    return at.randn(students, prototypes), at.randn(teachers, prototypes), at.randn(prototypes).float() / 4


def _multi_crop_inputs(at: Machine, images: int, prototypes: int) -> tuple:
    """And of each student row the teacher rows and the weight."""
    rows = torch.arange(TEACHER_VIEWS * images, device=at.device).view(TEACHER_VIEWS, images).T.repeat(STUDENT_VIEWS, 1)
    for view in range(TEACHER_VIEWS):
        rows[view * images : (view + 1) * images, view] = -1
    weights = torch.full((len(rows),), 1 / (PAIRS * images), device=at.device)
    return *_inputs(at, TEACHER_VIEWS * images, len(rows), prototypes), rows, weights
