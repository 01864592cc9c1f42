"""A run whose prototypes collapse says so; the same run with something against it says that it is healthy."""

import json
from pathlib import Path

import pytest

from engine import train


@pytest.mark.long
@pytest.mark.parametrize(("choice", "word"), [("none", "collapsing"), ("sinkhorn", "healthy")])
def test_the_verdict_tells_collapse(tmp_path: Path, choice: str, word: str):
    flags = "--method dino --epochs 2 --probe-every 1 --save-every 0 --no-evaluate --collapse".split()
    assert train.main([*flags, choice, "--out", str(tmp_path / "run")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "probe"][-1]
    assert last["verdict"].startswith(f"{word}:"), last["verdict"]
