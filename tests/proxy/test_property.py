"""Whatever engines and clients do, every request reaches exactly one terminal state, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pdserve.engines.fake.server import Fault
from pdserve.proxy import endpoint
from pdserve.proxy.keys import hashed
from pdserve.proxy.lifetime import Event, Lifetime

BOUND = 60.0  # what all deadlines of a request together may take here, and more

FAULT = st.one_of(
    st.none(),
    st.builds(
        Fault,
        st.sampled_from(
            ["status", "plain", "detail", "reset", "cut", "early", "torn", "garbage", "rubbish", "stall", "confess", "mute"]
        ),
        st.sampled_from([400, 404, 408, 413, 429, 500, 503]),
        st.integers(0, 4),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    path: str
    stream: bool
    leaves: float | None  # seconds after which the client is gone; None: it stays
    extra: tuple[tuple[str, Any], ...]


PLACES = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"]
MORE = st.lists(
    st.sampled_from(
        [("temperature", 0), ("seed", 1), ("n", 2), ("stop", "w99"), ("prompt_logprobs", 1), ("priority", 3)]
    ),
    max_size=3,
    unique=True,
)
ASKED = st.builds(
    Asked, st.sampled_from(PLACES), st.booleans(), st.none() | st.floats(0, 0.15), MORE.map(tuple)
)  # fmt: skip


class Watched(Lifetime):
    """Remembers where it has been."""

    made: ClassVar[list[Watched]] = []
    __slots__ = ("ends",)

    def __init__(self, began: float | None = None) -> None:
        super().__init__(began)
        self.ends = 0
        self.made.append(self)

    def on(self, event: Event) -> None:
        super().on(event)
        self.ends += self.over


def body_of(asked: Asked) -> dict[str, Any]:
    prompt: dict[str, Any] = {
        "/v1/completions": {"prompt": "a b c"},
        "/v1/responses": {"input": "a b c", "max_output_tokens": 6},
    }.get(asked.path, {"messages": [{"role": "user", "content": "a b c"}]})
    return {"model": "fake", "max_tokens": 6, "stream": asked.stream, **prompt, **dict(asked.extra)}


async def ask(r: Any, asked: Asked, seen: Counter[str]) -> None:
    reader, writer = await r.open(asked.path, body_of(asked))
    try:
        async with asyncio.timeout(asked.leaves or BOUND):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"chunked" in head:
                rest = await reader.readuntil(b"\r\n0\r\n\r\n")
                if asked.path != "/tokenize":
                    check_stream(asked, rest)
            else:
                raw = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                if asked.path != "/tokenize":  # passed on as it is, nonsense too
                    json.loads(raw)
            seen[head.split()[1].decode()] += 1
    except TimeoutError:
        assert asked.leaves is not None, "a client that stays is answered"
        seen["left"] += 1
    finally:
        writer.transport.abort()


LAST = {"/v1/responses": ("response.completed", "error"), "/v1/messages": ("message_stop", "error")}
ANSWER = "".join(f" w{(zlib.crc32(b'a b c') + n) % 1000}" for n in range(6))


def check_stream(asked: Asked, chunked: bytes) -> None:
    """Whatever happened behind it, a stream is the one true answer up to its end or to an error, and ends in order."""
    raw = b"".join(re.split(rb"(?:^|\r\n)[0-9a-f]+\r\n", chunked))
    data = [line[6:].strip() for line in raw.split(b"\n") if line.startswith(b"data: ")]
    if asked.path in LAST:
        assert json.loads(data[-1])["type"] in LAST[asked.path]
    else:
        assert data.pop() == b"[DONE]"
    events = [json.loads(piece) for piece in data]
    text = "".join(map(piece_of, events))
    assert ANSWER.startswith(text)
    if not any("error" in event or event.get("type") == "error" for event in events) and ("stop", "w99") not in asked.extra:
        assert text == ANSWER


def piece_of(event: dict[str, Any]) -> str:
    """The text of the first choice in it, or of its only one."""
    out = ""
    for choice in event.get("choices") or ():
        if choice["index"] == 0:
            out += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    delta = event.get("delta")
    return out + (delta if isinstance(delta, str) else (delta or {}).get("text") or "")


async def run(
    rig: Any, quick: Any, until: Any, requests: list[Asked], faults: list[list[Fault | None]], limits: str
) -> None:
    Watched.made.clear()
    times = quick(prefill=0.4, answer=0.8, event=0.4, resume=0.4, send=1)
    given = {
        "deadlines": times,
        "engine": {"gap": 0.002, "hands_over": True},
        "slo_ttft": 5.0 if "slo" in limits else 0.0,
        "early_decode": "early" in limits,
        "early_token": "early" in limits,
    }
    async with rig(producers=2, consumers=2, **given) as r:
        for engine, made in zip(r.producers + r.consumers, faults, strict=True):
            engine.faults.extend(made)
        seen: Counter[str] = Counter()
        await asyncio.gather(*(ask(r, asked, seen) for asked in requests))
        await r.settled()
        assert [life.ends for life in Watched.made] == [1] * len(Watched.made)
        assert len(Watched.made) <= len(requests)  # one that left before its head was read never was a request
        assert sum(seen.values()) == len(requests)
        await until(lambda: not any(engine.leases for engine in r.consumers))  # given back a turn after the connection has gone
        counted = [
            sample.value
            for family in r.app.state.registry.collect()
            for sample in family.samples
            if sample.name == "pdserve_requests_total"
        ]
        assert sum(counted) == len(Watched.made)
        gate = r.app.state.admission
        assert (gate.first.inside, gate.running.inside, gate.waiting) == (0, 0, 0)


@settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    st.lists(ASKED, min_size=1, max_size=10),
    st.lists(st.lists(FAULT, max_size=8), min_size=4, max_size=4),
    st.sampled_from(["", "slo", "early", "early slo"]),
)
def test_exactly_one_end_and_nothing_left(
    rig: Any,
    quick: Any,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
    requests: list[Asked],
    faults: Any,
    limits: str,
) -> None:
    monkeypatch.setattr(endpoint, "Lifetime", Watched)
    uvloop.run(run(rig, quick, until, requests, faults, limits))


def test_keys_are_given_back(rig: Any, quick: Any) -> None:
    """A key that allows two at once still does after whatever became of its requests."""

    async def go() -> None:
        async with rig(api_keys_env=f"k {hashed(b'k')} streams=2", deadlines=quick(answer=0.3, event=0.3)) as r:
            for kind in ("stall", "cut", "reset", "rubbish", "mute", "garbage"):
                r.d.faults.append(Fault(kind))
                await r.post("/v1/completions", {"prompt": "a", "stream": kind == "mute"}, X_Pdserve_Key="k")
            replies = [r.post("/v1/completions", {"prompt": "a"}, X_Pdserve_Key="k") for _ in range(2)]
            assert [reply.status for reply in await asyncio.gather(*replies)] == [200, 200]

    uvloop.run(go())
