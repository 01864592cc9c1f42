"""RelViT (Camporese, Izzo & Ballan, "Where are my Neighbors? Exploiting Patches Relations in Self-Supervised Vision Transformer",
BMVC 2022, arXiv 2206.00481).

Shapes: b images of this rank, N patches of an image as the encoder sees it, L tokens of an image, C encoder width, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, scaled_lr, with_decay
from engine.data.views import Augmentation, minimal
from engine.methods.base import Labels, Method
from engine.methods.parts.patch_augmentation import PatchSettings, arrange, draw_patches
from engine.methods.parts.relations import DirectionHead, MapHead, PlaceHead, angles, distances
from engine.methods.settings import LabelledSettings, depth_on_host
from engine.model.heads import Classifier, head_flops
from engine.model.tokens import View
from engine.model.vit import VisionTransformer

TERMS = ("relation", "position", "distance", "angle", "class")


@dataclass(frozen=True)
class Settings(PatchSettings, LabelledSettings):
    """RelViT; the defaults are those of its pre-training (see engine/recipes/relvit.py for sources)."""

    batch_size: int = 256
    base_lr: float = 5e-4
    end_lr: float = 1.25e-6
    schedule: str = "quarter-cosine"
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    decay_all: bool = True
    """Let biases and norms decay, too."""
    clip_norm: float = 1.0
    pad: int = 0
    """Above 0, crop by shifting the whole image over so many black pixels around it, instead of by crop-scale."""
    relation_weight: float = 1.0
    """Of the loss of where each patch lies seen from each other, one of nine directions (SpatRel); 0 leaves it out."""
    position_weight: float = 1.0
    """Of the loss of each patch's place in the grid (AbsPos); 0 leaves it out."""
    distance_weight: float = 0.0
    """Of the error of distances between patches (Dist); 0 leaves it out."""
    angle_weight: float = 0.0
    """Of the error of angles between patches' positions (Ang); 0 leaves it out."""
    class_weight: float = 0.0
    """Of the loss of the image's class, learned along with the rest; above 0 the stage needs labels."""
    add_class_token: bool = False
    """Add the class token to every patch token before the heads."""

    @property
    def labelled(self) -> bool:
        return self.class_weight > 0

    def rules(self) -> dict[str, tuple[bool, str]]:
        weights = {f"{term}-weight": getattr(self, f"{term}_weight") for term in TERMS}
        wanted = f"a number from 0, and above 0 for one of {', '.join(weights)}"
        any_term = any(weight > 0 for weight in weights.values())
        own = {name: (weight >= 0 and any_term, wanted) for name, weight in weights.items()}
        own["pad"] = (self.pad >= 0, "a whole number from 0")
        return super().rules() | self.patch_rules() | own

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        self.check_patches(stage, encoder.grid)
        rows, columns = self.arranged_grid(encoder.grid)
        if rows * columns < 2:
            raise BadInput(
                f"stage {stage} relates the patches of an image, but the model sees only one: choose a larger image-size or a "
                "smaller patch-size."
            )
        if self.add_class_token and encoder.cls_token is None:
            raise BadInput(
                f"--{stage}.add-class-token needs a model that has one, which {encoder.architecture.name} has not."
            )

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return depth_on_host(encoder)


class Relvit(Method):
    """Every patch token says, through light heads, where its patch lies: in itself and as seen from each other patch. Joint with
    classification where `class_weight` is above 0.

    A term whose weight is 0 has no head. Heads read the patch tokens after the final norm.
    """

    name = "relvit"
    Settings = Settings

    def __init__(self, encoder: VisionTransformer, settings: Settings, labels: Labels | None = None):
        super().__init__(encoder, settings)
        s, width, grid = settings, encoder.embed_dim, settings.arranged_grid(encoder.grid)
        self.patches = grid[0] * grid[1]
        as_torch = encoder.architecture.initialisation == "dino"  # as the encoder of RelViT's code, so its heads
        self.heads = nn.ModuleDict()
        if s.relation_weight:
            self.heads["relation"] = DirectionHead(width, grid[1], as_torch)
        if s.position_weight:
            self.heads["position"] = PlaceHead(width, grid, as_torch)
        if s.distance_weight:
            self.heads["distance"] = MapHead(width, distances(grid), as_torch)
        if s.angle_weight:
            self.heads["angle"] = MapHead(width, angles(grid), as_torch)
        if s.class_weight:
            self.classifier = Classifier(width, len(labels.names), std=0.02)
            self.register_buffer("classes_of_id", labels.of_id, persistent=False)

    def views(self) -> tuple[Augmentation, ...]:
        s = self.settings
        return (replace(minimal(self.size, s.crop_scale), flip=s.flip, pad=s.pad, resize=s.resize),)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return super().draw(draws) | draw_patches(self.settings, draws, self.grid)

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        s = self.settings
        pixels, places_bN = arrange(s, images[0], drawn, self.encoder.patch_size)
        (tokens_bLC,) = self.encode([View(pixels)], drawn)
        patches_bNC = tokens_bLC[:, self.encoder.num_prefix_tokens :]
        if s.add_class_token:
            patches_bNC = patches_bNC + tokens_bLC[:, :1]
        terms = {name: head.loss(patches_bNC, places_bN) for name, head in self.heads.items()}
        if s.class_weight:
            terms["class"] = self.class_loss(tokens_bLC, ids)
        loss = sum(getattr(s, f"{name}_weight") * term for name, term in terms.items())
        return {"loss": loss} | {f"{name}_loss": term.detach() for name, term in terms.items()}

    def class_loss(self, tokens_bLC: Tensor, ids: Tensor) -> Tensor:
        """Cross-entropy of the images' classes, read from the pooled tokens."""
        classes_b = self.classes_of_id[ids]
        scores_bK = self.classifier(self.encoder.pool(tokens_bLC))
        return self.classifier.loss(scores_bK, self.classifier.targets(classes_b))

    def groups(self, images_per_step: int) -> Iterator[Group]:
        peak_lr, decay = scaled_lr(self.settings.base_lr, images_per_step), self.settings.weight_decay
        if not self.settings.decay_all:
            return with_decay(self.named_parameters(), peak_lr, decay)
        return iter([Group({n: p for n, p in self.named_parameters() if p.requires_grad}, peak_lr, decay)])

    def flops_per_image(self) -> float:
        heads = sum(head.flops(self.patches) for head in self.heads.values())
        if self.classifier is not None:
            heads += head_flops(self.classifier)
        return 3 * (self.encoder_flops(self.patches, thinned=True) + heads)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        for head in self.heads.values():
            yield head, "loss"
