import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional

from engine import eval as command
from engine import evals
from engine.core.errors import BadInput
from engine.data.annotated import clips, davis, dense
from engine.evals import Subject, raw_pixels
from engine.evals.features import encoder_of
from engine.evals.metrics import video as metric
from engine.evals.protocols import propagation
from engine.evals.protocols.propagation import Settings
from engine.model import vit
from tests.data.published import write_davis


@pytest.fixture(scope="module")
def videos():
    return davis.open_videos(clips.write())


def random_model(seed=0):
    return vit.create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(seed))


def subject_of(model, **how):
    return Subject("micro", encoder_of(model), **how)


class Colours(Subject):
    """Sees the mean colour of a patch."""

    def maps(self, images_B3HW, layer="norm", blocks=()):
        return functional.avg_pool2d(images_B3HW, self.vit.patch_size).permute(0, 2, 3, 1)


COLOURS = np.full((256, 3), 40, np.uint8)
COLOURS[1:4] = (220, 30, 30), (30, 220, 30), (60, 90, 230)


def write_set(folder, ids_by_video, colours=COLOURS):
    """Ids [T, H, W] of each video, and frames in a colour for each id."""
    return davis.open_videos(write_davis(folder, ids_by_video, {"val": list(ids_by_video)}, colours))


def moving(frames=10, height=64, width=128):
    """Two rectangles of whole patches of 8 pixels that go a patch a frame and meet."""
    ids = np.zeros((frames, height, width), np.uint8)
    for index in range(frames):
        ids[index, 8:32, 8 * index : 8 * index + 24] = 1
        ids[index, 24:48, 96 - 8 * index : 120 - 8 * index] = 2
    return ids


