"""What of a prompt is in the cache, and whether to load it: one lookup with a deadline, and a miss when in doubt.

Three things can make a request wait here, each for a bounded time: a producer that is still at it (until its first chunk is
seen; the rest is awaited by the loader, while the engine steps), chunks that come up from a lower tier, and nothing else.
"""

from __future__ import annotations

import time
from typing import Any, Final, Literal

from pdserve import log
from pdserve.chunk import CANONICAL, ChunkLayout
from pdserve.engines.vllm.breakeven import BreakEven, Choice
from pdserve.engines.vllm.tracked import Hit, Tracked, Wait
from pdserve.errors import CacheError
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient

#: a lookup on the way of a request; what is not answered by then is a miss
LOOKUP_S = 0.05
#: fewer tokens than this are computed rather than loaded or stored
MIN_TOKENS = 16
#: a GPU computes this many in the time that a load takes at least: a step more
MIN_LOAD_GPU = 256
#: how old a lookup may be when its request is finally scheduled
FRESH_S = 5.0
#: the prefill leg has ended, its last chunks may still be on their way into the arena: how long to wait for the first
#: sign of them, and for the next chunk after the last one seen
HANDOVER_START_S = 1.5
HANDOVER_STALL_S = 2.0
#: a prefill leg that is under way may itself have to wait for its turn; never longer than this, whatever the request says
EXPECT_MAX_S = 600.0
POLL_S = 0.002
#: chunks are on their way up from a lower tier: how long to wait for the next one after the last, and in all
FETCH_STALL_S = 1.0
FETCH_MAX_S = 30.0
#: the least time that a fetch gets, however fast the engine computes: a first estimate may be far off
FETCH_MIN_S = 0.02

Mode = Literal["adaptive", "always", "never"]
MODES: Final[tuple[Mode, ...]] = ("adaptive", "always", "never")


