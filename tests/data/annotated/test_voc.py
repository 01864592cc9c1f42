import numpy as np
import pytest
from PIL import Image

from engine.core.errors import BadInput
from engine.data.annotated import voc
from engine.data.sets import scenes
from tests.data.corpus import picture

WIDTH, HEIGHT = 20, 14
ANNOTATION = """<annotation>
	<folder>VOC2007</folder>
	<filename>000005.jpg</filename>
	<source><database>The VOC2007 Database</database><image>flickr</image><flickrid>325991873</flickrid></source>
	<owner><flickrid>archintent louisville</flickrid><name>?</name></owner>
	<size><width>500</width><height>375</height><depth>3</depth></size>
	<segmented>0</segmented>
	<object>
		<name>chair</name>
		<pose>Rear</pose>
		<truncated>0</truncated>
		<difficult>0</difficult>
		<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>12</xmax><ymax>9</ymax></bndbox>
	</object>
	<object>
		<name>person</name>
		<difficult>1</difficult>
		<bndbox><ymin>1</ymin><xmin>1</xmin><ymax>14</ymax><xmax>20</xmax></bndbox>
		<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>
	</object>
	<object>
		<name>chair</name>
		<difficult>1</difficult>
		<bndbox><xmin>5.5</xmin><ymin>5</ymin><xmax>5.5</xmax><ymax>5</ymax></bndbox>
	</object>
</annotation>
"""
EMPTY = "<annotation><filename>000007.jpg</filename></annotation>"


@pytest.fixture
def devkit(tmp_path):
    """VOCdevkit/VOC2007 with two images, its lists for Main, and one image with masks; no list of a category."""
    root = tmp_path / "VOCdevkit/VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (root / name).mkdir(parents=True)
    (root / "SegmentationObject").mkdir()
    for name, annotation in (("000005", ANNOTATION), ("000007", EMPTY)):
        picture(WIDTH, HEIGHT).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(annotation)
    (root / "ImageSets/Main/val.txt").write_text("000007\n000005\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("000005\n")
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    classes[1:9, 2:12], classes[9, 2:12], classes[10:, 5:] = 9, 255, 15
    write_mask(root / "SegmentationClass/000005.png", classes)
    objects = np.where(classes == 9, 1, np.where(classes == 15, 2, classes))
    write_mask(root / "SegmentationObject/000005.png", objects)
    return root


def write_mask(path, indices):
    image = Image.fromarray(np.asarray(indices, np.uint8))
    image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 128)])
    image.save(path)


def write_list(root, name, text, split="val"):
    (root / f"ImageSets/Main/{name}_{split}.txt").write_text(text)


def test_boxes_counted_from_1_become_edges(devkit):
    read = voc.open_objects(devkit.parents[1], "val")
    assert read.images.paths == ["JPEGImages/000007.jpg", "JPEGImages/000005.jpg"]
    assert read.images.split == "val"
    assert read.categories == voc.CATEGORIES
    assert list(voc.CATEGORIES) == sorted(voc.CATEGORIES) and len(voc.CATEGORIES) == 20
    assert [len(objects) for objects in read.objects] == [0, 3]
    objects = read.objects[1]
    assert objects.boxes.tolist() == [[2, 1, 12, 9], [0, 0, 20, 14], [4.5, 4, 5.5, 5]]
    assert [read.categories[label] for label in objects.labels] == ["chair", "person", "chair"]
    assert objects.areas.tolist() == [80, 280, 1]
    assert objects.ignored.tolist() == [False, True, True]
    assert len(read.unused) == 18


def test_targets_follow_from_the_objects_where_a_category_has_no_list(devkit):
    read = voc.open_objects(devkit, "val")
    assert not read.targets[0].any()
    assert np.flatnonzero(read.targets[1]).tolist() == [8, 14]
    assert read.targets[1, [8, 14]].tolist() == [1, -1]
    assert read.targets.dtype == np.int8


def test_targets_are_those_of_the_lists(devkit):
    write_list(devkit, "chair", "000005  1\n000007 -1\n")
    write_list(devkit, "person", "000007  1\n000005  0\n000009 1\n")
    write_list(devkit, "train", "000007  0\n000005  -1\n")  # a category of VOC, and the name of a split
    read = voc.open_objects(devkit, "val")
    assert read.categories == ("chair", "person", "train")
    assert read.targets.tolist() == [[0, 1, -1], [1, -1, 0]]
    segmented = voc.open_objects(devkit, "val", part="Segmentation")
    assert segmented.images.paths == ["JPEGImages/000005.jpg"]
    assert segmented.targets.tolist() == [[1, -1, 0]]
    ordered = voc.open_objects(devkit, "val", categories=("person", "chair"))
    assert ordered.targets.tolist() == [[1, 0], [-1, 1]]
    write_list(devkit, "sofa", "", split="train")  # a category that the split has no list for
    read = voc.open_objects(devkit, "val")
    assert read.categories == ("chair", "person", "sofa", "train")
    assert read.targets.tolist() == [[0, 0, 0, 0], [1, -1, 0, 0]]


