"""Streams of /v1/responses and /v1/messages that real vLLM engines gave, cut everywhere and put together again.

recorded/NAME.sse is one answer, NAME.again.sse the same request asked once more: other ids, another time.
"""

from __future__ import annotations

import json
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from pdserve.proxy import onward, openai
from pdserve.proxy.onward import Onward
from pdserve.proxy.seam import Diverged
from pdserve.proxy.typed import Again, Told, events, piece_of

HERE = Path(__file__).parent / "recorded"
NAMES = sorted(path.stem for path in HERE.glob("*.sse") if ".again" not in path.name)
TEXTS = [name for name in NAMES if name.endswith(("_text", "_stop"))]


def pieces(name: str) -> list[bytes]:
    raw = (HERE / f"{name}.sse").read_bytes()
    return [piece + b"\n\n" for piece in raw.split(b"\n\n") if piece]


def told(raw: list[bytes]) -> Told:
    made = Told()
    for piece in raw:
        made.add(piece)
    made.fold()
    return made


def coarse(raw: list[bytes]) -> list[bytes]:
    """The same, every two pieces of text in one event, as an engine does that has fallen behind."""
    out: list[dict[str, Any]] = []
    for event in events(b"".join(raw)):
        mine, before = piece_of(event), piece_of(out[-1]) if out else None
        if mine is not None and before is not None and mine[0] == before[0] and not out[-1].get("joined"):
            if isinstance(event["delta"], str):
                out[-1] |= {"delta": before[1] + mine[1], "joined": True}
            else:
                out[-1] |= {"delta": {**event["delta"], mine[0][-1]: before[1] + mine[1]}, "joined": True}
        else:
            out.append(event)
    return [b"data: " + json.dumps({k: v for k, v in e.items() if k != "joined"}).encode() + b"\n\n" for e in out]


def plain(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each id as the number of its first appearance: what opens behind the seam has the second engine's. Without what a
    second run finds cached."""
    ids: dict[str, int] = {}

    def inner(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            if "cache_read_input_tokens" in value:
                value = value | {"input_tokens": value["input_tokens"] + value.pop("cache_read_input_tokens")}
            return {key: inner(item, key) for key, item in value.items() if key != "cached_tokens"}
        if isinstance(value, list):
            return [inner(item) for item in value]
        return ids.setdefault(value, len(ids)) if name in ("id", "item_id", "call_id") else value

    return [inner(event) for event in found]


def sums(raw: bytes) -> tuple[list[Any], dict[Any, str]]:
    """What opens and closes, and what the pieces add up to."""
    texts: dict[Any, str] = {}
    once = []
    for event in plain(list(events(raw))):
        event.pop("sequence_number", None)
        if (piece := piece_of(event)) is not None:
            texts[piece[0]] = texts.get(piece[0], "") + piece[1]
        else:
            once.append(event)
    return once, texts


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_asked_for_again_is_the_first_one_to_the_last_id(name: str) -> None:
    first, again = pieces(name), pieces(f"{name}.again")
    whole = list(events(b"".join(first)))
    for cut in range(1, len(first)):
        seam = Again(told(first[:cut]))
        rest = b"".join(seam.feed(piece) for piece in again)
        joined = list(events(b"".join(first[:cut]) + rest))
        assert plain(joined) == plain(whole)


@pytest.mark.parametrize("name", [name for name in NAMES if "logprobs" not in name])
def test_it_may_be_cut_into_other_pieces(name: str) -> None:
    first, again = pieces(name), coarse(pieces(f"{name}.again"))
    whole = sums(b"".join(first))
    for cut in range(1, len(first)):
        joined = b"".join(first[:cut]) + Again(told(first[:cut])).feed(b"".join(again))
        assert sums(joined) == whole
        numbers = [event["sequence_number"] for event in events(joined) if "sequence_number" in event]
        assert all(b == a + 1 for a, b in pairwise(numbers))


@pytest.mark.parametrize("name", NAMES)
def test_another_answer_is_not_passed_on_as_the_same(name: str) -> None:
    first, again = pieces(name), b"".join(pieces(f"{name}.again"))
    given = told(first[:-2])
    if given.texts:
        key, text = next(iter(given.texts.items()))
        given.texts[key] = "Other" + text
    else:
        given.once[("something else",)] = {}
    with pytest.raises(Diverged):
        Again(given).feed(again)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_gone_on_with_in_the_streams_own_form(name: str) -> None:
    """The same tokens from a completion give the events that the engine itself gave."""
    first = pieces(name)
    whole = list(events(b"".join(first)))
    endpoint = openai.MESSAGES if name.startswith("messages") else openai.RESPONSES
    texts = [n for n, event in enumerate(whole) if piece_of(event) is not None]
    usage = (whole[-1].get("response") or whole[-2])["usage"]
    for cut in range(texts[0] + 1, texts[-1] + 1):
        given = told(first[:cut])
        text = onward.text_of(endpoint, given)
        assert text
        shown = [piece_of(event)[1] for event in whole[cut : texts[-1] + 1]]  # type: ignore[index]
        ended = _end(whole)
        ids = usage["output_tokens"] - len(shown) - (ended["finish_reason"] == "stop")
        seam = Onward(endpoint, given, text, usage["input_tokens"], ids, None)
        last = shown.pop() if ended["finish_reason"] == "length" else ""
        rest = b"".join(seam.feed(_completion(piece)) for piece in shown) + seam.feed(_completion(last, **ended))
        assert seam.over
        joined = list(events(b"".join(first[:cut]) + rest))
        assert plain(joined) == plain(whole)


def _end(whole: list[dict[str, Any]]) -> dict[str, Any]:
    """How a completion says what the end of this stream says."""
    if whole[-1]["type"] == "message_stop":
        delta = whole[-2]["delta"]
        short, word = delta["stop_reason"] == "max_tokens", delta["stop_sequence"]
    else:
        short, word = whole[-1]["response"]["status"] == "incomplete", None
    return {"finish_reason": "length" if short else "stop", "stop_reason": word}


_number = count()


def _completion(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None, "stop_reason": None, "token_ids": [next(_number)], **more}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_tool")])
def test_a_call_is_no_text(name: str) -> None:
    endpoint = openai.MESSAGES if name.startswith("messages") else openai.RESPONSES
    assert all(onward.text_of(endpoint, told(pieces(name)[:cut])) is None for cut in range(1, len(pieces(name))))
