"""The contract between a pretext task and the engine.

A method says which views it wants, what it draws at random, and what it minimises. It knows nothing of devices, ranks,
precision or logging. One method is one file in this folder, found by its name; deleting the file removes the method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.optim import Average, Group, Moment
from engine.core.phases import WHOLE, Phase
from engine.data.batch import Batch
from engine.data.sources import ImageSet
from engine.data.views import Augmentation
from engine.methods.parts.collapse import Collapse
from engine.methods.settings import StageSettings
from engine.model.depth import drops
from engine.model.heads import BatchNorm, Classifier, UnitPrototypes
from engine.model.shapes import Alike, by_shape
from engine.model.tokens import View, random_masking
from engine.model.vit import VisionTransformer

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
        shrinks: whether its crops may have fewer patches than the model's input in some phases: smaller ones, or larger patches.
        keeps_aspect: whether its views may have their images' own aspect.
        drops_patches: whether the trained encoder may be shown a share of a large crop's patches in some phases.
        neighbours: dataset ids int64 [b] that the last step's lookup found for its images, -1 for none; else None.
        prototype_count: how many prototypes the images are shared out to; 0 where the method does not cluster.
        classifier: scores of the classes from `features`, where the method learns them: judged by every probe, averaged with the
            encoder, exported as its head; else None.
        moment: where in the stage the current update lies.
        phase: what its steps see of images; `views` and `draw` go by it. Changed between updates only.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[StageSettings]]
    trains_encoder: ClassVar[bool] = True
    draws_ahead: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    drops_patches: ClassVar[bool] = False
    keeps_aspect: ClassVar[bool] = False

    def __init__(self, encoder: VisionTransformer, settings: StageSettings):
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.neighbours: Tensor | None = None
        self.prototype_count = 0
        self.classifier: Classifier | None = None
        self.moment = Moment()
        self.phase = WHOLE

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a large crop in pixels, in this phase."""
        return self.phase.size(self.encoder.img_size, self.encoder.patch_size)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, in this phase."""
        return self.phase.patch_size(self.encoder.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its patches."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    @property
    def patches_of_crop(self) -> int:
        """Of a large one, in this phase."""
        return self.grid[0] * self.grid[1]

    def in_phase(self, phase: Phase) -> "Method":
        """This very method, but for the phase: for what is asked of a step before it is shown to the method itself."""
        twin = copy(self)
        twin.phase = phase
        return twin

    @property
    def own_aspect(self) -> int:
        """`Augmentation.patch` of the views: this phase's side of a patch where they have their images' own aspect, else 0."""
        return self.patch_size if self.settings.aspect == "keep" else 0

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
        """Random choices of one step: tensors whose first dimension is this rank's images. Here, those of stochastic depth and of
        patches that are left out."""
        drawn = {"depth": draws.seeds()} if self.phase.depth and any(self.encoder.drop_path_rates) else {}
        patches = self.patches_of_crop
        if self.drops_patches and self.kept(patches) < patches:
            drawn["left"] = draws.uniform(sum(view.size == self.size for view in self.views()), patches)
        return drawn

    def encode(self, views: Sequence[View], drawn: dict[str, Tensor]) -> list[Tensor]:
        """The encoder's tokens [b, L, C] of each view: all views, whatever their sizes, in one pass, in patches of this phase,
        under stochastic depth, and without patches of large crops, as drawn."""
        views = self.left_of(views, drawn)
        generator = None
        if "depth" in drawn:
            generator = torch.Generator().manual_seed(int(drawn["depth"][0]))
        return self.encoder.encode(views, generator, self.patch_size, self.phase.depth).unpack()

    def shapes(self, images: Sequence[Tensor], drawn: dict[str, Tensor]) -> list[list[Alike]]:
        """The images of each of these views, the first of a step, shape by shape."""
        sizes_bV2 = drawn.get("sizes")
        return [by_shape(view, None if sizes_bV2 is None else sizes_bV2[:, i]) for i, view in enumerate(images)]

    def kept(self, patches: int) -> int:
        """How many of a large crop's patches the trained encoder is shown, in this phase."""
        return self.phase.kept(self.settings.shown_share * patches)

    def left_of(self, views: Sequence[View], drawn: dict[str, Tensor]) -> Sequence[View]:
        """The views, of which the large ones come first; these with the patches only whose noise is lowest, where some are left
        out."""
        if "left" not in drawn:
            return views
        noise_bVN = drawn["left"]
        keep = self.kept(noise_bVN.shape[2])
        large = [view for view in views if view.images.shape[2:] == self.size]
        return [
            replace(view, visible=random_masking(noise_bVN[:, i], keep)[0]) if i < len(large) else view
            for i, view in enumerate(views)
        ]

    def flops_in(self, phase: Phase) -> float:
        """`flops_per_image` in a phase; on average, where its steps or its crops differ."""
        return mean(self.in_phase(even).flops_per_image() for form in phase.forms for even in form.evenly)

    def encoder_flops(self, patches: int, start: int = 0, stop: int | None = None, *, thinned: bool = False) -> float:
        """`VisionTransformer.flops` of the encoder, in patches of this phase; `thinned`, under its stochastic depth."""
        rate_scale = self.phase.depth if thinned else 0.0
        return self.encoder.flops(patches, start, stop, rate_scale=rate_scale, patch_size=self.patch_size)

    def begin(self, moment: Moment) -> None:
        """Told before each update. What depends on the step is computed from `self.moment` where it is needed, so there is
        nothing to save; such numbers must not enter a compiled region, which would compile again at every step.
        """
        self.moment = moment

    @abstractmethod
    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            images: one fp32 [b, 3, H, W] per view; with the images' own aspect this is the room for one
                (`engine.model.shapes.by_shape`).
            ids: int64 [b], which image of the data set each row is.
            drawn: what `draw` returned; and "sizes", int64 [b, V, 2] on the CPU, where views have their images' own aspect.
                Without these images fill their room.

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
        most = max(phase.depth for phase in self.settings.token_phases.phases)
        for block, rate in zip(self.encoder.blocks, self.encoder.drop_path_rates, strict=True):
            if drops(most * rate, block.norm1.weight.device):
                yield block, "forward_dropped"

    def features(self, images: Tensor) -> Tensor:
        """What evaluation sees: fp32 [B, C], the encoder's pooled output for whole images [B, 3, H, W]."""
        return self.evaluated.pool(self.evaluated(images)).float()

    def choose(self, features: Tensor) -> Tensor:
        """The prototype of each of these features [n, C], int64 [n]; asked only where there are prototypes."""
        raise NotImplementedError
