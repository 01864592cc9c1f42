"""Two studies don't work in one folder."""

import subprocess
from pathlib import Path

import pytest

from engine.core.errors import BadInput
from engine.studies.conduct.lock import locked


def test_a_killed_study_is_not_begun_beside_the_training_it_left(tmp_path: Path):
    with locked(tmp_path / "out") as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        with pytest.raises(BadInput, match="at work"), locked(tmp_path / "out"):
            pass
    with pytest.raises(BadInput, match="at work"), locked(tmp_path / "out"):
        pass
    left.kill()
    left.wait()
    with locked(tmp_path / "out"):
        pass
