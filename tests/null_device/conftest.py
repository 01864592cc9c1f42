"""The device that computes nothing, built once, and what its children compile, shared by the tests of a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.null_device import device

Environment = Callable[..., dict[str, str]]


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config) -> Path:
    """The folder of the library."""
    return device.build(Path(pytestconfig.cache.mkdir("null_device")))


@pytest.fixture(scope="session")
def on_device(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Given a chip, the environment of a process on the device."""
    scratch = tmp_path_factory.mktemp("null_device")
    return lambda chip=90: device.environment(library, chip, scratch)


@pytest.fixture
def alone_on_device(library: Path, tmp_path: Path) -> Environment:
    """Likewise, without what other tests have compiled: the first sizes that code is made for leave traces in it."""
    return lambda chip=90: device.environment(library, chip, tmp_path)
