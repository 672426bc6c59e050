"""kill -9 of a consumer's process while it answers: another one goes on, and the clients notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ports import free_port

from pdserve.engines.fake.server import FakeEngine

pytestmark = pytest.mark.anyio
TOOLS = {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": "required"}


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """A fake engine in a process of its own."""
    port = free_port()
    words = [sys.executable, "-m", "pdserve.engines.fake.server", "--port", str(port), "--gap", "0.02"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(90):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    await client.get(f"http://127.0.0.1:{port}/health")
                    break
                await asyncio.sleep(0.05)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


async def read(url: str, path: str, body: dict[str, Any], began: asyncio.Event | None = None) -> tuple[str, list[Any]]:
    """Which engine answered first, and the events; `began` is set when some text is there."""
    events: list[Any] = []
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", url + path, json=body, headers={"x-session-id": "s"}) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
                if began is not None and len(events) >= 4:
                    began.set()
    return answer.headers["x-pdserve-decode"], events


def told(events: list[Any]) -> list[Any]:
    """What a client makes of the events."""
    assert events[-1] == "[DONE]"
    text, ends, usage = "", [], None
    for event in events[:-1]:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            delta = choice.get("delta") or {}
            text += choice.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                text += call["function"].get("name", "") + call["function"].get("arguments", "")
            ends += [choice["finish_reason"]] if choice.get("finish_reason") else []
    return [text, ends, usage, len({event["id"] for event in events[:-1]})]


async def test_a_consumer_is_killed_in_mid_stream(rig: Any) -> None:
    async with FakeEngine() as producer, engine() as (first, one), engine() as (second, two):
        instances = (("p", "prefill", producer.url), ("d-0", "decode", one), ("d-1", "decode", two))
        async with rig(producers=0, consumers=0, instances=instances, decode_policy="session") as r:
            shared = {"model": "fake", "max_tokens": 120, "stream": True, "temperature": 0}
            usage = {"stream_options": {"include_usage": True}}
            asked: list[tuple[str, dict[str, Any]]] = [
                ("/v1/completions", {**shared, "prompt": "one two three", **usage}),
                ("/v1/chat/completions", {**shared, "messages": [{"role": "user", "content": "a"}], **TOOLS}),
            ]
            quiet = [told(events) for _, events in await asyncio.gather(*(read(r.url, *a) for a in asked))]
            began = [asyncio.Event() for _ in asked]
            tasks = [asyncio.create_task(read(r.url, *a, e)) for a, e in zip(asked, began, strict=True)]
            async with asyncio.timeout(30):
                for event in began:
                    await event.wait()
            busiest = max(r.fleet.consumers(), key=lambda i: i.in_flight)
            assert busiest.in_flight == 2
            {"d-0": first, "d-1": second}[busiest.name].kill()
            disturbed = await asyncio.gather(*tasks)
            assert {name for name, _ in disturbed} == {busiest.name}
            assert [told(events) for _, events in disturbed] == quiet
            assert r.value("pdserve_takeovers_total", how="resume") == 1
            assert r.value("pdserve_takeovers_total", how="repeat") == 1
