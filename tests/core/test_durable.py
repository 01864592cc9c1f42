"""Folders and files that are there whole, whose they are, and what a kill leaves of them."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.core import durable
from engine.core.durable import clear, new_folder, write_file, write_folder

ROOT = Path(__file__).parents[2]
# Writes over what is there, and is killed at a point of it, or says there that it lives and waits for word to go on.
WRITER = """
import os, shutil, signal, sys
from pathlib import Path
from engine.core import durable

place, point, calls = Path(sys.argv[1]), sys.argv[2], {"rename": 0}


def here(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)
    if point == "waits " + name:
        print("here", flush=True)
        sys.stdin.readline()


def told(owner, name, counted=False):
    inner = getattr(owner, name)

    def tell(*given, **named):
        calls[name] = calls.get(name, 0) + 1
        here(f"{name} {calls[name]}" if counted else name)
        return inner(*given, **named)

    setattr(owner, name, tell)


told(Path, "rename", counted=True)
told(Path, "replace")
told(shutil, "rmtree")


def fill(aside):
    (aside / "one").write_text("new")
    here("fill")
    (aside / "two").write_text("new")


def write(aside):
    aside.write_text("new")
    here("write")


durable.write_folder(place / "folder", fill) if sys.argv[3] == "folder" else durable.write_file(place / "file.json", write)
"""


def test_folders_that_nobody_named_are_told_apart_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(str(tmp_path / "runs" / "mae")), range(16)))
    assert len(set(made)) == 16 and all(folder.is_dir() for folder in made)
    expected = {"mae-20260101-000000", *(f"mae-20260101-000000-{number}" for number in range(2, 17))}
    assert {folder.name for folder in made} == expected


def writer(place: Path, point: str, kind: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(place), point, kind]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def content(place: Path) -> dict[str, str]:
    return {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """With a folder, a file, and hidden ones that are none of ours."""
    write_folder(tmp_path / "folder", lambda aside: (aside / "one").write_text("old"))
    write_file(tmp_path / "file.json", lambda aside: aside.write_text("old"))
    for foreign in (".DS_Store", ".my-settings", ".file.json.aside", ".file-a1b2c3d4.json"):
        (tmp_path / foreign).write_text("foreign")
    return tmp_path


@pytest.mark.parametrize(
    ("point", "kind", "became"),
    [
        ("fill", "folder", {"folder/one": "old"}),
        ("rename 1", "folder", {"folder/one": "old"}),
        ("rename 2", "folder", {"folder/one": "old"}),  # between the two
        ("rmtree", "folder", {"folder/one": "new", "folder/two": "new"}),
        ("write", "file", {"file.json": "old"}),
        ("replace", "file", {"file.json": "old"}),
    ],
)
def test_what_a_kill_leaves_is_cleared_and_what_it_took_away_is_back(
    point: str, kind: str, became: dict[str, str], place: Path
):
    before = content(place)
    killed = writer(place, point, kind)
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    assert content(place) != before or point == "rename 1", "something is left"
    assert clear(place) == ([place / "folder"] if point == "rename 2" else [])
    untouched = {name: text for name, text in before.items() if not name.startswith(kind)}
    assert content(place) == untouched | became
    assert sorted(path.name for path in place.iterdir()) == sorted({name.split("/")[0] for name in before})


@pytest.mark.parametrize("point", ["fill", "rename 2"])
def test_the_next_writer_of_a_folder_clears_what_is_left_of_it_and_nothing_else(point: str, place: Path):
    writer(place, point, "folder").communicate(timeout=60)
    writer(place, "write", "file").communicate(timeout=60)
    left = set(place.glob(".file.json.aside-*.json"))
    assert len(left) == 1 and set(place.glob(".folder.*"))
    with pytest.raises(ZeroDivisionError):
        write_folder(place / "folder", lambda _: 1 / 0)
    assert (place / "folder" / "one").read_text() == "old"
    assert not set(place.glob(".folder.*")) and set(place.glob(".file.json.aside-*.json")) == left


@pytest.mark.parametrize(
    ("point", "kind"), [("waits fill", "folder"), ("waits rename 2", "folder"), ("waits write", "file")]
)
def test_what_a_process_writes_that_lives_stays(point: str, kind: str, place: Path):
    lives = writer(place, point, kind)
    assert lives.stdout.readline() == "here\n"
    before = content(place)
    assert clear(place) == [] and content(place) == before
    lives.communicate("go on\n", timeout=60)
    assert lives.returncode == 0
    assert (place / ("folder/two" if kind == "folder" else "file.json")).read_text() == "new"
    assert not [path for path in place.iterdir() if ".aside-" in path.name]


def test_a_file_that_is_cleared_before_it_is_locked_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch):
    lock, cleared = durable.fcntl.flock, []

    def later(descriptor: int, how: int) -> None:
        if not cleared:
            cleared.append(True)
            monkeypatch.setattr(durable.fcntl, "flock", lock)
            clear(place)
        lock(descriptor, how)

    monkeypatch.setattr(durable.fcntl, "flock", later)
    write_file(place / "file.json", lambda aside: aside.write_text("new"))
    assert cleared and (place / "file.json").read_text() == "new"


def test_where_there_are_no_locks_nothing_is_cleared(place: Path, monkeypatch: pytest.MonkeyPatch):
    def has_none(*_) -> None:
        raise OSError

    monkeypatch.setattr(durable.fcntl, "flock", has_none)
    (place / ".file.json.aside-a1b2c3d4.json").write_text("whose?")
    before = content(place)
    assert clear(place) == [] and content(place) == before
    write_file(place / "file.json", lambda aside: aside.write_text("new"))
    assert (place / "file.json").read_text() == "new"
