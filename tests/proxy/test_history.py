from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault
from pdserve.proxy.history import History, trace_id
from pdserve.proxy.keys import Key
from pdserve.proxy.lifetime import Event, Lifetime
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.siblings import Siblings
from pdserve.proxy.told import merged
from pdserve.proxy.trail import MOST_LEGS, Trail

anyio = pytest.mark.anyio
KEY = {"authorization": "Bearer boss"}
RECORD = {
    "id", "received", "endpoint", "model", "session", "tenant", "route", "reason", "prefill", "decode", "state",
    "status", "error", "prompt_tokens", "cached_tokens", "output_tokens", "ttft_ms", "duration_ms", "load_ms",
    "saved_ms", "finish_reason", "trace_id", "recoveries",
}  # fmt: skip


async def listed(r: Any, query: str = "") -> list[dict[str, Any]]:
    reply = await r.client.get(f"{r.url}/admin/requests{query}", headers=KEY)
    assert reply.status_code == 200, reply.text
    found: list[dict[str, Any]] = reply.json()["requests"]
    return found


async def one(r: Any, request_id: str) -> dict[str, Any]:
    reply = await r.client.get(f"{r.url}/admin/requests/{request_id}", headers=KEY)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def spans(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(span["name"], span["instance"]) for span in record["spans"]]


