"""A browser, and deployments to look at with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_stand import Shadow, Stand
from in_browser import chromium, new_page


@pytest.fixture(scope="module")  # not the session's: while it runs, its event loop does, and other tests want their own
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(url, **options of the context)"""
    pages = []

    def make(url: str, **options: Any) -> Any:
        pages.append(new_page(browser, **options))
        pages[-1].goto(url)
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()


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
