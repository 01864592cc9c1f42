"""Extraction of features: the real loader, the cache, unreadable images."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from engine.core.errors import BadInput
from engine.data.shards.packing import How, Packing
from engine.data.sources import open_images
from engine.evals import extraction, features
from engine.evals.extraction import extract
from engine.evals.features import Encoder, Features, encoder_of, raw_pixels
from engine.evals.subject import Subject
from engine.model import vit
from tests.ranks import torchrun

ROOT = Path(__file__).parents[2]


class Counting:
    """Raw pixels that count how many images they have encoded."""

    def __init__(self, fingerprint: str | None):
        self.images = 0
        self.encoder = Encoder(self.encode, (32, 32), "pixels", fingerprint)

    def encode(self, images_B3HW):
        self.images += len(images_B3HW)
        return images_B3HW.flatten(1)


def test_rows_are_the_images_in_order(folder):
    images = open_images(folder, "train")
    found = extract(raw_pixels(), images, name="raw", batch_size=7)
    assert found.values.shape == (24, 3072) and found.values.dtype == torch.float32
    assert found.labels.tolist() == [0] * 12 + [1] * 12 and found.classes == ("dark", "light")
    assert found.paths == tuple(images.paths) and found.pooling == "32x32 pixels"
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for row in (0, 9, 23):
        pixels = (np.asarray(Image.open(folder / images.paths[row])) / 255 - mean) / std
        np.testing.assert_allclose(found.values[row].unflatten(0, (3, 32, 32)).permute(1, 2, 0), pixels, atol=1e-4)


def test_the_cache_answers_only_for_the_same_weights_images_and_settings(folder, tmp_path):
    cache = tmp_path / "features"
    first = Counting("a")
    values = extract(first.encoder, open_images(folder, "train"), name="x", cache=cache).values
    again = Counting("a")
    assert torch.equal(extract(again.encoder, open_images(folder, "train"), name="y", cache=cache).values, values)
    assert (first.images, again.images) == (24, 0)
    for changed in ({"fingerprint": "b"}, {"batch_size": 5}, {"split": "val"}, {"fingerprint": None}):
        other = Counting(changed.get("fingerprint", "a"))
        images = open_images(folder, changed.get("split", "train"))
        extract(other.encoder, images, name="x", cache=cache, batch_size=changed.get("batch_size", 256))
        assert other.images == 24
    Image.new("RGB", (32, 32)).save(folder / "train" / "dark" / "00.png")
    other = Counting("a")
    assert not torch.equal(extract(other.encoder, open_images(folder, "train"), name="x", cache=cache).values, values)
    assert not list(cache.rglob(".*")) and len(list(cache.rglob("*.npy"))) == 5


def test_images_resized_in_another_way_have_features_of_their_own(folder, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        tall = rng.integers(0, 256, (120, 90 + i, 3), dtype=np.uint8)
        Image.fromarray(tall).save(folder / "val" / "dark" / f"{i:02}.png")
    images, how = open_images(folder, "val"), {"threads": 1, "cache": tmp_path / "features"}
    found = {
        (resize, squeeze): Subject("raw", raw_pixels((80, 80)), resize=resize, squeeze=squeeze, **how).features(images)
        for resize in ("bicubic", "bilinear")
        for squeeze in (False, True)
    }
    for (resize, squeeze), extracted in found.items():
        (batch,) = extraction.eval_batches(images, (80, 80), 24, threads=1, resize=resize, squeeze=squeeze)
        torch.testing.assert_close(extracted.values, batch.images[0].flatten(1))
    assert len({extracted.values.sum().item() for extracted in found.values()}) == 4


def test_images_of_their_own_aspect_are_encoded_whole_and_as_they_would_be_alone(folder, tmp_path):
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(90, 30), (40, 40), (30, 90), (90, 31)] * 3):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "val" / "dark" / f"{i:02}.png")
    images = open_images(folder, "val")
    model = vit.create("vit_micro_patch8_32", depth=2)
    how = {"threads": 1, "batch_size": 8, "cache": tmp_path / "features"}
    whole, cut = (
        Subject("vit", encoder_of(model), aspect=aspect, **how).features(images) for aspect in ("keep", "crop")
    )
    assert not torch.allclose(whole.values[0], cut.values[0])  # nor are they found in the cache
    (batch,) = extraction.eval_batches(images, (32, 32), 24, threads=1, patch=8)
    assert len(batch.sizes.unique(dim=0)) > 2
    for row, (height, width) in enumerate(batch.sizes[:, 0].tolist()):
        image = batch.images[0][row].flatten()[: 3 * height * width].view(1, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(whole.values[row], model.pool(model(image))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", ["values", "note", "missing"])
def test_a_damaged_store_is_named(folder, tmp_path, damage):
    cache = tmp_path / "features"
    extract(raw_pixels(), open_images(folder, "train"), name="x", cache=cache)
    (path,) = cache.rglob("features.npy")
    if damage == "missing":
        path.unlink()
    else:
        (path if damage == "values" else path.with_name("complete.json")).write_bytes(b"nonsense")
    with pytest.raises(BadInput, match=f"{path.parent.name} are damaged"):
        extract(raw_pixels(), open_images(folder, "train"), name="x", cache=cache)


def test_a_failing_encoder_leaves_nothing_in_the_cache(folder, tmp_path):
    def fail(images_B3HW):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        extract(Encoder(fail, (32, 32), "x", "x"), open_images(folder, "train"), name="x", cache=tmp_path / "features")
    assert not list((tmp_path / "features").rglob("*.npy"))


@pytest.mark.parametrize("stop", range(0, 8))
def test_a_stopped_extraction_goes_on_where_its_last_whole_shard_ends(folder, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(extraction, "SHARD", 2)
    (folder / "train" / "dark" / "05.png").write_bytes(b"no image")
    images = open_images(folder, "train", bad_limit=0.1)
    whole = extract(raw_pixels(), images, name="x").values
    counting, how = Counting("a"), {"name": "x", "cache": tmp_path / "features", "batch_size": 3}

    def encode(images_B3HW):
        if counting.images == 3 * stop:
            raise KeyboardInterrupt
        return counting.encode(images_B3HW)

    with pytest.raises(KeyboardInterrupt):
        extract(Encoder(encode, (32, 32), "pixels", "a"), images, **how)
    before, counting.images = counting.images, 0
    # a shard of two batches is noted once the batch after it has been encoded
    kept = 6 * max(0, (before // 3 - 1) // 2)
    found = extract(counting.encoder, images, **how)
    assert torch.equal(found.values, whole) and counting.images == 23 - kept
    assert len(found.labels) == len(found.paths) == 23


def test_features_are_mapped_from_the_disk(folder, tmp_path):
    found = extract(raw_pixels(), open_images(folder, "train"), name="x", cache=tmp_path / "features")
    (path,) = (tmp_path / "features").rglob("features.npy")
    assert str(path) in Path("/proc/self/maps").read_text() and found.values.shape == (24, 3072)


def test_an_image_that_goes_bad_while_encoding_is_left_out(folder, tmp_path):
    images = open_images(folder, "train", bad_limit=0.1)
    (folder / "train" / "light" / "02.png").write_bytes(b"no image")
    found = extract(raw_pixels(), images, name="x", cache=tmp_path / "features", batch_size=5)
    assert "train/light/02.png" not in found.paths and found.values.shape == (23, 3072)
    assert found.labels.tolist() == [0] * 12 + [1] * 11
    again = extract(raw_pixels(), images, name="x", cache=tmp_path / "features", batch_size=5)
    assert torch.equal(found.values, again.values) and again.paths == found.paths


@pytest.mark.long
def test_ranks_share_out_the_shards_and_give_the_same_features(folder, tmp_path):
    ranks = 3  # so that the last takes fewer of the 8 shards
    command = torchrun(ranks, "-m", "tests.evals.extract_by_ranks", str(folder), str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = extract(raw_pixels(), open_images(folder, "train"), name="x", batch_size=3).values
    encoded = []
    for rank in range(ranks):
        values, images = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(values, alone)
        encoded.append(images)
    assert sum(encoded) == 24 and min(encoded) >= 6


def test_unreadable_images_are_left_out(folder):
    (folder / "train" / "dark" / "03.png").write_bytes(b"no image")
    found = extract(raw_pixels(), open_images(folder, "train", bad_limit=0.1), name="x", batch_size=5)
    assert found.labels.tolist() == [0] * 11 + [1] * 12
    assert "train/dark/03.png" not in found.paths and len(found.paths) == 23


def test_a_model_is_evaluated_in_eval_mode_with_its_own_pooling(folder):
    images = open_images(folder, "val")
    for pool in ("token", "avg"):
        model = vit.create("vit_micro_patch8_32", global_pool=pool).train()
        found = extract(encoder_of(model), images, name="vit", batch_size=10)
        assert model.training and found.values.shape == (24, 128) and not found.values.requires_grad
        batch = next(iter(extraction.eval_batches(images, (32, 32), 24))).images[0]
        with torch.no_grad():
            tokens = model.eval()(batch)
        expected = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
        torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
        assert ("class token" in found.pooling) == (pool == "token")


@pytest.mark.parametrize("overrides", [{"global_pool": "token"}, {"global_pool": "avg", "fc_norm": True}])
def test_class_token_and_mean_lie_side_by_side(folder, tmp_path, overrides):
    images, how = open_images(folder, "val"), {"name": "vit", "batch_size": 10, "cache": tmp_path / "features"}
    model = vit.create("vit_micro_patch8_32", **overrides)
    with torch.no_grad():
        model.fc_norm.register_forward_hook(lambda module, inputs, output: 2 * output)  # tells whether it was applied
        tokens = model.eval()(next(iter(extraction.eval_batches(images, (32, 32), 24))).images[0])
        expected = torch.cat([model.fc_norm(tokens[:, 0]), model.fc_norm(tokens[:, 1:].mean(1))], 1)
    extract(encoder_of(model), images, **how)  # the other pooling must not be found in the cache
    found = extract(encoder_of(model, "both"), images, **how)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    assert found.pooling == "class token and mean of patch tokens after the final norm, side by side"


def test_class_tokens_of_several_blocks_and_before_the_norm_are_timms(folder, tmp_path):
    images, how = open_images(folder, "val"), {"name": "vit", "batch_size": 10, "cache": tmp_path / "features"}
    model = vit.create("vit_micro_patch8_32", depth=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.uniform_(-1, 1)
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0
    )
    theirs.load_state_dict(model.state_dict())
    pixels = next(iter(extraction.eval_batches(images, (32, 32), 24))).images[0]
    with torch.no_grad():
        last = theirs.eval().get_intermediate_layers(pixels, n=3, norm=True, return_prefix_tokens=True)
        ((_, bare),) = theirs.get_intermediate_layers(pixels, n=1, norm=False, return_prefix_tokens=True)
    classes, mean = [prefix[:, 0] for _, prefix in last], last[-1][0].mean(1)
    expected = {
        ("token", 3): (torch.cat(classes, 1), "class token after the final norm; class tokens of the last 3 blocks"),
        ("both", 2): (torch.cat([*classes[1:], mean], 1), None),
        ("token", 1): (classes[2], "class token after the final norm"),
        ("avg", 1): (mean, "mean of patch tokens after the final norm"),
        ("before-norm", 1): (bare[:, 0], "class token before the final norm"),
    }
    for (pool, blocks), (values, said) in expected.items():
        found = extract(encoder_of(model, pool, blocks), images, **how)
        torch.testing.assert_close(found.values, values, rtol=1e-4, atol=1e-5)
        assert said in (None, found.pooling)


def test_what_is_read_must_be_there():
    without = vit.create("vit_base_patch16_siglip_gap_224", depth=1, img_size=32)
    for pool in ("both", "token", "before-norm"):
        with pytest.raises(BadInput, match="siglip_gap_224 has no class token: choose the pooling avg, not " + pool):
            encoder_of(without, pool)
    with pytest.raises(BadInput, match="vit_micro_patch8_32 has class tokens of 1 to 1 blocks, not of 2"):
        encoder_of(vit.create("vit_micro_patch8_32", depth=1), "token", 2)
    with pytest.raises(BadInput, match="are those of the pooling token or both, not of before-norm"):
        encoder_of(vit.create("vit_micro_patch8_32"), "before-norm", 2)


def test_fingerprints_tell_models_apart():
    model = vit.create("vit_micro_patch8_32")
    before = encoder_of(model).fingerprint
    assert encoder_of(model).fingerprint == before
    other = vit.create("vit_micro_patch8_32", global_pool="avg")
    other.load_state_dict(model.state_dict())
    assert encoder_of(other).fingerprint != before
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[0] += 1e-3
    assert encoder_of(model).fingerprint != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    with pytest.raises(BadInput, match="features of broken contain NaN or infinity"):
        Features(torch.tensor([[1.0, value]]), None, "broken")


def test_features_that_disagree_are_refused():
    with pytest.raises(BadInput, match="another number of labels"):
        Features(torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), "x")
    with pytest.raises(BadInput, match="non-empty"):
        Features(torch.ones(0, 2), None, "x")


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), features.threads_for(1e6):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_images_in_shards_have_the_features_of_their_files_and_a_place_in_the_cache(folder, tmp_path):
    images, cache = open_images(folder, "train"), tmp_path / "features"
    Packing({"train": images}, tmp_path / "shards", How(images_per_shard=9)).run(1, lambda _: None)
    values = extract(raw_pixels(), images, name="x").values
    for already in (0, 24):
        counting = Counting("a")
        found = extract(counting.encoder, open_images(tmp_path / "shards", "train"), name="x", cache=cache)
        assert torch.equal(found.values, values) and found.paths == tuple(images.paths)
        assert counting.images == 24 - already
    os.utime(tmp_path / "shards/train/00001.tar", ns=(1, 1))
    again = Counting("a")
    extract(again.encoder, open_images(tmp_path / "shards", "train"), name="x", cache=cache)
    assert again.images == 24
