"""Synthetic images: made on the device, the same ones for a step whenever the loader starts, and told as having no files."""

from itertools import islice

import numpy as np
import pytest
import torch

from engine.core.errors import BadInput
from engine.data.pipeline import TrainLoader, each_once, eval_batches
from engine.data.sources import has_split, open_images
from engine.data.subsets import subset
from engine.data.views import minimal

VIEWS = (minimal((32, 48)), minimal((16, 16)))


def loader(start: int = 0, rank: int = 0, world: int = 1) -> TrainLoader:
    return TrainLoader(open_images("synthetic:50", "train"), VIEWS, 8, seed=3, start_step=start, rank=rank, world=world)


def test_a_loader_that_starts_later_gives_the_same_steps():
    whole = list(islice(loader(), 8))
    for ours, theirs in zip(islice(loader(5), 3), whole[5:], strict=True):
        assert ours.step == theirs.step
        assert torch.equal(ours.ids, theirs.ids)
        assert all(map(torch.equal, ours.images, theirs.images))
        assert torch.equal(ours.labels, ours.ids % 1000)
    assert [tuple(view.shape) for view in whole[0].images] == [(8, 3, 32, 48), (8, 3, 16, 16)]
    assert not torch.equal(whole[0].images[0], whole[1].images[0])
    assert 0.9 < whole[0].images[0].std() < 1.1


def test_ranks_share_the_ids_and_have_images_of_their_own():
    one, (a, b) = next(loader()), (next(loader(rank=rank, world=2)) for rank in range(2))
    assert torch.equal(one.ids, torch.cat([a.ids, b.ids]))
    assert not torch.equal(a.images[0], b.images[0])


def test_evaluation_and_storing_see_each_image_once():
    images = open_images("synthetic:10", "train")
    assert np.concatenate([batch.ids for batch in eval_batches(images, (16, 16), 4)]).tolist() == list(range(10))
    stored = list(each_once(images, VIEWS, 4, seed=0, turn=0))
    assert np.concatenate([batch.ids for batch in stored]).tolist() == [*range(10), 9, 9]
    part = subset(images, np.array([7, 2]))
    assert part.synthetic and part.labels.tolist() == [7, 2]
    assert [batch.images[0].shape for batch in eval_batches(part, (16, 16), 4)] == [(2, 3, 16, 16)]


def test_there_is_no_held_out_split_and_a_wrong_number_is_refused():
    assert has_split("synthetic", "train") and not has_split("synthetic:5", "val")
    assert len(open_images("synthetic", "train")) == 1_281_167
    for wrong in ("synthetic:0", "synthetic:many", "synthetic:"):
        with pytest.raises(BadInput, match="is no number of images"):
            open_images(wrong, "train")
    with pytest.raises(BadInput, match="no val split"):
        open_images("synthetic:5", "val")
