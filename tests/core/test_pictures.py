import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from engine.core import pictures

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


@pytest.fixture
def images():
    """The first 10 digits, 32 x 32 pixels, normalised as the loaders do."""
    pixels = torch.tensor(load_digits().images[:10] / 16).float()[:, None]
    pixels = torch.nn.functional.interpolate(pixels, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return (pixels - pictures.MEAN) / pictures.STD


@pytest.fixture
def masked():
    return torch.rand(10, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :12]


def patch(images, index, size=8, columns=4):
    """One patch [size, size, 3] of the first image, cut with plain slices."""
    row, column = index // columns * size, index % columns * size
    return images[0, :, row : row + size, column : column + size].permute(1, 2, 0)


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_hide_greys_the_masked_patches_only(images, masked):
    hidden = pictures.hide(images, masked, 8)
    for index in range(16):
        if index in masked[0]:
            assert (patch(hidden, index) == 0).all()
        else:
            assert torch.equal(patch(hidden, index), patch(images, index))


@pytest.mark.parametrize("normalised", [True, False])
def test_fill_with_the_true_targets_gives_the_image_back(images, masked, normalised):
    images = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    target = torch.stack([patch(images, index).flatten() for index in masked[0].tolist()])[None]
    if normalised:  # MAE's target
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
    filled = pictures.fill(images[:1], target, masked[:1], 8, normalised=normalised)
    torch.testing.assert_close(filled, images[:1])
    assert not torch.allclose(pictures.fill(images[:1], target + 1, masked[:1], 8, normalised=normalised), images[:1])


def test_fill_takes_half_precision_and_non_square_images():
    images = torch.randn(2, 3, 16, 32)
    masked = torch.tensor([[0, 7], [3, 4]])
    filled = pictures.fill(images, torch.zeros(2, 2, 192, dtype=torch.bfloat16), masked, 8)
    expected = images.clone()
    expected[0, :, :8, :8] = images[0, :, :8, :8].mean()
    torch.testing.assert_close(filled[0, :, :8, :8], expected[0, :, :8, :8])
    assert torch.equal(filled[0, :, :8, 8:], images[0, :, :8, 8:])


def test_reconstructions_are_a_picture_of_sane_size(tmp_path, images, masked):
    path = tmp_path / "pictures" / "reconstructions.png"
    pictures.reconstructions(path, images, pictures.hide(images, masked, 8), images.bfloat16(), title="mae, step 10")
    pixels = read(path)
    height, width = pixels.shape[:2]
    assert 400 < height < 800
    assert 1200 < width < 1600
    assert [file.name for file in path.parent.iterdir()] == ["reconstructions.png"]
    grey = (np.abs(pixels - 255 * MEAN) < 2).all(axis=2).mean()
    assert 0.15 < grey < 0.3  # three quarters of a third, less the margins


def test_images_that_are_not_finite_still_give_a_picture(tmp_path, images, masked):
    pictures.reconstructions(tmp_path / "a.png", images[:1], images[:1], images[:1] * torch.nan)
    pictures.patch_pca(tmp_path / "b.png", images[:1], torch.full((1, 16, 8), torch.nan), (4, 4))
    assert read(tmp_path / "a.png").size
    assert read(tmp_path / "b.png").size


def colours_of(monkeypatch, images, tokens, grid):
    """What patch_pca would draw."""
    drawn = {}
    monkeypatch.setattr(pictures, "_write_grid", lambda path, rows, *words: drawn.update(rows))
    pictures.patch_pca("unused", images, tokens, grid)
    return drawn["patch tokens"]


def test_patch_pca_gives_like_tokens_like_colours_in_all_images(monkeypatch, images):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(4, (10, 16), generator=generator)
    tokens = torch.randn(4, 64, generator=generator)[kinds]
    colours = colours_of(monkeypatch, images, tokens, (4, 4))
    assert colours.shape == (8, 4, 4, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    palette = [colours.reshape(-1, 3)[kinds[:8].flatten() == kind] for kind in range(4)]
    assert all(np.ptp(members, axis=0).max() < 1e-6 for members in palette)
    apart = [np.abs(a[0] - b[0]).max() for i, a in enumerate(palette) for b in palette[:i]]
    assert min(apart) > 0.2


def test_patch_pca_does_not_depend_on_the_basis_sign_or_shift(monkeypatch, images):
    tokens = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(0))
    first = colours_of(monkeypatch, images, tokens, (4, 4))
    second = colours_of(monkeypatch, images, 3 * tokens + 5, (4, 4))
    np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("tokens", [torch.ones(2, 16, 8), torch.full((2, 16, 8), torch.nan)])
def test_tokens_without_spread_are_grey(monkeypatch, images, tokens):
    assert (colours_of(monkeypatch, images[:2], tokens, (4, 4)) == 0.5).all()


@pytest.mark.parametrize("normalised", [False, True])
def test_patches_lie_in_rows_and_the_surplus_is_named_not_shown(normalised, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PATCHES_SHOWN", 4)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    scaled = (colours - 0.5) / 0.2 if normalised else (colours - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    flat = scaled[:, None, None].expand(-1, 8, 8, -1).flatten(1)
    pictures.patches(tmp_path / "patches.png", flat, 8, normalised=normalised, title="five")
    pixels = read(tmp_path / "patches.png")
    places = []
    for colour in colours:
        found = (np.abs(pixels - 255 * colour.numpy()).max(axis=2) < 3).nonzero()
        places.append(tuple(np.median(axis) for axis in found) if len(found[0]) else None)
    (a, b, c, d, missing) = places
    assert missing is None
    assert a[0] == b[0] < c[0] == d[0] and a[1] == c[1] < b[1] == d[1]
