"""What a run computes in all, beside what its own stages are credited with, step by step."""

from pathlib import Path

import pytest

from engine import methods
from engine.core import dist
from engine.training import config
from engine.training.build import build
from engine.training.operations import operations
from engine.training.parts import prepare
from tests.faults.runs import flags, images


@pytest.mark.parametrize("name", methods.names())
def test_operations_are_those_of_every_stage_and_phase(name: str, tmp_path: Path):
    more = [] if not methods.get(name).shrinks else ["--tokens", "flexi"]
    parts = prepare(config.parse([*flags(name, images(tmp_path), epochs=4), *more]), dist.start("cpu"))
    found, method = operations(parts.plan, parts.stages, 2), None
    for stage in parts.stages:
        expected = 0.0
        method = build(parts, stage.index, method, anew=False).method
        for stretch in stage.timetable.stretches:
            for step in range(stretch.first, stretch.end):
                method.phase = stretch.phase.form(parts.plan.train.seed, stage.index, step)
                expected += stretch.images * method.flops_per_image()
        assert found[stage.name] == pytest.approx(expected)


def test_storing_features_is_counted_once_for_each_pair(tmp_path: Path):
    words = flags("nnclr", images(tmp_path), epochs=4)
    plain, stored = (prepare(config.parse([*words, "--nnclr.reuse", reuse]), dist.start("cpu")) for reuse in "02")
    whole, heads = (build(parts, 0, None, anew=False).method.flops_per_image() for parts in (plain, stored))
    steps, batch = stored.stages[0].total_steps, stored.settings(0).batch_size
    expected = 2 * 8 * (whole - heads) + steps * batch * heads
    assert operations(stored.plan, stored.stages)["nnclr"] == pytest.approx(expected)
