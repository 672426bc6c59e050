"""What the connector tells the cache daemon of each request, for whoever asks later why it went as it did.

Nothing in the engine waits for it, and nothing that goes wrong in it reaches the engine: calls put a small object into a
bounded queue; a thread makes marks and messages of them, on a connection of its own. What does not fit is counted as lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pdserve import log, marks
from pdserve.chunk import root_key, tenant_tag
from pdserve.engines.vllm.cores import any_core
from pdserve.errors import ProtocolError
from pdserve.transfer import telling, wire

MOST_WAITING = 4096
EVERY_S = 0.1
SEND_S = 1.0
#: facts in one message; a long prompt's may have a quarter of a megabyte
_TOGETHER = 24
#: how long nothing is tried after the daemon could not be reached
REST_S = 1.0
_TOKENS_KEPT = telling.MOST_MARKS
_F = TypeVar("_F", bound=Callable[..., Any])


def _harmless(call: _F) -> _F:
    """A failure in here costs a fact, never more; it is logged once."""

    @functools.wraps(call)
    def fenced(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except Exception:  # noqa: BLE001 - the border to the engine
            if not self.failed:
                self.failed = True
                log.get("facts").exception("%s failed; its facts are missing from here on", call.__name__)
            return None

    return fenced  # type: ignore[return-value]


class Teller:
    """A queue, a thread and a connection. `instance` is how the daemon knows whose facts these are."""

    def __init__(self, path: str, instance: str) -> None:
        self._path, self._name = path, f"{instance}/facts"
        self._queue: queue.Queue[Callable[[int], telling.Span | telling.Leg | telling.Ended] | None]
        self._queue = queue.Queue(MOST_WAITING)
        self._first: deque[telling.Began] = deque()
        self._closing, self._hurry = threading.Event(), threading.Event()
        self._lost = 0
        self._seed = 0
        self._socket: socket.socket | None = None
        self._not_before = 0.0
        self._warned = False
        self._log = log.get("facts")
        self._thread = threading.Thread(target=self._run, name="pdserve-facts", daemon=True)
        self._thread.start()

    def put(self, make: Callable[[int], telling.Span | telling.Leg | telling.Ended]) -> None:
        """`make(seed of marks)` is called on the thread."""
        try:
            self._queue.put_nowait(make)
        except queue.Full:
            self._lost += 1

    def put_first(self, began: telling.Began) -> None:
        """Sent before anything else and without delay; something is put() right after it."""
        if len(self._first) < MOST_WAITING:
            self._first.append(began)
            self._hurry.set()
        else:
            self._lost += 1

    def close(self) -> None:
        self._closing.set()
        self._hurry.set()
        with contextlib.suppress(queue.Full):  # full, it needs no waking
            self._queue.put_nowait(None)
        self._thread.join(timeout=2 * SEND_S)

    # ---- the thread ----

    def _run(self) -> None:
        any_core()
        while (make := self._queue.get()) is not None:
            self._collect(time.monotonic() + EVERY_S)
            batch = [make]
            while len(batch) < _TOGETHER:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is not None:
                    batch.append(following)
            self._send(batch)
            if self._closing.is_set() and self._queue.empty():
                break
        self._disconnect()

    def _collect(self, until: float) -> None:
        """What comes until then goes along; what may not wait is sent meanwhile."""
        while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
            if self._hurry.wait(left):
                self._hurry.clear()
                self._send([])

    def _send(self, batch: list[Callable[[int], Any]]) -> None:
        try:
            there = self._connected()
            self._send_first(there)
            items = []
            for make in batch:
                if (made := self._made(make)) is not None:
                    items.append(made)
                self._send_first(there)  # making the marks of a long prompt takes milliseconds
            if items:
                lost, self._lost = self._lost, 0
                there.sendall(wire.encode(telling.Facts(items, lost)))
        except (OSError, ProtocolError) as e:
            self._lost += len(batch) + len(self._first)
            self._first.clear()
            self._disconnect()
            self._not_before = time.monotonic() + REST_S
            self._log.debug("not told: %s", e)

    def _send_first(self, there: socket.socket) -> None:
        while self._first:
            together = min(len(self._first), _TOGETHER)
            there.sendall(wire.encode(telling.Facts([self._first.popleft() for _ in range(together)])))

    def _made(self, make: Callable[[int], Any]) -> Any:
        try:
            return make(self._seed)
        except Exception:  # noqa: BLE001 - a fact that cannot be made is lost
            self._lost += 1
            if not self._warned:
                self._warned = True
                self._log.exception("a fact could not be made; more of its kind may be missing")
            return None

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        if time.monotonic() < self._not_before:
            raise ConnectionError("the daemon was not there a moment ago")
        there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            there.settimeout(SEND_S)
            there.connect(self._path)
            there.sendall(wire.encode(wire.Hello(wire.VERSION, self._name, os.getpid())))
            reader, frames = wire.FrameReader(), list[bytes]()
            while not frames:
                if not (data := there.recv(65536)):
                    raise ConnectionError("the daemon closed the connection")
                frames = reader.feed(data)
            welcome = wire.decode_reply(frames[0])
            if not isinstance(welcome, wire.Welcome):
                raise ProtocolError(f"the daemon greeted with a {type(welcome).__name__}")
        except BaseException:
            there.close()
            raise
        self._socket, self._seed = there, marks.seed(welcome.daemon_id)
        return there

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Nobody:
    """A teller that tells nobody."""

    def put(self, make: Callable[[int], Any]) -> None:
        pass

    def put_first(self, began: telling.Began) -> None:
        pass

    def close(self) -> None:
        pass


class LegFacts:
    """The scheduler's half: one leg told when its prompt begins to be computed, and when it ends."""

    def __init__(self, teller: Teller | Nobody, fingerprint: str, layout: Any, saved: Callable[[int, float], float | None]) -> None:
        self._teller, self._saved = teller, saved
        self._base = root_key(fingerprint, layout)[:16]
        self._decided: dict[str, dict[str, Any]] = {}
        self.failed = False

    @_harmless
    def decided(self, tracked: Any, hit: Any, external: int) -> None:
        """The engine has given the request its blocks, `external` of its tokens are to be loaded."""
        request, now = tracked.request, time.time()
        if "local" in self._decided.get(request.request_id, {}):
            return  # asked once more when its load has ended: what was decided is decided
        if len(self._decided) > MOST_WAITING:
            self._decided.clear()
        first, found = (hit.first_chunk, len(hit.found)) if hit else tracked.left
        known = self._decided[request.request_id] = {
            "at": now, "first": first, "found": found,
            "why": _why(tracked, hit, external), "tiers": [], "covered": 0, "saved": None, "spans": [],
            "load_ms": 0.0, "load_reason": "" if tracked.choice is None else str(tracked.choice.reason),
        }  # fmt: skip
        arrived = float(getattr(request, "arrival_time", 0.0) or 0.0)
        if 0 < arrived < now:
            known["spans"].append(telling.Span(request.request_id, "queue", arrived, (now - arrived) * 1000))

    @_harmless
    def loaded(self, tracked: Any, hit: Any, result: Any, tokens: int, tiers: Sequence[str], seconds: float) -> None:
        """A load has ended, `tokens` of it well."""
        known = self._decided.get(tracked.request.request_id)
        if known is None:
            return
        known["tiers"], known["covered"] = list(tiers), tracked.loading_from + tokens
        known["local"] = tracked.loading_from
        if result.error:
            known["why"] = f"the load failed ({result.error})"[:300]
        handed = hit.promised or (tracked.request.kv_transfer_params or {}).get("do_remote_prefill")
        saved = None if handed else self._saved(tokens, seconds)
        known["saved"] = None if saved is None else round(saved * 1000, 3)
        name, detail = ("transfer", "from the producer") if handed else ("load", "")
        if name == "load":
            known["load_ms"] += seconds * 1000
        known["spans"].append(
            telling.Span(
                tracked.request.request_id, name, time.time() - seconds, seconds * 1000, result.nbytes, tokens,
                "+".join(dict.fromkeys(tiers)), (result.error or detail)[:300],
            )
        )  # fmt: skip

    @_harmless
    def scheduled(self, tracked: Any, computed: int) -> None:
        """The first of its own tokens are computed now; `computed` it has already."""
        request, chain = tracked.request, tracked.chain
        known = self._decided.get(request.request_id)
        if known is None or known.get("told"):
            return
        known["told"] = True
        params = request.kv_transfer_params or {}
        if not (params.get("do_remote_decode") or params.get("do_remote_prefill")):  # of those the handover tells
            self._teller.put_first(telling.Began(request.request_id, time.time(), **(self.handed(tracked) or {"cached": {}})))
        tokens = request.prompt_token_ids
        tail = chain.tail(tokens)
        keys = chain.full(tokens) if tail is None else [*chain.full(tokens), tail]
        lora, trace = request.lora_request, getattr(request, "trace_headers", None) or {}
        told = {
            "leg": request.request_id, "traceparent": str(trace.get("traceparent", ""))[:300], "at": known["at"],
            "tokens": len(tokens), "chunk_tokens": chain.chunk_tokens, "base": self._base,
            "lora": lora.lora_name[:300] if lora else "", "tag": tenant_tag(request.cache_salt or ""),
            "keys": keys[: telling.MOST_CHUNKS], "local": min(known.get("local", computed), len(tokens)),
            "covered": known["covered"], "first_chunk": known["first"],
            "tiers": known["tiers"][: telling.MOST_CHUNKS], "found": known["found"], "why": known["why"],
            "saved_ms": known["saved"],
        }  # fmt: skip

        def make(seed: int) -> telling.Leg:
            made, edges = marks.make(tokens, chain.chunk_tokens, seed, chain.media, _TOKENS_KEPT)
            return telling.Leg(**told, marks=made, edges=edges)

        self._teller.put(make)
        self._spans(known)

    @_harmless
    def finished(self, tracked: Any) -> None:
        request, chain = tracked.request, tracked.chain
        known = self._decided.pop(request.request_id, None)
        if known is None:
            return
        self._spans(known)
        leg, output = request.request_id, request.num_tokens - request.num_prompt_tokens
        reason, tokens = _finish(request), request.all_token_ids  # which do not change any more

        def make(seed: int) -> telling.Ended:
            whole = list(tokens[:_TOKENS_KEPT])
            made, edges = marks.make(whole, chain.chunk_tokens, seed, chain.media, _TOKENS_KEPT)
            return telling.Ended(leg, output, reason, len(whole), made, edges)

        self._teller.put(make)

    @_harmless
    def handed(self, tracked: Any) -> dict[str, Any] | None:
        """For the producer's answer: where its prompt came from. Ask before finished()."""
        known = self._decided.get(tracked.request.request_id)
        if known is None:
            return None
        local = known.get("local", tracked.cached_tokens)
        tiers = {"gpu": local}
        size = tracked.chain.chunk_tokens
        for place, tier in enumerate(known["tiers"]):
            start = (known["first"] + place) * size
            tokens = min(start + size, known["covered"]) - max(start, local)
            tiers[tier] = tiers.get(tier, 0) + max(0, tokens)
        said = {"saved_ms": known["saved"], "load_reason": known["load_reason"]}
        return {"cached": tiers, "load_ms": round(known["load_ms"], 3), **said}

    def close(self) -> None:
        self._teller.close()

    def _spans(self, known: dict[str, Any]) -> None:
        spans, known["spans"] = known["spans"], []
        for span in spans:
            self._teller.put(lambda _, span=span: span)  # type: ignore[misc]


