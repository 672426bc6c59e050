"""A part dies or a client leaves: answers stay right, and what was lost comes back by itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from pdserve.errors import UpstreamError
from pdserve.openai_client import Client, Completion

from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Deployment


def leave(pd: Deployment, prompt: tuple[int, ...], after_events: int) -> None:
    """Starts a long stream and hangs up after so many events; 0: right after sending."""
    body = {"model": pd.client.model, "prompt": list(prompt), "max_tokens": 900, "ignore_eos": True, "stream": True}
    timeout = httpx.Timeout(0.3 if after_events == 0 else 60, connect=5)
    with httpx.Client(base_url=pd.client.url, timeout=timeout, trust_env=False) as http:
        try:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                seen = 0
                for line in answer.iter_lines():
                    seen += line.startswith("data:")
                    if seen >= after_events:
                        return
        except httpx.ReadTimeout:
            assert after_events == 0


@pytest.mark.parametrize("after_events", [0, 3])
def test_client_leaves(pd: Deployment, after_events: int) -> None:
    """During the prefill, and in the middle of the stream: both engines stop working on it."""
    prompt = pd.ids(1500 if after_events == 0 else 300)
    leave(pd, prompt, after_events)
    pd.wait_idle()
    expected = pd.reference(prompt, max_tokens=6)
    assert pd.client.complete(prompt, max_tokens=6).token_ids == expected.token_ids
    pd.wait_idle()


def test_consumer_is_restarted_and_still_hits(pd: Deployment) -> None:
    prompt = pd.ids(700)
    expected = pd.reference(prompt, max_tokens=10)
    pd.client.complete(prompt, max_tokens=2)
    pd.wait_idle()
    old = pd.pid("decode-0")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: pd.pid("decode-0") not in (0, old), 120, "decode-0 was not started again")
    pd.wait_up()
    before = pd.retrieved("decode")
    answer = pd.client.complete(prompt, max_tokens=10)
    assert answer.token_ids == expected.token_ids
    assert pd.retrieved("decode") - before >= 512
    pd.wait_idle()


def test_cache_daemon_is_killed_while_it_serves(pd: Deployment) -> None:
    prompt = pd.ids(2600)
    expected = pd.reference(prompt, max_tokens=10)
    pd.client.complete(prompt, max_tokens=2)
    pd.wait_idle()
    pd.forget()
    old, clients = pd.pid("cache"), _clients(pd)

    answers: list[Completion] = []
    asking = threading.Thread(target=lambda: answers.append(pd.client.complete(prompt, max_tokens=10)))
    asking.start()
    _wait_until_leased(pd, asking)
    os.kill(old, signal.SIGKILL)
    asking.join(120)
    assert answers, "the request did not come through"
    assert answers[0].token_ids == expected.token_ids

    wait_for(lambda: pd.pid("cache") not in (0, old), 120, "the cache was not started again")
    wait_for(lambda: _clients(pd) == clients, 120, "the engines did not connect again by themselves")
    wait_for(lambda: pd.status()["recovering"] == 0, 120, "what was in the arena is still being verified")
    pd.wait_idle()
    pd.forget()
    before = pd.retrieved("prefill", "decode")
    hit = pd.client.complete(prompt, max_tokens=10)  # what was paid for before the kill is still there
    assert hit.token_ids == expected.token_ids
    assert pd.retrieved("prefill", "decode") - before >= 2 * 2560
    pd.wait_idle()


def _wait_until_leased(pd: Deployment, asking: threading.Thread) -> None:
    """Returns as soon as the daemon has leased chunks to an engine, or after a second: then it dies a little late."""
    deadline = time.monotonic() + 1.0
    with Client(f"{pd.target.admin_url}") as admin:
        while time.monotonic() < deadline and asking.is_alive():
            if admin.get("/status", timeout=5).json()["leases"]:
                return


def _clients(pd: Deployment) -> int:
    """Engines that move chunks; what they tell of requests goes over connections of its own, made when there is something."""
    try:
        return sum("/facts" not in label for label in pd.status()["clients"])
    except UpstreamError:
        return -1
