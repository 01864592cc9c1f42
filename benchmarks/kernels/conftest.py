"""Hands every case of every `bench_OP.py` to pytest-benchmark; cases are groups, forms are what is compared."""

from collections.abc import Callable

import pytest
import torch

import kernels
from benchmarks.kernels.case import Case


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture
def clock(benchmark) -> Callable[[Case, str], None]:
    def measure(case: Case, form: str) -> None:
        torch.manual_seed(0)
        try:
            call = case.forms[form](*case.inputs())
        except Exception as error:
            if form in case.ours:
                raise
            pytest.skip(f"this peer does not run here: {error}")

        def once() -> None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.group = f"{case.op}: {case.name}"
        benchmark.extra_info |= {"bytes": case.cost.bytes, "flops": case.cost.flops}
        once()
        benchmark.pedantic(once, rounds=5, iterations=10 if torch.cuda.is_available() else 1, warmup_rounds=1)
        kernels.use("auto")

    return measure