class StoreFacts:
    """The worker's half."""

    def __init__(self, teller: Teller | Nobody) -> None:
        self._teller = teller
        self.failed = False

    @_harmless
    def stored(self, request_id: str, tokens: int, nbytes: int, seconds: float, refused: int) -> None:
        at, detail = time.time() - seconds, f"no room for {refused} tokens" if refused else ""
        self._teller.put(
            lambda _: telling.Span(request_id, "store", at, seconds * 1000, nbytes, tokens, "dram", detail)
        )

    def close(self) -> None:
        self._teller.close()


def _why(tracked: Any, hit: Any, external: int) -> str:
    """Why no more was loaded, as far as the engine knows."""
    choice = tracked.choice
    if choice is not None and not choice.load:
        return f"{choice.reason}: {choice.detail}"[:300] if choice.detail else str(choice.reason)
    if tracked.handover is not None and tracked.handover.over and not external:
        return "what the producer had promised did not come in time"
    fetch = tracked.fetch
    if fetch is not None and fetch.over:
        chosen = tracked.fetch_choice
        if chosen is not None and not chosen.load:
            return "it was in a lower tier, but computing it was estimated to be faster than fetching it"
        return "a lower tier was too slow to wait for"
    return ""


def _finish(request: Any) -> str:
    """vLLM's FINISHED_STOPPED and the like, in OpenAI's words."""
    name = request.status.name
    words = {"FINISHED_STOPPED": "stop", "FINISHED_LENGTH_CAPPED": "length", "FINISHED_ABORTED": "abort"}
    return words.get(name, name.removeprefix("FINISHED_").lower())
