"""/v1/responses and /v1/messages carried on by another engine, through a real proxy and fake engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio

RESPONSES: dict[str, Any] = {"model": "fake", "instructions": "Be brief.", "input": "one two x44", "max_output_tokens": 12}
MESSAGES: dict[str, Any] = {
    "model": "fake", "system": "Be brief.", "messages": [{"role": "user", "content": "one two x44"}], "max_tokens": 12,
}  # fmt: skip
PATHS = [("/v1/responses", RESPONSES), ("/v1/messages", MESSAGES)]
CALL = {
    "/v1/responses": {"tools": [{"type": "function", "name": "f"}], "tool_choice": "required"},
    "/v1/messages": {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "any"}},
}
STOP = {"/v1/responses": "stop", "/v1/messages": "stop_sequences"}
both = pytest.mark.parametrize(("path", "body"), PATHS)


def read(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(piece.split(b"data: ", 1)[1]) for piece in raw.split(b"\n\n") if piece]


def plain(events: list[dict[str, Any]]) -> str:
    """Each id as the number of its first appearance, since engines make their own."""
    ids: dict[str, int] = {}

    def inner(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: inner(item, key) for key, item in sorted(value.items())}
        if isinstance(value, list):
            return [inner(item) for item in value]
        return ids.setdefault(value, len(ids)) if name in ("id", "item_id", "call_id") and isinstance(value, str) else value

    return json.dumps([inner(event) for event in events])


class Run:
    """Requests through a rig of three consumers, which fail as they are told, and then do not."""

    def __init__(self, r: Any) -> None:
        self.r = r

    async def quiet(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        return read((await self.r.post(path, {**body, "stream": True})).body)

    async def disturbed(self, path: str, body: dict[str, Any], *faults: Fault) -> list[dict[str, Any]]:
        coming: list[Fault | None] = list(faults)
        for engine in self.r.consumers:
            engine.seen.clear()
            engine.pop_fault = lambda: coming.pop(0) if coming else None
        before = self.counts()
        events = await self.quiet(path, body)
        assert not coming
        self.went_on = [way for way, n in self.counts().items() for _ in range(n - before[way])]
        return events

    def counts(self) -> dict[str, int]:
        ways = ("resume", "repeat", "end", "none")
        return {way: int(self.r.value("pdserve_takeovers_total", how=way)) for way in ways}

    def asked(self, path: str) -> list[Any]:
        return [seen.body for engine in self.r.consumers for seen in engine.seen if seen.path == path]


@pytest.fixture
async def run(rig: Callable[..., Any]) -> Any:
    async with rig(consumers=3) as r:
        yield Run(r)


@both
@pytest.mark.parametrize("kind", ["cut", "torn", "early"])
async def test_a_greedy_stream_is_what_it_would_have_been(run: Any, path: str, body: dict[str, Any], kind: str) -> None:
    body = {**body, "temperature": 0}
    quiet = await run.quiet(path, body)
    for after in range(1, len(quiet)):
        assert plain(await run.disturbed(path, body, Fault(kind, after=after))) == plain(quiet)
        assert run.went_on == ["end" if quiet[after]["type"] == "message_stop" else "repeat"]


@both
async def test_a_sampled_text_is_gone_on_with(run: Any, path: str, body: dict[str, Any]) -> None:
    quiet = await run.quiet(path, body)
    texts = [n for n, event in enumerate(quiet) if event["type"].endswith("delta") and event["type"] != "message_delta"]
    for after in range(texts[0] + 1, texts[-1] + 1):
        assert plain(await run.disturbed(path, body, Fault("cut", after=after))) == plain(quiet)
        assert run.went_on == ["resume"]
        (asked,) = run.asked("/v1/completions")
        assert len(asked["prompt"]) == 5 + after - texts[0]
        assert asked["max_tokens"] == 12 - (after - texts[0])


@both
async def test_more_than_once(run: Any, path: str, body: dict[str, Any]) -> None:
    faults = Fault("cut", after=6), None, None, Fault("torn", after=2)  # two questions lie between the streams
    assert plain(await run.disturbed(path, body, *faults)) == plain(await run.quiet(path, body))
    assert run.went_on == ["resume", "resume"]


@pytest.mark.parametrize("stop", ["w99", "w994 w995", "5 w99", "never"])
@pytest.mark.parametrize(("path", "extra", "how"), [
    ("/v1/messages", {"temperature": 0}, "repeat"),
    ("/v1/responses", {"temperature": 0}, "repeat"),
    ("/v1/responses", {"temperature": 1, "seed": 4}, "repeat"),
    ("/v1/responses", {"include_stop_str_in_output": True}, "resume"),
])  # fmt: skip
async def test_stop_strings_across_the_seam(run: Any, path: str, extra: dict[str, Any], stop: str, how: str) -> None:
    body = {**dict(PATHS)[path], STOP[path]: [stop], **extra}
    body |= {"input": "x371"} if path == "/v1/responses" else {"system": "x266"}  # the answers begin with w987 and w986
    quiet = await run.quiet(path, body)
    texts = [n for n, event in enumerate(quiet) if event["type"].endswith("delta") and event["type"] != "message_delta"]
    for after in range(texts[0] + 1, texts[-1] + 1):
        found = await run.disturbed(path, body, Fault("cut", after=after))
        assert run.went_on == [how]
        kinds = [event["type"] for event in quiet if not event["type"].endswith("delta")]
        assert [event["type"] for event in found if not event["type"].endswith("delta")] == kinds
        assert text_of(found) == text_of(quiet)
        assert plain(found[-2:]) == plain(quiet[-2:])


@both
async def test_a_sampled_text_that_ends_within_a_token_is_not_gone_on_with(run: Any, path: str, body: dict[str, Any]) -> None:
    found = await run.disturbed(path, {**body, STOP[path]: ["never"]}, Fault("cut", after=8))
    assert (found[-1]["type"], run.went_on) == ("error", ["none"])


def text_of(events: list[dict[str, Any]]) -> str:
    pieces = (event.get("delta") for event in events)
    return "".join(p if isinstance(p, str) else (p.get("text") or p.get("partial_json") or "") for p in pieces if p)


@both
async def test_a_call_is_asked_for_again_where_it_comes_out_the_same(run: Any, path: str, body: dict[str, Any]) -> None:
    body = {**body, **CALL[path], "temperature": 0}
    quiet = await run.quiet(path, body)
    for after in range(1, len(quiet) - 1):
        found = await run.disturbed(path, body, Fault("cut", after=after))
        assert plain(found) == plain(quiet)
        assert run.went_on == ["end" if quiet[after]["type"] == "message_stop" else "repeat"]


@both
async def test_a_sampled_call_ends_with_an_error_of_the_apis_own_form(run: Any, path: str, body: dict[str, Any]) -> None:
    found = await run.disturbed(path, {**body, **CALL[path]}, Fault("cut", after=6))
    assert found[-1]["type"] == "error"
    assert len(found) == 7
    assert run.went_on == ["none"]
    if path == "/v1/responses":
        assert [event["sequence_number"] for event in found] == list(range(7))


@both
async def test_a_prompt_that_is_counted_otherwise_is_not_gone_on_with(run: Any, path: str, body: dict[str, Any]) -> None:
    body = {**body, "kv_transfer_params": None}
    for engine in run.r.consumers + run.r.producers:
        engine.miscounts = 1
    found = await run.disturbed(path, body, Fault("cut", after=6))
    assert found[-1]["type"] == "error"
    assert run.went_on == ["none"]


@both
async def test_what_is_no_plain_chat_is_not_gone_on_with(run: Any, path: str, body: dict[str, Any]) -> None:
    for extra in ({"chat_template_kwargs": {"x": 1}}, {"a_field_of_the_future": 1}, {"tools": [{"name": "f"}]}):
        found = await run.disturbed(path, {**body, **extra}, Fault("cut", after=6))
        assert (found[-1]["type"], run.went_on) == ("error", ["none"])


@both
async def test_an_engine_that_gives_up_in_words_is_replaced(run: Any, path: str, body: dict[str, Any]) -> None:
    body = {**body, "temperature": 0}
    assert plain(await run.disturbed(path, body, Fault("confess", after=6))) == plain(await run.quiet(path, body))


async def test_with_one_consumer_its_own_words_are_passed_on(rig: Any) -> None:
    async with rig() as r:
        r.d.always = Fault("confess", after=6)
        found = read((await r.post("/v1/messages", {**MESSAGES, "stream": True})).body)
        assert (found[-1]["type"], found[-1]["error"]["message"]) == ("error", "made to fail")