class Finder:
    """One per engine. `mode`: load by break-even, whatever is found, or only what a producer hands over. `patience`: so many
    times as long as usual does it wait for anything."""

    def __init__(
        self, client: CacheClient, layout: ChunkLayout, breakeven: BreakEven, mode: Mode, patience: float = 1.0
    ) -> None:
        self._client, self._layout, self._breakeven, self._mode = client, layout, breakeven, mode
        self._patience, self.lookup_s = patience, LOOKUP_S * patience
        self._least = MIN_LOAD_GPU if layout.kind == CANONICAL else MIN_TOKENS
        self._log = log.get("connector")
        self.chunk_tokens = 0
        self.busy = False  # whether the last step computed anything
        self.generation = ""  # part of the keys once the engine's cache was reset

    def prefetch(self, tracked: Tracked) -> None:
        """The request may have to wait for its turn: what is in lower tiers comes up meanwhile."""
        if not self.busy or self._mode == "never":
            return
        try:
            self._client.prefetch(self._keys(tracked, 0), self.lookup_s)
        except CacheError as e:
            self._log.debug("not prefetched: %s", e)

    def push(self, tracked: Tracked) -> None:
        """A prefill for a consumer on another host: its chunks go there as they are committed."""
        params = tracked.request.kv_transfer_params or {}
        target = params.get("pdserve.push_to")
        if not isinstance(target, str) or not params.get("do_remote_decode"):
            return
        try:
            self._client.push(target, self._keys(tracked, 0), self.lookup_s)
        except CacheError as e:
            self._log.warning("chunks are not sent ahead to %s: %s request_id=%s", target, e, tracked.request.request_id)

    def matched(self, tracked: Tracked, local: int) -> int | None:
        """Tokens beyond the engine's own `local` ones to be loaded; None: ask again."""
        promised = 0 if tracked.handed_over else self._promised(tracked.request)
        if self._mode == "never" and not promised:
            tracked.choice = Choice(False, "never")
            return 0
        waits = [w for w in (tracked.handover, tracked.fetch) if w is not None and not w.over]
        if any(time.monotonic() - w.polled_at < POLL_S for w in waits):
            return None
        if not promised and tracked.request.num_tokens - local < self._least:
            # The engine has all but a few tokens: they are computed whatever the daemon says, so it is not asked.
            self.release(tracked)
            tracked.fetch, tracked.choice = None, Choice(False, "short")
            return 0
        hit = tracked.hit
        if hit is None or time.monotonic() - hit.at > FRESH_S or hit.first_chunk != local // self.chunk_tokens:
            hit = self._lookup(tracked, local, promised)
        if hit is not None and hit.promised > local:
            return self._take(tracked, hit.reach - local, Choice(True, "handover"))
        if self._handover_missing(tracked, promised, hit.end if hit else 0):
            self.release(tracked)
            return None
        if self._fetch_goes_on(tracked, hit, local):
            self.release(tracked)
            return None
        return self._decide(tracked, hit.end - local if hit else 0)

    def _decide(self, tracked: Tracked, tokens: int) -> int:
        if tokens <= 0:
            self.release(tracked)
            if tracked.choice is not None and tracked.choice.reason != "unavailable":
                tracked.choice = None  # what it was about is gone
            return 0
        if tokens < self._least:
            return self._take(tracked, tokens, Choice(False, "short"))
        if self._mode == "always":
            return self._take(tracked, tokens, Choice(True, "always"))
        # Asked again (no blocks were free), the answer stays what it was.
        return self._take(tracked, tokens, tracked.choice or self._breakeven.choose(tokens))

    def _take(self, tracked: Tracked, tokens: int, choice: Choice) -> int:
        tracked.choice = choice
        if choice.load:
            return tokens
        if tracked.hit is not None:
            tracked.left = (tracked.hit.first_chunk, len(tracked.hit.found))
        self.release(tracked)
        return 0

    # ---- asking the daemon ----

    def _keys(self, tracked: Tracked, first: int) -> list[bytes]:
        tokens = tracked.request.all_token_ids
        keys = tracked.chain.full(tokens)[first:]
        tail = tracked.chain.tail(tokens)
        return keys if tail is None else [*keys, tail]

    def _lookup(self, tracked: Tracked, local: int, promised: int) -> Hit | None:
        self.release(tracked)
        first = local // self.chunk_tokens
        keys = self._keys(tracked, first)
        if not keys:
            return None
        tracked.left = (0, 0)
        try:
            reply = self._client.lookup(keys, self.lookup_s, self._breakeven.prefill_speed())
        except CacheError as e:
            self._log.debug("lookup: %s request_id=%s", e, tracked.request.request_id)
            tracked.fetch, tracked.choice = None, Choice(False, "unavailable", detail=str(e))
            return None
        if tracked.choice is not None and tracked.choice.reason == "unavailable":
            tracked.choice = None
        end = first * self.chunk_tokens + sum(f.tokens for f in reply.found)
        tracked.hit = self._hit(tracked, reply, first, end, promised)
        if tracked.hit is None or tracked.hit.promised <= end:
            self._mind_fetch(tracked, reply, local, end)
        return tracked.hit

    def _hit(self, tracked: Tracked, reply: wire.LookupReply, first: int, end: int, promised: int) -> Hit | None:
        now = time.monotonic()
        coming = reply.pending or reply.loading
        # The first sign of what was promised: the rest is loaded as it comes.
        begun = promised > end and (bool(coming) or end > first * self.chunk_tokens)
        if begun and (tracked.handover is None or not tracked.handover.over):
            stall = self._stall_s(tracked.request)
            return Hit(reply.lease, self._client.daemon_id, first, reply.found, end, now, promised, stall)
        if not reply.found:
            return None
        return Hit(reply.lease, self._client.daemon_id, first, reply.found, end, now)

    def _mind_fetch(self, tracked: Tracked, reply: wire.LookupReply, local: int, end: int) -> None:
        """Chunks on their way up from a lower tier: whether to wait for them, and for how long at most."""
        wait, now = tracked.fetch, time.monotonic()
        if not reply.loading:
            if wait is not None and not wait.over and end > wait.at_first:
                self._breakeven.fetching.add(end - wait.at_first, now - wait.since)
            tracked.fetch = None
        elif wait is None:
            wait = tracked.fetch = Wait(now)
            wait.at_first, wait.longest = end, FETCH_MAX_S
            if self._mode == "adaptive":
                coming = reply.loading * self.chunk_tokens
                tracked.fetch_choice = self._breakeven.choose(end - local + coming, coming)
                wait.over = not tracked.fetch_choice.load
                patience = self._breakeven.patience(coming)
                if patience is not None:
                    wait.longest = min(FETCH_MAX_S, max(FETCH_MIN_S, patience))

    # ---- waiting ----

    def _promised(self, request: Any) -> int:
        """How much of this prompt a producer says it has stored, or is computing at present."""
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill") or params.get("pdserve.generation", "") != self.generation:
            return 0
        length = request.num_prompt_tokens
        if self._expect_s(request):
            rest = length % self.chunk_tokens
            return int(length - (rest if rest < MIN_TOKENS else 0))
        count = params.get("pdserve.num_tokens")
        return min(count, length) if isinstance(count, int) else 0

    @staticmethod
    def _expect_s(request: Any) -> float:
        """How long a producer that has not answered yet may take: this request was sent on before the prefill ended."""
        seconds = (request.kv_transfer_params or {}).get("pdserve.expect_s")
        return min(float(seconds), EXPECT_MAX_S) if isinstance(seconds, int | float) and seconds > 0 else 0.0

    def _stall_s(self, request: Any) -> float:
        return max(HANDOVER_STALL_S * self._patience, self._expect_s(request))

    def _handover_missing(self, tracked: Tracked, promised: int, seen: int) -> bool:
        """True while nothing of what a producer has promised is to be seen, and it may still come."""
        if seen >= promised:
            return False
        wait = tracked.handover = tracked.handover or Wait(time.monotonic())
        stall = max(HANDOVER_START_S * self._patience, self._expect_s(tracked.request))
        return self._ask_again(tracked, wait, seen, "handover not begun", stall)

    def _fetch_goes_on(self, tracked: Tracked, hit: Hit | None, local: int) -> bool:
        """True while chunks are on their way up from a lower tier and arrive steadily."""
        if tracked.fetch is None or tracked.fetch.over:
            return False
        seen, stall = hit.end if hit else local, FETCH_STALL_S * self._patience
        return self._ask_again(tracked, tracked.fetch, seen, "lower tier too slow", stall)

    def _ask_again(self, tracked: Tracked, wait: Wait, seen: int, trouble: str, stall: float) -> bool:
        if wait.over:
            return False
        now = time.monotonic()
        if not self._client.connected or not wait.goes_on(seen, now, stall):
            wait.over = True
            missing = tracked.request.num_tokens - seen
            self._log.warning(
                "%s after %.1f s: %d tokens are computed here request_id=%s",
                trouble,
                now - wait.since,
                missing,
                tracked.request.request_id,
            )
            return False
        if not self.busy:
            time.sleep(POLL_S)  # nothing else runs: leave the core to whoever brings the chunks
        wait.polled_at = time.monotonic()
        return True

    # ---- leases ----

    def release(self, tracked: Tracked) -> None:
        if tracked.hit is not None:
            hit, tracked.hit = tracked.hit, None
            self.give_back(hit)

    def give_back(self, hit: Hit, chunks: int = 0, nbytes: int = 0, corrupt: list[bytes] | None = None) -> None:
        """Ends the lease, and says what was read under it. Nobody waits for the answer: a request that has been loaded is
        about to run."""
        if hit.daemon_id != self._client.daemon_id:
            return  # that daemon is gone, and the lease with it
        if not hit.lease and not corrupt:
            return
        try:
            self._client.release_soon(hit.lease, chunks, nbytes, corrupt)
        except CacheError as e:
            self._log.debug("lease not released, it ends by itself: %s", e)
