"""The loader against plain restatements, and its promises: resume, ranks, threads, bad files found late."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from timm.data.auto_augment import AugmentOp, rand_augment_choices

from engine.core.errors import BadInput
from engine.data import pipeline, sources
from engine.data.augment import OPERATIONS, Augmentation, drawn_operations, view_parameters, view_uniforms
from engine.data.pipeline import TrainLoader, byol_views, each_once, eval_batches, minimal
from tests.data.corpus import HOSTILE, picture, png_bytes, write_hostile, write_photos

SIZE = (32, 32)
MEAN = np.array(pipeline.IMAGENET_MEAN) * 255
STD = np.array(pipeline.IMAGENET_STD) * 255
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def take(loader, count):
    return list(itertools.islice(loader, count))


def loader(images, views=None, batch_size=64, **options):
    options = {"seed": 0, "threads": 1} | options
    return TrainLoader(images, byol_views(SIZE) if views is None else views, batch_size, **options)


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.step == other.step
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.labels, other.labels)
        for view, same in zip(one.images, other.images, strict=True):
            assert torch.equal(view, same)


def pixels(view_CHW):
    """Back to 0..255, rows and columns first."""
    return view_CHW.permute(1, 2, 0).numpy() * STD + MEAN


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name in ("a", "b"):
        write_photos(root / "train" / name, 20)
    return sources.open_images(root, "train")


def test_batches_have_the_promised_form(digits_train):
    (batch,) = take(loader(digits_train), 1)
    assert batch.step == 0
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert [view.shape for view in batch.images] == [(64, 3, 32, 32)] * 2
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in batch.images)
    assert batch.labels.tolist() == digits_train.labels[batch.ids.numpy()].tolist()


def test_every_epoch_shows_every_image_once_in_a_new_order(digits_train):
    batches = loader(digits_train, [minimal(SIZE)], batch_size=479)
    assert batches.steps_per_epoch == 3
    epochs = [torch.cat([batch.ids for batch in take(batches, 3)]) for _ in range(2)]
    assert all(torch.equal(ids.sort().values, torch.arange(1437)) for ids in epochs)
    assert not torch.equal(*epochs)


def test_the_last_incomplete_batch_is_left_out(digits_train):
    batches = loader(digits_train, [minimal(SIZE)], batch_size=1000)
    assert batches.steps_per_epoch == 1
    assert [len(batch.ids) for batch in take(batches, 2)] == [1000, 1000]


def test_a_seed_fixes_everything_and_another_seed_changes_it(photos):
    first, again, other = (take(loader(photos, batch_size=8, seed=seed), 2) for seed in (0, 0, 1))
    assert_same(first, again)
    assert not torch.equal(first[0].ids, other[0].ids)


def test_the_views_of_an_image_differ_and_so_do_its_epochs(photos):
    views = [minimal(SIZE), minimal(SIZE)]
    shown = []
    for batch in take(loader(photos, views, batch_size=40), 2):
        shown += [view[batch.ids.argsort()] for view in batch.images]
    for one, other in itertools.combinations(shown, 2):
        assert (one - other).abs().flatten(1).mean(1).min() > 0.01
    flips = [
        loader(photos, views, batch_size=40)._plan(step)[1][f"{view}.mirror"] for step in range(2) for view in range(2)
    ]
    assert all((one != other).any() for one, other in itertools.combinations(flips, 2))  # row by row, too


@pytest.mark.parametrize("start", [3, 5, 7])
def test_a_resumed_loader_continues_exactly(photos, start):
    """Five steps an epoch: from within the first, at its end, and within the second."""
    whole = take(loader(photos, batch_size=8), 9)
    assert_same(whole[start:], take(loader(photos, batch_size=8, start_step=start), 9 - start))
    displaced = next(loader(photos, batch_size=8, start_step=start + 1))
    assert not torch.equal(displaced.ids, whole[start].ids)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_process_sees(photos, world):
    whole = take(loader(photos, batch_size=8), 7)
    parts = [take(loader(photos, batch_size=8, rank=rank, world=world), 7) for rank in range(world)]
    joined = [
        pipeline.Batch(
            ids=torch.cat([batch.ids for batch in step]),
            images=tuple(torch.cat(views) for views in zip(*(batch.images for batch in step), strict=True)),
            labels=torch.cat([batch.labels for batch in step]),
            step=step[0].step,
        )
        for step in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)


def test_threads_do_not_matter(photos):
    assert_same(take(loader(photos, batch_size=8), 6), take(loader(photos, batch_size=8, threads=4), 6))


def test_a_batch_keeps_its_values_while_the_loader_runs_on(digits_train):
    batches = loader(digits_train)
    kept = [(batch, [view.clone() for view in batch.images]) for batch in take(batches, 8)]
    batches.close()
    for batch, copies in kept:
        assert all(torch.equal(view, copy) for view, copy in zip(batch.images, copies, strict=True))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 41}, "choose 1 to 40"),
        ({"batch_size": 0}, "choose 1 to 40"),
        ({"batch_size": 10, "world": 4}, "choose a multiple of 4"),
        ({"batch_size": 8, "seed": -1}, "choose 0 or above"),
    ],
)
def test_impossible_wishes_are_named(photos, options, sentence):
    with pytest.raises(BadInput, match=sentence):
        loader(photos, **options)


def test_without_views_a_loader_tells_the_ids_that_one_with_views_tells(photos):
    bare, whole = take(loader(photos, views=(), batch_size=8), 7), take(loader(photos, batch_size=8), 7)
    for one, other in zip(bare, whole, strict=True):
        assert one.images == () and one.step == other.step
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
    resumed = take(loader(photos, views=(), batch_size=8, start_step=5), 2)
    assert [batch.ids.tolist() for batch in resumed] == [batch.ids.tolist() for batch in bare[5:]]


def test_each_once_goes_through_every_id_and_fills_the_last_batch_up(photos):
    def ids_and_crops(turn, **options):
        batches = list(each_once(photos, byol_views(SIZE), 12, seed=3, turn=turn, threads=1, **options))
        return torch.cat([batch.ids for batch in batches]), torch.cat(
            [torch.stack(batch.images, 1) for batch in batches]
        )

    ids, crops = ids_and_crops(0)
    assert ids.tolist() == [*range(40), *[39] * 8] and crops.shape == (48, 2, 3, 32, 32)
    shares = [ids_and_crops(0, rank=rank, world=2) for rank in range(2)]
    assert shares[0][0].tolist() == [*range(24)] and shares[1][0].tolist() == [*range(24, 40), *[39] * 8]
    assert torch.equal(torch.cat([crops_ for _, crops_ in shares]), crops)
    assert not torch.equal(ids_and_crops(1)[1], crops)


def restate(path, view, drawn, row):
    """The view of one image with Pillow, NumPy and SciPy: what the pipeline must give, 0..255."""
    (left, top), (width, height) = drawn["start"][row], drawn["shape"][row]
    with Image.open(path) as image:
        crop = image.convert("RGB").crop((left, top, left + width, top + height))
    values = np.asarray(crop.resize(view.size[::-1], Image.Resampling.BICUBIC), float)
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


COLOURS = {"jitter": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}


@pytest.mark.parametrize(
    "views",
    [
        (minimal((48, 40), (0.2, 1.0)),),
        (minimal((24, 24), (0.2, 1.0)), minimal((64, 64), (0.05, 0.2))),
        (Augmentation(SIZE, (0.2, 1), **COLOURS),),
        (Augmentation(SIZE, (0.2, 1), blur=0.7), Augmentation(SIZE, (0.5, 1), solarize=0.5)),
        (Augmentation(SIZE, (0.2, 1), blur=0.5, solarize=0.5, **COLOURS),),
    ],
    ids=["crop", "crops", "colours", "blur and solarisation", "all"],
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


def timm_s(name, magnitude):
    """The operation as timm's rand-m*-inc1 does it at this magnitude and sign, for a mean colour of ImageNet's."""
    names = dict(zip(OPERATIONS, rand_augment_choices("", increasing=True), strict=True))
    fill = tuple(round(255 * value) for value in pipeline.IMAGENET_MEAN)
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


def test_evaluation_gives_every_image_once_in_order(photos):
    batches = list(eval_batches(photos, (96, 96), 16, threads=2))
    assert [len(batch.ids) for batch in batches] == [16, 16, 8]
    assert [batch.step for batch in batches] == [0, 1, 2]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(40))
    assert torch.cat([batch.labels for batch in batches]).tolist() == photos.labels.tolist()


def test_evaluation_resizes_and_cuts_the_centre_as_torchvision_does(photos):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize(110, InterpolationMode.BICUBIC), CenterCrop(96)])
    for batch in eval_batches(photos, (96, 96), 16, threads=1):
        for index, image in zip(batch.ids.tolist(), batch.images[0], strict=True):
            with Image.open(photos.root / photos.paths[index]) as source:
                assert np.abs(pixels(image) - np.asarray(transform(source), float)).max() <= 3


def test_evaluation_leaves_bad_files_out(tmp_path):
    write_photos(tmp_path, 10)
    write_hostile(tmp_path)
    images = sources.open_images(tmp_path, "train", bad_limit=1)
    ids = torch.cat([batch.ids for batch in eval_batches(images, SIZE, 4, threads=1)])
    assert ids.tolist() == np.flatnonzero(images.good).tolist()
    assert len(ids) == 10


def with_bad_file(root, bad):
    """Two classes of ten photos; `bad` names the files to be damaged, of which only the pixel data are."""
    for name in ("a", "b"):
        write_photos(root / "train" / name, 10)
    for path in bad:
        HOSTILE["truncated.jpg"][0](root / "train" / path)
    return root


def test_bad_files_change_nothing_but_their_own_place(tmp_path):
    whole = sources.open_images(with_bad_file(tmp_path / "whole", []), "train")
    holes = with_bad_file(tmp_path / "holed", ["a/photo003.jpg", "b/photo009.jpg"])
    holed = sources.open_images(holes, "train", bad_limit=0.1)
    assert holed.bad[0][0] == "train/a/photo003.jpg"
    for good, mended in zip(take(loader(whole, batch_size=5), 8), take(loader(holed, batch_size=5), 8), strict=True):
        assert mended.ids.tolist() == [{3: 4, 19: 0}.get(id, id) for id in good.ids.tolist()]
        assert mended.labels.tolist() == holed.labels[mended.ids.numpy()].tolist()
        kept = good.ids == mended.ids
        assert all(torch.equal(a[kept], b[kept]) for a, b in zip(good.images, mended.images, strict=True))


@pytest.mark.parametrize("views", [1, 2])
def test_a_file_found_bad_while_training_is_replaced_like_one_found_before(tmp_path, views):
    with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"])
    known = sources.open_images(tmp_path, "train", bad_limit=0.1)
    unknown = sources.open_images(tmp_path, "train", bad_limit=0.1, screening="header")
    assert len(known.bad) == 2
    assert not unknown.bad
    ledger = []
    found = take(loader(unknown, byol_views(SIZE)[:views], batch_size=5, ledger=ledger), 9)
    assert_same(take(loader(known, byol_views(SIZE)[:views], batch_size=5), 9), found)
    assert sorted(ledger) == list(known.bad)
    assert not unknown.bad
    assert unknown.good.all()


def test_a_file_that_vanishes_or_changes_is_found(tmp_path):
    images = sources.open_images(with_bad_file(tmp_path, []), "train", bad_limit=0.2)
    (tmp_path / "train/a/photo001.jpg").unlink()
    picture(20, 20).save(tmp_path / "train/b/photo002.jpg")
    ledger = []
    take(loader(images, batch_size=20, ledger=ledger), 1)
    assert {path: reason.split()[0] for path, reason in ledger} == {
        "train/a/photo001.jpg": "unreadable:", "train/b/photo002.jpg": "changed:"
    }  # fmt: skip


def test_too_many_files_found_bad_while_training_end_the_run(tmp_path):
    with_bad_file(tmp_path, ["a/photo003.jpg", "a/photo004.jpg"])
    images = sources.open_images(tmp_path, "train", bad_limit=0.05, screening="header")
    ledger = []
    with pytest.raises(BadInput, match="2 of 20 images are bad"):
        take(loader(images, batch_size=20, ledger=ledger), 1)
    assert len(ledger) == 2


def test_evaluation_goes_on_without_a_file_found_bad(tmp_path):
    with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"])
    images = sources.open_images(tmp_path, "train", bad_limit=0.1, screening="header")
    ledger = []
    batches = list(eval_batches(images, SIZE, 4, threads=1, ledger=ledger))
    assert torch.cat([batch.ids for batch in batches]).tolist() == [id for id in range(20) if id not in (3, 19)]
    assert [batch.step for batch in batches] == list(range(5))
    assert len(ledger) == 2


def test_an_error_that_no_file_explains_is_tried_once_more_and_then_raised(photos, monkeypatch):
    batches = loader(photos, batch_size=8)
    expected = next(loader(photos, batch_size=8))
    build, failures = batches._stream._build, []

    class Failing:
        def run(self):
            failures.append(1)
            raise RuntimeError("out of memory")

    monkeypatch.setattr(batches._stream, "_build", lambda: build() if failures else Failing())
    assert_same([expected], [next(batches)])
    monkeypatch.setattr(batches._stream, "_build", Failing)
    batches.close()
    with pytest.raises(RuntimeError, match="out of memory"):
        next(batches)
    assert len(failures) == 3


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
def test_a_batch_on_the_gpu_keeps_its_values_while_the_loader_runs_on(digits_train):
    batches = loader(digits_train, device="cuda")
    kept = [(batch, [view.clone() for view in batch.images]) for batch in take(batches, 12)]
    batches.close()
    for batch, copies in kept:
        assert all(torch.equal(view, copy) for view, copy in zip(batch.images, copies, strict=True))


@pytest.mark.gpu
def test_a_loader_on_the_gpu_resumes_and_replaces_bad_files(tmp_path):
    with_bad_file(tmp_path, ["a/photo003.jpg", "b/photo009.jpg"])
    images = sources.open_images(tmp_path, "train", bad_limit=0.1, screening="header")
    ledger = []
    whole = take(loader(images, batch_size=5, device="cuda", ledger=ledger), 9)
    assert {path for path, _ in ledger} == {"train/a/photo003.jpg", "train/b/photo009.jpg"}
    known = sources.open_images(tmp_path, "train", bad_limit=0.1)
    assert_same(whole[3:], take(loader(known, batch_size=5, device="cuda", start_step=3), 6))


@pytest.mark.gpu
def test_evaluation_on_the_gpu_gives_what_the_cpu_gives(photos):
    ours, theirs = (list(eval_batches(photos, (96, 96), 16, device=device)) for device in ("cuda", "cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert (one.images[0].cpu() - other.images[0]).abs().mean() * STD.mean() < 2
