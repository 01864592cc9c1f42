"""Calls in a child process that may crash, hang or lose its GPU context while the caller lives on and is told why.

One child serves many calls, so that what is slow to import is imported once. A crash, a call that takes too long and an error of
CUDA (after which a process can't use its device any more) cost that call alone: the child and whatever it has started are killed,
and the next call gets a new one. This file is also the child's program; it imports the standard library only.
"""

import contextlib
import ctypes
import faulthandler
import fcntl
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

START_SECONDS = 300.0  # for Python and the imports
OUTPUT_BYTES = 20_000  # of what a call printed, the last are kept
STICKY = ("CUDA error", "CUDA driver error", "misaligned address", "illegal memory access", "illegal instruction")


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    value: Any
    """What the function returned, as JSON gives it back (tuples as lists); None where it failed."""
    failure: str
    """Why it failed, a sentence without full stop; empty where it worked."""
    seconds: float
    """Wall-clock time of the call, without the start of a child."""
    output: str
    """The end of what the call and its subprocesses printed, the traceback of an exception or a crash included."""


class Guard:
    """A context manager that owns the child process in which `run` calls functions. One call at a time.

    The child is killed when the context ends and when the thread that made the call which started it ends, by whatever way.

    Args:
        preload: modules that a child imports before its first call; their time counts for no call.
        environment: variables of the child beside those of this process.
    """

    def __init__(self, preload: tuple[str, ...] = (), environment: Mapping[str, str] | None = None) -> None:
        self.preload = preload
        self.environment = dict(environment or {})
        self._child: _Child | None = None

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: str, arguments: Mapping[str, Any], seconds: float) -> Outcome:
        """Call a function of a module by name.

        Args:
            function: "package.module:function" or "package.module.function"; the child finds modules where this process does.
            arguments: its keyword arguments, which must be JSON.
            seconds: the call is stopped after so many.

        Raises:
            TypeError: `arguments` are no JSON. Whatever the function does is told by the outcome.
        """
        request = {"function": function, "arguments": dict(arguments), "seconds": seconds}
        json.dumps(request)
        if self._child is not None and self._child.ended():  # since the last call: the kernel may have wanted memory
            self.close()
        try:
            if self._child is None:
                self._child = _Child(self.environment)
                hello = {"path": sys.path, "preload": self.preload, "seconds": START_SECONDS}
                started = self._child.ask(hello, START_SECONDS)
                if started.failure:
                    self.close()
                    return replace(started, failure=f"the child process did not start: {started.failure}", seconds=0.0)
            outcome = self._child.ask(request, seconds)
        except BaseException:
            self.close()
            raise
        if self._child.lost:
            self.close()
        return outcome

    def close(self) -> None:
        """Kill the child and whatever it has started; the next call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """The process and the three files it is spoken with: requests, answers, and what it prints."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.lost = False
        """Whether the process can serve no further call."""
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child lives
        fcntl.fcntl(self.printed, fcntl.F_SETFL, os.O_APPEND)
        requests, self._ask = os.pipe()
        self._answers, answers = os.pipe()
        # -P: the folder of this file is no place for modules
        command = [sys.executable, "-P", "-u", __file__, str(requests), str(answers), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.printed, stderr=self.printed, pass_fds=(requests, answers),
                env=os.environ | environment, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(requests)
            os.close(answers)

    def ask(self, request: Mapping[str, Any], seconds: float) -> Outcome:
        os.ftruncate(self.printed.fileno(), 0)
        start = time.monotonic()
        answer = b""
        # a child that ends meanwhile is told by its status
        with contextlib.suppress(BrokenPipeError), open(self._ask, "wb", buffering=0, closefd=False) as pipe:
            pipe.write(json.dumps(request).encode() + b"\n")
        while not answer.endswith(b"\n"):
            left = start + seconds - time.monotonic()
            if left <= 0:
                self.lost = True
                return self._outcome(None, f"took longer than {seconds:g} s and was stopped", start)
            # not by the end of the pipe alone: what the child forked may hold it open
            part = b""
            if select.select([self._answers], [], [], min(left, 0.2))[0]:
                part = os.read(self._answers, 2**16)
            answer += part
            if not part:
                ended = self.ended()
                if ended:
                    self.lost = True
                    return self._outcome(None, ended, start)
                time.sleep(0.01)  # the pipe's end comes a moment before the process's
        found = json.loads(answer)
        self.lost = found["lost"]
        return self._outcome(found["value"], found["failure"], start)

    def _outcome(self, value: Any, failure: str, start: float) -> Outcome:
        took = time.monotonic() - start
        size = os.fstat(self.printed.fileno()).st_size
        end = os.pread(self.printed.fileno(), OUTPUT_BYTES, max(0, size - OUTPUT_BYTES))
        return Outcome(value, failure, took, end.decode(errors="replace"))

    def ended(self) -> str:
        """How the process has ended; empty while it runs. It stays a zombie, so that `kill` finds its group."""
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return ""
        if status.si_code == os.CLD_EXITED:
            return f"ended with status {status.si_status}"
        return f"killed by signal {signal.Signals(status.si_status).name}"

    def kill(self) -> None:
        """End the process and all of its group; close what it was spoken with."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a broken driver may hold it for ever
            self._process.wait(30)
        os.close(self._ask)
        os.close(self._answers)
        self.printed.close()


def _serve(requests: int, answers: int, parent: int) -> None:
    """The child: import and call what is asked, until the pipe ends."""
    for pipe in (requests, answers):
        os.set_inheritable(pipe, False)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        return
    faulthandler.enable()
    with open(requests) as asked, open(answers, "w") as told:
        for line in asked:
            request = json.loads(line)
            faulthandler.dump_traceback_later(0.95 * request["seconds"])  # shows where a call hangs
            answer = _answer(request)
            faulthandler.cancel_dump_traceback_later()
            told.write(answer + "\n")
            told.flush()


def _answer(request: Mapping[str, Any]) -> str:
    value, failure, lost = None, "", False
    try:
        if "preload" in request:
            sys.path[:] = request["path"]
            for name in request["preload"]:
                importlib.import_module(name)
        else:
            value = _function(request["function"])(**request["arguments"])
    except Exception as error:
        traceback.print_exc()
        failure, lost = _told(error)
    try:
        _wait_for_device()  # an error of a kernel that the call started is the call's
    except Exception as error:
        traceback.print_exc()
        failure, lost = failure if lost else _told(error)[0], True
    try:
        return json.dumps({"value": None if failure else value, "failure": failure, "lost": lost})
    except (TypeError, ValueError, RecursionError) as error:
        failure = f"returned what is no JSON: {error}"
        return json.dumps({"value": None, "failure": failure, "lost": lost})


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(":" if ":" in name else ".")
    return getattr(importlib.import_module(module), function)


def _told(error: Exception) -> tuple[str, bool]:
    """The failure's sentence, and whether the process has lost its GPU."""
    message = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
    of_device = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
    if of_device or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in STICKY)):
        return f"{message}: the device's context is lost", True
    return f"raised {type(error).__name__}: {message}", False


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
