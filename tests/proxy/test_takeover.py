from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.engines.body import Body
from pdserve.engines.fake import dialect
from pdserve.engines.fake.server import Fault
from pdserve.proxy.takeover import takeover

pytestmark = pytest.mark.anyio

USAGE = {"stream_options": {"include_usage": True}}
TOOL = {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": "required"}
COMPLETION = {"prompt": "one two three", "max_tokens": 8, "stream": True, **USAGE}
CHAT = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8, "stream": True, **USAGE}


class Run:
    """Requests through a rig of three consumers, each asked twice: disturbed and undisturbed."""

    def __init__(self, r: Any) -> None:
        self.r = r
        self.asked: list[Any] = []

    async def both(self, body: dict[str, Any], *faults: Fault) -> tuple[Any, Any]:
        """The answer of a run whose engines fail so one after another, and that of one without failures."""
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        coming: list[Fault | None] = list(faults)
        for n, engine in enumerate(self.r.consumers):
            engine.seen.clear()
            engine.pop_fault = lambda: coming.pop(0) if coming else None
            engine.created = n + 1
        self.before = {way: self.count(way) for way in ("resume", "repeat", "end", "none")}
        disturbed = await self.r.post(path, body, X_Request_Id="same")
        self.asked = [seen for engine in self.r.consumers for seen in engine.seen]
        assert not coming
        first = disturbed.events()[0]["created"]
        for engine in self.r.consumers:
            engine.created = first
        return disturbed, await self.r.post(path, body, X_Request_Id="same")

    def count(self, way: str) -> int:
        return int(self.r.value("pdserve_takeovers_total", how=way))

    def went_on(self) -> list[str]:
        """How the disturbed run went on, each time that it had to."""
        return [way for way, before in self.before.items() for _ in range(self.count(way) - before)]

    def resumes(self) -> list[Any]:
        return [seen for seen in self.asked if isinstance(seen.body.get("prompt"), list)]


@pytest.fixture
async def run(rig: Callable[..., Any]) -> Any:
    async with rig(consumers=3) as r:
        yield Run(r)


def said(reply: Any) -> str:
    """The text of the first choice, tool arguments included."""
    out = ""
    for event in reply.events()[:-1]:
        for choice in event["choices"]:
            if choice["index"] == 0:
                delta = choice.get("delta") or {}
                calls = "".join(c["function"]["arguments"] for c in delta.get("tool_calls") or ())
                out += choice.get("text") or delta.get("content") or calls
    return out


@pytest.mark.parametrize("kind", ["cut", "torn", "early"])
async def test_a_greedy_stream_goes_on_byte_for_byte(run: Any, kind: str) -> None:
    for after in range(1, 8):
        disturbed, quiet = await run.both({**COMPLETION, "temperature": 0}, Fault(kind, after=after))
        assert disturbed.body == quiet.body
        assert run.went_on() == ["resume"]
        (asked,) = run.resumes()
        assert asked.path == "/v1/completions"
        assert len(asked.body["prompt"]) == 3 + after
        assert asked.body["max_tokens"] == 8 - after


async def test_a_chat_stream_goes_on_byte_for_byte(run: Any) -> None:
    for after in range(1, 10):
        disturbed, quiet = await run.both({**CHAT, "temperature": 0}, Fault("cut", after=after))
        assert disturbed.body == quiet.body
        assert run.went_on() == ["repeat" if after == 1 else "end" if after == 9 else "resume"]


async def test_sampling_without_a_seed_is_resumed_too(run: Any) -> None:
    disturbed, quiet = await run.both(COMPLETION, Fault("cut", after=3))
    assert disturbed.body == quiet.body
    assert run.went_on() == ["resume"]


async def test_a_stream_is_carried_on_more_than_once(run: Any) -> None:
    disturbed, quiet = await run.both(COMPLETION, Fault("cut", after=2), Fault("torn", after=3))
    assert disturbed.body == quiet.body
    assert run.went_on() == ["resume", "resume"]
    assert sorted(len(asked.body["prompt"]) for asked in run.resumes()) == [3 + 2, 3 + 2 + 3]


async def test_but_not_for_ever(run: Any) -> None:
    path, faults = "/v1/completions", [Fault("cut", after=1)] * 9
    for engine in run.r.consumers:
        engine.pop_fault = faults.pop
    reply = await run.r.post(path, COMPLETION)
    assert reply.events()[-2]["error"]["code"] == 502
    assert len(faults) == 9 - 4


