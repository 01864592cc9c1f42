"""What sits on the backbone during training: decoders to pixels, classifiers, projectors, predictors and prototypes.

Shapes: B images, N patches of an image, V visible and M masked ones, C encoder width, D decoder width, P patch size,
R rows, K prototypes, E width of the bottleneck.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import dist
from engine.model import residual
from engine.model.blocks import Block
from engine.model.initialisation import initialise
from engine.model.patch_sizes import prediction_for
from engine.model.positions import FixedPositions, sincos_positions
from engine.model.tokens import Packed


class Decoder(nn.Module):
    """The MAE decoder (He et al. 2022, section 3): visible tokens back in place, mask tokens elsewhere, blocks, pixels.

    Parameter names are those of the published MAE files. Only masked patches get a prediction, since only they have a loss; where
    only some of them are asked for, the others have no tokens here.

    Args:
        width: encoder width C.
        grid: patches of an image, (rows, columns); positions for images of others are interpolated.
        prefix: tokens before the patches; they pass through the blocks and are dropped at the end.
        interpolation: one of `engine.model.positions.INTERPOLATIONS`.

    Attributes:
        residual: the stream's number format under autocast, one of `engine.model.residual.DTYPES`.
    """

    residual: str = "fp32"

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        patch_size: int,
        prefix: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        interpolation: str = "antialiased",
    ):
        super().__init__()
        self.prefix, self.grid, self.patch_size = prefix, grid, patch_size
        self._fixed = FixedPositions(grid, interpolation)
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions_ND = sincos_positions(dim, grid)
        self.decoder_pos_embed = nn.Parameter(
            torch.cat([positions_ND.new_zeros(prefix, dim), positions_ND])[None], requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * 3)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        latents: Sequence[Tensor],
        visible: Sequence[Tensor],
        masked: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        patch_size: int | None = None,
    ) -> list[Tensor]:
        """Of images shape by shape, in one pass: latent [B, prefix + V, C], visible and masked patches [B, V] and [B, M] of a
        grid -> predicted pixels [B, M, P*P*3] of the masked ones, in their order; of patches of this size
        (`engine.model.patch_sizes`), the decoder's by default."""
        groups, wholes = [], []
        for latent_BLC, visible_BV, masked_BM, grid in zip(latents, visible, masked, grids, strict=True):
            positions_1LD = self.positions(grid)
            wholes.append(self.prefix + visible_BV.shape[1] + masked_BM.shape[1] == positions_1LD.shape[1])
            if wholes[-1]:
                groups.append(self.assemble(latent_BLC, visible_BV, positions_1LD))
            else:
                groups.append(self.assemble_some(latent_BLC, visible_BV, masked_BM, positions_1LD))
        several = len(groups) > 1  # shapes, of this step
        packed = Packed.pack(groups, passing=several)
        tokens_TD = residual.enter(packed.tokens_TC, self.residual)
        cu_seqlens = packed.cu_seqlens
        for block in self.decoder_blocks:
            tokens_TD = block(tokens_TD, cu_seqlens, packed.layout.max_seqlen)
        last, side = self.decoder_pred, patch_size or self.patch_size
        pixels = [prediction_for(layer, self.patch_size, side) for layer in (last.weight, last.bias)]
        # of a single shape the tokens as they are: a split of one part would be copied on the way back
        parts = tokens_TD.split([group.tokens for group in packed.layout.groups]) if several else [tokens_TD]
        return [
            (self.predict if whole else self.predict_last)(part, masked_BM, *pixels)
            for part, whole, masked_BM in zip(parts, wholes, masked, strict=True)
        ]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Of prefix and patches, [1, prefix + N, D]."""
        if grid == self.grid:
            return self.decoder_pos_embed
        prefix_pD, patches_ND = self.decoder_pos_embed[0].tensor_split([self.prefix])
        return torch.cat([prefix_pD, self._fixed.resampled(patches_ND, grid)])[None]

    def assemble(self, latent_BLC: Tensor, visible_BV: Tensor, positions_1LD: Tensor) -> Tensor:
        """Every token of the image in its place, with positions: [B, prefix + N, D]."""
        tokens_BLD = self.decoder_embed(latent_BLC)
        prefix_BpD, patches_BVD = tokens_BLD[:, : self.prefix], tokens_BLD[:, self.prefix :]
        patches = positions_1LD.shape[1] - self.prefix
        rows_BVD = visible_BV[..., None].expand(-1, -1, patches_BVD.shape[-1])
        full_BND = self.mask_token.to(tokens_BLD.dtype).repeat(len(latent_BLC), patches, 1)
        full_BND = full_BND.scatter(1, rows_BVD, patches_BVD)
        return torch.cat([prefix_BpD, full_BND], 1) + positions_1LD

    def assemble_some(self, latent_BLC: Tensor, visible_BV: Tensor, masked_BM: Tensor, positions_1LD: Tensor) -> Tensor:
        """Visible tokens, then those of these masked patches, each with its position: [B, prefix + V + M, D]."""
        tokens_BLD = self.decoder_embed(latent_BLC)
        hidden_BMD = self.mask_token.to(tokens_BLD.dtype).expand(*masked_BM.shape, -1)
        prefix_1pD, patches_1ND = positions_1LD.tensor_split([self.prefix], 1)
        places_BSD = patches_1ND[0][torch.cat([visible_BV, masked_BM], 1)]
        places_BLD = torch.cat([prefix_1pD.expand(len(latent_BLC), -1, -1), places_BSD], 1)
        return torch.cat([tokens_BLD, hidden_BMD], 1) + places_BLD

    def predict_last(self, tokens_TD: Tensor, masked_BM: Tensor, weight_pD: Tensor, bias_p: Tensor) -> Tensor:
        """Norm and pixels, for the last tokens of each image, which are the masked patches'."""
        tokens_BLD = tokens_TD.view(len(masked_BM), -1, tokens_TD.shape[-1])
        return F.linear(self.decoder_norm(tokens_BLD[:, -masked_BM.shape[1] :]), weight_pD, bias_p)

    def predict(self, tokens_TD: Tensor, masked_BM: Tensor, weight_pD: Tensor, bias_p: Tensor) -> Tensor:
        """Norm and pixels, for the masked patches alone."""
        tokens_BLD = tokens_TD.view(len(masked_BM), -1, tokens_TD.shape[-1])
        rows_BMD = (masked_BM + self.prefix)[..., None].expand(-1, -1, tokens_TD.shape[-1])
        return F.linear(self.decoder_norm(tokens_BLD.gather(1, rows_BMD)), weight_pD, bias_p)

    def flops(self, visible: int, masked: int, patch_size: int | None = None) -> float:
        """Operations of one forward pass for one image with so many patches that are visible and asked for: matrix products
        only. `patch_size` as in `forward`."""
        tokens = self.prefix + visible + masked
        ends = (self.prefix + visible) * self.decoder_embed.weight.numel()
        ends += masked * 3 * (patch_size or self.patch_size) ** 2 * self.decoder_pred.in_features
        return 2.0 * ends + sum(block.flops(tokens) for block in self.decoder_blocks)


