"""The rule by which an implementation is right: error against float64 at most twice that of plain torch in the same dtype."""

from torch import Tensor, finfo, where

FREE_ULPS = 4  # units in the last place of the largest entry that are never an error, as in the tests of the kernels


class WrongAnswer(ArithmeticError):
    """An implementation gives another result than the formula, or does what it must not."""


def compared(name: str, ours: Tensor, plain: Tensor, truth: Tensor) -> dict[str, float]:
    """The largest error of `ours`, that of `plain`, and what is allowed.

    Args:
        name: of the tensor, for the message.
        ours, plain: in one dtype.
        truth: in float64; where it is infinite, ours must be so, too.

    Raises:
        WrongAnswer: the error is larger than allowed, or shape or dtype are others.
    """
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        raise WrongAnswer(
            f"{name} is {ours.dtype} {list(ours.shape)}, of the reference {plain.dtype} {list(plain.shape)}"
        )
    if not truth.numel():
        return {"error": 0.0, "plain_error": 0.0, "allowed": 0.0}
    eps = finfo(ours.dtype).eps
    ours, plain, truth = ours.double(), plain.double(), truth.double()
    finite = truth.isfinite()  # a sequence without keys has a log-sum-exp of -inf
    if not ours[~finite].equal(truth[~finite]):
        raise WrongAnswer(f"{name} is not infinite where it must be")
    ours, plain, truth = (where(finite, x, 0.0) for x in (ours, plain, truth))
    error, plain_error = (float((x - truth).abs().max()) for x in (ours, plain))
    allowed = 2 * plain_error + FREE_ULPS * eps * float(truth.abs().max())
    if not error <= allowed:  # neither where one of them is no number
        raise WrongAnswer(f"{name} is off by {error:.2e}, allowed are {allowed:.2e} (plain torch {plain_error:.2e})")
    return {"error": error, "plain_error": plain_error, "allowed": allowed}
