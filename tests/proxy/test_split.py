from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "one two three"}]}


async def test_a_completion_goes_over_both_legs(rig: Any) -> None:
    async with rig() as r:
        reply = await r.complete(max_tokens=4)
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert (reply.headers["x-pdserve-route"], reply.headers["x-pdserve-prefill"]) == ("pd", "prefill-0")
        assert reply.headers["x-pdserve-decode"] == "decode-0"
        (first,), (second,) = r.p.seen, r.d.seen
        assert first.body["max_tokens"] == 1
        assert first.body["kv_transfer_params"]["do_remote_decode"] is True
        assert second.body["max_tokens"] == 4
        assert second.body["kv_transfer_params"]["pdserve.source"] == "prefill-0"
        assert reply.json()["usage"]["completion_tokens"] == 4


async def test_the_answer_is_that_of_one_engine_alone(rig: Any) -> None:
    async with rig() as pd, rig(producers=0) as alone:
        for body in ({"max_tokens": 5}, {"max_tokens": 5, "n": 3}, {"prompt": [5, 6, 7]}, {"prompt": ["a b", "c d e"]}):
            one, two = await pd.complete(**body), await alone.complete(**body)
            assert [c["text"] for c in one.json()["choices"]] == [c["text"] for c in two.json()["choices"]]


async def test_the_handover_reaches_the_consumer_byte_for_byte(rig: Any) -> None:
    async with rig() as r:
        await r.complete()
        told = json.dumps(r.d.seen[0].body["kv_transfer_params"]).encode()
        assert b'"kv_transfer_params": ' + told in r.d.seen[0].raw


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_streaming_is_event_stream_and_ends_with_done(path: str, rig: Any) -> None:
    body = CHAT if "chat" in path else {"model": "fake", "prompt": "one two three"}
    async with rig() as r:
        reply = await r.post(path, {**body, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}})
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.events()
        assert events[-1] == "[DONE]"
        assert events[-2]["usage"]["completion_tokens"] == 3
        assert "stream_options" not in r.p.seen[0].body
        assert r.p.seen[0].body["stream"] is False


async def test_stream_bytes_are_the_engines(rig: Any) -> None:
    async with rig() as r:
        through = await r.complete(stream=True, max_tokens=6)
        rid = through.headers["x-request-id"]
        body = {"model": "fake", "prompt": "one two three", "stream": True, "max_tokens": 6}
        direct = await r.client.post(r.d.url + "/v1/completions", json=body, headers={"x-request-id": rid})
        assert through.body == direct.content


async def test_request_id_is_kept_made_and_the_same_for_both_legs(rig: Any) -> None:
    async with rig() as r:
        given = await r.post("/v1/completions", {"model": "fake", "prompt": "a"}, X_Request_Id="my-id.1")
        made = await r.complete()
        assert given.headers["x-request-id"] == "my-id.1"
        assert [s.request_id for s in (r.p.seen[0], r.d.seen[0])] == ["my-id.1", "my-id.1"]
        assert made.headers["x-request-id"] == r.p.seen[1].request_id == r.d.seen[1].request_id != ""
        unusable = await r.post("/v1/completions", {"model": "fake", "prompt": "a"}, X_Request_Id="x" * 5000)
        assert len(unusable.headers["x-request-id"]) == 32


async def test_headers_are_passed_on_to_both_legs(rig: Any) -> None:
    async with rig() as r:
        body = {"model": "fake", "prompt": "a"}
        await r.post("/v1/completions", body, Authorization="Bearer s3cret", X_Session_ID="s1", X_Vllm_Priority="3")
        for seen in (r.p.seen[0], r.d.seen[0]):
            assert seen.headers["authorization"] == "Bearer s3cret"
            assert seen.headers["x-session-id"] == "s1"
            assert seen.headers["x-vllm-priority"] == "3"
            assert "accept-encoding" not in seen.headers


async def test_what_would_fail_on_one_token_is_kept_from_the_producer_only(rig: Any) -> None:
    async with rig() as r:
        tool = {"type": "function", "function": {"name": "f"}}
        extra = {"tools": [tool], "tool_choice": "required", "response_format": {"type": "json_object"}}
        reply = await r.post(
            "/v1/chat/completions", {**CHAT, **extra, "min_tokens": 3, "max_tokens": 5, "logprobs": True}
        )
        assert reply.status == 200
        assert reply.headers["x-pdserve-route"] == "pd"
        first, second = r.p.seen[0].body, r.d.seen[0].body
        assert first["tools"] == [tool]
        assert not {"min_tokens", "response_format", "logprobs"} & first.keys()
        assert (second["tool_choice"], second["min_tokens"], second["logprobs"]) == ("required", 3, True)


