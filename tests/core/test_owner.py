"""Two processes don't write in one folder, and the second is told who the first is."""

import errno
import fcntl
import os
import socket
import subprocess
from pathlib import Path

import pytest

from engine import train
from engine.core.errors import BadInput
from engine.core.owner import owned
from engine.training import folder
from tests.reliability.images import FLAGS, folder_of_images


def test_who_has_it_is_said_and_that_it_is_free_again(tmp_path: Path):
    who = f"process {os.getpid()} on {socket.gethostname()} has it since 20"
    with owned(tmp_path / "out"), pytest.raises(BadInput, match=who), owned(tmp_path / "out"):
        pass
    with owned(tmp_path / "out"):
        pass


def test_a_killed_study_is_not_begun_beside_the_training_it_left(tmp_path: Path):
    with owned(tmp_path / "out") as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    with pytest.raises(BadInput, match="at work: another process has it"), owned(tmp_path / "out"):
        pass
    left.kill()
    left.wait()
    with owned(tmp_path / "out"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_there_are_no_locks_it_says_so_and_works(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def has_none(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", has_none)
    said = []
    with owned(tmp_path, said.append):
        pass
    assert len(said) == 1 and "has no locks" in said[0]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot be written"), owned(tmp_path / "file" / "out"):
        pass


def test_the_next_owner_clears_what_killed_processes_left(tmp_path: Path):
    left = [
        ".summary.json.aside-a1b2c3d4.json",
        "checkpoints/.step-000000002.aside-a1b2c3d4-new/model.safetensors",
        "checkpoints/.step-000000002.aside-a1b2c3d4",
        "stages/.1-mae.aside-a1b2c3d4-former/config.json",
        "runs/mae-seed0/.export.aside-a1b2c3d4-new/config.json",  # a folder with owners of its own
    ]
    for name in (*left, "runs/mae-seed0/.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    said = []
    with owned(tmp_path, said.append):
        pass
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {".lock", "stages/1-mae/config.json", "runs/mae-seed0/.lock", left[-1]}
    assert said == [f"{tmp_path}/stages/1-mae is back: a process was killed before it had replaced it"]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_is_not_made_beside_itself(
    resumes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    folder_of_images(tmp_path / "images")
    run = tmp_path / "run"
    new = [*FLAGS, "--data", str(tmp_path / "images"), "--out", str(run)]
    if resumes:
        assert train.main(new) == 0
    else:  # both found it empty
        monkeypatch.setattr(folder, "of_run", lambda *_: run)
    with owned(run):
        before = sorted(path.name for path in run.iterdir())
        assert train.main(["--resume", str(run)] if resumes else new) == 2
        assert sorted(path.name for path in run.iterdir()) == before
    assert f"{run} is at work: process {os.getpid()} on" in capsys.readouterr().err
