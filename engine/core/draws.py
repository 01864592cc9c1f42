"""Random choices of a step, as a pure function of (seed, purpose, step) and the position in the global batch.

Nothing here has a state to save: a resumed run draws what an uninterrupted one would have drawn, and N ranks draw what one
process would, each keeping its own rows.
"""

import hashlib
from functools import cached_property

import torch
from torch import Tensor


def seed_of(*keys: int | str) -> int:
    """A 63-bit seed from any keys; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """What a method may draw for one step.

    Args:
        seed_keys: what the numbers depend on, for example (seed, stage, step).
        batch: images in the global batch.
        rows: this rank's rows of it.
        device: where the numbers are wanted; they are drawn there.
    """

    def __init__(self, *seed_keys: int | str, batch: int, rows: slice, device: torch.device):
        self.seed_keys, self.batch, self.rows, self.device = seed_keys, batch, rows, device

    @cached_property
    def generator(self) -> torch.Generator:
        """Of the device, which what is drawn on the host never asks for."""
        return torch.Generator(self.device).manual_seed(seed_of(*self.seed_keys))

    def uniform(self, *shape: int) -> Tensor:
        """fp32 [b, *shape] in [0, 1)."""
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def integers(self, below: int) -> Tensor:
        """int64 [b] in [0, below)."""
        return torch.randint(below, (self.batch,), generator=self.generator, device=self.device)[self.rows]

    def seeds(self) -> Tensor:
        """int64 [b] on the CPU, so that reading one waits for no device: for generators of their own, which a micro-batch starts
        from the seed of its first image."""
        return torch.randint(2**62, (self.batch,), generator=self._host("seeds"))[self.rows]

    def on_host(self, purpose: str, *shape: int) -> Tensor:
        """fp32 [b, *shape] in [0, 1) on the CPU, for what must be known without waiting for a device; others for each purpose."""
        return torch.rand(self.batch, *shape, generator=self._host(purpose))[self.rows]

    def places(self, purpose: str, each: int) -> Tensor:
        """int64 [b, each] on the CPU: where each stands when `each` of every image of the global batch are put in random order,
        from 0 to batch * each - 1."""
        order = torch.randperm(self.batch * each, generator=self._host(purpose))
        return order.view(self.batch, each)[self.rows]

    def shared(self, purpose: str, count: int) -> Tensor:
        """fp64 [b, count] in [0, 1) on the CPU: the same numbers for all images of the global batch; others for each purpose."""
        numbers = torch.rand(count, dtype=torch.float64, generator=self._host(purpose))
        return numbers.expand(self.batch, -1)[self.rows]

    def field(self, *shape: int) -> Tensor:
        """fp32 [b, *shape], standard normal: the same numbers for all images of the global batch."""
        numbers = torch.randn(1, *shape, generator=self.generator, device=self.device)
        return numbers.expand(self.batch, *shape)[self.rows]

    def _host(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(*self.seed_keys, purpose))
