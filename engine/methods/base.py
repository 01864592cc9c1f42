"""The contract between a pretext task and the engine.

A method says which views it wants, what it draws at random, and what it minimises. It knows nothing of devices, ranks,
precision or logging. One method is one file in this folder, found by its name; deleting the file removes the method.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.data.pipeline import Augmentation
from engine.draws import Draws
from engine.errors import BadInput
from engine.heads import BatchNorm
from engine.optim import Group
from engine.vit import VisionTransformer


@dataclass(frozen=True)
class StageSettings:
    """What every stage of training has. Learning rates are per 256 images (views counted where the method says so)."""

    epochs: int = 100
    batch_size: int = 1024
    """Images of a step over all ranks."""
    base_lr: float = 1.5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.05
    """Share of the stage's steps with a linearly rising learning rate; half a cosine to zero follows."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    weight_ema: float = 0.0
    """Decay of an average of the encoder's weights, which is then what is probed and exported; 0 keeps none."""
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
            "weight-decay": (self.weight_decay >= 0, "a number from 0"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1"),
            "warmup": (0 <= self.warmup <= 1, "a share from 0 to 1"),
            "clip-norm": (self.clip_norm >= 0, "a number from 0"),
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

    def check_encoder(self, encoder: VisionTransformer) -> None:
        """Raise BadInput for a value that does not fit the encoder."""


class Method(nn.Module, ABC):
    """A pretext task over one encoder.

    Attributes:
        name: the file's name, and the name on the command line.
        Settings: the dataclass of its settings.
        trains_encoder: whether the encoder differs after the stage.
        accumulates: whether splitting a batch leaves the loss as it is (contrastive losses compare within the batch).
        neighbours: dataset ids int64 [b] that the last step's lookup found for its images, -1 for none; else None.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[StageSettings]]
    trains_encoder: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def __init__(self, encoder: VisionTransformer, settings: StageSettings):
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.neighbours: Tensor | None = None

    @abstractmethod
    def views(self) -> tuple[Augmentation, ...]:
        """The crops of one image that a step sees."""

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        """Random choices of one step: tensors whose first dimension is this rank's images."""
        return {}

    @abstractmethod
    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            images: one fp32 [b, 3, H, W] per view.
            ids: int64 [b], which image of the data set each row is.
            drawn: what `draw` returned.

        Returns:
            "loss", to be minimised, and further detached scalars to be logged.
        """

    @abstractmethod
    def groups(self, images_per_step: int) -> Iterator[Group]:
        """The parameters to train, with peak learning rates for a global batch of so many images."""

    @abstractmethod
    def flops_per_image(self) -> float:
        """Operations of a step per image, in matrix products: three passes where there are gradients, else one."""

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        """Update what is not trained by gradients (averages, queues). `applied` is false, on the device, for a skipped update:
        then nothing may change.
        """
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.commit(applied)

    def inherit(self, earlier: "Method") -> None:
        """Take over trained parts of an earlier stage. The encoder is the same object in all stages."""

    def regions(self) -> Iterator[tuple[object, str]]:
        """Functions, as (owner, attribute), that are compiled full-graph."""
        for block in self.encoder.blocks:
            yield block, "forward"

    def features(self, images: Tensor) -> Tensor:
        """What evaluation sees: fp32 [B, C], the encoder's pooled output for whole images [B, 3, H, W]."""
        return self.encoder.pool(self.encoder(images)).float()
