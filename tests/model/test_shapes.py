"""Batches of images of many shapes: taken apart and put together, and packed in one pass as they are one by one."""

import pytest
import torch
from torch import Tensor

from engine.model import tokens, vit
from engine.model.shapes import Alike, by_shape, in_order
from engine.model.tokens import View, random_masking

SIZES = torch.tensor([[24, 40], [32, 32], [24, 40], [8, 64], [40, 24], [32, 32], [24, 40]])


def roomy(sizes_B2: Tensor = SIZES, room: tuple[int, int] = (32, 32)) -> tuple[Tensor, list[Tensor]]:
    """Images in their room, what follows them being what nobody may read; and the images."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in sizes_B2.tolist()]
    batch = torch.full((len(images), 3 * room[0] * room[1]), float("nan"))
    for row, image in zip(batch, images, strict=True):
        row[: image.numel()] = image.flatten()
    return batch.view(-1, 3, *room), images


def test_images_of_a_shape_are_a_batch_and_go_back_to_their_places():
    batch, images = roomy()
    alike = by_shape(batch, SIZES)
    assert [tuple(group.images.shape) for group in alike] == [
        (1, 3, 8, 64), (3, 3, 24, 40), (2, 3, 32, 32), (1, 3, 40, 24),
    ]  # fmt: skip
    assert [group.rows.tolist() for group in alike] == [[3], [0, 2, 6], [1, 5], [4]]
    for group in alike:
        assert torch.equal(group.images, torch.stack([images[row] for row in group.rows.tolist()]))
    numbers = torch.randn(len(SIZES), 2)
    assert torch.equal(in_order([group.of(numbers) for group in alike], alike), numbers)


def test_images_that_fill_their_room_stay_as_they_are():
    batch = torch.randn(4, 3, 32, 32)
    (all_of_them,) = by_shape(batch, None)
    assert all_of_them.images is batch and all_of_them.of(batch) is batch and in_order([batch], [all_of_them]) is batch


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("shown", [1.0, 0.5])
def test_packed_images_of_many_shapes_are_as_one_by_one(positions: str, shown: float):
    """Values and the gradients of all weights, positions that are interpolated among them."""
    model = vit.create("vit_micro_patch8_32", depth=2, positions=positions, generator=torch.Generator().manual_seed(0))
    batch, images = roomy()
    noise, worth = torch.rand(len(images), 16), torch.randn(len(images), model.embed_dim)

    def seen(group: Alike, noise_SN: Tensor) -> View:
        patches = group.images[0, 0].numel() // 64
        keep = max(1, int(shown * patches))
        return group.view(random_masking(noise_SN[:, :patches], keep)[0] if shown < 1 else None)

    def gradients(pooled: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (pooled * worth).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alike = by_shape(batch, SIZES)
    packed = model.encode([seen(group, group.of(noise)) for group in alike])
    assert packed.layout.sequences == len(images)
    pooled = in_order([tokens_SLC.mean(1) for tokens_SLC in packed.unpack()], alike)
    alone = [
        model.encode([seen(Alike(image[None]), noise[i : i + 1])]).tokens_TC.mean(0) for i, image in enumerate(images)
    ]
    torch.testing.assert_close(pooled, torch.stack(alone), atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(pooled), gradients(torch.stack(alone))
    assert ours.keys() == theirs.keys() and ("pos_embed" in ours) == (positions == "learned")
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-4, msg=name)


def test_layouts_of_a_step_are_not_kept_for_good():
    """With images of their own aspect nearly every step has another layout; of each a tensor would stay on the device."""
    batch, _ = roomy()
    model = vit.create("vit_micro_patch8_32", depth=1)
    tokens._cu_seqlens.cache_clear()  # another test may have met the same layouts
    for last in range(1, len(SIZES)):
        packed = model.embed([group.view() for group in by_shape(batch[: last + 1], SIZES[: last + 1])])
        assert packed.layout.passing and packed.cu_seqlens is packed.cu_seqlens
    assert tokens._cu_seqlens.cache_info().currsize == 0
    model.embed([group.view() for group in by_shape(batch, None)]).cu_seqlens  # noqa: B018
    assert tokens._cu_seqlens.cache_info().currsize == 1
