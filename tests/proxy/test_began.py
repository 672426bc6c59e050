"""What an engine that answers alone had cached, told by daemons in time for the answer's headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdserve.engines.vllm.facts import Teller
from pdserve.proxy import began as began_module
from pdserve.proxy.began import Began
from pdserve.transfer import telling

pytestmark = pytest.mark.anyio
HEADERS = ("x-pdserve-cached-tokens", "x-pdserve-load-ms", "x-pdserve-saved-ms")


class Daemon:
    """Keeps /began open and says there what the test says. Anything else that it is asked is not there."""

    def __init__(self) -> None:
        self.listening: list[asyncio.StreamWriter] = []
        self.asked: list[bytes] = []
        self.status = b"200 OK"
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"GET /began "):
                writer.write(b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                return writer.close()
            self.asked.append(head)
            writer.write(b"HTTP/1.1 %b\r\ntransfer-encoding: chunked\r\n\r\n1\r\n\n\r\n" % self.status)
            self.listening.append(writer)
            await reader.read()
            self.listening.remove(writer)
            writer.close()

    def say(self, raw: bytes) -> None:
        for writer in self.listening:
            writer.write(b"%x\r\n%b\r\n" % (len(raw), raw))

    def tell(self, request: str, instance: str, **more: Any) -> None:
        told = {"at": time.time(), "cached": {"gpu": 16, "dram": 512}, "load_ms": 12.345, "saved_ms": 87.0, "load_reason": "faster", **more}
        self.say(json.dumps({"request": request, "instance": instance, **told}).encode() + b"\n")


@pytest.fixture
async def daemon(listening: Any) -> AsyncIterator[Daemon]:
    made = Daemon()
    async with listening(made.serve, made.listening) as made.url:
        yield made


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(began_module, "RETRY_S", 0.05)
    monkeypatch.setattr(began_module, "WITHIN_S", 30.0)
    monkeypatch.setattr(began_module, "WHOLE_S", 30.0)  # one that waits for it to pass makes it short


@pytest.fixture
async def began(daemon: Daemon, until: Any) -> AsyncIterator[Began]:
    made = Began((("cache", daemon.url),), "boss")
    await made.start()
    await until(lambda: daemon.listening)
    yield made
    await made.stop()
    await until(lambda: not daemon.listening)


async def test_told_and_forgotten(began: Began, daemon: Daemon, until: Any) -> None:
    assert b"authorization: Bearer boss" in daemon.asked[0]
    began.expect("r")
    assert began.of("r", "both-0") is None
    daemon.tell("r", "both-0")
    await until(lambda: began.of("r", "both-0"))
    assert began.of("r", "both-0") == {"cached": {"gpu": 16, "dram": 512}, "load_ms": 12.345, "saved_ms": 87.0, "load_reason": "faster"}
    assert began.of("r", "both-1") is None
    began.forget("r")
    assert (began.of("r", "both-0"), len(began)) == (None, 0)


async def test_another_request_of_the_same_id_is_not_this_one(began: Began, daemon: Daemon, until: Any) -> None:
    daemon.tell("r", "both-0")  # before anybody expected it
    began.expect("next")
    daemon.tell("next", "both-0")
    await until(lambda: began.of("next", "both-0"))
    began.forget("next")
    began.expect("r")
    daemon.tell("r", "both-0", at=time.time() - 60)  # of a minute ago
    began.expect("last")
    daemon.tell("last", "both-0")
    await until(lambda: began.of("last", "both-0"))
    assert began.of("r", "both-0") is None
    began.expect("last")  # two run at once: it may be told of either
    assert began.of("last", "both-0") is None
    assert await began.of_whole("last", "both-0") is None
    began.forget("last")
    began.forget("last")
    began.forget("r")
    assert len(began) == 0


async def test_whatever_a_daemon_sends_it_is_asked_again(began: Began, daemon: Daemon, until: Any) -> None:
    daemon.say(b"\n{}\nrubbish\n")
    daemon.say(b"x" * 100_000)
    await until(lambda: len(daemon.asked) >= 2)
    await until(lambda: daemon.listening)
    began.expect("r")
    daemon.tell("r", "both-0", load_ms=None, saved_ms=None)
    await until(lambda: began.of("r", "both-0"))
    began.forget("r")


async def test_one_that_refuses_is_asked_again(daemon: Daemon, until: Any) -> None:
    daemon.status = b"503 Too Many"
    made = Began((("cache", daemon.url),), "")
    await made.start()
    await until(lambda: len(daemon.asked) >= 2)
    await made.stop()


async def test_a_whole_answer_waits_a_moment_for_what_is_on_its_way(
    began: Began, daemon: Daemon, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began.expect("first")
    assert await began.of_whole("first", "both-0") is None  # who has never told is not waited for
    daemon.tell("first", "both-0")
    await until(lambda: began.of("first", "both-0"))
    began.expect("second")
    asyncio.get_running_loop().call_soon(daemon.tell, "second", "both-0")
    assert (await began.of_whole("second", "both-0") or {})["load_ms"] == 12.345
    began.expect("third")
    monkeypatch.setattr(began_module, "WHOLE_S", 0.05)
    assert await began.of_whole("third", "both-0") is None  # and who has stopped to tell is waited for once
    for name in ("first", "second", "third"):
        began.forget(name)


def told(reply: Any) -> dict[str, str]:
    return {name: reply.headers[name] for name in HEADERS if name in reply.headers}


def in_order(r: Any, daemon: Daemon, until: Any) -> Any:
    """The engine begins to answer when what its daemon tells has come to the proxy."""
    engine, answer = r.d, r.d._generate

    async def told_first(seen: Any, *more: Any) -> None:
        daemon.tell(seen.request_id, engine.name)
        if len(r.app.state.began):
            await until(lambda: r.app.state.began.of(seen.request_id, engine.name))
        await answer(seen, *more)

    return told_first


async def test_headers_of_an_engine_that_answers_alone(rig: Any, daemon: Daemon, until: Any) -> None:
    async with rig(0, 0, 1, caches=(("cache", daemon.url),), admin_token="boss") as r:
        await until(lambda: daemon.listening)
        untold, r.d._generate = r.d._generate, in_order(r, daemon, until)
        for stream in (True, False):
            reply = await r.complete(stream=stream)
            assert told(reply) == dict(zip(HEADERS, ("gpu=16,dram=512", "12.3", "87.0"), strict=True))
            assert reply.headers["x-pdserve-route"] == "local"
        several = await r.complete(prompt=["one", "two"])
        assert several.status == 200
        assert told(several) == {}
        r.d._generate = untold
        assert told(await r.complete(stream=True)) == {}  # nobody tells: nothing is said
        records = (await r.client.get(r.url + "/admin/requests", headers={"authorization": "Bearer boss"})).json()
        assert [record["cached_tokens"] for record in records["requests"]] == [None, None, *[{"gpu": 16, "dram": 512}] * 2]


async def test_from_the_engines_thread_through_a_daemon(start_cache: Any, tmp_path: Any, until: Any) -> None:
    running = start_cache(tmp_path, "began", 64 << 20)
    made = Began((("cache", f"http://127.0.0.1:{running.port}"),), "")
    await made.start()
    teller = Teller(str(running.socket), "both-0")
    made.expect("one")

    def tell() -> bool:
        teller.put_first(telling.Began("cmpl-one-0-0123abcd", time.time(), {"gpu": 0, "dram": 256}, 1.5, -2.0))
        teller.put(lambda _: telling.Ended("cmpl-one-0-0123abcd", 1, "stop"))
        return made.of("one", "both-0") is not None

    await until(tell, 60)
    assert made.of("one", "both-0") == {"cached": {"gpu": 0, "dram": 256}, "load_ms": 1.5, "saved_ms": -2.0, "load_reason": ""}
    await asyncio.to_thread(running.stop)  # at once, although somebody listens
    await made.stop()
    await asyncio.to_thread(teller.close)
