"""Tuning a trained encoder under heads, after MAE-CT (Lehner et al. 2023) and MIM-Refiner (Alkin et al. 2025): what is frozen, at
which rates the rest trains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.core.errors import BadInput
from engine.core.optim import Group, with_decay
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class TuningSettings:
    """What a method's settings take over to tune its encoder. `base_lr` and `weight_decay` are then the encoder's."""

    head_base_lr: float = 1e-4
    head_weight_decay: float = 1e-5
    layer_decay: float = 0.65
    """Block k of L, from 0, trains at layer_decay ** (L - k) of the encoder's learning rate, the final norm at all of it."""
    frozen_blocks: int = 0
    """Blocks from below that stay as they are, and with the first one the patch embedding."""

    def tuning_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        return {
            "head-base-lr": (self.head_base_lr > 0, "a number above 0"),
            "head-weight-decay": (self.head_weight_decay >= 0, "a number from 0"),
            "layer-decay": (0 < self.layer_decay <= 1, "a number above 0, at most 1"),
            "frozen-blocks": (self.frozen_blocks >= 0, "a whole number from 0"),
        }

    def check_tuning(self, stage: str, encoder: VisionTransformer) -> None:
        """Raise BadInput where more blocks are frozen than there are."""
        if self.frozen_blocks > encoder.depth:
            raise BadInput(
                f"--{stage}.frozen-blocks is {self.frozen_blocks}; it must be at most the encoder's {encoder.depth} blocks."
            )


def freeze(encoder: VisionTransformer, blocks: int) -> None:
    """Let all train but so many blocks from below, with the first one what comes before it, and, always, absolute positions."""
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(max(encoder.layer_of(name), 0) >= blocks and name != "pos_embed")


def encoder_groups(
    encoder: VisionTransformer,
    peak_lr: float,
    weight_decay: float,
    layer_decay: float,
    *,
    lowest: int,
    undecayed: Sequence[str] = (),
) -> Iterator[Group]:
    """What trains of the encoder, layer by layer from below, each at `layer_decay` of the rate of the one above.

    Args:
        lowest: the layer that what comes before the blocks counts as: 0, the first block's, or -1, one of its own.
        undecayed: of their layer's parameters those, by their full names, that get no weight decay and a group of their own.
    """
    for layer in range(lowest, encoder.depth + 1):
        named = {f"encoder.{n}": p for n, p in encoder.named_parameters() if max(encoder.layer_of(n), lowest) == layer}
        apart = {name: named.pop(name) for name in undecayed if name in named}
        rate = peak_lr * layer_decay ** (encoder.depth - layer)
        yield from with_decay(named.items(), rate, weight_decay)
        yield from with_decay(apart.items(), rate, 0.0)
