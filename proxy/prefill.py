"""The prefill leg of one request: asked of one producer after another, until one hands its prompt over."""

from __future__ import annotations

import asyncio
import time

from pdserve.errors import UpstreamError
from pdserve.proxy import openai
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.instance import Instance
from pdserve.proxy.legs import ATTEMPTS, REPLY_LIMIT, Legs
from pdserve.proxy.upstream import LegFailure

_THEIR_LOAD = (408, 429)  # 4xx that say something of the producer, not of the request
Handover = tuple[bytes | None, str]


class PrefillLeg:
    __slots__ = ("_ask", "_exchange", "_legs")

    def __init__(self, legs: Legs, exchange: Exchange, ask: openai.Ask) -> None:
        self._legs, self._exchange, self._ask = legs, exchange, ask

    async def handover(self, consumer: Instance | None) -> Handover:
        """What the consumer is to be given and "", or None and why there is none. Sets the producer's first token, where it may
        be used. Raises UpstreamError for the client's mistake."""
        legs, exchange, ask = self._legs, self._exchange, self._ask
        deadline = asyncio.get_running_loop().time() + legs.deadlines.prefill
        tried: list[Instance] = []
        while len(tried) < ATTEMPTS and (instance := legs.producer(exchange, tried)) is not None:
            tried.append(instance)
            exchange.trail.leg("prefill", instance.name)
            try:
                handover, reply = await self._on(instance, self._body(instance, consumer), deadline)
            except LegFailure as failure:
                exchange.trail.lost(str(failure))
                legs.fleet.failed(instance, "prefill", failure, exchange.request_id)
                if not legs.budget.spend(failure.reason):
                    raise LegFailure(503, "it is overloaded, and so are others", instance.name, "status") from failure
                if failure.reason == "timeout":
                    break  # the time for this stage is used up
                continue
            exchange.prefill = instance.name
            exchange.trail.done()
            if exchange.may_begin and handover is not None:
                exchange.first = legs.dialect.first(exchange.endpoint, ask.body, reply, handover)
            return handover, ""
        return None, "prefill-failed"

    def _body(self, instance: Instance, consumer: Instance | None) -> bytes:
        # On another host than the consumer the chunks are sent there while they are computed.
        place = consumer.place if consumer is not None and consumer.place != instance.place else ""
        ids = self._exchange.may_begin and self._ask.body.get("return_token_ids") is True
        return self._legs.dialect.prefill_body(self._exchange.endpoint, self._ask.body, place, ids)

    async def _on(self, instance: Instance, body: bytes, deadline: float) -> tuple[bytes | None, bytes]:
        """The handover, and the reply that it came with."""
        legs, exchange = self._legs, self._exchange
        began = time.perf_counter()
        try:
            with instance.serving():
                async with legs.open(instance, exchange, body, deadline) as answer:
                    reply = await answer.read(REPLY_LIMIT, deadline)
        except LegFailure as failure:
            if failure.reason == "timeout":
                within = f"no reply within {legs.deadlines.prefill:g} s"
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
            handover = legs.dialect.read_handover(reply)
        except ValueError as exc:
            raise LegFailure(502, str(exc), instance.name, "broken") from exc
        legs.labelled("prefill_leg_seconds", instance.name).observe(time.perf_counter() - began)
        instance.went_well()
        self._learn(instance, handover, reply)
        return handover, reply

    def _learn(self, instance: Instance, handover: bytes | None, reply: bytes) -> None:
        legs, exchange = self._legs, self._exchange
        cached = legs.dialect.cached_tokens(handover) if handover is not None else None
        exchange.trail.handed = legs.dialect.handed(handover) if handover is not None else None
        exchange.prompt_tokens = legs.dialect.prompt_tokens(reply)
        legs.routing.learn(exchange.facts, instance, cached, exchange.prompt_tokens)
