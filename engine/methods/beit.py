"""BEiT (Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022).

Shapes: b images of this rank, N patches of an image, L tokens, C encoder width, M masked patches of all images, P rows of these
and of padding, K codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import dist, masking
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, scaled_lr, with_decay
from engine.data.sources import ImageSet
from engine.data.views import Augmentation
from engine.methods.base import Method
from engine.methods.ibot import TRIES_AT_ONCE, Masked
from engine.methods.parts.collapse import usage
from engine.methods.parts.tokenizers import Codebook, DiscreteVae
from engine.methods.settings import RAGGED, ColourSettings, StageSettings
from engine.model.tokens import View
from engine.model.vit import VisionTransformer

CODEBOOK_FILE, CODEBOOK_PICTURE = "codebook.safetensors", "codebook.png"
UNDECAYED = ("encoder.cls_token", "encoder.pos_embed")  # beside biases and norms, as released
TABLE = "encoder.rel_pos_bias.relative_position_bias_table"


@dataclass(frozen=True)
class Settings(ColourSettings, StageSettings):
    """BEiT; the defaults are the released recipe's (see engine/recipes/beit.py for sources)."""

    base_lr: float = 1.875e-4
    end_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 3.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    jitter: float = 0.4
    """Strength of brightness, contrast and saturation, changed in every crop; 0 leaves colours alone."""
    mask_ratio: float = 75 / 196
    """Share of the patches that masks hide at most; most masks hide so many."""
    smallest_block: int = 16
    """Patches of the smallest block of a mask that is looked for."""
    table_lr: float = 1.0
    """Learning rate of relative positions, over that of all else: they start at zero, where a short training leaves them."""
    codes: int = 8192
    """Different answers for a patch."""
    tokenizer: str = ""
    """File of DALL-E's discrete VAE (encoder.pkl or its state dict), whose codes are the published; default: a codebook's."""
    codebook: str = ""
    """File of a codebook (of python -m engine.codebook or another run); default: one is fitted to the data as a stage begins."""
    codebook_patches: int = 0
    """Patches that a codebook is fitted to; 0 is 50 for each code, or those of 32 crops of every image, where these are fewer."""
    codebook_normalise: bool = True
    """Codes of a codebook that is fitted are of patches normalised one by one, so that they tell of shapes, not of brightness."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return self.colour_rules() | {
            "jitter": (self.jitter >= 0, "a number from 0"),
            "mask-ratio": (0 < self.mask_ratio < 1, "a share between 0 and 1"),
            "smallest-block": (self.smallest_block >= 1, "a whole number from 1"),
            "table-lr": (self.table_lr > 0, "a number above 0"),
            "codes": (self.codes >= 2, "a whole number from 2"),
            "tokenizer": (not (self.tokenizer and self.codebook), "left out where a codebook is given"),
            "codebook-patches": (
                self.codebook_patches == 0 or self.codebook_patches >= self.codes,
                f"at least one for each of the {self.codes} codes, or 0",
            ),
        }

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        rows, columns = encoder.grid
        if masked_of(self, encoder.grid) < 1:
            raise BadInput(
                f"--{stage}.mask-ratio is {self.mask_ratio:g}; of the model's {rows * columns} patches that hides none."
            )
        if min(rows, columns) < 2:
            raise BadInput(
                f"{stage} hides blocks, for which a grid of {rows}x{columns} patches is too narrow; 2x2 is needed."
            )
        if self.smallest_block > masked_of(self, encoder.grid):
            raise BadInput(
                f"--{stage}.smallest-block is {self.smallest_block}, but a mask hides {masked_of(self, encoder.grid)} of the "
                f"model's {rows * columns} patches in all; choose at most that."
            )
        flag, file = ("tokenizer", self.tokenizer) if self.tokenizer else ("codebook", self.codebook)
        if file and (given := tokenizer_of(self, encoder.patch_size).codes) != self.codes:
            raise BadInput(
                f"--{stage}.codes is {self.codes}, but --{stage}.{flag} {file} has {given}; set --{stage}.codes {given}."
            )

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return RAGGED


def masked_of(settings: Settings, grid: tuple[int, int]) -> int:
    """How many patches of an image masks hide at most."""
    return round(settings.mask_ratio * grid[0] * grid[1])


def tokenizer_of(settings: Settings, patch_size: int) -> Codebook | DiscreteVae:
    """What makes the codes; BadInput for a file that cannot be used."""
    if settings.tokenizer:
        return DiscreteVae.read(settings.tokenizer, patch_size)
    if settings.codebook:
        return Codebook.read(settings.codebook, patch_size)
    return Codebook(settings.codes, patch_size, settings.codebook_normalise)


class Beit(Method):
    """Blocks of patches are hidden behind a token, and for each of them the model says which code a tokenizer gives it.

    The tokenizer is frozen, and saved with the rest. Published is a discrete VAE trained on 250 million images; without its file
    codes are nearest centres of k-means. The loss is a mean over an image's masked patches, then over images, where the released
    code takes all masked patches of a device at once: so it is the same for any number of ranks and micro-batches.
    """

    name = "beit"
    Settings = Settings
    draws_ahead = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.mask_token = nn.Parameter(torch.empty(1, encoder.embed_dim))
        self.head = nn.Linear(encoder.embed_dim, settings.codes)
        for weight in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.head.bias)
        self.tokenizer = tokenizer_of(settings, encoder.patch_size)

    def views(self) -> tuple[Augmentation, ...]:
        s = self.settings
        colours = {"brightness": s.jitter, "contrast": s.jitter, "saturation": s.jitter, "hue": 0.0}
        colours |= {"jitter": float(s.jitter > 0)}
        shared = {"flip": s.flip, "resize": s.resize, "colours": s.colours}
        return (Augmentation(self.size, s.crop_scale, **shared, **colours),)

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Fit the codebook, unless codes come from a file: on the first rank, for all. Draws its seed from torch's generator."""
        if self.settings.tokenizer or self.settings.codebook:
            return
        seed = int(torch.randint(2**31, ()))
        if dist.rank() == 0:
            self.tokenizer.fit(images, self.views()[0], seed, self.settings.codebook_patches, device=device)
        else:
            self.tokenizer.centres.zero_()
        self.tokenizer.centres.copy_(dist.all_reduce(self.tokenizer.centres))

    def keepsakes(self, folder: Path) -> None:
        if isinstance(self.tokenizer, Codebook):
            self.tokenizer.save(folder / CODEBOOK_FILE)
            self.tokenizer.draw(folder / CODEBOOK_PICTURE)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return super().draw(draws) | {"masks": self.masks(draws)}

    def masks(self, draws: Draws) -> Tensor:
        """Which patches are hidden, bool [b, N] on the CPU."""
        count = masked_of(self.settings, self.grid)
        masks_bN = masking.block_patches(
            lambda round_: draws.on_host(f"blocks/{round_}", TRIES_AT_ONCE, 4).numpy(),
            np.full(len(range(draws.batch)[draws.rows]), count),
            self.grid,
            self.settings.smallest_block,
        )
        return torch.from_numpy(masks_bN)

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        (pixels,) = images
        patches = self.grid[0] * self.grid[1]
        share = masked_of(self.settings, self.grid) / patches
        masked = Masked.of(drawn["masks"][:, None], self.encoder.num_prefix_tokens, pixels.device, share)
        view = View(pixels, hidden=masked.hidden[0], blank=self.mask_token[0])
        tokens_PC = masked.padded(masked.rows_of(self.encode([view], drawn)))
        codes_P = self.tokenizer(pixels, masked.patches)
        loss, right = self.code_loss(tokens_PC, codes_P, masked.weights)
        report = {"loss": loss, "code_accuracy": right.detach()}
        if self.moment.logged:
            codes_M = codes_P[: masked.count]
            report["code_usage"] = usage(codes_M, self.settings.codes) if masked.count else loss.new_zeros(())
        return report

    def code_loss(self, tokens_PC: Tensor, codes_P: Tensor, weights_P: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums over masked patches of the cross-entropy of their codes (equation 2), and of how many are right."""
        scores_PK = self.head(tokens_PC).float()
        losses_P = F.cross_entropy(scores_PK, codes_P, reduction="none")
        return (weights_P * losses_P).sum(), (weights_P * (scores_PK.argmax(1) == codes_P)).sum()

    def groups(self, images_per_step: int) -> Iterator[Group]:
        peak_lr, decay = scaled_lr(self.settings.base_lr, images_per_step), self.settings.weight_decay
        named = dict(self.named_parameters())
        bare = {name: named.pop(name) for name in UNDECAYED if name in named}
        table = {name: named.pop(name) for name in (TABLE,) if name in named}
        yield from with_decay(named.items(), peak_lr, decay)
        yield from with_decay(bare.items(), peak_lr, 0.0)
        yield from with_decay(table.items(), self.settings.table_lr * peak_lr, decay)

    def flops_per_image(self) -> float:
        rows, columns = self.grid
        head = 2.0 * self.head.weight.numel() * masked_of(self.settings, self.grid)
        seen = self.encoder_flops(rows * columns, thinned=True)
        return 3 * (seen + head) + self.tokenizer.flops(self.grid)

    def ragged_regions(self) -> Iterator[tuple[object, str]]:
        """How many patches are masked changes from step to step, too."""
        yield self, "code_loss"
        yield from super().ragged_regions()
