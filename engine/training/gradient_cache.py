"""Backward through a batch that is represented in micro-batches and compared as a whole: gradient caching (Gao et al., "Scaling
Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).

Micro-batches are first represented without autograd. The loss of the whole batch gives gradients of the loss to the rows, and
each micro-batch, represented once more, passes on those of its own rows. The gradients are the large batch's, up to the order
of sums. Of the last micro-batch the first pass is kept, so that one representation in `accumulate` is saved; the peak is the
larger of one micro-batch's activations along with the comparison's, and one micro-batch's alone.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from engine.methods.base import Rows
from engine.methods.comparing import Comparing
from engine.methods.settings import StageSettings

MicroBatch = tuple[tuple[Tensor, ...], Tensor, dict[str, Tensor]]  # images, ids and draws of some rows of a batch


def needed(settings: StageSettings, count: int) -> bool:
    """Whether a batch in so many micro-batches takes this, because its images are compared."""
    return count > 1 and not settings.splits


def micro_batches(images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor], count: int) -> list[MicroBatch]:
    """A batch in `count` parts of equally many images, which it must have."""
    parts = zip(*(x.chunk(count) for x in (ids, *images, *drawn.values())), strict=True)
    views = len(images)
    return [(rows[:views], ids, dict(zip(drawn, rows[views:], strict=True))) for ids, *rows in parts]


def backward(
    method: Comparing,
    micro_batches: Sequence[MicroBatch],
    ids: Tensor,
    drawn: dict[str, Tensor],
    autocast: Callable[[], AbstractContextManager],
    scaled: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Add the gradients of the batch's loss to the method's parameters.

    Args:
        micro_batches: the batch's rows, in order.
        ids, drawn: of the whole batch.
        autocast: makes the context that forward passes run in. Each has one of its own: autocast keeps the weights that it has
            cast, and those of a pass without autograd pass no gradient on.
        scaled: what backward begins at, of the loss.

    Returns:
        What the method reports of the batch.
    """
    *others, last = micro_batches
    targets, cached = [], []
    for micro_batch in micro_batches:
        with torch.no_grad(), autocast():
            targets.append(_leaves(method.represent_targets(*micro_batch), False))
    for micro_batch in others:
        with torch.no_grad(), autocast():
            cached.append(_leaves(method.represent(*micro_batch), method.trains_encoder))
    with autocast():
        report = method.compare(_joined([*cached, method.represent(*last)]) | _joined(targets), ids, drawn)
    scaled(report["loss"]).backward()
    if method.trains_encoder:
        for micro_batch, rows in zip(others, cached, strict=True):
            with autocast():
                again = method.represent(*micro_batch)
            _pass_on(again, rows)
    return report


def _leaves(rows: Rows, trained: bool) -> Rows:
    # copies, since a row may be a view of all of an image's tokens, which would stay
    return {name: [view.detach().clone().requires_grad_(trained) for view in views] for name, views in rows.items()}


def _joined(parts: Sequence[Rows]) -> Rows:
    """The rows of micro-batches as those of one batch."""
    return {
        name: [torch.cat(views) for views in zip(*(part[name] for part in parts), strict=True)] for name in parts[0]
    }


def _pass_on(again: Rows, cached: Rows) -> None:
    """Backward from rows, by the gradients that their first representations were given."""
    pairs = [(row, leaf.grad) for name, views in again.items() for row, leaf in zip(views, cached[name], strict=True)]
    # rows that nothing was made of have no gradient
    met = [(row, gradient) for row, gradient in pairs if gradient is not None and row.requires_grad]
    torch.autograd.backward(*zip(*met))