@anyio
async def test_a_request_over_two_engines(rig: Any) -> None:
    async with rig(admin_token="boss") as r:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await r.complete(stream=True, max_tokens=3, user="eve")
        await r.post("/v1/completions", {"model": "fake", "prompt": "a b"}, x_request_id="mine", traceparent=trace)
        newest, oldest = await listed(r)
        assert set(newest) == set(oldest) == RECORD
        assert (oldest["route"], oldest["prefill"], oldest["decode"]) == ("pd", "prefill-0", "decode-0")
        assert (oldest["state"], oldest["status"], oldest["session"]) == ("done", 200, "eve")
        assert 0 < oldest["ttft_ms"] <= oldest["duration_ms"]
        assert (newest["id"], newest["ttft_ms"], newest["model"]) == ("mine", None, "fake")
        assert newest["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
        assert (newest["cached_tokens"], newest["prompt_tokens"]) == (None, None)  # nobody told
        shown = await one(r, oldest["id"])
        assert spans(shown) == [("prefill", "prefill-0"), ("first_token", "decode-0"), ("decode", "decode-0")]
        prefill, first, decode = shown["spans"]
        assert prefill["start_ms"] + prefill["ms"] <= first["start_ms"] + 0.01
        assert first["start_ms"] + first["ms"] == pytest.approx(oldest["ttft_ms"], abs=0.01)
        assert decode["start_ms"] + decode["ms"] <= oldest["duration_ms"] + 0.01
        assert shown["chunks"] is None
        assert spans(await one(r, "mine")) == [("prefill", "prefill-0"), ("decode", "decode-0")]


@anyio
async def test_headers_say_what_the_producer_had_cached(rig: Any) -> None:
    async with rig(admin_token="boss") as r:
        r.p.facts = {"cached": {"gpu": 0, "dram": 2048, "disk": 256}, "load_ms": 12.345, "saved_ms": 87.0, "load_reason": "faster"}
        for stream in (True, False):
            reply = await r.complete(stream=stream)
            told = {
                name: reply.headers[f"x-pdserve-{name}"]
                for name in ("cached-tokens", "load-ms", "saved-ms", "load-reason", "route")
            }
            assert told == {
                "cached-tokens": "gpu=0,dram=2048,disk=256",
                "load-ms": "12.3",
                "saved-ms": "87.0",
                "load-reason": "faster",
                "route": "pd",
            }
        record = (await listed(r))[0]
        assert (record["cached_tokens"], record["load_ms"]) == ({"dram": 2048, "disk": 256}, 12.345)
        r.p.facts = {"cached": {"gpu": 5}, "load_ms": 0.0, "saved_ms": None}
        assert not {"x-pdserve-saved-ms", "x-pdserve-load-reason"} & set((await r.complete()).headers)
        r.p.facts = {"cached": {"gpu": 5}, "load_reason": "faster\r\nx-other: 1"}  # what is no word is not passed on
        assert "x-pdserve-load-reason" not in (await r.complete()).headers
        r.p.facts = {"cached": "x"}
        assert "x-pdserve-cached-tokens" not in (await r.complete()).headers
        r.p.always = Fault("status")  # nobody told, so nothing is said
        assert not {h for h in (await r.complete()).headers if h.startswith("x-pdserve-")} & {
            "x-pdserve-cached-tokens", "x-pdserve-load-ms", "x-pdserve-saved-ms",
        }  # fmt: skip


@anyio
async def test_what_ran_wrong_is_in_the_record(rig: Any, until: Any) -> None:
    async with rig(admin_token="boss") as r:
        await r.post("/v1/completions", {"model": "nobody", "prompt": "x"})
        assert [(x["state"], x["status"], x["route"]) for x in await listed(r)] == [("failed", 404, "local")]
        assert "does not exist" in (await listed(r))[0]["error"]
        assert await listed(r, "?state=done") == []
        for query in ("?limit=0", "?limit=x", "?limit=1001", "?state=sad"):
            assert (await r.client.get(r.url + "/admin/requests" + query, headers=KEY)).status_code == 400
        assert (await r.client.get(r.url + "/admin/requests/none", headers=KEY)).status_code == 404
        assert (await r.client.get(r.url + "/admin/requests")).status_code == 401


@anyio
async def test_a_stream_that_another_engine_carried_on(rig: Any) -> None:
    async with rig(producers=2, consumers=2, admin_token="boss") as r:
        r.p.faults.append(Fault("status"))
        r.d.faults.append(Fault("cut", after=2))
        reply = await r.complete(stream=True, max_tokens=6, temperature=0)
        assert reply.events()[-1] == "[DONE]"
        (record,) = await listed(r)
        assert (record["state"], record["recoveries"], record["prefill"], record["decode"]) == (
            "recovered", 2, "prefill-1", "decode-1",
        )  # fmt: skip
        shown = await one(r, record["id"])
        assert spans(shown) == [
            ("retry", "prefill-0"),
            ("prefill", "prefill-1"),
            ("retry", "decode-0"),
            ("decode", "decode-1"),
        ]
        assert "prefill leg: prefill-0: it answered 500" in shown["spans"][0]["detail"]
        assert "decode leg: decode-0" in shown["spans"][2]["detail"]


@anyio
async def test_a_request_that_runs_is_listed_and_one_whose_client_left_is_cancelled(rig: Any, until: Any) -> None:
    async with rig(admin_token="boss", engine={"gap": 0.01}) as r:
        body = {"model": "fake", "prompt": "p", "stream": True, "max_tokens": 200}
        reader, writer = await r.open("/v1/completions", body)
        await reader.readuntil(b"data: ")
        (running,) = await listed(r, "?state=active")
        assert (running["state"], running["status"], running["decode"]) == ("active", 200, "decode-0")
        writer.close()
        await until(lambda: not r.app.state.history._running)
        assert [x["state"] for x in await listed(r)] == ["cancelled"]


@dataclass
class _Client:
    lifetime: Lifetime = field(default_factory=Lifetime)
    arrived: float = 0.0
    status: int = 200


@dataclass
class _Exchange:
    """As much of an exchange as a record is made from."""

    request_id: str
    client: _Client = field(default_factory=_Client)
    endpoint: str = "/v1/completions"
    model: str = "m" * 10_000
    error: str = "e" * 10_000
    facts: Facts = field(default_factory=lambda: Facts("", session="s" * 10_000))
    key: Key = field(default_factory=lambda: Key("anybody"))
    route: str = "pd"
    reason: str = ""
    prefill: str = "p"
    decode: str = "d"
    trace_id: str = ""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    trail: Trail = field(default_factory=Trail)


def ended(history: History, request_id: str) -> None:
    exchange: Any = _Exchange(request_id)
    history.begin(exchange)
    for n in range(1000):
        exchange.trail.leg("decode", "d")
        exchange.trail.lost("x" * 10_000 + str(n))
    exchange.client.lifetime.on(Event.ERROR)
    history.end(exchange)
    history.end(exchange)  # an end is an end


def test_memory_is_bounded_in_number_and_in_each_record() -> None:
    history = History(capacity=50)
    for n in range(200):
        ended(history, f"r{n}")
    assert len(history) == 50
    found = history.records(1000)
    assert [r["id"] for r in found] == [f"r{n}" for n in range(199, 149, -1)]
    assert len(history.records(7)) == 7
    assert history.record("r149") is None
    last = history.record("r199")
    assert last is not None
    assert len(last["spans"]) == MOST_LEGS
    assert len(json.dumps(last)) < 10_000


def test_what_was_told_is_kept_and_never_overwritten() -> None:
    history = History()
    ended(history, "a")
    history.fill("a", {"prompt_tokens": 7, "output_tokens": None, "state": "done"})
    history.fill("a", {"prompt_tokens": 8, "output_tokens": 2})
    record = history.record("a")
    assert record is not None
    assert (record["prompt_tokens"], record["output_tokens"], record["state"]) == (7, 2, "failed")


@anyio
async def test_workers_show_each_others_records(tmp_path: Any) -> None:
    histories = [History(), History(), History()]
    for n, history in enumerate(histories):
        ended(history, f"of-{n}")
        ended(history, f"again-{n}")
    all_ = [Siblings(history, tmp_path, n) for n, history in enumerate(histories)]
    for one_ in all_[:2]:
        await one_.start()
    (tmp_path / "history-9.sock").touch()  # of a worker that was killed
    assert {r["id"] for r in await all_[0].records(10, "")} == {"of-0", "again-0", "of-1", "again-1"}
    assert len(await all_[0].records(3, "failed")) == 3
    found = await all_[0].record("of-1")
    assert found is not None
    assert len(found["spans"]) == MOST_LEGS
    assert await all_[0].record("of-2") is None
    reader, writer = await asyncio.open_unix_connection(tmp_path / "history-1.sock")
    writer.write(b"[1]\n")
    assert await reader.read() == b""
    writer.close()
    for one_ in all_[:2]:
        await one_.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["history-9.sock"]


def test_the_trace_of_a_request() -> None:
    assert trace_id([(b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-00")]) == "a" * 32
    for wrong in (b"", b"00-xyz", b"00-" + b"A" * 32 + b"-" + b"b" * 16 + b"-00", b"00-" + b"a" * 32):
        assert trace_id([(b"accept", b"x"), (b"traceparent", wrong)]) is None


def test_legs_are_put_into_the_record() -> None:
    record = {"id": "a", "received": 100.0, "duration_ms": 900.0, "prefill": "p0", "decode": "d0",
              "prompt_tokens": None, "cached_tokens": None, "output_tokens": None, "load_ms": None, "saved_ms": None, "finish_reason": None,
              "spans": [{"name": "prefill", "start_ms": 1.0}]}  # fmt: skip
    p = {"instance": "p0", "prompt_tokens": 600, "cached_tokens": {"dram": 512}, "load_ms": 3.0, "saved_ms": 40.0,
         "output_tokens": 1, "finish_reason": "length", "chunks": [{"index": 0}], "notes": ["n"],
         "spans": [{"name": "load", "at": 100.0005, "ms": 3.0, "bytes": 9, "tier": "dram"}]}  # fmt: skip
    d = {
        "instance": "d0",
        "prompt_tokens": 600,
        "cached_tokens": {"dram": 600},
        "output_tokens": 20,
        "finish_reason": "stop",
    }
    told = merged(record, [p, d])
    assert (told["cached_tokens"], told["output_tokens"], told["finish_reason"]) == ({"dram": 512}, 20, "stop")
    assert [(s["name"], s["start_ms"]) for s in told["spans"]] == [("load", 0.5), ("prefill", 1.0)]
    assert told["spans"][0]["instance"] == "p0"
    assert (told["chunks"], told["notes"]) == ([{"index": 0}], ["n"])
    again = [{**p, "at": 200.0, "cached_tokens": {"dram": 1}}, {**p, "at": 100.2}]  # the id was used once more
    assert merged(record, again)["cached_tokens"] == {"dram": 512}
    alone = merged(record, [])
    assert (alone["cached_tokens"], alone["chunks"], alone["notes"]) == (None, None, [])
    assert merged({**record, "prefill": None}, [d])["cached_tokens"] == {"dram": 600}
