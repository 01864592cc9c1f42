"""Linear probe: batch norm without affine, then one linear layer per learning rate, all trained in the same pass.

MAE-CT's probe (10 base learning rates .01 to .10, SGD with momentum .9, no weight decay, 10 % warm-up, cosine; batch norm
eps 1e-5, trunc-normal(.01) weights), on features extracted once, so without its crops and flips. What that code reports is
the best over learning rates AND epochs on the validation set; both figures are given here, each under its name.

Shapes: n training images, m test images, B batch, C feature width, L learning rates, K classes.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Suppress

from engine.core import optim
from engine.core.errors import BadInput
from engine.evals.features import Features, Labelled, check_labelled, number_of_classes, threads_for
from engine.evals.result import Result


@dataclass(frozen=True)
class Settings:
    """Linear probe settings."""

    epochs: int = 50
    """Passes over the training features."""
    batch_size: int = 1024
    """Images per step; at most a quarter of the training set, so that an epoch has at least four steps."""
    base_lrs: tuple[float, ...] = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
    """Learning rates trained side by side, each times batch / 256."""
    momentum: float = 0.9
    """SGD momentum."""
    warmup: float = 0.1
    """Share of the steps with linear warm-up; the rest follows a cosine to 0."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise BadInput(f"linear {name} = {getattr(self, name)} must be at least 1.")
        if not self.base_lrs or not all(0 < lr < math.inf for lr in self.base_lrs):
            raise BadInput(f"linear base_lrs = {self.base_lrs} must be one or more numbers above 0.")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"linear {name} = {getattr(self, name)} must be in [0, 1).")


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("linear", train, test)
    if len(train.labels) < 8:
        raise BadInput(f"linear needs at least 8 training images for its batch norm; there are {len(train.labels)}.")


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` of `steps`: linear warm-up that begins above 0, then half a cosine to 0."""
    return optim.warmup_cosine(step, steps, warmup * steps, ahead=1)


class Probe:
    """L linear classifiers on shared batch-normalised features; one matrix product serves all of them."""

    def __init__(self, width: int, classes: int, lrs: Tensor, momentum: float, seed: int):
        generator, device = torch.Generator().manual_seed(seed), lrs.device
        # all learning rates start from the same draw, so that they differ in nothing else
        start_KC = nn.init.trunc_normal_(torch.empty(classes, width), std=0.01, generator=generator).to(device)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-5, device=device)
        self.weight_LKC = start_KC.repeat(len(lrs), 1, 1)
        self.bias_LK = torch.zeros(len(lrs), classes, device=device)
        self.lrs_L, self.momentum = lrs, momentum
        self.velocity = torch.zeros_like(self.weight_LKC), torch.zeros_like(self.bias_LK)

    def logits(self, x_BC: Tensor) -> Tensor:
        """[B, L, K]."""
        flat = nn.functional.linear(x_BC, self.weight_LKC.flatten(0, 1), self.bias_LK.flatten())
        return flat.unflatten(1, self.bias_LK.shape)

    def step(self, x_BC: Tensor, labels_B: Tensor, share: float) -> None:
        """One SGD step on the mean cross-entropy of each classifier, at `share` of its peak learning rate."""
        x_BC = self.norm.train()(x_BC)
        # probabilities of 1e-30 become 0: denormal numbers make a CPU's matrix product a hundred times slower
        p_BLK = nn.functional.threshold(self.logits(x_BC).softmax(-1), 1e-30, 0.0)
        error_BLK = (p_BLK - nn.functional.one_hot(labels_B, self.bias_LK.shape[1])[:, None]) / len(x_BC)
        gradients = (error_BLK.flatten(1).T @ x_BC).view_as(self.weight_LKC), error_BLK.sum(0)
        for parameter, velocity, gradient in zip((self.weight_LKC, self.bias_LK), self.velocity, gradients):
            velocity.mul_(self.momentum).add_(gradient)
            parameter.sub_(velocity * (share * self.lrs_L).view(-1, *[1] * (parameter.ndim - 1)))

    def correct(self, features: Features) -> np.ndarray:
        """bool [m, L]: whether each classifier names an image's class."""
        self.norm.eval()
        predicted_mL = torch.cat([self.logits(self.norm(x_BC)).argmax(-1) for x_BC in features.values.split(8192)])
        return (predicted_mL == features.labels[:, None]).cpu().numpy()


@torch.no_grad()
def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Accuracy after the last epoch at the best learning rate, and the best over epochs too; all in `details`.

    Raises:
        BadInput: labels are missing, a class has no training image, there are fewer than 8 images, or every classifier
            diverged.
    """
    check(train, test, settings)
    n, device = len(train.values), train.values.device
    batch = min(settings.batch_size, n // 4)
    lrs_L = torch.tensor(settings.base_lrs, device=device) * (batch / 256)
    probe = Probe(train.values.shape[1], number_of_classes(train, test), lrs_L, settings.momentum, settings.seed)
    per_epoch = n // batch
    history = []
    with threads_for(2 * batch * probe.weight_LKC.numel()):
        for epoch in range(settings.epochs):
            order = torch.from_numpy(np.random.default_rng([settings.seed, epoch]).permutation(n)).to(device)
            for i in range(per_epoch):
                rows = order[i * batch : (i + 1) * batch]
                share = schedule(epoch * per_epoch + i, settings.epochs * per_epoch, settings.warmup)
                probe.step(train.values[rows], train.labels[rows], share)
            correct_mL = probe.correct(test)
            history.append(correct_mL.mean(0))
    top1_EL = np.array(history)
    finite_L = torch.isfinite(probe.weight_LKC).flatten(1).all(1).cpu().numpy()
    top1_EL[:, ~finite_L] = 0.0  # diverged: counts as wrong
    if not top1_EL.any():
        raise BadInput(f"linear: no classifier stayed finite; lower base_lrs = {settings.base_lrs}.")
    last = int(top1_EL[-1].argmax())
    table = [
        {
            "base lr": lr,
            "last-epoch top-1": float(top1_E[-1]),
            "best-epoch top-1": float(top1_E.max()),
            "best epoch": int(top1_E.argmax()) + 1,
        }
        for lr, top1_E in zip(settings.base_lrs, top1_EL.T)
    ]
    return Result(
        protocol="linear",
        values={"last-epoch top-1 (best lr)": float(top1_EL[-1, last]), "best-epoch top-1": float(top1_EL.max())},
        settings=asdict(settings) | {"batch used": batch, "base lr of last-epoch figure": settings.base_lrs[last]},
        details={
            "top-1 by learning rate": table,
            "best-epoch top-1 is": "over learning rates and epochs, on the test set",
        },
        samples={"last-epoch top-1 (best lr)": (correct_mL & finite_L)[:, last].astype(float)},
    )
