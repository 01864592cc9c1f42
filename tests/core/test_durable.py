"""Folders and files that are there whole, and whose they are."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.core.durable import new_folder


def test_folders_that_nobody_named_are_told_apart_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(str(tmp_path / "runs" / "mae")), range(16)))
    assert len(set(made)) == 16 and all(folder.is_dir() for folder in made)
    expected = {"mae-20260101-000000", *(f"mae-20260101-000000-{number}" for number in range(2, 17))}
    assert {folder.name for folder in made} == expected
