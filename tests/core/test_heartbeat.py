"""Ranks that wait for one that works, for one that is gone, and whose launcher is gone."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import group, torchrun

ROOT = Path(__file__).parents[2]
PART = (sys.executable, "-m", "tests.core.ranks_apart")


def both(part: str) -> list[subprocess.Popen]:
    """Ranks without a launcher, whose store then lies with rank 0."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*PART, part], cwd=ROOT, env=os.environ | told, **pipes) for told in group(2)]


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_rank_may_work_longer_than_others_are_silent(ranks: list[subprocess.Popen]):
    ranks += both("works")
    for rank, process in enumerate(ranks):
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "") and f"rank {rank} met the other" in output


@pytest.mark.parametrize("part", ["stopped", "killed"])
def test_a_rank_that_is_gone_ends_the_others_with_a_sentence(part: str, ranks: list[subprocess.Popen]):
    ranks += both(part)
    _, errors = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode == 2
    silent = f"rank 1 on {socket.gethostname()} has shown no sign of life for 2 s"
    assert errors == f"error: {silent}; this run ends here, --resume goes on from its last checkpoint\n"


def test_workers_of_a_killed_launcher_are_asked_to_stop_also_where_they_wait(ranks: list[subprocess.Popen]):
    ranks.append(subprocess.Popen(torchrun(2, *PART[1:], "waits"), cwd=ROOT, stdout=subprocess.PIPE, text=True))
    lines = [ranks[0].stdout.readline() for _ in range(2)]
    workers = [int(re.fullmatch(r"rank \d is process (\d+)\n", line)[1]) for line in lines]
    time.sleep(0.5)
    ranks[0].send_signal(signal.SIGKILL)
    stopped = sorted(ranks[0].stdout.readline() for _ in workers)
    assert stopped == ["rank 0 was asked to stop\n", "rank 1 was asked to stop\n"]
