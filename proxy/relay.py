"""The client's end of a request, and the engine's stream passed on to it.

SSE bytes are not changed, and each event leaves as soon as it is whole. Only a piece of an event is held back: if the
engine breaks off in the middle of one, the client still gets a well-formed stream, with an error event as its end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from pdserve.errors import UpstreamError
from pdserve.proxy import openai
from pdserve.proxy.call import Call, Headers
from pdserve.proxy.kept import Foreign
from pdserve.proxy.lifetime import Deadlines, Event, Lifetime, State
from pdserve.proxy.seam import Diverged
from pdserve.proxy.upstream import Answer, LegFailure

EVENT_LIMIT = 8 * 1024 * 1024  # a longer "event" is passed on in pieces rather than kept


class Client:
    """Writes one response. Knows whether it has begun, and counts what a dashboard wants to know of a stream."""

    __slots__ = ("_call", "_deadline", "_last", "arrived", "extra", "last_events", "lifetime", "on_first", "on_gap", "status")

    def __init__(self, call: Call, lifetime: Lifetime, deadlines: Deadlines) -> None:
        self._call = call
        self._deadline = deadlines.send
        self.lifetime = lifetime
        self.arrived = self._last = call.came
        self.status = 0
        self.last_events = b""  # the latest that were written
        self.extra: Headers = []  # headers of ours for the answer
        self.on_first: Callable[[float], None] | None = None
        self.on_gap: Callable[[float], None] | None = None

    @property
    def started(self) -> bool:
        return self.status != 0

    def start(self, status: int, headers: Headers) -> None:
        self.status = status
        self._call.start(status, [*headers, *self.extra])

    def events(self, data: bytes, last: bool = False) -> bool:
        """Writes whole events and notes when they came: the first for TTFT, the gaps between arrivals for ITL.
        False: the client does not keep up, `ready` has to be waited for."""
        now = time.perf_counter()
        state = self.lifetime.state
        if state is State.STREAMING:
            if self.on_gap is not None:
                self.on_gap(now - self._last)
        elif state is State.DECODING:
            self.lifetime.on(Event.FIRST_BYTE)
            if self.on_first is not None:
                self.on_first(now - self.arrived)
        elif state is State.CONTINUING:
            self.lifetime.on(Event.RESUMED)
        self._last = now
        self.last_events = data
        self._call.write(data, last)
        return not self._call.paused

    async def end(self, data: bytes = b"") -> None:
        self._call.write(data, last=True)
        await self.ready()

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete response in one go."""
        self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def ready(self) -> None:
        """Waits while the client does not keep up. Raises ClientStuck."""
        if not self._call.paused:
            return
        try:
            async with asyncio.timeout(self._deadline):
                await self._call.drained()
        except TimeoutError as exc:
            self._call.abort()
            raise ClientStuck(f"the client read nothing for {self._deadline:g} s (--send-timeout)") from exc


class ClientStuck(Exception):
    """The client keeps its connection but does not read."""


class EventCutter:
    """Cuts a byte stream behind its last whole event. Pure. `last`: how the event begins that ends a stream."""

    __slots__ = ("_last", "done", "rest")

    def __init__(self, last: tuple[bytes, ...] = ()) -> None:
        self.rest = b""
        self._last = last
        self.done = False  # the last event passed on was the one that ends a stream: [DONE], or one of `last`

    def feed(self, data: bytes) -> bytes:
        """The whole events so far, unchanged; what follows the last of them is kept for the next call."""
        if self.rest:
            data = self.rest + data
            self.rest = b""
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
            cut = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
            if len(data) - cut > EVENT_LIMIT:
                cut = len(data)
            data, self.rest = data[:cut], data[cut:]
        if data and not self._last:
            self.done = data[-24:].rstrip(b"\r\n").endswith(b"data: [DONE]")
        elif data:
            before = data.rstrip(b"\r\n")
            at = max(before.rfind(b"\n\n") + 2, before.rfind(b"\n\r\n") + 3)
            self.done = before.startswith(self._last, at if at > 3 else 0)
        return data


async def first_events(answer: Answer, cutter: EventCutter, until: float) -> bytes:
    """Waits for the first whole event: until it is here the client can still be given a true status."""
    while True:
        data = await answer.chunk_by(until)
        if not data:
            return b""
        if whole := cutter.feed(data):
            return whole


class Editor(Protocol):
    """What happens to whole events on their way. `error` is the event with which the engine itself gave up; `over` says
    that the answer has ended with them, whatever the engine still says."""

    error: bytes

    @property
    def over(self) -> bool: ...

    def edit(self, data: bytes) -> bytes: ...


async def stream(
    answer: Answer, first: bytes, cutter: EventCutter, client: Client, editor: Editor | None, gap: float
) -> None:
    """Passes the stream on, `first` (whole events) included, to its orderly end. Raises LegFailure if the engine breaks
    off. Without an editor nothing is changed, and no particular last event is waited for.

    Its end is written together with the last events where both are there. What comes from the engine is passed on while
    it is received, without waking this task; it is woken when the client does not keep up, and at the end."""
    ended = False

    def give(whole: bytes, complete: bool) -> bool:
        nonlocal ended
        if editor is not None:
            whole = edited(editor, whole, answer.instance)
        over = editor is not None and editor.over
        ended = over or (complete and (editor is None or (cutter.done and not editor.error)))
        keeps_up = client.events(whole + cutter.rest if ended and not over else whole, ended) if whole or ended else True
        if editor is not None and editor.error:
            raise LegFailure(502, "it gave up in mid-stream", answer.instance, "broken", editor.error)
        return keeps_up and not over

    def take(data: bytes, complete: bool) -> bool:
        whole = cutter.feed(data)
        return give(whole, complete) if whole or complete else True

    keeps_up = give(first, answer.exhausted) if first else True
    while not ended:
        if not keeps_up:
            await client.ready()
        if await answer.passed_to(take, gap):
            break
        keeps_up = False
    if editor is not None and not cutter.done and not editor.over:
        raise LegFailure(502, "it ended the stream early", answer.instance, "broken")
    if not ended:
        await client.end(cutter.rest)
    else:
        await client.ready()


def edited(editor: Editor, data: bytes, instance: str) -> bytes:
    try:
        return editor.edit(data)
    except (Diverged, Foreign) as exc:
        raise LegFailure(502, str(exc) or "its events are not what they should be", instance, "diverged") from exc


async def broken_off(client: Client, endpoint: str, failure: UpstreamError) -> None:
    """Tells a client whose stream has begun that it is over, in the engine's own words if it had any."""
    if failure.body.startswith(b"event: "):
        return await client.end(failure.body)
    if failure.body.startswith(b"data: "):
        return await client.end(failure.body if failure.body.endswith(openai.DONE) else failure.body + openai.DONE)
    await client.end(openai.error_event(endpoint, openai.error_json(failure.status, str(failure)), client.last_events))
