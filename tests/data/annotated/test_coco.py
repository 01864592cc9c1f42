import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from engine.core.errors import BadInput
from engine.data.annotated import coco
from engine.data.sets import scenes
from tests.data.corpus import picture

WIDTH, HEIGHT = 12, 8
BLOB = np.zeros((HEIGHT, WIDTH), np.uint8)
BLOB[2:5, 3:9], BLOB[0, 0], BLOB[7, 11] = 1, 1, 1
INSTANCES = """
{"info": {"year": 2017}, "licenses": [],
 "images": [
  {"license": 4, "file_name": "000000000139.jpg", "height": 8, "width": 12, "id": 139, "date_captured": "2013-11-21"},
  {"license": 2, "file_name": "more/000000000285.jpg", "height": 8, "width": 12, "id": 285},
  {"license": 2, "file_name": "000000000042.jpg", "height": 8, "width": 12, "id": 42}],
 "annotations": [
  {"segmentation": [[1.5, 1.0, 8.25, 1.0, 8.25, 6.5, 1.5, 6.5]], "area": 37.125, "iscrowd": 0, "image_id": 139,
   "bbox": [1.5, 1.0, 6.75, 5.5], "category_id": 18, "id": 1768},
  {"segmentation": [[0, 0, 3, 0, 0, 3], [9, 4, 11.5, 4, 11.5, 7.5, 9, 7.5]], "area": 12.5, "iscrowd": 0, "image_id": 139,
   "bbox": [0, 0, 12.4, 7.5], "category_id": 1, "id": 1773},
  {"segmentation": {"counts": [0, 8, 40, 16, 32], "size": [8, 12]}, "area": 24, "iscrowd": 1, "image_id": 139,
   "bbox": [0, 0, 8, 8], "category_id": 1, "id": 900100000139},
  {"segmentation": [[2, 2, 2, 2, 2, 2]], "area": 0, "iscrowd": 0, "image_id": 139,
   "bbox": [2, 2, 0, 4], "category_id": 1, "id": 7},
  {"segmentation": {"counts": "COUNTS", "size": [8, 12]}, "area": 20, "iscrowd": 0, "image_id": 42,
   "bbox": [0, 0, 12, 8], "category_id": 90, "id": 8}],
 "categories": [
  {"supercategory": "indoor", "id": 90, "name": "toothbrush"},
  {"supercategory": "person", "id": 1, "name": "person"},
  {"supercategory": "animal", "id": 18, "name": "dog"},
  {"supercategory": "animal", "id": 19, "name": "horse"}]}
"""


def whole() -> dict:
    counts = coco_mask.encode(np.asfortranarray(BLOB))["counts"].decode()
    return json.loads(INSTANCES.replace("COUNTS", counts.replace("\\", "\\\\")))


