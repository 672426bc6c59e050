"""What the engine tells of its requests, up to what the daemon makes of it. No vLLM is needed for that."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from pdserve import marks
from pdserve.chunk import ChunkLayout, KeyChain
from pdserve.engines.vllm import facts
from pdserve.engines.vllm.breakeven import Choice
from pdserve.engines.vllm.facts import LegFacts, StoreFacts, Teller
from pdserve.transfer import telling
from pdserve.transfer.gone import Gone
from pdserve.transfer.requests import Requests

LAYOUT = ChunkLayout(kind="opaque-block", kv_dtype="f", layers=1, block_tokens=16, block_bytes=64, shards=1)
CHUNK = 64


@dataclass
class Told:
    """Takes facts as the thread would make them, and gives them to the daemon's side."""

    requests: Requests = field(default_factory=lambda: Requests(Gone(), lambda: [], 0.0))
    closed: bool = False
    first: list[telling.Began] = field(default_factory=list)

    def put_first(self, began: telling.Began) -> None:
        self.first.append(began)

    def put(self, make: Any) -> None:
        self.requests.take(telling.Facts([make(marks.seed("x"))]), "prefill-0")

    def close(self) -> None:
        self.closed = True

    def of(self, request: str) -> dict[str, Any]:
        found: dict[str, Any] = self.requests.told([request])[request][-1]
        return found


def tracked(name: str, tokens: list[int], **more: Any) -> Any:
    request = SimpleNamespace(
        request_id=f"cmpl-{name}-0-0123abcd", prompt_token_ids=tokens, all_token_ids=tokens, num_tokens=len(tokens),
        num_prompt_tokens=len(tokens), lora_request=None, cache_salt=None, arrival_time=time.time() - 0.5,
        trace_headers=None, kv_transfer_params=None, status=SimpleNamespace(name="FINISHED_STOPPED"),
    )  # fmt: skip
    plain = {
        "choice": None,
        "fetch_choice": None,
        "handover": None,
        "fetch": None,
        "loading_from": 0,
        "cached_tokens": 0,
        "left": (0, 0),
    }
    return SimpleNamespace(request=request, chain=KeyChain(b"r" * 32, CHUNK), **{**plain, **more})


def hit(found: int, promised: int = 0) -> Any:
    return SimpleNamespace(first_chunk=0, found=[None] * found, promised=promised)


def result(error: str = "") -> Any:
    return SimpleNamespace(error=error, nbytes=1 << 20)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def legs(told: Told) -> LegFacts:
    return LegFacts(told, "model", LAYOUT, lambda tokens, seconds: 0.25 - seconds)  # type: ignore[arg-type]


def test_a_hit_from_its_lookup_to_its_end(legs: LegFacts, told: Told) -> None:
    it = tracked("a", list(range(5 * CHUNK + 3)), choice=Choice(True, "faster"))
    legs.decided(it, hit(3), 3 * CHUNK)
    legs.loaded(it, hit(3), result(), 3 * CHUNK, ["dram", "disk", "disk"], 0.05)
    it.choice = None
    legs.decided(it, None, 0)  # vLLM asks once more before it computes
    legs.scheduled(it, 3 * CHUNK)
    legs.scheduled(it, 3 * CHUNK)
    assert legs.handed(it) == {
        "cached": {"gpu": 0, "dram": CHUNK, "disk": 2 * CHUNK},
        "load_ms": 50.0,
        "saved_ms": 200.0,
        "load_reason": "faster",
    }
    (began,) = told.first
    assert (began.leg, began.cached) == ("cmpl-a-0-0123abcd", {"gpu": 0, "dram": CHUNK, "disk": 2 * CHUNK})
    assert (began.load_ms, began.saved_ms, began.load_reason) == (50.0, 200.0, "faster")
    it.request.num_tokens += 9
    legs.finished(it)
    legs.finished(it)
    shown = told.of("a")
    assert [c["source"] for c in shown["chunks"]] == ["dram", "disk", "disk", "computed", "computed", "computed"]
    assert (shown["output_tokens"], shown["finish_reason"], shown["saved_ms"]) == (9, "stop", 200.0)
    assert [(s["name"], s["tokens"], s["tier"]) for s in shown["spans"]] == [
        ("queue", None, None),
        ("load", 192, "dram+disk"),
    ]
    assert shown["spans"][0]["ms"] >= 500
    assert not legs._decided


def test_the_engines_own_cache_and_a_miss(legs: LegFacts, told: Told) -> None:
    it = tracked("a", list(range(3 * CHUNK)))
    legs.decided(it, None, 0)
    legs.scheduled(it, CHUNK)
    assert told.of("a")["cached_tokens"] == {"gpu": CHUNK}
    assert [c["source"] for c in told.of("a")["chunks"]] == ["gpu", "computed", "computed"]
    assert told.of("a")["chunks"][1]["why"].startswith("never stored")


def test_a_load_that_failed_and_one_that_was_not_worth_it(legs: LegFacts, told: Told) -> None:
    it = tracked("a", list(range(2 * CHUNK)))
    legs.decided(it, hit(2), 2 * CHUNK)
    legs.loaded(it, hit(2), result("digest mismatch"), CHUNK, ["dram"], 0.01)
    legs.scheduled(it, CHUNK)
    first, second = told.of("a")["chunks"]
    assert (first["source"], second["source"]) == ("dram", "computed")
    assert "the load failed (digest mismatch)" in second["why"]
    slow = tracked("b", list(range(500, 500 + CHUNK)), choice=SimpleNamespace(load=False, reason="slower", detail=""))
    slow.left = (0, 1)  # the lease has been given back by now
    legs.decided(slow, None, 0)
    legs.scheduled(slow, 0)
    assert "estimated to be faster" in told.of("b")["chunks"][0]["why"]


