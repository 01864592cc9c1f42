"""Mask R-CNN (He et al. 2017) of torchvision's parts, with the heads and constants of the benchmark paper (see `Form`).

What differs from torchvision's own: features of proposals are read with aligned corners and as many samples as a bin has places;
as many proposals are kept in training as in judging; anchors and proposals go by the strides that the maps have, also where a
grid is odd; under autocast boxes stay in fp32; images come normalised and scaled, and are padded to one size. As there,
background is class 0, box losses are smooth L1, and masks are cut out and pasted by torchvision's functions.

Shapes: B images, C channels, R proposals, P side of what is read of each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from engine.core.errors import BadInput
from engine.evals.detection import pyramid
from engine.evals.detection.backbone import RelativeBias, WindowedViT
from engine.evals.detection.form import Form
from engine.model.vit import VisionTransformer


class Backbone(nn.Module):
    """The transformer and its pyramid, as torchvision wants a backbone: images to maps by name, all of `out_channels`."""

    def __init__(self, encoder: VisionTransformer, form: Form) -> None:
        super().__init__()
        self.vit = WindowedViT(encoder, form)
        self.pyramid = pyramid.create(encoder.embed_dim, form.channels, form.pyramid, form.head_norm)
        self.out_channels = form.channels

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Five maps, "0" to "3" and "pool", fp32 or what autocast makes."""
        return self.pyramid(self.vit(images_B3HW))


class Anchors(AnchorGenerator):
    """Anchors a stride apart. torchvision's divides image by map, which is no stride where a map was rounded."""

    def __init__(self, strides: tuple[float, ...], sizes: tuple[int, ...], ratios: tuple[float, ...]) -> None:
        super().__init__(tuple((size,) for size in sizes), (ratios,) * len(sizes))
        self.strides = strides

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)  # whatever the maps are in

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])


class AlignedRoIAlign(MultiScaleRoIAlign):
    """Features of proposals, with aligned corners and adaptive sampling (Mask R-CNN as in detectron2).

    A proposal is read from the level on which the root of its area spans 14 to 28 places (Lin et al. 2017, FPN, equation 1, for
    a stride of 16 at level 4).
    """

    def __init__(self, strides: tuple[float, ...], side: int) -> None:
        super().__init__(list(pyramid.LEVELS), side, sampling_ratio=0)
        self.strides = strides[: len(pyramid.LEVELS)]
        self.levels = LevelMapper(2, 5, canonical_scale=14 * self.strides[2], canonical_level=4)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by name and boxes [R, 4] in pixels of each image to [sum of R, C, P, P] in the maps' dtype."""
        maps = [x[name] for name in self.featmap_names]
        image_R = torch.cat([torch.full_like(found[:, :1], index) for index, found in enumerate(boxes)])
        rois_R5 = torch.cat([image_R, torch.cat(boxes)], 1)
        level_R = self.levels(boxes)
        result = maps[0].new_zeros(len(rois_R5), maps[0].shape[1], *self.output_size)
        for level, (found, stride) in enumerate(zip(maps, self.strides, strict=True)):
            rows = torch.where(level_R == level)[0]
            read = roi_align(found, rois_R5[rows], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            result = result.index_copy(0, rows, read.to(result.dtype))
        return result


class Padding(GeneralizedRCNNTransform):
    """Images that lie normalised and scaled, padded right and below by zeros, the mean colour, to size x size."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, [0.0] * 3, [1.0] * 3)
        self.size = size

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        padded = images[0].new_zeros(len(images), 3, self.size, self.size)
        for index, image in enumerate(images):
            height, width = image.shape[-2:]
            if max(height, width) > self.size:
                raise BadInput(
                    f"image {index} of the batch has {width}x{height} pixels, more than the detector's {self.size}: "
                    "scale it first."
                )
            padded[index, :, :height, :width] = image
        return padded


def create(encoder: VisionTransformer, categories: int, form: Form, seed: int = 0) -> MaskRCNN:
    """A Mask R-CNN on a copy of the encoder, on its device, in training mode.

    Args:
        encoder: as in `WindowedViT`; its drop_path is that of the backbone. The copy is `model.backbone.vit.encoder`.
        categories: without background.
        form: all other settings.
        seed: draws the weights of pyramid and heads, as torchvision initialises, and positions where the encoder's are relative.

    Returns:
        torchvision's model: in training (images, targets) to losses by name, else images to detections. Images are fp32
        [3, h, w], normalised, at most form.size high and wide. Targets have "boxes" fp32 [n, 4] (x0, y0, x1, y1 in pixels, none
        empty), "labels" int64 [n] from 1, "masks" uint8 [n, h, w]; n may be 0. Detections have boxes, labels, "scores" fp32 [n],
        falling, and "masks" fp32 [n, 1, h, w], probabilities. Sampling draws from torch's global generator.

    Raises:
        BadInput: as `WindowedViT`; no category; and, when called, an image larger than the form's size.
    """
    if categories < 1:
        raise BadInput(f"a detector of {categories} categories was asked for; it needs at least one.")
    device = encoder.patch_embed.proj.weight.device
    # on meta nothing is drawn; else weights come from the CPU, whatever the device
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        model = _built(Backbone(encoder, form), encoder.patch_size, categories + 1, form)
    return model.to(device).train()


def _built(backbone: Backbone, patch_size: int, classes: int, form: Form) -> MaskRCNN:
    strides, norm, channels = pyramid.strides(patch_size), pyramid.NORMS[form.head_norm], form.channels
    box_convs, mask_convs = [channels] * form.box_convs, [channels] * form.mask_convs
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=Anchors(strides, form.anchors, form.ratios),
        rpn_head=RPNHead(channels, len(form.ratios), form.rpn_convs),
        rpn_pre_nms_top_n_train=form.candidates[0],
        rpn_pre_nms_top_n_test=form.candidates[1],
        rpn_post_nms_top_n_train=form.proposals,
        rpn_post_nms_top_n_test=form.proposals,
        rpn_fg_iou_thresh=form.rpn_foreground,
        rpn_bg_iou_thresh=form.rpn_background,
        rpn_batch_size_per_image=form.rpn_samples,
        box_roi_pool=AlignedRoIAlign(strides, form.box_pool),
        box_head=FastRCNNConvFCHead((channels, form.box_pool, form.box_pool), box_convs, [form.box_hidden], norm),
        box_predictor=FastRCNNPredictor(form.box_hidden, classes),
        box_score_thresh=form.score_threshold,
        box_detections_per_img=form.detections,
        box_batch_size_per_image=form.roi_samples,
        mask_roi_pool=AlignedRoIAlign(strides, form.mask_pool),
        mask_head=MaskRCNNHeads(channels, mask_convs, 1, norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
    )
    model.transform = Padding(form.size)
    for head in (model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        head.register_forward_hook(_in_fp32)
    return model


def _in_fp32(head: nn.Module, given: object, found: Any) -> Any:
    """What a head gives under autocast: places of up to 1024 pixels in 8 bits would be four pixels apart."""
    if isinstance(found, Tensor):
        return found.float()
    return type(found)(_in_fp32(head, given, part) for part in found)


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that the paper's weight decay leaves out: norms, absolute positions, relative biases."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    names = {
        f"{path}.{name}"
        for path, part in model.named_modules()
        if isinstance(part, (*norms, RelativeBias))
        for name, _ in part.named_parameters(recurse=False)
    }
    return names | {name for name, _ in model.named_parameters() if name.endswith("pos_embed")}
