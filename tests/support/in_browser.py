"""Debian's chromium, driven by playwright; a test that wants it is skipped where either is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium here (Debian package chromium; scripts/setup.py --test-servers)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (pip install playwright; its own browsers are not needed)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # no sandbox: tests may run as root, and the page under test is our own
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield running
        finally:
            running.close()


def new_page(browser: Any, **options: Any) -> Any:
    """A page that remembers what went wrong in it, at `page.wrong`. Its context ends with the browser."""
    page = browser.new_context(**{"viewport": {"width": 1360, "height": 900}, **options}).new_page()
    page.wrong = []
    page.on("console", lambda message: message.type in ("error", "warning") and page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("dialog", lambda dialog: (page.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    return page
