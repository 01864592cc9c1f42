"""Views, evaluated crops and colours of every kind of file against plain restatements."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from nvidia.dali import backend, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.ops import _OperatorInstance
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from timm.data.auto_augment import AugmentOp, rand_augment_choices

from engine.data import sources
from engine.data.augment import OPERATIONS, drawn_operations, view_parameters, view_uniforms
from engine.data.graph import (
    Graph,
    Inputs,
    centre_graph,
    centre_inputs,
    decode,
    view_graph,
    view_inputs,
    with_header,
)
from engine.data.pipeline import eval_batches
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, SWAV_STD, Augmentation, byol_views, minimal, multi_crop
from tests.data.corpus import picture, png_bytes
from tests.data.loading import SIZE, STD, assert_same, loader, pixels, take

YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def restate(path, view, drawn, row):
    """The view of one image with Pillow, NumPy and SciPy: what the pipeline must give, 0..255."""
    (left, top), (width, height) = drawn["start"][row], drawn["shape"][row]
    with Image.open(path) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
    values = np.asarray(crop.resize(view.size[::-1], Image.Resampling[view.resize.upper()]), float)
    if "hue" in drawn:
        brightness, contrast, saturation = (drawn[name][row] for name in ("brightness", "contrast", "saturation"))
        turn = np.deg2rad(drawn["hue"][row])
        plane = saturation * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        matrix = np.linalg.inv(YIQ) @ np.block([[np.ones((1, 1)), np.zeros((1, 2))], [np.zeros((2, 1)), plane]]) @ YIQ
        values = (((values - 128) * contrast + 128) * brightness @ matrix.T).round().clip(0, 255)
    if "sigma" in drawn and drawn["window"][row] == 0:
        sigma = drawn["sigma"][row]
        for axis in (0, 1):
            values = gaussian_filter1d(values, sigma, axis=axis, radius=int(np.ceil(3 * sigma)), mode="mirror")
        values = values.round()
    if "solarize_from" in drawn:
        values = np.where(values >= drawn["solarize_from"][row], 255 - values, values)
    return values[:, ::-1] if drawn["mirror"][row] else values


LINEAR = {"colours": "linear"}  # those of torchvision: test_colours.py
COLOURS = LINEAR | {"jitter": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}


@pytest.mark.parametrize(
    "views",
    [
        (minimal((48, 40), (0.2, 1.0)),),
        (minimal((24, 24), (0.2, 1.0)), minimal((64, 64), (0.05, 0.2))),
        (
            replace(minimal((48, 40), (0.2, 1.0)), resize="bilinear"),
            replace(minimal((64, 64), (0.1, 1)), resize="bilinear"),
        ),
        (Augmentation(SIZE, (0.2, 1), **COLOURS),),
        (Augmentation(SIZE, (0.2, 1), blur=0.7), Augmentation(SIZE, (0.5, 1), solarize=0.5)),
        (Augmentation(SIZE, (0.2, 1), blur=0.5, solarize=0.5, **COLOURS),),
        tuple(
            Augmentation(
                SIZE,
                (0.2, 1),
                **(LINEAR | dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | of_some),
            )
            for of_some in (
                {"grayscale": 0.5},
                {"jitter": 0.5, "brightness": 0.4},
                {"jitter": 0.5, "contrast": 0.4},
                {"jitter": 0.5, "saturation": 0.4},
                {"jitter": 0.5, "hue": 0.1},
                {"jitter": 0.5, "hue": 0.1, "blur": 0.5},
            )
        ),
    ],
    ids=["crop", "crops", "bilinear", "colours", "blur and solarisation", "all", "one colour of some"],
)
def test_views_are_those_of_plain_restatements(photos, views):
    batch = next(loader(photos, views, batch_size=40))
    ids = batch.ids.numpy()
    for index, view in enumerate(views):
        drawn = view_parameters(view, photos.sizes[ids], view_uniforms(slice(0, 40), 0, 0, index))
        expected = np.stack([restate(photos.root / photos.paths[id], view, drawn, row) for row, id in enumerate(ids)])
        error = np.abs(np.stack([pixels(image) for image in batch.images[index]]) - expected)
        # rounding between the passes of a filter differs by a level or two; solarisation flips the values just at 128
        assert error.mean() < 0.6
        assert np.quantile(error, 0.98) <= 3.1
        assert view.solarize or error.max() <= 6


@pytest.mark.parametrize(("own", "other"), [("bicubic", "bilinear"), ("bilinear", "bicubic")])
def test_each_way_of_resizing_is_the_one_that_is_named(tmp_path, own, other):
    noise = np.random.default_rng(0).integers(0, 256, (37, 41, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    images = sources.open_images(tmp_path, "train")
    for size in ((24, 24), (64, 64)):
        view = replace(minimal(size, (0.5, 1.0)), resize=own)
        (image,) = next(loader(images, [view], batch_size=1)).images[0]
        drawn = view_parameters(view, images.sizes[:1], view_uniforms(slice(0, 1), 0, 0, 0))
        errors = [
            np.abs(pixels(image) - restate(tmp_path / "noise.png", replace(view, resize=way), drawn, 0)).mean()
            for way in (own, other)
        ]
        assert errors[0] < 1 < 4 < errors[1]


def test_pixels_are_divided_by_what_a_view_says(photos):
    view = minimal((48, 40), (0.2, 1.0))
    ours, swavs = (next(loader(photos, [v], batch_size=8)).images[0] for v in (view, replace(view, std=SWAV_STD)))
    ratio = torch.tensor(IMAGENET_STD) / torch.tensor(SWAV_STD)
    torch.testing.assert_close(swavs, ours * ratio[:, None, None], atol=1e-5, rtol=1e-5)
    assert ratio[0] > 1.004


def timm_s(name, magnitude):
    """The operation as timm's rand-m*-inc1 does it at this magnitude and sign, for a mean colour of ImageNet's."""
    names = dict(zip(OPERATIONS, rand_augment_choices("", increasing=True), strict=True))
    fill = tuple(round(255 * value) for value in IMAGENET_MEAN)
    hparams = {"img_mean": fill, "interpolation": Image.Resampling.BILINEAR}
    operation = AugmentOp(names[name], prob=1.0, magnitude=abs(magnitude), hparams=hparams)

    def apply(image):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("timm.data.auto_augment._randomly_negate", lambda value: math.copysign(value, magnitude))
            return operation(image)

    return apply


def whole_pictures(folder, count, size):
    """Pictures that already have the size of the view, and the view that shows them whole."""
    for index in range(count):
        picture(*size[::-1], seed=index).save(folder / f"{index:02d}.png")
    ratio = size[1] / size[0]
    return sources.open_images(folder, "train"), Augmentation(size, (1, 1), (ratio, ratio), flip=0)


def equalized(image):
    """By OpenCV's formula: Pillow counts only darker pixels, and by a whole number of pixels for each level."""
    channels = np.asarray(image).transpose(2, 0, 1)
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])
    first = np.take_along_axis(counts, (counts > 0).argmax(1)[:, None], 1)
    tables = (counts.cumsum(1) - first) / (channels[0].size - first) * 255
    return np.stack([table[channel] for table, channel in zip(tables, channels, strict=True)], -1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_randaugment_is_timm_s(name, tmp_path, monkeypatch):
    """To a level of 256; bilinear, which is one of timm's two ways."""
    size, changed = (40, 48), []
    magnitudes = np.array([0.0, 2.4, 2.6, 5.0, 7.3, 9.0, 9.99])
    magnitudes = np.concatenate([magnitudes, -magnitudes])
    images, view = whole_pictures(tmp_path, len(magnitudes), size)
    names = np.full(len(magnitudes), name)
    monkeypatch.setattr("engine.data.augment.drawn_operations", lambda view, uniforms, index: (names, magnitudes))
    batch = next(loader(images, [replace(view, operations=1)], batch_size=len(magnitudes)))
    for row, id in enumerate(batch.ids.tolist()):
        before = picture(*size[::-1], seed=id)
        expected = equalized(before) if name == "equalize" else timm_s(name, magnitudes[row])(before)
        assert np.abs(pixels(batch.images[0][row]) - np.asarray(expected, float)).max() <= 1.01, magnitudes[row]
        changed.append((np.asarray(expected) != np.asarray(before)).mean())
    assert np.mean(changed) > 0.1


def test_equalising_is_close_to_timm_s():
    for seed in range(5):
        theirs = timm_s("equalize", 9.0)(picture(224, 224, seed=seed))
        assert np.abs(equalized(picture(224, 224, seed=seed)) - np.asarray(theirs, float)).mean() < 4


def test_two_operations_of_randaugment_follow_one_another(tmp_path):
    """Of images and operations as they come, each image gets its own two."""
    images, view = whole_pictures(tmp_path, 40, (40, 48))
    view = replace(view, operations=2)
    for batch in take(loader(images, [view], batch_size=40), 3):
        uniforms, seen = view_uniforms(slice(0, 40), 0, batch.step, 0), 0
        drawn = [drawn_operations(view, uniforms, index) for index in range(2)]
        for row, id in enumerate(batch.ids.tolist()):
            expected, named = picture(48, 40, seed=id), [names[row] for names, _ in drawn]
            # those not taken may make much of a level's difference after another operation
            if {"equalize", "autocontrast", "posterize", "solarize", "solarize-add"}.isdisjoint(named):
                for names, magnitudes in drawn:
                    expected = timm_s(names[row], magnitudes[row])(expected) if names[row] else expected
                assert np.abs(pixels(batch.images[0][row]) - np.asarray(expected, float)).max() <= 3.01, named
                seen += any(named)
        assert seen > 5


def test_randaugment_that_never_acts_changes_nothing(photos):
    for view in (minimal(SIZE), byol_views(SIZE)[1]):
        off = take(loader(photos, [view], batch_size=8), 3)
        assert_same(off, take(loader(photos, [replace(view, operations=2, operation=0.0)], batch_size=8), 3))


def test_a_padded_crop_is_a_window_of_the_framed_image(tmp_path):
    images, _ = whole_pictures(tmp_path, 40, (40, 48))
    view, shifts = Augmentation((40, 48), (0.2, 1), pad=4), set()
    for batch in take(loader(images, [view], batch_size=40), 3):
        drawn = view_parameters(view, images.sizes[batch.ids.numpy()], view_uniforms(slice(0, 40), 0, batch.step, 0))
        for row, id in enumerate(batch.ids.tolist()):
            framed = np.pad(np.asarray(picture(48, 40, seed=id), float), ((4, 4), (4, 4), (0, 0)))
            x, y = drawn["shift"][row] + 4
            shifts.add((x, y))
            expected = framed[y : y + 40, x : x + 48]
            expected = expected[:, ::-1] if drawn["mirror"][row] else expected
            assert np.abs(pixels(batch.images[0][row]) - expected).max() < 0.01
    for axis in range(2):
        assert {shift[axis] for shift in shifts} == set(range(9))


FORMATS = {
    "grey.jpg": lambda path, image: image.convert("L").save(path),
    "cmyk.jpg": lambda path, image: image.convert("CMYK").save(path, quality=95),
    "progressive.jpg": lambda path, image: image.save(path, progressive=True),
    "grey.png": lambda path, image: image.convert("L").save(path),
    "palette.png": lambda path, image: image.quantize(64).save(path),
    "bits.png": lambda path, image: image.convert("1").save(path),
    "alpha.png": lambda path, image: with_alpha(image).save(path),
    "grey_alpha.png": lambda path, image: with_alpha(image).convert("LA").save(path),
    "rgb.webp": lambda path, image: image.save(path),
    "lossless.webp": lambda path, image: image.save(path, lossless=True),
    "alpha.webp": lambda path, image: with_alpha(image).save(path),
    "rgb.bmp": lambda path, image: image.save(path),
    "palette.bmp": lambda path, image: image.quantize(64).save(path),
    "grey.bmp": lambda path, image: image.convert("L").save(path),
    "rgb.tif": lambda path, image: image.save(path),
    "lzw.tif": lambda path, image: image.save(path, compression="tiff_lzw"),
    "jpeg.tif": lambda path, image: image.save(path, compression="jpeg"),
    "grey.tif": lambda path, image: image.convert("L").save(path),
    "palette.tif": lambda path, image: image.quantize(64).save(path),
    "alpha.tif": lambda path, image: with_alpha(image).save(path),
    "cmyk.tif": lambda path, image: image.convert("CMYK").save(path),
}


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def shown(folder):
    """{file name: uint8-like [32, 32, 3]} as the evaluation road gives them."""
    images = sources.open_images(folder, "train")
    (batch,) = eval_batches(images, SIZE, 100, threads=1)
    return {path: pixels(image) for path, image in zip(images.paths, batch.images[0], strict=True)}


def test_every_kind_of_file_becomes_the_rgb_that_pillow_gives(tmp_path):
    for name, save in FORMATS.items():
        save(tmp_path / name, picture(32, 32))
    for name, values in shown(tmp_path).items():
        with Image.open(tmp_path / name) as image:
            assert np.abs(values - np.asarray(image.convert("RGB"), float)).max() <= 1.01, name


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    colour = np.stack([ramp, ramp.T, ramp[::-1]], -1)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp).save(tmp_path / "grey.tif")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    (tmp_path / "colour.png").write_bytes(png_bytes(32, 32, 16, 2, rows))
    for name, values in shown(tmp_path).items():
        expected = colour if name == "colour.png" else ramp[..., None]
        assert np.abs(values - expected / 257).max() <= 1.01, name


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # stored lying on its side
    for suffix in ("jpg", "tif", "png"):
        picture(40, 20).save(tmp_path / f"turned.{suffix}", exif=exif)
        picture(40, 20).save(tmp_path / f"plain.{suffix}")
    values = shown(tmp_path)
    for suffix in ("jpg", "tif", "png"):
        assert np.array_equal(values[f"turned.{suffix}"], values[f"plain.{suffix}"]), suffix


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
@pytest.mark.parametrize("squeeze", [False, True])
def test_evaluation_resizes_and_cuts_the_centre_as_torchvision_does(photos, resize, squeeze):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize((96, 96) if squeeze else 110, InterpolationMode(resize)), CenterCrop(96)])
    for batch in eval_batches(photos, (96, 96), 16, threads=1, resize=resize, squeeze=squeeze):
        for index, image in zip(batch.ids.tolist(), batch.images[0], strict=True):
            with Image.open(photos.root / photos.paths[index]) as source:
                assert np.abs(pixels(image) - np.asarray(transform(source), float)).max() <= 3


