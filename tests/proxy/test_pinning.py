from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request

from pdserve.proxy import markers, openai

pytestmark = pytest.mark.anyio

MARK = {"cache_control": {"type": "ephemeral"}}
HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def found(endpoint: str, body: dict[str, Any]) -> list[tuple[float, Any]]:
    return [(m.ttl, json.loads(m.counted)) for m in markers.markers(endpoint, json.dumps(body).encode())]


def test_where_anthropics_markers_are() -> None:
    body = {
        "model": "m", "max_tokens": 5,
        "tools": [{"name": "a"}, {"name": "b", **HOUR}, {"name": "c"}],
        "system": [{"type": "text", "text": "one", **MARK}, {"type": "text", "text": "two"}],
        "messages": [
            {"role": "user", "content": "plain"},
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y", **MARK}, {"text": "z"}]},
        ],
    }  # fmt: skip
    tools, system, message = found(openai.MESSAGES, body)
    assert tools[0] == 3600
    assert tools[1] == {
        "model": "m",
        "tools": [{"name": "a"}, {"name": "b"}],
        "messages": [{"role": "user", "content": ""}],
    }
    assert system[0] == 300
    assert system[1]["system"] == [{"type": "text", "text": "one"}]
    assert len(system[1]["tools"]) == 3
    assert message[1]["messages"] == [
        body["messages"][0],  # type: ignore[index]
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    ]
    assert len(message[1]["system"]) == 2


def test_openais_content_parts() -> None:
    parts = [{"type": "text", "text": "long", **HOUR}, {"type": "text", "text": "short"}]
    [(ttl, body)] = found(
        openai.CHAT, {"messages": [{"role": "system", "content": parts}, {"role": "user", "content": "a"}]}
    )
    assert ttl == 3600
    assert body == {
        "messages": [{"role": "system", "content": [{"type": "text", "text": "long"}]}],
        "add_generation_prompt": False,
    }


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": [{"text": "a", "cache_control": None}]}]},
        {"messages": [{"content": [{"text": "a", "cache_control": {"type": "other"}}]}]},
        {"messages": {"cache_control": {"type": "ephemeral"}}},
        {"messages": ["cache_control"], "tools": 5, "system": "cache_control"},
    ],
)
def test_what_is_no_marker(body: dict[str, Any]) -> None:
    for endpoint in (openai.CHAT, openai.MESSAGES, openai.COMPLETIONS):
        assert found(endpoint, body) == []


def test_of_many_markers_the_last_count() -> None:
    parts = [{"type": "text", "text": str(n), **MARK} for n in range(9)]
    counted = found(openai.CHAT, {"messages": [{"role": "user", "content": parts}]})
    assert [len(body["messages"][0]["content"]) for _, body in counted] == [6, 7, 8, 9]


@pytest.fixture
async def daemon() -> AsyncIterator[Any]:
    """What a cache daemon's admin address does with /cache/pin: `answers` in turn, the last for ever."""
    app = FastAPI()
    app.state.asked, app.state.answers = [], [{"pinned": 2, "refused": 0, "why": "", "wanted": 2}]

    @app.post("/cache/pin")
    async def pin(request: Request) -> Any:
        app.state.asked.append((request.headers.get("authorization"), await request.json()))
        answers = app.state.answers
        return answers.pop(0) if len(answers) > 1 else answers[0]

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    app.state.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield app.state
    server.should_exit = True
    await task


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "fake",
        "messages": [{"role": "user", "content": [{"type": "text", "text": text, **MARK}]}],
        **more,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_marked_prefix_is_counted_and_pinned_once(rig: Any, daemon: Any, until: Any, stream: bool) -> None:
    async with rig(caches=(("cache", daemon.url),), admin_token="t") as r:
        for _ in range(3):
            reply = await r.post("/v1/chat/completions", chat("one two three", stream=stream), X_Request_Id="mine")
            assert reply.status == 200
        await until(lambda: r.value("pdserve_prefix_pins_total", outcome="pinned") == 1)
        [(auth, asked)] = daemon.asked
        assert auth == "Bearer t"
        assert asked == {"request": "mine", "tokens": 3, "ttl_s": 300.0}
        assert not any(b"cache_control" in seen.raw for seen in r.p.seen + r.d.seen)
        await r.post("/v1/chat/completions", chat("one two three", cache_salt="other"))
        await until(lambda: len(daemon.asked) == 2)  # another tenant's prefix is another prefix


async def test_chunks_that_are_still_on_their_way_are_asked_for_again(rig: Any, daemon: Any, until: Any) -> None:
    daemon.answers = [
        {"pinned": 0, "refused": 0, "why": "no engine here told of this request", "wanted": None},
        {"pinned": 0, "refused": 1, "why": "not in memory", "wanted": 2},
        *daemon.answers,
    ]
    async with rig(caches=(("cache", daemon.url),)) as r:
        await r.post("/v1/messages", {**chat("a b"), "max_tokens": 3})
        await until(lambda: r.value("pdserve_prefix_pins_total", outcome="pinned") == 1, 10)
        assert len(daemon.asked) == 3


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({"pinned": 1, "refused": 1, "why": "over the quota", "wanted": 2}, "refused"),
        ({"pinned": 0, "refused": 0, "why": "", "wanted": 0}, "short"),
    ],
)
async def test_what_cannot_be_pinned_is_counted(rig: Any, daemon: Any, until: Any, answer: Any, outcome: str) -> None:
    daemon.answers = [answer]
    async with rig(caches=(("cache", daemon.url),)) as r:
        assert (await r.post("/v1/chat/completions", chat("a"))).status == 200
        await until(lambda: r.value("pdserve_prefix_pins_total", outcome=outcome) == 1)


async def test_a_daemon_that_is_gone_hinders_nobody(rig: Any, until: Any) -> None:
    async with rig(caches=(("cache", "http://127.0.0.1:9"),)) as r:
        assert (await r.post("/v1/chat/completions", chat("a"))).status == 200
        await until(lambda: r.value("pdserve_prefix_pins_total", outcome="failed") == 1)


async def test_without_a_cache_nothing_is_asked(rig: Any) -> None:
    async with rig() as r:
        assert (await r.post("/v1/chat/completions", chat("a"))).status == 200
        assert not any(seen.path == "/tokenize" for seen in r.d.seen)
