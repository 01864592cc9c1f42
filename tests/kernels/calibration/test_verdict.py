"""The rule by which an implementation is taken: right, 3 % faster, times that do not overlap; bit-stable where that is asked."""

import pytest

from kernels.calibration.verdict import judge


def form(ms: float, spread: float = 0.01, stable: bool = True) -> dict:
    return {"ms": ms, "low": ms * (1 - spread), "high": ms * (1 + spread), "stable": stable}


@pytest.mark.parametrize(
    ("others", "choice"),
    [
        ({}, "reference"),
        ({"triton": form(0.5)}, "triton"),
        ({"triton": form(0.98)}, "reference"),
        ({"triton": form(0.9, spread=0.2)}, "reference"),
        ({"triton": form(0.5), "cuda": form(0.4)}, "cuda"),
        ({"triton": {"failure": "it crashed"}, "cuda": form(0.9)}, "cuda"),
        ({"plain": form(0.1)}, "plain"),
    ],
)
def test_the_fastest_right_one_is_taken_if_it_is_clearly_faster(others, choice):
    verdict = judge({"reference": form(1.0)} | others)
    assert verdict.choice == choice
    assert verdict.why.keys() == {"reference", *others}


def test_what_the_compiler_must_fuse_is_for_runs_that_compile():
    assert judge({"reference": form(1), "plain": form(0.1)}, compiles=False).choice == "reference"


def test_bit_stable_leaves_out_what_gives_other_bits_and_the_reference_too_where_another_does_not():
    forms = {"reference": form(1, stable=False), "triton": form(0.1, stable=False), "cuda": form(2)}
    assert judge(forms).choice == "triton"
    assert judge(forms, bit_stable=True).choice == "cuda"
    del forms["cuda"]
    verdict = judge(forms, bit_stable=True)
    assert verdict.choice == "reference"
    assert verdict.why["reference"] == "the only one that is right here"


def test_where_nothing_is_right_the_reference_stays():
    verdict = judge({"reference": {"failure": "out of memory"}, "triton": {"failure": "it hung"}})
    assert (verdict.choice, verdict.ms, verdict.why["triton"]) == ("reference", None, "it hung")


def test_without_a_reference_that_runs_the_fastest_right_one_is_taken():
    assert judge({"reference": {"failure": "out of memory"}, "triton": form(3)}).choice == "triton"