def laid_out(graph: Graph, inputs: Inputs) -> list[_OperatorInstance]:
    """The operators of a graph that a GPU decodes for. DALI checks each one's arguments, and what lies on which device; that
    needs no GPU."""

    def define() -> tuple[DataNode, ...]:
        encoded, *given = fn.external_source(lambda: None, num_outputs=1 + len(inputs), batch=True)
        outputs = graph(with_header(encoded), dict(zip(inputs, given)), "mixed")
        assert {output.device for output in outputs} == {"gpu"}
        return outputs

    pipeline = pipeline_def(define, enable_conditionals=True)(batch_size=4, num_threads=1, device_id=0)
    pipeline._build_graph()
    return pipeline._ops


def missing(operators: list[_OperatorInstance]) -> set[tuple[str, str]]:
    """Those that DALI has not for their device."""
    has = {
        "cpu": backend.RegisteredCPUOps(), "gpu": backend.RegisteredGPUOps(), "mixed": backend.RegisteredMixedOps()
    }  # fmt: skip
    found = {(one._op.schema.Name(), one._op.device) for one in operators}
    return {(name, device) for name, device in found if name not in has[device]}


@pytest.mark.parametrize(
    "views",
    [
        (minimal((32, 32)),),
        byol_views((32, 32)),
        tuple(replace(view, **LINEAR) for view in byol_views((32, 32))),
        multi_crop((32, 32), (16, 16), 2, 2, (0.3, 1), (0.05, 0.3), "dinov2"),
        (Augmentation((32, 32), (1, 1), jitter=1.0, hue=0),),
        (Augmentation((32, 32), (1, 1), pad=4, std=SWAV_STD),),
        (Augmentation((32, 32), (0.2, 1), patch=8, sides=(0.5, 1)),),
        (Augmentation((32, 32), (0.2, 1), operations=2, jitter=0.5, blur=0.5, solarize=0.5, grayscale=0.5),),
    ],
    ids=["crop", "byol", "linear", "crops", "beit", "pad", "aspect", "randaugment"],
)
def test_a_gpu_s_graph_of_views_is_one_that_dali_has(views):
    inputs = view_inputs(views, np.full((4, 2), 40, np.int32), slice(0, 4), 0, 0)
    operators = laid_out(partial(view_graph, views), inputs)
    assert {"gpu", "mixed"} < {one._op.device for one in operators}
    assert not missing(operators)


