"""Trees, archives, weights and checkpoints that somebody made to do harm, given to whole commands: each is refused in a sentence,
or passed over, and nothing in it is run or unpacked."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from engine.training import checkpoint
from tests.data.corpus import HOSTILE_TARS, encoded, tar_bytes, write_hostile, write_photos
from tests.faults.injected import Fault
from tests.faults.results import Part
from tests.faults.runs import Ended, Server, Subject, Verdict, false_words

SMALL = ("--method", "mae", "--model", "vit_micro_patch8_32", "--device", "cpu", "--threads", "1", "--epochs", "1",
         "--batch-size", "4", "--no-evaluate", "--probe-every", "0", "--mae.decoder-dim", "64", "--mae.decoder-depth", "1",
         "--mae.decoder-heads", "2")  # fmt: skip


class Canary:
    """Its pickle makes a folder, where it is run."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def _refused(ended: Ended, run: Path, words: str, canary: Path | None = None) -> Verdict:
    """It has to end in one sentence that has these words, before anything is written."""
    verdict = Verdict(False, 0, words=false_words(run, ended), outcome=f"status {ended.status}")
    if ended.status != 2 or words not in ended.said:
        verdict.why = f"not refused for {words!r}: {ended.status}, {ended.said[-300:]}"
    elif run.exists():
        verdict.why = "something was written"
    elif canary is not None and canary.exists():
        verdict.why = "what it holds was run"
    verdict.survived = not verdict.why
    return verdict


def archives(server: Server, scratch: Path, part: Part, every: int = 1) -> None:
    """Each of the corpus, or `every` so many, beside a sound one, as a set to train from."""
    for number, (name, (content, words)) in list(enumerate(HOSTILE_TARS.items()))[::every]:
        place = scratch / "archives" / str(number)
        place.mkdir(parents=True)
        (place / "a.tar").write_bytes(tar_bytes({"1.jpg": encoded(1), "2.jpg": encoded(2)}))
        (place / "b.tar").write_bytes(content)
        run = place / "run"
        ended = server.run([*SMALL, "--data", str(place), "--out", str(run)])
        part.add(f"archive: {name}", _refused(ended, run, words.split("'")[0].strip()))
        shutil.rmtree(place)


def trees(server: Server, scratch: Path, part: Part) -> None:
    """Every hostile file of the corpus among good ones, links that go in circles and out, pipes, names that are no text."""
    root, run = scratch / "tree", scratch / "tree-run"
    bad = write_hostile(root / "train" / "a")
    write_photos(root / "train" / "b", 40)
    (root / "train" / "b" / "circle").symlink_to(root / "train")
    os.mkfifo(root / "train" / "b" / "pipe.jpg")
    (root / "train" / "b" / "device.jpg").symlink_to("/dev/zero")
    (root / "train" / "b" / os.fsdecode(b"\xff.jpg")).write_bytes(encoded(3))
    (root / "train" / "b" / "$(touch x);`x`\n.jpg").write_bytes(encoded(4))
    ended = server.run([*SMALL, "--data", str(root), "--out", str(run), "--bad-limit", "0.9"])
    verdict = Verdict(ended.status == 0, 0, words=false_words(run, ended), outcome=f"status {ended.status}")
    if not verdict.survived:
        verdict.why = ended.said[-300:]
    else:
        listed = {path: reason for path, reason in json.loads((run / "bad_files.json").read_text())}
        wanted = {f"train/a/{name}": reason for name, reason in bad.items()}
        wanted |= dict.fromkeys(("train/b/pipe.jpg", "train/b/device.jpg"), "no regular file")
        odd = [name for name, reason in wanted.items() if reason not in listed.get(name, "")]
        verdict.survived, verdict.why = not odd, f"not listed as they should be: {odd}" * bool(odd)
    part.add("tree", verdict)
    ended = server.run([*SMALL, "--data", str(root), "--out", str(scratch / "refused")])
    part.add("tree, strictly", _refused(ended, scratch / "refused", "images are bad"))


def weights(server: Server, scratch: Path, part: Part) -> None:
    """Files that would run code, lie about their size, or hold no weights, given as those to start from."""
    place, canary = scratch / "weights", scratch / "canary"
    place.mkdir()
    torch.save({"weight": Canary(canary)}, place / "code.pth")
    (place / "pickle.pth").write_bytes(pickle.dumps(Canary(canary)))
    (place / "code.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    (place / "header.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    (place / "offsets.safetensors").write_bytes(
        (66).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,399999996]}}'.ljust(66)
    )
    (place / "empty.pth").write_bytes(b"")
    torch.save([1, 2], place / "list.pth")
    for path in sorted(place.iterdir()):
        run = scratch / f"run-{path.name}"
        data = write_photos(scratch / "photos" / "train" / "a", 4)[0].parents[2]
        ended = server.run([*SMALL, "--data", str(data), "--weights", str(path), "--out", str(run)])
        part.add(f"weights: {path.name}", _refused(ended, run, path.name, canary))


def checkpoints(subject: Subject, scratch: Path, part: Part) -> None:
    """The newest checkpoint of a killed run is spoilt in each way, and gone on from the one before it; equal in the end."""
    canary = scratch / "canary of a checkpoint"
    ways: dict[str, Callable[[Path], object]] = {
        "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
        "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "gone": lambda path: path.unlink(),
        "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        "a pickle": lambda path: path.write_bytes(pickle.dumps(Canary(canary))),
        "brackets": lambda path: path.write_bytes(b"[" * 10**6),
    }
    killed = subject.folder()
    end = next(call for call in reversed(subject.calls) if call.place == "stages")
    subject.begin(killed, Fault([str(killed), subject.cache(killed)], "kill before", first=end.number, last=end.number))
    for file in ("model.safetensors", "optimizer.safetensors", checkpoint.STATE, checkpoint.MANIFEST):
        for name, spoil in ways.items():
            run = subject.folder()
            shutil.copytree(killed, run, dirs_exist_ok=True)
            newest = checkpoint.newest_sound(run / "checkpoints")
            spoil(newest / file)
            ended = subject.resume(run)
            verdict = Verdict(False, 0, words=false_words(run, ended), outcome=f"status {ended.status}")
            if ended.status != 0 or f"checkpoint {newest.name} is damaged" not in ended.said:
                verdict.why = f"{ended.status}: {ended.said[-300:]}"
            else:
                verdict = subject.judge(run, ended)
            if canary.exists():
                verdict.why = "what it holds was run"
            verdict.survived = not verdict.why
            part.add(f"{file} {name}", verdict)
            subject.clear(run)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
