"""Saves go on beside the steps: in order, of the step that they were begun at, and whole before anything is said of them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine import methods, train
from engine.core.optim import Moment
from engine.core.stopping import Interrupted
from engine.methods.base import Labels
from engine.methods.mae import Mae
from engine.model import vit, weights
from engine.training import checkpoint, folder
from engine.training.saving import NICENESS, Saving, Writer
from engine.training.state import HostCopy, TrainState, content
from engine.training.step import Update
from tests.methods.small import small
from tests.ranks import group
from tests.reliability.images import FLAGS, folder_of_images

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds for which a test waits before it fails
TENSORS = {"model": {"weight": torch.zeros(4)}, "average": {}}


def flags(tmp_path: Path, *more: str) -> list[str]:
    """Of a run of two steps an epoch, saved after each epoch."""
    if not (tmp_path / "images").exists():
        folder_of_images(tmp_path / "images")
    return [*FLAGS, "--save-every", "1", "--log-every", "1", "--data", str(tmp_path / "images"), *more]


def before_steps(monkeypatch: pytest.MonkeyPatch, do: dict[int, Callable[[], object]]) -> list[int]:
    """Does something before steps, by number; gives the steps that were begun."""
    begin, begun = Mae.begin, []

    def at(self: Mae, moment: Moment) -> None:
        begun.append(moment.step)
        do.get(moment.step, lambda: None)()
        begin(self, moment)

    monkeypatch.setattr(Mae, "begin", at)
    return begun


def test_steps_go_on_while_a_save_is_written_and_the_next_one_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    stepped, save, saved = threading.Event(), checkpoint.save, []

    def slow(where: Path, step: int, *rest) -> Path:
        assert stepped.wait(LIMIT), "no step was made meanwhile"
        time.sleep(3 if step == 2 else 1)
        path = save(where, step, *rest)
        saved.append(step)
        return path

    monkeypatch.setattr(checkpoint, "save", slow)
    before_steps(monkeypatch, {3: stepped.set})
    assert train.main(flags(tmp_path, "--epochs", "4", "--keep", "9", "--out", str(tmp_path / "run"))) == 0
    assert saved == [2, 4, 6, 8]
    assert capsys.readouterr().out.count("the next one had to wait") == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saving")]


def test_what_a_save_meets_ends_the_run_at_a_later_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failed = threading.Event()

    def fails(*_) -> None:
        failed.set()
        raise ZeroDivisionError("in the export")

    def is_over() -> None:
        assert failed.wait(LIMIT)
        time.sleep(0.5)  # the thread ends

    monkeypatch.setattr(folder, "export", fails)
    begun = before_steps(monkeypatch, {2: is_over})
    with pytest.raises(ZeroDivisionError, match="in the export"):
        train.main(flags(tmp_path, "--epochs", "9", "--out", str(tmp_path / "run")))
    assert begun == [0, 1, 2]
    assert [path.name for path in checkpoint.found(tmp_path / "run" / "checkpoints")] == ["step-000000002"]


def test_a_stop_request_and_another_error_wait_for_the_save_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Each comes in the step after a save was begun, which takes a while."""
    export, run = folder.export, tmp_path / "run"

    def slow(*given) -> None:
        time.sleep(1)
        export(*given)

    def fails() -> None:
        raise ZeroDivisionError("in a step")

    monkeypatch.setattr(folder, "export", slow)
    with monkeypatch.context() as patch:
        before_steps(patch, {2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert train.main(flags(tmp_path, "--epochs", "4", "--out", str(run))) == 0
    assert "stopped and saved" in capsys.readouterr().out
    assert checkpoint.newest(run / "checkpoints", print)[1]["step"] == 3
    assert torch.equal(*(exported(path) for path in (run / "export", checkpoint.found(run / "checkpoints")[0])))
    with monkeypatch.context() as patch:
        before_steps(patch, {4: fails})
        with pytest.raises(ZeroDivisionError, match="in a step"):
            train.main(["--resume", str(run)])
    assert checkpoint.newest(run / "checkpoints", print)[1]["step"] == 4
    assert torch.equal(*(exported(path) for path in (run / "export", checkpoint.found(run / "checkpoints")[0])))


def exported(where: Path) -> torch.Tensor:
    """A weight of the encoder in an export or a checkpoint."""
    tensors = load_file(where / "model.safetensors")
    return tensors.get("blocks.0.attn.qkv.weight", tensors.get("encoder.blocks.0.attn.qkv.weight"))


KILLED = """
import os, signal, sys
from engine import train
from engine.training import checkpoint

save_file, saved = checkpoint.save_file, []


def kills(tensors, path):
    save_file(tensors, path)
    saved.append(path)
    if len(saved) == 6:  # the second file of the second save
        os.kill(os.getpid(), signal.SIGKILL)


checkpoint.save_file = kills
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_save_before_to_the_same_bits(tmp_path: Path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train.main(flags(tmp_path, "--epochs", "4", "--threads", "1", "--out", str(whole))) == 0
    arguments = flags(tmp_path, "--epochs", "4", "--threads", "1", "--out", str(run))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in checkpoint.found(run / "checkpoints")] == ["step-000000002"]
    assert list((run / "checkpoints").glob(".step-*")), "the kill left something"
    assert train.main(["--resume", str(run)]) == 0
    manifests = [checkpoint.found(one / "checkpoints")[0] / "manifest.json" for one in (whole, run)]
    hashes = [json.loads(path.read_text()) for path in manifests]
    assert [path.parent.name for path in manifests] == ["step-000000008"] * 2
    assert hashes[0] == hashes[1]
    assert (run / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    (run / "export" / "model.safetensors").write_bytes(b"of an earlier step, since a kill came before it")
    assert train.main(["--resume", str(run)]) == 0
    assert (run / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()


FULL = """
import errno, os, sys, time
from engine import train
from engine.training import folder


def full(*_):
    time.sleep(2)  # the other rank waits by then
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


folder.export = full
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_of_two_ranks_both_end_by_a_sentence_where_a_save_fails_and_the_checkpoint_before_it_is_whole(tmp_path: Path):
    arguments = flags(tmp_path, "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "run"))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FULL, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=os.environ | told | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for told in group(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[1].splitlines()[-1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said[0].startswith(
        f"error: {tmp_path / 'run'} cannot be written any more (No space left on device). Checkpoint step-000000002"
    )
    assert said[1] == "error (rank 1): rank 0 failed: OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize("name", ["mae", "supervised", "dino"])
def test_the_export_of_a_copy_is_that_of_its_step_while_training_goes_on(name: str, tmp_path: Path):
    """With an average of the weights, with one of a classifier too, and of a teacher."""
    kind = methods.get(name)
    average = {} if name == "dino" else {"weight_ema": 0.9}
    settings = kind.Settings(**small(kind.Settings, epochs=1, **average))
    labels = (Labels(torch.arange(8) % 2, ("cat", "dog")),) if name == "supervised" else ()
    method = kind(vit.create("vit_micro_patch8_32", depth=1), settings, *labels).train()
    update = Update(method, 8)
    state = TrainState(method, update, 0, 0, [])

    def moves() -> None:
        with torch.no_grad():
            for tensor in (*method.parameters(), *update.average.weights.values()):
                tensor.add_(torch.randn_like(tensor))

    moves()
    with update.average.in_place():
        weights.export(method.evaluated, tmp_path / "then", classifier=method.classifier)
    copy = HostCopy()
    kept = copy.take(content(state))
    moves()
    state_then = folder.judged(method, kept)
    weights.export(method.evaluated, tmp_path / "later", classifier=method.classifier, state=state_then)
    files = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("then", "later")]
    assert files[0] == files[1]
    again = copy.take(content(state))
    assert all(again[part][key] is kept[part][key] for part in kept for key in kept[part]), "memory is used again"
    assert torch.equal(again["model"]["encoder.cls_token"], method.encoder.cls_token)


def test_a_writer_does_one_thing_after_another_and_raises_what_it_meets_once():
    writer, done, own = Writer(), [], os.getpriority(os.PRIO_PROCESS, 0)

    def work(number: int) -> None:
        assert os.getpriority(os.PRIO_PROCESS, 0) == own + NICENESS, "of this thread"
        time.sleep(0.05 / number)
        done.append(number)
        if number == 2:
            raise OSError(number)

    writer.begin(lambda _: work(1))
    writer.begin(lambda _: work(2))
    assert done == [1]
    with pytest.raises(OSError, match="2"):
        writer.begin(lambda _: work(3))
    assert done == [1, 2]
    writer.check()
    writer.wait()
    writer.begin(lambda _: work(4))
    writer.close()
    assert done == [1, 2, 4] and os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_writer_that_is_closed_gives_up_what_is_under_way(tmp_path: Path):
    writer, begun, closing = Writer(), threading.Event(), threading.Event()
    checkpoint.save(tmp_path, 1, TENSORS, {}, 1)

    def work(go_on: Callable[[], None]) -> None:
        begun.set()
        closing.wait(LIMIT)
        checkpoint.save(tmp_path, 2, TENSORS, {}, 1, go_on)

    writer.begin(work)
    begun.wait(LIMIT)
    threading.Timer(0.2, closing.set).start()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001"]
    with pytest.raises(CancelledError):
        writer.wait()


class Heard:
    """A log of messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.message = self.messages.append


def held(tmp_path: Path, log: Heard) -> Saving:
    """Of the first rank."""
    return Saving(SimpleNamespace(ranks=SimpleNamespace(first=True)), None, tmp_path, log)


@pytest.mark.parametrize(("error", "finished"), [(ValueError("in a step"), True), (Interrupted(signal.SIGTERM), False)])
def test_an_error_waits_for_the_save_under_way_and_a_signal_that_cannot_wait_gives_it_up(
    error: BaseException, finished: bool, tmp_path: Path
):
    log, leaving, done = Heard(), threading.Event(), []

    def work(go_on: Callable[[], None]) -> None:
        leaving.wait(LIMIT)
        go_on()
        done.append(True)

    with pytest.raises(type(error)), held(tmp_path, log) as saving:
        saving._writer.begin(work)
        threading.Timer(0.2, leaving.set).start()
        raise error
    assert done == [True] * finished and log.messages == []


def test_an_error_is_not_hidden_by_that_of_the_save_under_way(tmp_path: Path):
    log = Heard()
    with pytest.raises(ValueError, match="in a step"), held(tmp_path, log) as saving:
        saving._writer.begin(lambda _: 1 / 0)
        raise ValueError("in a step")
    assert log.messages == ["the save under way failed as well: division by zero"]
    with pytest.raises(ZeroDivisionError), held(tmp_path, log) as saving:
        saving._writer.begin(lambda _: 1 / 0)


@pytest.mark.parametrize("saved", [False, True])
def test_full_memory_is_told_with_what_needs_less_and_how_to_go_on(tmp_path, monkeypatch, capsys, saved: bool):
    def full(*_: object) -> None:
        if saved:
            (tmp_path / "run" / "checkpoints" / "step-000000002").mkdir(parents=True)
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free. Including 3 GiB"
        )

    monkeypatch.setattr("engine.training.run._train", full)
    status = train.main(flags(tmp_path, "--epochs", "1", "--out", str(tmp_path / "run")))
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert status == 2 and said.startswith(
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free; --accumulate N takes a batch in N parts"
    )
    assert said.endswith(f"--resume {tmp_path / 'run'} goes on from the last checkpoint.") == saved
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed" and "OutOfMemoryError" in json.dumps(last)