@pytest.mark.parametrize("stop", ["w99", ["w994 w995"], "5 w99", "never"])
async def test_stop_strings_across_the_seam(run: Any, stop: Any) -> None:
    """The answer counts up and meets the stop string or not; what was held back is neither lost nor given twice."""
    for after in range(1, 11):
        body = {**COMPLETION, "prompt": "x44", "max_tokens": 12, "temperature": 0, "stop": stop}
        disturbed, quiet = await run.both(body, Fault("cut", after=after))
        assert said(disturbed) == said(quiet)
        assert disturbed.events()[-2:] == quiet.events()[-2:]
        ends = [reply.events()[-3]["choices"][0] for reply in (disturbed, quiet)]
        assert ends[0]["finish_reason"] == ends[1]["finish_reason"]
        assert ends[0]["stop_reason"] == ends[1]["stop_reason"]


@pytest.mark.parametrize("stop", ["w99", ["w994 w995"], "5 w99", "never"])
@pytest.mark.parametrize("extra", [{}, {"include_stop_str_in_output": True}, {"min_tokens": 9}, {"return_token_ids": True}])
async def test_stop_strings_across_the_seam_of_a_sampled_stream(run: Any, stop: Any, extra: dict[str, Any]) -> None:
    """What the client has not been given yet must not be generated again: another engine says what it was."""
    ways = set()
    for after in (1, 3, 4, 5, 7, 10):
        body = {**COMPLETION, "prompt": "x44", "max_tokens": 12, "stop": stop, **extra}
        disturbed, quiet = await run.both(body, Fault("cut", after=after), *([Fault("cut", after=2)] * (after == 3)))
        assert said(disturbed) == said(quiet)
        assert disturbed.events()[-2:] == quiet.events()[-2:]
        ends = [reply.events()[-3]["choices"][0] for reply in (disturbed, quiet)]
        assert [ends[0][key] for key in ("finish_reason", "stop_reason")] == [ends[1][key] for key in ("finish_reason", "stop_reason")]
        ways |= set(run.went_on())
    assert "resume" in ways
    assert "none" not in ways


async def test_what_the_hidden_tokens_say_must_fit(run: Any) -> None:
    for engine in run.r.consumers:
        engine.says = lambda token: "?"
    reply, _ = await run.both({**COMPLETION, "stop": "nowhere"}, Fault("cut", after=4))
    assert reply.events()[-2]["error"]["code"] == 502
    assert run.went_on() == ["none"]


async def test_nobody_is_left_to_say_what_the_hidden_tokens_are(rig: Any) -> None:
    async with rig(consumers=2) as r:
        r.d.faults.append(Fault("cut", after=4))
        r.consumers[1].faults.append(Fault("cut", after=4))
        await r.complete(stream=True, stop="nowhere")  # whichever is asked first
        r.d.always = r.consumers[1].always = Fault("cut", after=4)
        reply = await r.complete(stream=True, stop="nowhere")
        assert "error" in reply.events()[-2]
        assert reply.events()[-1] == "[DONE]"


async def test_a_tool_call_is_repeated_and_joined(run: Any) -> None:
    for after in range(1, 9):
        disturbed, quiet = await run.both({**CHAT, **TOOL, "temperature": 0}, Fault("cut", after=after))
        assert said(disturbed) == said(quiet) != ""
        assert disturbed.events()[-2:] == quiet.events()[-2:]
        calls = [c for e in disturbed.events()[:-2] for d in e["choices"] for c in d["delta"].get("tool_calls") or ()]
        assert [c["function"].get("name") for c in calls] == ["look", *[None] * (len(calls) - 1)]
        assert [bool(c.get("id")) for c in calls] == [True, *[False] * (len(calls) - 1)]
        assert run.went_on() == ["repeat"]
        assert not any(b"return_token_ids" in seen.raw for seen in run.asked)


async def test_a_seeded_request_and_several_choices_are_repeated(run: Any) -> None:
    for extra in ({"seed": 5, "temperature": 1}, {"n": 3, "temperature": 0}):
        disturbed, quiet = await run.both({**COMPLETION, **extra}, Fault("cut", after=4))
        assert disturbed.body == quiet.body
        assert run.went_on() == ["repeat"]


async def test_what_is_left_to_chance_and_cannot_be_resumed_breaks_off(run: Any) -> None:
    disturbed, _ = await run.both({**COMPLETION, "n": 2, "temperature": 1}, Fault("cut", after=4))
    assert disturbed.events()[-2]["error"]["code"] == 502
    assert disturbed.events()[-1] == "[DONE]"
    assert run.went_on() == ["none"]


async def test_another_answer_is_not_passed_on_as_the_same(rig: Any) -> None:
    async with rig(consumers=2) as r:
        r.d.always = Fault("cut", after=3)
        r.consumers[1].shift = 1
        reply = await r.complete(stream=True, n=2, temperature=0)
        assert "differently" in reply.events()[-2]["error"]["message"]


