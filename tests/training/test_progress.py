import pytest

from engine.training.log import RunLog
from tests.training.logged import Clock, console, shown, train


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_plain_lines_come_seldom_and_say_what_matters(clock):
    with RunLog(None, console=console(), flops_per_image=2e9, peak_flops=1e12) as run:
        run.start_stage("nnclr", 1, 3, 1000, 1000, 64)
        for step in range(1001, 2001):
            clock.now += 1
            run.tick(step)
            if step % 4 == 0:
                run.log(step, {"loss": 0.51234567, "lr": 1.5e-4})
        run.message("a message")
    lines = shown(run).splitlines()
    assert lines[0] == "stage 2/3 nnclr: step 1,001 to 2,000, 64 images a step"
    assert lines[1].startswith("stage 2/3 nnclr: 4 of 1,000 steps, 17 min left")
    for word in ("loss 0.5123", "lr 1.50e-04", "64 images/s", "MFU 12.8%"):
        assert word in lines[1]
    # 1,000 s: every 10 s for five minutes, then once a minute; two lines more at either end.
    assert 30 + 11 <= len(lines) <= 30 + 11 + 5
    assert lines[-1].startswith("stage 2/3 nnclr: 1,000 of 1,000 steps  ·") or lines[-1] == "a message"
    assert all(len(line) < 120 for line in lines)


def test_slow_steps_show_progress_between_logs(clock):
    with RunLog(None, console=console()) as run:
        run.start_stage("mae", 0, 1, 0, 100, 64)
        for step in range(1, 5):
            clock.now += 30
            run.tick(step)
    assert "mae: 2 of 100 steps, 49 min left" in shown(run)


def test_a_terminal_gets_a_bar_and_messages_above_it():
    with RunLog(None, console=console(terminal=True)) as run:
        run.start_stage("mae", 0, 2, 0, 10, 64)
        for step in range(1, 11):
            run.tick(step)
            run.log(step, {"loss": 0.25, "lr": 1e-3})
        run._progress._live.refresh()
        run.log(10, {"knn_top1": 91.23456, "verdict": "healthy: all is well"}, kind="probe")
        run.start_stage("nnclr", 1, 2, 10, 10, 64)
    text = shown(run)
    assert "━" in text
    assert "10 of 10 steps" in text
    assert "loss 0.25" in text
    assert "probe at step 10: knn_top1 91.23; healthy: all is well" in text
    assert "stage 1/2 mae: 10 of 10 steps in 0 s" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor is hidden, and comes back


def test_the_terminal_is_given_back_when_training_fails():
    run = RunLog(None, console=console(terminal=True))

    def train_and_fail():
        with run:
            run.start_stage("mae", 0, 1, 0, 10, 64)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train_and_fail()
    assert shown(run).rstrip().count("\x1b[?25h") == 1


def test_quiet_shows_nothing(tmp_path, capsys):
    train(tmp_path, 1, 10)
    assert capsys.readouterr().out == ""


def test_a_resumed_stage_goes_on_where_it_was():
    with RunLog(None, console=console()) as run:
        run.resume(7)
        run.start_stage("mae", 0, 1, 0, 10, 64)
        run.log(8, {"loss": 1.0})
    assert "step 8 to 10, 64 images a step (resumed)" in shown(run)
    assert "8 of 10 steps" in shown(run)
