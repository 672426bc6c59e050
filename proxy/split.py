"""The story of one request over two engines: prefill here, hand over, decode there, and what happens when either fails.

    producers up, and the request can be split?   no -> route "local": a consumer does all of it
      decode leg, where it is sent early: waits on its consumer for the chunks; dropped if there will be none
      prefill leg on a producer   200 -> its handover goes to the decode leg                        route "pd"
      (prefill.py)                4xx -> the client's mistake: returned as it is, not tried again
                                  5xx, no connection, broken off, late -> another producer, then route "local"
      the first token             with --early-token: the producer's own, given to the client at once where takeover.py can join
                                  the consumer's answer behind it; a consumer that would have begun otherwise is asked anew
      decode leg on a consumer    no connection, or broken off before the first byte -> another consumer
      (decode.py)                 (an answer that is not JSON counts as broken off)
                                  4xx -> returned as it is; 5xx -> another consumer, whose answer is returned as it is
                                  broken off later -> another consumer goes on, as takeover.py plans it (recovery.py);
                                  the client sees one stream, or at the worst an error event as its end

Both legs run inside the task of the client's request. Cancelling that task, which is what a client's leaving does,
closes whichever engine connection is open, and with it the engine's work.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext

from pdserve.errors import RequestError
from pdserve.proxy import openai
from pdserve.proxy.decode import DecodeLeg
from pdserve.proxy.early import EarlyLeg
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.instance import Instance
from pdserve.proxy.legs import NOBODY, Legs
from pdserve.proxy.lifetime import Event
from pdserve.proxy.prefill import PrefillLeg
from pdserve.proxy.takeover import OfChoices, Takeover
from pdserve.proxy.takeover import takeover as made_takeover

_NOTHING = nullcontext()


class Splitter:
    """Runs requests. Holds what they share and no state of any one of them."""

    def __init__(self, legs: Legs, early: bool = False, early_token: bool = False) -> None:
        self._legs, self._early, self._early_token = legs, early, early_token

    @property
    def models(self) -> frozenset[str]:
        return self._legs.fleet.models

    async def pass_on(self, exchange: Exchange, body: bytes) -> None:
        """A request that one engine answers alone, in whatever form."""
        exchange.route = "passthrough"
        exchange.client.lifetime.on(Event.DECODE)
        await DecodeLeg(self._legs, exchange, None).answer(body, "")

    async def generate(self, exchange: Exchange, ask: openai.Ask) -> None:
        """A completion. Raises RequestError or UpstreamError; if the response had begun the client has been told."""
        legs = self._legs
        if not legs.fleet.ready:
            raise RequestError(503, NOBODY, "service_unavailable")  # before a producer works for nothing
        legs.budget.earn()
        exchange.facts = legs.routing.facts(exchange.endpoint, exchange.headers, ask.body)
        alone = legs.dialect.why_local(exchange.endpoint, ask.body)
        why = self._why_local(exchange, alone)
        legs.labelled("split_decisions_total", why or "pd").inc()
        takeover = self._remembering(exchange, ask, why)
        handover, consumer, early = None, None, None
        try:
            if not why:
                exchange.client.lifetime.on(Event.SPLIT)
                consumer = self._plan_consumer(exchange)
                early = self._send_early(consumer, exchange, ask, takeover.ask_ids)
                handover, why = await PrefillLeg(legs, exchange, ask).handover(consumer)
            over = exchange.first is not None and exchange.first.over
            if early is not None and (why or over):
                await early.drop()  # it waits for what nobody computes, or nobody needs
                early = None
            exchange.route = "local" if why else "pd"
            exchange.client.lifetime.on(Event.DECODE)
            body = self._decode_body(exchange, ask, handover, takeover)
            leg = DecodeLeg(legs, exchange, takeover)
            if over:
                return await leg.say_first_alone()
            # The producer's reply tells of route "pd"; of several prompts the first event does not tell which they are.
            untold = bool(why) and alone != "several-prompts"
            with legs.began.expected(exchange.request_id) if untold else _NOTHING:
                await leg.answer(body, why, consumer, early)
        finally:
            if early is not None:
                await early.drop()
            if isinstance(takeover, OfChoices) and takeover.first is not None:
                legs.labelled("first_tokens_total", takeover.outcome).inc()

    def _why_local(self, exchange: Exchange, alone: str | None) -> str:
        """`alone`: why a consumer has to do it alone, whatever the fleet."""
        legs = self._legs
        producers = legs.fleet.producers()
        if not producers:
            return "no-producer"
        if alone:
            return alone
        exchange.decided = time.perf_counter()
        why, exchange.uncached = legs.routing.worth.decide(exchange.facts, producers, legs.fleet.consumers())
        return why

    def _remembering(self, exchange: Exchange, ask: openai.Ask, why: str) -> Takeover:
        """What is kept of the stream: for another consumer, if there is one, or for the producer's own first token."""
        another = ask.stream and len(self._legs.fleet.consumers()) > 1
        may_begin = self._early_token and not why and ask.stream and exchange.endpoint in openai.CHOICES
        exchange.may_begin = may_begin and self._legs.dialect.may_begin(exchange.endpoint, ask.body)
        takeover = made_takeover(self._legs.dialect, exchange.endpoint, ask.body, another or exchange.may_begin)
        if not another:
            takeover.lives = 0  # nobody is there to go on
        return takeover

    def _plan_consumer(self, exchange: Exchange) -> Instance | None:
        """Who is to decode, where that must be known before the prefill; else it is chosen after it, by newer facts."""
        if not self._early and not any(i.place for i in self._legs.fleet.consumers()):
            return None
        return self._legs.consumer(exchange)

    def _send_early(self, consumer: Instance | None, exchange: Exchange, ask: openai.Ask, ids: bool) -> EarlyLeg | None:
        """The decode leg, sent before the prefill is done, if that is wished and the engine can wait."""
        dialect, deadlines = self._legs.dialect, self._legs.deadlines
        handover = dialect.early_handover(deadlines.prefill) if self._early and consumer is not None else None
        if consumer is None or handover is None:
            return None
        body = dialect.decode_body(exchange.endpoint, ask.body, handover, ids)
        until = asyncio.get_running_loop().time() + deadlines.prefill + deadlines.answer
        return EarlyLeg(consumer, self._legs.open(consumer, exchange, body, until))

    def _decode_body(self, exchange: Exchange, ask: openai.Ask, handover: bytes | None, takeover: Takeover) -> bytes:
        dialect = self._legs.dialect
        if handover is not None:
            takeover.cached = dialect.cached_tokens(handover)
        body = dialect.decode_body(exchange.endpoint, ask.body, handover, takeover.ask_ids)
        takeover.sent, takeover.prompt = body, exchange.prompt_tokens
        return body
