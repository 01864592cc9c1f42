"""A nearest-neighbour contrastive head on a frozen encoder: stage two of MAE-CT (Lehner et al. 2023), after NNCLR
(Dwibedi et al., "With a Little Help from My Friends", ICCV 2021).

Shapes: b rows of this rank, B rows of all ranks, E embedding width, Q queue entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine import dist
from engine.data.pipeline import Augmentation, byol_views, minimal
from engine.draws import Draws
from engine.errors import BadInput
from engine.heads import Queue, head_flops, predictor, projector
from engine.methods.base import Method, StageSettings
from engine.optim import Group, scaled_lr, with_decay
from engine.tokens import View
from engine.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(StageSettings):
    """NNCLR head training; the defaults are MAE-CT's stage two (see engine/recipes/maect.py for sources)."""

    epochs: int = 20
    base_lr: float = 1e-4
    weight_decay: float = 1e-5
    """Of the head."""
    warmup: float = 0.2
    crop_scale: tuple[float, float] = (0.08, 1.0)
    augmentation: str = "minimal"
    """minimal (crop and flip) or byol (with colour, grayscale, blur and solarisation)."""
    projector_hidden: int = 2048
    predictor_hidden: int = 4096
    embedding: int = 256
    queue_size: int = 65536
    temperature: float = 0.15
    top_k: int = 1
    """The neighbour is drawn uniformly from this many nearest."""

    @property
    def splits(self) -> bool:
        return False

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "augmentation": (self.augmentation in ("minimal", "byol"), "minimal or byol"),
            "temperature": (self.temperature > 0, "a number above 0"),
            "top-k": (1 <= self.top_k <= self.queue_size, f"a whole number from 1 to the queue's {self.queue_size}"),
            "projector-hidden": (self.projector_hidden >= 1, "a whole number from 1"),
            "predictor-hidden": (self.predictor_hidden >= 1, "a whole number from 1"),
            "embedding": (self.embedding >= 1, "a whole number from 1"),
            "queue-size": (
                self.queue_size >= self.batch_size and self.queue_size % self.batch_size == 0,
                f"a multiple of the batch size {self.batch_size}",
            ),
        }


class Nnclr(Method):
    """Each view's prediction must pick its own image's neighbour out of the batch's; the encoder is frozen."""

    name = "nnclr"
    Settings = Settings
    trains_encoder = False

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.projector = projector(encoder.embed_dim, settings.projector_hidden, settings.embedding)
        self.predictor = predictor(settings.embedding, settings.predictor_hidden)
        self.queue = Queue(settings.queue_size, settings.embedding)
        encoder.requires_grad_(False)

    def views(self) -> tuple[Augmentation, ...]:
        size, scale = self.encoder.img_size, self.settings.crop_scale
        pair = byol_views(size, scale) if self.settings.augmentation == "byol" else (minimal(size, scale),) * 2
        return tuple(replace(view, flip=self.settings.flip) for view in pair)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return {f"choice{view}": draws.integers(self.settings.top_k) for view in (0, 1)}

    def pooled(self, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Both views through the encoder as one packed batch; per view [b, C]."""
        with torch.no_grad():
            packed = self.encoder.encode([View(view, None) for view in images])
            return tuple(self.encoder.pool(tokens_bLC) for tokens_bLC in packed.unpack())

    def query(self, projected: list[Tensor], pooled: tuple[Tensor, ...]) -> list[Tensor]:
        """What is looked up and, for view 0, queued: per view [b, E]."""
        return projected

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = self.pooled(images)
        # View by view, since every view has batch statistics of its own.
        projected = [self.projector(view_bC) for view_bC in pooled]
        predicted = [F.normalize(self.predictor(view_bE).float(), dim=-1) for view_bE in projected]
        with torch.no_grad():
            queries = [F.normalize(view_bE.float(), dim=-1) for view_bE in self.query(projected, pooled)]
            found = [self.lookup(query_bE, ids, drawn[f"choice{view}"]) for view, query_bE in enumerate(queries)]
            self.queue.offer(queries[0], ids)
            self.neighbours = self.queue.ids[found[0][1]]
        everyone = [dist.all_gather(prediction_bE) for prediction_bE in predicted]
        # The prediction from one view meets the neighbour of the other.
        loss = (self.contrast(found[1][0], everyone[0]) + self.contrast(found[0][0], everyone[1])) / 2
        return {
            "loss": loss,
            "neighbour_similarity": torch.stack([similarity for _, _, similarity in found]).mean(),
            "queue_filled": (self.queue.ids >= 0).float().mean(),
        }

    def lookup(self, query_bE: Tensor, ids: Tensor, choice_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A neighbour out of the queue, never of the same image: its key [b, E], slot int64 [b], and mean similarity."""
        similarity_bk, slot_bk = kernels.nearest_neighbours(
            query_bE, self.queue.keys, self.settings.top_k, query_ids=ids, key_ids=self.queue.ids
        )
        slot_b = slot_bk.gather(1, choice_b[:, None]).squeeze(1)
        return self.queue.keys[slot_b], slot_b, similarity_bk.gather(1, choice_b[:, None]).mean()

    def contrast(self, neighbours_bE: Tensor, predictions_BE: Tensor) -> Tensor:
        """Cross-entropy of picking the own prediction for each neighbour; negatives are the batch's other predictions."""
        targets_b = torch.arange(len(neighbours_bE), device=neighbours_bE.device) + dist.rank() * len(neighbours_bE)
        return kernels.info_nce(neighbours_bE, predictions_BE, targets_b, self.settings.temperature)

    def groups(self, images_per_step: int) -> Iterator[Group]:
        return self.head_groups(images_per_step, self.settings.base_lr, self.settings.weight_decay)

    def head_groups(self, images_per_step: int, base_lr: float, weight_decay: float) -> Iterator[Group]:
        named = [
            (f"{part}.{name}", parameter)
            for part in ("projector", "predictor")
            for name, parameter in getattr(self, part).named_parameters()
        ]
        # Both views count as images in MAE-CT's scaling rule.
        return with_decay(named, scaled_lr(base_lr, 2 * images_per_step), weight_decay)

    def flops_per_image(self) -> float:
        patches = self.encoder.grid[0] * self.encoder.grid[1]
        return 2 * (self.encoder.flops(patches) + 3 * (head_flops(self.projector) + head_flops(self.predictor)))

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        super().after_step(applied)
        self.queue.commit(applied)

    def inherit(self, earlier: Method) -> None:
        if isinstance(earlier, Nnclr):
            for part in ("projector", "predictor", "queue"):
                try:
                    getattr(self, part).load_state_dict(getattr(earlier, part).state_dict())
                except RuntimeError as error:
                    raise BadInput(
                        f"{self.name} takes its {part} from {earlier.name}, so both stages need equal sizes of it."
                    ) from error

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self, "contrast"