def test_a_set_may_have_its_own_categories_and_suffix(devkit):
    annotation = devkit / "Annotations/000005.xml"
    annotation.write_text(annotation.read_text().replace("<name>person<", "<name>stool<"))
    picture(WIDTH, HEIGHT).save(devkit / "JPEGImages/000005.png")
    (devkit / "JPEGImages/000005.jpg").unlink()
    write_mask(devkit / "SegmentationClass/000005.png", np.full((HEIGHT, WIDTH), 2))
    read = voc.open_objects(devkit)
    assert read.categories == ("chair", "stool") and read.objects[1].labels.tolist()[:2] == [0, 1]
    assert read.images.paths[1] == "JPEGImages/000005.png"
    masks = voc.open_masks(devkit)
    assert masks.categories == ("chair", "stool") and (masks.semantic(0) == 2).all()
    (devkit / "Annotations/000009.xml").write_text(ANNOTATION.replace("chair", "armchair"))  # of another split
    assert voc.open_objects(devkit).categories == ("armchair", "chair", "person", "stool")


def test_a_split_of_another_name_is_no_category(devkit):
    (devkit / "ImageSets/Main/val.txt").rename(devkit / "ImageSets/Main/small_val.txt")
    read = voc.open_objects(devkit, "small_val")
    assert read.images.split == "small_val"
    assert read.categories == voc.CATEGORIES


def test_masks_hold_the_indices_of_categories_and_objects(devkit):
    read = voc.open_objects(devkit, "val", part="Segmentation")
    masks, semantic = read.masks(0), read.semantic(0)
    assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == bool
    assert [mask.sum() for mask in masks] == [80, 60, 0]
    assert masks[0, 1:9, 2:12].all()
    assert semantic.dtype == np.uint8
    assert [semantic[1, 2], semantic[9, 2], semantic[10, 5], semantic[0, 0]] == [9, 255, 15, 0]
    (devkit / "Annotations/000005.xml").unlink()
    only_masks = voc.open_masks(devkit, "val")
    assert len(only_masks) == 1 and only_masks.categories == voc.CATEGORIES
    np.testing.assert_array_equal(only_masks.semantic(0), semantic)


def test_scenes_have_masks_for_all_images(private_cache):
    root = scenes.write() / "voc"
    read, objects = voc.open_masks(root, "trainval"), voc.open_objects(root, "trainval", part="Segmentation")
    assert len(read) == len(objects) == 500
    assert read.categories == tuple("0123456789")
    np.testing.assert_array_equal(objects.targets, voc.open_objects(root, "trainval").targets)
    for index in range(0, 500, 50):
        mask = read.semantic(index)
        with Image.open(root / "SegmentationClass" / f"{index + 1:06d}.png") as image:
            np.testing.assert_array_equal(mask, np.asarray(image))
            assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            assert image.getpalette()[-3:] == [224, 224, 192]
        assert set(np.unique(mask)) == {0, 255, *(objects.objects[index].labels + 1)}


def test_a_bad_image_is_left_out_with_its_objects(devkit):
    (devkit / "JPEGImages/000007.jpg").write_bytes(b"")
    for name in ("chair", "person"):
        write_list(devkit, name, "000007 1\n000005 0\n")
    with pytest.raises(BadInput, match="1 of 2 images are bad"):
        voc.open_objects(devkit, "val")
    read = voc.open_objects(devkit, "val", bad_limit=0.5)
    assert len(read) == len(read.images) == 1
    assert read.images.bad == (("JPEGImages/000007.jpg", "empty file"),)
    assert read.targets.tolist() == [[-1, -1]]


