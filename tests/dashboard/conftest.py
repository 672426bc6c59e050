"""A browser, and deployments to look at with it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_stand import Shadow, Stand

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian package chromium; scripts/setup.py --test-servers)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (pip install playwright; its own browsers are not needed)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # no sandbox: tests may run as root, and the page under test is our own
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(url, **options of the context): a page that remembers what went wrong in it, at `page.wrong`."""
    contexts = []

    def make(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1360, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("console", lambda message: message.type in ("error", "warning") and page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (page.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A producer and two consumers."""
    with Stand(tmp_path_factory.mktemp("stand"), ("prefill-0", "decode-0", "decode-1")) as running:
        yield running


@pytest.fixture(scope="module")
def shadow(stand: Stand) -> Iterator[Shadow]:
    with Shadow(stand) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
