"""Waiting for images: what is counted and said; a run with a slow loader says it, one with a fast loader doesn't."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import train
from engine.data.pipeline import TrainLoader
from engine.training import dry_run
from engine.training.log import RunLog
from engine.training.step import Update
from engine.training.waits import Feed, Waits, verdict
from tests.reliability.images import FLAGS, folder_of_images
from tests.training.logged import Clock, console, shown

CPU = torch.device("cpu")
TINY = (*FLAGS, "--mae.decoder-dim", "32", "--mae.decoder-depth", "1", "--mae.decoder-heads", "1")
SMALL = Feed(threads=2, cores=2, short_side=375, crop=224)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def loader(clock: Clock, seconds: float) -> Iterator[int]:
    """A batch after so many seconds, again and again."""
    while True:
        clock.now += seconds
        yield 0


def test_the_time_in_the_loader_is_counted_from_the_second_batch_on(clock):
    waits, batches = Waits(CPU), loader(clock, 3)
    waits.fetch(batches)
    assert waits.seconds() == 0
    for _ in range(2):
        waits.fetch(batches)
        clock.now += 100  # the step
    assert waits.seconds() == 6
    assert waits.seconds() == 0


@pytest.mark.parametrize(
    ("queued", "fetching", "idle"),
    [(1.0, 0.3, 0.0), (1.0, 1.0, 0.0), (1.0, 1.4, 0.4), (0.0, 0.3, 0.3)],
    ids=["busy", "just busy", "idle at the end", "idle all along"],
)
def test_a_gpu_waits_only_where_it_has_nothing_queued(monkeypatch, clock, queued, fetching, idle):
    """Events as a stream has them: reached when the host has recorded them and all that was queued before is done."""
    free = clock.now  # when the device will be done with its queue

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: object) -> None:
            self.reached = max(clock.now, free)

        def elapsed_time(self, later: "Event") -> float:
            return 1e3 * (later.reached - self.reached)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    waits, batches = Waits(torch.device("cuda", 0)), loader(clock, fetching)
    waits.fetch(batches)
    free = clock.now + queued
    waits.fetch(batches)
    assert waits.seconds() == pytest.approx(idle)


def test_an_exhausted_loader_is_not_hidden(clock):
    with pytest.raises(StopIteration):
        Waits(CPU).fetch(iter(()))


@pytest.mark.parametrize(("seconds", "told"), [(0.01, False), (0.5, True)])
def test_a_run_says_that_it_waits_and_only_then(tmp_path, clock, seconds, told):
    with RunLog(tmp_path, console=console()) as run:
        run.start_stage("mae", 0, 1, 0, 40, 50)
        waits, batches = Waits(CPU), loader(clock, seconds)
        for step in range(1, 41):
            waits.fetch(batches)
            clock.now += 1
            run.tick(step)
            if step % 10 == 0:
                run.log(step, {"loss": 1.0}, waited=waits.seconds())
                with run.aside():
                    clock.now += 1000
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    share = seconds / (1 + seconds)
    # the last line's interval, like the first one's, is whole: the first step is in none of them
    assert [record["waiting_for_data"] for record in records] == pytest.approx([share] * 4)
    assert run.speed() == pytest.approx({"images_per_second": 50 / (1 + seconds), "waiting_for_data": share})
    assert ("waiting for data 33%" in shown(run)) == told
    assert ("waiting" in shown(run)) == told
    assert bool(verdict(share, SMALL)) == told


def test_a_share_is_never_above_one_and_unknown_where_nobody_measures(tmp_path, clock):
    with RunLog(tmp_path, quiet=True) as run:
        run.start_stage("mae", 0, 1, 0, 3, 50)
        run.log(1, {"loss": 1.0}, waited=5.0)
        assert run.speed() == {}
        clock.now += 1
        run.log(2, {"loss": 1.0}, waited=1.001)  # two clocks may differ
        clock.now += 1
        run.log(3, {"loss": 1.0})
    found = [json.loads(line).get("waiting_for_data") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [None, 1.0, None]


@pytest.mark.parametrize(
    ("feed", "order"),
    [
        (Feed(8, 16, 375, 224), ["--threads 16 (8 of this process's 16 cores"]),
        (Feed(8, 16, 1200, 224), ["--threads 16", "python -m engine.shard DIR OUT --short 448"]),
        (Feed(2, 2, 1200, 224), ["1,200 pixels, that of a crop 224", "all its 2 cores make images already"]),
        (Feed(1, 1, 375, 224), ["its one core makes images already"]),
        (Feed(4, 2, 448, 224), ["more cores"]),
        (Feed(2, 2, 0, 0), ["more cores"]),
    ],
)
def test_what_to_try_is_what_is_left(feed: Feed, order: list[str]):
    said = verdict(0.41, feed)
    assert said.startswith("loader-bound: 41% of the time waiting for data; try ")
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    assert said.count("; then ") == len(order) - 1
    assert ("--threads" in said) == (feed.threads < feed.cores)
    assert ("--short" in said) == (feed.short_side > 2 * feed.crop)


def test_a_loader_alone_is_timed_without_what_it_had_made_ahead(clock):
    waited = []

    def batches() -> Iterator[int]:
        yield from (0, 0, 0)  # these come at once
        yield from loader(clock, 0.5)

    rate = dry_run.rate_alone(batches(), 64, lambda: waited.append(clock.now))
    assert rate == pytest.approx(64 / 0.5)
    assert waited == [1000, 1000 + dry_run.SECONDS_ALONE]


@pytest.mark.parametrize(
    ("feed", "numbers"),
    [(SMALL, [1, 2]), (Feed(1, 1, 0, 0), [1]), (Feed(8, 16, 0, 0), [4, 8, 16]), (Feed(4, 2, 0, 0), [2, 4])],
)
def test_a_loader_is_timed_with_fewer_threads_and_all_cores(feed: Feed, numbers: list[int]):
    assert dry_run.other_threads(feed) == numbers


def a_second_for_each_step(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: float) -> None:
    """Real steps on real batches that take as long as the clock is told: a second for a step, `seconds` for a batch."""
    fetch, update = TrainLoader.__next__, Update.__call__

    def slow_fetch(self):
        clock.now += seconds
        return fetch(self)

    def slow_update(self, *args, **options):
        clock.now += 1
        return update(self, *args, **options)

    monkeypatch.setattr(TrainLoader, "__next__", slow_fetch)
    monkeypatch.setattr(Update, "__call__", slow_update)


def test_a_whole_run_tells_it_at_its_end_and_in_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture
):
    folder_of_images(tmp_path / "images")
    a_second_for_each_step(monkeypatch, clock, 0.5)
    assert train.main([*TINY, "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]) == 0
    (speed,) = json.loads((tmp_path / "run" / "summary.json").read_text())["speed"]
    told = "loader-bound: 33% of the time waiting for data; try "
    assert speed["stage"] == "mae" and speed["waiting_for_data"] == pytest.approx(1 / 3)
    assert speed["images_per_second"] == pytest.approx(4 / 1.5)
    assert speed["verdict"].startswith(told)
    assert f"mae: {told}" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "told"), [(0.01, False), (1, True)])
def test_a_dry_run_times_the_loader_alone_where_the_steps_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture, seconds, told
):
    folder_of_images(tmp_path / "images")
    a_second_for_each_step(monkeypatch, clock, seconds)
    assert train.main([*TINY, "--data", str(tmp_path / "images"), "--threads", "1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "waiting" in said  # a column of the table
    assert ("mae: loader-bound: 50% of the time waiting for data" in said) == told
    assert ("without waiting the steps could take 4 images/s; the loader alone makes 4 with 1 thread" in said) == told
    assert ("loader alone" in said) == told
