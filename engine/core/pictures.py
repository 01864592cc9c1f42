"""Pictures of images and their patches: what a masked autoencoder fills in, what patch tokens see as alike, codebooks.

Shapes: B images, H x W pixels, N patches (row-major), M masked patches, P patch size, C token dims. A patch's P*P*3
values come in the order (row, column, channel). Images are normalised with ImageNet's mean and std.
Every picture is a PNG, written aside and renamed: a reader sees the old or the new one whole.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.core.durable import write_file
from engine.core.plotting import Figure

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SHOWN = 8  # images in a picture
PATCHES_SHOWN = 1024
DPI = 120
INK, FAINT = "#222222", "#8a8a8a"


def hide(images: Tensor, masked: Tensor, patch_size: int) -> Tensor:
    """Grey out patches.

    Args:
        images: float [B, 3, H, W].
        masked: int64 [B, M], row-major indices of the patches to hide.
        patch_size: P, divides H and W.

    Returns:
        [B, 3, H, W], with zero (the mean colour of ImageNet) in the hidden patches.
    """
    patches = _patches(images, patch_size)
    index = masked[:, :, None].expand(-1, -1, patches.shape[2])
    return _unpatched(patches.scatter(1, index, 0.0), images.shape, patch_size)


def fill(images: Tensor, prediction: Tensor, masked: Tensor, patch_size: int, *, normalised: bool = True) -> Tensor:
    """Put predicted patches into images.

    Args:
        images: float [B, 3, H, W], the originals.
        prediction: float [B, M, P*P*3], the decoder's output for the masked patches.
        masked: int64 [B, M], row-major indices of these patches.
        patch_size: P, divides H and W.
        normalised: whether the targets were patches normalised one by one (MAE, section 4.1: minus the mean, over the
            square root of the unbiased variance + 1e-6). The original patch's mean and std, which a prediction can't
            know, are put back: colours and contrast of the picture are therefore borrowed.

    Returns:
        [B, 3, H, W]: the originals with the masked patches replaced.
    """
    patches = _patches(images, patch_size)
    index = masked[:, :, None].expand(-1, -1, patches.shape[2])
    prediction = prediction.to(patches.dtype)
    if normalised:
        true = patches.gather(1, index)
        prediction = prediction * (true.var(dim=2, keepdim=True) + 1e-6).sqrt() + true.mean(dim=2, keepdim=True)
    return _unpatched(patches.scatter(1, index, prediction), images.shape, patch_size)


def reconstructions(
    path: Path, images: Tensor, masked_images: Tensor, reconstructions: Tensor, *, title: str = ""
) -> None:
    """Write a picture of the first 8 images: original, what the encoder saw (`hide`), reconstruction (`fill`).

    Args:
        path: the PNG to write.
        images: float [B, 3, H, W] on any device, as are the other two.
        masked_images: what `hide` returned.
        reconstructions: what `fill` returned.
        title: for example the method and step.
    """
    rows = {"original": images, "visible": masked_images, "filled in": reconstructions}
    _write_grid(path, {name: _pixels(row[:SHOWN]) for name, row in rows.items()}, title or "Masked reconstruction")


def patch_pca(path: Path, images: Tensor, patch_tokens: Tensor, grid: tuple[int, int], *, title: str = "") -> None:
    """Write the first 8 images over their patch tokens, coloured by the first three principal components.

    The basis and the colour scale are shared by the batch, so that one colour means one thing in every image (as in
    DINOv2, Oquab et al. 2023, figure 1, there with the background removed). Tokens without spread are grey.

    Args:
        path: the PNG to write.
        images: float [B, 3, H, W].
        patch_tokens: float [B, N, C] without prefix tokens, C >= 3.
        grid: (rows, columns) of patches, their product is N.
        title: for example the model and step.
    """
    tokens = patch_tokens[:SHOWN].detach().float().cpu()
    finite = bool(tokens.isfinite().all())
    flat = tokens.flatten(0, 1).double() if finite else torch.zeros(tokens.shape[0] * tokens.shape[1], 3).double()
    centred = flat - flat.mean(dim=0)
    values, basis = torch.linalg.eigh(centred.T @ centred)
    basis = basis[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: the largest entry is made positive, so that colours last from step to step.
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    parts = centred @ basis
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    flat_part = high - low < 1e-6 * flat.abs().max().clamp_min(1e-12)
    colours = torch.where(flat_part, 0.5, ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1))
    colours = colours.view(tokens.shape[0], *grid, 3).numpy()
    share = (values[-3:].sum() / values.sum()).item() if values.sum() > 0 else 0.0
    note = f"colours: the first three components, {share:.0%} of the variance" if share else "the tokens are all alike"
    note = note if finite else "the tokens are not finite"
    rows = {"image": _pixels(images[:SHOWN]), "patch tokens": colours}
    _write_grid(path, rows, title or "Patch tokens by principal components", note)


def patches(path: Path, patches: Tensor, patch_size: int, *, normalised: bool, title: str = "") -> None:
    """Write the first 1,024 of these patches as one picture, row by row.

    Args:
        path: the PNG to write.
        patches: float [K, P*P*3].
        patch_size: P.
        normalised: whether they are less their mean, over their standard deviation: then grey is the mean, black and white are
            2.5 deviations away from it.
        title: what they are.
    """
    shown = patches[:PATCHES_SHOWN].detach().float().cpu().unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2)
    images = (0.5 + 0.2 * shown).clamp(0, 1).permute(0, 2, 3, 1).numpy() if normalised else _pixels(shown)
    columns = int(np.ceil(np.sqrt(len(images))))
    side, rows = patch_size + 1, -(-len(images) // columns)
    sheet = np.ones((rows * side + 1, columns * side + 1, 3), np.float32)
    for place, image in enumerate(images):
        top, left = side * (place // columns) + 1, side * (place % columns) + 1
        sheet[top : top + patch_size, left : left + patch_size] = image
    note = "" if len(images) == len(patches) else f"the first {len(images):,} of {len(patches):,}"
    figure = Figure(figsize=(7.5, 7.5 * rows / columns + 0.4), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title or "Patches", color=INK, fontsize=11, x=0.01, ha="left")
    figure.supxlabel(note, color=FAINT, fontsize=8, x=0.01, ha="left")
    panel = figure.subplots()
    panel.imshow(sheet, interpolation="nearest")
    panel.set_axis_off()
    write_file(path, lambda aside: figure.savefig(aside, format="png"))


def _write_grid(path: Path, rows: dict[str, np.ndarray], title: str, note: str = "") -> None:
    """Rows of images [B, h, w, 3] in [0, 1], each with its name at the left."""
    height, width = next(iter(rows.values())).shape[1:3]
    count = max(4, len(next(iter(rows.values()))))  # with fewer, room is left for the title
    cell = 1.45
    size = (cell * count * width / height + 0.4, cell * len(rows) + (0.5 if note else 0.3))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    figure.supxlabel(note, color=FAINT, fontsize=8, x=0.01, ha="left")
    panel, gap = figure.subplots(), 0.03 * width  # one panel for all: to lay out many takes most of a second
    for line, row in enumerate(rows.values()):
        for column, image in enumerate(row):
            left, top = column * (width + gap), line * (height + gap)
            panel.imshow(image, interpolation="nearest", extent=(left, left + width, top + height, top))
    panel.set(xlim=(0, count * (width + gap) - gap), ylim=(len(rows) * (height + gap) - gap, 0), xticks=[])
    middles = [line * (height + gap) + height / 2 for line in range(len(rows))]
    panel.set_yticks(middles, list(rows), rotation="vertical", va="center", color=INK, fontsize=10)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    write_file(path, lambda aside: figure.savefig(aside, format="png"))


def _patches(images: Tensor, patch_size: int) -> Tensor:
    b, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(b, 3, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch_size * patch_size * 3)


def _unpatched(patches: Tensor, shape: torch.Size, patch_size: int) -> Tensor:
    b, _, height, width = shape
    cut = patches.view(b, height // patch_size, width // patch_size, patch_size, patch_size, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(shape)


def _pixels(images: Tensor) -> np.ndarray:
    """Normalised [B, 3, H, W] to [B, H, W, 3] in [0, 1]; what isn't finite is black."""
    pixels = images.detach().float().cpu() * STD + MEAN
    return pixels.nan_to_num(0, 0, 0).clamp(0, 1).permute(0, 2, 3, 1).numpy()
