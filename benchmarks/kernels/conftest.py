"""What the kernel benchmarks share: the device at hand, its precision and batch, and a clock that waits for the device.

    python -m pytest benchmarks/kernels --benchmark-only

Every benchmark times our op beside the obvious plain torch form; pytest-benchmark groups them by shape.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kernels


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@dataclass(frozen=True)
class Machine:
    """The device, the dtype that training uses on it, and how many images a benchmark takes there."""

    device: str
    dtype: torch.dtype
    batch: int

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


@pytest.fixture(scope="session")
def machine() -> Machine:
    torch.manual_seed(0)
    return Machine("cuda", torch.bfloat16, 256) if torch.cuda.is_available() else Machine("cpu", torch.float32, 8)


@pytest.fixture
def clock(benchmark, machine: Machine) -> Callable:
    """clock(group, function, *inputs): times the function alone, or with the gradient of every input that asks for one."""

    def measure(group: str, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

        def once() -> None:
            out = function(*inputs)
            if leaves:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            if machine.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info |= {
            "device": machine.device,
            "dtype": str(machine.dtype),
            "kernels": kernels.describe(machine.device),
        }
        once()
        benchmark.pedantic(once, rounds=5, iterations=1 if machine.device == "cpu" else 10, warmup_rounds=1)

    return measure
