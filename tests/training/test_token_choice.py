"""Phases that a run chooses by the errors of gradients: the rule where the answer is known, that a look changes nothing, and that
a run that chooses goes on bit for bit wherever it stopped."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import methods, plan, train
from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group
from engine.core.phases import WHOLE, Phase
from engine.data.batch import Batch
from engine.methods.base import Method
from engine.methods.mae import Settings
from engine.training import config, dry_run, token_choice
from engine.training.build import build
from engine.training.metrics import read_metrics
from engine.training.operations import cheapest, costs, operations
from engine.training.parts import Parts, prepare
from engine.training.state import position, restore
from engine.training.step import Update
from engine.training.token_choice import PAIRS, Measured, best, measured
from tests.faults.runs import BATCH, ROOT, End, flags, images
from tests.planning.counts import made
from tests.ranks import torchrun
from tests.training.test_phases import assert_equal, tensors
from tests.training.test_phases import train as trained

STEPS = 10  # of a stage, two in each stretch
OTHERS = {
    name: pytest.mark.long if name == "dino" else pytest.mark.exhaustive
    for name in methods.names()
    if name != "mae" and (methods.get(name).shrinks or methods.get(name).drops_patches)
}


@pytest.fixture
def ranks() -> dist.Ranks:
    return dist.start("cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at two batches, and two candidates."""
    monkeypatch.setattr(token_choice, "PAIRS", 1)
    monkeypatch.setattr(token_choice, "CANDIDATES", (Phase(0.5), Phase(keep=0.5)))


