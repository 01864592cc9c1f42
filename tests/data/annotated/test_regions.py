"""Classes of pixels as objects, on a set kept in memory and on the embedded one in VOC's layout."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.data.annotated import opening as annotations
from engine.data.annotated import regions
from engine.data.annotated.objects import VOID
from engine.data.sets import scenes


def held(semantic: np.ndarray, classes: tuple[str, ...]) -> SimpleNamespace:
    """A SemanticSet of arrays [N, H, W]."""

    class Held(SimpleNamespace):
        def __len__(self):
            return len(semantic)

    return Held(images=semantic, semantic_classes=classes, semantic=lambda index: semantic[index].astype(np.uint8))


@pytest.mark.parametrize("background", [False, True])
def test_each_class_that_is_there_is_one_object(background):
    semantic = np.random.default_rng(0).choice([0, 1, 3, VOID], size=(3, 6, 9), p=[0.5, 0.2, 0.1, 0.2])
    semantic[1], semantic[2] = 0, VOID
    found = regions.of_classes(held(semantic, ("background" if background else "wall", "a", "b", "c")), threads=1)
    shift = 0 if background else 1
    assert found.categories == (("a", "b", "c") if background else ("wall", "a", "b", "c"))
    for index in range(3):
        values = sorted({int(value) for value in semantic[index].ravel()} - {VOID} - ({0} if background else set()))
        objects, masks = found.objects[index], found.masks(index)
        assert objects.labels.tolist() == [value + shift - 1 for value in values]
        assert masks.shape == (len(values), 6, 9)
        assert np.flatnonzero(found.targets[index]).tolist() == objects.labels.tolist()
        for place, value in enumerate(values):
            np.testing.assert_array_equal(masks[place], semantic[index] == value)
            ys, xs = np.nonzero(masks[place])
            assert objects.boxes[place].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert objects.areas[place] == len(xs)
        np.testing.assert_array_equal(found.semantic(index) == VOID, semantic[index] == VOID)
    assert not any(objects.ignored.any() for objects in found.objects)


def test_the_embedded_set_by_classes():
    folder = scenes.write() / "voc"
    train, test = annotations.open_pair("masks", f"voc-regions:{folder}")
    _, semantic = annotations.open_pair("semantic", f"voc:{folder}")
    assert train.categories == test.categories == semantic.categories
    assert len(test) == len(semantic)
    for index in (0, 7):
        np.testing.assert_array_equal(test.semantic(index), semantic.semantic(index))
        covered = test.masks(index).any(0)
        np.testing.assert_array_equal(covered, (semantic.semantic(index) > 0) & (semantic.semantic(index) < VOID))
