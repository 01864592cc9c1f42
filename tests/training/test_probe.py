import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine.data.pipeline import eval_batches
from engine.data.sources import open_images
from engine.training.log import RunLog
from engine.training.metrics import read_metrics
from engine.training.probe import (
    Health,
    OnlineProbe,
    feature_std,
    history,
    loss_over_ln_k,
    neighbour_agreement,
    rank_me,
    skipped_since,
    usage,
    verdict,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    return open_images(None, "train"), open_images(None, "val")


def pixels(images):
    return images.flatten(1)


# The measures.


@pytest.mark.parametrize("shape", [(500, 20), (20, 50)])
def test_rank_me_is_its_formula_over_an_svd(shape):
    features = normal(*shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
    p = torch.linalg.svdvals(features.double())
    p = p / p.sum() + 1e-7
    assert rank_me(features) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


def test_rank_me_counts_directions():
    assert rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rank_me(normal(4000, 32)) == pytest.approx(32, rel=0.01)
    assert rank_me(normal(400, 3) @ normal(3, 64, seed=1)) < 3.1
    assert rank_me(torch.ones(50, 64)) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(50, 64)) == 0
    assert rank_me(1000 * normal(400, 8).half()) == pytest.approx(rank_me(normal(400, 8)), rel=1e-2)
    assert math.isnan(rank_me(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))


def test_feature_std_is_one_when_isotropic_and_zero_when_collapsed():
    assert feature_std(normal(4000, 64)) == pytest.approx(1, abs=0.02)
    assert feature_std(normal(4000, 64) + 3) == pytest.approx(1 / 10**0.5, rel=0.1)
    assert feature_std(torch.ones(50, 64)) == pytest.approx(0, abs=1e-6)
    assert feature_std(torch.ones(500, 64) + 1e-3 * normal(500, 64)) < 0.05
    assert math.isnan(feature_std(torch.full((4, 3), math.nan)))


def test_features_of_one_sample_are_refused():
    for measure in (rank_me, feature_std):
        for shape in ((1, 8), (8,)):
            with pytest.raises(ValueError, match="n of 2 or more"):
                measure(torch.ones(shape))


def test_usage_is_relative_to_the_most_even_use():
    assert usage(torch.arange(1000) % 10, 10) == pytest.approx(1)
    assert usage(torch.arange(20), 1000) == pytest.approx(1)
    assert usage(torch.zeros(1000, dtype=torch.int64), 10) == pytest.approx(0.1)
    assert usage((torch.arange(1000) % 5).view(10, 100), 10) == pytest.approx(0.5)


def test_neighbour_agreement_leaves_unknown_labels_out():
    queries = torch.tensor([0, 1, 2, -1])
    assert neighbour_agreement(queries, torch.tensor([0, 1, 1, -1])) == pytest.approx(100 * 2 / 3)
    assert neighbour_agreement(queries, torch.tensor([[0, 0], [1, -1], [0, 2], [-1, 2]])) == pytest.approx(80)
    assert neighbour_agreement(queries, torch.full((4,), -1)).isnan()


# The verdict.


def health(step, rank=40.0, std=0.5, knn=80.0, **more):
    return Health(step, rank, std, 128, knn_top1=knn, knn_chance=10.0 if knn is not None else None, **more)


def of_features(step, features, knn=None):
    values = {"rank_me": rank_me(features), "feature_std": feature_std(features), "feature_dim": 64}
    return Health.of(step, values if knn is None else values | {"knn_top1": knn, "knn_chance": 10.0})


def word(*course):
    line = verdict(course)
    assert "\n" not in line
    assert line.endswith(".")
    return line.split(":")[0]


COLLAPSED = torch.ones(500, 64) + 1e-4 * normal(500, 64)
HEALTHY = normal(500, 64) + 1


@pytest.mark.parametrize("knn", [None, 70.0])
def test_spread_features_are_healthy(knn):
    course = [of_features(step, HEALTHY, knn) for step in (1, 2)]
    assert word(*course) == "healthy"
    assert ("unlabelled data: k-NN not measured" in verdict(course)) == (knn is None)


@pytest.mark.parametrize("knn", [None, 12.0])
def test_collapsed_features_are_called_so_once_a_second_probe_agrees(knn):
    course = [of_features(step, COLLAPSED, knn) for step in (1, 2)]
    assert word(course[0]) == "watch"
    assert word(*course) == "collapsing"
    assert "rank 1.0 of 64" in verdict(course)
    assert "ower the learning rate" in verdict(course)


def test_a_sudden_collapse_is_called_at_once():
    assert word(of_features(10, HEALTHY), of_features(20, COLLAPSED)) == "collapsing"


def test_features_on_a_line_are_a_collapse_though_their_std_is_high():
    line = normal(500, 1) @ normal(1, 64, seed=1)  # two opposite directions
    assert feature_std(line) > 0.5
    assert word(*[of_features(step, line) for step in (1, 2)]) == "collapsing"


def test_narrow_but_widening_features_are_only_watched():
    assert word(health(1, std=0.02, knn=None), health(2, std=0.03, knn=None)) == "watch"
    assert word(health(1, std=0.02, knn=None), health(2, std=0.0201, knn=None)) == "collapsing"


def test_k_nn_overrules_narrow_features():
    course = [health(step, rank=1.8, std=0.02, knn=60.0) for step in (0, 1, 2)]
    assert {word(*course[:n]) for n in (1, 2, 3)} == {"healthy"}
    assert word(health(1, knn=90.0), health(2, rank=1.8, std=0.02, knn=40.0)) == "collapsing"


def test_a_partial_collapse_needs_rank_and_k_nn_to_fall_twice():
    course = [health(10, rank=60, knn=80), health(20, rank=25, knn=60), health(30, rank=20, knn=50)]
    assert [word(*course[:n]) for n in (1, 2, 3)] == ["healthy", "watch", "collapsing"]
    assert "from 60.0 to 20.0" in verdict(course)


def test_a_partial_collapse_without_labels_needs_rank_and_spread_to_halve():
    assert word(health(1, rank=60, std=0.8, knn=None), health(2, rank=20, std=0.3, knn=None)) == "collapsing"
    assert word(health(1, rank=60, std=0.8, knn=None), health(2, rank=20, std=0.7, knn=None)) == "healthy"


def test_tuning_that_gathers_classes_lowers_the_rank_and_is_healthy():
    assert word(health(10, rank=60, knn=60), health(20, rank=12, knn=75), health(30, rank=8, knn=85)) == "healthy"


def test_an_untrained_network_that_did_better_is_no_yardstick():
    assert word(health(0, rank=90, knn=95), health(10, rank=20, knn=60), health(20, rank=22, knn=62)) == "healthy"


def test_noise_of_a_small_probe_is_healthy():
    assert word(health(10, knn=80), health(20, knn=75), health(30, knn=79), health(40, knn=76)) == "healthy"


def test_k_nn_that_falls_alone_or_stays_at_chance_is_watched():
    assert word(health(10, knn=80), health(20, knn=60)) == "healthy"
    assert word(health(10, knn=80), health(20, knn=60), health(30, knn=60)) == "watch"
    assert word(health(10, knn=11.0)) == "watch"
    assert word(health(0, knn=11.0)) == "healthy"


def test_few_used_prototypes():
    assert word(health(1, usage=0.001)) == "watch"
    assert word(health(1, usage=0.001), health(2, usage=0.002)) == "collapsing"
    assert word(health(1, usage=0.001), health(2, usage=0.2)) == "healthy"
    # of 64 prototypes one alone is above that share
    assert (
        word(health(1, usage=1 / 64, prototypes_used=1.0), health(2, usage=1.8 / 64, prototypes_used=1.8))
        == "collapsing"
    )
    assert word(health(1, usage=4 / 64, prototypes_used=4.0), health(2, usage=4 / 64, prototypes_used=4.0)) == "healthy"
    assert word(health(1, usage=1.0, prototypes_used=2.0), health(2, usage=0.9, prototypes_used=1.8)) == "healthy"


@pytest.mark.parametrize(
    "broken",
    [
        health(3, loss=math.nan),
        health(3, rank=math.nan, std=math.nan),
        health(3, loss=math.inf),
        health(3, knn=math.nan),
    ],
)
def test_what_is_not_finite_is_broken_and_forgotten_later(broken):
    assert word(health(1), health(2), broken) == "broken"
    assert "step 3" in verdict([broken])
    assert word(health(1), broken, health(4)) == "healthy"


def test_a_run_whose_updates_were_left_out_is_not_healthy():
    assert verdict([health(5), health(9, skipped_share=1.0)]).startswith("broken: 100% of the updates were left out")
    assert verdict([health(9, skipped_share=0.5)]).startswith("broken: 50%")
    assert verdict([health(5), health(9, skipped_share=0.2)]).startswith("watch: 20% of the updates were left out")
    assert verdict([health(5), health(9, skipped_share=0.02)]).startswith("healthy:")


def test_updates_left_out_are_counted_from_probe_to_probe():
    def line(kind: str, stage: str, step: int, **values) -> dict:
        return {"kind": kind, "stage": stage, "step": step} | values

    assert skipped_since([], "mae", 0, 10, 0) == {}
    assert skipped_since([], "mae", 0, 10, 4) == {"skipped_updates": 4, "skipped_share": 0.4}
    probed = [line("probe", "mae", 10, skipped_updates=4), line("train", "mae", 15, skipped_updates=4)]
    assert skipped_since(probed, "mae", 0, 20, 9) == {"skipped_updates": 9, "skipped_share": 0.5}
    assert skipped_since([line("probe", "mae", 10)], "mae", 0, 20, 5) == {"skipped_updates": 5, "skipped_share": 0.5}
    # another stage counts by itself
    assert skipped_since(probed, "maect", 20, 40, 5) == {"skipped_updates": 5, "skipped_share": 0.25}
    assert skipped_since(probed, "mae", 0, 10, 4) == {}


def test_a_loss_at_ln_k_is_the_nearest_term_over_ln_k():
    k = 4096
    of_terms = {"loss": 2 * math.log(k), "class_loss": 8.3178, "patch_loss": 4.2, "verdict": "words", "lr": 1.0}
    assert loss_over_ln_k(of_terms, k) == {"loss_over_ln_k": pytest.approx(1, abs=1e-5)}
    assert loss_over_ln_k({"loss": 4.1, "lr": 8.3178}, k) == {"loss_over_ln_k": pytest.approx(4.1 / math.log(k))}
    assert loss_over_ln_k({"loss": None}, k) == loss_over_ln_k({"loss": 8.3178}, 0) == loss_over_ln_k({}, k) == {}


def test_a_loss_that_stands_at_ln_k_is_named():
    signature = "loss = ln K (8.3178 = ln 4096): the student says the same of everything"
    at, learning = ({"loss_over_ln_k": share, "prototypes": 4096} for share in (1.0002, 0.9))
    assert verdict([health(5, **at)]).startswith("healthy:")  # every run begins there
    stands = verdict([health(5, **at), health(9, **at)])
    assert stands.startswith("watch:") and signature in stands
    assert verdict([health(5, **at), health(9, **learning)]).startswith("healthy:")
    collapsed = verdict([health(5, 1.0, 0.01, 10.0), health(9, 1.0, 0.01, 10.0, **at)])
    assert collapsed.startswith("collapsing:") and signature in collapsed
    few = verdict([health(5, usage=0.001, **at), health(9, usage=0.001, **at)])
    assert few.startswith("collapsing: few prototypes") and signature in few


def test_history_in_the_log_gives_the_same_verdict(tmp_path):
    course = [health(10, rank=60), health(20, rank=math.nan), health(30, rank=25, knn=60), health(40, rank=20, knn=50)]
    with RunLog(tmp_path, quiet=True) as run:
        for h in course:
            run.log(h.step, {"loss": 1.0})
            values = {"rank_me": h.rank_me, "feature_std": h.feature_std, "feature_dim": 128}
            run.log(h.step, values | {"knn_top1": h.knn_top1, "knn_chance": 10.0, "verdict": "some"}, kind="probe")
    read = history(read_metrics(tmp_path / "metrics.jsonl"))
    assert [verdict(read[:n]) for n in range(1, 5)] == [verdict(course[:n]) for n in range(1, 5)]


# The probe.


def test_pixels_of_digits_are_good_features(digits):
    values = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=256).measure(pixels)
    assert set(values) == {"rank_me", "feature_std", "feature_dim", "knn_top1", "knn_chance"}
    assert values["knn_top1"] > 93
    assert 10 < values["knn_chance"] < 11
    assert values["feature_dim"] == 3072
    assert json.dumps(values, allow_nan=False)