@pytest.mark.parametrize("shape", [{"producers": 0}, {"producers": 0, "consumers": 0, "both": 2}])
async def test_without_producers_a_consumer_does_it_all_with_the_clients_very_bytes(
    shape: dict[str, int], rig: Any
) -> None:
    async with rig(**shape) as r:
        raw = b'{ "prompt":"a\\u0020b" ,"model" : "fake","temperature":1.0e0,\n"max_tokens":2 }'
        reply = await r.post("/v1/completions", raw)
        assert reply.headers["x-pdserve-route"] == "local"
        assert r.d.seen[0].raw == raw


async def test_several_prompts_go_local(rig: Any) -> None:
    async with rig() as r:
        reply = await r.complete(prompt=["a b", "c"])
        assert (reply.headers["x-pdserve-route"], reply.headers["x-pdserve-reason"]) == ("local", "several-prompts")
        assert not r.p.seen
        assert (await r.complete(prompt=["a b"])).headers["x-pdserve-route"] == "pd"
        assert (await r.complete(prompt=[1, 2, 3])).headers["x-pdserve-route"] == "pd"


async def test_a_producer_without_handover_is_still_a_pd_route(rig: Any) -> None:
    async with rig() as r:
        r.p.hands_over = False
        raw = b'{"model":"fake", "prompt":"a b"}'
        reply = await r.post("/v1/completions", raw)
        assert reply.headers["x-pdserve-route"] == "pd"
        assert r.d.seen[0].raw == raw


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_the_producers(stream: bool, rig: Any) -> None:
    async with rig() as r:
        r.p.cached_tokens = 2
        extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        reply = await r.complete(max_tokens=3, prompt="a b c d e", **extra)
        usage = reply.events()[-2]["usage"] if stream else reply.json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
        local = await r.complete(max_tokens=3, prompt=["a b", "c d e"])
        assert local.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_round_robin_over_producers_and_consumers(rig: Any) -> None:
    async with rig(producers=2, consumers=3) as r:
        names = [
            (x.headers["x-pdserve-prefill"], x.headers["x-pdserve-decode"])
            for x in [await r.complete() for _ in range(6)]
        ]
        assert [n[0] for n in names] == ["prefill-0", "prefill-1"] * 3
        assert [n[1] for n in names] == ["decode-0", "decode-1", "decode-2"] * 2


async def test_many_at_once(rig: Any) -> None:
    async with rig(producers=2, consumers=2, engine={"gap": 0.002}) as r:
        prompts = [f"prompt number {i} " * (i % 7 + 1) for i in range(60)]
        replies = await asyncio.gather(*(r.complete(prompt=p, stream=i % 2 == 0) for i, p in enumerate(prompts)))
        assert {x.status for x in replies} == {200}
        assert all(x.events()[-1] == "[DONE]" for x in replies[::2])
        assert r.value("pdserve_requests_total", endpoint="/v1/completions", route="pd", status="200") == 60


# The producer fails.


@pytest.mark.parametrize("fault", ["status", "reset", "cut", "garbage", "rubbish", "plain"])
async def test_a_failing_producer_is_replaced_by_another(fault: str, rig: Any) -> None:
    async with rig(producers=2) as r:
        r.p.always = Fault(fault)
        reply = await r.complete(max_tokens=3)
        assert (reply.status, reply.headers["x-pdserve-route"]) == (200, "pd")
        assert reply.headers["x-pdserve-prefill"] == "prefill-1"
        reason = "status" if fault in ("status", "plain") else "broken"
        assert r.value("pdserve_leg_failures_total", instance="prefill-0", leg="prefill", reason=reason) == 1


@pytest.mark.parametrize("fault", ["status", "reset", "garbage", "rubbish"])
async def test_without_another_producer_the_consumer_prefills(fault: str, rig: Any) -> None:
    async with rig() as r:
        r.p.always = Fault(fault)
        reply = await r.complete(stream=True)
        assert (reply.status, reply.headers["x-pdserve-route"]) == (200, "local")
        assert reply.headers["x-pdserve-reason"] == "prefill-failed"
        assert "x-pdserve-prefill" not in reply.headers
        assert "kv_transfer_params" not in r.d.seen[0].body


async def test_an_overloaded_producer_is_not_the_clients_fault(rig: Any) -> None:
    async with rig() as r:
        r.p.always = Fault("status", status=429)
        assert (await r.complete()).headers["x-pdserve-route"] == "local"


async def test_a_producer_that_is_gone(rig: Any) -> None:
    async with rig(probe_every=60) as r:
        await r.p.stop()
        reply = await r.complete()
        assert (reply.status, reply.headers["x-pdserve-route"]) == (200, "local")
        assert r.value("pdserve_leg_failures_total", instance="prefill-0", leg="prefill", reason="connect") == 1
        assert r.value("pdserve_instance_up", instance="prefill-0", role="prefill") == 0
        await r.complete()
        assert r.value("pdserve_leg_failures_total", instance="prefill-0", leg="prefill", reason="connect") == 1
        await r.p.start()


