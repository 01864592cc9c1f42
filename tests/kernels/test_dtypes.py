"""Of every op, in every dtype that it takes: what the compiler is told of the reference is what it gives, and autocast around a
call changes nothing, neither values nor gradients.

Patches have no reference among the raw ops (plain torch is traced there); `test_patches_triton.py` checks theirs.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import kernels
from kernels import choice
from kernels.adamw import DTYPES as adamw_dtypes
from tests.kernels.agreement import HALF_AND_FULL

NAMES = [str(dtype).removeprefix("torch.") for dtype in HALF_AND_FULL]
ops = torch.ops.tessera


def cu_seqlens(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


# one group of short sequences, one of long ones (over the written-out formula's limit), several groups, some without neighbours
LAYOUTS = {"short": (5, 5, 5), "long": (70, 70), "mixed": (3, 70, 3, 5, 0, 70)}


def attention(dtype: torch.dtype, lengths: tuple[int, ...], keys: bool) -> Iterator[tuple]:
    qkv = torch.randn(sum(lengths), 3, 2, 32).to(dtype).requires_grad_()
    kv_lengths = torch.tensor([max(0, length - 2) for length in lengths], dtype=torch.int32) if keys else None
    plain = (cu_seqlens(*lengths), max(lengths), kv_lengths, 0.2, "reference")
    yield ops.packed_attention_forward.default, (qkv, *plain)
    out, lse = ops.packed_attention_forward(qkv.detach(), *plain)
    yield ops.packed_attention_backward.default, (torch.randn_like(out), qkv.detach(), out, lse, *plain)


def info_nce(dtype: torch.dtype) -> Iterator[tuple]:
    queries, keys = (torch.randn(n, 6).to(dtype).requires_grad_() for n in (4, 7))
    targets = torch.tensor([0, 6, 2, 2])
    yield ops.info_nce_forward.default, (queries, keys, targets, 0.5, "reference")
    inputs = (queries.detach(), keys.detach(), targets)
    loss, lse = ops.info_nce_forward(*inputs, 0.5, "reference")
    yield ops.info_nce_backward.default, (torch.ones_like(loss), *inputs, lse, 0.5, "reference")


def relation(dtype: torch.dtype) -> Iterator[tuple]:
    queries, keys = (torch.randn(2, 4, 9, 8).to(dtype).requires_grad_() for _ in range(2))
    places = torch.arange(4).expand(2, -1).contiguous()
    yield ops.relation_forward.default, (queries, keys, places, 2, 0.3, "reference")
    inputs = (queries.detach(), keys.detach(), places)
    loss, lse = ops.relation_forward(*inputs, 2, 0.3, "reference")
    yield ops.relation_backward.default, (torch.ones_like(loss), *inputs, lse, 2, 0.3, "reference")


def soft_cross_entropy(dtype: torch.dtype, rows: bool) -> Iterator[tuple]:
    teacher, student = torch.randn(3, 12).to(dtype), torch.randn(4 if rows else 3, 12).to(dtype)
    centre = torch.randn(12)
    teacher_rows = torch.tensor([[0, 1], [1, 2], [2, -1], [0, 0]]) if rows else None
    weights = torch.rand(len(student))
    inputs = (teacher, student, centre, teacher_rows, weights)
    plain = (0.1, 0.2, "reference")
    yield ops.soft_cross_entropy_forward.default, (teacher, student.clone().requires_grad_(), *inputs[2:], *plain)
    loss, *sums = ops.soft_cross_entropy_forward(*inputs, *plain)
    yield ops.soft_cross_entropy_backward.default, (torch.ones_like(loss), *inputs, *sums, *plain)


def sinkhorn(dtype: torch.dtype) -> Iterator[tuple]:
    scores = torch.randn(6, 5).to(dtype)
    log_u = ops.sinkhorn_sweep(scores, None, 0.1, "reference")
    yield ops.sinkhorn_sweep.default, (scores, None, 0.1, "reference")
    yield ops.sinkhorn_sweep.default, (scores, log_u, 0.1, "reference")
    yield ops.sinkhorn_balance.default, (scores, 0.1, 3, "reference")
    yield ops.sinkhorn_assign.default, (scores, log_u, 0.1, "reference")


def nearest_neighbours(dtype: torch.dtype) -> Iterator[tuple]:
    queries, keys = torch.randn(4, 6).to(dtype), torch.randn(9, 6).to(dtype)
    yield ops.nearest_neighbours.default, (queries, keys, 2, None, None, "reference")
    yield ops.nearest_neighbours.default, (queries, keys, 1, torch.arange(4), torch.arange(9), "reference")


def adamw(dtype: torch.dtype) -> Iterator[tuple]:
    if dtype not in adamw_dtypes:
        return
    lists = [[torch.rand(size).to(dtype) for size in ((3,), (2, 4))] for _ in range(5)]
    for averages, scales in (([], None), (lists[4], torch.rand(2))):
        yield ops.adamw.default, (
            *lists[:4], torch.zeros(()), averages, scales, torch.tensor(True), 0.1, 1e-3, 0.9, 0.99, 1e-8, 0.1, "reference"
        )  # fmt: skip


CALLS: dict[str, Callable[[torch.dtype], Iterator[tuple]]] = {
    f"packed_attention {name}{' keys' * keys}": lambda dtype, lengths=lengths, keys=keys: attention(dtype, lengths, keys)
    for name, lengths in LAYOUTS.items()
    for keys in (False, True)
} | {
    "info_nce": info_nce,
    "relation": relation,
    "soft_cross_entropy": lambda dtype: soft_cross_entropy(dtype, False),
    "soft_cross_entropy rows": lambda dtype: soft_cross_entropy(dtype, True),
    "sinkhorn": sinkhorn,
    "nearest_neighbours": nearest_neighbours,
    "adamw": adamw,
}  # fmt: skip


def test_every_op_has_a_row():
    assert {name.split()[0] for name in CALLS} | {"patches"} == set(choice.AVAILABLE)
    called = {overload.name().partition(".")[0] for make in CALLS.values() for overload, _ in make(torch.float32)}
    defined = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tessera::")}
    of_patches = {"gather_patches", "scatter_patches", "masked_pixel_loss", "masked_pixel_loss_backward"}
    assert called == defined - {f"tessera::{name}" for name in of_patches}


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=NAMES)
@pytest.mark.parametrize("name", CALLS)
def test_what_the_compiler_is_told_is_so(name: str, dtype: torch.dtype):
    for overload, arguments in CALLS[name](dtype):
        torch.library.opcheck(
            overload, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )
        found, told = overload(*arguments), _as_told(overload, arguments)
        for real, fake in zip(_all(found), _all(told), strict=True):
            assert (real.dtype, real.shape, real.stride()) == (fake.dtype, fake.shape, fake.stride()), overload


def _as_told(overload: Callable, arguments: tuple) -> object:
    with torch._subclasses.FakeTensorMode() as mode:
        return overload(*tree_map_only(Tensor, mode.from_tensor, arguments))


def _all(found: object) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found or ())


# public ops: what is differentiated, and the call
PUBLIC: dict[str, Callable[[torch.dtype], tuple[tuple[Tensor, ...], Callable]]] = {
    "packed_attention": lambda dtype: (
        (torch.randn(10, 3, 2, 32).to(dtype),),
        lambda qkv: kernels.packed_attention(qkv, cu_seqlens(4, 6), 6),
    ),
    "packed_attention equal": lambda dtype: (
        (torch.randn(10, 3, 2, 32).to(dtype),),
        lambda qkv: kernels.packed_attention(qkv, cu_seqlens(5, 5), 5),
    ),
    "info_nce": lambda dtype: (
        (torch.randn(4, 6).to(dtype), torch.randn(7, 6).to(dtype)),
        lambda queries, keys: kernels.info_nce(queries, keys, torch.tensor([0, 6, 2, 2]), 0.1),
    ),
    "relation": lambda dtype: (
        (torch.randn(2, 4, 9, 8).to(dtype), torch.randn(2, 4, 9, 8).to(dtype)),
        lambda queries, keys: kernels.relation_loss(queries, keys, torch.arange(4).expand(2, -1), 2),
    ),
    "soft_cross_entropy": lambda dtype: (
        (torch.randn(4, 12).to(dtype),),
        lambda student: kernels.soft_cross_entropy(student.detach().flip(0), student, 0.1, 0.2),
    ),
    "sinkhorn": lambda dtype: (
        (torch.randn(4, 12).to(dtype),),
        lambda scores: kernels.sinkhorn_cross_entropy(scores.detach().flip(0), scores, 0.1, 0.2),
    ),
    "nearest_neighbours": lambda dtype: (
        (torch.randn(4, 6).to(dtype),),
        lambda queries: kernels.nearest_neighbours(queries, queries.detach().flip(0), 2)[0] + 0 * queries.sum(),
    ),
    "patches": lambda dtype: (
        (torch.randn(2, 3, 12).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)),
        lambda prediction, images: kernels.masked_pixel_loss(prediction, images, torch.tensor([[0, 1, 2], [3, 0, 1]]), 2),
    ),
}  # fmt: skip


def test_every_public_op_is_tried_under_autocast():
    """But for adamw, which runs after backward and has no products that autocast knows."""
    assert {name.split()[0] for name in PUBLIC} | {"adamw"} == set(choice.AVAILABLE)


# of each call the forms that are plain torch
FORMS = [
    (name, form) for name in PUBLIC for form in ("reference", "plain") if form in choice.AVAILABLE[name.split()[0]]
]


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=NAMES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_autocast_changes_nothing(name: str, form: str, dtype: torch.dtype):
    kernels.use(form)
    inputs, call = PUBLIC[name](dtype)
    found = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = call(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for without, under in zip(*found, strict=True):
        assert without.dtype == under.dtype and torch.equal(without, under)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=NAMES)
@pytest.mark.parametrize("name", [name for name, form in FORMS if form == "plain"])
def test_what_a_plain_form_returns_has_the_dtype_of_the_reference(name: str, dtype: torch.dtype):
    inputs, call = PUBLIC[name](dtype)
    found = []
    for form in ("reference", "plain"):
        kernels.use(form)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for reference, plain in zip(*found, strict=True):
        assert (reference.dtype, reference.shape) == (plain.dtype, plain.shape)


@pytest.mark.long
@pytest.mark.parametrize("under", [False, True])
def test_compiled_plain_forms_find_what_the_reference_finds_under_autocast_too(under: bool):
    """Also with temperatures in tensors, of which compiled code is compiled once."""
    teacher, student, queries, keys = (torch.randn(*shape) for shape in ((4, 33), (6, 33), (5, 8), (7, 8)))
    rows, weights, targets = (
        torch.tensor([[0, 1], [2, -1], [-1, -1], [3, 3], [1, 0], [2, 3]]),
        torch.rand(6),
        torch.arange(5),
    )
    leaves = [x.requires_grad_() for x in (student, queries, keys)]

    def losses(hot, cold):
        centre = kernels.sinkhorn_centre(teacher, cold)
        named = kernels.soft_cross_entropy(teacher, student, cold, hot, centre, weights, rows)
        paired = kernels.soft_cross_entropy(teacher, student[:4], cold, hot)
        return (
            named + paired + kernels.sinkhorn(teacher, cold)[:, 0].sum() + kernels.info_nce(queries, keys, targets, hot)
        )

    def step(run, temperatures):
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            loss = run(*temperatures)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    schedule = ((0.2, 0.1), (0.3, 0.15))
    kernels.use("reference")
    wanted = [step(losses, temperatures) for temperatures in schedule]
    kernels.use("plain")
    compiled = torch.compile(losses, fullgraph=True, dynamic=False)
    first, second = ([torch.tensor(t) for t in temperatures] for temperatures in schedule)
    found = [step(compiled, first)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(step(compiled, second))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
