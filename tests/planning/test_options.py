"""Which options are looked at, and in which order those are tried that make a run fit."""

import pytest

from engine.planning import options
from engine.planning.cards import CARDS
from engine.training import config
from tests.planning.counts import GB, made

FLAGS = "--model vit_small_patch16_224 --preset plain --device cuda".split()


@pytest.mark.parametrize("method", ["mae", "maect", "dino"])
def test_every_option_is_understood_by_training(method: str):
    flags = ["--method", method, *FLAGS]
    plan = config.parse(flags)
    found = list(options.options(plan))
    assert len({option.name for option in found}) == len(found) >= 5
    for option in found:
        changed = config.parse([*flags, *option.flags])
        assert changed != plan
        assert option.name not in {again.name for again in options.options(changed)} - {"twice the micro-batches"}


def test_nothing_is_saved_where_all_fits_and_little_before_much():
    plan = config.parse(["--method", "mae", *FLAGS])
    first, *others = options.savings(plan, [made()], CARDS["A100-80"], 8)
    assert first.flags == ("--recompute", "none", "--accumulate", "1")
    assert [saving.work for saving in others] == sorted(saving.work for saving in others)
    large = made(peak=made().peak | {"activations": 100 * GB})
    # its images are not compared, so micro-batches cost least
    assert options.savings(plan, [large], CARDS["A100-80"], 8)[0].flags == ("--recompute", "none", "--accumulate", "2")


def test_where_images_are_compared_computing_again_comes_first():
    plan = config.parse(["--method", "maect", *FLAGS])
    large = made(peak=made().peak | {"activations": 100 * GB})
    assert options.savings(plan, [large] * 3, CARDS["A100-80"], 8)[0].flags == (
        "--recompute", "selective", "--accumulate", "1",
    )  # fmt: skip


def test_what_stands_there_anyway_cannot_be_saved():
    plan = config.parse(["--method", "mae", *FLAGS])
    assert not options.savings(plan, [made(peak=made().peak | {"optimiser": 100 * GB})], CARDS["A100-80"], 8)
