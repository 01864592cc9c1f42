import numpy as np
import pytest
from PIL import Image

from engine.core.errors import BadInput
from engine.data.annotated import davis
from engine.data.annotated import opening as annotations
from tests.data.corpus import picture
from tests.data.published import write_davis

WIDTH, HEIGHT = 20, 14


def write_mask(path, ids):
    image = Image.fromarray(np.asarray(ids, np.uint8))
    image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 128)])
    image.save(path)


def ids_of(video, frame):
    """Object 1 goes right; of swan there is a second one, and a third that appears in frame 2."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[2:6, frame : frame + 4] = 1
    if video == "swan":
        ids[8:12, 3:9], ids[12, 3:9] = 2, 255
        ids[0, 15:] = 3 * (frame >= 2)
    return ids


@pytest.fixture
def root(tmp_path):
    """DAVIS/ with swan of four frames and bear of three, listed in that order."""
    videos = {name: [ids_of(name, frame) for frame in range(count)] for name, count in (("swan", 4), ("bear", 3))}
    return write_davis(tmp_path / "DAVIS", videos, {"val": ["swan", "bear"], "train": ["bear"]})


@pytest.mark.parametrize("above", [False, True])
def test_videos_come_in_the_order_of_the_list_and_frames_in_that_of_their_names(root, above):
    (root / "JPEGImages/480p/swan/._00000.jpg").write_bytes(b"left by a file manager")
    read = davis.open_videos(root.parent if above else root, "val")
    assert [video.name for video in read.videos] == ["swan", "bear"] and len(read) == 2
    assert [len(video) for video in read.videos] == [4, 3] and len(read.images) == 7
    assert read.videos[0].images.paths == [f"JPEGImages/480p/swan/{frame:05d}.jpg" for frame in range(4)]
    assert read.images.paths[4] == "JPEGImages/480p/bear/00000.jpg"
    assert read.videos[1].images.sizes.tolist() == [[WIDTH, HEIGHT]] * 3
    assert [video.name for video in davis.open_videos(root, "train").videos] == ["bear"]


def test_masks_hold_ids_and_the_first_one_says_how_many_objects_are_judged(root):
    swan, bear = davis.open_videos(root).videos
    for video in (swan, bear):
        for frame in range(len(video)):
            ids = video.masks(frame)
            assert ids.dtype == np.uint8
            np.testing.assert_array_equal(ids, ids_of(video.name, frame))
    assert (swan.objects, bear.objects) == (2, 1)


def test_a_frame_that_cannot_be_read_is_left_out_with_its_mask(root):
    (root / "JPEGImages/480p/swan/00001.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"1 of 7 images are bad.*swan/00001\.jpg"):
        davis.open_videos(root)
    read = davis.open_videos(root, bad_limit=0.5)
    assert len(read.videos[0]) == 3 and [path for path, _ in read.images.bad] == ["JPEGImages/480p/swan/00001.jpg"]
    np.testing.assert_array_equal(read.videos[0].masks(1), ids_of("swan", 2))
    for frame in (0, 1, 2):
        (root / f"JPEGImages/480p/bear/{frame:05d}.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"no frame of bear in .* can be read"):
        davis.open_videos(root, bad_limit=0.9)


def _no_mask(root):
    (root / "Annotations/480p/swan/00002.png").unlink()


def _no_frame(root):
    (root / "JPEGImages/480p/swan/00003.jpg").unlink()


def _no_video(root):
    (root / "ImageSets/2017/val.txt").write_text("swan\ngoat\n")


def _listed_twice(root):
    (root / "ImageSets/2017/val.txt").write_text("swan\nbear\nswan\n")


def _empty_list(root):
    (root / "ImageSets/2017/val.txt").write_text("\n")


def _no_list(root):
    (root / "ImageSets/2017/val.txt").unlink()


def _other_mask(root):
    write_mask(root / "Annotations/480p/bear/00001.png", np.ones((7, 10)))


def _other_frame(root):
    picture(30, 20).save(root / "JPEGImages/480p/bear/00001.jpg")


def _colours(root):
    picture(WIDTH, HEIGHT).save(root / "Annotations/480p/bear/00001.png")


def _damaged(root):
    (root / "Annotations/480p/bear/00000.png").write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("void", [0, 255])
def test_a_first_frame_without_objects_is_refused(root, void):
    write_mask(root / "Annotations/480p/bear/00000.png", np.full((HEIGHT, WIDTH), void))
    with pytest.raises(BadInput, match=r"Annotations/480p/bear/00000\.png has no object; .* numbered from 1"):
        davis.open_videos(root)


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (_no_mask, r"Annotations/480p/swan/00002\.png is missing: every frame of swan needs a mask"),
        (_no_frame, r"JPEGImages/480p/swan/00003\.jpg is missing: .* every mask its frame"),
        (_no_video, r"val\.txt lists goat, but .*JPEGImages/480p/goat has no frames \(\*\.jpg\)"),
        (_listed_twice, r"val\.txt lists swan twice"),
        (_empty_list, r"val\.txt lists no images"),
        (_no_list, r"val\.txt is missing: .*ImageSets/2017 has lists for train"),
        (_other_mask, r"bear/00001\.png has 10x7 pixels, but its image has 20x14"),
        (_other_frame, "bear in .* has frames of 20x14 and of 30x20 pixels; a video has one size"),
        (_colours, r"bear/00001\.png has pixels of type RGB, where indices belong"),
        (_damaged, r"the mask .*bear/00000\.png cannot be read"),
    ],
)
def test_what_is_wrong_is_named(root, harm, sentence):
    harm(root)
    with pytest.raises(BadInput, match=sentence):
        davis.open_videos(root)


def test_another_layout_is_refused(root, tmp_path):
    (root / "Annotations/480p").rename(root / "Annotations/Full-Resolution")
    with pytest.raises(BadInput, match="is not laid out as DAVIS-2017: it needs JPEGImages/480p/, Annotations/480p/"):
        davis.open_videos(root)


def test_it_is_opened_by_name_and_has_no_training_set(root):
    train, test = annotations.open_pair("video", f"davis:{root}")
    assert train is None and [video.name for video in test.videos] == ["swan", "bear"]
    with pytest.raises(BadInput, match="has no semantic; give scenes, coco:DIR, voc:DIR"):
        annotations.open_pair("semantic", f"davis:{root}")
    with pytest.raises(BadInput, match="scenes has no video; give clips, davis:DIR"):
        annotations.open_pair("video", "scenes")


def test_first_frames_are_images_with_objects_of_one_category(root):
    train, test = annotations.open_pair("masks", f"davis-frames:{root}")
    assert test.images.paths == [f"JPEGImages/480p/{name}/00000.jpg" for name in ("swan", "bear")]
    assert (train.images.split, train.images.paths) == ("train", ["JPEGImages/480p/bear/00000.jpg"])
    assert test.categories == ("object",) and test.targets.tolist() == [[1], [1]]
    for index, (video, count) in enumerate((("swan", 2), ("bear", 1))):
        ids, objects, masks = ids_of(video, 0), test.objects[index], test.masks(index)
        assert objects.labels.tolist() == [0] * count and not objects.ignored.any()
        assert objects.areas.tolist() == [(ids == number).sum() for number in range(1, count + 1)]
        np.testing.assert_array_equal(masks, [ids == number for number in range(1, count + 1)])
        np.testing.assert_array_equal(test.semantic(index), np.where(ids == 255, 255, ids > 0))
    assert test.objects[0].boxes.tolist() == [[0, 2, 4, 6], [3, 8, 9, 12]]


def test_ids_that_the_first_frame_skips_are_no_objects_of_it(root):
    ids = ids_of("swan", 0)
    ids[ids == 1] = 7
    write_mask(root / "Annotations/480p/swan/00000.png", ids)
    frames = davis.open_frames(root)
    assert len(frames.objects[0]) == 2
    np.testing.assert_array_equal(frames.masks(0), [ids == 2, ids == 7])


def test_first_frames_stand_alone(root):
    _other_frame(root)
    _other_mask(root)
    assert len(davis.open_frames(root)) == 2
    (root / "JPEGImages/480p/swan/00000.jpg").write_bytes(b"no image")
    kept = davis.open_frames(root, bad_limit=0.5)
    assert kept.images.paths == ["JPEGImages/480p/bear/00000.jpg"] and len(kept.images.bad) == 1
    np.testing.assert_array_equal(kept.masks(0)[0], ids_of("bear", 0) == 1)


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (
            lambda root: write_mask(root / "Annotations/480p/bear/00000.png", np.full((HEIGHT, WIDTH), 255)),
            r"Annotations/480p/bear/00000\.png has no object; .* numbered from 1",
        ),
        (
            lambda root: write_mask(root / "Annotations/480p/bear/00000.png", np.ones((7, 10))),
            r"bear/00000\.png has 10x7 pixels, but its image has 20x14",
        ),
        (lambda root: (root / "ImageSets/2017/train.txt").unlink(), r"train\.txt is missing: .* has lists for val$"),
        (_damaged, r"the mask .*bear/00000\.png cannot be read"),
        (_listed_twice, r"val\.txt lists swan twice"),
        (_empty_list, r"val\.txt lists no images"),
        (_no_mask, r"Annotations/480p/swan/00002\.png is missing: every frame of swan needs a mask"),
    ],
)
def test_what_is_wrong_with_first_frames_is_named(root, harm, sentence):
    harm(root)
    with pytest.raises(BadInput, match=sentence):
        annotations.open_pair("masks", f"davis-frames:{root}")
