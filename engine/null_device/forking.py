"""Processes on the device that computes nothing which answer one question after another, each in a child of its own: what was
imported stays, and what a question compiled and allocated goes with its child."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from engine.null_device import device

ANSWER, SAID = "answer.json", "said"


@dataclass(frozen=True)
class _Worker:
    """A process that answers, and the file that its own stderr goes to."""

    process: subprocess.Popen
    complaints: IO[str]

    def status(self, question: str) -> int:
        """The exit status of the child that was asked."""
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:  # it ended before it said a number
            self.complaints.seek(0)
            raise RuntimeError(_last(self.complaints.read(), self.process.wait())) from error


class Workers:
    """Processes of a module whose `main` calls `serve`; each starts when it is first needed, and ends with this process.

    Args:
        seen: their environment, of `device.environment`.
        most: how many there are at once; further questions wait. Any thread may ask.
    """

    def __init__(self, module: str, seen: Mapping[str, str], most: int):
        self._command, self._seen = [sys.executable, "-m", module], dict(seen)
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(most):
            self._free.put(None)

    def answer(self, asked: Any, variables: Mapping[str, str]) -> Any:
        """What the module makes of it, JSON in and out, with these variables in its environment besides.

        Raises:
            RuntimeError: it failed; with the last line of what it said.
        """
        worker = self._free.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = self._started()
            with tempfile.TemporaryDirectory() as scratch:
                own = {
                    "TESSERA_CACHE": str(Path(scratch) / "tessera"),
                    # code that was made for another batch is taken again where sizes vary, and moves other bytes
                    "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "compiled"),
                }
                question = {"asked": asked, "variables": own | dict(variables), "scratch": scratch}
                if status := worker.status(json.dumps(question)):
                    raise RuntimeError(_last((Path(scratch) / SAID).read_text(errors="replace"), status))
                return json.loads((Path(scratch) / ANSWER).read_text())
        finally:
            self._free.put(worker)

    def _started(self) -> _Worker:
        complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": complaints}
        return _Worker(subprocess.Popen(self._command, env=self._seen, cwd=device.ROOT, text=True, **pipes), complaints)


def serve(answer: Callable[[Any], Any]) -> int:
    """In such a process: answer what is asked, until whoever asks has ended. Nothing may have touched the device before."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _child(answer, **json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def _child(answer: Callable[[Any], Any], asked: Any, variables: dict[str, str], scratch: str) -> NoReturn:
    status = 1
    try:
        signal.alarm(round(device.SECONDS))
        os.environ.update(variables)
        said = os.open(Path(scratch) / SAID, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(said, stream)
        (Path(scratch) / ANSWER).write_text(json.dumps(answer(asked)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what the parent holds is not the child's to close


def _last(said: str, status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"
