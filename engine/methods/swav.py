"""SwAV (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020).

Shapes: b images of this rank, R rows of all crops (view by view, b each), G rows with targets, E width of what prototypes are
compared with, K prototypes, Q queue entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core import dist
from engine.core.optim import Group
from engine.methods.base import Rows
from engine.methods.clustering import Clustering, ClusteringSettings
from engine.methods.parts.collapse import Collapse, Targets
from engine.model.heads import UnitPrototypes, head_flops, swav_projector
from engine.model.memory import Queue
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(ClusteringSettings):
    """SwAV; the defaults are the released recipe's (see engine/recipes/swav.py for sources)."""

    base_lr: float = 0.3
    start_lr: float = 0.3
    end_lr: float = 0.0048
    weight_decay: float = 1e-6
    optimizer: str = "larc"
    betas: tuple[float, float] = (0.9, 0.999)
    collapse: str = "sinkhorn"
    crop_scale: tuple[float, float] = (0.14, 1.0)
    local_crops: int = 6
    local_scale: tuple[float, float] = (0.05, 0.14)
    prototypes: int = 3000
    target_temperature: float = 0.05
    target_temperature_start: float = 0.05
    projector_hidden: int = 2048
    embedding: int = 128
    """Width of what the prototypes are compared with."""
    decay_all: bool = False
    """Let biases and norms decay, too."""
    queue_size: int = 0
    """Images whose large crops are balanced along with the batch's, for small batches; 0 keeps none."""
    queue_from: int = 15
    """Epochs before the queue is used."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "global-crops": (self.global_crops >= 2, "a whole number from 2"),
            "projector-hidden": (self.projector_hidden >= 1, "a whole number from 1"),
            "embedding": (self.embedding >= 1, "a whole number from 1"),
            "queue-size": (
                self.queue_size >= 0 and self.queue_size % self.batch_size == 0,
                f"0 or a multiple of the batch size {self.batch_size}",
            ),
            "queue-from": (self.queue_from >= 0, "a whole number from 0"),
        }

    @property
    def splits(self) -> bool:
        return False  # the projector's batch norm compares images, whatever keeps the prototypes apart

    def ungraphed(self, encoder: VisionTransformer) -> str:
        queue = "the queue of keys comes into use after some epochs" if self.queue_size else ""
        return self.on_host(encoder) or queue


class Swav(Clustering):
    """Every crop predicts the prototypes that the other large crops of its image were assigned, all by one network."""

    name = "swav"
    Settings = Settings
    shrinks = drops_patches = True
    last_layers = ("prototypes.",)

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.projector = swav_projector(encoder.embed_dim, settings.projector_hidden, settings.embedding)
        self.prototypes = UnitPrototypes(settings.embedding, settings.prototypes)
        queues = settings.global_crops if settings.queue_size else 0
        self.queues = torch.nn.ModuleList(Queue(settings.queue_size, settings.embedding) for _ in range(queues))

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors fp32 [n, E] of pooled features [n, C]."""
        return F.normalize(self.projector(features).float(), dim=1)

    def scores(self, features: Tensor) -> Tensor:
        return self.prototypes(self.embed(features))

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        seen = self.encode([View(view) for view in images], drawn)
        return {"pooled": [self.encoder.pool(tokens_bLC) for tokens_bLC in seen]}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        crops, pooled = self.settings.global_crops, rows["pooled"]
        # one pass of the head: the statistics of its batch norm are those of all crops together
        embedded_RE = self.embed(torch.cat(pooled))
        scores_RK = self.prototypes(embedded_RE)
        views, large = (crops, len(pooled)), crops * len(ids)
        loss, spread, health = self.predict_views(scores_RK[:large], scores_RK, views)
        for queue, embedded_bE in zip(self.queues, embedded_RE.split(len(ids))):
            queue.offer(embedded_bE, ids)
        return {"loss": loss + spread} | health

    @torch.no_grad()
    def targets(self, collapse: Collapse, scores_GK: Tensor, count: None = None) -> Targets:
        """Targets of the large crops, never padded: each view is balanced by itself, with its queue where that is in use."""
        views, parts = scores_GK.chunk(self.settings.global_crops), []
        for view, scores_bK in enumerate(views):
            if self.queue_in_use:
                # every rank keeps the whole queue and balances its share
                keys_qE = self.queues[view].keys[dist.rank() :: dist.world_size()]
                together = super().targets(collapse, torch.cat([self.prototypes(keys_qE), scores_bK]))
                parts.append(together[len(keys_qE) :])
            else:
                parts.append(super().targets(collapse, scores_bK))
        return Targets.stack(parts)

    @property
    def queue_in_use(self) -> bool:
        """From its epoch on, and not before it is full."""
        settings = self.settings
        filled = self.moment.seen >= settings.queue_size
        return settings.queue_size > 0 and filled and self.moment.epoch >= settings.queue_from

    def groups(self, images_per_step: int) -> Iterator[Group]:
        for group in super().groups(images_per_step):
            yield replace(group, weight_decay=self.settings.weight_decay) if self.settings.decay_all else group

    def flops_per_image(self) -> float:
        return self.student_flops(self.projector) + 3 * len(self.views()) * head_flops(self.prototypes)

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        super().after_step(applied)
        for queue in self.queues:
            queue.commit(applied)
