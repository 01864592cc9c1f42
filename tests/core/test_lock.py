"""Two processes don't work in one folder."""

import subprocess
from pathlib import Path

import pytest

from engine.core.errors import BadInput
from engine.core.lock import held


def test_a_killed_parent_is_not_begun_again_beside_the_child_it_left(tmp_path: Path):
    with held(tmp_path / "out", "--out out", "another study") as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        with pytest.raises(BadInput, match="at work"), held(tmp_path / "out", "--out out", "another study"):
            pass
    with pytest.raises(BadInput, match="at work"), held(tmp_path / "out", "--out out", "another study"):
        pass
    left.kill()
    left.wait()
    with held(tmp_path / "out", "--out out", "another study"):
        pass
