"""Prompts and similarity on small sets in the layouts of ADE20K, COCO-Stuff and DAVIS-2017, from their names on."""

import numpy as np
import pytest

from engine import evals
from engine.data.annotated import clips
from engine.data.annotated import opening as annotations
from engine.evals.protocols import prompt, similarity
from engine.model.vit import create
from tests.data.published import write_ade20k, write_coco_stuff, write_davis
from tests.evals.painted import COLOURS, Eye

LEFT, MIDDLE, RIGHT, VOID = slice(0, 16), slice(16, 32), slice(32, 64), slice(62, 64)


def stripes(left: int, middle: int, right: int, void: int) -> np.ndarray:
    values = np.zeros((64, 64), np.uint8)
    for place, value in ((LEFT, left), (MIDDLE, middle), (RIGHT, right), (VOID, void)):
        values[:, place] = value
    return values


def painted(*values: int) -> np.ndarray:
    """Colours of `Eye` for these values of masks."""
    colours = np.zeros((256, 3), np.uint8)
    colours[list(values)] = COLOURS[: len(values)]
    return colours


def ade20k(folder):
    masks = [stripes(1, 4, 150, 0), stripes(4, 150, 1, 0)]
    return f"ade20k:{write_ade20k(folder, masks, masks, painted(0, 1, 4, 150))}"


def coco_stuff(folder):
    maps = [stripes(0, 91, 181, 255), stripes(91, 181, 0, 255)]
    return f"coco-stuff:{write_coco_stuff(folder, maps, maps, colours=painted(255, 0, 91, 181))}"


def davis_frames(folder):
    videos = {"one": [stripes(1, 2, 3, 255)] * 2, "other": [stripes(3, 1, 2, 255)] * 2}
    splits = dict.fromkeys(("train", "val"), videos)
    return f"davis-frames:{write_davis(folder, videos, splits, painted(255, 1, 2, 3))}"


@pytest.fixture(params=[ade20k, coco_stuff, davis_frames])
def sets(request, tmp_path):
    return annotations.open_pair("masks", request.param(tmp_path))


def test_prompts_find_each_flat_region(sets):
    result = prompt.evaluate(Eye(), *sets, prompt.Settings(layers=("norm",), random_prompts=1))
    assert (result.counts["test images"], result.counts["objects"], result.counts["ignored objects"]) == (2, 6, 0)
    np.testing.assert_array_equal(result.samples["IoU, one threshold: norm, interior point"], 1)
    assert result.values["AUROC: norm, random pixels"] == 1
    mean = "IoU, one threshold: norm, interior point, over classes"
    assert result.values[mean] == result.values[prompt.GRID] == 1


def test_patches_of_flat_regions_are_alike(sets):
    result = similarity.evaluate(Eye(), *sets, similarity.Settings(layers=("norm",), inputs=("crop:64",)))
    assert result.counts["objects with two or more"] == 6
    # of the last stripe, the patches that are partly void are no one's
    assert result.counts["patches of objects"] == 2 * 8 * (2 + 2 + 3)
    # where all objects are of one category, there are no pairs of two
    comparisons = {name.partition(" ")[0] for name in result.values}
    assert comparisons - {"background"} == ({"objects", "classes"} if len(sets[1].categories) > 1 else {"objects"})
    for comparison in comparisons:
        assert result.values[f"{comparison} overlap: norm"] == 0
        assert result.values[f"{comparison} AUROC: norm"] == 1


def test_first_frames_of_the_clips(tmp_path):
    root = clips.write()
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind).symlink_to(root / kind)
    names = (root / "ImageSets/2017/val.txt").read_text().split()
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    for split, some in (("train", names[:2]), ("val", names[2:5])):
        (tmp_path / f"ImageSets/2017/{split}.txt").write_text("\n".join(some))
    sets, model = evals.Sets(objects=f"davis-frames:{tmp_path}"), create("vit_micro_patch8_32", depth=1)
    settings = {
        "prompt": prompt.Settings(layers=("norm",), random_prompts=0),
        "similarity": similarity.Settings(inputs=("crop:128",)),
    }
    prompted, compared = evals.evaluate({"small": model}, sets, ("prompt", "similarity"), settings=settings, threads=1)
    train, test = sets.pair("masks")
    assert [len(train), len(test)] == [2, 3]
    assert prompted.counts["objects"] == sum(map(len, test.objects))
    assert compared.counts["test images"] == 3
    assert compared.counts["objects with a patch of their own"] == sum(map(len, test.objects))
    assert len(compared.pictures["similarities within and between"].axes) == 2 * 2
