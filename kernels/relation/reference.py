"""Relations of tokens in plain torch, some images at a time. B images, N tokens, R classes, D channels, I images at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor


def forward(
    queries_BNRD: Tensor, keys_BNRD: Tensor, places_BN: Tensor, columns: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.relation_loss`; returns (loss, lse [B, N, N])."""
    images, tokens, _, _ = queries_BNRD.shape
    wide = torch.promote_types(queries_BNRD.dtype, torch.float32)
    lse_BNN = queries_BNRD.new_empty(images, tokens, tokens, dtype=wide)
    loss = queries_BNRD.new_zeros((), dtype=wide)
    for some in _chunks(queries_BNRD):
        queries_IRND, keys_IRND = (x[some].to(wide).transpose(1, 2) for x in (queries_BNRD, keys_BNRD))
        logits_IRNN = (queries_IRND * scale) @ keys_IRND.mT
        lse_BNN[some] = logits_IRNN.logsumexp(1)
        targets_INN = _targets(places_BN[some], columns)
        loss += (lse_BNN[some] - logits_IRNN.gather(1, targets_INN[:, None]).squeeze(1)).sum()
    return loss / max(lse_BNN.numel(), 1), lse_BNN


def backward(
    grad_loss: Tensor,
    queries_BNRD: Tensor,
    keys_BNRD: Tensor,
    places_BN: Tensor,
    lse_BNN: Tensor,
    columns: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys; the logits are formed again."""
    grads = tuple(x.new_empty(x.shape) for x in (queries_BNRD, keys_BNRD))
    share = grad_loss / max(lse_BNN.numel(), 1)
    for some in _chunks(queries_BNRD):
        queries_IRND, keys_IRND = (x[some].to(lse_BNN.dtype).transpose(1, 2) for x in (queries_BNRD, keys_BNRD))
        # the scale of the loss and of the logits go on the small matrices
        queries_IRND = queries_IRND * scale
        p_IRNN = (queries_IRND @ keys_IRND.mT).sub_(lse_BNN[some, None]).exp_()
        targets_INN = _targets(places_BN[some], columns)
        p_IRNN.scatter_add_(1, targets_INN[:, None], p_IRNN.new_full((), -1.0).expand_as(targets_INN[:, None]))
        grads[0][some] = ((p_IRNN @ keys_IRND) * (scale * share)).transpose(1, 2)
        grads[1][some] = ((p_IRNN.mT @ queries_IRND) * share).transpose(1, 2)
    return grads


def _targets(places_IN: Tensor, columns: int) -> Tensor:
    """Class of every pair [I, N, N]: where the first token lies seen from the second."""
    row_IN, column_IN = places_IN // columns, places_IN % columns
    down_INN, right_INN = (x[:, :, None].sub(x[:, None, :]).sign_() for x in (row_IN, column_IN))
    return 3 * down_INN + right_INN + 4


def _chunks(queries_BNRD: Tensor) -> Iterator[slice]:
    images, step = len(queries_BNRD), _images_at_once(queries_BNRD)
    return (slice(start, min(start + step, images)) for start in range(0, images, step))


def _images_at_once(queries_BNRD: Tensor) -> int:
    """At least 1."""
    _, tokens, classes, _ = queries_BNRD.shape
    # a CPU keeps 1 MB of fp32 logits in its cache; a GPU wants few, large launches
    elements = 2**18 if queries_BNRD.device.type == "cpu" else 2**24
    return max(1, elements // max(1, classes * tokens**2))