def test_a_gpu_s_graph_of_evaluated_images_is_one_that_dali_has():
    inputs = centre_inputs(np.full((4, 2), 300, np.int32), (224, 224))
    assert not missing(laid_out(partial(centre_graph, (224, 224), "bicubic"), inputs))


def test_what_dali_has_on_cpus_alone_is_found():
    def graph(encoded: DataNode, _: Mapping[str, DataNode], decoder: str) -> tuple[DataNode, ...]:
        return (fn.zeros_like(decode(encoded, decoder), device="gpu"),)

    assert missing(laid_out(graph, {})) == {("ZerosLike", "gpu")}


@pytest.mark.gpu
@pytest.mark.parametrize("views", [(minimal(SIZE),), byol_views(SIZE)], ids=["one view", "two views"])
def test_a_gpu_gives_what_the_cpu_gives(photos, digits_train, views):
    for images, tolerance in ((digits_train, 0.5), (photos, 2.0)):  # nvJPEG rounds and upsamples in its own way
        ours, theirs = (take(loader(images, views, batch_size=40, device=device), 3) for device in ("cuda", "cpu"))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.ids, other.ids)
            for view, same in zip(one.images, other.images, strict=True):
                assert view.is_cuda
                assert (view.cpu() - same).abs().mean() * STD.mean() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_of_randaugment_is_on_the_gpu_what_it_is_on_the_cpu(name, tmp_path, monkeypatch):
    magnitudes = np.linspace(-9.9, 9.9, 16)
    images, view = whole_pictures(tmp_path, 16, (40, 48))
    names = np.full(16, name)
    monkeypatch.setattr("engine.data.augment.drawn_operations", lambda view, uniforms, index: (names, magnitudes))
    views = [replace(view, operations=1), replace(view, operations=1, pad=4)]
    ours, theirs = (next(loader(images, views, batch_size=16, device=device)) for device in ("cuda", "cpu"))
    for one, other in zip(ours.images, theirs.images, strict=True):
        difference = (one.cpu() - other).abs() * torch.tensor(STD, dtype=torch.float32)[:, None, None]
        assert difference.max() <= 2.01
        assert difference.mean() < 0.1


@pytest.mark.gpu
def test_evaluation_on_the_gpu_gives_what_the_cpu_gives(photos):
    ours, theirs = (list(eval_batches(photos, (96, 96), 16, device=device)) for device in ("cuda", "cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert (one.images[0].cpu() - other.images[0]).abs().mean() * STD.mean() < 2
