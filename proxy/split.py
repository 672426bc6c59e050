"""The story of one request over two engines: prefill here, hand over, decode there, and what happens when either fails.

    producers up, and the request can be split?   no -> route "local": a consumer does all of it
      decode leg, where it is sent early: waits on its consumer for the chunks; dropped if there will be none
      prefill leg on a producer   200 -> its handover goes to the decode leg                        route "pd"
                                  4xx -> the client's mistake: returned as it is, not tried again
                                  5xx, no connection, broken off, late -> another producer, then route "local"
      the first token             with --early-token: the producer's own, given to the client at once where takeover.py can join
                                  the consumer's answer behind it; a consumer that would have begun otherwise is asked anew
      decode leg on a consumer    no connection, or broken off before the first byte -> another consumer
                                  (an answer that is not JSON counts as broken off)
                                  4xx -> returned as it is; 5xx -> another consumer, whose answer is returned as it is
                                  broken off later -> another consumer goes on, as takeover.py plans it;
                                  the client sees one stream, or at the worst an error event as its end

Both legs run inside the task of the client's request. Cancelling that task, which is what a client's leaving does,
closes whichever engine connection is open, and with it the engine's work.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import Any

from pdserve.engines.base import Dialect
from pdserve.errors import RequestError, UpstreamError
from pdserve.proxy import openai, relay
from pdserve.proxy.began import Began
from pdserve.proxy.behind import Differs, tokens_to_text, with_text
from pdserve.proxy.budget import Budget
from pdserve.proxy.early import EarlyLeg
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.instance import Instance
from pdserve.proxy.lifetime import Deadlines, Event, State
from pdserve.proxy.routing import Routing
from pdserve.proxy.takeover import OfChoices, Plan, Takeover
from pdserve.proxy.takeover import takeover as made_takeover
from pdserve.proxy.upstream import Answer, LegFailure

ATTEMPTS = 2  # instances tried per leg: one failure is seen through, a failing fleet is not hammered
REPLY_LIMIT = 16 * 1024 * 1024
ANSWER_LIMIT = 512 * 1024 * 1024
NOBODY = "No engine that can answer is up."
_THEIR_LOAD = (408, 429)  # 4xx that say something of the producer, not of the request


class Splitter:
    """Runs requests. Holds what they share and no state of any one of them."""

    def __init__(
        self,
        fleet: Fleet,
        dialect: Dialect,
        routing: Routing,
        deadlines: Deadlines,
        early: bool = False,
        began: Began | None = None,
        early_token: bool = False,
    ) -> None:
        self._fleet, self._dialect, self._deadlines, self._metrics = fleet, dialect, deadlines, fleet.metrics
        self._routing, self._budget, self._early = routing, Budget(), early
        self._early_token = early_token
        self._known: dict[tuple[str, str], Any] = {}
        self._began = Began((), "") if began is None else began

    @property
    def models(self) -> frozenset[str]:
        return self._fleet.models

    async def generate(self, exchange: Exchange, ask: openai.Ask) -> None:
        """A completion. Raises RequestError or UpstreamError; if the response had begun the client has been told."""
        if not self._fleet.ready:
            raise RequestError(503, NOBODY, "service_unavailable")  # before a producer works for nothing
        self._budget.earn()
        exchange.facts = self._routing.facts(exchange.endpoint, exchange.headers, ask.body)
        alone = self._dialect.why_local(exchange.endpoint, ask.body)
        why = self._why_local(exchange, alone)
        self._labelled("split_decisions_total", why or "pd").inc()
        keep = ask.stream and len(self._fleet.consumers()) > 1
        exchange.may_begin = self._early_token and not why and ask.stream and self._may_begin(exchange.endpoint, ask)
        takeover = made_takeover(self._dialect, exchange.endpoint, ask.body, keep or exchange.may_begin)
        if not keep:
            takeover.lives = 0  # nobody is there to go on
        handover, consumer, leg = None, None, None
        if not why:
            exchange.client.lifetime.on(Event.SPLIT)
            consumer = self._plan_consumer(exchange)
            leg = self._send_early(consumer, exchange, ask, takeover.ask_ids)
            try:
                handover, why = await self._prefill(exchange, ask, consumer)
            except BaseException:
                if leg is not None:
                    await leg.drop()
                raise
        if leg is not None and why:
            await leg.drop()  # it waits for what nobody computes
            leg = None
        exchange.route = "local" if why else "pd"
        exchange.client.lifetime.on(Event.DECODE)
        if handover is not None:
            takeover.cached = self._dialect.cached_tokens(handover)
        body = self._dialect.decode_body(exchange.endpoint, ask.body, handover, takeover.ask_ids)
        takeover.sent, takeover.prompt = body, exchange.prompt_tokens
        # The producer's reply tells of route "pd"; of several prompts the first event does not tell which they are.
        told = bool(why) and alone != "several-prompts"
        if told:
            self._began.expect(exchange.request_id)
        try:
            if exchange.first is not None and exchange.first.over:
                await self._say_all(exchange, takeover, leg)
            else:
                await self._decode(exchange, body, why, takeover, consumer, leg)
        finally:
            if told:
                self._began.forget(exchange.request_id)
            if isinstance(takeover, OfChoices) and takeover.first is not None:
                self._labelled("first_tokens_total", takeover.outcome).inc()

    def _may_begin(self, endpoint: str, ask: openai.Ask) -> bool:
        return endpoint in openai.CHOICES and self._dialect.may_begin(endpoint, ask.body)

    def _begin(self, exchange: Exchange, takeover: Takeover | None) -> None:
        """Gives the client the producer's own first token. Nothing is waited for: no leg is left alone here."""
        assert isinstance(takeover, OfChoices)
        assert exchange.first is not None
        exchange.trail.handed_on()
        exchange.client.start(200, [(b"content-type", openai.EVENTS + b"; charset=utf-8")])
        self._measure(exchange)
        exchange.client.events(takeover.begin(exchange.first), exchange.first.over)

    async def _say_all(self, exchange: Exchange, takeover: Takeover, leg: EarlyLeg | None) -> None:
        """The answer ends with its first token."""
        if leg is not None:
            await leg.drop()
        exchange.tell_route()
        self._begin(exchange, takeover)
        exchange.client.lifetime.on(Event.END)
        await exchange.client.ready()

    def _plan_consumer(self, exchange: Exchange) -> Instance | None:
        """Who is to decode, where that must be known before the prefill; else it is chosen after it, by newer facts."""
        consumers = self._fleet.consumers()
        if not self._early and not any(i.place for i in consumers):
            return None
        return self._fleet.choose(self._routing.decode, exchange.facts, consumers)

    def _send_early(
        self, consumer: Instance | None, exchange: Exchange, ask: openai.Ask, ids: bool
    ) -> EarlyLeg | None:
        """The decode leg, sent before the prefill is done, if that is wished and the engine can wait."""
        handover = self._dialect.early_handover(self._deadlines.prefill) if self._early and consumer is not None else None
        if consumer is None or handover is None:
            return None
        body = self._dialect.decode_body(exchange.endpoint, ask.body, handover, ids)
        until = asyncio.get_running_loop().time() + self._deadlines.prefill + self._deadlines.answer
        return EarlyLeg(consumer, self._open(consumer, exchange, body, until))

    async def pass_on(self, exchange: Exchange, body: bytes) -> None:
        """A request that one engine answers alone, in whatever form."""
        exchange.route = "passthrough"
        exchange.client.lifetime.on(Event.DECODE)
        await self._decode(exchange, body, "", None)

    def _why_local(self, exchange: Exchange, alone: str | None) -> str:
        """`alone`: why a consumer has to do it alone, whatever the fleet."""
        producers = self._fleet.producers()
        if not producers:
            return "no-producer"
        if alone:
            return alone
        exchange.decided = time.perf_counter()
        why, exchange.uncached = self._routing.worth.decide(exchange.facts, producers, self._fleet.consumers())
        return why

    # The prefill leg.

    async def _prefill(
        self, exchange: Exchange, ask: openai.Ask, consumer: Instance | None
    ) -> tuple[bytes | None, str]:
        """The handover and "", or None and why there is none. Raises UpstreamError for the client's mistake."""
        deadline = asyncio.get_running_loop().time() + self._deadlines.prefill
        tried: list[Instance] = []
        while len(tried) < ATTEMPTS:
            instance = self._fleet.choose(self._routing.prefill, exchange.facts, self._fleet.producers(), tried)
            if instance is None:
                break
            tried.append(instance)
            exchange.trail.leg("prefill", instance.name)
            # On another host than the consumer the chunks are sent there while they are computed.
            place = consumer.place if consumer is not None and consumer.place != instance.place else ""
            ids = exchange.may_begin and ask.body.get("return_token_ids") is True
            body = self._dialect.prefill_body(exchange.endpoint, ask.body, place, ids)
            try:
                handover, reply = await self._prefill_on(instance, exchange, body, deadline)
            except LegFailure as failure:
                exchange.trail.lost(str(failure))
                self._fleet.failed(instance, "prefill", failure, exchange.request_id)
                if not self._budget.spend(failure.reason):
                    raise LegFailure(503, "it is overloaded, and so are others", instance.name, "status") from failure
                if failure.reason == "timeout":
                    break  # the time for this stage is used up
                continue
            exchange.prefill = instance.name
            exchange.trail.done()
            if exchange.may_begin and handover is not None:
                exchange.first = self._dialect.first(exchange.endpoint, ask.body, reply, handover)
            return handover, ""
        return None, "prefill-failed"

    async def _prefill_on(
        self, instance: Instance, exchange: Exchange, body: bytes, deadline: float
    ) -> tuple[bytes | None, bytes]:
        """The handover, and the reply that it came with."""
        began = time.perf_counter()
        try:
            with instance.serving():
                async with self._open(instance, exchange, body, deadline) as answer:
                    reply = await answer.read(REPLY_LIMIT, deadline)
        except LegFailure as failure:
            if failure.reason == "timeout":
                within = f"no reply within {self._deadlines.prefill:g} s"
                raise LegFailure(504, within, instance.name, "timeout") from failure
            raise
        if 400 <= answer.status < 500 and answer.status not in _THEIR_LOAD:
            exchange.route, exchange.prefill = "pd", instance.name
            exchange.tell_route()
            error = openai.engine_error(exchange.endpoint, answer.status, reply, instance.name)
            raise UpstreamError(answer.status, "the prompt was refused", instance.name, error)
        if answer.status != 200:
            raise LegFailure(answer.status, f"it answered {answer.status}", instance.name, "status")
        try:
            handover = self._dialect.read_handover(reply)
        except ValueError as exc:
            raise LegFailure(502, str(exc), instance.name, "broken") from exc
        self._labelled("prefill_leg_seconds", instance.name).observe(time.perf_counter() - began)
        instance.went_well()
        cached = self._dialect.cached_tokens(handover) if handover is not None else None
        exchange.trail.handed = self._dialect.handed(handover) if handover is not None else None
        exchange.prompt_tokens = self._dialect.prompt_tokens(reply)
        self._routing.learn(exchange.facts, instance, cached, exchange.prompt_tokens)
        return handover, reply

    # The decode leg.

    async def _decode(
        self,
        exchange: Exchange,
        body: bytes,
        why: str,
        takeover: Takeover | None,
        planned: Instance | None = None,
        leg: EarlyLeg | None = None,
    ) -> None:
        tried: list[Instance] = []
        last: LegFailure | None = None
        path = exchange.path
        while len(tried) < ATTEMPTS:
            instance, planned = planned, None
            if instance is None or (leg is None and not instance.usable):
                instance = self._fleet.choose(self._routing.decode, exchange.facts, self._fleet.consumers(), tried)
            if instance is None:
                break
            tried.append(instance)
            exchange.decode = instance.name
            exchange.tell_route(why)
            if exchange.first is not None and not exchange.client.started:
                self._begin(exchange, takeover)
            exchange.trail.leg("decode", instance.name)
            early, leg = leg, None
            try:
                if early is not None:
                    return await self._decode_on(instance, exchange, path, body, takeover, early)
                with instance.serving():
                    return await self._decode_on(instance, exchange, path, body, takeover)
            except Differs:
                exchange.trail.done()
                assert isinstance(takeover, OfChoices)
                anew = takeover.differs()
                path, body, tried, planned = anew.path or exchange.path, anew.body, [], instance
            except LegFailure as failure:
                exchange.trail.lost(str(failure))
                self._fleet.failed(instance, "decode", failure, exchange.request_id)
                if exchange.client.started:
                    plan = await self._plan_on(exchange, takeover, failure.reason, instance)
                    if plan is None:
                        raise
                    if not plan.body:
                        return await self._say_the_end(exchange, plan.last)
                    path, body, tried = plan.path or exchange.path, plan.body, [instance]
                elif failure.reason == "timeout" or (failure.reason == "status" and not self._budget.spend("status")):
                    raise
                # Its traceback holds this frame: kept here with it, it would be a circle around the whole request.
                last = failure.with_traceback(None)
        try:
            raise last or RequestError(503, NOBODY, "service_unavailable")
        finally:
            last = None

    async def _plan_on(
        self, exchange: Exchange, takeover: Takeover | None, reason: str, instance: Instance
    ) -> Plan | None:
        """How to go on with a stream that `instance` has broken off; None if it cannot go on."""
        plan = None
        if takeover is not None and self._budget.spend(reason):
            if exchange.client.lifetime.state is State.STREAMING:
                exchange.client.lifetime.on(Event.LOST)
            plan = takeover.plan()
            if plan is not None and plan.questions:
                plan = takeover.answered(await self._answers(exchange, plan, instance))
        self._metrics["takeovers_total"].labels(plan.how if plan else "none").inc()
        return plan

    async def _answers(self, exchange: Exchange, plan: Plan, lost: Instance) -> list[bytes]:
        """What another engine says to the plan's questions."""
        other = self._fleet.choose(self._routing.decode, exchange.facts, self._fleet.consumers(), [lost])
        if other is None:
            raise RequestError(503, NOBODY, "service_unavailable")
        until = asyncio.get_running_loop().time() + self._deadlines.resume
        replies = []
        with other.serving():
            for path, body in plan.questions:
                async with self._open(other, exchange, body, until, path) as answer:
                    replies.append(await answer.read(REPLY_LIMIT, until))
        return replies

    async def _say_the_end(self, exchange: Exchange, last: bytes) -> None:
        await exchange.client.end(last)
        exchange.client.lifetime.on(Event.END)

    async def _decode_on(
        self,
        instance: Instance,
        exchange: Exchange,
        path: bytes,
        body: bytes,
        takeover: Takeover | None,
        early: EarlyLeg | None = None,
    ) -> None:
        client = exchange.client
        begun = takeover is not None and takeover.begun
        wait = self._deadlines.resume if client.started and not begun else self._deadlines.answer
        until = asyncio.get_running_loop().time() + wait
        opened = early.taken() if early is not None else self._open(instance, exchange, body, until, path)
        async with opened as answer:
            if not answer.header(b"content-type").startswith(openai.EVENTS):
                whole = await answer.read(ANSWER_LIMIT, until)
                if client.started:
                    raise LegFailure(502, f"it answered {answer.status} instead of going on", instance.name, "status")
                return await self._answer_whole(instance, exchange, answer, whole, takeover)
            cutter = relay.EventCutter(openai.LAST.get(exchange.endpoint, ()))
            first = await relay.first_events(answer, cutter, until)
            if isinstance(takeover, OfChoices) and takeover.unfinished:
                first = await self._finished(instance, exchange, answer, cutter, takeover, first)
            if not client.started:
                if exchange.route == "local":
                    exchange.tell_cached(self._began.of(exchange.request_id, instance.name))
                client.start(answer.status, openai.headers_out(answer.headers))
                self._measure(exchange)
            instance.went_well()
            await relay.stream(answer, first, cutter, client, takeover, self._deadlines.event)
            self._routing.learn(exchange.facts, instance, None, None)
            client.lifetime.on(Event.END)

    async def _finished(
        self, instance: Instance, exchange: Exchange, answer: Answer, cutter: relay.EventCutter, takeover: OfChoices, first: bytes
    ) -> bytes:
        """The first events of an engine that goes on behind a part of a character, with the text that its tokens have."""
        until = asyncio.get_running_loop().time() + self._deadlines.resume
        takeover.unfinished = False
        while (ids := tokens_to_text(first)) is None and (more := await relay.first_events(answer, cutter, until)):
            first += more
        text = ""
        for tokens in ([], ids or []):
            path, body = takeover.asks_text(tokens)
            async with self._open(instance, exchange, body, until, path) as asked:
                text = self._dialect.detokenized(await asked.read(REPLY_LIMIT, until)) or ""
            if not tokens and not text.endswith("\ufffd"):
                return first  # not a part of a character: a token that is never shown
        return with_text(first, text)

    async def _answer_whole(
        self, instance: Instance, exchange: Exchange, answer: Answer, body: bytes, takeover: Takeover | None
    ) -> None:
        """An answer that is not a stream, whatever its status. It is complete here, so its status is true."""
        headers = openai.headers_out(answer.headers)
        if answer.status < 300 and exchange.endpoint in openai.SPLIT and not openai.is_object(body):
            raise LegFailure(502, "its answer is not a JSON object", instance.name, "broken")
        if answer.status >= 400:
            shaped = openai.engine_error(exchange.endpoint, answer.status, body, instance.name)
            if answer.status >= 500:
                raise LegFailure(answer.status, f"it answered {answer.status}", instance.name, "status", shaped)
            exchange.error = f"{instance.name} answered {answer.status}"
            if shaped is not body:
                headers = [h for h in headers if h[0] != b"content-type"] + [(b"content-type", openai.JSON)]
            body = shaped
        else:
            instance.went_well()
            self._routing.learn(exchange.facts, instance, None, None)
            if exchange.route == "local":
                exchange.tell_cached(await self._began.of_whole(exchange.request_id, instance.name))
            if takeover is not None and takeover.cached is not None:
                body = self._dialect.tell_cached(body, takeover.cached)
        await exchange.client.whole(answer.status, headers, body)
        exchange.client.lifetime.on(Event.END)

    def _measure(self, exchange: Exchange) -> None:
        """The first token of a decision that nothing has thwarted."""
        if exchange.uncached is not None and not exchange.trail.recoveries:
            local = exchange.route == "local"
            took = time.perf_counter() - exchange.decided
            self._routing.worth.took(local, exchange.uncached[local], took)

    def _labelled(self, metric: str, label: str) -> Any:
        """Looked up in the library once, which takes a lock and its time."""
        found = self._known.get((metric, label))
        if found is None:
            found = self._known[metric, label] = self._metrics[metric].labels(label)
        return found

    def _open(
        self, instance: Instance, exchange: Exchange, body: bytes, until: float, path: bytes | None = None
    ) -> AbstractAsyncContextManager[Answer]:
        sent, traced = exchange.headers, exchange.trail.traced
        if traced is not None:
            sent = traced.headers(sent, instance.name)
        ask = (exchange.method, path or exchange.path, sent, body)
        return instance.upstream.request(*ask, self._deadlines.connect, until)