def test_k_nn_is_the_weighted_vote_of_all_pairs(digits):
    probe = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=256, max_train=300, max_val=100, k=7)
    project = normal(3072, 4)
    encoded = [
        F.normalize(torch.cat([pixels(images) for _, images in samples.batches()]) @ project, dim=1).double()
        for samples in (probe.train, probe.val)
    ]
    similarity = encoded[1] @ encoded[0].T
    right = 0
    for row, label in zip(similarity, probe.val.labels.tolist(), strict=True):
        votes = [0.0] * 10
        for neighbour in row.argsort(descending=True)[:7].tolist():
            votes[probe.train.labels[neighbour]] += math.exp(row[neighbour] / 0.07)
        right += votes.index(max(votes)) == label
    assert probe.measure(lambda images: pixels(images) @ project)["knn_top1"] == pytest.approx(right)


def test_a_classifier_s_accuracy_is_that_on_held_out_samples(digits):
    probe = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=256, max_train=100, max_val=60)
    project = normal(3072, 10)
    values = probe.measure(pixels, classify=lambda features: features @ project)
    shown = torch.cat([pixels(images) for _, images in probe.val.batches()])
    expected = [max(range(10), key=lambda k: row[k]) for row in (shown @ project).tolist()]
    right = sum(a == b for a, b in zip(expected, probe.val.labels.tolist(), strict=True))
    assert values["top1"] == pytest.approx(100 * right / 60)
    # scores that are no numbers are wrong, and without a held-out split there is nothing to say
    assert probe.measure(pixels, classify=lambda features: (features @ project) * math.nan)["top1"] == 0
    alone = OnlineProbe(digits[0], None, (32, 32), device="cpu", batch_size=256, max_train=100)
    assert "top1" not in alone.measure(pixels, classify=lambda features: features @ project)


