"""What crosses from data to model: views of images, and their tokens packed back to back.

Shapes: T packed tokens, S sequences, L sequence length, C channels, B batch, N patches, V visible and M masked patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, chain, repeat

import torch
from torch import Tensor

from engine.core.host_memory import to_device
from engine.core.lasting import lasting


@dataclass(frozen=True)
class Group:
    """`sequences` sequences of `length` tokens each."""

    sequences: int
    length: int

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.length < 1:
            raise ValueError(f"a group needs at least one sequence of one token, got {self}")

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Layout:
    """The lengths of all sequences of a packed tensor: static and hashable, so that a compiler sees constant shapes.

    Attributes:
        passing: whether it is of one step, like those of images of their own aspect: then nothing of it is kept for others.
    """

    groups: tuple[Group, ...]
    passing: bool = False

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)

    @property
    def sequences(self) -> int:
        return sum(group.sequences for group in self.groups)

    @property
    def max_seqlen(self) -> int:
        return max(group.length for group in self.groups)

    def cu_seqlens(self, device: torch.device | str) -> Tensor:
        """Where each sequence starts, and the end: int32 [S+1]. One tensor per layout and device, to read only."""
        return (_passing_cu_seqlens if self.passing else _cu_seqlens)(self, torch.device(device))


def _bounds(layout: Layout, device: torch.device) -> Tensor:
    lengths = chain.from_iterable(repeat(g.length, g.sequences) for g in layout.groups)
    with lasting():
        return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu"), device)


_cu_seqlens = cache(_bounds)  # a captured step reads them where they lie
_passing_cu_seqlens = lru_cache(maxsize=8)(_bounds)


@dataclass(frozen=True)
class Packed:
    """Tokens of many sequences back to back: `tokens_TC` [T, C] with group after group as `layout` says.

    Raises ValueError where the two disagree on T.
    """

    tokens_TC: Tensor
    layout: Layout

    def __post_init__(self) -> None:
        if self.tokens_TC.ndim != 2 or len(self.tokens_TC) != self.layout.tokens:
            raise ValueError(f"tokens {tuple(self.tokens_TC.shape)} do not fit {self.layout}")

    @staticmethod
    def pack(groups: Sequence[Tensor], passing: bool = False) -> "Packed":
        """Packs tensors [S, L, C], one per group; `passing` as of a `Layout`. A single contiguous group is not copied."""
        layout = Layout(tuple(Group(group.shape[0], group.shape[1]) for group in groups), passing)
        if len(groups) > 1:
            return Packed(torch.cat([group.flatten(0, 1) for group in groups]), layout)
        # no view by name: the compiler would make the first block, which is given it, a graph of its own
        return Packed(torch.ops.aten._unsafe_view(groups[0].contiguous(), (layout.tokens, groups[0].shape[2])), layout)

    def unpack(self) -> list[Tensor]:
        """The groups as views [S, L, C] of `tokens_TC`, without a copy."""
        parts = self.tokens_TC.split([group.tokens for group in self.layout.groups])
        return [part.unflatten(0, (g.sequences, g.length)) for part, g in zip(parts, self.layout.groups, strict=True)]

    @property
    def cu_seqlens(self) -> Tensor:
        return self.layout.cu_seqlens(self.tokens_TC.device)


@dataclass(frozen=True)
class View:
    """One view of a batch: `images` fp32 [B, 3, H, W] and which of their patches the model may see.

    `visible` is int64 [B, V], row-major patch indices in the order wanted; None shows every patch. Where `hidden`, bool [B, V],
    is true, the model sees the token `blank` [C] at the patch's place instead of its pixels (BEiT, iBOT). `passing` says that
    how many images there are of this size is so in this step alone.
    """

    images: Tensor
    visible: Tensor | None = None
    hidden: Tensor | None = None
    blank: Tensor | None = None
    passing: bool = False


def random_masking(noise_BN: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Splits patches at random, as MAE does (He et al. 2022, section 3): the `keep` of lowest noise stay visible.

    Returns `visible` int64 [B, V=keep] and `masked` int64 [B, M=N-keep], both in ascending order of their noise.
    Raises ValueError unless 1 <= keep <= N.
    """
    if not 1 <= keep <= noise_BN.shape[1]:
        raise ValueError(f"cannot keep {keep} of {noise_BN.shape[1]} patches")
    order_BN = noise_BN.argsort(dim=1, stable=True)
    return order_BN[:, :keep], order_BN[:, keep:]