class PixelDecoder(nn.Module):
    """Linear layers of the encoder's width with GELU after each, then one to pixels: a patch from its own token alone (SiT and
    MC-SSL, whose last layer, a transposed convolution with kernel and stride P, is this one with other names).

    Args:
        width: encoder width C.
        layers: linear layers before the last one.
        start: how the encoder starts, one of `engine.model.initialisation.KINDS`, and so do linear layers here; with "dino" the
            last one as torch's transposed convolution of SiT and MC-SSL, with "beit" as SimMIM's convolution of kernel 1.
    """

    def __init__(self, width: int, patch_size: int, layers: int = 2, start: str = "xavier"):
        super().__init__()
        self.patch_size = patch_size
        parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
        self.mlp = nn.Sequential(*parts, nn.Linear(width, patch_size**2 * 3))
        initialise(self, kind=start)
        if start in ("dino", "beit"):
            bound = (patch_size**2 * 3 if start == "dino" else width) ** -0.5
            for parameter in self.mlp[-1].parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, tokens_BNC: Tensor, patch_size: int | None = None) -> Tensor:
        """Patch tokens [B, N, C] -> pixels [B, N, P*P*3], in the order (row, column, channel). `patch_size` is P, the decoder's
        own by default; the last layer is resized to it (`engine.model.patch_sizes`)."""
        own, side, last = self.patch_size, patch_size or self.patch_size, self.mlp[-1]
        return self.pixels(tokens_BNC, prediction_for(last.weight, own, side), prediction_for(last.bias, own, side))

    def pixels(self, tokens_BNC: Tensor, weight_pC: Tensor, bias_p: Tensor) -> Tensor:
        """By these in place of the last layer's."""
        for layer in self.mlp[:-1]:
            tokens_BNC = layer(tokens_BNC)
        return F.linear(tokens_BNC, weight_pC, bias_p)

    def flops(self, patch_size: int | None = None) -> float:
        """Operations of one forward pass of a patch: matrix products only."""
        last = self.mlp[-1]
        return head_flops(self.mlp[:-1]) + 2.0 * last.in_features * 3 * (patch_size or self.patch_size) ** 2

    def images(self, pixels_BNp: Tensor, grid: tuple[int, int], patch_size: int | None = None) -> Tensor:
        """Patches [B, N, P*P*3] of a grid (rows, columns) -> the images [B, 3, H, W] that they make up."""
        side = patch_size or self.patch_size
        patch = (side, side, 3)
        return pixels_BNp.unflatten(2, patch).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Classifier(nn.Linear):
    """A linear layer from pooled features to classes, and its loss: cross-entropy with label smoothing (Szegedy et al. 2016,
    section 7).

    Args:
        features: encoder width C.
        classes: how many.
        smoothing: share of every target that is spread evenly over all classes.
        std: of the truncated normal that the weight starts from; MAE's fine-tuning takes 2e-5.
    """

    def __init__(self, features: int, classes: int, smoothing: float = 0.0, std: float = 2e-5):
        super().__init__(features, classes)
        self.smoothing = smoothing
        nn.init.trunc_normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x_BC: Tensor) -> Tensor:
        """[B, C] of any float dtype -> scores fp32 [B, K]."""
        with torch.autocast(x_BC.device.type, enabled=False):
            return super().forward(x_BC.float())

    def targets(self, classes_B: Tensor) -> Tensor:
        """Classes int64 [B] -> probabilities fp32 [B, K]: 1 - smoothing in the class, and smoothing / K everywhere."""
        return F.one_hot(classes_B, self.out_features) * (1 - self.smoothing) + self.smoothing / self.out_features

    def loss(self, scores_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean cross-entropy of scores with targets that sum to 1, smoothed or mixed as they are."""
        return F.cross_entropy(scores_BK, targets_BK)


class MultiLabelClassifier(Classifier):
    """As Classifier, where an image may show several classes, each judged on its own: binary cross-entropy per class."""

    def targets(self, classes_BK: Tensor) -> Tensor:
        """int8 [B, K]: 1 present, 0 absent, -1 not to be counted -> the same in fp32, smoothed towards one half."""
        targets_BK = classes_BK.float()
        return torch.where(targets_BK < 0, targets_BK, targets_BK * (1 - self.smoothing) + self.smoothing / 2)

    def loss(self, scores_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean over what counts; 0 where nothing does."""
        counted_BK = targets_BK >= 0
        each_BK = F.binary_cross_entropy_with_logits(scores_BK, targets_BK.clamp_min(0), reduction="none")
        return (each_BK * counted_BK).sum() / counted_BK.sum().clamp_min(1)


def head_flops(head: nn.Module) -> float:
    """Operations of one forward pass of a head for one row: matrix products only."""
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear | WeightNormed)]
    return 2.0 * sum(layer.in_features * layer.out_features for layer in layers)


