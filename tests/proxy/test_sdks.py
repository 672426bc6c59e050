"""OpenAI's and Anthropic's own clients against the proxy: what they read must be whole, also when an engine has died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio

SAY: Any = [{"role": "user", "content": "one two three"}]
CALL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture
async def clients(rig: Callable[..., Any]) -> Any:
    async with (
        rig(consumers=2) as r,
        openai.AsyncOpenAI(base_url=r.url + "/v1", api_key="k", max_retries=0) as of_openai,
        anthropic.AsyncAnthropic(base_url=r.url, api_key="k", max_retries=0) as of_anthropic,
    ):
        yield r, of_openai, of_anthropic


def die(r: Any, after: int) -> None:
    """The next consumer that is asked breaks off; whichever goes on does not."""
    coming: list[Fault | None] = [Fault("cut", after=after)]
    for engine in r.consumers:
        engine.pop_fault = lambda: coming.pop() if coming else None


@pytest.mark.parametrize("dies", [False, True])
async def test_chat_and_completions(clients: Any, dies: bool) -> None:
    r, client, _ = clients
    whole = await client.chat.completions.create(model="fake", messages=SAY, max_tokens=6)
    if dies:
        die(r, 4)
    usage = {"include_usage": True}
    text, used = "", None
    async for chunk in await client.chat.completions.create(
        model="fake", messages=SAY, max_tokens=6, stream=True, stream_options=usage
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        used = chunk.usage or used
    assert text == whole.choices[0].message.content != ""
    assert used is not None
    assert (used.prompt_tokens, used.completion_tokens) == (3, 6)
    several = await client.completions.create(model="fake", prompt=["a b", "c d"], max_tokens=3, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("dies", [False, True])
async def test_responses(clients: Any, dies: bool) -> None:
    r, client, _ = clients
    whole = await client.responses.create(model="fake", input="one two three", max_output_tokens=6)
    if dies:
        die(r, 6)
    async with client.responses.stream(model="fake", input="one two three", max_output_tokens=6) as stream:
        numbers = [event.sequence_number async for event in stream]
        final = await stream.get_final_response()
    assert numbers == list(range(len(numbers)))
    assert final.output_text == whole.output_text != ""
    assert (final.usage.input_tokens, final.usage.output_tokens, final.status) == (3, 6, "incomplete")


@pytest.mark.parametrize("dies", [False, True])
async def test_messages(clients: Any, dies: bool) -> None:
    r, _, client = clients
    whole = await client.messages.create(model="fake", messages=SAY, max_tokens=6)
    if dies:
        die(r, 5)
    async with client.messages.stream(model="fake", messages=SAY, max_tokens=6) as stream:
        final = await stream.get_final_message()
    assert final.content[0].text == whole.content[0].text != ""
    assert (final.usage.input_tokens, final.usage.output_tokens, final.stop_reason) == (3, 6, "max_tokens")
    assert (await client.messages.count_tokens(model="fake", messages=SAY)).input_tokens == 3


async def test_errors_are_those_that_the_clients_know(clients: Any) -> None:
    r, of_openai, of_anthropic = clients
    with pytest.raises(openai.NotFoundError):
        await of_openai.chat.completions.create(model="nope", messages=SAY)
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        await of_anthropic.messages.create(model="nope", messages=SAY, max_tokens=3)
    die(r, 5)
    with pytest.raises(openai.APIError, match="closed the connection"):
        async for _ in await of_openai.chat.completions.create(model="fake", messages=SAY, stream=True, n=2):
            pass
    die(r, 6)
    events = await of_openai.responses.create(model="fake", input="x", tools=[CALL], tool_choice="required", stream=True)
    last = [event async for event in events][-1]
    assert (last.type, last.sequence_number) == ("error", 6)
    die(r, 5)
    tool: Any = {"name": "f", "input_schema": {"type": "object"}}
    events = await of_anthropic.messages.create(
        model="fake", messages=SAY, max_tokens=6, tools=[tool], tool_choice={"type": "any"}, stream=True
    )
    with pytest.raises(anthropic.APIStatusError, match="closed the connection"):
        async for _ in events:
            pass
