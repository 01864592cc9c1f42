"""A cache that was filled without a GPU is the one that launches look into."""

from pathlib import Path

import pytest

from tests.null_device import compiled_ahead

pytestmark = [pytest.mark.null_device, pytest.mark.exhaustive, pytest.mark.long, pytest.mark.timeout(1800)]


def test_a_second_process_compiles_nothing_again(library: Path, tmp_path: Path):
    found = []
    for scratch in ("first", "second"):
        (tmp_path / scratch).mkdir()
        flags = ["--smoke", "--ops", "adamw", "patches"]
        count = compiled_ahead.fill(tmp_path / "cache", 90, flags, library, tmp_path / scratch)
        found.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.cubin")})
        assert count == len(found[-1])
    assert found[0] == found[1]
    assert {path.stem for path in found[0]} >= {"_adamw", "_gather", "_loss_forward", "_loss_backward"}
