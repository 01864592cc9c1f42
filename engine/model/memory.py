"""What a method remembers from step to step, without gradients: the teacher, an average of weights, and the queue of keys.

Shapes: B images of all ranks, b those of this one, C channels, k near keys.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from engine.core import dist
from engine.model.vit import VisionTransformer


class Teacher(nn.Module):
    """Exponential averages of modules, without gradients: Teacher(encoder=..., head=...) has `encoder` and `head`."""

    def __init__(self, **online: nn.Module):
        super().__init__()
        for name, module in online.items():
            twin = module.copy() if isinstance(module, VisionTransformer) else deepcopy(module)
            self.add_module(name, twin.requires_grad_(False))

    def pairs(self, online: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        """Each average with what it follows, of the part of that name in `online`; frozen weights follow none.

        Statistics of batch norm are left alone: they are of what the teacher itself saw.
        """
        pairs = []
        for name, average in self.named_children():
            module = getattr(online, name)
            pairs += [(a, p) for a, p in zip(average.parameters(), module.parameters()) if p.requires_grad]
        return pairs


class Queue(nn.Module):
    """A first-in-first-out ring of normalised keys with the dataset ids they came from, equal on every rank.

    Starts as normalised Gaussian noise with id -1. Keys offered in a step are written by `commit`, after all lookups.
    """

    def __init__(self, size: int, features: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, features), dim=-1))
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.pending: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def lookup(self, queries_bC: Tensor, ids_b: Tensor, choice_b: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """A near key for each unit query, never of the same image: of its `top_k` nearest that of rank `choice`, int64 [b].

        Returns keys [b, C], their slots int64 [b], and the mean similarity.
        """
        similarity_bk, slot_bk = kernels.nearest_neighbours(
            queries_bC, self.keys, top_k, query_ids=ids_b, key_ids=self.ids
        )
        slot_b = slot_bk.gather(1, choice_b[:, None]).squeeze(1)
        return self.keys[slot_b], slot_b, similarity_bk.gather(1, choice_b[:, None]).mean()

    def offer(self, keys_bC: Tensor, ids_b: Tensor) -> None:
        """Hand in this rank's new keys, [b, C]."""
        self.pending[:] = [(dist.all_gather(keys_bC.detach().float()), dist.all_gather(ids_b))]

    @torch.no_grad()
    def commit(self, applied: Tensor) -> None:
        """Write the offered keys over the oldest ones, if the update was applied."""
        ((keys_BC, ids_B),) = self.pending
        self.pending.clear()
        slots_B = (self.pointer + torch.arange(len(keys_BC), device=keys_BC.device)) % len(self.keys)
        self.keys[slots_B] = torch.where(applied, keys_BC, self.keys[slots_B])
        self.ids[slots_B] = torch.where(applied, ids_B, self.ids[slots_B])
        self.pointer.add_(applied * len(keys_BC)).remainder_(len(self.keys))
