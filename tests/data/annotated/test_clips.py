import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion

from engine.core.errors import BadInput
from engine.data.annotated import clips
from engine.data.annotated import opening as annotations


@pytest.fixture(scope="module")
def videos(private_cache):
    train, test = annotations.open_pair("video")
    assert train is None
    return test.videos


def pixels(video, frame):
    with Image.open(video.images.root / video.images.paths[frame]) as image:
        return np.asarray(image, float)


def test_there_are_eight_videos_of_two_to_four_objects(videos):
    assert len(videos) == clips.VIDEOS == 8
    counts = [video.objects for video in videos]
    assert min(counts) == 2 and max(counts) == 4
    for video in videos:
        assert len(video) == clips.FRAMES
        assert video.images.sizes.tolist() == [[192, 128]] * clips.FRAMES


def test_every_object_is_in_sight_in_every_frame_and_goes_its_way_evenly(videos):
    ways = []
    for video in videos:
        ids = np.stack([video.masks(frame) for frame in range(len(video))])
        assert set(np.unique(ids)) == set(range(video.objects + 1))
        for k in range(1, video.objects + 1):
            areas = (ids == k).sum((1, 2))
            assert areas.min() > 100
        centres = np.array([np.argwhere(mask).mean(0) for mask in ids == video.objects])  # nothing is in front of it
        steps = np.diff(centres, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps.mean(0), steps.shape), atol=0.7)
        ways.append(np.linalg.norm(centres[-1] - centres[0]))
    assert max(ways) > 40


def test_objects_hide_each_other(videos):
    shares = []
    for video in videos:
        for k in range(1, video.objects):
            areas = np.array([(video.masks(frame) == k).sum() for frame in range(len(video))])
            shares.append(areas.min() / areas.max())
    assert min(shares) < 0.7


def test_the_digits_of_a_video_have_one_colour_that_stands_out(videos):
    for video in videos:
        colours, contrasts = [], []
        for frame in range(len(video)):
            ids, image = video.masks(frame), pixels(video, frame)
            inner = [binary_erosion(ids == k, iterations=2) for k in range(1, video.objects + 1)]
            colours += [np.median(image[mask], 0) for mask in inner if mask.any()]
            contrasts.append(np.linalg.norm(image[ids > 0].mean(0) - image[ids == 0].mean(0)))
        np.testing.assert_allclose(colours, np.broadcast_to(colours[0], (len(colours), 3)), atol=12)
        assert min(contrasts) > 60


def test_the_photograph_moves(videos):
    for video in videos:
        first, last = pixels(video, 0), pixels(video, len(video) - 1)
        background = (video.masks(0) == 0) & (video.masks(len(video) - 1) == 0)
        assert np.abs(first - last)[background].mean() > 5


def test_a_second_writing_has_the_same_bytes(videos, tmp_path):
    home, again = videos[0].images.root, clips.write(tmp_path)
    assert again == tmp_path / clips.NAME
    files = sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) == 2 * clips.VIDEOS * clips.FRAMES + 2
    for file in files:
        if file.name != "manifest.json":  # whose order is that of the file system
            assert (home / file).read_bytes() == (again / file).read_bytes(), file


def test_the_name_is_suggested(private_cache):
    with pytest.raises(BadInput, match=r"'clip' is no annotated set \(did you mean clips\?\)"):
        annotations.open_pair("video", "clip")
