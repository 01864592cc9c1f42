"""config.json is read as it was written, or refused in a sentence: changed by hand, incomplete, of a later version."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.errors import BadInput
from engine.training import config, config_file
from tests.sealed import resealed

FLAGS = ["--method", "maect", "--model", "vit_micro_patch8_32", "--graphs", "off", "--epochs", "3", "2", "1"]
EARLIER = Path(__file__).parents[1] / "reliability" / "earlier"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(config.parse(FLAGS).as_json())
    return tmp_path


def test_what_was_written_is_read(run: Path):
    before, now = config.parse(FLAGS), config.parse(["--resume", str(run)])
    assert now.stages == before.stages and now.train.epochs == (3, 2, 1) and now.encoder == before.encoder


def test_a_value_changed_by_hand_is_found(run: Path):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(re.sub(r'"seed": 0', '"seed": 1', text))
    with pytest.raises(BadInput, match="was changed since the run wrote it"):
        config.parse(["--resume", str(run)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["train"].pop("seed"), "lacks seed of the run"),
        (lambda c: c["stages"][1].pop("queue_size"), "lacks queue_size of stage nnclr"),
        (lambda c: c["train"].update(novel=3), "has an unknown novel of the run"),
        (lambda c: c.pop("stages"), "is not a configuration this version wrote"),
        (lambda c: c.update(stages=[3]), "is not a configuration this version wrote"),
        (lambda c: c.update(version=9), "is of version 9, and this program knows up to"),
        (lambda c: c.update(version="x"), "is of version 'x'"),
    ],
)
def test_what_is_missing_unknown_or_later_is_refused_by_name(change: Callable, said: str, run: Path):
    resealed(run, change)
    with pytest.raises(BadInput, match=said):
        config.parse(["--resume", str(run)])


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '{"version": 1}', "null"])
def test_what_is_no_configuration_is_refused(content: str, run: Path):
    (run / "config.json").write_text(content)
    with pytest.raises(BadInput, match=r"is not a configuration|was changed since"):
        config.parse(["--resume", str(run)])


def test_versions_without_a_number_did_what_there_was():
    plan = config.parse(["--resume", str(EARLIER / "maect")])
    assert (plan.train.residual, plan.train.recompute, plan.train.graphs, plan.train.calibrate) == (
        "fp32",
        "none",
        "off",
        "never",
    )
    assert plan.train.compile in ("on", "off") and [name for name, _ in plan.stages] == ["mae", "nnclr", "maect"]


def test_earlier_runs_go_on_with_the_encoder_they_began_with():
    for method in ("maect", "dinov2"):
        encoder = config.parse(["--resume", str(EARLIER / method)]).encoder
        assert (encoder["initialisation"], encoder["interpolation"]) == ("xavier", "antialiased")
    assert config.parse(["--method", "dinov2", "--preset", "plain"]).encoder["interpolation"] == "offset"


def test_earlier_runs_go_on_with_the_colours_they_began_with():
    ((_, earlier),) = config.parse(["--resume", str(EARLIER / "mocov3-2")]).stages
    assert (earlier.augmentation, earlier.colours) == ("byol", "linear")
    begun = dict(config.parse(["--method", "maect", "--preset", "aug"]).stages)
    assert (begun["nnclr"].augmentation, begun["nnclr"].colours, begun["maect"].colours) == (
        "byol",
        *["torchvision"] * 2,
    )
    (beit,) = config.parse(["--method", "beit", "--preset", "plain", "--beit.colours", "linear"]).stages
    assert beit[1].colours == "linear"
    with pytest.raises(BadInput, match=r"--dino.colours is hsv; it must be one of torchvision, linear"):
        config.parse(["--method", "dino", "--dino.colours", "hsv"])


def test_every_version_has_a_way_to_this_one():
    assert len(config_file.MIGRATIONS) == config_file.VERSION
