"""The contract between a pretext task and the engine.

A method says which views it wants, what it draws at random, and what it minimises. It knows nothing of devices, ranks,
precision or logging. One method is one file in this folder, found by its name; deleting the file removes the method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import CLIP_OVER, OPTIMIZERS, SCHEDULES, Average, Group, Moment
from engine.data.batch import Batch
from engine.data.sources import ImageSet
from engine.data.views import Augmentation
from engine.methods.parts.collapse import Collapse
from engine.model.depth import drops
from engine.model.heads import BatchNorm, Classifier, UnitPrototypes
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class StageSettings:
    """What every stage of training has. Learning rates are per 256 images (views counted where the method says so)."""

    epochs: int = 100
    batch_size: int = 1024
    """Images of a step over all ranks."""
    base_lr: float = 1.5e-4
    start_lr: float = 0.0
    """Learning rate at the first step of the warm-up, as it is: for no number of images."""
    end_lr: float = 0.0
    """Learning rate at the end of the schedule, as it is. Parameters with a lower rate start and end in proportion."""
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    """Weight decay at the end of a cosine that starts at weight-decay; None keeps it constant."""
    optimizer: str = "adamw"
    """adamw, or larc (SGD whose steps are in proportion to each tensor's norm)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW; the first one is also larc's momentum."""
    warmup: float = 0.05
    """Share of the stage's steps with a linearly rising learning rate; the schedule follows."""
    schedule: str = "cosine"
    """Of the learning rate after the warm-up: cosine (half a one, to end-lr), quarter-cosine, or steps (at each of drops)."""
    drops: tuple[float, ...] = ()
    """Shares of the stage's steps at which the schedule steps divides the learning rate by ten."""
    horizon: float = 1.0
    """All schedules end at this multiple of the stage's steps; above 1 training stops on the way."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    clip_over: str = "all"
    """What that norm is taken over: all gradients, each part (encoder, each head), or each tensor."""
    weight_ema: float = 0.0
    """Decay of an average of the weights of encoder and classifier, which is then what is probed and exported; 0 keeps none."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def check(self, stage: str) -> None:
        """Raise BadInput for a value that cannot be meant."""
        low, high = self.crop_scale
        rules = {
            "epochs": (self.epochs >= 1, "a whole number from 1"),
            "batch-size": (self.batch_size >= 1, "a whole number from 1"),
            "base-lr": (self.base_lr > 0, "a number above 0"),
            "start-lr": (self.start_lr >= 0, "a number from 0"),
            "end-lr": (self.end_lr >= 0, "a number from 0"),
            "weight-decay": (self.weight_decay >= 0, "a number from 0"),
            "weight-decay-end": (
                self.weight_decay_end is None or (self.weight_decay_end >= 0 and self.weight_decay > 0),
                "None, or a number from 0 where weight-decay is above 0",
            ),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1"),
            "warmup": (0 <= self.warmup <= 1, "a share from 0 to 1"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "drops": (
                bool(self.drops) == (self.schedule == "steps")
                and list(self.drops) == sorted(self.drops)
                and all(self.warmup <= share < 1 for share in self.drops),
                "ascending shares between warmup and 1 where the schedule is steps, else nothing",
            ),
            "horizon": (self.horizon >= 1, "a number from 1"),
            "clip-norm": (self.clip_norm >= 0, "a number from 0"),
            "clip-over": (self.clip_over in CLIP_OVER, f"one of {', '.join(CLIP_OVER)}"),
            "weight-ema": (0 <= self.weight_ema < 1, "a number from 0 to below 1"),
            "crop-scale": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "flip": (0 <= self.flip <= 1, "a probability from 0 to 1"),
        } | self.rules()
        for name, (holds, wanted) in rules.items():
            if not holds:
                value = getattr(self, name.replace("-", "_"))
                raise BadInput(f"--{stage}.{name} is {value}; it must be {wanted}.")

    def rules(self) -> dict[str, tuple[bool, str]]:
        """A method's further rules: flag -> (whether it holds, what is valid)."""
        return {}

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        """Raise BadInput for a value that does not fit the encoder."""

    def ungraphed(self, encoder: VisionTransformer) -> str:
        """Why forward and backward of a step can't be captured once and then replayed (`engine.training.graphs`), in words; ""
        where they can.

        They can where all that differs from step to step lies in tensors, of shapes that stay: images, ids and draws, which are
        copied to the device before; weights and buffers, which change in place; a module's list `pending`, which may pass tensors
        on to `after_step`. The host reads none of them, and no number of Python that changes by the step is computed with. A
        method says so itself; unless it does, it can't.
        """
        return "nobody has shown that this method's step is the same at every replay"

    @property
    def splits(self) -> bool:
        """Whether the mean over micro-batches of their losses is the batch's loss: not where its images are compared, for which
        there is `Comparing`."""
        return True

    @property
    def labelled(self) -> bool:
        """Whether the stage needs to know the images' classes."""
        return False

    @property
    def shots(self) -> int:
        """How many images of each class the stage trains on; 0 is all."""
        return 0


@dataclass(frozen=True)
class LabelledSettings(StageSettings):
    """Of a stage that may learn from classes."""

    labels_per_class: int = 0
    """Train on so many images of each class only, the same ones for every method of one seed; 0 trains on all."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "labels-per-class": (
                self.labels_per_class >= 0 and (self.labelled or not self.labels_per_class),
                "a whole number from 0, and 0 where no class is learned",
            )
        }

    @property
    def labelled(self) -> bool:
        return True

    @property
    def shots(self) -> int:
        return self.labels_per_class


RAGGED = "how many patches are masked differs from step to step"


def depth_on_host(encoder: VisionTransformer) -> str:
    """What `StageSettings.ungraphed` says of a step that encodes under stochastic depth."""
    return "stochastic depth is drawn on the host" if any(encoder.drop_path_rates) else ""


Rows = dict[str, list[Tensor]]
"""What is known of a batch's images: by name and view by view a tensor whose first dimension goes image by image, so that those
of micro-batches, one after the other, are the batch's."""


@dataclass(frozen=True)
class Labels:
    """The classes of a stage's images.

    Attributes:
        of_id: int64 [n], by dataset id; where an image may show several, int8 [n, K]: 1 present, 0 absent, -1 not to be counted.
        names: of all classes, also of those that the stage has no image of.
    """

    of_id: Tensor
    names: tuple[str, ...]


class Method(nn.Module, ABC):
    """A pretext task over one encoder. Made as Kind(encoder, settings), or Kind(encoder, settings, labels) where the settings are
    labelled.

    Attributes:
        name: the file's name, and the name on the command line.
        Settings: the dataclass of its settings.
        trains_encoder: whether the encoder differs after the stage.
        draws_ahead: whether `draw` is work for the host: then each step's is done in another thread while the step before trains,
            and must ask neither for the device nor for anything that an update changes.
        neighbours: dataset ids int64 [b] that the last step's lookup found for its images, -1 for none; else None.
        prototype_count: how many prototypes the images are shared out to; 0 where the method does not cluster.
        classifier: scores of the classes from `features`, where the method learns them: judged by every probe, averaged with the
            encoder, exported as its head; else None.
        moment: where in the stage the current update lies.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[StageSettings]]
    trains_encoder: ClassVar[bool] = True
    draws_ahead: ClassVar[bool] = False

    def __init__(self, encoder: VisionTransformer, settings: StageSettings):
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.neighbours: Tensor | None = None
        self.prototype_count = 0
        self.classifier: Classifier | None = None
        self.moment = Moment()

    @property
    def evaluated(self) -> VisionTransformer:
        """The encoder that is probed, exported and judged."""
        return self.encoder

    @abstractmethod
    def views(self) -> tuple[Augmentation, ...]:
        """The crops of one image that a step sees; none, if the method has stored what it needs of them."""

    def store(self, crops: Callable[[Sequence[Augmentation], int], Iterator[Batch]], images: int) -> None:
        """Asked of a method without views before its steps, of a resumed run too: go through the data and keep what is needed.

        Args:
            crops: given views and a turn, goes through this rank's share of the images once (`engine.data.pipeline.each_once`).
            images: of all ranks' shares together.
        """
        raise NotImplementedError

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Look at the data once, before the first step of a stage; not called when a run is resumed, so what it finds goes into
        buffers, which checkpoints hold.
        """

    def keepsakes(self, folder: Path) -> None:
        """Write into the run folder what belongs beside the weights; asked of the first rank, once `prepare` is done."""

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        """Random choices of one step: tensors whose first dimension is this rank's images. Here, those of stochastic depth."""
        return {"depth": draws.seeds()} if any(self.encoder.drop_path_rates) else {}

    def encode(self, views: Sequence[View], drawn: dict[str, Tensor]) -> list[Tensor]:
        """The encoder's tokens [b, L, C] of each view: all views, whatever their sizes, in one pass, under stochastic depth as
        drawn."""
        generator = None
        if "depth" in drawn:
            generator = torch.Generator().manual_seed(int(drawn["depth"][0]))
        return self.encoder.encode(views, generator).unpack()

    def begin(self, moment: Moment) -> None:
        """Told before each update. What depends on the step is computed from `self.moment` where it is needed, so there is
        nothing to save; such numbers must not enter a compiled region, which would compile again at every step.
        """
        self.moment = moment

    @abstractmethod
    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            images: one fp32 [b, 3, H, W] per view.
            ids: int64 [b], which image of the data set each row is.
            drawn: what `draw` returned.

        Returns:
            "loss", to be minimised, and further detached scalars to be logged. What is computed for these alone is left out where
            `self.moment.logged` is false; outside compiled regions, which would compile again.
        """

    @abstractmethod
    def groups(self, images_per_step: int) -> Iterator[Group]:
        """The parameters to train, with peak learning rates for a global batch of so many images."""

    @abstractmethod
    def flops_per_image(self) -> float:
        """Operations of a step per image, in matrix products: three passes where there are gradients, else one."""

    def averages(self) -> Iterator[Average]:
        """What follows the trained weights at this update (a teacher); it is moved with them."""
        yield from ()

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        """Update what is neither trained by gradients nor such an average (queues, statistics), when weights and averages have
        moved. `applied` is false, on the device, for a skipped update: then nothing may change.
        """
        for module in self.modules():
            if isinstance(module, BatchNorm | Collapse | UnitPrototypes):
                module.commit(applied)

    def inherit(self, earlier: "Method") -> None:
        """Take over trained parts of an earlier stage. The encoder is the same object in all stages."""

    def regions(self) -> Iterator[tuple[object, str]]:
        """Functions, as (owner, attribute), that are compiled full-graph."""
        for block in self.encoder.blocks:
            yield block, "forward"

    def regions_on_gpus(self) -> Iterator[tuple[object, str]]:
        """Likewise, but where it isn't worth its compilation on a CPU: few operations, which on a GPU are passes over memory."""
        if isinstance(self.encoder.norm, nn.LayerNorm):
            yield self.encoder.norm, "forward"

    def ragged_regions(self) -> Iterator[tuple[object, str]]:
        """Likewise, but meeting another number of rows at nearly every call, as blocks do of which stochastic depth drops rows:
        compiled once for any number.
        """
        for block, rate in zip(self.encoder.blocks, self.encoder.drop_path_rates, strict=True):
            if drops(rate, block.norm1.weight.device):
                yield block, "forward_dropped"

    def features(self, images: Tensor) -> Tensor:
        """What evaluation sees: fp32 [B, C], the encoder's pooled output for whole images [B, 3, H, W]."""
        return self.evaluated.pool(self.evaluated(images)).float()

    def choose(self, features: Tensor) -> Tensor:
        """The prototype of each of these features [n, C], int64 [n]; asked only where there are prototypes."""
        raise NotImplementedError


class Comparing(Method):
    """A method whose loss compares the images of a batch, in two parts: what each image is represented by, and what is made of
    these rows.

    So a batch that is too large for one pass is represented in micro-batches and compared as a whole
    (`engine.training.gradient_cache`), which calls `represent` up to twice, and the others once for an update. What one image's
    rows are depends on no other image (a norm over the batch belongs into `compare`, and so do queues and all that
    `after_step` takes up), and on random numbers through `drawn` only.
    """

    @abstractmethod
    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """The rows that gradients flow through; arguments as of `forward`. A term of the loss that is a mean over images may be
        among them, as one row [1]."""

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """The rows that they are compared with, a teacher's for example, under names of their own; called without autograd."""
        return {}

    @abstractmethod
    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `forward` returns, from the rows of both kinds of the whole batch, with its ids and draws."""

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = self.represent_targets(images, ids, drawn)
        return self.compare(self.represent(images, ids, drawn) | targets, ids, drawn)
