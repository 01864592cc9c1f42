"""Several processes of one run on this machine, at a port that no other test has."""

import socket
import sys


def torchrun(ranks: int, *command: str) -> list[str]:
    """A command line for so many processes of `command`, which is what `python` would be given: -m MODULE, or a file."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, *(() if command[0] == "-m" else ("--no-python", sys.executable)), *command]


def group(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each process in its environment, for processes that a test starts itself."""
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
