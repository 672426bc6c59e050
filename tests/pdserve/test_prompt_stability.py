from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import ConfigError
from pdserve.prompt_stability import Finding, analyse, compared, prompt_of

RULES = "You are a careful assistant. " * 40
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks around. " * 20, "parameters": {}}}
OTHER = {"type": "function", "function": {"name": "go", "description": "Goes somewhere. " * 20, "parameters": {}}}


def found(*bodies: dict[str, Any]) -> list[Finding]:
    return list(compared(prompt_of(body, n) for n, body in enumerate(bodies, 1)))


def chat(system: str, *turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *said], **more}


def test_a_conversation_that_only_grows_is_left_alone() -> None:
    assert not found(chat(RULES, "hello"), chat(RULES, "hello", "hi", "how are you"), chat(RULES, "hello", "hi", "bye"))


def test_questions_that_differ_at_their_end_are_left_alone() -> None:
    assert not found(chat(RULES, "what is two and two"), chat(RULES, "who was Ada Lovelace"))


def test_prompts_that_have_nothing_to_do_with_each_other_are_left_alone() -> None:
    assert not found({"prompt": "a story " * 100}, {"prompt": "quite another one " * 100})


@pytest.mark.parametrize(
    ("was", "now", "kind"),
    [
        ("Now: 2026-11-22T10:15:00Z.", "Now: 2026-11-22T10:16:30Z.", "timestamp"),
        ("It is 10:15.", "It is 11:20.", "timestamp"),
        ("Today is Sunday.", "Today is Monday.", "timestamp"),
        ("Time 1790000000.", "Time 1790000077.", "timestamp"),
        (
            "Request 0b5c9c1e-0000-4000-8000-000000000001.",
            "Request 77aa9c1e-0000-4000-8000-000000000001.",
            "identifier",
        ),
        ("Turn 4 of many.", "Turn 5 of many.", "number"),
        ("Be kind.\n\nBe brief.", "Be kind.\nBe brief.", "whitespace"),
        ("Be  kind.", "Be kind.", "whitespace"),
    ],
)
def test_what_changes_without_meaning_anything(was: str, now: str, kind: str) -> None:
    [finding] = found(chat(f"{was} {RULES}", "hello"), chat(f"{now} {RULES}", "hello"))
    assert (finding.kind, finding.path, finding.line, finding.earlier) == (kind, "messages[0].content", 2, 1)
    assert finding.shared_tokens < 20
    assert finding.lost_tokens > 0.9 * len(RULES) / 4
    assert finding.was != finding.now
    assert finding.fix
    assert f"({kind})" in str(finding)


def test_json_with_its_keys_in_another_order() -> None:
    turned = {"function": TOOL["function"], "type": "function"}
    [finding] = found(chat(RULES, "a", tools=[TOOL]), chat(RULES, "a", tools=[turned]))
    assert (finding.kind, finding.path) == ("reordered-json", "tools[0]")


def test_tools_in_another_order() -> None:
    [finding] = found(chat(RULES, "a", tools=[TOOL, OTHER]), chat(RULES, "a", tools=[OTHER, TOOL]))
    assert (finding.kind, finding.path) == ("reordered-tools", "tools[0]")


def test_spaces_between_json_tokens_do_not_matter(tmp_path: Path) -> None:
    body = chat(RULES, "a", tools=[TOOL])
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(body) + "\n\n" + json.dumps(body, separators=(",", ":")) + "\n")
    assert not analyse(path)


def test_a_history_that_is_cut_at_its_front() -> None:
    turns = [f"turn {word} " * 30 for word in ("one", "two", "three", "four", "five", "six")]
    [finding] = found(chat(RULES, *turns[:5], user="u"), chat(RULES, *turns[2:], "seven", user="u"))
    assert finding.kind == "history-cut"
    assert finding.path.startswith("messages[1]")


def test_a_history_that_is_rewritten() -> None:
    first = chat(RULES, "tell me of the sea " * 20, "it is wide " * 40, "and then?", user="u")
    second = chat(RULES, "tell me of the sea " * 20, "(summary) " * 5, "and then?", "more", "go on", user="u")
    [finding] = found(first, second)
    assert (finding.kind, finding.path) == ("history-changed", "messages[2].content")


@pytest.mark.parametrize(("name", "field"), [("salt", "cache_salt"), ("model", "model")])
def test_what_parts_two_caches_altogether(name: str, field: str) -> None:
    [finding] = found(chat(RULES, "a") | {field: "x"}, chat(RULES, "a") | {field: "y"})
    assert (finding.kind, finding.shared_tokens) == (name, 0)


def test_sessions_are_kept_apart() -> None:
    bodies = [chat(f"It is 1{n}:15. {RULES}", "a", user=str(n)) for n in range(3)]
    assert not found(*bodies)
    assert len(found(*[{**body, "user": "same"} for body in bodies])) == 2


def test_tokens_are_counted_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"at 1{n}:00 " + "word " * 300}) + "\n" for n in range(2)))
    [finding] = analyse(path, str.split)
    assert (finding.lost_tokens, finding.estimated) == (301, False)
    assert "about" not in str(finding)


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ("[]", "neither"), ('{"a": 1}', "neither")])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + text + "\n")
    with pytest.raises(ConfigError, match=says) as error:
        analyse(path)
    assert "p.jsonl:2" in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        analyse("/nowhere.jsonl")


def test_batch_lines_anthropic_bodies_and_parts_are_read() -> None:
    parts = [{"type": "text", "text": RULES, "cache_control": {"type": "ephemeral"}}, {"type": "image", "url": "x"}]
    one = prompt_of({"system": parts, "messages": [{"role": "user", "content": "a", "name": None}, 5]}, 1)
    assert [piece.path for piece in one.pieces] == [
        "system[0].text", "system[1]", "messages[0].role", "messages[0].content",
    ]  # fmt: skip
    assert "cache_control" not in one.text


ANYTHING = st.recursive(
    st.none() | st.text(max_size=20) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.sampled_from(["messages", "prompt", "tools", "user"]), ANYTHING), max_size=4))
def test_nothing_that_json_can_say_breaks_it(bodies: list[dict[str, Any]]) -> None:
    for finding in found(*bodies):
        assert finding.lost_tokens > 0


def test_json_in_a_message_with_its_keys_in_another_order() -> None:
    one, two = ({"role": "user", "content": text + " " * 300} for text in ('{"a": 1, "bcd": 2}', '{"bcd": 2, "a": 1}'))
    [finding] = found({"messages": [one, one]}, {"messages": [two, one]})
    assert (finding.kind, finding.path) == ("reordered-json", "messages[0].content")