def test_decoded_images_are_kept_and_give_the_same_values(digits, monkeypatch):
    calls, original = [], eval_batches
    probe = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=100, max_train=250, max_val=50)
    monkeypatch.setattr("engine.training.probe.eval_batches", lambda *a, **k: calls.append(1) or original(*a, **k))
    first, second = probe.measure(pixels), probe.measure(pixels)
    assert first == second
    assert len(calls) == 2
    monkeypatch.setattr("engine.training.probe.CACHE_BYTES", 0)
    frugal = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=64, max_train=250, max_val=50)
    assert frugal.measure(pixels) == pytest.approx(first)
    assert frugal.measure(pixels) == pytest.approx(first)
    assert len(calls) == 6


def test_samples_are_evenly_spaced_over_classes(digits):
    probe = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=64, max_train=500)
    assert probe.train.count == 500
    assert probe.val.count == 360
    assert probe.train.labels.bincount().min() > 40
    assert len(set(probe.train.images.paths)) == 500


def test_without_labels_only_the_label_free_measures(digits):
    unlabelled = replace(digits[0], labels=None, classes=None)
    values = OnlineProbe(unlabelled, None, (32, 32), device="cpu", batch_size=256, max_train=200).measure(pixels)
    assert set(values) == {"rank_me", "feature_std", "feature_dim"}
    assert "k-NN not measured" in verdict([Health.of(1, values)])


