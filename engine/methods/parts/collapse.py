"""What keeps a clustering from collapsing: centring, ME-MAX, Sinkhorn-Knopp, or nothing; interchangeable.

Scores of prototypes become target distributions, without gradients, and a student predicts them. Left alone, all images end
in one prototype, or in all of them alike. What is done about it:

    centring         targets are softmax((scores - centre) / T); the centre is a momentum average of the scores
                     (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021: DINO)
    me-max           targets are softmax(scores / T); the loss gains log K - entropy of the student's mean prediction
                     (Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022: MSN)
    sinkhorn         the centre is solved for, such that all prototypes share the rows of all ranks equally
                     (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020: SwAV)
    me-max+sinkhorn  both, as MSN's released configurations have it
    none             targets are softmax(scores / T)

Shapes: G rows with targets, R rows of the student (images or patches, of this rank), V targets that a row meets, K prototypes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import kernels
from engine.core import dist
from engine.core.lasting import lasting
from kernels.sinkhorn import balanced_by
from kernels.soft_cross_entropy import met_by

CHOICES = ("centring", "me-max", "sinkhorn", "me-max+sinkhorn", "none")


@dataclass(frozen=True)
class Targets:
    """Target distributions of G rows: softmax((scores - centre) / temperature), formed where they are met. No loss stores them;
    `probabilities`, which health is measured on, does.

    Attributes:
        scores: [G, K], without gradient.
        centre: fp32 [K] (fp64 for fp64 scores), or None for zeros.
    """

    scores: Tensor
    temperature: float
    centre: Tensor | None = None

    @cached_property
    def probabilities(self) -> Tensor:
        """fp32 [G, K] (fp64 for fp64 scores); rows sum to 1."""
        return (self._centred() / self.temperature).softmax(1)

    def _centred(self) -> Tensor:
        scores_GK = _wide(self.scores)
        return scores_GK if self.centre is None else scores_GK - self.centre

    def __getitem__(self, rows: slice) -> "Targets":
        return Targets(self.scores[rows], self.temperature, self.centre)

    @staticmethod
    def stack(parts: Sequence["Targets"]) -> "Targets":
        """The rows of all parts, which have one temperature, one after the other; centres of their own go into the scores."""
        temperature, centre = parts[0].temperature, parts[0].centre
        if all(part.centre is centre for part in parts):
            return Targets(torch.cat([part.scores for part in parts]), temperature, centre)
        return Targets(torch.cat([part._centred() for part in parts]), temperature)


@cache  # a captured step reads them where they lie
def _meetings(
    target_views: int, student_views: int, images: int, skip_same: bool, device: torch.device
) -> tuple[Tensor, int]:
    """Which target rows each row of the student meets, int64 [student views * images, target views], and the pairs of views."""
    with lasting():
        views_T = torch.arange(target_views, device=device)
        views_S1 = torch.arange(student_views, device=device)[:, None]
        meet_ST = (views_S1 != views_T) | (not skip_same)
        rows_SbT = views_T * images + torch.arange(images, device=device)[:, None].expand(student_views, -1, -1)
        rows_RT = torch.where(meet_ST[:, None], rows_SbT, -1).flatten(0, 1)
    return rows_RT, target_views * student_views - skip_same * min(target_views, student_views)


class Collapse(nn.Module):
    """One of `CHOICES`, for one set of prototypes.

    What it learns of a step waits in `pending` until `commit`, so that a skipped update leaves the centre as it was.

    Args:
        choice: which.
        prototypes: K.
        centre_momentum: share of the old centre that an update keeps.
        me_max_weight: of ME-MAX's term in the loss.
        from_probabilities: Sinkhorn-Knopp starts from softmax(scores / T), as MSN has it, not from exp(scores / T), as SwAV and
            DINOv2 do. After a few iterations the two differ.
    """

    def __init__(
        self,
        choice: str,
        prototypes: int,
        *,
        centre_momentum: float = 0.9,
        me_max_weight: float = 1.0,
        from_probabilities: bool = False,
    ):
        super().__init__()
        if choice not in CHOICES:
            raise ValueError(f"collapse {choice!r} is unknown; choose one of {', '.join(CHOICES)}")
        self.prototypes, self.centre_momentum, self.me_max_weight = prototypes, centre_momentum, me_max_weight
        self.centres, self.balances, self.maximises = choice == "centring", "sinkhorn" in choice, "me-max" in choice
        self.from_probabilities = from_probabilities
        self.register_buffer("centre", torch.zeros(prototypes) if self.centres else None)
        self.pending: list[Tensor] = []
        self.meet, self.balance = kernels.soft_cross_entropy, _balance

    @torch.no_grad()
    def targets(self, scores_RK: Tensor, temperature: float, count: int | None = None) -> Targets:
        """Targets of these rows; Sinkhorn-Knopp balances them together, over all ranks, each with rows of its own number. Those
        past the first `count` are padding: they get targets, and have no part in the balance."""
        scores_RK = scores_RK.detach()
        if not self.balances:
            return Targets(scores_RK, temperature, self.centre)
        started_RK = _wide(scores_RK[:0]) if self.from_probabilities else scores_RK
        plain = balanced_by(started_RK) == "plain"
        balance, given = self.balance if plain else _balance, _given(temperature, scores_RK, plain)
        return Targets(scores_RK, temperature, balance(scores_RK[:count], given, self.from_probabilities, dist.group()))

    def cross_entropy(
        self,
        targets: Targets,
        student_RK: Tensor,
        temperature: float,
        rows_RV: Tensor | None = None,
        weights_R: Tensor | None = None,
    ) -> Tensor:
        """Mean over the student's rows, or with weights [R] their sum, of -sum_k target log softmax(student / temperature).

        The one place where a student meets soft targets. `rows_RV`, int64 [R, V], names the targets of each row of the student,
        whose cross-entropies are added, -1 for none; None pairs row with row.
        """
        plain = met_by(targets.scores, student_RK, rows_RV) == "plain"
        meet = self.meet if plain else kernels.soft_cross_entropy
        temperatures = (_given(t, student_RK, plain) for t in (targets.temperature, temperature))
        return meet(targets.scores, student_RK, *temperatures, targets.centre, weights_R, rows_RV)

    def across_views(
        self,
        targets: Targets,
        student_RK: Tensor,
        temperature: float,
        views: tuple[int, int],
        *,
        skip_same: bool = True,
    ) -> Tensor:
        """Mean cross-entropy over all pairs of a target view and a student view of the same image.

        Args:
            targets: of views[0] views, image by image within a view.
            student_RK: scores of views[1] views, likewise.
            skip_same: view i of the targets shows what view i of the student shows, and these pairs are left out.
        """
        images = len(student_RK) // views[1]
        rows_RV, pairs = _meetings(*views, images, skip_same, student_RK.device)
        return self.cross_entropy(targets, student_RK, temperature, rows_RV) * (views[1] / pairs)

    def regions(self) -> Iterator[tuple[object, str]]:
        """What may be compiled, as `engine.methods.base.Method.regions` has it: what is called where plain implementations run,
        which the compiler sees through, and only there."""
        yield self, "meet"
        if self.balances:
            yield self, "balance"

    def regulariser(self, student_RK: Tensor, temperature: float, count: int | None = None) -> Tensor:
        """ME-MAX's term, weighted: log K - entropy of the student's mean prediction over all rows of all ranks, on each the first
        `count` where others are padding; else 0.

        Ranks may hold different numbers of rows; where there are none at all it is 0. Gradients flow through the students of all
        ranks.
        """
        if not self.maximises:
            return student_RK.new_zeros((), dtype=torch.float32)
        p_RK = (_wide(student_RK) / temperature).softmax(1)[:count]
        total_K = p_RK.sum(0)
        summed = dist.all_reduce(torch.cat([total_K, total_K.new_full((1,), len(p_RK))]))
        mean_K = summed[:-1] / summed[-1].clamp_min(1)
        # a prototype of no mass at all has no slope, where its logarithm's would be infinite
        negative_entropy = (mean_K * mean_K.clamp_min(torch.finfo(mean_K.dtype).tiny).log()).sum()
        return self.me_max_weight * torch.where(summed[-1] > 0, math.log(self.prototypes) + negative_entropy, 0.0)

    @torch.no_grad()
    def observe(self, scores_RK: Tensor) -> None:
        """Hand in the scores that the centre follows: after their targets were met, before the update. Ranks may hold different
        numbers of rows; none at all leave the centre where it is."""
        if self.centres:
            total_K = scores_RK.detach().sum(0, dtype=torch.float32)
            summed = dist.all_reduce(torch.cat([total_K, total_K.new_full((1,), len(scores_RK))]))
            self.pending.append(torch.where(summed[-1] > 0, summed[:-1] / summed[-1].clamp_min(1), self.centre))

    @torch.no_grad()
    def commit(self, applied: Tensor) -> None:
        """Move the centre by what was handed in since the last call, if the update was applied. Micro-batches count as one."""
        if self.pending:
            moved_K = torch.lerp(self.centre, torch.stack(self.pending).mean(0), 1 - self.centre_momentum)
            self.centre.copy_(torch.where(applied, moved_K, self.centre))
        self.pending.clear()

    @torch.no_grad()
    def choose(self, scores_RK: Tensor) -> Tensor:
        """The prototype of each row, int64 [R]: the largest score, above the centre where there is one."""
        return (scores_RK if self.centre is None else scores_RK.float() - self.centre).argmax(1)

    @torch.no_grad()
    def health(self, targets: Targets, prefix: str = "") -> dict[str, Tensor]:
        """Scalars to be logged, of this rank's rows.

        Returns:
            prototype_usage: `usage` of the targets' likeliest prototypes.
            target_entropy: mean entropy of a target over log K: 0 where targets are certain, 1 where they say nothing.
            centre_norm: only with a centre.
        """
        q_GK = targets.probabilities
        measured = {
            "prototype_usage": usage(q_GK.argmax(1), self.prototypes),
            "target_entropy": -torch.xlogy(q_GK, q_GK).sum(1).mean() / math.log(self.prototypes),
        }
        if self.centre is not None:
            measured["centre_norm"] = self.centre.norm()
        return {prefix + name: value for name, value in measured.items()}


@torch.no_grad()
def usage(indices: Tensor, count: int) -> Tensor:
    """How evenly prototypes (or queue entries) are chosen: perplexity of the choices over the largest possible one.

    Args:
        indices: int64 of any shape, chosen entries in [0, count).
        count: entries there are to choose from.

    Returns:
        fp32 scalar on the device of `indices` (no host sync): 1 where use is even, 1 / min(count, choices) where all
        choices are the same.
    """
    indices = indices.flatten()
    chosen = torch.zeros(count, dtype=torch.int64, device=indices.device)
    share = chosen.index_add_(0, indices, torch.ones_like(indices)).double() / indices.numel()
    return (torch.exp(-torch.xlogy(share, share).sum()) / min(count, indices.numel())).float()


def _balance(
    scores_RK: Tensor, temperature: float | Tensor, from_probabilities: bool, group: ProcessGroup | None
) -> Tensor:
    """The centre [K] that Sinkhorn-Knopp finds for the rows of a group of ranks."""
    if not from_probabilities:
        return kernels.sinkhorn_centre(scores_RK, temperature, group=group)
    log_p_RK = (_wide(scores_RK) / temperature).log_softmax(1)
    return kernels.sinkhorn_centre(log_p_RK, 1.0, group=group) * temperature


def _given(temperature: float, like: Tensor, plain: bool) -> float | Tensor:
    """The temperature as an op is given it on the device of `like`: in its plain form as a tensor [], for compiled code would be
    compiled again for another number."""
    if not plain:
        return temperature
    return torch.full((), temperature, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
