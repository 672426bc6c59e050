"""An engine without a model: speaks vLLM's OpenAI surface over HTTP, for tests, dry runs and the proxy's benchmark.

Tokens are words and the answer is a function of the prompt, so two engines asked the same give the same text. It
refuses what vLLM refuses and a careless proxy would send (`min_tokens` above the limit, `stream_options` without
streaming, a prompt that is too long). It remembers every request, and whether its client left before the end. Faults
are made on demand. It parses HTTP itself, because a fault may be anything but HTTP.

    python -m pdserve.engines.fake.server --port 18100 --gap 0.01
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

from pdserve.engines.fake import apis, exposed
from pdserve.engines.fake.answers import Job, Refusal, ids_of, said

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request.

    kind  status   answers `status` with an OpenAI error
          plain    answers `status` with plain text
          detail   answers `status` with JSON that is not OpenAI's
          bare     answers `status` with a word for an error, as vLLM does to a wrong key
          reset    breaks the connection without an answer
          cut      breaks the connection after `after` events (streamed) or half the body
          early    ends the stream in order after `after` events, without [DONE]
          torn     as cut, but in the middle of an event
          garbage  sends bytes that are not HTTP
          rubbish  answers 200 with a body that is not JSON
          stall    says nothing for ever
          confess  sends head and `after` events, then an error event, as vLLM does when its core has died
          mute     sends head and `after` events, then nothing for ever
    """

    kind: str
    status: int = 500
    after: int = 1


