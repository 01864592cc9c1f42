"""How encoders start: the first weights that published pre-training code draws, by a name for each kind.

Facts: facebookresearch/mae (models_mae.py), dino, ibot, msn (vision_transformer.py, src/deit.py), dinov2, moco-v3 (vits.py),
microsoft/unilm beit/ (modeling_pretrain.py), microsoft/SimMIM (models/).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

Fill = Callable[..., object]  # writes a tensor in place: fill(tensor, generator=...)


def xavier(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform by the widths on both sides; a patch projection is the linear layer on flattened patches that it is."""
    nn.init.xavier_uniform_(weight.flatten(1), generator=generator)


def xavier_apart(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Queries, keys and values [3C, C] as three layers, each by its own widths."""
    for part in weight.chunk(3):
        xavier(part, generator)


def he(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Normal with variance 2 over the width that comes in (He et al. 2015)."""
    nn.init.kaiming_normal_(weight.flatten(1), nonlinearity="relu", generator=generator)


def as_torch(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """torch's own start of linear layers and convolutions: uniform in +-1 / sqrt(width that comes in)."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound, generator=generator)


normal = partial(nn.init.normal_, std=0.02)
nearly_zero = partial(nn.init.normal_, std=1e-6)
truncated = partial(nn.init.trunc_normal_, std=0.02)  # at 100 standard deviations, as in timm and DINO
cut = partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)


@dataclass(frozen=True)
class Kind:
    """What fills an encoder's parameters; norms are one and zero, other biases zero, LayerScale what the architecture says.

    Attributes:
        linear, patches, token, positions: of linear layers' weights, of the patch projection's, of class token, registers and
            mask tokens that follow the encoder, of learned positions.
        qkv: of attention's first layer; None fills it as others.
        patch_bias: whether the patch projection's bias is drawn as torch draws it.
        shrinks: weights that end a branch of block l, counted from 1, are divided by sqrt(2 l).
        rows_first: fixed positions begin with the half that tells rows, not columns.
    """

    linear: Fill
    patches: Fill
    token: Fill
    positions: Fill = truncated
    qkv: Fill | None = None
    patch_bias: bool = False
    shrinks: bool = False
    rows_first: bool = False


KINDS = {
    "xavier": Kind(xavier, xavier, normal),  # MAE's but for the bias of patches; for all runs where no recipe says more
    "mae": Kind(xavier, xavier, normal, patch_bias=True),
    "dino": Kind(truncated, as_torch, truncated, patch_bias=True),  # DINO, iBOT, RelViT, SiT, MC-SSL
    "dinov2": Kind(truncated, as_torch, nearly_zero, patch_bias=True),
    "msn": Kind(truncated, he, truncated),
    "beit": Kind(cut, cut, cut, positions=cut, shrinks=True),  # BEiT, SimMIM
    "mocov3": Kind(xavier, xavier, nearly_zero, qkv=xavier_apart, rows_first=True),
}


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator | None = None, kind: str = "xavier") -> None:
    """Fills every Linear, Conv2d (a patch projection) and LayerNorm inside `module` in place. Parameters held by other modules
    are left to their owner.
    """
    chosen = KINDS[kind]
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            fill = chosen.qkv if chosen.qkv and name.endswith("qkv") else chosen.linear
            fill(part.weight, generator=generator)
        elif isinstance(part, nn.Conv2d):
            chosen.patches(part.weight, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        else:
            continue
        if part.bias is None:
            continue
        if chosen.patch_bias and isinstance(part, nn.Conv2d):
            bound = 1 / math.sqrt(part.weight[0].numel())
            nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        else:
            nn.init.zeros_(part.bias)
