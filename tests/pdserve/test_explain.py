from __future__ import annotations

from typing import Any

import pytest

from pdserve import explain

WHY = "never stored: no prompt like it in the last 12 s"


def span(name: str, instance: str, start: float, ms: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "instance": instance, "start_ms": start, "ms": ms, "bytes": None, "tokens": None, "tier": None,
            "detail": None, **more}  # fmt: skip


def chunk(index: int, source: str, why: str | None = None, tokens: int = 256) -> dict[str, Any]:
    return {"index": index, "first_token": 256 * index, "tokens": tokens, "key": "0" * 16, "source": source, "why": why}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "r1", "received": 1000.0, "endpoint": "/v1/completions", "model": "m", "session": None, "tenant": "anybody",
        "route": "pd", "reason": None, "prefill": "prefill-0", "decode": "decode-0", "state": "done", "status": 200,
        "error": None, "prompt_tokens": 700, "cached_tokens": {"dram": 512}, "output_tokens": 11, "ttft_ms": 500.0,
        "duration_ms": 700.0, "load_ms": 12.0, "saved_ms": 88.0, "finish_reason": "length", "trace_id": None,
        "recoveries": 0,
        "spans": [
            span("queue", "proxy", 0.3, 20),
            span("prefill", "prefill-0", 20.3, 400),
            span("queue", "prefill-0", 22, 3),
            span("load", "prefill-0", 25, 12, bytes=6 << 20, tokens=512, tier="dram"),
            span("first_token", "decode-0", 421, 79),
            span("transfer", "decode-0", 425, 30, tokens=700, tier="dram", detail="from the producer"),
            span("decode", "decode-0", 500, 200),
            span("store", "prefill-0", 430, 5, tokens=188, bytes=1 << 20),
        ],
        "chunks": [chunk(0, "dram"), chunk(1, "dram"), chunk(2, "computed", WHY, 188)], "notes": [], **changes,
    }  # fmt: skip


def test_a_request_over_two_engines() -> None:
    lines = explain.story(record())
    text = "\n".join(lines)
    assert "was done in 700 ms; its first token went out after 500 ms." in lines[0]
    assert "It had 700 tokens of prompt and 11 of answer, ended by length." in lines
    assert "Two engines shared it: prefill-0 computed the prompt, decode-0 the answer." in lines
    assert "  20 ms in the proxy's line, waiting for its turn" in lines
    assert (
        "  400 ms until prefill-0 had computed the prompt; of that 3.0 ms in the engine's line, "
        "12 ms loading 512 tokens (6.0 MiB) from dram"
    ) in lines
    assert (
        "  79 ms until decode-0 gave the first token; of that 30 ms for 700 tokens to come from the producer" in lines
    )
    assert "  200 ms for the rest of the answer on decode-0, 20.0 ms a token" in lines
    assert "  beside it, prefill-0 stored 188 tokens (1.0 MiB) in 5.0 ms" in lines
    assert (
        "512 of 700 tokens of the prompt were not computed: 512 from memory (dram). Loading took 12 ms, which saved 88 ms "
        "against computing."
    ) in lines
    assert "  chunks 0-1 (tokens 0-511): from memory (dram)" in lines
    assert f"  chunk 2 (tokens 512-699): computed: {WHY}" in lines
    assert "until the request was read" not in text


def test_one_engine_alone_and_a_whole_answer() -> None:
    told = record(
        route="local", reason="short-prompt", prefill=None, ttft_ms=None, cached_tokens={}, load_ms=0.0, saved_ms=None,
        spans=[span("decode", "decode-0", 30, 90, detail="the answer came in one piece")],
    )  # fmt: skip
    lines = explain.story(told)
    assert "decode-0 did all of it (short-prompt)." in lines
    assert "  30 ms until the request was read and understood" in lines
    assert "  90 ms until decode-0 had the whole answer" in lines
    assert "None of 700 tokens of the prompt were in any cache." in lines


def test_what_went_wrong() -> None:
    told = record(
        state="recovered", recoveries=1, saved_ms=-4.0,
        spans=[
            span("retry", "decode-0", 1, 50, detail="decode leg: decode-0: it closed the connection"),
            span("decode", "decode-1", 51, 100, detail="went on after another engine died"),
        ],
    )  # fmt: skip
    lines = explain.story(told)
    assert "was done, with help, in" in lines[0]
    assert "  50 ms lost: decode leg: decode-0: it closed the connection" in lines
    assert "  100 ms for the rest of the answer on decode-1 (went on after another engine died)" in lines
    assert any("which lost 4.0 ms against computing" in line for line in lines)
    refused = explain.story(
        record(state="failed", error="no such model", prefill=None, decode=None, route="local", spans=[])
    )
    assert "Its error: no such model" in refused
    assert "No engine was asked." in refused
    assert "Where the time went:" not in refused


@pytest.mark.parametrize("state", ["active", "cancelled"])
def test_what_nobody_told_is_not_invented(state: str) -> None:
    told = record(state=state, cached_tokens=None, chunks=None, prompt_tokens=None, output_tokens=None, load_ms=None,
                  saved_ms=None, finish_reason=None)  # fmt: skip
    text = "\n".join(explain.story(told))
    assert "is not known: no engine told of it" in text
    assert "tokens of prompt" not in text
    assert "a token" not in text


@pytest.mark.parametrize(("value", "says"), [(0.04, "0.0 ms"), (9.94, "9.9 ms"), (10, "10 ms"), (12345, "12.3 s")])
def test_times(value: float, says: str) -> None:
    assert explain.ms(value) == says
