"""Starts commands as forks of one process that has imported everything, so that each costs a second and not ten.

    python -m tests.faults.server      (by `tests.faults.runs.Server`, with the library of injected.cpp loaded)

It reads requests, a line of JSON each, and answers each by a line: {"start": {"arguments", "log", "environment", "fault"}} by the
process's id, {"wait": id, "seconds"} by its status (as a shell has it, but -N where signal N ended it) and greatest resident
memory in MiB, or by null where it is still at work.

Nothing is computed before a fork, so no thread is there that a fork would lose.
"""

import json
import os
import select
import sys
import time
import traceback

from tests.faults.injected import Fault, arm


def imports() -> None:
    """What a run brings in at its beginning and its end."""
    import matplotlib.figure  # noqa: F401
    import torch
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import engine.evals.of_run
    import engine.model.twins
    import engine.shard
    import engine.train  # noqa: F401

    torch.set_num_threads(1)


def run(request: dict) -> None:
    """In the child: what the request says, to the end of the process."""
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, of in ((0, null), (1, log), (2, log)):
        os.dup2(of, descriptor)
    os.environ.update(request["environment"])
    status = 70
    try:
        import importlib

        command = importlib.import_module(request["module"])
        if request["fault"]:
            arm(Fault(**request["fault"]))
        status = command.main(request["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def wait(process: int, seconds: float) -> dict | None:
    until = time.monotonic() + seconds
    descriptor = os.pidfd_open(process)
    try:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
    finally:
        os.close(descriptor)
    if not ready:
        return None
    _, status, used = os.wait4(process, 0)
    return {"status": os.waitstatus_to_exitcode(status), "mib": used.ru_maxrss / 1024}


def main() -> None:
    # what a library prints on standard output must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    imports()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            process = os.fork()
            if process == 0:
                os.setpgid(0, 0)
                run(request["start"])
            answer: object = process
        else:
            answer = wait(request["wait"], request["seconds"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
