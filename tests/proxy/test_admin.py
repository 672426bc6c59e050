from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pdserve.engines.fake.server import FakeEngine

pytestmark = pytest.mark.anyio
KEY = {"authorization": "Bearer boss"}


async def instances(r: Any) -> dict[str, str]:
    reply = await r.client.get(r.url + "/admin/instances", headers=KEY)
    return {i["name"]: i["state"] for i in reply.json()["instances"]}


async def test_the_admin_key_is_asked_for(rig: Any) -> None:
    async with rig(admin_token="boss") as r:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "boss"}):
            assert (await r.client.get(r.url + "/admin/instances", headers=headers)).status_code == 401
            assert (await r.client.delete(r.url + "/admin/instances/decode-0", headers=headers)).status_code == 401
        assert (await instances(r)) == {"prefill-0": "up", "decode-0": "up"}
    async with rig() as r:
        reply = await r.client.get(r.url + "/admin/instances", headers=KEY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "no_admin_key")


async def test_an_engine_is_taken_in_while_requests_run(rig: Any) -> None:
    async with rig(admin_token="boss") as r, FakeEngine(name="decode-9") as late:
        wanted = {"name": "decode-9", "role": "decode", "url": late.url}
        made = await r.client.post(r.url + "/admin/instances", json=wanted, headers=KEY)
        assert (made.status_code, made.json()) == (201, {"name": "decode-9", "state": "up"})
        again = await r.client.post(r.url + "/admin/instances", json=wanted, headers=KEY)
        assert again.status_code == 409
        assert {(await r.complete()).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-0", "decode-9"}


@pytest.mark.parametrize(
    "wanted",
    [b"{", b"[]", b'{"name":"x","role":"decode"}', b'{"name":"x","role":"king","url":"http://h:1"}',
     b'{"name":"A B","role":"decode","url":"http://h:1"}', b'{"name":"x","role":"decode","url":"ftp://h"}',
     b'{"name":"x","role":"decode","url":"http://h:1","weight":2}'],
)  # fmt: skip
async def test_what_is_not_an_instance_is_a_400(rig: Any, wanted: bytes) -> None:
    async with rig(admin_token="boss") as r:
        reply = await r.client.post(r.url + "/admin/instances", content=wanted, headers=KEY)
        assert (reply.status_code, set(reply.json()["error"])) == (400, {"message", "type", "param", "code"})


async def test_an_engine_that_is_taken_out_finishes_its_streams(rig: Any, until: Any) -> None:
    async with rig(consumers=2, admin_token="boss", engine={"gap": 0.02}) as r:
        running = asyncio.create_task(r.complete(stream=True, max_tokens=30))
        await until(lambda: bool(r.d.seen))
        reply = await r.client.delete(r.url + "/admin/instances/decode-0", headers=KEY)
        assert (reply.status_code, reply.json()) == (202, {"name": "decode-0", "state": "draining", "in_flight": 1})
        assert {(await r.complete(max_tokens=1)).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-1"}
        assert "decode-0" in await instances(r)
        events = (await running).events()
        assert (len(events), events[-1]) == (31, "[DONE]")
        await until(lambda: r.fleet.named("decode-0") is None)
        assert (await r.client.delete(r.url + "/admin/instances/decode-0", headers=KEY)).status_code == 404
        r.fleet.metrics["leg_failures_total"].labels("decode-0", "decode", "broken").inc()  # a leg that outlived it
        page = (await r.get("/metrics")).body
        assert b'instance="decode-0"' not in page  # what was counted of it went with it
        assert b'pdserve_instance_up{instance="decode-1"' in page
        assert json.loads((await r.get("/v1/models")).body)["data"]
