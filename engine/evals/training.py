"""Training something on top of an encoder, or with it, to judge it: one loop for classifiers, segmenters and detectors.

What is trained here is judged and thrown away, so there are no checkpoints; `engine.training.loop` is for what is kept.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from engine.core.errors import BadInput
from engine.training.optimizers import set_lr


class Diverged(BadInput):
    """The loss did not stay finite."""


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[], None]]:
    """Shows how far `steps` are, and the time left, where someone looks; gives the function to call after each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        bar = shown.add_task(title, total=steps)
        yield lambda: shown.advance(bar)


def train(
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    optimiser: torch.optim.Optimizer,
    steps: int,
    share_of_peak: Callable[[int], float],
    *,
    title: str,
    device: torch.device,
    precision: str = "fp32",
    every: int = 0,
    meanwhile: Callable[[int], None] | None = None,
) -> list[float]:
    """`steps` updates, with progress and the time left on the screen.

    Args:
        batches: endless, or at least `steps` long.
        loss_of: the loss of a batch, a scalar with gradients.
        optimiser: of `engine.training.optimizers`, whose groups know their peak lr.
        share_of_peak: of the learning rate at a step.
        title: of the progress bar, and of messages.
        precision: "bf16" for autocast.
        every, meanwhile: called with the number of finished steps after each `every` of them.

    Returns:
        The loss of every step.

    Raises:
        Diverged: the loss did not stay finite.
    """
    losses: list[Tensor] = []
    with progress(title, steps) as advance:
        for step in range(steps):
            set_lr(optimiser, share_of_peak(step))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(next(batches))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
            advance()
            # looked at now and then: each look waits for the device
            if (step % 50 == 49 or step == steps - 1) and not torch.isfinite(torch.stack(losses[-50:])).all():
                raise Diverged(f"{title}: the loss did not stay finite; lower the learning rate.")
            if every and meanwhile and (step + 1) % every == 0:
                meanwhile(step + 1)
    return torch.stack(losses).float().cpu().tolist()
