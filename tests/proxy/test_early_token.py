"""The producer's own first token, given to the client at once: one answer, always, whatever the consumer says behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio

USAGE = {"stream_options": {"include_usage": True}}
COMPLETION = {"prompt": "one two three", "max_tokens": 8, "stream": True, **USAGE}
CHAT = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8, "stream": True, **USAGE}
GREEDY = {"temperature": 0}
TOOL = {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": "required"}


class Two:
    """Two rigs, with and without it, asked the same."""

    def __init__(self, on: Any, off: Any) -> None:
        self.on, self.off = on, off
        self.counted: dict[str, int] = {}

    async def both(self, body: dict[str, Any]) -> tuple[Any, Any]:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        before = self.counts()
        found = [await r.post(path, body, X_Request_Id="same") for r in (self.on, self.off)]
        self.counted = {name: n - before[name] for name, n in self.counts().items() if n > before[name]}
        return found[0], found[1]

    def counts(self) -> dict[str, int]:
        names = ("confirmed", "differed", "unanswered", "ended")
        return {name: int(self.on.value("pdserve_first_tokens_total", outcome=name)) for name in names}


@pytest.fixture(params=[(1, False), (2, True)], ids=["one", "two"])
async def two(rig: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    consumers, early = request.param
    async with rig(consumers=consumers, early_decode=early, early_token=True) as on, rig(consumers=consumers) as off:
        yield Two(on, off)


BOTH = pytest.mark.parametrize("body", [COMPLETION, CHAT], ids=["completion", "chat"])


@BOTH
async def test_the_stream_is_that_without_it_byte_for_byte(two: Two, body: dict[str, Any]) -> None:
    for extra in ({}, GREEDY, {"return_token_ids": True}, {"stop": ["w99", "never"]}, {"max_tokens": 2}):
        on, off = await two.both(body | extra)
        assert on.body == off.body, extra
        assert two.counted == {"confirmed": 1}, extra
        assert on.headers["x-pdserve-first-token"] == "prefill-0"
        assert on.headers["content-type"] == off.headers["content-type"]
        assert "x-pdserve-first-token" not in off.headers


WAITING: list[dict[str, Any]] = [
    {"stream": False, "stream_options": None}, {"max_tokens": 1}, {"max_tokens": 4094}, {"min_tokens": 2}, {"n": 2},
    {"seed": 3}, {"logprobs": 0}, {"presence_penalty": 0.5}, {"echo": True}, {"response_format": {"type": "json_object"}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, {"stop": " w", "temperature": 0},
    {"messages": CHAT["messages"], **TOOL}, {"some_field_of_the_future": 1}, {"bad_words": ["w1"]}, {"n": True},
]  # fmt: skip


async def test_what_could_begin_otherwise_waits_for_the_consumer(two: Two) -> None:
    for extra in WAITING:
        body = {**COMPLETION, **extra}
        if "messages" in body:
            del body["prompt"]
        on, off = await two.both(body)
        assert (on.status, on.body) == (off.status, off.body), extra
        assert two.counted == {}, extra
        assert "x-pdserve-first-token" not in on.headers


async def test_nor_does_it_where_the_engine_does_not_tell_its_token(two: Two) -> None:
    two.on.p.tells_first = False
    on, off = await two.both(COMPLETION)
    assert on.body == off.body
    assert two.counted == {}


async def test_the_first_token_does_not_wait_for_the_consumer(rig: Any, hold: Any, until: Any) -> None:
    for early in (True, False):
        async with rig(early_decode=early, early_token=True) as r:
            go = hold(r.d)
            reader, writer = await r.open("/v1/completions", {**COMPLETION})
            first = await reader.readuntil(b'"text"')
            assert b"200 OK" in first
            assert r.value("pdserve_time_to_first_token_seconds_count", route="pd") == 1
            go.set()
            await reader.readuntil(b"[DONE]")
            writer.close()
            assert r.value("pdserve_inter_token_latency_seconds_count", route="pd") >= 1


@BOTH
async def test_a_consumer_that_would_begin_otherwise_goes_on_behind_it(two: Two, body: dict[str, Any]) -> None:
    for consumer in two.on.consumers:
        consumer.luck = 7
    for extra in ({}, GREEDY, {"stop": "never"}, {"stop": ["w99"], "include_stop_str_in_output": True}):
        for consumer in two.on.consumers:
            consumer.seen.clear()
        on, off = await two.both(body | extra)
        assert said(on) == said(off), extra
        assert on.events()[-2].get("usage") == off.events()[-2].get("usage")
        assert {event["id"] for event in on.events()[:-1]} == {off.events()[0]["id"]}
        assert two.counted == {"differed": 1}
        asked = [seen for consumer in two.on.consumers for seen in consumer.seen]
        assert [seen.path for seen in asked][-1] == "/v1/completions"
        assert len(asked[-1].body["prompt"]) == 3 + 1
    assert two.on.value("pdserve_takeovers_total", how="resume") == 0
    await two.on.settled()


@BOTH
async def test_an_answer_that_chance_ends_with_its_first_token_is_complete_without_a_consumer(
    two: Two, body: dict[str, Any]
) -> None:
    on, off = await two.both({**body, "stop": " w"})
    if not body.get("messages"):
        assert on.events()[0]["choices"][0]["finish_reason"] == "stop"
    assert strip(on) == strip(off)
    assert two.counted == {"ended": 1}
    await two.on.settled()


async def test_stop_strings_are_seen_across_the_seam(two: Two) -> None:
    """The answer counts up from w44; the stop string begins in the first token and ends in the second."""
    for luck in (0, 7):
        for shown in (False, True):
            for stop in ("4 w4", "44 w45 w", "w444"):
                for consumer in two.on.consumers:
                    consumer.luck = luck
                body = {**COMPLETION, "prompt": "x44", "stop": stop, "include_stop_str_in_output": shown}
                on, off = await two.both(body)
                assert said(on) == said(off)
                assert end(on) == end(off)


@pytest.mark.parametrize("luck", [0, 8])
async def test_a_first_token_that_is_a_part_of_a_character(two: Two, luck: int) -> None:
    """Where chance is at work it binds, too, though it has no text; else the consumer is left to say it."""
    for engine in (*two.on.producers, *two.on.consumers, *two.off.producers, *two.off.consumers):
        engine.halves = True
    for extra in ({}, {"stop": ["4 w45"]}, {"max_tokens": 2}, {"max_tokens": 3, "return_token_ids": True}, GREEDY):
        for consumer in two.on.consumers:
            consumer.luck = luck if extra != GREEDY else 0
        on, off = await two.both({**COMPLETION, "prompt": "x44", **extra})
        assert said(on) == said(off), extra
        assert end(on) == end(off), extra
        assert tokens(on) == tokens(off), extra
        assert two.counted == ({} if extra == GREEDY else {"differed": 1} if luck else {"confirmed": 1})


async def test_a_consumer_that_dies_behind_the_first_token_is_taken_over(rig: Any) -> None:
    async with rig(consumers=3, early_decode=True, early_token=True) as r, rig(consumers=3) as quiet:
        expected = await quiet.post("/v1/completions", COMPLETION, X_Request_Id="same")
        for kind, after in (("reset", 0), ("cut", 0), ("torn", 0), ("early", 0), ("status", 0), ("cut", 1), ("torn", 3), ("confess", 1)):
            for luck in (0, 7):
                coming: list[Fault | None] = [Fault(kind, after=after)]
                for consumer in r.consumers:
                    consumer.pop_fault = lambda coming=coming: coming.pop(0) if coming else None
                    consumer.luck = luck
                reply = await r.post("/v1/completions", COMPLETION, X_Request_Id="same")
                assert said(reply) == said(expected), (kind, after, luck)
                assert reply.events()[-2:] == expected.events()[-2:], (kind, after, luck)


async def test_without_another_consumer_the_client_is_told(rig: Any) -> None:
    async with rig(early_decode=True, early_token=True) as r:
        r.d.always = Fault("cut", after=0)
        reply = await r.complete(stream=True)
        first, error, done = reply.events()
        assert first["choices"][0]["text"]
        assert error["error"]["code"] == 502
        assert done == "[DONE]"
        assert r.value("pdserve_first_tokens_total", outcome="unanswered") == 1


async def test_a_consumer_that_refuses_afterwards_ends_the_stream_with_an_error(rig: Any) -> None:
    async with rig(early_token=True) as r:
        r.d.always = Fault("status", 400)
        reply = await r.complete(stream=True)
        assert reply.events()[-1] == "[DONE]"
        assert "error" in reply.events()[-2]


async def test_a_client_that_leaves_behind_the_first_token_leaves_nothing_behind(rig: Any, until: Any) -> None:
    for early in (True, False):
        async with rig(early_decode=early, early_token=True) as r:
            r.d.always = Fault("stall")
            reader, writer = await r.open("/v1/completions", {**COMPLETION})
            await reader.readuntil(b'"text"')
            await until(lambda: r.d.running == 1)
            writer.transport.abort()
            await until(lambda: r.d.running == 0)
            await r.settled()


async def test_a_failed_producer_gives_no_first_token(rig: Any) -> None:
    async with rig(early_decode=True, early_token=True) as r:
        r.p.always = Fault("status", 500)
        reply = await r.complete(stream=True)
        assert reply.headers["x-pdserve-route"] == "local"
        assert "x-pdserve-first-token" not in reply.headers


async def test_its_record_says_where_the_first_token_came_from(rig: Any) -> None:
    async with rig(early_token=True) as r:
        await r.post("/v1/completions", {**COMPLETION}, X_Request_Id="told")
        record = (await r.get("/admin/requests/told")).json()
        spans = {span["name"]: span for span in record["spans"]}
        assert spans["first_token"]["instance"] == "prefill-0"
        assert spans["decode"]["instance"] == "decode-0"
        assert spans["decode"]["detail"] == "went on behind the first token of prefill-0"
        assert record["recoveries"] == 0
        assert record["state"] == "done"


async def test_many_at_once_are_each_one_answer(rig: Any) -> None:
    async with rig(consumers=2, producers=2, early_decode=True, early_token=True, engine={"gap": 0.001}) as r:
        r.consumers[1].luck = 3
        prompts = [f"number {n}" for n in range(60)]
        replies = await asyncio.gather(*(r.complete(prompt=p, stream=True, max_tokens=5) for p in prompts))
        for reply in replies:
            numbers = [int(word[1:]) for word in said(reply).split()]
            assert [(n - numbers[0]) % 1000 for n in numbers] == list(range(5))


def said(reply: Any) -> str:
    choices = [choice for event in reply.events()[:-1] for choice in event["choices"]]
    return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)


def end(reply: Any) -> Any:
    last = [choice for event in reply.events()[:-1] for choice in event["choices"]][-1]
    return last["finish_reason"], last.get("stop_reason"), reply.events()[-2].get("usage")


def tokens(reply: Any) -> list[int]:
    choices = [choice for event in reply.events()[:-1] for choice in event["choices"]]
    return [token for choice in choices for token in choice.get("token_ids") or ()]


def strip(reply: Any) -> list[Any]:
    """Its events but for how much of the prompt the answering engine found cached."""
    events = reply.events()
    for event in events[:-1]:
        (event.get("usage") or {}).pop("prompt_tokens_details", None)
    return events
