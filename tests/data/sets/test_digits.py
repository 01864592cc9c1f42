import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from engine.core.errors import BadInput
from engine.data.sets import digits


def test_the_set_is_complete_and_split_in_proportion(tmp_path):
    home = digits.write(tmp_path)
    train, val = sorted(home.glob("train/*/*.png")), sorted(home.glob("val/*/*.png"))
    assert (len(train), len(val)) == (1437, 360)
    assert {path.stem for path in train}.isdisjoint(path.stem for path in val)
    for label in range(10):
        share = len(list(home.glob(f"val/{label}/*"))) / len(list(home.glob(f"*/{label}/*")))
        assert abs(share - 0.2) < 0.005
    source = load_digits()
    for path in train[::200]:
        index = int(path.stem)
        assert path.parent.name == str(source.target[index])
        with Image.open(path) as image:
            assert image.size == (32, 32)
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float) * 16 / 255
        assert np.abs(small - source.images[index]).mean() < 1


def test_a_second_write_changes_nothing_and_a_damaged_set_is_written_again(tmp_path):
    home = digits.write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*.png")}
    digits.write(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in home.rglob("*.png")}
    next(iter(before)).unlink()
    digits.write(tmp_path)
    assert len(list(home.rglob("*.png"))) == 1797
    assert {path.name for path in tmp_path.iterdir()} == {digits.NAME, digits.NAME + ".lock"}


def test_processes_that_write_together_get_one_whole_set(tmp_path):
    code = (
        f"from pathlib import Path; from engine.data.sets import digits; print(digits.write(Path({str(tmp_path)!r})))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    homes = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert homes == {str(tmp_path / digits.NAME)}
    assert len(json.loads((tmp_path / digits.NAME / "manifest.json").read_text())) == 1797


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="TESSERA_CACHE"):
        digits.write(tmp_path / "file")
