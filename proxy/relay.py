"""The client's end of a request, and the engine's stream passed on to it.

SSE bytes are not changed, and each event leaves as soon as it is whole. Only a piece of an event is held back: if the
engine breaks off in the middle of one, the client still gets a well-formed stream, with an error event as its end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from pdserve.errors import UpstreamError
from pdserve.proxy import openai
from pdserve.proxy.given import Foreign
from pdserve.proxy.lifetime import Deadlines, Event, Lifetime, State
from pdserve.proxy.seam import Diverged
from pdserve.proxy.upstream import Answer, LegFailure

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
EVENT_LIMIT = 8 * 1024 * 1024  # a longer "event" is passed on in pieces rather than kept


class Client:
    """Writes one response. Knows whether it has begun, and counts what a dashboard wants to know of a stream."""

    __slots__ = ("_deadline", "_last", "_send", "arrived", "ended", "extra", "lifetime", "on_first", "on_gap", "status")

    def __init__(self, send: Send, lifetime: Lifetime, deadlines: Deadlines) -> None:
        self._send = send
        self._deadline = deadlines.send
        self.lifetime = lifetime
        self.arrived = self._last = time.perf_counter()
        self.status = 0
        self.ended = False
        self.extra: list[tuple[bytes, bytes]] = []  # headers of ours for the answer
        self.on_first: Callable[[float], None] | None = None
        self.on_gap: Callable[[float], None] | None = None

    @property
    def started(self) -> bool:
        return self.status != 0

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._out({"type": "http.response.start", "status": status, "headers": headers + self.extra})

    async def write(self, data: bytes) -> None:
        await self._out({"type": "http.response.body", "body": data, "more_body": True})

    async def events(self, data: bytes) -> None:
        """Writes whole events and notes when they came: the first for TTFT, the gaps between arrivals for ITL."""
        now = time.perf_counter()
        if self.lifetime.state is State.DECODING:
            self.lifetime.on(Event.FIRST_BYTE)
            if self.on_first is not None:
                self.on_first(now - self.arrived)
        elif self.lifetime.state is State.CONTINUING:
            self.lifetime.on(Event.RESUMED)
        elif self.on_gap is not None:
            self.on_gap(now - self._last)
        self._last = now
        await self.write(data)

    async def end(self, data: bytes = b"") -> None:
        self.ended = True
        await self._out({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """A complete response in one go."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [*headers, length])
        await self.end(body)

    async def _out(self, message: MutableMapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                await self._send(message)
        except TimeoutError as exc:
            raise ClientStuck(f"the client read nothing for {self._deadline:g} s") from exc


class ClientStuck(Exception):
    """The client keeps its connection but does not read."""


class EventCutter:
    """Cuts a byte stream behind its last whole event. Pure."""

    __slots__ = ("done", "rest")

    def __init__(self) -> None:
        self.rest = b""
        self.done = False  # the last event passed on was [DONE]

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
        if data:
            self.done = data[-24:].rstrip(b"\r\n").endswith(b"data: [DONE]")
        return data


async def first_events(answer: Answer, cutter: EventCutter, wait: float) -> bytes:
    """Waits for the first whole event: until it is here the client can still be given a true status."""
    while True:
        data = await answer.chunk(wait)
        if not data:
            return cutter.rest
        if whole := cutter.feed(data):
            return whole


class Editor(Protocol):
    """What happens to whole events on their way. `error` is the event with which the engine itself gave up."""

    error: bytes

    def edit(self, data: bytes) -> bytes: ...


async def stream(
    answer: Answer, first: bytes, cutter: EventCutter, client: Client, editor: Editor | None, gap: float
) -> None:
    """Passes the stream on, `first` included, to its orderly end. Raises LegFailure if the engine breaks off.
    Without an editor nothing is changed, and [DONE] is not waited for."""
    data = first
    while True:
        whole = data if data is first else cutter.feed(data)
        if whole and editor is not None:
            whole = edited(editor, whole, answer.instance)
        if whole:
            await client.events(whole)
        if editor is not None and editor.error:
            raise LegFailure(502, "it gave up in mid-stream", answer.instance, "broken", editor.error)
        if not (data := await answer.chunk(gap)):
            break
    if editor is not None and not cutter.done:
        raise LegFailure(502, "it ended the stream early", answer.instance, "broken")
    await client.end(cutter.rest)


def edited(editor: Editor, data: bytes, instance: str) -> bytes:
    try:
        return editor.edit(data)
    except (Diverged, Foreign) as exc:
        raise LegFailure(502, str(exc) or "its events are not what they should be", instance, "diverged") from exc


async def broken_off(client: Client, endpoint: str, failure: UpstreamError) -> None:
    """Tells a client whose stream has begun that it is over, in the engine's own words if it had any."""
    if failure.body.startswith(b"data: "):
        await client.end(failure.body if failure.body.endswith(openai.DONE) else failure.body + openai.DONE)
        return
    await client.end(openai.error_event(endpoint, openai.error_json(failure.status, str(failure))))
