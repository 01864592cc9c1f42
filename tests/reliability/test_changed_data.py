"""A run goes on with the images it began with, wherever they lie now, with others only knowingly; and ranks see the same."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from engine.train import main
from engine.training import checkpoint
from tests.ranks import torchrun
from tests.reliability.images import FLAGS, folder_of_images
from tests.sealed import resealed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a finished run on them, that was started there."""
    home = tmp_path_factory.mktemp("made")
    folder_of_images(home / "images")
    with contextlib.chdir(home):
        assert main([*FLAGS, "--data", "images", "--out", "run"]) == 0
    return home


@pytest.fixture
def run(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that run, for a test of its own, and of its images, where that run looks for them."""
    data, out = tmp_path / "images", shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "images", data)
    config = json.loads((out / "config.json").read_text())
    assert config["train"]["data"] == str(made / "images"), "absolute, so that any working directory finds them"
    resealed(out, lambda content: content["train"].update(data=str(data)))
    return out, data


def resumed(capsys: pytest.CaptureFixture, out: Path, *flags: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["--resume", str(out), *flags])
    told = capsys.readouterr()
    return status, told.out + told.err


def test_a_run_goes_on_with_other_images_only_knowingly(run: tuple[Path, Path], capsys: pytest.CaptureFixture):
    out, data = run
    for index in (7, 8, 9, 10):
        Image.new("RGB", (40, 36)).save(data / "train" / "dog" / f"{index}.png")
    before = checkpoint.found(out / "checkpoints")
    status, told = resumed(capsys, out)
    assert status == 2 and "12 images instead of 8" in told and "--changed-data" in told and told.count("error") == 1
    assert checkpoint.found(out / "checkpoints") == before, "nothing is trained, nothing is written"
    status, told = resumed(capsys, out, "--changed-data")
    assert status == 0 and "going on with other images" in told and "6 of 6 steps" in told
    # these are the run's images now
    assert resumed(capsys, out)[0] == 0


def test_classes_that_swap_labels_are_seen(run: tuple[Path, Path], capsys: pytest.CaptureFixture):
    out, data = run
    (data / "train" / "dog").rename(data / "train" / "ant")
    status, told = resumed(capsys, out)
    assert status == 2 and "'ant' new, 'dog' gone" in told


def test_images_may_move(run: tuple[Path, Path], capsys: pytest.CaptureFixture, tmp_path: Path):
    out, data = run
    data.rename(tmp_path / "elsewhere")
    status, told = resumed(capsys, out)
    assert status == 2 and str(data) in told
    assert resumed(capsys, out, "--data", str(tmp_path / "elsewhere"))[0] == 0


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_so(run: tuple[Path, Path], capsys: pytest.CaptureFixture):
    out, _ = run
    newest = checkpoint.found(out / "checkpoints")[0]
    where = json.loads((newest / "state.json").read_text())
    del where["images"]
    (newest / "state.json").write_text(json.dumps(where))
    hashes = json.loads((newest / "manifest.json").read_text())
    hashes["state.json"] = checkpoint._sha256(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(hashes))
    status, told = resumed(capsys, out)
    assert status == 0 and "did not note which images it saw" in told


BY_RANKS = """
import os, sys
from engine.train import main
sys.exit(main([*sys.argv[3:], "--data", sys.argv[1 + int(os.environ["RANK"])]]))
"""


@pytest.mark.long
def test_ranks_with_copies_of_their_own_must_see_the_same(tmp_path: Path):
    one, other = folder_of_images(tmp_path / "one"), folder_of_images(tmp_path / "other", ("cow", "dog"))
    script = tmp_path / "by_ranks.py"
    script.write_text(BY_RANKS)
    done = subprocess.run(
        torchrun(2, str(script), str(one), str(other), *FLAGS, "--out", str(tmp_path / "run")),
        capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = "ranks see other images than rank 0: rank 1 has other classes ('cow' new, 'cat' gone)"
    assert done.returncode != 0 and done.stderr.count(told) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_what_one_rank_alone_finds_wrong_is_said(tmp_path: Path):
    one = folder_of_images(tmp_path / "one")
    script = tmp_path / "by_ranks.py"
    script.write_text(BY_RANKS)
    done = subprocess.run(
        torchrun(2, str(script), str(one), "/no/such/folder", *FLAGS, "--out", str(tmp_path / "run")),
        capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error (rank 1): /no/such/folder is no folder") == 1
