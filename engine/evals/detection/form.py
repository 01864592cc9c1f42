"""The shape of a detector: its settings, with the benchmark paper's as defaults."""

from dataclasses import dataclass, fields

from engine.core.errors import BadInput

PYRAMIDS = ("four-blocks", "simple")
HEAD_NORMS = ("bn", "ln")


@dataclass(frozen=True)
class Form:
    """Shape and constants of a Mask R-CNN on a plain ViT.

    Defaults are those of "Benchmarking Detection Transfer Learning with Vision Transformers" (Li et al. 2021, below: the paper),
    whose heads are Mask R-CNN's in detectron2's configuration (below: detectron2), on COCO.

    Raises:
        BadInput: a value that cannot be meant.
    """

    size: int = 1024
    """Side in pixels that images are padded to, right and below (the paper: 1024)."""
    window: int = 14
    """Side of attention windows in patches (the paper: 14, the grid of pre-training); 0: all blocks attend globally."""
    global_blocks: int = 4
    """So many blocks attend globally, the last of every depth / so many (the paper: 4, in a ViT-B 2, 5, 8 and 11); 0: none."""
    relative: bool = True
    """Learned biases of attention by relative position: a table for all windowed blocks, one for all global ones, from zero, or
    from the encoder's where it has such (the paper; worth 0.2 to 0.3 AP)."""
    pyramid: str = "four-blocks"
    """"four-blocks": each level from its own of four blocks at every quarter of the depth, then an FPN (the paper); "simple": all
    from the last block (ViTDet)."""
    head_norm: str = "bn"
    """Norms of pyramid and heads: "bn" (the paper) or "ln", over channels (ViTDet). The simple pyramid has "ln" anyhow. The paper
    takes the statistics of "bn" over all GPUs; here they are those of one process, the only one that engine.eval's detection runs
    in: who trains in several converts the model by torch.nn.SyncBatchNorm.convert_sync_batchnorm."""
    channels: int = 256
    """Of the pyramid and of the convolutions of all heads (the paper)."""
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side of the square anchor of each of the five levels, in pixels (detectron2)."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height to width of anchors (detectron2)."""
    rpn_convs: int = 2
    """Convolutions of the RPN head (the paper)."""
    rpn_foreground: float = 0.7
    """IoU with an object from which an anchor is positive (detectron2)."""
    rpn_background: float = 0.3
    """IoU with all objects below which an anchor is negative (detectron2)."""
    rpn_samples: int = 256
    """Anchors of an image in the loss, up to half of them positive (detectron2)."""
    candidates: tuple[int, int] = (2000, 1000)
    """Best anchors of each level before suppression, in training and in judging (detectron2)."""
    proposals: int = 1000
    """Of an image after suppression at an IoU of 0.7, in training and in judging (detectron2)."""
    roi_samples: int = 512
    """Proposals of an image in the loss, up to a quarter of them positive: IoU 0.5 and above (detectron2)."""
    box_pool: int = 7
    """Side of what the box head sees of a proposal (detectron2)."""
    mask_pool: int = 14
    """Side of what the mask head sees; masks have twice that (detectron2)."""
    box_convs: int = 4
    """Convolutions of the box head (the paper)."""
    box_hidden: int = 1024
    """Width of the box head's linear layer (the paper)."""
    mask_convs: int = 4
    """Convolutions of the mask head (torchvision)."""
    score_threshold: float = 0.05
    """Detections below are left out (detectron2)."""
    detections: int = 100
    """Most of an image, after suppression at an IoU of 0.5 (torchvision)."""

    def __post_init__(self):
        for name, choices in (("pyramid", PYRAMIDS), ("head_norm", HEAD_NORMS)):
            if getattr(self, name) not in choices:
                raise BadInput(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}.")
        may_be_zero = ("window", "global_blocks", "box_convs", "mask_convs")
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in may_be_zero else 1
            if field.type is int and value < least:
                raise BadInput(f"{field.name} is {value}; it must be a whole number from {least}.")
        if len(self.anchors) != 5 or min(self.anchors) < 1:
            raise BadInput(f"anchors are {self.anchors}; they must be five sides in pixels, one for each level.")
        if not self.ratios or min(self.ratios) <= 0:
            raise BadInput(f"ratios are {self.ratios}; they must be at least one, all above 0.")
        if len(self.candidates) != 2 or min(self.candidates) < 1:
            raise BadInput(
                f"candidates are {self.candidates}; they must be two numbers from 1, for training and judging."
            )
        if not 0 <= self.rpn_background <= self.rpn_foreground <= 1:
            raise BadInput(
                f"rpn_background {self.rpn_background} and rpn_foreground {self.rpn_foreground} must lie in [0, 1], "
                "the first not above the second."
            )

    @classmethod
    def small(cls, patch_size: int = 8) -> "Form":
        """Ours, for images of 128 pixels with objects of 8 to 80: thin heads, few proposals, small anchors; windows that fit
        the grid four times."""
        side = 128
        return cls(
            size=side,
            window=max(1, side // patch_size // 2),
            channels=64,
            anchors=(12, 18, 27, 40, 60),
            rpn_convs=1,
            rpn_samples=128,
            candidates=(400, 200),
            proposals=200,
            roi_samples=64,
            box_convs=1,
            box_hidden=256,
            mask_convs=2,
            detections=50,
        )
