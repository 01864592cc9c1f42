"""Values are checked where that costs no wait for a GPU, and everywhere in debug mode."""

import os

import pytest
import torch

from kernels.checks import check_range, check_temperature, checks_values

CPU, GPU, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


def test_kernel_tests_run_in_debug_mode():
    assert os.environ["TESSERA_DEBUG"] == "1"
    assert checks_values(CPU) and checks_values(GPU)


@pytest.mark.parametrize("mode", ["0", "", None])
def test_a_gpu_is_trusted_outside_debug_mode(monkeypatch, mode):
    monkeypatch.delenv("TESSERA_DEBUG") if mode is None else monkeypatch.setenv("TESSERA_DEBUG", mode)
    assert checks_values(CPU)
    assert not checks_values(GPU)


def test_where_there_are_no_values_none_are_checked():
    assert not checks_values(META)
    check_range("op", "indices", torch.zeros(3, dtype=torch.int64, device=META), 0)

    def traced(x):
        check_range("op", "indices", x, 3)
        return x + 1

    far = torch.full((2,), 99)
    assert torch.equal(torch.compile(traced, fullgraph=True, backend="eager")(far), far + 1)
    with pytest.raises(ValueError):
        traced(far)


def test_range():
    check_range("op", "indices", torch.tensor([0, 2, 1]), 3)
    check_range("op", "indices", torch.zeros(0, dtype=torch.int64), 0)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"^op needs indices between 0 and 2, got {wrong}$"):
            check_range("op", "indices", torch.tensor([[0, 1], [wrong, 2]]), 3)


def test_a_temperature_in_a_tensor_is_for_plain_forms_and_not_looked_at():
    for given, implementation in ((0.1, "reference"), (0.1, "plain"), (torch.zeros((), device=META), "plain")):
        check_temperature("op", "temperature", given, implementation)
    for wrong, implementation in ((torch.ones(()), "reference"), (torch.ones(1), "plain")):
        with pytest.raises(
            ValueError, match=r"^op needs temperature as a number, or in its plain form as a tensor of no"
        ):
            check_temperature("op", "temperature", wrong, implementation)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^op needs a positive temperature, got "):
            check_temperature("op", "temperature", wrong, "plain")
