"""Flat pictures with objects, in COCO's layout, and a model that sees nothing but colours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as runs

from engine.data.annotated import coco
from engine.data.annotated.dense import normalised

COLOURS = ((128, 110, 100), (250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20))
PATCH = 8

# of one object: its category, where it is (rows, columns), whether it is a crowd
Painted = tuple[int, tuple[slice, slice], bool]


def paint(
    folder: Path, split: str, pictures: Sequence[Sequence[Painted]], shape: tuple[int, int] = (64, 64)
) -> coco.CocoObjects:
    """Write one picture per list of objects, category k in colour k + 1 on grey, and open the set."""
    (folder / "images" / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number, objects in enumerate(pictures):
        pixels = np.full((*shape, 3), COLOURS[0], np.uint8)
        for category, place, crowd in objects:
            mask = np.zeros(shape, np.uint8, order="F")
            mask[place] = 1
            pixels[place] = COLOURS[category + 1]
            encoded = runs.encode(mask)
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": int(crowd),
                "bbox": runs.toBbox(encoded).tolist(), "area": int(mask.sum()),
                "segmentation": {"size": list(shape), "counts": encoded["counts"].decode()},
            })  # fmt: skip
        Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": shape[1], "height": shape[0]})
    categories = [{"id": k, "name": f"colour {k}"} for k in range(len(COLOURS) - 1)]
    listed = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(listed))
    return coco.open_objects(folder, split)


@dataclass(frozen=True)
class Eye:
    """Stands for a `Subject`: a patch's feature tells which of COLOURS it has most of, or nothing at all."""

    scale: float = 1.0
    blind: bool = False
    threads: int = 1
    name: str = "eye"

    @property
    def vit(self) -> SimpleNamespace:
        return SimpleNamespace(patch_size=PATCH)

    def maps_by_layer(self, images_B3HW: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        return {layer: self.maps(images_B3HW, layer) for layer in layers}

    def maps(self, images_B3HW: torch.Tensor, layer: str) -> torch.Tensor:
        mean_B3hw = torch.nn.functional.avg_pool2d(images_B3HW, PATCH)
        known_3K = normalised(torch.tensor(COLOURS, dtype=torch.uint8).T[:, None])[:, 0]
        away_BhwK = (mean_B3hw.permute(0, 2, 3, 1)[..., None] - known_3K).pow(2).sum(-2)
        seen_BhwK = torch.nn.functional.one_hot(away_BhwK.argmin(-1), len(COLOURS)).float()
        return self.scale * (torch.ones_like(seen_BhwK) if self.blind else seen_BhwK)
