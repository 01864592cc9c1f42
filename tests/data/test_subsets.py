"""Parts of a set: a substitute stands for a bad file, few images of a class are low-shot's first split."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.core.errors import BadInput
from engine.data.sources import ImageSet, open_images
from engine.data.subsets import few_per_class, subset
from engine.evals.protocols import lowshot


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images(None, "train")


def test_a_subset_reads_the_substitute_of_a_bad_file(images: ImageSet):
    substitute = images.substitute.copy()
    substitute[5] = 900
    chosen = subset(replace(images, substitute=substitute), torch.tensor([4, 5]))
    assert chosen.paths == [images.paths[4], images.paths[900]]
    assert chosen.labels.tolist() == images.labels[[4, 900]].tolist()
    assert chosen.good.all()


@pytest.mark.parametrize("seed", [0, 3])
def test_few_per_class_is_the_first_split_of_low_shot_evaluation(images: ImageSet, seed: int):
    chosen = few_per_class(images, 5, seed)
    assert np.bincount(chosen.labels).tolist() == [5] * 10
    rows = lowshot.subsets(images, lowshot.Settings(shots=(5,), percents=(), seed=seed))["5-shot"][0]
    assert chosen.paths == [images.paths[row] for row in rows]
    assert chosen.classes == images.classes


def test_few_per_class_refuses_what_is_not_there(images: ImageSet):
    with pytest.raises(BadInput, match=r"class \d has \d+ training images, not 500"):
        few_per_class(images, 500, 0)
    with pytest.raises(BadInput, match="has no classes"):
        few_per_class(replace(images, labels=None), 5, 0)
