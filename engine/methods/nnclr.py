"""A nearest-neighbour contrastive head on a frozen encoder: stage two of MAE-CT (Lehner et al. 2023), after NNCLR
(Dwibedi et al., "With a Little Help from My Friends", ICCV 2021).

Shapes: b rows of this rank, B rows of all ranks, n images of the data set, N patches of a crop, L tokens that the encoder sees of
it, C encoder width, E embedding width, Q queue entries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, scaled_lr, with_decay
from engine.data.batch import Batch
from engine.data.views import Augmentation, two_views
from engine.methods.base import Method, Rows
from engine.methods.comparing import Comparing
from engine.methods.parts.contrast import pick_own
from engine.methods.settings import ColourSettings, StageSettings, depth_on_host
from engine.model.heads import head_flops, predictor, projector
from engine.model.memory import Queue
from engine.model.tokens import View, random_masking
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class NeighbourSettings(ColourSettings, StageSettings):
    """Heads that contrast with neighbours out of a queue: their sizes, and how neighbours are found."""

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
        return self.colour_rules() | {
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


@dataclass(frozen=True)
class DroppingSettings(NeighbourSettings):
    """Heads on an encoder that need not see every patch."""

    patch_keep: float = 1.0
    """Share of a large crop's patches that the encoder sees in training, drawn at random; below 1 is cheaper than the paper's."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {"patch-keep": (0 < self.patch_keep <= 1, "a share above 0, at most 1")}

    @property
    def shown_share(self) -> float:
        return self.patch_keep


@dataclass(frozen=True)
class Settings(DroppingSettings):
    """NNCLR head training; the defaults are MAE-CT's stage two (see engine/recipes/maect.py for sources)."""

    epochs: int = 20
    base_lr: float = 1e-4
    weight_decay: float = 1e-5
    """Of the head."""
    warmup: float = 0.2
    crop_scale: tuple[float, float] = (0.08, 1.0)
    reuse: int = 0
    """Encode so many pairs of crops of every image once, and train on their features, drawn at random; 0 encodes new crops at
    every step, as the paper. The features of n images take 8 * n * reuse * width bytes on every device."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        fits = self.reuse >= 0 and (self.patch_keep == 1 or not self.reuse)
        return super().rules() | {"reuse": (fits, "a whole number from 0, and 0 where patch-keep is below 1")}

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return depth_on_host(encoder)


class Nnclr(Comparing):
    """Each view's prediction must pick its own image's neighbour out of the batch's; the encoder is frozen.

    Attributes:
        stored: fp32 [n, pairs of crops, 2, C], the pooled features that are used again and again; no part of what is saved, since
            it follows from encoder, data and seed.
    """

    name = "nnclr"
    Settings = Settings
    trains_encoder = False
    shrinks = drops_patches = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.stored: Tensor | None = None
        self.projector = projector(encoder.embed_dim, settings.projector_hidden, settings.embedding)
        self.predictor = predictor(settings.embedding, settings.predictor_hidden)
        self.queue = Queue(settings.queue_size, settings.embedding)
        encoder.requires_grad_(False)

    @property
    def keep(self) -> int:
        """How many patches of a crop the encoder sees."""
        return self.kept(self.patches_of_crop)

    def views(self) -> tuple[Augmentation, ...]:
        return () if self.reuse else self.crops()

    @property
    def reuse(self) -> int:
        """Pairs of crops of every image whose features are stored."""
        return self.settings.reuse

    def crops(self) -> tuple[Augmentation, ...]:
        """The two crops of an image."""
        s = self.settings
        pair = two_views(self.size, s.crop_scale, s.augmentation)
        return tuple(replace(view, flip=s.flip, resize=s.resize, colours=s.colours) for view in pair)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        drawn = {f"choice{view}": draws.integers(self.settings.top_k) for view in (0, 1)}
        if self.reuse:
            return drawn | {"turn": draws.integers(self.reuse)}
        return drawn if self.keep == self.patches_of_crop else drawn | {"noise": draws.uniform(2, self.patches_of_crop)}

    def store(self, crops: Callable[[Sequence[Augmentation], int], Iterator[Batch]], images: int) -> None:
        self.stored = None
        for turn in range(self.reuse):
            batches = []
            for batch in crops(self.crops(), turn):
                pair_b2C = torch.stack(self.encoded(batch.images, None), 1).float()
                batches.append(dist.all_gather(pair_b2C).unflatten(0, (dist.world_size(), -1)))
            found_n2C = torch.cat(batches, 1).flatten(0, 1)[:images]  # rank by rank, as the shares lie
            if self.stored is None:
                self.stored = found_n2C.new_empty(images, self.reuse, *found_n2C.shape[1:])
            self.stored[:, turn] = found_n2C

    def pooled(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Features of both crops, per view [b, C]."""
        if self.reuse:
            return self.stored[ids, drawn["turn"]].unbind(1)
        with torch.no_grad():
            return self.encoded(images, drawn.get("noise"))

    def seen(self, images: tuple[Tensor, ...], noise_b2N: Tensor | None) -> list[View]:
        """Both crops, all of their patches or the `keep` of lowest noise."""
        if noise_b2N is None:
            return [View(view) for view in images]
        return [View(view, random_masking(noise_b2N[:, i], self.keep)[0]) for i, view in enumerate(images)]

    def encoded(self, images: tuple[Tensor, ...], noise_b2N: Tensor | None) -> tuple[Tensor, ...]:
        """Both crops through the encoder as one packed batch; per view [b, C]."""
        packed = self.encoder.encode(self.seen(images, noise_b2N), patch_size=self.patch_size)
        return tuple(self.encoder.pool(tokens_bLC) for tokens_bLC in packed.unpack())

    def query(self, projected: list[Tensor], pooled: list[Tensor]) -> list[Tensor]:
        """What is looked up and, for view 0, queued: per view [b, E]."""
        return projected

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        return {"pooled": list(self.pooled(images, ids, drawn))}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = rows["pooled"]
        # View by view, since every view has batch statistics of its own.
        projected = [self.projector(view_bC) for view_bC in pooled]
        predicted = [F.normalize(self.predictor(view_bE).float(), dim=-1) for view_bE in projected]
        with torch.no_grad():
            queries = [F.normalize(view_bE.float(), dim=-1) for view_bE in self.query(projected, pooled)]
            found = [
                self.queue.lookup(query_bE, ids, drawn[f"choice{view}"], self.settings.top_k)
                for view, query_bE in enumerate(queries)
            ]
            self.queue.offer(queries[0], ids)
            self.neighbours = self.queue.ids[found[0][1]]
        everyone = [dist.all_gather(prediction_bE) for prediction_bE in predicted]
        # The prediction from one view meets the neighbour of the other.
        loss = (self.contrast(found[1][0], everyone[0]) + self.contrast(found[0][0], everyone[1])) / 2
        if not self.moment.logged:
            return {"loss": loss}
        return {
            "loss": loss,
            "neighbour_similarity": torch.stack([similarity for _, _, similarity in found]).mean(),
            "queue_filled": (self.queue.ids >= 0).float().mean(),
        }

    def contrast(self, neighbours_bE: Tensor, predictions_BE: Tensor) -> Tensor:
        """Cross-entropy of picking the own prediction for each neighbour; negatives are the batch's other predictions."""
        return pick_own(neighbours_bE, predictions_BE, self.settings.temperature)

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
        encoding = 0.0 if self.reuse else self.encoder_flops(self.keep)
        return 2 * (encoding + 3 * (head_flops(self.projector) + head_flops(self.predictor)))

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
