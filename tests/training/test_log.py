import json
import math

import pytest

from engine.training.log import RunLog
from tests.training.logged import console


@pytest.mark.parametrize("options", [{"folder": None}, {"rank": 1}])
def test_dry_runs_and_other_ranks_write_nothing(tmp_path, options):
    out = console()
    with RunLog(**{"folder": tmp_path / "run", "console": out} | options) as run:
        run.resume(3)
        run.start_stage("mae", 0, 1, 0, 10, 64)
        run.tick(4)
        run.log(4, {"loss": 1.0})
        run.log(4, {"rank_me": 1.0}, kind="probe")
        run.close({"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert bool(out.file.getvalue()) == (options.get("rank", 0) == 0)


def test_summary_is_strict_and_whole(tmp_path):
    run = RunLog(tmp_path / "run", quiet=True)
    run.close({"knn_top1": 91.0, "stages": [{"loss": math.nan}], "seconds": math.inf, "done": True, "out": tmp_path})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn_top1"] == 91.0
    assert summary["done"] is True
    assert summary["out"] == str(tmp_path)
    assert summary["not_finite"] == {"stages.0.loss": "nan", "seconds": "inf"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_unknown_kinds_and_names_of_the_line_are_refused(tmp_path):
    run = RunLog(tmp_path, quiet=True)
    with pytest.raises(ValueError, match="train, probe, event"):
        run.log(1, {"loss": 1.0}, kind="validation")
    with pytest.raises(ValueError, match="step, time cannot be logged"):
        run.log(1, {"step": 1.0, "time": 2.0})
