from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.engines.body import Body

NAMES = st.one_of(
    st.sampled_from(["model", "prompt", "max_tokens", "stream", "n", "ключ", 'q"uote', "back\\slash"]), st.text()
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SPACE = st.text(alphabet=" \t\r\n", max_size=3)


@st.composite
def spelled(draw: Any) -> tuple[list[tuple[str, str]], str]:
    """Members as (name, value as written), repeated names included, and a text with any whitespace between them."""
    members = []
    text = draw(SPACE) + "{" + draw(SPACE)
    pairs = draw(st.lists(st.tuples(NAMES, VALUES), max_size=7))
    for i, (name, value) in enumerate(pairs):
        written = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        members.append((name, written))
        key = json.dumps(name, ensure_ascii=draw(st.booleans()))
        text += ("," + draw(SPACE) if i else "") + key + draw(SPACE) + ":" + draw(SPACE) + written + draw(SPACE)
    return members, text + "}" + draw(SPACE)


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(spelled())
def test_members_are_found_where_they_are(case: tuple[list[tuple[str, str]], str]) -> None:
    members, text = case
    if not encodable(text):
        return
    body = Body(text.encode())
    assert [(m.name, body.raw[m.value : m.end].decode()) for m in body.members()] == members


@given(spelled(), st.dictionaries(NAMES, VALUES, max_size=3), st.sets(NAMES, max_size=3))
def test_an_edit_changes_what_it_says_and_nothing_else(
    case: tuple[list[tuple[str, str]], str], changes: dict[str, Any], remove: set[str]
) -> None:
    members, text = case
    remove -= changes.keys()
    if not encodable(text) or not all(map(encodable, [*changes, *remove])):
        return
    body = Body(text.encode())
    new = {name: json.dumps(value).encode() for name, value in changes.items()}
    edited = Body(body.edited(new, remove))
    before = json.loads(text)
    assert json.loads(edited.raw) == {k: v for k, v in before.items() if k not in remove} | changes
    # What stays is byte-identical and in its order; what is new comes last.
    expected = [(n, w.encode()) for n, w in members if n not in remove and n not in changes]
    kept = [(m.name, edited.raw[m.value : m.end]) for m in edited.members() if m.name not in changes]
    assert kept == expected
    if not changes.keys() - before.keys() and not remove & before.keys() and len(before) == len(members):
        spans = [(m.value, m.end) for m in body.members() if m.name not in changes]
        assert all(body.raw[a:b] in edited.raw for a, b in spans)
        assert edited.raw.split(b"{", 1)[0] == body.raw.split(b"{", 1)[0]


def test_an_edit_without_effect_returns_the_very_bytes() -> None:
    raw = b' { "a" :1, "b": [ 1 , 2 ] }\n'
    assert Body(raw).edited({}, ("absent",)) == raw
    assert Body(raw).edited({"a": b"1"}) == raw


@pytest.mark.parametrize(
    ("raw", "changes", "remove", "expected"),
    [
        (b'{"a": 12, "b": 2}', {"a": b"1"}, (), b'{"a": 1, "b": 2}'),
        (b'{"a":1}', {"z": b"{}"}, (), b'{"a":1, "z": {}}'),
        (b"{ }", {"z": b"1"}, (), b'{"z": 1}'),
        (b'{"a":1, "b":2 ,"c":3}', {}, ("a",), b'{"b":2 ,"c":3}'),
        (b'{"a":1, "b":2 ,"c":3}', {}, ("b",), b'{"a":1 ,"c":3}'),
        (b'{"a":1, "b":2 ,"c":3}', {}, ("c",), b'{"a":1, "b":2}'),
        (b'{"a":1, "b":2}', {"z": b"0"}, ("a", "b"), b'{"z": 0}'),
        (b'{"a":12,"a":1}', {"a": b"7"}, (), b'{"a":7}'),
        (b'{"max\\u005ftokens":5}', {"max_tokens": b"1"}, (), b'{"max\\u005ftokens":1}'),
    ],
)
def test_edits(raw: bytes, changes: dict[str, bytes], remove: tuple[str, ...], expected: bytes) -> None:
    assert Body(raw).edited(changes, remove) == expected


def test_a_repeated_name_counts_with_its_last_value() -> None:
    body = Body(b'{"a":12,"a":1, "b": "x"}')
    assert body.get("a") == 1
    assert body.raw_value("a") == b"1"
    assert [body.raw[m.value : m.end] for m in body.members()] == [b"12", b"1", b'"x"']


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"[1]", "must be a JSON object, not an array"),
        (b'"x"', "not a string"),
        (b"null", "not null"),
        (b"17", "not a number"),
        (b"{", "not valid JSON"),
        (b'{"a":1,}', "not valid JSON"),
        (b'{"a":1} x', "trailing characters"),
        (b'{"a":NaN}', "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        (b'{"a":"\xff"}', "not valid UTF-8 (byte 6)"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_no_object_is_refused_with_a_sentence(raw: bytes, says: str) -> None:
    with pytest.raises(ValueError, match="The request body") as refused:
        Body(raw)
    assert says in str(refused.value)


def test_a_long_prompt_is_not_walked() -> None:
    ids = json.dumps(list(range(200_000)))
    raw = f'{{"prompt": {ids}, "max_tokens": 5}}'.encode()
    edited = Body(raw).edited({"max_tokens": b"1", "x": b"2"})
    assert edited == f'{{"prompt": {ids}, "max_tokens": 1, "x": 2}}'.encode()