class BatchNorm(nn.Module):
    """Batch normalisation over the rows of all ranks, in fp32; state-dict keys of nn.BatchNorm1d.

    Running statistics wait in `pending` until `commit`, so that a skipped update leaves them as they were. Not `affine`, it
    has neither weight nor bias.
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_BC: Tensor) -> Tensor:
        with torch.autocast(x_BC.device.type, enabled=False):
            x_BC = x_BC.float()
            if not self.training:
                return F.batch_norm(x_BC, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            count = len(x_BC) * dist.world_size()
            mean_C = dist.all_reduce(x_BC.sum(0)) / count
            centred_BC = x_BC - mean_C
            var_C = dist.all_reduce(centred_BC.square().sum(0)) / count
            self.pending.append((mean_C.detach(), var_C.detach() * count / max(1, count - 1)))
            normal_BC = centred_BC * (var_C + self.eps).rsqrt()
            return normal_BC if self.weight is None else normal_BC * self.weight + self.bias

    @torch.no_grad()
    def commit(self, applied: Tensor) -> None:
        """Move the running statistics by the passes since the last call, if the update was applied."""
        for mean_C, var_C in self.pending:
            for running, new in ((self.running_mean, mean_C), (self.running_var, var_C)):
                running.copy_(torch.where(applied, torch.lerp(running, new, self.momentum), running))
            self.num_batches_tracked += applied.to(torch.int64)
        self.pending.clear()


def projector(
    features: int, hidden: int = 2048, out: int = 256, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Three bias-free linear layers, batch norm after each, an activation between them (MAE-CT's NNCLR head: ReLU;
    MIM-Refiner's: GELU)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        BatchNorm(hidden),
        activation(),
        nn.Linear(hidden, hidden, bias=False),
        BatchNorm(hidden),
        activation(),
        nn.Linear(hidden, out, bias=False),
        BatchNorm(out),
    )


def predictor(features: int = 256, hidden: int = 4096, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two bias-free linear layers with batch norm and an activation between them (MAE-CT's NNCLR head: ReLU)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        BatchNorm(hidden),
        activation(),
        nn.Linear(hidden, features, bias=False),
    )


def contrast_projector(features: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """Three linear layers with batch norm after each, the last one not affine; ReLU after the first, GELU after the second (SiT's
    contrastive head). Biases are left out: the norm after them takes them away.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        BatchNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        BatchNorm(hidden),
        nn.GELU(),
        nn.Linear(hidden, out, bias=False),
        BatchNorm(out, affine=False),
    )


