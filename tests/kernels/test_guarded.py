"""Calls in a guarded child: results, every way to fail, and what lives on after each."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernels import guarded
from kernels.guarded import Guard

JOBS = """
import os, signal, subprocess, sys, time

class AcceleratorError(RuntimeError):
    pass

def add(a, b):
    return a + b

def pid():
    return os.getpid()

def variable(name):
    return os.environ.get(name)

def loaded(name):
    return name in sys.modules

def say(text):
    print(text)
    subprocess.run([sys.executable, "-c", "print('from below')"])

def fail(message, kind="ValueError"):
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError, "AcceleratorError": AcceleratorError}[kind](message)

def die(number):
    os.kill(os.getpid(), number)

def leave(status):
    sys.exit(status)

def hang(file=None):
    if file:
        below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(file, "w") as out:
            out.write(f"{os.getpid()} {below.pid}")
    while True:
        time.sleep(1)

def crash_above_a_child(file):
    below = os.fork()
    if not below:
        time.sleep(600)
    with open(file, "w") as out:
        out.write(f"{os.getpid()} {below}")
    die(signal.SIGSEGV)

def a_set():
    return {1, 2}
"""


@pytest.fixture
def guard(tmp_path, monkeypatch):
    (tmp_path / "misbehaviour.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Guard() as guard:
        yield guard


def call(guard, function, seconds=60.0, **arguments):
    return guard.run(f"misbehaviour:{function}", arguments, seconds)


def gone(pid: int) -> bool:
    """Whether the process has ended, at the latest in ten seconds; a zombie that nobody waits for has."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def written(file: Path) -> list[int]:
    """The numbers that a call writes to a file, once they stand there."""
    for _ in range(6000):
        if file.exists() and len(file.read_text().split()) == 2:
            return [int(number) for number in file.read_text().split()]
        time.sleep(0.01)
    raise AssertionError("the call wrote nothing")


def test_a_value_comes_back_and_one_child_serves_many_calls(guard):
    found = call(guard, "add", a=[1], b=[2.5, None])
    assert (found.value, found.failure) == ([1, 2.5, None], "") and found.seconds > 0
    first = call(guard, "pid").value
    assert first == guard.run("misbehaviour.pid", {}, 60).value != os.getpid()  # with a dot for the colon
    assert os.getpgid(first) == first != os.getpgid(0)


def test_a_large_value_and_large_arguments_pass(guard):
    assert call(guard, "add", a="x" * 10**6, b="y").value == "x" * 10**6 + "y"


def test_an_exception_is_told_and_the_child_lives_on(guard):
    before = call(guard, "pid").value
    found = call(guard, "fail", message="no such size\nmore")
    assert (found.value, found.failure) == (None, "raised ValueError: no such size")
    assert "Traceback" in found.output and found.output.endswith("ValueError: no such size\nmore\n")
    assert call(guard, "pid").value == before


@pytest.mark.parametrize(
    ("function", "arguments", "failure"),
    [
        ("die", {"number": int(signal.SIGSEGV)}, "killed by signal SIGSEGV"),
        ("leave", {"status": 3}, "ended with status 3"),
        ("leave", {"status": 0}, "ended with status 0"),
        (
            "fail",
            {"message": "CUDA error: an illegal memory access was encountered\nCompile with", "kind": "RuntimeError"},
            "CUDA error: an illegal memory access was encountered: the device's context is lost",
        ),
        ("fail", {"message": "unspecified", "kind": "AcceleratorError"}, "unspecified: the device's context is lost"),
    ],
)
def test_a_lost_child_is_told_and_replaced(guard, function, arguments, failure):
    before = call(guard, "pid").value
    found = call(guard, function, **arguments)
    assert (found.value, found.failure) == (None, failure)
    assert gone(before)
    assert call(guard, "pid").value not in (None, before)


def test_a_crash_leaves_its_traceback(guard):
    found = call(guard, "die", number=int(signal.SIGSEGV))
    assert "Segmentation fault" in found.output and "in die" in found.output


def test_a_hang_is_stopped_with_all_that_it_started(guard, tmp_path):
    call(guard, "pid")
    found = call(guard, "hang", seconds=1.5, file=str(tmp_path / "pids"))
    assert found.failure == "took longer than 1.5 s and was stopped" and found.seconds >= 1.5
    assert "in hang" in found.output
    assert all(gone(pid) for pid in written(tmp_path / "pids"))
    assert call(guard, "add", a=1, b=2).value == 3


def test_what_a_crashed_child_forked_dies_too(guard, tmp_path):
    found = call(guard, "crash_above_a_child", file=str(tmp_path / "pids"))
    assert found.failure == "killed by signal SIGSEGV" and found.seconds < 50
    assert all(gone(pid) for pid in written(tmp_path / "pids"))


def test_a_child_that_died_between_two_calls_is_replaced(guard):
    before = call(guard, "pid").value
    os.kill(before, signal.SIGKILL)
    assert gone(before)
    assert call(guard, "pid").value not in (None, before)


def test_the_child_dies_with_the_context_and_with_its_parent(guard, tmp_path):
    with guard:
        pid = call(guard, "pid").value
    assert gone(pid)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.path.insert(1, {str(Path(guarded.__file__).parent)!r})
from guarded import Guard
with Guard() as guard:
    guard.run("misbehaviour:hang", {{"file": {str(tmp_path / "pids")!r}}}, 600)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        child, below = written(tmp_path / "pids")
        parent.kill()
    assert gone(child)
    os.kill(below, signal.SIGKILL)


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_the_caller_kills_the_child(guard, tmp_path):
    def interrupt():
        written(tmp_path / "pids")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call(guard, "hang", seconds=60, file=str(tmp_path / "pids"))
    thread.join()
    assert all(gone(pid) for pid in written(tmp_path / "pids"))
    assert call(guard, "add", a=1, b=2).value == 3


def test_output_is_that_of_the_call_and_its_end(guard):
    assert call(guard, "say", text="hello").output == "hello\nfrom below\n"
    found = call(guard, "say", text="x" * 10**6)
    assert len(found.output) == guarded.OUTPUT_BYTES and found.output.endswith("xx\nfrom below\n")
    assert call(guard, "pid").output == ""


def test_a_value_that_is_no_json_is_a_failure(guard):
    assert call(guard, "a_set").failure == "returned what is no JSON: Object of type set is not JSON serializable"
    with pytest.raises(TypeError, match="set"):
        call(guard, "add", a={1}, b={2})


def test_an_unknown_function_is_a_failure(guard):
    assert guard.run("misbehaviour:nothing", {}, 60).failure.startswith("raised AttributeError: module 'misbehaviour'")
    assert guard.run("no_such_room:nothing", {}, 60).failure.startswith("raised ModuleNotFoundError: ")


def test_modules_are_loaded_before_and_variables_set(guard):
    with Guard(preload=("wave",), environment={"TESSERA_TEST": "here"}) as other:
        assert call(other, "loaded", name="wave").value is True
        assert call(other, "variable", name="TESSERA_TEST").value == "here"
        call(other, "die", number=int(signal.SIGKILL))
        assert call(other, "loaded", name="wave").value is True
    assert call(guard, "loaded", name="wave").value is False
    assert call(guard, "loaded", name="torch").value is False


def test_a_preload_that_fails_is_told_by_the_call(guard):
    with Guard(preload=("no_such_room",)) as other:
        found = call(other, "pid")
    assert found.failure == (
        "the child process did not start: raised ModuleNotFoundError: No module named 'no_such_room'"
    )
