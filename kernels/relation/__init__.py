"""Where one token lies seen from another: cross-entropy over nine logits per ordered pair, without storing the nine.

B images, N tokens, R = 9 classes, D channels of a class.

Why an op: written plainly, the map [B, 9, N, N] is written and read at every step between products and loss: in bf16 under
autocast 16 bytes per entry forward and 26 backward, which at 256 images of 64 tokens is 0.4 GB in each step, where queries,
keys and both gradients are 50 MB. Compiled, the products still write the map and read its gradient, 12 bytes per entry. All
that backward needs is one log-sum-exp per pair: with it each class forms its share of the softmax by itself. Targets follow
from two numbers per token. Floor: read queries, keys and places once, write one number per pair, 18 N^2 D flops per image
forward; read them again, write two gradients, 54 N^2 D flops backward (see `cost`).

Every implementation is a module with these two functions:
    forward(queries, keys, places, columns, scale) -> (loss scalar, lse[B,N,N])
    backward(grad_loss, queries, keys, places, lse, columns, scale) -> (grad_queries, grad_keys)
loss and lse are fp64 for fp64 input, else fp32; gradients are contiguous.
"""

import math

import torch
from torch import Tensor

from kernels.checks import DTYPES, check_range
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of

CLASSES = 9

torch.library.define(
    "tessera::relation_forward",
    "(Tensor queries, Tensor keys, Tensor places, int columns, float scale, str implementation) -> (Tensor, Tensor)",
)
torch.library.define(
    "tessera::relation_backward",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor places, Tensor lse, int columns, float scale, "
    "str implementation) -> (Tensor, Tensor)",
)


def relation_loss(
    queries: Tensor, keys: Tensor, places: Tensor, columns: int, scale: float | None = None
) -> Tensor:  # fmt: skip
    """Mean over images and ordered pairs of tokens (a, b) of -log softmax_c(scale * queries[:, a, c] . keys[:, b, c]) at
    the class that says where a lies seen from b: 3 * row + column, of which row is 0 (a above b), 1 (level) or 2 (below)
    and column 0 (a left of b), 1 (in line) or 2 (right). A token with itself is class 4.

    Source: Camporese et al., Where are my Neighbors? Exploiting Patches Relations in Self-Supervised Vision Transformer
    (RelViT), 2022, the spatial relations.

    Args:
        queries: [B, N, 9, D], fp16, bf16, fp32 or fp64.
        keys: [B, N, 9, D] in the dtype of queries.
        places: int64 [B, N], the cell of the grid that each token stands for, row by row. In [0, 2^31); the values are
            checked on the CPU, and with TESSERA_DEBUG=1 in the environment on a GPU as well, which is waited for; otherwise
            a GPU trusts them.
        columns: of the grid, at least 1.
        scale: a finite number; None means 1 / sqrt(D).

    Returns:
        Scalar, fp64 for fp64 input, else fp32; 0 for no images. Differentiable in queries and keys, once.

    Raises:
        ValueError: for a shape, dtype, device, place, number of columns or scale that is not the above.
    """
    if queries.ndim != 4 or queries.shape != keys.shape or queries.shape[2] != CLASSES or not queries.shape[3]:
        raise ValueError(
            "relation_loss needs queries and keys [B, N, 9, D] of one shape, "
            f"got {list(queries.shape)} and {list(keys.shape)}"
        )
    if queries.dtype != keys.dtype or queries.dtype not in DTYPES:
        raise ValueError(
            "relation_loss needs queries and keys in one of float16, bfloat16, float32 and float64, "
            f"got {queries.dtype} and {keys.dtype}"
        )
    if places.shape != queries.shape[:2] or places.dtype != torch.int64:
        raise ValueError(
            f"relation_loss needs places as int64 {list(queries.shape[:2])}, got {places.dtype} {list(places.shape)}"
        )
    if not queries.device == keys.device == places.device:
        raise ValueError(
            f"relation_loss needs one device for all inputs, got {queries.device}, {keys.device} and {places.device}"
        )
    if columns < 1:
        raise ValueError(f"relation_loss needs at least one column, got {columns}")
    scale = queries.shape[3] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"relation_loss needs a finite scale, got {scale}")
    implementation = chosen("relation", queries.device, "relation_forward", _shape_class(queries))
    return torch.ops.tessera.relation_forward(queries, keys, places, columns, scale, implementation)[0]


def cost(images: int, tokens: int, channels: int, element_size: int) -> tuple[Cost, Cost]:
    """Floor of forward and of backward; exponentials are not counted."""
    pairs = images * tokens**2
    inputs = 2 * images * tokens * CLASSES * channels * element_size
    numbers = 8 * images * tokens + 4 * pairs
    products = 2 * pairs * CLASSES * channels
    return Cost(inputs + numbers, products), Cost(2 * inputs + numbers, 3 * products)


def _shape_class(queries: Tensor, *_: object) -> str:
    return f"{name_of(queries.dtype)} D{queries.shape[3]}"


@implement("tessera::relation_forward", _shape_class)
def _forward(queries, keys, places, columns, scale, implementation):
    check_range("relation_loss", "places", places, 2**31)
    return load("relation", implementation).forward(queries, keys, places, columns, scale)


@implement("tessera::relation_backward")
def _backward(grad_loss, queries, keys, places, lse, columns, scale, implementation):
    return load("relation", implementation).backward(grad_loss, queries, keys, places, lse, columns, scale)


@torch.library.register_fake("tessera::relation_forward")
def _forward_fake(queries, keys, places, columns, scale, implementation):
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    images, tokens = queries.shape[:2]
    return queries.new_empty((), dtype=wide), queries.new_empty(images, tokens, tokens, dtype=wide)


@torch.library.register_fake("tessera::relation_backward")
def _backward_fake(grad_loss, queries, keys, places, lse, columns, scale, implementation):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _save(ctx, inputs, output):
    queries, keys, places, columns, scale, implementation = inputs
    _, lse = output
    ctx.save_for_backward(queries, keys, places, lse)
    ctx.plain = (columns, scale, implementation)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, grad_loss, _grad_lse):
    grads = torch.ops.tessera.relation_backward(grad_loss, *ctx.saved_tensors, *ctx.plain)
    return *grads, None, None, None, None


torch.library.register_autograd("tessera::relation_forward", _differentiate, setup_context=_save)
