from __future__ import annotations

import json

import pytest

from pdserve.proxy.openai import parse, without_markers

MARK = '"cache_control": {"type": "ephemeral", "ttl": "5m"}'


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        ('{"a": [{"type": "text", "text": "x", %s}]}', '{"a": [{"type": "text", "text": "x"}]}'),
        ('{"a": [{%s, "type": "text"}]}', '{"a": [{"type": "text"}]}'),
        ('{"a": [{%s}], "b":1}', '{"a": [{}], "b":1}'),
        ('{"a": {"x": 1 , %s , "y": 2}}', '{"a": {"x": 1 , "y": 2}}'),
        ('{"a": 1,%s}', '{"a": 1}'),
    ],
)
def test_markers_are_taken_out_and_nothing_else_is_touched(sent: str, left: str) -> None:
    assert without_markers((sent % MARK).encode()) == left.encode()
    assert json.loads(left)


@pytest.mark.parametrize(
    "kept",
    [
        {"properties": {"cache_control": {"type": "string"}}},
        {"content": 'say "cache_control": {"type": "ephemeral"} to me'},
        {"arguments": json.dumps({"cache_control": {"type": "ephemeral"}})},
        {"cache_control": None},
    ],
)
def test_what_only_looks_like_a_marker_stays(kept: dict[str, object]) -> None:
    raw = json.dumps(kept).encode()
    assert without_markers(raw) == raw


def test_a_request_with_and_without_is_the_same_prompt() -> None:
    plain = b'{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}]}'
    marked = plain.replace(b'"x"', b'"x","cache_control":{"type":"ephemeral"}')
    assert parse(marked, ()).body.raw == plain
