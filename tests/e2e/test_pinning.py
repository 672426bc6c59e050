"""A prefix that a `cache_control` marker asks to keep survives what drops others from the cache."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest

from pdserve import env
from pdserve.openai_client import Client, total
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient

from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Deployment

RULES = " ".join(f"Rule {n}: pump {n % 7} is looked at every {n * 13 % 50} minutes." for n in range(60))


def chat(pd: Deployment, name: str, marked: bool) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "text", "text": f"You are {name}. {RULES}"}
    if marked:
        part["cache_control"] = {"type": "ephemeral", "ttl": "5m"}
    messages = [{"role": "system", "content": [part]}, {"role": "user", "content": "Which pump is first?"}]
    body = {"model": pd.client.model, "messages": messages, "max_tokens": 2, "temperature": 0}
    answer = pd.client.request("POST", "/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    told: dict[str, Any] = answer.json()
    return told


def cached(answer: dict[str, Any]) -> int:
    return int((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def crowd_out(pd: Deployment) -> None:
    """Chunks of nobody's, as many as the cache can hold, one after the other: what is least in use leaves."""
    assert pd.target.admin_url
    with Client(pd.target.admin_url) as admin:
        capacity = int(total(admin.metrics(), "pdserve_cache_capacity_bytes", tier="dram"))
    size = 16 << 20
    client = CacheClient(env.run_root() / pd.top.name / "cache.sock", "crowd")
    try:
        for n in range(capacity // size + 8):
            key = secrets.token_bytes(32)
            (grant,) = client.reserve("crowd", [wire.ReserveItem(key, b"", 0, 1, size, 256)], 30)
            if grant.status == wire.GRANTED:
                client.commit([wire.CommitItem(grant.reservation, n)], 30)
    finally:
        client.close()


def test_a_pinned_prefix_survives_pressure_and_another_does_not(pd: Deployment) -> None:
    def pinned() -> float:
        return total(pd.client.metrics(), "pdserve_prefix_pins_total", outcome="pinned")

    before = pinned()
    ada, bob = (f"{name} {secrets.token_hex(4)}" for name in ("Ada", "Bob"))
    for name, marked in ((ada, True), (bob, False)):
        assert cached(chat(pd, name, marked)) == 0
    wait_for(lambda: pinned() > before, 120, "the prefix was not pinned")
    pd.wait_idle()
    crowd_out(pd)
    pd.forget()
    kept, lost = cached(chat(pd, ada, True)), cached(chat(pd, bob, False))
    assert kept >= 256
    assert lost == 0


@pytest.fixture(autouse=True)
def emptied(pd: Deployment) -> Any:
    """The crowd leaves with the test."""
    yield
    assert pd.target.admin_url
    with Client(pd.target.admin_url) as admin:
        admin.request("DELETE", "/cache")
