"""The requests of the conformance table: what each is called, where it goes, what it says."""

from __future__ import annotations

from typing import Any, NamedTuple

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "The harbour of the old town is known for three things: its lighthouse, its fish market and"
LONG = " ".join(f"Line {n} of the log says that pump {n % 7} ran for {n * 13 % 50} minutes." for n in range(30))
SAY = [{"role": "system", "content": "You answer in a few words."}, {"role": "user", "content": "Name two colours."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
FLAT_WEATHER = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
ANTHROPIC_WEATHER = {"name": "weather", "description": "The weather somewhere.", "input_schema": {
    "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PICTURE = [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
                                        {"type": "image_url", "image_url": {"url": PIXEL}}]}]  # fmt: skip


class Row(NamedTuple):
    name: str
    path: str
    body: dict[str, Any] | None  # None: a GET
    streams: bool = True  # also asked streamed


def completion(name: str, **fields: Any) -> Row:
    streams = fields.pop("streams", True)
    return Row(name, COMPLETIONS, {"prompt": TEXT, "temperature": 0, "max_tokens": 12, **fields}, streams)


def chat(name: str, **fields: Any) -> Row:
    streams = fields.pop("streams", True)
    return Row(name, CHAT, {"messages": SAY, "temperature": 0, "max_tokens": 12, **fields}, streams)


def without(row: Row, *names: str) -> Row:
    assert row.body is not None
    return row._replace(body={k: v for k, v in row.body.items() if k not in names})


ROWS = [
    completion("greedy"),
    completion("a long prompt", prompt=LONG),
    without(completion("max_tokens absent"), "max_tokens"),
    completion("max_tokens null", max_tokens=None, stop=["."]),
    completion("max_tokens 1", max_tokens=1),
    completion("max_tokens 0", max_tokens=0, streams=False),
    completion("min_tokens and stop", min_tokens=8, stop=[",", " and"]),
    completion("min_tokens above max_tokens", min_tokens=50),
    completion("stop string", stop="fish"),
    completion("stop strings, kept in the text", stop=["the", " a"], include_stop_str_in_output=True),
    completion("stop_token_ids, ignore_eos", stop_token_ids=[28], ignore_eos=True),
    completion("n = 3, seeded", n=3, seed=7, temperature=0.9),
    completion("seed", seed=11, temperature=1.0, top_p=0.9, top_k=40, min_p=0.01),
    completion("penalties", presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1),
    completion("logprobs", logprobs=3),
    completion("logprobs 0", logprobs=0),
    completion("echo", echo=True),
    completion("echo with logprobs", echo=True, logprobs=2),
    completion("prompt_logprobs", prompt_logprobs=2, streams=False),
    completion("prompt array", prompt=[TEXT, "Once upon a time"]),
    completion("prompt array of one", prompt=[TEXT]),
    completion("token ids", prompt=[504, 7827, 282, 260, 1165, 2591, 314, 1343]),
    completion("arrays of token ids", prompt=[[504, 7827, 282], [260, 1165, 2591, 314]]),
    completion("return_token_ids", return_token_ids=True),
    completion("logit_bias, bad_words", logit_bias={"28": -100}, bad_words=["fish"]),
    completion("stream_options.include_usage", stream_options={"include_usage": True}),
    completion("continuous_usage_stats", stream_options={"include_usage": True, "continuous_usage_stats": True}),
    completion("stream_options without stream", stream_options={"include_usage": True}, streams=False),
    completion("priority 0", priority=0),
    completion("priority 5 (not enabled)", priority=5),
    completion("cache_salt", cache_salt="tenant-a"),
    completion("cache_salt empty", cache_salt=""),
    completion("structured_outputs choice", structured_outputs={"choice": ["the lighthouse", "the castle"]}),
    completion("structured_outputs regex", structured_outputs={"regex": "[0-9]{2,4}"}),
    completion("structured_outputs json", structured_outputs={"json": SCHEMA}, max_tokens=40),
    completion("response_format json_schema", response_format=AS_SCHEMA, max_tokens=40),
    completion("unknown field", not_a_field={"a": [1, 2]}),
    completion("use_beam_search", use_beam_search=True, n=2, streams=False),
    completion("suffix (refused)", suffix=" end"),
    completion("prompt too long", prompt=[7] * 5000),
    completion("temperature out of range", temperature=-1),
    completion("wrong type", max_tokens="many"),
    without(completion("prompt missing"), "prompt"),
    completion("n = 2, logprobs", n=2, seed=3, temperature=0.8, logprobs=2),
    completion("token ids, echo", prompt=[504, 7827, 282], echo=True),
    completion("seed and stop", seed=5, temperature=0.8, stop=[" the", "."], max_tokens=24),
    chat("greedy"),
    without(chat("max_tokens absent", stop=["\n", ".", ","]), "max_tokens"),
    without(chat("max_completion_tokens", max_completion_tokens=6), "max_tokens"),
    chat("max_tokens and max_completion_tokens", max_completion_tokens=6),
    chat("min_tokens", min_tokens=10),
    chat("stop", stop=["blue", "Blue", "red", "Red"]),
    chat("n = 2, seeded", n=2, seed=3, temperature=0.8),
    chat("seed", seed=3, temperature=0.8),
    chat("logprobs, top_logprobs", logprobs=True, top_logprobs=3),
    chat("prompt_logprobs", prompt_logprobs=1, streams=False),
    chat("echo", echo=True),
    chat("tools, tool_choice auto", tools=[WEATHER], tool_choice="auto", max_tokens=30),
    chat("tools, tool_choice absent", tools=[WEATHER], max_tokens=30),
    chat("tools, tool_choice none", tools=[WEATHER], tool_choice="none"),
    chat("tools, tool_choice required", tools=[WEATHER], tool_choice="required", max_tokens=60),
    chat("tools, tool_choice named", tools=[WEATHER], max_tokens=60,
         tool_choice={"type": "function", "function": {"name": "get_weather"}}),
    chat("tool_choice required without tools", tool_choice="required"),
    chat("n = 2, tools, tool_choice required", tools=[WEATHER], tool_choice="required", n=2, max_tokens=60),
    chat("seed, logprobs, stop", seed=3, temperature=0.8, logprobs=True, stop=["."], max_tokens=24),
    chat("parallel_tool_calls false", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
         max_tokens=60),
    chat("response_format json_schema", response_format=AS_SCHEMA, max_tokens=40),
    chat("response_format json_object", response_format={"type": "json_object"}, max_tokens=30),
    chat("structured_outputs regex", structured_outputs={"regex": "(red|green) and (blue|white)"}),
    chat("stream_options.include_usage", stream_options={"include_usage": True}),
    chat("continue_final_message", continue_final_message=True, add_generation_prompt=False,
         messages=[*SAY, {"role": "assistant", "content": "Red and"}]),
    chat("chat_template_kwargs, documents", chat_template_kwargs={"x": 1}, documents=[{"title": "a", "text": "b"}]),
    chat("cache_salt, priority, user", cache_salt="tenant-b", priority=0, user="u-1"),
    chat("return_token_ids", return_token_ids=True),
    chat("content parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Name two colours."}]}]),
    chat("image (a text model)", messages=PICTURE),
    chat("unknown role", messages=[{"role": "narrator", "content": "Hm."}]),
    chat("unknown field", not_a_field=1),
    chat("messages missing", messages=None),
    Row("plain text", "/v1/responses", {"input": "Name two colours.", "temperature": 0, "max_output_tokens": 12}),
    Row("instructions and items", "/v1/responses", {"instructions": "Be brief.", "temperature": 0,
        "max_output_tokens": 12, "input": [{"role": "user", "content": "Name two colours."}]}),
    Row("plain text", "/v1/messages", {"max_tokens": 12, "temperature": 0, "messages": SAY[1:]}),
    Row("system and stop_sequences", "/v1/messages", {"max_tokens": 12, "temperature": 0, "messages": SAY[1:],
        "system": "Be brief.", "stop_sequences": ["blue", "Blue"]}),
    Row("temperature, stop, seed", "/v1/responses", {"input": "Count: one, two,", "temperature": 0.7, "seed": 3,
        "stop": ["five"], "max_output_tokens": 16}),
    Row("text.format json_schema", "/v1/responses", {"input": "A person.", "temperature": 0, "max_output_tokens": 40,
        "text": {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}}),
    Row("tools, tool_choice auto", "/v1/responses", {"input": "Name two colours.", "temperature": 0,
        "max_output_tokens": 30, "tools": [FLAT_WEATHER], "tool_choice": "auto"}),
    Row("tools, tool_choice required", "/v1/responses", {"input": "The weather in Paris?", "temperature": 0,
        "max_output_tokens": 60, "tools": [FLAT_WEATHER], "tool_choice": "required"}),
    Row("top_logprobs", "/v1/responses", {"input": "Name two colours.", "temperature": 0, "max_output_tokens": 4,
        "top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
    Row("a response that is not there", "/v1/responses", {"input": "And?", "previous_response_id": "resp_nothing"}),
    Row("wrong type", "/v1/responses", {"input": 5}),
    Row("blocks with cache_control", "/v1/messages", {"max_tokens": 12, "temperature": 0,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Name two colours."}]}]}),
    Row("tools, tool_choice auto", "/v1/messages", {"max_tokens": 30, "temperature": 0, "messages": SAY[1:],
        "tools": [ANTHROPIC_WEATHER], "tool_choice": {"type": "auto"}}),
    Row("tools, tool_choice any", "/v1/messages", {"max_tokens": 60, "temperature": 0, "messages": SAY[1:],
        "tools": [ANTHROPIC_WEATHER], "tool_choice": {"type": "any"}}),
    Row("top_k, top_p, metadata", "/v1/messages", {"max_tokens": 8, "temperature": 0, "top_k": 5, "top_p": 0.9,
        "metadata": {"user_id": "u"}, "messages": SAY[1:]}),
    Row("max_tokens missing", "/v1/messages", {"messages": SAY[1:]}),
    Row("unknown model", "/v1/messages", {"model": "nope", "max_tokens": 4, "messages": SAY[1:]}),
    Row("tools, tool_choice none", "/v1/messages", {"max_tokens": 12, "temperature": 0, "messages": SAY[1:],
        "tools": [ANTHROPIC_WEATHER], "tool_choice": {"type": "none"}}),
    Row("several turns", "/v1/messages", {"max_tokens": 12, "temperature": 0, "messages": [
        *SAY[1:], {"role": "assistant", "content": "Red, blue."}, {"role": "user", "content": "One more."}]}),
    Row("a chat", "/v1/messages/count_tokens", {"messages": SAY[1:], "system": "Be brief."}, False),
    Row("a text (no embedding model)", "/v1/embeddings", {"input": "a"}, False),
    Row("a prompt", "/tokenize", {"prompt": TEXT}, False),
    Row("a chat", "/tokenize", {"messages": SAY}, False),
    Row("tokens", "/detokenize", {"tokens": [504, 7827, 282]}, False),
    Row("list", "/v1/models", None, False),
    Row("version", "/version", None, False),
]  # fmt: skip
