"""Makes `desk.py` a file of tests for pytest-benchmark."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "desk.py")
    config.addinivalue_line("python_functions", "bench_*")
