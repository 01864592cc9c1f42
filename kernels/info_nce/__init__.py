"""InfoNCE: cross-entropy over the similarities of queries with keys, without storing those similarities.

B queries, M keys, C channels.

Why an op: the compiler keeps the [B, M] softmax for backward (global batch 4096: 67 MB in fp32, read and written some
eight times per step), while all that backward needs is one log-sum-exp per query. Floor: read queries, keys and targets
once, write one number per query, 2 B M C flops forward; read them again, write two gradients, 6 B M C flops backward
(see `cost`).

Every implementation but plain is a module with these two functions:
    forward(queries, keys, targets, temperature) -> (loss scalar, lse[B])
    backward(grad_loss, queries, keys, targets, lse, temperature) -> (grad_queries, grad_keys)
loss and lse are fp64 for fp64 input, else fp32. Plain, which the compiler sees through, is a function info_nce of forward's
arguments that returns the loss.
"""

import torch
from torch import Tensor

from kernels.checks import DTYPES, check_range, check_temperature
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of

torch.library.define(
    "tessera::info_nce_forward",
    "(Tensor queries, Tensor keys, Tensor targets, float temperature, str implementation) -> (Tensor, Tensor)",
)
torch.library.define(
    "tessera::info_nce_backward",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor targets, Tensor lse, float temperature, str implementation)"
    " -> (Tensor, Tensor)",
)


def info_nce(queries: Tensor, keys: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
    """Mean over queries of -log softmax(query . keys / temperature)[target]; no [B, M] matrix outlives the call.

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018, equation 4.

    Args:
        queries: [B, C], fp16, bf16, fp32 or fp64, used as they are (normalise them for a cosine).
        keys: [M, C] in the dtype of queries.
        targets: int64 [B], the key that belongs to each query, in [0, M). The values are checked on the CPU, and with
            TESSERA_DEBUG=1 in the environment on a GPU as well, which is waited for; otherwise a GPU trusts them,
            and so does compiled code of plain.
        temperature: a positive number; where plain runs also a tensor [], trusted to hold one, which compiled code takes as an
            input while a number becomes part of it.

    Returns:
        Scalar, fp64 for fp64 input, else fp32; 0 for no queries. Differentiable in queries and keys, once.

    Raises:
        ValueError: for a shape, dtype, device, target or temperature that is not the above.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"info_nce needs queries [B, C] and keys [M, C], got {list(queries.shape)} and {list(keys.shape)}"
        )
    if queries.dtype != keys.dtype or queries.dtype not in DTYPES:
        raise ValueError(
            "info_nce needs queries and keys in one of float16, bfloat16, float32 and float64, "
            f"got {queries.dtype} and {keys.dtype}"
        )
    if queries.shape[0] and not keys.shape[0]:
        raise ValueError(f"info_nce needs keys that targets can name, got none for {queries.shape[0]} queries")
    if targets.shape != queries.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"info_nce needs targets as int64 [{queries.shape[0]}], got {targets.dtype} {list(targets.shape)}"
        )
    if not queries.device == keys.device == targets.device:
        raise ValueError(
            f"info_nce needs one device for all inputs, got {queries.device}, {keys.device} and {targets.device}"
        )
    implementation = chosen("info_nce", queries.device, "info_nce_forward", _shape_class(queries))
    check_temperature("info_nce", "temperature", temperature, implementation)
    if implementation == "plain":
        check_range("info_nce", "targets", targets, len(keys))
        return load("info_nce", "plain").info_nce(queries, keys, targets, temperature)
    return torch.ops.tessera.info_nce_forward(queries, keys, targets, float(temperature), implementation)[0]


def cost(queries: int, keys: int, channels: int, element_size: int) -> tuple[Cost, Cost]:
    """Floor of forward and of backward."""
    inputs = (queries + keys) * channels * element_size
    products = 2 * queries * keys * channels
    return Cost(inputs + 12 * queries, products), Cost(2 * inputs + 12 * queries, 3 * products)


def _shape_class(queries: Tensor, *_: object) -> str:
    return f"{name_of(queries.dtype)} C{queries.shape[1]}"


@implement("tessera::info_nce_forward", _shape_class)
def _forward(queries, keys, targets, temperature, implementation):
    check_range("info_nce", "targets", targets, len(keys))
    return load("info_nce", implementation).forward(queries, keys, targets, temperature)


@implement("tessera::info_nce_backward")
def _backward(grad_loss, queries, keys, targets, lse, temperature, implementation):
    return load("info_nce", implementation).backward(grad_loss, queries, keys, targets, lse, temperature)


@torch.library.register_fake("tessera::info_nce_forward")
def _forward_fake(queries, keys, targets, temperature, implementation):
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty((), dtype=wide), queries.new_empty(queries.shape[0], dtype=wide)


@torch.library.register_fake("tessera::info_nce_backward")
def _backward_fake(grad_loss, queries, keys, targets, lse, temperature, implementation):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _save(ctx, inputs, output):
    queries, keys, targets, temperature, implementation = inputs
    _, lse = output
    ctx.save_for_backward(queries, keys, targets, lse)
    ctx.plain = (temperature, implementation)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, grad_loss, _grad_lse):
    grads = torch.ops.tessera.info_nce_backward(grad_loss, *ctx.saved_tensors, *ctx.plain)
    return *grads, None, None, None


torch.library.register_autograd("tessera::info_nce_forward", _differentiate, setup_context=_save)
