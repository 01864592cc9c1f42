"""Every form of every case of every op for pytest-benchmark; cases are groups, forms are what is compared."""

import pytest
import torch

import kernels
from benchmarks.kernels.case import cases, machine, prepared
from kernels.choice import AVAILABLE

ALL = [
    (one, form) for op in AVAILABLE for one in cases(f"benchmarks.kernels.bench_{op}", machine()) for form in one.forms
]


@pytest.mark.parametrize(
    ("one", "form", "direction"),
    [
        pytest.param(one, form, direction, id=f"{one.op}-{one.name}-{direction}-{form}")
        for one, form in ALL
        for direction in one.directions
    ],
)
def bench_form(benchmark, one, form, direction):
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        call = prepared(one.forms[form], one, direction, one.inputs())
    except Exception as error:
        if form in one.ours:
            raise
        pytest.skip(f"this peer does not run here: {error}")

    def once() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    cost = one.costs[one.directions.index(direction)]
    benchmark.group = f"{one.op}: {one.name}, {direction}"
    benchmark.extra_info |= {"bytes": cost.bytes, "flops": cost.flops}
    once()
    benchmark.pedantic(once, rounds=5, iterations=10 if torch.cuda.is_available() else 1, warmup_rounds=1)
    kernels.use("auto")
