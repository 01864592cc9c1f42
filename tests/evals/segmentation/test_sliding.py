import pytest
import torch
from torch.nn import functional as F

from engine.evals.segmentation.sliding import slide, starts

KERNEL = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def logits_of(windows: torch.Tensor) -> torch.Tensor:
    """Something that sees a neighbourhood and the borders of a window."""
    return F.conv2d(windows, KERNEL, padding=1) + windows.mean((1, 2, 3), keepdim=True)


def plain(image: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """[3, H, W] to [K, H, W], window by window."""
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    total, times = torch.zeros(5, *image.shape[1:]), torch.zeros(image.shape[1:])
    top = 0
    while True:
        top = min(top, image.shape[1] - window)
        left = 0
        while True:
            left = min(left, image.shape[2] - window)
            part = image[None, :, top : top + window, left : left + window]
            total[:, top : top + window, left : left + window] += logits_of(part)[0]
            times[top : top + window, left : left + window] += 1
            if left + window >= image.shape[2]:
                break
            left += stride
        if top + window >= image.shape[1]:
            break
        top += stride
    return (total / times)[:, :height, :width]


@pytest.mark.parametrize("shape", [(40, 40), (33, 57), (16, 16), (12, 40), (7, 9), (17, 16)])
@pytest.mark.parametrize("stride", [16, 11, 5])
@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_equals_a_plain_loop(shape, stride, at_once):
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    found = slide(logits_of, images, 16, stride, at_once)
    assert found.shape == (2, 5, *shape)
    torch.testing.assert_close(found, torch.stack([plain(image, 16, stride) for image in images]), atol=1e-5, rtol=1e-5)


def test_a_window_that_covers_the_image_is_the_whole_image():
    images = torch.randn(3, 3, 24, 24)
    assert torch.equal(slide(logits_of, images, 24, 16), logits_of(images))


@pytest.mark.parametrize(
    ("length", "window", "stride", "wanted"),
    [
        (512, 512, 341, [0]), (683, 512, 341, [0, 171]), (853, 512, 341, [0, 341]), (854, 512, 341, [0, 341, 342]),
        (300, 512, 341, [0]), (1024, 512, 256, [0, 256, 512]),
    ],
)  # fmt: skip
def test_windows_end_with_the_side(length, window, stride, wanted):
    assert starts(max(length, window), window, stride) == wanted
