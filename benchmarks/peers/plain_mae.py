"""A masked autoencoder as it is usually written, as the peer our step is timed against.

timm's blocks; every patch embedded and then three quarters dropped by gather; the decoder's input put together by an
unshuffling gather; a patchified target for all patches; prediction of all patches, loss on the masked ones.
"""

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class PlainMae(nn.Module):
    """MAE (He et al. 2022) over a timm ViT, with the published decoder (512 wide, 8 blocks, 16 heads)."""

    def __init__(self, model: str, mask_ratio: float = 0.75, dim: int = 512, depth: int = 8, heads: int = 16):
        super().__init__()
        self.encoder = timm.create_model(model, num_classes=0)
        self.patch, self.patches = self.encoder.patch_embed.patch_size[0], self.encoder.patch_embed.num_patches
        self.keep = int(self.patches * (1 - mask_ratio))
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.patches + 1, dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, self.patch**2 * 3)

    def forward(self, images: Tensor, noise_BN: Tensor) -> Tensor:
        x = self.encoder.patch_embed(images) + self.encoder.pos_embed[:, 1:]
        shuffle = noise_BN.argsort(1)
        restore = shuffle.argsort(1)
        x = x.gather(1, shuffle[:, : self.keep, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.encoder.cls_token + self.encoder.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder.norm(x))
        full = torch.cat([x[:, 1:], self.mask_token.expand(len(x), self.patches - self.keep, -1)], 1)
        full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[-1]))
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        b, c, h, w = images.shape
        p = self.patch
        target = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = torch.ones_like(noise_BN)
        mask[:, : self.keep] = 0
        mask = mask.gather(1, restore)
        return ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()
