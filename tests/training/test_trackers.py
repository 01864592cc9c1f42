import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.logged import train


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    train(tmp_path, 1, 9)
    train(tmp_path, 7, 20, resume_at=6)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(2, 21, 2))
    assert losses[-1].value == pytest.approx(1 / 20)
    assert [event.step for event in events.Scalars("probe/rank_me")] == [5, 10, 15, 20]
