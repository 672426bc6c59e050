"""/v1/responses and /v1/messages over both legs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio

RESPONSES: tuple[str, dict[str, Any]] = (
    "/v1/responses",
    {"model": "fake", "instructions": "Be brief.", "input": "one two three", "max_output_tokens": 5},
)
MESSAGES: tuple[str, dict[str, Any]] = (
    "/v1/messages",
    {
        "model": "fake",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "one two three"}],
        "max_tokens": 5,
    },
)
LIMIT = {"/v1/responses": "max_output_tokens", "/v1/messages": "max_tokens"}


def read(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(piece.split(b"data: ", 1)[1]) for piece in raw.split(b"\n\n") if piece]


@pytest.mark.parametrize(("path", "body"), [RESPONSES, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
async def test_they_go_over_both_legs(rig: Any, path: str, body: dict[str, Any], stream: bool) -> None:
    async with rig(engine={"cached_tokens": 2}) as r:
        reply = await r.post(path, {**body, "stream": stream})
        assert (reply.status, reply.headers["x-pdserve-route"]) == (200, "pd")
        [leg], [answer] = r.p.seen, r.d.seen
        assert (leg.path, leg.body[LIMIT[path]], leg.body["stream"]) == (path, 1, False)
        assert answer.body["kv_transfer_params"]["do_remote_prefill"] is True
        assert {k: v for k, v in answer.body.items() if k != "kv_transfer_params"} == {**body, "stream": stream}
        alone = await r.client.post(r.d.url + path, json={**body, "stream": stream})
        texts = [json.dumps(e) for e in read(reply.body)] if stream else [json.dumps(reply.json())]
        plain = [json.dumps(e) for e in read(alone.content)] if stream else [json.dumps(alone.json())]
        assert len(texts) == len(plain)
        told = read(reply.body)[-1 if path == "/v1/responses" else -2] if stream else reply.json()
        used = (told.get("response") or told)["usage"]
        if path == "/v1/messages":  # what was cached counts apart from the other tokens of the prompt
            assert (used["cache_read_input_tokens"], used["input_tokens"]) == (2, 3)
        else:
            assert (used["input_tokens_details"]["cached_tokens"], used["input_tokens"]) == (2, 5)


@pytest.mark.parametrize(
    ("path", "extra", "left"),
    [
        ("/v1/responses", {"text": {"format": {"type": "json_schema"}, "verbosity": "low"}}, {"text": {"verbosity": "low"}}),
        ("/v1/responses", {"text": {"format": {"type": "json_object"}}, "top_logprobs": 3, "store": True}, {"store": False}),
        ("/v1/responses", {"tool_choice": "required", "tools": []}, {"tool_choice": "none", "tools": []}),
        ("/v1/responses", {"tool_choice": "auto", "tools": []}, {"tool_choice": "auto", "tools": []}),
        ("/v1/messages", {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "none"}}),
        ("/v1/messages", {"tool_choice": {"type": "auto"}}, {"tool_choice": {"type": "auto"}}),
        ("/v1/messages", {"output_config": {"format": {}, "effort": "low"}, "stop_sequences": ["x"]},
         {"output_config": {"effort": "low"}}),
        ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 2048}},
         {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
    ],
)  # fmt: skip
async def test_what_concerns_the_answer_alone_does_not_reach_the_producer(
    rig: Any, path: str, extra: dict[str, Any], left: dict[str, Any]
) -> None:
    async with rig() as r:
        body = dict((RESPONSES if path == "/v1/responses" else MESSAGES)[1])
        assert (await r.post(path, {**body, **extra})).headers["x-pdserve-route"] == "pd"
        known = {*body, "stream", "kv_transfer_params", LIMIT[path]} - left.keys()
        sent = {k: v for k, v in r.p.seen[0].body.items() if k not in known and (k != "store" or "store" in extra)}
        assert sent == left
        assert {k: r.d.seen[0].body[k] for k in extra} == extra


@pytest.mark.parametrize(
    ("extra", "why"), [({"previous_response_id": "r"}, "stored-response"), ({"background": True}, "background")]
)
async def test_what_one_engine_must_do_alone(rig: Any, extra: dict[str, Any], why: str) -> None:
    async with rig() as r:
        reply = await r.post(RESPONSES[0], {**RESPONSES[1], **extra})
        assert (reply.headers["x-pdserve-route"], reply.headers["x-pdserve-reason"]) == ("local", why)
        assert not r.p.seen


@pytest.mark.parametrize(("path", "body"), [RESPONSES, MESSAGES])
async def test_a_stream_that_breaks_off_ends_with_an_error_of_its_own_form(rig: Any, path: str, body: Any) -> None:
    for kind in ("cut", "early", "torn"):
        async with rig() as r:
            r.d.always = Fault(kind, after=3)
            found = read((await r.post(path, {**body, "stream": True})).body)
            assert found[-1]["type"] == "error"
            assert len(found) == 4


@pytest.mark.parametrize(("path", "body"), [RESPONSES, MESSAGES])
async def test_a_producer_that_fails_is_seen_through(rig: Any, path: str, body: Any) -> None:
    async with rig() as r:
        r.p.always = Fault("reset")
        reply = await r.post(path, body)
        assert (reply.status, reply.headers["x-pdserve-reason"]) == (200, "prefill-failed")


async def test_errors_of_our_own_are_in_anthropics_form(rig: Any) -> None:
    async with rig() as r:
        reply = await r.post("/v1/messages", b"{")
        assert (reply.status, reply.json()["type"], reply.json()["error"]["type"]) == (
            400,
            "error",
            "invalid_request_error",
        )
        assert "not valid JSON" in reply.json()["error"]["message"]
        await r.d.stop()
        reply = await r.post(*MESSAGES)
        assert reply.json()["type"] == "error"
        assert reply.status >= 502
        await r.d.start()


async def test_a_model_that_is_not_there_is_the_engines_to_refuse(rig: Any) -> None:
    async with rig() as r:
        reply = await r.post(MESSAGES[0], {**MESSAGES[1], "model": "nope"})
        assert (reply.status, reply.json()["error"]["message"]) == (404, "The model `nope` does not exist.")
