"""L2-regularised logistic regression by L-BFGS: of classes that exclude each other (softmax), or of each for itself (sigmoid).

The objective is mean loss + lambda / (2 n) |W|^2, so scikit-learn's C is 1 / lambda. There is no intercept of its own; a column
of ones makes one, which is regularised like the rest, as in LIBLINEAR.

Shapes: n images, C feature width, K classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from engine.evals.features import threads_for

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Fit(NamedTuple):
    """What was found: weights fp64 [C, K], and whether the gradient became as small as was asked for."""

    weight_CK: Tensor
    converged: bool


def softmax(logits_nK: Tensor, truth_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies and its gradient [n, K], for truth of one 1 a row."""
    log_p_nK = logits_nK.log_softmax(1)
    return -(log_p_nK * truth_nK).sum(), log_p_nK.exp() - truth_nK


def sigmoid(logits_nK: Tensor, truth_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the binary cross-entropies and its gradient [n, K], for truth of 1, 0 and -1; what is -1 adds nothing."""
    counted_nK = truth_nK >= 0
    loss = ((torch.nn.functional.softplus(logits_nK) - logits_nK * truth_nK) * counted_nK).sum()
    return loss, (logits_nK.sigmoid() - truth_nK) * counted_nK


def fit(
    x_nC: Tensor,
    truth_nK: Tensor,
    loss: Loss,
    penalty: float,
    start_CK: Tensor | None = None,
    *,
    iterations: int,
    tolerance: float,
) -> Fit:
    """The minimum, by L-BFGS from `start_CK` (zeros if None); all in fp64, on the device of `x_nC`.

    Args:
        x_nC: fp64.
        truth_nK: what `loss` wants.
        iterations: at most.
        tolerance: ends where no entry of the gradient is larger.
    """
    n, shape = len(x_nC), (x_nC.shape[1], truth_nK.shape[1])
    truth_nK = truth_nK.to(x_nC)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight_CK = torch.from_numpy(flat).to(x_nC).view(shape)
        total, error_nK = loss(x_nC @ weight_CK, truth_nK)
        gradient_CK = (x_nC.T @ error_nK + penalty * weight_CK) / n
        return (total + penalty / 2 * weight_CK.square().sum()).item() / n, gradient_CK.flatten().cpu().numpy()

    start = np.zeros(shape) if start_CK is None else start_CK.cpu().numpy()
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "gtol": tolerance, "ftol": 0.0}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    return Fit(torch.from_numpy(found.x).to(x_nC).view(shape), bool(np.abs(found.jac).max() <= tolerance))


def path(
    x_nC: Tensor, truth_nK: Tensor, loss: Loss, penalties: Sequence[float], *, iterations: int, tolerance: float
) -> dict[float, Fit]:
    """One fit per penalty. Each starts from the next stronger one's solution; the problem is convex, so only faster."""
    basis = None
    if len(x_nC) < x_nC.shape[1]:
        # the optimum is a combination of the rows: solving in their span is exact, and n wide instead of C
        basis, triangle = torch.linalg.qr(x_nC.T)
        x_nC = triangle.T
    fits, weight = {}, None
    with threads_for(2 * x_nC.numel() * truth_nK.shape[1]):
        for penalty in sorted(set(penalties), reverse=True):
            weight, converged = fit(x_nC, truth_nK, loss, penalty, weight, iterations=iterations, tolerance=tolerance)
            fits[penalty] = Fit(weight if basis is None else basis @ weight, converged)
    return fits
