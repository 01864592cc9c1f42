"""Classification, from scratch or from trained weights: end-to-end fine-tuning as of MAE (He et al. 2022, appendix A), and
baselines.

Shapes: b images of this rank, L tokens of an image, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.optim import Group, by_layer, decays_as_listed, scaled_lr
from engine.data.augment import MAX_OPERATIONS
from engine.data.views import Augmentation, minimal
from engine.methods.base import Labels, Method
from engine.methods.parts import mixing
from engine.methods.settings import LabelledSettings, depth_on_host
from engine.model.heads import Classifier, MultiLabelClassifier, head_flops
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(LabelledSettings):
    """Classification; the defaults are MAE's for training from scratch (see engine/recipes/supervised.py for sources)."""

    epochs: int = 300
    batch_size: int = 4096
    base_lr: float = 1e-4
    weight_decay: float = 0.3
    warmup: float = 20 / 300
    weight_ema: float = 0.9999
    crop_scale: tuple[float, float] = (0.08, 1.0)
    pad: int = 0
    """Above 0: instead of a random crop that is resized, a window of the image with so many black pixels around it."""
    layer_decay: float = 1.0
    """The learning rate of each layer as a share of that of the layer above; 1 trains all alike."""
    decay_all: bool = False
    """Let biases, norms, positions and prefix tokens decay, too."""
    label_smoothing: float = 0.1
    """Share of a target that is spread evenly over all classes."""
    mixup: float = 0.8
    """Alpha of the Beta distribution of shares in mixup; 0 does without."""
    cutmix: float = 1.0
    """Alpha of the Beta distribution of shares in CutMix; 0 does without."""
    cutmix_share: float = 0.5
    """Probability that a batch meets CutMix rather than mixup, where there are both."""
    operations: int = 2
    """Operations of RandAugment on each image; 0 does without. Each is carried out with probability one half."""
    magnitude: float = 9.0
    """Strength of the operations, 0 to 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the normal noise on the magnitude."""
    erase: float = 0.0
    """Probability of erasing a rectangle of an image by noise."""
    head_std: float = 2e-5
    """Standard deviation of the classifier's first weights."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        even = self.batch_size % 2 == 0 or not (self.mixup or self.cutmix)
        return super().rules() | {
            "batch-size": (self.batch_size >= 1 and even, "a whole number from 1, and even where images are mixed"),
            "pad": (self.pad >= 0, "a whole number from 0"),
            "layer-decay": (0 < self.layer_decay <= 1, "a share above 0, up to 1"),
            "label-smoothing": (0 <= self.label_smoothing < 1, "a share from 0 to below 1"),
            "mixup": (self.mixup >= 0, "a number from 0"),
            "cutmix": (self.cutmix >= 0, "a number from 0"),
            "cutmix-share": (0 <= self.cutmix_share <= 1, "a probability from 0 to 1"),
            "operations": (0 <= self.operations <= MAX_OPERATIONS, f"a whole number from 0 to {MAX_OPERATIONS}"),
            "magnitude": (0 <= self.magnitude <= 10, "a number from 0 to 10"),
            "magnitude-std": (self.magnitude_std >= 0, "a number from 0"),
            "erase": (0 <= self.erase <= 1, "a probability from 0 to 1"),
            "head-std": (self.head_std > 0, "a number above 0"),
        }

    def ungraphed(self, encoder: VisionTransformer) -> str:
        mixes = "mixup and CutMix go by numbers that the host reads" if self.mixup or self.cutmix else ""
        return depth_on_host(encoder) or mixes


class Supervised(Method):
    """Cross-entropy of a linear classifier on the pooled tokens.

    Images are mixed in pairs of neighbours in the batch, whose order is random anyway, with one share for the whole batch; so
    ranks and micro-batches, each of an even number of images, see what one process would. Where an image may show several
    classes, each is learned by itself, and images are not mixed.
    """

    name = "supervised"
    Settings = Settings
    shrinks = drops_patches = True

    def __init__(self, encoder: VisionTransformer, settings: Settings, labels: Labels):
        super().__init__(encoder, settings)
        s = settings
        kind = MultiLabelClassifier if labels.of_id.ndim == 2 else Classifier
        self.classifier = kind(encoder.embed_dim, len(labels.names), s.label_smoothing, s.head_std)
        self.register_buffer("classes_of_id", labels.of_id, persistent=False)

    def views(self) -> tuple[Augmentation, ...]:
        s = self.settings
        randaugment = {"operations": s.operations, "magnitude": s.magnitude, "magnitude_std": s.magnitude_std}
        return (replace(minimal(self.size, s.crop_scale), flip=s.flip, pad=s.pad, resize=s.resize, **randaugment),)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        s, drawn = self.settings, super().draw(draws)
        if (s.mixup or s.cutmix) and not isinstance(self.classifier, MultiLabelClassifier):
            drawn["mix"] = draws.shared("mix", 4)
        if s.erase:
            drawn["erase"] = draws.uniform(mixing.ERASING)
            drawn["noise"] = draws.field(3, *self.size)
        return drawn

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels, targets_bK = images[0], self.classifier.targets(self.classes_of_id[ids])
        if "erase" in drawn:
            boxes_b4 = mixing.erased_boxes(drawn["erase"], pixels.shape[2:], self.settings.erase)
            signs_b = (drawn["erase"][:, -1] < 0.5) * 2.0 - 1
            pixels = mixing.erase(pixels, boxes_b4, signs_b, drawn["noise"][0])
        if "mix" in drawn:
            pixels, targets_bK = self.mix(pixels, targets_bK, drawn["mix"][0].tolist())
        (tokens_bLC,) = self.encode([View(pixels)], drawn)
        scores_bK = self.classifier(self.encoder.pool(tokens_bLC))
        # of a mixed image the class that most of it comes from
        right_b = scores_bK.argmax(1) == targets_bK.argmax(1)
        return {"loss": self.classifier.loss(scores_bK, targets_bK), "train_top1": 100 * right_b.float().mean()}

    def mix(self, pixels: Tensor, targets_bK: Tensor, numbers: list[float]) -> tuple[Tensor, Tensor]:
        """One of mixup and CutMix for all images, by four uniform numbers."""
        s, (which, share, across, down) = self.settings, numbers
        if s.cutmix and (which < s.cutmix_share or not s.mixup):
            cut = mixing.box(pixels.shape[2:], mixing.beta(s.cutmix, share), across, down)
            return mixing.cutmix(pixels, targets_bK, cut)
        return mixing.mixup(pixels, targets_bK, mixing.beta(s.mixup, share))

    def groups(self, images_per_step: int) -> Iterator[Group]:
        s, peak_lr = self.settings, scaled_lr(self.settings.base_lr, images_per_step)

        def decays(name: str, parameter: nn.Parameter) -> bool:
            return s.decay_all or decays_as_listed(name, parameter)

        top = self.encoder.depth + 1
        yield from by_layer(self.named_parameters(), self.height, top, peak_lr, s.weight_decay, s.layer_decay, decays)

    def height(self, name: str) -> int:
        """How far up the parameter of this name lies: 0 for patches, prefix tokens and absolute positions, i + 1 for block i,
        depth + 1 for all else, relative positions among it."""
        if not name.startswith("encoder.") or name.startswith("encoder.rel_pos_bias."):
            return self.encoder.depth + 1
        return self.encoder.layer_of(name.removeprefix("encoder.")) + 1

    def flops_per_image(self) -> float:
        patches = self.kept(self.grid[0] * self.grid[1])
        return 3 * (self.encoder_flops(patches, thinned=True) + head_flops(self.classifier))
