"""Collector, feed and page in a proxy under uvicorn, with fake engines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from pdserve.proxy.dashboard import feed as feeds
from pdserve.proxy.dashboard.page import Page

pytestmark = pytest.mark.anyio


async def overview(r: Any) -> dict[str, Any]:
    reply = await r.client.get(r.url + "/admin/overview")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def pictures(r: Any, **headers: str) -> AsyncIterator[dict[str, Any]]:
    async with r.client.stream("GET", r.url + "/admin/events", headers=headers) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


async def test_the_picture_has_every_engine(rig: Any) -> None:
    async with rig(producers=1, consumers=2) as r:
        picture = (await overview(r))["picture"]
        assert [(e["name"], e["role"], e["state"]) for e in picture["engines"]] == [
            ("prefill-0", "prefill", "up"), ("decode-0", "decode", "up"), ("decode-1", "decode", "up"),
        ]  # fmt: skip
        assert picture["engines"][0]["version"] == "0.0.0+fake"
        assert picture["caches"] == []


async def test_events_follow_what_happens(rig: Any) -> None:
    async with rig(consumers=2) as r, asyncio.timeout(30):
        async for picture in pictures(r):
            if sum(picture["totals"]["requests"].values()) == 0:
                assert (await r.complete(stream=True)).status == 200
                continue
            assert picture["totals"]["requests"] == {"pd": 1.0}
            break
        await r.consumers[1].stop()
        async for picture in pictures(r):
            if picture["engines"][2]["state"] == "down":
                break
        await r.consumers[1].start()


async def test_percentiles_and_rates_come_from_two_samples(rig: Any) -> None:
    async with rig(engine={"gap": 0.01}) as r, asyncio.timeout(30):
        async for picture in pictures(r):
            assert (await r.complete(stream=True, max_tokens=6)).status == 200
            sample = picture.get("sample") or {}
            if sample.get("ttft_p50"):
                break
        assert sample["ttft_p50"] > 0
        assert sample["itl_p99"] >= sample["itl_p50"] > 0
        assert sample["req_pd"] > 0
        assert (await overview(r))["samples"][-1] == sample


async def test_a_watcher_that_leaves_is_let_go(rig: Any, until: Any) -> None:
    async with rig() as r:
        feed = r.app.state.dashboard.feed
        async for _ in pictures(r):
            assert feed.watchers == 1
            break
        await until(lambda: feed.watchers == 0)


async def test_there_is_a_bound_on_watchers(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WATCHERS", 0)
    async with rig() as r:
        assert (await r.get("/admin/events")).status == 503


async def test_a_stop_does_not_wait_for_watchers(rig: Any) -> None:
    async with rig() as r, asyncio.timeout(30):
        seen = 0
        async for _ in pictures(r):
            seen += 1
            r.app.state.dashboard.feed.close()  # as the server does when it is told to stop
        assert seen


@pytest.mark.parametrize("path", ["/admin/overview", "/admin/events"])
async def test_a_key_is_wanted_where_one_is_set(rig: Any, path: str) -> None:
    async with rig(admin_token="boss") as r:
        assert (await r.get(path)).status == 401
        wrong = await r.client.get(r.url + path, headers={"authorization": "Bearer no"})
        assert wrong.status_code == 401
    async with rig() as r:
        other = await r.client.get(r.url + path, headers={"host": "attacker.example"})
        assert (other.status_code, other.json()["error"]["code"]) == (403, "no_admin_key")


async def test_a_cache_that_is_not_there_says_why(rig: Any) -> None:
    async with rig(caches=(("cache", "http://127.0.0.1:9"),)) as r:
        cache = (await overview(r))["picture"]["caches"][0]
        assert cache["state"] == "down"
        assert "no connection" in cache["problem"]
        assert cache["tiers"] == []


async def test_the_page_is_served_with_a_policy(rig: Any) -> None:
    async with rig(admin_token="boss") as r:  # files hold no data: no key
        page = await r.client.get(r.url + "/dashboard")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        for name in re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page.text):
            found = await r.client.get(f"{r.url}/{name}")
            assert found.status_code == 200, name
            again = await r.client.get(f"{r.url}/{name}", headers={"if-none-match": found.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for name in ("..%2fapp.py", "nothing.js", "page.py"):
            assert (await r.get(f"/dashboard/{name}")).status == 404
        moved = await r.client.get(r.url + "/dashboard/", follow_redirects=True)
        assert moved.url == httpx.URL(r.url + "/dashboard")


def test_no_markup_is_made_from_text() -> None:
    """What comes from clients goes in as text: these ways around it are not used at all."""
    page = Page()
    for name, (body, _) in page._files.items():
        if name.endswith(".js") and not name.startswith("uplot"):
            found = re.findall(
                rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", body
            )
            assert found == [], name
    assert page.size < 300_000


LIGHT_DARK = re.compile(r"--([\w-]+): light-dark\((#[0-9a-f]+), (#[0-9a-f]+)\)")


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["bg", "surface", "raised"])
def test_text_can_be_read(theme: int, ground: str) -> None:
    """WCAG AA: 4.5 for text, 3 for lines that carry meaning."""
    css = Page()._files["app.css"][0].decode()
    colors = {name: values[theme] for name, *values in LIGHT_DARK.findall(css)}
    for name in ("text", "muted", "accent", "good", "busy", "warn", "bad"):
        assert contrast(colors[name], colors[ground]) >= 4.5, name
    for name in ("c0", "c1", "c2", "c3", "c4", "c5"):
        assert contrast(colors[name], colors[ground]) >= 3, name