def plain_propagation(target, sources, masks, grid, radius, keep, temperature):
    """Patch after patch, in float64."""
    h, w = grid
    found = []
    for here in range(h * w):
        weighed = []
        for frame in range(len(sources)):
            for there in range(h * w):
                rows, columns = abs(here // w - there // w), abs(here % w - there % w)
                if radius == 0 or max(rows, columns) <= radius:
                    weighed.append((float(target[here] @ sources[frame, there]), masks[frame, there]))
        least = sorted((cosine for cosine, _ in weighed), reverse=True)[: min(keep, len(weighed))][-1]
        kept = [(np.exp(cosine / temperature), mask) for cosine, mask in weighed if cosine >= least]
        found.append(sum(weight * mask for weight, mask in kept) / sum(weight for weight, _ in kept))
    return np.array(found)


@pytest.mark.parametrize("pairs", [1, 700, 2**24])
@pytest.mark.parametrize(
    "grid, frames, radius, keep", [((5, 7), 3, 2, 5), ((7, 4), 1, 1, 5), ((3, 9), 2, 0, 4), ((1, 1), 1, 12, 5)]
)
def test_propagation_equals_a_plain_restatement(grid, frames, radius, keep, pairs, monkeypatch):
    monkeypatch.setattr(propagation, "_PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    patches = grid[0] * grid[1]
    features = functional.normalize(torch.randn(frames + 1, patches, 6, generator=generator), dim=-1)
    masks = torch.rand(frames, patches, 3, generator=generator)
    found = propagation.propagate(features[0], features[1:], masks, grid, Settings(radius=radius, keep=keep))
    expected = plain_propagation(
        features[0].double().numpy(), features[1:].double().numpy(), masks.double().numpy(), grid, radius, keep, 0.1
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_patches_as_near_as_the_last_one_count_too():
    grid, radius = (4, 5), 1
    features = torch.zeros(3, 20, 2)
    features[..., 0] = 1  # all alike
    masks = torch.rand(2, 20, 3, generator=torch.Generator().manual_seed(0))
    found = propagation.propagate(features[0], features[1:], masks, grid, Settings(radius=radius, keep=1))
    maps = masks.unflatten(1, grid).mean(0)
    for row in range(4):
        for column in range(5):
            window = maps[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            torch.testing.assert_close(found.unflatten(0, grid)[row, column], window.mean((0, 1)))


def test_the_first_and_the_previous_frames_give_masks():
    seen = []
    settings = Settings(previous=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            propagation,
            "propagate",
            lambda target, sources, masks, *_: (
                seen.append((sources[:, 0, 0].tolist(), masks[:, 0, 0].tolist())) or target
            ),
        )
        features = iter(torch.arange(5.0)[:, None, None])
        assert [int(mask) for mask in propagation.follow(features, torch.full((1, 1), 9.0), (1, 1), settings)] == [
            1,
            2,
            3,
            4,
        ]
    assert seen == [([0], [9]), ([0, 1], [9, 1]), ([0, 1, 2], [9, 1, 2]), ([0, 2, 3], [9, 2, 3])]


def test_perfect_features_follow_to_the_grids_bound(videos):
    video, grid = videos.videos[2], (16, 24)
    patches = [propagation.to_patches(video.masks(frame), video.objects, grid) for frame in range(len(video))]
    found = propagation.follow(iter(patches), patches[0], grid, Settings(radius=0))
    for mask, expected in zip(found, patches[1:], strict=True):
        torch.testing.assert_close(mask, expected)


def test_objects_of_a_colour_each_are_followed_to_the_bound(tmp_path):
    test = write_set(tmp_path, {"cross": moving(), "still": np.repeat(moving(1), 4, 0)})
    result = propagation.evaluate(Colours("colours", encoder_of(random_model())), None, test)
    values = result.values
    assert values["J&F"] == pytest.approx(values["J&F of the true masks on patches"], abs=0.02)
    assert values["J&F"] > 0.93 and values["J recall"] == values["F recall"] == 1
    assert values["J&F if nothing moved"] < 0.7
    cross, still = result.details["by video"]
    assert (cross["video"], cross["objects"], still["video"], still["objects"]) == ("cross", 2, "still", 2)
    assert cross["J mean"] == pytest.approx(result.samples["J mean"][:2].mean())
    assert still["F mean"] == pytest.approx(result.samples["F mean"][2:].mean())


def test_a_video_that_stands_still_keeps_its_masks_whatever_the_features(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 4, (8, 11)), np.ones((9, 9))).astype(np.uint8)  # 72 x 99 pixels, odd for patches of 8
    test = write_set(tmp_path, {"still": np.repeat(ids[None], 4, 0)}, rng.integers(0, 256, (256, 3), np.uint8))
    result = propagation.evaluate(subject_of(random_model()), None, test, Settings(keep=1))
    assert result.values["J&F if nothing moved"] == 1
    assert result.values["J&F"] == pytest.approx(result.values["J&F of the true masks on patches"], abs=1e-12)
    assert result.settings["input"] == "72x72"  # 99 pixels become 64, which the short side is above


def test_masks_are_resized_as_published():
    rng = np.random.default_rng(0)
    for height, width, grid in ((97, 61, (12, 5)), (480, 854, (30, 52)), (7, 5, (9, 8))):
        ids = rng.integers(0, 4, (height, width)).astype(np.uint8)
        expected = np.asarray(Image.fromarray(ids).resize(grid[::-1], Image.Resampling.NEAREST))
        found = propagation.to_patches(ids, 3, grid).argmax(1).unflatten(0, grid)
        np.testing.assert_array_equal(found.numpy(), expected)


def test_ids_that_are_not_judged_are_background():
    ids = np.array([[0, 1, 2, 3, 255]], np.uint8)
    assert propagation.to_patches(ids, 2, (1, 5)).argmax(1).tolist() == [0, 1, 2, 0, 0]


def test_masks_are_stretched_before_the_largest_is_taken():
    masks = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])  # the object never has the larger share
    assert propagation.read_out(masks, (1, 3), 1, (1, 3)).tolist() == [[0, 0, 1]]
    assert propagation.read_out(torch.tensor([[1.0, 0.0]] * 3), (1, 3), 2, (4, 9)).tolist() == [[0] * 9] * 4
    assert propagation.read_out(torch.tensor([[0.0, 1.0]] * 3), (1, 3), 2, (2, 5)).tolist() == [[1] * 5] * 2


@pytest.mark.parametrize(
    "height, width, patch, size, expected",
    [
        (480, 854, 16, 0, (480, 832)), (480, 910, 8, 0, (480, 896)), (854, 480, 16, 0, (832, 480)), (480, 854, 14, 0, (476, 840)),
        (480, 854, 16, 240, (240, 384)), (1080, 1920, 16, 0, (480, 832)), (128, 192, 8, 0, (128, 192)),
        (100, 100, 8, 0, (96, 96)),
    ],
)  # fmt: skip
def test_the_input_is_480_high_and_a_multiple_of_64_wide(height, width, patch, size, expected):
    assert propagation.input_shape(height, width, patch, size) == expected


def test_red_is_divided_by_what_is_chosen(tmp_path):
    test, seen = write_set(tmp_path, {"cross": moving(3)}), []

    class Recorder(Colours):
        def maps(self, images_B3HW, layer="norm", blocks=()):
            seen.append(images_B3HW)
            return super().maps(images_B3HW)

    recorder = Recorder("colours", encoder_of(random_model()), batch_size=2)
    ours = propagation.evaluate(recorder, None, test)
    published = propagation.evaluate(recorder, None, test, Settings(red_std=0.228))
    ours_B3HW, published_B3HW = torch.cat(seen[:2]), torch.cat(seen[2:])
    pixels = torch.stack([dense.read(test.images, index) for index in range(3)])
    torch.testing.assert_close(ours_B3HW, dense.normalised(pixels))  # 64 x 128 pixels stay as they are
    torch.testing.assert_close(published_B3HW[:, 0] * 0.228, ours_B3HW[:, 0] * 0.229)
    torch.testing.assert_close(published_B3HW[:, 1:], ours_B3HW[:, 1:])
    assert ours.settings["recipe"] == "after DINO's released evaluation; ours: size 64, red std 0.229"
    assert published.settings["recipe"] == "after DINO's released evaluation; ours: size 64"


def test_on_the_clips(videos):
    (result,) = evals.evaluate({"micro": random_model()}, evals.Sets(), ("propagation",), batch_size=5)
    assert result.data == "clips"
    objects = sum(video.objects for video in videos.videos)
    for name, samples in result.samples.items():
        assert samples.shape == (objects,) and samples.mean() == pytest.approx(result.values[name])
    values = result.values
    assert values["J&F"] == pytest.approx((values["J mean"] + values["F mean"]) / 2)
    assert values["J&F if nothing moved"] < values["J&F"] < values["J&F of the true masks on patches"]
    assert result.counts == {
        "videos": 8, "objects": objects, "frames": 128, "frames judged": 112, "unreadable frames left out": 0,
    }  # fmt: skip
    assert result.settings["input"] == "192x128" and len(result.details["by video"]) == 8
    assert len(result.pictures) == 2 and all(isinstance(figure, Figure) for figure in result.pictures.values())


def test_the_figures_follow_from_the_masks_that_were_found(videos):
    """All of it once more, in one piece, for one video."""
    video, model, patch = videos.videos[4], random_model(), 8
    one = dataclasses.replace(videos, videos=(video,))
    pixels = torch.stack([dense.read(video.images, index) for index in range(6)])
    video = dataclasses.replace(video, images=dataclasses.replace(video.images, paths=video.images.paths[:6]))
    one = dataclasses.replace(one, videos=(video,))
    with torch.no_grad():
        tokens = model.eval()(dense.normalised(pixels))[:, model.num_prefix_tokens :]
    tokens = functional.normalize(tokens, dim=-1)
    truth = np.stack([video.masks(index) for index in range(6)])
    masks = [functional.one_hot(torch.from_numpy(truth[0, 4::8, 4::8].reshape(-1)).long()).float()]
    settings, found = Settings(previous=2, radius=3), [truth[0]]
    for index in range(1, 6):
        used = sorted({0, *range(max(1, index - 2), index)})
        mask = plain_propagation(
            tokens[index].double().numpy(),
            tokens[used].double().numpy(),
            torch.stack(masks)[used].numpy(),
            (16, 24),
            3,
            5,
            0.1,
        )
        masks.append(torch.from_numpy(mask).float())
        large = functional.interpolate(masks[-1].T.reshape(1, -1, 16, 24), scale_factor=patch, mode="bilinear")[
            0
        ].numpy()
        for channel in large:
            channel -= channel.min()
            channel /= channel.max()
        found.append(large.argmax(0))
    scores = metric.scored(np.stack(found), truth, video.objects)
    result = propagation.evaluate(subject_of(model), None, one, settings)
    np.testing.assert_allclose(result.samples["J mean"], scores[0].mean(1), atol=5e-3)
    np.testing.assert_allclose(result.samples["F mean"], scores[1].mean(1), atol=5e-3)


def test_what_cannot_be_judged_gets_a_sentence(tmp_path, videos):
    short = write_set(tmp_path, {"short": moving(2)})
    with pytest.raises(BadInput, match=r"propagation needs 3 frames.*; short has 2"):
        propagation.check(None, short, Settings())
    with pytest.raises(BadInput, match="size = 100 is not a multiple of the patch size 8"):
        propagation.evaluate(subject_of(random_model()), None, videos, Settings(size=100))
    with pytest.raises(BadInput, match="frames of 7x20 pixels are smaller than a patch of 8x8"):
        propagation.input_shape(20, 7, 8)
    with pytest.raises(BadInput, match="have no patches to look at"):
        propagation.evaluate(Subject("raw", raw_pixels()), None, videos)
    broken = random_model()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(BadInput, match="features of micro contain NaN or infinity"):
        propagation.evaluate(subject_of(broken), None, videos)


@pytest.mark.parametrize(
    "wrong",
    [{"size": -1}, {"previous": -1}, {"radius": -1}, {"keep": 0}, {"temperature": 0.0}, {"red_std": float("nan")}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Settings(**wrong)


def test_the_command_on_a_folder_of_videos(tmp_path, capsys):
    write_set(tmp_path / "DAVIS", {"cross": moving(4)})
    arguments = ["--weights", "random:vit_micro_patch8_32", "--protocol", "propagation", "--video", f"davis:{tmp_path}"]
    assert command.main([*arguments, "--out", str(tmp_path / "out"), "--propagation.radius", "2"]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["settings"]["radius"] == 2 and 0 <= result["values"]["J&F"] <= 1
    assert command.main([*arguments[:-1], "davis:/nowhere", "--out", str(tmp_path / "none")]) == 2
    assert "/nowhere after davis: is no folder" in capsys.readouterr().err
