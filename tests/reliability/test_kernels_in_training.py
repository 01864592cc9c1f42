"""Methods lose and learn the same on our Triton kernels, interpreted, as on the reference."""

from pathlib import Path

import pytest
import torch

from tests.reliability.driver import METHODS, drive, finish, state_of, steps_of

# one step: the interpreter is slow, and the optimiser's first moment tells the gradients
SHORT = "--last 1 --set batch_size=4".split()
# all parameters of a model, interpreted, take minutes: tests/kernels/test_adamw.py proves that pass
TRITON = "triton,adamw=reference"
EXACT = ("beit",)  # with relative positions its kernels copy patches and pick nearest centres: nothing that rounds


# between them they call every op in every way that a method does
BETWEEN_THEM = ("mae", "maect", "dinov2", "swav", "relvit", "beit")


@pytest.mark.long
@pytest.mark.parametrize(
    "compared",
    [BETWEEN_THEM, pytest.param(tuple(sorted({*METHODS} - {*BETWEEN_THEM})), marks=pytest.mark.exhaustive)],
    ids=["some", "others"],
)
def test_interpreted_kernels_train_like_the_reference(tmp_path: Path, compared: tuple[str, ...]):
    finish(
        drive(tmp_path / "reference", *SHORT, "--methods", *compared, environment={"TESSERA_KERNELS": "reference"}),
        drive(
            tmp_path / "triton",
            *SHORT,
            "--methods",
            *compared,
            environment={"TESSERA_KERNELS": TRITON, "TRITON_INTERPRET": "1"},
        ),
    )
    for method in compared:
        (plain,), (ours,) = steps_of(tmp_path / "reference", method), steps_of(tmp_path / "triton", method)
        assert ours["ids"] == plain["ids"]
        assert float.fromhex(ours["loss"]) == pytest.approx(float.fromhex(plain["loss"]), rel=2e-4)
        before, after = (moments(tmp_path / kernels, method) for kernels in ("reference", "triton"))
        assert before.keys() == after.keys()
        whole = sum(moment.square().sum() for moment in before.values()).sqrt()
        assert whole > 0
        for name, moment in before.items():
            # a gradient that is nothing but rounding (a bias before a norm) has no digits of its own
            assert (after[name] - moment).norm() <= 1e-3 * moment.norm() + 1e-6 * whole, f"{method} {name}"
        # other kernels round otherwise: equal bits would mean that they did not run
        assert method in EXACT or any(not torch.equal(before[name], after[name]) for name in before), method


def moments(folder: Path, method: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_of(folder, method).items() if name.endswith("/exp_avg")}