async def test_a_producer_that_never_answers_is_given_up(rig: Any, until: Any, quick: Any) -> None:
    async with rig(deadlines=quick(prefill=0.2)) as r:
        r.p.always = Fault("stall")
        reply = await r.complete()
        assert (reply.status, reply.headers["x-pdserve-route"]) == (200, "local")
        assert r.value("pdserve_leg_failures_total", instance="prefill-0", leg="prefill", reason="timeout") == 1
        await until(lambda: r.p.seen[0].aborted)


async def test_what_the_producer_refuses_is_returned_as_it_is(rig: Any) -> None:
    async with rig(producers=2, engine={"max_model_len": 20}) as r:
        reply = await r.complete(prompt="word " * 50)
        assert reply.status == 400
        assert reply.headers["content-type"] == "application/json"
        assert "maximum context length is 20" in reply.json()["error"]["message"]
        assert reply.json()["error"]["param"] == "input_tokens"
        assert len(r.producers[0].seen) + len(r.producers[1].seen) == 1
        assert not r.d.seen
        direct = await r.client.post(r.p.url + "/v1/completions", content=r.p.seen[0].raw)
        assert direct.content == reply.body


# The consumer fails.


@pytest.mark.parametrize("stream", [False, True])
async def test_a_consumer_that_is_gone_is_replaced(stream: bool, rig: Any) -> None:
    async with rig(consumers=2, probe_every=60) as r:
        await r.d.stop()
        replies = [await r.complete(stream=stream) for _ in range(3)]
        assert [(x.status, x.headers["x-pdserve-decode"]) for x in replies] == [(200, "decode-1")] * 3
        await r.d.start()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault", [Fault("reset"), Fault("garbage"), Fault("rubbish"), Fault("cut", after=0), Fault("torn", after=0)]
)
async def test_a_consumer_that_breaks_off_before_the_first_byte_is_replaced(
    fault: Fault, stream: bool, rig: Any
) -> None:
    async with rig(consumers=2) as r:
        r.d.always = fault
        reply = await r.complete(stream=stream)
        assert (reply.status, reply.headers["x-pdserve-decode"]) == (200, "decode-1")


async def test_no_consumer_left_is_a_502_then_a_503(rig: Any) -> None:
    async with rig(probe_every=60) as r:
        await r.d.stop()
        first, second = await r.complete(), await r.complete(stream=True)
        assert (first.status, second.status) == (502, 503)
        assert "decode-0" in first.json()["error"]["message"]
        assert second.json()["error"]["type"] == "service_unavailable"
        assert "retry-after" in second.headers
        assert (await r.get("/health")).status == 503
        await r.d.start()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_keeps_status_and_shape(stream: bool, rig: Any) -> None:
    async with rig() as r:
        r.d.always = Fault("status", status=503)
        reply = await r.complete(stream=stream)
        assert (reply.status, reply.headers["content-type"]) == (503, "application/json")
        assert reply.json()["error"]["message"] == "made to fail"
        r.d.always = Fault("plain", status=500)
        reply = await r.complete(stream=stream)
        assert (reply.status, reply.headers["content-type"]) == (500, "application/json")
        assert "Internal Server Error" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [Fault("status", status=500), Fault("plain", status=502), Fault("status", status=503)])
async def test_a_consumer_that_answers_with_an_error_of_its_own_is_replaced(fault: Fault, stream: bool, rig: Any) -> None:
    """An engine whose core has died answers 500 as long as its server lives."""
    async with rig(consumers=2) as r:
        r.d.always = fault
        for _ in range(2):
            reply = await r.complete(stream=stream)
            assert (reply.status, reply.headers["x-pdserve-decode"]) == (200, "decode-1")
        r.consumers[1].always = Fault("status", status=500)
        reply = await r.complete(stream=stream)
        assert reply.status in (fault.status, 500)  # of the one that was asked last
        assert len([seen for engine in r.consumers for seen in engine.seen]) == 6


async def test_a_fleet_that_is_overloaded_is_not_asked_twice_for_everything(rig: Any) -> None:
    async with rig(consumers=2, producers=0) as r:
        for engine in r.consumers:
            engine.always = Fault("status", status=503)
        replies = [await r.complete() for _ in range(40)]
        assert {reply.status for reply in replies} == {503}
        assert sum(len(engine.seen) for engine in r.consumers) < 40 + 10 + 8 + 3  # what is left at the start, what is earned


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"])
@pytest.mark.parametrize("leg", ["producer", "consumer"])
@pytest.mark.parametrize("fault", [Fault("bare", status=401), Fault("detail", status=404), Fault("plain", status=400)])
async def test_an_error_has_the_form_of_the_endpoint(path: str, leg: str, fault: Fault, rig: Any) -> None:
    """vLLM's own answer to a wrong key is {"error": "Unauthorized"}, which no client library reads."""
    async with rig() as r:
        (r.p if leg == "producer" and path != "/tokenize" else r.d).always = fault
        body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 5}
        for stream in (False, True):
            reply = await r.post(path, {**body, "stream": stream})
            assert (reply.status, reply.headers["content-type"]) == (fault.status, "application/json")
            assert isinstance(reply.json()["error"]["message"], str)
            assert (reply.json().get("type") == "error") is (path == "/v1/messages")


