"""Activation checkpointing: what a block's backward needs is computed again instead of kept.

    none        all that backward reads is kept
    selective   outputs of products and of attention are kept; norms, GELU and what else is cheap are computed again (Korthikanti
                et al., "Reducing Activation Recomputation in Large Transformer Models", MLSys 2023, with the roles the other way
                round: packed attention keeps no scores, so it is not what fills the memory here)
    blocks      each block's input is kept and its forward pass run once more (Chen et al., "Training Deep Nets with Sublinear
                Memory Cost", 2016)

Per token of width C, in 16 bit with an fp32 residual, a plain block keeps 36 C bytes, a selective one 22 C, one computed again
4 C. Gradients are the same bits where code is not compiled; compiled, they agree to rounding, as other operations are fused.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels.packed_attention  # noqa: F401 (registers its op)

CHOICES = ("none", "selective", "blocks")

_ATTENTION = (
    torch.ops.tessera.packed_attention_forward.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}  # where their left factor stands


def _policy(context: object, op: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in _PRODUCTS:
        left, right = args[_PRODUCTS[op] :][:2]
        # a block's last product, the only one that makes rows narrower, is read by nothing in backward
        if left.shape[1] <= right.shape[1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = partial(create_selective_checkpoint_contexts, _policy)


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's method from tensors to a tensor, computed again in backward as the block's `recompute` says, one of CHOICES.

    It draws no random numbers, whose state is not kept. `fullgraph=True` compiles it to one graph.
    """

    @wraps(forward)
    def run(self: nn.Module, *args: Any) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return forward(self, *args)
        contexts = {"context_fn": _SELECTIVE} if self.recompute == "selective" else {}
        branch = partial(forward, self)
        return checkpoint(branch, *args, use_reentrant=False, preserve_rng_state=False, **contexts)

    return run


def choose(model: nn.Module, choice: str) -> None:
    """Set what all blocks inside a model compute again."""
    for part in model.modules():
        if hasattr(part, "recompute"):
            part.recompute = choice