@pytest.mark.parametrize("consumers", [1, 2])
async def test_an_engine_that_gives_up_in_words_is_replaced_or_quoted(rig: Any, consumers: int) -> None:
    async with rig(consumers=consumers) as r:
        r.d.always = Fault("confess", after=3)
        reply = await r.complete(stream=True, max_tokens=5)
        assert (reply.events()[-2].get("error") or {}).get("message") == ("made to fail" if consumers == 1 else None)


async def test_with_one_consumer_nothing_is_asked_and_nothing_can_be_done(rig: Any) -> None:
    async with rig() as r:
        r.d.always = Fault("cut", after=2)
        assert "error" in (await r.complete(stream=True)).events()[-2]
        assert b"return_token_ids" not in r.d.seen[0].raw


async def test_ids_that_the_client_asked_for_are_left_and_asked_for_once(run: Any) -> None:
    body = {**COMPLETION, "return_token_ids": True, "temperature": 0}
    disturbed, quiet = await run.both(body, Fault("cut", after=3))
    assert disturbed.body == quiet.body
    assert len([i for e in disturbed.events()[:-2] for i in e["choices"][0]["token_ids"]]) == 8
    assert all(seen.raw.count(b"return_token_ids") == 1 for seen in run.asked)


async def test_salt_and_model_go_along_and_the_text_limit_may_be_absent(run: Any) -> None:
    body = {k: v for k, v in CHAT.items() if k != "max_tokens"} | {"cache_salt": "s", "model": "fake", "min_tokens": 5}
    await run.both(body, Fault("cut", after=3))
    asked = run.resumes()[0].body
    assert (asked["cache_salt"], asked["model"], asked["max_tokens"], asked["min_tokens"]) == ("s", "fake", None, 3)


async def test_an_engine_that_dies_under_many_streams(rig: Any) -> None:
    async with rig(consumers=2, engine={"gap": 0.01}) as r:
        quiet = await r.complete(stream=True, max_tokens=30, temperature=0)
        tasks = [asyncio.create_task(r.complete(stream=True, max_tokens=30, temperature=0)) for _ in range(20)]
        await asyncio.sleep(0.15)
        await r.d.stop()
        replies = await asyncio.gather(*tasks)
        assert {said(reply) for reply in replies} == {said(quiet)}
        assert all(reply.events()[-1] == "[DONE]" for reply in replies)
        await r.d.start()


def events(*choices: dict[str, Any]) -> bytes:
    made = [{"id": "c", "choices": [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]} for choice in choices]
    return b"".join(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in made)


@pytest.mark.parametrize(
    ("stop", "said", "ids"),
    [
        (None, "abcd", [1, 2, 3, 4]),  # an engine that has fallen behind puts several tokens into one event
        (None, "abcd\ufffd", None),
        ("xyz", "abcdef", [1, 2, 3, 4]),
        ("xyz", "abcde\ufffd", None),
        ("xyz", "abcdefgh", None),
        ("xyz", "abcd", None),
        (None, "bcd", None),
        (None, "oops", None),
    ],
)  # fmt: skip
def test_where_several_tokens_came_at_once_an_engine_is_asked_what_they_say(stop: str | None, said: str, ids: Any) -> None:
    body = {"prompt": "p", "max_tokens": 9, "stream": True} | ({"stop": stop} if stop else {})
    over = takeover(dialect, "/v1/completions", Body(json.dumps(body).encode()), True)
    over.edit(events({"text": "ab", "token_ids": [1, 2], "prompt_token_ids": [7, 8]}, {"text": "cd", "token_ids": [3, 4]}))
    plan = over.plan()
    assert plan is not None
    assert [json.loads(asked)["tokens"] for _, asked in plan.questions] == [[1, 2, 3, 4]]
    after = over.answered([json.dumps({"prompt": text}).encode() for text in [said]])
    assert (after is None) is (ids is None)
    if after is not None:
        sent = json.loads(after.body)
        assert (sent["prompt"], sent["max_tokens"], sent.get("stop")) == ([7, 8, *ids], 5, None)


def test_a_blank_that_a_tokenizer_leaves_out_is_put_back() -> None:
    body = {"prompt": "p", "stream": True, "stop": "xyz"}
    over = takeover(dialect, "/v1/completions", Body(json.dumps(body).encode()), True)
    over.edit(events({"text": " ab", "token_ids": [1, 2, 3], "prompt_token_ids": [7]}))
    assert over.plan() is not None
    after = over.answered([json.dumps({"prompt": "abcd"}).encode()])
    assert after is not None
    assert after.seam is not None
    out = after.seam.feed(events({"text": "e", "token_ids": [4]}, {"text": "", "token_ids": [5], "finish_reason": "stop"}))
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in out.split(b"\n\n") if line) == "cde"
