from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve.engines.body import Body
from pdserve.proxy.facts import BLOCK, facts

CHAT = "/v1/chat/completions"


def of(headers: dict[bytes, bytes] | None = None, **body: Any) -> Any:
    return facts(CHAT, list((headers or {}).items()), Body(json.dumps(body).encode()))


@pytest.mark.parametrize(
    ("headers", "body", "session"),
    [
        ({b"x-session-id": b"h"}, {"session_id": "b", "user": "u"}, "h"),
        ({}, {"session_id": "b", "user": "u"}, "b"),
        ({}, {"user": "u"}, "u"),
        ({}, {"metadata": {"user_id": "m"}}, "m"),
        ({}, {"user": "u", "metadata": {"user_id": "m"}}, "u"),
        ({}, {"metadata": {"user_id": 5}}, ""),
        ({}, {"user": 5, "session_id": None, "metadata": None}, ""),
        ({b"x-session-id": b""}, {}, ""),
        ({}, {"messages": [{"role": "user", "content": '"user": "x"', "user": "inner"}]}, ""),
    ],
)
def test_whose_conversation_it_is(headers: dict[bytes, bytes], body: dict[str, Any], session: str) -> None:
    assert of(headers, **body).session == session


def test_blocks_stand_for_all_before_them() -> None:
    turn = [{"role": "user", "content": "a" * 3000}]
    first, more = of(messages=turn), of(messages=[*turn, {"role": "assistant", "content": "b" * 3000}])
    assert len(first.blocks) == 3000 // BLOCK
    assert more.blocks[: len(first.blocks)] == first.blocks
    assert len(more.blocks) > len(first.blocks)
    assert not {*of(messages=[{"role": "user", "content": "b" + "a" * 2999}]).blocks} & {*first.blocks}


def test_models_and_salts_share_nothing() -> None:
    prompt = "a" * 5000
    found = [
        of(prompt=prompt, **more).blocks for more in ({}, {"model": "x"}, {"cache_salt": "s"}, {"cache_salt": "t"})
    ]
    assert len({blocks[0] for blocks in found}) == 4
