"""The short form of `python -m tests.faults`: a sample of every part, with nothing in it that was not as it should be."""

import random
from pathlib import Path

import pytest

from tests.faults import fuzzing, hostile, kills, points, ranks
from tests.faults.readers import Reader, readers
from tests.faults.results import Part
from tests.faults.runs import Call, Server, Subject

pytestmark = pytest.mark.faults
long = pytest.mark.long


def progress(*_: object) -> None:
    """Nobody is told."""


def is_sound(part: Part, least: int) -> None:
    assert part.failures == [] and part.sound and part.injected >= least


@long
def test_a_run_that_dies_at_any_of_its_calls_ends_equal(mae: Subject):
    part, found = Part("kills"), points.kills(mae.calls)
    met = {call.place for call in mae.calls}
    assert {"checkpoints", "export", "stages", "summary", "cache", "config", "metrics.jsonl"} <= met
    assert {"write", "flush", "rename", "unlink", "rmdir"} <= {c.kind for c in mae.calls if c.place == "checkpoints"}
    points.meet(mae, points.spread(found, 16), part, progress)
    is_sound(part, 16)


@long
def test_a_call_that_fails_is_told_in_a_true_sentence(mae: Subject):
    part = Part("errors")
    points.meet(mae, points.spread(points.errors(mae.calls), 14), part, progress)
    points.odd_file_systems(mae, part)
    is_sound(part, 17)
    assert {"status 0", "status 2"} <= part.outcomes.keys()


@long
@pytest.mark.parametrize("method", ["maect"])
def test_a_run_of_several_stages_that_is_killed_again_and_again_ends_equal(method: str, server: Server, scratch: Path):
    part = Part("kills")
    kills.kill(Subject(server, scratch / "kills", method), 6, random.Random(0), part, progress)
    is_sound(part, 6)


@long
def test_of_two_processes_the_other_ends_and_both_go_on(server: Server, scratch: Path):
    part, pair = Part("ranks"), ranks.Pair(server, scratch, epochs=8)
    pair.disturb("killed", 0, part)
    pair.disturb("cut off", 1, part)
    is_sound(part, 2)


@long
def test_hostile_trees_archives_and_weights_are_refused_or_passed_over(server: Server, scratch: Path):
    part = Part("hostile")
    hostile.archives(server, scratch, part, every=6)
    hostile.trees(server, scratch, part)
    hostile.weights(server, scratch, part)
    is_sound(part, 13)


@long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", readers(), ids=lambda reader: reader.name)
def test_any_bytes_are_read_or_refused(reader: Reader):
    tried, fault = fuzzing.fuzz(reader, 30, 0)
    assert not fault and tried >= 30


def test_what_is_wrong_is_found(tmp_path: Path):
    """A reader that fails on a byte, waits or takes memory is told; and points lie where they are said to."""

    def fails(_: Path, content: bytes) -> None:
        if b"x" not in content:
            raise KeyError("x")

    tried, fault = fuzzing.fuzz(Reader("fails", [b"abcxdef"], fails), 100, 0)
    assert tried and fault.startswith("KeyError")
    with pytest.raises(fuzzing.Bounds, match="MiB"):
        fuzzing.check(Reader("large", [b""], lambda *_: bytearray(200 << 20)), b"")
    lines = ["1 write /a/run/checkpoints/.step-1/.tmpx", "2 rename /a/run/.export-x-former", "3 open /c/x.npz"]
    calls = [Call.of(line, Path("/a/run")) for line in lines]
    assert [call.place for call in calls] == ["checkpoints", "export", "cache"]
    assert [point.action for point in points.kills(calls)] == [
        "kill before", "kill after half", "kill after", "kill before", "kill before",
    ]  # fmt: skip
