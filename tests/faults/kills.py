"""Runs that are killed again and again, wherever they are, and end as if nobody had."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from engine.training import checkpoint
from tests.faults.injected import Fault
from tests.faults.results import Part
from tests.faults.runs import Subject, Verdict, false_words, left_over, lost, step_of

METHODS = ("mae", "maect", "dino", "mim_refiner", "swav", "mocov3", "supervised", "beit")
AT_ONCE = 4  # kills of one run, at most


def kill(
    subject: Subject, count: int, draw: random.Random, part: Part, progress: Callable[[Part, int, int, float], None]
) -> None:
    """`count` kills over as many runs as they need: half of them at a drawn call that changes a file, half at a drawn time."""
    began, done = time.monotonic(), 0
    while done < count:
        kills = min(draw.randint(1, AT_ONCE), count - done)
        what, verdict = _one_run(subject, kills, draw)
        part.add(f"{subject.method}: {what}", verdict, kills)
        done += kills
        progress(part, done, count, began)


def _one_run(subject: Subject, kills: int, draw: random.Random) -> tuple[str, Verdict]:
    run, told = subject.folder(), []
    whole = Verdict(True, 0, outcome="killed")
    for _ in range(kills):
        go_on = subject.can_go_on(run)
        if not go_on and run.is_dir():
            shutil.rmtree(run)  # nothing was saved: a user starts anew, too
        # the later it is, the fewer calls and seconds are left
        done = step_of(checkpoint.newest_sound(run / "checkpoints")) / subject.end.step if go_on else 0.0
        left = max(0.15, 1 - done)
        start = subject.resumed if go_on else subject.begun
        if draw.random() < 0.5:
            number = draw.randint(1, max(2, int(len(subject.calls) * left)))
            told.append(f"before call {number}")
            action = Fault([str(run), subject.cache(run)], "kill before", first=number, last=number)
            ended = subject.server.wait(start(run, action))
        else:
            seconds = draw.uniform(0, subject.seconds * left)
            told.append(f"after {seconds:.2f} s")
            process = start(run)
            ended = subject.server.wait(process, seconds)
            if ended is None:
                os.kill(process, signal.SIGKILL)
                ended = subject.server.wait(process)
        if ended is None:
            return ", ".join(told), replace(whole, survived=False, why="it still worked after minutes")
        whole.lost += lost(run)
        whole.words += false_words(run, ended)
    if not subject.can_go_on(run):
        if run.is_dir():
            shutil.rmtree(run)
        ended = subject.begin(run)
    # where nothing disturbs it any more, it ends well and equal
    verdict = subject.judge(run, ended)
    found = replace(verdict, lost=whole.lost, words=whole.words + verdict.words, outcome="killed", left=left_over(run))
    subject.clear(run)
    return ", ".join(told), found
