"""Gives out what is on the board.

GET /admin/overview    the latest picture and the samples of the last hour, in one JSON object
GET /admin/events      server-sent events: `picture`, whenever there is a new one
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pdserve.errors import RequestError
from pdserve.proxy import openai
from pdserve.proxy.access import Access
from pdserve.proxy.dashboard.board import Board

MOST_WATCHERS = 64
SEND_WITHIN = 10.0
FIRST_WITHIN = 5.0
_EVERY = 0.25
_STILL_THERE = 5.0  # a comment is sent when nothing else was for so long, so that a dead connection is noticed
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"),
]  # fmt: skip


class Feed:
    def __init__(self, board: Board, access: Access) -> None:
        self._board, self._access = board, access
        self._closing = asyncio.Event()
        self.watchers = 0

    def close(self) -> None:
        """Ends every stream: pages connect again, to the worker that comes next."""
        self._closing.set()

    async def overview(self, request: Request) -> Response:
        try:
            self._access.look(request.headers, request.client.host if request.client else "")
            self._board.watch()
            picture = await self._first()
        except RequestError as error:
            return refusal(error)
        body = b'{"picture":%b,"samples":[%b]}' % (picture, b",".join(self._board.samples()))
        headers = {"cache-control": "no-store"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers, media_type="application/json")

    async def _first(self) -> bytes:
        """The picture; the first one is waited for."""
        try:
            async with asyncio.timeout(FIRST_WITHIN):
                while not (picture := self._board.picture()):  # noqa: ASYNC110 - may be written by another process
                    await asyncio.sleep(_EVERY)
                return picture
        except TimeoutError as exc:
            raise RequestError(503, "Nothing has been looked at yet; try again.", "service_unavailable") from exc

    async def events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI endpoint of its own: every send has a deadline, and a watcher that leaves is noticed at once."""
        request = Request(scope, receive, send)
        try:
            self._access.look(request.headers, request.client.host if request.client else "")
            if self.watchers >= MOST_WATCHERS:
                raise RequestError(503, f"{MOST_WATCHERS} pages are open already.", "service_unavailable")
        except RequestError as error:
            return await refusal(error)(scope, receive, send)
        self.watchers += 1
        gone = asyncio.create_task(_gone(receive), name="dashboard watcher")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._stream(_within(send), lambda: gone.done() or self._closing.is_set())
        except TimeoutError:
            return  # it does not read; without an end of ours the server closes the connection
        finally:
            self.watchers -= 1
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _stream(self, write: Callable[..., object], over: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        sent, last = b"", loop.time()
        while not over():
            self._board.watch()
            picture = self._board.picture()
            if picture and picture != sent:
                sent, last = picture, loop.time()
                await write(b"event: picture\ndata: %b\n\n" % picture)  # type: ignore[misc]
            elif loop.time() - last > _STILL_THERE:
                last = loop.time()
                await write(b": nothing new\n\n")  # type: ignore[misc]
            await asyncio.sleep(_EVERY)
        await write(b"", more=False)  # type: ignore[misc]


def refusal(error: RequestError) -> Response:
    return Response(openai.request_error(error), error.status, media_type="application/json")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _within(send: Send) -> Callable[..., object]:
    async def write(data: bytes, more: bool = True) -> None:
        async with asyncio.timeout(SEND_WITHIN):
            await send({"type": "http.response.body", "body": data, "more_body": more})

    return write
