"""Patches in Triton. B images, N asked patches, P patch size, E = 3 P P elements of a patch, H x W pixels.

Every program holds R whole patches, or a slice W of their elements where patches do not depend on each other. Pixels
are addressed in the order of the result, so what is written is contiguous; the three channels' rows that a warp reads
together are served by the first-level cache. Bytes moved are those of `kernels.patches.cost`. No float atomics: the sum
over repeated patches runs over the asked ones, and the loss is summed program by program, then over programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant

# a whole patch lies in the registers of one program
_LARGEST_PATCH = 64


@triton.jit
def _pixel_of(element, stride_c, stride_h, stride_w, P: tl.constexpr):
    """Offset of an element, in the order (row, column, channel), from its patch's first pixel."""
    return element // (3 * P) * stride_h + element // 3 % P * stride_w + element % 3 * stride_c


@triton.jit
def _first_pixel_of(
    indices, patch_R, asked_R, count, across, stride_i, stride_n, stride_b, stride_h, stride_w, P: tl.constexpr
):
    """Offset of the first pixel of the asked patches, numbered over the whole batch."""
    image_R = (patch_R // count).to(tl.int64)
    index_R = tl.load(indices + image_R * stride_i + patch_R % count * stride_n, mask=asked_R, other=0).to(tl.int32)
    return image_R * stride_b + index_R // across * P * stride_h + index_R % across * P * stride_w


@triton.jit
def _gather(
    images, indices, out, asked, count, across,
    stride_i, stride_n, stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = 3 * P * P
    patch_R = tl.program_id(0) * R + tl.arange(0, R)
    element_W = tl.program_id(1) * W + tl.arange(0, W)
    first_R = _first_pixel_of(
        indices, patch_R, patch_R < asked, count, across, stride_i, stride_n, stride_b, stride_h, stride_w, P
    )
    inside_RW = (patch_R < asked)[:, None] & (element_W < E)[None, :]
    offset_W = _pixel_of(element_W, stride_c, stride_h, stride_w, P)
    pixels_RW = tl.load(images + first_R[:, None] + offset_W[None, :], mask=inside_RW)
    tl.store(out + patch_R.to(tl.int64)[:, None] * E + element_W[None, :], pixels_RW, mask=inside_RW)


@triton.jit
def _scatter(
    rows, indices, out, count, across, patches, stride_i, stride_n, stride_b, stride_c, stride_h,
    P: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One patch of the image: the sum of those rows that are its own, in their order."""
    E: tl.constexpr = 3 * P * P
    image, patch = (tl.program_id(0) // patches).to(tl.int64), tl.program_id(0) % patches
    element_W = tl.program_id(1) * W + tl.arange(0, W)
    sum_W = tl.zeros([W], tl.float32)
    for start in range(0, count, R):
        place_R = start + tl.arange(0, R)
        index_R = tl.load(indices + image * stride_i + place_R * stride_n, mask=place_R < count, other=-1)
        own_RW = (index_R == patch)[:, None] & (element_W < E)[None, :]
        row_R = image * count + place_R
        rows_RW = tl.load(rows + row_R[:, None] * E + element_W[None, :], mask=own_RW, other=0.0)
        sum_W += tl.sum(rows_RW.to(tl.float32), 0)
    first = image * stride_b + patch // across * P * stride_h + patch % across * P
    tl.store(out + first + _pixel_of(element_W, stride_c, stride_h, 1, P), sum_W, mask=element_W < E)


@triton.jit
def _load_pair(
    prediction, images, indices, patch_R, element_E, inside_RE, asked, count, across,
    stride_p, stride_q, stride_e, stride_i, stride_n, stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Predicted and true pixels [R, E] in fp32, and the factor [R] that the truth was scaled by; 0 outside."""
    E: tl.constexpr = 3 * P * P
    first_R = _first_pixel_of(
        indices, patch_R, patch_R < asked, count, across, stride_i, stride_n, stride_b, stride_h, stride_w, P
    )
    offset_E = _pixel_of(element_E, stride_c, stride_h, stride_w, P)
    row_R = (patch_R // count).to(tl.int64) * stride_p + patch_R % count * stride_q
    predicted_RE = tl.load(prediction + row_R[:, None] + element_E[None, :] * stride_e, mask=inside_RE, other=0.0)
    true_RE = tl.load(images + first_R[:, None] + offset_E[None, :], mask=inside_RE, other=0.0).to(tl.float32)
    factor_R = tl.full(patch_R.shape, 1.0, tl.float32)
    if NORMALISE:
        true_RE = tl.where(inside_RE, true_RE - (tl.sum(true_RE, 1) / E)[:, None], 0.0)
        factor_R = 1 / tl.sqrt(tl.sum(true_RE * true_RE, 1) / (E - 1) + 1e-6)
        true_RE *= factor_R[:, None]
    return predicted_RE.to(tl.float32), true_RE, factor_R


@triton.jit
def _loss_forward(
    prediction, images, indices, partial, share, asked, count, across,
    stride_p, stride_q, stride_e, stride_i, stride_n, stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, NORMALISE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch_R = tl.program_id(0) * R + tl.arange(0, R)
    element_E = tl.arange(0, BLOCK)
    inside_RE = (patch_R < asked)[:, None] & (element_E < 3 * P * P)[None, :]
    predicted_RE, true_RE, _ = _load_pair(
        prediction, images, indices, patch_R, element_E, inside_RE, asked, count, across,
        stride_p, stride_q, stride_e, stride_i, stride_n, stride_b, stride_c, stride_h, stride_w, P, NORMALISE,
    )  # fmt: skip
    error_RE = predicted_RE - true_RE
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(error_RE * error_RE, 1), 0) * share)


@triton.jit
def _loss_backward(
    grad_loss, prediction, images, indices, out, share, asked, count, across,
    stride_p, stride_q, stride_e, stride_i, stride_n, stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, NORMALISE: tl.constexpr, OF_PIXELS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = 3 * P * P
    patch_R = tl.program_id(0) * R + tl.arange(0, R)
    element_E = tl.arange(0, BLOCK)
    inside_RE = (patch_R < asked)[:, None] & (element_E < E)[None, :]
    predicted_RE, true_RE, factor_R = _load_pair(
        prediction, images, indices, patch_R, element_E, inside_RE, asked, count, across,
        stride_p, stride_q, stride_e, stride_i, stride_n, stride_b, stride_c, stride_h, stride_w, P, NORMALISE,
    )  # fmt: skip
    grad_RE = (predicted_RE - true_RE) * (2 * share * tl.load(grad_loss).to(tl.float32))
    if OF_PIXELS:
        grad_RE = -grad_RE
        if NORMALISE:
            # through the mean, then through the deviation
            along_R = tl.sum(grad_RE * true_RE, 1) / (E - 1)
            grad_RE = grad_RE - (tl.sum(grad_RE, 1) / E)[:, None] - true_RE * along_R[:, None]
            grad_RE *= factor_R[:, None]
    tl.store(out + patch_R.to(tl.int64)[:, None] * E + element_E[None, :], grad_RE, mask=inside_RE)


def gather(images: Tensor, indices_BN: Tensor, patch_size: int) -> Tensor:
    """See `kernels.gather_patches`; any strides."""
    _refuse_fp64("gather_patches", images)
    elements, asked = 3 * patch_size**2, indices_BN.numel()
    out_BNE = images.new_empty(*indices_BN.shape, elements)
    rows, width = _slices(elements)
    with torch.cuda.device_of(images):
        _gather[triton.cdiv(asked, rows), triton.cdiv(elements, width)](
            images, indices_BN, out_BNE, asked, indices_BN.shape[1], images.shape[3] // patch_size,
            *indices_BN.stride(), *images.stride(), P=patch_size, R=rows, W=width, num_warps=4,
        )  # fmt: skip
    return out_BNE


def scatter(
    rows_BNE: Tensor, indices_BN: Tensor, height: int, width: int, patch_size: int, dtype: torch.dtype
) -> Tensor:
    """See `kernels.patches`; sums are kept in fp32."""
    across = width // patch_size
    patches = height // patch_size * across
    out = rows_BNE.new_empty(len(indices_BN), 3, height, width, dtype=dtype)
    elements = rows_BNE.shape[2]
    block = min(1024, triton.next_power_of_2(elements))
    with torch.cuda.device_of(out):
        _scatter[len(out) * patches, triton.cdiv(elements, block)](
            rows_BNE.contiguous(), indices_BN, out, indices_BN.shape[1], across, patches,
            *indices_BN.stride(), *out.stride()[:3], P=patch_size, R=4096 // block, W=block, num_warps=4,
        )  # fmt: skip
    return out


def loss_forward(
    prediction_BNE: Tensor, images: Tensor, indices_BN: Tensor, patch_size: int, normalise: bool
) -> Tensor:
    """See `kernels.masked_pixel_loss`; any strides."""
    _refuse_fp64("masked_pixel_loss", prediction_BNE, images)
    asked = indices_BN.numel()
    rows, block, warps = _whole(patch_size)
    partial = prediction_BNE.new_empty(triton.cdiv(asked, rows), dtype=torch.float32)
    with torch.cuda.device_of(images):
        _loss_forward[(len(partial),)](
            prediction_BNE, images, indices_BN, partial, 1 / max(prediction_BNE.numel(), 1),
            asked, indices_BN.shape[1], images.shape[3] // patch_size,
            *prediction_BNE.stride(), *indices_BN.stride(), *images.stride(),
            P=patch_size, NORMALISE=normalise, R=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return partial.sum()


def loss_backward(
    grad_loss: Tensor,
    prediction_BNE: Tensor,
    images: Tensor,
    indices_BN: Tensor,
    patch_size: int,
    normalise: bool,
    of_pixels: bool,
) -> Tensor:
    """See `kernels.patches`."""
    asked = indices_BN.numel()
    rows, block, warps = _whole(patch_size)
    out_BNE = prediction_BNE.new_empty(prediction_BNE.shape, dtype=torch.float32 if of_pixels else prediction_BNE.dtype)
    with torch.cuda.device_of(images):
        _loss_backward[(triton.cdiv(asked, rows),)](
            grad_loss, prediction_BNE, images, indices_BN, out_BNE, 1 / max(prediction_BNE.numel(), 1),
            asked, indices_BN.shape[1], images.shape[3] // patch_size,
            *prediction_BNE.stride(), *indices_BN.stride(), *images.stride(),
            P=patch_size, NORMALISE=normalise, OF_PIXELS=of_pixels, R=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out_BNE


def variants(capability: int) -> list[Variant]:
    """The kernels at the patch sizes of published models; the loss as training runs it, on an fp32 prediction."""
    counts = ("asked", "count", "across")
    strides = ("stride_i", "stride_b", "stride_c", "stride_h")
    ones = {"stride_n": 1, "stride_w": 1}
    found = []

    def add(title, kernel, pointers, floats, integers, constants, warps, aligned):
        signature = pointers | {name: "fp32" for name in floats} | {name: "i32" for name in integers}
        signature |= {name: "constexpr" for name in constants}
        found.append(Variant(title, kernel, signature, constants, warps, aligned=(*pointers, *aligned), matrix=False))

    for patch, dtype in ((16, "bf16"), (16, "fp32"), (14, "bf16")):
        title, images = f"{dtype} patch {patch}", {"images": f"*{dtype}", "indices": "*i64"}
        rows, width = _slices(3 * patch**2)
        sizes = {"P": patch, "R": rows, "W": width}
        gathered = images | {"out": f"*{dtype}"}
        add(f"gather {title}", _gather, gathered, (), (*counts, *strides), ones | sizes, 4, ("stride_b", "stride_c"))
        rows, block, warps = _whole(patch)
        given = {"prediction": "*fp32"} | images
        integers = (*counts, "stride_p", "stride_q", *strides)
        sizes = ones | {"stride_e": 1, "P": patch, "NORMALISE": True, "R": rows, "BLOCK": block}
        aligned = ("stride_b", "stride_c", *(("stride_p", "stride_q") if patch == 16 else ()))
        forward = given | {"partial": "*fp32"}
        add(f"loss forward {title}", _loss_forward, forward, ("share",), integers, sizes, warps, aligned)
        for of_pixels in (False, True):
            backward = given | {"grad_loss": "*fp32", "out": "*fp32"}
            backward_sizes = sizes | {"OF_PIXELS": of_pixels}
            name = f"loss backward {'to pixels ' * of_pixels}{title}"
            add(name, _loss_backward, backward, ("share",), integers, backward_sizes, warps, aligned)
    integers = ("count", "across", "patches", "stride_i", "stride_b", "stride_c", "stride_h")
    scattered = {"rows": "*fp32", "indices": "*i64", "out": "*bf16"}
    sizes = {"stride_n": 1, "P": 16, "R": 4, "W": 1024}
    add("scatter bf16 patch 16", _scatter, scattered, (), integers, sizes, 4, ("stride_b", "stride_c"))
    return found


def _slices(elements: int) -> tuple[int, int]:
    """(R, W): patches and elements per program, some 2048 in all, such that the fewest lanes hang over a patch's end."""
    width = min((256, 128, 64, 32), key=lambda width: triton.cdiv(elements, width) * width)
    return 2048 // width, width


def _whole(patch_size: int) -> tuple[int, int, int]:
    """(R, block, warps): whole patches per program, their elements rounded up, and warps for 8 or more per thread."""
    if patch_size > _LARGEST_PATCH:
        raise ValueError(
            f"masked_pixel_loss in Triton takes patches of up to {_LARGEST_PATCH} pixels, got {patch_size}"
        )
    block = triton.next_power_of_2(3 * patch_size**2)
    rows = max(1, 1024 // block)
    return rows, block, min(16, rows * block // 256)


def _refuse_fp64(op: str, *tensors: Tensor) -> None:
    if any(x.dtype == torch.float64 for x in tensors):
        raise ValueError(f"{op} in Triton takes fp16, bf16 and fp32, got fp64; the reference takes it")
