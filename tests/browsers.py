"""The browser that pages are tried in: Chromium or Chrome, as it is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()


def installed() -> str | None:
    """Where the first of NAMES on the PATH lies."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator:
    """A running one without windows, playwright's Browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=installed(), args=ARGUMENTS)
        try:
            yield running
        finally:
            running.close()
