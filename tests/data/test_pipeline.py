"""The loaders' promises: which images every step shows, the same after a resume, for any ranks and threads, around bad files."""

import itertools

import numpy as np
import pytest
import torch

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.batch import Batch
from engine.data.pipeline import each_once, eval_batches
from engine.data.views import byol_views, minimal
from tests.data.corpus import with_bad_file, write_hostile, write_photos
from tests.data.loading import SIZE, assert_same, loader, take


def test_batches_have_the_promised_form(digits_train):
    (batch,) = take(loader(digits_train), 1)
    assert batch.step == 0
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert [view.shape for view in batch.images] == [(64, 3, 32, 32)] * 2
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in batch.images)
    assert batch.labels.tolist() == digits_train.labels[batch.ids.numpy()].tolist()


def test_every_epoch_shows_every_image_once_in_a_new_order(digits_train):
    batches = loader(digits_train, [minimal(SIZE)], batch_size=479)
    assert batches.steps_per_epoch == 3
    epochs = [torch.cat([batch.ids for batch in take(batches, 3)]) for _ in range(2)]
    assert all(torch.equal(ids.sort().values, torch.arange(1437)) for ids in epochs)
    assert not torch.equal(*epochs)


def test_the_last_incomplete_batch_is_left_out(digits_train):
    batches = loader(digits_train, [minimal(SIZE)], batch_size=1000)
    assert batches.steps_per_epoch == 1
    assert [len(batch.ids) for batch in take(batches, 2)] == [1000, 1000]


def test_a_seed_fixes_everything_and_another_seed_changes_it(photos):
    first, again, other = (take(loader(photos, batch_size=8, seed=seed), 2) for seed in (0, 0, 1))
    assert_same(first, again)
    assert not torch.equal(first[0].ids, other[0].ids)


def test_the_views_of_an_image_differ_and_so_do_its_epochs(photos):
    views = [minimal(SIZE), minimal(SIZE)]
    shown = []
    for batch in take(loader(photos, views, batch_size=40), 2):
        shown += [view[batch.ids.argsort()] for view in batch.images]
    for one, other in itertools.combinations(shown, 2):
        assert (one - other).abs().flatten(1).mean(1).min() > 0.01
    flips = [
        loader(photos, views, batch_size=40)._plan(step)[1][f"{view}.mirror"] for step in range(2) for view in range(2)
    ]
    assert all((one != other).any() for one, other in itertools.combinations(flips, 2))  # row by row, too


@pytest.mark.parametrize("start", [3, 5, 7])
def test_a_resumed_loader_continues_exactly(photos, start):
    """Five steps an epoch: from within the first, at its end, and within the second."""
    whole = take(loader(photos, batch_size=8), 9)
    assert_same(whole[start:], take(loader(photos, batch_size=8, start_step=start), 9 - start))
    displaced = next(loader(photos, batch_size=8, start_step=start + 1))
    assert not torch.equal(displaced.ids, whole[start].ids)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_process_sees(photos, world):
    whole = take(loader(photos, batch_size=8), 7)
    parts = [take(loader(photos, batch_size=8, rank=rank, world=world), 7) for rank in range(world)]
    joined = [
        Batch(
            ids=torch.cat([batch.ids for batch in step]),
            images=tuple(torch.cat(views) for views in zip(*(batch.images for batch in step), strict=True)),
            labels=torch.cat([batch.labels for batch in step]),
            step=step[0].step,
        )
        for step in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)


def test_threads_do_not_matter(photos):
    assert_same(take(loader(photos, batch_size=8), 6), take(loader(photos, batch_size=8, threads=4), 6))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 41}, "choose 1 to 40"),
        ({"batch_size": 0}, "choose 1 to 40"),
        ({"batch_size": 10, "world": 4}, "choose a multiple of 4"),
        ({"batch_size": 8, "seed": -1}, "choose 0 or above"),
    ],
)
def test_impossible_wishes_are_named(photos, options, sentence):
    with pytest.raises(BadInput, match=sentence):
        loader(photos, **options)


def test_without_views_a_loader_tells_the_ids_that_one_with_views_tells(photos):
    bare, whole = take(loader(photos, views=(), batch_size=8), 7), take(loader(photos, batch_size=8), 7)
    for one, other in zip(bare, whole, strict=True):
        assert one.images == () and one.step == other.step
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
    resumed = take(loader(photos, views=(), batch_size=8, start_step=5), 2)
    assert [batch.ids.tolist() for batch in resumed] == [batch.ids.tolist() for batch in bare[5:]]


def test_each_once_goes_through_every_id_and_fills_the_last_batch_up(photos):
    def ids_and_crops(turn, **options):
        batches = list(each_once(photos, byol_views(SIZE), 12, seed=3, turn=turn, threads=1, **options))
        return torch.cat([batch.ids for batch in batches]), torch.cat(
            [torch.stack(batch.images, 1) for batch in batches]
        )

    ids, crops = ids_and_crops(0)
    assert ids.tolist() == [*range(40), *[39] * 8] and crops.shape == (48, 2, 3, 32, 32)
    shares = [ids_and_crops(0, rank=rank, world=2) for rank in range(2)]
    assert shares[0][0].tolist() == [*range(24)] and shares[1][0].tolist() == [*range(24, 40), *[39] * 8]
    assert torch.equal(torch.cat([crops_ for _, crops_ in shares]), crops)
    assert not torch.equal(ids_and_crops(1)[1], crops)


def test_evaluation_gives_every_image_once_in_order(photos):
    batches = list(eval_batches(photos, (96, 96), 16, threads=2))
    assert [len(batch.ids) for batch in batches] == [16, 16, 8]
    assert [batch.step for batch in batches] == [0, 1, 2]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(40))
    assert torch.cat([batch.labels for batch in batches]).tolist() == photos.labels.tolist()


def test_evaluation_leaves_bad_files_out(tmp_path):
    write_photos(tmp_path, 10)
    write_hostile(tmp_path)
    images = sources.open_images(tmp_path, "train", bad_limit=1)
    ids = torch.cat([batch.ids for batch in eval_batches(images, SIZE, 4, threads=1)])
    assert ids.tolist() == np.flatnonzero(images.good).tolist()
    assert len(ids) == 10


def test_bad_files_change_nothing_but_their_own_place(tmp_path):
    whole = sources.open_images(with_bad_file(tmp_path / "whole", []), "train")
    holes = with_bad_file(tmp_path / "holed", ["a/photo003.jpg", "b/photo009.jpg"])
    holed = sources.open_images(holes, "train", bad_limit=0.1)
    assert holed.bad[0][0] == "train/a/photo003.jpg"
    for good, mended in zip(take(loader(whole, batch_size=5), 8), take(loader(holed, batch_size=5), 8), strict=True):
        assert mended.ids.tolist() == [{3: 4, 19: 0}.get(id, id) for id in good.ids.tolist()]
        assert mended.labels.tolist() == holed.labels[mended.ids.numpy()].tolist()
        kept = good.ids == mended.ids
        assert all(torch.equal(a[kept], b[kept]) for a, b in zip(good.images, mended.images, strict=True))
