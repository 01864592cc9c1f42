"""gather_patches and masked_pixel_loss against cutting every image into all of its patches, one pixel at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.patches import cost
from tests.kernels.agreement import DEVICES, HALF_AND_FULL, assert_agrees
from tests.kernels.interpreted import IMPLEMENTATION_AND_DEVICE, moved, poisoned_memory


def plain_patches(images, indices, size):
    """Slices of pixels, stacked."""
    across = images.shape[3] // size
    rows = []
    for image, asked in zip(images, indices.tolist(), strict=True):
        for index in asked:
            top, left = index // across * size, index % across * size
            rows.append(image[:, top : top + size, left : left + size].permute(1, 2, 0).flatten())
    return torch.stack(rows).unflatten(0, indices.shape) if rows else images.new_zeros(*indices.shape, 3 * size**2)


def plain_loss(prediction, images, indices, size, normalise=True):
    target = plain_patches(images, indices, size)
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((prediction - target) ** 2).mean(-1).mean()


def random_input(batch, height, width, size, count, dtype=torch.float32, device="cpu"):
    images = torch.randn(batch, 3, height, width, device=device).to(dtype)
    patches = (height // size) * (width // size)
    return images, torch.rand(batch, patches, device=device).argsort(1)[:, :count]


@settings(max_examples=30)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    size=st.sampled_from([1, 2, 4, 7]),
    data=st.data(),
)
def test_any_grid(batch, rows, columns, size, data):
    count = data.draw(st.integers(0, rows * columns))
    images, indices = random_input(batch, rows * size, columns * size, size, count)
    assert torch.equal(kernels.gather_patches(images, indices, size), plain_patches(images, indices, size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients(device, dtype, normalise):
    images, indices = random_input(3, 32, 48, 8, 11, dtype, device)
    prediction = torch.randn(3, 11, 192, device=device).to(dtype)

    def ours(prediction, images):
        return kernels.masked_pixel_loss(prediction, images, indices, 8, normalise)

    def plain(prediction, images):
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return plain_loss(prediction.to(wide), images.to(wide), indices, 8, normalise)

    assert_agrees(ours, plain, [prediction, images])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_patches_and_gradients(device, dtype):
    images, _ = random_input(2, 32, 32, 8, 5, dtype, device)
    indices = torch.tensor([[3, 3, 0, 15], [7, 1, 2, 7]], device=device)
    assert_agrees(lambda x: kernels.gather_patches(x, indices, 8), lambda x: plain_patches(x, indices, 8), [images])


def test_element_order_is_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 4).float().view(2, 3, 4, 4)
    patch = kernels.gather_patches(images, torch.tensor([[3], [3]]), 2)[1, 0].view(2, 2, 3)
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                assert patch[row, column, channel] == images[1, channel, 2 + row, 2 + column]


def test_flat_patches_have_a_finite_loss():
    images, indices = torch.ones(1, 3, 8, 8), torch.tensor([[0, 2]])
    prediction = torch.full((1, 2, 48), 0.5, requires_grad=True)
    loss = kernels.masked_pixel_loss(prediction, images, indices, 4)
    loss.backward()
    assert loss == 0.25
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("batch", [0, 2])
def test_no_patches(implementation, device, batch):
    kernels.use(implementation, "patches")
    images, indices = random_input(batch, 16, 16, 8, 0, device=device)
    images.requires_grad_()
    prediction = torch.zeros(batch, 0, 192, device=device, requires_grad=True)
    with poisoned_memory():
        loss = kernels.masked_pixel_loss(prediction, images, indices, 8)
        loss.backward()
        assert kernels.gather_patches(images, indices, 8).shape == (batch, 0, 192)
    assert loss == 0
    assert loss.dtype == torch.float32
    assert prediction.grad.shape == prediction.shape
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_loss_is_fp32_for_half_precision_and_survives_large_pixels():
    images, indices = random_input(1, 16, 16, 8, 4)
    prediction = torch.randn(1, 4, 192)
    loss = kernels.masked_pixel_loss(prediction.bfloat16(), images * 1e4, indices, 8)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss(prediction.bfloat16().float(), images * 1e4, indices, 8))


def test_strides_do_not_matter():
    images, indices = random_input(2, 16, 24, 8, 3)
    wanted = kernels.gather_patches(images, indices, 8)
    channels_last = images.to(memory_format=torch.channels_last)
    every_second = torch.stack((indices, indices), 2)[:, :, 0]
    assert not channels_last.is_contiguous()
    assert not every_second.is_contiguous()
    assert torch.equal(kernels.gather_patches(channels_last, every_second, 8), wanted)
    prediction = torch.randn(3, 192, 2).permute(2, 0, 1)
    loss = kernels.masked_pixel_loss(prediction, channels_last, every_second, 8)
    torch.testing.assert_close(loss, kernels.masked_pixel_loss(prediction.contiguous(), images, indices, 8))


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device):
    images, indices = random_input(4, 32, 32, 8, 12, device=device)
    prediction = torch.randn(4, 12, 192, device=device, requires_grad=True)
    runs = []
    for _ in range(3):
        loss = kernels.masked_pixel_loss(prediction, images, indices, 8)
        runs.append((loss, *torch.autograd.grad(loss, prediction)))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiles_into_one_graph(device, backend):
    images, indices = random_input(2, 32, 32, 8, 5, device=device)
    prediction = torch.randn(2, 5, 192, device=device, requires_grad=True)

    def step(prediction, images, indices):
        return kernels.masked_pixel_loss(prediction + kernels.gather_patches(images, indices, 8), images, indices, 8)

    results = [
        (loss, *torch.autograd.grad(loss, prediction))
        for loss in (
            f(prediction, images, indices) for f in (step, torch.compile(step, fullgraph=True, backend=backend))
        )
    ]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_cost_counts_only_the_asked_patches():
    gather, loss = cost(patches=49, patch_size=16, image_size=4, prediction_size=2)
    assert gather.bytes == 49 * 768 * 8
    assert loss.bytes == 49 * 768 * 6


IMAGES, INDICES, PREDICTION = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 192)


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((IMAGES[0], INDICES, 8), r"needs floating images of shape \[B, 3, H, W\], got torch.float32 \[3, 16, 16\]"),
        ((IMAGES.byte(), INDICES, 8), "needs floating images"),
        ((IMAGES, INDICES, 5), "needs images in whole patches, got 16x16 pixels for patches of 5"),
        ((IMAGES, INDICES, 0), "needs images in whole patches"),
        ((IMAGES, INDICES.int(), 8), r"needs indices as int64 \[2, N\] on .*, got torch.int32"),
        ((IMAGES, INDICES[0], 8), r"needs indices as int64 \[2, N\] on .*, got torch.int64 \[3\]"),
        ((IMAGES, INDICES[:1], 8), r"needs indices as int64 \[2, N\] on .*, got torch.int64 \[1, 3\]"),
        ((IMAGES, INDICES.to("meta"), 8), r"needs indices as int64 \[2, N\] on .*, got torch.int64 \[2, 3\] on meta"),
        ((IMAGES.to("meta"), INDICES, 8), r"needs indices as int64 \[2, N\] on meta, got torch.int64 \[2, 3\] on"),
        ((IMAGES, INDICES + 4, 8), "needs indices between 0 and 3, got 4"),
        ((IMAGES, INDICES - 1, 8), "needs indices between 0 and 3, got -1"),
    ],
)
def test_bad_input_is_told_in_one_sentence(implementation, device, arguments, sentence):
    kernels.use(implementation, "patches")
    kernels.gather_patches(*moved((IMAGES, INDICES, 8), device))
    with pytest.raises(ValueError, match=f"^gather_patches {sentence}"):
        kernels.gather_patches(*moved(arguments, device))
    with pytest.raises(ValueError, match=f"^masked_pixel_loss {sentence}"):
        kernels.masked_pixel_loss(*moved((PREDICTION, *arguments), device))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize(
    ("prediction", "got"),
    [
        (PREDICTION[..., 1:], r"torch.float32 \[2, 3, 191\] on"),
        (PREDICTION[:, :2], r"torch.float32 \[2, 2, 192\] on"),
        (PREDICTION.int(), r"torch.int32 \[2, 3, 192\] on"),
        (PREDICTION.to("meta"), r"torch.float32 \[2, 3, 192\] on meta"),
    ],
)
def test_bad_prediction_is_told_in_one_sentence(implementation, device, prediction, got):
    kernels.use(implementation, "patches")
    kernels.masked_pixel_loss(*moved((PREDICTION, IMAGES, INDICES, 8), device))
    sentence = r"masked_pixel_loss needs a floating prediction of shape \[2, 3, 192\] on .*, got "
    with pytest.raises(ValueError, match=sentence + got):
        kernels.masked_pixel_loss(*moved((prediction, IMAGES, INDICES, 8), device))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATION_AND_DEVICE)
@pytest.mark.parametrize("op", ["gather_patches", "masked_pixel_loss"])
def test_compiled_code_stays_whole_and_only_the_reference_trusts_its_indices(implementation, device, op):
    """What the compiler traces has no values to look at; an op that is opaque to it looks when it runs."""
    kernels.use(implementation, "patches")
    images, indices, prediction = moved((IMAGES, INDICES, PREDICTION), device)
    given = (prediction, images, indices, 8)[op == "gather_patches" :]
    wrong = (prediction, images, indices - 1, 8)[op == "gather_patches" :]
    compiled = torch.compile(getattr(kernels, op), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), getattr(kernels, op)(*given))
    if implementation != "reference":
        with pytest.raises(ValueError, match=f"^{op} needs indices between 0 and 3, got -1"):
            compiled(*wrong)