def test_a_lookup_without_an_answer_is_told_as_one_whatever_like_prompts_there_were(legs: LegFacts, told: Told) -> None:
    tokens = list(range(2 * CHUNK))
    legs.decided(tracked("a", tokens), None, 0)
    legs.scheduled(tracked("a", tokens), 0)
    choice = SimpleNamespace(load=False, reason="unavailable", detail="no answer within 50 ms")
    it = tracked("b", tokens, choice=choice)
    legs.decided(it, None, 0)
    legs.scheduled(it, 0)
    expected = "the cache daemon did not answer the engine in time (no answer within 50 ms)"
    assert [chunk["why"] for chunk in told.of("b")["chunks"]] == [expected, expected]


def test_a_handover_is_a_transfer_and_saves_nothing(legs: LegFacts, told: Told) -> None:
    it = tracked("a", list(range(CHUNK)))
    it.request.kv_transfer_params = {"do_remote_prefill": True}
    legs.decided(it, hit(0, promised=CHUNK), CHUNK)
    legs.loaded(it, hit(0, promised=CHUNK), result(), CHUNK, ["dram"], 0.02)
    legs.scheduled(it, CHUNK)
    shown = told.of("a")
    assert [s["name"] for s in shown["spans"]] == ["queue", "transfer"]
    assert (shown["saved_ms"], shown["load_ms"]) == (None, 0.0)
    assert told.first == []  # its producer's reply tells


def test_nothing_that_goes_wrong_leaves(legs: LegFacts, caplog: pytest.LogCaptureFixture) -> None:
    legs._decided = None  # type: ignore[assignment]
    for _ in range(3):
        legs.decided(tracked("a", [1]), None, 0)
        legs.scheduled(None, 0)
        assert legs.handed(None) is None
        legs.finished(object())
    assert len([r for r in caplog.records if r.exc_info]) <= 1


def test_memory_is_bounded(legs: LegFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MOST_WAITING", 10)
    for n in range(100):  # requests that are decided and never heard of again
        legs.decided(tracked(f"r{n}", [1, 2]), None, 0)
    assert len(legs._decided) <= 11


def test_without_a_daemon_nothing_waits_and_what_is_too_much_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "MOST_WAITING", 5)
    monkeypatch.setattr(facts, "EVERY_S", 60.0)
    teller = Teller(str(tmp_path / "none.sock"), "prefill-0")
    stores = StoreFacts(teller)
    for n in range(50):
        stores.stored(f"r{n}", 16, 100, 0.1, 0)
    assert not stores.failed
    assert teller._lost >= 44
    assert teller._queue.qsize() <= 5
    teller.close()
    assert not teller._thread.is_alive()


def test_what_may_not_wait_goes_first(cache_daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "EVERY_S", 600.0)
    with httpx.stream("GET", f"http://127.0.0.1:{cache_daemon.port}/began", timeout=30) as heard:
        lines = heard.iter_lines()
        assert next(lines) == ""
        teller = Teller(str(cache_daemon.socket), "prefill-0")
        for number in range(2):
            teller.put_first(telling.Began(f"cmpl-r{number}-0-0123abcd", 1.0, {"dram": 256}, 2.5))
            teller.put(lambda _: telling.Ended("cmpl-r-0-0123abcd", 1, "stop"))
            line = json.loads(next(line for line in lines if line))
            shown = {"cached": {"dram": 256}, "load_ms": 2.5, "saved_ms": None, "load_reason": ""}
            assert line == {"request": f"r{number}", "instance": "prefill-0", "at": 1.0, **shown}
        teller.close()
        assert not teller._thread.is_alive()


def test_what_may_not_wait_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MOST_WAITING", 5)
    monkeypatch.setattr(facts, "EVERY_S", 60.0)
    teller = Teller(str(tmp_path / "none.sock"), "prefill-0")
    for _ in range(50):
        teller.put_first(telling.Began("r", 1.0, {}))
    assert len(teller._first) == 5
    assert teller._lost == 45
    teller.close()
    assert not teller._thread.is_alive()


def test_facts_reach_the_daemon_and_its_http_side(cache_daemon: Any) -> None:
    teller = Teller(str(cache_daemon.socket), "prefill-0")
    StoreFacts(teller).stored("cmpl-one-0-0123abcd", 16, 100, 0.1, 0)
    deadline = time.monotonic() + 60
    while "store" not in (text := _requests(cache_daemon)) and time.monotonic() < deadline:
        time.sleep(0.02)
    legs = json.loads(text)["requests"]["one"]
    assert [(leg["instance"], leg["spans"][0]["name"], leg["spans"][0]["tokens"]) for leg in legs] == [
        ("prefill-0", "store", 16)
    ]
    assert json.loads(cache_daemon.get("/requests/one"))["legs"] == legs
    teller.close()
    assert not teller._thread.is_alive()


def _requests(daemon: Any) -> str:
    reply = httpx.post(f"http://127.0.0.1:{daemon.port}/requests", json={"ids": ["one", "two"]}, timeout=30)
    assert reply.status_code == 200
    return reply.text