async def test_an_error_of_another_shape_is_put_into_openais(rig: Any) -> None:
    async with rig() as r:
        r.d.always = Fault("detail", status=404)
        reply = await r.post("/v1/embeddings", {"input": "a"})
        assert (reply.status, reply.headers["content-type"]) == (404, "application/json")
        assert reply.json()["error"]["code"] == 404
        assert "Not Found" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["cut", "torn", "early"])
async def test_a_stream_that_breaks_off_ends_with_an_error_event(kind: str, rig: Any) -> None:
    async with rig() as r:
        r.d.always = Fault(kind, after=2)
        reply = await r.complete(stream=True, max_tokens=6)
        events = reply.events()
        assert reply.status == 200
        assert len(events) == 4
        assert events[2]["error"]["code"] == 502
        assert events[3] == "[DONE]"
        assert r.value("pdserve_leg_failures_total", instance="decode-0", leg="decode", reason="broken") == 1


async def test_a_stream_that_falls_silent_ends_with_an_error_event(rig: Any, until: Any, quick: Any) -> None:
    async with rig(deadlines=quick(event=0.2)) as r:
        r.d.always = Fault("mute", after=2)
        events = (await r.complete(stream=True)).events()
        assert events[2]["error"]["code"] == 504
        assert events[3] == "[DONE]"
        await until(lambda: r.d.seen[0].aborted)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_consumer_that_never_answers_is_a_504(stream: bool, rig: Any, until: Any, quick: Any) -> None:
    async with rig(deadlines=quick(answer=0.2)) as r:
        r.d.always = Fault("stall")
        reply = await r.complete(stream=stream)
        assert reply.status == 504
        assert reply.json()["error"]["type"] == "upstream_error"
        await until(lambda: r.d.seen[0].aborted)


# The client leaves.


async def test_leaving_during_prefill_stops_the_producer_and_never_starts_the_consumer(rig: Any, until: Any) -> None:
    async with rig() as r:
        r.p.always = Fault("stall")
        _, writer = await r.open("/v1/completions", {"model": "fake", "prompt": "a b"})
        await until(lambda: len(r.p.seen) == 1)
        writer.close()
        await until(lambda: r.p.seen[0].aborted)
        await r.settled()
        assert not r.d.seen
        assert r.value("pdserve_request_aborted_total", endpoint="/v1/completions") == 1
        assert r.value("pdserve_requests_running", endpoint="/v1/completions") == 0


async def test_leaving_mid_stream_stops_the_consumer(rig: Any, until: Any) -> None:
    async with rig(engine={"gap": 0.01}) as r:
        body = {"model": "fake", "prompt": "a b", "stream": True, "max_tokens": 4000}
        reader, writer = await r.open("/v1/completions", body)
        await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: r.d.seen[0].aborted)
        await r.settled()
        assert r.value("pdserve_request_aborted_total", endpoint="/v1/completions") == 1


async def test_leaving_while_a_whole_answer_is_made_stops_the_consumer(rig: Any, until: Any) -> None:
    async with rig() as r:
        r.d.always = Fault("stall")
        _, writer = await r.open("/v1/chat/completions", CHAT)
        await until(lambda: len(r.d.seen) == 1)
        writer.transport.abort()
        await until(lambda: r.d.seen[0].aborted)


async def test_leaving_before_the_body_is_complete(rig: Any, until: Any) -> None:
    async with rig() as r:
        host, port = r.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await until(lambda: r.value("pdserve_requests_running", endpoint="/v1/completions") == 1)
        writer.close()
        await until(lambda: r.value("pdserve_request_aborted_total", endpoint="/v1/completions") == 1)
        assert not r.p.seen


async def test_many_leave_at_random_moments(rig: Any) -> None:
    async with rig(producers=2, consumers=2, engine={"delay": 0.01, "gap": 0.005}) as r:

        async def one(i: int) -> None:
            body = {"model": "fake", "prompt": f"p {i}", "stream": i % 3 != 0, "max_tokens": 50}
            _, writer = await r.open("/v1/completions", body)
            await asyncio.sleep(0.0007 * i)
            writer.transport.abort()

        await asyncio.gather(*(one(i) for i in range(80)))
        await r.settled()
        assert (await r.complete()).status == 200
