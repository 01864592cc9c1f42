"""Counts that several threads want at once, and those of more micro-batches than were counted. What is counted:
tests/null_device/test_counting.py."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.core.errors import BadInput
from engine.data.sources import open_images
from engine.planning import bill, cards, counting
from engine.planning.peak import PARTS
from engine.planning.traffic import Moved, Work
from engine.training import config
from engine.training.parts import stages_of
from engine.training.portions import portions
from tests.planning.counts import GB, made

FLAGS = (
    "--method",
    "mae",
    "--model",
    "vit_tiny_patch16_224",
    "--preset",
    "plain",
    "--batch-size",
    "64",
    "--device",
    "cuda",
)


class Answering:
    """In place of processes on the device."""

    def __init__(self, failure: str = ""):
        self.asked, self.failure = [], failure

    def answer(self, asked, variables):
        self.asked.append(asked["images"])
        time.sleep(0.05)
        if self.failure:
            raise RuntimeError(self.failure)
        return [made(launches=asked["images"]).as_json()]


@pytest.fixture
def counted(monkeypatch, tmp_path):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    plan = config.parse(FLAGS)
    (portion,) = portions(plan, stages_of(plan, open_images("synthetic:4096", "train")))

    def by(workers: Answering):
        monkeypatch.setattr(counting, "_workers", lambda folder: workers)
        return lambda gpus: counting.count(plan, FLAGS, portion, gpus, "bf16")

    return by


def test_what_several_want_is_counted_once(counted):
    workers = Answering()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(counted(workers), (1, 2, 1, 2, 1, 2)))
    assert [one.launches for one in found] == [64, 32, 64, 32, 64, 32]
    assert sorted(workers.asked) == [32, 64]


def test_a_failure_is_told_and_not_kept(counted):
    with pytest.raises(BadInput, match=r"^a step of stage mae cannot be counted: no such op$"):
        counted(Answering("no such op"))(1)
    assert counted(Answering())(1).launches == 64


def test_what_is_kept_needs_no_device(counted, monkeypatch):
    count = counted(Answering())
    found = count(1)
    monkeypatch.delattr(counting, "_workers")
    assert count(1) == found


def test_micro_batches_add_what_one_more_adds():
    """Also of work over the whole batch, `draw`, which is other work each time."""

    def step(micro_batches: int):
        rows = (
            Moved("backward", "mm", 2 * micro_batches, Counter({Work(GB, 10**12): 2 * micro_batches})),
            Moved("forward, update", "adamw", 1, Counter({Work(3 * GB): 1})),
            Moved("forward, update", "draw", 1, Counter({Work(micro_batches * GB): 1})),
        )
        peak = dict.fromkeys(PARTS, GB) | {"temporaries": micro_batches * GB}
        return made(launches=2 + 2 * micro_batches, rows=rows, peak=peak)

    said, taken = step(2).further(step(3), by=30), step(32)
    assert (said.launches, said.bytes, said.flops, said.peak) == (taken.launches, taken.bytes, taken.flops, taken.peak)
    assert {row.name: row.bytes for row in said.rows} == {row.name: row.bytes for row in taken.rows}
    card = cards.named("H100")
    assert bill.step_seconds(said, card, 8).likely == pytest.approx(bill.step_seconds(taken, card, 8).likely)
