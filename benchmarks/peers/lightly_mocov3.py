"""A MoCo v3 step from lightly's modules: its heads made as their documentation has MoCo v3's, its loss and momentum update.

One pass of timm's backbone for both crops, heads crop by crop. lightly has no example of this method. Its loss is SimCLR's: the
other predictions and the other keys count as negatives as well, and keys must find predictions, too.
"""

from copy import deepcopy

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from benchmarks.peers.lightly_vit import backbone
from engine.methods.mocov3 import Settings
from engine.model.architecture import Architecture


class LightlyMocov3(nn.Module):
    """Encoder, momentum encoder, and the loss of a batch of two crops.

    Args:
        architecture: the shape of the ViT.
        settings: widths and temperature, and whether the patch projection is frozen.
    """

    def __init__(self, architecture: Architecture, settings: Settings):
        super().__init__()
        s = self.settings = settings
        self.encoder = backbone(architecture)
        if s.freeze_patch_embed:
            deactivate_requires_grad(self.encoder.vit.patch_embed)
        self.projector = MoCoProjectionHead(
            architecture.embed_dim, s.projector_hidden, s.embedding, num_layers=3, batch_norm=True
        )
        self.predictor = MoCoProjectionHead(s.embedding, s.predictor_hidden, s.embedding, num_layers=2, batch_norm=True)
        self.momentum_encoder, self.momentum_projector = deepcopy(self.encoder), deepcopy(self.projector)
        deactivate_requires_grad(self.momentum_encoder)
        deactivate_requires_grad(self.momentum_projector)
        self.criterion = NTXentLoss(temperature=s.temperature)

    def compile(self) -> None:
        """In place: towers and heads, each on its own. The loss selects by masks, which does not compile."""
        for part in (self.encoder, self.projector, self.predictor, self.momentum_encoder, self.momentum_projector):
            part.compile(dynamic=False)

    def forward(self, images: tuple[Tensor, Tensor]) -> Tensor:
        queries = [self.predictor(self.projector(crop)) for crop in self.encoder(torch.cat(images)).chunk(2)]
        with torch.no_grad():
            keys = [self.momentum_projector(crop) for crop in self.momentum_encoder(torch.cat(images)).chunk(2)]
        return self.criterion(queries[0], keys[1]) + self.criterion(queries[1], keys[0])

    def follow(self, momentum: float) -> None:
        """Move the momentum encoder."""
        update_momentum(self.encoder, self.momentum_encoder, momentum)
        update_momentum(self.projector, self.momentum_projector, momentum)