def replaced(old, new):
    assert old in ANNOTATION

    def spoil(root):
        (root / "Annotations/000005.xml").write_text(ANNOTATION.replace(old, new, 1))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda root: (root / "JPEGImages/000005.jpg").unlink(),
            r"Main/val\.txt lists .*000005\.jpg, which is missing",
        ),
        (lambda root: (root / "Annotations/000005.xml").unlink(), r"annotation .*000005\.xml cannot be read"),
        (lambda root: (root / "Annotations/000005.xml").write_text("<annotation>"), r"000005\.xml is no XML"),
        (lambda root: (root / "Annotations/000005.xml").write_text("<html/>"), r"000005\.xml is <html>, not an"),
        (lambda root: (root / "ImageSets/Main/val.txt").unlink(), "val.txt is missing: .* lists for none of train"),
        (lambda root: (root / "ImageSets/Main/val.txt").write_text(" \n"), "val.txt lists no images"),
        (lambda root: (root / "ImageSets/Main/val.txt").write_text("000005\n" * 2), r"000005\.jpg twice"),
        (lambda root: (root / "ImageSets/Main/val.txt").write_bytes(b"\xff\xfe"), "is no text file"),
        (lambda root: (root / "JPEGImages").rename(root / "images"), "is not laid out as VOC: it needs JPEGImages/"),
        (lambda root: (root.parent / "VOC2012/JPEGImages").mkdir(parents=True), "has several sets, .*VOC2012"),
        (
            lambda root: write_list(root, "chair", "000005 1\n000007 -1\n"),
            "object 2 of .* category 'person', .* of chair$",
        ),
        (
            replaced("<xmax>12<", "<xmax>22<"),
            r"object 1 of .*000005\.xml .* \(2, 1, 22, 9\) outside its image of 20x14",
        ),
        (replaced("<xmin>3<", "<xmin>-1<"), "object 1 of .* outside its image"),
        (replaced("<xmin>3<", "<xmin>14<"), "object 1 of .* right or lower side comes before"),
        (replaced("<xmin>3<", "<xmin>13<"), "object 1 of .* without width or height"),
        (replaced("<xmin>3<", "<xmin>nan<"), "object 1 of .* 'nan' as xmin"),
        (replaced("<xmin>3<", "<xmin>a<"), "object 1 of .* 'a' as xmin"),
        (replaced("<xmin>3</xmin>", ""), "object 1 of .* None as xmin"),
        (replaced("<difficult>0", "<difficult>2"), "object 1 of .* '2' as difficult"),
    ],
)
def test_a_wrong_entry_is_named(devkit, spoil, sentence):
    spoil(devkit)
    with pytest.raises(BadInput, match=sentence):
        voc.open_objects(devkit.parents[1], "val")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("000005 1\n", r"chair_val\.txt has no line for 000007, which its split lists"),
        ("000005 1\n000007 2\n", r"chair_val\.txt has '000007 2' in line 2"),
        ("000005 1\n000007\n", "in line 2"),
        ("000005 1\n000007 1\n000005 -1\n", "has 000005 twice, with different values, in line 3"),
    ],
)
def test_a_wrong_list_of_a_category_is_named(devkit, text, sentence):
    write_list(devkit, "person", "000005 0\n000007 -1\n")
    write_list(devkit, "chair", text)
    with pytest.raises(BadInput, match=sentence):
        voc.open_objects(devkit, "val")


@pytest.mark.parametrize(
    ("kind", "spoil", "sentence"),
    [
        ("Class", lambda path: path.unlink(), r"mask .*SegmentationClass/000005\.png is missing"),
        (
            "Class",
            lambda path: write_mask(path, np.zeros((WIDTH, HEIGHT))),
            "has 14x20 pixels, but its image has 20x14",
        ),
        ("Class", lambda path: picture(WIDTH, HEIGHT).save(path), "has pixels of type RGB"),
        ("Class", lambda path: path.write_bytes(b"no image"), "cannot be read"),
        ("Class", lambda path: write_mask(path, np.full((HEIGHT, WIDTH), 21)), "index 21, but there are 20 categories"),
        ("Class", lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        ("Object", lambda path: write_mask(path, np.full((HEIGHT, WIDTH), 4)), "index 4, but there are 3 objects"),
        ("Object", lambda path: path.unlink(), r"SegmentationObject/000005\.png is missing"),
    ],
)
def test_a_wrong_mask_is_named(devkit, kind, spoil, sentence):
    spoil(devkit / f"Segmentation{kind}/000005.png")
    with pytest.raises(BadInput, match=sentence):
        if kind == "Class":
            voc.open_masks(devkit, "val").semantic(0)
        else:
            voc.open_objects(devkit, "val", part="Segmentation").masks(0)


def test_an_unknown_part_is_named(devkit):
    with pytest.raises(BadInput, match="part 'Layout' is unknown: choose Main or Segmentation"):
        voc.open_objects(devkit, "val", part="Layout")
