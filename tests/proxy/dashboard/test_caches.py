"""A daemon's answers, as a small HTTP server gives them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdserve.proxy.dashboard import caches
from pdserve.proxy.dashboard.caches import CacheView

pytestmark = pytest.mark.anyio


class Daemon:
    """Says what a test tells it to say."""

    def __init__(self) -> None:
        self.status: Any = {
            "daemon_id": "a",
            "uptime_s": 5.0,
            "chunks": 3,
            "used_bytes": 30,
            "capacity_bytes": 90,
            "tiers": {},
        }
        self.metrics = ""
        self.answers = True
        self.asked: list[str] = []
        self.over = asyncio.Event()
        self.lines: list[Any] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lines.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                self.asked.append(head)
                if not self.answers:
                    await self.over.wait()
                    return
                body = json.dumps(self.status) if " /status" in head else self.metrics
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())


@pytest.fixture
async def daemon() -> AsyncIterator[tuple[Daemon, CacheView]]:
    made = Daemon()
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0)
    view = CacheView("cache", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "secret")
    yield made, view
    made.over.set()
    await view.close()
    server.close()
    await asyncio.wait_for(asyncio.gather(*made.lines, return_exceptions=True), 10)
    await asyncio.sleep(0)  # for the transports' last callbacks


async def test_rates_are_between_two_looks(daemon: tuple[Daemon, CacheView]) -> None:
    it, view = daemon
    it.metrics = 'pdserve_cache_stored_bytes_total 100\npdserve_cache_loaded_bytes_total{tier="dram"} 10\n'
    await view.look(1.0)
    assert view.shown(1.0)["stored_s"] is None, "one look gives no rate"
    it.metrics = 'pdserve_cache_stored_bytes_total 300\npdserve_cache_loaded_bytes_total{tier="dram"} 50\n'
    await view.look(3.0)
    shown = view.shown(3.0)
    assert (shown["state"], shown["stored_s"], shown["loaded_s"]) == ("up", 100.0, 20.0)
    assert shown["tiers"][0]["loaded_s"] == 20.0
    assert "authorization: Bearer secret" in it.asked[0]


async def test_each_engine_has_its_own_link(daemon: tuple[Daemon, CacheView]) -> None:
    it, view = daemon
    it.status["clients"] = ["prefill-0/worker-0 (pid 1)", "prefill-0/scheduler (pid 2)", "idle-0 (pid 3)"]
    line = 'pdserve_cache_engine_bytes_total{{engine="{}",direction="{}",tier="{}"}} {}\n'.format
    it.metrics = line("prefill-0", "stored", "dram", 100) + line("prefill-0", "loaded", "disk", 10)
    await view.look(1.0)
    assert view.shown(1.0)["engines"]["prefill-0"] == {"stored_s": None, "loaded_s": None, "by_tier": {}}
    it.metrics = line("prefill-0", "stored", "dram", 300) + line("prefill-0", "loaded", "disk", 50)
    it.metrics += line("decode-0", "loaded", "dram", 8)
    await view.look(3.0)
    assert view.shown(3.0)["engines"] == {
        "decode-0": {"stored_s": 0.0, "loaded_s": 4.0, "by_tier": {"dram": 4.0}},
        "idle-0": {"stored_s": 0.0, "loaded_s": 0.0, "by_tier": {}},
        "prefill-0": {"stored_s": 100.0, "loaded_s": 20.0, "by_tier": {"disk": 20.0}},
    }


async def test_another_daemon_at_the_address_begins_anew(daemon: tuple[Daemon, CacheView]) -> None:
    it, view = daemon
    it.metrics = "pdserve_cache_stored_bytes_total 100\n"
    await view.look(1.0)
    it.status["daemon_id"] = "b"
    it.metrics = "pdserve_cache_stored_bytes_total 900\n"
    await view.look(3.0)
    assert view.shown(3.0)["stored_s"] is None


async def test_tiers_and_peers_are_as_the_daemon_says(daemon: tuple[Daemon, CacheView]) -> None:
    it, view = daemon
    it.status["tiers"] = {
        "disk": {"state": "no space left", "used_bytes": 5, "capacity_bytes": 10, "chunks": 1, "circuit": "open"}
    }
    it.status["peers"] = {"peers": [{"name": "host-b", "state": "down", "error": "refused", "chunks": 7}]}
    it.metrics = (
        'pdserve_cache_tier_bytes_total{tier="disk",direction="up"} 0\npdserve_peer_bytes_total{peer="host-b",direction="in"} 0\n'
        'pdserve_cache_tier_failures_total{tier="disk",op="get",reason="gone"} 4\n'
        'pdserve_cache_tier_failures_total{tier="disk",op="get",reason="error"} 3\n'
    )
    await view.look(1.0)
    it.metrics = it.metrics.replace('"up"} 0', '"up"} 40').replace('"in"} 0', '"in"} 60')
    await view.look(3.0)
    dram, disk = view.shown(3.0)["tiers"]
    assert (dram["name"], dram["used"], dram["state"]) == ("dram", 30, "ok")
    assert (disk["name"], disk["up_s"], disk["state"], disk["circuit"]) == ("disk", 20.0, "no space left", "open")
    peer = view.shown(3.0)["peers"][0]
    assert (peer["name"], peer["state"], peer["problem"], peer["in_s"]) == ("host-b", "down", "refused", 30.0)
    assert view.transfer_failures() == 3, "a chunk that is gone is no failure"


async def test_one_that_hangs_is_not_waited_for(
    daemon: tuple[Daemon, CacheView], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, view = daemon
    await view.look(1.0)
    it.answers = False
    monkeypatch.setattr(caches, "DEADLINE", 0.2)
    await view.look(9.0)
    shown = view.shown(9.0)
    assert (shown["state"], shown["age_s"], shown["stored_s"]) == ("down", 8.0, None)
    assert "no answer within 0.2 s" in shown["problem"]
    assert shown["tiers"][0]["used"] == 30, "what was known is still shown, with its age"


@pytest.mark.parametrize("status", [[], "text", {"tiers": {"disk": {}}}])
async def test_an_odd_answer_breaks_nothing(daemon: tuple[Daemon, CacheView], status: Any) -> None:
    it, view = daemon
    it.status = status
    await view.look(1.0)
    json.dumps(view.shown(1.0))
