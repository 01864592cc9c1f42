"""What tests of segmenters share: pictures of two colours each, and a small ViT as it is drawn."""

import pytest
import torch

from engine.evals.features import encoder_of
from engine.evals.subject import Subject
from engine.model.vit import create
from tests.evals.painted import paint

HALVES = ((slice(0, 64), slice(0, 32)), (slice(0, 32), slice(32, 64)))
PICTURES = [[(k, HALVES[k % 2], False), ((k + 1) % 4, HALVES[1 - k % 2], False)] for k in range(4)]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A training set of four pictures, and a test set of two of them."""
    folder = tmp_path_factory.mktemp("painted")
    return paint(folder, "train", PICTURES), paint(folder, "val", PICTURES[:2])


@pytest.fixture(scope="module")
def untrained():
    """Three blocks, patches of 8 pixels."""
    model = create("vit_micro_patch8_32", depth=3, generator=torch.Generator().manual_seed(0))
    return Subject("random", encoder_of(model), threads=1)
