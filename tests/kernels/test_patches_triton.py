"""Patches in Triton against cutting every image into all of its patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels.agreement import assert_agrees
from tests.kernels.interpreted import DEVICE, DTYPES, MARKS, poisoned_memory
from tests.kernels.test_patches import plain_loss, plain_patches, random_input

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _in_triton():
    kernels.use("triton", "patches")


@settings(max_examples=12)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    size=st.sampled_from([1, 2, 7, 8]),
    data=st.data(),
)
def test_any_grid(batch, rows, columns, size, data):
    indices = data.draw(st.lists(st.integers(0, rows * columns - 1), max_size=9))
    images, _ = random_input(batch, rows * size, columns * size, size, 0, device=DEVICE)
    indices = torch.tensor(indices, dtype=torch.int64, device=DEVICE).expand(batch, -1)
    with poisoned_memory():
        patches = kernels.gather_patches(images, indices, size)
    assert torch.equal(patches, plain_patches(images, indices, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 14, 16])
def test_patches_are_copied_to_the_bit(dtype, size):
    images, indices = random_input(2, 2 * size, 3 * size, size, 4, dtype, DEVICE)
    assert torch.equal(kernels.gather_patches(images, indices, size), plain_patches(images, indices, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 16])
def test_gradient_of_repeated_patches(dtype, size):
    images = torch.randn(2, 3, 2 * size, 3 * size, device=DEVICE).to(dtype)
    indices = torch.tensor([[3, 3, 0, 5, 3], [1, 1, 2, 1, 0]], device=DEVICE)
    with poisoned_memory():
        assert_agrees(
            lambda x: kernels.gather_patches(x, indices, size), lambda x: plain_patches(x, indices, size), [images]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 14, 16])
@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients(dtype, size, normalise):
    images, indices = random_input(2, 2 * size, 3 * size, size, 5, dtype, DEVICE)
    indices[:, 1] = indices[:, 0]
    prediction = torch.randn(2, 5, 3 * size**2, device=DEVICE).to(dtype)

    def plain(prediction, images):
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return plain_loss(prediction.to(wide), images.to(wide), indices, size, normalise)

    with poisoned_memory():
        assert_agrees(
            lambda p, x: kernels.masked_pixel_loss(p, x, indices, size, normalise), plain, [prediction, images]
        )


@pytest.mark.parametrize("wanted", ["prediction", "images"])
def test_gradient_of_one_input_alone_and_of_mixed_dtypes(wanted):
    images, indices = random_input(2, 16, 24, 8, 3, torch.float16, DEVICE)
    inputs = {"prediction": torch.randn(2, 3, 192, device=DEVICE), "images": images}
    inputs[wanted].requires_grad_()
    loss = kernels.masked_pixel_loss(**inputs, indices=indices, patch_size=8)
    plain = plain_loss(inputs["prediction"], inputs["images"].float(), indices, 8)
    torch.testing.assert_close(loss, plain)
    (ours,), (wide,) = (torch.autograd.grad(value, inputs[wanted]) for value in (loss, plain))
    torch.testing.assert_close(ours, wide)


def test_flat_patches_have_a_finite_loss():
    images, indices = torch.ones(1, 3, 8, 8, device=DEVICE), torch.tensor([[0, 2]], device=DEVICE)
    prediction = torch.full((1, 2, 48), 0.5, device=DEVICE, requires_grad=True)
    loss = kernels.masked_pixel_loss(prediction, images, indices, 4)
    loss.backward()
    assert loss == 0.25
    assert prediction.grad.isfinite().all()


def test_large_pixels():
    images, indices = random_input(1, 16, 16, 8, 4, device=DEVICE)
    prediction = torch.randn(1, 4, 192, device=DEVICE)
    torch.testing.assert_close(
        kernels.masked_pixel_loss(prediction, images * 1e4 + 3e4, indices, 8),
        plain_loss(prediction, images * 1e4 + 3e4, indices, 8),
    )


def test_strides_do_not_matter():
    images, indices = random_input(2, 16, 24, 8, 3, device=DEVICE)
    wanted = kernels.gather_patches(images, indices, 8)
    channels_last = images.to(memory_format=torch.channels_last)
    every_second = torch.stack((indices, indices), 2)[:, :, 0]
    assert torch.equal(kernels.gather_patches(channels_last, every_second, 8), wanted)
    assert torch.equal(kernels.gather_patches(images.expand(4, 2, 3, 16, 24)[3], indices, 8), wanted)
    prediction = torch.randn(3, 192, 2, device=DEVICE).permute(2, 0, 1).requires_grad_()
    results = []
    for arguments in ((channels_last, every_second), (images, indices)):
        loss = kernels.masked_pixel_loss(prediction, *arguments, 8)
        results.append((loss, *torch.autograd.grad(loss, prediction)))
    assert all(map(torch.equal, *results))
    images.requires_grad_()
    # the gradient of a sum has no memory of its own
    (grad,) = torch.autograd.grad(kernels.gather_patches(images, indices, 8).sum(), images)
    (plain,) = torch.autograd.grad(plain_patches(images, indices, 8).sum(), images)
    assert torch.equal(grad, plain)


def test_same_bits_every_time():
    images, _ = random_input(3, 16, 24, 8, 0, device=DEVICE)
    images.requires_grad_()
    indices = torch.randint(0, 6, (3, 12), device=DEVICE)
    prediction = torch.randn(3, 12, 192, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(3):
        loss = kernels.masked_pixel_loss(prediction, images, indices, 8)
        runs.append((loss, *torch.autograd.grad(loss, (prediction, images))))
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_opcheck():
    images, indices = random_input(1, 4, 8, 4, 2, device=DEVICE)
    prediction = torch.randn(1, 2, 48, device=DEVICE, requires_grad=True)
    images.requires_grad_()
    ops = torch.ops.tessera
    torch.library.opcheck(ops.gather_patches.default, (images, indices, 4, "triton"))
    torch.library.opcheck(ops.masked_pixel_loss.default, (prediction, images, indices, 4, True, "triton"))
    rows = prediction.detach()
    torch.library.opcheck(ops.scatter_patches.default, (rows, indices, 4, 8, 4, torch.float16, "triton"))
    for of_pixels in (False, True):
        arguments = (torch.ones((), device=DEVICE), rows.half(), images.detach(), indices, 4, True, of_pixels, "triton")
        torch.library.opcheck(ops.masked_pixel_loss_backward.default, arguments)


def test_compiles_into_one_graph():
    images, indices = random_input(2, 16, 16, 8, 3, device=DEVICE)
    prediction = torch.randn(2, 3, 192, device=DEVICE, requires_grad=True)

    def step(prediction, images, indices):
        return kernels.masked_pixel_loss(prediction + kernels.gather_patches(images, indices, 8), images, indices, 8)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss = function(prediction, images, indices)
        results.append((loss, *torch.autograd.grad(loss, prediction)))
    assert all(map(torch.equal, *results))


def test_what_it_does_not_take_is_told_in_one_sentence():
    images, indices = random_input(1, 16, 16, 8, 2, torch.float64, DEVICE)
    prediction = torch.zeros(1, 2, 192, device=DEVICE)
    with pytest.raises(ValueError, match="gather_patches in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.gather_patches(images, indices, 8)
    with pytest.raises(ValueError, match="masked_pixel_loss in Triton takes fp16, bf16 and fp32, got fp64"):
        kernels.masked_pixel_loss(prediction, images, indices, 8)
    images, indices = random_input(1, 65, 65, 65, 1, device=DEVICE)
    with pytest.raises(ValueError, match="takes patches of up to 64 pixels, got 65"):
        kernels.masked_pixel_loss(torch.zeros(1, 1, 3 * 65**2, device=DEVICE), images, indices, 65)