def parts_of(method: str, data: Path, ranks: dist.Ranks, *more: str) -> Parts:
    return prepare(config.parse([*flags(method, images(data), epochs=STEPS // 2), "--tokens", "auto", *more]), ranks)


class Planted(Method):
    """Whose gradient is what its image says, so that what phases make of it is known."""

    name, Settings = "planted", Settings
    DIMENSIONS = 6

    def __init__(self):
        nn.Module.__init__(self)
        self.settings, self.weight = Settings(batch_size=1, epochs=1), nn.Parameter(torch.zeros(self.DIMENSIONS))
        self.encoder = nn.Module()
        self.unused = nn.Parameter(torch.zeros(2))
        self.classifier, self.phase = None, WHOLE
        self.commits: list[bool] = []

    def views(self) -> tuple:
        return ()

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return {}

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        gradient = images[0][0] + (0.0 if self.phase == WHOLE else 0.25) * (self.phase.side < 1)
        gradient = gradient * (3.0 if self.phase.keep < 1 else 1.0)
        return {"loss": (self.weight * gradient).sum()}

    def groups(self, images_per_step: int) -> Iterator[Group]:
        yield Group({"weight": self.weight, "unused": self.unused}, 1e-3, 0.0)

    def flops_per_image(self) -> float:
        return {WHOLE: 4.0, Phase(0.5): 1.0, Phase(keep=0.5): 2.0}[self.phase]

    def averages(self) -> Iterator:
        yield from ()

    def after_step(self, applied: Tensor) -> None:
        self.commits.append(bool(applied))


def no_draws(number: int) -> Draws:
    return Draws(0, number, batch=1, rows=slice(None), device=torch.device("cpu"))


def test_bias_and_variance_are_those_of_gradients_that_are_known():
    """A side adds 1/4 to each of six numbers, and no variance; patches treble a gradient, so their bias is twice the mean."""
    method = Planted()
    update, gradients = (
        Update(method, 4),
        torch.randn(2 * PAIRS, method.DIMENSIONS, generator=torch.Generator().manual_seed(3)),
    )
    gradients += 1.0

    def batches() -> Iterator[Batch]:
        for row in gradients:
            yield Batch(torch.zeros(1, dtype=torch.int64), (row[None],), None, 0)

    before = method.weight.detach().clone()
    method.phase = Phase(0.9)  # of a graph that may be captured
    side, keep, whole = measured(update, 0, [Phase(0.5), Phase(keep=0.5), WHOLE], batches, no_draws)
    one, two = gradients.double()[::2], gradients.double()[1::2]
    variance = float((one - two).square().sum() / 2 / PAIRS)
    assert (whole.bias, whole.cost) == (0.0, 1.0) and whole.variance == pytest.approx(variance)
    assert side.bias == pytest.approx(6 * 0.25**2) and side.variance == pytest.approx(variance) and side.cost == 0.25
    assert keep.bias == pytest.approx(float((2 * one * 2 * two).sum() / PAIRS))
    assert keep.variance == pytest.approx(9 * variance) and keep.cost == 0.5
    assert side.error == pytest.approx(6 * 0.25**2 + variance / 4)
    assert best([side, keep, whole]) == side.phase
    assert torch.equal(method.weight, before) and method.weight.grad is None
    assert method.phase == Phase(0.9) and not any(method.commits)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({Phase(0.5): (0.0, 4.0, 0.25), WHOLE: (0.0, 2.0, 1.0)}, Phase(0.5)),  # 1 against 2
        ({Phase(0.5): (1.5, 4.0, 0.25), WHOLE: (0.0, 2.0, 1.0)}, WHOLE),  # the bias has grown
        ({Phase(0.5): (1.0, 4.0, 0.25), WHOLE: (0.0, 2.0, 1.0)}, Phase(0.5)),  # equal: the cheapest
        ({Phase(0.5): (float("nan"), 1.0, 0.25), WHOLE: (0.0, 2.0, 1.0)}, WHOLE),
        ({Phase(0.5): (float("inf"), 1.0, 0.25), WHOLE: (float("nan"), 2.0, 1.0)}, WHOLE),
    ],
)
def test_the_least_error_is_taken(errors: dict[Phase, tuple[float, float, float]], expected: Phase):
    assert best([Measured(phase, *numbers) for phase, numbers in errors.items()]) == expected


@pytest.mark.parametrize("method", ["mae", *(pytest.param(name, marks=mark) for name, mark in OTHERS.items())])
def test_a_look_changes_nothing(method: str, tmp_path: Path, ranks: dist.Ranks, few: None):
    """Not of dino's centre and statistics either: whatever is chosen, if it is all tokens the run is one without a choice."""
    ends = []
    for words in (["--tokens", "none"], ["--tokens", "auto", f"--{method}.phases", "0", "0.5"]):
        parts = parts_of(method, tmp_path, ranks, *words)
        state = build(parts, len(parts.stages) - 1, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.training.feeding.best", lambda table: WHOLE)
            ends.append((trained(parts, state, 6), tensors(state)))
        assert state.chosen == ({method: [WHOLE]} if "auto" in words else {})
    assert ends[0][0] == ends[1][0]
    assert_equal(ends[0][1], ends[1][1])


def test_a_run_that_chooses_goes_on_bit_for_bit(tmp_path: Path, ranks: dist.Ranks, few: None):
    parts = parts_of("mae", tmp_path, ranks)
    whole = build(parts, 0, None)
    losses = trained(parts, whole, STEPS)
    assert len(whole.chosen["mae"]) == 4
    for stop in (3, 4):  # within a stretch, and where one begins, which is chosen anew
        parts = parts_of("mae", tmp_path, ranks)
        half = build(parts, 0, None)
        begun = trained(parts, half, stop)
        kept, where = tensors(half), json.loads(json.dumps(position(half)))
        again = build(parts, 0, None, anew=False)
        restore(again, kept, where)
        assert again.chosen == half.chosen == {"mae": whole.chosen["mae"][:2]}
        assert begun + trained(parts, again, STEPS) == losses
        assert again.chosen == whole.chosen
        assert_equal(tensors(again), tensors(whole))


def test_a_run_says_what_it_chose_and_why(tmp_path: Path, few: None):
    out = tmp_path / "run"
    words = [*flags("mae", images(tmp_path / "images"), epochs=STEPS // 2), "--tokens", "auto", "--out", str(out)]
    assert train.main(words) == 0
    notes = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    choices = [note for note in notes if note["event"] == "tokens"]
    assert [note["step"] for note in choices] == [0, 2, 4, 6]
    for note in choices:
        assert len(note["measured"]) == len(token_choice.CANDIDATES) + 1
        least = min(note["measured"], key=lambda one: (one["error"], one["cost"]))
        assert {name: least[name] for name in note["chosen"]} == note["chosen"]
        for one in note["measured"]:
            assert one["error"] == pytest.approx(one["bias"] + one["variance"] * one["cost"])
    chosen = {"mae": [Phase.read(note["chosen"]) for note in choices]}
    parts = prepare(config.parse(words), dist.start("cpu"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["operations"] == {"mae": pytest.approx(operations(parts.plan, parts.stages, 2, chosen)["mae"])}
    assert End.of(out).step == STEPS
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]
    shown = [phase for phase in [*chosen["mae"], WHOLE] for _ in range(2)]
    cost = costs(parts.plan, 0, shown)
    spent = [BATCH * sum(cost[phase] for phase in shown[:step]) for step in range(1, STEPS + 1)]
    assert [line["operations"] for line in lines] == pytest.approx(spent)


@pytest.mark.long
def test_two_processes_choose_as_one_does(tmp_path: Path):
    words = [*flags("mae", images(tmp_path / "images"), epochs=1), "--tokens", "auto", "--mae.phases", "0", "0.5"]
    runs = []
    for count in (1, 2):
        out = tmp_path / str(count)
        arguments = ("-m", "engine.train", *words, "--out", str(out))
        command = torchrun(2, *arguments) if count == 2 else [sys.executable, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        notes = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        runs.append([note for note in notes if note["event"] == "tokens"])
    assert len(runs[0]) == len(runs[1]) == 1
    for alone, together in zip(*runs, strict=True):
        assert alone["chosen"] == together["chosen"]
        for one, other in zip(alone["measured"], together["measured"], strict=True):
            for drawn in ("draws", "sides"):  # approx takes no lists
                assert one.pop(drawn) == other.pop(drawn)
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_operations_are_those_of_what_was_chosen_and_of_choosing(tmp_path: Path, ranks: dist.Ranks):
    parts = parts_of("mae", tmp_path, ranks)
    cost = costs(parts.plan, 0, [*token_choice.CANDIDATES, WHOLE])
    half = Phase(0.5)
    found = operations(parts.plan, parts.stages, chosen={"mae": [half, half, WHOLE, half]})
    looks = 4 * 2 * PAIRS * 4 * sum(cost.values())
    assert found == {"mae": pytest.approx(looks + 4 * (6 * cost[half] + 4 * cost[WHOLE]))}
    assert operations(parts.plan, parts.stages) == {"mae": pytest.approx(STEPS * 4 * cost[WHOLE])}
    least = min(token_choice.CANDIDATES, key=cost.get)
    assert cheapest(parts.plan, parts.stages) == {"mae": [least] * 4}


def test_a_plan_says_between_what_it_lies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    seen = []
    monkeypatch.setattr(plan, "count", lambda parsed, flags, portion, *others: seen.append(portion) or made())
    assert plan.main("--method mae --model vit_small_patch16_224 --gpu H200 --tokens auto".split()) == 0
    assert [(one.name, one.phase == WHOLE) for one in seen] == [("mae, phase 1", False), ("mae, phase 2", True)]
    assert seen[0].steps == pytest.approx(4 * seen[1].steps, rel=1e-3)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("auto: between ")]
    assert "where the cheapest is chosen each time" in line and "where all tokens are" in line


def test_a_dry_run_says_between_what_it_lies(
    tmp_path: Path, ranks: dist.Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        dry_run, "_measure", lambda parts, state: dry_run._Measured(1.0, 0.001 / state.method.phase.side, 0.0)
    )
    monkeypatch.setattr(token_choice, "CANDIDATES", (Phase(0.5),))
    parts = parts_of("mae", tmp_path, ranks)
    assert dry_run.dry_run(parts) == 0
    said = capsys.readouterr().out
    # forty images, at a thousandth a second or two: eight steps of ten may be the cheap ones
    assert "mae, phase 1" in said and "mae, phase 2" in said
    assert (
        f"about {(32 / 0.002 + 8 / 0.001) / 3600:,.2f} hours (where auto takes the cheapest each time; {40 / 0.001 / 3600:,.2f}"
        in said
    )


@pytest.mark.parametrize(
    ("method", "words", "sentence"),
    [
        ("beit", [], "--tokens auto cannot be had: no stage of beit can do with fewer tokens so."),
        (
            "simmim",
            ["--tokens", "none", "--simmim.phases", "0", "0.5", "--simmim.phase-choice", "auto"],
            "--simmim.phase-choice auto",
        ),
        ("mae", ["--mae.phase-clock", "compute"], "--mae.phase-choice is auto; it must be given, or auto where"),
        ("mae", ["--mae.phase-batch", "grow"], "--mae.phase-choice is auto; it must be given, or auto where"),
        ("mae", ["--mae.phases", "0"], "--mae.phase-choice is auto; it must be given, or auto where"),
    ],
)
def test_what_cannot_be_had_is_refused(method: str, words: list[str], sentence: str, tmp_path: Path, ranks: dist.Ranks):
    with pytest.raises(BadInput) as refused:
        parts_of(method, tmp_path, ranks, *words)
    assert str(refused.value).startswith(sentence)