def normed_mlp(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, batch norm after each, the last one not affine, and ReLU between them (MoCo v3's
    projector and predictor). Biases are left out: the norm after them takes them away.
    """
    layers: list[nn.Module] = []
    for index, (wide, next_wide) in enumerate(pairwise(widths), 1):
        last = index == len(widths) - 1
        layers += [nn.Linear(wide, next_wide, bias=False), BatchNorm(next_wide, affine=not last), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class WeightNormed(nn.Module):
    """A linear layer without bias whose rows are g * v / |v| (Salimans & Kingma 2016); state-dict keys of torch's older
    weight_norm, as published heads have them.

    g starts at 1. It stays there, so that unit inputs give cosines, unless `free_norm` lets it learn.
    """

    def __init__(self, features: int, prototypes: int, free_norm: bool = False):
        super().__init__()
        self.in_features, self.out_features = features, prototypes
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=free_norm)
        self.weight_v = nn.Parameter(nn.Linear(features, prototypes, bias=False).weight.detach())

    def forward(self, x_RE: Tensor) -> Tensor:
        return F.linear(x_RE, self.weight())

    def weight(self) -> Tensor:
        """[K, E]."""
        return self.weight_g * F.normalize(self.weight_v, dim=1)


class DinoHead(nn.Module):
    """Linear layers with GELU between them, down to a bottleneck; L2 norm; weight-normed prototypes without bias.

    The head of DINO (Caron et al. 2021, appendix C) and iBOT, and with a free norm of DINOv2; their parameter names.

    Args:
        features: encoder width C.
        layers: linear layers before the prototypes, at least 1.
        free_norm: let the prototypes' norms learn (DINO's norm_last_layer=False).
    """

    def __init__(
        self,
        features: int,
        hidden: int = 2048,
        layers: int = 3,
        bottleneck: int = 256,
        prototypes: int = 65536,
        free_norm: bool = False,
    ):
        super().__init__()
        widths = [features, *(hidden,) * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for index in range(layers):
            parts += [nn.Linear(widths[index], widths[index + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormed(bottleneck, prototypes, free_norm)

    def forward(self, x_RC: Tensor) -> Tensor:
        """[R, C] -> scores [R, K]."""
        return self.last_layer(self.embed(x_RC))

    def embed(self, x_RC: Tensor) -> Tensor:
        """[R, C] -> unit vectors fp32 [R, E]."""
        return F.normalize(self.mlp(x_RC).float(), dim=-1)


def swav_projector(features: int, hidden: int = 2048, out: int = 128) -> nn.Sequential:
    """Two linear layers with batch norm and ReLU between them (SwAV's projection head); its output is not normalised yet."""
    return nn.Sequential(nn.Linear(features, hidden), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))


class UnitPrototypes(nn.Linear):
    """A linear layer without bias whose rows are brought to length 1 after every update (SwAV)."""

    def __init__(self, features: int, prototypes: int):
        super().__init__(features, prototypes, bias=False)
        self.commit(torch.tensor(True, device=self.weight.device))

    @torch.no_grad()
    def commit(self, applied: Tensor) -> None:
        """Normalise the rows, if the update was applied."""
        self.weight.copy_(torch.where(applied, F.normalize(self.weight, dim=1), self.weight))
