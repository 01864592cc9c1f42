"""What a plan counts: the allocator's own peak, shared out; the operations a method is credited with; and what options save."""

import json
import re

import pytest

from engine.data.sources import open_images
from engine.null_device import device
from engine.planning import bill, cards, counting
from engine.planning.counting import Count, count
from engine.planning.peak import PARTS
from engine.training import config
from engine.training.parts import stages_of
from engine.training.portions import portions

pytestmark = [pytest.mark.null_device, pytest.mark.long, pytest.mark.timeout(1800)]

FLAGS = "--method maect --model vit_tiny_patch16_224 --preset plain --batch-size 256 --weights any --device cuda --no-compile"


def counted(*options: str, of: str = FLAGS, gpus: int = 1) -> Count:
    """Of the last stage."""
    flags = [*of.split(), *options]
    plan = config.parse(flags)
    last = portions(plan, stages_of(plan, open_images("synthetic:4096", "train")))[-1]
    return count(plan, flags, last, gpus, "bf16")


def test_options_that_save_memory_do_and_what_they_cost_is_seen():
    plain, parts, selective, blocks = (
        counted(*options)
        for options in ((), ("--accumulate", "4"), ("--recompute", "selective"), ("--recompute", "blocks"))
    )
    assert parts.peak_bytes < 0.5 * plain.peak_bytes
    assert blocks.peak_bytes < 0.5 * plain.peak_bytes
    assert blocks.peak_bytes < selective.peak_bytes < 0.8 * plain.peak_bytes
    assert plain.flops == selective.flops < blocks.flops
    assert plain.flops < parts.flops  # images that are compared are represented twice
    card = cards.named("H200")
    assert bill.step_seconds(blocks, card, 1).likely > bill.step_seconds(plain, card, 1).likely


@pytest.mark.parametrize("method", ["mae", "dino", "dinov2"])
def test_few_micro_batches_say_what_many_take(method: str, monkeypatch: pytest.MonkeyPatch):
    of = f"--method {method} --model vit_tiny_patch16_224 --preset plain --batch-size 96 --device cuda --compile off"
    said = counted("--accumulate", "6", of=of)
    monkeypatch.setattr(counting, "FEW", (6, 7))
    taken = counted("--accumulate", "6", of=of)
    assert (said.launches, said.bytes, said.flops) == (taken.launches, taken.bytes, taken.flops)
    assert said.peak_bytes == taken.peak_bytes
    # to which part a block at an address that is used again belongs is not the same each time
    assert said.peak == pytest.approx(taken.peak, abs=0.01 * taken.peak_bytes)
    assert {(row.part, row.name): (row.launches, row.bytes, row.flops) for row in said.rows} == {
        (row.part, row.name): (row.launches, row.bytes, row.flops) for row in taken.rows
    }


def test_a_share_of_the_batch_is_a_share_of_the_work():
    whole, half = counted(), counted(gpus=2)
    assert half.flops == pytest.approx(whole.flops / 2, rel=0.02)
    assert half.peak["activations"] == pytest.approx(whole.peak["activations"] / 2, rel=0.02)
    assert half.peak["weights"] == whole.peak["weights"]


def test_a_dry_run_stands_beside_its_plan(on_device):
    """Of time nothing is meant here; a step's memory is."""
    flags = (
        "--method mae --model vit_tiny_patch16_224 --batch-size 64 --compile off --gpu H200 --dry-run --rows 0".split()
    )
    done = device.process(["-m", "engine.plan", *flags, "--calibrate", "never"], on_device() | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr[-4000:]
    planned, off = re.findall(r"^│ mae .* ([\d.]+) \(([+-]\d+)%\) │$", done.stdout, re.MULTILINE)[-1]
    assert float(planned) > 0.1 and abs(int(off)) <= 3


@pytest.mark.parametrize("compiles", ["off", "on"])
def test_peak_and_operations_are_those_of_the_allocator_and_of_the_method(compiles: str, on_device):
    answer = device.answer("tests.null_device.counting", ["mae", "vit_small_patch16_224", "64", compiles], on_device())
    found = Count.from_json(answer["count"])
    assert set(found.peak) == set(PARTS)
    assert found.peak_bytes == pytest.approx(answer["allocator"], rel=0.03)
    assert found.flops == pytest.approx(64 * found.flops_per_image, rel=0.01)
    assert found.peak["weights"] == answer["weights"]
    assert found.peak["optimiser"] >= 2 * answer["trained"]  # two moments
    assert Count.from_json(json.loads(json.dumps(found.as_json()))) == found
