"""MoCo v3 (Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021).

Shapes: b images of this rank, B of all ranks, L tokens of a crop, C encoder width, E embedding width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core import dist
from engine.core.optim import Group, cosine, scaled_lr
from engine.data.views import Augmentation, two_views
from engine.methods.base import Rows
from engine.methods.comparing import Comparing
from engine.methods.parts.contrast import pick_own
from engine.methods.settings import ColourSettings, StageSettings, depth_on_host
from engine.methods.teaching import Taught, TeacherSettings
from engine.model.heads import head_flops, normed_mlp
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(TeacherSettings, ColourSettings, StageSettings):
    """MoCo v3; the defaults are the released ViT recipe's (see engine/recipes/mocov3.py for sources)."""

    epochs: int = 300
    batch_size: int = 4096
    base_lr: float = 1.5e-4
    weight_decay: float = 0.1
    """Of all parameters, norms and biases as well."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 40 / 300
    crop_scale: tuple[float, float] = (0.08, 1.0)
    augmentation: str = "byol"
    """minimal (crop and flip) or byol (with colour, grayscale, blur, and solarisation of the second crop)."""
    projector_hidden: int = 4096
    predictor_hidden: int = 4096
    embedding: int = 256
    temperature: float = 0.2
    teacher_momentum: float = 0.99
    freeze_patch_embed: bool = True
    """Leave the patch projection as it is at the start, random without --weights: training is more stable so."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        own = {
            "augmentation": (self.augmentation in ("minimal", "byol"), "minimal or byol"),
            "projector-hidden": (self.projector_hidden >= 1, "a whole number from 1"),
            "predictor-hidden": (self.predictor_hidden >= 1, "a whole number from 1"),
            "embedding": (self.embedding >= 1, "a whole number from 1"),
            "temperature": (self.temperature > 0, "a number above 0"),
        }
        return own | self.colour_rules() | self.teacher_rules()

    @property
    def splits(self) -> bool:
        return False

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return depth_on_host(encoder)


class Mocov3(Taught, Comparing):
    """The prediction from one crop must pick, out of the batch's, what the momentum encoder makes of the image's other crop.

    The encoder that is trained by gradients is what is judged and exported, as in the paper, and not its average.
    """

    name = "mocov3"
    Settings = Settings
    shrinks = drops_patches = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        s = settings
        self.projector = normed_mlp(encoder.embed_dim, s.projector_hidden, s.projector_hidden, s.embedding)
        self.predictor = normed_mlp(s.embedding, s.predictor_hidden, s.embedding)
        if s.freeze_patch_embed:
            encoder.patch_embed.requires_grad_(False)
        self.teacher = Teacher(encoder=encoder, projector=self.projector)

    def views(self) -> tuple[Augmentation, ...]:
        s = self.settings
        pair = two_views(self.size, s.crop_scale, s.augmentation)
        return tuple(replace(view, flip=s.flip, resize=s.resize, colours=s.colours) for view in pair)

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        seen = self.encode([View(view) for view in images], drawn)
        return {"pooled": [self.encoder.pool(tokens_bLC) for tokens_bLC in seen]}

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        seen = self.teacher.encoder.encode([View(view) for view in images], patch_size=self.patch_size).unpack()
        return {"taught": [self.teacher.encoder.pool(tokens_bLC) for tokens_bLC in seen]}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        # Crop by crop, since every crop has batch statistics of its own.
        queries = [
            F.normalize(self.predictor(self.projector(pooled_bC)).float(), dim=1) for pooled_bC in rows["pooled"]
        ]
        with torch.no_grad():
            keys = [F.normalize(self.teacher.projector(taught_bC).float(), dim=1) for taught_bC in rows["taught"]]
            everyone = [dist.all_gather(keys_bE) for keys_bE in keys]
            similarity = (queries[0] * keys[1] + queries[1] * keys[0]).sum(1).mean() / 2
        loss = self.contrast(queries[0], everyone[1]) + self.contrast(queries[1], everyone[0])
        return {"loss": loss, "key_similarity": similarity}

    def contrast(self, queries_bE: Tensor, keys_BE: Tensor) -> Tensor:
        """Cross-entropy of picking the own image's key out of those of all ranks, times 2 temperatures (algorithm 1)."""
        temperature = self.settings.temperature
        return 2 * temperature * pick_own(queries_bE, keys_BE, temperature)

    def teacher_momentum(self) -> float:
        """What the momentum encoder keeps of itself after this update: the paper moves it as the next update begins."""
        s = self.settings
        step = min(self.moment.step + 1, self.moment.total_steps)
        return cosine(step, self.moment.total_steps, s.teacher_momentum, s.teacher_momentum_end)

    def groups(self, images_per_step: int) -> Iterator[Group]:
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        yield Group(trained, scaled_lr(self.settings.base_lr, images_per_step), self.settings.weight_decay)

    def flops_per_image(self) -> float:
        patches = self.patches_of_crop
        shown = self.kept(patches)
        crop = 3 * self.encoder_flops(shown, thinned=True) + self.encoder_flops(patches)
        crop += 4 * head_flops(self.projector) + 3 * head_flops(self.predictor)
        if self.settings.freeze_patch_embed:
            crop -= 2 * self.encoder_flops(shown, stop=0)
        return 2 * crop

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self, "contrast"
