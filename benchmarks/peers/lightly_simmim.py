"""A SimMIM step from lightly's modules, put together as lightly's own example does: mask tokens in the encoder's input, a linear
layer for the masked tokens, patches of the whole image cut and the masked ones chosen as targets, L1. Left out: clipping of
gradients.
"""

from lightly.models.utils import get_at_index, get_weight_decay_parameters, patchify
from torch import Tensor, nn

from benchmarks.peers.lightly_vit import backbone
from engine.model.architecture import Architecture


class LightlySimmim(nn.Module):
    """Encoder and linear layer, and the loss of a batch.

    Args:
        architecture: the shape of the ViT.
        drop_path: rate of stochastic depth in the last block.
    """

    def __init__(self, architecture: Architecture, drop_path: float):
        super().__init__()
        self.patch_size, self.prefix = architecture.patch_size, architecture.num_prefix_tokens
        self.encoder = backbone(architecture, drop_path)
        self.decoder = nn.Linear(architecture.embed_dim, architecture.patch_size**2 * 3)
        self.criterion = nn.L1Loss()

    def groups(self, weight_decay: float) -> list[dict]:
        """What AdamW takes: parameters with weight decay and without."""
        return [
            {"params": [p for p in members if p.requires_grad], "weight_decay": decay}
            for members, decay in zip(get_weight_decay_parameters([self.encoder, self.decoder]), (weight_decay, 0.0))
        ]

    def forward(self, images: Tensor, masked_bM: Tensor) -> Tensor:
        """`masked_bM`: int64 [b, M], the masked patches."""
        tokens_bLC = self.encoder.encode(images, idx_mask=masked_bM + self.prefix)
        predicted = self.decoder(get_at_index(tokens_bLC, masked_bM + self.prefix))
        return self.criterion(predicted, get_at_index(patchify(images, self.patch_size), masked_bM))
