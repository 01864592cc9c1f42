"""The process that the short form's runs are forked in, shared by the tests of a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import injected
from tests.faults.runs import Server, Subject


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def server(scratch: Path, pytestconfig: pytest.Config) -> Iterator[Server]:
    library = injected.build(Path(pytestconfig.cache.mkdir("faults")))
    with Server(scratch, library) as server:
        yield server


@pytest.fixture(scope="session")
def mae(server: Server, scratch: Path) -> Subject:
    """A run of one stage, which keeps two checkpoints and screens its images anew each time."""
    return Subject(server, scratch, "mae", own_cache=True)
