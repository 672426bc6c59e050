"""The decode leg of one request: asked of one consumer after another, until the client has its whole answer."""

from __future__ import annotations

import asyncio

from pdserve.errors import RequestError
from pdserve.proxy import openai, relay
from pdserve.proxy.behind import Differs
from pdserve.proxy.early import EarlyLeg
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.instance import Instance
from pdserve.proxy.legs import ATTEMPTS, NOBODY, Legs
from pdserve.proxy.lifetime import Event
from pdserve.proxy.recovery import Recovery
from pdserve.proxy.takeover import OfChoices, Takeover
from pdserve.proxy.upstream import Answer, LegFailure

ANSWER_LIMIT = 512 * 1024 * 1024


class DecodeLeg:
    """`takeover` remembers the stream, so that another consumer can go on; None where nothing is known of the answer's form."""

    __slots__ = ("_exchange", "_legs", "_path", "_takeover")

    def __init__(self, legs: Legs, exchange: Exchange, takeover: Takeover | None) -> None:
        self._legs, self._exchange, self._takeover = legs, exchange, takeover
        self._path = exchange.path

    @property
    def _recovery(self) -> Recovery:
        return Recovery(self._legs, self._exchange, self._takeover)

    def begin(self) -> None:
        """Gives the client the producer's own first token. Nothing is waited for: no leg is left alone here."""
        exchange, takeover = self._exchange, self._takeover
        assert isinstance(takeover, OfChoices)
        assert exchange.first is not None
        exchange.trail.handed_on()
        exchange.client.start(200, [(b"content-type", openai.EVENTS + b"; charset=utf-8")])
        self._legs.measure(exchange)
        exchange.client.events(takeover.begin(exchange.first), exchange.first.over)

    async def say_first_alone(self) -> None:
        """The answer ends with its first token."""
        self._exchange.tell_route()
        self.begin()
        self._exchange.client.lifetime.on(Event.END)
        await self._exchange.client.ready()

    async def answer(self, body: bytes, why: str, planned: Instance | None = None, early: EarlyLeg | None = None) -> None:
        """`why` there is no handover; `planned` is asked first, and `early` is the leg that was sent to it. Raises RequestError
        or UpstreamError."""
        legs, exchange = self._legs, self._exchange
        tried: list[Instance] = []
        last: LegFailure | None = None
        while len(tried) < ATTEMPTS:
            instance, planned = planned, None
            if instance is None or (early is None and not instance.usable):
                instance = legs.consumer(exchange, tried)
            if instance is None:
                break
            tried.append(instance)
            exchange.decode = instance.name
            exchange.tell_route(why)
            if exchange.first is not None and not exchange.client.started:
                self.begin()
            exchange.trail.leg("decode", instance.name)
            leg, early = early, None
            try:
                if leg is not None:
                    return await self._on(instance, body, leg)
                with instance.serving():
                    return await self._on(instance, body)
            except Differs:
                exchange.trail.done()
                assert isinstance(self._takeover, OfChoices)
                anew = self._takeover.differs()
                self._path, body, tried, planned = anew.path or exchange.path, anew.body, [], instance
            except LegFailure as failure:
                exchange.trail.lost(str(failure))
                legs.fleet.failed(instance, "decode", failure, exchange.request_id)
                if exchange.client.started:
                    plan = await self._recovery.plan(failure.reason, instance)
                    if plan is None:
                        raise
                    if not plan.body:
                        return await self._say_the_end(plan.last)
                    self._path, body, tried = plan.path or exchange.path, plan.body, [instance]
                elif failure.reason == "timeout" or (failure.reason == "status" and not legs.budget.spend("status")):
                    raise
                # Its traceback holds this frame: kept here with it, it would be a circle around the whole request.
                last = failure.with_traceback(None)
        try:
            raise last or RequestError(503, NOBODY, "service_unavailable")
        finally:
            last = None

    async def _say_the_end(self, last: bytes) -> None:
        await self._exchange.client.end(last)
        self._exchange.client.lifetime.on(Event.END)

    async def _on(self, instance: Instance, body: bytes, early: EarlyLeg | None = None) -> None:
        legs, exchange, takeover, client = self._legs, self._exchange, self._takeover, self._exchange.client
        begun = takeover is not None and takeover.begun
        wait = legs.deadlines.resume if client.started and not begun else legs.deadlines.answer
        until = asyncio.get_running_loop().time() + wait
        opened = early.taken() if early is not None else legs.open(instance, exchange, body, until, self._path)
        async with opened as answer:
            if not answer.header(b"content-type").startswith(openai.EVENTS):
                whole = await answer.read(ANSWER_LIMIT, until)
                if client.started:
                    raise LegFailure(502, f"it answered {answer.status} instead of going on", instance.name, "status")
                return await self._whole(instance, answer, whole)
            cutter = relay.EventCutter(openai.LAST.get(exchange.endpoint, ()))
            first = await relay.first_events(answer, cutter, until)
            if isinstance(takeover, OfChoices) and takeover.unfinished:
                first = await self._recovery.finished(instance, answer, cutter, first)
            if not client.started:
                if exchange.route == "local":
                    exchange.tell_cached(legs.began.of(exchange.request_id, instance.name))
                client.start(answer.status, openai.headers_out(answer.headers))
                legs.measure(exchange)
            instance.went_well()
            await relay.stream(answer, first, cutter, client, takeover, legs.deadlines.event)
            legs.routing.learn(exchange.facts, instance, None, None)
            client.lifetime.on(Event.END)

    async def _whole(self, instance: Instance, answer: Answer, body: bytes) -> None:
        """An answer that is not a stream, whatever its status. It is complete here, so its status is true."""
        legs, exchange, takeover = self._legs, self._exchange, self._takeover
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
            legs.routing.learn(exchange.facts, instance, None, None)
            if exchange.route == "local":
                exchange.tell_cached(await legs.began.of_whole(exchange.request_id, instance.name))
            if takeover is not None and takeover.cached is not None:
                body = legs.dialect.tell_cached(body, takeover.cached)
        await exchange.client.whole(answer.status, headers, body)
        exchange.client.lifetime.on(Event.END)
