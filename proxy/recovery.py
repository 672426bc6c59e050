"""What other engines are asked so that one can go on with a stream: takeover.py says what, and makes the answers a plan."""

from __future__ import annotations

import asyncio

from pdserve.errors import RequestError
from pdserve.proxy import relay
from pdserve.proxy.behind import tokens_to_text, with_text
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.instance import Instance
from pdserve.proxy.legs import NOBODY, REPLY_LIMIT, Legs
from pdserve.proxy.lifetime import Event, State
from pdserve.proxy.takeover import OfChoices, Plan, Takeover
from pdserve.proxy.upstream import Answer


class Recovery:
    """One request's."""

    __slots__ = ("_exchange", "_legs", "_takeover")

    def __init__(self, legs: Legs, exchange: Exchange, takeover: Takeover | None) -> None:
        self._legs, self._exchange, self._takeover = legs, exchange, takeover

    async def plan(self, reason: str, lost: Instance) -> Plan | None:
        """How to go on with a stream that `lost` has broken off; None if it cannot go on."""
        takeover, lifetime, plan = self._takeover, self._exchange.client.lifetime, None
        if takeover is not None and self._legs.budget.spend(reason):
            if lifetime.state is State.STREAMING:
                lifetime.on(Event.LOST)
            plan = takeover.plan()
            if plan is not None and plan.questions:
                plan = takeover.answered(await self._replies(plan, lost))
        self._legs.labelled("takeovers_total", plan.how if plan else "none").inc()
        return plan

    async def _replies(self, plan: Plan, lost: Instance) -> list[bytes]:
        """What another engine says to the plan's questions."""
        other = self._legs.consumer(self._exchange, [lost])
        if other is None:
            raise RequestError(503, NOBODY, "service_unavailable")
        until = asyncio.get_running_loop().time() + self._legs.deadlines.resume
        replies = []
        with other.serving():
            for path, body in plan.questions:
                async with self._legs.open(other, self._exchange, body, until, path) as answer:
                    replies.append(await answer.read(REPLY_LIMIT, until))
        return replies

    async def finished(self, instance: Instance, answer: Answer, cutter: relay.EventCutter, first: bytes) -> bytes:
        """The first events of an engine that goes on behind a part of a character, with the text that its tokens have."""
        takeover = self._takeover
        assert isinstance(takeover, OfChoices)
        until = asyncio.get_running_loop().time() + self._legs.deadlines.resume
        takeover.unfinished = False
        while (ids := tokens_to_text(first)) is None and (more := await relay.first_events(answer, cutter, until)):
            first += more
        text = ""
        for tokens in ([], ids or []):
            path, body = takeover.asks_text(tokens)
            async with self._legs.open(instance, self._exchange, body, until, path) as asked:
                text = self._legs.dialect.detokenized(await asked.read(REPLY_LIMIT, until)) or ""
            if not tokens and not text.endswith("\ufffd"):
                return first  # not a part of a character: a token that is never shown
        return with_text(first, text)
