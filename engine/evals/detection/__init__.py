"""Mask R-CNN on a plain vision transformer, after "Benchmarking Detection Transfer Learning with Vision Transformers" (Li et al.
2021) and, where asked, ViTDet (Li et al. 2022): the transformer with windows, the pyramid of maps, torchvision's heads."""

from engine.evals.detection.backbone import WindowedViT, check_encoder, initialise_as_beit
from engine.evals.detection.form import Form
from engine.evals.detection.mask_rcnn import create, undecayed

__all__ = ["Form", "WindowedViT", "check_encoder", "create", "initialise_as_beit", "undecayed"]