@dataclass(eq=False)
class Seen:
    """A request that came in, and how it ended: finished, or aborted by its client, or neither yet."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    finished: bool = False
    aborted: bool = False

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def is_prefill(self) -> bool:
        return b'"do_remote_decode":true' in self.raw


@dataclass(eq=False)
class FakeEngine:
    """Start it with `async with FakeEngine() as engine`; its address is `engine.url`."""

    model: str = "fake"
    name: str = "fake"
    port: int = 0
    host: str = "127.0.0.1"
    delay: float = 0.0  # before the first token
    gap: float = 0.0  # between tokens
    max_tokens: int = 8  # when the request does not say
    max_model_len: int = 4096
    others: int = 0  # requests that it says it has beside those it has
    miscounts: int = 0  # tokens of a chat that it tells too many
    shift: int = 0  # makes it answer differently from its equals
    luck: int = 0  # makes it begin another answer than its equals, as chance does; gone on from a token, all say the same
    halves: bool = False  # two tokens are one character: the first of them has no text
    created: int = 1  # the time that its answers carry
    hands_over: bool = True
    tells_first: bool = True  # its handover says which the first token is
    facts: dict[str, Any] | None = None  # where the prompt came from, as facts.py's handed() has it
    cached_tokens: int = 0  # what a producer says that it had cached
    healthy: bool = True
    faults: deque[Fault | None] = field(default_factory=deque)  # one for each coming POST; None lets it be
    always: Fault | None = None
    seen: list[Seen] = field(default_factory=list)
    keep: int = 10_000
    born: float = field(default_factory=time.time)
    tokens: Counter[str] = field(default_factory=Counter)  # prompt, loaded, generated
    leases: int = 0  # handovers that are being read: taken with a decode leg, given back when it ends in whatever way
    connections: set[_Connection] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self.host, self.port, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stops listening and breaks every connection, as a killed process does."""
        assert self._server is not None
        self._server.close()
        if not self.connections:
            self._empty.set()
        for connection in list(self.connections):
            connection.cut()
        await self._server.wait_closed()
        await self._empty.wait()

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def running(self) -> int:
        """Requests being worked on."""
        return sum(1 for c in self.connections if c.task is not None and not c.task.done())

    def connected(self, connection: _Connection) -> None:
        self.connections.add(connection)
        self._empty.clear()

    def disconnected(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def pop_fault(self) -> Fault | None:
        return self.faults.popleft() if self.faults else self.always

    def says(self, token: int) -> str:
        """The text of a token that was generated."""
        return said(token, self.shift)

    def piece(self, token: int, behind_prompt: bool) -> str:
        """What the stream gives of it. Behind a prompt that ends within a character vLLM 0.32 gives the prompt, too."""
        text = said(token, self.shift)
        if not self.halves:
            return text
        return "" if token % 2 == 0 else "the prompt!" * behind_prompt + said(token - 1, self.shift) + text

    def all_said(self, tokens: list[int]) -> str:
        text = "".join(map(self.says, tokens))
        return text + "\ufffd" if self.halves and tokens[-1] % 2 == 0 else text

    def note(self, seen: Seen) -> None:
        if len(self.seen) < self.keep:
            self.seen.append(seen)

    # What the engine answers.

    async def answer(self, seen: Seen, out: _Connection) -> None:
        if seen.method == "GET":
            return self._page(seen, out)
        fault = self.pop_fault()
        if fault is not None and await self._faulty(fault, out):
            return
        try:
            self._check_json(seen)
            if seen.path in ("/v1/completions", "/v1/chat/completions") or seen.path in (apis.RESPONSES, apis.MESSAGES):
                await self._generate(seen, out, fault)
            elif seen.path == "/v1/messages/count_tokens" or (seen.path == "/tokenize" and "messages" in seen.body):
                out.whole(200, apis.counted(seen.body, self.miscounts))
            elif seen.path == "/tokenize" and "add_special_tokens" in seen.body:
                out.whole(200, {"tokens": ids_of(seen.body["prompt"].split(), self.shift)})
            elif seen.path == "/detokenize" and "tokens" in seen.body:
                out.whole(200, {"prompt": self.all_said(seen.body["tokens"])})
            elif seen.path in ("/v1/embeddings", "/tokenize", "/detokenize"):
                await self._echo(seen, out)
            else:
                raise Refusal(404, f"no {seen.path} here", "NotFoundError")
        except Refusal as refusal:
            out.whole(refusal.status, refusal.body)

    def _page(self, seen: Seen, out: _Connection) -> None:
        if seen.path in ("/health", "/ping"):
            out.whole(200 if self.healthy else 503, None)
        elif seen.path == "/v1/models":
            card = {"id": self.model, "object": "model", "owned_by": "pdserve", "max_model_len": self.max_model_len}
            out.whole(200, {"object": "list", "data": [card]})
        elif seen.path == "/metrics":
            out.raw_whole(200, exposed.page(self).encode(), "text/plain")
        elif seen.path == "/version":
            out.whole(200, {"version": "0.0.0+fake"})
        else:
            out.whole(404, Refusal(404, f"no {seen.path} here", "NotFoundError").body)

    async def _faulty(self, fault: Fault, out: _Connection) -> bool:
        """Makes the faults that replace the answer; the others are made while generating."""
        if fault.kind == "status":
            out.whole(fault.status, Refusal(fault.status, "made to fail", "InternalServerError").body)
        elif fault.kind == "plain":
            out.raw_whole(fault.status, b"Internal Server Error", "text/plain")
        elif fault.kind == "detail":
            out.whole(fault.status, {"detail": "Not Found"})
        elif fault.kind == "bare":
            out.whole(fault.status, {"error": "Unauthorized"})
        elif fault.kind == "reset":
            out.cut()
        elif fault.kind == "garbage":
            out.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        elif fault.kind == "rubbish":
            out.raw_whole(200, b"{not json", "application/json")
        elif fault.kind == "stall":
            await asyncio.Event().wait()
        else:
            return False
        return True

    def _check_json(self, seen: Seen) -> None:
        try:
            if not isinstance(json.loads(seen.raw), dict):
                raise Refusal(400, "the body is not an object")
        except ValueError as exc:
            raise Refusal(400, f"the body is not JSON: {exc}") from exc

    async def _echo(self, seen: Seen, out: _Connection) -> None:
        if not seen.body.get("stream"):
            out.whole(200, {"path": seen.path, "got": seen.body})
            return
        out.head(200, "text/event-stream; charset=utf-8", None)
        for n in range(3):
            out.chunk(b'event: piece\ndata: {"n": %d}\n\n' % n)
            await asyncio.sleep(self.gap)
        out.chunk(b"")

    async def _generate(self, seen: Seen, out: _Connection, fault: Fault | None) -> None:
        other = seen.path if seen.path in (apis.RESPONSES, apis.MESSAGES) else ""
        job = Job(self, apis.as_chat(other, seen.body, seen.request_id) if other else seen)
        loaded = job.usage()["prompt_tokens_details"]["cached_tokens"]
        self.tokens.update(prompt=job.prompt_tokens, loaded=loaded)
        reads = bool(job.params.get("do_remote_prefill"))
        self.leases += reads
        try:
            await self._answer(job, other, out, fault)
        finally:
            self.leases -= reads

    async def _answer(self, job: Job, other: str, out: _Connection, fault: Fault | None) -> None:
        """`other`: the endpoint, if it is none of OpenAI's completions."""
        if self.delay:
            await asyncio.sleep(self.delay)
        if job.stream:
            await self._stream(apis.events(other, job) if other else job.events(), out, fault)
            return
        if self.gap:
            await asyncio.sleep(self.gap * job.tokens)
        reply = apis.whole(other, job.reply()) if other else job.reply()
        if fault is not None and fault.kind in ("cut", "torn"):
            raw = json.dumps(reply).encode()
            out.head(200, "application/json", len(raw))
            out.write(raw[: len(raw) // 2])
            out.cut()
            return
        out.whole(200, reply)

    async def _stream(self, events: AsyncIterator[bytes], out: _Connection, fault: Fault | None) -> None:
        out.head(200, "text/event-stream; charset=utf-8", None)
        sent = 0
        async for event in events:
            if fault is not None and sent >= fault.after:
                if fault.kind == "torn":
                    out.chunk(event[: len(event) // 2])
                if fault.kind in ("cut", "torn"):
                    await asyncio.sleep(0.01)  # lets what was written leave before the connection is reset
                    out.cut()
                if fault.kind == "confess":
                    said = Refusal(500, "made to fail").body
                    typed = event.startswith(b"event:")
                    out.chunk(apis.event("error", error=said["error"]) if typed else b"data: " + json.dumps(said).encode() + b"\n\n")
                    out.chunk(b"" if typed else b"data: [DONE]\n\n")
                if fault.kind == "mute":
                    await asyncio.Event().wait()
                break
            out.chunk(event)
            sent += 1
        out.chunk(b"")


class _Connection(asyncio.Protocol):
    """One client's connection: parses requests, runs one task each, notices when the client leaves."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport
        self._seen: Seen | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", bytearray()
        self._headers: dict[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        self.engine.connected(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.cut()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0].decode("latin-1")
        seen = Seen(self._parser.get_method().decode(), path, dict(self._headers), bytes(self._body))
        self._url, self._headers, self._body = b"", {}, bytearray()
        if path not in ("/health", "/v1/models", "/metrics", "/version"):
            self.engine.note(seen)
        self._seen = seen
        self.task = asyncio.get_running_loop().create_task(self._run(seen))

    async def _run(self, seen: Seen) -> None:
        await self.engine.answer(seen, self)
        seen.finished = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.engine.disconnected(self)
        if self.task is not None and not self.task.done():
            assert self._seen is not None
            self._seen.aborted = True
            self.task.cancel()
        self.task, self._parser = None, cast(Any, None)  # both hold this connection: circles

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def head(self, status: int, content_type: str, length: int | None) -> None:
        size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        reason = _REASONS.get(status, "Status")
        lines = (f"HTTP/1.1 {status} {reason}", "server: fake", f"content-type: {content_type}", size, "", "")
        self.write("\r\n".join(lines).encode())

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def raw_whole(self, status: int, body: bytes, content_type: str) -> None:
        self.head(status, content_type, len(body))
        self.write(body)

    def whole(self, status: int, body: dict[str, Any] | None) -> None:
        self.raw_whole(status, b"" if body is None else json.dumps(body).encode(), "application/json")

    def cut(self) -> None:
        self.transport.abort()


async def _serve(engine: FakeEngine) -> None:
    async with engine:
        print(f"fake engine {engine.model} on {engine.url}", flush=True)
        await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(description="An engine without a model that speaks OpenAI.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before the first token")
    parser.add_argument("--gap", type=float, default=0.0, help="seconds between tokens")
    parser.add_argument("--max-model-len", type=int, default=1 << 20)
    parser.add_argument("--fault", default="", help="kind of fault for every request (see Fault)")
    args = parser.parse_args()
    engine = FakeEngine(args.model, host=args.host, port=args.port, delay=args.delay, gap=args.gap, keep=0)
    engine.max_model_len = args.max_model_len
    engine.always = Fault(args.fault) if args.fault else None
    with contextlib.suppress(KeyboardInterrupt):
        import uvloop

        uvloop.run(_serve(engine))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
