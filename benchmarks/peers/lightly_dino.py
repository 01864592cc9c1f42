"""A DINO step from lightly's modules, put together as lightly's own ImageNet benchmark of DINO with ViTs does.

One pass of timm's backbone per crop size, head, loss and teacher of lightly. Left out, as there: clipping of gradients.
"""

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import get_weight_decay_parameters, update_momentum
from torch import Tensor, nn

from benchmarks.peers.lightly_vit import backbone
from engine.methods.dino import Settings
from engine.model.architecture import Architecture


class LightlyDino(nn.Module):
    """Student and teacher, and the loss of a batch of crops.

    Args:
        architecture: the shape of the ViT.
        settings: crops, widths, prototypes and temperatures.
        drop_path: rate of stochastic depth in the student's last block.
    """

    def __init__(self, architecture: Architecture, settings: Settings, drop_path: float):
        super().__init__()
        self.settings = settings
        self.student, self.student_head = self._tower(architecture, drop_path)
        self.teacher, self.teacher_head = self._tower(architecture, 0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self.criterion = DINOLoss(
            settings.prototypes, student_temp=settings.student_temperature, center_momentum=settings.centre_momentum
        )

    def _tower(self, a: Architecture, drop_path: float) -> tuple[nn.Module, nn.Module]:
        head = DINOProjectionHead(
            a.embed_dim, self.settings.head_hidden, self.settings.bottleneck, self.settings.prototypes,
            norm_last_layer=not self.settings.free_norm,
        )  # fmt: skip
        return backbone(a, drop_path, several_sizes=True), head

    def compile(self) -> None:
        """In place: towers and loss, each on its own."""
        for part in (self.student, self.student_head, self.teacher, self.teacher_head, self.criterion):
            part.compile(dynamic=False)

    def groups(self) -> list[dict]:
        """What AdamW takes: parameters with weight decay and without."""
        decayed, others = get_weight_decay_parameters([self.student, self.student_head])
        return [
            {"params": [p for p in members if p.requires_grad], "weight_decay": decay}
            for members, decay in ((decayed, self.settings.weight_decay), (others, 0.0))
        ]

    def forward(self, images: tuple[Tensor, ...]) -> Tensor:
        large, small = images[: self.settings.global_crops], images[self.settings.global_crops :]
        with torch.no_grad():
            taught = self.teacher_head(self.teacher(torch.cat(large)))
        learned = torch.cat([self.student_head(self.student(torch.cat(size))) for size in (large, small) if size])
        return self.criterion(taught.chunk(len(large)), learned.chunk(len(images)))

    def follow(self, momentum: float) -> None:
        """Move the teacher."""
        update_momentum(self.student, self.teacher, momentum)
        update_momentum(self.student_head, self.teacher_head, momentum)