def test_without_a_val_split_each_sample_is_left_out_for_itself(digits):
    probe = OnlineProbe(digits[0], None, (32, 32), device="cpu", batch_size=256, max_train=300)
    assert 80 < probe.measure(pixels)["knn_top1"] < 100
    # Noise tells its own class only where it may look at itself.
    assert probe.measure(lambda images: normal(len(images), 512, seed=len(images)))["knn_top1"] < 30


def test_features_that_are_not_finite_are_reported(digits):
    probe = OnlineProbe(*digits, (32, 32), device="cpu", batch_size=256, max_train=200, max_val=50)
    values = probe.measure(lambda images: pixels(images) * math.nan)
    assert math.isnan(values["rank_me"])
    assert math.isnan(values["knn_top1"])
    assert word(Health.of(1, values)) == "broken"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_measure_what_one_process_does(digits, world):
    """Threads stand for ranks; their gathering is that of torch.distributed: equal shares, in rank order."""
    options = {"device": "cpu", "batch_size": 64, "max_train": 205, "max_val": 31}
    alone = OnlineProbe(*digits, (32, 32), **options).measure(pixels)
    meet, shares, found = threading.Barrier(world, timeout=60), [None] * world, [None] * world

    def measure(rank):
        def gather(x):
            shares[rank] = x
            meet.wait()
            assert len({share.shape for share in shares}) == 1
            whole = torch.cat(shares)
            meet.wait()
            return whole

        found[rank] = OnlineProbe(*digits, (32, 32), rank=rank, world=world, gather=gather, **options).measure(pixels)

    threads = [threading.Thread(target=measure, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(values == pytest.approx(alone) for values in found)


def test_files_that_turn_out_bad_are_left_out_with_their_labels(tmp_path):
    """Pictures of class 1 are white, of class 0 black: were rows to shift, labels would no longer fit."""
    for split in ("train", "val"):
        for label in (0, 1):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for i in range(10):
                shade = np.full((32, 32, 3), 250 * label + i // 2, np.uint8)
                Image.fromarray(shade).save(folder / f"{i}.png")
    sets = [open_images(tmp_path, split, bad_limit=0.5) for split in ("train", "val")]
    whole = (tmp_path / "train" / "0" / "3.png").read_bytes()
    (tmp_path / "train" / "0" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "val" / "0" / "0.png").write_bytes(b"nothing")
    probe = OnlineProbe(*sets, (32, 32), device="cpu", batch_size=4, k=3)
    seen = []

    def encode(images):
        seen.append(len(images))
        return images.mean(dim=(2, 3))

    assert probe.measure(encode)["knn_top1"] == 100
    assert sum(seen) == 19 + 19
