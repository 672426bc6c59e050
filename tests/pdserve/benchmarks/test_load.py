"""The load against an engine without a model: when things are sent, what is counted, what failures do. Times are never bounded from
above here: the machine may be busy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdserve.bench.client import Broken, StreamClient
from pdserve.bench.load import HOPELESS, HopelessError, Load, Options, Outcome, messages
from pdserve.bench.plan import Agent, Piece, Plan, Session, Stage, Step, single
from pdserve.bench.ramp import Ramp
from pdserve.bench.record import Record
from pdserve.bench.summary import summarise
from pdserve.bench.text import Writer
from pdserve.engines.fake.server import FakeEngine, Fault


def run(
    plan: Plan,
    engine: FakeEngine | None = None,
    ramp: Ramp | None = None,
    seen: Callable[[FakeEngine], Awaitable[None]] | None = None,
    **options: Any,
) -> Outcome:
    async def inside() -> Outcome:
        async with engine or FakeEngine() as up, StreamClient(up.url) as client:
            load = Load(plan, client, Writer("0"), Options("fake", **options), ramp=ramp)
            outcome = await load.run()
            if seen is not None:
                await seen(up)
            return outcome

    return asyncio.run(inside())


def plan(*sessions: Session, **more: Any) -> Plan:
    return Plan("test", 0, (Stage("all", sessions, **more),))


def ask(name: str, tokens: int = 5, out: int = 3, start: float | None = None) -> Session:
    return single(name, (Piece(name, tokens),), out, start=start)


def by_name(outcome: Outcome) -> dict[str, Record]:
    return {f"{r.session}/{r.step}": r for r in outcome.records}


def test_every_request_is_noted() -> None:
    engine = FakeEngine()
    outcome = run(plan(ask("a"), ask("b", out=4)), engine, concurrency=2)
    records = by_name(outcome)
    assert [(r.status, r.prompt_tokens, r.output_tokens, len(r.itl_ms)) for r in records.values()] == [
        ("ok", 5, 3, 2), ("ok", 5, 4, 3),
    ]  # fmt: skip
    a = records["a/0"]
    assert a.first is not None
    assert a.ttft_ms is not None
    assert a.latency_ms is not None
    assert a.intended <= a.sent <= a.first <= a.ended
    assert a.ttft_ms == pytest.approx((a.first - a.intended) * 1000)
    body = engine.seen[0].body
    assert (body["max_tokens"], body["stream"], body["ignore_eos"], body["temperature"]) == (3, True, True, 0)


def test_latency_counts_from_the_intended_start() -> None:
    """The second round is due at once, and waits for the first, which takes 0.3 s."""
    rounds = tuple(Step((Piece(f"r{n}", 4),), 1, at=0.0) for n in range(2))
    records = by_name(run(plan(Session("user", rounds, 0.0), given=True), FakeEngine(delay=0.3)))
    late = records["user/1"]
    assert late.sent - late.intended >= 0.3
    assert late.ttft_ms is not None
    assert late.ttft_ms >= 600


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """All come in during the first answer; a closed loop of one user would take a second each."""
    engine = FakeEngine(delay=1.0)
    outcome = run(plan(*(ask(f"r{n}") for n in range(5))), engine, rate=1000.0)
    assert max(r.sent for r in outcome.records) < min(r.ended for r in outcome.records)
    assert outcome.records[0].intended != outcome.records[1].intended


def test_recorded_arrivals_are_kept() -> None:
    outcome = run(plan(ask("b", start=0.2), ask("c", start=0.4), given=True))
    records = by_name(outcome)
    assert records["c/0"].intended - records["b/0"].intended == pytest.approx(0.2)
    assert all(r.sent >= r.intended for r in outcome.records)


def test_a_closed_loop_has_so_many_users() -> None:
    outcome = run(plan(*(ask(f"r{n}") for n in range(6)), concurrency=2), FakeEngine(delay=0.1))
    for r in outcome.records:
        others = [o for o in outcome.records if o is not r and o.sent < r.ended and r.sent < o.ended]
        assert len(others) <= 3, "each user has one at a time"
    assert outcome.seconds >= 0.3


def test_answers_stand_in_later_prompts() -> None:
    talk = (Piece("q1", 4), Piece("a1", 3, "assistant", answer_of=0), Piece("q2", 4))
    engine = FakeEngine()
    run(plan(Session("user", (Step(talk[:1], 3), Step(talk, 3)))), engine)
    first, second = (s.body["prompt"] for s in engine.seen)
    said = second.removeprefix(first).split()[:3]
    assert len(said) == 3
    assert all(word.startswith("w") and word[1:].isdigit() for word in said), "the fake engine's own words"


def test_after_a_failure_made_up_text_stands_in() -> None:
    talk = (Piece("q1", 4), Piece("a1", 3, "assistant", answer_of=0), Piece("q2", 4))
    engine = FakeEngine()
    engine.faults.append(Fault("status", 500))
    outcome = run(plan(Session("user", (Step(talk[:1], 3), Step(talk, 3)))), engine)
    assert [r.status for r in outcome.records] == ["error", "ok"]
    assert Writer("0").block("a1", 3) in engine.seen[1].body["prompt"]


def test_a_chat_has_messages_by_role() -> None:
    talk = (Piece("s", 3, "system"), Piece("h", 3), Piece("q", 3), Piece("a", 3, "assistant"), Piece("z", 3))
    found = messages(Step(talk, 1), Writer("0"), {})
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user"]
    assert len(found[1]["content"].split()) == 6
    assert messages(Step(talk[:1], 1), Writer("0"), {})[0]["role"] == "user"
    outcome = run(plan(Session("user", (Step(talk, 2),))), chat=True)
    assert outcome.records[0].ok
    assert outcome.records[0].output_tokens == 2


def test_sub_agents_run_beside_each_other_and_are_waited_for() -> None:
    agents = tuple(Agent(0.05, ask(f"agent-{n}")) for n in range(2))
    alone = Agent(0.0, ask("left-alone"), joined=False)
    parent = Session(
        "parent", (Step((Piece("a", 3),), 1, agents=(*agents, alone)), Step((Piece("b", 3),), 1, think=0.1))
    )
    records = by_name(run(plan(parent), FakeEngine(delay=0.3)))
    first, last = records["agent-0/0"], records["agent-1/0"]
    assert max(first.sent, last.sent) < min(first.ended, last.ended), "side by side"
    assert records["parent/1"].intended >= max(first.ended, last.ended) + 0.1
    assert records["left-alone/0"].ok


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (Fault("status", 503), "error", "HTTP 503"),
        (Fault("plain", 429), "error", "HTTP 429"),
        (Fault("reset"), "error", "before an answer"),
        (Fault("cut", after=2), "error", "in the middle"),
        (Fault("early", after=1), "error", "without \\[DONE\\]"),
        (Fault("garbage"), "error", "no HTTP"),
        (Fault("confess", after=1), "error", "carried an error"),
        (Fault("stall"), "timeout", "1 s"),
        (Fault("mute", after=1), "timeout", "1 s"),
    ],
)
def test_failures_stay_in_the_percentiles_as_the_timeout_at_least(fault: Fault, status: str, said: str) -> None:
    engine, timeout = FakeEngine(), 1.0 if status == "timeout" else 60.0
    engine.faults.extend([None, fault, None])
    outcome = run(plan(ask("a", out=6), ask("b", out=6), ask("c", out=6)), engine, timeout=timeout)
    failed = [r for r in outcome.records if not r.ok]
    assert [r.status for r in failed] == [status]
    assert re.search(said, failed[0].error), failed[0].error
    summary = summarise(outcome.records, timeout=timeout, slo=0.4)
    assert summary is not None
    assert summary.failed == 1
    assert summary.ttft_p99 >= timeout * 1000
    assert summary.latency_p99 >= timeout * 1000
    assert summary.within_slo is not None
    assert summary.within_slo <= 2
    assert outcome.records[-1].ok, "the connection after a failure works"


def test_a_connection_that_the_server_closed_meanwhile_is_made_again() -> None:
    async def inside() -> None:
        engine = FakeEngine()
        await engine.start()
        async with StreamClient(engine.url) as client:
            body = json.dumps({"model": "fake", "prompt": "a b", "max_tokens": 2, "stream": True}).encode()
            await client.stream("/v1/completions", body, 10)
            for connection in list(engine.connections):
                connection.cut()
            await asyncio.sleep(0.2)
            assert (await client.stream("/v1/completions", body, 10)).tokens_at
            await engine.stop()
            with pytest.raises(Broken, match=r"no connection|before an answer"):
                await client.stream("/v1/completions", body, 10)

    asyncio.run(inside())


def test_a_server_that_never_works_is_given_up() -> None:
    engine = FakeEngine(always=Fault("status", 500))
    with pytest.raises(ExceptionGroup) as caught:
        run(plan(*(ask(f"r{n}") for n in range(50))), engine)
    assert caught.group_contains(HopelessError, match="HTTP 500")
    assert len(engine.seen) == HOPELESS


def test_warm_up_is_kept_out_and_counted() -> None:
    outcome = run(plan(*(ask(f"r{n}") for n in range(6))), FakeEngine(delay=0.1), warmup=0.25)
    phases = [r.phase for r in outcome.records]
    assert phases[0] == "warmup"
    assert phases[-1] == "measured"
    summary = summarise(outcome.records, 300)
    assert summary is not None
    assert summary.requests == phases.count("measured")


def test_stages_follow_each_other_and_fills_are_not_measured() -> None:
    stages = (Stage("fill", [ask("a")], measured=False), Stage("all", [ask("b")]))
    outcome = run(Plan("test", 0, stages), FakeEngine(delay=0.1), settle=0.2)
    fill, asked = outcome.records
    assert fill.phase == "fill"
    assert asked.sent >= fill.ended + 0.2
    assert [s["name"] for s in outcome.stages] == ["fill", "all"]


def test_an_endless_stage_ends_with_its_duration() -> None:
    def forever() -> Any:
        while True:
            yield ask("again")

    class Endless:
        def __iter__(self) -> Any:
            return forever()

    outcome = run(
        Plan("t", 0, (Stage("all", Endless(), endless=True),)),
        FakeEngine(delay=0.02),
        duration=0.5,
    )
    assert outcome.records
    assert max(r.intended for r in outcome.records) <= 0.5


def test_a_ramp_adds_users_while_the_target_is_kept() -> None:
    steps = tuple(Step((Piece(f"s{n}", 3),), 1) for n in range(400))
    sessions = [Session(f"u{n}", steps) for n in range(50)]
    ramp = Ramp(1, 6, target=30.0, period=0.2)
    outcome = run(plan(*sessions), FakeEngine(delay=0.02), ramp=ramp, duration=3.0)
    users = [p.users for p in ramp.periods]
    assert users[0] == 1
    assert max(users) > 2
    assert users == sorted(users)
    assert max(users) <= 6
    assert ramp.carried == max(users)
    assert outcome.ramp is ramp
