"""One client's request and what is known of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pdserve.engines.base import First
from pdserve.proxy.admission import Pass
from pdserve.proxy.keys import ANYBODY, Key
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.relay import Client
from pdserve.proxy.trail import Trail, headers

_NOBODY = Key(ANYBODY)  # until it is known who asks
_NO_FACTS = Facts("")


@dataclass(slots=True)
class Exchange:
    """One client's request on its way. `headers` are those for the engines."""

    method: bytes
    endpoint: str
    path: bytes
    headers: list[tuple[bytes, bytes]]
    request_id: str
    client: Client
    route: str = "local"
    prefill: str = ""
    decode: str = ""
    key: Key = field(default_factory=lambda: _NOBODY)
    leave: Pass | None = None  # its place at the gate, until its first token
    facts: Facts = _NO_FACTS
    decided: float = 0.0  # when it was decided whether a producer takes part
    uncached: tuple[float, float] | None = None  # tokens to compute, then: with a producer, and without; as in worth.Decision
    prompt_tokens: int | None = None  # as the producer counted them
    marked: bytes = b""  # the client's body, if there are cache_control markers in it
    may_begin: bool = False  # the producer's own first token may begin the stream
    first: First | None = None  # that token
    # For its record (history.py).
    trail: Trail = field(default_factory=Trail)
    model: str = ""
    reason: str = ""
    error: str = ""
    trace_id: str = ""

    def tell_route(self, why: str = "") -> None:
        """Sets the answer's x-pdserve headers to what was done so far."""
        self.reason = why
        said = [("route", self.route), ("prefill", self.prefill), ("decode", self.decode), ("reason", why), *headers(self.trail.handed)]
        said += [("first-token", self.prefill)] if self.first is not None else []
        kept = [header for header in self.client.extra if not header[0].startswith(b"x-pdserve-")]
        self.client.extra = kept + [(b"x-pdserve-" + key.encode(), value.encode()) for key, value in said if value]

    def tell_cached(self, told: dict[str, Any] | None) -> None:
        """What the engine that answers alone had of the prompt, if it told."""
        if told is not None:
            self.trail.handed = told
            self.tell_route(self.reason)
