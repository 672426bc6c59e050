"""Why a chunk was missing, as the daemon tells it; and that its memory of all this is bounded."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pdserve import marks
from pdserve.chunk import KeyChain, tenant_tag
from pdserve.request_id import client_id
from pdserve.transfer import telling
from pdserve.transfer.gone import Gone
from pdserve.transfer.prompts import Prompt, Prompts
from pdserve.transfer.requests import Requests

CHUNK, SEED = 64, marks.seed("daemon")
BASE = b"b" * 16


def ids(count: int, seed: int = 1) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(50000) for _ in range(count)]


def keys(tokens: list[int], salt: str = "") -> list[bytes]:
    chain = KeyChain(salt.encode().ljust(32, b"r"), CHUNK)
    tail = chain.tail(tokens)
    return chain.full(tokens) if tail is None else [*chain.full(tokens), tail]


def leg(request: str, tokens: list[int], salt: str = "", at: float = 1000.0, **changes: Any) -> telling.Leg:
    made, edges = marks.make(tokens, CHUNK, SEED)
    told: dict[str, Any] = {
        "leg": f"cmpl-{request}-0-0123abcd", "traceparent": "", "at": at, "tokens": len(tokens),
        "chunk_tokens": CHUNK, "base": BASE, "lora": "", "tag": tenant_tag(salt), "keys": keys(tokens, salt), "local": 0,
        "covered": 0, "first_chunk": 0, "tiers": [], "found": 0, "why": "", "marks": made, "edges": edges,
    }  # fmt: skip
    return telling.Leg(**{**told, **changes})


@pytest.fixture
def gone() -> Gone:
    return Gone()


@pytest.fixture
def requests(gone: Gone) -> Requests:
    return Requests(gone, lambda: [], 900.0)


def told(requests: Requests, *items: Any, instance: str = "prefill-0") -> dict[str, Any]:
    requests.take(telling.Facts(list(items)), instance)
    request = client_id(items[0].leg)
    found: dict[str, Any] = requests.told([request])[request][-1]
    return found


def whys(shown: dict[str, Any]) -> list[str]:
    return [chunk["why"] for chunk in shown["chunks"] if chunk["source"] == "computed"]


@pytest.mark.parametrize(
    ("leg_id", "request_id"),
    [("cmpl-abc-0-0123abcd", "abc"), ("cmpl-a-b-12-0123abcd", "a-b"), ("cmpl-abc-0", "abc"), ("cmpl-s-0-82540392", "s"),
     ("chatcmpl-x-0123abcd", "x"), ("chatcmpl-x", "x"), ("embd-1", "embd-1"), ("chatcmpl-6f0d-4e1b-9c-0123abcd", "6f0d-4e1b-9c")],
)  # fmt: skip
def test_the_clients_id_of_an_engines_request(leg_id: str, request_id: str) -> None:
    assert client_id(leg_id) == request_id


def test_where_each_chunk_came_from(requests: Requests) -> None:
    tokens = ids(5 * CHUNK + 20)
    shown = told(
        requests,
        leg("a", tokens, local=CHUNK, first_chunk=1, tiers=["dram", "disk"], covered=3 * CHUNK, found=2, saved_ms=4.5),
        telling.Span("cmpl-a-0-0123abcd", "load", 1000.0, 2.5, 4096, 2 * CHUNK, "dram+disk"),
        telling.Ended("cmpl-a-0-0123abcd", 7, "length"),
    )
    assert [c["source"] for c in shown["chunks"]] == ["gpu", "dram", "disk", "computed", "computed", "computed"]
    assert [(c["index"], c["first_token"], c["tokens"]) for c in shown["chunks"]][-1] == (5, 5 * CHUNK, 20)
    assert shown["chunks"][2]["key"] == keys(tokens)[2].hex()[:16]
    assert shown["cached_tokens"] == {"gpu": CHUNK, "dram": CHUNK, "disk": CHUNK}
    assert (shown["load_ms"], shown["saved_ms"], shown["output_tokens"], shown["finish_reason"]) == (
        2.5,
        4.5,
        7,
        "length",
    )
    assert [s["name"] for s in shown["spans"]] == ["load"]


def test_never_stored(requests: Requests) -> None:
    shown = told(requests, leg("a", ids(CHUNK + 30)))
    assert whys(shown) == [
        "never stored: no prompt like it in the last 100 s",
        "never stored: no prompt like it in the last 100 s (the prompt's last chunk, not full)",
    ]


def test_evicted_when_and_for_whom(requests: Requests, gone: Gone) -> None:
    tokens = ids(3 * CHUNK)
    told(requests, leg("first", tokens, at=990.0))
    gone.making_room_for = "decode-1"
    gone.removed(keys(tokens)[1], "dram", "capacity", 997.5)
    gone.making_room_for = ""
    gone.removed(keys(tokens)[2], "disk", "capacity", 998.0)
    gone.removed(keys(tokens)[2], "dram", "corrupt", 1001.0)  # afterwards: not why it was missing
    shown = told(requests, leg("b", tokens, found=1, tiers=["dram"], covered=CHUNK))
    assert whys(shown) == [
        "evicted from dram 2.5 s before to make room for what decode-1 stored",
        "evicted from disk 2.0 s before to make room",
    ]


@pytest.mark.parametrize(
    ("reason", "says"),
    [("corrupt", "did not match their digest"), ("late", "did not give it in time"), ("cleared", "cache was emptied"),
     ("full", "had no room"), ("error", "failed to give it"), ("odd", "was removed 1.0 s before")],
)  # fmt: skip
def test_other_ways_to_be_gone(requests: Requests, gone: Gone, reason: str, says: str) -> None:
    tokens = ids(CHUNK)
    gone.removed(keys(tokens)[0], "redis", reason, 999.0)
    (why,) = whys(told(requests, leg("a", tokens)))
    assert says in why


def test_the_prompt_differs_at_a_token(requests: Requests) -> None:
    tokens = ids(4 * CHUNK)
    told(requests, leg("first", tokens))
    other = list(tokens)
    other[CHUNK + 17] += 1
    shown = told(requests, leg("b", other, found=1, tiers=["dram"], covered=CHUNK))
    assert whys(shown) == [
        f"the prompt differs from that of request first at token {CHUNK + 17}, here",
        f"the prompt differs from that of request first at token {CHUNK + 17}, before this chunk",
        f"the prompt differs from that of request first at token {CHUNK + 17}, before this chunk",
    ]


def test_another_salt(requests: Requests) -> None:
    tokens = ids(2 * CHUNK)
    told(requests, leg("first", tokens, salt="alice"))
    says = "request first had the same tokens, but under another cache_salt: never shared"
    assert whys(told(requests, leg("b", tokens, salt="bob"))) == [says] * 2

    told(requests, leg("d", ids(CHUNK, 5), lora="poet"))
    assert "under another LoRA adapter: never" in whys(told(requests, leg("e", ids(CHUNK, 5))))[0]
    told(requests, leg("f", ids(CHUNK, 6), base=b"c" * 16))
    assert "under another model or KV layout" in whys(told(requests, leg("g", ids(CHUNK, 6))))[0]


def test_the_last_chunk_was_not_full(requests: Requests) -> None:
    tokens = ids(3 * CHUNK)
    told(requests, leg("first", tokens[: CHUNK + 40]))
    shown = told(requests, leg("b", tokens, found=1, tiers=["dram"], covered=CHUNK))
    assert whys(shown)[0] == (
        f"request first was the same and ended at token {CHUNK + 40}: its last chunk was not full, and matches no longer prompt"
    )
    short = told(requests, leg("c", tokens[: CHUNK + 20], found=1, tiers=["dram"], covered=CHUNK))
    assert "its chunk was longer, and only whole chunks match" in whys(short)[0]
    few = told(requests, leg("d", ids(CHUNK + 5, 8)))
    assert whys(few)[1] == "the prompt's last 5 tokens do not fill a chunk and are too few to be kept"


def test_a_prompt_that_goes_on_otherwise_than_the_answer_did(requests: Requests) -> None:
    tokens, answered = ids(2 * CHUNK), ids(CHUNK + 50)
    answered[CHUNK + 40] += 1
    made, edges = marks.make(answered, CHUNK, SEED)
    first = leg("first", answered[: CHUNK + 40])
    told(requests, first, telling.Ended(first.leg, 10, "stop", CHUNK + 50, made, edges))
    shown = told(requests, leg("b", tokens, found=1, tiers=["dram"], covered=CHUNK))
    assert f"ended at token {CHUNK + 40}: its last chunk was not full" in whys(shown)[0]


def test_an_answer_belongs_to_what_a_later_prompt_is_compared_with(requests: Requests) -> None:
    tokens = ids(3 * CHUNK)
    made, edges = marks.make(tokens[: 2 * CHUNK], CHUNK, SEED)
    told(
        requests,
        leg("first", tokens[:CHUNK]),
        telling.Ended("cmpl-first-0-0123abcd", 9, "stop", 2 * CHUNK, made, edges),
    )
    (why, after) = whys(told(requests, leg("b", tokens, found=1, tiers=["dram"], covered=CHUNK)))
    assert "had the same tokens, but the chunk was not in the cache yet" in why
    assert f"ended at token {2 * CHUNK}" in after


def test_what_the_engine_decided_and_tiers_that_are_left_alone(gone: Gone) -> None:
    requests = Requests(gone, lambda: ["redis"], 0.0)
    tokens = ids(CHUNK)
    assert "estimated to be faster" in whys(told(requests, leg("a", tokens, found=1, why="slower")))[0]
    assert "the load failed (x)" in whys(told(requests, leg("b", ids(CHUNK, 2), why="the load failed (x)")))[0]
    assert "set to load only" in whys(told(requests, leg("n", tokens, why="never")))[0]
    unanswered = whys(told(requests, leg("u", tokens, why="unavailable: no answer within 50 ms")))
    assert unanswered == ["the cache daemon did not answer the engine in time (no answer within 50 ms)"]
    assert whys(told(requests, leg("c", ids(CHUNK, 3))))[0].endswith(
        "; redis could not be asked (circuit open after failures)"
    )
    assert "token 32; " in whys(told(requests, leg("d", ids(CHUNK, 4), local=32)))[0]


def test_two_legs_of_one_request_are_not_compared_with_each_other(requests: Requests) -> None:
    tokens = ids(CHUNK)
    told(requests, leg("a", tokens))
    shown = told(requests, leg("a", tokens, leg="cmpl-a-0-ffffffff"), instance="decode-0")
    assert "never stored" in whys(shown)[0]
    assert [x["instance"] for x in requests.told(["a", "nobody"])["a"]] == ["prefill-0", "decode-0"]


def test_spans_may_come_before_their_leg_and_are_bounded(requests: Requests) -> None:
    span = telling.Span("cmpl-a-0-0123abcd", "store", 1000.0, 1.0)
    requests.take(telling.Facts([span] * 100, lost=3), "decode-0")
    shown = requests.told(["a"])["a"][0]
    assert (len(shown["spans"]), shown["output_tokens"]) == (64, None)
    stats = requests.stats()
    assert (stats["legs"], stats["prompts"], stats["lost"]) == (1, 0, 3)
    assert "chunks" not in shown


def test_memory_is_bounded(requests: Requests, gone: Gone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.transfer.requests.MOST", 50)
    for n in range(200):
        told(requests, leg(f"r{n}", ids(CHUNK, n)))
    assert len(requests) == 50
    assert requests.told(["r0", "r149", "r150"]).keys() == {"r150"}
    monkeypatch.setattr("pdserve.transfer.requests.MOST_BYTES", 20_000)
    told(requests, leg("last", ids(CHUNK, 500)))
    assert requests._size <= 20_000
    few = Gone(most=10)
    for n in range(100):
        few.removed(bytes([n]) * 32, "dram", "capacity", float(n))
        few.arrived(bytes([n]) * 32, "disk", 0.1, 5, float(n))
    assert (len(few), few.forgotten, gone.forgotten) == (20, True, False)
    assert few.removal(bytes([99]) * 32, 1000.0) is not None


def test_what_is_remembered_of_keys_is_forgotten_key_by_key() -> None:
    some = Gone(most=2048)
    for n in range(10_000):
        some.removed(n.to_bytes(32, "little"), "dram", "capacity", float(n))
        assert len(some) <= 2048
    kept = [n for n in range(10_000) if some.removal(n.to_bytes(32, "little"), 1e9) is not None]
    assert len(kept) == 2048
    assert set(range(9_000, 10_000)) <= set(kept)  # of each part the last ones
    last = (9_999).to_bytes(32, "little")
    for at in (20_000.0, 30_000.0, 40_000.0):  # the last two times are kept
        some.removed(last, "disk", "dropped", at)
    found = [some.removal(last, before) for before in (25_000.0, 35_000.0, 45_000.0)]
    assert [r and r.at for r in found] == [None, 30_000.0, 40_000.0]


def test_prompts_are_bounded_in_number_and_bytes() -> None:
    def prompt(n: int, tokens: list[int]) -> Prompt:
        made, edges = marks.make(tokens, CHUNK, SEED)
        return Prompt(f"leg{n}", f"r{n}", "p", float(n), (BASE, "", b""), len(tokens), len(tokens), made, edges)

    prompts = Prompts(most=20, most_bytes=1 << 20)
    for n in range(100):
        prompts.add(prompt(n, ids(3 * CHUNK, n % 30)))
    assert len(prompts) == 20
    assert len(prompts._edges) <= 20 * 3
    small = Prompts(most_bytes=20_000)
    for n in range(100):
        small.add(prompt(n, ids(10 * CHUNK, n)))
    assert small.size <= 20_000
    assert len(small) > 1
    for n in range(100):
        prompts._remove(prompts._prompts.pop(f"leg{n}", None))
    assert (prompts.size, prompts._edges) == (0, {})


def test_the_keys_of_a_prompts_beginning_are_those_of_its_whole_chunks(requests: Requests) -> None:
    tokens = ids(3 * CHUNK + 10)
    assert requests.keys("r", 100) is None
    requests.take(telling.Facts([leg("r", tokens)]), "prefill-0")
    assert requests.keys("r", CHUNK - 1) == []
    assert requests.keys("r", 2 * CHUNK + 5) == keys(tokens)[:2]
    assert requests.keys("r", 10**6) == keys(tokens)[:3]
