from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault
from pdserve.proxy import guard

pytestmark = pytest.mark.anyio


def is_openai_error(reply: Any) -> bool:
    error = reply.json()["error"]
    return reply.headers["content-type"] == "application/json" and {"message", "type", "param", "code"} == set(error)


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (b"", 400, "is empty"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object, not an array"),
        (b'"text"', 400, "not a string"),
        (b'{"prompt": "\xff\xfe"}', 400, "not valid UTF-8"),
        (b'{"model": 5}', 400, "'model' must be a string, not 5"),
        (b'{"model": "fake", "stream": "yes"}', 400, "'stream' must be true or false, not \"yes\""),
        (b'{"model": "nope", "prompt": "a"}', 404, "The model `nope` does not exist. Available: fake."),
        (b'{"model": "fake"}', 400, "prompt: Field required"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_bad_request_is_told_what_is_wrong(rig: Any, path: str, raw: bytes, status: int, says: str) -> None:
    async with rig() as r:
        reply = await r.post(path, raw)
        assert reply.status == status
        assert is_openai_error(reply)
        assert says.replace("prompt", "messages" if "chat" in path else "prompt") in reply.json()["error"]["message"]
        assert "x-request-id" in reply.headers
        assert not r.d.seen


async def test_deep_json_is_refused(rig: Any) -> None:
    async with rig() as r:
        reply = await r.post("/v1/completions", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
        assert (reply.status, reply.json()["error"]["message"]) == (400, "The request body is nested too deeply.")


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_beyond_the_limit_is_a_413(rig: Any, declared: bool) -> None:
    async with rig(max_body=1000) as r:

        async def pieces() -> Any:
            for _ in range(20):
                yield b"x" * 100

        content = b"x" * 2000 if declared else pieces()
        reply = await r.client.post(r.url + "/v1/completions", content=content)
        assert reply.status_code == 413
        assert "larger than 1000 bytes" in reply.json()["error"]["message"]


async def test_a_body_that_does_not_come_is_a_408(rig: Any, quick: Any) -> None:
    async with rig(deadlines=quick(receive=0.1)) as r:
        host, port = r.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert (await reader.readline()).split()[1] == b"408"
        writer.close()


async def test_a_client_that_does_not_read_is_given_up(rig: Any, quick: Any, until: Any) -> None:
    async with rig(producers=0, deadlines=quick(send=0.2)) as r:
        r.d.max_model_len = 10**9
        reader, writer = await r.open("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 100_000})
        reader._transport.pause_reading()
        await until(lambda: r.value("pdserve_request_aborted_total", endpoint="/v1/completions") == 1, 20)
        writer.transport.abort()
        await until(lambda: r.d.running == 0)


async def test_large_bodies_arrive_whole(rig: Any) -> None:
    async with rig(engine={"max_model_len": 10**7}) as r:
        prompt = "wörd \U0001f600 " * 50_000
        assert (await r.complete(prompt=prompt, max_tokens=2)).status == 200
        assert r.p.seen[0].body["prompt"] == r.d.seen[0].body["prompt"] == prompt


async def test_models_and_version_come_from_an_engine(rig: Any) -> None:
    async with rig() as r:
        models = await r.get("/v1/models")
        assert [m["id"] for m in models.json()["data"]] == ["fake"]
        assert models.json()["data"][0]["max_model_len"] == 4096
        assert "fake" in (await r.get("/version")).json()["version"]
        assert models.headers["x-pdserve-route"] == "passthrough"
        assert (await r.client.head(r.url + "/v1/models")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/detokenize"])
async def test_what_is_passed_on_is_not_touched(rig: Any, path: str) -> None:
    async with rig() as r:
        raw = b'{ "input": "a", "model":"anything",  "kv": [1 ,2] }'
        reply = await r.post(path + "?q=1", raw, Authorization="Bearer k")
        assert reply.status == 200
        assert (reply.headers["x-pdserve-route"], reply.headers["x-pdserve-decode"]) == ("passthrough", "decode-0")
        assert r.d.seen[0].raw == raw
        assert r.d.seen[0].headers["authorization"] == "Bearer k"
        assert not r.p.seen
        malformed = await r.post(path, b"{")
        assert malformed.status == 400
        assert "not JSON" in malformed.json()["error"]["message"]


async def test_passing_on_survives_a_consumer_that_is_gone(rig: Any) -> None:
    async with rig(consumers=2, probe_every=60) as r:
        await r.d.stop()
        assert [(await r.post("/tokenize", {})).status for _ in range(2)] == [200, 200]
        await r.d.start()


async def test_unknown_paths_and_methods(rig: Any) -> None:
    async with rig() as r:
        reply = await r.post("/v1/nothing", {})
        assert (reply.status, is_openai_error(reply)) == (404, True)
        assert "/v1/nothing" in reply.json()["error"]["message"]
        wrong = await r.get("/v1/completions")
        assert (wrong.status, wrong.headers["allow"], is_openai_error(wrong)) == (405, "POST", True)


async def test_metrics_count_what_happened(rig: Any) -> None:
    async with rig() as r:
        r.d.gap = 0.002
        await r.complete(stream=True, max_tokens=4)
        await r.complete(model="nope")
        text = (await r.get("/metrics")).body.decode()
        for line in (
            'pdserve_requests_total{endpoint="/v1/completions",route="pd",status="200"} 1.0',
            'pdserve_requests_total{endpoint="/v1/completions",route="local",status="404"} 1.0',
            'pdserve_requests_running{endpoint="/v1/completions"} 0.0',
            'pdserve_time_to_first_token_seconds_count{route="pd"} 1.0',
            'pdserve_prefill_leg_seconds_count{instance="prefill-0"} 1.0',
            'pdserve_instance_up{instance="decode-0",role="decode"} 1.0',
        ):
            assert line in text
        assert r.value("pdserve_inter_token_latency_seconds_count", route="pd") >= 1


async def test_two_apps_in_one_process_know_nothing_of_each_other(rig: Any) -> None:
    async with rig() as one, rig() as two:
        await one.complete()
        assert one.value("pdserve_requests_total", endpoint="/v1/completions", route="pd", status="200") == 1
        assert two.value("pdserve_requests_total", endpoint="/v1/completions", route="pd", status="200") == 0


async def test_one_connection_serves_many_requests_whatever_became_of_them(rig: Any) -> None:
    async with rig() as r:
        host, port = r.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        r.d.faults.extend([Fault("status", 500), Fault("cut", after=1)])
        for stream, expected in ((False, b"500"), (True, b"200"), (True, b"200"), (False, b"200")):
            raw = json.dumps({"prompt": "a", "stream": stream, "max_tokens": 2}).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split()[1] == expected
            if b"chunked" in head:
                assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
            else:
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()


async def test_a_stop_answers_what_was_on_its_way(rig: Any, until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is open and has said nothing yet may be about to: it is not closed in the client's face."""
    monkeypatch.setattr(guard, "LINGER", 20.0)
    async with rig() as r:
        reader, writer = await asyncio.open_connection(*r.url.removeprefix("http://").split(":"))
        await until(lambda: len(r.server.server_state.connections) == 1)
        stopping = asyncio.create_task(r.server.shutdown())
        await asyncio.sleep(0.1)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n\r\n" + b'{"prompt": "a"}')
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer
        await stopping
        writer.close()


async def test_a_stop_lets_running_streams_end(rig: Any, until: Any) -> None:
    async with rig(engine={"gap": 0.02}) as r:
        task = asyncio.create_task(r.complete(stream=True, max_tokens=10))
        await until(lambda: bool(r.d.seen))
        stopping = asyncio.create_task(r.server.shutdown())
        events = (await task).events()
        assert events[-1] == "[DONE]"
        assert len(events) == 11
        await stopping
