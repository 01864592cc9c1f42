import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from engine.data.annotated import crops, dense
from engine.data.annotated import opening as annotations
from engine.data.annotated.crops import COLUMNS, Cropping, crop
from engine.data.augment import uniforms

GRID = 40  # pixels of a painted square


@pytest.fixture(scope="module")
def scenes():
    return annotations.open_pair("semantic")[0]


def painted(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of different classes; every channel of a pixel is its class times 5."""
    rows, columns = torch.meshgrid(torch.arange(height) // GRID, torch.arange(width) // GRID, indexing="ij")
    labels = (rows * 7 + columns + 1).to(torch.uint8)
    return (5 * labels).expand(3, -1, -1).contiguous(), labels


def numbers(row: int, seed: int = 0, step: int = 0) -> np.ndarray:
    return uniforms(slice(row, row + 1), COLUMNS, seed, 3, step)[0]


@pytest.mark.parametrize("shape", [(200, 240), (240, 90), (64, 64), (30, 50)])
def test_image_and_labels_stay_aligned(shape):
    pixels, labels = painted(*shape)
    cropping = Cropping(96, 128, flip=0.5, photometric=False)
    for row in range(20):
        found, classes = crop(cropping, pixels, labels, numbers(row))
        assert found.shape == (3, 96, 96) and classes.shape == (96, 96) and found.dtype == classes.dtype == torch.uint8
        shown = (found[0].float() / 5).round()
        void = classes == 255
        # bilinear mixes squares along their borders, a pixel or two for each side that was halved
        agree = (shown == classes)[~void].float().mean()
        assert agree > 0.8, (row, agree)
        inner = tv.gaussian_blur(classes[None].float(), [9, 9], [4.0, 4.0])[0] == classes
        assert (shown == classes)[inner & ~void].all()


def test_what_is_padded_is_void_and_of_mean_colour():
    pixels, labels = painted(100, 100)
    found, classes = crop(Cropping(96, 64, (0.5, 0.5), 0.0, False), pixels, labels, numbers(0))
    assert (classes[:32, :32] != 255).all() and (classes == 255).sum() == 96 * 96 - 32 * 32
    assert dense.normalised(found)[:, classes == 255].abs().max() < 0.01


def test_flips_both_or_none():
    pixels, labels = painted(96, 96)
    always, never = (Cropping(96, 96, (1.0, 1.0), flip, False) for flip in (1.0, 0.0))
    for row in range(3):
        flipped, plain = crop(always, pixels, labels, numbers(row)), crop(never, pixels, labels, numbers(row))
        assert torch.equal(plain[0], pixels) and torch.equal(plain[1], labels)
        assert all(torch.equal(one, other.flip(-1)) for one, other in zip(flipped, plain, strict=True))


def test_ratios_cover_their_range_and_places_the_whole_image():
    pixels, labels = torch.zeros(3, 100, 100, dtype=torch.uint8), torch.zeros(100, 100, dtype=torch.uint8)
    sides = [
        int((crop(Cropping(200, 100, photometric=False), pixels, labels, numbers(row))[1] == 0).sum()) ** 0.5
        for row in range(200)
    ]
    assert 50 <= min(sides) < 60 and 190 < max(sides) <= 200
    labels = torch.arange(100, dtype=torch.uint8).expand(100, -1).contiguous()
    lefts = {
        int(crop(Cropping(60, 100, (1, 1), 0, False), pixels, labels, numbers(row))[1][0, 0]) for row in range(400)
    }
    assert lefts == set(range(41))


def test_colours_change_only_the_image():
    pixels, labels = painted(96, 96)
    pixels = pixels + torch.tensor([0, 20, 40], dtype=torch.uint8)[:, None, None]
    plain, coloured = (Cropping(96, 96, (1, 1), 0.0, photometric) for photometric in (False, True))
    changed = 0
    for row in range(20):
        one, other = crop(plain, pixels, labels, numbers(row)), crop(coloured, pixels, labels, numbers(row))
        assert torch.equal(one[1], other[1])
        changed += not torch.equal(one[0], other[0])
    assert changed > 15


def test_a_batch_is_a_function_of_seed_and_step_alone(scenes):
    def drawn(seed: int, steps: int, threads: int = 2) -> list:
        torch.rand(1)
        return list(crops.batches(scenes, Cropping(64, 128), 3, steps, seed, threads))

    before = torch.get_rng_state()
    first, again = drawn(0, 2), drawn(0, 3, threads=1)
    assert len(first) == 2 and len(again) == 3
    for (x, y), (u, v) in zip(first, again):
        assert torch.equal(x, u) and torch.equal(y, v)
        assert x.shape == (3, 3, 64, 64) and x.dtype == torch.float32
        assert y.shape == (3, 64, 64) and y.dtype == torch.int64
    assert not torch.equal(first[0][0], drawn(1, 1)[0][0])
    torch.set_rng_state(before)
    list(crops.batches(scenes, Cropping(64, 128), 2, 1, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_comes_once_before_any_comes_again(scenes):
    class Few:
        images, semantic_classes = scenes.images, scenes.semantic_classes

        def __len__(self) -> int:
            return 5

        def semantic(self, index: int) -> np.ndarray:
            seen.append(index)
            return scenes.semantic(index)

    seen: list[int] = []
    list(crops.batches(Few(), Cropping(64, 128), 2, 5, 0, 1))
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5)) and seen[:5] != seen[5:]


def test_of_several_places_the_most_varied_is_taken():
    labels = torch.zeros(128, 128, dtype=torch.uint8)
    labels[100:, 100:], labels[:10] = 3, 255
    pixels, shares = torch.zeros(3, 128, 128, dtype=torch.uint8), {}
    for tries in (1, 10):
        cropping = Cropping(32, 128, (1, 1), 0.0, False, tries)
        found = [crop(cropping, pixels, labels, numbers(row))[1] for row in range(60)]
        shares[tries] = np.mean([(classes == 3).float().mean() for classes in found])
    assert shares[1] < 0.08 and shares[10] > 3 * shares[1]
    void = torch.full((128, 128), 255, dtype=torch.uint8)
    assert (crop(Cropping(32, 128, tries=4), pixels, void, numbers(0))[1] == 255).all()
