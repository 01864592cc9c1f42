import pytest

from engine.training.log import RunLog
from engine.training.metrics import read_metrics
from tests.training.logged import Clock, console, shown, train


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize(("seconds", "told"), [(1, False), (38, True)])
def test_a_long_first_step_is_told(clock, seconds, told):
    with RunLog(None, console=console()) as run:
        run.start_stage("mae", 0, 1, 0, 100, 64)
        for _ in range(3):
            clock.now += seconds
            run.tick(1)
    assert ("the first step took 38 s, compilation included" in shown(run)) == told


def test_rates_leave_out_the_first_update_and_time_aside(tmp_path, clock):
    with RunLog(tmp_path, quiet=True, flops_per_image=1e9, peak_flops=1e12) as run:
        run.start_stage("mae", 0, 1, 0, 100, 50)
        clock.now += 60  # compiling
        run.log(1, {"loss": 1.0})
        for step in range(2, 12):
            clock.now += 0.5
            run.tick(step)
            if step == 6:
                with run.aside():
                    clock.now += 1000
        run.log(11, {"loss": 1.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert "images_per_second" not in first
    assert second["images_per_second"] == pytest.approx(50 / 0.5)
    assert second["mfu"] == pytest.approx(100 * 1e9 / 1e12)


def test_images_are_counted_by_the_batch_of_each_step(tmp_path, clock):
    with RunLog(tmp_path, quiet=True, flops_per_image=1e9, peak_flops=1e12) as run:
        run.start_stage("mae", 0, 1, 0, 100, 200)
        run.tick(1)
        for step in range(2, 6):
            clock.now += 0.5
            run.tick(step)
            if step == 3:  # two steps of 200 images, then two of 50 that cost four times as much
                run.cost(50, 4e9)
        run.log(5, {"loss": 1.0})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["images_per_second"] == pytest.approx((2 * 200 + 2 * 50) / 2)
    assert record["mfu"] == pytest.approx((2 * 200 * 1e9 + 2 * 50 * 4e9) / 2 / 1e12)


def test_no_mfu_without_a_known_peak(tmp_path):
    train(tmp_path, 1, 10)
    assert not any("mfu" in record for record in read_metrics(tmp_path / "metrics.jsonl"))