def write(root, content):
    """The file of annotations and the folder of images."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017/more").mkdir(parents=True)
    for name in ("000000000139", "more/000000000285", "000000000042"):
        picture(WIDTH, HEIGHT).save(root / "val2017" / f"{name}.jpg")
    file = root / "annotations/instances_val2017.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return coco.find(root, "val")


def test_a_file_of_instances_is_read(tmp_path):
    write(tmp_path, whole())
    read = coco.open_objects(tmp_path, "val")
    assert read.images.split == "val"
    assert read.images.paths == ["000000000139.jpg", "more/000000000285.jpg", "000000000042.jpg"]
    assert read.images.sizes.tolist() == [[WIDTH, HEIGHT]] * 3
    assert read.images.labels is None
    assert read.image_ids == (139, 285, 42)
    assert (read.categories, read.category_ids) == (("person", "dog", "horse", "toothbrush"), (1, 18, 19, 90))
    assert read.unused == ("horse",)
    assert [len(objects) for objects in read.objects] == [3, 0, 1]
    first = read.objects[0]
    assert first.boxes.tolist() == [[1.5, 1, 8.25, 6.5], [0, 0, 12, 7.5], [0, 0, 8, 8]]  # 12.4 is clipped
    assert first.labels.tolist() == [1, 0, 0]
    assert first.areas.tolist() == [37.125, 12.5, 24]
    assert first.ignored.tolist() == [False, False, True]
    assert [array.dtype for array in vars(read.objects[1]).values()] == [np.float32, np.int64, np.float32, bool]
    assert read.annotation_ids == ((1768, 1773, 900100000139), (), (8,))
    assert read.targets.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert read.left_out == ((7, "its box has no width or no height"),)


def test_masks_are_those_of_pycocotools(tmp_path):
    file, images = write(tmp_path, whole())
    read, oracle = coco.read_objects(file, images, "val"), COCO(str(file))
    for index, ids in enumerate(read.annotation_ids):
        wanted = [oracle.annToMask(oracle.anns[number]) for number in ids]
        np.testing.assert_array_equal(read.masks(index), np.array(wanted, bool).reshape(-1, HEIGHT, WIDTH))
    np.testing.assert_array_equal(read.masks(2)[0], BLOB)
    assert read.masks(1).shape == (0, HEIGHT, WIDTH)


def test_semantic_masks_have_the_smallest_object_on_top_and_crowds_below(tmp_path):
    content = whole()
    for annotation, (x0, x1), area in zip(content["annotations"], ((0, 8), (2, 4), (0, 12)), (64, 16, 1)):
        annotation["segmentation"] = [[x0, 0, x1, 0, x1, 8, x0, 8]]
        annotation["area"] = area  # the crowd says that it is the smallest
    painted = coco.read_objects(*write(tmp_path, content), "val").semantic(0)
    assert painted.dtype == np.uint8
    assert painted.tolist() == [[2, 2, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1]] * HEIGHT


def test_scenes_have_the_masks_of_pycocotools(private_cache):
    file, images = coco.find(scenes.write() / "coco", "val")
    read, oracle = coco.read_objects(file, images, "val"), COCO(str(file))
    assert sorted(oracle.getCatIds()) == list(read.category_ids)
    for index in range(0, 100, 7):
        for place, mask in enumerate(read.masks(index)):
            annotation = oracle.anns[read.annotation_ids[index][place]]
            np.testing.assert_array_equal(mask, oracle.annToMask(annotation))
            x, y, width, height = annotation["bbox"]
            assert read.objects[index].boxes[place].tolist() == [x, y, x + width, y + height]
            compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
            np.testing.assert_array_equal(coco._of_runs(compressed, 128, 128, ""), mask)


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths_of_any_mask_are_unpacked(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 400, 2)
    coarse = rng.random((height // 40 + 1, width // 40 + 1)) < 0.5
    mask = np.kron(coarse, np.ones((40, 40), bool))[:height, :width] ^ (rng.random((height, width)) < 0.01)
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(coco._of_runs(counts, height, width, ""), mask)


def test_a_bad_image_is_left_out_with_its_objects(tmp_path):
    file, images = write(tmp_path, whole())
    (images / "000000000139.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match="1 of 3 images are bad"):
        coco.read_objects(file, images, "val")
    read = coco.read_objects(file, images, "val", bad_limit=0.5)
    assert read.image_ids == (285, 42)
    assert [path for path, _ in read.images.bad] == ["000000000139.jpg"]
    assert read.annotation_ids == ((), (8,))
    assert read.unused == ("person", "dog", "horse")


def change(key, place, **fields):
    def spoil(content):
        content[key][place].update(fields)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda content: content.pop("annotations"), "val2017.json has no list 'annotations'"),
        (lambda content: content["annotations"].append(3), "as entry 5 .* of 'annotations'"),
        (lambda content: content.update(images=[]), "lists no images"),
        (lambda content: content.update(categories=[]), "has no categories"),
        (change("images", 0, id=1.5), "image 0 .* has '1.5' as id"),
        (change("images", 1, id=139), "image 139 of .* is there twice"),
        (change("images", 1, file_name="000000000139.jpg"), "lists the image 000000000139.jpg twice"),
        (change("images", 1, file_name="absent.jpg"), "json lists absent.jpg, which is missing in .*val2017"),
        (change("images", 1, file_name="a\0b.jpg"), "which is no name of a file"),
        (change("images", 1, file_name=None), "image 285 of .* has 'None' as file_name"),
        (change("images", 1, width=8, height=12), r"image 285 .*more/000000000285.jpg.* 12x8 pixels, but .* 8x12"),
        (change("categories", 1, id=18), "category 18 of .* is there twice"),
        (change("categories", 1, name="dog"), "category 'dog' twice"),
        (change("annotations", 0, id=None), "annotation 0 .*from 0.* has 'None' as id"),
        (change("annotations", 0, id=1773), "annotation 1773 of .* is there twice"),
        (change("annotations", 0, image_id=5), "annotation 1768 of .* image_id 5, which"),
        (change("annotations", 0, category_id=5), "annotation 1768 of .* category_id 5, which"),
        (change("annotations", 0, bbox=[1, 2, 3]), r"annotation 1768 of .* bbox \[1, 2, 3\], where"),
        (change("annotations", 0, bbox=[1, 2, float("nan"), 3]), "annotation 1768 of .* bbox .*nan"),
        (change("annotations", 0, bbox=[1, 2, -1, 3]), r"annotation 1768 .* box \(1, 2, 0, 5\), whose right"),
        (change("annotations", 0, bbox=[1, 2, 13, 3]), r"annotation 1768 .* outside its image of 12x8"),
        (change("annotations", 0, bbox=[-2, 2, 3, 3]), r"annotation 1768 .* outside its image of 12x8"),
        (change("annotations", 0, iscrowd=2), "annotation 1768 of .* iscrowd 2"),
        (change("annotations", 0, area=-1), "annotation 1768 of .* area -1"),
        (change("annotations", 0, segmentation="a"), "annotation 1768 of .* neither a list of polygons"),
        (change("annotations", 0, segmentation=[["a", 1, 2, 3, 4, 5]]), "polygon that is no list of numbers"),
        (change("annotations", 0, segmentation=[[1, 1, 2, 3, 4]]), "polygon that is no list of x, y"),
        (change("annotations", 0, segmentation=[[1, 1, 2, 3, 1e9, 5]]), "far outside"),
        (change("annotations", 0, segmentation=[[1, 1, 2, 3, float("nan"), 5]]), "far outside"),
        (
            change("annotations", 2, segmentation={"size": [12, 8], "counts": [96]}),
            r"annotation 900100000139 of .* mask of size \[12, 8\], but its image is \[8, 12\]",
        ),
        (change("annotations", 2, segmentation={"size": [8, 12], "counts": [-1]}), "run lengths that are neither"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, spoil, sentence):
    content = whole()
    spoil(content)
    with pytest.raises(BadInput, match=sentence):
        coco.read_objects(*write(tmp_path, content), "val")


@pytest.mark.parametrize(
    ("segmentation", "sentence"),
    [
        ({"size": [8, 12], "counts": [95]}, "do not fill its image of 12x8"),
        ({"size": [8, 12], "counts": [95, 2]}, "do not fill"),
        ({"size": [8, 12], "counts": [10**30]}, "do not fill"),
        ({"size": [8, 12], "counts": []}, "do not fill"),
        ({"size": [8, 12], "counts": "1"}, "do not fill"),
        ({"size": [8, 12], "counts": "P"}, "cut off"),
        ({"size": [8, 12], "counts": "~~"}, "no compressed ones"),
        ({"size": [8, 12], "counts": "PPPPPPPPPPPPP1"}, "no compressed ones"),
    ],
)
def test_a_mask_that_cannot_be_made_is_named(tmp_path, segmentation, sentence):
    content = whole()
    content["annotations"][0]["segmentation"] = segmentation
    read = coco.read_objects(*write(tmp_path, content), "val")
    with pytest.raises(BadInput, match=sentence):
        read.masks(0)
    with pytest.raises(BadInput, match=sentence):
        read.semantic(0)


def test_a_set_without_masks_has_boxes(tmp_path):
    content = whole()
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    read = coco.read_objects(*write(tmp_path, content), "val")
    assert [len(objects) for objects in read.objects] == [3, 0, 1]
    with pytest.raises(BadInput, match=r"annotation 1768 of .* has no segmentation"):
        read.masks(0)


@pytest.mark.parametrize("segmentation", [None, [], [[1, 1, 4, 4]]])
def test_an_object_without_a_mask_is_left_out_where_others_have_one(tmp_path, segmentation):
    content = whole()
    content["annotations"][0]["segmentation"] = segmentation
    read = coco.read_objects(*write(tmp_path, content), "val")
    assert read.left_out[0] == (1768, "it has no mask, as others have")
    assert read.annotation_ids[0] == (1773, 900100000139)
    read.check_masks()


def test_files_of_other_tools_are_read(tmp_path):
    """Crowds and areas that are null, ids that are floats or texts, a root category, absolute names of another machine."""
    content = whole()
    content["categories"].insert(0, {"id": 0, "name": "dog", "supercategory": "none"})
    for annotation in content["annotations"]:
        annotation |= {"image_id": f"img-{annotation['image_id']}", "category_id": float(annotation["category_id"])}
    content["annotations"][0] |= {"iscrowd": None, "area": None}
    for number, (image, folder) in enumerate(
        zip(content["images"], ("/home/me/data/", "C:\\data\\", "/"), strict=True)
    ):
        image["id"] = f"img-{image['id']}"
        image["file_name"] = folder + image["file_name"].replace("/", "\\" if number == 1 else "/")
    read = coco.read_objects(*write(tmp_path, content), "val")
    plain = coco.read_objects(*write(tmp_path / "plain", whole()), "val")
    assert read.image_ids == ("img-139", "img-285", "img-42") and list(read.images.paths) == list(plain.images.paths)
    assert read.categories == plain.categories and read.category_ids == plain.category_ids
    np.testing.assert_array_equal(read.targets, plain.targets)
    assert read.objects[0].areas.tolist() == [6.75 * 5.5, *plain.objects[0].areas.tolist()[1:]]


def test_a_wrong_layout_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"needs annotations/instances_val\.json and images/val/ or val/"):
        coco.find(tmp_path, "val")
    file, images = write(tmp_path, whole())
    with pytest.raises(BadInput, match="nothing is no folder"):
        coco.read_objects(file, tmp_path / "nothing", "val")
    with pytest.raises(BadInput, match=r"annotations .*other\.json is missing"):
        coco.read_objects(tmp_path / "other.json", images, "val")
    for content in ("", "{", "[" * 100_000, "\xff"):
        file.write_bytes(content.encode("latin1"))
        with pytest.raises(BadInput, match="no JSON that can be read"):
            coco.read_objects(file, images, "val")


def test_more_categories_than_a_byte_has_room_for(tmp_path):
    content = whole()
    content["categories"] += [{"id": 1000 + number, "name": f"more {number}"} for number in range(251)]
    read = coco.read_objects(*write(tmp_path, content), "val")
    assert read.targets.shape == (3, 255)
    with pytest.raises(BadInput, match="255 categories; semantic masks have room for 254"):
        read.semantic(0)
