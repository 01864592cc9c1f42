"""DINO's multi-crop passes as they are usually written, as the peers our packed step is timed against.

timm's blocks on batches of equal sequences; the patch projection as a convolution; stochastic depth computes every branch and
multiplies those of dropped sequences by zero. Heads, loss, teacher and update are the engine's, so that the passes through the
backbone alone differ, and parameters have the names of ours.

Shapes: S sequences of a pass, L tokens of a sequence, C channels, b images.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from engine.methods.clustering import DistillationSettings
from engine.methods.dino import Dino
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


class Block(timm_vit.Block):
    """timm's block. What a branch of a sequence is worth under stochastic depth is an argument, so that one compiled code serves
    all rates."""

    def forward(self, x_SLC: Tensor, mask_S11L: Tensor | None = None, worth_2S11: Tensor | None = None) -> Tensor:
        """`mask_S11L`: true where keys are tokens, false where they are padding."""
        change_SLC = self.ls1(self.attn(self.norm1(x_SLC), attn_mask=mask_S11L))
        x_SLC = x_SLC + (change_SLC if worth_2S11 is None else change_SLC * worth_2S11[0])
        change_SLC = self.ls2(self.mlp(self.norm2(x_SLC)))
        return x_SLC + (change_SLC if worth_2S11 is None else change_SLC * worth_2S11[1])


class PlainDino(Dino):
    """DINO with one pass of the backbone for each crop size or, `padded`, with one pass of all crops, short ones padded to the
    longest and masked as keys."""

    def __init__(self, encoder: VisionTransformer, settings: DistillationSettings, padded: bool = False):
        super().__init__(encoder, settings)
        self.padded = padded
        for tower in (self.encoder, self.teacher.encoder):
            tower.blocks = _timm_blocks(tower)

    def regions(self) -> Iterator[tuple[object, str]]:
        for tower in (self.encoder, self.teacher.encoder):
            yield from ((block, "forward") for block in tower.blocks)
        yield from ((head, "forward") for head in (self.head, self.teacher.head))

    def ragged_regions(self) -> Iterator[tuple[object, str]]:
        yield from ()

    def encode(self, views: list[View], drawn: dict[str, Tensor]) -> list[Tensor]:
        generator = None
        if "depth" in drawn:
            generator = torch.Generator(views[0].images.device).manual_seed(int(drawn["depth"][0]))
        return self._tokens(self.encoder, [view.images for view in views], generator)

    @torch.no_grad()
    def teach(self, views: Sequence[View]) -> list[Tensor]:
        return self._tokens(self.teacher.encoder, [view.images for view in views], None)

    def _tokens(
        self, encoder: VisionTransformer, images: Sequence[Tensor], generator: torch.Generator | None
    ) -> list[Tensor]:
        """The tokens [b, L, C] of each view after the final norm."""
        sizes = [list(same) for _, same in groupby(images, key=lambda view: view.shape[2:])]
        embedded = [_embed(encoder, torch.cat(same)) for same in sizes]
        lengths = [x_SLC.shape[1] for x_SLC in embedded]
        if self.padded and len(embedded) > 1:
            longest = max(lengths)
            padded_SLC = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in embedded])
            ends = torch.cat([torch.full((len(x),), x.shape[1], device=x.device) for x in embedded])
            mask_S11L = (torch.arange(longest, device=ends.device) < ends[:, None])[:, None, None]
            out_SLC = _run(encoder, padded_SLC, mask_S11L, generator)
            outs = out_SLC.split([len(x) for x in embedded])
        else:
            outs = [_run(encoder, x, None, generator) for x in embedded]
        return [
            view_bLC[:, :length]
            for out_SLC, length, same in zip(outs, lengths, sizes, strict=True)
            for view_bLC in out_SLC.chunk(len(same))
        ]


def _timm_blocks(encoder: VisionTransformer) -> nn.ModuleList:
    """timm's blocks with the weights of an encoder's."""
    a = encoder.architecture
    blocks = nn.ModuleList(
        Block(
            a.embed_dim, a.num_heads, a.mlp_dim / a.embed_dim, qkv_bias=a.qkv_bias, init_values=a.init_values,
            norm_layer=partial(nn.LayerNorm, eps=a.eps),
        )
        for _ in range(a.depth)
    )  # fmt: skip
    blocks.load_state_dict(encoder.blocks.state_dict())
    for plain, ours in zip(blocks.parameters(), encoder.blocks.parameters(), strict=True):
        plain.requires_grad_(ours.requires_grad)
    return blocks


def _embed(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens [S, L, C] before the first block."""
    patches = encoder.patch_embed.proj(images)
    x_SLC = patches.flatten(2).transpose(1, 2) + encoder.positions(tuple(patches.shape[2:]))
    if encoder.num_prefix_tokens:
        x_SLC = torch.cat([encoder.prefix().expand(len(x_SLC), -1, -1), x_SLC], 1)
    return encoder.norm_pre(x_SLC)


def _run(
    encoder: VisionTransformer, x_SLC: Tensor, mask_S11L: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Blocks and final norm; with a `generator`, each branch of each sequence is dropped at the rate of its block."""
    for block, rate in zip(encoder.blocks, encoder.drop_path_rates, strict=True):
        worth_2S11 = None
        if generator is not None:
            noise_2S11 = torch.rand(2, len(x_SLC), 1, 1, generator=generator, device=x_SLC.device)
            worth_2S11 = (noise_2S11 >= rate) / (1 - rate)
        x_SLC = block(x_SLC, mask_S11L, worth_2S11)
    return encoder.norm(x_SLC)
