"""What a stage has learned, as pictures in the run folder."""

from pathlib import Path

import torch
from torch import Tensor

from engine.core.draws import Draws
from engine.data.subsets import subset
from engine.training import probe
from engine.training.build import as_evaluated
from engine.training.parts import Parts
from engine.training.state import TrainState


def draw(parts: Parts, state: TrainState, folder: Path) -> None:
    """Reconstructions where the method can make them, and the principal components of patch features."""
    from engine.core import pictures  # brings matplotlib, which takes a second: a run should start without it

    stage, encoder = parts.stages[state.stage], state.method.evaluated
    images = _shown_images(parts)
    draws = Draws(parts.plan.train.seed, "pictures", batch=len(images), rows=slice(None), device=images.device)
    with as_evaluated(parts, state):
        if hasattr(state.method, "reconstruct"):
            masked, prediction = state.method.reconstruct(images, draws)
            normalised = getattr(parts.settings(stage.index), "normalise_pixels", False)
            pictures.reconstructions(
                folder / f"{stage.index + 1}-{stage.name}-reconstructions.png",
                images,
                pictures.hide(images, masked, encoder.patch_size),
                pictures.fill(images, prediction, masked, encoder.patch_size, normalised=normalised),
            )
        tokens = encoder(images)[:, encoder.num_prefix_tokens :]
        pictures.patch_pca(
            folder / f"{stage.index + 1}-{stage.name}-patch-pca.png", images, tokens.float(), encoder.grid
        )


def _shown_images(parts: Parts) -> Tensor:
    """Eight images spread over the val split (train where there is none), as evaluation sees them."""
    shown = parts.val_images or parts.train_images
    ids = torch.linspace(0, len(shown) - 1, min(8, len(shown))).long()
    chosen = subset(shown, ids)
    return next(iter(probe.eval_batches(chosen, parts.encoder.img_size, len(ids), device=parts.ranks.device))).images[0]
