"""How much of the latest prompts is in memory, told as it changes: for proxies that route by where a prompt's chunks are.

Each change is an event with a number: "of request R's prompt the first N tokens are here". Events lie in one ring for all
listeners; each has its own place in it. Who has fallen behind the ring, or comes from another life of this daemon, is
told everything anew ("all") instead of what it missed.

Of a prompt's chunks only the last that is here and the first that is not are watched: chunks come and go at that place,
since none is evicted before those that build on it. What a person drops, or what was found corrupt, may lie anywhere;
then all prompts are looked through from their beginnings, once, before anything more is told.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable

import msgspec

MOST_PROMPTS = 1024
MOST_KEYS = 65_536  # of all prompts together
MOST_EVENTS = 8192
MOST_LISTENERS = 256
#: an empty comment when nothing was told for so long, so that either end notices when the other is gone
STILL_THERE_S = 5.0
#: what changes within so long is told as one change: a long prompt's chunks are committed one by one
GATHER_S = 0.05
AT_ONCE = 256  # events in one piece


class Change(msgspec.Struct, frozen=True):
    seq: int
    request: str
    tokens: int
    of: int


class All(msgspec.Struct, frozen=True):
    """Everything, as of number `seq`. Another `daemon_id` is another life."""

    daemon_id: str
    seq: int
    held: dict[str, tuple[int, int]]


class _Prompt:
    __slots__ = ("chunk_tokens", "count", "keys", "of", "request", "told")

    def __init__(self, request: str, keys: list[bytes], chunk_tokens: int, of: int) -> None:
        self.request, self.keys, self.chunk_tokens, self.of = request, keys, chunk_tokens, of
        self.count = 0  # chunks that are here, from the first on
        self.told = -1

    @property
    def tokens(self) -> int:
        return min(self.count * self.chunk_tokens, self.of)

    def watched(self) -> list[bytes]:
        return self.keys[max(self.count - 1, 0) : self.count + 1]


class Held:
    """The daemon's loop owns it. `there` says whether a chunk can be hit now."""

    def __init__(self, daemon_id: str, there: Callable[[bytes], bool]) -> None:
        self.daemon_id, self._there = daemon_id, there
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()
        self._watching: dict[bytes, dict[str, _Prompt]] = {}
        self._changed: dict[str, _Prompt] = {}
        self._keys = 0
        self._ring: deque[Change] = deque(maxlen=MOST_EVENTS)
        self.seq = 0
        self._listeners: set[asyncio.Event] = set()
        self._closed = self._stale = False

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def full(self) -> bool:
        return len(self._listeners) >= MOST_LISTENERS

    # What happens.

    def asked(self, request: str, keys: list[bytes], chunk_tokens: int, tokens: int) -> None:
        """A prompt of that request was seen; of several the last counts."""
        self._forget(request)
        prompt = self._prompts[request] = _Prompt(request, keys, chunk_tokens, tokens)
        self._keys += len(keys)
        self._look(prompt, 0)
        while len(self._prompts) > MOST_PROMPTS or (self._keys > MOST_KEYS and len(self._prompts) > 1):
            self._forget(next(iter(self._prompts)))

    def came(self, key: bytes) -> None:
        for prompt in list(self._watching.get(key, {}).values()):
            self._unwatch(prompt)
            self._look(prompt, prompt.count)

    def went(self, key: bytes, in_turn: bool) -> None:
        """`in_turn`: nothing that is here builds on this chunk."""
        if not in_turn:
            self._stale = True
            self._wake()
            return
        for prompt in list(self._watching.get(key, {}).values()):
            self._unwatch(prompt)
            self._look(prompt, max(prompt.count - 1, 0))

    def _look_through(self) -> None:
        self._stale = False
        for prompt in self._prompts.values():
            self._unwatch(prompt)
            self._look(prompt, 0)

    def _look(self, prompt: _Prompt, start: int) -> None:
        """Counts from `start` on, watches the place that it comes to, tells what is new."""
        prompt.count = start
        while prompt.count < len(prompt.keys) and self._there(prompt.keys[prompt.count]):
            prompt.count += 1
        for key in prompt.watched():
            self._watching.setdefault(key, {})[prompt.request] = prompt
        if prompt.tokens != prompt.told:
            self._changed[prompt.request] = prompt
            self._wake()

    def _number(self) -> None:
        """Makes events of what has changed since the last time."""
        if self._stale:
            self._look_through()
        for prompt in self._changed.values():
            if prompt.tokens != prompt.told:
                prompt.told = prompt.tokens
                self.seq += 1
                self._ring.append(Change(self.seq, prompt.request, prompt.tokens, prompt.of))
        self._changed.clear()

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.set()

    def _unwatch(self, prompt: _Prompt) -> None:
        for key in prompt.watched():
            if (watching := self._watching.get(key)) is not None:
                watching.pop(prompt.request, None)
                if not watching:
                    del self._watching[key]

    def _forget(self, request: str) -> None:
        if (prompt := self._prompts.pop(request, None)) is not None:
            self._unwatch(prompt)
            self._changed.pop(request, None)
            self._keys -= len(prompt.keys)

    # What is told.

    def since(self, seq: int) -> list[Change] | None:
        """Some of what came after number `seq`, the oldest first; None if part of it is no longer known."""
        self._number()
        if seq > self.seq or (seq < self.seq and self._ring[0].seq > seq + 1):
            return None
        return list(itertools.islice(self._ring, max(0, len(self._ring) - (self.seq - seq)), None))[:AT_ONCE]

    def all(self) -> All:
        self._number()
        return All(self.daemon_id, self.seq, {name: (prompt.tokens, prompt.of) for name, prompt in self._prompts.items()})

    async def stream(self, life: str, seq: int) -> AsyncIterator[bytes]:
        """Server-sent events to a listener that knows all up to number `seq` of that life, until close()."""
        something = asyncio.Event()
        self._listeners.add(something)
        try:
            at: int | None = seq if life == self.daemon_id else None  # since() sees to a number that never was
            yield b":\n\n"
            while not self._closed:
                changes = self.since(at) if at is not None else None
                if changes is None:
                    everything = self.all()
                    at = everything.seq
                    yield _event(b"all", everything)
                elif changes:
                    at = changes[-1].seq
                    yield b"".join(_event(b"held", change) for change in changes)
                else:
                    something.clear()
                    try:
                        async with asyncio.timeout(STILL_THERE_S):
                            await something.wait()
                    except TimeoutError:
                        yield b":\n\n"
                    else:
                        await asyncio.sleep(GATHER_S)
        finally:
            self._listeners.discard(something)

    def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        self._wake()


def _event(kind: bytes, what: Change | All) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (what.seq, kind, msgspec.json.encode(what))
