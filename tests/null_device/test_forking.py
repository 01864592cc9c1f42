"""Processes that answer in children: one question leaves nothing for the next, and a failure is told and spoils no other."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.null_device import device
from engine.null_device.forking import Workers

MODULE = "tests.null_device.answering"
SEEN = {**os.environ, "PYTHONPATH": str(device.ROOT)}


def test_each_question_has_a_child_and_variables_of_its_own():
    workers = Workers(MODULE, SEEN, 1)
    first, second = (workers.answer({"text": chip}, {"NULLCUDA_SM": chip}) for chip in ("80", "90"))
    assert (first["text"], first["chip"], second["text"], second["chip"]) == ("80", "80", "90", "90")
    assert first["worker"] == second["worker"] != os.getpid()
    assert first["before"] == second["before"] == 0


def test_there_are_no_more_workers_than_allowed():
    workers = Workers(MODULE, SEEN, 2)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: workers.answer({"number": number}, {}), range(6)))
    assert [one["number"] for one in found] == list(range(6))
    assert 1 <= len({one["worker"] for one in found}) <= 2


def test_what_fails_is_told_and_the_next_question_is_answered():
    workers = Workers(MODULE, SEEN, 1)
    worker = workers.answer({}, {})["worker"]
    with pytest.raises(RuntimeError, match=r"^ValueError: no such step$"):
        workers.answer({"raise": "no such step"}, {})
    with pytest.raises(RuntimeError, match=r"^ended by SIGKILL$"):
        workers.answer({"die": True}, {})
    assert workers.answer({}, {})["worker"] == worker
    with pytest.raises(RuntimeError, match=r"^ended by SIGKILL$"):
        workers.answer({"end": True}, {})
    assert workers.answer({}, {})["worker"] != worker


def test_a_module_that_cannot_start_is_told():
    with pytest.raises(RuntimeError, match=r"No module named tests\.null_device\.nowhere"):
        Workers("tests.null_device.nowhere", SEEN, 1).answer({}, {})
